//! Storms on names.

use super::{storm::*, world::*};
use rustix::fs::{CWD, OFlags, RenameFlags, renameat_with};
use std::{
    collections::HashSet,
    fs::{self, File, OpenOptions},
    os::unix::fs::{MetadataExt, symlink},
    path::Path,
    sync::{
        Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst},
    },
};

fn text(path: impl AsRef<Path>) -> String {
    fs::read_to_string(path).unwrap()
}

/// `count` lower files that hold their own names.
fn lower_files(l: &Path, count: usize) {
    (0..count).for_each(|n| fs::write(l.join(format!("f{n}")), format!("f{n}")).unwrap());
}

#[test]
fn parallel_creates_have_one_winner_per_name() {
    let mut world = world!(|l| fs::create_dir(l.join("d")).unwrap());
    let (won, d) = (Mutex::new(Vec::new()), world.at("d"));
    storm(&world, 6, |thread, round| {
        let shared = d.join(format!("shared{round}"));
        if may!(OpenOptions::new().write(true).create_new(true).open(&shared), EXIST).is_some() {
            won.lock().unwrap().push(format!("shared{round}"));
        }
        fs::write(d.join(format!("own{thread}-{round}")), [thread as u8]).unwrap();
        won.lock().unwrap().push(format!("own{thread}-{round}"));
    });
    world.remount();
    let mut won = won.into_inner().unwrap();
    won.sort();
    assert_eq!(names(world.at("d")), won);
}

#[test]
fn renames_lose_no_file_and_no_content() {
    let mut world = world!(|l| lower_files(l, 30));
    let moved = AtomicU64::new(0);
    storm(&world, 6, |thread, round| {
        let mut random = Random::new(thread * 1_000_003 + round);
        let [from, to] = [0; 2].map(|_| world.at(format!("f{}", random.below(40))));
        if may!(renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE), NOENT, EXIST).is_some() {
            moved.fetch_add(1, SeqCst);
        }
    });
    assert!(moved.into_inner() > 10);
    for _ in 0..2 {
        let all: HashSet<_> = names(world.root()).iter().map(|name| text(world.at(name))).collect();
        assert_eq!((names(world.root()).len(), all.len()), (30, 30));
        world.remount();
    }
}

#[test]
fn a_file_that_is_replaced_by_rename_is_always_there_and_whole() {
    let content = |n: usize| format!("{n:05}").repeat(2000);
    let world = world!(|l| fs::write(l.join("f"), content(0)).unwrap());
    storm(&world, 6, |thread, round| {
        if thread < 3 {
            let new = world.at(format!("new{thread}"));
            fs::write(&new, content(round)).unwrap();
            fs::rename(&new, world.at("f")).unwrap();
        } else {
            let seen = text(world.at("f"));
            assert!(seen.len() == 10_000 && seen == seen[..5].repeat(2000), "torn: {} bytes", seen.len());
            stat(world.at("f"));
        }
    });
    assert_eq!(names(world.root()), ["f"]);
}

#[test]
fn files_made_in_a_directory_that_is_renamed_are_in_it() {
    let mut world = world!(|l| {
        fs::create_dir_all(l.join("a/sub")).unwrap();
        lower_files(&l.join("a"), 5);
    });
    let made = Mutex::new(Vec::new());
    let dir = File::open(world.at("a")).unwrap();
    storm(&world, 4, |thread, round| {
        if thread == 0 {
            let (from, to) = if round % 2 == 0 { ("a", "b") } else { ("b", "a") };
            fs::rename(world.at(from), world.at(to)).unwrap();
        } else if thread == 1 {
            let name = format!("by-path{round}");
            let path = world.at(["a", "b"][round % 2]).join(&name);
            if may!(File::create(path), NOENT).is_some() {
                made.lock().unwrap().push(name);
            }
        } else {
            let name = format!("new{thread}-{round}");
            rustix::fs::openat(&dir, &name, OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY, 0o644.into()).unwrap();
            made.lock().unwrap().push(name);
        }
    });
    drop(dir);
    world.remount();
    let at = world.at(if world.at("a").exists() { "a" } else { "b" });
    let mut expected = made.into_inner().unwrap();
    expected.extend(["f0", "f1", "f2", "f3", "f4", "sub"].map(String::from));
    expected.sort();
    assert_eq!(names(at), expected);
    assert_eq!(names(world.root()).len(), 1);
}

#[test]
fn lower_directories_that_change_places_keep_their_files() {
    let mut world = world!(|l| {
        for n in 0..6 {
            let dir = l.join(format!("d{n}"));
            fs::create_dir_all(dir.join("deep")).unwrap();
            lower_files(&dir.join("deep"), 3);
            fs::write(dir.join("id"), n.to_string()).unwrap();
        }
    });
    storm(&world, 4, |thread, round| {
        let mut random = Random::new(thread * 1_000_003 + round);
        let [from, to] = [0; 2].map(|_| world.at(format!("d{}", random.below(8))));
        let flags = if round % 3 == 0 { RenameFlags::EXCHANGE } else { RenameFlags::NOREPLACE };
        may!(renameat_with(CWD, from, CWD, to, flags), NOENT, EXIST, INVAL);
    });
    for _ in 0..2 {
        let mut ids: Vec<_> = names(world.root()).iter().map(|d| text(world.at(d).join("id"))).collect();
        ids.sort();
        assert_eq!(ids, ["0", "1", "2", "3", "4", "5"]);
        for dir in names(world.root()) {
            assert_eq!(names(world.at(&dir)), ["deep", "id"], "{dir}");
            assert_eq!(names(world.at(&dir).join("deep")), ["f0", "f1", "f2"], "{dir}");
            assert_eq!(text(world.at(&dir).join("deep/f1")), "f1");
        }
        world.remount();
    }
}

#[test]
fn directories_never_get_into_themselves() {
    let mut world = world!(|l| {
        fs::create_dir_all(l.join("a/x")).unwrap();
        fs::create_dir_all(l.join("b/y")).unwrap();
        fs::write(l.join("a/x/f"), "1").unwrap();
        fs::write(l.join("b/y/f"), "2").unwrap();
    });
    // Two renames of which each alone is right would, done at once, cut both directories off.
    storm(&world, 4, |thread, _| {
        let (from, to) = [("a", "b/y/a"), ("b", "a/x/b"), ("b/y/a", "a"), ("a/x/b", "b")][thread];
        may!(fs::rename(world.at(from), world.at(to)), NOENT, INVAL, NOTEMPTY);
    });
    for _ in 0..2 {
        let find = std::process::Command::new("find").arg(world.root()).args(["-name", "f"]).output().unwrap();
        assert!(find.status.success(), "{find:?}");
        assert_eq!(find.stdout.iter().filter(|b| **b == b'\n').count(), 2, "{find:?}");
        world.remount();
    }
}

#[test]
fn hard_links_come_and_go_and_are_counted() {
    let mut world = world!(|l| {
        fs::write(l.join("f"), "one").unwrap();
        fs::hard_link(l.join("f"), l.join("lower")).unwrap();
    });
    storm(&world, 6, |thread, round| {
        let link = world.at(format!("l{thread}"));
        fs::hard_link(world.at(["f", "lower"][round % 2]), &link).unwrap();
        assert!((3..=8).contains(&stat(&link).nlink()), "{}", stat(&link).nlink());
        if round % 16 == 0 {
            OpenOptions::new().append(true).open(&link).unwrap();
            chmod(&link, 0o600 | (round as u32 % 8));
        }
        fs::remove_file(&link).unwrap();
    });
    for _ in 0..2 {
        assert_eq!(names(world.root()), ["f", "lower"]);
        assert_eq!([stat(world.at("f")).nlink(), stat(world.at("lower")).nlink()], [2, 2]);
        assert_eq!(stat(world.at("f")).ino(), stat(world.at("lower")).ino());
        world.remount();
    }
}

#[test]
fn what_is_opened_is_whole_though_it_is_unlinked_at_once() {
    let content = "whole".repeat(5000);
    let world = world!(|l| (0..50).for_each(|n| fs::write(l.join(format!("f{n}")), &content).unwrap()));
    let opened = AtomicUsize::new(0);
    storm(&world, 6, |thread, round| {
        let path = world.at(format!("f{}", round % 50));
        if thread < 2 {
            may!(fs::remove_file(&path), NOENT);
            let new = world.at(format!("new{thread}"));
            fs::write(&new, &content).unwrap();
            fs::rename(&new, &path).unwrap();
        } else if may!(fs::read(&path), NOENT).is_some_and(|seen| {
            assert!(seen == content.as_bytes());
            true
        }) {
            opened.fetch_add(1, SeqCst);
        }
    });
    assert!(opened.into_inner() > 0);
    assert_eq!(names(world.root()).len(), 50);
}

#[test]
fn a_directory_is_removed_only_when_it_is_empty() {
    let world = world!(|l| fs::create_dir(l.join("d")).unwrap());
    let d = world.at("d");
    storm(&world, 4, |thread, round| match thread {
        0 => drop(may!(fs::remove_dir(&d), NOTEMPTY, NOENT)),
        1 => drop(may!(fs::create_dir(&d), EXIST)),
        _ => {
            let path = d.join(format!("f{thread}"));
            if may!(File::create_new(&path), NOENT).is_some() {
                // Nobody else removes it: the directory must stay as long as it is there.
                assert!(path.exists(), "round {round}: lost with its directory");
                fs::remove_file(&path).unwrap();
            }
        }
    });
    may!(fs::remove_dir(&d), NOENT);
    assert!(names(world.root()).is_empty());
}

#[test]
fn mkdir_and_rmdir_have_one_winner() {
    let world = world!(|l| fs::create_dir(l.join("d")).unwrap());
    let (made, removed) = (AtomicU64::new(1), AtomicU64::new(0));
    storm(&world, 4, |thread, _| {
        if thread % 2 == 0 {
            may!(fs::create_dir(world.at("d")), EXIST).map(|()| made.fetch_add(1, SeqCst));
        } else {
            may!(fs::remove_dir(world.at("d")), NOENT).map(|()| removed.fetch_add(1, SeqCst));
        }
    });
    let left = u64::from(world.at("d").exists());
    assert_eq!(made.into_inner(), removed.into_inner() + left);
    assert_eq!(names(world.root()).len() as u64, left);
}

#[test]
fn what_stays_in_a_directory_is_listed_once_in_a_storm() {
    let world = world!(|l| lower_files(l, 400));
    (400..800).for_each(|n| fs::write(world.at(format!("f{n}")), "").unwrap());
    storm(&world, 4, |thread, round| {
        if thread < 2 {
            let path = world.at(format!("other{thread}-{}", round % 7));
            fs::write(&path, "").unwrap();
            if round % 3 > 0 {
                fs::remove_file(&path).unwrap();
            }
        } else {
            let mut seen: Vec<_> = names(world.root());
            seen.retain(|name| name.starts_with('f'));
            let distinct: HashSet<_> = seen.iter().collect();
            assert_eq!((seen.len(), distinct.len()), (800, 800));
        }
    });
}

#[test]
fn lower_names_are_deleted_and_made_again_and_again() {
    let mut world = world!(|l| lower_files(l, 8));
    let last = (0..8).map(|_| AtomicUsize::new(0)).collect::<Vec<_>>();
    storm(&world, 8, |thread, round| {
        let path = world.at(format!("f{thread}"));
        fs::remove_file(&path).unwrap();
        assert!(!path.exists());
        if round % 2 == 0 {
            fs::write(&path, round.to_string()).unwrap();
        } else {
            fs::create_dir(&path).unwrap();
            fs::remove_dir(&path).unwrap();
            symlink(round.to_string(), &path).unwrap();
        }
        last[thread].store(round, SeqCst);
    });
    world.remount();
    assert_eq!(names(world.root()).len(), 8);
    for (thread, last) in last.iter().enumerate() {
        let (path, round) = (world.at(format!("f{thread}")), last.load(SeqCst));
        let is = if round % 2 == 0 { text(&path) } else { fs::read_link(&path).unwrap().to_str().unwrap().into() };
        assert_eq!(is, round.to_string());
    }
}

#[test]
fn lower_directories_are_removed_and_come_back_empty() {
    let mut world = world!(|l| {
        for n in 0..20 {
            fs::create_dir_all(l.join(format!("d{n}/sub"))).unwrap();
            lower_files(&l.join(format!("d{n}/sub")), 4);
        }
    });
    let next = AtomicUsize::new(0);
    together(&world, 4, |_| {
        while let n @ 0..20 = next.fetch_add(1, SeqCst) {
            let dir = world.at(format!("d{n}"));
            for round in 0..3 {
                fs::remove_dir_all(&dir).unwrap();
                fs::create_dir(&dir).unwrap();
                assert!(names(&dir).is_empty());
                fs::create_dir(dir.join("sub")).unwrap();
                assert!(names(dir.join("sub")).is_empty(), "round {round}: what was removed shows through");
            }
        }
    });
    world.remount();
    for n in 0..20 {
        assert_eq!(names(world.at(format!("d{n}"))), ["sub"]);
        assert!(names(world.at(format!("d{n}/sub"))).is_empty());
    }
}

#[test]
fn trees_100_deep() {
    let depth = |thread: usize| (0..100).map(move |n| format!("{thread}-{n}")).collect::<Vec<_>>().join("/");
    let mut world = world!(|l| (0..2).for_each(|n| fs::create_dir_all(l.join(depth(n))).unwrap()));
    storm(&world, 4, |thread, round| {
        let (top, bottom) = (world.at(format!("{thread}-0")), world.at(depth(thread)));
        fs::create_dir_all(&bottom).unwrap();
        fs::write(bottom.join("leaf"), round.to_string()).unwrap();
        let moved = world.at(format!("moved{thread}"));
        fs::rename(&top, &moved).unwrap();
        assert!(!bottom.exists());
        fs::rename(&moved, &top).unwrap();
        assert_eq!(text(bottom.join("leaf")), round.to_string());
        if round % 4 == 3 {
            fs::remove_dir_all(&top).unwrap();
        }
    });
    let before: Vec<_> = (0..4).map(|n| fs::read(world.at(depth(n)).join("leaf")).ok()).collect();
    world.remount();
    let after: Vec<_> = (0..4).map(|n| fs::read(world.at(depth(n)).join("leaf")).ok()).collect();
    assert_eq!(after, before);
}

#[test]
fn wide_directories_are_filled_listed_and_emptied_by_many() {
    let world = world!(|l| {
        fs::create_dir(l.join("d")).unwrap();
        lower_files(&l.join("d"), 2000);
    });
    let d = world.at("d");
    together(&world, 4, |thread| {
        (2000 + thread * 500..2500 + thread * 500).for_each(|n| fs::write(d.join(format!("f{n}")), "").unwrap());
    });
    assert_eq!(names(&d).len(), 4000);
    let removed = AtomicUsize::new(0);
    together(&world, 4, |_| {
        for name in names(&d) {
            may!(fs::remove_file(d.join(name)), NOENT).map(|()| removed.fetch_add(1, SeqCst));
        }
    });
    assert_eq!(removed.into_inner(), 4000, "each by one");
    fs::remove_dir(&d).unwrap();
}

#[test]
fn exchanges_only_permute() {
    let mut world = world!(|l| lower_files(l, 6));
    fs::create_dir(world.at("f6")).unwrap();
    storm(&world, 6, |thread, round| {
        let mut random = Random::new(thread * 1_000_003 + round);
        let [a, b] = [0; 2].map(|_| world.at(format!("f{}", random.below(7))));
        renameat_with(CWD, &a, CWD, &b, RenameFlags::EXCHANGE).unwrap();
        // Never is a name missing.
        stat(&a);
    });
    for _ in 0..2 {
        let mut seen: Vec<_> =
            (0..7).map(|n| fs::read_to_string(world.at(format!("f{n}"))).unwrap_or("directory".into())).collect();
        seen.sort();
        assert_eq!(seen, ["directory", "f0", "f1", "f2", "f3", "f4", "f5"]);
        world.remount();
    }
}

#[test]
fn chains_of_symlinks_that_are_turned_always_lead_somewhere() {
    let world = world!(|l| {
        for version in ["v1", "v2"] {
            fs::create_dir(l.join(version)).unwrap();
            fs::write(l.join(version).join("f"), version).unwrap();
        }
        symlink("v1", l.join("s0")).unwrap();
        (1..10).for_each(|n| symlink(format!("s{}", n - 1), l.join(format!("s{n}"))).unwrap());
    });
    storm(&world, 5, |thread, round| {
        if thread < 2 {
            let new = world.at(format!("new{thread}"));
            symlink(["v1", "v2"][round % 2], &new).unwrap();
            fs::rename(&new, world.at("s0")).unwrap();
        } else {
            let seen = text(world.at("s9/f"));
            assert!(seen == "v1" || seen == "v2");
            fs::read_link(world.at("s0")).unwrap();
        }
    });
}

#[test]
fn one_tree_is_removed_by_many() {
    let mut world = world!(|l| {
        for n in 0..20 {
            fs::create_dir_all(l.join(format!("t/d{n}/e"))).unwrap();
            lower_files(&l.join(format!("t/d{n}/e")), 10);
        }
    });
    fn remove(dir: &Path) {
        for entry in may!(fs::read_dir(dir), NOENT).into_iter().flatten() {
            let Some(entry) = may!(entry, NOENT) else { continue };
            if entry.file_type().unwrap().is_dir() {
                remove(&entry.path());
            } else {
                may!(fs::remove_file(entry.path()), NOENT);
            }
        }
        may!(fs::remove_dir(dir), NOENT, NOTEMPTY);
    }
    together(&world, 4, |_| remove(&world.at("t")));
    assert!(names(world.root()).is_empty());
    world.remount();
    assert!(names(world.root()).is_empty());
}

#[test]
fn modes_and_owners_change_in_a_storm_and_content_does_not() {
    let mut world = world!(|l| lower_files(l, 12));
    storm(&world, 6, |thread, round| {
        let path = world.at(format!("f{}", round % 12));
        match thread % 3 {
            0 => chmod(&path, 0o600 | (round as u32 % 8)),
            1 => chown(&path, round as u32 % 5, round as u32 % 7),
            _ => {
                let meta = stat(&path);
                assert!(meta.uid() < 5 && meta.gid() < 7 && meta.mode() & 0o170600 == 0o100600, "{meta:?}");
                assert_eq!(text(&path), format!("f{}", round % 12));
            }
        }
    });
    let all = |world: &World| {
        (0..12).map(|n| stat(world.at(format!("f{n}")))).map(|m| (m.mode(), m.uid(), m.gid())).collect::<Vec<_>>()
    };
    let before = all(&world);
    world.remount();
    assert_eq!(all(&world), before, "what was shown is what the disk has");
}

#[test]
fn xattrs_change_in_a_storm_and_are_never_torn() {
    let mut world = world!(|l| {
        fs::write(l.join("f"), "text").unwrap();
        xattr::set(l.join("f"), "user.shared", b"0").unwrap();
    });
    let path = world.at("f");
    storm(&world, 6, |thread, round| {
        let own = format!("user.own{thread}");
        let value = vec![b'a' + (round % 26) as u8; 1 + round % 300];
        xattr::set(&path, &own, &value).unwrap();
        assert!(xattr::get(&path, &own).unwrap().unwrap() == value);
        xattr::set(&path, "user.shared", &value).unwrap();
        let seen = xattr::get(&path, "user.shared").unwrap().unwrap();
        assert!(seen.iter().all(|byte| *byte == seen[0]), "torn");
        assert!(xattr::list(&path).unwrap().any(|name| name == *own));
        if round % 5 == 4 {
            xattr::remove(&path, &own).unwrap();
        }
    });
    let all = |world: &World| {
        let mut all: Vec<_> =
            xattr::list(world.at("f")).unwrap().map(|n| (xattr::get(world.at("f"), &n).unwrap(), n)).collect();
        all.sort();
        all
    };
    let before = all(&world);
    world.remount();
    assert_eq!(all(&world), before);
    assert_eq!(text(world.at("f")), "text");
}
