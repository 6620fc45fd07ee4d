//! The socket: handed over by systemd, or made here and taken away again.

use graphdriver_core::{Context, Error, ErrorKind, Result};
use listenfd::ListenFd;
use rustix::fs::{Mode, OFlags};
use std::{
    fs::{self, DirBuilder, File, Permissions, TryLockError},
    io::ErrorKind::{ConnectionRefused, NotFound},
    os::unix::{
        fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt},
        net::UnixListener as StdListener,
    },
    path::{Path, PathBuf},
};
use tokio::net::{UnixListener, UnixStream};

/// A listening socket.
pub(super) struct Socket {
    pub(super) listener: UnixListener,
    _ours: Option<Ours>,
    /// Whoever holds it serves the socket.
    _lock: Option<File>,
}

/// A socket we made. Taken away when dropped, unless somebody has put something else there.
struct Ours {
    path: PathBuf,
    /// Keeps its inode from being another file's.
    inode: File,
}

impl Drop for Ours {
    fn drop(&mut self) {
        let same = |ours: fs::Metadata, there: fs::Metadata| (ours.dev(), ours.ino()) == (there.dev(), there.ino());
        if self.inode.metadata().is_ok_and(|ours| fs::symlink_metadata(&self.path).is_ok_and(|there| same(ours, there)))
        {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// For the one that systemd hands over (sd_listen_fds(3)) `path` does not matter.
///
/// Fails with `AlreadyExists` if something else than a socket is there, and with `Busy` if somebody listens.
pub(super) async fn listen(path: &Path) -> Result<Socket> {
    let handed = ListenFd::from_env().take_unix_listener(0).doing(|| "taking the socket systemd hands over")?;
    let (listener, ours, lock) = match handed {
        Some(listener) => {
            let lock = lock_handed(&listener)?;
            (listener, None, lock)
        }
        None => {
            let (listener, ours, lock) = make(path).await.doing(|| format!("listening on {}", path.display()))?;
            (listener, Some(ours), Some(lock))
        }
    };
    listener.set_nonblocking(true)?;
    Ok(Socket { listener: UnixListener::from_std(listener)?, _ours: ours, _lock: lock })
}

/// Only keeps others away who would take the name, so that it need not work where systemd alone can write.
fn lock_handed(listener: &StdListener) -> Result<Option<File>> {
    let address = listener.local_addr()?;
    let Some(path) = address.as_pathname() else { return Ok(None) };
    match lock(path) {
        Err(e) if e.kind() != ErrorKind::Busy => {
            tracing::warn!("serving without a lock on {}: {e}", path.display());
            Ok(None)
        }
        locked => locked.map(Some).doing(|| format!("serving {}", path.display())),
    }
}

fn beside(path: &Path, end: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(end);
    name.into()
}

fn lock(path: &Path) -> Result<File> {
    let path = beside(path, ".lock");
    let lock = File::options().write(true).create(true).truncate(false).open(&path);
    let lock = lock.doing(|| format!("opening {}", path.display()))?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(TryLockError::WouldBlock) => Err(busy()),
        Err(TryLockError::Error(e)) => Err(e).doing(|| format!("locking {}", path.display())),
    }
}

fn busy() -> Error {
    Error::new(ErrorKind::Busy, "another process listens there").hint("stop it, or use another --socket")
}

/// Fails unless nothing is there, or the socket of somebody who was killed.
async fn may_replace(path: &Path) -> Result<()> {
    let there = match fs::symlink_metadata(path) {
        Err(e) if e.kind() == NotFound => return Ok(()),
        there => there?,
    };
    if !there.file_type().is_socket() {
        let why = format!("{} is there and no socket", path.display());
        return Err(Error::new(ErrorKind::AlreadyExists, why).hint("use another --socket"));
    }
    match UnixStream::connect(path).await {
        Err(e) if matches!(e.kind(), ConnectionRefused | NotFound) => Ok(()),
        _ => Err(busy()),
    }
}

async fn make(path: &Path) -> Result<(StdListener, Ours, File)> {
    let new = beside(path, ".new");
    if let Some(dir) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) {
        DirBuilder::new().recursive(true).mode(0o711).create(dir).doing(|| format!("making {}", dir.display()))?;
    }
    for path in [path, &new] {
        may_replace(path).await?;
    }
    let lock = lock(path)?;
    // Under its name only once nobody but root may connect.
    match fs::remove_file(&new) {
        Err(e) if e.kind() != NotFound => return Err(e.into()),
        _ => {}
    }
    let listener = StdListener::bind(&new)?;
    fs::set_permissions(&new, Permissions::from_mode(0o600))?;
    let inode = rustix::fs::open(&new, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    fs::rename(&new, path)?;
    Ok((listener, Ours { path: path.to_owned(), inode: inode.into() }, lock))
}
