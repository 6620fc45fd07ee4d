//! CoW and RoW as the measurements show them. Every figure here is from the results, and nothing is said of what was not
//! measured.

use super::{
    mechanisms::{self, Mechanism},
    view::{self, Case, Metric, View, bytes, escape, time, times},
};
use crate::bench::results::{Measurement, Spread, Subject};
use std::fmt::Write;

/// Up to so much more than in the plain directory is good, from so much on it is bad.
const GOOD: f64 = 1.5;
const BAD: f64 = 5.0;
/// What lies within this of the best is as good.
const ALIKE: f64 = 1.1;

/// Something by which a reader could choose.
struct Question {
    workload: &'static str,
    /// Which case of it; None: the largest.
    x: Option<u64>,
    metric: Metric,
    show: fn(f64) -> String,
    /// The case comes after it.
    words: &'static str,
    unit: &'static str,
    /// Whether the plain directory says what is good.
    beside_plain: bool,
}

const fn device(workload: &'static str, words: &'static str) -> Question {
    Question {
        workload,
        x: None,
        metric: view::device_written,
        show: bytes,
        words,
        unit: "to the device",
        beside_plain: true,
    }
}

const fn timed(workload: &'static str, metric: Metric, words: &'static str, unit: &'static str) -> Question {
    Question { workload, x: None, metric, show: time, words, unit, beside_plain: true }
}

const QUESTIONS: [Question; 13] = [
    device("first-write", "the first 4 KiB write into a file"),
    timed("first-write", view::first_median, "waiting for the first 4 KiB write into a file", "for the write"),
    // Of the whole file is what copying it first costs least for.
    Question { x: Some(1), ..device("rewrite", "rewriting blocks of a large file for the first time") },
    Question { x: Some(1), ..device("rewrite-again", "rewriting the same blocks once more") },
    device("append", "appending to a file"),
    device("chmod", "chmod of files of the image"),
    device("chown", "chown of files of the image"),
    timed("delete-recreate", view::wall, "deleting a tree and making it again", "in all"),
    device("sqlite", "updating an SQLite database"),
    timed("create", view::wall, "creating small files", "in all"),
    timed("depth", view::first_median, "the first write on many layers", "for the write"),
    Question {
        beside_plain: false,
        unit: "in the layers",
        metric: view::space,
        ..device("containers", "space of containers that write the same blocks")
    },
    Question {
        beside_plain: false,
        unit: "on the filesystem",
        metric: view::space_on_device,
        ..device("containers", "space lost to containers that write the same blocks")
    },
];

/// A section for each mechanism that was measured.
pub(super) fn backends(view: View) -> String {
    let mut done: Vec<&Mechanism> = Vec::new();
    let mut html = String::new();
    for mechanism in view.drivers().filter_map(mechanisms::of) {
        if done.iter().any(|other| other.name == mechanism.name) {
            continue;
        }
        done.push(mechanism);
        let _ = writeln!(html, "<h3>{}</h3>\n{}", escape(mechanism.name), mechanism.text);
        let its_own = |s: &&Subject| mechanisms::of(s).is_some_and(|its| its.name == mechanism.name);
        html.extend(view.drivers().filter(its_own).map(|subject| backend(view, subject)));
    }
    html
}

fn backend(view: View, subject: &Subject) -> String {
    let (name, strategy) = (escape(&subject.name), escape(&subject.strategy));
    let mut html = format!("<h4>{name} <small>{strategy}</small></h4>\n");
    let said = [first_write(view, subject), rewriting(view, subject), depth(view, subject), containers(view, subject)];
    let said: Vec<String> = said.into_iter().flatten().collect();
    if !said.is_empty() {
        let _ = writeln!(html, "<p>{}</p>", said.join(" "));
    }
    let judged = |what: &str, class: &str, findings: Vec<String>| match findings.is_empty() {
        true => String::new(),
        false => format!(
            "<div class=\"{class}\"><b>{what}</b>\n<ul>\n<li>{}</li>\n</ul></div>\n",
            findings.join("</li>\n<li>")
        ),
    };
    let (good, bad) = findings(view, subject);
    html + &judged("Good at", "good", good) + &judged("Bad at", "bad", bad)
}

/// What the largest and the smallest file cost.
fn first_write(view: View, subject: &Subject) -> Option<String> {
    let cases = view.cases("first-write");
    let has = |case: &&Case| view.value(subject, **case, view::device_written).is_some();
    let (small, large) = (cases.iter().find(has)?, cases.iter().rfind(has)?);
    let measured = view.find(subject, *large)?;
    let median = |metric: Metric| metric(measured).map(|spread| spread.median);
    let (wrote, read) = (median(view::device_written)?, median(view::device_read)?);
    let program = median(view::written)?;
    let mut said = format!(
        "The first write of {} into a file of {} wrote {} to the device and read {} from it",
        bytes(program),
        escape(large.name),
        bytes(wrote),
        bytes(read)
    );
    if let Some(amplification) = measured.write_amplification() {
        let _ = write!(said, ": {} times what the program wrote", times(amplification.median).trim_end_matches('×'));
    }
    if let Some(base) = beside(view, subject, *large, view::device_written) {
        let _ = write!(said, " (the plain directory: {})", bytes(base.median));
    }
    if let Some(latency) = median(view::first_median) {
        let _ = write!(said, ". It took {}", time(latency));
    }
    if small != large
        && let Some(wrote) = view.value(subject, *small, view::device_written)
    {
        let _ = write!(said, ". Into a file of {} it wrote {}", escape(small.name), bytes(wrote.median));
    }
    Some(said + ".")
}

/// Each share of a large file, first and second pass.
fn rewriting(view: View, subject: &Subject) -> Option<String> {
    let amplification: Metric = Measurement::write_amplification;
    let passes = |case: &Case| {
        let first = view.value(subject, *case, amplification)?;
        let again = Case { workload: "rewrite-again", ..*case };
        let second = view.value(subject, again, amplification).map(|second| format!(", then {}", times(second.median)));
        Some(format!("{}: {}{}", escape(case.name), times(first.median), second.unwrap_or_default()))
    };
    let shares: Vec<String> = view.cases("rewrite").iter().filter_map(passes).collect();
    (!shares.is_empty()).then(|| {
        format!(
            "Rewriting a part of a large file in random blocks wrote, for each byte, and for each of the second pass over the \
             same blocks: {}.",
            shares.join("; ")
        )
    })
}

fn depth(view: View, subject: &Subject) -> Option<String> {
    let (few, many) = ends(view, subject, "depth", view::first_median)?;
    let (few, many) = ((escape(few.0.name), time(few.1)), (escape(many.0.name), time(many.1)));
    Some(format!("The first write took {} under {}, and {} under {}.", few.1, few.0, many.1, many.0))
}

fn containers(view: View, subject: &Subject) -> Option<String> {
    let (few, many) = ends(view, subject, "containers", view::space)?;
    let each = (many.1 - few.1) / (many.0.x - few.0.x) as f64;
    let (held, number) = (bytes(many.1), escape(many.0.name));
    Some(format!("The layers of {number} held {held}, {} for each further one.", bytes(each)))
}

/// The smallest and the largest case that the subject has, which differ, with their medians.
fn ends<'a>(
    view: View<'a>,
    subject: &Subject,
    workload: &'a str,
    metric: Metric,
) -> Option<((Case<'a>, f64), (Case<'a>, f64))> {
    let cases = view.cases(workload);
    let mut has = cases.iter().filter_map(|case| Some((*case, view.value(subject, *case, metric)?.median)));
    let first = has.next()?;
    has.next_back().filter(|last| last.0.x > first.0.x).map(|last| (first, last))
}

fn beside(view: View, subject: &Subject, case: Case, metric: Metric) -> Option<Spread> {
    view.value(view.baseline(subject)?, case, metric)
}

/// What it does about as well as the plain directory, and what much worse.
fn findings(view: View, subject: &Subject) -> (Vec<String>, Vec<String>) {
    let (mut good, mut bad) = (Vec::new(), Vec::new());
    for question in QUESTIONS.iter().filter(|question| question.beside_plain) {
        let Some(case) = asked(view, question) else { continue };
        let Some(value) = view.value(subject, case, question.metric) else { continue };
        let Some(base) = beside(view, subject, case, question.metric).filter(|base| base.median > 0.0) else {
            continue;
        };
        let ratio = value.median / base.median;
        let said = format!(
            "{} ({}): {} {}, {} the plain directory's {}",
            question.words,
            escape(case.name),
            (question.show)(value.median),
            question.unit,
            times(ratio),
            (question.show)(base.median)
        );
        match (ratio, value.min <= base.max) {
            (ratio, overlap) if ratio <= GOOD || overlap && ratio < BAD => good.push(said),
            // One slow repetition of the plain directory makes nothing good.
            (ratio, false) if ratio >= BAD => bad.push(said),
            _ => {}
        }
    }
    (good, bad)
}

fn asked<'a>(view: View<'a>, question: &Question) -> Option<Case<'a>> {
    match question.x {
        Some(x) => view.cases(question.workload).into_iter().find(|case| case.x == x),
        None => view.largest(question.workload),
    }
}

/// For each question who does best, and who worst. None with fewer than two to choose from.
pub(super) fn choice(view: View) -> Option<String> {
    let rows: String = QUESTIONS.iter().filter_map(|question| choice_row(view, question)).collect();
    (!rows.is_empty()).then(|| {
        format!(
            "<div class=\"wide\"><table>\n<thead><tr><th>what</th><th>least</th><th>most</th></tr></thead>\n<tbody>\n{rows}\
             </tbody></table></div>\n"
        )
    })
}

fn choice_row(view: View, question: &Question) -> Option<String> {
    let case = asked(view, question)?;
    let mut values: Vec<(&Subject, Spread)> =
        view.drivers().filter_map(|s| Some((s, view.value(s, case, question.metric)?))).collect();
    values.sort_by(|a, b| a.1.median.total_cmp(&b.1.median));
    let ([(_, best), ..], [.., (_, worst)]) = (&values[..], &values[..]) else { return None };
    if values.len() < 2 {
        return None;
    }
    let shown = |(subject, value): &(&Subject, Spread)| {
        format!("{} <small>{}</small>", escape(&subject.name), escape((question.show)(value.median)))
    };
    let near = |value: &Spread| value.median <= best.median * ALIKE || value.min <= best.max;
    let far = |value: &Spread| value.median * ALIKE >= worst.median || value.max >= worst.min;
    let listed = |rows: Vec<&(&Subject, Spread)>| rows.into_iter().map(shown).collect::<Vec<_>>().join("<br/>");
    let (least, most) = match near(worst) {
        true => (format!("all alike <small>{}</small>", escape((question.show)(best.median))), "–".to_owned()),
        false => (
            listed(values.iter().filter(|(_, value)| near(value)).collect()),
            listed(values.iter().filter(|(_, value)| far(value) && !near(value)).collect()),
        ),
    };
    let (what, case, unit) = (question.words, escape(case.name), question.unit);
    Some(format!(
        "<tr><th>{what}<br/><small>{case}, {unit}</small></th><td class=\"text\">{least}</td><td class=\"text\">{most}</td></tr>\n"
    ))
}
