//! Renames, of directories that lie in lower layers too: a redirect then says where they were.

use super::{
    Union,
    copy_up::Times,
    create::has_whiteout,
    layer,
    listing::Listed,
    lookup::Found,
    marks::{self, Object},
    node::{Fds, Names, Node, Place, Source, UPPER},
    remove::open_nameless,
    work::Upper,
};
use parking_lot::{MutexGuard, RwLockWriteGuard};
use rustix::{
    fd::{AsFd, BorrowedFd, OwnedFd},
    fs::{AtFlags, RenameFlags, XattrFlags},
    io::{Errno, Result},
};
use std::{
    ffi::OsStr,
    sync::{Arc, Weak, atomic::Ordering},
};

/// The names of one or two directories, locked.
struct Locked<'a> {
    first: RwLockWriteGuard<'a, Names>,
    second: Option<RwLockWriteGuard<'a, Names>>,
    /// `first` is of the directory that is renamed into.
    swapped: bool,
}

impl<'a> Locked<'a> {
    fn new(from: &'a Arc<Node>, into: &'a Arc<Node>) -> Result<Locked<'a>> {
        let swapped = Arc::as_ptr(from) > Arc::as_ptr(into);
        let (a, b) = if swapped { (into, from) } else { (from, into) };
        let first = a.dir()?.names.write();
        let second = if Arc::ptr_eq(a, b) { None } else { Some(b.dir()?.names.write()) };
        Ok(Locked { first, second, swapped })
    }

    fn source(&mut self) -> &mut Names {
        match &mut self.second {
            Some(second) if self.swapped => second,
            _ => &mut self.first,
        }
    }

    fn target(&mut self) -> &mut Names {
        match &mut self.second {
            Some(second) if !self.swapped => second,
            _ => &mut self.first,
        }
    }
}

/// One end of a rename.
struct End<'a> {
    dir: &'a Arc<Node>,
    fds: Arc<Fds>,
    name: &'a OsStr,
}

impl End<'_> {
    fn upper(&self) -> Result<BorrowedFd<'_>> {
        self.fds.upper()
    }
}

/// What is moved, made ready for its new place.
struct Moved {
    node: Arc<Node>,
    found: Found,
    /// Of a directory that lies in lower layers too.
    below: Option<Below>,
}

/// Where a directory lies in lower layers: it does not move with its name.
struct Below {
    /// In each, from its root.
    sources: Arc<[Source]>,
    /// In what they show together.
    path: Box<[u8]>,
}

impl Union {
    /// Renames; `flags` as renameat2(2). `RENAME_WHITEOUT` is refused, as the kernel's overlay does: what it leaves
    /// behind would be a whiteout of ours.
    pub fn rename(&self, parent: u64, name: &OsStr, to: u64, to_name: &OsStr, flags: u32) -> Result<()> {
        let upper = self.upper()?;
        let flags = RenameFlags::from_bits_retain(flags);
        if flags.intersects(!(RenameFlags::NOREPLACE | RenameFlags::EXCHANGE)) {
            return Err(Errno::INVAL);
        }
        if to_name.len() > 255 {
            return Err(Errno::NAMETOOLONG);
        }
        if marks::is_reserved(to_name) {
            return Err(Errno::INVAL);
        }
        let (from, into) = (self.table.get(parent)?, self.table.get(to)?);
        let exchange = flags.contains(RenameFlags::EXCHANGE);
        let mut other = Weak::new();
        let known = self.bring_up(&from, name)?;
        if exchange {
            other = self.bring_up(&into, to_name)?;
        } else {
            self.count_links(&into, to_name);
        }
        self.dir_up(&from)?;
        self.dir_up(&into)?;
        let _no_walk = self.moves.read();
        let mut locked = Locked::new(&from, &into)?;
        if locked.source().removed || locked.target().removed {
            return Err(Errno::NOENT);
        }
        let source = End { dir: &from, fds: self.fds(&from)?, name };
        let target = End { dir: &into, fds: self.fds(&into)?, name: to_name };
        let moved = self.find(&from, &source.fds, locked.source(), name)?.ok_or(Errno::NOENT)?;
        let there = self.find(&into, &target.fds, locked.target(), to_name)?;
        if there.is_some() && flags.contains(RenameFlags::NOREPLACE) {
            return Err(Errno::EXIST);
        }
        let (ino, other_ino) = (moved.ino, there.as_ref().map(|there| there.ino));
        if exchange {
            let there = there.ok_or(Errno::NOENT)?;
            self.exchange(upper, &source, &target, &mut locked, moved, there)?;
        } else {
            self.replace(upper, &source, &target, &mut locked, moved, there)?;
        }
        // A copied-up file that could not remember its number has two nodes; the kernel may still use the first.
        if let Some(known) = known.upgrade().filter(|known| known.ino != ino) {
            known.place.lock().rename((&from, name), (&into, to_name));
        }
        if let Some(other) = other.upgrade().filter(|other| Some(other.ino) != other_ino) {
            other.place.lock().rename((&into, to_name), (&from, name));
        }
        Ok(())
    }

    /// Gets what is going to be moved into the upper layer. The node is that of before, if it is in use.
    fn bring_up(&self, dir: &Arc<Node>, name: &OsStr) -> Result<Weak<Node>> {
        let node = {
            let names = dir.dir()?.names.read();
            let fds = self.fds(dir)?;
            let found = self.find(dir, &fds, &names, name)?.ok_or(Errno::NOENT)?;
            self.node_for(dir, name, found, 0)
        };
        let up = self.up_for_a_name(&node);
        let known = Arc::downgrade(&node);
        self.let_go(node);
        up.map(|()| known)
    }

    /// Prepares what is in the upper layer for a new place. `hides`: lower layers have something there.
    fn ready(&self, upper: &Upper, end: &End<'_>, target: &End<'_>, found: Found, hides: bool) -> Result<Moved> {
        if found.layer != UPPER {
            // Somebody else put it there since it was brought up.
            return Err(Errno::STALE);
        }
        let remembers = found.ino != self.numbers.of(layer::device(&found.stat), found.stat.stx_ino);
        let directory = found.is_dir();
        let stat = found.stat.clone();
        let (layer, composed, ino) = (found.layer, found.composed, found.ino);
        let node = self.node_for(end.dir, end.name, found, 0);
        let mut below = None;
        if directory {
            let object = Object { dir: end.upper()?, name: end.name };
            let lower = node.dir()?.sources();
            match lower.iter().find(|s| s.layer != UPPER) {
                Some(_) => {
                    let path = self.lower_path(&node)?;
                    below = Some(Below { sources: self.pinned_sources(&node, &lower)?, path: path.clone().into() });
                    self.redirect(upper, object, &[b"/", &*path].concat())?;
                }
                None if hides => self.make_opaque(upper, object.dir, object.name)?,
                None => {}
            }
        }
        if remembers || composed || below.is_some() {
            self.mark_impure(upper, target.dir, target.upper()?)?;
        }
        let found = Found { layer, stat, ino, composed, stack: None };
        Ok(Moved { node, found, below })
    }

    fn redirect(&self, upper: &Upper, object: Object<'_>, path: &[u8]) -> Result<()> {
        if !upper.xattrs {
            return Err(Errno::XDEV);
        }
        match object.set(&self.marks.name("redirect"), path, XattrFlags::empty()) {
            // Too long for an xattr: mv(1) copies then.
            Err(Errno::NOSPC | Errno::TOOBIG | Errno::RANGE) => Err(Errno::XDEV),
            other => other,
        }
    }

    /// The sources of a directory, by their paths from the layers' roots: they do not move with it.
    fn pinned_sources(&self, node: &Arc<Node>, sources: &[Source]) -> Result<Arc<[Source]>> {
        let pinned = |source: &Source| {
            let mut source = source.clone();
            if source.layer != UPPER {
                source.path = Some(self.layer_path(node, source.layer)?.into());
            }
            Ok(source)
        };
        sources.iter().map(pinned).collect()
    }

    fn exchange(
        &self,
        upper: &Upper,
        source: &End<'_>,
        target: &End<'_>,
        locked: &mut Locked<'_>,
        moved: Found,
        there: Found,
    ) -> Result<()> {
        let below = |end: &End<'_>| Ok(self.is_below(end.dir, &end.fds, end.name)?.is_some());
        let moved = self.ready(upper, source, target, moved, below(target)?)?;
        let there = self.ready(upper, target, source, there, below(source)?)?;
        // Descriptors first: they are asked for by name.
        let _pinned = [&moved, &there].map(|m| m.node.dir.is_some().then(|| self.fds(&m.node)));
        {
            let (mut place, mut other) = lock_places(&moved.node, Some(&there.node));
            let exchange = RenameFlags::EXCHANGE;
            rustix::fs::renameat_with(source.upper()?, source.name, target.upper()?, target.name, exchange)?;
            if let Some(other) = &mut other {
                moved.arrive(&mut place, source, target);
                there.arrive(other, target, source);
            }
        }
        self.relist(locked.target(), target.name, Some(&moved));
        self.relist(locked.source(), source.name, Some(&there));
        self.let_go(moved.node);
        self.let_go(there.node);
        Ok(())
    }

    fn replace(
        &self,
        upper: &Upper,
        source: &End<'_>,
        target: &End<'_>,
        locked: &mut Locked<'_>,
        moved: Found,
        there: Option<Found>,
    ) -> Result<()> {
        match there.as_ref().map(Found::is_dir) {
            Some(true) if !moved.is_dir() => return Err(Errno::ISDIR),
            Some(false) if moved.is_dir() => return Err(Errno::NOTDIR),
            _ => {}
        }
        let victim = there.map(|found| self.victim(upper, target, found)).transpose()?;
        if victim.as_ref().is_some_and(|v| v.node.dir.is_none() && v.node.ino == moved.ino) {
            // Two names of one file: rename(2) does nothing.
            return Ok(());
        }
        let hides = self.is_below(target.dir, &target.fds, target.name)?.is_some();
        let moved = self.ready(upper, source, target, moved, hides)?;
        let _pinned = moved.node.dir.is_some().then(|| self.fds(&moved.node));
        let uncovers = self.is_below(source.dir, &source.fds, source.name)?.is_some();
        {
            // Nobody may look for either file by its name while that is another one's.
            let (mut place, mut lost) = lock_places(&moved.node, victim.as_ref().map(|v| &v.node));
            self.move_over(upper, source, target, &moved, victim.as_ref(), uncovers)?;
            if let (Some(victim), Some(lost)) = (&victim, &mut lost) {
                self.lose(victim, lost, target)?;
            }
            moved.arrive(&mut place, source, target);
        }
        upper.work.drop_whiteout_file(target.upper()?, target.name)?;
        if let Some(victim) = victim {
            victim.close();
            self.let_go(victim.node);
        }
        self.relist(locked.source(), source.name, None);
        self.relist(locked.target(), target.name, Some(&moved));
        self.let_go(moved.node);
        Ok(())
    }

    fn victim(&self, upper: &Upper, target: &End<'_>, found: Found) -> Result<Victim> {
        let dir = target.fds.layer(found.layer).ok_or(Errno::STALE)?;
        let in_upper = found.layer == UPPER;
        let fd = open_nameless(dir, target.name)?;
        let (layer, stat, ino, composed) = (found.layer, found.stat.clone(), found.ino, found.composed);
        let stat_before = stat.clone();
        let node = self.node_for(target.dir, target.name, found, 0);
        let pinned = match node.dir {
            Some(_) => {
                let found = Found { layer, stat, ino, composed, stack: None };
                let pinned = self.fds(&node)?;
                self.empty_for_rename(upper, target.upper()?, &node, &found, target.name)?;
                Some(pinned)
            }
            None => None,
        };
        Ok(Victim { links: self.links_of(&node, layer, &stat_before), node, fd, pinned, in_upper })
    }

    /// The one change on disk, atomic: the old name goes, or becomes a whiteout if lower layers have it, and the new one
    /// is there.
    fn move_over(
        &self,
        upper: &Upper,
        source: &End<'_>,
        target: &End<'_>,
        moved: &Moved,
        victim: Option<&Victim>,
        uncovers: bool,
    ) -> Result<()> {
        let (from, into) = (source.upper()?, target.upper()?);
        let rename = |flags| rustix::fs::renameat_with(from, source.name, into, target.name, flags);
        let taken = victim.is_some_and(|v| v.in_upper);
        let over_whiteout = !taken && moved.node.dir.is_some() && has_whiteout(into, target.name)?;
        if over_whiteout && layer::stat(into, target.name).is_ok() {
            // A directory cannot replace a device: they change places, and the whiteout may be wanted where it comes.
            // Which for some filesystems is a change of the directory.
            let dir = layer::open_dir(from, source.name)?;
            let kept = Times::of(dir.as_fd())?;
            rename(RenameFlags::EXCHANGE)?;
            kept.restore(dir.as_fd())?;
            return if uncovers { Ok(()) } else { rustix::fs::unlinkat(from, source.name, AtFlags::empty()) };
        }
        if !uncovers {
            return rename(RenameFlags::empty());
        }
        if !upper.work.has_devices() {
            // After it: beside a directory that is still there the whiteout would hide what lies below that.
            rename(RenameFlags::empty())?;
            return upper.work.make_whiteout_file(from, source.name);
        }
        match rename(RenameFlags::WHITEOUT) {
            Err(Errno::INVAL | Errno::PERM | Errno::OPNOTSUPP) => {
                rename(RenameFlags::empty())?;
                upper.work.whiteout(from, source.name, false)
            }
            other => other,
        }
    }

    fn relist(&self, names: &mut Names, name: &OsStr, moved: Option<&Moved>) {
        let Some(listing) = &mut names.listing else { return };
        match moved {
            None => listing.remove(&self.hasher, name),
            Some(moved) => listing.insert(
                &self.hasher,
                Listed {
                    name: name.into(),
                    ino: moved.node.ino,
                    layer: moved.found.layer,
                    kind: (moved.node.kind >> 12) as u8,
                    merged: moved.below.is_some(),
                },
            ),
        }
    }
}

/// What a rename replaces.
struct Victim {
    node: Arc<Node>,
    /// Its names, this one included.
    links: u32,
    fd: OwnedFd,
    pinned: Option<Arc<Fds>>,
    in_upper: bool,
}

impl Victim {
    /// Nothing is made in a directory that was replaced; what is open in it goes on being so.
    fn close(&self) {
        if let (Some(dir), Some(pinned)) = (&self.node.dir, &self.pinned) {
            dir.names.write().removed = true;
            *dir.open.lock() = Some(pinned.clone());
        }
    }
}

impl Moved {
    /// Tells the node its new name.
    fn arrive(&self, place: &mut Place, source: &End<'_>, target: &End<'_>) {
        place.rename((source.dir, source.name), (target.dir, target.name));
        if let (Some(dir), Some(below)) = (&self.node.dir, &self.below) {
            *dir.sources.write() = below.sources.clone();
            *dir.lower_path.write() = Some(below.path.clone());
        }
    }
}

impl Union {
    /// The victim has lost its name.
    fn lose(&self, victim: &Victim, place: &mut Place, target: &End<'_>) -> Result<()> {
        let last = place.forget_name(target.dir, target.name);
        if victim.node.dir.is_some() {
            victim.node.dead.store(true, Ordering::Relaxed);
            return Ok(());
        }
        let nameless = victim.fd.try_clone().map_err(|_| Errno::MFILE)?;
        self.lost_name(&victim.node, place, victim.links, last.then_some(nameless));
        Ok(())
    }
}

/// The places of one or two nodes, locked in the order of their addresses. The second is not there if it is the first.
fn lock_places<'a>(
    first: &'a Arc<Node>,
    second: Option<&'a Arc<Node>>,
) -> (MutexGuard<'a, Place>, Option<MutexGuard<'a, Place>>) {
    match second.filter(|second| !Arc::ptr_eq(first, second)) {
        Some(second) if Arc::as_ptr(second) < Arc::as_ptr(first) => {
            let second = second.place.lock();
            (first.place.lock(), Some(second))
        }
        second => {
            let first = first.place.lock();
            (first, second.map(|second| second.place.lock()))
        }
    }
}
