//! The suite on the in-memory reference, with and without quotas and hard links that survive a copy-up.

use graphdriver_core::{
    conformance::{self, Setup},
    model::{HardLinks, ModelDriver},
};
use std::process::ExitCode;

fn main() -> ExitCode {
    conformance::main(vec![
        Setup::new("model", || Ok(Box::new(ModelDriver::new()))),
        Setup::new("model::without_quota", || Ok(Box::new(ModelDriver::new().without_quota()))),
        Setup::new("model::split_links", || Ok(Box::new(ModelDriver::new().with_links(HardLinks::Split)))),
    ])
}
