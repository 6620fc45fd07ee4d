//! The data directory.

use crate::{
    flatten,
    limits::{self, Note},
    subvolume,
    usage::{self, generation},
};
use graphdriver_core::{
    ByteSize, Context, Error, ErrorKind, LayerId, Limits, Reclaimed, Result, Root, Usage,
    mount::{self, MountInfo},
    open_lock,
};
use graphdriver_quota::qgroup::{Accounting, Qgroups, subvolume_id};
use rustix::{
    fs::{self, AtFlags, CWD, FlockOperation, Mode, StatxFlags},
    io::Errno,
    rand::{GetRandomFlags, getrandom},
};
use std::{
    collections::HashMap,
    fs::{DirBuilder, File},
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::DirBuilderExt,
    },
    path::{Path, PathBuf},
    sync::{Mutex, OnceLock, PoisonError},
};

const FORMAT: &str = "graphdriver btrfs 1\n";

/// An opened data directory. Its layout is in the crate's documentation.
#[derive(Debug)]
pub(crate) struct Home {
    pub(crate) path: PathBuf,
    layers: OwnedFd,
    /// Those that are used.
    pub quotas: Option<Qgroups>,
    privileged: bool,
    /// What active layers take, by the generation in which they were measured.
    measured: Mutex<HashMap<u64, (u64, Usage)>>,
    /// Where layers are, as tables of mounts have it; none if it cannot be told.
    place: OnceLock<Option<Place>>,
}

/// A directory's filesystem, and the way to it from the filesystem's own root.
#[derive(Debug)]
struct Place {
    dev: (u32, u32),
    path: PathBuf,
}

/// A read-only snapshot that exists while this does.
pub(crate) struct Frozen<'h> {
    home: &'h Home,
    name: String,
    pub root: OwnedFd,
    _lock: File,
}

impl Home {
    /// Makes what is missing of `path`, which is absolute. Refuses one that is something else.
    pub(crate) fn open(path: &Path, privileged: bool) -> Result<Home> {
        check_version(path)?;
        for dir in ["layers", "usage", "limits", "flat", "stale"] {
            make_dirs(&path.join(dir))?;
        }
        let layers = subvolume::open(CWD, path.join("layers")).doing(|| format!("opening {}", path.display()))?;
        Ok(Home {
            path: path.into(),
            layers,
            quotas: None,
            privileged,
            measured: Mutex::default(),
            place: OnceLock::new(),
        })
    }

    pub(crate) fn layers(&self) -> BorrowedFd<'_> {
        self.layers.as_fd()
    }

    /// Where a layer is.
    pub(crate) fn path(&self, id: LayerId) -> PathBuf {
        self.path.join("layers").join(id.to_string())
    }

    /// The root of a layer. Fails with `NotFound` if there is no such layer.
    pub(crate) fn layer(&self, id: LayerId) -> Result<Root> {
        subvolume::open(self.layers(), id.to_string()).map(Root::from_fd).map_err(|e| match e {
            Errno::NOENT => Error::new(ErrorKind::NotFound, format!("layer {id} is not there")),
            e => Error::from(e).doing(format!("opening layer {id}")),
        })
    }

    /// Makes an active layer whole or not at all.
    pub(crate) fn create(&self, id: LayerId, parents: &[LayerId], limits: Limits, durable: bool) -> Result<()> {
        let parent = parents.first().map(|parent| self.layer(*parent)).transpose()?;
        // Not all at once: there may be more of them than open files.
        parents.iter().skip(1).try_for_each(|parent| self.layer(*parent).map(drop))?;
        let exists = || Error::new(ErrorKind::AlreadyExists, "it is there already");
        if self.layer(id).is_ok() {
            return Err(exists());
        }
        // An interrupted removal of the same number is finished on the way, and so is an interrupted creation.
        self.remove(id)?;
        let new = format!("new-{id}");
        let made = (|| {
            self.build(id, &new, parent.as_ref(), limits)?;
            match subvolume::rename(self.layers(), &new, &id.to_string()) {
                Err(Errno::EXIST) => Err(exists()),
                renamed => renamed.doing(|| format!("renaming {new}")),
            }
        })();
        if made.is_err() {
            let cleaned = self.destroy(&new).and_then(|()| match self.layer(id) {
                // Somebody else's.
                Ok(_) => Ok(()),
                Err(_) => remove_file(&self.limit_note(id)),
            });
            cleaned.inspect_err(|e| tracing::warn!("{new} stays until the next reclaim: {e}")).ok();
        }
        made?;
        // What makes a name durable that leads to a subvolume is a commit of the filesystem, which this is.
        if durable { fs::fsync(&self.layers).doing(|| "flushing the directory of layers") } else { Ok(()) }
    }

    fn build(&self, id: LayerId, new: &str, parent: Option<&Root>, limits: Limits) -> Result<()> {
        match parent {
            Some(parent) => subvolume::snapshot(parent.as_fd(), self.layers(), new, false)?,
            None => subvolume::create(self.layers(), new)?,
        }
        let root = subvolume::open(self.layers(), new)?;
        if parent.is_none() {
            fs::fchmod(&root, Mode::from(0o755))?;
        }
        match (&self.quotas, limits.size) {
            (Some(quotas), Some(_)) => self.limit(id, root.as_fd(), quotas, limits.size),
            _ => Ok(()),
        }
    }

    /// Limits what a layer takes by itself, all of it: also what simple quotas do not count, as it was there before them.
    pub(crate) fn limit(
        &self,
        id: LayerId,
        root: BorrowedFd<'_>,
        quotas: &Qgroups,
        size: Option<ByteSize>,
    ) -> Result<()> {
        let subvolume = subvolume_id(root)?;
        let Some(size) = size else {
            quotas.limit(subvolume, Limits::default())?;
            return self.forget_limit(id);
        };
        let uncounted = match quotas.accounting() {
            Accounting::Simple => usage::uncounted(root)?,
            Accounting::Full => 0,
        };
        let told = ByteSize(size.0.saturating_sub(uncounted).max(1));
        quotas.limit(subvolume, Limits { size: Some(told), inodes: None })?;
        limits::write(&self.limit_note(id), Note { size, told })
    }

    pub(crate) fn forget_limit(&self, id: LayerId) -> Result<()> {
        remove_file(&self.limit_note(id))
    }

    /// The limit that was asked for.
    pub(crate) fn noted(&self, id: LayerId) -> Result<Option<Note>> {
        limits::read(&self.limit_note(id))
    }

    /// The limit that the kernel holds now.
    pub(crate) fn enforced(&self, layer: &Root) -> Result<Option<ByteSize>> {
        let Some(quotas) = &self.quotas else { return Ok(None) };
        match quotas.state(subvolume_id(layer.as_fd())?) {
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            state => Ok(state?.limits.size),
        }
    }

    /// Freezes a layer, durably: its data and what it takes before the flag that says it is whole.
    pub(crate) fn commit(&self, id: LayerId) -> Result<()> {
        let layer = self.layer(id)?;
        // With subvolumes in it, it is one whose commit was killed, and that a container then has made read-only.
        if self.committed(id, &layer)?.is_some() && subvolume::nested_directly(layer.as_fd())?.is_empty() {
            return self.flush();
        }
        self.activate(id, &layer)?;
        flatten::flatten(&layer, &self.intent(id), &mut |ids| self.mark(ids))?;
        self.flush()?;
        usage::record(&self.record(id), self.measure(layer.as_fd())?)?;
        subvolume::set_read_only(layer.as_fd(), true)?;
        // Somebody may have written between the two.
        self.flush()?;
        self.tidy()
    }

    /// What a committed layer takes by itself, as it was written down then; none for an active one. The read-only flag
    /// alone says nothing: whoever owns the root of an active layer can set it, a container too.
    pub(crate) fn committed(&self, id: LayerId, layer: &Root) -> Result<Option<Usage>> {
        if subvolume::is_read_only(layer.as_fd())? { usage::recorded(&self.record(id)) } else { Ok(None) }
    }

    /// Makes a layer that is not committed writable, whatever a container did to its flag. The record of a commit that
    /// was killed goes, or that flag would make a commit of it.
    pub(crate) fn activate(&self, id: LayerId, layer: &Root) -> Result<()> {
        remove_file(&self.record(id))?;
        if subvolume::is_read_only(layer.as_fd())? {
            subvolume::set_read_only(layer.as_fd(), false).doing(|| format!("making layer {id} writable"))?;
        }
        Ok(())
    }

    /// Writes down what anybody has written to the filesystem, and reports it if something could not be.
    fn flush(&self) -> Result<()> {
        fs::syncfs(&self.layers).doing(|| format!("flushing the filesystem of {}", self.path.display()))
    }

    /// What the layer takes by itself: as it was written down when it was committed, or now.
    pub(crate) fn usage(&self, id: LayerId) -> Result<Usage> {
        let layer = self.layer(id)?;
        match self.committed(id, &layer)? {
            Some(usage) => Ok(usage),
            None => self.measure(layer.as_fd()),
        }
    }

    fn measure(&self, root: BorrowedFd<'_>) -> Result<Usage> {
        let mut usage = self.own(root)?;
        if let Some(quotas) = self.quotas.as_ref().filter(|quotas| !quotas.inconsistent()) {
            match quotas.state(subvolume_id(root)?) {
                Err(e) if e.kind() == ErrorKind::NotFound => {}
                // They do not count what was there before them.
                state if quotas.accounting() == Accounting::Simple => usage.bytes = usage.bytes.max(state?.used.bytes),
                state => usage.bytes = state?.used.bytes,
            }
        }
        Ok(usage)
    }

    /// By its own metadata, which is read only when it has changed.
    fn own(&self, root: BorrowedFd<'_>) -> Result<Usage> {
        let (generation, info) = generation(root)?;
        let known = self.measured.lock().unwrap_or_else(PoisonError::into_inner).get(&info.id).copied();
        if let Some((_, usage)) = known.filter(|(then, _)| *then == generation) {
            return Ok(usage);
        }
        let usage = match self.privileged {
            true => usage::own(root, &info)?,
            false => usage::walked(&Root::from_fd(root.try_clone_to_owned()?), &info)?,
        };
        let mut measured = self.measured.lock().unwrap_or_else(PoisonError::into_inner);
        if measured.len() >= MOST_MEASURED {
            measured.clear();
        }
        measured.insert(info.id, (generation, usage));
        Ok(usage)
    }

    /// Removes a layer, or what is left of one; none there is no error.
    pub(crate) fn remove(&self, id: LayerId) -> Result<()> {
        self.remove_name(&id.to_string())?;
        self.remove_name(&format!("new-{id}"))?;
        for file in [self.record(id), self.limit_note(id), self.intent(id)] {
            remove_file(&file)?;
        }
        self.tidy()
    }

    /// Removes `HOME/layers/NAME`, and what an interrupted removal of it left. As it is renamed first, the name is free
    /// at once, and `reclaim` knows what is left.
    fn remove_name(&self, name: &str) -> Result<()> {
        let trash = format!("removed-{name}");
        loop {
            match subvolume::rename(self.layers(), name, &trash) {
                Err(Errno::EXIST) => self.destroy(&trash)?,
                Ok(()) | Err(Errno::NOENT) => return self.destroy(&trash),
                Err(e) => return Err(Error::from(e).doing(format!("renaming {name}"))),
            }
        }
    }

    fn destroy(&self, name: &str) -> Result<()> {
        subvolume::destroy(self.layers(), name, &mut |ids| self.mark(ids))
    }

    /// Notes subvolumes that are about to be deleted, because their qgroups can go only after them. Their limits go now:
    /// in a full subvolume none that is nested could be deleted.
    fn mark(&self, ids: &[u64]) -> Result<()> {
        let Some(quotas) = self.quotas.as_ref().filter(|_| self.privileged) else { return Ok(()) };
        for id in ids {
            if quotas.state(*id).is_ok_and(|state| state.limits.size.is_some()) {
                quotas.limit(*id, Limits::default())?;
            }
            let mark = self.path.join("stale").join(id.to_string());
            File::create(&mark).doing(|| format!("writing {}", mark.display()))?;
        }
        Ok(())
    }

    /// Removes the qgroups of deleted subvolumes, as far as the kernel is done with these. It waits for nothing.
    pub(crate) fn tidy(&self) -> Result<()> {
        let Some(quotas) = self.quotas.as_ref().filter(|_| self.privileged) else { return Ok(()) };
        for (name, path) in entries(&self.path.join("stale"))? {
            let Ok(id) = name.parse() else { continue };
            if quotas.forget(id)? {
                remove_file(&path)?;
            }
        }
        Ok(())
    }

    /// Removes what the store does not know.
    pub(crate) fn reclaim(&self, known: &dyn Fn(LayerId) -> bool) -> Result<Reclaimed> {
        let mut freed = Reclaimed::default();
        let no_frozen = self.lock_frozen(FlockOperation::NonBlockingLockExclusive)?;
        for (name, _) in entries(&self.path.join("layers"))? {
            let leftover = match name.parse() {
                Ok(id) => !known(id),
                Err(_) => match name.split_once('-') {
                    Some(("new", id)) => id.parse().is_ok_and(|id| !known(id) || self.layer(id).is_ok()),
                    Some(("removed", _)) => true,
                    Some(("frozen", _)) => no_frozen.is_some(),
                    _ => false,
                },
            };
            if !leftover {
                continue;
            }
            let root = subvolume::open(self.layers(), &name);
            let bytes = root.ok().and_then(|root| self.measure(root.as_fd()).ok()).unwrap_or_default().bytes;
            let removed = if name.starts_with("removed-") { self.destroy(&name) } else { self.remove_name(&name) };
            match removed {
                Ok(()) => {
                    freed.bytes += bytes;
                    freed.layers += 1;
                }
                // One that cannot be removed keeps no other.
                Err(e) => tracing::warn!("{name} stays until the next reclaim: {e}"),
            }
        }
        drop(no_frozen);
        self.reclaim_notes()?;
        self.tidy()?;
        Ok(freed)
    }

    /// Finishes what the notes of a crashed process say, and removes those of layers that are gone.
    fn reclaim_notes(&self) -> Result<()> {
        for (name, path) in entries(&self.path.join("flat"))? {
            let Ok(id) = name.parse() else { continue };
            let undone = flatten::undo(self.layer(id).ok().as_ref(), &path, &mut |ids| self.mark(ids));
            undone.unwrap_or_else(|e| tracing::warn!("{} stays until the next reclaim: {e}", path.display()));
        }
        for dir in ["usage", "limits"] {
            for (name, path) in entries(&self.path.join(dir))? {
                let id = name.strip_suffix(".new").unwrap_or(&name).parse();
                if id.is_ok_and(|id| self.layer(id).is_err()) {
                    remove_file(&path)?;
                }
            }
        }
        Ok(())
    }

    /// A snapshot of an active layer as it is now.
    pub(crate) fn freeze(&self, id: LayerId, layer: &Root) -> Result<Frozen<'_>> {
        let lock = self.lock_frozen(FlockOperation::LockShared)?.expect("this one waits");
        let name = format!("frozen-{id}-{}", unique()?);
        subvolume::snapshot(layer.as_fd(), self.layers(), &name, true).doing(|| format!("freezing layer {id}"))?;
        let root = subvolume::open(self.layers(), &name).doing(|| format!("opening {name}"))?;
        Ok(Frozen { home: self, name, root, _lock: lock })
    }

    /// Removes the temporary snapshots of those who were killed. It waits for nobody who has one.
    pub(crate) fn thaw(&self) -> Result<()> {
        let mut all = entries(&self.path.join("layers"))?;
        all.retain(|(name, _)| name.starts_with("frozen-"));
        if all.is_empty() || !self.privileged {
            return Ok(());
        }
        let Some(_alone) = self.lock_frozen(FlockOperation::NonBlockingLockExclusive)? else { return Ok(()) };
        all.iter().try_for_each(|(name, _)| self.destroy(name))
    }

    /// Held shared by whoever has a temporary snapshot: one that is there when nobody holds it was left by a crash. None
    /// if it is held and the operation does not wait.
    pub(crate) fn lock_frozen(&self, how: FlockOperation) -> Result<Option<File>> {
        let path = self.path.join("frozen.lock");
        let file = open_lock(&path)?;
        match fs::flock(&file, how) {
            Err(Errno::WOULDBLOCK) => Ok(None),
            locked => locked.map(|()| Some(file)).doing(|| format!("locking {}", path.display())),
        }
    }

    /// The layer whose subvolume the mount shows, wherever it was made.
    pub(crate) fn shown_by(&self, mount: &MountInfo) -> Option<LayerId> {
        if mount.fstype != "btrfs" {
            return None;
        }
        let place = self.place.get_or_init(|| self.find_place().ok().flatten()).as_ref()?;
        let name = mount.root.strip_prefix(&place.path).ok().filter(|_| mount.dev == place.dev)?;
        name.to_str()?.parse().ok()
    }

    fn find_place(&self) -> Result<Option<Place>> {
        let id = fs::statx(&self.layers, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)?.stx_mnt_id;
        let Some(on) = mount::table()?.into_iter().find(|entry| entry.id == id) else { return Ok(None) };
        // Without symlinks on the way.
        let layers = std::fs::canonicalize(self.path.join("layers"))?;
        let below = layers.strip_prefix(&on.mount_point).ok();
        Ok(below.map(|below| Place { dev: on.dev, path: on.root.join(below) }))
    }

    fn record(&self, id: LayerId) -> PathBuf {
        self.path.join("usage").join(id.to_string())
    }

    fn limit_note(&self, id: LayerId) -> PathBuf {
        self.path.join("limits").join(id.to_string())
    }

    fn intent(&self, id: LayerId) -> PathBuf {
        self.path.join("flat").join(id.to_string())
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        let removed = self.home.destroy(&self.name).and_then(|()| self.home.tidy());
        removed.inspect_err(|e| tracing::warn!("{} stays until the next reclaim: {e}", self.name)).ok();
    }
}

/// More layers than anybody looks at, and little memory.
const MOST_MEASURED: usize = 10_000;

/// Sixteen hexadecimal digits that nobody else has.
pub(crate) fn unique() -> Result<String> {
    let mut bytes = [0; 8];
    getrandom(&mut bytes, GetRandomFlags::empty()).doing(|| "asking for a random number")?;
    Ok(format!("{:016x}", u64::from_ne_bytes(bytes)))
}

/// Refuses a directory of another format, and marks a new one.
fn check_version(home: &Path) -> Result<()> {
    make_dirs(home)?;
    let path = home.join("version");
    match std::fs::read_to_string(&path) {
        Ok(text) if text == FORMAT => Ok(()),
        Ok(text) => {
            let why = format!("the format of {} is {:?}, and this program knows {:?}", home.display(), text, FORMAT);
            Err(Error::new(ErrorKind::Unsupported, why).hint("use the program that wrote it"))
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let stranger = entries(home)?.into_iter().find(|(name, _)| name != "version.new" && name != "lost+found");
            if let Some((name, _)) = stranger {
                let why = format!("{} holds {name:?} and no version file", home.display());
                return Err(Error::new(ErrorKind::InvalidInput, why).hint("give the driver a directory of its own"));
            }
            write_version(home).doing(|| format!("writing {}", path.display()))
        }
        Err(e) => Err(Error::from(e).doing(format!("reading {}", path.display()))),
    }
}

fn write_version(home: &Path) -> io::Result<()> {
    let new = home.join("version.new");
    std::fs::write(&new, FORMAT)?;
    File::open(&new)?.sync_all()?;
    std::fs::rename(&new, home.join("version"))?;
    File::open(home)?.sync_all()
}

pub(crate) fn entries(dir: &Path) -> Result<Vec<(String, PathBuf)>> {
    let read = || {
        let mut all = Vec::new();
        for entry in std::fs::read_dir(dir)? {
            let entry = entry?;
            // None of ours has another name.
            if let Ok(name) = entry.file_name().into_string() {
                all.push((name, entry.path()));
            }
        }
        Ok::<_, io::Error>(all)
    };
    read().doing(|| format!("reading {}", dir.display()))
}

fn remove_file(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(Error::from(e).doing(format!("removing {}", path.display())))
        }
        _ => Ok(()),
    }
}

/// Makes a directory and those above it; none of them readable for others.
fn make_dirs(path: &Path) -> Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).doing(|| format!("making {}", path.display()))
}
