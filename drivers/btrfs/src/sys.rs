//! The ioctl whose wrapper elsewhere takes paths for UTF-8.
#![allow(unsafe_code)]

use btrfs_uapi::raw::{btrfs_ioc_ino_lookup_user, btrfs_ioctl_ino_lookup_user_args};
use std::{
    ffi::{CStr, OsStr, OsString, c_char},
    io::Result,
    os::{
        fd::{AsRawFd, BorrowedFd},
        unix::ffi::OsStrExt,
    },
    path::PathBuf,
};

/// Where the subvolume `id` lies: the directory it is in, from the directory `dir` on, and its name. `dirid` is the inode
/// number of the former. Fails with ENAMETOOLONG if it is more than 3824 bytes away (`BTRFS_IOC_INO_LOOKUP_USER`, Linux 4.18; kernel `include/uapi/linux/btrfs.h`).
pub(crate) fn place_of(dir: BorrowedFd<'_>, id: u64, dirid: u64) -> Result<(PathBuf, OsString)> {
    let args = btrfs_ioctl_ino_lookup_user_args { dirid, treeid: id, name: [0; 256], path: [0; 3824] };
    let mut args = Box::new(args);
    // SAFETY: `args` is the whole structure the kernel reads and writes, and lives longer than the call.
    unsafe { btrfs_ioc_ino_lookup_user(dir.as_raw_fd(), &raw mut *args) }?;
    Ok((text(&args.path).into(), text(&args.name)))
}

/// What the kernel wrote, without the slash that ends a directory's path.
fn text(buffer: &[c_char]) -> OsString {
    // SAFETY: a `c_char` has the size and alignment of a `u8`, and every value of one is a value of the other.
    let bytes = unsafe { std::slice::from_raw_parts(buffer.as_ptr().cast::<u8>(), buffer.len()) };
    let bytes = CStr::from_bytes_until_nul(bytes).map_or(bytes, CStr::to_bytes);
    OsStr::from_bytes(bytes.strip_suffix(b"/").unwrap_or(bytes)).to_owned()
}
