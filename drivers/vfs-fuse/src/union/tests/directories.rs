//! Directories over several layers: merged, renamed, removed, made again.

use super::*;

#[test]
fn layers_merge_and_whiteouts_hide() {
    let layers = Layers::new(2);
    layers.write("l2/d/below", b"2");
    layers.write("l2/d/both", b"2");
    layers.write("l1/d/both", b"1");
    layers.write("l1/d/.wh.gone", b"");
    layers.write("l2/d/gone", b"2");
    let union = layers.open();
    assert_eq!(union.list("d"), ["below", "both"]);
    assert_eq!(union.read("d/both").unwrap(), b"1");
    assert_eq!(union.at("d/gone").unwrap_err(), Errno::NOENT);
    union.remove_path("d/below", false).unwrap();
    assert_eq!(union.at("d/below").unwrap_err(), Errno::NOENT);
    assert_eq!(union.list("d"), ["both"]);
    assert!(fs::symlink_metadata(layers.path("u/d/below")).unwrap().file_type().is_char_device());
    drop(union);
    assert_eq!(layers.open().list("d"), ["both"]);
}

#[test]
fn directories_of_lower_layers_are_renamed_by_redirects() {
    let layers = Layers::new(2);
    layers.write("l2/a/sub/old", b"2");
    layers.write("l1/a/new", b"1");
    let union = layers.open();
    let ino = union.at("a").unwrap().attr.ino;
    union.rename_path("a", "b", 0).unwrap();
    union.rename_path("b/sub", "c", 0).unwrap();
    let check = |union: Arc<Union>| {
        assert_eq!(union.list(""), ["b", "c"]);
        assert_eq!((union.list("b"), union.list("c")), (vec!["new".to_owned()], vec!["old".to_owned()]));
        assert_eq!(union.read("c/old").unwrap(), b"2");
        assert_eq!(union.at("b").unwrap().attr.ino, ino);
    };
    check(union);
    check(layers.open());
    let union = layers.open();
    union.mkdir(ROOT_ID, OsStr::new("a"), 0o755, ROOT).unwrap();
    assert!(union.list("a").is_empty());
    union.rename_path("c", "a/c", 0).unwrap();
    union.rename_path("b", "a", 2).unwrap();
    assert_eq!(
        (union.list("a"), union.list("b"), union.list("b/c")),
        (vec!["new".into()], vec!["c".into()], vec!["old".to_owned()])
    );
    drop(union);
    let union = layers.open();
    assert_eq!(
        (union.list("a"), union.list("b"), union.list("b/c")),
        (vec!["new".into()], vec!["c".into()], vec!["old".to_owned()])
    );
}

#[test]
fn a_redirect_is_a_path_in_what_the_lower_layers_show_together() {
    let layers = Layers::new(2);
    layers.write("l2/d/e/f", b"deep");
    fs::create_dir_all(layers.path("l1/moved")).unwrap();
    xattr::set(layers.path("l1/moved"), "trusted.overlay.redirect", b"/d").unwrap();
    fs::create_dir(layers.path("l1/d")).unwrap();
    xattr::set(layers.path("l1/d"), "trusted.overlay.opaque", b"y").unwrap();
    let union = layers.open();
    union.rename_path("moved/e", "d/e", 0).unwrap();
    let redirect = xattr::get(layers.path("u/d/e"), "trusted.overlay.redirect").unwrap();
    assert_eq!(redirect.as_deref(), Some(&b"/moved/e"[..]));
    assert_eq!(union.read("d/e/f").unwrap(), b"deep");
    drop(union);
    assert_eq!(layers.open().read("d/e/f").unwrap(), b"deep");
}

/// Deeper than a thread's stack, and than the descriptors that are kept open.
#[test]
fn a_very_deep_tree_is_worked_in() {
    const DEPTH: usize = 5000;
    let layers = Layers::new(1);
    let mut at = layer::open_root(&layers.path("l1")).unwrap();
    for _ in 0..DEPTH {
        rustix::fs::mkdirat(&at, "d", 0o755.into()).unwrap();
        at = layer::open_dir(at.as_fd(), OsStr::new("d")).unwrap();
    }
    rustix::fs::mkdirat(&at, "moved", 0o755.into()).unwrap();
    let union = layers.open();
    let mut id = ROOT_ID;
    for _ in 0..DEPTH {
        id = union.lookup(id, OsStr::new("d")).unwrap().id;
    }
    union.create(id, OsStr::new("new"), 0o644, ROOT).unwrap();
    union.rename(id, OsStr::new("moved"), ROOT_ID, OsStr::new("moved"), 0).unwrap_err();
    assert_eq!(union.lookup(id, OsStr::new("new")).unwrap().attr.size, 0);
    let names = union.names_of(&union.table.get(id).unwrap(), Some((union.root.clone(), OsStr::new("x").into())));
    assert_eq!(names.unwrap().len(), 1);
}

#[test]
fn a_removed_directory_comes_back_empty() {
    let layers = Layers::new(1);
    layers.write("l1/d/f", b"1");
    let union = layers.open();
    assert_eq!(union.remove_path("d", true).unwrap_err(), Errno::NOTEMPTY);
    union.remove_path("d/f", false).unwrap();
    union.remove_path("d", true).unwrap();
    assert!(union.list("").is_empty());
    union.mkdir(ROOT_ID, OsStr::new("d"), 0o755, ROOT).unwrap();
    assert!(union.list("d").is_empty());
    drop(union);
    assert!(layers.open().list("d").is_empty());
    assert_eq!(fs::read_dir(layers.path("w/vfs-fuse")).unwrap().count(), 1, "only the shared whiteout stays");
}

#[test]
fn a_directory_hands_down_what_it_has_by_now() {
    let layers = Layers::new(1);
    let union = layers.open();
    let dir = union.mkdir(ROOT_ID, OsStr::new("d"), 0o755, ROOT).unwrap().id;
    let gid_of_new = |name: &str| union.create(dir, OsStr::new(name), 0o644, ROOT).unwrap().0.attr.gid;
    let change = |mode, gid| {
        union.setattr(dir, &SetAttr { gid, ..SetAttr::default() }, ROOT).unwrap();
        union.setattr(dir, &SetAttr { mode: Some(mode), ..SetAttr::default() }, ROOT).unwrap();
    };
    assert_eq!(gid_of_new("before"), 0);
    change(0o2755, Some(5));
    assert_eq!(gid_of_new("set-group-id"), 5);
    let below = union.mkdir(dir, OsStr::new("below"), 0o755, ROOT).unwrap().attr;
    assert_eq!((below.gid, below.mode & 0o7777), (5, 0o2755));
    change(0o755, None);
    assert_eq!(gid_of_new("after"), 0);
    let acl =
        [2, 0, 0, 0, 1, 0, 7, 0, 255, 255, 255, 255, 4, 0, 7, 0, 255, 255, 255, 255, 32, 0, 7, 0, 255, 255, 255, 255];
    match union.setxattr(dir, OsStr::new("system.posix_acl_default"), &acl, 0) {
        Err(Errno::OPNOTSUPP) => eprintln!("not tested: the filesystem has no ACLs"),
        done => {
            done.unwrap();
            let open = union.create(dir, OsStr::new("by ACL"), 0o666, ROOT).unwrap().0.attr;
            assert_eq!(open.mode & 0o777, 0o666, "the umask does not count");
            // The owner reads, as 1000 does; the others nothing.
            let acl: Vec<u8> = [[1, 0, 4, 0], [2, 0, 4, 0], [4, 0, 4, 0], [16, 0, 5, 0], [32, 0, 0, 0]]
                .map(|entry| [entry, if entry[0] == 2 { [0xe8, 3, 0, 0] } else { [255; 4] }].concat())
                .concat();
            let acl = [&[2, 0, 0, 0], &acl[..]].concat();
            union.setxattr(dir, OsStr::new("system.posix_acl_default"), &acl, 0).unwrap();
            let new = |name: &str, caller| union.create(dir, OsStr::new(name), 0o2775, caller).unwrap().0.attr.mode;
            let user = Caller { uid: 1000, gid: 1000, umask: 0o022 };
            for (name, caller) in [("own", ROOT), ("foreign", user), ("hidden", ROOT), ("hidden foreign", user)] {
                if name.starts_with("hidden") {
                    rustix::fs::mknodat(
                        rustix::fs::CWD,
                        layers.path("u/d").join(name),
                        rustix::fs::FileType::CharacterDevice,
                        rustix::fs::Mode::empty(),
                        0,
                    )
                    .unwrap();
                }
                assert_eq!(new(name, caller) & 0o7777, 0o2450, "{name}: by the ACL");
            }
        }
    }
}

#[test]
fn whiteouts_with_nothing_below_are_in_nobodys_way() {
    let layers = Layers::new(1);
    layers.write("u/d/.wh.file", b"");
    layers.write("u/d/there", b"content");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        layers.path("u/d/device"),
        rustix::fs::FileType::CharacterDevice,
        rustix::fs::Mode::empty(),
        0,
    )
    .unwrap();
    let union = layers.open();
    let dir = union.at("d").unwrap().id;
    assert_eq!(union.create(dir, OsStr::new("there"), 0o644, ROOT).err(), Some(Errno::EXIST));
    assert_eq!(union.mkdir(dir, OsStr::new("there"), 0o755, ROOT).unwrap_err(), Errno::EXIST);
    for name in ["file", "device"] {
        assert_eq!(union.lookup(dir, OsStr::new(name)).unwrap_err(), Errno::NOENT);
        union.create(dir, OsStr::new(name), 0o644, ROOT).unwrap();
        assert_eq!(union.mkdir(dir, OsStr::new(name), 0o755, ROOT).unwrap_err(), Errno::EXIST);
    }
    assert_eq!(union.list("d"), ["device", "file", "there"]);
    assert_eq!(layers.open_again(union).list("d"), ["device", "file", "there"]);
}
