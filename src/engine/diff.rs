//! What a container changed, and its whole tree as a tar.

use super::{
    Engine,
    find::{self, ContainerRow},
    mounts,
};
use graphdriver_core::{Change, Context, LayerId, Narrow, Result, Root, tar, walk};
use std::io::{BufWriter, Write};

impl Engine {
    /// Tells what the container changed, sorted as a walk meets it. It may be mounted and in use meanwhile.
    pub fn diff(&self, container: &str, tell: &mut dyn FnMut(Change) -> Result<()>) -> Result<()> {
        let row = self.layers.store().read(|db| find::container(db, container))?;
        let (lower, upper, parents) = self.both_views(&row)?;
        let mut narrow = self.narrow(row.layer, &parents)?;
        let narrow = narrow.as_mut().map(|n| &mut **n as &mut dyn Narrow);
        // Docker does not tell of the root: it changes with everything in it.
        let tell = &mut |change: Change| if change.path.as_os_str().is_empty() { Ok(()) } else { tell(change) };
        walk::changes(lower.as_ref(), &upper, narrow, tell)
            .and_then(|()| self.layers.store().read(|db| find::refuse_removed(db, &row)))
            .doing(|| format!("comparing container {container}"))
    }

    /// The layer tar of what the container changed.
    pub(super) fn diff_tar(&self, row: &ContainerRow, out: impl Write) -> Result<()> {
        let (lower, upper, parents) = self.both_views(row)?;
        let mut narrow = self.narrow(row.layer, &parents)?;
        let narrow = narrow.as_mut().map(|n| &mut **n as &mut dyn Narrow);
        let out = BufWriter::with_capacity(1 << 17, out);
        tar::diff_tar(lower.as_ref(), &upper, narrow, out)?.flush()?;
        Ok(())
    }

    /// Writes the container's whole tree as a tar.
    pub fn export(&self, container: &str, out: &mut dyn Write) -> Result<()> {
        let row = self.layers.store().read(|db| find::container(db, container))?;
        let doing = || format!("exporting container {container}");
        let root = self.live(&row).doing(doing)?;
        let out = crate::progress::Metered::new(out, &row.name, None, &*self.progress, &self.cancel);
        let out = BufWriter::with_capacity(1 << 20, out);
        tar::tree_tar(&root, out).doing(doing)?.flush().doing(doing)?;
        self.layers.store().read(|db| find::refuse_removed(db, &row)).doing(doing)
    }

    fn both_views(&self, row: &ContainerRow) -> Result<(Option<Root>, Root, Vec<LayerId>)> {
        let parents = self.layers.parents(row.layer)?;
        let lower = parents.first().map(|parent| self.view(*parent)).transpose()?;
        Ok((lower, self.live(row)?, parents))
    }

    /// The container as it is now.
    fn live(&self, row: &ContainerRow) -> Result<Root> {
        let shown = self.layers.store().read(|db| mounts::of_object(db, &row.id))?;
        mounts::live(self, row.layer, &shown)
    }

    fn narrow(&self, layer: LayerId, parents: &[LayerId]) -> Result<Option<Box<dyn Narrow + '_>>> {
        self.layers.driver().native_diff().map(|native| native.narrow(layer, parents)).transpose()
    }
}
