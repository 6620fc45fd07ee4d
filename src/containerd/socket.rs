//! The socket: handed over by systemd, or made here and taken away again.

use graphdriver_core::{Context, Error, ErrorKind, Result};
use listenfd::ListenFd;
use std::{
    fs::{self, DirBuilder, File, Permissions, TryLockError},
    os::unix::{
        fs::{DirBuilderExt, PermissionsExt},
        net::UnixListener as StdListener,
    },
    path::{Path, PathBuf},
};
use tokio::net::UnixListener;

/// A listening socket.
pub(super) struct Socket {
    pub(super) listener: UnixListener,
    _ours: Option<Ours>,
}

/// A socket we made, and the lock that says so. Taken away when dropped.
struct Ours {
    path: PathBuf,
    _lock: File,
}

impl Drop for Ours {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// For the one that systemd hands over (sd_listen_fds(3)) `path` does not matter.
pub(super) fn listen(path: &Path) -> Result<Socket> {
    let handed = ListenFd::from_env().take_unix_listener(0).doing(|| "taking the socket systemd hands over")?;
    let (listener, ours) = match handed {
        Some(listener) => (listener, None),
        None => make(path).doing(|| format!("listening on {}", path.display())).map(|(l, ours)| (l, Some(ours)))?,
    };
    listener.set_nonblocking(true)?;
    Ok(Socket { listener: UnixListener::from_std(listener)?, _ours: ours })
}

fn make(path: &Path) -> Result<(StdListener, Ours)> {
    let beside = |end: &str| {
        let mut name = path.as_os_str().to_owned();
        name.push(end);
        PathBuf::from(name)
    };
    if let Some(dir) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) {
        DirBuilder::new().recursive(true).mode(0o711).create(dir).doing(|| format!("making {}", dir.display()))?;
    }
    // Whoever holds it serves the socket; free, a socket that is there was left by somebody killed.
    let lock = File::create(beside(".lock"))?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            return Err(Error::new(ErrorKind::Busy, "another snapshotter listens there").hint("use another --socket"));
        }
        Err(TryLockError::Error(e)) => return Err(e.into()),
    }
    // Under its name only once nobody but root may connect.
    let new = beside(".new");
    match fs::remove_file(&new) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e.into()),
        _ => {}
    }
    let listener = StdListener::bind(&new)?;
    fs::set_permissions(&new, Permissions::from_mode(0o600))?;
    fs::rename(&new, path)?;
    Ok((listener, Ours { path: path.to_owned(), _lock: lock }))
}
