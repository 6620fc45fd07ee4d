//! Files between a container and the host, as `docker cp` does it: a tar runs from one side to the other.

use super::{
    Engine, find, mounts,
    sight::{self, View},
};
use crate::progress::{Interruptible, Metered};
use graphdriver_core::{
    Access, Change, ChangeKind, Error, ErrorKind, FileKind, Metadata, Result, Root, mount,
    root::inode_at,
    tar::{self, Content, Entry, EntryKind, Exporter, Links, RootSource, Source},
    walk,
};
use rustix::{
    fs::{Mode, OFlags},
    io::Errno,
};
use std::{
    ffi::OsStr,
    fs::File,
    io::{IsTerminal, Read, Write},
    os::{fd::AsFd, unix::ffi::OsStrExt},
    path::{Component, Path, PathBuf},
};

/// How to copy.
#[derive(Debug, Clone, Copy, Default)]
pub struct CopyOptions {
    /// Keep owners and groups.
    pub keep_owners: bool,
    /// Copy what a symlink points to instead of the symlink.
    pub follow_link: bool,
}

/// One side of a copy.
#[derive(Debug, PartialEq, Eq)]
enum Side {
    Container(String, PathBuf),
    Host(PathBuf),
    /// A tar on standard input or output.
    Stream,
}

impl Side {
    /// `CONTAINER:PATH`, unless it is plainly a path: `./a:b`, `/a:b`.
    fn parse(text: &str) -> Side {
        match text.split_once(':') {
            _ if text == "-" => Side::Stream,
            Some((name, path)) if !name.is_empty() && !name.starts_with('.') && !name.contains('/') => {
                Side::Container(name.into(), path.into())
            }
            _ => Side::Host(text.into()),
        }
    }
}

/// A tree to read from or write to, and a path beneath it. Keeps what `docker cp` reads from the path's end.
struct Spot {
    root: Root,
    /// Held while the root is a writable mount of our own.
    turn: Option<File>,
    path: PathBuf,
    /// As the user wrote it.
    shown: PathBuf,
    /// The name a copy gets in a directory; empty for a root.
    name: PathBuf,
    /// `/.`: what is in the directory, not the directory.
    contents: bool,
    /// `/`: has to be a directory.
    slash: bool,
}

impl Spot {
    fn in_container(root: Root, turn: Option<File>, path: &Path) -> Spot {
        let (contents, slash) = ending(path);
        let shown = Path::new("/").join(path);
        let path = beneath(path);
        let name = path.file_name().map(PathBuf::from).unwrap_or_default();
        Spot { root, turn, path, shown, name, contents, slash }
    }

    /// Its directory is the root, so that symlinks resolve as on the host. `follow` also resolves one at the end.
    fn on_host(path: &Path, follow: bool) -> Result<Spot> {
        let (contents, slash) = ending(path);
        let nameless = path.components().next_back() == Some(Component::ParentDir);
        let whole = std::path::absolute(path)?;
        let whole = if follow || contents || slash || nameless { without_links(whole)? } else { whole };
        let last = whole.file_name().map(PathBuf::from).unwrap_or_default();
        let name = path.file_name().map_or_else(|| last.clone(), PathBuf::from);
        let dir = whole.parent().unwrap_or(Path::new("/"));
        let root = match Root::open(dir) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Err(no_directory(dir)),
            other => other?,
        };
        Ok(Spot { root, turn: None, path: last, shown: path.into(), name, contents, slash })
    }

    /// The name the tar's top entry has; empty for what is in a directory.
    fn top_entry(&self) -> PathBuf {
        if self.contents { PathBuf::new() } else { self.name.clone() }
    }

    fn not_found(&self) -> Error {
        Error::new(ErrorKind::NotFound, format!("there is no {:?}", self.shown))
    }

    fn clash(&self, what: &str) -> Error {
        Error::new(ErrorKind::InvalidInput, format!("{:?} {what}", self.shown))
    }

    fn kind(&self, follow: bool) -> Result<Option<FileKind>> {
        kind_of(&self.root, &self.path, follow)
    }
}

fn kind_of(root: &Root, path: &Path, follow: bool) -> Result<Option<FileKind>> {
    let nofollow = if follow { OFlags::empty() } else { OFlags::NOFOLLOW };
    match root.resolve(path, OFlags::PATH | nofollow, Mode::empty()) {
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
        Err(e) => Err(e.into()),
        Ok(fd) => Ok(Some(inode_at(fd.as_fd(), OsStr::new(""))?.meta.kind)),
    }
}

/// Whether the path ends in `/.` and in `/`.
fn ending(path: &Path) -> (bool, bool) {
    let bytes = path.as_os_str().as_bytes();
    (bytes == b"." || bytes.ends_with(b"/."), bytes.ends_with(b"/"))
}

/// The path relative to its root; `..` takes back the name before it, as `docker cp` reads paths in a container.
fn beneath(path: &Path) -> PathBuf {
    let mut clean = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => drop(clean.pop()),
            _ => {}
        }
    }
    clean
}

/// A path on the host with its symlinks resolved, be it one whose last name does not exist.
fn without_links(mut path: PathBuf) -> Result<PathBuf> {
    for _ in 0..40 {
        match (path.canonicalize(), path.read_link()) {
            (Ok(whole), _) => return Ok(whole),
            (Err(_), Ok(target)) => path = path.parent().unwrap_or(Path::new("/")).join(target),
            (Err(e), Err(_)) if e.kind() == std::io::ErrorKind::NotFound => return Ok(path),
            (Err(e), Err(_)) => return Err(e.into()),
        }
    }
    Err(Errno::LOOP.into())
}

fn no_directory(path: &Path) -> Error {
    Error::new(ErrorKind::NotFound, format!("there is no directory {path:?}")).hint("make it first")
}

impl Engine {
    /// Copies `source` to `destination`; one of them is `CONTAINER:PATH`, the other a path on the host or `-` for a tar on
    /// standard input or output. Paths in the container resolve beneath its root. The container may be mounted.
    pub fn copy(&self, source: &str, destination: &str, options: &CopyOptions) -> Result<()> {
        match (Side::parse(source), Side::parse(destination)) {
            (Side::Container(name, path), Side::Stream) => {
                let out = std::io::stdout().lock();
                if out.is_terminal() {
                    return Err(
                        Error::new(ErrorKind::InvalidInput, "will not write a tar to a terminal").hint("redirect")
                    );
                }
                let from = self.container_spot(&name, &path, Access::ReadOnly)?;
                let name = from.top_entry();
                let out = Metered::new(out, "-", None, &*self.progress, &self.cancel);
                send(from, &name, options, out)
            }
            (Side::Stream, Side::Container(name, path)) => {
                let to = self.container_spot(&name, &path, Access::ReadWrite)?;
                match to.kind(true)? {
                    Some(FileKind::Directory) => {}
                    Some(_) => return Err(to.clash("is no directory to unpack a tar into")),
                    None => return Err(no_directory(&to.shown)),
                }
                let input = Metered::new(Interruptible::stdin(&self.cancel)?, "-", None, &*self.progress, &self.cancel);
                receive(input, &place(true, to, Path::new(""), true)?, options, (0, 0))
            }
            (Side::Container(name, path), Side::Host(target)) => {
                let from = self.container_spot(&name, &path, Access::ReadOnly)?;
                let me = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
                self.pipe(from, Spot::on_host(&target, true)?, options, me, false)
            }
            (Side::Host(path), Side::Container(name, target)) => {
                let to = self.container_spot(&name, &target, Access::ReadWrite)?;
                self.pipe(Spot::on_host(&path, options.follow_link)?, to, options, (0, 0), true)
            }
            (Side::Container(..), Side::Container(..)) => {
                Err(Error::new(ErrorKind::Unsupported, "both sides are containers").hint("copy to the host first"))
            }
            _ => Err(Error::new(ErrorKind::InvalidInput, "no side is a container")
                .hint("write CONTAINER:PATH for one of them")),
        }
    }

    /// The container's tree: where it is mounted if it is, since two overlays on one upper directory do not see each
    /// other's writes; else a mount of its own that nobody sees.
    fn container_spot(&self, container: &str, path: &Path, access: Access) -> Result<Spot> {
        let layer = self.layers.store().read(|db| find::container(db, container))?.layer;
        let turn = (access == Access::ReadWrite).then(|| self.writer_turn(layer, true)).transpose()?;
        self.reconcile_mounts()?;
        let (row, mounts) = self.layers.store().read(|db| {
            let row = find::container(db, container)?;
            let mounts = mounts::of_object(db, &row.id)?;
            Ok((row, mounts))
        })?;
        let (root, turn) = match mounts.iter().find(|m| m.writable) {
            Some(mount) => match View::take()?.reach(mount)?.0 {
                dir if sight::is_dead(&dir) => return Err(sight::died(mount)),
                dir => (Root::from_fd(dir), None),
            },
            None => {
                if access == Access::ReadWrite {
                    mounts::refuse_beside_readers(&mounts)?;
                }
                (Root::from_fd(mount::detached(&self.layers.mount(row.layer, access)?)?), turn)
            }
        };
        Ok(Spot::in_container(root, turn, path))
    }

    fn pipe(&self, from: Spot, to: Spot, options: &CopyOptions, owner: (u32, u32), into_container: bool) -> Result<()> {
        let source_is_dir = match from.kind(options.follow_link || from.contents || from.slash)? {
            None => return Err(from.not_found()),
            Some(FileKind::Directory) => true,
            Some(_) if from.contents || from.slash => return Err(from.clash("is no directory")),
            Some(_) => false,
        };
        let name = from.top_entry();
        let place = place(source_is_dir, to, &name, into_container)?;
        let (reader, writer) = std::io::pipe()?;
        let meter = Metered::new(reader, "copying", None, &*self.progress, &self.cancel);
        let options = *options;
        let (sent, received) = std::thread::scope(|scope| {
            let sent = scope.spawn(move || send(from, &name, &options, writer));
            let received = receive(meter, &place, &options, owner);
            (sent.join().expect("sending does not panic"), received)
        });
        // If receiving fails the sender only sees a broken pipe.
        received.and(sent)
    }
}

/// Where a tar goes: its names below `strip` come to lie below `top` in `root`.
struct Place {
    root: Root,
    /// Dropped after `root`, which then is mounted no more.
    _turn: Option<File>,
    strip: PathBuf,
    top: PathBuf,
    /// Whether names may lead through symlinks beneath `root`. On the host they do not: a container must not choose where
    /// its files go.
    follow: bool,
}

/// Into a directory that is there, under its own name; else under the destination's. A symlink is written through.
fn place(source_is_dir: bool, to: Spot, name: &Path, follow: bool) -> Result<Place> {
    match to.kind(true)? {
        Some(FileKind::Directory) => {
            let root = Root::from_fd(to.root.open_dir(&to.path)?);
            return Ok(Place { root, _turn: to.turn, strip: PathBuf::new(), top: PathBuf::new(), follow });
        }
        Some(_) if source_is_dir => return Err(to.clash("is no directory, and the source is one")),
        Some(_) if to.slash => return Err(to.clash("is no directory")),
        None if to.slash && !source_is_dir => return Err(no_directory(&to.shown)),
        _ => {}
    }
    let top = resolved(&to.root, &to.path)?;
    match to.root.open_dir(top.parent().unwrap_or(Path::new(""))) {
        Ok(_) => Ok(Place { root: to.root, _turn: to.turn, strip: name.into(), top, follow }),
        Err(_) => Err(no_directory(to.shown.parent().unwrap_or(Path::new("/")))),
    }
}

/// Writes what is at `from` as a tar whose top entry is `name`.
fn send(from: Spot, name: &Path, options: &CopyOptions, out: impl Write) -> Result<()> {
    let follow = options.follow_link || from.contents || from.slash;
    let path = if follow { resolved(&from.root, &from.path)? } else { from.path.clone() };
    let kind = kind_of(&from.root, &path, false)?.ok_or_else(|| from.not_found())?;
    // Symlinks on the way resolve here; below, the tree is taken as it is.
    let (root, leaf) = match path.as_os_str().is_empty() {
        true => (from.root, OsStr::new("")),
        false => from.root.parent(&path).map(|(dir, leaf)| (Root::from_fd(dir), leaf))?,
    };
    let mut source = Subtree { inner: RootSource::new(&root), from: Path::new(leaf), name };
    let mut exporter = Exporter::plain(&mut source, out);
    exporter.change(&Change { path: name.into(), kind: ChangeKind::Added })?;
    if kind == FileKind::Directory {
        let dir = Root::from_fd(root.open_dir(Path::new(leaf))?);
        walk::changes(None, &dir, None, &mut |change| {
            exporter.change(&Change { path: name.join(change.path), kind: change.kind })
        })?;
    }
    Ok(exporter.finish()?.flush()?)
}

/// The path with symlinks at its end followed, beneath the same root.
fn resolved(root: &Root, path: &Path) -> Result<PathBuf> {
    let mut path = path.to_owned();
    for _ in 0..40 {
        match kind_of(root, &path, false)? {
            Some(FileKind::Symlink { target }) => {
                let base = if target.is_absolute() { Path::new("") } else { path.parent().unwrap_or(Path::new("")) };
                path = base.join(target.strip_prefix("/").unwrap_or(&target));
            }
            _ => return Ok(path),
        }
    }
    Err(Errno::LOOP.into())
}

/// A subtree under another name.
struct Subtree<'a> {
    inner: RootSource<'a>,
    from: &'a Path,
    name: &'a Path,
}

impl Subtree<'_> {
    fn original(&self, path: &Path) -> PathBuf {
        let below = path.strip_prefix(self.name).expect("only names below the top entry are asked for");
        if below.as_os_str().is_empty() { self.from.into() } else { self.from.join(below) }
    }
}

impl Source for Subtree<'_> {
    fn metadata(&mut self, path: &Path) -> Result<(Metadata, Option<Links>)> {
        let path = self.original(path);
        self.inner.metadata(&path)
    }

    fn content(&mut self, path: &Path) -> Result<Content<'_>> {
        let path = self.original(path);
        self.inner.content(&path)
    }
}

/// Unpacks a tar at its place.
fn receive(mut input: impl Read, place: &Place, options: &CopyOptions, owner: (u32, u32)) -> Result<()> {
    let renamed = |path: &Path| {
        let below = path.strip_prefix(&place.strip).unwrap_or(path);
        if below.as_os_str().is_empty() { place.top.clone() } else { place.top.join(below) }
    };
    tar::extract(&mut input, &place.root, place.follow, &mut |entry: &mut Entry| {
        entry.path = renamed(&entry.path);
        match &mut entry.kind {
            EntryKind::HardLink(target) => *target = renamed(target),
            EntryKind::Node(meta) if !options.keep_owners && (meta.uid, meta.gid) != owner => {
                (meta.uid, meta.gid) = owner;
                // As cp(1): what runs as its owner must not come to run as another.
                if meta.kind != FileKind::Directory {
                    meta.mode &= !0o6000;
                }
            }
            EntryKind::Node(_) => {}
        }
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sides_are_told_apart_as_docker_does() {
        assert_eq!(Side::parse("-"), Side::Stream);
        assert_eq!(Side::parse("web:/etc"), Side::Container("web".into(), "/etc".into()));
        for host in ["/a:b", "./a:b", "a", "dir/a:b", ":x"] {
            assert_eq!(Side::parse(host), Side::Host(host.into()), "{host}");
        }
    }
}
