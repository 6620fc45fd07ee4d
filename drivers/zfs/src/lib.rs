//! The zfs storage driver: a layer is a dataset, a committed one has a snapshot, children are clones of it.
//!
//! # On disk
//!
//! ```text
//! HOME/version            format, and the store's dataset
//! HOME/lock               flock(2): opening takes turns
//! HOME/mnt/from, mnt/to   where `zfs diff` sees datasets mounted, in a mount namespace of its own
//!
//! ROOT                    the store's dataset, FSNAME/graphdriver-ID of 12 hexadecimal digits; layers inherit its properties
//! ROOT/empty@committed    what layers without a parent are clones of
//! ROOT/ID                 a layer: a clone of its parent's snapshot
//! ROOT/ID@committed       there as soon as it is committed, and what is shown of it
//! ROOT/new-ID             a layer being created
//! ROOT/removed-ID         a layer being removed
//! ```
//!
//! A `zfs` command ends what it is doing although its process was killed. So `ROOT/new-ID` may appear after the recovery from
//! that crash; nobody takes it for a layer, and the next recovery frees it.
//!
//! `version` is text, `making` instead of `dataset` until that has been made:
//!
//! ```text
//! graphdriver zfs 1
//! dataset tank/graphdriver-0123456789ab
//! ```
//!
//! ROOT has the property `org.graphdriver:home`: the data directory it belongs to. Opened from any other one, which is a copy
//! or was moved, the store is refused.
//!
//! A committed layer's dataset has the property `readonly=on`, and once somebody has asked for its native diff
//! `org.graphdriver:links`: whether ZFS finds a path for every file of it (`changes.rs` says why that matters).
//!
//! # Mounts
//!
//! All mountpoints are `legacy`. A committed layer is shown by mounting its snapshot. ZFS has one superblock of a dataset and
//! refuses (EBUSY) to mount it read-only while it is mounted writable. So an active layer always has a writable superblock, and
//! a recipe that shows it read-only has a second step, which makes the mount itself so (`bind,remount,ro`).
//!
//! # Limits
//!
//! `size` is the property `refquota`: what the parent refers to and `size` more. What is overwritten in place of the
//! parent's files does not count, and what is deleted of them makes room.

mod changes;
mod home;
mod inventory;
#[cfg(feature = "zfs-core")]
mod library;
mod narrow;
mod options;
mod private;
mod probe;
mod storage;

use graphdriver_core::{
    Access, ByteSize, Capabilities, Context, DriverFactory, Error, ErrorKind, GraphDriver, LayerId, LayerOptions,
    Limits, Mount, Narrow, NativeDiff, Options, Reclaimed, Result, Root, Stored, Usage, WriteStrategy,
    mount::{self, MountInfo},
};
use graphdriver_quota::{
    Quota,
    refquota::{RefQuota, existing, list, no_inode_limit, number, numbers, objects, rows, set_property, zfs},
};
use home::Names;
use options::Wishes;
use probe::Support;
use std::{
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};
use storage::{Storage, storage};

/// How the engine finds this driver.
pub const FACTORY: DriverFactory = DriverFactory {
    name: "zfs",
    summary: "ZFS: layers are datasets, children are clones of snapshots",
    options: options::SPECS,
    probe: |home, options| probe::probe(home, options).map(|support| capabilities(&support)),
    open: |home, options| Ok(Box::new(Zfs::open(home, options)?)),
};

/// ZFS itself has no limit. The suite makes so many.
const MAX_PARENTS: usize = 255;

/// How long something that has just been unmounted may hold a dataset.
const PATIENCE: Duration = Duration::from_secs(5);

/// The same for all leftovers together, which every opening looks for until they are freed.
const PATIENCE_WITH_LEFTOVERS: Duration = Duration::from_secs(1);

/// Layers as datasets.
pub struct Zfs {
    home: PathBuf,
    names: Names,
    storage: Box<dyn Storage>,
    mount_options: Vec<String>,
    capabilities: Capabilities,
}

/// What ZFS says of a layer.
struct Layer {
    /// The snapshot it is a clone of.
    origin: String,
    /// Bytes it takes by itself.
    used: u64,
    committed: bool,
}

impl std::fmt::Debug for Zfs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Zfs").field("names", &self.names).finish_non_exhaustive()
    }
}

fn capabilities(support: &Support) -> Capabilities {
    Capabilities {
        write_strategy: WriteStrategy::RedirectOnWrite { block: support.recordsize },
        quota: true,
        inode_quota: false,
        native_diff: true,
        // OpenZFS 2.2 and newer; what an older one says is found out with the first mount.
        idmapped_mounts: true,
        independent_layers: false,
        max_depth: MAX_PARENTS,
    }
}

impl Zfs {
    /// Opens the data directory `home`, which is made if it is not there, and makes the store's dataset when it is opened
    /// first.
    ///
    /// Fails with `InvalidInput` for an option's wrong value and for a copied data directory, with `Unsupported` if ZFS does not work here, and with `NotFound`
    /// if the dataset with the layers is not there.
    pub fn open(home: &Path, options: &Options) -> Result<Zfs> {
        let open = || {
            let wishes = Wishes::parse(options)?;
            let home = std::path::absolute(home)?;
            let support = probe::support(&home, &wishes)?;
            let names = home::open(&home, wishes.fsname.as_deref())?;
            let capabilities = capabilities(&support);
            Ok(Zfs { home, names, storage: storage()?, mount_options: wishes.mount, capabilities })
        };
        open().map_err(|e: Error| e.doing(format!("opening zfs at {}", home.display())))
    }

    /// The dataset below which all layers are.
    pub fn dataset(&self) -> &str {
        self.names.root()
    }

    /// Fails with `NotFound` if there is no such layer.
    fn layer(&self, id: LayerId) -> Result<Layer> {
        let (name, committed) = (self.names.layer(id), self.names.committed(id));
        let found = list(&["origin", "used", "written"], &[&name, &committed])?;
        let of = |wanted: &str| found.iter().find(|row| row.name == wanted).map(|row| &row.values[..]);
        let Some([origin, used, _]) = of(&name) else {
            return Err(no_layer(id));
        };
        let frozen = of(&committed).map(|values| number(&values[2])).transpose()?;
        let used = frozen.map_or_else(|| number(used), Ok)?;
        Ok(Layer { origin: origin.clone(), used, committed: frozen.is_some() })
    }

    fn make(&self, id: LayerId, parents: &[LayerId], options: &LayerOptions) -> Result<()> {
        if options.inodes.is_some() {
            return Err(no_inode_limit());
        }
        if parents.len() > MAX_PARENTS {
            let why = format!("{} parents, and at most {MAX_PARENTS} are possible", parents.len());
            return Err(Error::new(ErrorKind::Unsupported, why));
        }
        let origin = parents.first().map_or(self.names.empty(), |parent| self.names.committed(*parent));
        let (name, new) = (self.names.layer(id), self.names.new_layer(id));
        let leftovers = [&new, &self.names.removed(id)];
        for leftover in self.check_present(&name, parents, leftovers)? {
            self.destroy(&leftover)?;
        }
        self.storage.clone(&origin, &new)?;
        let finish = || {
            if let Some(size) = options.size {
                self.limit(&new, &origin, size)?;
            }
            self.storage.rename(&new, &name)
        };
        finish().inspect_err(|_| drop(self.destroy(&new)))
    }

    /// Fails with `NotFound` without one of the parents, and with `AlreadyExists` if `name` is there. Returns which of the
    /// leftovers are.
    fn check_present(&self, name: &str, parents: &[LayerId], leftovers: [&String; 2]) -> Result<Vec<String>> {
        let below: Vec<String> = parents.iter().map(|parent| self.names.committed(*parent)).collect();
        let mut names: Vec<&str> = below.iter().map(String::as_str).collect();
        names.extend([name, leftovers[0], leftovers[1]]);
        let there = existing(&names)?;
        if let Some((missing, _)) = parents.iter().zip(&below).find(|(_, below)| !there.contains(below.as_str())) {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("its parent, committed layer {missing}, is not there"),
            ));
        }
        if there.contains(name) {
            return Err(Error::new(ErrorKind::AlreadyExists, "it is there already"));
        }
        Ok(leftovers.into_iter().filter(|name| there.contains(name.as_str())).cloned().collect())
    }

    /// Lets `dataset` refer to `size` bytes more than its origin.
    fn limit(&self, dataset: &str, origin: &str, size: ByteSize) -> Result<()> {
        let below = numbers(origin, &["referenced"])?[0];
        let size = Some(ByteSize(size.0.saturating_add(below)));
        RefQuota.set(Path::new(dataset), Limits { size, inodes: None })
    }

    fn freeze(&self, id: LayerId) -> Result<()> {
        let (name, committed) = (self.names.layer(id), self.names.committed(id));
        let there = existing(&[&name, &committed])?;
        if !there.contains(name.as_str()) {
            return Err(no_layer(id));
        }
        if !there.contains(committed.as_str()) {
            self.flush(id)?;
            self.storage.snapshot(&committed)?;
        }
        // Who has it mounted still cannot write to what nobody would see.
        set_property(&name, "readonly", "on")
    }

    /// Of a commit that nobody was told of, so that nothing is a clone of its snapshot.
    fn unfreeze(&self, id: LayerId) -> Result<()> {
        let (name, committed) = (self.names.layer(id), self.names.committed(id));
        let there = existing(&[&name, &committed])?;
        if !there.contains(name.as_str()) {
            return Err(no_layer(id));
        }
        // In this order: what is interrupted is repeated, but without its snapshot it would be mounted, and not writable.
        set_property(&name, "readonly", "off")?;
        if there.contains(committed.as_str()) {
            patiently(Instant::now() + PATIENCE, || zfs(&["destroy", &committed]).map(drop))?;
        }
        Ok(())
    }

    /// Has ZFS take what programs wrote through memory maps; a snapshot has only what ZFS knows of.
    fn flush(&self, id: LayerId) -> Result<()> {
        let root = Root::from_fd(mount::detached(&[self.head(&self.names.layer(id), false)])?);
        Ok(rustix::fs::syncfs(root.open_dir(Path::new(""))?)?)
    }

    /// The mount of a dataset itself.
    fn head(&self, dataset: &str, read_only: bool) -> Mount {
        let mut options = if read_only { vec!["ro".to_owned()] } else { Vec::new() };
        options.extend(self.mount_options.iter().cloned());
        Mount { fstype: "zfs".into(), source: dataset.into(), options }
    }

    fn recipe(&self, id: LayerId, access: Access) -> Result<Vec<Mount>> {
        let (name, committed) = (self.names.layer(id), self.names.committed(id));
        let there = existing(&[&name, &committed])?;
        if !there.contains(name.as_str()) {
            return Err(no_layer(id));
        }
        match (there.contains(committed.as_str()), access) {
            (true, Access::ReadOnly) => Ok(vec![self.head(&committed, true)]),
            (true, Access::ReadWrite) => {
                let why = format!("layer {id} is committed, and can be mounted for reading only");
                Err(Error::new(ErrorKind::InvalidInput, why))
            }
            (false, Access::ReadWrite) => Ok(vec![self.head(&name, false)]),
            (false, Access::ReadOnly) => {
                let mut options: Vec<String> = ["bind", "remount", "ro"].map(String::from).into();
                // mount(2) takes away what a remount does not name.
                options.extend(self.mount_options.iter().cloned());
                Ok(vec![self.head(&name, false), Mount { fstype: "bind".into(), source: name.into(), options }])
            }
        }
    }

    fn count(&self, id: LayerId) -> Result<Usage> {
        let layer = self.layer(id)?;
        let counted = if layer.committed { self.names.committed(id) } else { self.names.layer(id) };
        let inodes = match (objects(&counted)?, objects(&layer.origin)?) {
            (Some(all), Some(below)) => all.saturating_sub(below),
            _ => 0,
        };
        Ok(Usage { bytes: layer.used, inodes })
    }

    fn erase(&self, id: LayerId) -> Result<()> {
        let (name, committed) = (self.names.layer(id), self.names.committed(id));
        let (new, removed) = (self.names.new_layer(id), self.names.removed(id));
        let there = existing(&[&name, &committed, &new, &removed])?;
        for leftover in [&new, &removed].into_iter().filter(|name| there.contains(name.as_str())) {
            self.destroy(leftover)?;
        }
        if !there.contains(name.as_str()) {
            return Ok(());
        }
        refuse_mounted(&name)?;
        self.storage.rename(&name, &removed)?;
        self.destroy(&removed).or_else(|e| {
            // It stays as it was, unless its snapshot is gone already: what is left then has a name that nobody takes for a
            // layer, until removing is repeated.
            let snapshot = format!("{removed}@{}", home::COMMITTED);
            if !there.contains(committed.as_str()) || existing(&[&snapshot])?.len() == 1 {
                self.storage.rename(&removed, &name)?;
            }
            Err(e)
        })
    }

    /// Destroys a dataset with its snapshots, patiently.
    fn destroy(&self, dataset: &str) -> Result<()> {
        patiently(Instant::now() + PATIENCE, || self.storage.destroy(dataset))
    }
}

/// What a dataset below the store's is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    /// Not ours.
    Other,
    Layer(LayerId),
    New(LayerId),
    Removed,
}

impl Kind {
    fn of(name: &str) -> Kind {
        let number = |text: &str| text.parse::<LayerId>().ok();
        match (number(name), name.strip_prefix("new-").and_then(number), name.strip_prefix("removed-").and_then(number))
        {
            (Some(id), _, _) => Kind::Layer(id),
            (_, Some(id), _) => Kind::New(id),
            (_, _, Some(_)) => Kind::Removed,
            _ => Kind::Other,
        }
    }
}

impl Zfs {
    /// What the store does not know, with the bytes it takes; children before their parents, which have lower numbers.
    fn leftovers(&self, known: &dyn Fn(LayerId) -> bool) -> Result<Vec<(String, u64)>> {
        let out = zfs(&["list", "-Hp", "-t", "filesystem", "-d", "1", "-o", "name,used", self.names.root()])?;
        let mut found = Vec::new();
        for [name, used] in rows(&out)? {
            let kind = Kind::of(name.rsplit('/').next().unwrap_or_default());
            let is_leftover = match kind {
                Kind::Other => false,
                Kind::Layer(id) => !known(id),
                Kind::New(id) => !known(id) || existing(&[&self.names.layer(id)])?.len() == 1,
                Kind::Removed => true,
            };
            if is_leftover {
                found.push((kind, name, number(&used)?));
            }
        }
        found.sort_by(|a, b| b.cmp(a));
        Ok(found.into_iter().map(|(_, name, used)| (name, used)).collect())
    }
}

impl GraphDriver for Zfs {
    fn name(&self) -> &'static str {
        FACTORY.name
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn status(&self) -> Vec<(String, String)> {
        let mut lines = vec![
            ("Zpool".to_owned(), self.names.pool().to_owned()),
            ("Dataset".to_owned(), self.names.root().to_owned()),
            ("Uses".to_owned(), self.storage.describe().to_owned()),
        ];
        let facts = ["used", "available", "compression", "recordsize"];
        for fact in facts {
            if let Ok(value) = zfs(&["get", "-H", "-o", "value", fact, self.names.root()]) {
                lines.push((format!("Dataset {fact}"), value.trim().to_owned()));
            }
        }
        lines
    }

    fn create(&self, id: LayerId, parents: &[LayerId], options: &LayerOptions) -> Result<()> {
        self.make(id, parents, options).doing(|| format!("creating layer {id}"))
    }

    fn commit(&self, id: LayerId) -> Result<()> {
        self.freeze(id).doing(|| format!("committing layer {id}"))
    }

    fn thaw(&self, id: LayerId) -> Result<()> {
        self.unfreeze(id).doing(|| format!("undoing the commit of layer {id}"))
    }

    fn mount(&self, id: LayerId, _parents: &[LayerId], access: Access) -> Result<Vec<Mount>> {
        self.recipe(id, access).doing(|| format!("describing the mount of layer {id}"))
    }

    fn limits(&self, id: LayerId) -> Result<Limits> {
        let read = || {
            let layer = self.layer(id)?;
            let limit = numbers(&self.names.layer(id), &["refquota"])?[0];
            let below = numbers(&layer.origin, &["referenced"])?[0];
            let size = (limit > 0).then(|| ByteSize(limit.saturating_sub(below)));
            Ok(Limits { size, inodes: None })
        };
        read().map_err(|e: Error| e.doing(format!("reading the limit of layer {id}")))
    }

    fn set_limits(&self, id: LayerId, limits: Limits) -> Result<()> {
        let set = || {
            let layer = self.layer(id)?;
            match limits {
                Limits { inodes: Some(_), .. } => Err(no_inode_limit()),
                _ if layer.committed => {
                    Err(Error::new(ErrorKind::InvalidInput, "it is committed, and takes nothing more"))
                }
                Limits { size: Some(size), .. } => self.limit(&self.names.layer(id), &layer.origin, size),
                Limits { size: None, .. } => RefQuota.remove(Path::new(&self.names.layer(id))),
            }
        };
        set().map_err(|e| e.doing(format!("limiting layer {id}")))
    }

    /// Bytes as ZFS has written them, after compression, of an active layer as of the last transaction group. Inodes: how
    /// many more there are than in the parent.
    fn usage(&self, id: LayerId) -> Result<Usage> {
        self.count(id)
    }

    fn remove(&self, id: LayerId) -> Result<()> {
        self.erase(id).doing(|| format!("removing layer {id}"))
    }

    fn reclaim(&self, known: &dyn Fn(LayerId) -> bool) -> Result<Reclaimed> {
        let (mut freed, mut failed) = (Reclaimed::default(), None);
        let until = Instant::now() + PATIENCE_WITH_LEFTOVERS;
        for (name, used) in self.leftovers(known)? {
            match patiently(until, || self.storage.destroy(&name)) {
                Ok(()) => {
                    freed.layers += 1;
                    freed.bytes += used;
                }
                // The others do not wait for it.
                Err(e) => drop(failed.get_or_insert(e.doing(format!("freeing {name}, which no layer needs")))),
            }
        }
        failed.map_or(Ok(freed), Err)
    }

    fn shown_by(&self, mount: &MountInfo) -> Option<LayerId> {
        self.names.layer_of(mount.source.to_str().filter(|_| mount.fstype == "zfs")?)
    }

    fn inventory(&self) -> Result<Vec<Stored>> {
        inventory::inventory(&self.names).doing(|| format!("listing what is in {}", self.names.root()))
    }

    fn native_diff(&self) -> Option<&dyn NativeDiff> {
        Some(self)
    }
}

impl NativeDiff for Zfs {
    fn narrow(&self, id: LayerId, parents: &[LayerId]) -> Result<Box<dyn Narrow + '_>> {
        let narrow = self.narrow_layer(id, parents).doing(|| format!("finding out what changed in layer {id}"))?;
        Ok(narrow)
    }
}

fn no_layer(id: LayerId) -> Error {
    Error::new(ErrorKind::NotFound, format!("layer {id} is not there"))
}

/// Unmounting ends some time after the call, and so does a `zfs diff` that somebody killed.
fn patiently(until: Instant, mut destroy: impl FnMut() -> Result<()>) -> Result<()> {
    let mut pause = Duration::from_millis(5);
    loop {
        match destroy() {
            Err(e) if e.kind() == ErrorKind::Busy && Instant::now() < until => thread::sleep(pause),
            Err(e) if e.kind() == ErrorKind::Busy => {
                return Err(
                    e.hint("it is mounted somewhere, perhaps in another mount namespace: grep zfs /proc/*/mounts")
                );
            }
            done => return done,
        }
        pause = (pause * 2).min(Duration::from_millis(200));
    }
}

/// The `zfs` command would unmount it.
fn refuse_mounted(dataset: &str) -> Result<()> {
    let shows =
        |source: &str| source == dataset || source.strip_prefix(dataset).is_some_and(|rest| rest.starts_with('@'));
    let mounted = mount::table()?.into_iter().find(|m| m.fstype == "zfs" && m.source.to_str().is_some_and(shows));
    match mounted {
        Some(mount) => Err(Error::new(ErrorKind::Busy, format!("it is mounted at {}", mount.mount_point.display()))
            .hint("unmount it first")),
        None => Ok(()),
    }
}
