//! What the runs of the suite share. Each is a program of its own, because quotas are on or off for a whole filesystem,
//! and a program's cases share one.

use graphdriver_btrfs::FACTORY;
use graphdriver_core::{
    Context, LayerId, Options, Result,
    conformance::{self, BackingKind, Setup},
};
use std::{fs, path::Path, process::ExitCode};

/// The `main` of a run.
pub fn main(name: &str, options: &[(&str, &str)]) -> ExitCode {
    let options = Options(options.iter().map(|(n, v)| (n.to_string(), v.to_string())).collect());
    conformance::main(vec![Setup::driver_with(name, FACTORY, BackingKind::Btrfs, options, Some(crash))])
}

/// A layer half made, one half removed with a subvolume nested in it, and a snapshot that somebody was reading.
fn crash(home: &Path, id: LayerId) -> Result<()> {
    let layers = home.join("layers");
    for name in [format!("new-{id}"), format!("removed-{id}"), format!("removed-{id}/nested")] {
        make(&layers.join(name))?;
    }
    Ok(())
}

fn make(path: &Path) -> Result<()> {
    btrfsutil::subvolume::Subvolume::create(path, None)
        .map_err(std::io::Error::other)
        .doing(|| "leaving half a layer")?;
    fs::write(path.join("file"), "x").doing(|| "leaving half a layer")
}
