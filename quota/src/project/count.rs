//! Trees that are counted from their beginning on, limited or not: what they take is asked, not walked for.
//!
//! A tree that is put into a project while nothing but its driver's own directories is in it has the project in every inode
//! that is made there later, whatever it is. One that got its project later may hold symlinks, devices and immutable files
//! without it, and so is not to be measured by its count. The attribute [`MARK`] of the tree's directory, which is out of
//! reach for what is written to the tree, tells the two apart: it names the project.
//!
//! A tree without limits is not in the [ledger](mod@super::ledger), which costs two flushes for each entry: the project is
//! in use as long as the tree is there, and nothing is left of it afterwards.

use super::{ProjectQuota, named_elsewhere, tag, turn};
use crate::State;
use graphdriver_core::{Error, ErrorKind, Limits, Result, Usage};
use rustix::{
    fs::{self, XattrFlags},
    io::Errno,
};
use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
    time::Duration,
};

const MARK: &str = "trusted.graphdriver.counted";

/// The numbers that follow each other before they begin anew. xfs keeps 136 bytes for each that ever was used.
const WINDOW: u64 = 1 << 16;

/// Counting is worth no longer wait for others who choose a project.
const PATIENCE: Duration = Duration::from_millis(100);

/// The directories of a new tree of layers. Files are made in `work` and renamed into `diff`, and the other way round.
fn parts(dir: &Path) -> Result<Vec<OwnedFd>, Errno> {
    ["", "work", "diff"].iter().map(|part| tag::open_dir(&dir.join(part))).collect()
}

impl ProjectQuota {
    /// Puts a new tree of layers at `dir`, empty but for its directories, into a project of its own, without limits. If that
    /// cannot be done now, the tree is in no project, and nothing else is wrong with it. `nth` is any number that the trees of
    /// this base have one after the other.
    pub fn count_new(&self, dir: &Path, nth: u64) -> Result<()> {
        let parts = parts(dir)?;
        let counted = self.try_count(&parts, nth);
        if let Err(e) = counted {
            parts.iter().try_for_each(|part| tag::tag_dir(part.as_fd(), 0).map(drop))?;
            tracing::debug!("what is written to {} is not counted by the kernel: {e}", dir.display());
        }
        Ok(())
    }

    fn try_count(&self, parts: &[OwnedFd], nth: u64) -> Result<()> {
        let project = {
            let _turn = turn::take_within(&self.base, PATIENCE)?;
            let project = self.uncounted(nth)?;
            tag::tag_dir(parts[0].as_fd(), project)?;
            project
        };
        for part in &parts[1..] {
            tag::tag_dir(part.as_fd(), project)?;
        }
        // The administrator may have given limits to all projects to come (`xfs_quota -x -c 'limit -p -d ...'`).
        if self.kernel.get(project)?.limits != Limits::default() {
            return Err(Error::new(ErrorKind::Unsupported, "new projects have limits on this filesystem"));
        }
        mark(parts[0].as_fd(), project)
    }

    /// A project that nobody has, near the one that is the tree's turn in this base.
    fn uncounted(&self, nth: u64) -> Result<u32> {
        let (first, last) = (u64::from(*self.range.start()), u64::from(*self.range.end()));
        let width = last - first + 1;
        // Limits are what an administrator gives a range of his own for.
        if width < 2 * WINDOW {
            let why = format!("{} is narrow, and left to layers with limits", self.option);
            return Err(Error::new(ErrorKind::Unsupported, why));
        }
        let base = tag::open_dir(&self.base).and_then(fs::fstat)?.st_ino;
        let from = base.wrapping_mul(0x9E37_79B9_7F4A_7C15) % width + nth % WINDOW;
        let (noted, named) = (self.ledger.read()?, named_elsewhere());
        for n in 0..width {
            let project = (first + (from + n) % width) as u32;
            let is_noted = noted.trees.values().any(|entry| entry.project == project);
            if !is_noted && !named.contains(&project) && self.kernel.get(project)? == State::default() {
                return Ok(project);
            }
        }
        Err(Error::new(ErrorKind::OutOfSpace, "all projects of the range are in use"))
    }

    /// Notes that the tree at `dir`, which has its project already, had nothing in it when it got it.
    pub fn counts_all(&self, dir: &Path) -> Result<()> {
        let top = tag::open_dir(dir)?;
        tag::project_of(top.as_fd())?.map_or(Ok(()), |project| mark(top.as_fd(), project))
    }

    /// What the tree of layers at `dir` takes with all that is in it, the driver's own files and itself included. None if it
    /// is not counted from its beginning on.
    ///
    /// Files that were deleted count until nobody has them open, and on xfs for some moments longer, as it frees them in the
    /// background.
    pub fn counted(&self, dir: &Path) -> Result<Option<Usage>> {
        let (top, diff) = (tag::open_dir(dir)?, tag::open_dir(&dir.join("diff"))?);
        let Some(project) = marked(top.as_fd())? else { return Ok(None) };
        // A container may have taken its root out of the project.
        if tag::project_of(top.as_fd())? != Some(project) || tag::project_of(diff.as_fd())? != Some(project) {
            return Ok(None);
        }
        Ok(Some(self.kernel.get(project)?.used))
    }
}

fn mark(top: BorrowedFd<'_>, project: u32) -> Result<()> {
    Ok(fs::fsetxattr(top, MARK, project.to_string().as_bytes(), XattrFlags::empty())?)
}

/// No longer all that is in the tree has its project.
pub(super) fn unmark(top: BorrowedFd<'_>) -> Result<(), Errno> {
    match fs::fremovexattr(top, MARK) {
        Err(Errno::NODATA) => Ok(()),
        removed => removed,
    }
}

/// The project that the tree has had from its beginning on.
pub(super) fn marked(top: BorrowedFd<'_>) -> Result<Option<u32>> {
    let mut value = [0; 16];
    match fs::fgetxattr(top, MARK, &mut value) {
        Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::RANGE) => Ok(None),
        read => Ok(std::str::from_utf8(&value[..read?]).ok().and_then(|text| text.parse().ok())),
    }
}
