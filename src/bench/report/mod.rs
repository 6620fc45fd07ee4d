//! Results as a page that a person reads: charts, tables, and what they mean.

mod canvas;
mod chart;
mod explain;
mod mechanisms;
mod tables;
#[cfg(test)]
mod tests;
mod view;

use super::results::{Measurement, Results};
use chart::{Lines, Panels, Quantity};
use graphdriver_core::Result;
use view::{Case, View, bytes, escape, time, times};

const STYLE: &str = include_str!("style.css");

const WRITTEN: Quantity = Quantity {
    metric: Measurement::write_amplification,
    name: "bytes that reached the device for each byte written",
    base: 10.0,
    show: times,
};
const READ: Quantity = Quantity {
    metric: Measurement::read_amplification,
    name: "bytes read from the device for each byte written",
    base: 10.0,
    show: times,
};
const WAITED: Quantity =
    Quantity { metric: view::first_median, name: "time of the first write, median", base: 10.0, show: time };
const CHANGED: Quantity = Quantity { name: "time of a chmod, median of the files", ..WAITED };
const ARRIVED: Quantity = Quantity {
    metric: view::wall,
    name: "time until the first write is on the device: the write, and a sync",
    base: 10.0,
    show: time,
};
const HELD: Quantity = Quantity {
    metric: view::space,
    name: "bytes that the layers hold, as their driver measures them",
    base: 16.0,
    show: bytes,
};
const LOST: Quantity =
    Quantity { metric: view::space_on_device, name: "bytes that the filesystem lost to them", base: 16.0, show: bytes };

/// What amplification by driver and workload is shown of: the workload, its case, and the panel's heading, in which `{}` is
/// the case's name. Without a case it is the largest.
const TELLING: [(&str, Option<u64>, &str); 9] = [
    ("first-write", None, "first 4 KiB into {}"),
    ("rewrite", Some(1), "rewriting {}"),
    ("rewrite-again", Some(1), "{} once more"),
    ("rewrite", None, "rewriting {}"),
    ("append", None, "appending to {}"),
    ("sqlite", None, "updating an SQLite database"),
    ("create", None, "creating small files"),
    ("delete-recreate", None, "replacing a tree"),
    ("containers", None, "{}"),
];

/// The page: one HTML document that needs no other file, no network and no script. Everything that comes from the
/// results is escaped.
///
/// # Errors
///
/// If a chart cannot be drawn, which no results are known to cause.
pub fn html(results: &Results) -> Result<String> {
    let view = View { results };
    let sections = [
        ("Write amplification", amplification(view)?),
        ("The first write", first_write(view)?),
        ("Rewriting a large file", rewriting(view)?),
        ("Space over the number of containers", space(view)?),
        ("Read amplification and depth", others(view)?),
        ("Copy-on-write and redirect-on-write", explanation(view)),
        ("Which one for what", explain::choice(view).map_or(String::new(), |table| CHOICE.to_owned() + &table)),
        ("What ran where", tables::setup(view)),
        ("What was not measured", tables::skipped(view)),
        ("All figures", format!("<p>Median, and below it the smallest and the largest.</p>\n{}", tables::all(view))),
    ];
    let filled = sections.iter().filter(|(_, content)| !content.is_empty());
    let body: String = filled.map(|(title, content)| format!("<h2>{title}</h2>\n{content}")).collect();
    Ok(format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n<title>What copy-on-write costs</title>\n\
         <style>\n{STYLE}</style>\n</head>\n<body>\n<h1>What copy-on-write costs</h1>\n<p>Measured with <code>graphdriver \
         bench write-amplification</code> {} on Linux {}, {}.</p>\n{body}</body>\n</html>\n",
        escape(&results.version),
        escape(&results.host.kernel),
        escape(&results.began),
    ))
}

/// One picture for a README: how many bytes reach the device for each byte of a first write, by the file's size. A
/// stand-alone SVG with a background of its own.
///
/// # Errors
///
/// As [`html`].
pub fn picture(results: &Results) -> Result<String> {
    let chart =
        Lines { workload: "first-write", quantity: FIRST_WRITE, across: "size of the file of the image", alone: true };
    let drawn = chart::lines(View { results }, &chart)?;
    drawn.map_or_else(
        || {
            canvas::svg((600, 60), "nothing was measured", |area| {
                canvas::paper(area)?;
                canvas::text(area, (12, 30), canvas::Align::Left, canvas::INK, "The first write was not measured.", 80)
            })
        },
        Ok,
    )
}

const FIRST_WRITE: Quantity =
    Quantity { name: "bytes that reached the device for each byte of a first 4 KiB write", ..WRITTEN };

fn figure(caption: &str, drawn: Option<String>) -> String {
    drawn.map_or(String::new(), |svg| format!("<figure><figcaption>{caption}</figcaption>\n{svg}</figure>\n"))
}

fn lines(view: View, workload: &str, quantity: Quantity, across: &'static str, caption: &str) -> Result<String> {
    Ok(figure(caption, chart::lines(view, &Lines { workload, quantity, across, alone: false })?))
}

/// The telling cases that there are, with their headings.
fn telling(view: View) -> Vec<(Case, String)> {
    let mut cases: Vec<(Case, String)> = Vec::new();
    for (workload, x, heading) in TELLING {
        let of_it = view.cases(workload);
        let case = match x {
            Some(x) => of_it.iter().find(|case| case.x == x),
            None => of_it.last(),
        };
        if let Some(case) = case.filter(|case| cases.iter().all(|(other, _)| other != *case)) {
            cases.push((*case, heading.replace("{}", case.name)));
        }
    }
    cases
}

fn panels(view: View, quantity: Quantity, caption: &str) -> Result<String> {
    let telling = telling(view);
    let cases = telling.iter().map(|(case, heading)| (*case, heading.as_str())).collect();
    Ok(figure(caption, chart::panels(view, &Panels { cases, quantity, tick: chart::short })?))
}

fn amplification(view: View) -> Result<String> {
    panels(
        view,
        WRITTEN,
        "<b>Bytes that reached the device for each byte that the program wrote</b>, by driver and workload, until after a sync. \
         The upright mark is a plain directory on the same filesystem: what the filesystem takes for its own journal or tree. \
         The way from there to the coloured point is the driver's. Logarithmic; all panels have the same axis, and 0 is drawn \
         at its beginning.",
    )
}

fn first_write(view: View) -> Result<String> {
    let size = "size of the file of the image";
    let waited = lines(
        view,
        "first-write",
        WAITED,
        size,
        "<b>How long the first 4 KiB write into a file of the image takes</b>, by the file's size. A line that climbs with the \
         size copies the file; a flat one does not. Both axes are logarithmic; upright strokes go from the fastest to the slowest \
         repetition. Points stand side by side so that none hides another. <b>This is not all of the work</b>: a copy of a whole \
         file is flushed before its first write returns, while reflinks, thin-pool blocks and trees do most of theirs when the data \
         is written back. Compare drivers by the next chart.",
    )?;
    let arrived = lines(
        view,
        "first-write",
        ARRIVED,
        size,
        "<b>And how long until all of it is on the device</b>: the same write and a sync of its filesystem, which has the work that \
         was put off. With vfs-fuse the whole machine is synced, as nothing less reaches what the kernel caches of it; of zfs the \
         start of <code>zpool sync</code> is in it.",
    )?;
    let written = "<b>And how many bytes it writes</b> for each byte of the program's.";
    Ok(waited + &arrived + &lines(view, "first-write", FIRST_WRITE, size, written)?)
}

fn rewriting(view: View) -> Result<String> {
    let part = "part of the file that is rewritten, in random blocks of 4 KiB";
    let size = size_of_cases(view, "rewrite");
    let first = format!(
        "<b>The first pass</b>{size}: the more of a file is rewritten, the smaller is the share of having copied it."
    );
    let first = lines(view, "rewrite", WRITTEN, part, &first)?;
    let again = "<b>The second pass over the same blocks</b>: what was copied once is the layer's own.";
    Ok(first + &lines(view, "rewrite-again", WRITTEN, part, again)?)
}

fn space(view: View) -> Result<String> {
    let across = "containers of one image that write the same blocks, one after the other";
    let size = size_of_cases(view, "containers");
    let held = format!(
        "<b>What the containers' layers hold</b>, each written 1 MiB (or all of a smaller file){size}. Read after they were \
         unmounted once, so that nothing is in it that the filesystem only took in advance."
    );
    let held = lines(view, "containers", HELD, across, &held)?;
    let lost = "<b>What the filesystem lost to them</b>: less than they hold where they share data.";
    Ok(held + &lines(view, "containers", LOST, across, lost)?)
}

fn others(view: View) -> Result<String> {
    let read = panels(
        view,
        READ,
        "<b>Bytes read from the device for each byte written</b>, with cold caches: what had to be read to be copied, and the \
         metadata on the way.",
    )?;
    let deep = "<b>The first write under a stack of layers.</b> A flat line: depth costs nothing.";
    let deep = lines(view, "depth", WAITED, "layers of the image", deep)?;
    let changed = "<b>chmod of files in the lowest layer of such a stack.</b> Of the other workloads all have an image of one layer.";
    Ok(read + &deep + &lines(view, "depth-chmod", CHANGED, "layers of the image", changed)?)
}

/// ` (a file of 64 MiB)`, from the names of the workload's cases; nothing where these have none.
fn size_of_cases(view: View, workload: &str) -> String {
    let cases = view.cases(workload);
    let size = cases.first().and_then(|case| size_in(case.name));
    size.map_or(String::new(), |size| format!(" (a file of {})", escape(size)))
}

fn size_in(name: &str) -> Option<&str> {
    let (_, size) = name.split_once(" (").or_else(|| name.split_once(" of "))?;
    Some(size.trim_end_matches(')'))
}

fn explanation(view: View) -> String {
    match explain::backends(view) {
        nothing if nothing.is_empty() => nothing,
        backends => COW.to_owned() + &backends,
    }
}

const COW: &str = "<p>An image's layers never change, so a driver has to keep the old data when a container writes. \
    <b>Copy-on-write (CoW)</b>: the old data is copied first, and the copy is overwritten: a read and a second write, at the \
    moment of the first change. <b>Redirect-on-write (RoW)</b>: the new data goes to a new place, and the old stays \
    where it is: nothing is copied, and the bookkeeping of places is written instead. What decides about the price is the \
    <b>unit</b>, what is copied or redirected at the least. Amplification is device bytes divided by the program's bytes; \
    \u{201c}good\u{201d} below means up to 1.5 times what the plain directory took or within its spread, \u{201c}bad\u{201d} 5 \
    times and more.</p>\n";

const CHOICE: &str = "<p>The least and the most for each kind of work, in its largest case. Several are named where they lie \
    within 10% of the best or within its spread. Times of different machines cannot be compared, bytes can.</p>\n";
