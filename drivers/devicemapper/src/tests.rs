//! Crashes at every step, on a real pool.

use crate::{DeviceMapper, metadata::Metadata, pool::Turn, state::State};
use graphdriver_core::{
    Access, ByteSize, Error, ErrorKind, GraphDriver, LayerId, LayerOptions, Limits, Options, Result, mount,
};
use std::{cell::Cell, path::Path, process::Command};
use tempfile::TempDir;

#[allow(dead_code)] // What else it has is for tests that need no guest.
#[path = "../../../tests/skip/mod.rs"]
mod skip;

thread_local! {
    static LEFT: Cell<Option<u64>> = const { Cell::new(None) };
}

/// Once no steps are left, nothing is done any more by this thread, cleaning up neither.
pub(crate) fn step() -> Result<()> {
    match LEFT.get() {
        None => Ok(()),
        Some(0) => Err(Error::new(ErrorKind::Io, "crashed")),
        Some(left) => {
            LEFT.set(Some(left - 1));
            Ok(())
        }
    }
}

/// What `run` gives if the world ends after so many steps; None if it did.
fn crash_after<T>(steps: u64, run: impl FnOnce() -> T) -> Option<T> {
    LEFT.set(Some(steps));
    let done = run();
    let crashed = LEFT.get() == Some(0);
    LEFT.set(None);
    (!crashed).then_some(done)
}

fn no_devicemapper() -> Option<String> {
    (!Path::new("/dev/mapper/control").exists()).then(|| "the kernel has no device-mapper".into())
}

const SIZE: u64 = 32 << 20;

/// Layers of 32 MiB on a small loop pool, all of it gone in the end.
struct Rig {
    driver: Option<DeviceMapper>,
    options: Options,
    dir: TempDir,
}

impl Rig {
    fn new() -> Rig {
        Rig::on(&[("dm.loopdatasize", "1G"), ("dm.loopmetadatasize", "4M")])
    }

    fn on(pool: &[(&str, &str)]) -> Rig {
        let size = SIZE.to_string();
        let all = [&[("dm.fs", "ext4"), ("dm.basesize", &size)], pool].concat();
        let options = Options(all.iter().map(|(n, v)| (n.to_string(), v.to_string())).collect());
        let mut rig = Rig { driver: None, options, dir: TempDir::with_prefix("graphdriver-dm-").unwrap() };
        rig.reopen();
        rig
    }

    fn home(&self) -> &Path {
        self.dir.path()
    }

    fn open(&self) -> Result<DeviceMapper> {
        DeviceMapper::open(self.home(), &self.options)
    }

    /// As the next process does, where the last one had no time to close it.
    fn reopen(&mut self) {
        if let Some(old) = self.driver.take() {
            crash_after(0, || drop(old));
        }
        self.driver = Some(self.open().unwrap());
    }

    fn driver(&self) -> &DeviceMapper {
        self.driver.as_ref().unwrap()
    }

    /// The pool has the thin devices that the state knows, and no others, says our own reader and thin_ls.
    fn check(&self) -> State {
        let pool = &self.driver().layers.pool;
        let mut turn: Turn<'_> = pool.turn().unwrap();
        turn.ready().unwrap();
        assert_eq!(turn.state.intent, None);
        assert_eq!(turn.state.transaction, turn.status().unwrap().transaction);
        let found = turn.with_metadata(|metadata: &Metadata| Ok(metadata.thin_devices())).unwrap();
        let state = turn.state.clone();
        let mut known: Vec<u64> = state.layers.values().map(|layer| layer.thin.into()).collect();
        known.extend(state.base.iter().map(|base| u64::from(base.thin)));
        known.sort();
        assert_eq!(found, known, "thin devices in the pool, and in pool.json");
        assert_eq!(thin_ls(&turn), known);
        state
    }

    fn names(&self, id: LayerId) -> Vec<String> {
        let root = mount::detached(&self.driver().mount(id, &[], Access::ReadOnly).unwrap()).unwrap();
        let dir = rustix::fs::openat(&root, ".", rustix::fs::OFlags::RDONLY, rustix::fs::Mode::empty()).unwrap();
        let names = rustix::fs::Dir::new(dir).unwrap().map(|entry| entry.unwrap().file_name().to_string_lossy().into());
        let mut names: Vec<String> = names.filter(|name: &String| !name.starts_with('.')).collect();
        names.sort();
        names
    }

    fn write(&self, id: LayerId, name: &str) {
        let root = mount::detached(&self.driver().mount(id, &[], Access::ReadWrite).unwrap()).unwrap();
        let flags = rustix::fs::OFlags::CREATE | rustix::fs::OFlags::WRONLY;
        rustix::fs::openat(&root, name, flags, rustix::fs::Mode::RUSR).unwrap();
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        LEFT.set(None);
        drop(self.driver.take());
        let Ok(Some(state)) = State::load(self.home()) else { return };
        let out = Command::new("dmsetup").arg("ls").output().expect("dmsetup is installed");
        let all = String::from_utf8_lossy(&out.stdout).into_owned();
        let ours = all.lines().filter_map(|line| line.split_whitespace().next());
        let mut ours: Vec<_> = ours.filter(|name| name.starts_with(&state.prefix())).collect();
        ours.sort_by_key(|name| ["pool", "tdata", "tmeta"].iter().position(|part| name.ends_with(part)));
        for name in ours.iter().rev() {
            let _ = Command::new("dmsetup").args(["resume", name]).status();
        }
        for name in ours {
            let _ = Command::new("dmsetup").args(["remove", "--retry", name]).status();
        }
    }
}

/// The numbers that thin_ls(8) finds in a metadata snapshot.
fn thin_ls(turn: &Turn<'_>) -> Vec<u64> {
    let pool = turn.state.pool_name();
    let message = |text: &str| {
        assert!(Command::new("dmsetup").args(["message", &pool, "0", text]).status().unwrap().success(), "{text}");
    };
    message("reserve_metadata_snap");
    let kernel = crate::dm::Kernel::open().unwrap();
    let (metadata, _) = crate::storage::devices(&kernel, &pool).unwrap();
    let out = Command::new("thin_ls").args(["--no-headers", "-o", "DEV", "-m"]).arg(metadata).output().unwrap();
    message("release_metadata_snap");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let text = String::from_utf8_lossy(&out.stdout);
    let mut found: Vec<u64> = text.split_whitespace().map(|number| number.parse().unwrap()).collect();
    found.sort();
    found
}

const A: LayerId = LayerId(1);
const B: LayerId = LayerId(2);

fn plain() -> LayerOptions {
    LayerOptions::default()
}

/// For every number of steps: puts things in order, and crashes `run` after so many, until it gets through. What `after`
/// looks at has to hold after each crash. Gives how many crashes there were.
fn crash_everywhere(
    rig: &mut Rig,
    prepare: impl Fn(&mut Rig),
    run: impl Fn(&DeviceMapper) -> Result<()>,
    after: impl Fn(&Rig),
) -> u64 {
    for steps in 0.. {
        prepare(rig);
        let done = crash_after(steps, || run(rig.driver()));
        if let Some(done) = done {
            done.unwrap();
            return steps;
        }
        rig.reopen();
        rig.check();
        after(rig);
    }
    unreachable!("the steps end")
}

macro_rules! needs_guest {
    ($test:literal) => {
        if skip::skipped_outside_guest($test, no_devicemapper()) {
            return;
        }
    };
}

#[test]
fn a_crash_at_any_step_of_making_a_layer_leaks_and_loses_nothing() {
    needs_guest!("a_crash_at_any_step_of_making_a_layer_leaks_and_loses_nothing");
    let mut rig = Rig::new();
    rig.check();
    let close = |rig: &mut Rig| {
        rig.driver().remove(A).unwrap();
        // Closed in order and without layers, it forgets the formatted device.
        rig.driver = None;
        rig.reopen();
    };
    let crashes = crash_everywhere(&mut rig, close, |driver| driver.create(A, &[], &plain()), |_| {});
    assert!(crashes > 20, "{crashes}");
    rig.write(A, "kept");
    rig.driver().commit(A).unwrap();
    let sized = LayerOptions { size: Some(ByteSize(SIZE * 2)), ..plain() };
    let crashes = crash_everywhere(
        &mut rig,
        |rig| rig.driver().remove(B).unwrap(),
        |driver| driver.create(B, &[A], &sized),
        |rig| assert_eq!(rig.names(A), ["kept"]),
    );
    assert!(crashes > 10, "{crashes}");
    assert_eq!(rig.names(B), ["kept"]);
    assert_eq!(rig.check().layers.len(), 2);
    assert_eq!(rig.driver().limits(B).unwrap().size, Some(ByteSize(SIZE * 2)));
}

#[test]
fn a_crash_at_any_step_of_commit_or_removal_leaks_and_loses_nothing() {
    needs_guest!("a_crash_at_any_step_of_commit_or_removal_leaks_and_loses_nothing");
    let mut rig = Rig::new();
    rig.driver().create(A, &[], &plain()).unwrap();
    rig.write(A, "kept");
    let kept = |rig: &Rig| assert_eq!(rig.names(A), ["kept"]);
    let crashes = crash_everywhere(&mut rig, |_| {}, |driver| driver.commit(A), kept);
    assert!(crashes > 5, "{crashes}");
    let made = |rig: &mut Rig| match rig.driver().create(B, &[A], &plain()) {
        Ok(()) => rig.write(B, "more"),
        Err(e) => assert_eq!(e.kind(), ErrorKind::AlreadyExists, "{e}"),
    };
    let crashes = crash_everywhere(&mut rig, made, |driver| driver.remove(B), kept);
    assert!(crashes > 10, "{crashes}");
    assert_eq!(rig.check().layers.len(), 1);
    assert_eq!(rig.driver().mount(B, &[A], Access::ReadOnly).unwrap_err().kind(), ErrorKind::NotFound);
    rig.driver().remove(A).unwrap();
    assert_eq!(rig.check().layers.len(), 0);
}

#[test]
fn a_crash_at_any_step_of_growing_leaves_no_device_suspended() {
    needs_guest!("a_crash_at_any_step_of_growing_leaves_no_device_suspended");
    let mut rig = Rig::new();
    rig.driver().create(A, &[], &plain()).unwrap();
    let size = Cell::new(SIZE);
    let limits = || Limits { size: Some(ByteSize(size.get())), inodes: None };
    let crashes = crash_everywhere(
        &mut rig,
        |_| size.set(size.get() + SIZE),
        |driver| driver.set_limits(A, limits()),
        |rig| rig.write(A, "on"),
    );
    assert!(crashes > 8, "{crashes}");
    assert_eq!(rig.driver().limits(A).unwrap(), limits());
    let root = mount::detached(&rig.driver().mount(A, &[], Access::ReadOnly).unwrap()).unwrap();
    let space = rustix::fs::fstatvfs(&root).unwrap();
    assert!(space.f_blocks * space.f_frsize > size.get() / 2, "the filesystem has grown with its device");
}

#[test]
fn a_pool_at_another_transaction_is_refused() {
    needs_guest!("a_pool_at_another_transaction_is_refused");
    let mut rig = Rig::new();
    rig.driver().create(A, &[], &plain()).unwrap();
    let older = State::load(rig.home()).unwrap().unwrap();
    rig.driver().create(B, &[], &plain()).unwrap();
    let now = State::load(rig.home()).unwrap().unwrap();
    crash_after(0, || drop(rig.driver.take()));
    older.save(rig.home()).unwrap();
    let e = rig.open().err().expect("a state from a backup is refused");
    assert_eq!(e.kind(), ErrorKind::Corrupt);
    assert!(e.to_string().contains("transaction 3") && e.to_string().contains("backup"), "{e}");
    now.save(rig.home()).unwrap();
    rig.reopen();
    rig.check();
}

#[test]
fn a_crash_at_any_step_of_closing_leaves_no_wiped_base() {
    needs_guest!("a_crash_at_any_step_of_closing_leaves_no_wiped_base");
    let mut rig = Rig::new();
    let usable = |rig: &Rig| {
        rig.driver().create(A, &[], &plain()).unwrap();
        rig.write(A, "f");
    };
    let emptied = |rig: &mut Rig| {
        // What a crash has left of the pool's device is set up again.
        rig.reopen();
        usable(rig);
        rig.driver().remove(A).unwrap();
    };
    let close = |driver: &DeviceMapper| driver.layers.close();
    let after = |rig: &Rig| {
        usable(rig);
        rig.driver().remove(A).unwrap();
    };
    let crashes = crash_everywhere(&mut rig, emptied, close, after);
    assert!(crashes > 10, "{crashes}");
}

#[test]
fn a_crash_at_any_step_of_changing_the_base_leaves_no_wiped_base() {
    needs_guest!("a_crash_at_any_step_of_changing_the_base_leaves_no_wiped_base");
    let mut rig = Rig::new();
    rig.driver().create(A, &[], &plain()).unwrap();
    let options = rig.options.clone();
    let home = rig.home().to_owned();
    let larger = |_: &DeviceMapper| {
        let mut options = options.clone();
        options.0.retain(|(name, _)| name != "dm.basesize");
        options.0.push(("dm.basesize".into(), (SIZE * 2).to_string()));
        DeviceMapper::open(&home, &options)?.create(B, &[], &plain())
    };
    let again = |rig: &mut Rig| {
        rig.driver().remove(B).unwrap();
        rig.driver().create(B, &[], &plain()).unwrap();
        rig.driver().remove(B).unwrap();
    };
    let usable = |rig: &Rig| {
        rig.driver().remove(B).unwrap();
        rig.driver().create(B, &[], &plain()).unwrap();
        rig.write(B, "f");
    };
    let crashes = crash_everywhere(&mut rig, again, larger, usable);
    assert!(crashes > 20, "{crashes}");
}

/// A disk of 512 MiB, as a loop device.
struct Disk(String);

impl Disk {
    fn new(dir: &Path) -> Disk {
        let file = dir.join("disk");
        std::fs::File::create(&file).and_then(|file| file.set_len(512 << 20)).unwrap();
        let out = Command::new("losetup").args(["-f", "--show"]).arg(file).output().unwrap();
        Disk(String::from_utf8(out.stdout).unwrap().trim().to_owned())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).status();
    }
}

#[test]
fn a_crash_while_a_disk_is_divided_locks_nobody_out() {
    needs_guest!("a_crash_while_a_disk_is_divided_locks_nobody_out");
    let dir = TempDir::new().unwrap();
    for steps in 0.. {
        let disk = Disk::new(dir.path());
        let home = TempDir::with_prefix("graphdriver-dm-").unwrap();
        let pool = [("dm.directlvm_device", disk.0.as_str()), ("dm.fs", "ext4"), ("dm.basesize", "32M")];
        let options = Options(pool.map(|(n, v)| (n.into(), v.to_owned())).into());
        let opened = crash_after(steps, || DeviceMapper::open(home.path(), &options).map(drop));
        DeviceMapper::open(home.path(), &options).map(drop).unwrap_or_else(|e| panic!("after {steps} steps: {e}"));
        if let Some(opened) = opened {
            opened.unwrap();
            assert!(steps > 5, "{steps}");
            return;
        }
    }
}

#[test]
fn a_crash_at_any_step_of_extending_leaves_nothing_suspended() {
    needs_guest!("a_crash_at_any_step_of_extending_leaves_nothing_suspended");
    let dir = TempDir::new().unwrap();
    let disk = Disk::new(dir.path());
    // With a threshold that is always reached it grows each time.
    let rig = Rig::on(&[
        ("dm.directlvm_device", &disk.0),
        ("dm.thinp_percent", "30"),
        ("dm.thinp_autoextend_threshold", "1"),
        ("dm.thinp_autoextend_percent", "5"),
    ]);
    rig.driver().create(A, &[], &plain()).unwrap();
    let pool = &rig.driver().layers.pool;
    for steps in 0.. {
        let done = crash_after(steps, || pool.turn()?.extend());
        let state = State::load(rig.home()).unwrap().unwrap();
        crate::storage::set_up(&pool.kernel, rig.home(), &state).unwrap();
        for part in ["pool", "tdata", "tmeta"] {
            let info = pool.kernel.info(&format!("{}{part}", state.prefix())).unwrap().unwrap();
            assert!(!info.suspended, "{part} after {steps} steps");
        }
        if let Some(done) = done {
            done.unwrap();
            assert!(steps > 5, "{steps}");
            break;
        }
    }
}
