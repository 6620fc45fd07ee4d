//! Names that go.

use super::{
    Union,
    copy_up::Change,
    layer,
    listing::Listing,
    lookup::Found,
    marks,
    node::{Fds, Node, Place, UPPER},
    work::Upper,
};
use rustix::{
    fd::{AsFd, BorrowedFd, OwnedFd},
    fs::{AtFlags, Mode, OFlags},
    io::{Errno, Result},
};
use std::{
    ffi::OsStr,
    sync::{Arc, atomic::Ordering},
};

impl Union {
    /// Removes a name of anything but a directory.
    pub fn unlink(&self, parent: u64, name: &OsStr) -> Result<()> {
        self.remove(parent, name, false)
    }

    /// Removes an empty directory.
    pub fn rmdir(&self, parent: u64, name: &OsStr) -> Result<()> {
        self.remove(parent, name, true)
    }

    fn remove(&self, parent: u64, name: &OsStr, directory: bool) -> Result<()> {
        let upper = self.upper()?;
        let dir = self.table.get(parent)?;
        if !dir.dir()?.in_upper() {
            self.check_kind(&dir, name, directory)?;
        }
        self.count_links(&dir, name);
        self.dir_up(&dir)?;
        let mut names = dir.dir()?.names.write();
        if names.removed {
            return Err(Errno::NOENT);
        }
        let fds = self.fds(&dir)?;
        let found = self.find(&dir, &fds, &names, name)?.ok_or(Errno::NOENT)?;
        if found.is_dir() != directory {
            return Err(if directory { Errno::NOTDIR } else { Errno::ISDIR });
        }
        let (layer, below) = (found.layer, found.layer != UPPER || self.is_below(&dir, &fds, name)?.is_some());
        let several = found.stat.stx_nlink > 1;
        let node = self.node_for(&dir, name, found, 0);
        let removed = match directory {
            true => self.remove_dir(upper, &node, &fds, name, layer, below),
            false => self.remove_file(upper, (&dir, &fds, name), &node, several, layer, below),
        };
        if let (Ok(()), Some(listing)) = (removed, &mut names.listing) {
            listing.remove(&self.hasher, name);
        }
        drop(names);
        self.let_go(node);
        removed
    }

    /// Forgets a node that the kernel may never have heard of.
    pub(super) fn let_go(&self, node: Arc<Node>) {
        let ino = node.ino;
        drop(node);
        self.table.forget(ino, 0);
    }

    /// Before a lower file with several names loses one: in the upper layer its link count will be right, at later
    /// mounts too. Not where that would copy its data, and not if it cannot be done: the name can go all the same.
    pub(super) fn count_links(&self, dir: &Arc<Node>, name: &OsStr) {
        if let Err(e) = self.try_to_count_links(dir, name) {
            tracing::debug!("a link count will be too high after {} is removed: {e}", name.display());
        }
    }

    fn try_to_count_links(&self, dir: &Arc<Node>, name: &OsStr) -> Result<()> {
        if !self.wants_extents() || dir.dir()?.is_upper_only() {
            return Ok(());
        }
        let names = dir.dir()?.names.read();
        let found = self.find(dir, &*self.fds(dir)?, &names, name)?;
        let Some(found) = found.filter(|f| f.layer != UPPER && f.stat.stx_nlink > 1 && !f.is_dir()) else {
            return Ok(());
        };
        if !self.can_extent() {
            return Ok(());
        }
        let node = self.node_for(dir, name, found, 0);
        drop(names);
        let up =
            self.has_names(node.ino).and_then(|has| if has { self.copy_up(&node, Change::Metadata) } else { Ok(()) });
        self.let_go(node);
        up
    }

    /// So that a refusal copies no directory up.
    fn check_kind(&self, dir: &Arc<Node>, name: &OsStr, directory: bool) -> Result<()> {
        let names = dir.dir()?.names.read();
        if names.removed {
            return Err(Errno::NOENT);
        }
        let found = self.find(dir, &*self.fds(dir)?, &names, name)?.ok_or(Errno::NOENT)?;
        match (found.is_dir(), directory) {
            (true, false) => Err(Errno::ISDIR),
            (false, true) => Err(Errno::NOTDIR),
            _ => Ok(()),
        }
    }

    fn remove_file(
        &self,
        upper: &Upper,
        (dir, fds, name): (&Arc<Node>, &Fds, &OsStr),
        node: &Arc<Node>,
        several: bool,
        layer: u16,
        below: bool,
    ) -> Result<()> {
        let mut place = node.place.lock();
        let nameless = open_nameless(fds.layer(layer).ok_or(Errno::STALE)?, name)?;
        // Another thread may have taken one of several away by now; further ones the place knows.
        let links = match several {
            true => self.links_of(node, layer, &layer::stat(nameless.as_fd(), OsStr::new(""))?),
            false => 1,
        };
        let upper_dir = fds.upper()?;
        match (layer == UPPER, below) {
            (true, false) => rustix::fs::unlinkat(upper_dir, name, AtFlags::empty())?,
            (taken, _) => upper.work.whiteout(upper_dir, name, taken)?,
        }
        let last = place.forget_name(dir, name);
        self.lost_name(node, &mut place, links, last.then_some(nameless));
        Ok(())
    }

    /// Notes that a file with so many names has lost one; `nameless`, if it was the last that is known.
    pub(super) fn lost_name(&self, node: &Node, place: &mut Place, links: u32, nameless: Option<OwnedFd>) {
        if let Some(fd) = nameless {
            place.more().nameless = Some(Arc::new(fd));
            // Another name of it may yet be looked up.
            node.dead.store(links < 2, Ordering::Relaxed);
        }
        if place.layer != UPPER && links > 1 {
            *self.gone.lock().entry(node.ino).or_default() += 1;
        }
    }

    fn remove_dir(
        &self,
        upper: &Upper,
        node: &Arc<Node>,
        fds: &Fds,
        name: &OsStr,
        layer: u16,
        below: bool,
    ) -> Result<()> {
        let own = node.dir()?;
        let mut inside = own.names.write();
        if inside.listing.is_none() {
            inside.listing = Some(self.read_names(node)?);
        }
        if !inside.listing.as_ref().is_some_and(Listing::is_empty) {
            return Err(Errno::NOTEMPTY);
        }
        // What is open in it goes on being so.
        let pinned = self.fds(node)?;
        let mut place = node.place.lock();
        self.clear_dir(upper, fds.upper()?, name, layer == UPPER, below)?;
        inside.removed = true;
        place.parent = None;
        node.dead.store(true, Ordering::Relaxed);
        drop(place);
        *own.open.lock() = Some(pinned);
        Ok(())
    }

    /// Takes an empty directory away, with the whiteouts that it may hold.
    fn clear_dir(&self, upper: &Upper, dir: BorrowedFd<'_>, name: &OsStr, there: bool, below: bool) -> Result<()> {
        let work = &upper.work;
        if !there {
            return work.whiteout(dir, name, false);
        }
        if below && work.has_devices() {
            let whiteout = work.device_whiteout()?;
            work.exchange(&whiteout, dir, name)?;
            return work.destroy(&whiteout);
        }
        if below {
            work.make_whiteout_file(dir, name)?;
        } else {
            match rustix::fs::unlinkat(dir, name, AtFlags::REMOVEDIR) {
                Err(Errno::NOTEMPTY | Errno::EXIST) => {}
                other => return other,
            }
        }
        let away = work.name();
        rustix::fs::renameat(dir, name, &work.dir, &away)?;
        work.destroy(&away)
    }

    /// A directory that a rename is going to replace: it must be empty, and its upper part truly so, as the kernel
    /// replaces no other.
    pub(super) fn empty_for_rename(
        &self,
        upper: &Upper,
        dir: BorrowedFd<'_>,
        node: &Arc<Node>,
        found: &Found,
        name: &OsStr,
    ) -> Result<()> {
        let own = node.dir()?;
        let mut inside = own.names.write();
        if inside.listing.is_none() {
            inside.listing = Some(self.read_names(node)?);
        }
        if !inside.listing.as_ref().is_some_and(Listing::is_empty) {
            return Err(Errno::NOTEMPTY);
        }
        if found.layer != UPPER {
            return Ok(());
        }
        let there = layer::open_dir(dir, name)?;
        if super::work::entries(there.as_fd())?.is_empty() {
            return Ok(());
        }
        let fresh = upper.work.name();
        rustix::fs::mkdirat(&upper.work.dir, &fresh, Mode::from_raw_mode(0o755))?;
        self.make_opaque(upper, upper.work.dir.as_fd(), &fresh)?;
        // Without xattrs opaque is itself an entry; then there is no telling it from content, so the old one goes first.
        if !upper.xattrs {
            let inside = layer::open_dir(upper.work.dir.as_fd(), &fresh)?;
            rustix::fs::unlinkat(&inside, marks::OPAQUE, AtFlags::empty())?;
        }
        self.dress_like(upper, &fresh, dir, name)?;
        upper.work.exchange(&fresh, dir, name)?;
        upper.work.destroy(&fresh)
    }

    fn dress_like(&self, upper: &Upper, fresh: &OsStr, dir: BorrowedFd<'_>, name: &OsStr) -> Result<()> {
        let source = marks::Object { dir, name };
        let owner = self.stored(UPPER, &layer::stat(dir, name)?, source)?;
        let object = marks::Object { dir: upper.work.dir.as_fd(), name: fresh };
        self.dress_owner(object, &layer::stat(object.dir, object.name)?, owner)
    }
}

/// A descriptor by which a file is reached once it has no name.
pub(super) fn open_nameless(dir: BorrowedFd<'_>, name: &OsStr) -> Result<OwnedFd> {
    rustix::fs::openat(dir, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}
