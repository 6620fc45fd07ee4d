//! The in-memory reference driver, and the reference tree it is made of.
//!
//! What a driver does to real storage, this does to [`MemTree`]s, slowly and plainly, sharing no code with the walk
//! and the drivers it is compared with. The [conformance suite](crate::conformance) runs on it like on any driver.

mod blocks;
mod diff;
mod layer;
mod op;
mod tree;

pub use diff::diff;
#[cfg(feature = "conformance")]
pub(crate) use diff::{diff_by, differs};
pub use layer::MemSink;
#[cfg(feature = "conformance")]
pub(crate) use op::name_links;
pub use op::{ContentDigest, Node, Op, Snapshot, Tree};
pub use tree::{HardLinks, MemTree};

use crate::{
    Access, Capabilities, CopyUnit, Error, ErrorKind, GraphDriver, LayerId, LayerOptions, Limits, Mount, Reclaimed,
    Result, Stored, StoredAs, Usage, WriteStrategy, tar::Segment,
};
use rustix::io::Errno;
use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// A driver whose layers lie in memory. Clones are the same driver, as two processes open the same data.
///
/// Its [`mount`](GraphDriver::mount) recipe has the type `model`, which no kernel knows: reach the trees with
/// [`tree`](Self::tree).
#[derive(Clone, Debug)]
pub struct ModelDriver {
    layers: Arc<Mutex<BTreeMap<LayerId, Layer>>>,
    capabilities: Capabilities,
    links: HardLinks,
}

#[derive(Debug)]
struct Layer {
    tree: MemTree,
    /// What it started as, to tell what is its own.
    base: Option<MemTree>,
    limits: Limits,
    committed: bool,
}

impl Default for ModelDriver {
    fn default() -> Self {
        Self::new()
    }
}

impl ModelDriver {
    /// An empty one that enforces limits and keeps hard links.
    pub fn new() -> Self {
        let capabilities = Capabilities {
            write_strategy: WriteStrategy::CopyUp { unit: CopyUnit::File },
            quota: true,
            inode_quota: true,
            native_diff: false,
            idmapped_mounts: false,
            independent_layers: false,
            max_depth: 500,
        };
        ModelDriver { layers: Arc::default(), capabilities, links: HardLinks::Kept }
    }

    /// One that refuses limits, as drivers on filesystems without quotas do.
    #[must_use]
    pub fn without_quota(mut self) -> Self {
        self.capabilities.quota = false;
        self.capabilities.inode_quota = false;
        self
    }

    /// One that treats the hard links of parent layers so.
    #[must_use]
    pub fn with_links(mut self, links: HardLinks) -> Self {
        self.links = links;
        self
    }

    /// The layer's tree. Writing to a committed layer is `EROFS`.
    pub fn tree(&self, id: LayerId, _parents: &[LayerId]) -> Result<LayerTree> {
        self.access(id, Access::ReadWrite)
    }

    /// The layer's tree as a mount with this access shows it.
    pub fn access(&self, id: LayerId, access: Access) -> Result<LayerTree> {
        find(&mut self.lock(), id)?;
        Ok(LayerTree { driver: self.clone(), id, access })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<LayerId, Layer>> {
        self.layers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn find(layers: &mut BTreeMap<LayerId, Layer>, id: LayerId) -> Result<&mut Layer> {
    layers.get_mut(&id).ok_or_else(|| Error::new(ErrorKind::NotFound, format!("there is no layer {id}")))
}

impl GraphDriver for ModelDriver {
    fn name(&self) -> &'static str {
        "model"
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn create(&self, id: LayerId, parents: &[LayerId], options: &LayerOptions) -> Result<()> {
        let refuse = |kind, why: String| Err(Error::new(kind, why).doing(format!("creating layer {id}")));
        let limits = Limits { size: options.size, inodes: options.inodes };
        if limits != Limits::default() && !self.capabilities.quota {
            return refuse(ErrorKind::Unsupported, "a limit needs a model that enforces quotas".into());
        }
        if parents.len() > self.capabilities.max_depth {
            return refuse(ErrorKind::Unsupported, format!("at most {} parents", self.capabilities.max_depth));
        }
        let mut layers = self.lock();
        if layers.contains_key(&id) {
            return refuse(ErrorKind::AlreadyExists, "the layer exists".into());
        }
        if let Some(missing) = parents.iter().find(|parent| !layers.contains_key(parent)) {
            return refuse(ErrorKind::NotFound, format!("there is no layer {missing}"));
        }
        let base = parents.first().map(|parent| layers[parent].tree.clone());
        let tree = base.as_ref().map_or_else(MemTree::new, |base| base.child(self.links));
        layers.insert(id, Layer { tree, base, limits, committed: false });
        Ok(())
    }

    fn commit(&self, id: LayerId) -> Result<()> {
        find(&mut self.lock(), id)?.committed = true;
        Ok(())
    }

    fn thaw(&self, id: LayerId) -> Result<()> {
        find(&mut self.lock(), id)?.committed = false;
        Ok(())
    }

    fn mount(&self, id: LayerId, _parents: &[LayerId], access: Access) -> Result<Vec<Mount>> {
        let mut layers = self.lock();
        let layer = find(&mut layers, id)?;
        if layer.committed && access == Access::ReadWrite {
            let why = Error::new(ErrorKind::InvalidInput, "the layer is committed");
            return Err(why.doing(format!("mounting layer {id} for writing")));
        }
        let options = if access == Access::ReadOnly { vec!["ro".to_owned()] } else { Vec::new() };
        Ok(vec![Mount { fstype: "model".into(), source: id.to_string().into(), options }])
    }

    fn limits(&self, id: LayerId) -> Result<Limits> {
        Ok(find(&mut self.lock(), id)?.limits)
    }

    fn set_limits(&self, id: LayerId, limits: Limits) -> Result<()> {
        if limits != Limits::default() && !self.capabilities.quota {
            let why = Error::new(ErrorKind::Unsupported, "a limit needs a model that enforces quotas");
            return Err(why.doing(format!("limiting layer {id}")));
        }
        find(&mut self.lock(), id)?.limits = limits;
        Ok(())
    }

    fn usage(&self, id: LayerId) -> Result<Usage> {
        let mut layers = self.lock();
        let layer = find(&mut layers, id)?;
        Ok(layer.tree.own_usage(layer.base.as_ref()))
    }

    fn remove(&self, id: LayerId) -> Result<()> {
        self.lock().remove(&id);
        Ok(())
    }

    fn reclaim(&self, known: &dyn Fn(LayerId) -> bool) -> Result<Reclaimed> {
        let mut layers = self.lock();
        let unknown: Vec<LayerId> = layers.keys().copied().filter(|id| !known(*id)).collect();
        let mut freed = Reclaimed::default();
        for layer in unknown.iter().filter_map(|id| layers.remove(id)) {
            freed.layers += 1;
            freed.bytes += layer.tree.own_usage(layer.base.as_ref()).bytes;
        }
        Ok(freed)
    }

    fn inventory(&self) -> Result<Vec<Stored>> {
        let stored = |(id, layer): (&LayerId, &Layer)| Stored {
            place: format!("model {id}"),
            what: StoredAs::Layer { id: *id, committed: layer.committed },
        };
        Ok(self.lock().iter().map(stored).collect())
    }
}

fn exceeds(limits: Limits, before: Usage, after: Usage) -> bool {
    let over = |limit: Option<u64>, before, after| limit.is_some_and(|limit| after > limit && after > before);
    over(limits.size.map(|size| size.0), before.bytes, after.bytes) || over(limits.inodes, before.inodes, after.inodes)
}

/// A layer's tree, as a mount of it would show it.
#[derive(Debug, Clone)]
pub struct LayerTree {
    driver: ModelDriver,
    id: LayerId,
    access: Access,
}

impl LayerTree {
    /// Makes a directory.
    pub fn mkdir(&mut self, path: impl AsRef<Path>, mode: u32) -> Result<()> {
        Ok(self.apply(&Op::Mkdir { path: path.as_ref().into(), mode })?)
    }

    /// Makes a file, or overwrites its beginning.
    pub fn write_file(&mut self, path: impl AsRef<Path>, data: &[u8], mode: u32) -> Result<()> {
        Ok(self.apply(&Op::Write { path: path.as_ref().into(), offset: 0, data: data.into(), mode })?)
    }

    /// A file's content.
    pub fn read_file(&self, path: impl AsRef<Path>) -> Result<Vec<u8>> {
        self.read(path.as_ref())
    }

    /// The tree as it is now.
    pub fn copy(&self) -> Result<MemTree> {
        Ok(find(&mut self.driver.lock(), self.id)?.tree.clone())
    }

    /// Changes the tree as a whole, within the layer's limits: one that takes more already may still shrink.
    pub fn change<T, E: From<Errno>>(&mut self, change: impl FnOnce(&mut MemTree) -> Result<T, E>) -> Result<T, E> {
        let mut layers = self.driver.lock();
        let layer = find(&mut layers, self.id).map_err(|_| Errno::STALE)?;
        if layer.committed || self.access == Access::ReadOnly {
            return Err(Errno::ROFS.into());
        }
        if layer.limits == Limits::default() {
            return change(&mut layer.tree);
        }
        let before = layer.tree.clone();
        let out = change(&mut layer.tree);
        let used = |tree: &MemTree| tree.own_usage(layer.base.as_ref());
        if exceeds(layer.limits, used(&before), used(&layer.tree)) {
            layer.tree = before;
            return Err(Errno::DQUOT.into());
        }
        out
    }
}

impl Tree for LayerTree {
    fn apply(&mut self, op: &Op) -> Result<(), Errno> {
        self.change(|tree| tree.apply(op))
    }

    fn snapshot(&self) -> Result<Snapshot> {
        self.copy()?.snapshot()
    }

    fn read(&self, path: &Path) -> Result<Vec<u8>> {
        self.copy()?.read(path)
    }

    fn segments(&self, path: &Path) -> Result<Vec<Segment>> {
        self.copy()?.segments(path)
    }
}
