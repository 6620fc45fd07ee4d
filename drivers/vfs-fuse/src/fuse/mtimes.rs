//! Modification times that the kernel has set, where it gathers writes.
//!
//! With the writeback cache a file's time is the kernel's to say, and nobody asks us as long as it knows the inode. But a
//! WRITE may come after the SETATTR with the time that belongs to it (they are told side by side, by several threads), and
//! the time of its arrival would be what the disk keeps. So after each change of the data the time is set again. Of a
//! file that was just made it is the one it was made at.

use parking_lot::Mutex;
use std::{array, collections::HashMap};

/// Seconds and nanoseconds.
type Time = (i64, u32);

/// What the kernel has set last, by inode.
#[derive(Debug)]
pub struct Mtimes([Mutex<HashMap<u64, Time>>; 16]);

impl Default for Mtimes {
    fn default() -> Self {
        Mtimes(array::from_fn(|_| Mutex::default()))
    }
}

impl Mtimes {
    /// To be called before the time is set, so that no [`restore`](Self::restore) comes after that with an older one.
    pub fn note(&self, id: u64, time: Time) {
        self.shard(id).lock().insert(id, time);
    }

    /// Calls with the time to set again, if there is one.
    pub fn restore<T>(&self, id: u64, set: impl FnOnce(Time) -> T) -> Option<T> {
        self.shard(id).lock().get(&id).copied().map(set)
    }

    /// The kernel has dropped the inode.
    pub fn forget(&self, id: u64) {
        self.shard(id).lock().remove(&id);
    }

    fn shard(&self, id: u64) -> &Mutex<HashMap<u64, Time>> {
        &self.0[id as usize % self.0.len()]
    }
}
