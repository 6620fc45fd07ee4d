//! What is the driver's own, on this machine's real kernel. Mounts are detached or in the test's own mount namespace, so
//! that nothing outlives a test.

mod common;

use common::{Rig, View, needs, read_only, subvolume};
use graphdriver_core::{
    Access, ByteSize, Candidates, Change, ChangeKind, ErrorKind, GraphDriver, LayerId, LayerOptions, Limits, Root,
    mount, walk,
};
use graphdriver_quota::{Quota, qgroup::Qgroups};
use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    path::Path,
};

const SIMPLE: &[(&str, &str)] = &[("btrfs.quota", "simple")];
const FULL: &[(&str, &str)] = &[("btrfs.quota", "qgroup")];

fn layer(id: u64) -> LayerId {
    LayerId(id)
}

fn letter(kind: ChangeKind) -> char {
    match kind {
        ChangeKind::Added => 'A',
        ChangeKind::Modified => 'C',
        ChangeKind::Deleted => 'D',
    }
}

/// The changes of a layer on its one parent, by the native diff and by the walk, which must be the same.
fn changes(rig: &Rig, id: u64, parent: u64) -> Vec<String> {
    let view =
        |id| Root::from_fd(mount::detached(&rig.driver.mount(layer(id), &[], Access::ReadOnly).unwrap()).unwrap());
    let (lower, upper) = (view(parent), view(id));
    let list = |native: bool| {
        let mut list: Vec<Change> = Vec::new();
        let mut visit = |change| {
            list.push(change);
            Ok(())
        };
        if native {
            let mut narrow = rig.driver.native_diff().unwrap().narrow(layer(id), &[layer(parent)]).unwrap();
            walk::changes(Some(&lower), &upper, Some(&mut *narrow), &mut visit).unwrap();
        } else {
            walk::changes(Some(&lower), &upper, None, &mut visit).unwrap();
        }
        // Whatever is done in the root changes its time.
        list.retain(|change| !change.path.as_os_str().is_empty());
        list.iter().map(|change| format!("{} /{}", letter(change.kind), change.path.display())).collect::<Vec<_>>()
    };
    assert_eq!(list(true), list(false));
    list(true)
}

#[test]
fn nested_subvolumes_are_seen_become_directories_at_commit_and_go_with_their_layer() {
    needs!("nested_subvolumes_are_seen_become_directories_at_commit_and_go_with_their_layer");
    for quota in [SIMPLE, FULL, &[]] {
        let rig = Rig::with(quota);
        rig.layer(1, &[], |tree| {
            fs::create_dir(tree.join("d")).unwrap();
            fs::write(tree.join("d/old"), "old").unwrap();
        });
        rig.create(2, &[1]);
        let rw = rig.view(2, Access::ReadWrite);
        let before = fs::metadata(rw.join("d")).unwrap();
        for path in ["d/sub", "d/sub/inner", "d/sub/frozen", "d/sub/frozen/deeper", "od\u{e4}d"] {
            subvolume(&rw.join(path));
        }
        fs::write(rw.join("d/sub/f"), "in sub").unwrap();
        fs::hard_link(rw.join("d/sub/f"), rw.join("d/sub/g")).unwrap();
        fs::write(rw.join("d/sub/inner/f"), vec![7; 300_000]).unwrap();
        fs::write(rw.join("d/sub/.wh.f"), "no whiteout").unwrap();
        symlink("nowhere", rw.join("d/sub/frozen/deeper/s")).unwrap();
        fs::set_permissions(rw.join("d/sub"), fs::Permissions::from_mode(0o2751)).unwrap();
        std::os::unix::fs::chown(rw.join("d/sub"), Some(7), Some(8)).unwrap();
        xattr::set(rw.join("d/sub"), "user.a", b"1").unwrap();
        read_only(&rw.join("d/sub/frozen"));
        let seen = changes(&rig, 2, 1);
        for path in ["C /d", "A /d/sub", "A /d/sub/inner/f", "A /d/sub/frozen/deeper/s", "A /od\u{e4}d"] {
            assert!(seen.iter().any(|change| change == path), "{path}: {seen:?}");
        }
        let d = fs::metadata(rw.join("d")).unwrap();
        drop(rw);

        rig.driver.commit(layer(2)).unwrap();
        assert_eq!(rig.subvolumes(), ["1", "2"], "only the layers themselves are subvolumes");
        rig.create(3, &[2, 1]);
        for id in [2, 3] {
            let view = rig.view(id, Access::ReadOnly);
            assert_eq!(fs::read(view.join("d/sub/f")).unwrap(), b"in sub");
            assert_eq!(fs::read(view.join("d/sub/inner/f")).unwrap(), vec![7; 300_000]);
            assert_eq!(fs::read(view.join("d/sub/.wh.f")).unwrap(), b"no whiteout");
            assert_eq!(fs::read_link(view.join("d/sub/frozen/deeper/s")).unwrap(), Path::new("nowhere"));
            assert_eq!(xattr::get(view.join("d/sub"), "user.a").unwrap().unwrap(), b"1");
            let [sub, f, g] = ["d/sub", "d/sub/f", "d/sub/g"].map(|path| fs::metadata(view.join(path)).unwrap());
            assert_eq!((sub.mode() & 0o7777, sub.uid(), sub.gid()), (0o2751, 7, 8));
            assert_eq!((f.ino(), f.nlink()), (g.ino(), 2));
            let now = fs::metadata(view.join("d")).unwrap();
            assert_eq!((now.mtime(), now.mtime_nsec()), (d.mtime(), d.mtime_nsec()), "the copy left no trace");
            assert_ne!((d.mtime(), d.mtime_nsec()), (before.mtime(), before.mtime_nsec()));
            assert_eq!(common::names(&view.join("")), ["d", "od\u{e4}d"]);
        }
        let rw = rig.view(3, Access::ReadWrite);
        for path in ["x", "x/y", "x/y/z"] {
            subvolume(&rw.join(path));
        }
        fs::write(rw.join("x/y/z/f"), "").unwrap();
        read_only(&rw.join("x/y"));
        drop(rw);
        for id in [3, 2, 1] {
            rig.driver.remove(layer(id)).unwrap();
        }
        rig.assert_nothing_left();
    }
}

#[test]
fn subvolumes_too_deep_for_a_path_are_seen_become_directories_and_go_with_their_layer() {
    needs!("subvolumes_too_deep_for_a_path_are_seen_become_directories_and_go_with_their_layer");
    for quota in [SIMPLE, FULL, &[]] {
        let rig = Rig::with(quota);
        rig.layer(1, &[], |_| {});
        for id in [2, 3] {
            rig.create(id, &[1]);
            let rw = rig.view(id, Access::ReadWrite);
            let deep = common::deep(&rw.join("."));
            subvolume(&deep.join("outer"));
            // Names in a layer's tar end at 4095 bytes, and so does what is copied.
            let deeper = if id == 2 { View::at(&deep.join("outer")) } else { common::deep(&deep.join("outer")) };
            subvolume(&deeper.join("inner"));
            fs::write(deeper.join("inner/f"), "f").unwrap();
            fs::write(deeper.join("inner/g"), "g").unwrap();
            fs::hard_link(deeper.join("inner/f"), deeper.join("inner/h")).unwrap();
            subvolume(&rw.join("short"));
            read_only(&deep.join("outer"));
        }
        let below = vec!["d".repeat(250); 20].join("/");
        let seen = changes(&rig, 3, 1);
        assert!(seen.contains(&format!("A /{below}/outer/{below}/inner/f")), "{} changes", seen.len());
        let seen = changes(&rig, 2, 1);
        assert!(seen.contains(&format!("A /{below}/outer/inner/f")), "{} changes", seen.len());
        assert!(seen.contains(&"A /short".to_owned()));
        rig.driver.commit(layer(2)).unwrap();
        rig.create(4, &[2, 1]);
        assert_eq!(changes(&rig, 2, 1), seen);
        let e = rig.driver.commit(layer(3)).unwrap_err();
        assert!(e.to_string().contains("longer than 4095 bytes"), "{e}");
        rig.driver.remove(layer(3)).unwrap();
        assert_eq!(rig.subvolumes(), ["1", "2", "4"]);
        for id in [4, 2, 1] {
            rig.driver.remove(layer(id)).unwrap();
        }
        rig.assert_nothing_left();
    }
}

#[test]
fn a_leftover_that_cannot_be_removed_keeps_no_other() {
    needs!("a_leftover_that_cannot_be_removed_keeps_no_other");
    let rig = Rig::with(SIMPLE);
    let layers = rig.home.join("layers");
    let busy = layers.join("removed-7/busy");
    fs::create_dir_all(&busy).unwrap();
    let other = rig.disk.path().join("other");
    fs::create_dir(&other).unwrap();
    let mounted = mount::detached(&[common::bind(&other)]).unwrap();
    mount::attach(std::os::fd::AsFd::as_fd(&mounted), std::os::fd::AsFd::as_fd(&fs::File::open(&busy).unwrap()))
        .unwrap();
    drop(mounted);
    rig.create(8, &[]);
    subvolume(&layers.join("removed-9"));
    fs::write(rig.home.join("flat/7"), "").unwrap();
    assert_eq!(rig.driver.reclaim(&|_| false).unwrap().layers, 2);
    assert_eq!((common::names(&layers), common::names(&rig.home.join("flat"))), (vec!["removed-7".to_owned()], vec![]));
    mount::unmount(&busy, true).unwrap();
    assert_eq!(rig.driver.reclaim(&|_| false).unwrap().layers, 1);
    rig.assert_nothing_left();
}

#[test]
fn a_layer_that_a_container_made_read_only_is_not_taken_for_committed() {
    needs!("a_layer_that_a_container_made_read_only_is_not_taken_for_committed");
    let rig = Rig::with(SIMPLE);
    rig.layer(1, &[], |_| {});
    let fill = |id| {
        rig.create(id, &[1]);
        let rw = rig.view(id, Access::ReadWrite);
        subvolume(&rw.join("nested"));
        fs::write(rw.join("nested/f"), "f").unwrap();
        read_only(&rw.join("."));
    };
    fill(2);
    assert_eq!(changes(&rig, 2, 1), ["A /nested", "A /nested/f"]);
    fs::write(rig.view(2, Access::ReadWrite).join("g"), "g").unwrap();
    assert_eq!(changes(&rig, 2, 1), ["A /g", "A /nested", "A /nested/f"]);

    // Committed as it is, and when a commit that was killed has left its record.
    fill(3);
    fill(4);
    drop(rig.view(4, Access::ReadWrite));
    fs::write(rig.home.join("usage/4"), "4096 1\n").unwrap();
    fs::write(rig.view(4, Access::ReadWrite).join("g"), "g").unwrap();
    read_only(&rig.home.join("layers/4"));
    // Or while the container ran on.
    fill(5);
    fs::write(rig.home.join("usage/5"), "4096 1\n").unwrap();
    for id in [2, 3, 4, 5] {
        rig.driver.commit(layer(id)).unwrap();
        let e = rig.driver.mount(layer(id), &[layer(1)], Access::ReadWrite).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::InvalidInput);
        rig.create(id + 10, &[id, 1]);
        assert_eq!(fs::read(rig.view(id + 10, Access::ReadOnly).join("nested/f")).unwrap(), b"f");
    }
    assert_eq!(rig.subvolumes(), ["1", "12", "13", "14", "15", "2", "3", "4", "5"]);
}

#[test]
fn what_a_crash_left_of_making_directories_is_removed() {
    needs!("what_a_crash_left_of_making_directories_is_removed");
    let rig = Rig::with(&[]);
    rig.create(1, &[]);
    let rw = rig.view(1, Access::ReadWrite);
    // Killed between the exchange and the deletion: the subvolume has the name of the copy.
    let half = || {
        subvolume(&rw.join(".graphdriver-flat-00"));
        fs::write(rw.join(".graphdriver-flat-00/f"), "").unwrap();
        fs::write(rig.home.join("flat/1"), ".graphdriver-flat-00").unwrap();
    };
    half();
    assert_eq!(rig.driver.reclaim(&|_| true).unwrap().layers, 0);
    assert_eq!((common::names(&rw.join("")), common::names(&rig.home.join("flat"))), (vec![], vec![]));
    half();
    rig.driver.commit(layer(1)).unwrap();
    assert_eq!((common::names(&rw.join("")), common::names(&rig.home.join("flat"))), (vec![], vec![]));
    // What it says is not believed where it could not have written it.
    rig.create(2, &[]);
    fs::write(rig.view(2, Access::ReadWrite).join("precious"), "").unwrap();
    for text in ["precious", "../2/precious", ".graphdriver-flat-/../precious"] {
        fs::write(rig.home.join("flat/2"), text).unwrap();
        rig.driver.reclaim(&|_| true).unwrap();
        assert_eq!(common::names(&rig.view(2, Access::ReadOnly).join("")), ["precious"]);
    }
}

#[test]
fn a_commit_whose_copies_do_not_fit_leaves_the_layer_as_it_was() {
    needs!("a_commit_whose_copies_do_not_fit_leaves_the_layer_as_it_was");
    let rig = Rig::with(SIMPLE);
    let limited = LayerOptions { size: Some(ByteSize(5_000_000)), inodes: None, durable: true };
    rig.driver.create(layer(1), &[], &limited).unwrap();
    let rw = rig.view(1, Access::ReadWrite);
    subvolume(&rw.join("sub"));
    fs::write(rw.join("sub/big"), vec![7; 10_000_000]).unwrap();
    assert_eq!(rig.driver.commit(layer(1)).unwrap_err().kind(), ErrorKind::QuotaExceeded);
    assert_eq!((common::names(&rw.join("")), common::names(&rig.home.join("flat"))), (vec!["sub".to_owned()], vec![]));
    assert_eq!(fs::read(rw.join("sub/big")).unwrap(), vec![7; 10_000_000]);
    rig.driver.set_limits(layer(1), Limits::default()).unwrap();
    rig.driver.commit(layer(1)).unwrap();
    assert_eq!(rig.subvolumes(), ["1"]);
    assert_eq!(fs::read(rw.join("sub/big")).unwrap(), vec![7; 10_000_000]);
}

#[test]
fn limits_are_set_changed_taken_away_and_gone_with_the_layer() {
    needs!("limits_are_set_changed_taken_away_and_gone_with_the_layer");
    const MIB: u64 = 1 << 20;
    let size = |n| Limits { size: Some(ByteSize(n)), inodes: None };
    for quota in [SIMPLE, FULL] {
        let rig = Rig::with(&[quota, &[("btrfs.min_space", "4M")]].concat());
        let noise: Vec<u8> = (0..20 * MIB).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        rig.layer(1, &[], |tree| fs::write(tree.join("big"), &noise).unwrap());
        let limited = LayerOptions { size: Some(ByteSize(10 * MIB)), inodes: None, durable: true };
        rig.driver.create(layer(2), &[layer(1)], &limited).unwrap();
        assert_eq!(rig.driver.limits(layer(2)).unwrap(), size(10 * MIB));
        let rw = rig.view(2, Access::ReadWrite);
        let write = |name: &str, mib: usize| {
            let file = fs::File::create(rw.join(name)).unwrap();
            let written =
                std::io::Write::write_all(&mut &file, &noise[..mib * MIB as usize]).and_then(|()| file.sync_all());
            written.map_err(|e| e.kind())
        };
        write("fits", 6).unwrap();
        assert_eq!(
            write("more", 6),
            Err(std::io::ErrorKind::QuotaExceeded),
            "its own and not its parent's 20 MiB count"
        );
        rig.driver.set_limits(layer(2), size(30 * MIB)).unwrap();
        write("more", 12).unwrap();
        rig.driver.set_limits(layer(2), Limits::default()).unwrap();
        assert_eq!(rig.driver.limits(layer(2)).unwrap(), Limits::default());
        write("much", 20).unwrap();

        for (limits, kind) in [
            (size(3 * MIB), ErrorKind::InvalidInput),
            (size(0), ErrorKind::InvalidInput),
            (Limits { size: None, inodes: Some(7) }, ErrorKind::Unsupported),
        ] {
            assert_eq!(rig.driver.set_limits(layer(2), limits).unwrap_err().kind(), kind);
            let options = LayerOptions { size: limits.size, inodes: limits.inodes, durable: false };
            assert_eq!(rig.driver.create(layer(3), &[layer(1)], &options).unwrap_err().kind(), kind);
        }
        assert_eq!(rig.driver.limits(layer(9)).unwrap_err().kind(), ErrorKind::NotFound);
        // A live diff of a limited layer must not make room for more.
        rig.driver.set_limits(layer(2), size(45 * MIB)).unwrap();
        assert_eq!(changes(&rig, 2, 1), ["A /fits", "A /more", "A /much"]);
        assert_eq!(write("again", 15), Err(std::io::ErrorKind::QuotaExceeded));
        drop(rw);

        let quotas = Qgroups::open(&rig.home).unwrap().unwrap();
        let trees: Vec<_> =
            quotas.list().unwrap().into_iter().filter(|(_, state)| state.limits.size.is_some()).collect();
        assert_eq!((trees.len(), trees[0].1.limits), (1, size(45 * MIB)));
        assert!(trees[0].0.ends_with("layers/2"), "{trees:?}");
        let path = rig.home.join("layers/2");
        assert_eq!(quotas.read(&path).unwrap(), trees[0].1);
        quotas.set(&path, size(50 * MIB)).unwrap();
        assert_eq!(rig.driver.limits(layer(2)).unwrap(), size(50 * MIB));
        quotas.remove(&path).unwrap();
        quotas.remove(&path.join("gone")).unwrap();
        assert_eq!(rig.driver.limits(layer(2)).unwrap(), size(45 * MIB), "as it was asked for");
        rig.driver.remove(layer(2)).unwrap();
        rig.driver.remove(layer(1)).unwrap();
        rig.assert_nothing_left();
    }
}

#[test]
fn the_removal_of_layers_does_not_make_the_counts_inconsistent() {
    needs!("the_removal_of_layers_does_not_make_the_counts_inconsistent");
    let rig = Rig::with(FULL);
    let quotas = Qgroups::open(&rig.home).unwrap().unwrap();
    let dir = fs::File::open(&rig.home).unwrap();
    rig.layer(1, &[], |tree| fs::write(tree.join("f"), vec![1; 1_000_000]).unwrap());
    for round in 0..20 {
        let ids = 10 * round + 10..10 * round + 20;
        for id in ids.clone() {
            rig.create(id, &[1]);
            fs::write(rig.view(id, Access::ReadWrite).join("g"), vec![2; 100_000]).unwrap();
        }
        rustix::fs::syncfs(&dir).unwrap();
        ids.for_each(|id| rig.driver.remove(layer(id)).unwrap());
        btrfs_uapi::filesystem::sync(std::os::fd::AsFd::as_fd(&dir)).unwrap();
        // The cleaner is at work: whoever looks now may look between its transactions.
        for _ in 0..100 {
            rig.reopened();
            assert!(!quotas.inconsistent(), "no limit holds on the whole filesystem any more");
        }
    }
    rig.driver.remove(layer(1)).unwrap();
    rig.assert_nothing_left();
}

#[test]
fn a_full_layer_with_subvolumes_in_it_is_removed() {
    needs!("a_full_layer_with_subvolumes_in_it_is_removed");
    for quota in [SIMPLE, FULL] {
        let rig = Rig::with(quota);
        let limited = LayerOptions { size: Some(ByteSize(5_000_000)), inodes: None, durable: true };
        rig.driver.create(layer(1), &[], &limited).unwrap();
        let rw = rig.view(1, Access::ReadWrite);
        subvolume(&rw.join("sub"));
        subvolume(&rw.join("sub/inner"));
        let fill = |name: String, bytes: usize| {
            let file = fs::File::create(rw.join(&name))?;
            std::io::Write::write_all(&mut &file, &vec![7; bytes]).and_then(|()| file.sync_all())
        };
        for bytes in [100_000, 1] {
            let full = (0..10_000).find_map(|n| fill(format!("{bytes}-{n}"), bytes).err()).unwrap();
            assert_eq!(full.kind(), std::io::ErrorKind::QuotaExceeded);
        }
        drop(rw);
        rig.driver.remove(layer(1)).unwrap();
        rig.assert_nothing_left();
    }
}

#[test]
fn quotas_turned_off_meanwhile_hinder_nothing_but_limits() {
    needs!("quotas_turned_off_meanwhile_hinder_nothing_but_limits");
    let rig = Rig::with(SIMPLE);
    rig.layer(1, &[], |tree| fs::write(tree.join("f"), vec![1; 100_000]).unwrap());
    rig.create(2, &[1]);
    rig.quotas_off();
    let size = Limits { size: Some(ByteSize(1 << 24)), inodes: None };
    let e = rig.driver.set_limits(layer(2), size).unwrap_err();
    assert!(e.kind() == ErrorKind::Unsupported && e.to_string().contains("btrfs.quota=simple"), "{e}");
    assert_eq!(rig.driver.limits(layer(2)).unwrap(), Limits::default());
    rig.driver.set_limits(layer(2), Limits::default()).unwrap();
    fs::write(rig.view(2, Access::ReadWrite).join("g"), vec![1; 100_000]).unwrap();
    rig.driver.commit(layer(2)).unwrap();
    assert!((100_000..200_000).contains(&rig.driver.usage(layer(2)).unwrap().bytes));
    rig.driver.remove(layer(2)).unwrap();
    rig.driver.remove(layer(1)).unwrap();
    rig.assert_nothing_left();
}

#[test]
fn a_limit_that_the_filesystem_forgot_is_set_again_or_nobody_writes() {
    needs!("a_limit_that_the_filesystem_forgot_is_set_again_or_nobody_writes");
    let size = Limits { size: Some(ByteSize(10_000_000)), inodes: None };
    for quota in [SIMPLE, FULL] {
        let rig = Rig::with(quota);
        rig.layer(1, &[], |tree| fs::write(tree.join("base"), vec![1; 20_000_000]).unwrap());
        let limited = LayerOptions { size: size.size, inodes: None, durable: true };
        rig.driver.create(layer(2), &[layer(1)], &limited).unwrap();
        rig.create(3, &[1]);
        for id in [2, 3] {
            fs::write(rig.view(id, Access::ReadWrite).join("before"), vec![2; 6_000_000]).unwrap();
        }
        rustix::fs::syncfs(fs::File::open(&rig.home).unwrap()).unwrap();
        rig.quotas_off();
        let plain = rig.at(&rig.home, &[]);
        for driver in [&rig.driver, &plain.driver] {
            let e = driver.mount(layer(2), &[layer(1)], Access::ReadWrite).unwrap_err();
            assert!(e.kind() == ErrorKind::Unsupported && e.to_string().contains("btrfs.quota=simple"), "{e}");
            driver.mount(layer(2), &[layer(1)], Access::ReadOnly).unwrap();
            assert_eq!(driver.limits(layer(2)).unwrap(), size, "it is what holds as soon as anybody can write");
        }
        // The data of that time counts, too.
        let driver = rig.reopened();
        common::settle(std::os::fd::AsFd::as_fd(&fs::File::open(&rig.home).unwrap()));
        driver.set_limits(layer(3), size).unwrap();
        for id in [2, 3] {
            let usage = driver.usage(layer(id)).unwrap().bytes;
            assert!((6_000_000..7_000_000).contains(&usage), "{quota:?}: {usage}");
            let rw = rig.view(id, Access::ReadWrite);
            assert_eq!(driver.limits(layer(id)).unwrap(), size);
            let write = |name: &str, bytes: usize| {
                let file = fs::File::create(rw.join(name)).unwrap();
                let written = std::io::Write::write_all(&mut &file, &vec![3; bytes]).and_then(|()| file.sync_all());
                written.map_err(|e| e.kind())
            };
            write("fits", 2_000_000).unwrap();
            assert_eq!(write("more", 6_000_000), Err(std::io::ErrorKind::QuotaExceeded), "{quota:?}");
        }
        driver.set_limits(layer(2), Limits::default()).unwrap();
        rig.quotas_off();
        driver.mount(layer(2), &[layer(1)], Access::ReadWrite).unwrap();
        assert_eq!(driver.limits(layer(2)).unwrap(), Limits::default());
        driver.set_limits(layer(3), Limits::default()).unwrap();
        driver.mount(layer(3), &[layer(1)], Access::ReadWrite).unwrap();
        drop(plain);
        [3, 2, 1].into_iter().for_each(|id| driver.remove(layer(id)).unwrap());
        rig.assert_nothing_left();
    }
}

#[test]
fn usage_reads_nothing_twice_and_stays_what_it_was_at_commit() {
    needs!("usage_reads_nothing_twice_and_stays_what_it_was_at_commit");
    for quota in [SIMPLE, FULL, &[]] {
        let rig = Rig::with(quota);
        rig.layer(1, &[], |tree| (0..500).for_each(|n| fs::write(tree.join(n.to_string()), vec![1; 5000]).unwrap()));
        let base = rig.driver.usage(layer(1)).unwrap();
        assert_eq!(base.inodes, 501);
        assert!((500 * 8192..500 * 8192 + (2 << 20)).contains(&base.bytes), "{quota:?}: {base:?}");
        rig.create(2, &[1]);
        let rw = rig.view(2, Access::ReadWrite);
        fs::write(rw.join("7"), vec![2; 100_000]).unwrap();
        fs::write(rw.join("new"), vec![3; 100_000]).unwrap();
        drop(rw);
        rig.driver.commit(layer(2)).unwrap();
        let usage = rig.driver.usage(layer(2)).unwrap();
        assert_eq!(usage.inodes, 1, "one inode is new");
        assert!((200_000..900_000).contains(&usage.bytes), "{quota:?}: {usage:?}");
        rig.create(3, &[2, 1]);
        rig.reopened().usage(layer(2)).map(|again| assert_eq!(again, usage)).unwrap();
        // An interrupted write of the record is no record.
        fs::write(rig.home.join("usage/2"), "12").unwrap();
        assert_eq!(rig.driver.usage(layer(2)).unwrap().inodes, 1);
    }
}

#[test]
fn the_stream_narrows_the_walk_to_what_has_changed() {
    needs!("the_stream_narrows_the_walk_to_what_has_changed");
    let rig = Rig::with(SIMPLE);
    rig.layer(1, &[], |tree| {
        for dir in ["a/deep/er", "b", "c", "moved/in"] {
            fs::create_dir_all(tree.join(dir)).unwrap();
        }
        for file in ["a/deep/er/f", "a/deep/x", "b/f", "c/f", "moved/in/f"] {
            fs::write(tree.join(file), file).unwrap();
        }
        fs::write(tree.join("b/one"), "1").unwrap();
        fs::hard_link(tree.join("b/one"), tree.join("c/two")).unwrap();
        fs::hard_link(tree.join("b/one"), tree.join("a/three")).unwrap();
    });
    rig.create(2, &[1]);
    let rw = rig.view(2, Access::ReadWrite);
    fs::write(rw.join("a/deep/er/f"), "changed").unwrap();
    fs::write(rw.join("c/two"), "one inode").unwrap();
    fs::rename(rw.join("moved"), rw.join("c/here")).unwrap();
    fs::remove_file(rw.join("b/f")).unwrap();
    let check = || {
        let mut narrow = rig.driver.native_diff().unwrap().narrow(layer(2), &[layer(1)]).unwrap();
        let mut names = |dir: &str| match narrow.candidates(Path::new(dir)).unwrap() {
            Candidates::All => vec!["*".to_owned()],
            Candidates::Names(names) => names.into_iter().map(|name| name.into_string().unwrap()).collect(),
        };
        assert_eq!(names("a"), ["deep", "three"]);
        assert_eq!(names("a/deep"), ["er"]);
        assert_eq!(names("a/deep/er"), ["f"]);
        assert_eq!(names("b"), ["f", "one"]);
        assert_eq!(names("c"), ["here", "two"]);
        assert_eq!(names("c/here"), ["*"]);
        drop(narrow);
        let expected = [
            "C /a",
            "C /a/deep",
            "C /a/deep/er",
            "C /a/deep/er/f",
            "C /a/three",
            "C /b",
            "D /b/f",
            "C /b/one",
            "C /c",
            "A /c/here",
            "A /c/here/in",
            "A /c/here/in/f",
            "C /c/two",
            "D /moved",
        ];
        assert_eq!(changes(&rig, 2, 1), expected);
    };
    check();
    assert_eq!(rig.subvolumes(), ["1", "2"], "the temporary snapshot is gone");
    rig.driver.commit(layer(2)).unwrap();
    check();
}

#[test]
fn a_snapshot_that_a_crash_left_is_reclaimed_and_one_in_use_is_not() {
    needs!("a_snapshot_that_a_crash_left_is_reclaimed_and_one_in_use_is_not");
    let rig = Rig::with(SIMPLE);
    rig.layer(1, &[], |_| {});
    let layers = rig.home.join("layers");
    subvolume(&layers.join("frozen-1-00"));
    let lock = fs::File::create(rig.home.join("frozen.lock")).unwrap();
    lock.lock_shared().unwrap();
    assert_eq!(rig.driver.reclaim(&|_| true).unwrap().layers, 0);
    drop(lock);
    assert_eq!(rig.driver.reclaim(&|_| true).unwrap().layers, 1);
    assert_eq!(rig.subvolumes(), ["1"]);
}

#[test]
fn a_root_made_immutable_in_a_container_hinders_nobody() {
    needs!("a_root_made_immutable_in_a_container_hinders_nobody");
    let rig = Rig::with(&[]);
    rig.create(1, &[]);
    let rw = rig.view(1, Access::ReadWrite);
    let root = rustix::fs::open(rw.join("."), rustix::fs::OFlags::RDONLY, rustix::fs::Mode::empty()).unwrap();
    rustix::fs::ioctl_setflags(&root, rustix::fs::IFlags::IMMUTABLE).unwrap();
    drop((root, rw));
    rig.driver.commit(layer(1)).unwrap();
    rig.create(2, &[1]);
    rig.driver.remove(layer(2)).unwrap();
    rig.driver.remove(layer(1)).unwrap();
    rig.assert_nothing_left();
}

#[test]
fn the_data_root_may_be_anywhere_on_btrfs() {
    needs!("the_data_root_may_be_anywhere_on_btrfs");
    let rig = Rig::with(SIMPLE);
    let top = rig.disk.path();
    subvolume(&top.join("outer"));
    subvolume(&top.join("outer/inner"));
    fs::create_dir(top.join("bound")).unwrap();
    let bound = mount::detached(&[common::bind(&top.join("outer/inner"))]).unwrap();
    mount::attach(
        std::os::fd::AsFd::as_fd(&bound),
        std::os::fd::AsFd::as_fd(&fs::File::open(top.join("bound")).unwrap()),
    )
    .unwrap();
    drop(bound);
    // Mounted by its id, the top of the filesystem is nowhere to be seen.
    let first = &rig;
    for home in
        [top.join("outer/inner/a:b,c d"), top.join("bound/x/\u{fc}ber"), common::mounted_subvolume(top, "outer")]
    {
        let rig = first.at(&home, SIMPLE);
        rig.layer(1, &[], |tree| fs::write(tree.join("f"), "1").unwrap());
        rig.create(2, &[1]);
        let rw = rig.view(2, Access::ReadWrite);
        subvolume(&rw.join("nested"));
        fs::write(rw.join("f"), "2").unwrap();
        drop(rw);
        assert_eq!(changes(&rig, 2, 1), ["C /f", "A /nested"]);
        rig.driver.commit(layer(2)).unwrap();
        assert_eq!(fs::read(View::of(&rig, 2).join("f")).unwrap(), b"2");
        rig.driver.remove(layer(2)).unwrap();
        rig.driver.remove(layer(1)).unwrap();
        assert_eq!(common::names(&home.join("layers")), [""; 0]);
    }
    mount::unmount(&top.join("bound"), true).unwrap();
}

#[test]
fn what_is_not_a_data_directory_of_this_format_is_refused() {
    needs!("what_is_not_a_data_directory_of_this_format_is_refused");
    let rig = Rig::with(&[]);
    assert_eq!(fs::read_to_string(rig.home.join("version")).unwrap(), "graphdriver btrfs 1\n");
    let open = |home: &Path| graphdriver_btrfs::Btrfs::open(home, &Default::default()).map(drop).unwrap_err();
    fs::write(rig.home.join("version"), "graphdriver btrfs 2\n").unwrap();
    let e = open(&rig.home);
    assert!(e.kind() == ErrorKind::Unsupported && e.to_string().contains("btrfs 2"), "{e}");
    let other = rig.disk.path().join("other");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("thesis.tex"), "").unwrap();
    assert_eq!(open(&other).kind(), ErrorKind::InvalidInput);
    let tmpfs = Path::new("/dev/shm/graphdriver-btrfs-none");
    let unmet = (graphdriver_btrfs::FACTORY.probe)(tmpfs, &Default::default()).unwrap_err();
    assert!(unmet.missing.contains("subvolumes need btrfs") && unmet.remedy.contains("mkfs.btrfs"), "{unmet:?}");
    assert_eq!(open(tmpfs).kind(), ErrorKind::Unsupported);
    assert!(!tmpfs.exists(), "refused, and nothing left there");
}
