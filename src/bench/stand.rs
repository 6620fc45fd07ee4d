//! A driver, or a plain directory, on a fresh device: the image to begin with, and the containers that are written to.

use super::{
    device::Traffic,
    medium::{Kind, Medium, patiently, settle},
    plan::Plan,
};
use crate::{progress::Cancel, registry};
use graphdriver_core::{
    Access, CommitInfo, Context, Error, ErrorKind, LayerId, LayerKind, LayerOptions, Layers, NewLayer, Options, Result,
    Root, mount, tar,
};
use nix::sched::{CloneFlags, unshare};
use rustix::fs::{sync, syncfs};
use std::{
    fs::{self, File},
    io::{self, Write},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::{Path, PathBuf},
};

/// What a plan says, set up anew. Nothing of it is left when it is dropped.
pub(super) struct Stand {
    // In the order in which they have to go.
    containers: Vec<Container>,
    tree: Tree,
    driver: Option<&'static str>,
    options: Options,
    medium: Medium,
}

enum Tree {
    Layered {
        layers: Box<Layers>,
        image: Vec<LayerId>,
    },
    Plain,
    /// Between two openings.
    Closed,
}

/// A writable layer, or directory, that a workload writes to.
pub(super) struct Container {
    layer: Option<LayerId>,
    path: PathBuf,
    dir: File,
    /// Shown nowhere, so that it is gone when this is.
    mount: Option<OwnedFd>,
    in_user_space: bool,
}

impl Container {
    /// Its root. Not for those who resolve symlinks themselves: see [`Stand::attached`].
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Stand {
    /// Makes the filesystem and opens the driver on it; `size` is the device's, `volume` that of devicemapper's layers.
    pub fn new(plan: &Plan, scratch: &Path, size: u64, volume: u64) -> Result<Stand> {
        let medium = Medium::new(plan.kind, scratch, size)?;
        let options = placed(plan, &medium, volume);
        let (containers, tree) = (Vec::new(), Tree::Closed);
        let mut stand = Stand { containers, tree, driver: plan.driver, options, medium };
        stand.open(Vec::new())?;
        Ok(stand)
    }

    fn open(&mut self, image: Vec<LayerId>) -> Result<()> {
        let Some(driver) = self.driver else {
            self.tree = Tree::Plain;
            return Ok(());
        };
        let root = self.medium.root();
        let factory = registry::choose(root, Some(driver), &self.options)?;
        let opened = registry::open(&factory, root, &self.options)?;
        let layers = Layers::open(&registry::store_dir(root, driver), opened, &[])?;
        self.tree = Tree::Layered { layers: Box::new(layers), image };
        Ok(())
    }

    /// Why the driver does not work there, if so.
    pub fn unmet(plan: &Plan, medium: &Medium, volume: u64) -> Option<graphdriver_core::Unmet> {
        registry::status(plan.driver?, medium.root(), &placed(plan, medium, volume)).unmet
    }

    /// How its driver keeps old data.
    pub fn strategy(&self) -> Option<String> {
        match &self.tree {
            Tree::Layered { layers, .. } => Some(layers.driver().capabilities().write_strategy.to_string()),
            Tree::Plain | Tree::Closed => None,
        }
    }

    /// The most layers a container may lie on.
    pub fn max_depth(&self) -> usize {
        match &self.tree {
            Tree::Layered { layers, .. } => layers.driver().capabilities().max_depth,
            Tree::Plain | Tree::Closed => usize::MAX,
        }
    }

    pub fn medium(&self) -> &Medium {
        &self.medium
    }

    /// What the first container is asked to be mounted with, without places, which are others each time; None of a plain
    /// directory.
    pub fn recipe_options(&self) -> Result<Option<String>> {
        // A program that serves a layer is started by asking, and has its options from the driver's.
        let asked = self.containers.first().filter(|container| !container.in_user_space);
        let layer = asked.and_then(|container| container.layer);
        let (Tree::Layered { layers, .. }, Some(layer)) = (&self.tree, layer) else { return Ok(None) };
        let recipe = layers.mount(layer, Access::ReadWrite)?;
        let options = recipe.iter().flat_map(|step| &step.options).map(String::as_str);
        let options = options.filter(|option| !option.contains('/') && !option.starts_with("lowerdir"));
        Ok(Some(["rw"].into_iter().chain(options.filter(|option| *option != "rw")).collect::<Vec<_>>().join(",")))
    }

    /// Adds a layer to the image, on top of the others. A plain directory has all of them in one place.
    pub fn layer(&mut self, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        match &mut self.tree {
            Tree::Plain | Tree::Closed => {
                let dir = image_dir(&self.medium);
                fs::create_dir_all(&dir)?;
                fill(&dir)
            }
            Tree::Layered { layers, image } => {
                let new = layers.create(LayerKind::Active, image.last().copied(), &LayerOptions::default())?;
                let filled = shown(layers, new.id())?;
                fill(filled.path())?;
                drop(filled);
                layers.driver().release(new.id())?;
                // A program that serves the layer may take a moment to be gone.
                commit(&new)?;
                layers.store().write(|tx| new.keep(tx, None))?;
                image.push(new.id());
                Ok(())
            }
        }
        .doing(|| "filling the image")
    }

    /// A further container on the image, mounted. Of plain directories the first is the image itself, others are copies.
    pub fn container(&mut self) -> Result<()> {
        let made = match &self.tree {
            Tree::Plain | Tree::Closed => self.plain_container(),
            Tree::Layered { layers, image } => {
                let options = LayerOptions { durable: true, ..LayerOptions::default() };
                let new = layers.create(LayerKind::Active, image.last().copied(), &options)?;
                layers.store().write(|tx| new.keep(tx, None))?;
                shown(layers, new.id())
            }
        };
        self.containers.push(made.doing(|| "making a container")?);
        Ok(())
    }

    fn plain_container(&self) -> Result<Container> {
        let image = image_dir(&self.medium);
        let path = match self.containers.len() {
            0 => image,
            n => {
                let path = self.medium.root().join(format!("copy{n}"));
                copy_tree(&image, &path)?;
                path
            }
        };
        Ok(directory(path)?)
    }

    pub fn containers(&self) -> &[Container] {
        &self.containers
    }

    /// Calls `work` with a path to the container's root that has no symlink in it: for the time being it is mounted there,
    /// for the thread alone that `work` runs on. In the namespace that a program which serves the layer lives in, mount and
    /// program would keep each other if this process were killed.
    pub fn attached<T: Send>(&self, container: &Container, work: impl FnOnce(&Path) -> Result<T> + Send) -> Result<T> {
        let Some(mounted) = &container.mount else { return work(&container.path) };
        let dir = tempfile::Builder::new().prefix("graphdriver-bench-").tempdir()?;
        let alone = || {
            unshare(CloneFlags::CLONE_NEWNS).map_err(io::Error::from).doing(|| "making a mount namespace")?;
            mount::attach(mounted.as_fd(), File::open(dir.path())?.as_fd())?;
            let done = work(dir.path());
            // The mount itself lives on, by its descriptor.
            mount::unmount(dir.path(), true)?;
            done
        };
        std::thread::scope(|scope| scope.spawn(alone).join()).unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// Returns when all that was written is on the device, if only in a log.
    pub fn sync(&self) -> Result<()> {
        if self.containers.iter().any(|container| container.in_user_space) {
            // The kernel's page cache of such a filesystem is out of syncfs(2)'s reach.
            sync();
        }
        // Layers of ZFS are in the pool.
        if self.medium.pool().is_none() {
            for container in &self.containers {
                syncfs(&container.dir).doing(|| "syncing a container")?;
            }
        }
        self.medium.sync()
    }

    /// After a sync: has written to their places what is in a log alone, so that nothing more follows.
    pub fn settle(&self) -> Result<()> {
        match self.medium.kind() {
            Kind::Whole => self.containers.iter().try_for_each(|container| settle(&container.dir)),
            Kind::Zfs => Ok(()),
            _ => settle(&File::open(self.medium.root())?),
        }
    }

    /// Forgets what is cached of what is on the device, so that reading begins there. Containers are mounted anew.
    /// Returns the bytes in use meanwhile, when nothing is open that has taken some in advance.
    pub fn forget(&mut self) -> Result<u64> {
        let containers: Vec<_> = self.containers.drain(..).map(|container| (container.layer, container.path)).collect();
        // Its pool goes on, and what is cached of thin devices goes with their mounts.
        if self.medium.kind() == Kind::Whole {
            let used = self.medium.used()?;
            return self.show(containers).map(|()| used);
        }
        let image = match std::mem::replace(&mut self.tree, Tree::Closed) {
            Tree::Layered { image, .. } => image,
            Tree::Plain | Tree::Closed => Vec::new(),
        };
        self.medium.forget().doing(|| "dropping caches")?;
        let used = self.medium.used()?;
        self.open(image)?;
        self.show(containers).map(|()| used)
    }

    fn show(&mut self, containers: Vec<(Option<LayerId>, PathBuf)>) -> Result<()> {
        for (layer, path) in containers {
            self.containers.push(match (&self.tree, layer) {
                (Tree::Layered { layers, .. }, Some(layer)) => {
                    layers.driver().release(layer)?;
                    shown(layers, layer)?
                }
                _ => directory(path)?,
            });
        }
        Ok(())
    }

    pub fn traffic(&self) -> Result<Traffic> {
        self.medium.device().traffic()
    }

    /// Bytes that the containers hold, without what they share with the image. None where there are no layers: the first
    /// plain directory is its image.
    pub fn space(&self) -> Result<Option<u64>> {
        let Tree::Layered { layers, .. } = &self.tree else { return Ok(None) };
        let ids = self.containers.iter().filter_map(|container| container.layer);
        ids.map(|layer| Ok(layers.usage(layer)?.bytes)).sum::<Result<u64>>().map(Some)
    }

    /// Bytes of the containers' layer tars; None where there are no layers.
    pub fn diff(&self, cancel: &Cancel) -> Result<Option<u64>> {
        let Tree::Layered { layers, image } = &self.tree else { return Ok(None) };
        let lower = match image.last() {
            Some(top) => Some(Root::from_fd(mount::detached(&layers.mount(*top, Access::ReadOnly)?)?)),
            None => None,
        };
        let mut size = Size { bytes: 0, cancel };
        for container in &self.containers {
            let layer = container.layer.expect("those of a driver have one");
            let upper = Root::open(&container.path)?;
            let native = layers.driver().native_diff();
            let mut narrow = native.map(|native| native.narrow(layer, &layers.parents(layer)?)).transpose()?;
            let narrow = narrow.as_mut().map(|n| &mut **n as &mut dyn graphdriver_core::Narrow);
            size = tar::diff_tar(lower.as_ref(), &upper, narrow, io::BufWriter::with_capacity(1 << 17, size))?
                .into_inner()
                .map_err(io::IntoInnerError::into_error)?;
        }
        Ok(Some(size.bytes))
    }

    /// Where devices would stay behind, they are removed with their layers.
    fn remove_layers(&self) -> Result<()> {
        let Tree::Layered { layers, .. } = &self.tree else { return Ok(()) };
        let mut all: Vec<LayerId> = layers.list()?.iter().map(|layer| layer.id).collect();
        all.sort_unstable_by_key(|id| std::cmp::Reverse(*id));
        layers.store().write(|tx| all.iter().try_for_each(|id| layers.remove_in(tx, *id)))?;
        patiently(|| match layers.sweep()? {
            0 => Ok(()),
            n => Err(Error::new(ErrorKind::Busy, format!("{n} layers are in use"))),
        })
    }
}

impl Drop for Stand {
    fn drop(&mut self) {
        self.containers.clear();
        if self.medium.kind() == Kind::Whole
            && let Err(e) = self.remove_layers()
        {
            tracing::warn!("devices of devicemapper may be left, see dmsetup ls: {e}");
        }
    }
}

/// The driver's options with those that say where its data are.
pub(super) fn placed(plan: &Plan, medium: &Medium, volume: u64) -> Options {
    let mut options = plan.options.clone();
    if let Some(pool) = medium.pool() {
        options.0.push(("zfs.fsname".into(), pool.into()));
    }
    if medium.kind() == Kind::Whole {
        options.0.push(("dm.directlvm_device".into(), medium.device().path().display().to_string()));
        options.0.push(("dm.fs".into(), plan.filesystem.clone()));
        if options.get("dm.basesize").is_none() {
            options.0.push(("dm.basesize".into(), volume.to_string()));
        }
    }
    options
}

fn directory(path: PathBuf) -> io::Result<Container> {
    let dir = File::open(&path)?;
    Ok(Container { layer: None, path, dir, mount: None, in_user_space: false })
}

fn image_dir(medium: &Medium) -> PathBuf {
    medium.root().join("image")
}

/// Mounts a layer for writing, nowhere.
fn shown(layers: &Layers, layer: LayerId) -> Result<Container> {
    let recipe = layers.mount(layer, Access::ReadWrite)?;
    let mounted = mount::detached(&recipe)?;
    let dir = File::open(format!("/proc/self/fd/{}", mounted.as_raw_fd())).doing(|| "opening a layer's root")?;
    let path = PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd()));
    let in_user_space = recipe.iter().any(|step| step.fstype.starts_with("fuse."));
    Ok(Container { layer: Some(layer), path, dir, mount: Some(mounted), in_user_space })
}

/// The layer's last mount may have ended only just now.
fn commit(new: &NewLayer<'_>) -> Result<()> {
    let mut tries = 0;
    loop {
        match new.commit(&CommitInfo::default()) {
            Err(e) if e.kind() == ErrorKind::Busy && tries < 500 => tries += 1,
            other => return other,
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

fn copy_tree(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        match entry.file_type()?.is_dir() {
            true => copy_tree(&entry.path(), &target)?,
            // fs::copy and io::copy would share the data where the filesystem can.
            false => fs::write(target, fs::read(entry.path())?)?,
        }
    }
    Ok(())
}

/// Counts what is written.
struct Size<'a> {
    bytes: u64,
    cancel: &'a Cancel,
}

impl Write for Size<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.cancel.check()?;
        self.bytes += buf.len() as u64;
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
