//! The pool and its transactions.
//!
//! Whoever changes the pool or `pool.json` holds the lock on `HOME/pool.lock`. A change to the pool's thin devices is
//!
//! 1. `pool.json` with the thin device as its intent, and without the layer,
//! 2. the kernel makes or deletes the thin device,
//! 3. the kernel counts the pool's transaction number up,
//! 4. `pool.json` with the new number, the layer, and no intent.
//!
//! Killed between 1 and 4, the next one to take the lock deletes the thin device and goes on at 3. So each thin device is
//! in the pool and in `pool.json`, or in neither, or it is the intent.

use crate::{
    dm::{Info, Kernel, SECTOR, Target},
    filesystem,
    metadata::Metadata,
    options::{From, Wishes},
    state::{Layer, Phase, State, Storage},
    status::PoolStatus,
    storage, sys,
    sys::ByteLock,
};
use graphdriver_core::{Context, Error, ErrorKind, LayerId, Result, open_lock};
use std::{
    collections::BTreeMap,
    fs::File,
    os::{fd::AsFd, unix::fs::OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

/// The pool of one data directory.
pub(crate) struct Pool {
    pub home: PathBuf,
    pub kernel: Kernel,
    pub wishes: Wishes,
    /// One byte for each layer is locked, shared, by those who use its device, and wholly by who removes it.
    uses: File,
    held: Mutex<BTreeMap<LayerId, Use>>,
}

/// What this opening of the pool uses a layer's device for.
#[derive(Debug, Default)]
struct Use {
    /// Its mount was described to somebody.
    described: bool,
    /// How many look at it just now.
    borrowed: u32,
}

/// A layer's device, for as long as this is there. It must not be dropped by who has the pool's turn.
pub(crate) struct Borrowed<'a> {
    pool: &'a Pool,
    id: LayerId,
}

impl Drop for Borrowed<'_> {
    fn drop(&mut self) {
        let given = self.pool.turn().and_then(|turn| turn.give_back(self.id));
        given.unwrap_or_else(|e| tracing::debug!("the device of layer {} stays active: {e}", self.id));
    }
}

/// The pool while nobody else changes it.
pub(crate) struct Turn<'a> {
    pool: &'a Pool,
    pub state: State,
    _lock: File,
}

impl Pool {
    pub(crate) fn open(home: &Path, wishes: Wishes) -> Result<Pool> {
        let kernel = Kernel::open()?;
        kernel.need_thin_pools()?;
        std::fs::create_dir_all(home).doing(|| format!("opening {}", home.display()))?;
        let uses = open_lock(&home.join("uses.lock"))?;
        let pool = Pool { home: home.into(), kernel, wishes, uses, held: Mutex::default() };
        pool.begin()?;
        Ok(pool)
    }

    /// Makes the state the first time, and later compares it with what the user asks for.
    fn begin(&self) -> Result<()> {
        let _lock = self.lock()?;
        let found = State::load(&self.home)?;
        let Some(mut state) = found.clone().filter(|state| !state.dividing) else {
            // A disk that was being divided has this id on it, perhaps.
            let id = found.map_or_else(storage::new_id, |half| Ok(half.id))?;
            return storage::plan(&self.kernel, &self.home, &id, &self.wishes)?.save(&self.home);
        };
        agree(&self.home, &state, &self.wishes)?;
        let old = state.clone();
        match (&mut state.storage, &self.wishes.from) {
            (Storage::Loop { data, .. }, From::Loop { data: Some(wish), .. }) => *data = *wish,
            (Storage::Direct { device, .. }, From::Direct(direct)) => *device = std::path::absolute(&direct.device)?,
            _ => {}
        }
        if state != old { state.save(&self.home) } else { Ok(()) }
    }

    fn lock(&self) -> Result<File> {
        let path = self.home.join("pool.lock");
        let lock = open_lock(&path)?;
        lock.lock().doing(|| format!("locking {}", path.display()))?;
        Ok(lock)
    }

    /// Waits until nobody else changes the pool. Its device is there then.
    pub(crate) fn turn(&self) -> Result<Turn<'_>> {
        let lock = self.lock()?;
        let state = self.look()?;
        storage::set_up(&self.kernel, &self.home, &state)?;
        filesystem::never_retry(&state.prefix());
        Ok(Turn { pool: self, state, _lock: lock })
    }

    /// The state as it is now, without waiting for those who change it.
    pub(crate) fn look(&self) -> Result<State> {
        let gone = || Error::new(ErrorKind::Corrupt, format!("{}/pool.json is gone", self.home.display()));
        State::load(&self.home)?.ok_or_else(gone)
    }

    fn held(&self) -> std::sync::MutexGuard<'_, BTreeMap<LayerId, Use>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The layers whose devices this opening of the pool uses.
    pub(crate) fn held_now(&self) -> Vec<LayerId> {
        self.held().keys().copied().collect()
    }

    /// Marks a layer's device as used until [`let_go`](Self::let_go), or until this process ends.
    fn hold(&self, id: LayerId, note: impl FnOnce(&mut Use)) -> Result<()> {
        let mut held = self.held();
        if !held.contains_key(&id)
            && !sys::lock_byte(&self.uses, id.0, ByteLock::Shared).doing(|| "locking uses.lock")?
        {
            return Err(Error::new(ErrorKind::Busy, format!("layer {id} is just being committed or removed"))
                .hint("try again afterwards"));
        }
        note(held.entry(id).or_default());
        Ok(())
    }

    /// Takes the layer's device for ourselves; false if another process uses it.
    pub(crate) fn claim(&self, id: LayerId) -> Result<bool> {
        sys::lock_byte(&self.uses, id.0, ByteLock::Exclusive).doing(|| "locking uses.lock")
    }

    pub(crate) fn let_go(&self, id: LayerId) -> Result<()> {
        self.held().remove(&id);
        sys::lock_byte(&self.uses, id.0, ByteLock::Unlocked).doing(|| "unlocking uses.lock").map(drop)
    }
}

/// Whether the user asks for the pool there is.
fn agree(home: &Path, state: &State, wishes: &Wishes) -> Result<()> {
    let refuse = |why: String| {
        let hint = match state.layers.is_empty() {
            true => format!("it has no layers: remove the directory {} to have another pool here", home.display()),
            false => "leave the option out, or use another data root".into(),
        };
        Err(Error::new(ErrorKind::InvalidInput, why).hint(hint))
    };
    if let Some(block) = wishes.block.filter(|block| *block != state.block) {
        return refuse(format!("dm.blocksize is {block}, and the pool there is has {}", state.block));
    }
    if !wishes.explicit {
        return Ok(());
    }
    match (&wishes.from, &state.storage) {
        (From::Loop { data, metadata }, Storage::Loop { data: d, metadata: m })
            if data.is_some_and(|data| data < *d) || metadata.is_some_and(|metadata| metadata != *m) =>
        {
            refuse(format!("the loop files have {d} and {m} bytes; dm.loopdatasize can grow, and nothing else change"))
        }
        (From::Loop { .. }, Storage::Loop { .. }) => Ok(()),
        (From::Devices { data, metadata }, Storage::Devices { data: d, metadata: m }) if data == d && metadata == m => {
            Ok(())
        }
        (From::Direct(direct), Storage::Direct { device, shares, .. })
            if std::path::absolute(&direct.device).is_ok_and(|wish| wish == *device)
                || storage::check_header(&direct.device, &state.id).is_ok() =>
        {
            match shares {
                Some((data, metadata))
                    if direct.percent.is_some_and(|wish| wish != *data)
                        || direct.meta_percent.is_some_and(|wish| wish != *metadata) =>
                {
                    refuse(format!(
                        "the disk was divided by dm.thinp_percent={data} and dm.thinp_metapercent={metadata}"
                    ))
                }
                _ => Ok(()),
            }
        }
        (From::Given(pool), Storage::Given { name }) if pool.file_name().is_some_and(|n| n == name.as_str()) => Ok(()),
        _ => {
            let (asked, there) = (wishes.from.asked(), &state.storage);
            refuse(format!("{asked} asks for another pool than the one here, which is made of {there}"))
        }
    }
}

impl<'a> Turn<'a> {
    pub(crate) fn save(&self) -> Result<()> {
        self.state.save(&self.pool.home)
    }

    pub(crate) fn status(&self) -> Result<PoolStatus> {
        let (kind, line) = self.pool.kernel.describe(&self.state.pool_name(), false)?;
        match kind.as_str() {
            "thin-pool" => PoolStatus::parse(&line),
            _ => Err(Error::new(ErrorKind::Corrupt, format!("{} is a {kind}", self.state.pool_name()))),
        }
    }

    /// Makes sure that the pool can be changed, and finishes what an interrupted change left.
    pub(crate) fn ready(&mut self) -> Result<PoolStatus> {
        let status = self.agree()?;
        status.refuse_changes(&self.state.pool_name())?;
        let at = status.transaction;
        if let Some(thin) = self.state.intent {
            tracing::debug!(thin, "finishing an interrupted change of the pool");
            self.forget_thin(thin)?;
            self.count_up(at)?;
            self.save()?;
        }
        Ok(status)
    }

    /// Fails if the pool's own state and ours are not of the same moment, or if nothing can be said of the pool.
    pub(crate) fn agree(&self) -> Result<PoolStatus> {
        let status = self.status()?;
        status.refuse_failed(&self.state.pool_name())?;
        let State { transaction, intent, .. } = self.state;
        let at = status.transaction;
        if at != transaction && !(intent.is_some() && at == transaction + 1) {
            let why = format!("the pool is at transaction {at}, and pool.json at {transaction}");
            let hint = "one of them was restored from a backup, or another program uses the pool: restore both from the \
                        same moment, or remove the data root and load the images again";
            return Err(Error::new(ErrorKind::Corrupt, why).hint(hint));
        }
        Ok(status)
    }

    /// Fails if there is no room for data.
    pub(crate) fn refuse_full(&self) -> Result<()> {
        if !self.status()?.is_full() {
            return Ok(());
        }
        let why =
            format!("the data of pool {} are full, and what was written last may be lost", self.state.pool_name());
        Err(Error::new(ErrorKind::OutOfSpace, why).hint("remove images or containers, or make the pool larger"))
    }

    fn forget_thin(&self, thin: u32) -> Result<()> {
        match self.pool.kernel.tell(&self.state.pool_name(), &format!("delete {thin}")) {
            Err(e) if e.reason().contains("No data available") => Ok(()),
            other => other,
        }
    }

    /// `at` is where the pool is: one step behind or there already.
    fn count_up(&mut self, at: u64) -> Result<()> {
        let (old, new) = (self.state.transaction, self.state.transaction + 1);
        if at == old {
            self.pool.kernel.tell(&self.state.pool_name(), &format!("set_transaction_id {old} {new}"))?;
        }
        self.state.transaction = new;
        self.state.intent = None;
        Ok(())
    }

    /// Makes a thin device, a snapshot if there is an `origin`; `note` enters it.
    pub(crate) fn make(&mut self, origin: Option<u32>, note: impl FnOnce(&mut State, u32)) -> Result<()> {
        self.ready()?;
        let thin = self.state.free_thin();
        self.state.intent = Some(thin);
        self.save()?;
        let message = match origin {
            Some(origin) => format!("create_snap {thin} {origin}"),
            None => format!("create_thin {thin}"),
        };
        let made = self.pool.kernel.tell(&self.state.pool_name(), &message);
        if let (Err(e), Storage::Given { name }) = (&made, &self.state.storage)
            && e.kind() == ErrorKind::AlreadyExists
        {
            let why = format!("somebody else has made the thin device {thin} in pool {name}");
            self.state.intent = None;
            self.save()?;
            return Err(Error::new(ErrorKind::Corrupt, why).hint("give graphdriver a pool of its own"));
        }
        if let Err(e) = made {
            let undone = self.ready().map(drop);
            undone.unwrap_or_else(|e| tracing::warn!("undoing a change of the pool: {e}"));
            return Err(e);
        }
        self.count_up(self.state.transaction)?;
        note(&mut self.state, thin);
        self.save()
    }

    /// Deletes a thin device whose dm device is gone; `note` takes it out.
    pub(crate) fn delete(&mut self, thin: u32, note: impl FnOnce(&mut State)) -> Result<()> {
        self.ready()?;
        self.state.intent = Some(thin);
        note(&mut self.state);
        self.save()?;
        self.forget_thin(thin)?;
        self.count_up(self.state.transaction)?;
        self.save()
    }

    /// Fails if less is free than the user wants to be, after growing a pool that can grow.
    pub(crate) fn need_room(&mut self) -> Result<()> {
        self.extend()?;
        let status = self.ready()?;
        let percent = self.pool.wishes.min_free;
        for (what, used, unit) in [("data", status.data, self.state.block), ("metadata", status.metadata, 4096)] {
            if used.is_short_of(percent) {
                let free = (used.total.saturating_sub(used.used) * unit) >> 20;
                let why = format!(
                    "the pool's {what} are {}% full, {free} MiB are free, and dm.min_free_space wants {percent}%",
                    used.percent()
                );
                let hint = "remove images or containers, make the pool larger, or lower dm.min_free_space";
                return Err(Error::new(ErrorKind::OutOfSpace, why).hint(hint));
            }
        }
        Ok(())
    }

    /// Makes the pool as large as the state says, and larger if it is due.
    pub(crate) fn extend(&mut self) -> Result<()> {
        let status = self.status()?;
        let room = storage::room(&self.state)?;
        if let (Storage::Direct { data, .. }, From::Direct(direct), Some(room)) =
            (&mut self.state.storage, &self.pool.wishes.from, room)
            && status.data.percent() >= direct.threshold
            && *data < room
        {
            let block = self.state.block;
            let more = (*data / 100 * direct.extend / block).max(1) * block;
            *data = (*data + more).min(room);
            tracing::info!("growing the pool's data to {data} bytes");
            self.save()?;
        }
        let wanted = match &self.state.storage {
            Storage::Direct { data, .. } | Storage::Loop { data, .. } => data / self.state.block,
            _ => return Ok(()),
        };
        if status.data.total < wanted {
            storage::grow(&self.pool.kernel, &self.pool.home, &self.state)?;
        }
        Ok(())
    }

    /// Reads the pool's metadata as they are now.
    pub(crate) fn with_metadata<T>(&mut self, read: impl FnOnce(&Metadata) -> Result<T>) -> Result<T> {
        self.ready()?;
        let pool = self.state.pool_name();
        let kernel = &self.pool.kernel;
        // There is one snapshot at most, and one that is left from a killed process is out of date.
        if kernel.tell(&pool, "reserve_metadata_snap").is_err() {
            kernel.tell(&pool, "release_metadata_snap")?;
            kernel.tell(&pool, "reserve_metadata_snap")?;
        }
        let found = storage::devices(kernel, &pool).and_then(|(metadata, _)| read(&Metadata::open(&metadata)?));
        kernel.tell(&pool, "release_metadata_snap")?;
        found
    }

    fn thin_target(&self, thin: u32, size: u64) -> Result<Target> {
        let pool = self.pool.kernel.node(&self.state.pool_name())?;
        Ok(Target { kind: "thin", length: size / SECTOR * SECTOR, params: format!("{} {thin}", pool.display()) })
    }

    /// A device for the thin device.
    pub(crate) fn show(&self, name: &str, thin: u32, size: u64, read_only: bool) -> Result<PathBuf> {
        let kernel = &self.pool.kernel;
        match kernel.info(name)?.filter(|info| info.live) {
            Some(info) if self.usable(name, &info, read_only)? => {}
            _ => kernel.create(name, &self.thin_target(thin, size)?, read_only)?,
        }
        kernel.node(name)
    }

    /// Whether a device that is there can go on; else it is gone when this returns.
    fn usable(&self, name: &str, info: &Info, read_only: bool) -> Result<bool> {
        let kernel = &self.pool.kernel;
        if info.suspended {
            kernel.resume(name)?;
        }
        if info.read_only == read_only && kernel.keep(name)? {
            return Ok(true);
        }
        kernel.remove(name).map(|()| false)
    }

    /// The layer's device, there until it is released. Committed layers are read-only.
    pub(crate) fn activate(&mut self, id: LayerId) -> Result<PathBuf> {
        self.wake(id, |uses| uses.described = true)
    }

    /// The layer's device, there until it is given back.
    pub(crate) fn borrow(&mut self, id: LayerId) -> Result<(PathBuf, Borrowed<'a>)> {
        match self.wake(id, |uses| uses.borrowed += 1) {
            Ok(node) => Ok((node, Borrowed { pool: self.pool, id })),
            Err(e) => self.give_back(id).and(Err(e)),
        }
    }

    fn give_back(&self, id: LayerId) -> Result<()> {
        let unused = self.pool.held().get_mut(&id).is_some_and(|uses| {
            uses.borrowed = uses.borrowed.saturating_sub(1);
            !uses.described && uses.borrowed == 0
        });
        if unused {
            self.deactivate(id)?;
        }
        Ok(())
    }

    fn wake(&mut self, id: LayerId, note: impl FnOnce(&mut Use)) -> Result<PathBuf> {
        let layer = self.state.layer_mut(id)?;
        let committed = layer.phase == Phase::Committed;
        if !committed && !layer.written {
            layer.written = true;
            self.save()?;
        }
        self.pool.hold(id, note)?;
        let Layer { thin, size, .. } = self.state.layers[&id];
        self.show(&self.state.device_name(id), thin, size, committed)
    }

    /// Makes an active device as large as the state says.
    pub(crate) fn resize(&self, id: LayerId) -> Result<()> {
        let Layer { thin, size, .. } = self.state.layers[&id];
        self.pool.kernel.reload(&self.state.device_name(id), &self.thin_target(thin, size)?)
    }

    /// Lets a device that nobody uses go to sleep. False if somebody does.
    pub(crate) fn deactivate(&self, id: LayerId) -> Result<bool> {
        if !self.pool.claim(id)? {
            self.pool.let_go(id)?;
            return Ok(false);
        }
        let name = self.state.device_name(id);
        let done = match self.pool.kernel.info(&name)? {
            None => Ok(true),
            Some(info) if info.open == 0 => self.pool.kernel.remove(&name).map(|()| true),
            Some(_) if self.pool.wishes.deferred_removal => self.pool.kernel.remove_when_closed(&name).map(|()| false),
            Some(_) => Ok(false),
        };
        self.pool.let_go(id)?;
        done
    }

    /// Whether the space of removed layers is to be given back. Files take room from others as long as it is not.
    pub(crate) fn discards(&self) -> bool {
        self.pool.wishes.discard.unwrap_or(matches!(self.state.storage, Storage::Loop { .. }))
    }

    /// Gives back the space below a device that is nobody's any more. Its name is taken for that.
    pub(crate) fn discard(&self, name: &str, thin: u32, size: u64) -> Result<()> {
        let node = self.show(name, thin, size, false)?;
        // Exclusively: a mounted filesystem, wherever it is mounted, would lose what it is on.
        let options = File::options().write(true).custom_flags(libc::O_EXCL).open(&node);
        let device = options.doing(|| format!("opening {} for its space to be given back", node.display()))?;
        let discarded = sys::discard(device.as_fd(), size).doing(|| format!("discarding {}", node.display()));
        drop(device);
        // A pool whose data cannot be discarded deletes its devices all the same.
        discarded.unwrap_or_else(|e| tracing::debug!("the space below goes back without a discard: {e}"));
        self.pool.kernel.remove(name)
    }
}
