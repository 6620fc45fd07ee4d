//! Locks between processes.

use super::{sys::*, world::*};
use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
};
use std::{
    fs::{File, OpenOptions},
    path::Path,
};

const READ: i32 = libc::F_RDLCK;
const WRITE: i32 = libc::F_WRLCK;
const NONE: i32 = libc::F_UNLCK;

fn rw(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).open(path).unwrap()
}

/// Whether another process gets this flock.
fn other_flocks(path: &Path, operation: FlockOperation) -> bool {
    fork(|| flock(File::open(path).unwrap(), operation).unwrap()).join()
}

/// Whether another process gets this range.
fn other_locks(path: &Path, owner: Owner, kind: i32, start: i64, len: i64) -> bool {
    fork(|| range_lock(&rw(path), owner, kind, start, len).unwrap()).join()
}

fn flocks_exclude(path: &Path) {
    let (shared, exclusive) = (FlockOperation::NonBlockingLockShared, FlockOperation::NonBlockingLockExclusive);
    let file = File::open(path).unwrap();
    flock(&file, shared).unwrap();
    assert!(other_flocks(path, shared));
    assert!(!other_flocks(path, exclusive));
    flock(&file, exclusive).unwrap();
    assert!(!other_flocks(path, shared));
    assert_eq!(
        flock(File::open(path).unwrap(), exclusive).errno(),
        Errno::WOULDBLOCK,
        "two descriptions of one process"
    );
    flock(&file, FlockOperation::Unlock).unwrap();
    assert!(other_flocks(path, exclusive), "the child's end released it");
    flock(&file, exclusive).unwrap();
    drop(file);
    // A child that another test has just forked may still have a copy of the descriptor.
    super::common::eventually("the last close releases it", std::time::Duration::from_secs(5), || {
        other_flocks(path, exclusive)
    });
}

fn ranges_exclude(path: &Path, owner: Owner) {
    let file = rw(path);
    range_lock(&file, owner, WRITE, 10, 10).unwrap();
    range_lock(&file, owner, READ, 30, 10).unwrap();
    for (kind, start, len, free) in [
        (WRITE, 0, 10, true),
        (WRITE, 0, 11, false),
        (READ, 19, 1, false),
        (READ, 30, 5, true),
        (WRITE, 39, 1, false),
        (WRITE, 40, 0, true),
    ] {
        for other in [Owner::Process, Owner::Description] {
            assert_eq!(other_locks(path, other, kind, start, len), free, "{owner:?}, {other:?}: {kind} {start} {len}");
        }
    }
    range_lock(&file, owner, NONE, 12, 3).unwrap();
    assert!(other_locks(path, owner, WRITE, 12, 3) && !other_locks(path, owner, WRITE, 11, 3), "unlocking splits");
    drop(file);
    super::common::eventually("a close releases it", std::time::Duration::from_secs(5), || {
        other_locks(path, owner, WRITE, 0, 0)
    });
}

#[test]
fn flock_excludes_other_processes() {
    let world = world!(|l| put(l.join("lower"), "x", 0o644, 0, 0));
    put(world.at("upper"), "x", 0o644, 0, 0);
    flocks_exclude(&world.at("lower"));
    flocks_exclude(&world.at("upper"));
}

#[test]
fn range_locks_exclude_other_processes() {
    for owner in [Owner::Process, Owner::Description] {
        let world = world!(|l| put(l.join("lower"), "x", 0o644, 0, 0));
        put(world.at("upper"), "x", 0o644, 0, 0);
        ranges_exclude(&world.at("lower"), owner);
        ranges_exclude(&world.at("upper"), owner);
    }
}

#[test]
fn a_process_loses_its_range_locks_at_any_close_and_a_description_does_not() {
    let world = world!(|l| put(l.join("f"), "x", 0o644, 0, 0));
    let path = world.at("f");
    for (owner, free) in [(Owner::Process, true), (Owner::Description, false)] {
        let file = rw(&path);
        range_lock(&file, owner, WRITE, 0, 1).unwrap();
        drop(rw(&path));
        assert_eq!(other_locks(&path, owner, WRITE, 0, 1), free, "{owner:?}");
    }
}

#[test]
fn locks_of_a_killed_process_are_released_and_waiters_go_on() {
    let world = world!(|l| put(l.join("f"), "x", 0o644, 0, 0));
    let path = world.at("f");
    // Copied up before, so that all use one inode.
    let file = rw(&path);
    let (signal_read, signal_write) = std::io::pipe().unwrap();
    let holder = fork(|| {
        let held = rw(&path);
        flock(&held, FlockOperation::LockExclusive).unwrap();
        rustix::io::write(&signal_write, b"x").unwrap();
        std::thread::sleep(std::time::Duration::from_secs(60));
    });
    rustix::io::read(&signal_read, &mut [0; 1]).unwrap();
    assert_eq!(flock(&file, FlockOperation::NonBlockingLockExclusive).errno(), Errno::WOULDBLOCK);
    let waiter = fork(|| flock(rw(&path), FlockOperation::LockExclusive).unwrap());
    holder.kill();
    assert!(!holder.join());
    assert!(waiter.join());
    flock(&file, FlockOperation::LockExclusive).unwrap();
}

#[test]
fn a_lock_taken_before_a_copy_up_excludes_those_who_open_after_it() {
    // `flock FILE COMMAND` opens for reading; another program may open the same file for writing and lock that.
    let world = world!(|l| put(l.join("f"), "x", 0o644, 0, 0));
    let before = File::open(world.at("f")).unwrap();
    flock(&before, FlockOperation::LockExclusive).unwrap();
    let after = rw(&world.at("f"));
    rustix::io::write(&after, b"y").unwrap();
    assert_eq!(flock(&after, FlockOperation::NonBlockingLockExclusive).errno(), Errno::WOULDBLOCK);
}
