//! Open files: flags, holes, mappings, programs that run.

use super::{sys::*, world::*};
use rustix::{
    fs::{AtFlags, CWD, FallocateFlags, Mode, OFlags, SeekFrom, copy_file_range, fallocate},
    io::{Errno, pread, pwrite},
};
use std::{
    fs::{self, File, OpenOptions},
    io::{Read, Write},
    os::{fd::AsRawFd, unix::fs::MetadataExt},
    path::Path,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

const K: usize = 1024;

fn rw(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).open(path).unwrap()
}

/// Bytes that differ from place to place.
pub fn pattern(len: usize) -> Vec<u8> {
    (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

fn tmpfile(dir: &Path) -> rustix::io::Result<File> {
    rustix::fs::open(dir, OFlags::TMPFILE | OFlags::RDWR, Mode::from_raw_mode(0o640)).map(File::from)
}

#[test]
fn o_tmpfile_works_or_is_refused_cleanly() {
    let world = world!(|l| put_dir(l.join("d"), 0o755, 0, 0));
    match tmpfile(&world.at("d")) {
        Ok(mut file) => {
            file.write_all(b"text").unwrap();
            assert_eq!(file.metadata().unwrap().nlink(), 0);
            let path = format!("/proc/self/fd/{}", file.as_raw_fd());
            rustix::fs::linkat(CWD, path, CWD, world.at("d/name"), AtFlags::SYMLINK_FOLLOW).unwrap();
            assert_eq!(fs::read(world.at("d/name")).unwrap(), b"text");
        }
        // FUSE knows the request since Linux 6.1, fuser 0.18 does not: programs then make a file and unlink it.
        Err(errno) => assert_eq!(errno, Errno::OPNOTSUPP),
    }
    assert!(names(world.at("d")).len() <= 1, "nothing is left behind: {:?}", names(world.at("d")));
}

#[test]
fn appends_by_several_processes_do_not_overwrite_each_other() {
    let world = world!(|l| put(l.join("log"), "first\n", 0o644, 0, 0));
    let path = world.at("log");
    let writer = |n: u32| {
        let mut file = OpenOptions::new().append(true).open(&path).unwrap();
        for i in 0..200 {
            file.write_all(format!("writer {n} line {i:03} {}\n", "x".repeat(40)).as_bytes()).unwrap();
        }
    };
    let children: Vec<_> = (0..4).map(|n| fork(|| writer(n))).collect();
    assert!(children.into_iter().all(Child::join));
    let text = fs::read_to_string(&path).unwrap();
    let lines: Vec<_> = text.lines().collect();
    assert_eq!((lines.len(), lines[0]), (801, "first"));
    for n in 0..4 {
        let own = lines.iter().filter(|l| l.starts_with(&format!("writer {n} ")));
        let expected = (0..200).map(|i| format!("writer {n} line {i:03} {}", "x".repeat(40)));
        assert!(own.copied().eq(expected), "lines of writer {n} are lost, torn or out of order");
    }
}

#[test]
fn an_append_descriptor_writes_at_the_end_wherever_it_stands() {
    let world = world!(|l| put(l.join("f"), "0123456789", 0o644, 0, 0));
    let mut file = OpenOptions::new().read(true).append(true).open(world.at("f")).unwrap();
    rustix::fs::seek(&file, SeekFrom::Start(2)).unwrap();
    file.write_all(b"end").unwrap();
    rw(&world.at("f")).set_len(4).unwrap();
    file.write_all(b"!").unwrap();
    assert_eq!(fs::read(world.at("f")).unwrap(), b"0123!");
}

#[test]
fn o_trunc_empties_lower_and_upper_files() {
    let world = world!(|l| put(l.join("f"), pattern(300 * K), 0o644, 0, 0));
    for _ in 0..2 {
        let mut reader = File::open(world.at("f")).unwrap();
        File::create(world.at("f")).unwrap().write_all(b"short").unwrap();
        assert_eq!(fs::read(world.at("f")).unwrap(), b"short");
        let mut seen = Vec::new();
        reader.read_to_end(&mut seen).unwrap();
        // A descriptor opened before the copy-up may go on showing the lower file.
        assert!(seen == b"short" || seen == pattern(300 * K));
    }
    assert_eq!(stat(world.at("f")).size(), 5);
}

#[test]
fn open_flags_refuse_what_they_say() {
    let world = world!(|l| {
        put(l.join("f"), "x", 0o644, 0, 0);
        put_dir(l.join("d"), 0o755, 0, 0);
        std::os::unix::fs::symlink("nowhere", l.join("dangling")).unwrap();
    });
    let open = |name: &str, flags: OFlags| rustix::fs::open(world.at(name), flags, Mode::from_raw_mode(0o644));
    let excl = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY;
    for name in ["f", "d", "dangling"] {
        assert_eq!(open(name, excl).errno(), Errno::EXIST, "{name}");
    }
    assert_eq!(open("d", OFlags::CREATE | OFlags::WRONLY).errno(), Errno::ISDIR);
    assert_eq!(open("d", OFlags::WRONLY).errno(), Errno::ISDIR);
    assert_eq!(open("f", OFlags::DIRECTORY).errno(), Errno::NOTDIR);
    assert_eq!(open("dangling", OFlags::NOFOLLOW).errno(), Errno::LOOP);
    assert_eq!(open("dangling", OFlags::RDONLY).errno(), Errno::NOENT);
    assert_eq!(open("f/x", OFlags::RDONLY).errno(), Errno::NOTDIR);
    open("dangling", OFlags::CREATE | OFlags::WRONLY).unwrap();
    assert!(world.at("nowhere").is_file(), "O_CREAT follows a dangling symlink");
    fs::remove_file(world.at("f")).unwrap();
    assert_eq!(open("f", OFlags::RDONLY).errno(), Errno::NOENT);
    open("f", excl).unwrap();
    assert_eq!(open("f", excl).errno(), Errno::EXIST);
    let both = rustix::fs::open(world.at("f"), OFlags::RDONLY, Mode::empty()).unwrap();
    assert_eq!(rustix::io::write(&both, b"x").errno(), Errno::BADF);
}

/// Runs `check` on a file that only the lower layer has, and on one that the upper has.
fn lower_and_upper(data: &[u8], check: impl Fn(&Path)) {
    let world = world!(|l| put(l.join("lower"), data, 0o644, 0, 0));
    put(world.at("upper"), data, 0o644, 0, 0);
    check(&world.at("lower"));
    check(&world.at("upper"));
    assert!(!world.is_union() || fs::read(world.lower(0).join("lower")).unwrap() == data, "the lower file was changed");
}

#[test]
fn truncate_shrinks_and_grows_with_zeros() {
    let data = pattern(100 * K + 100);
    lower_and_upper(&data, |path| {
        let mut model = data.clone();
        for size in [70 * K + 5, 90 * K, 10, 200 * K, 0, 5000] {
            truncate(path, size as i64).unwrap();
            model.resize(size, 0);
            assert_eq!(stat(path).size() as usize, size);
            assert!(fs::read(path).unwrap() == model, "{} at {size}", path.display());
        }
    });
}

#[test]
fn writes_in_the_middle_and_past_the_end() {
    let data = pattern(200 * K + 77);
    lower_and_upper(&data, |path| {
        let file = rw(path);
        let mut model = data.clone();
        for (offset, len) in
            [(5, 3), (4096, 4096), (100 * K - 10, 20), (200 * K + 70, 100), (400 * K, 10), (300 * K, 1)]
        {
            let bytes = vec![0xA5; len];
            assert_eq!(pwrite(&file, &bytes, offset as u64).unwrap(), len);
            model.resize(model.len().max(offset + len), 0);
            model[offset..offset + len].copy_from_slice(&bytes);
            assert!(fs::read(path).unwrap() == model, "{} at {offset}", path.display());
        }
        let mut end = [0; 10];
        assert_eq!(pread(&file, &mut end, model.len() as u64).unwrap(), 0);
        assert_eq!(pread(&file, &mut end, model.len() as u64 - 4).unwrap(), 4);
    });
}

#[test]
fn fallocate_keeps_and_zeroes_what_its_mode_says() {
    let data = pattern(64 * K);
    let (keep, punch, zero) = (FallocateFlags::KEEP_SIZE, FallocateFlags::PUNCH_HOLE, FallocateFlags::ZERO_RANGE);
    lower_and_upper(&data, |path| {
        let file = rw(path);
        let mut model = data.clone();
        let mut check = |mode, offset: usize, len: usize, grows: bool, zeroes: bool| {
            fallocate(&file, mode, offset as u64, len as u64).unwrap_or_else(|e| panic!("{mode:?}: {e}"));
            if grows {
                model.resize(model.len().max(offset + len), 0);
            }
            if zeroes {
                let end = (offset + len).min(model.len());
                model[offset.min(end)..end].fill(0);
            }
            assert!(fs::read(path).unwrap() == model, "{}: {mode:?} {offset} {len}", path.display());
        };
        check(punch | keep, 10_000, 20_000, false, true);
        check(zero | keep, 5, 100, false, true);
        check(FallocateFlags::empty(), 30 * K, 10 * K, true, false);
        check(FallocateFlags::empty(), 60 * K, 40 * K, true, false);
        check(keep, 100 * K, 100 * K, false, false);
        check(zero, 95 * K, 20 * K, true, true);
        check(punch | keep, 110 * K, 100 * K, false, true);
        // Those that move data: done rightly or not at all.
        let mut check_or_refused = |mode, change: &dyn Fn(&mut Vec<u8>)| match fallocate(&file, mode, 4096, 8192) {
            Ok(()) => {
                change(&mut model);
                assert!(fs::read(path).unwrap() == model, "{}: {mode:?}", path.display());
            }
            Err(errno) => {
                assert_eq!(errno, Errno::OPNOTSUPP, "{mode:?}");
                assert!(fs::read(path).unwrap() == model, "{mode:?} was refused and yet changed something");
            }
        };
        check_or_refused(FallocateFlags::COLLAPSE_RANGE, &|model| drop(model.drain(4096..4096 + 8192)));
        check_or_refused(FallocateFlags::INSERT_RANGE, &|model| {
            model.splice(4096..4096, vec![0; 8192]);
        });
        assert_eq!(fallocate(&file, punch, 0, 4096).errno(), Errno::OPNOTSUPP, "punching goes only with KEEP_SIZE");
        assert_eq!(fallocate(&file, keep, 0, 0).errno(), Errno::INVAL);
    });
}

#[test]
fn copy_file_range_between_and_within_files() {
    let data = pattern(150 * K);
    lower_and_upper(&data, |path| {
        let target = path.with_extension("copy");
        let (from, to) = (rw(path), File::create(&target).unwrap());
        let (mut from_offset, mut to_offset) = (1000, 10);
        while copy_file_range(&from, Some(&mut from_offset), &to, Some(&mut to_offset), 1 << 20).unwrap() > 0 {}
        let mut expected = vec![0; 10];
        expected.extend(&data[1000..]);
        assert!(fs::read(&target).unwrap() == expected);
        let (mut a, mut b) = (0, 80 * K as u64);
        assert_eq!(copy_file_range(&from, Some(&mut a), &from, Some(&mut b), 20 * K).unwrap(), 20 * K);
        let mut model = data.clone();
        model.copy_within(..20 * K, 80 * K);
        assert!(fs::read(path).unwrap() == model);
        let (mut a, mut b) = (0, 10);
        assert_eq!(copy_file_range(&from, Some(&mut a), &from, Some(&mut b), 100).errno(), Errno::INVAL, "overlap");
    });
}

fn extents(file: &File) -> Vec<(u64, u64)> {
    let mut found = Vec::new();
    let mut at = 0;
    while let Ok(start) = rustix::fs::seek(file, SeekFrom::Data(at)) {
        at = rustix::fs::seek(file, SeekFrom::Hole(start)).unwrap();
        found.push((start, at));
    }
    found
}

#[test]
fn holes_are_found_and_stay_holes_over_copy_up() {
    const M: u64 = 1 << 20;
    let make = |path: &Path| {
        let file = File::create(path).unwrap();
        file.set_len(32 * M).unwrap();
        pwrite(&file, &pattern(64 * K), 4 * M).unwrap();
        pwrite(&file, &pattern(64 * K), 20 * M).unwrap();
        // Delayed allocation reports no extents on some filesystems.
        file.sync_all().unwrap();
    };
    let world = world!(|l| make(&l.join("lower")));
    make(&world.at("upper"));
    for name in ["lower", "upper"] {
        let path = world.at(name);
        let expected = [(4 * M, 4 * M + 64 * 1024), (20 * M, 20 * M + 64 * 1024)];
        assert_eq!(extents(&File::open(&path).unwrap()), expected, "{name}");
        assert_eq!(rustix::fs::seek(File::open(&path).unwrap(), SeekFrom::Data(32 * M)).errno(), Errno::NXIO);
        let file = rw(&path);
        pwrite(&file, b"x", 10 * M).unwrap();
        file.sync_all().unwrap();
        // The kernel's overlay copies up by the MiB.
        let found = extents(&file);
        let data: u64 = found.iter().map(|(start, end)| end - start).sum();
        assert!(data <= 4 * M, "{name} after a write: {found:?}");
        for (start, end) in [expected[0], (10 * M, 10 * M + 1), expected[1]] {
            assert!(found.iter().any(|e| e.0 <= start && end <= e.1), "{name}: {start} is missing from {found:?}");
        }
        assert!(stat(&path).blocks() * 512 <= 4 * M, "{name} takes {} blocks", stat(&path).blocks());
    }
}

#[test]
fn shared_mappings_and_writes_see_each_other() {
    let data = pattern(40 * K);
    lower_and_upper(&data, |path| {
        let file = rw(path);
        let (one, two) =
            (Map::new(&file, 40 * K, true, true).unwrap(), Map::new(&rw(path), 40 * K, true, true).unwrap());
        assert!(one.read(0, 40 * K) == data);
        one.write(5000, b"by map");
        assert_eq!(two.read(5000, 6), b"by map");
        assert_eq!(&fs::read(path).unwrap()[5000..5006], b"by map");
        pwrite(&file, b"by write", 9000).unwrap();
        assert_eq!(two.read(9000, 8), b"by write");
        fs::remove_file(path).unwrap();
        one.write(0, b"gone");
        assert_eq!(two.read(0, 4), b"gone", "outlives the name");
        one.sync();
        let mut start = [0; 4];
        pread(&file, &mut start, 0).unwrap();
        assert_eq!(&start, b"gone");
        fs::write(path, &data).unwrap();
    });
}

#[test]
fn what_was_mapped_is_there_after_a_remount() {
    let mut world = world!(|l| put(l.join("f"), pattern(40 * K), 0o644, 0, 0));
    let file = rw(&world.at("f"));
    let map = Map::new(&file, 40 * K, true, true).unwrap();
    map.write(20 * K + 100, b"by map");
    drop((map, file));
    world.remount();
    let mut model = pattern(40 * K);
    model[20 * K + 100..][..6].copy_from_slice(b"by map");
    assert!(fs::read(world.at("f")).unwrap() == model);
}

#[test]
fn private_mappings_stay_private() {
    let data = pattern(40 * K);
    lower_and_upper(&data, |path| {
        let map = Map::new(&File::open(path).unwrap(), 40 * K, false, true).unwrap();
        map.write(100, b"mine");
        assert_eq!(map.read(100, 4), b"mine");
        assert!(fs::read(path).unwrap() == data);
    });
}

#[test]
fn descriptors_and_mappings_from_before_a_copy_up_show_old_or_new_content() {
    let data = pattern(256 * K);
    let world = world!(|l| put(l.join("f"), pattern(256 * K), 0o644, 0, 0));
    let old = File::open(world.at("f")).unwrap();
    let map = Map::new(&old, 256 * K, false, false).unwrap();
    let mut new = data.clone();
    new[8192..8195].copy_from_slice(b"new");
    pwrite(rw(&world.at("f")), b"new", 8192).unwrap();
    assert!(fs::read(world.at("f")).unwrap() == new, "a new descriptor sees the new content");
    let mut seen = vec![0; 256 * K];
    assert_eq!(pread(&old, &mut seen, 0).unwrap(), seen.len());
    assert!(seen == data || seen == new, "the old descriptor shows neither the old nor the new content");
    let mapped = map.read(0, 256 * K);
    assert!(mapped == data || mapped == new, "the old mapping shows neither the old nor the new content");
    File::create(world.at("f")).unwrap();
    let len = pread(&old, &mut seen, 0).unwrap();
    assert!(len == 0 || len == 256 * K && (seen == data || seen == new), "after truncation: {len} bytes");
}

#[test]
fn open_files_outlive_unlink_and_rename() {
    let data = pattern(100 * K);
    lower_and_upper(&data, |path| {
        let (file, reader) = (rw(path), File::open(path).unwrap());
        let other = path.with_extension("other");
        fs::write(&other, "replaces").unwrap();
        fs::rename(&other, path).unwrap();
        pwrite(&file, b"still mine", 50_000).unwrap();
        file.set_len(60_000).unwrap();
        assert_eq!((file.metadata().unwrap().len(), file.metadata().unwrap().nlink()), (60_000, 0));
        let mut seen = [0; 10];
        pread(&file, &mut seen, 50_000).unwrap();
        assert_eq!(&seen, b"still mine");
        pread(&reader, &mut seen, 0).unwrap();
        assert_eq!(seen, data[..10]);
        assert_eq!(fs::read(path).unwrap(), b"replaces");
        fs::write(path, &data).unwrap();
        let file = rw(path);
        fs::remove_file(path).unwrap();
        assert!(!path.exists());
        pwrite(&file, b"x", 0).unwrap();
        file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        assert_eq!(file.metadata().unwrap().mode() & 0o777, 0o600, "fchmod of an unlinked file");
        fs::write(path, &data).unwrap();
        let renamed = path.with_extension("renamed");
        let file = rw(path);
        fs::rename(path, &renamed).unwrap();
        pwrite(&file, b"renamed", 0).unwrap();
        assert_eq!(&fs::read(&renamed).unwrap()[..7], b"renamed");
        fs::remove_file(&renamed).unwrap();
        fs::write(path, &data).unwrap();
    });
}

#[test]
fn a_lower_file_opened_for_reading_outlives_its_removal() {
    let world = world!(|l| put(l.join("f"), pattern(100 * K), 0o644, 0, 0));
    let file = File::open(world.at("f")).unwrap();
    fs::remove_file(world.at("f")).unwrap();
    fs::write(world.at("f"), "another").unwrap();
    let mut seen = Vec::new();
    (&file).read_to_end(&mut seen).unwrap();
    assert!(seen == pattern(100 * K));
    assert_eq!(file.metadata().unwrap().len(), 100 * K as u64);
}

#[test]
fn a_removed_working_directory_is_empty_and_takes_nothing() {
    let world = world!(|l| {
        put_dir(l.join("lower"), 0o755, 0, 0);
        put(l.join("lower/f"), "x", 0o644, 0, 0);
    });
    fs::create_dir(world.at("upper")).unwrap();
    for name in ["lower", "upper"] {
        let dir = world.at(name);
        with_umask(0o022, || {
            std::env::set_current_dir(&dir).unwrap();
            let _ = fs::remove_file("f");
            fs::remove_dir(&dir).unwrap();
            assert_eq!(File::create("new").errno(), Errno::NOENT);
            assert_eq!(fs::create_dir("new").errno(), Errno::NOENT);
            assert_eq!(fs::read_dir(".").map(|entries| entries.count()).unwrap_or(0), 0);
            fs::metadata(".").unwrap();
            fs::create_dir(&dir).unwrap();
            fs::write(dir.join("new"), "").unwrap();
            assert_eq!(fs::metadata("new").errno(), Errno::NOENT, "another directory of the same name");
        });
    }
}

/// Runs a program to its end.
fn run(path: &Path, arguments: &[&str]) -> Vec<u8> {
    // A child that another test has just forked may hold our descriptor for a moment, open for writing.
    for _ in 0..200 {
        match Command::new(path).args(arguments).output() {
            Err(e) if e.raw_os_error() == Some(libc::ETXTBSY) => thread::sleep(Duration::from_millis(5)),
            result => {
                let output = result.unwrap();
                assert!(output.status.success(), "{output:?}");
                return output.stdout;
            }
        }
    }
    panic!("{} is busy for a second", path.display())
}

#[test]
fn programs_run_from_every_layer_and_set_user_ids_count() {
    let world = world!(|l| {
        fs::copy("/usr/bin/id", l.join("id")).unwrap();
        chown(l.join("id"), 1234, 0);
        chmod(l.join("id"), 0o4755);
    });
    fs::copy(world.at("id"), world.at("copy")).unwrap();
    chmod(world.at("copy"), 0o755);
    assert_eq!(run(&world.at("id"), &["-u"]), b"1234\n");
    assert_eq!(run(&world.at("copy"), &["-u"]), b"0\n");
    chmod(world.at("id"), 0o644);
    assert_eq!(Command::new(world.at("id")).output().errno(), Errno::ACCESS);
}

#[test]
fn a_running_program_is_replaced_without_harm_and_not_written_to() {
    let world = world!(|l| {
        fs::copy("/usr/bin/sleep", l.join("lower")).unwrap();
    });
    fs::copy("/usr/bin/sleep", world.at("upper")).unwrap();
    run(&world.at("upper"), &["0"]);
    for name in ["lower", "upper"] {
        let path = world.at(name);
        let mut running = Command::new(&path).arg("100").stdin(Stdio::null()).spawn().unwrap();
        // It runs once it has replaced itself.
        let exe = format!("/proc/{}/exe", running.id());
        while fs::read_link(&exe).unwrap() != path {
            thread::sleep(Duration::from_millis(1));
        }
        match OpenOptions::new().write(true).open(&path) {
            Err(e) => assert_eq!(Errno::from_io_error(&e), Some(Errno::TXTBSY)),
            // A lower file's copy-up is another file than the one that runs.
            Ok(_) => assert_eq!(name, "lower", "a file that runs was opened for writing"),
        }
        fs::write(world.at("new"), "#!/bin/sh\necho replaced\n").unwrap();
        chmod(world.at("new"), 0o755);
        fs::rename(world.at("new"), &path).unwrap();
        assert!(running.try_wait().unwrap().is_none(), "the running program died");
        running.kill().unwrap();
        running.wait().unwrap();
        assert_eq!(run(&path, &[]), b"replaced\n");
    }
}

#[test]
fn a_file_open_for_writing_does_not_run() {
    let world = world!(|l| {
        fs::copy("/usr/bin/true", l.join("program")).unwrap();
    });
    let writer = rw(&world.at("program"));
    assert_eq!(Command::new(world.at("program")).status().errno(), Errno::TXTBSY);
    drop(writer);
    run(&world.at("program"), &[]);
}

#[test]
fn files_directories_and_the_filesystem_can_be_synced() {
    let world = world!(|l| {
        put_dir(l.join("lower"), 0o755, 0, 0);
        put(l.join("lower/f"), "x", 0o644, 0, 0);
    });
    fs::create_dir(world.at("upper")).unwrap();
    fs::write(world.at("upper/f"), "x").unwrap();
    for name in ["lower", "upper"] {
        let dir = File::open(world.at(name)).unwrap();
        dir.sync_all().unwrap();
        dir.sync_data().unwrap();
        File::open(world.at(name).join("f")).unwrap().sync_all().unwrap();
        let mut file = rw(&world.at(name).join("f"));
        file.write_all(b"synced").unwrap();
        file.sync_data().unwrap();
        file.sync_all().unwrap();
        rustix::fs::syncfs(&file).unwrap();
    }
}

#[test]
fn direct_and_synchronous_writes() {
    let data = pattern(64 * K);
    lower_and_upper(&data, |path| {
        let file: File = rustix::fs::open(path, OFlags::RDWR | OFlags::DSYNC, Mode::empty()).unwrap().into();
        pwrite(&file, b"dsync", 70).unwrap();
        let file: File = rustix::fs::open(path, OFlags::RDWR | OFlags::DIRECT, Mode::empty()).unwrap().into();
        let space = vec![7; 3 * 4096];
        let start = space.as_ptr().align_offset(4096);
        pwrite(&file, &space[start..start + 4096], 8192).unwrap();
        let mut model = data.clone();
        model[70..75].copy_from_slice(b"dsync");
        model[8192..12288].fill(7);
        assert!(fs::read(path).unwrap() == model);
    });
}
