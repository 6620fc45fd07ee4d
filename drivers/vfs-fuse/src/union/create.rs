//! New names.

use super::{
    Caller, Entry, Union,
    attr::{chmod, chown},
    data::{Data, Inner},
    dirs::{Stack, kind_of},
    layer,
    listing::Listed,
    lookup::Found,
    marks::{self, Object},
    node::{Fds, Heritage, Names, Node, Source, UPPER},
    overrides::Owner,
    work::Upper,
};
use rustix::{
    fd::{AsFd, BorrowedFd, OwnedFd},
    fs::{AtFlags, FileType, Mode, OFlags, Statx, XattrFlags},
    io::{Errno, Result},
};
use std::{
    ffi::{OsStr, OsString},
    sync::Arc,
};

/// What is made.
enum What<'a> {
    /// Of these `st_mode` bits and device number.
    Node(u32, u64),
    Symlink(&'a OsStr),
}

impl What<'_> {
    fn mode(&self) -> u32 {
        match self {
            What::Node(mode, _) => *mode,
            What::Symlink(_) => libc::S_IFLNK | 0o777,
        }
    }
}

/// Where it is made, and what follows from that.
struct Place<'a> {
    upper: &'a Upper,
    dir: BorrowedFd<'a>,
    name: &'a OsStr,
    caller: Caller,
    heritage: Heritage,
}

/// What was made.
struct Made {
    /// Of regular files.
    file: Option<OwnedFd>,
    stat: Box<Statx>,
}

impl Union {
    /// Makes and opens a regular file; `EEXIST` if the name is taken.
    pub fn create(&self, parent: u64, name: &OsStr, mode: u32, caller: Caller) -> Result<(Entry, Arc<Data>)> {
        let (entry, node, file) = self.make(parent, name, What::Node(libc::S_IFREG | mode & 0o7777, 0), caller)?;
        let file = file.ok_or(Errno::IO)?;
        let data = Arc::new(Data::new(Inner::Upper(Arc::new(file)), self.config.volatile));
        node.place.lock().more().data = Arc::downgrade(&data);
        Ok((entry, data))
    }

    /// Makes a file of any type but directory and symlink.
    pub fn mknod(&self, parent: u64, name: &OsStr, mode: u32, rdev: u64, caller: Caller) -> Result<Entry> {
        if mode & libc::S_IFMT == libc::S_IFCHR && rdev == 0 {
            // It would be a whiteout; the kernel's overlay refuses too.
            return Err(Errno::PERM);
        }
        self.make(parent, name, What::Node(mode, rdev), caller).map(|(entry, ..)| entry)
    }

    /// Makes a directory.
    pub fn mkdir(&self, parent: u64, name: &OsStr, mode: u32, caller: Caller) -> Result<Entry> {
        self.make(parent, name, What::Node(libc::S_IFDIR | mode & 0o7777, 0), caller).map(|(entry, ..)| entry)
    }

    /// Makes a symlink.
    pub fn symlink(&self, parent: u64, name: &OsStr, target: &OsStr, caller: Caller) -> Result<Entry> {
        self.make(parent, name, What::Symlink(target), caller).map(|(entry, ..)| entry)
    }

    fn make(
        &self,
        parent: u64,
        name: &OsStr,
        what: What<'_>,
        caller: Caller,
    ) -> Result<(Entry, Arc<Node>, Option<OwnedFd>)> {
        let upper = self.upper()?;
        let dir = self.table.get(parent)?;
        check_new_name(name)?;
        self.dir_up(&dir)?;
        let mut names = dir.dir()?.names.write();
        let fds = self.fds(&dir)?;
        if names.removed {
            return Err(Errno::NOENT);
        }
        let upper_dir = fds.upper()?;
        let heritage = match names.heritage {
            Some(heritage) => heritage,
            None => *names.heritage.insert(self.heritage(upper_dir)?),
        };
        let place = Place { upper, dir: upper_dir, name, caller, heritage };
        let made = match fds.list() {
            // With nothing below a whiteout is nothing either, unless it has the very name.
            [_] => match self.make_at(&place, place.dir, name, &what, false) {
                Err(Errno::EXIST) => self.make_among_others(&place, &what, &dir, &fds, &names)?,
                made => made?,
            },
            _ => self.make_among_others(&place, &what, &dir, &fds, &names)?,
        };
        let (entry, node) = self.enter(&dir, &fds, &mut names, name, made.stat)?;
        Ok((entry, node, made.file))
    }

    /// Makes it where the name may be in use, or a whiteout.
    fn make_among_others(
        &self,
        place: &Place<'_>,
        what: &What<'_>,
        dir: &Arc<Node>,
        fds: &Fds,
        names: &Names,
    ) -> Result<Made> {
        self.check_free(dir, fds, names, place.name)?;
        if !has_whiteout(place.dir, place.name)? {
            return self.make_at(place, place.dir, place.name, what, false);
        }
        let file = self.make_over_whiteout(place, what, self.is_below(dir, fds, place.name)?.is_some())?;
        Ok(Made { file, stat: Box::new(layer::stat(place.dir, place.name)?) })
    }

    fn heritage(&self, dir: BorrowedFd<'_>) -> Result<Heritage> {
        let object = Object { dir, name: OsStr::new("") };
        let owner = self.stored(UPPER, &layer::stat(dir, object.name)?, object)?;
        let gid = (owner.mode & libc::S_ISGID != 0).then_some(owner.gid);
        Ok(Heritage { gid, acl: self.has_default_acl(object)? })
    }

    fn check_free(&self, dir: &Arc<Node>, fds: &Fds, names: &Names, name: &OsStr) -> Result<()> {
        if names.removed {
            return Err(Errno::NOENT);
        }
        if self.find(dir, fds, names, name)?.is_some() { Err(Errno::EXIST) } else { Ok(()) }
    }

    /// Makes it in the work directory and moves it over the whiteout. A directory that comes where lower layers have
    /// one must hide it.
    fn make_over_whiteout(&self, place: &Place<'_>, what: &What<'_>, below: bool) -> Result<Option<OwnedFd>> {
        let work = &place.upper.work;
        let temporary = work.name();
        let made = if place.heritage.acl {
            self.nest(place, &temporary).and_then(|nest| self.make_hidden(place, nest.as_fd(), place.name, what, below))
        } else {
            self.make_hidden(place, work.dir.as_fd(), &temporary, what, below)
        };
        // A directory has changed places with a whiteout.
        if made.is_err() || place.heritage.acl || kind(what.mode()) == libc::S_IFDIR {
            work.destroy(&temporary)?;
        }
        made
    }

    /// A directory in which files inherit the ACL that they would in their own.
    fn nest(&self, place: &Place<'_>, name: &OsStr) -> Result<OwnedFd> {
        let work = &place.upper.work;
        rustix::fs::mkdirat(&work.dir, name, Mode::from_raw_mode(0o700))?;
        let acl = Object { dir: place.dir, name: OsStr::new("") }.read(OsStr::new(ACL_DEFAULT))?;
        Object { dir: work.dir.as_fd(), name }.set(OsStr::new(ACL_DEFAULT), &acl, XattrFlags::empty())?;
        layer::open_dir(work.dir.as_fd(), name)
    }

    /// Makes it under a name elsewhere, and moves it over the whiteout.
    fn make_hidden(
        &self,
        place: &Place<'_>,
        dir: BorrowedFd<'_>,
        name: &OsStr,
        what: &What<'_>,
        below: bool,
    ) -> Result<Option<OwnedFd>> {
        let file = self.make_at(place, dir, name, what, true)?.file;
        if kind(what.mode()) != libc::S_IFDIR {
            rustix::fs::renameat(dir, name, place.dir, place.name)?;
        } else {
            if below {
                self.make_opaque(place.upper, dir, name)?;
            }
            move_dir_over_whiteout(place, dir, name)?;
        }
        place.upper.work.drop_whiteout_file(place.dir, place.name)?;
        Ok(file)
    }

    /// Hides what is below a directory of the upper layer.
    pub(super) fn make_opaque(&self, upper: &Upper, dir: BorrowedFd<'_>, name: &OsStr) -> Result<()> {
        if upper.xattrs {
            return Object { dir, name }.set(&self.marks.name("opaque"), b"y", XattrFlags::empty());
        }
        let inside = layer::open_dir(dir, name)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::openat(&inside, marks::OPAQUE, flags, Mode::from_raw_mode(0o600)).map(drop)
    }

    /// Makes it, with its owner. `elsewhere`: not in its own directory, so that it inherits nothing from that.
    fn make_at(
        &self,
        place: &Place<'_>,
        dir: BorrowedFd<'_>,
        name: &OsStr,
        what: &What<'_>,
        elsewhere: bool,
    ) -> Result<Made> {
        let owner = self.owner_of_new(place, what)?;
        let overrides = &self.overrides[UPPER as usize];
        let disk_mode = overrides.disk_mode(owner.mode);
        let file = match what {
            What::Symlink(target) => rustix::fs::symlinkat(*target, dir, name).map(|()| None)?,
            What::Node(..) => make_node(dir, name, disk_mode, owner.rdev)?,
        };
        let object = Object { dir, name };
        let dressed = self.own(object, owner, disk_mode, elsewhere);
        dressed.map(|stat| Made { file, stat }).or_else(|e| {
            let flags = if kind(disk_mode) == libc::S_IFDIR { AtFlags::REMOVEDIR } else { AtFlags::empty() };
            rustix::fs::unlinkat(dir, name, flags)?;
            Err(if e == Errno::INVAL { Errno::OVERFLOW } else { e })
        })
    }

    /// Returns what it is in the end.
    fn own(&self, object: Object<'_>, owner: Owner, disk_mode: u32, elsewhere: bool) -> Result<Box<Statx>> {
        let stat = Box::new(layer::stat(object.dir, object.name)?);
        if self.overrides[UPPER as usize].can_hold(disk_mode) {
            self.dress_owner(object, &stat, owner)?;
            return layer::stat(object.dir, object.name).map(Box::new);
        }
        let foreign = (stat.stx_uid, stat.stx_gid) != (owner.uid, owner.gid);
        if foreign {
            chown(object, Some(owner.uid), Some(owner.gid))?;
        }
        // chown(2) takes these bits away, and only its own directory hands set-group-id down. The others are what the
        // directory's default ACL has left of them.
        let lost = owner.mode & (libc::S_ISUID | libc::S_ISGID) != 0 && (foreign || elsewhere);
        if lost && kind_of(&stat) != libc::S_IFLNK {
            let special = owner.mode & !0o777;
            chmod(object, kind_of(&stat), special | u32::from(stat.stx_mode) & 0o777)?;
        }
        if foreign || lost { layer::stat(object.dir, object.name).map(Box::new) } else { Ok(stat) }
    }

    /// Owner and mode of what a caller makes.
    fn owner_of_new(&self, place: &Place<'_>, what: &What<'_>) -> Result<Owner> {
        let overrides = &self.overrides[UPPER as usize];
        let mut mode = what.mode();
        if kind(mode) != libc::S_IFLNK && !place.heritage.acl {
            mode &= !(place.caller.umask & 0o777);
        }
        if place.heritage.gid.is_some() && kind(mode) == libc::S_IFDIR {
            mode |= libc::S_ISGID;
        }
        let unmapped = |e| if e == Errno::INVAL { Errno::OVERFLOW } else { e };
        Ok(Owner {
            mode,
            uid: overrides.to_disk_uid(place.caller.uid).map_err(unmapped)?,
            gid: match place.heritage.gid {
                Some(gid) => gid,
                None => overrides.to_disk_gid(place.caller.gid).map_err(unmapped)?,
            },
            rdev: if let What::Node(_, rdev) = what { *rdev } else { 0 },
        })
    }

    /// The entry of a name that was just made in the upper layer.
    fn enter(
        &self,
        dir: &Arc<Node>,
        fds: &Fds,
        names: &mut Names,
        name: &OsStr,
        stat: Box<Statx>,
    ) -> Result<(Entry, Arc<Node>)> {
        let object = Object { dir: fds.upper()?, name };
        let mut found = Found {
            layer: UPPER,
            ino: self.numbers.of(layer::device(&stat), stat.stx_ino),
            composed: false,
            stack: None,
            stat,
        };
        if found.is_dir() {
            let sources = vec![Source { layer: UPPER, path: None, xattr_whiteouts: false }];
            found.stack = Some(Stack { sources, impure: false, lower: None, lower_path: None });
        }
        let stat = *found.stat;
        let kind = (kind_of(&stat) >> 12) as u8;
        let node = self.node_for(dir, name, found, 1);
        if let Some(listing) = &mut names.listing {
            let entry = Listed { name: name.into(), ino: node.ino, layer: UPPER, kind, merged: false };
            listing.insert(&self.hasher, entry);
        }
        let attr = self.attr(&node, UPPER, &stat, false, object)?;
        Ok((self.told(&node, attr), node))
    }

    /// Makes a hard link.
    pub fn link(&self, id: u64, parent: u64, name: &OsStr) -> Result<Entry> {
        let upper = self.upper()?;
        let node = self.table.get(id)?;
        let dir = self.table.get(parent)?;
        if node.dir.is_some() {
            return Err(Errno::PERM);
        }
        check_new_name(name)?;
        self.up_for_a_name(&node)?;
        self.dir_up(&dir)?;
        let mut names = dir.dir()?.names.write();
        let fds = self.fds(&dir)?;
        self.check_free(&dir, &fds, &names, name)?;
        let to = fds.upper()?;
        self.mark_impure(upper, &dir, to)?;
        let temporary: Option<OsString> = has_whiteout(to, name)?.then(|| upper.work.name());
        self.with(&node, |object, _| {
            if object.name.is_empty() {
                return Err(Errno::NOENT);
            }
            match &temporary {
                None => rustix::fs::linkat(object.dir, object.name, to, name, AtFlags::empty()),
                Some(temporary) => {
                    rustix::fs::linkat(object.dir, object.name, &upper.work.dir, temporary, AtFlags::empty())?;
                    upper.work.place(temporary, to, name)
                }
            }
        })?;
        upper.work.drop_whiteout_file(to, name)?;
        node.place.lock().add_name(dir.clone(), name.into());
        if let Some(listing) = &mut names.listing {
            let kind = (node.kind >> 12) as u8;
            let entry = Listed { name: name.into(), ino: node.ino, layer: UPPER, kind, merged: false };
            listing.insert(&self.hasher, entry);
        }
        let attr = self.attr_of_node(&node)?;
        self.table.take(&node, node.ino, 1);
        Ok(self.told(&node, attr))
    }
}

const ACL_DEFAULT: &str = "system.posix_acl_default";

fn move_dir_over_whiteout(place: &Place<'_>, from: BorrowedFd<'_>, name: &OsStr) -> Result<()> {
    match layer::stat(place.dir, place.name) {
        Ok(_) => {
            let exchange = rustix::fs::RenameFlags::EXCHANGE;
            rustix::fs::renameat_with(from, name, place.dir, place.name, exchange)
        }
        Err(Errno::NOENT) => rustix::fs::renameat(from, name, place.dir, place.name),
        Err(e) => Err(e),
    }
}

fn kind(mode: u32) -> u32 {
    mode & libc::S_IFMT
}

fn check_new_name(name: &OsStr) -> Result<()> {
    if name.len() > 255 {
        return Err(Errno::NAMETOOLONG);
    }
    // Layers could not tell it from a whiteout.
    if marks::is_reserved(name) { Err(Errno::INVAL) } else { Ok(()) }
}

/// Whether the upper directory has a whiteout of the name, of either form. The name itself is not in use.
pub(super) fn has_whiteout(dir: BorrowedFd<'_>, name: &OsStr) -> Result<bool> {
    let there = |name: &OsStr| match layer::stat(dir, name) {
        Ok(_) => Ok(true),
        Err(Errno::NOENT | Errno::NAMETOOLONG) => Ok(false),
        Err(e) => Err(e),
    };
    Ok(there(name)? || there(&marks::whiteout_name(name))?)
}

fn make_node(dir: BorrowedFd<'_>, name: &OsStr, mode: u32, rdev: u64) -> Result<Option<OwnedFd>> {
    let permissions = Mode::from_raw_mode(mode & 0o7777);
    match kind(mode) {
        libc::S_IFREG => {
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            rustix::fs::openat(dir, name, flags, permissions).map(Some)
        }
        libc::S_IFDIR => rustix::fs::mkdirat(dir, name, permissions).map(|()| None),
        other => rustix::fs::mknodat(dir, name, FileType::from_raw_mode(other), permissions, rdev).map(|()| None),
    }
}
