//! The overlay2 storage driver: kernel overlayfs.
//!
//! # On disk
//!
//! ```text
//! HOME/version        format, and what layers rely on
//! HOME/empty/         a lower directory for overlays that would have too few
//! HOME/ID/diff/       the layer's own changes, in overlayfs's format
//! HOME/ID/work/       overlayfs's work directory; committed layers have none
//! HOME/ID/volatile    there while a volatile mount may have unwritten data: the kernel's boot identifier
//! HOME/new-ID/        a layer being created
//! HOME/removed-ID/    a layer being removed
//! HOME/.graphdriver-probe-*/  where features are tried out
//! ```
//!
//! `version` is text:
//!
//! ```text
//! graphdriver overlay2 1
//! xattrs trusted
//! uses redirect_dir metacopy
//! ```
//!
//! The first line names the format. `xattrs` says where overlayfs's own attributes are, `trusted` or `user`. `uses` lists
//! the features that layers may have been written with, and without which they would be shown wrong.
//!
//! # The root directory of a layer
//!
//! overlayfs shows the root of the topmost layer. A new layer's root is a copy of its parent's. A layer that is unpacked
//! from a tar before its parents are known has the root which that tar says, or mode 0755 and the caller's root as owner
//! if it does not say, as in Docker. An opaque root (`.wh..wh..opq` at the top of a tar), which overlayfs ignores,
//! is honoured by leaving out the layers below.

mod durable;
mod home;
mod narrow;
mod options;
mod probe;
mod recipe;
mod sys;
mod tree;
mod volatile;

use graphdriver_core::{
    Access, Capabilities, Context, CopyUnit, DiffDir, DriverFactory, Error, ErrorKind, GraphDriver, LayerId,
    LayerOptions, Mount, Narrow, NativeDiff, Options, OverlayXattrs, Reclaimed, Result, Unmet, Usage, WriteStrategy,
    root::{inode_at, set_xattr_at},
};
use home::{PROBE, Record};
use narrow::OverlayNarrow;
use options::Wishes;
use probe::Support;
use recipe::{ALWAYS_OFF, recipe};
use rustix::{
    fs::{self, CWD, Gid, Mode, RenameFlags, Timespec, Timestamps, UTIME_OMIT, Uid},
    io::Errno,
};
use std::{
    ffi::OsStr,
    os::{fd::AsFd, unix::ffi::OsStrExt},
    path::{Path, PathBuf},
};

/// How the engine finds this driver.
pub const FACTORY: DriverFactory = DriverFactory {
    name: "overlay2",
    summary: "kernel overlayfs: layers are directories, the first write to a file copies it up",
    options: options::SPECS,
    probe: |home, options| {
        let wishes = Wishes::parse(options).map_err(|e| unmet(&e))?;
        let support = probe::probe(home)?;
        let record = Record::load(home).map_err(|e| unmet(&e))?;
        choose(&wishes, &support, record).map_err(|e| unmet(&e))?;
        Ok(capabilities(&support))
    },
    open: |home, options| Ok(Box::new(Overlay2::open(home, options)?)),
};

fn unmet(e: &Error) -> Unmet {
    Unmet { missing: e.to_string(), remedy: e.hint_text().unwrap_or("change the options or the data root").into() }
}

/// The overlayfs's own limit on lower directories (kernel `fs/overlayfs`, `OVL_MAX_STACK`) counts the layer itself when
/// it is shown read-only.
const MAX_PARENTS: usize = 499;

/// How many parents surely fit into one page of options (`0123456789/diff:` each), where layers cannot be given singly.
const MAX_PARENTS_IN_PAGE: usize = 230;

/// Layers as directories, mounted by kernel overlayfs.
#[derive(Debug)]
pub struct Overlay2 {
    home: PathBuf,
    support: Support,
    uses: Record,
    volatile: bool,
    capabilities: Capabilities,
}

impl Overlay2 {
    /// Opens the data directory `home`, which is made if it is not there, and finds out what overlayfs can do with it.
    ///
    /// Fails with `InvalidInput` for an option's wrong value, and with `Unsupported` if overlayfs does not work there or
    /// lacks what the layers there rely on.
    pub fn open(home: &Path, options: &Options) -> Result<Overlay2> {
        Self::open_at(&std::path::absolute(home)?, options).doing(|| format!("opening overlay2 at {}", home.display()))
    }

    fn open_at(home: &Path, options: &Options) -> Result<Overlay2> {
        let wishes = Wishes::parse(options)?;
        home::make_dirs(home)?;
        let support = probe::support(home)?;
        let record = Record::load(home)?;
        // Nothing relies on what was chosen before there was a layer.
        let relied_on = record.filter(|_| home::has_layers(home));
        let uses = choose(&wishes, &support, relied_on)?;
        if record != Some(uses) {
            uses.save(home)?;
        }
        home::make_dirs(&home.join("empty"))?;
        fs::chmod(home.join("empty"), Mode::from(0o755)).doing(|| "making the empty layer")?;
        let capabilities = capabilities(&support);
        Ok(Overlay2 { home: home.into(), support, uses, volatile: wishes.volatile, capabilities })
    }

    fn layer(&self, id: LayerId) -> PathBuf {
        self.home.join(id.to_string())
    }

    /// A layer's own changes.
    fn diff(&self, id: LayerId) -> PathBuf {
        self.layer(id).join("diff")
    }

    /// The directories of a chain, topmost first, down to the first whose root is opaque. Names the missing layer.
    fn chain(&self, ids: impl Iterator<Item = LayerId>) -> Result<Vec<PathBuf>> {
        let mut chain = Vec::new();
        for id in ids {
            let diff = self.diff(id);
            let opaque = self.open_diff(id).and_then(|fd| narrow::has(fd.as_fd(), self.uses.xattrs, "opaque"))?;
            chain.push(diff);
            if opaque {
                break;
            }
        }
        Ok(chain)
    }

    fn open_diff(&self, id: LayerId) -> Result<std::os::fd::OwnedFd> {
        home::open_dir(&self.diff(id)).map_err(|e| match e {
            Errno::NOENT => Error::new(ErrorKind::NotFound, format!("layer {id} is not there")),
            e => Error::from(e).doing(format!("opening layer {id}")),
        })
    }

    /// What every mount has to say so that all layers are shown right.
    fn reading_options(&self) -> Vec<&'static str> {
        let mut options = ALWAYS_OFF.to_vec();
        if self.uses.xattrs == OverlayXattrs::User {
            options.push("userxattr");
        }
        if self.uses.redirect_dir {
            options.push("redirect_dir=on");
        }
        if self.uses.metacopy {
            options.push("metacopy=on");
        }
        options
    }

    fn recipe_read_only(&self, id: LayerId, parents: &[LayerId]) -> Result<Mount> {
        let mut lower = self.chain(std::iter::once(id).chain(parents.iter().copied()))?;
        // The kernel wants at least two lower directories where there is no upper one.
        if lower.len() == 1 {
            lower.push(self.home.join("empty"));
        }
        let mut options = vec!["ro"];
        options.extend(self.reading_options());
        recipe(&lower, None, &options)
    }

    fn recipe_read_write(&self, id: LayerId, parents: &[LayerId]) -> Result<Mount> {
        let mut chain = self.chain(std::iter::once(id).chain(parents.iter().copied()))?;
        let upper = chain.remove(0);
        if chain.is_empty() {
            chain.push(self.home.join("empty"));
        }
        let work = self.layer(id).join("work");
        if !work.is_dir() {
            let why = format!("layer {id} is committed, and can be mounted for reading only");
            return Err(Error::new(ErrorKind::InvalidInput, why));
        }
        volatile::settle(&self.layer(id))?;
        let mut options = self.reading_options();
        if self.volatile {
            volatile::mark(&self.layer(id))?;
            options.push("volatile");
        }
        recipe(&chain, Some((&upper, &work)), &options)
    }

    /// Makes `new` whole: a layer's directories, its root as `parent`'s.
    fn build(&self, new: &Path, parent: Option<LayerId>) -> Result<()> {
        let diff = new.join("diff");
        home::make_dirs(&diff)?;
        home::make_dirs(&new.join("work"))?;
        match parent {
            None => Ok(fs::chmod(&diff, Mode::from(0o755))?),
            Some(parent) => self.copy_root(parent, &diff),
        }
    }

    fn copy_root(&self, parent: LayerId, diff: &Path) -> Result<()> {
        let meta = inode_at(self.open_diff(parent)?.as_fd(), OsStr::new(""))?.meta;
        let root = home::open_dir(diff)?;
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
        let own = xattr.as_bytes().strip_prefix(self.uses.xattrs.prefix().as_bytes());
        own.is_some_and(|rest| !rest.starts_with(b"overlay."))
    }

    /// Removes `HOME/NAME`, and what an interrupted removal of it left. As it is renamed first, the name is free at once,
    /// and `reclaim` knows what is left.
    fn remove_dir(&self, name: &str) -> Result<()> {
        let home = home::open_dir(&self.home)?;
        let trash = format!("removed-{name}");
        loop {
            match fs::renameat_with(&home, name, &home, trash.as_str(), RenameFlags::NOREPLACE) {
                Err(Errno::EXIST) => tree::remove(home.as_fd(), &trash)?,
                Ok(()) | Err(Errno::NOENT) => return tree::remove(home.as_fd(), &trash),
                Err(e) => return Err(Error::from(e).doing(format!("renaming {name}"))),
            }
        }
    }

    /// Whether `reclaim` is to remove `HOME/NAME`.
    fn is_leftover(&self, name: &str, known: &dyn Fn(LayerId) -> bool) -> bool {
        if let Ok(id) = name.parse() {
            return !known(id);
        }
        if let Some(Ok(id)) = name.strip_prefix("new-").map(str::parse) {
            return !known(id) || self.layer(id).exists();
        }
        name.starts_with("removed-") || name.starts_with(PROBE) && probe::abandoned(&self.home.join(name)).is_some()
    }
}

/// What layers will be written with: the wishes where they can be met, and in any case what layers there rely on.
fn choose(wishes: &Wishes, support: &Support, record: Option<Record>) -> Result<Record> {
    let refuse = |why: &str, hint: &str| Err(Error::new(ErrorKind::Unsupported, why).hint(hint));
    for (wish, able, name) in [
        (wishes.redirect_dir, support.redirect_dir, "overlay2.redirect_dir"),
        (wishes.metacopy, support.metacopy, "overlay2.metacopy"),
        (Some(wishes.volatile), support.volatile, "overlay2.volatile"),
    ] {
        if wish == Some(true) && !able {
            return refuse(
                &format!("{name}=on does not work on this kernel with {}", support.backing),
                "leave the option out",
            );
        }
    }
    let redirect_dir = wishes.redirect_dir.unwrap_or(support.redirect_dir);
    let metacopy = wishes.metacopy.unwrap_or(support.metacopy) && redirect_dir;
    let Some(record) = record else {
        return Ok(Record { xattrs: support.xattrs, redirect_dir, metacopy });
    };
    if record.xattrs != support.xattrs {
        return refuse(
            &format!(
                "its layers keep overlayfs's attributes in {:?}, and here {:?} has to be used",
                record.xattrs.prefix(),
                support.xattrs.prefix()
            ),
            "root and user namespaces need data roots of their own",
        );
    }
    for (used, now, able, name) in [
        (record.redirect_dir, redirect_dir, support.redirect_dir, "redirect_dir"),
        (record.metacopy, metacopy, support.metacopy, "metacopy"),
    ] {
        if used && !able {
            return refuse(
                &format!("its layers use {name}, which does not work here"),
                "use the kernel they were made with",
            );
        }
        if used && !now {
            return refuse(
                &format!("its layers use {name}, which can no longer be turned off"),
                "leave the option out, or use a new data root",
            );
        }
    }
    Ok(Record { xattrs: support.xattrs, redirect_dir, metacopy })
}

fn capabilities(support: &Support) -> Capabilities {
    let unit = if support.reflink { CopyUnit::Reflink } else { CopyUnit::File };
    Capabilities {
        write_strategy: WriteStrategy::CopyUp { unit },
        quota: false,
        native_diff: true,
        idmapped_mounts: support.idmapped,
        independent_layers: true,
        max_depth: if support.lowerdir_plus { MAX_PARENTS } else { MAX_PARENTS_IN_PAGE },
    }
}

impl GraphDriver for Overlay2 {
    fn name(&self) -> &'static str {
        FACTORY.name
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn status(&self) -> Vec<(String, String)> {
        let Support { backing, lowerdir_plus, index, volatile, idmapped, xattr_escape, reflink, .. } = &self.support;
        let user_xattr = self.uses.xattrs == OverlayXattrs::User;
        let mut lines = vec![("Backing Filesystem".to_owned(), backing.clone())];
        lines.extend(
            [
                ("Supports d_type", true),
                ("Using redirect_dir", self.uses.redirect_dir),
                ("Using metacopy", self.uses.metacopy),
                ("Using volatile", self.volatile),
                ("Native Overlay Diff", true),
                ("userxattr", user_xattr),
                ("Supports lowerdir+", *lowerdir_plus),
                ("Supports index", *index),
                ("Supports volatile", *volatile),
                ("Supports id-mapped layers", *idmapped),
                ("Supports nested overlay xattrs", *xattr_escape),
                ("Supports reflink copy-up", *reflink),
            ]
            .map(|(name, value)| (name.to_owned(), value.to_string())),
        );
        lines
    }

    fn create(&self, id: LayerId, parents: &[LayerId], options: &LayerOptions) -> Result<()> {
        let create = || {
            if options.size.is_some() {
                return Err(options::no_quota());
            }
            if parents.len() > self.capabilities.max_depth {
                let why = format!(
                    "{} parents, and this kernel mounts at most {}",
                    parents.len(),
                    self.capabilities.max_depth
                );
                return Err(Error::new(ErrorKind::Unsupported, why));
            }
            for parent in parents {
                self.open_diff(*parent)?;
            }
            // An interrupted removal of the same number is finished on the way.
            tree::remove(home::open_dir(&self.home)?.as_fd(), &format!("removed-{id}"))?;
            let new = format!("new-{id}");
            self.remove_dir(&new)?;
            self.build(&self.home.join(&new), parents.first().copied())?;
            if options.durable {
                durable::flush_dirs(&self.home.join(&new), &["diff", "work", ""])?;
            }
            match fs::renameat_with(CWD, self.home.join(&new), CWD, self.layer(id), RenameFlags::NOREPLACE) {
                Err(Errno::EXIST) => {
                    self.remove_dir(&new)?;
                    return Err(Error::new(ErrorKind::AlreadyExists, "it is there already"));
                }
                renamed => renamed?,
            }
            if options.durable { durable::flush_dirs(&self.home, &[""]) } else { Ok(()) }
        };
        create().map_err(|e: Error| e.doing(format!("creating layer {id}")))
    }

    fn commit(&self, id: LayerId) -> Result<()> {
        let commit = || {
            self.open_diff(id)?;
            volatile::settle(&self.layer(id))?;
            let layer = home::open_dir(&self.layer(id))?;
            tree::remove(layer.as_fd(), "work")?;
            durable::flush(&self.home)
        };
        commit().map_err(|e: Error| e.doing(format!("committing layer {id}")))
    }

    fn mount(&self, id: LayerId, parents: &[LayerId], access: Access) -> Result<Vec<Mount>> {
        let recipe = match access {
            Access::ReadOnly => self.recipe_read_only(id, parents),
            Access::ReadWrite => self.recipe_read_write(id, parents),
        };
        recipe.map(|mount| vec![mount]).map_err(|e| e.doing(format!("describing the mount of layer {id}")))
    }

    /// Flushes what a volatile mount left in the cache.
    fn release(&self, id: LayerId) -> Result<()> {
        volatile::settle(&self.layer(id)).doing(|| format!("releasing layer {id}"))
    }

    fn usage(&self, id: LayerId) -> Result<Usage> {
        self.open_diff(id)?;
        tree::usage(&self.diff(id))
    }

    fn remove(&self, id: LayerId) -> Result<()> {
        let remove = || {
            self.remove_dir(&id.to_string())?;
            self.remove_dir(&format!("new-{id}"))
        };
        remove().map_err(|e: Error| e.doing(format!("removing layer {id}")))
    }

    fn reclaim(&self, known: &dyn Fn(LayerId) -> bool) -> Result<Reclaimed> {
        let mut freed = Reclaimed::default();
        for entry in std::fs::read_dir(&self.home).doing(|| format!("reading {}", self.home.display()))? {
            let name = entry?.file_name();
            let Some(name) = name.to_str().filter(|name| self.is_leftover(name, known)) else { continue };
            freed.bytes += tree::usage(&self.home.join(name))?.bytes;
            freed.layers += 1;
            match name.starts_with("removed-") {
                true => tree::remove(home::open_dir(&self.home)?.as_fd(), name)?,
                false => self.remove_dir(name)?,
            }
        }
        Ok(freed)
    }

    fn diff_dir(&self, id: LayerId) -> Option<DiffDir> {
        Some(DiffDir { path: self.diff(id), xattrs: self.uses.xattrs })
    }

    fn native_diff(&self) -> Option<&dyn NativeDiff> {
        Some(self)
    }
}

impl NativeDiff for Overlay2 {
    fn narrow(&self, id: LayerId, _parents: &[LayerId]) -> Result<Box<dyn Narrow + '_>> {
        Ok(Box::new(OverlayNarrow { diff: self.open_diff(id)?, xattrs: self.uses.xattrs }))
    }
}
