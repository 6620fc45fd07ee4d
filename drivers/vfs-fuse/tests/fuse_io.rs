//! File data through a real mount, in both ways it is served: by passthrough and, as without CAP_SYS_ADMIN, through the
//! page cache alone.

#[path = "../../../tests/skip/mod.rs"]
mod skip;

use graphdriver_vfs_fuse::{
    config::{Config, CopyUp},
    fuse::{Session, Target, Unmounter},
    options::MountOptions,
    union::Union,
};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use rustix::{
    fs::{FallocateFlags, MemfdFlags, SeekFrom, XattrFlags},
    io::Errno,
};
use std::{
    fs::{self, File, OpenOptions},
    io::{Read, Seek, Write},
    os::unix::{
        fs::{FileExt, MetadataExt, PermissionsExt},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::Command,
    thread::JoinHandle,
    time::Duration,
};

/// Too large for the page cache to be preferred.
const LARGE: usize = 300_000;

struct Mounted {
    dir: tempfile::TempDir,
    unmounter: Unmounter,
    served: Option<JoinHandle<graphdriver_core::Result<()>>>,
}

impl Mounted {
    /// Mounts a union of one lower layer, which `fill` makes, in a mount namespace of the test's own thread.
    fn new(change: impl FnOnce(&mut Config), fill: impl FnOnce(&Path)) -> Mounted {
        Mounted::with(MountOptions::default(), change, fill)
    }

    fn with(options: MountOptions, change: impl FnOnce(&mut Config), fill: impl FnOnce(&Path)) -> Mounted {
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
        let dir = tempfile::Builder::new().prefix("vfs-fuse-io-").tempdir_in("/var/tmp").unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        for name in ["l", "u", "w", "m"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        fill(&dir.path().join("l"));
        let path = |name| dir.path().join(name);
        let mut config = Config {
            lower: vec![path("l")],
            upper: Some(path("u")),
            work: Some(path("w")),
            copy_up: CopyUp::Full,
            ..Config::default()
        };
        change(&mut config);
        let union = Union::open(config).unwrap();
        let session = Session::start(union, Target::Path(path("m")), &options).unwrap();
        let unmounter = session.unmounter();
        let served = Some(std::thread::spawn(move || session.run()));
        Mounted { dir, unmounter, served }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("m").join(name)
    }

    fn upper(&self, name: &str) -> PathBuf {
        self.dir.path().join("u").join(name)
    }

    /// What uid 1000 does with the file `$1`.
    fn as_nobody(&self, script: &str, name: &str) -> String {
        let mut command = Command::new("sh");
        command.args(["-euc", script, "sh"]).arg(self.path(name)).uid(1000).gid(1000);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Programs that other tests start hold copies of our descriptors for a moment.
        let unmounted = (0..1000).any(|i| {
            std::thread::sleep(Duration::from_millis(u64::from(i > 0) * 20));
            self.unmounter.unmount().is_ok()
        });
        if !std::thread::panicking() {
            assert!(unmounted, "something is still open in the mount");
            self.served.take().unwrap().join().unwrap().unwrap();
        }
    }
}

/// cap_net_raw, as the kernel stores it.
const CAPABILITY: &[u8; 20] = b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

fn read_write(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).open(path).unwrap()
}

fn pread(file: &File, length: usize, offset: u64) -> Vec<u8> {
    let mut bytes = vec![0; length];
    let n = file.read_at(&mut bytes, offset).unwrap();
    bytes.truncate(n);
    bytes
}

/// Needs root, /dev/fuse and mounting; each in a thread and so in a mount namespace of its own.
fn cannot_mount() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("not root".into());
    }
    File::open("/dev/fuse").err().map(|e| format!("/dev/fuse: {e}"))
}

macro_rules! tests {
    ($($(#[$meta:meta])* fn $name:ident($mode:ident) $body:block)*) => {
        $($(#[$meta])* mod $name {
            use super::*;

            fn run($mode: fn(&mut Config)) $body

            #[test]
            fn passthrough() {
                if !skip::skipped(concat!(stringify!($name), "::passthrough"), cannot_mount()) {
                    run(|config| config.passthrough = true);
                }
            }

            #[test]
            fn page_cache() {
                if !skip::skipped(concat!(stringify!($name), "::page_cache"), cannot_mount()) {
                    run(|config| config.passthrough = false);
                }
            }

            #[test]
            fn page_cache_by_extents() {
                if !skip::skipped(concat!(stringify!($name), "::page_cache_by_extents"), cannot_mount()) {
                    run(|config| (config.passthrough, config.copy_up) = (false, CopyUp::Extent));
                }
            }

            #[test]
            fn passthrough_by_extents() {
                if !skip::skipped(concat!(stringify!($name), "::passthrough_by_extents"), cannot_mount()) {
                    run(|config| (config.passthrough, config.copy_up) = (true, CopyUp::Extent));
                }
            }
        })*
    };
}

tests! {
/// The large file is open by passthrough and needs a new inode at the write, the small one does not.
fn read_only_descriptors_outlive_the_copy_up(mode) {
    for size in [1000, LARGE] {
        let m = Mounted::new(mode, |lower| fs::write(lower.join("f"), vec![b'a'; size]).unwrap());
        let before = fs::metadata(m.path("f")).unwrap();
        let old = File::open(m.path("f")).unwrap();
        assert_eq!(pread(&old, 3, 0), b"aaa");
        let new = read_write(&m.path("f"));
        new.write_all_at(b"NEW", 0).unwrap();
        assert_eq!(pread(&new, 4, 0), b"NEWa");
        // Later writes are seen, except by a descriptor that is passed through to the lower file.
        let seen = pread(&old, 4, 0);
        let mut config = Config::default();
        mode(&mut config);
        let expected: &[u8] = if config.passthrough && size == LARGE { b"aaaa" } else { b"NEWa" };
        assert_eq!(seen, expected, "{size} bytes");
        assert_eq!(fs::read(m.path("f")).unwrap()[..4], *b"NEWa");
        for now in [fs::metadata(m.path("f")).unwrap(), new.metadata().unwrap(), old.metadata().unwrap()] {
            assert_eq!((now.ino(), now.dev(), now.len()), (before.ino(), before.dev(), size as u64));
        }
        // The size is the file's for all, also where the kernel has two inodes of it.
        new.write_all_at(b"!", size as u64).unwrap();
        assert_eq!(old.metadata().unwrap().len(), size as u64 + 1);
        fs::set_permissions(m.path("f"), fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(old.metadata().unwrap().mode() & 0o777, 0o600);
        drop((old, new));
        assert_eq!(fs::metadata(m.path("f")).unwrap().len(), size as u64 + 1);
        assert_eq!(pread(&File::open(m.path("f")).unwrap(), 4, 0), b"NEWa");
    }
}

fn renewed_files_can_be_removed_and_made_again(mode) {
    let m = Mounted::new(mode, |lower| fs::write(lower.join("f"), vec![b'a'; LARGE]).unwrap());
    for round in 0..5 {
        let old = File::open(m.path("f")).unwrap();
        read_write(&m.path("f")).write_all_at(b"NEW", 0).unwrap();
        fs::remove_file(m.path("f")).unwrap();
        fs::write(m.path("f"), vec![b'0' + round; LARGE]).unwrap();
        assert_eq!(pread(&File::open(m.path("f")).unwrap(), 1, 0), [b'0' + round]);
        assert_eq!(old.metadata().unwrap().nlink(), 0);
        assert_eq!(pread(&old, 1, LARGE as u64 - 1).len(), 1, "an unlinked file is read");
    }
}

fn what_is_written_is_read_by_everybody(mode) {
    let m = Mounted::new(mode, |lower| fs::write(lower.join("f"), b"lower content").unwrap());
    // The page cache is filled from the lower file.
    assert_eq!(fs::read(m.path("f")).unwrap(), b"lower content");
    read_write(&m.path("f")).write_all_at(b"UPPER", 0).unwrap();
    assert_eq!(fs::read(m.path("f")).unwrap(), b"UPPER content");
    let (one, two) = (read_write(&m.path("f")), read_write(&m.path("f")));
    let reader = File::open(m.path("f")).unwrap();
    one.write_all_at(b"1", 0).unwrap();
    two.write_all_at(b"2", 1).unwrap();
    assert_eq!(pread(&one, 3, 0), b"12P");
    assert_eq!((pread(&two, 3, 0), pread(&reader, 3, 0)), (b"12P".to_vec(), b"12P".to_vec()));
    drop((one, two, reader));
    assert_eq!(fs::read(m.path("f")).unwrap(), b"12PER content");
    OpenOptions::new().append(true).open(m.path("f")).unwrap().write_all(b"!").unwrap();
    fs::OpenOptions::new().write(true).open(m.path("f")).unwrap().set_len(4).unwrap();
    assert_eq!(fs::read(m.path("f")).unwrap(), b"12PE");
    rustix::fs::ftruncate(read_write(&m.path("f")), 6).unwrap();
    assert_eq!(fs::read(m.path("f")).unwrap(), b"12PE\0\0");
}

fn truncation_at_open_reaches_the_disk(mode) {
    for size in [1000, LARGE] {
        let m = Mounted::new(mode, |lower| fs::write(lower.join("f"), vec![b'a'; size]).unwrap());
        assert_eq!(fs::read(m.path("f")).unwrap().len(), size);
        let held = File::open(m.path("f")).unwrap();
        File::create(m.path("f")).unwrap().write_all(b"new").unwrap();
        assert_eq!(fs::metadata(m.path("f")).unwrap().len(), 3);
        assert_eq!(fs::read(m.path("f")).unwrap(), b"new");
        drop(held);
        rustix::fs::fsync(read_write(&m.path("f"))).unwrap();
        assert_eq!(fs::read(m.upper("f")).unwrap(), b"new");
    }
}

fn who_is_not_root_takes_privileges_away_by_writing(mode) {
    let scripts = [
        "printf x >>\"$1\"",
        "printf x >\"$1\"",
        "truncate -s 3 \"$1\"",
        "fallocate -l 9 \"$1\"",
        "dd if=/dev/zero of=\"$1\" oflag=direct conv=notrunc bs=4096 count=1 status=none",
    ];
    for script in scripts {
        for open in [false, true] {
            let m = Mounted::new(mode, |lower| {
                fs::write(lower.join("f"), "#!/bin/true").unwrap();
                fs::set_permissions(lower.join("f"), fs::Permissions::from_mode(0o6777)).unwrap();
                let capability = b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
                rustix::fs::setxattr(lower.join("f"), "security.capability", capability, XattrFlags::empty())
                    .unwrap();
            });
            assert_eq!(fs::metadata(m.path("f")).unwrap().mode() & 0o7777, 0o6777);
            let held = open.then(|| read_write(&m.path("f")));
            m.as_nobody(script, "f");
            assert_eq!(fs::metadata(m.path("f")).unwrap().mode() & 0o7777, 0o777, "{script}");
            drop(held);
            let on_disk = fs::metadata(m.upper("f")).unwrap();
            assert_eq!(on_disk.mode() & 0o7777, 0o777, "{script}, on disk");
            let capability = rustix::fs::getxattr(m.upper("f"), "security.capability", &mut [0u8; 64]);
            assert_eq!(capability, Err(rustix::io::Errno::NODATA), "{script}");
        }
    }
}

fn capabilities_outlive_what_was_written_before(mode) {
    let m = Mounted::new(mode, |lower| fs::write(lower.join("f"), [7; 300_000]).unwrap());
    for name in ["f", "new"] {
        let file = File::options().create(true).truncate(false).read(true).write(true).open(m.path(name)).unwrap();
        file.write_all_at(&[1; 200_000], 50_000).unwrap();
        rustix::fs::fsetxattr(&file, "security.capability", CAPABILITY, XattrFlags::empty()).unwrap();
        file.sync_all().unwrap();
        for path in [m.path(name), m.upper(name)] {
            let mut value = [0; 64];
            let length = rustix::fs::getxattr(&path, "security.capability", &mut value);
            assert_eq!(length.map(|n| &value[..n]), Ok(&CAPABILITY[..]), "{}", path.display());
        }
        assert!(pread(&file, 200_000, 50_000) == [1; 200_000]);
    }
}

fn unlinked_files_stay(mode) {
    for size in [1000, LARGE] {
        let m = Mounted::new(mode, |lower| {
            fs::write(lower.join("read"), vec![b'r'; size]).unwrap();
            fs::write(lower.join("written"), vec![b'w'; size]).unwrap();
        });
        let (read, written) = (File::open(m.path("read")).unwrap(), read_write(&m.path("written")));
        let made = OpenOptions::new().read(true).write(true).create_new(true).open(m.path("made")).unwrap();
        for name in ["read", "written", "made"] {
            fs::remove_file(m.path(name)).unwrap();
        }
        assert_eq!(pread(&read, size + 1, 0), vec![b'r'; size]);
        for file in [&written, &made] {
            file.write_all_at(b"after", 0).unwrap();
            assert_eq!(pread(file, 5, 0), b"after");
            file.set_len(7).unwrap();
            assert_eq!((file.metadata().unwrap().len(), file.metadata().unwrap().nlink()), (7, 0));
            file.sync_all().unwrap();
        }
        assert_eq!(fs::read_dir(m.path("")).unwrap().count(), 0);
    }
}

fn holes_ranges_and_copies(mode) {
    let m = Mounted::new(mode, |lower| fs::write(lower.join("f"), vec![b'a'; LARGE]).unwrap());
    let file = read_write(&m.path("f"));
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&file, punch, 65536, 65536).unwrap();
    assert_eq!(pread(&file, 4, 65534), b"aa\0\0");
    let hole = rustix::fs::seek(&file, SeekFrom::Hole(0)).unwrap();
    assert!(hole == 65536 || hole == LARGE as u64, "{hole}: a hole, or zeros by extents");
    let mut copy = OpenOptions::new().read(true).write(true).create_new(true).open(m.path("copy")).unwrap();
    let mut from = 10;
    let mut left = 100_000;
    while left > 0 {
        let n = rustix::fs::copy_file_range(&file, Some(&mut from), &copy, None, left).unwrap();
        assert_ne!(n, 0);
        left -= n;
    }
    copy.rewind().unwrap();
    let mut bytes = Vec::new();
    copy.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes, pread(&file, 100_000, 10));
    // From a filesystem of another type the kernel reads itself.
    let memory = File::from(rustix::fs::memfd_create("m", MemfdFlags::CLOEXEC).unwrap());
    (&memory).write_all(b"memory").unwrap();
    (&memory).rewind().unwrap();
    std::io::copy(&mut &memory, &mut &copy).unwrap();
    assert_eq!(pread(&copy, 6, 100_000), b"memory");
}

fn what_only_the_kernel_has_is_no_hole(mode) {
    let m = Mounted::new(mode, |lower| {
        File::create(lower.join("f")).unwrap().set_len(1 << 30).unwrap();
    });
    let seek = |file: &File, from| rustix::fs::seek(file, from);
    let file = read_write(&m.path("f"));
    if seek(&file, SeekFrom::Data(0)) == Ok(0) {
        // Such a kernel cannot be made to write what it has; so all is data.
        let system = rustix::system::uname();
        let release = system.release().to_str().unwrap();
        let version: Vec<u32> = release.split('.').take(2).map(|part| part.parse().unwrap()).collect();
        assert!(version < vec![6, 16], "Linux {release}");
        return;
    }
    assert_eq!(seek(&file, SeekFrom::Data(0)), Err(Errno::NXIO));
    assert_eq!(seek(&file, SeekFrom::Hole(0)), Ok(0));
    file.write_all_at(b"behind the end", (2 << 30) + 5).unwrap();
    assert_eq!(seek(&file, SeekFrom::Data(0)), Ok(2 << 30));
    file.write_all_at(&[1; 8192], 512 << 20).unwrap();
    assert_eq!(seek(&file, SeekFrom::Hole(512 << 20)), Ok((512 << 20) + 8192));
    file.write_all_at(&[1; 4096], 256 << 20).unwrap();
    assert_eq!(seek(&file, SeekFrom::Hole(0)), Ok(0));
    assert_eq!(seek(&file, SeekFrom::Data(0)), Ok(256 << 20));
    assert_eq!(seek(&file, SeekFrom::Hole(2 << 30)), Ok((2 << 30) + 19));
    assert_eq!(pread(&file, 20, (2 << 30) + 5), b"behind the end");
}

fn many_at_once(mode) {
    let m = Mounted::new(mode, |lower| {
        for i in 0..8 {
            fs::write(lower.join(format!("f{i}")), vec![b'a'; if i % 2 == 0 { 5000 } else { LARGE }]).unwrap();
        }
    });
    // Readers and writers of the same files, with nothing but the kernel's answers to go wrong.
    std::thread::scope(|scope| {
        for worker in 0..6u64 {
            let m = &m;
            scope.spawn(move || {
                for round in 0..60u64 {
                    let path = m.path(&format!("f{}", (worker + round) % 8));
                    if (worker + round / 8) % 3 == 0 {
                        read_write(&path).write_all_at(&[b'0' + worker as u8], worker).unwrap();
                    } else {
                        let head = pread(&File::open(&path).unwrap(), 6, 0);
                        assert!(head.iter().enumerate().all(|(i, b)| *b == b'a' || *b == b'0' + i as u8), "{head:?}");
                    }
                }
            });
        }
    });
}
}

#[test]
fn shows_its_name_and_names_its_type() {
    if skip::skipped("shows_its_name_and_names_its_type", cannot_mount()) {
        return;
    }
    let m = Mounted::new(|_| {}, |_| {});
    let mounts = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    let place = m.path("").to_str().unwrap().trim_end_matches('/').to_owned();
    let line = mounts.lines().find(|line| line.contains(&place)).expect("it is mounted");
    assert!(
        line.contains(" - fuse.vfs-fuse vfs-fuse rw") && line.contains("default_permissions,allow_other"),
        "{line}"
    );
    assert!(!line.contains("nosuid") && !line.contains("nodev"), "{line}");
}

#[test]
fn a_busy_mount_can_be_unmounted_later() {
    if skip::skipped("a_busy_mount_can_be_unmounted_later", cannot_mount()) {
        return;
    }
    let m = Mounted::new(|_| {}, |lower| fs::write(lower.join("f"), "content").unwrap());
    let file = File::open(m.path("f")).unwrap();
    assert_eq!(m.unmounter.unmount().unwrap_err().raw_os_error(), Some(libc::EBUSY));
    assert_eq!(pread(&file, 7, 0), b"content");
    // Dropping `m` unmounts.
}

/// fuser's own unmount at the end would take away what is mounted in its place by then.
#[test]
fn what_others_mount_in_its_place_stays() {
    if skip::skipped("what_others_mount_in_its_place_stays", cannot_mount()) {
        return;
    }
    let mut m = Mounted::new(|_| {}, |_| {});
    rustix::mount::unmount(m.path(""), rustix::mount::UnmountFlags::empty()).unwrap();
    let place = m.path("");
    mount(Some("tmpfs"), &place, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
    m.served.take().unwrap().join().unwrap().unwrap();
    m.unmounter.unmount().unwrap();
    rustix::mount::unmount(&place, rustix::mount::UnmountFlags::empty()).expect("the tmpfs is there");
    m.served = Some(std::thread::spawn(|| Ok(())));
}

#[test]
fn fusermount3_mounts_what_we_may_not() {
    let unmet = cannot_mount().or_else(|| skip::no_program(&["fusermount3"]));
    if skip::skipped("fusermount3_mounts_what_we_may_not", unmet) {
        return;
    }
    // With auto_unmount it is always asked.
    let options = MountOptions { auto_unmount: true, fsname: "a,b".into(), ..MountOptions::default() };
    let m = Mounted::with(options, |_| {}, |lower| fs::write(lower.join("f"), "content").unwrap());
    assert_eq!(fs::read(m.path("f")).unwrap(), b"content");
    let mounts = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    let place = m.path("").to_str().unwrap().trim_end_matches('/').to_owned();
    let line = mounts.lines().find(|line| line.contains(&place)).expect("it is mounted");
    assert!(line.contains(" - fuse.vfs-fuse a,b rw"), "{line}");
}
