//! The rows of layers: what is asked and changed within a transaction.

use super::Schema;
use crate::{ByteSize, ChainId, Context, DiffId, Error, ErrorKind, LayerId, Result, Usage};
use rusqlite::{
    Connection, OptionalExtension, Params, Row, ToSql, Transaction, params,
    types::{FromSql, FromSqlError, FromSqlResult, ToSqlOutput, ValueRef},
};
use serde::Serialize;
use std::{collections::BTreeMap, fmt, str::FromStr};

pub(super) const SCHEMA: Schema = Schema {
    component: "layers",
    steps: &["
        CREATE TABLE layers(
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            kind TEXT NOT NULL CHECK (kind IN ('active', 'view', 'committed')),
            parent INTEGER REFERENCES layers(id),
            diff_id TEXT,
            chain_id TEXT,
            tar_size INTEGER,
            usage_bytes INTEGER,
            usage_inodes INTEGER,
            size_limit INTEGER,
            created INTEGER NOT NULL
        ) STRICT;
        CREATE INDEX layers_parent ON layers(parent);
        CREATE INDEX layers_chain_id ON layers(chain_id);
        CREATE TABLE layer_labels(
            layer INTEGER NOT NULL REFERENCES layers(id) ON DELETE CASCADE,
            name TEXT NOT NULL,
            value TEXT NOT NULL,
            PRIMARY KEY (layer, name)
        ) STRICT, WITHOUT ROWID;
        CREATE TABLE layer_intents(
            layer INTEGER PRIMARY KEY REFERENCES layers(id) ON DELETE CASCADE,
            op TEXT NOT NULL CHECK (op IN ('create', 'remove', 'commit')),
            session TEXT NOT NULL
        ) STRICT;
        CREATE VIEW visible_layers AS SELECT * FROM layers
            WHERE id NOT IN (SELECT layer FROM layer_intents WHERE op <> 'commit');
    "],
};

/// What may be done with a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LayerKind {
    /// Writable.
    Active,
    /// Read-only, never committed.
    View,
    /// Immutable; only committed layers have children.
    Committed,
}

impl LayerKind {
    /// As it follows "the layer is".
    pub fn phrase(self) -> &'static str {
        match self {
            LayerKind::Active => "active",
            LayerKind::View => "a view",
            LayerKind::Committed => "committed",
        }
    }
}

impl fmt::Display for LayerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            LayerKind::Active => "active",
            LayerKind::View => "view",
            LayerKind::Committed => "committed",
        })
    }
}

impl FromStr for LayerKind {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        match s {
            "active" => Ok(LayerKind::Active),
            "view" => Ok(LayerKind::View),
            "committed" => Ok(LayerKind::Committed),
            _ => {
                let reason = format!("{s:?} is no kind of layer; there are active, view and committed");
                Err(Error::new(ErrorKind::InvalidInput, reason))
            }
        }
    }
}

impl ToSql for LayerKind {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(self.to_string().into())
    }
}

impl FromSql for LayerKind {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
        value.as_str()?.parse().map_err(FromSqlError::other)
    }
}

/// A layer as the store knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Layer {
    /// Its number.
    pub id: LayerId,
    /// What may be done with it.
    pub kind: LayerKind,
    /// The committed layer it lies on.
    pub parent: Option<LayerId>,
    /// The digest of its uncompressed tar, if it was ever made or read.
    pub diff_id: Option<DiffId>,
    /// The identity of its chain, if the DiffIDs of the whole chain are known.
    pub chain_id: Option<ChainId>,
    /// Bytes of its uncompressed tar.
    pub tar_size: Option<u64>,
    /// The space it takes; of committed layers only.
    pub usage: Option<Usage>,
    /// The most that may be written to it.
    pub size_limit: Option<ByteSize>,
    /// When it was created, in nanoseconds since 1970.
    pub created: i64,
    /// Whatever the caller wants to remember.
    pub labels: BTreeMap<String, String>,
}

/// The layer. `NotFound` while it is being made, and once it is being removed.
pub fn get(conn: &Connection, id: LayerId) -> Result<Layer> {
    let found = select(conn, "visible_layers", "WHERE id = ?1", [id])?.pop();
    found.ok_or_else(|| no_layer(id))
}

/// All layers by their numbers, without those being made or removed.
pub fn list(conn: &Connection) -> Result<Vec<Layer>> {
    select(conn, "visible_layers", "ORDER BY id", [])
}

/// The layer and its ancestors, topmost first. Also of a layer being made.
pub fn chain(conn: &Connection, id: LayerId) -> Result<Vec<LayerId>> {
    let sql = "WITH RECURSIVE up(id, parent, height) AS (
            SELECT id, parent, 0 FROM layers WHERE id = ?1
            UNION ALL SELECT l.id, l.parent, up.height + 1 FROM layers l JOIN up ON l.id = up.parent
        ) SELECT id FROM up ORDER BY height";
    let chain = ids(conn, sql, [id])?;
    if chain.is_empty() { Err(no_layer(id)) } else { Ok(chain) }
}

/// The layer's ancestors, topmost first. Also of a layer being made.
pub fn parents(conn: &Connection, id: LayerId) -> Result<Vec<LayerId>> {
    let mut chain = chain(conn, id)?;
    chain.remove(0);
    Ok(chain)
}

/// The committed layer with this chain, if there is one; the oldest, if there are several.
pub fn by_chain(conn: &Connection, chain: ChainId) -> Result<Option<LayerId>> {
    let sql = "SELECT id FROM visible_layers WHERE chain_id = ?1 ORDER BY id LIMIT 1";
    Ok(conn.prepare_cached(sql)?.query_row([chain], |row| row.get(0)).optional()?)
}

/// The layers that lie directly on this one, without those being removed, but with those being made.
pub fn children(conn: &Connection, id: LayerId) -> Result<Vec<LayerId>> {
    let sql = "SELECT id FROM layers WHERE parent = ?1
        AND id NOT IN (SELECT layer FROM layer_intents WHERE op = 'remove') ORDER BY id";
    ids(conn, sql, [id])
}

/// Replaces the labels of a layer, which may be one being made.
pub fn set_labels(tx: &Transaction<'_>, id: LayerId, labels: &BTreeMap<String, String>) -> Result<()> {
    row(tx, id)?;
    tx.prepare_cached("DELETE FROM layer_labels WHERE layer = ?1")?.execute([id])?;
    let mut insert = tx.prepare_cached("INSERT INTO layer_labels(layer, name, value) VALUES (?1, ?2, ?3)")?;
    for (name, value) in labels {
        insert.execute(params![id, name, value])?;
    }
    Ok(())
}

/// What is being done to a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Op {
    Create,
    Remove,
    Commit,
}

impl Op {
    fn name(self) -> &'static str {
        match self {
            Op::Create => "create",
            Op::Remove => "remove",
            Op::Commit => "commit",
        }
    }
}

/// A layer, visible or being made, with what is being done to it.
pub(super) fn row(conn: &Connection, id: LayerId) -> Result<(Layer, Option<Op>)> {
    let layer = select(conn, "layers", "WHERE id = ?1", [id])?.pop().ok_or_else(|| no_layer(id))?;
    let sql = "SELECT op FROM layer_intents WHERE layer = ?1";
    let op: Option<String> = conn.prepare_cached(sql)?.query_row([id], |row| row.get(0)).optional()?;
    match op.as_deref() {
        None => Ok((layer, None)),
        Some("create") => Ok((layer, Some(Op::Create))),
        Some("commit") => Ok((layer, Some(Op::Commit))),
        Some(_) => Err(no_layer(id)),
    }
}

pub(super) fn insert(
    tx: &Transaction<'_>,
    kind: LayerKind,
    parent: Option<LayerId>,
    size_limit: Option<ByteSize>,
    created: i64,
) -> Result<LayerId> {
    let sql = "INSERT INTO layers(kind, parent, size_limit, created) VALUES (?1, ?2, ?3, ?4) RETURNING id";
    Ok(tx.prepare_cached(sql)?.query_row(params![kind, parent, size_limit, created], |row| row.get(0))?)
}

pub(super) fn add_intent(tx: &Transaction<'_>, id: LayerId, op: Op, session: &str) -> Result<()> {
    let sql = "INSERT INTO layer_intents(layer, op, session) VALUES (?1, ?2, ?3)";
    tx.prepare_cached(sql)?.execute(params![id, op.name(), session])?;
    Ok(())
}

/// Whether there was such an intent.
pub(super) fn drop_intent(tx: &Transaction<'_>, id: LayerId, op: Op) -> Result<bool> {
    let sql = "DELETE FROM layer_intents WHERE layer = ?1 AND op = ?2";
    Ok(tx.prepare_cached(sql)?.execute(params![id, op.name()])? > 0)
}

/// Turns the creation of a layer that was not kept into its removal. Whether there was such an intent.
pub(super) fn undo_creation(tx: &Transaction<'_>, id: LayerId) -> Result<bool> {
    let sql = "UPDATE layer_intents SET op = 'remove' WHERE layer = ?1 AND op = 'create'";
    Ok(tx.prepare_cached(sql)?.execute([id])? > 0)
}

/// The sessions that have intents.
pub(super) fn sessions(conn: &Connection) -> Result<Vec<String>> {
    let mut query = conn.prepare("SELECT DISTINCT session FROM layer_intents")?;
    Ok(query.query_map([], |row| row.get(0))?.collect::<Result<_, _>>()?)
}

/// Whether a session has any.
pub(super) fn has_intents(conn: &Connection, session: &str) -> Result<bool> {
    Ok(conn.prepare_cached("SELECT 1 FROM layer_intents WHERE session = ?1")?.exists([session])?)
}

/// The layers that a session is committing.
pub(super) fn commits(conn: &Connection, session: &str) -> Result<Vec<LayerId>> {
    ids(conn, "SELECT layer FROM layer_intents WHERE session = ?1 AND op = 'commit'", [session])
}

/// Takes over the intents of a dead session, to undo what it was doing. How many layers are to be removed by that.
pub(super) fn adopt(tx: &Transaction<'_>, dead: &str, session: &str) -> Result<u64> {
    tx.execute("DELETE FROM layer_intents WHERE session = ?1 AND op = 'commit'", [dead])?;
    let sql = "UPDATE layer_intents SET session = ?2, op = 'remove' WHERE session = ?1";
    Ok(tx.execute(sql, [dead, session])? as u64)
}

/// The layers that a session has to remove, with their parents and how many rows name them as their parent.
pub(super) fn removals(conn: &Connection, session: &str) -> Result<Vec<(LayerId, Option<LayerId>, u64)>> {
    let sql = "SELECT l.id, l.parent, (SELECT count(*) FROM layers c WHERE c.parent = l.id)
        FROM layer_intents i JOIN layers l ON l.id = i.layer WHERE i.session = ?1 AND i.op = 'remove'";
    let mut query = conn.prepare_cached(sql)?;
    let rows = query.query_map([session], |row| Ok((row.get(0)?, row.get(1)?, row.get::<_, ByteSize>(2)?.0)))?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// With its labels and intents.
pub(super) fn delete(tx: &Transaction<'_>, id: LayerId) -> Result<()> {
    tx.prepare_cached("DELETE FROM layers WHERE id = ?1")?.execute([id])?;
    Ok(())
}

/// Whether the store has such a number, visible or not.
pub(super) fn exists(conn: &Connection, id: LayerId) -> Result<bool> {
    Ok(conn.prepare_cached("SELECT 1 FROM layers WHERE id = ?1")?.exists([id])?)
}

pub(super) fn set_parent(tx: &Transaction<'_>, id: LayerId, parent: LayerId) -> Result<()> {
    tx.prepare_cached("UPDATE layers SET parent = ?2 WHERE id = ?1")?.execute([id, parent])?;
    Ok(())
}

pub(super) fn set_size_limit(tx: &Transaction<'_>, id: LayerId, limit: Option<ByteSize>) -> Result<()> {
    tx.prepare_cached("UPDATE layers SET size_limit = ?2 WHERE id = ?1")?.execute(params![id, limit])?;
    Ok(())
}

/// The layer is committed from now on.
pub(super) fn freeze(tx: &Transaction<'_>, id: LayerId, info: &super::CommitInfo, usage: Usage) -> Result<()> {
    let sql = "UPDATE layers SET kind = 'committed', diff_id = ?2, tar_size = ?3, usage_bytes = ?4, usage_inodes = ?5
        WHERE id = ?1";
    let tar_size = info.tar_size.map(ByteSize);
    let (bytes, inodes) = (ByteSize(usage.bytes), ByteSize(usage.inodes));
    tx.prepare_cached(sql)?.execute(params![id, info.diff_id, tar_size, bytes, inodes])?;
    Ok(())
}

/// Works out the ChainID of a committed layer from its DiffID and its parent.
pub(super) fn set_chain(tx: &Transaction<'_>, id: LayerId) -> Result<()> {
    let (layer, _) = row(tx, id)?;
    let below = layer.parent.map(|parent| row(tx, parent)).transpose()?;
    let chain = match (layer.diff_id, below) {
        (Some(diff), None) => Some(ChainId::extend(None, diff)),
        (Some(diff), Some((below, _))) => below.chain_id.map(|below| ChainId::extend(Some(below), diff)),
        (None, _) => None,
    };
    tx.prepare_cached("UPDATE layers SET chain_id = ?2 WHERE id = ?1")?.execute(params![id, chain])?;
    Ok(())
}

pub(super) fn no_layer(id: LayerId) -> Error {
    Error::new(ErrorKind::NotFound, format!("there is no layer {id}"))
}

fn ids(conn: &Connection, sql: &str, params: impl Params) -> Result<Vec<LayerId>> {
    Ok(conn.prepare_cached(sql)?.query_map(params, |row| row.get(0))?.collect::<Result<_, _>>()?)
}

fn select(conn: &Connection, table: &str, rest: &str, params: impl Params) -> Result<Vec<Layer>> {
    let sql = format!(
        "SELECT id, kind, parent, diff_id, chain_id, tar_size, usage_bytes, usage_inodes, size_limit, created,
            (SELECT json_group_object(name, value) FROM layer_labels WHERE layer = id)
        FROM {table} {rest}"
    );
    let mut query = conn.prepare_cached(&sql)?;
    let rows = query.query_map(params, |row| Ok((layer(row)?, row.get::<_, String>(10)?)))?;
    rows.map(|row| {
        let (mut layer, labels) = row?;
        layer.labels = serde_json::from_str(&labels)
            .map_err(|e| Error::new(ErrorKind::Corrupt, e.to_string()))
            .doing(|| format!("reading the labels of layer {}", layer.id))?;
        Ok(layer)
    })
    .collect()
}

/// Everything but the labels.
fn layer(row: &Row<'_>) -> rusqlite::Result<Layer> {
    let size = |column| row.get::<_, Option<ByteSize>>(column).map(|size| size.map(|size| size.0));
    let usage = match (size(6)?, size(7)?) {
        (Some(bytes), Some(inodes)) => Some(Usage { bytes, inodes }),
        _ => None,
    };
    Ok(Layer {
        id: row.get(0)?,
        kind: row.get(1)?,
        parent: row.get(2)?,
        diff_id: row.get(3)?,
        chain_id: row.get(4)?,
        tar_size: size(5)?,
        usage,
        size_limit: row.get(8)?,
        created: row.get(9)?,
        labels: BTreeMap::new(),
    })
}
