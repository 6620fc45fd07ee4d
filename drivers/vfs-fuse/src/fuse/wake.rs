//! Keeps idle CPUs easy to wake while requests come in quick succession.
//!
//! Each request wakes a thread of the daemon, and each answer the process that asked. On a machine with nothing else to
//! do these sleep on CPUs that have gone idle, and waking such a CPU can cost more than the request: in a virtual machine
//! it takes the host. Who has `/dev/cpu_dma_latency` open says how long that may take (the kernel's PM QoS). The wish ends
//! with the descriptor, so also with the process, however it ends.
//!
//! What it costs: it holds for all CPUs, and one that may not halt polls. So it is held during a burst only, and where
//! many CPUs would have to bear it, only if asked for.

use crate::config::WakeLatency;
use graphdriver_core::{Context, Result};
use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    sync::{
        Arc, OnceLock,
        atomic::{
            AtomicBool, AtomicU32, AtomicU64,
            Ordering::{AcqRel, Relaxed, Release},
        },
    },
    thread::{self, JoinHandle, Thread},
    time::{Duration, Instant},
};

const DEVICE: &str = "/dev/cpu_dma_latency";
const CPUS: &str = "/sys/devices/system/cpu";
/// In microseconds: allows C1, which takes 1 to 2, and nothing deeper.
const C1: i32 = 2;
/// With more CPUs than that, more of them would be kept from saving power than can have use of it.
const FEW_CPUS: usize = 16;
/// So many requests within [`WINDOW`] begin a burst.
const BURST: u32 = 8;
const WINDOW: Duration = Duration::from_millis(2);
/// How often it is looked at during a burst.
const TICK: Duration = Duration::from_millis(2);
/// Fewer requests in a tick than that are not worth it, and the second such tick in a row is the end of the burst.
const BUSY: u32 = 4;

/// Counts requests and notices where a burst begins.
#[derive(Debug)]
pub struct Requests {
    count: AtomicU32,
    /// Whether there is a ticker, and it waits for a burst.
    waiting: AtomicBool,
    ended: AtomicBool,
    /// When the last but so many request came, in microseconds after `start`.
    marked: AtomicU64,
    start: Instant,
    ticker: OnceLock<Thread>,
}

impl Default for Requests {
    fn default() -> Self {
        Requests {
            count: AtomicU32::new(0),
            waiting: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            marked: AtomicU64::new(0),
            start: Instant::now(),
            ticker: OnceLock::new(),
        }
    }
}

impl Requests {
    /// To be called at each request that somebody waits for.
    pub fn one_more(&self) {
        let before = self.count.fetch_add(1, Relaxed);
        if before.is_multiple_of(BURST) && self.waiting.load(Relaxed) && self.is_burst(self.start.elapsed()) {
            self.wake();
        }
    }

    /// Whether the last [`BURST`] requests came quickly. `now` counts from the start.
    fn is_burst(&self, now: Duration) -> bool {
        let now = now.as_micros() as u64;
        let passed = now.saturating_sub(self.marked.swap(now, Relaxed));
        passed <= WINDOW.as_micros() as u64
    }

    fn wake(&self) {
        // What the ticker did before it waited is seen: that it is there.
        if self.waiting.swap(false, AcqRel)
            && let Some(ticker) = self.ticker.get()
        {
            ticker.unpark();
        }
    }

    /// Sleeps until a burst. `false` at the end.
    fn wait(&self) -> bool {
        self.waiting.store(true, Release);
        while self.waiting.load(Relaxed) && !self.ended.load(Relaxed) {
            thread::park();
        }
        !self.ended.load(Relaxed)
    }

    fn serve(&self, wish: &Wish) {
        self.ticker.set(thread::current()).expect("one ticker");
        while self.wait() {
            // Out of descriptors, for example: the burst is served as well, only not as fast.
            let held = wish.hold().inspect_err(|error| tracing::debug!(%error, "{}", wish.device.display()));
            let (mut seen, mut busy) = (self.count.load(Relaxed), Busy::default());
            while !self.ended.load(Relaxed) {
                thread::sleep(TICK);
                let count = self.count.load(Relaxed);
                if !busy.after_tick(count.wrapping_sub(seen)) {
                    break;
                }
                seen = count;
            }
            drop(held);
        }
    }
}

/// Whether a burst goes on.
#[derive(Debug, Default)]
struct Busy {
    was_quiet: bool,
}

impl Busy {
    fn after_tick(&mut self, requests: u32) -> bool {
        let quiet = requests < BUSY;
        let ends = quiet && self.was_quiet;
        self.was_quiet = quiet;
        !ends
    }
}

/// What the kernel is to be asked for.
#[derive(Debug, PartialEq)]
struct Wish {
    device: PathBuf,
    /// How long waking a CPU may take.
    microseconds: i32,
}

impl Wish {
    /// `None` where it would be of no use, is not allowed, or not wanted.
    fn find(wanted: WakeLatency) -> Option<Wish> {
        let read = |name: &str| fs::read_to_string(Path::new(CPUS).join(name)).ok();
        let microseconds = allowed(wanted, read("cpuidle/current_driver")?.trim(), count(read("online")?.trim())?)?;
        let wish = Wish { device: DEVICE.into(), microseconds };
        wish.hold().ok().map(|_| wish)
    }

    /// Holds as long as the file is open.
    fn hold(&self) -> io::Result<File> {
        let mut file = File::options().write(true).open(&self.device)?;
        file.write_all(&self.microseconds.to_ne_bytes())?;
        Ok(file)
    }
}

/// The kernel's haltpoll governor looks at nothing but whether the wish is 0; the others choose the deepest state that is
/// left fast enough. Without a cpuidle driver nobody reads it.
fn allowed(wanted: WakeLatency, driver: &str, cpus: usize) -> Option<i32> {
    let wanted = match wanted {
        WakeLatency::Auto => cpus <= FEW_CPUS,
        WakeLatency::On => true,
        WakeLatency::Off => false,
    };
    match driver {
        _ if !wanted => None,
        "" | "none" => None,
        "haltpoll" => Some(0),
        _ => Some(C1),
    }
}

/// How many CPUs a list like `0-3,8` names.
fn count(list: &str) -> Option<usize> {
    let counts = list.split(',').map(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        Some(last.parse::<usize>().ok()?.checked_sub(first.parse().ok()?)? + 1)
    });
    counts.sum()
}

/// The thread that asks during bursts. Dropping it ends it.
#[derive(Debug)]
pub struct Ticker {
    requests: Arc<Requests>,
    thread: Option<JoinHandle<()>>,
}

impl Ticker {
    /// Starts it; `None` where there is nothing for it to do, or no thread to be had.
    pub fn start(wanted: WakeLatency, requests: &Arc<Requests>) -> Option<Ticker> {
        let started = Wish::find(wanted).map(|wish| Ticker::with(wish, requests)).transpose();
        started.unwrap_or_else(|e| {
            tracing::warn!("CPUs are not kept easy to wake: {e}");
            None
        })
    }

    fn with(wish: Wish, requests: &Arc<Requests>) -> Result<Ticker> {
        let serving = requests.clone();
        let thread = thread::Builder::new().name("wake-latency".into());
        let thread = thread.spawn(move || serving.serve(&wish)).doing(|| "starting a thread")?;
        Ok(Ticker { requests: requests.clone(), thread: Some(thread) })
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        self.requests.ended.store(true, Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // It panics nowhere, and if it did, it would be at its end as well.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    #[test]
    fn only_what_the_cpus_understand_is_asked_for() {
        use WakeLatency::{Auto, Off, On};
        assert_eq!(allowed(Auto, "haltpoll", 2), Some(0));
        assert_eq!(allowed(Auto, "intel_idle", 16), Some(C1));
        assert_eq!(allowed(Auto, "haltpoll", 17), None, "too many would poll");
        assert_eq!(allowed(On, "haltpoll", 17), Some(0));
        assert_eq!(allowed(On, "none", 2), None);
        assert_eq!(allowed(Off, "haltpoll", 2), None);
        assert_eq!((count("0"), count("0-1"), count("0-3,8,10-11")), (Some(1), Some(2), Some(7)));
        assert_eq!((count(""), count("3-1")), (None, None));
    }

    #[test]
    fn only_requests_in_quick_succession_are_a_burst() {
        let requests = Requests::default();
        let at = |micros| requests.is_burst(Duration::from_micros(micros));
        assert!(!at(10_000), "the first ones");
        assert!(at(12_000));
        assert!(!at(14_001));
        assert!(at(14_002));
    }

    #[test]
    fn a_burst_outlives_one_quiet_tick_and_no_second() {
        let mut busy = Busy::default();
        let ticks = [100, 3, 4, 0, 9, 1, 2].map(|requests| busy.after_tick(requests));
        assert_eq!(ticks, [true, true, true, true, true, true, false]);
    }

    fn is_open(path: &Path) -> bool {
        let fds = fs::read_dir("/proc/self/fd").unwrap();
        fds.flatten().any(|fd| fs::read_link(fd.path()).is_ok_and(|target| target == path))
    }

    /// Makes requests until the device is as wanted.
    fn until(open: bool, device: &Path, act: impl Fn()) {
        let start = Instant::now();
        while is_open(device) != open {
            assert!(start.elapsed() < PATIENCE, "it is {}", if open { "never held" } else { "held for ever" });
            act();
        }
    }

    #[test]
    fn the_wish_is_held_during_bursts_and_no_longer() {
        let dir = tempfile::tempdir().unwrap();
        let device = dir.path().canonicalize().unwrap().join("device");
        fs::write(&device, "").unwrap();
        let requests = Arc::new(Requests::default());
        let ticker = Ticker::with(Wish { device: device.clone(), microseconds: C1 }, &requests).unwrap();
        let request = || (0..BURST).for_each(|_| requests.one_more());
        for _ in 0..3 {
            until(true, &device, request);
            until(false, &device, || thread::sleep(TICK));
        }
        assert_eq!(fs::read(&device).unwrap(), C1.to_ne_bytes());
        until(true, &device, request);
        drop(ticker);
        assert!(!is_open(&device));
        request();
    }
}
