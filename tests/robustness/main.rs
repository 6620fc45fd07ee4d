//! The real binary under attack: eight processes at once, kills, full disks, signals, reboots, hostile archives.
//!
//! [`support::isolated`] calls a test again by the name it is given, which is the test's module and its own name.

mod full_disk;
mod hostile;
mod kill;
mod memory;
mod mounts;
mod several;
mod signals;
#[path = "../support/mod.rs"]
mod support;

use nix::sys::signal::Signal;
use std::{fs, path::Path, process::Child, time::Duration};
use support::{
    Gd, free_space,
    images::{archive_of, gzip, random_layer, sha256},
    system,
};

const LIMIT: Duration = Duration::from_secs(300);

fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

fn remove_everything(gd: &Gd) {
    let containers = gd.ok(&["ps", "-q", "--no-trunc"]);
    for id in containers.lines() {
        gd.ok(&["rm", "-f", id]);
    }
    for id in gd.image_ids() {
        gd.ok(&["rmi", "-f", &id]);
    }
    for list in [&["images", "-a", "-q"][..], &["ps", "-q"]] {
        assert_eq!(gd.ok(list), "");
    }
    assert_eq!(gd.ok(&["mounts", "--format", "json"]).trim(), "[]");
    gd.assert_empty("after everything was removed");
    gd.assert_mounts_agree("after everything was removed");
}

fn small_image(gd: &Gd) -> String {
    let layers = [random_layer(1, 150, 500), random_layer(2, 50, 4000), random_layer(3, 1, 2_000_000)];
    let diff_ids: Vec<_> = layers.iter().map(|tar| sha256(tar)).collect();
    let zipped = gzip(&layers[1]);
    gd.file("small.tar", &archive_of("localhost/small:1", &[&layers[0], &zipped, &layers[2]], &diff_ids))
}

/// A small filesystem at DIR/disk: tmpfs, or ext4 on a loop device that goes with the namespace.
fn disk(dir: &Path, fstype: &str, megabytes: u64) -> Gd {
    let mut gd = Gd::new(dir, &dir.join("disk/root"));
    gd.make_dir("disk");
    let at = gd.path("disk");
    if fstype == "tmpfs" {
        system("mount", &["-t", "tmpfs", "-o", &format!("size={megabytes}m"), "none", &at]);
    } else {
        let image = gd.file("disk.img", b"");
        fs::File::options().write(true).open(&image).unwrap().set_len(megabytes << 20).unwrap();
        system(&format!("mkfs.{fstype}"), &["-q", &image]);
        system("mount", &["-o", "loop", &image, &at]);
    }
    gd.root = dir.join("disk/root");
    gd
}

/// Room to spare between two looks at free space: the database's log and directory blocks.
const SLACK: u64 = 2 << 20;

fn assert_same_space(gd: &Gd, before: u64, when: &str) {
    let now = free_space(&gd.dir.join("disk"));
    assert!(now + SLACK > before, "{when}: {now} bytes free, and {before} before");
}

fn send(child: &Child, signal: Signal) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(child.id() as i32), signal).unwrap();
}
