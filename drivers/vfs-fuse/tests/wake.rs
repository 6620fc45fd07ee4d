//! The program asks the kernel to keep idle CPUs easy to wake while it has much to answer, and never else.

mod common;

use common::{Layers, Mounted, cannot_mount, eventually, skipped};
use std::{
    fs::{self, File},
    path::Path,
    thread,
    time::Duration,
};

const DEVICE: &str = "/dev/cpu_dma_latency";
const LIMIT: Duration = Duration::from_secs(20);

fn cannot_ask() -> Option<String> {
    let driver = fs::read_to_string("/sys/devices/system/cpu/cpuidle/current_driver");
    match driver.as_deref().map(str::trim) {
        Ok("" | "none") | Err(_) => return Some("no cpuidle driver: idle CPUs sleep as deep as they like".into()),
        Ok(_) => {}
    }
    File::options().write(true).open(DEVICE).err().map(|e| format!("{DEVICE} cannot be opened: {e}"))
}

fn holds(mounted: &Mounted) -> bool {
    let fds = fs::read_dir(format!("/proc/{}/fd", mounted.pid())).unwrap();
    fds.flatten().any(|fd| fs::read_link(fd.path()).is_ok_and(|target| target == Path::new(DEVICE)))
}

/// The status file of the thread that asks.
fn thread_status(mounted: &Mounted) -> Option<String> {
    let tasks = fs::read_dir(format!("/proc/{}/task", mounted.pid())).unwrap().flatten();
    let status = tasks.filter_map(|task| fs::read_to_string(task.path().join("status")).ok());
    status.into_iter().find(|status| status.starts_with("Name:\twake-latency\n"))
}

/// How often it was woken.
fn wakes(mounted: &Mounted) -> u64 {
    let status = thread_status(mounted).expect("there is the thread");
    let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:")).unwrap();
    line.trim().parse().unwrap()
}

/// Each makes requests: names that come and go.
fn burst(mounted: &Mounted) {
    for n in 0..20 {
        let path = mounted.path().join(format!("f{n}"));
        fs::write(&path, "").unwrap();
        fs::remove_file(&path).unwrap();
    }
}

#[test]
fn cpus_are_kept_awake_during_bursts_only() {
    let test = "cpus_are_kept_awake_during_bursts_only";
    if skipped(test, cannot_mount().or_else(cannot_ask)) {
        return;
    }
    let layers = Layers::new(1);
    let mounted = layers.mount(&["wake_latency=on"]);
    eventually("the thread waits", LIMIT, || thread_status(&mounted).is_some_and(|s| s.contains("State:\tS")));
    for _ in 0..2 {
        eventually("the wish is held", LIMIT, || {
            burst(&mounted);
            holds(&mounted)
        });
        eventually("it is given back", LIMIT, || !holds(&mounted));
    }
    eventually("nothing wakes the thread of an idle mount", LIMIT, || {
        let before = wakes(&mounted);
        thread::sleep(Duration::from_millis(300));
        wakes(&mounted) == before
    });
    // Few requests are no burst: one each 20 ms, each a name not asked for before.
    let before = wakes(&mounted);
    for n in 0..20 {
        assert!(!mounted.path().join(format!("none{n}")).exists());
        thread::sleep(Duration::from_millis(20));
    }
    assert!(!holds(&mounted));
    assert_eq!(wakes(&mounted), before);
    mounted.unmount();
}

#[test]
fn nobody_asks_where_it_is_switched_off() {
    if skipped("nobody_asks_where_it_is_switched_off", cannot_mount()) {
        return;
    }
    let layers = Layers::new(1);
    let mounted = layers.mount(&["wake_latency=off"]);
    for _ in 0..20 {
        burst(&mounted);
        assert!(!holds(&mounted));
    }
    assert_eq!(thread_status(&mounted), None);
    mounted.unmount();
}
