//! What containers may take, and changing that.

use super::{Engine, events, find};
use graphdriver_core::{ByteSize, Context, ErrorKind, Limits, Result};
use serde::Serialize;

/// One line of `graphdriver quota`.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct QuotaSummary {
    /// 64 hexadecimal digits.
    #[serde(rename = "ID")]
    pub id: String,
    /// The container's name.
    pub name: String,
    /// Bytes it takes on disk.
    pub size: u64,
    /// The most it may take; None: as much as there is.
    pub size_limit: Option<u64>,
    /// Inodes it takes.
    pub inodes: u64,
    /// The most it may take; None: as many as there are.
    pub inode_limit: Option<u64>,
}

/// What is to become of a container's limits: None leaves one as it is, `Some(None)` lifts it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LimitChange {
    /// Bytes.
    pub size: Option<Option<ByteSize>>,
    /// Inodes.
    pub inodes: Option<Option<u64>>,
}

impl Engine {
    /// What these containers take and may take; all of them, the newest first, if none is named. One that cannot be told of
    /// has its error; of all, those that are removed meanwhile are left out.
    pub fn quotas(&self, containers: &[String]) -> Result<Vec<Result<QuotaSummary>>> {
        let rows = self.layers.store().read(|db| match containers {
            [] => find::containers(db),
            named => named.iter().map(|what| find::container(db, what)).collect(),
        })?;
        let told = rows.into_iter().filter_map(|row| {
            let summary = self.quota_of(&row).doing(|| format!("looking at container {}", row.name));
            let is_gone = || {
                let found = self.layers.store().read(|db| find::container(db, &row.id));
                found.is_err_and(|e| e.kind() == ErrorKind::NotFound)
            };
            let left_out = summary.is_err() && containers.is_empty() && is_gone();
            (!left_out).then_some(summary)
        });
        Ok(told.collect())
    }

    fn quota_of(&self, row: &find::ContainerRow) -> Result<QuotaSummary> {
        let (used, limits) = (self.layers.usage(row.layer)?, self.layers.driver().limits(row.layer)?);
        Ok(QuotaSummary {
            id: row.id.clone(),
            name: row.name.clone(),
            size: used.bytes,
            size_limit: limits.size.map(|size| size.0),
            inodes: used.inodes,
            inode_limit: limits.inodes,
        })
    }

    /// Changes what the container, mounted or not, may take. What it takes already stays, also if that is more.
    pub fn change_limits(&self, container: &str, change: &LimitChange) -> Result<()> {
        let row = self.layers.store().read(|db| find::container(db, container))?;
        // One changes the size, another the inodes: neither may put back what the other has just changed.
        let _turn = self.layer_turn("limits.lock", row.layer, true)?;
        let now = self.layers.driver().limits(row.layer)?;
        let wanted = Limits { size: change.size.unwrap_or(now.size), inodes: change.inodes.unwrap_or(now.inodes) };
        let told = |limit: Option<u64>| limit.map_or("none".into(), |limit| limit.to_string());
        let (size, inodes) = (told(wanted.size.map(|size| size.0)), told(wanted.inodes));
        let attributes = [("name", row.name.as_str()), ("size", &size), ("inodes", &inodes)];
        let set = self
            .layers
            .set_limits(row.layer, wanted, |tx| events::record(tx, "container", "update", &row.id, &attributes));
        set.doing(|| format!("limiting container {}", row.name))
    }
}
