//! Recipes for overlayfs.

use graphdriver_core::{Mount, Result, mount};
use std::path::{Path, PathBuf};

/// Features that stay off whatever the kernel's defaults are. The index ties an upper directory to its lower ones: a
/// live diff shows the upper as a lower of a second mount, and a mount leaked into another namespace would make the next
/// one fail with EBUSY. NFS export needs the index.
pub(crate) const ALWAYS_OFF: &[&str] = &["index=off", "nfs_export=off"];

/// An overlay of `lower`, topmost first, with the writable directory and its work directory on top.
pub(crate) fn recipe(lower: &[PathBuf], upper: Option<(&Path, &Path)>, options: &[&str]) -> Result<Mount> {
    let lower = lower.iter().map(|path| mount::escape(path)).collect::<Result<Vec<_>>>()?.join(":");
    let mut all = vec![format!("lowerdir={lower}")];
    if let Some((upper, work)) = upper {
        all.push(format!("upperdir={}", mount::escape(upper)?));
        all.push(format!("workdir={}", mount::escape(work)?));
    }
    all.extend(options.iter().map(|option| option.to_string()));
    Ok(Mount { fstype: "overlay".into(), source: "overlay".into(), options: all })
}
