//! Copy-ups that a power cut stops.

use super::*;
use crate::extent::tests::{Disk, cases, in_private_namespace, must, pattern};
use std::{io::Write, time::Duration};

const FILES: u64 = 2000;
const MODE: u32 = 0o640;

/// The filesystem stops at once, with nothing more written to the disk, and its journal is replayed: what has its name has
/// its header, its size and its new mode, and nothing is left in the work directory. Without ext4's fast_commit, with which
/// Linux 6.18 damages the filesystem itself, whether names are linked or moved.
#[test]
fn a_power_cut_leaves_no_name_without_its_header() {
    in_private_namespace("union::tests::power::a_power_cut_leaves_no_name_without_its_header", || {
        for (mkfs, options) in [
            ("mkfs.ext4 -q -F", ""),
            ("mkfs.ext4 -q -F", "commit=1"),
            ("mkfs.ext4 -q -F -O orphan_file", ""),
            ("mkfs.xfs -q -f", ""),
        ] {
            let disk = Disk::new(mkfs, 400, options);
            let found: usize = (0..cases(3)).map(|round| cut(&disk, round)).sum();
            eprintln!("{mkfs} {options}: {found} files were copied up in time");
            assert!(found > 0);
        }
    });
}

/// How many files were in the upper layer after it.
fn cut(disk: &Disk, round: u64) -> usize {
    let root = disk.root().join(round.to_string());
    for name in ["l", "u", "w", "other"] {
        fs::create_dir_all(root.join(name)).unwrap();
    }
    for n in 0..FILES {
        fs::write(root.join(format!("l/{n}")), pattern(n, 3000 + n as usize)).unwrap();
    }
    must(&format!("sync -f {}", root.display()));
    let config = || Config {
        lower: vec![root.join("l")],
        upper: Some(root.join("u")),
        work: Some(root.join("w")),
        copy_up: CopyUp::Extent,
        ..Config::default()
    };
    let union = Union::open(config()).unwrap();
    let numbers: Vec<u64> = (0..FILES).map(|n| union.at(&n.to_string()).unwrap().attr.ino).collect();
    std::thread::scope(|scope| {
        scope.spawn(|| copy_up_until_it_fails(&union));
        scope.spawn(|| sync_until_it_fails(&root.join("other")));
        std::thread::sleep(Duration::from_millis(30 + 60 * round));
        must(&format!("xfs_io -x -c shutdown {}", disk.root().display()));
    });
    drop(union);
    disk.unmount();
    disk.mount();
    let found = fs::read_dir(root.join("u")).unwrap().count();
    let union = Union::open(config()).unwrap();
    for n in 0..FILES {
        let name = n.to_string();
        let attr = union.at(&name).unwrap().attr;
        let up = fs::symlink_metadata(root.join("u").join(&name)).is_ok();
        assert_eq!(attr.mode & 0o777, if up { MODE } else { 0o644 }, "file {n}");
        assert_eq!(attr.ino, numbers[n as usize], "file {n}");
        assert!(union.read(&name).unwrap() == pattern(n, 3000 + n as usize), "file {n} shows something else");
    }
    let left = fs::read_dir(root.join("w/vfs-fuse")).unwrap().count();
    assert_eq!(left, 1, "but for the whiteout");
    found
}

fn copy_up_until_it_fails(union: &Union) {
    let set = SetAttr { mode: Some(MODE), ..SetAttr::default() };
    for n in 0..FILES {
        let changed = union.at(&n.to_string()).and_then(|entry| union.setattr(entry.id, &set, ROOT));
        if changed.is_err() {
            return;
        }
    }
}

/// What others sync takes what is done so far to the disk, at any moment.
fn sync_until_it_fails(directory: &Path) {
    for n in 0.. {
        let synced = fs::File::create(directory.join(n.to_string()))
            .and_then(|mut file| file.write_all(b"x").and_then(|()| file.sync_all()));
        if synced.is_err() {
            return;
        }
    }
}
