//! Layers on disk are overlayfs's own: what the kernel's overlay wrote is shown as the kernel shows it, and the other way
//! round; so is what fuse-overlayfs wrote. What is hostile or damaged is refused and reaches nothing outside.

#[path = "../common/mod.rs"]
mod common;
#[path = "../disk/mod.rs"]
mod disk;

// Before the modules, which use it.
macro_rules! needs {
    ($test:literal) => {
        let unmet = crate::common::cannot_mount()
            .or_else(|| crate::common::no_program(&["bash", "setfattr", "setfacl", "tar"]));
        if crate::common::skipped($test, unmet) {
            return;
        }
    };
}

mod fuse_overlayfs;
mod hostile;
mod incomplete_files;
mod whiteouts;
mod with_the_kernel;

use common::{Layers, Mounted, program};
use std::{
    fs,
    os::unix::fs::{FileExt, MetadataExt},
    path::Path,
    process::Command,
};

fn kernel(options: &'static [&'static str]) -> impl Fn(&Layers) -> Mounted {
    move |layers| layers.mount_kernel(options)
}

fn ours(layers: &Layers) -> Mounted {
    layers.mount(&[])
}

const FOLLOW: &[&str] = &["redirect_dir=follow", "metacopy=off", "index=off"];

const REDIRECT: &str = "trusted.overlay.redirect";
/// Of an incomplete file.
const HEADER: &str = "trusted.overlay.metacopy";

/// Runs `vfs-fuse --complete` on the layers.
fn complete(layers: &Layers) {
    let out = Command::new(program()).args(["--complete", "-o", &layers.options(&[])]).output().unwrap();
    assert!(out.status.success(), "--complete ended with {}: {}", out.status, String::from_utf8_lossy(&out.stderr));
}

const MIB: usize = 1 << 20;

/// The lower file's bytes: no block is like another, none is zero.
fn pattern(size: usize) -> Vec<u8> {
    (0..size).map(|n| (n / 4096 % 250 + 1) as u8 ^ (n % 7) as u8 | 0x80).collect()
}

/// A lower file of 1 MiB of which 4 KiB in the middle were changed by `copy_up=extent`, and what it should hold.
fn incomplete() -> (Layers, Vec<u8>) {
    let layers = Layers::new(2);
    let mut expected = pattern(MIB);
    fs::create_dir(layers.lowers[1].join("dir")).unwrap();
    fs::write(layers.lowers[1].join("dir/big"), &expected).unwrap();
    fs::write(layers.lowers[1].join("dir/meta"), &expected).unwrap();
    let mounted = layers.mount(&["copy_up=extent"]);
    let file = fs::OpenOptions::new().write(true).open(mounted.path().join("dir/big")).unwrap();
    file.write_all_at(&[b'w'; 4096], 40960).unwrap();
    drop(file);
    expected[40960..45056].fill(b'w');
    assert!(fs::read(mounted.path().join("dir/big")).unwrap() == expected);
    mounted.unmount();
    let upper = fs::metadata(layers.upper.join("dir/big")).unwrap();
    assert_eq!(upper.len(), MIB as u64);
    assert!(upper.blocks() * 512 <= 65536, "it was copied whole, so nothing is tested: {} blocks", upper.blocks());
    (layers, expected)
}

/// Makes an incomplete file what earlier versions made: the header apart from the guards, and an xattr for the number.
fn to_version_1(file: &Path) {
    let set = |name: &str, value: &[u8]| xattr::set(file, name, value).unwrap();
    let value = xattr::get(file, HEADER).unwrap().expect("a header");
    assert_eq!(value[4], 2);
    set("trusted.overlay.vfs.extent", &[&value[..4], &[1], &value[5..64], &value[72..]].concat());
    set("trusted.overlay.vfs.ino", &value[64..72]);
    set(HEADER, &[0xff, 4, 0, 0]);
    set("user.overlay.redirect", b"/.");
}
