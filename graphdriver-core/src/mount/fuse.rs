//! Mounting a filesystem in user space: `fuse.NAME`, served by the program NAME.
//!
//! The kernel's side is made first, as a detached mount. The program gets the connection as an open descriptor: it is
//! started as `NAME -o OPTIONS /dev/fd/N`, which is how libfuse names a mount that is there already, goes to the
//! background by itself once it is ready, and ends when the last mount of the filesystem is gone: the kernel then answers
//! its reads with ENODEV. So nobody has to stop it, and if we are killed before the mount is attached, nothing is left.

use super::{context::FsContext, split_attributes, with_privilege_hint};
use crate::{Context, Error, ErrorKind, Mount, Result, sys};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{self, Access, CWD, MemfdFlags, Mode, OFlags},
    io::Errno,
    process::{Pid, PidfdFlags, getegid, geteuid, pidfd_open},
};
use std::{
    ffi::OsStr,
    fs::File,
    io::{Read, Seek},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::process::ExitStatusExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc,
    time::Duration,
};

/// How long a program may take to open its layers and to answer the first request.
const PATIENCE: Duration = Duration::from_secs(60);

/// The most that is told of what a program said.
const STORY: u64 = 4096;

/// Whether filesystems of type `fuse.NAME` can be mounted, whatever their program does.
pub fn has_fuse() -> Result<()> {
    fuse_device()?;
    FsContext::open("fuse").map(drop).map_err(with_privilege_hint).doing(|| "asking the kernel for FUSE")
}

/// The device that programs serve filesystems through.
fn fuse_device() -> Result<OwnedFd> {
    fs::openat(CWD, "/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(|e| match e {
            Errno::NOENT | Errno::NODEV | Errno::NXIO => Error::new(ErrorKind::Unsupported, "there is no FUSE here")
                .hint("modprobe fuse; in a container start it with --device /dev/fuse"),
            Errno::ACCESS | Errno::PERM => Error::from(e).hint("chmod 666 /dev/fuse, or run as root"),
            e => e.into(),
        })
        .doing(|| "opening /dev/fuse")
}

/// Where the program is that serves `fuse.NAME`: NAME itself if it is a path, else beside the running program, else in PATH.
pub fn fuse_program(name: &str) -> Result<PathBuf> {
    let beside = std::env::current_exe().ok().and_then(|exe| exe.parent().map(Path::to_path_buf));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = match name.contains('/') {
        true => executable(PathBuf::from(name)),
        false => beside.into_iter().chain(std::env::split_paths(&path)).find_map(|dir| executable(dir.join(name))),
    };
    found.ok_or_else(|| match name.contains('/') {
        true => Error::new(ErrorKind::Unsupported, format!("there is no program {name}")),
        false => {
            Error::new(ErrorKind::Unsupported, format!("the program {name} is neither beside this one nor in PATH"))
                .hint(format!("install {name}, or build it and put it there"))
        }
    })
}

fn executable(path: PathBuf) -> Option<PathBuf> {
    // Of PATH an empty element means the working directory, and the program is started in another one.
    let path = std::path::absolute(path).ok()?;
    (path.is_file() && fs::access(&path, Access::EXEC_OK).is_ok()).then_some(path)
}

pub(super) fn mount(name: &str, step: &Mount) -> Result<OwnedFd> {
    refuse_in_use(step)?;
    let program = fuse_program(name)?;
    let device = fuse_device()?;
    let root = connect(name, device.as_fd(), step)?;
    let (_, options) = split_attributes(&step.options);
    let options = options.iter().map(|option| option.as_str()).collect::<Vec<_>>().join(",");
    let program = Program::start(&program, &options, device)?;
    program.wait_until_ready()?;
    wait_for_answer(&root).doing(|| "asking the new filesystem for the first time")?;
    Ok(root)
}

/// A program that is given a mount cannot show the one that is there: the option `join` says that there is one.
fn refuse_in_use(step: &Mount) -> Result<()> {
    if !step.options.iter().any(|option| option == "join") {
        return Ok(());
    }
    let upper = step.options.iter().find_map(|option| option.strip_prefix("upperdir=")).unwrap_or("the layer");
    let why = format!("a vfs-fuse has {upper} mounted");
    let hint = format!("unmount it, in every mount namespace; `fuser -v {upper}` shows the process");
    Err(Error::new(ErrorKind::Busy, why).hint(hint))
}

/// The kernel's side: a filesystem whose requests go to `device`.
fn connect(name: &str, device: BorrowedFd<'_>, step: &Mount) -> Result<OwnedFd> {
    let (attrs, rest) = split_attributes(&step.options);
    let context = FsContext::open("fuse")?;
    context.set("source", step.source.as_os_str().as_encoded_bytes())?;
    let subtype = Path::new(name).file_name().unwrap_or(OsStr::new(name));
    context.set("subtype", subtype.as_encoded_bytes())?;
    context.set("fd", device.as_raw_fd().to_string().as_bytes())?;
    // The root is a directory: mount.fuse passes S_IFDIR in octal.
    context.set("rootmode", b"40000")?;
    context.set("user_id", geteuid().as_raw().to_string().as_bytes())?;
    context.set("group_id", getegid().as_raw().to_string().as_bytes())?;
    for flag in ["allow_other", "default_permissions"] {
        context.option(flag)?;
    }
    if rest.iter().any(|option| *option == "ro") {
        context.option("ro")?;
    }
    context.mount(attrs)
}

/// A program on its way to the background.
struct Program {
    name: String,
    child: Child,
    said: File,
}

impl Program {
    fn start(program: &Path, options: &str, device: OwnedFd) -> Result<Program> {
        let starting = || format!("starting {}", program.display());
        // A file, not a pipe: a daemon that goes on writing to a pipe would be killed when we are gone.
        let said: File = fs::memfd_create("stderr", MemfdFlags::CLOEXEC).doing(starting)?.into();
        let mut command = Command::new(program);
        command.arg("-o").arg(options).arg(format!("/dev/fd/{}", device.as_raw_fd()));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(said.try_clone()?).current_dir("/");
        sys::leave_open(&mut command, device.as_fd());
        // Afterwards only the program has the device open, so that its end is noticed.
        let child = command.spawn().map_err(|e| match Errno::from_io_error(&e) {
            Some(Errno::TOOBIG) => {
                Error::new(ErrorKind::Unsupported, "the names of its layers are too long together for one program")
                    .hint("use a data root with a shorter name, or fewer layers")
            }
            _ => e.into(),
        });
        drop(device);
        let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Program { name, child: child.doing(starting)?, said })
    }

    /// It has gone to the background when the process that was started ends without an error.
    fn wait_until_ready(mut self) -> Result<()> {
        let ended = exit_of(&mut self.child, PATIENCE).doing(|| format!("waiting for {}", self.name))?;
        let Some(status) = ended else {
            let _ = self.child.kill().and_then(|()| self.child.wait());
            let why = format!("{} was not ready after {} seconds", self.name, PATIENCE.as_secs());
            return Err(self.with_story(Error::new(ErrorKind::Io, why)));
        };
        if status.success() {
            return Ok(());
        }
        Err(self.with_story(Error::new(ErrorKind::Io, format!("{} {}", self.name, how_it_ended(status)))))
    }

    /// What it said is the better reason.
    fn with_story(&mut self, e: Error) -> Error {
        let mut said = String::new();
        let read = self.said.rewind().and_then(|()| self.said.by_ref().take(STORY).read_to_string(&mut said));
        let said = said.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ");
        match read {
            Ok(1..) if !said.is_empty() => {
                let own = said.strip_prefix(&format!("{}: ", self.name)).unwrap_or(&said);
                Error::new(e.kind(), own).doing(e.reason())
            }
            _ => e,
        }
    }
}

fn how_it_ended(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("failed with exit code {code}"),
        (_, Some(signal)) => format!("was killed by signal {signal}"),
        _ => "ended".into(),
    }
}

/// None if it still runs after so long.
fn exit_of(child: &mut Child, patience: Duration) -> Result<Option<ExitStatus>> {
    let process = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    let patience = Timespec { tv_sec: patience.as_secs() as i64, tv_nsec: 0 };
    loop {
        match poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&patience)) {
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
            Ok(0) => return Ok(None),
            Ok(_) => return Ok(Some(child.wait()?)),
        }
    }
}

/// The first request waits in the kernel until the program has agreed on the protocol with it.
fn wait_for_answer(root: &OwnedFd) -> Result<()> {
    let root = root.try_clone()?;
    let (tell, told) = mpsc::channel();
    std::thread::spawn(move || tell.send(fs::fstatvfs(&root).map(drop)));
    match told.recv_timeout(PATIENCE) {
        Ok(Err(Errno::NOTCONN | Errno::CONNABORTED)) => Err(Error::new(ErrorKind::Io, "its program has died")),
        Ok(answer) => Ok(answer?),
        Err(_) => Err(Error::new(ErrorKind::Io, format!("no answer in {} seconds", PATIENCE.as_secs()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mount::detached;
    use std::os::unix::fs::PermissionsExt;

    fn recipe(program: &Path) -> [Mount; 1] {
        let fstype = format!("fuse.{}", program.display());
        [Mount { fstype, source: "test".into(), options: vec!["lowerdir=/a".into(), "nosuid".into()] }]
    }

    fn script(dir: &Path, text: &str) -> PathBuf {
        let path = dir.join("server");
        std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[test]
    fn programs_that_fail_are_quoted_missing_ones_named_and_the_rest_get_options_and_the_open_device() {
        let dir = tempfile::tempdir().unwrap();
        let failing = script(dir.path(), "echo 'server: no such layer' >&2; exit 3");
        let e = detached(&recipe(&failing)).unwrap_err().to_string();
        assert!(e.ends_with("server failed with exit code 3: no such layer"), "{e}");
        let killed = script(dir.path(), "kill -9 $$");
        let e = detached(&recipe(&killed)).unwrap_err().to_string();
        assert!(e.ends_with("was killed by signal 9"), "{e}");
        let e = detached(&recipe(&dir.path().join("missing"))).unwrap_err();
        assert!(e.kind() == ErrorKind::Unsupported && e.to_string().contains("missing"), "{e}");
        let e = fuse_program("no-such-program").unwrap_err().to_string();
        assert!(e.contains("PATH (install no-such-program"), "{e}");

        // In the same test: a script that is being written while another thread forks cannot be started (ETXTBSY).
        let said = dir.path().join("said");
        let server = script(dir.path(), &format!("echo $1 $2 >{0}; readlink $3 >>{0}; pwd >>{0}", said.display()));
        let e = detached(&recipe(&server)).unwrap_err().to_string();
        assert!(e.ends_with("its program has died"), "{e}");
        assert_eq!(std::fs::read_to_string(said).unwrap(), "-o lowerdir=/a\n/dev/fuse\n/\n");
    }
}
