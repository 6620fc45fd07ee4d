//! A process is killed at random moments while it makes, fills, freezes, compares and removes layers. Whatever the moment,
//! the next one finds layers whole or not at all, and pool.json, the pool's thin devices and the active devices agree.

mod common;
#[path = "../../../tests/skip/mod.rs"]
#[allow(dead_code)] // What else it has is for tests that need no guest.
mod skip;

use common::{Rig, no_devicemapper, run};
use graphdriver_core::{Access, GraphDriver, LayerId, LayerOptions, Options, mount};
use graphdriver_devicemapper::DeviceMapper;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::Write,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

const TEST: &str = "a_process_killed_at_any_moment_leaves_layers_whole_or_not_at_all";
const INSIDE: &str = "DM_TEST_KILLED";
const LOG: &str = "DM_TEST_LOG";
const FIRST: &str = "DM_TEST_FIRST";
const OPTIONS: &[(&str, &str)] =
    &[("dm.fs", "ext4"), ("dm.basesize", "32M"), ("dm.loopdatasize", "1G"), ("dm.loopmetadatasize", "8M")];
const BASE: LayerId = LayerId(1);
const FILES: u8 = 8;

/// Lives until it is killed. A line says what is begun or done, as the store's intents and rows would.
fn live(home: &Path, log: &Path, first: u64) -> ! {
    let options = Options(OPTIONS.iter().map(|(n, v)| (n.to_string(), v.to_string())).collect());
    let driver = DeviceMapper::open(home, &options).unwrap();
    let mut log = File::options().append(true).create(true).open(log).unwrap();
    let mut say = |what: &str, id: LayerId| log.write_all(format!("{what} {id}\n").as_bytes()).unwrap();
    for id in (first..).map(LayerId) {
        say("creating", id);
        driver.create(id, &[BASE], &LayerOptions::default()).unwrap();
        say("active", id);
        let view = mount::detached(&driver.mount(id, &[BASE], Access::ReadWrite).unwrap()).unwrap();
        (0..FILES).for_each(|n| fs::write(at(&view, &format!("f{n}")), vec![n; 20_000]).unwrap());
        drop(view);
        if id.0.is_multiple_of(3) {
            drop(driver.native_diff().unwrap().narrow(id, &[BASE]).unwrap());
        }
        say("committing", id);
        driver.commit(id).unwrap();
        say("committed", id);
        if id.0.is_multiple_of(2) {
            say("removing", id);
            driver.remove(id).unwrap();
            say("removed", id);
        }
    }
    unreachable!("there are more numbers than time")
}

fn at(view: &impl AsRawFd, name: &str) -> PathBuf {
    format!("/proc/self/fd/{}/{name}", view.as_raw_fd()).into()
}

/// The layers, each with the last that was said of it.
fn said(log: &Path) -> BTreeMap<u64, String> {
    let text = fs::read_to_string(log).unwrap_or_default();
    let words = text.lines().filter_map(|line| line.split_once(' '));
    words.map(|(what, id)| (id.parse().unwrap(), what.to_owned())).collect()
}

#[test]
fn a_process_killed_at_any_moment_leaves_layers_whole_or_not_at_all() {
    if let Some(home) = std::env::var_os(INSIDE) {
        let first = std::env::var(FIRST).unwrap().parse().unwrap();
        live(Path::new(&home), Path::new(&std::env::var_os(LOG).unwrap()), first);
    }
    if skip::skipped_outside_guest(TEST, no_devicemapper()) {
        return;
    }
    let mut rig = Rig::on_devices(OPTIONS).unwrap();
    rig.driver().create(BASE, &[], &LayerOptions::default()).unwrap();
    rig.driver().commit(BASE).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut interrupted = BTreeSet::new();
    for round in 0..24u64 {
        rig.close();
        let log = dir.path().join(round.to_string());
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", TEST, "--nocapture"])
            .env(INSIDE, rig.home())
            .env(LOG, &log)
            .env(FIRST, (10 + 1000 * round).to_string())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // However slow the machine is, some kills come in each of these.
        let moment = ["creating", "active", "committing", "removing"][round as usize % 4];
        while !fs::read_to_string(&log).unwrap_or_default().contains(moment) {
            assert_eq!(child.try_wait().unwrap(), None, "it failed before it was {moment}");
            std::thread::sleep(Duration::from_millis(2));
        }
        std::thread::sleep(Duration::from_millis(round * 37 % 230));
        assert_eq!(child.try_wait().unwrap(), None, "it failed before it was killed");
        child.kill().unwrap();
        child.wait().unwrap();
        interrupted.extend(recover(&mut rig, &log));
    }
    for moment in ["creating", "active", "committing", "removing"] {
        assert!(interrupted.contains(moment), "no kill came while {moment}: {interrupted:?}");
    }
    rig.driver().remove(BASE).unwrap();
    rig.close();
    assert_eq!(rig.devices(), [""; 0]);
}

/// What the store does when it is opened after a crash, and a look at what is there then. Returns where it was killed.
fn recover(rig: &mut Rig, log: &Path) -> Option<String> {
    rig.reopen().unwrap();
    let mut known = BTreeSet::from([BASE.0]);
    for (id, what) in said(log) {
        match what.as_str() {
            "creating" | "removing" => rig.driver().remove(LayerId(id)).unwrap(),
            "committing" => {
                rig.driver().commit(LayerId(id)).unwrap();
                known.insert(id);
            }
            "active" | "committed" => drop(known.insert(id)),
            _ => {}
        }
    }
    rig.driver().reclaim(&|id| known.contains(&id.0)).unwrap();
    agree(rig, &known);
    for (id, what) in said(log).into_iter().filter(|(id, _)| known.contains(id)) {
        let view = mount::detached(&rig.driver().mount(LayerId(id), &[BASE], Access::ReadOnly).unwrap()).unwrap();
        for n in (0..FILES).filter(|_| what != "active") {
            assert_eq!(fs::read(at(&view, &format!("f{n}"))).unwrap(), vec![n; 20_000], "layer {id}, {what}");
        }
        drop(view);
        rig.driver().remove(LayerId(id)).unwrap();
    }
    agree(rig, &BTreeSet::from([BASE.0]));
    said(log).into_iter().next_back().map(|(_, what)| what)
}

/// pool.json has these layers and no others, the pool the thin devices in pool.json, and nothing but the pool is active.
fn agree(rig: &Rig, known: &BTreeSet<u64>) {
    let state = rig.state();
    assert!(state["intent"].is_null(), "{state}");
    let layers = state["layers"].as_object().unwrap();
    assert_eq!(&layers.keys().map(|id| id.parse().unwrap()).collect::<BTreeSet<u64>>(), known);
    let mut thin: BTreeSet<u64> = layers.values().map(|layer| layer["thin"].as_u64().unwrap()).collect();
    thin.extend(state["base"]["thin"].as_u64());
    let devices = rig.devices();
    let [pool] = &devices[..] else { panic!("only the pool is to be active: {devices:?}") };
    run(&["dmsetup", "message", pool, "0", "reserve_metadata_snap"]);
    let table = run(&["dmsetup", "table", pool]);
    let metadata = format!("/dev/block/{}", table.split_whitespace().nth(3).unwrap());
    let found = run(&["thin_ls", "--no-headers", "-o", "DEV", "-m", &metadata]);
    run(&["dmsetup", "message", pool, "0", "release_metadata_snap"]);
    assert_eq!(found.split_whitespace().map(|id| id.parse().unwrap()).collect::<BTreeSet<u64>>(), thin);
}
