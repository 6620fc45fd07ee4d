//! Layer tars, once for all drivers (OCI image specification, "Image Layer Filesystem Changeset"; pax and ustar as in
//! POSIX.1-2008, GNU extensions as in GNU tar's manual, "Basic Tar Format" and "Storing Sparse Files").

mod export;
mod fs_sink;
mod header;
mod reader;
mod record;
mod sparse;
mod unpack;
#[cfg(test)]
mod unpack_tests;
mod writer;

pub use export::{Exporter, RootSource, diff_tar, tree_tar};
pub use reader::{Entry, EntryKind, Tap, TarReader};
pub use record::repack;
pub use unpack::{Unpacked, apply, extract, inherit, unpack};
pub use writer::TarWriter;

use crate::{EscapeXattrs, Metadata, OverlayXattrs, Result};
use std::{io::Read, path::Path};

/// A run of bytes of a file that is stored; what lies between runs are holes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Segment {
    /// Where it begins in the file.
    pub offset: u64,
    /// Its length.
    pub len: u64,
}

/// The content of a regular file on its way into or out of a tar.
pub struct Content<'a> {
    /// Apparent size of the file.
    pub size: u64,
    /// What is stored of it, sorted and without overlap; one segment for a file without holes, none for an empty one.
    pub segments: Vec<Segment>,
    /// The bytes of the segments, one after the other.
    pub data: Box<dyn Read + 'a>,
}

/// Receives what a layer tar says, in its order. Paths are relative, normal (no `.`, `..`, doubled or trailing slashes)
/// and never empty but for the root directory; they may lead through symlinks, which resolve beneath the root.
pub trait Sink {
    /// A file, directory, symlink, device or FIFO. It replaces what this same layer put there, except that a directory
    /// on a directory only changes its attributes. Missing parent directories are made with mode 0755. `content` is there for regular files only.
    fn node(&mut self, path: &Path, meta: &Metadata, content: Option<Content<'_>>) -> Result<()>;
    /// `path` becomes another name of `target`, which this layer or (merged trees only) a lower one has.
    fn hard_link(&mut self, path: &Path, target: &Path) -> Result<()>;
    /// What the layers below have at `path` is gone. What this same layer put there stays, whatever the order.
    fn whiteout(&mut self, path: &Path) -> Result<()>;
    /// What the layers below have in the directory `dir` is gone. What this same layer put there stays.
    fn opaque(&mut self, dir: &Path) -> Result<()>;
    /// After the last entry: what has to wait, such as the times of directories.
    fn finish(&mut self) -> Result<()>;
}

/// Gives what a layer tar is made of.
pub trait Source {
    /// What is at `path`, and what is known of its names if it has several.
    fn metadata(&mut self, path: &Path) -> Result<(Metadata, Option<Links>)>;
    /// The content of a regular file.
    fn content(&mut self, path: &Path) -> Result<Content<'_>>;
}

/// The names of an inode that has several.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Links {
    /// The same for all of them.
    pub key: LinkKey,
    /// How many there are at this moment. Not all of them need to be in the tree, and a filesystem may count too many.
    pub count: u32,
}

/// Tells inodes apart: device and inode number, or whatever a source has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LinkKey(pub u64, pub u64);

/// How a layer's deletions are kept on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whiteouts {
    /// The directory holds this layer alone, in overlayfs's format: a deletion is a character device 0/0, a directory that
    /// hides what is below has the xattr `opaque`. An opaque *root* is marked like any directory, but overlayfs does
    /// not heed it there: who mounts the layer leaves its parents out.
    Overlay {
        /// The namespace of overlayfs's own xattrs.
        xattrs: OverlayXattrs,
        /// What becomes of attributes in the tar that would be taken for such. They never take effect.
        escape: EscapeXattrs,
    },
    /// The directory shows the layers below too: what is deleted is removed.
    Merged,
}
