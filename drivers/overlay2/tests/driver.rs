//! The driver on this machine's real kernel. Mounts are detached, so that nothing outlives a test.

use graphdriver_core::{
    Access, Candidates, ErrorKind, GraphDriver, LayerId, LayerOptions, Mount, Options, OverlayXattrs, Result, StoredAs,
    mount,
};
use graphdriver_overlay2::{FACTORY, Overlay2};
use proptest::prelude::*;
use rustix::fs::{CWD, FileType, IFlags, Mode};
use std::{
    collections::BTreeMap,
    fs,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::{MetadataExt, PermissionsExt, symlink},
    },
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, SystemTime},
};

fn options(given: &[(&str, &str)]) -> Options {
    Options(given.iter().map(|(n, v)| (n.to_string(), v.to_string())).collect())
}

struct Rig {
    tmp: tempfile::TempDir,
    driver: Overlay2,
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

impl Rig {
    fn new() -> Rig {
        Rig::with(&[])
    }

    fn with(given: &[(&str, &str)]) -> Rig {
        let tmp = tempfile::tempdir().unwrap();
        let driver = Overlay2::open(&tmp.path().join("home"), &options(given)).unwrap();
        Rig { tmp, driver }
    }

    fn home(&self) -> PathBuf {
        self.tmp.path().join("home")
    }

    fn create(&self, id: u64, parents: &[u64]) -> Result<()> {
        self.driver.create(LayerId(id), &ids(parents), &LayerOptions::default())
    }

    fn commit(&self, id: u64) {
        self.driver.commit(LayerId(id)).unwrap();
    }

    /// A committed layer whose own directory `fill` has filled.
    fn layer(&self, id: u64, parents: &[u64], fill: impl FnOnce(&Path)) {
        self.create(id, parents).unwrap();
        fill(&self.diff(id));
        self.commit(id);
    }

    fn diff(&self, id: u64) -> PathBuf {
        self.driver.diff_dir(LayerId(id)).unwrap().path
    }

    fn view(&self, id: u64, parents: &[u64], access: Access) -> View {
        View::of(&self.driver.mount(LayerId(id), &ids(parents), access).unwrap())
    }

    fn names(&self) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(self.home()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

fn ids(numbers: &[u64]) -> Vec<LayerId> {
    numbers.iter().copied().map(LayerId).collect()
}

fn names(dir: PathBuf) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn lifecycle(rig: &Rig) {
    rig.layer(1, &[], |diff| {
        fs::create_dir(diff.join("etc")).unwrap();
        fs::write(diff.join("etc/hostname"), "image").unwrap();
        fs::write(diff.join("etc/gone"), "").unwrap();
    });
    rig.create(2, &[1]).unwrap();
    let rw = rig.view(2, &[1], Access::ReadWrite);
    fs::write(rw.join("etc/hostname"), "box").unwrap();
    fs::remove_file(rw.join("etc/gone")).unwrap();
    let live = rig.view(2, &[1], Access::ReadOnly);
    assert_eq!(names(live.join("etc")), ["hostname"]);
    fs::write(rw.join("etc/later"), "").unwrap();
    assert_eq!(names(live.join("etc")), ["hostname", "later"], "a live view shows what is written now");
    assert_eq!(fs::write(live.join("x"), "").unwrap_err().kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    drop((rw, live));

    rig.commit(2);
    rig.commit(2);
    let below = rig.view(1, &[], Access::ReadOnly);
    assert_eq!(fs::read_to_string(below.join("etc/hostname")).unwrap(), "image");
    assert_eq!(names(below.join("etc")), ["gone", "hostname"]);
    let above = rig.view(2, &[1], Access::ReadOnly);
    assert_eq!(fs::read_to_string(above.join("etc/hostname")).unwrap(), "box");
    let e = rig.driver.mount(LayerId(2), &ids(&[1]), Access::ReadWrite).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::InvalidInput, "{e}");
    drop((below, above));

    for id in [2, 1, 1, 7] {
        rig.driver.remove(LayerId(id)).unwrap();
    }
    assert_eq!(rig.names(), ["empty", "version"]);
}

#[test]
fn a_layer_lives_from_create_to_remove() {
    lifecycle(&Rig::new());
}

#[test]
fn a_commit_that_nobody_was_told_of_is_undone() {
    let rig = Rig::new();
    rig.layer(1, &[], |diff| fs::write(diff.join("f"), "1").unwrap());
    for text in ["2", "3"] {
        // Also of one that is active.
        for _ in 0..2 {
            rig.driver.thaw(LayerId(1)).unwrap();
        }
        fs::write(rig.view(1, &[], Access::ReadWrite).join("f"), text).unwrap();
        rig.commit(1);
        assert_eq!(fs::read_to_string(rig.view(1, &[], Access::ReadOnly).join("f")).unwrap(), text);
    }
    assert_eq!(rig.driver.thaw(LayerId(7)).unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(rig.names(), ["1", "empty", "version"]);
}

#[test]
fn works_below_a_path_with_separators_in_it() {
    let tmp = tempfile::tempdir().unwrap();
    let home = tmp.path().join("a:b,c\\d e").join("x".repeat(250));
    let driver = Overlay2::open(&home, &Options::default()).unwrap();
    fs::create_dir(tmp.path().join("home")).unwrap();
    driver.create(LayerId(1), &[], &LayerOptions::default()).unwrap();
    let recipe = driver.mount(LayerId(1), &[], Access::ReadWrite).unwrap();
    assert!(recipe[0].options[0].contains(r"a\:b\,c\\d e"), "{:?}", recipe[0].options);
    fs::write(View::of(&recipe).join("f"), "").unwrap();
    assert!(home.join("1/diff/f").exists());
}

#[test]
fn works_in_a_user_namespace_without_any_privilege() {
    if std::env::var_os("OVERLAY2_TEST_INNER").is_some() {
        let rig = Rig::new();
        assert_eq!(rig.driver.diff_dir(LayerId(1)).unwrap().xattrs, OverlayXattrs::User);
        let status: BTreeMap<_, _> = rig.driver.status().into_iter().collect();
        assert_eq!((status["userxattr"].as_str(), status["Using redirect_dir"].as_str()), ("true", "false"));
        lifecycle(&rig);
        opaque_directories(&rig);
        return;
    }
    let tmp = tempfile::tempdir().unwrap();
    fs::set_permissions(tmp.path(), fs::Permissions::from_mode(0o777)).unwrap();
    // The build directory may be closed to others. What another thread forks meanwhile would have a copy of ours open for
    // writing, with which nothing runs (ETXTBSY).
    let exe = tmp.path().join("test");
    let copied = Command::new("cp").arg(std::env::current_exe().unwrap()).arg(&exe).status().unwrap();
    assert!(copied.success());
    let ran = Command::new("setpriv")
        .args(["--reuid=1000", "--regid=1000", "--clear-groups", "unshare", "--map-root-user", "--mount"])
        .arg(exe)
        .args(["--exact", "works_in_a_user_namespace_without_any_privilege", "--nocapture"])
        .envs([("OVERLAY2_TEST_INNER", "1".as_ref()), ("TMPDIR", tmp.path().as_os_str())])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&ran.stdout);
    assert!(ran.status.success() && said.contains("1 passed"), "{said}{}", String::from_utf8_lossy(&ran.stderr));
}

fn opaque_directories(rig: &Rig) {
    rig.layer(11, &[], |diff| {
        fs::create_dir(diff.join("d")).unwrap();
        fs::write(diff.join("d/old"), "").unwrap();
    });
    rig.create(12, &[11]).unwrap();
    let rw = rig.view(12, &[11], Access::ReadWrite);
    fs::remove_dir_all(rw.join("d")).unwrap();
    fs::create_dir(rw.join("d")).unwrap();
    fs::write(rw.join("d/new"), "").unwrap();
    drop(rw);
    rig.commit(12);
    rig.create(13, &[12, 11]).unwrap();
    assert_eq!(names(rig.view(13, &[12, 11], Access::ReadWrite).join("d")), ["new"]);
    let narrow = rig.driver.native_diff().unwrap();
    let mut narrow = narrow.narrow(LayerId(12), &ids(&[11])).unwrap();
    assert_eq!(narrow.candidates(Path::new("d")).unwrap(), Candidates::All);
}

#[test]
fn a_directory_made_anew_hides_what_was_below() {
    opaque_directories(&Rig::new());
}

#[test]
fn an_opaque_root_hides_all_layers_below() {
    let rig = Rig::new();
    rig.layer(1, &[], |diff| fs::write(diff.join("old"), "").unwrap());
    rig.layer(2, &[1], |diff| {
        xattr::set(diff, "trusted.overlay.opaque", b"y").unwrap();
        fs::write(diff.join("new"), "").unwrap();
    });
    assert_eq!(names(rig.view(2, &[1], Access::ReadOnly).join("")), ["new"]);
    rig.create(3, &[2, 1]).unwrap();
    assert_eq!(names(rig.view(3, &[2, 1], Access::ReadWrite).join("")), ["new"]);
    assert_eq!(xattr::get(rig.diff(3), "trusted.overlay.opaque").unwrap(), None, "it is not inherited");
}

#[test]
fn the_root_of_a_new_layer_is_its_parents() {
    let rig = Rig::new();
    rig.layer(1, &[], |diff| {
        xattr::set(diff, "user.a", b"1").unwrap();
        xattr::set(diff, "trusted.overlay.overlay.nested", b"2").unwrap();
        std::os::unix::fs::chown(diff, Some(7), Some(8)).unwrap();
        fs::set_permissions(diff, fs::Permissions::from_mode(0o3711)).unwrap();
    });
    std::thread::sleep(std::time::Duration::from_millis(20));
    rig.create(2, &[1]).unwrap();
    for (id, parents, access) in [(2, &[1][..], Access::ReadOnly), (2, &[1], Access::ReadWrite)] {
        let (parent, child) = (rig.view(1, &[], Access::ReadOnly), rig.view(id, parents, access));
        let [a, b] = [parent.join("."), child.join(".")].map(|p| fs::metadata(p).unwrap());
        assert_eq!((a.mode(), a.uid(), a.gid()), (0o43711, 7, 8));
        assert_eq!((a.mode(), a.uid(), a.gid()), (b.mode(), b.uid(), b.gid()));
        assert_eq!((a.mtime(), a.mtime_nsec()), (b.mtime(), b.mtime_nsec()));
        assert_eq!(xattr::get(child.join("."), "user.a").unwrap().unwrap(), b"1");
        assert_eq!(xattr::get(child.join("."), "trusted.overlay.nested").unwrap().unwrap(), b"2");
    }
}

#[test]
fn renamed_directories_and_changed_modes_move_no_data_and_show_in_a_live_view() {
    let rig = Rig::new();
    rig.layer(1, &[], |diff| {
        fs::create_dir_all(diff.join("a/sub")).unwrap();
        fs::write(diff.join("a/sub/f"), "content").unwrap();
        fs::write(diff.join("big"), vec![7; 1 << 20]).unwrap();
    });
    rig.create(2, &[1]).unwrap();
    let rw = rig.view(2, &[1], Access::ReadWrite);
    fs::rename(rw.join("a"), rw.join("b")).unwrap();
    fs::rename(rw.join("b/sub"), rw.join("sub")).unwrap();
    fs::set_permissions(rw.join("big"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::rename(rw.join("big"), rw.join("large")).unwrap();
    let usage = rig.driver.usage(LayerId(2)).unwrap();
    assert!(usage.bytes < 1 << 19, "{usage:?}");
    let check = |view: View| {
        assert_eq!(names(view.join("")), ["b", "large", "sub"]);
        assert_eq!(fs::read_to_string(view.join("sub/f")).unwrap(), "content");
        assert_eq!(fs::read(view.join("large")).unwrap(), vec![7; 1 << 20]);
        assert_eq!(fs::metadata(view.join("large")).unwrap().mode() & 0o7777, 0o600);
    };
    check(rig.view(2, &[1], Access::ReadOnly));
    drop(rw);
    rig.commit(2);
    check(rig.view(2, &[1], Access::ReadOnly));
    rig.create(3, &[2, 1]).unwrap();
    check(rig.view(3, &[2, 1], Access::ReadWrite));
}

#[test]
fn as_many_parents_mount_as_promised_and_no_more_are_taken() {
    let rig = Rig::new();
    let max = rig.driver.capabilities().max_depth as u64;
    assert_eq!(max, 499);
    rig.layer(1, &[], |diff| fs::write(diff.join("first"), "").unwrap());
    for id in 2..=max + 1 {
        // What the chain is made of does not matter to the kernel, so that one root is enough to copy.
        rig.layer_without_flush(id);
    }
    let parents: Vec<u64> = (1..=max).rev().collect();
    rig.create(1000, &parents).unwrap();
    for access in [Access::ReadOnly, Access::ReadWrite] {
        assert!(rig.view(1000, &parents, access).join("first").exists());
    }
    let parents: Vec<u64> = (1..=max + 1).rev().collect();
    assert_eq!(rig.create(1001, &parents).unwrap_err().kind(), ErrorKind::Unsupported);
}

impl Rig {
    fn layer_without_flush(&self, id: u64) {
        self.create(id, &[1]).unwrap();
        fs::remove_dir(self.home().join(id.to_string()).join("work")).unwrap();
    }
}

#[test]
fn what_an_interrupted_call_left_is_in_nobodys_way_and_is_reclaimed() {
    let rig = Rig::new();
    for name in ["new-1/diff", "new-2/diff", "removed-9/diff", ".graphdriver-probe-dead", ".graphdriver-probe-live"] {
        fs::create_dir_all(rig.home().join(name)).unwrap();
    }
    let live = fs::File::open(rig.home().join(".graphdriver-probe-live")).unwrap();
    live.lock().unwrap();
    fs::write(rig.home().join("new-1/diff/half"), "").unwrap();
    rig.create(1, &[]).unwrap();
    assert!(names(rig.diff(1)).is_empty());
    assert_eq!(rig.create(1, &[]).unwrap_err().kind(), ErrorKind::AlreadyExists);
    rig.create(5, &[1]).unwrap();
    let freed = rig.driver.reclaim(&|id| id == LayerId(1)).unwrap();
    assert_eq!(freed.layers, 4, "new-2, removed-9, the dead probe, 5");
    assert_eq!(rig.names(), [".graphdriver-probe-live", "1", "empty", "version"]);
}

#[test]
fn a_trial_that_may_not_be_locked_yet_is_no_leftover() {
    let rig = Rig::new();
    let trial = rig.home().join(".graphdriver-probe-new");
    fs::create_dir(&trial).unwrap();
    assert_eq!(rig.driver.inventory().unwrap(), []);
    let before = SystemTime::now() - Duration::from_secs(120);
    fs::File::open(&trial).unwrap().set_modified(before).unwrap();
    let [found] = &rig.driver.inventory().unwrap()[..] else { panic!("the old trial, and nothing else") };
    assert_eq!(found.what, StoredAs::Leftover { of: None });
}

#[test]
fn deep_trees_immutable_files_and_hard_links_are_measured_once_and_removed() {
    let rig = Rig::new();
    rig.create(1, &[]).unwrap();
    let diff = rig.diff(1);
    fs::write(diff.join("f"), vec![1; 8192]).unwrap();
    fs::hard_link(diff.join("f"), diff.join("g")).unwrap();
    symlink("/etc", diff.join("link")).unwrap();
    rustix::fs::mknodat(CWD, diff.join("w"), FileType::CharacterDevice, Mode::empty(), 0).unwrap();
    let mut here: OwnedFd = fs::File::open(&diff).unwrap().into();
    for _ in 0..2000 {
        rustix::fs::mkdirat(&here, "a-rather-long-name", Mode::from(0o700)).unwrap();
        let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECTORY;
        here = rustix::fs::openat(&here, "a-rather-long-name", flags, Mode::empty()).unwrap();
    }
    let usage = rig.driver.usage(LayerId(1)).unwrap();
    assert_eq!(usage.inodes, 1 + 3 + 2000);
    assert!(usage.bytes >= 8192);
    fs::create_dir(diff.join("locked")).unwrap();
    fs::write(diff.join("locked/in"), "").unwrap();
    for path in ["f", "locked/in", "locked"] {
        let file = fs::File::open(diff.join(path)).unwrap();
        rustix::fs::ioctl_setflags(&file, IFlags::IMMUTABLE).unwrap();
    }
    rig.driver.remove(LayerId(1)).unwrap();
    assert_eq!(rig.names(), ["empty", "version"]);
    assert!(Path::new("/etc/passwd").exists());
}

#[test]
fn a_volatile_layer_can_be_mounted_again_and_is_refused_after_a_crash() {
    let rig = Rig::with(&[("overlay2.volatile", "on")]);
    rig.create(1, &[]).unwrap();
    let recipe = rig.driver.mount(LayerId(1), &[], Access::ReadWrite).unwrap();
    assert!(recipe[0].options.iter().any(|o| o == "volatile"));
    fs::write(View::of(&recipe).join("f"), "").unwrap();
    fs::write(rig.view(1, &[], Access::ReadWrite).join("g"), "").unwrap();
    let mark = rig.home().join("1/volatile");
    assert!(mark.exists());
    rig.driver.release(LayerId(1)).unwrap();
    assert!(!mark.exists());
    drop(rig.view(1, &[], Access::ReadWrite));

    fs::write(&mark, "another boot\n").unwrap();
    for done in [
        rig.driver.mount(LayerId(1), &[], Access::ReadWrite).map(drop),
        rig.driver.commit(LayerId(1)),
        rig.driver.release(LayerId(1)),
    ] {
        assert_eq!(done.unwrap_err().kind(), ErrorKind::Corrupt);
    }
    assert_eq!(names(rig.view(1, &[], Access::ReadOnly).join("")), ["f", "g"], "it can be salvaged");
    rig.driver.remove(LayerId(1)).unwrap();
}

#[test]
fn missing_layers_are_named() {
    let rig = Rig::new();
    rig.create(1, &[]).unwrap();
    for e in [
        rig.driver.mount(LayerId(1), &ids(&[42]), Access::ReadOnly).unwrap_err(),
        rig.driver.mount(LayerId(42), &[], Access::ReadWrite).unwrap_err(),
        rig.create(2, &[42]).unwrap_err(),
        rig.driver.commit(LayerId(42)).unwrap_err(),
        rig.driver.usage(LayerId(42)).unwrap_err(),
    ] {
        assert!(e.kind() == ErrorKind::NotFound && e.to_string().contains("layer 42"), "{e}");
    }
}

#[test]
fn options_hold_for_the_layers_they_were_given_for() {
    let rig = Rig::with(&[("overlay2.metacopy", "off")]);
    rig.create(1, &[]).unwrap();
    let recipe = rig.driver.mount(LayerId(1), &[], Access::ReadWrite).unwrap();
    assert!(!recipe[0].options.iter().any(|o| o.starts_with("metacopy")));
    assert_eq!(fs::read_to_string(rig.home().join("version")).unwrap(), include_str!("sample/version-redirect"));
    Overlay2::open(&rig.home(), &options(&[("overlay2.metacopy", "on")])).unwrap();
    assert_eq!(fs::read_to_string(rig.home().join("version")).unwrap(), include_str!("sample/version"));
    for name in ["overlay2.metacopy", "overlay2.redirect_dir"] {
        let e = Overlay2::open(&rig.home(), &options(&[(name, "off")])).unwrap_err();
        assert!(e.kind() == ErrorKind::Unsupported && e.to_string().contains("no longer"), "{e}");
    }
    let size = LayerOptions { size: Some("1G".parse().unwrap()), ..LayerOptions::default() };
    assert_eq!(rig.driver.create(LayerId(2), &[], &size).unwrap_err().kind(), ErrorKind::Unsupported);
    assert_eq!(rig.names(), ["1", "empty", "version"]);
}

/// What version 1 writes, kept as it was: `tests/sample` was made by a layer with a renamed directory and a deletion.
#[test]
fn a_data_root_of_version_1_is_read() {
    let tmp = tempfile::tempdir().unwrap();
    let home = tmp.path();
    fs::write(home.join("version"), include_str!("sample/version")).unwrap();
    for dir in ["empty", "1/diff/old/deep", "2/diff/new", "3/diff", "3/work"] {
        fs::create_dir_all(home.join(dir)).unwrap();
    }
    fs::write(home.join("1/diff/old/deep/f"), "f").unwrap();
    fs::write(home.join("1/diff/gone"), "").unwrap();
    for whiteout in ["2/diff/old", "2/diff/gone"] {
        rustix::fs::mknodat(CWD, home.join(whiteout), FileType::CharacterDevice, Mode::empty(), 0).unwrap();
    }
    xattr::set(home.join("2/diff/new"), "trusted.overlay.redirect", b"old").unwrap();
    let driver = Overlay2::open(home, &Options::default()).unwrap();
    let view = View::of(&driver.mount(LayerId(3), &ids(&[2, 1]), Access::ReadWrite).unwrap());
    assert_eq!(names(view.join("")), ["new"]);
    assert_eq!(fs::read_to_string(view.join("new/deep/f")).unwrap(), "f");
}

#[test]
fn probing_names_the_unmet_need_and_leaves_nothing_behind() {
    let tmp = tempfile::tempdir().unwrap();
    let found = (FACTORY.probe)(&tmp.path().join("not/there/yet"), &Options::default()).unwrap();
    assert!(found.independent_layers && found.native_diff && !found.quota);
    assert!(found.idmapped_mounts);
    assert!(names(tmp.path().into()).is_empty());

    let rig = Rig::new();
    rig.create(1, &[]).unwrap();
    let overlay = rig.view(1, &[], Access::ReadWrite);
    let unmet = (FACTORY.probe)(&overlay.join("root"), &Options::default()).unwrap_err();
    assert!(unmet.missing.starts_with("overlay at") || unmet.missing.contains("cannot hold"), "{unmet:?}");
    assert!(unmet.remedy.contains("ext4"), "{unmet:?}");
    assert!(names(overlay.join("")).is_empty());
    let unmet = (FACTORY.probe)(Path::new("/proc"), &Options::default()).unwrap_err();
    assert!(!unmet.missing.is_empty(), "{unmet:?}");
    let unmet = (FACTORY.probe)(tmp.path(), &options(&[("overlay2.size", "1G")])).unwrap_err();
    assert!(unmet.missing.contains("quota"), "{unmet:?}");
}

type Snapshot = BTreeMap<PathBuf, (u32, i64, Vec<u8>)>;

/// All that is below `dir`, with mode, time and content. `only` narrows it.
fn differences(dir: (&Path, &Path), at: &Path, only: Option<&mut dyn graphdriver_core::Narrow>, out: &mut Snapshot) {
    let mut only = only;
    let entries = |base: &Path| -> Vec<std::ffi::OsString> {
        fs::read_dir(base.join(at)).map_or(Vec::new(), |d| d.map(|e| e.unwrap().file_name()).collect())
    };
    let mut all = entries(dir.0);
    all.extend(entries(dir.1));
    all.sort();
    all.dedup();
    let both = dir.0.join(at).is_dir() && dir.1.join(at).is_dir();
    if let Some(narrow) = only.as_mut().filter(|_| both) {
        match narrow.candidates(at).unwrap() {
            Candidates::All => only = None,
            Candidates::Names(names) => all.retain(|name| names.contains(name)),
        }
    } else {
        only = None;
    }
    let look = |path: PathBuf| {
        let meta = path.symlink_metadata().ok()?;
        let content = if meta.is_file() { fs::read(path).unwrap() } else { Vec::new() };
        Some((meta.mode(), meta.mtime_nsec() + meta.mtime(), content))
    };
    for name in all {
        let path = at.join(name);
        let [new, old] = [dir.0, dir.1].map(|base| look(base.join(&path)));
        if new != old {
            out.insert(path.clone(), new.or(old).unwrap());
        }
        differences(dir, &path, only.as_mut().map(|n| &mut **n as &mut dyn graphdriver_core::Narrow), out);
    }
}

const NAMES: [&str; 4] = ["a", "b", "c", "d"];

fn some_path() -> impl Strategy<Value = String> {
    prop::collection::vec(prop::sample::select(&NAMES), 1..4).prop_map(|parts| parts.join("/"))
}

/// Operations as shell users do them; those that do not apply fail and change nothing.
fn operate(base: &Path, op: u8, one: &str, two: &str) {
    let (one, two) = (base.join(one), base.join(two));
    let _ = match op {
        0 => fs::create_dir_all(&one),
        1 => fs::write(&one, two.as_os_str().as_encoded_bytes()),
        2 => fs::remove_file(&one),
        3 => fs::remove_dir_all(&one),
        4 | 5 => fs::rename(&one, &two),
        6 => fs::set_permissions(&one, fs::Permissions::from_mode(0o750)),
        7 => fs::hard_link(&one, &two),
        _ => fs::remove_dir_all(&one).and_then(|()| fs::create_dir(&one)),
    };
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]
    /// With redirect_dir and metacopy: three layers of random changes, each compared with its parent both ways.
    #[test]
    fn native_diff_finds_what_a_full_comparison_finds(
        layers in prop::collection::vec(prop::collection::vec((0u8..9, some_path(), some_path()), 1..25), 3)
    ) {
        let rig = Rig::new();
        let mut parents: Vec<u64> = Vec::new();
        for (id, operations) in (1u64..).zip(layers) {
            rig.create(id, &parents).unwrap();
            let rw = rig.view(id, &parents, Access::ReadWrite);
            for (op, one, two) in operations {
                operate(&rw.join(""), op, &one, &two);
            }
            let view = rig.view(id, &parents, Access::ReadOnly);
            if let Some((top, rest)) = parents.split_first() {
                let parent = rig.view(*top, rest, Access::ReadOnly);
                let (mut full, mut narrowed) = (Snapshot::new(), Snapshot::new());
                let dirs = (view.join(""), parent.join(""));
                differences((&dirs.0, &dirs.1), Path::new(""), None, &mut full);
                let mut narrow = rig.driver.native_diff().unwrap().narrow(LayerId(id), &ids(&parents)).unwrap();
                differences((&dirs.0, &dirs.1), Path::new(""), Some(&mut *narrow), &mut narrowed);
                prop_assert_eq!(full, narrowed);
            }
            parents.insert(0, id);
        }
    }
}
