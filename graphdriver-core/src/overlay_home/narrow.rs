//! Native diff: what overlayfs has recorded in a layer's own directory.
//!
//! overlayfs writes a name into `diff/DIR` for whatever changes in the merged DIR: the copied-up inode (with metacopy
//! too), the new one, or a whiteout. So the names there are the only ones that can differ from the parent, as long as
//! DIR is merged with the directory of the same path below. It is not if it, or one above it, was renamed
//! (`overlay.redirect`) or hides what is below (`overlay.opaque`): then the whole directory has to be compared. What
//! the parents have been redirected to is no matter, because the parent's own view resolves it in the same way.

use crate::{Candidates, Context, Narrow, OverlayXattrs, Result, root::names_in};
use rustix::{
    fs::{self, Mode, OFlags},
    io::Errno,
};
use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Component, Path},
};

pub(super) struct OverlayNarrow {
    pub diff: OwnedFd,
    pub xattrs: OverlayXattrs,
}

impl Narrow for OverlayNarrow {
    fn candidates(&mut self, dir: &Path) -> Result<Candidates> {
        self.look(dir).doing(|| format!("reading the changes in {}", dir.display()))
    }
}

impl OverlayNarrow {
    fn look(&self, dir: &Path) -> Result<Candidates> {
        let mut here = self.diff.try_clone()?;
        if stands_alone(here.as_fd(), self.xattrs)? {
            return Ok(Candidates::All);
        }
        for part in dir.components() {
            let Component::Normal(name) = part else { continue };
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            here = match fs::openat(&here, name, flags, Mode::empty()) {
                Ok(next) => next,
                Err(Errno::NOENT) => return Ok(Candidates::Names(Vec::new())),
                // It is a directory in both views: somebody is changing it this moment.
                Err(Errno::NOTDIR | Errno::LOOP) => return Ok(Candidates::All),
                Err(e) => return Err(e.into()),
            };
            if stands_alone(here.as_fd(), self.xattrs)? {
                return Ok(Candidates::All);
            }
        }
        // A descriptor of its own, because a duplicate would share its position with other readers.
        let fresh = fs::openat(&here, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        names_in(fresh.as_fd()).map(Candidates::Names)
    }
}

/// Whether a directory of a layer is shown without, or not with, what lies at the same path below.
fn stands_alone(dir: BorrowedFd<'_>, xattrs: OverlayXattrs) -> Result<bool> {
    Ok(has(dir, xattrs, "opaque")? || has(dir, xattrs, "redirect")?)
}

/// Whether overlayfs's attribute `name` is set, to whatever value.
pub(super) fn has(dir: BorrowedFd<'_>, xattrs: OverlayXattrs, name: &str) -> Result<bool> {
    let mut no_value: [u8; 0] = [];
    match fs::fgetxattr(dir, format!("{}{name}", xattrs.prefix()), &mut no_value) {
        Ok(_) => Ok(true),
        Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(false),
        Err(e) => Err(e.into()),
    }
}
