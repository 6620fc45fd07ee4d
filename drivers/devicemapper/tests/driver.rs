//! What is this driver's own: space, limits, full pools, devices of several kinds, who has what active.

mod common;
#[path = "../../../tests/skip/mod.rs"]
#[allow(dead_code)] // What else it has is for tests that need no guest.
mod skip;

use common::{BASE_SIZE, Pool, Rig, no_devicemapper, run};
use graphdriver_core::{
    Access, ByteSize, Candidates, ErrorKind, GraphDriver, LayerId, LayerOptions, Limits, Options, Result, mount,
};
use graphdriver_devicemapper::{DeviceMapper, FACTORY};
use rustix::{
    fs::{Mode, OFlags},
    io::Errno,
};
use std::{
    fs::File,
    os::{
        fd::OwnedFd,
        unix::fs::{FileExt, MetadataExt},
    },
    path::Path,
};

macro_rules! needs_guest {
    ($test:literal) => {
        if skip::skipped_outside_guest($test, no_devicemapper()) {
            return;
        }
    };
}

const A: LayerId = LayerId(1);
const B: LayerId = LayerId(2);
const C: LayerId = LayerId(3);
const MIB: u64 = 1 << 20;
const XFS: (&str, &str) = ("dm.fs", "xfs");
/// Small, and made fast.
const EXT4: &[(&str, &str)] = &[("dm.fs", "ext4"), ("dm.basesize", "64M")];

fn plain() -> LayerOptions {
    LayerOptions::default()
}

fn sized(bytes: u64) -> LayerOptions {
    LayerOptions { size: Some(ByteSize(bytes)), ..plain() }
}

fn kind<T>(result: Result<T>) -> ErrorKind {
    result.err().expect("this must be refused").kind()
}

fn show(rig: &Rig, id: LayerId, access: Access) -> OwnedFd {
    mount::detached(&rig.driver().mount(id, &[], access).unwrap()).unwrap()
}

/// What files are full of.
fn pattern() -> Vec<u8> {
    (0..MIB).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

/// Writes random bytes and waits until they are on the pool.
fn fill(root: &OwnedFd, name: &str, bytes: u64) -> std::io::Result<()> {
    let flags = OFlags::CREATE | OFlags::RDWR;
    let file = File::from(rustix::fs::openat(root, name, flags, Mode::RUSR | Mode::WUSR)?);
    let piece = pattern();
    (0..bytes / MIB).try_for_each(|n| file.write_all_at(&piece, n * MIB))?;
    file.sync_all()
}

fn read(rig: &Rig, id: LayerId, name: &str) -> std::io::Result<u64> {
    let root = show(rig, id, Access::ReadOnly);
    let mut file = File::from(rustix::fs::openat(&root, name, OFlags::RDONLY, Mode::empty())?);
    std::io::copy(&mut file, &mut std::io::sink())
}

fn full(result: std::io::Result<()>) -> bool {
    matches!(result.map_err(|e| e.raw_os_error()), Err(Some(e)) if e == Errno::NOSPC.raw_os_error() || e == Errno::IO.raw_os_error())
}

fn allocated(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().blocks() * 512
}

#[test]
fn a_host_without_device_mapper_is_told_what_is_missing() {
    if no_devicemapper().is_none() {
        return;
    }
    let home = tempfile::tempdir().unwrap();
    let unmet = (FACTORY.probe)(&home.path().join("home"), &Options::default()).unwrap_err();
    let root = rustix::process::geteuid().is_root();
    let (missing, remedy) = if root { ("no device-mapper", "modprobe dm_thin_pool") } else { ("root", "root") };
    assert!(unmet.missing.contains(missing) && unmet.remedy.contains(remedy), "{unmet:?}");
    let e = DeviceMapper::open(&home.path().join("home"), &Options::default()).err().unwrap();
    assert!(e.to_string().contains("CONFIG_DM_THIN_PROVISIONING"), "{e}");
    assert!(!home.path().join("home").exists(), "a refused opening leaves nothing");
}

#[test]
fn removed_layers_give_the_loop_files_space_back() {
    needs_guest!("removed_layers_give_the_loop_files_space_back");
    let mut rig = Rig::new(Pool::Loop, EXT4).unwrap();
    rig.driver().create(A, &[], &plain()).unwrap();
    let data = rig.home().join("data");
    let before = allocated(&data);
    fill(&show(&rig, A, Access::ReadWrite), "big", 40 * MIB).unwrap();
    rig.driver().commit(A).unwrap();
    assert!(allocated(&data) > before + 40 * MIB);
    rig.driver().remove(A).unwrap();
    assert!(allocated(&data) <= before + MIB, "{} bytes, and {before} before", allocated(&data));
    rig.close();
    assert!(allocated(&data) < MIB, "without layers even the formatted device is gone: {}", allocated(&data));
    assert_eq!(rig.devices(), [""; 0], "and the pool sleeps");
    rig.reopen_with("dm.blkdiscard", "false").unwrap();
    rig.driver().create(A, &[], &plain()).unwrap();
    fill(&show(&rig, A, Access::ReadWrite), "big", 40 * MIB).unwrap();
    rig.driver().remove(A).unwrap();
    assert!(allocated(&data) > 40 * MIB, "unless the user wants the space kept");
}

#[test]
fn devices_sleep_when_nobody_uses_them() {
    needs_guest!("devices_sleep_when_nobody_uses_them");
    let mut rig = Rig::new(Pool::Loop, EXT4).unwrap();
    rig.driver().create(A, &[], &plain()).unwrap();
    let awake = |rig: &Rig| rig.devices().len() - 1;
    assert_eq!(awake(&rig), 0);
    let shown = show(&rig, A, Access::ReadWrite);
    rig.driver().release(A).unwrap();
    assert_eq!(awake(&rig), 1, "it is mounted");
    drop(shown);
    rig.driver().release(A).unwrap();
    assert_eq!(awake(&rig), 0);
    drop(show(&rig, A, Access::ReadWrite));
    assert_eq!(awake(&rig), 1);
    // Another process opens and closes the pool meanwhile, and this one may be about to mount.
    let other = DeviceMapper::open(&rig.home(), &Options::default()).unwrap();
    drop(other);
    assert_eq!(awake(&rig), 1);
    rig.close();
    assert_eq!(awake(&rig), 0);
    rig.reopen_with("dm.use_deferred_removal", "true").unwrap();
    let shown = show(&rig, A, Access::ReadWrite);
    rig.driver().release(A).unwrap();
    assert_eq!(awake(&rig), 1);
    fill(&show(&rig, A, Access::ReadWrite), "f", MIB).unwrap();
    drop(shown);
    assert_eq!(awake(&rig), 1, "mounting again took the removal back");
    let shown = show(&rig, A, Access::ReadWrite);
    rig.driver().release(A).unwrap();
    drop(shown);
    assert_eq!(awake(&rig), 0, "gone with its last user");
}

/// A program that another test starts, or udev, may have the device open for a moment; no opening waits for that.
fn freed_by_a_later_opening(rig: &mut Rig) {
    let freed = (0..50).any(|_| {
        std::thread::sleep(std::time::Duration::from_millis(100));
        rig.reopen().unwrap();
        rig.state()["layers"] == serde_json::json!({})
    });
    assert!(freed, "{}", rig.state());
}

#[test]
fn a_mounted_layer_is_busy_or_removed_later() {
    needs_guest!("a_mounted_layer_is_busy_or_removed_later");
    let mut rig = Rig::new(Pool::Loop, EXT4).unwrap();
    rig.driver().create(A, &[], &plain()).unwrap();
    let shown = show(&rig, A, Access::ReadWrite);
    assert_eq!(kind(rig.driver().remove(A)), ErrorKind::Busy);
    assert_eq!(kind(rig.driver().commit(A)), ErrorKind::Busy);
    fill(&shown, "still", MIB).unwrap();
    drop(shown);
    rig.driver().release(A).unwrap();
    rig.reopen_with("dm.use_deferred_removal", "true").unwrap();
    rig.reopen_with("dm.use_deferred_deletion", "true").unwrap();
    let shown = show(&rig, A, Access::ReadWrite);
    rig.driver().remove(A).unwrap();
    assert_eq!(kind(rig.driver().mount(A, &[], Access::ReadOnly)), ErrorKind::NotFound);
    fill(&shown, "on", MIB).unwrap();
    drop(shown);
    freed_by_a_later_opening(&mut rig);
}

#[test]
fn layers_grow_and_never_shrink() {
    needs_guest!("layers_grow_and_never_shrink");
    for fs in [XFS, ("dm.fs", "ext4")] {
        let rig = Rig::new(Pool::Loop, &[fs]).unwrap();
        let driver = rig.driver();
        driver.create(A, &[], &plain()).unwrap();
        driver.commit(A).unwrap();
        assert_eq!(kind(driver.create(B, &[A], &sized(BASE_SIZE / 2))), ErrorKind::Unsupported, "{fs:?}");
        driver.create(B, &[A], &sized(BASE_SIZE * 2)).unwrap();
        let space = |root: &OwnedFd| rustix::fs::fstatvfs(root).map(|s| s.f_blocks * s.f_frsize).unwrap();
        let root = show(&rig, B, Access::ReadWrite);
        let at_first = space(&root);
        assert!(at_first > BASE_SIZE * 3 / 2, "{fs:?}: {at_first}");
        driver.set_limits(B, Limits { size: Some(ByteSize(BASE_SIZE * 3)), inodes: None }).unwrap();
        assert!(space(&root) > at_first + BASE_SIZE / 2, "{fs:?}: it grows while it is mounted");
        assert_eq!(driver.limits(B).unwrap().size, Some(ByteSize(BASE_SIZE * 3)));
        for limits in [Limits { size: Some(ByteSize(BASE_SIZE)), inodes: None }, Limits::default()] {
            assert_eq!(kind(driver.set_limits(B, limits)), ErrorKind::Unsupported);
        }
        assert_eq!(kind(driver.set_limits(B, Limits { size: None, inodes: Some(9) })), ErrorKind::Unsupported);
        drop(root);
        driver.release(B).unwrap();
        driver.commit(B).unwrap();
        driver.create(C, &[B], &plain()).unwrap();
        assert_eq!(driver.limits(C).unwrap().size, Some(ByteSize(BASE_SIZE * 3)), "a child is as large as its parent");
    }
}

#[test]
fn a_nearly_full_pool_takes_no_more_layers() {
    needs_guest!("a_nearly_full_pool_takes_no_more_layers");
    let options =
        [("dm.fs", "ext4"), ("dm.basesize", "128M"), ("dm.loopdatasize", "128M"), ("dm.min_free_space", "40%")];
    let rig = Rig::new(Pool::Loop, &options).unwrap();
    rig.driver().create(A, &[], &plain()).unwrap();
    fill(&show(&rig, A, Access::ReadWrite), "big", 80 * MIB).unwrap();
    rig.driver().commit(A).unwrap();
    let e = rig.driver().create(B, &[A], &plain()).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::OutOfSpace);
    for part in ["data are", "% full", "MiB are free", "dm.min_free_space wants 40%"] {
        assert!(e.to_string().contains(part), "{part}: {e}");
    }
    assert_eq!(read(&rig, A, "big").unwrap(), 80 * MIB);
    rig.driver().remove(A).unwrap();
    rig.driver().create(B, &[], &plain()).unwrap();
}

#[test]
fn a_full_pool_refuses_writers_and_damages_nothing() {
    needs_guest!("a_full_pool_refuses_writers_and_damages_nothing");
    SOON_FULL.iter().for_each(|options| refuses_writers_and_damages_nothing(options));
}

/// Pools that are full before the filesystems on them are.
const SOON_FULL: [&[(&str, &str)]; 2] = [
    &[("dm.fs", "ext4"), ("dm.basesize", "128M"), ("dm.loopdatasize", "96M"), ("dm.min_free_space", "0%")],
    // Its log alone is 64 MiB.
    &[XFS, ("dm.loopdatasize", "176M"), ("dm.min_free_space", "0%")],
];

fn refuses_writers_and_damages_nothing(options: &[(&str, &str)]) {
    let mut rig = Rig::new(Pool::Loop, options).unwrap();
    rig.driver().create(A, &[], &plain()).unwrap();
    fill(&show(&rig, A, Access::ReadWrite), "kept", 20 * MIB).unwrap();
    rig.driver().commit(A).unwrap();
    rig.driver().create(B, &[A], &plain()).unwrap();
    let root = show(&rig, B, Access::ReadWrite);
    assert!(full(fill(&root, "big", 100 * MIB)));
    let mut narrow = rig.driver().native_diff().unwrap().narrow(B, &[A]).unwrap();
    assert_eq!(narrow.candidates(Path::new("")).unwrap(), Candidates::All, "a full pool compares by a walk");
    drop((narrow, root));
    // To grow, it would be suspended too, for which its filesystem flushes.
    let grown = kind(rig.driver().set_limits(B, Limits { size: Some(ByteSize(BASE_SIZE * 2)), inodes: None }));
    assert!([ErrorKind::OutOfSpace, ErrorKind::Io].contains(&grown), "{grown:?}");
    rig.driver().release(B).unwrap();
    assert_eq!(read(&rig, A, "kept").unwrap(), 20 * MIB);
    rig.driver().remove(B).unwrap();
    rig.reopen().unwrap();
    assert_eq!(read(&rig, A, "kept").unwrap(), 20 * MIB);
    rig.driver().create(C, &[A], &plain()).unwrap();
    fill(&show(&rig, C, Access::ReadWrite), "again", 10 * MIB).unwrap();
    rig.driver().commit(C).unwrap();
    assert_eq!(read(&rig, C, "again").unwrap(), 10 * MIB);
}

#[test]
fn a_layer_that_lost_data_to_a_full_pool_is_not_committed() {
    needs_guest!("a_layer_that_lost_data_to_a_full_pool_is_not_committed");
    for options in SOON_FULL {
        let rig = Rig::new(Pool::Loop, options).unwrap();
        for id in [A, B] {
            rig.driver().create(id, &[], &plain()).unwrap();
        }
        fill(&show(&rig, B, Access::ReadWrite), "small", 20 * MIB).unwrap();
        rig.driver().release(B).unwrap();
        let root = show(&rig, A, Access::ReadWrite);
        // Only what is flushed learns that there was no room: a writer that does not wait is told that all is well.
        let file = rustix::fs::openat(&root, "big", OFlags::CREATE | OFlags::RDWR, Mode::RUSR | Mode::WUSR).unwrap();
        let piece = vec![7; MIB as usize];
        let file = File::from(file);
        // Once it has noticed, a filesystem may refuse the rest.
        let _ = (0..100).try_for_each(|n| file.write_all_at(&piece, n * MIB));
        drop((file, root));
        let refused = || rig.driver().commit(A).unwrap_err();
        // A program that another test starts has inherited the mount for a moment.
        let e = std::iter::repeat_with(refused).find(|e| e.kind() != ErrorKind::Busy).unwrap();
        assert_eq!(e.kind(), ErrorKind::OutOfSpace, "{options:?}: {e}");
        assert!(e.to_string().contains("full"), "{e}");
        rig.driver().remove(B).unwrap();
        assert_eq!(kind(rig.driver().commit(A)), ErrorKind::Corrupt, "room that comes later brings nothing back");
        rig.driver().remove(A).unwrap();
    }
}

#[test]
fn a_layer_in_a_full_pool_is_measured() {
    needs_guest!("a_layer_in_a_full_pool_is_measured");
    for options in SOON_FULL {
        let rig = Rig::new(Pool::Loop, options).unwrap();
        rig.driver().create(A, &[], &plain()).unwrap();
        let root = show(&rig, A, Access::ReadWrite);
        let file = rustix::fs::openat(&root, "big", OFlags::CREATE | OFlags::RDWR, Mode::RUSR | Mode::WUSR).unwrap();
        let (file, piece) = (File::from(file), pattern());
        // Not flushed, so that there is something left that finds no room. Once it has noticed, a filesystem refuses more.
        let _ = (0..100).try_for_each(|n| file.write_all_at(&piece, n * MIB));
        let mounted = rig.driver().usage(A).unwrap_or_else(|e| panic!("{options:?}, mounted: {e}"));
        assert!(mounted.bytes > 20 * MIB && mounted.inodes > 0, "{options:?}: {mounted:?}");
        let _ = file.sync_all();
        drop((file, root));
        rig.driver().release(A).unwrap();
        let after = rig.driver().usage(A).unwrap_or_else(|e| panic!("{options:?}, not mounted: {e}"));
        assert!(after.bytes > 20 * MIB && after.inodes > 0, "{options:?}: {after:?}");
    }
}

#[test]
fn that_a_layer_is_measured_is_left_to_the_store_to_say() {
    needs_guest!("that_a_layer_is_measured_is_left_to_the_store_to_say");
    let rig = Rig::new(Pool::Loop, EXT4).unwrap();
    let e = rig.driver().usage(A).unwrap_err();
    assert_eq!(e.to_string(), "there is no layer 1");
}

#[test]
fn a_removed_layer_keeps_its_blocks_as_long_as_it_is_mounted() {
    needs_guest!("a_removed_layer_keeps_its_blocks_as_long_as_it_is_mounted");
    let deferred = [("dm.use_deferred_removal", "true"), ("dm.use_deferred_deletion", "true")];
    // With ext4 the kernel itself refuses to discard a device whose superblock it has in memory.
    let mut rig = Rig::new(Pool::Loop, &[&[XFS], &deferred[..]].concat()).unwrap();
    rig.driver().create(A, &[], &plain()).unwrap();
    let shown = show(&rig, A, Access::ReadWrite);
    fill(&shown, "early", MIB).unwrap();
    rig.driver().remove(A).unwrap();
    // Every opening looks for layers whose removal is to be finished.
    rig.reopen().unwrap();
    let file = rustix::fs::openat(&shown, "early", OFlags::RDONLY, Mode::empty()).unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    let mut found = vec![0; MIB as usize];
    File::from(file).read_exact_at(&mut found, 0).unwrap();
    assert!(found == pattern(), "what was written is there");
    fill(&shown, "late", MIB).unwrap();
    drop(shown);
    freed_by_a_later_opening(&mut rig);
}

#[test]
fn a_pool_that_takes_no_changes_is_still_read() {
    needs_guest!("a_pool_that_takes_no_changes_is_still_read");
    let mut rig = Rig::new(Pool::Loop, EXT4).unwrap();
    rig.driver().create(A, &[], &plain()).unwrap();
    fill(&show(&rig, A, Access::ReadWrite), "kept", MIB).unwrap();
    rig.driver().commit(A).unwrap();
    rig.close();
    let pool = rig.devices().into_iter().find(|name| name.ends_with("pool")).unwrap();
    let table = run(&["dmsetup", "table", &pool]);
    let table = table.trim().replace(" 2 skip_block_zeroing", " 3 read_only skip_block_zeroing");
    run(&["dmsetup", "load", &pool, "--table", &table]);
    run(&["dmsetup", "resume", &pool]);
    rig.reopen().unwrap();
    assert_eq!(read(&rig, A, "kept").unwrap(), MIB);
    let e = rig.driver().create(B, &[A], &plain()).unwrap_err();
    assert!(e.kind() == ErrorKind::Corrupt && e.to_string().contains("no more changes"), "{e}");
}

#[test]
fn a_commit_waits_for_no_one_and_takes_no_layer_that_another_process_uses() {
    needs_guest!("a_commit_waits_for_no_one_and_takes_no_layer_that_another_process_uses");
    let rig = Rig::new(Pool::Loop, EXT4).unwrap();
    rig.driver().create(A, &[], &plain()).unwrap();
    let other = rig.another().unwrap();
    let recipe = other.mount(A, &[], Access::ReadWrite).unwrap();
    assert_eq!(kind(rig.driver().commit(A)), ErrorKind::Busy, "it is about to be mounted");
    fill(&mount::detached(&recipe).unwrap(), "late", MIB).unwrap();
    other.release(A).unwrap();
    rig.driver().commit(A).unwrap();
    assert_eq!(read(&rig, A, "late").unwrap(), MIB);
}

#[test]
fn one_layer_in_use_stops_neither_reclaim_nor_later_use() {
    needs_guest!("one_layer_in_use_stops_neither_reclaim_nor_later_use");
    let rig = Rig::new(Pool::Loop, EXT4).unwrap();
    for id in [A, B, C] {
        rig.driver().create(id, &[], &plain()).unwrap();
    }
    let other = rig.another().unwrap();
    let recipe = other.mount(A, &[], Access::ReadWrite).unwrap();
    assert_eq!(kind(rig.driver().remove(A)), ErrorKind::Busy);
    fill(&mount::detached(&recipe).unwrap(), "still", MIB).unwrap();
    other.mount(B, &[], Access::ReadWrite).unwrap();
    other.release(B).unwrap();
    other.usage(B).unwrap();
    let reclaimed = rig.driver().reclaim(&|_| false).unwrap();
    assert_eq!(reclaimed.layers, 2, "all but the first, which is in use; the second was only measured");
    assert_eq!(rig.state()["layers"]["1"]["phase"], "active", "a refused removal changes nothing");
    other.release(A).unwrap();
    rig.driver().remove(A).unwrap();
}

#[test]
fn comparing_leaves_no_layer_in_use() {
    needs_guest!("comparing_leaves_no_layer_in_use");
    let rig = Rig::new(Pool::Loop, EXT4).unwrap();
    rig.driver().create(A, &[], &plain()).unwrap();
    rig.driver().commit(A).unwrap();
    rig.driver().create(B, &[A], &plain()).unwrap();
    drop(rig.driver().native_diff().unwrap().narrow(B, &[A]).unwrap());
    let other = rig.another().unwrap();
    other.remove(B).unwrap();
    other.remove(A).unwrap();
}

#[test]
fn full_metadata_are_told_and_what_is_there_stays_readable() {
    needs_guest!("full_metadata_are_told_and_what_is_there_stays_readable");
    let rig =
        Rig::new(Pool::Loop, &[EXT4, &[("dm.loopmetadatasize", "2M"), ("dm.min_free_space", "0%")]].concat()).unwrap();
    rig.driver().create(A, &[], &plain()).unwrap();
    fill(&show(&rig, A, Access::ReadWrite), "kept", 4 * MIB).unwrap();
    rig.driver().commit(A).unwrap();
    // Each thin device takes a block of 4 KiB of metadata, and 2 MiB are 512.
    let pool = rig.devices().into_iter().find(|name| name.ends_with("pool")).unwrap();
    let made = |thin: &u32| {
        let message = format!("create_thin {thin}");
        std::process::Command::new("dmsetup").args(["message", &pool, "0", &message]).output().unwrap().status.success()
    };
    let refused = (10_000..10_600).find(|thin| !made(thin));
    refused.expect("2 MiB of metadata are full some time");
    let e = rig.driver().create(LayerId(5000), &[A], &plain()).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::OutOfSpace, "{e}");
    assert!(e.to_string().contains("metadata"), "{e}");
    assert_eq!(read(&rig, A, "kept").unwrap(), 4 * MIB);
}

#[test]
fn a_divided_device_is_refused_with_data_on_it_and_grows_by_itself() {
    needs_guest!("a_divided_device_is_refused_with_data_on_it_and_grows_by_itself");
    let dir = tempfile::tempdir().unwrap();
    let device = common::LoopDevice::new(dir.path(), "disk", 512 * MIB);
    run(&["mkfs.ext4", "-q", "-F", device.path()]);
    let options = [
        ("dm.directlvm_device", device.path()),
        ("dm.fs", "ext4"),
        ("dm.basesize", "256M"),
        ("dm.thinp_percent", "40"),
        ("dm.min_free_space", "0%"),
    ];
    let e = Rig::on_devices(&options).err().expect("it has a filesystem on it");
    assert!(e.to_string().contains("ext4") && e.to_string().contains("dm.directlvm_device_force"), "{e}");
    let forced = [&options[..], &[("dm.directlvm_device_force", "true")]].concat();
    let mut rig = Rig::on_devices(&forced).unwrap();
    let total = |rig: &Rig| {
        let status = rig.driver().status();
        status.into_iter().find(|(name, _)| name == "Data Space Total").unwrap().1
    };
    assert_eq!(total(&rig), "215MB");
    rig.driver().create(A, &[], &plain()).unwrap();
    fill(&show(&rig, A, Access::ReadWrite), "big", 150 * MIB).unwrap();
    rig.driver().commit(A).unwrap();
    rig.driver().create(B, &[A], &plain()).unwrap();
    assert_eq!(total(&rig), "258MB", "a fifth more, as four fifths were used");
    rig.reopen().unwrap();
    assert_eq!(read(&rig, A, "big").unwrap(), 150 * MIB);
    let e = Rig::on_devices(&options).err().expect("it is in use");
    assert_eq!(e.kind(), ErrorKind::Busy, "{e}");
}

#[test]
fn two_devices_make_a_pool_if_they_are_empty() {
    needs_guest!("two_devices_make_a_pool_if_they_are_empty");
    let dir = tempfile::tempdir().unwrap();
    let data = common::LoopDevice::new(dir.path(), "data", 512 * MIB);
    let metadata = common::LoopDevice::new(dir.path(), "metadata", 8 * MIB);
    let options = [
        ("dm.datadev", data.path()),
        ("dm.metadatadev", metadata.path()),
        ("dm.fs", "ext4"),
        ("dm.basesize", "64M"),
        ("dm.blocksize", "128K"),
    ];
    let mut rig = Rig::on_devices(&options).unwrap();
    assert!(rig.driver().capabilities().write_strategy.to_string().contains("128 KiB"));
    rig.driver().create(A, &[], &plain()).unwrap();
    fill(&show(&rig, A, Access::ReadWrite), "f", 8 * MIB).unwrap();
    rig.reopen().unwrap();
    assert_eq!(read(&rig, A, "f").unwrap(), 8 * MIB);
    assert_eq!(kind(rig.reopen_with("dm.blocksize", "64K")), ErrorKind::InvalidInput);
    switch_off(&mut rig);
    let e = Rig::on_devices(&options).err().expect("it is somebody's metadata");
    assert_eq!(e.kind(), ErrorKind::InvalidInput, "{e}");
    assert!(e.to_string().contains("dd if=/dev/zero") || e.to_string().contains("wipefs"), "{e}");
}

#[test]
fn a_given_pool_has_to_be_empty_and_loop_files_can_grow() {
    needs_guest!("a_given_pool_has_to_be_empty_and_loop_files_can_grow");
    let dir = tempfile::tempdir().unwrap();
    let given = common::GivenPool::new(dir.path(), 512 * MIB, 8 * MIB);
    let options = [("dm.thinpooldev", given.name.as_str()), ("dm.fs", "ext4"), ("dm.basesize", "64M")];
    let rig = Rig::on_devices(&options).unwrap();
    rig.driver().create(A, &[], &plain()).unwrap();
    let e = Rig::on_devices(&options).err().expect("it has data in it");
    assert!(e.to_string().contains("in use"), "{e}");
    assert_eq!(kind(Rig::on_devices(&[("dm.thinpooldev", "no-such-pool")])), ErrorKind::NotFound);
    drop(rig);

    let mut rig = Rig::new(Pool::Loop, &[EXT4, &[("dm.loopdatasize", "256M")]].concat()).unwrap();
    rig.driver().create(A, &[], &plain()).unwrap();
    let total = |rig: &Rig| rig.driver().status().into_iter().find(|(name, _)| name == "Data Space Total").unwrap().1;
    assert_eq!(total(&rig), "268MB");
    rig.reopen_with("dm.loopdatasize", "512M").unwrap();
    assert_eq!(total(&rig), "537MB");
    assert_eq!(kind(rig.reopen_with("dm.loopdatasize", "128M")), ErrorKind::InvalidInput);
}

#[test]
fn a_size_that_nobody_gave_changes_nothing() {
    needs_guest!("a_size_that_nobody_gave_changes_nothing");
    let sizes = [("dm.loopdatasize", "256M"), ("dm.loopmetadatasize", "16M")];
    let mut rig = Rig::new(Pool::Loop, &[EXT4, &sizes].concat()).unwrap();
    rig.driver().create(A, &[], &plain()).unwrap();
    rig.reopen_without("dm.loopdatasize").unwrap();
    let total = rig.driver().status().into_iter().find(|(name, _)| name == "Data Space Total").unwrap().1;
    assert_eq!(total, "268MB");
    rig.reopen_with("dm.loopdatasize", "256M").unwrap();
    rig.reopen_without("dm.loopmetadatasize").unwrap();
    assert_eq!(kind(rig.reopen_with("dm.loopmetadatasize", "8M")), ErrorKind::InvalidInput);
}

/// Takes a pool on a divided device down, as a reboot does.
fn switch_off(rig: &mut Rig) {
    rig.close();
    let mut devices = rig.devices();
    // Layers first, and the pool before what it is made of.
    devices.sort_by_key(|name| ["pool", "tdata", "tmeta"].iter().position(|part| name.ends_with(part)));
    devices.iter().for_each(|name| drop(run(&["dmsetup", "remove", "--retry", name])));
}

#[test]
fn a_divided_device_stays_with_its_data_root_under_any_name() {
    needs_guest!("a_divided_device_stays_with_its_data_root_under_any_name");
    let dir = tempfile::tempdir().unwrap();
    let device = common::LoopDevice::new(dir.path(), "disk", 512 * MIB);
    let options = [
        ("dm.directlvm_device", device.path()),
        ("dm.directlvm_device_force", "true"),
        ("dm.fs", "ext4"),
        ("dm.basesize", "64M"),
        ("dm.thinp_percent", "40"),
    ];
    let mut rig = Rig::on_devices(&options).unwrap();
    rig.driver().create(A, &[], &plain()).unwrap();
    fill(&show(&rig, A, Access::ReadWrite), "kept", MIB).unwrap();
    rig.driver().commit(A).unwrap();
    switch_off(&mut rig);
    let e = Rig::on_devices(&options).err().expect("it has somebody's layers on it");
    assert!(e.to_string().contains("another data root") && e.to_string().contains("dd if=/dev/zero"), "{e}");
    let link = dir.path().join("by-id");
    std::os::unix::fs::symlink(device.path(), &link).unwrap();
    rig.reopen_with("dm.directlvm_device", link.to_str().unwrap()).unwrap();
    assert_eq!(read(&rig, A, "kept").unwrap(), MIB);
    assert_eq!(rig.state()["storage"]["direct"]["device"], link.to_str().unwrap(), "the new name is kept");
    assert_eq!(kind(rig.reopen_with("dm.thinp_percent", "50")), ErrorKind::InvalidInput);
    rig.reopen_without("dm.thinp_percent").unwrap();
    assert_eq!(kind(rig.reopen_with("dm.thinp_metapercent", "2")), ErrorKind::InvalidInput);
    let other = common::LoopDevice::new(dir.path(), "other", 512 * MIB);
    rig.reopen_without("dm.thinp_metapercent").unwrap();
    assert_eq!(kind(rig.reopen_with("dm.directlvm_device", other.path())), ErrorKind::InvalidInput);
}

#[test]
fn two_devices_that_somebody_uses_are_refused() {
    needs_guest!("two_devices_that_somebody_uses_are_refused");
    let dir = tempfile::tempdir().unwrap();
    let data = common::LoopDevice::new(dir.path(), "data", 512 * MIB);
    let metadata = common::LoopDevice::new(dir.path(), "metadata", 8 * MIB);
    for used in [&data, &metadata] {
        let table = format!("0 2048 linear {} 0", used.path());
        run(&["dmsetup", "create", "gdtest-holder", "--table", &table]);
        let options = [("dm.datadev", data.path()), ("dm.metadatadev", metadata.path()), EXT4[0], EXT4[1]];
        let opened = Rig::on_devices(&options).err();
        run(&["dmsetup", "remove", "--retry", "gdtest-holder"]);
        assert_eq!(opened.expect("it is in use").kind(), ErrorKind::Busy);
    }
}

#[test]
fn whether_space_is_given_back_follows_the_pool_there_is() {
    needs_guest!("whether_space_is_given_back_follows_the_pool_there_is");
    let dir = tempfile::tempdir().unwrap();
    let device = common::LoopDevice::new(dir.path(), "disk", 512 * MIB);
    let options = [("dm.directlvm_device", device.path()), EXT4[0], EXT4[1]];
    let mut rig = Rig::on_devices(&options).unwrap();
    let discards = |rig: &Rig| {
        let status = rig.driver().status();
        status.into_iter().find(|(name, _)| name == "Discards Reach Storage").unwrap().1
    };
    assert_eq!(discards(&rig), "false", "with the option");
    rig.reopen_without("dm.directlvm_device").unwrap();
    assert_eq!(discards(&rig), "false", "without it");
    rig.reopen_with("dm.blkdiscard", "true").unwrap();
    assert_eq!(discards(&rig), "true", "asked for");
    assert_eq!(discards(&Rig::new(Pool::Loop, EXT4).unwrap()), "true", "loop files");
}

#[test]
fn an_empty_pool_in_the_way_is_told_how_to_remove() {
    needs_guest!("an_empty_pool_in_the_way_is_told_how_to_remove");
    let dir = tempfile::tempdir().unwrap();
    let device = common::LoopDevice::new(dir.path(), "disk", 512 * MIB);
    let mut rig = Rig::on_devices(EXT4).unwrap();
    let remove = format!("remove the directory {} ", rig.home().display());
    rig.driver().create(A, &[], &plain()).unwrap();
    let e = rig.reopen_with("dm.directlvm_device", device.path()).unwrap_err().to_string();
    assert!(e.contains("dm.directlvm_device") && e.contains("loop files") && !e.contains("remove"), "{e}");
    rig.reopen_without("dm.directlvm_device").unwrap();
    rig.driver().remove(A).unwrap();
    let e = rig.reopen_with("dm.directlvm_device", device.path()).unwrap_err().to_string();
    assert!(e.contains("no layers") && e.contains(&remove), "{e}");
    std::fs::remove_dir_all(rig.home()).unwrap();
    rig.reopen().unwrap();
    assert_eq!(rig.state()["storage"]["direct"]["device"], device.path());
}

#[test]
fn a_copy_of_a_data_root_does_not_work_on_the_originals_files() {
    needs_guest!("a_copy_of_a_data_root_does_not_work_on_the_originals_files");
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("copy");
    let mut rig = Rig::new(Pool::Loop, EXT4).unwrap();
    rig.driver().create(A, &[], &plain()).unwrap();
    fill(&show(&rig, A, Access::ReadWrite), "kept", MIB).unwrap();
    rig.driver().commit(A).unwrap();
    rig.close();
    let original = rig.home();
    run(&["cp", "-a", "--sparse=always", original.to_str().unwrap(), copy.to_str().unwrap()]);
    let open_copy = || DeviceMapper::open(&copy, &Options::default());
    let e = open_copy().err().expect("the original's pool is active");
    assert_eq!(e.kind(), ErrorKind::Busy, "{e}");
    for part in ["is a copy", original.join("metadata").to_str().unwrap(), "dmsetup remove graphdriver-"] {
        assert!(e.to_string().contains(part), "{part}: {e}");
    }
    rig.reopen().unwrap();
    assert_eq!(read(&rig, A, "kept").unwrap(), MIB);
    switch_off(&mut rig);
    drop(open_copy().unwrap());
    assert_eq!(kind(rig.reopen()), ErrorKind::Busy, "now the copy's pool is active");
}

#[test]
fn a_device_that_is_not_there_is_told_with_its_option() {
    needs_guest!("a_device_that_is_not_there_is_told_with_its_option");
    let dir = tempfile::tempdir().unwrap();
    let device = common::LoopDevice::new(dir.path(), "disk", 512 * MIB);
    let nope = "/dev/nope";
    let asked: [&[(&str, &str)]; 3] = [
        &[("dm.directlvm_device", nope)],
        &[("dm.datadev", nope), ("dm.metadatadev", device.path())],
        &[("dm.metadatadev", nope), ("dm.datadev", device.path())],
    ];
    for options in asked {
        let e = Rig::on_devices(options).err().expect("there is no such device");
        assert_eq!(e.kind(), ErrorKind::NotFound, "{e}");
        for part in [options[0].0, nope, "lsblk"] {
            assert!(e.to_string().contains(part), "{part}: {e}");
        }
    }
}
