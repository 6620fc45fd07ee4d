//! What the tests of layers on disk share: scripts that fill and change trees, and the comparison of whole trees.

#![allow(dead_code)] // No test uses all of it.

use crate::common::{Layers, Mounted};
use graphdriver_core::{
    Root, Timestamp,
    conformance::DirTree,
    model::{Snapshot, Tree},
};
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

/// Everything there is to see below a directory.
#[track_caller]
pub fn snapshot(path: &Path) -> Snapshot {
    let tree = Root::open(path).and_then(|root| DirTree::new(root).snapshot());
    tree.unwrap_or_else(|e| panic!("reading the tree at {}: {e}", path.display()))
}

/// The same without times, for trees that were made one after the other.
pub fn timeless(mut tree: Snapshot) -> Snapshot {
    tree.values_mut().for_each(|node| node.meta.mtime = Timestamp { secs: 0, nanos: 0 });
    tree
}

/// Fails with what differs, path by path.
#[track_caller]
pub fn assert_same(what: &str, expected: &Snapshot, found: &Snapshot) {
    let mut differences = Vec::new();
    for path in expected.keys().chain(found.keys().filter(|path| !expected.contains_key(*path))) {
        if expected.get(path) != found.get(path) {
            differences.push(format!(
                "{path:?}\n  expected {:?}\n  found    {:?}",
                expected.get(path),
                found.get(path)
            ));
        }
    }
    assert!(differences.is_empty(), "{what}: {} paths differ:\n{}", differences.len(), differences.join("\n"));
    assert!(!expected.is_empty());
}

/// bash with the functions of [`SCRIPTS`], in `dir`. One that hangs is ended after a minute.
pub fn bash(dir: &Path, script: &str) -> Output {
    Command::new("timeout")
        .args(["-s", "KILL", "60", "bash", "-euo", "pipefail", "-c", &format!("{SCRIPTS}\n{script}")])
        .current_dir(dir)
        .env("LC_ALL", "C.UTF-8")
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// What a script prints that must succeed.
#[track_caller]
pub fn sh(dir: &Path, script: &str) -> String {
    let out = bash(dir, script);
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{script}\nended with {}: {said}", out.status);
    String::from_utf8_lossy(&out.stdout).into_owned()
}

/// `bottom` and `middle` fill two lower layers, `change` does to what is mounted all that layers can express, and
/// `change_again` the same kinds of things to what `change` has made.
pub const SCRIPTS: &str = r#"
bottom() {
    mkdir -p a/b/c d/e gone/deep op/sub many/one stay/in moved/x/y swap1 swap2 chain/1/2/3
    for f in a/f a/b/f a/b/c/f d/f d/e/f gone/deep/f gone/f op/f op/sub/f many/f many/one/f stay/in/f moved/f moved/x/f \
        moved/x/y/f swap1/f swap2/f chain/1/2/3/f; do echo "bottom $f" > $f; done
    seq 300000 > big; seq 200000 > stay/big; seq 100000 > stay/big2
    mkdir links; echo linked > links/1; ln links/1 links/2; ln links/1 a/3; echo pair > links/p; ln links/p links/q
    ln -s ../a/f d/symlink; ln -s nowhere dangling; mkfifo fifo; mknod null c 1 3; mknod block b 7 99
    chmod 4755 d/f; chmod 2750 d/e; chmod 1777 op; chown 12:34 a/f; chown -h 56:78 d/symlink; chown 9:10 stay
    setfattr -n user.note -v bottom a/f; setfattr -n user.note -v dir stay; setfattr -n trusted.note -v t stay/in
    setfacl -m u:7:rw a/b/f; setfacl -d -m g:8:rx stay
    echo long > "$(printf 'n%.0s' {1..255})"; echo odd > $'new\nline'; echo colon > 'co:lon,comma\back slash'
    truncate -s 4M sparse; echo end >> sparse
    find . -exec touch -h -d '2001-02-03 04:05:06.123456789 UTC' {} +
}
middle() {
    mkdir -p a/b d many/two moved/z; echo middle > a/b/f; echo middle > a/m; echo middle > many/two/f; echo middle > moved/z/f
    mknod a/b/c c 0 0
    mkdir -p op; setfattr -n trusted.overlay.opaque -v y op; echo middle > op/m
    echo middle > stay-middle
    find . -exec touch -h -d '2002-02-03 04:05:06.987654321 UTC' {} +
}
change() {
    rm a/f; rm -r gone; rm "$(printf 'n%.0s' {1..255})" dangling fifo
    rm -r op; mkdir op; echo new > op/new
    rm -r many/one; mkdir many/one; echo new > many/one/new; rm many/two/f
    echo changed >> a/b/f; echo new > a/new; echo x >> d/f
    echo changed >> links/1; rm links/q
    chmod 600 stay/big; chown 5:6 stay/big2; touch -d '2003-01-01 00:00:00.5 UTC' stay/in/f
    setfattr -n user.note -v changed stay; setfattr -n user.two -v 2 stay/in/f
    ln a/b/f a/b/hard; ln stay/in/f stay/in/hard
    mknod made c 5 6; mkfifo made-fifo; ln -s target made-link; mknod b-made b 8 9
    echo over > null.new; mv null.new null; mv 'co:lon,comma\back slash' renamed
    truncate -s 1M big; dd if=/dev/zero of=sparse bs=1 count=1 seek=2000000 conv=notrunc status=none
    mv stay/big stay/big-moved; mkdir -m 2775 setgid
}
# Directories of lower layers renamed: alone, out of a renamed one, into one, back, onto an empty one, twice.
renames() {
    mv moved renamed-dir; mv renamed-dir/x x-out; mv x-out/y renamed-dir/y-back; echo new > renamed-dir/new
    mkdir moved; echo not-the-old > moved/f
    mv chain/1/2/3 chain/1/three; mv chain/1/2 two; mv two chain/two-again; mv chain/1 one
    mv swap1 tmp; mv swap2 swap1; mv tmp swap2
    mkdir empty; mv -T d empty; mv empty/e e-out; mv e-out 'co:lon dir'
    mv stay 'stay\in,odd'; rm 'stay\in,odd/in/f'
}
change_again() {
    rm -r op; mv a a2; echo a > a; rm stay-middle
    echo again >> links/2; echo again > made-fifo.x; mkdir gone; echo new > gone/new
    find . -name 'new*' -type f -exec chmod 640 {} +
    if [ -d renamed-dir ]; then mv renamed-dir moved-again; rm -r moved; mv moved-again moved; fi
    rm -f big sparse; mkdir big
}
"#;

/// Two lower layers, filled.
pub fn filled() -> Layers {
    let layers = Layers::new(2);
    sh(&layers.lowers[1], "bottom");
    sh(&layers.lowers[0], "middle");
    layers
}

/// What the upper layer has become is a lower one, and a new one is on top.
pub fn push(mut layers: Layers) -> Layers {
    let name = |kind: &str, n: usize| layers.dir().join(format!("{kind}-{n}"));
    let n = layers.lowers.len();
    let (upper, work) = (name("upper", n), name("work", n));
    fs::create_dir(&upper).unwrap();
    fs::create_dir(&work).unwrap();
    layers.lowers.insert(0, std::mem::replace(&mut layers.upper, upper));
    layers.work = work;
    layers
}

/// What is to be seen through a mount, which is taken away again.
#[track_caller]
pub fn seen(mounted: Mounted) -> Snapshot {
    let tree = snapshot(mounted.path());
    mounted.unmount();
    tree
}

/// An xattr in hexadecimal, if it is there.
pub fn xattr_of(path: &Path, name: &str) -> Option<Vec<u8>> {
    xattr::get(path, name).unwrap()
}

/// All paths below a directory, itself not.
pub fn paths(dir: &Path) -> Vec<PathBuf> {
    let mut all = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_dir() {
            all.extend(paths(&entry.path()));
        }
        all.push(entry.path());
    }
    all
}
