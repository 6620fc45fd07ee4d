//! Random operations over several layers, on the driver and on the reference.

use super::{Case, Subject, harness::quietly, twin::Twin};
use crate::{Error, ErrorKind, FileKind, LayerId, Result, model::Op};
use proptest::{
    collection::vec,
    prelude::*,
    sample::select,
    test_runner::{Config, TestCaseError, TestError, TestRunner},
};
use std::{
    cell::{Cell, RefCell},
    ffi::OsString,
    os::unix::ffi::OsStringExt,
    path::PathBuf,
};

pub(super) const CASE: Case = Case {
    name: "random_operations_equal_the_model",
    story: "combinations nobody thought of: trees, errors, change lists and layer tars, over branching chains of layers",
    needs: |_| Ok(()),
    run,
};

/// A layer on one of those before it.
#[derive(Debug, Clone)]
struct Plan {
    /// How many layers back, modulo the number of layers so far.
    parent: Option<usize>,
    /// Each through a mount of its own.
    sessions: Vec<Vec<Op>>,
}

/// As many as take a driver a few seconds.
const DEFAULT_CASES: u32 = 24;

fn run(subject: &mut dyn Subject) -> Result<()> {
    let asked = std::env::var("GRAPHDRIVER_PROPTEST_CASES").ok().and_then(|n| n.parse().ok());
    let config = Config {
        cases: asked.unwrap_or(DEFAULT_CASES),
        failure_persistence: None,
        max_shrink_iters: 2000,
        ..Config::default()
    };
    let subject = RefCell::new(subject);
    let next = Cell::new(1);
    let outcome = TestRunner::new(config).run(&plans(), |plans| {
        let mut subject = subject.borrow_mut();
        let first = next.get();
        let ran = quietly(|| one(&mut **subject, first, &plans).map_err(|e| format!("{e:?}"))).flatten();
        // Never a number twice, and nothing left of a sequence that failed.
        next.set(first + 10_000);
        subject.driver().reclaim(&|_| false).map_err(|e| TestCaseError::fail(e.to_string()))?;
        ran.map_err(TestCaseError::fail)
    });
    outcome.map_err(|e| match e {
        TestError::Fail(why, plans) => {
            Error::new(ErrorKind::Corrupt, format!("{why}\nThe shortest sequence found:\n{plans:#?}"))
        }
        TestError::Abort(why) => Error::new(ErrorKind::Corrupt, why.to_string()),
    })
}

fn one(subject: &mut dyn Subject, first: u64, plans: &[Plan]) -> Result<()> {
    let mut twin = Twin::numbered(subject, first)?;
    let mut layers: Vec<LayerId> = vec![twin.layer(None, &start())?];
    for plan in plans {
        let parent = plan.parent.map(|back| layers[layers.len() - 1 - back % layers.len()]);
        let id = twin.create(parent)?;
        plan.sessions.iter().try_for_each(|ops| twin.try_run(id, ops))?;
        twin.check(id)?;
        twin.commit(id)?;
        layers.push(id);
    }
    // Whatever was done to one has left the others as they were.
    layers.iter().try_for_each(|id| twin.check(*id))?;
    while let Some(id) = layers.pop() {
        twin.remove(id)?;
        layers.iter().try_for_each(|id| twin.check_tree(*id))?;
    }
    Ok(())
}

fn plans() -> impl Strategy<Value = Vec<Plan>> {
    let allowed = op().prop_filter("needs a privilege", |op| super::all_ids_are_mapped() || !needs_privilege(op));
    let sessions = vec(vec(allowed, 0..12), 1..3);
    // Rarely on none: most of what goes wrong goes wrong between a layer and its parent.
    let parent = prop_oneof![1 => Just(None), 5 => Just(Some(0)), 4 => (1..5usize).prop_map(Some)];
    vec((parent, sessions).prop_map(|(parent, sessions)| Plan { parent, sessions }), 1..6)
}

/// What the first layer holds: from an empty tree random operations would mostly fail.
fn start() -> Vec<Op> {
    let mut ops = Vec::new();
    for dir in ["a", "a/b", "a/b/c", "b", "b/a", "c"] {
        ops.push(Op::mkdir(dir));
    }
    for file in ["a/a", "a/b/a", "a/b/b", "a/b/c/a", "b/b", "b/a/a", "c/a", "c/b"] {
        ops.push(Op::write(file, vec![b'x'; 10_000]));
    }
    ops.extend([Op::link("a/a", "c/c"), Op::symlink("b/c", "/a/b"), Op::mknod("a/c", FileKind::Fifo)]);
    ops
}

/// Few names, so that operations meet.
fn path() -> impl Strategy<Value = PathBuf> {
    let name =
        prop_oneof![8 => select(vec![b"a".to_vec(), b"b".to_vec(), b"c".to_vec()]), 1 => Just(b"\xff:,\\".to_vec())];
    let depth = prop_oneof![2 => Just(1usize), 4 => Just(2), 2 => Just(3), 1 => Just(4)];
    depth
        .prop_flat_map(move |depth| vec(name.clone(), depth))
        .prop_map(|names| names.into_iter().map(OsString::from_vec).collect())
}

fn path_or_root() -> impl Strategy<Value = PathBuf> {
    prop_oneof![1 => Just(PathBuf::new()), 12 => path()]
}

fn op() -> impl Strategy<Value = Op> {
    let mode = || select(vec![0o644u32, 0o755, 0o700, 0o4755, 0o2775, 0o1777, 0]);
    let small = || 0..20_000u64;
    let kind = select(vec![
        FileKind::Fifo,
        FileKind::CharDevice { major: 1, minor: 3 },
        FileKind::BlockDevice { major: 7, minor: 9 },
    ]);
    let xattr = || select(vec!["user.a", "user.b", "trusted.c"]);
    let target = prop_oneof![path(), path().prop_map(|p| PathBuf::from("/").join(p)), Just("..".into())];
    prop_oneof![
        8 => (path(), mode()).prop_map(|(path, mode)| Op::Mkdir { path, mode }),
        8 => (path(), small(), 1..6000usize, any::<u8>(), mode())
            .prop_map(|(path, offset, len, byte, mode)| Op::Write { path, offset, data: vec![byte; len], mode }),
        2 => (path(), small()).prop_map(|(path, size)| Op::Truncate { path, size }),
        2 => (path(), small(), 1..9000u64).prop_map(|(path, offset, len)| Op::Punch { path, offset, len }),
        7 => path().prop_map(|path| Op::Unlink { path }),
        6 => path().prop_map(|path| Op::Rmdir { path }),
        7 => (path(), path()).prop_map(|(from, to)| Op::Rename { from, to }),
        4 => (path(), path()).prop_map(|(target, path)| Op::Link { target, path }),
        2 => (path(), target).prop_map(|(path, target)| Op::Symlink { path, target }),
        1 => (path(), kind, mode()).prop_map(|(path, kind, mode)| Op::Mknod { path, kind, mode }),
        3 => (path_or_root(), mode()).prop_map(|(path, mode)| Op::Chmod { path, mode }),
        3 => (path_or_root(), 0..3u32, 0..3u32).prop_map(|(path, uid, gid)| Op::Chown { path, uid, gid }),
        2 => (path_or_root(), -2..3i64, 0..3u32).prop_map(|(path, s, ns)| Op::utimes(path, s, ns)),
        3 => (path_or_root(), xattr(), vec(any::<u8>(), 0..20)).prop_map(|(path, name, value)| Op::set_xattr(path, name, value)),
        1 => (path_or_root(), xattr()).prop_map(|(path, name)| Op::remove_xattr(path, name)),
    ]
}

/// What nobody may do in an unprivileged user namespace.
fn needs_privilege(op: &Op) -> bool {
    match op {
        Op::Chown { uid, gid, .. } => (*uid, *gid) != (0, 0),
        Op::Mknod { kind, .. } => *kind != FileKind::Fifo,
        // The next write takes them away from who is not root everywhere.
        Op::Write { mode, .. } | Op::Chmod { mode, .. } => mode & 0o6000 != 0,
        Op::SetXattr { name, .. } | Op::RemoveXattr { name, .. } => name.to_string_lossy().starts_with("trusted."),
        _ => false,
    }
}
