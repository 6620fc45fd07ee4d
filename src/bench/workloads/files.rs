//! Many small files.

use super::{BLOCK, Case, Named, Run, Sizes, block, fill, random};
use crate::bench::results::Sample;
use graphdriver_core::Result;
use std::{
    fs::{self, File, Permissions},
    io::{self, Write},
    os::unix::fs::{PermissionsExt, chown as change_owner},
    path::{Path, PathBuf},
};

const DIRS: usize = 20;
const FILES: usize = 1000;
const SIZE: u64 = 16 << 10;

pub(super) fn many(_: &Sizes) -> Vec<Case> {
    vec![Case::new(format!("{FILES} files"), FILES as u64)]
}

pub(super) fn depths(_: &Sizes) -> Vec<Case> {
    Case::depths(&format!("{FILES} files"))
}

fn dirs(root: &Path) -> impl Iterator<Item = PathBuf> {
    let tree = root.join("tree");
    (0..DIRS).map(move |n| tree.join(format!("d{n}")))
}

fn names(root: &Path) -> impl Iterator<Item = PathBuf> {
    dirs(root).flat_map(|dir| (0..FILES / DIRS).map(move |n| dir.join(format!("f{n}"))))
}

/// A layer with a tree of files of 16 KiB.
fn tree(run: &mut Run<'_>) -> Result<()> {
    run.layer(|root, cancel| {
        dirs(root).try_for_each(fs::create_dir_all)?;
        let mut random = random();
        names(root).try_for_each(|path| fill(&path, SIZE, &mut random, cancel))
    })
}

/// An image of it, and a container on that. Returns what the filesystem held before the container.
fn with_tree(run: &mut Run<'_>) -> Result<u64> {
    tree(run)?;
    run.containers(1)
}

fn change_all(run: &mut Run<'_>, used: u64, change: impl Fn(&Path) -> io::Result<()>) -> Result<Sample> {
    let mut meter = run.meter()?;
    for path in names(run.root()) {
        meter.first(|| change(&path))?;
    }
    let sample = meter.stop()?;
    run.finish(used, sample)
}

fn close(path: &Path) -> io::Result<()> {
    fs::set_permissions(path, Permissions::from_mode(0o600))
}

pub(super) fn chmod(run: &mut Run<'_>, _: &Case) -> Result<Named> {
    let used = with_tree(run)?;
    Ok(vec![("chmod", change_all(run, used, close)?)])
}

/// The same files, in the lowest layer of several.
pub(super) fn chmod_depth(run: &mut Run<'_>, case: &Case) -> Result<Named> {
    tree(run)?;
    run.deepen(case.layers)?;
    let used = run.containers(1)?;
    Ok(vec![("depth-chmod", change_all(run, used, close)?)])
}

pub(super) fn chown(run: &mut Run<'_>, _: &Case) -> Result<Named> {
    let used = with_tree(run)?;
    let sample = change_all(run, used, |path| change_owner(path, Some(1000), Some(1000)))?;
    Ok(vec![("chown", sample)])
}

fn make(path: &Path, data: &[u8]) -> io::Result<()> {
    let mut file = File::create_new(path)?;
    // As programs do.
    data.chunks(BLOCK as usize).try_for_each(|part| file.write_all(part))
}

/// The whole tree is removed and made again, as large as it was.
pub(super) fn delete_recreate(run: &mut Run<'_>, _: &Case) -> Result<Named> {
    let used = with_tree(run)?;
    let (mut random, mut data) = (random(), vec![0; SIZE as usize]);
    let mut meter = run.meter()?;
    for path in names(run.root()) {
        meter.first(|| fs::remove_file(path))?;
    }
    dirs(run.root()).try_for_each(fs::remove_dir)?;
    fs::remove_dir(run.root().join("tree"))?;
    dirs(run.root()).try_for_each(fs::create_dir_all)?;
    for path in names(run.root()) {
        random.fill(&mut data);
        meter.later(|| make(&path, &data))?;
        meter.written += SIZE;
    }
    let sample = meter.stop()?;
    Ok(vec![("delete-recreate", run.finish(used, sample)?)])
}

/// New files of one block each, beside those of the image.
pub(super) fn create(run: &mut Run<'_>, _: &Case) -> Result<Named> {
    let used = with_tree(run)?;
    let mut random = random();
    let mut meter = run.meter()?;
    for path in names(run.root()) {
        let data = block(&mut random);
        meter.first(|| make(&path.with_extension("new"), &data))?;
        meter.written += BLOCK;
    }
    let sample = meter.stop()?;
    Ok(vec![("create", run.finish(used, sample)?)])
}
