//! What a run measured, as `results.json` holds it.

use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, fmt};

/// The version of the format. It grows with a change that older programs would misread, or of what the figures mean.
pub const FORMAT: u32 = 2;

/// One run, whole: the contents of `results.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Results {
    /// [`FORMAT`].
    pub format: u32,
    /// The version of graphdriver that measured.
    pub version: String,
    /// When the run began: RFC 3339, UTC.
    pub began: String,
    /// Where it ran.
    pub host: Host,
    /// Size of the large lower file, in bytes.
    pub size: u64,
    /// How often each case ran on a fresh filesystem.
    pub repetitions: u32,
    /// What was measured, in the order of the table.
    pub subjects: Vec<Subject>,
    /// What came of it, by subject and then by workload.
    pub measurements: Vec<Measurement>,
    /// What could not be measured, and why.
    pub skipped: Vec<Skipped>,
}

/// The machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// `uname -r`.
    pub kernel: String,
    /// Processors.
    pub cpus: u32,
    /// Memory, in bytes.
    pub memory: u64,
    /// Where the files below the loop devices lay, on which latencies depend. None in runs of versions that did not tell.
    #[serde(default)]
    pub scratch: Option<Scratch>,
}

/// The filesystem of the scratch directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scratch {
    /// Its type.
    pub filesystem: String,
    /// Its device, or what mountinfo has in its place.
    pub device: String,
    /// As the kernel shows them in mountinfo.
    pub mount_options: String,
}

impl fmt::Display for Scratch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}; {})", self.filesystem, self.device, self.mount_options)
    }
}

/// A driver on a filesystem, or the plain directory it is compared with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subject {
    /// `overlay2 on ext4`, `plain directory on ext4`: what measurements name.
    pub name: String,
    /// None for the plain directory, which is the baseline of its filesystem.
    pub driver: Option<String>,
    /// The filesystem on the loop device; for devicemapper the one on its thin devices.
    pub filesystem: String,
    /// As the kernel shows them in mountinfo.
    pub mount_options: String,
    /// What a layer is asked to be mounted with, without the places of its parts: `metacopy=on`, …. None for the plain
    /// directory, and in runs of versions that did not tell.
    #[serde(default)]
    pub layer_options: Option<String>,
    /// What made the filesystem, with its options. None where nothing did, and in runs of versions that did not tell.
    #[serde(default)]
    pub made_with: Option<String>,
    /// Its options, by name.
    pub driver_options: BTreeMap<String, String>,
    /// In words, with the unit: `copy-up (whole file)`, `redirect-on-write (64 KiB blocks)`.
    pub strategy: String,
}

/// One case of a workload on one subject.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Measurement {
    /// The subject's name.
    pub subject: String,
    /// `first-write`, `rewrite`, …
    pub workload: String,
    /// Which case of it, for the reader, with the size of its files where that depends on the run's: `64 KiB`, `10% of 64 MiB`.
    pub case: String,
    /// The number in it, for a chart's axis: bytes, percent, layers or containers.
    pub x: u64,
    /// One per repetition.
    pub samples: Vec<Sample>,
}

/// What one repetition took. Bytes of the device are what its block layer counted until after a sync.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Bytes that the program wrote. 0 for workloads that change only metadata, which have no amplification.
    pub written: u64,
    /// Bytes that reached the device; of xfs with what its log alone would hold after a sync.
    pub device_written: u64,
    /// Bytes that were read from it. Caches were dropped before.
    pub device_read: u64,
    /// Latency of the first operation on each file.
    pub first: Option<Latency>,
    /// Latency of the operations after it.
    pub later: Option<Latency>,
    /// Bytes that the layers written to hold afterwards, unmounted once, as their driver measures them. None where there are no
    /// layers (the plain directory, which is its own image).
    pub space: Option<u64>,
    /// Bytes that the filesystem lost to it, as `statfs` shows; None as above.
    pub space_on_device: Option<u64>,
    /// Size of the exported diff, in bytes; None where nothing is exported (the plain directory).
    pub diff: Option<u64>,
    /// Time that the processors spent, user and system of the whole machine, in microseconds: drivers work in the kernel and in
    /// other processes too. In steps of 10 ms, and others' work is in it: see `busy_before` and [`Sample::cpu`].
    pub cpu_us: u64,
    /// Time on the clock until after the sync, in microseconds.
    pub wall_us: u64,
    /// The share of all processors' time that others took while this waited, just before: 0 to 1.
    pub busy_before: f64,
    /// The load average of one minute at that time.
    pub load_before: f64,
}

/// Microseconds per operation.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Latency {
    /// Half took less.
    pub median: f64,
    /// One of a hundred took more; of up to a hundred, the slowest.
    pub p99: f64,
    /// How many there were.
    pub count: u64,
}

/// What was not measured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// The subject's name.
    pub subject: String,
    /// None: all of them.
    pub workload: Option<String>,
    /// And what would help.
    pub reason: String,
}

/// The middle of several repetitions, and how far they lie apart.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spread {
    /// Half of the values are smaller.
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
}

impl Spread {
    /// None of nothing.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Spread> {
        let mut all: Vec<f64> = values.into_iter().collect();
        all.sort_by(f64::total_cmp);
        let (min, max) = (*all.first()?, *all.last()?);
        let middle = all.len() / 2;
        let median = if all.len() % 2 == 1 { all[middle] } else { (all[middle - 1] + all[middle]) / 2.0 };
        Some(Spread { median, min, max })
    }
}

/// Below it, steps of 10 ms say little.
const LEAST_CPU_US: u64 = 50_000;

/// The share of the processors' time beyond which others disturb.
const DISTURBING: f64 = 0.1;

impl Sample {
    /// `cpu_us`, if it is enough to be told apart from its steps.
    pub fn cpu(&self) -> Option<f64> {
        (self.cpu_us >= LEAST_CPU_US).then_some(self.cpu_us as f64)
    }
}

impl Results {
    /// What to say if others kept the processors busy.
    pub fn disturbance(&self) -> Option<String> {
        let all: Vec<&Sample> = self.measurements.iter().flat_map(|measurement| &measurement.samples).collect();
        let disturbed = all.iter().filter(|sample| sample.busy_before > DISTURBING).count();
        let worst = all.iter().map(|sample| sample.busy_before).fold(0.0, f64::max) * 100.0;
        (disturbed > 0).then(|| {
            format!(
                "before {disturbed} of {} repetitions others kept the processors busy for more than {:.0}% of the time, {worst:.0}% \
                 at the most: processor times hold their work too, and other times waited for it; bytes are not touched by it",
                all.len(),
                DISTURBING * 100.0
            )
        })
    }
}

impl Measurement {
    /// Bytes that reached the device for each byte written; None if the program wrote none.
    pub fn write_amplification(&self) -> Option<Spread> {
        self.per_byte(|sample| sample.device_written)
    }

    /// Bytes read from the device for each byte written.
    pub fn read_amplification(&self) -> Option<Spread> {
        self.per_byte(|sample| sample.device_read)
    }

    fn per_byte(&self, bytes: impl Fn(&Sample) -> u64) -> Option<Spread> {
        let wrote = self.samples.iter().filter(|sample| sample.written > 0);
        Spread::of(wrote.map(|sample| bytes(sample) as f64 / sample.written as f64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_spread_of_values() {
        assert_eq!(Spread::of([]), None);
        assert_eq!(Spread::of([3.0, 1.0, 2.0]), Some(Spread { median: 2.0, min: 1.0, max: 3.0 }));
        assert_eq!(Spread::of([4.0, 1.0]), Some(Spread { median: 2.5, min: 1.0, max: 4.0 }));
    }
}
