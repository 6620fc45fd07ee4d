//! What is missing for ZFS to work here.

use crate::{home, options::Wishes};
use graphdriver_core::{Context, Error, ErrorKind, Options, Result, Unmet};
use graphdriver_quota::refquota::{check_name, list, number, zpool};
use std::path::Path;

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Support {
    /// The dataset below which the store's is or would be.
    pub parent: String,
    /// The block size of new files in layers, in bytes.
    pub recordsize: u64,
}

/// Whether layers could be made for the data directory `home`.
pub(crate) fn support(home: &Path, wishes: &Wishes) -> Result<Support> {
    if !rustix::process::geteuid().is_root() {
        let why = "only root can make and mount datasets";
        return Err(Error::new(ErrorKind::PermissionDenied, why).hint("run as root, or take vfs-fuse"));
    }
    needs_device(Path::new("/dev/zfs"))?;
    let parent = home::parent_dataset(home, wishes.fsname.as_deref())?;
    check_name(&parent)?;
    let own = home::recorded(home)?;
    let found = list(&["recordsize", "type"], &own.iter().chain([&parent]).map(String::as_str).collect::<Vec<_>>())?;
    let of = |name: &str| found.iter().find(|row| row.name == name);
    let Some(inherited) = of(&parent) else {
        let pool = parent.split('/').next().unwrap_or_default();
        return Err(Error::new(ErrorKind::Unsupported, format!("there is no dataset {parent}"))
            .hint(format!("zfs create -p {parent}, or if its pool is not imported: zpool import {pool}")));
    };
    if inherited.values[1] != "filesystem" {
        let why = format!("zfs.fsname: {parent} is a {}; name a filesystem", inherited.values[1]);
        return Err(Error::new(ErrorKind::InvalidInput, why));
    }
    // Layers inherit it from the store's dataset, once there is one.
    let row = own.as_deref().and_then(of).unwrap_or(inherited);
    Ok(Support { recordsize: number(&row.values[0])?, parent })
}

/// Fails where the kernel's module has not made its device.
fn needs_device(device: &Path) -> Result<()> {
    if device.exists() {
        return Ok(());
    }
    let why = format!("the kernel has no ZFS: there is no {}", device.display());
    Err(Error::new(ErrorKind::Unsupported, why).hint(
        "modprobe zfs; if there is no such module: apt-get install zfs-dkms zfsutils-linux (Debian: from contrib)",
    ))
}

fn refuse_read_only(dataset: &str) -> Result<()> {
    let pool = dataset.split('/').next().unwrap_or_default();
    let read_only = zpool(&["list", "-H", "-o", "readonly", pool]).doing(|| format!("looking at pool {pool}"))?;
    if read_only.trim() == "on" {
        let why = format!("pool {pool} is imported read-only");
        return Err(
            Error::new(ErrorKind::Unsupported, why).hint(format!("zpool export {pool}, then zpool import {pool}"))
        );
    }
    Ok(())
}

/// The same for those who choose a driver.
pub(crate) fn probe(home: &Path, options: &Options) -> Result<Support, Unmet> {
    let find = || {
        let support = support(home, &Wishes::parse(options)?)?;
        refuse_read_only(&support.parent).map(|()| support)
    };
    find().map_err(|e: Error| Unmet {
        missing: e.reason().into(),
        remedy: e.hint_text().unwrap_or("see zpool status").into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_without_zfs_is_told_what_brings_it() {
        let e = needs_device(Path::new("/nowhere/zfs")).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Unsupported);
        assert!(e.reason().contains("no ZFS") && e.hint_text().unwrap().contains("modprobe zfs"), "{e}");
    }
}
