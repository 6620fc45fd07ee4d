//! Tars that are unpacked, and packed again to the same bytes.

mod copying;
mod deletions;
mod hostile;
mod random;
mod same_bytes;

use super::*;
use crate::{
    DiffId, Digest, Error, ErrorKind, EscapeXattrs, FileKind, Inode, OverlayXattrs, Root, Timestamp,
    root::{inode_at, names_in},
};
use rustix::{
    fd::AsFd,
    fs::{CWD, Mode},
    mount::{self, FsMountFlags, FsOpenFlags, MountAttrFlags},
};
use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs,
    os::unix::fs::{MetadataExt, symlink},
    path::PathBuf,
};
use tempfile::TempDir;

const OVERLAY: Whiteouts = Whiteouts::Overlay { xattrs: OverlayXattrs::Trusted, escape: EscapeXattrs::Own };

/// A directory with a root to unpack in, a sentinel beside it, and a place for the record.
struct Bench {
    dir: TempDir,
}

impl Bench {
    fn new() -> Bench {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("root")).unwrap();
        fs::write(dir.path().join("sentinel"), "untouched").unwrap();
        Bench { dir }
    }

    fn at(&self, path: &str) -> PathBuf {
        self.dir.path().join("root").join(path)
    }

    fn root(&self) -> Root {
        Root::open(&self.at("")).unwrap()
    }

    fn record(&self) -> PathBuf {
        self.dir.path().join("record")
    }

    fn unpack(&self, mut tar: &[u8], whiteouts: Whiteouts) -> Result<Unpacked> {
        let unpacked = unpack(&mut tar, &self.root(), whiteouts, Some(&self.record()));
        assert_eq!(fs::read(self.dir.path().join("sentinel")).unwrap(), b"untouched");
        let mut beside: Vec<_> = fs::read_dir(self.dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        beside.sort();
        assert_eq!(beside, ["record", "root", "sentinel"]);
        unpacked
    }

    fn repack(&self, tar: &[u8]) -> Result<Vec<u8>> {
        let mut out = Vec::new();
        repack(&self.record(), &self.root(), DiffId(Digest::of(tar)), &mut out).map(|()| out)
    }

    fn inode(&self, path: &str) -> Inode {
        self.root().inode(Path::new(path)).unwrap().unwrap_or_else(|| panic!("{path} is missing"))
    }
}

/// Unpacks and checks that the same bytes come back.
fn there_and_back(tar: &[u8], whiteouts: Whiteouts) -> Bench {
    let bench = Bench::new();
    let unpacked = bench.unpack(tar, whiteouts).unwrap();
    assert_eq!(unpacked.tar_bytes, tar.len() as u64);
    assert!(bench.repack(tar).unwrap() == tar, "the tar came back different");
    bench
}

/// Writes tars that no tool would.
#[derive(Default)]
struct Tar(Vec<u8>);

impl Tar {
    fn header(kind: u8, name: &[u8], link: &[u8], size: u64) -> tar::Header {
        let mut header = tar::Header::new_gnu();
        header.as_old_mut().name[..name.len()].copy_from_slice(name);
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link);
        header.as_old_mut().linkflag = [kind];
        header.set_mode(0o640);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_000_000_000);
        header.set_size(size);
        header.set_cksum();
        header
    }

    fn raw(mut self, header: &tar::Header, data: &[u8]) -> Tar {
        self.0.extend_from_slice(header.as_bytes());
        self.0.extend_from_slice(data);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    fn entry(self, kind: u8, name: &str, link: &str, data: &[u8]) -> Tar {
        let size = data.len() as u64;
        self.raw(&Tar::header(kind, name.as_bytes(), link.as_bytes(), size), data)
    }

    fn file(self, name: &str, data: &str) -> Tar {
        self.entry(b'0', name, "", data.as_bytes())
    }

    fn dir(self, name: &str) -> Tar {
        self.entry(b'5', name, "", b"")
    }

    fn symlink(self, name: &str, target: &str) -> Tar {
        self.entry(b'2', name, target, b"")
    }

    fn link(self, name: &str, target: &str) -> Tar {
        self.entry(b'1', name, target, b"")
    }

    fn pax(self, records: &[(&str, &[u8])]) -> Tar {
        let mut data = Vec::new();
        for (key, value) in records {
            let body = [b" ", key.as_bytes(), b"=", value, b"\n"].concat();
            let len = (1..).find(|l: &usize| body.len() + l.to_string().len() == *l).unwrap();
            data.extend_from_slice(&[len.to_string().as_bytes(), &body].concat());
        }
        self.entry(b'x', "pax", "", &data)
    }

    fn end(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 1024, 0);
        self.0
    }
}

/// Everything a walk sees, with hard links and content.
fn tree(root: &Root) -> BTreeMap<PathBuf, String> {
    fn walk(root: &Root, dir: &Path, links: &mut BTreeMap<u64, PathBuf>, all: &mut BTreeMap<PathBuf, String>) {
        let fd = root.open_dir(dir).unwrap();
        for name in names_in(fd.as_fd()).unwrap() {
            let path = dir.join(&name);
            let inode = inode_at(fd.as_fd(), &name).unwrap();
            let mut text = format!("{:?}", inode.meta);
            if inode.meta.kind == FileKind::Directory {
                walk(root, &path, links, all);
            } else {
                text += &format!(" = {:?}", links.entry(inode.ino).or_insert_with(|| path.clone()));
            }
            if let FileKind::File { .. } = inode.meta.kind {
                let content = std::io::read_to_string(root.open_file(&path).unwrap());
                text += &format!(" {}", Digest::of(content.unwrap_or_else(|_| "binary".into())));
            }
            all.insert(path, text);
        }
    }
    let mut all = BTreeMap::new();
    walk(root, Path::new(""), &mut BTreeMap::new(), &mut all);
    all
}

/// An overlay of `layers`, topmost first, that no mount table knows: it goes when the root is dropped.
fn overlay(layers: &[&Bench]) -> Root {
    let mut lowers: Vec<_> = layers.iter().map(|l| l.at("")).collect();
    // One lower layer alone is refused.
    lowers.push(layers[0].dir.path().join("empty"));
    fs::create_dir_all(&lowers[layers.len()]).unwrap();
    let fs = mount::fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).unwrap();
    for lower in &lowers {
        mount::fsconfig_set_string(fs.as_fd(), "lowerdir+", lower).unwrap();
    }
    mount::fsconfig_create(fs.as_fd()).unwrap();
    let fd = mount::fsmount(fs.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty()).unwrap();
    Root::from_fd(fd)
}
