//! Native diff: where a layer can differ from its parent, as the kernel tells when it is asked to send one.
//!
//! `btrfs send` compares the metadata of two read-only snapshots and skips what they share. Of its stream, here without
//! file data, only the paths count.
//!
//! Those of the stream are from the middle of receiving, where a directory that will be moved may still have its old or
//! an intermediate name. A directory that in the end has another inode at its path than the parent layer has got there by
//! a command that makes it or moves it there, and then everything below is compared. All other directories are never
//! moved, so what the stream says about the names in them is under the very path they have in both layers.
//!
//! The stream names a changed inode once, by any of its names. The walk lists all of them ([`walk::changes`]), so those
//! with several are looked up in the layer's own metadata.
//!
//! [`walk::changes`]: graphdriver_core::walk::changes

use crate::{
    stream::{self, Event},
    subvolume::{self, Nested},
    usage,
};
use btrfs_disk::items::InodeItem;
use btrfs_uapi::{
    raw::BTRFS_INODE_ITEM_KEY,
    send_receive::{SendFlags, send},
};
use graphdriver_core::{Candidates, Context, Narrow, Result};
use graphdriver_quota::qgroup::subvolume_id;
use rustix::fs::FileType;
use std::{
    collections::{BTreeSet, HashMap, HashSet},
    ffi::OsString,
    io,
    os::fd::{AsRawFd, BorrowedFd},
    path::{Path, PathBuf},
};

/// The names that may differ.
#[derive(Debug, Default)]
pub(crate) struct Changed {
    names: HashMap<PathBuf, BTreeSet<OsString>>,
    /// Below these everything may.
    whole: HashSet<PathBuf>,
}

impl Narrow for Changed {
    fn candidates(&mut self, dir: &Path) -> Result<Candidates> {
        if self.whole.contains(dir) {
            return Ok(Candidates::All);
        }
        Ok(Candidates::Names(self.names.remove(dir).unwrap_or_default().into_iter().collect()))
    }
}

/// Where nothing is known.
pub(crate) struct Everywhere;

impl Narrow for Everywhere {
    fn candidates(&mut self, _: &Path) -> Result<Candidates> {
        Ok(Candidates::All)
    }
}

impl Changed {
    /// What `layer` has changed since `parent`; both are read-only. `born` is the transaction in which the layer was made.
    pub(crate) fn between(layer: BorrowedFd<'_>, parent: BorrowedFd<'_>, born: u64) -> Result<Changed> {
        let mut changed = Changed::default();
        let from = subvolume_id(parent)?;
        let (reader, writer) = io::pipe().doing(|| "making a pipe")?;
        std::thread::scope(|scope| {
            let sending = scope.spawn(move || {
                let sent = send(layer, writer.as_raw_fd(), from, &mut [], SendFlags::NO_FILE_DATA, 1);
                sent.map_err(io::Error::from).doing(|| "asking the kernel for a send stream")
            });
            let read = stream::read(io::BufReader::with_capacity(64 * 1024, reader), &mut |event| changed.event(event));
            // Its own error says more than that the stream ended early.
            sending.join().expect("it does not panic").and(read)
        })?;
        changed.linked(layer, born)?;
        Ok(changed)
    }

    fn event(&mut self, event: Event) {
        match event {
            Event::Touched(path) => self.touch(&path),
            Event::Made(path) => self.all_below(path),
            Event::Moved(from, to) => {
                self.touch(&from);
                self.all_below(to);
            }
        }
    }

    /// A name in every directory on the way, or the walk would not get there.
    fn touch(&mut self, path: &Path) {
        let mut rest = path;
        while let (Some(dir), Some(name)) = (rest.parent(), rest.file_name()) {
            let names = self.names.entry(dir.into()).or_default();
            if !names.insert(name.into()) {
                return;
            }
            rest = dir;
        }
    }

    fn all_below(&mut self, path: PathBuf) {
        self.touch(&path);
        self.whole.insert(path);
    }

    /// Subvolumes in the layer, which are not sent with it.
    pub(crate) fn add_nested(&mut self, nested: &[Nested]) {
        nested.iter().for_each(|n| self.all_below(n.path.clone()));
    }

    /// All names of changed inodes that have several.
    fn linked(&mut self, layer: BorrowedFd<'_>, born: u64) -> Result<()> {
        let mut several = Vec::new();
        usage::own_items(layer, born, &mut |key, data| {
            let inode = (key.item_type == BTRFS_INODE_ITEM_KEY).then(|| InodeItem::parse(data)).flatten();
            if inode.is_some_and(|inode| inode.transid > born && inode.nlink > 1 && !is_directory(&inode)) {
                several.push(key.objectid);
            }
        })?;
        let mut dirs = HashMap::new();
        for inode in several {
            for (dir, name) in subvolume::names_of(layer, inode)? {
                let path = match dirs.get(&dir) {
                    Some(path) => path,
                    None => dirs.entry(dir).or_insert(subvolume::path_of(layer, dir)?),
                };
                // A frozen layer has no directory that is gone.
                path.iter().for_each(|path: &PathBuf| self.touch(&path.join(&name)));
            }
        }
        Ok(())
    }
}

fn is_directory(inode: &InodeItem) -> bool {
    FileType::from_raw_mode(inode.mode) == FileType::Directory
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(changed: &mut Changed, dir: &str) -> Vec<String> {
        match changed.candidates(Path::new(dir)).unwrap() {
            Candidates::All => vec!["*".into()],
            Candidates::Names(names) => names.into_iter().map(|name| name.into_string().unwrap()).collect(),
        }
    }

    #[test]
    fn a_change_leads_the_walk_through_every_directory_on_the_way() {
        let mut changed = Changed::default();
        changed.event(Event::Touched("a/b/c".into()));
        changed.event(Event::Touched("a/x".into()));
        changed.event(Event::Touched("".into()));
        assert_eq!(names(&mut changed, ""), ["a"]);
        assert_eq!(names(&mut changed, "a"), ["b", "x"]);
        assert_eq!(names(&mut changed, "a/b"), ["c"]);
        assert_eq!(names(&mut changed, "a/b/c"), [""; 0]);
    }

    #[test]
    fn below_what_was_made_or_moved_everything_is_compared() {
        let mut changed = Changed::default();
        changed.event(Event::Made("o257-1-0".into()));
        changed.event(Event::Moved("o257-1-0".into(), "a/new".into()));
        changed.event(Event::Moved("old".into(), "o258-1-0".into()));
        changed.add_nested(&[Nested { path: "a/sub".into(), id: 300 }]);
        assert_eq!(names(&mut changed, ""), ["a", "o257-1-0", "o258-1-0", "old"]);
        assert_eq!(names(&mut changed, "a"), ["new", "sub"]);
        assert_eq!(names(&mut changed, "a/new"), ["*"]);
        assert_eq!(names(&mut changed, "a/sub"), ["*"]);
        assert_eq!(names(&mut changed, "old"), [""; 0]);
    }
}
