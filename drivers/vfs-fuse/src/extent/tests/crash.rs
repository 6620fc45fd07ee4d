//! Killed in the middle, and power cut in the middle: each byte, and each unit written at once, is old or new.
//!
//! Lower bytes are 1..=127, what is written is the same with the top bit: so a zero, and any other place's byte, shows.
//!
//! `GRAPHDRIVER_PROPTEST_CASES` is how often, on each filesystem.

use super::*;
use std::{
    ops::ControlFlow,
    process::{Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

const SIZE: usize = (3 << 19) + 1234;
/// Below this only whole units are written.
const ALIGNED: usize = 3 << 18;

/// Two writers, and one that completes, until somebody ends it or an error does.
fn work(file: &ExtentFile, new: &[u8], unit: usize, seed: u64, complete: bool) {
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for thread in 0..2 {
            let over = &over;
            scope.spawn(move || {
                for i in 0.. {
                    let random = u64::from_le_bytes(pattern(seed * 1_000_003 + i * 2 + thread, 8).try_into().unwrap());
                    let (place, length) = ((random >> 32) as usize, random as usize & 0xffff);
                    let range = if i % 2 == 0 {
                        let at = place % ALIGNED / unit * unit;
                        at..at + (length / unit + 1) * unit
                    } else {
                        let at = ALIGNED + place % (SIZE - ALIGNED - 1);
                        at..(at + length + 1).min(SIZE)
                    };
                    let written = file.write_at(&new[range.clone()], range.start as u64);
                    if written.is_err() || over.load(Ordering::Relaxed) {
                        break;
                    }
                    if i % 64 == 63 {
                        let _ = file.sync(true);
                    }
                }
            });
        }
        if complete {
            let _ = file.complete(&mut |_| {
                std::thread::sleep(Duration::from_micros(300));
                ControlFlow::Continue(())
            });
        }
        std::thread::sleep(Duration::from_secs(3));
        over.store(true, Ordering::Relaxed);
    });
}

/// What a crash left.
fn check(pair: &Pair, unit: usize) -> (usize, bool) {
    let (old, new) = old_and_new(11, SIZE);
    let all = |file: &ExtentFile| {
        let mut all = vec![0; SIZE];
        assert_eq!(file.read_at(&mut all, 0).unwrap(), SIZE);
        all
    };
    let now = match pair.header() {
        Some(_) => {
            let now = all(&pair.open().unwrap());
            assert!(all(&pair.open().unwrap()) == now, "a second look shows something else");
            now
        }
        None => std::fs::read(pair.directory.join("upper")).unwrap(),
    };
    assert_eq!(neither(&now, &old, &new), None, "this byte is neither old nor new");
    for (i, now) in now[..ALIGNED].chunks(unit).enumerate() {
        let at = i * unit..i * unit + now.len();
        assert!(*now == old[at.clone()] || *now == new[at], "unit {i} is a mixture");
    }
    (now.iter().filter(|b| **b & 0x80 != 0).count(), pair.header().is_none())
}

fn prepared(directory: &Path, unit: usize) -> Pair {
    let pair = Pair::new(directory, &old_and_new(11, SIZE).0, Unit(unit as u32));
    File::open(directory.join("lower")).unwrap().sync_all().unwrap();
    pair.prepare().unwrap();
    File::open(directory.join("upper")).unwrap().sync_all().unwrap();
    must(&format!("sync -f {}", directory.display()));
    pair
}

/// Not a test of itself: what the others kill.
#[test]
fn child() {
    let Ok(arguments) = std::env::var("EXTENT_TEST_CHILD") else { return };
    let [directory, unit, seed, complete] = arguments.split('|').collect::<Vec<_>>().try_into().unwrap();
    let unit = unit.parse().unwrap();
    let pair = Pair { directory: directory.into(), unit: Unit(unit) };
    let file = pair.open().unwrap();
    let new = old_and_new(11, SIZE).1;
    println!("ready");
    work(&file, &new, unit as usize, seed.parse().unwrap(), complete == "true");
}

fn start_child(pair: &Pair, seed: u64, complete: bool) -> std::process::Child {
    let arguments = format!("{}|{}|{seed}|{complete}", pair.directory.display(), pair.unit.0);
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "extent::tests::crash::child", "--nocapture"])
        .env("EXTENT_TEST_CHILD", arguments)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    use std::io::{BufRead, BufReader};
    let mut lines = BufReader::new(child.stdout.as_mut().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("ready")), "the child died by itself");
    child
}

fn kills(directory: &Path, unit: usize, times: u64) {
    let mut some_new = 0;
    for seed in 0..times {
        let own = directory.join(format!("kill{seed}"));
        std::fs::create_dir(&own).unwrap();
        let pair = prepared(&own, unit);
        // Twice, so that the second finds what the first left.
        for round in 0..2 {
            let mut child = start_child(&pair, seed * 2 + round, seed % 2 == 1);
            std::thread::sleep(Duration::from_micros(seed * 29_000 / times));
            child.kill().unwrap();
            child.wait().unwrap();
            let (new, complete) = check(&pair, unit);
            some_new += usize::from(new > 0);
            if complete {
                break;
            }
        }
        std::fs::remove_dir_all(&own).unwrap();
    }
    assert!(some_new as u64 > times / 4, "the child was killed before it did anything: {some_new} of {times}");
}

#[test]
fn killed_in_the_middle() {
    let directory = directory(None);
    if probe(File::open(directory.path()).unwrap().as_fd()).unwrap() != Some(Unit(4096)) {
        eprintln!("extent::tests::crash::killed_in_the_middle: skipped: holes of /var/tmp cannot be trusted");
        return;
    }
    kills(directory.path(), 4096, cases(12));
}

#[test]
fn killed_in_the_middle_on_other_filesystems() {
    in_private_namespace("extent::tests::crash::killed_in_the_middle_on_other_filesystems", || {
        for (mkfs, unit) in [
            ("mkfs.ext4 -q -F -b 1024", 4096),
            ("mkfs.xfs -q -f", 4096),
            ("mkfs.xfs -q -f -b size=65536", 65536),
            ("mkfs.btrfs -q -f", 4096),
        ] {
            eprintln!("{mkfs}");
            kills(&Disk::new(mkfs, 400, "").root(), unit, cases(4));
        }
    });
}

/// Killed between the two steps of a truncation: the header's limit is above the size.
#[test]
fn killed_while_shrinking() {
    for size in [0, 5000, 8192, 20_000] {
        let directory = directory(None);
        let mut model = pattern(1, 50_000);
        let pair = Pair::new(directory.path(), &model, Unit(4096));
        pair.prepare().unwrap();
        File::options().write(true).open(directory.path().join("upper")).unwrap().set_len(size).unwrap();
        let file = pair.open().unwrap();
        match size % 3 {
            0 => file.set_len(50_000).unwrap(),
            1 => file.write_at(&[0; 10], 49_990).unwrap(),
            _ => file.fallocate(0, 40_000, 10_000).unwrap(),
        }
        drop(file);
        model[size as usize..].fill(0);
        let mut now = vec![1; 50_000];
        assert_eq!(pair.open().unwrap().read_at(&mut now, 0).unwrap(), 50_000);
        assert!(now == model, "what was cut off at {size} is back");
    }
}

/// The filesystem stops at once, with nothing more written to the disk, and is mounted again: the journal is replayed.
#[test]
fn power_cut_in_the_middle() {
    in_private_namespace("extent::tests::crash::power_cut_in_the_middle", || {
        for (mkfs, options, unit) in [
            ("mkfs.ext4 -q -F", "", 4096),
            ("mkfs.ext4 -q -F", "commit=1", 4096),
            ("mkfs.ext4 -q -F -O fast_commit", "", 4096),
            ("mkfs.ext4 -q -F", "nodelalloc", 4096),
            ("mkfs.ext4 -q -F -O bigalloc -C 65536", "", 4096),
            ("mkfs.xfs -q -f", "", 4096),
            ("mkfs.xfs -q -f -b size=16384", "", 16384),
        ] {
            let disk = Disk::new(mkfs, 400, options);
            let mut some_new = 0;
            let times = cases(4);
            let mut tried = 0;
            // On a busy machine the child may need more time than it was given to get anything to the disk.
            while tried < times || (some_new == 0 && tried < 5 * times) {
                let seed = tried;
                tried += 1;
                let own = disk.root().join(format!("cut{seed}"));
                std::fs::create_dir(&own).unwrap();
                let pair = prepared(&own, unit);
                let mut child = start_child(&pair, seed, seed % 2 == 1);
                std::thread::sleep(Duration::from_micros(20_000 + seed * 170_000 / times));
                must(&format!("xfs_io -x -c shutdown {}", disk.root().display()));
                child.kill().unwrap();
                child.wait().unwrap();
                disk.unmount();
                disk.mount();
                some_new += usize::from(check(&pair, unit).0 > 0);
                std::fs::remove_dir_all(&own).unwrap();
            }
            eprintln!("{mkfs} {options}: {some_new} of {tried} found new data");
            assert!(some_new > 0);
        }
    });
}
