//! Looking at the store without changing it.

use super::{Layers, session, session::traces};
use crate::{Context, Error, ErrorKind, LayerId, Result};
use std::{collections::BTreeSet, fs, path::PathBuf};

/// What is being done to a layer, or was when its session was interrupted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Intent {
    /// The layer.
    pub layer: LayerId,
    /// What.
    pub what: Intended,
    /// Whether whoever did it is gone.
    pub interrupted: bool,
}

/// See [`Intent`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Intended {
    /// It is made or filled, and nobody sees it yet.
    Create,
    /// It is frozen.
    Commit,
    /// Its storage is freed, and nobody sees it any more.
    Remove,
}

impl Layers {
    /// What SQLite finds wrong with the database: damaged pages, missing entries in indexes, rows that refer to none.
    pub fn integrity(&self) -> Result<Vec<String>> {
        self.store().read(|db| {
            let mut check = db.prepare("PRAGMA integrity_check")?;
            let mut found: Vec<String> = check.query_map([], |row| row.get(0))?.collect::<Result<_, _>>()?;
            found.retain(|line| line != "ok");
            let mut check = db.prepare("PRAGMA foreign_key_check")?;
            let dangling = check.query_map([], |row| {
                let (table, other): (String, String) = (row.get(0)?, row.get(2)?);
                Ok(format!("a row in {table} refers to none in {other}"))
            })?;
            found.extend(dangling.collect::<Result<Vec<_>, _>>()?);
            Ok(found)
        })
    }

    /// What is being done to layers, here or in another process, by their numbers.
    pub fn intents(&self) -> Result<Vec<Intent>> {
        let dead = self.dead_sessions()?;
        let rows: Vec<(LayerId, String, String)> = self.store().read(|db| {
            let mut rows = db.prepare("SELECT layer, op, session FROM layer_intents ORDER BY layer")?;
            Ok(rows.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?.collect::<Result<_, _>>()?)
        })?;
        let intent = |(layer, op, session): (LayerId, String, String)| {
            let what = match op.as_str() {
                "create" => Intended::Create,
                "commit" => Intended::Commit,
                "remove" => Intended::Remove,
                _ => return Err(Error::new(ErrorKind::Corrupt, format!("layer {layer} has the intent {op:?}"))),
            };
            Ok(Intent { layer, what, interrupted: dead.contains(&session) })
        };
        rows.into_iter().map(intent).collect()
    }

    /// Sessions that ended without cleaning up.
    pub fn dead_sessions(&self) -> Result<BTreeSet<String>> {
        let mut names = traces(self.dir())?;
        names.extend(self.store().read(super::rows::sessions)?);
        let mut dead = BTreeSet::new();
        for name in names {
            if session::claim(self.dir(), &name)?.is_some() {
                dead.insert(name);
            }
        }
        Ok(dead)
    }

    /// Locks and scratch directories of sessions that ended without cleaning up.
    pub fn left_behind(&self) -> Result<Vec<PathBuf>> {
        let mut left = Vec::new();
        for name in self.dead_sessions()? {
            let paths = [self.dir().join("run").join(format!("{name}.lock")), self.dir().join("tmp").join(&name)];
            left.extend(paths.into_iter().filter(|path| path.exists()));
        }
        Ok(left)
    }

    /// What is in the directory of records, with the layer it belongs to, if its name says one.
    pub fn records(&self) -> Result<Vec<(PathBuf, Option<LayerId>)>> {
        let dir = self.dir().join("records");
        let entries = match fs::read_dir(&dir) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.doing(|| format!("reading {}", dir.display()))?,
        };
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry?;
            found.push((entry.path(), entry.file_name().to_str().and_then(|name| name.parse().ok())));
        }
        Ok(found)
    }
}
