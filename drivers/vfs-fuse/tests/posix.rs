//! What POSIX and Linux promise of a local filesystem, one test per promise, each on a mounted union.
//!
//! `VFS_FUSE_PROGRAM` chooses what is tested: unset, our own program; `kernel`, the kernel's overlayfs; `plain`, a directory
//! on ext4 with the same files; else the path of a program with fuse-overlayfs's command line. All pass on `plain`, which
//! is how the tests themselves are tested. The kernel's overlay fails one: it copies whole files for a chmod.
//!
//! Where the tests allow a union more than a plain directory:
//! * A descriptor or mapping from before a copy-up may go on showing the lower file: the kernel allows an inode one backing
//!   file as long as it is open.
//! * A program that runs from a lower layer may be opened for writing: that is its copy.
//! * O_TMPFILE, `RENAME_WHITEOUT`, a device 0/0, names like whiteouts and the `fallocate` modes that move data may be
//!   refused, as nothing is lost when they are; if they are not refused they must work.
//! * A merged directory may have the link count 1, which says that nobody counted.
//! * Private xattrs may be refused or kept under another name; they may not be believed.
//! * Reading a lower file leaves its access time alone: layers are shared.

mod common;
#[allow(dead_code)] // The other test program uses the rest.
#[path = "posix/sys.rs"]
mod sys;
#[allow(dead_code)]
#[macro_use]
#[path = "posix/world.rs"]
mod world;

#[path = "posix/files.rs"]
mod files;
#[path = "posix/layers.rs"]
mod layers;
#[path = "posix/locks.rs"]
mod locks;
#[path = "posix/names.rs"]
mod names;
#[path = "posix/perm.rs"]
mod perm;
#[path = "posix/times.rs"]
mod times;
#[path = "posix/xattrs.rs"]
mod xattrs;
