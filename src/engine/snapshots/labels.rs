//! Labels that ask for something.

use super::row::Labels;
use graphdriver_core::{
    ByteSize, Context, Error, ErrorKind, Limits, Result,
    mount::{self, IdRange},
};
use std::{fmt, os::fd::OwnedFd};

/// What each of these may be: the name of the label, and whether its value may have a unit. The first given counts.
///
/// When containerd makes a container or unpacks an image it hands on labels below `containerd.io/snapshot/` alone.
const SIZES: [(&str, bool); 3] = [
    ("graphdriver.io/size", true),
    ("containerd.io/snapshot/graphdriver.size", true),
    ("containerd.io/snapshot/max-size", false),
];
const INODES: [&str; 2] = ["graphdriver.io/inodes", "containerd.io/snapshot/graphdriver.inodes"];
const UIDS: &str = "containerd.io/snapshot/uidmapping";
const GIDS: &str = "containerd.io/snapshot/gidmapping";

/// containerd's own bound for a name and its value together.
const LONGEST: usize = 4096;

/// Bytes of all labels of a snapshot together. They have to fit into one message, which containerd does not look at.
const MOST: usize = 1 << 20;

/// Refuses labels that containerd would not keep, or could not be told of.
pub(super) fn check(labels: &Labels) -> Result<()> {
    if labels.iter().map(|(name, value)| name.len() + value.len()).sum::<usize>() > MOST {
        return Err(invalid(format!("its labels have more than {MOST} bytes")));
    }
    match labels.iter().find(|(name, value)| name.len() + value.len() > LONGEST) {
        Some((name, _)) => Err(invalid(format!("label {:.64} is longer than {LONGEST} bytes", name))),
        None => Ok(()),
    }
}

/// What the snapshot may take, if its labels say so; our own label comes before containerd's.
pub(super) fn limits(labels: &Labels) -> Result<Limits> {
    let given = |name: &str| labels.get(name).filter(|value| !value.is_empty());
    let mut limits = Limits::default();
    for (name, units) in SIZES {
        let Some(text) = given(name) else { continue };
        let size = match units {
            true => text.parse::<ByteSize>().ok(),
            false => text.parse().ok().filter(|bytes| *bytes <= i64::MAX as u64).map(ByteSize),
        };
        let wanted = if units { "write 512M or 10G" } else { "write a number of bytes" };
        let size = size.filter(|size| size.0 > 0).ok_or_else(|| bad(name, text).hint(wanted))?;
        limits.size.get_or_insert(size);
    }
    for name in INODES {
        let Some(text) = given(name) else { continue };
        let number = text.parse().ok().filter(|number| *number > 0);
        limits.inodes.get_or_insert(number.ok_or_else(|| bad(name, text).hint("write a number"))?);
    }
    Ok(limits)
}

/// Whose files a container's ids are outside of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct IdMaps {
    pub users: IdMap,
    pub groups: IdMap,
}

impl IdMaps {
    /// What [`Display`](fmt::Display) wrote.
    pub(super) fn parse(text: &str) -> Result<IdMaps> {
        let (users, groups) = text.split_once(' ').ok_or_else(|| invalid(format!("{text:?} are no two mappings")))?;
        Ok(IdMaps { users: IdMap::parse(users)?, groups: IdMap::parse(groups)? })
    }

    /// For mounts that map ids.
    pub(super) fn user_namespace(&self) -> Result<OwnedFd> {
        mount::user_namespace(&self.users.ranges(), &self.groups.ranges())
    }
}

impl fmt::Display for IdMaps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.users, self.groups)
    }
}

/// The mappings, if the labels have any; one of them alone is an error.
pub(super) fn id_maps(labels: &Labels) -> Result<Option<IdMaps>> {
    let parse = |name: &str| labels.get(name).map(|text| IdMap::parse(text).doing(|| format!("label {name}")));
    match (parse(UIDS).transpose()?, parse(GIDS).transpose()?) {
        (None, None) => Ok(None),
        (Some(users), Some(groups)) => Ok(Some(IdMaps { users, groups })),
        _ => Err(invalid(format!("{UIDS} and {GIDS} come together"))),
    }
}

/// Pieces of `INSIDE:OUTSIDE:COUNT`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct IdMap(Vec<(u32, u32, u32)>);

impl IdMap {
    fn parse(text: &str) -> Result<IdMap> {
        let piece = |piece: &str| {
            let mut numbers = piece.split(':').map(|number| number.parse::<u32>().ok());
            let mut next = || numbers.next().flatten();
            let (inside, outside, count) = (next()?, next()?, next()?);
            let more = count.checked_sub(1)?;
            let fits = inside.checked_add(more).is_some() && outside.checked_add(more).is_some();
            (fits && numbers.next().is_none()).then_some((inside, outside, count))
        };
        let pieces: Option<Vec<_>> = text.split(',').map(piece).collect();
        let map = pieces.map(IdMap).ok_or_else(|| {
            invalid(format!("{text:?} is no mapping of ids")).hint("write INSIDE:OUTSIDE:COUNT, several with commas")
        })?;
        map.outside(0).map(drop).hint(|| "the container's root has to be mapped")?;
        Ok(map)
    }

    /// The id outside of the container.
    pub(super) fn outside(&self, inside: u32) -> Result<u32> {
        let piece = self.0.iter().find(|(first, _, count)| inside >= *first && inside - first < *count);
        let found = piece.map(|(first, outside, _)| outside + (inside - first));
        found.ok_or_else(|| invalid(format!("id {inside} is not mapped")))
    }
}

/// As labels have it.
impl fmt::Display for IdMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut comma = "";
        self.0.iter().try_for_each(|(inside, outside, count)| {
            write!(f, "{comma}{inside}:{outside}:{count}")?;
            comma = ",";
            Ok(())
        })
    }
}

/// On disk the host's own root is this one, if the container has no such user. It has to be somebody there: overlayfs makes
/// directories and whiteouts as whoever mounts it. No image has files of it, and every filesystem can store it.
const HOST_ROOT: u32 = i32::MAX as u32 - 1;

impl IdMap {
    fn ranges(&self) -> Vec<IdRange> {
        let covers = |first: u32, count: u32, id: u32| id >= first && id - first < count;
        let mut all: Vec<_> = self.0.iter().map(|&(disk, shown, count)| IdRange { disk, shown, count }).collect();
        let mut free = std::iter::once(HOST_ROOT).chain(all.iter().map(|range| range.disk.saturating_add(range.count)));
        let free = free.find(|id| !all.iter().any(|range| covers(range.disk, range.count, *id)));
        if let Some(disk) = free.filter(|_| !all.iter().any(|range| covers(range.shown, range.count, 0))) {
            all.push(IdRange { disk, shown: 0, count: 1 });
        }
        all
    }
}

fn bad(name: &str, text: &str) -> Error {
    invalid(format!("label {name} is {text:?}"))
}

fn invalid(reason: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidInput, reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect()
    }

    #[test]
    fn sizes_are_read_and_nonsense_is_refused() {
        let size = |pairs: &[(&str, &str)]| limits(&labels(pairs)).map(|limits| limits.size.map(|size| size.0));
        assert_eq!(size(&[]).unwrap(), None);
        assert_eq!(size(&[("containerd.io/snapshot/max-size", "4096")]).unwrap(), Some(4096));
        assert_eq!(size(&[("graphdriver.io/size", "1M")]).unwrap(), Some(1 << 20));
        let both = [("graphdriver.io/size", "2k"), ("containerd.io/snapshot/max-size", "4096")];
        assert_eq!(size(&both).unwrap(), Some(2048));
        for (name, value) in [
            ("containerd.io/snapshot/max-size", "1M"),
            ("containerd.io/snapshot/max-size", "-1"),
            ("containerd.io/snapshot/max-size", "0"),
            ("containerd.io/snapshot/max-size", "9223372036854775808"),
            ("graphdriver.io/size", "much"),
            ("graphdriver.io/size", "0"),
            ("containerd.io/snapshot/graphdriver.size", "banana"),
        ] {
            let e = size(&[(name, value)]).unwrap_err();
            assert!(e.kind() == ErrorKind::InvalidInput && e.to_string().contains(name), "{e}");
        }
        let handed_on =
            [("containerd.io/snapshot/graphdriver.size", "3k"), ("containerd.io/snapshot/max-size", "4096")];
        assert_eq!(size(&handed_on).unwrap(), Some(3072));
        for name in INODES {
            assert_eq!(limits(&labels(&[(name, "7")])).unwrap().inodes, Some(7));
            assert!(limits(&labels(&[(name, "-7")])).is_err());
        }
    }

    #[test]
    fn ids_are_mapped_piece_by_piece() {
        let maps = id_maps(&labels(&[(UIDS, "0:1000:1,1:100000:65535"), (GIDS, "0:7:10")])).unwrap().unwrap();
        assert_eq!([0, 1, 65535].map(|id| maps.users.outside(id).unwrap()), [1000, 100_000, 165_534]);
        assert_eq!(maps.groups.outside(9).unwrap(), 16);
        assert!(maps.groups.outside(10).is_err());
        assert_eq!(IdMaps::parse(&maps.to_string()).unwrap(), maps);
        assert_eq!(id_maps(&Labels::new()).unwrap(), None);
        assert!(id_maps(&labels(&[(UIDS, "0:1:2")])).is_err());
        for bad in ["", "0", "0:1", "0:1:0", "1:1:1", "0:1:2:3", "0:4294967295:2", "a:b:c"] {
            assert!(IdMap::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_hosts_root_is_somebody_on_disk() {
        let last = |text: &str| *IdMap::parse(text).unwrap().ranges().last().unwrap();
        let root = |disk| IdRange { disk, shown: 0, count: 1 };
        assert_eq!(last("0:1000:100"), root(HOST_ROOT));
        assert_eq!(last("0:1000:2147483647"), root(2_147_483_647));
        // There already.
        assert_eq!(last("0:0:100"), IdRange { disk: 0, shown: 0, count: 100 });
    }

    #[test]
    fn long_labels_are_refused() {
        check(&labels(&[("a", &"x".repeat(4095))])).unwrap();
        assert!(check(&labels(&[("a", &"x".repeat(4096))])).is_err());
        let many = |count: usize| (0..count).map(|n| (format!("{n:024}"), "x".repeat(1000))).collect::<Labels>();
        check(&many(1024)).unwrap();
        assert!(check(&many(1025)).is_err());
    }
}
