//! `kill -9` at random moments: afterwards exactly the layers that the store counts on are there, whole, and nothing else.
//!
//! The test starts itself as the process that is killed. That one makes, commits and removes layers and says before and
//! after each call what it is about to do and what it has done, as the store's intents do.

mod common;
#[path = "../../../tests/skip/mod.rs"]
#[allow(dead_code)] // All of these need the guest.
mod skip;

use common::{Place, missing};
use graphdriver_core::{Access, GraphDriver, LayerId, LayerOptions, Options, mount};
use graphdriver_quota::refquota::zfs;
use graphdriver_zfs::Zfs;
use std::{
    collections::BTreeMap,
    fs,
    io::Read,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::Duration,
};

const PLAIN: &LayerOptions = &LayerOptions { size: None, inodes: None, durable: true };
const BASE: LayerId = LayerId(1);
const ROUNDS: u64 = 20;

fn in_layer<T>(driver: &Zfs, id: LayerId, access: Access, run: impl FnOnce(PathBuf) -> T) -> T {
    let mounted = mount::detached(&driver.mount(id, &[BASE], access).unwrap()).unwrap();
    run(format!("/proc/self/fd/{}", mounted.as_raw_fd()).into())
}

/// The process that is killed, if this is it: layers `first`, `first` + 1 and so on, until the end comes.
#[test]
fn the_process_that_is_killed() {
    let Ok(told) = std::env::var("GRAPHDRIVER_ZFS_KILLED") else { return };
    let [home, dataset, first] = told.split('\n').collect::<Vec<_>>().try_into().unwrap();
    let driver = Zfs::open(Path::new(home), &Options(vec![("zfs.fsname".into(), dataset.into())])).unwrap();
    // Standard error is the pipe to the test, and not captured when written to directly.
    let say = |word: &str, id| {
        use std::io::Write;
        std::io::stderr().write_all(format!("{word} {id}\n").as_bytes()).unwrap();
    };
    for id in (first.parse::<u64>().unwrap()..).map(LayerId) {
        say("creating", id);
        driver.create(id, &[BASE], PLAIN).unwrap();
        say("created", id);
        in_layer(&driver, id, Access::ReadWrite, |root| {
            fs::write(root.join("own"), vec![id.0 as u8; 100_000]).unwrap()
        });
        say("committing", id);
        driver.commit(id).unwrap();
        say("committed", id);
        if id.0 % 2 == 0 {
            say("removing", id);
            driver.remove(id).unwrap();
            say("removed", id);
        }
    }
}

/// What the killed process said last of each layer.
fn run_and_kill(place: &Place, first: u64, after: Duration) -> BTreeMap<u64, String> {
    let told = format!("{}\n{}\n{first}", place.home.path().display(), place.dataset);
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "the_process_that_is_killed", "--nocapture"])
        .env("GRAPHDRIVER_ZFS_KILLED", told)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut pipe = child.stderr.take().unwrap();
    let reader = thread::spawn(move || {
        let mut said = String::new();
        // A zfs command of the killed process may hold the pipe for a moment.
        pipe.read_to_string(&mut said).map(|_| said)
    });
    thread::sleep(after);
    child.kill().unwrap();
    child.wait().unwrap();
    wait_for_orphans(&place.dataset);
    let said = reader.join().unwrap().unwrap();
    assert!(!said.contains("panicked"), "it failed by itself:\n{said}");
    let words = said.lines().filter_map(|line| line.split_once(' '));
    words.filter_map(|(word, id)| Some((id.parse().ok()?, word.to_owned()))).collect()
}

/// A zfs command that the killed process had started goes on by itself, for as long as its system call takes.
fn wait_for_orphans(dataset: &str) {
    let running = || {
        let processes = fs::read_dir("/proc").unwrap().flatten();
        processes
            .map(|process| fs::read(process.path().join("cmdline")).unwrap_or_default())
            .any(|command| command.starts_with(b"zfs\0") && String::from_utf8_lossy(&command).contains(dataset))
    };
    while running() {
        thread::sleep(Duration::from_millis(20));
    }
}

/// What the store does with the intents of a process that is gone; afterwards the layers that are counted on.
fn recover(driver: &Zfs, last: &BTreeMap<u64, String>) -> Vec<LayerId> {
    let mut kept = Vec::new();
    for (&id, word) in last {
        match word.as_str() {
            "creating" | "removing" => driver.remove(LayerId(id)).unwrap(),
            "removed" => {}
            "committing" => {
                driver.thaw(LayerId(id)).unwrap();
                kept.push(LayerId(id));
            }
            _ => kept.push(LayerId(id)),
        }
    }
    kept
}

fn everything(driver: &Zfs) -> Vec<String> {
    let root = driver.dataset();
    let out = zfs(&["list", "-H", "-r", "-t", "all", "-o", "name", root]).unwrap();
    out.lines().filter_map(|name| name.strip_prefix(&format!("{root}/")).map(str::to_owned)).collect()
}

#[test]
fn a_killed_process_leaves_what_is_counted_on_and_nothing_else() {
    if skip::skipped_outside_guest("a_killed_process_leaves_what_is_counted_on_and_nothing_else", missing()) {
        return;
    }
    let place = Place::new().unwrap();
    let open = || Zfs::open(place.home.path(), &place.options()).unwrap();
    open().create(BASE, &[], PLAIN).unwrap();
    open().commit(BASE).unwrap();
    let (mut next, mut random, mut met) = (2, 0x9E37_79B9_7F4A_7C15_u64, BTreeMap::<String, u32>::new());
    for round in 0..ROUNDS {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let last = run_and_kill(&place, next, Duration::from_millis(300 + (random >> 33) % 5000));
        next = last.keys().last().map_or(next, |id| id + 1);
        *met.entry(last.values().last().cloned().unwrap_or_default()).or_default() += 1;
        let driver = open();
        let kept = recover(&driver, &last);
        driver.reclaim(&|id| id == BASE || kept.contains(&id)).unwrap();
        assert_eq!(driver.reclaim(&|id| id == BASE || kept.contains(&id)).unwrap().layers, 0);
        let mut expected = vec!["1".to_owned(), "1@committed".into(), "empty".into(), "empty@committed".into()];
        for id in &kept {
            expected.push(id.to_string());
            let access = match last[&id.0].as_str() {
                "created" => continue,
                "committing" => Access::ReadWrite,
                _ => {
                    expected.push(format!("{id}@committed"));
                    Access::ReadOnly
                }
            };
            let own = in_layer(&driver, *id, access, |root| {
                let writable = fs::write(root.join("more"), "").is_ok();
                assert_eq!(writable, access == Access::ReadWrite, "round {round}: layer {id}");
                fs::read(root.join("own")).unwrap()
            });
            assert!(own == vec![id.0 as u8; 100_000], "round {round}: layer {id} is not whole");
        }
        expected.sort();
        let mut found = everything(&driver);
        found.sort();
        assert_eq!(found, expected, "round {round}: {last:?}");
        kept.iter().for_each(|id| driver.remove(*id).unwrap());
    }
    eprintln!("killed while {met:?}");
    assert!(met.len() > 2, "always killed at the same moment: {met:?}");
}
