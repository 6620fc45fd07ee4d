//! The system calls that no library here wraps safely.
#![allow(unsafe_code)]

use rustix::{
    io::{Errno, Result},
    mount::MountAttrFlags,
    thread::UnshareFlags,
};
use std::os::fd::{AsRawFd, BorrowedFd};

/// `mount_setattr(2)` on a mount by descriptor: sets `attrs`, and with `userns` the id mapping of that user namespace
/// (`attrs` then say `MOUNT_ATTR_IDMAP`).
pub(crate) fn mount_setattr(
    mount: BorrowedFd<'_>,
    recursive: bool,
    attrs: MountAttrFlags,
    userns: Option<BorrowedFd<'_>>,
) -> Result<()> {
    let attr = libc::mount_attr {
        attr_set: attrs.bits().into(),
        attr_clr: 0,
        propagation: 0,
        userns_fd: userns.map_or(0, |fd| fd.as_raw_fd() as u64),
    };
    let at = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a C string and `attr` a whole `mount_attr` of the size given; both outlive the call, and
    // the kernel only reads them. The descriptors are open, as they are borrowed.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            at,
            &raw const attr,
            size_of::<libc::mount_attr>(),
        )
    };
    if done == 0 { Ok(()) } else { Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)) }
}

/// Gives the calling thread a mount namespace, working directory and root of its own.
pub(crate) fn unshare_mounts() -> Result<()> {
    // SAFETY: unshare is unsafe for CLONE_FILES only, which this is not.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS) }
}
