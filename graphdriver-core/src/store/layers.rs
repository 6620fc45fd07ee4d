//! The layer manager: the store and a driver, tied together with intents.

use super::{
    Layer, LayerKind, Schema, Store,
    rows::{self, Op},
    session::{self, Session, absent_is_fine},
    unpoisoned,
};
use crate::{
    Access, ChainId, Context, DiffDir, DiffId, Error, ErrorKind, GraphDriver, LayerId, LayerOptions, Limits, Mount,
    Reclaimed, Result, Usage,
};
use rusqlite::Transaction;
use serde::Serialize;
use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    sync::Mutex,
    time::{SystemTime, UNIX_EPOCH},
};

/// The layers of one store, with their storage. Shared by threads; each process has its own.
///
/// Let it drop before the process exits: otherwise the next one takes this one for crashed, which costs it a look
/// through the driver's home.
pub struct Layers {
    store: Store,
    driver: Box<dyn GraphDriver>,
    dir: PathBuf,
    session: Mutex<Option<Session>>,
    /// Drivers are promised one call per layer at a time.
    sweeping: Mutex<()>,
}

/// What is known of a layer when it is committed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CommitInfo {
    /// The digest of its uncompressed tar. Without it neither this layer nor any on it has a ChainID.
    pub diff_id: Option<DiffId>,
    /// Bytes of that tar.
    pub tar_size: Option<u64>,
}

/// What [`Layers::recover`] found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Recovered {
    /// Sessions that ended without cleaning up.
    pub sessions: u64,
    /// Layers they were making or removing.
    pub layers: u64,
    /// Of the layers to be removed, those that could not be.
    pub remaining: u64,
    /// What the driver had on top of that.
    pub reclaimed: Reclaimed,
}

impl Layers {
    /// Opens the store in `dir` (see [`Store::open`]) for the layers of `driver`, and [recovers](Self::recover).
    pub fn open(dir: &Path, driver: Box<dyn GraphDriver>, schema: &[Schema]) -> Result<Layers> {
        let layers = Layers::open_as_it_is(dir, driver, schema)?;
        let found = layers.recover()?;
        if found != Recovered::default() {
            tracing::info!(?found, "recovered {} from a crash", dir.display());
        }
        Ok(layers)
    }

    /// The same without recovering: what a crash left is there to be seen.
    pub fn open_as_it_is(dir: &Path, driver: Box<dyn GraphDriver>, schema: &[Schema]) -> Result<Layers> {
        let store = Store::open(dir, schema)?;
        let (session, sweeping) = (Mutex::new(None), Mutex::new(()));
        Ok(Layers { store, driver, dir: dir.to_owned(), session, sweeping })
    }

    /// The driver.
    pub fn driver(&self) -> &dyn GraphDriver {
        &*self.driver
    }

    /// The database.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Where the store lies.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The directory for what lets the layer's tar come out byte for byte; it goes with the layer. It is made by
    /// whoever puts something there.
    pub fn record_dir(&self, id: LayerId) -> PathBuf {
        self.dir.join("records").join(id.to_string())
    }

    /// Scratch space of this session, removed with all that is in it when this `Layers` is dropped, or after a crash.
    pub fn tmp_dir(&self) -> Result<PathBuf> {
        self.with_session(Session::tmp_dir)?
    }

    /// Makes storage for a new layer on `parent`, which is committed: visible, or being made by the caller too.
    /// The new layer is active, or a view; nobody sees it until it is [kept](NewLayer::keep). A view on a parent takes no
    /// storage, and what `options` ask for has no effect on it.
    pub fn create(&self, kind: LayerKind, parent: Option<LayerId>, options: &LayerOptions) -> Result<NewLayer<'_>> {
        if kind == LayerKind::Committed {
            return Err(invalid("a layer is created active or as a view, and committed when it is filled"));
        }
        let session = self.session()?;
        let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as i64);
        let size_limit = options.size;
        let (id, parents) = self.store.write_relaxed(|tx| {
            if let Some(parent) = parent {
                rows::row(tx, parent).and_then(|(parent, _)| may_have_children(&parent))?;
            }
            let id = rows::insert(tx, kind, parent, size_limit, created)?;
            rows::add_intent(tx, id, Op::Create, &session)?;
            Ok((id, rows::parents(tx, id)?))
        })?;
        let new = NewLayer { layers: self, id };
        tracing::debug!(layer = %id, ?parents, ?options, "creating");
        if shown_instead(kind, parent).is_none() {
            self.driver.create(id, &parents, options).map_err(|e| match e.kind() {
                // Dropping the new layer frees it.
                ErrorKind::AlreadyExists => {
                    e.with_kind(ErrorKind::Corrupt).hint("a power cut has left it, which is removed now: try again")
                }
                ErrorKind::NotFound => damaged(e),
                _ => e,
            })?;
        }
        Ok(new)
    }

    /// See [`rows::get`](super::get).
    pub fn get(&self, id: LayerId) -> Result<Layer> {
        self.store.read(|conn| rows::get(conn, id))
    }

    /// See [`rows::list`](super::list).
    pub fn list(&self) -> Result<Vec<Layer>> {
        self.store.read(rows::list)
    }

    /// See [`rows::chain`](super::chain).
    pub fn chain(&self, id: LayerId) -> Result<Vec<LayerId>> {
        self.store.read(|conn| rows::chain(conn, id))
    }

    /// See [`rows::parents`](super::parents).
    pub fn parents(&self, id: LayerId) -> Result<Vec<LayerId>> {
        self.store.read(|conn| rows::parents(conn, id))
    }

    /// See [`rows::by_chain`](super::by_chain).
    pub fn by_chain(&self, chain: ChainId) -> Result<Option<LayerId>> {
        self.store.read(|conn| rows::by_chain(conn, chain))
    }

    /// See [`rows::children`](super::children).
    pub fn children(&self, id: LayerId) -> Result<Vec<LayerId>> {
        self.store.read(|conn| rows::children(conn, id))
    }

    /// The recipe that shows the layer, visible or being made by the caller. Only active layers can be written to.
    pub fn mount(&self, id: LayerId, access: Access) -> Result<Vec<Mount>> {
        let shown = self.store.read(|conn| {
            let (layer, op) = rows::row(conn, id)?;
            if access == Access::ReadWrite {
                may_be_written(&layer, op)?;
            }
            let shown = shown_instead(layer.kind, layer.parent).unwrap_or(id);
            Ok((shown, rows::parents(conn, shown)?))
        });
        let recipe = shown.and_then(|(shown, parents)| {
            self.driver.mount(shown, &parents, access).map_err(|e| match e.kind() {
                ErrorKind::NotFound => damaged(e),
                ErrorKind::InvalidInput if access == Access::ReadWrite => {
                    e.hint("its last commit was interrupted: commit it again, or remove it")
                }
                _ => e,
            })
        });
        recipe.doing(|| format!("mounting layer {id}"))
    }

    /// The space that only this layer takes: as it was when it was committed, or measured now.
    pub fn usage(&self, id: LayerId) -> Result<Usage> {
        let (layer, _) = self.store.read(|conn| rows::row(conn, id))?;
        match layer.usage {
            Some(usage) => Ok(usage),
            None if shown_instead(layer.kind, layer.parent).is_some() => Ok(Usage::default()),
            None => self.driver.usage(id).doing(|| format!("measuring layer {id}")),
        }
    }

    /// Changes what an active layer, perhaps mounted, may take at the most. `also` changes what belongs to it in the same
    /// transaction, after the driver enforces the new limits.
    pub fn set_limits(
        &self,
        id: LayerId,
        limits: Limits,
        also: impl FnOnce(&Transaction<'_>) -> Result<()>,
    ) -> Result<()> {
        // After a crash the next one looks for what is left of it.
        self.session()?;
        tracing::debug!(layer = %id, ?limits, "limiting");
        self.store.read(|conn| rows::row(conn, id).and_then(|(layer, op)| may_be_written(&layer, op)))?;
        self.driver.set_limits(id, limits)?;
        self.store.write(|tx| {
            rows::set_size_limit(tx, id, limits.size)?;
            also(tx)
        })
    }

    /// Freezes an active layer in place. When this returns, it survives a power cut. `also` changes what belongs to it
    /// in the same transaction; if it fails, or after a crash, the layer is still active: it can be written to, and
    /// committed again.
    pub fn commit(
        &self,
        id: LayerId,
        info: &CommitInfo,
        also: impl FnOnce(&Transaction<'_>) -> Result<()>,
    ) -> Result<()> {
        let session = self.session()?;
        let begun = self.store.write(|tx| {
            let (layer, op) = rows::row(tx, id)?;
            match op {
                Some(Op::Create) => return Err(rows::no_layer(id)),
                Some(_) => return Err(Error::new(ErrorKind::Busy, "it is being committed already")),
                None => may_be_committed(&layer)?,
            }
            rows::add_intent(tx, id, Op::Commit, &session)
        });
        let done = begun.and_then(|()| {
            let frozen = self.freeze(id, info, |tx| {
                rows::drop_intent(tx, id, Op::Commit)?;
                rows::set_chain(tx, id)?;
                also(tx)
            });
            if frozen.is_err() {
                self.thaw(id);
                let cleared = self.store.write(|tx| rows::drop_intent(tx, id, Op::Commit));
                cleared.inspect_err(|e| tracing::warn!("layer {id} stays marked as being committed: {e}")).ok();
            }
            frozen
        });
        done.doing(|| format!("committing layer {id}"))
    }

    /// Puts a layer that was made without a parent on one, which is visible, with the transaction that
    /// [commits](Self::commit) it. For drivers that [can](crate::Capabilities::independent_layers).
    pub fn rebase_in(&self, tx: &Transaction<'_>, id: LayerId, parent: LayerId) -> Result<()> {
        let rebase = || {
            self.may_move_to(tx, &rows::row(tx, id)?.0, parent)?;
            rows::get(tx, parent).and_then(|parent| may_have_children(&parent))?;
            rows::set_parent(tx, id, parent)?;
            rows::set_chain(tx, id)
        };
        rebase().doing(|| format!("putting layer {id} on layer {parent}"))
    }

    fn may_move_to(&self, tx: &Transaction<'_>, layer: &Layer, parent: LayerId) -> Result<()> {
        let can = self.driver.capabilities();
        if let Some(old) = layer.parent {
            return Err(invalid(format!("it was made on layer {old} and cannot go on layer {parent}")));
        }
        if !can.independent_layers {
            let name = self.driver.name();
            return Err(invalid(format!("{name} needs to know the parent when a layer is created")));
        }
        let depth = rows::chain(tx, parent)?.len();
        if depth > can.max_depth {
            let reason = format!("it would have {depth} parents, and {} can do {}", self.driver.name(), can.max_depth);
            return Err(Error::new(ErrorKind::Unsupported, reason).hint("use an image with fewer layers"));
        }
        Ok(())
    }

    /// Durable storage first, then the row.
    fn freeze(&self, id: LayerId, info: &CommitInfo, then: impl FnOnce(&Transaction<'_>) -> Result<()>) -> Result<()> {
        tracing::debug!(layer = %id, "committing");
        self.driver.commit(id)?;
        let usage = self.driver.usage(id)?;
        self.store.write(|tx| {
            rows::freeze(tx, id, info, usage)?;
            then(tx)
        })
    }

    /// Undoes what the driver did of a commit that has no row. Finishing it instead would take for whole what a power cut
    /// left of it, and lose what `also` was to record.
    fn thaw(&self, id: LayerId) {
        if let Err(e) = self.driver.thaw(id) {
            tracing::warn!("layer {id} was not committed, and may not be writable until it is committed again: {e}");
        }
    }

    /// Makes the layer invisible with the caller's transaction; its storage goes at the next [`sweep`](Self::sweep).
    /// Fails with `Busy` if it has children, or is being committed.
    pub fn remove_in(&self, tx: &Transaction<'_>, id: LayerId) -> Result<()> {
        let refuse = |reason: String| Err(Error::new(ErrorKind::Busy, reason).doing(format!("removing layer {id}")));
        match rows::row(tx, id)?.1 {
            Some(Op::Create) => return Err(rows::no_layer(id)),
            Some(_) => return refuse("it is being committed".into()),
            None => {}
        }
        if let Some(child) = rows::children(tx, id)?.first() {
            return refuse(format!("layer {child} lies on it"));
        }
        rows::add_intent(tx, id, Op::Remove, &self.session()?)
    }

    /// Frees the storage of the layers this session has removed, children before their parents. Returns how many of
    /// them could not be freed, because something holds them: they are logged, and tried again at the next sweep or,
    /// once this session has ended, at the next recovery.
    pub fn sweep(&self) -> Result<u64> {
        let _one_at_a_time = unpoisoned(&self.sweeping);
        let Some(session) = unpoisoned(&self.session).as_ref().map(|s| s.name.clone()) else { return Ok(0) };
        let removals = self.store.read(|conn| rows::removals(conn, &session))?;
        if removals.is_empty() {
            return Ok(0);
        }
        let mut above: HashMap<LayerId, u64> = removals.iter().map(|&(id, _, above)| (id, above)).collect();
        let parents: HashMap<LayerId, Option<LayerId>> = removals.iter().map(|&(id, parent, _)| (id, parent)).collect();
        let mut ready: Vec<LayerId> = removals.iter().filter(|r| r.2 == 0).map(|r| r.0).collect();
        let mut freed = Vec::new();
        while let Some(id) = ready.pop() {
            if let Err(e) = self.free(id) {
                tracing::warn!("layer {id} is removed, but its storage could not be freed yet: {e}");
                continue;
            }
            freed.push(id);
            let Some(parent) = parents[&id] else { continue };
            if let Some(left) = above.get_mut(&parent) {
                *left -= 1;
                ready.extend((*left == 0).then_some(parent));
            }
        }
        // Lost in a power cut, the intents to remove them are still there.
        self.store.write_relaxed(|tx| freed.iter().try_for_each(|id| rows::delete(tx, *id)))?;
        Ok((removals.len() - freed.len()) as u64)
    }

    fn free(&self, id: LayerId) -> Result<()> {
        tracing::debug!(layer = %id, "freeing");
        self.driver.remove(id)?;
        absent_is_fine(fs::remove_dir_all(self.record_dir(id)))
    }

    /// Undoes what sessions were doing that have ended without cleaning up, and lets the driver free what else they
    /// left. It can be repeated, and leaves alone what live sessions do, in this or another process.
    pub fn recover(&self) -> Result<Recovered> {
        let mut found = Recovered::default();
        let with_intents = self.store.read(rows::sessions)?;
        let mut names = session::traces(&self.dir)?;
        names.extend(with_intents);
        let boot = session::Boot::look(&self.dir)?;
        for name in names {
            let Some(dead) = session::claim(&self.dir, &name)? else { continue };
            let adopted = self.adopt(&name)?;
            if dead.left_its_lock() || adopted > 0 {
                // Buried, it tells nobody any more that there is something to look for.
                boot.forget()?;
                found.sessions += 1;
                found.layers += adopted;
            }
            session::bury(&self.dir, &name).unwrap_or_else(|e| tracing::warn!("cleaning up session {name}: {e}"));
        }
        // A power cut can bring back what was removed but not yet so on disk, and nobody's intent tells of it.
        if found.sessions > 0 || boot.is_new() {
            found.remaining = self.sweep()?;
            match self.reclaim() {
                Ok(reclaimed) => {
                    found.reclaimed = reclaimed;
                    boot.remember()?;
                }
                Err(e) => tracing::warn!("not all that a crash left is freed; the next start tries it again: {e}"),
            }
        }
        Ok(found)
    }

    /// Frees storage and records of layers that are in no row.
    fn reclaim(&self) -> Result<Reclaimed> {
        let known = |id| self.store.read(|conn| rows::exists(conn, id)).unwrap_or(true);
        let reclaimed = self.driver.reclaim(&known);
        for record in fs::read_dir(self.dir.join("records")).into_iter().flatten().flatten() {
            let id = record.file_name().to_str().and_then(|name| name.parse().ok());
            if id.is_some_and(|id| !known(id)) {
                let gone = absent_is_fine(fs::remove_dir_all(record.path()));
                gone.unwrap_or_else(|e| tracing::warn!("removing {}: {e}", record.path().display()));
            }
        }
        reclaimed
    }

    /// Takes over a dead session's intents. How many layers that makes.
    fn adopt(&self, dead: &str) -> Result<u64> {
        if !self.store.read(|conn| rows::has_intents(conn, dead))? {
            return Ok(0);
        }
        for id in self.store.read(|conn| rows::commits(conn, dead))? {
            self.thaw(id);
        }
        let session = self.session()?;
        self.store.write(|tx| rows::adopt(tx, dead, &session))
    }

    fn session(&self) -> Result<String> {
        self.with_session(|session| session.name.clone())
    }

    fn with_session<T>(&self, f: impl FnOnce(&Session) -> T) -> Result<T> {
        let mut session = unpoisoned(&self.session);
        if session.is_none() {
            *session = Some(Session::start(&self.dir)?);
        }
        Ok(f(session.as_ref().expect("started above")))
    }
}

/// A layer being made. Dropped without [`keep`](Self::keep) in a transaction that was committed, it is removed.
///
/// Drop it after the transaction, not within: there it can do nothing, and an unkept layer stays until the session ends.
#[must_use]
pub struct NewLayer<'a> {
    layers: &'a Layers,
    id: LayerId,
}

impl NewLayer<'_> {
    /// Its number.
    pub fn id(&self) -> LayerId {
        self.id
    }

    /// See [`GraphDriver::diff_dir`].
    pub fn diff_dir(&self) -> Option<DiffDir> {
        self.layers.driver.diff_dir(self.id)
    }

    /// See [`Layers::record_dir`].
    pub fn record_dir(&self) -> PathBuf {
        self.layers.record_dir(self.id)
    }

    /// Freezes it. When this returns, its storage survives a power cut; nobody sees it until it is kept.
    pub fn commit(&self, info: &CommitInfo) -> Result<()> {
        let id = self.id;
        let (layer, _) = self.layers.store.read(|conn| rows::row(conn, id))?;
        let frozen = may_be_committed(&layer).and_then(|()| self.layers.freeze(id, info, |_| Ok(())));
        frozen.doing(|| format!("committing layer {id}"))
    }

    /// Makes it visible with the caller's transaction. `parent` is for layers that were made without one, before it
    /// was known, by drivers that [can](crate::Capabilities::independent_layers); `None` leaves the parent as it is.
    /// Its ChainID is worked out here. The parent has to be visible: of several layers, keep the lowest first.
    pub fn keep(&self, tx: &Transaction<'_>, parent: Option<LayerId>) -> Result<()> {
        self.keep_in(tx, parent).doing(|| format!("keeping layer {}", self.id))
    }

    fn keep_in(&self, tx: &Transaction<'_>, parent: Option<LayerId>) -> Result<()> {
        let id = self.id;
        let (layer, _) = rows::row(tx, id)?;
        if let Some(parent) = parent.filter(|_| parent != layer.parent) {
            self.layers.may_move_to(tx, &layer, parent)?;
            rows::set_parent(tx, id, parent)?;
        }
        if let Some(parent) = parent.or(layer.parent) {
            rows::get(tx, parent).and_then(|parent| may_have_children(&parent))?;
        }
        if !rows::drop_intent(tx, id, Op::Create)? {
            return Err(invalid("it is kept already"));
        }
        rows::set_chain(tx, id)
    }
}

impl Drop for NewLayer<'_> {
    fn drop(&mut self) {
        let undone = match self.undo() {
            // Not even the intent fits, perhaps because of what this layer has: its storage first.
            Err(e) if e.kind() == ErrorKind::OutOfSpace => self.free_early().and_then(|()| self.undo()),
            other => other,
        };
        if let Err(e) = undone {
            tracing::warn!("layer {} was not kept and could not be removed yet: {e}", self.id);
        }
    }
}

impl NewLayer<'_> {
    /// Removes it unless it was kept. The database knows whether that transaction was committed.
    fn undo(&self) -> Result<()> {
        let unkept = self.layers.store.write(|tx| rows::undo_creation(tx, self.id))?;
        if unkept { self.layers.sweep().map(drop) } else { Ok(()) }
    }

    /// Frees the storage of a layer that was not kept while its intent still says that it is being made.
    fn free_early(&self) -> Result<()> {
        match self.layers.store.read(|conn| rows::row(conn, self.id))?.1 {
            Some(Op::Create) => self.layers.free(self.id),
            _ => Ok(()),
        }
    }
}

/// Nothing is ever written to a view, so one on a parent is its parent under another number, and has no storage.
fn shown_instead(kind: LayerKind, parent: Option<LayerId>) -> Option<LayerId> {
    parent.filter(|_| kind == LayerKind::View)
}

fn may_have_children(layer: &Layer) -> Result<()> {
    match layer.kind {
        LayerKind::Committed => Ok(()),
        kind => Err(invalid(format!("layer {} is {}; only committed layers have children", layer.id, kind.phrase()))),
    }
}

fn may_be_committed(layer: &Layer) -> Result<()> {
    match layer.kind {
        LayerKind::Active => Ok(()),
        LayerKind::View => Err(invalid("it is a view, which is never committed; create it active")),
        LayerKind::Committed => Err(invalid("it is committed already")),
    }
}

fn may_be_written(layer: &Layer, op: Option<Op>) -> Result<()> {
    match layer.kind {
        LayerKind::Active if op == Some(Op::Commit) => Err(Error::new(ErrorKind::Busy, "it is being committed")),
        LayerKind::Active => Ok(()),
        kind => {
            let hint = "mount it read-only, or create an active layer on it";
            Err(invalid(format!("it is {}; only active layers can be written to", kind.phrase())).hint(hint))
        }
    }
}

fn invalid(reason: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidInput, reason)
}

/// The driver lacks a layer that the store has.
fn damaged(e: Error) -> Error {
    e.with_kind(ErrorKind::Corrupt)
        .hint("the data root was damaged: remove what needs this layer and load its image again")
}
