//! Writing into files of the image.

use super::{BLOCK, Case, Named, Run, SEED, Sizes, binary, block, fill, random};
use crate::bench::{
    meter::{latency, timed},
    results::Sample,
};
use graphdriver_core::Result;
use std::{
    fs::File,
    io::{self, Write},
    os::unix::fs::FileExt,
    path::Path,
};

/// The file that is written to.
const FILE: &str = "data";

/// How many writes follow the first one, for their latency alone.
const LATER: usize = 100;

/// How much is written into each of several containers.
const EACH: usize = 256;

fn open(root: &Path) -> io::Result<File> {
    File::options().write(true).open(root.join(FILE))
}

/// All blocks of a file of `size` bytes, in random order.
fn blocks(size: u64, random: &mut fastrand::Rng) -> Vec<u64> {
    let mut all: Vec<u64> = (0..size / BLOCK).collect();
    random.shuffle(&mut all);
    all
}

/// What is written is not what is there.
fn choices() -> fastrand::Rng {
    fastrand::Rng::with_seed(SEED + 1)
}

fn with_file(run: &mut Run<'_>, size: u64) -> Result<()> {
    run.layer(|dir, cancel| fill(&dir.join(FILE), size, &mut random(), cancel))
}

pub(super) fn sizes(sizes: &Sizes) -> Vec<Case> {
    let usual = [64 << 10, 1 << 20, 64 << 20, 1 << 30];
    let mut all: Vec<u64> = usual.into_iter().filter(|size| *size < sizes.large).collect();
    all.push(sizes.large);
    all.into_iter().map(|size| Case::new(binary(size), size)).collect()
}

pub(super) fn first_write(run: &mut Run<'_>, case: &Case) -> Result<Named> {
    with_file(run, case.x)?;
    Ok(vec![("first-write", one_write(run, case.x)?)])
}

/// One block into the file of `size` bytes; more of them, when all else is measured and the file is opened anew, only for their
/// latency.
fn one_write(run: &mut Run<'_>, size: u64) -> Result<Sample> {
    let used = run.containers(1)?;
    let mut random = choices();
    let blocks = blocks(size, &mut random);
    let data = block(&mut random);
    let mut meter = run.meter()?;
    meter.first(|| open(run.root()).and_then(|file| file.write_all_at(&data, blocks[0] * BLOCK)))?;
    meter.written = BLOCK;
    let mut sample = meter.stop()?;
    run.weigh(used, &mut sample)?;
    let file = open(run.root())?;
    let writes = blocks.iter().skip(1).take(LATER);
    let later = writes.map(|at| Ok(timed(run.cancel, || file.write_all_at(&data, at * BLOCK))?.1));
    sample.later = latency(later.collect::<Result<_>>()?);
    sample.diff = run.diff()?;
    Ok(sample)
}

pub(super) fn shares(sizes: &Sizes) -> Vec<Case> {
    let size = binary(sizes.medium());
    [1, 10, 50, 100].map(|percent| Case::new(format!("{percent}% of {size}"), percent)).into()
}

/// Twice the same blocks.
pub(super) fn rewrite(run: &mut Run<'_>, case: &Case) -> Result<Named> {
    let size = run.sizes.medium();
    with_file(run, size)?;
    let used = run.containers(1)?;
    let mut random = choices();
    let mut blocks = blocks(size, &mut random);
    blocks.truncate((blocks.len() * case.x as usize / 100).max(1));
    let mut first = write_blocks(run, &blocks, &random.fork())?;
    run.weigh(used, &mut first)?;
    run.forget()?;
    let again = write_blocks(run, &blocks, &random.fork())?;
    let again = run.finish(used, again)?;
    // The same files have changed, by as much.
    first.diff = again.diff;
    Ok(vec![("rewrite", first), ("rewrite-again", again)])
}

/// These blocks of the file of every container, the same data in each.
fn write_blocks(run: &Run<'_>, blocks: &[u64], random: &fastrand::Rng) -> Result<Sample> {
    let mut meter = run.meter()?;
    for container in run.stand.containers() {
        // Never the same block twice: zfs would compress that away.
        let mut random = random.clone();
        let write = |file: &File, n: usize, data: &[u8]| file.write_all_at(data, blocks[n] * BLOCK);
        let data = block(&mut random);
        let file = meter.first(|| open(container.path()).and_then(|file| write(&file, 0, &data).map(|()| file)))?;
        for n in 1..blocks.len() {
            let data = block(&mut random);
            meter.later(|| write(&file, n, &data))?;
        }
        meter.written += blocks.len() as u64 * BLOCK;
    }
    meter.stop()
}

pub(super) fn whole(sizes: &Sizes) -> Vec<Case> {
    vec![Case::new(binary(sizes.medium()), sizes.medium())]
}

/// 1 MiB to the end of a file, a block at a time.
pub(super) fn append(run: &mut Run<'_>, case: &Case) -> Result<Named> {
    with_file(run, case.x)?;
    let used = run.containers(1)?;
    let mut random = choices();
    let mut meter = run.meter()?;
    let open = || File::options().append(true).open(run.root().join(FILE));
    let data = block(&mut random);
    let mut file = meter.first(|| open().and_then(|mut file| file.write_all(&data).map(|()| file)))?;
    for _ in 1..EACH {
        let data = block(&mut random);
        meter.later(|| file.write_all(&data))?;
    }
    meter.written = EACH as u64 * BLOCK;
    let sample = meter.stop()?;
    drop(file);
    Ok(vec![("append", run.finish(used, sample)?)])
}

/// Of the file below many layers.
fn small(sizes: Sizes) -> u64 {
    sizes.large.min(1 << 20)
}

pub(super) fn depths(sizes: &Sizes) -> Vec<Case> {
    Case::depths(&binary(small(*sizes)))
}

/// The first write into a file of the lowest layer.
pub(super) fn depth(run: &mut Run<'_>, case: &Case) -> Result<Named> {
    let size = small(run.sizes);
    with_file(run, size)?;
    run.deepen(case.layers)?;
    Ok(vec![("depth", one_write(run, size)?)])
}

pub(super) fn numbers(sizes: &Sizes) -> Vec<Case> {
    let size = binary(sizes.medium());
    let label = |number| format!("{number} container{} ({size})", if number == 1 { "" } else { "s" });
    [1, 2, 5, 10].map(|number| Case::new(label(number), number)).into()
}

/// Containers of one image that write the same blocks, one after the other.
pub(super) fn containers(run: &mut Run<'_>, case: &Case) -> Result<Named> {
    let size = run.sizes.medium();
    with_file(run, size)?;
    let used = run.containers(case.x)?;
    let mut random = choices();
    let mut blocks = blocks(size, &mut random);
    blocks.truncate(EACH);
    let sample = write_blocks(run, &blocks, &random.fork())?;
    Ok(vec![("containers", run.finish(used, sample)?)])
}
