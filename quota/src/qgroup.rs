//! Subvolumes of btrfs, counted and limited by their qgroup `0/ID` (btrfs-qgroup(8), kernel `fs/btrfs/qgroup.c`).
//!
//! There are two kinds. *Simple quotas* (Linux 6.7) count what a subvolume has allocated itself, for as long as anybody
//! refers to it. *Full* qgroups count who refers to what, at every commit: exact, and slower the more snapshots there are.
//! What is limited here is exclusive bytes: what a subvolume takes beyond what it shares with the one it is a snapshot of.
//!
//! Numbers are the kernel's own, as of the last commit of the filesystem. They are read from `/sys/fs/btrfs`, which needs
//! no privilege, in the same time however many qgroups there are. A qgroup counts its subvolume alone: what is in
//! subvolumes nested in it counts for these.

use crate::{Quota, State};
use btrfs_uapi::{
    filesystem::filesystem_info,
    inode::{lookup_path_rootid, subvolid_resolve},
    quota::{self, QgroupLimitFlags, qgroupid_level},
};
use graphdriver_core::{ByteSize, Context, Error, ErrorKind, Limits, Result, Usage};
use rustix::fs::{CWD, FlockOperation, Mode, OFlags};
use std::{
    io::ErrorKind as Io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

/// Taken by the kernel as "no limit" (`btrfs_limit_qgroup`, `CLEAR_VALUE`).
const UNLIMITED: u64 = u64::MAX;

/// How a filesystem counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accounting {
    /// Simple quotas.
    Simple,
    /// Full qgroups.
    Full,
}

/// The qgroups of one filesystem, which has them turned on.
#[derive(Debug)]
pub struct Qgroups {
    fs: OwnedFd,
    sysfs: PathBuf,
}

impl Qgroups {
    /// Those of the filesystem that `dir` is on; none if it counts nothing.
    pub fn open(dir: &Path) -> Result<Option<Qgroups>> {
        let fs = open(dir)?;
        let sysfs = sysfs(fs.as_fd())?.join("qgroups");
        // A kernel before 5.9 has no such directory, and one before 6.1 no such file in it.
        let on = match std::fs::read_to_string(sysfs.join("enabled")) {
            Ok(text) => text.trim() == "1",
            Err(e) if e.kind() == Io::NotFound => sysfs.is_dir(),
            Err(e) => return Err(Error::from(e).doing(format!("reading {}", sysfs.display()))),
        };
        Ok(on.then_some(Qgroups { fs, sysfs }))
    }

    /// Turns counting on for the whole filesystem that `dir` is on, unless it is on already. Full qgroups first count what
    /// is there, in the background. Fails with `Unsupported` for simple quotas before Linux 6.7, and with `InvalidInput` if
    /// it counts in the other way already.
    pub fn enable(dir: &Path, how: Accounting) -> Result<Qgroups> {
        // Two that turn it on at once leave the kernel with full qgroups in name and simple quotas in fact (Linux 6.18).
        let sysfs = sysfs(open(dir)?.as_fd())?;
        let alone = open(&sysfs).hint(|| "mount sysfs: mount -t sysfs sysfs /sys")?;
        rustix::fs::flock(&alone, FlockOperation::LockExclusive).doing(|| format!("locking {}", sysfs.display()))?;
        if let Some(there) = Qgroups::open(dir)? {
            return match there.accounting() == how {
                true => Ok(there),
                false => {
                    let why = format!("{} has {} on already", dir.display(), there.accounting().name());
                    Err(Error::new(ErrorKind::InvalidInput, why)
                        .hint("use what it has, or turn it off: btrfs quota disable"))
                }
            };
        }
        let turned = quota::quota_enable(open(dir)?.as_fd(), how == Accounting::Simple).map_err(io);
        turned.map_err(|e| match (e.raw_os_error(), how) {
            (Some(libc::EINVAL | libc::EOPNOTSUPP), Accounting::Simple) => {
                Error::new(ErrorKind::Unsupported, "this kernel has no simple quotas, which came with Linux 6.7")
            }
            _ => Error::from(e).doing(format!("turning {} on at {}", how.name(), dir.display())),
        })?;
        Qgroups::open(dir)?.ok_or_else(|| {
            Error::new(ErrorKind::Unsupported, "/sys/fs/btrfs does not show the quotas of this filesystem")
                .hint("mount sysfs: mount -t sysfs sysfs /sys")
        })
    }

    /// How it counts.
    pub fn accounting(&self) -> Accounting {
        match std::fs::read_to_string(self.sysfs.join("mode")) {
            Ok(mode) if mode.trim() == "squota" => Accounting::Simple,
            // There is no such file where there are no simple quotas.
            _ => Accounting::Full,
        }
    }

    /// Whether the numbers cannot be relied on until `btrfs quota rescan`.
    pub fn inconsistent(&self) -> bool {
        std::fs::read_to_string(self.sysfs.join("inconsistent")).is_ok_and(|text| text.trim() != "0")
    }

    /// What a subvolume takes and may take, by its id. `NotFound` if it is not counted.
    pub fn state(&self, id: u64) -> Result<State> {
        let dir = self.sysfs.join(format!("0_{id}"));
        let number = |name: &str| -> Result<u64> {
            let text = std::fs::read_to_string(dir.join(name)).map_err(|e| match e.kind() {
                Io::NotFound => Error::new(ErrorKind::NotFound, format!("there is no qgroup 0/{id}")),
                _ => Error::from(e).doing(format!("reading {}", dir.join(name).display())),
            })?;
            let text = text.trim();
            let flags = text.strip_prefix("0x").and_then(|hex| u64::from_str_radix(hex, 16).ok());
            flags
                .or_else(|| text.parse().ok())
                .ok_or_else(|| Error::new(ErrorKind::Corrupt, format!("{name} is {text:?}")))
        };
        let limited = QgroupLimitFlags::from_bits_truncate(number("limit_flags")?).contains(QgroupLimitFlags::MAX_EXCL);
        let size = if limited { Some(ByteSize(number("max_exclusive")?)) } else { None };
        let used = Usage { bytes: number("exclusive")?, inodes: 0 };
        Ok(State { used, limits: Limits { size, inodes: None } })
    }

    /// Limits a subvolume by its id.
    pub fn limit(&self, id: u64, limits: Limits) -> Result<()> {
        if limits.inodes.is_some() {
            return Err(Error::new(ErrorKind::Unsupported, "btrfs counts no inodes, so it cannot limit them")
                .hint("leave the limit of inodes out"));
        }
        let most = limits.size.map_or(UNLIMITED, |size| size.0);
        quota::qgroup_limit(self.fs.as_fd(), id, QgroupLimitFlags::MAX_EXCL, UNLIMITED, most)
            .map_err(|e| match io(e) {
                e if e.raw_os_error() == Some(libc::ENOTCONN) => {
                    Error::new(ErrorKind::Unsupported, "the filesystem's quotas were turned off")
                        .hint("turn them on: --storage-opt btrfs.quota=simple")
                }
                e => e.into(),
            })
            .doing(|| format!("limiting subvolume {id}"))
    }

    /// Removes the qgroup of a subvolume that was deleted; false if the kernel is not done with that yet, and whoever
    /// calls has to try again. Newer kernels remove it themselves. One that is not there is no error.
    pub fn forget(&self, id: u64) -> Result<bool> {
        // Full accounting takes one that still has numbers for a mistake: it stops, and no limit holds any more anywhere.
        if self.accounting() == Accounting::Full && !self.inconsistent() && self.has_numbers(id) {
            return Ok(false);
        }
        match quota::qgroup_destroy(self.fs.as_fd(), id).map_err(io) {
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => Ok(false),
            // The second where quotas were turned off meanwhile.
            Err(e) if [Some(libc::ENOENT), Some(libc::ENOTCONN)].contains(&e.raw_os_error()) => Ok(true),
            done => done.map(|()| true).doing(|| format!("removing qgroup 0/{id}")),
        }
    }

    /// Whether something counts for it still: the kernel counts at the end of a transaction.
    fn has_numbers(&self, id: u64) -> bool {
        let number = |name| std::fs::read_to_string(self.sysfs.join(format!("0_{id}")).join(name));
        ["referenced", "exclusive"].into_iter().any(|name| number(name).is_ok_and(|text| text.trim() != "0"))
    }

    fn id(&self, tree: &Path) -> Result<u64> {
        subvolume_id(open(tree)?.as_fd()).doing(|| format!("looking at {}", tree.display()))
    }
}

impl Accounting {
    /// In words: "simple quotas".
    pub fn name(self) -> &'static str {
        match self {
            Accounting::Simple => "simple quotas",
            Accounting::Full => "full qgroups",
        }
    }
}

/// A tree is a subvolume, by a path that leads to it.
impl Quota for Qgroups {
    fn set(&self, tree: &Path, limits: Limits) -> Result<()> {
        self.limit(self.id(tree)?, limits)
    }

    /// There is no count of inodes: it is 0.
    fn read(&self, tree: &Path) -> Result<State> {
        self.state(self.id(tree)?)
    }

    /// A subvolume is counted as long as it is there, so this ends the limit alone. The qgroup of one that was deleted
    /// has no path any more: [`forget`](Qgroups::forget).
    fn remove(&self, tree: &Path) -> Result<()> {
        match self.id(tree) {
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
            id => self.limit(id?, Limits::default()),
        }
    }

    /// The subvolumes with their paths from the top of the filesystem, which is the empty path. Needs CAP_SYS_ADMIN.
    fn list(&self) -> Result<Vec<(PathBuf, State)>> {
        let listed = quota::qgroup_list(self.fs.as_fd()).map_err(io).doing(|| "listing qgroups")?;
        let mut trees = Vec::new();
        for group in listed.qgroups.iter().filter(|group| qgroupid_level(group.qgroupid) == 0 && !group.stale) {
            let Ok(path) = subvolid_resolve(self.fs.as_fd(), group.qgroupid) else { continue };
            let size = (group.max_excl != UNLIMITED).then_some(ByteSize(group.max_excl));
            let used = Usage { bytes: group.excl, inodes: 0 };
            trees.push((PathBuf::from(path), State { used, limits: Limits { size, inodes: None } }));
        }
        Ok(trees)
    }
}

/// The id of the subvolume that an open file is in.
pub fn subvolume_id(file: BorrowedFd<'_>) -> Result<u64> {
    lookup_path_rootid(file).map_err(io).doing(|| "asking for the id of a subvolume")
}

/// What the kernel shows of the filesystem that `file` is on.
fn sysfs(file: BorrowedFd<'_>) -> Result<PathBuf> {
    let info = filesystem_info(file).map_err(io).doing(|| "asking about the filesystem")?;
    Ok(PathBuf::from(format!("/sys/fs/btrfs/{}", info.uuid)))
}

fn io(e: impl Into<std::io::Error>) -> std::io::Error {
    e.into()
}

fn open(dir: &Path) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat(CWD, dir, flags, Mode::empty()).doing(|| format!("opening {}", dir.display()))
}
