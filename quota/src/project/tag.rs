//! The project of files and directories: an attribute of each inode, which new ones take from their directory.

use crate::sys::{self, FsXattr, PROJINHERIT};
use graphdriver_core::{Context, Error, ErrorKind, Result};
use rustix::{
    fs::{self, AtFlags, CWD, Dir, FileType, Mode, OFlags},
    io::Errno,
};
use std::{
    ffi::{CStr, CString},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::Path,
};

/// What came of tagging a tree.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tagged {
    /// Files and directories in the tree that got the project now.
    pub changed: u64,
    /// Symlinks, devices, FIFOs and sockets, which cannot be opened without an effect, and immutable files: they stay
    /// outside the project. Each is an inode and next to no space.
    pub left_out: u64,
}

/// Rounds over a tree that is changed meanwhile, before that is taken for an error.
const ROUNDS: usize = 10;

pub(crate) fn open_dir(path: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    fs::openat(CWD, path, flags, Mode::empty())
}

/// The project that the directory is in and gives to what is made in it; None if it does neither.
pub(crate) fn project_of(dir: BorrowedFd<'_>) -> Result<Option<u32>, Errno> {
    match sys::get_fsxattr(dir) {
        Ok(found) if found.projid != 0 && found.xflags & PROJINHERIT != 0 => Ok(Some(found.projid)),
        Ok(_) | Err(Errno::NOTTY | Errno::OPNOTSUPP) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Puts the tree at `root` into the project, or for project 0 out of any. The tree may be written to meanwhile: what is made
/// in a directory that has the project already has it too, and the walk is repeated until it finds nothing else. Symlinks
/// are never followed. Interrupted, it can be repeated.
pub(crate) fn tag(root: &Path, project: u32) -> Result<Tagged> {
    let mut all = Tagged::default();
    for _ in 0..ROUNDS {
        let round = Walk { project, found: Tagged::default() }.run(root);
        let round = round.doing(|| format!("putting {} into project {project}", root.display()))?;
        all = Tagged { changed: all.changed + round.changed, left_out: round.left_out };
        if round.changed == 0 {
            return Ok(all);
        }
    }
    Err(Error::new(ErrorKind::Busy, format!("{} is changed faster than it can be walked", root.display()))
        .hint("try again when less is written to it"))
}

/// Puts one directory into the project. Fails with `OPNOTSUPP` where inodes have no room for one.
pub(crate) fn tag_dir(dir: BorrowedFd<'_>, project: u32) -> Result<bool, Errno> {
    let inherit = if project == 0 { 0 } else { PROJINHERIT };
    tag_inode(dir, project, inherit)
}

/// False if it was so before.
fn tag_inode(file: BorrowedFd<'_>, project: u32, inherit: u32) -> Result<bool, Errno> {
    let found = sys::get_fsxattr(file)?;
    let mut wanted: FsXattr = found;
    wanted.projid = project;
    wanted.xflags = found.xflags & !PROJINHERIT | inherit;
    if (found.projid, found.xflags) == (wanted.projid, wanted.xflags) {
        return Ok(false);
    }
    sys::set_fsxattr(file, &wanted).map(|()| true)
}

struct Walk {
    project: u32,
    found: Tagged,
}

impl Walk {
    /// Depth first with one descriptor open, as a tree may be deeper than the limit on open files: the way up is `..`. Ends
    /// early, to be repeated, if that led elsewhere because somebody moved a directory.
    fn run(mut self, root: &Path) -> Result<Tagged> {
        let mut here = open_dir(root)?;
        let mut way = vec![(fs::fstat(&here)?.st_ino, self.directory(here.as_fd())?)];
        while let Some((_, pending)) = way.last_mut() {
            let Some(name) = pending.pop() else {
                way.pop();
                if let Some((ino, _)) = way.last() {
                    here = open_below(here.as_fd(), c"..", OFlags::DIRECTORY)?;
                    if fs::fstat(&here)?.st_ino != *ino {
                        self.found.changed += 1;
                        return Ok(self.found);
                    }
                }
                continue;
            };
            match open_below(here.as_fd(), &name, OFlags::DIRECTORY) {
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => continue,
                opened => here = opened?,
            }
            let found = self.directory(here.as_fd())?;
            way.push((fs::fstat(&here)?.st_ino, found));
        }
        Ok(self.found)
    }

    /// First the directory, so that what is made in it from now on is right, then what is in it. Gives the directories there.
    fn directory(&mut self, dir: BorrowedFd<'_>) -> Result<Vec<CString>, Errno> {
        let tagged = tag_dir(dir, self.project);
        self.count(tagged)?;
        let mut below = Vec::new();
        for entry in Dir::read_from(dir)? {
            let entry = entry?;
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            match self.entry(dir, name, entry.file_type()) {
                Ok(true) => below.push(name.to_owned()),
                Ok(false) | Err(Errno::NOENT) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(below)
    }

    /// Whether it is a directory.
    fn entry(&mut self, dir: BorrowedFd<'_>, name: &CStr, kind: FileType) -> Result<bool, Errno> {
        let kind = match kind {
            FileType::Unknown => FileType::from_raw_mode(fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?.st_mode),
            known => known,
        };
        match kind {
            FileType::Directory => return Ok(true),
            FileType::RegularFile => match open_regular(dir, name)? {
                // Replaced by something else this moment, which the next round sees.
                None => self.found.changed += 1,
                Some(file) => {
                    let tagged = tag_inode(file.as_fd(), self.project, 0);
                    self.count(tagged)?;
                }
            },
            _ => self.found.left_out += 1,
        }
        Ok(false)
    }

    fn count(&mut self, tagged: Result<bool, Errno>) -> Result<(), Errno> {
        match tagged {
            Ok(changed) => self.found.changed += u64::from(changed),
            // Immutable or append-only (chattr +i, +a), or not a file of this filesystem.
            Err(Errno::PERM | Errno::NOTTY) => self.found.left_out += 1,
            Err(e) => return Err(e),
        }
        Ok(())
    }
}

/// None if it is no regular file. That is made sure before it is opened: what a container put there in its place could be a
/// device, where opening does something.
fn open_regular(dir: BorrowedFd<'_>, name: &CStr) -> Result<Option<OwnedFd>, Errno> {
    let found = fs::openat(dir, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    if FileType::from_raw_mode(fs::fstat(&found)?.st_mode) != FileType::RegularFile {
        return Ok(None);
    }
    let by_number = format!("/proc/self/fd/{}", found.as_raw_fd());
    fs::openat(CWD, by_number, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty()).map(Some)
}

fn open_below(dir: BorrowedFd<'_>, name: &CStr, more: OFlags) -> Result<OwnedFd, Errno> {
    fs::openat(dir, name, OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | more, Mode::empty())
}
