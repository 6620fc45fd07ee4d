//! Looking things up in results, and figures in words.

use crate::bench::results::{Latency, Measurement, Results, Sample, Spread, Subject};
use std::fmt::Display;

/// What is taken from a measurement.
pub(super) type Metric = fn(&Measurement) -> Option<Spread>;

/// In the order of the report. What a later version measures too comes after them.
const WORKLOADS: [(&str, &str); 12] = [
    ("first-write", "First 4 KiB write into a file of the image, by the file's size"),
    ("rewrite", "Rewriting a part of a file of the image, random blocks of 4 KiB"),
    ("rewrite-again", "The same blocks once more"),
    ("append", "Appending to a file of the image"),
    ("chmod", "chmod of many files of the image"),
    ("chown", "chown of many files of the image"),
    ("delete-recreate", "Deleting a tree of the image and making it again"),
    ("sqlite", "Updating an SQLite database of the image; the program's bytes are those of its rollback journal too"),
    ("create", "Creating many small files"),
    ("depth", "First 4 KiB write into a file of the lowest of several layers"),
    ("depth-chmod", "chmod of many files of the lowest of several layers"),
    ("containers", "Containers of one image that write 1 MiB each into the same blocks, one container after the other"),
];

/// Results, with the questions that charts, tables and texts ask of them.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    pub results: &'a Results,
}

/// A case of a workload. Its name tells it from others; `x` puts them in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Case<'a> {
    pub workload: &'a str,
    pub name: &'a str,
    pub x: u64,
}

impl<'a> View<'a> {
    /// The driver's subjects, without the plain directories.
    pub fn drivers(self) -> impl Iterator<Item = &'a Subject> {
        self.measured().filter(|subject| subject.driver.is_some())
    }

    /// Subjects of which there is anything.
    pub fn measured(self) -> impl Iterator<Item = &'a Subject> {
        let measurements = &self.results.measurements;
        self.results.subjects.iter().filter(|subject| measurements.iter().any(|m| m.subject == subject.name))
    }

    /// Where the subject comes in the list of all, by which its colour and shape are chosen.
    pub fn position(self, subject: &Subject) -> usize {
        let alike = self.results.subjects.iter().filter(|other| other.driver.is_some() == subject.driver.is_some());
        alike.take_while(|other| other.name != subject.name).count()
    }

    /// The plain directory on the subject's filesystem.
    pub fn baseline(self, subject: &Subject) -> Option<&'a Subject> {
        let mut plain = self.results.subjects.iter().filter(|other| other.driver.is_none());
        plain.find(|other| other.filesystem == subject.filesystem)
    }

    /// Names of what was measured: the known ones first, in the order of the report.
    pub fn workloads(self) -> Vec<&'a str> {
        let mut names: Vec<&str> = Vec::new();
        for measurement in &self.results.measurements {
            if !names.contains(&measurement.workload.as_str()) {
                names.push(&measurement.workload);
            }
        }
        names.sort_by_key(|name| WORKLOADS.iter().position(|(known, _)| known == name).unwrap_or(WORKLOADS.len()));
        names
    }

    /// Cases of a workload by their number.
    pub fn cases(self, workload: &'a str) -> Vec<Case<'a>> {
        let mut cases: Vec<Case> = Vec::new();
        for m in self.results.measurements.iter().filter(|m| m.workload == workload) {
            let case = Case { workload, name: &m.case, x: m.x };
            if !cases.contains(&case) {
                cases.push(case);
            }
        }
        cases.sort_by_key(|case| case.x);
        cases
    }

    /// The case with the largest number.
    pub fn largest(self, workload: &'a str) -> Option<Case<'a>> {
        self.cases(workload).pop()
    }

    pub fn find(self, subject: &Subject, case: Case) -> Option<&'a Measurement> {
        self.results
            .measurements
            .iter()
            .find(|m| m.subject == subject.name && m.workload == case.workload && m.case == case.name && m.x == case.x)
    }

    /// The metric of a subject in a case.
    pub fn value(self, subject: &Subject, case: Case, metric: Metric) -> Option<Spread> {
        metric(self.find(subject, case)?)
    }
}

/// What a workload does, in words; the name of one that is not known here.
pub(super) fn title(workload: &str) -> &str {
    WORKLOADS.iter().find(|(known, _)| *known == workload).map_or(workload, |(_, title)| title)
}

fn over(measurement: &Measurement, of: impl Fn(&Sample) -> f64) -> Option<Spread> {
    Spread::of(measurement.samples.iter().map(of))
}

fn latency(m: &Measurement, of: impl Fn(&Sample) -> Option<Latency>, take: fn(Latency) -> f64) -> Option<Spread> {
    Spread::of(m.samples.iter().filter_map(of).map(take).filter(|value| value.is_finite()))
}

pub(super) fn written(m: &Measurement) -> Option<Spread> {
    over(m, |sample| sample.written as f64)
}

pub(super) fn device_written(m: &Measurement) -> Option<Spread> {
    over(m, |sample| sample.device_written as f64)
}

pub(super) fn device_read(m: &Measurement) -> Option<Spread> {
    over(m, |sample| sample.device_read as f64)
}

pub(super) fn space(m: &Measurement) -> Option<Spread> {
    Spread::of(m.samples.iter().filter_map(|sample| sample.space).map(|bytes| bytes as f64))
}

pub(super) fn space_on_device(m: &Measurement) -> Option<Spread> {
    Spread::of(m.samples.iter().filter_map(|sample| sample.space_on_device).map(|bytes| bytes as f64))
}

pub(super) fn diff(m: &Measurement) -> Option<Spread> {
    Spread::of(m.samples.iter().filter_map(|sample| sample.diff).map(|bytes| bytes as f64))
}

pub(super) fn cpu(m: &Measurement) -> Option<Spread> {
    Spread::of(m.samples.iter().filter_map(Sample::cpu))
}

pub(super) fn wall(m: &Measurement) -> Option<Spread> {
    over(m, |sample| sample.wall_us as f64)
}

pub(super) fn first_median(m: &Measurement) -> Option<Spread> {
    latency(m, |sample| sample.first, |latency| latency.median)
}

pub(super) fn first_count(m: &Measurement) -> Option<Spread> {
    latency(m, |sample| sample.first, |latency| latency.count as f64)
}

/// Of fewer than a hundred, of which there is no hundredth part; nothing of one, which is its own median.
pub(super) fn first_slowest(m: &Measurement) -> Option<Spread> {
    latency(m, |sample| sample.first.filter(|latency| (2..100).contains(&latency.count)), |latency| latency.p99)
}

pub(super) fn first_p99(m: &Measurement) -> Option<Spread> {
    latency(m, |sample| sample.first.filter(|latency| latency.count >= 100), |latency| latency.p99)
}

pub(super) fn later_count(m: &Measurement) -> Option<Spread> {
    latency(m, |sample| sample.later, |latency| latency.count as f64)
}

/// As [`first_slowest`].
pub(super) fn later_slowest(m: &Measurement) -> Option<Spread> {
    latency(m, |sample| sample.later.filter(|latency| (2..100).contains(&latency.count)), |latency| latency.p99)
}

pub(super) fn later_median(m: &Measurement) -> Option<Spread> {
    latency(m, |sample| sample.later, |latency| latency.median)
}

pub(super) fn later_p99(m: &Measurement) -> Option<Spread> {
    latency(m, |sample| sample.later.filter(|latency| latency.count >= 100), |latency| latency.p99)
}

/// `1,000`.
pub(super) fn count(value: f64) -> String {
    number(value)
}

/// `4 KiB`, `1.5 GiB`: three digits.
pub(super) fn bytes(value: f64) -> String {
    scaled(value, 1024.0, &["B", "KiB", "MiB", "GiB", "TiB", "PiB"])
}

/// Of microseconds: `85 µs`, `1.2 s`.
pub(super) fn time(value: f64) -> String {
    scaled(value, 1000.0, &["µs", "ms", "s"])
}

/// `1.03×`, `262,144×`.
pub(super) fn times(value: f64) -> String {
    format!("{}×", number(value))
}

fn scaled(value: f64, step: f64, units: &[&str]) -> String {
    let (mut value, mut unit) = (value, 0);
    while value.abs() >= step && unit + 1 < units.len() {
        value /= step;
        unit += 1;
    }
    format!("{} {}", number(value), units[unit])
}

/// Three digits, two of what is very small, and no zeros at the end, thousands with commas.
fn number(value: f64) -> String {
    let decimals = match value.abs() {
        small if small < 0.01 && small > 0.0 => (1.0 - small.log10().floor()).min(9.0) as usize,
        small if small < 10.0 => 2,
        middle if middle < 100.0 => 1,
        _ => 0,
    };
    let text = format!("{value:.decimals$}");
    if decimals > 0 {
        return text.trim_end_matches('0').trim_end_matches('.').to_owned();
    }
    let digits = text.trim_start_matches('-').len();
    let mut grouped = String::new();
    for (at, digit) in text.chars().enumerate() {
        let left = text.len() - at;
        if left < digits && left.is_multiple_of(3) && digit.is_ascii_digit() {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

/// `12 (10–15)`: the median and, if they lie apart, the smallest and the largest.
pub(super) fn with_spread(spread: Spread, show: impl Fn(f64) -> String) -> String {
    let (median, min, max) = (show(spread.median), show(spread.min), show(spread.max));
    match min == max {
        true => median,
        false => format!("{median} ({min}–{max})"),
    }
}

/// Text for HTML and XML, in elements and in attributes. Control characters, which XML has no way to hold, become U+FFFD.
pub(super) fn escape(text: impl Display) -> String {
    let mut escaped = String::new();
    for c in text.to_string().chars() {
        match c {
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '&' => escaped.push_str("&amp;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            c => escaped.push(printable(c)),
        }
    }
    escaped
}

/// The character, unless XML cannot hold it.
pub(super) fn printable(c: char) -> char {
    match c {
        '\n' | '\t' => ' ',
        c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => '\u{fffd}',
        c => c,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_in_words() {
        let all = [bytes(0.0), bytes(4096.0), bytes(1.5 * 1024.0 * 1024.0 * 1024.0), bytes(1023.0), bytes(1e30)];
        assert_eq!(all[..4], ["0 B", "4 KiB", "1.5 GiB", "1,023 B"]);
        assert!(all[4].ends_with(" PiB"), "{}", all[4]);
        assert_eq!([time(0.5), time(999.0), time(1500.0), time(61e6)], ["0.5 µs", "999 µs", "1.5 ms", "61 s"]);
        assert_eq!([times(1.0), times(262_144.0), times(0.001), times(12.34)], ["1×", "262,144×", "0.001×", "12.3×"]);
        assert_eq!(number(-1234.0), "-1,234");
    }

    #[test]
    fn spreads_are_shown_where_they_are() {
        let all = |median, min, max| with_spread(Spread { median, min, max }, times);
        assert_eq!([all(2.0, 1.0, 3.0), all(2.0, 2.0, 2.0)], ["2× (1×–3×)", "2×"]);
    }

    #[test]
    fn text_is_escaped() {
        assert_eq!(escape("<a href=\"x\">&'\u{1}"), "&lt;a href=&quot;x&quot;&gt;&amp;&#39;\u{fffd}");
    }
}
