//! A little space kept back on the data root's filesystem.
//!
//! Removing something needs space first: the database writes its log, and drivers try out the filesystem when they are
//! opened. Without a reserve a disk that is full to the last byte could not be freed.

use super::session::absent_is_fine;
use crate::Result;
use rustix::fs::{FallocateFlags, fallocate, statvfs};
use std::{
    fs,
    io::{self, Read, Write},
    os::unix::fs::MetadataExt,
    path::Path,
    thread,
    time::{Duration, Instant},
};

const NAME: &str = "reserve";

/// In bytes: ten times what removing an image of 100 layers was seen to need.
const SIZE: u64 = 2 << 20;

/// How long the space may take to be there once the reserve is gone.
const PATIENCE: Duration = Duration::from_secs(15);

/// Gives the reserve in the store's directory free if the filesystem has nearly no other space left.
pub fn spend(dir: &Path) -> Result<()> {
    let (path, before) = (dir.join(NAME), available(dir));
    if before.is_none_or(|bytes| bytes >= SIZE / 2) || !path.exists() {
        return Ok(());
    }
    absent_is_fine(fs::remove_file(path))?;
    // ZFS has the space when it has written its transaction group, every 5 seconds.
    let until = Instant::now() + PATIENCE;
    while available(dir) <= before && Instant::now() < until {
        thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// Makes the reserve if it is not there and there is plenty of space. Going without is no error.
pub fn keep(dir: &Path) {
    let path = dir.join(NAME);
    if path.exists() || available(dir).is_none_or(|bytes| bytes < 8 * SIZE) {
        return;
    }
    if let Err(e) = fs::File::create(&path).and_then(fill) {
        tracing::debug!("no space is kept back in {}: {e}", path.display());
        let _ = fs::remove_file(&path);
    }
}

/// ZFS allocates nothing in advance, and nothing for what it can compress away.
fn fill(mut file: fs::File) -> io::Result<()> {
    let allocated = fallocate(&file, FallocateFlags::empty(), 0, SIZE);
    if allocated.is_err() || file.metadata()?.blocks() * 512 < SIZE {
        let mut noise = Vec::new();
        fs::File::open("/dev/urandom")?.take(SIZE).read_to_end(&mut noise)?;
        file.write_all(&noise)?;
    }
    Ok(())
}

/// Bytes; none if the directory is not there yet.
fn available(dir: &Path) -> Option<u64> {
    statvfs(dir).ok().map(|stat| stat.f_bavail * stat.f_frsize)
}

#[cfg(test)]
mod tests {
    use super::*;

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
