//! The filesystem of a layer: made, mounted for a look, made larger.

use crate::{options::Fs, sys};
use graphdriver_core::{Access, Context, Error, ErrorKind, Mount, Result, mount};
use rustix::fs::{self, AtFlags, Mode, OFlags};
use std::{
    ffi::OsStr,
    fs::File,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::FileExt,
    },
    path::{Path, PathBuf},
    process::Command,
};

/// The program that makes it, wherever the caller's PATH leaves out system directories.
pub(crate) fn mkfs_program(fs: Fs) -> Option<PathBuf> {
    program(&format!("mkfs.{fs}"), &std::env::var_os("PATH").unwrap_or_default())
}

/// A program in one of the directories of `path`, or in one of the system's.
pub(crate) fn program(name: &str, path: &OsStr) -> Option<PathBuf> {
    let dirs = std::env::split_paths(path).chain(["/usr/sbin", "/sbin"].map(PathBuf::from));
    dirs.map(|dir| dir.join(name)).find(|program| program.is_file())
}

/// The filesystem to take, which is the one asked for if any is.
pub(crate) fn choose(asked: Option<Fs>) -> Result<Fs> {
    let candidates = asked.map_or(vec![Fs::Xfs, Fs::Ext4], |fs| vec![fs]);
    candidates.iter().copied().find(|fs| mkfs_program(*fs).is_some()).ok_or_else(|| {
        let package = if candidates[0] == Fs::Xfs { "xfsprogs" } else { "e2fsprogs" };
        Error::new(ErrorKind::Unsupported, format!("the program mkfs.{} is missing", candidates[0]))
            .hint(format!("apt-get install {package}"))
    })
}

/// Formats a device and returns how many inodes the empty filesystem uses.
pub(crate) fn make(fs: Fs, node: &Path, further: &[String]) -> Result<u64> {
    let doing = || format!("making {fs} on {}", node.display());
    // A new thin device has nothing to discard. What ext4 would zero later, it would zero in every layer anew. Its blocks
    // and inodes are those of large filesystems also if it is small: attributes would not fit into blocks of 1 KiB.
    let arguments: &[&str] = match fs {
        Fs::Xfs => &["-q", "-f", "-K"],
        Fs::Ext4 => &["-q", "-F", "-b", "4096", "-I", "256", "-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0"],
    };
    let program = mkfs_program(fs).ok_or_else(|| choose(Some(fs)).expect_err("it is missing"))?;
    let out = Command::new(program).args(arguments).args(further).arg(node).output().doing(doing)?;
    if !out.status.success() {
        let said = String::from_utf8_lossy(&out.stderr).trim().to_owned();
        return Err(Error::new(ErrorKind::InvalidInput, said)
            .hint("look at dm.mkfsarg and dm.basesize")
            .doing(doing()));
    }
    visit(fs, node, |root| {
        if fs == Fs::Ext4 {
            fs::unlinkat(root, "lost+found", AtFlags::REMOVEDIR).doing(|| "removing lost+found")?;
        }
        used_inodes(root)
    })
    .doing(doing)
}

/// What a layer is mounted with. All layers have the identity of their common ancestor.
fn options(fs: Fs, further: &[String]) -> Vec<String> {
    let own = match fs {
        Fs::Xfs => Some("nouuid".to_owned()),
        Fs::Ext4 => None,
    };
    own.into_iter().chain(further.iter().cloned()).collect()
}

/// The recipe for a layer. An active one is writable below a read-only mount, as one device has one superblock, which is
/// writable for all its mounts or for none.
pub(crate) fn recipe(fs: Fs, node: &Path, committed: bool, access: Access, further: &[String]) -> Vec<Mount> {
    let mut options = options(fs, further);
    if committed {
        options.insert(0, "ro".into());
    }
    let mut steps = vec![Mount { fstype: fs.name().into(), source: node.into(), options }];
    if access == Access::ReadOnly && !committed {
        let options = ["remount", "bind", "ro"].map(String::from).into();
        steps.push(Mount { fstype: "bind".into(), source: PathBuf::new(), options });
    }
    steps
}

/// Has mounted xfs of ours give up on metadata that cannot be written, as when the pool is full. By default it tries for
/// ever, and whoever flushes or freezes it waits (kernel `admin-guide/xfs.rst`, "Error handling"). Others mount layers by
/// our recipe, in which this cannot be said, so it is seen to whenever the pool is used.
pub(crate) fn never_retry(prefix: &str) {
    let Ok(mounted) = std::fs::read_dir("/sys/fs/xfs") else { return };
    for xfs in mounted.flatten() {
        let name = Path::new("/sys/class/block").join(xfs.file_name()).join("dm/name");
        if std::fs::read_to_string(name).is_ok_and(|name| name.starts_with(prefix)) {
            give_up_at_once(&xfs.path());
        }
    }
}

fn give_up_at_once(xfs: &Path) {
    // Every use of the pool comes here.
    static TOLD: std::sync::Once = std::sync::Once::new();
    for error in ["ENOSPC", "EIO"] {
        let path = xfs.join("error/metadata").join(error).join("max_retries");
        match std::fs::write(&path, "0") {
            Ok(()) => {}
            // Unmounted meanwhile.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => TOLD.call_once(|| {
                let path = path.display();
                tracing::warn!(
                    "xfs will try for ever when the pool is full: writing {path}: {e}: make /sys/fs/xfs writable"
                );
            }),
        }
    }
}

/// [`never_retry`] for one mounted device.
fn never_retry_on(fs: Fs, node: &Path) -> Result<()> {
    if fs == Fs::Xfs {
        let number = fs::stat(node)?.st_rdev;
        give_up_at_once(Path::new(&format!("/sys/fs/xfs/dm-{}", fs::minor(number))));
    }
    Ok(())
}

/// Mounts a device for as long as `look` takes, attached nowhere. A log that a crash left is replayed, and when this
/// returns, everything is in its place, unless the device is mounted elsewhere too.
pub(crate) fn visit<T>(fs: Fs, node: &Path, look: impl FnOnce(&OwnedFd) -> Result<T>) -> Result<T> {
    let root = mount::detached(&recipe(fs, node, false, Access::ReadWrite, &[]))?;
    let root = fs::openat(&root, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    never_retry_on(fs, node)?;
    let seen = look(&root)?;
    fs::syncfs(&root).doing(|| format!("flushing the filesystem on {}", node.display()))?;
    Ok(seen)
}

/// Counts the inodes in use. What was written is put in its place as far as it finds room: what does not is nowhere to be
/// measured.
pub(crate) fn measure(fs: Fs, node: &Path) -> Result<u64> {
    let root = mount::detached(&recipe(fs, node, false, Access::ReadWrite, &[])).or_else(|e| {
        tracing::debug!("measuring {} without its log: {e}", node.display());
        unreplayed(fs, node).map_err(|_| e)
    })?;
    // A filesystem that gave up for want of room opens nothing any more, but still counts.
    match fs::openat(&root, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()) {
        Ok(open) => {
            never_retry_on(fs, node)?;
            let flushed = fs::syncfs(&open);
            flushed.unwrap_or_else(|e| tracing::debug!("measuring {}, not all of it flushed: {e}", node.display()));
        }
        Err(e) => tracing::debug!("measuring {} as it is: {e}", node.display()),
    }
    used_inodes(&root)
}

/// Mounts a device as it is on the pool: to replay a log takes room.
fn unreplayed(fs: Fs, node: &Path) -> Result<OwnedFd> {
    let log = if fs == Fs::Xfs { "norecovery" } else { "noload" };
    mount::detached(&recipe(fs, node, true, Access::ReadOnly, &[log.to_owned()]))
}

pub(crate) fn used_inodes(root: &OwnedFd) -> Result<u64> {
    let stat = fs::fstatvfs(root).doing(|| "counting inodes")?;
    Ok(stat.f_files.saturating_sub(stat.f_ffree))
}

/// Makes a mounted filesystem as large as its device. Done already, it does nothing.
pub(crate) fn grow(fs: Fs, root: &OwnedFd, node: &Path, size: u64) -> Result<()> {
    let device = File::open(node)?;
    let grown = match fs {
        Fs::Xfs => {
            let shape = Xfs::read(&device)?;
            match shape.blocks * shape.block >= size / shape.block * shape.block {
                true => Ok(()),
                false => sys::grow_xfs(root.as_fd(), size / shape.block, shape.inodes_percent),
            }
        }
        Fs::Ext4 => {
            let block = fs::fstatvfs(root)?.f_frsize.max(1024);
            sys::grow_ext4(root.as_fd(), size / block)
        }
    };
    grown.doing(|| format!("growing {fs} on {} to {size} bytes", node.display()))
}

/// The shape of an xfs, from its superblock (XFS Algorithms & Data Structures, "Superblocks"). Big-endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Xfs {
    pub block: u64,
    pub blocks: u64,
    /// Blocks in an allocation group but the last.
    pub group_blocks: u64,
    pub inode_size: u64,
    /// Bits of an inode number that count inodes in a block.
    pub inode_bits: u32,
    /// Bits that count blocks in a group.
    pub group_bits: u32,
    pub inodes_percent: u32,
}

impl Xfs {
    pub(crate) fn read(device: &File) -> Result<Xfs> {
        let mut sector = [0; 512];
        device.read_exact_at(&mut sector, 0).doing(|| "reading an xfs superblock")?;
        Self::parse(&sector)
    }

    pub(crate) fn parse(sector: &[u8; 512]) -> Result<Xfs> {
        let number = |at: usize, len: usize| sector[at..at + len].iter().fold(0u64, |n, b| n << 8 | u64::from(*b));
        let shape = Xfs {
            block: number(4, 4),
            blocks: number(8, 8),
            group_blocks: number(84, 4),
            inode_size: number(104, 2),
            inode_bits: number(123, 1) as u32,
            group_bits: number(124, 1) as u32,
            inodes_percent: number(127, 1) as u32,
        };
        let sane = sector.starts_with(b"XFSB")
            && (512..=65536).contains(&shape.block)
            && (256..=2048).contains(&shape.inode_size)
            && shape.group_blocks > 0
            && shape.blocks < 1 << 54
            && shape.inode_bits < 16
            && shape.group_bits < 32;
        if sane { Ok(shape) } else { Err(Error::new(ErrorKind::Corrupt, "its superblock is not that of an xfs")) }
    }
}
