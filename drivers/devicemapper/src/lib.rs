//! The devicemapper storage driver: a thin pool, a thin device with a filesystem for each layer, snapshots for children.
//!
//! # On disk
//!
//! ```text
//! HOME/pool.json      what there is: the pool, its transaction, the thin device of each layer (state.rs)
//! HOME/pool.json.new  the next one, while it is being written
//! HOME/pool.lock      flock(2): changes of the pool take turns
//! HOME/uses.lock      fcntl(2), one byte for each layer: who uses its device
//! HOME/data           sparse, the data of a pool of loop files
//! HOME/metadata       sparse, its metadata
//! ```
//!
//! Devices are named `graphdriver-ID-pool`, `graphdriver-ID-LAYER` and, while they are formatted or the pool is on one device
//! that is divided up, `graphdriver-ID-base`, `-tmeta` and `-tdata`. ID is in `pool.json`.
//!
//! # Who has what active
//!
//! `mount` makes a layer's device, and `release`, closing the driver, or opening it after a crash removes it when nobody
//! has it open. The pool itself stays active between commands as long as there are layers; it is set up by whoever
//! needs it first after a boot, and taken down by who closes the driver when the last layer is gone.

mod dm;
mod filesystem;
mod inventory;
mod layers;
mod metadata;
mod narrow;
mod options;
mod pool;
mod probe;
mod state;
mod status;
mod storage;
mod sys;

use graphdriver_core::{
    Access, Capabilities, Context, DriverFactory, GraphDriver, LayerId, LayerOptions, Limits, Mount, Narrow,
    NativeDiff, Options, Reclaimed, Result, Stored, Usage, mount::MountInfo,
};
use layers::Layers;
use options::Wishes;
use std::path::Path;

/// How the engine finds this driver.
pub const FACTORY: DriverFactory = DriverFactory {
    name: "devicemapper",
    summary: "device-mapper thin pool: layers are thin devices, children are snapshots",
    options: options::SPECS,
    probe: probe::probe,
    open: |home, options| Ok(Box::new(DeviceMapper::open(home, options)?)),
};

/// Layers as thin devices with a filesystem each.
pub struct DeviceMapper {
    layers: Layers,
    capabilities: Capabilities,
}

impl DeviceMapper {
    /// Opens the data directory `home`, which is made if it is not there, and sets up its pool.
    ///
    /// Fails with `InvalidInput` for an option's wrong value or a pool other than the one there is, with `Unsupported` if the
    /// kernel or a program is lacking, and with `Corrupt` if pool and directory do not belong together.
    pub fn open(home: &Path, options: &Options) -> Result<DeviceMapper> {
        let open = || {
            let layers = Layers::open(&std::path::absolute(home)?, Wishes::parse(options)?)?;
            let capabilities = probe::capabilities(layers.block()?);
            Ok(DeviceMapper { layers, capabilities })
        };
        open().map_err(|e: graphdriver_core::Error| e.doing(format!("opening devicemapper at {}", home.display())))
    }
}

impl GraphDriver for DeviceMapper {
    fn name(&self) -> &'static str {
        FACTORY.name
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn status(&self) -> Vec<(String, String)> {
        self.layers.status().unwrap_or_else(|e| vec![("Pool".into(), format!("unusable: {e}"))])
    }

    fn create(&self, id: LayerId, parents: &[LayerId], options: &LayerOptions) -> Result<()> {
        self.layers.create(id, parents, options).doing(|| format!("creating layer {id}"))
    }

    fn commit(&self, id: LayerId) -> Result<()> {
        self.layers.commit(id).doing(|| format!("committing layer {id}"))
    }

    fn thaw(&self, id: LayerId) -> Result<()> {
        self.layers.thaw(id).doing(|| format!("thawing layer {id}"))
    }

    fn mount(&self, id: LayerId, _parents: &[LayerId], access: Access) -> Result<Vec<Mount>> {
        self.layers.mount(id, access).doing(|| format!("describing the mount of layer {id}"))
    }

    fn limits(&self, id: LayerId) -> Result<Limits> {
        self.layers.limits(id)
    }

    fn set_limits(&self, id: LayerId, limits: Limits) -> Result<()> {
        self.layers.set_limits(id, limits).doing(|| format!("changing the limits of layer {id}"))
    }

    fn release(&self, id: LayerId) -> Result<()> {
        self.layers.release(id).doing(|| format!("releasing layer {id}"))
    }

    fn usage(&self, id: LayerId) -> Result<Usage> {
        // The store says what was being done.
        self.layers.usage(id)
    }

    fn remove(&self, id: LayerId) -> Result<()> {
        self.layers.remove(id).doing(|| format!("removing layer {id}"))
    }

    fn reclaim(&self, known: &dyn Fn(LayerId) -> bool) -> Result<Reclaimed> {
        self.layers.reclaim(known)
    }

    fn shown_by(&self, mount: &MountInfo) -> Option<LayerId> {
        self.layers.shown_by(mount)
    }

    fn inventory(&self) -> Result<Vec<Stored>> {
        self.layers.inventory().doing(|| "looking at what is in the pool")
    }

    fn native_diff(&self) -> Option<&dyn NativeDiff> {
        Some(self)
    }
}

impl NativeDiff for DeviceMapper {
    fn narrow(&self, id: LayerId, _parents: &[LayerId]) -> Result<Box<dyn Narrow + '_>> {
        self.layers.narrow(id).doing(|| format!("finding out what changed in layer {id}"))
    }
}

/// A moment between two things that a crash can part. Tests crash here.
#[cfg(not(test))]
fn step() -> Result<()> {
    Ok(())
}

#[cfg(test)]
use tests::step;

#[cfg(test)]
mod tests;
