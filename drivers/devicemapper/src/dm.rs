//! Device-mapper as this driver needs it.

use crate::step;
use devicemapper::{DM, DevId, DmError, DmFlags, DmName, DmOptions, errors};
use graphdriver_core::{Context, Error, ErrorKind, Result};
use std::{
    fs::File,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// How long to wait for others, such as udev, to close a device.
const PATIENCE: Duration = Duration::from_secs(3);

/// Bytes in a sector, the unit of all tables.
pub(crate) const SECTOR: u64 = 512;

/// The control device.
pub(crate) struct Kernel {
    dm: DM,
}

/// One target that fills a whole device.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    pub kind: &'static str,
    /// In bytes.
    pub length: u64,
    pub params: String,
}

/// What the kernel says of a device.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Info {
    /// Mounts and other devices that hold it.
    pub open: i32,
    pub read_only: bool,
    pub suspended: bool,
    /// Whether it has a table, without which it is good for nothing.
    pub live: bool,
    pub major: u32,
    pub minor: u32,
}

impl Kernel {
    pub(crate) fn open() -> Result<Kernel> {
        DM::new().map(|dm| Kernel { dm }).map_err(|e| match File::open(CONTROL) {
            // Somebody has loaded the module meanwhile.
            Ok(_) => said(e).doing(format!("opening {CONTROL}")).hint("try again"),
            Err(e) => unusable(e, rustix::process::geteuid().is_root()),
        })
    }

    /// Fails if the kernel has no thin provisioning, after trying to load it.
    pub(crate) fn need_thin_pools(&self) -> Result<()> {
        if self.has_thin_pools()? {
            return Ok(());
        }
        // Whether it worked is seen below.
        let _ = std::process::Command::new("modprobe").arg("dm_thin_pool").output();
        match self.has_thin_pools()? {
            true => Ok(()),
            false => {
                Err(Error::new(ErrorKind::Unsupported, "the kernel's device-mapper has no thin pools").hint(NEEDED))
            }
        }
    }

    fn has_thin_pools(&self) -> Result<bool> {
        let targets = self.dm.list_versions().map_err(said).doing(|| "listing device-mapper's targets")?;
        Ok(targets.iter().any(|(name, ..)| name == "thin-pool"))
    }

    /// None if there is no such device.
    pub(crate) fn info(&self, name: &str) -> Result<Option<Info>> {
        let info = match self.dm.device_info(&id(dm_name(name)?)) {
            Ok(info) => info,
            Err(e) if errno(&e) == Some(libc::ENXIO) => return Ok(None),
            Err(e) => return Err(said(e).doing(format!("looking at device {name}"))),
        };
        Ok(Some(Info {
            open: info.open_count(),
            read_only: info.flags().contains(DmFlags::DM_READONLY),
            suspended: info.flags().contains(DmFlags::DM_SUSPEND),
            live: info.flags().contains(DmFlags::DM_ACTIVE_PRESENT),
            major: info.device().major,
            minor: info.device().minor,
        }))
    }

    /// Makes a device with this table. What a killed process left half made under this name is made anew.
    pub(crate) fn create(&self, name: &str, target: &Target, read_only: bool) -> Result<()> {
        if self.info(name)?.is_some_and(|info| !info.live) {
            self.remove(name)?;
        }
        step()?;
        let doing = || format!("making device {name}");
        let flags = if read_only { DmFlags::DM_READONLY } else { DmFlags::empty() };
        let options = DmOptions::private().set_flags(flags);
        let dm_name = dm_name(name)?;
        self.dm.device_create(dm_name, None, options).map_err(said).doing(doing)?;
        step()?;
        let made = self.load(dm_name, target, options).and_then(|()| {
            step()?;
            self.resume(name)
        });
        if made.is_err() {
            let undone = self.remove(name);
            undone.unwrap_or_else(|e| tracing::warn!("device {name} could not be set up and stays: {e}"));
        }
        made.doing(doing)
    }

    fn load(&self, name: &DmName, target: &Target, options: DmOptions) -> Result<()> {
        let table = [(0, target.length / SECTOR, target.kind.to_owned(), target.params.clone())];
        let loaded = self.dm.table_load(&id(name), &table, options).map_err(said);
        loaded.map(drop).doing(|| format!("loading the table {} {}", target.kind, target.params)).hint(|| LOG)
    }

    /// Gives a device another table. What is written meanwhile waits.
    pub(crate) fn reload(&self, name: &str, target: &Target) -> Result<()> {
        let dm_name = dm_name(name)?;
        self.load(dm_name, target, DmOptions::private())?;
        self.quiesce(name)
    }

    /// Has a mounted filesystem write everything to its place, by suspending the device for a moment. A device that is left
    /// suspended because the process is killed in between is resumed by the next one that opens the pool.
    pub(crate) fn quiesce(&self, name: &str) -> Result<()> {
        step()?;
        let suspend = DmOptions::private().set_flags(DmFlags::DM_SUSPEND);
        let suspended = self.dm.device_suspend(&id(dm_name(name)?), suspend).map_err(said);
        suspended.doing(|| format!("suspending device {name}"))?;
        step()?;
        self.resume(name)
    }

    /// Lets a device work, with the table that was loaded last.
    pub(crate) fn resume(&self, name: &str) -> Result<()> {
        let resumed = self.dm.device_suspend(&id(dm_name(name)?), DmOptions::private()).map_err(said);
        resumed.map(drop).doing(|| format!("resuming device {name}")).hint(|| LOG)
    }

    /// Removes a device, waiting a while for others to close it; then it is `Busy`. One that is not there is no error.
    pub(crate) fn remove(&self, name: &str) -> Result<()> {
        step()?;
        match self.wait_until_closed(name)? {
            None => return Ok(()),
            Some(info) if info.open > 0 => {
                let why = format!("device {name} is in use");
                return Err(
                    Error::new(ErrorKind::Busy, why).hint(format!("`fuser -vm /dev/mapper/{name}` shows by whom"))
                );
            }
            Some(_) => {}
        }
        self.remove_with(name, DmFlags::empty())
    }

    /// Removes a device now or when its last user closes it.
    pub(crate) fn remove_when_closed(&self, name: &str) -> Result<()> {
        step()?;
        self.remove_with(name, DmFlags::DM_DEFERRED_REMOVE)
    }

    fn remove_with(&self, name: &str, flags: DmFlags) -> Result<()> {
        match self.dm.device_remove(&id(dm_name(name)?), DmOptions::private().set_flags(flags)) {
            Ok(_) => Ok(()),
            Err(e) if errno(&e) == Some(libc::ENXIO) => Ok(()),
            Err(e) => Err(said(e)).doing(|| format!("removing device {name}")),
        }
    }

    /// What a device is like once nobody has it open, or when patience is at its end.
    pub(crate) fn wait_until_closed(&self, name: &str) -> Result<Option<Info>> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let info = self.info(name)?;
            if info.is_none_or(|info| info.open == 0) || Instant::now() > deadline {
                return Ok(info);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Takes back [`remove_when_closed`](Self::remove_when_closed). False if the device is on its way out.
    pub(crate) fn keep(&self, name: &str) -> Result<bool> {
        match self.dm.target_msg(&id(dm_name(name)?), None, "@cancel_deferred_remove") {
            Ok(_) => Ok(true),
            Err(e) if matches!(errno(&e), Some(libc::EBUSY | libc::ENXIO)) => Ok(false),
            Err(e) => Err(said(e)).doing(|| format!("keeping device {name}")),
        }
    }

    /// Tells a pool to do something (kernel `thin-provisioning.rst`, "Messages").
    pub(crate) fn tell(&self, pool: &str, message: &str) -> Result<()> {
        step()?;
        let told = self.dm.target_msg(&id(dm_name(pool)?), None, message).map_err(said);
        told.doing(|| format!("telling pool {pool}: {message}"))?;
        step()
    }

    /// The parameters of a device's only target: its table if `table`, else its status.
    pub(crate) fn describe(&self, name: &str, table: bool) -> Result<(String, String)> {
        let flags = if table { DmFlags::DM_STATUS_TABLE } else { DmFlags::empty() };
        let told = self.dm.table_status(&id(dm_name(name)?), DmOptions::default().set_flags(flags));
        let (_, targets) = told.map_err(said).doing(|| format!("asking for the state of device {name}"))?;
        let only = targets.into_iter().next().map(|(_, _, kind, params)| (kind, params));
        only.ok_or_else(|| Error::new(ErrorKind::Corrupt, format!("device {name} has no table")))
    }

    /// Names of all devices that begin so.
    pub(crate) fn list(&self, prefix: &str) -> Result<Vec<String>> {
        let all = self.dm.list_devices().map_err(said).doing(|| "listing devices")?;
        let names = all.into_iter().map(|(name, ..)| name.to_string());
        Ok(names.filter(|name| name.starts_with(prefix)).collect())
    }

    /// The file that stands for a device: where udev puts it, or where the kernel itself does.
    pub(crate) fn node(&self, name: &str) -> Result<PathBuf> {
        let missing = || Error::new(ErrorKind::NotFound, format!("there is no device {name}"));
        let info = self.info(name)?.ok_or_else(missing)?;
        let wanted = rustix::fs::makedev(info.major, info.minor);
        let mut candidates = [format!("/dev/mapper/{name}"), format!("/dev/dm-{}", info.minor)].map(PathBuf::from);
        // Who cannot wait for udev may find a name that it is about to take away.
        if !Path::new(UDEV).exists() {
            candidates.reverse();
        }
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(node) = candidates.iter().find(|path| is_device(path, wanted)) {
                return Ok(node.clone());
            }
            if Instant::now() > deadline {
                let why = format!("neither /dev/mapper/{name} nor /dev/dm-{} has appeared", info.minor);
                return Err(Error::new(ErrorKind::Unsupported, why).hint("mount a devtmpfs at /dev, or run udev"));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

const CONTROL: &str = "/dev/mapper/control";

/// What it means that the control device cannot be opened.
fn unusable(e: std::io::Error, root: bool) -> Error {
    let (kind, hint) = match e.raw_os_error() {
        Some(libc::ENOENT) => {
            return Error::new(ErrorKind::Unsupported, "the kernel has no device-mapper").hint(NEEDED);
        }
        Some(libc::EPERM | libc::EACCES) if root => (ErrorKind::PermissionDenied, FORBIDDEN),
        Some(libc::EPERM | libc::EACCES) => (ErrorKind::PermissionDenied, "run as root"),
        Some(libc::ENODEV | libc::ENXIO) => (ErrorKind::Unsupported, "modprobe dm_mod"),
        _ => (ErrorKind::Unsupported, LOG),
    };
    Error::from(e).with_kind(kind).doing(format!("opening {CONTROL}")).hint(hint)
}

const FORBIDDEN: &str = "root may not open it here: the device cgroup of a container forbids that; run the container \
                         with --privileged, as the devices of layers are needed too";

/// While this is there, the library waits for udev to have handled each device (systemd-udevd(8)).
const UDEV: &str = "/run/udev/control";

const NEEDED: &str = "modprobe dm_thin_pool; the kernel needs CONFIG_BLK_DEV_DM and CONFIG_DM_THIN_PROVISIONING";

const LOG: &str = "the kernel's log says more: dmesg";

fn is_device(path: &Path, number: u64) -> bool {
    std::fs::metadata(path).is_ok_and(|meta| meta.file_type().is_block_device() && meta.rdev() == number)
}

fn dm_name(name: &str) -> Result<&DmName> {
    DmName::new(name).map_err(said)
}

fn id(name: &DmName) -> DevId<'_> {
    DevId::Name(name)
}

fn errno(e: &DmError) -> Option<i32> {
    match e {
        DmError::Core(errors::Error::Ioctl(_, _, _, errno)) => Some(**errno as i32),
        _ => None,
    }
}

fn said(e: DmError) -> Error {
    match errno(&e) {
        Some(errno) => std::io::Error::from_raw_os_error(errno).into(),
        None => Error::new(ErrorKind::Io, e.to_string()),
    }
}

/// The block device `major:minor`, as tables name it.
pub(crate) fn by_number(number: &str) -> Result<PathBuf> {
    let uevent = format!("/sys/dev/block/{number}/uevent");
    let text = std::fs::read_to_string(&uevent).doing(|| format!("reading {uevent}"))?;
    let name = text.lines().find_map(|line| line.strip_prefix("DEVNAME="));
    let none = || Error::new(ErrorKind::NotFound, format!("block device {number} has no name"));
    Ok(Path::new("/dev").join(name.ok_or_else(none)?))
}

/// Makes sure that what was written to the device is on it, and the pool's metadata with it.
pub(crate) fn flush(node: &Path) -> Result<()> {
    File::open(node).and_then(|device| device.sync_all()).doing(|| format!("flushing {}", node.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_control_device_that_cannot_be_opened_is_explained() {
        let said = |errno, root| {
            let e = unusable(std::io::Error::from_raw_os_error(errno), root);
            (e.kind(), e.to_string())
        };
        for errno in [libc::EPERM, libc::EACCES] {
            let (kind, text) = said(errno, true);
            assert_eq!(kind, ErrorKind::PermissionDenied, "{text}");
            let right = text.contains(CONTROL) && text.contains("device cgroup") && !text.contains("run as root");
            assert!(right, "{text}");
            let (kind, text) = said(errno, false);
            assert!(kind == ErrorKind::PermissionDenied && text.contains("run as root"), "{text}");
        }
        for errno in [libc::ENODEV, libc::ENXIO] {
            let (kind, text) = said(errno, true);
            let right = text.contains("modprobe dm_mod") && !text.contains("run as root");
            assert!(kind == ErrorKind::Unsupported && right, "{text}");
        }
        let (kind, text) = said(libc::ENOENT, true);
        assert!(kind == ErrorKind::Unsupported && text.contains("CONFIG_DM_THIN_PROVISIONING"), "{text}");
    }
}
