//! What has no safe face.

#![allow(unsafe_code)]

use rustix::{
    io::{Errno, Result},
    mm::{MapFlags, ProtFlags, mmap, munmap},
};
use std::os::fd::BorrowedFd;

/// Writes through a shared mapping. The bytes must lie inside the file, which nobody shortens meanwhile.
pub fn mmap_write(fd: BorrowedFd<'_>, offset: u64, bytes: &[u8]) -> Result<()> {
    let size = rustix::fs::fstat(fd)?.st_size as u64;
    if bytes.is_empty() || offset + bytes.len() as u64 > size {
        return Err(Errno::NXIO);
    }
    let start = offset & !4095;
    let within = (offset - start) as usize;
    let length = within + bytes.len();
    // SAFETY: a new mapping at a place of the kernel's choice. All bytes written lie inside it and inside the file, so
    // that there is no SIGBUS unless the filesystem is broken. It is unmapped once, and nothing points into it then.
    unsafe {
        let flags = ProtFlags::READ | ProtFlags::WRITE;
        let at = mmap(std::ptr::null_mut(), length, flags, MapFlags::SHARED, fd, start)?;
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), at.cast::<u8>().add(within), bytes.len());
        munmap(at, length)
    }
}
