//! CPUs that stay awake while requests follow each other.
//!
//! Every request wakes the daemon and every answer wakes the caller. Where the CPU had nothing to do meanwhile, that takes as
//! long as leaving its idle state: in a virtual machine tens of microseconds, for most requests more than the work they are.
//! The kernel lets root bound that time, for all CPUs, by what is written to `/dev/cpu_dma_latency`, as long as it is open
//! (Documentation/admin-guide/pm/cpuidle.rst, "Power Management Quality of Service for CPUs").

use std::{
    fs::{self, File},
    io::Write,
    path::PathBuf,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread::{self, JoinHandle, Thread},
    time::Duration,
};

/// So often it is looked whether requests still come.
const TICK: Duration = Duration::from_millis(2);
/// So many requests in a tick are a burst: then they are at most half a millisecond apart.
const BURST: u64 = 4;
/// After so many requests the ticker looks whether they were a burst.
const GLANCE: u64 = 16;

/// Counts requests, and keeps CPUs awake during bursts. By itself, before [`Wakefulness::start`], it only counts.
#[derive(Debug, Default)]
pub(super) struct Wakefulness {
    requests: AtomicU64,
    /// Whether the ticker looks at the count anyway.
    looking: AtomicBool,
    ended: AtomicBool,
    ticker: OnceLock<Thread>,
}

/// The thread that looks at the count. Parked while nothing comes. Ends when dropped.
#[derive(Debug)]
pub(super) struct Ticker(Arc<Wakefulness>, Option<JoinHandle<()>>);

impl Wakefulness {
    /// A request has come.
    pub fn count(&self) {
        let before = self.requests.fetch_add(1, Relaxed);
        if before % GLANCE == GLANCE - 1 && !self.looking.load(Relaxed) {
            self.ticker.get().inspect(|ticker| ticker.unpark());
        }
    }

    /// Begins to keep CPUs awake, if this process may. To be called once, in the process that serves.
    pub fn start(self: Arc<Self>) -> Option<Ticker> {
        let limit = Limit::of_this_machine();
        // Who may not has no use for the thread.
        limit.hold().ok()?;
        let shared = self.clone();
        let thread = thread::Builder::new().name("wakefulness".into()).spawn(move || shared.run(&limit)).ok()?;
        self.ticker.set(thread.thread().clone()).expect("started once");
        Some(Ticker(self, Some(thread)))
    }

    fn run(&self, limit: &Limit) {
        while !self.ended.load(Relaxed) {
            thread::park();
            self.looking.store(true, Relaxed);
            if self.is_burst() {
                let held = limit.hold();
                if let Err(e) = &held {
                    tracing::debug!("the CPUs cannot be kept awake any more: {e}");
                }
                while self.is_burst() {}
            }
            self.looking.store(false, Relaxed);
        }
    }

    /// Whether requests come one after the other; takes a tick.
    fn is_burst(&self) -> bool {
        let before = self.requests.load(Relaxed);
        thread::sleep(TICK);
        !self.ended.load(Relaxed) && self.requests.load(Relaxed).wrapping_sub(before) >= BURST
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        self.0.ended.store(true, Relaxed);
        if let Some(thread) = self.1.take() {
            thread.thread().unpark();
            // It has nothing to tell.
            let _ = thread.join();
        }
    }
}

/// What is asked of the kernel.
#[derive(Debug)]
struct Limit {
    device: PathBuf,
    microseconds: i32,
}

impl Limit {
    /// In a virtual machine (idle driver haltpoll) only 0 has an effect: CPUs poll instead of leaving to the host. Elsewhere
    /// 2 µs lets them halt, which is left about as quickly, but not sleep deeper.
    fn of_this_machine() -> Limit {
        let driver = fs::read_to_string("/sys/devices/system/cpu/cpuidle/current_driver").unwrap_or_default();
        let microseconds = if driver.trim() == "haltpoll" { 0 } else { 2 };
        Limit { device: "/dev/cpu_dma_latency".into(), microseconds }
    }

    /// Holds as long as the file is open.
    fn hold(&self) -> std::io::Result<File> {
        let mut file = File::options().write(true).open(&self.device)?;
        file.write_all(&self.microseconds.to_ne_bytes())?;
        Ok(file)
    }
}
