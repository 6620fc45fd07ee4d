//! Which storage drivers there are, which of them work here, and which one to take.

use graphdriver_core::{Capabilities, Context, DriverFactory, Error, ErrorKind, GraphDriver, Options, Result, Unmet};
use serde::Serialize;
use std::path::{Path, PathBuf};

/// All drivers of the project, in the order of preference.
pub const ALL: [&str; 5] = ["overlay2", "btrfs", "zfs", "devicemapper", "vfs-fuse"];

/// The one list of what is built in, each behind the cargo feature of its name.
fn factories() -> Vec<DriverFactory> {
    vec![
        #[cfg(feature = "overlay2")]
        graphdriver_overlay2::FACTORY,
        #[cfg(feature = "btrfs")]
        graphdriver_btrfs::FACTORY,
        #[cfg(feature = "devicemapper")]
        graphdriver_devicemapper::FACTORY,
        #[cfg(feature = "vfs-fuse")]
        graphdriver_vfs_fuse::FACTORY,
        #[cfg(feature = "zfs")]
        graphdriver_zfs::FACTORY,
    ]
}

fn factory(name: &str) -> Option<DriverFactory> {
    factories().into_iter().find(|f| f.name == name)
}

/// One line of `graphdriver drivers`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct DriverStatus {
    /// What to pass to `--storage-driver`.
    pub name: String,
    /// What it builds on.
    pub summary: String,
    /// Whether it would work with the current data root.
    pub usable: bool,
    /// If not, the one thing missing and how to get it.
    pub unmet: Option<Unmet>,
    /// If it is, what it can do here.
    pub capabilities: Option<Capabilities>,
}

/// What every driver says about working with its data under `root`, given those of the options that it knows.
pub fn survey(root: &Path, options: &Options) -> Vec<DriverStatus> {
    ALL.iter().map(|name| status(name, root, options)).collect()
}

/// What the driver `name` says about it.
pub fn status(name: &str, root: &Path, options: &Options) -> DriverStatus {
    let (summary, probed) = match factory(name) {
        Some(f) => (f.summary, (f.probe)(&data_dir(root, name), &known(&f, options))),
        None => ("", Err(not_built(name))),
    };
    let (capabilities, unmet) = match probed {
        Ok(capabilities) => (Some(capabilities), None),
        Err(unmet) => (None, Some(unmet)),
    };
    DriverStatus { name: name.into(), summary: summary.into(), usable: unmet.is_none(), unmet, capabilities }
}

fn not_built(name: &str) -> Unmet {
    let (missing, remedy) = match name {
        "overlay2" => ("not built into this graphdriver", "build with --features overlay2"),
        "btrfs" => (
            "not built into this graphdriver",
            "apt-get install libbtrfsutil-dev libclang-dev, then build with --features btrfs",
        ),
        "devicemapper" => (
            "not built into this graphdriver",
            "apt-get install libdevmapper-dev libclang-dev, then build with --features devicemapper",
        ),
        "vfs-fuse" => ("not built into this graphdriver", "build with --features vfs-fuse"),
        "zfs" => ("not built into this graphdriver", "build with --features zfs"),
        _ => ("not built into this graphdriver", "build with --features full"),
    };
    Unmet { missing: missing.into(), remedy: remedy.into() }
}

/// Where a driver's store lies: everything it and its images need.
pub fn store_dir(root: &Path, driver: &str) -> PathBuf {
    root.join(driver)
}

fn data_dir(root: &Path, driver: &str) -> PathBuf {
    store_dir(root, driver).join("data")
}

/// Takes the driver asked for; else the one whose data is already under `root`; else the first that works there.
/// Fails if there are several with data, and for options the driver does not know.
pub fn choose(root: &Path, asked: Option<&str>, options: &Options) -> Result<DriverFactory> {
    let name = match asked {
        Some(name) => name.to_owned(),
        None => match with_data(root).as_slice() {
            [one] => one.to_string(),
            [] => return first_usable(root, options),
            several => {
                let all = several.join(", ");
                return Err(Error::new(
                    ErrorKind::InvalidInput,
                    format!("{} holds data of several storage drivers: {all}", root.display()),
                )
                .hint("say which one with --storage-driver"));
            }
        },
    };
    let Some(factory) = factory(&name) else {
        return Err(if ALL.contains(&name.as_str()) {
            let unmet = not_built(&name);
            Error::new(ErrorKind::Unsupported, format!("storage driver {name}: {}", unmet.missing)).hint(unmet.remedy)
        } else {
            Error::new(ErrorKind::InvalidInput, format!("there is no storage driver {name:?}"))
                .hint(format!("known are {}", ALL.join(", ")))
        });
    };
    check_options(&factory, options)?;
    Ok(factory)
}

/// The drivers that have a store under `root`; of several, those in whose stores anything is.
fn with_data(root: &Path) -> Vec<&'static str> {
    let store = |name: &str| store_dir(root, name).join("store.db");
    let mut all: Vec<_> = ALL.into_iter().filter(|name| store(name).exists()).collect();
    if all.len() > 1 {
        all.retain(|name| has_rows(&store(name), "layers").unwrap_or(true));
    }
    all
}

fn read_only(store: &Path) -> rusqlite::Result<rusqlite::Connection> {
    rusqlite::Connection::open_with_flags(store, rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY)
}

fn has_rows(store: &Path, table: &str) -> rusqlite::Result<bool> {
    read_only(store)?.query_row(&format!("SELECT EXISTS (SELECT 1 FROM {table})"), [], |row| row.get(0))
}

fn has_snapshots(store: &Path) -> Result<bool> {
    // A store that is older than snapshots has no such table.
    let table = "SELECT EXISTS (SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = 'snapshots')";
    let there = read_only(store).and_then(|db| db.query_row(table, [], |row| row.get(0)));
    match there.and_then(|there: bool| if there { has_rows(store, "snapshots") } else { Ok(false) }) {
        Ok(has) => Ok(has),
        Err(e) => {
            Err(Error::new(ErrorKind::Corrupt, e.to_string()).hint("move that store away, or use another --root"))
        }
    }
}

/// Fails if there are containerd's snapshots under `root` and `driver` has none of them: containerd would take it that all
/// are lost. So it does if that cannot be told of a store.
pub fn check_snapshots_driver(root: &Path, driver: &str) -> Result<()> {
    let mut holders = Vec::new();
    for name in ALL {
        let store = store_dir(root, name).join("store.db");
        if store.exists() && has_snapshots(&store).doing(|| format!("looking for snapshots in {}", store.display()))? {
            holders.push(name);
        }
    }
    let Some(first) = holders.first().filter(|_| !holders.contains(&driver)) else { return Ok(()) };
    let first = first.to_owned();
    let holders = holders.join(", ");
    let why = format!(
        "containerd's snapshots in {} are in the store of the storage driver {holders}, and none is in that of {driver}: \
         containerd would lose them",
        root.display()
    );
    let what = format!("serve them with --storage-driver {first}, or begin anew with {driver} under another --root");
    Err(Error::new(ErrorKind::InvalidInput, why).hint(what))
}

fn first_usable(root: &Path, options: &Options) -> Result<DriverFactory> {
    let mut why = Vec::new();
    for factory in ALL.iter().filter_map(|name| factory(name)) {
        // A wrong option is to be refused, not to make another driver of it.
        match (factory.probe)(&data_dir(root, factory.name), &Options::default()) {
            Ok(_) => return check_options(&factory, options).map(|()| factory),
            Err(unmet) => why.push(format!("{}: {} (remedy: {})", factory.name, unmet.missing, unmet.remedy)),
        }
    }
    Err(Error::new(
        ErrorKind::Unsupported,
        format!("no storage driver works with {}: {}", root.display(), why.join("; ")),
    )
    .hint("see `graphdriver drivers`"))
}

/// Fails for an option that none of the drivers has.
pub fn check_known(options: &Options) -> Result<()> {
    let all = factories();
    let known = |name: &str| all.iter().any(|factory| factory.options.iter().any(|o| o.name == name));
    match options.0.iter().find(|(name, _)| !known(name)) {
        None => Ok(()),
        Some((name, _)) => {
            let all: Vec<_> = all.iter().flat_map(|factory| factory.options).map(|o| o.name).collect();
            let e = Error::new(ErrorKind::InvalidInput, format!("no storage driver has an option {name:?}"));
            Err(e.hint(format!("they know {}", all.join(", "))))
        }
    }
}

/// Those of the options that the driver `name` knows.
pub fn known_by(name: &str, options: &Options) -> Options {
    factory(name).map(|factory| known(&factory, options)).unwrap_or_default()
}

/// Those of the options that the driver knows.
fn known(factory: &DriverFactory, options: &Options) -> Options {
    let known = |name: &str| factory.options.iter().any(|o| o.name == name);
    Options(options.0.iter().filter(|(name, _)| known(name)).cloned().collect())
}

fn check_options(factory: &DriverFactory, options: &Options) -> Result<()> {
    for (name, _) in &options.0 {
        if !factory.options.iter().any(|o| o.name == name) {
            let known: Vec<_> = factory.options.iter().map(|o| o.name).collect();
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("storage driver {} has no option {name:?}", factory.name),
            )
            .hint(format!("it knows {}; `create` also takes size and inodes", known.join(", "))));
        }
    }
    Ok(())
}

/// Opens a driver with its data under `root`.
pub fn open(factory: &DriverFactory, root: &Path, options: &Options) -> Result<Box<dyn GraphDriver>> {
    (factory.open)(&data_dir(root, factory.name), options)
        .doing(|| format!("opening storage driver {} in {}", factory.name, root.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_and_unbuilt_drivers_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let no = |name| choose(dir.path(), Some(name), &Options::default()).unwrap_err();
        assert_eq!(no("aufs").kind(), ErrorKind::InvalidInput);
        assert!(no("aufs").to_string().contains("known are overlay2, btrfs"));
        #[cfg(not(feature = "zfs"))]
        assert_eq!(no("zfs").kind(), ErrorKind::Unsupported);
    }

    #[test]
    fn several_stores_under_one_root_are_named() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["overlay2", "btrfs"] {
            std::fs::create_dir_all(store_dir(dir.path(), name)).unwrap();
            std::fs::write(store_dir(dir.path(), name).join("store.db"), "").unwrap();
        }
        let e = choose(dir.path(), None, &Options::default()).unwrap_err().to_string();
        assert!(e.contains("overlay2, btrfs") && e.contains("--storage-driver"), "{e}");
        // Made by somebody who looked with the wrong driver.
        let store = store_dir(dir.path(), "btrfs").join("store.db");
        rusqlite::Connection::open(store).unwrap().execute_batch("CREATE TABLE layers (id)").unwrap();
        assert_eq!(with_data(dir.path()), ["overlay2"]);
    }

    #[cfg(feature = "overlay2")]
    #[test]
    fn drivers_are_asked_with_the_options_that_they_know() {
        let dir = tempfile::tempdir().unwrap();
        let odd = [("overlay2.metacopy", "perhaps"), ("zfs.fsname", "tank/graphdriver")];
        let odd = Options(odd.map(|(name, value)| (name.into(), value.into())).to_vec());
        for driver in survey(dir.path(), &odd) {
            let missing = driver.unmet.map(|unmet| unmet.missing).unwrap_or_default();
            assert_eq!(missing.contains("overlay2.metacopy"), driver.name == "overlay2", "{}: {missing}", driver.name);
        }
    }

    #[cfg(feature = "overlay2")]
    #[test]
    fn the_driver_with_data_is_taken_and_its_options_are_checked() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(store_dir(dir.path(), "overlay2")).unwrap();
        std::fs::write(store_dir(dir.path(), "overlay2").join("store.db"), "").unwrap();
        assert_eq!(choose(dir.path(), None, &Options::default()).unwrap().name, "overlay2");
        let odd = Options(vec![("overlay2.colour".into(), "red".into())]);
        let e = choose(dir.path(), None, &odd).unwrap_err().to_string();
        assert!(e.contains("overlay2.colour") && e.contains("overlay2.size"), "{e}");
    }
}
