//! What the kernel takes from a file that is written to: completion is no change of the file and has to give it back.

use rustix::{
    fs::{Mode, XattrFlags},
    io::{Errno, Result},
};
use std::os::fd::BorrowedFd;

/// Keeps them, below the overlay prefix, while completion writes.
const KEPT: &str = "vfs.privileges";
const CAPABILITY: &str = "security.capability";
/// Set-user-id and set-group-id: taken unless the writer has CAP_FSETID.
const SET_ID: u32 = 0o6000;

/// Notes on the disk what the next write takes. Whether there is any such thing.
pub(super) fn keep(file: BorrowedFd<'_>, prefix: &str) -> Result<bool> {
    let mode = rustix::fs::fstat(file)?.st_mode & 0o7777;
    let capability = get(file, CAPABILITY)?;
    if mode & SET_ID == 0 && capability.is_none() {
        return Ok(false);
    }
    let value = [&mode.to_le_bytes()[..], capability.as_deref().unwrap_or_default()].concat();
    rustix::fs::fsetxattr(file, format!("{prefix}{KEPT}"), &value, XattrFlags::empty())?;
    Ok(true)
}

/// Whether somebody was stopped before he could give back what he kept.
pub(super) fn are_kept(file: BorrowedFd<'_>, prefix: &str) -> Result<bool> {
    Ok(get(file, &format!("{prefix}{KEPT}"))?.is_some())
}

/// Gives back what was kept.
pub(super) fn give_back(file: BorrowedFd<'_>, prefix: &str) -> Result<()> {
    let Some(value) = get(file, &format!("{prefix}{KEPT}"))? else { return Ok(()) };
    let (mode, capability) = value.split_first_chunk().ok_or(Errno::IO)?;
    if !capability.is_empty() {
        match rustix::fs::fsetxattr(file, CAPABILITY, capability, XattrFlags::CREATE) {
            // It was not taken, or somebody has set another.
            Ok(()) | Err(Errno::EXIST) => {}
            Err(e) => return Err(e),
        }
    }
    let mode = u32::from_le_bytes(*mode) & 0o7777;
    let now = rustix::fs::fstat(file)?.st_mode & 0o7777;
    // Other bits differ: somebody has set the mode.
    if now != mode && now & !SET_ID == mode & !SET_ID {
        rustix::fs::fchmod(file, Mode::from_raw_mode(mode))?;
    }
    forget(file, prefix)
}

/// They shall not come back.
pub(super) fn forget(file: BorrowedFd<'_>, prefix: &str) -> Result<()> {
    match rustix::fs::fremovexattr(file, format!("{prefix}{KEPT}")) {
        Err(Errno::NODATA) => Ok(()),
        other => other,
    }
}

fn get(file: BorrowedFd<'_>, name: &str) -> Result<Option<Vec<u8>>> {
    let mut value = vec![0; 256];
    match rustix::fs::fgetxattr(file, name, &mut value[..]) {
        Ok(length) => {
            value.truncate(length);
            Ok(Some(value))
        }
        Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(None),
        Err(e) => Err(e),
    }
}
