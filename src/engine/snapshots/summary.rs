//! What the command line tells of snapshots.

use super::{
    row::{self, Snapshot},
    sight,
};
use crate::engine::{Engine, MountSummary};
use graphdriver_core::{Access, Result, store::LayerKind};
use serde::Serialize;
use serde_json::{Value, json};

/// One snapshot in `graphdriver df -v`.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct SnapshotSpace {
    /// What is known of it.
    #[serde(flatten)]
    pub snapshot: Snapshot,
    /// The space that only it takes.
    pub size: u64,
    /// Whether it is seen mounted.
    pub mounted: bool,
}

/// What there is, for those who watch over it.
#[derive(Debug, Clone)]
pub struct Figures {
    /// The storage driver.
    pub driver: &'static str,
    /// Kind of layer, how many there are, and their bytes as far as they are committed.
    pub layers: Vec<(String, u64, u64)>,
    /// Mounts that are seen.
    pub mounts: usize,
    /// Bytes that only unused images take.
    pub reclaimable: u64,
    /// Bytes free in the data root.
    pub free: u64,
}

impl Engine {
    /// Counts, without measuring what is written to.
    pub fn figures(&self) -> Result<Figures> {
        let sql = "SELECT kind, count(*), coalesce(sum(usage_bytes), 0) FROM visible_layers GROUP BY kind";
        let layers = self.layers.store().read(|db| {
            let mut rows = db.prepare_cached(sql)?;
            let rows = rows
                .query_map([], |row| Ok((row.get(0)?, row.get::<_, i64>(1)? as u64, row.get::<_, i64>(2)? as u64)))?;
            Ok(rows.collect::<rusqlite::Result<_>>()?)
        })?;
        let space = rustix::fs::statvfs(&self.settings.data_root)?;
        Ok(Figures {
            driver: self.layers.driver().name(),
            layers,
            mounts: self.mounts()?.len(),
            reclaimable: self.images_reclaimable()?,
            free: space.f_bavail * space.f_frsize,
        })
    }

    /// All snapshots, measured.
    pub(in crate::engine) fn snapshot_space(&self) -> Result<Vec<SnapshotSpace>> {
        let all = self.layers.store().read(row::all)?;
        if all.is_empty() {
            return Ok(Vec::new());
        }
        let shown = sight::shown(self);
        let space = |snapshot: Snapshot| {
            let size = self.layers.usage(snapshot.layer)?.bytes;
            Ok(SnapshotSpace { size, mounted: shown.contains_key(&snapshot.layer), snapshot })
        };
        all.into_iter().map(space).collect()
    }

    /// The mounts of snapshots that are seen. Where a view is its parent's subvolume, device or dataset, what is mounted
    /// of it counts for the parent.
    pub(in crate::engine) fn snapshot_mounts(&self) -> Result<Vec<MountSummary>> {
        let all = self.layers.store().read(row::all)?;
        if all.is_empty() {
            return Ok(Vec::new());
        }
        let mut shown = sight::shown(self);
        let mut mounts = Vec::new();
        for snapshot in all {
            for mount in shown.remove(&snapshot.layer).unwrap_or_default() {
                mounts.push(MountSummary {
                    kind: "snapshot".into(),
                    id: snapshot.name.clone(),
                    name: snapshot.name.clone(),
                    target: mount.target,
                    writable: mount.writable,
                    created: snapshot.created,
                    foreign: mount.foreign,
                    dead: false,
                    detached: None,
                });
            }
        }
        Ok(mounts)
    }

    /// Everything about a snapshot.
    pub fn inspect_snapshot(&self, name: &str) -> Result<Value> {
        let found = self.layers.store().read(|db| row::get(db, name))?;
        let access = if found.kind == LayerKind::Active { Access::ReadWrite } else { Access::ReadOnly };
        let usage = self.layers.usage(found.layer)?;
        let limits = match found.kind {
            LayerKind::Active => self.layers.driver().limits(found.layer)?,
            _ => Default::default(),
        };
        let mut all = json!(found);
        all["Size"] = json!(usage.bytes);
        all["Inodes"] = json!(usage.inodes);
        all["SizeLimit"] = json!(limits.size);
        all["InodeLimit"] = json!(limits.inodes);
        all["GraphDriver"] = self.driver_json(Some(found.layer), access)?;
        Ok(all)
    }
}
