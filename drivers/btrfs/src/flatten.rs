//! Turning nested subvolumes into plain directories.
//!
//! A snapshot has an empty directory where a subvolume was nested in its source. A child has to show what its parent
//! showed, so before a layer is frozen every subvolume that somebody made in it is replaced by a copy.
//!
//! The copy is made under a name of its own in the layer's root, and then changes places with the subvolume. The file
//! `HOME/flat/ID`, locked while this goes on, holds that name, so that what a crash left of it can be removed.

use crate::subvolume::{self, Nested};
use graphdriver_core::{Context, Error, ErrorKind, Result, Root, tar};
use rustix::{
    fs::{self, AtFlags, FlockOperation, Mode, RenameFlags, Timespec, Timestamps, UTIME_OMIT},
    io::Errno,
};
use std::{
    ffi::OsStr,
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsFd, BorrowedFd},
    path::Path,
};

/// Replaces all subvolumes nested in the active layer whose root is `layer`. `intent` is the layer's file.
pub(crate) fn flatten(layer: &Root, intent: &Path, doomed: &mut dyn FnMut(&[u64]) -> Result<()>) -> Result<()> {
    undo(Some(layer), intent, doomed)?;
    let nested = subvolume::nested_directly(layer.as_fd())?;
    if nested.is_empty() {
        return Ok(());
    }
    let temporary = format!(".graphdriver-flat-{}", crate::home::unique()?);
    let mut file = File::create(intent).doing(|| format!("writing {}", intent.display()))?;
    fs::flock(&file, FlockOperation::LockExclusive)?;
    file.write_all(temporary.as_bytes()).and_then(|()| file.sync_all()).doing(|| "noting what is about to be done")?;
    let replaced = nested.iter().try_for_each(|subvolume| {
        replace(layer, subvolume, &temporary, doomed)
            .doing(|| format!("making a directory of nested subvolume {:?}", subvolume.path))
    });
    drop(file);
    // Also finishes it: then there is nothing left to remove but the file.
    let undone = undo(Some(layer), intent, doomed);
    replaced.and(undone)
}

/// Removes what a crash left of it, if `intent` is there and nobody holds it. Without a layer there is only the file.
pub(crate) fn undo(layer: Option<&Root>, intent: &Path, doomed: &mut dyn FnMut(&[u64]) -> Result<()>) -> Result<()> {
    let mut file = match File::open(intent) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        opened => opened.doing(|| format!("opening {}", intent.display()))?,
    };
    match fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => return Ok(()),
        locked => locked?,
    }
    let mut temporary = String::new();
    file.read_to_string(&mut temporary).doing(|| format!("reading {}", intent.display()))?;
    if let (Some(layer), true) = (layer, temporary.starts_with(".graphdriver-flat-") && !temporary.contains('/')) {
        keeping_time(layer.as_fd(), || subvolume::destroy(layer.as_fd(), &temporary, doomed))?;
    }
    match std::fs::remove_file(intent) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::from(e).doing("removing a finished intent")),
        _ => Ok(()),
    }
}

fn replace(
    layer: &Root,
    subvolume: &Nested,
    temporary: &str,
    doomed: &mut dyn FnMut(&[u64]) -> Result<()>,
) -> Result<()> {
    let dir = layer.open_dir_nofollow(subvolume.path.parent().unwrap_or(Path::new("")))?;
    let name = subvolume.path.file_name().expect("a nested subvolume has a name");
    let source = Root::from_fd(subvolume::open(&dir, name)?);
    keeping_time(layer.as_fd(), || {
        fs::mkdirat(layer, temporary, Mode::RWXU)?;
        copy(&source, &Root::from_fd(subvolume::open(layer.as_fd(), temporary)?))?;
        let exchange = || Ok(fs::renameat_with(layer, temporary, &dir, name, RenameFlags::EXCHANGE)?);
        keeping_time(dir.as_fd(), || Ok(subvolume::loosened(source.as_fd(), exchange)?))?;
        subvolume::destroy(layer.as_fd(), temporary, doomed)
    })
}

/// Copies a tree exactly, with the subvolumes nested in it, in the way that layers travel.
fn copy(from: &Root, to: &Root) -> Result<()> {
    let (mut reader, writer) = io::pipe().doing(|| "making a pipe")?;
    std::thread::scope(|scope| {
        let packing = scope.spawn(move || tar::tree_tar(from, io::BufWriter::new(writer))?.flush().doing(|| "copying"));
        let unpacked = tar::extract(&mut reader, to, false, &mut |_| {});
        // More is on its way to where it ended: it was not cut off.
        let refused = unpacked.is_err() && reader.read(&mut [0]).is_ok_and(|n| n > 0);
        drop(reader);
        match (packing.join().expect("it does not panic"), unpacked) {
            // Whoever fails first ends the other's pipe: the one that was cut off is not the cause.
            (Err(packed), Err(unpacked)) if unpacked.kind() == ErrorKind::Corrupt && !refused => Err(packed),
            (packed, unpacked) => unpacked.and(packed),
        }
    })?;
    let root = graphdriver_core::root::inode_at(from.as_fd(), OsStr::new(""))?.meta;
    let owner = (fs::Uid::from_raw(root.uid), fs::Gid::from_raw(root.gid));
    fs::fchown(to, Some(owner.0), Some(owner.1))?;
    fs::fchmod(to, Mode::from(root.mode))?;
    for (name, value) in &root.xattrs {
        graphdriver_core::root::set_xattr_at(to.as_fd(), OsStr::new(""), name, value)?;
    }
    let time = Timespec { tv_sec: root.mtime.secs, tv_nsec: root.mtime.nanos.into() };
    Ok(fs::futimens(to, &Timestamps { last_access: OMIT, last_modification: time })?)
}

const OMIT: Timespec = Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT };

/// Changes names in a directory without changing when it was changed.
fn keeping_time<T>(dir: BorrowedFd<'_>, change: impl FnOnce() -> Result<T>) -> Result<T> {
    let stat = fs::statat(dir, "", AtFlags::EMPTY_PATH)?;
    let done = change()?;
    let time = Timespec { tv_sec: stat.st_mtime, tv_nsec: stat.st_mtime_nsec as _ };
    fs::futimens(dir, &Timestamps { last_access: OMIT, last_modification: time })?;
    Ok(done)
}
