//! From committed layers to archives.

use super::{Engine, find, load::chain_of};
use crate::{
    image::{
        ImageConfig, Reference,
        archive::{Format, SavedImage, write_archive},
    },
    progress::Metered,
};
use graphdriver_core::{Context, DiffId, Error, ErrorKind, LayerId, Result, Root, tar};
use std::{
    collections::HashMap,
    io::{BufWriter, Write},
};

struct Chosen {
    config: ImageConfig,
    names: Vec<Reference>,
    layers: Vec<(DiffId, u64)>,
}

impl Engine {
    /// Writes the images into one archive, each layer once and as the very bytes it came in as. An image given by name is
    /// saved under that name, one given by id under all its names.
    pub fn save(&self, images: &[String], format: Format, out: &mut dyn Write) -> Result<()> {
        let mut sources = HashMap::new();
        let chosen = self.choose(images, &mut sources)?;
        let saved: Vec<_> =
            chosen.iter().map(|c| SavedImage { config: &c.config, names: &c.names, layers: &c.layers }).collect();
        let mut layer = |diff: DiffId, out: &mut dyn Write| {
            let (layer, size) = sources[&diff];
            self.repack(layer, diff, size, out).doing(|| format!("saving layer {diff}"))
        };
        let mut out = BufWriter::with_capacity(1 << 20, out);
        write_archive(&mut out, format, &saved, &mut layer)?;
        Ok(out.flush()?)
    }

    fn choose(&self, images: &[String], sources: &mut HashMap<DiffId, (LayerId, u64)>) -> Result<Vec<Chosen>> {
        let known: HashMap<_, _> = self.layers.list()?.into_iter().map(|l| (l.id, l)).collect();
        self.layers.store().read(|db| {
            let mut chosen: Vec<Chosen> = Vec::new();
            for what in images {
                let row = find::image(db, what)?;
                let tags = find::tags(db, &row.id)?;
                let by_name = what.parse::<Reference>().ok().filter(|name| tags.contains(&name.to_string()));
                let names = match by_name {
                    Some(name) => vec![name],
                    None => tags.iter().map(|tag| tag.parse()).collect::<Result<_>>()?,
                };
                if let Some(same) = chosen.iter_mut().find(|c| c.config.id() == row.id) {
                    same.names.extend(names);
                    continue;
                }
                let mut layers = Vec::new();
                for id in chain_of(db, row.top)?.into_iter().rev() {
                    let layer = known.get(&id).and_then(|l| Some((l.diff_id?, l.tar_size?)));
                    let (diff, size) = layer.ok_or_else(|| {
                        Error::new(ErrorKind::Corrupt, format!("the store does not know the digest of layer {id}"))
                    })?;
                    sources.insert(diff, (id, size));
                    layers.push((diff, size));
                }
                chosen.push(Chosen { config: row.config, names, layers });
            }
            Ok(chosen)
        })
    }

    pub(super) fn repack(&self, layer: LayerId, diff: DiffId, size: u64, out: &mut dyn Write) -> Result<()> {
        let root = match self.layers.driver().diff_dir(layer) {
            Some(dir) => Root::open(&dir.path)?,
            None => self.view(layer)?,
        };
        let short = diff.0.short();
        let mut out = Metered::new(out, &short, Some(size), &*self.progress, &self.cancel);
        tar::repack(&self.layers.record_dir(layer), &root, diff, &mut out)
    }
}
