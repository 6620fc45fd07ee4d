//! The rows of snapshots: what is asked and changed within a transaction.

use super::super::now;
use graphdriver_core::{Error, ErrorKind, LayerId, Result, store::LayerKind};
use rusqlite::{Connection, Row, Transaction, params, types::Type};
use serde::Serialize;
use std::collections::{BTreeMap, HashSet};

/// What containerd calls a snapshot's labels.
pub type Labels = BTreeMap<String, String>;

/// A snapshot: a layer under a name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Snapshot {
    /// containerd's key while it is active or a view, its name once it is committed: one space for both.
    pub name: String,
    /// The layer.
    pub layer: LayerId,
    /// What may be done with it.
    pub kind: LayerKind,
    /// The committed snapshot it lies on.
    pub parent: Option<String>,
    /// Nanoseconds since 1970; RFC 3339 in JSON. Committing makes it new, as with containerd's own.
    #[serde(serialize_with = "super::super::rfc3339")]
    pub created: i64,
    /// The same of the last change to its labels.
    #[serde(serialize_with = "super::super::rfc3339")]
    pub updated: i64,
    /// Whatever containerd wants to remember.
    pub labels: Labels,
    /// Users and groups, `INSIDE:OUTSIDE:COUNT[,...] INSIDE:OUTSIDE:COUNT[,...]`, if its mounts map ids.
    pub id_maps: Option<String>,
}

const SELECT: &str =
    "SELECT s.name, s.layer, l.kind, p.name, s.created, s.updated, s.labels, s.id_maps FROM snapshots s
    JOIN layers l ON l.id = s.layer LEFT JOIN snapshots p ON p.layer = l.parent";

fn snapshot(row: &Row<'_>) -> rusqlite::Result<Snapshot> {
    let labels: String = row.get(6)?;
    let labels = serde_json::from_str(&labels)
        .map_err(|e| rusqlite::Error::FromSqlConversionFailure(6, Type::Text, Box::new(e)))?;
    Ok(Snapshot {
        name: row.get(0)?,
        layer: row.get(1)?,
        kind: row.get(2)?,
        parent: row.get(3)?,
        created: row.get(4)?,
        updated: row.get(5)?,
        labels,
        id_maps: row.get(7)?,
    })
}

/// All of them by their names.
pub(in crate::engine) fn all(db: &Connection) -> Result<Vec<Snapshot>> {
    let mut rows = db.prepare_cached(&format!("{SELECT} ORDER BY s.name"))?;
    Ok(rows.query_map([], snapshot)?.collect::<rusqlite::Result<_>>()?)
}

/// Those of these layers.
pub(super) fn of_layers(db: &Connection, layers: &[LayerId]) -> Result<Vec<Snapshot>> {
    let mut rows = db.prepare_cached(&format!("{SELECT} WHERE s.layer = ?1"))?;
    let mut all = Vec::new();
    for layer in layers {
        all.extend(rows.query_map([layer], snapshot)?.collect::<rusqlite::Result<Vec<_>>>()?);
    }
    Ok(all)
}

/// How many there are.
pub(in crate::engine) fn count(db: &Connection) -> Result<usize> {
    let count: i64 = db.query_row("SELECT count(*) FROM snapshots", [], |row| row.get(0))?;
    Ok(count as usize)
}

fn find(db: &Connection, name: &str) -> Result<Option<Snapshot>> {
    let mut rows = db.prepare_cached(&format!("{SELECT} WHERE s.name = ?1"))?;
    let mut found = rows.query_map([name], snapshot)?;
    Ok(found.next().transpose()?)
}

pub(in crate::engine) fn get(db: &Connection, name: &str) -> Result<Snapshot> {
    let missing = || Error::new(ErrorKind::NotFound, format!("there is no snapshot {name:?}"));
    find(db, name)?.ok_or_else(missing)
}

pub(super) fn refuse_taken(db: &Connection, name: &str) -> Result<()> {
    match find(db, name)? {
        Some(_) => Err(Error::new(ErrorKind::AlreadyExists, format!("there is a snapshot {name:?} already"))),
        None => Ok(()),
    }
}

/// The layer of a snapshot that others may lie on.
pub(super) fn committed(db: &Connection, name: &str) -> Result<LayerId> {
    let parent = get(db, name)?;
    match parent.kind {
        LayerKind::Committed => Ok(parent.layer),
        _ => Err(Error::new(ErrorKind::InvalidInput, format!("the parent {name:?} is not committed"))),
    }
}

pub(super) fn insert(
    tx: &Transaction<'_>,
    name: &str,
    layer: LayerId,
    labels: &Labels,
    id_maps: Option<&str>,
) -> Result<()> {
    let sql = "INSERT INTO snapshots (name, layer, created, updated, labels, id_maps) VALUES (?1, ?2, ?3, ?3, ?4, ?5)";
    tx.prepare_cached(sql)?.execute(params![name, layer, now(), text(labels), id_maps])?;
    Ok(())
}

/// The layers that id-mapped mounts show.
pub(super) fn id_mapped(db: &Connection) -> Result<HashSet<LayerId>> {
    let mut rows = db.prepare_cached("SELECT layer FROM snapshots WHERE id_maps IS NOT NULL")?;
    Ok(rows.query_map([], |row| row.get(0))?.collect::<rusqlite::Result<_>>()?)
}

/// From `key` to `name`, with these labels and no others, shown as it is on disk. Whether there was a `key`.
pub(super) fn rename(tx: &Transaction<'_>, key: &str, name: &str, labels: &Labels) -> Result<bool> {
    let sql = "UPDATE snapshots SET name = ?2, created = ?3, updated = ?3, labels = ?4, id_maps = NULL
        WHERE name = ?1";
    Ok(tx.prepare_cached(sql)?.execute(params![key, name, now(), text(labels)])? > 0)
}

pub(super) fn set_labels(tx: &Transaction<'_>, name: &str, labels: &Labels) -> Result<()> {
    let sql = "UPDATE snapshots SET updated = ?2, labels = ?3 WHERE name = ?1";
    tx.prepare_cached(sql)?.execute(params![name, now(), text(labels)])?;
    Ok(())
}

pub(super) fn delete(tx: &Transaction<'_>, name: &str) -> Result<()> {
    tx.prepare_cached("DELETE FROM snapshots WHERE name = ?1")?.execute([name])?;
    Ok(())
}

/// Without empty ones, which containerd's own store does not keep either.
fn text(labels: &Labels) -> String {
    let kept: BTreeMap<_, _> = labels.iter().filter(|(_, value)| !value.is_empty()).collect();
    serde_json::to_string(&kept).expect("strings serialise")
}
