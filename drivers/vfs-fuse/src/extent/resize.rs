//! Sizes and allocation: truncate and fallocate.

use super::{ExtentFile, file::State, io};
use rustix::{
    fs::{FallocateFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT},
    io::{Errno, Result},
};
use std::{ops::ControlFlow, ops::Range, sync::atomic::Ordering::SeqCst};

static ZEROS: [u8; 128 << 10] = [0; 128 << 10];

const MODIFIED_NOW: Timestamps = Timestamps {
    last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT as _ },
    last_modification: Timespec { tv_sec: 0, tv_nsec: UTIME_NOW as _ },
};

impl ExtentFile {
    /// As ftruncate(2).
    pub fn set_len(&self, size: u64) -> Result<()> {
        self.check_writable()?;
        self.own_unit_at(size.min(self.size.load(SeqCst)))?;
        let _fill = self.fill.lock();
        self.set_len_locked(&mut self.state.write(), size)
    }

    /// Where the file ends or ended inside a unit, that unit must be the upper's before the size changes: btrfs zeroes the rest of
    /// the block then, which makes a hole data.
    pub(super) fn own_unit_at(&self, end: u64) -> Result<()> {
        if end.is_multiple_of(self.unit) { Ok(()) } else { self.fill_holes(self.units(end - 1..end)) }
    }

    fn set_len_locked(&self, state: &mut State, size: u64) -> Result<()> {
        if self.would_grow_stale(state, size) {
            self.settle(state)?;
        }
        self.changed()?;
        rustix::fs::ftruncate(&self.upper, size)?;
        self.size.store(size, SeqCst);
        if size < state.limit {
            self.lower_limit(state, size);
            // Whichever fails is done again before the file grows.
            let settled = if size == 0 { self.become_plain(state) } else { self.settle(state) };
            settled.unwrap_or_else(|e| tracing::debug!("the header of a truncated extent file stays for now: {e}"));
        }
        Ok(())
    }

    fn lower_limit(&self, state: &mut State, limit: u64) {
        state.limit = limit;
        state.map.cut(limit);
    }

    /// `mode` as fallocate(2).
    pub fn fallocate(&self, mode: u32, offset: u64, length: u64) -> Result<()> {
        self.check_writable()?;
        let end = offset.checked_add(length).filter(|end| *end <= i64::MAX as u64).ok_or(Errno::FBIG)?;
        if length == 0 {
            return Err(Errno::INVAL);
        }
        let mode = FallocateFlags::from_bits_retain(mode);
        let keep = FallocateFlags::KEEP_SIZE;
        match mode - keep {
            rest if rest.is_empty() => self.allocate(mode, offset..end),
            FallocateFlags::ZERO_RANGE => self.zero(mode, offset..end),
            FallocateFlags::PUNCH_HOLE if mode.contains(keep) => self.punch(mode, offset..end),
            _ => self.rearrange(mode, offset, length),
        }
    }

    /// Space for the lower file's part can only be had by copying it: extents without data count as data once read.
    fn allocate(&self, mode: FallocateFlags, range: Range<u64>) -> Result<()> {
        self.fill_holes(self.units(range.clone()))?;
        self.above_limit(mode, range)
    }

    fn zero(&self, mode: FallocateFlags, range: Range<u64>) -> Result<()> {
        let limit = self.state.read().limit;
        self.write_zeros(range.start..range.end.min(limit))?;
        self.fill_holes(self.units(range.start.max(limit)..range.end))?;
        self.above_limit(mode, range)
    }

    /// The range from the limit on, as the kernel does it. The unit with the limit must be the upper's.
    fn above_limit(&self, mode: FallocateFlags, range: Range<u64>) -> Result<()> {
        let keep = FallocateFlags::KEEP_SIZE;
        self.own_unit_at(self.size.load(SeqCst).min(range.end))?;
        let _fill = self.fill.lock();
        let mut state = self.state.write();
        let above = range.start.max(state.limit)..range.end;
        self.changed()?;
        if above.is_empty() {
            // Filling holes is no change, the call as a whole is one.
            rustix::fs::futimens(&self.upper, &MODIFIED_NOW)?;
        } else {
            rustix::fs::fallocate(&self.upper, mode | keep, above.start, above.end - above.start)?;
        }
        if !mode.contains(keep) && range.end > self.size.load(SeqCst) {
            self.set_len_locked(&mut state, range.end)?;
        }
        Ok(())
    }

    fn punch(&self, mode: FallocateFlags, range: Range<u64>) -> Result<()> {
        let limit = self.state.read().limit;
        if range.end < limit {
            return self.write_zeros(range);
        }
        // Up to the limit or past it: the lower file ends where the hole begins. The header says so before data goes.
        let _fill = self.fill.lock();
        let mut state = self.state.write();
        if range.start < state.limit {
            self.lower_limit(&mut state, range.start);
            self.settle(&mut state)?;
        }
        self.changed()?;
        rustix::fs::fallocate(&self.upper, mode, range.start, range.end - range.start)
    }

    fn rearrange(&self, mode: FallocateFlags, offset: u64, length: u64) -> Result<()> {
        self.complete(&mut |_| ControlFlow::Continue(()))?;
        let _fill = self.fill.lock();
        let _state = self.state.write();
        self.changed()?;
        rustix::fs::fallocate(&self.upper, mode, offset, length)?;
        self.size.store(rustix::fs::fstat(&self.upper)?.st_size as u64, SeqCst);
        Ok(())
    }

    fn write_zeros(&self, range: Range<u64>) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            let n = (range.end - at).min(ZEROS.len() as u64);
            self.write_at(&ZEROS[..n as usize], at)?;
            at += n;
        }
        Ok(())
    }

    fn fill_holes(&self, range: Range<u64>) -> Result<()> {
        let mut buffer = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let end = range.end.min((at / io::CHUNK + 1) * io::CHUNK);
            let _fill = self.fill.lock();
            let gap = self.with_map(at..end)?.gaps(at..end).into_iter().next();
            at = match gap {
                Some(gap) => {
                    self.changed()?;
                    self.copy_hole(gap, &mut buffer)?.end
                }
                None if end >= self.state.read().limit => break,
                None => end,
            };
        }
        Ok(())
    }
}
