//! The command line as its users meet it: the real program, a tiny image, every command with right and wrong input.

#[path = "../common/mod.rs"]
mod common;

// Before the modules, which use it.
macro_rules! needs_root {
    ($test:literal) => {
        if crate::common::skipped($test, crate::common::no_root()) {
            return;
        }
    };
}

mod containers;
mod cp;
mod images;
mod mounts;
mod output;
mod settings;
mod system;

const ID: usize = "sha256:".len() + 64;
