//! A driver and the reference in lock step.

use super::{Subject, subject::hard_links};
use crate::{
    Access, Change, Context, GraphDriver, LayerId, LayerOptions, Result,
    model::{MemSink, MemTree, ModelDriver, Node, Op, Snapshot, Tree, diff_by, differs},
    tar,
};
use rustix::io::Errno;
use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

/// What is done to the driver is done to the reference, and what can be seen is compared.
pub struct Twin<'s> {
    pub subject: &'s mut dyn Subject,
    model: ModelDriver,
    parents: BTreeMap<LayerId, Vec<LayerId>>,
    next: u64,
    clock: i64,
    /// Whether an operation was left out, so that later ones may fail.
    refused: bool,
}

impl<'s> Twin<'s> {
    pub fn new(subject: &'s mut dyn Subject) -> Result<Self> {
        Self::numbered(subject, 1)
    }

    /// Layers get numbers from `first` on.
    pub fn numbered(subject: &'s mut dyn Subject, first: u64) -> Result<Self> {
        let links = hard_links(subject, LayerId(first)).doing(|| "finding out about hard links")?;
        let model = ModelDriver::new().with_links(links);
        // Not the present, so that a time from the clock is never taken for one that was set.
        Ok(Twin { subject, model, parents: BTreeMap::new(), next: first + 2, clock: 1_000_000_000, refused: false })
    }

    /// A new active layer.
    pub fn create(&mut self, parent: Option<LayerId>) -> Result<LayerId> {
        let id = LayerId(self.next);
        self.next += 1;
        let parents: Vec<LayerId> =
            parent.into_iter().chain(parent.iter().flat_map(|p| self.parents[p].clone())).collect();
        self.model.create(id, &parents, &LayerOptions::default())?;
        self.subject.driver().create(id, &parents, &LayerOptions::default())?;
        self.parents.insert(id, parents);
        if parent.is_none() {
            self.run(id, &[])?;
        }
        Ok(id)
    }

    /// A committed layer in which this was done.
    pub fn layer(&mut self, parent: Option<LayerId>, ops: &[Op]) -> Result<LayerId> {
        let id = self.create(parent)?;
        self.run(id, ops)?;
        self.commit(id)?;
        Ok(id)
    }

    /// Does the same to both trees of an active layer, through one mount, and compares each outcome. Every operation has
    /// to succeed.
    pub fn run(&mut self, id: LayerId, ops: &[Op]) -> Result<()> {
        self.run_each(id, ops, true)
    }

    /// The same where operations may fail, if they do so alike.
    pub fn try_run(&mut self, id: LayerId, ops: &[Op]) -> Result<()> {
        self.run_each(id, ops, false)
    }

    fn run_each(&mut self, id: LayerId, ops: &[Op], must_succeed: bool) -> Result<()> {
        let mut model = self.model.tree(id, &[])?;
        let changes_times = self.subject.changes_times_by_refused_renames();
        let Twin { clock, refused, .. } = self;
        self.subject.with_tree(id, &self.parents[&id], Access::ReadWrite, &mut |tree| {
            for op in ops {
                let outcome = step(tree, &mut model, op);
                *refused |= outcome == Err(Errno::XDEV);
                if let (Op::Rename { from, to }, Err(Errno::EXIST | Errno::NOTEMPTY), true) =
                    (op, outcome, changes_times)
                {
                    for dir in [from, to].map(|path| path.parent().unwrap_or(Path::new(""))) {
                        *clock += 1;
                        step(tree, &mut model, &Op::utimes(dir, *clock, 0))?;
                    }
                }
                assert!(outcome.is_ok() || *refused || !must_succeed, "{op:?}: {outcome:?}");
            }
            // The clock gave these inodes times that no two trees share.
            for path in model.copy()?.touched() {
                *clock += 1;
                step(tree, &mut model, &Op::utimes(path, *clock, (*clock % 1_000_000_000) as u32))?;
            }
            same_tree(&format!("layer {id}, while it is mounted"), &tree.snapshot()?, &model.snapshot()?);
            Ok(())
        })
    }

    pub fn commit(&mut self, id: LayerId) -> Result<()> {
        self.model.commit(id)?;
        self.subject.driver().commit(id)
    }

    pub fn remove(&mut self, id: LayerId) -> Result<()> {
        self.parents.remove(&id);
        self.model.remove(id)?;
        self.subject.driver().remove(id)
    }

    /// Removes all layers, children first.
    pub fn remove_all(&mut self) -> Result<()> {
        let all: Vec<LayerId> = self.parents.keys().rev().copied().collect();
        all.into_iter().try_for_each(|id| self.remove(id))
    }

    /// The reference's tree.
    pub fn expected(&self, id: LayerId) -> Result<Snapshot> {
        self.model.tree(id, &[])?.snapshot()
    }

    fn base_tree(&self, id: LayerId) -> Result<Option<MemTree>> {
        self.parents[&id].first().map(|parent| self.model.tree(*parent, &[])?.copy()).transpose()
    }

    /// The layer shows what the reference shows.
    pub fn check_tree(&self, id: LayerId) -> Result<()> {
        let shown = snapshot(self.subject, id, &self.parents[&id])?;
        same_tree(&format!("layer {id}"), &shown, &self.expected(id)?);
        Ok(())
    }

    /// The tree, the lists of changes of the walk and of the native diff, and what the layer tar makes of a fresh layer on
    /// the same parent, on the driver and in the reference.
    pub fn check(&mut self, id: LayerId) -> Result<()> {
        self.check_tree(id)?;
        let upper = self.expected(id)?;
        let lower = self.base_tree(id)?.map(|tree| tree.snapshot()).transpose()?;
        let linked = self.linked_below(id)?;
        let native = self.subject.driver().capabilities().native_diff;
        for native in [false, true].into_iter().filter(|n| !n || native) {
            let how = if native { "native diff" } else { "walk" };
            let parents = &self.parents[&id];
            let listed = self.subject.changes(id, parents, native).doing(|| format!("the {how} of layer {id}"))?;
            same_changes(&format!("{how} of layer {id}"), &listed, lower.as_ref(), &upper, &linked);
            let tar = self.subject.diff_tar(id, parents, native).doing(|| format!("the tar of layer {id}"))?;
            self.check_tar(id, how, &tar, &upper)?;
        }
        Ok(())
    }

    /// What has several names in any layer below.
    fn linked_below(&self, id: LayerId) -> Result<Vec<Node>> {
        let mut linked = Vec::new();
        for parent in &self.parents[&id] {
            linked.extend(self.expected(*parent)?.into_values().filter(|node| node.names.len() > 1));
        }
        Ok(linked)
    }

    fn check_tar(&mut self, id: LayerId, how: &str, tar: &[u8], upper: &Snapshot) -> Result<()> {
        let mut tree = self.base_tree(id)?.unwrap_or_default();
        let same = |place: &str, got: Snapshot| {
            same_tree(&format!("the tar ({how}) of layer {id} in {place}"), &got, upper);
        };
        tar::apply(&mut &*tar, &mut MemSink::new(&mut tree)).doing(|| "applying a layer tar to the reference")?;
        same("the reference", tree.snapshot()?);

        let fresh = LayerId(self.next);
        self.next += 1;
        let parents = &self.parents[&id];
        let driver = self.subject.driver();
        driver.create(fresh, parents, &LayerOptions::default())?;
        self.subject.fill(fresh, parents, &mut &*tar, None).doing(|| "unpacking a layer tar")?;
        driver.commit(fresh)?;
        let shown = snapshot(self.subject, fresh, parents)?;
        same("a fresh layer", shown);
        driver.remove(fresh)
    }
}

/// What a read-only mount of the layer shows.
pub fn snapshot(subject: &dyn Subject, id: LayerId, parents: &[LayerId]) -> Result<Snapshot> {
    let mut shown = Snapshot::new();
    subject.with_tree(id, parents, Access::ReadOnly, &mut |tree| {
        shown = tree.snapshot()?;
        Ok(())
    })?;
    Ok(shown)
}

fn step(tree: &mut dyn Tree, model: &mut dyn Tree, op: &Op) -> Result<(), Errno> {
    let got = tree.apply(op);
    if got == Err(Errno::XDEV) && matches!(op, Op::Rename { .. }) {
        // rename(2) may refuse to move a directory that is partly in a lower layer; `mv` then copies. Nothing must
        // have happened, which the comparison of the trees will show.
        return got;
    }
    let want = model.apply(op);
    let same_meaning = matches!(
        (got, want),
        // POSIX leaves the choice for a rename onto a directory that is not empty.
        (Err(Errno::EXIST | Errno::NOTEMPTY), Err(Errno::EXIST | Errno::NOTEMPTY))
    );
    assert!(got == want || same_meaning, "{op:?}: the driver says {got:?}, the reference {want:?}");
    got
}

/// Panics with the paths that differ.
pub fn same_tree(what: &str, got: &Snapshot, want: &Snapshot) {
    let paths: BTreeSet<&PathBuf> = got.keys().chain(want.keys()).collect();
    let differing: Vec<String> = paths
        .into_iter()
        .filter(|path| got.get(*path) != want.get(*path))
        .map(|path| match (got.get(path), want.get(path)) {
            (Some(got), Some(want)) => format!("/{}\n    is        {got:?}\n    should be {want:?}", path.display()),
            (None, _) => format!("/{} is missing", path.display()),
            (_, None) => format!("/{} should not be there", path.display()),
        })
        .collect();
    assert!(differing.is_empty(), "{what} is not as it should be:\n  {}", differing.join("\n  "));
}

/// Panics with the changes that are missing and those that are too many. A file that has or had several names, in this layer
/// or as one of `linked` in any below, may be listed although nothing, or nothing but its names, changed: only some
/// filesystems tell these cases apart, overlayfs goes on counting names that are gone, and a layer tar is compared by
/// what it makes.
fn same_changes(what: &str, got: &[Change], lower: Option<&Snapshot>, upper: &Snapshot, linked: &[Node]) {
    let several = |node: &Node| node.names.len() > 1 || linked.iter().any(|old| !differs(old, node));
    let least = diff_by(lower, upper, differs);
    let most = diff_by(lower, upper, |a, b| differs(a, b) || several(a) || several(b));
    let missing: Vec<&Change> = least.iter().filter(|change| !got.contains(change)).collect();
    let extra: Vec<&Change> = got.iter().filter(|change| !most.contains(change)).collect();
    assert!(missing.is_empty() && extra.is_empty(), "{what} lacks {missing:?} and has too many: {extra:?}");
    assert!(got.is_sorted_by(|a, b| a.path < b.path), "{what} is not in the order of a walk: {got:?}");
}
