//! Nodes: what the kernel knows by a number. A node has no descriptor of its own, only a place: a name in a directory.
//!
//! Locks are taken in this order: `links` and `moves` of the union, then [`Dir::names`] of directories (two of them by
//! address), then places, then [`Dir::open`], `place` and so on towards the root. Who holds a place never asks for names.

use super::{data::Data, listing::Listing};
use parking_lot::{Mutex, RwLock};
use rustix::{
    fd::{AsFd, BorrowedFd, OwnedFd},
    io::{Errno, Result},
};
use std::{
    collections::HashMap,
    ffi::OsStr,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering},
    },
};

/// The writable layer. Lower ones are numbered from 1, topmost first, also where there is no upper one.
pub(super) const UPPER: u16 = 0;

/// A file of any type.
pub(super) struct Node {
    /// The inode number it is shown with.
    pub ino: u64,
    /// Tells it from an earlier node of the same number.
    pub generation: u32,
    /// `S_IFMT` bits.
    pub kind: u32,
    /// What directories have.
    pub dir: Option<Box<Dir>>,
    /// It has lost its last name.
    pub dead: AtomicBool,
    /// The id the kernel is told instead of the inode number; 0: none.
    pub renewed: AtomicU64,
    /// Where it is.
    pub place: Mutex<Place>,
}

/// Where a node is found: a name in a directory, and in which layer.
pub(super) struct Place {
    /// `None`: the root, or nameless.
    pub parent: Option<Arc<Node>>,
    pub name: Box<OsStr>,
    /// Of a directory it means nothing: see [`Dir::sources`].
    pub layer: u16,
    /// Its data is not, or not only, in the file of this name: see [`Data`].
    pub composed: bool,
    pub more: Option<Box<More>>,
}

/// What few nodes have.
#[derive(Default)]
pub(super) struct More {
    /// Further names, of files with several links.
    pub names: Vec<(Arc<Node>, Box<OsStr>)>,
    /// The file, once it has no name left.
    pub nameless: Option<Arc<OwnedFd>>,
    /// Its data, while somebody has it open.
    pub data: Weak<Data>,
    /// Its names are moved to the upper layer one by one, or some could not be: it is found on either side.
    pub placing: bool,
    /// Blocks of the lower file that a file copied up by extents shows data of.
    pub lower_blocks: u64,
}

impl Place {
    pub fn more(&mut self) -> &mut More {
        self.more.get_or_insert_default()
    }

    /// The name it is reached by, if it has one.
    pub fn own_name(&self) -> Option<(Arc<Node>, Box<OsStr>)> {
        self.parent.as_ref().map(|parent| (parent.clone(), self.name.clone()))
    }

    pub fn is(&self, parent: &Arc<Node>, name: &OsStr) -> bool {
        self.parent.as_ref().is_some_and(|p| Arc::ptr_eq(p, parent)) && *self.name == *name
    }

    pub fn knows(&self, parent: &Arc<Node>, name: &OsStr) -> bool {
        let further = self.more.iter().flat_map(|m| &m.names);
        self.is(parent, name) || further.into_iter().any(|(p, n)| Arc::ptr_eq(p, parent) && **n == *name)
    }

    /// Gives it a further name, or one again after it had lost all that were known.
    pub fn add_name(&mut self, parent: Arc<Node>, name: Box<OsStr>) {
        if self.parent.is_some() {
            return self.more().names.push((parent, name));
        }
        self.parent = Some(parent);
        self.name = name;
        if let Some(more) = &mut self.more {
            more.nameless = None;
        }
    }

    /// One of its names becomes another.
    pub fn rename(&mut self, old: (&Arc<Node>, &OsStr), new: (&Arc<Node>, &OsStr)) {
        if self.is(old.0, old.1) {
            self.parent = Some(new.0.clone());
            self.name = new.1.into();
        } else if let Some(more) = &mut self.more {
            more.names.retain(|(p, n)| !(Arc::ptr_eq(p, old.0) && **n == *old.1));
            more.names.push((new.0.clone(), new.1.into()));
        }
    }

    /// Takes a name away. `true`: it was the last one.
    pub fn forget_name(&mut self, parent: &Arc<Node>, name: &OsStr) -> bool {
        let other = match &mut self.more {
            Some(more) => {
                more.names.retain(|(p, n)| !(Arc::ptr_eq(p, parent) && **n == *name));
                more.names.pop()
            }
            None => None,
        };
        if !self.is(parent, name) {
            self.more().names.extend(other);
            return false;
        }
        match other {
            Some((parent, name)) => {
                self.parent = Some(parent);
                self.name = name;
                false
            }
            None => {
                self.parent = None;
                true
            }
        }
    }
}

/// What a directory has beyond a place.
pub(super) struct Dir {
    /// Who changes names in it holds this for writing, who looks for one for reading.
    pub names: RwLock<Names>,
    /// Where its entries come from, topmost first; never empty.
    pub sources: RwLock<Arc<[Source]>>,
    /// Its directories in the layers while they are open, in the order of `sources`.
    pub open: Mutex<Option<Arc<Fds>>>,
    /// Where its lower directories are, from the root of what the layers below the upper one show together; `None`: under
    /// its own name in its parent's.
    pub lower_path: RwLock<Option<Box<[u8]>>>,
    /// Looked for in vain one by one since the listing was thrown away.
    pub misses: AtomicU32,
    /// Used since the clock came by.
    pub used: AtomicBool,
    /// Known to the clock.
    pub in_clock: AtomicBool,
    /// The upper directory is marked as one that may hold files which remember another inode number.
    pub impure: AtomicBool,
}

/// The names in a directory.
#[derive(Default)]
pub(super) struct Names {
    /// All of them, if they have been read.
    pub listing: Option<Listing>,
    /// It was removed: nothing is made in it any more.
    pub removed: bool,
    /// What it hands down to what is made in it, if that is known.
    pub heritage: Option<Heritage>,
}

/// What an upper directory hands down.
#[derive(Debug, Clone, Copy)]
pub(super) struct Heritage {
    /// The group as stored, if it is set-group-id.
    pub gid: Option<u32>,
    /// It has a default ACL.
    pub acl: bool,
}

/// A directory in one layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Source {
    pub layer: u16,
    /// From the layer's root; `None`: its name in the same layer of its parent.
    pub path: Option<Box<[u8]>>,
    /// May hold whiteouts that are regular files.
    pub xattr_whiteouts: bool,
}

/// Open directories.
pub(super) struct Fds {
    list: Vec<Opened>,
    count: Arc<AtomicUsize>,
}

/// A directory of one layer, open.
pub(super) struct Opened {
    pub layer: u16,
    pub fd: OwnedFd,
    pub xattr_whiteouts: bool,
}

impl Fds {
    pub fn new(list: Vec<Opened>, count: &Arc<AtomicUsize>) -> Fds {
        count.fetch_add(list.len(), Ordering::Relaxed);
        Fds { list, count: count.clone() }
    }

    /// Topmost first.
    pub fn list(&self) -> &[Opened] {
        &self.list
    }

    pub fn top(&self) -> &Opened {
        &self.list[0]
    }

    pub fn index(&self, layer: u16) -> Option<usize> {
        self.list.iter().position(|o| o.layer == layer)
    }

    pub fn layer(&self, layer: u16) -> Option<BorrowedFd<'_>> {
        self.index(layer).map(|i| self.list[i].fd.as_fd())
    }

    pub fn upper(&self) -> Result<BorrowedFd<'_>> {
        self.layer(UPPER).ok_or(Errno::ROFS)
    }
}

impl Drop for Fds {
    fn drop(&mut self) {
        self.count.fetch_sub(self.list.len(), Ordering::Relaxed);
    }
}

impl Dir {
    pub fn new(sources: Vec<Source>, impure: bool, lower_path: Option<Box<[u8]>>) -> Dir {
        Dir {
            names: RwLock::default(),
            sources: RwLock::new(sources.into()),
            open: Mutex::default(),
            lower_path: RwLock::new(lower_path),
            misses: AtomicU32::new(0),
            used: AtomicBool::new(true),
            in_clock: AtomicBool::new(false),
            impure: AtomicBool::new(impure),
        }
    }

    pub fn in_upper(&self) -> bool {
        self.sources.read()[0].layer == UPPER
    }

    /// Whether no lower layer has a part of it.
    pub fn is_upper_only(&self) -> bool {
        matches!(**self.sources.read(), [Source { layer: UPPER, .. }])
    }

    pub fn sources(&self) -> Arc<[Source]> {
        self.sources.read().clone()
    }
}

impl Node {
    pub fn dir(&self) -> Result<&Dir> {
        self.dir.as_deref().ok_or(Errno::NOTDIR)
    }

    /// The id that the kernel is told.
    pub fn id(&self) -> u64 {
        match self.renewed.load(Ordering::Acquire) {
            0 => self.ino,
            id => id,
        }
    }

    pub fn is_regular(&self) -> bool {
        self.kind == libc::S_IFREG
    }
}

/// All nodes that the kernel has references to, and those that others stand on.
pub(super) struct Table {
    shards: [Mutex<HashMap<u64, Slot>>; 16],
    next_id: AtomicU64,
}

struct Slot {
    node: Arc<Node>,
    references: u64,
}

/// Ids that are no inode number have this bit.
pub(super) const EXTRA_ID: u64 = 1 << 63;

impl Table {
    pub fn new() -> Table {
        Table { shards: Default::default(), next_id: AtomicU64::new(EXTRA_ID) }
    }

    pub fn insert_root(&self, root: Arc<Node>) {
        self.shard(ROOT_ID).lock().insert(ROOT_ID, Slot { node: root, references: 1 });
    }

    fn shard(&self, id: u64) -> &Mutex<HashMap<u64, Slot>> {
        &self.shards[(id.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 60) as usize]
    }

    pub fn get(&self, id: u64) -> Result<Arc<Node>> {
        self.find(id).ok_or(Errno::STALE)
    }

    pub fn find(&self, id: u64) -> Option<Arc<Node>> {
        self.shard(id).lock().get(&id).map(|s| s.node.clone())
    }

    /// The node of this number: the one that is there, or what `make` makes of a generation. One that has lost its last
    /// name gives way, as its number can only have been given to another file.
    pub fn intern(&self, ino: u64, references: u64, make: impl FnOnce(u32) -> Node) -> Arc<Node> {
        let mut shard = self.shard(ino).lock();
        match shard.get_mut(&ino) {
            Some(slot) => {
                if slot.node.dead.load(Ordering::Relaxed) {
                    slot.node = Arc::new(make(slot.node.generation + 1));
                }
                slot.references += references;
                slot.node.clone()
            }
            None => {
                let node = Arc::new(make(0));
                shard.insert(ino, Slot { node: node.clone(), references });
                node
            }
        }
    }

    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.shards.iter().map(|s| s.lock().len()).sum()
    }

    /// Takes references on a node by one of its ids.
    pub fn take(&self, node: &Arc<Node>, id: u64, references: u64) {
        let mut shard = self.shard(id).lock();
        shard.entry(id).or_insert_with(|| Slot { node: node.clone(), references: 0 }).references += references;
    }

    /// Gives a node one more id, which the next lookups answer with.
    pub fn renew(&self, node: &Arc<Node>) -> u64 {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        self.shard(id).lock().insert(id, Slot { node: node.clone(), references: 0 });
        node.renewed.store(id, Ordering::Release);
        id
    }

    /// Gives references back. A node that others stand on stays until they are gone.
    pub fn forget(&self, id: u64, references: u64) {
        let mut next = self.forget_one(id, references);
        // In a loop, as a tree may be deeper than the stack.
        while let Some(node) = next {
            let id = node.id();
            drop(node);
            next = self.forget_one(id, 0);
        }
    }

    /// The node to look at next: a parent that only the removed one held, or the same under its present id.
    fn forget_one(&self, id: u64, references: u64) -> Option<Arc<Node>> {
        let mut shard = self.shard(id).lock();
        let slot = shard.get_mut(&id)?;
        slot.references = slot.references.saturating_sub(references);
        if slot.references > 0 || id == ROOT_ID {
            return None;
        }
        let node = slot.node.clone();
        let current = node.id();
        if id != node.ino && id != current {
            // Renewed again since: nothing leads to this id any more.
            shard.remove(&id);
            return Some(node);
        }
        // `node`, and the slots it is in.
        let own = if current == node.ino { 2 } else { 3 };
        let unused = Arc::strong_count(&node) <= own;
        drop(shard);
        if unused { self.remove(node, current) } else { None }
    }

    /// Removes a node that only the table holds. One that was renewed is found by its inode number and known by its id, so
    /// both stay as long as the kernel has either.
    fn remove(&self, node: Arc<Node>, current: u64) -> Option<Arc<Node>> {
        let ids = [node.ino, current];
        let unused = |id: &u64| self.shard(*id).lock().get(id).is_none_or(|slot| slot.references == 0);
        if !ids.iter().all(unused) {
            return None;
        }
        let mut gone = Vec::new();
        for id in ids {
            let mut shard = self.shard(id).lock();
            if shard.get(&id).is_some_and(|slot| slot.references == 0 && Arc::ptr_eq(&slot.node, &node)) {
                gone.extend(shard.remove(&id));
            }
        }
        let parent = node.place.lock().parent.clone();
        parent.filter(|_| !gone.is_empty())
    }
}

/// The kernel's number of the root.
pub(super) const ROOT_ID: u64 = 1;
