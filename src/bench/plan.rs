//! What is measured: which drivers on which filesystems, by which workloads.

use super::{
    medium::Kind,
    workloads::{self, Workload},
};
use crate::registry;
use graphdriver_core::{Error, ErrorKind, Options, Result};
use std::path::Path;

/// A driver on a filesystem, or the plain directory it is compared with.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub name: String,
    pub driver: Option<&'static str>,
    pub kind: Kind,
    /// For devicemapper the one of its layers.
    pub filesystem: String,
    /// Without those that say where its data are.
    pub options: Options,
}

/// The filesystems that can be asked for, in the order of the table.
pub const FILESYSTEMS: [&str; 4] = ["ext4", "xfs", "btrfs", "zfs"];

const KINDS: [Kind; 4] = [Kind::Ext4, Kind::Xfs, Kind::Btrfs, Kind::Zfs];

/// Options that name devices, datasets and sizes of pools: these are the run's own.
const OURS: [&str; 11] = [
    "dm.loopdatasize",
    "dm.loopmetadatasize",
    "dm.thinpooldev",
    "dm.datadev",
    "dm.metadatadev",
    "dm.fs",
    "dm.directlvm_device",
    "dm.directlvm_device_force",
    "zfs.fsname",
    "overlay2.size",
    "vfs-fuse.size",
];

/// What to measure of drivers: empty lists mean all. Whatever is asked for by name has a part in it.
pub(super) fn subjects(drivers: &[String], filesystems: &[String], options: &Options) -> Result<Vec<Plan>> {
    let asked = [drivers, filesystems];
    let drivers = chosen("storage driver", drivers, &registry::ALL)?;
    let filesystems = chosen("filesystem", filesystems, &FILESYSTEMS)?;
    refuse_places(options)?;
    registry::check_known(options)?;
    let mut plans: Vec<Plan> = Vec::new();
    for (name, kind) in FILESYSTEMS.into_iter().zip(KINDS).filter(|(name, _)| filesystems.contains(name)) {
        let of_drivers: Vec<Plan> = drivers.iter().flat_map(|driver| on(driver, name, kind, options)).collect();
        if !of_drivers.is_empty() {
            plans.push(plain(name, kind));
            plans.extend(of_drivers);
        }
    }
    if drivers.contains(&"devicemapper") && filesystems.iter().any(|name| thin(name)) {
        plans.extend(devicemapper(&filesystems, options, &plans));
    }
    let idle = idle(asked, &drivers, &filesystems, &plans);
    if plans.is_empty() || !idle.is_empty() {
        let (drivers, filesystems, idle) = (drivers.join(", "), filesystems.join(", "), idle.join(", "));
        let why = format!("of {drivers} on {filesystems} there is nothing to measure for {idle}");
        let hint = "overlay2 and vfs-fuse go with ext4, xfs and btrfs, devicemapper with xfs and ext4, btrfs and zfs with \
                    themselves";
        return Err(Error::new(ErrorKind::InvalidInput, why).hint(hint));
    }
    Ok(plans)
}

/// Drivers and filesystems that were asked for by name and have no part in the plans.
fn idle(
    asked: [&[String]; 2],
    drivers: &[&'static str],
    filesystems: &[&'static str],
    plans: &[Plan],
) -> Vec<&'static str> {
    let driver_used = |name: &str| plans.iter().any(|plan| plan.driver == Some(name));
    // Of those that devicemapper could have it takes one.
    let filesystem_used = |name: &str| {
        let for_thin = thin(name) && drivers.contains(&"devicemapper");
        for_thin || plans.iter().any(|plan| plan.driver.is_some() && plan.filesystem == name)
    };
    let drivers = drivers.iter().filter(|name| !asked[0].is_empty() && !driver_used(name));
    let filesystems = filesystems.iter().filter(|name| !asked[1].is_empty() && !filesystem_used(name));
    drivers.chain(filesystems).copied().collect()
}

/// Drivers whose data are directories of a filesystem.
fn on(driver: &'static str, filesystem: &str, kind: Kind, options: &Options) -> Vec<Plan> {
    let plan = |name: String, extra: Option<(&str, &str)>| {
        let mut options = registry::known_by(driver, options);
        options.0.extend(extra.map(|(name, value)| (name.to_owned(), value.to_owned())));
        Plan { name, driver: Some(driver), kind, filesystem: filesystem.into(), options }
    };
    let usual = || plan(format!("{driver} on {filesystem}"), None);
    match (driver, kind) {
        ("btrfs", Kind::Btrfs) | ("zfs", Kind::Zfs) | ("overlay2", Kind::Ext4 | Kind::Xfs | Kind::Btrfs) => {
            vec![usual()]
        }
        // Where files can share data it does so by itself; elsewhere it decides by size, which hides what extents cost.
        ("vfs-fuse", Kind::Ext4) if options.get("vfs-fuse.copy_up").is_none() => {
            vec![usual(), plan(format!("vfs-fuse (extents) on {filesystem}"), Some(("vfs-fuse.copy_up", "extent")))]
        }
        ("vfs-fuse", Kind::Ext4 | Kind::Xfs | Kind::Btrfs) => vec![usual()],
        _ => Vec::new(),
    }
}

fn plain(filesystem: &str, kind: Kind) -> Plan {
    let name = format!("plain directory on {filesystem}");
    Plan { name, driver: None, kind, filesystem: filesystem.into(), options: Options::default() }
}

fn thin(filesystem: &str) -> bool {
    matches!(filesystem, "ext4" | "xfs")
}

/// On xfs, as devicemapper itself prefers, if that was asked for and can be made; with its baseline if it has none yet.
fn devicemapper(filesystems: &[&'static str], options: &Options, planned: &[Plan]) -> Vec<Plan> {
    let xfs = filesystems.contains(&"xfs") && (has_program("mkfs.xfs") || !filesystems.contains(&"ext4"));
    let (filesystem, kind) = if xfs { ("xfs", Kind::Xfs) } else { ("ext4", Kind::Ext4) };
    let mut plans = Vec::new();
    if planned.iter().all(|plan| plan.driver.is_some() || plan.kind != kind) {
        plans.push(plain(filesystem, kind));
    }
    plans.push(Plan {
        name: format!("devicemapper with {filesystem}"),
        driver: Some("devicemapper"),
        kind: Kind::Whole,
        filesystem: filesystem.into(),
        options: registry::known_by("devicemapper", options),
    });
    plans
}

fn has_program(name: &str) -> bool {
    let path = std::env::var("PATH").unwrap_or_default();
    let dirs = path.split(':').chain(["/usr/sbin", "/sbin"]);
    dirs.into_iter().any(|dir| Path::new(dir).join(name).exists())
}

fn refuse_places(options: &Options) -> Result<()> {
    match options.0.iter().find(|(name, _)| OURS.contains(&name.as_str())) {
        None => Ok(()),
        Some((name, _)) => {
            let why = format!("{name} is not for measuring, which makes devices, pools and sizes of its own");
            Err(Error::new(ErrorKind::InvalidInput, why).hint("leave it out"))
        }
    }
}

/// The workloads asked for, in their own order.
pub(super) fn workloads(names: &[String]) -> Result<Vec<&'static Workload>> {
    let known: Vec<&'static str> = workloads::ALL.iter().map(|workload| workload.name).collect();
    let chosen = chosen("workload", names, &known)?;
    Ok(workloads::ALL.iter().filter(|workload| chosen.contains(&workload.name)).collect())
}

/// Those of the known that are asked for, or all; an error that lists them if there is no such.
fn chosen(what: &str, asked: &[String], known: &[&'static str]) -> Result<Vec<&'static str>> {
    if let Some(unknown) = asked.iter().find(|name| !known.contains(&name.as_str())) {
        let e = Error::new(ErrorKind::InvalidInput, format!("there is no {what} {unknown:?} to measure"));
        return Err(e.hint(format!("known are {}", known.join(", "))));
    }
    Ok(known.iter().copied().filter(|name| asked.is_empty() || asked.iter().any(|asked| asked == name)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(drivers: &[&str], filesystems: &[&str], options: &[(&str, &str)]) -> Result<Vec<String>> {
        let owned = |all: &[&str]| all.iter().map(|one| one.to_string()).collect::<Vec<_>>();
        let options = Options(options.iter().map(|(n, v)| (n.to_string(), v.to_string())).collect());
        let plans = subjects(&owned(drivers), &owned(filesystems), &options)?;
        Ok(plans.into_iter().map(|plan| plan.name).collect())
    }

    #[test]
    fn every_driver_has_its_filesystems_and_each_of_these_its_baseline() {
        assert_eq!(names(&["overlay2"], &["ext4"], &[]).unwrap(), ["plain directory on ext4", "overlay2 on ext4"]);
        assert_eq!(names(&["btrfs"], &[], &[]).unwrap(), ["plain directory on btrfs", "btrfs on btrfs"]);
        assert_eq!(
            names(&["devicemapper"], &["ext4"], &[]).unwrap(),
            ["plain directory on ext4", "devicemapper with ext4"]
        );
        let all = names(&[], &[], &[]).unwrap();
        for name in ["overlay2 on xfs", "vfs-fuse on btrfs", "zfs on zfs", "plain directory on zfs"] {
            assert!(all.iter().any(|known| known == name), "{name}: {all:?}");
        }
        assert_eq!(all.iter().filter(|name| name.starts_with("plain")).count(), 4, "{all:?}");
        let e = names(&["zfs"], &["ext4"], &[]).unwrap_err();
        assert!(e.kind() == ErrorKind::InvalidInput && e.to_string().contains("zfs with themselves"), "{e}");
        // Nobody is left out without a word.
        for (drivers, filesystems, idle) in [
            (&["overlay2", "zfs", "btrfs"][..], &["ext4"][..], "for btrfs, zfs"),
            (&["overlay2"], &["ext4", "zfs"], "for zfs"),
        ] {
            let e = names(drivers, filesystems, &[]).unwrap_err();
            assert!(e.kind() == ErrorKind::InvalidInput && e.to_string().contains(idle), "{e}");
        }
        names(&["devicemapper"], &["ext4", "xfs"], &[]).unwrap();
    }

    #[cfg(feature = "vfs-fuse")]
    #[test]
    fn a_strategy_that_is_asked_for_is_the_only_one() {
        let all = |options: &[(&str, &str)]| names(&["vfs-fuse"], &["ext4"], options).unwrap();
        assert_eq!(all(&[]).len(), 3);
        assert_eq!(all(&[("vfs-fuse.copy_up", "full")]), ["plain directory on ext4", "vfs-fuse on ext4"]);
    }

    #[test]
    fn what_is_unknown_is_refused_with_what_is_known() {
        let says = |e: Error, part: &str| {
            assert_eq!(e.kind(), ErrorKind::InvalidInput);
            assert!(e.to_string().contains(part), "{e}");
        };
        says(names(&["aufs"], &[], &[]).unwrap_err(), "known are overlay2, btrfs");
        says(names(&[], &["reiserfs"], &[]).unwrap_err(), "known are ext4, xfs, btrfs, zfs");
        says(workloads(&["fsck".into()]).unwrap_err(), "known are first-write, rewrite");
        says(names(&[], &[], &[("dm.thinpooldev", "tank")]).unwrap_err(), "dm.thinpooldev");
    }
}
