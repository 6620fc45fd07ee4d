use crate::fixtures::{FILES, path, scratch};
use criterion::{Criterion, Throughput};
use graphdriver_vfs_fuse::{config::Config, union::Union};
use std::{ffi::OsStr, fs, path::PathBuf, sync::Arc};

const LAYERS: u64 = 10;
const ROOT: u64 = 1;

/// Names in a union of ten layers, each of which has a tenth of the files.
pub fn union(c: &mut Criterion) {
    let dir = scratch();
    let lower: Vec<PathBuf> = (0..LAYERS).map(|layer| dir.path().join(layer.to_string())).collect();
    for number in 0..FILES {
        let file = lower[(number % LAYERS) as usize].join(path(number));
        fs::create_dir_all(file.parent().expect("files are in directories")).expect("the directory can be made");
        fs::write(file, "content").expect("the file can be written");
    }
    let union = Union::open(Config { lower, ..Config::default() }).expect("the layers make a union");
    let mut group = c.benchmark_group("union lookup");
    group.bench_function("in the topmost of ten layers", |b| b.iter(|| found(&union, "dir0", "file0")));
    group.bench_function("in the lowest of ten layers", |b| b.iter(|| found(&union, "dir0", "file9")));
    group.bench_function("of a name that is nowhere", |b| b.iter(|| assert!(!found(&union, "dir0", "nothing"))));
    group.throughput(Throughput::Elements(FILES));
    group.bench_function("listing all directories", |b| b.iter(|| assert_eq!(listed(&union), FILES + FILES / 50)));
    group.finish();
}

/// Whether the file is there. What the kernel would remember is forgotten again.
fn found(union: &Arc<Union>, dir: &str, file: &str) -> bool {
    let dir = union.lookup(ROOT, OsStr::new(dir)).expect("the directory is there").id;
    let file = union.lookup(dir, OsStr::new(file)).ok();
    if let Some(file) = &file {
        union.forget(file.id, 1);
    }
    union.forget(dir, 1);
    file.is_some()
}

fn listed(union: &Arc<Union>) -> u64 {
    let mut names = names(union, ROOT);
    for number in 0..FILES / 50 {
        let dir = union.lookup(ROOT, OsStr::new(&format!("dir{number}"))).expect("the directory is there").id;
        names += self::names(union, dir);
        union.forget(dir, 1);
    }
    names
}

/// Those of one directory, without `.` and `..`.
fn names(union: &Arc<Union>, dir: u64) -> u64 {
    let mut names = 0;
    let mut each = |entry: graphdriver_vfs_fuse::union::DirEntry<'_>| {
        names += u64::from(entry.name != "." && entry.name != "..");
        true
    };
    union.readdir(dir, 0, &mut each).expect("the directory can be read");
    names
}
