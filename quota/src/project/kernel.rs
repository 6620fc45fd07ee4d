//! The kernel's side of project quotas: counts and limits by number (quotactl(2)).

use crate::{
    State,
    sys::{self, Dqblk, Place},
};
use graphdriver_core::{ByteSize, Context, Error, Limits, Result, Usage};
use rustix::{
    fs::{self, CWD, Mode, OFlags},
    io::Errno,
};
use std::{
    ffi::CString,
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

/// Limits of space are in units of this (`QIF_DQBLKSIZE` of the kernel's `linux/quota.h`); sizes are rounded up to it.
const UNIT: u64 = 1024;

/// `QIF_LIMITS` of `linux/quota.h`: the limits of space and of inodes are meant.
const BOTH_LIMITS: u32 = 1 | 4;

/// `FS_QUOTA_PDQ_ACCT` and `FS_QUOTA_PDQ_ENFD` of `linux/dqblk_xfs.h`.
const ACCOUNTED: u16 = 1 << 4;
const ENFORCED: u16 = 1 << 5;

/// What a filesystem does with project quotas as it is mounted now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Activity {
    /// This kernel has no system call for quotas.
    NoSystemCall,
    Off,
    /// It counts what projects take and limits none.
    Counts,
    Enforces,
}

/// The quotas of one filesystem.
#[derive(Debug)]
pub(crate) struct Kernel {
    dir: OwnedFd,
    /// The filesystem's block device, where the kernel does not find the filesystem by a descriptor (before Linux 5.14).
    device: Option<CString>,
}

impl Kernel {
    /// Of the filesystem that the directory is on.
    pub(crate) fn of(dir: &Path) -> Result<Kernel> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = fs::openat(CWD, dir, flags, Mode::empty()).doing(|| format!("opening {}", dir.display()))?;
        let mut kernel = Kernel { dir: fd, device: None };
        if matches!(sys::quota_stat(kernel.place()), Err(Errno::NOSYS)) {
            kernel.go_by_device()?;
        }
        Ok(kernel)
    }

    /// Says the block device's name from now on, if that gets further than the descriptor did.
    fn go_by_device(&mut self) -> Result<()> {
        let device = fs::fstat(&self.dir)?.st_dev;
        let name = format!("/dev/block/{}:{}", fs::major(device), fs::minor(device));
        let name = CString::new(name).expect("it has no zero byte");
        if sys::quota_stat(Place::Device(&name)).is_ok() {
            self.device = Some(name);
        }
        Ok(())
    }

    fn place(&self) -> Place<'_> {
        self.device.as_deref().map_or(Place::File(self.dir.as_fd()), Place::Device)
    }

    pub(crate) fn activity(&self) -> Result<Activity> {
        match sys::quota_stat(self.place()) {
            Ok(stat) if stat.flags & ENFORCED != 0 => Ok(Activity::Enforces),
            Ok(stat) if stat.flags & ACCOUNTED != 0 => Ok(Activity::Counts),
            // Also said of a filesystem without quotas. The system call itself exists if it minds a wrong command.
            Err(Errno::NOSYS) if !sys::has_quotactl() => Ok(Activity::NoSystemCall),
            Ok(_) | Err(Errno::NOSYS | Errno::SRCH | Errno::INVAL | Errno::NOTBLK) => Ok(Activity::Off),
            Err(e) => Err(Error::from(e).doing("asking for the state of quotas")),
        }
    }

    /// What the project takes and may take; nothing and everything if the filesystem does not know it.
    pub(crate) fn get(&self, project: u32) -> Result<State> {
        match sys::get_quota(self.place(), project) {
            Err(Errno::NOENT) => Ok(State::default()),
            found => found.map(state).doing(|| format!("reading the quota of project {project}")),
        }
    }

    pub(crate) fn set(&self, project: u32, limits: Limits) -> Result<()> {
        let wanted = Dqblk {
            space_limit: limits.size.map_or(0, |size| size.0.div_ceil(UNIT)),
            inode_limit: limits.inodes.unwrap_or(0),
            valid: BOTH_LIMITS,
            ..Dqblk::default()
        };
        sys::set_quota(self.place(), project, wanted).doing(|| format!("setting the quota of project {project}"))
    }

    /// The first project from `from` on that takes anything or has a limit.
    pub(crate) fn next(&self, from: u32) -> Result<Option<(u32, State)>> {
        match sys::next_quota(self.place(), from) {
            Err(Errno::NOENT) => Ok(None),
            found => found.map(|found| Some((found.id, state(found)))).doing(|| "looking for projects with quotas"),
        }
    }
}

fn state(found: Dqblk) -> State {
    let some = |limit: u64| (limit != 0).then_some(limit);
    State {
        used: Usage { bytes: found.space, inodes: found.inodes },
        limits: Limits {
            size: some(found.space_limit).map(|units| ByteSize(units.saturating_mul(UNIT))),
            inodes: some(found.inode_limit),
        },
    }
}
