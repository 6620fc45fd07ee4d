//! Operations, and which ones are drawn.

use proptest::{collection::vec, prelude::*, sample::select};
use rustix::fs::{FallocateFlags, OFlags, RenameFlags};
use std::{ffi::OsString, fmt, os::unix::ffi::OsStringExt, path::PathBuf};

/// How many descriptors a sequence keeps open.
pub const SLOTS: usize = 4;

/// An operation, and as whom.
#[derive(Clone)]
pub struct Step {
    pub user: u32,
    pub umask: u32,
    pub op: Op,
}

impl fmt::Debug for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "as {} umask {:03o}: {:?}", self.user, self.umask, self.op)
    }
}

/// A mode, shown in octal.
#[derive(Clone, Copy, PartialEq)]
pub struct Perm(pub u32);

impl fmt::Debug for Perm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "0o{:o}", self.0)
    }
}

/// Bytes that tell where they were meant to be: the same for the same seed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bytes {
    pub len: usize,
    pub seed: u8,
}

impl Bytes {
    pub fn make(self) -> Vec<u8> {
        // Never zero, so that a hole is not taken for data.
        (0..self.len).map(|i| (i / 64 * 7 + i + self.seed as usize) as u8 | 1).collect()
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Node {
    Fifo,
    Socket,
    /// Number 3 is `/dev/null`, others do not exist.
    Char(u32),
}

/// What happens to names of a directory while somebody reads it.
#[derive(Clone, Debug)]
pub enum Change {
    Create(OsString),
    Remove(OsString),
    Rename(OsString, OsString),
}

#[derive(Clone, Debug)]
pub enum Op {
    Mkdir { path: PathBuf, mode: Perm },
    Rmdir { path: PathBuf },
    Unlink { path: PathBuf },
    RemoveTree { path: PathBuf },
    Symlink { target: PathBuf, path: PathBuf },
    Link { from: PathBuf, to: PathBuf, follow: bool },
    Mknod { path: PathBuf, node: Node, mode: Perm },
    Rename { from: PathBuf, to: PathBuf, flags: RenameFlags },
    Write { path: PathBuf, offset: u64, bytes: Bytes },
    Truncate { path: PathBuf, size: u64 },
    Read { path: PathBuf, offset: u64, len: usize },
    Chmod { path: PathBuf, mode: Perm },
    Chown { path: PathBuf, uid: Option<u32>, gid: Option<u32>, follow: bool },
    Utimens { path: PathBuf, atime: i64, mtime: i64, follow: bool },
    SetXattr { path: PathBuf, name: &'static str, value: Bytes, flags: u32 },
    SetAcl { path: PathBuf, default: bool, acl: Acl },
    SetCapability { path: PathBuf },
    GetXattr { path: PathBuf, name: &'static str },
    ListXattr { path: PathBuf },
    RemoveXattr { path: PathBuf, name: &'static str },
    Readdir { path: PathBuf },
    ReaddirWhile { path: PathBuf, take: usize, changes: Vec<Change> },
    Stat { path: PathBuf, follow: bool },
    Access { path: PathBuf, mode: u32 },
    Readlink { path: PathBuf },
    Statfs,
    Open { slot: usize, path: PathBuf, flags: OFlags, mode: Perm },
    Close { slot: usize },
    Pread { slot: usize, offset: u64, len: usize },
    Pwrite { slot: usize, offset: u64, bytes: Bytes },
    Ftruncate { slot: usize, size: u64 },
    Fallocate { slot: usize, flags: FallocateFlags, offset: u64, len: u64 },
    Seek { slot: usize, data: bool, offset: u64 },
    CopyRange { from: usize, to: usize, offset_in: u64, offset_out: u64, len: usize },
    MmapWrite { slot: usize, offset: u64, bytes: Bytes },
    Fstat { slot: usize },
    Fchmod { slot: usize, mode: Perm },
    Fchown { slot: usize, uid: u32, gid: u32 },
    Fsync { slot: usize, data: bool },
}

/// A POSIX ACL: the usual three, one named user, one named group, a mask.
#[derive(Clone, Copy, Debug)]
pub struct Acl {
    owner: u16,
    user_1000: u16,
    group: u16,
    mask: u16,
    other: u16,
}

impl Acl {
    /// As the xattr `system.posix_acl_*` has it.
    pub fn bytes(self) -> Vec<u8> {
        const NOBODY: u32 = u32::MAX;
        let entries = [
            (0x01u16, self.owner, NOBODY),
            (0x02, self.user_1000, 1000),
            (0x04, self.group, NOBODY),
            (0x08, self.group ^ 2, 1000),
            (0x10, self.mask, NOBODY),
            (0x20, self.other, NOBODY),
        ];
        let mut bytes = 2u32.to_le_bytes().to_vec();
        for (tag, perm, id) in entries {
            bytes.extend(tag.to_le_bytes().into_iter().chain(perm.to_le_bytes()).chain(id.to_le_bytes()));
        }
        bytes
    }
}

fn acl() -> impl Strategy<Value = Acl> {
    (0..8u16, 0..8u16, 0..8u16, 0..8u16, 0..8u16).prop_map(|(owner, user_1000, group, mask, other)| Acl {
        owner,
        user_1000,
        group,
        mask,
        other,
    })
}

pub const XATTRS: [&str; 8] = [
    "user.a",
    "user.b",
    "trusted.c",
    "security.capability",
    "system.posix_acl_access",
    "system.posix_acl_default",
    "user.missing",
    "nonsense",
];

/// Few names, so that operations meet.
pub fn name() -> impl Strategy<Value = OsString> {
    let odd = || vec![OsString::from_vec(b"\xff:,\\".to_vec()), OsString::from("n".repeat(255))];
    prop_oneof![12 => select(vec!["a", "b", "c", "d"]).prop_map(OsString::from), 1 => select(odd())]
}

pub fn path() -> impl Strategy<Value = PathBuf> {
    let depth = prop_oneof![3 => Just(1usize), 5 => Just(2), 3 => Just(3), 1 => Just(4)];
    let random = depth.prop_flat_map(|depth| vec(name(), depth)).prop_map(|names| names.into_iter().collect());
    let listed = select(vec!["a/big", "b/big", "a/b/linked", "b/linked", "many", "many/n05", "many/n17", "a/b", "b/a"]);
    prop_oneof![4 => random, 1 => listed.prop_map(PathBuf::from)]
}

fn path_or_root() -> impl Strategy<Value = PathBuf> {
    prop_oneof![1 => Just(PathBuf::from(".")), 20 => path()]
}

/// Downwards only: nothing that is done through a symlink may leave the tree.
pub fn target() -> impl Strategy<Value = PathBuf> {
    prop_oneof![6 => path(), 1 => Just(PathBuf::from("/nonexistent/by/all")), 1 => Just(PathBuf::from("x".repeat(3000)))]
}

pub fn mode() -> impl Strategy<Value = Perm> {
    select(vec![0o644u32, 0o755, 0o775, 0o700, 0o666, 0o4755, 0o2775, 0o6777, 0o1777, 0o2700, 0]).prop_map(Perm)
}

pub fn id() -> impl Strategy<Value = u32> {
    select(vec![0u32, 1000, 1001])
}

fn offset() -> impl Strategy<Value = u64> {
    prop_oneof![3 => 0..10_000u64, 2 => (0..100u64).prop_map(|block| block * 4096), 2 => 0..350_000u64]
}

fn size() -> impl Strategy<Value = usize> {
    prop_oneof![3 => 1..200usize, 3 => 200..10_000usize, 1 => Just(4096usize), 1 => 10_000..150_000usize]
}

fn bytes() -> impl Strategy<Value = Bytes> {
    (size(), any::<u8>()).prop_map(|(len, seed)| Bytes { len, seed })
}

fn slot() -> impl Strategy<Value = usize> {
    0..SLOTS
}

fn open_flags() -> impl Strategy<Value = OFlags> {
    let access = select(vec![OFlags::RDONLY, OFlags::WRONLY, OFlags::RDWR, OFlags::RDWR]);
    let common = select(vec![OFlags::empty(), OFlags::empty(), OFlags::CREATE, OFlags::CREATE | OFlags::EXCL]);
    let extra = vec![OFlags::APPEND, OFlags::TRUNC, OFlags::DIRECTORY, OFlags::NOFOLLOW, OFlags::SYNC, OFlags::NOATIME];
    let extra = prop_oneof![3 => Just(OFlags::empty()), 2 => select(extra.clone()), 1 => (select(extra.clone()), select(extra)).prop_map(|(a, b)| a | b)];
    (access, common, extra).prop_map(|(access, common, extra)| access | common | extra)
}

fn rename_flags() -> impl Strategy<Value = RenameFlags> {
    prop_oneof![
        6 => Just(RenameFlags::empty()),
        2 => Just(RenameFlags::EXCHANGE),
        1 => Just(RenameFlags::NOREPLACE),
        1 => Just(RenameFlags::NOREPLACE | RenameFlags::EXCHANGE)
    ]
}

fn fallocate_flags() -> impl Strategy<Value = FallocateFlags> {
    let (keep, punch, zero) = (FallocateFlags::KEEP_SIZE, FallocateFlags::PUNCH_HOLE, FallocateFlags::ZERO_RANGE);
    select(vec![FallocateFlags::empty(), keep, keep | punch, keep | punch, zero, zero | keep])
}

fn change() -> impl Strategy<Value = Change> {
    // Some of them are there (`n00` to `n39`), some are new.
    let name = || (0..60u32).prop_map(|n| OsString::from(format!("n{n:02}")));
    prop_oneof![
        name().prop_map(Change::Create),
        name().prop_map(Change::Remove),
        (name(), name()).prop_map(|(from, to)| Change::Rename(from, to)),
    ]
}

/// Changes of names.
fn naming() -> impl Strategy<Value = Op> {
    let node = prop_oneof![Just(Node::Fifo), Just(Node::Socket), Just(Node::Char(3)), Just(Node::Char(77))];
    prop_oneof![
        7 => (path(), mode()).prop_map(|(path, mode)| Op::Mkdir { path, mode }),
        4 => path_or_root().prop_map(|path| Op::Rmdir { path }),
        7 => path_or_root().prop_map(|path| Op::Unlink { path }),
        2 => path().prop_map(|path| Op::RemoveTree { path }),
        3 => (target(), path()).prop_map(|(target, path)| Op::Symlink { target, path }),
        7 => (path(), path(), any::<bool>()).prop_map(|(from, to, follow)| Op::Link { from, to, follow }),
        3 => (path(), node, mode()).prop_map(|(path, node, mode)| Op::Mknod { path, node, mode }),
        18 => (path(), path(), rename_flags()).prop_map(|(from, to, flags)| Op::Rename { from, to, flags }),
    ]
}

/// Changes of data by name.
fn writing() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => (path(), offset(), bytes()).prop_map(|(path, offset, bytes)| Op::Write { path, offset, bytes }),
        3 => (path(), offset()).prop_map(|(path, size)| Op::Truncate { path, size }),
        3 => (path(), offset(), size()).prop_map(|(path, offset, len)| Op::Read { path, offset, len }),
    ]
}

fn attributes() -> impl Strategy<Value = Op> {
    let xattr = || select(XATTRS.to_vec());
    // Seconds far in the past, so that they are told from the present.
    let time = || 0..1_000_000_000i64;
    let value =
        (prop_oneof![3 => 0..40usize, 1 => Just(2000)], any::<u8>()).prop_map(|(len, seed)| Bytes { len, seed });
    let plain = select(XATTRS[..3].to_vec());
    let flags = select(vec![0u32, 0, 1, 2]);
    prop_oneof![
        4 => (path_or_root(), mode()).prop_map(|(path, mode)| Op::Chmod { path, mode }),
        4 => (path(), prop::option::of(id()), prop::option::of(id()), any::<bool>())
            .prop_map(|(path, uid, gid, follow)| Op::Chown { path, uid, gid, follow }),
        4 => (path_or_root(), time(), time(), any::<bool>())
            .prop_map(|(path, atime, mtime, follow)| Op::Utimens { path, atime, mtime, follow }),
        4 => (path(), plain, value, flags)
            .prop_map(|(path, name, value, flags)| Op::SetXattr { path, name, value, flags }),
        3 => (path(), any::<bool>(), acl()).prop_map(|(path, default, acl)| Op::SetAcl { path, default, acl }),
        1 => path().prop_map(|path| Op::SetCapability { path }),
        1 => (path(), xattr()).prop_map(|(path, name)| Op::GetXattr { path, name }),
        2 => path_or_root().prop_map(|path| Op::ListXattr { path }),
        2 => (path(), xattr()).prop_map(|(path, name)| Op::RemoveXattr { path, name }),
    ]
}

fn looking() -> impl Strategy<Value = Op> {
    let changes = vec(change(), 1..20);
    prop_oneof![
        4 => path_or_root().prop_map(|path| Op::Readdir { path }),
        2 => (0..40usize, changes)
            .prop_map(|(take, changes)| Op::ReaddirWhile { path: "many".into(), take, changes }),
        4 => (path_or_root(), any::<bool>()).prop_map(|(path, follow)| Op::Stat { path, follow }),
        2 => (path_or_root(), 0..8u32).prop_map(|(path, mode)| Op::Access { path, mode }),
        1 => path().prop_map(|path| Op::Readlink { path }),
        1 => Just(Op::Statfs),
    ]
}

fn on_descriptors() -> impl Strategy<Value = Op> {
    let place = || (slot(), offset(), bytes());
    prop_oneof![
        12 => (slot(), path(), open_flags(), mode())
            .prop_map(|(slot, path, flags, mode)| Op::Open { slot, path, flags, mode }),
        1 => slot().prop_map(|slot| Op::Close { slot }),
        4 => (slot(), offset(), size()).prop_map(|(slot, offset, len)| Op::Pread { slot, offset, len }),
        5 => place().prop_map(|(slot, offset, bytes)| Op::Pwrite { slot, offset, bytes }),
        2 => (slot(), offset()).prop_map(|(slot, size)| Op::Ftruncate { slot, size }),
        4 => (slot(), fallocate_flags(), offset(), size())
            .prop_map(|(slot, flags, offset, len)| Op::Fallocate { slot, flags, offset, len: len as u64 }),
        2 => (slot(), any::<bool>(), offset()).prop_map(|(slot, data, offset)| Op::Seek { slot, data, offset }),
        3 => (slot(), slot(), offset(), offset(), size()).prop_map(|(from, to, offset_in, offset_out, len)| {
            Op::CopyRange { from, to, offset_in, offset_out, len }
        }),
        3 => place().prop_map(|(slot, offset, bytes)| Op::MmapWrite { slot, offset, bytes }),
        2 => slot().prop_map(|slot| Op::Fstat { slot }),
        1 => (slot(), mode()).prop_map(|(slot, mode)| Op::Fchmod { slot, mode }),
        1 => (slot(), id(), id()).prop_map(|(slot, uid, gid)| Op::Fchown { slot, uid, gid }),
        1 => (slot(), any::<bool>()).prop_map(|(slot, data)| Op::Fsync { slot, data }),
    ]
}

pub fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => naming().boxed(),
        4 => writing().boxed(),
        5 => attributes().boxed(),
        3 => looking().boxed(),
        8 => on_descriptors().boxed(),
    ]
}

pub fn steps(len: std::ops::Range<usize>) -> impl Strategy<Value = Vec<Step>> {
    let user = prop_oneof![4 => Just(0u32), 1 => Just(1000)];
    let umask = select(vec![0o022u32, 0o022, 0, 0o077]);
    vec((user, umask, op()).prop_map(|(user, umask, op)| Step { user, umask, op }), len)
}
