//! The contract of graphdriver's storage drivers, and what all of them share: the layer store, layer tars and the
//! conformance suite. Start at [`GraphDriver`].

mod cancel;
#[cfg(feature = "conformance")]
pub mod conformance;
mod driver;
mod error;
mod id;
mod lock;
#[cfg(feature = "model")]
pub mod model;
pub mod mount;
pub mod overlay_home;
pub mod root;
pub mod store;
mod sys;
pub mod tar;
mod tree;
pub mod walk;

pub use cancel::Cancel;
pub use driver::*;
pub use error::{Context, Error, ErrorKind, Result};
pub use id::{ByteSize, ChainId, DiffId, Digest, LayerId};
pub use lock::open_lock;
pub use root::{Inode, Root};
pub use store::{CommitInfo, Layer, LayerKind, Layers, NewLayer, Recovered, Schema, Store};
pub use tree::{Change, ChangeKind, FileKind, Metadata, Timestamp};
