//! What users can choose.

use graphdriver_core::{ByteSize, Error, ErrorKind, OptionSpec, Options, Result};
use graphdriver_quota::qgroup::Accounting;

pub(crate) const SPECS: &[OptionSpec] = &[
    OptionSpec {
        name: "btrfs.min_space",
        help: "the smallest limit a layer may be given with size, as 10M; smaller ones are refused; default: 0, any",
    },
    OptionSpec {
        name: "btrfs.quota",
        help: "auto: use the quotas that the filesystem has on; simple, qgroup: turn them on for the whole filesystem, \
               as simple quotas (Linux 6.7) or full qgroups; off: do not use them; default: auto",
    },
];

/// What to do about quotas.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum QuotaWish {
    /// Use what is on.
    #[default]
    Auto,
    /// Turn it on.
    On(Accounting),
    /// Use none.
    Off,
}

/// The options, checked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Wishes {
    pub min_space: u64,
    pub quota: QuotaWish,
}

impl Wishes {
    pub(crate) fn parse(options: &Options) -> Result<Wishes> {
        let min_space = match options.get("btrfs.min_space") {
            None => 0,
            Some(text) => text.parse::<ByteSize>().map_err(|e| e.doing("option btrfs.min_space"))?.0,
        };
        let quota = match options.get("btrfs.quota") {
            None | Some("auto") => QuotaWish::Auto,
            Some("simple") => QuotaWish::On(Accounting::Simple),
            Some("qgroup") => QuotaWish::On(Accounting::Full),
            Some("off") => QuotaWish::Off,
            Some(other) => {
                let why = format!("btrfs.quota is {other:?}; allowed are auto, simple, qgroup and off");
                return Err(Error::new(ErrorKind::InvalidInput, why));
            }
        };
        if quota == QuotaWish::Off && min_space > 0 {
            let why = "btrfs.min_space is about limits, and btrfs.quota=off has none";
            return Err(Error::new(ErrorKind::InvalidInput, why).hint("leave one of them out"));
        }
        Ok(Wishes { min_space, quota })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(options: &[(&str, &str)]) -> Result<Wishes> {
        Wishes::parse(&Options(options.iter().map(|(n, v)| (n.to_string(), v.to_string())).collect()))
    }

    #[test]
    fn values_are_taken_and_wrong_ones_are_refused_with_what_is_allowed() {
        assert_eq!(parse(&[]).unwrap(), Wishes { min_space: 0, quota: QuotaWish::Auto });
        let both = parse(&[("btrfs.min_space", "10M"), ("btrfs.quota", "qgroup")]).unwrap();
        assert_eq!(both, Wishes { min_space: 10 << 20, quota: QuotaWish::On(Accounting::Full) });
        assert_eq!(parse(&[("btrfs.quota", "simple")]).unwrap().quota, QuotaWish::On(Accounting::Simple));
        assert_eq!(parse(&[("btrfs.quota", "off")]).unwrap().quota, QuotaWish::Off);
        for (name, value, said) in [
            ("btrfs.quota", "on", "auto, simple, qgroup and off"),
            ("btrfs.quota", "", "auto, simple, qgroup and off"),
            ("btrfs.min_space", "much", "write 512, 64k, 10G"),
            ("btrfs.min_space", "-1", "btrfs.min_space"),
            ("btrfs.min_space", "", "btrfs.min_space"),
        ] {
            let e = parse(&[(name, value)]).unwrap_err();
            assert_eq!(e.kind(), ErrorKind::InvalidInput);
            assert!(e.to_string().contains(said), "{e}");
        }
        let e = parse(&[("btrfs.quota", "off"), ("btrfs.min_space", "1M")]).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::InvalidInput);
    }
}
