//! The merged names of a directory, in an order that neither additions nor removals disturb.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    hash::BuildHasher,
    ops::Bound,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

/// Offsets below belong to `.` and `..`.
pub(super) const FIRST_OFFSET: u64 = 16;
/// `d_off` is a signed 64-bit number.
const OFFSET_BITS: u32 = 62;

/// One name.
#[derive(Debug, Clone)]
pub(super) struct Listed {
    pub name: Box<OsStr>,
    /// Inode number as shown; 0 if it has to be looked up.
    pub ino: u64,
    /// The topmost layer that has it.
    pub layer: u16,
    /// `DT_*` of dirent.h.
    pub kind: u8,
    /// Lower layers have a directory of this name too.
    pub merged: bool,
}

/// Names by the hash of their name, so that the offset of a name is always the same: a reader who goes on later misses
/// nothing and sees nothing twice, whatever was made or removed meanwhile, and though the listing was read anew.
pub(super) struct Listing {
    entries: BTreeMap<u64, Listed>,
    count: Arc<AtomicUsize>,
}

impl Listing {
    pub fn new(count: &Arc<AtomicUsize>) -> Listing {
        Listing { entries: BTreeMap::new(), count: count.clone() }
    }

    /// Where the name is or would be.
    fn slot(&self, hasher: &impl BuildHasher, name: &OsStr) -> u64 {
        let mut at = (hasher.hash_one(name) >> (64 - OFFSET_BITS)).max(FIRST_OFFSET);
        while self.entries.get(&at).is_some_and(|e| *e.name != *name) {
            at += 1;
        }
        at
    }

    pub fn get(&self, hasher: &impl BuildHasher, name: &OsStr) -> Option<&Listed> {
        self.entries.get(&self.slot(hasher, name))
    }

    pub fn get_mut(&mut self, hasher: &impl BuildHasher, name: &OsStr) -> Option<&mut Listed> {
        self.entries.get_mut(&self.slot(hasher, name))
    }

    pub fn insert(&mut self, hasher: &impl BuildHasher, entry: Listed) {
        let slot = self.slot(hasher, &entry.name);
        if self.entries.insert(slot, entry).is_none() {
            self.count.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub fn remove(&mut self, hasher: &impl BuildHasher, name: &OsStr) {
        if self.entries.remove(&self.slot(hasher, name)).is_some() {
            self.count.fetch_sub(1, Ordering::Relaxed);
        }
    }

    pub fn retain(&mut self, keep: impl Fn(&Listed) -> bool) {
        let before = self.entries.len();
        self.entries.retain(|_, e| keep(e));
        self.count.fetch_sub(before - self.entries.len(), Ordering::Relaxed);
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// What comes after an offset.
    pub fn after(&self, offset: u64) -> impl Iterator<Item = (u64, &Listed)> {
        self.entries.range((Bound::Excluded(offset), Bound::Unbounded)).map(|(o, e)| (*o, e))
    }

    pub fn iter(&self) -> impl Iterator<Item = &Listed> {
        self.entries.values()
    }

    /// Remembers a number that had to be looked up.
    pub fn learn(&mut self, offset: u64, ino: u64) {
        if let Some(entry) = self.entries.get_mut(&offset) {
            entry.ino = ino;
        }
    }
}

impl Drop for Listing {
    fn drop(&mut self) {
        self.count.fetch_sub(self.entries.len(), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::{collections::BTreeSet, hash::RandomState};

    fn listed(name: &str) -> Listed {
        Listed { name: OsStr::new(name).into(), ino: 1, layer: 1, kind: 8, merged: false }
    }

    proptest! {
        /// Reading in parts while names come and go shows every name that stays, once.
        #[test]
        fn a_reader_sees_what_stays_exactly_once(
            stay in prop::collection::btree_set("[a-z]{1,4}", 0..60),
            steps in prop::collection::vec((any::<bool>(), "[A-Z]{1,2}"), 0..60),
        ) {
            let hasher = RandomState::new();
            let count = Arc::new(AtomicUsize::new(0));
            let mut listing = Listing::new(&count);
            stay.iter().for_each(|n| listing.insert(&hasher, listed(n)));
            let (mut offset, mut seen) = (0, Vec::new());
            let mut steps = steps.iter();
            loop {
                let next = listing.after(offset).next().map(|(at, e)| (at, e.name.to_str().unwrap().to_owned()));
                let Some((at, name)) = next else { break };
                offset = at;
                seen.push(name);
                if let Some((add, name)) = steps.next() {
                    if *add { listing.insert(&hasher, listed(name)) } else { listing.remove(&hasher, OsStr::new(name)) }
                }
            }
            let stayed: Vec<_> = seen.iter().filter(|n| stay.contains(*n)).collect();
            prop_assert_eq!(stayed.len(), stay.len());
            prop_assert_eq!(seen.iter().collect::<BTreeSet<_>>().len(), seen.len());
            drop(listing);
            prop_assert_eq!(count.load(Ordering::Relaxed), 0);
        }
    }
}
