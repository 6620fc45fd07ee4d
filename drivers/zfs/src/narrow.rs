//! Native diff: from what `zfs diff` says to where the walk has to look.

use crate::{Layer, Zfs, changes::Changes, home::mount_point, private::with_mounts};
use graphdriver_core::{Access, Candidates, Context, LayerId, Narrow, Result, Root, mount, root::names_in};
use graphdriver_quota::refquota::{list, objects, set_property, zfs};
use rustix::io::Errno;
use std::{
    collections::{BTreeSet, HashMap},
    ffi::OsString,
    os::fd::AsFd,
    path::Path,
};

/// Says of a committed layer whether ZFS finds a path for each of its files, if the layers below are so too: `plain` or
/// `odd`. Found out when it is first asked for.
const LINKS: &str = "org.graphdriver:links";

/// Everything has to be compared.
pub(crate) struct Everywhere;

impl Narrow for Everywhere {
    fn candidates(&mut self, _dir: &Path) -> Result<Candidates> {
        Ok(Candidates::All)
    }
}

/// What changed between two trees that are there.
pub(crate) struct Between {
    changes: Changes,
    lower: Root,
    upper: Root,
}

impl Narrow for Between {
    fn candidates(&mut self, dir: &Path) -> Result<Candidates> {
        if self.changes.moved.contains(dir) {
            return Ok(Candidates::All);
        }
        let mut names: BTreeSet<OsString> = self.changes.names.get(dir).cloned().unwrap_or_default();
        if self.changes.modified.contains(dir) {
            for tree in [&self.lower, &self.upper] {
                names.extend(entries(tree, dir).doing(|| format!("reading the changes in {}", dir.display()))?);
            }
        }
        Ok(Candidates::Names(names.into_iter().collect()))
    }
}

fn entries(tree: &Root, dir: &Path) -> Result<Vec<OsString>> {
    match tree.open_dir_nofollow(dir) {
        Ok(fd) => names_in(fd.as_fd()),
        // Somebody is changing it this moment.
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(Vec::new()),
        Err(e) => Err(e.into()),
    }
}

impl Zfs {
    pub(crate) fn narrow_layer(&self, id: LayerId, parents: &[LayerId]) -> Result<Box<dyn Narrow>> {
        let (layer, [parent, ..]) = (self.layer(id)?, parents) else { return Ok(Box::new(Everywhere)) };
        if !self.are_plain(parents)? {
            return Ok(Box::new(Everywhere));
        }
        let Some(changes) = self.changes(id, &layer)? else { return Ok(Box::new(Everywhere)) };
        let (lower, upper) = (self.view(*parent)?, self.view(id)?);
        if changes.everything || has_more_names(&changes, &upper)? || has_lost_paths(&changes, &lower, &upper)? {
            return Ok(Box::new(Everywhere));
        }
        Ok(Box::new(Between { changes, lower, upper }))
    }

    fn view(&self, id: LayerId) -> Result<Root> {
        mount::detached(&self.recipe(id, Access::ReadOnly)?).map(Root::from_fd)
    }

    /// Whether ZFS finds every file of these committed layers, topmost first.
    fn are_plain(&self, chain: &[LayerId]) -> Result<bool> {
        let names: Vec<String> = chain.iter().map(|id| self.names.layer(*id)).collect();
        let known = list(&[LINKS], &names.iter().map(String::as_str).collect::<Vec<_>>())?;
        let known: HashMap<&str, &str> = known.iter().map(|row| (row.name.as_str(), row.values[0].as_str())).collect();
        // From the bottom: a layer's own count says something only if those below are plain.
        for (id, name) in chain.iter().zip(&names).rev() {
            let plain = match known.get(name.as_str()) {
                Some(&"plain") => true,
                Some(&"odd") => false,
                _ => self.find_plain(*id)?,
            };
            if !plain {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Finds out and notes whether ZFS finds every file of a committed layer, given that it does for the layers below.
    /// Where it cannot be found out now: no, without a note.
    fn find_plain(&self, id: LayerId) -> Result<bool> {
        let layer = self.layer(id)?;
        let Some(changes) = self.changes(id, &layer)? else { return Ok(false) };
        let counts = (objects(&layer.origin)?, objects(&self.names.committed(id))?);
        let plain = match counts {
            (Some(old), Some(new)) => !changes.relinked && new as i64 - old as i64 == changes.balance,
            _ => false,
        };
        set_property(&self.names.layer(id), LINKS, if plain { "plain" } else { "odd" })?;
        Ok(plain)
    }

    /// What `zfs diff` says of a layer and what it is a clone of. ZFS wants both datasets mounted. None if it would take
    /// its paths from a mount that is covered.
    fn changes(&self, id: LayerId, layer: &Layer) -> Result<Option<Changes>> {
        let origin = layer.origin.split('@').next().unwrap_or_default();
        let to = match layer.committed {
            true => self.names.committed(id),
            false => {
                self.flush(id)?;
                self.names.layer(id)
            }
        };
        let [lower, upper] = ["from", "to"].map(|what| mount_point(&self.home, what));
        let upper = upper.canonicalize()?;
        let mounts = [
            (lower, vec![self.head(origin, true)]),
            (upper.clone(), vec![self.head(&self.names.layer(id), layer.committed)]),
        ];
        let printed = with_mounts(&mounts, || zfs(&["diff", "-FHt", &layer.origin, &to]))?;
        printed.map(|printed| Changes::parse(printed.as_bytes(), &upper)).transpose()
    }
}

/// Whether a modified file has names that `zfs diff` does not tell.
fn has_more_names(changes: &Changes, upper: &Root) -> Result<bool> {
    for file in &changes.files {
        match upper.inode(file)? {
            Some(inode) if inode.nlink == 1 => {}
            // Not there: it was renamed or removed this moment.
            _ => return Ok(true),
        }
    }
    Ok(false)
}

/// Whether something that is said to be gone is there still.
fn has_lost_paths(changes: &Changes, lower: &Root, upper: &Root) -> Result<bool> {
    for file in &changes.gone {
        if let (Some(old), Some(new)) = (lower.inode(file)?, upper.inode(file)?)
            && old.ino == new.ino
        {
            return Ok(true);
        }
    }
    Ok(false)
}
