//! Where a union, by design, is not a plain directory. Everything that the comparison leaves out is here.
//!
//! Not drawn at all:
//! * `RENAME_WHITEOUT` and device 0/0: they make whiteouts, which a plain directory shows as devices.
//! * Names that begin with `.wh.`, xattrs below `trusted.overlay.` and `user.overlay.`: they are the layers' own format.
//! * `O_TMPFILE`: FUSE as fuser speaks it has none, so it is `EOPNOTSUPP`.
//! * `FALLOC_FL_COLLAPSE_RANGE` and `FALLOC_FL_INSERT_RANGE`: the kernel's FUSE client refuses them.
//!
//! Left out of what is compared:
//! * `st_dev`, `st_blocks`, `st_blksize`, `st_ctime`: the filesystem's own. `st_atime`: a union need not keep it.
//! * `st_size` and `st_nlink` of directories: overlayfs counts neither over its layers.
//! * `st_mtime` where it is neither set nor inherited: both trees have the present time, some microseconds apart.
//! * `SEEK_DATA` and `SEEK_HOLE`: where holes are is the filesystem's affair; that they hold zeros is compared. What they
//!   mean for a directory is not said anywhere.
//! * link counts as the kernel's overlay shows them at the end: with `index=off`, which container engines use, it takes
//!   those of a lower file from its inode, hidden and removed names included. Which names are one file is compared.
//! * `d_ino` as the kernel's overlay lists it at the end: it is `st_ino` only in directories that it has marked impure itself.
//! * what [`Loose`] and the functions below say.

use super::{
    case::Subject,
    op::{Op, Step},
    side::Value,
    tree::Stat,
};
use rustix::{
    fs::FallocateFlags,
    io::{Errno, Result},
};
use std::{collections::HashSet, path::PathBuf};

/// Inodes (of the plain tree) whose link count a union does not know: a lower file's count includes its names that are
/// hidden by layers above, and the names that it has in the union are known only after looking at all of it.
pub type Loose = HashSet<u64>;

/// Whether this is not done, because the kernel's overlay does something that a plain directory knows no reason for: it
/// writes no redirect that is longer than 256 bytes and gives EXDEV, and takes the set-user-ID and set-group-ID bits
/// before it finds that the filesystem below refuses this kind of fallocate.
///
/// The kernel's FUSE client takes those bits before it asks for an fallocate as well, which matters on tmpfs, the only
/// filesystem here that refuses to zero a range; and it lets anybody take them by chown(2) without ids.
pub fn leaves_out(subject: Subject, step: &Step) -> bool {
    let is_long = |path: &PathBuf| path.as_os_str().len() > 200;
    match (&step.op, subject) {
        (Op::Rename { from, to, .. }, Subject::Kernel) => is_long(from) || is_long(to),
        (Op::Fallocate { .. }, Subject::Kernel) => step.user != 0,
        (Op::Fallocate { flags, .. }, Subject::Program) => step.user != 0 && flags.contains(FallocateFlags::ZERO_RANGE),
        (Op::Chown { uid: None, gid: None, .. }, Subject::Program) => step.user != 0,
        _ => false,
    }
}

/// The kernel's overlay shows an open file whose only name, in a lower layer, was removed with the count of that layer.
pub fn counts_removed_name(subject: Subject, wanted: &Stat) -> bool {
    subject == Subject::Kernel && wanted.nlink == 0
}

/// The kernel's overlay remembers what it once listed of a directory, so that after several threads changed it at once a
/// `d_ino` can be that of the file before its copy-up or after it.
pub fn lists_other_inodes(subject: Subject) -> bool {
    subject == Subject::Kernel
}

/// **Open.** When the kernel's overlay first looks at a renamed directory it gives it an xattr of its own (`origin`). Where the
/// redirect and users' xattrs fill the one block that ext4 has for them, that is ENOSPC, and the directory is left out
/// ("failed to look up (a) for ino (-28)", `PROPTEST_RNG_SEED=2026`, `threads_on_ext4`). So the kernel's view is compared
/// after one thread's changes only.
pub fn is_shared_by_threads(path: &std::path::Path) -> bool {
    path.ends_with("shared")
}

/// A file that was open by passthrough when it was copied up has a second node, which fuser can list by its node id only:
/// `d_ino` is that id, and `st_ino` stays, until the kernel forgets the first node.
pub fn is_renewed(listed: u64) -> bool {
    listed >= 1 << 63
}

/// After a new mount a file that was copied up meanwhile no longer counts the names that layers hide: it has so many
/// `names`. Where copies without data are not possible, the count of a lower file includes the names that were removed.
pub fn counts_anew(counted: bool, before: &Stat, now: &Stat, names: usize) -> bool {
    !before.is_dir() && (now.nlink == names as u64 || !counted && before.nlink < now.nlink)
}

/// Whether it is right that the plain directory gave `wanted` and the union `found`.
pub fn allows(_subject: Subject, op: &Op, wanted: &Result<Value>, found: &Result<Value>) -> bool {
    match (op, wanted, found) {
        // The order in which two reasons to refuse are found is nobody's promise.
        (Op::Rename { .. }, Err(a), Err(b)) => {
            let either = [Errno::NOTEMPTY, Errno::EXIST];
            either.contains(a) && either.contains(b)
        }
        // To remove an ACL that is not there succeeds on some filesystems.
        (Op::RemoveXattr { name, .. }, Ok(_), Err(Errno::NODATA)) => name.starts_with("system.posix_acl_"),
        _ => false,
    }
}
