//! From a layer tar to a [`Sink`], and the whiteouts in its names.

use super::{
    Sink, Whiteouts,
    fs_sink::FsSink,
    header::corrupt,
    reader::{Entry, EntryKind, TarReader},
    record::Recorder,
};
use crate::{Context, FileKind, Result, Root};
use std::{
    cell::RefCell,
    ffi::OsStr,
    io::Read,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

/// What a tar held.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Unpacked {
    /// Entries, whiteouts included.
    pub entries: u64,
    /// Bytes of file content that were stored; holes do not count.
    pub content_bytes: u64,
    /// Size of the tar, up to the end of the input.
    pub tar_bytes: u64,
    /// Directories the tar puts something into and does not describe, the root among them. For [`inherit`]; empty in a
    /// merged tree.
    pub implied: Vec<PathBuf>,
}

/// Unpacks the layer tar `tar` beneath `root`, reading it to its end, and makes the directory `record`, if given, from
/// which [`repack`](super::repack) restores it. The record is durable afterwards; the files are the caller's to sync.
///
/// Nothing outside `root` and `record` is ever touched, whatever the tar holds. On an error what was unpacked so far
/// stays, for the caller to remove.
pub fn unpack(tar: &mut dyn Read, root: &Root, whiteouts: Whiteouts, record: Option<&Path>) -> Result<Unpacked> {
    let Some(record) = record else {
        let mut sink = FsSink::new(root, whiteouts, None);
        let unpacked = feed(TarReader::new(tar), &mut sink)?;
        return Ok(Unpacked { implied: sink.implied(), ..unpacked });
    };
    let recorder = RefCell::new(Recorder::create(record)?);
    let mut tap = |bytes: &[u8]| recorder.borrow_mut().bytes(bytes);
    let mut sink = FsSink::new(root, whiteouts, Some(&recorder));
    let unpacked = feed(TarReader::with_tap(tar, &mut tap), &mut sink)?;
    let implied = sink.implied();
    recorder.into_inner().finish(unpacked.tar_bytes)?;
    Ok(Unpacked { implied, ..unpacked })
}

/// Gives the directories that a layer unpacked by itself did not describe what `lower`, the tree of its parents, has
/// there: mode, owner, attributes and time. Otherwise a file put into `/secret` would open `/secret` to everybody.
pub fn inherit(root: &Root, whiteouts: Whiteouts, lower: &Root, implied: &[PathBuf]) -> Result<()> {
    let mut sink = FsSink::new(root, whiteouts, None);
    for path in implied {
        match lower.inode(path)? {
            Some(inode) if inode.meta.kind == FileKind::Directory => sink
                .node(path, &inode.meta, None)
                .doing(|| format!("giving {path:?} what the layers below say of it"))?,
            _ => {}
        }
    }
    sink.finish()
}

/// Unpacks a tar that is no layer beneath `root`, as `cp` needs it: no name means a deletion, and files that are there
/// already are replaced, each whole or not at all, but never a directory by a file or a file by a directory. Without `follow` an entry below a symlink is `Corrupt`. `adjust` may change what each entry says of itself.
pub fn extract(tar: &mut dyn Read, root: &Root, follow: bool, adjust: &mut dyn FnMut(&mut Entry)) -> Result<Unpacked> {
    let mut tar = TarReader::new(tar);
    let mut sink = FsSink::copying(root, follow);
    let mut unpacked = Unpacked::default();
    while let Some(mut entry) = tar.next_entry()? {
        adjust(&mut entry);
        unpacked.entries += 1;
        unpacked.content_bytes += entry.segments.iter().map(|s| s.len).sum::<u64>();
        let put = match &entry.kind {
            EntryKind::HardLink(target) => sink.hard_link(&entry.path, target),
            EntryKind::Node(meta) => sink.node(&entry.path, meta, tar.content_of(&entry)),
        };
        put.doing(|| super::header::entry_label(entry.path.as_os_str().as_bytes()))?;
    }
    sink.finish()?;
    unpacked.tar_bytes = tar.consumed();
    Ok(unpacked)
}

/// Tells `sink` what the layer tar `tar` says, reading it to its end.
pub fn apply(tar: &mut dyn Read, sink: &mut dyn Sink) -> Result<Unpacked> {
    feed(TarReader::new(tar), sink)
}

fn feed(mut tar: TarReader<'_>, sink: &mut dyn Sink) -> Result<Unpacked> {
    let mut unpacked = Unpacked::default();
    while let Some(entry) = tar.next_entry()? {
        unpacked.entries += 1;
        let mut put = || match (marker(&entry.path)?, &entry.kind) {
            (Marker::Skip, _) => Ok(()),
            (Marker::Whiteout(path), _) => sink.whiteout(&path),
            (Marker::Opaque(dir), _) => sink.opaque(&dir),
            (Marker::None, EntryKind::HardLink(target)) => sink.hard_link(&entry.path, target),
            (Marker::None, EntryKind::Node(meta)) => {
                unpacked.content_bytes += entry.segments.iter().map(|s| s.len).sum::<u64>();
                sink.node(&entry.path, meta, tar.content_of(&entry))
            }
        };
        put().doing(|| super::header::entry_label(entry.path.as_os_str().as_bytes()))?;
    }
    sink.finish()?;
    unpacked.tar_bytes = tar.consumed();
    Ok(unpacked)
}

#[derive(Debug, PartialEq, Eq)]
enum Marker {
    None,
    Whiteout(PathBuf),
    Opaque(PathBuf),
    /// What aufs kept for itself, as Docker skips it.
    Skip,
}

/// What a name says about the layers below (OCI image specification, "Whiteouts").
fn marker(path: &Path) -> Result<Marker> {
    let prefix = b".wh.";
    let mut components = path.iter().map(OsStr::as_bytes).peekable();
    while let Some(name) = components.next() {
        let Some(hidden) = name.strip_prefix(prefix) else { continue };
        let last = components.peek().is_none();
        // Docker skips `.wh..wh.plnk/…` as a whole too.
        if hidden.starts_with(prefix) && (!last || hidden != b".wh..opq") {
            return Ok(Marker::Skip);
        }
        if !last {
            return Err(corrupt("it lies in a deletion marker"));
        }
        let dir = path.parent().unwrap_or(Path::new(""));
        return match hidden {
            b".wh..opq" => Ok(Marker::Opaque(dir.to_owned())),
            b"" | b"." | b".." => Err(corrupt("it is a deletion marker without a name")),
            _ => Ok(Marker::Whiteout(dir.join(OsStr::from_bytes(hidden)))),
        };
    }
    Ok(Marker::None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    #[test]
    fn names_tell_whiteouts() {
        for (path, expected) in [
            ("a/b", Marker::None),
            ("a/x.wh.b", Marker::None),
            ("a/.wh.b", Marker::Whiteout("a/b".into())),
            (".wh.b", Marker::Whiteout("b".into())),
            (".wh.b.wh.c", Marker::Whiteout("b.wh.c".into())),
            (".wh..b", Marker::Whiteout(".b".into())),
            ("a/.wh..wh..opq", Marker::Opaque("a".into())),
            (".wh..wh..opq", Marker::Opaque("".into())),
            (".wh..wh.aufs", Marker::Skip),
            (".wh..wh.plnk/1.2", Marker::Skip),
            (".wh..wh..opq/x", Marker::Skip),
        ] {
            assert_eq!(marker(Path::new(path)).unwrap(), expected, "{path}");
        }
        for bad in [".wh.", "a/.wh..", "a/.wh...", ".wh.d/x"] {
            assert_eq!(marker(Path::new(bad)).unwrap_err().kind(), ErrorKind::Corrupt, "{bad}");
        }
    }
}
