//! A temporary directory where a driver finds out what the filesystem below its data can do, by doing it.

use super::{open_dir, tree};
use crate::{Context, Error, ErrorKind, OverlayXattrs, Result, Unmet, mount};
use rustix::fs::{self, AtFlags, CWD, Dir, FileType, FlockOperation, Mode, OFlags, StatxFlags};
use std::{
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    time::Duration,
};

/// How the names of such directories begin.
const PREFIX: &str = ".graphdriver-probe-";

/// A new directory of its own, removed when this is dropped. One whose process was killed is removed by the next trial,
/// or by [`Home::reclaim`](super::Home::reclaim).
#[derive(Debug)]
pub struct Trial {
    // The directory goes before the lock: who finds one that nobody holds may remove it.
    tmp: tempfile::TempDir,
    _lock: OwnedFd,
    xattrs: OverlayXattrs,
}

impl Trial {
    /// Makes one in `dir`. Fails where layers in overlayfs's format cannot be at all, for want of xattrs or of file types
    /// in directories.
    pub fn new(dir: &Path) -> Result<Trial> {
        sweep(dir).unwrap_or_else(|e| tracing::debug!("sweeping {}: {e}", dir.display()));
        let (tmp, lock) = locked_dir(dir)?;
        needs_d_type(tmp.path())?;
        Ok(Trial { xattrs: writable_xattrs(tmp.path())?, tmp, _lock: lock })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.tmp.path()
    }

    /// `trusted.` if this process may write it here, else `user.`.
    pub fn xattrs(&self) -> OverlayXattrs {
        self.xattrs
    }

    /// Whether files can share extents.
    pub fn reflinks(&self) -> bool {
        let (from, to) = (self.path().join("from"), self.path().join("to"));
        let clone = || -> Result<()> {
            std::fs::write(&from, [7; 4096])?;
            Ok(fs::ioctl_ficlone(std::fs::File::create(to)?, std::fs::File::open(from)?)?)
        };
        clone().is_ok()
    }
}

/// The type of the filesystem that `dir` lies on, as the table of mounts calls it.
pub fn backing(dir: &Path) -> String {
    let find = || -> Result<Option<String>> {
        let mnt_id = fs::statx(CWD, dir, AtFlags::empty(), StatxFlags::MNT_ID)?.stx_mnt_id;
        let found = mount::table()?.into_iter().find(|m| m.id == mnt_id);
        Ok(found.map(|m| m.fstype.to_string_lossy().into_owned()))
    };
    find().ok().flatten().unwrap_or_else(|| "unknown filesystem".into())
}

/// `path`, or the nearest directory above that exists.
pub fn nearest_existing(path: &Path) -> Result<PathBuf> {
    let path = std::path::absolute(path)?;
    let found = path.ancestors().find(|dir| dir.is_dir()).unwrap_or(Path::new("/"));
    Ok(found.to_path_buf())
}

/// Why nothing could be tried out in `dir`, in words for users.
fn unmet(e: &Error, dir: &Path) -> Unmet {
    // The steps lead through a temporary directory, which says nothing to the user.
    let because = e.reason();
    let remedy = e.hint_text().map(str::to_owned);
    if e.kind() == ErrorKind::PermissionDenied {
        let missing = format!("the right to write to {} and to mount there: {because}", dir.display());
        let remedy = "run as root, or own the directory and run inside a user namespace: podman unshare, or unshare --map-auto --map-root-user --mount";
        return Unmet { missing, remedy: remedy.into() };
    }
    if because.contains("Read-only file system") {
        let missing = format!("{} is on a filesystem mounted read-only", dir.display());
        return Unmet { missing, remedy: "remount it writable: mount -o remount,rw".into() };
    }
    if because.contains("no filesystem") || matches!(e.kind(), ErrorKind::OutOfSpace | ErrorKind::QuotaExceeded) {
        return Unmet { missing: because.into(), remedy: remedy.unwrap_or_else(|| "free some space".into()) };
    }
    Unmet {
        missing: format!("{} at {} cannot hold overlayfs's writable layers: {because}", backing(dir), dir.display()),
        remedy: remedy.unwrap_or_else(|| "put the data root on ext4, xfs, btrfs or tmpfs".into()),
    }
}

/// The same as an error, its meaning kept where callers act on it.
pub fn adopt_unmet(e: &Error, dir: &Path) -> Error {
    let unmet = unmet(e, dir);
    let kind = match e.kind() {
        kind @ (ErrorKind::OutOfSpace | ErrorKind::QuotaExceeded | ErrorKind::PermissionDenied) => kind,
        _ => ErrorKind::Unsupported,
    };
    Error::new(kind, unmet.missing).hint(unmet.remedy)
}

pub(super) fn is_trial(name: &str) -> bool {
    name.starts_with(PREFIX)
}

/// Whether `home/name` is a trial whose process is gone. One that was just made may not be locked yet.
pub(super) fn is_abandoned(home: &Path, name: &str) -> bool {
    is_trial(name) && abandoned(&home.join(name)).is_some()
}

/// The same for who only looks, and says so of none that may still be waiting for its lock.
pub(super) fn is_long_abandoned(home: &Path, name: &str) -> bool {
    let changed = || std::fs::symlink_metadata(home.join(name))?.modified();
    let young = || Some(changed().ok()?.elapsed().ok()? < Duration::from_secs(60));
    is_abandoned(home, name) && young() == Some(false)
}

/// The lock of a trial, if the process that made it is gone.
pub(super) fn abandoned(path: &Path) -> Option<OwnedFd> {
    let dir = open_dir(path).ok()?;
    fs::flock(&dir, FlockOperation::NonBlockingLockExclusive).ok().map(|()| dir)
}

/// A new directory to try things out in, locked.
fn locked_dir(dir: &Path) -> Result<(tempfile::TempDir, OwnedFd)> {
    loop {
        let tmp = tempfile::Builder::new().prefix(PREFIX).tempdir_in(dir)?;
        // Before it was locked somebody may have taken it for abandoned.
        let lock = match open_dir(tmp.path()) {
            Err(rustix::io::Errno::NOENT) => continue,
            opened => opened?,
        };
        fs::flock(&lock, FlockOperation::LockExclusive)?;
        if fs::fstat(&lock)?.st_nlink > 0 {
            return Ok((tmp, lock));
        }
    }
}

/// Removes what killed processes were trying out in `home`.
fn sweep(home: &Path) -> Result<()> {
    for entry in std::fs::read_dir(home)? {
        let name = entry?.file_name();
        let Some(name) = name.to_str().filter(|name| is_trial(name)) else { continue };
        if let Some(_lock) = abandoned(&home.join(name)) {
            tree::remove(open_dir(home)?.as_fd(), name).doing(|| format!("removing what was left of {name}"))?;
        }
    }
    Ok(())
}

fn writable_xattrs(dir: &Path) -> Result<OverlayXattrs> {
    let writes = |xattrs: OverlayXattrs| xattr::set(dir, format!("{}probe", xattrs.prefix()), b"1");
    if writes(OverlayXattrs::Trusted).is_ok() {
        return Ok(OverlayXattrs::Trusted);
    }
    writes(OverlayXattrs::User).map(|()| OverlayXattrs::User).map_err(|e| {
        Error::from(e)
            .doing("setting an extended attribute")
            .hint("put the data root on ext4, xfs or btrfs; tmpfs has user attributes since Linux 6.6")
    })
}

/// Without file types in directory entries overlayfs cannot tell whiteouts (kernel `overlayfs.rst`, "Upper and Lower").
fn needs_d_type(dir: &Path) -> Result<()> {
    std::fs::write(dir.join("type"), "")?;
    let fd = fs::openat(CWD, dir, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    for entry in Dir::read_from(&fd)? {
        let entry = entry?;
        if entry.file_name() == c"type" && entry.file_type() != FileType::RegularFile {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "its directories do not tell the type of their entries (d_type)",
            )
            .hint("an xfs must be made with ftype=1: mkfs.xfs -n ftype=1"));
        }
    }
    Ok(())
}
