//! Copying the bytes of files.

use crate::extent::ExtentFile;
use rustix::{
    fd::OwnedFd,
    fs::SeekFrom,
    io::{Errno, Result},
};

/// Copies the first bytes of a file, holes as holes.
pub(super) fn copy_range(from: &OwnedFd, to: &OwnedFd, keep: u64) -> Result<()> {
    let size = (rustix::fs::fstat(from)?.st_size as u64).min(keep);
    let mut at = 0;
    while at < size {
        let start = match rustix::fs::seek(from, SeekFrom::Data(at)) {
            Ok(start) => start.min(size),
            Err(Errno::NXIO) => break,
            Err(Errno::INVAL | Errno::OPNOTSUPP) => at,
            Err(e) => return Err(e),
        };
        let end = rustix::fs::seek(from, SeekFrom::Hole(start)).unwrap_or(size).min(size);
        at = if end > start { copy_piece(from, to, start, end)? } else { end.max(start + 1) };
    }
    rustix::fs::ftruncate(to, size)
}

fn copy_piece(from: &OwnedFd, to: &OwnedFd, start: u64, end: u64) -> Result<u64> {
    let (mut read, mut write) = (start, start);
    while read < end {
        let wanted = (end - read).min(8 << 20) as usize;
        match rustix::fs::copy_file_range(from, Some(&mut read), to, Some(&mut write), wanted) {
            Ok(0) => return Ok(end),
            Ok(_) => {}
            Err(Errno::XDEV | Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS | Errno::PERM) => {
                let mut buffer = vec![0; wanted.min(1 << 20)];
                let length = rustix::io::pread(from, &mut *buffer, read)?;
                if length == 0 {
                    return Ok(end);
                }
                let mut done = 0;
                while done < length {
                    done += rustix::io::pwrite(to, &buffer[done..length], read + done as u64)?;
                }
                read += length as u64;
                write = read;
            }
            Err(e) => return Err(e),
        }
    }
    Ok(end)
}

pub(super) fn copy_extents(from: &ExtentFile, to: &OwnedFd, keep: u64) -> Result<()> {
    let mut buffer = vec![0; 1 << 20];
    let mut at = 0;
    while at < keep {
        let wanted = (keep - at).min(buffer.len() as u64) as usize;
        let length = from.read_at(&mut buffer[..wanted], at)?;
        if length == 0 {
            break;
        }
        let mut done = 0;
        while done < length {
            done += rustix::io::pwrite(to, &buffer[done..length], at + done as u64)?;
        }
        at += length as u64;
    }
    rustix::fs::ftruncate(to, at.max(keep.min(from.size()?)))
}
