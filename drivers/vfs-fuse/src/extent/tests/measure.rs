//! What a first write costs. Not a test: prints.

use super::*;
use std::time::Instant;

#[test]
#[ignore = "measures; run it alone, with --release"]
fn first_write_into_a_large_file() {
    in_private_namespace("extent::tests::measure::first_write_into_a_large_file", || {
        let disk = Disk::new("mkfs.ext4 -q -F -E lazy_itable_init=0,lazy_journal_init=0", 3000, "");
        let root = disk.root().display().to_string();
        must(&format!("dd if=/dev/zero of={root}/lower bs=1M count=1024 status=none; sync -f {root}"));
        disk.unmount();
        disk.mount();
        let device = std::fs::read_to_string("/proc/mounts").unwrap();
        let device =
            device.lines().find(|line| line.contains(&root)).unwrap().split(' ').next().unwrap()[5..].to_owned();
        let sectors = || {
            let stat = std::fs::read_to_string(format!("/sys/block/{device}/stat")).unwrap();
            stat.split_whitespace().nth(6).unwrap().parse::<u64>().unwrap()
        };
        let pair = Pair { directory: disk.root(), unit: Unit(4096) };
        must(&format!("sync -f {root}"));
        let before = sectors();
        let start = Instant::now();
        pair.prepare().unwrap();
        let file = pair.open().unwrap();
        file.write_at(&[1; 4096], 500 << 20).unwrap();
        let taken = start.elapsed();
        file.sync(false).unwrap();
        let (synced, by_fsync) = (start.elapsed(), sectors() - before);
        must(&format!("sync -f {root}"));
        println!(
            "written after {taken:?}, durable after {synced:?}, {} KiB on the device, {} with sync",
            by_fsync / 2,
            (sectors() - before) / 2
        );
    });
}
