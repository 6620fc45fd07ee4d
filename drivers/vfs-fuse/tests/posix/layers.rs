//! What a plain directory does by itself and a union must work for: renamed directories, hard links and inode numbers over
//! copy-up and remount, changes that copy no data.

use super::{files::pattern, world::*};
use rustix::{
    fs::{CWD, FallocateFlags, FileType, OFlags, mknodat},
    io::{Errno, pwrite},
};
use std::{
    collections::HashMap,
    fs::{self, File, OpenOptions},
    os::unix::fs::{MetadataExt, symlink},
    path::Path,
};

fn text(path: impl AsRef<Path>) -> String {
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.as_ref().display()))
}

fn overwrite(path: &Path, bytes: &[u8]) {
    pwrite(OpenOptions::new().write(true).open(path).unwrap(), bytes, 0).unwrap();
}

/// A deep directory in both layers, whose lower one also has files of its own.
fn deep_layers() -> [fn(&Path); 2] {
    let upper_of_two = |l: &Path| {
        fs::create_dir_all(l.join("a/b/c")).unwrap();
        fs::write(l.join("a/b/top"), "top").unwrap();
        fs::write(l.join("a/b/both"), "from the top").unwrap();
    };
    let lower_of_two = |l: &Path| {
        fs::create_dir_all(l.join("a/b/c/d")).unwrap();
        fs::create_dir_all(l.join("empty")).unwrap();
        fs::create_dir_all(l.join("a/b/bottom-dir")).unwrap();
        fs::write(l.join("a/b/both"), "hidden").unwrap();
        fs::write(l.join("a/b/c/d/leaf"), "leaf").unwrap();
    };
    [upper_of_two, lower_of_two]
}

fn deep_tree_is_at(world: &World, path: &str) {
    assert_eq!(names(world.at(path)), ["b"], "{path}");
    assert_eq!(names(world.at(path).join("b")), ["both", "bottom-dir", "c", "top"], "{path}");
    assert_eq!(text(world.at(path).join("b/both")), "from the top");
    assert_eq!(text(world.at(path).join("b/c/d/leaf")), "leaf");
}

#[test]
fn directories_of_lower_layers_are_renamed_and_back() {
    let [one, two] = deep_layers();
    let mut world = world!(Setup::default(), &[&one, &two]);
    let mut at = "a";
    for to in ["x", "empty", "x", "a"] {
        fs::rename(world.at(at), world.at(to)).unwrap();
        for _ in 0..2 {
            deep_tree_is_at(&world, to);
            assert!(!world.at(at).exists(), "{at} after its rename to {to}");
            world.remount();
        }
        at = to;
    }
    assert_eq!(fs::rename(world.at("a"), world.at("a/b/c/a")).errno(), Errno::INVAL);
    assert_eq!(names(world.root()), ["a"]);
}

#[test]
fn directories_below_a_renamed_one_are_renamed_again() {
    let [one, two] = deep_layers();
    let mut world = world!(Setup::default(), &[&one, &two]);
    fs::rename(world.at("a"), world.at("x")).unwrap();
    fs::rename(world.at("x/b/c"), world.at("c-moved")).unwrap();
    fs::rename(world.at("x/b"), world.at("c-moved/b")).unwrap();
    world.remount();
    assert_eq!(names(world.at("c-moved")), ["b", "d"]);
    assert_eq!(text(world.at("c-moved/d/leaf")), "leaf");
    assert_eq!(names(world.at("c-moved/b")), ["both", "bottom-dir", "top"]);
    assert!(names(world.at("x")).is_empty());
    fs::remove_dir_all(world.at("c-moved/d")).unwrap();
    fs::rename(world.at("c-moved"), world.at("a")).unwrap();
    world.remount();
    assert_eq!(names(world.at("a")), ["b"]);
    assert_eq!(names(world.at("a/b")), ["both", "bottom-dir", "top"]);
}

#[test]
fn a_renamed_directory_leaves_its_name_free() {
    let [one, two] = deep_layers();
    let mut world = world!(Setup::default(), &[&one, &two]);
    fs::rename(world.at("a"), world.at("x")).unwrap();
    fs::create_dir(world.at("a")).unwrap();
    fs::write(world.at("a/new"), "new").unwrap();
    fs::remove_file(world.at("x/b/both")).unwrap();
    fs::write(world.at("x/b/c/d/leaf"), "changed").unwrap();
    for _ in 0..2 {
        assert_eq!(names(world.at("a")), ["new"]);
        assert_eq!(names(world.at("x/b")), ["bottom-dir", "c", "top"]);
        assert_eq!(text(world.at("x/b/c/d/leaf")), "changed");
        world.remount();
    }
    // The lower directory's whiteouts and its new name go with it.
    fs::remove_dir_all(world.at("x")).unwrap();
    fs::create_dir(world.at("x")).unwrap();
    world.remount();
    assert!(names(world.at("x")).is_empty());
}

#[test]
fn a_directory_open_while_it_is_renamed_stays_itself() {
    let [one, two] = deep_layers();
    let world = world!(Setup::default(), &[&one, &two]);
    let dir = File::open(world.at("a/b")).unwrap();
    fs::rename(world.at("a"), world.at("x")).unwrap();
    let open = |name: &str, flags| rustix::fs::openat(&dir, name, flags, 0o644.into());
    open("both", OFlags::RDONLY).unwrap();
    open("made", OFlags::CREATE | OFlags::WRONLY).unwrap();
    assert!(world.at("x/b/made").exists());
    assert_eq!(dir.metadata().unwrap().ino(), stat(world.at("x/b")).ino());
}

fn linked(l: &Path) {
    fs::create_dir_all(l.join("dir/deep")).unwrap();
    put(l.join("one"), pattern(200_000), 0o644, 0, 0);
    fs::hard_link(l.join("one"), l.join("two")).unwrap();
    fs::hard_link(l.join("one"), l.join("dir/deep/three")).unwrap();
}

const NAMES: [&str; 3] = ["one", "two", "dir/deep/three"];

fn is_one_file(world: &World, names: &[&str]) {
    let first = stat(world.at(names[0]));
    let content = fs::read(world.at(names[0])).unwrap();
    for name in names {
        let meta = stat(world.at(name));
        assert_eq!((meta.ino(), meta.nlink()), (first.ino(), names.len() as u64), "{name}");
        assert_eq!((meta.mode(), meta.uid(), meta.len()), (first.mode(), first.uid(), first.len()), "{name}");
        assert!(fs::read(world.at(name)).unwrap() == content, "{name} has another content than {}", names[0]);
    }
}

type Change<'a> = (&'a str, &'a dyn Fn(&Path));

#[test]
fn hard_links_stay_one_file_whichever_change_copies_it_up() {
    let changes: [Change; 6] = [
        ("write", &|p| overwrite(p, b"changed")),
        ("chmod", &|p| chmod(p, 0o600)),
        ("chown", &|p| chown(p, 7, 8)),
        ("truncate", &|p| File::options().write(true).open(p).unwrap().set_len(5000).unwrap()),
        ("setxattr", &|p| xattr::set(p, "user.x", b"y").unwrap()),
        ("link", &|p| {
            fs::hard_link(p, p.with_file_name("tmp")).and_then(|()| fs::remove_file(p.with_file_name("tmp"))).unwrap()
        }),
    ];
    for (what, change) in changes {
        let mut world = world!(linked);
        is_one_file(&world, &NAMES);
        // Names that the kernel has looked up, and one that it has not.
        world.remount();
        stat(world.at("one"));
        change(&world.at("two"));
        is_one_file(&world, &NAMES);
        let ino = stat(world.at("one")).ino();
        world.remount();
        is_one_file(&world, &NAMES);
        assert_eq!(stat(world.at("one")).ino(), ino, "{what}");
        overwrite(&world.at("dir/deep/three"), b"again");
        is_one_file(&world, &NAMES);
        assert_eq!(&fs::read(world.at("one")).unwrap()[..5], b"again");
    }
}

#[test]
fn hard_links_survive_unlink_rename_and_new_links() {
    let mut world = world!(linked);
    fs::remove_file(world.at("two")).unwrap();
    is_one_file(&world, &["one", "dir/deep/three"]);
    fs::rename(world.at("one"), world.at("dir/moved")).unwrap();
    fs::hard_link(world.at("dir/moved"), world.at("four")).unwrap();
    let now = ["dir/moved", "four", "dir/deep/three"];
    is_one_file(&world, &now);
    overwrite(&world.at("four"), b"by four");
    world.remount();
    is_one_file(&world, &now);
    assert_eq!(&fs::read(world.at("dir/deep/three")).unwrap()[..7], b"by four");
    for (n, name) in now.iter().enumerate() {
        fs::remove_file(world.at(name)).unwrap();
        if n < 2 {
            is_one_file(&world, &now[n + 1..]);
        }
    }
    assert_eq!(names(world.root()), ["dir"]);
}

#[test]
fn a_descriptor_of_one_name_sees_writes_through_another() {
    let world = world!(linked);
    let writer = OpenOptions::new().read(true).write(true).open(world.at("one")).unwrap();
    overwrite(&world.at("two"), b"by two");
    let mut seen = [0; 6];
    rustix::io::pread(&writer, &mut seen, 0).unwrap();
    assert_eq!(&seen, b"by two");
    pwrite(&writer, b"by one", 0).unwrap();
    assert_eq!(&fs::read(world.at("dir/deep/three")).unwrap()[..6], b"by one");
}

#[test]
fn links_of_another_layers_file_are_other_files() {
    // `two` of the top layer hides a name of the bottom's file, so that this one shows a name less.
    let top: Fill = &|l| fs::write(l.join("two"), "another").unwrap();
    let world = world!(Setup::default(), &[top, &linked]);
    overwrite(&world.at("one"), b"changed");
    assert_eq!(text(world.at("two")), "another");
    assert_eq!(&fs::read(world.at("dir/deep/three")).unwrap()[..7], b"changed");
    assert_eq!(stat(world.at("one")).ino(), stat(world.at("dir/deep/three")).ino());
}

#[test]
fn inode_numbers_are_constant_over_copy_up_rename_and_remount() {
    let fill = |l: &Path| {
        put(l.join("write"), pattern(100_000), 0o644, 0, 0);
        put(l.join("chmod"), "x", 0o644, 0, 0);
        put_dir(l.join("dir"), 0o755, 0, 0);
        put(l.join("dir/in"), "x", 0o644, 0, 0);
        symlink("x", l.join("link")).unwrap();
        mknodat(CWD, l.join("fifo"), FileType::Fifo, 0o644.into(), 0).unwrap();
    };
    let mut world = world!(fill);
    fs::write(world.at("upper"), "x").unwrap();
    let all = ["write", "chmod", "dir", "dir/in", "link", "fifo", "upper"];
    let numbers = |world: &World, prefix: &str| {
        all.map(|name| stat(world.at(name.replacen("dir", &format!("{prefix}dir"), 1))).ino())
    };
    let before = numbers(&world, "");
    let reader = File::open(world.at("write")).unwrap();
    let writer = OpenOptions::new().write(true).open(world.at("write")).unwrap();
    pwrite(&writer, b"x", 5).unwrap();
    chmod(world.at("chmod"), 0o600);
    chown(world.at("link"), 1, 1);
    chown(world.at("fifo"), 1, 1);
    fs::write(world.at("dir/in"), "y").unwrap();
    assert_eq!(numbers(&world, ""), before, "after copy-up");
    let open = [&reader, &writer].map(|file| file.metadata().unwrap().ino());
    assert_eq!(open, [before[0]; 2], "of the descriptors");
    drop((reader, writer));
    world.remount();
    assert_eq!(numbers(&world, ""), before, "after a remount");
    fs::rename(world.at("dir"), world.at("renamed-dir")).unwrap();
    assert_eq!(numbers(&world, "renamed-"), before, "after a rename");
    world.remount();
    assert_eq!(numbers(&world, "renamed-"), before, "after a rename and a remount");
}

#[test]
fn inode_numbers_are_unique_across_filesystems() {
    // Fresh tmpfs give their files the same numbers.
    let fills: Vec<_> = (0..4)
        .map(|n| {
            move |l: &Path| {
                put_dir(l.join(format!("dir{n}")), 0o755, 0, 0);
                (0..20).for_each(|i| put(l.join(format!("dir{n}/{i}")), "x", 0o644, 0, 0));
            }
        })
        .collect();
    let fills: Vec<Fill> = fills.iter().map(|f| f as Fill).collect();
    let setup = Setup { own_filesystems: true, upper_mib: Some(16), ..Setup::default() };
    let mut world = world!(setup, &fills);
    (0..20).for_each(|i| fs::write(world.at(format!("upper{i}")), "x").unwrap());
    let all = |world: &World| {
        let mut found = HashMap::new();
        for dir in [world.root()].into_iter().chain((0..4).map(|n| world.at(format!("dir{n}")))) {
            for name in names(&dir) {
                let meta = stat(dir.join(&name));
                let other = found.insert((meta.dev(), meta.ino()), dir.join(&name));
                assert_eq!(other, None, "the number of {}", dir.join(name).display());
            }
        }
        found
    };
    let before = all(&world);
    assert_eq!(before.len(), 104);
    world.remount();
    let numbers = |found: HashMap<(u64, u64), std::path::PathBuf>| -> HashMap<_, _> {
        found.into_iter().map(|((_, ino), path)| (path, ino)).collect()
    };
    assert_eq!(numbers(all(&world)), numbers(before));
}

#[test]
fn changes_of_attributes_copy_no_data() {
    const FILES: usize = 20;
    let fill = |l: &Path| {
        for n in 0..FILES {
            put(l.join(format!("f{n}")), pattern(1 << 20), 0o644, 0, 0);
        }
    };
    let mut world = world!(Setup { options: &["copy_up=extent"], ..Setup::default() }, &[&fill]);
    if !world.is_union() {
        return;
    }
    for n in 0..FILES {
        let path = world.at(format!("f{n}"));
        match n % 4 {
            0 => chown(&path, 1000, 1000),
            1 => chmod(&path, 0o600),
            2 => xattr::set(&path, "user.x", b"y").unwrap(),
            _ => File::options().read(true).open(&path).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap(),
        }
    }
    rustix::fs::syncfs(File::open(world.upper()).unwrap()).unwrap();
    let used: u64 = fs::read_dir(world.upper()).unwrap().map(|e| e.unwrap().metadata().unwrap().blocks() * 512).sum();
    assert!(used < FILES as u64 * 16 * 1024, "{used} bytes for the attributes of {FILES} files");
    for _ in 0..2 {
        for n in 0..FILES {
            let path = world.at(format!("f{n}"));
            assert!(fs::read(&path).unwrap() == pattern(1 << 20), "content of f{n}");
            assert_eq!(stat(&path).uid(), if n % 4 == 0 { 1000 } else { 0 });
        }
        world.remount();
    }
    // A small write costs little still.
    pwrite(OpenOptions::new().write(true).open(world.at("f0")).unwrap(), b"new", 500_000).unwrap();
    rustix::fs::syncfs(File::open(world.upper()).unwrap()).unwrap();
    assert!(stat(world.upper().join("f0")).blocks() * 512 < 64 * 1024);
    let mut model = pattern(1 << 20);
    model[500_000..500_003].copy_from_slice(b"new");
    world.remount();
    assert!(fs::read(world.at("f0")).unwrap() == model);
}

#[test]
fn lower_layers_are_never_changed() {
    let [one, two] = deep_layers();
    let mut world = world!(Setup::default(), &[&one, &two]);
    if !world.is_union() {
        return;
    }
    let snapshot = |world: &World| {
        let output = std::process::Command::new("find")
            .args([world.lower(0), world.lower(1)])
            .args(["-printf", "%p %y %m %n %U %G %s %T@ %C@ %i\n"])
            .output();
        String::from_utf8(output.unwrap().stdout).unwrap()
    };
    let before = snapshot(&world);
    assert!(before.lines().count() > 10);
    fs::rename(world.at("a/b/c"), world.at("c")).unwrap();
    chmod(world.at("a/b"), 0o700);
    overwrite(&world.at("c/d/leaf"), b"x");
    fs::remove_dir_all(world.at("a/b/bottom-dir")).unwrap();
    fs::hard_link(world.at("a/b/both"), world.at("link")).unwrap();
    xattr::set(world.at("empty"), "user.x", b"y").unwrap();
    world.remount();
    fs::remove_dir_all(world.at("a")).unwrap();
    assert_eq!(snapshot(&world), before);
}

#[test]
fn a_mount_without_upper_refuses_every_change() {
    let fill = |l: &Path| {
        put(l.join("f"), "x", 0o644, 0, 0);
        put_dir(l.join("d"), 0o755, 0, 0);
        symlink("f", l.join("s")).unwrap();
        xattr::set(l.join("f"), "user.x", b"y").unwrap();
    };
    let world = world!(Setup { readonly: true, ..Setup::default() }, &[&fill]);
    let (f, d, new) = (world.at("f"), world.at("d"), world.at("new"));
    let reader = File::open(&f).unwrap();
    let results = [
        ("open", OpenOptions::new().write(true).open(&f).errno()),
        ("append", OpenOptions::new().append(true).open(&f).errno()),
        ("create", File::create(&new).errno()),
        ("o_trunc", File::create(&f).errno()),
        ("truncate", super::sys::truncate(&f, 0).errno()),
        ("mkdir", fs::create_dir(&new).errno()),
        ("rmdir", fs::remove_dir(&d).errno()),
        ("unlink", fs::remove_file(&f).errno()),
        ("symlink", symlink("x", &new).errno()),
        ("link", fs::hard_link(&f, &new).errno()),
        ("rename", fs::rename(&f, &new).errno()),
        ("mknod", mknodat(CWD, &new, FileType::Fifo, 0o644.into(), 0).errno()),
        ("chmod", fs::set_permissions(&f, fs::metadata(&d).unwrap().permissions()).errno()),
        ("fchmod", reader.set_permissions(fs::metadata(&d).unwrap().permissions()).errno()),
        ("chown", std::os::unix::fs::lchown(world.at("s"), Some(1), None).errno()),
        ("utimes", reader.set_modified(std::time::UNIX_EPOCH).errno()),
        ("setxattr", xattr::set(&f, "user.x", b"z").errno()),
        ("removexattr", xattr::remove(&f, "user.x").errno()),
        ("tmpfile", rustix::fs::open(&d, OFlags::TMPFILE | OFlags::RDWR, 0o600.into()).errno()),
    ];
    for (what, errno) in results {
        let refused = errno == Errno::ROFS || what == "tmpfile" && errno == Errno::OPNOTSUPP;
        assert!(refused, "{what}: {errno}");
    }
    assert_eq!(rustix::fs::fallocate(&reader, FallocateFlags::empty(), 0, 10).errno(), Errno::BADF);
    assert_eq!(rustix::fs::access(&f, rustix::fs::Access::WRITE_OK).errno(), Errno::ROFS);
    assert_eq!(text(&f), "x");
    assert_eq!(text(world.at("s")), "x");
    assert_eq!(names(world.root()), ["d", "f", "s"]);
    let flags = rustix::fs::statvfs(world.root()).unwrap().f_flag;
    assert!(flags.contains(rustix::fs::StatVfsMountFlags::RDONLY), "df and mount say so too");
}

#[test]
fn statfs_is_the_upper_filesystems() {
    let setup = Setup { upper_mib: Some(24), ..Setup::default() };
    let world = world!(setup, &[&|_: &Path| {}]);
    fs::write(world.at("f"), vec![1; 5 << 20]).unwrap();
    let (shown, upper) = (rustix::fs::statvfs(world.root()).unwrap(), rustix::fs::statvfs(world.upper()).unwrap());
    assert_eq!(shown.f_blocks * shown.f_frsize, 24 << 20);
    assert_eq!((shown.f_bavail, shown.f_files, shown.f_ffree), (upper.f_bavail, upper.f_files, upper.f_ffree));
    assert_eq!(shown.f_namemax, 255);
    assert!(shown.f_bavail * shown.f_frsize <= 19 << 20);
}

#[test]
fn the_root_itself_is_changed() {
    let mut world = world!(|l| chmod(l, 0o711));
    let expected = if world.is_union() { 0o755 } else { 0o711 };
    assert_eq!(mode(world.root()), expected, "the upper's, where it exists");
    chmod(world.root(), 0o1777);
    chown(world.root(), 5, 6);
    xattr::set(world.root(), "user.x", b"y").unwrap();
    world.remount();
    let root = stat(world.root());
    assert_eq!((root.mode() & 0o7777, root.uid(), root.gid()), (0o1777, 5, 6));
    assert_eq!(xattr::get(world.root(), "user.x").unwrap().unwrap(), b"y");
}

#[test]
fn a_file_of_every_size_is_copied_up_whole() {
    let sizes = [0, 1, 4095, 4096, 4097, 65_536, 1_000_001];
    let fill = |l: &Path| {
        for size in sizes {
            fs::write(l.join(size.to_string()), pattern(size)).unwrap();
        }
    };
    for options in
        [&[][..], &["copy_up=extent"], &["copy_up=full"], &["passthrough=0"], &["copy_up=extent", "passthrough=0"]]
    {
        let mut world = world!(Setup { options, ..Setup::default() }, &[&fill]);
        for size in sizes {
            let mut file = OpenOptions::new().append(true).open(world.at(size.to_string())).unwrap();
            std::io::Write::write_all(&mut file, b"end").unwrap();
        }
        for _ in 0..2 {
            for size in sizes {
                let expected = [&pattern(size)[..], b"end"].concat();
                assert!(fs::read(world.at(size.to_string())).unwrap() == expected, "{size} bytes, {options:?}");
            }
            world.remount();
        }
    }
}
