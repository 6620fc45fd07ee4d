//! The btrfs storage driver: a layer is a subvolume, a child a snapshot of its parent.
//!
//! # On disk
//!
//! ```text
//! HOME/version            the format: "graphdriver btrfs 1"
//! HOME/layers/ID          the layer's subvolume: all of its tree, not only what differs from its parents; read-only once
//!                         it is committed, and then without subvolumes nested in it. A container can set that flag too,
//!                         so a layer is committed if it has it and HOME/usage/ID is there
//! HOME/layers/new-ID      a layer being created
//! HOME/layers/removed-*   a subvolume being removed
//! HOME/layers/frozen-*    a read-only snapshot of an active layer, there while somebody reads where it has changed
//! HOME/frozen.lock        held with flock(2), shared, by whoever has one of these
//! HOME/usage/ID           what a committed layer takes by itself: bytes and inodes, decimal
//! HOME/limits/ID          the size that was asked for and what the kernel was told, bytes, decimal
//! HOME/flat/ID            nested subvolumes of the layer are being made directories; held with flock(2) by who does it.
//!                         Its content is the name in the layer's root where that is done
//! HOME/stale/N            subvolume N is deleted and its qgroup 0/N perhaps not
//! ```
//!
//! HOME may be anywhere on a btrfs: in any subvolume, below a bind mount.
//!
//! # Crashes
//!
//! A layer gets its name when it is whole, by a rename; that commits the filesystem before `create` returns, if the layer is
//! to be durable. `commit` first flushes the data, then writes down what the layer takes, then sets the read-only flag,
//! which commits the filesystem. So a layer with both is whole. One that was interrupted after the flag is read-only,
//! and committing it again succeeds. A removal begins with a rename and ends when the kernel has been told to free the
//! subvolume; it does so by itself, also over a crash. Leftovers have names by which `reclaim` finds them.
//! A diff that is killed leaves its snapshot to whoever opens the data directory next.
//!
//! # Space
//!
//! Sizes are limits of a layer's qgroup on exclusive bytes: what it takes beyond what it shares with its parent. The kernel
//! forgets them when somebody turns quotas off, so a mount for writing sets them again, or fails. A layer's
//! usage is explained at the module `usage`. Data in a subvolume that a container makes inside its layer counts for that
//! subvolume, until the layer is committed.

mod flatten;
mod home;
mod inventory;
mod limits;
mod native;
mod options;
mod probe;
mod stream;
mod subvolume;
mod sys;
mod usage;

use graphdriver_core::{
    Access, ByteSize, Capabilities, Context, DriverFactory, Error, ErrorKind, GraphDriver, LayerId, LayerOptions,
    Limits, Mount, Narrow, NativeDiff, Options, Reclaimed, Result, Root, Stored, Unmet, Usage, mount::MountInfo,
};
use graphdriver_quota::qgroup::{Accounting, Qgroups};
use home::Home;
use native::{Changed, Everywhere};
use options::Wishes;
use probe::Support;
use std::{os::fd::AsFd, path::Path};

/// How the engine finds this driver.
pub const FACTORY: DriverFactory = DriverFactory {
    name: "btrfs",
    summary: "btrfs: layers are subvolumes, a child is a snapshot, new data goes to a new place",
    options: options::SPECS,
    probe: |home, options| {
        let look = || {
            let wishes = Wishes::parse(options)?;
            let support = probe::support(home)?;
            let quota = probe::would_limit(home, &wishes, &support)?;
            Ok(probe::capabilities(&support, quota))
        };
        look().map_err(|e: Error| Unmet {
            missing: e.reason().into(),
            remedy: e.hint_text().unwrap_or("change the options or the data root").into(),
        })
    },
    open: |home, options| Ok(Box::new(Btrfs::open(home, options)?)),
};

/// Layers as subvolumes.
#[derive(Debug)]
pub struct Btrfs {
    home: Home,
    support: Support,
    min_space: u64,
    capabilities: Capabilities,
}

impl Btrfs {
    /// Opens the data directory `home`, which is made if it is not there.
    ///
    /// Fails with `InvalidInput` for an option's wrong value, and with `Unsupported` if `home` is not on btrfs or the
    /// filesystem cannot count as the options want it.
    pub fn open(home: &Path, options: &Options) -> Result<Btrfs> {
        Self::open_at(&std::path::absolute(home)?, options).doing(|| format!("opening btrfs at {}", home.display()))
    }

    fn open_at(path: &Path, options: &Options) -> Result<Btrfs> {
        let wishes = Wishes::parse(options)?;
        let support = probe::support(path)?;
        let mut home = Home::open(path, support.privileged)?;
        home.quotas = probe::quotas(path, &wishes)?;
        // The next one tries again.
        home.thaw().unwrap_or_else(|e| tracing::warn!("snapshots of a killed diff stay: {e}"));
        home.tidy()?;
        let capabilities = probe::capabilities(&support, home.quotas.is_some() && support.privileged);
        Ok(Btrfs { home, support, min_space: wishes.min_space, capabilities })
    }

    fn quotas(&self) -> Result<&Qgroups> {
        self.home.quotas.as_ref().filter(|_| self.support.privileged).ok_or_else(|| {
            let (why, hint) = match self.home.quotas {
                None => (
                    "sizes cannot be limited here: the filesystem's quotas are off, or btrfs.quota=off",
                    "turn them on with the option btrfs.quota=simple (before Linux 6.7 btrfs.quota=qgroup), or with \
                     btrfs quota enable --simple DIR, which btrfs-progs know from 6.7 on",
                ),
                Some(_) => ("limiting the size of a layer needs root", "leave the size out"),
            };
            Error::new(ErrorKind::Unsupported, why).hint(hint)
        })
    }

    /// The limits, if they can be enforced.
    fn checked(&self, limits: Limits) -> Result<Limits> {
        if limits.inodes.is_some() {
            return Err(Error::new(ErrorKind::Unsupported, "btrfs counts no inodes, so it cannot limit them")
                .hint("leave the limit of inodes out"));
        }
        let Some(size) = limits.size else { return Ok(limits) };
        self.quotas()?;
        if size.0 < self.min_space {
            let why = format!("a size of {size} is less than btrfs.min_space, {}", ByteSize(self.min_space));
            return Err(Error::new(ErrorKind::InvalidInput, why).hint("ask for more"));
        }
        if size.0 == 0 {
            return Err(Error::new(ErrorKind::InvalidInput, "a size of 0 leaves no room for anything"));
        }
        Ok(limits)
    }

    /// Sets a layer's limit again if the filesystem has lost it, as its quotas were off meanwhile.
    fn enforce(&self, id: LayerId, layer: &Root) -> Result<()> {
        let Some(note) = self.home.noted(id)? else { return Ok(()) };
        if self.home.enforced(layer)?.is_some() {
            return Ok(());
        }
        let set = self.quotas().and_then(|quotas| self.home.limit(id, layer.as_fd(), quotas, Some(note.size)));
        set.doing(|| format!("setting the limit of {} again, which the filesystem has lost", note.size))
    }

    fn recipe(&self, id: LayerId, access: Access) -> Result<Mount> {
        let layer = self.home.layer(id)?;
        if access == Access::ReadWrite {
            if self.home.committed(id, &layer)?.is_some() {
                let why = format!("layer {id} is committed, and can be mounted for reading only");
                return Err(Error::new(ErrorKind::InvalidInput, why));
            }
            self.home.activate(id, &layer)?;
            self.enforce(id, &layer)?;
        }
        let mode = if access == Access::ReadOnly { "ro" } else { "rw" };
        Ok(Mount { fstype: "bind".into(), source: self.home.path(id), options: vec!["bind".into(), mode.into()] })
    }
}

impl GraphDriver for Btrfs {
    fn name(&self) -> &'static str {
        FACTORY.name
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn status(&self) -> Vec<(String, String)> {
        let quotas = match &self.home.quotas {
            None => "off".to_owned(),
            Some(quotas) if quotas.inconsistent() => {
                format!("{}, inconsistent: run btrfs quota rescan", quotas.accounting().name())
            }
            Some(quotas) => quotas.accounting().name().to_owned(),
        };
        let lines = [
            ("Backing Filesystem", "btrfs".to_owned()),
            ("Sector Size", self.support.sector.to_string()),
            ("Quotas", quotas),
            ("Minimum Size", self.min_space.to_string()),
            ("Native Diff", self.capabilities.native_diff.to_string()),
            ("Supports id-mapped layers", self.capabilities.idmapped_mounts.to_string()),
        ];
        lines.map(|(name, value)| (name.to_owned(), value)).into()
    }

    fn create(&self, id: LayerId, parents: &[LayerId], options: &LayerOptions) -> Result<()> {
        let create = || {
            let limits = self.checked(Limits { size: options.size, inodes: options.inodes })?;
            if parents.len() > self.capabilities.max_depth {
                let why = format!("{} parents, where {} are the most", parents.len(), self.capabilities.max_depth);
                return Err(Error::new(ErrorKind::Unsupported, why));
            }
            self.home.create(id, parents, limits, options.durable)
        };
        create().doing(|| format!("creating layer {id}"))
    }

    fn commit(&self, id: LayerId) -> Result<()> {
        self.home.commit(id).doing(|| format!("committing layer {id}"))
    }

    fn mount(&self, id: LayerId, _parents: &[LayerId], access: Access) -> Result<Vec<Mount>> {
        let recipe = self.recipe(id, access).map(|mount| vec![mount]);
        recipe.doing(|| format!("describing the mount of layer {id}"))
    }

    fn limits(&self, id: LayerId) -> Result<Limits> {
        let limits = || {
            let (enforced, noted) = (self.home.enforced(&self.home.layer(id)?)?, self.home.noted(id)?);
            let size = match (enforced, noted) {
                // Changed by hand.
                (Some(size), note) if note.is_none_or(|note| note.told != size) => Some(size),
                // Nobody can write to the layer before it is enforced.
                (_, note) => note.map(|note| note.size),
            };
            Ok::<_, Error>(Limits { size, inodes: None })
        };
        limits().doing(|| format!("asking for the limits of layer {id}"))
    }

    fn set_limits(&self, id: LayerId, limits: Limits) -> Result<()> {
        let set = || {
            let layer = self.home.layer(id)?;
            let size = self.checked(limits)?.size;
            if size.is_none() && self.home.enforced(&layer)?.is_none() {
                return self.home.forget_limit(id);
            }
            self.home.limit(id, layer.as_fd(), self.quotas()?, size)
        };
        set().doing(|| format!("limiting layer {id}"))
    }

    fn usage(&self, id: LayerId) -> Result<Usage> {
        self.home.usage(id)
    }

    fn thaw(&self, id: LayerId) -> Result<()> {
        self.home.layer(id).and_then(|layer| self.home.activate(id, &layer)).doing(|| format!("thawing layer {id}"))
    }

    fn remove(&self, id: LayerId) -> Result<()> {
        self.home.remove(id).doing(|| format!("removing layer {id}"))
    }

    fn reclaim(&self, known: &dyn Fn(LayerId) -> bool) -> Result<Reclaimed> {
        self.home.reclaim(known).doing(|| "removing what crashes have left")
    }

    fn shown_by(&self, mount: &MountInfo) -> Option<LayerId> {
        self.home.shown_by(mount)
    }

    fn inventory(&self) -> Result<Vec<Stored>> {
        self.home.inventory()
    }

    fn native_diff(&self) -> Option<&dyn NativeDiff> {
        self.capabilities.native_diff.then_some(self)
    }
}

impl NativeDiff for Btrfs {
    fn narrow(&self, id: LayerId, parents: &[LayerId]) -> Result<Box<dyn Narrow + '_>> {
        let narrowed = self.changed(id, parents).doing(|| format!("asking where layer {id} has changed"));
        match narrowed {
            Ok(Some(changed)) => Ok(Box::new(changed)),
            Ok(None) => Ok(Box::new(Everywhere)),
            Err(e) if e.kind() == ErrorKind::NotFound => Err(e),
            // The walk needs none of it.
            Err(e) => {
                tracing::warn!("comparing everything: {e}");
                Ok(Box::new(Everywhere))
            }
        }
    }
}

impl Btrfs {
    /// Where the layer has changed; none if that is not to be had.
    fn changed(&self, id: LayerId, parents: &[LayerId]) -> Result<Option<Changed>> {
        let layer = self.home.layer(id)?;
        let Some(parent) = parents.first() else { return Ok(None) };
        let parent = self.home.layer(*parent)?;
        let (info, below) = (subvolume::info(layer.as_fd())?, subvolume::info(parent.as_fd())?);
        // Anything else was put there by hand.
        if info.parent_uuid != below.uuid || !subvolume::is_read_only(parent.as_fd())? {
            return Ok(None);
        }
        let born = usage::born(&info);
        if self.home.committed(id, &layer)?.is_some() {
            return Changed::between(layer.as_fd(), parent.as_fd(), born).map(Some);
        }
        // Full qgroups count what a snapshot shares as nobody's own, so a limit would not hold while there is one.
        let full = self.home.quotas.as_ref().is_some_and(|quotas| quotas.accounting() == Accounting::Full);
        if full && self.limits(id)?.size.is_some() {
            return Ok(None);
        }
        let nested = subvolume::nested_directly(layer.as_fd())?;
        let frozen = self.home.freeze(id, &layer)?;
        let mut changed = Changed::between(frozen.root.as_fd(), parent.as_fd(), born)?;
        changed.add_nested(&nested);
        Ok(Some(changed))
    }
}
