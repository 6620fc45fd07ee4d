//! Where the kernel shows a mount that the store remembers: here, in another mount namespace, to a chrooted process, or
//! nowhere any more but to those who still use it.

use super::mounts::MountRow;
use graphdriver_core::{
    Context, Error, ErrorKind, Result,
    mount::{self, MountInfo},
};
use nix::sched::CloneFlags;
use rustix::{
    fs::{AtFlags, CWD, Mode, OFlags, StatxFlags},
    io::Errno,
};
use std::{
    cell::OnceCell,
    collections::HashMap,
    fs::File,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{ffi::OsStrExt, fs::MetadataExt},
    },
    path::{Path, PathBuf},
    sync::mpsc,
    time::Duration,
};

/// What tells mounts apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Numbers {
    /// The number in `/proc/PID/mountinfo`; used again after the mount is gone.
    pub mount: u64,
    /// A number that is never used again until the next boot (Linux 6.8; before, the same as `mount`).
    pub serial: u64,
}

/// The numbers of the mount that a file lies in, attached or not (statx(2)).
pub(super) fn numbers(file: impl AsFd) -> Result<Numbers> {
    numbers_at(file, Path::new(""), AtFlags::EMPTY_PATH)
}

fn numbers_at(dir: impl AsFd, path: &Path, how: AtFlags) -> Result<Numbers> {
    // STATX_MNT_ID_UNIQUE of linux/stat.h, which rustix has no name for.
    let unique = StatxFlags::from_bits_retain(0x4000);
    let ask = |what: StatxFlags| -> Result<Option<u64>> {
        let found = rustix::fs::statx(&dir, path, how | AtFlags::STATX_DONT_SYNC, what)?;
        Ok((found.stx_mask & what.bits() != 0).then_some(found.stx_mnt_id))
    };
    let mount = ask(StatxFlags::MNT_ID)?.ok_or_else(|| {
        Error::new(ErrorKind::Unsupported, "the kernel does not tell mount ids").hint("Linux 5.8 or newer is needed")
    })?;
    Ok(Numbers { mount, serial: ask(unique)?.unwrap_or(mount) })
}

/// Whether the program that served a filesystem in user space is gone: the kernel then answers in its place, that nobody
/// is connected. One that is there and does not answer is not gone, and is not waited for long.
pub(super) fn is_dead(dir: &OwnedFd) -> bool {
    let Ok(dir) = dir.try_clone() else { return false };
    let (tell, told) = mpsc::channel();
    std::thread::spawn(move || {
        let how = AtFlags::EMPTY_PATH | AtFlags::STATX_FORCE_SYNC;
        let _ = tell.send(rustix::fs::statx(&dir, "", how, StatxFlags::BASIC_STATS).map(drop));
    });
    told.recv_timeout(Duration::from_secs(2)) == Ok(Err(Errno::NOTCONN))
}

/// Where this process stands: a mount made elsewhere, or before the last boot, is not in its table.
pub(super) struct Here {
    pub boot: String,
    pub namespace: u64,
}

impl Here {
    pub(super) fn find() -> Result<Here> {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").doing(|| "reading the boot id")?;
        Ok(Here { boot: boot.trim().into(), namespace: namespace_of(Path::new("/proc/self"))? })
    }

    pub(super) fn has(&self, row: &MountRow) -> bool {
        self.boot == row.boot && self.namespace == row.namespace
    }
}

/// The inode number of a process's mount namespace (namespaces(7)).
fn namespace_of(process: &Path) -> Result<u64> {
    let path = process.join("ns/mnt");
    Ok(std::fs::metadata(&path).doing(|| format!("reading {}", path.display()))?.ino())
}

fn processes() -> Result<impl Iterator<Item = u32>> {
    let entries = std::fs::read_dir("/proc").doing(|| "listing processes")?;
    Ok(entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()))
}

/// Which processes live in which mount namespace.
struct Residents {
    of: HashMap<u64, Vec<u32>>,
    /// Some process must not be looked at.
    hidden: bool,
}

impl Residents {
    fn find() -> Result<Residents> {
        let mut found = Residents { of: HashMap::new(), hidden: false };
        for pid in processes()? {
            match namespace_of(&process(pid)) {
                Ok(namespace) => found.of.entry(namespace).or_default().push(pid),
                // The first process stays where it was started: sandboxes hide it even from root.
                Err(e) if e.kind() == ErrorKind::PermissionDenied && pid != 1 => found.hidden = true,
                Err(_) => {}
            }
        }
        Ok(found)
    }
}

fn process(pid: u32) -> PathBuf {
    Path::new("/proc").join(pid.to_string())
}

/// What one process sees of a mount.
enum Seen {
    /// Its root directory, and a path to it.
    Open(OwnedFd, PathBuf),
    /// It is there, but something is mounted over it, or the way to it is closed.
    Covered,
    Nothing,
}

/// `root` is a path to the process's root.
fn seen_by(row: &MountRow, pid: u32, root: &Path) -> Seen {
    let table = mount::table_of(pid).unwrap_or_default();
    // Not by the mount point: it is relative to the root of the process, and mounts can be moved.
    let Some(entry) = table.iter().find(|m: &&MountInfo| m.id == row.mount) else { return Seen::Nothing };
    let path = root.join(entry.mount_point.strip_prefix("/").unwrap_or(&entry.mount_point));
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let Ok(dir) = rustix::fs::open(&path, flags, Mode::empty()) else { return Seen::Covered };
    match numbers(&dir) {
        Ok(found) if found.serial == row.serial => Seen::Open(dir, path),
        // Another mount, made after ours was gone, has been given its number.
        Ok(found) if found.mount == row.mount => Seen::Nothing,
        _ => Seen::Covered,
    }
}

/// What there is to see from the root of a mount namespace, which no process in it may have as its own root. A thread goes
/// there, and is looked at like a process.
fn seen_from_top(row: &MountRow, namespace: &Path) -> Result<Seen> {
    let namespace = File::open(namespace)?;
    std::thread::scope(|scope| {
        let (tell, told) = mpsc::channel();
        let (leave, left) = mpsc::channel::<()>();
        scope.spawn(move || {
            // setns(2): not while the root is shared with other threads.
            let entered = nix::sched::unshare(CloneFlags::CLONE_FS)
                .and_then(|()| nix::sched::setns(&namespace, CloneFlags::CLONE_NEWNS));
            let _ = tell.send(entered.map(|()| rustix::thread::gettid().as_raw_nonzero().get()));
            let _ = left.recv();
        });
        let thread = told.recv().expect("the thread tells before it ends").map_err(std::io::Error::from)?;
        let thread = u32::try_from(thread).expect("thread ids are positive");
        let seen = seen_by(row, thread, &process(thread).join("root"));
        drop(leave);
        Ok(seen)
    })
}

/// A process that works in the mount or has a file of it open: only such keep a mount alive that is shown nowhere.
fn user_of(row: &MountRow) -> Result<Option<u32>> {
    let uses = |link: &Path| numbers_at(CWD, link, AtFlags::empty()).is_ok_and(|found| found.serial == row.serial);
    let in_dir = |dir: &Path| std::fs::read_dir(dir).is_ok_and(|all| all.flatten().any(|link| uses(&link.path())));
    Ok(processes()?.find(|pid| {
        let process = process(*pid);
        ["cwd", "root"].iter().any(|link| uses(&process.join(link)))
            || ["fd", "map_files"].iter().any(|dir| in_dir(&process.join(dir)))
    }))
}

/// What has become of a mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    /// It is mounted.
    Shown,
    /// It is mounted nowhere, but this process still uses it.
    Detached(u32),
    /// It may be mounted in a namespace that nobody here may look into.
    OutOfSight,
    Gone,
}

/// The kernel's side of the mounts, for one look.
pub(super) struct View {
    pub here: Here,
    residents: OnceCell<Residents>,
}

impl View {
    pub(super) fn take() -> Result<View> {
        Ok(View { here: Here::find()?, residents: OnceCell::new() })
    }

    fn residents(&self) -> Result<&Residents> {
        match self.residents.get() {
            Some(found) => Ok(found),
            None => Residents::find().map(|found| self.residents.get_or_init(|| found)),
        }
    }

    pub(super) fn fate(&self, row: &MountRow) -> Result<Fate> {
        if row.boot != self.here.boot {
            return Ok(Fate::Gone);
        }
        Ok(match self.find(row)? {
            None => Fate::OutOfSight,
            Some(Seen::Open(..) | Seen::Covered) => Fate::Shown,
            Some(Seen::Nothing) => user_of(row)?.map_or(Fate::Gone, Fate::Detached),
        })
    }

    /// None if nobody can tell.
    fn find(&self, row: &MountRow) -> Result<Option<Seen>> {
        if self.here.has(row) {
            let thread = u32::try_from(rustix::thread::gettid().as_raw_nonzero().get()).expect("positive");
            return Ok(Some(match seen_by(row, thread, Path::new("/")) {
                // This process may be chrooted. If it may not look from the top, its own table has to do.
                Seen::Nothing => seen_from_top(row, Path::new("/proc/self/ns/mnt")).unwrap_or(Seen::Nothing),
                seen => seen,
            }));
        }
        let residents = self.residents()?;
        let living = residents.of.get(&row.namespace).map_or(&[][..], |pids| pids);
        let mut covered = false;
        for pid in living {
            match seen_by(row, *pid, &process(*pid).join("root")) {
                Seen::Open(dir, path) => return Ok(Some(Seen::Open(dir, path))),
                Seen::Covered => covered = true,
                Seen::Nothing => {}
            }
        }
        if covered {
            return Ok(Some(Seen::Covered));
        }
        if !living.is_empty() {
            return Ok(living.iter().find_map(|pid| seen_from_top(row, &process(*pid).join("ns/mnt")).ok()));
        }
        // A namespace without processes lives on while it is bind-mounted somewhere, or may hide behind a process we
        // must not look at.
        let name = format!("mnt:[{}]", row.namespace);
        let pinned = mount::table()?.iter().any(|m| m.root.as_os_str().as_bytes() == name.as_bytes());
        Ok((!residents.hidden && !pinned).then_some(Seen::Nothing))
    }

    /// The mount's root directory and a path to it; of nothing else that may be at the same place now.
    ///
    /// # Errors
    /// `Busy` if it cannot be reached.
    pub(super) fn reach(&self, row: &MountRow) -> Result<(OwnedFd, PathBuf)> {
        let place = row.target.display();
        let (why, hint) = match self.find(row)? {
            Some(Seen::Open(dir, path)) => return Ok((dir, path)),
            Some(Seen::Covered) => {
                (format!("something else is mounted over it at {place}"), "unmount that first".into())
            }
            None => (format!("it is mounted at {place} out of sight"), "unmount it there first".into()),
            Some(Seen::Nothing) => match user_of(row)? {
                Some(pid) => return Err(detached(row, pid)),
                None => (format!("it has just been unmounted from {place}"), "try again".to_string()),
            },
        };
        Err(Error::new(ErrorKind::Busy, why).hint(hint))
    }
}

/// Why nothing can be had through a mount whose program is gone.
pub(super) fn died(row: &MountRow) -> Error {
    let place = row.target.display();
    Error::new(ErrorKind::Busy, format!("it is mounted at {place}, but the program that served it is gone"))
        .hint(format!("graphdriver umount {place}"))
}

fn detached(row: &MountRow, pid: u32) -> Error {
    let place = row.target.display();
    Error::new(ErrorKind::Busy, format!("it was detached from {place}, but process {pid} still uses it"))
        .hint("end that process, or make it leave the directory and close its files there")
}
