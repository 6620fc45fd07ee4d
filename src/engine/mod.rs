//! What the command line does, as a library.

mod build;
mod check;
mod containers;
mod copy;
mod diff;
mod events;
mod find;
mod images;
mod info;
mod inspect;
mod load;
mod mounts;
mod quota;
mod save;
mod schema;
mod sight;
mod snapshots;
mod space;

pub use build::CommitOptions;
pub use check::{Checked, Finding, FindingKind};
pub use containers::{ContainerSummary, CreateOptions};
pub use copy::CopyOptions;
pub use events::{Event, EventFilter};
pub use images::{HistoryEntry, ImageSummary, Removed};
pub use info::Info;
pub use load::Loaded;
pub use mounts::{MountSummary, Mounted};
pub use quota::{LimitChange, QuotaSummary};
pub use snapshots::{Difference, Figures, Labels, Snapshot, SnapshotSpace, Snapshots};
pub use space::{ContainerSpace, DiskUsage, ImageSpace};

use crate::{
    config::Settings,
    progress::{Cancel, Progress, Silent},
    registry,
};
use graphdriver_core::{
    Access, Context, Error, ErrorKind, LayerId, Result, Root, mount,
    store::{Layers, reserve},
};
use std::{
    fs::File,
    os::unix::fs::DirBuilderExt,
    path::PathBuf,
    time::{SystemTime, UNIX_EPOCH},
};

/// Images, containers and mounts of one data root under one storage driver.
///
/// Several engines, in one process or many, may be open on the same root at once: each call is one transaction, or an
/// intent, the slow work, and one transaction. What a killed process left behind is undone when the next one opens.
pub struct Engine {
    layers: Layers,
    settings: Settings,
    progress: Box<dyn Progress>,
    cancel: Cancel,
}

impl Engine {
    /// Opens the data root, making it if it does not exist, and finishes or undoes what a crash interrupted.
    pub fn open(settings: Settings) -> Result<Engine> {
        let factory =
            registry::choose(&settings.data_root, settings.storage_driver.as_deref(), &settings.storage_opts)?;
        let dir = registry::store_dir(&settings.data_root, factory.name);
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(&settings.data_root)
            .doing(|| format!("making the data root {}", settings.data_root.display()))
            .hint(|| "pass --root DIR for a directory you may write to, or run as root")?;
        tracing::debug!(driver = factory.name, root = %settings.data_root.display(), "opening the store");
        // Drivers set up their home and try out the kernel there when they are opened, which no two do at once.
        let turn = File::open(&settings.data_root).doing(|| "opening the data root")?;
        turn.lock().doing(|| format!("locking {}", settings.data_root.display()))?;
        reserve::spend(&dir)?;
        let driver = registry::open(&factory, &settings.data_root, &settings.storage_opts)?;
        drop(turn);
        let layers = Layers::open(&dir, driver, &[schema::SCHEMA])
            .doing(|| format!("opening the store in {}", dir.display()))?;
        reserve::keep(&dir);
        let engine = Engine { layers, settings, progress: Box::new(Silent), cancel: Cancel::default() };
        engine.release_unused()?;
        Ok(engine)
    }

    /// Opens a data root that is there, and leaves what a crash interrupted as it is.
    ///
    /// Fails with `NotFound` if there is none.
    pub fn open_as_it_is(settings: Settings) -> Result<Engine> {
        let root = &settings.data_root;
        let factory = registry::choose(root, settings.storage_driver.as_deref(), &settings.storage_opts)?;
        let dir = registry::store_dir(root, factory.name);
        if !dir.join("store.db").exists() && !dir.join("records").exists() {
            let why = format!("there is no store of storage driver {} in {}", factory.name, root.display());
            return Err(Error::new(ErrorKind::NotFound, why).hint("name another with --root or --storage-driver"));
        }
        let turn = File::open(root).doing(|| "opening the data root")?;
        turn.lock().doing(|| format!("locking {}", root.display()))?;
        let driver = registry::open(&factory, root, &settings.storage_opts)?;
        drop(turn);
        let layers = Layers::open_as_it_is(&dir, driver, &[schema::SCHEMA])
            .doing(|| format!("opening the store in {}", dir.display()))?;
        Ok(Engine { layers, settings, progress: Box::new(Silent), cancel: Cancel::default() })
    }

    /// Sends what long work reports to `progress`.
    pub fn report_to(&mut self, progress: Box<dyn Progress>) {
        self.progress = progress;
    }

    /// Makes long work stop when `cancel` is set.
    pub fn cancel_by(&mut self, cancel: Cancel) {
        self.cancel = cancel;
    }

    /// What stops long work of this engine.
    pub fn cancel(&self) -> &Cancel {
        &self.cancel
    }

    /// The settings in force.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Scratch space on the data root's filesystem, removed when the engine is dropped, or after a crash.
    pub fn temporary_dir(&self) -> Result<PathBuf> {
        self.layers.tmp_dir()
    }

    /// The tree of a layer on top of its parents, mounted nowhere: it is gone when dropped, a crash included.
    fn view(&self, layer: LayerId) -> Result<Root> {
        let recipe = self.layers.mount(layer, Access::ReadOnly)?;
        mount::detached(&recipe).map(Root::from_fd).doing(|| format!("looking into layer {layer}"))
    }
}

/// Nanoseconds since 1970 as text.
fn stamp(nanos: i64) -> String {
    jiff::Timestamp::from_nanosecond(nanos.into()).map(|time| time.to_string()).unwrap_or_default()
}

fn rfc3339<S: serde::Serializer>(nanos: &i64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&stamp(*nanos))
}

/// Nanoseconds since 1970.
fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as i64)
}
