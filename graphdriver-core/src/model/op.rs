//! Operations on directory trees as data, and what they leave as data: so that the same change can be made to a mounted
//! directory and to the reference, and the two compared.

use crate::{Digest, FileKind, Metadata, Result, Timestamp, tar::Segment};
use rustix::io::Errno;
use std::{
    collections::BTreeMap,
    ffi::OsString,
    path::{Path, PathBuf},
};

/// One operation on a tree. Paths are relative to its root; symlinks on the way are followed beneath the root, one as
/// the last component never is. An empty path is the root, which can be changed but not made, moved or removed.
#[derive(Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Op {
    Mkdir {
        path: PathBuf,
        mode: u32,
    },
    /// Writes `data` at `offset`; a file that is not there is made with `mode`. Never shortens a file.
    Write {
        path: PathBuf,
        offset: u64,
        data: Vec<u8>,
        mode: u32,
    },
    Truncate {
        path: PathBuf,
        size: u64,
    },
    /// Makes a hole, keeping the size (`fallocate(2)`, `FALLOC_FL_PUNCH_HOLE`).
    Punch {
        path: PathBuf,
        offset: u64,
        len: u64,
    },
    Unlink {
        path: PathBuf,
    },
    Rmdir {
        path: PathBuf,
    },
    Rename {
        from: PathBuf,
        to: PathBuf,
    },
    /// `path` becomes another name of `target`.
    Link {
        target: PathBuf,
        path: PathBuf,
    },
    Symlink {
        path: PathBuf,
        target: PathBuf,
    },
    /// `kind` is a device or a FIFO.
    Mknod {
        path: PathBuf,
        kind: FileKind,
        mode: u32,
    },
    Chmod {
        path: PathBuf,
        mode: u32,
    },
    Chown {
        path: PathBuf,
        uid: u32,
        gid: u32,
    },
    Utimes {
        path: PathBuf,
        mtime: Timestamp,
    },
    SetXattr {
        path: PathBuf,
        name: OsString,
        value: Vec<u8>,
    },
    RemoveXattr {
        path: PathBuf,
        name: OsString,
    },
}

/// What the cases are written with.
#[allow(missing_docs)]
impl Op {
    pub fn mkdir(path: impl Into<PathBuf>) -> Op {
        Op::Mkdir { path: path.into(), mode: 0o755 }
    }
    /// A file with this content from its beginning on.
    pub fn write(path: impl Into<PathBuf>, data: impl AsRef<[u8]>) -> Op {
        Op::write_at(path, 0, data)
    }
    pub fn write_at(path: impl Into<PathBuf>, offset: u64, data: impl AsRef<[u8]>) -> Op {
        Op::Write { path: path.into(), offset, data: data.as_ref().to_vec(), mode: 0o644 }
    }
    pub fn truncate(path: impl Into<PathBuf>, size: u64) -> Op {
        Op::Truncate { path: path.into(), size }
    }
    pub fn punch(path: impl Into<PathBuf>, offset: u64, len: u64) -> Op {
        Op::Punch { path: path.into(), offset, len }
    }
    pub fn unlink(path: impl Into<PathBuf>) -> Op {
        Op::Unlink { path: path.into() }
    }
    pub fn rmdir(path: impl Into<PathBuf>) -> Op {
        Op::Rmdir { path: path.into() }
    }
    pub fn rename(from: impl Into<PathBuf>, to: impl Into<PathBuf>) -> Op {
        Op::Rename { from: from.into(), to: to.into() }
    }
    pub fn link(target: impl Into<PathBuf>, path: impl Into<PathBuf>) -> Op {
        Op::Link { target: target.into(), path: path.into() }
    }
    pub fn symlink(path: impl Into<PathBuf>, target: impl Into<PathBuf>) -> Op {
        Op::Symlink { path: path.into(), target: target.into() }
    }
    pub fn mknod(path: impl Into<PathBuf>, kind: FileKind) -> Op {
        Op::Mknod { path: path.into(), kind, mode: 0o600 }
    }
    pub fn chmod(path: impl Into<PathBuf>, mode: u32) -> Op {
        Op::Chmod { path: path.into(), mode }
    }
    pub fn chown(path: impl Into<PathBuf>, uid: u32, gid: u32) -> Op {
        Op::Chown { path: path.into(), uid, gid }
    }
    pub fn utimes(path: impl Into<PathBuf>, secs: i64, nanos: u32) -> Op {
        Op::Utimes { path: path.into(), mtime: Timestamp { secs, nanos } }
    }
    pub fn set_xattr(path: impl Into<PathBuf>, name: impl Into<OsString>, value: impl AsRef<[u8]>) -> Op {
        Op::SetXattr { path: path.into(), name: name.into(), value: value.as_ref().to_vec() }
    }
    pub fn remove_xattr(path: impl Into<PathBuf>, name: impl Into<OsString>) -> Op {
        Op::RemoveXattr { path: path.into(), name: name.into() }
    }
}

/// Long data is cut: a failed case prints its operations.
impl std::fmt::Debug for Op {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let cut = |data: &[u8]| match data.len() {
            0..=16 => format!("b\"{}\"", data.escape_ascii()),
            n => format!("{n} bytes"),
        };
        match self {
            Op::Mkdir { path, mode } => write!(f, "mkdir {path:?} {mode:o}"),
            Op::Write { path, offset, data, mode } => write!(f, "write {path:?} {mode:o} at {offset}: {}", cut(data)),
            Op::Truncate { path, size } => write!(f, "truncate {path:?} to {size}"),
            Op::Punch { path, offset, len } => write!(f, "punch {path:?} at {offset}, {len} bytes"),
            Op::Unlink { path } => write!(f, "unlink {path:?}"),
            Op::Rmdir { path } => write!(f, "rmdir {path:?}"),
            Op::Rename { from, to } => write!(f, "rename {from:?} to {to:?}"),
            Op::Link { target, path } => write!(f, "link {path:?} to {target:?}"),
            Op::Symlink { path, target } => write!(f, "symlink {path:?} -> {target:?}"),
            Op::Mknod { path, kind, mode } => write!(f, "mknod {path:?} {kind:?} {mode:o}"),
            Op::Chmod { path, mode } => write!(f, "chmod {path:?} {mode:o}"),
            Op::Chown { path, uid, gid } => write!(f, "chown {path:?} {uid}:{gid}"),
            Op::Utimes { path, mtime } => write!(f, "utimes {path:?} {}.{:09}", mtime.secs, mtime.nanos),
            Op::SetXattr { path, name, value } => write!(f, "setxattr {path:?} {name:?}={}", cut(value)),
            Op::RemoveXattr { path, name } => write!(f, "removexattr {path:?} {name:?}"),
        }
    }
}

/// Everything that is to be seen of one path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// What layer tars keep of it.
    pub meta: Metadata,
    /// Of a regular file: the digest of its blocks that are not all zeros, so that holes and zeros are the same.
    pub content: Option<Digest>,
    /// All names of its inode in this tree, itself among them, sorted; for a directory only itself.
    pub names: Vec<PathBuf>,
}

/// A whole tree, the root at the empty path, in the order a walk meets it.
pub type Snapshot = BTreeMap<PathBuf, Node>;

/// A directory tree that operations can be made on.
pub trait Tree {
    /// Makes one operation.
    fn apply(&mut self, op: &Op) -> Result<(), Errno>;
    /// All there is.
    fn snapshot(&self) -> Result<Snapshot>;
    /// The content of a regular file; for small ones.
    fn read(&self, path: &Path) -> Result<Vec<u8>>;
    /// What is stored of a regular file, in the backing's granularity.
    fn segments(&self, path: &Path) -> Result<Vec<Segment>>;
}

/// The digest for [`Node::content`], fed with blocks in ascending order.
#[derive(Default)]
pub struct ContentDigest(sha2::Sha256);

impl ContentDigest {
    /// In bytes. No filesystem tested keeps holes at a finer grain.
    pub const BLOCK: usize = 4096;

    /// The block with this number; a last, short one counts as padded with zeros.
    pub fn block(&mut self, number: u64, bytes: &[u8]) {
        use sha2::Digest as _;
        let Some(last) = bytes.iter().rposition(|b| *b != 0) else { return };
        self.0.update(number.to_le_bytes());
        self.0.update(&bytes[..=last]);
        self.0.update([0; Self::BLOCK].get(last + 1..).unwrap_or_default());
    }

    /// The digest of all blocks given.
    pub fn finish(self) -> Digest {
        use sha2::Digest as _;
        Digest::from_bytes(self.0.finalize().into())
    }
}

/// Gives every node the list of its inode's names. `inodes` tells which paths share one; directories never do.
pub(crate) fn name_links<K: Ord>(snapshot: &mut Snapshot, inodes: BTreeMap<K, Vec<PathBuf>>) {
    for names in inodes.into_values() {
        for name in &names {
            if let Some(node) = snapshot.get_mut(name) {
                node.names = names.clone();
            }
        }
    }
}
