//! The xattrs of an extent file: the header, and two that make the kernel's overlay refuse the file.

use super::header::{Header, UpperIdentity, XATTR};
use rustix::{
    fs::{SeekFrom, XattrFlags},
    io::{Errno, Result},
};
use std::os::fd::BorrowedFd;

/// `overlay.metacopy` of a version (the first byte) that no kernel knows: with metacopy off the kernel refuses any file
/// that has the xattr, with metacopy on it refuses this version or the redirect.
const METACOPY: (&str, &[u8]) = ("metacopy", &[0xff, 4, 0, 0]);
/// `overlay.redirect` to what no lookup can find: for kernels that do not look at the version.
const REDIRECT: (&str, &[u8]) = ("redirect", b"/.");
/// Whoever reads the layer in a user namespace sees only these.
const OTHER: &str = "user.overlay.";

/// Turns a fresh empty file (open, not yet visible) into one that shows the lower file up to the header's limit, which is
/// its size then. The header must have that file's identity. Fails with `ENOSPC` or `E2BIG` where the header does not fit in an xattr, and with `EOPNOTSUPP` where
/// the file would not be a hole.
pub fn prepare(upper: BorrowedFd<'_>, prefix: &str, header: &Header) -> Result<()> {
    debug_assert_eq!(UpperIdentity::of(upper).as_ref(), Ok(&header.upper));
    rustix::fs::fsetxattr(upper, format!("{prefix}{XATTR}"), &header.encode()?, XattrFlags::CREATE)?;
    for (name, value) in [METACOPY, REDIRECT] {
        rustix::fs::fsetxattr(upper, format!("{prefix}{name}"), value, XattrFlags::empty())?;
        if prefix != OTHER {
            match rustix::fs::fsetxattr(upper, format!("{OTHER}{name}"), value, XattrFlags::empty()) {
                // A filesystem without `user.` attributes, on which such a reader has no marks at all.
                Ok(()) | Err(Errno::OPNOTSUPP) => {}
                Err(e) => return Err(e),
            }
        }
    }
    rustix::fs::ftruncate(upper, header.limit)?;
    match rustix::fs::seek(upper, SeekFrom::Data(0)) {
        Err(Errno::NXIO) => Ok(()),
        Ok(_) => Err(Errno::OPNOTSUPP),
        Err(e) => Err(e),
    }
}

/// Replaces the header.
pub(super) fn update(upper: BorrowedFd<'_>, prefix: &str, header: &Header) -> Result<()> {
    rustix::fs::fsetxattr(upper, format!("{prefix}{XATTR}"), &header.encode()?, XattrFlags::REPLACE)
}

/// Makes the file a plain one. The header goes last: until then the file is read as an extent file, which is right too.
pub fn unprepare(upper: BorrowedFd<'_>, prefix: &str) -> Result<()> {
    for (prefix, name) in
        [(OTHER, METACOPY.0), (OTHER, REDIRECT.0), (prefix, METACOPY.0), (prefix, REDIRECT.0), (prefix, XATTR)]
    {
        match rustix::fs::fremovexattr(upper, format!("{prefix}{name}")) {
            Ok(()) | Err(Errno::NODATA | Errno::OPNOTSUPP) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}
