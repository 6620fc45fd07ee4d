//! Layer tars into and out of trees in memory (OCI image specification, "Image Layer Filesystem Changeset").

use super::{
    MemTree, Op, Tree,
    tree::{Ino, ROOT},
};
use crate::{
    Context, FileKind, Metadata, Result, Timestamp,
    tar::{Content, LinkKey, Links, Sink, Source},
};
use rustix::io::Errno;
use std::{
    collections::{BTreeMap, BTreeSet},
    io::Cursor,
    path::{Path, PathBuf},
};

/// Applies a layer tar to a tree that holds the layers below.
#[derive(Debug)]
pub struct MemSink<'t> {
    tree: &'t mut MemTree,
    /// What this layer put there, by paths without symlinks; whiteouts do not reach it.
    put: BTreeSet<PathBuf>,
    /// Set at the end: what is put into a directory later changes its time.
    times: BTreeMap<Ino, Timestamp>,
}

impl<'t> MemSink<'t> {
    /// Over `tree`.
    pub fn new(tree: &'t mut MemTree) -> Self {
        MemSink { tree, put: BTreeSet::new(), times: BTreeMap::new() }
    }

    /// `path` with the symlinks on the way followed, missing directories made.
    fn place(&mut self, path: &Path) -> Result<PathBuf> {
        let Some(name) = path.file_name() else { return Ok(PathBuf::new()) };
        let parent = path.parent().unwrap_or(Path::new(""));
        let dirs = match self.tree.walk_dir(parent) {
            Err(Errno::NOENT) => {
                let parent = self.place(parent)?;
                self.tree.make(&parent, FileKind::Directory, 0o755)?;
                self.put.insert(parent.clone());
                self.tree.walk_dir(&parent)?
            }
            other => other?,
        };
        Ok(dirs.into_iter().skip(1).map(|(name, _)| PathBuf::from(name)).collect::<PathBuf>().join(name))
    }

    /// Removes what came from below at and under `path`. What is ours stays, and the directories it lies in.
    fn hide(&mut self, path: &Path, this_too: bool) -> Result<()> {
        let Ok(ino) = self.tree.lookup(path) else { return Ok(()) };
        let names: Vec<_> = self.tree.inode(ino).entries.keys().cloned().collect();
        for name in names {
            self.hide(&path.join(name), true)?;
        }
        if this_too && !self.put.iter().any(|ours| ours.starts_with(path)) {
            self.tree.remove_all(path)?;
        }
        Ok(())
    }

    fn fill(&mut self, ino: Ino, mut content: Content<'_>) -> Result<()> {
        let data = &mut self.tree.inode_mut(ino).data;
        for segment in &content.segments {
            let mut bytes = vec![0; segment.len as usize];
            content.data.read_exact(&mut bytes)?;
            data.write(segment.offset, &bytes);
        }
        data.truncate(content.size);
        Ok(())
    }
}

impl Sink for MemSink<'_> {
    fn node(&mut self, path: &Path, meta: &Metadata, content: Option<Content<'_>>) -> Result<()> {
        let path = self.place(path)?;
        let is_dir = |tree: &MemTree, ino| tree.inode(ino).meta.kind == FileKind::Directory;
        let ino = match self.tree.lookup(&path) {
            Ok(ino) if meta.kind == FileKind::Directory && is_dir(self.tree, ino) => ino,
            Ok(_) => {
                self.tree.remove_all(&path)?;
                self.put.retain(|ours| !ours.starts_with(&path));
                self.tree.make(&path, meta.kind.clone(), meta.mode)?
            }
            Err(_) => self.tree.make(&path, meta.kind.clone(), meta.mode)?,
        };
        let inode = self.tree.inode_mut(ino);
        inode.meta = meta.clone();
        inode.touched = false;
        if let Some(content) = content {
            self.fill(ino, content)?;
        }
        if meta.kind == FileKind::Directory {
            self.times.insert(ino, meta.mtime);
        }
        self.put.insert(path);
        Ok(())
    }

    fn hard_link(&mut self, path: &Path, target: &Path) -> Result<()> {
        let (path, target) = (self.place(path)?, self.place(target)?);
        if path != target && self.tree.lookup(&path).is_ok() {
            self.tree.remove_all(&path)?;
        }
        self.tree.apply(&Op::link(&target, &path)).doing(|| format!("linking to {}", target.display()))?;
        self.put.insert(path);
        Ok(())
    }

    fn whiteout(&mut self, path: &Path) -> Result<()> {
        match self.tree.walk_dir(path.parent().unwrap_or(Path::new(""))) {
            Err(_) => Ok(()),
            Ok(_) => {
                let path = self.place(path)?;
                self.hide(&path, true)
            }
        }
    }

    fn opaque(&mut self, dir: &Path) -> Result<()> {
        let dir = self.place(dir)?;
        self.hide(&dir, false)
    }

    fn finish(&mut self) -> Result<()> {
        for (ino, time) in std::mem::take(&mut self.times) {
            if ino == ROOT || self.tree.inodes.contains_key(&ino) {
                let inode = self.tree.inode_mut(ino);
                (inode.meta.mtime, inode.touched) = (time, false);
            }
        }
        Ok(())
    }
}

impl Source for MemTree {
    fn metadata(&mut self, path: &Path) -> Result<(Metadata, Option<Links>)> {
        let ino = self.lookup(path)?;
        let inode = self.inode(ino);
        Ok((inode.meta.clone(), (inode.nlink > 1).then_some(Links { key: LinkKey(0, ino), count: inode.nlink })))
    }

    fn content(&mut self, path: &Path) -> Result<Content<'_>> {
        let data = &self.inode(self.lookup(path)?).data;
        Ok(Content { size: data.size(), segments: data.segments(), data: Box::new(Cursor::new(data.stored_bytes())) })
    }
}
