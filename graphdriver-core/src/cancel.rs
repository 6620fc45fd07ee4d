//! How long work is told to stop.

use crate::{Error, ErrorKind, Result};
use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

/// Set by whoever wants no more of it, a signal handler for example; long work looks at it between names and buffers and
/// undoes what it has begun.
#[derive(Debug, Clone, Default)]
pub struct Cancel(pub Arc<AtomicBool>);

impl Cancel {
    /// Makes the work stop.
    pub fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// An `Interrupted` error once the work is to stop.
    pub fn check(&self) -> Result<()> {
        match self.0.load(Ordering::Relaxed) {
            true => Err(Error::new(ErrorKind::Interrupted, "interrupted")),
            false => Ok(()),
        }
    }
}
