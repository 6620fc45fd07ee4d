//! Files mapped into memory, in all ways that data is served. The daemon is a process of its own: one that maps its own
//! files waits for itself, as the kernel writes pages back while it holds the lock that the daemon's memory needs.

mod common;

use common::{Layers, cannot_mount, eventually, skipped};
use mapping::Mapping;
use rustix::{fs::SeekFrom, mm::MapFlags};
use std::{
    fs::{self, File},
    os::unix::fs::{FileExt, MetadataExt},
    path::Path,
    time::Duration,
};

/// Too large for the page cache to be preferred.
const LARGE: usize = 300_000;

/// How data is served.
const MODES: [&[&str]; 4] =
    [&["copy_up=full"], &["copy_up=extent"], &["passthrough=0", "copy_up=full"], &["passthrough=0", "copy_up=extent"]];

fn read_write(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

#[test]
fn shared_and_private_mappings_of_a_lower_file() {
    if skipped("shared_and_private_mappings_of_a_lower_file", cannot_mount()) {
        return;
    }
    for mode in MODES {
        let layers = Layers::new(1);
        fs::write(layers.lowers[0].join("f"), vec![b'a'; LARGE]).unwrap();
        let mounted = layers.mount(mode);
        let path = mounted.path().join("f");
        let (private, file) = (read_write(&path), read_write(&path));
        let before = file.metadata().unwrap().mtime_nsec();
        std::thread::sleep(Duration::from_millis(20));
        let shared = Mapping::new(&file, MapFlags::SHARED, LARGE);
        let own = Mapping::new(&private, MapFlags::PRIVATE, LARGE);
        shared.write(5, b'S');
        own.write(6, b'P');
        assert_eq!((shared.read(6), own.read(6)), (b'a', b'P'), "{mode:?}");
        file.write_all_at(b"W", 7).unwrap();
        assert_eq!(shared.read(7), b'W', "{mode:?}");
        drop((shared, own, file, private));
        assert_eq!(fs::read(&path).unwrap()[..8], *b"aaaaaSaW", "{mode:?}");
        assert_ne!(fs::metadata(&path).unwrap().mtime_nsec(), before, "{mode:?}");
    }
}

#[test]
fn a_mapping_changes_the_time() {
    if skipped("a_mapping_changes_the_time", cannot_mount()) {
        return;
    }
    for mode in MODES {
        let layers = Layers::new(1);
        let mounted = layers.mount(mode);
        let path = mounted.path().join("f");
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        file.set_len(4096).unwrap();
        let mapping = Mapping::new(&file, MapFlags::SHARED, 4096);
        // What the kernel remembers from here on it asks for again only if told to.
        let before = file.metadata().unwrap().modified().unwrap();
        std::thread::sleep(Duration::from_millis(20));
        mapping.write(0, 1);
        drop((mapping, file));
        // RELEASE is not waited for by close.
        eventually("the time has changed", Duration::from_secs(2), || {
            fs::metadata(&path).unwrap().modified().unwrap() > before
        });
    }
}

/// What was written through a mapping and is still in memory alone is no hole.
#[test]
fn dirty_pages_of_a_mapping_are_data() {
    if skipped("dirty_pages_of_a_mapping_are_data", cannot_mount()) {
        return;
    }
    for mode in MODES {
        let layers = Layers::new(1);
        let mounted = layers.mount(mode);
        let path = mounted.path().join("mapped");
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        file.set_len(1 << 20).unwrap();
        let mapping = Mapping::new(&file, MapFlags::SHARED, 1 << 20);
        mapping.write(700_000, 1);
        let data = rustix::fs::seek(&file, SeekFrom::Data(0));
        // Before Linux 6.16 such pages cannot be asked for, and all is data.
        assert!([Ok(700_000 & !4095), Ok(0)].contains(&data), "{mode:?}: {data:?}");
        assert_eq!(mapping.read(700_000), 1);
    }
}

#[allow(unsafe_code)]
mod mapping {
    use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
    use std::{fs::File, ptr};

    /// A file in memory.
    pub struct Mapping(*mut u8, usize);

    impl Mapping {
        pub fn new(file: &File, flags: MapFlags, length: usize) -> Mapping {
            let protection = ProtFlags::READ | ProtFlags::WRITE;
            // SAFETY: a fresh mapping where the kernel finds room.
            let at = unsafe { mmap(ptr::null_mut(), length, protection, flags, file, 0) };
            Mapping(at.unwrap().cast(), length)
        }

        pub fn read(&self, at: usize) -> u8 {
            assert!(at < self.1);
            // SAFETY: within the mapping, which lives as long as self. Others change it: volatile.
            unsafe { self.0.add(at).read_volatile() }
        }

        pub fn write(&self, at: usize, byte: u8) {
            assert!(at < self.1);
            // SAFETY: as for reading; the mapping is writable.
            unsafe { self.0.add(at).write_volatile(byte) }
        }
    }

    impl Drop for Mapping {
        fn drop(&mut self) {
            // SAFETY: mapped by `new`, and nobody else has the address.
            unsafe { munmap(self.0.cast(), self.1) }.unwrap();
        }
    }
}
