//! The database: transactions, versions of its tables, who may read it, and what is said when it is damaged or lost.

use super::*;
use std::os::unix::fs::PermissionsExt;

#[test]
fn a_panic_in_a_transaction_rolls_it_back_and_the_store_works_on() {
    let dir = tempfile::tempdir().unwrap();
    let layers = open(dir.path());
    let id = make(&layers, "a", None, true);
    let panicking = std::panic::AssertUnwindSafe(|| {
        layers.store().write::<()>(|tx| {
            layers.remove_in(tx, id)?;
            panic!("in the middle")
        })
    });
    std::panic::catch_unwind(panicking).unwrap_err();
    assert_eq!(layers.sweep().unwrap(), 0);
    assert_eq!(names(&layers), ["a"]);
    assert_clean(&layers);
}

#[test]
fn a_transaction_within_a_transaction_is_an_error_and_no_deadlock() {
    let dir = tempfile::tempdir().unwrap();
    let layers = open(dir.path());
    let id = make(&layers, "a", None, true);
    let nested = layers.store().write(|_| layers.get(id));
    assert_eq!(kind_of(nested), K::InvalidInput);
    // A guard moved into the transaction and dropped there can do nothing, and need not: it was kept.
    let new = layers.create(LayerKind::Active, Some(id), &LayerOptions::default()).unwrap();
    layers.store().write(move |tx| new.keep(tx, None)).unwrap();
    assert_eq!(layers.list().unwrap().len(), 2);
    assert_clean(&layers);
}

#[test]
fn only_the_owner_can_look_inside() {
    let dir = tempfile::tempdir().unwrap();
    let home = dir.path().join("deep/store");
    let layers = open(&home);
    layers.tmp_dir().unwrap();
    let mode = |path: &str| fs::metadata(home.join(path)).unwrap().permissions().mode() & 0o777;
    for (path, expected) in [("", 0o700), ("store.db", 0o600), ("store.db-wal", 0o600), ("run", 0o700), ("tmp", 0o700)]
    {
        assert_eq!(mode(path), expected, "{path}");
    }
}

#[test]
fn the_callers_tables_change_with_the_layers_and_are_brought_up_step_by_step() {
    const FIRST: &str = "CREATE TABLE images(name TEXT PRIMARY KEY, top INTEGER REFERENCES layers(id)) STRICT";
    const SECOND: &str = "ALTER TABLE images ADD COLUMN size INTEGER; INSERT INTO images VALUES ('scratch', NULL, 0)";
    let old = [Schema { component: "images", steps: &[FIRST] }];
    let new = [Schema { component: "images", steps: &[FIRST, SECOND] }];
    let dir = tempfile::tempdir().unwrap();
    let with = |schema| Layers::open(dir.path(), DirDriver::boxed(dir.path(), Arc::new(|_| Ok(()))), schema);
    let layers = with(&old).unwrap();
    let id = make(&layers, "a", None, true);
    layers.store().write(|tx| Ok(tx.execute("INSERT INTO images VALUES ('a', ?1)", [id])?)).unwrap();
    drop(layers);
    for _ in 0..2 {
        let layers = with(&new).unwrap();
        let count =
            |conn: &Connection| Ok(conn.query_row("SELECT count(*) FROM images", [], |row| row.get::<_, i64>(0))?);
        assert_eq!(layers.store().read(count).unwrap(), 2);
    }
    let refused = with(&old).err().unwrap();
    assert_eq!(refused.kind(), K::Unsupported);
    assert!(refused.to_string().contains("made by a newer graphdriver: images 2, this one knows 1"), "{refused}");
}

#[test]
fn a_step_that_fails_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let bad = [Schema { component: "c", steps: &["CREATE TABLE t(x); CREATE TABLE t(x)"] }];
    Store::open(dir.path(), &bad).err().unwrap();
    let good = [Schema { component: "c", steps: &["CREATE TABLE t(x)"] }];
    Store::open(dir.path(), &good).unwrap();
}

#[test]
fn a_newer_store_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let layers = open(dir.path());
    let newer = "UPDATE schema_versions SET version = version + 1 WHERE component = 'layers'";
    layers.store().write(|tx| Ok(tx.execute(newer, [])?)).unwrap();
    drop(layers);
    let refused = Store::open(dir.path(), &[]).err().unwrap();
    assert_eq!(refused.kind(), K::Unsupported);
    assert!(refused.to_string().contains("newer graphdriver"), "{refused}");
}

#[test]
fn a_store_of_version_1_opens_and_its_interrupted_work_is_undone() {
    let dir = tempfile::tempdir().unwrap();
    let sample = Connection::open(dir.path().join("store.db")).unwrap();
    sample.execute_batch(include_str!("../samples/v1.sql")).unwrap();
    drop(sample);
    for id in [1, 2, 4, 6] {
        fs::create_dir_all(dir.path().join(format!("data/{id}"))).unwrap();
    }
    let layers = open(dir.path());
    assert_eq!(names(&layers), ["base", "child"]);
    let base = Layer {
        id: LayerId(1),
        kind: LayerKind::Committed,
        parent: None,
        diff_id: Some(diff("base")),
        chain_id: Some(crate::ChainId(diff("base").0)),
        tar_size: Some(4),
        usage: Some(Usage { bytes: 7, inodes: 2 }),
        size_limit: None,
        created: 1_790_000_000_123_456_789,
        labels: labelled("base"),
    };
    assert_eq!(layers.get(LayerId(1)).unwrap(), base);
    assert_eq!(layers.get(LayerId(2)).unwrap().kind, LayerKind::Active);
    assert_clean(&layers);
    assert_eq!(make(&layers, "new", Some(LayerId(1)), false), LayerId(7));
}

#[test]
fn a_damaged_database_is_called_that() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("store.db"), "no database at all, but long enough for SQLite to look at it".repeat(99))
        .unwrap();
    let refused = Store::open(dir.path(), &[]).err().unwrap();
    assert_eq!(refused.kind(), K::Corrupt);
    assert!(refused.hint_text().unwrap().contains("restore store.db from a backup"), "{refused}");
}

#[test]
fn data_version_tells_of_what_others_committed() {
    let dir = tempfile::tempdir().unwrap();
    let (mine, other) = (open(dir.path()), open(dir.path()));
    let before = mine.store().data_version().unwrap();
    assert_eq!(mine.store().data_version().unwrap(), before);
    make(&other, "a", None, false);
    assert_ne!(mine.store().data_version().unwrap(), before);
}

#[test]
fn a_reader_waits_for_no_writer() {
    let dir = tempfile::tempdir().unwrap();
    let layers = open(dir.path());
    let id = make(&layers, "old", None, true);
    let (sent, seen) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let reader = || sent.send(names(&layers)).unwrap();
        let during = layers.store().write(|tx| {
            set_labels(tx, id, &labelled("new"))?;
            scope.spawn(reader);
            Ok(seen.recv_timeout(Duration::from_secs(10)))
        });
        assert_eq!(during.unwrap(), Ok(vec!["old".to_owned()]));
    });
    assert_eq!(names(&layers), ["new"], "what was committed is seen at once");
}

/// A `load` into a store whose database was lost took the old layers' numbers, and its undo their files.
#[test]
fn a_lost_database_is_no_empty_store() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("records/1")).unwrap();
    let e = Store::open(dir.path(), &[]).err().unwrap();
    assert!(e.kind() == ErrorKind::Corrupt && e.to_string().contains("backup"), "{e}");
    assert!(!dir.path().join("store.db").exists());
}
