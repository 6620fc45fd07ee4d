//! The real binary under attack: eight processes at once, kills, full disks, signals, reboots, hostile archives.

mod support;

use nix::sys::signal::Signal;
use std::{
    collections::BTreeSet,
    fs,
    os::unix::process::ExitStatusExt,
    path::Path,
    process::Child,
    time::{Duration, Instant},
};
use support::{
    Gd, Random, errors, free_space,
    images::{Layer, archive, archive_of, gzip, random_layer, sha256},
    isolated, system,
};
use tar::EntryType;

const LIMIT: Duration = Duration::from_secs(300);

fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

// ---- several processes ----

#[test]
fn eight_processes_at_once_lose_nothing_and_never_deadlock() {
    isolated("eight_processes_at_once_lose_nothing_and_never_deadlock", LIMIT, |dir| {
        let gd = Gd::new(dir, &dir.join("root"));
        let base = random_layer(1, 20, 3000);
        for n in 0..4 {
            let tar = archive(&format!("localhost/shared:{n}"), &[&base, &random_layer(10 + n % 3, 10, 5000)]);
            gd.file(&format!("shared{n}.tar"), &tar);
        }
        for n in 0..8 {
            let tar = archive(&format!("localhost/own{n}:1"), &[&base, &random_layer(100 + n, 10, 2000)]);
            gd.file(&format!("own{n}.tar"), &tar);
        }
        let deadline = Instant::now() + secs(20);
        std::thread::scope(|scope| {
            for n in 0..8 {
                let gd = &gd;
                scope.spawn(move || Worker::new(gd, n).run(deadline));
            }
        });
        gd.ok(&["mounts"]);
        gd.assert_tidy("after all workers");
        gd.assert_mounts_agree("after all workers");
        for id in gd.image_ids() {
            gd.assert_whole(&id);
        }
        for n in 0..8 {
            let id = gd.ok(&["inspect", "--type", "image", &format!("localhost/own{n}:1")]);
            assert!(id.contains("sha256:"), "the image that only worker {n} used is still there");
        }
        remove_everything(&gd);
    });
}

fn remove_everything(gd: &Gd) {
    let containers = gd.ok(&["ps", "-q", "--no-trunc"]);
    for id in containers.lines() {
        gd.ok(&["rm", "-f", id]);
    }
    for id in gd.image_ids() {
        gd.ok(&["rmi", "-f", &id]);
    }
    for list in [&["images", "-a", "-q"][..], &["ps", "-q"]] {
        assert_eq!(gd.ok(list), "");
    }
    assert_eq!(gd.ok(&["mounts", "--format", "json"]).trim(), "[]");
    gd.assert_empty("after everything was removed");
    gd.assert_mounts_agree("after everything was removed");
}

/// One of the eight: what is its own must always be as it left it; what is shared may be gone, busy or taken.
struct Worker<'a> {
    gd: &'a Gd,
    n: u64,
    random: Random,
    rounds: u64,
}

impl<'a> Worker<'a> {
    fn new(gd: &'a Gd, n: u64) -> Self {
        Worker { gd, n, random: Random::new(7 + n), rounds: 0 }
    }

    fn run(&mut self, deadline: Instant) {
        let own = self.gd.path(&format!("own{}.tar", self.n));
        self.gd.ok(&["load", "-i", &own]);
        self.gd.make_dir(&format!("mnt/{}", self.n));
        while Instant::now() < deadline {
            self.rounds += 1;
            match self.random.below(10) {
                0..3 => self.own_container(),
                3 => self.own_image(),
                4 => self.mounted_elsewhere(),
                _ => self.shared(),
            }
        }
        println!("worker {}: {} rounds", self.n, self.rounds);
    }

    /// Create, mount, write, diff, commit, umount, mount again, remove: nobody else touches it, so all must succeed.
    fn own_container(&mut self) {
        let (name, image) = (format!("own{}", self.n), format!("localhost/own{}:1", self.n));
        let target = self.gd.path(&format!("mnt/{}", self.n));
        let committed = format!("localhost/built{}:{}", self.n, self.rounds);
        self.gd.ok(&["create", "--name", &name, &image]);
        self.gd.ok(&["mount", &name, &target]);
        let target_dir = Path::new(&target);
        assert_eq!(fs::read(target_dir.join("etc/common")).unwrap(), b"common");
        let content = self.random.bytes(4000);
        fs::write(target_dir.join("etc/new"), &content).unwrap();
        fs::remove_file(target_dir.join("etc/common")).unwrap();
        assert_eq!(self.gd.ok(&["diff", &name]), "C /etc\nD /etc/common\nA /etc/new\n");
        self.gd.ok(&["commit", &name, &committed]);
        self.gd.ok(&["umount", &target]);
        assert!(!target_dir.join("etc").exists());
        self.gd.ok(&["mount", "--read-only", &committed, &target]);
        assert_eq!(fs::read(target_dir.join("etc/new")).unwrap(), content);
        assert!(!target_dir.join("etc/common").exists());
        self.gd.ok(&["umount", &target]);
        self.gd.ok(&["rm", &name]);
        if self.random.below(2) == 0 {
            self.gd.ok(&["rmi", &committed]);
        }
    }

    fn own_image(&mut self) {
        let image = format!("localhost/own{}:1", self.n);
        self.gd.ok(&["rmi", &image]);
        self.gd.ok(&["load", "-i", &self.gd.path(&format!("own{}.tar", self.n))]);
    }

    /// In a mount namespace that ends without unmounting.
    fn mounted_elsewhere(&mut self) {
        let target = self.gd.path(&format!("mnt/{}", self.n));
        let script = format!(
            "unshare --mount --propagation private sh -ec '$GD mount localhost/own{}:1 {target}; test -e {target}/etc/common'",
            self.n
        );
        let out = self.gd.shell(&script);
        assert!(out.status.success(), "{}", errors(&out));
    }

    fn shared(&mut self) {
        let k = self.random.below(4);
        let (image, container) = (format!("localhost/shared:{k}"), format!("shared{k}"));
        let target = self.gd.path(&format!("mnt/{}", self.n));
        let archive = self.gd.path(&format!("shared{k}.tar"));
        let built = format!("localhost/shared-built:{k}");
        match self.random.below(8) {
            0 | 1 => drop(self.gd.ok(&["load", "-i", &archive])),
            2 => self.contend(&["create", "--name", &container, &image]),
            3 => self.contend(&["rm", "-f", &container]),
            4 => self.contend(&["rmi", "-f", &image]),
            5 => self.contend(&["commit", &container, &built]),
            6 => self.contend(&["rmi", &built]),
            _ => {
                self.contend(&["mount", &container, &target]);
                self.contend(&["umount", &target]);
            }
        }
    }

    /// Others do the same to the same, so it may be gone (3), taken (4) or busy (5).
    fn contend(&self, args: &[&str]) {
        let out = self.gd.run(args);
        let (code, text) = (out.status.code(), errors(&out));
        let fine = matches!(code, Some(0 | 3 | 4 | 5)) && !text.contains("database") && !text.contains("os error");
        assert!(fine, "{args:?} ends with {code:?}: {text}");
    }
}

#[test]
fn eight_processes_can_make_the_same_data_root() {
    isolated("eight_processes_can_make_the_same_data_root", LIMIT, |dir| {
        // A filesystem that takes its time to sync leaves wider windows.
        disk(dir, "ext4", 256);
        for n in 0..15 {
            let gd = Gd::new(dir, &dir.join(format!("disk/root{n}")));
            let children: Vec<_> = (0..8).map(|_| gd.spawn(&["images"])).collect();
            for child in children {
                let out = child.wait_with_output().unwrap();
                assert!(out.status.success(), "{}", errors(&out));
            }
            gd.assert_empty("after eight first commands");
        }
    });
}

#[test]
fn a_commit_whose_container_and_image_go_meanwhile_fails_and_leaves_nothing() {
    isolated("a_commit_whose_container_and_image_go_meanwhile_fails_and_leaves_nothing", LIMIT, |dir| {
        let gd = Gd::new(dir, &dir.join("root"));
        gd.ok(&["load", "-i", &small_image(&gd)]);
        gd.ok(&["create", "--name", "c", "localhost/small:1"]);
        gd.ok(&["mount", "c", &gd.make_dir("mnt")]);
        for n in 0..100 {
            fs::write(dir.join(format!("mnt/{n}")), Random::new(n).bytes(500_000)).unwrap();
        }
        gd.ok(&["umount", "c"]);
        let layers = || fs::read_dir(gd.store().join("records")).unwrap().count();
        let before = layers();
        let commit = gd.spawn(&["commit", "c", "localhost/built:1"]);
        while layers() == before {
            std::thread::sleep(Duration::from_millis(1));
        }
        send(&commit, Signal::SIGSTOP);
        gd.ok(&["rm", "c"]);
        gd.ok(&["rmi", "localhost/small:1"]);
        send(&commit, Signal::SIGCONT);
        let out = commit.wait_with_output().unwrap();
        assert_eq!(out.status.code(), Some(3), "{}", errors(&out));
        assert_eq!(gd.ok(&["images", "-a", "-q"]), "");
        gd.assert_empty("after the next command");
    });
}

// ---- kill -9 ----

/// Kills a command at `kills` moments, spread evenly at random over the time it takes undisturbed, and looks at the store
/// after the next command.
fn kill_often(gd: &Gd, seed: u64, kills: usize, args: &[&str], before: &dyn Fn(), after: &dyn Fn()) {
    let mut random = Random::new(seed);
    let mut whole: BTreeSet<String> = BTreeSet::new();
    let mut runs = Vec::new();
    for _ in 0..3 {
        before();
        let start = Instant::now();
        let out = gd.spawn(args).wait_with_output().unwrap();
        runs.push(start.elapsed());
        assert!(out.status.success(), "{args:?}: {}", errors(&out));
        after();
    }
    runs.sort();
    let took = runs[1];
    let (mut hits, mut tries) = (0, 0);
    while hits < kills {
        tries += 1;
        assert!(tries < 10 * kills, "{args:?} ends before it can be killed");
        before();
        let mut child = gd.spawn(args);
        std::thread::sleep(took.mul_f64(random.below(10_000) as f64 / 10_000.0));
        child.kill().unwrap();
        hits += usize::from(!child.wait().unwrap().success());
        let when = format!("kill {tries} of {args:?} (seed {seed})");
        assert_no_process_left(&when);
        let ids = gd.image_ids();
        gd.assert_tidy(&when);
        for id in ids {
            // An image that was whole once is looked at again only when it has been away.
            if whole.insert(id.clone()) || tries % 8 == 0 {
                gd.assert_whole(&id);
            }
        }
        gd.ok(&["mounts"]);
        gd.assert_mounts_agree(&when);
        after();
    }
    println!("{args:?}: {hits} kills within {took:?}, {} came too late", tries - hits);
}

/// A helper of a killed process ends with it: it would keep its session's lock and with it what is to be undone.
fn assert_no_process_left(when: &str) {
    let alive = || {
        let stats =
            fs::read_dir("/proc").unwrap().filter_map(|e| fs::read_to_string(e.unwrap().path().join("stat")).ok());
        stats.filter(|stat| stat.contains("(graphdriver)") && !stat.contains(") Z ")).count()
    };
    let deadline = Instant::now() + secs(10);
    while alive() > 0 {
        assert!(Instant::now() < deadline, "{when}: a process of the killed command lives on");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn small_image(gd: &Gd) -> String {
    let layers = [random_layer(1, 150, 500), random_layer(2, 50, 4000), random_layer(3, 1, 2_000_000)];
    let diff_ids: Vec<_> = layers.iter().map(|tar| sha256(tar)).collect();
    let zipped = gzip(&layers[1]);
    gd.file("small.tar", &archive_of("localhost/small:1", &[&layers[0], &zipped, &layers[2]], &diff_ids))
}

#[test]
fn a_killed_load_leaves_only_whole_layers_and_nothing_else() {
    isolated("a_killed_load_leaves_only_whole_layers_and_nothing_else", LIMIT, |dir| {
        let gd = Gd::new(dir, &dir.join("root"));
        let archive = small_image(&gd);
        let remove = || gd.if_there(&["rmi", "localhost/small:1"]);
        kill_often(&gd, 1, 40, &["load", "-i", &archive], &|| {}, &remove);
        remove_everything(&gd);
    });
}

#[test]
fn a_killed_commit_or_import_leaves_only_whole_layers_and_nothing_else() {
    isolated("a_killed_commit_or_import_leaves_only_whole_layers_and_nothing_else", LIMIT, |dir| {
        let gd = Gd::new(dir, &dir.join("root"));
        gd.ok(&["load", "-i", &small_image(&gd)]);
        gd.ok(&["create", "--name", "c", "localhost/small:1"]);
        let target = gd.make_dir("mnt");
        gd.ok(&["mount", "c", &target]);
        for n in 0..200 {
            fs::write(dir.join(format!("mnt/new{n}")), Random::new(n).bytes(3000)).unwrap();
        }
        fs::remove_dir_all(dir.join("mnt/d1")).unwrap();
        let remove = || gd.if_there(&["rmi", "localhost/built:1"]);
        kill_often(&gd, 2, 40, &["commit", "c", "localhost/built:1"], &|| {}, &remove);
        let tar = gd.file("rootfs.tar", &gzip(&random_layer(9, 200, 3000)));
        kill_often(&gd, 3, 20, &["import", &tar, "localhost/built:1"], &|| {}, &remove);
        remove_everything(&gd);
    });
}

#[test]
fn a_killed_create_rm_or_rmi_happens_wholly_or_not_at_all() {
    isolated("a_killed_create_rm_or_rmi_happens_wholly_or_not_at_all", LIMIT, |dir| {
        let gd = Gd::new(dir, &dir.join("root"));
        let archive = small_image(&gd);
        let load = || drop(gd.ok(&["load", "-i", &archive]));
        let rm = || gd.if_there(&["rm", "k"]);
        load();
        kill_often(&gd, 4, 20, &["create", "--name", "k", "localhost/small:1"], &|| {}, &rm);
        let files = gd.make_dir("files");
        for n in 0..300 {
            fs::write(dir.join(format!("files/{n}")), "content").unwrap();
        }
        let filled = || {
            gd.ok(&["create", "--name", "k", "localhost/small:1"]);
            gd.ok(&["cp", &files, "k:/"]);
        };
        kill_often(&gd, 5, 20, &["rm", "k"], &filled, &rm);
        kill_often(&gd, 6, 20, &["rmi", "localhost/small:1"], &load, &|| {});
        remove_everything(&gd);
    });
}

#[test]
fn a_killed_mount_or_umount_leaves_store_and_kernel_agreed() {
    isolated("a_killed_mount_or_umount_leaves_store_and_kernel_agreed", LIMIT, |dir| {
        let gd = Gd::new(dir, &dir.join("root"));
        gd.ok(&["load", "-i", &small_image(&gd)]);
        gd.ok(&["create", "--name", "k", "localhost/small:1"]);
        let target = gd.make_dir("mnt");
        let umount = || gd.if_there(&["umount", &target]);
        kill_often(&gd, 7, 20, &["mount", "k", &target], &|| {}, &umount);
        let mount = || drop(gd.ok(&["mount", "k", &target]));
        kill_often(&gd, 8, 20, &["umount", &target], &mount, &umount);
        remove_everything(&gd);
    });
}

// ---- full disks ----

/// A small filesystem at DIR/disk: tmpfs, or ext4 on a loop device that goes with the namespace.
fn disk(dir: &Path, fstype: &str, megabytes: u64) -> Gd {
    let mut gd = Gd::new(dir, &dir.join("disk/root"));
    gd.make_dir("disk");
    let at = gd.path("disk");
    if fstype == "tmpfs" {
        system("mount", &["-t", "tmpfs", "-o", &format!("size={megabytes}m"), "none", &at]);
    } else {
        let image = gd.file("disk.img", b"");
        fs::File::options().write(true).open(&image).unwrap().set_len(megabytes << 20).unwrap();
        system(&format!("mkfs.{fstype}"), &["-q", &image]);
        system("mount", &["-o", "loop", &image, &at]);
    }
    gd.root = dir.join("disk/root");
    gd
}

/// Room to spare between two looks at free space: the database's log and directory blocks.
const SLACK: u64 = 2 << 20;

fn assert_same_space(gd: &Gd, before: u64, when: &str) {
    let now = free_space(&gd.dir.join("disk"));
    assert!(now + SLACK > before, "{when}: {now} bytes free, and {before} before");
}

fn assert_no_space(text: &str, layer: &str) {
    assert!(text.contains("No space left") && text.contains(layer), "{text}");
}

fn full_disk(name: &str, fstype: &'static str) {
    isolated(name, LIMIT, |dir| {
        let gd = disk(dir, fstype, 64);
        let small = small_image(&gd);
        gd.ok(&["load", "-i", &small]);
        let filler = dir.join("disk/filler");
        fs::write(&filler, vec![7; 25 << 20]).unwrap();
        let before = free_space(&dir.join("disk"));
        let images = gd.ok(&["images", "--format", "json"]);

        // Layer by layer: the first fits.
        let layers = [random_layer(20, 10, 100_000), random_layer(21, 400, 100_000)];
        let big = gd.file("big.tar", &archive("localhost/big:1", &[&layers[0], &layers[1]]));
        assert_no_space(&gd.fails(&["load", "-i", &big], 8), &format!("layer sha256:{}", sha256(&layers[1])));
        gd.assert_tidy("a load that did not fit");
        assert_eq!(gd.ok(&["images", "--format", "json"]), images);
        assert_same_space(&gd, before, "a load that did not fit");

        let rootfs = gd.file("rootfs.tar", &layers[1]);
        assert_no_space(&gd.fails(&["import", &rootfs, "localhost/big:1"], 8), "rootfs.tar");
        gd.assert_tidy("an import that did not fit");
        assert_same_space(&gd, before, "an import that did not fit");

        gd.ok(&["create", "--name", "c", "localhost/small:1"]);
        let target = gd.make_dir("mnt");
        gd.ok(&["mount", "c", &target]);
        fs::write(dir.join("mnt/large"), Random::new(3).bytes(20 << 20)).unwrap();
        let before = free_space(&dir.join("disk"));
        assert_no_space(&gd.fails(&["commit", "c", "localhost/big:1"], 8), "container c");
        gd.assert_tidy("a commit that did not fit");
        assert_same_space(&gd, before, "a commit that did not fit");
        assert_eq!(gd.ok(&["images", "--format", "json"]), images);

        fs::remove_file(&filler).unwrap();
        gd.ok(&["commit", "c", "localhost/built:1"]);
        gd.assert_whole("localhost/built:1");
        gd.ok(&["rm", "-f", "c"]);
        gd.ok(&["rmi", "localhost/built:1"]);
        gd.ok(&["load", "-i", &big]);
        gd.assert_whole("localhost/big:1");
        remove_everything(&gd);
    });
}

#[test]
fn a_load_commit_or_import_that_fills_a_tmpfs_leaves_nothing_and_works_later() {
    full_disk("a_load_commit_or_import_that_fills_a_tmpfs_leaves_nothing_and_works_later", "tmpfs");
}

#[test]
fn a_load_commit_or_import_that_fills_an_ext4_leaves_nothing_and_works_later() {
    full_disk("a_load_commit_or_import_that_fills_an_ext4_leaves_nothing_and_works_later", "ext4");
}

fn fill(path: &Path) {
    use std::io::Write;
    let mut file = fs::File::create(path).unwrap();
    for size in [1 << 20, 4096, 512, 1] {
        while file.write_all(&vec![7; size]).is_ok() {}
    }
    let _ = file.sync_all();
}

fn no_byte_free(name: &str, fstype: &'static str) {
    isolated(name, LIMIT, |dir| {
        let gd = disk(dir, fstype, 40);
        for n in 0..3 {
            let tar = archive(&format!("localhost/i:{n}"), &[&random_layer(30 + n, 10, 200_000)]);
            gd.ok(&["load", "-i", &gd.file("i.tar", &tar)]);
        }
        gd.ok(&["create", "--name", "c", "localhost/i:1"]);
        fill(&dir.join("disk/filler"));
        assert!(free_space(&dir.join("disk")) < 64 << 10, "the disk is full");
        assert_eq!(gd.ok(&["images", "-q"]).lines().count(), 3);
        let before = free_space(&dir.join("disk"));
        gd.ok(&["rm", "c"]);
        gd.ok(&["rmi", "localhost/i:0"]);
        assert!(free_space(&dir.join("disk")) > before + 1_000_000, "space came back");
        gd.assert_tidy("rmi on a full disk");
        gd.assert_whole("localhost/i:2");
        remove_everything(&gd);
    });
}

#[test]
fn on_a_tmpfs_without_a_free_byte_images_can_be_listed_and_removed() {
    no_byte_free("on_a_tmpfs_without_a_free_byte_images_can_be_listed_and_removed", "tmpfs");
}

#[test]
fn on_an_ext4_without_a_free_byte_images_can_be_listed_and_removed() {
    no_byte_free("on_an_ext4_without_a_free_byte_images_can_be_listed_and_removed", "ext4");
}

// ---- signals ----

fn send(child: &Child, signal: Signal) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(child.id() as i32), signal).unwrap();
}

/// Asks a command to stop at many moments. It must either have been done, or end with 130 and `undone`; at least some
/// must have been stopped. A signal that comes before the handler is there ends the process as any other.
fn interrupt_often(gd: &Gd, seed: u64, args: &[&str], undone: &dyn Fn(&str), done: &dyn Fn()) {
    let mut random = Random::new(seed);
    let start = Instant::now();
    let out = gd.spawn(args).wait_with_output().unwrap();
    let took = start.elapsed();
    assert!(out.status.success(), "{args:?}: {}", errors(&out));
    done();
    let mut stopped = 0;
    for n in 0..12 {
        let signal = if n % 2 == 0 { Signal::SIGINT } else { Signal::SIGTERM };
        let child = gd.spawn(args);
        std::thread::sleep(took.mul_f64(random.below(1000) as f64 / 1000.0));
        send(&child, signal);
        let sent = Instant::now();
        let out = child.wait_with_output().unwrap();
        let when = format!("{signal} {n} to {args:?} (seed {seed})");
        match (out.status.code(), out.status.signal()) {
            (Some(0), _) => done(),
            (Some(130), _) => {
                stopped += 1;
                assert!(errors(&out).contains("interrupted"), "{when}: {}", errors(&out));
                assert!(sent.elapsed() < took + secs(10), "{when}: it took {:?} to stop", sent.elapsed());
                gd.assert_tidy(&when);
                undone(&when);
            }
            (None, Some(killed)) if killed == signal as i32 => {
                gd.ok(&["images"]);
                undone(&when);
            }
            other => panic!("{when}: {other:?} {}", errors(&out)),
        }
    }
    println!("{args:?}: {stopped} of 12 stopped within {took:?}");
    assert!(stopped > 0, "{args:?} never stopped");
}

#[test]
fn a_signal_during_load_import_or_commit_undoes_it() {
    isolated("a_signal_during_load_import_or_commit_undoes_it", LIMIT, |dir| {
        let gd = Gd::new(dir, &dir.join("root"));
        let rootfs = random_layer(40, 2000, 20_000);
        let big = gd.file("big.tar", &archive("localhost/big:1", &[&rootfs, &random_layer(41, 2000, 10_000)]));
        let absent = |when: &str| {
            let names = gd.ok(&["images", "--format", "json"]);
            assert!(!names.contains("localhost/big") && !names.contains("localhost/built"), "{when}: {names}");
        };
        let remove = |image: &'static str| move |gd: &Gd| drop(gd.ok(&["rmi", image]));
        let (remove_big, remove_built) = (remove("localhost/big:1"), remove("localhost/built:1"));
        interrupt_often(&gd, 1, &["load", "-i", &big], &absent, &|| remove_big(&gd));
        let tar = gd.file("rootfs.tar", &rootfs);
        interrupt_often(&gd, 2, &["import", &tar, "localhost/built:1"], &absent, &|| remove_built(&gd));
        gd.ok(&["load", "-i", &small_image(&gd)]);
        gd.ok(&["create", "--name", "c", "localhost/small:1"]);
        gd.ok(&["mount", "c", &gd.make_dir("mnt")]);
        for n in 0..2000 {
            fs::write(dir.join(format!("mnt/{n}")), Random::new(n).bytes(10_000)).unwrap();
        }
        interrupt_often(&gd, 3, &["commit", "c", "localhost/built:1"], &absent, &|| remove_built(&gd));
        remove_everything(&gd);
    });
}

#[test]
fn a_signal_during_save_or_export_leaves_no_partial_file() {
    isolated("a_signal_during_save_or_export_leaves_no_partial_file", LIMIT, |dir| {
        let gd = Gd::new(dir, &dir.join("root"));
        let big = archive("localhost/big:1", &[&random_layer(40, 2000, 20_000), &random_layer(41, 1000, 10_000)]);
        gd.ok(&["load", "-i", &gd.file("big.tar", &big)]);
        gd.ok(&["create", "--name", "c", "localhost/big:1"]);
        let out = gd.make_dir("out") + "/out.tar";
        let nothing = |when: &str| {
            let left: Vec<_> = fs::read_dir(dir.join("out")).unwrap().map(|e| e.unwrap().file_name()).collect();
            // Before the handler is there nothing has been opened either.
            assert!(left.is_empty(), "{when}: {left:?}");
        };
        let whole = || {
            let size = fs::metadata(&out).unwrap().len();
            assert!(size > 50_000_000, "{size}");
            fs::remove_file(&out).unwrap();
        };
        for format in ["docker", "oci"] {
            interrupt_often(
                &gd,
                4,
                &["save", "-o", &out, "--output-type", format, "localhost/big:1"],
                &nothing,
                &whole,
            );
        }
        interrupt_often(&gd, 5, &["export", "-o", &out, "c"], &nothing, &whole);
        remove_everything(&gd);
    });
}

// ---- mounts that are no more ----

fn with_container(dir: &Path) -> Gd {
    let gd = Gd::new(dir, &dir.join("root"));
    gd.ok(&["load", "-i", &small_image(&gd)]);
    gd.ok(&["create", "--name", "c", "localhost/small:1"]);
    gd
}

fn assert_no_mounts(gd: &Gd) {
    assert_eq!(gd.ok(&["mounts", "--format", "json"]).trim(), "[]");
    gd.assert_mounts_agree("no mounts");
}

#[test]
fn a_reboot_leaves_no_phantom_mount() {
    isolated("a_reboot_leaves_no_phantom_mount", LIMIT, |dir| {
        let gd = with_container(dir);
        let target = gd.make_dir("mnt");
        gd.ok(&["mount", "c", &target]);
        assert!(gd.fails(&["rm", "c"], 5).contains(&target));
        // A reboot takes the kernel's mounts and gives a new boot id.
        system("umount", &[&target]);
        gd.database().execute("UPDATE mounts SET boot = 'an earlier boot', mount = 1", []).unwrap();
        assert_no_mounts(&gd);
        gd.ok(&["rm", "c"]);
        remove_everything(&gd);
    });
}

#[test]
fn a_mount_namespace_that_ended_leaves_no_phantom_mount() {
    isolated("a_mount_namespace_that_ended_leaves_no_phantom_mount", LIMIT, |dir| {
        let gd = with_container(dir);
        let target = gd.make_dir("mnt");
        let script = format!(
            "unshare --mount --propagation private sh -ec \
             '$GD mount c {target}; echo hello > {target}/etc/new; $GD mounts > seen; if $GD rm c; then exit 1; fi'
             cat seen"
        );
        let out = gd.shell(&script);
        assert!(out.status.success(), "{}", errors(&out));
        assert!(String::from_utf8_lossy(&out.stdout).contains(&target), "it was mounted there");
        assert_no_mounts(&gd);
        assert_eq!(gd.ok(&["diff", "c"]), "C /etc\nA /etc/new\n");
        gd.ok(&["rm", "c"]);
        remove_everything(&gd);
    });
}

#[test]
fn a_mount_in_a_living_namespace_still_counts() {
    isolated("a_mount_in_a_living_namespace_still_counts", LIMIT, |dir| {
        let gd = with_container(dir);
        let target = gd.make_dir("mnt");
        let script = format!(
            "mkfifo up down; unshare --mount --propagation private sh -ec '$GD mount c {target} >&2; echo > up; cat down >&2' &
             cat up >&2; e=0; $GD rm c || e=$?; $GD mounts --format json; echo > down; wait; exit $e"
        );
        let out = gd.shell(&script);
        assert_eq!(out.status.code(), Some(5), "{}", errors(&out));
        let listed: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
        assert_eq!((&listed[0]["Target"], &listed[0]["Foreign"]), (&target.into(), &true.into()));
        assert_no_mounts(&gd);
        gd.ok(&["rm", "c"]);
    });
}

#[test]
fn what_umount_8_took_down_is_forgotten() {
    isolated("what_umount_8_took_down_is_forgotten", LIMIT, |dir| {
        let gd = with_container(dir);
        let target = gd.make_dir("mnt");
        gd.ok(&["mount", "c", &target]);
        system("umount", &[&target]);
        assert_no_mounts(&gd);
        gd.ok(&["mount", "c", &target]);
        system("umount", &[&target]);
        // Something else is there now: not ours to take down.
        system("mount", &["-t", "tmpfs", "none", &target]);
        gd.fails(&["umount", &target], 3);
        gd.ok(&["rm", "c"]);
        remove_everything(&gd);
    });
}

#[test]
fn a_container_mounted_twice_is_held_until_both_are_gone() {
    isolated("a_container_mounted_twice_is_held_until_both_are_gone", LIMIT, |dir| {
        let gd = with_container(dir);
        let (one, two) = (gd.make_dir("one"), gd.make_dir("two"));
        gd.ok(&["mount", "c", &one]);
        gd.ok(&["mount", "c", &two]);
        fs::write(dir.join("one/new"), "seen").unwrap();
        assert_eq!(fs::read_to_string(dir.join("two/new")).unwrap(), "seen");
        gd.assert_mounts_agree("mounted twice");
        gd.fails(&["rm", "c"], 5);
        gd.ok(&["umount", &one]);
        assert_eq!(fs::read_to_string(dir.join("two/new")).unwrap(), "seen");
        assert!(gd.fails(&["rm", "c"], 5).contains(&two));
        gd.assert_mounts_agree("mounted once");
        gd.ok(&["umount", "c"]);
        gd.ok(&["rm", "c"]);
        remove_everything(&gd);
    });
}

#[test]
fn a_mount_that_only_chrooted_processes_live_beside_still_counts() {
    isolated("a_mount_that_only_chrooted_processes_live_beside_still_counts", LIMIT, |dir| {
        let gd = with_container(dir);
        let (target, elsewhere) = (gd.make_dir("mnt"), gd.make_dir("elsewhere"));
        gd.file("new", b"new");
        for root in [&target, &elsewhere] {
            // The same path below the root of the process is another directory.
            let script = format!(
                "mkfifo up; unshare --mount --propagation private sh -ec '$GD mount c {target} >&2
                   mkdir -p {root}{target}/etc; exec perl -e \"chroot q({root}) or die; chdir q(/); close STDOUT; sleep 100\"' > up &
                 cat up; rm up; e=0; $GD rm c || e=$?; $GD cp new c:/etc/new >&2; $GD mounts --format json
                 kill $!; wait; exit $e"
            );
            let out = gd.shell(&script);
            assert_eq!(out.status.code(), Some(5), "{root}: {}", errors(&out));
            let listed: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
            assert_eq!((&listed[0]["Target"], &listed[0]["Foreign"]), (&target.as_str().into(), &true.into()));
            assert_no_mounts(&gd);
            let diff = gd.ok(&["diff", "c"]);
            assert!(diff.contains("A /etc/new\n") && diff.matches("/new\n").count() == 1, "{diff}");
            gd.ok(&["rm", "c"]);
            gd.ok(&["create", "--name", "c", "localhost/small:1"]);
        }
    });
}

#[test]
fn what_is_mounted_over_our_mount_is_not_taken_for_it() {
    isolated("what_is_mounted_over_our_mount_is_not_taken_for_it", LIMIT, |dir| {
        let gd = with_container(dir);
        let (one, two) = (gd.make_dir("one"), gd.make_dir("two"));
        gd.file("new", b"new");
        gd.ok(&["mount", "c", &one]);
        system("mount", &["-t", "tmpfs", "none", &one]);
        fs::write(dir.join("one/theirs"), "theirs").unwrap();
        let file = gd.path("new");
        for attempt in
            [&["mount", "c", &two][..], &["umount", &one], &["umount", "c"], &["rm", "-f", "c"], &["cp", &file, "c:/"]]
        {
            let said = gd.fails(attempt, 5);
            assert!(said.contains("mounted over") && said.contains(&one), "{attempt:?}: {said}");
        }
        assert_eq!(fs::read_to_string(dir.join("one/theirs")).unwrap(), "theirs");
        assert!(!dir.join("one/new").exists());
        system("umount", &[&one]);
        gd.ok(&["mount", "c", &two]);
        gd.ok(&["umount", "c"]);
        assert_no_mounts(&gd);
        remove_everything(&gd);
    });
}

#[test]
fn a_mount_moved_by_mount_8_is_still_ours() {
    isolated("a_mount_moved_by_mount_8_is_still_ours", LIMIT, |dir| {
        let gd = with_container(dir);
        let (one, two, three) = (gd.make_dir("one"), gd.make_dir("two"), gd.make_dir("three"));
        gd.ok(&["mount", "c", &one]);
        system("mount", &["--move", &one, &two]);
        gd.fails(&["rm", "c"], 5);
        gd.ok(&["mount", "c", &three]);
        fs::write(dir.join("two/new"), "seen").unwrap();
        assert_eq!(fs::read_to_string(dir.join("three/new")).unwrap(), "seen");
        gd.ok(&["umount", "c"]);
        assert_no_mounts(&gd);
        // Its number may be given to somebody else's mount.
        gd.ok(&["mount", "c", &one]);
        system("umount", &[&one]);
        system("mount", &["-t", "tmpfs", "none", &two]);
        gd.ok(&["rm", "c"]);
        remove_everything(&gd);
    });
}

#[test]
fn a_detached_mount_holds_its_container_until_its_last_user_is_gone() {
    isolated("a_detached_mount_holds_its_container_until_its_last_user_is_gone", LIMIT, |dir| {
        let gd = with_container(dir);
        let (one, two) = (gd.make_dir("one"), gd.make_dir("two"));
        for stay in ["chdir q(one)", "open F, q(one/etc/common)"] {
            gd.ok(&["mount", "c", &one]);
            let mut user = std::process::Command::new("perl");
            user.args(["-e", &format!("{stay} or die; close STDOUT; sleep 100")]).current_dir(dir);
            let mut user = user.stdout(std::process::Stdio::piped()).spawn().unwrap();
            std::io::Read::read_to_end(&mut user.stdout.take().unwrap(), &mut Vec::new()).unwrap();
            gd.fails(&["umount", "c"], 5);
            gd.ok(&["umount", "--lazy", "c"]);
            let mounts: serde_json::Value = serde_json::from_str(&gd.ok(&["mounts", "--format", "json"])).unwrap();
            assert_eq!(mounts[0]["Detached"], user.id(), "{mounts}");
            for attempt in [&["mount", "c", &two][..], &["mount", "--read-only", "c", &two]] {
                let said = gd.fails(attempt, 5);
                assert!(said.contains("detached") && said.contains(&user.id().to_string()), "{attempt:?}: {said}");
            }
            gd.fails(&["rm", "c"], 5);
            user.kill().unwrap();
            user.wait().unwrap();
            gd.ok(&["mount", "c", &two]);
            gd.ok(&["umount", "--lazy", "c"]);
            assert_no_mounts(&gd);
        }
        remove_everything(&gd);
    });
}

#[test]
fn a_reader_beside_a_writer_in_another_namespace_is_refused() {
    isolated("a_reader_beside_a_writer_in_another_namespace_is_refused", LIMIT, |dir| {
        let gd = with_container(dir);
        let target = gd.make_dir("mnt");
        let script = format!(
            "mkfifo up; unshare --mount --propagation private sh -ec '$GD mount c {target} >&2; exec perl -e \"close STDOUT; sleep 100\"' > up &
             cat up; for how in --read-only ''; do e=0; $GD mount $how c {target} || e=$?; test $e = 5 || exit 1; done
             kill $!; wait; $GD mount --read-only c {target}; $GD umount c"
        );
        let out = gd.shell(&script);
        assert!(out.status.success(), "{}", errors(&out));
        assert_eq!(errors(&out).matches("for writing").count(), 2, "{}", errors(&out));
        assert!(!errors(&out).contains("--read-only"), "{}", errors(&out));
        assert_no_mounts(&gd);
    });
}

// ---- memory ----

/// The most memory a process ever had, in KiB, as far as looking every few milliseconds tells.
fn peak_of(mut child: Child) -> u64 {
    let path = format!("/proc/{}/status", child.id());
    let mut peak = 0;
    while child.try_wait().unwrap().is_none() {
        let status = fs::read_to_string(&path).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = line.and_then(|text| text.trim().trim_end_matches(" kB").parse().ok());
        peak = peak.max(kib.unwrap_or(0));
        std::thread::sleep(Duration::from_millis(3));
    }
    let out = child.wait_with_output().unwrap();
    assert!(out.status.success(), "{}", errors(&out));
    peak
}

#[test]
fn memory_does_not_grow_with_the_image() {
    isolated("memory_does_not_grow_with_the_image", LIMIT, |dir| {
        let gd = Gd::new(dir, &dir.join("root"));
        {
            // Many files, one big file, and one layer that is compressed.
            let layers =
                [random_layer(50, 20_000, 1000), random_layer(51, 1, 160 << 20), random_layer(52, 100, 1 << 20)];
            let diff_ids: Vec<_> = layers.iter().map(|tar| sha256(tar)).collect();
            let zipped = gzip(&layers[2]);
            let stored = [&layers[0][..], &layers[1], &zipped];
            gd.file("big.tar", &archive_of("localhost/big:1", &stored, &diff_ids));
        }
        let (archive, saved) = (gd.path("big.tar"), gd.path("saved.tar"));
        let load = peak_of(gd.spawn(&["load", "-i", &archive]));
        let save = peak_of(gd.spawn(&["save", "-o", &saved, "localhost/big:1"]));
        println!("peak of load {load} KiB, of save {save} KiB");
        for peak in [load, save] {
            assert!((1000..100 << 10).contains(&peak), "{peak} KiB");
        }
        remove_everything(&gd);
    });
}

// ---- hostile archives ----

/// A place that no archive may touch, and what it looked like.
struct Canary<'a>(&'a Path);

impl<'a> Canary<'a> {
    fn new(dir: &'a Path) -> Self {
        fs::create_dir(dir.join("canary")).unwrap();
        fs::write(dir.join("canary/secret"), "secret").unwrap();
        Canary(dir)
    }

    fn assert_alive(&self, when: &str) {
        use std::os::unix::fs::MetadataExt;
        let names: Vec<_> = fs::read_dir(self.0.join("canary")).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["secret"], "{when}");
        let secret = self.0.join("canary/secret");
        assert_eq!(fs::read(&secret).unwrap(), b"secret", "{when}");
        assert_eq!(fs::metadata(&secret).unwrap().nlink(), 1, "{when}");
        assert!(!Path::new("/pwned").exists() && !self.0.join("pwned").exists(), "{when}");
    }
}

/// What loading a hostile layer may come to.
enum Fate {
    /// It is refused as corrupt, and the message has this of the entry's name.
    Refused(&'static str),
    /// It means something harmless: it loads, and saves as it was.
    Harmless,
}
use Fate::{Harmless, Refused};

fn hostile_layers(canary: &str) -> Vec<(&'static str, Fate, Layer)> {
    let long = vec![b'n'; 300];
    let file = EntryType::Regular;
    let (link, symlink) = (EntryType::Link, EntryType::Symlink);
    let up = format!("../../../../../../../..{canary}/pwned");
    let entry = |name: &[u8], kind, target: &[u8]| Layer::new().raw(name, kind, target, b"");
    let beyond = |name: &str, kind, target: &str| entry(name.as_bytes(), kind, target.as_bytes());
    vec![
        ("a name that climbs", Refused(".."), Layer::new().pax("path", up.as_bytes()).file("x", b"")),
        ("a name that climbs from below", Refused(".."), Layer::new().dir("a").file("a/../../pwned", b"")),
        ("an absolute name", Harmless, Layer::new().pax("path", format!("{canary}/pwned").as_bytes()).file("x", b"")),
        ("a symlink out, by itself", Harmless, beyond("a", symlink, canary)),
        ("a file through a symlink out", Harmless, beyond("a", symlink, canary).file("a/pwned", b"")),
        ("a file through a climbing symlink", Harmless, beyond("a", symlink, "../../..").file("a/pwned", b"")),
        ("a directory through a symlink out", Harmless, beyond("a", symlink, canary).dir("a/pwned")),
        ("a hard link out", Refused("\"h\""), beyond("h", link, &format!("..{canary}/secret"))),
        ("an absolute hard link", Refused("\"h\""), beyond("h", link, &format!("{canary}/secret"))),
        (
            "a hard link through a symlink out",
            Refused("\"h\""),
            beyond("a", symlink, canary).raw(b"h", link, b"a/secret", b""),
        ),
        ("a whiteout of ..", Refused(".wh..."), entry(b"d/.wh...", file, b"")),
        ("a whiteout of .", Refused(".wh.."), entry(b"d/.wh..", file, b"")),
        ("a whiteout of nothing", Refused(".wh."), entry(b"d/.wh.", file, b"")),
        ("a whiteout through a symlink out", Harmless, beyond("a", symlink, canary).file("a/.wh.secret", b"")),
        ("a component of 300 bytes", Refused("nnnnnnn"), Layer::new().pax("path", &long).file("x", b"")),
        (
            "a size beyond the archive",
            Refused("huge"),
            Layer::new().header(b"huge", file, b"", b"", |h| h.set_size(0o77_777_777_777)),
        ),
        (
            "a size of nearly 8 EiB",
            Refused("huge"),
            Layer::new().header(b"huge", file, b"", b"", |h| h.set_size(i64::MAX as u64)),
        ),
        (
            "a negative size",
            Refused("negative"),
            Layer::new().header(b"negative", file, b"", b"", |h| h.as_old_mut().size = [0xff; 12]),
        ),
        ("a file twice", Harmless, Layer::new().file("twice", b"one").file("twice", b"two")),
        ("a file in place of a directory", Harmless, Layer::new().dir("d").file("d/f", b"").file("d", b"")),
        ("a hard link to itself", Refused("self"), entry(b"self", link, b"self")),
        (
            "a PAX record that is none",
            Refused(""),
            Layer::new().raw(b"pax", EntryType::XHeader, b"", b"99 a=b\n").file("x", b""),
        ),
        (
            "a PAX record without end",
            Refused(""),
            Layer::new().raw(b"pax", EntryType::XHeader, b"", b"8 a=b").file("x", b""),
        ),
    ]
}

#[test]
fn hostile_layers_are_refused_with_their_name_or_do_no_harm() {
    isolated("hostile_layers_are_refused_with_their_name_or_do_no_harm", LIMIT, |dir| {
        let gd = Gd::new(dir, &dir.join("root"));
        let canary = Canary::new(dir);
        let base = random_layer(1, 3, 100);
        for (what, fate, layer) in hostile_layers(&gd.path("canary")) {
            let tar = layer.tar();
            let file = gd.file("hostile.tar", &archive("localhost/hostile:1", &[&base, &tar]));
            match fate {
                Refused(entry) => {
                    let out = gd.run(&["load", "-i", &file]);
                    let text = errors(&out);
                    // What is more than the disk can hold is not even begun.
                    let code = if text.contains("are free") { 8 } else { 9 };
                    assert_eq!(out.status.code(), Some(code), "{what}: {text}");
                    let named = text.contains(&format!("layer sha256:{}", sha256(&tar))) && text.contains(entry);
                    assert!(named, "{what}: {text}");
                }
                Harmless => {
                    gd.ok(&["load", "-i", &file]);
                    gd.assert_whole("localhost/hostile:1");
                    gd.ok(&["rmi", "localhost/hostile:1"]);
                }
            }
            gd.assert_empty(what);
            canary.assert_alive(what);
            // The same as a root filesystem.
            let out = gd.run(&["import", &gd.file("hostile-rootfs.tar", &tar), "localhost/hostile:2"]);
            assert!(matches!(out.status.code(), Some(0 | 8 | 9)), "{what}: {}", errors(&out));
            gd.if_there(&["rmi", "localhost/hostile:2"]);
            gd.assert_empty(what);
            canary.assert_alive(what);
        }
    });
}

#[test]
fn what_overlayfs_would_take_as_its_own_marks_stays_plain_data() {
    isolated("what_overlayfs_would_take_as_its_own_marks_stays_plain_data", LIMIT, |dir| {
        let gd = Gd::new(dir, &dir.join("root"));
        let base =
            Layer::new().dir("d").file("d/keep", b"keep").dir("secret").file("secret/s", b"s").file("w", b"w").tar();
        let target = gd.make_dir("mnt");
        let mark = |key: &str, value: &[u8]| Layer::new().pax(key, value).dir("d").tar();
        let device = Layer::new().raw(b"w", EntryType::Char, b"", b"");
        for (what, tar) in [
            ("an opaque directory", mark("SCHILY.xattr.trusted.overlay.opaque", b"y")),
            ("a redirect", mark("SCHILY.xattr.trusted.overlay.redirect", b"/secret")),
            ("a redirect for users", mark("SCHILY.xattr.user.overlay.redirect", b"/secret")),
            ("a device 0/0", device.tar()),
        ] {
            let file = gd.file("hostile.tar", &archive("localhost/hostile:1", &[&base, &tar]));
            let out = gd.run(&["load", "-i", &file]);
            match out.status.code() {
                // A device 0/0 cannot be told from a whiteout on disk where the kernel offers no escape for it.
                Some(6 | 9) => assert!(errors(&out).contains("entry"), "{what}: {}", errors(&out)),
                Some(0) => {
                    gd.assert_whole("localhost/hostile:1");
                    gd.ok(&["mount", "localhost/hostile:1", &target]);
                    assert_eq!(fs::read_to_string(dir.join("mnt/d/keep")).unwrap(), "keep", "{what}");
                    assert!(!dir.join("mnt/d/s").exists(), "{what}");
                    assert!(fs::symlink_metadata(dir.join("mnt/w")).is_ok(), "{what}");
                    gd.ok(&["umount", &target]);
                    gd.ok(&["rmi", "localhost/hostile:1"]);
                }
                other => panic!("{what}: {other:?} {}", errors(&out)),
            }
            gd.assert_empty(what);
        }
    });
}

#[test]
fn damaged_archives_are_refused_and_leave_nothing() {
    isolated("damaged_archives_are_refused_and_leave_nothing", LIMIT, |dir| {
        let gd = Gd::new(dir, &dir.join("root"));
        let layers = [random_layer(1, 20, 300), random_layer(2, 20, 3000)];
        let ids = [sha256(&layers[0]), sha256(&layers[1])];
        let refused = |what: &str, bytes: &[u8], needle: &str| {
            let text = gd.fails(&["load", "-i", &gd.file("bad.tar", bytes)], 9);
            assert!(text.contains(needle), "{what}: {text}");
            gd.assert_empty(what);
        };
        let layer = format!("layer sha256:{}", ids[1]);

        let mut other = layers[1].clone();
        let at = other.len() / 2;
        other[at] ^= 1;
        refused("a wrong byte", &archive_of("localhost/bad:1", &[&layers[0], &other], &ids), &layer);
        let zipped = gzip(&layers[1]);
        let mut broken = zipped.clone();
        broken[zipped.len() / 2] ^= 0x55;
        refused("a wrong byte in a gzip stream", &archive_of("localhost/bad:1", &[&layers[0], &broken], &ids), &layer);
        let cut = &zipped[..zipped.len() - 10];
        refused("a gzip stream cut short", &archive_of("localhost/bad:1", &[&layers[0], cut], &ids), &layer);
        let swapped = [ids[1].clone(), ids[0].clone()];
        refused(
            "layers in the wrong order",
            &archive_of("localhost/bad:1", &[&layers[0], &layers[1]], &swapped),
            "layer",
        );
        let mut checksum = layers[1].clone();
        checksum[512 + 150] ^= 1;
        let its_id = [ids[0].clone(), sha256(&checksum)];
        let bad = archive_of("localhost/bad:1", &[&layers[0], &checksum], &its_id);
        refused("a wrong checksum in a header", &bad, &format!("layer sha256:{}", its_id[1]));
    });
}

#[test]
fn archives_cut_anywhere_are_refused_and_leave_nothing() {
    isolated("archives_cut_anywhere_are_refused_and_leave_nothing", LIMIT, |dir| {
        let gd = Gd::new(dir, &dir.join("root"));
        let whole = archive("localhost/cut:1", &[&random_layer(1, 20, 300), &random_layer(2, 20, 3000)]);
        // The last entry is manifest.json, 512 bytes of it and then two blocks of zeros, which may be missing.
        let end = whole.len() as u64 - 1024 - 512;
        let mut random = Random::new(5);
        let zipped = gzip(&whole);
        for n in 0..30 {
            let cut = random.below(end) as usize;
            let file = gd.file("cut.tar", &whole[..cut]);
            let text = match n % 3 {
                0 => gd.fails(&["load", "-i", &file], 9),
                1 => {
                    let out = gd.shell("cat cut.tar | $GD load");
                    assert_eq!(out.status.code(), Some(9), "cut at {cut}: {}", errors(&out));
                    errors(&out)
                }
                _ => {
                    let cut = cut * zipped.len() / whole.len();
                    gd.fails(&["load", "-i", &gd.file("cut.tar.gz", &zipped[..cut])], 9)
                }
            };
            assert!(text.contains("loading"), "{text}");
            gd.assert_empty(&format!("an archive cut at {cut}"));
        }
        gd.ok(&["load", "-i", &gd.file("whole.tar", &whole)]);
    });
}

#[test]
fn a_gzip_bomb_fills_no_more_than_the_disk_and_leaves_nothing() {
    isolated("a_gzip_bomb_fills_no_more_than_the_disk_and_leaves_nothing", LIMIT, |dir| {
        let gd = disk(dir, "tmpfs", 64);
        let layer = Layer::new().file("zeros", &vec![0; 300 << 20]).tar();
        let file = gd.file("bomb.tar", &archive_of("localhost/bomb:1", &[&gzip(&layer)], &[sha256(&layer)]));
        assert!(fs::metadata(&file).unwrap().len() < 4 << 20);
        gd.ok(&["images"]);
        let before = free_space(&dir.join("disk"));
        let text = gd.fails(&["load", "-i", &file], 8);
        assert!(text.contains(&format!("layer sha256:{}", sha256(&layer))) && text.contains("zeros"), "{text}");
        gd.assert_empty("a bomb in a layer");
        assert_same_space(&gd, before, "a bomb in a layer");
        // The archive itself: it is unpacked into scratch space on the same disk.
        let outer = gd.file("bomb.tar.gz", &gzip(&archive("localhost/bomb:1", &[&layer])));
        let text = gd.fails(&["load", "-i", &outer], 8);
        assert!(text.contains("No space left"), "{text}");
        gd.assert_empty("a bomb around the archive");
        assert_same_space(&gd, before, "a bomb around the archive");
    });
}

#[test]
fn archives_that_point_outside_are_refused() {
    isolated("archives_that_point_outside_are_refused", LIMIT, |dir| {
        let gd = Gd::new(dir, &dir.join("root"));
        let canary = Canary::new(dir);
        let secret = gd.path("canary/secret");
        let climbing = format!("../../../../../..{secret}");
        for name in [&secret, &climbing] {
            let manifest = serde_json::json!([{ "Config": name, "RepoTags": ["localhost/x:1"], "Layers": [name] }]);
            let tar = Layer::new().file("manifest.json", manifest.to_string().as_bytes()).tar();
            let link = Layer::new()
                .raw(b"link", EntryType::Symlink, secret.as_bytes(), b"")
                .file("manifest.json", manifest.to_string().replace(name.as_str(), "link").as_bytes())
                .tar();
            for bytes in [tar, link] {
                let out = gd.run(&["load", "-i", &gd.file("x.tar", &bytes)]);
                assert_eq!(out.status.code(), Some(9), "{}", errors(&out));
                assert!(!errors(&out).contains("\"secret\""), "{}", errors(&out));
            }
        }
        // As an OCI layout directory, where names become paths.
        let layout = gd.make_dir("layout");
        fs::write(dir.join("layout/oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        for digest in ["sha256:../../../../canary/secret", "sha256:00"] {
            let index = serde_json::json!({ "schemaVersion": 2, "manifests": [
                { "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest, "size": 6 }] });
            fs::write(dir.join("layout/index.json"), index.to_string()).unwrap();
            gd.fails(&["load", "-i", &layout], 9);
        }
        let hex = sha256(b"secret");
        fs::create_dir_all(dir.join("layout/blobs/sha256")).unwrap();
        std::os::unix::fs::symlink(&secret, dir.join("layout/blobs/sha256").join(&hex)).unwrap();
        let index = serde_json::json!({ "schemaVersion": 2, "manifests": [
            { "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": format!("sha256:{hex}"), "size": 6 }] });
        fs::write(dir.join("layout/index.json"), index.to_string()).unwrap();
        let out = gd.run(&["load", "-i", &layout]);
        assert!(!out.status.success());
        gd.assert_empty("archives that point outside");
        canary.assert_alive("archives that point outside");
    });
}
