//! The walk that compares a layer with its parent, once for all drivers.

use crate::{Cancel, Candidates, Change, ChangeKind, Context, Error, ErrorKind, Narrow, Result, Root, root::xattrs_at};
use rustix::{
    fs::{self, AtFlags, FileType, Mode, OFlags, RawDir, SeekFrom, Statx, StatxFlags},
    io::Errno,
};
use std::{
    cmp::Ordering,
    ffi::{OsStr, OsString},
    fs::File,
    mem::MaybeUninit,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{
            ffi::{OsStrExt, OsStringExt},
            fs::FileExt,
        },
    },
    path::{Path, PathBuf},
    rc::Rc,
    vec,
};

/// Compares a layer with its parent and visits what differs, in the order described at [`Change`].
///
/// `lower` is what the parent shows, `upper` what the layer shows. Without `lower` everything in `upper` is `Added`. The
/// root is visited, as `Modified` with an empty path, only if its own metadata differs.
///
/// Two inodes are the same if kind, permissions, owner, group, mtime, size, device number, inode number and ctime are;
/// if only the last two differ, xattrs, symlink target and content decide. A view whose inode numbers are not those of
/// its parent's view costs reading everything. An inode with several names in either tree also counts as changed if its
/// ctime or number did, since its names may have changed: a list of changes has all names of such an inode. Moving a
/// directory does not change the files in it, so their names elsewhere are not listed.
///
/// `upper` may be in use: what vanishes during the walk counts as absent. Symlinks are never followed. Memory and open
/// descriptors are bounded by the largest directories on one path and not by the size of the tree. It ends when `upper` is
/// [cancelled](Root::cancelled_by).
pub fn changes(
    lower: Option<&Root>,
    upper: &Root,
    narrow: Option<&mut dyn Narrow>,
    visit: &mut dyn FnMut(Change) -> Result<()>,
) -> Result<()> {
    let buffer = vec![MaybeUninit::uninit(); 32 * 1024];
    let mut walk = Walk { lower, upper, narrow, visit, path: Vec::new(), stack: Vec::new(), buffer };
    walk.root().doing(|| "comparing the root directory")?;
    while let Some(level) = walk.stack.last_mut() {
        walk.path.truncate(level.end);
        match level.names.next() {
            Some(name) => walk.name(name).doing(|| format!("comparing {:?}", OsStr::from_bytes(&walk.path)))?,
            None => drop(walk.stack.pop()),
        }
    }
    Ok(())
}

/// Levels whose directories stay open: a walk in a deep tree must not run into RLIMIT_NOFILE, whose default is 1024.
const OPEN_LEVELS: usize = 64;

struct Walk<'a, 'n> {
    lower: Option<&'a Root>,
    upper: &'a Root,
    narrow: Option<&'a mut (dyn Narrow + 'n)>,
    visit: &'a mut dyn FnMut(Change) -> Result<()>,
    path: Vec<u8>,
    stack: Vec<Level>,
    buffer: Vec<MaybeUninit<u8>>,
}

/// A directory on the way from the root to where the walk is.
struct Level {
    /// The length of its path.
    end: usize,
    names: vec::IntoIter<Name>,
    /// None where the parent has no directory.
    lower: Option<Dir>,
    upper: Dir,
    /// Whether it was visited. It has to be before anything in it is. The levels above a visited one are visited.
    visited: bool,
    /// Whether everything below has to be compared.
    all: bool,
}

/// A directory, closed while the walk is far below it.
#[derive(Default)]
struct Dir(Option<Rc<OwnedFd>>);

struct Name {
    name: OsString,
    /// Whether the parent may have it.
    lower: bool,
    /// What the layer may have there.
    upper: Option<FileType>,
}

impl<'n> Walk<'_, 'n> {
    fn root(&mut self) -> Result<()> {
        let upper = open_root(self.upper)?;
        let lower = self.lower.map(open_root).transpose()?;
        if let Some(lower) = &lower {
            let stats = (stat(lower, OsStr::new(""))?, stat(&upper, OsStr::new(""))?);
            if let (Some(l), Some(u)) = stats
                && differs(self.upper.cancel(), lower, &l, &upper, &u, OsStr::new(""))?
            {
                self.visit(ChangeKind::Modified)?;
            }
        }
        self.enter(lower, upper, true)
    }

    /// Looks at one name of the innermost directory.
    fn name(&mut self, Name { name, lower, upper }: Name) -> Result<()> {
        self.upper.cancel().check()?;
        let Some((lower_dir, upper_dir)) = self.dirs()? else {
            self.stack.pop();
            return Ok(());
        };
        if !self.path.is_empty() {
            self.path.push(b'/');
        }
        self.path.extend_from_slice(name.as_bytes());
        let lower_dir = lower_dir.filter(|_| lower);
        let (lower_dir, seen) = match (lower_dir, upper) {
            (None, None) => return Ok(()),
            (None, Some(kind)) => return self.added(&upper_dir, &name, kind, ChangeKind::Added),
            (Some(_), None) => return self.visit(ChangeKind::Deleted),
            (Some(dir), Some(_)) => (stat(&dir, &name)?.map(|st| (dir, st)), stat(&upper_dir, &name)?),
        };
        match (lower_dir, seen) {
            (None, None) => Ok(()),
            (None, Some(u)) => self.added(&upper_dir, &name, kind(&u), ChangeKind::Added),
            (Some(_), None) => self.visit(ChangeKind::Deleted),
            (Some((lower_dir, l)), Some(u)) => self.both(&lower_dir, &l, &upper_dir, &u, &name),
        }
    }

    /// Visits what is not in the parent, or something else there.
    fn added(&mut self, dir: &OwnedFd, name: &OsStr, mut what: FileType, change: ChangeKind) -> Result<()> {
        if what == FileType::Unknown {
            match stat(dir, name)? {
                Some(st) => what = kind(&st),
                None => return Ok(()),
            }
        }
        if what != FileType::Directory {
            return self.visit(change);
        }
        match (open_dir(dir, name)?, change) {
            (Some(fd), _) => {
                self.visit(change)?;
                self.enter(None, fd, true)
            }
            (None, ChangeKind::Added) => Ok(()),
            (None, _) => self.visit(ChangeKind::Deleted),
        }
    }

    /// Compares a name that is in both trees.
    fn both(&mut self, lower: &OwnedFd, l: &Statx, upper: &OwnedFd, u: &Statx, name: &OsStr) -> Result<()> {
        if kind(l) != kind(u) {
            return self.added(upper, name, kind(u), ChangeKind::Modified);
        }
        let differs = match differs(self.upper.cancel(), lower, l, upper, u, name) {
            Err(e) if e.kind() == ErrorKind::NotFound => return self.visit(ChangeKind::Deleted),
            other => other?,
        };
        if kind(u) != FileType::Directory {
            return if differs { self.visit(ChangeKind::Modified) } else { Ok(()) };
        }
        let Some(upper) = open_dir(upper, name)? else {
            return self.visit(ChangeKind::Deleted);
        };
        let lower = open_dir(lower, name)?;
        if differs {
            self.visit(ChangeKind::Modified)?;
        }
        self.enter(lower, upper, differs)
    }

    /// Visits the path where the walk is, its directories first.
    fn visit(&mut self, kind: ChangeKind) -> Result<()> {
        let first = self.stack.iter().rposition(|level| level.visited).map_or(0, |i| i + 1);
        for level in &mut self.stack[first..] {
            level.visited = true;
            (self.visit)(Change { path: to_path(&self.path[..level.end]), kind: ChangeKind::Modified })?;
        }
        (self.visit)(Change { path: to_path(&self.path), kind })
    }

    /// Makes the directory where the walk is the innermost one.
    fn enter(&mut self, lower: Option<OwnedFd>, upper: OwnedFd, visited: bool) -> Result<()> {
        let mut all = self.narrow.is_none() || lower.is_none() || self.stack.last().is_some_and(|level| level.all);
        let mut candidates = Candidates::All;
        if let (false, Some(narrow)) = (all, &mut self.narrow) {
            candidates = narrow.candidates(Path::new(OsStr::from_bytes(&self.path)))?;
            all = candidates == Candidates::All;
        }
        let names = match candidates {
            Candidates::Names(names) => unlisted(names),
            Candidates::All => {
                let old = lower.as_ref().map(|dir| list(dir, &mut self.buffer)).transpose()?.unwrap_or_default();
                merge(old, list(&upper, &mut self.buffer)?)
            }
        };
        if let Some(i) = self.stack.len().checked_sub(OPEN_LEVELS) {
            let far = &mut self.stack[i];
            far.upper = Dir(None);
            far.lower = far.lower.take().map(|_| Dir(None));
        }
        let dir = |fd| Dir(Some(Rc::new(fd)));
        let (lower, upper, names) = (lower.map(dir), dir(upper), names.into_iter());
        self.stack.push(Level { end: self.path.len(), names, lower, upper, visited, all });
        Ok(())
    }

    /// The innermost directories of the parent, if it has one, and of the layer. None if the layer's has vanished.
    #[expect(clippy::type_complexity, reason = "a pair of descriptors")]
    fn dirs(&mut self) -> Result<Option<(Option<Rc<OwnedFd>>, Rc<OwnedFd>)>> {
        let level = self.stack.last_mut().expect("the walk is in a directory");
        let path = Path::new(OsStr::from_bytes(&self.path[..level.end]));
        let Some(upper) = level.upper.open(self.upper, path)? else { return Ok(None) };
        let lower = match (&mut level.lower, self.lower) {
            (Some(dir), Some(root)) => dir.open(root, path)?,
            _ => None,
        };
        Ok(Some((lower, upper)))
    }
}

impl Dir {
    /// Its descriptor, opened again if need be.
    fn open(&mut self, root: &Root, path: &Path) -> Result<Option<Rc<OwnedFd>>> {
        if self.0.is_none() {
            self.0 = unless_gone(root.open_dir_nofollow(path))?.map(Rc::new);
        }
        Ok(self.0.clone())
    }
}

/// Whether an inode differs in anything a layer tar keeps; both are of one kind.
fn differs(cancel: &Cancel, lower: &OwnedFd, l: &Statx, upper: &OwnedFd, u: &Statx, name: &OsStr) -> Result<bool> {
    let attributes = |st: &Statx| {
        // The size of a directory says nothing: ext4's never shrink.
        let size = if kind(st) == FileType::Directory { 0 } else { st.stx_size };
        let device = match kind(st) {
            FileType::CharacterDevice | FileType::BlockDevice => (st.stx_rdev_major, st.stx_rdev_minor),
            _ => (0, 0),
        };
        (st.stx_mode, st.stx_uid, st.stx_gid, time(&st.stx_mtime), size, device)
    };
    if attributes(l) != attributes(u) {
        return Ok(true);
    }
    // No program can set a ctime. A change sets it, and so does overlayfs's copy-up, while it passes on a lower file's
    // ctime and inode number. Not the ctime alone: files made in one tick of the clock have the same.
    if (l.stx_ino, time(&l.stx_ctime)) == (u.stx_ino, time(&u.stx_ctime)) {
        return Ok(false);
    }
    if kind(u) != FileType::Directory && l.stx_nlink.max(u.stx_nlink) > 1 {
        return Ok(true);
    }
    if xattrs_at(lower.as_fd(), name)? != xattrs_at(upper.as_fd(), name)? {
        return Ok(true);
    }
    match kind(u) {
        FileType::RegularFile if u.stx_size > 0 => Ok(!same_content(cancel, lower, upper, name, u.stx_size)?),
        FileType::Symlink => Ok(fs::readlinkat(lower, name, Vec::new())? != fs::readlinkat(upper, name, Vec::new())?),
        _ => Ok(false),
    }
}

/// Compares the first `size` bytes of two files, without reading where both have holes.
fn same_content(cancel: &Cancel, lower: &OwnedFd, upper: &OwnedFd, name: &OsStr, size: u64) -> Result<bool> {
    const STEP: usize = 128 * 1024;
    let (Some(a), Some(b)) = (open_file(lower, name)?, open_file(upper, name)?) else {
        return Ok(false);
    };
    let length = STEP.min(usize::try_from(size).unwrap_or(STEP));
    let (mut x, mut y) = (vec![0; length], vec![0; length]);
    let mut at = 0;
    while at < size {
        cancel.check()?;
        if size > STEP as u64 {
            at = next_data(&a, at, size)?.min(next_data(&b, at, size)?);
        }
        let step = (size - at).min(length as u64) as usize;
        if !fill(&a, &mut x[..step], at)? || !fill(&b, &mut y[..step], at)? || x[..step] != y[..step] {
            return Ok(false);
        }
        at += step as u64;
    }
    Ok(true)
}

/// Where data begins at or after `at`; `size` if only a hole follows.
fn next_data(file: &File, at: u64, size: u64) -> Result<u64> {
    match fs::seek(file, SeekFrom::Data(at)) {
        Ok(at) => Ok(at.min(size)),
        Err(Errno::NXIO) => Ok(size),
        // A filesystem that knows no holes: lseek(2).
        Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(at),
        Err(e) => Err(e.into()),
    }
}

/// Reads exactly `buf`; false if the file ends before.
fn fill(file: &File, buf: &mut [u8], at: u64) -> Result<bool> {
    match file.read_exact_at(buf, at) {
        Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => Ok(false),
        other => Ok(other.map(|()| true)?),
    }
}

/// Opens a file to compare it. None if it is none any more.
fn open_file(dir: &OwnedFd, name: &OsStr) -> Result<Option<File>> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let fd = fs::openat(dir, name, flags, Mode::empty()).map_err(|e| match gone(e) {
        true => Error::new(ErrorKind::NotFound, "it has vanished"),
        false => e.into(),
    })?;
    let regular = FileType::from_raw_mode(fs::fstat(&fd)?.st_mode) == FileType::RegularFile;
    Ok(regular.then(|| fd.into()))
}

fn open_root(root: &Root) -> Result<OwnedFd> {
    Ok(root.open_dir(Path::new(""))?)
}

/// Opens a directory. None if it is none any more.
fn open_dir(dir: &OwnedFd, name: &OsStr) -> Result<Option<OwnedFd>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    unless_gone(fs::openat(dir, name, flags, Mode::empty()))
}

/// What a name is, or what `dir` itself is if it is empty; without xattrs, which cost several more system calls.
fn stat(dir: &OwnedFd, name: &OsStr) -> Result<Option<Statx>> {
    let at = AtFlags::SYMLINK_NOFOLLOW | AtFlags::EMPTY_PATH | AtFlags::NO_AUTOMOUNT;
    unless_gone(fs::statx(dir, name, at, StatxFlags::BASIC_STATS))
}

/// None for what somebody removed or replaced between two system calls.
fn unless_gone<T>(result: rustix::io::Result<T>) -> Result<Option<T>> {
    match result {
        Err(e) if gone(e) => Ok(None),
        other => Ok(Some(other?)),
    }
}

fn gone(e: Errno) -> bool {
    matches!(e, Errno::NOENT | Errno::STALE | Errno::NOTDIR | Errno::LOOP)
}

fn kind(st: &Statx) -> FileType {
    FileType::from_raw_mode(st.stx_mode.into())
}

fn time(t: &fs::StatxTimestamp) -> (i64, u32) {
    (t.tv_sec, t.tv_nsec)
}

fn to_path(bytes: &[u8]) -> PathBuf {
    OsString::from_vec(bytes.to_vec()).into()
}

/// The names in a directory with what they are, sorted by their bytes.
fn list(dir: &OwnedFd, buffer: &mut [MaybeUninit<u8>]) -> Result<Vec<(OsString, FileType)>> {
    let mut names = Vec::new();
    let mut entries = RawDir::new(dir, buffer);
    while let Some(entry) = entries.next() {
        let entry = match entry {
            // A directory that was removed while it is open: getdents(2).
            Err(e) if gone(e) => break,
            other => other?,
        };
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push((OsString::from_vec(name.to_vec()), entry.file_type()));
        }
    }
    names.sort_unstable_by(|a, b| a.0.cmp(&b.0));
    Ok(names)
}

/// Names that may be in either tree.
fn unlisted(mut names: Vec<OsString>) -> Vec<Name> {
    names.sort_unstable();
    names.dedup();
    names.into_iter().map(|name| Name { name, lower: true, upper: Some(FileType::Unknown) }).collect()
}

/// Merges two sorted listings.
fn merge(lower: Vec<(OsString, FileType)>, upper: Vec<(OsString, FileType)>) -> Vec<Name> {
    let mut merged = Vec::with_capacity(lower.len().max(upper.len()));
    let (mut lower, mut upper) = (lower.into_iter().peekable(), upper.into_iter().peekable());
    loop {
        let order = match (lower.peek(), upper.peek()) {
            (None, None) => return merged,
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some(l), Some(u)) => l.0.cmp(&u.0),
        };
        let old = if order.is_le() { lower.next() } else { None };
        let new = if order.is_ge() { upper.next() } else { None };
        let (in_lower, kind) = (old.is_some(), new.as_ref().map(|(_, kind)| *kind));
        merged.extend(new.or(old).map(|(name, _)| Name { name, lower: in_lower, upper: kind }));
    }
}

#[cfg(test)]
pub(crate) mod tests;
