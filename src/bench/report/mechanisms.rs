//! How a subject keeps the old data: what is known before anything is measured.

use crate::bench::results::Subject;

/// A way of keeping what is below, by which the report groups its subjects.
pub(super) struct Mechanism {
    pub name: &'static str,
    /// HTML, ours.
    pub text: &'static str,
}

const FILE: Mechanism = Mechanism {
    name: "File copy-up (CoW, unit: the whole file)",
    text: "<p>The first write to a file of the image copies all of it into the writable layer: everything is read once and \
           written once more, before the program's own bytes. The program waits for that. Later writes go to the copy and \
           cost what they cost in a plain directory, and a file that is never written to costs nothing. The copy takes its \
           full size in each container that makes one.</p>",
};

const REFLINK: Mechanism = Mechanism {
    name: "Reflink copy-up (file metadata is copied, data is shared)",
    text: "<p>The first write to a file of the image makes a new file in the writable layer that shares all extents with the \
           old one. Only metadata is written for that, in proportion to the number of extents and not of bytes. The filesystem \
           then redirects what is written to new blocks. Later writes to the same blocks have nothing to unshare.</p>",
};

const EXTENT: Mechanism = Mechanism {
    name: "Extent redirect (RoW above files, unit: a block of the file)",
    text: "<p>The first write to a file of the image makes a sparse file of the same size in the writable layer, which holds \
           the blocks that were written; all others are read from below. A block that is written in part is completed from \
           below first. Completing the file, at the commit of the layer or in the background, copies the rest later.</p>",
};

const BTRFS: Mechanism = Mechanism {
    name: "Copy-on-write tree, btrfs (RoW of data, CoW of the tree)",
    text: "<p>A layer is a snapshot of its parent, so that writing to a file of the image is no special case: data always goes \
           to new blocks. What costs is the tree above them, whose nodes are copied on the way up to the root: once for all \
           that is gathered until the next commit of the filesystem; what fsync asks for before that goes to a log tree, and \
           is written again with the commit. All of this happens without snapshots too: the plain directory shows that share. Files that are rewritten at random fall apart into many extents.</p>",
};

const ZFS: Mechanism = Mechanism {
    name: "Copy-on-write tree, zfs (RoW in records)",
    text: "<p>A layer is a clone of a snapshot. Data goes to new blocks, always, in records: a write of a part of a record reads \
           it and writes all of it anew, in the layer's files as in any other. The tree of blocks above is written with each \
           transaction group; what fsync asks for before that is written to the intent log too. The plain directory is a dataset too and shows that share; the clone adds little to it.</p>",
};

const BLOCKS: Mechanism = Mechanism {
    name: "Thin-pool blocks (CoW, unit: a block of the pool)",
    text: "<p>A layer is a block device of its own with a filesystem on it, and begins as a snapshot of its parent. The first \
           write to a block that both share copies the whole block of the pool and then changes it; a write that covers the \
           block needs no copy. The device does not know files: the filesystem's own log and metadata are copied in \
           the same unit. Later writes to a block that is the layer's own go straight there.</p>",
};

const TREE: Mechanism = Mechanism {
    name: "Redirect-on-write",
    text: "<p>New data goes to a new place, and the old stays where it is. What costs is the bookkeeping of places.</p>",
};

const OTHER: Mechanism = Mechanism {
    name: "Another strategy",
    text: "<p>This version of the report has no description of it; its figures are below.</p>",
};

/// That of a subject, by what it says of its strategy; None for a plain directory.
pub(super) fn of(subject: &Subject) -> Option<&'static Mechanism> {
    let driver = subject.driver.as_deref()?;
    let starts = |words: &str| subject.strategy.starts_with(words);
    Some(match driver {
        _ if starts("copy-up (whole file") => &FILE,
        _ if starts("copy-up (reflink") => &REFLINK,
        _ if starts("copy-up (extents") => &EXTENT,
        _ if starts("copy-on-write") => &BLOCKS,
        "btrfs" => &BTRFS,
        "zfs" => &ZFS,
        _ if starts("redirect-on-write") => &TREE,
        _ => &OTHER,
    })
}
