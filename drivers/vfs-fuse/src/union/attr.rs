//! Attributes and xattrs.

use super::{
    Attr, Caller, SetAttr, Union,
    copy_up::Change,
    marks::{self, Object, names, proc_path},
    node::{Node, Place, ROOT_ID, UPPER},
    overrides::{self, Owner},
};
use rustix::{
    fs::{AtFlags, CWD, Gid, Mode, Statx, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, Uid, XattrFlags},
    io::{Errno, Result},
};
use std::{
    ffi::OsStr,
    os::unix::ffi::OsStrExt,
    sync::{Arc, atomic::Ordering},
};

pub(super) const ACL_ACCESS: &str = "system.posix_acl_access";
const ACL_DEFAULT: &str = "system.posix_acl_default";
pub(super) const CAPABILITY: &str = "security.capability";
const SELINUX: &str = "security.selinux";

impl Union {
    /// Calls with the object that the node is on disk, and its layer. Its name cannot change meanwhile.
    pub(super) fn with<T>(&self, node: &Arc<Node>, call: impl FnOnce(Object<'_>, u16) -> Result<T>) -> Result<T> {
        use rustix::fd::AsFd;
        if node.dir.is_some() {
            let fds = self.fds(node)?;
            let top = fds.top();
            return call(Object { dir: top.fd.as_fd(), name: OsStr::new("") }, top.layer);
        }
        let place = node.place.lock();
        if let Some(fd) = place.more.as_ref().and_then(|m| m.nameless.clone()) {
            return call(Object { dir: (*fd).as_fd(), name: OsStr::new("") }, place.layer);
        }
        let parent = place.parent.as_ref().ok_or(Errno::NOENT)?;
        let fds = self.fds(parent)?;
        let dir = fds.layer(place.layer).ok_or(Errno::STALE)?;
        call(Object { dir, name: &place.name }, place.layer)
    }

    /// The same, to change the attributes of a file in the upper layer: a step of its completion, which puts back what
    /// writing takes away, is waited for.
    fn with_to_change<T>(&self, node: &Arc<Node>, call: impl FnOnce(Object<'_>, u16) -> Result<T>) -> Result<T> {
        match self.open_extents(node) {
            Some(open) => open.between_steps(|| self.with(node, call)),
            None => self.with(node, call),
        }
    }

    /// The inode number a node is shown with.
    pub(super) fn shown_ino(&self, node: &Node) -> u64 {
        if node.ino == ROOT_ID && node.dir.is_some() { self.root_ino } else { node.ino }
    }

    /// Owner and mode as they are stored, from the inode or the xattr in its place.
    pub(super) fn stored(&self, layer: u16, stat: &Statx, object: Object<'_>) -> Result<Owner> {
        let overrides = &self.overrides[layer as usize];
        let disk = Owner {
            mode: stat.stx_mode.into(),
            uid: stat.stx_uid,
            gid: stat.stx_gid,
            rdev: rustix::fs::makedev(stat.stx_rdev_major, stat.stx_rdev_minor),
        };
        match overrides.name() {
            Some(name) if overrides.can_hold(disk.mode) => overrides.stored(disk, object.get(name)?.as_deref()),
            _ => Ok(disk),
        }
    }

    /// What stat shows.
    pub(super) fn attr(&self, node: &Node, layer: u16, stat: &Statx, merged: bool, object: Object<'_>) -> Result<Attr> {
        let owner = self.overrides[layer as usize].shown(self.stored(layer, stat, object)?);
        Ok(self.attr_of(node, layer, stat, owner, merged))
    }

    /// The links of a file, as far as they show: of a lower file's names some may be hidden by now.
    pub(super) fn links_of(&self, node: &Node, layer: u16, stat: &Statx) -> u32 {
        if layer == UPPER || node.dir.is_some() {
            return stat.stx_nlink;
        }
        if node.dead.load(Ordering::Relaxed) {
            return 0;
        }
        stat.stx_nlink.saturating_sub(self.gone.lock().get(&node.ino).copied().unwrap_or(0))
    }

    fn attr_of(&self, node: &Node, layer: u16, stat: &Statx, owner: Owner, merged: bool) -> Attr {
        let blocks = if node.dir.is_some() { stat.stx_blocks } else { blocks(&mut node.place.lock(), stat) };
        let time = |t: rustix::fs::StatxTimestamp| (t.tv_sec, t.tv_nsec);
        // A directory over several layers has no count of its own: 1 tells find(1) not to rely on it.
        let uncounted = node.dir.is_some() && (merged || self.config.static_nlink);
        Attr {
            ino: self.shown_ino(node),
            size: stat.stx_size,
            blocks,
            atime: time(stat.stx_atime),
            mtime: self.mtime_kept(node, layer).unwrap_or(time(stat.stx_mtime)),
            ctime: time(stat.stx_ctime),
            mode: owner.mode,
            nlink: if uncounted { 1 } else { self.links_of(node, layer, stat) },
            uid: owner.uid,
            gid: owner.gid,
            rdev: owner.rdev,
            blksize: stat.stx_blksize,
        }
    }

    /// That of a file in two parts, which its completion changes for moments at a time.
    fn mtime_kept(&self, node: &Node, layer: u16) -> Option<(i64, u32)> {
        let open = if layer == UPPER && node.is_regular() { self.open_extents(node)? } else { return None };
        open.stat().ok().map(|stat| (stat.st_mtime, stat.st_mtime_nsec as u32))
    }

    /// Attributes.
    pub fn getattr(&self, id: u64) -> Result<Attr> {
        self.attr_of_node(&self.table.get(id)?)
    }

    pub(super) fn attr_of_node(&self, node: &Arc<Node>) -> Result<Attr> {
        let merged = node.dir.as_ref().is_some_and(|d| d.sources().len() > 1);
        let (layer, stat, owner) = self.with(node, |object, layer| {
            let stat = super::layer::stat(object.dir, object.name)?;
            Ok((layer, stat, self.overrides[layer as usize].shown(self.stored(layer, &stat, object)?)))
        })?;
        Ok(self.attr_of(node, layer, &stat, owner, merged))
    }

    /// Changes attributes; copies up first, by metadata alone where it can. Nothing set at all means: take away what a
    /// write takes away (set-user-id, set-group-id, file capabilities).
    pub fn setattr(&self, id: u64, set: &SetAttr, caller: Caller) -> Result<Attr> {
        let node = self.table.get(id)?;
        if let Some(size) = set.size {
            if !node.is_regular() {
                return Err(if node.dir.is_some() { Errno::ISDIR } else { Errno::INVAL });
            }
            self.data_of(&node, true, size)?.set_len(size)?;
        }
        let owned = set.mode.is_some() || set.uid.is_some() || set.gid.is_some();
        let timed = set.atime.is_some() || set.mtime.is_some();
        if timed && self.is_late(&node, set)? {
            return self.attr_of_node(&node);
        }
        if owned || timed {
            if let Some((stat, owner)) = self.copy_up_changed(&node, set)? {
                return Ok(self.attr_of(&node, UPPER, &stat, self.overrides[UPPER as usize].shown(owner), false));
            }
            let open = self.open_extents(&node);
            self.with_to_change(&node, |object, _| {
                if owned {
                    self.set_owner(object, node.kind, set)?;
                }
                if timed && open.is_none() { set_times(object, set) } else { Ok(()) }
            })?;
            if let (true, Some(open)) = (timed, open) {
                open.set_times(&times_of(set))?;
            }
        }
        if owned {
            forget_heritage(&node);
        }
        let as_write = !owned && !timed && (set.size.is_none() || caller.uid != 0);
        if as_write {
            self.drop_privileges(&node, caller)?;
        }
        self.attr_of_node(&node)
    }

    /// Whether these are only the times that a lower file has already: a kernel that gathers writes sends them after one
    /// of several names is gone. They are worth no copy.
    fn is_late(&self, node: &Arc<Node>, set: &SetAttr) -> Result<bool> {
        let lower = node.dir.is_none() && node.place.lock().layer != UPPER;
        let Some(Some(mtime)) = set.mtime.filter(|_| lower) else { return Ok(false) };
        let alone = *set == SetAttr { mtime: set.mtime, ..SetAttr::default() };
        Ok(alone && self.attr_of_node(node)?.mtime == mtime)
    }

    fn set_owner(&self, object: Object<'_>, kind: u32, set: &SetAttr) -> Result<()> {
        let overrides = &self.overrides[UPPER as usize];
        if !overrides.can_hold(kind) {
            let uid = set.uid.map(|u| overrides.to_disk_uid(u)).transpose()?;
            let gid = set.gid.map(|g| overrides.to_disk_gid(g)).transpose()?;
            if uid.is_some() || gid.is_some() {
                chown(object, uid, gid)?;
            }
            return set.mode.map_or(Ok(()), |mode| chmod(object, kind, mode));
        }
        let stat = super::layer::stat(object.dir, object.name)?;
        self.store(object, self.changed(self.stored(UPPER, &stat, object)?, set)?)
    }

    /// What chown(2) and chmod(2) make of a stored owner.
    pub(super) fn changed(&self, mut owner: Owner, set: &SetAttr) -> Result<Owner> {
        let overrides = &self.overrides[UPPER as usize];
        let chowned = set.uid.is_some() || set.gid.is_some();
        if chowned && owner.mode & libc::S_IFMT != libc::S_IFDIR {
            owner.mode &= !without_privileges(owner.mode);
        }
        owner.uid = set.uid.map_or(Ok(owner.uid), |u| overrides.to_disk_uid(u))?;
        owner.gid = set.gid.map_or(Ok(owner.gid), |g| overrides.to_disk_gid(g))?;
        owner.mode = set.mode.map_or(owner.mode, |m| owner.mode & libc::S_IFMT | m & 0o7777);
        Ok(owner)
    }

    /// Writes the owner's xattr.
    pub(super) fn store(&self, object: Object<'_>, owner: Owner) -> Result<()> {
        let overrides = &self.overrides[UPPER as usize];
        match (overrides.name(), overrides.store(owner)) {
            (Some(name), Some(value)) => object.set(OsStr::new(name), &value, XattrFlags::empty()),
            _ => Ok(()),
        }
    }

    /// What a write by an ordinary user takes away from a file, and chown(2) from one of any type.
    fn drop_privileges(&self, node: &Arc<Node>, caller: Caller) -> Result<()> {
        if node.dir.is_some() {
            return Ok(());
        }
        let (mode, group, capable) = self.with(node, |object, layer| {
            let stat = super::layer::stat(object.dir, object.name)?;
            let owner = self.stored(layer, &stat, object)?;
            let capable = node.is_regular() && object.get(CAPABILITY)?.is_some();
            Ok((owner.mode, self.overrides[layer as usize].shown(owner).gid, capable))
        })?;
        // Without group execution the bit stays for root and who is in the group; of his further groups nothing is known.
        let may_keep = caller.uid == 0 || caller.gid == group;
        let foreign = if may_keep { 0 } else { mode & libc::S_ISGID };
        let lost = without_privileges(mode) | foreign;
        if lost == 0 && !capable {
            return Ok(());
        }
        self.copy_up(node, Change::Metadata)?;
        self.with_to_change(node, |object, _| {
            if capable {
                object.remove(OsStr::new(CAPABILITY)).or_else(|e| if e == Errno::NODATA { Ok(()) } else { Err(e) })?;
            }
            let set = SetAttr { mode: Some(mode & 0o7777 & !lost), ..SetAttr::default() };
            if lost == 0 { Ok(()) } else { self.set_owner(object, node.kind, &set) }
        })
    }

    fn check_name(&self, name: &OsStr) -> Result<()> {
        let acl = self.config.no_acl && (name == ACL_ACCESS || name == ACL_DEFAULT);
        if self.config.no_xattrs || acl { Err(Errno::OPNOTSUPP) } else { Ok(()) }
    }

    /// The value of an xattr; `ENODATA`.
    pub fn getxattr(&self, id: u64, name: &OsStr) -> Result<Vec<u8>> {
        self.check_name(name)?;
        let node = self.table.get(id)?;
        let disk = marks::to_disk(name).filter(|_| !overrides::is_reserved(name)).ok_or(Errno::NODATA)?;
        match self.with(&node, |object, _| object.read(&disk)) {
            // A filesystem without ACLs. Told so, the kernel would refuse what it asked for one for.
            Err(Errno::OPNOTSUPP) if name == ACL_ACCESS || name == ACL_DEFAULT => Err(Errno::NODATA),
            // ls(1) would ask each file, but does not go on after this answer. It holds without SELinux only.
            Err(Errno::NODATA) if name == SELINUX && !self.selinux => Err(Errno::OPNOTSUPP),
            other => other,
        }
    }

    /// Names, each ended by NUL; those of `trusted.` for the privileged only (xattr(7)).
    pub fn listxattr(&self, id: u64, privileged: bool) -> Result<Vec<u8>> {
        if self.config.no_xattrs {
            return Ok(Vec::new());
        }
        let node = self.table.get(id)?;
        let list = self.with(&node, |object, _| object.list())?;
        let mut shown = Vec::with_capacity(list.len());
        for name in names(&list) {
            let hidden = overrides::is_reserved(OsStr::from_bytes(name))
                || !privileged && name.starts_with(b"trusted.")
                || self.config.no_acl && name.starts_with(b"system.posix_acl_");
            if let (false, Some(name)) = (hidden, marks::to_user(name)) {
                shown.extend_from_slice(&name);
                shown.push(0);
            }
        }
        Ok(shown)
    }

    /// `flags` as setxattr(2).
    pub fn setxattr(&self, id: u64, name: &OsStr, value: &[u8], flags: u32) -> Result<()> {
        self.change_xattr(id, name, |object, disk| object.set(disk, value, XattrFlags::from_bits_truncate(flags as _)))
    }

    /// Removes an xattr.
    pub fn removexattr(&self, id: u64, name: &OsStr) -> Result<()> {
        self.change_xattr(id, name, |object, disk| object.remove(disk))
    }

    fn change_xattr(&self, id: u64, name: &OsStr, change: impl Fn(Object<'_>, &OsStr) -> Result<()>) -> Result<()> {
        self.check_name(name)?;
        let disk = marks::to_disk(name).filter(|_| !overrides::is_reserved(name)).ok_or(Errno::PERM)?;
        let node = self.table.get(id)?;
        self.copy_up(&node, Change::Metadata)?;
        let changed = match self.with_to_change(&node, |object, _| change(object, &disk)) {
            // On ext4 all xattrs of a file share one block, and an extent file's own take some of it.
            Err(Errno::NOSPC) if self.make_plain(&node)? => self.with(&node, |object, _| change(object, &disk)),
            other => other,
        };
        if name == ACL_DEFAULT || name == ACL_ACCESS {
            forget_heritage(&node);
        }
        changed
    }

    /// Whether new files in the directory get an ACL from it, so that the umask does not count. The caller has its names
    /// locked.
    pub(super) fn has_default_acl(&self, upper: Object<'_>) -> Result<bool> {
        Ok(!self.config.no_acl && upper.get(ACL_DEFAULT)?.is_some())
    }
}

/// The mode bits that a write or a chown takes away.
fn without_privileges(mode: u32) -> u32 {
    let group = if mode & libc::S_IXGRP != 0 { libc::S_ISGID } else { 0 };
    mode & (libc::S_ISUID | group)
}

pub(super) fn chown(object: Object<'_>, uid: Option<u32>, gid: Option<u32>) -> Result<()> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::EMPTY_PATH;
    rustix::fs::chownat(object.dir, object.name, uid.map(Uid::from_raw), gid.map(Gid::from_raw), flags)
}

/// There is no chmod that does not follow symlinks before Linux 6.6; what is no symlink is safe, as nobody but us changes
/// names there.
pub(super) fn chmod(object: Object<'_>, kind: u32, mode: u32) -> Result<()> {
    if kind == libc::S_IFLNK {
        return Err(Errno::OPNOTSUPP);
    }
    let mode = Mode::from_raw_mode(mode & 0o7777);
    if object.name.is_empty() {
        match rustix::fs::fchmod(object.dir, mode) {
            // Opened with O_PATH.
            Err(Errno::BADF) => {}
            done => return done,
        }
        return rustix::fs::chmodat(CWD, proc_path(object.dir, object.name), mode, AtFlags::empty());
    }
    rustix::fs::chmodat(object.dir, object.name, mode, AtFlags::empty())
}

/// What a directory hands down has to be found out anew after a change.
fn forget_heritage(node: &Node) {
    if let Some(dir) = node.dir.as_deref() {
        dir.names.write().heritage = None;
    }
}

fn set_times(object: Object<'_>, set: &SetAttr) -> Result<()> {
    let times = times_of(set);
    utimens(object, times.last_access, times.last_modification)
}

fn times_of(set: &SetAttr) -> Timestamps {
    let time = |t: Option<Option<(i64, u32)>>| match t {
        None => Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT as _ },
        Some(None) => Timespec { tv_sec: 0, tv_nsec: UTIME_NOW as _ },
        Some(Some((tv_sec, tv_nsec))) => Timespec { tv_sec, tv_nsec: tv_nsec.into() },
    };
    Timestamps { last_access: time(set.atime), last_modification: time(set.mtime) }
}

/// The blocks that a file shows: of one in two parts, those of both, as far as they are known.
fn blocks(place: &mut Place, stat: &Statx) -> u64 {
    let whole = stat.stx_size.div_ceil(512);
    match &place.more {
        _ if !place.composed => stat.stx_blocks,
        Some(more) if more.lower_blocks > 0 => (stat.stx_blocks + more.lower_blocks).min(whole.max(stat.stx_blocks)),
        _ => whole,
    }
}

pub(super) fn utimens(object: Object<'_>, atime: Timespec, mtime: Timespec) -> Result<()> {
    let times = Timestamps { last_access: atime, last_modification: mtime };
    if !object.name.is_empty() {
        return rustix::fs::utimensat(object.dir, object.name, &times, AtFlags::SYMLINK_NOFOLLOW);
    }
    match rustix::fs::utimensat(object.dir, "", &times, AtFlags::EMPTY_PATH) {
        // Before Linux 5.8.
        Err(Errno::INVAL) => rustix::fs::utimensat(CWD, proc_path(object.dir, object.name), &times, AtFlags::empty()),
        other => other,
    }
}
