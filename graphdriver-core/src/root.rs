//! Directories by descriptor: everything that comes from a layer tar or from a user resolves beneath its root.

use crate::{Cancel, Context, Error, ErrorKind, FileKind, Metadata, Result, Timestamp};
use rustix::{
    fs::{self, AtFlags, Mode, OFlags, ResolveFlags, StatxFlags},
    io::Errno,
};
use std::{
    collections::BTreeMap,
    ffi::{OsStr, OsString},
    fs::File,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::ffi::{OsStrExt, OsStringExt},
    },
    path::{Component, Path, PathBuf},
};

/// A directory that every path given to it resolves beneath, symlinks and `..` included (`openat2(2)`,
/// `RESOLVE_IN_ROOT`): an absolute symlink starts at this root, and nothing leads out.
#[derive(Debug)]
pub struct Root {
    fd: OwnedFd,
    cancel: Cancel,
}

/// An inode with what tells it from others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inode {
    /// What layer tars keep of it.
    pub meta: Metadata,
    /// The device its filesystem reports.
    pub dev: u64,
    /// Its number there.
    pub ino: u64,
    /// Names it has.
    pub nlink: u32,
    /// The last change to its metadata or content, which no program can set.
    pub ctime: Timestamp,
    /// Bytes allocated.
    pub allocated: u64,
}

impl Root {
    /// Opens a directory of the host as a root. `path` itself resolves as usual.
    pub fn open(path: &Path) -> Result<Root> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = fs::open(path, flags, Mode::empty()).doing(|| format!("opening directory {}", path.display()))?;
        Ok(Root::from_fd(fd))
    }

    /// A root whose descriptor is open already, a detached mount for example.
    pub fn from_fd(fd: OwnedFd) -> Root {
        Root { fd, cancel: Cancel::default() }
    }

    /// Makes [walks](crate::walk) over it fail with `Interrupted` when `cancel` is set.
    pub fn cancelled_by(self, cancel: &Cancel) -> Root {
        Root { cancel: cancel.clone(), ..self }
    }

    /// What makes walks over it stop.
    pub(crate) fn cancel(&self) -> &Cancel {
        &self.cancel
    }

    /// Opens what `path` names. An empty path, `/` and `.` are the root. A symlink as the last component is followed
    /// unless `flags` say `NOFOLLOW`.
    pub fn resolve(&self, path: &Path, flags: OFlags, mode: Mode) -> rustix::io::Result<OwnedFd> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        // A concurrent rename anywhere can make a resolution with `..` give up: openat2(2), EAGAIN.
        for _ in 0..128 {
            match fs::openat2(&self.fd, path, flags | OFlags::CLOEXEC, mode, resolve) {
                Err(Errno::AGAIN) => continue,
                other => return other,
            }
        }
        Err(Errno::AGAIN)
    }

    /// Opens a directory for reading.
    pub fn open_dir(&self, path: &Path) -> rustix::io::Result<OwnedFd> {
        self.resolve(path, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty())
    }

    /// Opens a directory that `path` reaches without a symlink on the way, however long `path` is (`open(2)` takes no
    /// more than `PATH_MAX` bytes at once).
    pub fn open_dir_nofollow(&self, path: &Path) -> rustix::io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        let mut dir = fs::openat2(&self.fd, ".", flags, Mode::empty(), resolve)?;
        let mut rest = path.as_os_str().as_bytes();
        while !rest.is_empty() {
            let cut = if rest.len() < libc::PATH_MAX as usize {
                rest.len()
            } else {
                let head = &rest[..libc::PATH_MAX as usize - 1];
                head.iter().rposition(|b| *b == b'/').ok_or(Errno::NAMETOOLONG)?
            };
            dir = fs::openat2(&dir, OsStr::from_bytes(&rest[..cut]), flags, Mode::empty(), resolve)?;
            rest = rest.get(cut + 1..).unwrap_or_default();
        }
        Ok(dir)
    }

    /// Opens a regular file for reading; a symlink as the last component is not followed, and a FIFO does not block.
    pub fn open_file(&self, path: &Path) -> Result<File> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
        let fd = self.resolve(path, flags, Mode::empty())?;
        if fs::FileType::from_raw_mode(fs::fstat(&fd)?.st_mode) != fs::FileType::RegularFile {
            return Err(Error::new(ErrorKind::InvalidInput, format!("{} is no regular file", path.display())));
        }
        Ok(fd.into())
    }

    /// The directory `path` lies in, symlinks followed beneath the root, and its last name. Fails for the root itself.
    pub fn parent<'p>(&self, path: &'p Path) -> Result<(OwnedFd, &'p OsStr)> {
        let name = match path.components().next_back() {
            Some(Component::Normal(name)) => name,
            _ => return Err(Error::new(ErrorKind::InvalidInput, format!("{:?} does not end in a name", path))),
        };
        let dir =
            self.resolve(path.parent().unwrap_or(Path::new("")), OFlags::PATH | OFlags::DIRECTORY, Mode::empty())?;
        Ok((dir, name))
    }

    /// What `path` is; a symlink as the last component is not followed. None if it is not there, or if something on the
    /// way is no directory.
    pub fn inode(&self, path: &Path) -> Result<Option<Inode>> {
        let found = match self.resolve(path, OFlags::PATH | OFlags::NOFOLLOW, Mode::empty()) {
            Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
            Err(e) => Err(e.into()),
            Ok(fd) => inode_at(fd.as_fd(), OsStr::new("")).map(Some),
        };
        found.doing(|| format!("looking at {}", path.display()))
    }
}

impl AsFd for Root {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// What the name `name` in `dir` is, symlinks not followed; with an empty name what `dir` itself is, which may then be
/// any inode opened with `O_PATH`.
pub fn inode_at(dir: BorrowedFd<'_>, name: &OsStr) -> Result<Inode> {
    let mut inode = stat_at(dir, name)?;
    inode.meta.xattrs = xattrs_at(dir, name)?;
    Ok(inode)
}

/// The same without its extended attributes, which cost several system calls.
pub fn stat_at(dir: BorrowedFd<'_>, name: &OsStr) -> Result<Inode> {
    let want = StatxFlags::BASIC_STATS;
    let at = AtFlags::SYMLINK_NOFOLLOW | AtFlags::EMPTY_PATH | AtFlags::NO_AUTOMOUNT;
    let st = fs::statx(dir, name, at, want)?;
    let (major, minor) = (st.stx_rdev_major, st.stx_rdev_minor);
    let kind = match fs::FileType::from_raw_mode(st.stx_mode.into()) {
        fs::FileType::RegularFile => FileKind::File { size: st.stx_size },
        fs::FileType::Directory => FileKind::Directory,
        fs::FileType::Symlink => {
            let target = fs::readlinkat(dir, name, Vec::new())?;
            FileKind::Symlink { target: OsString::from_vec(target.into_bytes()).into() }
        }
        fs::FileType::CharacterDevice => FileKind::CharDevice { major, minor },
        fs::FileType::BlockDevice => FileKind::BlockDevice { major, minor },
        fs::FileType::Fifo => FileKind::Fifo,
        _ => FileKind::Socket,
    };
    let time = |t: fs::StatxTimestamp| Timestamp { secs: t.tv_sec, nanos: t.tv_nsec };
    Ok(Inode {
        meta: Metadata {
            kind,
            mode: u32::from(st.stx_mode) & 0o7777,
            uid: st.stx_uid,
            gid: st.stx_gid,
            mtime: time(st.stx_mtime),
            xattrs: BTreeMap::new(),
        },
        dev: fs::makedev(st.stx_dev_major, st.stx_dev_minor),
        ino: st.stx_ino,
        nlink: st.stx_nlink,
        ctime: time(st.stx_ctime),
        allocated: st.stx_blocks * 512,
    })
}

/// All extended attributes the caller may see, ACLs once. A filesystem without any has none.
pub fn xattrs_at(dir: BorrowedFd<'_>, name: &OsStr) -> Result<BTreeMap<OsString, Vec<u8>>> {
    let path = proc_path(dir, name);
    let follow = name.is_empty();
    let listed = if follow { xattr::list_deref(&path) } else { xattr::list(&path) };
    let names = match listed {
        Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => return Ok(BTreeMap::new()),
        other => other?,
    };
    let mut all = BTreeMap::new();
    for attr in names {
        // xfs shows root its ACLs a second time, in its own encoding (kernel fs/xfs/xfs_xattr.c).
        if attr.as_bytes().starts_with(b"trusted.SGI_ACL_") {
            continue;
        }
        let value = if follow { xattr::get_deref(&path, &attr) } else { xattr::get(&path, &attr) };
        match value {
            Ok(Some(value)) => drop(all.insert(attr, value)),
            Ok(None) => {}
            // SELinux and some FUSE filesystems list what they do not give.
            Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENODATA)) => {}
            Err(e) => return Err(Error::from(e).doing(format!("reading attribute {}", attr.display()))),
        }
    }
    Ok(all)
}

/// Sets one extended attribute of the name `name` in `dir` (of `dir` itself if empty), symlinks not followed.
pub fn set_xattr_at(dir: BorrowedFd<'_>, name: &OsStr, attr: &OsStr, value: &[u8]) -> Result<()> {
    let path = proc_path(dir, name);
    let set = if name.is_empty() { xattr::set_deref(&path, attr, value) } else { xattr::set(&path, attr, value) };
    set.doing(|| format!("setting attribute {}", attr.display()))
}

/// A path that names `name` in `dir` for the calls that take no descriptor. The descriptor's own link is followed by
/// the kernel, a final symlink is not. With an empty name the link itself has to be followed by the caller's call.
pub fn proc_path(dir: BorrowedFd<'_>, name: &OsStr) -> PathBuf {
    let mut path = format!("/proc/self/fd/{}", dir.as_raw_fd()).into_bytes();
    if !name.is_empty() {
        path.push(b'/');
        path.extend_from_slice(name.as_bytes());
    }
    OsString::from_vec(path).into()
}

/// The names in a directory, sorted by their bytes, without `.` and `..`.
pub fn names_in(dir: BorrowedFd<'_>) -> Result<Vec<OsString>> {
    let mut names = Vec::new();
    for entry in fs::Dir::read_from(dir)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(OsString::from_vec(name.to_vec()));
        }
    }
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn nothing_leads_out_of_the_root() {
        let outside = tempfile::tempdir().unwrap();
        std::fs::write(outside.path().join("secret"), "s").unwrap();
        let inside = outside.path().join("root");
        std::fs::create_dir_all(inside.join("etc")).unwrap();
        symlink(outside.path(), inside.join("abs")).unwrap();
        symlink("../..", inside.join("etc/up")).unwrap();
        let root = Root::open(&inside).unwrap();
        for path in ["../secret", "abs/secret", "etc/up/secret", "/../secret", "etc/../../secret"] {
            assert_eq!(root.open_file(Path::new(path)).unwrap_err().kind(), ErrorKind::NotFound, "{path}");
            assert_eq!(root.inode(Path::new(path)).unwrap(), None, "{path}");
        }
        std::fs::write(inside.join("hosts"), "h").unwrap();
        root.open_file(Path::new("etc/up/hosts")).unwrap();
    }

    #[test]
    fn sees_links_as_links_and_their_attributes() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("file"), "x").unwrap();
        xattr::set(dir.path().join("file"), "user.a", b"1").unwrap();
        symlink("file", dir.path().join("link")).unwrap();
        let root = Root::open(dir.path()).unwrap();
        let link = root.inode(Path::new("link")).unwrap().unwrap();
        assert_eq!(link.meta.kind, FileKind::Symlink { target: "file".into() });
        assert!(link.meta.xattrs.is_empty());
        let by_path = root.inode(Path::new("file")).unwrap().unwrap();
        assert_eq!(by_path, inode_at(root.as_fd(), OsStr::new("file")).unwrap());
        assert_eq!(by_path.meta.xattrs.get(OsStr::new("user.a")).unwrap(), b"1");
        assert_eq!(names_in(root.as_fd()).unwrap(), ["file", "link"]);
    }

    #[test]
    fn a_fifo_does_not_block_and_is_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::open(dir.path()).unwrap();
        fs::mknodat(&root, "p", fs::FileType::Fifo, Mode::RUSR, 0).unwrap();
        assert_eq!(root.open_file(Path::new("p")).unwrap_err().kind(), ErrorKind::InvalidInput);
    }
}
