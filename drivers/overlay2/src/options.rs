//! What users can choose.

use graphdriver_core::{Error, ErrorKind, OptionSpec, Options, Result};
use graphdriver_quota as quota;

pub(crate) const SPECS: &[OptionSpec] = &[
    OptionSpec {
        name: "overlay2.size",
        help: "the most each container's writable layer may take, such as 10G; needs project quotas: xfs mounted with pquota, or ext4 with prjquota; default: no limit",
    },
    OptionSpec {
        name: "overlay2.quota_projects",
        help: "FIRST-LAST: the numbers that layers get as projects; default: 1900000000-1999999999",
    },
    OptionSpec {
        name: "overlay2.redirect_dir",
        help: "on or off: rename directories of lower layers instead of failing with EXDEV; default: on where it works",
    },
    OptionSpec {
        name: "overlay2.metacopy",
        help: "on or off: chmod and chown of a lower file copy no data; needs redirect_dir; default: on where it works",
    },
    OptionSpec {
        name: "overlay2.volatile",
        help: "on or off: ignore fsync in writable layers; a layer mounted while the machine crashes is lost; default: off",
    },
];

/// The options, checked. None: as it works best here.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Wishes {
    pub redirect_dir: Option<bool>,
    pub metacopy: Option<bool>,
    pub volatile: bool,
    pub quota: quota::Wishes,
}

impl Wishes {
    pub(crate) fn parse(options: &Options) -> Result<Self> {
        let wishes = Wishes {
            redirect_dir: options.switch("overlay2.redirect_dir")?,
            metacopy: options.switch("overlay2.metacopy")?,
            volatile: options.switch("overlay2.volatile")?.unwrap_or(false),
            quota: quota::Wishes::parse(options, "overlay2")?,
        };
        if wishes.metacopy == Some(true) && wishes.redirect_dir == Some(false) {
            let why = "overlay2.metacopy=on needs overlay2.redirect_dir=on";
            return Err(Error::new(ErrorKind::InvalidInput, why));
        }
        Ok(wishes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(options: &[(&str, &str)]) -> Result<Wishes> {
        Wishes::parse(&Options(options.iter().map(|(n, v)| (n.to_string(), v.to_string())).collect()))
    }

    #[test]
    fn switches_are_on_or_off_and_the_rest_is_refused_with_what_is_allowed() {
        assert_eq!(parse(&[]).unwrap(), Wishes::default());
        let all = parse(&[("overlay2.redirect_dir", "on"), ("overlay2.metacopy", "off"), ("overlay2.volatile", "on")]);
        assert_eq!(
            all.unwrap(),
            Wishes { redirect_dir: Some(true), metacopy: Some(false), volatile: true, ..Wishes::default() }
        );
        for name in ["overlay2.redirect_dir", "overlay2.metacopy", "overlay2.volatile"] {
            for value in ["", "1", "true", "ON"] {
                let e = parse(&[(name, value)]).unwrap_err();
                assert_eq!(e.kind(), ErrorKind::InvalidInput);
                assert!(e.to_string().contains(name) && e.to_string().contains("on and off"), "{e}");
            }
        }
        let e = parse(&[("overlay2.redirect_dir", "off"), ("overlay2.metacopy", "on")]).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::InvalidInput);
    }

    #[test]
    fn a_size_is_read() {
        assert_eq!(parse(&[("overlay2.size", "10G")]).unwrap().quota.size, Some(graphdriver_core::ByteSize(10 << 30)));
        let e = parse(&[("overlay2.size", "much")]).unwrap_err();
        assert!(e.kind() == ErrorKind::InvalidInput && e.to_string().contains("overlay2.size"), "{e}");
    }
}
