//! Files that have several names.

use super::*;

#[test]
fn all_names_of_a_lower_file_stay_one_file() {
    let layers = Layers::new(2);
    layers.write("l2/x/one", b"old content");
    fs::create_dir(layers.path("l2/y")).unwrap();
    fs::hard_link(layers.path("l2/x/one"), layers.path("l2/y/two")).unwrap();
    fs::hard_link(layers.path("l2/x/one"), layers.path("l2/three")).unwrap();
    let union = layers.open();
    let ino = union.at("y/two").unwrap().attr.ino;
    union.data(union.at("x/one").unwrap().id, true).unwrap().write_at(b"NEW", 0).unwrap();
    let check = |union: Arc<Union>| {
        for path in ["x/one", "y/two", "three"] {
            assert_eq!(union.read(path).unwrap(), b"NEW content", "{path}");
            let attr = union.at(path).unwrap().attr;
            assert_eq!((attr.ino, attr.nlink), (ino, 3), "{path}");
        }
    };
    check(union);
    check(layers.open());
    let union = layers.open();
    union.remove_path("three", false).unwrap();
    assert_eq!(union.at("x/one").unwrap().attr.nlink, 2);
}

/// What is open of it still shows its attributes.
#[test]
fn a_removed_lower_file_has_no_name_left() {
    let layers = Layers::new(1);
    for name in ["f", "g"] {
        layers.write(&format!("l1/{name}"), b"old content");
    }
    let union = layers.open();
    let [removed, replaced] = ["f", "g"].map(|name| union.at(name).unwrap().id);
    union.remove_path("f", false).unwrap();
    assert_eq!(union.getattr(removed).unwrap().nlink, 0);
    layers.write("u/new", b"new");
    union.rename_path("new", "g", 0).unwrap();
    assert_eq!(union.getattr(replaced).unwrap().nlink, 0);
}

/// Killed after the names were noted and before the second one was there: its directory is not marked impure yet.
#[test]
fn names_given_after_a_kill_show_the_data() {
    let layers = Layers::new(1);
    layers.write("l1/x/one", &[b'o'; 10_000]);
    fs::create_dir(layers.path("l1/y")).unwrap();
    fs::hard_link(layers.path("l1/x/one"), layers.path("l1/y/two")).unwrap();
    let union = layers.open();
    union.data(union.at("x/one").unwrap().id, true).unwrap().write_at(b"NEW", 0).unwrap();
    drop(union);
    fs::remove_dir_all(layers.path("u/y")).unwrap();
    fs::create_dir(layers.path("u/y")).unwrap();
    fs::create_dir(layers.path("w/vfs-fuse/0")).unwrap();
    fs::hard_link(layers.path("u/x/one"), layers.path("w/vfs-fuse/0/inode")).unwrap();
    symlink("y/two", layers.path("w/vfs-fuse/0/1")).unwrap();
    let union = layers.open();
    assert!(union.read("y/two").unwrap() == [b"NEW", &[b'o'; 9997][..]].concat());
    assert_eq!(union.at("y/two").unwrap().id, union.at("x/one").unwrap().id);
}

/// The kernel forgets what it has removed some time later, when it knows the file by its other name already.
#[test]
fn the_name_that_is_left_is_the_file_that_lost_the_other() {
    let layers = Layers::new(1);
    layers.write("l1/f", &[b'o'; 10_000]);
    let union = layers.open();
    let file = union.at("f").unwrap();
    union.link(file.id, ROOT_ID, OsStr::new("other")).unwrap();
    let union = layers.open_again(union);
    let removed = union.at("f").unwrap();
    union.remove_path("f", false).unwrap();
    let left = union.at("other").unwrap();
    assert_eq!((left.id, left.attr.ino), (removed.id, file.attr.ino));
    union.forget(removed.id, 1);
    union.rename_path("other", "moved", 0).unwrap();
    union.data(left.id, true).unwrap().write_at(b"NEW", 0).unwrap();
    assert!(union.read("moved").unwrap().starts_with(b"NEWo"));
    union.remove_path("moved", false).unwrap();
    union.forget(left.id, 1);
}

/// As an open file that is changed, or times that the kernel sends late.
#[test]
fn a_file_that_lost_the_name_it_was_known_by_keeps_its_others() {
    for (copied, both_known) in [(true, false), (false, false), (false, true)] {
        let mut layers = Layers::new(1);
        layers.copy_up = CopyUp::Full;
        layers.write("l1/one", b"lower");
        fs::hard_link(layers.path("l1/one"), layers.path("l1/two")).unwrap();
        let mut union = layers.open();
        let one = union.at("one").unwrap();
        if both_known {
            union.at("two").unwrap();
        }
        union.remove_path("one", false).unwrap();
        let change = match copied {
            true => SetAttr { mode: Some(0o600), ..SetAttr::default() },
            false => SetAttr { mtime: Some(Some(one.attr.mtime)), ..SetAttr::default() },
        };
        union.setattr(one.id, &change, ROOT).unwrap();
        assert_eq!(layers.path("u/two").exists(), copied, "{change:?}");
        for _ in 0..2 {
            assert_eq!(union.at("one").unwrap_err(), Errno::NOENT);
            assert_eq!(union.read("two").unwrap(), b"lower");
            let two = union.at("two").unwrap();
            assert_eq!((two.attr.ino, two.attr.mode & 0o777), (one.attr.ino, if copied { 0o600 } else { 0o644 }));
            union = layers.open_again(union);
        }
        let data = union.data(union.at("two").unwrap().id, true).unwrap();
        data.write_at(b"L", 0).unwrap();
        assert_eq!(union.read("two").unwrap(), b"Lower");
    }
}

/// As after `cp -a` of the layers, with which numbers shift: an upper file may claim that of a lower one.
#[test]
fn a_number_that_two_files_claim_makes_no_names_of_one() {
    for upper_first in [true, false] {
        let layers = Layers::new(1);
        layers.write("l1/lower", b"lower");
        fs::hard_link(layers.path("l1/lower"), layers.path("l1/linked")).unwrap();
        let ino = layers.open().at("lower").unwrap().attr.ino;
        layers.write("u/upper", b"upper");
        fs::hard_link(layers.path("u/upper"), layers.path("u/also")).unwrap();
        xattr::set(layers.path("u/upper"), "trusted.overlay.vfs.ino", &ino.to_le_bytes()).unwrap();
        xattr::set(layers.path("u"), "trusted.overlay.impure", b"y").unwrap();
        let union = layers.open();
        let order = if upper_first { ["upper", "lower"] } else { ["lower", "upper"] };
        let _known = order.map(|name| union.at(name).unwrap());
        for (names, content) in [(["upper", "also"], "upper"), (["lower", "linked"], "lower")] {
            assert_eq!(names.map(|name| union.read(name).unwrap()), [content.as_bytes(); 2]);
        }
        let [upper, lower] = ["upper", "linked"].map(|name| union.at(name).unwrap().id);
        assert_ne!(upper, lower);
        union.data(lower, true).unwrap().write_at(b"L", 0).unwrap();
        assert_eq!(union.read("also").unwrap(), b"upper");
    }
}

/// The names are found by a walk, and a directory may move from where the walk comes last to where it has been.
#[test]
fn all_names_are_found_while_directories_move() {
    let layers = Layers::new(1);
    layers.write("l1/one", b"lower");
    layers.write("l1/a/d/file", b"");
    fs::create_dir(layers.path("l1/z")).unwrap();
    fs::hard_link(layers.path("l1/one"), layers.path("l1/a/d/two")).unwrap();
    (0..2000).for_each(|n| layers.write(&format!("l1/filler{}/f{n}", n % 100), b""));
    for round in 0..10 {
        fs::remove_dir_all(layers.path("u")).unwrap();
        fs::create_dir(layers.path("u")).unwrap();
        let union = layers.open();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    union.rename_path("a/d", "z/d", 0).unwrap();
                    union.rename_path("z/d", "a/d", 0).unwrap();
                }
            });
            let one = union.at("one").unwrap();
            union.setattr(one.id, &SetAttr { mode: Some(0o600), ..SetAttr::default() }, ROOT).unwrap();
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        let union = layers.open_again(union);
        let [one, two] = ["one", "a/d/two"].map(|path| union.at(path).unwrap());
        assert_eq!((one.id, two.attr.mode & 0o777), (two.id, 0o600), "round {round}");
    }
}

#[test]
fn names_come_and_go_while_a_file_with_several_is_copied_up() {
    let layers = Layers::new(1);
    let names: Vec<String> = (0..200).flat_map(|i| ["a", "b", "c"].map(|dir| format!("{dir}/{i}"))).collect();
    for three in names.chunks(3) {
        layers.write(&format!("l1/{}", three[0]), three[0].as_bytes());
        for name in &three[1..] {
            fs::create_dir_all(layers.path("l1").join(name).parent().unwrap()).unwrap();
            fs::hard_link(layers.path("l1").join(&three[0]), layers.path("l1").join(name)).unwrap();
        }
    }
    let union = layers.open();
    let write = |name: &str| {
        let id = union.at(name).unwrap().id;
        union.data(id, true).unwrap().write_at(b"X", 0).unwrap();
        union.forget(id, 1);
    };
    std::thread::scope(|scope| {
        scope.spawn(|| names.iter().step_by(3).for_each(|name| write(name)));
        scope.spawn(|| names.iter().skip(1).step_by(3).for_each(|name| write(name)));
        scope.spawn(|| names.iter().skip(2).step_by(3).for_each(|name| union.remove_path(name, false).unwrap()));
    });
    let check = |union: &Union| {
        for three in names.chunks(3) {
            let (one, other) = (union.at(&three[0]).unwrap(), union.at(&three[1]).unwrap());
            assert_eq!((one.id, one.attr.nlink, other.attr.nlink), (other.id, 2, 2), "{}", three[0]);
            assert_eq!(union.read(&three[1]).unwrap(), [b"X", &three[0].as_bytes()[1..]].concat());
            assert_eq!(union.at(&three[2]).unwrap_err(), Errno::NOENT);
        }
    };
    check(&union);
    drop(union);
    check(&layers.open());
}
