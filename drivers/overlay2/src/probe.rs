//! What overlayfs can do on this kernel with this backing filesystem, found out by doing it in a temporary directory
//! there. Nothing is attached to the tree of mounts.

use crate::{
    home::{PROBE, backing, nearest_existing, open_dir},
    recipe::{ALWAYS_OFF, recipe},
    sys, tree,
};
use graphdriver_core::{Context, Error, ErrorKind, OverlayXattrs, Result, Unmet, mount};
use rustix::fs::{self, AtFlags, CWD, Dir, FileType, FlockOperation, Mode, OFlags, XattrFlags};
use std::{
    cell::Cell,
    os::fd::{AsFd, AsRawFd, OwnedFd},
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
    let fstype = backing(&dir).unwrap_or_else(|_| "unknown filesystem".into());
    sweep(&dir).unwrap_or_else(|e| tracing::debug!("sweeping {}: {e}", dir.display()));
    Probe::run(&dir, fstype.clone()).map_err(|e| {
        let unmet = unmet_from(&e, &dir, &fstype);
        let kind = match e.kind() {
            kind @ (ErrorKind::OutOfSpace | ErrorKind::QuotaExceeded | ErrorKind::PermissionDenied) => kind,
            _ => ErrorKind::Unsupported,
        };
        Error::new(kind, unmet.missing).hint(unmet.remedy)
    })
}

/// The same for those who choose a driver.
pub(crate) fn probe(home: &Path) -> Result<Support, Unmet> {
    support(home).map_err(|e| Unmet {
        missing: e.reason().into(),
        remedy: e.hint_text().unwrap_or("see the kernel's log").into(),
    })
}

fn unmet_from(e: &Error, dir: &Path, fstype: &str) -> Unmet {
    // The steps lead through a temporary directory, which says nothing to the user.
    let because = e.reason();
    let remedy = e.hint_text().map(str::to_owned);
    if e.kind() == ErrorKind::PermissionDenied {
        let missing = format!("the right to write to {} and to mount there: {because}", dir.display());
        let remedy = "run as root, or own the directory and run inside a user namespace: podman unshare, or unshare --map-auto --map-root-user --mount";
        return Unmet { missing, remedy: remedy.into() };
    }
    if because.contains("Read-only file system") {
        let missing = format!("{} is on a filesystem mounted read-only", dir.display());
        return Unmet { missing, remedy: "remount it writable: mount -o remount,rw".into() };
    }
    if because.contains("no filesystem") || matches!(e.kind(), ErrorKind::OutOfSpace | ErrorKind::QuotaExceeded) {
        return Unmet { missing: because.into(), remedy: remedy.unwrap_or_else(|| "free some space".into()) };
    }
    Unmet {
        missing: format!("{fstype} at {} cannot hold overlayfs's writable layers: {because}", dir.display()),
        remedy: remedy.unwrap_or_else(|| "put the data root on ext4, xfs, btrfs or tmpfs".into()),
    }
}

/// A new directory to try things out in, locked.
fn locked_dir(dir: &Path) -> Result<(tempfile::TempDir, OwnedFd)> {
    loop {
        let tmp = tempfile::Builder::new().prefix(PROBE).tempdir_in(dir)?;
        // Before it was locked somebody may have taken it for abandoned.
        let Ok(lock) = open_dir(tmp.path()) else { continue };
        fs::flock(&lock, FlockOperation::LockExclusive)?;
        if fs::fstat(&lock)?.st_nlink > 0 {
            return Ok((tmp, lock));
        }
    }
}

/// The lock of a probe's directory, if the process that made it is gone.
pub(crate) fn abandoned(path: &Path) -> Option<OwnedFd> {
    let dir = open_dir(path).ok()?;
    fs::flock(&dir, FlockOperation::NonBlockingLockExclusive).ok().map(|()| dir)
}

/// Removes what killed processes were trying out in `home`.
fn sweep(home: &Path) -> Result<()> {
    for entry in std::fs::read_dir(home)? {
        let name = entry?.file_name();
        let Some(name) = name.to_str().filter(|name| name.starts_with(PROBE)) else { continue };
        if let Some(_lock) = abandoned(&home.join(name)) {
            tree::remove(open_dir(home)?.as_fd(), name).doing(|| format!("removing what was left of {name}"))?;
        }
    }
    Ok(())
}

struct Probe {
    tmp: tempfile::TempDir,
    /// Held until the directory is gone: who finds one that nobody holds may remove it.
    _lock: OwnedFd,
    xattrs: OverlayXattrs,
    trials: Cell<u32>,
}

/// What is asked of the kernel; each must be worth having without those after it. Without `volatile` the kernel flushes
/// the whole backing filesystem when the trial is unmounted (`ovl_sync_fs`), so it comes first.
const FEATURES: [&str; 4] = ["volatile", "redirect_dir=on", "metacopy=on", "index=on"];

/// One mounted overlay: a lower layer with `file`, `other` and `dir/sub`, a writable one, and both together.
struct Trial {
    upper: PathBuf,
    work: PathBuf,
    merged: OwnedFd,
    xattrs: OverlayXattrs,
}

impl Probe {
    fn run(dir: &Path, backing: String) -> Result<Support> {
        let (tmp, lock) = locked_dir(dir)?;
        needs_d_type(tmp.path())?;
        let probe = Probe { xattrs: writable_xattrs(tmp.path())?, tmp, _lock: lock, trials: Cell::new(0) };
        let lowerdir_plus = mount::has_lowerdir_plus()?;
        let (features, trial) = probe.features()?;
        trial.whiteouts_work()?;
        let redirect_dir = features.contains(&"redirect_dir=on") && trial.redirects();
        Ok(Support {
            backing,
            xattrs: probe.xattrs,
            lowerdir_plus,
            redirect_dir,
            metacopy: redirect_dir && features.contains(&"metacopy=on") && trial.metacopies(),
            index: features.contains(&"index=on") && trial.work.join("index").is_dir(),
            volatile: features.contains(&"volatile"),
            idmapped: probe.maps_ids().is_ok(),
            xattr_escape: trial.escapes_xattrs(),
            reflink: probe.reflinks().is_ok(),
        })
    }

    /// The features that can be mounted together, and an overlay with them. All at once where that works, because each
    /// mount takes milliseconds and this is done whenever a driver is opened.
    fn features(&self) -> Result<(Vec<&'static str>, Trial)> {
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

    fn trial(&self, options: &[&str]) -> Result<Trial> {
        self.trials.set(self.trials.get() + 1);
        let base = self.tmp.path().join(self.trials.get().to_string());
        let [lower, upper, work] = ["lower", "upper", "work"].map(|name| base.join(name));
        std::fs::create_dir_all(lower.join("dir/sub"))?;
        std::fs::write(lower.join("file"), "content")?;
        std::fs::write(lower.join("other"), "content")?;
        std::fs::create_dir(&upper)?;
        std::fs::create_dir(&work)?;
        let merged = self.mount(&[lower], Some((&upper, &work)), options)?;
        Ok(Trial { upper, work, merged, xattrs: self.xattrs })
    }

    fn mount(&self, lower: &[PathBuf], upper: Option<(&Path, &Path)>, options: &[&str]) -> Result<OwnedFd> {
        let mut all: Vec<_> = if options.contains(&"index=on") { Vec::new() } else { ALWAYS_OFF.to_vec() };
        if self.xattrs == OverlayXattrs::User {
            all.push("userxattr");
        }
        all.extend(options);
        mount::detached(&[recipe(lower, upper, &all)?])
    }

    fn maps_ids(&self) -> Result<()> {
        let (dir, other) = (self.tmp.path().join("mapped"), self.tmp.path().join("other"));
        std::fs::create_dir(&dir)?;
        std::fs::create_dir(&other)?;
        let open = fs::openat(CWD, &dir, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
        let mapped = mount::clone_of(open.as_fd())?;
        mount::id_map(mapped.as_fd(), sys::user_namespace()?.as_fd())?;
        let by_fd = PathBuf::from(format!("/proc/self/fd/{}", mapped.as_raw_fd()));
        self.mount(&[by_fd, other], None, &[]).map(drop)
    }

    fn reflinks(&self) -> Result<()> {
        let (from, to) = (self.tmp.path().join("from"), self.tmp.path().join("to"));
        std::fs::write(&from, [7; 4096])?;
        Ok(fs::ioctl_ficlone(std::fs::File::create(to)?, std::fs::File::open(from)?)?)
    }
}

impl Trial {
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

/// `trusted.` if this process may write it here, else `user.`.
fn writable_xattrs(dir: &Path) -> Result<OverlayXattrs> {
    let writes = |xattrs: OverlayXattrs| xattr::set(dir, format!("{}probe", xattrs.prefix()), b"1");
    if writes(OverlayXattrs::Trusted).is_ok() {
        return Ok(OverlayXattrs::Trusted);
    }
    writes(OverlayXattrs::User).map(|()| OverlayXattrs::User).map_err(|e| {
        Error::from(e)
            .doing("setting an extended attribute")
            .hint("put the data root on ext4, xfs or btrfs; tmpfs has user attributes since Linux 6.6")
    })
}

/// Without file types in directory entries overlayfs cannot tell whiteouts (kernel `overlayfs.rst`, "Upper and Lower").
fn needs_d_type(dir: &Path) -> Result<()> {
    std::fs::write(dir.join("type"), "")?;
    let fd = fs::openat(CWD, dir, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    for entry in Dir::read_from(&fd)? {
        let entry = entry?;
        if entry.file_name() == c"type" && entry.file_type() != FileType::RegularFile {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "its directories do not tell the type of their entries (d_type)",
            )
            .hint("an xfs must be made with ftype=1: mkfs.xfs -n ftype=1"));
        }
    }
    Ok(())
}
