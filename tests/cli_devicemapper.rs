//! The command line over devicemapper, in the guest.
#![cfg(feature = "devicemapper")]

mod common;

use common::{Home, skipped_outside_guest};
use std::{ops::Deref, path::Path, process::Command};

fn no_devicemapper() -> Option<String> {
    (!Path::new("/dev/mapper/control").exists()).then(|| "the kernel has no device-mapper".into())
}

/// A data root under devicemapper on small loop files. No device of it outlives the test.
struct Rig(Home);

impl Deref for Rig {
    type Target = Home;

    fn deref(&self) -> &Home {
        &self.0
    }
}

const OPTIONS: &str = "export GRAPHDRIVER_CONFIG=$PWD/config.json";

impl Rig {
    fn new() -> Rig {
        let rig = Rig(Home::new());
        let config = r#"{"storage-driver": "devicemapper", "storage-opts": ["dm.basesize=300M", "dm.loopdatasize=2G", "dm.loopmetadatasize=16M"]}"#;
        std::fs::write(rig.path().join("config.json"), config).unwrap();
        rig
    }

    /// What the script prints; every command warns of loop files.
    #[track_caller]
    fn gd(&self, script: &str) -> String {
        self.0.ok_noisy(&format!("{OPTIONS}; {script}"))
    }

    fn devices(&self) -> Vec<String> {
        let Ok(text) = std::fs::read(self.root().join("devicemapper/data/pool.json")) else { return Vec::new() };
        let state: serde_json::Value = serde_json::from_slice(&text).unwrap();
        let prefix = format!("graphdriver-{}-", state["id"].as_str().unwrap());
        let out = Command::new("dmsetup").arg("ls").output().expect("dmsetup is installed");
        let text = String::from_utf8_lossy(&out.stdout);
        let names = text.lines().filter_map(|line| line.split_whitespace().next());
        names.filter(|name| name.starts_with(&prefix)).map(str::to_owned).collect()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        let mut devices = self.devices();
        devices.sort_by_key(|name| name.ends_with("pool"));
        for name in devices {
            let _ = Command::new("dmsetup").args(["remove", "--retry", &name]).status();
        }
    }
}

#[test]
fn an_image_is_loaded_mounted_written_diffed_committed_saved_and_removed() {
    let test = "an_image_is_loaded_mounted_written_diffed_committed_saved_and_removed";
    if skipped_outside_guest(test, no_devicemapper()) {
        return;
    }
    let rig = Rig::new();
    let told = rig.gd(
        "mkdir m; graphdriver load -qi demo.tar >/dev/null; graphdriver create --name c demo >/dev/null
        graphdriver mount c m >/dev/null; cat m/etc/motd; echo new > m/new; rm m/var/log/kept
        graphdriver diff c; graphdriver umount c; graphdriver diff c
        graphdriver commit c new:1 >/dev/null; graphdriver save -o new.tar new:1; graphdriver save -o demo2.tar demo:1",
    );
    let changes = "A /new\nC /var\nC /var/log\nD /var/log/kept\n";
    assert_eq!(told, format!("hello\n{changes}{changes}"));
    let diff_ids =
        "config() { tar xOf $1 \"$(tar xOf $1 manifest.json | sed 's/.*\"Config\":\"\\([^\"]*\\)\".*/\\1/')\" |
            grep -o '\"diff_ids\":\\[[^]]*\\]'; }";
    let ids = rig.gd(&format!("{diff_ids}; config demo.tar; config demo2.tar"));
    let (loaded, saved) = ids.trim().split_once('\n').unwrap();
    assert_eq!(loaded, saved, "what came in goes out");

    let info = rig.gd("graphdriver info");
    for line in
        ["Storage Driver: devicemapper", " Pool Storage: loop files", "Write Strategy: copy-on-write (64 KiB blocks)"]
    {
        assert!(info.lines().any(|told| told == line), "{line}: {info}");
    }
    let data = rig.root().join("devicemapper/data/data");
    let blocks = || std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&data).unwrap()) * 512;
    assert!(blocks() > 1 << 20);
    rig.gd("graphdriver rm c >/dev/null; graphdriver rmi new:1 demo:1 demo:latest >/dev/null");
    assert!(blocks() < 1 << 20, "{} bytes are still there", blocks());
    assert_eq!(rig.devices(), [""; 0]);

    // Another store takes what was saved.
    rig.gd("graphdriver load -qi new.tar >/dev/null; graphdriver mount new:1 m >/dev/null; cat m/new; graphdriver umount m");
    rig.gd("graphdriver rmi new:1 >/dev/null");
    assert_eq!(rig.devices(), [""; 0]);
}

#[test]
fn loop_files_are_warned_of_and_wrong_options_refused() {
    if skipped_outside_guest("loop_files_are_warned_of_and_wrong_options_refused", no_devicemapper()) {
        return;
    }
    let rig = Rig::new();
    let out = rig.run(&format!("{OPTIONS}; graphdriver images; graphdriver info"));
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success() && said.contains("loop files are slow"), "{said}");
    assert!(String::from_utf8_lossy(&out.stdout).contains(" WARNING: loop files are slow"));
    let driver = "graphdriver --storage-driver devicemapper --storage-opt";
    rig.fails(2, &format!("{driver} dm.blocksize=65K info"), &["dm.blocksize", "64K to 1G"]);
    rig.fails(2, &format!("{driver} dm.thinpooldev=p --storage-opt dm.loopdatasize=1G info"), &["contradict"]);
    rig.fails(2, &format!("{driver} dm.colour=red info"), &["dm.colour", "dm.basesize"]);
    rig.fails(2, &format!("{driver} dm.thinpooldev=no-such-pool info"), &["another pool", "loop files"]);
}

#[test]
fn an_image_that_the_pool_has_no_room_for_is_not_loaded() {
    if skipped_outside_guest("an_image_that_the_pool_has_no_room_for_is_not_loaded", no_devicemapper()) {
        return;
    }
    let rig = Rig::new();
    // Larger than the pool, smaller than the filesystem of a layer, and small enough to stay in memory meanwhile.
    let config = r#"{"storage-driver": "devicemapper", "storage-opts": ["dm.fs=ext4", "dm.basesize=200M", "dm.loopdatasize=64M", "dm.loopmetadatasize=8M", "dm.min_free_space=0%"]}"#;
    std::fs::write(rig.path().join("config.json"), config).unwrap();
    rig.gd("head -c 80000000 /dev/urandom > big; tar cf big.tar big; rm big");
    let out = rig.run(&format!("{OPTIONS}; graphdriver import big.tar big:1"));
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(!out.status.success(), "{said}");
    assert_eq!(rig.gd("graphdriver images -q"), "", "nothing of it is there");
    rig.gd("head -c 8000000 big.tar > part; tar cf part.tar part; graphdriver import part.tar part:1; graphdriver rmi part:1");
}

#[test]
fn what_is_done_to_the_pool_behind_the_drivers_back_is_named() {
    if skipped_outside_guest("what_is_done_to_the_pool_behind_the_drivers_back_is_named", no_devicemapper()) {
        return;
    }
    let rig = Rig::new();
    let told = rig.gd("graphdriver load -qi demo.tar >/dev/null; graphdriver create --name c demo >/dev/null
        graphdriver check --digests
        state=root/devicemapper/data/pool.json; touch root/devicemapper/data/mine
        pool=graphdriver-$(jq -r .id $state)-pool
        dmsetup message $pool 0 'create_thin 4000'
        dmsetup message $pool 0 \"delete $(jq '.layers[\"3\"].thin' $state)\"
        graphdriver check || echo code $?
        dmsetup message $pool 0 'delete 4000'; rm root/devicemapper/data/mine");
    let (clean, told) = told.split_once('\n').unwrap();
    assert_eq!(
        clean,
        "looked at: layers 3, images 1, containers 1, snapshots 0, mounts 0; layers read and compared with their digests: 2"
    );
    for part in ["damage: the storage of layer 3 is not in the pool", "    needed by: container c\n", "code 9"] {
        assert!(told.contains(part), "{part}: {told}");
    }
    for stranger in ["thin device 4000 in pool", "/mine is nothing of graphdriver's"] {
        let line = told.lines().find(|line| line.contains(stranger));
        assert!(line.is_some_and(|line| line.starts_with("stranger: ")), "{stranger}: {told}");
    }
    assert_eq!(told.lines().filter(|line| line.starts_with("    do: ")).count(), 3, "{told}");
}
