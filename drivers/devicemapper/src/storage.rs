//! What a pool is made of: loop files, block devices, one device divided up, or somebody else's pool.
//!
//! A device that is divided up begins with a header of 1 MiB, of which the first lines are used:
//!
//! ```text
//! graphdriver devicemapper 1
//! 0123abcd
//! ```
//!
//! the format and the id in `pool.json`. The metadata follow it, then the data, whose end moves as they grow.

use crate::{
    dm::{self, Kernel, SECTOR, Target},
    filesystem,
    options::{Direct, From, Wishes},
    state::{State, Storage},
    step, sys,
};
use graphdriver_core::{Context, Error, ErrorKind, Result};
use rustix::fs::{Advice, OFlags, fadvise};
use std::{
    ffi::OsStr,
    fs::File,
    io::Read,
    os::{
        fd::AsFd,
        unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    process::Command,
};

/// The part of a divided device before its metadata.
const HEADER: u64 = 1 << 20;

const FORMAT: &str = "graphdriver devicemapper 1";

/// Metadata larger than this are not used by the kernel (`thin-provisioning.rst`, "Setting up a fresh pool device").
const METADATA_MOST: u64 = 16 << 30;

/// Decides, the first time, what the pool is made of, checks that it can be had, and prepares it. Nothing is lost if the
/// state is not saved afterwards, and this is done again.
pub(crate) fn plan(kernel: &Kernel, home: &Path, id: &str, wishes: &Wishes) -> Result<State> {
    let block = wishes.block.unwrap_or(64 << 10);
    let state = |storage, block, transaction| State::new(id.to_owned(), storage, block, transaction);
    match &wishes.from {
        From::Loop { data, metadata } => {
            let (data, metadata) = (data.unwrap_or(100 << 30), metadata.unwrap_or(2 << 30));
            refuse_orphan(&home.join("metadata"))?;
            for (name, size) in [("data", data), ("metadata", metadata)] {
                make_file(&home.join(name), size)?;
            }
            Ok(state(Storage::Loop { data, metadata }, block, 0))
        }
        From::Devices { data, metadata } => {
            // Exclusively: a device that is mounted, or part of something else, is Busy.
            let _both = [
                open_device(data, true).map_err(|e| of_option(e, "dm.datadev"))?,
                open_device(metadata, true).map_err(|e| of_option(e, "dm.metadatadev"))?,
            ];
            for device in [data, metadata]
                .into_iter()
                .filter(|device| !["/dev/disk", "/dev/mapper"].iter().any(|dir| device.starts_with(dir)))
            {
                tracing::warn!(
                    "device names can change at boot: {} is safer as one of /dev/disk/by-id",
                    device.display()
                );
            }
            refuse_signature(data).map_err(|e| e.hint(wipe(data)))?;
            refuse_used_metadata(metadata)?;
            Ok(state(Storage::Devices { data: data.clone(), metadata: metadata.clone() }, block, 0))
        }
        From::Direct(direct) => divide(home, direct, block, id),
        From::Given(pool) => {
            let name = given_name(pool)?;
            let (block, transaction) = adopt(kernel, &name)?;
            Ok(state(Storage::Given { name }, block, transaction))
        }
    }
}

/// A pool that was in use once has metadata that do not begin with zeros.
fn refuse_orphan(path: &Path) -> Result<()> {
    let mut start = Vec::new();
    match File::open(path).and_then(|file| file.take(4096).read_to_end(&mut start)) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e).doing(|| format!("reading {}", path.display())),
        Ok(_) if start.iter().all(|byte| *byte == 0) => Ok(()),
        Ok(_) => Err(Error::new(ErrorKind::Corrupt, "there is a pool without its pool.json")
            .doing(format!("reading {}", path.display()))
            .hint("restore pool.json, or remove the whole data root")),
    }
}

/// A sparse file of zeros.
fn make_file(path: &Path, size: u64) -> Result<()> {
    step()?;
    let file = File::options().read(true).write(true).create(true).truncate(true).mode(0o600).open(path);
    let made = file.and_then(|file| file.set_len(size).and_then(|()| file.sync_all()));
    made.doing(|| format!("making {}", path.display()))
}

/// What blkid(8) recognises on a device.
fn signature(device: &Path) -> Result<Option<String>> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let out = blkid(&path)?.args(["-p", "-o", "export"]).arg(device).output().doing(|| "running blkid")?;
    let text = String::from_utf8_lossy(&out.stdout);
    match out.status.code() {
        Some(2) if text.trim().is_empty() => Ok(None),
        _ => {
            let what = text.lines().find_map(|l| l.strip_prefix("TYPE=").or_else(|| l.strip_prefix("PTTYPE=")));
            Ok(Some(what.unwrap_or("something").to_owned()))
        }
    }
}

fn blkid(path: &OsStr) -> Result<Command> {
    let missing =
        || Error::new(ErrorKind::Unsupported, "the program blkid is missing").hint("apt-get install util-linux");
    filesystem::program("blkid", path).map(Command::new).ok_or_else(missing)
}

fn refuse_signature(device: &Path) -> Result<()> {
    match signature(device)? {
        None => Ok(()),
        Some(what) => Err(Error::new(ErrorKind::InvalidInput, format!("{} has {what} on it", device.display()))),
    }
}

/// What makes a device acceptable that is none of ours.
fn wipe(device: &Path) -> String {
    format!("wipefs -a {} destroys that", device.display())
}

fn refuse_used_metadata(device: &Path) -> Result<()> {
    refuse_signature(device).map_err(|e| e.hint(wipe(device)))?;
    let mut start = [0; 4096];
    open_device(device, false)?.read_exact_at(&mut start, 0).doing(|| format!("reading {}", device.display()))?;
    match start.iter().all(|byte| *byte == 0) {
        true => Ok(()),
        false => {
            let why = format!("{} is not empty: its first 4 KiB are not zero", device.display());
            let hint = format!("dd if=/dev/zero of={} bs=4096 count=1", device.display());
            Err(Error::new(ErrorKind::InvalidInput, why).hint(hint))
        }
    }
}

/// An error with the device that an option names.
fn of_option(e: Error, option: &str) -> Error {
    let hint = match e.kind() {
        ErrorKind::NotFound => "`lsblk` shows the block devices there are, and /dev/disk/by-id has names that stay",
        ErrorKind::InvalidInput => "`lsblk` shows the block devices there are",
        ErrorKind::Busy => "`lsblk` shows what it is mounted as or a part of",
        _ => return e.doing(format!("option {option}")),
    };
    e.hint(hint).doing(format!("option {option}"))
}

fn open_device(path: &Path, exclusive: bool) -> Result<File> {
    let doing = || format!("opening {}", path.display());
    let flags = if exclusive { OFlags::EXCL } else { OFlags::empty() };
    let file = File::options().read(true).write(true).custom_flags(flags.bits() as i32).open(path).doing(doing)?;
    match file.metadata()?.file_type().is_block_device() {
        true => {
            // What a pool has written by itself is not in the page cache, which may have older content.
            fadvise(&file, 0, None, Advice::DontNeed).doing(doing)?;
            Ok(file)
        }
        false => Err(Error::new(ErrorKind::InvalidInput, "it is no block device").doing(doing())),
    }
}

fn size_of(path: &Path) -> Result<u64> {
    sys::device_size(open_device(path, false)?.as_fd()).doing(|| format!("measuring {}", path.display()))
}

/// Prepares a device of which all that was on it may be lost. The state is saved first, with an id by which a disk is known
/// again on which nothing but its header is.
fn divide(home: &Path, direct: &Direct, block: u64, id: &str) -> Result<State> {
    let path = std::path::absolute(&direct.device)?;
    // Exclusively: a device that is mounted, or part of a RAID or a volume group, is Busy.
    let device = open_device(&path, true).map_err(|e| of_option(e, "dm.directlvm_device"))?;
    let header = format!("{FORMAT}\n{id}\n");
    let mut start = vec![0; header.len()];
    device.read_exact_at(&mut start, 0).doing(|| format!("reading {}", path.display()))?;
    let ours = start == header.as_bytes();
    // Forced or not: that stays in configuration files, and device names change at boot.
    if start.starts_with(FORMAT.as_bytes()) && !ours {
        let why = format!("{} has a pool of graphdriver's on it, of another data root", path.display());
        let hint = format!("dd if=/dev/zero of={} bs=1M count=1 destroys that", path.display());
        return Err(Error::new(ErrorKind::InvalidInput, why).hint(hint));
    }
    if !ours && !direct.force {
        refuse_signature(&path).map_err(|e| e.hint("dm.directlvm_device_force=true destroys that"))?;
    }
    let size = sys::device_size(device.as_fd())?;
    let (metadata, data) = shares(size, direct, block).ok_or_else(|| {
        let why = format!("{} has {} MiB, too few to divide up", path.display(), size >> 20);
        Error::new(ErrorKind::InvalidInput, why)
    })?;
    let storage = Storage::Direct { device: path.clone(), metadata, data, shares: Some(direct.shares()) };
    let mut state = State::new(id.to_owned(), storage, block, 0);
    state.dividing = true;
    state.save(home)?;
    let mut first = vec![0; HEADER as usize];
    first[..header.len()].copy_from_slice(header.as_bytes());
    // Zeros at the start of the metadata make the kernel begin a new pool.
    let written = device.write_all_at(&[0; 4096], HEADER).and_then(|()| device.write_all_at(&first, 0));
    written.and_then(|()| device.sync_all()).doing(|| format!("writing to {}", path.display()))?;
    step()?;
    state.dividing = false;
    Ok(state)
}

/// How many bytes of a device become metadata and data.
fn shares(size: u64, direct: &Direct, block: u64) -> Option<(u64, u64)> {
    let percent = |n: u64| (u128::from(size) * u128::from(n) / 100) as u64;
    let (data_percent, metadata_percent) = direct.shares();
    let metadata = percent(metadata_percent).clamp(2 << 20, METADATA_MOST) >> 20 << 20;
    let room = size.checked_sub(HEADER + metadata)?;
    let data = percent(data_percent).min(room) / block * block;
    (data >= 64 << 20).then_some((metadata, data))
}

fn given_name(pool: &Path) -> Result<String> {
    let name = if pool.parent() == Some(Path::new("/dev/mapper")) { pool.file_name() } else { Some(pool.as_os_str()) };
    let name = name.and_then(|name| name.to_str()).filter(|name| !name.contains('/'));
    let why = || format!("dm.thinpooldev is {}; it has to be /dev/mapper/NAME or NAME", pool.display());
    name.map(str::to_owned).ok_or_else(|| Error::new(ErrorKind::InvalidInput, why()))
}

/// Block size and transaction of an empty pool.
fn adopt(kernel: &Kernel, name: &str) -> Result<(u64, u64)> {
    need_given(kernel, name)?;
    let (kind, table) = kernel.describe(name, true)?;
    let block = table.split_ascii_whitespace().nth(2).and_then(|sectors| sectors.parse::<u64>().ok());
    let (Some(block), "thin-pool") = (block, kind.as_str()) else {
        return Err(Error::new(ErrorKind::InvalidInput, format!("device {name} is a {kind} and no thin pool")));
    };
    let status = crate::status::PoolStatus::parse(&kernel.describe(name, false)?.1)?;
    if status.data.used > 0 {
        let why = format!("pool {name} has data in it: {} blocks are in use", status.data.used);
        return Err(Error::new(ErrorKind::InvalidInput, why).hint("give graphdriver an empty pool of its own"));
    }
    if !status.error_if_full {
        tracing::warn!(
            "pool {name} lets writers wait for ever when it is full: lvchange --errorwhenfull y, or the feature error_if_no_space"
        );
    }
    Ok((block * SECTOR, status.transaction))
}

fn need_given(kernel: &Kernel, name: &str) -> Result<()> {
    match kernel.info(name)? {
        Some(info) if info.live => Ok(()),
        _ => Err(Error::new(ErrorKind::NotFound, format!("there is no thin pool {name}"))
            .hint("activate it: vgchange -ay, or dmsetup create")),
    }
}

/// Resumes what the pool is made of if somebody was killed while making it larger: all that is asked of the pool would wait.
fn wake_parts(kernel: &Kernel, state: &State) -> Result<()> {
    for part in ["tmeta", "tdata"] {
        let name = format!("{}{part}", state.prefix());
        if kernel.info(&name)?.is_some_and(|info| info.suspended && info.live) {
            kernel.resume(&name)?;
        }
    }
    Ok(())
}

/// Makes the pool's device unless it is there.
pub(crate) fn set_up(kernel: &Kernel, home: &Path, state: &State) -> Result<()> {
    let name = state.pool_name();
    match &state.storage {
        Storage::Given { name } => return need_given(kernel, name),
        Storage::Direct { .. } => wake_parts(kernel, state)?,
        _ => {}
    }
    if let Some(info) = kernel.info(&name)?.filter(|info| info.live) {
        if let Storage::Loop { .. } = state.storage {
            refuse_files_of_another(kernel, home, &name)?;
        }
        // Whoever was giving it another table is gone: we have the lock.
        return if info.suspended { kernel.resume(&name) } else { Ok(()) };
    }
    let parts = Parts::open(kernel, home, state)?;
    let target = pool_target(&parts.metadata, &parts.data, data_size(state, &parts.data)?, state.block);
    kernel.create(&name, &target, false).doing(|| "setting up the thin pool")
}

/// Fails if an active pool is made of other files than those in `home`: whoever copies a data root copies the id by which
/// its pool is found.
fn refuse_files_of_another(kernel: &Kernel, home: &Path, pool: &str) -> Result<()> {
    let (metadata, data) = devices(kernel, pool)?;
    for (node, path) in [(metadata, home.join("metadata")), (data, home.join("data"))] {
        let doing = || format!("comparing {} with {}", node.display(), path.display());
        let shown = sys::loop_file(File::open(&node).doing(doing)?.as_fd()).doing(doing)?;
        let ours = std::fs::metadata(&path).doing(doing)?;
        if shown == (ours.dev(), ours.ino()) {
            continue;
        }
        let file = backing_file(&node).unwrap_or_else(|| "another file".into());
        let why = format!(
            "pool {pool} is active on {file}, not on {}: one of the two data roots is a copy of the other",
            path.display()
        );
        let hint = format!(
            "use that one; or, to use this one instead, unmount the layers of that one, end the programs that use it, and \
             take its pool down: dmsetup remove {pool}"
        );
        return Err(Error::new(ErrorKind::Busy, why).hint(hint));
    }
    Ok(())
}

/// The file that a loop device shows, for people to read.
fn backing_file(node: &Path) -> Option<String> {
    let path = Path::new("/sys/class/block").join(node.file_name()?).join("loop/backing_file");
    Some(std::fs::read_to_string(path).ok()?.trim_end().to_owned())
}

/// The pool's two devices. Loop devices are freed when the last one closes them: this, or the pool.
struct Parts {
    metadata: PathBuf,
    data: PathBuf,
    _open: Vec<File>,
}

impl Parts {
    fn open(kernel: &Kernel, home: &Path, state: &State) -> Result<Parts> {
        match &state.storage {
            Storage::Loop { data, metadata } => {
                let (metadata, meta_open) = attach(&home.join("metadata"), *metadata)?;
                let (data, data_open) = attach(&home.join("data"), *data)?;
                Ok(Parts { metadata, data, _open: vec![meta_open, data_open] })
            }
            Storage::Devices { data, metadata } => {
                Ok(Parts { metadata: metadata.clone(), data: data.clone(), _open: Vec::new() })
            }
            Storage::Direct { device, metadata, data, .. } => {
                check_header(device, &state.id)?;
                let meta = linear(kernel, state, "tmeta", device, HEADER, *metadata)?;
                let data = linear(kernel, state, "tdata", device, HEADER + metadata, *data)?;
                Ok(Parts { metadata: meta, data, _open: Vec::new() })
            }
            Storage::Given { .. } => unreachable!("its parts are somebody else's"),
        }
    }
}

fn data_size(state: &State, node: &Path) -> Result<u64> {
    Ok(match &state.storage {
        Storage::Direct { data, .. } => *data,
        _ => size_of(node)? / state.block * state.block,
    })
}

fn pool_target(metadata: &Path, data: &Path, length: u64, block: u64) -> Target {
    // Blocks are not zeroed when they are taken, since a filesystem reads nothing it has not written. Writers to a
    // full pool get ENOSPC and do not wait. The low water mark only makes an event, which nobody here waits for.
    let params = format!(
        "{} {} {} 0 2 skip_block_zeroing error_if_no_space",
        metadata.display(),
        data.display(),
        block / SECTOR
    );
    Target { kind: "thin-pool", length, params }
}

fn linear_target(device: &Path, start: u64, length: u64) -> Target {
    Target { kind: "linear", length, params: format!("{} {}", device.display(), start / SECTOR) }
}

fn linear(kernel: &Kernel, state: &State, part: &str, device: &Path, start: u64, length: u64) -> Result<PathBuf> {
    let name = format!("{}{part}", state.prefix());
    match kernel.info(&name)?.filter(|info| info.live) {
        Some(info) if info.suspended => kernel.resume(&name)?,
        Some(_) => {}
        None => kernel.create(&name, &linear_target(device, start, length), false)?,
    }
    kernel.node(&name)
}

/// Fails if the device has not the layers on it that belong to this id.
pub(crate) fn check_header(device: &Path, id: &str) -> Result<()> {
    let mut start = [0; 64];
    let doing = || format!("reading {}", device.display());
    open_device(device, false)?.read_exact_at(&mut start, 0).doing(doing)?;
    match start.starts_with(format!("{FORMAT}\n{id}\n").as_bytes()) {
        true => Ok(()),
        false => Err(Error::new(ErrorKind::Corrupt, "it is not the device that the layers are on")
            .doing(doing())
            .hint("device names can change at boot: use one from /dev/disk/by-id")),
    }
}

/// A loop device that shows the file.
fn attach(path: &Path, size: u64) -> Result<(PathBuf, File)> {
    let doing = || format!("making a loop device of {}", path.display());
    let file = File::options().read(true).write(true).open(path).doing(doing)?;
    if file.metadata()?.len() < size {
        let why = format!("it has {} bytes and had {size}", file.metadata()?.len());
        return Err(Error::new(ErrorKind::Corrupt, why).doing(doing()));
    }
    let control = File::options().read(true).write(true).open("/dev/loop-control");
    let control = control.doing(doing).hint(|| "modprobe loop")?;
    let mut tries = 0;
    loop {
        let node = PathBuf::from(format!("/dev/loop{}", sys::free_loop(control.as_fd()).doing(doing)?));
        let device = File::options().read(true).write(true).open(&node);
        let made = device.and_then(|device| {
            let name = path.to_string_lossy();
            sys::configure_loop(device.as_fd(), file.as_fd(), &name).map(|()| device)
        });
        tries += 1;
        match made {
            Ok(device) => return Ok((node, device)),
            // Somebody else was faster, or devtmpfs is not there yet.
            Err(e) if tries < 100 && matches!(e.raw_os_error(), Some(libc::EBUSY | libc::ENOENT | libc::ENXIO)) => {
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
            Err(e) => return Err(e).doing(doing),
        }
    }
}

/// Makes the pool as large as the state says.
pub(crate) fn grow(kernel: &Kernel, home: &Path, state: &State) -> Result<()> {
    let name = state.pool_name();
    let (metadata, data) = devices(kernel, &name)?;
    match &state.storage {
        Storage::Loop { data: size, .. } => {
            let path = home.join("data");
            File::options().write(true).open(&path).and_then(|file| file.set_len(*size))?;
            sys::refresh_loop(open_device(&data, false)?.as_fd()).doing(|| format!("growing {}", path.display()))?;
        }
        Storage::Direct { device, metadata, data, .. } => {
            let target = linear_target(device, HEADER + metadata, *data);
            kernel.reload(&format!("{}tdata", state.prefix()), &target)?;
        }
        _ => {}
    }
    let target = pool_target(&metadata, &data, data_size(state, &data)?, state.block);
    kernel.reload(&name, &target).doing(|| "growing the thin pool")
}

/// The most that the data can become.
pub(crate) fn room(state: &State) -> Result<Option<u64>> {
    match &state.storage {
        Storage::Direct { device, metadata, .. } => {
            Ok(Some(size_of(device)?.saturating_sub(HEADER + metadata) / state.block * state.block))
        }
        _ => Ok(None),
    }
}

/// The devices that a pool's metadata and data are on.
pub(crate) fn devices(kernel: &Kernel, pool: &str) -> Result<(PathBuf, PathBuf)> {
    let (_, table) = kernel.describe(pool, true)?;
    let mut words = table.split_ascii_whitespace();
    match (words.next(), words.next()) {
        (Some(metadata), Some(data)) => Ok((dm::by_number(metadata)?, dm::by_number(data)?)),
        _ => Err(Error::new(ErrorKind::Corrupt, format!("pool {pool} has the table {table:?}"))),
    }
}

/// Takes the pool's device away and what it was made of. Nothing on disk changes.
pub(crate) fn take_down(kernel: &Kernel, state: &State) -> Result<()> {
    if matches!(state.storage, Storage::Given { .. }) {
        return Ok(());
    }
    kernel.remove(&state.pool_name())?;
    ["tdata", "tmeta"].iter().try_for_each(|part| kernel.remove(&format!("{}{part}", state.prefix())))
}

/// Eight random hexadecimal digits.
pub(crate) fn new_id() -> Result<String> {
    let mut bytes = [0; 4];
    File::open("/dev/urandom").and_then(|mut random| random.read_exact(&mut bytes))?;
    Ok(format!("{:08x}", u32::from_ne_bytes(bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_divided_into_aligned_shares_that_fit() {
        let direct =
            Direct { device: "x".into(), force: false, percent: None, meta_percent: None, threshold: 80, extend: 20 };
        let (metadata, data) = shares(4 << 30, &direct, 64 << 10).unwrap();
        assert_eq!((metadata, data % (64 << 10)), (40 << 20, 0));
        assert!(data > (4u64 << 30) * 94 / 100 && HEADER + metadata + data <= 4 << 30);
        let all = Direct { percent: Some(99), ..direct.clone() };
        let (metadata, data) = shares(200 << 20, &all, 64 << 10).unwrap();
        assert_eq!((metadata, HEADER + metadata + data), (2 << 20, 200 << 20));
        assert_eq!(shares(1 << 20, &direct, 64 << 10), None);
        assert_eq!(shares(50 << 20, &direct, 64 << 10), None);
    }

    #[test]
    fn blkid_is_found_where_the_path_leaves_out_system_directories() {
        let systems = ["/usr/sbin/blkid", "/sbin/blkid"].map(Path::new);
        let Some(there) = systems.into_iter().find(|program| program.is_file()) else {
            let e = blkid("/no/such/dir".as_ref()).unwrap_err();
            return assert!(e.kind() == ErrorKind::Unsupported && e.to_string().contains("util-linux"), "{e}");
        };
        assert_eq!(blkid("/no/such/dir".as_ref()).unwrap().get_program(), there);
    }

    #[test]
    fn pools_are_given_by_name() {
        assert_eq!(given_name(Path::new("/dev/mapper/vg-pool")).unwrap(), "vg-pool");
        assert_eq!(given_name(Path::new("pool")).unwrap(), "pool");
        for bad in ["/dev/vg/pool", "a/b", "/dev/dm-1"] {
            assert_eq!(given_name(Path::new(bad)).unwrap_err().kind(), ErrorKind::InvalidInput, "{bad}");
        }
    }
}
