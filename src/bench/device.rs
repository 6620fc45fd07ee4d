//! A block device of the run's own, whose traffic is counted.

use crate::sys;
use graphdriver_core::{Context, Error, ErrorKind, Result};
use rustix::io::Errno;
use std::{
    fs::File,
    io,
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
    time::Duration,
};

/// A loop device over a sparse file that has no name. The kernel frees both when the last user is gone, so that nothing of
/// it outlives this process and what is mounted from it.
#[derive(Debug)]
pub struct Device {
    /// What keeps it, closed before the file.
    _open: File,
    file: File,
    number: u32,
}

/// What went through a device, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Read from it.
    pub read: u64,
    /// Written to it.
    pub written: u64,
}

/// The unit of `/sys/block/*/stat`, whatever the device's own (kernel `Documentation/block/stat.rst`).
const SECTOR: u64 = 512;

impl Device {
    /// Makes one of `size` bytes, a multiple of 4096, whose file lies in the directory `scratch`. Needs root.
    pub fn new(scratch: &Path, size: u64) -> Result<Device> {
        let file = tempfile::tempfile_in(scratch).doing(|| format!("making a file in {}", scratch.display()))?;
        file.set_len(size).doing(|| format!("making a sparse file of {size} bytes in {}", scratch.display()))?;
        let (device, number) = attach(&file).doing(|| "making a loop device")?;
        Ok(Device { _open: device, file, number })
    }

    /// `/dev/loopN`.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/dev/loop{}", self.number))
    }

    /// What its block layer has counted since the device was last set up, or before: only differences mean anything.
    pub fn traffic(&self) -> Result<Traffic> {
        let path = format!("/sys/block/loop{}/stat", self.number);
        let text = std::fs::read_to_string(&path).doing(|| format!("reading {path}"))?;
        parse(&text).ok_or_else(|| Error::new(ErrorKind::Corrupt, format!("{path}: {text:?} are no counters")))
    }

    /// Bytes of the sparse file that are allocated.
    pub fn allocated(&self) -> Result<u64> {
        Ok(self.file.metadata()?.blocks() * SECTOR)
    }
}

impl Traffic {
    /// What came since `before`.
    pub fn since(self, before: Traffic) -> Traffic {
        Traffic { read: self.read - before.read, written: self.written - before.written }
    }
}

fn attach(file: &File) -> Result<(File, u32)> {
    let control = File::open("/dev/loop-control").doing(|| "opening /dev/loop-control").hint(
        || "modprobe loop; in a container it needs --privileged, or --device /dev/loop-control and the loop devices",
    )?;
    for _ in 0..100 {
        let number = sys::free_loop(control.as_fd()).doing(|| "looking for a free loop device")?;
        let path = format!("/dev/loop{number}");
        let device = File::options().read(true).write(true).open(&path).doing(|| format!("opening {path}"))?;
        match sys::configure_loop(device.as_fd(), file.as_fd()) {
            Ok(()) => return Ok((device, number)),
            // Somebody else was faster, or has it open still.
            Err(e) if is_busy(&e) => std::thread::sleep(Duration::from_millis(10)),
            Err(e) => return Err(Error::from(e).doing(format!("setting up {path}"))),
        }
    }
    Err(Error::new(ErrorKind::Busy, "others were faster with every free loop device").hint("try again"))
}

fn is_busy(e: &io::Error) -> bool {
    matches!(Errno::from_io_error(e), Some(Errno::BUSY | Errno::NXIO))
}

/// Fields 3 and 7 are the sectors read and written.
fn parse(text: &str) -> Option<Traffic> {
    let fields: Vec<u64> = text.split_ascii_whitespace().map_while(|field| field.parse().ok()).collect();
    Some(Traffic { read: fields.get(2)? * SECTOR, written: fields.get(6)? * SECTOR })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_read() {
        let text = "     446        0    10736       44     1033        0   131072      380        0      412      425  0 0 0 0 7 1\n";
        assert_eq!(parse(text), Some(Traffic { read: 10736 * 512, written: 64 << 20 }));
        assert_eq!(parse("1 2 3"), None);
        let later = Traffic { read: 7, written: 9 };
        assert_eq!(later.since(Traffic { read: 2, written: 9 }), Traffic { read: 5, written: 0 });
    }
}
