//! Between the union's types and fuser's.

use crate::union::{Attr, Entry};
use fuser::{Errno, FileAttr, FileType, INodeNo, TimeOrNow};
use rustix::io::Errno as UnionErrno;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The same error.
pub fn errno(e: UnionErrno) -> Errno {
    Errno::from_i32(e.raw_os_error())
}

/// Attributes for the kernel, which knows the node by `id`.
pub fn file_attr(attr: &Attr, id: u64) -> FileAttr {
    FileAttr {
        ino: INodeNo(id),
        size: attr.size,
        blocks: attr.blocks,
        atime: system_time(attr.atime),
        mtime: system_time(attr.mtime),
        ctime: system_time(attr.ctime),
        crtime: UNIX_EPOCH,
        kind: file_type(attr.mode),
        perm: (attr.mode & 0o7777) as u16,
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        // The kernel's encoding of device numbers is the lower half of makedev(3)'s.
        rdev: attr.rdev as u32,
        blksize: attr.blksize,
        flags: 0,
    }
}

/// An entry's attributes as a lookup must show them: fuser takes the node id from the inode number.
pub fn entry_attr(entry: &Entry) -> FileAttr {
    file_attr(&entry.attr, entry.id)
}

/// What stands for a name that does not exist, so that the kernel remembers it: node id 0.
pub fn negative() -> FileAttr {
    let zero = Attr {
        ino: 0,
        size: 0,
        blocks: 0,
        atime: (0, 0),
        mtime: (0, 0),
        ctime: (0, 0),
        mode: libc::S_IFREG,
        nlink: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 0,
    };
    file_attr(&zero, 0)
}

/// What readdirplus says of `.` and `..`: the kernel takes the number and the type, and no reference.
pub fn dot(ino: u64, kind: FileType) -> FileAttr {
    FileAttr { ino: INodeNo(ino), kind, ..negative() }
}

fn file_type(mode: u32) -> FileType {
    match mode & libc::S_IFMT {
        libc::S_IFDIR => FileType::Directory,
        libc::S_IFLNK => FileType::Symlink,
        libc::S_IFCHR => FileType::CharDevice,
        libc::S_IFBLK => FileType::BlockDevice,
        libc::S_IFIFO => FileType::NamedPipe,
        libc::S_IFSOCK => FileType::Socket,
        _ => FileType::RegularFile,
    }
}

/// A `DT_*` is the type's bits of `st_mode`, shifted.
pub fn dirent_type(kind: u8) -> FileType {
    file_type(u32::from(kind) << 12)
}

fn system_time((seconds, nanoseconds): (i64, u32)) -> SystemTime {
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let whole = if seconds < 0 { UNIX_EPOCH.checked_sub(whole) } else { UNIX_EPOCH.checked_add(whole) };
    whole.and_then(|t| t.checked_add(Duration::from_nanos(nanoseconds.into()))).unwrap_or(UNIX_EPOCH)
}

/// A time to be set; `None`: now.
pub fn time_to_set(time: TimeOrNow) -> Option<(i64, u32)> {
    let TimeOrNow::SpecificTime(time) = time else { return None };
    Some(match time.duration_since(UNIX_EPOCH) {
        Ok(after) => (after.as_secs() as i64, after.subsec_nanos()),
        // fuser 0.18 reads -1.2 s, which the kernel sends as (-2, 0.8), as -2.8 s: seconds and nanoseconds are both
        // taken away. This undoes it.
        Err(before) => (-(before.duration().as_secs() as i64), before.duration().subsec_nanos()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_survive() {
        let attr = |time| Attr { atime: time, ..attr_of_file() };
        for (time, nanoseconds) in [((5, 7), 5_000_000_007), ((0, 0), 0), ((-2, 800_000_000), -1_200_000_000i128)] {
            let shown = file_attr(&attr(time), 1).atime;
            let since = match shown.duration_since(UNIX_EPOCH) {
                Ok(after) => after.as_nanos() as i128,
                Err(before) => -(before.duration().as_nanos() as i128),
            };
            assert_eq!(since, nanoseconds);
        }
        // As fuser's system_time_from_time(-2, 800_000_000) makes it.
        let from_fuser = UNIX_EPOCH - Duration::new(2, 800_000_000);
        assert_eq!(time_to_set(TimeOrNow::SpecificTime(from_fuser)), Some((-2, 800_000_000)));
        assert_eq!(time_to_set(TimeOrNow::SpecificTime(UNIX_EPOCH + Duration::new(3, 4))), Some((3, 4)));
        assert_eq!(time_to_set(TimeOrNow::Now), None);
    }

    fn attr_of_file() -> Attr {
        Attr {
            ino: 9,
            size: 1,
            blocks: 8,
            atime: (0, 0),
            mtime: (0, 0),
            ctime: (0, 0),
            mode: libc::S_IFCHR | 0o6755,
            nlink: 2,
            uid: 3,
            gid: 4,
            rdev: libc::makedev(259, 300),
            blksize: 4096,
        }
    }

    #[test]
    fn types_and_device_numbers_as_the_kernel_has_them() {
        let shown = file_attr(&attr_of_file(), 12);
        assert_eq!((shown.ino, shown.kind, shown.perm), (INodeNo(12), FileType::CharDevice, 0o6755));
        // new_encode_dev of linux/kdev_t.h.
        assert_eq!(shown.rdev, (300 & 0xff) | (259 << 8) | ((300 & !0xff) << 12));
        assert_eq!(dirent_type(libc::DT_LNK), FileType::Symlink);
        assert_eq!(dirent_type(libc::DT_DIR), FileType::Directory);
    }
}
