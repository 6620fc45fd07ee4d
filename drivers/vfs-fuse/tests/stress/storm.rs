//! Many at once, for a moment, and not for ever.

use super::{sys, world::World};
use rustix::io::Errno;
use std::{
    sync::{
        Barrier,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    thread,
    time::{Duration, Instant},
};

/// How long a storm lasts.
pub const STORM: Duration = Duration::from_millis(500);
/// What takes longer than this hangs.
pub const LIMIT: Duration = Duration::from_secs(60);

/// `Some` of what a call gave, `None` if it failed with one of the errors that the race allows; panics on others.
#[macro_export]
macro_rules! may {
    ($call:expr $(, $errno:ident)*) => {
        match $crate::storm::errno($call) {
            Ok(value) => Some(value),
            Err(errno) if [$(rustix::io::Errno::$errno),*].contains(&errno) => None,
            Err(errno) => panic!("{}: {errno}", stringify!($call)),
        }
    };
}

/// What can be turned into an errno.
pub trait IntoErrno {
    /// The errno.
    fn into_errno(self) -> Errno;
}

impl IntoErrno for std::io::Error {
    fn into_errno(self) -> Errno {
        Errno::from_io_error(&self).unwrap_or_else(|| panic!("{self}"))
    }
}

impl IntoErrno for Errno {
    fn into_errno(self) -> Errno {
        self
    }
}

/// A result of std or rustix with its errno.
pub fn errno<T, E: IntoErrno>(result: Result<T, E>) -> Result<T, Errno> {
    result.map_err(IntoErrno::into_errno)
}

/// Ends the daemon if the test has not ended in time: whoever waits for it then gets an error, and the test fails.
pub struct Watchdog(Option<(Sender<()>, thread::JoinHandle<()>)>);

impl Watchdog {
    /// Watches from now on.
    pub fn new(world: &World) -> Watchdog {
        let daemon = world.daemon();
        Watchdog::with(LIMIT, move || {
            eprintln!("hangs: killing the daemon");
            match daemon {
                Some(pid) => sys::kill(pid),
                None => std::process::abort(),
            }
        })
    }

    /// Calls `bark` after `limit`.
    pub fn with(limit: Duration, bark: impl FnOnce() + Send + 'static) -> Watchdog {
        let (alive, over): (Sender<()>, Receiver<()>) = channel();
        let watch = move || {
            if over.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
                bark();
            }
        };
        Watchdog(Some((alive, thread::spawn(watch))))
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        let (alive, thread) = self.0.take().unwrap();
        drop(alive);
        let _ = thread.join();
    }
}

/// Calls `job(thread, round)` again and again on several threads at once. Returns how often in all.
pub fn storm(world: &World, threads: usize, job: impl Fn(usize, usize) + Sync) -> u64 {
    let _watchdog = Watchdog::new(world);
    let (barrier, calls) = (Barrier::new(threads), AtomicU64::new(0));
    thread::scope(|scope| {
        for n in 0..threads {
            let (barrier, calls, job) = (&barrier, &calls, &job);
            scope.spawn(move || {
                barrier.wait();
                let start = Instant::now();
                for round in 0.. {
                    job(n, round);
                    calls.fetch_add(1, Ordering::Relaxed);
                    if start.elapsed() > STORM {
                        break;
                    }
                }
            });
        }
    });
    calls.into_inner()
}

/// Calls `job(n)` once on each of several threads at once.
pub fn together(world: &World, threads: usize, job: impl Fn(usize) + Sync) {
    let _watchdog = Watchdog::new(world);
    let barrier = Barrier::new(threads);
    thread::scope(|scope| {
        for n in 0..threads {
            let (barrier, job) = (&barrier, &job);
            scope.spawn(move || {
                barrier.wait();
                job(n);
            });
        }
    });
}

/// Calls `job(n)` in several processes at once; all must end well.
pub fn processes(world: &World, count: usize, job: impl Fn(usize)) {
    let _watchdog = Watchdog::new(world);
    let children: Vec<_> = (0..count).map(|n| sys::fork(|| job(n))).collect();
    let ended: Vec<_> = children.into_iter().map(sys::Child::join).collect();
    assert!(ended.iter().all(|well| *well), "{ended:?}");
}

/// Reproducible numbers.
pub struct Random(u64);

impl Random {
    /// Differs by seed.
    pub fn new(seed: usize) -> Random {
        Random(seed as u64 + 1)
    }

    /// Below `limit`.
    pub fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % limit
    }
}
