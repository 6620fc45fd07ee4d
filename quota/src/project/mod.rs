//! Project quotas of xfs and ext4.
//!
//! Each limited tree, a directory right beneath a *base* directory, is a *project*: a number that all inodes in it carry and
//! that new ones take from their directory (`FS_XFLAG_PROJINHERIT`, ioctl_xfs_fsgetxattr(2)), and for which the kernel counts
//! and limits space and inodes (quotactl(2)). Numbers come out of a range. The [ledger](mod@ledger) remembers which tree has
//! which, so that no two get the same and none is lost in a crash. What has a count or a limit on the filesystem already, or
//! is named in `/etc/projid` or `/etc/projects`, is nobody's to take. Several bases on one filesystem take turns in choosing.
//!
//! # Traps
//!
//! * ext4 lets processes with CAP_SYS_RESOURCE exceed limits; xfs does not. Containers have no such capability by default.
//! * xfs says `ENOSPC`, ext4 `EDQUOT`.
//! * Files cannot be renamed or linked between projects (`EXDEV`).
//! * The owner of a file in the initial user namespace may give it another project (`chattr -p`), and so can the root of a
//!   container that has no user namespace of its own.

mod count;
mod kernel;
pub mod ledger;
mod probe;
mod tag;
mod turn;

pub use probe::probe;
pub use tag::Tagged;

use crate::{Quota, State};
use graphdriver_core::{ByteSize, Context, Error, ErrorKind, Limits, Result};
use kernel::Kernel;
use ledger::{Book, Entry, Ledger};
use rustix::io::Errno;
use std::{
    collections::HashSet,
    ops::RangeInclusive,
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
};

/// Where projects come from if nobody says otherwise: far from what administrators and other programs count up to.
pub const RANGE: RangeInclusive<u32> = 1_900_000_000..=1_999_999_999;

/// What is left to a tree that is as full as it may be, when it is shown again. Overlayfs makes a directory whenever it is
/// mounted, and shows the tree read-only if it cannot; then nobody could make room. xfs sets aside what the largest
/// transaction might take.
const ROOM_BYTES: u64 = 1 << 20;
const ROOM_INODES: u64 = 8;
/// How often it is left that in all.
const ROOMS: u64 = 16;

/// The largest block, to which xfs rounds limits up.
const BLOCK: u64 = 64 << 10;

/// The project quotas of the trees in one directory.
#[derive(Debug)]
pub struct ProjectQuota {
    base: PathBuf,
    range: RangeInclusive<u32>,
    /// What users give another range with.
    option: String,
    ledger: Ledger,
    kernel: Kernel,
}

impl ProjectQuota {
    /// Of the trees in `base`, which is on a filesystem that [has](probe) them, with projects out of `range`,
    /// which users choose with `option`.
    pub fn open(base: &Path, range: RangeInclusive<u32>, option: &str) -> Result<ProjectQuota> {
        Ok(ProjectQuota {
            base: base.into(),
            range,
            option: option.into(),
            ledger: Ledger::new(base),
            kernel: Kernel::of(base)?,
        })
    }

    /// Limits the tree `name`, which lies at `dir` for the moment, perhaps not in its place yet. Files that are there already
    /// are counted too. If it fails, the limits are what they were. Of changes at once one wins, whole.
    pub fn set_at(&self, name: &str, dir: &Path, limits: Limits) -> Result<Tagged> {
        check(name, limits)?;
        let mut before = None;
        let entered = self.enter(name, dir, |noted| {
            before = Some(noted.unwrap_or_default());
            Some(limits)
        });
        let exactly = |entry: &Entry| self.kernel.set(entry.project, entry.limits);
        let set = entered.and_then(|entry| entry.map_or(Ok(Tagged::default()), |e| self.finish(name, dir, e, exactly)));
        if let (Err(_), Some(before)) = (&set, before) {
            self.put_back(name, limits, before);
        }
        set
    }

    /// Notes the limits of the tree at `dir`, which `limits` gives if it is told those that are noted, and puts `dir` itself
    /// into the tree's project. Nothing is done if it gives none. The entry is ready if all in the tree has the project.
    fn enter(
        &self,
        name: &str,
        dir: &Path,
        limits: impl FnOnce(Option<Limits>) -> Option<Limits>,
    ) -> Result<Option<Entry>> {
        let top = tag::open_dir(dir).doing(|| format!("opening {}", dir.display()))?;
        // From the choice of a project until something is in it, which is when others see that it is taken.
        let _turn = turn::take(&self.base)?;
        let entry = self.ledger.change(|book| {
            let noted = book.trees.get(name).copied();
            let Some(limits) = limits(noted.map(|entry| entry.limits)) else { return Ok(None) };
            let entry = Entry { limits, ..self.project_for(book, noted, top.as_fd())? };
            book.trees.insert(name.into(), entry);
            Ok(Some(entry))
        })?;
        if let Some(entry) = entry {
            tag::tag_dir(top.as_fd(), entry.project)
                .doing(|| format!("putting {} into project {}", dir.display(), entry.project))?;
        }
        Ok(entry)
    }

    /// The entry of a tree with its project: the one that is noted, or a new one.
    fn project_for(&self, book: &mut Book, noted: Option<Entry>, top: BorrowedFd<'_>) -> Result<Entry> {
        match noted {
            Some(entry) if tag::project_of(top)? == Some(entry.project) => return Ok(entry),
            // A container may have taken its files out of the project.
            Some(entry) if entry.ready => return Ok(Entry { ready: false, ..entry }),
            Some(entry) if self.kernel.get(entry.project)? == State::default() => return Ok(entry),
            // Killed before anything was put into the project, which others have chosen since.
            Some(_) | None => {}
        }
        if let Some(project) =
            count::marked(top)?.filter(|project| tag::project_of(top).is_ok_and(|p| p == Some(*project)))
        {
            return Ok(Entry { project, limits: Limits::default(), ready: true });
        }
        if book.next == 0 {
            book.next = self.anywhere()?;
        }
        let named = named_elsewhere();
        let taken = |project| Ok(named.contains(&project) || self.kernel.get(project)? != State::default());
        Ok(Entry { project: book.free(&self.range, &self.option, taken)?, limits: Limits::default(), ready: false })
    }

    /// Where to begin in the range: elsewhere in each base, so that two on one filesystem stay out of each other's way.
    fn anywhere(&self) -> Result<u32> {
        let mut random = [0; 8];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
        let width = u64::from(self.range.end() - self.range.start()) + 1;
        Ok(self.range.start() + (u64::from_ne_bytes(random) % width) as u32)
    }

    /// Gives all that is in the tree the project, notes that it has it, and has the kernel enforce what is noted by then,
    /// which somebody else may have changed meanwhile.
    fn finish(
        &self,
        name: &str,
        dir: &Path,
        entered: Entry,
        enforce: impl FnOnce(&Entry) -> Result<()>,
    ) -> Result<Tagged> {
        let tagged = if entered.ready { Tagged::default() } else { tag_parts(dir, entered.project)? };
        if tagged.left_out > 0 {
            count::unmark(tag::open_dir(dir)?.as_fd())?;
        }
        self.ledger.change(|book| match book.trees.get_mut(name) {
            Some(entry) if entry.project == entered.project => {
                entry.ready = true;
                enforce(entry)
            }
            _ => Ok(()),
        })?;
        Ok(tagged)
    }

    /// After a change that failed: the limits from before it are noted and enforced, unless somebody else has changed them.
    fn put_back(&self, name: &str, failed: Limits, before: Limits) {
        let put_back = self.ledger.change(|book| match book.trees.get_mut(name) {
            Some(entry) if entry.limits == failed => {
                entry.limits = before;
                self.enforce_noted(entry)
            }
            _ => Ok(()),
        });
        if let Err(e) = put_back {
            tracing::warn!("putting back the limits of {}: {e}", self.base.join(name).display());
        }
    }

    /// Has the kernel enforce what is noted, if it does not. The room that a full tree has been given is left to it.
    fn enforce_noted(&self, entry: &Entry) -> Result<()> {
        let found = self.kernel.get(entry.project)?;
        if enforces(found, entry.limits) { Ok(()) } else { self.kernel.set(entry.project, entry.limits) }
    }

    /// Before the tree in its place is shown for writing: finishes what a crash has interrupted, and leaves room in a full
    /// one for what mounting it takes.
    pub fn prepare(&self, name: &str) -> Result<()> {
        let Some(entry) = self.ledger.read()?.trees.get(name).copied() else { return Ok(()) };
        self.mend(name, entry, |entry| {
            let found = self.kernel.get(entry.project)?;
            let wanted = with_room(entry.limits, found.used);
            if found.limits == wanted { Ok(()) } else { self.kernel.set(entry.project, wanted) }
        })
    }

    /// Sees to it that the tree in its place is in the project, and enforces.
    fn mend(&self, name: &str, entry: Entry, enforce: impl FnOnce(&Entry) -> Result<()>) -> Result<()> {
        let dir = self.base.join(name);
        let whole = entry.ready && self.project_at(&dir)? == Some(entry.project);
        let entered = if whole { Some(entry) } else { self.enter(name, &dir, |noted| noted)? };
        entered.map_or(Ok(()), |entry| self.finish(name, &dir, entry, enforce).map(drop))
    }

    /// The tree is gone, or never came to be: nothing is left of it here. Unknown, it is no error.
    pub fn forget(&self, name: &str) -> Result<()> {
        if !self.ledger.read()?.trees.contains_key(name) {
            return Ok(());
        }
        self.ledger.change(|book| match book.trees.remove(name) {
            Some(entry) => self.kernel.set(entry.project, Limits::default()),
            None => Ok(()),
        })
    }

    /// Forgets the trees that `gone` says are no more, and finishes what was interrupted in the others. How many were
    /// forgotten.
    pub fn reclaim(&self, gone: &dyn Fn(&str) -> bool) -> Result<u64> {
        let mut forgotten = 0;
        for (name, entry) in self.ledger.read()?.trees {
            if gone(&name) {
                self.forget(&name)?;
                forgotten += 1;
            } else if self.base.join(&name).is_dir() && !self.is_whole(&name, &entry)? {
                self.mend(&name, entry, |entry| self.enforce_noted(entry))?;
            }
        }
        Ok(forgotten)
    }

    fn is_whole(&self, name: &str, entry: &Entry) -> Result<bool> {
        let tagged = entry.ready && self.project_at(&self.base.join(name))? == Some(entry.project);
        Ok(tagged && enforces(self.kernel.get(entry.project)?, entry.limits))
    }

    fn project_at(&self, dir: &Path) -> Result<Option<u32>> {
        let project = tag::open_dir(dir).and_then(|dir| tag::project_of(dir.as_fd()));
        project.doing(|| format!("reading the project of {}", dir.display()))
    }

    /// All projects of the filesystem that take anything or have a limit, whoever gave them out.
    pub fn on_filesystem(&self) -> Result<Vec<(u32, State)>> {
        let mut found = Vec::new();
        let mut from = 1;
        while let Some((project, state)) = self.kernel.next(from)? {
            // What had something once may still be listed.
            if state != State::default() {
                found.push((project, state));
            }
            let Some(next) = project.checked_add(1) else { break };
            from = next;
        }
        Ok(found)
    }

    fn name<'a>(&self, tree: &'a Path) -> Result<&'a str> {
        let name = tree.strip_prefix(&self.base).ok().and_then(Path::to_str).filter(|name| ledger::is_name(name));
        name.ok_or_else(|| {
            let why = format!("{} is no directory right beneath {}", tree.display(), self.base.display());
            Error::new(ErrorKind::InvalidInput, why)
        })
    }
}

impl Quota for ProjectQuota {
    fn set(&self, tree: &Path, limits: Limits) -> Result<()> {
        self.set_at(self.name(tree)?, tree, limits).map(drop).doing(|| format!("limiting {}", tree.display()))
    }

    fn read(&self, tree: &Path) -> Result<State> {
        let name = self.name(tree)?;
        let entry = self.ledger.read()?.trees.get(name).copied();
        let entry =
            entry.ok_or_else(|| Error::new(ErrorKind::NotFound, format!("{} has no project", tree.display())))?;
        Ok(State { used: self.kernel.get(entry.project)?.used, limits: entry.limits })
    }

    fn remove(&self, tree: &Path) -> Result<()> {
        let name = self.name(tree)?;
        match tag::open_dir(tree) {
            Err(Errno::NOENT) => {}
            _ => drop(tag::tag(tree, 0)?),
        }
        self.forget(name)
    }

    fn list(&self) -> Result<Vec<(PathBuf, State)>> {
        let trees = self.ledger.read()?.trees;
        let state = |(name, entry): (String, Entry)| {
            let used = self.kernel.get(entry.project)?.used;
            Ok((self.base.join(name), State { used, limits: entry.limits }))
        };
        trees.into_iter().map(state).collect()
    }
}

/// Puts a tree of layers into the project, all but its top, which is there.
fn tag_parts(dir: &Path, project: u32) -> Result<Tagged> {
    // Overlayfs makes files in the work directory and renames them into others, which must not be in the project first.
    let parts = ["work", "diff", ""].map(|part| dir.join(part));
    let mut all = Tagged::default();
    for part in parts.iter().filter(|part| part.is_dir()) {
        let tagged = tag::tag(part, project)?;
        all = Tagged { changed: all.changed + tagged.changed, left_out: tagged.left_out };
    }
    Ok(all)
}

/// Whether the kernel enforces these limits, for a full tree perhaps with [room](with_room) on top.
fn enforces(found: State, limits: Limits) -> bool {
    let enforces = |limit: Option<u64>, used: u64, enforced: Option<u64>, room: u64, rounding: u64| {
        let (Some(limit), Some(enforced)) = (limit, enforced) else { return limit == enforced };
        let is_full = used.saturating_add(room) > limit;
        let most = if is_full {
            limit.saturating_add(ROOMS * room).max(used.saturating_add(room))
        } else {
            limit.saturating_add(rounding)
        };
        (limit..=most).contains(&enforced)
    };
    let bytes = |size: Option<ByteSize>| size.map(|size| size.0);
    enforces(bytes(limits.size), found.used.bytes, bytes(found.limits.size), ROOM_BYTES, BLOCK)
        && enforces(limits.inodes, found.used.inodes, found.limits.inodes, ROOM_INODES, 0)
}

/// The limits, and on top of them for a full tree what mounting it takes.
///
/// Whoever writes to the tree fills that, too, so each mount is given some, up to [`ROOMS`] in all: a full tree can be mounted
/// to be emptied, and is bounded. A tree limited to far less than it takes is given some at each mount.
fn with_room(limits: Limits, used: graphdriver_core::Usage) -> Limits {
    let room = |limit: u64, used: u64, room: u64| {
        let most = limit.saturating_add(ROOMS * room);
        let wanted = used.saturating_add(room);
        if used > most { wanted } else { limit.max(wanted.min(most)) }
    };
    Limits {
        size: limits.size.map(|ByteSize(size)| ByteSize(room(size, used.bytes, ROOM_BYTES))),
        inodes: limits.inodes.map(|inodes| room(inodes, used.inodes, ROOM_INODES)),
    }
}

/// Whether that can be asked for: a limit of nothing would be none to the kernel.
fn check(name: &str, limits: Limits) -> Result<()> {
    if !ledger::is_name(name) {
        return Err(Error::new(ErrorKind::InvalidInput, format!("{name:?} cannot be a tree's name")));
    }
    check_limits(limits)
}

/// Refuses limits of nothing.
pub fn check_limits(limits: Limits) -> Result<()> {
    let refuse = |what: &str| {
        let error = Error::new(ErrorKind::InvalidInput, format!("a limit of 0 {what} lets nothing be written at all"));
        Err(error.hint("give a larger one, or none"))
    };
    match limits {
        Limits { size: Some(ByteSize(0)), .. } => refuse("bytes"),
        Limits { inodes: Some(0), .. } => refuse("inodes"),
        _ => Ok(()),
    }
}

/// The projects that the administrator has given out: `NAME:PROJECT` in `/etc/projid`, `PROJECT:DIRECTORY` in `/etc/projects`
/// (projid(5), projects(5)).
fn named_elsewhere() -> HashSet<u32> {
    let read = |path| std::fs::read(path).map(|text| String::from_utf8_lossy(&text).into_owned()).unwrap_or_default();
    numbers(&read("/etc/projid")).chain(numbers(&read("/etc/projects"))).collect()
}

/// Numbers alone on a side of the colon.
fn numbers(text: &str) -> impl Iterator<Item = u32> {
    let lines = text.lines().filter(|line| !line.trim_start().starts_with('#'));
    let numbers: Vec<u32> =
        lines.flat_map(|line| line.split(':')).filter_map(|side| side.trim().parse().ok()).collect();
    numbers.into_iter()
}

#[cfg(test)]
mod real;
#[cfg(test)]
mod tests;
