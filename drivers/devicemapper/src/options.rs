//! What users can choose.

use graphdriver_core::{ByteSize, Error, ErrorKind, OptionSpec, Options, Result};
use serde::{Deserialize, Serialize};
use std::{fmt, path::PathBuf};

macro_rules! specs {
    ($($name:literal: $help:literal,)*) => {
        &[$(OptionSpec { name: $name, help: $help }),*]
    };
}

pub(crate) const SPECS: &[OptionSpec] = specs! {
    "dm.basesize": "size of the filesystem of a layer without parents, and of all on it; default: 10G",
    "dm.loopdatasize": "size of the sparse file that holds the data of a loop pool; default: 100G",
    "dm.loopmetadatasize": "size of the sparse file that holds the metadata of a loop pool; default: 2G",
    "dm.blocksize": "what is copied at the first write to shared data: a multiple of 64K, 64K to 1G; default: 64K",
    "dm.min_free_space": "percent of the pool, data and metadata, that stay free: below it no layer is made; default: 10%",
    "dm.fs": "filesystem of the layers, xfs or ext4; default: xfs if mkfs.xfs is there",
    "dm.mkfsarg": "further arguments for mkfs, separated by spaces; may be given several times",
    "dm.mountopt": "further mount options for layers, separated by commas",
    "dm.blkdiscard": "true or false: give the space of removed layers back to what is below the pool; default: true for loop files",
    "dm.thinpooldev": "an existing, empty thin pool that nobody else uses: /dev/mapper/NAME or NAME",
    "dm.datadev": "a block device for the pool's data; needs dm.metadatadev",
    "dm.metadatadev": "a block device for the pool's metadata, its first 4 KiB zero at first; needs dm.datadev",
    "dm.use_deferred_removal": "true or false: a device that is busy when it is released vanishes with its last user; default: false",
    "dm.use_deferred_deletion": "true or false: a busy layer can be removed, and is freed later; needs dm.use_deferred_removal; default: false",
    "dm.directlvm_device": "a block device to divide up into data and metadata of a pool; LVM is not needed",
    "dm.directlvm_device_force": "true or false: take dm.directlvm_device even if it has data on it, which is lost; default: false",
    "dm.thinp_percent": "percent of dm.directlvm_device that become data at first; default: 95",
    "dm.thinp_metapercent": "percent of dm.directlvm_device that become metadata; default: 1",
    "dm.thinp_autoextend_threshold": "percent of the data in use from which on the pool on dm.directlvm_device grows; default: 80",
    "dm.thinp_autoextend_percent": "by how many percent it then grows, as far as the device goes; default: 20",
    "dm.override_udev_sync_check": "refused: devices are found without udev",
    "dm.xfs_nospace_max_retries": "refused: it is always 0, so that a full pool makes nobody wait for ever",
    "dm.libdm_log_level": "refused: libdm is not used",
};

/// What a layer is formatted with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Fs {
    Xfs,
    Ext4,
}

impl Direct {
    /// The percent of the device that become data and metadata.
    pub(crate) fn shares(&self) -> (u64, u64) {
        (self.percent.unwrap_or(95), self.meta_percent.unwrap_or(1))
    }
}

impl Fs {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Fs::Xfs => "xfs",
            Fs::Ext4 => "ext4",
        }
    }

    /// The smallest that mkfs makes (mkfs.xfs(8) since 5.19: 300 MiB) and that is of any use.
    pub(crate) fn least(self) -> u64 {
        match self {
            Fs::Xfs => 300 << 20,
            Fs::Ext4 => 16 << 20,
        }
    }
}

impl fmt::Display for Fs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Where the pool comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum From {
    /// In bytes.
    Loop {
        data: Option<u64>,
        metadata: Option<u64>,
    },
    Devices {
        data: PathBuf,
        metadata: PathBuf,
    },
    Direct(Direct),
    Given(PathBuf),
}

impl From {
    /// The option that asks for this, as the user gave it.
    pub(crate) fn asked(&self) -> String {
        match self {
            From::Loop { data: Some(size), .. } => format!("dm.loopdatasize={size}"),
            From::Loop { metadata, .. } => format!("dm.loopmetadatasize={}", metadata.unwrap_or_default()),
            From::Devices { data, .. } => format!("dm.datadev={}", data.display()),
            From::Direct(direct) => format!("dm.directlvm_device={}", direct.device.display()),
            From::Given(pool) => format!("dm.thinpooldev={}", pool.display()),
        }
    }
}

/// A device that is divided up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Direct {
    pub device: PathBuf,
    pub force: bool,
    pub percent: Option<u64>,
    pub meta_percent: Option<u64>,
    pub threshold: u64,
    pub extend: u64,
}

/// The options, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Wishes {
    pub from: From,
    /// Whether the user said where the pool comes from.
    pub explicit: bool,
    pub base_size: u64,
    pub block: Option<u64>,
    pub min_free: u64,
    pub fs: Option<Fs>,
    pub mkfs: Vec<String>,
    pub mount: Vec<String>,
    /// None follows what the pool there is is made of.
    pub discard: Option<bool>,
    pub deferred_removal: bool,
    pub deferred_deletion: bool,
}

const LOOP: &[&str] = &["dm.loopdatasize", "dm.loopmetadatasize"];
const DEVICES: &[&str] = &["dm.datadev", "dm.metadatadev"];
const DIRECT: &[&str] = &[
    "dm.directlvm_device",
    "dm.directlvm_device_force",
    "dm.thinp_percent",
    "dm.thinp_metapercent",
    "dm.thinp_autoextend_threshold",
    "dm.thinp_autoextend_percent",
];
const GIVEN: &[&str] = &["dm.thinpooldev"];

const KIB64: u64 = 64 << 10;

impl Wishes {
    pub(crate) fn parse(options: &Options) -> Result<Wishes> {
        refuse_meaningless(options)?;
        let given = Given(options);
        let from = given.from()?;
        let wishes = Wishes {
            explicit: [LOOP, DEVICES, DIRECT, GIVEN].iter().any(|kind| given.first(kind).is_some()),
            base_size: given.size("dm.basesize", 10 << 30)?,
            block: given.block()?,
            min_free: given.min_free()?,
            fs: given.fs()?,
            mkfs: words(options, "dm.mkfsarg", char::is_whitespace),
            mount: given.mount_options()?,
            discard: given.switch("dm.blkdiscard")?,
            deferred_removal: given.switch("dm.use_deferred_removal")?.unwrap_or(false),
            deferred_deletion: given.switch("dm.use_deferred_deletion")?.unwrap_or(false),
            from,
        };
        if wishes.deferred_deletion && !wishes.deferred_removal {
            return Err(invalid("dm.use_deferred_deletion=true needs dm.use_deferred_removal=true"));
        }
        let least = wishes.fs.unwrap_or(Fs::Ext4).least();
        if wishes.base_size < least {
            return Err(invalid(format!(
                "dm.basesize is {}; at least {} MiB are needed",
                wishes.base_size,
                least >> 20
            )));
        }
        Ok(wishes)
    }
}

fn refuse_meaningless(options: &Options) -> Result<()> {
    for (name, value) in &options.0 {
        let spec = SPECS.iter().find(|spec| spec.name == name);
        let spec = spec.ok_or_else(|| invalid(format!("storage driver devicemapper has no option {name:?}")))?;
        if let Some(why) = spec.help.strip_prefix("refused: ") {
            let e = Error::new(ErrorKind::Unsupported, format!("option {name}={value}: {why}"));
            return Err(e.hint("leave it out"));
        }
    }
    Ok(())
}

fn invalid(why: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidInput, why)
}

/// All words of all values given.
fn words(options: &Options, name: &str, separates: fn(char) -> bool) -> Vec<String> {
    let values = options.0.iter().filter(|(n, _)| n == name).flat_map(|(_, value)| value.split(separates));
    values.filter(|word| !word.is_empty()).map(str::to_owned).collect()
}

struct Given<'a>(&'a Options);

impl Given<'_> {
    /// The first of these options that is given.
    fn first(&self, names: &[&'static str]) -> Option<&'static str> {
        names.iter().copied().find(|name| self.0.get(name).is_some())
    }

    fn from(&self) -> Result<From> {
        let kinds = [LOOP, DEVICES, DIRECT, GIVEN].map(|names| self.first(names));
        let mut asked = kinds.iter().flatten();
        if let (Some(one), Some(other)) = (asked.next(), asked.next()) {
            let why = format!("{one} and {other} contradict each other: they are for different kinds of pools");
            return Err(invalid(why)
                .hint("choose loop files, dm.thinpooldev, dm.directlvm_device, or dm.datadev and dm.metadatadev"));
        }
        if let Some(pool) = self.0.get("dm.thinpooldev") {
            if self.0.get("dm.blocksize").is_some() {
                return Err(invalid("dm.blocksize contradicts dm.thinpooldev, which has a block size already"));
            }
            return Ok(From::Given(pool.into()));
        }
        match (self.0.get("dm.datadev"), self.0.get("dm.metadatadev")) {
            (Some(data), Some(metadata)) if data == metadata => {
                return Err(invalid("dm.datadev and dm.metadatadev are the same device"));
            }
            (Some(data), Some(metadata)) => {
                return Ok(From::Devices { data: data.into(), metadata: metadata.into() });
            }
            (None, None) => {}
            _ => return Err(invalid("dm.datadev and dm.metadatadev go together, and only one is given")),
        }
        if kinds[2].is_some() {
            return self.direct().map(From::Direct);
        }
        let given = |name| self.0.get(name).map(|_| self.size(name, 0)).transpose();
        let (data, metadata) = (given("dm.loopdatasize")?, given("dm.loopmetadatasize")?);
        // Below that the pool's superblock and space maps do not fit.
        for (name, size, least) in [("dm.loopdatasize", data, 64 << 20), ("dm.loopmetadatasize", metadata, 2 << 20)] {
            if let Some(size) = size.filter(|size| *size < least) {
                return Err(invalid(format!("{name} is {size}; at least {} MiB are needed", least >> 20)));
            }
        }
        Ok(From::Loop { data, metadata })
    }

    fn direct(&self) -> Result<Direct> {
        let Some(device) = self.0.get("dm.directlvm_device") else {
            let named = self.first(DIRECT).expect("the caller found one");
            return Err(invalid(format!("{named} needs dm.directlvm_device")));
        };
        let direct = Direct {
            device: device.into(),
            force: self.switch("dm.directlvm_device_force")?.unwrap_or(false),
            percent: self.given_percent("dm.thinp_percent")?,
            meta_percent: self.given_percent("dm.thinp_metapercent")?,
            threshold: self.percent("dm.thinp_autoextend_threshold", 80)?,
            extend: self.percent("dm.thinp_autoextend_percent", 20)?,
        };
        let (data, metadata) = direct.shares();
        if data + metadata > 100 {
            return Err(invalid("dm.thinp_percent and dm.thinp_metapercent are more than 100 together"));
        }
        Ok(direct)
    }

    fn size(&self, name: &str, default: u64) -> Result<u64> {
        let Some(value) = self.0.get(name) else { return Ok(default) };
        value.parse::<ByteSize>().map(|size| size.0).map_err(|e| e.doing(format!("option {name}")))
    }

    fn block(&self) -> Result<Option<u64>> {
        if self.0.get("dm.blocksize").is_none() {
            return Ok(None);
        }
        let block = self.size("dm.blocksize", 0)?;
        match block.is_multiple_of(KIB64) && (KIB64..=1 << 30).contains(&block) {
            true => Ok(Some(block)),
            false => Err(invalid(format!("dm.blocksize is {block}; allowed are multiples of 64K from 64K to 1G"))),
        }
    }

    fn switch(&self, name: &str) -> Result<Option<bool>> {
        match self.0.get(name) {
            None => Ok(None),
            Some("true") => Ok(Some(true)),
            Some("false") => Ok(Some(false)),
            Some(other) => Err(invalid(format!("{name} is {other:?}; allowed are true and false"))),
        }
    }

    fn percent(&self, name: &str, default: u64) -> Result<u64> {
        let Some(value) = self.0.get(name) else { return Ok(default) };
        let number = value.strip_suffix('%').unwrap_or(value).parse().ok();
        number
            .filter(|n| (1..=100).contains(n))
            .ok_or_else(|| invalid(format!("{name} is {value:?}; allowed are 1 to 100")))
    }

    fn given_percent(&self, name: &str) -> Result<Option<u64>> {
        self.0.get(name).map(|_| self.percent(name, 0)).transpose()
    }

    fn min_free(&self) -> Result<u64> {
        let Some(value) = self.0.get("dm.min_free_space") else { return Ok(10) };
        let number = value.strip_suffix('%').and_then(|n| n.parse().ok());
        let why = || invalid(format!("dm.min_free_space is {value:?}; allowed are 0% to 99%"));
        number.filter(|n| *n < 100).ok_or_else(why)
    }

    fn fs(&self) -> Result<Option<Fs>> {
        match self.0.get("dm.fs") {
            None => Ok(None),
            Some("xfs") => Ok(Some(Fs::Xfs)),
            Some("ext4") => Ok(Some(Fs::Ext4)),
            Some(other) => Err(invalid(format!("dm.fs is {other:?}; allowed are xfs and ext4"))),
        }
    }

    fn mount_options(&self) -> Result<Vec<String>> {
        let options = words(self.0, "dm.mountopt", |c| c == ',');
        match options.iter().find(|o| matches!(o.as_str(), "ro" | "rw" | "bind" | "remount" | "norecovery" | "noload"))
        {
            Some(option) => Err(invalid(format!("dm.mountopt has {option}, which is not the user's to choose"))),
            None => Ok(options),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(options: &[(&str, &str)]) -> Result<Wishes> {
        Wishes::parse(&Options(options.iter().map(|(n, v)| (n.to_string(), v.to_string())).collect()))
    }

    #[track_caller]
    fn refused(options: &[(&str, &str)], says: &[&str]) {
        let e = parse(options).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::InvalidInput, "{e}");
        says.iter().for_each(|part| assert!(e.to_string().contains(part), "{part:?}: {e}"));
    }

    #[test]
    fn defaults_are_dockers() {
        let wishes = parse(&[]).unwrap();
        assert_eq!(wishes.from, From::Loop { data: None, metadata: None });
        assert_eq!((wishes.base_size, wishes.block, wishes.min_free, wishes.fs), (10 << 30, None, 10, None));
        assert!(wishes.discard.is_none() && !wishes.deferred_removal && !wishes.deferred_deletion);
        let From::Direct(direct) = parse(&[("dm.directlvm_device", "/dev/vdz")]).unwrap().from else { panic!() };
        assert_eq!((direct.shares(), direct.threshold, direct.extend), ((95, 1), 80, 20));
        assert!(!direct.force);
    }

    #[test]
    fn all_values_reach_their_place() {
        let wishes = parse(&[
            ("dm.basesize", "20G"),
            ("dm.blocksize", "128K"),
            ("dm.min_free_space", "5%"),
            ("dm.fs", "ext4"),
            ("dm.mkfsarg", "-O ^metadata_csum"),
            ("dm.mkfsarg", "-m 0"),
            ("dm.mountopt", "nodiscard,noatime"),
            ("dm.blkdiscard", "false"),
            ("dm.use_deferred_removal", "true"),
            ("dm.use_deferred_deletion", "true"),
            ("dm.datadev", "/dev/a"),
            ("dm.metadatadev", "/dev/b"),
        ]);
        let wishes = wishes.unwrap();
        assert_eq!(wishes.from, From::Devices { data: "/dev/a".into(), metadata: "/dev/b".into() });
        assert_eq!((wishes.base_size, wishes.block, wishes.min_free), (20 << 30, Some(128 << 10), 5));
        assert_eq!(wishes.mkfs, ["-O", "^metadata_csum", "-m", "0"]);
        assert_eq!(wishes.mount, ["nodiscard", "noatime"]);
        assert!(wishes.discard == Some(false) && wishes.deferred_removal && wishes.deferred_deletion);
    }

    #[test]
    fn contradictions_are_refused() {
        let pool = ("dm.thinpooldev", "p");
        refused(&[pool, ("dm.loopdatasize", "1G")], &["dm.thinpooldev", "dm.loopdatasize"]);
        refused(&[pool, ("dm.directlvm_device", "/dev/x")], &["dm.thinpooldev", "dm.directlvm_device"]);
        refused(&[pool, ("dm.datadev", "/dev/x")], &["dm.thinpooldev", "dm.datadev"]);
        refused(&[pool, ("dm.blocksize", "64K")], &["dm.blocksize"]);
        refused(&[("dm.datadev", "/dev/x")], &["go together"]);
        refused(&[("dm.datadev", "/dev/x"), ("dm.metadatadev", "/dev/x")], &["same device"]);
        refused(&[("dm.thinp_percent", "90")], &["needs dm.directlvm_device"]);
        let direct = ("dm.directlvm_device", "/dev/x");
        refused(&[direct, ("dm.thinp_percent", "95"), ("dm.thinp_metapercent", "6")], &["more than 100"]);
        refused(&[("dm.use_deferred_deletion", "true")], &["dm.use_deferred_removal"]);
    }

    #[test]
    fn wrong_values_say_what_is_allowed() {
        let direct = ("dm.directlvm_device", "/dev/x");
        for value in ["0", "101", "-1", "x", ""] {
            refused(&[direct, ("dm.thinp_autoextend_threshold", value)], &["1 to 100"]);
        }
        for value in ["32K", "65K", "2G", "0", "100000"] {
            refused(&[("dm.blocksize", value)], &["64K to 1G"]);
        }
        refused(&[("dm.min_free_space", "10")], &["0% to 99%"]);
        refused(&[("dm.min_free_space", "100%")], &["0% to 99%"]);
        refused(&[("dm.fs", "btrfs")], &["xfs and ext4"]);
        refused(&[("dm.blkdiscard", "on")], &["true and false"]);
        refused(&[("dm.basesize", "big")], &["dm.basesize"]);
        refused(&[("dm.basesize", "1M")], &["16 MiB"]);
        refused(&[("dm.fs", "xfs"), ("dm.basesize", "200M")], &["300 MiB"]);
        refused(&[("dm.loopdatasize", "1M")], &["64 MiB"]);
        refused(&[("dm.mountopt", "noatime,ro")], &["ro"]);
        refused(&[("dm.colour", "red")], &["dm.colour"]);
    }

    #[test]
    fn what_has_no_meaning_is_refused_with_the_reason() {
        for name in ["dm.override_udev_sync_check", "dm.xfs_nospace_max_retries", "dm.libdm_log_level"] {
            let e = parse(&[(name, "0")]).unwrap_err();
            assert_eq!(e.kind(), ErrorKind::Unsupported);
            assert!(e.to_string().contains(name), "{e}");
        }
    }
}
