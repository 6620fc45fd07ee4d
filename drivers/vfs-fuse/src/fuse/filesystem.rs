//! Every request of the kernel, answered from the union.
//!
//! What was found out about the kernel (6.18) and is relied on here:
//! * After ESTALE at an open it looks the name up twice, with one FORGET of the new id in between, and opens again. An
//!   open through `/proc/self/fd` has no name to look up: there ESTALE reaches the caller.
//! * With HANDLE_KILLPRIV_V2 it asks once per inode for `security.capability`, and before the first write to a
//!   set-user-id file, also by passthrough, sends SETATTR with nothing in it. File capabilities it removes by itself,
//!   and then sends that SETATTR too, also where set-user-id is to stay since root writes. chown(2) without ids sends
//!   the same, by the writeback cache with the change time in it.
//!   Without the flag every write by passthrough costs a GETXATTR.
//! * `opendir` answered by ENOSYS: no OPENDIR and RELEASEDIR any more, and an unchanged directory is listed again
//!   without a request. After a change in it through the mount it is read anew.
//! * `open` answered by ENOSYS: no OPEN and RELEASE any more, not after CREATE either, and the page cache stays.
//!   O_TRUNC comes as SETATTR, unless ATOMIC_O_TRUNC was agreed on: then nobody truncates.
//! * With the writeback cache it sends modification times after the data (SETATTR with mtime and ctime), and data may
//!   come after the unlink. Before it changes mode, owner or times it sends the data, but not before it sets an xattr.

use super::{
    convert::{dirent_type, dot, entry_attr, errno, file_attr, negative, time_to_set},
    io::{FileIo, Open, with_buffer},
    io_mode::Answer,
    pool::Pool,
    wake::Requests,
};
use crate::union::{Attr, Caller, Data, DirEntry, Entry, SetAttr, Union};
use fuser::{
    BsdFileFlags, CopyFileRangeFlags, Errno, FileHandle, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    IoctlFlags, KernelConfig, LockOwner, Notifier, OpenFlags, PollEvents, PollFlags, PollNotifier, RenameFlags,
    ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl,
    ReplyLseek, ReplyOpen, ReplyPoll, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use rustix::io::Result;
use std::{
    ffi::OsStr,
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    sync::{Arc, OnceLock},
    time::{Duration, SystemTime},
};

/// An fallocate of more may write that much.
const LARGE_FALLOCATE: u64 = 16 << 20;

/// The union behind fuser's face.
pub struct Vfs {
    inner: Arc<Inner>,
    pool: Arc<Pool>,
    /// Apart, as they wait for writes, which may be answered by the other.
    seeks: Arc<Pool>,
    requests: Arc<Requests>,
}

struct Inner {
    union: Arc<Union>,
    io: FileIo,
    no_opendir: bool,
    ttl: Duration,
}

impl Vfs {
    /// The filesystem, which counts its requests, and where the session's notifier is to be put.
    pub fn new(union: Arc<Union>, requests: Arc<Requests>) -> (Vfs, Arc<OnceLock<Notifier>>) {
        let notifier = Arc::new(OnceLock::new());
        let io = FileIo::new(union.clone(), notifier.clone());
        let inner = Inner { ttl: union.ttl(), union, io, no_opendir: false };
        (Vfs { inner: Arc::new(inner), pool: Arc::default(), seeks: Arc::default(), requests }, notifier)
    }

    /// Answers a request on this thread.
    fn now(&self, request: &'static str, answer: impl FnOnce(&Inner)) {
        self.requests.one_more();
        guarded(request, || answer(&self.inner));
    }

    /// Answers a request that may take long: on a thread of its own, if so.
    fn here_or_aside(&self, slow: bool, request: &'static str, answer: impl FnOnce(&Inner) + Send + 'static) {
        if !slow {
            return self.now(request, answer);
        }
        let inner = self.inner.clone();
        self.pool.run(move || guarded(request, || answer(&inner)));
    }

    fn is_slow(&self, ino: INodeNo) -> bool {
        self.guess(|inner| inner.io.is_slow_to_change(ino.0))
    }

    /// Whether renaming this would copy much first.
    fn is_slow_name(&self, parent: INodeNo, name: &OsStr) -> bool {
        self.guess(|inner| {
            let Ok(entry) = inner.union.lookup(parent.0, name) else { return false };
            let slow = inner.union.is_slow(entry.id);
            inner.union.forget(entry.id, 1);
            slow
        })
    }

    fn guess(&self, ask: impl FnOnce(&Inner) -> bool) -> bool {
        let mut slow = false;
        guarded("is_slow", || slow = ask(&self.inner));
        slow
    }
}

/// A bug in one request must not end the thread that serves, and so by and by the mount. The reply that is dropped on
/// the way answers EIO.
fn guarded(request: &'static str, answer: impl FnOnce()) {
    if catch_unwind(AssertUnwindSafe(answer)).is_err() {
        tracing::error!("a bug: the request {request} panicked and was answered with an I/O error");
    }
}

fn caller(request: &Request, umask: u32) -> Caller {
    Caller { uid: request.uid(), gid: request.gid(), umask }
}

impl Inner {
    /// How long attributes given for this id may be kept. A file the kernel knows as two inodes must be asked for each
    /// time: a change through one is not noticed at the other.
    fn attr_ttl(&self, id: u64, attr: &Attr) -> Duration {
        let renewed = id != attr.ino && id != INodeNo::ROOT.0;
        if self.io.tell(id, attr) || renewed { Duration::ZERO } else { self.ttl }
    }

    fn send_entry(&self, reply: ReplyEntry, entry: Result<Entry>) {
        match entry {
            Ok(e) => reply.entry_with_ttls(
                &self.attr_ttl(e.id, &e.attr),
                &self.ttl,
                &entry_attr(&e),
                Generation(e.generation),
            ),
            Err(e) => reply.error(errno(e)),
        }
    }

    fn send_attr(&self, reply: ReplyAttr, id: u64, attr: Result<Attr>) {
        match attr {
            Ok(attr) => reply.attr(&self.attr_ttl(id, &attr), &file_attr(&attr, attr.ino)),
            Err(e) => reply.error(errno(e)),
        }
    }

    fn lookup(&self, parent: u64, name: &OsStr, reply: ReplyEntry) {
        match self.union.lookup(parent, name) {
            // Remembered as well: names that are not there are asked for again and again.
            Err(rustix::io::Errno::NOENT) => reply.entry(&self.ttl, &negative(), Generation(0)),
            entry => self.send_entry(reply, entry),
        }
    }

    fn forget(&self, id: u64, count: u64) {
        self.io.forget(id);
        self.union.forget(id, count);
    }

    fn open(&self, open: Open, reply: ReplyOpen) {
        match self.io.open(open, |fd| reply.open_backing(fd)) {
            Ok(Answer::Passthrough(backing)) => {
                reply.opened_passthrough(FileHandle(0), FopenFlags::FOPEN_NOFLUSH, &backing);
            }
            Ok(answer) => reply.opened(FileHandle(0), cached_flags(&answer)),
            Err(e) => reply.error(errno(e)),
        }
    }

    fn create(&self, parent: u64, name: &OsStr, mode: u32, caller: Caller, reply: ReplyCreate) {
        match self.union.create(parent, name, mode, caller) {
            Ok((entry, data)) => self.send_created(entry, data, reply),
            Err(e) => reply.error(errno(e)),
        }
    }

    /// By passthrough also for small files: measured, that costs less than one WRITE.
    fn send_created(&self, entry: Entry, data: Arc<Data>, reply: ReplyCreate) {
        let (attr, generation) = (entry_attr(&entry), Generation(entry.generation));
        self.io.made(&entry);
        let opened = self.io.open_new(entry.id, data, |fd| reply.open_backing(fd));
        self.io.tell(entry.id, &entry.attr);
        match opened {
            Answer::Passthrough(backing) => reply.created_passthrough(
                &self.ttl,
                &attr,
                generation,
                FileHandle(0),
                FopenFlags::FOPEN_NOFLUSH,
                &backing,
            ),
            // A number that was another file's, and that file is still open.
            Answer::Renew | Answer::Stale => reply.error(Errno::EIO),
            cached @ Answer::Cached { .. } => {
                reply.created(&self.ttl, &attr, generation, FileHandle(0), cached_flags(&cached));
            }
        }
    }

    fn readdir_plus(&self, id: u64, offset: u64, mut reply: ReplyDirectoryPlus) {
        let listed = self.union.readdir_plus(id, offset, &mut |name, entry| !self.add_plus(&mut reply, &name, entry));
        match listed {
            Ok(()) => reply.ok(),
            Err(e) => reply.error(errno(e)),
        }
    }

    /// Whether the reply is full, so that the name is not in it.
    fn add_plus(&self, reply: &mut ReplyDirectoryPlus, name: &DirEntry<'_>, entry: Option<Entry>) -> bool {
        let ino = INodeNo(name.ino);
        match entry {
            Some(e) => {
                // One duration for name and attributes is all that fuser offers here.
                let ttl = self.attr_ttl(e.id, &e.attr);
                reply.add(ino, name.offset, name.name, &ttl, &entry_attr(&e), Generation(e.generation))
            }
            None if name.name == "." || name.name == ".." => {
                let attr = dot(name.ino, dirent_type(name.kind));
                reply.add(ino, name.offset, name.name, &Duration::ZERO, &attr, Generation(0))
            }
            // Gone in the meantime. It cannot be listed without a node id, since fuser would show number 0.
            None => false,
        }
    }

    fn readdir(&self, id: u64, offset: u64, mut reply: ReplyDirectory) {
        let listed = self.union.readdir(id, offset, &mut |name| {
            !reply.add(INodeNo(name.ino), name.offset, dirent_type(name.kind), name.name)
        });
        match listed {
            Ok(()) => reply.ok(),
            Err(e) => reply.error(errno(e)),
        }
    }

    fn statfs(&self, reply: ReplyStatfs) {
        match self.union.statfs() {
            Ok(s) => reply.statfs(
                s.f_blocks,
                s.f_bfree,
                s.f_bavail,
                s.f_files,
                s.f_ffree,
                s.f_bsize as u32,
                s.f_namemax as u32,
                s.f_frsize as u32,
            ),
            Err(e) => reply.error(errno(e)),
        }
    }
}

/// FLUSH has nothing to do here, and this flag saves asking at all.
fn cached_flags(answer: &Answer<fuser::BackingId>) -> FopenFlags {
    match answer {
        Answer::Cached { keep: true } => FopenFlags::FOPEN_NOFLUSH | FopenFlags::FOPEN_KEEP_CACHE,
        _ => FopenFlags::FOPEN_NOFLUSH,
    }
}

fn send_empty(reply: ReplyEmpty, result: Result<()>) {
    match result {
        Ok(()) => reply.ok(),
        Err(e) => reply.error(errno(e)),
    }
}

/// Xattrs are asked for twice: for the length with size 0, then for the value.
fn send_xattr(reply: ReplyXattr, size: u32, value: Result<Vec<u8>>) {
    match value {
        Ok(value) if size == 0 => reply.size(value.len() as u32),
        Ok(value) if value.len() > size as usize => reply.error(Errno::ERANGE),
        Ok(value) => reply.data(&value),
        Err(e) => reply.error(errno(e)),
    }
}

impl Filesystem for Vfs {
    fn init(&mut self, _request: &Request, kernel: &mut KernelConfig) -> io::Result<()> {
        let inner = Arc::get_mut(&mut self.inner).expect("nothing is served before init");
        let wanted = super::negotiate::wanted(&inner.union, kernel.capabilities(), kernel.kernel_abi());
        inner.no_opendir = wanted.flags.contains(InitFlags::FUSE_NO_OPENDIR_SUPPORT);
        inner.io.settings = wanted.io;
        kernel.add_capabilities(wanted.flags).expect("only what is offered is wanted");
        if wanted.io.passthrough {
            kernel.set_max_stack_depth(wanted.stack_depth).expect("1 or 2");
        }
        // Readahead and writeback of many files at once.
        kernel.set_max_background(64).expect("not 0");
        tracing::debug!("the kernel offers {:?}, taken are {:?}", kernel.capabilities(), wanted.flags);
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        self.now("lookup", |fs| fs.lookup(parent.0, name, reply));
    }

    fn forget(&self, _request: &Request, ino: INodeNo, count: u64) {
        // Not counted: many come at once, and nobody waits for them.
        guarded("forget", || self.inner.forget(ino.0, count));
    }

    fn getattr(&self, _request: &Request, ino: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        self.now("getattr", |fs| fs.send_attr(reply, ino.0, fs.union.getattr(ino.0)));
    }

    fn setattr(
        &self,
        request: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        handle: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let set = SetAttr { mode, uid, gid, size, atime: atime.map(time_to_set), mtime: mtime.map(time_to_set) };
        let caller = caller(request, 0);
        self.here_or_aside(self.is_slow(ino), "setattr", move |fs| {
            let by_name = set == SetAttr { size: set.size, ..SetAttr::default() } && handle.is_none();
            let attr = match set.size.filter(|_| by_name) {
                Some(size) => fs.io.truncate(ino.0, size, caller),
                None => fs.io.setattr(ino.0, &set, caller),
            };
            fs.send_attr(reply, ino.0, attr);
        });
    }

    fn readlink(&self, _request: &Request, ino: INodeNo, reply: ReplyData) {
        self.now("readlink", |fs| match fs.union.readlink(ino.0) {
            Ok(target) => reply.data(&target),
            Err(e) => reply.error(errno(e)),
        });
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        let caller = caller(request, umask);
        self.now("mknod", |fs| {
            let made = fs.union.mknod(parent.0, name, mode, rdev.into(), caller);
            made.iter().for_each(|entry| fs.io.made(entry));
            fs.send_entry(reply, made);
        });
    }

    fn mkdir(&self, request: &Request, parent: INodeNo, name: &OsStr, mode: u32, umask: u32, reply: ReplyEntry) {
        let caller = caller(request, umask);
        self.now("mkdir", |fs| fs.send_entry(reply, fs.union.mkdir(parent.0, name, mode, caller)));
    }

    fn symlink(&self, request: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        let caller = caller(request, 0);
        self.now("symlink", |fs| {
            fs.send_entry(reply, fs.union.symlink(parent.0, name, target.as_os_str(), caller));
        });
    }

    fn link(&self, _request: &Request, ino: INodeNo, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let name = name.to_owned();
        self.here_or_aside(self.is_slow(ino), "link", move |fs| {
            fs.send_entry(reply, fs.union.link(ino.0, parent.0, &name));
        });
    }

    fn unlink(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.now("unlink", |fs| send_empty(reply, fs.union.unlink(parent.0, name)));
    }

    fn rmdir(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.now("rmdir", |fs| send_empty(reply, fs.union.rmdir(parent.0, name)));
    }

    fn rename(
        &self,
        _request: &Request,
        parent: INodeNo,
        name: &OsStr,
        to: INodeNo,
        to_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let exchange = flags.contains(RenameFlags::RENAME_EXCHANGE);
        let slow = self.is_slow_name(parent, name) || exchange && self.is_slow_name(to, to_name);
        let (name, to_name) = (name.to_owned(), to_name.to_owned());
        self.here_or_aside(slow, "rename", move |fs| {
            send_empty(reply, fs.union.rename(parent.0, &name, to.0, &to_name, flags.bits()));
        });
    }

    fn open(&self, request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        if self.inner.io.settings.no_open {
            return reply.error(Errno::ENOSYS);
        }
        let write = flags.0 & libc::O_ACCMODE != libc::O_RDONLY;
        let truncate = flags.0 & libc::O_TRUNC != 0;
        let open = Open { id: ino.0, write, truncate, caller: caller(request, 0) };
        let slow = (write || truncate) && self.is_slow(ino);
        self.here_or_aside(slow, "open", move |fs| fs.open(open, reply));
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        let caller = caller(request, umask);
        self.now("create", |fs| fs.create(parent.0, name, mode, caller, reply));
    }

    fn release(
        &self,
        _request: &Request,
        ino: INodeNo,
        _handle: FileHandle,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.now("release", |fs| {
            fs.io.release(ino.0, flags.0 & libc::O_ACCMODE != libc::O_RDONLY);
            reply.ok();
        });
    }

    /// Never needed: writes are not held back here. After this answer the kernel does not ask again.
    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn read(
        &self,
        _request: &Request,
        ino: INodeNo,
        _handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.now("read", |fs| {
            with_buffer(size as usize, |buffer| match fs.io.read(ino.0, buffer, offset) {
                Ok(n) => reply.data(&buffer[..n]),
                Err(e) => reply.error(errno(e)),
            });
        });
    }

    fn write(
        &self,
        request: &Request,
        ino: INodeNo,
        _handle: FileHandle,
        offset: u64,
        bytes: &[u8],
        write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let kill = write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID).then(|| caller(request, 0));
        let answer = move |fs: &Inner, bytes: &[u8]| match fs.io.write(ino.0, bytes, offset, kill) {
            Ok(()) => reply.written(bytes.len() as u32),
            Err(e) => reply.error(errno(e)),
        };
        if self.is_slow(ino) {
            let bytes = bytes.to_vec();
            self.here_or_aside(true, "write", move |fs| answer(fs, &bytes));
        } else {
            self.now("write", |fs| answer(fs, bytes));
        }
    }

    fn fsync(&self, _request: &Request, ino: INodeNo, _handle: FileHandle, data_only: bool, reply: ReplyEmpty) {
        // The kernel takes ENOSYS for "nothing to do" and does not ask again.
        if self.inner.union.config().volatile {
            return reply.error(Errno::ENOSYS);
        }
        self.here_or_aside(true, "fsync", move |fs| send_empty(reply, fs.io.sync(ino.0, data_only)));
    }

    fn fsyncdir(&self, _request: &Request, ino: INodeNo, _handle: FileHandle, _data_only: bool, reply: ReplyEmpty) {
        if self.inner.union.config().volatile {
            return reply.error(Errno::ENOSYS);
        }
        self.here_or_aside(true, "fsyncdir", move |fs| send_empty(reply, fs.union.fsync_dir(ino.0)));
    }

    fn opendir(&self, _request: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        if self.inner.no_opendir {
            reply.error(Errno::ENOSYS);
        } else {
            reply.opened(FileHandle(0), FopenFlags::FOPEN_CACHE_DIR);
        }
    }

    fn readdir(&self, _request: &Request, ino: INodeNo, _handle: FileHandle, offset: u64, reply: ReplyDirectory) {
        self.now("readdir", |fs| fs.readdir(ino.0, offset, reply));
    }

    fn readdirplus(
        &self,
        _request: &Request,
        ino: INodeNo,
        _handle: FileHandle,
        offset: u64,
        reply: ReplyDirectoryPlus,
    ) {
        self.now("readdirplus", |fs| fs.readdir_plus(ino.0, offset, reply));
    }

    fn statfs(&self, _request: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        self.now("statfs", |fs| fs.statfs(reply));
    }

    fn setxattr(
        &self,
        _request: &Request,
        ino: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        if self.inner.union.config().no_xattrs {
            return reply.error(Errno::ENOSYS);
        }
        // Data that the kernel still has would come after this and take them away again.
        let gather = self.inner.io.settings.writeback && name == "security.capability";
        let (name, value) = (name.to_owned(), value.to_owned());
        self.here_or_aside(gather || self.is_slow(ino), "setxattr", move |fs| {
            if gather {
                fs.io.gather(ino.0);
            }
            send_empty(reply, fs.union.setxattr(ino.0, &name, &value, flags as u32));
        });
    }

    fn getxattr(&self, _request: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        // The kernel remembers this answer, and says EOPNOTSUPP by itself.
        if self.inner.union.config().no_xattrs {
            return reply.error(Errno::ENOSYS);
        }
        self.now("getxattr", |fs| send_xattr(reply, size, fs.union.getxattr(ino.0, name)));
    }

    fn listxattr(&self, request: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        if self.inner.union.config().no_xattrs {
            return reply.error(Errno::ENOSYS);
        }
        self.now("listxattr", |fs| send_xattr(reply, size, fs.union.listxattr(ino.0, request.uid() == 0)));
    }

    fn removexattr(&self, _request: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        if self.inner.union.config().no_xattrs {
            return reply.error(Errno::ENOSYS);
        }
        let name = name.to_owned();
        self.here_or_aside(self.is_slow(ino), "removexattr", move |fs| {
            send_empty(reply, fs.io.removexattr(ino.0, &name));
        });
    }

    fn fallocate(
        &self,
        _request: &Request,
        ino: INodeNo,
        _handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let slow = length >= LARGE_FALLOCATE || self.is_slow(ino);
        self.here_or_aside(slow, "fallocate", move |fs| {
            send_empty(reply, fs.io.fallocate(ino.0, mode as u32, offset, length));
        });
    }

    fn lseek(
        &self,
        _request: &Request,
        ino: INodeNo,
        _handle: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let inner = self.inner.clone();
        self.seeks.run(move || {
            guarded("lseek", || match inner.io.seek(ino.0, offset as u64, whence) {
                Ok(offset) => reply.offset(offset as i64),
                Err(e) => reply.error(errno(e)),
            });
        });
    }

    fn copy_file_range(
        &self,
        _request: &Request,
        from: INodeNo,
        _from_handle: FileHandle,
        from_offset: u64,
        to: INodeNo,
        _to_handle: FileHandle,
        to_offset: u64,
        length: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        self.here_or_aside(true, "copy_file_range", move |fs| {
            match fs.io.copy((from.0, from_offset), (to.0, to_offset), length) {
                Ok(n) => reply.written(n as u32),
                Err(e) => reply.error(errno(e)),
            }
        });
    }

    fn ioctl(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _handle: FileHandle,
        _flags: IoctlFlags,
        _command: u32,
        _input: &[u8],
        _output_size: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
    }

    /// Files are always ready. After this answer the kernel does not ask again.
    fn poll(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _handle: FileHandle,
        _notifier: PollNotifier,
        _events: PollEvents,
        _flags: PollFlags,
        reply: ReplyPoll,
    ) {
        reply.error(Errno::ENOSYS);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bug_in_a_request_does_not_end_the_thread() {
        let mut after = false;
        guarded("test", || panic!("a bug, as the test wants it"));
        guarded("test", || after = true);
        assert!(after);
    }
}
