//! Looking at the whole store, without changing it: rows, storage, records, mounts, and on demand every byte.

mod digests;
mod rows;
mod storage;

use super::{Engine, find, mounts, snapshots::row};
use graphdriver_core::{LayerId, Result};
use serde::Serialize;
use std::collections::{HashMap, HashSet};

/// What a look at the store has found.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Checked {
    /// How many layers there are.
    pub layers: usize,
    /// How many images.
    pub images: usize,
    /// How many containers.
    pub containers: usize,
    /// How many snapshots of containerd's.
    pub snapshots: usize,
    /// How many mounts the store remembers, and how many of snapshots are seen.
    pub mounts: usize,
    /// How many layers were read as a whole; none if that was not asked for.
    pub digests: Option<usize>,
    /// Whatever is wrong.
    pub findings: Vec<Finding>,
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Finding {
    /// How bad it is.
    pub kind: FindingKind,
    /// What is wrong, with what.
    pub what: String,
    /// What follows from it.
    pub consequence: String,
    /// What to do about it.
    pub remedy: String,
    /// The layer, if it is about one.
    pub layer: Option<LayerId>,
    /// Images, containers and snapshots that need the layer.
    pub needed_by: Vec<String>,
}

/// See [`Finding`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FindingKind {
    /// Something is lost or wrong.
    Damage,
    /// Something is there that nobody needs; it takes space, and goes.
    Leftover,
    /// Something is there that graphdriver did not put there.
    Alien,
}

impl Finding {
    pub(super) fn damage(what: impl Into<String>, consequence: &str, remedy: &str) -> Finding {
        Finding {
            kind: FindingKind::Damage,
            what: what.into(),
            consequence: consequence.into(),
            remedy: remedy.into(),
            layer: None,
            needed_by: Vec::new(),
        }
    }

    pub(super) fn leftover(what: impl Into<String>, remedy: &str) -> Finding {
        let kind = FindingKind::Leftover;
        Finding { kind, ..Finding::damage(what, "it takes space", remedy) }
    }

    fn of(self, layer: LayerId) -> Finding {
        Finding { layer: Some(layer), ..self }
    }
}

/// What to do about a layer that is lost.
const LOAD_AGAIN: &str = "remove what needs it, and load or pull its image again";

/// What frees what a crash left: whoever opens the store next.
const NEXT_COMMAND: &str = "nothing: the next command frees it, such as graphdriver info";

/// What frees the rest: the driver is asked to when somebody is found to have crashed, and after a boot.
const NEXT_RECOVERY: &str = "nothing: it is freed after the next boot or crash, or at once by removing the file `boot` \
                             beside store.db and running graphdriver info";

impl Engine {
    /// Looks at everything: the database, that each layer has its storage and the storage has nothing else, what `save`
    /// needs, and that recorded mounts are there. With `digests`, every layer whose digest is known is also read and
    /// compared with it.
    ///
    /// Changes nothing. Other commands may go on meanwhile: what they are doing is not found.
    pub fn check(&self, digests: bool) -> Result<Checked> {
        let broken = self.layers.integrity()?;
        let mut checked = self.count()?;
        if !broken.is_empty() {
            // What it says of layers could be anything.
            checked.findings = broken.into_iter().map(rows::broken_database).collect();
            return Ok(checked);
        }
        let first = self.look()?;
        // Another command may have been between a row and its storage. That passes.
        let second = if first.is_empty() { Vec::new() } else { self.look()? };
        checked.findings = first.into_iter().filter(|finding| second.contains(finding)).collect();
        if digests {
            let known: HashSet<_> = checked.findings.iter().filter_map(|finding| finding.layer).collect();
            let (read, found) = self.compare_digests(&known)?;
            checked.digests = Some(read);
            checked.findings.extend(found);
        }
        self.name_needers(&mut checked.findings)?;
        Ok(checked)
    }

    fn count(&self) -> Result<Checked> {
        // Rows that cannot be read are findings, not a reason to look no further.
        let seen = self.snapshot_mounts().map_or(0, |seen| seen.len());
        self.layers.store().read(|db| {
            let count = |table: &str| -> Result<usize> {
                Ok(db.query_row(&format!("SELECT count(*) FROM {table}"), [], |row| row.get::<_, i64>(0))? as usize)
            };
            Ok(Checked {
                layers: count("visible_layers")?,
                images: count("images")?,
                containers: count("containers")?,
                snapshots: count("snapshots")?,
                mounts: count("mounts")? + seen,
                digests: None,
                findings: Vec::new(),
            })
        })
    }

    fn look(&self) -> Result<Vec<Finding>> {
        let mut found = self.layers.store().read(rows::look)?;
        found.extend(self.look_at_storage()?);
        found.extend(mounts::look(self)?);
        Ok(found)
    }

    /// Says of each finding about a layer who needs it.
    fn name_needers(&self, findings: &mut [Finding]) -> Result<()> {
        if findings.iter().all(|finding| finding.layer.is_none()) {
            return Ok(());
        }
        let (layers, users) = self.layers.store().read(|db| {
            let mut users: Vec<(LayerId, String)> = Vec::new();
            for image in find::images(db).unwrap_or_default() {
                let name = find::tags(db, &image.id)?.into_iter().next().unwrap_or_else(|| image.id.short());
                users.extend(image.top.map(|top| (top, format!("image {name}"))));
            }
            users.extend(find::containers(db)?.into_iter().map(|row| (row.layer, format!("container {}", row.name))));
            users.extend(row::all(db)?.into_iter().map(|row| (row.layer, format!("snapshot {}", row.name))));
            Ok((graphdriver_core::store::list(db)?, users))
        })?;
        let parents: HashMap<_, _> = layers.into_iter().map(|layer| (layer.id, layer.parent)).collect();
        let chain = |top: LayerId| std::iter::successors(Some(top), |id| parents.get(id).copied().flatten());
        for finding in findings {
            let Some(layer) = finding.layer else { continue };
            let needers = users.iter().filter(|(top, _)| chain(*top).any(|id| id == layer));
            finding.needed_by = needers.map(|(_, name)| name.clone()).collect();
        }
        Ok(())
    }
}
