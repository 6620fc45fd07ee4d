//! containerd's service `containerd.services.snapshots.v1.Snapshots`, as it goes over the wire.
//!
//! Generated from `proto/`, which has the names and numbers of containerd's interface and nothing else.

/// By their names in the definition.
mod packages {
    #![allow(missing_docs, unreachable_pub, clippy::all)]
    include!(concat!(env!("OUT_DIR"), "/packages.rs"));
}

/// Messages, server and client of the service.
pub use packages::containerd::services::snapshots::v1 as snapshots;
/// What several of containerd's services use.
pub use packages::containerd::types;
