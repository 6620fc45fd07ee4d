//! What the driver remembers: `HOME/pool.json`.
//!
//! The file is replaced as a whole, written beside and renamed, so that it is always one state or the next. It and the
//! pool's own transaction number agree as told at [`State::transaction`].

use crate::{options::Fs, step};
use graphdriver_core::{Context, Error, ErrorKind, LayerId, Result, Usage};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    fmt,
    fs::File,
    io::Write,
    path::{Path, PathBuf},
};

/// The format this program writes; a newer one is refused.
const VERSION: u32 = 1;

/// Thin devices have numbers of 24 bits (kernel `thin-provisioning.rst`, "create_thin").
const THIN_IDS: u32 = 1 << 24;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct State {
    pub version: u32,
    /// Eight hexadecimal digits in the names of all devices of this pool.
    pub id: String,
    pub storage: Storage,
    /// Whether the disk it is on is being divided: nothing is known to be there yet, and it may be done anew.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub dividing: bool,
    /// The pool's block size in bytes.
    pub block: u64,
    /// The pool's transaction number when everything here is true. With an intent the pool's may be one more.
    pub transaction: u64,
    /// The number to try next for a thin device.
    pub next: u32,
    /// The thin device that is being made or deleted: what is not known to have been made, or to be there still. Whoever
    /// finds it deletes it.
    pub intent: Option<u32>,
    /// A formatted, empty device, of which layers without parents are snapshots.
    pub base: Option<Base>,
    pub layers: BTreeMap<LayerId, Layer>,
}

/// What the pool is made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Storage {
    /// `HOME/data` and `HOME/metadata`.
    Loop { data: u64, metadata: u64 },
    /// Two block devices.
    Devices { data: PathBuf, metadata: PathBuf },
    /// One block device: a header of 1 MiB, metadata, data. Sizes in bytes.
    Direct {
        device: PathBuf,
        metadata: u64,
        data: u64,
        /// The percent of data and metadata that it was divided by.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        shares: Option<(u64, u64)>,
    },
    /// Somebody else's pool.
    Given { name: String },
}

impl fmt::Display for Storage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Storage::Loop { .. } => f.write_str("loop files"),
            Storage::Devices { data, metadata } => write!(f, "{} and {}", data.display(), metadata.display()),
            Storage::Direct { device, .. } => device.display().fmt(f),
            Storage::Given { name } => write!(f, "pool {name}"),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Base {
    pub thin: u32,
    pub size: u64,
    pub fs: Fs,
    /// The arguments mkfs was given.
    pub mkfs: Vec<String>,
    /// Inodes of the empty filesystem, its root and the filesystem's own among them.
    pub inodes: u64,
    /// Whether it has been formatted.
    pub ready: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Layer {
    pub thin: u32,
    /// Of the device, in bytes.
    pub size: u64,
    pub fs: Fs,
    pub parent: Option<LayerId>,
    pub phase: Phase,
    /// Whether its device has been writable, so that its log may have to be replayed.
    #[serde(default)]
    pub written: bool,
    /// Whether the filesystem is still to be made as large as the device.
    #[serde(default)]
    pub grow: bool,
    /// Inodes in use before anything was written to it.
    pub inodes: u64,
    /// Whether a commit found the pool full, so that it may lack what was written to it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub lacking: bool,
    /// As it was when the layer was committed.
    #[serde(default)]
    pub usage: Option<Size>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Size {
    pub bytes: u64,
    pub inodes: u64,
    /// Inodes in use by the whole filesystem.
    pub all_inodes: u64,
}

impl From<Size> for Usage {
    fn from(size: Size) -> Usage {
        Usage { bytes: size.bytes, inodes: size.inodes }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Phase {
    /// Its device is there, but nobody may see the layer.
    Making,
    Active,
    Committed,
    /// Its device is to be deleted as soon as nobody holds it.
    Removing,
}

impl State {
    pub(crate) fn new(id: String, storage: Storage, block: u64, transaction: u64) -> State {
        let layers = BTreeMap::new();
        let (version, dividing, next, intent, base) = (VERSION, false, 1, None, None);
        State { version, id, storage, dividing, block, transaction, next, intent, base, layers }
    }

    /// None if there is no pool yet.
    pub(crate) fn load(home: &Path) -> Result<Option<State>> {
        let path = path(home);
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e).doing(|| format!("reading {}", path.display())),
        };
        Self::parse(&text).map(Some).map_err(|e| e.doing(format!("reading {}", path.display())))
    }

    pub(crate) fn parse(text: &[u8]) -> Result<State> {
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        let damaged = |e: serde_json::Error| Error::new(ErrorKind::Corrupt, format!("it is damaged: {e}"));
        let Version { version } = serde_json::from_slice(text).map_err(damaged)?;
        if version > VERSION {
            let why = format!("it has format {version}, and this graphdriver knows {VERSION}");
            return Err(Error::new(ErrorKind::Unsupported, why).hint("use a newer graphdriver"));
        }
        serde_json::from_slice(text).map_err(damaged)
    }

    /// Durable when this returns.
    pub(crate) fn save(&self, home: &Path) -> Result<()> {
        step()?;
        let doing = || format!("writing {}", path(home).display());
        let text = serde_json::to_vec(self).expect("it has nothing that JSON lacks");
        let beside = home.join("pool.json.new");
        let mut file = File::create(&beside).doing(doing)?;
        file.write_all(&text).and_then(|()| file.sync_all()).doing(doing)?;
        step()?;
        std::fs::rename(&beside, path(home)).doing(doing)?;
        File::open(home).and_then(|dir| dir.sync_all()).doing(doing)?;
        step()
    }

    /// A number no thin device of ours has.
    pub(crate) fn free_thin(&mut self) -> u32 {
        let taken = |state: &State, thin| {
            state.layers.values().any(|layer| layer.thin == thin)
                || state.base.as_ref().is_some_and(|base| base.thin == thin)
        };
        loop {
            let thin = self.next;
            self.next = (self.next + 1) % THIN_IDS;
            if !taken(self, thin) {
                return thin;
            }
        }
    }

    /// The layer, if anybody may see it.
    pub(crate) fn visible(&self, id: LayerId) -> Result<&Layer> {
        let layer = self.layers.get(&id).filter(|layer| matches!(layer.phase, Phase::Active | Phase::Committed));
        layer.ok_or_else(|| Error::new(ErrorKind::NotFound, format!("there is no layer {id}")))
    }

    /// The layer in the file, which its caller has just seen in it.
    pub(crate) fn layer_mut(&mut self, id: LayerId) -> Result<&mut Layer> {
        let gone = || Error::new(ErrorKind::NotFound, format!("layer {id} was removed meanwhile"));
        self.layers.get_mut(&id).ok_or_else(gone)
    }

    pub(crate) fn pool_name(&self) -> String {
        match &self.storage {
            Storage::Given { name } => name.clone(),
            _ => format!("{}pool", self.prefix()),
        }
    }

    /// How the names of all our devices begin.
    pub(crate) fn prefix(&self) -> String {
        format!("graphdriver-{}-", self.id)
    }

    pub(crate) fn device_name(&self, id: LayerId) -> String {
        format!("{}{id}", self.prefix())
    }
}

fn path(home: &Path) -> PathBuf {
    home.join("pool.json")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> State {
        let mut state = State::new("0123abcd".into(), Storage::Loop { data: 1 << 30, metadata: 1 << 24 }, 65536, 7);
        state.next = 3;
        let mkfs = vec!["-K".into()];
        state.base = Some(Base { thin: 1, size: 1 << 29, fs: Fs::Xfs, mkfs, inodes: 3, ready: true });
        let usage = Some(Size { bytes: 65536, inodes: 1, all_inodes: 4 });
        let layer = Layer {
            thin: 2,
            size: 1 << 29,
            fs: Fs::Xfs,
            parent: None,
            phase: Phase::Committed,
            written: true,
            grow: false,
            inodes: 3,
            lacking: false,
            usage,
        };
        state.layers.insert(LayerId(1), layer);
        state
    }

    /// A file as version 1 has written it. It must be read for ever.
    const SAMPLE: &str = r#"{"version":1,"id":"0123abcd","storage":{"loop":{"data":1073741824,"metadata":16777216}},"block":65536,"transaction":7,"next":3,"intent":null,"base":{"thin":1,"size":536870912,"fs":"xfs","mkfs":["-K"],"inodes":3,"ready":true},"layers":{"1":{"thin":2,"size":536870912,"fs":"xfs","parent":null,"phase":"committed","written":true,"grow":false,"inodes":3,"usage":{"bytes":65536,"inodes":1,"all_inodes":4}}}}"#;

    #[test]
    fn the_format_stays_and_a_newer_one_is_refused() {
        assert_eq!(State::parse(SAMPLE.as_bytes()).unwrap(), sample());
        assert_eq!(serde_json::to_string(&sample()).unwrap(), SAMPLE);
        let newer = SAMPLE.replace("\"version\":1", "\"version\":2");
        assert_eq!(State::parse(newer.as_bytes()).unwrap_err().kind(), ErrorKind::Unsupported);
        for cut in [0, 1, 20, SAMPLE.len() - 1] {
            assert_eq!(State::parse(&SAMPLE.as_bytes()[..cut]).unwrap_err().kind(), ErrorKind::Corrupt, "{cut}");
        }
    }

    #[test]
    fn saved_is_loaded_again() {
        let home = tempfile::tempdir().unwrap();
        assert_eq!(State::load(home.path()).unwrap(), None);
        sample().save(home.path()).unwrap();
        assert_eq!(State::load(home.path()).unwrap(), Some(sample()));
        assert_eq!(std::fs::read_dir(home.path()).unwrap().count(), 1);
    }

    #[test]
    fn numbers_of_thin_devices_wrap_and_skip_those_in_use() {
        let mut state = sample();
        state.next = THIN_IDS - 1;
        assert_eq!(state.free_thin(), THIN_IDS - 1);
        assert_eq!([state.free_thin(), state.free_thin()], [0, 3]);
    }
}
