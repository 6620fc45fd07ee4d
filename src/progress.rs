//! Long work tells how far it is, and stops when asked to.

pub use graphdriver_core::Cancel;

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::OFlags,
    io::Errno,
};
use std::{
    fs::File,
    io::{self, Read, Write},
    os::{fd::AsFd, unix::fs::OpenOptionsExt},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

/// Hears how far long work is. Called from several threads.
pub trait Progress: Send + Sync {
    /// `done` bytes of `item`, of `total` if that is known.
    fn advance(&self, item: &str, done: u64, total: Option<u64>);
    /// No more will be heard of `item`.
    fn finish(&self, item: &str);
}

/// Nobody listens.
#[derive(Debug, Clone, Copy)]
pub struct Silent;

impl Progress for Silent {
    fn advance(&self, _: &str, _: u64, _: Option<u64>) {}
    fn finish(&self, _: &str) {}
}

/// How long a signal that comes between the look at [`Cancel`] and the wait goes unnoticed.
const LOOK_AGAIN: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// A file whose reads fail once the user has asked to stop, also while a pipe or a terminal sends nothing: after a signal
/// the kernel restarts read(2), but never poll(2) (signal(7)).
#[derive(Debug)]
pub struct Interruptible {
    file: File,
    cancel: Cancel,
}

impl Interruptible {
    /// Reads `file` until `cancel` is set.
    pub fn new(file: File, cancel: &Cancel) -> Self {
        Interruptible { file, cancel: cancel.clone() }
    }

    /// Opens `path`; a FIFO without waiting for its writer, which the first read does.
    pub fn open(path: &Path, cancel: &Cancel) -> io::Result<Self> {
        let flags = OFlags::NONBLOCK.bits() as i32;
        Ok(Self::new(File::options().read(true).custom_flags(flags).open(path)?, cancel))
    }

    /// Standard input. Nobody else must read from it.
    pub fn stdin(cancel: &Cancel) -> io::Result<Self> {
        Ok(Self::new(io::stdin().as_fd().try_clone_to_owned()?.into(), cancel))
    }

    /// The file below.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The file below.
    pub fn into_file(self) -> File {
        self.file
    }
}

impl Read for Interruptible {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            self.cancel.check()?;
            match poll(&mut [PollFd::new(&self.file, PollFlags::IN)], Some(&LOOK_AGAIN)) {
                Ok(0) | Err(Errno::INTR) => continue,
                Ok(_) => {}
                Err(e) => return Err(e.into()),
            }
            match self.file.read(buf) {
                // Another reader of the same pipe was faster.
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => continue,
                done => return done,
            }
        }
    }
}

/// Counts what is read, for a bar that measures something else than what its [`Metered`] sees.
pub(crate) struct Counted<T> {
    pub inner: T,
    pub passed: Arc<AtomicU64>,
}

impl<T: Read> Read for Counted<T> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buf)?;
        self.passed.fetch_add(n as u64, Ordering::Relaxed);
        Ok(n)
    }
}

/// A reader or writer that reports and can be stopped.
pub(crate) struct Metered<'a, T> {
    inner: T,
    item: &'a str,
    total: Option<u64>,
    done: u64,
    /// Where `done` is counted, if not here.
    counted: Option<Arc<AtomicU64>>,
    progress: &'a dyn Progress,
    cancel: &'a Cancel,
}

impl<'a, T> Metered<'a, T> {
    pub(crate) fn new(
        inner: T,
        item: &'a str,
        total: Option<u64>,
        progress: &'a dyn Progress,
        cancel: &'a Cancel,
    ) -> Self {
        progress.advance(item, 0, total);
        Metered { inner, item, total, done: 0, counted: None, progress, cancel }
    }

    /// Reports what somebody else counts: the stored bytes of a stream that is decompressed on the way here.
    pub(crate) fn counted_by(mut self, counter: Arc<AtomicU64>) -> Self {
        self.counted = Some(counter);
        self
    }

    fn moved(&mut self, n: usize) -> usize {
        self.done = self.counted.as_ref().map_or(self.done + n as u64, |counted| counted.load(Ordering::Relaxed));
        self.progress.advance(self.item, self.done, self.total);
        n
    }
}

impl<T: Read> Read for Metered<'_, T> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.cancel.check()?;
        self.inner.read(buf).map(|n| self.moved(n))
    }
}

impl<T: Write> Write for Metered<'_, T> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.cancel.check()?;
        self.inner.write(buf).map(|n| self.moved(n))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

impl<T> Drop for Metered<'_, T> {
    fn drop(&mut self) {
        self.progress.finish(self.item);
    }
}
