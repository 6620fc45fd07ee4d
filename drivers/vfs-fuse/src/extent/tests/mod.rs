mod concurrent;
mod crash;
mod filesystems;
mod header;
mod layer;
mod model;
mod privileges;

use super::*;
use rustix::{
    fs::{Mode, OFlags},
    io::Result,
};
use std::{
    fs::File,
    io::Write,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
};

pub(super) const PREFIX: &str = "user.overlay.";
/// What extent files are shown with.
const INO: u64 = 4711;

/// A lower file and an extent file of it, in a directory.
pub(super) struct Pair {
    pub directory: PathBuf,
    pub unit: Unit,
}

impl Pair {
    pub fn new(directory: &Path, lower: &[u8], unit: Unit) -> Pair {
        let mut file = File::create(directory.join("lower")).unwrap();
        file.write_all(lower).unwrap();
        Pair { directory: directory.to_owned(), unit }
    }

    pub fn prepare(&self) -> Result<()> {
        let lower = File::open(self.directory.join("lower")).unwrap().metadata().unwrap();
        let upper = File::create(self.directory.join("upper")).unwrap();
        let header = Header {
            layer_from_bottom: 0,
            path: b"lower".to_vec(),
            lower: LowerIdentity {
                size: lower.size(),
                mtime: (lower.mtime(), lower.mtime_nsec() as u32),
                ino: lower.ino(),
            },
            limit: lower.size(),
            upper: UpperIdentity::of(upper.as_fd()).unwrap(),
            ino: Some(INO),
        };
        prepare(upper.as_fd(), PREFIX, &header)
    }

    pub fn header(&self) -> Option<Header> {
        let value = xattr::get(self.directory.join("upper"), format!("{PREFIX}{XATTR}")).unwrap()?;
        Some(Header::decode(&value).unwrap())
    }

    fn raw(&self, name: &str, flags: OFlags) -> OwnedFd {
        rustix::fs::open(self.directory.join(name), flags | OFlags::CLOEXEC, Mode::empty()).unwrap()
    }

    pub fn open(&self) -> Result<ExtentFile> {
        let header = self.header().expect("an extent file");
        let (upper, lower) = (self.raw("upper", OFlags::RDWR), self.raw("lower", OFlags::RDONLY));
        ExtentFile::open(upper, lower, header, PREFIX, self.unit, true)
    }
}

/// A directory below `at` (default: the temporary directory on a disk) where holes can be trusted.
pub(super) fn directory(at: Option<&Path>) -> tempfile::TempDir {
    tempfile::Builder::new().prefix("extent-").tempdir_in(at.unwrap_or(Path::new("/var/tmp"))).unwrap()
}

/// Bytes of which no two neighbouring places are alike.
pub(crate) fn pattern(seed: u64, length: usize) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x
    };
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        bytes.extend_from_slice(&next().to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// The same without the top bit, and never 0; and with the top bit: what is neither shows.
pub(super) fn old_and_new(seed: u64, length: usize) -> (Vec<u8>, Vec<u8>) {
    let old: Vec<u8> = pattern(seed, length).into_iter().map(|b| b & 0x7f | 1).collect();
    let new = old.iter().map(|b| b | 0x80).collect();
    (old, new)
}

/// Where `now` is neither. Compares whole pieces first, as debug builds are slow at single bytes.
pub(super) fn neither(now: &[u8], old: &[u8], new: &[u8]) -> Option<usize> {
    const PIECE: usize = 512;
    let pieces = now.chunks(PIECE).zip(old.chunks(PIECE).zip(new.chunks(PIECE))).enumerate();
    pieces.filter(|(_, (now, (old, new)))| now != old && now != new).find_map(|(i, (now, (old, new)))| {
        let at = (0..now.len()).find(|&at| now[at] != old[at] && now[at] != new[at]);
        at.map(|at| i * PIECE + at)
    })
}

/// How many random cases to try: `GRAPHDRIVER_PROPTEST_CASES`, or what takes a few seconds.
pub(crate) fn cases(default: u64) -> u64 {
    std::env::var("GRAPHDRIVER_PROPTEST_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(default)
}

/// Runs `body` in this test binary started again by `unshare -m`, so that no mount outlives it, however it ends. `name` is
/// the test's full name. Without the right to do so the test is skipped, and says so.
pub(crate) fn in_private_namespace(name: &str, body: impl FnOnce()) {
    if std::env::var("EXTENT_TEST_INNER").is_ok_and(|inner| inner == name) {
        return body();
    }
    if !rustix::process::geteuid().is_root() {
        eprintln!("{name}: skipped: mounting needs root");
        return;
    }
    let status = std::process::Command::new("unshare")
        .args(["--mount", "--propagation", "private"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture", "--include-ignored"])
        .env("EXTENT_TEST_INNER", name)
        .status()
        .unwrap();
    assert!(status.success(), "{name} failed: see above");
}

/// Runs a command that must succeed.
pub(crate) fn must(command: &str) {
    let output = std::process::Command::new("sh").args(["-c", command]).output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A filesystem on a loop device, for as long as this lives.
pub(crate) struct Disk {
    directory: tempfile::TempDir,
    options: String,
}

impl Disk {
    pub fn new(mkfs: &str, megabytes: u64, options: &str) -> Disk {
        let directory = directory(None);
        std::fs::create_dir(directory.path().join("m")).unwrap();
        let image = directory.path().join("image");
        File::create(&image).unwrap().set_len(megabytes << 20).unwrap();
        must(&format!("{mkfs} {}", image.display()));
        let disk = Disk { directory, options: options.to_owned() };
        disk.mount();
        disk
    }

    pub fn root(&self) -> PathBuf {
        self.directory.path().join("m")
    }

    pub fn mount(&self) {
        let comma = if self.options.is_empty() { "" } else { "," };
        let image = self.directory.path().join("image");
        must(&format!("mount -o loop{comma}{} {} {}", self.options, image.display(), self.root().display()));
    }

    pub fn unmount(&self) {
        must(&format!("umount {}", self.root().display()));
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Fails where a test has failed between an unmount and a mount. Lazily, as that test may have files open.
        let _ = std::process::Command::new("umount").arg("-l").arg(self.root()).output();
    }
}
