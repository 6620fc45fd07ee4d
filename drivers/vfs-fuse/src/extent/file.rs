//! Reading and writing an extent file.

use super::{
    guard,
    header::{Header, UpperIdentity},
    io,
    map::{Map, Piece},
    privileges,
    probe::Unit,
};
use parking_lot::{Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard};
use rustix::{
    fs::{FallocateFlags, FileType, SeekFrom, Stat, Timestamps, UTIME_OMIT},
    io::{Errno, Result},
};
use std::{
    ops::Range,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
};

/// An open extent file: one per file, shared by all who have it open, from any number of threads.
///
/// Reads and writes of what the upper file has go on side by side. What turns holes into data or changes the size is
/// done one at a time, and keeps nobody else out but for the moment in which the map changes. Without `writable` all
/// that would change the file is `EBADF`.
pub struct ExtentFile {
    pub(super) upper: OwnedFd,
    pub(super) lower: OwnedFd,
    prefix: String,
    pub(super) unit: u64,
    pub(super) writable: bool,
    lower_blocks: u64,
    /// Held by whoever turns holes into data or changes the size.
    pub(super) fill: Mutex<()>,
    /// Shared while data moves, exclusive while the map or the size changes.
    pub(super) state: RwLock<State>,
    pub(super) size: AtomicU64,
    /// Counts changes by users, so that completion knows whether the mtime is theirs.
    pub(super) changes: AtomicU64,
    header_to_sync: AtomicBool,
    /// Whether privileges are kept that the next change by a user takes for good.
    kept: AtomicBool,
    complete: AtomicBool,
}

pub(super) struct State {
    header: Header,
    /// The limit in force: never above the header's, nor above the size.
    pub limit: u64,
    pub map: Map,
    /// The mtime to show, and restore, as long as `changes` is what it was.
    pub pinned: Option<(u64, (i64, u64))>,
}

impl State {
    pub fn below(&self, range: Range<u64>) -> Range<u64> {
        range.start.min(self.limit)..range.end.min(self.limit)
    }

    /// What has to be read where. Above the limit all is the upper's.
    fn pieces(&self, range: Range<u64>) -> Vec<Piece> {
        let mut pieces = self.map.pieces(self.below(range.clone()));
        let above = range.start.max(self.limit)..range.end;
        match pieces.last_mut() {
            _ if above.is_empty() => {}
            Some(last) if last.upper => last.range.end = above.end,
            _ => pieces.push(Piece { range: above, upper: true }),
        }
        pieces
    }

    pub fn gaps(&self, range: Range<u64>) -> Vec<Range<u64>> {
        let pieces = self.map.pieces(self.below(range));
        pieces.into_iter().filter(|piece| !piece.upper).map(|piece| piece.range).collect()
    }

    pub fn has_all(&self, range: Range<u64>) -> bool {
        self.map.covers(self.below(range))
    }

    fn is_stale(&self) -> bool {
        self.limit < self.header.limit
    }
}

impl ExtentFile {
    /// Takes the two files over: `upper` open for reading, and for writing if `writable`; `lower` for reading. `EIO` if
    /// one is not the file that the header tells of.
    pub fn open(
        upper: OwnedFd,
        lower: OwnedFd,
        header: Header,
        prefix: &str,
        unit: Unit,
        writable: bool,
    ) -> Result<ExtentFile> {
        let (up, low) = (rustix::fs::fstat(&upper)?, rustix::fs::fstat(&lower)?);
        check_identity(&header, &up, UpperIdentity::of(upper.as_fd())?, &low)?;
        let size = up.st_size as u64;
        let limit = header.limit.min(size);
        let map = match rustix::fs::seek(&upper, SeekFrom::Data(0)) {
            Err(Errno::NXIO) => Map::empty(),
            Ok(at) if at >= limit => Map::empty(),
            Ok(_) => {
                // After a daemon that was killed, what it wrote is in the page cache alone. The map drops the cache of
                // what it looks at, which works on clean pages only.
                rustix::fs::fdatasync(&upper)?;
                Map::default()
            }
            Err(e) => return Err(e),
        };
        let kept = writable && privileges::are_kept(upper.as_fd(), prefix)?;
        let file = ExtentFile {
            upper,
            lower,
            prefix: prefix.to_owned(),
            unit: unit.0.into(),
            writable,
            lower_blocks: low.st_blocks as u64,
            fill: Mutex::new(()),
            state: RwLock::new(State { header, limit, map, pinned: None }),
            size: AtomicU64::new(size),
            changes: AtomicU64::new(0),
            header_to_sync: AtomicBool::new(false),
            kept: AtomicBool::new(kept),
            complete: AtomicBool::new(false),
        };
        file.give_back().unwrap_or_else(|e| tracing::warn!("an extent file lacks its capabilities for now: {e}"));
        Ok(file)
    }

    /// As pread(2): 0 at the end.
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<usize> {
        let state = self.with_map(offset..offset.saturating_add(buffer.len() as u64))?;
        self.read_locked(&state, buffer, offset)
    }

    pub(super) fn read_locked(&self, state: &State, buffer: &mut [u8], offset: u64) -> Result<usize> {
        let length = self.size.load(SeqCst).saturating_sub(offset).min(buffer.len() as u64);
        for Piece { range, upper } in state.pieces(offset..offset + length) {
            let part = &mut buffer[(range.start - offset) as usize..(range.end - offset) as usize];
            io::read_all(if upper { self.upper.as_fd() } else { self.lower.as_fd() }, part, range.start)?;
        }
        Ok(length as usize)
    }

    /// Writes all of it. After an error each unit is old or new.
    pub fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        self.check_writable()?;
        let end = offset.checked_add(bytes.len() as u64).filter(|end| *end <= i64::MAX as u64).ok_or(Errno::FBIG)?;
        if bytes.is_empty() {
            return Ok(());
        }
        if offset > self.size.load(SeqCst) {
            self.own_unit_at(self.size.load(SeqCst))?;
        }
        let units = self.units(offset..end);
        let state = self.with_map(units.clone())?;
        if state.has_all(units.clone()) && !self.would_grow_stale(&state, end) {
            return self.write_upper(&[bytes], offset, end);
        }
        drop(state);
        let _fill = self.fill.lock();
        if self.would_grow_stale(&self.state.read(), end) {
            self.settle(&mut self.state.write())?;
        }
        let state = self.with_map(units)?;
        let written = self.write_holes(&state, bytes, offset..end)?;
        drop(state);
        let mut state = self.state.write();
        let written = state.below(written);
        state.map.insert(written);
        Ok(())
    }

    /// Writes with whatever else is in the first and the last unit, if that is not in the upper file yet.
    fn write_holes(&self, state: &State, bytes: &[u8], range: Range<u64>) -> Result<Range<u64>> {
        let [first, last] = [range.start, range.end].map(|at| self.units(at..at + 1));
        let mut whole = range.clone();
        if !state.has_all(first.clone()) {
            whole.start = first.start;
        }
        if range.end < state.limit && last.start < range.end && !state.has_all(last.clone()) {
            whole.end = last.end.min(state.limit);
        }
        // Behind the end of the file, where nothing is read, the head is zeros.
        let mut head = vec![0; (range.start - whole.start) as usize];
        let mut tail = vec![0; (whole.end - range.end) as usize];
        self.read_locked(state, &mut head, whole.start)?;
        self.read_locked(state, &mut tail, range.end)?;
        self.write_upper(&[&head, bytes, &tail], whole.start, range.end)
            .inspect_err(|_| self.take_back(&state.gaps(whole.clone())))?;
        Ok(whole)
    }

    fn write_upper(&self, parts: &[&[u8]], offset: u64, end: u64) -> Result<()> {
        self.changed()?;
        io::write_together(self.upper.as_fd(), parts, offset)?;
        self.size.fetch_max(end, SeqCst);
        Ok(())
    }

    /// After an error in the middle of a write into holes: a filesystem may have filled blocks with zeros already that
    /// it then found no room for, and they would hide the lower file's.
    pub(super) fn take_back(&self, gaps: &[Range<u64>]) {
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        for gap in gaps {
            if let Err(e) = rustix::fs::fallocate(&self.upper, punch, gap.start, gap.end - gap.start) {
                tracing::error!("bytes {gap:?} of an extent file may be lost: making them a hole again: {e}");
            }
        }
    }

    /// SEEK_DATA and SEEK_HOLE, as lseek(2).
    pub fn seek(&self, offset: u64, whence: i32) -> Result<u64> {
        let want_data = match whence {
            libc::SEEK_DATA => true,
            libc::SEEK_HOLE => false,
            _ => return Err(Errno::INVAL),
        };
        let mut at = offset;
        loop {
            let size = self.size.load(SeqCst);
            if at >= size {
                return if want_data || offset >= size { Err(Errno::NXIO) } else { Ok(size) };
            }
            let end = size.min((at / io::CHUNK + 1) * io::CHUNK);
            let state = self.with_map(at..end)?;
            for Piece { range, upper } in state.pieces(at..end) {
                let fd = if upper { self.upper.as_fd() } else { self.lower.as_fd() };
                let data = io::next_data(fd, range.start, range.end)?;
                match data {
                    Some(data) if want_data => return Ok(data.start),
                    Some(data) if data.start == range.start && data.end == range.end => {}
                    Some(data) if data.start == range.start => return Ok(data.end),
                    None if want_data => {}
                    _ => return Ok(range.start),
                }
            }
            at = end;
        }
    }

    /// A user is about to change the content. The caller holds `state`, shared at least.
    pub(super) fn changed(&self) -> Result<()> {
        self.changes.fetch_add(1, SeqCst);
        if self.kept.load(SeqCst) {
            privileges::forget(self.upper.as_fd(), &self.prefix)?;
            self.kept.store(false, SeqCst);
        }
        Ok(())
    }

    /// Before completion writes. The caller has `state` for itself, here and below.
    pub(super) fn keep_privileges(&self) -> Result<()> {
        self.give_back()?;
        self.kept.store(privileges::keep(self.upper.as_fd(), &self.prefix)?, SeqCst);
        Ok(())
    }

    /// After that, unless a user has changed the content meanwhile.
    pub(super) fn give_back(&self) -> Result<()> {
        if self.kept.load(SeqCst) {
            privileges::give_back(self.upper.as_fd(), &self.prefix)?;
            self.kept.store(false, SeqCst);
        }
        Ok(())
    }

    /// Does what changes mode, owner, times or xattrs of the upper file. If it is done without this, a step of completion
    /// that is under way may put back what was before.
    pub fn between_steps<T>(&self, change: impl FnOnce() -> T) -> T {
        let _fill = self.fill.lock();
        change()
    }

    /// futimens(2), as [`between_steps`](Self::between_steps) but without waiting.
    pub fn set_times(&self, times: &Timestamps) -> Result<()> {
        let _state = self.state.write();
        if times.last_modification.tv_nsec != UTIME_OMIT {
            self.changes.fetch_add(1, SeqCst);
        }
        rustix::fs::futimens(&self.upper, times)
    }

    /// Bytes.
    pub fn size(&self) -> Result<u64> {
        Ok(self.size.load(SeqCst))
    }

    /// fstat(2) of the upper file, with the blocks that the two files make up together and without the mtimes that
    /// completion causes.
    pub fn stat(&self) -> Result<Stat> {
        let state = self.state.read();
        let mut stat = rustix::fs::fstat(&self.upper)?;
        let most = (stat.st_size as u64).div_ceil(self.unit) * (self.unit / 512);
        let own = stat.st_blocks as u64;
        if state.limit > 0 {
            // A lower file without holes gives exactly what completion will, one with holes at most that.
            stat.st_blocks = own.max((own + self.lower_blocks).min(most)) as _;
        }
        if let Some((_, mtime)) = state.pinned.filter(|(changes, _)| *changes == self.changes.load(SeqCst)) {
            (stat.st_mtime, stat.st_mtime_nsec) = (mtime.0 as _, mtime.1 as _);
        }
        Ok(stat)
    }

    /// `st_blocks` as the user should see it.
    pub fn blocks(&self) -> Result<u64> {
        Ok(self.stat()?.st_blocks as u64)
    }

    /// Makes it durable.
    pub fn sync(&self, data_only: bool) -> Result<()> {
        // A changed limit is data to us, but not to fdatasync.
        if self.header_to_sync.swap(false, SeqCst) || !data_only {
            rustix::fs::fsync(&self.upper).inspect_err(|_| self.header_to_sync.store(true, SeqCst))
        } else {
            rustix::fs::fdatasync(&self.upper)
        }
    }

    /// The upper file.
    pub fn upper(&self) -> BorrowedFd<'_> {
        self.upper.as_fd()
    }

    /// Whether the upper file is a plain one by now, which holds all of it.
    pub fn is_complete(&self) -> bool {
        self.complete.load(SeqCst)
    }

    pub(super) fn check_writable(&self) -> Result<()> {
        if self.writable { Ok(()) } else { Err(Errno::BADF) }
    }

    /// The whole units that `range` touches.
    pub(super) fn units(&self, range: Range<u64>) -> Range<u64> {
        range.start / self.unit * self.unit..range.end.div_ceil(self.unit) * self.unit
    }

    /// The state, shared, with the map of `range`.
    pub(super) fn with_map(&self, range: Range<u64>) -> Result<RwLockReadGuard<'_, State>> {
        let state = self.state.read();
        if state.map.is_loaded(&state.below(range.clone())) {
            return Ok(state);
        }
        drop(state);
        let mut state = self.state.write();
        let below = state.below(range);
        state.map.load(self.upper.as_fd(), &below)?;
        Ok(RwLockWriteGuard::downgrade(state))
    }

    /// Whether `end` is past the end of the file while its header has a limit above that: the lower file would show again
    /// after a crash.
    pub(super) fn would_grow_stale(&self, state: &State, end: u64) -> bool {
        state.is_stale() && end > self.size.load(SeqCst)
    }

    /// Brings the header's limit down to the one in force.
    pub(super) fn settle(&self, state: &mut State) -> Result<()> {
        if state.is_stale() {
            let header = Header { limit: state.limit, ..state.header.clone() };
            guard::update(self.upper.as_fd(), &self.prefix, &header)?;
            state.header = header;
            self.header_to_sync.store(true, SeqCst);
        }
        Ok(())
    }

    /// Nothing of the lower file shows any more: removes what makes it an extent file.
    pub(super) fn become_plain(&self, state: &mut State) -> Result<()> {
        guard::unprepare(self.upper.as_fd(), &self.prefix, state.header.ino)?;
        state.header.limit = 0;
        state.limit = 0;
        state.map = Map::empty();
        self.complete.store(true, SeqCst);
        Ok(())
    }
}

fn check_identity(header: &Header, upper: &Stat, identity: UpperIdentity, lower: &Stat) -> Result<()> {
    let is_file = |stat: &Stat| FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
    let mtime = (lower.st_mtime, lower.st_mtime_nsec as u32);
    let same_lower =
        (lower.st_size as u64, mtime, { lower.st_ino }) == (header.lower.size, header.lower.mtime, header.lower.ino);
    let path = String::from_utf8_lossy(&header.path);
    if !is_file(upper) || identity != header.upper {
        tracing::error!(
            "the extent file of {path:?} is a copy of the one that was made: its holes may have become zeros"
        );
        return Err(Errno::IO);
    }
    if !is_file(lower) || !same_lower {
        tracing::error!("the lower file {path:?} is not the one that an extent file was made of");
        return Err(Errno::IO);
    }
    Ok(())
}
