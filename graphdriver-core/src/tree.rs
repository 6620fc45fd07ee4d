//! The vocabulary of directory trees: what an inode is, and how two trees differ.

use serde::Serialize;
use std::{collections::BTreeMap, ffi::OsString, path::PathBuf};

/// A point in time as filesystems keep it, before 1970 too: `nanos` counts forward from `secs`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp {
    /// Seconds since 1970.
    pub secs: i64,
    /// 0 to 999,999,999.
    pub nanos: u32,
}

/// Everything about an inode but its content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Metadata {
    /// What it is.
    pub kind: FileKind,
    /// Permissions with setuid, setgid and sticky: `mode & 0o7777`.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Time of the last change to its content.
    pub mtime: Timestamp,
    /// Extended attributes with their full names; ACLs and file capabilities are among them
    /// (`system.posix_acl_access`, `security.capability`) in the kernel's encoding.
    pub xattrs: BTreeMap<OsString, Vec<u8>>,
}

/// What an inode is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum FileKind {
    /// A regular file of `size` bytes, holes included.
    File {
        /// Apparent size in bytes.
        size: u64,
    },
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink {
        /// As stored, whatever it points to.
        target: PathBuf,
    },
    /// A character device.
    CharDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A block device.
    BlockDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A named pipe.
    Fifo,
    /// A unix socket. Layer tars have none: they are skipped, as Docker does.
    Socket,
}

/// How a path differs from the parent's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ChangeKind {
    /// Not there in the parent.
    Added,
    /// There in both, and different; a directory also if something in it is.
    Modified,
    /// No longer there.
    Deleted,
}

impl ChangeKind {
    /// `A`, `C` or `D`, as `docker diff` prints it.
    pub fn letter(self) -> char {
        match self {
            ChangeKind::Added => 'A',
            ChangeKind::Modified => 'C',
            ChangeKind::Deleted => 'D',
        }
    }
}

/// One difference between a layer and its parent. A list of them is sorted as a walk meets them: a directory before
/// what is in it, the names in a directory by their bytes. Below an added directory everything is listed, below a deleted
/// one nothing. A path whose type changed from or to a directory is one `Modified`, with what is in a new directory as `Added`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Change {
    /// Relative to the layer's root, without a leading slash; empty for the root itself.
    pub path: PathBuf,
    /// What happened to it.
    pub kind: ChangeKind,
}
