//! Storms on the filesystem as a whole: builds, kills, full disks, memory, descriptors, remounts.

use super::{storm::*, sys::*, world::*};
use rustix::io::Errno;
use std::{
    fs::{self, File},
    io::{Read, Write},
    path::Path,
    process::Command,
    thread,
    time::Duration,
};

#[test]
fn parallel_builds_find_what_they_made() {
    let mut world = world!(|l| {
        fs::create_dir_all(l.join("src")).unwrap();
        (0..40).for_each(|n| fs::write(l.join(format!("src/{n}.in")), format!("unit {n}\n")).unwrap());
        fs::write(l.join("tool"), "#!/bin/sh\nsed s/unit/made/ \"$1\"\n").unwrap();
        chmod(l.join("tool"), 0o755);
    });
    let root = world.root();
    together(&world, 4, |thread| {
        // What make does: a new directory, a program of the tree, a temporary file renamed, a dependency file appended.
        let script = "for i in $(seq $0 4 39); do mkdir -p out/$((i % 3)) && ./tool src/$i.in > out/$i.tmp &&
            mv out/$i.tmp out/$((i % 3))/$i.o && echo $i >> out/deps && touch src/$i.in || exit 1; done";
        let status = Command::new("sh").args(["-c", script, &thread.to_string()]).current_dir(&root).status().unwrap();
        assert!(status.success());
    });
    world.remount();
    for n in 0..40 {
        assert_eq!(fs::read_to_string(world.at(format!("out/{}/{n}.o", n % 3))).unwrap(), format!("made {n}\n"));
        assert_eq!(fs::read_to_string(world.at(format!("src/{n}.in"))).unwrap(), format!("unit {n}\n"));
    }
    assert_eq!(fs::read_to_string(world.at("out/deps")).unwrap().lines().count(), 40);
    assert_eq!(names(world.at("out")), ["0", "1", "2", "deps"]);
}

#[test]
fn clients_killed_in_the_middle_leave_nothing_stuck_or_torn() {
    let mut world = world!(|l| (0..20).for_each(|n| fs::write(l.join(format!("f{n}")), vec![0; 100_000]).unwrap()));
    let _watchdog = Watchdog::new(&world);
    for round in 1..=12u8 {
        let child = fork(|| {
            for n in (0..20).cycle() {
                let path = world.at(format!("f{n}"));
                let file = File::options().write(true).open(&path).unwrap();
                rustix::io::pwrite(&file, &[round; 4096], 40_960).unwrap();
                fs::write(world.at("new"), vec![round; 50_000]).unwrap();
                fs::rename(world.at("new"), world.at(format!("renamed{n}"))).unwrap();
                drop(fs::hard_link(&path, world.at("link")));
                fs::remove_file(world.at("link")).unwrap();
            }
        });
        thread::sleep(Duration::from_millis(10 + 7 * u64::from(round)));
        child.kill();
        assert!(!child.join());
    }
    let check = |world: &World| {
        for n in 0..20 {
            let seen = fs::read(world.at(format!("f{n}"))).unwrap();
            assert_eq!(seen.len(), 100_000);
            assert!(seen[40_960..45_056].iter().all(|byte| *byte == seen[40_960]), "f{n}: a write is torn");
            assert!(seen[..40_960].iter().chain(&seen[45_056..]).all(|byte| *byte == 0));
            if let Ok(renamed) = fs::read(world.at(format!("renamed{n}"))) {
                assert!(renamed.len() == 50_000 && renamed.iter().all(|byte| *byte == renamed[0]));
            }
        }
        fs::write(world.at("works"), "still").unwrap();
    };
    check(&world);
    world.remount();
    check(&world);
}

#[test]
fn each_of_ten_remounts_finds_what_the_last_one_left() {
    let mut world = world!(|l| {
        (0..10).for_each(|n| fs::write(l.join(format!("f{n}")), format!("lower {n}")).unwrap());
        fs::create_dir_all(l.join("d/e")).unwrap();
        fs::write(l.join("d/e/f"), "deep").unwrap();
    });
    for round in 0..10 {
        assert_eq!(names(world.root()).len(), 11);
        for n in 0..10 {
            let expected = if n < round { format!("round {n}") } else { format!("lower {n}") };
            assert_eq!(fs::read_to_string(world.at(format!("f{n}"))).unwrap(), expected);
        }
        let (from, to) = (format!("d{}", "x".repeat(round)), format!("d{}", "x".repeat(round + 1)));
        assert_eq!(fs::read_to_string(world.at(&from).join("e/f")).unwrap(), "deep");
        fs::rename(world.at(&from), world.at(&to)).unwrap();
        fs::remove_file(world.at(format!("f{round}"))).unwrap();
        fs::write(world.at(format!("f{round}")), format!("round {round}")).unwrap();
        world.remount();
    }
}

#[test]
fn a_full_upper_filesystem_breaks_nothing() {
    const M: usize = 1 << 20;
    let fill = |l: &Path| {
        fs::write(l.join("big"), vec![7; 12 * M]).unwrap();
        (0..50).for_each(|n| fs::write(l.join(format!("f{n}")), vec![n as u8; 20_000]).unwrap());
    };
    let setup = Setup { upper_mib: Some(8), options: &["copy_up=full"], ..Setup::default() };
    // The lower layer alone would fill it.
    if is_plain() {
        return;
    }
    let mut world = world!(setup, &[&fill]);
    storm(&world, 4, |thread, round| {
        let name = world.at(format!("fill{thread}-{round}"));
        let wrote = File::create(&name).and_then(|mut file| {
            file.write_all(&vec![1; 300_000])?;
            file.sync_all()
        });
        may!(wrote, NOSPC);
        // A copy-up that finds no room leaves the file as it was.
        let n = (thread * 13 + round) % 50;
        let path = world.at(format!("f{n}"));
        let changed = File::options().write(true).open(&path).and_then(|f| Ok(rustix::io::pwrite(&f, &[n as u8], 9)?));
        may!(changed, NOSPC);
        assert!(fs::read(&path).unwrap() == vec![n as u8; 20_000], "f{n}");
        if round % 8 == 7 {
            may!(fs::remove_file(world.at(format!("fill{thread}-{}", round - 3))), NOENT, NOSPC);
        }
    });
    let big = || File::options().write(true).open(world.at("big")).and_then(|f| Ok(rustix::io::pwrite(&f, b"x", 0)?));
    assert_eq!(big().errno(), Errno::NOSPC, "12 MiB do not fit into 8");
    assert_eq!(fs::read(world.at("big")).unwrap(), vec![7; 12 * M]);
    for name in names(world.root()).iter().filter(|name| name.starts_with("fill")) {
        fs::remove_file(world.at(name)).unwrap();
    }
    fs::write(world.at("room"), vec![1; M]).unwrap();
    world.remount();
    assert_eq!(names(world.root()).len(), 52);
    assert_eq!(fs::read(world.at("room")).unwrap().len(), M);
    for n in 0..50 {
        assert!(fs::read(world.at(format!("f{n}"))).unwrap() == vec![n as u8; 20_000], "f{n} after a remount");
    }
}

#[test]
fn two_thousand_files_are_open_at_once() {
    let mut world = world!(|l| (0..1000).for_each(|n| fs::write(l.join(format!("f{n}")), n.to_string()).unwrap()));
    let _watchdog = Watchdog::new(&world);
    let open =
        |n: usize| File::options().read(true).write(true).create(true).truncate(false).open(world.at(format!("f{n}")));
    let files: Vec<_> = (0..2000).map(|n| open(n).unwrap()).collect();
    for (n, file) in files.iter().enumerate() {
        rustix::io::pwrite(file, b"by descriptor", 10).unwrap();
        if n % 2 == 0 {
            fs::remove_file(world.at(format!("f{n}"))).unwrap();
        }
    }
    for (n, file) in files.iter().enumerate() {
        let mut seen = [0; 13];
        rustix::io::pread(file, &mut seen, 10).unwrap();
        assert_eq!(&seen, b"by descriptor", "{n}");
    }
    drop(files);
    world.remount();
    assert_eq!(names(world.root()).len(), 1000);
}

#[test]
fn a_process_without_descriptors_left_gets_emfile_and_goes_on_after_it() {
    let world = world!(|l| fs::write(l.join("f"), "text").unwrap());
    processes(&world, 2, |_| {
        limit_descriptors(100);
        let mut files = Vec::new();
        let error = loop {
            match File::open(world.at("f")) {
                Ok(file) => files.push(file),
                Err(error) => break error,
            }
        };
        assert_eq!(Errno::from_io_error(&error), Some(Errno::MFILE));
        files.truncate(1);
        let mut text = String::new();
        files[0].read_to_string(&mut text).unwrap();
        assert_eq!(text, "text");
        fs::write(world.at("g"), "works again").unwrap();
    });
}

#[test]
fn the_kernel_drops_its_caches_while_files_are_used() {
    let mut world = world!(|l| {
        for n in 0..10 {
            fs::create_dir(l.join(format!("d{n}"))).unwrap();
            (0..10).for_each(|f| fs::write(l.join(format!("d{n}/f{f}")), vec![f as u8; 5000]).unwrap());
        }
    });
    let kept = File::open(world.at("d0/f0")).unwrap();
    let inode = kept.metadata().unwrap();
    storm(&world, 4, |thread, round| {
        if thread == 0 {
            // Names and inodes: what makes the daemon forget.
            fs::write("/proc/sys/vm/drop_caches", "2").unwrap();
            thread::sleep(Duration::from_millis(20));
            return;
        }
        let (dir, file) = (world.at(format!("d{}", round % 10)), (round / 10) % 10);
        let path = dir.join(format!("f{file}"));
        assert!(fs::read(&path).unwrap() == vec![file as u8; 5000]);
        if round % 3 == 0 {
            rustix::io::pwrite(File::options().write(true).open(&path).unwrap(), &[file as u8], 17).unwrap();
        }
        let own = dir.join(format!("own{thread}"));
        fs::write(&own, "x").unwrap();
        assert_eq!(names(&dir).iter().filter(|name| name.starts_with('f')).count(), 10);
        fs::remove_file(&own).unwrap();
    });
    use std::os::unix::fs::MetadataExt;
    assert_eq!(kept.metadata().unwrap().ino(), inode.ino());
    assert_eq!(stat(world.at("d0/f0")).ino(), inode.ino());
    drop(kept);
    world.remount();
    assert_eq!(names(world.at("d3")).len(), 10);
}

#[test]
fn statfs_and_readlink_and_access_in_a_storm() {
    let world = world!(|l| std::os::unix::fs::symlink("somewhere", l.join("s")).unwrap());
    let calls = storm(&world, 6, |thread, round| {
        let space = rustix::fs::statvfs(world.root()).unwrap();
        assert!(space.f_blocks > 0 && space.f_bavail <= space.f_blocks);
        assert_eq!(fs::read_link(world.at("s")).unwrap(), Path::new("somewhere"));
        assert_eq!(rustix::fs::access(world.at("missing"), rustix::fs::Access::EXISTS).errno(), Errno::NOENT);
        if thread == 0 {
            fs::write(world.at("f"), vec![0; round % 5000]).unwrap();
        }
    });
    assert!(calls > 6);
}

#[test]
fn several_users_work_in_their_directories_at_once() {
    let mut world = world!(|l| {
        put_dir(l.join("tmp"), 0o1777, 0, 0);
        (0..4).for_each(|n| put_dir(l.join(format!("home{n}")), 0o700, 1000 + n, 1000 + n));
    });
    let _watchdog = Watchdog::new(&world);
    thread::scope(|scope| {
        for n in 0..4u32 {
            let world = &world;
            scope.spawn(move || {
                as_user(1000 + n, 1000 + n, &[50], || {
                    for round in 0..60 {
                        let home = world.at(format!("home{n}"));
                        fs::write(home.join(format!("f{round}")), "mine").unwrap();
                        let foreign = world.at(format!("home{}/f{round}", (n + 1) % 4));
                        assert_eq!(fs::read(foreign).errno(), Errno::ACCESS);
                        fs::write(world.at(format!("tmp/{n}-{round}")), "shared").unwrap();
                    }
                })
            });
        }
    });
    world.remount();
    use std::os::unix::fs::MetadataExt;
    for n in 0..4 {
        for name in names(world.at(format!("home{n}"))) {
            let meta = stat(world.at(format!("home{n}/{name}")));
            assert_eq!((meta.uid(), meta.gid()), (1000 + n, 1000 + n));
        }
        assert_eq!(names(world.at(format!("home{n}"))).len(), 60);
    }
    assert_eq!(names(world.at("tmp")).len(), 240);
}
