//! What the suite is run on: a driver on a backing.

use super::{Backing, BackingKind, DirTree, Missing};
use crate::{
    Access, Change, ChangeKind, Context, DriverFactory, GraphDriver, LayerId, Options, Result, Root,
    model::{HardLinks, LayerTree, MemSink, ModelDriver, Tree, diff},
    mount, tar, walk,
};
use std::{
    io::{Read, Write},
    path::{Path, PathBuf},
    sync::Arc,
};

/// A driver with its data. The default methods are for drivers whose recipes the kernel carries out.
pub trait Subject {
    /// The driver.
    fn driver(&self) -> &dyn GraphDriver;

    /// Closes the driver and opens it again on the same data, as the next process does.
    fn reopen(&mut self) -> Result<()>;

    /// What leaves for a layer what a crash in the middle of making or removing it leaves, if the subject knows how.
    fn crash(&self) -> Option<Box<dyn Fn(LayerId) -> Result<()> + '_>> {
        None
    }

    /// Whether it restores tars byte for byte ([`repack`](Self::repack)).
    fn keeps_records(&self) -> bool {
        true
    }

    /// Whether its mounts are directories, which any system call can be made on.
    fn shows_directories(&self) -> bool {
        true
    }

    /// Why a file that is written to keeps its `security.capability` here, where the filesystem below does that by itself.
    fn keeps_capabilities(&self) -> Option<&'static str> {
        None
    }

    /// Whether a rename onto a directory that is not empty, which is refused, changes the times of the directories that hold
    /// the two names, where the filesystem below does that by itself.
    fn changes_times_by_refused_renames(&self) -> bool {
        false
    }

    /// The smallest size limit a layer can have.
    fn least_size(&self) -> u64 {
        0
    }

    /// The most bytes that a filesystem of its own, with its log, adds to what is written to a layer.
    fn overhead(&self) -> u64 {
        0
    }

    /// Shows the layer for as long as `run` takes.
    fn with_tree(&self, id: LayerId, parents: &[LayerId], access: Access, run: Visit<'_>) -> Result<()> {
        run(&mut DirTree::new(mounted(self.driver(), id, parents, access)?))
    }

    /// The changes from the parent to the layer, by the driver's native diff if `native`.
    fn changes(&self, id: LayerId, parents: &[LayerId], native: bool) -> Result<Vec<Change>> {
        let (lower, upper) = both(self.driver(), id, parents)?;
        let mut list = Vec::new();
        with_narrow(self.driver(), id, parents, native, |narrow| {
            walk::changes(lower.as_ref(), &upper, narrow, &mut |change| {
                list.push(change);
                Ok(())
            })
        })?;
        Ok(list)
    }

    /// The layer tar that makes the layer from its parent.
    fn diff_tar(&self, id: LayerId, parents: &[LayerId], native: bool) -> Result<Vec<u8>> {
        let (lower, upper) = both(self.driver(), id, parents)?;
        with_narrow(self.driver(), id, parents, native, |narrow| {
            tar::diff_tar(lower.as_ref(), &upper, narrow, Vec::new())
        })
    }

    /// Unpacks a layer tar into an active layer, as the engine does it; `record` as for [`tar::unpack`].
    fn fill(&self, id: LayerId, parents: &[LayerId], tar: &mut dyn Read, record: Option<&Path>) -> Result<()> {
        let (root, whiteouts) = own_tree(self.driver(), id, parents, Access::ReadWrite)?;
        tar::unpack(tar, &root, whiteouts, record).map(drop)
    }

    /// Gives back the tar that [`fill`](Self::fill) got with this record.
    fn repack(
        &self,
        id: LayerId,
        parents: &[LayerId],
        record: &Path,
        diff_id: crate::DiffId,
        out: &mut dyn Write,
    ) -> Result<()> {
        let (root, _) = own_tree(self.driver(), id, parents, Access::ReadOnly)?;
        tar::repack(record, &root, diff_id, out)
    }
}

/// What is done with a tree while it is there.
pub type Visit<'a> = &'a mut dyn FnMut(&mut dyn Tree) -> Result<()>;

/// The layer as a detached mount.
pub(super) fn mounted(driver: &dyn GraphDriver, id: LayerId, parents: &[LayerId], access: Access) -> Result<Root> {
    Ok(Root::from_fd(mount::detached(&driver.mount(id, parents, access)?)?))
}

/// The parent, if there is one, and the layer.
fn both(driver: &dyn GraphDriver, id: LayerId, parents: &[LayerId]) -> Result<(Option<Root>, Root)> {
    let lower = match parents {
        [] => None,
        [parent, rest @ ..] => Some(mounted(driver, *parent, rest, Access::ReadOnly)?),
    };
    Ok((lower, mounted(driver, id, parents, Access::ReadOnly)?))
}

/// Where a layer tar goes, and what becomes of its whiteouts there.
fn own_tree(
    driver: &dyn GraphDriver,
    id: LayerId,
    parents: &[LayerId],
    access: Access,
) -> Result<(Root, tar::Whiteouts)> {
    match driver.diff_dir(id) {
        Some(dir) => Ok((Root::open(&dir.path)?, tar::Whiteouts::Overlay { xattrs: dir.xattrs, escape: dir.escape })),
        None => Ok((mounted(driver, id, parents, access)?, tar::Whiteouts::Merged)),
    }
}

fn with_narrow<T>(
    driver: &dyn GraphDriver,
    id: LayerId,
    parents: &[LayerId],
    native: bool,
    run: impl FnOnce(Option<&mut dyn crate::Narrow>) -> Result<T>,
) -> Result<T> {
    match driver.native_diff().filter(|_| native) {
        Some(native) => run(Some(&mut *native.narrow(id, parents)?)),
        None => run(None),
    }
}

/// A way to make subjects: a driver on a kind of backing.
pub struct Setup {
    pub(super) name: String,
    without: Vec<(&'static str, &'static str)>,
    only: Option<&'static [&'static str]>,
    open: Box<dyn Fn() -> Result<Box<dyn Subject>, Missing> + Send + Sync>,
}

impl Setup {
    /// Whatever `open` makes, afresh for every case.
    pub fn new(
        name: impl Into<String>,
        open: impl Fn() -> Result<Box<dyn Subject>, Missing> + Send + Sync + 'static,
    ) -> Setup {
        Setup { name: name.into(), without: Vec::new(), only: None, open: Box::new(open) }
    }

    /// The driver of `factory` with its data in a directory of such a filesystem: `overlay2::ext4`.
    pub fn driver(factory: DriverFactory, backing: BackingKind) -> Setup {
        Setup::driver_with(format!("{}::{}", factory.name, backing), factory, backing, Options::default(), None)
    }

    /// The same with options, and with a way to leave in the driver's home what a crash leaves of a layer.
    pub fn driver_with(
        name: impl Into<String>,
        factory: DriverFactory,
        backing: BackingKind,
        options: Options,
        crash: Option<Crash>,
    ) -> Setup {
        Setup::new(name, move || {
            let backing = Backing::shared(backing)?;
            let home = backing.directory().map_err(Missing::failed)?;
            (factory.probe)(&home, &options).map_err(|unmet| Missing {
                what: unmet.missing,
                remedy: unmet.remedy,
                excluded: false,
            })?;
            let driver = (factory.open)(&home, &options).map_err(Missing::failed)?;
            let options = options.clone();
            Ok(Box::new(Mounting {
                driver: Some(driver),
                factory,
                options,
                home: Home(home),
                crash,
                _backing: backing,
            }))
        })
    }

    /// Leaves out a case that what is below the driver, as the kernel in a user namespace, cannot pass, and says why. It is
    /// reported as ignored, even where everything is required to run.
    ///
    /// Panics if there is no such case.
    pub fn without(mut self, case: &'static str, reason: &'static str) -> Setup {
        assert!(super::cases().any(|known| known.name == case), "there is no case {case} to leave out");
        self.without.push((case, reason));
        self
    }

    /// Takes these cases alone, for a variant of a setup that has them all and differs from it in nothing that the others
    /// look at. The others do not appear at all.
    ///
    /// Panics if there is no such case.
    pub fn only(mut self, cases: &'static [&'static str]) -> Setup {
        for case in cases {
            assert!(super::cases().any(|known| known.name == *case), "there is no case {case} to take");
        }
        self.only = Some(cases);
        self
    }

    pub(super) fn takes(&self, case: &str) -> bool {
        self.only.is_none_or(|only| only.contains(&case))
    }

    pub(super) fn left_out(&self, case: &str) -> Option<Missing> {
        let (_, reason) = self.without.iter().find(|(name, _)| *name == case)?;
        Some(Missing { what: (*reason).into(), remedy: String::new(), excluded: true })
    }

    /// Makes a subject.
    pub fn open(&self) -> Result<Box<dyn Subject>, Missing> {
        (self.open)()
    }
}

/// Leaves in a driver's home what a crash leaves of a layer.
pub type Crash = fn(home: &Path, id: LayerId) -> Result<()>;

struct Mounting {
    // Fields are dropped in this order: the driver before its home, the home before its filesystem.
    driver: Option<Box<dyn GraphDriver>>,
    factory: DriverFactory,
    options: Options,
    home: Home,
    crash: Option<Crash>,
    _backing: Arc<Backing>,
}

struct Home(PathBuf);

impl Drop for Home {
    fn drop(&mut self) {
        if let Err(e) = std::fs::remove_dir_all(&self.0) {
            eprintln!("leaving {} behind: {e}", self.0.display());
        }
    }
}

impl Drop for Mounting {
    fn drop(&mut self) {
        // What a driver has made may be more than directories, or such that others cannot remove.
        if let Some(Err(e)) = self.driver.as_ref().map(|driver| driver.reclaim(&|_| false)) {
            eprintln!("removing what the case has made: {e}");
        }
    }
}

impl Subject for Mounting {
    fn driver(&self) -> &dyn GraphDriver {
        self.driver.as_deref().expect("reopen puts it back")
    }

    fn reopen(&mut self) -> Result<()> {
        self.driver = None;
        let driver = (self.factory.open)(&self.home.0, &self.options).doing(|| "opening the driver again")?;
        self.driver = Some(driver);
        Ok(())
    }

    fn crash(&self) -> Option<Box<dyn Fn(LayerId) -> Result<()> + '_>> {
        let leave = self.crash?;
        Some(Box::new(move |id| leave(&self.home.0, id)))
    }
}

/// The reference as a subject.
impl Subject for ModelDriver {
    fn driver(&self) -> &dyn GraphDriver {
        self
    }

    fn reopen(&mut self) -> Result<()> {
        *self = self.clone();
        Ok(())
    }

    fn with_tree(&self, id: LayerId, parents: &[LayerId], access: Access, run: Visit<'_>) -> Result<()> {
        self.mount(id, parents, access)?;
        run(&mut self.access(id, access)?)
    }

    fn changes(&self, id: LayerId, parents: &[LayerId], _native: bool) -> Result<Vec<Change>> {
        let lower = lower_tree(self, parents)?.map(|tree| tree.snapshot()).transpose()?;
        Ok(diff(lower.as_ref(), &self.access(id, Access::ReadOnly)?.snapshot()?))
    }

    fn diff_tar(&self, id: LayerId, parents: &[LayerId], _native: bool) -> Result<Vec<u8>> {
        let mut tree = self.access(id, Access::ReadOnly)?.copy()?;
        let mut changes = self.changes(id, parents, false)?;
        // As `tar::diff_tar`: what is unpacked into the root changes its time, which its entry puts right.
        let rooted = changes.first().is_some_and(|change| change.path.as_os_str().is_empty());
        if !rooted && (parents.is_empty() || !changes.is_empty()) {
            changes.insert(0, Change { path: PathBuf::new(), kind: ChangeKind::Modified });
        }
        let mut exporter = tar::Exporter::new(&mut tree, Vec::new());
        changes.iter().try_for_each(|change| exporter.change(change))?;
        exporter.finish()
    }

    fn fill(&self, id: LayerId, _parents: &[LayerId], tar: &mut dyn Read, _record: Option<&Path>) -> Result<()> {
        let mut tree = self.access(id, Access::ReadWrite)?;
        tree.change(|tree| tar::apply(tar, &mut MemSink::new(tree))).map(drop)
    }

    fn keeps_records(&self) -> bool {
        false
    }

    fn shows_directories(&self) -> bool {
        false
    }
}

fn lower_tree(driver: &ModelDriver, parents: &[LayerId]) -> Result<Option<LayerTree>> {
    parents.first().map(|parent| driver.access(*parent, Access::ReadOnly)).transpose()
}

/// Whether changing a parent's file through one of its names leaves the others: overlayfs without its index splits
/// them, which only drivers that copy up may do.
pub(super) fn hard_links(subject: &dyn Subject, id: LayerId) -> Result<HardLinks> {
    use crate::model::Op;
    let driver = subject.driver();
    let child = LayerId(id.0 + 1);
    driver.create(id, &[], &Default::default())?;
    subject.with_tree(id, &[], Access::ReadWrite, &mut |tree| {
        tree.apply(&Op::write("a", "old"))?;
        Ok(tree.apply(&Op::link("a", "b"))?)
    })?;
    driver.commit(id)?;
    driver.create(child, &[id], &Default::default())?;
    let mut found = HardLinks::Kept;
    subject.with_tree(child, &[id], Access::ReadWrite, &mut |tree| {
        tree.apply(&Op::write("a", "new"))?;
        if tree.read(Path::new("b"))? != b"new" {
            found = HardLinks::Split;
        }
        Ok(())
    })?;
    driver.remove(child)?;
    driver.remove(id)?;
    let copies_up = matches!(driver.capabilities().write_strategy, crate::WriteStrategy::CopyUp { .. });
    assert!(copies_up || found == HardLinks::Kept, "a driver that does not copy up split a file's hard links");
    Ok(found)
}

/// What a case asks of a subject, above all of its driver's capabilities; the error says what is lacking.
pub type Needs = fn(&dyn Subject) -> Result<(), &'static str>;
