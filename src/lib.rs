//! The engine: images, containers, mounts and space over any storage driver.

pub mod image;
pub mod progress;
