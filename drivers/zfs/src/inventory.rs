//! What lies in the store's dataset, looked at and left alone.

use crate::{
    Kind,
    home::{COMMITTED, Names},
};
use graphdriver_core::{LayerId, Result, Stored, StoredAs};
use graphdriver_quota::refquota::zfs;
use std::collections::HashSet;

/// See [`GraphDriver::inventory`](graphdriver_core::GraphDriver::inventory).
pub(crate) fn inventory(names: &Names) -> Result<Vec<Stored>> {
    let out = zfs(&["list", "-H", "-r", "-t", "all", "-o", "name", names.root()])?;
    let all: HashSet<&str> = out.lines().collect();
    let below = |name: &&str| name.strip_prefix(names.root()).is_some_and(|rest| !rest.is_empty());
    let committed = |id: LayerId| all.contains(names.committed(id).as_str());
    let stored = |name: &str| identify(&name[names.root().len()..], &committed);
    let found = out.lines().filter(below).filter_map(|name| {
        let what = stored(name)?;
        Some(Stored { place: format!("dataset {name}"), what })
    });
    Ok(found.collect())
}

/// What `/DATASET` or `/DATASET@SNAPSHOT` is; none for what belongs to something that is told of.
fn identify(name: &str, committed: &dyn Fn(LayerId) -> bool) -> Option<StoredAs> {
    let (dataset, snapshot) = name.split_once('@').map_or((name, None), |(dataset, name)| (dataset, Some(name)));
    let dataset = dataset.strip_prefix('/').unwrap_or_default();
    match (Kind::of(dataset), snapshot) {
        (Kind::Layer(id), None) => Some(StoredAs::Layer { id, committed: committed(id) }),
        (Kind::New(id), None) => Some(StoredAs::Leftover { of: Some(id) }),
        (Kind::Removed, None) => {
            Some(StoredAs::Leftover { of: dataset.strip_prefix("removed-").and_then(|id| id.parse().ok()) })
        }
        // They go with their datasets.
        (Kind::New(_) | Kind::Removed, Some(_)) => None,
        (Kind::Layer(_), Some(COMMITTED)) => None,
        // What `zfs diff` compares with, for as long as it runs.
        (Kind::Layer(_), Some(name)) if name.starts_with("zfs-diff-") => None,
        (Kind::Other, None | Some(COMMITTED)) if dataset == "empty" => None,
        _ => Some(StoredAs::Alien),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_leftovers_and_what_is_none_of_ours_are_told_apart() {
        let look = |name| identify(name, &|id| id == LayerId(7));
        for none in
            ["/7@committed", "/empty", "/empty@committed", "/new-8@committed", "/7@zfs-diff-12-0000000000000001"]
        {
            assert_eq!(look(none), None, "{none}");
        }
        assert_eq!(look("/7"), Some(StoredAs::Layer { id: LayerId(7), committed: true }));
        assert_eq!(look("/8"), Some(StoredAs::Layer { id: LayerId(8), committed: false }));
        for left in ["/new-9", "/removed-9"] {
            assert_eq!(look(left), Some(StoredAs::Leftover { of: Some(LayerId(9)) }), "{left}");
        }
        for alien in ["/mine", "/7/nested", "/7@daily", "@daily", "/empty@daily", "/07"] {
            assert_eq!(look(alien), Some(StoredAs::Alien), "{alien}");
        }
    }
}
