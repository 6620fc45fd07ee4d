//! A filesystem being configured: `fsopen(2)`, `fsconfig(2)`, `fsmount(2)`.

use crate::{Context, Error, ErrorKind, Result};
use rustix::{
    io::{self, Errno},
    mount::{self, FsMountFlags, FsOpenFlags, MountAttrFlags},
};
use std::os::fd::{BorrowedFd, OwnedFd};

/// The longest string `fsconfig(2)` takes, with its terminating zero.
pub(super) const STRING_MAX: usize = 256;

/// A filesystem context. Its kernel log explains every failure, far better than errno does.
pub(super) struct FsContext {
    fd: OwnedFd,
    fstype: String,
}

impl FsContext {
    pub(super) fn open(fstype: &str) -> Result<Self> {
        let fd = mount::fsopen(fstype, FsOpenFlags::FSOPEN_CLOEXEC).map_err(|e| match e {
            Errno::NODEV => Error::new(ErrorKind::Unsupported, format!("this kernel has no filesystem {fstype:?}"))
                .hint(format!("modprobe {fstype}")),
            Errno::NOSYS => Error::new(ErrorKind::Unsupported, "this kernel has no fsopen").hint("Linux 5.6 or newer"),
            e => e.into(),
        })?;
        Ok(FsContext { fd, fstype: fstype.into() })
    }

    /// Sets what `mount -o` would be given as one element.
    pub(super) fn option(&self, option: &str) -> Result<()> {
        match option.split_once('=') {
            Some((key, value)) => self.set(key, value.as_bytes()),
            None => mount::fsconfig_set_flag(&self.fd, option).or_else(|e| self.fail(e, || format!("option {option}"))),
        }
    }

    pub(super) fn set(&self, key: &str, value: &[u8]) -> Result<()> {
        let what = || format!("option {key}={}", String::from_utf8_lossy(value));
        if value.len() >= STRING_MAX {
            let why = format!("longer than the {} bytes the kernel takes", STRING_MAX - 1);
            return Err(Error::new(ErrorKind::InvalidInput, why).doing(what()));
        }
        mount::fsconfig_set_string(&self.fd, key, value).or_else(|e| self.fail(e, what))
    }

    /// Names a directory by descriptor. The errno is left raw: EINVAL or EBADF is how a kernel says that it takes none.
    pub(super) fn set_fd(&self, key: &str, value: BorrowedFd<'_>) -> io::Result<()> {
        mount::fsconfig_set_fd(&self.fd, key, value)
    }

    /// Names a directory by its path. As with [`Self::set_fd`] the errno is left raw.
    pub(super) fn set_raw(&self, key: &str, value: &[u8]) -> io::Result<()> {
        mount::fsconfig_set_string(&self.fd, key, value)
    }

    /// Makes the superblock and its first mount, attached nowhere.
    pub(super) fn mount(&self, attrs: MountAttrFlags) -> Result<OwnedFd> {
        mount::fsconfig_create(&self.fd).or_else(|e| self.fail(e, || "creating the filesystem".into()))?;
        mount::fsmount(&self.fd, FsMountFlags::FSMOUNT_CLOEXEC, attrs).doing(|| "fsmount")
    }

    /// The error `errno` with what the kernel said about it.
    pub(super) fn fail(&self, errno: Errno, doing: impl FnOnce() -> String) -> Result<()> {
        let error = Error::from(errno);
        let said = self.log();
        let error = if said.is_empty() {
            error.hint("the kernel's log may say more: dmesg")
        } else {
            Error::new(error.kind(), format!("{} ({})", said.join("; "), error.reason()))
        };
        Err(error.doing(doing()))
    }

    /// What the kernel had to say, oldest first. Each read(2) gives one line: `e overlay: MESSAGE`, with `w` and `i` for
    /// warnings and remarks (kernel `Documentation/filesystems/mount_api.rst`).
    pub(super) fn log(&self) -> Vec<String> {
        let mut lines = Vec::new();
        let mut line = [0; 1024];
        while let Ok(len @ 1..) = io::read(&self.fd, &mut line) {
            let text = String::from_utf8_lossy(&line[..len]);
            let text = text.get(2..).unwrap_or_default().trim_end();
            lines.push(text.strip_prefix(&format!("{}: ", self.fstype)).unwrap_or(text).to_owned());
        }
        lines
    }
}
