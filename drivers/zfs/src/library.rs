//! libzfs_core, ZFS's stable programming interface.

use crate::storage::Storage;
use graphdriver_core::{Context, Error, ErrorKind, Result};
use graphdriver_quota::refquota::zfs;
use nvpair::NvList;
use rustix::io::Errno;
use zfs_core::Zfs;

pub(crate) struct Library(Zfs);

impl Library {
    pub(crate) fn open() -> Result<Library> {
        Zfs::new().map(Library).doing(|| "opening libzfs_core").hint(|| "modprobe zfs")
    }
}

impl Storage for Library {
    fn clone(&self, origin: &str, name: &str) -> Result<()> {
        self.0.clone_dataset(name, origin, &mut NvList::new()).doing(|| format!("cloning {origin} to {name}"))
    }

    fn snapshot(&self, name: &str) -> Result<()> {
        let done = self.0.snapshot([name]).map_err(|e| match e {
            zfs_core::Error::Io { source } => source.into(),
            zfs_core::Error::List { source } => match source.iter().next() {
                Some((_, errno)) => errno.into(),
                None => Error::new(ErrorKind::Io, "ZFS gave no reason"),
            },
        });
        done.doing(|| format!("making snapshot {name}"))
    }

    fn rename(&self, from: &str, to: &str) -> Result<()> {
        self.0.rename(from, to).doing(|| format!("renaming {from} to {to}"))
    }

    fn destroy(&self, dataset: &str) -> Result<()> {
        let all = zfs(&["list", "-H", "-r", "-t", "filesystem,volume,snapshot", "-o", "name", dataset])?;
        // Listed are parents before their children, and datasets before their snapshots.
        for name in all.lines().rev() {
            match self.0.destroy(name).map_err(in_use) {
                // A temporary snapshot of `zfs diff` goes by itself.
                Err(e) if e.kind() == ErrorKind::NotFound && name != dataset => {}
                done => done.doing(|| format!("destroying {name}"))?,
            }
        }
        Ok(())
    }

    fn describe(&self) -> &'static str {
        "libzfs_core"
    }
}

/// A snapshot with clones gives `EEXIST`, as does a dataset with snapshots (libzfs_core.c, `lzc_destroy`).
fn in_use(e: std::io::Error) -> Error {
    match e.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::EXIST) => Error::new(ErrorKind::Busy, "it has clones or snapshots"),
        _ => e.into(),
    }
}
