//! File data: opening in the mode the kernel allows, reading, writing, and what else works on data.

use super::{
    io_mode::{Answer, IoModes, Sight},
    mtimes::Mtimes,
    recent::Recent,
};
use crate::union::{Attr, Caller, Data, Entry, SetAttr, Union};
use fuser::{BackingId, INodeNo, Notifier};
use rustix::{
    fd::{AsFd, BorrowedFd, OwnedFd},
    io::{Errno, Result},
};
use std::{
    cell::RefCell,
    collections::HashSet,
    ffi::OsStr,
    io,
    sync::{Arc, OnceLock},
};

/// A lower file up to this size is read through the kernel's page cache, larger ones by passthrough. Opening costs the
/// same; the page cache needs one request more the first time (the kernel asks for up to 128 KiB at once), but who has
/// the file open sees what is written to it after its copy-up, as passthrough cannot give.
const CACHED_UP_TO: u64 = 128 << 10;

/// So much is copied at most for one request if the kernel cannot copy it by itself.
const COPY_AT_MOST: u64 = 16 << 20;

/// A larger answer in one go would only keep the caller from being interrupted.
const COPY_IN_KERNEL_AT_MOST: u64 = 1 << 30;

/// How file data is served, as agreed with the kernel at the mount.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct IoSettings {
    /// Passthrough may be used.
    pub passthrough: bool,
    /// The kernel does not tell of open and close.
    pub no_open: bool,
    /// The kernel gathers writes: what it has of a file may be newer than what we have.
    pub writeback: bool,
    /// It sends them when told to drop what it has, and waits for those it was sending already.
    pub flushes: bool,
}

/// Who has what open, and how.
pub struct FileIo {
    union: Arc<Union>,
    pub settings: IoSettings,
    modes: IoModes<Data, OwnedFd, BackingId>,
    recent: Recent<Data>,
    mtimes: Mtimes,
    /// Files whose capabilities were removed, until the SETATTR that the kernel may send after that.
    stripped: parking_lot::Mutex<HashSet<u64>>,
    notifier: Arc<OnceLock<Notifier>>,
    renewing: parking_lot::Mutex<()>,
}

/// How one file is to be opened.
#[derive(Debug, Clone, Copy)]
pub struct Open {
    /// Which.
    pub id: u64,
    /// For writing.
    pub write: bool,
    /// And emptied.
    pub truncate: bool,
    /// By whom.
    pub caller: Caller,
}

impl FileIo {
    pub fn new(union: Arc<Union>, notifier: Arc<OnceLock<Notifier>>) -> FileIo {
        FileIo {
            union,
            settings: IoSettings::default(),
            modes: IoModes::default(),
            recent: Recent::default(),
            mtimes: Mtimes::default(),
            stripped: parking_lot::Mutex::default(),
            notifier,
            renewing: parking_lot::Mutex::default(),
        }
    }

    /// Opens a file. `register` makes a backing file known to the kernel.
    pub fn open(
        &self,
        open: Open,
        register: impl Fn(BorrowedFd<'_>) -> io::Result<BackingId>,
    ) -> Result<Answer<BackingId>> {
        if open.truncate {
            self.union.setattr(open.id, &SetAttr { size: Some(0), ..SetAttr::default() }, open.caller)?;
        }
        let data = self.union.data(open.id, open.write)?;
        match self.bind(open.id, &data, open.write, register) {
            Answer::Renew => self.renew(open.id).and(Err(Errno::STALE)),
            Answer::Stale => Err(Errno::STALE),
            answer => Ok(answer),
        }
    }

    /// Opens a file that was just made.
    pub fn open_new(
        &self,
        id: u64,
        data: Arc<Data>,
        register: impl Fn(BorrowedFd<'_>) -> io::Result<BackingId>,
    ) -> Answer<BackingId> {
        if self.settings.no_open {
            self.recent.put(id, data);
            return Answer::Cached { keep: true };
        }
        // What was noted of this number was of another file, which the kernel has not told us yet that it dropped.
        self.modes.forget(id);
        self.bind(id, &data, true, register)
    }

    fn bind(
        &self,
        id: u64,
        data: &Arc<Data>,
        write: bool,
        register: impl Fn(BorrowedFd<'_>) -> io::Result<BackingId>,
    ) -> Answer<BackingId> {
        let look = |data: &Data| {
            let large = || data.size().is_ok_and(|size| size > CACHED_UP_TO);
            let passthrough = self.settings.passthrough && (write || data.is_upper() || large());
            Sight { file: data.backing(), passthrough }
        };
        self.modes.open(id, data, &look, &|file: &OwnedFd| register(file.as_fd()))
    }

    /// A new inode for the file, for whoever opens it from now on. The old one is still reached by descriptors, and by
    /// further names of the file until they are looked up again: what the kernel remembers of its attributes must go.
    fn renew(&self, id: u64) -> Result<()> {
        let _one_at_a_time = self.renewing.lock();
        if !self.modes.is_superseded(id) {
            self.union.renew(id)?;
            self.modes.supersede(id);
            self.invalidate_attributes(id);
        }
        Ok(())
    }

    fn invalidate_attributes(&self, id: u64) {
        // A negative offset: attributes alone.
        if let Some(Err(e)) = self.notifier.get().map(|notifier| notifier.inval_inode(INodeNo(id), -1, 0)) {
            tracing::warn!("the kernel did not take back the attributes of inode {id}: {e}");
        }
    }

    /// Has the kernel send what it has gathered of the file and not sent yet. For that others must serve its requests.
    pub fn gather(&self, id: u64) {
        // From 0 to the end.
        if let Some(Err(e)) = self.notifier.get().map(|notifier| notifier.inval_inode(INodeNo(id), 0, 0)) {
            tracing::warn!("the kernel did not send what was written to inode {id}: {e}");
        }
    }

    /// One open less. Writes by passthrough the kernel notices, except those through a mapping: then it would go on
    /// showing the time it was told before.
    pub fn release(&self, id: u64, write: bool) {
        if let Some((file, told)) = write.then(|| self.modes.take_told(id)).flatten()
            && rustix::fs::fstat(&*file).is_ok_and(|now| (now.st_mtime, now.st_mtime_nsec as u32) != told)
        {
            self.invalidate_attributes(id);
        }
        self.modes.release(id);
    }

    /// The kernel has dropped the inode.
    pub fn forget(&self, id: u64) {
        self.modes.forget(id);
        self.stripped.lock().remove(&id);
        if self.settings.no_open {
            self.recent.forget(id);
            self.mtimes.forget(id);
        }
    }

    /// The kernel is told these attributes. Says whether another inode shows the same file by now.
    pub fn tell(&self, id: u64, attr: &Attr) -> bool {
        self.modes.tell(id, attr.mtime)
    }

    /// The data as those who have it open see it.
    pub fn data(&self, id: u64) -> Result<Arc<Data>> {
        if let Some(data) = self.known(id) {
            return Ok(data);
        }
        let data = self.union.data(id, false)?;
        if self.settings.no_open {
            self.recent.put(id, data.clone());
        }
        Ok(data)
    }

    /// The data, copied up.
    pub fn data_to_change(&self, id: u64) -> Result<Arc<Data>> {
        if let Some(data) = self.known(id).filter(|data| data.is_upper()) {
            return Ok(data);
        }
        let data = self.union.data(id, true)?;
        if self.settings.no_open {
            self.recent.put(id, data.clone());
        }
        Ok(data)
    }

    fn known(&self, id: u64) -> Option<Arc<Data>> {
        if self.settings.no_open { self.recent.get(id) } else { self.modes.data(id) }
    }

    /// Whether a change of the data would copy much first.
    pub fn is_slow_to_change(&self, id: u64) -> bool {
        !self.known(id).is_some_and(|data| data.is_upper()) && self.union.is_slow(id)
    }

    /// Reads into `buffer` until it is full or the file ends: the kernel takes less than it asked for as the end.
    pub fn read(&self, id: u64, buffer: &mut [u8], offset: u64) -> Result<usize> {
        let data = self.data(id)?;
        let mut filled = 0;
        while filled < buffer.len() {
            match data.read_at(&mut buffer[filled..], offset + filled as u64)? {
                0 => break,
                n => filled += n,
            }
        }
        Ok(filled)
    }

    /// Writes all of it; with `kill_privileges` takes set-user-id and set-group-id away first. Linux 6.18 has sent
    /// SETATTR for that before, but the protocol does not promise it.
    pub fn write(&self, id: u64, bytes: &[u8], offset: u64, kill_privileges: Option<Caller>) -> Result<()> {
        if let Some(caller) = kill_privileges
            && self.union.getattr(id)?.mode & (libc::S_ISUID | libc::S_ISGID) != 0
        {
            self.union.setattr(id, &SetAttr::default(), caller)?;
        }
        let data = self.data_to_change(id)?;
        data.write_at(bytes, offset)?;
        self.restore_mtime(id, &data)
    }

    pub fn fallocate(&self, id: u64, mode: u32, offset: u64, length: u64) -> Result<()> {
        let data = self.data_to_change(id)?;
        data.fallocate(mode, offset, length)?;
        self.restore_mtime(id, &data)
    }

    /// As [`Union::setattr`]. The size on its own, as then the union takes set-user-id away: the flag by which the kernel
    /// asks for it is one that fuser does not show.
    pub fn setattr(&self, id: u64, set: &SetAttr, caller: Caller) -> Result<Attr> {
        let rest = SetAttr { size: None, ..*set };
        if set.size.is_some() && rest != SetAttr::default() {
            self.setattr(id, &SetAttr { size: set.size, ..SetAttr::default() }, caller)?;
            return self.setattr(id, &rest, caller);
        }
        if let (true, Some(Some(mtime))) = (self.settings.writeback, set.mtime) {
            self.mtimes.note(id, mtime);
        }
        if *set == SetAttr::default() && self.stripped.lock().remove(&id) && caller.uid == 0 {
            return self.union.getattr(id);
        }
        let attr = self.union.setattr(id, set, caller)?;
        if set.size.is_some() {
            self.restore_mtime(id, &*self.data(id)?)?;
        }
        Ok(attr)
    }

    /// As [`Union::removexattr`].
    pub fn removexattr(&self, id: u64, name: &OsStr) -> Result<()> {
        self.union.removexattr(id, name)?;
        if name == "security.capability" {
            self.stripped.lock().insert(id);
        }
        Ok(())
    }

    /// A file was just made. A write in the same tick of the kernel's clock is no new time to it, and it sends none.
    pub fn made(&self, entry: &Entry) {
        if self.settings.writeback {
            self.mtimes.note(entry.id, entry.attr.mtime);
        }
    }

    /// As truncate(2), to which the size a file has already is no modification, unlike ftruncate(2) and `O_TRUNC`.
    pub fn truncate(&self, id: u64, size: u64, caller: Caller) -> Result<Attr> {
        let attr = self.union.getattr(id)?;
        // Without O_TRUNC in OPEN, and without times, it may be either.
        let told_apart = size > 0 || self.settings.passthrough || self.settings.writeback;
        match attr.size == size && told_apart {
            false => self.setattr(id, &SetAttr { size: Some(size), ..SetAttr::default() }, caller),
            true if caller.uid == 0 => Ok(attr),
            true => self.union.setattr(id, &SetAttr::default(), caller),
        }
    }

    /// What was just changed has the time that the kernel says.
    fn restore_mtime(&self, id: u64, data: &Data) -> Result<()> {
        self.mtimes.restore(id, |mtime| data.set_mtime(mtime)).unwrap_or(Ok(()))
    }

    /// `SEEK_DATA` and `SEEK_HOLE`. The kernel takes ENOSYS for: all is data, in every file and for good.
    pub fn seek(&self, id: u64, offset: u64, whence: i32) -> Result<u64> {
        // Each time anew: what the kernel writes may copy the file up.
        let ours = |offset, whence| self.data(id)?.seek(offset, whence);
        super::seek::seek(offset, whence, ours, |from, to| self.flush(id, from, to))
    }

    /// Has the kernel write what it has, and waits for it. Other threads must be free to answer those writes, and the
    /// reads that hold the pages.
    fn flush(&self, id: u64, from: u64, to: u64) -> Result<()> {
        if self.settings.writeback && !self.settings.flushes {
            return Err(Errno::NOSYS);
        }
        let notifier = self.notifier.get().ok_or(Errno::NOSYS)?;
        let as_signed = |offset: u64| i64::try_from(offset).unwrap_or(i64::MAX);
        let (from, to) = (as_signed(from), as_signed(to));
        notifier.inval_inode(INodeNo(id), from, to - from).map_err(|e| {
            tracing::warn!("the kernel did not write back inode {id}: {e}");
            Errno::NOSYS
        })
    }

    /// Makes the data durable. The lower layers are nobody's to write.
    pub fn sync(&self, id: u64, data_only: bool) -> Result<()> {
        let data = self.data(id)?;
        if data.is_upper() { data.sync(data_only) } else { Ok(()) }
    }

    /// Copies up to `length` bytes from one file to another, and says how many.
    pub fn copy(&self, from: (u64, u64), to: (u64, u64), length: u64) -> Result<u64> {
        let target = self.data_to_change(to.0)?;
        let copied = self.copy_data(from, (&target, to.1), length)?;
        self.restore_mtime(to.0, &target)?;
        Ok(copied)
    }

    fn copy_data(&self, from: (u64, u64), (target, to): (&Data, u64), length: u64) -> Result<u64> {
        let source = self.data(from.0)?;
        if let (Some(source), Some(target)) = (source.backing(), target.backing()) {
            let (mut from, mut to) = (from.1, to);
            let length = length.min(COPY_IN_KERNEL_AT_MOST) as usize;
            match rustix::fs::copy_file_range(&*source, Some(&mut from), &*target, Some(&mut to), length) {
                Err(Errno::XDEV | Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS) => {}
                done => return done.map(|n| n as u64),
            }
        }
        copy_by_hand(&source, from.1, target, to, length.min(COPY_AT_MOST))
    }
}

fn copy_by_hand(source: &Data, from: u64, target: &Data, to: u64, length: u64) -> Result<u64> {
    with_buffer(1 << 20, |buffer| {
        let mut done = 0;
        while done < length {
            let part = (length - done).min(buffer.len() as u64) as usize;
            let n = match source.read_at(&mut buffer[..part], from + done) {
                Ok(n) => n,
                // What was copied was copied: the caller learns of the error when it goes on.
                Err(_) if done > 0 => break,
                Err(e) => return Err(e),
            };
            if n == 0 {
                break;
            }
            match target.write_at(&buffer[..n], to + done) {
                Ok(()) => done += n as u64,
                Err(_) if done > 0 => break,
                Err(e) => return Err(e),
            }
        }
        Ok(done)
    })
}

/// A buffer that the thread uses again and again: zeroing a fresh one costs as much as a small read.
pub fn with_buffer<R>(length: usize, act: impl FnOnce(&mut [u8]) -> R) -> R {
    thread_local!(static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) });
    BUFFER.with_borrow_mut(|buffer| {
        if buffer.len() < length {
            buffer.resize(length, 0);
        }
        act(&mut buffer[..length])
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, CopyUp};
    use std::{fs, os::unix::fs::PermissionsExt};

    const NOBODY: Caller = Caller { uid: 1000, gid: 1000, umask: 0 };

    /// Files as without CAP_SYS_ADMIN: opens are not told.
    fn files(content: &[u8], names: &[&str]) -> (tempfile::TempDir, Arc<Union>, FileIo, Vec<u64>) {
        let dir = tempfile::Builder::new().prefix("vfs-fuse-io-").tempdir_in("/var/tmp").unwrap();
        let path = |name: &str| dir.path().join(name);
        for layer in ["l", "u", "w"] {
            fs::create_dir(path(layer)).unwrap();
        }
        for name in names {
            fs::write(path("l").join(name), content).unwrap();
            fs::set_permissions(path("l").join(name), fs::Permissions::from_mode(0o6777)).unwrap();
        }
        let (lower, upper, work) = (vec![path("l")], Some(path("u")), Some(path("w")));
        let union = Union::open(Config { lower, upper, work, copy_up: CopyUp::Full, ..Config::default() }).unwrap();
        let mut io = FileIo::new(union.clone(), Arc::default());
        io.settings.no_open = true;
        let ids = names.iter().map(|name| union.lookup(1, OsStr::new(name)).unwrap().id).collect();
        (dir, union, io, ids)
    }

    #[test]
    fn a_write_takes_privileges_away_when_told() {
        let (_dir, union, io, ids) = files(b"content", &["f"]);
        io.write(ids[0], b"x", 0, None).unwrap();
        assert_eq!(union.getattr(ids[0]).unwrap().mode & 0o7777, 0o6777);
        io.write(ids[0], b"y", 1, Some(NOBODY)).unwrap();
        assert_eq!(union.getattr(ids[0]).unwrap().mode & 0o7777, 0o777);
        let mut all = [0; 20];
        let n = io.read(ids[0], &mut all, 0).unwrap();
        assert_eq!(&all[..n], b"xyntent");
    }

    #[test]
    fn data_that_comes_after_its_time_does_not_change_it() {
        let (_dir, union, mut io, ids) = files(b"content", &["f", "other"]);
        io.settings.writeback = true;
        let (id, other) = (ids[0], ids[1]);
        let mtime = || union.getattr(id).unwrap().mtime;
        let set = |time| SetAttr { mtime: Some(Some(time)), ..SetAttr::default() };
        io.write(id, b"x", 0, None).unwrap();
        assert!(mtime().0 > 1_000_000_000, "the kernel has said nothing yet");
        io.setattr(id, &set((1_000_000_000, 7)), NOBODY).unwrap();
        io.write(id, b"y", 1, None).unwrap();
        assert_eq!(mtime(), (1_000_000_000, 7));
        io.fallocate(id, libc::FALLOC_FL_KEEP_SIZE as u32, 0, 5).unwrap();
        io.copy((other, 0), (id, 0), 3).unwrap();
        assert_eq!(mtime(), (1_000_000_000, 7));
        let both = SetAttr { size: Some(2), ..set((1_000_000_001, 8)) };
        io.setattr(id, &both, NOBODY).unwrap();
        io.write(id, b"z", 1, None).unwrap();
        assert_eq!(mtime(), (1_000_000_001, 8));
        io.forget(id);
        io.write(id, b"z", 1, None).unwrap();
        assert!(mtime().0 > 1_000_000_001, "a new inode's first write");
        let (made, data) = union.create(1, OsStr::new("new"), 0o644, NOBODY).unwrap();
        io.made(&made);
        io.open_new(made.id, data, |_| Err(io::Error::from_raw_os_error(libc::EPERM)));
        std::thread::sleep(std::time::Duration::from_millis(20));
        io.write(made.id, b"z", 1, None).unwrap();
        assert_eq!(union.getattr(made.id).unwrap().mtime, made.attr.mtime);
    }

    #[test]
    fn truncate_to_the_same_size_is_no_modification() {
        let (_dir, union, io, ids) = files(b"content", &["f"]);
        let root = Caller { uid: 0, gid: 0, umask: 0 };
        let time = SetAttr { mtime: Some(Some((1_000_000_000, 7))), ..SetAttr::default() };
        io.setattr(ids[0], &time, root).unwrap();
        assert_eq!(io.truncate(ids[0], 7, root).unwrap().mtime, (1_000_000_000, 7));
        assert_eq!(union.getattr(ids[0]).unwrap().mode & 0o7777, 0o6777);
        assert_eq!(io.truncate(ids[0], 7, NOBODY).unwrap().mode & 0o7777, 0o777);
        let ftruncate = SetAttr { size: Some(7), ..SetAttr::default() };
        assert!(io.setattr(ids[0], &ftruncate, root).unwrap().mtime.0 > 1_000_000_000);
        io.setattr(ids[0], &time, root).unwrap();
        assert!(io.truncate(ids[0], 6, root).unwrap().mtime.0 > 1_000_000_000);
    }

    #[test]
    fn a_write_by_root_takes_capabilities_alone() {
        let (_dir, union, io, ids) = files(b"content", &["f"]);
        let root = Caller { uid: 0, gid: 0, umask: 0 };
        let name = OsStr::new("security.capability");
        let value = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let mode = |caller| io.setattr(ids[0], &SetAttr::default(), caller).unwrap().mode & 0o7777;
        union.setxattr(ids[0], name, &value, 0).unwrap();
        io.removexattr(ids[0], name).unwrap();
        assert_eq!(mode(root), 0o6777, "the write's");
        assert_eq!(mode(root), 0o777, "chown's");
        union.setattr(ids[0], &SetAttr { mode: Some(0o6777), ..SetAttr::default() }, root).unwrap();
        union.setxattr(ids[0], name, &value, 0).unwrap();
        io.removexattr(ids[0], name).unwrap();
        assert_eq!(mode(NOBODY), 0o777);
    }

    #[test]
    fn copies_by_hand_as_the_kernel_does() {
        let content: Vec<u8> = (0..3_000_000u32).map(|i| i as u8).collect();
        let (_dir, _union, io, ids) = files(&content, &["from", "to"]);
        let (from, to) = (io.data(ids[0]).unwrap(), io.data_to_change(ids[1]).unwrap());
        assert_eq!(copy_by_hand(&from, 7, &to, 100, 2_500_000), Ok(2_500_000));
        let mut copied = vec![0; 2_500_000];
        io.read(ids[1], &mut copied, 100).unwrap();
        assert!(copied == content[7..2_500_007]);
        assert_eq!(copy_by_hand(&from, 2_999_990, &to, 0, 50), Ok(10), "to the end");
        assert_eq!(io.copy((ids[0], 2_999_990), (ids[1], 3_000_000), 50), Ok(10));
        assert_eq!(to.size(), Ok(3_000_010));
    }
}
