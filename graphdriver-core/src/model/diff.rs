//! How two trees differ, worked out from complete snapshots: the reference that walks and native diffs are held to.

use super::op::{Node, Snapshot};
use crate::{Change, ChangeKind, FileKind};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

/// The changes from `lower` (nothing at all for a base layer) to `upper`, in the order of [`Change`]. The root is listed only
/// if its own metadata differs. A file whose inode got or lost names is listed under all it has, so that a layer tar has
/// all of them.
pub fn diff(lower: Option<&Snapshot>, upper: &Snapshot) -> Vec<Change> {
    diff_by(lower, upper, |a, b| differs(a, b) || a.names != b.names)
}

/// Whether the inodes differ in anything but their names.
pub(crate) fn differs(a: &Node, b: &Node) -> bool {
    (&a.meta, a.content) != (&b.meta, b.content)
}

/// The same by another measure of when what is in both is different.
pub(crate) fn diff_by(
    lower: Option<&Snapshot>,
    upper: &Snapshot,
    differs: impl Fn(&Node, &Node) -> bool,
) -> Vec<Change> {
    let empty = Snapshot::new();
    let lower = lower.unwrap_or(&empty);
    let mut kinds: BTreeMap<PathBuf, ChangeKind> = BTreeMap::new();
    for (path, node) in upper {
        match lower.get(path) {
            None => drop(kinds.insert(path.clone(), ChangeKind::Added)),
            Some(old) if differs(old, node) => drop(kinds.insert(path.clone(), ChangeKind::Modified)),
            Some(_) => {}
        }
    }
    for path in lower.keys().filter(|path| !upper.contains_key(*path)) {
        // Below what is gone, or is no directory any more, nothing is listed.
        let parent_stays = path.parent().and_then(|p| upper.get(p)).is_some_and(is_dir);
        if parent_stays {
            kinds.insert(path.clone(), ChangeKind::Deleted);
        }
    }
    if lower.is_empty() {
        kinds.remove(Path::new(""));
    }
    let above = kinds.keys().flat_map(|path| path.ancestors().skip(1));
    let above: BTreeSet<&Path> = above.filter(|path| !path.as_os_str().is_empty()).collect();
    let in_both: Vec<PathBuf> =
        above.into_iter().filter(|p| lower.contains_key(*p) && upper.contains_key(*p)).map(Path::to_owned).collect();
    for path in in_both {
        kinds.entry(path).or_insert(ChangeKind::Modified);
    }
    kinds.into_iter().map(|(path, kind)| Change { path, kind }).collect()
}

fn is_dir(node: &Node) -> bool {
    node.meta.kind == FileKind::Directory
}

#[cfg(test)]
mod tests {
    use super::super::{MemTree, Op, Tree};
    use super::*;

    fn changes(lower: &[Op], upper: &[Op]) -> Vec<String> {
        let mut tree = MemTree::new();
        lower.iter().for_each(|op| tree.apply(op).unwrap());
        let before = tree.snapshot().unwrap();
        upper.iter().for_each(|op| tree.apply(op).unwrap());
        let list = diff(Some(&before), &tree.snapshot().unwrap());
        list.iter().map(|c| format!("{} /{}", c.kind.letter(), c.path.display())).collect()
    }

    #[test]
    fn lists_a_directory_before_what_is_in_it_and_nothing_below_a_deleted_one() {
        let lower =
            [Op::mkdir("a"), Op::write("a/x", "1"), Op::mkdir("b"), Op::write("b/y", "2"), Op::write("a.b", "")];
        let upper = [Op::unlink("b/y"), Op::rmdir("b"), Op::write("a/x", "2"), Op::write("a.b", "3")];
        assert_eq!(changes(&lower, &upper), ["C /a", "C /a/x", "C /a.b", "D /b"]);
    }

    #[test]
    fn a_file_that_became_a_directory_is_modified_and_its_content_added() {
        let upper = [Op::unlink("x"), Op::mkdir("x"), Op::write("x/new", "")];
        assert_eq!(changes(&[Op::write("x", "1")], &upper), ["C /x", "A /x/new"]);
        let back = [Op::unlink("x/old"), Op::rmdir("x"), Op::write("x", "")];
        assert_eq!(changes(&[Op::mkdir("x"), Op::write("x/old", "")], &back), ["C /x"]);
    }

    #[test]
    fn nothing_changed_is_an_empty_list() {
        assert!(changes(&[Op::mkdir("a")], &[]).is_empty());
    }
}
