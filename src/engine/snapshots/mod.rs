//! Snapshots: layers under the names that somebody else gives them, with the calls and errors of containerd's snapshotters.
//!
//! Nothing else removes these layers. The command line sees them, and cannot name them.

mod chown;
mod diff;
mod filter;
mod idmapped;
mod labels;
mod names;
mod page;
mod pattern;
mod rebase;
mod recipes;
pub(super) mod row;
mod sight;
mod summary;

pub use diff::Difference;
pub use row::{Labels, Snapshot};
pub use summary::{Figures, SnapshotSpace};

use super::Engine;
use crate::{config::Settings, registry};
use graphdriver_core::{
    Access, Context, Error, ErrorKind, LayerId, LayerOptions, Limits, Mount, Result, Usage,
    store::{self, CommitInfo, LayerKind},
};
use idmapped::{Places, Ready};
use labels::{IdMap, IdMaps};
use names::Names;
use sight::Mark;
use std::{
    fs::{File, TryLockError},
    path::Path,
};

/// The snapshots of one store, for the one process that serves them.
pub struct Snapshots {
    engine: Engine,
    names: Names,
    places: Places,
    _sole: File,
}

/// A name's most bytes; containerd's own are a namespace, a number and a key.
const LONGEST_NAME: usize = 4096;

impl Snapshots {
    /// Opens the store and takes it for itself. Fails with `Busy` if another process serves its snapshots, and with
    /// `InvalidInput`, before anything is made, if there are none and the store of another driver beside it has some.
    pub fn open(settings: Settings) -> Result<Snapshots> {
        let root = &settings.data_root;
        let factory = registry::choose(root, settings.storage_driver.as_deref(), &settings.storage_opts)?;
        registry::check_snapshots_driver(root, factory.name)?;
        let engine = Engine::open(settings)?;
        check_path(engine.layers.dir())?;
        let path = engine.layers.dir().join("snapshotter.lock");
        let lock = File::create(&path).doing(|| format!("opening {}", path.display()))?;
        match lock.try_lock() {
            Ok(()) => {
                let places = Places::of(engine.layers.dir());
                let snapshots = Snapshots { engine, names: Names::default(), places, _sole: lock };
                snapshots.tidy();
                Ok(snapshots)
            }
            Err(TryLockError::WouldBlock) => {
                let why = format!("another snapshotter serves {}", engine.layers.dir().display());
                Err(Error::new(ErrorKind::Busy, why).hint("stop it, or use another --root"))
            }
            Err(TryLockError::Error(e)) => Err(e).doing(|| format!("locking {}", path.display())),
        }
    }

    /// The engine.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Makes an active snapshot, and tells the process `mounter` how to mount it.
    ///
    /// Labels can ask for mapped ids, which a mount shows that is made for this: in the mount namespace of `mounter`. Where
    /// there can be none, owners are changed.
    pub fn prepare(
        &self,
        key: &str,
        parent: Option<&str>,
        labels: &Labels,
        mounter: Option<u32>,
    ) -> Result<Vec<Mount>> {
        self.make(LayerKind::Active, key, parent, labels, mounter).doing(|| format!("preparing snapshot {key:?}"))
    }

    /// Makes a snapshot that shows its parent and is never committed, as [`prepare`](Self::prepare) does.
    pub fn view(&self, key: &str, parent: Option<&str>, labels: &Labels, mounter: Option<u32>) -> Result<Vec<Mount>> {
        self.make(LayerKind::View, key, parent, labels, mounter).doing(|| format!("making the view {key:?}"))
    }

    fn make(
        &self,
        kind: LayerKind,
        key: &str,
        parent: Option<&str>,
        labels: &Labels,
        mounter: Option<u32>,
    ) -> Result<Vec<Mount>> {
        check_name(key)?;
        labels::check(labels)?;
        let _turn = self.names.turn(key);
        let id_maps = labels::id_maps(labels)?;
        let limits = match kind {
            // Nothing is written to it. containerd hands some labels on from other snapshots.
            LayerKind::View => Limits::default(),
            _ => labels::limits(labels)?,
        };
        let layers = &self.engine.layers;
        let below = layers.store().read(|db| {
            row::refuse_taken(db, key)?;
            parent.map(|parent| row::committed(db, parent)).transpose()
        })?;
        let id_maps = match (id_maps, below) {
            (Some(maps), Some(below)) if self.is_shifted(below, &maps)? => None,
            (maps, _) => maps,
        };
        let options = LayerOptions { size: limits.size, inodes: limits.inodes, durable: true };
        let layer = layers.create(kind, below, &options)?;
        let (recipe, ready) = match &id_maps {
            None => {
                let recipe = self.recipe(layer.id(), kind)?;
                (recipes::for_unpacking(&self.engine, key, kind, layer.id(), recipe), None)
            }
            Some(maps) => self.recipe_mapping_ids(layer.id(), kind, maps, mounter)?,
        };
        let id = layer.id();
        let shown = id_maps.filter(|_| ready.is_some());
        layers.store().write(|tx| {
            row::refuse_taken(tx, key)?;
            layer.keep(tx, None)?;
            row::insert(tx, key, id, labels, shown.as_ref().map(IdMaps::to_string).as_deref())
        })?;
        match shown {
            None => Ok(recipe),
            // Whoever is refused takes it that there is no snapshot.
            Some(maps) => self.id_mapped((key, id), &recipe, &maps, ready, mounter).inspect_err(|_| {
                self.remove(key).unwrap_or_else(|e| tracing::warn!("{e}"));
            }),
        }
    }

    /// Of a new layer: with a mount that maps ids, or after its owners were changed.
    fn recipe_mapping_ids(
        &self,
        layer: LayerId,
        kind: LayerKind,
        maps: &IdMaps,
        mounter: Option<u32>,
    ) -> Result<(Vec<Mount>, Option<Ready>)> {
        let recipe = self.recipe(layer, kind)?;
        match self.ready(layer, &recipe, maps, mounter) {
            Ok(ready) => Ok((recipe, Some(ready))),
            Err(e) if not_here(&e) => {
                self.give_away(kind, &recipe, maps, &e)?;
                Ok((self.recipe(layer, kind)?, None))
            }
            Err(e) => Err(e),
        }
    }

    /// Whether the layer's files belong to the container already: containerd 1.7 changes owners itself where it does not know
    /// that a snapshotter would, and asks for the mapping all the same. Only the root directory is looked at.
    fn is_shifted(&self, layer: LayerId, maps: &IdMaps) -> Result<bool> {
        let root = self.engine.view(layer)?.inode(Path::new("."))?;
        let meta = root.ok_or_else(|| Error::new(ErrorKind::Corrupt, format!("layer {layer} has no root")))?.meta;
        let shifted = |map: &IdMap, id: u32| Ok::<_, Error>(map.outside(0)? == id && map.outside(id).is_err());
        Ok(shifted(&maps.users, meta.uid)? && shifted(&maps.groups, meta.gid)?)
    }

    /// The mount that shows the layer with mapped ids, if there can be one here.
    fn ready(&self, layer: LayerId, recipe: &[Mount], maps: &IdMaps, mounter: Option<u32>) -> Result<Ready> {
        let driver = self.engine.layers.driver();
        match driver.capabilities().idmapped_mounts {
            true => self.places.ready(layer, recipe, maps, mounter),
            false => Err(Error::new(ErrorKind::Unsupported, format!("{} has no id-mapped mounts here", driver.name()))),
        }
    }

    /// Gives all that the recipe shows to the ids of the container, as nothing shows it with those: `why` says so.
    fn give_away(&self, kind: LayerKind, recipe: &[Mount], maps: &IdMaps, why: &Error) -> Result<()> {
        if kind == LayerKind::View {
            return Err(Error::new(ErrorKind::Unsupported, format!("its ids cannot be mapped by a mount: {why}"))
                .hint("a view takes no changes of owners: prepare an active snapshot"));
        }
        tracing::info!("mapping ids by changing the owners of all files, as no mount can: {why}");
        chown::shift(recipe, maps).doing(|| "mapping its ids")
    }

    fn id_mapped(
        &self,
        (key, layer): (&str, LayerId),
        recipe: &[Mount],
        maps: &IdMaps,
        ready: Option<Ready>,
        mounter: Option<u32>,
    ) -> Result<Vec<Mount>> {
        let still = || match self.stat(key)?.layer == layer {
            true => Ok(()),
            false => Err(Error::new(ErrorKind::NotFound, format!("there is no snapshot {key:?} any more"))),
        };
        let recipe = self.places.show(layer, recipe, maps, ready, mounter, still)?;
        page::check(&recipe)?;
        Ok(recipe)
    }

    /// Tells the process `mounter` how to mount it: for writing if it is active. Fails with `Busy` if it is committed.
    pub fn mounts(&self, key: &str, mounter: Option<u32>) -> Result<Vec<Mount>> {
        self.mounts_inner(key, mounter).doing(|| format!("describing the mounts of snapshot {key:?}"))
    }

    fn mounts_inner(&self, key: &str, mounter: Option<u32>) -> Result<Vec<Mount>> {
        let found = self.stat(key)?;
        if found.kind == LayerKind::Committed {
            return Err(Error::new(ErrorKind::Busy, "it is committed").hint("make a view of it, and mount that"));
        }
        self.own_mounts(&found, mounter)
    }

    fn own_mounts(&self, found: &Snapshot, mounter: Option<u32>) -> Result<Vec<Mount>> {
        let recipe = self.recipe(found.layer, found.kind)?;
        match &found.id_maps {
            None => Ok(recipes::for_unpacking(&self.engine, &found.name, found.kind, found.layer, recipe)),
            Some(maps) => self.id_mapped((&found.name, found.layer), &recipe, &IdMaps::parse(maps)?, None, mounter),
        }
    }

    fn recipe(&self, layer: LayerId, kind: LayerKind) -> Result<Vec<Mount>> {
        let access = if kind == LayerKind::Active { Access::ReadWrite } else { Access::ReadOnly };
        let mut recipe = self.engine.layers.mount(layer, access)?;
        Mark::of(&self.engine).put(layer, &mut recipe);
        recipes::without_metacopy(&mut recipe);
        page::check(&recipe)?;
        Ok(recipe)
    }

    /// Freezes an active snapshot under another name, with these labels and no others, and on `parent` if it was prepared
    /// without one. When this returns it survives a power cut. Fails with `InvalidInput` for another parent than its own,
    /// and with `Unsupported` where it had to have one from the beginning.
    pub fn commit(&self, name: &str, key: &str, parent: Option<&str>, labels: &Labels) -> Result<()> {
        self.commit_inner(name, key, parent, labels).doing(|| format!("committing snapshot {key:?} as {name:?}"))
    }

    fn commit_inner(&self, name: &str, key: &str, parent: Option<&str>, labels: &Labels) -> Result<()> {
        check_name(name)?;
        labels::check(labels)?;
        // Whoever comes second has to be told before his layer is frozen, and it stays as it is.
        let _turn = self.names.turn(name);
        let layers = &self.engine.layers;
        let active = layers.store().read(|db| {
            row::refuse_taken(db, name)?;
            row::get(db, key)
        })?;
        if active.kind != LayerKind::Active {
            return Err(Error::new(ErrorKind::Busy, format!("it is not active but {}", phrase(active.kind))));
        }
        let parent = parent.filter(|parent| active.parent.as_deref() != Some(parent));
        if let Some(parent) = parent {
            self.may_rebase(&active, parent)?;
        }
        if active.id_maps.is_some() {
            self.places.take_down(active.layer);
        }
        recipes::escape_marks(&self.engine, key, active.layer)?;
        layers.commit(active.layer, &CommitInfo::default(), |tx| match row::rename(tx, key, name, labels)? {
            true => parent
                .map(|parent| rebase::committed(tx, parent))
                .transpose()?
                .map_or(Ok(()), |parent| layers.rebase_in(tx, active.layer, parent)),
            false => row::get(tx, key).map(drop),
        })
    }

    /// Makes the snapshot disappear; [`cleanup`](Self::cleanup) frees its storage.
    pub fn remove(&self, key: &str) -> Result<()> {
        let layers = &self.engine.layers;
        let removed = layers.store().write(|tx| {
            let found = row::get(tx, key)?;
            if !store::children(tx, found.layer)?.is_empty() {
                return Err(Error::new(ErrorKind::Busy, "it has children").hint("remove those first"));
            }
            row::delete(tx, key)?;
            layers.remove_in(tx, found.layer)?;
            Ok(found)
        });
        let removed = removed.doing(|| format!("cannot remove snapshot {key:?}"))?;
        if removed.id_maps.is_some() {
            self.places.take_down(removed.layer);
        }
        Ok(())
    }

    /// What is known of it.
    pub fn stat(&self, key: &str) -> Result<Snapshot> {
        self.engine.layers.store().read(|db| row::get(db, key))
    }

    /// Changes labels. `paths` says which: `labels`, or `labels.NAME`; none of them: all.
    pub fn update(&self, key: &str, labels: &Labels, paths: &[String]) -> Result<Snapshot> {
        self.update_inner(key, labels, paths).doing(|| format!("updating snapshot {key:?}"))
    }

    fn update_inner(&self, key: &str, given: &Labels, paths: &[String]) -> Result<Snapshot> {
        let layers = &self.engine.layers;
        let before = self.stat(key)?;
        let labels = merged(&before.labels, given, paths)?;
        labels::check(&labels)?;
        // The others take nothing more, whatever their labels say.
        if before.kind == LayerKind::Active {
            let (was, wanted) = (labels::limits(&before.labels), labels::limits(&labels)?);
            if was.ok() != Some(wanted) {
                layers.set_limits(before.layer, wanted, |_| Ok(()))?;
            }
        }
        layers.store().write(|tx| {
            // Again, as others may have changed some of them meanwhile.
            let now = row::get(tx, key)?;
            row::set_labels(tx, key, &merged(&now.labels, given, paths)?)?;
            row::get(tx, key)
        })
    }

    /// Those that pass one of the filters, by name; all, if there is no filter.
    pub fn list(&self, filters: &[String]) -> Result<Vec<Snapshot>> {
        let filters = filter::Filters::parse(filters)?;
        let mut all = self.engine.layers.store().read(row::all)?;
        all.retain(|snapshot| filters.accept(snapshot));
        Ok(all)
    }

    /// The space that only this snapshot takes.
    pub fn usage(&self, key: &str) -> Result<Usage> {
        let found = self.stat(key)?;
        self.engine.layers.usage(found.layer)
    }

    /// Undoes the mounts of what was removed while this or another process was killed.
    fn tidy(&self) {
        let wanted = || self.engine.layers.store().read(row::id_mapped);
        match self.places.tidy(wanted) {
            Ok(false) => {}
            // What they held was in the way of those who have just recovered from the crash.
            Ok(true) => drop(self.free_removed().inspect_err(|e| tracing::warn!("freeing what was removed: {e}"))),
            Err(e) => tracing::warn!("undoing mounts of removed snapshots: {e}"),
        }
    }

    /// Frees what was removed here. What is still in use stays for the next time; returns how many layers that are.
    pub fn free_removed(&self) -> Result<u64> {
        self.engine.layers.sweep()
    }

    /// Frees what was removed, and what other processes left that were killed. What is still in use stays for the next
    /// time; returns how many layers that are.
    pub fn cleanup(&self) -> Result<u64> {
        self.tidy();
        self.engine.layers.recover()?;
        self.free_removed()
    }
}

impl std::fmt::Debug for Snapshots {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Snapshots").field("store", &self.engine.layers.dir()).finish_non_exhaustive()
    }
}

/// Whether it is about what this kernel, filesystem or process cannot do, or the maps that it does not take.
fn not_here(e: &Error) -> bool {
    matches!(e.kind(), ErrorKind::Unsupported | ErrorKind::InvalidInput | ErrorKind::PermissionDenied)
}

fn phrase(kind: LayerKind) -> &'static str {
    match kind {
        LayerKind::Active => "active",
        LayerKind::View => "a view",
        LayerKind::Committed => "committed",
    }
}

fn merged(old: &Labels, given: &Labels, paths: &[String]) -> Result<Labels> {
    if paths.is_empty() {
        return Ok(given.clone());
    }
    let mut labels = old.clone();
    for path in paths {
        match path.strip_prefix("labels.") {
            Some(name) => match given.get(name) {
                Some(value) => drop(labels.insert(name.into(), value.clone())),
                None => drop(labels.remove(name)),
            },
            None if path == "labels" => labels = given.clone(),
            None => {
                let why = format!("{path:?} of a snapshot cannot be changed");
                return Err(Error::new(ErrorKind::InvalidInput, why).hint("labels and labels.NAME can"));
            }
        }
    }
    Ok(labels)
}

fn check_name(name: &str) -> Result<()> {
    match name.is_empty() || name.len() > LONGEST_NAME || name.contains('\0') {
        true => {
            let shown: String = name.chars().take(64).collect();
            let why = format!("{shown:?} is no name of a snapshot: 1 to {LONGEST_NAME} bytes without NUL");
            Err(Error::new(ErrorKind::InvalidInput, why))
        }
        false => Ok(()),
    }
}

/// Fails if paths below `dir` cannot be told to containerd, which takes mount options apart by their commas and colons and
/// knows no escapes.
fn check_path(dir: &Path) -> Result<()> {
    let odd = |c: char| matches!(c, ':' | ',' | '\\' | '"' | '\'') || c.is_whitespace();
    match dir.to_str().is_none_or(|text| text.contains(odd)) {
        true => {
            let why = format!("containerd cannot be told of paths like {}", dir.display());
            Err(Error::new(ErrorKind::InvalidInput, why)
                .hint("use a --root without white space, quotes, commas, colons and backslashes"))
        }
        false => Ok(()),
    }
}
