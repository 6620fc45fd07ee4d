//! What overlayfs can do on this kernel with this backing filesystem, found out by doing it in a temporary directory
//! there. Nothing is attached to the tree of mounts.

use crate::recipe::{ALWAYS_OFF, recipe};
use graphdriver_core::{
    Context, Error, ErrorKind, Mount, OverlayXattrs, Result, Unmet,
    mount::{self, IdMapped, IdRange},
    overlay_home::{Trial, adopt_unmet, backing, nearest_existing},
};
use rustix::fs::{self, AtFlags, Mode, OFlags, XattrFlags};
use std::{
    cell::Cell,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
};

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Support {
    /// The filesystem's type.
    pub backing: String,
    /// The namespace of xattrs that may be written here.
    pub xattrs: OverlayXattrs,
    /// Layers are taken one by one: no page of options bounds their number.
    pub lowerdir_plus: bool,
    /// Directories of lower layers can be renamed.
    pub redirect_dir: bool,
    /// Changes to metadata copy no data.
    pub metacopy: bool,
    /// Hard links can stay together across copy-up.
    pub index: bool,
    /// fsync can be ignored.
    pub volatile: bool,
    /// Layers can be id-mapped.
    pub idmapped: bool,
    /// overlayfs's own xattrs can be stored in it (Linux 6.8), as nested containers want.
    pub xattr_escape: bool,
    /// Copy-up shares extents.
    pub reflink: bool,
}

/// Looks at the filesystem that `home` is on or would be on.
pub(crate) fn support(home: &Path) -> Result<Support> {
    let dir = nearest_existing(home)?;
    Probe::run(&dir).map_err(|e| adopt_unmet(&e, &dir))
}

/// The same for those who choose a driver.
pub(crate) fn probe(home: &Path) -> Result<Support, Unmet> {
    support(home).map_err(|e| Unmet {
        missing: e.reason().into(),
        remedy: e.hint_text().unwrap_or("see the kernel's log").into(),
    })
}

struct Probe {
    dir: Trial,
    overlays: Cell<u32>,
}

/// What is asked of the kernel; each must be worth having without those after it. Without `volatile` the kernel flushes
/// the whole backing filesystem when the trial is unmounted (`ovl_sync_fs`), so it comes first.
const FEATURES: [&str; 4] = ["volatile", "redirect_dir=on", "metacopy=on", "index=on"];

/// One mounted overlay: a lower layer with `file`, `other` and `dir/sub`, a writable one, and both together.
struct Overlay {
    upper: PathBuf,
    work: PathBuf,
    merged: OwnedFd,
    xattrs: OverlayXattrs,
}

impl Probe {
    fn run(dir: &Path) -> Result<Support> {
        let probe = Probe { dir: Trial::new(dir)?, overlays: Cell::new(0) };
        let lowerdir_plus = mount::has_lowerdir_plus()?;
        let (features, trial) = probe.features()?;
        trial.whiteouts_work()?;
        let redirect_dir = features.contains(&"redirect_dir=on") && trial.redirects();
        Ok(Support {
            backing: backing(dir),
            xattrs: probe.dir.xattrs(),
            lowerdir_plus,
            redirect_dir,
            metacopy: redirect_dir && features.contains(&"metacopy=on") && trial.metacopies(),
            index: features.contains(&"index=on") && trial.work.join("index").is_dir(),
            volatile: features.contains(&"volatile"),
            idmapped: probe.maps_ids(&features).is_ok(),
            xattr_escape: trial.escapes_xattrs(),
            reflink: probe.dir.reflinks(),
        })
    }

    /// The features that can be mounted together, and an overlay with them. All at once where that works, because each
    /// mount takes milliseconds and this is done whenever a driver is opened.
    fn features(&self) -> Result<(Vec<&'static str>, Overlay)> {
        if let Ok(trial) = self.trial(&FEATURES) {
            return Ok((FEATURES.to_vec(), trial));
        }
        let mut working = Vec::new();
        for feature in FEATURES {
            working.push(feature);
            if self.trial(&working).is_err() {
                working.pop();
            }
        }
        let trial = self.trial(&working)?;
        Ok((working, trial))
    }

    fn trial(&self, options: &[&str]) -> Result<Overlay> {
        self.overlays.set(self.overlays.get() + 1);
        let base = self.dir.path().join(self.overlays.get().to_string());
        let [lower, upper, work] = ["lower", "upper", "work"].map(|name| base.join(name));
        std::fs::create_dir_all(lower.join("dir/sub"))?;
        std::fs::write(lower.join("file"), "content")?;
        std::fs::write(lower.join("other"), "content")?;
        std::fs::create_dir(&upper)?;
        std::fs::create_dir(&work)?;
        let merged = self.mount(&[lower], Some((&upper, &work)), options)?;
        Ok(Overlay { upper, work, merged, xattrs: self.dir.xattrs() })
    }

    fn mount(&self, lower: &[PathBuf], upper: Option<(&Path, &Path)>, options: &[&str]) -> Result<OwnedFd> {
        mount::detached(&[self.recipe(lower, upper, options)?])
    }

    fn recipe(&self, lower: &[PathBuf], upper: Option<(&Path, &Path)>, options: &[&str]) -> Result<Mount> {
        let mut all: Vec<_> = if options.contains(&"index=on") { Vec::new() } else { ALWAYS_OFF.to_vec() };
        if self.dir.xattrs() == OverlayXattrs::User {
            all.push("userxattr");
        }
        all.extend(options);
        recipe(lower, upper, &all)
    }

    /// Whether an overlay of id-mapped layers shows mapped owners, and stores what is copied up with those it had.
    fn maps_ids(&self, features: &[&str]) -> Result<()> {
        let at = |name: &str| self.dir.path().join(name);
        ["mapped/lower", "mapped/upper", "mapped/work", "place"]
            .iter()
            .try_for_each(|dir| std::fs::create_dir_all(at(dir)))?;
        std::fs::write(at("mapped/lower/file"), "content")?;
        let options: Vec<_> = features.iter().copied().filter(|feature| *feature == "volatile").collect();
        let step = self.recipe(&[at("mapped/lower")], Some((&at("mapped/upper"), &at("mapped/work"))), &options)?;
        let range = |disk, shown| IdRange { disk, shown, count: 1 };
        let (users, groups) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        let maps = |id| [range(id, 100_000), range(id + 1, id)];
        let userns = mount::user_namespace(&maps(users), &maps(groups))?;
        let shown = IdMapped::plan(&[step], &at("place"))?.carried_out(userns.as_fd(), &at("place"))?;
        fs::chmodat(&shown, "file", Mode::from(0o600), AtFlags::empty())?;
        let (outside, inside) = (fs::statat(&shown, "file", AtFlags::empty())?, at("mapped/upper/file").metadata()?);
        match outside.st_uid == 100_000 && inside.uid() == users {
            true => Ok(()),
            false => Err(Error::new(ErrorKind::Unsupported, "id-mapped layers show other owners than they should")),
        }
    }
}

impl Overlay {
    fn whiteouts_work(&self) -> Result<()> {
        fs::unlinkat(&self.merged, "other", AtFlags::empty()).doing(|| "removing a file of a lower layer")?;
        if self.upper.join("other").symlink_metadata().is_err() {
            return Err(Error::new(ErrorKind::Unsupported, "the removal of a lower file leaves no whiteout"));
        }
        Ok(())
    }

    fn redirects(&self) -> bool {
        fs::renameat(&self.merged, "dir", &self.merged, "moved").is_ok()
    }

    /// The kernel falls back to whole copies with no more than a line in its log, so the copy itself is looked at.
    fn metacopies(&self) -> bool {
        let changed = fs::chmodat(&self.merged, "file", Mode::from(0o600), AtFlags::empty());
        let mark = format!("{}metacopy", self.xattrs.prefix());
        changed.is_ok() && matches!(xattr::get(self.upper.join("file"), mark), Ok(Some(_)))
    }

    fn escapes_xattrs(&self) -> bool {
        let file = fs::openat(&self.merged, "file", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
        let name = format!("{}probe", self.xattrs.prefix());
        file.is_ok_and(|file| fs::fsetxattr(file, name, b"1", XattrFlags::empty()).is_ok())
    }
}
