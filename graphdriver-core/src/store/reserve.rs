//! A little space kept back on the data root's filesystem.
//!
//! Removing something needs space first: the database writes its log, and drivers try out the filesystem when they are
//! opened. Without a reserve a disk that is full to the last byte could not be freed.

use super::session::absent_is_fine;
use crate::Result;
use rustix::fs::{FallocateFlags, fallocate, statvfs};
use std::{fs, path::Path};

const NAME: &str = "reserve";

/// In bytes: ten times what removing an image of 100 layers was seen to need.
const SIZE: u64 = 2 << 20;

/// Gives the reserve in the store's directory free if the filesystem has nearly no other space left.
pub fn spend(dir: &Path) -> Result<()> {
    match available(dir) {
        Some(bytes) if bytes < SIZE / 2 => absent_is_fine(fs::remove_file(dir.join(NAME))),
        _ => Ok(()),
    }
}

/// Makes the reserve if it is not there and there is plenty of space. Going without is no error.
pub fn keep(dir: &Path) {
    let path = dir.join(NAME);
    if path.exists() || available(dir).is_none_or(|bytes| bytes < 8 * SIZE) {
        return;
    }
    let made = fs::File::create(&path).and_then(|file| Ok(fallocate(&file, FallocateFlags::empty(), 0, SIZE)?));
    if let Err(e) = made {
        tracing::debug!("no space is kept back in {}: {e}", path.display());
        let _ = fs::remove_file(&path);
    }
}

/// Bytes; none if the directory is not there yet.
fn available(dir: &Path) -> Option<u64> {
    statvfs(dir).ok().map(|stat| stat.f_bavail * stat.f_frsize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn the_reserve_takes_space_and_stays_while_there_is_enough() {
        let dir = tempfile::tempdir().unwrap();
        keep(dir.path());
        let made = fs::metadata(dir.path().join(NAME)).unwrap();
        assert!(made.blocks() * 512 >= SIZE);
        spend(dir.path()).unwrap();
        keep(dir.path());
        assert_eq!(fs::metadata(dir.path().join(NAME)).unwrap().ino(), made.ino());
        keep(&dir.path().join("missing"));
        spend(&dir.path().join("missing")).unwrap();
    }
}
