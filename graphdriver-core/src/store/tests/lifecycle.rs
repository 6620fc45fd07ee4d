//! A layer from its making to its removal, with what is refused on the way and what a failed step leaves.

use super::*;
use std::sync::atomic::{AtomicUsize, Ordering};

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
