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

fn dirs(root: &Path) -> impl Iterator<Item = PathBuf> {
    let tree = root.join("tree");
    (0..DIRS).map(move |n| tree.join(format!("d{n}")))
}

fn names(root: &Path) -> impl Iterator<Item = PathBuf> {
    dirs(root).flat_map(|dir| (0..FILES / DIRS).map(move |n| dir.join(format!("f{n}"))))
}

/// An image with a tree of files of 16 KiB, and a container on it. Returns what the filesystem held before that.
fn with_tree(run: &mut Run<'_>) -> Result<u64> {
    run.layer(|root, cancel| {
        dirs(root).try_for_each(fs::create_dir_all)?;
        let mut random = random();
        names(root).try_for_each(|path| fill(&path, SIZE, &mut random, cancel))
    })?;
    run.containers(1)
}

fn change_all(run: &mut Run<'_>, change: impl Fn(&Path) -> io::Result<()>) -> Result<Sample> {
    let used = with_tree(run)?;
    let mut meter = run.meter(used)?;
    for path in names(run.root()) {
        meter.first(|| change(&path))?;
    }
    meter.sample()
}

pub(super) fn chmod(run: &mut Run<'_>, _: &Case) -> Result<Named> {
    let change = |path: &Path| fs::set_permissions(path, Permissions::from_mode(0o600));
    Ok(vec![("chmod", change_all(run, change)?)])
}

pub(super) fn chown(run: &mut Run<'_>, _: &Case) -> Result<Named> {
    Ok(vec![("chown", change_all(run, |path| change_owner(path, Some(1000), Some(1000)))?)])
}

fn make(path: &Path, data: &[u8]) -> io::Result<()> {
    let mut file = File::create_new(path)?;
    // As programs do.
    data.chunks(BLOCK as usize).try_for_each(|part| file.write_all(part))
}

/// The whole tree is removed and made again, as large as it was.
pub(super) fn delete_recreate(run: &mut Run<'_>, _: &Case) -> Result<Named> {
    let used = with_tree(run)?;
    let data = block(&mut random()).repeat((SIZE / BLOCK) as usize);
    let mut meter = run.meter(used)?;
    for path in names(run.root()) {
        meter.first(|| fs::remove_file(path))?;
    }
    dirs(run.root()).try_for_each(fs::remove_dir)?;
    fs::remove_dir(run.root().join("tree"))?;
    dirs(run.root()).try_for_each(fs::create_dir_all)?;
    for path in names(run.root()) {
        meter.later(|| make(&path, &data))?;
        meter.written += SIZE;
    }
    Ok(vec![("delete-recreate", meter.sample()?)])
}

/// New files of one block each, beside those of the image.
pub(super) fn create(run: &mut Run<'_>, _: &Case) -> Result<Named> {
    let used = with_tree(run)?;
    let data = block(&mut random());
    let mut meter = run.meter(used)?;
    for path in names(run.root()) {
        meter.first(|| make(&path.with_extension("new"), &data))?;
        meter.written += BLOCK;
    }
    Ok(vec![("create", meter.sample()?)])
}
