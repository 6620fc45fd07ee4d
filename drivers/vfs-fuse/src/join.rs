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
    mount::MountAttrFlags,
};
use std::{
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
    time::{Duration, Instant},
};

/// In the work directory, a symlink whose target is `MAJOR:MINOR`: the device number of the mount that whoever has the layer
/// serves. It takes no block.
const DEVICE: &str = "vfs-fuse/device";

/// Tells [`joined`] which filesystem is this layer's. The caller serves it.
pub fn announce(work: &Path, (major, minor): (u32, u32)) -> Result<()> {
    let path = work.join(DEVICE);
    std::os::unix::fs::symlink(format!("{major}:{minor}"), &path).doing(|| format!("making {}", path.display()))
}

/// A detached mount of the filesystem that the daemon of the layer `upper` serves, with these attributes and no others;
/// `None` if the layer has no daemon, so that it is the caller's to mount.
///
/// Fails with `Busy` if this mount namespace does not show it. What its daemon announced counts, which only those can write
/// who can write the layer.
pub fn joined(upper: &Path, work: &Path, attributes: MountAttrFlags) -> Result<Option<OwnedFd>> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let busy = match claim::claim(upper, Duration::ZERO) {
            Ok(_) => return Ok(None),
            Err(busy) if busy.kind() == ErrorKind::Busy => busy,
            Err(e) => return Err(e),
        };
        if let Some(dev) = announced(work) {
            for entry in mount::table()?.iter().filter(|entry| is_whole(entry, dev)) {
                match clone_of(entry).and_then(|mount| mount::separate(mount.as_fd(), attributes).map(|()| mount)) {
                    Ok(mount) => return Ok(Some(mount)),
                    // It may just have been unmounted, or be hidden below another one.
                    Err(e) => tracing::debug!(at = %entry.mount_point.display(), "not joined: {e}"),
                }
            }
        }
        // The daemon may be just starting, or just ending.
        if Instant::now() >= deadline {
            return Err(busy.doing("joining its mount, which is not in this mount namespace"));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn announced(work: &Path) -> Option<(u32, u32)> {
    let target = std::fs::read_link(work.join(DEVICE)).ok()?;
    let (major, minor) = target.to_str()?.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

fn is_whole(entry: &MountInfo, dev: (u32, u32)) -> bool {
    entry.dev == dev && entry.fstype.as_bytes().starts_with(b"fuse") && entry.root == Path::new("/")
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
    fn what_is_announced_is_read_and_nothing_else() {
        let work = tempfile::tempdir().unwrap();
        assert_eq!(announced(work.path()), None);
        std::fs::create_dir(work.path().join("vfs-fuse")).unwrap();
        announce(work.path(), (0, 99)).unwrap();
        assert_eq!(announced(work.path()), Some((0, 99)));
        for odd in ["0", "0:x", "0:1:2", ":"] {
            std::fs::remove_file(work.path().join(DEVICE)).unwrap();
            std::os::unix::fs::symlink(odd, work.path().join(DEVICE)).unwrap();
            assert_eq!(announced(work.path()), None, "{odd:?}");
        }
    }
}
