//! Listing, naming and removing images.

use super::{
    Engine, events,
    find::{self, ImageRow},
    load::{chain_of, set_tag},
    mounts,
};
use crate::image::Reference;
use graphdriver_core::{DiffId, Digest, Error, ErrorKind, LayerId, Result, store};
use rusqlite::{Connection, Transaction, params};
use serde::Serialize;
use std::collections::{HashMap, HashSet};

/// One line of `graphdriver images`.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct ImageSummary {
    /// Name without tag; none for an image without names.
    pub repository: Option<String>,
    /// The tag.
    pub tag: Option<String>,
    /// Digest of the manifest it came with, if it came with one.
    pub digest: Option<Digest>,
    /// Its id.
    #[serde(rename = "ID")]
    pub id: Digest,
    /// RFC 3339, from its configuration.
    pub created: Option<String>,
    /// Bytes of all its layers on disk.
    pub size: u64,
}

/// One line of `graphdriver history`, the newest first.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct HistoryEntry {
    /// RFC 3339.
    pub created: Option<String>,
    /// The step that made the layer.
    pub created_by: String,
    /// Bytes on disk of the step's layer; 0 for a step without one.
    pub size: u64,
    /// What its author noted.
    pub comment: String,
    /// The layer it made.
    #[serde(rename = "DiffID")]
    pub diff_id: Option<DiffId>,
}

/// What a removal did, in order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub enum Removed {
    /// A name is gone.
    Untagged(String),
    /// An image is gone.
    Deleted(Digest),
}

impl Engine {
    /// All images, a line for each name; `all` adds unnamed ones that others were committed from.
    pub fn images(&self, all: bool) -> Result<Vec<ImageSummary>> {
        let sizes = self.layer_sizes()?;
        self.layers.store().read(|db| {
            let rows = find::images(db)?;
            let parents: HashSet<_> = rows.iter().filter_map(|row| row.parent).collect();
            let mut lines = Vec::new();
            for row in rows {
                let tags = find::tags(db, &row.id)?;
                if tags.is_empty() && !all && parents.contains(&row.id) {
                    continue;
                }
                let size = chain_of(db, row.top)?.iter().map(|id| sizes.get(id).copied().unwrap_or(0)).sum();
                lines.extend(summaries(&row, &tags, size));
            }
            Ok(lines)
        })
    }

    /// The bytes on disk of each committed layer.
    pub(super) fn layer_sizes(&self) -> Result<HashMap<LayerId, u64>> {
        let layers = self.layers.list()?;
        Ok(layers.into_iter().map(|l| (l.id, l.usage.unwrap_or_default().bytes)).collect())
    }

    /// How the image came to be, the newest step first.
    pub fn history(&self, image: &str) -> Result<Vec<HistoryEntry>> {
        let sizes = self.layer_sizes()?;
        self.layers.store().read(|db| {
            let row = find::image(db, image)?;
            let mut layers = chain_of(db, row.top)?;
            layers.reverse();
            let made: HashMap<_, _> = row.config.diff_ids().iter().zip(layers).collect();
            let size = |diff: &DiffId| made.get(diff).and_then(|id| sizes.get(id)).copied().unwrap_or(0);
            let steps = row.config.steps().map(|(step, diff)| HistoryEntry {
                created: step.created().clone(),
                created_by: step.created_by().clone().unwrap_or_default(),
                size: diff.as_ref().map_or(0, size),
                comment: step.comment().clone().unwrap_or_default(),
                diff_id: diff,
            });
            let mut lines: Vec<_> = steps.collect();
            // Layers no step tells of: some builders write no history.
            let told = lines.iter().filter(|line| line.diff_id.is_some()).count();
            lines.extend(row.config.diff_ids().iter().skip(told).map(|diff| HistoryEntry {
                created: None,
                created_by: String::new(),
                size: size(diff),
                comment: String::new(),
                diff_id: Some(*diff),
            }));
            lines.reverse();
            Ok(lines)
        })
    }

    /// Gives the image another name, taking it from whatever had it.
    pub fn tag(&self, image: &str, name: &Reference) -> Result<()> {
        self.layers.store().write(|tx| {
            let row = find::image(tx, image)?;
            set_tag(tx, name, &row.id)
        })
    }

    /// Removes a name, and the image with its last one; given by id, the image with all its names. Refused while a
    /// container or a mount uses it, except that with `force` the names go and the image stays.
    pub fn remove_image(&self, what: &str, force: bool) -> Result<Vec<Removed>> {
        self.reconcile_mounts()?;
        let removed = self.layers.store().write(|tx| {
            let row = find::image(tx, what)?;
            let tags = find::tags(tx, &row.id)?;
            let by_name = what.parse::<Reference>().ok().map(|name| name.to_string()).filter(|n| tags.contains(n));
            match by_name {
                Some(name) if tags.len() > 1 => untag(tx, &row, &[name]),
                None if tags.len() > 1 && !force => Err(Error::new(
                    ErrorKind::Busy,
                    format!("image {} has several names: {}", row.id.short(), tags.join(", ")),
                )
                .hint("remove them by name, or all with -f")),
                _ => match users(tx, &row)? {
                    None => {
                        let mut done = untag(tx, &row, &tags)?;
                        done.push(self.delete_image(tx, &row)?);
                        Ok(done)
                    }
                    Some(_) if force => untag(tx, &row, &tags),
                    Some(user) => {
                        Err(Error::new(ErrorKind::Busy, format!("image {} is used by {user}", row.id.short()))
                            .hint("remove that first, or only the image's names with -f"))
                    }
                },
            }
        })?;
        self.layers.sweep()?;
        Ok(removed)
    }

    /// Removes unnamed images that nothing uses; with `all` also named ones.
    pub fn prune_images(&self, all: bool) -> Result<Vec<Removed>> {
        self.reconcile_mounts()?;
        let removed = self.layers.store().write(|tx| {
            let mut removed = Vec::new();
            // An image that another one was committed from becomes removable with it.
            loop {
                let rows = find::images(tx)?;
                let parents: HashSet<_> = rows.iter().filter_map(|row| row.parent).collect();
                let before = removed.len();
                for row in rows {
                    let tags = find::tags(tx, &row.id)?;
                    let unwanted = tags.is_empty() && !parents.contains(&row.id) || all;
                    if unwanted && users(tx, &row)?.is_none() {
                        removed.extend(untag(tx, &row, &tags)?);
                        removed.push(self.delete_image(tx, &row)?);
                    }
                }
                if removed.len() == before {
                    return Ok(removed);
                }
            }
        })?;
        self.layers.sweep()?;
        Ok(removed)
    }

    fn delete_image(&self, tx: &Transaction<'_>, row: &ImageRow) -> Result<Removed> {
        tx.execute("DELETE FROM images WHERE id = ?", [row.id])?;
        events::record(tx, "image", "delete", &row.id.to_string(), &[])?;
        self.release_chain(tx, row.top)?;
        Ok(Removed::Deleted(row.id))
    }

    /// Removes layers that nothing refers to any more although no removal took them: somebody was building on them then,
    /// and gave up or was killed later.
    pub(super) fn release_unused(&self) -> Result<()> {
        if self.layers.store().read(unused_layers)?.is_empty() {
            return Ok(());
        }
        self.layers
            .store()
            .write(|tx| unused_layers(tx)?.into_iter().try_for_each(|id| self.release_chain(tx, Some(id))))?;
        self.layers.sweep().map(drop)
    }

    /// Removes the layers from `top` down that nothing refers to any more.
    pub(super) fn release_chain(&self, tx: &Transaction<'_>, top: Option<LayerId>) -> Result<()> {
        for layer in chain_of(tx, top)? {
            if is_used(tx, layer)? {
                break;
            }
            self.layers.remove_in(tx, layer)?;
        }
        Ok(())
    }
}

const UNUSED: &str = "SELECT id FROM visible_layers AS l
    WHERE NOT EXISTS (SELECT 1 FROM layers WHERE parent = l.id)
    AND NOT EXISTS (SELECT 1 FROM images WHERE top = l.id)
    AND NOT EXISTS (SELECT 1 FROM containers WHERE layer = l.id)
    AND NOT EXISTS (SELECT 1 FROM mounts WHERE layer = l.id)
    AND NOT EXISTS (SELECT 1 FROM snapshots WHERE layer = l.id)";

/// Layers that nothing refers to.
pub(super) fn unused_layers(db: &Connection) -> Result<Vec<LayerId>> {
    let mut rows = db.prepare(UNUSED)?;
    Ok(rows.query_map([], |r| r.get(0))?.collect::<rusqlite::Result<_>>()?)
}

fn is_used(db: &Connection, layer: LayerId) -> Result<bool> {
    if !store::children(db, layer)?.is_empty() {
        return Ok(true);
    }
    let sql = "SELECT EXISTS (SELECT 1 FROM images WHERE top = ?1)
               OR EXISTS (SELECT 1 FROM containers WHERE layer = ?1)
               OR EXISTS (SELECT 1 FROM mounts WHERE layer = ?1)
               OR EXISTS (SELECT 1 FROM snapshots WHERE layer = ?1)";
    Ok(db.query_row(sql, [layer], |r| r.get(0))?)
}

fn untag(tx: &Transaction<'_>, row: &ImageRow, names: &[String]) -> Result<Vec<Removed>> {
    for name in names {
        tx.execute("DELETE FROM tags WHERE name = ?", [name])?;
        events::record(tx, "image", "untag", &row.id.to_string(), &[("name", name)])?;
    }
    Ok(names.iter().cloned().map(Removed::Untagged).collect())
}

/// A container or a mount that needs the image, in words.
fn users(db: &Connection, row: &ImageRow) -> Result<Option<String>> {
    let mut names = db.prepare_cached("SELECT name FROM containers WHERE image = ? ORDER BY name LIMIT 1")?;
    if let Some(name) = names.query_map(params![row.id], |r| r.get::<_, String>(0))?.next() {
        return Ok(Some(format!("container {}", name?)));
    }
    Ok(mounts::of_object(db, &row.id.to_string())?.first().map(|m| format!("the mount at {}", m.target.display())))
}

fn summaries(row: &ImageRow, tags: &[String], size: u64) -> Vec<ImageSummary> {
    let line = |name: Option<&String>| {
        let split = name.and_then(|name| name.rsplit_once(':'));
        ImageSummary {
            repository: split.map(|(repository, _)| repository.into()),
            tag: split.map(|(_, tag)| tag.into()),
            digest: row.manifest,
            id: row.id,
            created: row.config.created().map(|t| t.to_string()),
            size,
        }
    };
    match tags {
        [] => vec![line(None)],
        tags => tags.iter().map(|tag| line(Some(tag))).collect(),
    }
}
