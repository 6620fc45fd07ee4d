//! Extended attributes.

use super::{sys::xattr_sizes, world::*};
use rustix::{
    fs::{FileType, XattrFlags, getxattr, lgetxattr, listxattr, mknodat, setxattr},
    io::Errno,
};
use std::{fs, os::unix::fs::symlink, path::Path};

fn list(path: &Path) -> Vec<String> {
    let mut names: Vec<_> = xattr::list(path).unwrap().map(|n| n.into_string().unwrap()).collect();
    names.sort();
    names
}

fn value(path: &Path, name: &str) -> Option<Vec<u8>> {
    xattr::get(path, name).unwrap()
}

#[test]
fn xattrs_of_every_namespace_on_every_type_survive_copy_up() {
    let names = ["security.capability2", "trusted.own", "user.own"];
    let mut world = world!(|l| {
        put(l.join("file"), "x", 0o644, 0, 0);
        put_dir(l.join("dir"), 0o755, 0, 0);
        for name in names {
            xattr::set(l.join("file"), name, b"lower").unwrap();
            xattr::set(l.join("dir"), name, b"lower").unwrap();
        }
        symlink("file", l.join("link")).unwrap();
        xattr::set(l.join("link"), "trusted.own", b"of the link").unwrap();
        mknodat(rustix::fs::CWD, l.join("fifo"), FileType::Fifo, 0o644.into(), 0).unwrap();
        xattr::set(l.join("fifo"), "trusted.own", b"of the fifo").unwrap();
    });
    for name in ["file", "dir"] {
        let path = world.at(name);
        assert_eq!(list(&path), names);
        xattr::set(&path, "user.own", b"changed").unwrap();
        xattr::set(&path, "trusted.new", b"").unwrap();
        xattr::remove(&path, "security.capability2").unwrap();
    }
    for (name, own) in [("link", &b"of the link"[..]), ("fifo", b"of the fifo")] {
        assert_eq!(value(&world.at(name), "trusted.own").unwrap(), own);
        chown(world.at(name), 1, 1);
        assert_eq!(value(&world.at(name), "trusted.own").unwrap(), own, "{name} after copy-up");
        xattr::set(world.at(name), "trusted.own", b"changed").unwrap();
        assert_eq!(xattr::set(world.at(name), "user.x", b"").errno(), Errno::PERM, "no user xattrs on a {name}");
    }
    world.remount();
    for name in ["file", "dir"] {
        let path = world.at(name);
        assert_eq!(list(&path), ["trusted.new", "trusted.own", "user.own"], "{name}");
        assert_eq!(value(&path, "user.own").unwrap(), b"changed");
        assert_eq!(value(&path, "trusted.own").unwrap(), b"lower");
        assert_eq!(value(&path, "trusted.new").unwrap(), b"");
        assert_eq!(value(&path, "security.capability2"), None);
    }
    assert_eq!(value(&world.at("link"), "trusted.own").unwrap(), b"changed");
}

#[test]
fn create_replace_and_missing_ones() {
    let world = world!(|l| {
        put(l.join("f"), "x", 0o644, 0, 0);
        xattr::set(l.join("f"), "user.old", b"1").unwrap();
    });
    let f = world.at("f");
    assert_eq!(setxattr(&f, "user.old", b"2", XattrFlags::CREATE).errno(), Errno::EXIST);
    assert_eq!(setxattr(&f, "user.new", b"2", XattrFlags::REPLACE).errno(), Errno::NODATA);
    assert_eq!(value(&f, "user.old").unwrap(), b"1");
    setxattr(&f, "user.old", b"2", XattrFlags::REPLACE).unwrap();
    setxattr(&f, "user.new", b"3", XattrFlags::CREATE).unwrap();
    assert_eq!([value(&f, "user.old").unwrap(), value(&f, "user.new").unwrap()], [b"2", b"3"]);
    xattr::remove(&f, "user.old").unwrap();
    assert_eq!(xattr::remove(&f, "user.old").errno(), Errno::NODATA);
    assert_eq!(getxattr(&f, "user.old", &mut [0; 9][..]).errno(), Errno::NODATA);
    assert_eq!(getxattr(world.at("missing"), "user.old", &mut [0; 9][..]).errno(), Errno::NOENT);
    assert_eq!(setxattr(&f, "nonsense.x", b"", XattrFlags::empty()).errno(), Errno::OPNOTSUPP);
}

#[test]
fn short_buffers_are_refused_and_empty_ones_ask_for_the_size() {
    let world = world!(|l| {
        put(l.join("f"), "x", 0o644, 0, 0);
        xattr::set(l.join("f"), "user.ten", b"0123456789").unwrap();
    });
    let f = world.at("f");
    assert_eq!(xattr_sizes(&f, c"user.ten"), (10, "user.ten\0".len()));
    assert_eq!(getxattr(&f, "user.ten", &mut [0; 9][..]).errno(), Errno::RANGE);
    assert_eq!(getxattr(&f, "user.ten", &mut [0; 10][..]).unwrap(), 10);
    assert_eq!(lgetxattr(&f, "user.ten", &mut [0; 11][..]).unwrap(), 10);
    assert_eq!(listxattr(&f, &mut [0; 5][..]).errno(), Errno::RANGE);
    assert_eq!(listxattr(&f, &mut [0; 9][..]).unwrap(), 9);
    let longest = format!("user.{}", "n".repeat(250));
    xattr::set(&f, &longest, b"x").unwrap();
    assert_eq!(value(&f, &longest).unwrap(), b"x");
    assert_eq!(xattr::set(&f, longest + "n", b"x").errno(), Errno::RANGE);
}

#[test]
fn values_are_as_large_as_the_upper_filesystem_takes() {
    let on_tmpfs = Setup { upper_mib: Some(16), ..Setup::default() };
    for setup in [Setup::default(), on_tmpfs] {
        let world = world!(setup, &[&|l: &Path| put(l.join("f"), "x", 0o644, 0, 0)]);
        let scratch = world.upper().with_file_name("scratch");
        fs::write(&scratch, "").unwrap();
        for size in [1, 1000, 3000, 4000, 20_000, 65_536, 65_537, 200_000] {
            let data: Vec<_> = (0..size).map(|i| (i % 251) as u8).collect();
            let set = |path: &Path, data: &[u8]| xattr::set(path, "user.big", data).map_err(|e| e.raw_os_error());
            // What the upper's filesystem says of a file as empty: its answer is ours.
            let expected = set(&scratch, &data);
            assert_eq!(set(&world.at("f"), &data), expected, "{size} bytes, tmpfs: {}", setup.upper_mib.is_some());
            if expected.is_ok() {
                assert!(value(&world.at("f"), "user.big").unwrap() == data);
            }
        }
        xattr::remove(&scratch, "user.big").unwrap();
        xattr::remove(world.at("f"), "user.big").unwrap();
    }
}

#[test]
fn many_xattrs_are_listed_all() {
    let world =
        world!(Setup { upper_mib: Some(16), ..Setup::default() }, &[&|l: &Path| put(l.join("f"), "x", 0o644, 0, 0)]);
    let names: Vec<_> = (0..240).map(|n| format!("user.{}{n:03}", "n".repeat(200))).collect();
    for name in &names {
        xattr::set(world.at("f"), name, name.as_bytes()).unwrap();
    }
    assert_eq!(list(&world.at("f")), names);
    assert!(names.iter().all(|name| value(&world.at("f"), name).unwrap() == name.as_bytes()));
}

#[test]
fn trusted_xattrs_are_for_privileged_eyes() {
    let world = world!(|l| {
        put(l.join("f"), "x", 0o666, 0, 0);
        xattr::set(l.join("f"), "trusted.own", b"1").unwrap();
        xattr::set(l.join("f"), "user.own", b"1").unwrap();
    });
    let f = world.at("f");
    as_user(1000, 1000, &[], || {
        assert_eq!(list(&f), ["user.own"]);
        assert_eq!(value(&f, "trusted.own"), None);
        assert_eq!(xattr::set(&f, "trusted.own", b"2").errno(), Errno::PERM);
        xattr::set(&f, "user.own", b"2").unwrap();
    });
    assert_eq!(value(&f, "trusted.own").unwrap(), b"1");
    chmod(&f, 0o600);
    as_user(1000, 1000, &[], || assert!(xattr::get(&f, "user.own").is_err()));
}

/// Names that mean something to overlayfs or to a program that stacks layers.
const PRIVATE: [&str; 15] = [
    "trusted.overlay.opaque",
    "trusted.overlay.redirect",
    "trusted.overlay.metacopy",
    "trusted.overlay.whiteout",
    "trusted.overlay.origin",
    "trusted.overlay.vfs.extent",
    "trusted.overlay.vfs.ino",
    "user.overlay.opaque",
    "user.overlay.redirect",
    "user.overlay.metacopy",
    "user.overlay.whiteout",
    "user.overlay.vfs.extent",
    "user.overlay.vfs.ino",
    "user.fuseoverlayfs.opaque",
    "user.fuseoverlayfs.origin",
];

fn with_private_names(l: &Path) {
    for dir in ["dir", "other", "moved"] {
        put_dir(l.join(dir), 0o755, 0, 0);
        put(l.join(dir).join("in"), dir, 0o644, 0, 0);
    }
    put(l.join("file"), "some content", 0o644, 0, 0);
    put(l.join("empty"), "", 0o644, 0, 0);
}

#[test]
fn what_a_container_sets_of_the_unions_own_xattrs_changes_nothing_it_shows() {
    let mut world = world!(with_private_names);
    fs::rename(world.at("moved"), world.at("renamed")).unwrap();
    fs::write(world.at("upper"), "upper content").unwrap();
    let inodes = |w: &World| {
        ["dir", "renamed", "file", "empty", "upper"].map(|name| std::os::unix::fs::MetadataExt::ino(&stat(w.at(name))))
    };
    // Copied up first, then the numbers are final even where a copy-up changes them.
    for name in ["dir", "renamed", "file", "empty", "upper"] {
        chmod(world.at(name), 0o755);
    }
    world.remount();
    let before = inodes(&world);
    for name in PRIVATE {
        for path in ["dir", "renamed", "file", "empty", "upper"].map(|name| world.at(name)) {
            for value in [&b"y"[..], b"x", b"/other", b"\0\0\0\0\0\0\0\x09", b""] {
                // It may be refused, or kept under another name: but it must not be believed.
                let _ = xattr::set(&path, name, value);
            }
        }
    }
    for _ in 0..2 {
        assert_eq!(names(world.root()), ["dir", "empty", "file", "other", "renamed", "upper"]);
        let texts = ["dir/in", "renamed/in", "other/in", "file", "empty", "upper"];
        let texts = texts.map(|name| fs::read_to_string(world.at(name)).unwrap());
        assert_eq!(texts, ["dir", "moved", "other", "some content", "", "upper content"]);
        assert_eq!(names(world.at("dir")), ["in"]);
        if world.is_union() {
            assert_eq!(inodes(&world), before);
        }
        world.remount();
    }
    fs::write(world.at("dir/new"), "x").unwrap();
    fs::rename(world.at("dir"), world.at("dir2")).unwrap();
    world.remount();
    assert_eq!(names(world.at("dir2")), ["in", "new"]);
}

#[test]
fn what_a_container_removes_of_the_unions_own_xattrs_changes_nothing_it_shows() {
    let mut world = world!(with_private_names);
    fs::remove_dir_all(world.at("dir")).unwrap();
    fs::create_dir(world.at("dir")).unwrap();
    fs::rename(world.at("moved"), world.at("renamed")).unwrap();
    let file = fs::File::options().write(true).open(world.at("file")).unwrap();
    rustix::io::pwrite(&file, b"SOME", 0).unwrap();
    drop(file);
    for name in PRIVATE {
        for path in ["dir", "renamed", "file"].map(|name| world.at(name)) {
            let _ = xattr::remove(path, name);
        }
    }
    for _ in 0..2 {
        assert_eq!(names(world.root()), ["dir", "empty", "file", "other", "renamed"]);
        assert!(names(world.at("dir")).is_empty());
        assert_eq!(fs::read_to_string(world.at("renamed/in")).unwrap(), "moved");
        assert_eq!(fs::read_to_string(world.at("file")).unwrap(), "SOME content");
        world.remount();
    }
}

#[test]
fn the_unions_own_xattrs_are_not_listed() {
    let world = world!(with_private_names);
    fs::remove_dir_all(world.at("dir")).unwrap();
    fs::create_dir(world.at("dir")).unwrap();
    fs::rename(world.at("moved"), world.at("renamed")).unwrap();
    fs::write(world.at("other/in"), "copied up").unwrap();
    chmod(world.at("file"), 0o600);
    for name in ["", "dir", "renamed", "other", "other/in", "file"] {
        assert_eq!(list(&world.at(name)), [""; 0], "{name}");
        for private in PRIVATE {
            assert!(!matches!(xattr::get(world.at(name), private), Ok(Some(_))), "{name}: {private} can be read");
        }
    }
}
