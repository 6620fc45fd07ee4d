//! The union without FUSE in between, on the filesystem of /var/tmp.

use super::*;
use crate::config::CopyUp;
use std::{
    fs,
    os::unix::fs::{FileTypeExt, MetadataExt, symlink},
    path::{Path, PathBuf},
};

const ROOT: Caller = Caller { uid: 0, gid: 0, umask: 0o022 };

struct Layers {
    dir: tempfile::TempDir,
    lowers: usize,
    copy_up: CopyUp,
}

impl Layers {
    fn new(lowers: usize) -> Layers {
        let dir = tempfile::Builder::new().prefix("vfs-fuse-union-").tempdir_in("/var/tmp").unwrap();
        for name in (1..=lowers).map(|i| format!("l{i}")).chain(["u".into(), "w".into()]) {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        Layers { dir, lowers, copy_up: CopyUp::Extent }
    }

    fn path(&self, path: &str) -> PathBuf {
        self.dir.path().join(path)
    }

    fn write(&self, path: &str, content: &[u8]) {
        fs::create_dir_all(self.path(path).parent().unwrap()).unwrap();
        fs::write(self.path(path), content).unwrap();
    }

    fn config(&self) -> Config {
        Config {
            lower: (1..=self.lowers).map(|i| self.path(&format!("l{i}"))).collect(),
            upper: Some(self.path("u")),
            work: Some(self.path("w")),
            copy_up: self.copy_up,
            ..Config::default()
        }
    }

    fn open(&self) -> Arc<Union> {
        Union::open(self.config()).unwrap()
    }

    fn open_again(&self, union: Arc<Union>) -> Arc<Union> {
        drop(union);
        self.open()
    }
}

impl Union {
    fn at(&self, path: &str) -> Result<Entry> {
        let root = Entry { id: ROOT_ID, generation: 0, attr: self.getattr(ROOT_ID)? };
        path.split('/').filter(|p| !p.is_empty()).try_fold(root, |at, name| self.lookup(at.id, OsStr::new(name)))
    }

    fn parent(&self, path: &str) -> (u64, std::ffi::OsString) {
        let path = Path::new(path);
        let parent = path.parent().unwrap().to_str().unwrap();
        (self.at(parent).unwrap().id, path.file_name().unwrap().to_owned())
    }

    fn read(&self, path: &str) -> Result<Vec<u8>> {
        let data = self.data(self.at(path)?.id, false)?;
        let mut content = vec![0; data.size()? as usize];
        let length = data.read_at(&mut content, 0)?;
        content.truncate(length);
        Ok(content)
    }

    fn rename_path(&self, from: &str, to: &str, flags: u32) -> Result<()> {
        let ((a, name), (b, to)) = (self.parent(from), self.parent(to));
        self.rename(a, &name, b, &to, flags)
    }

    fn remove_path(&self, path: &str, directory: bool) -> Result<()> {
        let (parent, name) = self.parent(path);
        if directory { self.rmdir(parent, &name) } else { self.unlink(parent, &name) }
    }

    fn list(&self, path: &str) -> Vec<String> {
        let mut names = Vec::new();
        let id = self.at(path).unwrap().id;
        self.readdir(id, 0, &mut |e| {
            let ino = (e.name != "." && e.name != "..").then(|| self.lookup(id, e.name).unwrap().attr.ino);
            assert!(ino.is_none_or(|i| i == e.ino), "{:?}: d_ino {} is not {ino:?}", e.name, e.ino);
            names.push(e.name.to_str().unwrap().to_owned());
            true
        })
        .unwrap();
        names.retain(|n| n != "." && n != "..");
        names.sort();
        names
    }
}

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
fn a_write_to_a_lower_file_copies_no_more_than_is_written() {
    let layers = Layers::new(1);
    layers.write("l1/big", &vec![7; 8 << 20]);
    let union = layers.open();
    let before = union.at("big").unwrap();
    let reader = union.data(before.id, false).unwrap();
    union.data(before.id, true).unwrap().write_at(b"new", 5 << 20).unwrap();
    let mut bytes = [0; 5];
    reader.read_at(&mut bytes, (5 << 20) - 1).unwrap();
    assert_eq!(&bytes, b"\x07new\x07");
    assert!(fs::metadata(layers.path("u/big")).unwrap().blocks() * 512 <= 64 << 10);
    assert_eq!(union.at("big").unwrap().attr.ino, before.attr.ino);
    drop((reader, union));
    let union = layers.open();
    assert_eq!(union.at("big").unwrap().attr.ino, before.attr.ino);
    let content = union.read("big").unwrap();
    assert_eq!((content.len(), &content[5 << 20..(5 << 20) + 4]), (8 << 20, &b"new\x07"[..]));
}

#[test]
fn files_are_completed_in_the_background_those_of_earlier_mounts_too() {
    use crate::config::Completion;
    let layers = Layers::new(1);
    for name in ["early", "late"] {
        layers.write(&format!("l1/d/{name}"), &vec![7; 3 << 20]);
    }
    let union = layers.open();
    assert!(union.start_completion().is_none());
    union.data(union.at("d/early").unwrap().id, true).unwrap().write_at(b"new", 5).unwrap();
    drop(union);
    let config = Config { completion: Completion::Background { rate: 1 << 30 }, ..layers.config() };
    let union = Union::open(config).unwrap();
    let completer = union.start_completion().unwrap();
    let late = union.data(union.at("d/late").unwrap().id, true).unwrap();
    late.write_at(b"new", 5).unwrap();
    let whole = |name: &str| fs::metadata(layers.path(&format!("u/d/{name}"))).unwrap().blocks() * 512 >= 3 << 20;
    let started = std::time::Instant::now();
    while !(late.backing().is_some() && whole("early") && whole("late")) {
        assert!(started.elapsed() < Duration::from_secs(30), "not completed");
        std::thread::sleep(Duration::from_millis(5));
    }
    late.write_at(b"NEW", 2 << 20).unwrap();
    drop((completer, late, union));
    let mut wanted = vec![7; 3 << 20];
    wanted[5..8].copy_from_slice(b"new");
    assert_eq!(fs::read(layers.path("u/d/early")).unwrap(), wanted);
    wanted[2 << 20..(2 << 20) + 3].copy_from_slice(b"NEW");
    assert_eq!(fs::read(layers.path("u/d/late")).unwrap(), wanted);
    assert_eq!(xattr::get(layers.path("u/d/late"), "trusted.overlay.metacopy").unwrap(), None);
}

#[test]
fn completion_changes_no_time_that_is_shown() {
    let layers = Layers::new(1);
    layers.write("l1/f", &vec![7; 48 << 20]);
    let union = layers.open();
    let id = union.at("f").unwrap().id;
    let data = union.data(id, true).unwrap();
    let mtime = union.getattr(id).unwrap().mtime;
    let file = data.extent().unwrap();
    std::thread::scope(|scope| {
        let completed = scope.spawn(|| file.complete(&mut |_| std::ops::ControlFlow::Continue(())));
        while !completed.is_finished() {
            assert_eq!(union.getattr(id).unwrap().mtime, mtime);
            assert_eq!(union.at("f").unwrap().attr.mtime, mtime);
        }
        completed.join().unwrap().unwrap();
    });
    assert_eq!(union.getattr(id).unwrap().mtime, mtime);
}

#[test]
fn attributes_alone_copy_no_data() {
    for copy_up in [CopyUp::Extent, CopyUp::Auto] {
        let mut layers = Layers::new(1);
        layers.copy_up = copy_up;
        layers.write("l1/d/f", &vec![7; 1 << 20]);
        let union = layers.open();
        let id = union.at("d/f").unwrap().id;
        let set = SetAttr { mode: Some(0o4711), uid: Some(12), ..SetAttr::default() };
        let attr = union.setattr(id, &set, ROOT).unwrap();
        assert_eq!((attr.mode & 0o7777, attr.uid, attr.size), (0o4711, 12, 1 << 20));
        assert!(fs::metadata(layers.path("u/d/f")).unwrap().blocks() * 512 < 32 << 10);
        assert_eq!(union.read("d/f").unwrap(), vec![7; 1 << 20]);
    }
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
fn symlinks_and_special_files_are_copied_up() {
    let layers = Layers::new(1);
    symlink("target", layers.path("l1/link")).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, layers.path("l1/fifo"), rustix::fs::FileType::Fifo, 0o640.into(), 0).unwrap();
    let union = layers.open();
    for name in ["link", "fifo"] {
        let id = union.at(name).unwrap().id;
        let ino = union.getattr(id).unwrap().ino;
        union.setattr(id, &SetAttr { uid: Some(5), ..SetAttr::default() }, ROOT).unwrap();
        assert_eq!((union.getattr(id).unwrap().uid, union.getattr(id).unwrap().ino), (5, ino));
    }
    assert_eq!(union.readlink(union.at("link").unwrap().id).unwrap(), b"target");
    union.rename_path("link", "moved", 0).unwrap();
    assert_eq!(union.list(""), ["fifo", "moved"]);
}

#[test]
fn a_second_daemon_on_the_same_upper_or_work_directory_is_refused() {
    let layers = Layers::new(1);
    let union = layers.open();
    let upper = layers.path("u");
    let lock = rustix::fs::open(&upper, rustix::fs::OFlags::RDONLY, rustix::fs::Mode::empty()).unwrap();
    let again = rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive);
    assert_eq!(again.unwrap_err(), Errno::WOULDBLOCK);
    fs::create_dir(layers.path("u2")).unwrap();
    let same_work = Config { upper: Some(layers.path("u2")), ..layers.config() };
    let error = Union::open(same_work).map(drop).unwrap_err();
    assert!(error.kind() == ErrorKind::Busy && error.to_string().contains("/w "), "{error}");
    drop(union);
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive).unwrap();
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
fn ls_is_told_once_that_there_are_no_labels() {
    let layers = Layers::new(1);
    layers.write("l1/file", b"");
    let union = layers.open();
    let id = union.at("file").unwrap().id;
    let asked = union.getxattr(id, OsStr::new("security.selinux")).unwrap_err();
    assert_eq!(asked, if Path::new("/sys/fs/selinux").exists() { Errno::NODATA } else { Errno::OPNOTSUPP });
    union.setxattr(id, OsStr::new("security.selinux"), b"a:b:c", 0).unwrap();
    assert_eq!(union.getxattr(id, OsStr::new("security.selinux")).unwrap(), b"a:b:c");
}

#[test]
fn a_node_is_small() {
    // With the table's entry, a name, and what the allocator adds it is to stay below 300 bytes.
    assert!(size_of::<Node>() <= 120, "{}", size_of::<Node>());
}

#[test]
fn allocation_is_a_modification_wherever_it_is() {
    let layers = Layers::new(1);
    layers.write("l1/f", &[7; 70_000]);
    let old = std::time::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    fs::File::open(layers.path("l1/f")).unwrap().set_modified(old).unwrap();
    let union = layers.open();
    let id = union.at("f").unwrap().id;
    let data = union.data(id, true).unwrap();
    assert!(data.extent().is_some());
    assert_eq!(union.getattr(id).unwrap().mtime, (1_000_000_000, 0));
    data.fallocate(libc::FALLOC_FL_KEEP_SIZE as u32, 1273, 38_065).unwrap();
    assert!(union.getattr(id).unwrap().mtime.0 > 1_000_000_000);
    assert_eq!(union.read("f").unwrap(), [7; 70_000]);
}

#[test]
fn set_group_id_goes_as_the_kernel_takes_it() {
    let layers = Layers::new(1);
    layers.write("l1/f", b"content");
    rustix::fs::mknodat(rustix::fs::CWD, layers.path("l1/fifo"), rustix::fs::FileType::Fifo, 0o640.into(), 0).unwrap();
    let union = layers.open();
    let after = |name: &str, mode: u32, set: SetAttr, caller: Caller| {
        let id = union.at(name).unwrap().id;
        union.setattr(id, &SetAttr { mode: Some(mode), ..SetAttr::default() }, ROOT).unwrap();
        union.setattr(id, &set, caller).unwrap().mode & 0o7777
    };
    let (shorten, nothing) = (SetAttr { size: Some(3), ..SetAttr::default() }, SetAttr::default());
    let user = |gid| Caller { uid: 1000, gid, umask: 0 };
    // Without group execution it is nobody's privilege, but who is not in the group could not have set it.
    assert_eq!(after("f", 0o2700, shorten, user(1000)), 0o700);
    assert_eq!(after("f", 0o2700, shorten, user(0)), 0o2700);
    assert_eq!(after("f", 0o2700, nothing, user(1000)), 0o700);
    assert_eq!(after("f", 0o2750, shorten, user(0)), 0o750);
    // chown(2) without ids.
    assert_eq!(after("fifo", 0o6775, nothing, ROOT), 0o775);
    assert_eq!(after("fifo", 0o2700, nothing, ROOT), 0o2700);
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
