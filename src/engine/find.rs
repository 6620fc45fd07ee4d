//! From what users type to rows: names, ids and their prefixes.

use super::snapshots;
use crate::image::{ImageConfig, Reference};
use graphdriver_core::{Digest, Error, ErrorKind, LayerId, Result};
use rusqlite::{Connection, OptionalExtension, Row, types::Type};

/// An image as the store has it.
pub(super) struct ImageRow {
    pub id: Digest,
    pub config: ImageConfig,
    pub top: Option<LayerId>,
    pub parent: Option<Digest>,
    pub manifest: Option<Digest>,
    pub added: i64,
}

/// A container as the store has it.
#[derive(Clone)]
pub(super) struct ContainerRow {
    pub id: String,
    pub name: String,
    pub image: Digest,
    pub layer: LayerId,
    pub created: i64,
}

/// Either of the two, where a command takes both.
pub(super) enum Object {
    Image(Box<ImageRow>),
    Container(ContainerRow),
}

const IMAGE: &str = "SELECT id, config, top, parent, manifest, added FROM images";
const CONTAINER: &str = "SELECT id, name, image, layer, created FROM containers";

fn image_row(row: &Row<'_>) -> rusqlite::Result<ImageRow> {
    let raw: Vec<u8> = row.get(1)?;
    let config =
        ImageConfig::parse(raw).map_err(|e| rusqlite::Error::FromSqlConversionFailure(1, Type::Blob, Box::new(e)))?;
    Ok(ImageRow {
        id: row.get(0)?,
        config,
        top: row.get(2)?,
        parent: row.get(3)?,
        manifest: row.get(4)?,
        added: row.get(5)?,
    })
}

fn container_row(row: &Row<'_>) -> rusqlite::Result<ContainerRow> {
    Ok(ContainerRow {
        id: row.get(0)?,
        name: row.get(1)?,
        image: row.get(2)?,
        layer: row.get(3)?,
        created: row.get(4)?,
    })
}

/// All images, the newest first.
pub(super) fn images(db: &Connection) -> Result<Vec<ImageRow>> {
    let mut rows = db.prepare(&format!("{IMAGE} ORDER BY added DESC, id"))?;
    Ok(rows.query_map([], image_row)?.collect::<rusqlite::Result<_>>()?)
}

/// All containers, the newest first.
pub(super) fn containers(db: &Connection) -> Result<Vec<ContainerRow>> {
    let mut rows = db.prepare(&format!("{CONTAINER} ORDER BY created DESC, id"))?;
    Ok(rows.query_map([], container_row)?.collect::<rusqlite::Result<_>>()?)
}

/// The names of an image, sorted.
pub(super) fn tags(db: &Connection, image: &Digest) -> Result<Vec<String>> {
    let mut rows = db.prepare_cached("SELECT name FROM tags WHERE image = ? ORDER BY name")?;
    Ok(rows.query_map([image], |r| r.get(0))?.collect::<rusqlite::Result<_>>()?)
}

/// The image of this very id.
pub(super) fn image_by_id(db: &Connection, id: &Digest) -> Result<Option<ImageRow>> {
    Ok(db.query_row(&format!("{IMAGE} WHERE id = ?"), [id], image_row).optional()?)
}

/// The image a name, an id or the beginning of an id stands for.
pub(super) fn image(db: &Connection, what: &str) -> Result<ImageRow> {
    if let Ok(name) = what.parse::<Reference>() {
        let sql = format!("{IMAGE} WHERE id = (SELECT image FROM tags WHERE name = ?)");
        if let Some(row) = db.query_row(&sql, [name.to_string()], image_row).optional()? {
            return Ok(row);
        }
    }
    let hex = what.strip_prefix("sha256:").unwrap_or(what);
    let found = by_prefix(db, "images", "sha256:", hex)?;
    match found.as_slice() {
        [one] => Ok(db.query_row(&format!("{IMAGE} WHERE id = ?"), [one], image_row)?),
        [] => Err(Error::new(ErrorKind::NotFound, format!("there is no image {what:?}"))
            .hint(containerds(db, what).unwrap_or("`graphdriver images` lists what there is".into()))),
        several => Err(ambiguous("image", what, several)),
    }
}

/// The container a name, an id or the beginning of an id stands for.
pub(super) fn container(db: &Connection, what: &str) -> Result<ContainerRow> {
    let sql = format!("{CONTAINER} WHERE name = ?1 OR id = ?1");
    if let Some(row) = db.query_row(&sql, [what], container_row).optional()? {
        return Ok(row);
    }
    let found = by_prefix(db, "containers", "", what)?;
    match found.as_slice() {
        [one] => Ok(db.query_row(&sql, [one], container_row)?),
        [] => {
            let hint = match image(db, what) {
                Ok(_) => "that is an image: make a container of it with `graphdriver create`".into(),
                Err(_) => containerds(db, what).unwrap_or("`graphdriver ps` lists what there is".into()),
            };
            Err(Error::new(ErrorKind::NotFound, format!("there is no container {what:?}")).hint(hint))
        }
        several => Err(ambiguous("container", what, several)),
    }
}

/// What to do about the name of a snapshot, which only containerd gives and removes.
fn containerds(db: &Connection, what: &str) -> Option<String> {
    let ways = "use ctr; `graphdriver inspect --type snapshot` tells of it";
    snapshots::row::get(db, what).ok().map(|_| format!("that is a snapshot of containerd's: {ways}"))
}

/// Fails if the container was removed since `row` was read: its tree then went while it was looked at.
pub(super) fn refuse_removed(db: &Connection, row: &ContainerRow) -> Result<()> {
    match db.query_row("SELECT 1 FROM containers WHERE id = ?", [&row.id], |_| Ok(())).optional()? {
        Some(()) => Ok(()),
        None => Err(Error::new(ErrorKind::NotFound, format!("container {} has just been removed", row.name))),
    }
}

/// A container or else an image of that name; a container's name wins.
pub(super) fn object(db: &Connection, what: &str) -> Result<Object> {
    match container(db, what) {
        Err(e) if e.kind() == ErrorKind::NotFound => {}
        other => return other.map(Object::Container),
    }
    match image(db, what) {
        Err(e) if e.kind() == ErrorKind::NotFound => {
            Err(Error::new(ErrorKind::NotFound, format!("there is no container and no image {what:?}")).hint(
                containerds(db, what).unwrap_or("`graphdriver ps` and `graphdriver images` list what there is".into()),
            ))
        }
        other => other.map(|row| Object::Image(Box::new(row))),
    }
}

/// At most three ids that begin with `prefix` and these digits.
fn by_prefix(db: &Connection, table: &str, prefix: &str, hex: &str) -> Result<Vec<String>> {
    if hex.is_empty() || hex.len() > 64 || !hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
        return Ok(Vec::new());
    }
    let mut rows = db.prepare(&format!("SELECT id FROM {table} WHERE id GLOB ? ORDER BY id LIMIT 3"))?;
    Ok(rows.query_map([format!("{prefix}{hex}*")], |r| r.get(0))?.collect::<rusqlite::Result<_>>()?)
}

fn ambiguous(kind: &str, what: &str, several: &[String]) -> Error {
    Error::new(ErrorKind::InvalidInput, format!("{what:?} can be more than one {kind}: {}", several.join(", ")))
        .hint("give more digits of the id")
}
