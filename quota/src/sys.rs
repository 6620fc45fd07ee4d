//! The system calls that no library wraps: quotactl(2) and the attributes of files that carry the project.
#![allow(unsafe_code)]

use rustix::io::Errno;
use std::{
    ffi::CStr,
    os::fd::{AsRawFd, BorrowedFd},
};

/// `struct fsxattr` of the kernel's `include/uapi/linux/fs.h`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct FsXattr {
    pub xflags: u32,
    extsize: u32,
    nextents: u32,
    pub projid: u32,
    cowextsize: u32,
    pad: [u8; 8],
}

/// What is made in the directory belongs to its project (`FS_XFLAG_PROJINHERIT` of `linux/fs.h`).
pub(crate) const PROJINHERIT: u32 = 0x200;

/// `_IOR('X', 31, struct fsxattr)` and `_IOW('X', 32, struct fsxattr)` of `linux/fs.h`.
const FS_IOC_FSGETXATTR: libc::Ioctl = libc::_IOR::<FsXattr>(b'X' as u32, 31);
const FS_IOC_FSSETXATTR: libc::Ioctl = libc::_IOW::<FsXattr>(b'X' as u32, 32);

pub(crate) fn get_fsxattr(file: BorrowedFd<'_>) -> Result<FsXattr, Errno> {
    let mut attributes = FsXattr::default();
    // SAFETY: the request writes one `struct fsxattr`, and there is one at the address.
    done(unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FSGETXATTR, &raw mut attributes) }.into())?;
    Ok(attributes)
}

pub(crate) fn set_fsxattr(file: BorrowedFd<'_>, attributes: &FsXattr) -> Result<(), Errno> {
    // SAFETY: the request reads one `struct fsxattr`, and there is one at the address.
    done(unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FSSETXATTR, &raw const *attributes) }.into())
}

/// `struct if_nextdqblk` of `linux/quota.h`, whose beginning is `struct if_dqblk`, of the same size. Space is counted in
/// bytes and limited in KiB.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Dqblk {
    pub space_limit: u64,
    pub space_soft_limit: u64,
    pub space: u64,
    pub inode_limit: u64,
    pub inode_soft_limit: u64,
    pub inodes: u64,
    pub space_time: u64,
    pub inode_time: u64,
    pub valid: u32,
    pub id: u32,
}

/// `struct fs_quota_statv` of `linux/dqblk_xfs.h`, of which only the flags are looked at.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct QuotaStat {
    version: i8,
    pad: u8,
    pub flags: u16,
    rest: [u32; 39],
}

impl Default for QuotaStat {
    fn default() -> Self {
        QuotaStat { version: 1, pad: 0, flags: 0, rest: [0; 39] }
    }
}

const PRJQUOTA: libc::c_int = 2;
const Q_GETQUOTA: libc::c_int = 0x80_0007;
const Q_SETQUOTA: libc::c_int = 0x80_0008;
const Q_GETNEXTQUOTA: libc::c_int = 0x80_0009;
const Q_XGETQSTATV: libc::c_int = 0x5808;

/// Whose quotas are meant.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Place<'a> {
    /// Of the filesystem that this file is on (quotactl_fd, Linux 5.14).
    File(BorrowedFd<'a>),
    /// Of the filesystem on this block device.
    Device(&'a CStr),
}

pub(crate) fn get_quota(place: Place<'_>, project: u32) -> Result<Dqblk, Errno> {
    let mut found = Dqblk::default();
    // SAFETY: Q_GETQUOTA writes one `struct if_dqblk`, which is as large as what is at the address.
    unsafe { quotactl(place, Q_GETQUOTA, project, (&raw mut found).cast()) }?;
    Ok(Dqblk { id: project, ..found })
}

/// The first of the projects from this one on that has a limit or takes anything.
pub(crate) fn next_quota(place: Place<'_>, project: u32) -> Result<Dqblk, Errno> {
    let mut found = Dqblk::default();
    // SAFETY: Q_GETNEXTQUOTA writes one `struct if_nextdqblk`, and there is one at the address.
    unsafe { quotactl(place, Q_GETNEXTQUOTA, project, (&raw mut found).cast()) }?;
    Ok(found)
}

pub(crate) fn set_quota(place: Place<'_>, project: u32, mut limits: Dqblk) -> Result<(), Errno> {
    // SAFETY: Q_SETQUOTA reads one `struct if_dqblk`, which is as large as what is at the address.
    unsafe { quotactl(place, Q_SETQUOTA, project, (&raw mut limits).cast()) }
}

pub(crate) fn quota_stat(place: Place<'_>) -> Result<QuotaStat, Errno> {
    let mut found = QuotaStat::default();
    // SAFETY: Q_XGETQSTATV reads the version and writes one `struct fs_quota_statv`, and there is one at the address.
    unsafe { quotactl(place, Q_XGETQSTATV, 0, (&raw mut found).cast()) }?;
    Ok(found)
}

/// Whether this kernel has quotactl_fd or quotactl: both mind what they are asked about where they exist.
pub(crate) fn has_quotactl() -> bool {
    let mut unused = Dqblk::default();
    let command = Q_GETQUOTA << 8 | PRJQUOTA;
    // SAFETY: -1 is no descriptor, so that the kernel does nothing but say so; in any case the command writes one
    // `struct if_dqblk`, which is as large as what is at the address.
    let by_file = done(unsafe { libc::syscall(libc::SYS_quotactl_fd, -1, command, 0, &raw mut unused) });
    // SAFETY: there is no such device as the empty name; else as above.
    let by_name = unsafe { quotactl(Place::Device(c""), Q_GETQUOTA, 0, (&raw mut unused).cast()) };
    by_file != Err(Errno::NOSYS) || by_name != Err(Errno::NOSYS)
}

/// # Safety
///
/// `data` is what the command wants.
unsafe fn quotactl(place: Place<'_>, command: libc::c_int, id: u32, data: *mut libc::c_void) -> Result<(), Errno> {
    let command = command << 8 | PRJQUOTA;
    done(match place {
        // SAFETY: the descriptor is open, as it is borrowed; the caller answers for `data`.
        Place::File(file) => unsafe { libc::syscall(libc::SYS_quotactl_fd, file.as_raw_fd(), command, id, data) },
        // SAFETY: the name ends with a zero byte, as it is a CStr; the caller answers for `data`.
        Place::Device(name) => unsafe { libc::syscall(libc::SYS_quotactl, command, name.as_ptr(), id, data) },
    })
}

fn done(returned: libc::c_long) -> Result<(), Errno> {
    if returned >= 0 {
        return Ok(());
    }
    Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_structures_have_their_sizes() {
        assert_eq!((size_of::<FsXattr>(), size_of::<Dqblk>(), size_of::<QuotaStat>()), (28, 72, 160));
    }
}
