//! The id-mapped mounts that show snapshots with their containers' ids, one for each at `STORE/idmapped/LAYER`.
//!
//! They belong to the snapshot's row: a mount is attached only while there is one that wants it, and what has none is undone
//! at the next [`tidy`](Places::tidy). Whoever is told of a mount has it made again if it is not there, as after a boot.
//!
//! containerd mounts what lies there, so it has to be in containerd's mount namespace, and a sandbox may have given us another.

use super::labels::IdMaps;
use graphdriver_core::{
    Context, Error, ErrorKind, LayerId, Mount, Result,
    mount::{self, IdMapped},
};
use nix::sched::CloneFlags;
use rustix::{
    fs::{AtFlags, CWD, Mode, OFlags, StatxAttributes, StatxFlags},
    io::Errno,
    mount::MountPropagationFlags,
};
use std::{
    collections::HashSet,
    fs::{self, DirBuilder, File},
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::{DirBuilderExt, MetadataExt},
    },
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

/// Where all of a store's are.
pub(super) fn dir(store: &Path) -> PathBuf {
    store.join("idmapped")
}

/// The places of the mounts. One thing is done with them at a time.
pub(super) struct Places {
    dir: PathBuf,
    turn: Mutex<()>,
}

/// A mount that is attached nowhere yet.
pub(super) struct Ready(OwnedFd);

impl Places {
    pub(super) fn of(store: &Path) -> Places {
        Places { dir: dir(store), turn: Mutex::new(()) }
    }

    fn place(&self, layer: LayerId) -> PathBuf {
        self.dir.join(layer.to_string())
    }

    fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the mount for a recipe that shows the layer, which nobody else knows yet, for that process.
    pub(super) fn ready(&self, layer: LayerId, recipe: &[Mount], maps: &IdMaps, mounter: Option<u32>) -> Result<Ready> {
        let userns = maps.user_namespace()?;
        let plan = IdMapped::plan(recipe, &self.place(layer))?;
        with(mounter, || plan.mount(userns.as_fd())).map(Ready)
    }

    /// Has the mount in its place for that process, `ready` or made now, and tells the recipe that leads there. `still` fails
    /// if there is no such snapshot any more.
    pub(super) fn show(
        &self,
        layer: LayerId,
        recipe: &[Mount],
        maps: &IdMaps,
        ready: Option<Ready>,
        mounter: Option<u32>,
        still: impl FnOnce() -> Result<()>,
    ) -> Result<Vec<Mount>> {
        let place = self.place(layer);
        let plan = IdMapped::plan(recipe, &place)?;
        let _turn = self.turn();
        still()?;
        let attached = with(mounter, || {
            if is_mounted(&place)? {
                return Ok(());
            }
            let mount = match ready {
                Some(Ready(mount)) => mount,
                None => plan.mount(maps.user_namespace()?.as_fd())?,
            };
            attach(mount, &place)
        });
        attached.doing(|| format!("mapping ids at {}", place.display()))?;
        Ok(plan.recipe().to_vec())
    }

    /// Undoes the mount of a layer, if there is one. What containerd has made of it stays.
    pub(super) fn take_down(&self, layer: LayerId) {
        let _turn = self.turn();
        let place = self.place(layer);
        if place.exists() {
            take_down(&place).unwrap_or_else(|e| tracing::warn!("{e}"));
        }
    }

    /// Undoes the mounts of all layers but those that `wanted` tells. Whether there were any.
    pub(super) fn tidy(&self, wanted: impl FnOnce() -> Result<HashSet<LayerId>>) -> Result<bool> {
        let _turn = self.turn();
        let names = match fs::read_dir(&self.dir) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(false),
            entries => entries.doing(|| format!("reading {}", self.dir.display()))?,
        };
        let wanted = wanted()?;
        let layers = names.flatten().filter_map(|name| name.file_name().to_str()?.parse::<LayerId>().ok());
        let left: Vec<_> = layers.filter(|layer| !wanted.contains(layer)).collect();
        left.iter().try_for_each(|layer| take_down(&self.place(*layer)))?;
        Ok(!left.is_empty())
    }
}

/// Does `work` in the mount namespace of a process. Fails with `Unsupported` or `PermissionDenied` where there is no way.
fn with<T: Send>(process: Option<u32>, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let Some(process) = process else {
        return Err(Error::new(ErrorKind::Unsupported, "the process that will mount it is out of sight"));
    };
    let path = format!("/proc/{process}/ns/mnt");
    let number = |path: &str| Ok::<_, Error>(fs::metadata(path).doing(|| format!("reading {path}"))?.ino());
    if number(&path)? == number("/proc/self/ns/mnt")? {
        return work();
    }
    let namespace = File::open(&path).doing(|| format!("opening {path}"))?;
    let there = || {
        // setns(2): not while the root is shared with other threads.
        nix::sched::unshare(CloneFlags::CLONE_FS)
            .and_then(|()| nix::sched::setns(&namespace, CloneFlags::CLONE_NEWNS))
            .map_err(std::io::Error::from)
            .doing(|| format!("entering the mount namespace of process {process}"))
            .hint(|| "it needs CAP_SYS_ADMIN, CAP_SYS_CHROOT and CAP_SYS_PTRACE")?;
        work()
    };
    std::thread::scope(|scope| scope.spawn(there).join()).unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn is_mounted(place: &Path) -> Result<bool> {
    match rustix::fs::statx(CWD, place, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::empty()) {
        Ok(found) => Ok(found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT)),
        Err(Errno::NOENT) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

fn attach(mount: OwnedFd, place: &Path) -> Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(place).doing(|| "making the mount point")?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    mount::attach(mount.as_fd(), rustix::fs::open(place, flags, Mode::empty())?.as_fd())?;
    // Where the host's mounts are shared with other namespaces, so is this one, and is undone there too. But what is mounted
    // in a container's tree is not to appear here.
    rustix::mount::mount_change(place, MountPropagationFlags::PRIVATE).doing(|| "making the mount private")
}

/// Here and in all namespaces: as its mount point goes, the kernel undoes the mount wherever else it is (`vfs_rmdir`).
fn take_down(place: &Path) -> Result<()> {
    while let unmounted = mount::unmount(place, true)
        && unmounted.as_ref().map_err(Error::kind) != Err(ErrorKind::NotFound)
    {
        unmounted?;
    }
    match fs::remove_dir(place) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e).doing(|| format!("removing {}", place.display())),
        _ => Ok(()),
    }
}
