//! The service for containerd, through its socket.

mod client;
mod random;
mod serving;
mod suite;
#[path = "../support/mod.rs"]
#[allow(dead_code)]
mod support;

use client::{BINARY, Service};
use std::{path::Path, time::Duration};
use support::{isolated, skip, system};

const LIMIT: Duration = Duration::from_secs(300);

/// Runs `case` on a service of its own, alone in its namespaces.
fn on(test: &str, driver: &str, case: impl FnOnce(Service)) {
    if driver == "vfs-fuse" && skip::skipped(test, no_vfs_fuse()) {
        return;
    }
    if driver == "btrfs" && skip::skipped(test, skip::no_program(&["mkfs.btrfs"])) {
        return;
    }
    isolated(test, LIMIT, |dir| {
        if driver == "btrfs" {
            btrfs(dir);
        }
        case(Service::start(dir, driver));
    });
}

fn no_vfs_fuse() -> Option<String> {
    let there = Path::new(BINARY).with_file_name("vfs-fuse").exists() && Path::new("/dev/fuse").exists();
    (!there).then(|| "needs /dev/fuse and the program vfs-fuse: cargo build -p graphdriver-vfs-fuse".into())
}

/// A filesystem of its own at `DIR/root`.
fn btrfs(dir: &Path) {
    let (disk, root) = (dir.join("disk"), dir.join("root"));
    std::fs::File::create(&disk).unwrap().set_len(512 << 20).unwrap();
    std::fs::create_dir(&root).unwrap();
    system("mkfs.btrfs", &["-q", disk.to_str().unwrap()]);
    system("mount", &["-o", "loop", disk.to_str().unwrap(), root.to_str().unwrap()]);
}

/// The name by which libtest knows a test of this module.
fn name(module: &str, test: &str) -> String {
    let (_, module) = module.split_once("::").unwrap_or(("", ""));
    if module.is_empty() { test.into() } else { format!("{module}::{test}") }
}

macro_rules! cases {
    ($module:ident, $driver:literal, $($case:ident)*) => {
        mod $module {
            $(#[test]
            fn $case() {
                let test = super::name(module_path!(), stringify!($case));
                super::on(&test, $driver, |service| super::suite::$case(&service));
            })*

            #[test]
            fn stopped_twice_it_has_everything() {
                let test = super::name(module_path!(), "stopped_twice_it_has_everything");
                super::on(&test, $driver, super::suite::stopped_twice_it_has_everything);
            }
        }
    };
}

macro_rules! suite {
    ($($module:ident: $driver:literal),*) => { $(cases! { $module, $driver,
        from_prepare_to_removal
        stat_tells_kinds_and_parents
        parents_are_passed_on
        taken_keys_and_wrong_parents_are_refused
        labels_change_and_parents_do_not
        removed_keys_can_be_used_again
        listings_take_filters_and_calls_meanwhile
        edits_within_a_second_are_kept
        a_directory_made_again_hides_the_old_one
        an_owner_alone_can_change
        modes_of_directories_survive
        no_removal_below_children
        what_was_deleted_stays_deleted
        files_of_lower_layers_move_and_have_links
        views_are_read_only
        the_root_has_mode_0755
        directories_and_files_are_renamed
        each_of_128_layers_equals_a_flat_copy
    })* };
}

suite! { overlay2: "overlay2", vfs_fuse: "vfs-fuse" }
#[cfg(feature = "btrfs")]
suite! { btrfs_driver: "btrfs" }
