//! Random operations over several lives of a process, with a plain map as the model of what they should do.

use super::*;
use proptest::prelude::*;

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
