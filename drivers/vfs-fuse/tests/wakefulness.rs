//! CPUs are kept awake during bursts of requests, and only then.

mod common;

use common::{Layers, cannot_mount, eventually, private_mounts, skipped};
use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

const DEVICE: &str = "/dev/cpu_dma_latency";

/// Whether the process has the device open, which is what holds the request.
fn holds(pid: i32) -> bool {
    let fds = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    fds.filter_map(|fd| fs::read_link(fd.unwrap().path()).ok()).any(|target| target == Path::new(DEVICE))
}

fn ticker(pid: i32) -> Option<PathBuf> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    threads.map(|thread| thread.unwrap().path()).find(|thread| {
        let name = fs::read_to_string(thread.join("comm")).unwrap_or_default();
        name.trim() == "wakefulness"
    })
}

/// How often a thread began to wait.
fn waits(thread: &Path) -> String {
    let status = fs::read_to_string(thread.join("status")).unwrap();
    status.lines().find(|line| line.starts_with("voluntary_ctxt_switches")).unwrap().to_owned()
}

fn burst(dir: &Path, until: impl Fn() -> bool) -> bool {
    let end = Instant::now() + Duration::from_secs(10);
    let mut n = 0;
    while Instant::now() < end {
        fs::create_dir(dir.join(format!("d{n}"))).unwrap();
        n += 1;
        if until() {
            return true;
        }
    }
    false
}

fn missing() -> Option<String> {
    let device = fs::File::options().write(true).open(DEVICE);
    cannot_mount().or_else(|| device.err().map(|e| format!("opening {DEVICE}: {e}")))
}

#[test]
fn cpus_are_kept_awake_during_bursts_and_an_idle_mount_wakes_nobody() {
    if skipped("cpus_are_kept_awake_during_bursts_and_an_idle_mount_wakes_nobody", missing()) {
        return;
    }
    private_mounts();
    let layers = Layers::new(1);
    let mounted = layers.mount(&[]);
    let pid = mounted.pid();
    assert!(burst(mounted.path(), || holds(pid)), "nothing was held for ten seconds");
    eventually("the CPUs are let go", Duration::from_secs(5), || !holds(pid));
    let ticker = ticker(pid).expect("a thread looks after it");
    // It parks a moment after it let go.
    let mut last = waits(&ticker);
    eventually("the thread waits", Duration::from_secs(5), || {
        std::thread::sleep(Duration::from_millis(300));
        waits(&ticker) == std::mem::replace(&mut last, waits(&ticker))
    });
    fs::metadata(mounted.path().join("d0")).unwrap();
    assert!(!holds(pid));
    mounted.unmount();
}

#[test]
fn cpus_may_sleep_where_that_is_asked_for() {
    if skipped("cpus_may_sleep_where_that_is_asked_for", missing()) {
        return;
    }
    private_mounts();
    let layers = Layers::new(1);
    let mounted = layers.mount(&["keep_awake=0"]);
    let pid = mounted.pid();
    let began = Instant::now();
    assert!(burst(mounted.path(), || began.elapsed() > Duration::from_secs(1) || holds(pid)));
    assert!(!holds(pid));
    assert_eq!(ticker(pid), None);
    mounted.unmount();
}
