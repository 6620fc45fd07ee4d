//! A driver on a btrfs of the test's own.

#![allow(dead_code)] // Each test binary uses its own part.

#[path = "../../../../tests/skip/mod.rs"]
pub mod skip;

use btrfs_uapi::quota;
use graphdriver_btrfs::Btrfs;
use graphdriver_core::{
    Access, GraphDriver, LayerId, LayerOptions, Mount, Options,
    conformance::{Backing, BackingKind},
    mount,
};
use nix::{
    mount::MsFlags,
    sched::{CloneFlags, unshare},
};
use std::{
    fs,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

/// Leaves the test if it cannot run here.
macro_rules! needs {
    ($test:literal) => {
        if common::skip::skipped($test, common::unmet()) {
            return;
        }
    };
}
pub(crate) use needs;

pub fn unmet() -> Option<String> {
    let no_root = (!rustix::process::geteuid().is_root()).then(|| "needs root".to_owned());
    no_root.or_else(|| skip::no_program(&["mkfs.btrfs", "btrfs", "losetup"]))
}

pub struct Rig {
    // In this order: the driver before its filesystem.
    pub driver: Btrfs,
    pub home: PathBuf,
    options: Options,
    pub disk: Arc<Backing>,
}

/// A detached mount with a path that leads into it.
pub struct View(OwnedFd);

impl View {
    pub fn at(dir: &Path) -> View {
        View(fs::File::open(dir).unwrap().into())
    }

    pub fn of(rig: &Rig, id: u64) -> View {
        rig.view(id, Access::ReadOnly)
    }

    pub fn join(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.0.as_raw_fd())).join(path)
    }
}

impl Rig {
    /// On a filesystem of its own, in a mount namespace that ends with the test's thread.
    pub fn with(options: &[(&str, &str)]) -> Rig {
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        nix::mount::mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
        let disk = Arc::new(Backing::new(BackingKind::Btrfs, 1 << 30).unwrap());
        let home = disk.path().join("data/home");
        Rig::on(disk, home, options)
    }

    /// Somewhere else on this one's filesystem.
    pub fn at(&self, home: &Path, options: &[(&str, &str)]) -> Rig {
        Rig::on(self.disk.clone(), home.into(), options)
    }

    fn on(disk: Arc<Backing>, home: PathBuf, options: &[(&str, &str)]) -> Rig {
        let options = Options(options.iter().map(|(n, v)| (n.to_string(), v.to_string())).collect());
        Rig { driver: Btrfs::open(&home, &options).unwrap(), home, options, disk }
    }

    /// The driver of another process on the same data.
    pub fn reopened(&self) -> Btrfs {
        Btrfs::open(&self.home, &self.options).unwrap()
    }

    pub fn create(&self, id: u64, parents: &[u64]) {
        let parents: Vec<_> = parents.iter().copied().map(LayerId).collect();
        self.driver.create(LayerId(id), &parents, &LayerOptions::default()).unwrap();
    }

    /// A committed layer that `fill` has filled.
    pub fn layer(&self, id: u64, parents: &[u64], fill: impl FnOnce(&Path)) {
        self.create(id, parents);
        fill(&self.view(id, Access::ReadWrite).join(""));
        self.driver.commit(LayerId(id)).unwrap();
    }

    pub fn view(&self, id: u64, access: Access) -> View {
        View(mount::detached(&self.driver.mount(LayerId(id), &[], access).unwrap()).unwrap())
    }

    /// As an administrator turns them off.
    pub fn quotas_off(&self) {
        quota::quota_disable(fs::File::open(&self.home).unwrap().as_fd()).unwrap();
    }

    /// What is in `HOME/layers` of subvolumes, with those nested in them.
    pub fn subvolumes(&self) -> Vec<String> {
        let dir = fs::File::open(&self.home).unwrap();
        let all = btrfs_uapi::subvolume::subvolume_list(dir.as_fd()).unwrap();
        let mut ours: Vec<_> = all.iter().filter_map(|s| Some(s.name.split_once("/layers/")?.1.to_owned())).collect();
        ours.sort();
        ours
    }

    /// No subvolume, no qgroup and no note, when the kernel has freed what was removed.
    #[track_caller]
    pub fn assert_nothing_left(&self) {
        assert_eq!(self.subvolumes(), [""; 0]);
        let dir = fs::File::open(&self.home).unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            settle(dir.as_fd());
            assert_eq!(self.driver.reclaim(&|_| false).unwrap().layers, 0);
            let quotas = quota::qgroup_list(dir.as_fd()).unwrap();
            let groups: Vec<_> = quotas.qgroups.iter().map(|group| group.qgroupid).filter(|id| *id != 5).collect();
            if groups.is_empty() {
                break;
            }
            assert!(Instant::now() < deadline, "qgroups are left: {groups:?}");
        }
        for dir in ["layers", "usage", "limits", "flat", "stale"] {
            assert_eq!(names(&self.home.join(dir)), [""; 0], "left in {dir}");
        }
    }
}

/// Waits until the kernel has freed the subvolumes that were deleted.
pub fn settle(dir: BorrowedFd<'_>) {
    // This wakes the kernel's cleaner, which syncfs(2) does not.
    btrfs_uapi::filesystem::sync(dir).unwrap();
    // Before Linux 6.13 there is no such call.
    if btrfs_uapi::subvolume::subvol_sync_wait_all(dir).is_err() {
        std::thread::sleep(Duration::from_secs(1));
    }
    btrfs_uapi::filesystem::sync(dir).unwrap();
}

/// Makes a subvolume, as somebody in a container does.
pub fn subvolume(path: &Path) {
    btrfsutil::subvolume::Subvolume::create(path, None).unwrap();
}

/// A directory so far below `top` that no system call takes its path.
pub fn deep(top: &Path) -> View {
    let mut dir = View::at(top);
    for _ in 0..20 {
        let below = dir.join(&"d".repeat(250));
        fs::create_dir(&below).unwrap();
        dir = View::at(&below);
    }
    dir
}

pub fn read_only(path: &Path) {
    btrfsutil::subvolume::Subvolume::get(path).unwrap().set_ro(true).unwrap();
}

pub fn bind(source: &Path) -> Mount {
    Mount { fstype: "bind".into(), source: source.into(), options: vec!["bind".into()] }
}

/// A second mount of the filesystem with a subvolume as its root, below the first; a directory in it.
pub fn mounted_subvolume(top: &Path, name: &str) -> PathBuf {
    let target = top.join("mounted");
    fs::create_dir(&target).unwrap();
    let found = Command::new("findmnt").args(["-nfo", "SOURCE"]).arg(top).output().unwrap();
    let device = String::from_utf8(found.stdout).unwrap();
    let device = device.trim().split('[').next().unwrap();
    let mounted = Command::new("mount").args(["-o", &format!("subvol={name}"), device]).arg(&target).status().unwrap();
    assert!(mounted.success(), "{device}");
    target.join("home")
}

pub fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
