//! Completion while mounted: files copied up by extents get the rest of their data in the background.

use super::{
    Union,
    data::Inner,
    node::{Node, UPPER},
};
use crate::{config::Completion, extent::ExtentFile};
use rustix::io::{Errno, Result};
use std::{
    collections::VecDeque,
    ops::ControlFlow,
    sync::{Arc, Weak},
    thread::JoinHandle,
    time::{Duration, Instant},
};

/// The files that wait to be completed.
#[derive(Default)]
pub(super) struct Queue {
    waiting: parking_lot::Mutex<State>,
    changed: parking_lot::Condvar,
}

#[derive(Default)]
struct State {
    files: VecDeque<Weak<Node>>,
    stopped: bool,
}

impl Queue {
    pub fn push(&self, node: &Arc<Node>) {
        self.waiting.lock().files.push_back(Arc::downgrade(node));
        self.changed.notify_one();
    }

    fn stop(&self) {
        self.waiting.lock().stopped = true;
        self.changed.notify_all();
    }

    /// `None`: it is over.
    fn next(&self) -> Option<Weak<Node>> {
        let mut waiting = self.waiting.lock();
        loop {
            if waiting.stopped {
                return None;
            }
            if let Some(file) = waiting.files.pop_front() {
                return Some(file);
            }
            self.changed.wait(&mut waiting);
        }
    }

    /// Waits; `Break`: it is over.
    fn pause(&self, until: Instant) -> ControlFlow<()> {
        let mut waiting = self.waiting.lock();
        while !waiting.stopped {
            if self.changed.wait_until(&mut waiting, until).timed_out() {
                return ControlFlow::Continue(());
            }
        }
        ControlFlow::Break(())
    }
}

/// The thread that completes files. Dropped, it ends at the next piece of a file; what is not complete stays an extent
/// file, which the next mount goes on with.
pub struct Completer {
    union: Arc<Union>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Completer {
    fn drop(&mut self) {
        self.union.completion.stop();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that completes files has panicked");
        }
    }
}

impl Union {
    /// Finds out ahead of the first write whether files can be copied up by extents, as that waits for the disk.
    pub fn look_ahead(self: &Arc<Union>) {
        if !self.wants_extents() || self.upper.is_none() {
            return;
        }
        let union = self.clone();
        let thread = std::thread::Builder::new().name("probe".into());
        // Whoever needs it asks again, and is told what failed.
        let started = thread.spawn(move || union.can_extent());
        if let Err(e) = started {
            tracing::debug!("no thread to look ahead with: {e}");
        }
    }

    /// Starts to complete files, those of earlier mounts too, if the settings want it.
    pub fn start_completion(self: &Arc<Union>) -> Option<Completer> {
        let Completion::Background { rate } = self.config.completion else { return None };
        self.upper.as_ref()?;
        let union = self.clone();
        let thread = std::thread::Builder::new().name("complete".into()).spawn(move || {
            if let Err(e) = union.complete_earlier(rate) {
                tracing::warn!("looking for files to complete: {e}");
            }
            while let Some(node) = union.completion.next() {
                let Some(node) = node.upgrade() else { continue };
                // What cannot be completed stays as it is, which is no loss.
                if let Err(e) = union.complete(&node, Some(rate)) {
                    tracing::warn!(ino = node.ino, "completing a file: {e}");
                }
                union.let_go(node);
            }
        });
        thread.ok().map(|thread| Completer { union: self.clone(), thread: Some(thread) })
    }

    /// Completes the extent files that the upper layer has already.
    fn complete_earlier(&self, rate: u64) -> Result<()> {
        let mut waiting = vec![self.root.clone()];
        while let Some(node) = waiting.pop() {
            if node.dir.is_none() {
                self.complete(&node, Some(rate))?;
            } else if node.dir()?.in_upper() {
                self.find_incomplete(&node, &mut waiting)?;
            }
            self.let_go(node);
        }
        Ok(())
    }

    fn find_incomplete(&self, dir: &Arc<Node>, below: &mut Vec<Arc<Node>>) -> Result<()> {
        let names = dir.dir()?.names.read();
        if names.removed {
            return Ok(());
        }
        let fds = self.fds(dir)?;
        for entry in self.read_names(dir)?.iter().filter(|e| e.layer == UPPER) {
            let Ok(Some(found)) = self.find_from(dir, &fds, 0, &entry.name) else { continue };
            if found.composed || found.is_dir() {
                below.push(self.node_for(dir, &entry.name, found, 0));
            }
        }
        Ok(())
    }

    /// The extent file that somebody has open, which keeps account of its times.
    pub(super) fn open_extents(&self, node: &Node) -> Option<Arc<ExtentFile>> {
        let place = node.place.lock();
        place.more.as_ref()?.data.upgrade()?.extent()
    }

    /// Completes a file at once. `false`: it is plain already.
    pub(super) fn make_plain(&self, node: &Arc<Node>) -> Result<bool> {
        if !node.is_regular() || !node.place.lock().composed {
            return Ok(false);
        }
        self.complete(node, None).map(|()| true)
    }

    /// At so many bytes a second, or as fast as it goes.
    fn complete(&self, node: &Arc<Node>, rate: Option<u64>) -> Result<()> {
        let data = match self.data_of(node, true, u64::MAX) {
            Err(Errno::NOENT | Errno::STALE) => return Ok(()),
            other => other?,
        };
        let Some(file) = data.extent() else { return Ok(()) };
        let mut due = Instant::now();
        file.complete(&mut |bytes| {
            let Some(rate) = rate else { return ControlFlow::Continue(()) };
            due += Duration::from_secs_f64(bytes as f64 / rate as f64);
            self.completion.pause(due)
        })?;
        if !file.is_complete() {
            return Ok(());
        }
        let mut place = node.place.lock();
        place.composed = false;
        let fd = rustix::fd::AsFd::as_fd(&file.upper()).try_clone_to_owned().map_err(|_| Errno::MFILE)?;
        data.replace(Inner::Upper(Arc::new(fd)));
        Ok(())
    }
}
