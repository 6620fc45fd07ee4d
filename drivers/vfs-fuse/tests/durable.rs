//! What is on the disk after which call: its blocks are copied, as a power cut would leave them.

mod common;

use common::{Layers, cannot_mount, no_program, private_mounts, skipped};
use graphdriver_core::conformance::{Backing, BackingKind};
use std::{
    fs::{self, File, Permissions},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

const FILES: usize = 300;

fn sh(script: &str) -> String {
    let out = Command::new("sh").args(["-ec", script]).output().unwrap();
    assert!(out.status.success(), "{script}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap().trim().into()
}

fn device(place: &Path) -> String {
    sh(&format!("findmnt -no SOURCE {}", place.display()))
}

/// Bytes that were written to a block device so far (kernel `Documentation/block/stat.rst`: units of 512 bytes).
fn written(device: &str) -> u64 {
    let stat = fs::read_to_string(format!("/sys/block/{}/stat", device.trim_start_matches("/dev/"))).unwrap();
    stat.split_whitespace().nth(6).unwrap().parse::<u64>().unwrap() * 512
}

/// A chmod of many files that reflinks bring up writes no log for each, and a directory that is synced has its files whole.
#[test]
fn reflinked_files_are_whole_once_their_directory_is_synced() {
    let test = "reflinked_files_are_whole_once_their_directory_is_synced";
    if skipped(test, cannot_mount().or_else(|| no_program(&["mkfs.btrfs", "findmnt", "dd"]))) {
        return;
    }
    private_mounts();
    let backing = Backing::new(BackingKind::Btrfs, 300 << 20).unwrap();
    let layers = Layers::on(backing.path(), 1);
    let lower = layers.lowers[0].join("d");
    fs::create_dir(&lower).unwrap();
    let content = |n: usize| vec![n as u8; 5000];
    for n in 0..FILES {
        fs::write(lower.join(n.to_string()), content(n)).unwrap();
    }
    sh(&format!("sync -f {}", lower.display()));
    let device = device(backing.path());
    let mounted = layers.mount(&[]);
    let dir = mounted.path().join("d");
    let before = written(&device);
    for n in 0..FILES {
        fs::set_permissions(dir.join(n.to_string()), Permissions::from_mode(0o604)).unwrap();
    }
    let wrote = written(&device) - before;
    assert!(wrote < FILES as u64 * 20_000, "{wrote} bytes for {FILES} chmods");

    File::open(&dir).unwrap().sync_all().unwrap();
    let scratch = tempfile::tempdir_in("/var/tmp").unwrap();
    let (image, after) = (scratch.path().join("image"), scratch.path().join("after"));
    sh(&format!("dd if={device} of={} bs=1M iflag=direct conv=sparse status=none", image.display()));
    let upper = layers.upper.strip_prefix(backing.path()).unwrap().join("d");
    mounted.unmount();
    // Two filesystems of one id cannot be mounted at once.
    fs::create_dir(&after).unwrap();
    drop((layers, backing));
    sh(&format!("mount -o loop {} {}", image.display(), after.display()));
    let found: Vec<PathBuf> = (0..FILES).map(|n| after.join(&upper).join(n.to_string())).collect();
    let wrong = found.iter().enumerate().find(|(n, path)| fs::read(path).ok() != Some(content(*n)));
    let wrong = wrong.map(|(n, path)| format!("file {n} is {:?}", fs::read(path).map(|bytes| bytes.len())));
    sh(&format!("umount {}", after.display()));
    assert_eq!(wrong, None);
}
