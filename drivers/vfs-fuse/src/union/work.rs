//! The upper layer's workshop: files are made whole here and then moved to their names.

use super::marks::{self, Marks, Object};
use crate::{
    claim,
    extent::{self, Unit},
};
use graphdriver_core::{Context, Error, ErrorKind};
use parking_lot::Mutex;
use rustix::{
    fd::{AsFd, BorrowedFd, OwnedFd},
    fs::{AtFlags, CWD, FileType, Mode, OFlags, RawDir, RenameFlags, XattrFlags},
    io::{Errno, Result},
};
use std::{
    ffi::{OsStr, OsString},
    mem::MaybeUninit,
    os::unix::ffi::OsStrExt,
    path::Path,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};

/// Our own directory in the work directory, apart from the kernel's `work` and `index`.
const DIR: &str = "vfs-fuse";
/// The whiteout that all others are links of.
const WHITEOUT: &str = "whiteout";

/// The upper layer.
pub(super) struct Upper {
    pub root: OwnedFd,
    pub work: Work,
    /// Whether it holds xattrs of ours.
    pub xattrs: bool,
    /// What an extent file is made of, once it was asked for; `Some(None)`: its holes cannot be trusted.
    unit: Mutex<Option<Option<Unit>>>,
    /// The work directory, and whether it says that files may be incomplete.
    work_root: OwnedFd,
    incomplete: AtomicBool,
    /// Locked against a second daemon.
    _locks: [OwnedFd; 2],
}

/// See the module.
pub(super) struct Work {
    pub dir: OwnedFd,
    next: AtomicU64,
    /// Whether whiteouts are devices 0/0.
    devices: AtomicBool,
    /// Whether files are made without a name.
    nameless: AtomicBool,
}

/// ext4, on which a file that gets its first name has its xattrs and size on the disk if it has the name: all of them are
/// in its journal in that order. On btrfs a directory that is synced may have it without them, since it does not come from
/// another directory; on xfs it is no faster.
const NAMELESS: u64 = 0xef53;

impl Upper {
    pub fn open(upper: &Path, work: &Path, user_xattrs: bool) -> graphdriver_core::Result<(Upper, Marks)> {
        let root =
            super::layer::open_root(upper).doing(|| format!("opening the upper directory {}", upper.display()))?;
        // Two daemons on one upper or work directory would overwrite each other's files.
        let locks = claim::claim_both(upper, work)?;
        let work_root =
            super::layer::open_root(work).doing(|| format!("opening the work directory {}", work.display()))?;
        let device = |fd: &OwnedFd| super::layer::stat(fd.as_fd(), OsStr::new("")).map(|s| super::layer::device(&s));
        if device(&root).doing(|| "upper directory")? != device(&work_root).doing(|| "work directory")? {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("the work directory {} is on another filesystem than {}", work.display(), upper.display()),
            )
            .hint("files are moved from one to the other: make it beside the upper directory"));
        }
        let doing = || format!("preparing the work directory {}", work.display());
        let work = Work::open(&work_root, &root).doing(doing)?;
        let (marks, xattrs) = work.probe_xattrs(user_xattrs).doing(doing)?;
        let (unit, incomplete) = (Mutex::new(None), AtomicBool::new(false));
        Ok((Upper { root, work, xattrs, unit, work_root, incomplete, _locks: locks }, marks))
    }

    /// Says in the work directory that files of the layer may be incomplete, before the first one is: the kernel's
    /// overlay then refuses to mount it.
    pub fn note_incomplete(&self) -> Result<()> {
        if self.incomplete.load(Ordering::Relaxed) {
            return Ok(());
        }
        for path in extent::INCOMPAT {
            match rustix::fs::mkdirat(&self.work_root, path, Mode::from_raw_mode(0o700)) {
                // The kernel's own `work` is closed to an unprivileged user; its files then refuse one by one.
                Ok(()) | Err(Errno::EXIST | Errno::ACCESS | Errno::PERM | Errno::NOENT) => {}
                Err(e) => return Err(e),
            }
        }
        self.incomplete.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// What an extent file is made of; `None`: its holes cannot be trusted. Found out when first asked for: it waits for the
    /// disk, and few mounts need it. What failed for a while only, on a full disk, is tried again.
    pub fn unit(&self) -> Result<Option<Unit>> {
        let mut known = self.unit.lock();
        if let Some(unit) = *known {
            return Ok(unit);
        }
        let unit = if self.xattrs { extent::probe(self.work.dir.as_fd())? } else { None };
        Ok(*known.insert(unit))
    }

    /// Whether it is known, without waiting, that extent files can be made.
    pub fn knows_unit(&self) -> bool {
        self.unit.try_lock().is_some_and(|known| matches!(*known, Some(Some(_))))
    }
}

impl Work {
    fn open(root: &OwnedFd, upper: &OwnedFd) -> Result<Work> {
        match rustix::fs::mkdirat(root, DIR, Mode::from_raw_mode(0o700)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(e) => return Err(e),
        }
        let dir = super::layer::open_dir(root.as_fd(), OsStr::new(DIR))?;
        let nameless = rustix::fs::fstatfs(&dir)?.f_type as u64 == NAMELESS;
        let (devices, nameless) = (AtomicBool::new(true), AtomicBool::new(nameless));
        let work = Work { dir, next: AtomicU64::new(0), devices, nameless };
        super::links::finish_groups(&work, upper.as_fd())?;
        for name in entries(work.dir.as_fd())? {
            work.destroy(&name)?;
        }
        if let Err(Errno::PERM | Errno::OPNOTSUPP | Errno::INVAL) = work.make_device(WHITEOUT) {
            work.devices.store(false, Ordering::Relaxed);
        }
        Ok(work)
    }

    /// Which namespace of xattrs can be written, if any.
    fn probe_xattrs(&self, user_only: bool) -> Result<(Marks, bool)> {
        let name = self.name();
        self.make_file(&name, 0o600)?;
        let object = Object { dir: self.dir.as_fd(), name: &name };
        let can = |marks: Marks| object.set(&marks.name("vfs.ino"), &[0; 8], XattrFlags::empty()).is_ok();
        let found = match (!user_only && can(Marks::TRUSTED), can(Marks::USER)) {
            (true, _) => (Marks::TRUSTED, true),
            (false, user) => (Marks::USER, user),
        };
        self.destroy(&name)?;
        Ok(found)
    }

    /// A name that nothing has here.
    pub fn name(&self) -> OsString {
        format!("{:x}", self.next.fetch_add(1, Ordering::Relaxed)).into()
    }

    /// An empty regular file.
    pub fn make_file(&self, name: &OsStr, mode: u32) -> Result<OwnedFd> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::openat(&self.dir, name, flags, Mode::from_raw_mode(mode))
    }

    /// An empty regular file without a name, which costs less than one that is moved; `None` where that cannot be.
    pub fn make_nameless(&self, mode: u32) -> Result<Option<OwnedFd>> {
        if !self.nameless.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
        match rustix::fs::openat(&self.dir, ".", flags, Mode::from_raw_mode(mode)) {
            // A filesystem or kernel without such files, or ext2.
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL | Errno::NOENT) => {
                self.nameless.store(false, Ordering::Relaxed);
                Ok(None)
            }
            made => made.map(Some),
        }
    }

    fn make_device(&self, name: &str) -> Result<()> {
        rustix::fs::mknodat(&self.dir, name, FileType::CharacterDevice, Mode::empty(), 0)
    }

    /// Moves what was made here to its name, over a file that is there.
    pub fn place(&self, name: &OsStr, dir: BorrowedFd<'_>, as_name: &OsStr) -> Result<()> {
        rustix::fs::renameat(&self.dir, name, dir, as_name)
    }

    /// Changes places with what is at a name.
    pub fn exchange(&self, name: &OsStr, dir: BorrowedFd<'_>, with: &OsStr) -> Result<()> {
        rustix::fs::renameat_with(&self.dir, name, dir, with, RenameFlags::EXCHANGE)
    }

    /// Puts a whiteout at a name, in the place of what is there: no directory. Whiteouts are links of one device, which
    /// costs no inode each, as the kernel's are.
    pub fn whiteout(&self, dir: BorrowedFd<'_>, name: &OsStr, taken: bool) -> Result<()> {
        if !self.devices.load(Ordering::Relaxed) {
            self.make_whiteout_file(dir, name)?;
            return if taken { rustix::fs::unlinkat(dir, name, AtFlags::empty()) } else { Ok(()) };
        }
        if !taken {
            return self.link_whiteout(dir, name);
        }
        let temporary = self.device_whiteout()?;
        self.place(&temporary, dir, name)
    }

    /// A whiteout device in the work directory, to be moved.
    pub fn device_whiteout(&self) -> Result<OsString> {
        let name = self.name();
        self.link_whiteout(self.dir.as_fd(), &name)?;
        Ok(name)
    }

    pub fn has_devices(&self) -> bool {
        self.devices.load(Ordering::Relaxed)
    }

    fn link_whiteout(&self, dir: BorrowedFd<'_>, name: &OsStr) -> Result<()> {
        let link = || rustix::fs::linkat(&self.dir, WHITEOUT, dir, name, AtFlags::empty());
        match link() {
            Err(Errno::MLINK | Errno::NOENT) => {
                let fresh = self.name();
                rustix::fs::mknodat(&self.dir, &fresh, FileType::CharacterDevice, Mode::empty(), 0)?;
                rustix::fs::renameat(&self.dir, &fresh, &self.dir, WHITEOUT)?;
                link()
            }
            other => other,
        }
    }

    /// A `.wh.` file, which hides the name in lower layers.
    pub fn make_whiteout_file(&self, dir: BorrowedFd<'_>, name: &OsStr) -> Result<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::openat(dir, marks::whiteout_name(name), flags, Mode::from_raw_mode(0o600)).map(drop)
    }

    /// Takes the `.wh.` file of a name away, once something is there again.
    pub fn drop_whiteout_file(&self, dir: BorrowedFd<'_>, name: &OsStr) -> Result<()> {
        if name.len() + marks::WHITEOUT.len() > 255 {
            return Ok(());
        }
        match rustix::fs::unlinkat(dir, marks::whiteout_name(name), AtFlags::empty()) {
            Err(Errno::NOENT) => Ok(()),
            other => other,
        }
    }

    /// Removes what is under a name here, whatever it is.
    pub fn destroy(&self, name: &OsStr) -> Result<()> {
        remove_all(self.dir.as_fd(), name)
    }
}

/// Gives an open file its first name; `EEXIST`.
pub(super) fn link_nameless(file: BorrowedFd<'_>, dir: BorrowedFd<'_>, name: &OsStr) -> Result<()> {
    match rustix::fs::linkat(file, "", dir, name, AtFlags::EMPTY_PATH) {
        // Without CAP_DAC_READ_SEARCH, before Linux 6.10.
        Err(Errno::NOENT) => {
            let path = marks::proc_path(file, OsStr::new(""));
            rustix::fs::linkat(CWD, path, dir, name, AtFlags::SYMLINK_FOLLOW)
        }
        other => other,
    }
}

/// The names in a directory.
pub(super) fn entries(dir: BorrowedFd<'_>) -> Result<Vec<OsString>> {
    let readable = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let fd = rustix::fs::openat(dir, ".", readable, Mode::empty())?;
    let mut buffer = [MaybeUninit::uninit(); 8192];
    let mut reader = RawDir::new(&fd, &mut buffer);
    let mut names = Vec::new();
    while let Some(entry) = reader.next() {
        let name = OsStr::from_bytes(entry?.file_name().to_bytes()).to_owned();
        if name != "." && name != ".." {
            names.push(name);
        }
    }
    Ok(names)
}

/// Removes a name with all below it, without following anything. What is gone already is no error.
fn remove_all(dir: BorrowedFd<'_>, name: &OsStr) -> Result<()> {
    match rustix::fs::unlinkat(dir, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(e) => return Err(e),
    }
    match rustix::fs::unlinkat(dir, name, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::NOTEMPTY | Errno::EXIST) => {}
        Err(e) => return Err(e),
    }
    let below = super::layer::open_dir(dir, name)?;
    for entry in entries(below.as_fd())? {
        remove_all(below.as_fd(), &entry)?;
    }
    rustix::fs::unlinkat(dir, name, AtFlags::REMOVEDIR)
}
