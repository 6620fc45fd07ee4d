//! A process is killed at random moments while it makes, fills, freezes, compares and removes layers. Whatever the moment,
//! the next one finds layers whole or not at all, frees what is left, and neither a subvolume nor a qgroup leaks.

mod common;

use common::{Rig, needs};
use graphdriver_btrfs::Btrfs;
use graphdriver_core::{Access, ByteSize, GraphDriver, LayerId, LayerOptions, Options, mount};
use std::{
    collections::BTreeSet,
    fs,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

const INSIDE: &str = "BTRFS_TEST_KILLED";
const OPTIONS: &[(&str, &str)] = &[("btrfs.quota", "simple")];
const BASE: LayerId = LayerId(1);
const FILES: u8 = 20;

/// What the killed process says it will do and has done, a line each, as the store's intents and rows would.
struct Log(fs::File);

impl Log {
    fn say(&mut self, what: &str, id: LayerId) {
        std::io::Write::write_all(&mut self.0, format!("{what} {id}\n").as_bytes()).unwrap();
    }
}

/// Lives until it is killed: layers one after the other, with all that can be done to them.
fn live(home: &Path, log: &Path, first: u64) -> ! {
    let options = Options(OPTIONS.iter().map(|(n, v)| (n.to_string(), v.to_string())).collect());
    let driver = Btrfs::open(home, &options).unwrap();
    let mut log = Log(fs::File::options().append(true).create(true).open(log).unwrap());
    for id in (first..).map(LayerId) {
        log.say("creating", id);
        let options = LayerOptions { size: Some(ByteSize(100 << 20)), inodes: None, durable: id.0.is_multiple_of(2) };
        driver.create(id, &[BASE], &options).unwrap();
        log.say("active", id);
        fill(&driver, id);
        if id.0.is_multiple_of(3) {
            driver.native_diff().unwrap().narrow(id, &[BASE]).unwrap();
        }
        log.say("committing", id);
        driver.commit(id).unwrap();
        log.say("committed", id);
        if id.0.is_multiple_of(2) {
            log.say("removing", id);
            driver.remove(id).unwrap();
            log.say("removed", id);
        }
    }
    unreachable!("there are more numbers than time")
}

fn fill(driver: &Btrfs, id: LayerId) {
    let view = mount::detached(&driver.mount(id, &[BASE], Access::ReadWrite).unwrap()).unwrap();
    let at = |name: &str| PathBuf::from(format!("/proc/self/fd/{}/{name}", view.as_raw_fd()));
    for n in 0..FILES {
        fs::write(at(&format!("f{n}")), vec![n; 20_000]).unwrap();
    }
    if id.0.is_multiple_of(5) {
        common::subvolume(&at("nested"));
        fs::write(at("nested/f"), "nested").unwrap();
    }
}

/// The layers, each with the last that was said of it.
fn said(log: &Path) -> std::collections::BTreeMap<u64, String> {
    let text = fs::read_to_string(log).unwrap_or_default();
    let words = text.lines().filter_map(|line| line.split_once(' '));
    words.map(|(what, id)| (id.parse().unwrap(), what.to_owned())).collect()
}

#[test]
fn a_process_killed_at_any_moment_leaves_layers_whole_or_not_at_all() {
    if let Some(home) = std::env::var_os(INSIDE) {
        let first = std::env::var("BTRFS_TEST_FIRST").unwrap().parse().unwrap();
        live(Path::new(&home), Path::new(&std::env::var_os("BTRFS_TEST_LOG").unwrap()), first);
    }
    needs!("a_process_killed_at_any_moment_leaves_layers_whole_or_not_at_all");
    let rig = Rig::with(OPTIONS);
    rig.layer(BASE.0, &[], |tree| fs::write(tree.join("base"), "base").unwrap());
    let log = tempfile::NamedTempFile::new().unwrap();
    let moments = ["creating", "active", "committing", "removing"];
    let mut interrupted = BTreeSet::new();
    for round in 0..400u64 {
        // The rarer moments may want some more.
        if round >= 40 && moments.iter().all(|moment| interrupted.contains(*moment)) {
            break;
        }
        let first = 10 + 1000 * round;
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "a_process_killed_at_any_moment_leaves_layers_whole_or_not_at_all", "--nocapture"])
            .env(INSIDE, &rig.home)
            .env("BTRFS_TEST_LOG", log.path())
            .env("BTRFS_TEST_FIRST", first.to_string())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // Spread over the time that some layers take.
        std::thread::sleep(Duration::from_millis(20 + (round * 37) % 230));
        assert_eq!(child.try_wait().unwrap(), None, "it failed before it was killed");
        child.kill().unwrap();
        child.wait().unwrap();
        interrupted.extend(recover(&rig, log.path()));
    }
    for moment in moments {
        assert!(interrupted.contains(moment), "no kill came while {moment}: {interrupted:?}");
    }
    let ids: Vec<_> = said(log.path()).into_keys().map(LayerId).chain([BASE]).collect();
    ids.into_iter().for_each(|id| rig.driver.remove(id).unwrap());
    rig.assert_nothing_left();
}

#[test]
fn what_a_killed_diff_left_goes_when_the_data_is_opened_and_what_a_live_one_uses_stays() {
    const NAME: &str = "what_a_killed_diff_left_goes_when_the_data_is_opened_and_what_a_live_one_uses_stays";
    if let Some(home) = std::env::var_os(INSIDE) {
        let driver = Btrfs::open(Path::new(&home), &Options::default()).unwrap();
        loop {
            driver.native_diff().unwrap().narrow(LayerId(2), &[BASE]).unwrap();
        }
    }
    needs!("what_a_killed_diff_left_goes_when_the_data_is_opened_and_what_a_live_one_uses_stays");
    let rig = Rig::with(OPTIONS);
    rig.layer(BASE.0, &[], |_| {});
    rig.create(2, &[BASE.0]);
    fill(&rig.driver, LayerId(2));
    let frozen = || common::names(&rig.home.join("layers")).into_iter().find(|name| name.starts_with("frozen-"));
    // It may be killed just after it has removed its snapshot.
    let left = (0..50).find_map(|_| {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", NAME, "--nocapture"])
            .env(INSIDE, &rig.home)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        while frozen().is_none() {
            assert_eq!(child.try_wait().unwrap(), None, "it failed before it was killed");
        }
        child.kill().unwrap();
        child.wait().unwrap();
        frozen()
    });
    let left = left.expect("no kill came while a snapshot was there");
    let lock = fs::File::open(rig.home.join("frozen.lock")).unwrap();
    lock.lock_shared().unwrap();
    rig.reopened();
    assert_eq!(frozen().as_ref(), Some(&left), "somebody may be using it");
    drop(lock);
    rig.reopened();
    assert_eq!(frozen(), None);
    rig.driver.remove(LayerId(2)).unwrap();
    rig.driver.remove(BASE).unwrap();
    rig.assert_nothing_left();
}

/// What the store does when it is opened after a crash, and a look at what is there then. Returns where it was killed.
fn recover(rig: &Rig, log: &Path) -> Option<String> {
    let driver = rig.reopened();
    let last = said(log).into_iter().next_back();
    let mut known = BTreeSet::from([BASE.0]);
    for (id, what) in said(log) {
        match what.as_str() {
            "creating" | "removing" => driver.remove(LayerId(id)).unwrap(),
            // Rolled back to active, and committed again.
            "committing" => {
                driver.thaw(LayerId(id)).unwrap();
                driver.mount(LayerId(id), &[BASE], Access::ReadWrite).unwrap();
                driver.commit(LayerId(id)).unwrap();
                known.insert(id);
            }
            "active" | "committed" => drop(known.insert(id)),
            "removed" => {}
            other => panic!("{other}"),
        }
    }
    driver.reclaim(&|id| known.contains(&id.0)).unwrap();
    let there: BTreeSet<u64> = common::names(&rig.home.join("layers"))
        .iter()
        .map(|name| name.parse().expect("only layers are left"))
        .collect();
    assert_eq!(there, known, "layers of the driver, and of the store");
    for (id, what) in said(log).into_iter().filter(|(id, _)| known.contains(id)) {
        let committed = what != "active";
        let view = rig.view(id, Access::ReadOnly);
        assert_eq!(fs::read_to_string(view.join("base")).unwrap(), "base");
        for n in (0..FILES).filter(|_| committed) {
            assert_eq!(fs::read(view.join(&format!("f{n}"))).unwrap(), vec![n; 20_000], "layer {id}");
        }
        let names = common::names(&view.join(""));
        assert!(!names.iter().any(|name| name.starts_with(".graphdriver")), "layer {id}: {names:?}");
        let writable = driver.mount(LayerId(id), &[BASE], Access::ReadWrite).is_ok();
        assert_eq!(writable, !committed, "layer {id} is {what}");
        if committed && id.is_multiple_of(5) {
            assert_eq!(fs::read_to_string(view.join("nested/f")).unwrap(), "nested");
        }
        drop(view);
        // A layer in two keeps the disk from filling up.
        driver.remove(LayerId(id)).unwrap();
        fs::OpenOptions::new()
            .append(true)
            .open(log)
            .and_then(|mut log| std::io::Write::write_all(&mut log, format!("removed {id}\n").as_bytes()))
            .unwrap();
    }
    let nested: Vec<_> = rig.subvolumes().into_iter().filter(|path| path.contains('/')).collect();
    assert_eq!(nested, [""; 0], "nested subvolumes are left");
    last.map(|(_, what)| what)
}
