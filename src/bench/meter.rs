//! One repetition: what goes through the device while a workload runs, and how long its operations take.

use super::{
    device::Traffic,
    results::{Latency, Sample},
    stand::Stand,
};
use crate::progress::Cancel;
use graphdriver_core::{Context, Error, ErrorKind, Result};
use nix::unistd::{SysconfVar, sysconf};
use rustix::system::sysinfo;
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
    others: Others,
    traffic: Traffic,
    cpu: Duration,
    time: Instant,
}

/// What the machine does besides.
struct Others {
    busy: f64,
    load: f64,
}

impl<'a> Meter<'a> {
    pub fn begin(stand: &'a Stand, cancel: &'a Cancel) -> Result<Meter<'a>> {
        stand.sync()?;
        stand.settle()?;
        let others = others()?;
        let (traffic, cpu, time) = (stand.traffic()?, cpu_time()?, Instant::now());
        Ok(Meter { written: 0, first: Vec::new(), later: Vec::new(), stand, cancel, others, traffic, cpu, time })
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

    /// Writes everything out and ends the counting. What the layers hold and export is to be added.
    pub fn stop(self) -> Result<Sample> {
        self.stand.sync()?;
        let (wall, cpu) = (self.time.elapsed(), cpu_time()?.saturating_sub(self.cpu));
        self.stand.settle()?;
        let traffic = self.stand.traffic()?.since(self.traffic);
        Ok(Sample {
            written: self.written,
            device_written: traffic.written,
            device_read: traffic.read,
            first: latency(self.first),
            later: latency(self.later),
            space: None,
            space_on_device: None,
            diff: None,
            cpu_us: cpu.as_micros() as u64,
            wall_us: wall.as_micros() as u64,
            busy_before: self.others.busy,
            load_before: self.others.load,
        })
    }
}

/// Calls it unless that was cancelled.
pub(super) fn timed<T>(cancel: &Cancel, operation: impl FnOnce() -> io::Result<T>) -> Result<(T, Duration)> {
    cancel.check()?;
    let began = Instant::now();
    let done = operation()?;
    Ok((done, began.elapsed()))
}

/// None of nothing.
pub(super) fn latency(mut took: Vec<Duration>) -> Option<Latency> {
    took.sort_unstable();
    let last = took.len().checked_sub(1)?;
    let micros = |n: usize| took[n].as_nanos() as f64 / 1000.0;
    // Rounded up: of few operations the slowest.
    Some(Latency { median: micros(last / 2), p99: micros((last * 99).div_ceil(100)), count: took.len() as u64 })
}

/// Long enough for the ticks of two processors to tell 3%.
const WATCHED: Duration = Duration::from_millis(200);

/// Does nothing for a moment and watches.
fn others() -> Result<Others> {
    let before = ticks()?;
    std::thread::sleep(WATCHED);
    let now = ticks()?;
    let of = |ticks: &Ticks| (ticks.busy + ticks.stolen, ticks.busy + ticks.stolen + ticks.idle);
    let ((busy_before, all_before), (busy, all)) = (of(&before), of(&now));
    let share = busy.saturating_sub(busy_before) as f64 / all.saturating_sub(all_before).max(1) as f64;
    // 1/65536ths.
    Ok(Others { busy: share.min(1.0), load: sysinfo().loads[0] as f64 / 65536.0 })
}

/// What all processors have spent so far, in user and system mode.
fn cpu_time() -> Result<Duration> {
    let per_second = sysconf(SysconfVar::CLK_TCK).ok().flatten().unwrap_or(100) as u64;
    Ok(Duration::from_micros(ticks()?.busy * 1_000_000 / per_second))
}

/// How the time of all processors went so far.
#[derive(Debug, PartialEq, Eq)]
struct Ticks {
    /// user, nice, system, irq and softirq.
    busy: u64,
    /// idle and iowait.
    idle: u64,
    /// Taken by the host of a virtual machine.
    stolen: u64,
}

fn ticks() -> Result<Ticks> {
    let text = std::fs::read_to_string("/proc/stat").doing(|| "reading /proc/stat")?;
    parse(&text).ok_or_else(|| Error::new(ErrorKind::Corrupt, "/proc/stat has no line of all processors"))
}

/// The first line, as proc(5) has it.
fn parse(text: &str) -> Option<Ticks> {
    let fields = text.lines().next()?.strip_prefix("cpu ")?;
    let fields: Vec<u64> = fields.split_ascii_whitespace().map_while(|field| field.parse().ok()).collect();
    let sum = |of: &[usize]| of.iter().map(|n| fields.get(*n)).sum::<Option<u64>>();
    Some(Ticks { busy: sum(&[0, 1, 2, 5, 6])?, idle: sum(&[3, 4])?, stolen: sum(&[7])? })
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
        let all = Ticks { busy: 136, idle: 4500, stolen: 80 };
        assert_eq!(parse("cpu  100 20 3 4000 500 6 7 80 9 1\ncpu0 1 2\n"), Some(all));
        assert_eq!(parse("cpu  1 2"), None);
    }
}
