//! Every figure, with its spread.

use super::view::{self, Metric, View, bytes, count, escape, time, times, title, with_spread};
use crate::bench::results::{Measurement, Subject};
use std::fmt::Write;

struct Column {
    name: &'static str,
    metric: Metric,
    show: fn(f64) -> String,
}

const COLUMNS: [Column; 18] = [
    Column { name: "written by the program", metric: view::written, show: bytes },
    Column { name: "reached the device", metric: view::device_written, show: bytes },
    Column { name: "read from it", metric: view::device_read, show: bytes },
    Column { name: "write amplification", metric: Measurement::write_amplification, show: times },
    Column { name: "read amplification", metric: Measurement::read_amplification, show: times },
    Column { name: "first operations", metric: view::first_count, show: count },
    Column { name: "their median", metric: view::first_median, show: time },
    Column { name: "the slowest of them", metric: view::first_slowest, show: time },
    Column { name: "99 of 100 of them", metric: view::first_p99, show: time },
    Column { name: "later operations", metric: view::later_count, show: count },
    Column { name: "their median", metric: view::later_median, show: time },
    Column { name: "the slowest of them", metric: view::later_slowest, show: time },
    Column { name: "99 of 100 of them", metric: view::later_p99, show: time },
    Column { name: "space of the layers", metric: view::space, show: bytes },
    Column { name: "space on the filesystem", metric: view::space_on_device, show: bytes },
    Column { name: "exported diff", metric: view::diff, show: bytes },
    Column { name: "CPU (whole machine)", metric: view::cpu, show: time },
    Column { name: "time, with the sync", metric: view::wall, show: time },
];

/// One table for each workload.
pub(super) fn all(view: View) -> String {
    view.workloads().into_iter().map(|workload| of_workload(view, workload)).collect()
}

fn of_workload(view: View, workload: &str) -> String {
    let measurements = || view.results.measurements.iter().filter(|m| m.workload == workload);
    let columns: Vec<&Column> = COLUMNS.iter().filter(|c| measurements().any(|m| (c.metric)(m).is_some())).collect();
    let name = match title(workload) {
        unknown if unknown == workload => String::new(),
        known => format!(": {}", escape(known)),
    };
    let mut html = format!("<h3><code>{}</code>{name}</h3>\n<div class=\"wide\"><table>\n", escape(workload));
    let heads: String = columns.iter().map(|column| format!("<th>{}</th>", column.name)).collect();
    let _ = writeln!(html, "<thead><tr><th>case</th><th>subject</th>{heads}</tr></thead>");
    for case in view.cases(workload) {
        html.push_str("<tbody>\n");
        let rows: Vec<_> = view.measured().filter_map(|s| Some((s, view.find(s, case)?))).collect();
        for (at, (subject, measurement)) in rows.iter().enumerate() {
            let head = match at {
                0 => format!("<th rowspan=\"{}\">{}</th>", rows.len(), escape(case.name)),
                _ => String::new(),
            };
            let cells: String = columns.iter().map(|column| cell(column, measurement)).collect();
            let _ = writeln!(html, "<tr>{head}{}{cells}</tr>", subject_cell(subject));
        }
        html.push_str("</tbody>\n");
    }
    html + "</table></div>\n"
}

fn subject_cell(subject: &Subject) -> String {
    let class = if subject.driver.is_none() { " class=\"plain\"" } else { "" };
    format!("<th{class}>{}</th>", escape(&subject.name))
}

/// The median large, and the smallest and largest below it if they differ.
fn cell(column: &Column, measurement: &Measurement) -> String {
    let Some(spread) = (column.metric)(measurement) else {
        return "<td>–</td>".to_owned();
    };
    let text = with_spread(spread, column.show);
    match text.split_once(" (") {
        Some((median, range)) => {
            format!("<td>{}<br/><small>{}</small></td>", escape(median), escape(range.trim_end_matches(')')))
        }
        None => format!("<td>{}</td>", escape(text)),
    }
}

/// What ran where.
pub(super) fn setup(view: View) -> String {
    let results = view.results;
    let host = &results.host;
    let facts = [
        ("began", results.began.clone()),
        ("graphdriver", results.version.clone()),
        ("kernel", host.kernel.clone()),
        ("processors", host.cpus.to_string()),
        ("memory", bytes(host.memory as f64)),
        ("scratch files on", host.scratch.as_ref().map_or_else(|| "not told".into(), ToString::to_string)),
        ("largest file", format!("{}; others have their size in the name of the case", bytes(results.size as f64))),
        ("repetitions", format!("{}, each on a fresh filesystem", results.repetitions)),
        ("disturbances", results.disturbance().unwrap_or_else(|| "none: the processors were idle before".into())),
    ];
    let facts: String =
        facts.iter().map(|(name, value)| format!("<dt>{name}</dt><dd>{}</dd>\n", escape(value))).collect();
    let mut html = format!("<dl>\n{facts}</dl>\n<div class=\"wide\"><table>\n");
    html.push_str("<thead><tr><th>subject</th><th>how it writes</th><th>filesystem</th><th>driver options</th>");
    html.push_str("<th>mount options</th><th>layers mounted with</th><th>made with</th></tr></thead>\n<tbody>\n");
    for subject in &results.subjects {
        let options: Vec<String> = subject.driver_options.iter().map(|(key, value)| format!("{key}={value}")).collect();
        let told = |text: &Option<String>| text.clone().unwrap_or_else(|| "–".into());
        let (layers, made) = (told(&subject.layer_options), told(&subject.made_with));
        let options = options.join(", ");
        let cells = [&subject.strategy, &subject.filesystem, &options, &subject.mount_options, &layers, &made];
        let cells: String = cells.iter().map(|cell| format!("<td class=\"text\">{}</td>", escape(cell))).collect();
        let _ = writeln!(html, "<tr>{}{cells}</tr>", subject_cell(subject));
    }
    html + "</tbody></table></div>\n"
}

/// What was not measured, and why.
pub(super) fn skipped(view: View) -> String {
    if view.results.skipped.is_empty() {
        return "<p>Nothing: all that was asked for was measured.</p>\n".to_owned();
    }
    let mut html =
        "<div class=\"wide\"><table>\n<thead><tr><th>subject</th><th>workload</th><th>why</th></tr></thead>\n\
                    <tbody>\n"
            .to_owned();
    for skipped in &view.results.skipped {
        let workload = skipped.workload.as_deref().unwrap_or("all");
        let (subject, reason) = (escape(&skipped.subject), escape(&skipped.reason));
        let workload = escape(workload);
        let _ = writeln!(
            html,
            "<tr><th>{subject}</th><td class=\"text\">{workload}</td><td class=\"text\">{reason}</td></tr>"
        );
    }
    html + "</tbody></table></div>\n"
}
