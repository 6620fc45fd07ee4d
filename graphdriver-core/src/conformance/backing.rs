//! Filesystems to test on: an image file, formatted and mounted in the test's own mount namespace.

use crate::{Context, Error, ErrorKind, Result};
use std::{
    fmt,
    fs::File,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
};

/// A filesystem that drivers keep their data on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum BackingKind {
    /// ext4 with 256-byte inodes, which hold nanoseconds.
    Ext4,
    /// xfs with `ftype` and `reflink`, as mkfs makes it.
    Xfs,
    /// btrfs.
    Btrfs,
    /// tmpfs.
    Tmpfs,
    /// ext4 as above, with the features and the mount option that project quotas need.
    Ext4Prjquota,
    /// xfs as above, mounted with project quotas.
    XfsPquota,
}

impl BackingKind {
    /// All that every kernel has. Few have project quotas.
    pub const ALL: [BackingKind; 4] = [BackingKind::Ext4, BackingKind::Xfs, BackingKind::Btrfs, BackingKind::Tmpfs];

    fn mkfs(self) -> Option<&'static [&'static str]> {
        match self {
            BackingKind::Ext4 => Some(&["mkfs.ext4", "-q", "-F", "-I", "256"]),
            BackingKind::Xfs => Some(&["mkfs.xfs", "-q", "-f"]),
            BackingKind::Btrfs => Some(&["mkfs.btrfs", "-q", "-f"]),
            BackingKind::Tmpfs => None,
            BackingKind::Ext4Prjquota => {
                Some(&["mkfs.ext4", "-q", "-F", "-I", "256", "-O", "project,quota", "-E", "quotatype=prjquota"])
            }
            BackingKind::XfsPquota => Some(&["mkfs.xfs", "-q", "-f"]),
        }
    }

    fn mount_options(self) -> &'static str {
        match self {
            BackingKind::Ext4Prjquota => "loop,prjquota",
            BackingKind::XfsPquota => "loop,pquota",
            _ => "loop",
        }
    }

    /// Why there is none. What only the guest's kernel has is no failure elsewhere.
    fn missing(self, e: Error) -> Missing {
        match self {
            BackingKind::Ext4Prjquota | BackingKind::XfsPquota => Missing::only_in_guest(e.to_string()),
            _ => Missing::failed(e),
        }
    }
}

impl fmt::Display for BackingKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            BackingKind::Ext4 => "ext4",
            BackingKind::Xfs => "xfs",
            BackingKind::Btrfs => "btrfs",
            BackingKind::Tmpfs => "tmpfs",
            BackingKind::Ext4Prjquota => "ext4-prjquota",
            BackingKind::XfsPquota => "xfs-pquota",
        })
    }
}

/// Why a case was not run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Missing {
    /// What is not there.
    pub what: String,
    /// What brings it.
    pub remedy: String,
    /// By the driver's own capabilities or by [`Setup::without`](super::Setup::without), which is no failure even where
    /// everything is required to run.
    pub excluded: bool,
}

impl Missing {
    /// Something that should have worked.
    pub fn failed(e: Error) -> Missing {
        Missing { what: e.to_string(), remedy: String::new(), excluded: false }
    }

    /// Something that only the guest's kernel has (`GRAPHDRIVER_GUEST=1` there), which runs the case: elsewhere it is no
    /// failure that it cannot run.
    pub fn only_in_guest(what: impl Into<String>) -> Missing {
        let in_guest = std::env::var_os("GRAPHDRIVER_GUEST").is_some_and(|value| value == "1");
        Missing { what: what.into(), remedy: "scripts/guest-test runs it".into(), excluded: !in_guest }
    }
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)?;
        if self.remedy.is_empty() { Ok(()) } else { write!(f, " ({})", self.remedy) }
    }
}

/// Sparse; what the largest cases write fits in it several times.
const SIZE: u64 = 2 << 30;

/// A mounted filesystem of the test's own. The image file has no name and the loop device is freed with the mount
/// (`LO_FLAGS_AUTOCLEAR`), so that the end of the mount namespace, even by a kill, takes all of it.
#[derive(Debug)]
pub struct Backing {
    kind: BackingKind,
    dir: tempfile::TempDir,
    homes: AtomicU64,
}

impl Backing {
    /// Makes and mounts one. The caller must be in a mount namespace of its own.
    pub fn new(kind: BackingKind, size: u64) -> Result<Backing> {
        let dir = tempfile::Builder::new().prefix("graphdriver-test-").tempdir()?;
        let mount = match kind.mkfs() {
            None => run(Command::new("mount")
                .args(["-t", "tmpfs", "-o", &format!("size={size},mode=755"), "tmpfs"])
                .arg(dir.path())),
            Some(mkfs) => mount_image(mkfs, kind.mount_options(), dir.path(), size),
        };
        mount.doing(|| format!("making a filesystem of type {kind} to test on"))?;
        Ok(Backing { kind, dir, homes: AtomicU64::new(0) })
    }

    /// The one of this kind that all cases share, made when the first one asks, gone with the last one.
    pub fn shared(kind: BackingKind) -> Result<Arc<Backing>, Missing> {
        static SHARED: Mutex<[Weak<Backing>; 6]> = Mutex::new([const { Weak::new() }; 6]);
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = &mut shared[kind as usize];
        if let Some(backing) = slot.upgrade() {
            return Ok(backing);
        }
        let backing = Arc::new(Backing::new(kind, SIZE).map_err(|e| kind.missing(e))?);
        *slot = Arc::downgrade(&backing);
        Ok(backing)
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// A new, empty directory in it.
    pub fn directory(&self) -> Result<PathBuf> {
        let path = self.path().join(format!("home{}", self.homes.fetch_add(1, Ordering::Relaxed)));
        std::fs::create_dir(&path).doing(|| format!("making {}", path.display()))?;
        Ok(path)
    }
}

impl Drop for Backing {
    fn drop(&mut self) {
        // Lazily: a failed case may still have a descriptor in it.
        if let Err(e) = crate::mount::unmount(self.path(), true) {
            eprintln!("{} stays mounted until the test ends: {e}", self.kind);
        }
    }
}

fn mount_image(mkfs: &[&str], options: &str, target: &Path, size: u64) -> Result<()> {
    let image = tempfile::NamedTempFile::new()?;
    File::set_len(image.as_file(), size)?;
    run(Command::new(mkfs[0]).args(&mkfs[1..]).arg(image.path()))?;
    run(Command::new("mount").args(["-o", options]).arg(image.path()).arg(target))
}

fn run(command: &mut Command) -> Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let out = command.output().map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => Error::new(ErrorKind::Unsupported, format!("{program} is not installed"))
            .hint("apt-get install e2fsprogs xfsprogs btrfs-progs mount"),
        _ => e.into(),
    })?;
    if out.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&out.stderr);
    Err(Error::new(ErrorKind::Unsupported, format!("{program} failed: {}", said.trim())))
}
