//! The ioctls and locks that no library here wraps safely.
#![allow(unsafe_code)]

use std::{
    fs::File,
    io::{Error, Result},
    os::fd::{AsFd, AsRawFd, BorrowedFd},
};

/// linux/loop.h.
const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4C82;
const LOOP_CONFIGURE: libc::Ioctl = 0x4C0A;
const LOOP_SET_CAPACITY: libc::Ioctl = 0x4C07;
const LOOP_GET_STATUS64: libc::Ioctl = 0x4C05;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
/// linux/fs.h.
const BLKDISCARD: libc::Ioctl = 0x1277;
const BLKGETSIZE64: libc::Ioctl = 0x8008_1272;
/// xfsprogs `xfs_fs.h`: `_IOW('X', 110, struct xfs_growfs_data)`.
const XFS_IOC_FSGROWFSDATA: libc::Ioctl = 0x4010_586E;
/// linux/ext4.h: `_IOW('f', 16, __u64)`.
const EXT4_IOC_RESIZE_FS: libc::Ioctl = 0x4008_6610;

/// `struct loop_info64` (linux/loop.h).
#[repr(C)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    sizelimit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config` (linux/loop.h).
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

/// `struct xfs_growfs_data`.
#[repr(C)]
struct GrowXfs {
    blocks: u64,
    inodes_percent: u32,
}

fn done(result: libc::c_int) -> Result<u32> {
    if result < 0 { Err(Error::last_os_error()) } else { Ok(result as u32) }
}

/// The number of a loop device that nobody uses yet; somebody else may be faster.
pub(crate) fn free_loop(control: BorrowedFd<'_>) -> Result<u32> {
    // SAFETY: the ioctl takes no pointer, and the descriptor is open, as it is borrowed.
    done(unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) })
}

/// Makes a loop device show `file`; it is free again when its last user closes it.
pub(crate) fn configure_loop(device: BorrowedFd<'_>, file: BorrowedFd<'_>, name: &str) -> Result<()> {
    // SAFETY: plain integers, for which zero means absent.
    let mut config: LoopConfig = unsafe { std::mem::zeroed() };
    config.fd = file.as_raw_fd() as u32;
    config.info.flags = LO_FLAGS_AUTOCLEAR;
    let shown = name.len().min(config.info.file_name.len() - 1);
    config.info.file_name[..shown].copy_from_slice(&name.as_bytes()[..shown]);
    // SAFETY: `config` is a whole `loop_config` that outlives the call, and the kernel only reads it.
    done(unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) }).map(drop)
}

/// Device and inode of the file that a loop device shows.
pub(crate) fn loop_file(device: BorrowedFd<'_>) -> Result<(u64, u64)> {
    // SAFETY: plain integers, for which zero means absent.
    let mut info: LoopInfo = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel fills a whole `loop_info64`, which is what `info` is.
    done(unsafe { libc::ioctl(device.as_raw_fd(), LOOP_GET_STATUS64, &raw mut info) })?;
    Ok((info.device, info.inode))
}

/// Tells a loop device that its file has grown.
pub(crate) fn refresh_loop(device: BorrowedFd<'_>) -> Result<()> {
    // SAFETY: the ioctl takes no pointer.
    done(unsafe { libc::ioctl(device.as_raw_fd(), LOOP_SET_CAPACITY, 0) }).map(drop)
}

/// The size of a block device in bytes.
pub(crate) fn device_size(device: BorrowedFd<'_>) -> Result<u64> {
    let mut size = 0u64;
    // SAFETY: the kernel writes 8 bytes, which is what `size` has.
    done(unsafe { libc::ioctl(device.as_raw_fd(), BLKGETSIZE64, &raw mut size) })?;
    Ok(size)
}

/// Gives the space of the device's first `length` bytes back to what is below it. What was there is lost.
pub(crate) fn discard(device: BorrowedFd<'_>, length: u64) -> Result<()> {
    let range = [0u64, length];
    // SAFETY: the kernel reads two 64-bit numbers, start and length.
    done(unsafe { libc::ioctl(device.as_raw_fd(), BLKDISCARD, range.as_ptr()) }).map(drop)
}

/// Makes the xfs that the directory is on `blocks` filesystem blocks large.
pub(crate) fn grow_xfs(dir: BorrowedFd<'_>, blocks: u64, inodes_percent: u32) -> Result<()> {
    let grow = GrowXfs { blocks, inodes_percent };
    // SAFETY: `grow` is a whole `xfs_growfs_data` that outlives the call, and the kernel only reads it.
    done(unsafe { libc::ioctl(dir.as_raw_fd(), XFS_IOC_FSGROWFSDATA, &raw const grow) }).map(drop)
}

/// Makes the ext4 that the directory is on `blocks` filesystem blocks large.
pub(crate) fn grow_ext4(dir: BorrowedFd<'_>, blocks: u64) -> Result<()> {
    // SAFETY: the kernel reads one 64-bit number.
    done(unsafe { libc::ioctl(dir.as_raw_fd(), EXT4_IOC_RESIZE_FS, &raw const blocks) }).map(drop)
}

/// What to do with the lock on one byte of a file.
#[derive(Clone, Copy)]
pub(crate) enum ByteLock {
    Shared,
    Exclusive,
    Unlocked,
}

/// Locks one byte for this open file (fcntl(2), "Open file description locks"); false if others hold it otherwise. The
/// kernel takes it back when the process ends.
pub(crate) fn lock_byte(file: &File, byte: u64, how: ByteLock) -> Result<bool> {
    // SAFETY: plain integers, for which zero means absent.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = match how {
        ByteLock::Shared => libc::F_RDLCK,
        ByteLock::Exclusive => libc::F_WRLCK,
        ByteLock::Unlocked => libc::F_UNLCK,
    } as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_start = byte as libc::off_t;
    lock.l_len = 1;
    // SAFETY: `lock` is a whole `flock` that outlives the call.
    match done(unsafe { libc::fcntl(file.as_fd().as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) }) {
        Ok(_) => Ok(true),
        Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
        Err(e) => Err(e),
    }
}
