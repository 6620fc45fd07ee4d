//! kill -9 at any moment.

use crate::{
    LIMIT, remove_everything, secs, small_image,
    support::{
        Gd, Random, errors,
        images::{gzip, random_layer},
        isolated,
    },
};
use std::{
    collections::BTreeSet,
    fs,
    time::{Duration, Instant},
};

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

#[test]
fn a_killed_load_leaves_only_whole_layers_and_nothing_else() {
    isolated("kill::a_killed_load_leaves_only_whole_layers_and_nothing_else", LIMIT, |dir| {
        let gd = Gd::new(dir, &dir.join("root"));
        let archive = small_image(&gd);
        let remove = || gd.if_there(&["rmi", "localhost/small:1"]);
        kill_often(&gd, 1, 40, &["load", "-i", &archive], &|| {}, &remove);
        remove_everything(&gd);
    });
}

#[test]
fn a_killed_commit_or_import_leaves_only_whole_layers_and_nothing_else() {
    isolated("kill::a_killed_commit_or_import_leaves_only_whole_layers_and_nothing_else", LIMIT, |dir| {
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
    isolated("kill::a_killed_create_rm_or_rmi_happens_wholly_or_not_at_all", LIMIT, |dir| {
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
    isolated("kill::a_killed_mount_or_umount_leaves_store_and_kernel_agreed", LIMIT, |dir| {
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
