//! Everything about one image or container, in the shape `docker inspect` has.

use super::{
    Engine,
    find::{self, ContainerRow, ImageRow, Object},
    load::chain_of,
    mounts, stamp,
};
use graphdriver_core::{Access, ErrorKind, LayerId, Mount, Result};
use rusqlite::Connection;
use serde_json::{Value, json};

impl Engine {
    /// An image or a container.
    pub fn inspect(&self, what: &str) -> Result<Value> {
        match self.layers.store().read(|db| find::object(db, what))? {
            Object::Image(row) => self.image_json(&row),
            Object::Container(row) => self.container_json(&row),
        }
    }

    /// An image.
    pub fn inspect_image(&self, what: &str) -> Result<Value> {
        let row = self.layers.store().read(|db| find::image(db, what))?;
        self.image_json(&row)
    }

    /// A container.
    pub fn inspect_container(&self, what: &str) -> Result<Value> {
        let row = self.layers.store().read(|db| find::container(db, what))?;
        self.container_json(&row)
    }

    fn image_json(&self, row: &ImageRow) -> Result<Value> {
        let sizes = self.layer_sizes()?;
        let (tags, chain) = self.layers.store().read(|db| Ok((find::tags(db, &row.id)?, chain_of(db, row.top)?)))?;
        let size: u64 = chain.iter().filter_map(|layer| sizes.get(layer)).sum();
        let digests = row.manifest.iter().flat_map(|digest| {
            let repositories = tags.iter().filter_map(|tag| tag.rsplit_once(':'));
            repositories.map(move |(repository, _)| format!("{repository}@{digest}"))
        });
        let config = &row.config;
        Ok(json!({
            "Id": row.id,
            "RepoTags": tags,
            "RepoDigests": digests.collect::<Vec<_>>(),
            "Parent": row.parent.map(|parent| parent.to_string()).unwrap_or_default(),
            "Comment": config.history().last().and_then(|step| step.comment().clone()).unwrap_or_default(),
            "Created": config.created().map(|time| time.to_string()),
            "Author": config.author(),
            "Config": config.config(),
            "Architecture": config.architecture(),
            "Variant": config.variant(),
            "Os": config.os(),
            "Size": size,
            "GraphDriver": self.driver_json(row.top, Access::ReadOnly)?,
            "RootFS": { "Type": "layers", "Layers": config.diff_ids() },
            "Metadata": { "LoadedAt": stamp(row.added) },
        }))
    }

    fn container_json(&self, row: &ContainerRow) -> Result<Value> {
        self.reconcile_mounts()?;
        let limits = self.layers.driver().limits(row.layer)?;
        let usage = self.layers.usage(row.layer)?;
        let mounts = self.layers.store().read(|db: &Connection| mounts::of_object(db, &row.id))?;
        let mounts: Vec<_> =
            mounts.iter().map(|m| json!({ "Destination": m.target.to_string_lossy(), "RW": m.writable })).collect();
        Ok(json!({
            "Id": row.id,
            "Name": row.name,
            "Image": row.image,
            "Created": stamp(row.created),
            "SizeRw": usage.bytes,
            "InodesRw": usage.inodes,
            "SizeLimit": limits.size,
            "InodeLimit": limits.inodes,
            "GraphDriver": self.driver_json(Some(row.layer), Access::ReadWrite)?,
            "Mounts": mounts,
        }))
    }

    /// The driver, the recipe that would show the layer, and its directories by the names Docker has for them.
    pub(super) fn driver_json(&self, layer: Option<LayerId>, access: Access) -> Result<Value> {
        let recipe = match layer {
            // A driver may describe only one writable mount at a time.
            Some(layer) => match self.layers.mount(layer, access) {
                Err(e) if e.kind() == ErrorKind::Busy => self.layers.mount(layer, Access::ReadOnly)?,
                recipe => recipe?,
            },
            None => Vec::<Mount>::new(),
        };
        let mut data = json!({ "Layer": layer, "Mounts": recipe });
        for option in recipe.iter().flat_map(|mount| &mount.options) {
            for (name, key) in [("lowerdir=", "LowerDir"), ("upperdir=", "UpperDir"), ("workdir=", "WorkDir")] {
                if let Some(value) = option.strip_prefix(name) {
                    data[key] = value.into();
                }
            }
        }
        Ok(json!({ "Name": self.layers.driver().name(), "Data": data }))
    }
}
