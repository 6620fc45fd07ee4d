//! The engine: images, containers, mounts and space over any storage driver.
//!
//! Start at [`Engine`]; the command line in `main.rs` is a thin layer over it.

pub mod bench;
pub mod config;
#[cfg(feature = "containerd")]
pub mod containerd;
mod engine;
pub mod image;
pub mod progress;
pub mod registry;
mod sys;

pub use engine::*;
