//! The service for containerd, through its socket.

mod client;
mod diff;
mod ids;
mod random;
mod rigs;
mod serving;
mod suite;
#[path = "../support/mod.rs"]
#[allow(dead_code)]
mod support;
mod unwanted;

use client::{BINARY, Service};
use rigs::{On, Rig};
use std::{path::Path, time::Duration};
use support::{isolated, system};

/// What one test may take. The guest is slow.
fn limit() -> Duration {
    let in_guest = std::env::var("GRAPHDRIVER_GUEST").as_deref() == Ok("1");
    Duration::from_secs(if in_guest { 1200 } else { 300 })
}

/// Runs `case` on a service of its own, alone in its namespaces.
fn on(test: &str, on: On, case: impl FnOnce(Service)) {
    if on.skipped(test) {
        return;
    }
    isolated(test, limit(), |dir| {
        let _rig = Rig::new(dir, on);
        case(Service::start(dir, on.driver()));
    });
}

fn no_vfs_fuse() -> Option<String> {
    let there = Path::new(BINARY).with_file_name("vfs-fuse").exists() && Path::new("/dev/fuse").exists();
    (!there).then(|| "needs /dev/fuse and the program vfs-fuse: cargo build -p graphdriver-vfs-fuse".into())
}

/// The name by which libtest knows a test of this module.
fn name(module: &str, test: &str) -> String {
    let (_, module) = module.split_once("::").unwrap_or(("", ""));
    if module.is_empty() { test.into() } else { format!("{module}::{test}") }
}

macro_rules! cases {
    ($module:ident, $on:ident, $($case:ident)*) => {
        mod $module {
            $(#[test]
            fn $case() {
                let test = super::name(module_path!(), stringify!($case));
                super::on(&test, super::On::$on, |service| super::suite::$case(&service));
            })*

            #[test]
            fn two_hundred_at_once() {
                let test = super::name(module_path!(), "two_hundred_at_once");
                super::on(&test, super::On::$on, |service| super::serving::two_hundred_at_once(&service));
            }

            #[test]
            fn killed_at_any_moment_it_loses_nothing_that_was_told() {
                let test = super::name(module_path!(), "killed_at_any_moment_it_loses_nothing_that_was_told");
                super::on(&test, super::On::$on, super::serving::killed_at_any_moment_it_loses_nothing_that_was_told);
            }

            #[test]
            fn stopped_twice_it_has_everything() {
                let test = super::name(module_path!(), "stopped_twice_it_has_everything");
                super::on(&test, super::On::$on, super::suite::stopped_twice_it_has_everything);
            }
        }
    };
}

// Everything runs on every driver. On devicemapper and zfs, which only the guest has, each_of_128_layers runs only if asked for,
// as it takes ten minutes there, and the conformance suites of these drivers mount as many layers (case `deep`):
// scripts/guest-test -p graphdriver --test snapshotter zfs::each_of_128_layers
macro_rules! suite {
    ($($module:ident: $on:ident),*) => { $(cases! { $module, $on,
        from_prepare_to_removal
        stat_tells_kinds_and_parents
        parents_are_passed_on
        taken_keys_and_wrong_parents_are_refused
        a_parent_given_at_commit_is_taken_or_refused
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
        the_command_line_sees_it_and_removes_nothing
    })* };
}

suite! { overlay2: Overlay2, vfs_fuse: VfsFuse }
#[cfg(feature = "btrfs")]
suite! { btrfs_driver: Btrfs }
#[cfg(feature = "devicemapper")]
suite! { devicemapper: Devicemapper }
#[cfg(feature = "zfs")]
suite! { zfs: Zfs }

macro_rules! limits {
    ($($module:ident: $on:expr),*) => { $(mod $module {
        #[allow(unused_imports)]
        use super::On;

        #[test]
        fn a_size_limits_what_is_written() {
            let test = super::name(module_path!(), "a_size_limits_what_is_written");
            super::on(&test, $on, |service| super::suite::a_size_limits_what_is_written(&service));
        }
    })* };
}

limits! { limits_xfs: On::Overlay2Limited("xfs"), limits_ext4: On::Overlay2Limited("ext4") }
#[cfg(feature = "btrfs")]
limits! { limits_btrfs: On::BtrfsLimited }
#[cfg(feature = "devicemapper")]
limits! { limits_devicemapper: On::Devicemapper }
#[cfg(feature = "zfs")]
limits! { limits_zfs: On::Zfs }
