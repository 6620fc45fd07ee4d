//! The union of layers, without a word of FUSE: nodes, lookups, copy-up, changes. Errors are errnos, as the kernel's
//! callers see them.

mod attr;
mod bytes;
mod complete;
mod copy_up;
mod create;
mod data;
mod dirs;
mod layer;
mod links;
mod listing;
mod lookup;
mod marks;
mod node;
pub mod overrides;
mod remove;
mod rename;
#[cfg(test)]
mod tests;
mod work;

pub use complete::Completer;
pub use data::Data;

use crate::config::Config;
use dirs::Clock;
use graphdriver_core::{Context, Error, ErrorKind};
use layer::Numbers;
use marks::{Marks, Object};
use node::{Dir, Node, Place, ROOT_ID, Source, Table, UPPER};
use overrides::Overrides;
use parking_lot::{Mutex, RwLock};
use rustix::{
    fd::{AsFd, OwnedFd},
    io::{Errno, Result},
};
use std::{
    collections::{HashMap, HashSet},
    ffi::OsStr,
    hash::RandomState,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64},
    },
    time::Duration,
};
use work::Upper;

/// What one file is, as stat shows it: ids mapped, sizes composed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attr {
    /// Inode number: constant over copy-up, rename and remount.
    pub ino: u64,
    /// Bytes.
    pub size: u64,
    /// Units of 512 bytes.
    pub blocks: u64,
    /// Seconds and nanoseconds.
    pub atime: (i64, u32),
    /// Seconds and nanoseconds.
    pub mtime: (i64, u32),
    /// Seconds and nanoseconds.
    pub ctime: (i64, u32),
    /// Type and permissions, as `st_mode`.
    pub mode: u32,
    /// Links.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Device number, as makedev(3) packs it.
    pub rdev: u64,
    /// Preferred block size.
    pub blksize: u32,
}

/// What a lookup found. The kernel now holds one more reference to the id, which [`Union::forget`] gives back.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    /// The number the kernel knows the node by. Mostly `attr.ino`, but not always: see [`Union::renew`].
    pub id: u64,
    /// Distinguishes nodes that had the same id one after the other.
    pub generation: u64,
    /// Its attributes.
    pub attr: Attr,
}

/// One name of a directory.
#[derive(Debug)]
pub struct DirEntry<'a> {
    /// Inode number.
    pub ino: u64,
    /// Where to go on after it.
    pub offset: u64,
    /// `DT_*` of dirent.h.
    pub kind: u8,
    /// The name.
    pub name: &'a OsStr,
}

/// Who asks: what the kernel says of the calling process.
#[derive(Debug, Clone, Copy)]
pub struct Caller {
    /// Filesystem user id.
    pub uid: u32,
    /// Filesystem group id.
    pub gid: u32,
    /// umask, where the request has it.
    pub umask: u32,
}

/// What `setattr` changes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SetAttr {
    /// Permissions.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Size in bytes.
    pub size: Option<u64>,
    /// Access time; `None` inside: now.
    pub atime: Option<Option<(i64, u32)>>,
    /// Modification time; `None` inside: now.
    pub mtime: Option<Option<(i64, u32)>>,
}

/// The most lower layers, as the kernel's overlay has it.
pub const MAX_LOWERS: usize = 500;

/// The union.
pub struct Union {
    config: Config,
    upper: Option<Upper>,
    lowers: Vec<OwnedFd>,
    /// By layer number.
    overrides: Vec<Overrides>,
    marks: Marks,
    numbers: Numbers,
    root: Arc<Node>,
    root_ino: u64,
    table: Table,
    clock: Clock,
    hasher: RandomState,
    turns: copy_up::Turns,
    /// Held for reading while a name moves, for writing while the whole tree is walked. Taken before any names.
    moves: RwLock<()>,
    cost: copy_up::Cost,
    /// Filesystems of lower layers that share no data with the upper one.
    no_reflink: Mutex<HashSet<u64>>,
    links: Mutex<Option<links::Links>>,
    completion: complete::Queue,
    /// Whether this machine has SELinux.
    selinux: bool,
    /// How many names of lower files with several were taken away, by inode number: the file's own count stays.
    gone: Mutex<HashMap<u64, u32>>,
}

impl Union {
    /// Opens the layers, cleans the work directory, finds out what the filesystems can do. Fails with `Busy` if another
    /// daemon has the upper directory, with `InvalidInput` for layers that make no union.
    pub fn open(config: Config) -> graphdriver_core::Result<Arc<Union>> {
        let lowers = open_lowers(&config)?;
        let (upper, marks) = match (&config.upper, &config.work) {
            (Some(upper), Some(work)) => {
                let (upper, marks) = Upper::open(upper, work, config.user_xattrs)?;
                (Some(upper), marks)
            }
            (None, None) if config.sees_trusted() => (None, Marks::TRUSTED),
            (None, None) => (None, Marks::USER),
            _ => {
                let why = "an upper directory and a work directory are given together or not at all";
                return Err(Error::new(ErrorKind::InvalidInput, why));
            }
        };
        let numbers = Numbers::default();
        let devices = lowers.iter().rev().chain(upper.iter().map(|u| &u.root));
        for root in devices {
            let stat = layer::stat(root.as_fd(), OsStr::new("")).doing(|| "reading a layer's root")?;
            numbers.present(layer::device(&stat));
        }
        let mut overrides = vec![match &upper {
            Some(upper) => {
                Overrides::of_upper(&config, &readable(&upper.root).doing(|| "opening the upper directory")?)?
            }
            None => Overrides::new(&config),
        }];
        for (root, path) in lowers.iter().zip(&config.lower) {
            let root = readable(root)
                .doing(|| format!("opening the lower directory {}", path.display()))
                .map_err(|e| e.hint("whoever mounts has to be able to read and search it"))?;
            let of_lower = Overrides::of_lower(&config, &root);
            overrides.push(of_lower.doing(|| "reading a layer's owners")?);
        }
        let (root, root_ino) = root_node(upper.as_ref(), &lowers, marks, &numbers).doing(|| "reading the roots")?;
        let table = Table::new();
        table.insert_root(root.clone());
        let descriptors = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(1 << 16);
        Ok(Arc::new(Union {
            config,
            upper,
            lowers,
            overrides,
            marks,
            numbers,
            root,
            root_ino,
            table,
            clock: Clock::new(descriptors as usize),
            hasher: RandomState::new(),
            turns: copy_up::Turns::default(),
            moves: RwLock::default(),
            cost: copy_up::Cost::new(),
            no_reflink: Mutex::default(),
            links: Mutex::default(),
            completion: complete::Queue::default(),
            selinux: std::path::Path::new("/sys/fs/selinux").exists(),
            gone: Mutex::default(),
        }))
    }

    /// The settings it was opened with.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Whether a layer lies on a filesystem that lies upon others itself. Asked of open descriptors: the mount may cover the
    /// layers' paths, and nobody answers it yet when the kernel is told.
    pub fn is_stacked(&self) -> bool {
        const STACKED: [u64; 3] = [0x794c_7630, 0x6573_5546, 0xf15f]; // overlay, FUSE, ecryptfs
        let roots = self.lowers.iter().chain(self.upper.iter().map(|u| &u.root));
        roots.into_iter().any(|fd| rustix::fs::fstatfs(fd).is_ok_and(|s| STACKED.contains(&(s.f_type as u64))))
    }

    /// The kernel drops so many references.
    pub fn forget(&self, id: u64, count: u64) {
        self.table.forget(id, count);
    }

    /// The target of a symlink.
    pub fn readlink(&self, id: u64) -> Result<Vec<u8>> {
        let node = self.table.get(id)?;
        if node.kind != libc::S_IFLNK {
            return Err(Errno::INVAL);
        }
        self.with(&node, |object, _| Ok(rustix::fs::readlinkat(object.dir, object.name, Vec::new())?.into_bytes()))
    }

    /// Of the upper's filesystem, or the topmost layer's.
    pub fn statfs(&self) -> Result<rustix::fs::StatVfs> {
        rustix::fs::fstatvfs(self.upper.as_ref().map_or(&self.lowers[0], |u| &u.root))
    }

    /// Makes a directory's entries durable.
    pub fn fsync_dir(&self, id: u64) -> Result<()> {
        let node = self.table.get(id)?;
        if self.config.volatile || !node.dir()?.in_upper() {
            return Ok(());
        }
        rustix::fs::fsync(self.reopen_dir(&*self.fds(&node)?)?)
    }

    /// How long the kernel may keep what it was told.
    pub fn ttl(&self) -> Duration {
        self.config.timeout
    }
}

fn open_lowers(config: &Config) -> graphdriver_core::Result<Vec<OwnedFd>> {
    let refused = |why: String| Err(Error::new(ErrorKind::InvalidInput, why));
    match config.lower.len() {
        0 => return refused("no lower directory is given: lowerdir=DIR[:DIR...]".into()),
        n if n > MAX_LOWERS => {
            return refused(format!("{n} lower directories, of which at most {MAX_LOWERS} are possible"));
        }
        _ => {}
    }
    let open = |path: &std::path::PathBuf| {
        let root = layer::open_root(path).doing(|| format!("opening the lower directory {}", path.display()))?;
        Ok(layer::without_times(path).unwrap_or(root))
    };
    config.lower.iter().map(open).collect()
}

fn readable(root: &OwnedFd) -> Result<OwnedFd> {
    use rustix::fs::{Mode, OFlags};
    rustix::fs::openat(root, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

fn root_node(upper: Option<&Upper>, lowers: &[OwnedFd], marks: Marks, numbers: &Numbers) -> Result<(Arc<Node>, u64)> {
    let roots = upper.iter().map(|u| (UPPER, &u.root)).chain((1..).zip(lowers));
    let mut sources = Vec::new();
    let mut impure = false;
    for (layer, root) in roots {
        let found = marks.of_dir(Object { dir: root.as_fd(), name: OsStr::new("") })?;
        impure |= layer == UPPER && found.impure;
        sources.push(Source { layer, path: None, xattr_whiteouts: found.xattr_whiteouts });
    }
    // The topmost lower one gives the number: it is there with and without an upper layer.
    let stat = layer::stat(lowers[0].as_fd(), OsStr::new(""))?;
    let node = Node {
        ino: ROOT_ID,
        generation: 0,
        kind: libc::S_IFDIR,
        dir: Some(Box::new(Dir::new(sources, impure, Some(Box::default())))),
        dead: AtomicBool::new(false),
        renewed: AtomicU64::new(0),
        place: Place { parent: None, name: OsStr::new("").into(), layer: 1, composed: false, more: None }.into(),
    };
    Ok((Arc::new(node), numbers.of(layer::device(&stat), stat.stx_ino)))
}
