//! The sink that makes a layer's tree in a directory.

use super::{Content, Sink, Whiteouts, header::corrupt, record::Recorder};
use crate::{
    Context, Error, ErrorKind, EscapeXattrs, FileKind, Metadata, OverlayXattrs, Result, Root, Timestamp,
    root::{names_in, proc_path, set_xattr_at, xattrs_at},
};
use rustix::{
    fs::{self, AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps, Uid},
    io::Errno,
};
use std::{
    borrow::Cow,
    cell::{Cell, RefCell},
    collections::{BTreeMap, BTreeSet, HashSet, hash_map::RandomState},
    ffi::{OsStr, OsString},
    fs::File,
    hash::BuildHasher,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{ffi::OsStrExt, fs::FileExt},
    },
    path::{Component, Path, PathBuf},
    rc::Rc,
};

/// Contents that are larger are compared with the free space first, so that a huge one fails before it fills the disk.
const CHECK_SPACE_FROM: u64 = 64 << 20;
/// As many as the kernel follows (`MAXSYMLINKS`, path_resolution(7)).
const MAX_SYMLINKS: usize = 40;
/// No entry of a layer can have this name, because `.wh.` is never part of a name on disk.
const TEMPORARY_LINK: &str = ".wh..graphdriver";

/// Unpacks beneath a root. Everything is reached through descriptors of *canonical* paths: relative to the root, free of
/// symlinks. The record refers to those, so that a symlink replaced later changes nothing.
pub(super) struct FsSink<'a> {
    root: &'a Root,
    whiteouts: Whiteouts,
    /// For `cp`: what is there was not made by a layer, and is dear to somebody.
    copying: bool,
    /// Whether an entry may lie below a symlink.
    follow: bool,
    recorder: Option<&'a RefCell<Recorder>>,
    /// Where the last entry went: most entries follow their sibling.
    last_parent: Option<Rc<Parent>>,
    /// In a merged tree: hashes of the canonical paths this layer put or changed something at or below. Keyed at random,
    /// so that no archive can contrive collisions.
    ours: HashSet<u64>,
    hasher: RandomState,
    /// Applied at the end, because every file made in a directory changes its time.
    directory_times: BTreeMap<PathBuf, Timestamp>,
    /// Directories of a layer by itself that no entry describes.
    implied: BTreeSet<PathBuf>,
    buffer: Vec<u8>,
}

struct Parent {
    /// As the entry named it.
    named: PathBuf,
    canonical: PathBuf,
    fd: OwnedFd,
    /// It has a default ACL, which what is made in it inherits (acl(5)) and must lose.
    default_acl: bool,
    /// It was told to overlayfs as a directory with deletions in it.
    has_whiteouts: Cell<bool>,
}

/// A name in a directory that is open.
struct Place {
    parent: Rc<Parent>,
    name: OsString,
    canonical: PathBuf,
}

impl Place {
    fn dir(&self) -> BorrowedFd<'_> {
        self.parent.fd.as_fd()
    }

    fn stat(&self) -> rustix::io::Result<Stat> {
        fs::statat(self.dir(), &self.name, AtFlags::SYMLINK_NOFOLLOW)
    }
}

impl<'a> FsSink<'a> {
    pub fn new(root: &'a Root, whiteouts: Whiteouts, recorder: Option<&'a RefCell<Recorder>>) -> Self {
        FsSink {
            root,
            whiteouts,
            copying: false,
            follow: true,
            recorder,
            last_parent: None,
            ours: HashSet::new(),
            hasher: RandomState::new(),
            directory_times: BTreeMap::new(),
            implied: BTreeSet::from([PathBuf::new()]),
            buffer: vec![0; 128 << 10],
        }
    }

    /// For a tar that is no layer: replaces files whole or not at all, and never a directory by something else or
    /// something else by a directory. Without `follow` entries below symlinks are refused.
    pub fn copying(root: &'a Root, follow: bool) -> Self {
        FsSink { copying: true, follow, ..FsSink::new(root, Whiteouts::Merged, None) }
    }

    /// The directories that only the layers below can describe; see [`inherit`](super::inherit).
    pub fn implied(&mut self) -> Vec<PathBuf> {
        match self.whiteouts {
            Whiteouts::Merged => Vec::new(),
            // What was a directory once may have been replaced since.
            Whiteouts::Overlay { .. } => {
                let implied = std::mem::take(&mut self.implied);
                implied.into_iter().filter(|path| self.open_dir(path).is_ok()).collect()
            }
        }
    }

    /// Opens a canonical directory; anything that would be followed is an error.
    fn open_dir(&self, canonical: &Path) -> rustix::io::Result<OwnedFd> {
        let path = if canonical.as_os_str().is_empty() { Path::new(".") } else { canonical };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        fs::openat2(self.root, path, flags, Mode::empty(), ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS)
    }

    /// The directory an entry goes into, made if it is missing.
    fn parent_of(&mut self, path: &Path) -> Result<Rc<Parent>> {
        let named = path.parent().unwrap_or(Path::new(""));
        self.directory(named)
    }

    fn directory(&mut self, named: &Path) -> Result<Rc<Parent>> {
        if let Some(last) = self.last_parent.as_ref().filter(|last| last.named.as_os_str() == named.as_os_str()) {
            return Ok(last.clone());
        }
        let (canonical, fd) = match self.open_dir(named) {
            Err(Errno::NOENT | Errno::LOOP | Errno::NOTDIR) => {
                let canonical = self.make_dirs(named)?;
                let fd = self.open_dir(&canonical)?;
                (canonical, fd)
            }
            opened => (named.to_owned(), opened?),
        };
        self.claim(&canonical);
        // A directory that no entry describes keeps its time, whatever is put into it.
        if !self.directory_times.contains_key(&canonical) {
            let stat = fs::fstat(&fd)?;
            let mtime = Timestamp { secs: stat.st_mtime, nanos: stat.st_mtime_nsec as u32 };
            self.directory_times.insert(canonical.clone(), mtime);
        }
        let acl = xattr::get_deref(proc_path(fd.as_fd(), OsStr::new("")), "system.posix_acl_default");
        let default_acl = matches!(acl, Ok(Some(_)));
        let has_whiteouts = Cell::new(false);
        let parent = Rc::new(Parent { named: named.to_owned(), canonical, fd, default_acl, has_whiteouts });
        self.last_parent = Some(parent.clone());
        Ok(parent)
    }

    fn place(&mut self, path: &Path) -> Result<Place> {
        let name = path.file_name().ok_or_else(|| corrupt("the root directory can be a directory only"))?.to_owned();
        let parent = self.parent_of(path)?;
        let canonical = parent.canonical.join(&name);
        Ok(Place { parent, name, canonical })
    }

    /// Follows `named` by its symlinks, beneath the root, and makes the directories that are missing.
    fn make_dirs(&mut self, named: &Path) -> Result<PathBuf> {
        let mut canonical = PathBuf::new();
        let mut pending: Vec<OsString> = named.iter().rev().map(OsStr::to_owned).collect();
        let mut symlinks = 0;
        while let Some(name) = pending.pop() {
            if name == ".." {
                canonical.pop();
                continue;
            }
            let fd = self.open_dir(&canonical)?;
            let next = canonical.join(&name);
            match fs::statat(&fd, &name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) if file_type(&stat) == FileType::Symlink => {
                    if !self.follow {
                        return Err(corrupt(format!("{} is a symlink", next.display())));
                    }
                    symlinks += 1;
                    if symlinks > MAX_SYMLINKS {
                        return Err(corrupt(format!("too many symlinks on the way to {}", named.display())));
                    }
                    let target = fs::readlinkat(&fd, &name, Vec::new())?;
                    let target = Path::new(OsStr::from_bytes(target.as_bytes()));
                    if target.is_absolute() {
                        canonical.clear();
                    }
                    pending.extend(target.components().rev().filter_map(|c| match c {
                        Component::Normal(name) => Some(name.to_owned()),
                        Component::ParentDir => Some("..".into()),
                        _ => None,
                    }));
                    continue;
                }
                Ok(stat) if file_type(&stat) == FileType::Directory => {}
                Ok(stat) if is_whiteout(&stat) || !self.is_ours(&next) => {
                    fs::unlinkat(&fd, &name, AtFlags::empty())?;
                    self.make_parent(fd.as_fd(), &name, true)?;
                }
                Ok(_) => return Err(corrupt(format!("{} is no directory", next.display()))),
                Err(Errno::NOENT) => {
                    self.make_parent(fd.as_fd(), &name, false)?;
                    self.implied.insert(next.clone());
                }
                Err(e) => return Err(e.into()),
            }
            canonical = next;
        }
        Ok(canonical)
    }

    /// A directory that the tar names only as the parent of something.
    fn make_parent(&self, dir: BorrowedFd<'_>, name: &OsStr, hides: bool) -> Result<()> {
        fs::mkdirat(dir, name, Mode::RWXU)?;
        fs::chownat(dir, name, Some(Uid::ROOT), Some(Gid::ROOT), AtFlags::SYMLINK_NOFOLLOW)?;
        chmod(dir, name, 0o755)?;
        if hides { self.mark_opaque(dir, name) } else { Ok(()) }
    }

    /// Marks a path and what leads to it as this layer's, in a merged tree.
    fn claim(&mut self, canonical: &Path) {
        if self.whiteouts == Whiteouts::Merged {
            // Who has a path has its ancestors.
            for path in canonical.ancestors() {
                if !self.ours.insert(self.hasher.hash_one(path.as_os_str())) {
                    break;
                }
            }
        }
    }

    fn is_ours(&self, canonical: &Path) -> bool {
        self.whiteouts != Whiteouts::Merged || self.ours.contains(&self.hasher.hash_one(canonical.as_os_str()))
    }

    /// In overlayfs's format: nothing below this directory shows through. A merged tree has nothing below.
    fn mark_opaque(&self, dir: BorrowedFd<'_>, name: &OsStr) -> Result<()> {
        match self.whiteouts {
            Whiteouts::Overlay { xattrs, .. } => {
                set_xattr_at(dir, name, OsStr::new(&format!("{}opaque", xattrs.prefix())), b"y")
            }
            Whiteouts::Merged => Ok(()),
        }
    }

    /// Tells overlayfs that there are deletions in `parent`. It looks for them in directories that merge several layers, and
    /// otherwise only where the xattr `origin` is, be it empty (kernel fs/overlayfs/inode.c, `ovl_get_inode`); else
    /// a deletion of what no lower layer has shows up as a name that cannot be looked at.
    fn mark_whiteouts(&self, parent: &Parent) -> Result<()> {
        match self.whiteouts {
            Whiteouts::Overlay { xattrs, .. } if !parent.has_whiteouts.replace(true) => {
                let origin = format!("{}origin", xattrs.prefix());
                set_xattr_at(parent.fd.as_fd(), OsStr::new(""), OsStr::new(&origin), b"")
            }
            _ => Ok(()),
        }
    }

    /// Makes something new at `place`; what is there already goes first, so that nothing is written through it.
    fn create<T>(&mut self, place: &Place, make: impl Fn() -> rustix::io::Result<T>) -> Result<T> {
        match make() {
            Err(Errno::EXIST) => {
                self.clear(place)?;
                Ok(make()?)
            }
            made => Ok(made?),
        }
    }

    fn clear(&mut self, place: &Place) -> Result<()> {
        let stat = place.stat()?;
        if self.copying && file_type(&stat) == FileType::Directory {
            return Err(keeps_directory());
        }
        if matches!(file_type(&stat), FileType::Directory | FileType::Symlink) {
            self.last_parent = None;
        }
        if file_type(&stat) != FileType::Directory {
            return self.remove(place.dir(), &place.name, &place.canonical, &stat);
        }
        self.empty(&place.canonical, false)?;
        fs::unlinkat(place.dir(), &place.name, AtFlags::REMOVEDIR)?;
        self.forget_times(&place.canonical);
        Ok(())
    }

    fn forget_times(&mut self, removed: &Path) {
        let below = self.directory_times.range(removed.to_owned()..).map(|(path, _)| path);
        let below: Vec<_> = below.take_while(|path| path.starts_with(removed)).cloned().collect();
        for path in below {
            self.directory_times.remove(&path);
        }
    }

    /// Removes what is no directory; content that the record refers to moves there.
    fn remove(&self, dir: BorrowedFd<'_>, name: &OsStr, canonical: &Path, stat: &Stat) -> Result<()> {
        let content = file_type(stat) == FileType::RegularFile && stat.st_size > 0;
        match self.recorder {
            Some(recorder) if content && self.is_ours(canonical) => {
                recorder.borrow_mut().move_aside(dir, name, canonical)
            }
            _ => Ok(fs::unlinkat(dir, name, AtFlags::empty())?),
        }
    }

    /// Removes what is in a directory, if `keep_ours` only what comes from the layers below. No descriptor is held
    /// while it descends, because a hostile tree is deeper than a process may have open files.
    fn empty(&mut self, canonical: &Path, keep_ours: bool) -> Result<()> {
        let mut directories = Vec::new();
        let fd = self.open_dir(canonical)?;
        let readable = fs::openat(&fd, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        for name in names_in(readable.as_fd())? {
            let stat = fs::statat(&fd, &name, AtFlags::SYMLINK_NOFOLLOW)?;
            let path = canonical.join(&name);
            let keep = keep_ours && self.is_ours(&path);
            if file_type(&stat) == FileType::Directory {
                directories.push((name, path, keep));
            } else if !keep {
                self.remove(fd.as_fd(), &name, &path, &stat)?;
            }
        }
        drop((fd, readable));
        for (_, path, _) in &directories {
            self.empty(path, keep_ours)?;
        }
        let fd = self.open_dir(canonical)?;
        for (name, ..) in directories.iter().filter(|(.., keep)| !keep) {
            fs::unlinkat(&fd, name, AtFlags::REMOVEDIR)?;
        }
        Ok(())
    }

    fn file(&mut self, place: &Place, meta: &Metadata, content: Option<Content<'_>>) -> Result<()> {
        if !self.copying {
            return self.new_file(place, meta, content);
        }
        let name = OsString::from(format!(".graphdriver-cp-{}", std::process::id()));
        let new = Place { parent: place.parent.clone(), name, canonical: place.canonical.clone() };
        let put = self.new_file(&new, meta, content).and_then(|()| {
            let renamed = fs::renameat(new.dir(), &new.name, place.dir(), &place.name);
            renamed.map_err(|e| if e == Errno::ISDIR { keeps_directory() } else { e.into() })
        });
        if put.is_err() {
            let _ = fs::unlinkat(new.dir(), &new.name, AtFlags::empty());
        }
        put
    }

    fn new_file(&mut self, place: &Place, meta: &Metadata, content: Option<Content<'_>>) -> Result<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR;
        let file = File::from(self.create(place, || fs::openat(place.dir(), &place.name, flags, mode))?);
        if let Some(content) = content {
            self.write(&file, place, content)?;
        }
        // In this order: chown clears setuid and file capabilities, and so does a write.
        let owned = fs::fchown(&file, Some(Uid::from_raw(meta.uid)), Some(Gid::from_raw(meta.gid)));
        owned.map_err(|e| no_owner(e, meta))?;
        fs::fchmod(&file, Mode::from_raw_mode(meta.mode))?;
        self.set_xattrs(place, meta)?;
        fs::futimens(&file, &timestamps(meta.mtime))?;
        Ok(())
    }

    fn write(&mut self, file: &File, place: &Place, mut content: Content<'_>) -> Result<()> {
        let stored: u64 = content.segments.iter().map(|s| s.len).sum();
        if stored > CHECK_SPACE_FROM {
            self.check_space(stored)?;
        }
        if let Some(recorder) = self.recorder {
            recorder.borrow_mut().content(&place.canonical, &content.segments)?;
        }
        let mut end = 0;
        for segment in &content.segments {
            let (mut at, mut rest) = (segment.offset, segment.len);
            while rest > 0 {
                let len = rest.min(self.buffer.len() as u64) as usize;
                content.data.read_exact(&mut self.buffer[..len])?;
                file.write_all_at(&self.buffer[..len], at)?;
                (at, rest) = (at + len as u64, rest - len as u64);
            }
            end = at;
        }
        if end != content.size {
            file.set_len(content.size)?;
        }
        Ok(())
    }

    fn check_space(&self, wanted: u64) -> Result<()> {
        let space = fs::fstatvfs(self.root)?;
        let free = space.f_bfree.saturating_mul(space.f_frsize);
        if free < wanted {
            let reason = format!("its content has {wanted} bytes, and {free} are free");
            return Err(Error::new(ErrorKind::OutOfSpace, reason).hint("free some space, or choose another data root"));
        }
        Ok(())
    }

    fn put_directory(&mut self, place: &Place, meta: &Metadata) -> Result<()> {
        let make = || fs::mkdirat(place.dir(), &place.name, Mode::RWXU);
        match make() {
            Err(Errno::EXIST) if file_type(&place.stat()?) == FileType::Directory => self.drop_xattrs(place, meta)?,
            Err(Errno::EXIST) if self.copying => {
                let reason = "there is something that is no directory, and a directory does not overwrite it";
                return Err(Error::new(ErrorKind::InvalidInput, reason).hint("remove it first"));
            }
            Err(Errno::EXIST) => {
                self.clear(place)?;
                make()?;
                // What it replaces hid the layers below, be it a deletion or a file.
                self.mark_opaque(place.dir(), &place.name)?;
            }
            made => made?,
        }
        self.attributes(place, meta)?;
        self.implied.remove(&place.canonical);
        self.directory_times.insert(place.canonical.clone(), meta.mtime);
        Ok(())
    }

    /// A directory that is there already keeps no attribute the entry does not name.
    fn drop_xattrs(&self, place: &Place, meta: &Metadata) -> Result<()> {
        for attr in xattrs_at(place.dir(), &place.name)?.into_keys() {
            // The host's security module sets this one anew on whatever is made.
            let keep = attr == "security.selinux" || self.is_overlay_own(&attr);
            if !keep && !meta.xattrs.contains_key(&attr) {
                xattr::remove(proc_path(place.dir(), &place.name), &attr)
                    .doing(|| format!("removing attribute {}", attr.display()))?;
            }
        }
        Ok(())
    }

    /// The attributes of what is no regular file; never through a symlink.
    fn attributes(&self, place: &Place, meta: &Metadata) -> Result<()> {
        let nofollow = AtFlags::SYMLINK_NOFOLLOW;
        let (uid, gid) = (Uid::from_raw(meta.uid), Gid::from_raw(meta.gid));
        fs::chownat(place.dir(), &place.name, Some(uid), Some(gid), nofollow).map_err(|e| no_owner(e, meta))?;
        // A symlink has no mode of its own on Linux.
        if !matches!(meta.kind, FileKind::Symlink { .. }) {
            chmod(place.dir(), &place.name, meta.mode)?;
        }
        self.set_xattrs(place, meta)?;
        fs::utimensat(place.dir(), &place.name, &timestamps(meta.mtime), nofollow)?;
        Ok(())
    }

    fn set_xattrs(&self, place: &Place, meta: &Metadata) -> Result<()> {
        if place.parent.default_acl {
            self.drop_xattrs(place, meta)?;
        }
        for (attr, value) in &meta.xattrs {
            match set_xattr_at(place.dir(), &place.name, &self.name_on_disk(attr)?, value) {
                // A label is the host's policy, and a host without one has nowhere to put it; Docker drops it too.
                Err(e) if e.kind() == ErrorKind::Unsupported && attr == "security.selinux" => {}
                set => set.hint(|| "the data root's filesystem must support this kind of attribute")?,
            }
        }
        Ok(())
    }

    /// Whether overlayfs would heed this attribute on disk.
    fn is_overlay_own(&self, attr: &OsStr) -> bool {
        self.overlays(attr).is_some_and(|(_, rest)| !rest.starts_with(b"overlay."))
    }

    /// The prefix, and what follows it, of an attribute in a namespace that is heeded.
    fn overlays<'n>(&self, attr: &'n OsStr) -> Option<(&'static str, &'n [u8])> {
        let Whiteouts::Overlay { xattrs, escape } = self.whiteouts else { return None };
        let heeded = |namespace: &OverlayXattrs| *namespace == xattrs || escape == EscapeXattrs::Both;
        let mut namespaces = [OverlayXattrs::Trusted, OverlayXattrs::User].into_iter().filter(heeded);
        namespaces.find_map(|namespace| {
            Some((namespace.prefix(), attr.as_bytes().strip_prefix(namespace.prefix().as_bytes())?))
        })
    }

    /// Attributes in overlayfs's namespace are escaped by another `overlay.` (kernel
    /// Documentation/filesystems/overlayfs.rst, "Nesting overlayfs mounts").
    fn name_on_disk<'n>(&self, attr: &'n OsStr) -> Result<Cow<'n, OsStr>> {
        let Whiteouts::Overlay { escape, .. } = self.whiteouts else { return Ok(attr.into()) };
        match self.overlays(attr) {
            None => Ok(attr.into()),
            Some((prefix, rest)) if escape != EscapeXattrs::None => {
                let name = [prefix.as_bytes(), b"overlay.", rest].concat();
                Ok(OsStr::from_bytes(&name).to_owned().into())
            }
            Some(_) => {
                let reason = format!("attribute {} is overlayfs's own and cannot be kept", attr.display());
                Err(Error::new(ErrorKind::Unsupported, reason).hint("Linux 6.8 or later can keep it"))
            }
        }
    }

    /// The directory and name of a hard link's target, which must be there.
    fn link_target<'t>(&self, target: &'t Path) -> Result<(OwnedFd, &'t OsStr)> {
        let missing = || corrupt(format!("its link target {} is not in this layer", target.display()));
        let found = match (self.follow, target.parent(), target.file_name()) {
            (true, ..) => self.root.parent(target),
            (false, Some(dir), Some(name)) => self.open_dir(dir).map(|dir| (dir, name)).map_err(Error::from),
            (false, ..) => return Err(missing()),
        };
        let (dir, name) = found.map_err(|e| match e.kind() {
            ErrorKind::NotFound | ErrorKind::InvalidInput => missing(),
            _ => e,
        })?;
        match fs::statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) if is_whiteout(&stat) => Err(missing()),
            Ok(stat) if file_type(&stat) == FileType::Directory => {
                Err(corrupt(format!("its link target {} is a directory", target.display())))
            }
            Ok(_) => Ok((dir, name)),
            Err(Errno::NOENT) => Err(missing()),
            Err(e) => Err(e.into()),
        }
    }
}

impl Sink for FsSink<'_> {
    fn node(&mut self, path: &Path, meta: &Metadata, content: Option<Content<'_>>) -> Result<()> {
        if path.as_os_str().is_empty() && meta.kind == FileKind::Directory {
            let parent = self.directory(path)?;
            self.last_parent = None;
            let place = Place { parent, name: ".".into(), canonical: PathBuf::new() };
            return self.put_directory(&place, meta);
        }
        let place = self.place(path)?;
        self.claim(&place.canonical);
        let mut special = |kind, major, minor| {
            let make = || fs::mknodat(place.dir(), &place.name, kind, Mode::RUSR, fs::makedev(major, minor));
            self.create(&place, make)
        };
        match &meta.kind {
            FileKind::File { .. } => return self.file(&place, meta, content),
            FileKind::Directory => return self.put_directory(&place, meta),
            FileKind::Symlink { target } => {
                self.create(&place, || fs::symlinkat(target, place.dir(), &place.name))?;
            }
            FileKind::CharDevice { major: 0, minor: 0 } => {
                return Err(corrupt("it is the character device 0/0, which is no device"));
            }
            FileKind::CharDevice { major, minor } | FileKind::BlockDevice { major, minor } => {
                let block = matches!(meta.kind, FileKind::BlockDevice { .. });
                let kind = if block { FileType::BlockDevice } else { FileType::CharacterDevice };
                match special(kind, *major, *minor) {
                    // Nobody makes devices in a user namespace (mknod(2)), and containers get their own `/dev`. As the
                    // record has it, the layer's tar goes out whole all the same.
                    Err(e) if e.kind() == ErrorKind::PermissionDenied => {
                        tracing::warn!("left out the device {}: making it needs root on the host", path.display());
                        return Ok(());
                    }
                    made => made?,
                }
            }
            FileKind::Fifo => special(FileType::Fifo, 0, 0)?,
            FileKind::Socket => return Err(corrupt("it is a socket")),
        }
        self.attributes(&place, meta)
    }

    fn hard_link(&mut self, path: &Path, target: &Path) -> Result<()> {
        let place = self.place(path)?;
        let (dir, name) = self.link_target(target)?;
        self.claim(&place.canonical);
        match fs::linkat(&dir, name, place.dir(), &place.name, AtFlags::empty()) {
            // The target can be what is replaced, or lie in it: it gets its new name before that is removed.
            Err(Errno::EXIST) => {
                fs::linkat(&dir, name, place.dir(), TEMPORARY_LINK, AtFlags::empty())?;
                self.clear(&place)?;
                Ok(fs::renameat(place.dir(), TEMPORARY_LINK, place.dir(), &place.name)?)
            }
            linked => Ok(linked?),
        }
    }

    fn whiteout(&mut self, path: &Path) -> Result<()> {
        let place = self.place(path)?;
        if self.whiteouts == Whiteouts::Merged {
            return match place.stat() {
                Err(Errno::NOENT) => Ok(()),
                Ok(_) if !self.is_ours(&place.canonical) => self.clear(&place),
                Ok(stat) if file_type(&stat) == FileType::Directory => self.empty(&place.canonical, true),
                Ok(_) => Ok(()),
                Err(e) => Err(e.into()),
            };
        }
        match fs::mknodat(place.dir(), &place.name, FileType::CharacterDevice, Mode::empty(), 0) {
            Err(Errno::EXIST) if file_type(&place.stat()?) == FileType::Directory => {
                self.mark_opaque(place.dir(), &place.name)
            }
            // A file of this layer hides what is below as well as the deletion would.
            Err(Errno::EXIST) => Ok(()),
            made => {
                made?;
                self.mark_whiteouts(&place.parent)
            }
        }
    }

    fn opaque(&mut self, dir: &Path) -> Result<()> {
        let dir = self.directory(dir)?;
        match self.whiteouts {
            Whiteouts::Overlay { .. } => self.mark_opaque(dir.fd.as_fd(), OsStr::new("")),
            Whiteouts::Merged => self.empty(&dir.canonical, true),
        }
    }

    fn finish(&mut self) -> Result<()> {
        self.last_parent = None;
        for (path, time) in std::mem::take(&mut self.directory_times).into_iter().rev() {
            self.open_dir(&path)
                .and_then(|fd| fs::utimensat(fd, "", &timestamps(time), AtFlags::EMPTY_PATH))
                .doing(|| format!("setting the time of {}", path.display()))?;
        }
        Ok(())
    }
}

/// chown(2) says EINVAL of ids that the user namespace does not have.
fn no_owner(e: Errno, meta: &Metadata) -> Error {
    if e != Errno::INVAL {
        return e.into();
    }
    let reason = format!("its owner {}:{} does not exist in this user namespace", meta.uid, meta.gid);
    Error::new(ErrorKind::Unsupported, reason)
        .hint("use one with a range of ids: podman unshare, or unshare --map-auto --map-root-user --mount")
}

fn keeps_directory() -> Error {
    let reason = "there is a directory, and only a directory overwrites it";
    Error::new(ErrorKind::InvalidInput, reason).hint("remove it first")
}

/// chmod(2) without following a symlink, which a process in a live container may have put there a moment ago.
pub(super) fn chmod(dir: BorrowedFd<'_>, name: &OsStr, mode: u32) -> rustix::io::Result<()> {
    let inode = fs::openat(dir, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    fs::chmod(proc_path(inode.as_fd(), OsStr::new("")), Mode::from_raw_mode(mode))
}

fn file_type(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

fn is_whiteout(stat: &Stat) -> bool {
    file_type(stat) == FileType::CharacterDevice && stat.st_rdev == 0
}

/// Access times are the modification's, so that a layer looks the same whenever it was unpacked.
fn timestamps(time: Timestamp) -> Timestamps {
    let time = Timespec { tv_sec: time.secs, tv_nsec: time.nanos.into() };
    Timestamps { last_access: time, last_modification: time }
}
