//! Storms on the content of files.

use super::{storm::*, sys::*, world::*};
use rustix::{
    fs::{FallocateFlags, FlockOperation, Mode, OFlags, copy_file_range, fallocate, flock},
    io::{Errno, pread, pwrite},
};
use std::{
    fs::{self, File, OpenOptions},
    io::{Read, Write},
    os::unix::{
        fs::MetadataExt,
        net::{UnixListener, UnixStream},
    },
    path::Path,
    sync::Mutex,
};

const BLOCK: usize = 4096;

fn rw(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).open(path).unwrap()
}

/// Bytes that differ from place to place.
fn pattern(len: usize) -> Vec<u8> {
    (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

#[test]
fn one_lower_file_is_copied_up_by_many_at_once_and_no_write_is_lost() {
    const FILES: usize = 25;
    let data = pattern(16 * BLOCK);
    let fill = |l: &Path| (0..FILES).for_each(|n| fs::write(l.join(format!("f{n}")), &data).unwrap());
    for options in [&[][..], &["copy_up=full"], &["copy_up=extent"], &["copy_up=extent", "passthrough=0"]] {
        let mut world = world!(Setup { options, ..Setup::default() }, &[&fill]);
        let check = |world: &World| {
            for n in 0..FILES {
                let mut model = data.clone();
                (0..8).for_each(|t| model[t * 2 * BLOCK + 100..][..50].fill(t as u8));
                assert!(fs::read(world.at(format!("f{n}"))).unwrap() == model, "{options:?}: f{n}");
            }
        };
        together(&world, 8, |thread| {
            for n in 0..FILES {
                let path = world.at(format!("f{n}"));
                pwrite(rw(&path), &[thread as u8; 50], (thread * 2 * BLOCK + 100) as u64).unwrap();
                chmod(&path, 0o640);
            }
        });
        check(&world);
        world.remount();
        check(&world);
    }
}

#[test]
fn readers_of_a_file_that_is_copied_up_see_old_or_new_bytes() {
    const FILES: usize = 30;
    let fill = |l: &Path| (0..FILES).for_each(|n| fs::write(l.join(format!("f{n}")), vec![b'o'; 64 * BLOCK]).unwrap());
    for options in [&[][..], &["copy_up=extent"], &["copy_up=extent", "passthrough=0"]] {
        let world = world!(Setup { options, ..Setup::default() }, &[&fill]);
        together(&world, 4, |thread| {
            for n in 0..FILES {
                let path = world.at(format!("f{n}"));
                if thread == 0 {
                    pwrite(rw(&path), &[b'n'; BLOCK], 30 * BLOCK as u64).unwrap();
                } else {
                    let file = File::open(&path).unwrap();
                    for round in 0..6 {
                        let mut seen = vec![0; 64 * BLOCK];
                        assert_eq!(pread(&file, &mut seen, 0).unwrap(), seen.len());
                        let new = 30 * BLOCK..31 * BLOCK;
                        let right = |(at, byte): (usize, &u8)| *byte == b'o' || *byte == b'n' && new.contains(&at);
                        assert!(seen.iter().enumerate().all(right), "f{n} round {round}: neither old nor new");
                    }
                }
            }
        });
        (0..FILES).for_each(|n| {
            let seen = fs::read(world.at(format!("f{n}"))).unwrap();
            assert!(seen[30 * BLOCK] == b'n' && seen.len() == 64 * BLOCK);
        });
    }
}

#[test]
fn processes_write_through_shared_mappings() {
    let mut world = world!(|l| fs::write(l.join("f"), vec![0; 64 * BLOCK]).unwrap());
    let path = world.at("f");
    processes(&world, 4, |n| {
        let map = Map::new(&rw(&path), 64 * BLOCK, true, true).unwrap();
        for round in 1..=50u8 {
            for block in (n..64).step_by(4) {
                map.write(block * BLOCK + 7, &[round; 33]);
            }
        }
        map.sync();
    });
    world.remount();
    let seen = fs::read(world.at("f")).unwrap();
    let right = |(at, byte): (usize, &u8)| *byte == if (7..40).contains(&(at % BLOCK)) { 50 } else { 0 };
    assert!(seen.iter().enumerate().all(right));
}

#[test]
fn nameless_files_come_and_go() {
    let world = world!(|l| fs::create_dir(l.join("d")).unwrap());
    let d = world.at("d");
    storm(&world, 6, |thread, round| {
        // Where O_TMPFILE is refused, programs do this themselves.
        let open = rustix::fs::open(&d, OFlags::TMPFILE | OFlags::RDWR, Mode::from_raw_mode(0o600));
        let file: File = match open {
            Ok(file) => file.into(),
            Err(errno) => {
                assert_eq!(errno, Errno::OPNOTSUPP);
                let path = d.join(format!("{thread}-{round}"));
                let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path).unwrap();
                fs::remove_file(&path).unwrap();
                file
            }
        };
        let data = vec![thread as u8; 3 * BLOCK];
        pwrite(&file, &data, 5).unwrap();
        let mut seen = vec![9; 3 * BLOCK + 5];
        assert_eq!(pread(&file, &mut seen, 0).unwrap(), seen.len());
        assert!(seen[..5] == [0; 5] && seen[5..] == data);
        assert_eq!(file.metadata().unwrap().nlink(), 0);
    });
    assert!(names(&d).is_empty());
}

#[test]
fn many_processes_append_and_no_line_is_lost_or_torn() {
    let mut world = world!(|l| fs::write(l.join("log"), "").unwrap());
    let path = world.at("log");
    processes(&world, 6, |n| {
        for i in 0..150 {
            // Opened anew each time, as shells do.
            let mut file = OpenOptions::new().append(true).open(&path).unwrap();
            file.write_all(format!("{n}:{i}:{}\n", "x".repeat(n * 300)).as_bytes()).unwrap();
        }
    });
    world.remount();
    let mut lines: Vec<String> = fs::read_to_string(world.at("log")).unwrap().lines().map(String::from).collect();
    lines.sort();
    let mut expected: Vec<_> =
        (0..6).flat_map(|n| (0..150).map(move |i| format!("{n}:{i}:{}", "x".repeat(n * 300)))).collect();
    expected.sort();
    assert!(lines == expected, "{} lines of {}", lines.len(), expected.len());
}

#[test]
fn readers_of_a_file_that_is_truncated_see_its_bytes_or_zeros() {
    let world = world!(|l| fs::write(l.join("f"), vec![b'x'; 40 * BLOCK]).unwrap());
    let path = world.at("f");
    storm(&world, 4, |thread, round| {
        let file = rw(&path);
        match thread {
            0 => file.set_len([0, 1, BLOCK + 1, 20 * BLOCK, 40 * BLOCK][round % 5] as u64).unwrap(),
            1 => drop(pwrite(&file, &[b'x'; 100], (round * 37 % (30 * BLOCK)) as u64).unwrap()),
            _ => {
                let mut seen = Vec::new();
                (&file).read_to_end(&mut seen).unwrap();
                assert!(seen.len() <= 40 * BLOCK && seen.iter().all(|byte| *byte == b'x' || *byte == 0));
            }
        }
    });
    rw(&path).set_len(0).unwrap();
    rw(&path).set_len(10 * BLOCK as u64).unwrap();
    assert!(fs::read(&path).unwrap() == vec![0; 10 * BLOCK], "what was cut off does not come back");
}

/// Random changes of a file by several threads, each in its own stripe, against a model.
fn random_changes(options: &'static [&'static str], lower: usize, size: usize) {
    let fill = |l: &Path| {
        let file = File::create(l.join("f")).unwrap();
        (&file).write_all(&pattern(lower)).unwrap();
        file.set_len(size as u64).unwrap();
    };
    let Some(mut world) = World::new(Setup { options, ..Setup::default() }, &[&fill]) else { return };
    let mut start = pattern(lower);
    start.resize(size, 0);
    let stripe = size / 4;
    let models: Vec<_> = start.chunks_exact(stripe).map(|chunk| Mutex::new(chunk.to_vec())).collect();
    let path = world.at("f");
    storm(&world, 4, |thread, round| {
        let (file, model) = (rw(&path), &mut *models[thread].lock().unwrap());
        let mut random = Random::new(thread * 1_000_003 + round);
        for _ in 0..20 {
            let (at, len) = (random.below(stripe - 20_000), 1 + random.below(20_000));
            let offset = (thread * stripe + at) as u64;
            match random.below(5) {
                0 => {
                    fallocate(&file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len as u64)
                        .unwrap();
                    model[at..at + len].fill(0);
                }
                1 => {
                    let mut seen = vec![0; len];
                    assert_eq!(pread(&file, &mut seen, offset).unwrap(), len);
                    assert!(seen == model[at..at + len], "{options:?}: {len} bytes at {offset}");
                }
                _ => {
                    let bytes = vec![random.below(256) as u8; len];
                    assert_eq!(pwrite(&file, &bytes, offset).unwrap(), len);
                    model[at..at + len].copy_from_slice(&bytes);
                }
            }
        }
    });
    for when in ["before", "after"] {
        let seen = fs::read(world.at("f")).unwrap();
        assert_eq!(seen.len(), size);
        for (n, model) in models.iter().enumerate() {
            assert!(
                seen[n * stripe..][..stripe] == **model.lock().unwrap(),
                "{options:?}: stripe {n} {when} a remount"
            );
        }
        world.remount();
    }
}

#[test]
fn random_changes_of_a_big_lower_file() {
    random_changes(&[], 16 << 20, 16 << 20);
}

#[test]
fn random_changes_of_a_big_lower_file_copied_up_by_extents() {
    random_changes(&["copy_up=extent"], 16 << 20, 16 << 20);
}

#[test]
fn random_changes_of_a_big_lower_file_copied_up_by_extents_without_passthrough() {
    random_changes(&["copy_up=extent", "passthrough=0"], 16 << 20, 16 << 20);
}

#[test]
fn random_changes_of_a_big_lower_file_copied_up_whole_without_passthrough() {
    random_changes(&["copy_up=full", "passthrough=0"], 16 << 20, 16 << 20);
}

#[test]
fn random_changes_of_a_sparse_file() {
    random_changes(&[], 1 << 20, 32 << 20);
}

#[test]
fn ranges_are_copied_between_files_by_many() {
    let data = pattern(64 * BLOCK);
    let world = world!(|l| fs::write(l.join("source"), &data).unwrap());
    storm(&world, 4, |thread, round| {
        let (from, to) =
            (File::open(world.at("source")).unwrap(), File::create(world.at(format!("t{thread}"))).unwrap());
        let (at, len) = (round * 1009 % (32 * BLOCK), 20 * BLOCK);
        let (mut from_at, mut to_at) = (at as u64, 0);
        while to_at < len as u64 {
            let left = len - to_at as usize;
            assert!(copy_file_range(&from, Some(&mut from_at), &to, Some(&mut to_at), left).unwrap() > 0);
        }
        assert!(fs::read(world.at(format!("t{thread}"))).unwrap() == data[at..at + len]);
    });
}

#[test]
fn a_counter_under_a_lock_counts_every_process() {
    for (name, lock) in [
        ("flock", (|f: &File| flock(f, FlockOperation::LockExclusive)) as fn(&File) -> rustix::io::Result<()>),
        ("lockf", |f| rustix::fs::fcntl_lock(f, FlockOperation::LockExclusive)),
    ] {
        let world = world!(|l| fs::write(l.join("counter"), "0").unwrap());
        let path = world.at("counter");
        processes(&world, 4, |_| {
            for _ in 0..60 {
                let file = rw(&path);
                lock(&file).unwrap();
                let mut text = String::new();
                (&file).read_to_string(&mut text).unwrap();
                // Who does not wait for the lock comes between.
                std::thread::yield_now();
                pwrite(&file, format!("{}", text.parse::<u32>().unwrap() + 1).as_bytes(), 0).unwrap();
            }
        });
        assert_eq!(fs::read_to_string(&path).unwrap(), "240", "{name}");
    }
}

#[test]
fn syncs_of_everything_at_once() {
    let mut world = world!(|l| (0..4).for_each(|n| fs::write(l.join(format!("f{n}")), pattern(BLOCK)).unwrap()));
    let last = Mutex::new([0; 4]);
    storm(&world, 4, |thread, round| {
        let file = rw(&world.at(format!("f{thread}")));
        pwrite(&file, &(round as u64).to_le_bytes(), 100).unwrap();
        match round % 3 {
            0 => file.sync_all().unwrap(),
            1 => file.sync_data().unwrap(),
            _ => File::open(world.root()).unwrap().sync_all().unwrap(),
        }
        last.lock().unwrap()[thread] = round as u64;
    });
    world.remount();
    for (n, last) in last.into_inner().unwrap().into_iter().enumerate() {
        let mut model = pattern(BLOCK);
        model[100..108].copy_from_slice(&last.to_le_bytes());
        assert!(fs::read(world.at(format!("f{n}"))).unwrap() == model);
    }
}

#[test]
fn pipes_and_sockets_carry_everything() {
    let make = |l: &Path, n: usize| {
        let path = l.join(format!("fifo{n}"));
        rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    };
    let world = world!(|l| (0..2).for_each(|n| make(l, n)));
    make(&world.root(), 2);
    let data = pattern(300_000);
    together(&world, 6, |thread| {
        let path = world.at(format!("fifo{}", thread / 2));
        if thread % 2 == 0 {
            OpenOptions::new().write(true).open(&path).unwrap().write_all(&data).unwrap();
        } else {
            assert!(fs::read(&path).unwrap() == data);
        }
    });
    let listener = UnixListener::bind(world.at("socket")).unwrap();
    together(&world, 4, |thread| {
        if thread > 0 {
            UnixStream::connect(world.at("socket")).unwrap().write_all(&data).unwrap();
            return;
        }
        for _ in 1..4 {
            let mut seen = Vec::new();
            listener.accept().unwrap().0.read_to_end(&mut seen).unwrap();
            assert!(seen == data);
        }
    });
}
