//! What users can choose.

use graphdriver_core::{Error, ErrorKind, OptionSpec, Options, Result};
use graphdriver_quota::refquota::check_name;

pub(crate) const SPECS: &[OptionSpec] = &[
    OptionSpec {
        name: "zfs.fsname",
        help: "the dataset below which layers are made, POOL/DATASET; default: the one that holds the data root",
    },
    OptionSpec {
        name: "zfs.mountopt",
        help: "options for every mount of a layer, with commas between: noatime, nodiratime, relatime, strictatime, nosuid, \
               nodev, noexec, nosymfollow; default: none",
    },
];

const MOUNT_OPTIONS: [&str; 8] =
    ["noatime", "nodiratime", "relatime", "strictatime", "nosuid", "nodev", "noexec", "nosymfollow"];

/// The options, checked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Wishes {
    pub fsname: Option<String>,
    pub mount: Vec<String>,
}

impl Wishes {
    pub(crate) fn parse(options: &Options) -> Result<Self> {
        let fsname = options.get("zfs.fsname").map(str::to_owned);
        if let Some(name) = &fsname {
            check_name(name).map_err(|e| e.doing("option zfs.fsname"))?;
        }
        let mount: Vec<String> =
            options.get("zfs.mountopt").map_or(Vec::new(), |given| given.split(',').map(str::to_owned).collect());
        if let Some(bad) = mount.iter().find(|option| !MOUNT_OPTIONS.contains(&option.as_str())) {
            let why = format!("zfs.mountopt has {bad:?}; allowed are {}", MOUNT_OPTIONS.join(", "));
            return Err(Error::new(ErrorKind::InvalidInput, why));
        }
        Ok(Wishes { fsname, mount })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(name: &str, value: &str) -> Result<Wishes> {
        Wishes::parse(&Options(vec![(name.into(), value.into())]))
    }

    #[test]
    fn values_are_checked_and_refusals_list_what_is_allowed() {
        assert_eq!(Wishes::parse(&Options::default()).unwrap(), Wishes::default());
        assert_eq!(parse("zfs.fsname", "tank/layers").unwrap().fsname.as_deref(), Some("tank/layers"));
        assert_eq!(parse("zfs.mountopt", "nodev,noexec").unwrap().mount, ["nodev", "noexec"]);
        for bad in ["", "tank@snap", "tank/", "-r"] {
            let e = parse("zfs.fsname", bad).unwrap_err();
            assert_eq!(e.kind(), ErrorKind::InvalidInput);
            assert!(e.to_string().contains("POOL/DATASET"), "{e}");
        }
        for bad in ["", "ro", "rw", "nodev,", "remount", "context=x"] {
            let e = parse("zfs.mountopt", bad).unwrap_err();
            assert_eq!(e.kind(), ErrorKind::InvalidInput);
            assert!(e.to_string().contains("nosymfollow"), "{e}");
        }
    }
}
