//! The layers' roots, and the numbers that files of all of them are shown with.

use parking_lot::RwLock;
use rustix::{
    fd::{AsFd, BorrowedFd, OwnedFd},
    fs::{AtFlags, CWD, Mode, OFlags, Statx, StatxFlags},
    io::Result,
};
use std::{ffi::OsStr, os::unix::ffi::OsStrExt, path::Path};

/// Flags that open a directory to work in it, never through a symlink.
const DIR: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// The root of a layer. A symlink as the last part of the path is followed: it is the user's own.
pub(super) fn open_root(path: &Path) -> Result<OwnedFd> {
    rustix::fs::openat(CWD, path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

/// The same directory in a mount of our own, which changes no access times: the kernel opens passed-through files as their
/// readers did, not as we. `None` without the privilege, and before Linux 5.19, which shares no data between mounts.
pub(super) fn without_times(path: &Path) -> Option<OwnedFd> {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let mut numbers = release.split(['.', '-']).map_while(|n| n.parse::<u32>().ok());
    if (numbers.next()?, numbers.next()?) < (5, 19) {
        return None;
    }
    let options = ["ro", "noatime", "nodiratime"].map(String::from).to_vec();
    let recipe = graphdriver_core::Mount { fstype: "bind".into(), source: path.to_owned(), options };
    graphdriver_core::mount::detached(&[recipe]).ok()
}

/// A directory below another one.
pub(super) fn open_dir(dir: BorrowedFd<'_>, name: &OsStr) -> Result<OwnedFd> {
    rustix::fs::openat(dir, name, DIR, Mode::empty())
}

/// The parts of a path in a layer, which comes from an xattr: `..`, which would lead out, is refused.
pub(super) fn parts(path: &[u8]) -> Option<Vec<&OsStr>> {
    let parts: Vec<_> = path.split(|b| *b == b'/').filter(|p| !p.is_empty() && *p != b".").collect();
    let harmless = parts.iter().all(|p| *p != b".." && !p.contains(&0) && p.len() <= 255);
    harmless.then(|| parts.into_iter().map(OsStr::from_bytes).collect())
}

/// A directory by its path from a layer's root.
pub(super) fn open_path(root: BorrowedFd<'_>, path: &[u8]) -> Result<OwnedFd> {
    let mut dir = open_dir(root, OsStr::new("."))?;
    for part in parts(path).ok_or(rustix::io::Errno::INVAL)? {
        dir = open_dir(dir.as_fd(), part)?;
    }
    Ok(dir)
}

/// What one name is; of `dir` itself if the name is empty.
pub(super) fn stat(dir: BorrowedFd<'_>, name: &OsStr) -> Result<Statx> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::EMPTY_PATH | AtFlags::NO_AUTOMOUNT;
    rustix::fs::statx(dir, name, flags, StatxFlags::BASIC_STATS)
}

/// The same, and when it was made, where the filesystem tells.
pub(super) fn stat_with_birth(dir: BorrowedFd<'_>, name: &OsStr) -> Result<Statx> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::EMPTY_PATH | AtFlags::NO_AUTOMOUNT;
    rustix::fs::statx(dir, name, flags, StatxFlags::BASIC_STATS | StatxFlags::BTIME)
}

/// Device number as one word.
pub(super) fn device(stat: &Statx) -> u64 {
    rustix::fs::makedev(stat.stx_dev_major, stat.stx_dev_minor)
}

/// How many bits of a file's own inode number are shown as they are. Above them is the number of its filesystem.
const NUMBER_BITS: u32 = 52;
/// Marks numbers that are made up, as a filesystem's own did not fit or two objects claimed the same.
const MADE_UP: u64 = 1 << 62;

/// Makes inode numbers unique across filesystems. The first one, on which mostly all layers are, has number 0, so that its
/// files show their own inode numbers.
#[derive(Debug, Default)]
pub(super) struct Numbers {
    devices: RwLock<Vec<u64>>,
}

impl Numbers {
    /// Gives the device its number. Layers are presented in order at mount, so that numbers are the same at each.
    pub fn present(&self, device: u64) -> u64 {
        if let Some(at) = self.devices.read().iter().position(|d| *d == device) {
            return at as u64;
        }
        let mut devices = self.devices.write();
        if let Some(at) = devices.iter().position(|d| *d == device) {
            return at as u64;
        }
        devices.push(device);
        devices.len() as u64 - 1
    }

    /// The number a file is shown with.
    pub fn of(&self, device: u64, inode: u64) -> u64 {
        let filesystem = self.present(device);
        if inode >> NUMBER_BITS == 0 && filesystem < 1 << (62 - NUMBER_BITS) {
            filesystem << NUMBER_BITS | inode
        } else {
            spread(filesystem, inode)
        }
    }
}

/// A number that is very likely nobody else's, always the same for the same two words.
pub(super) fn spread(a: u64, b: u64) -> u64 {
    let mixed = (a.wrapping_add(0x9e37_79b9_7f4a_7c15) ^ b.rotate_left(17)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    MADE_UP | (mixed ^ mixed >> 29) & (MADE_UP - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_the_first_filesystem_are_its_own() {
        let numbers = Numbers::default();
        assert_eq!(numbers.of(7, 12), 12);
        assert_eq!(numbers.of(8, 12), 1 << 52 | 12);
        assert_ne!(numbers.of(8, 1 << 60), numbers.of(7, 1 << 60));
        assert_eq!(numbers.of(8, 1 << 60), numbers.of(8, 1 << 60));
    }

    #[test]
    fn paths_that_lead_out_are_refused() {
        assert!(parts(b"/a/../b").is_none());
        assert_eq!(parts(b"//a/./b/").unwrap(), ["a", "b"]);
        assert!(parts(b"").unwrap().is_empty());
    }
}
