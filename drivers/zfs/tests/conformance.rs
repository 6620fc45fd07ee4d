//! The suite on a pool in a file, through the zfs command or through libzfs_core as this was built.

mod common;

use common::{Place, missing, root_of};
use graphdriver_core::{
    GraphDriver, LayerId, Result,
    conformance::{self, Missing, Setup, Subject},
};
use graphdriver_quota::refquota::zfs;
use graphdriver_zfs::Zfs;
use std::process::ExitCode;

fn main() -> ExitCode {
    let way = if cfg!(feature = "zfs-core") { "libzfs_core" } else { "command" };
    conformance::main(vec![Setup::new(format!("zfs::{way}"), || match missing() {
        Some(what) => Err(Missing::only_in_guest(what)),
        None => On::new().map(|on| Box::new(on) as Box<dyn Subject>).map_err(Missing::failed),
    })])
}

struct On {
    // Dropped before the place.
    driver: Zfs,
    place: Place,
}

impl On {
    fn new() -> Result<On> {
        let place = Place::new()?;
        Ok(On { driver: Zfs::open(place.home.path(), &place.options())?, place })
    }
}

impl Subject for On {
    fn driver(&self) -> &dyn GraphDriver {
        &self.driver
    }

    fn reopen(&mut self) -> Result<()> {
        self.driver = Zfs::open(self.place.home.path(), &self.place.options())?;
        Ok(())
    }

    /// As `driver.rs` sees it do on a plain dataset.
    fn keeps_capabilities(&self) -> Option<&'static str> {
        Some("ZFS leaves a file its capabilities when it is written to")
    }

    fn changes_times_by_refused_renames(&self) -> bool {
        true
    }

    /// A layer half made, and one half removed.
    fn crash(&self) -> Option<Box<dyn Fn(LayerId) -> Result<()> + '_>> {
        Some(Box::new(|id| {
            let root = root_of(self.place.home.path())?;
            for name in ["new", "removed"] {
                zfs(&["clone", &format!("{root}/empty@committed"), &format!("{root}/{name}-{id}")])?;
            }
            zfs(&["snapshot", &format!("{root}/removed-{id}@committed")]).map(drop)
        }))
    }
}
