//! The layers a union starts with.

use super::op::{self, Bytes, Node, Perm};
use proptest::{collection::vec, prelude::*};
use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, Timespec, Timestamps, Uid};
use std::{
    fs,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

/// One thing in a layer. What cannot be, because of something else in the layer, is left out.
#[derive(Clone, Debug)]
pub enum Piece {
    Dir { path: PathBuf, mode: Perm, owner: u32, opaque: bool },
    File { path: PathBuf, at: u64, bytes: Bytes, size: u64, mode: Perm, owner: u32 },
    Symlink { path: PathBuf, target: PathBuf },
    Link { from: PathBuf, to: PathBuf },
    Whiteout { path: PathBuf },
    Node { path: PathBuf, node: Node },
    Xattr { path: PathBuf, name: &'static str },
}

/// The lower layers, topmost first.
pub type Stack = Vec<Vec<Piece>>;

pub fn stacks() -> impl Strategy<Value = Stack> {
    vec(vec(piece(), 0..10), 1..4).prop_map(|mut stack| {
        stack.push(bottom());
        stack
    })
}

fn piece() -> impl Strategy<Value = Piece> {
    let node = prop_oneof![Just(Node::Fifo), Just(Node::Char(3))];
    let data = (prop_oneof![3 => 0..9000usize, 1 => 60_000..200_000usize], any::<u8>());
    let file = (op::path(), 0..100_000u64, data, 0..300_000u64, op::mode(), op::id());
    prop_oneof![
        5 => (op::path(), op::mode(), op::id(), prop::bool::weighted(0.3))
            .prop_map(|(path, mode, owner, opaque)| Piece::Dir { path, mode, owner, opaque }),
        5 => file.prop_map(|(path, at, (len, seed), size, mode, owner)| {
            Piece::File { path, at, bytes: Bytes { len, seed }, size, mode, owner }
        }),
        1 => (op::path(), op::target()).prop_map(|(path, target)| Piece::Symlink { path, target }),
        3 => (op::path(), op::path()).prop_map(|(from, to)| Piece::Link { from, to }),
        4 => op::path().prop_map(|path| Piece::Whiteout { path }),
        1 => (op::path(), node).prop_map(|(path, node)| Piece::Node { path, node }),
        1 => op::path().prop_map(|path| Piece::Xattr { path, name: "user.lower" }),
    ]
}

/// What is always there: from an empty tree random operations would mostly fail.
pub fn bottom() -> Vec<Piece> {
    let mut pieces = Vec::new();
    let dirs = [("a", 0o755, 0), ("a/b", 0o1777, 0), ("a/b/c", 0o755, 1000), ("b", 0o775, 1000), ("b/a", 0o2775, 1000)];
    for (path, mode, owner) in dirs.into_iter().chain([("c", 0o755, 0), ("many", 0o755, 0)]) {
        pieces.push(Piece::Dir { path: path.into(), mode: Perm(mode), owner, opaque: false });
    }
    let mut file = |path: &str, at, len, size, owner| {
        let bytes = Bytes { len, seed: pieces.len() as u8 };
        pieces.push(Piece::File { path: path.into(), at, bytes, size, mode: Perm(0o644), owner });
    };
    for path in ["a/a", "a/b/a", "a/b/b", "a/b/c/a", "b/b", "c/a", "c/b"] {
        file(path, 0, 10_000, 10_000, 0);
    }
    file("b/a/a", 0, 5000, 5000, 1000);
    file("a/big", 0, 300_000, 300_000, 0);
    // With a hole before, between and after.
    file("b/big", 20_000, 100_000, 250_001, 1000);
    file("a/b/linked", 0, 70_000, 70_000, 1000);
    (0..40).for_each(|n| file(&format!("many/n{n:02}"), 0, n, n as u64, 0));
    pieces.extend(["b/linked", "a/b/c/b"].map(|to| Piece::Link { from: "a/b/linked".into(), to: to.into() }));
    pieces.push(Piece::Link { from: "a/a".into(), to: "c/c".into() });
    pieces.push(Piece::Symlink { path: "a/d".into(), target: "b/c".into() });
    pieces.push(Piece::Node { path: "a/c".into(), node: Node::Fifo });
    pieces.push(Piece::Xattr { path: "a/big".into(), name: "user.lower" });
    pieces
}

/// Makes a layer. All its times are set to a day long ago.
pub fn build(layer: &Path, pieces: &[Piece]) {
    for piece in pieces {
        // A piece below a whiteout or a file cannot be; which ones can depends on the others.
        let _ = put(layer, piece);
    }
    age(layer, &mut 1);
}

fn put(layer: &Path, piece: &Piece) -> std::io::Result<()> {
    let within = |path: &Path| -> std::io::Result<PathBuf> {
        let path = layer.join(path);
        // Never through a symlink, which means another place in a layer than in the union.
        let mut parent = layer.to_owned();
        for name in path.parent().unwrap().strip_prefix(layer).unwrap() {
            parent.push(name);
            match fs::symlink_metadata(&parent) {
                Ok(found) if found.is_dir() => {}
                Ok(_) => return Err(std::io::ErrorKind::NotADirectory.into()),
                Err(_) => fs::create_dir(&parent)?,
            }
        }
        Ok(path)
    };
    let own = |path: &Path, owner: u32, mode: Perm| -> std::io::Result<()> {
        let (uid, gid) = (Uid::from_raw(owner), Gid::from_raw(owner));
        rustix::fs::chownat(CWD, path, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
        Ok(rustix::fs::chmod(path, Mode::from_raw_mode(mode.0))?)
    };
    match piece {
        Piece::Dir { path, mode, owner, opaque } => {
            let path = within(path)?;
            fs::create_dir(&path)?;
            own(&path, *owner, *mode)?;
            if *opaque {
                xattr::set(&path, "trusted.overlay.opaque", b"y")?;
            }
        }
        Piece::File { path, at, bytes, size, mode, owner } => {
            let path = within(path)?;
            let file = fs::File::create_new(&path)?;
            file.write_all_at(&bytes.make(), *at)?;
            file.set_len((*size).max(*at))?;
            own(&path, *owner, *mode)?;
        }
        Piece::Symlink { path, target } => std::os::unix::fs::symlink(target, within(path)?)?,
        Piece::Link { from, to } => fs::hard_link(within(from)?, within(to)?)?,
        Piece::Whiteout { path } => {
            rustix::fs::mknodat(CWD, within(path)?, FileType::CharacterDevice, Mode::empty(), 0)?;
        }
        Piece::Node { path, node } => make_node(rustix::fs::CWD, &within(path)?, *node, Perm(0o640))?,
        Piece::Xattr { path, name } => {
            let path = within(path)?;
            // On a whiteout it would be lost.
            if fs::symlink_metadata(&path)?.is_file() {
                xattr::set(&path, name, b"from the layer")?;
            }
        }
    }
    Ok(())
}

/// mknod(2).
pub fn make_node(dir: impl std::os::fd::AsFd, path: &Path, node: Node, mode: Perm) -> rustix::io::Result<()> {
    let (kind, dev) = match node {
        Node::Fifo => (FileType::Fifo, 0),
        Node::Socket => (FileType::Socket, 0),
        Node::Char(minor) => (FileType::CharacterDevice, rustix::fs::makedev(1, minor)),
    };
    rustix::fs::mknodat(dir, path, kind, Mode::from_raw_mode(mode.0), dev)
}

/// Sets the times of all in it to days long ago.
pub fn age(path: &Path, nth: &mut i64) {
    if fs::symlink_metadata(path).unwrap().is_dir() {
        let mut names: Vec<_> = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).collect();
        names.sort();
        names.iter().for_each(|path| age(path, nth));
    }
    *nth += 1;
    let time = Timespec { tv_sec: 1_100_000_000 + *nth, tv_nsec: 123_456_789 };
    let times = Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}
