use super::*;
use crate::bench::results::{FORMAT, Host, Latency, Measurement, Sample, Scratch, Skipped, Subject};
use roxmltree::Document;
use std::collections::BTreeMap;

const KIB: u64 = 1 << 10;
const GIB: u64 = 1 << 30;

fn subject(name: &str, driver: Option<&str>, filesystem: &str, strategy: &str) -> Subject {
    Subject {
        name: name.to_owned(),
        driver: driver.map(str::to_owned),
        filesystem: filesystem.to_owned(),
        mount_options: "rw,relatime".to_owned(),
        layer_options: None,
        made_with: None,
        driver_options: BTreeMap::new(),
        strategy: strategy.to_owned(),
    }
}

fn sample(written: u64, device_written: u64) -> Sample {
    let latency = |median| Some(Latency { median, p99: median * 3.0, count: 1 });
    Sample {
        written,
        device_written,
        device_read: device_written / 2,
        first: latency(20.0 + device_written as f64 / 1500.0),
        later: latency(4.0),
        space: Some(device_written),
        space_on_device: Some(device_written.saturating_add(4096)),
        diff: Some(written),
        cpu_us: 120_000,
        wall_us: 3400,
        busy_before: 0.02,
        load_before: 0.5,
    }
}

fn measurement(subject: &str, workload: &str, case: &str, x: u64, samples: Vec<Sample>) -> Measurement {
    Measurement { subject: subject.to_owned(), workload: workload.to_owned(), case: case.to_owned(), x, samples }
}

fn empty() -> Results {
    Results {
        format: FORMAT,
        version: "0.1.0".to_owned(),
        began: "2026-11-22T17:00:00Z".to_owned(),
        host: Host { kernel: "6.18.0-test".to_owned(), cpus: 2, memory: 24 << 30, scratch: None },
        size: 64 << 20,
        repetitions: 3,
        subjects: Vec::new(),
        measurements: Vec::new(),
        skipped: Vec::new(),
    }
}

/// Every workload on drivers of every mechanism. How many bytes each moves is made up, in the proportions one would expect.
fn made_up() -> Results {
    let mut results = empty();
    results.subjects = vec![
        subject("overlay2 on ext4", Some("overlay2"), "ext4", "copy-up (whole file)"),
        subject("overlay2 on xfs", Some("overlay2"), "xfs", "copy-up (reflink)"),
        subject("overlay2 on btrfs", Some("overlay2"), "btrfs", "copy-up (reflink)"),
        subject("vfs-fuse on ext4", Some("vfs-fuse"), "ext4", "copy-up (extents of 4 KiB)"),
        subject("vfs-fuse (copy_up=full) on ext4", Some("vfs-fuse"), "ext4", "copy-up (whole file)"),
        subject("btrfs on btrfs", Some("btrfs"), "btrfs", "redirect-on-write (4 KiB blocks)"),
        subject("devicemapper on ext4", Some("devicemapper"), "ext4", "copy-on-write (64 KiB blocks)"),
        subject("zfs on zfs", Some("zfs"), "zfs", "redirect-on-write (128 KiB blocks)"),
        subject("plain directory on ext4", None, "ext4", "in place"),
        subject("plain directory on xfs", None, "xfs", "in place"),
        subject("plain directory on btrfs", None, "btrfs", "redirect-on-write (4 KiB blocks)"),
        subject("plain directory on zfs", None, "zfs", "redirect-on-write (128 KiB blocks)"),
    ];
    results.skipped = vec![Skipped {
        subject: "zfs on zfs".to_owned(),
        workload: Some("containers".to_owned()),
        reason: "the module zfs is not loaded: modprobe zfs".to_owned(),
    }];
    for subject in &results.subjects {
        results.measurements.extend(workloads(subject));
    }
    results
}

/// Bytes that a first write into a file of `size` moves.
fn moved(subject: &Subject, size: u64) -> u64 {
    match subject.strategy.as_str() {
        "copy-up (whole file)" => size + 40 * KIB,
        "copy-up (reflink)" => 48 * KIB + size / 4096,
        "copy-up (extents of 4 KiB)" => 76 * KIB,
        "copy-on-write (64 KiB blocks)" => 290 * KIB,
        "redirect-on-write (128 KiB blocks)" => 340 * KIB,
        "redirect-on-write (4 KiB blocks)" => 150 * KIB,
        _ => 20 * KIB,
    }
}

fn workloads(subject: &Subject) -> Vec<Measurement> {
    let mut all = Vec::new();
    let mut add = |workload: &str, case: &str, x: u64, written: u64, device: u64| {
        let samples = [device, device * 9 / 10, device * 5 / 4].map(|device| sample(written, device)).to_vec();
        all.push(measurement(&subject.name, workload, case, x, samples));
    };
    for (case, size) in [("64 KiB", 64 * KIB), ("1 MiB", KIB * KIB), ("64 MiB", 64 << 20), ("1 GiB", GIB)] {
        add("first-write", case, size, 4 * KIB, moved(subject, size));
    }
    for percent in [1, 10, 50, 100] {
        let (case, written) = (format!("{percent}% of 64 MiB"), (64 << 20) / 100 * percent);
        add("rewrite", &case, percent, written, written + moved(subject, 64 << 20));
        add("rewrite-again", &case, percent, written, written + written / 20);
    }
    add("append", "4 KiB", 4 * KIB, 4 * KIB, moved(subject, 64 << 20));
    add("chmod", "1000 files", 1000, 0, moved(subject, 64 << 20) / 20);
    add("chown", "1000 files", 1000, 0, moved(subject, 64 << 20) / 20);
    add("delete-recreate", "1000 files", 1000, 8 << 20, 9 << 20);
    add("sqlite", "1000 updates", 1000, 4 << 20, (12 << 20) + moved(subject, 64 << 20));
    add("create", "1000 files", 1000, 4 << 20, 6 << 20);
    for layers in [1, 10, 100] {
        add("depth", &format!("{layers} layers (1 MiB)"), layers, 4 * KIB, moved(subject, KIB * KIB) + layers * KIB);
        add("depth-chmod", &format!("{layers} layers (1000 files)"), layers, 0, moved(subject, 64 << 20) / 20);
    }
    for number in [1, 2, 5, 10] {
        let device = number * (moved(subject, 64 << 20) + (1 << 20));
        add("containers", &format!("{number} containers (64 MiB)"), number, number << 20, device);
    }
    all
}

/// The page as an XML document, with which HTML of ours goes as well. The document type is not XML's.
fn parsed(page: &str) -> Document<'_> {
    let xml = page.strip_prefix("<!DOCTYPE html>\n").unwrap_or(page);
    Document::parse(xml).unwrap_or_else(|e| panic!("{e}"))
}

fn text_of(document: &Document) -> String {
    document.descendants().filter(|node| node.is_text()).filter_map(|node| node.text()).collect::<Vec<_>>().join("\n")
}

#[test]
fn the_page_is_well_formed_and_holds_subjects_and_figures() {
    let results = made_up();
    let page = html(&results).unwrap();
    let document = parsed(&page);
    assert_eq!(
        document.descendants().filter(|node| node.has_tag_name(("http://www.w3.org/2000/svg", "svg"))).count(),
        11
    );
    let text = text_of(&document);
    for subject in &results.subjects {
        assert!(text.contains(&subject.name), "{} is missing", subject.name);
        assert!(text.contains(&subject.strategy), "{} is missing", subject.strategy);
    }
    for figure in ["6.18.0-test", "262,154×", "235,939×–327,692×", "1 GiB", "1.25 GiB", "68 KiB", "modprobe zfs"] {
        assert!(text.contains(figure), "{figure} is missing");
    }
    for workload in (View { results: &results }).workloads() {
        assert!(text.contains(workload) && text.contains(view::title(workload)), "{workload} is missing");
    }
}

#[test]
fn it_needs_nothing_from_elsewhere() {
    let page = html(&made_up()).unwrap();
    for outside in ["src=", "href=", "url(", "@import", "<script", "<link"] {
        assert!(!page.contains(outside), "{outside}");
    }
}

#[test]
fn the_explanation_takes_its_figures_from_the_results() {
    let results = made_up();
    let text = explain::backends(View { results: &results });
    let said = "The first write of 4 KiB into a file of 1 GiB wrote 1 GiB to the device and read 512 MiB from it: 262,154 times \
                what the program wrote (the plain directory: 20 KiB)";
    assert!(text.contains(said), "{text}");
    for name in ["File copy-up", "Reflink", "Extent redirect", "btrfs (RoW", "zfs (RoW", "Thin-pool"] {
        assert!(text.contains(name), "{name}");
    }
    let choice = explain::choice(View { results: &results }).unwrap();
    assert!(choice.contains("overlay2 on ext4 <small>1 GiB</small>"), "{choice}");
}

#[test]
fn nothing_is_said_of_what_was_not_measured() {
    let mut results = made_up();
    results.measurements.retain(|m| m.subject == "overlay2 on ext4" || m.subject == "plain directory on ext4");
    let page = html(&results).unwrap();
    parsed(&page);
    let explained = page.split("<h2>Copy-on-write").nth(1).unwrap().split("<h2>What ran").next().unwrap();
    for absent in ["Reflink", "Extent", "btrfs", "zfs", "Thin", "vfs-fuse", "Which one"] {
        assert!(!explained.contains(absent), "{absent}:\n{explained}");
    }
}

#[test]
fn hostile_names_are_text() {
    let hostile = "</style><script>alert('\"&\u{1b}]0;')</script>";
    let mut results = made_up();
    for subject in &mut results.subjects {
        let old = subject.name.clone();
        subject.name = format!("{hostile} {old}");
        subject.mount_options = hostile.to_owned();
        subject.layer_options = Some(hostile.to_owned());
        subject.made_with = Some(hostile.to_owned());
        subject.filesystem.push_str(hostile);
        subject.strategy = hostile.to_owned();
        subject.driver_options.insert(hostile.to_owned(), hostile.to_owned());
    }
    let text = || hostile.to_owned();
    results.host.scratch = Some(Scratch { filesystem: text(), device: text(), mount_options: text() });
    for measurement in &mut results.measurements {
        measurement.subject = format!("{hostile} {}", measurement.subject);
        measurement.case = format!("{hostile} {}", measurement.case);
    }
    results.measurements.push(Measurement { workload: hostile.to_owned(), ..results.measurements[0].clone() });
    let reason = hostile.to_owned();
    results.skipped.push(Skipped { subject: reason.clone(), workload: Some(reason.clone()), reason });
    (results.version, results.began, results.host.kernel) = (hostile.into(), hostile.into(), hostile.into());
    for drawn in [html(&results).unwrap(), picture(&results).unwrap()] {
        assert!(parsed(&drawn).descendants().all(|node| !node.has_tag_name("script")));
        assert!(!drawn.contains("<script"));
    }
}

#[test]
fn zero_and_missing_values_break_nothing() {
    let mut results = made_up();
    for (at, measurement) in results.measurements.iter_mut().enumerate() {
        match at % 4 {
            0 => measurement.samples.clear(),
            1 => measurement.samples = vec![Sample { first: None, later: None, diff: None, ..sample(0, 0) }],
            2 => measurement.samples = vec![sample(4096, 0), sample(4096, u64::MAX)],
            _ => measurement.x = 0,
        }
    }
    let page = html(&results).unwrap();
    let document = parsed(&page);
    for attribute in document.descendants().flat_map(|node| node.attributes()) {
        assert!(!attribute.value().contains("NaN") && !attribute.value().contains("inf"), "{}", attribute.value());
        if ["x", "y", "x1", "x2", "y1", "y2", "cx", "cy"].contains(&attribute.name()) {
            let at: i32 = attribute.value().parse().unwrap();
            assert!((-20..2000).contains(&at), "{}={at}", attribute.name());
        }
    }
    parsed(&picture(&results).unwrap());
}

#[test]
fn the_slowest_of_few_is_not_called_one_of_a_hundred() {
    let table = |count| {
        let mut results = empty();
        results.subjects = vec![subject("overlay2 on ext4", Some("overlay2"), "ext4", "")];
        let latency = Some(Latency { median: 5.0, p99: 77.0, count });
        let samples = vec![Sample { first: latency, later: None, ..sample(1, 2) }];
        results.measurements = vec![measurement("overlay2 on ext4", "first-write", "64 KiB", 1, samples)];
        tables::all(View { results: &results })
    };
    let has = |count, part: &str| table(count).contains(part);
    assert!(has(1, "<td>1</td><td>5 µs</td>") && !has(1, "77 µs") && !has(1, "99 of 100"));
    assert!(has(99, "the slowest of them") && has(99, "77 µs") && !has(99, "99 of 100"));
    assert!(!has(1000, "the slowest") && has(1000, "<td>1,000</td>") && has(1000, "99 of 100 of them"));
}

#[test]
fn a_plain_directory_has_no_space_and_is_in_no_chart_of_it() {
    let mut results = made_up();
    for one in results.measurements.iter_mut().filter(|one| one.subject.starts_with("plain")) {
        one.samples.iter_mut().for_each(|sample| (sample.space, sample.space_on_device) = (None, None));
    }
    let charts = space(View { results: &results }).unwrap();
    assert!(charts.contains("overlay2 on ext4") && !charts.contains("plain"), "{charts}");
    assert!(charts.contains("(a file of 64 MiB)"), "{charts}");
}

#[test]
fn disturbances_are_told() {
    let mut results = made_up();
    assert!(html(&results).unwrap().contains("none: the processors were idle before"));
    results.measurements[0].samples[0].busy_before = 0.87;
    let page = html(&results).unwrap();
    assert!(page.contains("before 1 of ") && page.contains("87% at the most"));
    // Steps of 10 ms tell nothing of less than 50.
    assert_eq!([40_000, 50_000].map(|cpu_us| Sample { cpu_us, ..sample(1, 1) }.cpu()), [None, Some(50_000.0)]);
}

#[test]
fn of_nothing_there_is_a_page_too() {
    let page = html(&empty()).unwrap();
    assert_eq!(parsed(&page).descendants().filter(|node| node.tag_name().name() == "svg").count(), 0);
    assert!(picture(&empty()).unwrap().contains("was not measured"));
}

#[test]
fn a_workload_of_a_later_version_is_in_the_tables() {
    let mut results = made_up();
    results.measurements.push(measurement("btrfs on btrfs", "defragment", "all of it", 7, vec![sample(4096, 8192)]));
    let text = html(&results).unwrap();
    assert!(text.contains("<code>defragment</code></h3>") && text.contains("all of it"));
}

#[test]
fn drivers_differ_in_colour_or_shape() {
    let mut results = empty();
    results.subjects = (0..30).map(|at| subject(&format!("driver {at}"), Some("overlay2"), "ext4", "")).collect();
    let view = View { results: &results };
    let looks: Vec<_> = results.subjects.iter().map(|subject| canvas::Look::of(view, subject)).collect();
    for (at, look) in looks.iter().enumerate() {
        assert!(!looks[..at].contains(look), "driver {at}");
    }
}
