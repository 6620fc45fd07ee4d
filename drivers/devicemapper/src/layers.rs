//! Layers: what the contract asks for, on the pool.

use crate::{
    filesystem::{self, Xfs},
    metadata::{Difference, Metadata},
    narrow::{Changed, Everything, Ext4, Inodes},
    options::{Fs, Wishes},
    pool::{Borrowed, Pool, Turn},
    state::{Base, Layer, Phase, Size, State, Storage},
    step, storage,
};
use graphdriver_core::{
    Access, ByteSize, Error, ErrorKind, LayerId, LayerOptions, Limits, Mount, Narrow, Reclaimed, Result, Usage, mount,
};
use std::{
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

/// The layers of one data directory.
pub(crate) struct Layers {
    pub(crate) pool: Pool,
}

impl Layers {
    pub(crate) fn open(home: &Path, wishes: Wishes) -> Result<Layers> {
        filesystem::choose(wishes.fs)?;
        let layers = Layers { pool: Pool::open(home, wishes)? };
        let mut turn = layers.pool.turn()?;
        match turn.agree()?.refuse_changes(&turn.state.pool_name()) {
            Ok(()) => {
                turn.ready()?;
                turn.extend()?;
            }
            // What is there can still be read.
            Err(e) => tracing::warn!("{e}"),
        }
        warn_of_loop(&turn.state);
        layers.put_to_sleep(&turn)?;
        drop(turn);
        layers.finish_removals();
        Ok(layers)
    }

    pub(crate) fn block(&self) -> Result<u64> {
        Ok(self.pool.look()?.block)
    }

    /// Removes the devices that a crash left active, and wakes those it left suspended.
    fn put_to_sleep(&self, turn: &Turn<'_>) -> Result<()> {
        let prefix = turn.state.prefix();
        let ours = self.pool.held_now();
        for name in self.pool.kernel.list(&prefix)? {
            let Ok(id) = name[prefix.len()..].parse::<LayerId>() else { continue };
            if self.pool.kernel.info(&name)?.is_some_and(|info| info.suspended && info.live) {
                self.pool.kernel.resume(&name)?;
            }
            if ours.contains(&id) {
                continue;
            }
            if let Err(e) = turn.deactivate(id) {
                tracing::debug!("device {name} stays active: {e}");
            }
        }
        Ok(())
    }

    /// Frees layers whose removal was interrupted, or waited for somebody to close their device.
    fn finish_removals(&self) {
        let Ok(state) = self.pool.look() else { return };
        for id in state.layers.iter().filter(|(_, layer)| layer.phase == Phase::Removing).map(|(id, _)| *id) {
            // Without waiting, which every command would do as long as somebody has it mounted.
            let open = self.pool.kernel.info(&state.device_name(id)).is_ok_and(|info| info.is_some_and(|i| i.open > 0));
            if open {
                tracing::debug!("layer {id} is removed, and its device still in use");
            } else if let Err(e) = self.free(id) {
                tracing::debug!("layer {id} is removed, and its storage not free yet: {e}");
            }
        }
    }

    pub(crate) fn create(&self, id: LayerId, parents: &[LayerId], options: &LayerOptions) -> Result<()> {
        if options.inodes.is_some() {
            let e = Error::new(ErrorKind::Unsupported, "devicemapper limits no inodes");
            return Err(e.hint("limit the size, or choose another driver"));
        }
        let mut turn = self.pool.turn()?;
        for parent in parents {
            if turn.state.visible(*parent)?.phase != Phase::Committed {
                let e = Error::new(ErrorKind::InvalidInput, format!("layer {parent} is active"));
                return Err(e.hint("only committed layers have children"));
            }
        }
        match turn.state.layers.get(&id).map(|layer| layer.phase) {
            Some(Phase::Active | Phase::Committed) => {
                return Err(Error::new(ErrorKind::AlreadyExists, format!("there is a layer {id} already")));
            }
            Some(Phase::Making | Phase::Removing) => {
                drop(turn);
                self.free(id)?;
                turn = self.pool.turn()?;
            }
            None => {}
        }
        turn.need_room()?;
        let layer = self.plan(&mut turn, parents.first().copied(), options)?;
        let (grow, origin) = (layer.grow, layer.thin);
        turn.make(Some(origin), |state, thin| {
            state.layers.insert(id, Layer { thin, ..layer });
        })?;
        if !grow {
            return Ok(());
        }
        drop(turn);
        self.grow(id, Phase::Active)
    }

    /// The new layer, with its origin's thin device.
    fn plan(&self, turn: &mut Turn<'_>, parent: Option<LayerId>, options: &LayerOptions) -> Result<Layer> {
        let (thin, size, fs, inodes) = match parent {
            Some(parent) => {
                let parent = turn.state.visible(parent)?;
                let inodes = parent.usage.map_or(parent.inodes, |usage| usage.all_inodes);
                (parent.thin, parent.size, parent.fs, inodes)
            }
            None => {
                self.need_base(turn)?;
                let base = turn.state.base.as_ref().expect("it was just made");
                (base.thin, base.size, base.fs, base.inodes - 1)
            }
        };
        let wanted = options.size.map_or(size, |wanted| round(wanted.0));
        refuse_smaller(wanted, size)?;
        let grow = wanted > size;
        let phase = if grow { Phase::Making } else { Phase::Active };
        let (written, lacking, usage) = (false, false, None);
        Ok(Layer { thin, size: wanted, fs, parent, phase, written, grow, inodes, lacking, usage })
    }

    /// Makes the filesystem as large as the layer, which then is in that phase.
    fn grow(&self, id: LayerId, then: Phase) -> Result<()> {
        let mut turn = self.pool.turn()?;
        let node = turn.activate(id)?;
        let Layer { fs, size, .. } = turn.state.layers[&id];
        drop(turn);
        step()?;
        filesystem::visit(fs, &node, |root| filesystem::grow(fs, root, &node, size))?;
        step()?;
        let mut turn = self.pool.turn()?;
        let layer = turn.state.layer_mut(id)?;
        (layer.grow, layer.phase) = (false, then);
        turn.save()
    }

    /// The formatted device that layers without parents are snapshots of.
    fn need_base(&self, turn: &mut Turn<'_>) -> Result<()> {
        let wishes = &self.pool.wishes;
        let (fs, size) = (filesystem::choose(wishes.fs)?, round(wishes.base_size));
        if size < fs.least() {
            let why = format!("dm.basesize is {size}, and {fs} needs at least {} MiB", fs.least() >> 20);
            return Err(Error::new(ErrorKind::InvalidInput, why));
        }
        match &turn.state.base {
            Some(base) if base.ready && base.size == size && base.fs == fs && base.mkfs == wishes.mkfs => return Ok(()),
            Some(_) => self.drop_base(turn)?,
            None => {}
        }
        let mkfs = wishes.mkfs.clone();
        turn.make(None, |state, thin| {
            state.base = Some(Base { thin, size, fs, mkfs, inodes: 0, ready: false });
        })?;
        let thin = turn.state.base.as_ref().expect("it was just made").thin;
        let name = base_name(&turn.state);
        let node = turn.show(&name, thin, size, false)?;
        step()?;
        let inodes = filesystem::make(fs, &node, &wishes.mkfs)?;
        crate::dm::flush(&node)?;
        self.pool.kernel.remove(&name)?;
        let base = turn.state.base.as_mut().expect("it was just made");
        (base.ready, base.inodes) = (true, inodes.max(1));
        turn.save()
    }

    fn drop_base(&self, turn: &mut Turn<'_>) -> Result<()> {
        let Some(Base { thin, size, .. }) = turn.state.base else { return Ok(()) };
        turn.ready()?;
        // From here on nothing may be made of it, also if this is all that comes to pass.
        turn.state.base.as_mut().expect("it was just there").ready = false;
        turn.save()?;
        let name = base_name(&turn.state);
        match turn.discards() {
            true => turn.discard(&name, thin, size)?,
            false => self.pool.kernel.remove(&name)?,
        }
        turn.delete(thin, |state| state.base = None)
    }

    pub(crate) fn mount(&self, id: LayerId, access: Access) -> Result<Vec<Mount>> {
        let mut turn = self.pool.turn()?;
        let &Layer { phase, fs, grow, .. } = turn.state.visible(id)?;
        if phase == Phase::Committed && access == Access::ReadWrite {
            let e = Error::new(ErrorKind::InvalidInput, "it is committed, and committed layers do not change");
            return Err(e.hint("mount it read-only, or create an active layer on it"));
        }
        if access == Access::ReadWrite {
            turn.ready()?;
            turn.extend()?;
        }
        let mut node = turn.activate(id)?;
        if grow {
            drop(turn);
            self.grow(id, phase)?;
            turn = self.pool.turn()?;
            node = turn.activate(id)?;
        }
        Ok(filesystem::recipe(fs, &node, phase == Phase::Committed, access, &self.pool.wishes.mount))
    }

    pub(crate) fn commit(&self, id: LayerId) -> Result<()> {
        let layer = self.pool.look()?.visible(id)?.clone();
        if layer.phase == Phase::Committed {
            return Ok(());
        }
        let mut turn = self.pool.turn()?;
        self.refuse_lacking(&mut turn, id)?;
        let name = turn.state.device_name(id);
        if self.pool.kernel.wait_until_closed(&name)?.is_some_and(|info| info.open > 0) {
            return Err(Error::new(ErrorKind::Busy, "it is still mounted").hint("unmount it first"));
        }
        // From here to the end nobody else gets its device.
        if !self.pool.claim(id)? {
            return Err(used_by_another());
        }
        let committed = self.commit_claimed(id, turn);
        self.pool.let_go(id).and(committed)
    }

    fn commit_claimed(&self, id: LayerId, turn: Turn<'_>) -> Result<()> {
        let layer = turn.state.visible(id)?.clone();
        let all_inodes = match layer.written {
            true => self.settle(id, &layer, turn)?,
            false => {
                drop(turn);
                untouched(&layer)
            }
        };
        let mut turn = self.pool.turn()?;
        self.refuse_lacking(&mut turn, id)?;
        let bytes = self.compare(&mut turn, id)?.own * turn.state.block;
        let layer = turn.state.layer_mut(id)?;
        let inodes = all_inodes.saturating_sub(layer.inodes);
        layer.usage = Some(Size { bytes, inodes, all_inodes });
        layer.phase = Phase::Committed;
        turn.save()
    }

    /// Makes a committed layer active again.
    pub(crate) fn thaw(&self, id: LayerId) -> Result<()> {
        let mut turn = self.pool.turn()?;
        if turn.state.visible(id)?.phase != Phase::Committed {
            return Ok(());
        }
        let layer = turn.state.layer_mut(id)?;
        (layer.phase, layer.usage) = (Phase::Active, None);
        turn.save()
    }

    /// Fails if what was written to the layer may not have found room. Once known, that stays so when there is room again.
    fn refuse_lacking(&self, turn: &mut Turn<'_>, id: LayerId) -> Result<()> {
        let layer = turn.state.layer_mut(id)?;
        if layer.lacking {
            let e = Error::new(ErrorKind::Corrupt, "the pool was full, and some of what was written to it may be lost");
            return Err(e.hint("copy what is of use out of it, remove it, and make it again"));
        }
        if !layer.written {
            return Ok(());
        }
        let Err(full) = turn.refuse_full() else { return Ok(()) };
        turn.state.layer_mut(id)?.lacking = true;
        turn.save()?;
        Err(full)
    }

    /// Makes sure that all of the layer is on the pool, with nothing left in a log. Returns how many inodes it has.
    fn settle(&self, id: LayerId, layer: &Layer, turn: Turn<'_>) -> Result<u64> {
        let name = turn.state.device_name(id);
        let node = turn.show(&name, layer.thin, layer.size, false)?;
        drop(turn);
        let inodes = filesystem::visit(layer.fs, &node, filesystem::used_inodes)?;
        crate::dm::flush(&node)?;
        self.pool.kernel.remove(&name)?;
        Ok(inodes)
    }

    pub(crate) fn release(&self, id: LayerId) -> Result<()> {
        let turn = self.pool.turn()?;
        if turn.state.layers.contains_key(&id) {
            turn.deactivate(id)?;
        }
        Ok(())
    }

    pub(crate) fn usage(&self, id: LayerId) -> Result<Usage> {
        let layer = self.pool.look()?.visible(id)?.clone();
        if let Some(usage) = layer.usage {
            return Ok(usage.into());
        }
        let all_inodes = match layer.written {
            true => {
                let (node, _borrowed) = self.pool.turn()?.borrow(id)?;
                filesystem::measure(layer.fs, &node)?
            }
            false => untouched(&layer),
        };
        let mut turn = self.pool.turn()?;
        let bytes = self.compare(&mut turn, id)?.own * turn.state.block;
        Ok(Usage { bytes, inodes: all_inodes.saturating_sub(layer.inodes) })
    }

    /// How the layer's blocks differ from those of its parent, or of the empty filesystem.
    fn compare(&self, turn: &mut Turn<'_>, id: LayerId) -> Result<Difference> {
        let layer = turn.state.layer_mut(id)?.clone();
        let origin = match layer.parent {
            Some(parent) => turn.state.layers.get(&parent).map(|parent| parent.thin),
            None => turn.state.base.as_ref().map(|base| base.thin),
        };
        turn.with_metadata(|metadata: &Metadata| metadata.compare(layer.thin, origin))
    }

    /// Narrows a walk over the layer and its parent.
    pub(crate) fn narrow(&self, id: LayerId) -> Result<Box<dyn Narrow + '_>> {
        // Before the turn, so that they are given back after it.
        let mut devices = Vec::new();
        let mut turn = self.pool.turn()?;
        let layer = turn.state.visible(id)?.clone();
        let Some(parent) = layer.parent else { return Ok(Box::new(Everything)) };
        // Freezing it would have to write.
        if layer.phase == Phase::Active && turn.status()?.is_full() {
            return Ok(Box::new(Everything));
        }
        // Mounted first: that replays the log of a crash.
        let (upper, node) = self.view(&mut turn, id, &mut devices)?;
        let (lower, _) = self.view(&mut turn, parent, &mut devices)?;
        if layer.phase == Phase::Active
            && let Err(e) = self.pool.kernel.quiesce(&turn.state.device_name(id))
        {
            // Its filesystem gave up when the pool was full, perhaps.
            tracing::debug!("layer {id} is compared as a whole: {e}");
            return Ok(Box::new(Everything));
        }
        let blocks = self.compare(&mut turn, id)?.changed;
        let device = std::fs::File::open(&node)?;
        let inodes = match layer.fs {
            Fs::Xfs => Xfs::read(&device).map(Inodes::Xfs),
            Fs::Ext4 => Ext4::read(&device).map(Inodes::Ext4),
        };
        match inodes {
            Ok(inodes) => {
                Ok(Box::new(Changed { inodes, blocks, block: turn.state.block, lower, upper, _devices: devices }))
            }
            Err(e) => {
                tracing::debug!("layer {id} is compared as a whole: {e}");
                Ok(Box::new(Everything))
            }
        }
    }

    /// The layer as a detached mount for reading, and its device.
    fn view<'a>(
        &self,
        turn: &mut Turn<'a>,
        id: LayerId,
        devices: &mut Vec<Borrowed<'a>>,
    ) -> Result<(OwnedFd, PathBuf)> {
        let (node, borrowed) = turn.borrow(id)?;
        devices.push(borrowed);
        let layer = &turn.state.layers[&id];
        let committed = layer.phase == Phase::Committed;
        let recipe = filesystem::recipe(layer.fs, &node, committed, Access::ReadOnly, &self.pool.wishes.mount);
        Ok((mount::detached(&recipe)?, node))
    }

    pub(crate) fn limits(&self, id: LayerId) -> Result<Limits> {
        let size = self.pool.look()?.visible(id)?.size;
        Ok(Limits { size: Some(ByteSize(size)), inodes: None })
    }

    pub(crate) fn set_limits(&self, id: LayerId, limits: Limits) -> Result<()> {
        let mut turn = self.pool.turn()?;
        let layer = turn.state.visible(id)?.clone();
        if layer.phase != Phase::Active {
            return Err(Error::new(ErrorKind::InvalidInput, "it is committed, and committed layers do not change"));
        }
        if limits.inodes.is_some() {
            return Err(Error::new(ErrorKind::Unsupported, "devicemapper limits no inodes"));
        }
        let Some(size) = limits.size else {
            let why = format!("a layer is never larger than its device, which has {}", ByteSize(layer.size));
            return Err(Error::new(ErrorKind::Unsupported, why).hint("set a larger size"));
        };
        let size = round(size.0);
        refuse_smaller(size, layer.size)?;
        if size > layer.size {
            turn.refuse_full()?;
            let layer = turn.state.layer_mut(id)?;
            (layer.size, layer.grow) = (size, true);
            turn.save()?;
            turn.activate(id)?;
            turn.resize(id)?;
        }
        drop(turn);
        self.grow(id, Phase::Active)
    }

    pub(crate) fn remove(&self, id: LayerId) -> Result<()> {
        let mut turn = self.pool.turn()?;
        let Some(layer) = turn.state.layers.get(&id) else { return Ok(()) };
        let visible = matches!(layer.phase, Phase::Active | Phase::Committed);
        turn.ready()?;
        let name = turn.state.device_name(id);
        let open = self.pool.kernel.wait_until_closed(&name)?.is_some_and(|info| info.open > 0);
        if open && !self.pool.wishes.deferred_deletion {
            let e = Error::new(ErrorKind::Busy, "it is mounted, or something else holds its device");
            return Err(e.hint(format!("`fuser -vm /dev/mapper/{name}` shows who uses it")));
        }
        if !open && !self.pool.claim(id)? {
            return Err(used_by_another());
        }
        if visible {
            turn.state.layer_mut(id)?.phase = Phase::Removing;
            turn.save().or_else(|e| self.pool.let_go(id).and(Err(e)))?;
        }
        if open {
            self.pool.kernel.remove_when_closed(&name)?;
            return self.pool.let_go(id);
        }
        drop(turn);
        self.free(id)
    }

    /// Deletes the storage of a layer that nobody may see.
    fn free(&self, id: LayerId) -> Result<()> {
        if !self.pool.claim(id)? {
            return Err(used_by_another());
        }
        let freed = self.free_claimed(id);
        self.pool.let_go(id)?;
        freed
    }

    fn free_claimed(&self, id: LayerId) -> Result<()> {
        let mut turn = self.pool.turn()?;
        let Some(layer) = turn.state.layers.get(&id) else { return Ok(()) };
        let Layer { thin, size, .. } = *layer;
        turn.ready()?;
        let name = turn.state.device_name(id);
        if self.pool.kernel.wait_until_closed(&name)?.is_some_and(|info| info.open > 0) {
            return Err(Error::new(ErrorKind::Busy, format!("device {name} is in use"))
                .hint(format!("`fuser -vm /dev/mapper/{name}` shows by whom")));
        }
        match turn.discards() {
            true => turn.discard(&name, thin, size)?,
            false => self.pool.kernel.remove(&name)?,
        }
        turn.delete(thin, |state| {
            state.layers.remove(&id);
        })
    }

    pub(crate) fn reclaim(&self, known: &dyn Fn(LayerId) -> bool) -> Result<Reclaimed> {
        let turn = self.pool.turn()?;
        self.put_to_sleep(&turn)?;
        let unknown: Vec<LayerId> = turn.state.layers.keys().copied().filter(|id| !known(*id)).collect();
        let (block, before) = (turn.state.block, turn.status()?.data.used);
        drop(turn);
        let mut reclaimed = Reclaimed::default();
        for id in unknown {
            match self.remove(id) {
                Ok(()) => reclaimed.layers += 1,
                // The next time, when nobody uses it.
                Err(e) if e.kind() == ErrorKind::Busy => tracing::warn!("leftover layer {id} stays for now: {e}"),
                Err(e) => return Err(e.doing(format!("removing leftover layer {id}"))),
            }
        }
        let after = self.pool.turn()?.status()?.data.used;
        reclaimed.bytes = before.saturating_sub(after) * block;
        Ok(reclaimed)
    }

    /// Lets everything sleep that was woken here, and takes the pool down if there are no layers in it.
    pub(crate) fn close(&self) -> Result<()> {
        let mut turn = self.pool.turn()?;
        for id in self.pool.held_now() {
            turn.deactivate(id)?;
        }
        if turn.state.layers.is_empty() {
            self.drop_base(&mut turn)?;
            storage::take_down(&self.pool.kernel, &turn.state)?;
        }
        Ok(())
    }

    pub(crate) fn status(&self) -> Result<Vec<(String, String)>> {
        let turn = self.pool.turn()?;
        let (state, status) = (&turn.state, turn.status()?);
        let bytes = |blocks: u64, unit: u64| ByteSize(blocks * unit).to_string();
        let wishes = &self.pool.wishes;
        let mut lines = vec![
            ("Pool Name", state.pool_name()),
            ("Pool Blocksize", ByteSize(state.block).to_string()),
            ("Pool Storage", state.storage.to_string()),
            ("Base Device Size", ByteSize(wishes.base_size).to_string()),
            ("Backing Filesystem", filesystem::choose(wishes.fs)?.to_string()),
            ("Data Space Used", bytes(status.data.used, state.block)),
            ("Data Space Total", bytes(status.data.total, state.block)),
            ("Metadata Space Used", bytes(status.metadata.used, 4096)),
            ("Metadata Space Total", bytes(status.metadata.total, 4096)),
            ("Minimum Free Space", format!("{}%", wishes.min_free)),
            ("Discards Reach Storage", (turn.discards() && status.discard_passdown).to_string()),
            ("Deferred Removal Enabled", wishes.deferred_removal.to_string()),
            ("Deferred Deletion Enabled", wishes.deferred_deletion.to_string()),
            ("Transaction", state.transaction.to_string()),
        ];
        if let Storage::Loop { .. } = state.storage {
            lines.push(("WARNING", LOOP_WARNING.into()));
        }
        Ok(lines.into_iter().map(|(name, value)| (name.to_owned(), value)).collect())
    }
}

impl Drop for Layers {
    fn drop(&mut self) {
        self.close().unwrap_or_else(|e| tracing::debug!("closing devicemapper: {e}"));
    }
}

const LOOP_WARNING: &str = "loop files are slow and for trying out only; for real use give dm.thinpooldev or \
                            dm.directlvm_device";

fn warn_of_loop(state: &State) {
    static ONCE: std::sync::Once = std::sync::Once::new();
    if let Storage::Loop { .. } = state.storage {
        ONCE.call_once(|| tracing::warn!("devicemapper: {LOOP_WARNING}"));
    }
}

fn used_by_another() -> Error {
    Error::new(ErrorKind::Busy, "another process uses its device").hint("unmount it there, or end that process")
}

/// The inodes of a layer to which nothing was written. The root of one without parents is its own.
fn untouched(layer: &Layer) -> u64 {
    layer.inodes + u64::from(layer.parent.is_none())
}

fn base_name(state: &State) -> String {
    format!("{}base", state.prefix())
}

/// Filesystems have blocks of up to 64 KiB.
fn round(size: u64) -> u64 {
    size.next_multiple_of(64 << 10)
}

fn refuse_smaller(wanted: u64, least: u64) -> Result<()> {
    if wanted >= least {
        return Ok(());
    }
    let why = format!("a size of {wanted} bytes is less than the {least} that it has already: devices only grow");
    Err(Error::new(ErrorKind::Unsupported, why).hint("ask for more, or load the image with a smaller dm.basesize"))
}
