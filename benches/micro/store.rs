use crate::fixtures::scratch;
use criterion::Criterion;
use graphdriver_core::{
    Access, Capabilities, CommitInfo, CopyUnit, GraphDriver, LayerId, LayerKind, LayerOptions, Layers, Mount,
    Reclaimed, Result, Stored, Usage, WriteStrategy,
};
use std::hint::black_box;

/// A driver that does nothing, so that what is timed is the store.
struct Nothing(Capabilities);

impl GraphDriver for Nothing {
    fn name(&self) -> &'static str {
        "nothing"
    }

    fn capabilities(&self) -> &Capabilities {
        &self.0
    }

    fn create(&self, _: LayerId, _: &[LayerId], _: &LayerOptions) -> Result<()> {
        Ok(())
    }

    fn commit(&self, _: LayerId) -> Result<()> {
        Ok(())
    }

    fn thaw(&self, _: LayerId) -> Result<()> {
        Ok(())
    }

    fn mount(&self, _: LayerId, _: &[LayerId], _: Access) -> Result<Vec<Mount>> {
        Ok(Vec::new())
    }

    fn usage(&self, _: LayerId) -> Result<Usage> {
        Ok(Usage::default())
    }

    fn remove(&self, _: LayerId) -> Result<()> {
        Ok(())
    }

    fn reclaim(&self, _: &dyn Fn(LayerId) -> bool) -> Result<Reclaimed> {
        Ok(Reclaimed::default())
    }

    fn inventory(&self) -> Result<Vec<Stored>> {
        Ok(Vec::new())
    }
}

/// Layers below which queries are made.
const DEPTH: usize = 20;

pub fn store(c: &mut Criterion) {
    let dir = scratch();
    let capabilities = Capabilities {
        write_strategy: WriteStrategy::CopyUp { unit: CopyUnit::File },
        quota: false,
        inode_quota: false,
        native_diff: false,
        idmapped_mounts: false,
        independent_layers: true,
        max_depth: DEPTH,
    };
    let layers = Layers::open(dir.path(), Box::new(Nothing(capabilities)), &[]).expect("the directory is empty");
    let mut top = None;
    for _ in 0..DEPTH {
        top = Some(make(&layers, top, true));
    }
    let top = top.expect("there are some");
    let mut group = c.benchmark_group("store");
    group.bench_function("create and keep a layer, durably", |b| {
        b.iter(|| make(&layers, None, false));
    });
    group.bench_function("create, commit and keep a layer, durably", |b| {
        b.iter(|| make(&layers, None, true));
    });
    group.bench_function("get a layer", |b| b.iter(|| black_box(layers.get(top).expect("it is there"))));
    group.bench_function("the chain of 20 layers", |b| {
        b.iter(|| assert_eq!(layers.chain(top).expect("it is there").len(), DEPTH))
    });
    group.finish();
}

fn make(layers: &Layers, parent: Option<LayerId>, committed: bool) -> LayerId {
    let new = layers.create(LayerKind::Active, parent, &LayerOptions::default()).expect("the parent is committed");
    if committed {
        new.commit(&CommitInfo::default()).expect("it is active");
    }
    layers.store().write(|tx| new.keep(tx, None)).expect("nobody kept it before");
    new.id()
}
