//! Who may do what.

use super::{sys::*, world::*};
use rustix::{
    fs::{AtFlags, CWD, FileType, Mode, OFlags, Timespec, Timestamps, UTIME_NOW},
    io::Errno,
};
use std::{
    fs::{self, File, OpenOptions},
    io::{Read, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::Path,
};

fn open_write(path: &Path) -> std::io::Result<File> {
    OpenOptions::new().write(true).open(path)
}

#[test]
fn owner_group_and_supplementary_groups_decide_access() {
    let world = world!(|l| {
        put(l.join("f"), "secret", 0o640, 1000, 2000);
        put_dir(l.join("d"), 0o710, 1000, 2000);
        put(l.join("d/in"), "x", 0o644, 1000, 2000);
    });
    let (f, d) = (world.at("f"), world.at("d"));
    as_user(1000, 1000, &[], || assert!(open_write(&f).is_ok() && fs::read_dir(&d).is_ok()));
    for (gid, groups) in [(2000, &[][..]), (1001, &[7, 2000][..])] {
        as_user(1001, gid, groups, || {
            assert_eq!(fs::read(&f).unwrap(), b"secret");
            assert_eq!(open_write(&f).errno(), Errno::ACCESS);
            assert_eq!(fs::read(d.join("in")).unwrap(), b"x");
            assert_eq!(fs::read_dir(&d).errno(), Errno::ACCESS);
            assert_eq!(fs::write(d.join("new"), "").errno(), Errno::ACCESS);
        });
    }
    as_user(1001, 1001, &[2001], || {
        assert_eq!(fs::read(&f).errno(), Errno::ACCESS);
        assert_eq!(fs::metadata(d.join("in")).errno(), Errno::ACCESS);
    });
    chown(&f, 1000, 2001);
    as_user(1001, 1001, &[2001], || assert_eq!(fs::read(&f).unwrap(), b"secret"));
    as_user(1001, 2000, &[], || assert_eq!(fs::read(&f).errno(), Errno::ACCESS));
}

#[test]
fn new_files_belong_to_the_caller_and_obey_the_umask() {
    let world = world!(|l| put_dir(l.join("d"), 0o777, 0, 0));
    let d = world.at("d");
    as_user(1000, 2000, &[3000], || {
        with_umask(0o027, || {
            OpenOptions::new().write(true).create_new(true).mode(0o666).open(d.join("file")).unwrap();
            rustix::fs::mkdir(d.join("dir"), 0o777.into()).unwrap();
            rustix::fs::mknodat(CWD, d.join("fifo"), FileType::Fifo, 0o666.into(), 0).unwrap();
            std::os::unix::fs::symlink("file", d.join("link")).unwrap();
        })
    });
    for (name, bits) in [("file", 0o640), ("dir", 0o750), ("fifo", 0o640), ("link", 0o777)] {
        let stat = stat(d.join(name));
        assert_eq!((stat.mode() & 0o7777, stat.uid(), stat.gid()), (bits, 1000, 2000), "{name}");
    }
}

#[test]
fn only_the_owner_changes_attributes_and_gives_only_to_own_groups() {
    let world = world!(|l| put(l.join("f"), "x", 0o666, 1000, 1000));
    let f = world.at("f");
    as_user(1001, 1001, &[], || {
        assert_eq!(rustix::fs::chmod(&f, 0o777.into()).errno(), Errno::PERM);
        assert_eq!(std::os::unix::fs::lchown(&f, Some(1001), None).errno(), Errno::PERM);
        let time = Timespec { tv_sec: 5, tv_nsec: 0 };
        let set =
            |t| rustix::fs::utimensat(CWD, &f, &Timestamps { last_access: t, last_modification: t }, AtFlags::empty());
        assert_eq!(set(time).errno(), Errno::PERM);
        // Who may write may set the times to now.
        set(Timespec { tv_sec: 0, tv_nsec: UTIME_NOW }).unwrap();
        assert_eq!(xattr::set(&f, "security.selinux_test", b"").errno(), Errno::PERM);
    });
    as_user(1000, 1000, &[2000], || {
        assert_eq!(std::os::unix::fs::lchown(&f, None, Some(3000)).errno(), Errno::PERM);
        assert_eq!(std::os::unix::fs::lchown(&f, Some(1001), None).errno(), Errno::PERM);
        std::os::unix::fs::lchown(&f, None, Some(2000)).unwrap();
    });
    assert_eq!((stat(&f).uid(), stat(&f).gid()), (1000, 2000));
}

#[test]
fn in_a_sticky_directory_only_owners_remove() {
    let world = world!(|l| {
        put_dir(l.join("tmp"), 0o1777, 1002, 0);
        for name in ["a", "b", "c"] {
            put(l.join("tmp").join(name), name, 0o666, 1000, 1000);
        }
        put_dir(l.join("tmp/dir"), 0o777, 1000, 1000);
    });
    let tmp = world.at("tmp");
    as_user(1001, 1001, &[], || {
        assert_eq!(fs::remove_file(tmp.join("a")).errno(), Errno::PERM);
        assert_eq!(fs::remove_dir(tmp.join("dir")).errno(), Errno::PERM);
        assert_eq!(fs::rename(tmp.join("a"), tmp.join("z")).errno(), Errno::PERM);
        fs::write(tmp.join("mine"), "").unwrap();
        assert_eq!(fs::rename(tmp.join("mine"), tmp.join("a")).errno(), Errno::PERM);
        fs::write(tmp.join("a"), "but may be written").unwrap();
    });
    as_user(1000, 1000, &[], || {
        fs::remove_file(tmp.join("a")).unwrap();
        fs::rename(tmp.join("b"), tmp.join("y")).unwrap();
        fs::remove_dir(tmp.join("dir")).unwrap();
    });
    as_user(1002, 1002, &[], || fs::remove_file(tmp.join("c")).unwrap());
    assert_eq!(names(&tmp), ["mine", "y"]);
}

#[test]
fn setgid_directories_hand_down_their_group() {
    let world = world!(|l| put_dir(l.join("shared"), 0o2777, 0, 2000));
    let shared = world.at("shared");
    as_user(1000, 1000, &[], || {
        with_umask(0o022, || {
            fs::write(shared.join("file"), "").unwrap();
            fs::create_dir(shared.join("dir")).unwrap();
            fs::create_dir(shared.join("dir/dir")).unwrap();
            rustix::fs::mknodat(CWD, shared.join("fifo"), FileType::Fifo, 0o644.into(), 0).unwrap();
            std::os::unix::fs::symlink("x", shared.join("link")).unwrap();
            // Nobody makes a set-group-id program of a group he is not in.
            let flags = OFlags::CREATE | OFlags::WRONLY;
            rustix::fs::open(shared.join("sgid"), flags, Mode::from_raw_mode(0o2775)).unwrap();
        })
    });
    for (name, bits) in
        [("file", 0o644), ("dir", 0o2755), ("dir/dir", 0o2755), ("fifo", 0o644), ("link", 0o777), ("sgid", 0o755)]
    {
        let stat = stat(shared.join(name));
        assert_eq!(
            (stat.gid(), stat.mode() & 0o7777),
            (2000, bits),
            "{name}: gid {}, mode {:o}",
            stat.gid(),
            stat.mode()
        );
    }
    as_user(1000, 1000, &[], || chmod(shared.join("file"), 0o2755));
    assert_eq!(mode(shared.join("file")), 0o755, "chmod by one who is not in the group");
    as_user(1000, 1000, &[2000], || chmod(shared.join("file"), 0o2755));
    assert_eq!(mode(shared.join("file")), 0o2755);
}

fn set_id_files(l: &Path) {
    for name in ["write", "mapped", "truncate", "ftruncate", "o_trunc", "fallocate", "chown", "append", "copy"] {
        put(l.join(name), vec![b'x'; 9000], 0o6777, 1000, 1000);
    }
}

fn changes_take_set_ids_away(dir: &Path) {
    as_user(1001, 1001, &[], || {
        open_write(&dir.join("write")).unwrap().write_all(b"new").unwrap();
        let file = OpenOptions::new().read(true).write(true).open(dir.join("mapped")).unwrap();
        let map = Map::new(&file, 4096, true, true).unwrap();
        map.write(0, b"first");
        rustix::io::pwrite(&file, b"new", 5000).unwrap();
        truncate(&dir.join("truncate"), 10).unwrap();
        open_write(&dir.join("ftruncate")).unwrap().set_len(10).unwrap();
        OpenOptions::new().write(true).truncate(true).open(dir.join("o_trunc")).unwrap();
        let file = open_write(&dir.join("fallocate")).unwrap();
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, 20000).unwrap();
        OpenOptions::new().append(true).open(dir.join("append")).unwrap().write_all(b"new").unwrap();
        let (from, to) = (File::open(dir.join("write")).unwrap(), open_write(&dir.join("copy")).unwrap());
        assert_eq!(rustix::fs::copy_file_range(&from, None, &to, None, 100).unwrap(), 100);
    });
    // Even root's chown takes them away; chmod by the owner gives them back.
    chown(dir.join("chown"), 1000, 1001);
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        assert_eq!(mode(&path), 0o777, "{}: {:o}", path.display(), mode(&path));
    }
}

#[test]
fn changes_by_others_take_set_ids_away_from_lower_files() {
    let world = world!(set_id_files);
    changes_take_set_ids_away(&world.root());
}

#[test]
fn changes_by_others_take_set_ids_away_from_upper_files() {
    let world = world!(|_| {});
    set_id_files(&world.root());
    changes_take_set_ids_away(&world.root());
}

#[test]
fn writes_by_root_leave_set_ids() {
    let world = world!(|l| put(l.join("f"), "x", 0o6777, 0, 0));
    open_write(&world.at("f")).unwrap().write_all(b"new").unwrap();
    assert_eq!(mode(world.at("f")), 0o6777);
}

const CAPABILITY: &str = "security.capability";

fn capable(path: &Path) -> bool {
    xattr::get(path, CAPABILITY).unwrap().is_some()
}

fn files_with_capabilities(l: &Path) {
    // Version 2, effective; cap_net_raw permitted.
    let mut value = vec![1, 0, 0, 2, 0, 0x20, 0, 0];
    value.resize(20, 0);
    for name in ["kept", "write", "truncate", "chown", "o_trunc"] {
        put(l.join(name), "program", 0o777, 1000, 1000);
        xattr::set(l.join(name), CAPABILITY, &value).unwrap();
    }
}

fn changes_drop_capabilities(dir: &Path) {
    chmod(dir.join("kept"), 0o755);
    xattr::set(dir.join("kept"), "user.x", b"").unwrap();
    assert!(capable(&dir.join("kept")), "chmod and xattrs do not touch it");
    // Even root's changes.
    open_write(&dir.join("write")).unwrap().write_all(b"new").unwrap();
    truncate(&dir.join("truncate"), 2).unwrap();
    chown(dir.join("chown"), 1000, 1001);
    OpenOptions::new().write(true).truncate(true).open(dir.join("o_trunc")).unwrap();
    for name in ["write", "truncate", "chown", "o_trunc"] {
        assert!(!capable(&dir.join(name)), "{name}");
    }
}

#[test]
fn changes_drop_capabilities_of_lower_files() {
    let world = world!(files_with_capabilities);
    changes_drop_capabilities(&world.root());
}

#[test]
fn changes_drop_capabilities_of_upper_files() {
    let world = world!(|_| {});
    files_with_capabilities(&world.root());
    changes_drop_capabilities(&world.root());
}

const ACCESS: &str = "system.posix_acl_access";
const DEFAULT: &str = "system.posix_acl_default";

/// An ACL as the xattr has it: owner, users, group, mask, others.
fn acl(owner: u16, users: &[(u32, u16)], group: u16, mask: u16, others: u16) -> Vec<u8> {
    let mut bytes = 2u32.to_le_bytes().to_vec();
    let mut entry = |tag: u16, bits: u16, id: u32| {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(bits.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    };
    entry(1, owner, u32::MAX);
    users.iter().for_each(|(id, bits)| entry(2, *bits, *id));
    entry(4, group, u32::MAX);
    entry(0x10, mask, u32::MAX);
    entry(0x20, others, u32::MAX);
    bytes
}

fn can_read(path: &Path, uid: u32) -> bool {
    as_user(uid, uid, &[], || File::open(path).and_then(|mut f| f.read(&mut [0; 1])).is_ok())
}

fn can_write(path: &Path, uid: u32) -> bool {
    as_user(uid, uid, &[], || open_write(path).is_ok())
}

#[test]
fn acls_of_lower_files_are_enforced_and_survive_copy_up() {
    let world = world!(|l| {
        put(l.join("f"), "x", 0o600, 0, 0);
        xattr::set(l.join("f"), ACCESS, &acl(6, &[(1000, 4), (1001, 6)], 0, 6, 0)).unwrap();
    });
    let f = world.at("f");
    for copied_up in [false, true] {
        let can = [1000, 1001, 1002].map(|uid| (can_read(&f, uid), copied_up && can_write(&f, uid)));
        assert_eq!(can, [(true, false), (true, copied_up), (false, false)], "copied up: {copied_up}");
        open_write(&f).unwrap().write_all(b"y").unwrap();
    }
    assert_eq!(xattr::get(&f, ACCESS).unwrap().unwrap(), acl(6, &[(1000, 4), (1001, 6)], 0, 6, 0));
}

#[test]
fn chmod_sets_the_mask_of_an_acl() {
    let world = world!(|l| put(l.join("f"), "x", 0o600, 0, 0));
    let f = world.at("f");
    xattr::set(&f, ACCESS, &acl(6, &[(1000, 6)], 4, 6, 0)).unwrap();
    assert_eq!(mode(&f), 0o660, "the group bits are the mask");
    assert!(can_write(&f, 1000));
    chmod(&f, 0o640);
    assert!(can_read(&f, 1000) && !can_write(&f, 1000));
    assert_eq!(xattr::get(&f, ACCESS).unwrap().unwrap(), acl(6, &[(1000, 6)], 4, 4, 0));
    chmod(&f, 0o600);
    assert!(!can_read(&f, 1000));
    xattr::remove(&f, ACCESS).unwrap();
    assert!(xattr::get(&f, ACCESS).unwrap().is_none());
    assert!(!xattr::list(&f).unwrap().any(|name| name == ACCESS));
}

#[test]
fn default_acls_are_inherited_and_replace_the_umask() {
    let world = world!(|l| {
        put_dir(l.join("d"), 0o777, 0, 0);
        xattr::set(l.join("d"), DEFAULT, &acl(7, &[(1000, 7)], 5, 7, 0)).unwrap();
        put_dir(l.join("plain"), 0o777, 0, 0);
    });
    let (d, plain) = (world.at("d"), world.at("plain"));
    with_umask(0o077, || {
        for dir in [&d, &plain] {
            OpenOptions::new().write(true).create_new(true).mode(0o664).open(dir.join("file")).unwrap();
            fs::create_dir(dir.join("dir")).unwrap();
            rustix::fs::mknodat(CWD, dir.join("fifo"), FileType::Fifo, 0o664.into(), 0).unwrap();
        }
    });
    assert_eq!([mode(plain.join("file")), mode(plain.join("dir")), mode(plain.join("fifo"))], [0o600, 0o700, 0o600]);
    assert_eq!([mode(d.join("file")), mode(d.join("dir")), mode(d.join("fifo"))], [0o660, 0o770, 0o660]);
    assert_eq!(xattr::get(d.join("file"), ACCESS).unwrap().unwrap(), acl(6, &[(1000, 7)], 5, 6, 0));
    assert_eq!(xattr::get(d.join("dir"), ACCESS).unwrap().unwrap(), acl(7, &[(1000, 7)], 5, 7, 0));
    assert_eq!(xattr::get(d.join("dir"), DEFAULT).unwrap().unwrap(), acl(7, &[(1000, 7)], 5, 7, 0));
    assert_eq!(xattr::get(d.join("file"), DEFAULT).unwrap(), None);
    assert!(can_write(&d.join("file"), 1000) && !can_read(&d.join("file"), 1001));
    as_user(1000, 1000, &[], || fs::write(d.join("dir/by-acl"), "").unwrap());
}

#[test]
fn a_file_is_made_and_opened_with_a_mode_that_forbids_it() {
    let world = world!(|l| put_dir(l.join("d"), 0o777, 0, 0));
    let path = world.at("d/readonly");
    as_user(1000, 1000, &[], || {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o400).open(&path).unwrap();
        file.write_all(b"once").unwrap();
        drop(file);
        assert_eq!(open_write(&path).errno(), Errno::ACCESS);
        assert_eq!(fs::read(&path).unwrap(), b"once");
    });
}
