//! The calls that neither std nor rustix offer safely.
#![allow(unsafe_code)]

use rustix::io::{Errno, Result};
use std::{
    ffi::{CStr, CString},
    fs::File,
    os::{fd::AsRawFd, unix::ffi::OsStrExt},
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
};

/// A process forked from this one.
pub struct Child(i32);

impl Child {
    /// Whether it ended well; `false` if it panicked or was killed.
    pub fn join(self) -> bool {
        let mut status = 0;
        // SAFETY: `status` outlives the call.
        while unsafe { libc::waitpid(self.0, &mut status, 0) } < 0 {
            assert_eq!(Errno::from_io_error(&std::io::Error::last_os_error()), Some(Errno::INTR));
        }
        libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0
    }

    /// Ends it at once.
    pub fn kill(&self) {
        // SAFETY: no memory is involved; the process is our child and not yet waited for.
        unsafe { libc::kill(self.0, libc::SIGKILL) };
    }
}

/// Runs `job` in a process of its own.
pub fn fork(job: impl FnOnce()) -> Child {
    // SAFETY: the child runs only `job`, on glibc, whose allocator works after fork, and leaves by _exit.
    match unsafe { libc::fork() } {
        0 => {
            let code = if catch_unwind(AssertUnwindSafe(job)).is_ok() { 0 } else { 1 };
            // SAFETY: ends the process.
            unsafe { libc::_exit(code) }
        }
        -1 => panic!("fork: {}", std::io::Error::last_os_error()),
        pid => Child(pid),
    }
}

/// A mapping of a file.
pub struct Map {
    at: *mut u8,
    len: usize,
}

// SAFETY: the mapping is plain memory, valid from every thread until dropped.
unsafe impl Send for Map {}

impl Map {
    /// `shared` as MAP_SHARED, else MAP_PRIVATE; `write` adds PROT_WRITE.
    pub fn new(file: &File, len: usize, shared: bool, write: bool) -> Result<Map> {
        let prot = libc::PROT_READ | if write { libc::PROT_WRITE } else { 0 };
        let flags = if shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
        // SAFETY: a new mapping at an address of the kernel's choice.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, flags, file.as_raw_fd(), 0) };
        if at == libc::MAP_FAILED {
            return Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap());
        }
        Ok(Map { at: at.cast(), len })
    }

    /// A copy of some bytes.
    pub fn read(&self, offset: usize, len: usize) -> Vec<u8> {
        assert!(offset + len <= self.len);
        // SAFETY: within the mapping; volatile, as other processes may write.
        (offset..offset + len).map(|i| unsafe { self.at.add(i).read_volatile() }).collect()
    }

    /// Stores bytes.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= self.len);
        for (i, byte) in bytes.iter().enumerate() {
            // SAFETY: within the mapping, which the caller made writable.
            unsafe { self.at.add(offset + i).write_volatile(*byte) };
        }
    }

    /// msync(MS_SYNC).
    pub fn sync(&self) {
        // SAFETY: exactly this mapping.
        assert_eq!(unsafe { libc::msync(self.at.cast(), self.len, libc::MS_SYNC) }, 0);
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: exactly this mapping, not used after.
        unsafe { libc::munmap(self.at.cast(), self.len) };
    }
}

/// Whose lock.
#[derive(Clone, Copy, Debug)]
pub enum Owner {
    /// The process, as POSIX has it.
    Process,
    /// The open file description.
    Description,
}

/// A byte-range lock (`F_RDLCK`, `F_WRLCK`, `F_UNLCK`), without waiting.
pub fn range_lock(file: &File, owner: Owner, kind: i32, start: i64, len: i64) -> Result<()> {
    let lock =
        libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: start, l_len: len, l_pid: 0 };
    let command = match owner {
        Owner::Process => libc::F_SETLK,
        Owner::Description => libc::F_OFD_SETLK,
    };
    // SAFETY: `lock` outlives the call.
    match unsafe { libc::fcntl(file.as_raw_fd(), command, &lock) } {
        0 => Ok(()),
        _ => Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap()),
    }
}

/// Gives this thread a working directory and umask of its own.
pub fn own_umask_and_cwd() {
    // SAFETY: CLONE_FS touches neither memory nor descriptors.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::FS) }.unwrap();
}

/// truncate(2).
pub fn truncate(path: &Path, size: i64) -> Result<()> {
    let path = CString::new(path.as_os_str().as_bytes()).unwrap();
    // SAFETY: a string that outlives the call.
    match unsafe { libc::truncate(path.as_ptr(), size) } {
        0 => Ok(()),
        _ => Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap()),
    }
}

/// What getxattr(2) and listxattr(2) say they need room for.
pub fn xattr_sizes(path: &Path, name: &CStr) -> (usize, usize) {
    let path = CString::new(path.as_os_str().as_bytes()).unwrap();
    // SAFETY: strings that outlive the calls, and no buffers.
    unsafe {
        let value = libc::getxattr(path.as_ptr(), name.as_ptr(), std::ptr::null_mut(), 0);
        let list = libc::listxattr(path.as_ptr(), std::ptr::null_mut(), 0);
        (value.try_into().unwrap(), list.try_into().unwrap())
    }
}

/// Ends a process at once.
pub fn kill(pid: i32) {
    // SAFETY: no memory is involved.
    unsafe { libc::kill(pid, libc::SIGKILL) };
}

/// Limits how many descriptors this process may have from now on.
pub fn limit_descriptors(limit: u64) {
    let limit = libc::rlimit { rlim_cur: limit, rlim_max: limit };
    // SAFETY: `limit` outlives the call.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) }, 0);
}
