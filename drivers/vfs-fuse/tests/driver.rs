//! The driver with its program on this machine's kernel. Mounts are detached, so that nothing outlives a test.

use graphdriver_core::{
    Access, Candidates, Change, ChangeKind, CopyUnit, ErrorKind, GraphDriver, LayerId, LayerOptions, Mount, Options,
    Result, Root, WriteStrategy,
    conformance::DirTree,
    model::{MemSink, MemTree, Op, Snapshot, Tree},
    mount, tar, walk,
};
use graphdriver_vfs_fuse::{FACTORY, driver::VfsFuse};
use rustix::fs::{FileType, Mode};
use std::{
    fs,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::{FileExt, FileTypeExt, MetadataExt},
    },
    path::{Path, PathBuf},
};

const PROGRAM: (&str, &str) = ("vfs-fuse.mount_program", env!("CARGO_BIN_EXE_vfs-fuse"));

fn options(given: &[(&str, &str)]) -> Options {
    Options(given.iter().chain([&PROGRAM]).map(|(n, v)| (n.to_string(), v.to_string())).collect())
}

fn ids(numbers: &[u64]) -> Vec<LayerId> {
    numbers.iter().copied().map(LayerId).collect()
}

/// A detached mount with a path that leads into it.
struct View(OwnedFd);

impl View {
    fn of(recipe: &[Mount]) -> View {
        View(mount::detached(recipe).unwrap())
    }

    fn join(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.0.as_raw_fd())).join(path)
    }
}

impl View {
    fn tree(&self) -> DirTree {
        DirTree::new(self.root())
    }

    fn root(&self) -> Root {
        Root::from_fd(self.0.try_clone().unwrap())
    }

    fn snapshot(&self) -> Snapshot {
        self.tree().snapshot().unwrap()
    }

    fn apply(&self, ops: &[Op]) {
        let mut tree = self.tree();
        for op in ops {
            tree.apply(op).unwrap_or_else(|e| panic!("{op:?}: {e}"));
        }
    }
}

struct Rig {
    tmp: tempfile::TempDir,
    driver: VfsFuse,
}

impl Rig {
    fn with(given: &[(&str, &str)]) -> Rig {
        let tmp = tempfile::tempdir_in("/var/tmp").unwrap();
        let driver = VfsFuse::open(&tmp.path().join("home"), &options(given)).unwrap();
        Rig { tmp, driver }
    }

    fn home(&self) -> PathBuf {
        self.tmp.path().join("home")
    }

    fn create(&self, id: u64, parents: &[u64]) -> Result<()> {
        self.driver.create(LayerId(id), &ids(parents), &LayerOptions::default())
    }

    fn diff(&self, id: u64) -> PathBuf {
        self.home().join(id.to_string()).join("diff")
    }

    fn view(&self, id: u64, parents: &[u64], access: Access) -> View {
        View::of(&self.driver.mount(LayerId(id), &ids(parents), access).unwrap())
    }
}

/// The same layers as overlayfs of the kernel shows them, without what it would not understand.
fn kernels_view(lower: &[PathBuf]) -> View {
    let lower: Vec<_> = lower.iter().map(|path| mount::escape(path).unwrap()).collect();
    let options = vec!["ro".into(), format!("lowerdir={}", lower.join(":"))];
    View::of(&[Mount { fstype: "overlay".into(), source: "overlay".into(), options }])
}

#[test]
fn a_file_copied_up_by_extents_is_whole_while_mounted_in_a_live_view_and_plain_once_committed() {
    let rig = Rig::with(&[("vfs-fuse.copy_up", "extent")]);
    let WriteStrategy::CopyUp { unit: CopyUnit::Extent { bytes } } = rig.driver.capabilities().write_strategy else {
        // Only where the temporary directory is on a filesystem whose holes cannot be trusted.
        panic!("no extents on {:?}", rig.driver.status());
    };
    assert!(bytes >= 4096);
    rig.create(1, &[]).unwrap();
    let old: Vec<u8> = (0..8u32 << 20).map(|n| (n % 251) as u8).collect();
    fs::write(rig.diff(1).join("big"), &old).unwrap();
    rig.driver.commit(LayerId(1)).unwrap();
    rig.create(2, &[1]).unwrap();
    let rw = rig.view(2, &[1], Access::ReadWrite);
    let file = fs::File::options().read(true).write(true).open(rw.join("big")).unwrap();
    file.write_all_at(b"new", 5 << 20).unwrap();
    file.sync_all().unwrap();
    let mut new = old.clone();
    new[5 << 20..][..3].copy_from_slice(b"new");
    let upper = fs::metadata(rig.diff(2).join("big")).unwrap();
    assert!(upper.blocks() * 512 < 1 << 20 && upper.len() == old.len() as u64, "the rest stays below: {upper:?}");
    assert_eq!(fs::read(rw.join("big")).unwrap(), new);
    let live = rig.view(2, &[1], Access::ReadOnly);
    assert_eq!(fs::read(live.join("big")).unwrap(), new, "a live view composes it too");
    let e = rig.driver.commit(LayerId(2)).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Busy, "{e}");
    drop((file, rw, live));
    rig.driver.commit(LayerId(2)).unwrap();
    assert_eq!(fs::read(rig.diff(2).join("big")).unwrap(), new, "plain, without the layers below");
    let names: Vec<_> = xattr::list(rig.diff(2).join("big")).unwrap().collect();
    assert!(names.iter().all(|name| !name.to_string_lossy().contains("extent")), "{names:?}");
    assert_eq!(fs::read(kernels_view(&[rig.diff(2), rig.diff(1)]).join("big")).unwrap(), new);
    let e = rig.driver.mount(LayerId(2), &ids(&[1]), Access::ReadWrite).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::InvalidInput, "{e}");
}

/// Layer 1 with large files, one with several names, and the active layer 2 in which they are changed by extents.
fn changed_by_extents() -> (Rig, View) {
    let rig = Rig::with(&[("vfs-fuse.copy_up", "extent")]);
    rig.create(1, &[]).unwrap();
    let big = |path: &str, byte| Op::write(path, vec![byte; LARGE]);
    let old =
        [Op::mkdir("d"), Op::mkdir("d/sub"), big("big", 1), big("linked", 2), big("d/sub/deep", 3), big("kept", 4)];
    let view = rig.view(1, &[], Access::ReadWrite);
    view.apply(&old);
    view.apply(&[Op::link("linked", "d/name"), Op::link("linked", "gone"), Op::link("big", "d/big")]);
    drop(view);
    rig.driver.commit(LayerId(1)).unwrap();
    rig.create(2, &[1]).unwrap();
    let view = rig.view(2, &[1], Access::ReadWrite);
    let write = |path: &str, offset| Op::Write { path: path.into(), offset, data: b"new".to_vec(), mode: 0o644 };
    view.apply(&[
        write("d/big", 1 << 20),
        write("linked", 12345),
        Op::unlink("gone"),
        Op::link("d/name", "third"),
        Op::chmod("d/sub/deep", 0o600),
        Op::Truncate { path: "d/sub/deep".into(), size: 3 << 20 },
        Op::rename("d/sub", "moved"),
        Op::write("d/own", "own"),
    ]);
    (rig, view)
}

const LARGE: usize = 4 << 20;

#[test]
fn the_kernel_shows_a_committed_layer_with_extents_and_hard_links_as_vfs_fuse_did() {
    let (rig, view) = changed_by_extents();
    let shown = view.snapshot();
    assert_eq!(shown[Path::new("linked")].names.len(), 3, "{:?}", shown[Path::new("linked")]);
    drop(view);
    let kernel = || kernels_view(&[rig.diff(2), rig.diff(1)]);
    let refused = fs::read(kernel().join("big")).unwrap_err();
    assert!([libc::EPERM, libc::EIO].contains(&refused.raw_os_error().unwrap()), "holes would be zeros: {refused}");
    rig.driver.commit(LayerId(2)).unwrap();
    assert_eq!(rig.view(2, &[1], Access::ReadOnly).snapshot(), shown);
    assert_eq!(kernel().snapshot(), shown);
    for name in ["big", "linked", "moved/deep"] {
        let names: Vec<_> = xattr::list(rig.diff(2).join(name)).unwrap().collect();
        let left = |n: &str| ["extent", "metacopy", "redirect"].iter().any(|mark| n.ends_with(mark));
        assert!(!names.iter().any(|n| left(&n.to_string_lossy())), "{name}: {names:?}");
    }
}

#[test]
fn changes_tar_and_usage_of_an_active_layer_count_incomplete_files_as_they_are() {
    let (rig, view) = changed_by_extents();
    let shown = view.snapshot();
    // What is still in the page cache has no blocks yet.
    rustix::fs::syncfs(fs::File::open(rig.home()).unwrap()).unwrap();
    let usage = rig.driver.usage(LayerId(2)).unwrap();
    // d, moved, big, linked, moved/deep, d/own, the whiteouts, the root; of three large files a few units each.
    assert!((8..=12).contains(&usage.inodes) && usage.bytes < 1 << 20, "{usage:?}");
    let (lower, upper) = (rig.view(1, &[], Access::ReadOnly).root(), rig.view(2, &[1], Access::ReadOnly).root());
    let native = rig.driver.native_diff().unwrap();
    let mut tars = Vec::new();
    for is_native in [true, false] {
        let mut narrow = native.narrow(LayerId(2), &ids(&[1])).unwrap();
        let mut found: Vec<Change> = Vec::new();
        walk::changes(Some(&lower), &upper, is_native.then_some(&mut *narrow), &mut |change| {
            found.push(change);
            Ok(())
        })
        .unwrap();
        let kinds = |kind| found.iter().filter(move |c| c.kind == kind).map(|c| c.path.to_str().unwrap());
        assert_eq!(kinds(ChangeKind::Added).collect::<Vec<_>>(), ["d/own", "moved", "moved/deep", "third"]);
        assert_eq!(kinds(ChangeKind::Deleted).collect::<Vec<_>>(), ["d/sub", "gone"]);
        assert_eq!(kinds(ChangeKind::Modified).collect::<Vec<_>>(), ["", "big", "d", "d/big", "d/name", "linked"]);
        let mut narrow = native.narrow(LayerId(2), &ids(&[1])).unwrap();
        tars.push(tar::diff_tar(Some(&lower), &upper, is_native.then_some(&mut *narrow), Vec::new()).unwrap());
    }
    assert_eq!(tars[0], tars[1]);
    let mut base = MemTree::new();
    for (tar, want) in [(tar::tree_tar(&lower, Vec::new()).unwrap(), None), (tars.remove(0), Some(&shown))] {
        tar::apply(&mut &*tar, &mut MemSink::new(&mut base)).unwrap();
        want.inspect(|want| assert_eq!(&&base.snapshot().unwrap(), want));
    }
    drop(view);
    assert_eq!(rig.driver.usage(LayerId(2)).unwrap().inodes, usage.inodes, "unmounted it is the same");
    rig.driver.commit(LayerId(2)).unwrap();
    assert!(rig.driver.usage(LayerId(2)).unwrap().bytes > 11 << 20, "and complete once committed");
}

#[test]
fn what_a_durable_layer_lies_on_is_noted_as_it_is_made() {
    let rig = Rig::with(&[]);
    for (id, parents) in [(1, &[][..]), (2, &[1])] {
        rig.create(id, parents).unwrap();
        rig.driver.commit(LayerId(id)).unwrap();
    }
    let durable = LayerOptions { durable: true, ..LayerOptions::default() };
    rig.driver.create(LayerId(3), &ids(&[2, 1]), &durable).unwrap();
    rig.create(4, &[2, 1]).unwrap();
    let note = |id: u64| rig.home().join(format!("{id}/lower"));
    assert_eq!(fs::read_to_string(note(3)).unwrap(), "2\n1\n");
    assert!(!note(4).exists(), "it has no flush that could take it along");
    let inode = fs::metadata(note(3)).unwrap().ino();
    for id in [3, 4] {
        rig.driver.mount(LayerId(id), &ids(&[2, 1]), Access::ReadWrite).unwrap();
        assert_eq!(fs::read_to_string(note(id)).unwrap(), "2\n1\n");
    }
    assert_eq!(fs::metadata(note(3)).unwrap().ino(), inode, "written once");
}

/// Completing needs the layers that the file was based on, whatever was opened and forgotten in between.
#[test]
fn an_interrupted_commit_is_finished_by_another_process() {
    let rig = Rig::with(&[("vfs-fuse.copy_up", "extent")]);
    for (id, parents, name) in [(1, &[][..], "bottom"), (2, &[1], "top")] {
        rig.create(id, parents).unwrap();
        fs::write(rig.diff(id).join(name), vec![7; 4 << 20]).unwrap();
        rig.driver.commit(LayerId(id)).unwrap();
    }
    rig.create(3, &[2, 1]).unwrap();
    let rw = rig.view(3, &[2, 1], Access::ReadWrite);
    for name in ["bottom", "top"] {
        fs::File::options().write(true).open(rw.join(name)).unwrap().write_all_at(b"new", 1 << 20).unwrap();
    }
    drop(rw);
    assert_eq!(fs::read_to_string(rig.home().join("3/lower")).unwrap(), "2\n1\n");
    // As a crash before its end leaves it.
    fs::write(rig.home().join("3/lower"), "2\n9\n").unwrap();
    let e = rig.driver.commit(LayerId(3)).unwrap_err();
    assert!(e.kind() == ErrorKind::NotFound && e.to_string().contains("layer 9"), "{e}");
    fs::write(rig.home().join("3/lower"), "2\n1\n").unwrap();
    let again = VfsFuse::open(&rig.home(), &options(&[])).unwrap();
    again.commit(LayerId(3)).unwrap();
    for name in ["bottom", "top"] {
        let data = fs::read(rig.diff(3).join(name)).unwrap();
        assert_eq!((data.len(), &data[1 << 20..][..4], data[0]), (4 << 20, &b"new\x07"[..], 7), "{name}");
    }
}

#[test]
fn layers_are_overlayfss_and_the_native_diff_names_what_changed() {
    let rig = Rig::with(&[]);
    rig.create(1, &[]).unwrap();
    fs::create_dir_all(rig.diff(1).join("dir/sub")).unwrap();
    fs::create_dir(rig.diff(1).join("anew")).unwrap();
    for file in ["gone", "kept", "dir/sub/f", "anew/old"] {
        fs::write(rig.diff(1).join(file), file).unwrap();
    }
    rig.driver.commit(LayerId(1)).unwrap();
    rig.create(2, &[1]).unwrap();
    let rw = rig.view(2, &[1], Access::ReadWrite);
    fs::remove_file(rw.join("gone")).unwrap();
    fs::remove_dir_all(rw.join("anew")).unwrap();
    fs::create_dir(rw.join("anew")).unwrap();
    fs::write(rw.join("dir/new"), "").unwrap();
    assert_eq!(rig.driver.commit(LayerId(2)).unwrap_err().kind(), ErrorKind::Busy);
    drop(rw);
    rig.driver.commit(LayerId(2)).unwrap();
    let whiteout = fs::symlink_metadata(rig.diff(2).join("gone")).unwrap();
    assert!(whiteout.file_type().is_char_device() && whiteout.rdev() == 0, "{whiteout:?}");
    let narrow = rig.driver.native_diff().unwrap();
    let mut narrow = narrow.narrow(LayerId(2), &ids(&[1])).unwrap();
    let mut candidates = |dir: &str| match narrow.candidates(Path::new(dir)).unwrap() {
        Candidates::All => vec!["everything".into()],
        Candidates::Names(mut names) => {
            names.sort();
            names
        }
    };
    assert_eq!(candidates(""), ["anew", "dir", "gone"]);
    assert_eq!((candidates("dir"), candidates("anew")), (vec!["new".into()], vec!["everything".into()]));
    let kernel = kernels_view(&[rig.diff(2), rig.diff(1)]);
    let mut names: Vec<_> = fs::read_dir(kernel.join("")).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(
        (names, fs::read_dir(kernel.join("anew")).unwrap().count()),
        (vec!["anew".into(), "dir".into(), "kept".into()], 0)
    );
}

#[test]
fn a_layer_in_use_is_neither_committed_nor_removed_nor_served_twice() {
    let rig = Rig::with(&[]);
    rig.create(1, &[]).unwrap();
    let rw = rig.view(1, &[], Access::ReadWrite);
    let attempts: [&(dyn Fn() -> Result<()> + Sync); 3] =
        [&|| rig.driver.commit(LayerId(1)), &|| rig.driver.remove(LayerId(1)), &|| {
            // The mount that is there can be shown once more, if it has a source of its own.
            let recipe = rig.driver.mount(LayerId(1), &[], Access::ReadWrite)?;
            mount::detached(&recipe).map(drop)
        }];
    // At once, since each waits for a daemon that might be just ending.
    std::thread::scope(|scope| {
        for attempt in attempts {
            scope.spawn(move || {
                let e = attempt().unwrap_err();
                assert!(e.kind() == ErrorKind::Busy && e.to_string().contains("fuser -v"), "{e}");
            });
        }
    });
    fs::write(rw.join("f"), "").unwrap();
    drop(rw);
    rig.driver.release(LayerId(1)).unwrap();
    rig.driver.remove(LayerId(1)).unwrap();
}

#[test]
fn works_below_a_path_with_separators_in_it() {
    let tmp = tempfile::tempdir_in("/var/tmp").unwrap();
    let home = tmp.path().join("a:b,c\\d \"e'\\").join("x".repeat(250));
    let driver = VfsFuse::open(&home, &options(&[])).unwrap();
    driver.create(LayerId(1), &[], &LayerOptions::default()).unwrap();
    fs::write(home.join("1/diff/old"), "old").unwrap();
    driver.commit(LayerId(1)).unwrap();
    driver.create(LayerId(2), &ids(&[1]), &LayerOptions::default()).unwrap();
    let view = View::of(&driver.mount(LayerId(2), &ids(&[1]), Access::ReadWrite).unwrap());
    fs::write(view.join("new"), "").unwrap();
    assert_eq!(fs::read_to_string(view.join("old")).unwrap(), "old");
    assert!(home.join("2/diff/new").exists());
}

#[test]
fn what_does_not_fit_one_programs_arguments_is_not_promised() {
    let tmp = tempfile::tempdir_in("/var/tmp").unwrap();
    let depth = |home: PathBuf| (FACTORY.probe)(&home, &options(&[])).unwrap().max_depth;
    assert_eq!(depth(tmp.path().join("home")), 499);
    let long = depth(tmp.path().join("x".repeat(250)).join("y".repeat(250)));
    assert!((100..130).contains(&long), "{long}");
    assert_eq!(fs::read_dir(tmp.path()).unwrap().count(), 0, "probing leaves nothing");
}

#[test]
fn probing_names_the_unmet_need() {
    let tmp = tempfile::tempdir_in("/var/tmp").unwrap();
    let missing = Options(vec![("vfs-fuse.mount_program".into(), "/no/such/vfs-fuse".into())]);
    let unmet = (FACTORY.probe)(tmp.path(), &missing).unwrap_err();
    assert!(unmet.missing.contains("/no/such/vfs-fuse") && unmet.remedy.contains("mount_program"), "{unmet:?}");
    let broken = Options(vec![("vfs-fuse.mount_program".into(), "/bin/false".into())]);
    let unmet = (FACTORY.probe)(tmp.path(), &broken).unwrap_err();
    assert!(unmet.missing.contains("false failed with exit code 1"), "{unmet:?}");
    let unmet = (FACTORY.probe)(Path::new("/proc"), &options(&[])).unwrap_err();
    assert!(!unmet.missing.is_empty() && !unmet.remedy.is_empty(), "{unmet:?}");
    let unmet = (FACTORY.probe)(tmp.path(), &options(&[("vfs-fuse.copy_up", "fast")])).unwrap_err();
    assert!(unmet.missing.contains("vfs-fuse.copy_up") && unmet.remedy.contains("extent"), "{unmet:?}");
    assert_eq!(fs::read_dir(tmp.path()).unwrap().count(), 0);
}

/// What version 1 writes, kept as it was.
#[test]
fn a_data_root_of_version_1_is_read_and_one_of_others_refused() {
    let tmp = tempfile::tempdir_in("/var/tmp").unwrap();
    let home = tmp.path();
    fs::write(home.join("version"), "graphdriver vfs-fuse 1\nxattrs trusted\nuses\n").unwrap();
    for dir in ["empty", "1/diff/old/deep", "2/diff/new", "3/diff", "3/work"] {
        fs::create_dir_all(home.join(dir)).unwrap();
    }
    fs::write(home.join("1/diff/old/deep/f"), "f").unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, home.join("2/diff/old"), FileType::CharacterDevice, Mode::empty(), 0).unwrap();
    xattr::set(home.join("2/diff/new"), "trusted.overlay.redirect", b"old").unwrap();
    let driver = VfsFuse::open(home, &options(&[])).unwrap();
    let view = View::of(&driver.mount(LayerId(3), &ids(&[2, 1]), Access::ReadWrite).unwrap());
    assert_eq!(fs::read_to_string(view.join("new/deep/f")).unwrap(), "f");
    assert!(!view.join("old").exists());
    drop(view);
    for (version, kind) in [
        ("graphdriver vfs-fuse 2\n", ErrorKind::Unsupported),
        ("graphdriver overlay2 1\nxattrs trusted\nuses\n", ErrorKind::Unsupported),
        ("graphdriver vfs-fuse 1\nxattrs user\nuses\n", ErrorKind::Unsupported),
        ("graphdriver vfs-fuse 1\nxattrs none\n", ErrorKind::Corrupt),
    ] {
        fs::write(home.join("version"), version).unwrap();
        assert_eq!(VfsFuse::open(home, &options(&[])).unwrap_err().kind(), kind, "{version}");
    }
}
