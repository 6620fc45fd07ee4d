//! From a mount's settings to the process that serves it.

use crate::{
    config::Config,
    fuse::{Session, Target, Unmounter},
    join::{announce, joined},
    options::{MountOptions, Parsed},
    sys,
    union::Union,
};
use graphdriver_core::{
    Context, Error, ErrorKind, Result,
    mount::{attach, table},
};
use rustix::{
    fs::{Mode, OFlags, fstat, major, minor, open, stat},
    mount::{MountAttrFlags, UnmountFlags, unmount},
    process::{Resource, Rlimit, WaitOptions, getrlimit, setrlimit, setsid, umask, wait},
    thread::{CapabilitySet, capabilities, set_capabilities},
};
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM},
    iterator::Signals,
};
use std::{
    fs::File,
    io::{PipeReader, PipeWriter, Read, Write},
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

/// How long after a signal those who still use the mount may go on.
const GRACE: Duration = Duration::from_secs(5);

/// Mounts and serves. In the foreground it returns when the mount is gone, else as soon as the mount answers, while
/// another process serves it. To be called while there is one thread only.
pub fn mount(parsed: Parsed, mountpoint: &Path, foreground: bool) -> Result<ExitCode> {
    let place = Place::find(mountpoint)?;
    let config = parsed.config.resolved()?;
    if parsed.mount.join && place.join(&config, &parsed.mount)? {
        return Ok(ExitCode::SUCCESS);
    }
    // Modes are what the caller of the mount asked for, less the caller's umask, which the kernel sends.
    umask(Mode::empty());
    raise_file_limit().doing(|| "raising the limit of open files")?;
    if foreground {
        keep_to_limits()?;
        serve(config, &parsed.mount, place, || Ok(()))?;
        return Ok(ExitCode::SUCCESS);
    }
    let (reader, writer) = std::io::pipe().doing(|| "making a pipe for the daemon")?;
    if sys::fork().doing(|| "starting the daemon")? {
        drop(reader);
        // Killed for its memory the daemon would free little and take all that run on its mount with it. Not everybody may.
        let _ = std::fs::write("/proc/self/oom_score_adj", "-900");
        keep_to_limits()?;
        serve(config, &parsed.mount, place, || detach(writer))?;
        return Ok(ExitCode::SUCCESS);
    }
    drop((writer, place.target));
    await_daemon(reader, place.path.as_deref())
}

/// Where to mount.
struct Place {
    target: Target,
    /// Known only if the mount is ours to make.
    path: Option<PathBuf>,
}

impl Place {
    fn find(mountpoint: &Path) -> Result<Self> {
        let number = mountpoint.to_str().and_then(|m| m.strip_prefix("/dev/fd/")).and_then(|n| n.parse().ok());
        if let Some(number) = number {
            let device = fuse_device(number).doing(|| format!("taking {} for a mount", mountpoint.display()))?;
            return Ok(Place { target: Target::Device(device), path: None });
        }
        let doing = || format!("looking at mountpoint {}", mountpoint.display());
        let found = mountpoint.canonicalize().and_then(|path| Ok((path.metadata()?.is_dir(), path)));
        let (is_dir, path) = found.map_err(|e| {
            let dead = e.raw_os_error() == Some(libc::ENOTCONN);
            let error = Error::from(e).doing(doing());
            if dead { error.hint("the daemon that served it is gone; clean up with umount first") } else { error }
        })?;
        if !is_dir {
            return Err(Error::new(ErrorKind::InvalidInput, "not a directory").doing(doing()));
        }
        Ok(Place { target: Target::Path(path.clone()), path: Some(path) })
    }
}

impl Place {
    /// Shows the filesystem of the daemon that has the layer already; false if there is none.
    fn join(&self, config: &Config, options: &MountOptions) -> Result<bool> {
        let (Some(path), Some(upper), Some(work)) = (&self.path, &config.upper, &config.work) else { return Ok(false) };
        let mut attributes = MountAttrFlags::empty();
        attributes.set(MountAttrFlags::MOUNT_ATTR_RDONLY, options.read_only);
        attributes.set(MountAttrFlags::MOUNT_ATTR_NOSUID, !options.suid);
        attributes.set(MountAttrFlags::MOUNT_ATTR_NODEV, !options.dev);
        attributes.set(MountAttrFlags::MOUNT_ATTR_NOEXEC, !options.exec);
        let Some(mount) = joined(upper, work, attributes)? else { return Ok(false) };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let target = open(path, flags, Mode::empty()).doing(|| format!("opening {}", path.display()))?;
        attach(mount.as_fd(), target.as_fd()).map(|()| true)
    }
}

/// mount.fuse3 mounts by itself when asked to drop privileges, and gives the program the open device.
fn fuse_device(number: i32) -> Result<OwnedFd> {
    let device = sys::inherited_fd(number)?;
    let rdev = fstat(&device)?.st_rdev;
    match (major(rdev), minor(rdev)) {
        (10, 229) => Ok(device),
        _ => Err(Error::new(ErrorKind::InvalidInput, "it is not /dev/fuse")),
    }
}

fn raise_file_limit() -> rustix::io::Result<()> {
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })
}

/// Gives up the capability that lets its owner exceed quotas and take what ext4 holds back for root: those who write to the
/// mount would have it, as the daemon writes for them. It is a thread's own, so this comes before there are others.
fn keep_to_limits() -> Result<()> {
    let mut own = capabilities(None).doing(|| "reading the capabilities")?;
    own.effective.remove(CapabilitySet::SYS_RESOURCE);
    own.permitted.remove(CapabilitySet::SYS_RESOURCE);
    own.inheritable.remove(CapabilitySet::SYS_RESOURCE);
    set_capabilities(None, own).doing(|| "giving up CAP_SYS_RESOURCE")
}

fn serve(config: Config, options: &MountOptions, place: Place, ready: impl FnOnce() -> Result<()>) -> Result<()> {
    // Before the mount is there: a signal in between must not leave it behind.
    let signals = Signals::new([SIGTERM, SIGINT, SIGHUP]).doing(|| "setting up signals")?;
    let work = config.work.clone();
    let union = Union::open(config)?;
    let session = Session::start(union, place.target, options)?;
    let mounted = place.path.and_then(|path| Mounted::find(&path));
    let named = options.fsname != MountOptions::default().fsname;
    if let (Some(mounted), Some(work)) = (&mounted, work.filter(|_| named)) {
        // Without it nobody joins the mount, which is no reason to have none.
        announce(&work, mounted.dev).unwrap_or_else(|error| tracing::warn!(%error, "no second mount will be possible"));
    }
    let unmounter = session.unmounter();
    let thread = thread::Builder::new().name("signals".into());
    thread.spawn(|| end_at_signal(signals, unmounter, mounted)).doing(|| "starting a thread")?;
    ready()?;
    session.run()
}

/// The first signal takes the mount away; the process ends when its last user is gone, but at a second signal, and after
/// a while, in any case: then those who still use it get ENOTCONN.
fn end_at_signal(mut signals: Signals, unmounter: Unmounter, mounted: Option<Mounted>) {
    let Some(signal) = signals.forever().next() else { return };
    tracing::debug!(signal, "unmounting");
    if let Err(error) = unmounter.unmount() {
        tracing::warn!(%error, "unmounting; detaching instead");
        mounted.as_ref().inspect(|mounted| mounted.detach());
    }
    let end = Instant::now() + GRACE;
    while Instant::now() < end && signals.pending().next().is_none() {
        thread::sleep(Duration::from_millis(50));
    }
    tracing::warn!("ending while the mount is still in use");
    mounted.inspect(Mounted::detach_all);
    std::process::exit(1);
}

/// A mount that can be told from others on the same directory.
#[derive(PartialEq)]
struct Mounted {
    path: PathBuf,
    id: u64,
    dev: (u32, u32),
}

impl Mounted {
    /// The topmost on this directory. Without a look at the directory itself, which might wait for this very process.
    fn find(path: &Path) -> Option<Self> {
        let entry = table().ok()?.into_iter().rfind(|entry| entry.mount_point == path)?;
        Some(Mounted { path: path.into(), id: entry.id, dev: entry.dev })
    }

    /// Takes it out of the tree, whoever uses it.
    fn detach(&self) {
        if Mounted::find(&self.path).as_ref() != Some(self) {
            tracing::warn!("something else is mounted there");
        } else if let Err(error) = unmount(&self.path, UnmountFlags::DETACH) {
            tracing::warn!(%error, "detaching");
        }
    }

    /// The same with every mount of the filesystem in this mount namespace: nobody answers any more.
    fn detach_all(&self) {
        for entry in table().unwrap_or_default().into_iter().filter(|entry| entry.dev == self.dev) {
            if let Err(error) = unmount(&entry.mount_point, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
                tracing::warn!(%error, "detaching");
            }
        }
    }
}

/// Cuts all ties to whoever started the daemon and tells the process that waits.
fn detach(mut ready: PipeWriter) -> Result<()> {
    setsid().doing(|| "starting a session")?;
    std::env::set_current_dir("/").doing(|| "changing to /")?;
    let null = File::options().read(true).write(true).open("/dev/null").doing(|| "opening /dev/null")?;
    rustix::stdio::dup2_stdin(&null).doing(|| "redirecting standard input")?;
    rustix::stdio::dup2_stdout(&null).doing(|| "redirecting standard output")?;
    rustix::stdio::dup2_stderr(&null).doing(|| "redirecting standard error")?;
    // Nobody waits any more if this fails, which is no reason to take the mount away.
    let _ = ready.write_all(b"1");
    Ok(())
}

/// Waits until the daemon has mounted and answers. If it failed it has said why itself.
fn await_daemon(mut daemon: PipeReader, mountpoint: Option<&Path>) -> Result<ExitCode> {
    if daemon.read(&mut [0]).doing(|| "waiting for the daemon")? == 0 {
        let status = wait(WaitOptions::empty()).doing(|| "waiting for the daemon")?;
        return match status.and_then(|(_, status)| status.terminating_signal()) {
            Some(signal) => Err(Error::new(ErrorKind::Io, format!("the daemon was killed by signal {signal}"))),
            None => Ok(ExitCode::FAILURE),
        };
    }
    if let Some(path) = mountpoint {
        stat(path).doing(|| format!("looking at {} as the daemon shows it", path.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}
