//! The comparison itself: each kind of difference is made once, and must be noticed.

use super::{
    case::{Subject, Twins, now},
    op::{Bytes, Op, Step},
    stack,
    tree::{self, Alike},
};
use std::{
    fs,
    os::unix::fs::{FileExt, PermissionsExt, symlink},
    path::Path,
    process::Command,
};

type Fault = (&'static str, fn(&Path));

fn faults() -> Vec<Fault> {
    vec![
        ("a byte", |dir| {
            fs::File::options().write(true).open(dir.join("b/big")).unwrap().write_all_at(b"?", 249_999).unwrap()
        }),
        ("a length", |dir| fs::File::options().write(true).open(dir.join("a/a")).unwrap().set_len(10_001).unwrap()),
        ("a mode", |dir| fs::set_permissions(dir.join("c"), fs::Permissions::from_mode(0o750)).unwrap()),
        ("an owner", |dir| std::os::unix::fs::lchown(dir.join("a/d"), Some(7), None).unwrap()),
        ("a time", |dir| fs::File::open(dir.join("a/b/a")).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap()),
        ("a name too many", |dir| fs::write(dir.join("many/n40"), "").unwrap()),
        ("a name too few", |dir| fs::remove_file(dir.join("many/n39")).unwrap()),
        ("an xattr", |dir| xattr::remove(dir.join("a/big"), "user.lower").unwrap()),
        ("a hard link", |dir| {
            fs::remove_file(dir.join("c/c")).unwrap();
            fs::copy(dir.join("a/a"), dir.join("c/c")).unwrap();
        }),
        ("a target", |dir| {
            fs::remove_file(dir.join("a/d")).unwrap();
            symlink("b/d", dir.join("a/d")).unwrap();
        }),
        ("a type", |dir| {
            fs::remove_file(dir.join("a/c")).unwrap();
            fs::write(dir.join("a/c"), "").unwrap();
        }),
    ]
}

fn plain_twins() -> (tempfile::TempDir, std::path::PathBuf, std::path::PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let (one, other) = (dir.path().join("one"), dir.path().join("other"));
    fs::create_dir(&one).unwrap();
    stack::build(&one, &stack::bottom());
    let copied = Command::new("cp").arg("-a").arg(&one).arg(&other).status().unwrap();
    assert!(copied.success());
    (dir, one, other)
}

#[test]
fn every_kind_of_difference_is_noticed() {
    if super::skipped("every_kind_of_difference_is_noticed", super::cannot_mount()) {
        return;
    }
    let since = now();
    for (what, make) in faults() {
        let (_dir, one, other) = plain_twins();
        let check = || {
            let (one, other) = (tree::read(&one).unwrap(), tree::read(&other).unwrap());
            tree::compare(&one, &other, Alike::Twins { since }, &Default::default())
        };
        check().unwrap_or_else(|difference| panic!("before {what}: {difference}"));
        make(&other);
        let said = check().expect_err(what);
        assert!(said.len() < 2000, "{what}: too much is said: {said}");
    }
}

#[test]
fn a_wrong_result_and_a_changed_inode_number_are_noticed() {
    if super::skipped("a_wrong_result_and_a_changed_inode_number_are_noticed", super::cannot_mount()) {
        return;
    }
    super::private_mounts();
    let step = |op| Step { user: 0, umask: 0o022, op };
    let write = Op::Write { path: "b/b".into(), offset: 3, bytes: Bytes { len: 9, seed: 1 } };
    let stat = Op::Chmod { path: "b/b".into(), mode: super::op::Perm(0o644) };
    let twins = |one: &Path, other: &Path| Twins::new(one, other, Subject::Kernel, Default::default(), now()).unwrap();

    let (_dir, one, other) = plain_twins();
    let mut same = twins(&one, &other);
    same.step(&step(write.clone())).unwrap();
    same.step(&step(stat.clone())).unwrap();
    // Another file with the same name, contents and attributes.
    let copied = Command::new("cp").arg("-a").args([other.join("b/b"), other.join("b/new")]).status().unwrap();
    assert!(copied.success());
    fs::rename(other.join("b/new"), other.join("b/b")).unwrap();
    let said = same.step(&step(stat)).unwrap_err();
    assert!(said.contains("inode number"), "{said}");

    let (_dir, one, other) = plain_twins();
    let mut same = twins(&one, &other);
    fs::remove_file(other.join("b/b")).unwrap();
    fs::create_dir(other.join("b/b")).unwrap();
    let said = same.step(&step(write)).unwrap_err();
    assert!(said.contains("gave Err"), "{said}");
}
