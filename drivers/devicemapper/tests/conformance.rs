//! The suite on every kind of pool and filesystem.

mod common;

use common::{Pool, Rig, no_devicemapper};
use graphdriver_core::{
    Context, GraphDriver, LayerId, LayerOptions, Result,
    conformance::{self, Missing, Setup, Subject},
};
use std::process::ExitCode;

fn main() -> ExitCode {
    conformance::main(vec![
        setup("xfs::loop", Pool::Loop, &[("dm.fs", "xfs")]),
        setup("ext4::loop", Pool::Loop, &[("dm.fs", "ext4")]),
        setup("ext4::given_pool", Pool::Given, &[("dm.fs", "ext4")]),
        setup("xfs::given_pool", Pool::Given, &[("dm.fs", "xfs"), ("dm.blkdiscard", "true")]),
    ])
}

fn setup(name: &str, pool: Pool, options: &'static [(&'static str, &'static str)]) -> Setup {
    Setup::new(format!("devicemapper::{name}"), move || {
        if let Some(what) = no_devicemapper() {
            return Err(Missing::only_in_guest(what));
        }
        Ok(Box::new(OnPool(Rig::new(pool, options).map_err(Missing::failed)?)))
    })
}

struct OnPool(Rig);

impl Subject for OnPool {
    fn driver(&self) -> &dyn GraphDriver {
        self.0.driver()
    }

    fn reopen(&mut self) -> Result<()> {
        self.0.reopen()
    }

    /// A layer whose filesystem is still to be grown, as after a crash in the middle of making it larger.
    fn crash(&self) -> Option<Box<dyn Fn(LayerId) -> Result<()> + '_>> {
        Some(Box::new(|id| {
            self.0.driver().create(id, &[], &LayerOptions::default())?;
            self.0
                .edit(|state| state["layers"][id.to_string()]["phase"] = "making".into())
                .doing(|| "leaving a half layer")
        }))
    }

    /// xfs clears 2 MiB of its log at each mount.
    fn overhead(&self) -> u64 {
        3 << 20
    }

    fn least_size(&self) -> u64 {
        common::BASE_SIZE
    }
}
