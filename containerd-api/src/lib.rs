//! containerd's services `Snapshots` and `Diff`, and what the latter needs of `Content` and `Leases`, as they go over the
//! wire.
//!
//! Generated from `proto/`, which has the names and numbers of containerd's interface and nothing else.

/// By their names in the definition.
mod packages {
    #![allow(missing_docs, unreachable_pub, clippy::all)]
    include!(concat!(env!("OUT_DIR"), "/packages.rs"));
}

/// Messages, server and client of `containerd.services.content.v1.Content`: where blobs are kept.
pub use packages::containerd::services::content::v1 as content;
/// Messages, server and client of `containerd.services.diff.v1.Diff`: layer tars.
pub use packages::containerd::services::diff::v1 as diff;
/// Messages, server and client of `containerd.services.leases.v1.Leases`: what keeps blobs.
pub use packages::containerd::services::leases::v1 as leases;
/// Messages, server and client of `containerd.services.snapshots.v1.Snapshots`.
pub use packages::containerd::services::snapshots::v1 as snapshots;
/// What several of containerd's services use.
pub use packages::containerd::types;
