//! Trees and tars of small files, as layers have them. What is random in them is the same each time.

use graphdriver_core::{
    FileKind, Metadata, Root, Timestamp,
    tar::{Content, Segment, TarWriter, Whiteouts, unpack},
};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};
use tempfile::TempDir;

/// Files of a layer, in directories of 50.
pub const FILES: u64 = 200;
/// Bytes of each.
pub const SIZE: u64 = 4096;

pub fn path(number: u64) -> PathBuf {
    PathBuf::from(format!("dir{}/file{number}", number / 50))
}

pub fn meta(kind: FileKind) -> Metadata {
    // Ours, so that no privilege is needed to unpack it.
    let (uid, gid) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    let mtime = Timestamp { secs: 1_700_000_000, nanos: 5 };
    Metadata { kind, mode: 0o644, uid, gid, mtime, xattrs: BTreeMap::new() }
}

/// Bytes that compress about as text does: half of them repeat.
pub fn content(number: u64) -> Vec<u8> {
    let mut state = number.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..SIZE).map(|at| if at / 32 % 2 == 0 { next() } else { b'a' + (at % 16) as u8 }).collect()
}

/// The layer as a tar.
pub fn layer_tar() -> Vec<u8> {
    let mut tar = TarWriter::new(Vec::new());
    for number in 0..FILES {
        append(&mut tar, &path(number), &content(number));
    }
    tar.finish().expect("memory takes what is written")
}

pub fn append(tar: &mut TarWriter<Vec<u8>>, path: &Path, data: &[u8]) {
    let size = data.len() as u64;
    let content = Content { size, segments: vec![Segment { offset: 0, len: size }], data: Box::new(data) };
    tar.append(path, &meta(FileKind::File { size }), Some(content)).expect("memory takes what is written");
}

/// An empty directory of its own.
pub fn scratch() -> TempDir {
    tempfile::Builder::new().prefix("graphdriver-micro").tempdir().expect("a temporary directory can be made")
}

pub fn root(dir: &Path) -> Root {
    Root::open(dir).expect("the directory is there")
}

/// The layer, unpacked into a directory.
pub fn tree() -> TempDir {
    let dir = scratch();
    unpack(&mut &layer_tar()[..], &root(dir.path()), Whiteouts::Merged, None).expect("our own tar can be unpacked");
    dir
}
