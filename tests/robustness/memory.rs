//! What memory a load and a save take.

use crate::{
    LIMIT, remove_everything,
    support::{
        Gd, errors,
        images::{archive_of, gzip, random_layer, sha256},
        isolated,
    },
};
use std::{fs, process::Child, time::Duration};

/// The most memory a process ever had, in KiB, as far as looking every few milliseconds tells.
fn peak_of(mut child: Child) -> u64 {
    let path = format!("/proc/{}/status", child.id());
    let mut peak = 0;
    while child.try_wait().unwrap().is_none() {
        let status = fs::read_to_string(&path).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = line.and_then(|text| text.trim().trim_end_matches(" kB").parse().ok());
        peak = peak.max(kib.unwrap_or(0));
        std::thread::sleep(Duration::from_millis(3));
    }
    let out = child.wait_with_output().unwrap();
    assert!(out.status.success(), "{}", errors(&out));
    peak
}

#[test]
fn memory_does_not_grow_with_the_image() {
    isolated("memory::memory_does_not_grow_with_the_image", LIMIT, |dir| {
        let gd = Gd::new(dir, &dir.join("root"));
        {
            // Many files, one big file, and one layer that is compressed.
            let layers =
                [random_layer(50, 20_000, 1000), random_layer(51, 1, 160 << 20), random_layer(52, 100, 1 << 20)];
            let diff_ids: Vec<_> = layers.iter().map(|tar| sha256(tar)).collect();
            let zipped = gzip(&layers[2]);
            let stored = [&layers[0][..], &layers[1], &zipped];
            gd.file("big.tar", &archive_of("localhost/big:1", &stored, &diff_ids));
        }
        let (archive, saved) = (gd.path("big.tar"), gd.path("saved.tar"));
        let load = peak_of(gd.spawn(&["load", "-i", &archive]));
        let save = peak_of(gd.spawn(&["save", "-o", &saved, "localhost/big:1"]));
        println!("peak of load {load} KiB, of save {save} KiB");
        for peak in [load, save] {
            assert!((1000..100 << 10).contains(&peak), "{peak} KiB");
        }
        remove_everything(&gd);
    });
}
