//! Directories over all layers: which layers they lie in, and the descriptors by which everything in them is reached.

use super::{
    Union,
    layer::{self, open_dir, open_path, parts},
    marks::{self, Object},
    node::{Fds, Node, Opened, Source, UPPER},
};
use rustix::{
    fd::{AsFd, BorrowedFd, OwnedFd},
    fs::Statx,
    io::{Errno, Result},
};
use std::{
    collections::VecDeque,
    ffi::OsStr,
    os::unix::ffi::OsStrExt,
    sync::{
        Arc, Weak,
        atomic::{AtomicUsize, Ordering},
    },
};

/// Keeps descriptors and listings of directories within bounds: those not used for a round are closed.
pub(super) struct Clock {
    queue: parking_lot::Mutex<VecDeque<Weak<Node>>>,
    pub fds: Arc<AtomicUsize>,
    pub entries: Arc<AtomicUsize>,
    max_fds: usize,
    max_entries: usize,
}

impl Clock {
    /// Up to half of the descriptors the process may have; the rest is for open files.
    pub fn new(descriptors: usize) -> Clock {
        Clock {
            queue: Default::default(),
            fds: Arc::default(),
            entries: Arc::default(),
            max_fds: (descriptors / 2).clamp(64, 4096),
            max_entries: 64 << 10,
        }
    }

    fn is_over(&self) -> bool {
        self.fds.load(Ordering::Relaxed) > self.max_fds || self.entries.load(Ordering::Relaxed) > self.max_entries
    }

    /// Notes that the directory holds something now.
    pub fn enter(&self, node: &Arc<Node>) {
        let Some(dir) = node.dir.as_deref() else { return };
        dir.used.store(true, Ordering::Relaxed);
        if !dir.in_clock.swap(true, Ordering::Relaxed) {
            self.queue.lock().push_back(Arc::downgrade(node));
        }
    }

    /// Closes until all is within bounds. What is in use, or locked by the caller, stays.
    pub fn trim(&self) {
        if !self.is_over() {
            return;
        }
        let mut turns = 2 * self.queue.lock().len();
        while self.is_over() && turns > 0 {
            turns -= 1;
            let Some(weak) = self.queue.lock().pop_front() else { return };
            let Some(node) = weak.upgrade() else { continue };
            if !close(&node) {
                self.queue.lock().push_back(weak);
            }
        }
    }
}

/// `false`: it was used lately, or has no name by which it could be opened again.
fn close(node: &Arc<Node>) -> bool {
    let Some(dir) = node.dir.as_deref() else { return true };
    if dir.used.swap(false, Ordering::Relaxed) {
        return false;
    }
    let (Some(mut names), Some(mut open)) = (dir.names.try_write(), dir.open.try_lock()) else { return false };
    if names.removed {
        return false;
    }
    names.listing = None;
    dir.misses.store(0, Ordering::Relaxed);
    *open = None;
    dir.in_clock.store(false, Ordering::Relaxed);
    true
}

/// What one layer has under a name.
pub(super) enum Here {
    Nothing,
    /// A whiteout: look no further.
    Whiteout,
    File(Box<Statx>),
}

/// Where to look in the next lower layer.
enum Way {
    /// In the parent's directory there.
    Name(Box<OsStr>),
    /// From that layer's root.
    Path(Vec<u8>),
}

/// A directory as it was found over all layers.
pub(super) struct Stack {
    pub sources: Vec<Source>,
    pub impure: bool,
    /// See [`Dir::lower_path`](super::node::Dir::lower_path).
    pub lower_path: Option<Box<[u8]>>,
    /// The topmost lower directory of it, if the topmost is the upper one.
    pub lower: Option<Box<Statx>>,
}

impl Union {
    pub(super) fn layer_root(&self, layer: u16) -> BorrowedFd<'_> {
        match layer.checked_sub(1) {
            Some(lower) => self.lowers[lower as usize].as_fd(),
            None => self.upper.as_ref().map_or(self.lowers[0].as_fd(), |u| u.root.as_fd()),
        }
    }

    pub(super) fn is_bottom(&self, layer: u16) -> bool {
        layer as usize == self.lowers.len()
    }

    /// The open directories of a directory. Those above it are opened first, in a loop, as a tree may be deeper than the
    /// stack.
    pub(super) fn fds(&self, node: &Arc<Node>) -> Result<Arc<Fds>> {
        loop {
            let mut closed = Vec::new();
            let mut at = node.clone();
            let mut above = loop {
                let dir = at.dir()?;
                dir.used.store(true, Ordering::Relaxed);
                if let Some(fds) = dir.open.lock().clone() {
                    break Some(fds);
                }
                let parent = at.place.lock().parent.clone();
                closed.push(at);
                match parent {
                    Some(parent) => at = parent,
                    None => break None,
                }
            };
            while let Some(next) = closed.pop() {
                match self.open_dirs(&next, above.as_deref())? {
                    Some(fds) => above = Some(fds),
                    // It was moved meanwhile.
                    None => break,
                }
            }
            if let (true, Some(fds)) = (closed.is_empty(), above) {
                self.clock.trim();
                return Ok(fds);
            }
        }
    }

    /// Opens one directory, below those of its parent. `None`: they are not its parent's any more.
    fn open_dirs(&self, node: &Arc<Node>, above: Option<&Fds>) -> Result<Option<Arc<Fds>>> {
        let dir = node.dir()?;
        let mut open = dir.open.lock();
        if let Some(fds) = &*open {
            return Ok(Some(fds.clone()));
        }
        let place = node.place.lock();
        let sources = dir.sources();
        let list = match (&place.parent, above) {
            (Some(parent), Some(above)) => {
                let current = parent.dir()?.open.lock().as_deref().is_some_and(|fds| std::ptr::eq(fds, above));
                if !current {
                    return Ok(None);
                }
                self.open_sources(&sources, |s| self.open_source(s, above, &place.name))?
            }
            (None, None) if !node.dead.load(Ordering::Relaxed) => {
                self.open_sources(&sources, |s| open_dir(self.layer_root(s.layer), OsStr::new(".")))?
            }
            (None, _) if node.dead.load(Ordering::Relaxed) => return Err(Errno::NOENT),
            _ => return Ok(None),
        };
        drop(place);
        let fds = Arc::new(Fds::new(list, &self.clock.fds));
        *open = Some(fds.clone());
        drop(open);
        self.clock.enter(node);
        Ok(Some(fds))
    }

    fn open_sources(&self, sources: &[Source], open: impl Fn(&Source) -> Result<OwnedFd>) -> Result<Vec<Opened>> {
        let open = |s: &Source| Ok(Opened { layer: s.layer, fd: open(s)?, xattr_whiteouts: s.xattr_whiteouts });
        sources.iter().map(open).collect()
    }

    fn open_source(&self, source: &Source, above: &Fds, name: &OsStr) -> Result<OwnedFd> {
        match &source.path {
            Some(path) => open_path(self.layer_root(source.layer), path),
            None => open_dir(above.layer(source.layer).ok_or(Errno::STALE)?, name),
        }
    }

    /// The path of a directory from the root of a layer it lies in.
    pub(super) fn layer_path(&self, node: &Arc<Node>, layer: u16) -> Result<Vec<u8>> {
        let mut names: Vec<Box<OsStr>> = Vec::new();
        let mut at = node.clone();
        let root = loop {
            // First: a rename changes the sources with the place.
            let place = at.place.lock();
            let sources = at.dir()?.sources();
            let source = sources.iter().find(|s| s.layer == layer).ok_or(Errno::STALE)?;
            if let Some(path) = &source.path {
                break path.to_vec();
            }
            let Some(parent) = place.parent.clone() else { break Vec::new() };
            names.push(place.name.clone());
            drop(place);
            at = parent;
        };
        Ok(names.iter().rev().fold(root, |path, name| join(&path, name.as_bytes())))
    }

    /// The path of a directory from the root of what the lower layers show together, which is what a redirect of the upper
    /// layer says.
    pub(super) fn lower_path(&self, node: &Arc<Node>) -> Result<Vec<u8>> {
        let mut names: Vec<Box<OsStr>> = Vec::new();
        let mut at = node.clone();
        let root = loop {
            // First: a rename changes the path with the place.
            let place = at.place.lock();
            if let Some(path) = &*at.dir()?.lower_path.read() {
                break path.to_vec();
            }
            let parent = place.parent.clone().ok_or(Errno::STALE)?;
            names.push(place.name.clone());
            drop(place);
            at = parent;
        };
        Ok(names.iter().rev().fold(root, |path, name| join(&path, name.as_bytes())))
    }

    /// What a directory of one layer has under a name.
    pub(super) fn here(&self, dir: BorrowedFd<'_>, name: &OsStr, xattr_whiteouts: bool) -> Result<Here> {
        match layer::stat(dir, name) {
            Ok(stat) => self.seen(dir, name, xattr_whiteouts, stat),
            Err(Errno::NOENT) if name.len() + marks::WHITEOUT.len() > 255 => Ok(Here::Nothing),
            Err(Errno::NOENT) => match layer::stat(dir, &marks::whiteout_name(name)) {
                Ok(_) => Ok(Here::Whiteout),
                Err(Errno::NOENT) => Ok(Here::Nothing),
                Err(e) => Err(e),
            },
            Err(e) => Err(e),
        }
    }

    /// The same in the lowest layer of a directory, where a whiteout would hide nothing.
    pub(super) fn here_at_last(&self, dir: BorrowedFd<'_>, name: &OsStr, xattr_whiteouts: bool) -> Result<Here> {
        match layer::stat(dir, name) {
            Ok(stat) => self.seen(dir, name, xattr_whiteouts, stat),
            Err(Errno::NOENT) => Ok(Here::Nothing),
            Err(e) => Err(e),
        }
    }

    fn seen(&self, dir: BorrowedFd<'_>, name: &OsStr, xattr_whiteouts: bool, stat: Statx) -> Result<Here> {
        if marks::is_whiteout(&stat) {
            return Ok(Here::Whiteout);
        }
        let candidate = xattr_whiteouts && stat.stx_size == 0 && kind_of(&stat) == libc::S_IFREG;
        let whiteout = candidate && self.marks.is_xattr_whiteout(Object { dir, name })?;
        Ok(if whiteout { Here::Whiteout } else { Here::File(Box::new(stat)) })
    }

    /// What lies below the directory that is called `name` in the directory `at` of the parent, and is the topmost of
    /// its name. The marks of each decide how it goes on.
    pub(super) fn stack(&self, parent: &Arc<Node>, fds: &Fds, at: usize, name: &OsStr) -> Result<Stack> {
        let Opened { layer, fd: dir, .. } = &fds.list()[at];
        let (layer, dir) = (*layer, dir.as_fd());
        let mut stack = Stack {
            sources: vec![Source { layer, path: None, xattr_whiteouts: false }],
            impure: false,
            lower_path: None,
            lower: None,
        };
        if self.is_bottom(layer) {
            return Ok(stack);
        }
        let marks = self.marks.of_dir(Object { dir, name })?;
        stack.sources[0].xattr_whiteouts = marks.xattr_whiteouts;
        stack.impure = layer == UPPER && marks.impure;
        if marks.opaque || self.has_opaque_file(dir, name)? {
            return Ok(stack);
        }
        let mut way = Way::Name(name.into());
        if let Some(redirect) = marks.redirect {
            way = redirected(&redirect)?;
            if layer == UPPER {
                stack.lower_path = Some(match &way {
                    Way::Path(path) => path.clone().into(),
                    Way::Name(name) => join(&self.lower_path(parent)?, name.as_bytes()).into(),
                });
            }
        }
        if let Way::Name(_) = way {
            let redirect = self.by_name(parent, fds, at + 1, name, &mut way, &mut stack)?;
            if !redirect {
                return Ok(stack);
            }
        }
        let Way::Path(path) = way else { return Ok(stack) };
        let below = stack.sources.last().map_or(layer, |s| s.layer) + 1;
        self.by_path(below, path, &mut stack)?;
        Ok(stack)
    }

    /// Whether files hide what is below a directory: one in it, or a whiteout of its name beside it.
    fn has_opaque_file(&self, dir: BorrowedFd<'_>, name: &OsStr) -> Result<bool> {
        let mut inside = name.to_owned();
        inside.push("/");
        inside.push(marks::OPAQUE);
        for path in [inside, marks::whiteout_name(name)] {
            match layer::stat(dir, &path) {
                Ok(_) => return Ok(true),
                Err(Errno::NOENT | Errno::NOTDIR | Errno::NAMETOOLONG) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(false)
    }

    /// Goes on in the parent's lower directories. `true`: it goes on by a path, from a layer's root.
    fn by_name(
        &self,
        parent: &Arc<Node>,
        fds: &Fds,
        first: usize,
        own: &OsStr,
        way: &mut Way,
        stack: &mut Stack,
    ) -> Result<bool> {
        for opened in &fds.list()[first..] {
            let Way::Name(name) = &*way else { return Ok(true) };
            let (layer, dir) = (opened.layer, opened.fd.as_fd());
            let stat = match self.here(dir, name, opened.xattr_whiteouts)? {
                Here::Nothing => continue,
                Here::File(stat) if kind_of(&stat) == libc::S_IFDIR => stat,
                Here::Whiteout | Here::File(_) => return Ok(false),
            };
            let path = match **name == *own {
                true => None,
                false => Some(join(&self.layer_path(parent, layer)?, name.as_bytes()).into()),
            };
            stack.lower.get_or_insert(stat);
            stack.sources.push(Source { layer, path, xattr_whiteouts: false });
            if self.is_bottom(layer) {
                return Ok(false);
            }
            let marks = self.marks.of_dir(Object { dir, name })?;
            if let Some(source) = stack.sources.last_mut() {
                source.xattr_whiteouts = marks.xattr_whiteouts;
            }
            if marks.opaque || self.has_opaque_file(dir, name)? {
                return Ok(false);
            }
            if let Some(redirect) = marks.redirect {
                *way = redirected(&redirect)?;
            }
        }
        Ok(matches!(way, Way::Path(_)))
    }

    /// Goes on by a path from the layers' roots, as after an absolute redirect.
    fn by_path(&self, first: u16, mut path: Vec<u8>, stack: &mut Stack) -> Result<()> {
        for layer in first..=self.lowers.len() as u16 {
            let step = self.walk(layer, &path)?;
            if let Some(stat) = step.found {
                stack.lower.get_or_insert(stat);
                stack.sources.push(Source { layer, path: Some(path.into()), xattr_whiteouts: step.xattr_whiteouts });
            }
            match step.below {
                Some(below) => path = below,
                None => return Ok(()),
            }
        }
        Ok(())
    }

    /// Follows a path in one layer, minding the marks of all directories on it.
    fn walk(&self, layer: u16, path: &[u8]) -> Result<Step> {
        let mut step = Step { found: None, xattr_whiteouts: false, below: Some(path.to_vec()) };
        let Some(parts) = parts(path) else { return Err(Errno::STALE) };
        let mut dir = open_dir(self.layer_root(layer), OsStr::new("."))?;
        let mut xattr_whiteouts = false;
        let mut below = Some(Vec::new());
        for (i, part) in parts.iter().enumerate() {
            let stat = match self.here(dir.as_fd(), part, xattr_whiteouts)? {
                Here::Nothing => {
                    let rest = parts[i..].iter().map(|p| p.as_bytes());
                    step.below = below.map(|b| rest.fold(b, |path, part| join(&path, part)));
                    return Ok(step);
                }
                Here::File(stat) if kind_of(&stat) == libc::S_IFDIR => stat,
                Here::Whiteout | Here::File(_) => {
                    step.below = None;
                    return Ok(step);
                }
            };
            let marks = self.marks.of_dir(Object { dir: dir.as_fd(), name: part })?;
            let opaque = marks.opaque || self.has_opaque_file(dir.as_fd(), part)?;
            below = match (below, opaque, marks.redirect) {
                (None, ..) | (_, true, _) => None,
                (Some(b), false, None) => Some(join(&b, part.as_bytes())),
                (Some(b), false, Some(redirect)) => Some(match redirected(&redirect)? {
                    Way::Path(path) => path,
                    Way::Name(name) => join(&b, name.as_bytes()),
                }),
            };
            dir = open_dir(dir.as_fd(), part)?;
            xattr_whiteouts = marks.xattr_whiteouts;
            step.xattr_whiteouts = xattr_whiteouts;
            step.found = (i + 1 == parts.len()).then_some(stat);
        }
        step.below = below;
        Ok(step)
    }
}

/// One layer's part of a walk.
struct Step {
    /// The directory at the end of the path.
    found: Option<Box<Statx>>,
    xattr_whiteouts: bool,
    /// The path in the layers below; `None`: they are hidden.
    below: Option<Vec<u8>>,
}

/// A redirect, which comes from disk: an absolute path, or one name in the same parent.
fn redirected(redirect: &[u8]) -> Result<Way> {
    match redirect {
        [b'/', ..] if parts(redirect).is_some_and(|p| !p.is_empty()) => Ok(Way::Path(redirect[1..].to_vec())),
        [] | [b'/', ..] => Err(Errno::STALE),
        name if name.contains(&b'/') || name == b".." || name == b"." || name.contains(&0) => Err(Errno::STALE),
        name => Ok(Way::Name(OsStr::from_bytes(name).into())),
    }
}

pub(super) fn join(path: &[u8], name: &[u8]) -> Vec<u8> {
    match path {
        [] => name.to_vec(),
        _ => [path, b"/", name].concat(),
    }
}

/// `S_IFMT` bits.
pub(super) fn kind_of(stat: &Statx) -> u32 {
    u32::from(stat.stx_mode) & libc::S_IFMT
}
