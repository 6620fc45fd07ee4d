//! How long the code itself takes, without a driver's storage: `cargo bench --bench micro`, or `-- GROUP` for one group.
//! `cargo test --bench micro` runs each case once, so that none of them rots.

mod digest;
mod fixtures;
mod layers;
mod store;
mod tar;
mod union;

use criterion::{Criterion, criterion_group, criterion_main};
use std::time::Duration;

fn short() -> Criterion {
    Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(3))
}

criterion_group! {
    name = micro;
    config = short();
    targets = tar::tar, layers::apply, layers::walk, layers::whiteouts, digest::digest, union::union, store::store
}
criterion_main!(micro);
