//! Layer tars of snapshots, found by the mounts that containerd was told of.

use super::{Snapshot, Snapshots, row};
use crate::progress::{Cancel, Metered, Silent};
use graphdriver_core::{Context, Error, ErrorKind, LayerId, Mount, Narrow, Result, store::LayerKind, tar};
use std::io::{BufWriter, Write};

/// A layer whose tar tells what it changed in its parent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    name: String,
    layer: LayerId,
    parent: Option<LayerId>,
}

impl Difference {
    /// The snapshot whose mounts they were.
    pub fn name(&self) -> &str {
        &self.name
    }
}

/// What a snapshot's mounts show.
struct Shown {
    name: String,
    /// None if there is nothing in it: a view without a parent.
    layer: Option<LayerId>,
}

impl Snapshots {
    /// The layer that `right` shows, if `left` shows its parent, or nothing and it has none. Each tells whether a recipe is
    /// its own. Only the layers that `numbers` has are compared, as a recipe has the number of the layer it shows.
    ///
    /// None if one of them is no recipe of a snapshot here, or they are not of a child and its parent. `mounter` is the
    /// process that is told of the mounts.
    pub fn difference(
        &self,
        numbers: &[LayerId],
        mounter: Option<u32>,
        left: &dyn Fn(Vec<Mount>) -> bool,
        right: &dyn Fn(Vec<Mount>) -> bool,
    ) -> Result<Option<Difference>> {
        let driver = self.engine.layers.driver().name();
        // To be told of, the others' layers are made ready: devices for anybody who asks.
        if !["overlay2", "vfs-fuse", "btrfs"].contains(&driver) {
            return Ok(None);
        }
        let store = self.engine.layers.store();
        let mut candidates = store.read(|db| row::of_layers(db, numbers))?;
        // Who mounts it meanwhile holds back what is written there.
        candidates.retain(|candidate| driver != "vfs-fuse" || candidate.kind != LayerKind::Active);
        let find = |own: &dyn Fn(Vec<Mount>) -> bool| {
            let found = candidates.iter().find(|candidate| self.recipe_of(candidate, mounter).is_ok_and(own));
            found.map(|found| self.shown(found)).transpose()
        };
        let (Some(below), Some(Shown { name, layer: Some(layer) })) = (find(left)?, find(right)?) else {
            return Ok(None);
        };
        let parent = self.engine.layers.get(layer)?.parent;
        Ok((parent == below.layer).then_some(Difference { name, layer, parent }))
    }

    /// What containerd was told of it, or of a view of it if it is committed.
    fn recipe_of(&self, snapshot: &Snapshot, mounter: Option<u32>) -> Result<Vec<Mount>> {
        match snapshot.kind {
            LayerKind::Committed => self.recipe(snapshot.layer, LayerKind::Committed),
            _ => self.own_mounts(snapshot, mounter),
        }
    }

    fn shown(&self, snapshot: &Snapshot) -> Result<Shown> {
        let layer = match snapshot.kind {
            LayerKind::View => self.engine.layers.get(snapshot.layer)?.parent,
            _ => Some(snapshot.layer),
        };
        Ok(Shown { name: snapshot.name.clone(), layer })
    }

    /// Writes the layer tar. The layer may be mounted and in use.
    ///
    /// Fails with `NotFound` if the snapshot was removed meanwhile, and soon with `Interrupted` when `cancel` is set: what was
    /// written then is worth nothing.
    pub fn write_difference(&self, difference: &Difference, cancel: &Cancel, out: impl Write) -> Result<()> {
        let out = Metered::new(out, &difference.name, None, &Silent, cancel);
        self.write_difference_inner(difference, cancel, out).doing(|| format!("comparing snapshot {}", difference.name))
    }

    fn write_difference_inner(
        &self,
        &Difference { layer, parent, .. }: &Difference,
        cancel: &Cancel,
        out: impl Write,
    ) -> Result<()> {
        let layers = &self.engine.layers;
        let lower = parent.map(|parent| self.engine.view(parent)).transpose()?;
        let upper = self.engine.view(layer)?.cancelled_by(cancel);
        let parents = layers.parents(layer)?;
        let mut narrow = layers.driver().native_diff().map(|native| native.narrow(layer, &parents)).transpose()?;
        let narrow = narrow.as_mut().map(|n| &mut **n as &mut dyn Narrow);
        let out = BufWriter::with_capacity(1 << 17, out);
        tar::diff_tar(lower.as_ref(), &upper, narrow, out)?.flush()?;
        match layers.get(layer) {
            Ok(now) if now.parent == parent => Ok(()),
            Ok(_) => Err(Error::new(ErrorKind::NotFound, "it was put on another parent meanwhile")),
            Err(e) => Err(e),
        }
    }
}
