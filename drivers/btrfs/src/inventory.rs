//! What lies in the data directory, looked at and left alone.

use crate::{
    home::{Home, entries},
    subvolume,
};
use graphdriver_core::{ErrorKind, LayerId, Result, Root, Stored, StoredAs};
use rustix::fs::FlockOperation;
use std::{os::fd::AsFd, path::Path};

/// What is in `HOME` itself.
const OWN: [&str; 8] = ["version", "version.new", "layers", "usage", "limits", "flat", "stale", "frozen.lock"];

impl Home {
    /// See [`GraphDriver::inventory`](graphdriver_core::GraphDriver::inventory).
    pub(crate) fn inventory(&self) -> Result<Vec<Stored>> {
        let mut found = Vec::new();
        let mut add = |path: &Path, what| found.push(Stored { place: path.display().to_string(), what });
        for (name, path) in entries(&self.path)? {
            if !OWN.contains(&name.as_str()) && name != "lost+found" {
                add(&path, StoredAs::Alien);
            }
        }
        let no_frozen = self.lock_frozen(FlockOperation::NonBlockingLockExclusive)?.is_some();
        for (name, path) in entries(&self.path.join("layers"))? {
            if let Some(what) = self.identify(&name, no_frozen)? {
                add(&path, what);
            }
        }
        for (dir, of_layers) in [("usage", true), ("limits", true), ("flat", false)] {
            for (name, path) in entries(&self.path.join(dir))? {
                let of = name.strip_suffix(".new").unwrap_or(&name).parse().ok();
                match of {
                    None => add(&path, StoredAs::Alien),
                    Some(id) if of_layers && self.layer(id).is_ok() => {}
                    Some(_) => add(&path, StoredAs::Leftover { of }),
                }
            }
        }
        Ok(found)
    }

    /// None for what somebody needs just now.
    fn identify(&self, name: &str, no_frozen: bool) -> Result<Option<StoredAs>> {
        if let Ok(id) = name.parse() {
            return self.look_at(id);
        }
        let number = |name: &str| name.parse::<LayerId>().ok();
        Ok(match name.split_once('-') {
            Some(("new", id)) if number(id).is_some() => Some(StoredAs::Leftover { of: number(id) }),
            Some(("removed", name)) => {
                Some(StoredAs::Leftover { of: number(name.strip_prefix("new-").unwrap_or(name)) })
            }
            Some(("frozen", _)) => no_frozen.then_some(StoredAs::Leftover { of: None }),
            _ => Some(StoredAs::Alien),
        })
    }

    /// None if it has just been removed.
    fn look_at(&self, id: LayerId) -> Result<Option<StoredAs>> {
        let damaged = |flaw: String| Ok(Some(StoredAs::Damaged { id, flaw }));
        let layer: Root = match self.layer(id) {
            Ok(layer) => layer,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            Err(e) => return damaged(format!("cannot be opened: {}", e.reason())),
        };
        if !subvolume::is_root(layer.as_fd())? {
            return damaged("is a directory and no subvolume".into());
        }
        Ok(Some(StoredAs::Layer { id, committed: self.committed(id, &layer)?.is_some() }))
    }
}
