//! What is done to datasets and snapshots: through the `zfs` command, or through libzfs_core.

use graphdriver_core::Result;
use graphdriver_quota::refquota::zfs;

/// Datasets and snapshots by their full names. Each call is one synchronous operation of ZFS, durable when it returns.
pub(crate) trait Storage: Send + Sync {
    /// Makes a clone of a snapshot.
    fn clone(&self, origin: &str, name: &str) -> Result<()>;

    /// Makes a snapshot.
    fn snapshot(&self, name: &str) -> Result<()>;

    /// Gives a dataset another name.
    fn rename(&self, from: &str, to: &str) -> Result<()>;

    /// Destroys a dataset with its snapshots and what somebody made below it, these first. `Busy` if one of them is
    /// mounted or has clones.
    fn destroy(&self, dataset: &str) -> Result<()>;

    /// For `status`.
    fn describe(&self) -> &'static str;
}

/// The way this build goes.
pub(crate) fn storage() -> Result<Box<dyn Storage>> {
    #[cfg(feature = "zfs-core")]
    return crate::library::Library::open().map(|library| Box::new(library) as Box<dyn Storage>);
    #[cfg(not(feature = "zfs-core"))]
    return Ok(Box::new(Program));
}

/// The `zfs` command.
#[cfg_attr(feature = "zfs-core", allow(dead_code, reason = "the other of the two"))]
#[derive(Debug)]
pub(crate) struct Program;

impl Storage for Program {
    fn clone(&self, origin: &str, name: &str) -> Result<()> {
        zfs(&["clone", origin, name]).map(drop)
    }

    fn snapshot(&self, name: &str) -> Result<()> {
        zfs(&["snapshot", name]).map(drop)
    }

    fn rename(&self, from: &str, to: &str) -> Result<()> {
        zfs(&["rename", "-u", from, to]).map(drop)
    }

    fn destroy(&self, dataset: &str) -> Result<()> {
        zfs(&["destroy", "-r", dataset]).map(drop)
    }

    fn describe(&self) -> &'static str {
        "the zfs command"
    }
}
