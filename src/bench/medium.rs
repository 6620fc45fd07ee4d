//! What is on the device: a filesystem, a ZFS pool, or nothing yet for a driver that takes the device as it is.

use super::{device::Device, results::Scratch};
use graphdriver_core::{Context, Error, ErrorKind, Mount, Result, mount};
use rustix::fs::{fstatfs, fstatvfs, syncfs};
use std::{
    fmt,
    fs::{self, File},
    os::{fd::AsFd, unix::process::CommandExt},
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};
use tempfile::TempDir;

/// See [`Medium`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    Ext4,
    Xfs,
    Btrfs,
    /// A pool of one device.
    Zfs,
    /// The device itself, for devicemapper's `dm.directlvm_device`.
    Whole,
}

impl Kind {
    /// What mkfs is told. Nothing may be left to do later, in the middle of a measurement.
    fn mkfs(self) -> &'static [&'static str] {
        match self {
            Kind::Ext4 => &["mkfs.ext4", "-q", "-F", "-E", "nodiscard,lazy_itable_init=1,lazy_journal_init=1"],
            Kind::Xfs => &["mkfs.xfs", "-q", "-f", "-K"],
            // As it chooses by itself; told, since what is double is written twice.
            Kind::Btrfs => &["mkfs.btrfs", "-q", "-f", "-K", "-d", "single", "-m", "dup"],
            Kind::Zfs | Kind::Whole => &[],
        }
    }

    /// The command that makes it, and its version; None of what is made otherwise.
    pub fn made_with(self) -> Option<String> {
        let command = self.mkfs();
        let version = Command::new(command.first()?)
            .arg("-V")
            .env("PATH", search_path())
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .output()
            .map(|out| [out.stdout, out.stderr].concat())
            .unwrap_or_default();
        let version = String::from_utf8_lossy(&version);
        Some(format!("{} ({})", command.join(" "), version.lines().next().unwrap_or("of an unknown version").trim()))
    }

    fn mount_options(self) -> &'static [&'static str] {
        match self {
            // What mkfs has left out is zero on a sparse file already.
            Kind::Ext4 => &["noinit_itable"],
            _ => &[],
        }
    }

    fn package(self) -> &'static str {
        match self {
            Kind::Ext4 => "e2fsprogs",
            Kind::Xfs => "xfsprogs",
            Kind::Btrfs => "btrfs-progs",
            Kind::Zfs => "zfsutils-linux",
            Kind::Whole => "",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Ext4 => "ext4",
            Kind::Xfs => "xfs",
            Kind::Btrfs => "btrfs",
            Kind::Zfs => "zfs",
            Kind::Whole => "thin devices",
        })
    }
}

/// A fresh filesystem on a device of its own, gone when it is dropped. It is mounted in the caller's mount namespace,
/// which has to be private.
pub(super) struct Medium {
    kind: Kind,
    dir: TempDir,
    recipe: Option<Mount>,
    mounted: bool,
    pool: Option<String>,
    size: u64,
    device: Device,
}

impl Medium {
    pub fn new(kind: Kind, scratch: &Path, size: u64) -> Result<Medium> {
        let dir = tempfile::Builder::new().prefix("graphdriver-bench-").tempdir_in(scratch);
        let dir = dir.doing(|| format!("making a directory in {}", scratch.display()))?;
        let device = Device::new(scratch, size)?;
        // From here on a failure undoes what was done.
        let mut medium = Medium { kind, dir, recipe: None, mounted: false, pool: None, size, device };
        medium.set_up().doing(|| format!("making {kind} to measure on"))?;
        Ok(medium)
    }

    fn set_up(&mut self) -> Result<()> {
        let device = self.device.path();
        let recipe = match self.kind {
            Kind::Zfs => {
                // As unique as the directory.
                let name = self.dir.path().file_name().unwrap_or_default().to_string_lossy().into_owned();
                let options = ["-o", "cachefile=none", "-O", "mountpoint=legacy"];
                run(
                    Command::new("zpool").args(["create", "-f"]).args(options).arg(&name).arg(device),
                    "zfsutils-linux",
                )?;
                self.pool = Some(name.clone());
                recipe("zfs", Path::new(&name), &[])
            }
            // The store's own books, which are none of the driver's data.
            Kind::Whole => recipe("tmpfs", Path::new("graphdriver-bench"), &["size=256m", "mode=755"]),
            kind => {
                let (program, arguments) = kind.mkfs().split_first().expect("only filesystems come here");
                run(Command::new(program).args(arguments).arg(&device), kind.package())?;
                recipe(&kind.to_string(), &device, kind.mount_options())
            }
        };
        self.recipe = Some(recipe);
        self.mount()
    }

    fn mount(&mut self) -> Result<()> {
        let root = mount::detached(self.recipe.as_slice())?;
        mount::attach(root.as_fd(), File::open(self.dir.path())?.as_fd())?;
        self.mounted = true;
        Ok(())
    }

    fn unmount(&mut self) -> Result<()> {
        patiently(|| mount::unmount(self.dir.path(), false))?;
        self.mounted = false;
        Ok(())
    }

    /// Forgets what is cached of it, so that reading begins at the device. Nobody may be using it. Of a whole device nothing
    /// is cached here; a pool's cache outlives its mounts, so that there the whole machine's caches are dropped.
    pub fn forget(&mut self) -> Result<()> {
        match self.kind {
            Kind::Ext4 | Kind::Xfs | Kind::Btrfs => self.unmount().and_then(|()| self.mount()),
            Kind::Whole => Ok(()),
            Kind::Zfs => {
                let path = "/proc/sys/vm/drop_caches";
                fs::write(path, "3").doing(|| format!("dropping caches through {path}"))
            }
        }
    }

    /// Where it is mounted; what is not on the device where that is the driver's alone.
    pub fn root(&self) -> &Path {
        self.dir.path()
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The pool's name, if it is one.
    pub fn pool(&self) -> Option<&str> {
        self.pool.as_deref()
    }

    /// Returns when all that was written is on the device.
    pub fn sync(&self) -> Result<()> {
        match &self.pool {
            // syncfs(2) would write everything to the intent log as well.
            Some(pool) => run(Command::new("zpool").args(["sync", pool]), "zfsutils-linux"),
            None => Ok(syncfs(File::open(self.root())?).doing(|| "syncing the filesystem")?),
        }
    }

    /// Bytes in use, as statfs shows; of a whole device, those of its sparse file that are allocated.
    pub fn used(&self) -> Result<u64> {
        if self.kind == Kind::Whole {
            return self.device.allocated();
        }
        // What is not free: a dataset of a pool does not count what others of it hold.
        let told = fstatvfs(File::open(self.root())?)?;
        Ok(self.size.saturating_sub(told.f_bfree * told.f_frsize))
    }

    /// As the kernel shows them: of the mount and of its filesystem.
    pub fn mount_options(&self) -> Result<String> {
        let table = mount::table()?;
        let shown = table.iter().rev().find(|mount| mount.mount_point == self.root());
        let shown = shown.ok_or_else(|| Error::new(ErrorKind::NotFound, "the filesystem is mounted nowhere"))?;
        Ok(options_of(shown))
    }
}

impl Drop for Medium {
    fn drop(&mut self) {
        if self.mounted
            && let Err(e) = self.unmount()
        {
            tracing::warn!("what was measured on stays mounted until this ends: {e}");
            // Out of sight at least; the kernel frees it with its last user.
            let _ = mount::unmount(self.dir.path(), true);
        }
        if let Some(pool) = &self.pool
            && let Err(e) = patiently(|| run(Command::new("zpool").args(["destroy", "-f", pool]), "zfsutils-linux"))
        {
            tracing::warn!("pool {pool} is left, to be destroyed with zpool destroy -f {pool}: {e}");
        }
    }
}

fn options_of(shown: &mount::MountInfo) -> String {
    let mut all: Vec<String> = Vec::new();
    for options in [&shown.options, &shown.super_options] {
        let new = options.to_string_lossy();
        for option in new.split(',').filter(|option| !option.is_empty()) {
            if all.iter().all(|known| known != option) {
                all.push(option.to_owned());
            }
        }
    }
    all.join(",")
}

/// What a directory lies on. None if the kernel shows no mount of it, as where somebody's root is hidden.
pub(super) fn scratch(dir: &Path) -> Result<Option<Scratch>> {
    let dir = dir.canonicalize().doing(|| format!("looking at the scratch directory {}", dir.display()))?;
    let table = mount::table()?;
    // Of those on the same place the last one is seen.
    let of_it = table.iter().filter(|mount| dir.starts_with(&mount.mount_point));
    Ok(of_it.max_by_key(|mount| mount.mount_point.components().count()).map(|mount| Scratch {
        filesystem: mount.fstype.to_string_lossy().into_owned(),
        device: mount.source.to_string_lossy().into_owned(),
        mount_options: options_of(mount),
    }))
}

/// Tries until it works: the last user, a program that serves a mount perhaps, may take a moment to go.
pub(super) fn patiently(mut attempt: impl FnMut() -> Result<()>) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        match attempt() {
            Err(e) if e.kind() != ErrorKind::NotFound && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(20));
            }
            other => return other,
        }
    }
}

pub(super) fn recipe(fstype: &str, source: &Path, options: &[&str]) -> Mount {
    let options = options.iter().map(|option| option.to_string()).collect();
    Mount { fstype: fstype.into(), source: source.into(), options }
}

/// Has a filesystem write everything to where it belongs. Others than xfs have done that when they are synced; xfs has then
/// written its log, and the metadata follows within half a minute, unless it is frozen. A process of its own thaws it, for
/// nobody else could after this one was killed.
pub(super) fn settle(dir: &File) -> Result<()> {
    const XFS: u64 = 0x5846_5342;
    if fstatfs(dir).doing(|| "looking at a filesystem")?.f_type as u64 != XFS {
        return Ok(());
    }
    let script = "trap '' HUP INT TERM; fsfreeze -f /proc/self/fd/0 && fsfreeze -u /proc/self/fd/0";
    let mut command = Command::new("sh");
    command.args(["-c", script]).process_group(0);
    run_with(&mut command, dir.try_clone()?.into(), "util-linux").doing(|| "freezing xfs, to have its metadata written")
}

/// Also where Debian has such programs, and not everybody's PATH leads.
fn search_path() -> String {
    format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default())
}

/// Runs a program of `package` to its end; what it says on standard error is the reason if it fails.
fn run(command: &mut Command, package: &str) -> Result<()> {
    run_with(command, Stdio::null(), package)
}

fn run_with(command: &mut Command, stdin: Stdio, package: &str) -> Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    command.env("PATH", search_path()).env("LC_ALL", "C").stdin(stdin);
    let out = command.output().map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => Error::new(ErrorKind::Unsupported, format!("{program} is not installed"))
            .hint(format!("apt-get install {package}")),
        _ => Error::from(e).doing(format!("running {program}")),
    })?;
    if out.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&out.stderr);
    Err(Error::new(ErrorKind::Io, format!("{program} failed: {}", said.trim())))
}
