//! The suite every driver is held to.
//!
//! A driver's test target is this, with `harness = false` in its `Cargo.toml`:
//!
//! ```ignore
//! fn main() -> std::process::ExitCode {
//!     let setups = BackingKind::ALL.map(|backing| Setup::driver(graphdriver_overlay2::FACTORY, backing));
//!     conformance::main(setups.into())
//! }
//! ```
//!
//! Cases vary by what a driver says of its capabilities, never by its name. Most say what is done to a parent and to its
//! child; the same is then done to the driver and to the [reference](crate::model), and everything that can be seen is
//! compared: errors, trees, lists of changes, and what layer tars make elsewhere.

mod backing;
mod cases;
mod dir_tree;
mod harness;
mod random;
mod subject;
mod twin;

pub use backing::{Backing, BackingKind, Missing};
pub use cases::cases;
pub use dir_tree::DirTree;
pub use harness::main;
pub use subject::{Crash, Needs, Setup, Subject, Visit};

use crate::Result;

/// One promise.
pub struct Case {
    /// What holds.
    pub name: &'static str,
    /// Why somebody found it worth a case: the bug, or the promise.
    pub story: &'static str,
    /// Whether a driver can be asked for it.
    pub needs: Needs,
    /// Fails or panics if the promise is broken.
    pub run: fn(&mut dyn Subject) -> Result<()>,
}

/// Runs one case on a fresh subject, outside the harness: Ok(Err) with the message of a broken promise, Err if it cannot run.
pub fn run_case(setup: &Setup, case: &Case) -> Result<std::result::Result<(), String>, Missing> {
    match harness::quietly(|| harness::run(setup, case)) {
        Ok(ran) => Ok(ran?.map_err(|failed| failed.message().unwrap_or_default().to_owned())),
        Err(panicked) => Ok(Err(panicked)),
    }
}

/// Whether this is the initial user namespace, or one like it (user_namespaces(7), "User and group ID mappings").
fn all_ids_are_mapped() -> bool {
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    map.split_whitespace().eq(["0", "0", "4294967295"])
}
