//! Random file operations on a union and on a plain directory: results, trees and inode numbers must be the same, after
//! a new mount too, and the kernel's overlay must show what was written alike.
//!
//! `GRAPHDRIVER_PROPTEST_CASES` is the number of sequences for each filesystem, `PROPTEST_RNG_SEED` draws the same again.

#[path = "../common/mod.rs"]
mod common;

mod aim;
mod case;
mod faults;
mod known;
mod op;
mod shrink;
mod side;
mod stack;
mod sys;
mod threads;
mod tree;

use case::{Case, Subject};
use common::{cannot_mount, no_program, private_mounts, skipped};
use graphdriver_core::conformance::{Backing, BackingKind};
use proptest::{
    collection::vec,
    prelude::*,
    test_runner::{Config, TestCaseError, TestError, TestRunner},
};

fn cases() -> impl Strategy<Value = Case> {
    (stack::stacks(), vec(op::steps(0..60), 1..3)).prop_map(|(stack, stages)| Case { stack, stages })
}

/// What a test needs, or why it cannot be.
fn backing(test: &str, kind: BackingKind) -> Option<Backing> {
    if skipped(test, cannot_mount().or_else(|| no_program(&["cp", "mkfs.ext4", "mkfs.xfs", "mkfs.btrfs"]))) {
        return None;
    }
    private_mounts();
    Some(Backing::new(kind, 2 << 30).unwrap())
}

fn config(default_cases: u32) -> Config {
    let asked = std::env::var("GRAPHDRIVER_PROPTEST_CASES").ok().and_then(|n| n.parse().ok());
    Config {
        cases: asked.unwrap_or(default_cases),
        failure_persistence: None,
        max_shrink_iters: 0,
        ..Config::default()
    }
}

fn check(test: &str, subject: Subject, kind: BackingKind, default_cases: u32, options: &[&str]) {
    let Some(backing) = backing(test, kind) else { return };
    let run = |case: &Case| case::run(case, subject, backing.path(), options);
    match TestRunner::new(config(default_cases)).run(&cases(), |case| run(&case).map_err(TestCaseError::fail)) {
        Ok(()) => {}
        Err(TestError::Fail(why, case)) => {
            let (case, why) = shrink::shrink(case, why.to_string(), |case| run(case).err());
            panic!("The shortest case found, on {}{why}", case::describe(&case.stack));
        }
        Err(TestError::Abort(why)) => panic!("{why}"),
    }
}

fn check_threads(test: &str, subject: Subject, kind: BackingKind, default_cases: u32, options: &[&str]) {
    let Some(backing) = backing(test, kind) else { return };
    let outcome = TestRunner::new(config(default_cases)).run(&threads::plans(), |plan| {
        threads::run(&plan, subject, backing.path(), options).map_err(TestCaseError::fail)
    });
    match outcome {
        Ok(()) => {}
        Err(TestError::Fail(why, plan)) => panic!("On {}{why}", case::describe(&plan.stack)),
        Err(TestError::Abort(why)) => panic!("{why}"),
    }
}

#[test]
fn the_kernels_overlay_is_like_a_plain_directory() {
    check("the_kernels_overlay_is_like_a_plain_directory", Subject::Kernel, BackingKind::Ext4, 20, &[]);
}

/// One test of the program: function, filesystem, options.
macro_rules! programs {
    ($($name:ident: $check:ident($kind:ident, $cases:literal, $options:expr);)*) => {$(
        #[test]
        fn $name() {
            $check(stringify!($name), Subject::Program, BackingKind::$kind, $cases, &$options);
        }
    )*};
}

programs! {
    ext4_by_extents: check(Ext4, 30, ["copy_up=extent"]);
    ext4_by_extents_without_passthrough: check(Ext4, 20, ["copy_up=extent", "passthrough=0"]);
    ext4_whole_files: check(Ext4, 20, ["copy_up=full"]);
    xfs_by_reflink: check(Xfs, 10, ["copy_up=reflink"]);
    xfs_by_extents: check(Xfs, 10, ["copy_up=extent"]);
    btrfs: check(Btrfs, 10, ["copy_up=auto"]);
    tmpfs: check(Tmpfs, 20, ["copy_up=auto"]);
    threads_on_ext4: check_threads(Ext4, 4, ["copy_up=extent"]);
    threads_on_ext4_without_passthrough: check_threads(Ext4, 4, ["copy_up=extent", "passthrough=0"]);
    threads_on_tmpfs: check_threads(Tmpfs, 4, ["copy_up=auto"]);
}
