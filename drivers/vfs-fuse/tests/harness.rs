//! The harness itself: what it mounts is seen by the test alone and is gone afterwards.

mod common;

use common::{Layers, cannot_mount, skipped};
use std::{
    fs,
    path::{Path, PathBuf},
    thread,
};

/// What the first thread of the process sees, which no test runs on.
fn mounted_outside(path: &Path) -> bool {
    // With `--test-threads=1` the main thread runs the tests; init never does.
    fs::read_to_string("/proc/1/mountinfo").unwrap().contains(path.to_str().unwrap())
}

fn mounted_here(path: &Path) -> bool {
    fs::read_to_string("/proc/thread-self/mountinfo").unwrap().contains(path.to_str().unwrap())
}

#[test]
fn the_kernel_mounts_privately_and_nothing_is_left() {
    if skipped("the_kernel_mounts_privately_and_nothing_is_left", cannot_mount()) {
        return;
    }
    let layers = Layers::new(2);
    fs::write(layers.lowers[1].join("f"), "bottom").unwrap();
    let mounted = layers.mount_kernel(&["metacopy=off"]);
    assert_eq!(fs::read_to_string(mounted.path().join("f")).unwrap(), "bottom");
    fs::write(mounted.path().join("f"), "changed").unwrap();
    assert!(mounted_here(&layers.merged) && !mounted_outside(&layers.merged));
    // Threads of the test see it too.
    let path = layers.merged.clone();
    assert!(thread::spawn(move || mounted_here(&path)).join().unwrap());
    mounted.unmount();
    assert!(!mounted_here(&layers.merged));
    assert_eq!(fs::read_to_string(layers.upper.join("f")).unwrap(), "changed");
    let (dir, again) = (layers.dir().to_owned(), layers.mount_kernel(&[]));
    drop(again);
    assert!(!mounted_here(&dir));
    drop(layers);
    assert!(!dir.exists());
}

#[test]
fn the_program_mounts_privately_and_ends_with_its_mount() {
    if skipped("the_program_mounts_privately_and_ends_with_its_mount", cannot_mount()) {
        return;
    }
    let layers = Layers::new(2);
    fs::write(layers.lowers[1].join("f"), "bottom").unwrap();
    let mounted = layers.mount(&[]);
    assert_eq!(fs::read_to_string(mounted.path().join("f")).unwrap(), "bottom");
    assert!(mounted_here(&layers.merged) && !mounted_outside(&layers.merged));
    let process = PathBuf::from(format!("/proc/{}", mounted.pid()));
    assert!(fs::read_to_string(process.join("cmdline")).unwrap().contains("lowerdir="));
    mounted.unmount();
    assert!(!process.exists());

    let mut mounted = layers.mount(&[]);
    mounted.kill();
    assert!(fs::read_dir(mounted.path()).is_err(), "the daemon is dead");
    drop(mounted);
    assert!(!mounted_here(&layers.merged));

    let read_only = layers.mount_read_only(&[]);
    assert!(fs::write(read_only.path().join("g"), "").is_err());
    drop(read_only);
    let said = layers.try_mount("lowerdir=/nonexistent").err().expect("there is no such layer");
    assert!(said.contains("/nonexistent"), "{said}");
}
