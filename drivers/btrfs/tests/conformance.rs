//! The suite with simple quotas.

use std::process::ExitCode;

#[path = "setup/mod.rs"]
mod setup;

fn main() -> ExitCode {
    setup::main("btrfs::simple", &[("btrfs.quota", "simple")])
}
