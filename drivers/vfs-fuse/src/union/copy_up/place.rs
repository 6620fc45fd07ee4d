//! The way of a copy from the work directory to its name, or to all of its names at once.

use super::{Copy, Lower, Times};
use crate::{
    extent::{ExtentFile, Header},
    union::{
        Union,
        data::Inner,
        dirs::kind_of,
        layer,
        links::{INODE, Name},
        marks::Object,
        node::{Node, Place, UPPER},
        work::{Upper, Work, link_nameless},
    },
};
use rustix::{
    fd::{AsFd, BorrowedFd},
    fs::{AtFlags, Mode, OFlags, XattrFlags},
    io::{Errno, Result},
};
use std::{
    ffi::{OsStr, OsString},
    sync::{Arc, atomic::Ordering},
};

impl Copy {
    /// Gives it its name in the work directory, if it has none yet.
    fn enter_work(&self, work: &Work) -> Result<()> {
        match &self.file {
            Some(file) if self.nameless => link_nameless(file.as_fd(), work.dir.as_fd(), &self.name),
            _ => Ok(()),
        }
    }

    /// Gives it its name, over a file that is there.
    fn place(&self, work: &Work, dir: BorrowedFd<'_>, name: &OsStr) -> Result<()> {
        match &self.file {
            Some(file) if self.nameless => match link_nameless(file.as_fd(), dir, name) {
                Err(Errno::EXIST) => self.enter_work(work)?,
                done => return done,
            },
            _ => {}
        }
        work.place(&self.name, dir, name)
    }
}

impl Union {
    /// The copy of a file that has lost its last name stays nameless.
    pub(super) fn place_nameless(&self, upper: &Upper, node: &Arc<Node>, copy: &Copy, lower: Lower) -> Result<()> {
        copy.enter_work(&upper.work)?;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&upper.work.dir, &copy.name, flags, Mode::empty())?;
        let mut place = node.place.lock();
        let inner = self.opened(&place, upper.work.dir.as_fd(), &copy.name, copy.header.as_ref(), lower)?;
        rustix::fs::unlinkat(&upper.work.dir, &copy.name, AtFlags::empty())?;
        place.more().nameless = Some(Arc::new(fd));
        self.arrived(&mut place, copy.header.is_some(), inner);
        Ok(())
    }

    pub(super) fn place_one(&self, upper: &Upper, node: &Arc<Node>, copy: &Copy, lower: Lower) -> Result<()> {
        let parent = node.place.lock().parent.clone();
        let Some(parent) = parent else { return self.place_nameless(upper, node, copy, lower) };
        let mut names = parent.dir()?.names.write();
        let fds = self.fds(&parent)?;
        let mut place = node.place.lock();
        if !place.parent.as_ref().is_some_and(|p| Arc::ptr_eq(p, &parent)) {
            drop((place, names));
            return self.place_nameless(upper, node, copy, lower);
        }
        let dir = fds.upper()?;
        self.mark_impure(upper, &parent, dir)?;
        let kept = Times::of(dir)?;
        copy.place(&upper.work, dir, &place.name)?;
        kept.restore(dir)?;
        if let Some(entry) = names.listing.as_mut().and_then(|l| l.get_mut(&self.hasher, &place.name)) {
            entry.layer = UPPER;
        }
        let name = place.name.clone();
        let inner = self.opened(&place, dir, &name, copy.header.as_ref(), lower)?;
        self.arrived(&mut place, copy.header.is_some(), inner);
        Ok(())
    }

    pub(super) fn place_all(
        &self,
        upper: &Upper,
        node: &Arc<Node>,
        copy: &Copy,
        lower: Lower,
        all: &[Name],
    ) -> Result<()> {
        for (parent, _) in all {
            self.dir_up(parent)?;
        }
        copy.enter_work(&upper.work)?;
        let group: OsString = self.note_group(&upper.work, &copy.name, all)?;
        let placed = self.place_group(upper, node, &group, copy, lower, all);
        match placed {
            // What is left of the group gives the other names the file at the next mount; until then the node does.
            Ok(false) => Ok(()),
            Ok(true) => upper.work.destroy(&group),
            Err(e) => upper.work.destroy(&group).and(Err(e)),
        }
    }

    /// `false`: another thread has removed or replaced the name meanwhile.
    fn place_in_group(
        &self,
        upper: &Upper,
        node: &Arc<Node>,
        group: BorrowedFd<'_>,
        parent: &Arc<Node>,
        name: &OsStr,
    ) -> Result<bool> {
        let mut names = parent.dir()?.names.write();
        let fds = self.fds(parent)?;
        let found = match names.removed {
            true => None,
            false => self.find(parent, &fds, &names, name)?,
        };
        if !found.is_some_and(|f| f.layer != UPPER && f.ino == node.ino) {
            return Ok(false);
        }
        let dir = fds.upper()?;
        self.mark_impure(upper, parent, dir)?;
        let kept = Times::of(dir)?;
        rustix::fs::linkat(group, INODE, dir, name, AtFlags::empty())?;
        if let Some(entry) = names.listing.as_mut().and_then(|l| l.get_mut(&self.hasher, name)) {
            entry.layer = UPPER;
        }
        let mut place = node.place.lock();
        if !place.knows(parent, name) {
            place.add_name(parent.clone(), name.into());
        }
        drop(place);
        kept.restore(dir)?;
        Ok(true)
    }

    /// `true`: all names are placed.
    fn place_group(
        &self,
        upper: &Upper,
        node: &Arc<Node>,
        group: &OsStr,
        copy: &Copy,
        lower: Lower,
        all: &[Name],
    ) -> Result<bool> {
        let from = layer::open_dir(upper.work.dir.as_fd(), group)?;
        let (mut placed, mut failed) = (0, None);
        node.place.lock().more().placing = true;
        for (parent, name) in all {
            match self.place_in_group(upper, node, from.as_fd(), parent, name) {
                Ok(there) => placed += usize::from(there),
                Err(e) => failed = Some(e),
            }
        }
        let mut place = node.place.lock();
        place.more().placing = placed > 0 && failed.is_some();
        if let (0, Some(e)) = (placed, failed) {
            return Err(e);
        }
        let inner = self.opened(&place, from.as_fd(), OsStr::new(INODE), copy.header.as_ref(), lower)?;
        // The name it is reached by may be one of those that failed.
        if place.parent.is_none() || failed.is_some() {
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            place.more().nameless = Some(Arc::new(rustix::fs::openat(&from, INODE, flags, Mode::empty())?));
        }
        self.arrived(&mut place, copy.header.is_some(), inner);
        Ok(failed.is_none())
    }

    /// The new data, if somebody has the file open.
    fn opened(
        &self,
        place: &Place,
        dir: BorrowedFd<'_>,
        name: &OsStr,
        header: Option<&Header>,
        lower: Lower,
    ) -> Result<Option<Inner>> {
        let is_open = place.more.as_ref().is_some_and(|more| more.data.strong_count() > 0);
        if !is_open || kind_of(&lower.stat) != libc::S_IFREG {
            return Ok(None);
        }
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(dir, name, flags, Mode::empty())?;
        let unit = self.unit()?;
        Ok(Some(match header {
            None => Inner::Upper(Arc::new(file)),
            Some(header) => {
                let prefix = self.marks.prefix;
                Inner::Extent(Arc::new(ExtentFile::open(file, lower.fd, header.clone(), prefix, unit, true)?))
            }
        }))
    }

    /// Tells the node, and who has it open, where the file is now.
    fn arrived(&self, place: &mut Place, composed: bool, inner: Option<Inner>) {
        place.layer = UPPER;
        place.composed = composed;
        let data = place.more.as_ref().and_then(|more| more.data.upgrade());
        if let (Some(data), Some(inner)) = (data, inner) {
            data.replace(inner);
        }
    }

    /// Marks an upper directory as one in which files may remember another inode number, as the kernel's overlay does.
    pub(in crate::union) fn mark_impure(&self, upper: &Upper, dir: &Arc<Node>, fd: BorrowedFd<'_>) -> Result<()> {
        let known = &dir.dir()?.impure;
        if upper.xattrs && !known.load(Ordering::Relaxed) {
            let object = Object { dir: fd, name: OsStr::new("") };
            object.set(&self.marks.name("impure"), b"y", XattrFlags::empty())?;
        }
        known.store(true, Ordering::Relaxed);
        Ok(())
    }
}
