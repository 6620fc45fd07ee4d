use crate::fixtures::{layer_tar, scratch};
use criterion::{Criterion, Throughput};
use flate2::{Compression, write::GzEncoder};
use graphdriver::image::archive::{HashReader, decompressed, pipelined};
use std::{
    fs::{self, File},
    io::{self, Write},
    path::Path,
};

/// What a layer goes through on its way from an archive, without being unpacked: decompression on one thread, its digest
/// on another.
pub fn digest(c: &mut Criterion) {
    // Several of them, as the start of threads is not the point.
    let tar = layer_tar().repeat(20);
    let dir = scratch();
    let mut gzip = GzEncoder::new(Vec::new(), Compression::default());
    gzip.write_all(&tar).expect("memory takes what is written");
    let gzip = gzip.finish().expect("memory takes what is written");
    let zstd = zstd::encode_all(&tar[..], 3).expect("memory takes what is written");
    let mut group = c.benchmark_group("digest pipeline");
    group.throughput(Throughput::Bytes(tar.len() as u64));
    for (name, stored) in [("plain", &tar), ("gzip", &gzip), ("zstd", &zstd)] {
        let file = dir.path().join(name);
        fs::write(&file, stored).expect("the file can be written");
        group.bench_function(name, |b| b.iter(|| assert_eq!(through(&file), tar.len() as u64)));
    }
    group.finish();
}

fn through(file: &Path) -> u64 {
    let stored = File::open(file).expect("the file is there");
    let plain = decompressed(stored).expect("it is compressed as known");
    let mut hashed = HashReader::new(pipelined(plain, 4).expect("a thread can be started"));
    let bytes = io::copy(&mut hashed, &mut io::sink()).expect("the data are whole");
    std::hint::black_box(hashed.digest());
    bytes
}
