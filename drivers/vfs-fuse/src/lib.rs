//! `vfs-fuse`: a union filesystem in user space, as library, storage driver and stand-alone program.

pub mod claim;
pub mod config;
pub mod daemon;
pub mod driver;
pub mod extent;
pub mod fuse;
pub mod join;
pub mod options;
mod sys;
pub mod union;

pub use driver::FACTORY;
