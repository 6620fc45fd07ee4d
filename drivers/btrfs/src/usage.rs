//! What a layer takes by itself.
//!
//! Bytes come from its qgroup, if the filesystem counts. Inodes are counted by nobody, so they come from the layer's own
//! metadata, and so do bytes where there are no quotas: blocks of the subvolume's tree that were written since it was made
//! a snapshot (`BTRFS_IOC_TREE_SEARCH` with `min_transid`). The kernel skips all that is shared with the parent, no file is
//! opened and no name looked up; and nothing at all is read as long as the subvolume's generation stays the same.
//!
//! Both are as of the last commit of the filesystem, which the kernel makes every 30 seconds.
//!
//! A committed layer's numbers are written down when it is committed. Afterwards nobody could tell: full qgroups count
//! as exclusive only what no child refers to.

use crate::subvolume;
use btrfs_disk::items::{FileExtentBody, FileExtentItem, InodeItem};
use btrfs_uapi::{
    raw::{BTRFS_EXTENT_DATA_KEY, BTRFS_INODE_ITEM_KEY},
    subvolume::SubvolumeInfo,
    tree_search::{Key, SearchFilter, tree_search_auto},
};
use graphdriver_core::{Context, Error, ErrorKind, Result, Root, Usage, root::names_in};
use rustix::{
    fs::{self, AtFlags, FileType},
    io::Errno,
};
use std::{
    collections::HashSet,
    ffi::OsStr,
    io,
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// The size of an item's header in a leaf (`struct btrfs_item`).
const ITEM_HEADER: u64 = 25;

/// The transaction after which what is in a subvolume was written there; 0 if it is no snapshot.
pub(crate) fn born(info: &SubvolumeInfo) -> u64 {
    if info.parent_uuid.is_nil() { 0 } else { info.otransid }
}

/// All items of the subvolume `file` is in, in blocks written after transaction `born`.
pub(crate) fn own_items(file: BorrowedFd<'_>, born: u64, visit: &mut dyn FnMut(Key, &[u8])) -> Result<()> {
    let min_transid = if born == 0 { 0 } else { born + 1 };
    let all = SearchFilter { tree_id: 0, start: Key::MIN, end: Key::MAX, min_transid, max_transid: u64::MAX };
    let searched = tree_search_auto(file, all, None, |header, data| {
        visit(Key { objectid: header.objectid, item_type: header.item_type, offset: header.offset }, data);
        Ok(())
    });
    searched.map_err(io::Error::from).doing(|| "reading the layer's metadata")
}

/// What a subvolume takes that it does not share with the one it is a snapshot of, by its own metadata.
pub(crate) fn own(file: BorrowedFd<'_>, info: &SubvolumeInfo) -> Result<Usage> {
    own_before(file, info, u64::MAX)
}

/// The bytes of it that simple quotas do not count: what was written before they were turned on.
pub(crate) fn uncounted(file: BorrowedFd<'_>) -> Result<u64> {
    let (info, on) = (subvolume::info(file)?, subvolume::simple_quotas_since(file)?);
    // Most layers are younger, and then nothing is read.
    if info.otransid >= on { Ok(0) } else { Ok(own_before(file, &info, on)?.bytes) }
}

/// What of it was written before transaction `end`.
fn own_before(file: BorrowedFd<'_>, info: &SubvolumeInfo, end: u64) -> Result<Usage> {
    let born = born(info);
    let own = |transaction: u64| (born + 1..end).contains(&transaction);
    let (mut usage, mut extents) = (Usage::default(), HashSet::new());
    own_items(file, born, &mut |key, data| match key.item_type {
        BTRFS_INODE_ITEM_KEY => {
            let Some(inode) = InodeItem::parse(data) else { return };
            // One without a name was removed, and the kernel has not got round to it.
            usage.inodes += u64::from(own(inode.generation) && inode.nlink > 0);
            usage.bytes += if own(inode.transid) { data.len() as u64 + ITEM_HEADER } else { 0 };
        }
        BTRFS_EXTENT_DATA_KEY => {
            let Some(extent) = FileExtentItem::parse(data).filter(|extent| own(extent.generation)) else { return };
            usage.bytes += data.len() as u64 + ITEM_HEADER;
            if let FileExtentBody::Regular { disk_bytenr, disk_num_bytes, .. } = extent.body
                && disk_bytenr != 0
                && extents.insert(disk_bytenr)
            {
                usage.bytes += disk_num_bytes;
            }
        }
        _ => {}
    })?;
    Ok(usage)
}

/// The same for those who may not read metadata: a walk, as there is no other way. It counts what was made or changed
/// since the subvolume was made, changed files whole.
pub(crate) fn walked(root: &Root, info: &SubvolumeInfo) -> Result<Usage> {
    let since = if info.parent_uuid.is_nil() { UNIX_EPOCH } else { info.otime };
    let mut usage = Usage::default();
    let mut met = HashSet::new();
    let mut dirs = vec![PathBuf::new()];
    while let Some(path) = dirs.pop() {
        let dir = match root.open_dir_nofollow(&path) {
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => continue,
            opened => opened.doing(|| format!("measuring {}", path.display()))?,
        };
        if path.as_os_str().is_empty() {
            count(dir.as_fd(), OsStr::new(""), since, &mut usage, &mut met)?;
        }
        for name in names_in(dir.as_fd())? {
            if count(dir.as_fd(), &name, since, &mut usage, &mut met)? == Some(FileType::Directory) {
                dirs.push(path.join(name));
            }
        }
    }
    Ok(usage)
}

fn count(
    dir: BorrowedFd<'_>,
    name: &OsStr,
    since: SystemTime,
    usage: &mut Usage,
    met: &mut HashSet<(u64, u64)>,
) -> Result<Option<FileType>> {
    let stat = match fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW | AtFlags::EMPTY_PATH) {
        Err(Errno::NOENT) => return Ok(None),
        stat => stat?,
    };
    let changed = u64::try_from(stat.st_ctime).unwrap_or(0);
    let changed = UNIX_EPOCH + Duration::new(changed, u32::try_from(stat.st_ctime_nsec).unwrap_or(0));
    if changed >= since && (stat.st_nlink < 2 || met.insert((stat.st_dev, stat.st_ino))) {
        usage.inodes += 1;
        usage.bytes += stat.st_blocks as u64 * 512;
    }
    Ok(Some(FileType::from_raw_mode(stat.st_mode)))
}

/// Writes down what a layer takes: `BYTES INODES` in decimal and a line feed. Durable.
pub(crate) fn record(path: &Path, usage: Usage) -> Result<()> {
    let write = || {
        std::fs::write(path, format!("{} {}\n", usage.bytes, usage.inodes))?;
        std::fs::File::open(path)?.sync_all()
    };
    write().doing(|| format!("writing {}", path.display()))
}

/// What was written down; none if it was not, or not wholly.
pub(crate) fn recorded(path: &Path) -> Result<Option<Usage>> {
    let text = match std::fs::read_to_string(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        read => read.doing(|| format!("reading {}", path.display()))?,
    };
    let Some(line) = text.strip_suffix('\n') else { return Ok(None) };
    let numbers = line.split_once(' ').and_then(|(bytes, inodes)| Some((bytes.parse().ok()?, inodes.parse().ok()?)));
    let (bytes, inodes) = numbers.ok_or_else(|| {
        Error::new(ErrorKind::Corrupt, format!("{} says {text:?}", path.display()))
            .hint("write there what the layer takes, bytes and inodes, as: 4096 1")
    })?;
    Ok(Some(Usage { bytes, inodes }))
}

/// The state of a subvolume by which it can be told whether it has changed.
pub(crate) fn generation(file: BorrowedFd<'_>) -> Result<(u64, SubvolumeInfo)> {
    let info = subvolume::info(file)?;
    Ok((info.generation, info))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_down_is_read_and_half_a_line_is_as_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("7");
        assert_eq!(recorded(&path).unwrap(), None);
        record(&path, Usage { bytes: 123_456, inodes: 78 }).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "123456 78\n");
        assert_eq!(recorded(&path).unwrap(), Some(Usage { bytes: 123_456, inodes: 78 }));
        for half in ["", "123456 7"] {
            std::fs::write(&path, half).unwrap();
            assert_eq!(recorded(&path).unwrap(), None);
        }
        std::fs::write(&path, "many few\n").unwrap();
        assert_eq!(recorded(&path).unwrap_err().kind(), ErrorKind::Corrupt);
    }
}
