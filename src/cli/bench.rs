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
        results::{Measurement, Results, Sample, Spread},
    },
    config,
    progress::{Cancel, Progress, Silent},
};
use graphdriver_core::{ByteSize, Error, ErrorKind, Result};
use serde::Serialize;
use std::path::PathBuf;

pub(crate) fn write_amplification(
    out: &Output,
    args: WriteAmplificationArgs,
    global: &Global,
    cancel: &Cancel,
) -> Result<()> {
    let old = args.compare.as_deref().map(files::read).transpose()?;
    files::check(&args.output)?;
    let bars = Bars::counting_on_terminal();
    let progress: &dyn Progress = bars.as_ref().map_or(&Silent, |bars| bars);
    let results = bench::run(&options(&args, global)?, progress, cancel)?;
    if results.measurements.is_empty() {
        let reasons: Vec<_> = results.skipped.iter().map(|one| format!("{}: {}", one.subject, one.reason)).collect();
        return Err(Error::new(ErrorKind::Unsupported, reasons.join("; ")).doing("nothing could be measured"));
    }
    files::write(&args.output, &results)?;
    let differences = old.as_ref().map(|old| compare::compare(old, &results, args.threshold)).transpose()?;
    if out.is_json() {
        output::json(&Told { results: &results, comparison: differences.as_deref() })?;
    } else {
        table(out, &results)?;
        if let Some((old, differences)) = old.as_ref().zip(differences.as_ref()) {
            comparison(out, old, &results, differences)?;
        }
        let [results, report] = [files::RESULTS, files::REPORT].map(|name| args.output.join(name));
        output::line(format_args!("\nWritten to {}; to be read in {}", results.display(), report.display()))?;
    }
    verdict(&results, differences.as_deref().unwrap_or_default(), args.threshold)
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
        "FIRST",
        "LATER",
        "SPACE",
        "ON DISK",
        "DIFF",
        "CPU (whole machine)",
        "TIME",
    ];
    out.list(&header, &all, |one| row(one))?;
    output::line("")?;
    for subject in &results.subjects {
        output::line(format_args!("{}: {}; {}", subject.name, subject.strategy, subject.mount_options))?;
    }
    for one in &results.skipped {
        let workload = one.workload.as_deref().map(|name| format!(", {name}")).unwrap_or_default();
        output::line(format_args!("not measured: {}{workload}: {}", one.subject, one.reason))?;
    }
    if let Some(disturbance) = results.disturbance() {
        output::line(format_args!("note: {disturbance}"))?;
    }
    Ok(())
}

fn row(one: &Measurement) -> Vec<String> {
    let median =
        |of: fn(&Sample) -> Option<f64>| Spread::of(one.samples.iter().filter_map(of)).map(|spread| spread.median);
    let size = |bytes: Option<f64>| bytes.map_or_else(|| "-".into(), |bytes| ByteSize(bytes as u64).to_string());
    let time = |micros: Option<f64>| micros.map_or_else(|| "-".into(), time);
    vec![
        one.workload.clone(),
        one.case.clone(),
        one.subject.clone(),
        size(median(|sample| Some(sample.written as f64).filter(|bytes| *bytes > 0.0))),
        size(median(|sample| Some(sample.device_written as f64))),
        one.write_amplification().map_or_else(|| "-".into(), |spread| number(spread.median)),
        size(median(|sample| Some(sample.device_read as f64))),
        time(median(|sample| sample.first.map(|first| first.median))),
        time(median(|sample| sample.later.map(|later| later.median))),
        size(median(|sample| sample.space.map(|bytes| bytes as f64))),
        size(median(|sample| sample.space_on_device.map(|bytes| bytes as f64))),
        size(median(|sample| sample.diff.map(|bytes| bytes as f64))),
        time(median(Sample::cpu)),
        time(median(|sample| Some(sample.wall_us as f64))),
    ]
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
    let header = ["WORKLOAD", "CASE", "SUBJECT", "AMPLIFICATION BEFORE", "NOW", "CHANGE", "SPACE", "FIRST", ""];
    let change = |pair: Option<(f64, f64)>| match pair {
        Some((old, new)) if old > 0.0 => format!("{:+.0}%", (new / old - 1.0) * 100.0),
        Some((old, new)) if old == new => "+0%".into(),
        _ => "-".into(),
    };
    out.list(&header, differences, |one| {
        let times =
            |pick: fn((f64, f64)) -> f64| one.amplification.map_or_else(|| "-".into(), |pair| number(pick(pair)));
        vec![
            one.workload.clone(),
            one.case.clone(),
            one.subject.clone(),
            times(|pair| pair.0),
            times(|pair| pair.1),
            change(one.amplification),
            change(one.space),
            change(one.first),
            if one.worse { "WORSE" } else { "" }.into(),
        ]
    })?;
    compare::conditions(old, new).iter().try_for_each(|one| output::line(format_args!("note: {one}")))
}

/// What was not measured as it should have been, or has become worse.
fn verdict(results: &Results, differences: &[Difference], threshold: f64) -> Result<()> {
    let worse: Vec<_> = differences.iter().filter(|one| one.worse).collect();
    if !worse.is_empty() {
        let names: Vec<_> = worse.iter().map(|one| format!("{} {} {}", one.subject, one.workload, one.case)).collect();
        let why = format!("more than {}% more reaches the disk than before: {}", threshold * 100.0, names.join(", "));
        return Err(Error::new(ErrorKind::Io, why));
    }
    let failed = results.skipped.iter().filter(|one| one.workload.is_some() && one.subject != "all").count();
    match failed {
        0 => Ok(()),
        n => Err(Error::new(ErrorKind::Io, format!("{n} cases could not be measured; the last lines above say why"))),
    }
}
