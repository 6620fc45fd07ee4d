//! Making layers survive a power cut.

use super::open_dir;
use crate::{Context, Result};
use std::path::Path;

/// Writes everything down that anybody has written to the filesystem `dir` is on. One call however many files a layer
/// has, and directories, modes and xattrs are in it; but it also waits for what others wrote there.
pub(super) fn flush(dir: &Path) -> Result<()> {
    let flushed = open_dir(dir).and_then(rustix::fs::syncfs);
    flushed.doing(|| format!("flushing the filesystem of {}", dir.display()))
}

/// Writes these directories beneath `dir` down, with the names in them.
pub(super) fn flush_dirs(dir: &Path, names: &[&str]) -> Result<()> {
    for name in names {
        let path = dir.join(name);
        open_dir(&path).and_then(rustix::fs::fsync).doing(|| format!("flushing {}", path.display()))?;
    }
    Ok(())
}
