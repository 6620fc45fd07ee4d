//! Access, change and modification times.

use super::world::*;
use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT};
use std::{
    fs::{self, OpenOptions},
    io::Write,
    os::unix::fs::MetadataExt,
    path::Path,
    thread,
    time::Duration,
};

type Time = (i64, i64);

fn at(sec: i64, nsec: i64) -> Timespec {
    Timespec { tv_sec: sec, tv_nsec: nsec as _ }
}

fn set(path: &Path, atime: Timespec, mtime: Timespec) {
    let times = Timestamps { last_access: atime, last_modification: mtime };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

fn times(path: &Path) -> [Time; 3] {
    let s = stat(path);
    [(s.atime(), s.atime_nsec()), (s.mtime(), s.mtime_nsec()), (s.ctime(), s.ctime_nsec())]
}

/// Whether `change` moves the modification and the change time of `path`.
fn moves(path: &Path, change: impl FnOnce()) -> (bool, bool) {
    let [_, mtime, ctime] = times(path);
    // The kernel's clock for files ticks every few milliseconds.
    thread::sleep(Duration::from_millis(15));
    change();
    let [_, mtime_after, ctime_after] = times(path);
    assert!(mtime_after >= mtime && ctime_after >= ctime, "time does not run backwards");
    (mtime_after != mtime, ctime_after != ctime)
}

fn all_times_can_be_set(dir: &Path) {
    // ext4 has 34 bits of seconds: 1901 to 2446.
    let moments = [at(0, 1), at(-1, 500_000_000), at(-2_000_000_000, 999_999_999), at(5_000_000_000, 123_456_789)];
    for name in ["file", "dir", "link", "fifo"] {
        let path = dir.join(name);
        for (n, moment) in moments.iter().enumerate() {
            let other = moments[(n + 1) % moments.len()];
            set(&path, *moment, other);
            let pair = |t: Timespec| (t.tv_sec, t.tv_nsec);
            assert_eq!(times(&path)[..2], [pair(*moment), pair(other)], "{name}");
        }
    }
    assert_eq!(fs::read_link(dir.join("link")).unwrap(), Path::new("file"));
}

fn one_of_each(dir: &Path) {
    put(dir.join("file"), "x", 0o644, 0, 0);
    put_dir(dir.join("dir"), 0o755, 0, 0);
    std::os::unix::fs::symlink("file", dir.join("link")).unwrap();
    rustix::fs::mknodat(CWD, dir.join("fifo"), rustix::fs::FileType::Fifo, 0o644.into(), 0).unwrap();
}

#[test]
fn times_of_lower_files_can_be_set_from_1901_to_2446_by_the_nanosecond() {
    let mut world = world!(one_of_each);
    all_times_can_be_set(&world.root());
    let before = ["file", "dir", "link", "fifo"].map(|name| times(&world.at(name)));
    world.remount();
    assert_eq!(["file", "dir", "link", "fifo"].map(|name| times(&world.at(name))), before, "after a remount");
}

#[test]
fn times_of_upper_files_can_be_set_from_1901_to_2446_by_the_nanosecond() {
    let world = world!(|_| {});
    one_of_each(&world.root());
    all_times_can_be_set(&world.root());
}

#[test]
fn times_of_lower_files_are_shown_to_the_nanosecond() {
    let world = world!(|l| {
        one_of_each(l);
        for name in ["file", "dir", "link"] {
            set(&l.join(name), at(-1000, 1), at(4_500_000_000, 999_999_999));
        }
    });
    for name in ["file", "dir", "link"] {
        assert_eq!(times(&world.at(name))[1], (4_500_000_000, 999_999_999), "{name}");
    }
    assert_eq!(times(&world.at("link"))[0].0, -1000);
}

#[test]
fn utime_omit_and_now() {
    let world = world!(|l| {
        put(l.join("f"), "x", 0o644, 0, 0);
        set(&l.join("f"), at(1, 2), at(3, 4));
    });
    let f = world.at("f");
    let (omit, now) = (at(0, UTIME_OMIT), at(0, UTIME_NOW));
    let ctime = times(&f)[2];
    thread::sleep(Duration::from_millis(15));
    set(&f, omit, omit);
    assert_eq!(times(&f), [(1, 2), (3, 4), ctime], "nothing at all was to be changed");
    set(&f, omit, at(5, 6));
    assert_eq!(times(&f)[..2], [(1, 2), (5, 6)]);
    assert!(times(&f)[2] > ctime);
    set(&f, now, omit);
    assert_eq!(times(&f)[1], (5, 6));
    assert!(times(&f)[0].0 > 1_500_000_000);
    set(&f, omit, now);
    assert!(times(&f)[1].0 > 1_500_000_000);
}

#[test]
fn copy_up_keeps_times_but_the_change_time() {
    let world = world!(|l| {
        put_dir(l.join("dir"), 0o755, 0, 0);
        put(l.join("dir/f"), vec![1; 100_000], 0o644, 0, 0);
        set(&l.join("dir/f"), at(1, 2), at(3, 4));
        set(&l.join("dir"), at(5, 6), at(7, 8));
    });
    chmod(world.at("dir/f"), 0o600);
    assert_eq!(times(&world.at("dir/f"))[..2], [(1, 2), (3, 4)]);
    assert_eq!(times(&world.at("dir"))[1], (7, 8), "the directory's copy-up is no change of it either");
    OpenOptions::new().write(true).open(world.at("dir/f")).unwrap();
    assert_eq!(times(&world.at("dir/f"))[1], (3, 4), "an open for writing writes nothing");
}

fn changes_of_files_move_their_times(path: &Path) {
    let open = || OpenOptions::new().write(true).open(path).unwrap();
    assert_eq!(moves(path, || chmod(path, 0o600)), (false, true), "chmod");
    assert_eq!(moves(path, || chown(path, 1, 1)), (false, true), "chown");
    assert_eq!(moves(path, || xattr::set(path, "user.x", b"y").unwrap()), (false, true), "setxattr");
    assert_eq!(moves(path, || xattr::remove(path, "user.x").unwrap()), (false, true), "removexattr");
    assert_eq!(moves(path, || fs::hard_link(path, path.with_extension("link")).unwrap()), (false, true), "link");
    assert_eq!(moves(path, || fs::remove_file(path.with_extension("link")).unwrap()), (false, true), "unlink");
    assert_eq!(moves(path, || open().write_all(b"new").unwrap()), (true, true), "write");
    let mut kept = open();
    assert_eq!(moves(path, || kept.write_all(b"new").unwrap()), (true, true), "write by an old descriptor");
    assert_eq!(moves(path, || open().set_len(5).unwrap()), (true, true), "truncate");
    assert_eq!(moves(path, || drop(fs::File::create(path).unwrap())), (true, true), "O_TRUNC");
    assert_eq!(moves(path, || drop(fs::read(path).unwrap())), (false, false), "read");
    assert_eq!(moves(path, || drop(open())), (false, false), "open for writing");
}

#[test]
fn changes_of_a_lower_file_move_its_times() {
    let world = world!(|l| put(l.join("f"), "some text", 0o644, 0, 0));
    changes_of_files_move_their_times(&world.at("f"));
}

#[test]
fn changes_of_an_upper_file_move_its_times() {
    let world = world!(|_| {});
    put(world.at("f"), "some text", 0o644, 0, 0);
    changes_of_files_move_their_times(&world.at("f"));
}

#[test]
fn changes_of_names_move_the_times_of_their_directories() {
    let world = world!(|l| {
        for dir in ["d", "e"] {
            put_dir(l.join(dir), 0o755, 0, 0);
            put(l.join(dir).join("lower"), "x", 0o644, 0, 0);
        }
    });
    let (d, e) = (world.at("d"), world.at("e"));
    let both = (true, true);
    assert_eq!(moves(&d, || fs::write(d.join("f"), "").unwrap()), both, "create");
    assert_eq!(moves(&d, || fs::create_dir(d.join("dir")).unwrap()), both, "mkdir");
    assert_eq!(moves(&d, || std::os::unix::fs::symlink("x", d.join("s")).unwrap()), both, "symlink");
    assert_eq!(moves(&d, || fs::hard_link(d.join("f"), d.join("f2")).unwrap()), both, "link");
    assert_eq!(moves(&d, || fs::remove_file(d.join("f2")).unwrap()), both, "unlink");
    assert_eq!(moves(&d, || fs::remove_dir(d.join("dir")).unwrap()), both, "rmdir");
    assert_eq!(moves(&d, || fs::rename(d.join("f"), d.join("g")).unwrap()), both, "rename");
    assert_eq!(moves(&e, || fs::rename(d.join("g"), e.join("g")).unwrap()), both, "rename into");
    assert_eq!(moves(&d, || fs::rename(d.join("lower"), e.join("moved")).unwrap()), both, "rename out of, lower");
    assert_eq!(moves(&e, || fs::remove_file(e.join("lower")).unwrap()), both, "unlink of a lower file");
    assert_eq!(moves(&e, || fs::write(e.join("g"), "more").unwrap()), (false, false), "write to a file in it");
}

#[test]
fn reading_moves_the_access_time() {
    // As `relatime` has it: if it is older than the last change. Only of upper files: the kernel's overlay too leaves
    // layers that others share alone. After a remount, since what the kernel has cached is read without the daemon.
    let mut world = world!(|_| {});
    let f = world.at("f");
    fs::write(&f, "x").unwrap();
    let (old, newer) = (at(1_000_000, 0), at(2_000_000, 0));
    set(&f, old, newer);
    world.remount();
    assert_eq!(times(&f)[0], (1_000_000, 0));
    fs::read(&f).unwrap();
    assert!(times(&f)[0].0 > 1_500_000_000, "{:?}", times(&f)[0]);
    assert_eq!(times(&f)[1], (2_000_000, 0));
}
