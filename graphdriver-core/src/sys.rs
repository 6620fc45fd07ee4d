//! The system calls that no library here wraps safely.
#![allow(unsafe_code)]

use rustix::{
    io::{Errno, FdFlags, Result, fcntl_setfd},
    mount::MountAttrFlags,
    thread::UnshareFlags,
};
use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::Command,
};

/// `MOUNT_ATTR__ATIME` (linux/mount.h).
const ACCESS_TIMES: u32 = 0x70;

/// `mount_setattr(2)` on a mount by descriptor: sets `attrs`, and with `userns` the id mapping of that user namespace
/// (`attrs` then say `MOUNT_ATTR_IDMAP`).
pub(crate) fn mount_setattr(
    mount: BorrowedFd<'_>,
    recursive: bool,
    attrs: MountAttrFlags,
    userns: Option<BorrowedFd<'_>>,
) -> Result<()> {
    // How access times are kept is one setting of several bits, which must be cleared to be set.
    let times = if attrs.bits() & ACCESS_TIMES == 0 { 0 } else { ACCESS_TIMES };
    let attr = libc::mount_attr {
        attr_set: attrs.bits().into(),
        attr_clr: times.into(),
        propagation: 0,
        userns_fd: userns.map_or(0, |fd| fd.as_raw_fd() as u64),
    };
    set_attributes(mount, recursive, &attr)
}

/// `mount_setattr(2)` on a mount by descriptor: makes it private, and gives it of these restrictions `attrs` and no others:
/// read-only, nosuid, nodev, noexec.
pub(crate) fn mount_separate(mount: BorrowedFd<'_>, attrs: MountAttrFlags) -> Result<()> {
    let restrictions = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let attr = libc::mount_attr {
        attr_set: (attrs & restrictions).bits().into(),
        attr_clr: (restrictions - attrs).bits().into(),
        propagation: libc::MS_PRIVATE,
        userns_fd: 0,
    };
    set_attributes(mount, false, &attr)
}

fn set_attributes(mount: BorrowedFd<'_>, recursive: bool, attr: &libc::mount_attr) -> Result<()> {
    let at = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a C string and `attr` a whole `mount_attr` of the size given; both outlive the call, and
    // the kernel only reads them. The descriptors are open, as they are borrowed.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            at,
            std::ptr::from_ref(attr),
            size_of::<libc::mount_attr>(),
        )
    };
    if done == 0 { Ok(()) } else { Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)) }
}

/// A new user namespace with these maps, as user_namespaces(7) has them. A child process has to exist while it is made.
pub(crate) fn user_namespace(users: &str, groups: &str) -> io::Result<OwnedFd> {
    let parent = std::process::id() as libc::pid_t;
    // Not clone3(2): systemd's RestrictNamespaces= cannot look into its arguments and allows it nobody.
    let flags = libc::c_long::from(libc::CLONE_NEWUSER | libc::SIGCHLD);
    // SAFETY: without CLONE_VM and a stack this is fork(2): the child has a copy of all memory. As other threads may hold
    // locks there, it makes system calls and nothing else.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) } as libc::pid_t;
    if pid == 0 {
        // SAFETY: system calls without pointers.
        unsafe {
            // Were its parent killed, it would go on listening on the parent's sockets for a moment. Older kernels than 5.9
            // cannot.
            libc::syscall(libc::SYS_close_range, 0u32, u32::MAX, 0u32);
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            // Orphaned before that, it would wait for ever.
            while libc::getppid() == parent {
                libc::pause();
            }
            libc::_exit(0);
        }
    }
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    let made = (|| {
        fs::write(format!("/proc/{pid}/uid_map"), users)?;
        fs::write(format!("/proc/{pid}/gid_map"), groups)?;
        Ok(File::open(format!("/proc/{pid}/ns/user"))?.into())
    })();
    // SAFETY: `pid` is our own child, not waited for yet, so the number is nobody else's.
    unsafe {
        libc::kill(pid, libc::SIGKILL);
        libc::waitpid(pid, std::ptr::null_mut(), 0);
    }
    made
}

/// Gives the calling thread a mount namespace, working directory and root of its own.
pub(crate) fn unshare_mounts() -> Result<()> {
    // SAFETY: unshare is unsafe for CLONE_FILES only, which this is not.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS) }
}

/// Lets the program have the descriptor under the same number, and besides its standard streams no other: a daemon would
/// keep what its caller's caller has open. It must be open still when the program is started.
pub(crate) fn leave_open(command: &mut Command, fd: BorrowedFd<'_>) {
    let number = fd.as_raw_fd();
    // SAFETY: between fork and exec this makes two system calls and nothing else. The number is the descriptor's in the
    // child too; were it closed by then, the second call would fail with EBADF, and so would the start.
    unsafe {
        command.pre_exec(move || {
            // Before Linux 5.11 what others have not marked themselves stays open.
            libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC);
            Ok(fcntl_setfd(BorrowedFd::borrow_raw(number), FdFlags::empty())?)
        });
    }
}
