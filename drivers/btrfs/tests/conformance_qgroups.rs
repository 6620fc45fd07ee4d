//! The suite with full qgroups.

use std::process::ExitCode;

#[path = "setup/mod.rs"]
mod setup;

fn main() -> ExitCode {
    setup::main("btrfs::qgroup", &[("btrfs.quota", "qgroup")])
}
