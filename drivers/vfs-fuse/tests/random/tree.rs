//! A tree as data, and what is the same about two of them.

use super::known;
use rustix::{
    fs::{self, AtFlags, Mode, OFlags, RawDir},
    io::Result,
};
use std::{
    collections::BTreeMap,
    ffi::{OsStr, OsString},
    fmt::Write,
    mem::MaybeUninit,
    os::{fd::AsFd, unix::ffi::OsStrExt},
    path::{Path, PathBuf},
};

/// What is compared of stat(2), and the inode number.
#[derive(Clone, Debug, PartialEq)]
pub struct Stat {
    pub ino: u64,
    pub mode: u32,
    pub nlink: u64,
    pub uid: u32,
    pub gid: u32,
    pub size: u64,
    pub rdev: u64,
    pub mtime: (i64, i64),
}

impl From<&fs::Stat> for Stat {
    #[allow(clippy::unnecessary_cast)] // The types differ between architectures.
    fn from(stat: &fs::Stat) -> Stat {
        Stat {
            ino: stat.st_ino,
            mode: stat.st_mode,
            nlink: stat.st_nlink as u64,
            uid: stat.st_uid,
            gid: stat.st_gid,
            size: stat.st_size as u64,
            rdev: stat.st_rdev,
            mtime: (stat.st_mtime as i64, stat.st_mtime_nsec as i64),
        }
    }
}

impl Stat {
    pub fn is_dir(&self) -> bool {
        self.mode & 0o170000 == 0o040000
    }
}

/// A name as a directory lists it.
#[derive(Clone, Debug)]
pub struct Listed {
    pub name: OsString,
    pub ino: u64,
    pub kind: fs::FileType,
}

/// The names in a directory but `.` and `..`.
pub fn list(root: impl AsFd, path: &Path) -> Result<Vec<Listed>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let dir = fs::openat(root, path, flags, Mode::empty())?;
    let mut buffer = [MaybeUninit::uninit(); 2048];
    let mut entries = RawDir::new(&dir, &mut buffer);
    let mut listed = Vec::new();
    while let Some(entry) = entries.next() {
        let entry = entry?;
        let name = OsStr::from_bytes(entry.file_name().to_bytes()).to_owned();
        listed.push(Listed { name, ino: entry.ino(), kind: entry.file_type() });
    }
    listed.retain(|entry| entry.name != "." && entry.name != "..");
    Ok(listed)
}

pub fn xattr_names(path: &Path) -> Result<Vec<OsString>> {
    let mut names = vec![0u8; 8192];
    let len = fs::llistxattr(path, &mut names[..])?;
    let names = names[..len].split(|byte| *byte == 0).filter(|name| !name.is_empty());
    Ok(names.map(|name| OsStr::from_bytes(name).to_owned()).collect())
}

fn xattrs(path: &Path) -> Result<BTreeMap<OsString, Vec<u8>>> {
    let value = |name: OsString| {
        let mut value = vec![0u8; 4096];
        let len = fs::lgetxattr(path, &name, &mut value[..])?;
        value.truncate(len);
        Ok((name, value))
    };
    xattr_names(path)?.into_iter().map(value).collect()
}

/// One name of a tree.
#[derive(Clone, Debug)]
pub struct Entry {
    pub stat: Stat,
    /// The first name of the same file.
    pub same_as: PathBuf,
    /// Of a regular file, or the target of a symlink.
    pub content: Vec<u8>,
    pub xattrs: BTreeMap<OsString, Vec<u8>>,
}

pub type Tree = BTreeMap<PathBuf, Entry>;

/// Reads a whole tree. An error or a contradiction within it is told in words.
pub fn read(root: &Path) -> std::result::Result<Tree, String> {
    read_with(root, true)
}

/// The same without a look at the inode numbers that directories list, see `known`.
pub fn read_without_listed_inodes(root: &Path) -> std::result::Result<Tree, String> {
    read_with(root, false)
}

fn read_with(root: &Path, listed_inodes: bool) -> std::result::Result<Tree, String> {
    let mut reader = Reader { root, listed_inodes, tree: Tree::new(), first: BTreeMap::new() };
    reader.entry(PathBuf::from("."))?;
    Ok(reader.tree)
}

struct Reader<'r> {
    root: &'r Path,
    listed_inodes: bool,
    tree: Tree,
    /// The first name of each inode.
    first: BTreeMap<u64, PathBuf>,
}

impl Reader<'_> {
    fn entry(&mut self, path: PathBuf) -> std::result::Result<(), String> {
        let full = self.root.join(&path);
        let told = |what: &str| {
            let text = format!("{what} of {}", path.display());
            move |e: rustix::io::Errno| format!("{text}: {e}")
        };
        let stat = Stat::from(&fs::lstat(&full).map_err(told("lstat"))?);
        let content = match stat.mode & 0o170000 {
            0o100000 => std::fs::read(&full).map_err(|e| format!("reading {}: {e}", path.display()))?,
            0o120000 => fs::readlink(&full, Vec::new()).map_err(told("readlink"))?.into_bytes(),
            _ => Vec::new(),
        };
        if stat.mode & 0o170000 == 0o100000 && content.len() as u64 != stat.size {
            return Err(format!("{}: size {} but {} bytes read", path.display(), stat.size, content.len()));
        }
        let xattrs = xattrs(&full).map_err(told("xattrs"))?;
        let same_as = self.first.entry(stat.ino).or_insert_with(|| path.clone()).clone();
        let is_dir = stat.is_dir();
        if is_dir && same_as != path {
            return Err(format!("{} has the inode number of {}: {}", path.display(), same_as.display(), stat.ino));
        }
        self.tree.insert(path.clone(), Entry { stat, same_as, content, xattrs });
        if is_dir {
            let mut names = list(fs::CWD, &full).map_err(told("readdir"))?;
            names.sort_by(|a, b| a.name.cmp(&b.name));
            for pair in names.windows(2) {
                if pair[0].name == pair[1].name {
                    return Err(format!("{} lists {} twice", path.display(), pair[0].name.display()));
                }
            }
            names.into_iter().try_for_each(|listed| self.listed(&path, listed))?;
        }
        Ok(())
    }

    fn listed(&mut self, dir: &Path, listed: Listed) -> std::result::Result<(), String> {
        let path = dir.join(&listed.name);
        self.entry(path.clone())?;
        let stat = &self.tree[&path].stat;
        let kind = fs::FileType::from_raw_mode(stat.mode);
        if listed.kind != kind {
            return Err(format!("{} is listed as {:?} but is {kind:?}", path.display(), listed.kind));
        }
        if self.listed_inodes && listed.ino != stat.ino && !super::known::is_renewed(listed.ino) {
            return Err(format!("{} has d_ino {} but st_ino {}", path.display(), listed.ino, stat.ino));
        }
        Ok(())
    }
}

/// How alike two trees must be.
#[derive(Clone, Copy, PartialEq)]
pub enum Alike {
    /// Made by the same operations one after the other: times since `since` are only known to be about the same.
    Twins { since: (i64, i64) },
    /// The same files shown by somebody else: inode numbers may differ, and link counts (but not which names are one
    /// file), see `known`.
    Views,
    /// The same files shown again; `counted`: a file that loses a name is copied up, for the count's sake.
    Same { counted: bool },
}

/// Lists the differences between what is wanted and what was found.
pub fn compare(wanted: &Tree, found: &Tree, alike: Alike, loose: &known::Loose) -> std::result::Result<(), String> {
    let mut said = String::new();
    for path in wanted.keys().filter(|path| !found.contains_key(*path)) {
        let _ = writeln!(said, "{} is missing", path.display());
    }
    for path in found.keys().filter(|path| !wanted.contains_key(*path)) {
        let _ = writeln!(said, "{} should not be there", path.display());
    }
    let mut names = BTreeMap::<u64, usize>::new();
    found.values().for_each(|entry| *names.entry(entry.stat.ino).or_default() += 1);
    for (path, wanted) in wanted {
        if let Some(found) = found.get(path) {
            let loose = loose.contains(&wanted.stat.ino)
                || alike == Alike::Views
                || matches!(alike, Alike::Same { counted }
                    if known::counts_anew(counted, &wanted.stat, &found.stat, names[&found.stat.ino]));
            differences(wanted, found, alike, loose, |what| {
                let _ = writeln!(said, "{}: {what}", path.display());
            });
        }
    }
    if said.is_empty() { Ok(()) } else { Err(said) }
}

fn differences(wanted: &Entry, found: &Entry, alike: Alike, loose: bool, mut say: impl FnMut(String)) {
    let since = match alike {
        Alike::Twins { since } => since,
        _ => (i64::MAX, 0),
    };
    if let Some(what) = stat_difference(&wanted.stat, &found.stat, since, loose) {
        say(what);
    }
    if matches!(alike, Alike::Same { .. }) && wanted.stat.ino != found.stat.ino {
        say(format!("inode number {}, now {}", wanted.stat.ino, found.stat.ino));
    }
    if wanted.same_as != found.same_as {
        say(format!("the same file as {}, not as {}", found.same_as.display(), wanted.same_as.display()));
    }
    if wanted.xattrs != found.xattrs {
        say(format!("xattrs {:02x?}, not {:02x?}", found.xattrs, wanted.xattrs));
    }
    if let Some(what) = content_difference(&wanted.content, &found.content) {
        say(what);
    }
}

/// What of two stats differs that should not.
pub fn stat_difference(wanted: &Stat, found: &Stat, since: (i64, i64), loose: bool) -> Option<String> {
    let mut expected = wanted.clone();
    expected.ino = found.ino;
    if wanted.is_dir() && found.is_dir() {
        // Sizes and link counts of directories are the filesystem's own affair: see `known`.
        (expected.size, expected.nlink) = (found.size, found.nlink);
    }
    if loose {
        expected.nlink = found.nlink;
    }
    if wanted.mtime >= since && found.mtime >= since {
        expected.mtime = found.mtime;
    }
    let octal = |stat: &Stat| format!("mode {:o} {stat:?}", stat.mode);
    (expected != *found).then(|| format!("found {}, not {}", octal(found), octal(wanted)))
}

/// Where two contents begin to differ.
pub fn content_difference(wanted: &[u8], found: &[u8]) -> Option<String> {
    let lengths = || format!("{} bytes, not {}", found.len(), wanted.len());
    match wanted.iter().zip(found).position(|(w, f)| w != f) {
        Some(at) => {
            let last = wanted.iter().zip(found).rposition(|(w, f)| w != f).unwrap_or(at);
            Some(format!("content differs from {at} to {last}: {}, not {}; {}", found[at], wanted[at], lengths()))
        }
        None => (wanted.len() != found.len()).then(lengths),
    }
}

/// lstat(2).
pub fn stat(root: impl AsFd, path: &Path) -> Result<Stat> {
    fs::statat(root, path, AtFlags::SYMLINK_NOFOLLOW).map(|stat| Stat::from(&stat))
}
