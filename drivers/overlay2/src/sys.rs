//! The system calls that no library here wraps safely.
#![allow(unsafe_code)]

use std::{
    fs::{self, File},
    io::{Error, Result},
    os::fd::OwnedFd,
};

/// A new user namespace, in which the users 0 and 100000 of ours and its own are one and the same. A child process
/// has to exist while it is made.
pub(crate) fn user_namespace() -> Result<OwnedFd> {
    // SAFETY: `clone_args` is plain integers, for which zero means absent.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = libc::CLONE_NEWUSER as u64;
    args.exit_signal = libc::SIGCHLD as u64;
    let parent = std::process::id() as libc::pid_t;
    // SAFETY: `args` is a whole `clone_args` of the size given. Without CLONE_VM and a stack this is fork(2): the child
    // has a copy of all memory. As other threads may hold locks there, it makes system calls and nothing else.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<libc::clone_args>()) };
    if pid == 0 {
        // SAFETY: system calls without pointers.
        unsafe {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            // Orphaned before that, it would wait for ever.
            while libc::getppid() == parent {
                libc::pause();
            }
            libc::_exit(0);
        }
    }
    if pid < 0 {
        return Err(Error::last_os_error());
    }
    let made = (|| {
        fs::write(format!("/proc/{pid}/uid_map"), "0 100000 1")?;
        fs::write(format!("/proc/{pid}/gid_map"), "0 100000 1")?;
        Ok(File::open(format!("/proc/{pid}/ns/user"))?.into())
    })();
    // SAFETY: `pid` is our own child, not waited for yet, so the number is nobody else's.
    unsafe {
        libc::kill(pid as libc::pid_t, libc::SIGKILL);
        libc::waitpid(pid as libc::pid_t, std::ptr::null_mut(), 0);
    }
    made
}
