//! The state of the whole: `graphdriver info`.

use super::{Engine, find, snapshots};
use graphdriver_core::{Capabilities, Context, Result};
use serde::Serialize;
use std::path::PathBuf;

/// What `graphdriver info` tells.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Info {
    /// The driver in use.
    pub storage_driver: String,
    /// What it says of itself.
    pub driver_status: Vec<(String, String)>,
    /// What it can do here.
    pub capabilities: Capabilities,
    /// Driver options in force.
    pub storage_options: Vec<(String, String)>,
    /// Where all data lies.
    pub data_root: PathBuf,
    /// The filesystem that holds it.
    pub data_root_filesystem: String,
    /// Bytes free there for this user.
    pub data_root_free: u64,
    /// `uname -r`.
    pub kernel_version: String,
    /// Version of this program.
    pub server_version: &'static str,
    /// How many.
    pub images: usize,
    /// How many.
    pub containers: usize,
    /// How many of containerd's.
    pub snapshots: usize,
    /// How many, committed and writable.
    pub layers: usize,
    /// How many mounts are there now.
    pub mounts: usize,
}

impl Engine {
    /// Looks at everything.
    pub fn info(&self) -> Result<Info> {
        let driver = self.layers.driver();
        let (images, containers, snapshots) = self
            .layers
            .store()
            .read(|db| Ok((find::images(db)?.len(), find::containers(db)?.len(), snapshots::row::count(db)?)))?;
        let root = self.settings.data_root.canonicalize().doing(|| "looking at the data root")?;
        let space = rustix::fs::statvfs(&root)?;
        let table = graphdriver_core::mount::table()?;
        let under = table.iter().filter(|m| root.starts_with(&m.mount_point));
        let filesystem = under
            .max_by_key(|m| (m.mount_point.as_os_str().len(), m.id))
            .map(|m| m.fstype.to_string_lossy().into_owned());
        Ok(Info {
            storage_driver: driver.name().into(),
            driver_status: driver.status(),
            capabilities: driver.capabilities().clone(),
            storage_options: self.settings.storage_opts.0.clone(),
            data_root_filesystem: filesystem.unwrap_or_default(),
            data_root_free: space.f_bavail * space.f_frsize,
            data_root: root,
            kernel_version: rustix::system::uname().release().to_string_lossy().into_owned(),
            server_version: env!("CARGO_PKG_VERSION"),
            images,
            containers,
            snapshots,
            layers: self.layers.list()?.len(),
            mounts: self.mounts()?.len(),
        })
    }
}
