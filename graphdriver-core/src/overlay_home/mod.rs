//! The data directory of drivers whose layers are directories in overlayfs's format: overlay2 and vfs-fuse.
//!
//! ```text
//! HOME/version        format, and what layers rely on: [`Record`]
//! HOME/empty/         a lower directory for unions that would have too few
//! HOME/ID/diff/       the layer's own changes, in overlayfs's format
//! HOME/ID/work/       the union's work directory; committed layers have none
//! HOME/ID/volatile    there while a volatile mount may have unwritten data: the kernel's boot identifier
//! HOME/new-ID/        a layer being created
//! HOME/removed-ID/    a layer being removed
//! HOME/projects       the project of each layer with limits, as the crate graphdriver-quota writes it
//! HOME/projects.lock  who changes that
//! HOME/.graphdriver-probe-*/  where features are tried out: [`Trial`]
//! ```
//!
//! `trusted.graphdriver.counted` of HOME/ID names the layer's project, if it had one from its beginning on.

mod durable;
mod inventory;
mod narrow;
mod record;
mod tree;
mod trial;
mod volatile;

pub use record::{Format, Record};
pub use trial::{Trial, adopt_unmet, backing, nearest_existing};

use crate::{
    Context, DiffDir, Error, ErrorKind, EscapeXattrs, LayerId, LayerOptions, Narrow, OverlayXattrs, Reclaimed, Result,
    Usage, mount,
    root::{inode_at, set_xattr_at},
};
use narrow::OverlayNarrow;
use rustix::{
    fs::{self, CWD, Gid, Mode, OFlags, RenameFlags, Timespec, Timestamps, UTIME_OMIT, Uid},
    io::Errno,
};
use std::{
    collections::HashMap,
    ffi::OsStr,
    fs::{DirBuilder, File},
    os::{
        fd::{AsFd, OwnedFd},
        unix::{ffi::OsStrExt, fs::DirBuilderExt},
    },
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// Such a directory, opened.
#[derive(Debug)]
pub struct Home {
    path: PathBuf,
    xattrs: OverlayXattrs,
    /// Layers that were parents; a container at the end of a long chain asks for each.
    parents: Mutex<HashMap<LayerId, Parent>>,
}

/// A layer that others lie on.
#[derive(Debug, Clone, Copy)]
struct Parent {
    /// Whether its root is opaque, which cannot change: it is committed, and no number is used twice.
    opaque: bool,
    /// When it was there.
    seen: Instant,
}

/// How long a parent is not looked for again.
const FRESH: Duration = Duration::from_secs(1);

impl Home {
    /// Makes what is missing of the directory `path`, which is absolute and whose layers keep overlayfs's attributes in
    /// `xattrs`.
    pub fn open(path: &Path, xattrs: OverlayXattrs) -> Result<Home> {
        let home = Home { path: path.into(), xattrs, parents: Mutex::default() };
        make_dirs(&home.empty())?;
        fs::chmod(home.empty(), Mode::from(0o755)).doing(|| "making the empty layer")?;
        Ok(home)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The namespace of overlayfs's attributes.
    pub fn xattrs(&self) -> OverlayXattrs {
        self.xattrs
    }

    /// A directory with nothing in it.
    pub fn empty(&self) -> PathBuf {
        self.path.join("empty")
    }

    /// All of a layer.
    pub fn layer(&self, id: LayerId) -> PathBuf {
        self.path.join(id.to_string())
    }

    /// A layer's own changes.
    pub fn diff(&self, id: LayerId) -> PathBuf {
        self.layer(id).join("diff")
    }

    /// The same as the contract has it.
    pub fn diff_dir(&self, id: LayerId, escape: EscapeXattrs) -> DiffDir {
        DiffDir { path: self.diff(id), xattrs: self.xattrs, escape }
    }

    /// The directories of a layer and its parents, topmost first, down to the first whose root is opaque. Names the missing
    /// layer.
    pub fn chain(&self, id: LayerId, parents: &[LayerId]) -> Result<Vec<PathBuf>> {
        let mut chain = vec![self.diff(id)];
        let mut opaque = self.is_opaque(id)?;
        for parent in parents {
            if opaque {
                break;
            }
            chain.push(self.diff(*parent));
            opaque = self.parent_is_opaque(*parent)?;
        }
        Ok(chain)
    }

    fn is_opaque(&self, id: LayerId) -> Result<bool> {
        narrow::has(self.open_diff(id)?.as_fd(), self.xattrs, "opaque")
    }

    fn known_parents(&self) -> MutexGuard<'_, HashMap<LayerId, Parent>> {
        self.parents.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The same of a parent, whose attributes are asked for once. Fails with `NotFound` if it is not there: whoever mounts it
    /// could not say which one of many is missing.
    fn parent_is_opaque(&self, id: LayerId) -> Result<bool> {
        let known = self.known_parents().get(&id).copied();
        let opaque = match known {
            Some(parent) if parent.seen.elapsed() < FRESH => return Ok(parent.opaque),
            Some(parent) if self.diff(id).is_dir() => parent.opaque,
            _ => self.is_opaque(id)?,
        };
        self.known_parents().insert(id, Parent { opaque, seen: Instant::now() });
        Ok(opaque)
    }

    /// The directory of a layer's own changes. Fails with `NotFound` if there is no such layer.
    pub fn open_diff(&self, id: LayerId) -> Result<OwnedFd> {
        open_dir(&self.diff(id)).map_err(|e| match e {
            Errno::NOENT => Error::new(ErrorKind::NotFound, format!("layer {id} is not there")),
            e => Error::from(e).doing(format!("opening layer {id}")),
        })
    }

    /// The work directory of an active layer.
    pub fn work(&self, id: LayerId) -> Result<PathBuf> {
        let work = self.layer(id).join("work");
        if !work.is_dir() {
            let why = format!("layer {id} is committed, and can be mounted for reading only");
            return Err(Error::new(ErrorKind::InvalidInput, why));
        }
        Ok(work)
    }

    /// Makes an active layer whole or not at all. `prepare` gets its directory before it has its name; a file that it
    /// returns is written down with the layer.
    pub fn create(
        &self,
        id: LayerId,
        parents: &[LayerId],
        options: &LayerOptions,
        prepare: impl FnOnce(&Path) -> Result<Option<File>>,
    ) -> Result<()> {
        for parent in parents {
            self.parent_is_opaque(*parent)?;
        }
        let there = || Error::new(ErrorKind::AlreadyExists, "it is there already");
        if self.layer(id).exists() {
            return Err(there());
        }
        // An interrupted removal of the same number is finished on the way.
        tree::remove(open_dir(&self.path)?.as_fd(), &format!("removed-{id}"))?;
        let new = format!("new-{id}");
        self.remove_dir(&new)?;
        self.build(&self.path.join(&new), parents.first().copied())?;
        let file = prepare(&self.path.join(&new))?;
        match fs::renameat_with(CWD, self.path.join(&new), CWD, self.layer(id), RenameFlags::NOREPLACE) {
            Err(Errno::EXIST) => {
                self.remove_dir(&new)?;
                return Err(there());
            }
            renamed => renamed?,
        }
        if options.durable {
            // A journal writes all down for the first of them. Until this returns, nobody relies on any of it.
            if let Some(file) = file {
                file.sync_all().doing(|| format!("flushing a file of layer {id}"))?;
            }
            durable::flush_dirs(&self.path, &[""])?;
            durable::flush_dirs(&self.layer(id), &["", "diff", "work"])?;
        }
        Ok(())
    }

    /// Makes `new` whole: a layer's directories, its root as `parent`'s.
    fn build(&self, new: &Path, parent: Option<LayerId>) -> Result<()> {
        let diff = new.join("diff");
        make_dirs(&diff)?;
        make_dirs(&new.join("work"))?;
        match parent {
            None => Ok(fs::chmod(&diff, Mode::from(0o755))?),
            Some(parent) => self.copy_root(parent, &diff),
        }
    }

    fn copy_root(&self, parent: LayerId, diff: &Path) -> Result<()> {
        let meta = inode_at(self.open_diff(parent)?.as_fd(), OsStr::new(""))?.meta;
        let root = open_dir(diff)?;
        fs::fchown(&root, Some(Uid::from_raw(meta.uid)), Some(Gid::from_raw(meta.gid)))?;
        fs::fchmod(&root, Mode::from(meta.mode))?;
        for (name, value) in &meta.xattrs {
            if !self.is_overlays_own(name) {
                set_xattr_at(root.as_fd(), OsStr::new(""), name, value)?;
            }
        }
        let omit = Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT };
        let mtime = Timespec { tv_sec: meta.mtime.secs, tv_nsec: meta.mtime.nanos.into() };
        Ok(fs::futimens(&root, &Timestamps { last_access: omit, last_modification: mtime })?)
    }

    /// Whether overlayfs keeps its own books there. Behind a second `overlay.` are what containers wrote, escaped.
    fn is_overlays_own(&self, xattr: &OsStr) -> bool {
        let own = xattr.as_bytes().strip_prefix(self.xattrs.prefix().as_bytes());
        own.is_some_and(|rest| !rest.starts_with(b"overlay."))
    }

    /// Freezes a layer, durably.
    pub fn commit(&self, id: LayerId) -> Result<()> {
        self.open_diff(id)?;
        self.settle(id)?;
        let layer = open_dir(&self.layer(id))?;
        tree::remove(layer.as_fd(), "work")?;
        durable::flush(&self.path)
    }

    /// Makes a layer active again whose commit nobody was told of.
    pub fn thaw(&self, id: LayerId) -> Result<()> {
        self.open_diff(id)?;
        make_dirs(&self.layer(id).join("work"))?;
        durable::flush_dirs(&self.layer(id), &["work", ""])
    }

    /// Marks an active layer as about to be mounted without fsync.
    pub fn mark_volatile(&self, id: LayerId) -> Result<()> {
        volatile::mark(&self.layer(id))
    }

    /// Flushes what a volatile mount wrote, and lets the layer be mounted again. Nothing if there was none. Fails with
    /// `Corrupt` if that was before the machine stopped.
    pub fn settle(&self, id: LayerId) -> Result<()> {
        volatile::settle(&self.layer(id))
    }

    /// The space a layer takes by itself. `counted` gives what all of the [layer](Self::layer) takes, if somebody has
    /// counted that; what is not the layer's own changes is taken off. It is asked for active layers only: the figure of a
    /// committed one is kept, and has to be that of what is there.
    pub fn usage(&self, id: LayerId, counted: impl FnOnce(&Path) -> Result<Option<Usage>>) -> Result<Usage> {
        self.open_diff(id)?;
        let layer = self.layer(id);
        if layer.join("work").is_dir()
            && let Some(all) = counted(&layer)?
            && let Some(usage) = less(all, tree::usage_around(&layer, c"diff")?)
        {
            return Ok(usage);
        }
        tree::usage(&self.diff(id))
    }

    /// Where the layer can differ from its parent, as its own directory tells.
    pub fn narrow(&self, id: LayerId) -> Result<Box<dyn Narrow>> {
        Ok(Box::new(OverlayNarrow { diff: self.open_diff(id)?, xattrs: self.xattrs }))
    }

    /// Removes a layer, or what is left of one; none there is no error.
    pub fn remove(&self, id: LayerId) -> Result<()> {
        self.known_parents().remove(&id);
        self.remove_dir(&id.to_string())?;
        self.remove_dir(&format!("new-{id}"))
    }

    /// Removes what the store does not know.
    pub fn reclaim(&self, known: &dyn Fn(LayerId) -> bool) -> Result<Reclaimed> {
        let mut freed = Reclaimed::default();
        for entry in std::fs::read_dir(&self.path).doing(|| format!("reading {}", self.path.display()))? {
            let name = entry?.file_name();
            let Some(name) = name.to_str().filter(|name| self.is_leftover(name, known)) else { continue };
            // Held until it is removed: whoever made a trial may be just about to lock it.
            let lock = trial::is_trial(name).then(|| trial::abandoned(&self.path.join(name)));
            if matches!(lock, Some(None)) {
                continue;
            }
            freed.bytes += tree::usage(&self.path.join(name))?.bytes;
            freed.layers += 1;
            match name.starts_with("removed-") {
                true => tree::remove(open_dir(&self.path)?.as_fd(), name)?,
                false => self.remove_dir(name)?,
            }
        }
        Ok(freed)
    }

    /// Whether `reclaim` is to remove `HOME/NAME`.
    fn is_leftover(&self, name: &str, known: &dyn Fn(LayerId) -> bool) -> bool {
        if let Ok(id) = name.parse() {
            return !known(id);
        }
        if let Some(Ok(id)) = name.strip_prefix("new-").map(str::parse) {
            return !known(id) || self.layer(id).exists();
        }
        name.starts_with("removed-") || trial::is_abandoned(&self.path, name)
    }

    /// Removes `HOME/NAME`, and what an interrupted removal of it left. As it is renamed first, the name is free at once,
    /// and `reclaim` knows what is left.
    fn remove_dir(&self, name: &str) -> Result<()> {
        let home = open_dir(&self.path)?;
        let trash = format!("removed-{name}");
        loop {
            match fs::renameat_with(&home, name, &home, trash.as_str(), RenameFlags::NOREPLACE) {
                Err(Errno::EXIST) => tree::remove(home.as_fd(), &trash)?,
                Ok(()) | Err(Errno::NOENT) => return tree::remove(home.as_fd(), &trash),
                Err(e) => return Err(Error::from(e).doing(format!("renaming {name}"))),
            }
        }
    }
}

/// The recipe of a union of `lower`, topmost first, with the writable directory and its work directory on top.
pub fn recipe(
    fstype: &str,
    source: &str,
    lower: &[PathBuf],
    upper: Option<(&Path, &Path)>,
    options: impl IntoIterator<Item = impl Into<String>>,
) -> Result<crate::Mount> {
    let lower = lower.iter().map(|path| mount::escape(path)).collect::<Result<Vec<_>>>()?.join(":");
    let mut all = vec![format!("lowerdir={lower}")];
    if let Some((upper, work)) = upper {
        all.push(format!("upperdir={}", mount::escape(upper)?));
        all.push(format!("workdir={}", mount::escape(work)?));
    }
    all.extend(options.into_iter().map(Into::into));
    Ok(crate::Mount { fstype: fstype.into(), source: source.into(), options: all })
}

/// None if the two do not fit together, being of different moments.
fn less(all: Usage, part: Usage) -> Option<Usage> {
    Some(Usage { bytes: all.bytes.checked_sub(part.bytes)?, inodes: all.inodes.checked_sub(part.inodes)? })
}

/// Whether there is any layer in the directory.
pub fn has_layers(home: &Path) -> bool {
    let names = std::fs::read_dir(home).into_iter().flatten().flatten().map(|entry| entry.file_name());
    names.filter_map(|name| name.into_string().ok()).any(|name| name.parse::<LayerId>().is_ok())
}

/// Makes a directory and those above it; none of them readable for others.
pub fn make_dirs(path: &Path) -> Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).doing(|| format!("making {}", path.display()))
}

pub(crate) fn open_dir(path: &Path) -> rustix::io::Result<OwnedFd> {
    fs::openat(CWD, path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}
