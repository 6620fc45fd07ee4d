//! The union as the kernel wants it: `fuser`'s requests turned into calls of [`crate::union::Union`].

mod convert;
mod filesystem;
mod io;
mod io_mode;
mod mount;
mod mtimes;
mod negotiate;
mod pool;
mod recent;
mod seek;
mod session;
mod wake;

pub use session::{Session, Target, Unmounter};
