//! New images: from a tar of a root filesystem, and from a container.

use super::{
    Engine, events,
    find::{self, ContainerRow},
    load::{Unpacking, insert_image, set_tag},
};
use crate::{
    image::{Changes, Commit, ImageConfig, Reference, archive::decompressed, created_now},
    progress::{Counted, Metered},
};
use graphdriver_core::{ChainId, Context, Digest, LayerId, Result, store};
use std::{io::Read, sync::Arc};

/// What goes into a new image's configuration.
#[derive(Debug, Clone, Default)]
pub struct CommitOptions {
    /// Who made it: `-a`.
    pub author: Option<String>,
    /// Why: `-m`.
    pub message: Option<String>,
    /// Dockerfile instructions: `-c`.
    pub changes: Changes,
}

impl CommitOptions {
    fn step(&self, created_by: String) -> Result<Commit> {
        Ok(Commit {
            created: created_now()?,
            author: self.author.clone().unwrap_or_default(),
            comment: self.message.clone().unwrap_or_default(),
            created_by,
            changes: self.changes.clone(),
        })
    }
}

impl Engine {
    /// Makes an image of one layer from a tar of a root filesystem, plain or compressed by gzip or zstd. `size` is how
    /// many bytes `tar` will give, if that is known.
    pub fn import(
        &self,
        tar: impl Read,
        source: &str,
        size: Option<u64>,
        name: Option<&Reference>,
        options: &CommitOptions,
    ) -> Result<Digest> {
        let stored = Counted { inner: tar, passed: Arc::default() };
        let passed = stored.passed.clone();
        let tar = decompressed(stored).doing(|| format!("importing {source}"))?;
        let tar = Metered::new(tar, source, size, &*self.progress, &self.cancel).counted_by(passed);
        let new = self.unpack_layer(tar, None).doing(|| format!("importing {source}"))?;
        self.freeze(&new, &[]).doing(|| format!("importing {source}"))?;
        let config = ImageConfig::import(Some(new.diff), &options.step(format!("graphdriver import {source}"))?)?;
        self.adopt_built(&new, &config, None, None, name)
    }

    /// Makes an image from what the container changed. It may be mounted and in use: what is there is read live, and
    /// nothing is frozen.
    pub fn commit(&self, container: &str, name: Option<&Reference>, options: &CommitOptions) -> Result<Digest> {
        let doing = || format!("committing container {container}");
        let (row, image) = self.layers.store().read(|db| {
            let row = find::container(db, container)?;
            let image = find::image_by_id(db, &row.image)?.expect("a container's image is a foreign key");
            Ok((row, image))
        })?;
        let parent = self.layers.get(row.layer)?.parent;
        // The tar runs through a pipe: diffed by one thread, hashed and unpacked by this one.
        let (reader, writer) = std::io::pipe().doing(doing)?;
        let (diffed, unpacked) = std::thread::scope(|scope| {
            let diffed = scope.spawn(|| self.diff_tar(&row, writer));
            let meter = Metered::new(reader, &row.name, None, &*self.progress, &self.cancel);
            // A failed diff must not look like the end of a short tar, so its error counts before the new layer does.
            let unpacked = self.unpack_layer(meter, parent);
            (diffed.join().expect("diffing does not panic"), unpacked)
        });
        let new = match (diffed, unpacked) {
            (Ok(()), unpacked) => unpacked.doing(doing)?,
            (Err(e), Err(why)) if e.kind() == graphdriver_core::ErrorKind::Io => return Err(why.doing(doing())),
            (Err(e), _) => return Err(e.doing(doing())),
        };
        let below = parent.map(|parent| self.layers.chain(parent)).transpose()?.unwrap_or_default();
        self.freeze(&new, &below).doing(doing)?;
        let step = options.step("graphdriver commit".into())?;
        let config = image.config.commit(Some(new.diff), &step)?;
        self.adopt_built(&new, &config, Some(&row), Some((image.id, parent)), name).doing(doing)
    }

    /// Makes the new layer and its image visible, or takes the same layer if it is there already.
    fn adopt_built(
        &self,
        new: &Unpacking<'_>,
        config: &ImageConfig,
        container: Option<&ContainerRow>,
        parent: Option<(Digest, Option<LayerId>)>,
        name: Option<&Reference>,
    ) -> Result<Digest> {
        let id = config.id();
        let (parent_image, parent_layer) = parent.map_or((None, None), |(image, layer)| (Some(image), layer));
        let below = parent_layer.map(|l| self.layers.get(l)).transpose()?.and_then(|l| l.chain_id);
        let action = if container.is_some() { "commit" } else { "import" };
        self.layers.store().write(|tx| {
            container.map_or(Ok(()), |row| find::refuse_removed(tx, row))?;
            let top = match store::by_chain(tx, ChainId::extend(below, new.diff))? {
                Some(same) => same,
                None => {
                    new.layer.keep(tx, parent_layer)?;
                    new.layer.id()
                }
            };
            insert_image(tx, config.raw(), &id, Some(top), parent_image, None)?;
            let text = name.map(Reference::to_string).unwrap_or_default();
            events::record(tx, "image", action, &id.to_string(), &[("name", &text)])?;
            name.map_or(Ok(()), |name| set_tag(tx, name, &id))
        })?;
        Ok(id)
    }
}
