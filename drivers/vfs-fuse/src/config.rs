//! What a mount is made of: the layers, and how they are shown.

use graphdriver_core::{Context, Error, ErrorKind, Result};
use rustix::fs::{AtFlags, CWD, Statx, StatxFlags, statx};
use std::{
    path::{Path, PathBuf},
    time::Duration,
};

/// As many lower layers as the kernel's overlay takes.
pub const MAX_LOWER: usize = 500;

/// All that one mount is told.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// The read-only layers, topmost first.
    pub lower: Vec<PathBuf>,
    /// The writable layer; without it the mount is read-only.
    pub upper: Option<PathBuf>,
    /// A directory on the upper's filesystem for what is being made. Given if and only if `upper` is.
    pub work: Option<PathBuf>,
    /// Ids on disk to ids shown, as `uidmapping` has them.
    pub uids: IdMap,
    /// As `gidmapping` has them.
    pub gids: IdMap,
    /// Owners shown whatever the disk says.
    pub squash: Squash,
    /// Where owners, modes and device numbers are kept that the daemon may not set.
    pub xattr_permissions: XattrPermissions,
    /// Directories have a link count of 1, uncounted.
    pub static_nlink: bool,
    /// The layers' marks are `user.overlay.` xattrs also where `trusted.overlay.` ones could be written: layers made by
    /// an unprivileged user.
    pub user_xattrs: bool,
    /// No POSIX ACLs: `system.posix_acl_*` is unsupported.
    pub no_acl: bool,
    /// No xattrs at all through the mount.
    pub no_xattrs: bool,
    /// How long the kernel may keep names and attributes. The layers are the daemon's alone, so it is long.
    pub timeout: Duration,
    /// Let the kernel gather small writes, where passthrough is off.
    pub writeback: bool,
    /// `fsync` is answered without being done, as the kernel's overlay does with `volatile`.
    pub volatile: bool,
    /// How a lower file gets to the upper layer at its first change.
    pub copy_up: CopyUp,
    /// When files copied up by extents get the rest of their data.
    pub completion: Completion,
    /// Whether file data goes from the kernel straight to the backing file where it can (needs CAP_SYS_ADMIN and Linux 6.9).
    pub passthrough: bool,
    /// Threads that serve requests; by itself as many as CPUs, at least 2.
    pub threads: Option<usize>,
    /// Whether idle CPUs are kept easy to wake while requests come in quick succession.
    pub wake_latency: WakeLatency,
}

impl Config {
    /// Whether the layers' marks are `trusted.` xattrs where there is no upper layer to try it on. Others count for
    /// nothing then: users may set them.
    pub fn sees_trusted(&self) -> bool {
        use rustix::thread::{CapabilitySet, capabilities};
        let privileged = capabilities(None).is_ok_and(|c| c.effective.contains(CapabilitySet::SYS_ADMIN));
        let initial = std::fs::read_to_string("/proc/self/uid_map").is_ok_and(|m| m.trim_end().ends_with("4294967295"));
        !self.user_xattrs && privileged && initial
    }
}

/// Ranges of ids, as `uidmapping=DISK:SHOWN:COUNT[:DISK:SHOWN:COUNT…]` has them. Empty: ids are shown as they are. An id
/// no range has is shown as the overflow id and cannot be set.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct IdMap(pub Vec<IdRange>);

/// One range of an [`IdMap`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdRange {
    /// First id as the mount shows it.
    pub shown: u32,
    /// First id as the disk has it.
    pub disk: u32,
    /// How many.
    pub count: u32,
}

/// Owners that all files are shown with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Squash {
    /// This user, if any.
    pub uid: Option<u32>,
    /// This group, if any.
    pub gid: Option<u32>,
}

/// Where owner, mode and device number of a file are, if not in its inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum XattrPermissions {
    /// In the inode.
    #[default]
    Off,
    /// `xattr_permissions=1`: in an xattr that only root of the machine may set.
    Privileged,
    /// `xattr_permissions=2`: in `user.containers.override_stat`.
    Containers,
}

/// How a lower file gets to the upper layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CopyUp {
    /// Reflink where the two can share data, else what measurements say is cheaper for the file's size.
    #[default]
    Auto,
    /// Reflink, and the whole file where that is impossible.
    Reflink,
    /// A sparse file that holds only what was changed, and the whole file where the filesystem has no holes.
    Extent,
    /// The whole file.
    Full,
}

/// When files copied up by extents become plain ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Completion {
    /// When the layer is committed, or `vfs-fuse --complete` is run on it.
    #[default]
    AtCommit,
    /// All the time, at most so many bytes a second.
    Background {
        /// Bytes a second.
        rate: u64,
    },
}

/// When the kernel is asked to keep idle CPUs easy to wake, which it does on all of them, during bursts of requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WakeLatency {
    /// On machines of few CPUs.
    #[default]
    Auto,
    /// However many CPUs there are.
    On,
    /// Never.
    Off,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            lower: Vec::new(),
            upper: None,
            work: None,
            uids: IdMap::default(),
            gids: IdMap::default(),
            squash: Squash::default(),
            xattr_permissions: XattrPermissions::default(),
            static_nlink: false,
            user_xattrs: false,
            no_acl: false,
            no_xattrs: false,
            timeout: Duration::from_secs(1_000_000_000),
            writeback: true,
            volatile: false,
            copy_up: CopyUp::default(),
            completion: Completion::default(),
            passthrough: true,
            threads: None,
            wake_latency: WakeLatency::default(),
        }
    }
}

impl Config {
    /// With all paths absolute and without symlinks, so that they hold when the working directory is another; an error
    /// for layers that are not there or cannot be used together.
    pub fn resolved(mut self) -> Result<Self> {
        self.check_shape()?;
        for (at, lower) in self.lower.iter_mut().enumerate() {
            *lower = directory(lower).map_err(|e| e.doing(format!("opening lower layer {}", at + 1)))?;
        }
        if let (Some(upper), Some(work)) = (&self.upper, &self.work) {
            let upper = directory(upper).map_err(|e| e.doing("opening upperdir"))?;
            let work = directory(work).map_err(|e| e.doing("opening workdir"))?;
            check_pair(&upper, &work)?;
            for lower in &self.lower {
                check_apart(&upper, "upperdir", lower)?;
                check_apart(&work, "workdir", lower)?;
            }
            (self.upper, self.work) = (Some(upper), Some(work));
        }
        Ok(self)
    }

    /// What can be said without looking at the filesystem.
    fn check_shape(&self) -> Result<()> {
        let wrong = |reason: &str, hint: &str| Err(Error::new(ErrorKind::InvalidInput, reason).hint(hint));
        match (self.lower.len(), &self.upper, &self.work) {
            (0, ..) => wrong("no lowerdir", "give the lower layers: -o lowerdir=TOP:…:BOTTOM"),
            (n, ..) if n > MAX_LOWER => {
                wrong(&format!("{n} lower layers"), &format!("at most {MAX_LOWER} can be mounted; merge some"))
            }
            (_, Some(_), None) => {
                wrong("upperdir without workdir", "give an empty directory on its filesystem: workdir=DIR")
            }
            (_, None, Some(_)) => wrong("workdir without upperdir", "leave it out for a read-only mount"),
            _ => Ok(()),
        }
    }
}

fn directory(path: &Path) -> Result<PathBuf> {
    let real = path.canonicalize().doing(|| path.display().to_string())?;
    match real.metadata().doing(|| path.display().to_string())?.is_dir() {
        true => Ok(real),
        false => Err(Error::new(ErrorKind::InvalidInput, "not a directory").doing(path.display().to_string())),
    }
}

fn status(path: &Path) -> Result<Statx> {
    let wanted = StatxFlags::INO | StatxFlags::MNT_ID;
    statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW, wanted).doing(|| format!("looking at {}", path.display()))
}

fn id(s: &Statx) -> (u32, u32, u64) {
    (s.stx_dev_major, s.stx_dev_minor, s.stx_ino)
}

/// rename(2) needs both on one mount, and neither may appear in the other.
fn check_pair(upper: &Path, work: &Path) -> Result<()> {
    let (u, w) = (status(upper)?, status(work)?);
    let same_mount = u.stx_mask & w.stx_mask & StatxFlags::MNT_ID.bits() == 0 || u.stx_mnt_id == w.stx_mnt_id;
    let reason = if id(&u) == id(&w) {
        "they are the same directory"
    } else if is_within(work, upper)? {
        "workdir lies in upperdir"
    } else if is_within(upper, work)? {
        "upperdir lies in workdir"
    } else if id(&u).0 != id(&w).0 || id(&u).1 != id(&w).1 || !same_mount {
        "they are on different filesystems or mounts"
    } else {
        return Ok(());
    };
    let names = format!("workdir {} for upperdir {}", work.display(), upper.display());
    Err(Error::new(ErrorKind::InvalidInput, reason)
        .doing(names)
        .hint("give a directory beside upperdir, on the same mount of the same filesystem"))
}

fn check_apart(path: &Path, what: &str, lower: &Path) -> Result<()> {
    let lower_name = lower.display();
    let reason = if is_within(path, lower)? {
        format!("{what} {} lies in lower layer {lower_name}", path.display())
    } else if is_within(lower, path)? {
        format!("lower layer {lower_name} lies in {what} {}", path.display())
    } else {
        return Ok(());
    };
    Err(Error::new(ErrorKind::InvalidInput, reason).hint("layers must not contain one another"))
}

/// Whether `path` is `root` or below it on the same filesystem, by whatever path `root` was given. Where another
/// filesystem is mounted on the way it is not: a layer ends where its filesystem does.
fn is_within(path: &Path, root: &Path) -> Result<bool> {
    let (start, root) = (id(&status(path)?), id(&status(root)?));
    for ancestor in path.ancestors() {
        let here = id(&status(ancestor)?);
        if (here.0, here.1) != (start.0, start.1) {
            return Ok(false);
        }
        if here == root {
            return Ok(true);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    struct Layers(tempfile::TempDir);

    impl Layers {
        fn new() -> Self {
            let dir = tempfile::Builder::new().prefix("opts-").tempdir_in("/var/tmp").unwrap();
            for name in ["lower/in", "upper/in", "work/in", "other"] {
                fs::create_dir_all(dir.path().join(name)).unwrap();
            }
            Layers(dir)
        }

        fn resolved(&self, lower: &[&str], upper: Option<&str>, work: Option<&str>) -> Result<Config> {
            let path = |name: &str| self.0.path().join(name);
            let lower = lower.iter().map(|l| path(l)).collect();
            Config { lower, upper: upper.map(path), work: work.map(path), ..Config::default() }.resolved()
        }

        #[track_caller]
        fn refused(&self, lower: &[&str], upper: Option<&str>, work: Option<&str>, why: &str) {
            let error = self.resolved(lower, upper, work).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn good_layers_are_taken_and_made_absolute() {
        let layers = Layers::new();
        let config = layers.resolved(&["lower/../other", "lower"], Some("upper"), Some("work")).unwrap();
        let real = layers.0.path().canonicalize().unwrap();
        assert_eq!(config.lower, [real.join("other"), real.join("lower")]);
        assert_eq!((config.upper, config.work), (Some(real.join("upper")), Some(real.join("work"))));
        layers.resolved(&["lower", "lower/in"], None, None).unwrap();
    }

    #[test]
    fn what_does_not_go_together_is_refused() {
        let layers = Layers::new();
        let many = vec!["lower"; MAX_LOWER + 1];
        layers.refused(&[], Some("upper"), Some("work"), "no lowerdir");
        layers.refused(&many, None, None, "501 lower layers");
        layers.resolved(&many[1..], None, None).unwrap();
        layers.refused(&["lower"], Some("upper"), None, "upperdir without workdir");
        layers.refused(&["lower"], None, Some("work"), "workdir without upperdir");
        layers.refused(&["lower", "none"], None, None, "opening lower layer 2");
        layers.refused(&["lower"], Some("upper"), Some("none"), "opening workdir");
        layers.refused(&["lower"], Some("upper"), Some("upper"), "the same directory");
        layers.refused(&["lower"], Some("upper"), Some("upper/in"), "workdir lies in upperdir");
        layers.refused(&["lower"], Some("work/in"), Some("work"), "upperdir lies in workdir");
        layers.refused(&["lower"], Some("lower/in"), Some("work"), "lies in lower layer");
        layers.refused(&["lower"], Some("lower"), Some("work"), "lies in lower layer");
        layers.refused(&["other", "lower"], Some("upper"), Some("lower/in"), "lies in lower layer");
        layers.refused(&["upper/in"], Some("upper"), Some("work"), "lies in upperdir");
        fs::write(layers.0.path().join("file"), "").unwrap();
        layers.refused(&["file"], None, None, "not a directory");
    }

    #[test]
    fn a_workdir_elsewhere_is_refused() {
        let layers = Layers::new();
        let shm = tempfile::Builder::new().prefix("opts-").tempdir_in("/dev/shm").unwrap();
        let work = shm.path().to_str().unwrap();
        layers.refused(&["lower"], Some("upper"), Some(work), "different filesystems");
    }
}
