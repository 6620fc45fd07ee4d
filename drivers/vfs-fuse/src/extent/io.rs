//! Whole reads and writes, and what a filesystem says of a file's allocation.

use rustix::{
    fs::{Advice, SeekFrom},
    io::{Errno, IoSlice, Result},
};
use std::{num::NonZeroU64, ops::Range, os::fd::BorrowedFd};

/// Of the map: what is loaded at a time, a multiple of every unit and of the largest page cache folio.
pub(super) const CHUNK: u64 = 4 << 20;

pub(super) fn read_all(fd: BorrowedFd<'_>, mut buffer: &mut [u8], mut at: u64) -> Result<()> {
    while !buffer.is_empty() {
        match rustix::io::pread(fd, &mut *buffer, at) {
            Ok(0) => return Err(Errno::IO),
            Ok(n) => {
                buffer = &mut buffer[n..];
                at += n as u64;
            }
            Err(Errno::INTR) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

pub(super) fn write_all(fd: BorrowedFd<'_>, mut bytes: &[u8], mut at: u64) -> Result<()> {
    while !bytes.is_empty() {
        match rustix::io::pwrite(fd, bytes, at) {
            Ok(0) => return Err(Errno::IO),
            Ok(n) => {
                bytes = &bytes[n..];
                at += n as u64;
            }
            Err(Errno::INTR) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// All parts in one call, so that no moment shows one of them alone.
pub(super) fn write_together(fd: BorrowedFd<'_>, parts: &[&[u8]], at: u64) -> Result<()> {
    let slices: Vec<IoSlice<'_>> = parts.iter().filter(|p| !p.is_empty()).map(|p| IoSlice::new(p)).collect();
    let written = loop {
        match rustix::io::pwritev(fd, &slices, at) {
            Err(Errno::INTR) => {}
            other => break other?,
        }
    };
    // Short: out of space most of the time, which the rest then says. Nobody sees what is in between as the caller has
    // not entered it in the map, and takes it back on an error.
    let mut skip = written;
    let mut at = at + written as u64;
    for part in parts {
        let rest = &part[skip.min(part.len())..];
        skip = skip.saturating_sub(part.len());
        write_all(fd, rest, at)?;
        at += rest.len() as u64;
    }
    Ok(())
}

/// The next data in `at..end`. All of it is data to a filesystem that cannot say.
pub(super) fn next_data(fd: BorrowedFd<'_>, at: u64, end: u64) -> Result<Option<Range<u64>>> {
    if at >= end {
        return Ok(None);
    }
    let start = match rustix::fs::seek(fd, SeekFrom::Data(at)) {
        Err(Errno::NXIO) => return Ok(None),
        Err(Errno::INVAL) => return Ok(Some(at..end)),
        other => other?,
    };
    if start >= end {
        return Ok(None);
    }
    Ok(Some(start..rustix::fs::seek(fd, SeekFrom::Hole(start))?.min(end)))
}

pub(super) fn drop_pages(fd: BorrowedFd<'_>, range: &Range<u64>) -> Result<()> {
    rustix::fs::fadvise(fd, range.start, NonZeroU64::new(range.end - range.start), Advice::DontNeed)
}
