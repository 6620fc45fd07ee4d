//! What the service runs on: drivers, and the filesystems, pools and devices that they need.

use crate::support::{skip, system};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// A driver, and what its data root is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum On {
    Overlay2,
    /// On a disk of its own.
    Overlay2Ext4,
    /// With project quotas, on xfs or ext4.
    Overlay2Limited(&'static str),
    VfsFuse,
    Btrfs,
    /// With quotas.
    BtrfsLimited,
    Devicemapper,
    Zfs,
}

/// Small, as layers are in memory, and every base device is formatted anew.
const DEVICEMAPPER: &str = r#"{"storage-opts": ["dm.fs=ext4", "dm.basesize=64M", "dm.loopdatasize=1G",
    "dm.loopmetadatasize=8M", "dm.min_free_space=0%"]}"#;

impl On {
    pub fn driver(self) -> &'static str {
        match self {
            On::Overlay2 | On::Overlay2Ext4 | On::Overlay2Limited(_) => "overlay2",
            On::VfsFuse => "vfs-fuse",
            On::Btrfs | On::BtrfsLimited => "btrfs",
            On::Devicemapper => "devicemapper",
            On::Zfs => "zfs",
        }
    }

    /// Whether the test cannot run here, which then is noted.
    #[track_caller]
    pub fn skipped(self, test: &str) -> bool {
        let there = |path: &str, lacking: &str| (!Path::new(path).exists()).then(|| lacking.to_owned());
        match self {
            On::Overlay2 => false,
            On::Overlay2Ext4 => skip::skipped(test, skip::no_program(&["mkfs.ext4"])),
            On::VfsFuse => skip::skipped(test, crate::no_vfs_fuse()),
            On::Btrfs | On::BtrfsLimited => skip::skipped(test, skip::no_program(&["mkfs.btrfs", "btrfs"])),
            On::Devicemapper => {
                skip::skipped_outside_guest(test, there("/dev/mapper/control", "the kernel has no device-mapper"))
            }
            On::Zfs => skip::skipped_outside_guest(test, there("/dev/zfs", "the kernel has no ZFS")),
            On::Overlay2Limited(_) => {
                let lacking = "the kernel mounts no xfs with project quotas";
                skip::skipped_outside_guest(test, there("/proc/fs/xfs/xqmstat", lacking))
            }
        }
    }
}

/// What was set up for a test; taken down when this is dropped, after the service.
pub struct Rig {
    root: PathBuf,
    /// A pool of ZFS and its file, which the kernel opens from outside of the test's mount namespace.
    pool: Option<(String, tempfile::TempDir)>,
}

impl Rig {
    /// For a data root at `DIR/root`.
    pub fn new(dir: &Path, on: On) -> Rig {
        let root = dir.join("root");
        let mut rig = Rig { root, pool: None };
        match on {
            On::Overlay2 | On::VfsFuse => {}
            On::Overlay2Ext4 => rig.disk("mkfs.ext4", &["-q"], "loop"),
            On::Overlay2Limited("xfs") => rig.disk("mkfs.xfs", &["-q"], "loop,pquota"),
            On::Overlay2Limited(_) => {
                rig.disk("mkfs.ext4", &["-q", "-O", "project,quota", "-E", "quotatype=prjquota"], "loop,prjquota");
            }
            On::Btrfs => rig.disk("mkfs.btrfs", &["-q"], "loop"),
            On::BtrfsLimited => {
                rig.disk("mkfs.btrfs", &["-q"], "loop");
                system("btrfs", &["quota", "enable", rig.root.to_str().unwrap()]);
            }
            On::Devicemapper => fs::write(rig.root.with_extension("json"), DEVICEMAPPER).unwrap(),
            On::Zfs => rig.zfs(),
        }
        rig
    }

    /// A filesystem of its own at the data root.
    fn disk(&self, mkfs: &str, arguments: &[&str], options: &str) {
        let disk = self.root.with_extension("disk");
        fs::File::create(&disk).unwrap().set_len(512 << 20).unwrap();
        fs::create_dir(&self.root).unwrap();
        let (disk, root) = (disk.to_str().unwrap(), self.root.to_str().unwrap());
        system(mkfs, &[arguments, &[disk]].concat());
        system("mount", &["-o", options, disk, root]);
    }

    fn zfs(&mut self) {
        // Not below the directory of the test, on which something private is mounted.
        let place = tempfile::tempdir().unwrap();
        let file = place.path().join("pool");
        fs::File::create(&file).unwrap().set_len(1 << 30).unwrap();
        let pool = format!("gdsnap{:x}", rand());
        let file = file.to_str().unwrap().to_owned();
        self.pool = Some((pool.clone(), place));
        let none = ["-o", "cachefile=none", "-O", "mountpoint=none", "-O", "compression=off"];
        system("zpool", &[&["create", "-f"], &none[..], &[&pool, &file]].concat());
        let config = serde_json::json!({ "storage-opts": [format!("zfs.fsname={pool}")] });
        fs::write(self.root.with_extension("json"), config.to_string()).unwrap();
    }
}

/// Process ids are the same in every namespace.
fn rand() -> u64 {
    use std::hash::BuildHasher;
    std::hash::RandomState::new().hash_one(std::process::id())
}

impl Drop for Rig {
    fn drop(&mut self) {
        for device in devices(&self.root) {
            let _ = Command::new("dmsetup").args(["remove", "--retry", &device]).status();
        }
        if let Some((pool, _place)) = &self.pool {
            let _ = Command::new("zpool").args(["destroy", "-f", pool]).status();
        }
    }
}

/// The devices of the pool of a data root, the pool itself last.
fn devices(root: &Path) -> Vec<String> {
    let Some(id) = pool_state(root).and_then(|state| state["id"].as_str().map(str::to_owned)) else {
        return Vec::new();
    };
    let out = Command::new("dmsetup").arg("ls").output().expect("dmsetup is installed");
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let names = text.lines().filter_map(|line| line.split_whitespace().next());
    let mut ours: Vec<_> =
        names.filter(|name| name.starts_with(&format!("graphdriver-{id}-"))).map(str::to_owned).collect();
    ours.sort_by_key(|name| name.ends_with("-pool"));
    ours
}

fn pool_state(root: &Path) -> Option<serde_json::Value> {
    serde_json::from_slice(&fs::read(root.join("devicemapper/data/pool.json")).ok()?).ok()
}

/// The numbers of the layers whose storage is there.
pub fn stored(root: &Path, driver: &str) -> Vec<u64> {
    let data = root.join(driver).join("data");
    let names = |dir: &Path| -> Vec<String> {
        let entries = fs::read_dir(dir).unwrap();
        entries.filter_map(|entry| entry.unwrap().file_name().into_string().ok()).collect()
    };
    let names: Vec<String> = match driver {
        "devicemapper" => {
            let state = pool_state(root).expect("the pool was made");
            state["layers"].as_object().unwrap().keys().cloned().collect()
        }
        "zfs" => {
            let record = fs::read_to_string(data.join("version")).unwrap();
            let dataset = record.lines().nth(1).unwrap().strip_prefix("dataset ").unwrap().to_owned();
            let out = Command::new("zfs").args(["list", "-H", "-d", "1", "-o", "name", &dataset]).output().unwrap();
            let text = String::from_utf8(out.stdout).unwrap();
            text.lines().filter_map(|name| Some(name.rsplit_once('/')?.1.to_owned())).collect()
        }
        "btrfs" => names(&data.join("layers")),
        _ => names(&data),
    };
    let mut all: Vec<u64> = names.iter().filter_map(|name| name.parse().ok()).collect();
    all.sort_unstable();
    all
}
