//! Hard links over copy-up: all names of a lower file are found, and become links of one upper file.

use super::{
    Union,
    marks::{Marks, Object},
    node::{Node, UPPER},
    work::{Work, entries},
};
use crate::extent;
use rustix::{
    fd::{AsFd, BorrowedFd},
    fs::{AtFlags, Mode, XattrFlags},
    io::{Errno, Result},
};
use std::{
    collections::{HashMap, HashSet},
    ffi::OsStr,
    os::unix::ffi::OsStrExt,
    sync::Arc,
};

/// A directory and a name in it.
pub(super) type Name = (Arc<Node>, Box<OsStr>);

/// The lower files with several names, by their number.
pub(super) type Links = HashMap<u64, Vec<Name>>;

impl Union {
    /// All names of a lower file with several, `own` among them if it is known by one. They are found by one walk over
    /// the merged tree, the first time they are asked for: a file does not know its names.
    pub(super) fn names_of(&self, node: &Arc<Node>, own: Option<Name>) -> Result<Vec<Name>> {
        let all = match own {
            Some(_) => self.known_names(node.ino)?,
            None => self.search_names(node.ino)?,
        };
        let is_own =
            |dir: &Arc<Node>, name: &OsStr| own.as_ref().is_some_and(|(d, n)| Arc::ptr_eq(d, dir) && **n == *name);
        let mut others = Vec::new();
        for (dir, name) in all {
            if !is_own(&dir, &name) && self.is_still(&dir, &name, node)? {
                others.push((dir, name));
            }
        }
        Ok(own.into_iter().chain(others).collect())
    }

    /// Whether the merged tree has more than one name of the lower file: others may be outside of it, or hidden.
    pub(super) fn has_names(&self, ino: u64) -> Result<bool> {
        Ok(self.known_names(ino)?.len() > 1)
    }

    fn known_names(&self, ino: u64) -> Result<Vec<Name>> {
        let mut links = self.links.lock();
        if links.is_none() {
            *links = Some(self.find_links()?);
        }
        Ok(links.as_ref().and_then(|l| l.get(&ino)).cloned().unwrap_or_default())
    }

    /// The names of a file that has lost the one it was known by. What was noted leaves out those with one name left.
    fn search_names(&self, ino: u64) -> Result<Vec<Name>> {
        let mut found = Vec::new();
        self.each_lower_file(&mut |of, dir, name| {
            if of == ino {
                found.push((dir.clone(), name.into()));
            }
        })?;
        Ok(found)
    }

    /// Whether the name is still that of the lower file.
    fn is_still(&self, dir: &Arc<Node>, name: &OsStr, node: &Node) -> Result<bool> {
        let names = dir.dir()?.names.read();
        if names.removed {
            return Ok(false);
        }
        let found = self.fds(dir).and_then(|fds| self.find(dir, &fds, &names, name))?;
        Ok(found.is_some_and(|f| f.layer != UPPER && f.ino == node.ino))
    }

    /// Two walks: the first finds the numbers that come twice, the second their names. So a tree without hard links
    /// costs no more memory than its numbers.
    fn find_links(&self) -> Result<Links> {
        let (mut once, mut twice) = (HashSet::new(), HashSet::new());
        self.each_lower_file(&mut |ino, _, _| {
            if !once.insert(ino) {
                twice.insert(ino);
            }
        })?;
        drop(once);
        let mut links = Links::new();
        if !twice.is_empty() {
            self.each_lower_file(&mut |ino, dir, name| {
                if twice.contains(&ino) {
                    links.entry(ino).or_default().push((dir.clone(), name.into()));
                }
            })?;
        }
        Ok(links)
    }

    fn each_lower_file(&self, each: &mut dyn FnMut(u64, &Arc<Node>, &OsStr)) -> Result<()> {
        // A directory that moved from where the walk comes last to where it has been would be left out.
        let _nothing_moves = self.moves.write();
        let mut waiting = vec![self.root.clone()];
        while let Some(dir) = waiting.pop() {
            self.each_lower_file_in(&dir, each, &mut waiting)?;
            self.let_go(dir);
        }
        Ok(())
    }

    fn each_lower_file_in(
        &self,
        dir: &Arc<Node>,
        each: &mut dyn FnMut(u64, &Arc<Node>, &OsStr),
        below: &mut Vec<Arc<Node>>,
    ) -> Result<()> {
        let names = dir.dir()?.names.read();
        if names.removed {
            return Ok(());
        }
        let listing = match self.read_names(dir) {
            // What this process may not read has no names that anybody could ask it for.
            Err(Errno::NOENT | Errno::STALE | Errno::ACCESS) => return Ok(()),
            other => other?,
        };
        for entry in listing.iter() {
            if u32::from(entry.kind) << 12 != libc::S_IFDIR {
                if entry.layer != UPPER {
                    each(entry.ino, dir, &entry.name);
                }
                continue;
            }
            let fds = self.fds(dir)?;
            // A directory that cannot be resolved shows no names to anybody.
            if let Ok(Some(found)) = self.find_from(dir, &fds, fds.index(entry.layer).unwrap_or(0), &entry.name) {
                below.push(self.node_for(dir, &entry.name, found, 0));
            }
        }
        Ok(())
    }

    /// Notes which names a file is going to have, so that a crash between two of them can be mended.
    pub(super) fn note_group(&self, work: &Work, file: &OsStr, names: &[Name]) -> Result<std::ffi::OsString> {
        let group = work.name();
        rustix::fs::mkdirat(&work.dir, &group, Mode::from_raw_mode(0o700))?;
        let dir = super::layer::open_dir(work.dir.as_fd(), &group)?;
        for (i, (parent, name)) in names.iter().enumerate() {
            let path = super::dirs::join(&self.layer_path(parent, UPPER)?, name.as_bytes());
            rustix::fs::symlinkat(OsStr::from_bytes(&path), &dir, i.to_string())?;
        }
        // Last: without it the group counts for nothing.
        rustix::fs::renameat(&work.dir, file, &dir, INODE)?;
        Ok(group)
    }
}

/// The file of a group.
pub(super) const INODE: &str = "inode";

/// After a crash: gives the files of unfinished groups the names that they lack.
pub(super) fn finish_groups(work: &Work, upper: BorrowedFd<'_>) -> Result<()> {
    for group in entries(work.dir.as_fd())? {
        let Ok(dir) = super::layer::open_dir(work.dir.as_fd(), &group) else { continue };
        if super::layer::stat(dir.as_fd(), OsStr::new(INODE)).is_err() {
            continue;
        }
        let file = Object { dir: dir.as_fd(), name: OsStr::new(INODE) };
        for name in entries(dir.as_fd())? {
            if name == INODE {
                continue;
            }
            let path = rustix::fs::readlinkat(&dir, &name, Vec::new())?;
            let path = path.as_bytes();
            let cut = path.iter().rposition(|b| *b == b'/').map_or(0, |at| at + 1);
            let (parent, name) = (&path[..cut], OsStr::from_bytes(&path[cut..]));
            // A directory that is gone was removed with the name.
            let Ok(parent) = super::layer::open_path(upper, parent) else { continue };
            if super::layer::stat(parent.as_fd(), &super::marks::whiteout_name(name)).is_ok() {
                // It was removed before the crash.
                continue;
            }
            mark_impure_for(file, parent.as_fd())?;
            match rustix::fs::linkat(&dir, INODE, &parent, name, AtFlags::empty()) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(e) => return Err(e),
            }
        }
    }
    Ok(())
}

/// In a directory without this mark nobody asks whether a file has its data elsewhere.
fn mark_impure_for(file: Object<'_>, parent: BorrowedFd<'_>) -> Result<()> {
    for marks in [Marks::TRUSTED, Marks::USER] {
        let has = |mark: &str| Ok(file.get(&format!("{}{mark}", marks.prefix))?.is_some());
        if has("vfs.ino")? || has(extent::XATTR)? {
            let parent = Object { dir: parent, name: OsStr::new("") };
            parent.set(&marks.name("impure"), b"y", XattrFlags::empty())?;
        }
    }
    Ok(())
}
