//! Completion: an extent file becomes a plain one.

use super::{ExtentFile, io};
use rustix::{
    fs::{Timespec, Timestamps, UTIME_OMIT},
    io::Result,
};
use std::{
    ops::{ControlFlow, Range},
    os::fd::AsFd,
    sync::atomic::Ordering::SeqCst,
};

/// Copied at a time. What waits for completion waits for this much.
const STEP: u64 = 512 << 10;

impl ExtentFile {
    /// Fills the holes from the lower file, a step at a time, and makes the file a plain one. `pace` is told how many
    /// bytes were just copied, sleeps as it likes, and may break off: the result is `Ok` then too, and a later call goes
    /// on. Readers and writers go on meanwhile; holes of the lower file stay holes. The mtime stays; the ctime becomes
    /// the time of completion, as no filesystem lets one set it.
    pub fn complete(&self, pace: &mut dyn FnMut(u64) -> ControlFlow<()>) -> Result<()> {
        if self.is_complete() {
            return Ok(());
        }
        self.check_writable()?;
        let mut buffer = Vec::new();
        let mut at = 0;
        while let Some((next, copied)) = self.complete_step(at, &mut buffer)? {
            at = next;
            if copied > 0 && pace(copied).is_break() {
                return Ok(());
            }
        }
        // All that was a hole must be on the disk before a power cut can find the file without its header.
        rustix::fs::fdatasync(&self.upper)?;
        let _fill = self.fill.lock();
        let mut state = self.state.write();
        self.give_back()?;
        self.become_plain(&mut state)
    }

    /// Copies the next of the lower file's data after `at` that the upper has not: where to go on, and how much it was.
    fn complete_step(&self, at: u64, buffer: &mut Vec<u8>) -> Result<Option<(u64, u64)>> {
        let _fill = self.fill.lock();
        let end = (at / io::CHUNK + 1) * io::CHUNK;
        let state = self.with_map(at..end)?;
        if at >= state.limit {
            return Ok(None);
        }
        let gap = state.gaps(at..end).into_iter().next();
        drop(state);
        let Some(gap) = gap else { return Ok(Some((end, 0))) };
        let Some(data) = io::next_data(self.lower.as_fd(), gap.start, gap.end)? else {
            return Ok(Some((gap.end, 0)));
        };
        // Whole units: half of one would hide the other half of the lower's.
        let data = self.units(data);
        let step = data.start.max(gap.start)..data.end.min(gap.end);
        self.pin()?;
        let copied = self.copy_hole(step, buffer);
        self.unpin()?;
        let copied = copied?;
        Ok(Some((copied.end, copied.end - copied.start)))
    }

    /// Copies the first step of a hole below the limit. The caller holds `fill`.
    pub(super) fn copy_hole(&self, gap: Range<u64>, buffer: &mut Vec<u8>) -> Result<Range<u64>> {
        let range = gap.start..gap.end.min(self.units(gap.start..gap.start + STEP).end);
        buffer.resize((range.end - range.start) as usize, 0);
        io::read_all(self.lower.as_fd(), buffer, range.start)?;
        io::write_all(self.upper.as_fd(), buffer, range.start)
            .inspect_err(|_| self.take_back(std::slice::from_ref(&range)))?;
        self.state.write().map.insert(range.clone());
        Ok(range)
    }

    /// Notes what a write of completion changes.
    pub(super) fn pin(&self) -> Result<()> {
        // Exclusive, so that no write is under way that has been counted but has not changed the mtime yet.
        let mut state = self.state.write();
        self.keep_privileges()?;
        let stat = rustix::fs::fstat(&self.upper)?;
        state.pinned = Some((self.changes.load(SeqCst), (stat.st_mtime, stat.st_mtime_nsec as u64)));
        Ok(())
    }

    /// Puts it back, unless a user has changed it meanwhile.
    pub(super) fn unpin(&self) -> Result<()> {
        let mut state = self.state.write();
        self.give_back()?;
        if let Some((changes, mtime)) = state.pinned.take()
            && changes == self.changes.load(SeqCst)
        {
            let omit = Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT as _ };
            let mtime = Timespec { tv_sec: mtime.0, tv_nsec: mtime.1 as _ };
            rustix::fs::futimens(&self.upper, &Timestamps { last_access: omit, last_modification: mtime })?;
        }
        Ok(())
    }
}
