//! Nodes: what the kernel knows by their numbers, and how long they are held.

use super::*;
use std::os::unix::fs::PermissionsExt;

#[test]
fn a_renewed_node_is_forgotten_under_both_ids() {
    let layers = Layers::new(1);
    layers.write("l1/f", b"x");
    let union = layers.open();
    for new_first in [true, false] {
        let old = union.at("f").unwrap();
        union.renew(old.id).unwrap();
        let new = union.at("f").unwrap();
        assert_ne!(new.id, old.id);
        assert_eq!(new.attr.ino, old.attr.ino);
        let data = union.data(new.id, true).unwrap();
        // Whichever of the two the kernel still has, names lead to the same file.
        union.forget(if new_first { new.id } else { old.id }, 1);
        let again = union.at("f").unwrap();
        assert_eq!(again.id, new.id);
        assert!(Arc::ptr_eq(&data, &union.data(again.id, true).unwrap()));
        union.forget(again.id, 1);
        union.forget(if new_first { old.id } else { new.id }, 1);
        drop(data);
        assert_eq!(union.table.len(), 1);
        let later = union.at("f").unwrap();
        assert_eq!(later.id, old.attr.ino);
        union.forget(later.id, 1);
    }
}

#[test]
fn files_without_a_name_live_on() {
    let layers = Layers::new(1);
    layers.write("l1/f", b"lower");
    let union = layers.open();
    let id = union.at("f").unwrap().id;
    union.remove_path("f", false).unwrap();
    assert_eq!(union.getattr(id).unwrap().size, 5);
    union.data(id, true).unwrap().write_at(b"L", 0).unwrap();
    let mut content = [0; 5];
    union.data(id, false).unwrap().read_at(&mut content, 0).unwrap();
    assert_eq!(&content, b"Lower");
    let (made, data) = union.create(ROOT_ID, OsStr::new("f"), 0o644, ROOT).unwrap();
    data.write_at(b"another", 0).unwrap();
    assert_ne!(union.at("f").unwrap().generation + union.at("f").unwrap().id, 0);
    assert_eq!((union.getattr(made.id).unwrap().size, union.read("f").unwrap()), (7, b"another".to_vec()));
}

#[test]
fn the_kernels_references_are_all_that_holds_nodes() {
    let layers = Layers::new(1);
    for i in 0..100 {
        layers.write(&format!("l1/d{}/f{i}", i % 10), b"x");
    }
    let union = layers.open();
    let mut held = Vec::new();
    union
        .readdir_plus(ROOT_ID, 0, &mut |_, entry| {
            held.extend(entry.map(|e| e.id));
            true
        })
        .unwrap();
    for id in held.clone() {
        union
            .readdir_plus(id, 0, &mut |_, entry| {
                held.extend(entry.map(|e| e.id));
                true
            })
            .unwrap();
    }
    assert_eq!((held.len(), union.table.len()), (110, 111));
    // Parents first, as the kernel may.
    held.iter().for_each(|id| union.forget(*id, 1));
    assert_eq!(union.table.len(), 1);
}

#[test]
fn a_file_that_was_copied_up_is_known_in_every_directory() {
    let layers = Layers::new(1);
    layers.write("l1/from/file", &[7; 100_000]);
    let union = layers.open();
    let ino = union.at("from/file").unwrap().attr.ino;
    for (to, mode) in [("own", 0o700), ("linked", 0o700)] {
        union.mkdir(ROOT_ID, OsStr::new(to), mode, ROOT).unwrap();
    }
    let mode = SetAttr { mode: Some(0o600), ..SetAttr::default() };
    union.setattr(union.at("from/file").unwrap().id, &mode, ROOT).unwrap();
    union.rename_path("from/file", "own/file", 0).unwrap();
    union.link(union.at("own/file").unwrap().id, union.at("linked").unwrap().id, OsStr::new("file")).unwrap();
    let union = layers.open_again(union);
    for path in ["own/file", "linked/file"] {
        assert_eq!(union.at(path).unwrap().attr.ino, ino, "{path}");
        assert!(union.read(path).unwrap() == [7; 100_000], "{path}");
    }
}

#[test]
fn a_node_is_small() {
    // With the table's entry, a name, and what the allocator adds it is to stay below 300 bytes.
    assert!(size_of::<Node>() <= 120, "{}", size_of::<Node>());
}

/// Where only `user.` xattrs can be written, a fifo that was copied up has another number, and the kernel's inode the first.
#[test]
fn a_lower_fifo_that_is_moved_is_the_same_to_who_knew_it() {
    let layers = Layers::new(1);
    layers.write("l1/b/other", b"other");
    fs::create_dir(layers.path("l1/a")).unwrap();
    let made = std::process::Command::new("mkfifo").arg(layers.path("l1/a/fifo")).status().unwrap();
    assert!(made.success());
    let union = Union::open(Config { user_xattrs: true, ..layers.config() }).unwrap();
    let fifo = union.at("a/fifo").unwrap();
    union.rename_path("a/fifo", "b/other", 0).unwrap();
    assert_eq!(union.getattr(fifo.id).unwrap().mode & libc::S_IFMT, libc::S_IFIFO);
    let set = SetAttr { mode: Some(0o600), ..SetAttr::default() };
    let attr = union.setattr(fifo.id, &set, ROOT).unwrap();
    assert_eq!(attr.mode, libc::S_IFIFO | 0o600);
    assert_eq!(union.at("b/other").unwrap().attr.mode, libc::S_IFIFO | 0o600);
}

/// A change of mode or owner is made before the copy gets its name, with what it would come to after that.
#[test]
fn attributes_changed_by_a_copy_up_are_as_changed_after_it() {
    let mut acl = 2u32.to_le_bytes().to_vec();
    for (tag, perm, id) in [(1u16, 6u16, !0u32), (2, 6, 7), (4, 4, !0), (16, 6, !0), (32, 4, !0)] {
        acl.extend([&tag.to_le_bytes()[..], &perm.to_le_bytes(), &id.to_le_bytes()].concat());
    }
    let capability = [0x0200_0001u32, 1, 0, 0, 0].map(u32::to_le_bytes).concat();
    let xattrs = [("user.plain", b"x".to_vec()), ("system.posix_acl_access", acl), ("security.capability", capability)];
    let none = SetAttr::default();
    let sets = [
        SetAttr { mode: Some(0o604), ..none },
        SetAttr { mode: Some(0o7777), ..none },
        SetAttr { uid: Some(1), ..none },
        SetAttr { gid: Some(2), ..none },
        SetAttr { uid: Some(1), gid: Some(2), mode: Some(0o4750), ..none },
    ];
    let modes = [0o444, 0o644, 0o6755, 0o2745, 0o1777];
    let layers = Layers::new(1);
    let each = |call: &mut dyn FnMut(&SetAttr, u32, usize, String)| {
        for (n, set) in sets.iter().enumerate() {
            for mode in modes {
                (0..xattrs.len()).for_each(|x| call(set, mode, x, format!("{n} {mode:o} {}", xattrs[x].0)));
            }
        }
    };
    each(&mut |_, mode, x, name| {
        for when in ["at once", "later"] {
            let path = format!("l1/{when} {name}");
            layers.write(&path, b"content");
            xattr::set(layers.path(&path), xattrs[x].0, &xattrs[x].1).unwrap();
            fs::set_permissions(layers.path(&path), fs::Permissions::from_mode(mode)).unwrap();
        }
    });
    let union = layers.open();
    each(&mut |set, _, _, name| {
        let (now, later) = (format!("at once {name}"), format!("later {name}"));
        let touched = SetAttr { atime: Some(None), ..none };
        union.setattr(union.at(&later).unwrap().id, &touched, ROOT).unwrap();
        let [now, later] = [now, later].map(|path| {
            let id = union.at(&path).unwrap().id;
            let told = union.setattr(id, set, ROOT).unwrap();
            assert_eq!(union.getattr(id).unwrap(), told, "{path}");
            let values = xattrs.each_ref().map(|(xattr, _)| union.getxattr(id, OsStr::new(xattr)));
            (told.mode, told.uid, told.gid, values)
        });
        assert_eq!(now, later, "{name}");
    });
}
