//! What is the driver's own, on a pool in a file.

mod common;
#[path = "../../../tests/skip/mod.rs"]
#[allow(dead_code)] // All of these need the guest.
mod skip;

use common::{Place, missing, root_of};
use graphdriver_core::{
    Access, ByteSize, Change, ErrorKind, GraphDriver, LayerId, LayerOptions, Limits, Narrow, Options, Root,
    WriteStrategy, mount, walk,
};
use graphdriver_quota::{
    Quota,
    refquota::{RefQuota, list, zfs},
};
use graphdriver_zfs::{FACTORY, Zfs};
use rustix::{
    fs::{StatVfsMountFlags, XattrFlags},
    io::Errno,
    mount::MountFlags,
};
use std::{
    fs,
    io::Write,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

const PLAIN: &LayerOptions = &LayerOptions { size: None, inodes: None, durable: true };
const BASE: LayerId = LayerId(1);
const CHILD: LayerId = LayerId(2);
const MB: u64 = 1_000_000;

macro_rules! in_guest {
    ($name:literal) => {
        if skip::skipped_outside_guest($name, missing()) {
            return;
        }
    };
}

struct Rig {
    driver: Zfs,
    place: Place,
}

/// A detached mount with a path that leads into it.
struct View(OwnedFd);

impl View {
    fn path(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.0.as_raw_fd())).join(path)
    }

    fn write(&self, path: &str, bytes: &[u8]) {
        fs::write(self.path(path), bytes).unwrap();
    }
}

impl Rig {
    fn new() -> Rig {
        let place = Place::new().unwrap();
        Rig { driver: Zfs::open(place.home.path(), &place.options()).unwrap(), place }
    }

    fn view(&self, id: LayerId, access: Access) -> View {
        View(mount::detached(&self.driver.mount(id, &[], access).unwrap()).unwrap())
    }

    /// A committed layer, filled by `fill`.
    fn base(&self, fill: impl FnOnce(&View)) {
        self.driver.create(BASE, &[], PLAIN).unwrap();
        fill(&self.view(BASE, Access::ReadWrite));
        self.driver.commit(BASE).unwrap();
    }

    fn changes(&self, narrow: Option<&mut dyn Narrow>) -> Vec<Change> {
        let [lower, upper] = [BASE, CHILD].map(|id| Root::from_fd(self.view(id, Access::ReadOnly).0));
        let mut found = Vec::new();
        let tell = &mut |change| {
            found.push(change);
            Ok(())
        };
        walk::changes(Some(&lower), &upper, narrow, tell).unwrap();
        found
    }

    /// That native diff finds what the walk does; returns whether it narrowed anything.
    fn check_diff(&self, expected: &[&str]) -> bool {
        let mut narrow = self.driver.native_diff().unwrap().narrow(CHILD, &[BASE]).unwrap();
        let (walked, native) = (self.changes(None), self.changes(Some(&mut *narrow)));
        assert_eq!(walked, native);
        let paths: Vec<_> = walked.iter().map(|change| change.path.to_str().unwrap()).collect();
        for path in expected {
            assert!(paths.contains(path), "{path} is not in {paths:?}");
        }
        narrow.candidates(Path::new("")).unwrap() != graphdriver_core::Candidates::All
    }

    /// Everything below the store's dataset.
    fn everything(&self) -> Vec<String> {
        let root = self.driver.dataset();
        let out = zfs(&["list", "-H", "-r", "-t", "all", "-o", "name", root]).unwrap();
        out.lines().filter_map(|name| name.strip_prefix(&format!("{root}/")).map(str::to_owned)).collect()
    }
}

/// Of a file that is in no layer below: what the suite leaves out is ZFS's own doing.
#[test]
fn the_filesystem_itself_leaves_a_written_file_its_capabilities() {
    in_guest!("the_filesystem_itself_leaves_a_written_file_its_capabilities");
    let rig = Rig::new();
    rig.driver.create(BASE, &[], PLAIN).unwrap();
    let view = rig.view(BASE, Access::ReadWrite);
    view.write("f", b"1");
    let capability = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    rustix::fs::setxattr(view.path("f"), "security.capability", &capability, XattrFlags::empty()).unwrap();
    // To truncate it is another matter.
    fs::File::options().append(true).open(view.path("f")).unwrap().write_all(b"2").unwrap();
    let mut found = [0; 20];
    assert_eq!(rustix::fs::getxattr(view.path("f"), "security.capability", &mut found), Ok(20));
    assert_eq!(found, capability);
}

/// `zfs userspace` owns a dataset that is not mounted while it reads it; ZFS's own creations do so too.
#[test]
fn a_dataset_that_is_owned_for_a_moment_is_mounted() {
    in_guest!("a_dataset_that_is_owned_for_a_moment_is_mounted");
    let rig = Rig::new();
    rig.driver.create(BASE, &[], PLAIN).unwrap();
    let dataset = format!("{}/{BASE}", rig.driver.dataset());
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    // Fails, too, where it meets a mount.
                    let _ = zfs(&["userspace", "-H", &dataset]);
                }
            });
        }
        let recipe = rig.driver.mount(BASE, &[], Access::ReadWrite).unwrap();
        let failed = (0..100).find_map(|_| mount::detached(&recipe).err());
        done.store(true, Ordering::Relaxed);
        assert!(failed.is_none(), "{}", failed.unwrap());
    });
}

#[test]
fn no_dataset_and_no_snapshot_is_left() {
    in_guest!("no_dataset_and_no_snapshot_is_left");
    let rig = Rig::new();
    rig.base(|view| view.write("f", b"1"));
    rig.driver.create(CHILD, &[BASE], PLAIN).unwrap();
    let view = rig.view(CHILD, Access::ReadWrite);
    view.write("g", b"2");
    assert!(rig.check_diff(&["g"]));
    drop((rig.view(CHILD, Access::ReadOnly), view));
    assert_eq!(rig.everything(), ["1", "1@committed", "2", "empty", "empty@committed"]);
    assert_eq!(rig.driver.create(LayerId(3), &[LayerId(9)], PLAIN).unwrap_err().kind(), ErrorKind::NotFound);
    let sized = LayerOptions { size: None, inodes: Some(5), durable: true };
    let e = rig.driver.create(LayerId(3), &[BASE], &sized).unwrap_err();
    assert!(e.kind() == ErrorKind::Unsupported && e.to_string().contains("per user"), "{e}");
    assert_eq!(rig.everything().len(), 5);
    zfs(&["snapshot", &format!("{}/2@somebody-elses", rig.driver.dataset())]).unwrap();
    rig.driver.remove(CHILD).unwrap();
    rig.driver.remove(BASE).unwrap();
    assert_eq!(rig.everything(), ["empty", "empty@committed"]);
}

/// `zfs diff` says nothing of `a/stale`: it remembers `b`, where it got the name that it has lost.
#[test]
fn native_diff_finds_files_that_zfs_diff_does_not_tell() {
    in_guest!("native_diff_finds_files_that_zfs_diff_does_not_tell");
    let rig = Rig::new();
    rig.base(|view| {
        fs::create_dir(view.path("a")).unwrap();
        fs::create_dir(view.path("b")).unwrap();
        view.write("a/stale", b"1");
        fs::hard_link(view.path("a/stale"), view.path("b/link")).unwrap();
        fs::remove_file(view.path("b/link")).unwrap();
    });
    rig.driver.create(CHILD, &[BASE], PLAIN).unwrap();
    rig.view(CHILD, Access::ReadWrite).write("a/stale", b"22");
    rig.check_diff(&["a/stale"]);
}

#[test]
fn native_diff_narrows_and_is_right_about_links_made_above() {
    in_guest!("native_diff_narrows_and_is_right_about_links_made_above");
    let rig = Rig::new();
    rig.base(|view| {
        for dir in ["a", "b", "c"] {
            fs::create_dir(view.path(dir)).unwrap();
            view.write(&format!("{dir}/file"), b"1");
        }
        fs::hard_link(view.path("a/file"), view.path("b/other")).unwrap();
    });
    rig.driver.create(CHILD, &[BASE], PLAIN).unwrap();
    let view = rig.view(CHILD, Access::ReadWrite);
    view.write("c/file", b"22");
    assert!(rig.check_diff(&["c/file"]));
    // Its other name is in a directory that does not change.
    view.write("a/file", b"333");
    rig.check_diff(&["a/file", "b/other", "c/file"]);
    // ZFS no longer finds the file, and says that it is gone.
    fs::hard_link(view.path("a/file"), view.path("c/third")).unwrap();
    fs::remove_file(view.path("c/third")).unwrap();
    rig.check_diff(&["a/file", "b/other", "c/file"]);
    fs::rename(view.path("c"), view.path("d")).unwrap();
    fs::create_dir(view.path("c")).unwrap();
    rig.check_diff(&["c/file", "d", "d/file"]);
}

#[test]
fn what_is_mounted_is_not_removed_and_stays_whole() {
    in_guest!("what_is_mounted_is_not_removed_and_stays_whole");
    let rig = Rig::new();
    rig.base(|view| view.write("f", b"1"));
    let held = rig.view(BASE, Access::ReadOnly);
    assert_eq!(rig.driver.remove(BASE).unwrap_err().kind(), ErrorKind::Busy);
    assert_eq!(rig.everything(), ["1", "1@committed", "empty", "empty@committed"]);
    drop(held);
    assert_eq!(fs::read(rig.view(BASE, Access::ReadOnly).path("f")).unwrap(), b"1");
    rig.driver.create(CHILD, &[BASE], PLAIN).unwrap();
    let held = rig.view(CHILD, Access::ReadWrite);
    assert_eq!(rig.driver.remove(CHILD).unwrap_err().kind(), ErrorKind::Busy);
    held.write("f", b"2");
    assert_eq!(rig.driver.remove(BASE).unwrap_err().kind(), ErrorKind::Busy, "it has a child");
    drop(held);
    rig.driver.remove(CHILD).unwrap();
    rig.driver.remove(BASE).unwrap();
    assert_eq!(rig.everything(), ["empty", "empty@committed"]);
}

#[test]
fn a_layer_is_shown_writable_and_read_only_at_once_and_frozen_under_its_writer() {
    in_guest!("a_layer_is_shown_writable_and_read_only_at_once_and_frozen_under_its_writer");
    let rig = Rig::new();
    rig.driver.create(BASE, &[], PLAIN).unwrap();
    let (reader, writer) = (rig.view(BASE, Access::ReadOnly), rig.view(BASE, Access::ReadWrite));
    writer.write("f", b"1");
    assert_eq!(fs::read(reader.path("f")).unwrap(), b"1");
    let refused = |view: &View| fs::write(view.path("g"), b"2").unwrap_err().raw_os_error();
    assert_eq!(refused(&reader), Some(Errno::ROFS.raw_os_error()));
    rig.driver.commit(BASE).unwrap();
    assert_eq!(refused(&writer), Some(Errno::ROFS.raw_os_error()));
}

#[test]
fn a_size_is_what_the_layer_takes_besides_its_parent() {
    in_guest!("a_size_is_what_the_layer_takes_besides_its_parent");
    let rig = Rig::new();
    rig.base(|view| view.write("big", &vec![7; 30 * MB as usize]));
    let size = |bytes| Limits { size: Some(ByteSize(bytes)), inodes: None };
    let sized = LayerOptions { size: Some(ByteSize(20 * MB)), inodes: None, durable: true };
    rig.driver.create(CHILD, &[BASE], &sized).unwrap();
    assert_eq!(rig.driver.limits(CHILD).unwrap(), size(20 * MB));
    // Several times as much as would fit: ZFS stops a writer some seconds late.
    let view = rig.view(CHILD, Access::ReadWrite);
    let mut file = fs::File::create(view.path("f")).unwrap();
    let piece = vec![3; MB as usize];
    let refused = (0..200).find_map(|_| file.write_all(&piece).and_then(|()| file.sync_data()).err());
    assert_eq!(refused.and_then(|e| e.raw_os_error()), Some(Errno::DQUOT.raw_os_error()));
    let written = file.metadata().unwrap().len();
    assert!((15 * MB..30 * MB).contains(&written), "{written} bytes were written");
    rig.driver.set_limits(CHILD, size(100 * MB)).unwrap();
    assert_eq!(rig.driver.limits(CHILD).unwrap(), size(100 * MB));
    file.write_all(&piece).and_then(|()| file.sync_data()).unwrap();
    let e = rig.driver.set_limits(CHILD, size(MB)).unwrap_err();
    assert!(e.kind() == ErrorKind::Unsupported && e.to_string().contains("already"), "{e}");
    assert_eq!(rig.driver.limits(CHILD).unwrap(), size(100 * MB));
    rig.driver.set_limits(CHILD, Limits::default()).unwrap();
    assert_eq!(rig.driver.limits(CHILD).unwrap(), Limits::default());
    file.write_all(&piece).unwrap();
    assert_eq!(rig.driver.set_limits(BASE, size(MB)).unwrap_err().kind(), ErrorKind::InvalidInput);
}

#[test]
fn datasets_are_limited_read_and_listed() {
    in_guest!("datasets_are_limited_read_and_listed");
    let place = Place::new().unwrap();
    let tree = Path::new(&place.dataset);
    let limits = Limits { size: Some(ByteSize(9 * MB)), inodes: None };
    RefQuota.set(tree, limits).unwrap();
    let state = RefQuota.read(tree).unwrap();
    assert_eq!(state.limits, limits);
    assert!(state.used.bytes > 0 && state.used.inodes > 0);
    assert!(RefQuota.list().unwrap().iter().any(|(path, state)| path == tree && state.limits == limits));
    RefQuota.remove(tree).unwrap();
    assert_eq!(RefQuota.read(tree).unwrap().limits, Limits::default());
    RefQuota.remove(&tree.join("gone")).unwrap();
    assert_eq!(RefQuota.read(&tree.join("gone")).unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn what_was_begun_when_the_store_was_made_is_finished() {
    in_guest!("what_was_begun_when_the_store_was_made_is_finished");
    let rig = Rig::new();
    let root = root_of(rig.place.home.path()).unwrap();
    let again = || Zfs::open(rig.place.home.path(), &rig.place.options());
    for gone in [vec!["empty@committed"], vec!["empty@committed", "empty"]] {
        gone.iter().for_each(|name| drop(zfs(&["destroy", &format!("{root}/{name}")]).unwrap()));
        let making = format!("graphdriver zfs 1\nmaking {root}\n");
        fs::write(rig.place.home.path().join("version"), making).unwrap();
        assert_eq!(again().unwrap().dataset(), root);
        assert_eq!(root_of(rig.place.home.path()).unwrap(), root);
        assert_eq!(rig.everything(), ["empty", "empty@committed"]);
    }
    let row = list(&["atime", "xattr", "acltype", "mountpoint"], &[&root]).unwrap().remove(0);
    assert_eq!((row.values[0].as_str(), row.values[2].as_str(), row.values[3].as_str()), ("off", "posix", "legacy"));
    // Layers that are lost are not silently none.
    zfs(&["destroy", "-r", &root]).unwrap();
    let e = again().unwrap_err();
    assert!(e.kind() == ErrorKind::NotFound && e.to_string().contains("zpool import"), "{e}");
}

#[test]
fn another_dataset_is_refused_and_what_is_missing_is_named() {
    in_guest!("another_dataset_is_refused_and_what_is_missing_is_named");
    let rig = Rig::new();
    let with = |name: &str| Options(vec![("zfs.fsname".into(), name.into())]);
    let (pool, _) = rig.place.dataset.split_once('/').unwrap();
    let e = Zfs::open(rig.place.home.path(), &with(pool)).unwrap_err();
    assert!(e.kind() == ErrorKind::InvalidInput && e.to_string().contains(&rig.place.dataset), "{e}");
    let elsewhere = tempfile::tempdir().unwrap();
    let unmet = (FACTORY.probe)(elsewhere.path(), &with("nosuchpool/x")).unwrap_err();
    assert!(unmet.missing.contains("nosuchpool/x") && unmet.remedy.contains("zpool import nosuchpool"), "{unmet:?}");
    let unmet = (FACTORY.probe)(elsewhere.path(), &Options::default()).unwrap_err();
    assert!(unmet.missing.contains("not on ZFS") && unmet.remedy.contains("zfs.fsname"), "{unmet:?}");
    (FACTORY.probe)(elsewhere.path(), &with(pool)).unwrap();
    assert_eq!(fs::read_dir(elsewhere.path()).unwrap().count(), 0, "a probe leaves nothing");
}

/// In a mount namespace of a thread's own, which takes its mounts with it.
fn in_namespace(run: impl FnOnce() + Send) {
    let work = || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS | nix::sched::CloneFlags::CLONE_FS).unwrap();
        let private = rustix::mount::MountPropagationFlags::PRIVATE | rustix::mount::MountPropagationFlags::REC;
        rustix::mount::mount_change("/", private).unwrap();
        run();
    };
    let done = std::thread::scope(|scope| scope.spawn(work).join());
    done.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}

#[test]
fn the_dataset_that_holds_the_data_root_is_found() {
    in_guest!("the_dataset_that_holds_the_data_root_is_found");
    let place = Place::new().unwrap();
    in_namespace(|| {
        zfs(&["set", "mountpoint=legacy", &place.dataset]).unwrap();
        let dir = place.home.path().join("data");
        fs::create_dir(&dir).unwrap();
        rustix::mount::mount(&place.dataset, &dir, "zfs", MountFlags::empty(), None).unwrap();
        let driver = Zfs::open(&dir.join("home"), &Options::default()).unwrap();
        assert!(driver.dataset().starts_with(&format!("{}/graphdriver-", place.dataset)), "{}", driver.dataset());
        driver.create(BASE, &[], PLAIN).unwrap();
        driver.remove(BASE).unwrap();
        mount::unmount(&dir, false).unwrap();
    });
}

#[test]
fn a_copied_data_root_is_refused_and_a_moved_one_told_how_to_go_on() {
    in_guest!("a_copied_data_root_is_refused_and_a_moved_one_told_how_to_go_on");
    let rig = Rig::new();
    rig.base(|view| view.write("f", b"1"));
    let elsewhere = tempfile::tempdir().unwrap();
    fs::copy(rig.place.home.path().join("version"), elsewhere.path().join("version")).unwrap();
    let open = |home: &Path| Zfs::open(home, &rig.place.options());
    let e = open(elsewhere.path()).unwrap_err();
    let mend = format!("zfs set org.graphdriver:home={} {}", elsewhere.path().display(), rig.driver.dataset());
    assert_eq!(e.kind(), ErrorKind::InvalidInput);
    for part in [rig.place.home.path().to_str().unwrap(), &mend] {
        assert!(e.to_string().contains(part), "{e}");
    }
    assert_eq!(rig.everything(), ["1", "1@committed", "empty", "empty@committed"]);
    // The same directory by another name is no copy.
    let link = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(rig.place.home.path(), link.path().join("home")).unwrap();
    open(&link.path().join("home")).unwrap();
    zfs(&mend.split(' ').skip(1).collect::<Vec<_>>()).unwrap();
    open(elsewhere.path()).unwrap();
    assert_eq!(open(rig.place.home.path()).unwrap_err().kind(), ErrorKind::InvalidInput, "there is one owner");
}

#[test]
fn freeing_leftovers_goes_on_after_one_that_is_in_use() {
    in_guest!("freeing_leftovers_goes_on_after_one_that_is_in_use");
    let rig = Rig::new();
    [BASE, CHILD, LayerId(3)].iter().for_each(|id| rig.driver.create(*id, &[], PLAIN).unwrap());
    let held = rig.view(CHILD, Access::ReadWrite);
    let e = rig.driver.reclaim(&|_| false).unwrap_err();
    assert!(e.kind() == ErrorKind::Busy && e.to_string().contains("/2"), "{e}");
    assert_eq!(rig.everything(), ["2", "empty", "empty@committed"]);
    drop(held);
    assert_eq!(rig.driver.reclaim(&|_| false).unwrap().layers, 1);
    assert_eq!(rig.everything(), ["empty", "empty@committed"]);
}

#[test]
fn mount_options_are_those_of_every_mount() {
    in_guest!("mount_options_are_those_of_every_mount");
    let place = Place::new().unwrap();
    let mut options = place.options();
    let given = "nodev,noexec,nosuid,nosymfollow,noatime,nodiratime";
    options.0.push(("zfs.mountopt".into(), given.into()));
    let rig = Rig { driver: Zfs::open(place.home.path(), &options).unwrap(), place };
    let wanted = StatVfsMountFlags::NODEV | StatVfsMountFlags::NOEXEC | StatVfsMountFlags::NOATIME;
    let check = |access| {
        let recipe = rig.driver.mount(BASE, &[], access).unwrap();
        // A remount by mount(2) takes away what it does not name.
        for step in &recipe {
            assert!(given.split(',').all(|wish| step.options.iter().any(|o| o == wish)), "{step:?}");
        }
        let flags = rustix::fs::fstatvfs(&rig.view(BASE, access).0).unwrap().f_flag;
        assert!(flags.contains(wanted), "{access:?}: {flags:?}");
        assert_eq!(flags.contains(StatVfsMountFlags::RDONLY), access == Access::ReadOnly);
    };
    rig.driver.create(BASE, &[], PLAIN).unwrap();
    check(Access::ReadWrite);
    check(Access::ReadOnly);
    rig.driver.commit(BASE).unwrap();
    check(Access::ReadOnly);
}

#[test]
fn a_layer_goes_with_the_datasets_that_somebody_made_in_it() {
    in_guest!("a_layer_goes_with_the_datasets_that_somebody_made_in_it");
    let rig = Rig::new();
    rig.driver.create(BASE, &[], PLAIN).unwrap();
    let own = |name: &str| format!("{}/1/{name}", rig.driver.dataset());
    for name in ["a", "a/b", "c"] {
        zfs(&["create", &own(name)]).unwrap();
        zfs(&["snapshot", &own(&format!("{name}@s"))]).unwrap();
    }
    rig.driver.remove(BASE).unwrap();
    assert_eq!(rig.everything(), ["empty", "empty@committed"]);
}

#[test]
fn native_diff_takes_its_time_where_a_mount_of_the_layer_is_covered() {
    in_guest!("native_diff_takes_its_time_where_a_mount_of_the_layer_is_covered");
    let rig = Rig::new();
    rig.base(|view| view.write("f", b"1"));
    rig.driver.create(CHILD, &[BASE], PLAIN).unwrap();
    rig.view(CHILD, Access::ReadWrite).write("g", b"2");
    assert!(rig.check_diff(&["g"]));
    let outer = tempfile::tempdir().unwrap();
    let inner = outer.path().join("inner");
    fs::create_dir(&inner).unwrap();
    let mount = |what: &str, fstype: &str, on: &Path| {
        rustix::mount::mount(what, on, fstype, MountFlags::empty(), None).unwrap();
    };
    in_namespace(|| {
        mount(&format!("{}/2", rig.driver.dataset()), "zfs", &inner);
        // Once its mount point is not there, once it is no mount point, once another one.
        for covered in [outer.path(), &inner] {
            mount("none", "tmpfs", covered);
            assert!(!rig.check_diff(&["g"]), "with {} covered", covered.display());
            fs::create_dir(&inner).ok();
            assert!(!rig.check_diff(&["g"]), "with {} covered", covered.display());
            mount::unmount(covered, false).unwrap();
        }
        assert!(rig.check_diff(&["g"]));
        mount::unmount(&inner, false).unwrap();
    });
}

#[test]
fn the_unit_of_redirection_is_the_stores_own() {
    in_guest!("the_unit_of_redirection_is_the_stores_own");
    let rig = Rig::new();
    zfs(&["set", "recordsize=16K", rig.driver.dataset()]).unwrap();
    let unit = WriteStrategy::RedirectOnWrite { block: 16 << 10 };
    let home = rig.place.home.path();
    assert_eq!(Zfs::open(home, &rig.place.options()).unwrap().capabilities().write_strategy, unit);
    assert_eq!((FACTORY.probe)(home, &rig.place.options()).unwrap().write_strategy, unit);
}

#[test]
fn a_commit_that_nobody_was_told_of_is_undone() {
    in_guest!("a_commit_that_nobody_was_told_of_is_undone");
    let rig = Rig::new();
    rig.base(|view| view.write("f", b"1"));
    rig.driver.thaw(BASE).unwrap();
    rig.view(BASE, Access::ReadWrite).write("f", b"2");
    rig.driver.thaw(BASE).unwrap();
    assert_eq!(rig.everything(), ["1", "empty", "empty@committed"]);
    // Half undone, or half committed.
    zfs(&["set", "readonly=on", &format!("{}/1", rig.driver.dataset())]).unwrap();
    rig.driver.thaw(BASE).unwrap();
    rig.view(BASE, Access::ReadWrite).write("g", b"3");
    rig.driver.commit(BASE).unwrap();
    let view = rig.view(BASE, Access::ReadOnly);
    assert_eq!((fs::read(view.path("f")).unwrap(), fs::read(view.path("g")).unwrap()), (b"2".into(), b"3".into()));
    assert_eq!(rig.driver.thaw(LayerId(9)).unwrap_err().kind(), ErrorKind::NotFound);
}
