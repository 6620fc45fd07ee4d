//! The xattrs of an extent file: the header, and what makes the kernel's overlay refuse the file.

use super::header::{Header, UpperIdentity, XATTR, XATTR_1};
use rustix::{
    fs::{SeekFrom, XattrFlags},
    io::{Errno, Result},
};
use std::os::fd::BorrowedFd;

/// With metacopy off the kernel refuses any file that has this xattr, whatever its value. Ours is the header.
const METACOPY: &str = XATTR;
/// To whoever reads the layer in a user namespace it is a version (the first byte) that no kernel knows.
const UNKNOWN: &[u8] = &[0xff, 4, 0, 0];
/// With metacopy on the kernel refuses to go where no lookup can find anything.
const REDIRECT: (&str, &[u8]) = ("redirect", b"/.");
/// Whoever reads the layer in a user namespace sees only these. Metacopy is always off there, so no redirect is needed.
const OTHER: &str = "user.overlay.";
/// The inode number that a plain file is shown with.
const NUMBER: &str = "vfs.ino";

/// Turns a fresh empty file (open, not yet visible) into one that shows the lower file up to the header's limit, which is
/// its size then. The header must be of the present version and have that file's identity. Fails with `ENOSPC` or `E2BIG`
/// where the header does not fit in an xattr, and with `EOPNOTSUPP` where the file would not be a hole.
pub fn prepare(upper: BorrowedFd<'_>, prefix: &str, header: &Header) -> Result<()> {
    debug_assert_eq!(UpperIdentity::of(upper).as_ref(), Ok(&header.upper));
    debug_assert_eq!(header.xattr(), METACOPY);
    rustix::fs::fsetxattr(upper, format!("{prefix}{METACOPY}"), &header.encode()?, XattrFlags::CREATE)?;
    rustix::fs::fsetxattr(upper, format!("{prefix}{}", REDIRECT.0), REDIRECT.1, XattrFlags::empty())?;
    if prefix != OTHER {
        match rustix::fs::fsetxattr(upper, format!("{OTHER}{METACOPY}"), UNKNOWN, XattrFlags::empty()) {
            // A filesystem without `user.` attributes, on which such a reader has no marks at all.
            Ok(()) | Err(Errno::OPNOTSUPP) => {}
            Err(e) => return Err(e),
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
    rustix::fs::fsetxattr(upper, format!("{prefix}{}", header.xattr()), &header.encode()?, XattrFlags::REPLACE)
}

/// Makes the file a plain one, which is shown with the inode number `ino` if the header told it. Metacopy goes before the
/// redirect, without which the kernel would follow it to the lower file. A header of version 1 goes last: until then the
/// file is read as an extent file, which is right too.
pub fn unprepare(upper: BorrowedFd<'_>, prefix: &str, ino: Option<u64>) -> Result<()> {
    let number =
        |ino: u64| rustix::fs::fsetxattr(upper, format!("{prefix}{NUMBER}"), &ino.to_le_bytes(), XattrFlags::empty());
    let unnumbered = ino.filter(|ino| number(*ino).is_err());
    for (prefix, name) in
        [(OTHER, METACOPY), (OTHER, REDIRECT.0), (prefix, METACOPY), (prefix, REDIRECT.0), (prefix, XATTR_1)]
    {
        match rustix::fs::fremovexattr(upper, format!("{prefix}{name}")) {
            Ok(()) | Err(Errno::NODATA | Errno::OPNOTSUPP) => {}
            Err(e) => return Err(e),
        }
    }
    // There was no room for it beside the header.
    if let Some(Err(e)) = unnumbered.map(number) {
        tracing::warn!("a file will have another inode number at the next mount: {e}");
    }
    Ok(())
}
