//! Mounting and unmounting. fuser 0.18 can do that as well, but forgets its mount when an unmount finds it busy, and
//! after an unmount by others unmounts again whatever is mounted in its place by then.

use crate::options::MountOptions;
use graphdriver_core::{Context, Error, ErrorKind, Result};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fd::{AsFd, OwnedFd},
    fs::{Mode, OFlags},
    io::Errno,
    mount::{MountFlags, UnmountFlags},
    net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags},
};
use std::{
    ffi::CString,
    io::IoSliceMut,
    mem::MaybeUninit,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// Where we have mounted. Dropping it unmounts, if that has not been done yet.
#[derive(Debug)]
pub struct Place {
    path: PathBuf,
    device: OwnedFd,
    /// While it is open fusermount3 does not unmount.
    _auto_unmount: Option<UnixStream>,
}

impl Place {
    /// Mounts on `path`: by itself or, without the right to, through fusermount3.
    pub fn mount(path: &Path, options: &MountOptions) -> Result<Place> {
        let path = path.canonicalize()?;
        if !options.auto_unmount {
            let device = rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
            let device = device.doing(|| "opening /dev/fuse").hint(
                || "its mode must let you (mostly 0666; udev sets it), the kernel must have FUSE (modprobe fuse)",
            )?;
            match mount_directly(device, &path, options) {
                Ok(device) => return Ok(Place { path, device, _auto_unmount: None }),
                Err(Errno::PERM) => {}
                Err(e) => return Err(e.into()),
            }
        }
        let (device, socket) = mount_by_helper(&path, options)?;
        Ok(Place { path, device, _auto_unmount: options.auto_unmount.then_some(socket) })
    }

    /// One more descriptor of `/dev/fuse`.
    pub fn device(&self) -> std::io::Result<OwnedFd> {
        self.device.try_clone()
    }

    /// Unmounts, if it is still mounted. EBUSY while a file is open or a directory in use.
    pub fn unmount(&self) -> std::io::Result<()> {
        self.unmount_with(UnmountFlags::NOFOLLOW, &[])
    }

    fn unmount_with(&self, flags: UnmountFlags, helper: &[&str]) -> std::io::Result<()> {
        if !self.is_connected() {
            return Ok(());
        }
        match rustix::mount::unmount(&self.path, flags) {
            Err(Errno::PERM) => {
                let output = fusermount().args(["-u"]).args(helper).arg("--").arg(&self.path).output()?;
                let said = String::from_utf8_lossy(&output.stderr);
                if output.status.success() { Ok(()) } else { Err(std::io::Error::other(said.trim().to_owned())) }
            }
            done => Ok(done?),
        }
    }

    /// Whether the kernel still has it mounted. Otherwise what is mounted there now is another's.
    fn is_connected(&self) -> bool {
        let mut fds = [PollFd::new(&self.device, PollFlags::empty())];
        poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok() && !fds[0].revents().contains(PollFlags::ERR)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // Nobody answers any more, so it must not stay, in use or not.
        if let Err(e) = self.unmount_with(UnmountFlags::NOFOLLOW | UnmountFlags::DETACH, &["-z"]) {
            tracing::warn!("unmounting {}: {e}", self.path.display());
        }
    }
}

fn mount_directly(device: OwnedFd, path: &Path, options: &MountOptions) -> rustix::io::Result<OwnedFd> {
    let kind = rustix::fs::stat(path)?.st_mode & libc::S_IFMT;
    let mut data = format!(
        "fd={},rootmode={kind:o},user_id={},group_id={}",
        rustix::fd::AsRawFd::as_raw_fd(&device),
        rustix::process::getuid().as_raw(),
        rustix::process::getgid().as_raw(),
    );
    for option in filesystem_options(options) {
        data.push(',');
        data.push_str(&option);
    }
    let data = CString::new(data).map_err(|_| Errno::INVAL)?;
    rustix::mount::mount(options.fsname.as_str(), path, "fuse", flags(options), data.as_c_str())?;
    Ok(device)
}

fn flags(options: &MountOptions) -> MountFlags {
    let mut flags = MountFlags::empty();
    flags.set(MountFlags::RDONLY, options.read_only);
    flags.set(MountFlags::NODEV, !options.dev);
    flags.set(MountFlags::NOSUID, !options.suid);
    flags.set(MountFlags::NOEXEC, !options.exec);
    flags.set(MountFlags::NOATIME, options.noatime);
    flags.set(MountFlags::SYNCHRONOUS, options.sync);
    flags.set(MountFlags::DIRSYNC, options.dirsync);
    flags
}

/// What the kernel's FUSE is told, and fusermount3 hands on.
fn filesystem_options(options: &MountOptions) -> Vec<String> {
    let mut list = vec!["default_permissions".to_owned(), format!("subtype={}", options.subtype)];
    // That of the others only root may use it is for the server to see to.
    if options.allow_other || options.allow_root {
        list.push("allow_other".into());
    }
    list.extend(options.labels.iter().cloned());
    list
}

/// What fusermount3 is told on top of it.
fn helper_options(options: &MountOptions) -> String {
    let name = options.fsname.replace('\\', "\\\\").replace(',', "\\,");
    let mut list = filesystem_options(options);
    list.push(format!("fsname={name}"));
    let words = [
        (options.read_only, "ro"),
        (options.dev, "dev"),
        (options.suid, "suid"),
        (!options.exec, "noexec"),
        (options.noatime, "noatime"),
        (options.sync, "sync"),
        (options.dirsync, "dirsync"),
        (options.auto_unmount, "auto_unmount"),
    ];
    list.extend(words.iter().filter(|(on, _)| *on).map(|(_, word)| (*word).to_owned()));
    list.join(",")
}

fn fusermount() -> Command {
    Command::new(std::env::var_os("FUSERMOUNT_PATH").unwrap_or_else(|| "fusermount3".into()))
}

/// fusermount3 sends the descriptor of `/dev/fuse` over a socket, whose number it is told: its standard input.
fn mount_by_helper(path: &Path, options: &MountOptions) -> Result<(OwnedFd, UnixStream)> {
    let (ours, its) = UnixStream::pair()?;
    let mut helper = fusermount();
    helper.args(["-o", &helper_options(options), "--"]).arg(path).env("_FUSE_COMMFD", "0");
    helper.stdin(Stdio::from(OwnedFd::from(its))).stdout(Stdio::null()).stderr(Stdio::piped());
    let child = helper.spawn().doing(|| "starting fusermount3").hint(|| "install the package fuse3")?;
    // The other end is the child's alone.
    drop(helper);
    match receive_fd(&ours)? {
        // With auto_unmount it stays.
        Some(device) if options.auto_unmount => Ok((device, ours)),
        Some(device) => child.wait_with_output().map(|_| (device, ours)).doing(|| "waiting for fusermount3"),
        None => {
            let said = child.wait_with_output()?.stderr;
            let said = String::from_utf8_lossy(&said).trim().to_owned();
            Err(Error::new(ErrorKind::PermissionDenied, said)).doing(|| "asking fusermount3")
        }
    }
}

/// `None`: the other end was closed before it sent one.
fn receive_fd(socket: &UnixStream) -> Result<Option<OwnedFd>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let mut data = [IoSliceMut::new(&mut byte)];
    rustix::io::retry_on_intr(|| {
        rustix::net::recvmsg(socket.as_fd(), &mut data, &mut control, RecvFlags::CMSG_CLOEXEC)
    })?;
    let mut fds = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    Ok(fds.next())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_are_told_the_same() {
        let options = MountOptions {
            read_only: true,
            allow_other: false,
            allow_root: true,
            dev: false,
            suid: true,
            exec: false,
            noatime: true,
            fsname: "a,b".into(),
            ..MountOptions::default()
        };
        assert_eq!(
            helper_options(&options),
            "default_permissions,subtype=vfs-fuse,allow_other,fsname=a\\,b,ro,suid,noexec,noatime"
        );
        let expected = MountFlags::RDONLY | MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::NOATIME;
        assert_eq!(flags(&options), expected);
    }
}
