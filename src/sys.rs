//! The ioctls that no library here wraps safely.
#![allow(unsafe_code)]

use std::{
    io::{Error, Result},
    os::fd::{AsRawFd, BorrowedFd},
};

/// linux/loop.h.
const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4C82;
const LOOP_CONFIGURE: libc::Ioctl = 0x4C0A;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_PARTSCAN: u32 = 8;
const LO_FLAGS_DIRECT_IO: u32 = 16;

/// `struct loop_config` with its `struct loop_info64` (linux/loop.h).
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    /// Device, inode, device, offset, size limit.
    places: [u64; 5],
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
    reserved: [u64; 8],
}

fn done(result: libc::c_int) -> Result<u32> {
    if result < 0 { Err(Error::last_os_error()) } else { Ok(result as u32) }
}

/// The number of a loop device that nobody uses yet; somebody else may be faster.
pub(crate) fn free_loop(control: BorrowedFd<'_>) -> Result<u32> {
    // SAFETY: the ioctl takes no pointer, and the descriptor is open, as it is borrowed.
    done(unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) })
}

/// Makes a loop device show `file`, past the page cache where the file's filesystem can. It may be divided into
/// partitions, and is free again when its last user closes it.
pub(crate) fn configure_loop(device: BorrowedFd<'_>, file: BorrowedFd<'_>) -> Result<()> {
    // SAFETY: plain integers, for which zero means absent.
    let mut config: LoopConfig = unsafe { std::mem::zeroed() };
    config.fd = file.as_raw_fd() as u32;
    config.flags = LO_FLAGS_AUTOCLEAR | LO_FLAGS_PARTSCAN | LO_FLAGS_DIRECT_IO;
    // SAFETY: `config` is a whole `loop_config` that outlives the call, and the kernel only reads it.
    done(unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) }).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_structure_is_as_large_as_the_kernels() {
        assert_eq!(size_of::<LoopConfig>(), 304);
    }
}
