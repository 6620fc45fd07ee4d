//! Two runs beside each other.

use super::results::{Measurement, Results, Sample, Spread};
use graphdriver_core::{Error, ErrorKind, Result};
use serde::Serialize;

/// What changed in one case. A pair is old and new, medians each.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Difference {
    /// As in [`Measurement`].
    pub subject: String,
    /// As in [`Measurement`].
    pub workload: String,
    /// As in [`Measurement`].
    pub case: String,
    /// Bytes that reached the device for each byte written; None where none were.
    pub amplification: Option<(f64, f64)>,
    /// Bytes that the layers hold afterwards; None of plain directories.
    pub space: Option<(f64, f64)>,
    /// Microseconds of the first operation on a file.
    pub first: Option<(f64, f64)>,
    /// Whether the amplification grew past the threshold, and not only within what repetitions differ by.
    pub worse: bool,
}

/// Compares what both have measured. `threshold` is a share: 0.1 for 10%. Fails if they have nothing in common.
pub fn compare(old: &Results, new: &Results, threshold: f64) -> Result<Vec<Difference>> {
    let found = |measurement: &Measurement| old.measurements.iter().find(|other| same(other, measurement));
    let pairs = new.measurements.iter().filter_map(|new| Some((found(new)?, new)));
    let all: Vec<Difference> = pairs.map(|(old, new)| difference(old, new, threshold)).collect();
    match all.is_empty() {
        false => Ok(all),
        true => Err(Error::new(ErrorKind::InvalidInput, "the earlier run has measured none of these cases")
            .hint("compare runs of the same --drivers, --filesystems, --workloads and --size")),
    }
}

/// What makes two runs hard to compare, in words.
pub fn conditions(old: &Results, new: &Results) -> Vec<String> {
    let mut all = Vec::new();
    let mut differ = |what: &str, old: String, new: String| {
        if old != new {
            all.push(format!("{what} was {old} and is {new}"));
        }
    };
    differ("the version", old.version.clone(), new.version.clone());
    differ("the kernel", old.host.kernel.clone(), new.host.kernel.clone());
    differ("the number of processors", old.host.cpus.to_string(), new.host.cpus.to_string());
    differ("the size of the large file in bytes", old.size.to_string(), new.size.to_string());
    for subject in &new.subjects {
        if let Some(before) = old.subjects.iter().find(|other| other.name == subject.name) {
            let options = |of: &super::results::Subject| format!("{:?}", of.driver_options);
            differ(&format!("{}: its strategy", subject.name), before.strategy.clone(), subject.strategy.clone());
            differ(&format!("{}: its options", subject.name), options(before), options(subject));
            differ(
                &format!("{}: how it is mounted", subject.name),
                before.mount_options.clone(),
                subject.mount_options.clone(),
            );
        }
    }
    all
}

fn same(one: &Measurement, other: &Measurement) -> bool {
    (&one.subject, &one.workload, &one.case) == (&other.subject, &other.workload, &other.case)
}

fn difference(old: &Measurement, new: &Measurement, threshold: f64) -> Difference {
    let amplifications = old.write_amplification().zip(new.write_amplification());
    let both = |of: fn(&Sample) -> Option<f64>| {
        let median =
            |of_run: &Measurement| Spread::of(of_run.samples.iter().filter_map(of)).map(|spread| spread.median);
        median(old).zip(median(new))
    };
    Difference {
        subject: new.subject.clone(),
        workload: new.workload.clone(),
        case: new.case.clone(),
        amplification: amplifications.map(|(old, new)| (old.median, new.median)),
        space: both(|sample| sample.space.map(|bytes| bytes as f64)),
        first: both(|sample| sample.first.map(|first| first.median)),
        worse: amplifications.is_some_and(|(old, new)| grew(old, new, threshold)),
    }
}

/// Beyond the spread: the best of the new ones is worse than the worst of the old.
fn grew(old: Spread, new: Spread, threshold: f64) -> bool {
    new.median > old.median * (1.0 + threshold) && new.min > old.max
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spread(values: &[f64]) -> Spread {
        Spread::of(values.iter().copied()).unwrap()
    }

    #[test]
    fn growth_counts_past_the_threshold_and_beyond_the_spread() {
        let old = spread(&[1.0, 1.1, 1.2]);
        assert!(grew(old, spread(&[1.3, 1.3, 1.4]), 0.1));
        assert!(!grew(old, spread(&[1.15, 1.3, 1.4]), 0.1), "it could be by chance");
        assert!(!grew(old, spread(&[1.3, 1.3, 1.4]), 0.2));
        assert!(!grew(old, spread(&[0.5]), 0.1));
        assert!(!grew(old, old, 0.0));
        // Where nothing reached the device, anything is more.
        assert!(grew(spread(&[0.0]), spread(&[0.1]), 0.1));
    }
}
