//! `bench write-amplification` of devicemapper and zfs, in the guest.

mod common;

use common::{Home, skipped_outside_guest};
use serde_json::Value;
use std::{path::Path, process::Command};

#[test]
fn thin_devices_and_pools_are_measured_and_gone() {
    let test = "thin_devices_and_pools_are_measured_and_gone";
    let missing = ["/dev/mapper/control", "/dev/zfs"].into_iter().find(|path| !Path::new(path).exists());
    if skipped_outside_guest(test, missing.map(|path| format!("there is no {path}"))) {
        return;
    }
    let home = Home::new();
    let told = home.ok_noisy(
        "graphdriver --format json bench write-amplification --scratch . --drivers devicemapper,zfs --size 1M \\
            --repetitions 1 --workloads first-write,chmod,sqlite,containers",
    );
    let results: Value = serde_json::from_str(&told).unwrap();
    // The larger files, and nothing else.
    assert_eq!(results["skipped"].as_array().unwrap().len(), 1, "{:#}", results["skipped"]);
    for subject in ["devicemapper with xfs", "zfs on zfs", "plain directory on zfs"] {
        let is =
            |one: &&Value| one["subject"] == subject && one["workload"] == "first-write" && one["case"] == "64 KiB";
        let all = results["measurements"].as_array().unwrap();
        let found = all.iter().find(is).unwrap_or_else(|| panic!("{subject} is missing: {:#}", results["subjects"]));
        let sample = &found["samples"][0];
        let of = |field: &str| sample[field].as_u64().unwrap();
        assert!((4096..1 << 20).contains(&of("device_written")), "{subject}: {sample:#}");
    }
    let out = Command::new("sh").args(["-c", "dmsetup ls; zpool list -H; losetup -a"]).output().unwrap();
    let left = String::from_utf8_lossy(&out.stdout).into_owned();
    let ours = ["graphdriver-", "(deleted)"].iter().any(|part| left.contains(part));
    assert!(!ours, "left: {left}");
}
