//! The suite can fail: drivers that break one promise each, and the cases that must notice.

use graphdriver_core::{
    Access, Capabilities, Change, ChangeKind, FileKind, GraphDriver, LayerId, LayerOptions, Limits, Mount, Reclaimed,
    Result, Stored, Usage,
    conformance::{Setup, Subject, Visit, cases, run_case},
    model::{ModelDriver, Op, Tree},
};
use std::{
    collections::BTreeMap,
    io::Read,
    path::Path,
    sync::{Arc, Mutex},
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    /// A layer shows what its youngest child wrote.
    SharedWithChildren,
    LosesDeletions,
    ListsOnlyTopLevel,
    IgnoresSizes,
    ClaimsQuota,
    KeepsLimits,
    CommitForgets,
    CommitDoesNotFreeze,
    ThawDoesNothing,
    RemoveFailsTheSecondTime,
    RemoveKeepsTheLayer,
    ReclaimFreesTheKnown,
    ReclaimFreesNothing,
    InventoryForgetsTheLast,
    ForgetsOnReopen,
    AcceptsUnknownParents,
    ReadOnlyIsWritable,
    UnpacksWithoutAttributes,
    UnpacksWholeSeconds,
    UnpacksLinksAsCopies,
    FillsHoles,
    ClosedRoot,
    CountsParents,
    UnlimitedDepth,
}

/// For each fault, cases that must be red.
const MUST_NOTICE: &[(Fault, &[&str])] = &[
    (
        Fault::SharedWithChildren,
        &["siblings_and_parent_never_see_a_layers_changes", "random_operations_equal_the_model"],
    ),
    (
        Fault::LosesDeletions,
        &[
            "adds_changes_and_deletes_are_reproduced",
            "the_change_list_is_exactly_this",
            "deletions_stay_hidden_in_children",
            "nested_deletions_additions_and_replacements_combine",
            "random_operations_equal_the_model",
        ],
    ),
    (Fault::ListsOnlyTopLevel, &["the_change_list_is_exactly_this", "a_file_is_renamed_within_and_across_directories"]),
    (Fault::IgnoresSizes, &["a_size_that_cannot_be_enforced_is_refused"]),
    (
        Fault::ClaimsQuota,
        &[
            "what_fits_the_size_is_written_and_more_is_refused",
            "a_full_layer_breaks_nothing_else",
            "inodes_are_limited",
        ],
    ),
    (
        Fault::KeepsLimits,
        &[
            "a_limit_is_read_raised_and_lifted_on_an_existing_layer",
            "a_limit_below_what_is_taken_lets_nothing_more_in_and_loses_nothing",
            "limits_are_there_after_opening_again",
            "a_layer_without_a_limit_gets_one_while_it_holds_files",
            "inodes_are_limited",
        ],
    ),
    (Fault::CommitForgets, &["commit_can_be_repeated", "layers_are_there_after_opening_again"]),
    (Fault::CommitDoesNotFreeze, &["a_committed_layer_cannot_be_mounted_for_writing"]),
    (Fault::ThawDoesNothing, &["a_commit_can_be_undone"]),
    (Fault::RemoveFailsTheSecondTime, &["remove_can_be_repeated"]),
    (Fault::RemoveKeepsTheLayer, &["remove_can_be_repeated", "a_number_can_be_made_again_after_removal"]),
    (Fault::ReclaimFreesTheKnown, &["reclaim_frees_the_unknown_and_keeps_the_known"]),
    (Fault::ReclaimFreesNothing, &["reclaim_frees_the_unknown_and_keeps_the_known"]),
    (Fault::InventoryForgetsTheLast, &["reclaim_frees_the_unknown_and_keeps_the_known"]),
    (Fault::ForgetsOnReopen, &["layers_are_there_after_opening_again", "a_child_equals_its_base"]),
    (Fault::AcceptsUnknownParents, &["an_unknown_parent_is_refused_and_nothing_is_left"]),
    (Fault::ReadOnlyIsWritable, &["a_read_only_mount_gives_erofs"]),
    (Fault::UnpacksWithoutAttributes, &["extended_attributes_hold", "file_capabilities_hold", "posix_acls_hold"]),
    (Fault::UnpacksWholeSeconds, &["times_hold_to_the_nanosecond_before_1970_and_after_2038"]),
    (Fault::UnpacksLinksAsCopies, &["hard_links_within_a_layer_hold", "files_with_hard_links_are_moved"]),
    (Fault::FillsHoles, &["sparse_files_stay_sparse"]),
    (Fault::ClosedRoot, &["an_empty_layer_is_an_empty_root_of_mode_0755"]),
    (Fault::CountsParents, &["usage_counts_the_layers_own_and_not_its_parents"]),
    (Fault::UnlimitedDepth, &["the_deepest_chain_mounts_and_one_more_is_refused"]),
];

#[test]
fn every_fault_is_noticed_by_the_cases_that_promise_otherwise() {
    let pairs = MUST_NOTICE.iter().flat_map(|(fault, names)| names.iter().map(move |name| (*fault, *name)));
    let missed: Vec<_> = pairs.filter(|(fault, name)| outcome(*fault, name).is_ok()).collect();
    assert!(missed.is_empty(), "not noticed: {missed:?}");
}

#[test]
fn without_a_fault_the_same_cases_are_green() {
    for name in MUST_NOTICE.iter().flat_map(|(_, names)| *names) {
        assert_eq!(outcome(Fault::None, name), Ok(()), "{name}");
    }
}

fn outcome(fault: Fault, name: &str) -> Result<(), String> {
    let case = cases().find(|case| case.name == name).unwrap_or_else(|| panic!("there is no case {name}"));
    // What only drivers with quota can be asked, and what only those without.
    let quota = !matches!(name, "a_size_that_cannot_be_enforced_is_refused");
    let setup = Setup::new("broken", move || Ok(Box::new(Broken::new(fault, quota))));
    run_case(&setup, case).unwrap_or_else(|missing| panic!("{name} was not run: {missing}"))
}

struct Broken {
    model: ModelDriver,
    fault: Fault,
    capabilities: Capabilities,
    parents: Arc<Mutex<BTreeMap<LayerId, Vec<LayerId>>>>,
}

impl Broken {
    fn new(fault: Fault, quota: bool) -> Self {
        let model = if quota { ModelDriver::new() } else { ModelDriver::new().without_quota() };
        let mut capabilities = model.capabilities().clone();
        if fault == Fault::UnlimitedDepth {
            capabilities.max_depth = 5;
        }
        Broken { model, fault, capabilities, parents: Arc::default() }
    }

    fn shown(&self, id: LayerId) -> LayerId {
        let parents = self.parents.lock().unwrap();
        let child = parents.iter().filter(|(_, chain)| chain.first() == Some(&id)).map(|(child, _)| *child).max();
        child.filter(|_| self.fault == Fault::SharedWithChildren).unwrap_or(id)
    }

    /// What unpacking did wrong.
    fn spoil(&self, tree: &mut dyn Tree) -> Result<()> {
        for (path, node) in tree.snapshot()? {
            match self.fault {
                Fault::UnpacksWithoutAttributes => {
                    for name in node.meta.xattrs.keys() {
                        tree.apply(&Op::remove_xattr(&path, name))?;
                    }
                }
                Fault::UnpacksWholeSeconds => tree.apply(&Op::utimes(&path, node.meta.mtime.secs, 0))?,
                Fault::UnpacksLinksAsCopies if node.names.len() > 1 => {
                    tree.apply(&Op::unlink(&path))?;
                    tree.apply(&Op::write(&path, ""))?;
                }
                Fault::FillsHoles if matches!(node.meta.kind, FileKind::File { size } if size < 64 << 20) => {
                    let data = tree.read(&path)?;
                    tree.apply(&Op::write(&path, data))?;
                    tree.apply(&Op::Utimes { path, mtime: node.meta.mtime })?;
                }
                _ => {}
            }
        }
        Ok(())
    }
}

impl GraphDriver for Broken {
    fn name(&self) -> &'static str {
        "broken"
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn create(&self, id: LayerId, parents: &[LayerId], options: &LayerOptions) -> Result<()> {
        let ignores = matches!(self.fault, Fault::IgnoresSizes | Fault::ClaimsQuota);
        let options = if ignores { &LayerOptions::default() } else { options };
        let parents = if self.fault == Fault::AcceptsUnknownParents { &[] } else { parents };
        self.model.create(id, parents, options)?;
        if self.fault == Fault::ClosedRoot {
            self.model.tree(id, parents)?.apply(&Op::chmod("", 0o700))?;
        }
        self.parents.lock().unwrap().insert(id, parents.to_vec());
        Ok(())
    }

    fn commit(&self, id: LayerId) -> Result<()> {
        match self.fault {
            Fault::CommitDoesNotFreeze => Ok(()),
            Fault::CommitForgets => {
                self.model.remove(id)?;
                self.model.create(id, &[], &LayerOptions::default())
            }
            _ => self.model.commit(id),
        }
    }

    fn thaw(&self, id: LayerId) -> Result<()> {
        if self.fault == Fault::ThawDoesNothing { Ok(()) } else { self.model.thaw(id) }
    }

    fn mount(&self, id: LayerId, parents: &[LayerId], access: Access) -> Result<Vec<Mount>> {
        self.model.mount(id, parents, access)
    }

    fn limits(&self, id: LayerId) -> Result<Limits> {
        self.model.limits(id)
    }

    fn set_limits(&self, id: LayerId, limits: Limits) -> Result<()> {
        if self.fault == Fault::KeepsLimits { Ok(()) } else { self.model.set_limits(id, limits) }
    }

    fn usage(&self, id: LayerId) -> Result<Usage> {
        let mut usage = self.model.usage(id)?;
        if self.fault == Fault::CountsParents {
            for parent in self.parents.lock().unwrap().get(&id).into_iter().flatten() {
                usage.bytes += self.model.usage(*parent)?.bytes;
            }
        }
        Ok(usage)
    }

    fn remove(&self, id: LayerId) -> Result<()> {
        match self.fault {
            Fault::RemoveFailsTheSecondTime => self.model.usage(id).map(drop)?,
            Fault::RemoveKeepsTheLayer => return Ok(()),
            _ => {}
        }
        self.parents.lock().unwrap().remove(&id);
        self.model.remove(id)
    }

    fn reclaim(&self, known: &dyn Fn(LayerId) -> bool) -> Result<Reclaimed> {
        match self.fault {
            Fault::ReclaimFreesTheKnown => self.model.reclaim(&|_| false),
            Fault::ReclaimFreesNothing => Ok(Reclaimed::default()),
            _ => self.model.reclaim(known),
        }
    }

    fn inventory(&self) -> Result<Vec<Stored>> {
        match self.fault {
            Fault::InventoryForgetsTheLast => self.model.inventory().map(|mut all| {
                all.pop();
                all
            }),
            _ => self.model.inventory(),
        }
    }
}

impl Subject for Broken {
    fn driver(&self) -> &dyn GraphDriver {
        self
    }

    fn reopen(&mut self) -> Result<()> {
        if self.fault == Fault::ForgetsOnReopen {
            self.model = ModelDriver::new();
        }
        Ok(())
    }

    fn keeps_records(&self) -> bool {
        false
    }

    fn shows_directories(&self) -> bool {
        false
    }

    fn with_tree(&self, id: LayerId, parents: &[LayerId], access: Access, run: Visit<'_>) -> Result<()> {
        self.mount(id, parents, access)?;
        let writable = self.fault == Fault::ReadOnlyIsWritable;
        run(&mut self.model.access(self.shown(id), if writable { Access::ReadWrite } else { access })?)
    }

    fn changes(&self, id: LayerId, parents: &[LayerId], native: bool) -> Result<Vec<Change>> {
        let mut changes = self.model.changes(id, parents, native)?;
        changes.retain(|change| match self.fault {
            Fault::LosesDeletions => change.kind != ChangeKind::Deleted,
            Fault::ListsOnlyTopLevel => change.path.components().count() < 2,
            _ => true,
        });
        Ok(changes)
    }

    fn diff_tar(&self, id: LayerId, parents: &[LayerId], native: bool) -> Result<Vec<u8>> {
        self.model.diff_tar(id, parents, native)
    }

    fn fill(&self, id: LayerId, parents: &[LayerId], tar: &mut dyn Read, record: Option<&Path>) -> Result<()> {
        self.model.fill(id, parents, tar, record)?;
        self.spoil(&mut self.model.access(id, Access::ReadWrite)?)
    }
}
