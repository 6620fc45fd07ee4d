//! The contract between the engine and a storage driver.

use crate::{ByteSize, LayerId, Result, mount::MountInfo};
use serde::Serialize;
use std::{
    fmt,
    path::{Path, PathBuf},
};

/// A storage driver: the mechanism that makes, freezes, describes, measures and removes the storage of numbered layers.
///
/// # Words
///
/// A *layer* is one filesystem state with at most one parent. It is *active* (writable), a *view* (read-only, never
/// committed) or *committed* (immutable; only committed layers have children). A *chain* is a layer and its
/// ancestors, topmost first. A *mount recipe* is what `mount(2)` wants: type, source, options. A driver describes
/// mounts and does not perform them, so that a recipe can be carried out in another mount namespace.
///
/// # Who knows what
///
/// Names, kinds, parents, labels, intents and reference counts are the [store](crate::store)'s, the same for every
/// driver. A driver is told the numbers of a layer's parents (topmost first) whenever it needs them, and remembers
/// nothing but what lies on its disk. The store never gives a number twice, records its intent before it calls,
/// and calls [`reclaim`](Self::reclaim) for what a crash left.
///
/// # Lifecycle
///
/// ```text
/// create ──▶ active ──commit──▶ committed ──▶ (parent of others) ──▶ remove
///              │  ▲
///              ▼  │ mount: as often as wanted; release: nobody has it mounted now
///            remove
/// ```
///
/// # Promises, each a case of the conformance suite
///
/// * Atomic: a call takes effect wholly or not at all. What an interrupted call left is unreachable, and `remove` of the
///   same number or `reclaim` frees it; `create` of a number that has leftovers succeeds.
/// * Isolated: what is written to one layer is never seen through another.
/// * Honest: an option that cannot be enforced is [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) with what is missing.
/// * Durable: after `commit` has returned the layer survives a power cut, whole.
/// * `remove` of an unknown number is no error, so that an interrupted removal can be repeated.
/// * All methods may be called from several threads and processes at once, for different layers.
///
/// # Example
///
/// What the engine does to unpack an image of one layer, and to run a container on it. The in-memory reference
/// driver stands in for a real one.
///
/// ```
/// # #[cfg(feature = "model")] {
/// use graphdriver_core::{Access, GraphDriver, LayerId, LayerOptions, model::ModelDriver};
///
/// let driver = ModelDriver::new();
/// let (image, container) = (LayerId(1), LayerId(2));
///
/// // The image's layer: active while it is filled, then frozen.
/// driver.create(image, &[], &LayerOptions::default())?;
/// driver.tree(image, &[])?.mkdir("etc", 0o755)?;
/// driver.commit(image)?;
///
/// // The container's writable layer on top of it.
/// driver.create(container, &[image], &LayerOptions::default())?;
/// let _recipe = driver.mount(container, &[image], Access::ReadWrite)?;
/// driver.tree(container, &[image])?.write_file("etc/hostname", b"box\n", 0o644)?;
///
/// // What the container wrote never reaches the image.
/// assert!(driver.tree(image, &[])?.read_file("etc/hostname").is_err());
///
/// // Children go before their parents.
/// driver.release(container)?;
/// driver.remove(container)?;
/// driver.remove(image)?;
/// # }
/// # Ok::<(), graphdriver_core::Error>(())
/// ```
pub trait GraphDriver: Send + Sync {
    /// The name users pass to `--storage-driver`.
    fn name(&self) -> &'static str;

    /// What this instance was found to support when it was opened.
    fn capabilities(&self) -> &Capabilities;

    /// Facts for `graphdriver info`, in the order to print them: `("Backing Filesystem", "ext4")`.
    fn status(&self) -> Vec<(String, String)> {
        Vec::new()
    }

    /// Makes an active layer on `parents` (topmost first; empty for a base layer). Its root is a directory of mode
    /// 0755 owned by the caller's root user, or what the parent's root is.
    ///
    /// Fails with `AlreadyExists` if the layer is there whole, with `Unsupported` for an option that cannot be enforced
    /// and for more parents than [`Capabilities::max_depth`].
    fn create(&self, id: LayerId, parents: &[LayerId], options: &LayerOptions) -> Result<()>;

    /// Freezes an active layer. After it returns the layer survives a power cut. Committing twice is no error.
    fn commit(&self, id: LayerId) -> Result<()>;

    /// Undoes a `commit` that nobody was told of, because it failed or the store could not record it, or that a crash
    /// interrupted: the layer is active, with what it holds, and can be written to. Of an active layer: no error.
    fn thaw(&self, id: LayerId) -> Result<()>;

    /// The recipe that shows the layer on top of its parents; several steps are carried out in order on one target.
    /// `ReadWrite` is for active layers only.
    fn mount(&self, id: LayerId, parents: &[LayerId], access: Access) -> Result<Vec<Mount>>;

    /// How much the layer may take at the most.
    fn limits(&self, _id: LayerId) -> Result<Limits> {
        Ok(Limits::default())
    }

    /// Changes how much the layer, active and perhaps mounted, may take at the most; `None` inside: no limit any more.
    /// What it takes already stays, also if that is more. Fails with `Unsupported` for a limit that cannot be enforced.
    fn set_limits(&self, _id: LayerId, limits: Limits) -> Result<()> {
        if limits == Limits::default() {
            return Ok(());
        }
        let why = format!("storage driver {} limits no layers here", self.name());
        Err(crate::Error::new(crate::ErrorKind::Unsupported, why))
    }

    /// A hint that nobody has it mounted: a device may sleep until the next `mount`.
    fn release(&self, _id: LayerId) -> Result<()> {
        Ok(())
    }

    /// The space that only this layer takes, without its parents'.
    fn usage(&self, id: LayerId) -> Result<Usage>;

    /// Frees the layer. Of an unknown number: no error. Fails with `Busy` if something holds it.
    fn remove(&self, id: LayerId) -> Result<()>;

    /// Frees what the store does not know: what a crash left behind. The caller makes sure that no other process is
    /// creating layers meanwhile, or that `known` says yes to those.
    ///
    /// What cannot be freed keeps nothing else from being freed. The first such error is returned at the end, and the
    /// call is repeated at every opening of the store until there is none.
    fn reclaim(&self, known: &dyn Fn(LayerId) -> bool) -> Result<Reclaimed>;

    /// All that is in this driver's storage, whoever knows it: layers, what [`reclaim`](Self::reclaim) would free, and
    /// what somebody else put there. Changes nothing. Others may change what it tells of meanwhile.
    fn inventory(&self) -> Result<Vec<Stored>>;

    /// Which layer this entry in a table of mounts shows, if it can be told from a device, dataset or subvolume in it.
    /// Whoever carried out the recipe may have done so in another mount namespace.
    fn shown_by(&self, _mount: &MountInfo) -> Option<LayerId> {
        None
    }

    /// Where the layer's own changes lie as a directory in overlayfs's format (character devices 0/0 or xattrs as
    /// whiteouts, opaque xattrs), if that is how this driver stores them. A layer tar is then unpacked there, without
    /// its parents, and layers of one image in parallel.
    fn diff_dir(&self, _id: LayerId) -> Option<DiffDir> {
        None
    }

    /// A faster source of changes than walking two mounts, if the storage records them.
    fn native_diff(&self) -> Option<&dyn NativeDiff> {
        None
    }
}

/// A layer's own changes as a directory in overlayfs's format.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiffDir {
    /// The directory.
    pub path: PathBuf,
    /// The namespace of overlayfs's own xattrs there.
    pub xattrs: OverlayXattrs,
    /// What becomes of a file's own attributes that would be taken for such.
    pub escape: EscapeXattrs,
}

/// Which attributes of files get another `overlay.` behind overlayfs's prefix, so that they come out of a mount as they
/// were and never take effect (kernel `Documentation/filesystems/overlayfs.rst`, "Nesting overlayfs mounts").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EscapeXattrs {
    /// None: those in overlayfs's namespace are refused as unsupported.
    None,
    /// Those in the namespace that is used here, as overlayfs does since Linux 6.8.
    Own,
    /// Those in either, for a union filesystem that reads both.
    Both,
}

/// Where overlayfs keeps its own xattrs (kernel `Documentation/filesystems/overlayfs.rst`, "User xattr").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OverlayXattrs {
    /// `trusted.overlay.`, for which CAP_SYS_ADMIN in the initial user namespace is needed.
    Trusted,
    /// `user.overlay.`, with the mount option `userxattr`.
    User,
}

impl OverlayXattrs {
    /// The prefix with its last dot.
    pub fn prefix(self) -> &'static str {
        match self {
            OverlayXattrs::Trusted => "trusted.overlay.",
            OverlayXattrs::User => "user.overlay.",
        }
    }
}

/// Tells where changes can be, so that comparing a layer with its parent need not walk everything.
pub trait NativeDiff: Send + Sync {
    /// Prepares to narrow a walk over the layer, active or committed.
    fn narrow(&self, id: LayerId, parents: &[LayerId]) -> Result<Box<dyn Narrow + '_>>;
}

/// See [`NativeDiff`].
pub trait Narrow {
    /// Which names in the directory `dir` (relative to the layer's root; empty for the root) may differ from the parent's.
    /// Asked only for directories that exist in both. A name too many costs time, a name too few loses a change.
    fn candidates(&mut self, dir: &Path) -> Result<Candidates>;
}

/// The answer of [`Narrow::candidates`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Candidates {
    /// Everything at and below this directory has to be compared.
    All,
    /// These names and nothing else.
    Names(Vec<std::ffi::OsString>),
}

/// Who may write through a mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Access {
    /// The layer as it is.
    ReadOnly,
    /// The active layer itself.
    ReadWrite,
}

/// A mount recipe: what `mount(2)` wants, carried out by somebody else.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Mount {
    /// Filesystem type, or `bind`.
    #[serde(rename = "type")]
    pub fstype: String,
    /// Device, directory or a word, as the type wants it.
    pub source: PathBuf,
    /// As after `mount -o`, one element each: `ro`, `lowerdir=/a:/b`. Colons, commas and backslashes in overlayfs's
    /// paths are escaped with a backslash, as the kernel's parser wants them.
    pub options: Vec<String>,
}

/// What a driver instance can do here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Capabilities {
    /// What the first write to old data costs.
    pub write_strategy: WriteStrategy,
    /// Whether [`LayerOptions::size`] is enforced.
    pub quota: bool,
    /// Whether [`LayerOptions::inodes`] is.
    pub inode_quota: bool,
    /// Whether [`GraphDriver::native_diff`] is there.
    pub native_diff: bool,
    /// Whether its layers can be shown by [id-mapped mounts](crate::mount::IdMapped), as far as that can be told before
    /// one is mounted.
    pub idmapped_mounts: bool,
    /// Whether a layer's own changes lie apart ([`GraphDriver::diff_dir`]), so that the layers of an image can be
    /// unpacked in parallel and before their parents.
    pub independent_layers: bool,
    /// The most parents a mountable layer may have.
    pub max_depth: usize,
}

/// How old data survives the first write to it, and how much of it is moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(tag = "strategy", rename_all = "kebab-case")]
pub enum WriteStrategy {
    /// Copied into the writable layer at the first change.
    CopyUp {
        /// What is copied at the least.
        unit: CopyUnit,
    },
    /// The old block is copied elsewhere before it is overwritten in place: one read and a second write.
    BlockCopyOnWrite {
        /// In bytes.
        block: u64,
    },
    /// New data goes to a new place, the old stays where it is.
    RedirectOnWrite {
        /// In bytes.
        block: u64,
    },
}

/// What a copy-up moves at the least.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum CopyUnit {
    /// All data of a file.
    File,
    /// A file whose extents are shared with the lower one; only metadata is copied.
    Reflink,
    /// What is written, in pieces of `bytes`; the rest of the file stays below until it is completed.
    Extent {
        /// The size of a piece.
        bytes: u64,
    },
}

impl fmt::Display for WriteStrategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            WriteStrategy::CopyUp { unit: CopyUnit::File } => f.write_str("copy-up (whole file)"),
            WriteStrategy::CopyUp { unit: CopyUnit::Reflink } => f.write_str("copy-up (reflink)"),
            WriteStrategy::CopyUp { unit: CopyUnit::Extent { bytes } } => {
                write!(f, "copy-up (extents of {} KiB)", bytes / 1024)
            }
            WriteStrategy::BlockCopyOnWrite { block } => write!(f, "copy-on-write ({} KiB blocks)", block / 1024),
            WriteStrategy::RedirectOnWrite { block } => write!(f, "redirect-on-write ({} KiB blocks)", block / 1024),
        }
    }
}

/// What a new layer should be like.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LayerOptions {
    /// The most that may be written to it.
    pub size: Option<ByteSize>,
    /// The most inodes (files, directories and all else) that may be in it.
    pub inodes: Option<u64>,
    /// Whether it has to survive a power cut, empty as it is, from when `create` returns: as a container's writable layer
    /// does, and a layer that is filled and committed at once does not.
    pub durable: bool,
}

/// What a layer may take at the most; `None`: as much as there is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Limits {
    /// Bytes.
    pub size: Option<ByteSize>,
    /// Inodes.
    pub inodes: Option<u64>,
}

/// The space a layer takes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Usage {
    /// Bytes allocated on disk.
    pub bytes: u64,
    /// Inodes: files, directories and all else.
    pub inodes: u64,
}

/// What [`GraphDriver::reclaim`] freed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Reclaimed {
    /// Leftovers, whole layers or parts of some.
    pub layers: u64,
    /// Bytes, as far as they are known.
    pub bytes: u64,
}

/// One thing in a driver's storage, as [`GraphDriver::inventory`] finds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// Where an administrator finds it: a path, a dataset, a thin device.
    pub place: String,
    /// What it is.
    pub what: StoredAs,
}

/// What a driver takes something in its storage for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoredAs {
    /// A layer that can be mounted.
    Layer {
        /// Its number.
        id: LayerId,
        /// Whether it is frozen.
        committed: bool,
    },
    /// What should be a layer.
    Damaged {
        /// Its number.
        id: LayerId,
        /// What is wrong with it, as the end of "its storage ...": "has no directory diff".
        flaw: String,
    },
    /// What no layer needs once whoever is at work is done, and [`GraphDriver::reclaim`] frees.
    Leftover {
        /// The layer that is being made or removed there, or was.
        of: Option<LayerId>,
    },
    /// Nothing of the driver's own, which it leaves alone.
    Alien,
}

/// How the engine finds a driver: its name, whether it works here, how to open it. One per driver crate.
#[derive(Clone, Copy)]
pub struct DriverFactory {
    /// The name users pass to `--storage-driver`.
    pub name: &'static str,
    /// One line for `graphdriver drivers`.
    pub summary: &'static str,
    /// The options it takes, as `--storage-opt` spells them. Others are refused.
    pub options: &'static [OptionSpec],
    /// Whether it would work with its data under `home`, which need not exist. Leaves nothing behind.
    pub probe: fn(home: &Path, options: &Options) -> Result<Capabilities, Unmet>,
    /// Opens it, making `home` if it does not exist.
    pub open: fn(home: &Path, options: &Options) -> Result<Box<dyn GraphDriver>>,
}

impl fmt::Debug for DriverFactory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DriverFactory").field("name", &self.name).finish_non_exhaustive()
    }
}

/// One option of a driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionSpec {
    /// As `--storage-opt` spells it: `overlay2.size`.
    pub name: &'static str,
    /// What it does, its values and its default.
    pub help: &'static str,
}

/// The one thing that keeps a driver from working, and how to get it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Unmet {
    /// What is missing: "the kernel has no overlay filesystem".
    pub missing: String,
    /// What brings it: "modprobe overlay".
    pub remedy: String,
}

/// A driver's options, in the order given. The engine has refused unknown names already.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Options(pub Vec<(String, String)>);

impl Options {
    /// The value of `name`; the last one given counts.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().rev().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }

    /// The value of an option that is `on` or `off`; `InvalidInput` if it is anything else.
    pub fn switch(&self, name: &str) -> Result<Option<bool>> {
        match self.get(name) {
            None => Ok(None),
            Some("on") => Ok(Some(true)),
            Some("off") => Ok(Some(false)),
            Some(other) => {
                let why = format!("{name} is {other:?}; allowed are on and off");
                Err(crate::Error::new(crate::ErrorKind::InvalidInput, why))
            }
        }
    }
}
