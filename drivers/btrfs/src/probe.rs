//! What the filesystem below the data root and this process can do. Looks, and changes nothing: making a subvolume to
//! find out would cost a commit of the filesystem at each command.

use crate::options::{QuotaWish, Wishes};
use btrfs_uapi::{
    filesystem::filesystem_info,
    raw::BTRFS_ROOT_TREE_OBJECTID,
    tree_search::{Key, SearchFilter, tree_search},
};
use graphdriver_core::{
    Capabilities, Context, Error, ErrorKind, Result, WriteStrategy, mount,
    overlay_home::{backing, nearest_existing},
};
use graphdriver_quota::qgroup::{Accounting, Qgroups};
use rustix::{
    fs::{self, Access, AtFlags, CWD, Mode, OFlags},
    io::Errno,
};
use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

/// Kernel `include/uapi/linux/magic.h`.
const BTRFS_SUPER_MAGIC: i64 = 0x9123_683e;

/// No limit of the driver's: a child is a snapshot like any other, and a mount does not see how deep it is.
const MAX_PARENTS: usize = 1 << 20;

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Support {
    /// CAP_SYS_ADMIN in the initial user namespace, as btrfs wants it: the trees of the filesystem can be read, snapshots
    /// sent, and limits set.
    pub privileged: bool,
    pub sector: u64,
    /// Mounts can be id-mapped.
    pub idmapped: bool,
}

/// Looks at the filesystem that `home` is on or would be on.
pub(crate) fn support(home: &Path) -> Result<Support> {
    let dir = nearest_existing(home)?;
    let fd = open(&dir).doing(|| format!("opening {}", dir.display()))?;
    if fs::fstatfs(&fd)?.f_type as i64 != BTRFS_SUPER_MAGIC {
        return Err(not_btrfs(&dir));
    }
    match fs::accessat(CWD, &dir, Access::WRITE_OK | Access::EXEC_OK, AtFlags::EACCESS) {
        Err(Errno::ROFS) => {
            let why = format!("{} is on a filesystem mounted read-only", dir.display());
            return Err(Error::new(ErrorKind::Unsupported, why).hint("remount it writable: mount -o remount,rw"));
        }
        Err(Errno::ACCESS | Errno::PERM) => {
            let why = format!("the right to write to {}", dir.display());
            return Err(Error::new(ErrorKind::PermissionDenied, why).hint(
                "run as root, or own the directory and run inside a user namespace: podman unshare, or \
                 unshare --map-auto --map-root-user --mount",
            ));
        }
        access => access?,
    }
    let info = filesystem_info(fd.as_fd()).map_err(std::io::Error::from).doing(|| "asking about the filesystem")?;
    Ok(Support {
        privileged: reads_trees(fd.as_fd()),
        sector: info.sectorsize.into(),
        idmapped: mount::can_id_map(&dir),
    })
}

fn open(dir: &Path) -> rustix::io::Result<OwnedFd> {
    fs::openat(CWD, dir, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

fn not_btrfs(dir: &Path) -> Error {
    let why = format!("{} is on {}, and subvolumes need btrfs", dir.display(), backing(dir));
    let known = std::fs::read_to_string("/proc/filesystems").is_ok_and(|text| text.contains("\tbtrfs\n"));
    let remedy = "mkfs.btrfs (package btrfs-progs) on a free device, mount it, and put the data root there";
    let module = if known { "" } else { "modprobe btrfs, as the kernel has not loaded it; then " };
    Error::new(ErrorKind::Unsupported, why).hint(format!("{module}{remedy}"))
}

/// Whether the kernel lets this process read the filesystem's trees, which it lets nobody but root in the initial user
/// namespace (`btrfs_ioctl_tree_search`).
fn reads_trees(dir: BorrowedFd<'_>) -> bool {
    let tree_id = u64::from(BTRFS_ROOT_TREE_OBJECTID);
    let nothing = SearchFilter { tree_id, start: Key::MIN, end: Key::MIN, min_transid: 0, max_transid: u64::MAX };
    tree_search(dir, nothing, |_, _| Ok(())).is_ok()
}

/// The quotas that will be used, of a filesystem that is there. Turns them on if that is asked for.
pub(crate) fn quotas(home: &Path, wishes: &Wishes) -> Result<Option<Qgroups>> {
    match wishes.quota {
        QuotaWish::Off => Ok(None),
        QuotaWish::Auto => Qgroups::open(home),
        QuotaWish::On(how) => Qgroups::enable(home, how).map(Some).map_err(|e| {
            e.doing("option btrfs.quota").hint("leave the option out: layers then are not limited in size")
        }),
    }
}

/// Whether sizes will be enforced, for those who choose a driver.
pub(crate) fn would_limit(home: &Path, wishes: &Wishes, support: &Support) -> Result<bool> {
    let dir = nearest_existing(home)?;
    let there = || Ok::<_, Error>(Qgroups::open(&dir)?.map(|quotas| quotas.accounting()));
    let on = match wishes.quota {
        QuotaWish::Off => false,
        QuotaWish::Auto => there()?.is_some(),
        QuotaWish::On(how) => match there()? {
            Some(other) if other != how => {
                let why = format!("the filesystem has {} on, and not {}", other.name(), how.name());
                return Err(Error::new(ErrorKind::InvalidInput, why).hint("btrfs.quota=auto uses what it has"));
            }
            Some(_) => true,
            None if !support.privileged => {
                let why = format!("turning on {} needs root", how.name());
                return Err(Error::new(ErrorKind::PermissionDenied, why).hint("btrfs.quota=auto uses what there is"));
            }
            None => how == Accounting::Full || since(6, 7),
        },
    };
    Ok(on && support.privileged)
}

pub(crate) fn capabilities(support: &Support, quota: bool) -> Capabilities {
    Capabilities {
        write_strategy: WriteStrategy::RedirectOnWrite { block: support.sector },
        quota,
        inode_quota: false,
        native_diff: support.privileged,
        idmapped_mounts: support.idmapped,
        independent_layers: false,
        max_depth: MAX_PARENTS,
    }
}

/// Whether the kernel is of this version or a later one.
fn since(major: u32, minor: u32) -> bool {
    let name = rustix::system::uname();
    let release = name.release().to_string_lossy();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse().unwrap_or(0u32));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (major, minor)
}
