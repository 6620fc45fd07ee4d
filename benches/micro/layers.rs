//! Layers on a filesystem: that of the temporary directory.

use crate::fixtures::{FILES, SIZE, layer_tar, path, root, scratch, tree};
use criterion::{BatchSize, Criterion, Throughput};
use graphdriver_core::{
    EscapeXattrs, OverlayXattrs, Root,
    tar::{TarWriter, Whiteouts, diff_tar, tree_tar, unpack},
    walk::changes,
};
use std::{fs, io, path::Path};

/// `user.` attributes, as those of `trusted.` need a privilege.
const OVERLAY: Whiteouts = Whiteouts::Overlay { xattrs: OverlayXattrs::User, escape: EscapeXattrs::Own };

pub fn apply(c: &mut Criterion) {
    let tar = layer_tar();
    let mut group = c.benchmark_group("apply");
    group.throughput(Throughput::Elements(FILES));
    group.bench_function("a layer by itself", |b| {
        b.iter_batched(scratch, |dir| unpacked(&tar, dir, OVERLAY, false), BatchSize::PerIteration)
    });
    group.bench_function("a layer by itself with its record", |b| {
        b.iter_batched(scratch, |dir| unpacked(&tar, dir, OVERLAY, true), BatchSize::PerIteration)
    });
    group.bench_function("onto its parents", |b| {
        b.iter_batched(tree, |dir| unpacked(&tar, dir, Whiteouts::Merged, false), BatchSize::PerIteration)
    });
    group.finish();
}

/// Gives the directory back, so that its removal is not timed.
fn unpacked(tar: &[u8], dir: tempfile::TempDir, whiteouts: Whiteouts, record: bool) -> [tempfile::TempDir; 2] {
    let records = scratch();
    let record = record.then(|| records.path().join("record"));
    unpack(&mut &tar[..], &root(dir.path()), whiteouts, record.as_deref()).expect("our own tar can be unpacked");
    [dir, records]
}

pub fn walk(c: &mut Criterion) {
    let (lower, upper) = (tree(), tree());
    for number in (0..FILES).step_by(10) {
        fs::write(upper.path().join(path(number)), "changed").expect("the file is there");
    }
    let (lower, upper) = (root(lower.path()), root(upper.path()));
    let mut group = c.benchmark_group("walk and diff");
    group.throughput(Throughput::Elements(FILES));
    group.bench_function("walk, all inodes the same", |b| b.iter(|| assert_eq!(changed(&lower, &lower), 0)));
    group.bench_function("walk, all contents compared, 1 in 10 changed", |b| {
        b.iter(|| assert!(changed(&lower, &upper) >= FILES / 10))
    });
    group.bench_function("diff as a tar, 1 in 10 changed", |b| {
        b.iter(|| diff_tar(Some(&lower), &upper, None, io::sink()).expect("the trees can be read"))
    });
    group.throughput(Throughput::Bytes(FILES * SIZE));
    group.bench_function("the whole tree as a tar", |b| {
        b.iter(|| tree_tar(&lower, io::sink()).expect("the tree can be read"))
    });
    group.finish();
}

fn changed(lower: &Root, upper: &Root) -> u64 {
    let mut found = 0;
    let mut count = |_| {
        found += 1;
        Ok(())
    };
    changes(Some(lower), upper, None, &mut count).expect("the trees can be read");
    found
}

pub fn whiteouts(c: &mut Criterion) {
    let mut tar = TarWriter::new(Vec::new());
    for number in 0..FILES {
        tar.whiteout(&path(number)).expect("memory takes what is written");
    }
    let tar = tar.finish().expect("memory takes what is written");
    let (lower, upper) = (tree(), scratch());
    for dir in 0..FILES / 50 {
        fs::create_dir(upper.path().join(format!("dir{dir}"))).expect("the directory is empty");
    }
    let mut group = c.benchmark_group("whiteouts");
    group.throughput(Throughput::Elements(FILES));
    group.bench_function("from a tar to overlayfs's", |b| {
        b.iter_batched(scratch, |dir| unpacked(&tar, dir, OVERLAY, false), BatchSize::PerIteration)
    });
    group.bench_function("from a tar to deletions", |b| {
        b.iter_batched(tree, |dir| unpacked(&tar, dir, Whiteouts::Merged, false), BatchSize::PerIteration)
    });
    group.bench_function("from deletions to a tar", |b| b.iter(|| deletions(lower.path(), upper.path())));
    group.finish();
}

fn deletions(lower: &Path, upper: &Path) -> u64 {
    let tar = diff_tar(Some(&root(lower)), &root(upper), None, Vec::new()).expect("the trees can be read");
    tar.len() as u64
}
