//! A lower layer whose one large file cannot be read past its first MiB until a gate is opened: a copy-up of it takes as
//! long as the test wants.

use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyEntry, ReplyOpen, Request,
    SessionACL,
};
use std::{
    ffi::OsStr,
    path::Path,
    sync::{Arc, Mutex},
    time::{Duration, UNIX_EPOCH},
};

/// Size of the file `big`.
pub const SIZE: u64 = 4 << 20;
const FREE: u64 = 1 << 20;

/// Requests that wait, until there is no gate any more.
#[derive(Default)]
struct Waiting {
    open: bool,
    reads: Vec<(u64, u32, ReplyData)>,
}

/// Opens and closes it.
#[derive(Clone, Default)]
pub struct Gate(Arc<Mutex<Waiting>>);

impl Gate {
    /// Mounts the layer.
    pub fn mount(&self, at: &Path) -> BackgroundSession {
        let mut config = Config::default();
        config.mount_options = vec![MountOption::RO, MountOption::DefaultPermissions];
        config.acl = SessionACL::All;
        fuser::spawn_mount(Slow(self.clone()), at, &config).unwrap()
    }

    /// Whether somebody waits.
    pub fn is_waited_for(&self) -> bool {
        !self.0.lock().unwrap().reads.is_empty()
    }

    /// Answers whoever waits or will ask.
    pub fn open(&self) {
        let mut waiting = self.0.lock().unwrap();
        waiting.open = true;
        for (offset, size, reply) in waiting.reads.drain(..) {
            reply.data(&content(offset, size));
        }
    }
}

/// What is in the file.
pub fn content(offset: u64, size: u32) -> Vec<u8> {
    (offset..SIZE.min(offset + u64::from(size))).map(|at| (at / 1000) as u8).collect()
}

struct Slow(Gate);

const FILE: INodeNo = INodeNo(2);
const TTL: Duration = Duration::from_secs(3600);

fn attr(ino: INodeNo) -> FileAttr {
    let is_file = ino == FILE;
    FileAttr {
        ino,
        size: if is_file { SIZE } else { 0 },
        blocks: if is_file { SIZE / 512 } else { 0 },
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: if is_file { FileType::RegularFile } else { FileType::Directory },
        perm: if is_file { 0o644 } else { 0o755 },
        nlink: if is_file { 1 } else { 2 },
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

impl Filesystem for Slow {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match name.to_str() {
            Some("big") => reply.entry(&TTL, &attr(FILE), Generation(0)),
            _ => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&TTL, &attr(ino));
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        // Else the kernel drops the cached pages at each open, and waits for those that are being read.
        reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let mut waiting = self.0.0.lock().unwrap();
        if waiting.open || offset + u64::from(size) <= FREE {
            reply.data(&content(offset, size));
        } else {
            waiting.reads.push((offset, size, reply));
        }
    }

    fn readdir(&self, _: &Request, _: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let entries = [
            (INodeNo::ROOT, FileType::Directory, "."),
            (INodeNo::ROOT, FileType::Directory, ".."),
            (FILE, FileType::RegularFile, "big"),
        ];
        for (n, (ino, kind, name)) in entries.into_iter().enumerate().skip(offset as usize) {
            if reply.add(ino, n as u64 + 1, kind, name) {
                break;
            }
        }
        reply.ok();
    }
}
