//! The store's logic, with a driver that makes a plain directory per layer.

use super::*;
use crate::{
    Access, ByteSize, Capabilities, CopyUnit, DiffId, Digest, ErrorKind as K, GraphDriver, LayerId, LayerOptions,
    Mount, Reclaimed, Stored, StoredAs, Usage, WriteStrategy,
};
use proptest::prelude::*;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Write,
    os::unix::fs::PermissionsExt,
    path::PathBuf,
    process::{Child, Command},
    sync::{Arc, atomic::AtomicUsize, atomic::Ordering},
};

/// Called before and after each step of the driver with its name.
type Hook = Arc<dyn Fn(&str) -> Result<()> + Send + Sync>;

struct DirDriver {
    home: PathBuf,
    hook: Hook,
    capabilities: Capabilities,
}

impl DirDriver {
    fn boxed(dir: &Path, hook: Hook) -> Box<DirDriver> {
        let capabilities = Capabilities {
            write_strategy: WriteStrategy::CopyUp { unit: CopyUnit::File },
            quota: false,
            inode_quota: false,
            native_diff: false,
            idmapped_mounts: false,
            independent_layers: true,
            max_depth: 3,
        };
        Box::new(DirDriver { home: dir.join("data"), hook, capabilities })
    }

    fn layer(&self, id: LayerId) -> PathBuf {
        self.home.join(id.to_string())
    }
}

impl GraphDriver for DirDriver {
    fn name(&self) -> &'static str {
        "dir"
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn create(&self, id: LayerId, _: &[LayerId], _: &LayerOptions) -> Result<()> {
        (self.hook)("create")?;
        fs::create_dir_all(&self.home)?;
        fs::create_dir(self.layer(id))?;
        fs::write(self.layer(id).join("file"), "content")?;
        (self.hook)("created")
    }

    fn commit(&self, id: LayerId) -> Result<()> {
        (self.hook)("commit")?;
        fs::write(self.layer(id).join("frozen"), "")?;
        (self.hook)("committed")
    }

    fn thaw(&self, id: LayerId) -> Result<()> {
        (self.hook)("thaw")?;
        session::absent_is_fine(fs::remove_file(self.layer(id).join("frozen")))
    }

    fn mount(&self, id: LayerId, parents: &[LayerId], access: Access) -> Result<Vec<Mount>> {
        if access == Access::ReadWrite && self.layer(id).join("frozen").exists() {
            return Err(Error::new(K::InvalidInput, "it is committed"));
        }
        let options = parents.iter().map(LayerId::to_string).collect();
        Ok(vec![Mount { fstype: "bind".into(), source: self.layer(id), options }])
    }

    fn usage(&self, id: LayerId) -> Result<Usage> {
        (self.hook)("usage")?;
        Ok(Usage { bytes: 7, inodes: fs::read_dir(self.layer(id))?.count() as u64 })
    }

    fn remove(&self, id: LayerId) -> Result<()> {
        (self.hook)("remove")?;
        session::absent_is_fine(fs::remove_dir_all(self.layer(id)))?;
        (self.hook)("removed")
    }

    fn reclaim(&self, known: &dyn Fn(LayerId) -> bool) -> Result<Reclaimed> {
        (self.hook)("reclaim")?;
        let mut reclaimed = Reclaimed::default();
        for id in numbers_in(&self.home) {
            if !known(id) {
                fs::remove_dir_all(self.layer(id))?;
                reclaimed.layers += 1;
            }
        }
        Ok(reclaimed)
    }

    fn inventory(&self) -> Result<Vec<Stored>> {
        let stored = |id| Stored {
            place: self.layer(id).display().to_string(),
            what: StoredAs::Layer { id, committed: self.layer(id).join("frozen").exists() },
        };
        Ok(numbers_in(&self.home).into_iter().map(stored).collect())
    }
}

fn open(dir: &Path) -> Layers {
    hooked(dir, Arc::new(|_| Ok(())))
}

fn hooked(dir: &Path, hook: Hook) -> Layers {
    Layers::open(dir, DirDriver::boxed(dir, hook), &[]).unwrap()
}

/// A hook that fails at one step.
fn failing(step: &'static str, kind: K) -> Hook {
    Arc::new(move |now| if now == step { Err(Error::new(kind, "made to fail")) } else { Ok(()) })
}

fn numbers_in(dir: &Path) -> BTreeSet<LayerId> {
    names_in(dir).iter().map(|name| name.parse().unwrap()).collect()
}

fn names_in(dir: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

fn info(seed: &str) -> CommitInfo {
    CommitInfo { diff_id: Some(diff(seed)), tar_size: Some(seed.len() as u64) }
}

fn diff(seed: &str) -> DiffId {
    DiffId(Digest::of(seed))
}

fn labelled(name: &str) -> BTreeMap<String, String> {
    BTreeMap::from([("name".into(), name.into())])
}

/// Makes a layer all the way.
fn make(layers: &Layers, name: &str, parent: Option<LayerId>, committed: bool) -> LayerId {
    let new = layers.create(LayerKind::Active, parent, &LayerOptions::default()).unwrap();
    fs::create_dir_all(new.record_dir()).unwrap();
    fs::write(new.record_dir().join("headers"), name).unwrap();
    if committed {
        new.commit(&info(name)).unwrap();
    }
    keep(layers, &new, None, name).unwrap();
    new.id()
}

fn keep(layers: &Layers, new: &NewLayer<'_>, parent: Option<LayerId>, name: &str) -> Result<()> {
    layers.store().write(|tx| {
        new.keep(tx, parent)?;
        set_labels(tx, new.id(), &labelled(name))
    })
}

fn remove(layers: &Layers, id: LayerId) -> Result<u64> {
    layers.store().write(|tx| layers.remove_in(tx, id))?;
    layers.sweep()
}

fn names(layers: &Layers) -> Vec<String> {
    layers.list().unwrap().into_iter().map(|mut layer| layer.labels.remove("name").unwrap_or_default()).collect()
}

/// On disk is what the store lists and nothing else, but for views on parents, and nobody is doing anything.
fn assert_clean(layers: &Layers) {
    let all = layers.list().unwrap();
    let listed: BTreeSet<LayerId> = all.iter().map(|layer| layer.id).collect();
    let stored = all.iter().filter(|layer| layer.kind != LayerKind::View || layer.parent.is_none());
    assert_eq!(numbers_in(&layers.dir().join("data")), stored.map(|layer| layer.id).collect());
    assert!(numbers_in(&layers.dir().join("records")).is_subset(&listed));
    let sql = "SELECT (SELECT count(*) FROM layers), (SELECT count(*) FROM layer_intents)";
    let counts = |conn: &Connection| Ok(conn.query_row(sql, [], |row| Ok((row.get(0)?, row.get(1)?)))?);
    assert_eq!(layers.store().read(counts).unwrap(), (listed.len() as i64, 0));
}

fn kind_of<T>(result: Result<T>) -> K {
    result.err().expect("an error").kind()
}

#[test]
fn a_layer_is_seen_when_it_is_kept_and_not_before() {
    let dir = tempfile::tempdir().unwrap();
    let layers = open(dir.path());
    let options = LayerOptions { size: Some(ByteSize(1 << 30)), inodes: None, durable: true };
    let new = layers.create(LayerKind::Active, None, &options).unwrap();
    let id = new.id();
    assert_eq!(kind_of(layers.get(id)), K::NotFound);
    assert!(layers.list().unwrap().is_empty());
    new.commit(&info("base")).unwrap();
    assert_eq!(layers.by_chain(crate::ChainId(diff("base").0)).unwrap(), None);
    assert!(layers.list().unwrap().is_empty());
    keep(&layers, &new, None, "base").unwrap();
    drop(new);
    let layer = layers.get(id).unwrap();
    assert_eq!((layer.kind, layer.parent, layer.size_limit), (LayerKind::Committed, None, options.size));
    assert_eq!((layer.diff_id, layer.tar_size), (Some(diff("base")), Some(4)));
    assert_eq!(layer.usage, Some(Usage { bytes: 7, inodes: 2 }));
    assert_eq!(layer.labels, labelled("base"));
    assert!(layer.created > 1_700_000_000_000_000_000);
    assert_eq!(layers.list().unwrap(), [layer]);
    assert_eq!(layers.by_chain(crate::ChainId(diff("base").0)).unwrap(), Some(id));
    assert_clean(&layers);
}

#[test]
fn an_unkept_layer_leaves_nothing_and_its_number_is_never_used_again() {
    let dir = tempfile::tempdir().unwrap();
    let layers = open(dir.path());
    let new = layers.create(LayerKind::Active, None, &LayerOptions::default()).unwrap();
    let first = new.id();
    fs::create_dir_all(new.record_dir()).unwrap();
    drop(new);
    assert_clean(&layers);
    let rolled_back = layers.create(LayerKind::Active, None, &LayerOptions::default()).unwrap();
    assert!(rolled_back.id() > first);
    let result: Result<()> = layers.store().write(|tx| {
        rolled_back.keep(tx, None)?;
        Err(Error::new(K::Interrupted, "no"))
    });
    assert_eq!(kind_of(result), K::Interrupted);
    drop(rolled_back);
    assert_clean(&layers);
    drop(layers);
    let layers = open(dir.path());
    assert_eq!(make(&layers, "a", None, true), LayerId(first.0 + 2));
}

#[test]
fn a_panic_in_a_transaction_rolls_it_back_and_the_store_works_on() {
    let dir = tempfile::tempdir().unwrap();
    let layers = open(dir.path());
    let id = make(&layers, "a", None, true);
    let panicking = std::panic::AssertUnwindSafe(|| {
        layers.store().write::<()>(|tx| {
            layers.remove_in(tx, id)?;
            panic!("in the middle")
        })
    });
    std::panic::catch_unwind(panicking).unwrap_err();
    assert_eq!(layers.sweep().unwrap(), 0);
    assert_eq!(names(&layers), ["a"]);
    assert_clean(&layers);
}

#[test]
fn a_transaction_within_a_transaction_is_an_error_and_no_deadlock() {
    let dir = tempfile::tempdir().unwrap();
    let layers = open(dir.path());
    let id = make(&layers, "a", None, true);
    let nested = layers.store().write(|_| layers.get(id));
    assert_eq!(kind_of(nested), K::InvalidInput);
    // A guard moved into the transaction and dropped there can do nothing, and need not: it was kept.
    let new = layers.create(LayerKind::Active, Some(id), &LayerOptions::default()).unwrap();
    layers.store().write(move |tx| new.keep(tx, None)).unwrap();
    assert_eq!(layers.list().unwrap().len(), 2);
    assert_clean(&layers);
}

#[test]
fn a_creation_that_fails_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    for step in ["create", "created"] {
        let layers = hooked(dir.path(), failing(step, K::OutOfSpace));
        let failed = layers.create(LayerKind::Active, None, &LayerOptions::default());
        assert_eq!(kind_of(failed), K::OutOfSpace);
        assert_clean(&layers);
    }
}

#[test]
fn layers_made_independently_learn_their_parents_at_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let layers = open(dir.path());
    let new: Vec<_> =
        (0..5).map(|_| layers.create(LayerKind::Active, None, &LayerOptions::default()).unwrap()).collect();
    for (i, new) in new.iter().enumerate() {
        new.commit(&info(&i.to_string())).unwrap();
    }
    let stack = |order: &[usize]| {
        layers.store().write(|tx| {
            let mut parent = None;
            for &i in order {
                new[i].keep(tx, parent)?;
                parent = Some(new[i].id());
            }
            Ok(())
        })
    };
    assert_eq!(kind_of(stack(&[0, 1, 2, 3, 4])), K::Unsupported, "four parents are too deep for this driver");
    stack(&[3, 1, 2, 0]).unwrap();
    let chain = layers.chain(new[0].id()).unwrap();
    assert_eq!(chain, [new[0].id(), new[2].id(), new[1].id(), new[3].id()]);
    assert_eq!(layers.parents(new[0].id()).unwrap(), chain[1..]);
    assert_eq!(layers.children(new[3].id()).unwrap(), [new[1].id()]);
    let expected = crate::ChainId::of(&[diff("3"), diff("1"), diff("2"), diff("0")]);
    assert_eq!(layers.get(new[0].id()).unwrap().chain_id, expected);
    assert_eq!(layers.by_chain(expected.unwrap()).unwrap(), Some(new[0].id()));
    let mounts = layers.mount(new[0].id(), Access::ReadOnly).unwrap();
    let parents: Vec<String> = chain[1..].iter().map(LayerId::to_string).collect();
    assert_eq!(mounts[0].options, parents);
    drop(new);
    assert_eq!(layers.list().unwrap().len(), 4);
    assert_clean(&layers);
}

#[test]
fn a_stack_of_layers_being_made_is_kept_from_the_bottom_and_dropped_in_any_order() {
    let dir = tempfile::tempdir().unwrap();
    let layers = open(dir.path());
    for kept in [false, true] {
        let low = layers.create(LayerKind::Active, None, &LayerOptions::default()).unwrap();
        let early = layers.create(LayerKind::Active, Some(low.id()), &LayerOptions::default());
        assert_eq!(kind_of(early.map(drop)), K::InvalidInput, "the lower one is still active");
        low.commit(&info("low")).unwrap();
        let high = layers.create(LayerKind::Active, Some(low.id()), &LayerOptions::default()).unwrap();
        high.commit(&info("high")).unwrap();
        assert_eq!(
            kind_of(layers.store().write(|tx| high.keep(tx, None))),
            K::NotFound,
            "the lower one is not kept yet"
        );
        if kept {
            let both = layers.store().write(|tx| low.keep(tx, None).and_then(|()| high.keep(tx, None)));
            both.unwrap();
        }
        drop(low);
        drop(high);
        assert_eq!(layers.list().unwrap().len(), if kept { 2 } else { 0 });
        assert_clean(&layers);
    }
}

#[test]
fn kinds_are_checked_and_the_errors_teach() {
    let dir = tempfile::tempdir().unwrap();
    let layers = open(dir.path());
    let options = LayerOptions::default();
    let base = make(&layers, "base", None, true);
    let active = make(&layers, "active", Some(base), false);
    let view = layers.create(LayerKind::View, Some(base), &options).unwrap();
    let refused = view.commit(&info("v")).unwrap_err();
    assert!(refused.to_string().contains("a view, which is never committed"), "{refused}");
    keep(&layers, &view, None, "view").unwrap();
    let (view, missing) = (view.id(), LayerId(99));

    assert_eq!(kind_of(layers.create(LayerKind::Committed, None, &options)), K::InvalidInput);
    for parent in [active, view] {
        let refused = layers.create(LayerKind::Active, Some(parent), &options).err().unwrap();
        assert!(refused.to_string().contains("only committed layers have children"), "{refused}");
    }
    assert_eq!(kind_of(layers.create(LayerKind::Active, Some(missing), &options)), K::NotFound);
    for id in [base, view] {
        let refused = layers.mount(id, Access::ReadWrite).unwrap_err();
        assert!(refused.to_string().contains("only active layers can be written to"), "{refused}");
        assert_eq!(kind_of(layers.commit(id, &info("x"), |_| Ok(()))), K::InvalidInput);
        layers.mount(id, Access::ReadOnly).unwrap();
    }
    assert_eq!(layers.mount(view, Access::ReadOnly).unwrap(), layers.mount(base, Access::ReadOnly).unwrap());
    assert_eq!(layers.usage(view).unwrap(), Usage::default());
    layers.mount(active, Access::ReadWrite).unwrap();
    for result in [layers.get(missing).map(drop), layers.commit(missing, &info("x"), |_| Ok(()))] {
        assert_eq!(kind_of(result), K::NotFound);
    }
    assert_eq!(kind_of(layers.chain(missing)), K::NotFound);
    assert_eq!(kind_of(layers.mount(missing, Access::ReadOnly)), K::NotFound);
    let moved = layers.create(LayerKind::Active, Some(base), &options).unwrap();
    let other = make(&layers, "other", None, true);
    assert_eq!(kind_of(layers.store().write(|tx| moved.keep(tx, Some(other)))), K::InvalidInput);
    drop(moved);
    assert_clean(&layers);
}

#[test]
fn a_layer_with_children_is_not_removed_but_both_can_go_in_one_transaction() {
    let dir = tempfile::tempdir().unwrap();
    let layers = open(dir.path());
    let base = make(&layers, "base", None, true);
    let child = make(&layers, "child", Some(base), false);
    let refused = remove(&layers, base).unwrap_err();
    assert_eq!(refused.kind(), K::Busy);
    assert!(refused.to_string().contains(&format!("layer {child} lies on it")), "{refused}");
    let pending = layers.create(LayerKind::Active, Some(base), &LayerOptions::default()).unwrap();
    remove(&layers, child).unwrap();
    assert_eq!(kind_of(remove(&layers, base)), K::Busy, "a layer is being made on it");
    drop(pending);
    let child = make(&layers, "child", Some(base), false);
    let both = layers.store().write(|tx| layers.remove_in(tx, child).and_then(|()| layers.remove_in(tx, base)));
    both.unwrap();
    assert!(layers.list().unwrap().is_empty());
    assert_eq!(kind_of(layers.chain(base).and_then(|_| layers.mount(base, Access::ReadOnly))), K::NotFound);
    assert_eq!(kind_of(layers.create(LayerKind::Active, Some(base), &LayerOptions::default())), K::NotFound);
    assert_eq!(kind_of(layers.store().write(|tx| layers.remove_in(tx, base))), K::NotFound);
    assert_eq!(layers.sweep().unwrap(), 0);
    assert_clean(&layers);
}

#[test]
fn what_could_not_be_freed_is_tried_again_by_the_next_sweep_and_the_next_session() {
    let dir = tempfile::tempdir().unwrap();
    let busy = Arc::new(AtomicUsize::new(0));
    let switch = busy.clone();
    let hook = move |step: &str| match step {
        "remove" if switch.load(Ordering::SeqCst) == 1 => Err(Error::new(K::Busy, "mounted")),
        _ => Ok(()),
    };
    let layers = hooked(dir.path(), Arc::new(hook));
    let (a, b) = (make(&layers, "a", None, true), make(&layers, "b", None, true));
    let on_b = make(&layers, "on b", Some(b), true);
    busy.store(1, Ordering::SeqCst);
    assert_eq!(remove(&layers, a).unwrap(), 1);
    assert_eq!(names(&layers), ["b", "on b"]);
    busy.store(0, Ordering::SeqCst);
    assert_eq!(layers.sweep().unwrap(), 0);
    assert_clean(&layers);
    busy.store(1, Ordering::SeqCst);
    assert_eq!(remove(&layers, on_b).unwrap(), 1);
    assert_eq!(remove(&layers, b).unwrap(), 2, "the child's storage is still there");
    drop(layers);
    let layers = open(dir.path());
    assert!(layers.list().unwrap().is_empty());
    assert_clean(&layers);
}

#[test]
fn an_active_layer_is_committed_in_place_with_what_belongs_to_it() {
    let dir = tempfile::tempdir().unwrap();
    let base = make(&open(dir.path()), "base", None, true);
    let layers = hooked(dir.path(), failing("committed", K::Io));
    let id = make(&layers, "work", Some(base), false);
    assert_eq!(layers.usage(id).unwrap().inodes, 1);
    assert_eq!(kind_of(layers.commit(id, &info("work"), |_| Ok(()))), K::Io);
    drop(layers);
    let layers = open(dir.path());
    let failed = layers.commit(id, &info("work"), |_| Err(Error::new(K::AlreadyExists, "name taken")));
    assert_eq!(kind_of(failed), K::AlreadyExists);
    assert_eq!(layers.get(id).unwrap().kind, LayerKind::Active);
    layers.commit(id, &info("work"), |tx| set_labels(tx, id, &labelled("done"))).unwrap();
    let layer = layers.get(id).unwrap();
    assert_eq!((layer.kind, layer.labels), (LayerKind::Committed, labelled("done")));
    assert_eq!(layer.chain_id, crate::ChainId::of(&[diff("base"), diff("work")]));
    fs::write(dir.path().join("data").join(id.to_string()).join("later"), "").unwrap();
    assert_eq!(layers.usage(id).unwrap(), layer.usage.unwrap(), "as it was when it was committed");
    assert_clean(&layers);
}

#[test]
fn a_layer_whose_commit_was_not_recorded_can_be_written_to_again() {
    let dir = tempfile::tempdir().unwrap();
    let layers = open(dir.path());
    let id = make(&layers, "a", None, false);
    let writable = |layers: &Layers| layers.mount(id, Access::ReadWrite).map(drop).unwrap();
    layers.commit(id, &info("a"), |_| Err(Error::new(K::AlreadyExists, "name taken"))).unwrap_err();
    writable(&layers);
    drop(layers);
    for failing_step in ["committed", "usage"] {
        let layers = hooked(dir.path(), failing(failing_step, K::Io));
        layers.commit(id, &info("a"), |_| Ok(())).unwrap_err();
        writable(&layers);
    }
    // Killed between the two.
    let layers = open(dir.path());
    layers.driver().commit(id).unwrap();
    layers.store().write(|tx| rows::add_intent(tx, id, rows::Op::Commit, "somebody dead")).unwrap();
    writable(&open(dir.path()));
    // Where that cannot be undone, the layer can still be committed or removed.
    layers.store().write(|tx| rows::add_intent(tx, id, rows::Op::Commit, "somebody dead")).unwrap();
    layers.driver().commit(id).unwrap();
    let layers = hooked(dir.path(), failing("thaw", K::Io));
    let e = layers.mount(id, Access::ReadWrite).unwrap_err();
    assert!(e.kind() == K::InvalidInput && e.to_string().contains("commit it again"), "{e}");
    layers.commit(id, &info("a"), |_| Ok(())).unwrap();
}

#[test]
fn nothing_else_happens_to_a_layer_while_it_is_committed() {
    let dir = tempfile::tempdir().unwrap();
    let id = make(&open(dir.path()), "a", None, false);
    let second = Arc::new(open(dir.path()));
    let other = second.clone();
    let hook = move |step: &str| {
        if step == "commit" {
            assert_eq!(kind_of(other.commit(id, &info("b"), |_| Ok(()))), K::Busy);
            assert_eq!(kind_of(remove(&other, id)), K::Busy);
            assert_eq!(kind_of(other.mount(id, Access::ReadWrite)), K::Busy);
            assert_eq!(other.recover().unwrap(), Recovered::default());
            assert_eq!(names(&other), ["a"]);
        }
        Ok(())
    };
    hooked(dir.path(), Arc::new(hook)).commit(id, &info("a"), |_| Ok(())).unwrap();
    assert_eq!(second.get(id).unwrap().diff_id, Some(diff("a")));
}

#[test]
fn labels_are_replaced_as_a_whole() {
    let dir = tempfile::tempdir().unwrap();
    let layers = open(dir.path());
    let id = make(&layers, "a", None, false);
    let odd =
        BTreeMap::from([("k\"'{}\u{1}ü".to_owned(), "v\n\\ \u{10ffff}".to_owned()), (String::new(), String::new())]);
    layers.store().write(|tx| set_labels(tx, id, &odd)).unwrap();
    assert_eq!(layers.get(id).unwrap().labels, odd);
    layers.store().write(|tx| set_labels(tx, id, &BTreeMap::new())).unwrap();
    assert!(layers.get(id).unwrap().labels.is_empty());
    assert_eq!(kind_of(layers.store().write(|tx| set_labels(tx, LayerId(77), &odd))), K::NotFound);
}

#[test]
fn the_work_of_live_sessions_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let first = open(dir.path());
    let new = first.create(LayerKind::Active, None, &LayerOptions::default()).unwrap();
    let scratch = first.tmp_dir().unwrap();
    let victim = make(&first, "victim", None, true);
    first.store().write(|tx| first.remove_in(tx, victim)).unwrap();
    let second = open(dir.path());
    assert_eq!(second.recover().unwrap(), Recovered::default());
    assert!(scratch.exists());
    assert_eq!(numbers_in(&dir.path().join("data")), BTreeSet::from([new.id(), victim]));
    assert_eq!(second.sweep().unwrap(), 0);
    first.sweep().unwrap();
    keep(&first, &new, None, "a").unwrap();
    drop(new);
    assert_eq!(names(&second), ["a"]);
    assert_clean(&second);
}

#[test]
fn a_session_cleans_up_after_itself_and_reading_needs_none() {
    let dir = tempfile::tempdir().unwrap();
    let layers = open(dir.path());
    layers.list().unwrap();
    assert!(names_in(&dir.path().join("run")).is_empty());
    fs::write(layers.tmp_dir().unwrap().join("blob"), "x").unwrap();
    assert_eq!(names_in(&dir.path().join("run")).len(), 1);
    drop(layers);
    assert!(names_in(&dir.path().join("run")).is_empty());
    assert!(names_in(&dir.path().join("tmp")).is_empty());
    assert_eq!(open(dir.path()).recover().unwrap(), Recovered::default());
}

#[test]
fn the_driver_looks_for_leftovers_only_after_a_crash() {
    let dir = tempfile::tempdir().unwrap();
    let live = open(dir.path());
    let new = live.create(LayerKind::Active, None, &LayerOptions::default()).unwrap();
    let unknown = dir.path().join("data/99");
    fs::create_dir_all(&unknown).unwrap();
    open(dir.path());
    assert!(unknown.exists());
    fs::write(dir.path().join("run/00000000000000000000000000000000.lock"), "").unwrap();
    let found = open(dir.path()).recover().unwrap();
    assert_eq!(found, Recovered::default(), "opening has done it already");
    assert!(!unknown.exists());
    assert_eq!(numbers_in(&dir.path().join("data")), BTreeSet::from([new.id()]), "what is being made is known");
}

#[test]
fn what_the_driver_could_not_reclaim_is_looked_for_again_at_every_opening() {
    let dir = tempfile::tempdir().unwrap();
    open(dir.path());
    let unknown = dir.path().join("data/99");
    let crashed = || fs::write(dir.path().join("run/00000000000000000000000000000000.lock"), "").unwrap();
    let rebooted = || fs::write(dir.path().join("boot"), "another").unwrap();
    fs::create_dir_all(dir.path().join("run")).unwrap();
    for look in [&crashed as &dyn Fn(), &rebooted] {
        fs::create_dir_all(&unknown).unwrap();
        look();
        for _ in 0..2 {
            hooked(dir.path(), failing("reclaim", K::Busy));
            assert!(unknown.exists());
        }
        open(dir.path());
        assert!(!unknown.exists());
        hooked(dir.path(), Arc::new(|step| panic!("{step}: it has been done")));
    }
}

#[test]
fn many_can_open_a_new_store_at_once() {
    for _ in 0..20 {
        let dir = tempfile::tempdir().unwrap();
        let start = std::sync::Barrier::new(8);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    start.wait();
                    Store::open(dir.path(), &[]).unwrap();
                });
            }
        });
    }
}

#[test]
fn a_session_that_starts_keeps_its_lock_although_others_recover() {
    let dir = tempfile::tempdir().unwrap();
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                for name in session::traces(dir.path()).unwrap() {
                    if let Some(_dead) = session::claim(dir.path(), &name).unwrap() {
                        session::bury(dir.path(), &name).unwrap();
                    }
                }
            }
        });
        let kept = (0..5000).all(|_| {
            let session = session::Session::start(dir.path()).unwrap();
            dir.path().join(format!("run/{}.lock", session.name)).exists()
        });
        done.store(true, Ordering::SeqCst);
        assert!(kept);
    });
}

#[test]
fn only_the_owner_can_look_inside() {
    let dir = tempfile::tempdir().unwrap();
    let home = dir.path().join("deep/store");
    let layers = open(&home);
    layers.tmp_dir().unwrap();
    let mode = |path: &str| fs::metadata(home.join(path)).unwrap().permissions().mode() & 0o777;
    for (path, expected) in [("", 0o700), ("store.db", 0o600), ("store.db-wal", 0o600), ("run", 0o700), ("tmp", 0o700)]
    {
        assert_eq!(mode(path), expected, "{path}");
    }
}

#[test]
fn the_callers_tables_change_with_the_layers_and_are_brought_up_step_by_step() {
    const FIRST: &str = "CREATE TABLE images(name TEXT PRIMARY KEY, top INTEGER REFERENCES layers(id)) STRICT";
    const SECOND: &str = "ALTER TABLE images ADD COLUMN size INTEGER; INSERT INTO images VALUES ('scratch', NULL, 0)";
    let old = [Schema { component: "images", steps: &[FIRST] }];
    let new = [Schema { component: "images", steps: &[FIRST, SECOND] }];
    let dir = tempfile::tempdir().unwrap();
    let with = |schema| Layers::open(dir.path(), DirDriver::boxed(dir.path(), Arc::new(|_| Ok(()))), schema);
    let layers = with(&old).unwrap();
    let id = make(&layers, "a", None, true);
    layers.store().write(|tx| Ok(tx.execute("INSERT INTO images VALUES ('a', ?1)", [id])?)).unwrap();
    drop(layers);
    for _ in 0..2 {
        let layers = with(&new).unwrap();
        let count =
            |conn: &Connection| Ok(conn.query_row("SELECT count(*) FROM images", [], |row| row.get::<_, i64>(0))?);
        assert_eq!(layers.store().read(count).unwrap(), 2);
    }
    let refused = with(&old).err().unwrap();
    assert_eq!(refused.kind(), K::Unsupported);
    assert!(refused.to_string().contains("made by a newer graphdriver: images 2, this one knows 1"), "{refused}");
}

#[test]
fn a_step_that_fails_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let bad = [Schema { component: "c", steps: &["CREATE TABLE t(x); CREATE TABLE t(x)"] }];
    Store::open(dir.path(), &bad).err().unwrap();
    let good = [Schema { component: "c", steps: &["CREATE TABLE t(x)"] }];
    Store::open(dir.path(), &good).unwrap();
}

#[test]
fn a_newer_store_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let layers = open(dir.path());
    let newer = "UPDATE schema_versions SET version = version + 1 WHERE component = 'layers'";
    layers.store().write(|tx| Ok(tx.execute(newer, [])?)).unwrap();
    drop(layers);
    let refused = Store::open(dir.path(), &[]).err().unwrap();
    assert_eq!(refused.kind(), K::Unsupported);
    assert!(refused.to_string().contains("newer graphdriver"), "{refused}");
}

#[test]
fn a_store_of_version_1_opens_and_its_interrupted_work_is_undone() {
    let dir = tempfile::tempdir().unwrap();
    let sample = Connection::open(dir.path().join("store.db")).unwrap();
    sample.execute_batch(include_str!("samples/v1.sql")).unwrap();
    drop(sample);
    for id in [1, 2, 4, 6] {
        fs::create_dir_all(dir.path().join(format!("data/{id}"))).unwrap();
    }
    let layers = open(dir.path());
    assert_eq!(names(&layers), ["base", "child"]);
    let base = Layer {
        id: LayerId(1),
        kind: LayerKind::Committed,
        parent: None,
        diff_id: Some(diff("base")),
        chain_id: Some(crate::ChainId(diff("base").0)),
        tar_size: Some(4),
        usage: Some(Usage { bytes: 7, inodes: 2 }),
        size_limit: None,
        created: 1_790_000_000_123_456_789,
        labels: labelled("base"),
    };
    assert_eq!(layers.get(LayerId(1)).unwrap(), base);
    assert_eq!(layers.get(LayerId(2)).unwrap().kind, LayerKind::Active);
    assert_clean(&layers);
    assert_eq!(make(&layers, "new", Some(LayerId(1)), false), LayerId(7));
}

#[test]
fn a_damaged_database_is_called_that() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("store.db"), "no database at all, but long enough for SQLite to look at it".repeat(99))
        .unwrap();
    let refused = Store::open(dir.path(), &[]).err().unwrap();
    assert_eq!(refused.kind(), K::Corrupt);
    assert!(refused.hint_text().unwrap().contains("restore store.db from a backup"), "{refused}");
}

#[test]
fn data_version_tells_of_what_others_committed() {
    let dir = tempfile::tempdir().unwrap();
    let (mine, other) = (open(dir.path()), open(dir.path()));
    let before = mine.store().data_version().unwrap();
    assert_eq!(mine.store().data_version().unwrap(), before);
    make(&other, "a", None, false);
    assert_ne!(mine.store().data_version().unwrap(), before);
}

#[test]
fn a_reader_waits_for_no_writer() {
    let dir = tempfile::tempdir().unwrap();
    let layers = open(dir.path());
    let id = make(&layers, "old", None, true);
    let (sent, seen) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let reader = || sent.send(names(&layers)).unwrap();
        let during = layers.store().write(|tx| {
            set_labels(tx, id, &labelled("new"))?;
            scope.spawn(reader);
            Ok(seen.recv_timeout(Duration::from_secs(10)))
        });
        assert_eq!(during.unwrap(), Ok(vec!["old".to_owned()]));
    });
    assert_eq!(names(&layers), ["new"], "what was committed is seen at once");
}

/// The intent of a creation is not flushed, as what a power cut leaves without it is freed before anything is made.
#[test]
fn a_number_lost_in_a_power_cut_is_given_out_again() {
    number_lost(true);
    number_lost(false);
}

fn number_lost(can_reclaim: bool) {
    let dir = tempfile::tempdir().unwrap();
    let (db, kept) = (dir.path().join("store.db"), dir.path().join("kept.db"));
    make(&open(dir.path()), "a", None, true);
    fs::copy(&db, &kept).unwrap();
    let lost = make(&open(dir.path()), "lost", None, false);
    // All of its storage is there, and nothing that the database was told of it.
    fs::rename(&kept, &db).unwrap();
    fs::write(dir.path().join("boot"), "another").unwrap();
    if can_reclaim {
        let layers = open(dir.path());
        assert_clean(&layers);
        assert_eq!(names(&layers), ["a"]);
        assert_eq!(make(&layers, "b", None, false), lost);
        return assert_clean(&layers);
    }
    // What is in the way then is seen, and gone the next time.
    let layers = hooked(dir.path(), failing("reclaim", K::Io));
    let refused = layers.create(LayerKind::Active, None, &LayerOptions::default());
    assert_eq!(kind_of(refused.map(drop)), K::Corrupt);
    make(&layers, "b", None, false);
    assert_clean(&layers);
}

#[test]
fn threads_share_one() {
    let dir = tempfile::tempdir().unwrap();
    let layers = open(dir.path());
    let base = make(&layers, "base", None, true);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..5 {
                    let id = make(&layers, "t", Some(base), true);
                    layers.recover().unwrap();
                    drop(layers.create(LayerKind::Active, Some(id), &LayerOptions::default()).unwrap());
                    remove(&layers, id).unwrap();
                }
            });
        }
    });
    assert_eq!(names(&layers), ["base"]);
    assert_clean(&layers);
}

/// What a process of its own does for the tests below, as the variables say.
#[test]
#[ignore = "not a test: the other side of those that kill processes"]
fn child() {
    let dir = PathBuf::from(std::env::var_os("STORE_DIR").expect("started by another test"));
    let log = fs::OpenOptions::new().append(true).create(true).open(dir.join("log")).unwrap();
    let say = move |word: &str| (&log).write_all(format!("{word}\n").as_bytes()).unwrap();
    match std::env::var("STORE_DIE_AT").unwrap().as_str() {
        "never" => rounds(&dir.join("store"), say),
        "full disk" => fill_the_disk(&dir),
        number => scenario(&dir.join("store"), say, number.parse().unwrap()),
    }
}

/// `die_at` is the number of a point of [`scenario`], or says what to do instead.
fn spawn(dir: &Path, die_at: impl ToString) -> Child {
    spawn_by(Command::new(std::env::current_exe().unwrap()), dir, die_at)
}

fn spawn_by(mut command: Command, dir: &Path, die_at: impl ToString) -> Child {
    command.args(["--exact", "store::tests::child", "--ignored", "--nocapture"]);
    command.env("STORE_DIR", dir).env("STORE_DIE_AT", die_at.to_string());
    command.stdout(std::process::Stdio::null()).spawn().unwrap()
}

fn log_of(dir: &Path) -> Vec<String> {
    fs::read_to_string(dir.join("log")).unwrap_or_default().lines().map(str::to_owned).collect()
}

fn by_name(layers: &Layers, name: &str) -> LayerId {
    layers.list().unwrap().into_iter().find(|layer| layer.labels == labelled(name)).unwrap().id
}

/// Does one of everything, saying each point it comes to, and dies at one of them.
fn scenario(dir: &Path, say: impl Fn(&str) + Send + Sync + 'static, die_at: usize) {
    let passed = AtomicUsize::new(0);
    let point: Arc<dyn Fn(&str) + Send + Sync> = Arc::new(move |name| {
        say(name);
        if passed.fetch_add(1, Ordering::SeqCst) == die_at {
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL).unwrap();
        }
    });
    let in_driver = point.clone();
    let hook = move |step: &str| {
        in_driver(&format!("driver: {step}"));
        Ok(())
    };
    let layers = hooked(dir, Arc::new(hook));
    let (base, work, victim) = (by_name(&layers, "base"), by_name(&layers, "work"), by_name(&layers, "victim"));

    fs::write(layers.tmp_dir().unwrap().join("blob"), "x").unwrap();
    let new = layers.create(LayerKind::Active, Some(base), &LayerOptions::default()).unwrap();
    fs::create_dir_all(new.record_dir()).unwrap();
    point("filled");
    new.commit(&info("new")).unwrap();
    point("frozen");
    let kept = layers.store().write(|tx| {
        new.keep(tx, None)?;
        set_labels(tx, new.id(), &labelled("new"))?;
        point("keeping");
        Ok(())
    });
    kept.unwrap();
    point("kept");
    drop(new);

    let committed = layers.commit(work, &info("work"), |_| {
        point("committing");
        Ok(())
    });
    committed.unwrap();
    point("work committed");

    let removed = layers.store().write(|tx| {
        layers.remove_in(tx, victim)?;
        point("removing");
        Ok(())
    });
    removed.unwrap();
    point("victim removed");
    layers.sweep().unwrap();
    point("swept");
    drop(layers.create(LayerKind::View, Some(base), &LayerOptions::default()).unwrap());
    point("dropped");
}

#[test]
fn killed_at_any_point_it_leaves_nothing_behind_and_loses_nothing() {
    let mut die_at = 0;
    loop {
        let dir = tempfile::tempdir().unwrap();
        let store = dir.path().join("store");
        let layers = open(&store);
        let base = make(&layers, "base", None, true);
        make(&layers, "work", Some(base), false);
        make(&layers, "victim", Some(base), false);
        drop(layers);

        let finished = spawn(dir.path(), die_at).wait().unwrap().success();
        let log = log_of(dir.path());
        let came_to = |point: &str| log.iter().any(|line| line == point);
        assert_eq!(log.len(), die_at + usize::from(!finished), "{log:?}");

        let layers = open(&store);
        let mut expected = vec!["base", "work"];
        expected.extend((!came_to("victim removed")).then_some("victim"));
        expected.extend(came_to("kept").then_some("new"));
        assert_eq!(names(&layers), expected, "{log:?}");
        let kind = if came_to("work committed") { LayerKind::Committed } else { LayerKind::Active };
        assert_eq!(layers.get(by_name(&layers, "work")).unwrap().kind, kind, "{log:?}");
        assert_clean(&layers);
        assert_eq!(layers.recover().unwrap(), Recovered::default());
        if kind == LayerKind::Active {
            layers.mount(by_name(&layers, "work"), Access::ReadWrite).unwrap();
            layers.commit(by_name(&layers, "work"), &info("work"), |_| Ok(())).unwrap();
        }
        drop(layers);
        assert!(names_in(&store.join("run")).is_empty() && names_in(&store.join("tmp")).is_empty(), "{log:?}");
        if finished {
            break;
        }
        die_at += 1;
    }
    assert!(die_at > 20, "only {die_at} points");
}

/// Makes and removes layers on one that all processes share.
fn rounds(dir: &Path, say: impl Fn(&str)) {
    for round in 0..6 {
        let layers = open(dir);
        let base = by_name(&layers, "base");
        let name = format!("{}-{round}", std::process::id());
        let id = make(&layers, &name, Some(base), true);
        say(&format!("+{name}"));
        drop(layers.create(LayerKind::Active, Some(id), &LayerOptions::default()).unwrap());
        assert_eq!(kind_of(layers.store().write(|tx| layers.remove_in(tx, base))), K::Busy);
        if round % 2 == 0 {
            say(&format!("-{name}"));
            remove(&layers, id).unwrap();
        }
    }
}

#[test]
fn eight_processes_at_once_lose_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("store");
    make(&open(&store), "base", None, true);
    let children: Vec<Child> = (0..8).map(|_| spawn(dir.path(), "never")).collect();
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    let layers = open(&store);
    let (log, listed) = (log_of(dir.path()), names(&layers));
    let kept: BTreeSet<String> = kept_by(&log);
    assert_eq!(kept.len(), 8 * 3);
    assert_eq!(BTreeSet::from_iter(listed), kept.into_iter().chain(["base".to_owned()]).collect());
    assert_clean(&layers);
}

/// In a mount namespace of its own.
fn fill_the_disk(dir: &Path) {
    use rustix::mount::{MountFlags, mount};
    mount("tmpfs", dir, "tmpfs", MountFlags::empty(), c"size=1m").unwrap();
    let layers = open(dir);
    let base = make(&layers, "base", None, true);
    let new = layers.create(LayerKind::Active, Some(base), &LayerOptions::default()).unwrap();
    let mut file = File::create(dir.join("data").join(new.id().to_string()).join("big")).unwrap();
    while file.write_all(&[1; 4096]).is_ok() {}
    drop(file);
    // The write-ahead log is rewound at times; now it has to grow.
    let many: BTreeMap<String, String> = (0..999).map(|i| (i.to_string(), "x".repeat(99))).collect();
    let full = layers.store().write(|tx| new.keep(tx, None).and_then(|()| set_labels(tx, new.id(), &many)));
    assert_eq!(kind_of(full), K::OutOfSpace);
    drop(new);
    assert_eq!(names(&layers), ["base"]);
    assert_clean(&layers);
    make(&layers, "next", Some(base), true);
}

#[test]
fn a_layer_that_fills_the_disk_gives_the_space_back() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = Command::new("unshare");
    command.arg("--mount").arg(std::env::current_exe().unwrap());
    assert!(spawn_by(command, dir.path(), "full disk").wait().unwrap().success());
}

/// What the processes said they made, and did not begin to remove.
fn kept_by(log: &[String]) -> BTreeSet<String> {
    let said = |sign| log.iter().filter_map(move |line| line.strip_prefix(sign).map(str::to_owned));
    let removed: BTreeSet<String> = said('-').collect();
    said('+').filter(|name| !removed.contains(name)).collect()
}

#[test]
fn killed_at_random_moments_among_others_they_lose_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("store");
    make(&open(&store), "base", None, true);
    let mut survivors = Vec::new();
    for delay in [3, 11, 23, 41, 60, 85, 110, 140] {
        let mut victims: Vec<Child> = (0..2).map(|_| spawn(dir.path(), "never")).collect();
        survivors.extend((delay % 2 == 0).then(|| spawn(dir.path(), "never")));
        for victim in &mut victims {
            thread::sleep(Duration::from_millis(delay));
            victim.kill().unwrap();
        }
        for victim in &mut victims {
            victim.wait().unwrap();
        }
    }
    for mut survivor in survivors {
        assert!(survivor.wait().unwrap().success());
    }
    let layers = open(&store);
    let listed = BTreeSet::from_iter(names(&layers));
    let kept = kept_by(&log_of(dir.path()));
    assert!(kept.is_subset(&listed), "{:?} are lost", kept.difference(&listed));
    assert_clean(&layers);
}

#[derive(Debug, Clone)]
enum Step {
    Create { parent: usize, view: bool },
    CommitNew(usize),
    Keep(usize),
    Drop(usize),
    Commit(usize),
    Remove(usize),
    Label(usize, String),
    Sweep,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0..8usize, prop::bool::weighted(0.2)).prop_map(|(parent, view)| Step::Create { parent, view }),
        3 => (0..8usize).prop_map(Step::CommitNew),
        4 => (0..8usize).prop_map(Step::Keep),
        1 => (0..8usize).prop_map(Step::Drop),
        2 => (0..8usize).prop_map(Step::Commit),
        3 => (0..8usize).prop_map(Step::Remove),
        1 => (0..8usize, "[a-z]{0,3}").prop_map(|(layer, name)| Step::Label(layer, name)),
        1 => Just(Step::Sweep),
    ];
    prop::collection::vec(step, 0..20)
}

/// What a layer should be.
#[derive(Debug, Clone, PartialEq)]
struct Model {
    kind: LayerKind,
    parent: Option<LayerId>,
    labels: BTreeMap<String, String>,
    visible: bool,
}

impl Model {
    fn may_have_children(&self) -> bool {
        self.kind == LayerKind::Committed
    }
}

fn nth<T>(items: &[T], n: usize) -> Option<&T> {
    (!items.is_empty()).then(|| &items[n % items.len()])
}

/// One process's life: does the steps, compares each outcome with the model, and drops what it did not keep.
fn live(dir: &Path, model: &mut BTreeMap<LayerId, Model>, steps: &[Step]) {
    let layers = open(dir);
    let mut pending: Vec<NewLayer<'_>> = Vec::new();
    for step in steps {
        let visible: Vec<LayerId> = model.iter().filter(|(_, m)| m.visible).map(|(id, _)| *id).collect();
        match step {
            Step::Create { parent, view } => {
                let all: Vec<LayerId> = model.keys().copied().collect();
                let parent = if *parent == 0 { None } else { nth(&all, *parent).copied() };
                let kind = if *view { LayerKind::View } else { LayerKind::Active };
                let made = layers.create(kind, parent, &LayerOptions::default());
                assert_eq!(made.is_ok(), parent.is_none_or(|parent| model[&parent].may_have_children()), "{parent:?}");
                if let Ok(new) = made {
                    model.insert(new.id(), Model { kind, parent, labels: BTreeMap::new(), visible: false });
                    pending.push(new);
                }
            }
            Step::CommitNew(n) => {
                let Some(new) = nth(&pending, *n) else { continue };
                let model = model.get_mut(&new.id()).unwrap();
                assert_eq!(new.commit(&info("x")).is_ok(), model.kind == LayerKind::Active);
                if model.kind == LayerKind::Active {
                    model.kind = LayerKind::Committed;
                }
            }
            Step::Keep(n) if !pending.is_empty() => {
                let new = pending.remove(n % pending.len());
                let fits = model[&new.id()].parent.is_none_or(|parent| model[&parent].visible);
                assert_eq!(layers.store().write(|tx| new.keep(tx, None)).is_ok(), fits);
                if fits {
                    model.get_mut(&new.id()).unwrap().visible = true;
                } else {
                    pending.push(new);
                }
            }
            Step::Drop(n) if !pending.is_empty() => {
                let id = pending[n % pending.len()].id();
                if !model.values().any(|m| m.parent == Some(id)) {
                    drop(pending.remove(n % pending.len()));
                    model.remove(&id);
                }
            }
            Step::Keep(_) | Step::Drop(_) => {}
            Step::Commit(n) => {
                let Some(id) = nth(&visible, *n) else { continue };
                let model = model.get_mut(id).unwrap();
                assert_eq!(layers.commit(*id, &info("y"), |_| Ok(())).is_ok(), model.kind == LayerKind::Active);
                if model.kind == LayerKind::Active {
                    model.kind = LayerKind::Committed;
                }
            }
            Step::Remove(n) => {
                let Some(id) = nth(&visible, *n) else { continue };
                let free = !model.values().any(|m| m.parent == Some(*id));
                assert_eq!(layers.store().write(|tx| layers.remove_in(tx, *id)).is_ok(), free);
                if free {
                    model.remove(id);
                }
            }
            Step::Label(n, name) => {
                let Some(id) = nth(&visible, *n) else { continue };
                layers.store().write(|tx| set_labels(tx, *id, &labelled(name))).unwrap();
                model.get_mut(id).unwrap().labels = labelled(name);
            }
            Step::Sweep => assert_eq!(layers.sweep().unwrap(), 0),
        }
        compare(&layers, model);
    }
    drop(pending);
    model.retain(|_, m| m.visible);
    layers.sweep().unwrap();
    compare(&layers, model);
    assert_clean(&layers);
}

fn compare(layers: &Layers, model: &BTreeMap<LayerId, Model>) {
    let real =
        layers.list().unwrap().into_iter().map(|layer| {
            (layer.id, Model { kind: layer.kind, parent: layer.parent, labels: layer.labels, visible: true })
        });
    let expected = model.iter().filter(|(_, m)| m.visible).map(|(id, m)| (*id, m.clone()));
    assert_eq!(BTreeMap::from_iter(real), BTreeMap::from_iter(expected));
    for (id, m) in model {
        let above = m.parent.map_or(Vec::new(), |parent| layers.chain(parent).unwrap());
        assert_eq!(layers.parents(*id).unwrap(), above);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_sequence_of_operations_does_what_a_plain_map_does(lives in prop::collection::vec(steps(), 1..4)) {
        let dir = tempfile::tempdir().unwrap();
        let mut model = BTreeMap::new();
        for steps in &lives {
            live(dir.path(), &mut model, steps);
        }
    }
}

/// A `load` into a store whose database was lost took the old layers' numbers, and its undo their files.
#[test]
fn a_lost_database_is_no_empty_store() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("records/1")).unwrap();
    let e = Store::open(dir.path(), &[]).err().unwrap();
    assert!(e.kind() == ErrorKind::Corrupt && e.to_string().contains("backup"), "{e}");
    assert!(!dir.path().join("store.db").exists());
}
