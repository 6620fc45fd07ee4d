//! Many at once on one file.

use super::*;
use rustix::fs::{Timespec, Timestamps};
use std::ops::ControlFlow;

/// Threads that write parts of the same units, while one completes and others read: nothing is lost, and no reader sees
/// anything but old or new.
#[test]
fn nothing_is_lost_between_writers() {
    const SIZE: usize = 2 << 20;
    const PART: usize = 512;
    for round in 0..5 {
        let directory = directory(None);
        let old: Vec<u8> = pattern(round, SIZE).into_iter().map(|b| b & 0x7f | 1).collect();
        let new: Vec<u8> = old.iter().map(|b| b | 0x80).collect();
        let pair = Pair::new(directory.path(), &old, Unit(4096));
        pair.prepare().unwrap();
        let file = pair.open().unwrap();
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let (file, new, old) = (&file, &new, &old);
                scope.spawn(move || {
                    for at in (thread * PART..SIZE).step_by(4 * PART) {
                        file.write_at(&new[at..at + PART], at as u64).unwrap();
                    }
                });
                scope.spawn(move || {
                    let mut part = vec![0; 100_000];
                    for at in (0..SIZE).step_by(70_000 + thread) {
                        let n = file.read_at(&mut part, at as u64).unwrap();
                        assert!(part[..n].iter().zip(&old[at..]).all(|(now, old)| now & 0x7f == *old));
                    }
                });
            }
            scope.spawn(|| file.complete(&mut |_| ControlFlow::Continue(())).unwrap());
        });
        assert!(file.is_complete());
        assert!(std::fs::read(directory.path().join("upper")).unwrap() == new);
    }
}

/// Reads and writes go on between two steps of completion, and in the middle of its pauses.
#[test]
fn completion_lets_others_through() {
    let directory = directory(None);
    let pair = Pair::new(directory.path(), &pattern(1, 3 << 20), Unit(4096));
    pair.prepare().unwrap();
    let file = pair.open().unwrap();
    let mut steps = 0;
    file.complete(&mut |_| {
        steps += 1;
        file.read_at(&mut [0; 4096], 2 << 20).unwrap();
        file.write_at(b"x", (3 << 20) - 5).unwrap();
        file.set_len((3 << 20) + steps).unwrap();
        ControlFlow::Continue(())
    })
    .unwrap();
    assert!(steps > 4 && file.is_complete());
}

/// The mtime is the last change's, not the completion's, also where it was set by hand in between.
#[test]
fn completion_keeps_the_mtime() {
    let directory = directory(None);
    let pair = Pair::new(directory.path(), &pattern(1, 3 << 20), Unit(4096));
    pair.prepare().unwrap();
    let file = pair.open().unwrap();
    let mtime = || std::fs::metadata(directory.path().join("upper")).unwrap().mtime();
    let set = |seconds| {
        let time = Timespec { tv_sec: seconds, tv_nsec: 0 };
        file.set_times(&Timestamps { last_access: time, last_modification: time }).unwrap();
    };
    set(1000);
    let mut steps = 0;
    file.complete(&mut |_| {
        steps += 1;
        assert_eq!(mtime(), if steps < 3 { 1000 } else { 2000 });
        if steps == 2 {
            set(2000);
        }
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!((file.is_complete(), mtime()), (true, 2000));
}

/// What st_blocks says is what completion will make it, where the lower file has no holes.
#[test]
fn blocks_are_those_of_the_whole_file() {
    let directory = directory(None);
    let pair = Pair::new(directory.path(), &pattern(1, 1 << 20), Unit(4096));
    pair.raw("lower", OFlags::RDONLY);
    File::open(directory.path().join("lower")).unwrap().sync_all().unwrap();
    pair.prepare().unwrap();
    let file = pair.open().unwrap();
    assert!(file.blocks().unwrap() >= 2048);
    file.write_at(b"x", 5000).unwrap();
    assert_eq!(file.blocks().unwrap(), 2048);
}
