//! overlayfs's marks on disk: whiteouts, opaque directories, redirects, and our own xattrs beside them.
//!
//! Sources: kernel `Documentation/filesystems/overlayfs.rst`; `.wh.` names: the OCI image specification's `layer.md`.

use rustix::{
    fd::{AsRawFd, BorrowedFd},
    fs::{Statx, XattrFlags},
    io::{Errno, Result},
};
use std::{
    ffi::{CString, OsStr, OsString},
    os::unix::ffi::{OsStrExt, OsStringExt},
};

/// What whiteouts are called where a device cannot be made.
pub(super) const WHITEOUT: &str = ".wh.";
/// What hides all that is below a directory, where xattrs cannot.
pub(super) const OPAQUE: &str = ".wh..wh..opq";

const TRUSTED: &str = "trusted.overlay.";
const USER: &str = "user.overlay.";
const FUSE_OVERLAYFS: &str = "user.fuseoverlayfs.";
const FUSE_OVERLAYFS_PRIVILEGED: &str = "security.fuseoverlayfs.";

/// The path by which an xattr call reaches an open file, or a name below an open directory.
pub(super) fn proc_path(dir: BorrowedFd<'_>, name: &OsStr) -> CString {
    let mut path = format!("/proc/self/fd/{}", dir.as_raw_fd()).into_bytes();
    if !name.is_empty() {
        path.push(b'/');
        path.extend_from_slice(name.as_bytes());
    }
    CString::new(path).unwrap_or_default()
}

/// An object for xattr calls: a name below a directory, or, with an empty name, an open file itself.
#[derive(Debug, Clone, Copy)]
pub(super) struct Object<'a> {
    pub dir: BorrowedFd<'a>,
    pub name: &'a OsStr,
}

impl Object<'_> {
    fn path(&self) -> CString {
        proc_path(self.dir, self.name)
    }

    /// By the descriptor itself, which costs less than its path. `None`: it is not the object, or was opened with `O_PATH`,
    /// by which the kernel tells of no xattrs.
    fn by_descriptor<T>(&self, call: impl FnOnce(BorrowedFd<'_>) -> Result<T>) -> Option<Result<T>> {
        let done = self.name.is_empty().then(|| call(self.dir))?;
        (done.as_ref().err() != Some(&Errno::BADF)).then_some(done)
    }

    /// The value; `None` if there is none, or can be none on this filesystem.
    pub fn get(&self, attr: &str) -> Result<Option<Vec<u8>>> {
        match self.read(OsStr::new(attr)) {
            Ok(value) => Ok(Some(value)),
            Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::PERM | Errno::ACCESS) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// The value, or the kernel's error.
    pub fn read(&self, attr: &OsStr) -> Result<Vec<u8>> {
        if let Some(value) = self.by_descriptor(|fd| grow(|buffer| rustix::fs::fgetxattr(fd, attr, buffer))) {
            return value;
        }
        let path = self.path();
        grow(|buffer| {
            if self.name.is_empty() {
                rustix::fs::getxattr(&path, attr, buffer)
            } else {
                rustix::fs::lgetxattr(&path, attr, buffer)
            }
        })
    }

    /// All names, each ended by NUL; none where the filesystem has no xattrs.
    pub fn list(&self) -> Result<Vec<u8>> {
        let by_path = || {
            let path = self.path();
            grow(|buffer| {
                if self.name.is_empty() {
                    rustix::fs::listxattr(&path, buffer)
                } else {
                    rustix::fs::llistxattr(&path, buffer)
                }
            })
        };
        match self.by_descriptor(|fd| grow(|buffer| rustix::fs::flistxattr(fd, buffer))).unwrap_or_else(by_path) {
            Err(Errno::OPNOTSUPP | Errno::PERM | Errno::ACCESS) => Ok(Vec::new()),
            other => other,
        }
    }

    pub fn set(&self, attr: &OsStr, value: &[u8], flags: XattrFlags) -> Result<()> {
        if let Some(done) = self.by_descriptor(|fd| rustix::fs::fsetxattr(fd, attr, value, flags)) {
            return done;
        }
        if self.name.is_empty() {
            rustix::fs::setxattr(self.path(), attr, value, flags)
        } else {
            rustix::fs::lsetxattr(self.path(), attr, value, flags)
        }
    }

    pub fn remove(&self, attr: &OsStr) -> Result<()> {
        if self.name.is_empty() {
            rustix::fs::removexattr(self.path(), attr)
        } else {
            rustix::fs::lremovexattr(self.path(), attr)
        }
    }
}

/// Calls with a buffer that is large enough; it may have grown between two calls.
fn grow(call: impl Fn(&mut [u8]) -> Result<usize>) -> Result<Vec<u8>> {
    let mut buffer = vec![0; 256];
    loop {
        match call(&mut buffer) {
            Ok(length) => {
                buffer.truncate(length);
                return Ok(buffer);
            }
            Err(Errno::RANGE) => {
                let wanted = call(&mut [])?;
                buffer.resize(wanted.max(buffer.len() * 2), 0);
            }
            Err(e) => return Err(e),
        }
    }
}

/// The names in a list of xattrs.
pub(super) fn names(list: &[u8]) -> impl Iterator<Item = &[u8]> {
    list.split(|b| *b == 0).filter(|n| !n.is_empty())
}

/// What an overlay directory says of itself.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct DirMarks {
    /// Hides what is below it.
    pub opaque: bool,
    /// May hold regular files that are whiteouts by their xattr (`opaque` is `x`, Linux 6.7).
    pub xattr_whiteouts: bool,
    /// Where it was before it was renamed.
    pub redirect: Option<Vec<u8>>,
    /// May hold files that remember another inode number.
    pub impure: bool,
}

/// Reads and writes the marks.
#[derive(Debug, Clone, Copy)]
pub(super) struct Marks {
    /// The namespace ours are written in, with its last dot. Redirects and everything else that shows files of another
    /// place count in this one only: in `trusted.` mode a container's user can set any `user.` xattr.
    pub prefix: &'static str,
}

impl Marks {
    pub const TRUSTED: Marks = Marks { prefix: TRUSTED };
    pub const USER: Marks = Marks { prefix: USER };

    pub fn name(self, mark: &str) -> OsString {
        let mut name = OsString::from(self.prefix);
        name.push(mark);
        name
    }

    /// The marks of a directory.
    pub fn of_dir(self, object: Object<'_>) -> Result<DirMarks> {
        let mut marks = DirMarks::default();
        for name in names(&object.list()?) {
            let Some((prefix, mark)) = split(name) else { continue };
            match mark {
                b"opaque" => match object.get(&format!("{prefix}opaque"))?.as_deref() {
                    Some(b"y") => marks.opaque = true,
                    Some(b"x") => marks.xattr_whiteouts = true,
                    _ => {}
                },
                b"redirect" if prefix == self.prefix => marks.redirect = object.get(&format!("{prefix}redirect"))?,
                b"impure" => marks.impure = true,
                _ => {}
            }
        }
        Ok(marks)
    }

    /// Whether an empty regular file in a directory with [`DirMarks::xattr_whiteouts`] is a whiteout.
    pub fn is_xattr_whiteout(self, object: Object<'_>) -> Result<bool> {
        let list = object.list()?;
        Ok(names(&list).any(|n| n == b"trusted.overlay.whiteout" || n == b"user.overlay.whiteout"))
    }
}

/// Whether it is a character device 0/0.
pub(super) fn is_whiteout(stat: &Statx) -> bool {
    u32::from(stat.stx_mode) & libc::S_IFMT == libc::S_IFCHR && stat.stx_rdev_major == 0 && stat.stx_rdev_minor == 0
}

/// The name of the file that is a whiteout of `name`.
pub(super) fn whiteout_name(name: &OsStr) -> OsString {
    let mut whiteout = OsString::from(WHITEOUT);
    whiteout.push(name);
    whiteout
}

/// Whether the name belongs to the format, so that it is neither shown nor made.
pub(super) fn is_reserved(name: &OsStr) -> bool {
    name.as_bytes().starts_with(WHITEOUT.as_bytes())
}

/// Namespace and mark of an overlay xattr.
fn split(name: &[u8]) -> Option<(&'static str, &[u8])> {
    [TRUSTED, USER, FUSE_OVERLAYFS].into_iter().find_map(|p| Some((p, name.strip_prefix(p.as_bytes())?)))
}

/// The name on disk of an xattr that a user names. Those of overlay mounts within are escaped by a second `overlay.`, as
/// the kernel does since 6.8; `None`: not to be set.
pub(super) fn to_disk(name: &OsStr) -> Option<OsString> {
    let bytes = name.as_bytes();
    for prefix in [TRUSTED, USER] {
        if let Some(rest) = bytes.strip_prefix(prefix.as_bytes()) {
            let mut escaped = format!("{prefix}overlay.").into_bytes();
            escaped.extend_from_slice(rest);
            return Some(OsString::from_vec(escaped));
        }
    }
    let private = [FUSE_OVERLAYFS, FUSE_OVERLAYFS_PRIVILEGED].iter().any(|p| bytes.starts_with(p.as_bytes()));
    (!private).then(|| name.to_owned())
}

/// The name that a user sees; `None`: it is the format's own.
pub(super) fn to_user(name: &[u8]) -> Option<Vec<u8>> {
    for prefix in [TRUSTED, USER] {
        if let Some(rest) = name.strip_prefix(prefix.as_bytes()) {
            let rest = rest.strip_prefix(b"overlay.")?;
            return Some([prefix.as_bytes(), rest].concat());
        }
    }
    let private = [FUSE_OVERLAYFS, FUSE_OVERLAYFS_PRIVILEGED].iter().any(|p| name.starts_with(p.as_bytes()));
    (!private).then(|| name.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_users_overlay_xattrs_are_escaped_and_come_back() {
        for name in ["trusted.overlay.opaque", "user.overlay.redirect", "user.mime", "trusted.overlay.overlay.opaque"] {
            let disk = to_disk(OsStr::new(name)).unwrap();
            assert_eq!(to_user(disk.as_bytes()).unwrap(), name.as_bytes());
            assert!(split(disk.as_bytes()).is_none_or(|(_, mark)| mark.starts_with(b"overlay.")));
        }
        assert_eq!(to_disk(OsStr::new("user.fuseoverlayfs.opaque")), None);
        assert_eq!(to_user(b"trusted.overlay.opaque"), None);
        assert_eq!(to_user(b"user.fuseoverlayfs.origin"), None);
    }
}
