//! Who is alive: a lock file per session (see the [module](super)).

use super::make_dir;
use crate::{Context, Result};
use std::{
    collections::BTreeSet,
    ffi::OsStr,
    fs::{self, File, OpenOptions, TryLockError},
    hash::{BuildHasher, RandomState},
    io,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

/// This session, until it is dropped. Its lock is a mere descriptor, closed at exec(2) and at the end of the process.
pub(super) struct Session {
    pub(super) name: String,
    dir: PathBuf,
    _lock: File,
}

impl Session {
    pub(super) fn start(dir: &Path) -> Result<Session> {
        make_dir(&dir.join("run"))?;
        loop {
            // Keys that std takes from the system's random numbers: unique is enough, nothing depends on a secret.
            let random = || RandomState::new().hash_one(std::process::id());
            let name = format!("{:016x}{:016x}", random(), random());
            let path = lock_path(dir, &name);
            let made = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
            let file = made.doing(|| format!("making {}", path.display()))?;
            // Somebody who recovers may meet the file before it is locked, and remove it as a dead session's.
            // Not waiting for him: he may wait for the database, and the caller hold it.
            match file.try_lock() {
                Ok(()) if file.metadata()?.nlink() > 0 => {
                    return Ok(Session { name, dir: dir.to_owned(), _lock: file });
                }
                Ok(()) | Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(e)) => return Err(e).doing(|| format!("locking {}", path.display())),
            }
        }
    }

    /// Made when it is first asked for.
    pub(super) fn tmp_dir(&self) -> Result<PathBuf> {
        let path = tmp_path(&self.dir, &self.name);
        make_dir(&path)?;
        Ok(path)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if let Err(e) = bury(&self.dir, &self.name) {
            tracing::warn!("cleaning up session {}: {e}", self.name);
        }
    }
}

/// The names of all sessions that left something in the directory, dead or alive.
pub(super) fn traces(dir: &Path) -> Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    for sub in ["run", "tmp"] {
        let path = dir.join(sub);
        let entries = match fs::read_dir(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            other => other.doing(|| format!("listing {}", path.display()))?,
        };
        for entry in entries {
            let name = entry?.file_name();
            names.extend(Path::new(&name).file_stem().and_then(OsStr::to_str).map(str::to_owned));
        }
    }
    Ok(names)
}

/// A session known to be dead, for as long as this is held.
pub(super) struct Dead(Option<File>);

impl Dead {
    /// Whether it ended without dropping its [`Session`].
    pub(super) fn left_its_lock(&self) -> bool {
        self.0.is_some()
    }
}

/// Nothing if it is alive, or if somebody else is burying it.
pub(super) fn claim(dir: &Path, name: &str) -> Result<Option<Dead>> {
    let path = lock_path(dir, name);
    let file = match File::open(&path) {
        // The file is there before the first intent and scratch directory, and for as long as the session lives.
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Some(Dead(None))),
        other => other.doing(|| format!("opening {}", path.display()))?,
    };
    match file.try_lock() {
        Ok(()) => Ok(Some(Dead(Some(file)))),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(e)) => Err(e).doing(|| format!("locking {}", path.display())),
    }
}

/// Removes what a session left in the directory, its lock last.
pub(super) fn bury(dir: &Path, name: &str) -> Result<()> {
    absent_is_fine(fs::remove_dir_all(tmp_path(dir, name)))?;
    absent_is_fine(fs::remove_file(lock_path(dir, name)))
}

pub(super) fn absent_is_fine(removed: io::Result<()>) -> Result<()> {
    match removed {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e.into()),
        _ => Ok(()),
    }
}

fn lock_path(dir: &Path, name: &str) -> PathBuf {
    dir.join("run").join(format!("{name}.lock"))
}

fn tmp_path(dir: &Path, name: &str) -> PathBuf {
    dir.join("tmp").join(name)
}

/// Whether anybody has looked for leftovers since the machine started, and freed them all. Kept in the file `boot`, which
/// needs no sync: lost, it only costs a look.
pub(super) struct Boot {
    path: PathBuf,
    now: String,
    new: bool,
}

impl Boot {
    pub(super) fn look(dir: &Path) -> Result<Boot> {
        let now = fs::read_to_string("/proc/sys/kernel/random/boot_id").doing(|| "reading the boot id")?;
        let path = dir.join("boot");
        let new = !fs::read_to_string(&path).is_ok_and(|then| then == now);
        Ok(Boot { path, now, new })
    }

    pub(super) fn is_new(&self) -> bool {
        self.new
    }

    /// Has the next one look, unless this one remembers that it did.
    pub(super) fn forget(&self) -> Result<()> {
        absent_is_fine(fs::remove_file(&self.path)).doing(|| format!("removing {}", self.path.display()))
    }

    pub(super) fn remember(&self) -> Result<()> {
        fs::write(&self.path, &self.now).doing(|| format!("writing {}", self.path.display()))
    }
}
