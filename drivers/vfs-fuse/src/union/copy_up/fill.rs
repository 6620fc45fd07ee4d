//! The data of a copy, by the cheapest way that is allowed.

use super::{Change, Lower, Times};
use crate::{
    config::CopyUp,
    extent::{self, Header, LowerIdentity},
    union::{
        Union,
        bytes::{copy_extents, copy_range},
        data::Inner,
        layer,
        node::Node,
        work::Upper,
    },
};
use rustix::{
    fd::{AsFd, OwnedFd},
    fs::{Mode, OFlags, Statx},
    io::{Errno, Result},
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

/// What copying whole files has cost on this machine lately, for `copy_up=auto`.
pub(in crate::union) struct Cost {
    nanoseconds_per_mebibyte: AtomicU64,
    nanoseconds_to_sync: AtomicU64,
}

impl Cost {
    /// Until something was measured: a disk of 400 MB/s that syncs in a millisecond.
    pub fn new() -> Cost {
        Cost { nanoseconds_per_mebibyte: AtomicU64::new(2_500_000), nanoseconds_to_sync: AtomicU64::new(1_000_000) }
    }

    /// What copying so many bytes is going to cost.
    fn of(&self, bytes: u64) -> u64 {
        let per = self.nanoseconds_per_mebibyte.load(Ordering::Relaxed);
        ((u128::from(bytes) * u128::from(per)) >> 20) as u64 + self.nanoseconds_to_sync.load(Ordering::Relaxed)
    }

    fn learn(&self, bytes: u64, copied: u64, synced: u64) {
        let mix = |old: &AtomicU64, new: u64| {
            old.store((old.load(Ordering::Relaxed) * 7 + new) / 8, Ordering::Relaxed);
        };
        if bytes >= 64 << 10 {
            mix(&self.nanoseconds_per_mebibyte, ((u128::from(copied) << 20) / u128::from(bytes)) as u64);
        }
        mix(&self.nanoseconds_to_sync, synced);
    }
}

/// A write may cost as much more than an extent file's does as this before the file is made one: it is read in one
/// piece ever after.
const WORTH_A_WHOLE_FILE: u64 = 2_000_000;

impl Union {
    /// Gives the new file its data, by the cheapest way that is allowed.
    pub(super) fn fill(
        &self,
        upper: &Upper,
        (file, stat): (&OwnedFd, &Statx),
        (lower, ino): (&Lower, u64),
        change: Change,
    ) -> Result<Option<Header>> {
        let size = lower.stat.stx_size;
        let keep = if let Change::Data { keep } = change { keep.min(size) } else { size };
        if keep == 0 {
            return Ok(None);
        }
        if let Some(data) = &lower.data {
            return self.copy_composed(file, data, keep).map(|()| None);
        }
        if self.reflink(file, lower, size, keep)? {
            return Ok(None);
        }
        if self.prefers_extents(change, keep)
            && self.can_extent()
            && let Some(header) = self.prepare_extents(upper, (file, stat), (lower, ino))?
        {
            return Ok(Some(header));
        }
        let started = Instant::now();
        copy_range(&lower.fd, file, keep)?;
        let copied = started.elapsed();
        if !self.config.volatile {
            // The name must never be on disk without the data (the kernel's overlay syncs here too).
            rustix::fs::fdatasync(file)?;
            self.cost.learn(keep, copied.as_nanos() as u64, (started.elapsed() - copied).as_nanos() as u64);
        }
        Ok(None)
    }

    fn prefers_extents(&self, change: Change, keep: u64) -> bool {
        self.config.copy_up == CopyUp::Extent || change == Change::Metadata || self.cost.of(keep) > WORTH_A_WHOLE_FILE
    }

    fn prepare_extents(
        &self,
        upper: &Upper,
        (file, stat): (&OwnedFd, &Statx),
        (lower, ino): (&Lower, u64),
    ) -> Result<Option<Header>> {
        let (Some(path), Some(_)) = (&lower.path, upper.unit()?) else { return Ok(None) };
        let header = Header {
            layer_from_bottom: self.lowers.len() as u16 - lower.layer,
            path: path.clone(),
            lower: LowerIdentity {
                size: lower.stat.stx_size,
                mtime: (lower.stat.stx_mtime.tv_sec, lower.stat.stx_mtime.tv_nsec),
                ino: lower.stat.stx_ino,
            },
            limit: lower.stat.stx_size,
            upper: extent::UpperIdentity::in_stat(stat),
            ino: Some(ino),
        };
        upper.note_incomplete()?;
        match extent::prepare(file.as_fd(), self.marks.prefix, &header) {
            Ok(()) => Ok(Some(header)),
            // The path does not fit into an xattr.
            Err(Errno::NOSPC | Errno::TOOBIG | Errno::RANGE | Errno::OPNOTSUPP) => {
                extent::unprepare(file.as_fd(), self.marks.prefix, None)?;
                rustix::fs::ftruncate(file, 0)?;
                Ok(None)
            }
            Err(e) => Err(e),
        }
    }

    /// `false`: the two files cannot share data.
    fn reflink(&self, file: &OwnedFd, lower: &Lower, size: u64, keep: u64) -> Result<bool> {
        let device = layer::device(&lower.stat);
        let wanted = matches!(self.config.copy_up, CopyUp::Auto | CopyUp::Reflink);
        if !wanted || self.no_reflink.lock().contains(&device) {
            return Ok(false);
        }
        match rustix::fs::ioctl_ficlone(file, &lower.fd) {
            Ok(()) => {}
            Err(Errno::XDEV | Errno::OPNOTSUPP | Errno::NOTTY | Errno::NOSYS) => {
                self.no_reflink.lock().insert(device);
                return Ok(false);
            }
            // A file that is not shared for reasons of its own (a swap file, another allocation unit).
            Err(Errno::INVAL | Errno::TXTBSY | Errno::PERM) => return Ok(false),
            Err(e) => return Err(e),
        }
        if keep < size {
            rustix::fs::ftruncate(file, keep)?;
        }
        // Not synced, as the kernel's overlay does not either: a btrfs log for each would be 100 KiB for a chmod. Filesystems
        // that clone write it to their journal before the name, and btrfs, which can sync a directory by itself, commits all
        // when a name in it came from another directory (tests/durable.rs).
        Ok(true)
    }

    fn copy_composed(&self, file: &OwnedFd, data: &Inner, keep: u64) -> Result<()> {
        match data {
            Inner::Lower(fd) | Inner::Upper(fd) => copy_range(fd, file, keep)?,
            Inner::Extent(extents) => copy_extents(extents, file, keep)?,
        }
        if self.config.volatile { Ok(()) } else { rustix::fs::fdatasync(file) }
    }

    /// An upper file that the kernel's overlay left without data gets it.
    pub(super) fn fill_metacopy(&self, node: &Arc<Node>) -> Result<()> {
        let mut place = node.place.lock();
        let Inner::Lower(lower) = self.open_data(&place, false)? else { return Ok(()) };
        drop(place);
        self.with(node, |object, _| {
            let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let file = rustix::fs::openat(object.dir, object.name, flags, Mode::empty())?;
            let times = Times::of(file.as_fd())?;
            copy_range(&lower, &file, u64::MAX)?;
            rustix::fs::fdatasync(&file)?;
            times.restore(file.as_fd())?;
            for mark in ["metacopy", "redirect"] {
                match object.remove(&self.marks.name(mark)) {
                    Ok(()) | Err(Errno::NODATA) => {}
                    Err(e) => return Err(e),
                }
            }
            Ok(())
        })?;
        place = node.place.lock();
        place.composed = false;
        if let Some(data) = place.more.as_ref().and_then(|m| m.data.upgrade()) {
            data.replace(self.open_data(&place, true)?);
        }
        Ok(())
    }
}
