//! Mounts that nobody else sees.

use graphdriver_core::{Context, Mount, Result, mount};
use nix::sched::{CloneFlags, unshare};
use rustix::{
    fs::{self, CWD, Mode, OFlags},
    mount::{MountPropagationFlags, mount_change},
};
use std::{
    ffi::OsStr,
    os::fd::AsFd,
    path::{Path, PathBuf},
};

/// Runs `run` on a thread with a mount namespace of its own, where each recipe is carried out at its directory. The
/// programs it starts see these mounts, and they are gone afterwards, also after a kill.
pub(crate) fn with_mounts<T: Send>(
    mounts: &[(PathBuf, Vec<Mount>)],
    run: impl FnOnce() -> Result<T> + Send,
) -> Result<T> {
    let work = || {
        unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_FS)
            .map_err(std::io::Error::from)
            .doing(|| "making a mount namespace")?;
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
        hide(mounts)?;
        for (target, recipe) in mounts {
            show(target, recipe)?;
        }
        let done = run();
        // Here and not with the namespace, which ends some time after the thread.
        for (target, _) in mounts {
            mount::unmount(target, false)?;
        }
        done
    };
    std::thread::scope(|scope| scope.spawn(work).join()).unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Takes away other mounts of the same datasets, of which `zfs diff` would take one for its paths. Those who have them in
/// their own namespaces keep them.
fn hide(mounts: &[(PathBuf, Vec<Mount>)]) -> Result<()> {
    let shown = |source: &OsStr| mounts.iter().flat_map(|(_, recipe)| recipe).any(|step| step.source == source);
    for mounted in mount::table()?.into_iter().rev().filter(|m| m.fstype == "zfs" && shown(&m.source)) {
        mount::unmount(&mounted.mount_point, true)?;
    }
    Ok(())
}

fn show(target: &Path, recipe: &[Mount]) -> Result<()> {
    let detached = mount::detached(recipe)?;
    let place = fs::openat(CWD, target, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    mount::attach(detached.as_fd(), place.as_fd())
}
