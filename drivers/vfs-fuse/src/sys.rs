//! The system calls that no library here wraps safely.
#![allow(unsafe_code)]

use rustix::io::{Errno, Result};
use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

/// Reads one byte of each page of the file's first `length` bytes through a mapping. The file must be that long and
/// nobody else's, as it must not shrink meanwhile.
pub(crate) fn touch_mapped(file: BorrowedFd<'_>, length: usize) -> Result<()> {
    let (read, shared) = (libc::PROT_READ, libc::MAP_SHARED);
    // SAFETY: a new mapping at an address of the kernel's choice; the descriptor is open, as it is borrowed.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), length, read, shared, file.as_raw_fd(), 0) };
    if start == libc::MAP_FAILED {
        return Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO));
    }
    for at in (0..length).step_by(4096) {
        // SAFETY: within the mapping, which is readable as far as the file goes; the caller says it goes that far.
        unsafe { start.cast::<u8>().add(at).read_volatile() };
    }
    // SAFETY: exactly what mmap gave, and nothing points into it any more.
    unsafe { libc::munmap(start, length) };
    Ok(())
}

/// Splits the process in two: `true` in the new one. To be called while there is one thread only, as the new process
/// has only the caller's, and would wait for ever for locks that others held.
pub(crate) fn fork() -> io::Result<bool> {
    // SAFETY: fork takes no pointers. With one thread no lock is held, so the new process may do everything.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        pid => Ok(pid == 0),
    }
}

/// Takes over a descriptor that whoever started the program left open for it.
pub(crate) fn inherited_fd(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: fcntl with F_SETFD touches nothing but the descriptor's flags, and says whether it is open.
    if number <= libc::STDERR_FILENO || unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } == -1 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: it is open, and main asks for it before anything else here has opened a descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}
