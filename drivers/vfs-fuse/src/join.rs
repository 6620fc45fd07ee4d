//! A second mount of a layer that a daemon has already: the same filesystem, shown once more.
//!
//! Whoever asks for it was told how to mount the layer, and not where it is mounted. To bind what is there would be a race:
//! when the mount has just gone, the empty directory below it shows in its place. Here it is cloned first and looked at then.

use crate::claim::{self, PATIENCE};
use graphdriver_core::{
    Context, Error, ErrorKind, Result,
    mount::{self, MountInfo},
};
use rustix::{
    fs::{AtFlags, CWD, Mode, OFlags, StatxFlags, openat, statx},
    process::getuid,
};
use std::{
    ffi::OsStr,
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
    time::{Duration, Instant},
};

/// A detached mount of the filesystem that the daemon of the layer `upper` serves; `None` if the layer has no daemon, so that
/// it is the caller's to mount.
///
/// It is known by its source, which has to be the layer's alone, among the mounts that this user has made and this mount
/// namespace shows. Fails with `Busy` if it is none of these.
pub fn joined(upper: &Path, source: &OsStr) -> Result<Option<OwnedFd>> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let busy = match claim::claim(upper, Duration::ZERO) {
            Ok(_) => return Ok(None),
            Err(busy) if busy.kind() == ErrorKind::Busy => busy,
            Err(e) => return Err(e),
        };
        for entry in mount::table()?.iter().filter(|entry| is_ours(entry, source)) {
            match clone_of(entry) {
                Ok(mount) => return Ok(Some(mount)),
                // It may just have been unmounted, or be hidden below another one.
                Err(e) => tracing::debug!(at = %entry.mount_point.display(), "not joined: {e}"),
            }
        }
        // The daemon may be just starting, or just ending.
        if Instant::now() >= deadline {
            return Err(busy.doing("joining its mount, which is not in this mount namespace"));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Anybody may let fusermount3 mount something with any source: whose it is says the kernel.
fn is_ours(entry: &MountInfo, source: &OsStr) -> bool {
    let user = format!("user_id={}", getuid().as_raw());
    let mut options = entry.super_options.as_bytes().split(|byte| *byte == b',');
    entry.source == source
        && entry.fstype.as_bytes().starts_with(b"fuse")
        && entry.root == Path::new("/")
        && options.any(|option| option == user.as_bytes())
}

/// What is mounted there now may be another.
fn clone_of(entry: &MountInfo) -> Result<OwnedFd> {
    let at = &entry.mount_point;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let dir = openat(CWD, at, flags, Mode::empty()).doing(|| format!("opening {}", at.display()))?;
    let mount = mount::clone_of(dir.as_fd())?;
    let found =
        statx(&mount, "", AtFlags::EMPTY_PATH, StatxFlags::MODE).doing(|| format!("looking at {}", at.display()))?;
    match (found.stx_dev_major, found.stx_dev_minor) == entry.dev {
        true => Ok(mount),
        false => Err(Error::new(ErrorKind::NotFound, "another filesystem is there")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn others_mounts_with_the_same_source_are_not_ours() {
        let own = getuid().as_raw();
        let entry = |fstype: &str, root: &str, options: &str| MountInfo {
            id: 2,
            parent: 1,
            dev: (0, 99),
            root: root.into(),
            mount_point: "/mnt".into(),
            fstype: fstype.into(),
            source: "graphdriver:/d:3".into(),
            options: "rw".into(),
            super_options: options.into(),
        };
        let (ours, other) = (format!("rw,user_id={own},group_id=0"), format!("rw,user_id={},group_id=0", own + 1));
        let source = OsStr::new("graphdriver:/d:3");
        assert!(is_ours(&entry("fuse.vfs-fuse", "/", &ours), source));
        assert!(!is_ours(&entry("fuse.vfs-fuse", "/", &ours), OsStr::new("graphdriver:/d:33")));
        assert!(!is_ours(&entry("fuse.vfs-fuse", "/", &other), source));
        assert!(!is_ours(&entry("fuse.vfs-fuse", "/dir", &ours), source));
        assert!(!is_ours(&entry("overlay", "/", &ours), source));
    }
}
