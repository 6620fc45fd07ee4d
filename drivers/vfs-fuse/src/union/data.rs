//! The data of regular files.

use super::{
    Union,
    layer::open_path,
    marks::{Object, proc_path},
    node::{Node, Place, UPPER},
};
use crate::extent::{self, ExtentFile};
use parking_lot::RwLock;
use rustix::{
    fd::{AsFd, OwnedFd},
    fs::{CWD, FallocateFlags, Mode, OFlags, SeekFrom, Timespec, Timestamps, UTIME_OMIT},
    io::{Errno, Result},
};
use std::{ffi::OsStr, os::unix::ffi::OsStrExt, sync::Arc};

/// The data of one regular file. One per file: whoever has it open shares it, and copy-up changes it for all of them.
pub struct Data {
    inner: RwLock<Inner>,
    volatile: bool,
}

/// Where the data is.
#[derive(Clone)]
pub(super) enum Inner {
    /// In one file of a lower layer.
    Lower(Arc<OwnedFd>),
    /// In one file of the upper layer.
    Upper(Arc<OwnedFd>),
    /// In two: what was changed in the upper one, the rest in a lower one.
    Extent(Arc<ExtentFile>),
}

impl Data {
    pub(super) fn new(inner: Inner, volatile: bool) -> Data {
        Data { inner: RwLock::new(inner), volatile }
    }

    pub(super) fn replace(&self, inner: Inner) {
        *self.inner.write() = inner;
    }

    fn inner(&self) -> Inner {
        self.inner.read().clone()
    }

    /// The one file that holds all of it, for passthrough; `None` while it is composed of two. It is another one after a
    /// copy-up.
    pub fn backing(&self) -> Option<Arc<OwnedFd>> {
        match &*self.inner.read() {
            Inner::Lower(fd) | Inner::Upper(fd) => Some(fd.clone()),
            Inner::Extent(_) => None,
        }
    }

    /// Whether it lies in the upper layer.
    pub fn is_upper(&self) -> bool {
        !matches!(&*self.inner.read(), Inner::Lower(_))
    }

    pub(super) fn extent(&self) -> Option<Arc<ExtentFile>> {
        match &*self.inner.read() {
            Inner::Extent(file) => Some(file.clone()),
            _ => None,
        }
    }

    /// Bytes.
    pub fn size(&self) -> Result<u64> {
        match self.inner() {
            Inner::Lower(fd) | Inner::Upper(fd) => Ok(rustix::fs::fstat(&*fd)?.st_size as u64),
            Inner::Extent(file) => file.size(),
        }
    }

    /// As pread(2): 0 at the end.
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<usize> {
        match self.inner() {
            Inner::Lower(fd) | Inner::Upper(fd) => {
                rustix::io::retry_on_intr(|| rustix::io::pread(&*fd, &mut *buffer, offset))
            }
            Inner::Extent(file) => file.read_at(buffer, offset),
        }
    }

    /// Writes all of it.
    pub fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        match self.inner() {
            Inner::Lower(_) => Err(Errno::BADF),
            Inner::Upper(fd) => {
                let mut done = 0;
                while done < bytes.len() {
                    let at = offset + done as u64;
                    match rustix::io::retry_on_intr(|| rustix::io::pwrite(&*fd, &bytes[done..], at))? {
                        0 => return Err(Errno::IO),
                        n => done += n,
                    }
                }
                Ok(())
            }
            Inner::Extent(file) => file.write_at(bytes, offset),
        }
    }

    /// As ftruncate(2).
    pub fn set_len(&self, size: u64) -> Result<()> {
        match self.inner() {
            Inner::Lower(_) => Err(Errno::BADF),
            Inner::Upper(fd) => rustix::fs::ftruncate(&*fd, size),
            Inner::Extent(file) => file.set_len(size),
        }
    }

    /// As futimens(2).
    pub fn set_mtime(&self, (seconds, nanoseconds): (i64, u32)) -> Result<()> {
        let times = Timestamps {
            last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT as _ },
            last_modification: Timespec { tv_sec: seconds, tv_nsec: nanoseconds.into() },
        };
        match self.inner() {
            Inner::Lower(_) => Err(Errno::BADF),
            Inner::Upper(fd) => rustix::fs::futimens(&*fd, &times),
            Inner::Extent(file) => file.set_times(&times),
        }
    }

    /// `mode` as fallocate(2).
    pub fn fallocate(&self, mode: u32, offset: u64, length: u64) -> Result<()> {
        match self.inner() {
            Inner::Lower(_) => Err(Errno::BADF),
            Inner::Upper(fd) => rustix::fs::fallocate(&*fd, FallocateFlags::from_bits_retain(mode), offset, length),
            Inner::Extent(file) => file.fallocate(mode, offset, length),
        }
    }

    /// `SEEK_DATA` and `SEEK_HOLE`.
    pub fn seek(&self, offset: u64, whence: i32) -> Result<u64> {
        match self.inner() {
            Inner::Lower(fd) | Inner::Upper(fd) => {
                let whence = match whence {
                    libc::SEEK_DATA => SeekFrom::Data(offset),
                    libc::SEEK_HOLE => SeekFrom::Hole(offset),
                    _ => return Err(Errno::INVAL),
                };
                rustix::fs::seek(&*fd, whence)
            }
            Inner::Extent(file) => file.seek(offset, whence),
        }
    }

    /// Makes it durable; nothing at all if the mount is volatile.
    pub fn sync(&self, data_only: bool) -> Result<()> {
        if self.volatile {
            return Ok(());
        }
        match self.inner() {
            Inner::Lower(_) => Ok(()),
            Inner::Upper(fd) if data_only => rustix::fs::fdatasync(&*fd),
            Inner::Upper(fd) => rustix::fs::fsync(&*fd),
            Inner::Extent(file) => file.sync(data_only),
        }
    }
}

/// How a file of a lower layer is read: without leaving a trace, where that is allowed.
pub(super) fn open_lower(dir: rustix::fd::BorrowedFd<'_>, name: &OsStr) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    match rustix::fs::openat(dir, name, flags | OFlags::NOATIME, Mode::empty()) {
        Err(Errno::PERM) => rustix::fs::openat(dir, name, flags, Mode::empty()),
        other => other,
    }
}

impl Union {
    /// The data of a regular file, for reading or, with `write`, copied up. One per file: whoever has it open shares it,
    /// and [`Data`] of a file changes only by copy-up.
    pub fn data(&self, id: u64, write: bool) -> Result<Arc<Data>> {
        self.data_of(&self.table.get(id)?, write, u64::MAX)
    }

    /// The same, of which no more than `keep` bytes of old data are needed.
    pub(super) fn data_of(&self, node: &Arc<Node>, write: bool, keep: u64) -> Result<Arc<Data>> {
        if !node.is_regular() {
            return Err(if node.dir.is_some() { Errno::ISDIR } else { Errno::INVAL });
        }
        if write {
            self.copy_up(node, super::copy_up::Change::Data { keep })?;
        }
        let mut place = node.place.lock();
        if let Some(data) = place.more.as_ref().and_then(|m| m.data.upgrade()) {
            return Ok(data);
        }
        let data = Arc::new(Data::new(self.open_data(&place, write)?, self.config.volatile));
        place.more().data = Arc::downgrade(&data);
        Ok(data)
    }

    /// Opens the data of the file at a place that the caller has locked.
    pub(super) fn open_data(&self, place: &Place, write: bool) -> Result<Inner> {
        if let Some(fd) = place.more.as_ref().and_then(|m| m.nameless.clone()) {
            return self.open_object(Object { dir: (*fd).as_fd(), name: OsStr::new("") }, place, write);
        }
        let parent = place.parent.as_ref().ok_or(Errno::NOENT)?;
        let fds = self.fds(parent)?;
        let dir = fds.layer(place.layer).ok_or(Errno::STALE)?;
        self.open_object(Object { dir, name: &place.name }, place, write)
    }

    fn open_object(&self, object: Object<'_>, place: &Place, write: bool) -> Result<Inner> {
        if place.composed {
            return self.open_composed(object, place, write);
        }
        self.open_plain(object, place, write)
    }

    fn open_plain(&self, object: Object<'_>, place: &Place, write: bool) -> Result<Inner> {
        if place.layer != UPPER {
            let fd = match object.name.is_empty() {
                true => rustix::fs::openat(CWD, proc_path(object.dir, object.name), READ, Mode::empty())?,
                false => open_lower(object.dir, object.name)?,
            };
            return Ok(Inner::Lower(Arc::new(fd)));
        }
        Ok(Inner::Upper(Arc::new(open_upper(object, write)?)))
    }

    /// A file whose data is, in part or whole, that of a lower one.
    fn open_composed(&self, object: Object<'_>, place: &Place, write: bool) -> Result<Inner> {
        let prefix = self.marks.prefix;
        let Some(header) = self.header(object)? else {
            if !super::lookup::has_data_mark(&object.list()?) {
                // Truncated or overwritten as a whole, which made it a plain file; of a lower layer, completed meanwhile by
                // the daemon that has it for writing and is about to end.
                return self.open_plain(object, place, write);
            }
            return self.open_metacopy(object, place);
        };
        let header = extent::Header::decode(&header)?;
        let unit = self.unit()?;
        let writable = place.layer == UPPER && self.upper.is_some();
        let layer = (self.lowers.len() as u16).checked_sub(header.layer_from_bottom).ok_or(Errno::IO)?;
        if layer <= place.layer {
            return Err(Errno::IO);
        }
        let lower = self.open_by_path(layer, &header.path).map_err(|e| match e {
            // The name is there; what it needs is not.
            Errno::NOENT | Errno::NOTDIR | Errno::LOOP => Errno::IO,
            e => e,
        })?;
        let upper = if writable { open_upper(object, write)? } else { reopen(object, READ)? };
        Ok(Inner::Extent(Arc::new(ExtentFile::open(upper, lower, header, prefix, unit, writable)?)))
    }

    /// The header, undecoded, of what may be an extent file.
    pub(super) fn header(&self, object: Object<'_>) -> Result<Option<Vec<u8>>> {
        extent::Header::find(|name| object.get(&format!("{}{name}", self.marks.prefix)))
    }

    /// A file of a layer by its path from there.
    pub(super) fn open_by_path(&self, layer: u16, path: &[u8]) -> Result<OwnedFd> {
        let (dir, name) = match path.iter().rposition(|b| *b == b'/') {
            Some(at) => (&path[..at], &path[at + 1..]),
            None => (&b""[..], path),
        };
        if name.is_empty() || name == b".." || name == b"." {
            return Err(Errno::IO);
        }
        let dir = open_path(self.layer_root(layer), dir)?;
        let name = OsStr::from_bytes(name);
        // The path comes from disk, and opening some devices has effects.
        if super::dirs::kind_of(&super::layer::stat(dir.as_fd(), name)?) != libc::S_IFREG {
            return Err(Errno::IO);
        }
        open_lower(dir.as_fd(), name)
    }

    /// A file that kernel overlayfs copied up without its data (`metacopy=on`): the data is that of the next lower file,
    /// of the same name or at the path of its redirect.
    fn open_metacopy(&self, object: Object<'_>, place: &Place) -> Result<Inner> {
        let prefix = self.marks.prefix;
        match object.get(&format!("{prefix}metacopy"))? {
            // The mark is in a namespace that proves nothing here: whoever wrote it can make the file whole.
            None => return Err(Errno::IO),
            // A version that no kernel writes: an extent file whose header does not count here.
            Some(value) if value.first().is_some_and(|version| *version != 0) => return Err(Errno::IO),
            Some(_) => {}
        }
        let redirect = object.get(&format!("{prefix}redirect"))?;
        let parent = place.parent.as_ref().ok_or(Errno::IO)?;
        let fds = self.fds(parent)?;
        for layer in place.layer + 1..=self.lowers.len() as u16 {
            let opened = match redirect.as_deref() {
                Some([b'/', path @ ..]) => self.open_by_path(layer, path),
                Some(name) if !name.contains(&b'/') => {
                    fds.layer(layer).map_or(Err(Errno::NOENT), |dir| open_lower(dir, OsStr::from_bytes(name)))
                }
                Some(_) => Err(Errno::IO),
                None => fds.layer(layer).map_or(Err(Errno::NOENT), |dir| open_lower(dir, &place.name)),
            };
            match opened {
                Err(Errno::NOENT | Errno::NOTDIR) => {}
                Ok(fd)
                    if super::layer::stat(fd.as_fd(), OsStr::new(""))
                        .is_ok_and(|s| is_whole(fd.as_fd(), &s, prefix)) =>
                {
                    return Ok(Inner::Lower(Arc::new(fd)));
                }
                Ok(_) => {}
                Err(e) => return Err(e),
            }
        }
        Err(Errno::IO)
    }

    /// Whether `data(id, true)` or a change of attributes would copy much, so that it belongs on a thread of its own.
    pub fn is_slow(&self, id: u64) -> bool {
        self.table.get(id).is_ok_and(|node| {
            let lower = node.is_regular() && node.place.lock().layer != UPPER;
            lower
                && !self.knows_to_extent()
                && self.attr_of_node(&node).is_ok_and(|a| a.size > 1 << 20)
                && !self.can_extent()
        })
    }

    /// Gives the file a new id, as the kernel allows an inode only one backing file while it is open: whoever has it open
    /// under the old id keeps the old data. The inode number stays. Names looked up from now on have the new id.
    pub fn renew(&self, id: u64) -> Result<()> {
        self.table.renew(&self.table.get(id)?);
        Ok(())
    }
}

const READ: OFlags = OFlags::RDONLY.union(OFlags::CLOEXEC).union(OFlags::NONBLOCK);

/// Whether a file that metacopy leads to has data of its own.
fn is_whole(fd: rustix::fd::BorrowedFd<'_>, stat: &rustix::fs::Statx, prefix: &str) -> bool {
    let object = Object { dir: fd, name: OsStr::new("") };
    super::dirs::kind_of(stat) == libc::S_IFREG && object.get(&format!("{prefix}metacopy")) == Ok(None)
}

fn reopen(object: Object<'_>, flags: OFlags) -> Result<OwnedFd> {
    match object.name.is_empty() {
        true => rustix::fs::openat(CWD, proc_path(object.dir, object.name), flags, Mode::empty()),
        false => rustix::fs::openat(object.dir, object.name, flags | OFlags::NOFOLLOW, Mode::empty()),
    }
}

/// For writing also if it will only be read: what is opened later for writing has to share this descriptor.
fn open_upper(object: Object<'_>, write: bool) -> Result<OwnedFd> {
    match reopen(object, OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK) {
        Err(Errno::PERM | Errno::ROFS | Errno::TXTBSY | Errno::ACCESS) if !write => reopen(object, READ),
        other => other,
    }
}
