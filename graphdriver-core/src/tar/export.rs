//! From a list of changes to a layer tar.

use super::{
    Content, LinkKey, Links, Segment, Source,
    writer::{TarWriter, WHITEOUT, WORTHWHILE_HOLES},
};
use crate::{
    Change, ChangeKind, Context, Error, ErrorKind, FileKind, Metadata, Narrow, Result, Root,
    root::{Inode, stat_at, xattrs_at},
    walk::changes,
};
use rustix::{
    fs::{self, FileType, Mode, OFlags, SeekFrom},
    io::Errno,
};
use std::{
    collections::{BTreeSet, HashMap, HashSet, hash_map::RandomState},
    ffi::OsStr,
    fs::File,
    hash::BuildHasher,
    io::{self, Read, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
    vec,
};

/// The layer tar of what `upper` changed in `lower`: walked and written in one pass, without whole files or lists of
/// changes in memory. If there is any change, or no `lower`, the root directory is an entry too.
///
/// An inode that is in the tar is there under all its names, so that hard links hold.
///
/// `upper` may be in use: what vanishes meanwhile is left out. Fails with `InvalidInput` for a changed name that begins
/// with `.wh.`, which a layer tar cannot say.
pub fn diff_tar<W: Write>(lower: Option<&Root>, upper: &Root, narrow: Option<&mut dyn Narrow>, out: W) -> Result<W> {
    let mut source = RootSource::new(upper);
    let mut exporter = Exporter::new(&mut source, out);
    let root = Change { path: PathBuf::new(), kind: ChangeKind::Modified };
    let mut rooted = lower.is_none();
    if rooted {
        exporter.change(&root)?;
    }
    changes(lower, upper, narrow, &mut |change| {
        // What is unpacked into the root changes its time, which this entry puts right.
        if !rooted && change != root {
            exporter.change(&root)?;
        }
        rooted = true;
        exporter.change(&change)
    })?;
    if lower.is_some() {
        link_the_rest(&mut exporter, upper)?;
    }
    exporter.finish()
}

/// Adds the names of exported inodes that are no changes themselves: moving a directory changes neither the files in it nor
/// their names elsewhere. This takes a look at every name in the tree, but only if some inode has more names than the
/// tar. The directories these names are in become entries too, so that a layer unpacked by itself has what they are.
fn link_the_rest<W: Write>(exporter: &mut Exporter<'_, W>, upper: &Root) -> Result<()> {
    if exporter.links.values().all(|names| names.complete) {
        return Ok(());
    }
    let mut tree = RootSource::new(upper);
    changes(None, upper, None, &mut |change| {
        let missing = match tree.links(&change.path) {
            Err(e) if e.kind() == ErrorKind::NotFound => false,
            links => links?.is_some_and(|links| exporter.lacks(links.key, &change.path)),
        };
        if !missing {
            return Ok(());
        }
        let above: Vec<&Path> = change.path.ancestors().skip(1).filter(|dir| !exporter.describes(dir)).collect();
        for dir in above.into_iter().rev() {
            exporter.change(&Change { path: dir.to_owned(), kind: ChangeKind::Modified })?;
        }
        exporter.change(&change)
    })
}

/// The whole tree as a plain tar, its root directory included, as `docker export` gives it. No name means a deletion
/// in it.
pub fn tree_tar<W: Write>(root: &Root, out: W) -> Result<W> {
    let mut source = RootSource::new(root);
    let mut exporter = Exporter::plain(&mut source, out);
    exporter.change(&Change { path: PathBuf::new(), kind: ChangeKind::Added })?;
    changes(None, root, None, &mut |change| exporter.change(&change))?;
    exporter.finish()
}

/// The names of one inode that are entries.
struct Names {
    first: PathBuf,
    /// Empty again once they are complete, which is nearly always soon.
    others: BTreeSet<PathBuf>,
    complete: bool,
}

impl Names {
    fn new(first: &Path) -> Self {
        Names { first: first.to_owned(), others: BTreeSet::new(), complete: false }
    }

    fn add(&mut self, path: &Path, count: u32) {
        if self.complete {
            return;
        }
        self.others.insert(path.to_owned());
        if 1 + self.others.len() >= count as usize {
            self.complete = true;
            self.others.clear();
        }
    }
}

/// Writes a layer tar, one change after the other, in the order described at [`Change`].
pub struct Exporter<'s, W> {
    source: &'s mut dyn Source,
    out: TarWriter<W>,
    /// The inodes that have several names.
    links: HashMap<LinkKey, Names>,
    /// Hashes of the directories that are entries. Two with the same would cost one of them an entry that unpackers can do
    /// without.
    directories: HashSet<u64>,
    hasher: RandomState,
    /// Whether names that begin with `.wh.` are names like others.
    plain: bool,
}

impl<'s, W: Write> Exporter<'s, W> {
    /// Takes what is added or modified from `source`.
    pub fn new(source: &'s mut dyn Source, out: W) -> Self {
        Exporter {
            source,
            out: TarWriter::new(out),
            links: HashMap::new(),
            directories: HashSet::new(),
            hasher: RandomState::new(),
            plain: false,
        }
    }

    /// For a tar that is no layer: a name that begins with `.wh.` is a name like others.
    pub fn plain(source: &'s mut dyn Source, out: W) -> Self {
        Exporter { plain: true, ..Exporter::new(source, out) }
    }

    /// Writes one change. What the source no longer has is left out.
    pub fn change(&mut self, change: &Change) -> Result<()> {
        let path = &change.path;
        let name = path.file_name().unwrap_or_default();
        if !self.plain && name.as_bytes().starts_with(WHITEOUT.as_bytes()) {
            let reason = format!("{path:?}: in a layer tar a name that begins with {WHITEOUT} means a deletion");
            return Err(Error::new(ErrorKind::InvalidInput, reason).hint("rename or remove it"));
        }
        match change.kind {
            ChangeKind::Deleted => self.out.whiteout(path),
            ChangeKind::Added | ChangeKind::Modified => match self.node(path) {
                Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
                other => other.doing(|| format!("exporting {path:?}")),
            },
        }
    }

    /// Ends the tar.
    pub fn finish(self) -> Result<W> {
        self.out.finish()
    }

    fn node(&mut self, path: &Path) -> Result<()> {
        let (mut meta, links) = self.source.metadata(path)?;
        // No tar has sockets, so none has a name to link to either.
        if meta.kind == FileKind::Socket {
            return Ok(());
        }
        if let Some(Links { key, count }) = links
            && let Some(names) = self.links.get_mut(&key)
        {
            self.out.hard_link(path, &names.first, &meta)?;
            names.add(path, count);
            return Ok(());
        }
        let content = match &mut meta.kind {
            FileKind::File { size } => {
                let content = self.source.content(path)?;
                *size = content.size;
                Some(content)
            }
            _ => None,
        };
        // From here on NotFound would be the archive's own.
        self.out.append(path, &meta, content).map_err(|e| match e.kind() {
            ErrorKind::NotFound => e.with_kind(ErrorKind::Io),
            _ => e,
        })?;
        if let Some(links) = links {
            self.links.insert(links.key, Names::new(path));
        }
        if meta.kind == FileKind::Directory {
            self.directories.insert(self.hasher.hash_one(path.as_os_str()));
        }
        Ok(())
    }

    /// Whether `path` is a name of an inode that is an entry, and is none itself.
    fn lacks(&self, key: LinkKey, path: &Path) -> bool {
        let missing = |names: &Names| !names.complete && names.first != path && !names.others.contains(path);
        self.links.get(&key).is_some_and(missing)
    }

    fn describes(&self, dir: &Path) -> bool {
        self.directories.contains(&self.hasher.hash_one(dir.as_os_str()))
    }
}

/// The tree beneath a root as a source. Symlinks on the way to a path are not followed; what is replaced between two
/// calls counts as vanished.
pub struct RootSource<'a> {
    root: &'a Root,
    /// The directory used last, since the next path is most likely in it.
    dir: Option<(PathBuf, OwnedFd)>,
    /// The file whose metadata was asked for last, since its content is most likely next.
    file: Option<(PathBuf, File)>,
}

impl<'a> RootSource<'a> {
    /// Gives what is beneath `root`.
    pub fn new(root: &'a Root) -> Self {
        RootSource { root, dir: None, file: None }
    }

    /// What is known of the names of what is at `path`.
    fn links(&mut self, path: &Path) -> Result<Option<Links>> {
        let (dir, name) = self.locate(path)?;
        Ok(links(&stat_at(dir, name)?))
    }

    /// The directory that `path` is in and its name there; the root itself has an empty name.
    fn locate<'p>(&mut self, path: &'p Path) -> Result<(BorrowedFd<'_>, &'p OsStr)> {
        let Some(parent) = path.parent() else { return Ok((self.root.as_fd(), OsStr::new(""))) };
        let name = path.file_name().expect("a normal path that has a parent has a name");
        if self.dir.as_ref().is_none_or(|(dir, _)| dir != parent) {
            let fd = self.root.open_dir_nofollow(parent).map_err(vanished)?;
            self.dir = Some((parent.to_owned(), fd));
        }
        let (_, dir) = self.dir.as_ref().expect("just set");
        Ok((dir.as_fd(), name))
    }
}

impl Source for RootSource<'_> {
    fn metadata(&mut self, path: &Path) -> Result<(Metadata, Option<Links>)> {
        let (dir, name) = self.locate(path)?;
        let mut inode = stat_at(dir, name)?;
        if let FileKind::File { .. } = inode.meta.kind {
            let file = open_regular(dir, name)?;
            // By descriptor, which is far cheaper; most files have none.
            if fs::flistxattr(&file, &mut [0_u8; 256]) != Ok(0) {
                inode.meta.xattrs = xattrs_at(file.as_fd(), OsStr::new(""))?;
            }
            self.file = Some((path.to_owned(), file));
        } else {
            inode.meta.xattrs = xattrs_at(dir, name)?;
        }
        let links = links(&inode);
        Ok((inode.meta, links))
    }

    fn content(&mut self, path: &Path) -> Result<Content<'_>> {
        let file = match self.file.take() {
            Some((open, file)) if open == path => file,
            _ => {
                let (dir, name) = self.locate(path)?;
                open_regular(dir, name)?
            }
        };
        let st = fs::fstat(&file)?;
        let size = st.st_size as u64;
        let segments = if size < WORTHWHILE_HOLES { whole(size) } else { segments(&file, size)? };
        let data: Box<dyn Read> = match segments == whole(size) {
            true => Box::new(file),
            false => Box::new(Segments { file, segments: segments.clone().into_iter(), left: 0 }),
        };
        Ok(Content { size, segments, data })
    }
}

fn links(inode: &Inode) -> Option<Links> {
    let several = inode.nlink > 1 && inode.meta.kind != FileKind::Directory;
    several.then_some(Links { key: LinkKey(inode.dev, inode.ino), count: inode.nlink })
}

/// Opens a regular file that was one a moment ago.
fn open_regular(dir: BorrowedFd<'_>, name: &OsStr) -> Result<File> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = File::from(fs::openat(dir, name, flags, Mode::empty()).map_err(vanished)?);
    match FileType::from_raw_mode(fs::fstat(&file)?.st_mode) {
        FileType::RegularFile => Ok(file),
        _ => Err(vanished(Errno::NOENT)),
    }
}

/// What a directory or file on the way turned into something else means: it is no longer there.
fn vanished(e: Errno) -> Error {
    match e {
        Errno::NOENT | Errno::STALE | Errno::NOTDIR | Errno::LOOP | Errno::NXIO => {
            Error::new(ErrorKind::NotFound, "it has vanished")
        }
        e => e.into(),
    }
}

fn whole(size: u64) -> Vec<Segment> {
    if size == 0 { Vec::new() } else { vec![Segment { offset: 0, len: size }] }
}

/// Go's archive/tar takes no map of segments longer than 1 MiB (CVE-2025-58183), and memory is to be bounded. This many
/// segments make a map of at most 640 KiB; what comes after them is one segment, holes and all.
const MAX_SEGMENTS: usize = 16 * 1024;

/// Where the data of a file is: lseek(2), SEEK_DATA and SEEK_HOLE.
fn segments(file: &File, size: u64) -> Result<Vec<Segment>> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < size {
        let offset = match fs::seek(file, SeekFrom::Data(at)) {
            Ok(offset) if offset < size => offset,
            Ok(_) | Err(Errno::NXIO) => break,
            // A filesystem that knows no holes.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => at,
            Err(e) => return Err(e.into()),
        };
        at = match fs::seek(file, SeekFrom::Hole(offset)) {
            Ok(end) if found.len() + 1 < MAX_SEGMENTS => end.min(size),
            Ok(_) | Err(Errno::NXIO | Errno::INVAL | Errno::OPNOTSUPP) => size,
            Err(e) => return Err(e.into()),
        };
        found.push(Segment { offset, len: at - offset });
    }
    fs::seek(file, SeekFrom::Start(0))?;
    Ok(found)
}

/// Reads the segments of a file, one after the other.
struct Segments {
    file: File,
    segments: vec::IntoIter<Segment>,
    left: u64,
}

impl Read for Segments {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.left == 0 {
            let Some(next) = self.segments.next() else { return Ok(0) };
            fs::seek(&self.file, SeekFrom::Start(next.offset))?;
            self.left = next.len;
        }
        let want = buf.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let got = self.file.read(&mut buf[..want])?;
        // A file that became shorter: its later segments have nothing either.
        self.left = if got == 0 { 0 } else { self.left - got as u64 };
        Ok(got)
    }
}

#[cfg(test)]
mod tests;
