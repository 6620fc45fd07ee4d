//! What rows say of each other.

use super::{Finding, LOAD_AGAIN};
use crate::engine::{find, images::unused_layers, load::chain_of, snapshots::row};
use graphdriver_core::{
    Layer, LayerId, LayerKind, Result,
    store::{self, Layers},
};
use rusqlite::Connection;
use std::collections::HashMap;

pub(super) fn broken_database(line: String) -> Finding {
    let what = format!("the database store.db: {line}");
    let remedy = "stop whatever uses the data root, restore store.db from a backup, or remove this driver's directory \
                  and load again";
    Finding::damage(what, "nothing that it says of layers can be relied on; nothing else was looked at", remedy)
}

pub(super) fn look(db: &Connection) -> Result<Vec<Finding>> {
    let layers: HashMap<LayerId, Layer> = store::list(db)?.into_iter().map(|layer| (layer.id, layer)).collect();
    let mut found = parents(&layers);
    found.extend(images(db, &layers)?);
    let kind = |id: &LayerId| layers.get(id).map(|layer| layer.kind);
    for container in find::containers(db)? {
        if kind(&container.layer) != Some(LayerKind::Active) {
            let what = format!("container {} has layer {}, which is not active", container.name, container.layer);
            found.push(Finding::damage(what, "it cannot be mounted for writing", "remove it").of(container.layer));
        }
    }
    for snapshot in row::all(db)?.into_iter().filter(|snapshot| !layers.contains_key(&snapshot.layer)) {
        let what = format!("snapshot {} has layer {}, which is being removed", snapshot.name, snapshot.layer);
        found.push(Finding::damage(what, "containerd cannot use it", "remove it: ctr snapshots rm").of(snapshot.layer));
    }
    for id in unused_layers(db)? {
        let what = format!("layer {id} is needed by no image, container, snapshot or mount");
        found.push(Finding::leftover(what, super::NEXT_COMMAND).of(id));
    }
    Ok(found)
}

fn parents(layers: &HashMap<LayerId, Layer>) -> Vec<Finding> {
    let mut found = Vec::new();
    for layer in layers.values() {
        let Some(parent) = layer.parent else { continue };
        let why = match layers.get(&parent).map(|parent| parent.kind) {
            Some(LayerKind::Committed) => continue,
            Some(kind) => format!("is {}", kind.phrase()),
            None => "is not there".into(),
        };
        let what = format!("layer {} lies on layer {parent}, which {why}", layer.id);
        found.push(Finding::damage(what, "what it shows may change or be incomplete", LOAD_AGAIN).of(layer.id));
    }
    found.sort_by_key(|finding| finding.layer);
    found
}

fn images(db: &Connection, layers: &HashMap<LayerId, Layer>) -> Result<Vec<Finding>> {
    let damaged = |what: String| Finding::damage(what, "it cannot be saved as it came", "remove it and load it again");
    let images = match find::images(db) {
        Ok(images) => images,
        Err(e) => return Ok(vec![damaged(format!("the configuration of an image cannot be read: {}", e.reason()))]),
    };
    let mut found = Vec::new();
    for image in images {
        let short = image.id.short();
        if image.config.id() != image.id {
            found.push(damaged(format!("the configuration of image {short} is not the one that has this digest")));
        }
        let chain = chain_of(db, image.top)?;
        let known = chain.iter().rev().map(|id| layers.get(id).and_then(|layer| layer.diff_id));
        let told = image.config.diff_ids().iter().map(|diff| Some(*diff));
        if !known.eq(told) {
            found.push(damaged(format!("the layers of image {short} are not those that its configuration names")));
        }
    }
    Ok(found)
}

/// Sessions that nobody cleaned up after.
pub(super) fn sessions(layers: &Layers) -> Result<Vec<Finding>> {
    let left = layers.left_behind()?.into_iter().map(|path| {
        let what = format!("{} is of a command that was killed", path.display());
        Finding::leftover(what, super::NEXT_COMMAND)
    });
    Ok(left.collect())
}
