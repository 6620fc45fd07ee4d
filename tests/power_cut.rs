//! What a power cut leaves: the disk's image is copied right after a command has said it was done, and used again. That
//! is all that had been written down by then, as on a disk that keeps its promises. (The guest cuts the power for real.)

#[allow(dead_code, reason = "shared with other tests, which use the rest")]
#[path = "support/mod.rs"]
mod support;

use std::{fs, path::Path, process::Command, time::Duration};
use support::{Gd, images, isolated, system};

/// A filesystem in a file, mounted until the test's namespace goes.
fn disk(dir: &Path, image: &str, place: &str) {
    fs::create_dir_all(dir.join(place)).unwrap();
    let (image, place) = (dir.join(image), dir.join(place));
    let kind = Command::new("blkid").args(["-o", "value", "-s", "TYPE"]).arg(&image).output().unwrap().stdout;
    // A copy has the identity of what it was copied from, which xfs otherwise mounts once.
    let options = if kind == b"xfs\n" { "loop,nouuid" } else { "loop" };
    system("mount", &["-o", options, image.to_str().unwrap(), place.to_str().unwrap()]);
}

/// Uses the disk as it is at this moment, after a boot.
fn after_power_cut(dir: &Path, name: &str) -> Gd {
    let (image, copy) = (dir.join("disk.img"), dir.join(name));
    system("cp", &["--sparse=always", image.to_str().unwrap(), copy.to_str().unwrap()]);
    let place = format!("{name}.mounted");
    disk(dir, name, &place);
    let root = dir.join(place).join("root");
    let _ = fs::remove_file(root.join("overlay2/boot"));
    Gd::new(dir, &root)
}

fn survives(name: &str, fstype: &'static str) {
    isolated(name, Duration::from_secs(120), |dir| {
        let image = dir.join("disk.img");
        fs::File::create(&image).unwrap().set_len(400 << 20).unwrap();
        system(&format!("mkfs.{fstype}"), &["-q", image.to_str().unwrap()]);
        disk(dir, "disk.img", "disk");
        let gd = Gd::new(dir, &dir.join("disk/root"));
        let layers = [images::random_layer(1, 20, 5000), images::random_layer(2, 20, 5000)];
        let archive = gd.file("image.tar", &images::archive("localhost/image:1", &[&layers[0], &layers[1]]));

        gd.ok(&["load", "-i", &archive]);
        let cut = after_power_cut(dir, "loaded");
        cut.assert_whole("localhost/image:1");
        cut.assert_tidy("a power cut after load");

        gd.ok(&["create", "--name", "c", "localhost/image:1"]);
        let cut = after_power_cut(dir, "created");
        assert_eq!(cut.ok(&["diff", "c"]), "");
        cut.assert_tidy("a power cut after create");

        let source = gd.file("new", b"content");
        gd.ok(&["cp", &source, "c:/new"]);
        gd.ok(&["commit", "c", "localhost/image:2"]);
        let cut = after_power_cut(dir, "committed");
        cut.assert_whole("localhost/image:2");
        cut.assert_tidy("a power cut after commit");

        gd.ok(&["rm", "c"]);
        gd.ok(&["rmi", "localhost/image:2"]);
        let cut = after_power_cut(dir, "removed");
        cut.ok(&["images"]);
        cut.assert_tidy("a power cut after rm and rmi");
        cut.assert_whole("localhost/image:1");
    });
}

#[test]
fn what_was_done_survives_a_power_cut_on_ext4() {
    survives("what_was_done_survives_a_power_cut_on_ext4", "ext4");
}

#[test]
fn what_was_done_survives_a_power_cut_on_xfs() {
    survives("what_was_done_survives_a_power_cut_on_xfs", "xfs");
}

#[test]
fn what_was_done_survives_a_power_cut_on_btrfs() {
    survives("what_was_done_survives_a_power_cut_on_btrfs", "btrfs");
}
