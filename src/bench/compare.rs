//! Two runs beside each other.

use super::{
    Planned,
    results::{Measurement, Results, Sample, Spread},
    workloads::binary,
};
use graphdriver_core::{Error, ErrorKind, Result};
use serde::Serialize;

/// What changed in one case. A pair is old and new, medians each; None where one of them has none.
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
    /// Bytes that reached the device.
    pub device_written: Option<(f64, f64)>,
    /// Bytes that the layers hold afterwards; None of plain directories.
    pub space: Option<(f64, f64)>,
    /// Microseconds of the first operation on a file.
    pub first: Option<(f64, f64)>,
    /// Whether the amplification grew past the threshold, and not only within what repetitions differ by; where the
    /// program wrote nothing, what reached the device.
    pub worse: bool,
    /// Whether it was measured then, and could not be now.
    pub gone: bool,
}

/// Whether a run that is planned can be compared with the earlier one. Fails if they have nothing in common; cases of other
/// sizes have other names.
pub fn check(old: &Results, planned: &Planned) -> Result<()> {
    if old.measurements.iter().any(|one| planned.has(one)) {
        return Ok(());
    }
    let mut why = "the earlier run has measured none of these cases".to_owned();
    if old.size != planned.size {
        why += &format!("; its --size was {}, this one's is {}", binary(old.size), binary(planned.size));
    }
    Err(Error::new(ErrorKind::InvalidInput, why)
        .hint("compare runs of the same --drivers, --filesystems, --workloads and --size"))
}

/// Compares what both have measured, and names what is gone of what was planned. `threshold` is a share: 0.1 for 10%.
pub fn compare(old: &Results, new: &Results, planned: &Planned, threshold: f64) -> Vec<Difference> {
    let now = |measurement: &Measurement| new.measurements.iter().find(|other| same(other, measurement));
    let compared = old.measurements.iter().filter_map(|old| match now(old) {
        Some(new) => Some(difference(old, new, threshold)),
        None if planned.has(old) => Some(gone(old)),
        None => None,
    });
    compared.collect()
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
    if let Some((before, now)) = old.host.scratch.as_ref().zip(new.host.scratch.as_ref()) {
        differ("what the scratch files lie on", before.to_string(), now.to_string());
    }
    differ("the size of the large file in bytes", old.size.to_string(), new.size.to_string());
    for subject in &new.subjects {
        if let Some(before) = old.subjects.iter().find(|other| other.name == subject.name) {
            let options = |of: &super::results::Subject| format!("{:?}", of.driver_options);
            differ(&format!("{}: its strategy", subject.name), before.strategy.clone(), subject.strategy.clone());
            differ(&format!("{}: its options", subject.name), options(before), options(subject));
            // Older versions did not tell.
            for (what, before, now) in [
                ("what its layers are mounted with", &before.layer_options, &subject.layer_options),
                ("what made its filesystem", &before.made_with, &subject.made_with),
            ] {
                if let Some((before, now)) = before.as_ref().zip(now.as_ref()) {
                    differ(&format!("{}: {what}", subject.name), before.clone(), now.clone());
                }
            }
            differ(
                &format!("{}: how it is mounted", subject.name),
                before.mount_options.clone(),
                subject.mount_options.clone(),
            );
        }
    }
    all.extend(only_in(new, old).map(|cases| format!("these were not measured then and are not compared: {cases}")));
    all
}

/// What the one has measured and the other has not: subjects, and of those that both have workloads with cases, each once.
fn only_in(one: &Results, other: &Results) -> Option<String> {
    let mut names: Vec<String> = Vec::new();
    for alone in one.measurements.iter().filter(|here| !other.measurements.iter().any(|there| same(here, there))) {
        let name = match other.measurements.iter().any(|there| there.subject == alone.subject) {
            true => format!("{} {}", alone.workload, alone.case),
            false => alone.subject.clone(),
        };
        if !names.contains(&name) {
            names.push(name);
        }
    }
    (!names.is_empty()).then(|| names.join(", "))
}

fn same(one: &Measurement, other: &Measurement) -> bool {
    (&one.subject, &one.workload, &one.case) == (&other.subject, &other.workload, &other.case)
}

fn difference(old: &Measurement, new: &Measurement, threshold: f64) -> Difference {
    let both = |of: fn(&Sample) -> Option<f64>| {
        let spread = |of_run: &Measurement| Spread::of(of_run.samples.iter().filter_map(of));
        spread(old).zip(spread(new))
    };
    let medians = |spreads: Option<(Spread, Spread)>| spreads.map(|(old, new)| (old.median, new.median));
    let amplification = old.write_amplification().zip(new.write_amplification());
    let device_written = both(|sample| Some(sample.device_written as f64));
    Difference {
        amplification: medians(amplification),
        device_written: medians(device_written),
        space: medians(both(|sample| sample.space.map(|bytes| bytes as f64))),
        first: medians(both(|sample| sample.first.map(|first| first.median))),
        worse: amplification.or(device_written).is_some_and(|(old, new)| grew(old, new, threshold)),
        gone: false,
        ..gone(new)
    }
}

fn gone(old: &Measurement) -> Difference {
    Difference {
        subject: old.subject.clone(),
        workload: old.workload.clone(),
        case: old.case.clone(),
        amplification: None,
        device_written: None,
        space: None,
        first: None,
        worse: false,
        gone: true,
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

    fn measured(subject: &str, workload: &str, case: &str, written: u64, device_written: u64) -> Measurement {
        let (space, space_on_device, cpu_us, wall_us) = (0, 0, 0, 0);
        let sample = serde_json::json!({
            "written": written, "device_written": device_written, "device_read": 0, "space": space,
            "space_on_device": space_on_device, "cpu_us": cpu_us, "wall_us": wall_us,
            "busy_before": 0.0, "load_before": 0.0
        });
        let samples = vec![serde_json::from_value(sample).unwrap()];
        let (subject, workload, case) = (subject.into(), workload.into(), case.into());
        Measurement { subject, workload, case, x: 1, samples }
    }

    fn results(size: u64, measurements: Vec<Measurement>) -> Results {
        let empty = r#"{"format": 2, "version": "1", "began": "", "host": {"kernel": "6", "cpus": 1, "memory": 1}, "size": 1,
            "repetitions": 1, "subjects": [], "measurements": [], "skipped": []}"#;
        Results { size, measurements, ..serde_json::from_str(empty).unwrap() }
    }

    fn planned(size: u64, cases: &[(&str, &str)]) -> Planned {
        let cases = cases.iter().map(|(workload, case)| (workload.to_string(), case.to_string())).collect();
        Planned { subjects: vec!["a".into()], everything: false, cases, size }
    }

    #[test]
    fn what_only_changes_metadata_is_compared_by_its_bytes() {
        let run = |bytes| results(1, vec![measured("a", "chmod", "1000 files", 0, bytes)]);
        let compared = |old, new| compare(&run(old), &run(new), &Planned::default(), 0.1).pop().unwrap();
        assert!(compared(100, 5000).worse && !compared(5000, 100).worse && !compared(100, 105).worse);
        assert_eq!(compared(100, 5000).device_written, Some((100.0, 5000.0)));
        assert_eq!(compared(100, 5000).amplification, None);
    }

    #[test]
    fn what_is_gone_is_named_and_what_was_not_asked_for_is_not() {
        let old = results(
            1,
            vec![
                measured("a", "rewrite", "1%", 1, 1),
                measured("a", "rewrite-again", "1%", 1, 1),
                measured("a", "append", "1 MiB", 1, 1),
                measured("b", "rewrite", "1%", 1, 1),
            ],
        );
        let new = results(1, vec![measured("a", "rewrite", "1%", 1, 1)]);
        let told = |planned: &Planned| {
            let all = compare(&old, &new, planned, 0.1).into_iter().filter(|one| one.gone);
            all.map(|one| format!("{} {}", one.subject, one.workload)).collect::<Vec<_>>()
        };
        let some = planned(1, &[("rewrite", "1%")]);
        assert_eq!(told(&some), ["a rewrite-again"]);
        assert_eq!(told(&Planned { everything: true, ..some }), ["a rewrite-again", "b rewrite"]);
    }

    #[test]
    fn a_run_with_nothing_in_common_is_refused() {
        let old = results(16 << 20, vec![measured("a", "append", "16 MiB", 1, 1)]);
        check(&old, &planned(16 << 20, &[("append", "16 MiB"), ("chmod", "1000 files")])).unwrap();
        let e = check(&old, &planned(1 << 20, &[("append", "1 MiB")])).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::InvalidInput);
        assert!(["16 MiB", "1 MiB", "--size"].iter().all(|part| e.to_string().contains(part)), "{e}");
    }

    #[test]
    fn what_only_the_new_run_has_is_named_and_no_change() {
        let old = results(64, vec![measured("a", "append", "64 MiB", 1, 1)]);
        let new = results(1, vec![measured("a", "append", "1 MiB", 1, 9), measured("b", "append", "1 MiB", 1, 9)]);
        assert!(conditions(&old, &new).iter().any(|one| one.ends_with("are not compared: append 1 MiB, b")));
        assert!(!conditions(&old, &old).iter().any(|one| one.contains("not compared")));
        assert!(compare(&old, &new, &planned(1, &[("append", "1 MiB")]), 0.1).is_empty());
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
