//! Copy-up: how a file of a lower layer gets into the upper one at its first change.

mod fill;
mod place;

pub(super) use fill::Cost;

use super::{
    SetAttr, Union,
    attr::{ACL_ACCESS, CAPABILITY, chmod, chown, utimens},
    data::{Data, Inner, open_lower},
    dirs::{join, kind_of},
    layer,
    marks::{self, Object, names},
    node::{Node, Source, UPPER},
    overrides::{self, Owner},
    work::{Upper, Work},
};
use crate::{
    config::{Completion, CopyUp},
    extent::{Header, Unit},
};
use parking_lot::{Condvar, Mutex};
use rustix::{
    fd::{AsFd, BorrowedFd, OwnedFd},
    fs::{FileType, Mode, OFlags, Statx, StatxTimestamp, Timespec, XattrFlags},
    io::{Errno, Result},
};
use std::{
    collections::HashSet,
    ffi::{OsStr, OsString},
    os::unix::ffi::OsStrExt,
    sync::{Arc, atomic::Ordering},
};

/// What the copy is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    /// Attributes, a further name: no data is needed.
    Metadata,
    /// Data, of which the first `keep` bytes stay.
    Data { keep: u64 },
}

/// Lets one thread at a time copy a file up.
#[derive(Default)]
pub(super) struct Turns {
    taken: Mutex<HashSet<usize>>,
    given: Condvar,
}

pub(super) struct Turn<'a>(&'a Turns, usize);

impl Turns {
    pub fn take(&self, node: &Arc<Node>) -> Turn<'_> {
        let key = Arc::as_ptr(node) as usize;
        let mut taken = self.taken.lock();
        while !taken.insert(key) {
            self.given.wait(&mut taken);
        }
        Turn(self, key)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.taken.lock().remove(&self.1);
        self.0.given.notify_all();
    }
}

/// A copy in the making.
struct Copy {
    /// In the work directory; if it is nameless, one that it may have there.
    name: OsString,
    nameless: bool,
    /// Of regular files.
    file: Option<OwnedFd>,
    /// If it is an extent file.
    header: Option<Header>,
    owner: Owner,
    /// Whether the owner is what it is going to be changed to, not that of the lower file.
    changed: bool,
}

/// The lower file.
struct Lower {
    fd: OwnedFd,
    stat: Box<Statx>,
    owner: Owner,
    layer: u16,
    data: Option<Inner>,
    /// From its layer's root, if it has a name.
    path: Option<Vec<u8>>,
}

impl Union {
    pub(super) fn upper(&self) -> Result<&Upper> {
        self.upper.as_ref().ok_or(Errno::ROFS)
    }

    /// The unit of extent files; where none can be made, that of those made elsewhere.
    pub(super) fn unit(&self) -> Result<Unit> {
        Ok(self.extent_unit()?.unwrap_or(Unit(4096)))
    }

    /// `None`: no extent files can be made.
    fn extent_unit(&self) -> Result<Option<Unit>> {
        self.upper.as_ref().map_or(Ok(None), Upper::unit)
    }

    pub(super) fn wants_extents(&self) -> bool {
        matches!(self.config.copy_up, CopyUp::Auto | CopyUp::Extent)
    }

    /// Whether that is known, without waiting, to be so.
    pub(super) fn knows_to_extent(&self) -> bool {
        self.wants_extents() && self.upper.as_ref().is_some_and(Upper::knows_unit)
    }

    pub(super) fn can_extent(&self) -> bool {
        self.wants_extents() && matches!(self.extent_unit(), Ok(Some(_)))
    }

    /// Gets the file into the upper layer, if it is not there yet.
    pub(super) fn copy_up(&self, node: &Arc<Node>, change: Change) -> Result<()> {
        self.up(node, change, None).map(drop)
    }

    /// The same for a change of attributes, which is made before the copy gets its name if that can be: what the file is
    /// then. `None`: it is there and still to be changed.
    pub(super) fn copy_up_changed(&self, node: &Arc<Node>, set: &SetAttr) -> Result<Option<(Statx, Owner)>> {
        let owner_alone = SetAttr { mode: set.mode, uid: set.uid, gid: set.gid, ..SetAttr::default() } == *set;
        self.up(node, Change::Metadata, owner_alone.then_some(set))
    }

    fn up(&self, node: &Arc<Node>, change: Change, set: Option<&SetAttr>) -> Result<Option<(Statx, Owner)>> {
        let upper = self.upper()?;
        if node.dir.is_some() {
            return self.dir_up(node).map(|()| None);
        }
        if self.is_up(node, change) {
            return Ok(None);
        }
        let _turn = self.turns.take(node);
        if self.is_up(node, change) {
            return Ok(None);
        }
        if node.place.lock().layer == UPPER {
            return self.fill_metacopy(node).map(|()| None);
        }
        let parent = node.place.lock().parent.clone();
        if let Some(parent) = parent {
            self.dir_up(&parent)?;
        }
        self.file_up(upper, node, change, set)
    }

    /// The same for a file that is going to have another name. One that the kernel's overlay left without data finds that
    /// by its present name, so it has to get it first.
    pub(super) fn up_for_a_name(&self, node: &Arc<Node>) -> Result<()> {
        self.copy_up(node, Change::Metadata)?;
        if node.place.lock().composed && self.with(node, |object, _| self.header(object))?.is_none() {
            self.copy_up(node, Change::Data { keep: u64::MAX })?;
        }
        Ok(())
    }

    /// Whether there is nothing left to do. A file that the kernel's overlay made by metacopy has to get its data.
    fn is_up(&self, node: &Arc<Node>, change: Change) -> bool {
        let mut place = node.place.lock();
        if place.layer != UPPER {
            return false;
        }
        if !place.composed || change == Change::Metadata {
            return true;
        }
        if place.more.as_ref().and_then(|m| m.data.upgrade()).is_some_and(|d| d.is_upper()) {
            return true;
        }
        match self.open_data(&place, false) {
            Ok(Inner::Lower(_)) => false,
            Ok(Inner::Extent(file)) => {
                let data = Arc::new(Data::new(Inner::Extent(file), self.config.volatile));
                place.more().data = Arc::downgrade(&data);
                true
            }
            _ => true,
        }
    }

    /// Gets a directory into the upper layer, its parents first.
    pub(super) fn dir_up(&self, node: &Arc<Node>) -> Result<()> {
        self.upper()?;
        let mut below = vec![node.clone()];
        while let Some(at) = below.last() {
            if at.dir()?.in_upper() {
                below.pop();
                continue;
            }
            let parent = at.place.lock().parent.clone().ok_or(Errno::NOENT)?;
            if parent.dir()?.in_upper() {
                self.one_dir_up(at, &parent)?;
            } else {
                below.push(parent);
            }
        }
        Ok(())
    }

    /// Gets a directory into the upper layer whose parent is there.
    fn one_dir_up(&self, node: &Arc<Node>, parent: &Arc<Node>) -> Result<()> {
        let upper = self.upper()?;
        let dir = node.dir()?;
        let mut names = parent.dir()?.names.write();
        if dir.in_upper() {
            return Ok(());
        }
        let fds = self.fds(node)?;
        let above = self.fds(parent)?;
        // Both change at once: with new sources and old descriptors the upper layer would seem read-only.
        let mut open = dir.open.lock();
        let place = node.place.lock();
        if !place.is(parent, &place.name) || node.dead.load(Ordering::Relaxed) {
            return Err(Errno::NOENT);
        }
        let source = Object { dir: fds.top().fd.as_fd(), name: OsStr::new("") };
        let stat = layer::stat(source.dir, source.name)?;
        let owner = self.stored(fds.top().layer, &stat, source)?;
        let temporary = upper.work.name();
        let made = self.make_dir_like(&upper.work, &temporary, source, &stat, owner).and_then(|()| {
            let kept = Times::of(above.upper()?)?;
            upper.work.place(&temporary, above.upper()?, &place.name)?;
            kept.restore(above.upper()?)
        });
        if let Err(e) = made {
            upper.work.destroy(&temporary)?;
            return Err(e);
        }
        let mut sources = vec![Source { layer: UPPER, path: None, xattr_whiteouts: false }];
        sources.extend(dir.sources().iter().cloned());
        *dir.sources.write() = sources.into();
        let name = place.name.clone();
        drop(place);
        *open = None;
        drop(open);
        if let Some(entry) = names.listing.as_mut().and_then(|l| l.get_mut(&self.hasher, &name)) {
            entry.layer = UPPER;
            entry.merged = true;
        }
        Ok(())
    }

    fn make_dir_like(
        &self,
        work: &Work,
        temporary: &OsStr,
        source: Object<'_>,
        stat: &Statx,
        owner: Owner,
    ) -> Result<()> {
        rustix::fs::mkdirat(&work.dir, temporary, Mode::from_raw_mode(0o700))?;
        let object = Object { dir: work.dir.as_fd(), name: temporary };
        self.dress_owner(object, &layer::stat(object.dir, object.name)?, owner)?;
        self.copy_xattrs(object, source, &source.list()?)?;
        utimens(object, time(stat.stx_atime), time(stat.stx_mtime))
    }

    /// Gives a new file, which is `disk` now, its owner and mode, whether they go into the inode or an xattr.
    pub(super) fn dress_owner(&self, object: Object<'_>, disk: &Statx, owner: Owner) -> Result<()> {
        let overrides = &self.overrides[UPPER as usize];
        if overrides.can_hold(disk.stx_mode.into()) {
            chmod(object, kind_of(disk), overrides.disk_mode(disk.stx_mode.into()))?;
            return self.store(object, owner);
        }
        let foreign = (disk.stx_uid, disk.stx_gid) != (owner.uid, owner.gid);
        if foreign {
            chown(object, Some(owner.uid), Some(owner.gid))?;
        }
        // chown(2) takes set-user-id and set-group-id away.
        let same = u32::from(disk.stx_mode) & 0o7777 == owner.mode & 0o7777;
        let right = same && (!foreign || owner.mode & (libc::S_ISUID | libc::S_ISGID) == 0);
        if right || kind_of(disk) == libc::S_IFLNK { Ok(()) } else { chmod(object, kind_of(disk), owner.mode) }
    }

    /// Copies those of a list, but for the format's own.
    fn copy_xattrs(&self, object: Object<'_>, source: Object<'_>, list: &[u8]) -> Result<()> {
        for name in names(list) {
            let attr = OsStr::from_bytes(name);
            if marks::to_user(name).is_none() || overrides::is_reserved(attr) {
                continue;
            }
            let value = match source.read(attr) {
                Err(Errno::NODATA) => continue,
                other => other?,
            };
            match object.set(attr, &value, XattrFlags::empty()) {
                // Without it the copy would let in whom the original keeps out.
                Err(Errno::OPNOTSUPP) if name.starts_with(b"system.posix_acl_") => return Err(Errno::OPNOTSUPP),
                Err(Errno::OPNOTSUPP | Errno::PERM) => {}
                other => other?,
            }
        }
        Ok(())
    }

    /// Opens the lower file that a node is.
    fn lower(&self, node: &Arc<Node>) -> Result<Lower> {
        let path = match node.place.lock() {
            place if place.more.as_ref().is_some_and(|m| m.nameless.is_some()) => None,
            place => {
                let parent = place.parent.clone().ok_or(Errno::NOENT)?;
                Some((parent, place.layer, place.name.clone()))
            }
        };
        let path = path.map(|(parent, layer, name)| Ok(join(&self.layer_path(&parent, layer)?, name.as_bytes())));
        let path = path.transpose()?;
        let composed = node.place.lock().composed;
        let data = match composed {
            true => Some(self.open_data(&node.place.lock(), false)?),
            false => None,
        };
        let (fd, stat, owner, layer) = self.with(node, |object, layer| {
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let fd = match (node.kind, object.name.is_empty()) {
                (libc::S_IFREG, false) => open_lower(object.dir, object.name)?,
                (libc::S_IFREG, true) => {
                    let path = marks::proc_path(object.dir, object.name);
                    rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?
                }
                (_, false) => rustix::fs::openat(object.dir, object.name, flags, Mode::empty())?,
                (_, true) => rustix::io::dup(object.dir)?,
            };
            let object = Object { dir: fd.as_fd(), name: OsStr::new("") };
            let stat = layer::stat(object.dir, object.name)?;
            if kind_of(&stat) != node.kind {
                return Err(Errno::STALE);
            }
            let owner = self.stored(layer, &stat, object)?;
            Ok((fd, Box::new(stat), owner, layer))
        })?;
        Ok(Lower { fd, stat, owner, layer, data, path })
    }

    fn file_up(
        &self,
        upper: &Upper,
        node: &Arc<Node>,
        change: Change,
        set: Option<&SetAttr>,
    ) -> Result<Option<(Statx, Owner)>> {
        let lower = self.lower(node)?;
        let name = upper.work.name();
        let made = self.make_copy(upper, node, &lower, &name, change, set).and_then(|copy| {
            if copy.header.is_some() {
                node.place.lock().more().lower_blocks = lower.stat.stx_blocks;
            }
            let own = node.place.lock().own_name();
            match (lower.stat.stx_nlink > 1).then(|| self.names_of(node, own.clone())).transpose()?.as_deref() {
                None | Some([_]) if own.is_some() => self.place_one(upper, node, &copy, lower)?,
                None | Some([]) => self.place_nameless(upper, node, &copy, lower)?,
                Some(names) => self.place_all(upper, node, &copy, lower, names)?,
            }
            match copy.file.filter(|_| copy.changed) {
                Some(file) => layer::stat(file.as_fd(), OsStr::new("")).map(|stat| Some((stat, copy.owner))),
                None => Ok(None),
            }
        });
        match made {
            Err(_) => upper.work.destroy(&name)?,
            Ok(_) if self.config.completion != Completion::AtCommit => self.completion.push(node),
            Ok(_) => {}
        }
        made
    }

    /// Makes the copy in the work directory, with its attributes changed if that is possible at once.
    fn make_copy(
        &self,
        upper: &Upper,
        node: &Node,
        lower: &Lower,
        name: &OsStr,
        change: Change,
        set: Option<&SetAttr>,
    ) -> Result<Copy> {
        let source = Object { dir: lower.fd.as_fd(), name: OsStr::new("") };
        let list = source.list()?;
        // A change of the mode is one of the ACL too, and one of the owner takes capabilities away.
        let entangled = |name: &[u8]| name == ACL_ACCESS.as_bytes() || name == CAPABILITY.as_bytes();
        let set = set.filter(|_| node.is_regular() && !names(&list).any(entangled));
        let owner = set.map_or(Ok(lower.owner), |set| self.changed(lower.owner, set))?;
        let changed = set.is_some();
        let mut copy = Copy { name: name.into(), nameless: false, file: None, header: None, owner, changed };
        if node.is_regular() {
            // Nobody else gets to it, so it may have its mode at once.
            let mode = owner.mode & 0o777 | 0o600;
            copy.file = upper.work.make_nameless(mode)?;
            copy.nameless = copy.file.is_some();
            if !copy.nameless {
                copy.file = Some(upper.work.make_file(name, mode)?);
            }
        } else {
            self.make_special(upper, lower, name)?;
        }
        let object = match &copy.file {
            Some(file) => Object { dir: file.as_fd(), name: OsStr::new("") },
            None => Object { dir: upper.work.dir.as_fd(), name },
        };
        let disk = layer::stat_with_birth(object.dir, object.name)?;
        if let Some(file) = &copy.file {
            copy.header = self.fill(upper, (file, &disk), (lower, node.ino), change)?;
        }
        if upper.xattrs && copy.header.is_none() {
            let ino = object.set(&self.marks.name("vfs.ino"), &node.ino.to_le_bytes(), XattrFlags::empty());
            // `user.` xattrs are for files and directories only: other types get a new number at the next mount.
            ino.or_else(|e| if e == Errno::PERM || e == Errno::OPNOTSUPP { Ok(()) } else { Err(e) })?;
        }
        self.dress_owner(object, &disk, owner)?;
        self.copy_xattrs(object, source, &list)?;
        utimens(object, time(lower.stat.stx_atime), time(lower.stat.stx_mtime))?;
        Ok(copy)
    }

    /// Makes what is no regular file.
    fn make_special(&self, upper: &Upper, lower: &Lower, name: &OsStr) -> Result<()> {
        let dir = &upper.work.dir;
        if kind_of(&lower.stat) == libc::S_IFLNK {
            let target = rustix::fs::readlinkat(&lower.fd, "", Vec::new())?;
            return rustix::fs::symlinkat(target, dir, name);
        }
        let device = rustix::fs::makedev(lower.stat.stx_rdev_major, lower.stat.stx_rdev_minor);
        rustix::fs::mknodat(dir, name, FileType::from_raw_mode(kind_of(&lower.stat)), Mode::RUSR, device)
    }
}

fn time(t: StatxTimestamp) -> Timespec {
    Timespec { tv_sec: t.tv_sec, tv_nsec: t.tv_nsec.into() }
}

/// A directory's times, which putting a copy into it must not change.
pub(super) struct Times(Timespec, Timespec);

impl Times {
    pub fn of(dir: BorrowedFd<'_>) -> Result<Times> {
        let stat = layer::stat(dir, OsStr::new(""))?;
        Ok(Times(time(stat.stx_atime), time(stat.stx_mtime)))
    }

    pub fn restore(&self, dir: BorrowedFd<'_>) -> Result<()> {
        utimens(Object { dir, name: OsStr::new("") }, self.0, self.1)
    }
}
