//! What users can choose.

use crate::{
    config::{Config, CopyUp},
    options,
};
use graphdriver_core::{Context, Error, ErrorKind, OptionSpec, Options, Result};
use graphdriver_quota as quota;

pub(super) const SPECS: &[OptionSpec] = &[
    OptionSpec {
        name: "vfs-fuse.size",
        help: "the most each container's writable layer may take, such as 10G; needs project quotas: xfs mounted with pquota, or ext4 with prjquota; default: no limit",
    },
    OptionSpec {
        name: "vfs-fuse.quota_projects",
        help: "FIRST-LAST: the numbers that layers get as projects; default: 1900000000-1999999999",
    },
    OptionSpec {
        name: "vfs-fuse.copy_up",
        help: "auto, reflink, extent or full: how a lower file gets into the writable layer at its first change; default: auto",
    },
    OptionSpec {
        name: "vfs-fuse.complete",
        help: "commit, or bytes a second like 50M: when files copied up by extents get the rest of their data; default: commit",
    },
    OptionSpec {
        name: "vfs-fuse.passthrough",
        help: "on or off: file data goes from the kernel straight to the layers; default: on where it works",
    },
    OptionSpec {
        name: "vfs-fuse.volatile",
        help: "on or off: ignore fsync in writable layers; a layer mounted while the machine crashes is lost; default: off",
    },
    OptionSpec {
        name: "vfs-fuse.mount_program",
        help: "path of the program that serves mounts; default: vfs-fuse, beside graphdriver or in PATH",
    },
    OptionSpec {
        name: "vfs-fuse.mountopt",
        help: "more options of vfs-fuse, with commas between them: timeout, writeback, threads, wake_latency, noacl, nodev, nosuid, noexec",
    },
];

/// What `vfs-fuse.mountopt` may say. Others choose the layers, which is the driver's part, or show and store other owners
/// and attributes than files have, which would go into images.
const FREE: &[&str] = &[
    "timeout",
    "writeback",
    "threaded",
    "threads",
    "max_threads",
    "wake_latency",
    "noacl",
    "nodev",
    "nosuid",
    "noexec",
    "noatime",
];

/// The options, checked.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Wishes {
    pub copy_up: CopyUp,
    pub volatile: bool,
    pub quota: quota::Wishes,
    /// The program, if not the usual one.
    pub program: Option<String>,
    /// What every mount is told.
    pub everywhere: Vec<String>,
    /// What writable mounts are told besides.
    pub writable: Vec<String>,
}

impl Wishes {
    pub(super) fn parse(given: &Options) -> Result<Self> {
        let mut wishes = Wishes {
            volatile: given.switch("vfs-fuse.volatile")?.unwrap_or(false),
            quota: quota::Wishes::parse(given, "vfs-fuse")?,
            ..Wishes::default()
        };
        if let Some(on) = given.switch("vfs-fuse.passthrough")? {
            wishes.everywhere.push(format!("passthrough={}", u8::from(on)));
        }
        for name in ["copy_up", "complete"] {
            let Some(value) = given.get(&format!("vfs-fuse.{name}")) else { continue };
            let option = format!("{name}={value}");
            let config = understood(&option).doing(|| format!("option vfs-fuse.{name}"))?;
            if name == "copy_up" {
                wishes.copy_up = config.copy_up;
            }
            wishes.writable.push(option);
        }
        for option in given.get("vfs-fuse.mountopt").unwrap_or_default().split(',').filter(|o| !o.is_empty()) {
            wishes.everywhere.push(free(option).doing(|| "option vfs-fuse.mountopt")?);
        }
        wishes.program = given.get("vfs-fuse.mount_program").map(program).transpose()?;
        Ok(wishes)
    }
}

/// What the program will make of one option.
fn understood(option: &str) -> Result<Config> {
    // A comma would begin a second option.
    match option.contains([',', '\\']) {
        true => Err(Error::new(ErrorKind::InvalidInput, format!("{option:?} has a separator in it"))),
        false => Ok(options::parse(&[option], None)?.config),
    }
}

fn free(option: &str) -> Result<String> {
    understood(option)?;
    match FREE.contains(&option.split('=').next().unwrap_or(option)) {
        true => Ok(option.into()),
        false => Err(Error::new(ErrorKind::InvalidInput, format!("{option} is not for a storage driver's mounts"))
            .hint(format!("allowed are {}", FREE.join(", ")))),
    }
}

fn program(path: &str) -> Result<String> {
    match path.starts_with('/') && !path.contains(',') {
        true => Ok(path.into()),
        false => Err(Error::new(
            ErrorKind::InvalidInput,
            format!("vfs-fuse.mount_program is {path:?}; allowed is an absolute path"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(options: &[(&str, &str)]) -> Result<Wishes> {
        Wishes::parse(&Options(options.iter().map(|(n, v)| (n.to_string(), v.to_string())).collect()))
    }

    #[test]
    fn what_is_given_goes_to_the_program_and_nothing_else_does() {
        assert_eq!(parse(&[]).unwrap(), Wishes::default());
        let wishes = parse(&[
            ("vfs-fuse.copy_up", "extent"),
            ("vfs-fuse.complete", "50M"),
            ("vfs-fuse.passthrough", "off"),
            ("vfs-fuse.volatile", "on"),
            ("vfs-fuse.mount_program", "/opt/vfs-fuse"),
            ("vfs-fuse.mountopt", "timeout=0,noacl,nosuid"),
        ]);
        assert_eq!(
            wishes.unwrap(),
            Wishes {
                copy_up: CopyUp::Extent,
                volatile: true,
                program: Some("/opt/vfs-fuse".into()),
                everywhere: ["passthrough=0", "timeout=0", "noacl", "nosuid"].map(String::from).into(),
                writable: ["copy_up=extent", "complete=50M"].map(String::from).into(),
                ..Wishes::default()
            }
        );
    }

    #[test]
    fn wrong_values_are_refused_by_name_with_what_is_allowed() {
        for (name, value, allowed) in [
            ("vfs-fuse.size", "much", "10G"),
            ("vfs-fuse.copy_up", "fast", "extent"),
            ("vfs-fuse.copy_up", "full,uidmapping=0:0:1", "separator"),
            ("vfs-fuse.complete", "soon", "bytes a second"),
            ("vfs-fuse.passthrough", "1", "on and off"),
            ("vfs-fuse.volatile", "yes", "on and off"),
            ("vfs-fuse.mount_program", "vfs-fuse", "absolute"),
            ("vfs-fuse.mountopt", "timeout=long", "seconds"),
            ("vfs-fuse.mountopt", "squash_to_uid=5", "allowed are timeout"),
            ("vfs-fuse.mountopt", "noacl,upperdir=/etc", "allowed are timeout"),
            ("vfs-fuse.mountopt", "no_such_option", "no_such_option"),
        ] {
            let e = parse(&[(name, value)]).unwrap_err();
            assert_eq!(e.kind(), ErrorKind::InvalidInput, "{e}");
            assert!(e.to_string().contains(name) && e.to_string().contains(allowed), "{e}");
        }
        assert_eq!(parse(&[("vfs-fuse.size", "10G")]).unwrap().quota.size, Some(graphdriver_core::ByteSize(10 << 30)));
    }
}
