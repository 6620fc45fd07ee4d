//! The vfs-fuse storage driver.
//!
//! Layers lie on disk as overlay2's do: [`overlay_home`] has the layout, and committed layers are plain overlayfs
//! layers. The file `version` says
//!
//! ```text
//! graphdriver vfs-fuse 1
//! xattrs trusted
//! uses
//! ```
//!
//! with `user` for `trusted` where the privilege for that is missing. An active layer that was made to survive a power cut,
//! or has been mounted for writing, also has the file `HOME/ID/lower`: the numbers of the layers below it, topmost first,
//! one a line. Files copied up by extents count their lower layers there, and are completed from it when the layer is
//! committed.
//!
//! A recipe is served by the program `vfs-fuse` ([`mount`](graphdriver_core::mount) starts it), which holds a lock on the
//! layer's `diff` while it does.

mod options;
mod probe;

use crate::{
    claim::{PATIENCE, claim},
    config::{Config, MAX_LOWER},
    extent,
};
use graphdriver_core::{
    Access, Capabilities, Context, CopyUnit, DiffDir, DriverFactory, Error, ErrorKind, EscapeXattrs, GraphDriver,
    LayerId, LayerOptions, Limits, Mount, Narrow, NativeDiff, Options, OverlayXattrs, Reclaimed, Result, Stored, Unmet,
    Usage, WriteStrategy,
    mount::{self, MountInfo},
    overlay_home::{self, Format, Home, Record, Trial, recipe},
};
use graphdriver_quota::LayerQuota;
use options::Wishes;
use probe::Support;
use std::{
    collections::BTreeSet,
    fs,
    io::{ErrorKind as Io, Write},
    os::unix::ffi::OsStrExt,
    path::Path,
    time::Duration,
};

/// How the engine finds this driver.
pub const FACTORY: DriverFactory = DriverFactory {
    name: "vfs-fuse",
    summary: "union filesystem in user space: needs no overlayfs, copies up by extents what changes",
    options: options::SPECS,
    probe: |home, options| {
        let probe = || {
            let wishes = Wishes::parse(options)?;
            let support = probe::support(home, &wishes, true)?;
            check(&support, Record::load(home, &FORMAT)?)?;
            let quota = open_quota(home, &wishes)?;
            Ok(capabilities(home, &support, &quota))
        };
        probe().map_err(|e: Error| unmet(&e))
    },
    open: |home, options| Ok(Box::new(VfsFuse::open(home, options)?)),
};

const FSTYPE: &str = "fuse.vfs-fuse";
const SOURCE: &str = "vfs-fuse";
const FORMAT: Format = Format { line: "graphdriver vfs-fuse 1", features: &[] };

fn unmet(e: &Error) -> Unmet {
    Unmet { missing: story(e), remedy: e.hint_text().unwrap_or("change the options or the data root").into() }
}

/// The error without what can be done about it.
fn story(e: &Error) -> String {
    let told = e.to_string();
    let hint = e.hint_text().map(|hint| format!(" ({hint})")).unwrap_or_default();
    told.strip_suffix(&hint).unwrap_or(&told).into()
}

/// Layers as directories, united by the program vfs-fuse.
#[derive(Debug)]
pub struct VfsFuse {
    home: Home,
    support: Support,
    wishes: Wishes,
    quota: LayerQuota,
    capabilities: Capabilities,
}

impl VfsFuse {
    /// Opens the data directory `home`, which is made if it is not there, and finds out what can be done with it.
    ///
    /// Fails with `InvalidInput` for an option's wrong value, and with `Unsupported` if something is missing.
    pub fn open(home: &Path, options: &Options) -> Result<VfsFuse> {
        Self::open_at(&std::path::absolute(home)?, options).doing(|| format!("opening vfs-fuse at {}", home.display()))
    }

    fn open_at(home: &Path, options: &Options) -> Result<VfsFuse> {
        let wishes = Wishes::parse(options)?;
        overlay_home::make_dirs(home)?;
        let support = probe::support(home, &wishes, false)?;
        let record = Record::load(home, &FORMAT)?;
        // Nothing relies on what was chosen before there was a layer.
        check(&support, record.clone().filter(|_| overlay_home::has_layers(home)))?;
        let now = Record { xattrs: support.xattrs, uses: BTreeSet::new() };
        if record.as_ref() != Some(&now) {
            now.save(home, &FORMAT)?;
        }
        let quota = open_quota(home, &wishes)?;
        let capabilities = capabilities(home, &support, &quota);
        Ok(VfsFuse { home: Home::open(home, support.xattrs)?, support, wishes, quota, capabilities })
    }

    fn mount_of(&self, lower: &[std::path::PathBuf], upper: Option<(&Path, &Path)>, more: &[&str]) -> Result<Mount> {
        let writable = self.wishes.writable.iter().filter(|_| upper.is_some());
        let own = self.wishes.everywhere.iter().chain(writable).map(String::as_str);
        recipe(&probe::fstype(&self.wishes), SOURCE, lower, upper, more.iter().copied().chain(own))
    }

    fn recipe_read_only(&self, id: LayerId, parents: &[LayerId]) -> Result<Mount> {
        let lower = self.home.chain(id, parents)?;
        self.mount_of(&lower, None, &["ro"])
    }

    fn recipe_read_write(&self, id: LayerId, parents: &[LayerId]) -> Result<Mount> {
        let mut lower = self.home.chain(id, parents)?;
        let upper = lower.remove(0);
        if lower.is_empty() {
            lower.push(self.home.empty());
        }
        let work = self.home.work(id)?;
        let _quiet = match claim(&upper, self.patience(id)) {
            // The same filesystem once more, with whatever its daemon was told.
            Err(e) if e.kind() == ErrorKind::Busy => return self.mount_of(&lower, Some((&upper, &work)), &["join"]),
            claimed => claimed?,
        };
        self.quota.prepare(id)?;
        self.home.settle(id)?;
        self.remember_lower(id, parents)?;
        if self.wishes.volatile {
            self.home.mark_volatile(id)?;
        }
        let volatile: &[&str] = if self.wishes.volatile { &["volatile"] } else { &[] };
        self.mount_of(&lower, Some((&upper, &work)), volatile)
    }

    /// How long to wait for the layer's daemon: not at all while it has a mount in this namespace. Some callers hold locks
    /// that everybody else waits for, and others have many layers to remove.
    fn patience(&self, id: LayerId) -> Duration {
        let shown = mount::table().is_ok_and(|table| table.iter().any(|entry| self.shows(entry, id)));
        if shown { Duration::ZERO } else { PATIENCE }
    }

    /// Whether a mount says of itself that it is this layer: `graphdriver:DIR:LAYER`, DIR being the store's.
    fn shows(&self, entry: &MountInfo, id: LayerId) -> bool {
        let told = || entry.source.to_str()?.strip_prefix("graphdriver:")?.rsplit_once(':');
        entry.fstype.as_bytes().starts_with(b"fuse")
            && told().is_some_and(|(dir, layer)| self.home.path().starts_with(dir) && layer == id.to_string())
    }

    /// Notes durably what the files of an active layer will be based on.
    fn remember_lower(&self, id: LayerId, parents: &[LayerId]) -> Result<()> {
        let text = lower_text(parents);
        let (path, new) = (self.home.layer(id).join("lower"), self.home.layer(id).join("lower.new"));
        if fs::read_to_string(&path).is_ok_and(|there| there == text) {
            return Ok(());
        }
        let write = || {
            write_new(&new, &text)?.sync_all()?;
            fs::rename(&new, &path)?;
            Ok::<_, Error>(fs::File::open(self.home.layer(id))?.sync_all()?)
        };
        write().doing(|| format!("writing {}", path.display()))
    }

    /// What [`Self::remember_lower`] wrote; None for a layer that was never mounted for writing.
    fn remembered_lower(&self, id: LayerId) -> Result<Option<Vec<LayerId>>> {
        let path = self.home.layer(id).join("lower");
        let text = match fs::read_to_string(&path) {
            Err(e) if e.kind() == Io::NotFound => return Ok(None),
            read => read.doing(|| format!("reading {}", path.display()))?,
        };
        let wrong = |line: &str| Error::new(ErrorKind::Corrupt, format!("{line:?} in {}", path.display()));
        text.lines().map(|line| line.parse().map_err(|_| wrong(line))).collect::<Result<_>>().map(Some)
    }

    /// Gives files that were copied up by extents the rest of their data. There are none in a layer that was only ever
    /// unpacked into.
    fn complete(&self, id: LayerId, work: &Path) -> Result<()> {
        let Some(parents) = self.remembered_lower(id)? else { return Ok(()) };
        let mut lower = self.home.chain(id, &parents)?;
        let upper = lower.remove(0);
        if lower.is_empty() {
            lower.push(self.home.empty());
        }
        let user_xattrs = self.home.xattrs() == OverlayXattrs::User;
        let config = Config { lower, upper: Some(upper), work: Some(work.into()), user_xattrs, ..Config::default() };
        extent::complete_layer(&config).map(drop).doing(|| "completing the files that were copied up by extents")
    }
}

/// The file `lower` of a layer on these.
fn lower_text(parents: &[LayerId]) -> String {
    parents.iter().map(|parent| format!("{parent}\n")).collect()
}

fn write_new(path: &Path, text: &str) -> Result<fs::File> {
    let write = || {
        let mut file = fs::File::create(path)?;
        file.write_all(text.as_bytes())?;
        Ok::<_, std::io::Error>(file)
    };
    write().doing(|| format!("writing {}", path.display()))
}

/// Refuses a data directory whose layers would be misread here.
fn check(support: &Support, record: Option<Record>) -> Result<()> {
    match record {
        Some(record) if record.xattrs != support.xattrs => Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "its layers keep overlayfs's attributes in {:?}, and here {:?} has to be used",
                record.xattrs.prefix(),
                support.xattrs.prefix()
            ),
        )
        .hint("root and user namespaces need data roots of their own")),
        _ => Ok(()),
    }
}

/// Whether layers can be limited where `home` is or would be.
fn open_quota(home: &Path, wishes: &Wishes) -> Result<LayerQuota> {
    let scratch = Trial::new(&overlay_home::nearest_existing(home)?)?;
    LayerQuota::open(home, scratch.path(), &wishes.quota, FACTORY.name)
}

/// A program's argument, which all names of lower layers have to be in, has at most 32 pages (execve(2)).
const ARGUMENT_MAX: usize = 32 * 4096;

fn capabilities(home: &Path, support: &Support, quota: &LayerQuota) -> Capabilities {
    // `HOME/1234567890/diff:` for each, every byte of HOME perhaps escaped.
    let name = std::path::absolute(home).map_or(0, |home| home.as_os_str().len()) * 2 + "/1234567890/diff:".len();
    Capabilities {
        write_strategy: WriteStrategy::CopyUp { unit: support.unit },
        quota: quota.works(),
        inode_quota: quota.works(),
        native_diff: support.whiteouts,
        idmapped_mounts: false,
        independent_layers: support.whiteouts,
        // The layer itself is one of them where it is shown read-only.
        max_depth: (MAX_LOWER - 1).min((ARGUMENT_MAX - 4096) / name),
    }
}

impl GraphDriver for VfsFuse {
    fn name(&self) -> &'static str {
        FACTORY.name
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn status(&self) -> Vec<(String, String)> {
        let Support { backing, xattrs, whiteouts, unit, program } = &self.support;
        let on = |on: bool| on.to_string();
        [
            ("Backing Filesystem", backing.clone()),
            ("Mount Program", program.display().to_string()),
            ("Supports d_type", on(true)),
            ("Supports reflink copy-up", on(*unit == CopyUnit::Reflink)),
            ("Using volatile", on(self.wishes.volatile)),
            ("Native Overlay Diff", on(*whiteouts)),
            ("userxattr", on(*xattrs == OverlayXattrs::User)),
            ("Limits", self.quota.status()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into()
    }

    fn create(&self, id: LayerId, parents: &[LayerId], options: &LayerOptions) -> Result<()> {
        let create = || {
            let limits = self.quota.wanted(options)?;
            let most = self.capabilities.max_depth;
            if parents.len() > most {
                let why = format!("{} parents, and vfs-fuse mounts at most {most} here", parents.len());
                return Err(Error::new(ErrorKind::Unsupported, why));
            }
            self.home.create(id, parents, options, |dir| {
                self.quota.limit_new(id, dir, limits)?;
                // What has to survive is going to be mounted, and has no flush of its own for this.
                options.durable.then(|| write_new(&dir.join("lower"), &lower_text(parents))).transpose()
            })
        };
        create().doing(|| format!("creating layer {id}"))
    }

    fn commit(&self, id: LayerId) -> Result<()> {
        let commit = || {
            let work = self.home.layer(id).join("work");
            // Committed before, or no layer at all.
            if !work.is_dir() {
                return self.home.commit(id);
            }
            let _quiet = claim(&self.home.diff(id), self.patience(id))?;
            self.home.settle(id)?;
            self.complete(id, &work)?;
            self.home.commit(id)
        };
        commit().doing(|| format!("committing layer {id}"))
    }

    fn thaw(&self, id: LayerId) -> Result<()> {
        self.home.thaw(id).doing(|| format!("undoing the commit of layer {id}"))
    }

    fn mount(&self, id: LayerId, parents: &[LayerId], access: Access) -> Result<Vec<Mount>> {
        let recipe = match access {
            Access::ReadOnly => self.recipe_read_only(id, parents),
            Access::ReadWrite => self.recipe_read_write(id, parents),
        };
        recipe.map(|mount| vec![mount]).doing(|| format!("describing the mount of layer {id}"))
    }

    fn limits(&self, id: LayerId) -> Result<Limits> {
        self.home.open_diff(id)?;
        self.quota.limits(id)
    }

    fn set_limits(&self, id: LayerId, limits: Limits) -> Result<()> {
        let set = || {
            self.home.open_diff(id)?;
            self.home.work(id)?;
            self.quota.set_limits(id, &self.home.layer(id), limits)
        };
        set().doing(|| format!("limiting layer {id}"))
    }

    /// Waits until the daemon is gone, and flushes what a volatile mount left in the cache.
    fn release(&self, id: LayerId) -> Result<()> {
        let release = || {
            match claim(&self.home.diff(id), PATIENCE) {
                Ok(_quiet) => self.home.settle(id),
                Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
                // It is a hint, and others have the layer mounted: in a namespace that has a copy of our mounts.
                Err(e) if e.kind() == ErrorKind::Busy => {
                    tracing::warn!("{e}");
                    Ok(())
                }
                Err(e) => Err(e),
            }
        };
        release().doing(|| format!("releasing layer {id}"))
    }

    fn usage(&self, id: LayerId) -> Result<Usage> {
        self.home.usage(id, |layer| self.quota.usage(layer))
    }

    fn remove(&self, id: LayerId) -> Result<()> {
        let remove = || {
            match claim(&self.home.diff(id), self.patience(id)) {
                Err(e) if e.kind() != ErrorKind::NotFound => return Err(e),
                _ => {}
            }
            self.home.remove(id)?;
            self.quota.removed(id)
        };
        remove().doing(|| format!("removing layer {id}"))
    }

    fn reclaim(&self, known: &dyn Fn(LayerId) -> bool) -> Result<Reclaimed> {
        let freed = self.home.reclaim(known)?;
        self.quota.reclaim(self.home.path(), known)?;
        Ok(freed)
    }

    fn inventory(&self) -> Result<Vec<Stored>> {
        let mut found = self.home.inventory()?;
        self.quota.inventory(self.home.path(), &mut found)?;
        Ok(found)
    }

    /// Without whiteouts as the kernel has them a tar is unpacked on top of the parents.
    fn diff_dir(&self, id: LayerId) -> Option<DiffDir> {
        self.support.whiteouts.then(|| self.home.diff_dir(id, EscapeXattrs::Both))
    }

    fn native_diff(&self) -> Option<&dyn NativeDiff> {
        self.support.whiteouts.then_some(self)
    }
}

impl NativeDiff for VfsFuse {
    fn narrow(&self, id: LayerId, _parents: &[LayerId]) -> Result<Box<dyn Narrow + '_>> {
        self.home.narrow(id)
    }
}
