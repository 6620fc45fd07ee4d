//! Several processes at work in one data root.

use crate::{
    LIMIT, disk, remove_everything, secs, send, small_image,
    support::{
        Gd, Random, errors,
        images::{archive, random_layer},
        isolated,
    },
};
use nix::sys::signal::Signal;
use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

#[test]
fn eight_processes_at_once_lose_nothing_and_never_deadlock() {
    isolated("several::eight_processes_at_once_lose_nothing_and_never_deadlock", LIMIT, |dir| {
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
    isolated("several::eight_processes_can_make_the_same_data_root", LIMIT, |dir| {
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
    isolated("several::a_commit_whose_container_and_image_go_meanwhile_fails_and_leaves_nothing", LIMIT, |dir| {
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
