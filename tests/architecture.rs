//! Dependencies run one way: core and quota know no driver, a driver knows core and quota and never another driver, and
//! only the engine knows drivers.

use serde_json::Value;
use std::{collections::BTreeMap, process::Command};

/// The workspace's packages, each with the packages of the workspace it depends on, tests included.
fn arrows() -> BTreeMap<String, Vec<String>> {
    let out = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--no-deps", "--offline"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let metadata: Value = serde_json::from_slice(&out.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    let name = |package: &Value| package["name"].as_str().unwrap().to_owned();
    let ours: Vec<_> = packages.iter().map(name).collect();
    let dependencies = |package: &Value| {
        let all = package["dependencies"].as_array().unwrap().iter().map(name);
        all.filter(|dependency| ours.contains(dependency)).collect()
    };
    packages.iter().map(|package| (name(package), dependencies(package))).collect()
}

fn may(from: &str, to: &str) -> bool {
    const SHARED: [&str; 2] = ["graphdriver-core", "graphdriver-quota"];
    match from {
        // Its own name appears where its tests use it with more features.
        _ if from == to => true,
        "graphdriver" => true,
        "graphdriver-core" | "graphdriver-containerd-api" => false,
        // For the words of limits and errors.
        "graphdriver-quota" => to == "graphdriver-core",
        _driver => SHARED.contains(&to),
    }
}

#[test]
fn dependencies_run_one_way() {
    let arrows = arrows();
    assert!(
        ["core", "overlay2", "vfs-fuse"].iter().all(|part| arrows.contains_key(&format!("graphdriver-{part}"))),
        "{arrows:?}"
    );
    for (from, to) in arrows.iter().flat_map(|(from, all)| all.iter().map(move |to| (from, to))) {
        assert!(may(from, to), "{from} must not depend on {to}");
    }
}

#[test]
fn the_rule_refuses_what_it_should() {
    for (from, to) in [
        ("graphdriver-core", "graphdriver-overlay2"),
        ("graphdriver-overlay2", "graphdriver-btrfs"),
        ("graphdriver-vfs-fuse", "graphdriver-overlay2"),
        ("graphdriver-core", "graphdriver-quota"),
        ("graphdriver-quota", "graphdriver-zfs"),
        ("graphdriver-btrfs", "graphdriver"),
        ("graphdriver-btrfs", "graphdriver-containerd-api"),
        ("graphdriver-containerd-api", "graphdriver-core"),
    ] {
        assert!(!may(from, to), "{from} -> {to}");
    }
}
