//! Directory trees of the layers' own: measuring and removing them, by descriptor, with few of those however deep they are.

use crate::{Context, Error, ErrorKind, Result, Usage};
use rustix::{
    fs::{self, AtFlags, CWD, Dir, FileType, IFlags, Mode, OFlags, RenameFlags, StatxFlags},
    io::Errno,
};
use std::{
    collections::{HashMap, hash_map::Entry},
    ffi::{CStr, CString},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

fn open_below(dir: impl AsFd, name: &CStr) -> rustix::io::Result<OwnedFd> {
    fs::openat(dir, name, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}

/// What a tree takes on disk, its root included; an inode with several names counts once. Extents shared with other
/// files (reflinks) count in each of them. The tree may change meanwhile.
pub(super) fn usage(root: &Path) -> Result<Usage> {
    walk(root, None).map(|walk| walk.usage)
}

/// What a tree takes on disk, its root included, without what is `but` in its root. An inode that has a name there counts
/// as being there.
pub(super) fn usage_around(root: &Path, but: &CStr) -> Result<Usage> {
    let Walk { mut usage, met, .. } = walk(root, Some(but))?;
    for linked in met.values().filter(|linked| linked.names_left > 0) {
        usage.bytes -= linked.bytes;
        usage.inodes -= 1;
    }
    Ok(usage)
}

fn walk(root: &Path, but: Option<&CStr>) -> Result<Walk> {
    for _ in 0..3 {
        if let Some(walk) = Walk::run(root, but).doing(|| format!("measuring {}", root.display()))? {
            return Ok(walk);
        }
    }
    Err(Error::new(ErrorKind::Busy, format!("directories are moved all the time in {}", root.display())))
}

#[derive(Default)]
struct Walk {
    usage: Usage,
    /// Inodes with several names that were met.
    met: HashMap<u64, Linked>,
}

struct Linked {
    bytes: u64,
    /// How many of its names were not met.
    names_left: u32,
}

impl Walk {
    /// Depth first with one descriptor open, as a tree may be deeper than the limit on open files: the way up is `..`.
    /// None if that led elsewhere, because somebody moved a directory.
    fn run(root: &Path, but: Option<&CStr>) -> Result<Option<Walk>> {
        let mut walk = Walk::default();
        let mut here = fs::openat(CWD, root, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        walk.count(here.as_fd(), c"", AtFlags::EMPTY_PATH)?;
        let mut way: Vec<(u64, Vec<CString>)> = vec![(fs::fstat(&here)?.st_ino, walk.read(here.as_fd(), but)?)];
        while let Some((_, pending)) = way.last_mut() {
            let Some(name) = pending.pop() else {
                way.pop();
                if let Some((ino, _)) = way.last() {
                    here = open_below(&here, c"..")?;
                    if fs::fstat(&here)?.st_ino != *ino {
                        return Ok(None);
                    }
                }
                continue;
            };
            match open_below(&here, &name) {
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => continue,
                opened => here = opened?,
            }
            let found = walk.read(here.as_fd(), None)?;
            way.push((fs::fstat(&here)?.st_ino, found));
        }
        Ok(Some(walk))
    }

    /// Counts what is in a directory, without what is `but`; gives the directories in it.
    fn read(&mut self, dir: BorrowedFd<'_>, but: Option<&CStr>) -> Result<Vec<CString>> {
        let mut dirs = Vec::new();
        for entry in Dir::read_from(dir)? {
            let entry = entry?;
            let name = entry.file_name();
            if name == c"." || name == c".." || Some(name) == but {
                continue;
            }
            match self.count(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
                Err(Errno::NOENT) => {}
                counted if counted? == FileType::Directory => dirs.push(name.to_owned()),
                _ => {}
            }
        }
        Ok(dirs)
    }

    fn count(&mut self, dir: BorrowedFd<'_>, name: &CStr, at: AtFlags) -> rustix::io::Result<FileType> {
        let st = fs::statx(dir, name, at | AtFlags::NO_AUTOMOUNT, StatxFlags::BASIC_STATS)?;
        let kind = FileType::from_raw_mode(st.stx_mode.into());
        let bytes = st.stx_blocks * 512;
        if kind != FileType::Directory && st.stx_nlink > 1 {
            match self.met.entry(st.stx_ino) {
                Entry::Occupied(mut met) => {
                    met.get_mut().names_left = met.get().names_left.saturating_sub(1);
                    return Ok(kind);
                }
                Entry::Vacant(new) => drop(new.insert(Linked { bytes, names_left: st.stx_nlink - 1 })),
            }
        }
        self.usage.bytes += bytes;
        self.usage.inodes += 1;
        Ok(kind)
    }
}

/// Removes the tree `name` in `dir`, whatever its depth, modes and attributes. Nothing there is no error, and neither
/// is somebody else removing the same. Interrupted, it can be repeated.
pub(super) fn remove(dir: BorrowedFd<'_>, name: &str) -> Result<()> {
    let cname = CString::new(name).map_err(|_| Error::new(ErrorKind::InvalidInput, "a zero byte in a name"))?;
    let root = match open_below(dir, &cname) {
        Err(Errno::NOENT) => return Ok(()),
        opened => opened.doing(|| format!("opening {name}"))?,
    };
    let flattened = empty(root.as_fd());
    flattened.and_then(|()| Ok(forced(dir, &cname, || gone(fs::unlinkat(dir, &cname, AtFlags::REMOVEDIR)))?)).map_err(
        |e| {
            let blocked = e.kind() == ErrorKind::PermissionDenied;
            let e = e.doing(format!("removing {name}"));
            if blocked { e.hint("something in it may be immutable: lsattr -R") } else { e }
        },
    )
}

/// Lets directories of whatever project be moved into this one: one that gives its own to what is in it takes none of
/// another (EXDEV), and the owners of files can change theirs.
fn take_any_project(dir: BorrowedFd<'_>) {
    // Where there are no such flags there are no projects.
    if let Ok(flags) = fs::ioctl_getflags(dir)
        && flags.contains(IFlags::PROJECT_INHERIT)
    {
        let _ = fs::ioctl_setflags(dir, flags - (IFlags::PROJECT_INHERIT | IFlags::IMMUTABLE | IFlags::APPEND));
    }
}

/// Empties `root`. Directories below its entries are moved up into it before they are emptied in their turn, so that
/// neither depth nor width needs memory or descriptors.
fn empty(root: BorrowedFd<'_>) -> Result<()> {
    take_any_project(root);
    let mut serial = 0u64;
    loop {
        let mut clean = true;
        for_each(root, |entry, is_dir| {
            clean = false;
            if !is_dir {
                return forced(root, entry, || gone(fs::unlinkat(root, entry, AtFlags::empty())));
            }
            flatten(root, entry, &mut serial)
        })?;
        if clean {
            return Ok(());
        }
    }
}

/// Removes the directory `name` of `root` after moving its directories up into `root`.
fn flatten(root: BorrowedFd<'_>, name: &CStr, serial: &mut u64) -> rustix::io::Result<()> {
    let remove_dir = || gone(fs::unlinkat(root, name, AtFlags::REMOVEDIR));
    match forced(root, name, remove_dir) {
        Err(Errno::NOTEMPTY | Errno::EXIST) => {}
        done => return done,
    }
    let dir = match open_below(root, name) {
        Err(Errno::NOENT) => return Ok(()),
        opened => opened?,
    };
    for_each(dir.as_fd(), |entry, is_dir| {
        if !is_dir {
            return forced(dir.as_fd(), entry, || gone(fs::unlinkat(&dir, entry, AtFlags::empty())));
        }
        loop {
            *serial += 1;
            let up = format!("up-{serial}");
            let moved = forced(dir.as_fd(), entry, || {
                gone(fs::renameat_with(&dir, entry, root, up.as_str(), RenameFlags::NOREPLACE))
            });
            if moved != Err(Errno::EXIST) {
                return moved;
            }
        }
    })?;
    match remove_dir() {
        // Reading a directory while names leave it may miss some: the caller comes back.
        Err(Errno::NOTEMPTY | Errno::EXIST) => Ok(()),
        done => done,
    }
}

fn for_each(dir: BorrowedFd<'_>, mut act: impl FnMut(&CStr, bool) -> rustix::io::Result<()>) -> rustix::io::Result<()> {
    for entry in Dir::read_from(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let kind = match entry.file_type() {
            FileType::Unknown => match fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
                Err(Errno::NOENT) => continue,
                st => FileType::from_raw_mode(st?.st_mode),
            },
            known => known,
        };
        act(name, kind == FileType::Directory)?;
    }
    Ok(())
}

fn gone(removed: rustix::io::Result<()>) -> rustix::io::Result<()> {
    if removed == Err(Errno::NOENT) { Ok(()) } else { removed }
}

/// Tries again without the flags immutable and append-only (`chattr +i`, `+a`) on `name` and its directory, if it was
/// not permitted: container root may set them, and even root cannot remove what has them.
fn forced(dir: BorrowedFd<'_>, name: &CStr, act: impl Fn() -> rustix::io::Result<()>) -> rustix::io::Result<()> {
    let done = act();
    if done != Err(Errno::PERM) {
        return done;
    }
    // The original error counts if the flags cannot be changed.
    let _ = clear_flags(dir);
    // Opening a device could do something.
    let kind = fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW).map(|st| FileType::from_raw_mode(st.st_mode));
    if !matches!(kind, Ok(FileType::RegularFile | FileType::Directory)) {
        return act();
    }
    if let Ok(fd) =
        fs::openat(dir, name, OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())
    {
        let _ = clear_flags(fd.as_fd());
    }
    act()
}

fn clear_flags(fd: BorrowedFd<'_>) -> rustix::io::Result<()> {
    let flags = fs::ioctl_getflags(fd)?;
    fs::ioctl_setflags(fd, flags - (IFlags::IMMUTABLE | IFlags::APPEND))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both together are the whole tree, and an inode with names in both is in the part that is left out.
    #[test]
    fn what_is_around_a_directory_is_measured_without_what_is_linked_into_it() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        ["diff/d", "work/work"].iter().for_each(|name| std::fs::create_dir_all(at(name)).unwrap());
        ["diff/d/f", "work/tmp", "work/own"].iter().for_each(|name| std::fs::write(at(name), vec![7; 9000]).unwrap());
        std::fs::hard_link(at("work/own"), at("work/work/own")).unwrap();
        let before = usage_around(dir.path(), c"diff").unwrap();
        assert_eq!(before.inodes, 5, "the layer, work, work/work, tmp and own");
        ["diff/a", "diff/d/b"].iter().for_each(|name| std::fs::hard_link(at("work/tmp"), at(name)).unwrap());
        std::fs::hard_link(at("work/tmp"), at("work/again")).unwrap();
        let (all, around, diff) =
            (usage(dir.path()).unwrap(), usage_around(dir.path(), c"diff").unwrap(), usage(&at("diff")).unwrap());
        assert_eq!((around.inodes, diff.inodes), (4, 4));
        assert_eq!((around.bytes + diff.bytes, around.inodes + diff.inodes), (all.bytes, all.inodes));
    }
}
