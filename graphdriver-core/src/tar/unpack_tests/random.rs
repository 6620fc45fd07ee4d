//! Random tars come back or are refused, and overlayfs shows of two layers what merging them gives.

use super::*;
use proptest::{prelude::*, sample::select};

/// One entry of a random tar. Few names, so that entries meet.
#[derive(Debug, Clone)]
enum Op {
    File(String, String),
    Dir(String, u32),
    Symlink(String, String),
    Link(String, String),
    Fifo(String),
    Whiteout(String),
    Opaque(String),
    Sparse(String, u64),
    Time(String),
    Long(String),
}

fn path() -> impl Strategy<Value = String> {
    prop::collection::vec(select(&["a", "b", "c", "d"][..]), 1..4).prop_map(|parts| parts.join("/"))
}

fn op(symlinks: bool) -> impl Strategy<Value = Op> {
    let target = select(&["a", "b", "/", "..", "../..", "/c/d", "b/../a", "none"][..]).prop_map(str::to_owned);
    prop_oneof![
        8 => (path(), "[a-z]{0,600}").prop_map(|(p, c)| Op::File(p, c)),
        6 => (path(), 0..0o10000u32).prop_map(|(p, m)| Op::Dir(p, m)),
        if symlinks { 4 } else { 0 } => (path(), target).prop_map(|(p, t)| Op::Symlink(p, t)),
        4 => (path(), path()).prop_map(|(p, t)| Op::Link(p, t)),
        1 => path().prop_map(Op::Fifo),
        4 => path().prop_map(Op::Whiteout),
        2 => path().prop_map(Op::Opaque),
        1 => (path(), 0..9u64).prop_map(|(p, at)| Op::Sparse(p, at * 5000)),
        1 => "-?[0-9]{1,18}([.][0-9]{1,9})?".prop_map(Op::Time),
        1 => "[a-z]{101,250}".prop_map(Op::Long),
    ]
}

fn path_of(op: &Op) -> &str {
    match op {
        Op::File(path, _) | Op::Dir(path, _) | Op::Symlink(path, _) | Op::Link(path, _) | Op::Fifo(path) => path,
        Op::Whiteout(path) | Op::Opaque(path) | Op::Sparse(path, _) => path,
        Op::Time(_) | Op::Long(_) => "",
    }
}

/// With an entry for every directory before what is in it, as layers have them, and for what links name.
fn build_with_parents(ops: &[Op]) -> Vec<u8> {
    let mut all = Vec::new();
    let mut push = |op: Op| {
        let path = path_of(&op).to_owned();
        let dirs = path.match_indices('/').map(|(at, _)| &path[..at]);
        all.extend(dirs.chain(matches!(op, Op::Opaque(_)).then_some(&*path)).map(|d| Op::Dir(d.to_owned(), 0o755)));
        all.push(op);
    };
    for op in ops {
        if let Op::Link(_, target) = op {
            push(Op::File(target.clone(), "linked".to_owned()));
        }
        push(op.clone());
    }
    build(&all)
}

fn build(ops: &[Op]) -> Vec<u8> {
    let mut tar = Tar::default();
    for op in ops {
        tar = match op {
            Op::File(path, content) => tar.file(path, content),
            Op::Dir(path, mode) => {
                let mut header = Tar::header(b'5', path.as_bytes(), b"", 0);
                header.set_mode(*mode);
                header.set_cksum();
                tar.raw(&header, b"")
            }
            Op::Symlink(path, target) => tar.symlink(path, target),
            Op::Link(path, target) => tar.link(path, target),
            Op::Fifo(path) => tar.entry(b'6', path, "", b""),
            Op::Whiteout(path) => {
                let (dir, name) = path.rsplit_once('/').unwrap_or((".", path));
                tar.file(&format!("{dir}/.wh.{name}"), "")
            }
            Op::Opaque(path) => tar.file(&format!("{path}/.wh..wh..opq"), ""),
            Op::Sparse(path, at) => {
                let (size, map) = ((at + 5000).to_string(), format!("{at},4,{},0", at + 5000));
                tar.pax(&[("GNU.sparse.size", size.as_bytes()), ("GNU.sparse.map", map.as_bytes())]).file(path, "data")
            }
            Op::Time(time) => tar.pax(&[("mtime", time.as_bytes())]).file("time", "t"),
            Op::Long(name) => tar.entry(b'L', "././@LongLink", "", name.as_bytes()).file("short", "long"),
        };
    }
    tar.end()
}

/// The tree without times, which differ where a directory has no entry of its own.
fn timeless(root: &Root) -> BTreeMap<PathBuf, String> {
    let mut all = tree(root);
    for text in all.values_mut() {
        let (before, after) = text.split_once("mtime").unwrap();
        *text = format!("{before}{}", after.split_once('}').unwrap().1);
    }
    all
}

proptest! {
    // Each syncs a record; a few thousand were run on tmpfs.
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn any_tar_comes_back_or_is_corrupt(ops in prop::collection::vec(op(true), 1..25)) {
        let tar = build(&ops);
        for whiteouts in [OVERLAY, Whiteouts::Merged] {
            let bench = Bench::new();
            match bench.unpack(&tar, whiteouts) {
                Ok(_) => prop_assert!(bench.repack(&tar).unwrap() == tar),
                Err(e) => prop_assert_eq!(e.kind(), ErrorKind::Corrupt, "{}", e),
            }
        }
    }

    /// Cut or bent at any place a tar may be refused, and does nothing worse.
    #[test]
    fn a_damaged_tar_comes_back_or_is_refused(
        ops in prop::collection::vec(op(true), 1..8), at in any::<prop::sample::Index>(), byte in any::<u8>(), cut: bool,
    ) {
        let mut tar = build(&ops);
        let at = at.index(tar.len());
        tar[at] = byte;
        tar.truncate(if cut { at } else { tar.len() });
        let bench = Bench::new();
        if bench.unpack(&tar, OVERLAY).is_ok() {
            prop_assert!(bench.repack(&tar).unwrap() == tar);
        }
    }

    /// What overlayfs shows of two layers is what applying one on the other gives. Without symlinks, through which
    /// a layer reaches into the ones below in a merged tree only.
    #[test]
    fn overlaid_and_merged_layers_are_the_same_tree(
        lower in prop::collection::vec(op(false), 1..15), upper in prop::collection::vec(op(false), 1..15),
    ) {
        let (lower, upper) = (build_with_parents(&lower), build_with_parents(&upper));
        let (below, top, merged) = (Bench::new(), Bench::new(), Bench::new());
        prop_assume!(below.unpack(&lower, OVERLAY).is_ok() && top.unpack(&upper, OVERLAY).is_ok());
        unpack(&mut &lower[..], &merged.root(), Whiteouts::Merged, None).unwrap();
        merged.unpack(&upper, Whiteouts::Merged).unwrap();
        prop_assert_eq!(timeless(&overlay(&[&top, &below])), timeless(&merged.root()));
    }
}
