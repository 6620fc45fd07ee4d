//! The suite on a filesystem that counts nothing.

use std::process::ExitCode;

#[path = "setup/mod.rs"]
mod setup;

fn main() -> ExitCode {
    setup::main("btrfs::uncounted", &[])
}
