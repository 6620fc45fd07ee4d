//! What the kernel allows to be done with one inode's data at a time.
//!
//! While an inode is open, all its opens must be of one mode: through the kernel's page cache of it, or passed through
//! to one and the same backing file by one and the same registration. Whatever does not fit gets EIO from the kernel.
//! The kernel forgets a closed file before it tells us (RELEASE is sent afterwards), so what is counted here is never
//! less than what the kernel counts, and an answer that fits our state fits its state as well.
//!
//! What passthrough writes does not reach the page cache. Still it can be kept from one open to the next: a lower file
//! never changes, a file in two parts is only written through the page cache, and a plain file of the upper layer is
//! not opened through it unless the kernel refuses to pass it through.

use parking_lot::Mutex;
use std::{collections::HashMap, io, sync::Arc};

/// A file's data as it is at an open.
#[derive(Debug)]
pub struct Sight<F> {
    /// The one file that holds all of it.
    pub file: Option<Arc<F>>,
    /// It should be passed through, if nothing stands against it.
    pub passthrough: bool,
}

/// How an open is to be answered.
#[derive(Debug)]
pub enum Answer<B> {
    /// Through the page cache; `keep`: what is in there is still right.
    Cached {
        /// FOPEN_KEEP_CACHE.
        keep: bool,
    },
    /// Straight to the backing file.
    Passthrough(Arc<B>),
    /// The kernel's inode is bound to a file that no longer has the data: it needs a new inode, see
    /// [`IoModes::supersede`].
    Renew,
    /// It has a new inode already: ESTALE, so that the kernel looks the name up again.
    Stale,
}

/// One inode's mode, with what it is bound to. `D` is the data, `F` a file that holds it, `B` such a file's
/// registration with the kernel.
#[derive(Debug)]
struct IoMode<D, F, B> {
    opens: u32,
    bound: Bound<D, F, B>,
    superseded: bool,
    told: Option<Time>,
}

/// Seconds and nanoseconds.
type Time = (i64, u32);

#[derive(Debug)]
enum Bound<D, F, B> {
    Nothing,
    Cached { data: Arc<D>, keep: bool },
    Passthrough { data: Arc<D>, file: Arc<F>, backing: Arc<B> },
}

impl<D, F, B> Default for IoMode<D, F, B> {
    fn default() -> Self {
        IoMode { opens: 0, bound: Bound::Nothing, superseded: false, told: None }
    }
}

impl<D, F, B> IoMode<D, F, B> {
    fn open(&mut self, data: &Arc<D>, sight: Sight<F>, register: &dyn Fn(&F) -> io::Result<B>) -> Answer<B> {
        if self.superseded {
            return Answer::Stale;
        }
        let answer = match &self.bound {
            Bound::Nothing => self.first_open(data, sight, register),
            // Data that is copied up meanwhile stays the same object, and its content stays the same.
            &Bound::Cached { keep, .. } => Answer::Cached { keep },
            Bound::Passthrough { file, backing, .. } if sight.file.as_ref().is_some_and(|f| Arc::ptr_eq(f, file)) => {
                Answer::Passthrough(backing.clone())
            }
            Bound::Passthrough { .. } => return Answer::Renew,
        };
        self.opens += 1;
        answer
    }

    fn first_open(&mut self, data: &Arc<D>, sight: Sight<F>, register: &dyn Fn(&F) -> io::Result<B>) -> Answer<B> {
        let data = data.clone();
        let keep = match sight.file.filter(|_| sight.passthrough).map(|file| (register(&file), file)) {
            Some((Ok(backing), file)) => {
                let backing = Arc::new(backing);
                self.bound = Bound::Passthrough { data, file, backing: backing.clone() };
                return Answer::Passthrough(backing);
            }
            // Without the right, or stacked too deep: then it was refused before as well, and nothing was written past
            // the page cache.
            Some((Err(e), _)) => matches!(e.raw_os_error(), Some(libc::EPERM | libc::ELOOP)),
            None => true,
        };
        self.bound = Bound::Cached { data, keep };
        Answer::Cached { keep }
    }

    fn release(&mut self) -> Option<Bound<D, F, B>> {
        self.opens = self.opens.saturating_sub(1);
        (self.opens == 0).then(|| std::mem::replace(&mut self.bound, Bound::Nothing))
    }

    fn data(&self) -> Option<&Arc<D>> {
        match &self.bound {
            Bound::Nothing => None,
            Bound::Cached { data, .. } | Bound::Passthrough { data, .. } => Some(data),
        }
    }
}

type Shard<D, F, B> = Mutex<HashMap<u64, IoMode<D, F, B>>>;

/// The modes of all inodes that are open.
#[derive(Debug)]
pub struct IoModes<D, F, B> {
    shards: Vec<Shard<D, F, B>>,
}

impl<D, F, B> Default for IoModes<D, F, B> {
    fn default() -> Self {
        IoModes { shards: (0..16).map(|_| Mutex::default()).collect() }
    }
}

impl<D, F, B> IoModes<D, F, B> {
    /// One more open. `look` sees the data as it is now, with no other open of the inode in between; `register` makes
    /// a file known to the kernel.
    pub fn open(
        &self,
        id: u64,
        data: &Arc<D>,
        look: &dyn Fn(&D) -> Sight<F>,
        register: &dyn Fn(&F) -> io::Result<B>,
    ) -> Answer<B> {
        self.with(id, |mode| mode.open(data, look(data), register))
    }

    /// One open less.
    pub fn release(&self, id: u64) {
        let released = self.with(id, IoMode::release);
        // When no lock is held: closing a file may take long.
        drop(released);
    }

    /// What those who have the inode open read and write.
    pub fn data(&self, id: u64) -> Option<Arc<D>> {
        self.shard(id).lock().get(&id)?.data().cloned()
    }

    /// The kernel is told when the file was last modified. Says whether names lead to another inode by now.
    pub fn tell(&self, id: u64, modified: Time) -> bool {
        let mut modes = self.shard(id).lock();
        let Some(mode) = modes.get_mut(&id) else { return false };
        mode.told = Some(modified);
        mode.superseded
    }

    /// What the kernel was told last, and the file that it may have written to since.
    pub fn take_told(&self, id: u64) -> Option<(Arc<F>, Time)> {
        let mut modes = self.shard(id).lock();
        let mode = modes.get_mut(&id)?;
        let Bound::Passthrough { file, .. } = &mode.bound else { return None };
        Some((file.clone(), mode.told.take()?))
    }

    /// Names lead to another inode from now on, and so must every open.
    pub fn supersede(&self, id: u64) {
        self.with(id, |mode| mode.superseded = true);
    }

    /// Whether names lead to another inode by now.
    pub fn is_superseded(&self, id: u64) -> bool {
        self.shard(id).lock().get(&id).is_some_and(|mode| mode.superseded)
    }

    /// The kernel has dropped the inode.
    pub fn forget(&self, id: u64) {
        self.with(id, |mode| mode.superseded &= mode.opens > 0);
    }

    /// Does something with one inode's mode; what is as if it had never been there is not kept.
    fn with<R>(&self, id: u64, act: impl FnOnce(&mut IoMode<D, F, B>) -> R) -> R {
        let mut modes = self.shard(id).lock();
        let mode = modes.entry(id).or_default();
        let result = act(mode);
        if mode.opens == 0 && !mode.superseded {
            modes.remove(&id);
        }
        result
    }

    fn shard(&self, id: u64) -> &Shard<D, F, B> {
        &self.shards[id as usize % self.shards.len()]
    }
}

#[cfg(test)]
mod tests;
