//! A pool to test on, in a file.

use graphdriver_core::{Context, Error, ErrorKind, Options, Result};
use graphdriver_quota::refquota::{zfs, zpool};
use std::{
    fs,
    path::Path,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

/// Sparse; what the largest cases write fits in it several times.
const SIZE: u64 = 2 << 30;

/// What keeps the tests from running here: the guest has it.
pub fn missing() -> Option<String> {
    if !Path::new("/dev/zfs").exists() {
        return Some("the kernel has no ZFS".into());
    }
    zpool(&["list"]).err().map(|e| e.to_string())
}

/// A pool of this process, destroyed when this is dropped.
pub struct Pool {
    name: String,
    _image: tempfile::NamedTempFile,
    datasets: AtomicU64,
}

impl Pool {
    pub fn new() -> Result<Pool> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let name = format!("gdtest{}x{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let image = tempfile::Builder::new().prefix("graphdriver-test-").tempfile()?;
        image.as_file().set_len(SIZE)?;
        let file = image.path().to_str().ok_or_else(|| Error::new(ErrorKind::InvalidInput, "an odd TMPDIR"))?;
        let mut arguments = vec!["create", "-f", "-o", "cachefile=none", "-o", "autotrim=on"];
        // Uncompressed, because the suite's data is not as random as it may look.
        arguments.extend(["-O", "mountpoint=none", "-O", "compression=off", &name, file]);
        zpool(&arguments)?;
        Ok(Pool { name, _image: image, datasets: AtomicU64::new(0) })
    }

    /// The one that all tests share, made when the first one asks, gone with the last one.
    pub fn shared() -> Result<Arc<Pool>> {
        static SHARED: Mutex<Weak<Pool>> = Mutex::new(Weak::new());
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pool) = shared.upgrade() {
            return Ok(pool);
        }
        let pool = Arc::new(Pool::new()?);
        *shared = Arc::downgrade(&pool);
        Ok(pool)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        // What a failed test has open may take a moment.
        for _ in 0..50 {
            match zpool(&["destroy", "-f", &self.name]) {
                Err(e) if e.kind() == ErrorKind::Busy => thread::sleep(Duration::from_millis(100)),
                Err(e) => return eprintln!("leaving pool {} behind: {e}", self.name),
                Ok(_) => return,
            }
        }
        eprintln!("leaving pool {} behind: it stays busy", self.name);
    }
}

/// A data directory and a dataset of a test's own.
pub struct Place {
    pub home: tempfile::TempDir,
    pub dataset: String,
    _pool: Arc<Pool>,
}

impl Place {
    pub fn new() -> Result<Place> {
        let pool = Pool::shared()?;
        let dataset = format!("{}/place{}", pool.name, pool.datasets.fetch_add(1, Ordering::Relaxed));
        zfs(&["create", &dataset])?;
        Ok(Place { home: tempfile::tempdir()?, dataset, _pool: pool })
    }

    pub fn options(&self) -> Options {
        Options(vec![("zfs.fsname".into(), self.dataset.clone())])
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // Unmounting ends some time after the call.
        for _ in 0..30 {
            match zfs(&["destroy", "-R", &self.dataset]) {
                Ok(_) => return,
                Err(_) => thread::sleep(Duration::from_millis(100)),
            }
        }
        eprintln!("leaving {} to the end of its pool", self.dataset);
    }
}

/// The store's dataset of a data directory, as its `version` says.
#[allow(dead_code)] // Not all test binaries that share this look.
pub fn root_of(home: &Path) -> Result<String> {
    let text = fs::read_to_string(home.join("version")).doing(|| "reading version")?;
    let line = text.lines().find_map(|line| line.strip_prefix("dataset "));
    line.map(str::to_owned).ok_or_else(|| Error::new(ErrorKind::Corrupt, format!("no dataset in {text:?}")))
}
