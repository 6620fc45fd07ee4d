//! From an image archive to committed layers.

use super::{Engine, events, now};
use crate::{
    image::{
        Reference,
        archive::{Archive, ArchivedImage, ArchivedLayer, HashReader, pipelined},
    },
    progress::Metered,
};
use graphdriver_core::{
    Access, ChainId, Context, DiffDir, DiffId, Digest, Error, ErrorKind, LayerId, LayerOptions, Result, Root, mount,
    open_lock,
    store::{self, CommitInfo, LayerKind, NewLayer},
    tar::{self, Unpacked, Whiteouts},
};
use rusqlite::{OptionalExtension, Transaction, params};
use serde::Serialize;
use std::{
    collections::{HashMap, HashSet},
    io::Read,
    path::Path,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

/// One image that a load brought.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Loaded {
    /// Its id.
    pub id: Digest,
    /// The names it now has from the archive.
    pub names: Vec<Reference>,
    /// Layers it is made of.
    pub layers: usize,
    /// How many of them were not in the store before.
    pub new_layers: usize,
}

/// A layer some image of the archive needs.
struct Wanted<'a> {
    chain: ChainId,
    diff: DiffId,
    parent: Option<ChainId>,
    source: &'a ArchivedLayer,
}

/// Buffers between the thread that reads and decompresses a layer and the one that hashes and unpacks it.
const READ_AHEAD: usize = 4;

/// Layers unpacked at a time: disks gain nothing from more, and each takes the memory of its decompression.
const MAX_WORKERS: usize = 4;

type Ready<'e> = HashMap<ChainId, Unpacking<'e>>;

/// A layer that is unpacked and that nobody sees yet.
pub(super) struct Unpacking<'e> {
    pub layer: NewLayer<'e>,
    pub diff: DiffId,
    unpacked: Unpacked,
}

impl Engine {
    /// Loads every image of the archive. All of it becomes visible in one transaction, after every layer is durable and
    /// every digest has agreed; when anything is wrong nothing is left behind.
    pub fn load(&self, archive: &Archive) -> Result<Vec<Loaded>> {
        let images = archive.images()?;
        let wanted = wanted(&images);
        let _turn = self.load_turn()?;
        let mut ready = Ready::new();
        // Another process may remove an image, and with it a layer counted on, until the last transaction has seen it.
        for _ in 0..3 {
            let missing = self.missing(&wanted, &ready)?;
            self.unpack_missing(&wanted, &missing, &mut ready)?;
            if let Some(loaded) = self.layers.store().write(|tx| adopt(tx, &images, &wanted, &ready))? {
                return Ok(loaded);
            }
        }
        Err(Error::new(
            ErrorKind::Busy,
            "the image's layers are being removed by somebody else as fast as they are loaded",
        )
        .hint("try again"))
    }

    /// Where a layer lies on its parent's storage it cannot be given to another parent at the end, so loads take turns.
    fn load_turn(&self) -> Result<Option<std::fs::File>> {
        if self.layers.driver().capabilities().independent_layers {
            return Ok(None);
        }
        let path = self.layers.dir().join("load.lock");
        let lock = open_lock(&path)?;
        lock.lock().doing(|| "waiting for another load".to_string())?;
        Ok(Some(lock))
    }

    fn missing(&self, wanted: &[Wanted<'_>], ready: &Ready<'_>) -> Result<Vec<usize>> {
        self.layers.store().read(|db| {
            let mut missing = Vec::new();
            for (at, want) in wanted.iter().enumerate() {
                if !ready.contains_key(&want.chain) && store::by_chain(db, want.chain)?.is_none() {
                    missing.push(at);
                }
            }
            Ok(missing)
        })
    }

    fn unpack_missing<'e>(&'e self, wanted: &[Wanted<'_>], missing: &[usize], ready: &mut Ready<'e>) -> Result<()> {
        if !self.layers.driver().capabilities().independent_layers {
            for &at in missing {
                let parent = match wanted[at].parent {
                    None => None,
                    Some(chain) => match self.parent_of(chain, ready)? {
                        // Gone meanwhile: the next round unpacks it first.
                        None => break,
                        there => there,
                    },
                };
                let layer = self.unpack_wanted(&wanted[at], parent)?;
                self.freeze(&layer, &[])?;
                ready.insert(wanted[at].chain, layer);
            }
            return Ok(());
        }
        let workers = std::thread::available_parallelism().map_or(1, |n| n.get()).min(MAX_WORKERS).min(missing.len());
        let next = AtomicUsize::new(0);
        let done = Mutex::new(Vec::new());
        let failed = Mutex::new(None::<Error>);
        std::thread::scope(|scope| {
            for _ in 0..workers {
                scope.spawn(|| {
                    while failed.lock().expect("no panic holds it").is_none() {
                        let Some(&at) = missing.get(next.fetch_add(1, Ordering::Relaxed)) else { break };
                        match self.unpack_wanted(&wanted[at], None) {
                            Ok(layer) => done.lock().expect("no panic holds it").push((wanted[at].chain, layer)),
                            Err(e) => drop(failed.lock().expect("no panic holds it").get_or_insert(e)),
                        }
                    }
                });
            }
        });
        if let Some(e) = failed.into_inner().expect("the threads are gone") {
            return Err(e);
        }
        ready.extend(done.into_inner().expect("the threads are gone"));
        // Parents first: a directory that several layers in a row only imply comes from the lowest.
        for (n, &at) in missing.iter().enumerate() {
            if !self.freeze_on_parents(&wanted[at], wanted, ready)? {
                // The next round unpacks them again, together with what they lie on.
                missing[n..].iter().for_each(|&later| drop(ready.remove(&wanted[later].chain)));
                break;
            }
        }
        Ok(())
    }

    /// Freezes a layer that was unpacked without knowing its parents; false if one of them was removed meanwhile.
    fn freeze_on_parents(&self, want: &Wanted<'_>, wanted: &[Wanted<'_>], ready: &Ready<'_>) -> Result<bool> {
        let Some(below) = self.below(want, wanted, ready)? else { return Ok(false) };
        let frozen = self.freeze(&ready[&want.chain], &below).doing(|| format!("loading layer {}", want.diff));
        // Whatever came of it: it may have seen a parent half removed.
        if self.below(want, wanted, ready)?.as_ref() != Some(&below) {
            return Ok(false);
        }
        frozen.map(|()| true)
    }

    /// The layers below, topmost first; none if one of them is gone.
    fn below(&self, want: &Wanted<'_>, wanted: &[Wanted<'_>], ready: &Ready<'_>) -> Result<Option<Vec<LayerId>>> {
        let mut ids = Vec::new();
        let mut next = want.parent;
        while let Some(chain) = next {
            match ready.get(&chain) {
                Some(parent) => ids.push(parent.layer.id()),
                None => {
                    let there = self
                        .layers
                        .store()
                        .read(|db| store::by_chain(db, chain)?.map(|there| store::chain(db, there)).transpose())?;
                    return Ok(there.map(|there| [ids, there].concat()));
                }
            }
            next = wanted.iter().find(|w| w.chain == chain).and_then(|w| w.parent);
        }
        Ok(Some(ids))
    }

    fn parent_of(&self, parent: ChainId, ready: &Ready<'_>) -> Result<Option<LayerId>> {
        if let Some(layer) = ready.get(&parent) {
            return Ok(Some(layer.layer.id()));
        }
        self.layers.store().read(|db| store::by_chain(db, parent))
    }

    fn unpack_wanted(&self, want: &Wanted<'_>, parent: Option<LayerId>) -> Result<Unpacking<'_>> {
        let doing = || format!("loading layer {}", want.diff);
        let short = want.diff.0.short();
        tracing::debug!(diff = %want.diff, source = ?want.source, "unpacking");
        let mut stream = want.source.open().doing(doing)?;
        let (stored, size) = (stream.progress(), Some(want.source.size));
        let tar = Metered::new(pipelined(stream, READ_AHEAD)?, &short, size, &*self.progress, &self.cancel);
        let layer = self.unpack_layer(tar.counted_by(stored), parent).doing(doing)?;
        if layer.diff != want.diff {
            return Err(Error::new(ErrorKind::Corrupt, format!("its content has the digest {}", layer.diff))
                .hint("the archive is damaged or was tampered with; get it again")
                .doing(doing()));
        }
        Ok(layer)
    }

    /// Unpacks one layer tar into a new layer.
    pub(super) fn unpack_layer(&self, tar: impl Read, parent: Option<LayerId>) -> Result<Unpacking<'_>> {
        let layer = self.layers.create(LayerKind::Active, parent, &LayerOptions::default())?;
        let mut hashed = HashReader::new(tar);
        let unpacked = self.unpack_into(&mut hashed, &layer)?;
        tracing::debug!(layer = %layer.id(), entries = unpacked.entries, bytes = unpacked.tar_bytes, "unpacked");
        Ok(Unpacking { layer, diff: DiffId(hashed.digest()), unpacked })
    }

    /// Completes the layer from what is `below` it, topmost first, and commits it: from here on it is durable.
    pub(super) fn freeze(&self, new: &Unpacking<'_>, below: &[LayerId]) -> Result<()> {
        if let (Some(diff), [parent, grandparents @ ..], false) =
            (new.layer.diff_dir(), below, new.unpacked.implied.is_empty())
        {
            let recipe = self.layers.driver().mount(*parent, grandparents, Access::ReadOnly)?;
            let lower = Root::from_fd(mount::detached(&recipe)?);
            tar::inherit(&Root::open(&diff.path)?, style(&diff), &lower, &new.unpacked.implied)?;
        }
        new.layer.commit(&CommitInfo { diff_id: Some(new.diff), tar_size: Some(new.unpacked.tar_bytes) })
    }

    fn unpack_into(&self, tar: &mut dyn Read, layer: &NewLayer<'_>) -> Result<Unpacked> {
        let record = layer.record_dir();
        let records = record.parent().expect("it lies in the store");
        std::fs::create_dir_all(records).doing(|| format!("making {}", records.display()))?;
        let unpacked = match layer.diff_dir() {
            Some(diff) => tar::unpack(tar, &Root::open(&diff.path)?, style(&diff), Some(&record))?,
            None => {
                let recipe = self.layers.mount(layer.id(), Access::ReadWrite)?;
                let root = Root::from_fd(mount::detached(&recipe)?);
                let unpacked = tar::unpack(tar, &root, Whiteouts::Merged, Some(&record))?;
                // Whether all of it found room is told to those who have the filesystem mounted while it is written back,
                // and to nobody afterwards.
                rustix::fs::syncfs(root.open_dir(Path::new(""))?).doing(|| "writing the layer to its storage")?;
                unpacked
            }
        };
        // The record itself is durable; this makes its name so, wherever the driver keeps its own data.
        std::fs::File::open(records)?.sync_all().doing(|| format!("syncing {}", records.display()))?;
        Ok(unpacked)
    }
}

fn style(diff: &DiffDir) -> Whiteouts {
    Whiteouts::Overlay { xattrs: diff.xattrs, escape: diff.escape }
}

/// Every layer the images need, parents first, each chain once.
fn wanted(images: &[ArchivedImage]) -> Vec<Wanted<'_>> {
    let mut seen = HashSet::new();
    let mut all = Vec::new();
    for image in images {
        let mut parent = None;
        for (diff, source) in image.config.diff_ids().iter().zip(&image.layers) {
            let chain = ChainId::extend(parent, *diff);
            if seen.insert(chain) {
                all.push(Wanted { chain, diff: *diff, parent, source });
            }
            parent = Some(chain);
        }
    }
    all
}

/// The one transaction that makes everything visible; none if a layer counted on is gone.
fn adopt(
    tx: &Transaction<'_>,
    images: &[ArchivedImage],
    wanted: &[Wanted<'_>],
    ready: &Ready<'_>,
) -> Result<Option<Vec<Loaded>>> {
    let mut ids = HashMap::new();
    let mut new = HashSet::new();
    for want in wanted {
        let parent = want.parent.map(|parent| ids[&parent]);
        let id = match (store::by_chain(tx, want.chain)?, ready.get(&want.chain)) {
            (Some(there), _) => there,
            (None, Some(new_one)) => {
                new_one.layer.keep(tx, parent)?;
                new.insert(want.chain);
                new_one.layer.id()
            }
            (None, None) => return Ok(None),
        };
        ids.insert(want.chain, id);
    }
    images.iter().map(|image| adopt_image(tx, image, &ids, &new)).collect::<Result<_>>().map(Some)
}

fn adopt_image(
    tx: &Transaction<'_>,
    image: &ArchivedImage,
    ids: &HashMap<ChainId, LayerId>,
    new: &HashSet<ChainId>,
) -> Result<Loaded> {
    let diff_ids = image.config.diff_ids();
    let top = ChainId::of(diff_ids).map(|chain| ids[&chain]);
    let id = image.config.id();
    insert_image(tx, image.config.raw(), &id, top, None, image.manifest_digest)?;
    events::record(tx, "image", "load", &id.to_string(), &[("name", &first_name(&image.names))])?;
    for name in image.names.iter().filter(|name| name.digest().is_none()) {
        set_tag(tx, name, &id)?;
    }
    let chains = (1..=diff_ids.len()).filter_map(|n| ChainId::of(&diff_ids[..n]));
    Ok(Loaded {
        id,
        names: image.names.clone(),
        layers: diff_ids.len(),
        new_layers: chains.filter(|chain| new.contains(chain)).count(),
    })
}

fn first_name(names: &[Reference]) -> String {
    names.first().map(Reference::to_string).unwrap_or_default()
}

/// Adds the image unless it is there.
pub(super) fn insert_image(
    tx: &Transaction<'_>,
    raw: &[u8],
    id: &Digest,
    top: Option<LayerId>,
    parent: Option<Digest>,
    manifest: Option<Digest>,
) -> Result<()> {
    tx.execute(
        "INSERT INTO images (id, config, top, parent, manifest, added) VALUES (?, ?, ?, ?, ?, ?)
         ON CONFLICT (id) DO UPDATE SET manifest = coalesce(excluded.manifest, manifest)",
        params![id, raw, top, parent, manifest, now()],
    )?;
    Ok(())
}

/// Makes `name` stand for the image, whatever it stood for.
pub(super) fn set_tag(tx: &Transaction<'_>, name: &Reference, image: &Digest) -> Result<()> {
    if name.digest().is_some() {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            format!("{name} is a digest, which nobody can give to an image"),
        )
        .hint("write NAME:TAG"));
    }
    let name = name.to_string();
    let old: Option<Digest> =
        tx.query_row("SELECT image FROM tags WHERE name = ?", [&name], |r| r.get(0)).optional()?;
    if old.as_ref() == Some(image) {
        return Ok(());
    }
    tx.execute(
        "INSERT INTO tags (name, image) VALUES (?1, ?2) ON CONFLICT (name) DO UPDATE SET image = ?2",
        params![name, image],
    )?;
    events::record(tx, "image", "tag", &image.to_string(), &[("name", &name)])
}

/// What an image takes: its layers' storage, parents included.
pub(super) fn chain_of(db: &rusqlite::Connection, top: Option<LayerId>) -> Result<Vec<LayerId>> {
    let Some(top) = top else { return Ok(Vec::new()) };
    store::chain(db, top)
}
