//! What lies in the data directory, looked at and left alone.

use super::{Home, trial, volatile};
use crate::{Context, LayerId, Result, Stored, StoredAs};

/// What is no layer and belongs there: see the [module](super), and what is there while a file is replaced.
const OWN: [&str; 7] = ["version", "version.new", "empty", "projects", "projects.new", "projects.lock", "lost+found"];

impl Home {
    /// See [`GraphDriver::inventory`](crate::GraphDriver::inventory).
    pub fn inventory(&self) -> Result<Vec<Stored>> {
        let mut found = Vec::new();
        for entry in std::fs::read_dir(&self.path).doing(|| format!("reading {}", self.path.display()))? {
            let name = entry?.file_name();
            // None of ours has a name that is no text.
            let what = name.to_str().map_or(Ok(Some(StoredAs::Alien)), |name| self.identify(name))?;
            let place = self.path.join(&name).display().to_string();
            found.extend(what.map(|what| Stored { place, what }));
        }
        Ok(found)
    }

    /// None for what belongs there and is no layer.
    fn identify(&self, name: &str) -> Result<Option<StoredAs>> {
        if let Ok(id) = name.parse() {
            return self.look_at(id).map(Some);
        }
        if OWN.contains(&name) || trial::is_trial(name) && !trial::is_long_abandoned(&self.path, name) {
            return Ok(None);
        }
        let number = |name: &str| name.parse::<LayerId>().ok();
        let new = name.strip_prefix("new-").and_then(number);
        let removed = name.strip_prefix("removed-");
        let of = new.or_else(|| removed.and_then(|name| number(name.strip_prefix("new-").unwrap_or(name))));
        let leftover = new.is_some() || removed.is_some() || trial::is_trial(name);
        Ok(Some(if leftover { StoredAs::Leftover { of } } else { StoredAs::Alien }))
    }

    fn look_at(&self, id: LayerId) -> Result<StoredAs> {
        let flaw = if !self.diff(id).is_dir() {
            "has no directory diff"
        } else if volatile::is_lost(&self.layer(id))? {
            "was mounted with volatile=on when the machine stopped, and may have lost anything"
        } else {
            return Ok(StoredAs::Layer { id, committed: !self.layer(id).join("work").is_dir() });
        };
        Ok(StoredAs::Damaged { id, flaw: flaw.into() })
    }
}
