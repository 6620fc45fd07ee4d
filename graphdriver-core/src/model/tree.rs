//! A directory tree in memory, with the behaviour POSIX and Linux give the operations on it.

use super::{
    blocks::Blocks,
    op::{Node, Op, Snapshot, Tree, name_links},
};
use crate::{Error, ErrorKind, FileKind, Metadata, Result, Timestamp, tar::Segment};
use rustix::io::Errno;
use std::{
    collections::{BTreeMap, VecDeque},
    ffi::{OsStr, OsString},
    path::{Component, Path, PathBuf},
    sync::Arc,
};

/// Inode number.
pub(super) type Ino = u64;
pub(super) const ROOT: Ino = 1;
/// As in Linux: `MAXSYMLINKS`, include/linux/namei.h.
const MAX_SYMLINKS: usize = 40;

type Outcome<T = ()> = std::result::Result<T, Errno>;

/// A tree in memory. Clones share what neither has changed since.
#[derive(Debug, Clone)]
pub struct MemTree {
    pub(super) inodes: BTreeMap<Ino, Arc<Inode>>,
    next: Ino,
    /// Inodes below this number came from the parent layer.
    inherited: Ino,
    links: HardLinks,
}

/// What becomes of the names of a parent's file when it is changed through one of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum HardLinks {
    /// They stay names of one inode, as POSIX wants it.
    #[default]
    Kept,
    /// The name it was changed through gets an inode of its own: overlayfs without `index=on`
    /// (kernel `Documentation/filesystems/overlayfs.rst`, "Non-standard behavior").
    Split,
}

#[derive(Debug, Clone)]
pub(super) struct Inode {
    /// `FileKind::File`'s size is kept here too.
    pub meta: Metadata,
    pub entries: BTreeMap<OsString, Ino>,
    pub data: Blocks,
    pub nlink: u32,
    /// Its time came from the clock and not from `utimes`, so it has no value that can be compared.
    pub touched: bool,
}

impl Default for MemTree {
    fn default() -> Self {
        let mut tree = MemTree { inodes: BTreeMap::new(), next: ROOT, inherited: 0, links: HardLinks::default() };
        tree.new_inode(FileKind::Directory, 0o755);
        tree
    }
}

impl MemTree {
    /// An empty root directory of mode 0755, owned by root.
    pub fn new() -> Self {
        Self::default()
    }

    /// What a layer on top of this one starts as.
    pub fn child(&self, links: HardLinks) -> MemTree {
        MemTree { inherited: self.next, links, ..self.clone() }
    }

    /// One path of each inode whose time came from the clock: what two trees cannot agree on.
    pub fn touched(&self) -> Vec<PathBuf> {
        let mut seen = std::collections::BTreeSet::new();
        let mut paths = Vec::new();
        self.visit(&mut |path, ino| {
            if self.inodes[&ino].touched && seen.insert(ino) {
                paths.push(path.to_owned());
            }
        });
        paths
    }

    /// Bytes allocated and inodes held that `base` does not share.
    pub fn own_usage(&self, base: Option<&MemTree>) -> crate::Usage {
        let own = self
            .inodes
            .iter()
            .filter(|(ino, inode)| base.and_then(|b| b.inodes.get(ino)).is_none_or(|lower| !Arc::ptr_eq(lower, inode)));
        own.fold(crate::Usage::default(), |sum, (_, inode)| crate::Usage {
            bytes: sum.bytes + inode.data.allocated(),
            inodes: sum.inodes + 1,
        })
    }

    /// Calls `each` for every path, a directory before what is in it.
    pub(super) fn visit(&self, each: &mut dyn FnMut(&Path, Ino)) {
        fn below(tree: &MemTree, path: &Path, ino: Ino, each: &mut dyn FnMut(&Path, Ino)) {
            each(path, ino);
            for (name, child) in &tree.inodes[&ino].entries {
                below(tree, &path.join(name), *child, each);
            }
        }
        below(self, Path::new(""), ROOT, each);
    }

    fn new_inode(&mut self, kind: FileKind, mode: u32) -> Ino {
        let ino = self.next;
        self.next += 1;
        let meta = Metadata { kind, mode, uid: 0, gid: 0, mtime: Timestamp::default(), xattrs: BTreeMap::new() };
        let inode = Inode { meta, entries: BTreeMap::new(), data: Blocks::default(), nlink: 1, touched: true };
        self.inodes.insert(ino, Arc::new(inode));
        ino
    }

    pub(super) fn inode(&self, ino: Ino) -> &Inode {
        &self.inodes[&ino]
    }

    pub(super) fn inode_mut(&mut self, ino: Ino) -> &mut Inode {
        Arc::make_mut(self.inodes.get_mut(&ino).expect("entries name inodes that are there"))
    }

    fn is_dir(&self, ino: Ino) -> bool {
        self.inode(ino).meta.kind == FileKind::Directory
    }

    /// The directories from the root to the one `path` names, symlinks followed beneath the root, each with its name.
    pub(super) fn walk_dir(&self, path: &Path) -> Outcome<Vec<(OsString, Ino)>> {
        let mut stack = vec![(OsString::new(), ROOT)];
        let mut todo: VecDeque<OsString> = path.components().map(|c| c.as_os_str().to_owned()).collect();
        let mut followed = 0;
        while let Some(name) = todo.pop_front() {
            let dir = stack.last().expect("the root stays").1;
            match Path::new(&name).components().next() {
                Some(Component::RootDir) => stack.truncate(1),
                Some(Component::ParentDir) => stack.truncate((stack.len() - 1).max(1)),
                Some(Component::Normal(_)) => {
                    let ino = *self.inode(dir).entries.get(&name).ok_or(Errno::NOENT)?;
                    match &self.inode(ino).meta.kind {
                        FileKind::Directory => stack.push((name, ino)),
                        FileKind::Symlink { target } => {
                            followed += 1;
                            if followed > MAX_SYMLINKS {
                                return Err(Errno::LOOP);
                            }
                            for part in target.components().rev() {
                                todo.push_front(part.as_os_str().to_owned());
                            }
                        }
                        _ => return Err(Errno::NOTDIR),
                    }
                }
                _ => {}
            }
        }
        Ok(stack)
    }

    /// The directory that `path`'s last name lies in, and that name.
    fn parent<'p>(&self, path: &'p Path) -> Outcome<(Ino, &'p OsStr)> {
        let name = path.file_name().ok_or(Errno::INVAL)?;
        let dirs = self.walk_dir(path.parent().unwrap_or(Path::new("")))?;
        Ok((dirs.last().expect("the root at least").1, name))
    }

    /// What `path` names, a last symlink not followed.
    pub(super) fn lookup(&self, path: &Path) -> Outcome<Ino> {
        if path.as_os_str().is_empty() {
            return Ok(ROOT);
        }
        let (dir, name) = self.parent(path)?;
        self.inode(dir).entries.get(name).copied().ok_or(Errno::NOENT)
    }

    /// What `path` names, about to be changed through this very name.
    pub(super) fn lookup_to_change(&mut self, path: &Path) -> Outcome<Ino> {
        let ino = self.lookup(path)?;
        if !self.splits(ino) {
            return Ok(ino);
        }
        let (dir, name) = self.parent(path)?;
        let own = self.next;
        self.next += 1;
        let copy = Inode { nlink: 1, ..self.inode(ino).clone() };
        self.inodes.insert(own, Arc::new(copy));
        self.unlink_inode(ino);
        self.inode_mut(dir).entries.insert(name.to_owned(), own);
        Ok(own)
    }

    /// Whether a change gives the name it is made through an inode of its own.
    fn splits(&self, ino: Ino) -> bool {
        self.links == HardLinks::Split && ino < self.inherited && !self.is_dir(ino)
    }

    /// Where `path` can be made.
    fn vacant<'p>(&self, path: &'p Path) -> Outcome<(Ino, &'p OsStr)> {
        let (dir, name) = self.parent(path)?;
        if self.inode(dir).entries.contains_key(name) {
            return Err(Errno::EXIST);
        }
        Ok((dir, name))
    }

    fn put(&mut self, dir: Ino, name: &OsStr, ino: Ino) {
        let dir = self.inode_mut(dir);
        dir.entries.insert(name.to_owned(), ino);
        dir.touched = true;
    }

    /// Takes the name away; the inode goes with its last name.
    fn take(&mut self, dir: Ino, name: &OsStr) {
        let parent = self.inode_mut(dir);
        parent.touched = true;
        let ino = parent.entries.remove(name).expect("the caller looked it up");
        self.unlink_inode(ino);
    }

    fn unlink_inode(&mut self, ino: Ino) {
        let inode = self.inode_mut(ino);
        inode.nlink -= 1;
        if inode.nlink == 0 {
            self.inodes.remove(&ino);
        }
    }

    /// Removes `path` with all below it, whatever it is.
    pub(super) fn remove_all(&mut self, path: &Path) -> Outcome {
        let ino = self.lookup(path)?;
        let names: Vec<_> = self.inode(ino).entries.keys().cloned().collect();
        for name in names {
            self.remove_all(&path.join(name))?;
        }
        let (dir, name) = self.parent(path)?;
        self.take(dir, name);
        Ok(())
    }

    /// A new inode gets the group of a setgid directory (inode(7), "The set-group-ID bit").
    pub(super) fn make(&mut self, path: &Path, kind: FileKind, mode: u32) -> Outcome<Ino> {
        let (dir, name) = self.vacant(path)?;
        let parent = &self.inode(dir).meta;
        let group = if parent.mode & 0o2000 != 0 { parent.gid } else { 0 };
        let ino = self.new_inode(kind, mode);
        self.inode_mut(ino).meta.gid = group;
        self.put(dir, name, ino);
        Ok(ino)
    }

    /// The regular file at `path`, or the error that opening anything else for writing gives.
    fn file(&mut self, path: &Path) -> Outcome<Ino> {
        match &self.inode(self.lookup(path)?).meta.kind {
            FileKind::File { .. } => self.lookup_to_change(path),
            FileKind::Directory => Err(Errno::ISDIR),
            FileKind::Symlink { .. } => Err(Errno::LOOP),
            _ => Err(Errno::INVAL),
        }
    }

    /// After a change of content: the time, and no more file capabilities (capabilities(7), "File capabilities":
    /// they are lost on write, whoever writes).
    fn wrote(&mut self, ino: Ino) {
        let inode = self.inode_mut(ino);
        inode.touched = true;
        inode.meta.kind = FileKind::File { size: inode.data.size() };
        inode.meta.xattrs.remove(OsStr::new("security.capability"));
    }

    fn write(&mut self, path: &Path, offset: u64, data: &[u8], mode: u32) -> Outcome {
        let ino = match self.file(path) {
            Err(Errno::NOENT) => self.make(path, FileKind::File { size: 0 }, mode)?,
            other => other?,
        };
        self.inode_mut(ino).data.write(offset, data);
        self.wrote(ino);
        Ok(())
    }

    fn unlink(&mut self, path: &Path) -> Outcome {
        let (dir, name) = self.parent(path)?;
        let ino = *self.inode(dir).entries.get(name).ok_or(Errno::NOENT)?;
        if self.is_dir(ino) {
            return Err(Errno::ISDIR);
        }
        self.take(dir, name);
        Ok(())
    }

    fn rmdir(&mut self, path: &Path) -> Outcome {
        let (dir, name) = self.parent(path)?;
        let ino = *self.inode(dir).entries.get(name).ok_or(Errno::NOENT)?;
        if !self.is_dir(ino) {
            return Err(Errno::NOTDIR);
        }
        if !self.inode(ino).entries.is_empty() {
            return Err(Errno::NOTEMPTY);
        }
        self.take(dir, name);
        Ok(())
    }

    /// The order of the checks is that of `do_renameat2` and `vfs_rename` in the kernel's fs/namei.c.
    fn rename(&mut self, from: &Path, to: &Path) -> Outcome {
        let (from_dir, from_name) = self.parent(from)?;
        let (to_dir, to_name) = self.parent(to)?;
        let old = *self.inode(from_dir).entries.get(from_name).ok_or(Errno::NOENT)?;
        let new = self.inode(to_dir).entries.get(to_name).copied();
        let above = |path: &Path| self.walk_dir(path.parent().unwrap_or(Path::new("")));
        if above(to)?.iter().any(|(_, ino)| *ino == old) {
            return Err(Errno::INVAL);
        }
        if let Some(new) = new {
            if above(from)?.iter().any(|(_, ino)| *ino == new) {
                return Err(Errno::NOTEMPTY);
            }
            let same_name = (from_dir, from_name) == (to_dir, to_name);
            if same_name || (new == old && !self.splits(old)) {
                return Ok(());
            }
            match (self.is_dir(old), self.is_dir(new)) {
                (true, false) => return Err(Errno::NOTDIR),
                (false, true) => return Err(Errno::ISDIR),
                (true, true) if !self.inode(new).entries.is_empty() => return Err(Errno::NOTEMPTY),
                _ => {}
            }
        }
        let old = self.lookup_to_change(from)?;
        if new.is_some() {
            self.take(to_dir, to_name);
        }
        self.put(to_dir, to_name, old);
        let from_dir = self.inode_mut(from_dir);
        from_dir.entries.remove(from_name);
        from_dir.touched = true;
        if self.is_dir(old) {
            // overlayfs renames onto a deletion by exchanging the two, and at that xfs gives a directory that comes to
            // another parent the present as its time.
            self.inode_mut(old).touched = true;
        }
        Ok(())
    }

    fn link(&mut self, target: &Path, path: &Path) -> Outcome {
        // Both directories are found before anything is looked up in them, as with descriptors of them.
        self.parent(target)?;
        self.parent(path)?;
        let ino = self.lookup(target)?;
        let (dir, name) = self.vacant(path)?;
        if self.is_dir(ino) {
            return Err(Errno::PERM);
        }
        let ino = self.lookup_to_change(target)?;
        self.inode_mut(ino).nlink += 1;
        self.put(dir, name, ino);
        Ok(())
    }

    fn chmod(&mut self, path: &Path, mode: u32) -> Outcome {
        let ino = self.lookup(path)?;
        if matches!(self.inode(ino).meta.kind, FileKind::Symlink { .. }) {
            return Err(Errno::OPNOTSUPP);
        }
        let ino = self.lookup_to_change(path)?;
        self.inode_mut(ino).meta.mode = mode;
        Ok(())
    }

    /// A change of owner takes setuid, setgid of what its group may execute, and file capabilities from all but
    /// directories (chown(2); kernel fs/open.c, `chown_common`).
    fn chown(&mut self, path: &Path, uid: u32, gid: u32) -> Outcome {
        let ino = self.lookup_to_change(path)?;
        let is_dir = self.is_dir(ino);
        let meta = &mut self.inode_mut(ino).meta;
        (meta.uid, meta.gid) = (uid, gid);
        if !is_dir && !matches!(meta.kind, FileKind::Symlink { .. }) {
            meta.mode &= !0o4000;
            if meta.mode & 0o10 != 0 {
                meta.mode &= !0o2000;
            }
            meta.xattrs.remove(OsStr::new("security.capability"));
        }
        Ok(())
    }

    /// `user.` attributes are for files and directories only (xattr(7), "User extended attributes").
    fn xattr(&mut self, path: &Path, name: &OsStr, value: Option<&[u8]>) -> Outcome {
        let meta = &self.inode(self.lookup(path)?).meta;
        let ordinary = matches!(meta.kind, FileKind::File { .. } | FileKind::Directory);
        if !ordinary && name.as_encoded_bytes().starts_with(b"user.") {
            return Err(Errno::PERM);
        }
        if value.is_none() && !meta.xattrs.contains_key(name) {
            return Err(Errno::NODATA);
        }
        let ino = self.lookup_to_change(path)?;
        let xattrs = &mut self.inode_mut(ino).meta.xattrs;
        match value {
            Some(value) => xattrs.insert(name.to_owned(), value.to_vec()),
            None => xattrs.remove(name),
        };
        Ok(())
    }

    fn change_file(&mut self, path: &Path, change: impl FnOnce(&mut Blocks)) -> Outcome {
        let ino = self.file(path)?;
        change(&mut self.inode_mut(ino).data);
        self.wrote(ino);
        Ok(())
    }

    fn regular(&self, path: &Path) -> Result<&Inode> {
        let inode = self.inode(self.lookup(path)?);
        match inode.meta.kind {
            FileKind::File { .. } => Ok(inode),
            _ => Err(Error::new(ErrorKind::InvalidInput, format!("{} is no regular file", path.display()))),
        }
    }
}

impl Tree for MemTree {
    fn apply(&mut self, op: &Op) -> Outcome {
        match op {
            Op::Mkdir { path, mode } => self.make(path, FileKind::Directory, *mode).map(drop),
            Op::Write { path, offset, data, mode } => self.write(path, *offset, data, *mode),
            Op::Truncate { path, size } => self.change_file(path, |data| data.truncate(*size)),
            Op::Punch { path, offset, len } => self.change_file(path, |data| data.punch(*offset, *len)),
            Op::Unlink { path } => self.unlink(path),
            Op::Rmdir { path } => self.rmdir(path),
            Op::Rename { from, to } => self.rename(from, to),
            Op::Link { target, path } => self.link(target, path),
            Op::Symlink { path, target } => {
                self.make(path, FileKind::Symlink { target: target.clone() }, 0o777).map(drop)
            }
            Op::Mknod { path, kind, mode } => self.make(path, kind.clone(), *mode).map(drop),
            Op::Chmod { path, mode } => self.chmod(path, *mode),
            Op::Chown { path, uid, gid } => self.chown(path, *uid, *gid),
            Op::Utimes { path, mtime } => {
                let ino = self.lookup_to_change(path)?;
                let inode = self.inode_mut(ino);
                inode.meta.mtime = *mtime;
                inode.touched = false;
                Ok(())
            }
            Op::SetXattr { path, name, value } => self.xattr(path, name, Some(value)),
            Op::RemoveXattr { path, name } => self.xattr(path, name, None),
        }
    }

    fn snapshot(&self) -> Result<Snapshot> {
        let mut snapshot = Snapshot::new();
        let mut inodes: BTreeMap<Ino, Vec<PathBuf>> = BTreeMap::new();
        self.visit(&mut |path, ino| {
            let inode = self.inode(ino);
            let content = matches!(inode.meta.kind, FileKind::File { .. }).then(|| inode.data.digest());
            let node = Node { meta: inode.meta.clone(), content, names: Vec::new() };
            snapshot.insert(path.to_owned(), node);
            inodes.entry(ino).or_default().push(path.to_owned());
        });
        name_links(&mut snapshot, inodes);
        Ok(snapshot)
    }

    fn read(&self, path: &Path) -> Result<Vec<u8>> {
        Ok(self.regular(path)?.data.bytes())
    }

    fn segments(&self, path: &Path) -> Result<Vec<Segment>> {
        Ok(self.regular(path)?.data.segments())
    }
}
