//! Completion of a whole upper layer that nobody has mounted.

use super::{ExtentFile, Header, Unit, probe};
use crate::config::Config;
use graphdriver_core::{Context, Error, ErrorKind, OverlayXattrs, Result};
use rustix::{
    fs::{Dir, FileType, Mode, OFlags, ResolveFlags},
    io::Errno,
};
use std::{
    ffi::OsStr,
    ops::ControlFlow,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::PathBuf,
};

/// What [`complete_layer`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Completed {
    /// Extent files that became plain.
    pub files: u64,
    /// Bytes copied into them.
    pub bytes: u64,
}

/// Directories in the work directory, outermost first, that make the kernel's overlay refuse the mount, with a message
/// that names the last one (Linux 5.10, `fs/overlayfs/readdir.c`, "incompat").
pub(crate) const INCOMPAT: [&str; 3] = ["work", "work/incompat", "work/incompat/vfs-fuse-extents"];

/// Makes every extent file of the upper layer plain, and changes nothing else. Nobody may have the layer mounted. Can be
/// called again after any failure, and goes on.
///
/// Files count that are marked as the mount by this configuration would mark them. In a privileged mount's layer anybody
/// may write `user.` marks, which would have the data of any lower file copied for them.
pub fn complete_layer(config: &Config) -> Result<Completed> {
    let upper = config.upper.as_ref().ok_or_else(|| {
        Error::new(ErrorKind::InvalidInput, "completing files needs an upper layer").hint("give upperdir=")
    })?;
    let root = open_root(upper).doing(|| format!("opening the upper layer {}", upper.display()))?;
    let prefix = if config.sees_trusted() { OverlayXattrs::Trusted } else { OverlayXattrs::User }.prefix();
    let mut walk = Walk { config, prefix, unit: None, done: Completed::default(), others: 0 };
    walk.directory(root, &mut upper.clone())?;
    let incomplete = config.work.as_ref().is_some_and(|work| work.join(INCOMPAT[2]).exists());
    if incomplete && walk.done.files == 0 && walk.others > 0 {
        let why = format!("{} files are marked as incomplete by an unprivileged mount", walk.others);
        return Err(Error::new(ErrorKind::Unsupported, why).hint(
            "let the user who made the layer complete it, or add userxattr if everybody who could write to it may read \
             what lies below",
        ));
    }
    if let Some(work) = &config.work {
        allow_the_kernel(work).doing(|| format!("cleaning the work directory {}", work.display()))?;
    }
    Ok(walk.done)
}

/// Nothing is incomplete any more.
fn allow_the_kernel(work: &PathBuf) -> rustix::io::Result<()> {
    let work = open_root(work)?;
    for path in INCOMPAT[1..].iter().rev() {
        match rustix::fs::unlinkat(&work, *path, rustix::fs::AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT | Errno::NOTEMPTY | Errno::ACCESS) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

fn open_root(path: &PathBuf) -> rustix::io::Result<OwnedFd> {
    rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

/// Found out for the first file, as it waits for the disk and few layers have any. Files made where holes could be trusted
/// are completed even where they no longer could.
fn unit_of(config: &Config) -> Unit {
    let found =
        config.work.as_ref().and_then(|work| open_root(work).and_then(|work| probe(work.as_fd())).ok().flatten());
    found.unwrap_or(Unit(65536))
}

struct Walk<'a> {
    config: &'a Config,
    prefix: &'static str,
    /// What an extent file is made of, once there was one.
    unit: Option<Unit>,
    done: Completed,
    /// Files with a header that does not count.
    others: u64,
}

impl Walk<'_> {
    fn directory(&mut self, directory: OwnedFd, path: &mut PathBuf) -> Result<()> {
        let listing = || format!("listing {}", path.display());
        let entries: Vec<_> = Dir::read_from(&directory).doing(listing)?.collect::<Result<_, _>>().doing(listing)?;
        for entry in entries {
            let name = entry.file_name().to_bytes();
            if name == b"." || name == b".." {
                continue;
            }
            path.push(OsStr::from_bytes(name));
            let kind = match entry.file_type() {
                FileType::Unknown => {
                    let stat = rustix::fs::statat(&directory, entry.file_name(), rustix::fs::AtFlags::SYMLINK_NOFOLLOW);
                    FileType::from_raw_mode(stat.doing(|| format!("looking at {}", path.display()))?.st_mode)
                }
                kind => kind,
            };
            let open = |flags| rustix::fs::openat(&directory, entry.file_name(), flags | NO_SURPRISES, Mode::empty());
            match kind {
                FileType::Directory => {
                    let inner = open(OFlags::RDONLY | OFlags::DIRECTORY);
                    self.directory(inner.doing(|| format!("opening {}", path.display()))?, path)?;
                }
                FileType::RegularFile => {
                    self.file(&open).doing(|| format!("completing {}", path.display()))?;
                }
                _ => {}
            }
            path.pop();
        }
        Ok(())
    }

    fn file(&mut self, open: &dyn Fn(OFlags) -> rustix::io::Result<OwnedFd>) -> Result<()> {
        let file = open(OFlags::RDONLY | OFlags::NONBLOCK)?;
        let Some(value) = header_of(file.as_fd(), self.prefix)? else {
            let user = OverlayXattrs::User.prefix();
            self.others += u64::from(self.prefix != user && header_of(file.as_fd(), user)?.is_some());
            return Ok(());
        };
        let header = Header::decode(&value)
            .doing(|| "reading its header of an extent file")
            .map_err(|e| e.hint("it was damaged, or written by a newer version"))?;
        let lower = self.lower(&header)?;
        let unit = *self.unit.get_or_insert_with(|| unit_of(self.config));
        let file = ExtentFile::open(open(OFlags::RDWR)?, lower, header, self.prefix, unit, true).map_err(|e| {
            Error::from(e).hint("it or its lower file was replaced or copied since; the original layers are needed")
        })?;
        let bytes = &mut self.done.bytes;
        file.complete(&mut |copied| {
            *bytes += copied;
            ControlFlow::Continue(())
        })?;
        self.done.files += 1;
        Ok(())
    }

    fn lower(&self, header: &Header) -> Result<OwnedFd> {
        let layers = &self.config.lower;
        let path = OsStr::from_bytes(&header.path);
        let layer = layers.len().checked_sub(1 + usize::from(header.layer_from_bottom)).map(|i| &layers[i]);
        let layer = layer.ok_or_else(|| {
            let reason =
                format!("its data is in lower layer {} from the bottom, of {}", header.layer_from_bottom, layers.len());
            Error::new(ErrorKind::InvalidInput, reason).hint("give the lowerdir= it was mounted with")
        })?;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        open_root(layer)
            .and_then(|root| {
                let found = rustix::fs::openat2(&root, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve)?;
                // The path comes from disk, and opening some devices has effects.
                if FileType::from_raw_mode(rustix::fs::fstat(&found)?.st_mode) != FileType::RegularFile {
                    return Err(Errno::IO);
                }
                rustix::fs::openat2(&root, path, OFlags::RDONLY | NO_SURPRISES, Mode::empty(), resolve)
            })
            .doing(|| format!("opening its lower file {} in {}", path.display(), layer.display()))
            .map_err(|e| e.hint("give the lowerdir= it was mounted with"))
    }
}

/// No symlink, no waiting for the other end of a FIFO.
const NO_SURPRISES: OFlags = OFlags::NOFOLLOW.union(OFlags::NONBLOCK).union(OFlags::CLOEXEC);

fn header_of(file: BorrowedFd<'_>, prefix: &str) -> rustix::io::Result<Option<Vec<u8>>> {
    Header::find(|name| {
        let mut value = vec![0; 65536];
        match rustix::fs::fgetxattr(file, format!("{prefix}{name}"), &mut value[..]) {
            Ok(length) => {
                value.truncate(length);
                Ok(Some(value))
            }
            // Without the right to see `trusted.`, and on filesystems without `user.`.
            Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(None),
            Err(e) => Err(e),
        }
    })
}
