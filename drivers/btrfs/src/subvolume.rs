//! Subvolumes by open directories.

use crate::sys;
use btrfs_disk::items::{InodeExtref, InodeRef, QgroupStatus, RootRef};
use btrfs_uapi::{
    raw::{
        BTRFS_INODE_EXTREF_KEY, BTRFS_INODE_REF_KEY, BTRFS_QGROUP_STATUS_KEY, BTRFS_QUOTA_TREE_OBJECTID,
        BTRFS_ROOT_REF_KEY, BTRFS_ROOT_TREE_OBJECTID,
    },
    subvolume::{
        SubvolumeFlags, SubvolumeInfo, subvol_rootrefs, subvolume_delete, subvolume_delete_by_id, subvolume_flags_get,
        subvolume_flags_set, subvolume_info,
    },
    tree_search::{Key, SearchFilter, SearchHeader, tree_search},
};
use btrfsutil::subvolume::{SnapshotFlags, Subvolume};
use graphdriver_core::{Context, Error, ErrorKind, Result, Root, root::proc_path};
use graphdriver_quota::qgroup::subvolume_id;
use rustix::{
    fs::{self, AtFlags, IFlags, Mode, OFlags, RenameFlags},
    io::Errno,
};
use std::{
    collections::VecDeque,
    ffi::{CString, OsStr, OsString},
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::{OsStrExt, OsStringExt},
    },
    path::{Path, PathBuf},
};

/// The inode number of every subvolume's root (`BTRFS_FIRST_FREE_OBJECTID`).
const ROOT_INODE: u64 = 256;

/// Opens the directory `name` in `dir`.
pub(crate) fn open(dir: impl AsFd, name: impl AsRef<OsStr>) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    fs::openat(dir, name.as_ref(), flags, Mode::empty())
}

/// Makes an empty subvolume.
pub(crate) fn create(dir: BorrowedFd<'_>, name: &str) -> Result<()> {
    let path = proc_path(dir, name.as_ref());
    Subvolume::create(path.as_path(), None).map(drop).map_err(told)
}

/// Makes a snapshot of the subvolume whose root is open.
pub(crate) fn snapshot(source: BorrowedFd<'_>, dir: BorrowedFd<'_>, name: &str, read_only: bool) -> Result<()> {
    let (from, to) = (proc_path(source, ".".as_ref()), proc_path(dir, name.as_ref()));
    let flags = if read_only { SnapshotFlags::READ_ONLY } else { SnapshotFlags::empty() };
    Subvolume::get(from.as_path()).and_then(|from| from.snapshot(to.as_path(), flags, None)).map(drop).map_err(told)
}

/// libbtrfsutil says what failed, and leaves why in errno.
fn told(e: impl std::fmt::Display) -> Error {
    match io::Error::last_os_error() {
        os if os.raw_os_error() == Some(0) => Error::new(ErrorKind::Io, e.to_string()),
        os => Error::from(os).doing(e.to_string()),
    }
}

/// What the kernel knows of the subvolume a file is in (Linux 4.18).
pub(crate) fn info(file: BorrowedFd<'_>) -> Result<SubvolumeInfo> {
    subvolume_info(file).map_err(io::Error::from).doing(|| "asking about a subvolume")
}

/// Whether the directory is the root of a subvolume, and not merely in one.
pub(crate) fn is_root(dir: BorrowedFd<'_>) -> Result<bool> {
    Ok(fs::fstat(dir)?.st_ino == ROOT_INODE)
}

pub(crate) fn is_read_only(root: BorrowedFd<'_>) -> Result<bool> {
    let flags = subvolume_flags_get(root).map_err(io::Error::from).doing(|| "asking for the flags of a subvolume")?;
    Ok(flags.contains(SubvolumeFlags::RDONLY))
}

/// Durable with what was written to the filesystem's trees before, as it ends with a commit of the filesystem.
pub(crate) fn set_read_only(root: BorrowedFd<'_>, on: bool) -> Result<()> {
    let flags = if on { SubvolumeFlags::RDONLY } else { SubvolumeFlags::empty() };
    subvolume_flags_set(root, flags).map_err(io::Error::from).doing(|| "changing the flags of a subvolume")
}

/// Renames a subvolume in its directory, unless the new name is taken.
pub(crate) fn rename(dir: BorrowedFd<'_>, from: &str, to: &str) -> rustix::io::Result<()> {
    let rename = || fs::renameat_with(dir, from, dir, to, RenameFlags::NOREPLACE);
    match rename() {
        // Its root may have been made immutable in a container.
        Err(Errno::PERM) => {
            loosen(open(dir, from)?.as_fd());
            rename()
        }
        renamed => renamed,
    }
}

/// Takes away what keeps a subvolume from being changed or removed, as far as that can be done. What then does not work
/// says why.
fn loosen(root: BorrowedFd<'_>) {
    let _ = set_read_only(root, false);
    if let Ok(flags) = fs::ioctl_getflags(root) {
        let _ = fs::ioctl_setflags(root, flags - (IFlags::IMMUTABLE | IFlags::APPEND));
    }
}

/// A subvolume in another one, where somebody who could write there made it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Nested {
    /// From the root of the outermost.
    pub path: PathBuf,
    pub id: u64,
}

/// The subvolumes directly in that whose root is given, without those in them.
pub(crate) fn nested_directly(root: BorrowedFd<'_>) -> Result<Vec<Nested>> {
    let found = subvol_rootrefs(root).map_err(io::Error::from).doing(|| "looking for nested subvolumes")?;
    let mut nested = Vec::new();
    for child in found {
        match sys::place_of(root, child.treeid, child.dirid) {
            Ok((dir, name)) => nested.push(Nested { path: dir.join(name), id: child.treeid }),
            Err(e) if e.raw_os_error() == libc_errno(Errno::NAMETOOLONG) => {
                let found = deep_place_of(root, child.treeid).doing(|| "finding a subvolume far below its layer");
                nested.extend(found?.map(|path| Nested { path, id: child.treeid }));
            }
            // Somebody deleted it a moment ago.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(Error::from(e).doing(format!("looking for nested subvolume {}", child.treeid))),
        }
    }
    Ok(nested)
}

/// What [`sys::place_of`] tells, for a path of any length. None if the subvolume is gone. Needs CAP_SYS_ADMIN.
fn deep_place_of(root: BorrowedFd<'_>, id: u64) -> Result<Option<PathBuf>> {
    let key = Key { objectid: subvolume_id(root)?, item_type: BTRFS_ROOT_REF_KEY, offset: id };
    let mut found = None;
    search(root, BTRFS_ROOT_TREE_OBJECTID.into(), key, key, &mut |_, data| found = RootRef::parse(data))?;
    let Some(reference) = found else { return Ok(None) };
    Ok(path_of(root, reference.dirid)?.map(|dir| dir.join(OsStr::from_bytes(&reference.name))))
}

/// The path of a directory from the root of its subvolume, however long; none if it is gone. `BTRFS_IOC_INO_LOOKUP` knows
/// none that is longer than 4080 bytes. Needs CAP_SYS_ADMIN.
pub(crate) fn path_of(subvolume: BorrowedFd<'_>, mut directory: u64) -> Result<Option<PathBuf>> {
    let mut names = Vec::new();
    while directory != ROOT_INODE {
        let Some((above, name)) = names_of(subvolume, directory)?.pop() else { return Ok(None) };
        names.push(name);
        directory = above;
    }
    Ok(Some(names.iter().rev().collect()))
}

/// The names of an inode, each with the inode number of the directory it is in. Needs CAP_SYS_ADMIN.
pub(crate) fn names_of(subvolume: BorrowedFd<'_>, inode: u64) -> Result<Vec<(u64, OsString)>> {
    let key = |item_type, offset| Key { objectid: inode, item_type, offset };
    let (start, end) = (key(BTRFS_INODE_REF_KEY, 0), key(BTRFS_INODE_EXTREF_KEY, u64::MAX));
    let mut names = Vec::new();
    search(subvolume, 0, start, end, &mut |header, data| match header.item_type {
        BTRFS_INODE_REF_KEY => {
            let refs = InodeRef::parse_all(data).into_iter();
            names.extend(refs.map(|r| (header.offset, OsString::from_vec(r.name))));
        }
        BTRFS_INODE_EXTREF_KEY => {
            let refs = InodeExtref::parse_all(data).into_iter();
            names.extend(refs.map(|r| (r.parent, OsString::from_vec(r.name))));
        }
        _ => {}
    })?;
    Ok(names)
}

/// The transaction from which on simple quotas count what is written. Needs CAP_SYS_ADMIN.
pub(crate) fn simple_quotas_since(file: BorrowedFd<'_>) -> Result<u64> {
    let key = Key { objectid: 0, item_type: BTRFS_QGROUP_STATUS_KEY, offset: 0 };
    let mut since = None;
    search(file, BTRFS_QUOTA_TREE_OBJECTID.into(), key, key, &mut |_, data| {
        since = QgroupStatus::parse(data).and_then(|status| status.enable_gen);
    })?;
    since.ok_or_else(|| Error::new(ErrorKind::Unsupported, "the filesystem does not tell since when it counts"))
}

/// The items of a tree from one key to another; tree 0 is that of the subvolume `file` is in.
fn search(
    file: BorrowedFd<'_>,
    tree_id: u64,
    start: Key,
    end: Key,
    visit: &mut dyn FnMut(&SearchHeader, &[u8]),
) -> Result<()> {
    let filter = SearchFilter { tree_id, start, end, min_transid: 0, max_transid: u64::MAX };
    let searched = tree_search(file, filter, |header, data| {
        visit(header, data);
        Ok(())
    });
    searched.map_err(io::Error::from).doing(|| "reading the filesystem's trees")
}

/// All subvolumes in that whose root is given, and those in them: outer before inner.
pub(crate) fn nested(root: &Root) -> Result<Vec<Nested>> {
    let mut all = nested_directly(root.as_fd())?;
    let mut next: VecDeque<Nested> = all.iter().cloned().collect();
    while let Some(outer) = next.pop_front() {
        let inside = match root.open_dir_nofollow(&outer.path) {
            Err(Errno::NOENT) => continue,
            opened => nested_directly(opened?.as_fd())?,
        };
        let inside = inside.into_iter().map(|n| Nested { path: outer.path.join(n.path), id: n.id });
        inside.for_each(|n| {
            all.push(n.clone());
            next.push_back(n);
        });
    }
    Ok(all)
}

/// Deletes the subvolume `name` with all nested in it, not waiting until the kernel has freed the space. `doomed` is told
/// the ids first. Whatever else has the name is removed too; nothing there is no error.
pub(crate) fn destroy(dir: BorrowedFd<'_>, name: &str, doomed: &mut dyn FnMut(&[u64]) -> Result<()>) -> Result<()> {
    let fd = match open(dir, name) {
        Err(Errno::NOENT) => return Ok(()),
        opened => opened.doing(|| format!("opening {name}"))?,
    };
    if fs::fstat(&fd)?.st_ino != ROOT_INODE {
        return std::fs::remove_dir_all(proc_path(dir, name.as_ref())).doing(|| format!("removing {name}"));
    }
    let id = subvolume_id(fd.as_fd())?;
    let root = Root::from_fd(fd);
    let inside = nested(&root)?;
    let ids: Vec<u64> = std::iter::once(id).chain(inside.iter().map(|n| n.id)).collect();
    doomed(&ids)?;
    if !inside.is_empty() {
        // Nothing can be removed from one that is read-only.
        loosen(root.as_fd());
        for outer in &inside {
            root.open_dir_nofollow(&outer.path).map(|fd| loosen(fd.as_fd())).doing(|| format!("opening {name}"))?;
        }
    }
    for inner in inside.iter().rev() {
        let (parent, last) = split(&root, &inner.path)?;
        delete(parent.as_fd(), &last, inner.id).doing(|| format!("deleting nested subvolume {:?}", inner.path))?;
    }
    loosened(root.as_fd(), || delete(dir, name.as_ref(), id)).doing(|| format!("deleting subvolume {name}"))
}

fn split(root: &Root, path: &Path) -> Result<(OwnedFd, OsString)> {
    let name = path.file_name().expect("a nested subvolume has a name").to_owned();
    Ok((root.open_dir_nofollow(path.parent().unwrap_or(Path::new("")))?, name))
}

/// Does something again that was refused, after taking away from `root` what may be the reason.
pub(crate) fn loosened(root: BorrowedFd<'_>, act: impl Fn() -> io::Result<()>) -> io::Result<()> {
    let refused = [libc_errno(Errno::PERM), libc_errno(Errno::ACCESS), libc_errno(Errno::ROFS)];
    match act() {
        Err(e) if refused.contains(&e.raw_os_error()) => {
            loosen(root);
            act()
        }
        done => done,
    }
}

fn libc_errno(e: Errno) -> Option<i32> {
    Some(e.raw_os_error())
}

/// Deletes one subvolume without nested ones: at once where that is allowed (root, or the mount option
/// `user_subvol_rm_allowed`), else as an ordinary directory, which Linux 4.18 lets its owner remove when it is empty.
fn delete(dir: BorrowedFd<'_>, name: &OsStr, id: u64) -> io::Result<()> {
    match subvolume_delete_by_id(dir, id).map_err(io::Error::from) {
        Err(e) if [libc_errno(Errno::PERM), libc_errno(Errno::ACCESS)].contains(&e.raw_os_error()) => {
            let path = proc_path(dir, name);
            let Ok(fd) = open(dir, name) else { return Err(e) };
            if is_read_only(fd.as_fd()).unwrap_or(true) {
                return Err(e);
            }
            std::fs::remove_dir_all(path)
        }
        // The kernel looks for its path from the top of the filesystem, and that may be too long.
        Err(e) if e.raw_os_error() == libc_errno(Errno::NAMETOOLONG) => {
            Ok(subvolume_delete(dir, &CString::new(name.as_bytes())?)?)
        }
        // The cleaner has it already.
        Err(e) if e.kind() == io::ErrorKind::NotFound && fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW).is_err() => {
            Ok(())
        }
        done => done,
    }
}
