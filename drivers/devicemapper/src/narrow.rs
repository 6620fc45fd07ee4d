//! Where a layer's changes can be, from the pool's metadata.
//!
//! Each inode has its place on the device, and whatever is changed about a file, data and attributes too, changes its
//! times and so the inode. Once the filesystem has written everything to its place, an inode in a block of the pool that
//! the layer shares with its parent is the same inode: only names whose inode lies in another block, or that stand for
//! another inode, need to be compared. Directories are always gone into, since what is deeper leaves no trace in them.

use crate::{filesystem::Xfs, pool::Borrowed};
use graphdriver_core::{Candidates, Context, Error, ErrorKind, Narrow, Result};
use rustix::{
    fs::{self, FileType, Mode, OFlags, ResolveFlags},
    io::Errno,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::{OsStr, OsString},
    fs::File,
    os::{
        fd::OwnedFd,
        unix::{ffi::OsStrExt, fs::FileExt},
    },
    path::Path,
};

/// Where inodes are on a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Inodes {
    Xfs(Xfs),
    Ext4(Ext4),
}

/// The inode tables of an ext4 (kernel `Documentation/filesystems/ext4`, "Super Block", "Block Group Descriptors").
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ext4 {
    inode_size: u64,
    per_group: u64,
    /// The first byte of each group's table.
    tables: Vec<u64>,
}

impl Inodes {
    /// The bytes of the inode; None for a number that cannot be.
    fn place(&self, inode: u64) -> Option<(u64, u64)> {
        match self {
            Inodes::Xfs(xfs) => {
                let group = inode >> (xfs.group_bits + xfs.inode_bits);
                let block = inode >> xfs.inode_bits & ((1 << xfs.group_bits) - 1);
                let within = inode & ((1 << xfs.inode_bits) - 1);
                let start = group.checked_mul(xfs.group_blocks)?.checked_add(block)?.checked_mul(xfs.block)?;
                Some((start + within * xfs.inode_size, xfs.inode_size))
            }
            Inodes::Ext4(ext4) => {
                let number = inode.checked_sub(1)?;
                let table = ext4.tables.get(usize::try_from(number / ext4.per_group).ok()?)?;
                Some((table + number % ext4.per_group * ext4.inode_size, ext4.inode_size))
            }
        }
    }
}

impl Ext4 {
    pub(crate) fn read(device: &File) -> Result<Ext4> {
        let doing = || "reading an ext4 superblock";
        let mut sb = [0; 1024];
        device.read_exact_at(&mut sb, 1024).doing(doing)?;
        let number = |at: usize, len: usize| little(&sb[at..at + len]);
        let damaged = || Error::new(ErrorKind::Corrupt, "its superblock is not that of an ext4");
        const META_BG: u64 = 0x10;
        const WIDE: u64 = 0x80;
        let (magic, log, features) = (number(56, 2), number(24, 4), number(96, 4));
        let (per_group, in_group, inode_size) = (number(40, 4), number(32, 4), number(88, 2));
        let sane = magic == 0xEF53 && log <= 6 && per_group > 0 && in_group > 0 && inode_size >= 128;
        if !sane || features & META_BG != 0 {
            return Err(damaged());
        }
        let block = 1024u64 << log;
        let blocks = number(4, 4) | if features & WIDE == 0 { 0 } else { number(336, 4) << 32 };
        let size = if features & WIDE == 0 { 32 } else { number(254, 2).clamp(32, 1024) } as usize;
        let groups = blocks.saturating_sub(number(20, 4)).div_ceil(in_group);
        let groups = usize::try_from(groups).ok().filter(|groups| *groups < 1 << 22).ok_or_else(damaged)?;
        let mut descriptors = vec![0; groups * size];
        device.read_exact_at(&mut descriptors, (number(20, 4) + 1) * block).doing(doing)?;
        let table = |group: &[u8]| {
            let high = if size >= 64 { little(&group[40..44]) << 32 } else { 0 };
            (little(&group[8..12]) | high).saturating_mul(block)
        };
        Ok(Ext4 { inode_size, per_group, tables: descriptors.chunks_exact(size).map(table).collect() })
    }
}

fn little(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |n, byte| n << 8 | u64::from(*byte))
}

/// A layer beside its parent.
pub(crate) struct Changed<'a> {
    pub inodes: Inodes,
    /// Blocks of the pool's size that differ.
    pub blocks: BTreeSet<u64>,
    pub block: u64,
    pub lower: OwnedFd,
    pub upper: OwnedFd,
    /// The devices, given back when nothing above holds them.
    pub _devices: Vec<Borrowed<'a>>,
}

/// Names in a directory with inode and whether it may be a directory.
type Listing = BTreeMap<OsString, (u64, bool)>;

impl Changed<'_> {
    fn differs(&self, inode: u64) -> bool {
        let Some((start, length)) = self.inodes.place(inode) else { return true };
        (start / self.block..=(start + length - 1) / self.block).any(|block| self.blocks.contains(&block))
    }
}

impl Narrow for Changed<'_> {
    fn candidates(&mut self, dir: &Path) -> Result<Candidates> {
        if self.blocks.is_empty() {
            return Ok(Candidates::Names(Vec::new()));
        }
        let (lower, upper) = (list(&self.lower, dir)?, list(&self.upper, dir)?);
        // Gone meanwhile, or replaced: the walk finds out.
        let (Some(lower), Some(upper)) = (lower, upper) else { return Ok(Candidates::All) };
        let same = |name: &OsString, inode: u64| lower.get(name).is_some_and(|(below, _)| *below == inode);
        let mut names: BTreeSet<&OsString> = lower.keys().filter(|name| !upper.contains_key(*name)).collect();
        let changed = upper.iter().filter(|(name, (inode, dir))| *dir || !same(name, *inode) || self.differs(*inode));
        names.extend(changed.map(|(name, _)| name));
        Ok(Candidates::Names(names.into_iter().cloned().collect()))
    }
}

/// What is in a directory; None if there is none.
fn list(root: &OwnedFd, dir: &Path) -> Result<Option<Listing>> {
    let path = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let doing = || format!("listing {}", dir.display());
    let beneath = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    let open = match fs::openat2(root, path, flags, Mode::empty(), beneath) {
        Ok(open) => open,
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(None),
        Err(e) => return Err(e).doing(doing),
    };
    let mut listing = Listing::new();
    for entry in fs::Dir::new(open).doing(doing)? {
        let entry = entry.doing(doing)?;
        let name = OsStr::from_bytes(entry.file_name().to_bytes());
        if name != "." && name != ".." {
            let may_be_dir = matches!(entry.file_type(), FileType::Directory | FileType::Unknown);
            listing.insert(name.to_owned(), (entry.ino(), may_be_dir));
        }
    }
    Ok(Some(listing))
}

/// For what cannot be narrowed.
pub(crate) struct Everything;

impl Narrow for Everything {
    fn candidates(&mut self, _dir: &Path) -> Result<Candidates> {
        Ok(Candidates::All)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::{io::Write, process::Command};

    /// A filesystem that mkfs makes here, without a device.
    fn made(program: &str, arguments: &[&str]) -> Option<tempfile::NamedTempFile> {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(400 << 20).unwrap();
        let out = Command::new(program).args(arguments).arg(file.path()).output().ok()?;
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        Some(file)
    }

    #[test]
    fn the_root_inode_is_found_where_mkfs_put_it() {
        let xfs = made("mkfs.xfs", &["-q"]).expect("xfsprogs is installed");
        let shape = Xfs::read(xfs.as_file()).unwrap();
        let mut root = [0; 8];
        xfs.as_file().read_exact_at(&mut root, 56).unwrap();
        let (at, _) = Inodes::Xfs(shape).place(u64::from_be_bytes(root)).unwrap();
        let mut inode = [0; 4];
        xfs.as_file().read_exact_at(&mut inode, at).unwrap();
        assert_eq!((&inode[..2], inode[2] & 0xF0), (&b"IN"[..], 0x40), "a directory's inode");

        for features in ["64bit,flex_bg", "^64bit,flex_bg", "^64bit,^flex_bg"] {
            let ext4 = made("mkfs.ext4", &["-q", "-F", "-O", features]).expect("e2fsprogs is installed");
            let inodes = Inodes::Ext4(Ext4::read(ext4.as_file()).unwrap());
            let (at, _) = inodes.place(2).unwrap();
            let mut inode = [0; 2];
            ext4.as_file().read_exact_at(&mut inode, at).unwrap();
            assert_eq!(u16::from_le_bytes(inode), 0o040755, "{features}");
            assert_eq!(inodes.place(0), None);
            assert_eq!(inodes.place(u64::MAX), None);
        }
    }

    proptest! {
        #[test]
        fn damaged_superblocks_do_not_panic(bytes in prop::collection::vec(any::<u8>(), 512), inode: u64) {
            let mut sector: [u8; 512] = bytes.try_into().unwrap();
            sector[..4].copy_from_slice(b"XFSB");
            let _ = Xfs::parse(&sector).map(|xfs| Inodes::Xfs(xfs).place(inode));
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(&[0; 1024]).unwrap();
            file.write_all(&sector).unwrap();
            file.write_all(&sector).unwrap();
            file.write_at(&[0x53, 0xEF], 1024 + 56).unwrap();
            let _ = Ext4::read(&file).map(|ext4| Inodes::Ext4(ext4).place(inode));
        }
    }
}
