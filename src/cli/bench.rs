//! `bench`: the tables, the files, and the comparison with earlier ones.

use super::{
    args::{Global, WriteAmplificationArgs},
    output::{self, Output},
    progress::Bars,
};
use graphdriver::{
    bench::{
        self, Options,
        compare::{self, Difference},
        output as files,
        results::{Latency, Measurement, Results, Sample, Spread},
    },
    config,
    progress::{Cancel, Progress, Silent},
};
use graphdriver_core::{Context, Error, ErrorKind, Result};
use serde::Serialize;
use std::path::PathBuf;

pub(crate) fn write_amplification(
    out: &Output,
    args: WriteAmplificationArgs,
    global: &Global,
    cancel: &Cancel,
) -> Result<()> {
    let old = args.compare.as_deref().map(files::read).transpose()?;
    let options = options(&args, global)?;
    let planned = bench::plan(&options)?;
    if let Some(old) = &old {
        compare::check(old, &planned)?;
    }
    files::check(&args.output)?;
    let bars = Bars::counting_on_terminal();
    let progress: &dyn Progress = bars.as_ref().map_or(&Silent, |bars| bars);
    let results = bench::run(&options, progress, cancel)?;
    if results.measurements.is_empty() {
        let reasons: Vec<_> = results.skipped.iter().map(|one| format!("{}: {}", one.subject, one.reason)).collect();
        return Err(Error::new(ErrorKind::Unsupported, reasons.join("; ")).doing("nothing could be measured"));
    }
    // If that fails, what was measured is at least shown.
    let written = files::write(&args.output, &results);
    let differences = old.as_ref().map(|old| compare::compare(old, &results, &planned, args.threshold));
    if out.is_json() {
        let notes = old.as_ref().map(|old| compare::conditions(old, &results));
        output::json(&Told { results: &results, comparison: differences.as_deref(), comparison_notes: notes })?;
    } else {
        table(out, &results)?;
        if let Some((old, differences)) = old.as_ref().zip(differences.as_ref()) {
            comparison(out, old, &results, differences)?;
        }
    }
    written.doing(|| "keeping the results, which are shown above")?;
    if !out.is_json() {
        let [results, report] = [files::RESULTS, files::REPORT].map(|name| args.output.join(name));
        output::line(format_args!("\nWritten to {}; to be read in {}", results.display(), report.display()))?;
    }
    verdict(&options, &results, differences.as_deref().unwrap_or_default(), args.threshold)
}

/// The flags; neither the settings file nor the environment, whose options are those of the host's own data.
fn options(args: &WriteAmplificationArgs, global: &Global) -> Result<Options> {
    let drivers = match args.drivers.as_slice() {
        [] => global.storage_driver.iter().cloned().collect(),
        asked => asked.to_vec(),
    };
    let scratch = args.scratch.clone().or_else(|| std::env::var_os("TMPDIR").map(PathBuf::from));
    Ok(Options {
        drivers,
        filesystems: args.filesystems.clone(),
        workloads: args.workloads.clone(),
        size: args.size,
        repetitions: args.repetitions,
        scratch: scratch.unwrap_or_else(|| "/var/tmp".into()),
        storage_opts: config::parse_options(&global.storage_opt)?,
    })
}

#[derive(Serialize)]
struct Told<'a> {
    #[serde(flatten)]
    results: &'a Results,
    #[serde(skip_serializing_if = "Option::is_none")]
    comparison: Option<&'a [Difference]>,
    /// What makes it hard to compare.
    #[serde(skip_serializing_if = "Option::is_none")]
    comparison_notes: Option<Vec<String>>,
}

/// By workload and case, so that those who did the same stand below each other.
fn table(out: &Output, results: &Results) -> Result<()> {
    let mut all: Vec<&Measurement> = results.measurements.iter().collect();
    let workload = |one: &Measurement| results.measurements.iter().position(|other| other.workload == one.workload);
    all.sort_by_key(|one| (workload(one), one.x));
    let header = [
        "WORKLOAD",
        "CASE",
        "SUBJECT",
        "WRITTEN",
        "DISK WRITTEN",
        "AMPLIFICATION",
        "DISK READ",
        "READ AMPL.",
        "FIRST",
        "FIRST P99",
        "LATER",
        "LATER P99",
        "SPACE",
        "ON DISK",
        "DIFF",
        "CPU (whole machine)",
        "TIME",
    ];
    let rows: Vec<_> = all.iter().map(|one| row(one)).collect();
    out.wide_table(&header, &rows, 3)?;
    for subject in &results.subjects {
        output::line(format_args!("{}: {}; {}", subject.name, subject.strategy, subject.mount_options))?;
    }
    for one in &results.skipped {
        let workload = one.workload.as_deref().map(|name| format!(", {name}")).unwrap_or_default();
        output::line(format_args!("not measured: {}{workload}: {}", one.subject, one.reason))?;
    }
    if let Some(scratch) = &results.host.scratch {
        output::line(format_args!("scratch files: on {scratch}"))?;
    }
    if let Some(disturbance) = results.disturbance() {
        output::line(format_args!("note: {disturbance}"))?;
    }
    Ok(())
}

fn row(one: &Measurement) -> Vec<String> {
    let median =
        |of: fn(&Sample) -> Option<f64>| Spread::of(one.samples.iter().filter_map(of)).map(|spread| spread.median);
    let size = |bytes: Option<f64>| bytes.map_or_else(|| "-".into(), binary);
    let time = |micros: Option<f64>| micros.map_or_else(|| "-".into(), time);
    vec![
        one.workload.clone(),
        one.case.clone(),
        one.subject.clone(),
        size(median(|sample| Some(sample.written as f64).filter(|bytes| *bytes > 0.0))),
        size(median(|sample| Some(sample.device_written as f64))),
        one.write_amplification().map_or_else(|| "-".into(), spread),
        size(median(|sample| Some(sample.device_read as f64))),
        one.read_amplification().map_or_else(|| "-".into(), |spread| number(spread.median)),
        time(median(|sample| sample.first.map(|first| first.median))),
        time(median(|sample| p99(sample.first))),
        time(median(|sample| sample.later.map(|later| later.median))),
        time(median(|sample| p99(sample.later))),
        size(median(|sample| sample.space.map(|bytes| bytes as f64))),
        size(median(|sample| sample.space_on_device.map(|bytes| bytes as f64))),
        size(median(|sample| sample.diff.map(|bytes| bytes as f64))),
        time(median(Sample::cpu)),
        time(median(|sample| Some(sample.wall_us as f64))),
    ]
}

/// None of fewer than a hundred operations, of which it would only be the slowest.
fn p99(of: Option<Latency>) -> Option<f64> {
    of.filter(|latency| latency.count >= 100).map(|latency| latency.p99)
}

/// Three significant digits, and no more.
fn number(value: f64) -> String {
    match value {
        _ if value == 0.0 => "0".into(),
        _ if value < 10.0 => format!("{value:.2}"),
        _ if value < 100.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

/// The median; in brackets the smallest and the largest, if they differ.
fn spread(of: Spread) -> String {
    let [median, min, max] = [of.median, of.min, of.max].map(number);
    if min == max { median } else { format!("{median} ({min}–{max})") }
}

/// As the report has them: `16 MiB`, `4.5 KiB`.
fn binary(bytes: f64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let (mut value, mut unit) = (bytes, 0);
    while value >= 1024.0 && unit + 1 < units.len() {
        (value, unit) = (value / 1024.0, unit + 1);
    }
    format!("{} {}", number(value).trim_end_matches(".00").trim_end_matches(".0"), units[unit])
}

fn time(micros: f64) -> String {
    let (value, unit) = match micros {
        _ if micros < 1000.0 => (micros, "µs"),
        _ if micros < 1e6 => (micros / 1e3, "ms"),
        _ => (micros / 1e6, "s"),
    };
    format!("{} {unit}", number(value))
}

fn comparison(out: &Output, old: &Results, new: &Results, differences: &[Difference]) -> Result<()> {
    output::line(format_args!("\nSince {}:\n", old.began))?;
    let header = ["WORKLOAD", "CASE", "SUBJECT", "TO DISK BEFORE", "NOW", "CHANGE", "SPACE", "FIRST", ""];
    let change = |pair: Option<(f64, f64)>| match pair {
        Some((old, new)) if old > 0.0 => format!("{:+.0}%", (new / old - 1.0) * 100.0),
        Some((old, new)) if old == new => "+0%".into(),
        _ => "-".into(),
    };
    out.list(&header, differences, |one| {
        // Work that writes no data has bytes alone.
        let to_disk = |pick: fn((f64, f64)) -> f64| match (one.amplification, one.device_written) {
            (Some(pair), _) => format!("{}×", number(pick(pair))),
            (None, Some(pair)) => binary(pick(pair)),
            (None, None) => "-".into(),
        };
        vec![
            one.workload.clone(),
            one.case.clone(),
            one.subject.clone(),
            to_disk(|pair| pair.0),
            to_disk(|pair| pair.1),
            change(one.amplification.or(one.device_written)),
            change(one.space),
            change(one.first),
            match one {
                Difference { gone: true, .. } => "GONE",
                Difference { worse: true, .. } => "WORSE",
                _ => "",
            }
            .into(),
        ]
    })?;
    compare::conditions(old, new).iter().try_for_each(|one| output::line(format_args!("note: {one}")))
}

/// What was not measured as it should have been, or has become worse.
fn verdict(options: &Options, results: &Results, differences: &[Difference], threshold: f64) -> Result<()> {
    let named = |pick: fn(&Difference) -> bool| {
        let all = differences.iter().filter(|one| pick(one));
        all.map(|one| format!("{} {} {}", one.subject, one.workload, one.case)).collect::<Vec<_>>().join(", ")
    };
    let (worse, gone) = (named(|one| one.worse), named(|one| one.gone));
    let mut why = Vec::new();
    if !worse.is_empty() {
        why.push(format!("more than {}% more reaches the disk than before: {worse}", threshold * 100.0));
    }
    if !gone.is_empty() {
        why.push(format!("measured before and not now, the last lines above say why: {gone}"));
    }
    if !why.is_empty() {
        return Err(Error::new(ErrorKind::Io, why.join("; ")));
    }
    let missing = missing(options, results);
    if !missing.is_empty() {
        let why = format!("{} could not be measured; the last lines above say why", missing.join(", "));
        return Err(Error::new(ErrorKind::Unsupported, why));
    }
    let failed = results.skipped.iter().filter(|one| one.workload.is_some() && one.subject != "all").count();
    match failed {
        0 => Ok(()),
        n => Err(Error::new(ErrorKind::Io, format!("{n} cases could not be measured; the last lines above say why"))),
    }
}

/// Drivers and filesystems that were asked for by name, and of which there is nothing.
fn missing<'a>(options: &'a Options, results: &Results) -> Vec<&'a str> {
    let drivers = results.subjects.iter().filter_map(|subject| subject.driver.as_deref());
    let filesystems = results.subjects.iter().map(|subject| subject.filesystem.as_str());
    let driver = options.drivers.iter().filter(|name| drivers.clone().all(|known| known != name.as_str()));
    let filesystem = options.filesystems.iter().filter(|name| filesystems.clone().all(|known| known != name.as_str()));
    driver.chain(filesystem).map(String::as_str).collect()
}
