//! Files copied up by extents: a sparse upper file that has what was changed, over the lower file that has the rest.
//!
//! The upper file's own allocation says which is which, so what a crash leaves is what the upper filesystem's journal
//! keeps. FORMAT.md in this crate has the format, the order of the steps and why each order is safe.

mod complete;
mod file;
mod guard;
mod header;
mod io;
mod layer;
mod map;
mod privileges;
mod probe;
mod resize;

pub use file::ExtentFile;
pub use guard::{prepare, unprepare};
pub use header::{Header, LowerIdentity, UpperIdentity, XATTR, XATTR_1};
pub(crate) use layer::INCOMPAT;
pub use layer::{Completed, complete_layer};
pub use probe::{Unit, probe};

#[cfg(test)]
pub(crate) mod tests;
