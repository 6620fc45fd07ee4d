//! The table of what is mounted: `/proc/PID/mountinfo` (proc(5)).

use crate::{Context, Error, ErrorKind, Result};
use std::{
    ffi::{OsStr, OsString},
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::PathBuf,
};

/// One mount, as proc(5) describes it under `/proc/pid/mountinfo`, with escapes undone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountInfo {
    /// Unique among what is mounted; used again after it is unmounted.
    pub id: u64,
    /// The mount it is on.
    pub parent: u64,
    /// Major and minor number of the superblock's device, `st_dev` of the files in it.
    pub dev: (u32, u32),
    /// What of the filesystem is its root.
    pub root: PathBuf,
    /// Where it is, seen from the process's root.
    pub mount_point: PathBuf,
    /// Filesystem type.
    pub fstype: OsString,
    /// What the filesystem was mounted from: a device, or any word.
    pub source: OsString,
    /// Options of the mount: `ro`, `nosuid`.
    pub options: OsString,
    /// Options of the superblock, as its filesystem shows them.
    pub super_options: OsString,
}

/// What this process sees mounted; of several at one mount point the last is on top.
pub fn table() -> Result<Vec<MountInfo>> {
    // Threads can have mount namespaces of their own, and `/proc/self` is the main thread.
    read("/proc/thread-self/mountinfo")
}

/// What the process `pid` sees mounted. `NotFound` if there is none, or none that the caller may see.
pub fn table_of(pid: u32) -> Result<Vec<MountInfo>> {
    read(&format!("/proc/{pid}/mountinfo"))
}

fn read(path: &str) -> Result<Vec<MountInfo>> {
    let text = std::fs::read(path).doing(|| format!("reading {path}"))?;
    let lines = text.split(|b| *b == b'\n').filter(|line| !line.is_empty());
    let bad = |line: &[u8]| Error::new(ErrorKind::Corrupt, format!("no mount: {:?}", OsStr::from_bytes(line)));
    lines.map(|line| parse(line).ok_or_else(|| bad(line).doing(format!("reading {path}")))).collect()
}

/// `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue`: between the mount's options and the
/// dash are any number of tags.
fn parse(line: &[u8]) -> Option<MountInfo> {
    let mut fields = line.split(|b| *b == b' ');
    let number = |field: &[u8]| str::from_utf8(field).ok()?.parse().ok();
    let id = number(fields.next()?)?;
    let parent = number(fields.next()?)?;
    let (major, minor) = str::from_utf8(fields.next()?).ok()?.split_once(':')?;
    let dev = (major.parse().ok()?, minor.parse().ok()?);
    let mut text = || fields.next().map(unescape);
    let (root, mount_point, options) = (text()?.into(), text()?.into(), text()?);
    fields.find(|field| *field == b"-")?;
    let mut text = || fields.next().map(unescape);
    Some(MountInfo {
        id,
        parent,
        dev,
        root,
        mount_point,
        options,
        fstype: text()?,
        source: text()?,
        super_options: text()?,
    })
}

/// Undoes `\040` and its like: the kernel writes space, tab, newline, `#` and backslash in octal.
fn unescape(field: &[u8]) -> OsString {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        match rest {
            [b'\\', a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', tail @ ..] => {
                plain.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                rest = tail;
            }
            _ => {
                plain.push(*first);
                rest = tail;
            }
        }
    }
    OsString::from_vec(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_manual_pages_example_and_escapes() {
        let line =
            br"36 35 98:0 /mnt1 /a\040b\134c\043d rw,noatime master:1 shared:7 - ext3 /dev/ro\011ot rw,errors=continue";
        let mount = parse(line).unwrap();
        assert_eq!((mount.id, mount.parent, mount.dev), (36, 35, (98, 0)));
        assert_eq!((mount.root, mount.mount_point), ("/mnt1".into(), r"/a b\c#d".into()));
        assert_eq!((mount.fstype, mount.source), ("ext3".into(), "/dev/ro\tot".into()));
        assert_eq!((mount.options, mount.super_options), ("rw,noatime".into(), "rw,errors=continue".into()));
    }

    #[test]
    fn no_tags_and_an_empty_source_are_fine_and_a_cut_line_is_not() {
        let mount = parse(b"36 35 98:0 / /mnt rw - tmpfs  rw").unwrap();
        assert_eq!((mount.source, mount.super_options), ("".into(), "rw".into()));
        assert_eq!(parse(b"36 35 98:0 / /mnt rw - tmpfs"), None);
        assert_eq!(parse(b"36 35 98:0 / /mnt rw"), None);
    }

    #[test]
    fn both_tables_have_proc_in_them() {
        for table in [table().unwrap(), table_of(std::process::id()).unwrap()] {
            let proc = table.iter().find(|m| m.mount_point == std::path::Path::new("/proc")).unwrap();
            assert_eq!(proc.fstype, "proc");
        }
        assert_eq!(table_of(u32::MAX >> 1).unwrap_err().kind(), ErrorKind::NotFound);
    }
}
