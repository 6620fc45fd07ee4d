//! Data of files used of late, where the kernel does not tell what is open.

use parking_lot::Mutex;
use std::sync::Arc;

/// Each holds descriptors, of which a process has few.
const MOST: usize = 64;

/// The last [`MOST`] files, latest last. So few that a search from the end costs less than a map would.
#[derive(Debug)]
pub struct Recent<D>(Mutex<Vec<(u64, Arc<D>)>>);

impl<D> Default for Recent<D> {
    fn default() -> Self {
        Recent(Mutex::default())
    }
}

impl<D> Recent<D> {
    /// The data of the file, if it is among them.
    pub fn get(&self, id: u64) -> Option<Arc<D>> {
        let mut entries = self.0.lock();
        let at = entries.iter().rposition(|&(of, _)| of == id)?;
        if at + 1 < entries.len() {
            let entry = entries.remove(at);
            entries.push(entry);
        }
        entries.last().map(|(_, data)| data.clone())
    }

    /// Makes it the latest, instead of what was known of the file before.
    pub fn put(&self, id: u64, data: Arc<D>) {
        let mut entries = self.0.lock();
        let gone = entries.iter().position(|&(of, _)| of == id).or((entries.len() == MOST).then_some(0));
        let gone = gone.map(|at| entries.remove(at));
        entries.push((id, data));
        drop(entries);
        // Closing what was removed need not be waited for by others.
        drop(gone);
    }

    /// Lets go of the file.
    pub fn forget(&self, id: u64) {
        let mut entries = self.0.lock();
        let gone = entries.iter().position(|&(of, _)| of == id).map(|at| entries.remove(at));
        drop(entries);
        drop(gone);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_what_was_used_last() {
        let recent = Recent::default();
        for id in 0..MOST as u64 {
            recent.put(id, Arc::new(id));
        }
        assert_eq!(recent.get(0).as_deref(), Some(&0));
        recent.put(1000, Arc::new(1000));
        assert_eq!((recent.get(0).as_deref(), recent.get(1)), (Some(&0), None), "1 was the oldest");
        recent.put(0, Arc::new(7));
        assert_eq!(recent.get(0).as_deref(), Some(&7));
        recent.forget(0);
        assert_eq!(recent.get(0), None);
    }
}
