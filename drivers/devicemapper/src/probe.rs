//! Whether the driver would work here, without leaving anything.

use crate::{
    dm::Kernel,
    filesystem,
    options::{From, Wishes},
    state::State,
};
use graphdriver_core::{Capabilities, Context, Error, ErrorKind, Options, Result, Unmet, WriteStrategy};
use std::path::Path;

/// No depth costs anything, as a thin device maps all its blocks itself; the number only has to end somewhere.
const MAX_PARENTS: usize = 100_000;

pub(crate) fn probe(home: &Path, options: &Options) -> Result<Capabilities, Unmet> {
    look(home, options).map_err(|e| Unmet {
        missing: e.to_string().replace(&format!(" ({})", e.hint_text().unwrap_or_default()), ""),
        remedy: e.hint_text().unwrap_or("see the kernel's log: dmesg").into(),
    })
}

fn look(home: &Path, options: &Options) -> Result<Capabilities> {
    let wishes = Wishes::parse(options)?;
    if !rustix::process::geteuid().is_root() {
        let e = Error::new(ErrorKind::PermissionDenied, "only root may use device-mapper");
        return Err(e.hint("run as root, or choose vfs-fuse"));
    }
    Kernel::open()?.need_thin_pools()?;
    filesystem::choose(wishes.fs)?;
    if matches!(wishes.from, From::Loop { .. }) && !Path::new("/dev/loop-control").exists() {
        return Err(Error::new(ErrorKind::Unsupported, "the kernel has no loop devices").hint("modprobe loop"));
    }
    let state = State::load(home).doing(|| "looking at the pool there is")?;
    Ok(capabilities(state.map(|state| state.block).or(wishes.block).unwrap_or(64 << 10)))
}

/// dm-thin gives a block that is written for the first time since a snapshot a new place and copies the rest of the old one
/// there: a read and a write besides the data's own, of whole blocks, which is what counts here.
pub(crate) fn capabilities(block: u64) -> Capabilities {
    Capabilities {
        write_strategy: WriteStrategy::BlockCopyOnWrite { block },
        quota: true,
        inode_quota: false,
        native_diff: true,
        idmapped_mounts: true,
        independent_layers: false,
        max_depth: MAX_PARENTS,
    }
}
