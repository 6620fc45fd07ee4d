//! Finding what containerd has mounted: it tells nobody, but the kernel does.

use super::{super::Engine, idmapped};
use graphdriver_core::{
    LayerId, Mount,
    mount::{self, MountInfo},
};
use std::{
    collections::{HashMap, HashSet},
    ffi::OsStr,
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::{Path, PathBuf},
};

/// The source of mounts whose type takes any word for it: `graphdriver:DIR:LAYER`, DIR being the store's.
pub(in crate::engine) struct Mark(String);

impl Mark {
    pub(in crate::engine) fn of(engine: &Engine) -> Mark {
        Mark(format!("graphdriver:{}:", engine.layers.dir().display()))
    }

    /// Other types' sources are devices or directories.
    pub(super) fn put(&self, layer: LayerId, recipe: &mut [Mount]) {
        for step in recipe {
            if step.fstype == "overlay" || step.fstype.starts_with("fuse.") {
                step.source = format!("{}{layer}", self.0).into();
            }
        }
    }

    fn layer(&self, source: &OsStr) -> Option<LayerId> {
        source.as_bytes().strip_prefix(self.0.as_bytes()).and_then(|id| std::str::from_utf8(id).ok()?.parse().ok())
    }
}

/// A mount of a snapshot.
pub(in crate::engine) struct Shown {
    pub target: PathBuf,
    pub writable: bool,
    /// In another mount namespace.
    pub foreign: bool,
}

/// All mounts that show layers, in every mount namespace that can be seen, by their layers: those that carry the mark,
/// and those whose device, dataset or subvolume the driver knows. Without those that only [map ids](super::idmapped).
pub(in crate::engine) fn shown(engine: &Engine) -> HashMap<LayerId, Vec<Shown>> {
    let (mark, driver, ours) = (Mark::of(engine), engine.layers.driver(), idmapped::dir(engine.layers.dir()));
    let mut found: HashMap<LayerId, Vec<Shown>> = HashMap::new();
    // A mount is in the copies of a namespace too, with another number. It may be in another place there: a container's
    // root. Bind mounts in our own namespace are mounts of their own.
    let (mut seen, mut filesystems) = (HashSet::new(), HashSet::new());
    for (table, foreign) in tables() {
        for entry in table.into_iter().filter(|entry| !entry.mount_point.starts_with(&ours)) {
            let Some(layer) = mark.layer(&entry.source).or_else(|| driver.shown_by(&entry)) else { continue };
            let MountInfo { mount_point, options, dev, root, .. } = entry;
            let known = !filesystems.insert((layer, dev, root)) && foreign;
            if seen.insert((layer, mount_point.clone())) && !known {
                let writable = options.as_bytes().split(|b| *b == b',').any(|option| option == b"rw");
                found.entry(layer).or_default().push(Shown { target: mount_point, writable, foreign });
            }
        }
    }
    found
}

/// The table of each mount namespace, our own first, and whether it is another one.
fn tables() -> Vec<(Vec<MountInfo>, bool)> {
    let namespace = |pid: &str| std::fs::metadata(Path::new("/proc").join(pid).join("ns/mnt")).map(|ns| ns.ino());
    let mut tables = vec![(mount::table().unwrap_or_default(), false)];
    let mut seen: HashSet<u64> = namespace("self").into_iter().collect();
    for process in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = process.file_name();
        let Some((name, pid)) = name.to_str().and_then(|name| Some((name, name.parse().ok()?))) else { continue };
        if namespace(name).is_ok_and(|namespace| seen.insert(namespace)) {
            tables.extend(mount::table_of(pid).ok().map(|table| (table, true)));
        }
    }
    tables
}
