//! Reading a pool's metadata: which block of the pool each block of a thin device is in.
//!
//! Everything is little-endian and in blocks of 4 KiB. The superblock (kernel `drivers/md/dm-thin-metadata.c`, `struct
//! thin_disk_superblock`) names a B-tree (`drivers/md/persistent-data/dm-btree-internal.h`) from the numbers of thin devices
//! to the roots of further B-trees, from blocks of the device to `block << 24 | time`. A tree that a snapshot has not
//! changed is shared with its origin, block by block, which is why comparing two devices need not read what they share.

use graphdriver_core::{Context, Error, ErrorKind, Result};
use rustix::fs::OFlags;
use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    fs::File,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
};

const BLOCK: usize = 4096;

/// `THIN_SUPERBLOCK_MAGIC`.
const MAGIC: u64 = 27_022_010;

const INTERNAL: u32 = 1;

const LEAF: u32 = 2;

/// A tree of 2^64 blocks is lower than that: damaged ones end here.
const DEEPEST: usize = 16;

/// Aligned as direct I/O wants it.
#[repr(C, align(4096))]
struct Block([u8; BLOCK]);

impl Block {
    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.0[at..at + 4].try_into().expect("four bytes"))
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.0[at..at + 8].try_into().expect("eight bytes"))
    }
}

/// A pool's metadata as they were when the kernel was told to keep a snapshot of them.
pub(crate) struct Metadata {
    device: File,
    /// From thin devices to the roots of their trees.
    devices: BTreeMap<u64, u64>,
}

/// From blocks of a thin device to blocks of the pool.
type Mapping = BTreeMap<u64, u64>;

/// How a thin device differs from another.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Difference {
    /// Blocks that are elsewhere, or only in one of the two.
    pub changed: BTreeSet<u64>,
    /// Blocks that the first one has for itself.
    pub own: u64,
}

impl Metadata {
    /// Reads the snapshot, which must be there (`reserve_metadata_snap`), past the page cache: the kernel writes past it.
    pub(crate) fn open(path: &Path) -> Result<Metadata> {
        let doing = || format!("reading the pool's metadata on {}", path.display());
        let device = File::options().read(true).custom_flags(OFlags::DIRECT.bits() as i32).open(path).doing(doing)?;
        let mut metadata = Metadata { device, devices: BTreeMap::new() };
        metadata.devices = metadata.root().and_then(|root| metadata.map(root)).doing(doing)?;
        Ok(metadata)
    }

    fn root(&self) -> Result<u64> {
        let held = self.superblock(0)?.u64(56);
        if held == 0 {
            return Err(damaged("it has no snapshot"));
        }
        Ok(self.superblock(held)?.u64(320))
    }

    fn superblock(&self, number: u64) -> Result<Block> {
        let block = self.read(number)?;
        if block.u64(32) != MAGIC {
            return Err(damaged("its superblock is not that of a thin pool"));
        }
        Ok(block)
    }

    fn read(&self, number: u64) -> Result<Block> {
        let mut block = Block([0; BLOCK]);
        let at = number.checked_mul(BLOCK as u64).ok_or_else(|| damaged("it points out of itself"))?;
        self.device.read_exact_at(&mut block.0, at).doing(|| format!("reading block {number}"))?;
        Ok(block)
    }

    fn map(&self, root: u64) -> Result<BTreeMap<u64, u64>> {
        let mut all = BTreeMap::new();
        for leaf in self.leaves(root)? {
            all.extend(entries(&self.read(leaf)?, leaf, LEAF)?);
        }
        Ok(all)
    }

    /// The blocks that a tree's entries are in.
    fn leaves(&self, root: u64) -> Result<Vec<u64>> {
        let mut level = vec![root];
        for _ in 0..DEEPEST {
            let mut below = Vec::new();
            for (n, &number) in level.iter().enumerate() {
                let node = self.read(number)?;
                match node.u32(4) {
                    // All leaves are at the same depth.
                    LEAF if n == 0 => return Ok(level),
                    INTERNAL => below.extend(entries(&node, number, INTERNAL)?.map(|(_, child)| child)),
                    _ => return Err(damaged("a tree has something else in it")),
                }
            }
            level = below;
        }
        Err(damaged("a tree is too deep"))
    }

    fn leaves_of(&self, thin: u32) -> Result<Vec<u64>> {
        let root = self.devices.get(&thin.into());
        self.leaves(*root.ok_or_else(|| damaged(format!("it has no thin device {thin}")))?)
    }

    /// The numbers of all thin devices.
    pub(crate) fn thin_devices(&self) -> Vec<u64> {
        self.devices.keys().copied().collect()
    }

    /// How `thin` differs from `origin`, or from nothing.
    pub(crate) fn compare(&self, thin: u32, origin: Option<u32>) -> Result<Difference> {
        let ours = self.leaves_of(thin)?;
        let theirs = origin.map(|origin| self.leaves_of(origin)).transpose()?.unwrap_or_default();
        let shared: HashSet<u64> = ours.iter().filter(|leaf| theirs.contains(leaf)).copied().collect();
        let (ours, theirs) = (self.mapping(&ours, &shared)?, self.mapping(&theirs, &shared)?);
        Ok(differ(&ours, &theirs))
    }

    fn mapping(&self, leaves: &[u64], but: &HashSet<u64>) -> Result<Mapping> {
        let mut mapping = Mapping::new();
        for &leaf in leaves.iter().filter(|leaf| !but.contains(leaf)) {
            mapping.extend(entries(&self.read(leaf)?, leaf, LEAF)?.map(|(block, value)| (block, value >> 24)));
        }
        Ok(mapping)
    }
}

fn differ(ours: &Mapping, theirs: &Mapping) -> Difference {
    let own = ours.iter().filter(|(block, place)| theirs.get(block) != Some(place)).map(|(block, _)| *block);
    let mut changed: BTreeSet<u64> = own.collect();
    let own = changed.len() as u64;
    changed.extend(theirs.keys().filter(|block| !ours.contains_key(block)));
    Difference { changed, own }
}

/// Keys and values of a node with values of 8 bytes.
fn entries(node: &Block, number: u64, kind: u32) -> Result<impl Iterator<Item = (u64, u64)>> {
    const HEAD: usize = 32;
    let (used, most, size) = (node.u32(16) as usize, node.u32(20) as usize, node.u32(24) as usize);
    let fits = most <= (BLOCK - HEAD) / 16 && used <= most && size == 8;
    if node.u32(4) != kind || node.u64(8) != number || !fits {
        return Err(damaged(format!("block {number} is no node of a tree")));
    }
    let all: Vec<_> = (0..used).map(|n| (node.u64(HEAD + 8 * n), node.u64(HEAD + 8 * (most + n)))).collect();
    Ok(all.into_iter())
}

fn damaged(why: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, format!("the pool's metadata are not as expected: {}", why.into()))
        .hint("thin_check tells more")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn put(image: &mut [u8], at: usize, value: u64, len: usize) {
        image[at..at + len].copy_from_slice(&value.to_le_bytes()[..len]);
    }

    /// A node in its block, as the kernel lays it out, with 252 places.
    fn node(image: &mut [u8], number: u64, kind: u32, entries: &[(u64, u64)]) {
        let at = number as usize * BLOCK;
        for (offset, value, len) in
            [(4, kind.into(), 4), (8, number, 8), (16, entries.len() as u64, 4), (20, 252, 4), (24, 8, 4)]
        {
            put(image, at + offset, value, len);
        }
        for (n, (key, value)) in entries.iter().enumerate() {
            put(image, at + 32 + 8 * n, *key, 8);
            put(image, at + 32 + 8 * (252 + n), *value, 8);
        }
    }

    /// Devices 1 and 2, of which 2 is a snapshot that shares a leaf and has one block elsewhere, one more, one less.
    fn image() -> Vec<u8> {
        let mut image = vec![0; 10 * BLOCK];
        let place = |block: u64| block << 24 | 5;
        put(&mut image, 32, MAGIC, 8);
        put(&mut image, 56, 1, 8);
        put(&mut image, BLOCK + 32, MAGIC, 8);
        put(&mut image, BLOCK + 320, 2, 8);
        node(&mut image, 2, LEAF, &[(1, 3), (2, 4)]);
        node(&mut image, 3, INTERNAL, &[(0, 5), (100, 6)]);
        node(&mut image, 4, INTERNAL, &[(0, 5), (100, 7)]);
        node(&mut image, 5, LEAF, &[(0, place(10)), (1, place(11))]);
        node(&mut image, 6, LEAF, &[(100, place(20)), (101, place(21)), (102, place(22))]);
        node(&mut image, 7, LEAF, &[(100, place(20)), (101, place(31)), (103, place(33))]);
        image
    }

    fn read(image: &[u8]) -> Result<Metadata> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), image).unwrap();
        Metadata::open(file.path())
    }

    #[test]
    fn two_devices_are_compared_block_by_block() {
        let metadata = read(&image()).unwrap();
        assert_eq!(metadata.thin_devices(), [1, 2]);
        let found = metadata.compare(2, Some(1)).unwrap();
        assert_eq!(found, Difference { changed: [101, 102, 103].into(), own: 2 });
        assert_eq!(metadata.compare(1, Some(1)).unwrap(), Difference::default());
        assert_eq!(metadata.compare(1, None).unwrap().own, 5);
        assert_eq!(metadata.compare(3, None).unwrap_err().kind(), ErrorKind::Corrupt);
    }

    #[test]
    fn damage_is_told_and_never_followed() {
        let damaged = |at: usize, value: u64, len: usize| {
            let mut image = image();
            put(&mut image, at, value, len);
            read(&image).and_then(|metadata| metadata.compare(2, Some(1))).map(drop)
        };
        damaged(3, 0, 1).unwrap();
        for (at, value, len) in [
            (32, 0, 8),
            (56, 0, 8),
            (2 * BLOCK + 16, 300, 4),
            (2 * BLOCK + 20, 4000, 4),
            (4 * BLOCK + 24, 4, 4),
            (4 * BLOCK + 32 + 8 * 252, 4, 8),
            (7 * BLOCK + 8, 6, 8),
        ] {
            assert_eq!(damaged(at, value, len).unwrap_err().kind(), ErrorKind::Corrupt, "{value} at {at}");
        }
        assert!(damaged(4 * BLOCK + 32 + 8 * 252, u64::MAX, 8).is_err());
    }

    proptest! {
        #[test]
        fn nothing_panics(at in 0..10 * BLOCK - 8, value: u64) {
            let mut image = image();
            put(&mut image, at, value, 8);
            let _ = read(&image).and_then(|metadata| metadata.compare(2, Some(1)));
        }
    }
}
