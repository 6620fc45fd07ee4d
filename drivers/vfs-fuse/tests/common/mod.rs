//! Real mounts for tests: layers in a directory of their own, shown by the program or by the kernel's overlay, in a mount
//! namespace of the test's own.
//!
//! `VFS_FUSE_PROGRAM` names another program with the same command line to test instead (`/usr/bin/fuse-overlayfs`);
//! `VFS_FUSE_OPTIONS` are options that every mount by the program gets in addition (`passthrough=0`).

#![allow(dead_code)] // No test uses all of it.

#[path = "../../../../tests/skip/mod.rs"]
mod skip;

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
pub use skip::{no_program, skipped};
use std::{
    collections::HashSet,
    fs::{self, Permissions},
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};
use tempfile::TempDir;

/// A daemon that has not mounted, or not ended, by then hangs.
const LIMIT: Duration = Duration::from_secs(30);

/// Why tests that mount cannot run here; to be given to [`skipped`] with the test's name.
pub fn cannot_mount() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("it mounts and must run as root".into());
    }
    if !Path::new("/dev/fuse").exists() {
        return Some("there is no /dev/fuse: modprobe fuse".into());
    }
    no_program(&["setpriv"])
}

/// Puts this thread, and all threads and processes it starts from now on, into a mount namespace of their own, so that
/// no mount is seen outside or outlives them. Does nothing if it is in one. [`Layers`] does it by itself.
pub fn private_mounts() {
    static MADE: Mutex<Option<HashSet<u64>>> = Mutex::new(None);
    let current = || fs::metadata("/proc/thread-self/ns/mnt").unwrap().ino();
    let mut made = MADE.lock().unwrap_or_else(|e| e.into_inner());
    let made = made.get_or_insert_default();
    if !made.contains(&current()) {
        unshare(CloneFlags::CLONE_NEWNS).expect("root may make a mount namespace");
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
        made.insert(current());
    }
}

/// The program under test.
pub fn program() -> PathBuf {
    std::env::var_os("VFS_FUSE_PROGRAM").map_or_else(|| env!("CARGO_BIN_EXE_vfs-fuse").into(), PathBuf::from)
}

/// Whether it is the project's own, of this build or another, and not one of a peer that a test is tried on.
pub fn is_own_program() -> bool {
    program().file_name().is_some_and(|name| name.to_string_lossy().starts_with("vfs-fuse"))
}

/// Directories for a union, empty at first.
pub struct Layers {
    /// Read-only layers, topmost first.
    pub lowers: Vec<PathBuf>,
    /// The writable layer.
    pub upper: PathBuf,
    /// The work directory.
    pub work: PathBuf,
    /// Where the union is mounted.
    pub merged: PathBuf,
    dir: Arc<TempDir>,
}

impl Layers {
    /// With `lowers` lower layers, below `TMPDIR` or else `/var/tmp`.
    pub fn new(lowers: usize) -> Layers {
        let base = std::env::var_os("TMPDIR").map_or_else(|| "/var/tmp".into(), PathBuf::from);
        Layers::on(&base, lowers)
    }

    /// The same below `base`: where a [`Backing`](graphdriver_core::conformance::Backing) is mounted, for example.
    pub fn on(base: &Path, lowers: usize) -> Layers {
        private_mounts();
        let dir = tempfile::Builder::new().prefix("vfs-fuse-test-").tempdir_in(base).unwrap();
        // Some tests act as other users.
        fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
        let make = |name: &str| {
            let path = dir.path().join(name);
            fs::create_dir(&path).unwrap();
            path
        };
        let lowers = (0..lowers).map(|n| make(&format!("lower{n}"))).collect();
        let (upper, work, merged) = (make("upper"), make("work"), make("merged"));
        Layers { lowers, upper, work, merged, dir: Arc::new(dir) }
    }

    /// Scratch space beside the layers, on the same filesystem.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The value of `-o` for these layers: `lowerdir=…,upperdir=…,workdir=…` and then `options`.
    pub fn options(&self, options: &[&str]) -> String {
        let (upper, work) = (self.upper.display(), self.work.display());
        let writable = join(self.read_only_options(&[]), &[&format!("upperdir={upper},workdir={work}")]);
        join(writable, options)
    }

    /// The same without a writable layer.
    pub fn read_only_options(&self, options: &[&str]) -> String {
        let lowers: Vec<_> = self.lowers.iter().map(|path| path.to_str().unwrap()).collect();
        join(format!("lowerdir={}", lowers.join(":")), options)
    }

    /// Mounts them with the program, `options` added.
    pub fn mount(&self, options: &[&str]) -> Mounted {
        self.try_mount(&self.options(options)).unwrap_or_else(|said| panic!("it did not mount: {said}"))
    }

    /// Mounts the lower layers alone, read-only.
    pub fn mount_read_only(&self, options: &[&str]) -> Mounted {
        self.try_mount(&self.read_only_options(options)).unwrap_or_else(|said| panic!("it did not mount: {said}"))
    }

    /// Mounts with the program and exactly these options; or what it said when it ended without having mounted.
    pub fn try_mount(&self, options: &str) -> Result<Mounted, String> {
        let log = tempfile::Builder::new().prefix("log-").tempfile_in(self.dir()).unwrap();
        let (log, log_path) = log.keep().unwrap();
        let always = std::env::var("VFS_FUSE_OPTIONS").ok();
        let options = join(options.into(), &always.as_deref().map_or(vec![], |o| vec![o]));
        // Not even the end of this process by a signal may leave it behind. setpriv(1) becomes the program: same pid.
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL"])
            .arg(program())
            .args(["-f", "-o", &options])
            .arg(&self.merged)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut mounted =
            Mounted { child: Some(child), log: log_path, path: self.merged.clone(), dir: self.dir.clone() };
        let outside = fs::metadata(self.dir()).unwrap().dev();
        let deadline = Instant::now() + LIMIT;
        while fs::metadata(&self.merged).is_ok_and(|inside| inside.dev() == outside) {
            if let Some(status) = mounted.child.as_mut().unwrap().try_wait().unwrap() {
                return Err(format!("{status}: {}", mounted.said()));
            }
            assert!(Instant::now() < deadline, "not mounted after {LIMIT:?}: {}", mounted.said());
            thread::sleep(Duration::from_millis(2));
        }
        Ok(mounted)
    }

    /// Mounts them with the kernel's overlay, `options` added.
    pub fn mount_kernel(&self, options: &[&str]) -> Mounted {
        self.try_mount_kernel(&self.options(options)).unwrap_or_else(|e| panic!("overlay cannot be mounted: {e}"))
    }

    /// Mounts with the kernel's overlay and exactly these options.
    pub fn try_mount_kernel(&self, options: &str) -> nix::Result<Mounted> {
        mount(Some("overlay"), &self.merged, Some("overlay"), MsFlags::empty(), Some(options))?;
        Ok(Mounted { child: None, log: PathBuf::new(), path: self.merged.clone(), dir: self.dir.clone() })
    }
}

fn join(first: String, more: &[&str]) -> String {
    more.iter().fold(first, |all, option| format!("{all},{option}"))
}

/// A mounted union. When it is dropped the mount is taken away, whatever uses it, and the daemon is gone.
pub struct Mounted {
    child: Option<Child>,
    log: PathBuf,
    path: PathBuf,
    /// Outlives the mount.
    dir: Arc<TempDir>,
}

impl Mounted {
    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The daemon's process; the kernel's overlay has none.
    pub fn pid(&self) -> i32 {
        self.child.as_ref().expect("mounted by a daemon").id() as i32
    }

    /// What the daemon has written to its standard output and error.
    pub fn said(&self) -> String {
        fs::read(&self.log).map_or_else(|_| String::new(), |said| String::from_utf8_lossy(&said).into_owned())
    }

    /// Kills the daemon with SIGKILL. The dead mount stays until this is dropped.
    pub fn kill(&mut self) {
        if let Some(child) = &mut self.child {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// Sends the daemon a signal.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid()), signal).unwrap();
    }

    /// Waits until the daemon has ended by itself.
    pub fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + LIMIT;
        loop {
            match self.child.as_mut().expect("mounted by a daemon").try_wait().unwrap() {
                Some(status) => return status,
                None => assert!(Instant::now() < deadline, "the daemon still runs after {LIMIT:?}: {}", self.said()),
            }
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// Unmounts, which fails if it is in use, and waits for the daemon, which must end without an error.
    pub fn unmount(mut self) {
        // For a moment it may be in use by a process that another test has forked: it has all descriptors until its exec.
        let deadline = Instant::now() + Duration::from_secs(30);
        while let Err(e) = umount2(&self.path, MntFlags::empty()) {
            let again = e == nix::Error::EBUSY && Instant::now() < deadline;
            assert!(again, "unmounting {}: {e}", self.path.display());
            thread::sleep(Duration::from_millis(5));
        }
        if self.child.is_some() {
            let status = self.wait();
            assert!(status.success(), "the daemon ended with {status}: {}", self.said());
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // First the daemon: a request that it does not answer would hold up the unmount. Its death ends all of them.
        self.kill();
        // Nothing is mounted after `unmount` or a start that failed.
        let _ = umount2(&self.path, MntFlags::MNT_DETACH);
        if thread::panicking() {
            eprint!("{}", self.said());
        }
    }
}

/// Waits for a condition that must come true.
pub fn eventually(what: &str, limit: Duration, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + limit;
    while !condition() {
        assert!(Instant::now() < deadline, "after {limit:?} still not: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}
