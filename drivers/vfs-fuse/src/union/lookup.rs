//! From names to nodes: lookups and listings.

use super::{
    Attr, DirEntry, Entry, Union,
    dirs::{Here, Stack, kind_of},
    layer::{device, open_dir, spread, stat},
    listing::{FIRST_OFFSET, Listed, Listing},
    marks::{self, Object, names},
    node::{Dir, EXTRA_ID, Fds, Names, Node, Opened, Place, ROOT_ID, UPPER},
};
use crate::extent::{self, Header};
use parking_lot::RwLockReadGuard;
use rustix::{
    fd::AsFd,
    fs::{FileType, Mode, OFlags, RawDir, Statx},
    io::{Errno, Result},
};
use std::{
    ffi::OsStr,
    mem::MaybeUninit,
    os::unix::ffi::OsStrExt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

/// After how many descriptors tried in vain it is cheaper to read a directory whole.
const PATIENCE: u32 = 64;
/// `DT_DIR` and others are the file type's bits, shifted (dirent.h, `IFTODT`).
const DT_SHIFT: u32 = 12;
const DT_DIR: u8 = (libc::S_IFDIR >> DT_SHIFT) as u8;
/// Stands in a listing under construction for a name that is hidden in lower layers.
const HIDDEN: u8 = 255;

/// What a name stands for.
pub(super) struct Found {
    pub layer: u16,
    pub stat: Box<Statx>,
    pub ino: u64,
    pub composed: bool,
    /// Of directories.
    pub stack: Option<Stack>,
}

impl Found {
    pub fn is_dir(&self) -> bool {
        kind_of(&self.stat) == libc::S_IFDIR
    }
}

impl Union {
    /// One name in a directory.
    pub fn lookup(&self, parent: u64, name: &OsStr) -> Result<Entry> {
        let dir = self.table.get(parent)?;
        let names = self.names_for_lookup(&dir)?;
        let fds = self.fds(&dir)?;
        let found = self.find(&dir, &fds, &names, name)?.ok_or(Errno::NOENT)?;
        self.entry(&dir, &fds, name, found)
    }

    fn names_for_lookup<'d>(&self, dir: &'d Arc<Node>) -> Result<RwLockReadGuard<'d, Names>> {
        let own = dir.dir()?;
        let names = own.names.read();
        if names.removed {
            return Err(Errno::NOENT);
        }
        if names.listing.is_some() {
            return Ok(names);
        }
        let tried = own.misses.fetch_add(1, Ordering::Relaxed) + 1;
        if tried * self.lowers.len() as u32 <= PATIENCE {
            return Ok(names);
        }
        drop(names);
        self.listed(dir)
    }

    /// A lookup's answer, with one reference taken.
    fn entry(&self, dir: &Arc<Node>, fds: &Fds, name: &OsStr, found: Found) -> Result<Entry> {
        let object = Object { dir: fds.layer(found.layer).ok_or(Errno::STALE)?, name };
        let (stat, merged) = (*found.stat, found.stack.as_ref().is_some_and(|s| s.sources.len() > 1));
        let layer = found.layer;
        let node = self.node_for(dir, name, found, 1);
        let attr = self.attr(&node, layer, &stat, merged, object)?;
        Ok(self.told(&node, attr))
    }

    /// What the kernel is told of a node, on which it has one reference already.
    pub(super) fn told(&self, node: &Arc<Node>, attr: Attr) -> Entry {
        let id = node.id();
        if id != node.ino {
            self.table.take(node, id, 1);
            self.table.forget(node.ino, 1);
        }
        Entry { id, generation: node.generation.into(), attr }
    }

    /// What a name stands for in a directory whose names the caller has locked.
    pub(super) fn find(&self, dir: &Arc<Node>, fds: &Fds, names: &Names, name: &OsStr) -> Result<Option<Found>> {
        if name.len() > 255 {
            return Err(Errno::NAMETOOLONG);
        }
        if marks::is_reserved(name) {
            return Ok(None);
        }
        let first = match &names.listing {
            None => 0,
            Some(listing) => match listing.get(&self.hasher, name) {
                None => return Ok(None),
                Some(entry) => fds.index(entry.layer).unwrap_or(0),
            },
        };
        self.find_from(dir, fds, first, name)
    }

    /// What a name stands for, disregarding the layers above the one with index `first`.
    pub(super) fn find_from(&self, dir: &Arc<Node>, fds: &Fds, first: usize, name: &OsStr) -> Result<Option<Found>> {
        for (at, opened) in fds.list().iter().enumerate().skip(first) {
            let last = at + 1 == fds.list().len();
            let here = match last {
                true => self.here_at_last(opened.fd.as_fd(), name, opened.xattr_whiteouts),
                false => self.here(opened.fd.as_fd(), name, opened.xattr_whiteouts),
            };
            match here? {
                Here::Nothing => {}
                Here::Whiteout => return Ok(None),
                Here::File(stat) => return self.found(dir, fds, at, name, stat).map(Some),
            }
        }
        Ok(None)
    }

    fn found(&self, dir: &Arc<Node>, fds: &Fds, at: usize, name: &OsStr, stat: Box<Statx>) -> Result<Found> {
        let Opened { layer, fd, .. } = &fds.list()[at];
        let mut found = Found {
            layer: *layer,
            ino: self.numbers.of(device(&stat), stat.stx_ino),
            composed: false,
            stack: None,
            stat,
        };
        if found.is_dir() {
            let stack = self.stack(dir, fds, at, name)?;
            if let (UPPER, Some(lower)) = (*layer, &stack.lower) {
                found.ino = self.numbers.of(device(lower), lower.stx_ino);
            }
            found.stack = Some(stack);
            return Ok(found);
        }
        let object = Object { dir: fd.as_fd(), name };
        // A file of the lowest layer has no other to have its data in. Of others the blocks tell nothing: an xattr may
        // take one, and xfs allocates some in advance.
        let may_be_composed =
            || !self.is_bottom(*layer) && found.stat.stx_size > 0 && kind_of(&found.stat) == libc::S_IFREG;
        let may_be_marked = match *layer {
            // Before such a file is put into an upper directory, that is marked, by the kernel's overlay too. Who moves files
            // about by hand does not; a file with holes is looked at in any case.
            UPPER => dir.dir()?.impure.load(Ordering::Relaxed) || found.stat.stx_blocks * 512 < found.stat.stx_size,
            _ => may_be_composed(),
        };
        if may_be_marked {
            self.read_file_marks(object, &mut found)?;
        }
        Ok(found)
    }

    fn read_file_marks(&self, object: Object<'_>, found: &mut Found) -> Result<()> {
        let list = object.list()?;
        let own = self.marks.prefix.as_bytes();
        for name in names(&list) {
            let ino = match name.strip_prefix(own).filter(|_| found.layer == UPPER) {
                Some(b"vfs.ino") => {
                    object.get(&format!("{}vfs.ino", self.marks.prefix))?.and_then(|v| v.try_into().ok())
                }
                Some(b"metacopy") => object
                    .get(&format!("{}metacopy", self.marks.prefix))?
                    .and_then(|v| Header::shown_number(&v).map(u64::to_le_bytes)),
                _ => None,
            };
            // What the kernel cannot take as a number is damage.
            found.ino =
                ino.map(u64::from_le_bytes).filter(|ino| *ino > ROOT_ID && *ino < EXTRA_ID).unwrap_or(found.ino);
        }
        found.composed = has_data_mark(&list);
        Ok(())
    }

    /// The node of what was found, the one that is known already if there is one.
    pub(super) fn node_for(&self, dir: &Arc<Node>, name: &OsStr, mut found: Found, references: u64) -> Arc<Node> {
        let stack = found.stack.take();
        let (kind, layer, composed) = (kind_of(&found.stat), found.layer, found.composed);
        let make = |ino| {
            let stack = &stack;
            move |generation| Node {
                ino,
                generation,
                kind,
                dir: stack.as_ref().map(|s| Box::new(Dir::new(s.sources.clone(), s.impure, s.lower_path.clone()))),
                dead: AtomicBool::new(false),
                renewed: AtomicU64::new(0),
                place: Place { parent: Some(dir.clone()), name: name.into(), layer, composed, more: None }.into(),
            }
        };
        let node = self.table.intern(found.ino, references, make(found.ino));
        if self.settle(&node, dir, name, &found) {
            return node;
        }
        // Two objects claim one number: only copies made behind our back do. The second gets one of its own.
        self.table.forget(node.ino, references);
        let other = spread(u64::from(layer) << 56 ^ device(&found.stat), found.stat.stx_ino);
        self.table.intern(other, references, make(other))
    }

    /// Tells the node its name. `false`: it cannot have this name, so it is another object.
    fn settle(&self, node: &Arc<Node>, dir: &Arc<Node>, name: &OsStr, found: &Found) -> bool {
        let mut place = node.place.lock();
        if place.knows(dir, name) {
            return node.kind == kind_of(&found.stat);
        }
        // One that has lost all names that were known, and is not dead, has this one left.
        let has_others = found.stat.stx_nlink > 1 || place.parent.is_none();
        if node.kind != kind_of(&found.stat) || found.is_dir() || !has_others || !self.is_at(&place, found) {
            return false;
        }
        place.add_name(dir.clone(), name.into());
        true
    }

    /// Whether what was found is the file of this place. In lower layers the number that both have tells; in the upper
    /// one it is what an xattr says, which copies of the layer have kept.
    fn is_at(&self, place: &Place, found: &Found) -> bool {
        let more = place.more.as_ref();
        // All names are copied up together, so a file in the upper layer has none in lower ones.
        if (place.layer == UPPER) != (found.layer == UPPER) {
            return more.is_some_and(|m| m.placing);
        }
        let known = match (more.and_then(|m| m.nameless.as_ref()), &place.parent) {
            _ if place.layer != UPPER => return true,
            (Some(fd), _) => stat(fd.as_fd(), OsStr::new("")),
            (None, Some(parent)) => self.fds(parent).and_then(|fds| stat(fds.upper()?, &place.name)),
            (None, None) => return false,
        };
        known.is_ok_and(|known| known.stx_ino == found.stat.stx_ino)
    }

    /// The names of a directory, read whole.
    pub(super) fn listed<'d>(&self, dir: &'d Arc<Node>) -> Result<RwLockReadGuard<'d, Names>> {
        let own = dir.dir()?;
        loop {
            let names = own.names.read();
            if names.removed || names.listing.is_some() {
                own.used.store(true, Ordering::Relaxed);
                return Ok(names);
            }
            drop(names);
            let mut names = own.names.write();
            if !names.removed && names.listing.is_none() {
                names.listing = Some(self.read_names(dir)?);
            }
            drop(names);
            self.clock.enter(dir);
            self.clock.trim();
        }
    }

    /// Reads a directory in all layers. The caller has its names locked.
    pub(super) fn read_names(&self, dir: &Arc<Node>) -> Result<Listing> {
        let fds = self.fds(dir)?;
        let impure = dir.dir()?.impure.load(Ordering::Relaxed);
        let mut listing = Listing::new(&self.clock.entries);
        for opened in fds.list() {
            let merged = fds.list().len() > 1;
            self.read_layer(opened, &mut listing, impure, merged)?;
        }
        listing.retain(|e| e.kind != HIDDEN);
        Ok(listing)
    }

    fn read_layer(&self, opened: &Opened, listing: &mut Listing, impure: bool, merged: bool) -> Result<()> {
        let layer = opened.layer;
        let device = device(&stat(opened.fd.as_fd(), OsStr::new(""))?);
        let readable = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&opened.fd, ".", readable, Mode::empty())?;
        let mut buffer = [MaybeUninit::uninit(); 32 << 10];
        let mut dir = RawDir::new(&fd, &mut buffer);
        let mut hidden = Vec::new();
        while let Some(entry) = dir.next() {
            let entry = entry?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if name == "." || name == ".." {
                continue;
            }
            if let Some(of) = name.as_bytes().strip_prefix(marks::WHITEOUT.as_bytes()) {
                hidden.push(OsStr::from_bytes(of).to_owned());
                continue;
            }
            let kind = self.kind_in(opened, name, entry.file_type())?;
            if let Some(above) = listing.get_mut(&self.hasher, name) {
                // It shows if what is above hides it: it may merge with a directory from a layer above this one.
                above.merged |= kind == DT_DIR && above.kind == DT_DIR && above.layer != layer;
                continue;
            }
            let looked_up = layer == UPPER && (impure || merged && kind == DT_DIR);
            let ino = if looked_up { 0 } else { self.numbers.of(device, entry.ino()) };
            listing.insert(&self.hasher, Listed { name: name.into(), ino, layer, kind, merged: false });
        }
        for name in hidden {
            if listing.get(&self.hasher, &name).is_none() {
                listing.insert(&self.hasher, Listed { name: name.into(), ino: 0, layer, kind: HIDDEN, merged: false });
            }
        }
        Ok(())
    }

    /// `DT_*`, or [`HIDDEN`] if it is a whiteout.
    fn kind_in(&self, opened: &Opened, name: &OsStr, kind: FileType) -> Result<u8> {
        let doubtful = match kind {
            FileType::Unknown | FileType::CharacterDevice => true,
            FileType::RegularFile => opened.xattr_whiteouts,
            _ => false,
        };
        if !doubtful {
            return Ok((kind.as_raw_mode() >> DT_SHIFT) as u8);
        }
        match self.here(opened.fd.as_fd(), name, opened.xattr_whiteouts)? {
            Here::File(stat) => Ok((kind_of(&stat) >> DT_SHIFT) as u8),
            Here::Whiteout | Here::Nothing => Ok(HIDDEN),
        }
    }

    /// Calls `each` for the names after `offset` until it says `false`. The order and the offsets do not change when
    /// names come and go.
    pub fn readdir(&self, id: u64, offset: u64, each: &mut dyn FnMut(DirEntry<'_>) -> bool) -> Result<()> {
        let dir = self.table.get(id)?;
        let names = self.listed(&dir)?;
        if !self.dots(&dir, offset, each)? {
            return Ok(());
        }
        let Some(listing) = &names.listing else { return Ok(()) };
        let mut learned = Vec::new();
        for (offset, entry) in listing.after(offset.max(FIRST_OFFSET - 1)) {
            let mut ino = entry.ino;
            if ino == 0 {
                let fds = self.fds(&dir)?;
                let Some(found) = self.find(&dir, &fds, &names, &entry.name)? else { continue };
                ino = found.ino;
                learned.push((offset, ino));
            }
            if !each(DirEntry { ino, offset, kind: entry.kind, name: &entry.name }) {
                break;
            }
        }
        drop(names);
        if let (false, Some(mut names)) = (learned.is_empty(), dir.dir()?.names.try_write()) {
            let listing = names.listing.as_mut();
            listing.into_iter().for_each(|l| learned.iter().for_each(|(offset, ino)| l.learn(*offset, *ino)));
        }
        Ok(())
    }

    /// The same with what a lookup of each gives (`None` for `.` and `..`, and where it could not be had). An entry that
    /// `each` refuses takes no reference.
    pub fn readdir_plus(
        &self,
        id: u64,
        offset: u64,
        each: &mut dyn FnMut(DirEntry<'_>, Option<Entry>) -> bool,
    ) -> Result<()> {
        let dir = self.table.get(id)?;
        let names = self.listed(&dir)?;
        if !self.dots(&dir, offset, &mut |entry| each(entry, None))? {
            return Ok(());
        }
        let Some(listing) = &names.listing else { return Ok(()) };
        let fds = self.fds(&dir)?;
        for (offset, listed) in listing.after(offset.max(FIRST_OFFSET - 1)) {
            let first = fds.index(listed.layer).unwrap_or(0);
            // What one name stands for may be unreadable (a broken redirect); the others are still listed.
            let found = match self.find_from(&dir, &fds, first, &listed.name) {
                Ok(None) => continue,
                Ok(Some(found)) => Some(found),
                Err(_) => None,
            };
            let entry = found.and_then(|f| self.entry(&dir, &fds, &listed.name, f).ok());
            let ino = entry.as_ref().map_or(listed.ino.max(1), |e| e.attr.ino);
            let listed = DirEntry { ino, offset, kind: listed.kind, name: &listed.name };
            if !each(listed, entry) {
                entry.iter().for_each(|e| self.forget(e.id, 1));
                break;
            }
        }
        Ok(())
    }

    /// `.` and `..`. `false`: `each` wants no more.
    fn dots(&self, dir: &Arc<Node>, offset: u64, each: &mut dyn FnMut(DirEntry<'_>) -> bool) -> Result<bool> {
        let parent = dir.place.lock().parent.clone().unwrap_or_else(|| dir.clone());
        for (at, name, node) in [(1, ".", dir), (2, "..", &parent)] {
            let entry = DirEntry { ino: self.shown_ino(node), offset: at, kind: DT_DIR, name: OsStr::new(name) };
            if offset < at && !each(entry) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Whether a name is in a lower layer, so that it would come to light if the upper layer had nothing there.
    pub(super) fn is_below(&self, dir: &Arc<Node>, fds: &Fds, name: &OsStr) -> Result<Option<Found>> {
        let first = fds.list().iter().position(|o| o.layer != UPPER);
        first.map_or(Ok(None), |first| self.find_from(dir, fds, first, name))
    }

    /// A directory, opened anew to be read or synced.
    pub(super) fn reopen_dir(&self, fds: &Fds) -> Result<rustix::fd::OwnedFd> {
        let readable = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let top = open_dir(fds.top().fd.as_fd(), OsStr::new("."))?;
        rustix::fs::openat(&top, ".", readable, Mode::empty())
    }
}

/// Whether a file with these xattrs says that its data is, in part or whole, elsewhere.
pub(super) fn has_data_mark(list: &[u8]) -> bool {
    names(list).any(|name| {
        let mark = name.strip_prefix(b"trusted.overlay.").or(name.strip_prefix(b"user.overlay."));
        [extent::XATTR, extent::XATTR_1].iter().any(|header| mark == Some(header.as_bytes()))
    })
}
