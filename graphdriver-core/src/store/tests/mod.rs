//! The store's logic, with a driver that makes a plain directory per layer.

mod database;
mod killed;
mod lifecycle;
mod plain_map;
mod sessions;

use super::*;
use crate::{
    Access, ByteSize, Capabilities, CopyUnit, DiffId, Digest, ErrorKind as K, GraphDriver, LayerId, LayerOptions,
    Mount, Reclaimed, Stored, StoredAs, Usage, WriteStrategy,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::PathBuf,
    sync::Arc,
};

/// Called before and after each step of the driver with its name.
type Hook = Arc<dyn Fn(&str) -> Result<()> + Send + Sync>;

struct DirDriver {
    home: PathBuf,
    hook: Hook,
    capabilities: Capabilities,
}

impl DirDriver {
    fn boxed(dir: &Path, hook: Hook) -> Box<DirDriver> {
        let capabilities = Capabilities {
            write_strategy: WriteStrategy::CopyUp { unit: CopyUnit::File },
            quota: false,
            inode_quota: false,
            native_diff: false,
            idmapped_mounts: false,
            independent_layers: true,
            max_depth: 3,
        };
        Box::new(DirDriver { home: dir.join("data"), hook, capabilities })
    }

    fn layer(&self, id: LayerId) -> PathBuf {
        self.home.join(id.to_string())
    }
}

impl GraphDriver for DirDriver {
    fn name(&self) -> &'static str {
        "dir"
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn create(&self, id: LayerId, _: &[LayerId], _: &LayerOptions) -> Result<()> {
        (self.hook)("create")?;
        fs::create_dir_all(&self.home)?;
        fs::create_dir(self.layer(id))?;
        fs::write(self.layer(id).join("file"), "content")?;
        (self.hook)("created")
    }

    fn commit(&self, id: LayerId) -> Result<()> {
        (self.hook)("commit")?;
        fs::write(self.layer(id).join("frozen"), "")?;
        (self.hook)("committed")
    }

    fn thaw(&self, id: LayerId) -> Result<()> {
        (self.hook)("thaw")?;
        session::absent_is_fine(fs::remove_file(self.layer(id).join("frozen")))
    }

    fn mount(&self, id: LayerId, parents: &[LayerId], access: Access) -> Result<Vec<Mount>> {
        if access == Access::ReadWrite && self.layer(id).join("frozen").exists() {
            return Err(Error::new(K::InvalidInput, "it is committed"));
        }
        let options = parents.iter().map(LayerId::to_string).collect();
        Ok(vec![Mount { fstype: "bind".into(), source: self.layer(id), options }])
    }

    fn usage(&self, id: LayerId) -> Result<Usage> {
        (self.hook)("usage")?;
        Ok(Usage { bytes: 7, inodes: fs::read_dir(self.layer(id))?.count() as u64 })
    }

    fn remove(&self, id: LayerId) -> Result<()> {
        (self.hook)("remove")?;
        session::absent_is_fine(fs::remove_dir_all(self.layer(id)))?;
        (self.hook)("removed")
    }

    fn reclaim(&self, known: &dyn Fn(LayerId) -> bool) -> Result<Reclaimed> {
        (self.hook)("reclaim")?;
        let mut reclaimed = Reclaimed::default();
        for id in numbers_in(&self.home) {
            if !known(id) {
                fs::remove_dir_all(self.layer(id))?;
                reclaimed.layers += 1;
            }
        }
        Ok(reclaimed)
    }

    fn inventory(&self) -> Result<Vec<Stored>> {
        let stored = |id| Stored {
            place: self.layer(id).display().to_string(),
            what: StoredAs::Layer { id, committed: self.layer(id).join("frozen").exists() },
        };
        Ok(numbers_in(&self.home).into_iter().map(stored).collect())
    }
}

fn open(dir: &Path) -> Layers {
    hooked(dir, Arc::new(|_| Ok(())))
}

fn hooked(dir: &Path, hook: Hook) -> Layers {
    Layers::open(dir, DirDriver::boxed(dir, hook), &[]).unwrap()
}

/// A hook that fails at one step.
fn failing(step: &'static str, kind: K) -> Hook {
    Arc::new(move |now| if now == step { Err(Error::new(kind, "made to fail")) } else { Ok(()) })
}

fn numbers_in(dir: &Path) -> BTreeSet<LayerId> {
    names_in(dir).iter().map(|name| name.parse().unwrap()).collect()
}

fn names_in(dir: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

fn info(seed: &str) -> CommitInfo {
    CommitInfo { diff_id: Some(diff(seed)), tar_size: Some(seed.len() as u64) }
}

fn diff(seed: &str) -> DiffId {
    DiffId(Digest::of(seed))
}

fn labelled(name: &str) -> BTreeMap<String, String> {
    BTreeMap::from([("name".into(), name.into())])
}

/// Makes a layer all the way.
fn make(layers: &Layers, name: &str, parent: Option<LayerId>, committed: bool) -> LayerId {
    let new = layers.create(LayerKind::Active, parent, &LayerOptions::default()).unwrap();
    fs::create_dir_all(new.record_dir()).unwrap();
    fs::write(new.record_dir().join("headers"), name).unwrap();
    if committed {
        new.commit(&info(name)).unwrap();
    }
    keep(layers, &new, None, name).unwrap();
    new.id()
}

fn keep(layers: &Layers, new: &NewLayer<'_>, parent: Option<LayerId>, name: &str) -> Result<()> {
    layers.store().write(|tx| {
        new.keep(tx, parent)?;
        set_labels(tx, new.id(), &labelled(name))
    })
}

fn remove(layers: &Layers, id: LayerId) -> Result<u64> {
    layers.store().write(|tx| layers.remove_in(tx, id))?;
    layers.sweep()
}

fn names(layers: &Layers) -> Vec<String> {
    layers.list().unwrap().into_iter().map(|mut layer| layer.labels.remove("name").unwrap_or_default()).collect()
}

/// On disk is what the store lists and nothing else, but for views on parents, and nobody is doing anything.
fn assert_clean(layers: &Layers) {
    let all = layers.list().unwrap();
    let listed: BTreeSet<LayerId> = all.iter().map(|layer| layer.id).collect();
    let stored = all.iter().filter(|layer| layer.kind != LayerKind::View || layer.parent.is_none());
    assert_eq!(numbers_in(&layers.dir().join("data")), stored.map(|layer| layer.id).collect());
    assert!(numbers_in(&layers.dir().join("records")).is_subset(&listed));
    let sql = "SELECT (SELECT count(*) FROM layers), (SELECT count(*) FROM layer_intents)";
    let counts = |conn: &Connection| Ok(conn.query_row(sql, [], |row| Ok((row.get(0)?, row.get(1)?)))?);
    assert_eq!(layers.store().read(counts).unwrap(), (listed.len() as i64, 0));
}

fn kind_of<T>(result: Result<T>) -> K {
    result.err().expect("an error").kind()
}
