//! What each filesystem says of holes, and that the probe trusts only what keeps them exactly.

use super::*;
use crate::extent::{io, probe::probe_any};
use rustix::fs::FallocateFlags;
use std::{ops::ControlFlow, ops::Range};

const SIZE: usize = (9 << 20) + 777;

struct Case {
    name: &'static str,
    mkfs: &'static str,
    options: &'static str,
    unit: u32,
}

const fn case(name: &'static str, mkfs: &'static str, options: &'static str, unit: u32) -> Case {
    Case { name, mkfs, options, unit }
}

const CASES: [Case; 14] = [
    case("ext4", "mkfs.ext4 -q -F", "", 4096),
    case("ext4, 1 KiB blocks", "mkfs.ext4 -q -F -b 1024", "", 4096),
    case("ext4, clusters of 64 KiB", "mkfs.ext4 -q -F -O bigalloc -C 65536", "", 4096),
    case("ext4, inline data", "mkfs.ext4 -q -F -O inline_data", "", 4096),
    case("ext4, nodelalloc", "mkfs.ext4 -q -F", "nodelalloc", 4096),
    case("ext4, data=journal", "mkfs.ext4 -q -F", "data=journal", 4096),
    case("xfs", "mkfs.xfs -q -f", "", 4096),
    case("xfs, 1 KiB blocks", "mkfs.xfs -q -f -b size=1024", "", 4096),
    case("xfs, 16 KiB blocks", "mkfs.xfs -q -f -b size=16384", "", 16384),
    case("xfs, 64 KiB blocks", "mkfs.xfs -q -f -b size=65536", "", 65536),
    case("btrfs", "mkfs.btrfs -q -f", "", 4096),
    case("btrfs, zstd", "mkfs.btrfs -q -f", "compress-force=zstd", 4096),
    case("btrfs, nodatacow", "mkfs.btrfs -q -f", "nodatacow", 4096),
    case("btrfs, hole items", "mkfs.btrfs -q -f -O ^no-holes", "", 4096),
];

fn probed(directory: &Path) -> Option<u32> {
    probe(File::open(directory).unwrap().as_fd()).unwrap().map(|unit| unit.0)
}

fn holes(file: &ExtentFile) -> Vec<Range<u64>> {
    let mut found: Vec<Range<u64>> = Vec::new();
    for at in (0..SIZE as u64).step_by(io::CHUNK as usize) {
        for gap in file.with_map(at..at + io::CHUNK).unwrap().gaps(at..at + io::CHUNK) {
            match found.last_mut() {
                Some(last) if last.end == gap.start => last.end = gap.end,
                _ => found.push(gap),
            }
        }
    }
    found
}

fn content(file: &ExtentFile) -> Vec<u8> {
    let mut all = vec![0; file.size().unwrap() as usize];
    assert_eq!(file.read_at(&mut all, 0).unwrap(), all.len());
    all
}

/// Units written here and there, some with zeros; the map must be the same whatever happens to the caches.
fn keeps_the_map(directory: &Path, unit: u32, remount: &dyn Fn()) {
    let lower = pattern(7, SIZE);
    let pair = Pair::new(directory, &lower, Unit(unit));
    pair.prepare().unwrap();
    let file = pair.open().unwrap();
    let mut model = lower.clone();
    for i in 0..300u64 {
        let at = (i * 7919 * 1031) % (SIZE as u64 - 9000);
        let bytes = if i % 3 == 0 { vec![0; 4096] } else { pattern(i, 1 + i as usize * 13) };
        file.write_at(&bytes, at).unwrap();
        model[at as usize..at as usize + bytes.len()].copy_from_slice(&bytes);
    }
    // At the end of the file, past it, and so far that the filesystem prepares for more.
    for at in (SIZE as u64 - 10..SIZE as u64 + (1 << 20)).step_by(100_000) {
        file.write_at(&[9; 100_000], at).unwrap();
        model.resize(model.len().max(at as usize + 100_000), 0);
        model[at as usize..at as usize + 100_000].fill(9);
    }
    let map = holes(&file);
    let same = |when: &str, file: &ExtentFile| {
        assert!(holes(file) == map, "the map is another {when}");
        assert!(content(file) == model, "the content is another {when}");
    };
    same("at once", &file);
    // Others may read the upper file as they like, mapped or not.
    std::fs::read(pair.directory.join("upper")).unwrap();
    crate::sys::touch_mapped(file.upper(), SIZE).unwrap();
    same("when opened again after reads", &pair.open().unwrap());
    file.sync(true).unwrap();
    same("after a sync", &pair.open().unwrap());
    drop(file);
    remount();
    std::fs::read(pair.directory.join("upper")).unwrap();
    same("after a remount", &pair.open().unwrap());
    let file = pair.open().unwrap();
    file.complete(&mut |_| ControlFlow::Continue(())).unwrap();
    drop(file);
    remount();
    assert!(pair.header().is_none());
    assert!(std::fs::read(pair.directory.join("upper")).unwrap() == model);
}

/// A full disk in the middle of writes into holes: what could not be written still shows the lower file.
fn survives_a_full_disk(directory: &Path, unit: u32, remount: &dyn Fn()) {
    let (lower, new) = old_and_new(3, SIZE);
    let pair = Pair::new(directory, &lower, Unit(unit));
    pair.prepare().unwrap();
    let file = pair.open().unwrap();
    let filler = directory.join("filler");
    fill(&File::create(&filler).unwrap(), 1 << 20);
    let mut failed = 0;
    for at in (1000..SIZE - 700_000).step_by(610_000) {
        failed += u32::from(file.write_at(&new[at..at + 600_000], at as u64).is_err());
    }
    assert!(failed > 0, "the disk was never full");
    let old_or_new = |when: &str, file: &ExtentFile| {
        assert_eq!(neither(&content(file), &lower, &new), None, "a byte is neither old nor new {when}");
    };
    old_or_new("at once", &file);
    let map = holes(&file);
    drop(file);
    assert!(holes(&pair.open().unwrap()) == map, "blocks without content are left");
    old_or_new("when opened again", &pair.open().unwrap());
    std::fs::remove_file(&filler).unwrap();
    remount();
    old_or_new("after a remount", &pair.open().unwrap());
}

/// Takes all but about `room` bytes: little, so that a write runs out of it in its middle.
fn fill(filler: &File, room: u64) {
    let (mut at, mut step) = (0, 64 << 20);
    while step >= room {
        match rustix::fs::fallocate(filler, FallocateFlags::empty(), at, step) {
            Ok(()) => at += step,
            Err(_) => step /= 2,
        }
    }
}

#[test]
fn what_the_probe_trusts_keeps_the_map() {
    in_private_namespace("extent::tests::filesystems::what_the_probe_trusts_keeps_the_map", || {
        for case in CASES {
            eprintln!("{}", case.name);
            let disk = Disk::new(case.mkfs, 400, case.options);
            let work = disk.root().join("work");
            std::fs::create_dir(&work).unwrap();
            assert_eq!(probed(&work), Some(case.unit), "{}", case.name);
            assert_eq!(std::fs::read_dir(&work).unwrap().count(), 0, "the probe leaves nothing behind");
            let remount = || {
                disk.unmount();
                disk.mount();
            };
            keeps_the_map(&work, case.unit, &remount);
        }
    });
}

type Step<'a> = &'a dyn Fn(&ExtentFile) -> Result<()>;

/// btrfs zeroes the rest of the block where a file ends or ended, and a hole is data from then on.
#[test]
fn a_size_inside_a_unit_that_changes_leaves_the_lower_files_data() {
    in_private_namespace(
        "extent::tests::filesystems::a_size_inside_a_unit_that_changes_leaves_the_lower_files_data",
        || {
            for case in CASES {
                eprintln!("{}", case.name);
                let disk = Disk::new(case.mkfs, 400, case.options);
                let unit = case.unit as usize;
                let old = pattern(3, 3 * unit + 1234);
                let resized = |size: usize| {
                    let mut model = old[..size.min(old.len())].to_vec();
                    model.resize(size, 0);
                    model
                };
                let far = old.len() + 5 * unit + 99;
                let mut written = resized(far);
                written.push(7);
                let steps: [(&str, Step, Vec<u8>); 5] = [
                    ("grown within the unit", &|f| f.set_len(old.len() as u64 + 100), resized(old.len() + 100)),
                    ("grown past it", &|f| f.set_len(far as u64), resized(far)),
                    ("cut", &|f| f.set_len(unit as u64 + 77), resized(unit + 77)),
                    ("written far behind the end", &|f| f.write_at(&[7], far as u64), written),
                    ("allocated", &|f| f.fallocate(0, old.len() as u64 + 50, 10), resized(old.len() + 60)),
                ];
                for (number, (what, step, model)) in steps.into_iter().enumerate() {
                    let directory = disk.root().join(number.to_string());
                    std::fs::create_dir(&directory).unwrap();
                    let pair = Pair::new(&directory, &old, Unit(case.unit));
                    pair.prepare().unwrap();
                    let file = pair.open().unwrap();
                    step(&file).unwrap();
                    assert!(content(&file) == model, "{}: {what}", case.name);
                    drop(file);
                    must(&format!("sync -f {}", directory.display()));
                    assert!(content(&pair.open().unwrap()) == model, "{}: {what}, opened again", case.name);
                }
            }
        },
    );
}

#[test]
fn a_full_disk_shows_no_zeros() {
    in_private_namespace("extent::tests::filesystems::a_full_disk_shows_no_zeros", || {
        for case in CASES {
            eprintln!("{}", case.name);
            let disk = Disk::new(case.mkfs, if case.mkfs.contains("btrfs") { 200 } else { 310 }, case.options);
            let remount = || {
                disk.unmount();
                disk.mount();
            };
            survives_a_full_disk(&disk.root(), case.unit, &remount);
        }
    });
}

#[test]
fn nested_in_an_overlay() {
    in_private_namespace("extent::tests::filesystems::nested_in_an_overlay", || {
        let disk = Disk::new("mkfs.ext4 -q -F", 400, "");
        let root = disk.root().display().to_string();
        must(&format!("cd {root}; mkdir l u w m"));
        let mount = || must(&format!("cd {root}; mount -t overlay o -o lowerdir=l,upperdir=u,workdir=w m"));
        mount();
        let inner = disk.root().join("m");
        assert_eq!(probed(&inner), Some(4096));
        keeps_the_map(&inner, 4096, &|| {
            must(&format!("umount {root}/m"));
            mount();
        });
        must(&format!("umount {root}/m"));
    });
}

/// What the probe is for: here what was never written would hide the lower file.
#[test]
fn what_cannot_be_trusted_is_refused() {
    in_private_namespace("extent::tests::filesystems::what_cannot_be_trusted_is_refused", || {
        let disk = Disk::new("mkfs.ext4 -q -F -O ^extent,^64bit", 100, "");
        assert_eq!(probed(&disk.root()), None, "ext4 with block maps: SEEK_DATA passes over what is not allocated yet");

        let disk = Disk::new("mkfs.xfs -q -f", 400, "");
        let work = disk.root().join("work");
        std::fs::create_dir(&work).unwrap();
        assert_eq!(probed(&work), Some(4096));
        must(&format!("xfs_io -c 'extsize 65536' {}", work.display()));
        assert_eq!(probed(&work), None, "xfs with an extent size hint: reads turn extents without data into data");

        for options in ["size=200m", "size=200m,huge=always"] {
            let memory = directory(None);
            must(&format!("mount -t tmpfs -o {options} none {}", memory.path().display()));
            let file = scratch_of(memory.path());
            crate::sys::touch_mapped(file.as_fd(), 1 << 20).unwrap();
            assert!(io::next_data(file.as_fd(), 0, 1 << 20).unwrap().is_some(), "tmpfs: a mapped read makes data");
            assert_eq!(probed(memory.path()), None, "tmpfs, {options}");
            let work = File::open(memory.path()).unwrap();
            assert_eq!(probe_any(work.as_fd()).unwrap(), None, "tmpfs, {options}, by its behaviour alone");
            // Nor does an overlay hide what is below it.
            let at = memory.path().display();
            must(&format!("cd {at}; mkdir l u w m; mount -t overlay o -o lowerdir=l,upperdir=u,workdir=w m"));
            assert_eq!(probed(&memory.path().join("m")), None, "an overlay on tmpfs, {options}");
            must(&format!("umount {at}/m"));
            drop((file, work));
            must(&format!("umount {at}"));
        }
    });
}

/// A clone by somebody else (cp makes one by itself) has xfs prepare extents around what is written next; reads fill them
/// with cached zeros, and those count as data.
#[test]
fn clones_of_the_upper_file_do_no_harm() {
    in_private_namespace("extent::tests::filesystems::clones_of_the_upper_file_do_no_harm", || {
        for mkfs in ["mkfs.xfs -q -f", "mkfs.btrfs -q -f"] {
            let disk = Disk::new(mkfs, 400, "");
            let lower = pattern(7, 1 << 20);
            let pair = Pair::new(&disk.root(), &lower, Unit(4096));
            pair.prepare().unwrap();
            let file = pair.open().unwrap();
            let mut model = lower;
            for round in 1..4u8 {
                for at in (0..1 << 20).step_by(5 * 4096) {
                    file.write_at(&[round; 4096], at as u64).unwrap();
                    model[at..at + 4096].fill(round);
                }
                if round < 3 {
                    let at = disk.root().display().to_string();
                    must(&format!("sync -f {at}; cp --reflink=always {at}/upper {at}/clone{round}"));
                }
                std::fs::read(disk.root().join("upper")).unwrap();
                assert!(content(&pair.open().unwrap()) == model, "{mkfs}, round {round}");
            }
        }
    });
}

fn scratch_of(directory: &Path) -> File {
    let file = File::options().read(true).write(true).create_new(true).open(directory.join("scratch")).unwrap();
    file.set_len(1 << 20).unwrap();
    assert!(io::next_data(file.as_fd(), 0, 1 << 20).unwrap().is_none());
    file
}
