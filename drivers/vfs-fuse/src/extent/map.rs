//! Which bytes of an extent file its upper file has. Filled in as it is asked for, from the upper file's own allocation.

use super::io::{self, CHUNK};
use rustix::io::Result;
use std::{collections::BTreeMap, ops::Range, os::fd::BorrowedFd};

/// Upper ranges by chunk number, relative to the chunk, sorted, apart from each other. A chunk that is not here has not
/// been asked for, or is empty where the whole file was. Byte ranges rather than units: a power cut leaves parts of a
/// unit where blocks are smaller than it.
#[derive(Debug, Default)]
pub(super) struct Map {
    chunks: BTreeMap<u64, Vec<Range<u32>>>,
    was_empty: bool,
}

/// A part of the file that comes from one place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Piece {
    pub range: Range<u64>,
    pub upper: bool,
}

fn chunks(range: &Range<u64>) -> Range<u64> {
    if range.is_empty() { 0..0 } else { range.start / CHUNK..range.end.div_ceil(CHUNK) }
}

fn within(chunk: u64, range: &Range<u64>) -> Range<u32> {
    let base = chunk * CHUNK;
    range.start.saturating_sub(base) as u32..(range.end - base).min(CHUNK) as u32
}

impl Map {
    /// Of a file that has no data at all.
    pub fn empty() -> Map {
        Map { chunks: BTreeMap::new(), was_empty: true }
    }

    pub fn is_loaded(&self, range: &Range<u64>) -> bool {
        self.was_empty || chunks(range).all(|chunk| self.chunks.contains_key(&chunk))
    }

    pub fn load(&mut self, upper: BorrowedFd<'_>, range: &Range<u64>) -> Result<()> {
        for chunk in chunks(range) {
            if self.was_empty || self.chunks.contains_key(&chunk) {
                continue;
            }
            let all = chunk * CHUNK..(chunk + 1) * CHUNK;
            // Clean pages of extents without data (made by anything that read the file) would count as data.
            io::drop_pages(upper, &all)?;
            let mut found = Vec::new();
            let mut at = all.start;
            while let Some(data) = io::next_data(upper, at, all.end)? {
                found.push(within(chunk, &data));
                at = data.end;
            }
            self.chunks.insert(chunk, found);
        }
        Ok(())
    }

    /// `range` in parts, neighbours from different places. The chunks must be loaded.
    pub fn pieces(&self, range: Range<u64>) -> Vec<Piece> {
        let mut pieces: Vec<Piece> = Vec::new();
        let mut push = |start: u64, end: u64, upper: bool| match pieces.last_mut() {
            _ if start >= end => {}
            Some(last) if last.upper == upper => last.range.end = end,
            _ => pieces.push(Piece { range: start..end, upper }),
        };
        for chunk in chunks(&range) {
            let base = chunk * CHUNK;
            let part = within(chunk, &range);
            let mut at = part.start;
            let ranges = self.chunks.get(&chunk).map_or(&[][..], |ranges| &ranges[..]);
            for data in &ranges[ranges.partition_point(|r| r.end <= part.start)..] {
                let (start, end) = (data.start.clamp(at, part.end), data.end.min(part.end));
                if data.start >= part.end {
                    break;
                }
                push(base + u64::from(at), base + u64::from(start), false);
                push(base + u64::from(start), base + u64::from(end), true);
                at = end;
            }
            push(base + u64::from(at), base + u64::from(part.end), false);
        }
        pieces
    }

    pub fn covers(&self, range: Range<u64>) -> bool {
        self.pieces(range).iter().all(|piece| piece.upper)
    }

    /// The upper has `range` from now on. The chunks must be loaded.
    pub fn insert(&mut self, range: Range<u64>) {
        for chunk in chunks(&range) {
            let mut new = within(chunk, &range);
            let ranges = self.chunks.entry(chunk).or_default();
            let first = ranges.partition_point(|r| r.end < new.start);
            let last = ranges.partition_point(|r| r.start <= new.end);
            if first < last {
                new = new.start.min(ranges[first].start)..new.end.max(ranges[last - 1].end);
            }
            ranges.splice(first..last, [new]);
        }
    }

    /// The file now ends, or the lower file's part of it does, at `end`.
    pub fn cut(&mut self, end: u64) {
        self.chunks.split_off(&end.div_ceil(CHUNK));
        if let Some(ranges) = self.chunks.get_mut(&(end / CHUNK)) {
            let end = (end % CHUNK) as u32;
            ranges.retain_mut(|r| {
                r.end = r.end.min(end);
                r.start < r.end
            });
        }
    }
}
