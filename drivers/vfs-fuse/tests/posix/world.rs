//! A mounted union to test, or a reference in its place.
//!
//! `VFS_FUSE_PROGRAM` chooses: unset, our own program; `kernel`, the kernel's overlayfs; `plain`, a directory on ext4 with
//! the same files; else the path of a program with fuse-overlayfs's command line.

use super::{common::*, sys};
use rustix::{
    fs::{Gid, Uid},
    io::Errno,
    mount::{MountFlags, UnmountFlags, mount, unmount},
};
use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Duration,
};

/// A [`World`] with one lower layer that a closure fills, or with a [`Setup`] and several; the test ends if it cannot be.
macro_rules! world {
    ($fill:expr) => {
        world!($crate::world::Setup::default(), &[&$fill])
    };
    ($setup:expr, $fills:expr) => {
        match $crate::world::World::new($setup, $fills) {
            Some(world) => world,
            None => return,
        }
    };
}

/// Fills one lower layer.
pub type Fill<'a> = &'a dyn Fn(&Path);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Backend {
    Program,
    Kernel,
    Plain,
}

/// How to mount.
#[derive(Default, Clone, Copy)]
pub struct Setup {
    /// More options for our program; the references do not get them.
    pub options: &'static [&'static str],
    /// No upper layer.
    pub readonly: bool,
    /// The upper layer on a tmpfs of so many MiB.
    pub upper_mib: Option<u32>,
    /// Each lower layer on a tmpfs of its own.
    pub own_filesystems: bool,
}

/// The mounted union, unmounted and removed when dropped.
pub struct World {
    // Dropped first.
    mounted: Option<Mounted>,
    layers: Layers,
    backend: Backend,
    setup: Setup,
}

impl World {
    /// Lower layers topmost first. `None`, and reported as skipped, where mounts are impossible.
    pub fn new(setup: Setup, fills: &[Fill]) -> Option<World> {
        if skipped(thread::current().name().unwrap_or("?"), cannot_mount()) {
            return None;
        }
        let mut layers = Layers::new(fills.len());
        for (lower, fill) in layers.lowers.iter().zip(fills) {
            if setup.own_filesystems {
                mount_tmpfs(lower, 64);
            }
            fill(lower);
        }
        if let Some(mib) = setup.upper_mib {
            let top = layers.dir().join("top");
            fs::create_dir(&top).unwrap();
            mount_tmpfs(&top, mib);
            (layers.upper, layers.work) = (top.join("upper"), top.join("work"));
            fs::create_dir(&layers.upper).unwrap();
            fs::create_dir(&layers.work).unwrap();
        }
        let mut world = World { mounted: None, layers, backend: backend(), setup };
        world.fill_plain();
        world.mount();
        Some(world)
    }

    fn fill_plain(&self) {
        if self.backend == Backend::Plain {
            for lower in self.layers.lowers.iter().rev() {
                let paths = [&lower.join("."), &self.layers.upper];
                assert!(Command::new("cp").arg("-a").args(paths).status().unwrap().success());
            }
        }
    }

    fn mount(&mut self) {
        let own = if is_own_program() { self.setup.options } else { &[] };
        self.mounted = match (self.backend, self.setup.readonly) {
            (Backend::Program, false) => Some(self.layers.mount(own)),
            (Backend::Program, true) => Some(self.layers.mount_read_only(own)),
            (Backend::Kernel, false) => Some(self.layers.mount_kernel(&["index=on,redirect_dir=on,xino=auto"])),
            (Backend::Kernel, true) => {
                // The kernel wants two lower layers if there is no upper.
                let options = self.layers.read_only_options(&[]) + ":" + self.layers.work.to_str().unwrap();
                Some(self.layers.try_mount_kernel(&options).unwrap())
            }
            (Backend::Plain, readonly) => {
                mount(&self.layers.upper, self.root(), c"", MountFlags::BIND, None).unwrap();
                if readonly {
                    let flags = MountFlags::BIND | MountFlags::RDONLY;
                    rustix::mount::mount_remount(self.root(), flags, c"").unwrap();
                }
                None
            }
        };
    }

    /// Unmounts and mounts again.
    pub fn remount(&mut self) {
        // A child that another test has just forked may still have a copy of a descriptor.
        let root = self.root();
        eventually("nobody uses the mount", Duration::from_secs(10), || {
            unmount(&root, UnmountFlags::empty()) != Err(Errno::BUSY)
        });
        if let (Some(mut mounted), Backend::Program) = (self.mounted.take(), self.backend) {
            let status = mounted.wait();
            assert!(status.success(), "the daemon ended with {status}: {}", mounted.said());
        }
        self.mount();
    }

    /// Where the union is mounted.
    pub fn root(&self) -> PathBuf {
        self.layers.merged.clone()
    }

    /// A file in the union.
    pub fn at(&self, name: impl AsRef<Path>) -> PathBuf {
        self.root().join(name)
    }

    /// The upper layer.
    pub fn upper(&self) -> PathBuf {
        self.layers.upper.clone()
    }

    /// A lower layer, 0 the topmost.
    pub fn lower(&self, n: usize) -> PathBuf {
        self.layers.lowers[n].clone()
    }

    /// Whether there are layers at all.
    pub fn is_union(&self) -> bool {
        !is_plain()
    }

    /// The daemon's process id, if there is one.
    pub fn daemon(&self) -> Option<i32> {
        (self.backend == Backend::Program).then(|| self.mounted.as_ref().unwrap().pid())
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.mounted = None;
        if self.backend == Backend::Plain {
            let _ = unmount(self.root(), UnmountFlags::DETACH);
        }
        if self.setup.upper_mib.is_some() {
            let _ = unmount(self.layers.dir().join("top"), UnmountFlags::DETACH);
        }
        // By the setup, or by who filled it: the directory is to be removed next.
        for lower in &self.layers.lowers {
            let _ = unmount(lower, UnmountFlags::DETACH);
        }
    }
}

fn mount_tmpfs(at: &Path, mib: u32) {
    let data = std::ffi::CString::new(format!("size={mib}m,mode=0755")).unwrap();
    mount("tmpfs", at, "tmpfs", MountFlags::empty(), data.as_c_str()).unwrap();
}

/// Whether the tests run on a plain directory.
pub fn is_plain() -> bool {
    backend() == Backend::Plain
}

fn backend() -> Backend {
    match std::env::var("VFS_FUSE_PROGRAM").as_deref() {
        Ok("kernel") => Backend::Kernel,
        Ok("plain") => Backend::Plain,
        _ => Backend::Program,
    }
}

/// Runs `job` with these ids and without capabilities (unless `uid` is 0), in a thread of its own.
pub fn as_user<T: Send>(uid: u32, gid: u32, groups: &[u32], job: impl FnOnce() -> T + Send) -> T {
    let groups: Vec<_> = groups.iter().map(|g| Gid::from_raw(*g)).collect();
    let run = || {
        // These are the raw system calls, which change only the calling thread.
        rustix::thread::set_thread_groups(&groups).unwrap();
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        rustix::thread::set_thread_res_gid(gid, gid, gid).unwrap();
        rustix::thread::set_thread_res_uid(uid, uid, uid).unwrap();
        job()
    };
    join(thread::scope(|s| s.spawn(run).join()))
}

/// Runs `job` with this umask.
pub fn with_umask<T: Send>(mask: u32, job: impl FnOnce() -> T + Send) -> T {
    let run = || {
        sys::own_umask_and_cwd();
        rustix::process::umask(mask.into());
        job()
    };
    join(thread::scope(|s| s.spawn(run).join()))
}

fn join<T>(result: thread::Result<T>) -> T {
    result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// The errno of a call that must fail.
pub trait Fails {
    /// The errno; panics if the call succeeded.
    fn errno(self) -> Errno;
}

impl<T> Fails for std::io::Result<T> {
    #[track_caller]
    fn errno(self) -> Errno {
        match self {
            Ok(_) => panic!("succeeded, though it must not"),
            Err(error) => Errno::from_io_error(&error).unwrap_or_else(|| panic!("{error}")),
        }
    }
}

impl<T> Fails for rustix::io::Result<T> {
    #[track_caller]
    fn errno(self) -> Errno {
        self.err().expect("succeeded, though it must not")
    }
}

/// lstat.
#[track_caller]
pub fn stat(path: impl AsRef<Path>) -> fs::Metadata {
    fs::symlink_metadata(path.as_ref()).unwrap_or_else(|e| panic!("{}: {e}", path.as_ref().display()))
}

/// Permission bits.
#[track_caller]
pub fn mode(path: impl AsRef<Path>) -> u32 {
    stat(path).mode() & 0o7777
}

/// chmod.
#[track_caller]
pub fn chmod(path: impl AsRef<Path>, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// lchown.
#[track_caller]
pub fn chown(path: impl AsRef<Path>, uid: u32, gid: u32) {
    std::os::unix::fs::lchown(path, Some(uid), Some(gid)).unwrap();
}

/// Writes a file with mode and owner.
#[track_caller]
pub fn put(path: impl AsRef<Path>, data: impl AsRef<[u8]>, bits: u32, uid: u32, gid: u32) {
    fs::write(&path, data).unwrap();
    chown(&path, uid, gid);
    chmod(&path, bits);
}

/// Makes a directory with mode and owner.
#[track_caller]
pub fn put_dir(path: impl AsRef<Path>, bits: u32, uid: u32, gid: u32) {
    fs::create_dir(&path).unwrap();
    chown(&path, uid, gid);
    chmod(&path, bits);
}

/// Names in a directory, sorted.
#[track_caller]
pub fn names(dir: impl AsRef<Path>) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
