//! What the driver has, beside what the rows say it has.

use super::{Finding, FindingKind, LOAD_AGAIN, NEXT_RECOVERY, rows};
use crate::engine::Engine;
use graphdriver_core::{
    Context, Layer, LayerId, LayerKind, Result, Stored, StoredAs,
    store::{Intended, Intent},
};
use std::collections::{HashMap, HashSet};

/// The rows, for whoever looks at storage.
struct Known {
    layers: HashMap<LayerId, Layer>,
    intents: HashMap<LayerId, Intent>,
}

impl Engine {
    pub(super) fn look_at_storage(&self) -> Result<Vec<Finding>> {
        let intents = self.layers.intents()?.into_iter().map(|intent| (intent.layer, intent)).collect();
        let layers = self.layers.list()?.into_iter().map(|layer| (layer.id, layer)).collect();
        let known = Known { layers, intents };
        let stored = self.layers.driver().inventory().doing(|| "looking at what the storage driver has")?;
        let mut found = known.interrupted();
        let lost = known.lost(&stored);
        // What else there is of a layer that is lost is told with it.
        let of_lost =
            |stored: &&Stored| matches!(stored.what, StoredAs::Leftover { of: Some(id) } if lost.contains(&id));
        found.extend(stored.iter().filter(|stored| !of_lost(stored)).filter_map(|stored| known.judge(stored)));
        found.extend(lost.into_iter().map(|id| {
            let what = format!("layer {id} has no storage: the driver does not have it");
            Finding::damage(what, "neither it nor what lies on it can be mounted or saved", LOAD_AGAIN).of(id)
        }));
        found.extend(self.look_at_records(&known)?);
        found.extend(rows::sessions(&self.layers)?);
        Ok(found)
    }

    /// What `save` needs beside the layers' files.
    fn look_at_records(&self, known: &Known) -> Result<Vec<Finding>> {
        let mut found = Vec::new();
        for (path, id) in self.layers.records()? {
            let place = path.display();
            match id {
                None => found.push(alien(&place.to_string())),
                Some(id) if known.has(id) => {}
                Some(id) => found.push(Finding::leftover(format!("{place}: there is no layer {id}"), NEXT_RECOVERY)),
            }
        }
        for layer in known.settled().filter(|layer| layer.diff_id.is_some() && layer.tar_size.is_some()) {
            let stream = self.layers.record_dir(layer.id).join("stream");
            if !stream.is_file() {
                let what = format!("the record of layer {} is missing: {}", layer.id, stream.display());
                let follows = "images with this layer cannot be saved";
                found.push(Finding::damage(what, follows, LOAD_AGAIN).of(layer.id));
            }
        }
        found.sort_by_key(|finding| finding.layer);
        Ok(found)
    }
}

impl Known {
    /// Whether there is any row of it.
    fn has(&self, id: LayerId) -> bool {
        self.layers.contains_key(&id) || self.intents.contains_key(&id)
    }

    /// The layers that nobody is doing anything to, by their numbers.
    fn settled(&self) -> impl Iterator<Item = &Layer> {
        let mut all: Vec<_> = self.layers.values().filter(|layer| !self.intents.contains_key(&layer.id)).collect();
        all.sort_by_key(|layer| layer.id);
        all.into_iter()
    }

    fn interrupted(&self) -> Vec<Finding> {
        let mut found = Vec::new();
        for intent in self.intents.values().filter(|intent| intent.interrupted) {
            let doing = match intent.what {
                Intended::Create => "the making",
                Intended::Commit => "the commit",
                Intended::Remove => "the removal",
            };
            let what = format!("{doing} of layer {} was interrupted", intent.layer);
            let follows = match intent.what {
                Intended::Commit => "it cannot be written to",
                _ => "its storage takes space",
            };
            let remedy = "nothing: the next command finishes or undoes it, such as graphdriver info";
            let finding = Finding::leftover(what, remedy).of(intent.layer);
            found.push(Finding { consequence: follows.into(), ..finding });
        }
        found.sort_by_key(|finding| finding.layer);
        found
    }

    fn judge(&self, stored: &Stored) -> Option<Finding> {
        let place = &stored.place;
        match &stored.what {
            StoredAs::Layer { id, .. } | StoredAs::Damaged { id, .. } if !self.has(*id) => {
                Some(Finding::leftover(format!("{place}: there is no layer {id}"), NEXT_RECOVERY))
            }
            // Told already if whoever does something to it is gone.
            StoredAs::Layer { id, .. } | StoredAs::Damaged { id, .. } | StoredAs::Leftover { of: Some(id) }
                if self.intents.contains_key(id) =>
            {
                None
            }
            StoredAs::Layer { id, committed } => self.compare_kinds(&self.layers[id], *committed, place),
            StoredAs::Damaged { id, flaw } => {
                let what = format!("the storage of layer {id} {flaw} ({place})");
                Some(Finding::damage(what, "it cannot be relied on, nor can what lies on it", LOAD_AGAIN).of(*id))
            }
            StoredAs::Leftover { .. } => {
                let what = format!("{place} was left by a command that was interrupted");
                Some(Finding::leftover(what, NEXT_RECOVERY))
            }
            StoredAs::Alien => Some(alien(place)),
        }
    }

    fn compare_kinds(&self, layer: &Layer, committed: bool, place: &str) -> Option<Finding> {
        let id = layer.id;
        match (layer.kind == LayerKind::Committed, committed) {
            (true, false) => {
                let what = format!("layer {id} is committed, and its storage {place} can be written to");
                let follows = "whoever writes there changes all that lies on it";
                let remedy = "graphdriver check --digests tells whether it still is what it was";
                Some(Finding::damage(what, follows, &format!("{remedy}; to mend it, {LOAD_AGAIN}")).of(id))
            }
            (false, true) => {
                let what = format!("layer {id} is {}, and its storage {place} is frozen", layer.kind.phrase());
                let remedy = "commit it again, or remove it";
                Some(Finding::damage(what, "it cannot be written to", remedy).of(id))
            }
            _ => None,
        }
    }

    /// Layers without storage, by their numbers.
    fn lost(&self, stored: &[Stored]) -> Vec<LayerId> {
        let there: HashSet<LayerId> = stored
            .iter()
            .filter_map(|stored| match stored.what {
                StoredAs::Layer { id, .. } | StoredAs::Damaged { id, .. } => Some(id),
                StoredAs::Leftover { .. } | StoredAs::Alien => None,
            })
            .collect();
        // A view on a parent shows that.
        let stores = |layer: &&Layer| layer.kind != LayerKind::View || layer.parent.is_none();
        self.settled().filter(stores).map(|layer| layer.id).filter(|id| !there.contains(id)).collect()
    }
}

fn alien(place: &str) -> Finding {
    let finding = Finding::leftover(format!("{place} is nothing of graphdriver's"), "move it away, or remove it");
    Finding { kind: FindingKind::Alien, consequence: "graphdriver leaves it alone; it takes space".into(), ..finding }
}
