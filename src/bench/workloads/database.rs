//! A database of the image that a container updates.

use super::{Case, Named, Run, SEED, Sizes};
use crate::progress::Cancel;
use graphdriver_core::{Context, Error, ErrorKind, Result};
use rusqlite::{Connection, params};
use std::{io, path::Path};

/// Each is one transaction of one row, flushed as SQLite does by itself.
const UPDATES: usize = 200;
const ROW: usize = 1000;
const NAME: &str = "database";

pub(super) fn updates(sizes: &Sizes) -> Vec<Case> {
    vec![Case::new(format!("{UPDATES} updates of {} rows", rows(*sizes)), UPDATES as u64)]
}

fn rows(sizes: Sizes) -> i64 {
    (sizes.large.min(16 << 20) / 1024) as i64
}

/// Beside its final place, where SQLite, which resolves symlinks itself, can work; then copied.
fn make(dir: &Path, rows: i64, cancel: &Cancel) -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let path = scratch.path().join(NAME);
    let mut db = Connection::open(&path)?;
    db.execute_batch("PRAGMA synchronous=OFF; CREATE TABLE t(id INTEGER PRIMARY KEY, data BLOB) STRICT")?;
    let mut random = fastrand::Rng::with_seed(SEED);
    let tx = db.transaction()?;
    for id in 0..rows {
        cancel.check()?;
        tx.execute("INSERT INTO t VALUES (?1, ?2)", params![id, payload(&mut random)])?;
    }
    tx.commit()?;
    db.close().map_err(|(_, e)| e)?;
    Ok(std::fs::write(dir.join(NAME), std::fs::read(path)?)?)
}

fn payload(random: &mut fastrand::Rng) -> Vec<u8> {
    let mut data = vec![0; ROW];
    random.fill(&mut data);
    data
}

/// With the rollback journal, bytes that this thread has handed to write(2) and its like so far.
fn written() -> Result<u64> {
    let path = "/proc/thread-self/io";
    let text = std::fs::read_to_string(path).doing(|| format!("reading {path}"))?;
    let count = text.lines().find_map(|line| line.strip_prefix("wchar: ")?.parse().ok());
    count.ok_or_else(|| {
        let why = format!("{path} does not tell what SQLite writes");
        Error::new(ErrorKind::Unsupported, why).hint("a kernel with CONFIG_TASK_XACCT does")
    })
}

pub(super) fn sqlite(run: &mut Run<'_>, _: &Case) -> Result<Named> {
    let rows = rows(run.sizes);
    run.layer(|dir, cancel| make(dir, rows, cancel))?;
    let used = run.containers(1)?;
    let container = &run.stand.containers()[0];
    let sample = run.stand.attached(container, |root| {
        let mut random = fastrand::Rng::with_seed(SEED + 1);
        let mut meter = run.meter()?;
        let before = written()?;
        let db = Connection::open(root.join(NAME))?;
        for n in 0..UPDATES {
            let (id, data) = (random.i64(0..rows), payload(&mut random));
            let update =
                || db.execute("UPDATE t SET data = ?2 WHERE id = ?1", params![id, data]).map_err(io::Error::other);
            let changed = if n == 0 { meter.first(update)? } else { meter.later(update)? };
            assert_eq!(changed, 1, "every row is there");
        }
        db.close().map_err(|(_, e)| e)?;
        meter.written = written()? - before;
        meter.stop()
    })?;
    Ok(vec![("sqlite", run.finish(used, sample)?)])
}
