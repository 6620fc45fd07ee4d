//! Copy-up: how a file of a lower layer gets into the upper one at its first change.

use super::{
    Union,
    attr::{chmod, chown, utimens},
    bytes::{copy_extents, copy_range},
    data::{Data, Inner, open_lower},
    dirs::{join, kind_of},
    layer,
    links::{INODE, Name},
    marks::{self, Object, names},
    node::{Node, Place, Source, UPPER},
    overrides::{self, Owner},
    work::{Upper, Work},
};
use crate::{
    config::{Completion, CopyUp},
    extent::{self, ExtentFile, Header, LowerIdentity, Unit},
};
use parking_lot::{Condvar, Mutex};
use rustix::{
    fd::{AsFd, BorrowedFd, OwnedFd},
    fs::{AtFlags, FileType, Mode, OFlags, Statx, Timespec, XattrFlags},
    io::{Errno, Result},
};
use std::{
    collections::HashSet,
    ffi::{OsStr, OsString},
    os::unix::ffi::OsStrExt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
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

/// What copying whole files has cost on this machine lately, for `copy_up=auto`.
pub(super) struct Cost {
    nanoseconds_per_mebibyte: AtomicU64,
    nanoseconds_to_sync: AtomicU64,
}

impl Cost {
    /// Until something was measured: a disk of 400 MB/s that syncs in a millisecond.
    pub fn new() -> Cost {
        Cost { nanoseconds_per_mebibyte: AtomicU64::new(2_500_000), nanoseconds_to_sync: AtomicU64::new(1_000_000) }
    }

    /// What copying so many bytes is going to cost.
    fn of(&self, bytes: u64) -> u64 {
        let per = self.nanoseconds_per_mebibyte.load(Ordering::Relaxed);
        ((u128::from(bytes) * u128::from(per)) >> 20) as u64 + self.nanoseconds_to_sync.load(Ordering::Relaxed)
    }

    fn learn(&self, bytes: u64, copied: u64, synced: u64) {
        let mix = |old: &AtomicU64, new: u64| {
            old.store((old.load(Ordering::Relaxed) * 7 + new) / 8, Ordering::Relaxed);
        };
        if bytes >= 64 << 10 {
            mix(&self.nanoseconds_per_mebibyte, ((u128::from(copied) << 20) / u128::from(bytes)) as u64);
        }
        mix(&self.nanoseconds_to_sync, synced);
    }
}

/// A write may cost as much more than an extent file's does as this before the file is made one: it is read in one
/// piece ever after.
const WORTH_A_WHOLE_FILE: u64 = 2_000_000;

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

    pub(super) fn can_extent(&self) -> bool {
        self.wants_extents() && matches!(self.extent_unit(), Ok(Some(_)))
    }

    /// Gets the file into the upper layer, if it is not there yet.
    pub(super) fn copy_up(&self, node: &Arc<Node>, change: Change) -> Result<()> {
        let upper = self.upper()?;
        if node.dir.is_some() {
            return self.dir_up(node);
        }
        if self.is_up(node, change) {
            return Ok(());
        }
        let _turn = self.turns.take(node);
        if self.is_up(node, change) {
            return Ok(());
        }
        if node.place.lock().layer == UPPER {
            return self.fill_metacopy(node);
        }
        let parent = node.place.lock().parent.clone();
        if let Some(parent) = parent {
            self.dir_up(&parent)?;
        }
        self.file_up(upper, node, change)
    }

    /// The same for a file that is going to have another name. One that the kernel's overlay left without data finds that
    /// by its present name, so it has to get it first.
    pub(super) fn up_for_a_name(&self, node: &Arc<Node>) -> Result<()> {
        self.copy_up(node, Change::Metadata)?;
        let header = format!("{}{}", self.marks.prefix, extent::XATTR);
        if node.place.lock().composed && self.with(node, |object, _| object.get(&header))?.is_none() {
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
        self.dress(object, source, stat, owner)
    }

    /// Gives a new file the attributes of another one.
    fn dress(&self, object: Object<'_>, source: Object<'_>, stat: &Statx, owner: Owner) -> Result<()> {
        self.dress_owner(object, owner)?;
        self.copy_xattrs(object, source)?;
        let time = |t: rustix::fs::StatxTimestamp| Timespec { tv_sec: t.tv_sec, tv_nsec: t.tv_nsec.into() };
        utimens(object, time(stat.stx_atime), time(stat.stx_mtime))
    }

    /// Gives a new file its owner and mode, whether they go into the inode or an xattr.
    pub(super) fn dress_owner(&self, object: Object<'_>, owner: Owner) -> Result<()> {
        let overrides = &self.overrides[UPPER as usize];
        let disk = layer::stat(object.dir, object.name)?;
        if overrides.can_hold(disk.stx_mode.into()) {
            chmod(object, kind_of(&disk), overrides.disk_mode(disk.stx_mode.into()))?;
            return self.store(object, owner);
        }
        let foreign = (disk.stx_uid, disk.stx_gid) != (owner.uid, owner.gid);
        if foreign {
            chown(object, Some(owner.uid), Some(owner.gid))?;
        }
        // chown(2) takes set-user-id and set-group-id away.
        let same = u32::from(disk.stx_mode) & 0o7777 == owner.mode & 0o7777;
        let right = same && (!foreign || owner.mode & (libc::S_ISUID | libc::S_ISGID) == 0);
        if right || kind_of(&disk) == libc::S_IFLNK { Ok(()) } else { chmod(object, kind_of(&disk), owner.mode) }
    }

    fn copy_xattrs(&self, object: Object<'_>, source: Object<'_>) -> Result<()> {
        for name in names(&source.list()?) {
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
            let stat = layer::stat(object.dir, object.name)?;
            let owner = self.stored(layer, &stat, object)?;
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let fd = match (kind_of(&stat), object.name.is_empty()) {
                (libc::S_IFREG, false) => open_lower(object.dir, object.name)?,
                (libc::S_IFREG, true) => {
                    let path = marks::proc_path(object.dir, object.name);
                    rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?
                }
                (_, false) => rustix::fs::openat(object.dir, object.name, flags, Mode::empty())?,
                (_, true) => rustix::io::dup(object.dir)?,
            };
            Ok((fd, Box::new(stat), owner, layer))
        })?;
        Ok(Lower { fd, stat, owner, layer, data, path })
    }

    fn file_up(&self, upper: &Upper, node: &Arc<Node>, change: Change) -> Result<()> {
        let lower = self.lower(node)?;
        let temporary = upper.work.name();
        let made = self.make_copy(upper, node, &lower, &temporary, change).and_then(|filled| {
            if filled.is_some() {
                node.place.lock().more().lower_blocks = lower.stat.stx_blocks;
            }
            let own = node.place.lock().own_name();
            match (lower.stat.stx_nlink > 1).then(|| self.names_of(node, own.clone())).transpose()?.as_deref() {
                None | Some([_]) if own.is_some() => self.place_one(upper, node, &temporary, filled, lower),
                None | Some([]) => self.place_nameless(upper, node, &temporary, filled, lower),
                Some(names) => self.place_all(upper, node, &temporary, filled, lower, names),
            }
        });
        match made {
            Err(_) => upper.work.destroy(&temporary)?,
            Ok(()) if self.config.completion != Completion::AtCommit => self.completion.push(node),
            Ok(()) => {}
        }
        made
    }

    /// Makes the copy in the work directory. Returns the header, if it is an extent file.
    fn make_copy(
        &self,
        upper: &Upper,
        node: &Node,
        lower: &Lower,
        temporary: &OsStr,
        change: Change,
    ) -> Result<Option<Header>> {
        let work = &upper.work;
        let kind = kind_of(&lower.stat);
        let mut header = None;
        match kind {
            libc::S_IFREG => {
                // Nobody else gets into the work directory, so it may have its mode at once.
                let file = work.make_file(temporary, lower.owner.mode & 0o777 | 0o600)?;
                header = self.fill(upper, &file, lower, change)?;
            }
            libc::S_IFLNK => {
                let target = rustix::fs::readlinkat(&lower.fd, "", Vec::new())?;
                rustix::fs::symlinkat(target, &work.dir, temporary)?;
            }
            _ => {
                let device = rustix::fs::makedev(lower.stat.stx_rdev_major, lower.stat.stx_rdev_minor);
                rustix::fs::mknodat(&work.dir, temporary, FileType::from_raw_mode(kind), Mode::RUSR, device)?;
            }
        }
        let object = Object { dir: work.dir.as_fd(), name: temporary };
        let source = Object { dir: lower.fd.as_fd(), name: OsStr::new("") };
        self.dress(object, source, &lower.stat, lower.owner)?;
        if upper.xattrs {
            let ino = object.set(&self.marks.name("vfs.ino"), &node.ino.to_le_bytes(), XattrFlags::empty());
            // `user.` xattrs are for files and directories only: other types get a new number at the next mount.
            ino.or_else(|e| if e == Errno::PERM || e == Errno::OPNOTSUPP { Ok(()) } else { Err(e) })?;
        }
        Ok(header)
    }

    /// Gives the new file its data, by the cheapest way that is allowed.
    fn fill(&self, upper: &Upper, file: &OwnedFd, lower: &Lower, change: Change) -> Result<Option<Header>> {
        let size = lower.stat.stx_size;
        let keep = if let Change::Data { keep } = change { keep.min(size) } else { size };
        if keep == 0 {
            return Ok(None);
        }
        if let Some(data) = &lower.data {
            return self.copy_composed(file, data, keep).map(|()| None);
        }
        if self.reflink(file, lower, size, keep)? {
            return Ok(None);
        }
        if self.prefers_extents(change, keep)
            && self.can_extent()
            && let Some(header) = self.prepare_extents(upper, file, lower)?
        {
            return Ok(Some(header));
        }
        let started = Instant::now();
        copy_range(&lower.fd, file, keep)?;
        let copied = started.elapsed();
        if !self.config.volatile {
            // The name must never be on disk without the data (the kernel's overlay syncs here too).
            rustix::fs::fdatasync(file)?;
            self.cost.learn(keep, copied.as_nanos() as u64, (started.elapsed() - copied).as_nanos() as u64);
        }
        Ok(None)
    }

    fn prefers_extents(&self, change: Change, keep: u64) -> bool {
        self.config.copy_up == CopyUp::Extent || change == Change::Metadata || self.cost.of(keep) > WORTH_A_WHOLE_FILE
    }

    fn prepare_extents(&self, upper: &Upper, file: &OwnedFd, lower: &Lower) -> Result<Option<Header>> {
        let (Some(path), Some(_)) = (&lower.path, upper.unit()?) else { return Ok(None) };
        let header = Header {
            layer_from_bottom: self.lowers.len() as u16 - lower.layer,
            path: path.clone(),
            lower: LowerIdentity {
                size: lower.stat.stx_size,
                mtime: (lower.stat.stx_mtime.tv_sec, lower.stat.stx_mtime.tv_nsec),
                ino: lower.stat.stx_ino,
            },
            limit: lower.stat.stx_size,
            upper: extent::UpperIdentity::of(file.as_fd())?,
        };
        upper.note_incomplete()?;
        match extent::prepare(file.as_fd(), self.marks.prefix, &header) {
            Ok(()) => Ok(Some(header)),
            // The path does not fit into an xattr.
            Err(Errno::NOSPC | Errno::TOOBIG | Errno::RANGE | Errno::OPNOTSUPP) => {
                extent::unprepare(file.as_fd(), self.marks.prefix)?;
                rustix::fs::ftruncate(file, 0)?;
                Ok(None)
            }
            Err(e) => Err(e),
        }
    }

    /// `false`: the two files cannot share data.
    fn reflink(&self, file: &OwnedFd, lower: &Lower, size: u64, keep: u64) -> Result<bool> {
        let device = layer::device(&lower.stat);
        let wanted = matches!(self.config.copy_up, CopyUp::Auto | CopyUp::Reflink);
        if !wanted || self.no_reflink.lock().contains(&device) {
            return Ok(false);
        }
        match rustix::fs::ioctl_ficlone(file, &lower.fd) {
            Ok(()) => {}
            Err(Errno::XDEV | Errno::OPNOTSUPP | Errno::NOTTY | Errno::NOSYS) => {
                self.no_reflink.lock().insert(device);
                return Ok(false);
            }
            // A file that is not shared for reasons of its own (a swap file, another allocation unit).
            Err(Errno::INVAL | Errno::TXTBSY | Errno::PERM) => return Ok(false),
            Err(e) => return Err(e),
        }
        if keep < size {
            rustix::fs::ftruncate(file, keep)?;
        }
        // Not synced, as the kernel's overlay does not either: a btrfs log for each would be 100 KiB for a chmod. Filesystems
        // that clone write it to their journal before the name, and btrfs, which can sync a directory by itself, commits all
        // when a name in it came from another directory (tests/durable.rs).
        Ok(true)
    }

    fn copy_composed(&self, file: &OwnedFd, data: &Inner, keep: u64) -> Result<()> {
        match data {
            Inner::Lower(fd) | Inner::Upper(fd) => copy_range(fd, file, keep)?,
            Inner::Extent(extents) => copy_extents(extents, file, keep)?,
        }
        if self.config.volatile { Ok(()) } else { rustix::fs::fdatasync(file) }
    }

    /// An upper file that the kernel's overlay left without data gets it.
    fn fill_metacopy(&self, node: &Arc<Node>) -> Result<()> {
        let mut place = node.place.lock();
        let Inner::Lower(lower) = self.open_data(&place, false)? else { return Ok(()) };
        drop(place);
        self.with(node, |object, _| {
            let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let file = rustix::fs::openat(object.dir, object.name, flags, Mode::empty())?;
            let times = Times::of(file.as_fd())?;
            copy_range(&lower, &file, u64::MAX)?;
            rustix::fs::fdatasync(&file)?;
            times.restore(file.as_fd())?;
            for mark in ["metacopy", "redirect"] {
                match object.remove(&self.marks.name(mark)) {
                    Ok(()) | Err(Errno::NODATA) => {}
                    Err(e) => return Err(e),
                }
            }
            Ok(())
        })?;
        place = node.place.lock();
        place.composed = false;
        if let Some(data) = place.more.as_ref().and_then(|m| m.data.upgrade()) {
            data.replace(self.open_data(&place, true)?);
        }
        Ok(())
    }

    /// The copy of a file that has lost its last name stays nameless.
    fn place_nameless(
        &self,
        upper: &Upper,
        node: &Arc<Node>,
        temporary: &OsStr,
        header: Option<Header>,
        lower: Lower,
    ) -> Result<()> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&upper.work.dir, temporary, flags, Mode::empty())?;
        let mut place = node.place.lock();
        let inner = self.opened(&place, upper.work.dir.as_fd(), temporary, header.as_ref(), lower)?;
        rustix::fs::unlinkat(&upper.work.dir, temporary, AtFlags::empty())?;
        place.more().nameless = Some(Arc::new(fd));
        self.arrived(&mut place, header.is_some(), inner);
        Ok(())
    }

    fn place_one(
        &self,
        upper: &Upper,
        node: &Arc<Node>,
        temporary: &OsStr,
        header: Option<Header>,
        lower: Lower,
    ) -> Result<()> {
        let parent = node.place.lock().parent.clone();
        let Some(parent) = parent else { return self.place_nameless(upper, node, temporary, header, lower) };
        let mut names = parent.dir()?.names.write();
        let fds = self.fds(&parent)?;
        let mut place = node.place.lock();
        if !place.parent.as_ref().is_some_and(|p| Arc::ptr_eq(p, &parent)) {
            drop((place, names));
            return self.place_nameless(upper, node, temporary, header, lower);
        }
        let dir = fds.upper()?;
        self.mark_impure(upper, &parent, dir)?;
        let kept = Times::of(dir)?;
        upper.work.place(temporary, dir, &place.name)?;
        kept.restore(dir)?;
        if let Some(entry) = names.listing.as_mut().and_then(|l| l.get_mut(&self.hasher, &place.name)) {
            entry.layer = UPPER;
        }
        let name = place.name.clone();
        let inner = self.opened(&place, dir, &name, header.as_ref(), lower)?;
        self.arrived(&mut place, header.is_some(), inner);
        Ok(())
    }

    fn place_all(
        &self,
        upper: &Upper,
        node: &Arc<Node>,
        temporary: &OsStr,
        header: Option<Header>,
        lower: Lower,
        all: &[Name],
    ) -> Result<()> {
        for (parent, _) in all {
            self.dir_up(parent)?;
        }
        let group: OsString = self.note_group(&upper.work, temporary, all)?;
        let placed = self.place_group(upper, node, &group, header, lower, all);
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
        header: Option<Header>,
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
        let inner = self.opened(&place, from.as_fd(), OsStr::new(INODE), header.as_ref(), lower)?;
        // The name it is reached by may be one of those that failed.
        if place.parent.is_none() || failed.is_some() {
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            place.more().nameless = Some(Arc::new(rustix::fs::openat(&from, INODE, flags, Mode::empty())?));
        }
        self.arrived(&mut place, header.is_some(), inner);
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
    pub(super) fn mark_impure(&self, upper: &Upper, dir: &Arc<Node>, fd: BorrowedFd<'_>) -> Result<()> {
        let known = &dir.dir()?.impure;
        if upper.xattrs && !known.load(Ordering::Relaxed) {
            let object = Object { dir: fd, name: OsStr::new("") };
            object.set(&self.marks.name("impure"), b"y", XattrFlags::empty())?;
        }
        known.store(true, Ordering::Relaxed);
        Ok(())
    }
}

/// A directory's times, which putting a copy into it must not change.
pub(super) struct Times(Timespec, Timespec);

impl Times {
    pub fn of(dir: BorrowedFd<'_>) -> Result<Times> {
        let stat = layer::stat(dir, OsStr::new(""))?;
        let time = |t: rustix::fs::StatxTimestamp| Timespec { tv_sec: t.tv_sec, tv_nsec: t.tv_nsec.into() };
        Ok(Times(time(stat.stx_atime), time(stat.stx_mtime)))
    }

    pub fn restore(&self, dir: BorrowedFd<'_>) -> Result<()> {
        utimens(Object { dir, name: OsStr::new("") }, self.0, self.1)
    }
}
