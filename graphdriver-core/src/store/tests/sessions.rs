//! Several at work in one store, and what the next one does about those that crashed.

use super::*;
use std::sync::atomic::Ordering;

#[test]
fn the_work_of_live_sessions_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let first = open(dir.path());
    let new = first.create(LayerKind::Active, None, &LayerOptions::default()).unwrap();
    let scratch = first.tmp_dir().unwrap();
    let victim = make(&first, "victim", None, true);
    first.store().write(|tx| first.remove_in(tx, victim)).unwrap();
    let second = open(dir.path());
    assert_eq!(second.recover().unwrap(), Recovered::default());
    assert!(scratch.exists());
    assert_eq!(numbers_in(&dir.path().join("data")), BTreeSet::from([new.id(), victim]));
    assert_eq!(second.sweep().unwrap(), 0);
    first.sweep().unwrap();
    keep(&first, &new, None, "a").unwrap();
    drop(new);
    assert_eq!(names(&second), ["a"]);
    assert_clean(&second);
}

#[test]
fn a_session_cleans_up_after_itself_and_reading_needs_none() {
    let dir = tempfile::tempdir().unwrap();
    let layers = open(dir.path());
    layers.list().unwrap();
    assert!(names_in(&dir.path().join("run")).is_empty());
    fs::write(layers.tmp_dir().unwrap().join("blob"), "x").unwrap();
    assert_eq!(names_in(&dir.path().join("run")).len(), 1);
    drop(layers);
    assert!(names_in(&dir.path().join("run")).is_empty());
    assert!(names_in(&dir.path().join("tmp")).is_empty());
    assert_eq!(open(dir.path()).recover().unwrap(), Recovered::default());
}

#[test]
fn the_driver_looks_for_leftovers_only_after_a_crash() {
    let dir = tempfile::tempdir().unwrap();
    let live = open(dir.path());
    let new = live.create(LayerKind::Active, None, &LayerOptions::default()).unwrap();
    let unknown = dir.path().join("data/99");
    fs::create_dir_all(&unknown).unwrap();
    open(dir.path());
    assert!(unknown.exists());
    fs::write(dir.path().join("run/00000000000000000000000000000000.lock"), "").unwrap();
    let found = open(dir.path()).recover().unwrap();
    assert_eq!(found, Recovered::default(), "opening has done it already");
    assert!(!unknown.exists());
    assert_eq!(numbers_in(&dir.path().join("data")), BTreeSet::from([new.id()]), "what is being made is known");
}

#[test]
fn what_the_driver_could_not_reclaim_is_looked_for_again_at_every_opening() {
    let dir = tempfile::tempdir().unwrap();
    open(dir.path());
    let unknown = dir.path().join("data/99");
    let crashed = || fs::write(dir.path().join("run/00000000000000000000000000000000.lock"), "").unwrap();
    let rebooted = || fs::write(dir.path().join("boot"), "another").unwrap();
    fs::create_dir_all(dir.path().join("run")).unwrap();
    for look in [&crashed as &dyn Fn(), &rebooted] {
        fs::create_dir_all(&unknown).unwrap();
        look();
        for _ in 0..2 {
            hooked(dir.path(), failing("reclaim", K::Busy));
            assert!(unknown.exists());
        }
        open(dir.path());
        assert!(!unknown.exists());
        hooked(dir.path(), Arc::new(|step| panic!("{step}: it has been done")));
    }
}

#[test]
fn many_can_open_a_new_store_at_once() {
    for _ in 0..20 {
        let dir = tempfile::tempdir().unwrap();
        let start = std::sync::Barrier::new(8);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    start.wait();
                    Store::open(dir.path(), &[]).unwrap();
                });
            }
        });
    }
}

#[test]
fn a_session_that_starts_keeps_its_lock_although_others_recover() {
    let dir = tempfile::tempdir().unwrap();
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                for name in session::traces(dir.path()).unwrap() {
                    if let Some(_dead) = session::claim(dir.path(), &name).unwrap() {
                        session::bury(dir.path(), &name).unwrap();
                    }
                }
            }
        });
        let kept = (0..5000).all(|_| {
            let session = session::Session::start(dir.path()).unwrap();
            dir.path().join(format!("run/{}.lock", session.name)).exists()
        });
        done.store(true, Ordering::SeqCst);
        assert!(kept);
    });
}

/// The intent of a creation is not flushed, as what a power cut leaves without it is freed before anything is made.
#[test]
fn a_number_lost_in_a_power_cut_is_given_out_again() {
    number_lost(true);
    number_lost(false);
}

fn number_lost(can_reclaim: bool) {
    let dir = tempfile::tempdir().unwrap();
    let (db, kept) = (dir.path().join("store.db"), dir.path().join("kept.db"));
    make(&open(dir.path()), "a", None, true);
    fs::copy(&db, &kept).unwrap();
    let lost = make(&open(dir.path()), "lost", None, false);
    // All of its storage is there, and nothing that the database was told of it.
    fs::rename(&kept, &db).unwrap();
    fs::write(dir.path().join("boot"), "another").unwrap();
    if can_reclaim {
        let layers = open(dir.path());
        assert_clean(&layers);
        assert_eq!(names(&layers), ["a"]);
        assert_eq!(make(&layers, "b", None, false), lost);
        return assert_clean(&layers);
    }
    // What is in the way then is seen, and gone the next time.
    let layers = hooked(dir.path(), failing("reclaim", K::Io));
    let refused = layers.create(LayerKind::Active, None, &LayerOptions::default());
    assert_eq!(kind_of(refused.map(drop)), K::Corrupt);
    make(&layers, "b", None, false);
    assert_clean(&layers);
}

#[test]
fn threads_share_one() {
    let dir = tempfile::tempdir().unwrap();
    let layers = open(dir.path());
    let base = make(&layers, "base", None, true);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..5 {
                    let id = make(&layers, "t", Some(base), true);
                    layers.recover().unwrap();
                    drop(layers.create(LayerKind::Active, Some(id), &LayerOptions::default()).unwrap());
                    remove(&layers, id).unwrap();
                }
            });
        }
    });
    assert_eq!(names(&layers), ["base"]);
    assert_clean(&layers);
}
