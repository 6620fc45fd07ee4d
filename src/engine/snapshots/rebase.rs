//! Commits that name the parent: containerd from 2.2 on prepares the snapshots of an image without one, fills them all at
//! once, and puts each on its parent when it commits it ("rebase").

use super::{Snapshot, Snapshots, phrase, row};
use graphdriver_core::{Access, Error, ErrorKind, LayerId, Result, store::LayerKind};
use rusqlite::Connection;

impl Snapshots {
    /// Whether an active snapshot that is to be committed on another parent than its own can be. Fails as containerd's
    /// snapshotters do, and with `Unsupported` where what was written to it does not tell what is deleted of the parent's.
    pub(super) fn may_rebase(&self, active: &Snapshot, parent: &str) -> Result<()> {
        if let Some(own) = &active.parent {
            let why = format!("it was prepared on {own:?} and cannot be committed on {parent:?}");
            return Err(Error::new(ErrorKind::InvalidInput, why).hint("commit it without a parent, or on its own"));
        }
        let layers = &self.engine.layers;
        layers.store().read(|db| committed(db, parent))?;
        // Who unpacks a tar into it puts whiteouts into the upper directory of an overlay only, and where he may make devices.
        let recipe = layers.mount(active.layer, Access::ReadOnly)?;
        let tells_deletions = |mount: &graphdriver_core::Mount| {
            mount.fstype == "overlay" && !mount.options.iter().any(|option| option == "userxattr")
        };
        if layers.driver().capabilities().independent_layers && recipe.iter().all(tells_deletions) {
            return Ok(());
        }
        let why = format!(
            "with the storage driver {} a snapshot gets its parent when it is prepared",
            layers.driver().name()
        );
        Err(Error::new(ErrorKind::Unsupported, why)
            .hint("take the capability rebase out of this proxy plugin's entry in containerd's configuration"))
    }
}

/// The layer of the snapshot that another is committed on.
pub(super) fn committed(db: &Connection, name: &str) -> Result<LayerId> {
    let parent = row::get(db, name)?;
    match parent.kind {
        LayerKind::Committed => Ok(parent.layer),
        kind => Err(Error::new(ErrorKind::Busy, format!("the parent {name:?} is not committed but {}", phrase(kind)))),
    }
}
