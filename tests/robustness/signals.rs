//! Commands that are asked to stop.

use crate::{
    LIMIT, remove_everything, secs, send, small_image,
    support::{
        Gd, Random, errors,
        images::{archive, random_layer},
        isolated,
    },
};
use nix::sys::signal::Signal;
use std::{fs, os::unix::process::ExitStatusExt, time::Instant};

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
    isolated("signals::a_signal_during_load_import_or_commit_undoes_it", LIMIT, |dir| {
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
    isolated("signals::a_signal_during_save_or_export_leaves_no_partial_file", LIMIT, |dir| {
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
