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
//! HOME/projects       the project of each layer with limits: [`graphdriver_quota::project::ledger`]
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

mod options;
mod probe;
mod recipe;
mod record;

use graphdriver_core::{
    Access, Capabilities, Context, CopyUnit, DiffDir, DriverFactory, Error, ErrorKind, EscapeXattrs, GraphDriver,
    LayerId, LayerOptions, Limits, Mount, Narrow, NativeDiff, Options, OverlayXattrs, Reclaimed, Result, Stored, Unmet,
    Usage, WriteStrategy,
    overlay_home::{self, Home, Trial},
};
use graphdriver_quota::LayerQuota;
use options::Wishes;
use probe::Support;
use recipe::{ALWAYS_OFF, recipe};
use record::{Record, choose};
use std::path::Path;

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
        let quota = open_quota(home, &wishes).map_err(|e| unmet(&e))?;
        Ok(capabilities(&support, &quota))
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
    home: Home,
    support: Support,
    uses: Record,
    volatile: bool,
    quota: LayerQuota,
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
        overlay_home::make_dirs(home)?;
        let support = probe::support(home)?;
        let record = Record::load(home)?;
        // Nothing relies on what was chosen before there was a layer.
        let relied_on = record.filter(|_| overlay_home::has_layers(home));
        let uses = choose(&wishes, &support, relied_on)?;
        if record != Some(uses) {
            uses.save(home)?;
        }
        let quota = open_quota(home, &wishes)?;
        let capabilities = capabilities(&support, &quota);
        let home = Home::open(home, uses.xattrs)?;
        Ok(Overlay2 { home, support, uses, volatile: wishes.volatile, quota, capabilities })
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
        let mut lower = self.home.chain(id, parents)?;
        // The kernel wants at least two lower directories where there is no upper one.
        if lower.len() == 1 {
            lower.push(self.home.empty());
        }
        let mut options = vec!["ro"];
        options.extend(self.reading_options());
        recipe(&lower, None, &options)
    }

    fn recipe_read_write(&self, id: LayerId, parents: &[LayerId]) -> Result<Mount> {
        let mut chain = self.home.chain(id, parents)?;
        let upper = chain.remove(0);
        if chain.is_empty() {
            chain.push(self.home.empty());
        }
        let work = self.home.work(id)?;
        self.quota.prepare(id)?;
        self.home.settle(id)?;
        let mut options = self.reading_options();
        if self.volatile {
            self.home.mark_volatile(id)?;
            options.push("volatile");
        }
        recipe(&chain, Some((&upper, &work)), &options)
    }
}

/// Whether layers can be limited where `home` is or would be.
fn open_quota(home: &Path, wishes: &Wishes) -> Result<LayerQuota> {
    let scratch = Trial::new(&overlay_home::nearest_existing(home)?)?;
    LayerQuota::open(home, scratch.path(), &wishes.quota, FACTORY.name)
}

fn capabilities(support: &Support, quota: &LayerQuota) -> Capabilities {
    let unit = if support.reflink { CopyUnit::Reflink } else { CopyUnit::File };
    Capabilities {
        write_strategy: WriteStrategy::CopyUp { unit },
        quota: quota.works(),
        inode_quota: quota.works(),
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
        lines.push(("Limits".to_owned(), self.quota.status()));
        lines
    }

    fn create(&self, id: LayerId, parents: &[LayerId], options: &LayerOptions) -> Result<()> {
        let create = || {
            let limits = self.quota.wanted(options)?;
            if parents.len() > self.capabilities.max_depth {
                let why = format!(
                    "{} parents, and this kernel mounts at most {}",
                    parents.len(),
                    self.capabilities.max_depth
                );
                return Err(Error::new(ErrorKind::Unsupported, why));
            }
            self.home.create(id, parents, options, |dir| self.quota.limit_new(id, dir, limits).map(|()| None))
        };
        create().map_err(|e: Error| e.doing(format!("creating layer {id}")))
    }

    fn commit(&self, id: LayerId) -> Result<()> {
        self.home.commit(id).doing(|| format!("committing layer {id}"))
    }

    fn thaw(&self, id: LayerId) -> Result<()> {
        self.home.thaw(id).doing(|| format!("undoing the commit of layer {id}"))
    }

    fn mount(&self, id: LayerId, parents: &[LayerId], access: Access) -> Result<Vec<Mount>> {
        let recipe = match access {
            Access::ReadOnly => self.recipe_read_only(id, parents),
            Access::ReadWrite => self.recipe_read_write(id, parents),
        };
        recipe.map(|mount| vec![mount]).map_err(|e| e.doing(format!("describing the mount of layer {id}")))
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
        set().map_err(|e: Error| e.doing(format!("limiting layer {id}")))
    }

    /// Flushes what a volatile mount left in the cache.
    fn release(&self, id: LayerId) -> Result<()> {
        self.home.settle(id).doing(|| format!("releasing layer {id}"))
    }

    fn usage(&self, id: LayerId) -> Result<Usage> {
        self.home.usage(id, |layer| self.quota.usage(layer))
    }

    fn remove(&self, id: LayerId) -> Result<()> {
        let removed = self.home.remove(id).and_then(|()| self.quota.removed(id));
        removed.doing(|| format!("removing layer {id}"))
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

    fn diff_dir(&self, id: LayerId) -> Option<DiffDir> {
        Some(self.home.diff_dir(id, EscapeXattrs::Own))
    }

    fn native_diff(&self) -> Option<&dyn NativeDiff> {
        Some(self)
    }
}

impl NativeDiff for Overlay2 {
    fn narrow(&self, id: LayerId, _parents: &[LayerId]) -> Result<Box<dyn Narrow + '_>> {
        self.home.narrow(id)
    }
}
