//! Content and attributes of lower files at their first change and after it.

use super::*;

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

/// A layer is mounted read-only while the daemon that had it for writing completes its last file.
#[test]
fn a_file_that_another_daemon_completes_meanwhile_is_read() {
    let layers = Layers::new(1);
    layers.write("l1/f", &vec![7; 1 << 20]);
    let writer = layers.open();
    let data = writer.data(writer.at("f").unwrap().id, true).unwrap();
    data.write_at(b"new", 5).unwrap();
    let lower = vec![layers.path("u"), layers.path("l1")];
    let reader = Union::open(Config { lower, upper: None, work: None, ..layers.config() }).unwrap();
    let seen = reader.at("f").unwrap().id;
    data.extent().unwrap().complete(&mut |_| std::ops::ControlFlow::Continue(())).unwrap();
    assert_eq!(xattr::get(layers.path("u/f"), "trusted.overlay.metacopy").unwrap(), None);
    let mut bytes = [0; 5];
    reader.data(seen, false).unwrap().read_at(&mut bytes, 4).unwrap();
    assert_eq!(&bytes, b"\x07new\x07");
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
