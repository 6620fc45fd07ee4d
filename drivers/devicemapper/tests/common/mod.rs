//! Small pools of a test's own, of which nothing is left behind.

#![allow(dead_code)] // Each test binary uses its own part.

use graphdriver_core::{Options, Result};
use graphdriver_devicemapper::DeviceMapper;
use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
};
use tempfile::TempDir;

/// The smallest that mkfs.xfs makes.
pub const BASE_SIZE: u64 = 300 << 20;

/// Why nothing here can run.
pub fn no_devicemapper() -> Option<String> {
    (!Path::new("/dev/mapper/control").exists()).then(|| "the kernel has no device-mapper".into())
}

/// What a pool is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pool {
    Loop,
    Given,
}

/// A driver with a pool of its own.
pub struct Rig {
    driver: Option<DeviceMapper>,
    options: Options,
    given: Option<GivenPool>,
    dir: TempDir,
}

impl Rig {
    pub fn new(pool: Pool, options: &[(&str, &str)]) -> Result<Rig> {
        let dir = tempfile::Builder::new().prefix("graphdriver-dm-").tempdir()?;
        let mut all = vec![("dm.basesize".to_owned(), BASE_SIZE.to_string())];
        let given = match pool {
            Pool::Loop => {
                all.extend([("dm.loopdatasize", "2G"), ("dm.loopmetadatasize", "16M")].map(owned));
                None
            }
            Pool::Given => {
                let given = GivenPool::new(dir.path(), 2 << 30, 16 << 20);
                all.push(("dm.thinpooldev".into(), given.name.clone()));
                Some(given)
            }
        };
        all.extend(options.iter().copied().map(owned));
        let mut rig = Rig { driver: None, options: Options(all), given, dir };
        rig.reopen()?;
        Ok(rig)
    }

    /// On what the options say.
    pub fn on_devices(options: &[(&str, &str)]) -> Result<Rig> {
        let dir = tempfile::Builder::new().prefix("graphdriver-dm-").tempdir()?;
        let options = Options(options.iter().copied().map(owned).collect());
        let mut rig = Rig { driver: None, options, given: None, dir };
        rig.reopen()?;
        Ok(rig)
    }

    pub fn driver(&self) -> &DeviceMapper {
        self.driver.as_ref().expect("reopen puts it back")
    }

    pub fn home(&self) -> PathBuf {
        self.dir.path().join("home")
    }

    pub fn close(&mut self) {
        self.driver = None;
    }

    pub fn reopen(&mut self) -> Result<()> {
        self.close();
        self.driver = Some(DeviceMapper::open(&self.home(), &self.options)?);
        Ok(())
    }

    /// Opens it with another option.
    pub fn reopen_with(&mut self, name: &str, value: &str) -> Result<()> {
        self.options.0.retain(|(n, _)| n != name);
        self.options.0.push(owned((name, value)));
        self.reopen()
    }

    /// Opens it without an option.
    pub fn reopen_without(&mut self, name: &str) -> Result<()> {
        self.options.0.retain(|(n, _)| n != name);
        self.reopen()
    }

    /// The same pool, as another process would have it open.
    pub fn another(&self) -> Result<DeviceMapper> {
        DeviceMapper::open(&self.home(), &self.options)
    }

    /// Changes `pool.json`, which nobody else may be using.
    pub fn edit(&self, change: impl FnOnce(&mut serde_json::Value)) -> Result<()> {
        let path = self.home().join("pool.json");
        let mut state = serde_json::from_slice(&std::fs::read(&path)?).expect("pool.json is JSON");
        change(&mut state);
        Ok(std::fs::write(&path, state.to_string())?)
    }

    pub fn state(&self) -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(self.home().join("pool.json")).unwrap()).unwrap()
    }

    /// The names of all devices of this pool.
    pub fn devices(&self) -> Vec<String> {
        devices(&format!("graphdriver-{}-", self.state()["id"].as_str().unwrap()))
    }
}

fn owned((name, value): (&str, &str)) -> (String, String) {
    (name.to_owned(), value.to_owned())
}

impl Drop for Rig {
    /// Whatever state the test left the layers in: devices above the pool first.
    fn drop(&mut self) {
        self.driver = None;
        let Ok(text) = std::fs::read(self.home().join("pool.json")) else { return };
        let Ok(state) = serde_json::from_slice::<serde_json::Value>(&text) else { return };
        let prefix = format!("graphdriver-{}-", state["id"].as_str().unwrap_or("none"));
        let (mut below, above): (Vec<_>, Vec<_>) = devices(&prefix)
            .into_iter()
            .partition(|name| ["pool", "tdata", "tmeta"].iter().any(|part| name.ends_with(part)));
        // The pool before what it is made of.
        below.sort_by_key(|name| !name.ends_with("pool"));
        above.iter().chain(&below).for_each(|name| remove_device(name));
    }
}

/// A thin pool made by hand, on two loop devices.
pub struct GivenPool {
    pub name: String,
    _loops: [LoopDevice; 2],
}

impl GivenPool {
    pub fn new(dir: &Path, data: u64, metadata: u64) -> GivenPool {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("gdtest-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let loops =
            [("given-metadata", metadata), ("given-data", data)].map(|(file, size)| LoopDevice::new(dir, file, size));
        let table = format!(
            "0 {} thin-pool {} {} 128 0 2 skip_block_zeroing error_if_no_space",
            data / 512,
            loops[0].path(),
            loops[1].path()
        );
        let pool = GivenPool { name, _loops: loops };
        run(&["dmsetup", "create", &pool.name, "--table", &table]);
        pool
    }
}

impl Drop for GivenPool {
    fn drop(&mut self) {
        remove_device(&self.name);
    }
}

/// A loop device of a new sparse file.
pub struct LoopDevice(String);

impl LoopDevice {
    pub fn new(dir: &Path, file: &str, size: u64) -> LoopDevice {
        let path = dir.join(file);
        std::fs::File::create(&path).and_then(|file| file.set_len(size)).unwrap();
        LoopDevice(run(&["losetup", "-f", "--show", path.to_str().unwrap()]).trim().to_owned())
    }

    pub fn path(&self) -> &str {
        &self.0
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).status();
    }
}

/// What the program prints; it has to succeed.
#[track_caller]
pub fn run(words: &[&str]) -> String {
    let out = Command::new(words[0]).args(&words[1..]).output().unwrap_or_else(|e| panic!("{words:?}: {e}"));
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{words:?}: {said}");
    String::from_utf8_lossy(&out.stdout).into_owned()
}

fn devices(prefix: &str) -> Vec<String> {
    let all = run(&["dmsetup", "ls"]);
    let names = all.lines().filter_map(|line| line.split_whitespace().next());
    names.filter(|name| name.starts_with(prefix)).map(str::to_owned).collect()
}

fn remove_device(name: &str) {
    let removed = Command::new("dmsetup").args(["remove", "--retry", name]).output();
    if !removed.as_ref().is_ok_and(|out| out.status.success()) {
        eprintln!("leaving device {name} behind: {removed:?}");
    }
}
