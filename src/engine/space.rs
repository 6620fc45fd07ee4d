//! Where the space goes. Every layer is counted once, so the totals are what the disk has lost.

use super::{Engine, SnapshotSpace, find, load::chain_of, mounts};
use graphdriver_core::{Digest, LayerId, Result};
use serde::Serialize;
use std::collections::{HashMap, HashSet};

/// What `graphdriver df` tells, in bytes on disk.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct DiskUsage {
    /// Every image.
    pub images: Vec<ImageSpace>,
    /// Every container.
    pub containers: Vec<ContainerSpace>,
    /// Every snapshot of containerd's.
    pub snapshots: Vec<SnapshotSpace>,
    /// All layers of all images, each once.
    pub images_size: u64,
    /// Layers that only images without containers and mounts need: what `image prune -a` frees.
    pub images_reclaimable: u64,
    /// All that containers wrote.
    pub containers_size: u64,
    /// What containers that are not mounted wrote.
    pub containers_reclaimable: u64,
    /// All snapshots. None of it is ours to free.
    pub snapshots_size: u64,
}

/// One image.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct ImageSpace {
    /// Its id.
    #[serde(rename = "ID")]
    pub id: Digest,
    /// Its names.
    pub names: Vec<String>,
    /// RFC 3339.
    pub created: Option<String>,
    /// All its layers.
    pub size: u64,
    /// Its layers that other images have too.
    pub shared: u64,
    /// Its layers that no other image has.
    pub unique: u64,
    /// Containers made from it.
    pub containers: usize,
    /// Whether a container or a mount keeps it.
    pub in_use: bool,
}

/// One container.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct ContainerSpace {
    /// Its id.
    #[serde(rename = "ID")]
    pub id: String,
    /// Its name.
    pub name: String,
    /// Its image.
    pub image: Digest,
    /// What it wrote.
    pub size: u64,
    /// Nanoseconds since 1970; RFC 3339 in JSON.
    #[serde(serialize_with = "super::rfc3339")]
    pub created: i64,
    /// Whether it is mounted.
    pub mounted: bool,
}

impl Engine {
    /// Measures images, containers and snapshots.
    pub fn disk_usage(&self) -> Result<DiskUsage> {
        self.reconcile_mounts()?;
        let sizes = self.layer_sizes()?;
        let size_of = |layer: &LayerId| sizes.get(layer).copied().unwrap_or(0);
        let (mut images, mut containers, chains) = self.layers.store().read(survey)?;
        let mut users: HashMap<LayerId, usize> = HashMap::new();
        chains.iter().flatten().for_each(|layer| *users.entry(*layer).or_default() += 1);
        for (image, chain) in images.iter_mut().zip(&chains) {
            image.size = chain.iter().map(size_of).sum();
            image.unique = chain.iter().filter(|layer| users[*layer] == 1).map(size_of).sum();
            image.shared = image.size - image.unique;
        }
        for (container, layer) in &mut containers {
            container.size = self.layers.usage(*layer)?.bytes;
        }
        let containers: Vec<_> = containers.into_iter().map(|(container, _)| container).collect();
        let snapshots = self.snapshot_space()?;
        Ok(DiskUsage {
            images_size: users.keys().map(size_of).sum(),
            images_reclaimable: reclaimable(&images, &chains).iter().map(size_of).sum(),
            containers_size: containers.iter().map(|c| c.size).sum(),
            containers_reclaimable: containers.iter().filter(|c| !c.mounted).map(|c| c.size).sum(),
            snapshots_size: snapshots.iter().map(|snapshot| snapshot.size).sum(),
            images,
            containers,
            snapshots,
        })
    }

    /// [`DiskUsage::images_reclaimable`], without measuring anything.
    pub(super) fn images_reclaimable(&self) -> Result<u64> {
        let sizes = self.layer_sizes()?;
        let (images, _, chains) = self.layers.store().read(survey)?;
        Ok(reclaimable(&images, &chains).iter().filter_map(|layer| sizes.get(layer)).sum())
    }
}

/// The layers that only images nobody uses have.
fn reclaimable(images: &[ImageSpace], chains: &[Vec<LayerId>]) -> HashSet<LayerId> {
    let of = |used| {
        let those = images.iter().zip(chains).filter(move |(image, _)| image.in_use == used);
        those.flat_map(|(_, chain)| chain.iter().copied()).collect::<HashSet<_>>()
    };
    &of(false) - &of(true)
}

type Survey = (Vec<ImageSpace>, Vec<(ContainerSpace, LayerId)>, Vec<Vec<LayerId>>);

/// Everything but the sizes.
fn survey(db: &rusqlite::Connection) -> Result<Survey> {
    let mut containers = Vec::new();
    for row in find::containers(db)? {
        let mounted = !mounts::of_object(db, &row.id)?.is_empty();
        let space =
            ContainerSpace { id: row.id, name: row.name, image: row.image, size: 0, created: row.created, mounted };
        containers.push((space, row.layer));
    }
    let (mut images, mut chains) = (Vec::new(), Vec::new());
    for row in find::images(db)? {
        let made = containers.iter().filter(|(c, _)| c.image == row.id).count();
        chains.push(chain_of(db, row.top)?);
        images.push(ImageSpace {
            id: row.id,
            names: find::tags(db, &row.id)?,
            created: row.config.created().map(|t| t.to_string()),
            size: 0,
            shared: 0,
            unique: 0,
            containers: made,
            in_use: made > 0 || !mounts::of_object(db, &row.id.to_string())?.is_empty(),
        });
    }
    Ok((images, containers, chains))
}
