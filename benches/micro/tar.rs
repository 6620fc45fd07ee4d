use crate::fixtures::{FILES, append, content, layer_tar, path};
use criterion::{Criterion, Throughput};
use graphdriver_core::tar::{TarReader, TarWriter};
use std::{hint::black_box, io};

pub fn tar(c: &mut Criterion) {
    let tar = layer_tar();
    let contents: Vec<Vec<u8>> = (0..FILES).map(content).collect();
    let mut group = c.benchmark_group("tar");
    group.throughput(Throughput::Bytes(tar.len() as u64));
    group.bench_function("parse", |b| b.iter(|| parse(black_box(&tar))));
    group.bench_function("build", |b| b.iter(|| build(black_box(&contents))));
    group.finish();
}

fn parse(tar: &[u8]) -> u64 {
    let mut input = tar;
    let mut reader = TarReader::new(&mut input);
    let mut bytes = 0;
    while reader.next_entry().expect("the tar is whole").is_some() {
        bytes += io::copy(&mut reader.content(), &mut io::sink()).expect("the tar is whole");
    }
    bytes
}

fn build(contents: &[Vec<u8>]) -> Vec<u8> {
    let mut tar = TarWriter::new(Vec::new());
    for (number, data) in contents.iter().enumerate() {
        append(&mut tar, &path(number as u64), data);
    }
    tar.finish().expect("memory takes what is written")
}
