//! Names: renames, links, lengths, file types, directories that are read while they change.

use super::{sys::*, world::*};
use rustix::{
    fs::{CWD, Dir, FileType, OFlags, RawDir, RenameFlags, SeekFrom, makedev, mknodat, renameat_with},
    io::Errno,
};
use std::{
    collections::HashSet,
    ffi::OsStr,
    fs::{self, File},
    io::{Read, Write},
    mem::MaybeUninit,
    os::unix::{
        ffi::OsStrExt,
        fs::{FileTypeExt, MetadataExt, symlink},
        net::{UnixListener, UnixStream},
    },
    path::Path,
};

fn rename(from: &Path, to: &Path, flags: RenameFlags) -> rustix::io::Result<()> {
    renameat_with(CWD, from, CWD, to, flags)
}

fn text(path: impl AsRef<Path>) -> String {
    fs::read_to_string(path).unwrap()
}

#[test]
fn rename_noreplace_refuses_what_exists_in_any_layer() {
    let mut world = world!(|l| {
        for name in ["a", "b", "gone"] {
            put(l.join(name), name, 0o644, 0, 0);
        }
    });
    fs::write(world.at("upper"), "upper").unwrap();
    fs::remove_file(world.at("gone")).unwrap();
    let go = |from: &str, to: &str| rename(&world.at(from), &world.at(to), RenameFlags::NOREPLACE);
    for (from, to) in [("a", "b"), ("a", "upper"), ("upper", "a"), ("a", "a")] {
        assert_eq!(go(from, to).errno(), Errno::EXIST, "{from} to {to}");
    }
    go("a", "gone").unwrap();
    go("upper", "a").unwrap();
    world.remount();
    assert_eq!(names(world.root()), ["a", "b", "gone"]);
    assert_eq!([text(world.at("a")), text(world.at("gone"))], ["upper", "a"]);
}

#[test]
fn rename_exchange_swaps_files_and_directories_of_any_layer() {
    let mut world = world!(|l| {
        put(l.join("file"), "lower file", 0o644, 0, 0);
        put_dir(l.join("dir"), 0o755, 0, 0);
        put(l.join("dir/in"), "lower in", 0o644, 0, 0);
        put_dir(l.join("dir2"), 0o700, 0, 0);
        put(l.join("dir2/in2"), "lower in2", 0o644, 0, 0);
    });
    fs::write(world.at("upper"), "upper file").unwrap();
    let go = |a: &str, b: &str| rename(&world.at(a), &world.at(b), RenameFlags::EXCHANGE);
    go("file", "upper").unwrap();
    assert_eq!([text(world.at("file")), text(world.at("upper"))], ["upper file", "lower file"]);
    go("dir", "dir2").unwrap();
    assert_eq!([names(world.at("dir")), names(world.at("dir2"))], [["in2"], ["in"]]);
    assert_eq!([mode(world.at("dir")), mode(world.at("dir2"))], [0o700, 0o755]);
    go("file", "dir").unwrap();
    assert_eq!(go("file", "missing").errno(), Errno::NOENT);
    assert_eq!(go("file", "file/in2").errno(), Errno::INVAL, "with what lies in it");
    world.remount();
    assert_eq!(names(world.root()), ["dir", "dir2", "file", "upper"]);
    assert_eq!(
        [text(world.at("dir")), text(world.at("file/in2")), text(world.at("dir2/in"))],
        ["upper file", "lower in2", "lower in"]
    );
}

#[test]
fn rename_whiteout_moves_the_file_or_is_refused() {
    let mut world = world!(|l| put(l.join("lower"), "lower", 0o644, 0, 0));
    fs::write(world.at("upper"), "upper").unwrap();
    for name in ["lower", "upper"] {
        match rename(&world.at(name), &world.at("moved"), RenameFlags::WHITEOUT) {
            Ok(()) => {
                assert_eq!(text(world.at("moved")), name);
                // Where there are layers the whiteout it leaves is one of theirs, and hides.
                let left = fs::symlink_metadata(world.at(name));
                assert!(left.as_ref().map_or(true, |m| m.file_type().is_char_device() && m.rdev() == 0), "{left:?}");
                fs::remove_file(world.at("moved")).unwrap();
            }
            // As the kernel's overlay answers.
            Err(errno) => {
                assert_eq!(errno, Errno::INVAL);
                assert_eq!(text(world.at(name)), name);
            }
        }
    }
    let before = names(world.root());
    world.remount();
    assert_eq!(names(world.root()), before);
}

#[test]
fn rename_replaces_or_refuses_by_type() {
    let fill = |l: &Path| {
        for dir in ["full", "empty", "other"] {
            put_dir(l.join(dir), 0o755, 0, 0);
        }
        put(l.join("full/in"), "in", 0o644, 0, 0);
        put(l.join("other/of"), "of", 0o644, 0, 0);
        put(l.join("f"), "f", 0o644, 0, 0);
        put(l.join("g"), "g", 0o644, 0, 0);
        fs::hard_link(l.join("g"), l.join("same")).unwrap();
    };
    let mut world = world!(fill);
    let go = |from: &str, to: &str| fs::rename(world.at(from), world.at(to));
    assert_eq!(go("other", "full").errno(), Errno::NOTEMPTY);
    assert_eq!(go("f", "empty").errno(), Errno::ISDIR);
    assert_eq!(go("empty", "f").errno(), Errno::NOTDIR);
    assert_eq!(go("full", "full/below").errno(), Errno::INVAL);
    assert_eq!(go("full/in", "full").errno(), Errno::NOTEMPTY);
    assert_eq!(go("f", "missing/f").errno(), Errno::NOENT);
    assert_eq!(go("missing", "f").errno(), Errno::NOENT);
    go("f", "f").unwrap();
    go("g", "same").unwrap();
    assert_eq!(text(world.at("g")), "g", "two names of one file: nothing happens");
    go("f", "g").unwrap();
    go("full", "empty").unwrap();
    world.remount();
    assert_eq!(names(world.root()), ["empty", "g", "other", "same"]);
    assert_eq!([text(world.at("g")), text(world.at("same")), text(world.at("empty/in"))], ["f", "g", "in"]);
}

#[test]
fn link_counts_are_exact() {
    let world = world!(|l| {
        put_dir(l.join("dir"), 0o755, 0, 0);
        put_dir(l.join("dir/lower"), 0o755, 0, 0);
        put(l.join("one"), "x", 0o644, 0, 0);
        fs::hard_link(l.join("one"), l.join("dir/two")).unwrap();
    });
    let count = |name: &str| stat(world.at(name)).nlink();
    assert_eq!([count("one"), count("dir/two")], [2, 2]);
    fs::hard_link(world.at("dir/two"), world.at("three")).unwrap();
    assert_eq!([count("one"), count("dir/two"), count("three")], [3, 3, 3]);
    fs::remove_file(world.at("one")).unwrap();
    assert_eq!([count("dir/two"), count("three")], [2, 2]);
    fs::write(world.at("three"), "y").unwrap();
    assert_eq!(text(world.at("dir/two")), "y");
    fs::remove_file(world.at("dir/two")).unwrap();
    assert_eq!(count("three"), 1);
    // The kernel's overlay says 1 for merged directories, which by convention means uncounted.
    let uncounted = count("dir") == 1;
    assert!(uncounted || count("dir") == 3, "{}", count("dir"));
    fs::create_dir(world.at("dir/new")).unwrap();
    assert_eq!(count("dir"), if uncounted { 1 } else { 4 });
    fs::remove_dir(world.at("dir/lower")).unwrap();
    assert_eq!(count("dir"), if uncounted { 1 } else { 3 });
    assert_eq!(fs::hard_link(world.at("dir"), world.at("x")).errno(), Errno::PERM);
}

#[test]
fn names_have_255_bytes_and_not_more() {
    let longest = "n".repeat(255);
    let world = world!(|l| put(l.join("l".repeat(255)), "lower", 0o644, 0, 0));
    let (at, too_long) = (world.at(&longest), world.at("n".repeat(256)));
    for error in [
        File::create(&too_long).errno(),
        fs::create_dir(&too_long).errno(),
        fs::metadata(&too_long).errno(),
        fs::remove_file(&too_long).errno(),
        symlink("x", &too_long).errno(),
        fs::rename(world.at("l".repeat(255)), &too_long).errno(),
        fs::hard_link(world.at("l".repeat(255)), &too_long).errno(),
    ] {
        assert_eq!(error, Errno::NAMETOOLONG);
    }
    fs::rename(world.at("l".repeat(255)), &at).unwrap();
    assert_eq!(text(&at), "lower");
    fs::write(&at, "changed").unwrap();
    fs::remove_file(&at).unwrap();
    fs::create_dir(&at).unwrap();
    fs::write(at.join(&longest), "deep").unwrap();
    assert_eq!(names(world.root()), std::slice::from_ref(&longest));
    fs::remove_dir_all(&at).unwrap();
    assert!(names(world.root()).is_empty());
}

#[test]
fn paths_and_targets_have_4095_bytes_and_not_more() {
    let world = world!(|_| {});
    let mut path = world.at("d");
    fs::create_dir(&path).unwrap();
    while path.as_os_str().len() < 4095 - 201 {
        path.push("p".repeat(199));
        fs::create_dir(&path).unwrap();
    }
    let last = "f".repeat(4095 - path.as_os_str().len() - 1);
    fs::write(path.join(&last), "deep").unwrap();
    assert_eq!(text(path.join(&last)), "deep");
    assert_eq!(File::create(path.join(last + "g")).errno(), Errno::NAMETOOLONG);
    let target = "t".repeat(4095);
    symlink(&target, world.at("link")).unwrap();
    assert_eq!(fs::read_link(world.at("link")).unwrap().as_os_str().len(), 4095);
    assert_eq!(symlink(target + "t", world.at("longer")).errno(), Errno::NAMETOOLONG);
    fs::remove_dir_all(world.at("d")).unwrap();
}

#[test]
fn names_are_bytes() {
    let odd: [&[u8]; 7] = [b"\n", b"\xff\xfe", b"...", b" ", b"-rf", b"a:b,c\\d", b".wh"];
    let mut world = world!(|l| {
        for name in odd {
            fs::write(l.join(OsStr::from_bytes(name)), name).unwrap();
        }
    });
    for name in odd {
        let path = world.at(OsStr::from_bytes(name));
        assert_eq!(fs::read(&path).unwrap(), name);
        fs::write(&path, "changed").unwrap();
        let renamed = world.at(OsStr::from_bytes(&[name, b"2"].concat()));
        fs::rename(&path, &renamed).unwrap();
    }
    world.remount();
    assert_eq!(fs::read_dir(world.root()).unwrap().count(), odd.len());
    for name in odd {
        assert_eq!(text(world.at(OsStr::from_bytes(&[name, b"2"].concat()))), "changed");
    }
}

fn all_types(dir: &Path) {
    put(dir.join("file"), "x", 0o644, 0, 0);
    symlink("file", dir.join("link")).unwrap();
    put_dir(dir.join("dir"), 0o755, 0, 0);
    let make = |name: &str, kind, device| mknodat(CWD, dir.join(name), kind, 0o600.into(), device).unwrap();
    make("fifo", FileType::Fifo, 0);
    make("null", FileType::CharacterDevice, makedev(1, 3));
    make("zero", FileType::CharacterDevice, makedev(1, 5));
    make("disk", FileType::BlockDevice, makedev(7, 300));
    make("made-socket", FileType::Socket, 0);
}

fn all_types_work(dir: &Path) {
    let kind = |name: &str| stat(dir.join(name)).file_type();
    assert!(kind("link").is_symlink() && kind("fifo").is_fifo() && kind("made-socket").is_socket());
    assert!(kind("disk").is_block_device() && stat(dir.join("disk")).rdev() == makedev(7, 300));
    let writer = fork(|| fs::write(dir.join("fifo"), "through the pipe").unwrap());
    assert_eq!(text(dir.join("fifo")), "through the pipe");
    assert!(writer.join());
    let mut null = File::options().read(true).write(true).open(dir.join("null")).unwrap();
    null.write_all(b"away").unwrap();
    assert_eq!(null.read(&mut [0; 9]).unwrap(), 0);
    let mut zeros = [1; 9];
    File::open(dir.join("zero")).unwrap().read_exact(&mut zeros).unwrap();
    assert_eq!(zeros, [0; 9]);
    // Copied up they are the same still.
    for name in ["fifo", "null", "disk", "made-socket"] {
        let before = (kind(name), stat(dir.join(name)).rdev());
        chmod(dir.join(name), 0o640);
        chown(dir.join(name), 1, 2);
        assert_eq!((kind(name), stat(dir.join(name)).rdev(), mode(dir.join(name))), (before.0, before.1, 0o640));
    }
    let listener = UnixListener::bind(dir.join("socket")).unwrap();
    UnixStream::connect(dir.join("socket")).unwrap().write_all(b"hello").unwrap();
    let mut heard = String::new();
    listener.accept().unwrap().0.read_to_string(&mut heard).unwrap();
    assert_eq!(heard, "hello");
}

#[test]
fn all_file_types_work() {
    let world = world!(all_types);
    all_types_work(&world.root());
    fs::create_dir(world.at("new")).unwrap();
    all_types(&world.at("new"));
    all_types_work(&world.at("new"));
}

#[test]
fn a_device_0_0_is_a_device_or_refused_but_hides_nothing() {
    let mut world = world!(|l| put(l.join("lower"), "x", 0o644, 0, 0));
    let make = |name: &str| mknodat(CWD, world.at(name), FileType::CharacterDevice, 0o600.into(), 0);
    assert_eq!(make("lower").errno(), Errno::EXIST);
    let made = make("new");
    assert!(matches!(made, Ok(()) | Err(Errno::PERM | Errno::INVAL | Errno::OPNOTSUPP)), "{made:?}");
    let check = |world: &World| {
        assert_eq!(text(world.at("lower")), "x");
        assert_eq!(fs::symlink_metadata(world.at("new")).is_ok(), made.is_ok());
        assert_eq!(names(world.root()).contains(&"new".to_string()), made.is_ok());
    };
    check(&world);
    world.remount();
    check(&world);
}

#[test]
fn a_name_like_a_whiteout_hides_nothing() {
    let mut world = world!(|l| {
        put(l.join("f"), "x", 0o644, 0, 0);
        put_dir(l.join("d"), 0o755, 0, 0);
        put(l.join("d/in"), "in", 0o644, 0, 0);
    });
    let made = [".wh.f", "d/.wh..wh..opq", "d/.wh.in"].map(|name| fs::write(world.at(name), "").is_ok());
    let renamed = fs::write(world.at("g"), "").and_then(|()| fs::rename(world.at("g"), world.at("d/.wh.in"))).is_ok();
    for _ in 0..2 {
        assert_eq!([text(world.at("f")), text(world.at("d/in"))], ["x", "in"], "made {made:?}, renamed {renamed}");
        let shown = names(world.at("d"));
        assert!(shown.contains(&"in".to_string()));
        assert_eq!(shown.contains(&".wh..wh..opq".to_string()), made[1], "{shown:?}");
        assert_eq!(shown.contains(&".wh.in".to_string()), made[2] || renamed, "{shown:?}");
        world.remount();
    }
}

/// All names of a directory with the position after each, as readdir and telldir give them.
fn listing(fd: &File) -> Vec<(String, u64)> {
    let mut space = [MaybeUninit::uninit(); 4096];
    let mut entries = RawDir::new(fd, &mut space);
    let mut found = Vec::new();
    while let Some(entry) = entries.next() {
        let entry = entry.unwrap();
        found.push((entry.file_name().to_str().unwrap().to_owned(), entry.next_entry_cookie()));
    }
    found
}

fn many(dir: &Path, prefix: &str, count: usize) {
    for n in 0..count {
        File::create(dir.join(format!("{prefix}{n:05}"))).unwrap();
    }
}

#[test]
fn seekdir_goes_on_where_telldir_was() {
    let world = world!(|l| {
        fs::create_dir(l.join("d")).unwrap();
        many(&l.join("d"), "lower", 700);
    });
    many(&world.at("d"), "upper", 700);
    let dir = File::open(world.at("d")).unwrap();
    let all = listing(&dir);
    assert_eq!(all.len(), 1402, "with . and ..");
    assert_eq!(all.iter().map(|e| &e.0).collect::<HashSet<_>>().len(), 1402, "none twice");
    for at in [0, 1, 2, 3, 100, 701, 1000, 1400, 1401] {
        rustix::fs::seek(&dir, SeekFrom::Start(all[at].1)).unwrap();
        assert_eq!(listing(&dir), all[at + 1..], "after number {at}");
    }
    // Names that go leave the positions of the others as they are.
    for (name, _) in all.iter().skip(10).step_by(3) {
        fs::remove_file(world.at("d").join(name)).unwrap();
    }
    rustix::fs::seek(&dir, SeekFrom::Start(all[500].1)).unwrap();
    let rest: HashSet<_> = listing(&dir).into_iter().map(|e| e.0).collect();
    let expected = (501..1402).filter(|n| *n < 10 || (n - 10) % 3 != 0).map(|n| all[n].0.clone());
    // Names that went may still be listed, as the kernel's caches of directories do, but none that stayed may be missing.
    let expected: HashSet<_> = expected.collect();
    assert_eq!(expected.difference(&rest).count(), 0, "names that stayed and are not listed");
}

#[test]
fn a_directory_of_10000_is_emptied_while_it_is_read() {
    let world = world!(|l| {
        fs::create_dir(l.join("d")).unwrap();
        many(&l.join("d"), "lower", 5000);
    });
    let d = world.at("d");
    many(&d, "upper", 5000);
    let mut seen = HashSet::new();
    for entry in Dir::new(File::open(&d).unwrap()).unwrap() {
        let name = entry.unwrap().file_name().to_str().unwrap().to_owned();
        if !name.starts_with('.') {
            fs::remove_file(d.join(&name)).unwrap();
            assert!(seen.insert(name), "twice");
        }
    }
    assert_eq!(seen.len(), 10_000);
    assert!(names(&d).is_empty());
    fs::remove_dir(&d).unwrap();
}

#[test]
fn what_stays_is_listed_once_while_other_names_come_and_go() {
    let world = world!(|l| {
        fs::create_dir(l.join("d")).unwrap();
        many(&l.join("d"), "stays-lower", 1000);
        many(&l.join("d"), "goes-lower", 1000);
    });
    let d = world.at("d");
    many(&d, "stays-upper", 1000);
    let mut stays = Vec::new();
    for (n, entry) in Dir::new(File::open(&d).unwrap()).unwrap().enumerate() {
        let name = entry.unwrap().file_name().to_str().unwrap().to_owned();
        if n < 1000 {
            fs::remove_file(d.join(format!("goes-lower{n:05}"))).unwrap();
            fs::write(d.join(format!("comes{n:05}")), "").unwrap();
        }
        if name.starts_with("stays") {
            stays.push(name);
        }
    }
    stays.sort();
    let mut expected: Vec<_> = names(&d);
    expected.retain(|name| name.starts_with("stays"));
    assert_eq!(stays.len(), 2000);
    assert_eq!(stays, expected);
}

#[test]
fn rewinddir_shows_what_is_new() {
    let world = world!(|l| fs::create_dir(l.join("d")).unwrap());
    let dir = File::open(world.at("d")).unwrap();
    assert_eq!(listing(&dir).len(), 2);
    fs::write(world.at("d/new"), "").unwrap();
    rustix::fs::seek(&dir, SeekFrom::Start(0)).unwrap();
    assert!(listing(&dir).iter().any(|e| e.0 == "new"));
    fs::remove_file(world.at("d/new")).unwrap();
    rustix::fs::seek(&dir, SeekFrom::Start(0)).unwrap();
    assert_eq!(listing(&dir).len(), 2);
}

#[test]
fn listings_agree_with_stat() {
    let world = world!(|l| {
        put_dir(l.join("sub"), 0o755, 0, 0);
        all_types(&l.join("sub"));
    });
    fs::write(world.at("sub/upper"), "").unwrap();
    fs::write(world.at("sub/file"), "copied up").unwrap();
    for dir in [world.at("sub"), world.root()] {
        for entry in Dir::new(File::open(&dir).unwrap()).unwrap() {
            let entry = entry.unwrap();
            let name = entry.file_name().to_str().unwrap();
            let meta = stat(dir.join(name));
            // The parent of the mount's root lies outside.
            if dir != world.root() || name != ".." {
                assert_eq!(entry.ino(), meta.ino(), "{name}");
            }
            let mode = rustix::fs::FileType::from_raw_mode(meta.mode());
            assert_eq!(entry.file_type(), mode, "{name}");
        }
    }
}

#[test]
fn removed_directories_are_gone_and_made_again_empty() {
    let mut world = world!(|l| {
        fs::create_dir_all(l.join("d/e/f")).unwrap();
        fs::write(l.join("d/e/file"), "lower").unwrap();
    });
    assert_eq!(fs::remove_dir(world.at("d")).errno(), Errno::NOTEMPTY);
    fs::remove_dir_all(world.at("d/e")).unwrap();
    assert!(names(world.at("d")).is_empty());
    fs::create_dir(world.at("d/e")).unwrap();
    world.remount();
    assert!(names(world.at("d/e")).is_empty());
    fs::remove_dir(world.at("d/e")).unwrap();
    fs::write(world.at("d/e"), "now a file").unwrap();
    fs::remove_dir_all(world.at("d")).unwrap();
    std::os::unix::fs::symlink("e", world.at("d")).unwrap();
    world.remount();
    assert_eq!(names(world.root()), ["d"]);
    assert!(stat(world.at("d")).file_type().is_symlink());
    assert_eq!(rustix::fs::open(world.at("d"), OFlags::NOFOLLOW, 0.into()).errno(), Errno::LOOP);
}

#[test]
fn symlinks_are_followed_to_the_end_and_loops_refused() {
    let world = world!(|l| {
        fs::create_dir(l.join("dir")).unwrap();
        fs::write(l.join("dir/file"), "found").unwrap();
        symlink("dir", l.join("s0")).unwrap();
        (1..30).for_each(|n| symlink(format!("s{}", n - 1), l.join(format!("s{n}"))).unwrap());
        symlink("loop2", l.join("loop")).unwrap();
        symlink("loop", l.join("loop2")).unwrap();
    });
    assert_eq!(text(world.at("s29/file")), "found");
    fs::write(world.at("s29/new"), "made").unwrap();
    assert_eq!(text(world.at("dir/new")), "made");
    assert_eq!(File::open(world.at("loop")).errno(), Errno::LOOP);
    fs::remove_file(world.at("s0")).unwrap();
    assert_eq!(File::open(world.at("s29/file")).errno(), Errno::NOENT);
    assert!(world.at("dir/file").exists());
}
