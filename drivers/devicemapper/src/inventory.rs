//! What there is in the pool and in the data directory, looked at and left alone.

use crate::{
    layers::Layers,
    metadata::Metadata,
    state::{Layer, Phase, State},
};
use graphdriver_core::{Context, LayerId, Result, Stored, StoredAs, mount::MountInfo};
use std::collections::BTreeSet;

/// What is in the data directory: see the crate's documentation.
const OWN: [&str; 7] = ["pool.json", "pool.json.new", "pool.lock", "uses.lock", "data", "metadata", "lost+found"];

impl Layers {
    /// See [`GraphDriver::inventory`](graphdriver_core::GraphDriver::inventory).
    pub(crate) fn inventory(&self) -> Result<Vec<Stored>> {
        let (state, thin) = {
            let mut turn = self.pool.turn()?;
            let thin = turn.with_metadata(|metadata: &Metadata| Ok(metadata.thin_devices()))?;
            (turn.state.clone(), thin.into_iter().collect::<BTreeSet<u64>>())
        };
        let mut found = compare(&state, &thin);
        let home = &self.pool.home;
        for entry in std::fs::read_dir(home).doing(|| format!("reading {}", home.display()))? {
            let entry = entry?;
            if !OWN.iter().any(|own| entry.file_name() == *own) {
                found.push(Stored { place: entry.path().display().to_string(), what: StoredAs::Alien });
            }
        }
        Ok(found)
    }

    /// The layer of this pool whose device is mounted there, by whatever name of the device.
    pub(crate) fn shown_by(&self, mount: &MountInfo) -> Option<LayerId> {
        let (major, minor) = mount.dev;
        let name = std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/dm/name")).ok()?;
        let name = Some(name.trim_end()).filter(|name| name.starts_with("graphdriver-"))?;
        name.strip_prefix(&self.pool.look().ok()?.prefix())?.parse().ok()
    }
}

/// What is known of layers, and the thin devices in the pool.
fn compare(state: &State, thin: &BTreeSet<u64>) -> Vec<Stored> {
    let place = |thin: u64| format!("thin device {thin} in pool {}", state.pool_name());
    let layers = state.layers.iter().map(|(id, layer)| Stored {
        place: place(layer.thin.into()),
        what: look_at(*id, layer, thin.contains(&layer.thin.into())),
    });
    let known: BTreeSet<u64> = state.layers.values().map(|layer| layer.thin.into()).collect();
    let base = state.base.as_ref().map(|base| base.thin.into());
    let intent = state.intent.map(u64::from);
    let others = thin.iter().copied().filter(|thin| !known.contains(thin) && base != Some(*thin)).map(|thin| Stored {
        place: place(thin),
        what: if intent == Some(thin) { StoredAs::Leftover { of: None } } else { StoredAs::Alien },
    });
    layers.chain(others).collect()
}

fn look_at(id: LayerId, layer: &Layer, there: bool) -> StoredAs {
    match layer.phase {
        Phase::Making | Phase::Removing => StoredAs::Leftover { of: Some(id) },
        _ if !there => StoredAs::Damaged { id, flaw: "is not in the pool".into() },
        _ if layer.lacking => {
            StoredAs::Damaged { id, flaw: "was written to when the pool was full, and may lack some of that".into() }
        }
        phase => StoredAs::Layer { id, committed: phase == Phase::Committed },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{options::Fs, state::Storage};

    #[test]
    fn thin_devices_and_layers_are_compared() {
        let storage = Storage::Given { name: "p".into() };
        let mut state = State::new("0123abcd".into(), storage, 65536, 1);
        let layer = |thin, phase, lacking| {
            let (size, fs, parent, written, grow, inodes, usage) = (1, Fs::Xfs, None, true, false, 1, None);
            Layer { thin, size, fs, parent, phase, written, grow, inodes, lacking, usage }
        };
        for (id, phase, lacking) in [
            (1, Phase::Committed, false),
            (2, Phase::Active, false),
            (3, Phase::Active, false),
            (4, Phase::Removing, false),
            (5, Phase::Active, true),
        ] {
            state.layers.insert(LayerId(id), layer(id as u32, phase, lacking));
        }
        state.intent = Some(6);
        let found = compare(&state, &BTreeSet::from([1, 2, 4, 5, 6, 7]));
        let what: Vec<_> = found.iter().map(|stored| stored.what.clone()).collect();
        let whole = |id, committed| StoredAs::Layer { id: LayerId(id), committed };
        assert_eq!(what[..2], [whole(1, true), whole(2, false)]);
        assert!(matches!(&what[2], StoredAs::Damaged { id: LayerId(3), flaw } if flaw.contains("not in the pool")));
        assert_eq!(what[3], StoredAs::Leftover { of: Some(LayerId(4)) });
        assert!(matches!(&what[4], StoredAs::Damaged { id: LayerId(5), .. }));
        assert_eq!(what[5..], [StoredAs::Leftover { of: None }, StoredAs::Alien]);
        assert_eq!(found[6].place, "thin device 7 in pool p");
    }
}
