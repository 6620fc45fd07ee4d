//! Turns: each name is given to one snapshot at a time.

use std::{
    collections::HashSet,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
};

/// The names somebody has a turn of.
#[derive(Default)]
pub(super) struct Names {
    taken: Mutex<HashSet<String>>,
    freed: Condvar,
}

/// A name's turn, until it is dropped.
pub(super) struct Turn<'a>(&'a Names, &'a str);

impl Names {
    /// Waits for the others who want the same.
    pub(super) fn turn<'a>(&'a self, name: &'a str) -> Turn<'a> {
        let wait = |taken| self.freed.wait_while(taken, |taken: &mut HashSet<String>| taken.contains(name));
        wait(self.lock()).unwrap_or_else(PoisonError::into_inner).insert(name.into());
        Turn(self, name)
    }

    fn lock(&self) -> MutexGuard<'_, HashSet<String>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.lock().remove(self.1);
        self.0.freed.notify_all();
    }
}
