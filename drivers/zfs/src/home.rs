//! The data directory, and the dataset below which the layers are.

use graphdriver_core::{Context, Error, ErrorKind, LayerId, Result, mount, open_lock, overlay_home::nearest_existing};
use graphdriver_quota::refquota::{check_name, existing, zfs};
use rustix::fs::{AtFlags, CWD, StatxFlags, statx};
use std::{
    fs::{self, File},
    io::Write,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

const FORMAT: &str = "graphdriver zfs 1";

/// What layers need, whatever the pool's own settings are, and inherit from the dataset above them. Only at creation can
/// names be made plain bytes. Without access times a layer that is read does not grow. Nobody else's program shall make
/// snapshots of layers.
const PROPERTIES: [&str; 15] = [
    "mountpoint=legacy",
    "canmount=off",
    "xattr=sa",
    "acltype=posixacl",
    "atime=off",
    "devices=on",
    "exec=on",
    "setuid=on",
    "readonly=off",
    "snapdir=hidden",
    "utf8only=off",
    "normalization=none",
    "casesensitivity=sensitive",
    "com.sun:auto-snapshot=false",
    "org.graphdriver:format=1",
];

/// The data directory that the store's dataset belongs to.
const OWNER: &str = "org.graphdriver:home";

/// The snapshot that makes a layer committed.
pub(crate) const COMMITTED: &str = "committed";

/// Names of what belongs to a store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Names {
    root: String,
}

impl Names {
    /// The dataset of the whole store.
    pub(crate) fn root(&self) -> &str {
        &self.root
    }

    /// Its pool.
    pub(crate) fn pool(&self) -> &str {
        self.root.split('/').next().unwrap_or_default()
    }

    /// A layer.
    pub(crate) fn layer(&self, id: LayerId) -> String {
        format!("{}/{id}", self.root)
    }

    /// A layer's frozen state.
    pub(crate) fn committed(&self, id: LayerId) -> String {
        format!("{}/{id}@{COMMITTED}", self.root)
    }

    /// The layer that this dataset, or its frozen state, is of.
    pub(crate) fn layer_of(&self, name: &str) -> Option<LayerId> {
        let below = name.strip_prefix(&self.root)?.strip_prefix('/')?;
        let (dataset, snapshot) = below.split_once('@').unwrap_or((below, COMMITTED));
        dataset.parse().ok().filter(|_| snapshot == COMMITTED)
    }

    /// A layer being created.
    pub(crate) fn new_layer(&self, id: LayerId) -> String {
        format!("{}/new-{id}", self.root)
    }

    /// A layer being removed.
    pub(crate) fn removed(&self, id: LayerId) -> String {
        format!("{}/removed-{id}", self.root)
    }

    /// What layers without a parent are clones of.
    pub(crate) fn empty(&self) -> String {
        format!("{}/empty@{COMMITTED}", self.root)
    }
}

/// What `HOME/version` says.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Record {
    root: String,
    /// Whether the dataset has been made.
    ready: bool,
}

impl Record {
    fn load(home: &Path) -> Result<Option<Record>> {
        let path = home.join("version");
        match fs::read_to_string(&path) {
            Ok(text) => Record::parse(&text).map(Some).map_err(|e| e.doing(format!("reading {}", path.display()))),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::from(e).doing(format!("reading {}", path.display()))),
        }
    }

    fn parse(text: &str) -> Result<Record> {
        let mut lines = text.lines();
        let format = lines.next().unwrap_or_default();
        if format != FORMAT {
            let why = format!("its format is {format:?}, and this program knows {FORMAT:?}");
            return Err(
                Error::new(ErrorKind::Unsupported, why).hint("use the graphdriver that made it, or a newer one")
            );
        }
        let corrupt = || Error::new(ErrorKind::Corrupt, "the file is damaged");
        let (word, root) = lines.next().and_then(|line| line.split_once(' ')).ok_or_else(corrupt)?;
        check_name(root)?;
        match word {
            "dataset" => Ok(Record { root: root.into(), ready: true }),
            "making" => Ok(Record { root: root.into(), ready: false }),
            _ => Err(corrupt()),
        }
    }

    fn save(&self, home: &Path) -> Result<()> {
        let text = format!("{FORMAT}\n{} {}\n", if self.ready { "dataset" } else { "making" }, self.root);
        let write = || -> std::io::Result<()> {
            let new = home.join("version.new");
            let mut file = File::create(&new)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            fs::rename(new, home.join("version"))?;
            File::open(home)?.sync_all()
        };
        write().doing(|| format!("writing {}", home.join("version").display()))
    }
}

/// The dataset in which the layers of `home` are or would be made: the one asked for, else the one recorded, else the one
/// that holds the directory.
pub(crate) fn parent_dataset(home: &Path, fsname: Option<&str>) -> Result<String> {
    if let Some(name) = fsname {
        return Ok(name.to_owned());
    }
    if let Some(record) = Record::load(home)? {
        return Ok(parent_of(&record.root).to_owned());
    }
    dataset_of(&nearest_existing(home)?)
}

/// The store's dataset, if the data directory has one.
pub(crate) fn recorded(home: &Path) -> Result<Option<String>> {
    Ok(Record::load(home)?.map(|record| record.root))
}

fn parent_of(dataset: &str) -> &str {
    dataset.rsplit_once('/').map_or(dataset, |(parent, _)| parent)
}

/// The dataset that holds a directory.
fn dataset_of(dir: &Path) -> Result<String> {
    let id = statx(CWD, dir, AtFlags::empty(), StatxFlags::MNT_ID)?.stx_mnt_id;
    let mounted = mount::table()?.into_iter().find(|m| m.id == id);
    match mounted {
        Some(m) if m.fstype == "zfs" => {
            let name = m.source.to_string_lossy().into_owned();
            check_name(&name).map(|()| name)
        }
        other => {
            let fstype = other.map_or("something unknown".into(), |m| m.fstype.to_string_lossy().into_owned());
            Err(Error::new(ErrorKind::Unsupported, format!("{} is on {fstype} and not on ZFS", dir.display())).hint(
                format!("name a dataset with --storage-opt zfs.fsname=POOL/DATASET, or make one for the data root: zfs create -o mountpoint={} POOL/graphdriver", dir.display()),
            ))
        }
    }
}

/// Opens the data directory `home`, made if it is not there, and makes the store's dataset when it is opened first.
pub(crate) fn open(home: &Path, fsname: Option<&str>) -> Result<Names> {
    for dir in [home.into(), mount_point(home, "from"), mount_point(home, "to")] {
        graphdriver_core::overlay_home::make_dirs(&dir)?;
    }
    let lock = open_lock(&home.join("lock"))?;
    lock.lock().doing(|| format!("locking {}", home.join("lock").display()))?;
    let record = match Record::load(home)? {
        Some(record) => record,
        None => {
            let root = format!("{}/graphdriver-{}", parent_dataset(home, fsname)?, random_name()?);
            check_name(&root)?;
            let record = Record { root, ready: false };
            record.save(home)?;
            record
        }
    };
    refuse_other(&record, fsname)?;
    let names = Names { root: record.root.clone() };
    if record.ready {
        refuse_missing(&names)?;
    } else {
        make(&names, home)?;
    }
    refuse_copy(&names, home)?;
    if !record.ready {
        Record { ready: true, ..record }.save(home)?;
    }
    Ok(names)
}

/// Where `zfs diff` has datasets mounted in a mount namespace of its own.
pub(crate) fn mount_point(home: &Path, what: &str) -> PathBuf {
    home.join("mnt").join(what)
}

fn random_name() -> Result<String> {
    let mut bytes = [0; 6];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn refuse_other(record: &Record, fsname: Option<&str>) -> Result<()> {
    match fsname {
        Some(name) if name != parent_of(&record.root) => {
            let why =
                format!("zfs.fsname is {name}, and the layers of this data root are in {}", parent_of(&record.root));
            Err(Error::new(ErrorKind::InvalidInput, why).hint("leave zfs.fsname out, or take another data root"))
        }
        _ => Ok(()),
    }
}

fn refuse_missing(names: &Names) -> Result<()> {
    let empty = names.empty();
    if existing(&[&empty])?.contains(empty.as_str()) {
        return Ok(());
    }
    let why = format!("the dataset {} with the layers of this data root is not there", names.root());
    Err(Error::new(ErrorKind::NotFound, why).hint(format!(
        "import its pool: zpool import {}; if it is lost, so are the layers: remove the data root",
        names.pool()
    )))
}

/// A copy of a data root names the same dataset: two stores would free each other's layers.
fn refuse_copy(names: &Names, home: &Path) -> Result<()> {
    let said = zfs(&["get", "-H", "-o", "value", OWNER, names.root()])?;
    let owner = Path::new(said.strip_suffix('\n').unwrap_or(&said));
    if same_dir(owner, home) {
        return Ok(());
    }
    let why = format!("the layers in {} are those of {}, and not of a copy of it", names.root(), owner.display());
    let home = fs::canonicalize(home)?;
    let mend = format!("zfs set {OWNER}={} {}", home.display(), names.root());
    Err(Error::new(ErrorKind::InvalidInput, why).hint(format!(
        "use that data root; if it was moved here and is there no more: {mend}; to copy images, use save and load"
    )))
}

/// By whatever names.
fn same_dir(one: &Path, other: &Path) -> bool {
    let identity = |dir: &Path| fs::metadata(dir).map(|found| (found.dev(), found.ino())).ok();
    one.is_absolute() && identity(one).is_some_and(|one| identity(other) == Some(one))
}

/// Makes what is missing of the store's dataset, and of the empty one in it.
fn make(names: &Names, home: &Path) -> Result<()> {
    let (empty, snapshot) = (format!("{}/empty", names.root()), names.empty());
    let there = existing(&[names.root(), &empty, &snapshot])?;
    if !there.contains(names.root()) {
        let home = fs::canonicalize(home)?;
        let home = home.to_str().ok_or_else(|| {
            Error::new(ErrorKind::Unsupported, format!("{} is not UTF-8, as ZFS wants it", home.display()))
                .hint("choose another data root")
        })?;
        let home = format!("{OWNER}={home}");
        let mut arguments = vec!["create"];
        for property in PROPERTIES.iter().copied().chain([home.as_str()]) {
            arguments.extend(["-o", property]);
        }
        arguments.push(names.root());
        zfs(&arguments)?;
    }
    if !there.contains(empty.as_str()) {
        zfs(&["create", &empty])?;
    }
    if !there.contains(snapshot.as_str()) {
        zfs(&["snapshot", &snapshot])?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_record_is_what_was_written_and_others_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Record::load(dir.path()).unwrap(), None);
        for ready in [false, true] {
            let record = Record { root: "tank/a/graphdriver-0123".into(), ready };
            record.save(dir.path()).unwrap();
            assert_eq!(Record::load(dir.path()).unwrap(), Some(record));
        }
        assert_eq!(
            fs::read_to_string(dir.path().join("version")).unwrap(),
            "graphdriver zfs 1\ndataset tank/a/graphdriver-0123\n"
        );
        let newer = Record::parse("graphdriver zfs 2\ndataset tank/a\n").unwrap_err();
        assert_eq!(newer.kind(), ErrorKind::Unsupported);
        for bad in ["graphdriver zfs 1\n", "graphdriver zfs 1\nother tank\n", "graphdriver zfs 1\ndataset -r tank\n"] {
            assert!(Record::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn another_parent_than_the_recorded_is_refused_and_a_directory_elsewhere_needs_one() {
        let record = Record { root: "tank/a/graphdriver-0123".into(), ready: true };
        refuse_other(&record, None).unwrap();
        refuse_other(&record, Some("tank/a")).unwrap();
        let e = refuse_other(&record, Some("tank/b")).unwrap_err();
        assert!(e.to_string().contains("tank/a"), "{e}");
        let e = dataset_of(Path::new("/proc")).unwrap_err();
        assert!(e.to_string().contains("on proc and not on ZFS") && e.to_string().contains("zfs.fsname"), "{e}");
    }

    #[test]
    fn a_directory_is_itself_by_any_name_and_no_copy_is_it() {
        let dir = tempfile::tempdir().unwrap();
        let [one, link, copy] = ["one", "link", "copy"].map(|name| dir.path().join(name));
        fs::create_dir(&one).unwrap();
        fs::create_dir(&copy).unwrap();
        std::os::unix::fs::symlink(&one, &link).unwrap();
        assert!(same_dir(&one, &link) && same_dir(&one, &copy.join("../one")));
        assert!(!same_dir(&one, &copy) && !same_dir(&one, &dir.path().join("gone")));
        assert!(!same_dir(Path::new("-"), &one), "what zfs says of a property that is not set");
    }

    #[test]
    fn names_are_below_the_stores_dataset() {
        let names = Names { root: "tank/g".into() };
        assert_eq!((names.pool(), names.layer(LayerId(7)).as_str()), ("tank", "tank/g/7"));
        assert_eq!(names.committed(LayerId(7)), "tank/g/7@committed");
        for (name, layer) in [
            ("tank/g/7", Some(7)),
            ("tank/g/7@committed", Some(7)),
            ("tank/g/7@daily", None),
            ("tank/g", None),
            ("tank/g/new-7", None),
            ("tank/g2/7", None),
        ] {
            assert_eq!(names.layer_of(name), layer.map(LayerId), "{name}");
        }
    }
}
