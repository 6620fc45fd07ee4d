//! Who uses an upper layer.
//!
//! A daemon locks the upper directory with flock(2) for as long as it has the layer; the driver and `--complete` do while they
//! work on it. Two would overwrite each other's files. The kernel frees the lock however the daemon ends, and only once it has
//! ended: what it wrote is all in the upper filesystem then.

use graphdriver_core::{Context, Error, ErrorKind, Result};
use rustix::{
    fs::{self, CWD, FlockOperation, Mode, OFlags},
    io::Errno,
};
use std::{
    os::fd::OwnedFd,
    path::Path,
    time::{Duration, Instant},
};

/// How long a daemon may take to end after its last mount is gone: it was 0.1 s with six times the work that the CPUs could do.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// Keeps daemons from the layer with this upper directory until the descriptor is closed. Waits for one that is just
/// ending; fails with `Busy` if it does not.
pub fn claim(upper: &Path, patience: Duration) -> Result<OwnedFd> {
    let deadline = Instant::now() + patience;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = fs::openat(CWD, upper, flags, Mode::empty()).doing(|| format!("opening {}", upper.display()))?;
    let mut pause = Duration::from_millis(1);
    loop {
        match fs::flock(&dir, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(dir),
            Err(Errno::AGAIN) if Instant::now() < deadline => std::thread::sleep(pause),
            Err(Errno::AGAIN) => {
                let why = format!("a vfs-fuse has {} mounted", upper.display());
                let hint =
                    format!("unmount it, in every mount namespace; `fuser -v {}` shows the process", upper.display());
                return Err(Error::new(ErrorKind::Busy, why).hint(hint));
            }
            Err(Errno::INTR) => {}
            Err(e) => return Err(Error::from(e).doing(format!("locking {}", upper.display()))),
        }
        pause = (pause * 2).min(Duration::from_millis(10));
    }
}

/// The upper and the work directory, as whoever writes to the layer needs them.
pub fn claim_both(upper: &Path, work: &Path) -> Result<[OwnedFd; 2]> {
    Ok([claim(upper, PATIENCE)?, claim(work, PATIENCE)?])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_has_one_claim_at_a_time_and_waits_for_one_that_ends() {
        let upper = tempfile::tempdir().unwrap();
        let first = claim(upper.path(), Duration::ZERO).unwrap();
        let duplicate = first.try_clone().unwrap();
        drop(first);
        let e = claim(upper.path(), Duration::from_millis(20)).unwrap_err();
        assert!(e.kind() == ErrorKind::Busy && e.to_string().contains("fuser -v"), "{e}");
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(50));
                drop(duplicate);
            });
            claim(upper.path(), PATIENCE).unwrap();
        });
    }
}
