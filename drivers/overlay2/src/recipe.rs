//! Recipes for overlayfs.

use graphdriver_core::{Mount, Result, overlay_home};
use std::path::{Path, PathBuf};

/// Features that stay off whatever the kernel's defaults are. The index ties an upper directory to its lower ones: a
/// live diff shows the upper as a lower of a second mount, and a mount leaked into another namespace would make the next
/// one fail with EBUSY. NFS export needs the index.
pub(crate) const ALWAYS_OFF: &[&str] = &["index=off", "nfs_export=off"];

/// An overlay of `lower`, topmost first, with the writable directory and its work directory on top.
pub(crate) fn recipe(lower: &[PathBuf], upper: Option<(&Path, &Path)>, options: &[&str]) -> Result<Mount> {
    overlay_home::recipe("overlay", "overlay", lower, upper, options.iter().copied())
}
