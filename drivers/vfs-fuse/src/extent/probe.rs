//! Whether the upper filesystem's allocation can serve as the extent map.

use super::io;
use rustix::{
    fs::{AtFlags, Mode, OFlags},
    io::{Errno, Result},
};
use std::{
    ops::Range,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

/// What the upper layer's filesystem allocates at least, in bytes: a power of two from 4096 to 65536.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unit(pub u32);

/// ext2 to ext4, xfs, btrfs, and overlayfs for nested use. That what they allocate is neither there before its data after a
/// power cut, nor gone because it is zeros, no quick look can tell: they were tried, others were not.
const TRIED: [u64; 4] = [0xef53, 0x5846_5342, 0x9123_683e, 0x794c_7630];

const SIZE: u64 = (64 << 20) + 1000;
/// Looked at by reading and mapping; the first places written are in it.
const NEAR: usize = 1 << 20;
/// Multiples of every unit, so that rounding is the same for all. One is written with zeros.
const WRITTEN: [u64; 4] = [0, 128 << 10, 640 << 10, 33 << 20];

/// Whether holes can be trusted on the filesystem of `work`, and the unit; makes and removes a file in `work`. `None`
/// where what was never written may count as data, or what was written may not.
pub fn probe(work: BorrowedFd<'_>) -> Result<Option<Unit>> {
    if !TRIED.contains(&(rustix::fs::fstatfs(work)?.f_type as u64 & 0xffff_ffff)) {
        return Ok(None);
    }
    probe_any(work)
}

pub(super) fn probe_any(work: BorrowedFd<'_>) -> Result<Option<Unit>> {
    let file = scratch(work)?;
    let file = file.as_fd();
    rustix::fs::ftruncate(file, SIZE)?;
    if !data(file)?.is_empty() {
        return Ok(None);
    }
    for (i, at) in WRITTEN.into_iter().enumerate() {
        io::write_all(file, &[i as u8; 4096], at)?;
    }
    let unit = data(file)?.first().map_or(0, |first| first.end);
    if !(4096..=65536).contains(&unit) || !unit.is_power_of_two() {
        return Ok(None);
    }
    let expected: Vec<Range<u64>> = WRITTEN.iter().map(|at| *at..at + unit).collect();
    let steps: [&dyn Fn() -> Result<()>; 4] = [
        &|| Ok(()),
        // Extents without data, by which some prepare for more writes, become data where they have been read.
        &|| io::read_all(file, &mut vec![0; NEAR], 0),
        &|| crate::sys::touch_mapped(file, NEAR),
        // Zeros may be made holes on their way to the disk.
        &|| rustix::fs::fdatasync(file),
    ];
    for step in steps {
        step()?;
        if data(file)? != expected {
            return Ok(None);
        }
    }
    Ok(Some(Unit(unit as u32)))
}

fn scratch(work: BorrowedFd<'_>) -> Result<OwnedFd> {
    let name = format!("#vfs.probe.{}", std::process::id());
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = match rustix::fs::openat(work, &name, flags, Mode::RUSR | Mode::WUSR) {
        // Of an earlier process with this number that was killed.
        Err(Errno::EXIST) => {
            rustix::fs::unlinkat(work, &name, AtFlags::empty())?;
            rustix::fs::openat(work, &name, flags, Mode::RUSR | Mode::WUSR)?
        }
        other => other?,
    };
    rustix::fs::unlinkat(work, &name, AtFlags::empty())?;
    Ok(file)
}

fn data(file: BorrowedFd<'_>) -> Result<Vec<Range<u64>>> {
    let mut found = Vec::new();
    let mut at = 0;
    while let Some(data) = io::next_data(file, at, SIZE)? {
        at = data.end;
        found.push(data);
        if found.len() > WRITTEN.len() {
            break;
        }
    }
    Ok(found)
}
