//! One repetition: what goes through the device while a workload runs, and how long its operations take.

use super::{
    device::Traffic,
    results::{Latency, Sample},
    stand::Stand,
};
use crate::progress::Cancel;
use graphdriver_core::{Context, Error, ErrorKind, Result};
use nix::unistd::{SysconfVar, sysconf};
use std::{
    io,
    time::{Duration, Instant},
};

/// Counts from when it is made, of a stand whose containers are ready. What is cached should have been forgotten.
pub(super) struct Meter<'a> {
    /// Bytes that the program wrote.
    pub written: u64,
    first: Vec<Duration>,
    later: Vec<Duration>,
    stand: &'a Stand,
    cancel: &'a Cancel,
    used: u64,
    begun: Counted,
    counted: Option<Counted>,
}

/// The state of what is counted, at one moment.
struct Counted {
    traffic: Traffic,
    cpu: Duration,
    time: Instant,
    /// The space of the layers, and of the filesystem; 0 at the beginning.
    space: (u64, u64),
}

impl<'a> Meter<'a> {
    /// `used` is what the filesystem held before the containers were made.
    pub fn begin(stand: &'a Stand, used: u64, cancel: &'a Cancel) -> Result<Meter<'a>> {
        stand.sync()?;
        let begun = Counted { traffic: stand.traffic()?, cpu: cpu_time()?, time: Instant::now(), space: (0, 0) };
        Ok(Meter { written: 0, first: Vec::new(), later: Vec::new(), stand, cancel, used, begun, counted: None })
    }

    /// The first operation on a file.
    pub fn first<T>(&mut self, operation: impl FnOnce() -> io::Result<T>) -> Result<T> {
        let (done, took) = timed(self.cancel, operation)?;
        self.first.push(took);
        Ok(done)
    }

    /// One that follows it.
    pub fn later<T>(&mut self, operation: impl FnOnce() -> io::Result<T>) -> Result<T> {
        let (done, took) = timed(self.cancel, operation)?;
        self.later.push(took);
        Ok(done)
    }

    /// Writes everything out and ends the counting. Of operations after it only the time is told.
    pub fn stop(&mut self) -> Result<()> {
        self.stand.sync()?;
        let time = Instant::now();
        let (traffic, cpu) = (self.stand.traffic()?, cpu_time()?);
        let space = (self.stand.space()?, self.stand.medium().used()?.saturating_sub(self.used));
        self.counted = Some(Counted { traffic, cpu, time, space });
        Ok(())
    }

    /// All that was measured. Exports the diff.
    pub fn sample(mut self) -> Result<Sample> {
        if self.counted.is_none() {
            self.stop()?;
        }
        let (begun, counted) = (self.begun, self.counted.expect("stopped above"));
        let traffic = counted.traffic.since(begun.traffic);
        Ok(Sample {
            written: self.written,
            device_written: traffic.written,
            device_read: traffic.read,
            first: latency(self.first),
            later: latency(self.later),
            space: counted.space.0,
            space_on_device: counted.space.1,
            diff: self.stand.diff(self.cancel).doing(|| "exporting the diff")?,
            cpu_us: counted.cpu.saturating_sub(begun.cpu).as_micros() as u64,
            wall_us: (counted.time - begun.time).as_micros() as u64,
        })
    }
}

fn timed<T>(cancel: &Cancel, operation: impl FnOnce() -> io::Result<T>) -> Result<(T, Duration)> {
    cancel.check()?;
    let began = Instant::now();
    let done = operation()?;
    Ok((done, began.elapsed()))
}

fn latency(mut took: Vec<Duration>) -> Option<Latency> {
    took.sort_unstable();
    let last = took.len().checked_sub(1)?;
    let micros = |n: usize| took[n].as_nanos() as f64 / 1000.0;
    // Rounded up: of few operations the slowest.
    Some(Latency { median: micros(last / 2), p99: micros((last * 99).div_ceil(100)), count: took.len() as u64 })
}

/// What all processors have spent so far, in user and system mode.
fn cpu_time() -> Result<Duration> {
    let text = std::fs::read_to_string("/proc/stat").doing(|| "reading /proc/stat")?;
    let per_second = sysconf(SysconfVar::CLK_TCK).ok().flatten().unwrap_or(100) as u64;
    let ticks =
        busy_ticks(&text).ok_or_else(|| Error::new(ErrorKind::Corrupt, "/proc/stat has no line of all processors"))?;
    Ok(Duration::from_micros(ticks * 1_000_000 / per_second))
}

/// user, nice, system, irq and softirq of proc(5)'s first line; between them are idle and iowait.
fn busy_ticks(text: &str) -> Option<u64> {
    let fields = text.lines().next()?.strip_prefix("cpu ")?;
    let fields: Vec<u64> = fields.split_ascii_whitespace().map_while(|field| field.parse().ok()).collect();
    [0, 1, 2, 5, 6].iter().map(|n| fields.get(*n)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slowest_of_a_hundred_is_beyond_p99() {
        assert_eq!(latency(Vec::new()), None);
        let of = |n: u64| latency((1..=n).rev().map(Duration::from_micros).collect()).unwrap();
        assert_eq!(of(1), Latency { median: 1.0, p99: 1.0, count: 1 });
        assert_eq!(of(3), Latency { median: 2.0, p99: 3.0, count: 3 });
        assert_eq!(of(1001), Latency { median: 501.0, p99: 991.0, count: 1001 });
    }

    #[test]
    fn busy_time_leaves_waiting_out() {
        assert_eq!(busy_ticks("cpu  100 20 3 4000 500 6 7 80 9 1\ncpu0 1 2\n"), Some(136));
        assert_eq!(busy_ticks("cpu  1 2"), None);
    }
}
