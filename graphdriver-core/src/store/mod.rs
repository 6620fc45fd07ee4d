//! The layer store: names, kinds, parents, labels and intents, in SQLite; and [`Layers`], which ties it to a driver.
//!
//! One store per data root and driver, in a directory:
//!
//! ```text
//! store.db      the database, with store.db-wal and store.db-shm beside it while it is open
//! data/         the driver's home, whose content is the driver's business
//! records/ID/   what lets the layer's tar come out byte for byte, if there is anything
//! run/          SESSION.lock: the lock each session holds while it lives
//! tmp/          SESSION/: scratch space, gone with its session
//! reserve       space kept back for freeing space on a full disk
//! boot          the boot during which somebody last looked for what a crash or a power cut left, and freed all of it
//! ```
//!
//! # Tables, version 1 of the component `layers`
//!
//! * `schema_versions(component, version)`: how many steps of each component's schema were applied. A database in
//!   which a component is newer than the program knows is refused; an older one is brought up when it is opened.
//! * `layers`: one row per layer, also of those being made and being removed. `kind` is `active`, `view` or
//!   `committed`; `created` is in nanoseconds since 1970; sizes are in bytes; digests are written `sha256:HEX`.
//!   Numbers that were durable are never used again (`AUTOINCREMENT`).
//! * `layer_labels(layer, name, value)`.
//! * `layer_intents(layer, op, session)`: what is being done to a layer, and by whom. `create`: storage is being made
//!   or filled, nobody knows the layer yet. `remove`: nobody knows the layer any more, storage is being freed.
//!   `commit`: an active layer is being frozen.
//! * `visible_layers`: a view, the layers without those being made or removed. Tables of the caller may refer to
//!   `layers(id)`; a row that does keeps the layer from being swept, so it has to go in the transaction of
//!   [`Layers::remove_in`].
//!
//! # Intents and sessions
//!
//! An intent is in the database before the driver is called, and goes when the driver is done, so whatever a crash of the
//! process leaves has an intent. Those of `remove` and `commit` survive a power cut as well. One of `create` may not, and
//! neither may the end of a removal: after a boot, `recover` has the driver free what is in no row before anything is made,
//! and finishes the removal again. A number that was lost with its row is given out once more after that. A *session* is one [`Layers`] with at least one intent in its life. Before its first one it locks
//! `run/SESSION.lock` with flock(2), which the kernel releases when the process ends, in whatever way, also in another
//! pid namespace, and of course at a reboot. [`Layers::recover`] takes over the intents of sessions whose lock nobody
//! holds: a layer being made or removed is removed, one being frozen is active again ([`thaw`](crate::GraphDriver::thaw)):
//! its last moments may not be on disk, and nobody was told that they are.
//!
//! The database must not be used across fork(2), and a child that is forked without exec keeps its parent's session alive.

mod layers;
pub mod reserve;
mod rows;
mod session;
mod sql;
mod survey;
#[cfg(test)]
mod tests;

pub use layers::{CommitInfo, Layers, NewLayer, Recovered};
pub use rows::{Layer, LayerKind, by_chain, chain, children, get, list, parents, set_labels};
pub use survey::{Intended, Intent};

use crate::{Context, Error, ErrorKind, Result};
use rusqlite::{Connection, OptionalExtension, Transaction, TransactionBehavior, params};
use std::{
    collections::HashSet,
    fs::{DirBuilder, File, OpenOptions},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    thread::{self, ThreadId},
    time::Duration,
};

/// The tables of one component, as the steps that made them: the version is the number of steps.
/// A step, once released, never changes; a change is a further step.
#[derive(Debug, Clone, Copy)]
pub struct Schema {
    /// Its name in `schema_versions`.
    pub component: &'static str,
    /// SQL, one or several statements each.
    pub steps: &'static [&'static str],
}

/// The database. Several processes may have it open, and threads may share one.
pub struct Store {
    path: PathBuf,
    writer: Mutex<Connection>,
    /// Those that nobody uses at the moment. With their own connections, readers do not wait for a writer's fsync.
    readers: Mutex<Vec<Connection>>,
    /// The threads that are in a transaction, to refuse them a second one instead of hanging.
    busy: Mutex<HashSet<ThreadId>>,
}

/// How many connections for reading are kept open; more are opened when they are needed.
const READERS: usize = 4;

/// A new store would give its layers the numbers of those that are there.
fn holds_records(dir: &Path) -> bool {
    std::fs::read_dir(dir.join("records")).is_ok_and(|mut records| records.next().is_some())
}

impl Store {
    /// Opens `store.db` in `dir`, making both if they do not exist, and applies what is missing of the store's own
    /// schema and then of the caller's: layers and what refers to them can change in one transaction.
    ///
    /// Fails with `Unsupported` if a newer graphdriver made it, and with `Corrupt` if it is damaged.
    pub fn open(dir: &Path, schema: &[Schema]) -> Result<Store> {
        let path = dir.join("store.db");
        if !path.exists() && holds_records(dir) {
            let reason = format!("{} is missing, and there are layers beside it", path.display());
            return Err(Error::new(ErrorKind::Corrupt, reason)
                .hint("restore it from a backup; to begin anew, remove the directory it belongs into"));
        }
        let opened = open_database(dir, &path, schema).map_err(|e| match e.kind() {
            ErrorKind::Corrupt => e.hint("restore store.db from a backup, or use another data root and load again"),
            _ => e,
        });
        opened.doing(|| format!("opening the layer store {}", path.display()))
    }

    /// Calls `f` in a read transaction: everything it reads is from one point in time, at which all writes were done that
    /// have returned. It waits for no writer. What it writes is rolled back.
    ///
    /// One thread has one transaction at a time: within `f`, calls that make their own fail with `InvalidInput`.
    pub fn read<T>(&self, f: impl FnOnce(&Connection) -> Result<T>) -> Result<T> {
        let _turn = self.turn()?;
        let idle = unpoisoned(&self.readers).pop();
        let mut conn = idle.map_or_else(|| connect(&self.path), Ok)?;
        let value =
            conn.transaction_with_behavior(TransactionBehavior::Deferred).map_err(Error::from).and_then(|tx| f(&tx));
        let mut readers = unpoisoned(&self.readers);
        if readers.len() < READERS {
            readers.push(conn);
        }
        value
    }

    /// Calls `f` in a write transaction, which no other writer overlaps, and commits it durably if `f` succeeds. If it
    /// fails or panics nothing has changed. Waits a minute for other writers, so no slow work belongs into `f`.
    ///
    /// One thread has one transaction at a time: within `f`, calls that make their own fail with `InvalidInput`.
    pub fn write<T>(&self, f: impl FnOnce(&Transaction<'_>) -> Result<T>) -> Result<T> {
        self.write_as("FULL", f)
    }

    /// [`write`](Self::write) for what need not survive a power cut: a crash of the process it survives, and whatever is
    /// written durably later is not there without it.
    fn write_relaxed<T>(&self, f: impl FnOnce(&Transaction<'_>) -> Result<T>) -> Result<T> {
        self.write_as("NORMAL", f)
    }

    fn write_as<T>(&self, synchronous: &str, f: impl FnOnce(&Transaction<'_>) -> Result<T>) -> Result<T> {
        let _turn = self.turn()?;
        // A panic in a transaction has rolled it back: the connection is as good as before.
        let mut conn = unpoisoned(&self.writer);
        conn.pragma_update(None, "synchronous", synchronous)?;
        let begun = conn.transaction_with_behavior(TransactionBehavior::Immediate);
        let tx = begun.hint(|| "another graphdriver process is writing to the store; try again when it is done")?;
        let value = f(&tx)?;
        tx.commit().doing(|| "committing to the layer store")?;
        Ok(value)
    }

    /// A number that changes when another process, or another `Store`, has committed something.
    pub fn data_version(&self) -> Result<i64> {
        let _turn = self.turn()?;
        Ok(unpoisoned(&self.writer).query_row("PRAGMA data_version", [], |row| row.get(0))?)
    }

    fn turn(&self) -> Result<Turn<'_>> {
        let me = thread::current().id();
        if !unpoisoned(&self.busy).insert(me) {
            let reason = "this thread is in a transaction of the layer store already";
            return Err(Error::new(ErrorKind::InvalidInput, reason)
                .hint("a bug in the caller: use the functions that take the transaction"));
        }
        Ok(Turn { busy: &self.busy, me })
    }
}

/// A thread's one transaction.
struct Turn<'a> {
    busy: &'a Mutex<HashSet<ThreadId>>,
    me: ThreadId,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        unpoisoned(self.busy).remove(&self.me);
    }
}

fn unpoisoned<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn open_database(dir: &Path, path: &Path, schema: &[Schema]) -> Result<Store> {
    make_dir(dir)?;
    // One at a time: nothing is half-way brought up, and SQLite does not wait for others when it turns a new database
    // to WAL but fails.
    let lock = File::open(dir)?;
    lock.lock().hint(|| LOCAL)?;
    // SQLite would make it readable for all; its -wal and -shm files take the mode from it.
    match OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
        Ok(_) => lock.sync_all()?,
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
        Err(e) => return Err(e.into()),
    }
    let mut conn = connect(path).map_err(|e| if e.kind() == ErrorKind::Io { e.hint(LOCAL) } else { e })?;
    migrate(&mut conn, schema)?;
    let (writer, path) = (Mutex::new(conn), path.to_owned());
    Ok(Store { path, writer, readers: Mutex::default(), busy: Mutex::default() })
}

const LOCAL: &str = "the store needs file locks and shared memory: put the data root on a local filesystem";

fn connect(path: &Path) -> Result<Connection> {
    let conn = Connection::open(path)?;
    conn.busy_timeout(Duration::from_secs(60))?;
    let mode: String = conn.query_row("PRAGMA journal_mode=WAL", [], |row| row.get(0))?;
    if mode != "wal" {
        return Err(Error::new(ErrorKind::Io, format!("SQLite cannot keep a write-ahead log here, only {mode}")));
    }
    conn.execute_batch("PRAGMA synchronous=FULL; PRAGMA foreign_keys=ON")?;
    Ok(conn)
}

fn migrate(conn: &mut Connection, schema: &[Schema]) -> Result<()> {
    conn.execute_batch(
        "CREATE TABLE IF NOT EXISTS schema_versions(component TEXT PRIMARY KEY, version INTEGER NOT NULL) STRICT, WITHOUT ROWID",
    )?;
    for schema in [rows::SCHEMA].iter().chain(schema) {
        let known = schema.steps.len();
        let version = version_of(conn, schema.component)?;
        if version > known {
            let reason = format!("made by a newer graphdriver: {} {version}, this one knows {known}", schema.component);
            return Err(Error::new(ErrorKind::Unsupported, reason).hint("use that graphdriver or another data root"));
        }
        for step in version..known {
            let tx = conn.transaction_with_behavior(TransactionBehavior::Immediate)?;
            let made = tx.execute_batch(schema.steps[step]).and_then(|()| {
                let sql = "INSERT OR REPLACE INTO schema_versions VALUES (?1, ?2)";
                tx.execute(sql, params![schema.component, step as i64 + 1])
            });
            made.doing(|| format!("bringing {} to version {}", schema.component, step + 1))?;
            tx.commit()?;
        }
    }
    Ok(())
}

fn version_of(conn: &Connection, component: &str) -> Result<usize> {
    let sql = "SELECT version FROM schema_versions WHERE component = ?1";
    let version: Option<i64> = conn.query_row(sql, [component], |row| row.get(0)).optional()?;
    usize::try_from(version.unwrap_or(0))
        .map_err(|_| Error::new(ErrorKind::Corrupt, format!("the version of {component} is no number of steps")))
}

/// Makes a directory that only its owner may enter, and its parents.
fn make_dir(path: &Path) -> Result<()> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.doing(|| format!("making directory {}", path.display()))
}
