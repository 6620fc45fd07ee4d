//! Disks that fill, and disks without a free byte.

use crate::{
    LIMIT, assert_same_space, disk, remove_everything, small_image,
    support::{
        Random, free_space,
        images::{archive, random_layer, sha256},
        isolated,
    },
};
use std::{fs, path::Path};

fn assert_no_space(text: &str, layer: &str) {
    assert!(text.contains("No space left") && text.contains(layer), "{text}");
}

fn full_disk(name: &str, fstype: &'static str) {
    isolated(name, LIMIT, |dir| {
        let gd = disk(dir, fstype, 64);
        let small = small_image(&gd);
        gd.ok(&["load", "-i", &small]);
        let filler = dir.join("disk/filler");
        fs::write(&filler, vec![7; 25 << 20]).unwrap();
        let before = free_space(&dir.join("disk"));
        let images = gd.ok(&["images", "--format", "json"]);

        // Layer by layer: the first fits.
        let layers = [random_layer(20, 10, 100_000), random_layer(21, 400, 100_000)];
        let big = gd.file("big.tar", &archive("localhost/big:1", &[&layers[0], &layers[1]]));
        assert_no_space(&gd.fails(&["load", "-i", &big], 8), &format!("layer sha256:{}", sha256(&layers[1])));
        gd.assert_tidy("a load that did not fit");
        assert_eq!(gd.ok(&["images", "--format", "json"]), images);
        assert_same_space(&gd, before, "a load that did not fit");

        let rootfs = gd.file("rootfs.tar", &layers[1]);
        assert_no_space(&gd.fails(&["import", &rootfs, "localhost/big:1"], 8), "rootfs.tar");
        gd.assert_tidy("an import that did not fit");
        assert_same_space(&gd, before, "an import that did not fit");

        gd.ok(&["create", "--name", "c", "localhost/small:1"]);
        let target = gd.make_dir("mnt");
        gd.ok(&["mount", "c", &target]);
        fs::write(dir.join("mnt/large"), Random::new(3).bytes(20 << 20)).unwrap();
        let before = free_space(&dir.join("disk"));
        assert_no_space(&gd.fails(&["commit", "c", "localhost/big:1"], 8), "container c");
        gd.assert_tidy("a commit that did not fit");
        assert_same_space(&gd, before, "a commit that did not fit");
        assert_eq!(gd.ok(&["images", "--format", "json"]), images);

        fs::remove_file(&filler).unwrap();
        gd.ok(&["commit", "c", "localhost/built:1"]);
        gd.assert_whole("localhost/built:1");
        gd.ok(&["rm", "-f", "c"]);
        gd.ok(&["rmi", "localhost/built:1"]);
        gd.ok(&["load", "-i", &big]);
        gd.assert_whole("localhost/big:1");
        remove_everything(&gd);
    });
}

#[test]
fn a_load_commit_or_import_that_fills_a_tmpfs_leaves_nothing_and_works_later() {
    full_disk("full_disk::a_load_commit_or_import_that_fills_a_tmpfs_leaves_nothing_and_works_later", "tmpfs");
}

#[test]
fn a_load_commit_or_import_that_fills_an_ext4_leaves_nothing_and_works_later() {
    full_disk("full_disk::a_load_commit_or_import_that_fills_an_ext4_leaves_nothing_and_works_later", "ext4");
}

fn fill(path: &Path) {
    use std::io::Write;
    let mut file = fs::File::create(path).unwrap();
    for size in [1 << 20, 4096, 512, 1] {
        while file.write_all(&vec![7; size]).is_ok() {}
    }
    let _ = file.sync_all();
}

fn no_byte_free(name: &str, fstype: &'static str) {
    isolated(name, LIMIT, |dir| {
        let gd = disk(dir, fstype, 40);
        for n in 0..3 {
            let tar = archive(&format!("localhost/i:{n}"), &[&random_layer(30 + n, 10, 200_000)]);
            gd.ok(&["load", "-i", &gd.file("i.tar", &tar)]);
        }
        gd.ok(&["create", "--name", "c", "localhost/i:1"]);
        fill(&dir.join("disk/filler"));
        assert!(free_space(&dir.join("disk")) < 64 << 10, "the disk is full");
        assert_eq!(gd.ok(&["images", "-q"]).lines().count(), 3);
        let before = free_space(&dir.join("disk"));
        gd.ok(&["rm", "c"]);
        gd.ok(&["rmi", "localhost/i:0"]);
        assert!(free_space(&dir.join("disk")) > before + 1_000_000, "space came back");
        gd.assert_tidy("rmi on a full disk");
        gd.assert_whole("localhost/i:2");
        remove_everything(&gd);
    });
}

#[test]
fn on_a_tmpfs_without_a_free_byte_images_can_be_listed_and_removed() {
    no_byte_free("full_disk::on_a_tmpfs_without_a_free_byte_images_can_be_listed_and_removed", "tmpfs");
}

#[test]
fn on_an_ext4_without_a_free_byte_images_can_be_listed_and_removed() {
    no_byte_free("full_disk::on_an_ext4_without_a_free_byte_images_can_be_listed_and_removed", "ext4");
}
