//! Limits on how much a directory tree may take: project quotas of xfs and ext4, btrfs qgroups and zfs refquota with one
//! face, [`Quota`].

mod layers;
pub mod project;
mod sys;

pub use layers::{LayerQuota, Wishes};
#[cfg(feature = "btrfs")]
pub mod qgroup;
pub mod refquota;

use graphdriver_core::{Limits, Result, Usage};
use std::path::{Path, PathBuf};

/// What limits each of several trees on its own.
///
/// A tree is a directory (project quotas), a subvolume (qgroups) or a dataset by its name (refquota). Limits are enforced
/// by the kernel: who writes more gets `EDQUOT` or `ENOSPC`.
pub trait Quota: Send + Sync {
    /// Limits the tree, instead of as it was limited before. Fails with `Unsupported` for what cannot be enforced here,
    /// with the mount option or flag that is missing.
    fn set(&self, tree: &Path, limits: Limits) -> Result<()>;

    /// What the tree takes and may take. Fails with `NotFound` if it is not counted.
    fn read(&self, tree: &Path) -> Result<State>;

    /// Ends counting and limiting the tree, which may be gone already.
    fn remove(&self, tree: &Path) -> Result<()>;

    /// All trees that are counted.
    fn list(&self) -> Result<Vec<(PathBuf, State)>>;
}

/// What a tree takes and may take.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct State {
    /// The kernel's own count, which may lag behind what was just written.
    pub used: Usage,
    /// What it may take.
    pub limits: Limits,
}
