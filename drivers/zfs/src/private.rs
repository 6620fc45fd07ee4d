//! Mounts that nobody else sees.

use graphdriver_core::{
    Context, ErrorKind, Mount, Result,
    mount::{self, MountInfo},
};
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
/// programs it starts see these mounts, and they are gone afterwards, also after a kill. None, and nothing was run, where
/// another mount of the same datasets cannot be taken away.
pub(crate) fn with_mounts<T: Send>(
    mounts: &[(PathBuf, Vec<Mount>)],
    run: impl FnOnce() -> Result<T> + Send,
) -> Result<Option<T>> {
    let work = || {
        unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_FS)
            .map_err(std::io::Error::from)
            .doing(|| "making a mount namespace")?;
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
        if !hide(mounts)? {
            return Ok(None);
        }
        for (target, recipe) in mounts {
            show(target, recipe)?;
        }
        let done = run();
        // Here and not with the namespace, which ends some time after the thread.
        for (target, _) in mounts {
            mount::unmount(target, false)?;
        }
        done.map(Some)
    };
    std::thread::scope(|scope| scope.spawn(work).join()).unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Takes away other mounts of the same datasets, of which `zfs diff` would take one for its paths. Those who have them in
/// their own namespaces keep them. Returns whether there are none left: something else can be mounted over them.
fn hide(mounts: &[(PathBuf, Vec<Mount>)]) -> Result<bool> {
    for mounted in others(mounts)?.into_iter().rev() {
        match mount::unmount(&mounted.mount_point, true) {
            // Its mount point is covered.
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            done => done?,
        }
    }
    Ok(others(mounts)?.is_empty())
}

fn others(mounts: &[(PathBuf, Vec<Mount>)]) -> Result<Vec<MountInfo>> {
    let shown = |source: &OsStr| mounts.iter().flat_map(|(_, recipe)| recipe).any(|step| step.source == source);
    Ok(mount::table()?.into_iter().filter(|m| m.fstype == "zfs" && shown(&m.source)).collect())
}

fn show(target: &Path, recipe: &[Mount]) -> Result<()> {
    let detached = mount::detached(recipe)?;
    let place = fs::openat(CWD, target, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    mount::attach(detached.as_fd(), place.as_fd())
}
