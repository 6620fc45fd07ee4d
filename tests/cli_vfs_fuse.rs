//! The command line over vfs-fuse: daemons that start and end with their mounts, die, and are killed at bad moments.

mod common;

use common::{Home, no_root, skipped};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use std::{
    ops::Deref,
    path::Path,
    process::Stdio,
    time::{Duration, Instant},
};

/// A data root under vfs-fuse. No daemon of it outlives the test.
struct Rig(Home);

impl Deref for Rig {
    type Target = Home;

    fn deref(&self) -> &Home {
        &self.0
    }
}

impl Rig {
    /// With the image demo, and a container c of it.
    fn new() -> Rig {
        let rig = Rig(Home::new());
        rig.ok("echo '{\"storage-driver\": \"vfs-fuse\"}' > config.json");
        rig.gd("graphdriver load -qi demo.tar >/dev/null; graphdriver create --name c demo >/dev/null; mkdir m n");
        rig
    }

    fn script(script: &str) -> String {
        format!("export GRAPHDRIVER_CONFIG=$PWD/config.json; {script}")
    }

    #[track_caller]
    fn gd(&self, script: &str) -> String {
        self.0.ok(&Rig::script(script))
    }

    #[track_caller]
    fn gd_fails(&self, code: i32, script: &str, says: &[&str]) {
        self.0.fails(code, &Rig::script(script), says);
    }

    /// The processes that serve mounts of this data root.
    fn daemons(&self) -> Vec<i32> {
        let layers = format!("dir={}", self.root().display());
        let processes = std::fs::read_dir("/proc").unwrap().flatten();
        let numbers = processes.filter_map(|process| process.file_name().to_str()?.parse().ok());
        let ours = |pid: &i32| {
            let words = std::fs::read(Path::new("/proc").join(pid.to_string()).join("cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&words).contains(&layers)
        };
        numbers.filter(ours).collect()
    }

    fn wait_for_daemons(&self, wanted: usize) -> Vec<i32> {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let found = self.daemons();
            if found.len() == wanted {
                return found;
            }
            assert!(Instant::now() < deadline, "{wanted} daemons should be there, and there are {found:?}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        for daemon in self.daemons() {
            let _ = kill(Pid::from_raw(daemon), Signal::SIGKILL);
        }
    }
}

macro_rules! needs {
    ($test:literal) => {
        if skipped($test, no_root().or_else(no_fuse)) {
            return;
        }
    };
}

fn no_fuse() -> Option<String> {
    let program = Path::new(common::GRAPHDRIVER).with_file_name("vfs-fuse");
    assert!(program.exists(), "{} is not built: cargo build --workspace", program.display());
    (!Path::new("/dev/fuse").exists()).then(|| "there is no /dev/fuse: modprobe fuse".into())
}

/// Waits in a script until no daemon serves a layer of this directory any more.
const GONE: &str =
    "gone() { for i in $(seq 500); do pgrep -f \"dir=$PWD/\" >/dev/null || return 0; sleep .02; done; return 1; }";

/// The process that serves the writable layer, in a script.
const DAEMON: &str = "daemon() { pgrep -f \"upperdir=$PWD/\"; }";

#[test]
fn a_mount_starts_its_daemon_and_umount_ends_it() {
    needs!("a_mount_starts_its_daemon_and_umount_ends_it");
    let rig = Rig::new();
    let told = rig.gd(&format!(
        "{DAEMON}; graphdriver mount c m >/dev/null; daemon | wc -l
        grep -c \" $PWD/m fuse.vfs-fuse \" /proc/mounts
        cat m/etc/motd >/dev/null; echo new > m/etc/new; mv m/etc m/config; mkdir m/etc
        graphdriver mount c n >/dev/null; cat n/config/new; daemon | wc -l
        graphdriver umount c; test -z \"$(ls m n | grep etc)\"
        cat root/vfs-fuse/data/*/diff/config/new; daemon || true"
    ));
    assert_eq!(told, "1\n1\nnew\n1\nnew\n", "one daemon for both places, and all data on disk after umount");
    rig.wait_for_daemons(0);
    let changes = rig.gd("graphdriver diff c");
    assert!(changes.contains("A /config/new\n") && changes.contains("D /etc/motd\n"), "{changes}");
    rig.gd(
        "graphdriver mount c m >/dev/null; test \"$(cat m/config/new)\" = new; graphdriver umount m; graphdriver rm c",
    );
    let left = rig.gd("find root/vfs-fuse/data -name diff | wc -l; graphdriver --format json mounts");
    assert_eq!(left, "2\n[]\n");
}

#[test]
fn what_is_mounted_is_diffed_committed_and_exported_live() {
    needs!("what_is_mounted_is_diffed_committed_and_exported_live");
    let rig = Rig::new();
    let told = rig.gd(
        "graphdriver mount c m >/dev/null; exec 3<>m/open; echo unflushed >&3; rm m/etc/motd
        graphdriver inspect c >/dev/null; graphdriver diff c; graphdriver export c | tar -xO open
        graphdriver commit c new:1 >/dev/null; graphdriver mount new:1 n >/dev/null; cat n/open; ls n/etc | grep motd || true
        exec 3>&-; graphdriver umount m; graphdriver umount n; graphdriver save -o new.tar new:1; graphdriver rmi new:1 >/dev/null
        graphdriver load -qi new.tar >/dev/null; graphdriver mount new:1 n >/dev/null; cat n/open; graphdriver umount n",
    );
    assert_eq!(told, "C /etc\nD /etc/motd\nA /open\nunflushed\nunflushed\nunflushed\n");
    rig.wait_for_daemons(0);
}

#[test]
fn a_dead_daemon_is_shown_and_cleaned_up_after() {
    needs!("a_dead_daemon_is_shown_and_cleaned_up_after");
    let rig = Rig::new();
    let die =
        format!("{DAEMON}; {GONE}; graphdriver mount c m >/dev/null; echo kept > m/kept; kill -9 $(daemon); gone");
    let told = rig.gd(&format!("{die}; graphdriver --format json mounts; graphdriver umount m; graphdriver mounts"));
    let (json, table) = told.split_at(told.find("TARGET").unwrap());
    let mounts: Value = serde_json::from_str(json).unwrap();
    assert_eq!((&mounts[0]["Dead"], &mounts[0]["Writable"]), (&true.into(), &true.into()), "{told}");
    assert_eq!(table.lines().count(), 1, "{told}");

    let place = rig.path().join("m").display().to_string();
    for (what, says) in [
        ("graphdriver mounts >&2; false", "dead: its program is gone"),
        ("graphdriver mount c n", "graphdriver umount"),
        ("graphdriver cp c:/kept .", "the program that served it is gone"),
    ] {
        let code = if what.ends_with("false") { 1 } else { 5 };
        rig.gd_fails(code, &format!("{die}; e=0; ({what}) || e=$?; umount m; exit $e"), &[says, &place]);
    }
    let alive = "graphdriver mount c m >/dev/null; graphdriver --format json mounts; cat m/kept; graphdriver umount m";
    let told = rig.gd(&format!("{die}; umount m; {alive}"));
    assert!(told.contains("\"Dead\": false") && told.ends_with("kept\n"), "{told}");
    assert_eq!(rig.gd(&format!("{die}; graphdriver diff c; graphdriver umount c; graphdriver rm c")), "A /kept\nc\n");
    rig.wait_for_daemons(0);
}

/// The store is locked by somebody else when the mount is to be noted: the program serves it already, nobody sees it.
#[test]
fn a_mount_killed_before_it_is_shown_leaves_no_daemon() {
    needs!("a_mount_killed_before_it_is_shown_leaves_no_daemon");
    let rig = Rig::new();
    let mut store = rusqlite::Connection::open(rig.root().join("vfs-fuse/store.db")).unwrap();
    let lock = store.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate).unwrap();
    let mut command = rig.shell(&Rig::script("exec graphdriver mount c m"));
    let mut mount = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    rig.wait_for_daemons(1);
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!((rig.daemons().len(), mount.try_wait().unwrap()), (1, None), "the mount is on its way");
    mount.kill().unwrap();
    mount.wait().unwrap();
    rig.wait_for_daemons(0);
    drop(lock);
    assert_eq!(rig.gd("graphdriver --format json mounts; ls m"), "[]\n");
    rig.gd("graphdriver mount c m >/dev/null; ls m/etc >/dev/null; graphdriver umount m");
}

#[test]
fn drivers_and_info_tell_what_is_there_and_what_is_missing() {
    needs!("drivers_and_info_tell_what_is_there_and_what_is_missing");
    let rig = Rig::new();
    let drivers: Value = serde_json::from_str(&rig.gd("graphdriver --format json drivers")).unwrap();
    let found = drivers.as_array().unwrap().iter().find(|driver| driver["Name"] == "vfs-fuse").unwrap();
    assert_eq!(found["Usable"], true, "{found}");
    assert_eq!(found["Capabilities"]["write_strategy"]["strategy"], "copy-up", "{found}");
    let info = rig.gd("graphdriver info");
    for line in ["Storage Driver: vfs-fuse", " Mount Program: ", "Write Strategy: copy-up ("] {
        assert!(info.lines().any(|told| told.starts_with(line)), "{line}: {info}");
    }
    let option = "graphdriver --storage-opt vfs-fuse";
    rig.gd_fails(6, &format!("{option}.mount_program=/no/such info"), &["/no/such", "vfs-fuse.mount_program"]);
    rig.gd_fails(2, &format!("{option}.copy_up=fast info"), &["vfs-fuse.copy_up", "auto, reflink, extent, full"]);
    rig.gd_fails(2, &format!("{option}.mountopt=squash_to_uid=0 info"), &["vfs-fuse.mountopt", "timeout"]);
    rig.gd_fails(6, &format!("{option}.size=1G info"), &["quota"]);
    // Nobody finds a program that is nowhere: neither beside graphdriver nor in PATH.
    let alone = format!("cp {} alone; PATH=/bin ./alone --format json drivers", common::GRAPHDRIVER);
    let alone: Value = serde_json::from_str(&rig.gd(&alone)).unwrap();
    let unmet = &alone.as_array().unwrap().iter().find(|driver| driver["Name"] == "vfs-fuse").unwrap()["Unmet"];
    assert!(unmet["missing"].as_str().unwrap().contains("PATH"), "{unmet}");
    assert!(unmet["remedy"].as_str().unwrap().contains("cargo build"), "{unmet}");
}

#[test]
fn options_reach_the_program() {
    needs!("options_reach_the_program");
    let rig = Rig::new();
    let told = rig.gd(&format!(
        "{DAEMON}; graphdriver --storage-opt vfs-fuse.copy_up=extent --storage-opt vfs-fuse.complete=50M \
            --storage-opt vfs-fuse.passthrough=off --storage-opt vfs-fuse.mountopt=timeout=1,nosuid mount c m >/dev/null
        tr '\\0' '\\n' </proc/$(daemon)/cmdline; grep \" $PWD/m \" /proc/mounts; graphdriver umount m"
    ));
    for option in ["passthrough=0", "timeout=1", "copy_up=extent", "complete=50M"] {
        assert!(told.lines().any(|line| line.split(',').any(|o| o == option)), "{option}: {told}");
    }
    assert!(told.contains("nosuid") && !told.contains("mountopt"), "{told}");
}
