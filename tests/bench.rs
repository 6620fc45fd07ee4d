//! `bench write-amplification`: what it counts is true, and nothing of it is left.

mod common;

use common::{GRAPHDRIVER, Home, no_program, no_root, skipped};
use graphdriver::bench::device::Device;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use std::{
    fs::File,
    io::Read,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

macro_rules! needs {
    ($test:literal, $($program:literal),*) => {
        if skipped($test, no_root().or_else(|| no_program(&[$($program),*])).or_else(no_loop_devices)) {
            return;
        }
    };
}

fn no_loop_devices() -> Option<String> {
    (!Path::new("/dev/loop-control").exists()).then(|| "the kernel has no loop devices".into())
}

fn bench(home: &Home, arguments: &str) -> String {
    home.ok(&format!("graphdriver --format json bench write-amplification --scratch . {arguments}"))
}

fn results(home: &Home, arguments: &str) -> Value {
    serde_json::from_str(&bench(home, arguments)).unwrap()
}

/// The only sample of a case.
#[track_caller]
fn sample<'a>(results: &'a Value, subject: &str, workload: &str, case: &str) -> &'a Value {
    let is = |one: &&Value| one["subject"] == subject && one["workload"] == workload && one["case"] == case;
    let found = results["measurements"].as_array().unwrap().iter().find(is);
    &found.unwrap_or_else(|| panic!("{subject}, {workload}, {case}: {results:#}"))["samples"][0]
}

fn number(sample: &Value, field: &str) -> f64 {
    sample[field].as_f64().unwrap_or_else(|| panic!("{field}: {sample}"))
}

/// What is left in the scratch directory, and of loop devices whose files were there.
fn left(home: &Home) -> Vec<String> {
    let ours = |path: &str| path.contains(home.path().to_str().unwrap());
    let name = |entry: std::fs::DirEntry| entry.file_name().into_string().unwrap();
    let files = std::fs::read_dir(home.path()).unwrap().map(|entry| name(entry.unwrap()));
    let mut left: Vec<String> =
        files.filter(|name| name.starts_with("graphdriver-bench-") || name.starts_with('.')).collect();
    for device in std::fs::read_dir("/sys/block").unwrap().flatten() {
        let file = std::fs::read_to_string(device.path().join("loop/backing_file")).unwrap_or_default();
        left.extend(ours(&file).then_some(file));
    }
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    left.extend(mounts.lines().filter(|line| ours(line)).map(str::to_owned));
    left
}

/// The kernel takes a device down a moment after its last user has gone.
#[track_caller]
fn assert_nothing_is_left(home: &Home) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !left(home).is_empty() {
        assert!(Instant::now() < deadline, "left: {:?}", left(home));
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[track_caller]
fn assert_within(share: f64, counted: u64, known: u64) {
    let off = (counted as f64 / known as f64 - 1.0).abs();
    assert!(off <= share, "counted {counted}, and {known} are known: {:.1}% off", off * 100.0);
}

#[test]
fn the_counters_agree_with_traffic_that_is_known() {
    needs!("the_counters_agree_with_traffic_that_is_known", "losetup");
    const SIZE: u64 = 32 << 20;
    let home = Home::new();
    let device = Device::new(home.path(), SIZE).unwrap();
    let open = |direct: bool| {
        let flags = if direct { libc_o_direct() } else { 0 };
        File::options().read(true).write(true).custom_flags(flags).open(device.path()).unwrap()
    };
    let before = device.traffic().unwrap();
    let cached = open(false);
    let block = vec![7; 1 << 20];
    (0..24).for_each(|n| cached.write_all_at(&block, n << 20).unwrap());
    cached.sync_all().unwrap();
    let written = device.traffic().unwrap().since(before);
    assert_within(0.02, written.written, 24 << 20);
    assert_eq!(written.read, 0);

    // Past the cache, in pieces of 4 KiB at addresses that the kernel's blocks are aligned to.
    let (direct, before) = (open(true), device.traffic().unwrap());
    let buffer = vec![0; 8192];
    let start = buffer.as_ptr().align_offset(4096);
    let mut buffer = buffer;
    (0..2000).for_each(|n| direct.read_exact_at(&mut buffer[start..start + 4096], n * 4096).unwrap());
    let read = device.traffic().unwrap().since(before);
    assert_within(0.02, read.read, 2000 * 4096);
    assert_eq!(read.written, 0);
    assert!(device.allocated().unwrap() >= 24 << 20);
    drop((cached, direct, device));
    assert_nothing_is_left(&home);
}

fn libc_o_direct() -> i32 {
    rustix::fs::OFlags::DIRECT.bits() as i32
}

#[test]
fn large_writes_into_a_plain_directory_reach_the_disk_about_once() {
    needs!("large_writes_into_a_plain_directory_reach_the_disk_about_once", "mkfs.ext4");
    let home = Home::new();
    let results =
        results(&home, "--drivers overlay2 --filesystems ext4 --workloads rewrite --size 64M --repetitions 1");
    let plain = |workload: &str| {
        let sample = sample(&results, "plain directory on ext4", workload, "100% of 64 MiB");
        assert_eq!(number(sample, "written"), f64::from(64 << 20));
        number(sample, "device_written") / number(sample, "written")
    };
    for amplification in [plain("rewrite"), plain("rewrite-again")] {
        assert!((1.0..1.05).contains(&amplification), "{amplification}");
    }
    // The whole file is copied first, read and written, and only once.
    let of =
        |workload: &str, field: &str| number(sample(&results, "overlay2 on ext4", workload, "1% of 64 MiB"), field);
    assert!(of("rewrite", "device_written") >= f64::from(64 << 20));
    assert!(of("rewrite", "device_read") >= f64::from(64 << 20));
    assert!(of("rewrite-again", "device_written") < f64::from(4 << 20));
    assert_nothing_is_left(&home);
}

/// Copy-on-write beside redirect-on-write, as the project's own proof.
#[test]
fn the_first_write_into_a_gigabyte_costs_a_gigabyte_where_files_are_copied_and_little_where_they_are_not() {
    needs!(
        "the_first_write_into_a_gigabyte_costs_a_gigabyte_where_files_are_copied_and_little_where_they_are_not",
        "mkfs.ext4",
        "mkfs.xfs"
    );
    let test = "the_first_write_into_a_gigabyte_costs_a_gigabyte_where_files_are_copied_and_little_where_they_are_not";
    if skipped(test, no_vfs_fuse()) {
        return;
    }
    let home = Home::new();
    let measured = |arguments: &str| {
        results(&home, &format!("--drivers overlay2,vfs-fuse --workloads first-write --repetitions 1 {arguments}"))
    };
    let of = |results: &Value, subject: &str, case: &str, field: &str| {
        number(sample(results, subject, "first-write", case), field)
    };
    let ext4 = measured("--filesystems ext4 --size 1G --storage-opt vfs-fuse.copy_up=extent");
    let gigabyte = f64::from(1 << 30);
    assert!(of(&ext4, "overlay2 on ext4", "1 GiB", "device_written") >= gigabyte, "{ext4:#}");
    assert!(of(&ext4, "overlay2 on ext4", "1 GiB", "space") >= gigabyte);
    let xfs = measured("--filesystems xfs --size 1G");
    let sharing = [(&ext4, "vfs-fuse on ext4"), (&xfs, "overlay2 on xfs"), (&xfs, "vfs-fuse on xfs")];
    for (results, subject) in sharing {
        let written = of(results, subject, "1 GiB", "device_written");
        assert!(written < f64::from(4 << 20), "{subject}: {written}");
        assert!(of(results, subject, "1 GiB", "space_on_device") < f64::from(16 << 20), "{subject}");
    }
    assert_nothing_is_left(&home);
}

/// A sync writes xfs's log, which is about a third of it.
#[test]
fn metadata_of_xfs_counts_where_it_belongs_and_not_in_the_log_alone() {
    needs!("metadata_of_xfs_counts_where_it_belongs_and_not_in_the_log_alone", "mkfs.xfs");
    let home = Home::new();
    let results = results(&home, "--drivers overlay2 --filesystems xfs --workloads chown --size 64k --repetitions 1");
    for subject in ["plain directory on xfs", "overlay2 on xfs"] {
        let written = number(sample(&results, subject, "chown", "1000 files"), "device_written");
        // Inodes have 512 bytes each, and are in the log too.
        assert!(written >= 1000.0 * 512.0 * 1.25, "{subject}: {written}");
    }
    assert_nothing_is_left(&home);
}

/// It takes them in advance of what a file may grow by, and gives them back when the file is closed for good.
#[test]
fn blocks_that_xfs_only_sets_aside_are_not_what_containers_hold() {
    needs!("blocks_that_xfs_only_sets_aside_are_not_what_containers_hold", "mkfs.xfs");
    let home = Home::new();
    let results =
        results(&home, "--drivers overlay2 --filesystems xfs --workloads containers --size 16M --repetitions 1");
    for containers in [1, 10] {
        let case = format!("{containers} container{} (16 MiB)", if containers == 1 { "" } else { "s" });
        let sample = sample(&results, "overlay2 on xfs", "containers", &case);
        let mebibytes = |field: &str| number(sample, field) / f64::from(containers << 20);
        // Each has written 1 MiB; and the whole file, as the layer measures it.
        assert!((0.9..1.5).contains(&mebibytes("space_on_device")), "{sample:#}");
        assert!((15.9..16.5).contains(&mebibytes("space")), "{sample:#}");
    }
    assert_nothing_is_left(&home);
}

/// The diff is exported from a snapshot, which btrfs takes a while to clear away; meanwhile all blocks are shared with it.
#[test]
fn measuring_the_first_pass_leaves_the_second_alone() {
    needs!("measuring_the_first_pass_leaves_the_second_alone", "mkfs.btrfs");
    if skipped("measuring_the_first_pass_leaves_the_second_alone", no_filesystem("btrfs").or_else(no_btrfs_driver)) {
        return;
    }
    let home = Home::new();
    let results = results(&home, "--drivers btrfs --filesystems btrfs --workloads rewrite --size 16M --repetitions 1");
    let of =
        |workload: &str, field: &str| number(sample(&results, "btrfs on btrfs", workload, "100% of 16 MiB"), field);
    let both = ["rewrite", "rewrite-again"].map(|workload| of(workload, "space_on_device"));
    assert!(both[1] < both[0] * 1.25, "{both:?}");
    let both = ["rewrite", "rewrite-again"].map(|workload| of(workload, "device_written"));
    assert!(both[1] < both[0] * 1.25, "{both:?}");
    assert_eq!(of("rewrite", "diff"), of("rewrite-again", "diff"));
    assert_nothing_is_left(&home);
}

fn no_btrfs_driver() -> Option<String> {
    (!cfg!(feature = "btrfs")).then(|| "needs --features btrfs".into())
}

fn no_filesystem(name: &str) -> Option<String> {
    let known = std::fs::read_to_string("/proc/filesystems").unwrap();
    let has = known.lines().any(|line| line.ends_with(&format!("\t{name}")));
    (!has).then(|| format!("the kernel has no {name}"))
}

fn no_vfs_fuse() -> Option<String> {
    let program = Path::new(GRAPHDRIVER).with_file_name("vfs-fuse");
    let missing = [program.as_path(), Path::new("/dev/fuse")].into_iter().find(|path| !path.exists());
    missing.map(|path| format!("there is no {}", path.display()))
}

#[test]
fn a_run_tells_of_every_workload_and_is_compared_with_an_earlier_one() {
    needs!("a_run_tells_of_every_workload_and_is_compared_with_an_earlier_one", "mkfs.ext4");
    let home = Home::new();
    // In memory, where flushing costs nothing; gone with the script.
    let tiny = "--scratch memory --drivers overlay2 --filesystems ext4 --size 256k --repetitions 1";
    let bench = "mkdir -p memory; mount -t tmpfs -o size=4g none memory; graphdriver --format $format bench write-amplification";
    let table = home.ok(&format!("format=table; {bench} {tiny} -o out"));
    let workloads = "first-write rewrite rewrite-again append chmod chown delete-recreate sqlite create depth depth-chmod containers";
    for workload in workloads.split(' ') {
        for subject in ["overlay2 on ext4", "plain directory on ext4"] {
            let told = |line: &str| line.starts_with(&format!("{workload} ")) && line.contains(subject);
            assert!(table.lines().any(told), "{workload}, {subject}: {table}");
        }
    }
    for part in [
        "AMPLIFICATION",
        "LATER P99",
        "scratch files: on tmpfs (none; ",
        "copy-up (whole file)",
        "larger than 256 KiB",
        "out/results.json",
        "out/report.html",
    ] {
        assert!(table.contains(part), "{part}: {table}");
    }
    let report = std::fs::read_to_string(home.path().join("out/report.html")).unwrap();
    for part in ["<svg", "overlay2 on ext4", "plain directory on ext4", "delete-recreate", "depth"] {
        assert!(report.contains(part), "{part} is missing in the report");
    }
    home.ok("grep -q '<svg' out/picture.svg");
    let path = home.path().join("out/results.json");
    let mut old: Value = serde_json::from_reader(File::open(&path).unwrap()).unwrap();
    assert_eq!(old["host"]["scratch"]["filesystem"], "tmpfs", "{:#}", old["host"]);
    assert!(report.contains("scratch files on"), "the report does not say what the scratch files lay on");
    assert!(report.find("<svg") < report.find("What ran where"), "charts come first");
    let with = |measurement: &Value, field: &str| number(&measurement["samples"][0], field) > 0.0;
    for measurement in old["measurements"].as_array().unwrap() {
        assert!(with(measurement, "device_written") && with(measurement, "wall_us"), "{measurement:#}");
        let changes_data = !["chmod", "chown", "depth-chmod"].contains(&measurement["workload"].as_str().unwrap());
        assert_eq!(with(measurement, "written"), changes_data, "{measurement:#}");
        // A plain directory exports nothing, and no part of what it holds is a layer's.
        for field in ["diff", "space", "space_on_device"] {
            let none = measurement["samples"][0][field].is_null();
            assert_eq!(none, measurement["subject"] == "plain directory on ext4", "{field}: {measurement:#}");
        }
    }

    // The same again is no worse; against a past in which less was written it is.
    let again = format!("{bench} {tiny} --workloads append -o out --compare");
    let told = home.ok(&format!("format=table; cp out/results.json old.json; {again} old.json --threshold 100%"));
    assert!(told.contains("Since ") && !told.contains("WORSE"), "{told}");
    for measurement in old["measurements"].as_array_mut().unwrap() {
        measurement["samples"][0]["device_written"] = 4096.into();
    }
    std::fs::write(home.path().join("doctored.json"), old.to_string()).unwrap();
    let told =
        home.fails(1, &format!("format=table; {again} doctored.json"), &["10%", "overlay2 on ext4 append 256 KiB"]);
    assert!(told.contains("WORSE"), "{told}");
    let told: Value =
        serde_json::from_str(&home.fails(1, &format!("format=json; {again} doctored.json"), &["append"])).unwrap();
    assert_eq!(told["comparison"][0]["worse"], true, "{told:#}");
    assert!(told["comparison_notes"].is_array(), "{told:#}");
    // Before anything is measured.
    home.fails(
        2,
        &format!("format=table; {again} doctored.json").replace("256k", "128k").replace("append", "depth"),
        &["256 KiB", "128 KiB", "--size"],
    );
    assert_eq!(told["format"], 2);
    assert_nothing_is_left(&home);
}

#[test]
fn what_cannot_be_done_is_refused_before_anything_is_measured() {
    needs!("what_cannot_be_done_is_refused_before_anything_is_measured", "mkfs.ext4");
    let home = Home::new();
    std::fs::write(home.path().join("results.json"), "{\"my\": \"own\"}").unwrap();
    let fails = |code, arguments: &str, says: &[&str]| {
        let scratch = if arguments.contains("--scratch") { "" } else { "--scratch ." };
        home.fails(code, &format!("graphdriver bench write-amplification {scratch} {arguments}"), says);
    };
    fails(2, "--drivers aufs", &["\"aufs\"", "known are overlay2, btrfs, zfs, devicemapper, vfs-fuse"]);
    fails(2, "--workloads fsck", &["\"fsck\"", "known are first-write, rewrite, append"]);
    fails(2, "--filesystems ntfs", &["\"ntfs\"", "known are ext4, xfs, btrfs, zfs"]);
    fails(2, "--drivers zfs --filesystems ext4", &["zfs", "with themselves"]);
    fails(2, "--size 1k", &["64K"]);
    fails(2, "--size much", &["much"]);
    fails(2, "--size 99999999999999999999", &["1024T"]);
    fails(2, "--drivers overlay2,zfs,btrfs --filesystems ext4", &["nothing to measure for btrfs, zfs"]);
    fails(2, "--scratch demo.tar", &["demo.tar", "no directory"]);
    fails(2, "--repetitions 0", &["0 repetitions"]);
    fails(2, "--threshold 20%", &["--compare"]);
    fails(2, "--storage-opt dm.thinpooldev=tank", &["dm.thinpooldev", "of its own"]);
    fails(2, "--storage-opt overlay2.colour=red", &["overlay2.colour"]);
    fails(2, "--compare demo.tar", &["demo.tar", "no results of graphdriver bench"]);
    fails(3, "--compare nowhere.json", &["nowhere.json"]);
    fails(4, "-o .", &["results.json is there already", "-o"]);
    fails(2, "-o demo.tar/x", &["demo.tar/x", "another directory with -o"]);
    fails(8, "--size 900T", &["has", "free", "--scratch"]);
    // A user who may enter the home, which is root's alone.
    let script = "chmod 711 .; cp \"$(command -v graphdriver)\" .; cd /
        setpriv --reuid 1234 --clear-groups \"$OLDPWD/graphdriver\" bench write-amplification -o /tmp/nowhere";
    let out = home.run(script);
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(said.contains("needs root") && said.contains("sudo"), "{said}");
    assert_eq!(out.status.code(), Some(7));
    assert_nothing_is_left(&home);
}

/// A driver that stopped working is not passed over.
#[test]
fn what_was_asked_for_or_measured_before_and_cannot_be_now_fails() {
    let test = "what_was_asked_for_or_measured_before_and_cannot_be_now_fails";
    needs!("what_was_asked_for_or_measured_before_and_cannot_be_now_fails", "mkfs.ext4");
    if skipped(test, no_vfs_fuse()) {
        return;
    }
    let home = Home::new();
    let bench = "graphdriver bench write-amplification --scratch . --filesystems ext4 --workloads first-write --size 64k \
                 --repetitions 1";
    home.ok(&format!("{bench} --drivers overlay2,vfs-fuse -o before"));
    let broken = format!("{bench} -o out --storage-opt vfs-fuse.mount_program=/nonexistent");
    let of_fuse = ["vfs-fuse", "could not be measured"];
    home.fails(6, &format!("{broken} --drivers overlay2,vfs-fuse"), &of_fuse);
    let compare = format!("{broken} --drivers overlay2,vfs-fuse --compare before/results.json");
    let told = home.fails(1, &compare, &["not now", "vfs-fuse on ext4 first-write 64 KiB"]);
    assert!(told.contains("GONE"), "{told}");
    // Who did not ask for it does not miss it.
    home.ok(&format!("{bench} -o out --drivers overlay2 --compare before/results.json --threshold 100%"));
    // Gone while it was measuring: the table is shown all the same.
    let script = format!(
        "mkdir doomed; (until ls -d graphdriver-bench-* 2>/dev/null; do sleep 0.01; done; rmdir doomed; touch doomed) >/dev/null & \
         {bench} --drivers overlay2 -o doomed"
    );
    let told = home.fails(4, &script, &["doomed", "shown above"]);
    assert!(told.contains("overlay2 on ext4"), "{told}");
    assert_nothing_is_left(&home);
}

/// The only moment when a layer of vfs-fuse is mounted under a name.
#[test]
fn killed_while_sqlite_works_on_vfs_fuse_it_leaves_nothing() {
    needs!("killed_while_sqlite_works_on_vfs_fuse_it_leaves_nothing", "mkfs.ext4");
    let test = "killed_while_sqlite_works_on_vfs_fuse_it_leaves_nothing";
    if skipped(test, no_vfs_fuse()) {
        return;
    }
    let home = Home::new();
    let arguments = "bench write-amplification --filesystems ext4 --size 4M --drivers vfs-fuse --workloads sqlite";
    let mut bench = Command::new(GRAPHDRIVER)
        .args(arguments.split(' '))
        .args(["--scratch", "."])
        .env("TMPDIR", home.path())
        .current_dir(home.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let (deadline, place) = (Instant::now() + Duration::from_secs(60), home.path().join("graphdriver-bench-"));
    let mounted =
        |mounts: String| mounts.lines().any(|line| line.contains(place.to_str().unwrap()) && line.contains(" fuse."));
    let threads = format!("/proc/{}/task", bench.id());
    let namespace = loop {
        let mut all = std::fs::read_dir(&threads).unwrap().flatten().map(|thread| thread.path());
        if all.any(|thread| std::fs::read_to_string(thread.join("mounts")).is_ok_and(mounted)) {
            break std::fs::read_link(format!("/proc/{}/ns/mnt", bench.id())).unwrap();
        }
        let over = bench.try_wait().unwrap().is_some() || Instant::now() > deadline;
        assert!(!over, "it never worked on a database");
        std::thread::sleep(Duration::from_millis(1));
    };
    let _kill = KillsIn(namespace);
    bench.kill().unwrap();
    bench.wait().unwrap();
    let empty = std::fs::read_dir(home.path()).unwrap().flatten().map(|entry| entry.path());
    empty.filter(|path| path.is_dir()).for_each(|path| std::fs::remove_dir(path).unwrap());
    assert_nothing_is_left(&home);
}

/// Ends what is left in a mount namespace.
struct KillsIn(std::path::PathBuf);

impl Drop for KillsIn {
    fn drop(&mut self) {
        for process in std::fs::read_dir("/proc").unwrap().flatten() {
            let id = process.file_name().to_str().and_then(|name| name.parse().ok());
            let there = || std::fs::read_link(process.path().join("ns/mnt")).is_ok_and(|one| one == self.0);
            if let Some(id) = id.filter(|_| there()) {
                let _ = kill(Pid::from_raw(id), Signal::SIGKILL);
            }
        }
    }
}

#[test]
fn interrupted_or_killed_it_leaves_nothing() {
    needs!("interrupted_or_killed_it_leaves_nothing", "mkfs.ext4");
    if skipped("interrupted_or_killed_it_leaves_nothing", no_vfs_fuse()) {
        return;
    }
    let home = Home::new();
    for (wait, signal) in [(700, Signal::SIGINT), (1900, Signal::SIGTERM), (1300, Signal::SIGKILL)] {
        let mut bench = Command::new(GRAPHDRIVER)
            .args(["bench", "write-amplification", "--filesystems", "ext4", "--size", "64M", "--drivers", "vfs-fuse"])
            .args(["--scratch", "."])
            .current_dir(home.path())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(wait));
        kill(Pid::from_raw(bench.id() as i32), signal).unwrap();
        let status = bench.wait().unwrap();
        let mut said = String::new();
        bench.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        if signal == Signal::SIGKILL {
            // The kernel frees devices and mounts; of the place where they were mounted an empty directory stays.
            let empty = std::fs::read_dir(home.path()).unwrap().flatten().map(|entry| entry.path());
            empty.filter(|path| path.is_dir()).for_each(|path| std::fs::remove_dir(path).unwrap());
        } else {
            assert_eq!(status.code(), Some(130), "{said}");
            assert!(said.contains("interrupted"), "{said}");
        }
        assert_nothing_is_left(&home);
    }
    assert!(!home.path().join("graphdriver-bench").exists(), "nothing is told of half a run");
}
