//! One of the trees that are compared: does an operation and tells what came of it.

use super::{
    op::{Bytes, Change, Op, SLOTS, Step},
    stack, sys,
    tree::{self, Stat},
};
use rustix::{
    fs::{self, Access, AtFlags, Gid, Mode, OFlags, RawDir, SeekFrom, Timespec, Timestamps, Uid},
    io::{Errno, Result},
};
use std::{
    collections::BTreeMap,
    ffi::{OsStr, OsString},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

/// What an operation returned.
#[derive(Debug, PartialEq)]
pub enum Value {
    Nothing,
    Number(u64),
    Bytes(Vec<u8>),
    Names(Vec<OsString>),
    Stat(Box<Stat>),
}

/// What a reader saw of a directory that changed meanwhile, broken down to what every filesystem must do.
#[derive(Debug, Default)]
struct Reader {
    before: Vec<OsString>,
    after: Vec<OsString>,
    seen: Vec<OsString>,
}

pub struct Side {
    root: OwnedFd,
    pub path: PathBuf,
    slots: [Option<OwnedFd>; SLOTS],
}

impl Side {
    pub fn new(path: &Path) -> Side {
        let root = fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap();
        Side { root, path: path.into(), slots: Default::default() }
    }

    pub fn slot(&self, slot: usize) -> Result<BorrowedFd<'_>> {
        self.slots[slot].as_ref().map(OwnedFd::as_fd).ok_or(Errno::BADF)
    }

    pub fn open_slots(&self) -> [bool; SLOTS] {
        self.slots.each_ref().map(Option::is_some)
    }

    /// Does it as the user, with the umask.
    pub fn step(&mut self, step: &Step) -> Result<Value> {
        fs_user(step.user);
        rustix::process::umask(Mode::from_raw_mode(step.umask));
        let value = self.run(&step.op);
        fs_user(0);
        rustix::process::umask(Mode::from_raw_mode(0o022));
        value
    }

    fn open(&self, path: &Path, flags: OFlags, mode: u32) -> Result<OwnedFd> {
        // NONBLOCK: nobody is at the other end of a fifo.
        fs::openat(&self.root, path, flags | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::from_raw_mode(mode))
    }

    fn full(&self, path: &Path) -> PathBuf {
        self.path.join(path)
    }

    fn run(&mut self, op: &Op) -> Result<Value> {
        let nothing = |()| Value::Nothing;
        match op {
            Op::Stat { path, follow } => {
                let stat = fs::statat(&self.root, path, nofollow(*follow))?;
                Ok(Value::Stat(Box::new(Stat::from(&stat))))
            }
            Op::Fstat { slot } => Ok(Value::Stat(Box::new(Stat::from(&fs::fstat(self.slot(*slot)?)?)))),
            Op::Access { path, mode } => {
                let access = Access::from_bits_truncate(*mode);
                fs::accessat(&self.root, path, access, AtFlags::EACCESS).map(nothing)
            }
            Op::Readlink { path } => Ok(Value::Bytes(fs::readlinkat(&self.root, path, Vec::new())?.into_bytes())),
            Op::Statfs => Ok(Value::Number(fs::fstatvfs(&self.root)?.f_namemax)),
            Op::Readdir { path } => {
                let mut names: Vec<_> = tree::list(&self.root, path)?.into_iter().map(|entry| entry.name).collect();
                names.sort();
                Ok(Value::Names(names))
            }
            Op::ReaddirWhile { path, take, changes } => self.readdir_while(path, *take, changes),
            Op::Read { .. } | Op::Write { .. } | Op::Truncate { .. } => self.data_by_name(op),
            Op::Open { .. } | Op::Close { .. } => self.open_or_close(op).map(nothing),
            Op::Chmod { .. } | Op::Chown { .. } | Op::Utimens { .. } => self.attributes(op).map(nothing),
            Op::Fchmod { slot, mode } => fs::fchmod(self.slot(*slot)?, Mode::from_raw_mode(mode.0)).map(nothing),
            Op::Fchown { slot, uid, gid } => {
                let (uid, gid) = (Uid::from_raw(*uid), Gid::from_raw(*gid));
                fs::fchown(self.slot(*slot)?, Some(uid), Some(gid)).map(nothing)
            }
            Op::SetXattr { .. } | Op::SetAcl { .. } | Op::SetCapability { .. } | Op::GetXattr { .. } => self.xattr(op),
            Op::ListXattr { .. } | Op::RemoveXattr { .. } => self.xattr(op),
            Op::Pread { .. } | Op::Pwrite { .. } | Op::Seek { .. } | Op::CopyRange { .. } => self.data(op),
            Op::Ftruncate { .. } | Op::Fallocate { .. } | Op::MmapWrite { .. } | Op::Fsync { .. } => self.data(op),
            _ => self.naming(op).map(nothing),
        }
    }

    fn naming(&mut self, op: &Op) -> Result<()> {
        let root = &self.root;
        match op {
            Op::Mkdir { path, mode } => fs::mkdirat(root, path, Mode::from_raw_mode(mode.0)),
            Op::Rmdir { path } => fs::unlinkat(root, path, AtFlags::REMOVEDIR),
            Op::Unlink { path } => fs::unlinkat(root, path, AtFlags::empty()),
            Op::RemoveTree { path } => remove_tree(root.as_fd(), path),
            Op::Symlink { target, path } => fs::symlinkat(target, root, path),
            Op::Link { from, to, follow } => {
                let flags = if *follow { AtFlags::SYMLINK_FOLLOW } else { AtFlags::empty() };
                fs::linkat(root, from, root, to, flags)
            }
            Op::Mknod { path, node, mode } => stack::make_node(root, path, *node, *mode),
            Op::Rename { from, to, flags } => fs::renameat_with(root, from, root, to, *flags),
            _ => unreachable!("{op:?} changes no names"),
        }
    }

    fn open_or_close(&mut self, op: &Op) -> Result<()> {
        match op {
            Op::Open { slot, path, flags, mode } => {
                self.slots[*slot] = None;
                self.slots[*slot] = Some(self.open(path, *flags, mode.0)?);
                Ok(())
            }
            Op::Close { slot } => self.slots[*slot].take().map(drop).ok_or(Errno::BADF),
            _ => unreachable!("{op:?} opens nothing"),
        }
    }

    fn data_by_name(&self, op: &Op) -> Result<Value> {
        match op {
            Op::Read { path, offset, len } => read(self.open(path, OFlags::RDONLY, 0)?.as_fd(), *offset, *len),
            Op::Write { path, offset, bytes } => {
                let file = self.open(path, OFlags::WRONLY | OFlags::CREATE, 0o666)?;
                write(file.as_fd(), *offset, *bytes)
            }
            Op::Truncate { path, size } => {
                let done = nix::unistd::truncate(&self.full(path), *size as i64);
                done.map(|()| Value::Nothing).map_err(|e| Errno::from_raw_os_error(e as i32))
            }
            _ => unreachable!("{op:?} is no access to data by name"),
        }
    }

    fn data(&self, op: &Op) -> Result<Value> {
        let nothing = |()| Value::Nothing;
        match op {
            Op::Pread { slot, offset, len } => read(self.slot(*slot)?, *offset, *len),
            Op::Pwrite { slot, offset, bytes } => write(self.slot(*slot)?, *offset, *bytes),
            Op::Ftruncate { slot, size } => fs::ftruncate(self.slot(*slot)?, *size).map(nothing),
            Op::Fallocate { slot, flags, offset, len } => {
                fs::fallocate(self.slot(*slot)?, *flags, *offset, *len).map(nothing)
            }
            Op::Seek { slot, data, offset } => {
                let whence = if *data { SeekFrom::Data(*offset) } else { SeekFrom::Hole(*offset) };
                fs::seek(self.slot(*slot)?, whence).map(Value::Number)
            }
            Op::CopyRange { from, to, offset_in, offset_out, len } => {
                copy(self.slot(*from)?, *offset_in, self.slot(*to)?, *offset_out, *len)
            }
            Op::MmapWrite { slot, offset, bytes } => {
                sys::mmap_write(self.slot(*slot)?, *offset, &bytes.make()).map(nothing)
            }
            Op::Fsync { slot, data: true } => fs::fdatasync(self.slot(*slot)?).map(nothing),
            Op::Fsync { slot, data: false } => fs::fsync(self.slot(*slot)?).map(nothing),
            _ => unreachable!("{op:?} is no access to data"),
        }
    }

    fn attributes(&self, op: &Op) -> Result<()> {
        match op {
            Op::Chmod { path, mode } => fs::chmodat(&self.root, path, Mode::from_raw_mode(mode.0), AtFlags::empty()),
            Op::Chown { path, uid, gid, follow } => {
                let (uid, gid) = (uid.map(Uid::from_raw), gid.map(Gid::from_raw));
                fs::chownat(&self.root, path, uid, gid, nofollow(*follow))
            }
            Op::Utimens { path, atime, mtime, follow } => {
                let time = |tv_sec| Timespec { tv_sec, tv_nsec: 7 };
                let times = Timestamps { last_access: time(*atime), last_modification: time(*mtime) };
                fs::utimensat(&self.root, path, &times, nofollow(*follow))
            }
            _ => unreachable!("{op:?} changes no attributes"),
        }
    }

    fn xattr(&self, op: &Op) -> Result<Value> {
        let nothing = |()| Value::Nothing;
        let set = |path: &Path, name: &str, value: &[u8], flags: u32| {
            fs::lsetxattr(self.full(path), name, value, fs::XattrFlags::from_bits_retain(flags)).map(nothing)
        };
        match op {
            Op::SetXattr { path, name, value, flags } => set(path, name, &value.make(), *flags),
            Op::SetAcl { path, default, acl } => {
                let name = if *default { "system.posix_acl_default" } else { "system.posix_acl_access" };
                set(path, name, &acl.bytes(), 0)
            }
            Op::SetCapability { path } => {
                // Revision 2, CAP_NET_RAW permitted and effective.
                let mut value = [0u8; 20];
                value[..8].copy_from_slice(&[1, 0, 0, 2, 0, 0x20, 0, 0]);
                set(path, "security.capability", &value, 0)
            }
            Op::GetXattr { path, name } => {
                let mut value = vec![0u8; 4096];
                let len = fs::lgetxattr(self.full(path), *name, &mut value[..])?;
                value.truncate(len);
                Ok(Value::Bytes(value))
            }
            Op::ListXattr { path } => {
                let mut names = tree::xattr_names(&self.full(path))?;
                names.sort();
                Ok(Value::Names(names))
            }
            Op::RemoveXattr { path, name } => fs::lremovexattr(self.full(path), *name).map(nothing),
            _ => unreachable!("{op:?} is about no xattr"),
        }
    }

    /// Returns the faults: a name that was there all the time must be seen once, no other more than once.
    fn readdir_while(&self, path: &Path, take: usize, changes: &[Change]) -> Result<Value> {
        let names = |dir: &OwnedFd| -> Result<Vec<OsString>> {
            Ok(tree::list(dir, Path::new("."))?.into_iter().map(|entry| entry.name).collect())
        };
        let dir = self.open(path, OFlags::RDONLY | OFlags::DIRECTORY, 0)?;
        let mut reader = Reader { before: names(&dir)?, ..Default::default() };
        let mut touched = Vec::new();
        // Small, so that the kernel asks for the rest later.
        let mut buffer = [MaybeUninit::uninit(); 320];
        let mut entries = RawDir::new(&dir, &mut buffer);
        let mut changed = false;
        while let Some(entry) = entries.next() {
            reader.seen.push(OsStr::from_bytes(entry?.file_name().to_bytes()).to_owned());
            if !changed && reader.seen.len() >= take {
                changed = true;
                changes.iter().for_each(|change| self.change(&dir, change, &mut touched));
            }
        }
        reader.seen.retain(|name| name != "." && name != "..");
        reader.after = names(&dir)?;
        let mut faults = reader.faults(&touched);
        faults.sort();
        Ok(Value::Names(faults))
    }

    fn change(&self, dir: &OwnedFd, change: &Change, touched: &mut Vec<OsString>) {
        // Whether they work is compared at the end, by what is in the directory.
        let _ = match change {
            Change::Create(name) => {
                touched.push(name.clone());
                // NONBLOCK: another thread may have put a fifo there.
                let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
                fs::openat(dir, name, flags, Mode::RUSR).map(drop)
            }
            Change::Remove(name) => {
                touched.push(name.clone());
                fs::unlinkat(dir, name, AtFlags::empty())
            }
            Change::Rename(from, to) => {
                touched.extend([from.clone(), to.clone()]);
                fs::renameat(dir, from, dir, to)
            }
        };
    }
}

impl Reader {
    fn faults(&self, touched: &[OsString]) -> Vec<OsString> {
        let mut times: BTreeMap<&OsString, usize> = BTreeMap::new();
        self.seen.iter().for_each(|name| *times.entry(name).or_default() += 1);
        let stayed = self.before.iter().filter(|name| self.after.contains(name) && !touched.contains(name));
        let missed = stayed.filter(|name| !times.contains_key(name)).map(|name| ("missed", name));
        // A name that went and came may be seen as the old and as the new one.
        let twice = times.iter().filter(|(name, times)| **times > 1 && !touched.contains(name));
        let twice = twice.map(|(name, _)| ("twice", *name));
        missed.chain(twice).map(|(what, name)| OsString::from(format!("{what}: {}", name.display()))).collect()
    }
}

/// Permissions are checked for this user from now on, in this thread. The group follows.
fn fs_user(id: u32) {
    nix::unistd::setfsgid(id.into());
    nix::unistd::setfsuid(id.into());
}

fn nofollow(follow: bool) -> AtFlags {
    if follow { AtFlags::empty() } else { AtFlags::SYMLINK_NOFOLLOW }
}

fn read(fd: BorrowedFd<'_>, offset: u64, len: usize) -> Result<Value> {
    let mut bytes = vec![0u8; len];
    let mut done = 0;
    while done < len {
        match rustix::io::pread(fd, &mut bytes[done..], offset + done as u64)? {
            0 => break,
            n => done += n,
        }
    }
    bytes.truncate(done);
    Ok(Value::Bytes(bytes))
}

fn write(fd: BorrowedFd<'_>, offset: u64, bytes: Bytes) -> Result<Value> {
    let bytes = bytes.make();
    let mut done = 0;
    while done < bytes.len() {
        done += rustix::io::pwrite(fd, &bytes[done..], offset + done as u64)?;
    }
    Ok(Value::Number(done as u64))
}

fn copy(from: BorrowedFd<'_>, mut at: u64, to: BorrowedFd<'_>, mut to_at: u64, len: usize) -> Result<Value> {
    let mut done = 0;
    while done < len {
        match fs::copy_file_range(from, Some(&mut at), to, Some(&mut to_at), len - done)? {
            0 => break,
            n => done += n,
        }
    }
    Ok(Value::Number(done as u64))
}

fn remove_tree(root: BorrowedFd<'_>, path: &Path) -> Result<()> {
    match fs::unlinkat(root, path, AtFlags::empty()) {
        Err(Errno::ISDIR) => {}
        other => return other,
    }
    let mut entries = tree::list(root, path)?;
    // In an order of names, so that a failure in the middle leaves the same.
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    entries.iter().try_for_each(|entry| remove_tree(root, &path.join(&entry.name)))?;
    fs::unlinkat(root, path, AtFlags::REMOVEDIR)
}

/// All of a file, for later comparison.
pub fn content(fd: BorrowedFd<'_>) -> Result<Vec<u8>> {
    // A descriptor of its own, since this may be open for writing only.
    let again =
        fs::open(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd)), OFlags::RDONLY, Mode::empty())?;
    match read(again.as_fd(), 0, 4 << 20)? {
        Value::Bytes(bytes) => Ok(bytes),
        _ => unreachable!("reading gives bytes"),
    }
}
