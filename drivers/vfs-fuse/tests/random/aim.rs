//! Most names drawn at random do not exist, or are of the wrong type: such operations are mostly aimed anew, at what is
//! there when they are done. What they are aimed at depends on nothing but the operation, its number and the tree, so a
//! sequence does the same each time.

use super::{
    op::{Op, SLOTS, Step},
    tree,
};
use rustix::fs::{FileType, OFlags, RenameFlags};
use std::{
    hash::{DefaultHasher, Hash, Hasher},
    path::{Path, PathBuf},
};

/// What an operation needs to have a chance.
#[derive(Clone, Copy, PartialEq)]
enum Wish {
    File,
    NoDir,
    Dir,
    Any,
    /// A name that is free.
    New,
}

/// The directories and what is in each.
pub struct Names(Vec<(PathBuf, Vec<tree::Listed>)>);

impl Names {
    /// Of all that can be listed.
    pub fn of(root: &Path) -> Names {
        let mut names = Names(Vec::new());
        names.add(root, PathBuf::new());
        names
    }

    fn add(&mut self, root: &Path, dir: PathBuf) {
        let mut listed = tree::list(rustix::fs::CWD, &root.join(&dir)).unwrap_or_default();
        listed.sort_by(|a, b| a.name.cmp(&b.name));
        let below: Vec<_> =
            listed.iter().filter(|it| it.kind == FileType::Directory).map(|it| dir.join(&it.name)).collect();
        self.0.push((dir, listed));
        below.into_iter().for_each(|dir| self.add(root, dir));
    }

    fn find(&self, path: &Path) -> Option<FileType> {
        let (dir, name) = (path.parent()?, path.file_name()?);
        let (_, listed) = self.0.iter().find(|(path, _)| path == dir)?;
        listed.iter().find(|it| it.name == name).map(|it| it.kind)
    }

    fn fits(&self, path: &Path, wish: Wish) -> bool {
        match wish {
            Wish::New => {
                self.find(path).is_none() && self.0.iter().any(|(dir, _)| Some(dir.as_path()) == path.parent())
            }
            _ => self.find(path).is_some_and(|kind| wish.is_met_by(kind)),
        }
    }

    /// First a directory and then a name in it, so that one with many names is not most of what is found.
    fn choose(&self, wish: Wish, old: &Path, random: u64) -> Option<PathBuf> {
        let pick = |n: usize, random: u64| (n > 0).then(|| (random % n as u64) as usize);
        if wish == Wish::New {
            let (dir, _) = &self.0[pick(self.0.len(), random)?];
            return old.file_name().map(|name| dir.join(name));
        }
        let meeting = |listed: &[tree::Listed]| -> Vec<_> {
            listed.iter().filter(|it| wish.is_met_by(it.kind)).map(|it| it.name.clone()).collect()
        };
        let dirs: Vec<_> =
            self.0.iter().map(|(dir, listed)| (dir, meeting(listed))).filter(|(_, names)| !names.is_empty()).collect();
        let (dir, names) = &dirs[pick(dirs.len(), random)?];
        Some(dir.join(&names[pick(names.len(), random >> 32)?]))
    }
}

impl Wish {
    fn is_met_by(self, kind: FileType) -> bool {
        match self {
            Wish::File => kind == FileType::RegularFile,
            Wish::NoDir => kind != FileType::Directory,
            Wish::Dir => kind == FileType::Directory,
            Wish::Any => true,
            Wish::New => false,
        }
    }
}

/// The step with names and descriptors that it may have success with; one in six is left as it was drawn.
pub fn aim(step: &Step, nth: usize, names: &Names, open: [bool; SLOTS]) -> Step {
    let mut hasher = DefaultHasher::new();
    (format!("{step:?}"), nth).hash(&mut hasher);
    let random = hasher.finish();
    let mut step = step.clone();
    if !random.is_multiple_of(6) {
        for (path, wish) in wishes(&mut step.op, random) {
            // The two names of a rename are not to be the same.
            let random = random.rotate_left(match wish {
                Wish::New => 13,
                _ => path.as_os_str().len() as u32,
            });
            if !names.fits(path, wish)
                && let Some(better) = names.choose(wish, path, random)
            {
                *path = better;
            }
        }
        for slot in slots(&mut step.op) {
            if let Some(better) = (0..SLOTS).map(|n| (*slot + n) % SLOTS).find(|n| open[*n]) {
                *slot = better;
            }
        }
    }
    step
}

fn wishes(op: &mut Op, random: u64) -> Vec<(&mut PathBuf, Wish)> {
    // Over something that exists or to a free name.
    let over = if random & 64 == 0 { Wish::Any } else { Wish::New };
    match op {
        Op::Mkdir { path, .. } | Op::Mknod { path, .. } | Op::Symlink { path, .. } => vec![(path, Wish::New)],
        Op::Rmdir { path } => vec![(path, Wish::Dir)],
        Op::Unlink { path } => vec![(path, Wish::NoDir)],
        Op::Link { from, to, .. } => vec![(from, Wish::NoDir), (to, Wish::New)],
        Op::Rename { from, to, flags } => {
            // Half of them directories: what is hardest for a union.
            let what = if random & 128 == 0 { Wish::Dir } else { Wish::Any };
            let to_what = match *flags {
                RenameFlags::EXCHANGE => Wish::Any,
                RenameFlags::NOREPLACE => Wish::New,
                _ => over,
            };
            vec![(from, what), (to, to_what)]
        }
        Op::Open { path, flags, .. } => {
            let new = flags.contains(OFlags::EXCL);
            let dir = flags.contains(OFlags::DIRECTORY);
            vec![(
                path,
                if new {
                    Wish::New
                } else if dir {
                    Wish::Dir
                } else {
                    Wish::File
                },
            )]
        }
        Op::SetCapability { path } => vec![(path, Wish::File)],
        Op::Write { path, .. } | Op::Truncate { path, .. } | Op::Read { path, .. } => vec![(path, Wish::File)],
        Op::SetXattr { path, .. } | Op::GetXattr { path, .. } | Op::RemoveXattr { path, .. } => {
            vec![(path, Wish::Any)]
        }
        Op::SetAcl { path, default, .. } => vec![(path, if *default { Wish::Dir } else { Wish::Any })],
        Op::RemoveTree { path } | Op::Chmod { path, .. } | Op::Chown { path, .. } => vec![(path, Wish::Any)],
        Op::Utimens { path, .. } | Op::ListXattr { path } | Op::Stat { path, .. } => vec![(path, Wish::Any)],
        Op::Access { path, .. } | Op::Readlink { path } => vec![(path, Wish::Any)],
        Op::Readdir { path } => vec![(path, Wish::Dir)],
        _ => Vec::new(),
    }
}

fn slots(op: &mut Op) -> Vec<&mut usize> {
    match op {
        Op::CopyRange { from, to, .. } => vec![from, to],
        Op::Pread { slot, .. } | Op::Pwrite { slot, .. } | Op::Ftruncate { slot, .. } => vec![slot],
        Op::Fallocate { slot, .. } | Op::Seek { slot, .. } | Op::MmapWrite { slot, .. } => vec![slot],
        Op::Fstat { slot } | Op::Fchmod { slot, .. } | Op::Fchown { slot, .. } => vec![slot],
        Op::Fsync { slot, .. } => vec![slot],
        _ => Vec::new(),
    }
}
