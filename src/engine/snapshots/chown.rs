//! Giving a snapshot's files to other owners, where no mount maps their ids.

use super::labels::IdMaps;
use graphdriver_core::{
    Context, FileKind, Mount, Result, mount,
    root::{inode_at, names_in, set_xattr_at},
};
use rustix::fs::{self, AtFlags, Gid, Mode, OFlags, Uid};
use std::{
    collections::HashSet,
    ffi::OsStr,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

/// Changes the owners of all files that the recipe shows, which is for writing.
pub(super) fn shift(recipe: &[Mount], maps: &IdMaps) -> Result<()> {
    let mount = mount::detached(recipe)?;
    // A mount's own descriptor cannot be read from.
    let root = open_dir(mount.as_fd(), OsStr::new("."))?;
    let mut shift = Shift { maps, done: HashSet::new() };
    shift.one(root.as_fd(), OsStr::new(""))?;
    shift.below(root.as_fd())
}

fn open_dir(dir: BorrowedFd<'_>, name: &OsStr) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(fs::openat(dir, name, flags, Mode::empty())?)
}

struct Shift<'a> {
    maps: &'a IdMaps,
    /// Inodes that have several names, by device and number.
    done: HashSet<(u64, u64)>,
}

impl Shift<'_> {
    fn below(&mut self, dir: BorrowedFd<'_>) -> Result<()> {
        for name in names_in(dir)? {
            let is_dir = self.one(dir, &name).doing(|| format!("changing the owner of {}", name.display()))?;
            if is_dir {
                let sub = open_dir(dir, &name)?;
                self.below(sub.as_fd()).doing(|| format!("in {}", name.display()))?;
            }
        }
        Ok(())
    }

    /// Whether it is a directory.
    fn one(&mut self, dir: BorrowedFd<'_>, name: &OsStr) -> Result<bool> {
        let inode = inode_at(dir, name)?;
        let is_dir = inode.meta.kind == FileKind::Directory;
        if self.done.contains(&(inode.dev, inode.ino)) {
            return Ok(is_dir);
        }
        let (uid, gid) = (self.maps.users.outside(inode.meta.uid)?, self.maps.groups.outside(inode.meta.gid)?);
        let at = AtFlags::SYMLINK_NOFOLLOW | AtFlags::EMPTY_PATH;
        fs::chownat(dir, name, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)), at)?;
        // chown(2) takes away what gives privileges.
        if matches!(inode.meta.kind, FileKind::File { .. }) {
            if inode.meta.mode & 0o6000 != 0 {
                fs::chmodat(dir, name, Mode::from(inode.meta.mode), AtFlags::empty())?;
            }
            if let Some(capability) = inode.meta.xattrs.get(OsStr::new(CAPABILITY)) {
                let root = self.maps.users.outside(0)?;
                set_xattr_at(dir, name, OsStr::new(CAPABILITY), &capability_of(capability, root))?;
            }
        }
        if !is_dir && inode.nlink > 1 {
            // Its number can be another one by now: overlayfs copies up one name, and the other stays what it was.
            let now = inode_at(dir, name)?;
            self.done.insert((now.dev, now.ino));
        }
        Ok(is_dir)
    }
}

const CAPABILITY: &str = "security.capability";

/// A file's capabilities count in the user namespace of the container only if they name its root user: version 3 of
/// linux/capability.h, `struct vfs_ns_cap_data`, is version 2 and that id.
fn capability_of(value: &[u8], root: u32) -> Vec<u8> {
    let mut value = value.to_vec();
    if value.len() == 20 && value[3] == 2 && root != 0 {
        value[3] = 3;
        value.extend(root.to_le_bytes());
    }
    value
}
