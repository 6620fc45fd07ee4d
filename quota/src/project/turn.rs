//! Taking turns on a filesystem: one chooses a project while nobody else does.

use graphdriver_core::{Context, Error, ErrorKind, Result};
use rustix::fs::{self, CWD, Mode, OFlags};
use std::{
    fs::{File, TryLockError},
    os::fd::OwnedFd,
    path::Path,
    thread,
    time::{Duration, Instant},
};

/// Far longer than anybody who keeps to the rules holds it. Whoever may open the directory can lock it.
const PATIENCE: Duration = Duration::from_secs(60);

/// A turn takes much less than that.
const PAUSE: Duration = Duration::from_millis(1);

/// The turn of whoever holds this: the lock (flock(2)) on the topmost directory that is on the same filesystem as `dir` and
/// can be reached from it. All homes of one data root have that in common, and all beneath one mount point.
pub(super) fn take(dir: &Path) -> Result<File> {
    take_within(dir, PATIENCE)
}

/// The same for who does not wait as long. Fails with `Busy`.
pub(super) fn take_within(dir: &Path, patience: Duration) -> Result<File> {
    let top = File::from(topmost(dir).doing(|| format!("looking for the top of the filesystem of {}", dir.display()))?);
    let began = Instant::now();
    loop {
        match top.try_lock() {
            Ok(()) => return Ok(top),
            Err(TryLockError::WouldBlock) if began.elapsed() < patience => thread::sleep(PAUSE),
            Err(TryLockError::WouldBlock) => {
                let why =
                    format!("the top directory of the filesystem of {} is locked by somebody else", dir.display());
                return Err(
                    Error::new(ErrorKind::Busy, why).hint("`lslocks` shows by whom; try again when they are done")
                );
            }
            Err(TryLockError::Error(e)) => return Err(e).doing(|| "locking the top directory of the filesystem"),
        }
    }
}

fn topmost(dir: &Path) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mut here = fs::openat(CWD, dir, flags, Mode::empty())?;
    loop {
        let above = fs::openat(&here, "..", flags, Mode::empty())?;
        let (own, other) = (fs::fstat(&here)?, fs::fstat(&above)?);
        if own.st_dev != other.st_dev || own.st_ino == other.st_ino {
            return Ok(here);
        }
        here = above;
    }
}
