//! Containers, as far as storage goes: named writable layers.

use super::{
    Engine, events,
    find::{self, ContainerRow},
    mounts, now,
};
use graphdriver_core::{Digest, Error, ErrorKind, LayerOptions, Result, Usage, store::LayerKind};
use rusqlite::{Connection, Transaction, params};
use serde::Serialize;
use std::path::PathBuf;

/// What a new container should be like.
#[derive(Debug, Clone, Default)]
pub struct CreateOptions {
    /// Its name; the beginning of its id if none is given.
    pub name: Option<String>,
    /// What `--storage-opt size=` and `inodes=` ask for.
    pub layer: LayerOptions,
}

/// One line of `graphdriver ps`.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct ContainerSummary {
    /// 64 hexadecimal digits.
    #[serde(rename = "ID")]
    pub id: String,
    /// Its name.
    pub name: String,
    /// A name of its image, else the image's id.
    pub image: String,
    /// The image's id.
    #[serde(rename = "ImageID")]
    pub image_id: Digest,
    /// Nanoseconds since 1970; RFC 3339 in JSON.
    #[serde(serialize_with = "super::rfc3339")]
    pub created: i64,
    /// Where it is mounted.
    pub mounts: Vec<PathBuf>,
    /// What it wrote takes on disk; only if asked for.
    pub size: Option<Usage>,
}

impl Engine {
    /// Makes a writable layer on top of the image and returns its id.
    pub fn create(&self, image: &str, options: &CreateOptions) -> Result<String> {
        let id = new_id()?;
        let name = options.name.clone().unwrap_or_else(|| id[..12].into());
        check_name(&name)?;
        let row = self.layers.store().read(|db| {
            refuse_taken(db, &name)?;
            find::image(db, image)
        })?;
        let durable = LayerOptions { durable: true, ..options.layer.clone() };
        let layer = self.layers.create(LayerKind::Active, row.top, &durable)?;
        self.layers.store().write(|tx| {
            refuse_taken(tx, &name)?;
            if find::image_by_id(tx, &row.id)?.is_none() {
                return Err(Error::new(ErrorKind::NotFound, format!("image {image:?} has just been removed")));
            }
            layer.keep(tx, row.top)?;
            tx.execute(
                "INSERT INTO containers (id, name, image, layer, created) VALUES (?, ?, ?, ?, ?)",
                params![id, name, row.id, layer.id(), now()],
            )?;
            events::record(tx, "container", "create", &id, &[("name", &name), ("image", image)])
        })?;
        Ok(id)
    }

    /// All containers, the newest first; `size` measures what each wrote.
    pub fn containers(&self, size: bool) -> Result<Vec<ContainerSummary>> {
        self.reconcile_mounts()?;
        let (mut lines, layers): (Vec<_>, Vec<_>) = self.layers.store().read(|db| {
            let rows = find::containers(db)?;
            rows.into_iter().map(|row| Ok((summary(db, &row)?, row.layer))).collect::<Result<_>>()
        })?;
        if size {
            for (line, layer) in lines.iter_mut().zip(layers) {
                line.size = Some(self.layers.usage(layer)?);
            }
        }
        Ok(lines)
    }

    /// Gives the container another name.
    pub fn rename(&self, container: &str, name: &str) -> Result<()> {
        check_name(name)?;
        self.layers.store().write(|tx| {
            let row = find::container(tx, container)?;
            refuse_taken(tx, name)?;
            tx.execute("UPDATE containers SET name = ? WHERE id = ?", [name, &row.id])?;
            events::record(tx, "container", "rename", &row.id, &[("name", name), ("oldName", &row.name)])
        })
    }

    /// Removes the container and what it wrote. Refused while it is mounted, unless `force` unmounts it first; `force` also
    /// takes mounts for gone that lie in a mount namespace nobody here may look into.
    pub fn remove_container(&self, container: &str, force: bool) -> Result<()> {
        if force {
            match self.umount(container, false) {
                Err(e) if e.kind() != ErrorKind::NotFound => return Err(e),
                _ => {}
            }
            let row = self.layers.store().read(|db| find::container(db, container))?;
            self.forget_out_of_sight(&row.id)?;
        } else {
            self.reconcile_mounts()?;
        }
        self.layers.store().write(|tx| {
            let row = find::container(tx, container)?;
            if let Some(mount) = mounts::of_object(tx, &row.id)?.first() {
                let place = mount.target.display();
                return Err(Error::new(ErrorKind::Busy, format!("container {} is mounted at {place}", row.name))
                    .hint("unmount it first, or use rm -f"));
            }
            self.delete_container(tx, &row)
        })?;
        self.layers.sweep().map(drop)
    }

    fn delete_container(&self, tx: &Transaction<'_>, row: &ContainerRow) -> Result<()> {
        tx.execute("DELETE FROM containers WHERE id = ?", [&row.id])?;
        events::record(tx, "container", "destroy", &row.id, &[("name", &row.name)])?;
        self.layers.remove_in(tx, row.layer)
    }
}

fn summary(db: &Connection, row: &ContainerRow) -> Result<ContainerSummary> {
    let tags = find::tags(db, &row.image)?;
    Ok(ContainerSummary {
        id: row.id.clone(),
        name: row.name.clone(),
        image: tags.into_iter().next().unwrap_or_else(|| row.image.short()),
        image_id: row.image,
        created: row.created,
        mounts: mounts::of_object(db, &row.id)?.into_iter().map(|m| m.target).collect(),
        size: None,
    })
}

fn new_id() -> Result<String> {
    let mut bytes = [0; 32];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(hex::encode(bytes))
}

/// Docker's rule for names: a letter or digit, then letters, digits, `_`, `.` and `-`.
fn check_name(name: &str) -> Result<()> {
    let mut bytes = name.bytes();
    let first = bytes.next().is_some_and(|b| b.is_ascii_alphanumeric());
    match first && name.len() <= 128 && bytes.all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b)) {
        true => Ok(()),
        false => Err(Error::new(ErrorKind::InvalidInput, format!("{name:?} is no name for a container"))
            .hint("begin with a letter or digit, go on with letters, digits, _ . and -, 128 in all")),
    }
}

fn refuse_taken(db: &Connection, name: &str) -> Result<()> {
    let taken = "SELECT EXISTS (SELECT 1 FROM containers WHERE name = ?)";
    match db.query_row(taken, [name], |r| r.get(0))? {
        true => Err(Error::new(ErrorKind::AlreadyExists, format!("there is a container {name:?} already"))
            .hint("choose another name, or remove or rename that one")),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_dockers_rule() {
        for good in ["a", "web-1", "A.b_c", "0"] {
            check_name(good).unwrap();
        }
        for bad in ["", "-a", ".hidden", "a b", "a/b", "ä", &"x".repeat(129)] {
            assert_eq!(check_name(bad).unwrap_err().kind(), ErrorKind::InvalidInput, "{bad}");
        }
    }
}
