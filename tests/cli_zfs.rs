//! The command line over zfs, on a pool in a file.

mod common;

use common::{Home, archive, demo, other, sha256};
use std::{
    collections::BTreeSet,
    fs::File,
    io::Read,
    path::Path,
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
};

/// A pool of the test's own, destroyed when this is dropped, before the directory its file lies in.
struct Rig {
    pool: String,
    home: Home,
}

impl Rig {
    fn new(size: &str) -> Rig {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let pool = format!("gdcli{}x{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let rig = Rig { pool, home: Home::new() };
        rig.home.ok(&format!(
            "truncate -s {size} pool.img
            zpool create -f -o cachefile=none -O mountpoint=none -O compression=off {} $PWD/pool.img
            zfs create {}/layers",
            rig.pool, rig.pool
        ));
        rig
    }

    #[track_caller]
    fn gd(&self, script: &str) -> String {
        let head = "export GRAPHDRIVER_STORAGE_DRIVER=zfs; mkdir -p m n";
        let options = format!("gd() {{ graphdriver --storage-opt zfs.fsname={}/layers \"$@\"; }}", self.pool);
        let left = format!(
            "left() {{ zfs list -H -r -t all -o name {}/layers | sed 's/graphdriver-[0-9a-f]*/G/'; }}",
            self.pool
        );
        let free = format!("free() {{ zpool sync {0}; zfs list -Hp -o used {0}/layers; }}", self.pool);
        self.home.ok(&format!("{head}\n{options}\n{left}\n{free}\n{script}"))
    }

    /// The digests of the files in an archive that a script has saved.
    fn digests(&self, archive: &str) -> BTreeSet<String> {
        let mut archive = tar::Archive::new(File::open(self.home.path().join(archive)).unwrap());
        let digest = |entry: std::io::Result<tar::Entry<'_, File>>| {
            let mut content = Vec::new();
            entry.unwrap().read_to_end(&mut content).unwrap();
            sha256(&content)
        };
        archive.entries().unwrap().map(digest).collect()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        for _ in 0..50 {
            if Command::new("zpool").args(["destroy", "-f", &self.pool]).status().is_ok_and(|status| status.success()) {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        eprintln!("leaving pool {} behind", self.pool);
    }
}

fn missing() -> Option<String> {
    (!Path::new("/dev/zfs").exists()).then(|| "the kernel has no ZFS".into())
}

#[test]
fn the_whole_command_line_works_and_the_space_is_back() {
    if common::skipped_outside_guest("the_whole_command_line_works_and_the_space_is_back", missing()) {
        return;
    }
    let rig = Rig::new("900M");
    std::fs::write(rig.home.path().join("both.tar"), archive(&[demo(), other()])).unwrap();
    let told = rig.gd("gd info | grep -E '^Storage Driver: zfs'
        before=$(free)
        gd load -qi both.tar >/dev/null
        gd create --name c --storage-opt size=30M demo >/dev/null
        gd mount c m >/dev/null; cat m/etc/motd; ls m/var/log
        echo new > m/etc/new; rm m/etc/passwd; mv m/etc m/config; ln m/config/new m/hard
        dd if=/dev/urandom of=m/big bs=4M count=20 2>err || echo refused
        grep -c 'quota exceeded' err; rm m/big
        gd diff c; gd umount m
        gd commit c new:1 >/dev/null; gd mount new:1 n >/dev/null
        cat n/config/new; stat -c '%h %i' n/hard n/config/new | sort -u | wc -l; gd umount n
        gd save -o saved.tar demo:1 other:1; gd save -o new.tar new:1
        gd inspect --type image new:1 | grep -c sha256: >first
        gd rm c >/dev/null; gd rmi new:1 demo:1 demo:latest other:1 >/dev/null
        gd images -q; left; after=$(free); test $((after - before)) -lt 300000 || echo $((after - before)) are missing
        gd load -qi new.tar >/dev/null; gd save -o again.tar new:1
        gd mount new:1 n >/dev/null; cat n/config/new; gd umount n");
    let root = format!("{}/layers", rig.pool);
    let expected = format!(
        "Storage Driver: zfs\nhello\nkept\nrefused\n1\n\
        A /config\nA /config/absolute\nA /config/motd\nA /config/new\nD /etc\nA /hard\n\
        new\n1\n{root}\n{root}/G\n{root}/G/empty\n{root}/G/empty@committed\nnew\n"
    );
    assert_eq!(told, expected);
    let saved = rig.digests("saved.tar");
    for layer in demo().layers.iter().chain(&other().layers) {
        assert!(saved.contains(&sha256(layer)), "a layer came out with other bytes: {saved:?}");
    }
    assert_eq!(rig.digests("new.tar"), rig.digests("again.tar"), "saved and loaded again, all is the same");
}

#[test]
fn a_full_pool_with_the_data_root_in_it_can_be_freed() {
    if common::skipped_outside_guest("a_full_pool_with_the_data_root_in_it_can_be_freed", missing()) {
        return;
    }
    let rig = Rig::new("200M");
    // Compressed, as most pools are: what is kept back must not vanish by that.
    let told = rig.gd(&format!(
        "zfs create -o mountpoint=legacy -o compression=lz4 {0}/root; mkdir -p $GRAPHDRIVER_DATA_ROOT
        mount -t zfs {0}/root $GRAPHDRIVER_DATA_ROOT
        gd load -qi demo.tar >/dev/null; gd create --name c demo >/dev/null; gd create --name d demo >/dev/null
        gd mount c m >/dev/null; zpool sync {0}; before=$(free)
        for size in 4M 128k 512; do
            for round in 1 2; do
                dd if=/dev/zero of=m/big bs=$size oflag=append conv=notrunc 2>err || grep -o 'No space left' err
                zpool sync {0}
            done
        done | sort -u
        for dir in m $GRAPHDRIVER_DATA_ROOT; do echo $(df --output=avail -B1 $dir | tail -n1); done
        gd ps -q | wc -l; gd df | grep -c Containers; gd umount m; gd rm -f c >/dev/null; gd ps | grep -cw d
        zpool sync {0}; after=$(free); test $after -lt $before || echo $((after - before)) are missing
        gd rm d >/dev/null; gd rmi demo:1 demo:latest >/dev/null; gd images -q
        gd load -qi demo.tar >/dev/null; gd create --name e demo >/dev/null; gd mount e m >/dev/null; cat m/etc/motd
        gd umount m; umount $GRAPHDRIVER_DATA_ROOT",
        rig.pool
    ));
    assert_eq!(told, "No space left\n0\n0\n2\n1\n1\nhello\n");
}

#[test]
fn a_volume_is_no_place_for_layers() {
    if common::skipped_outside_guest("a_volume_is_no_place_for_layers", missing()) {
        return;
    }
    let rig = Rig::new("200M");
    rig.home.ok(&format!("zfs create -V 8M {}/vol", rig.pool));
    let vol = format!("{}/vol", rig.pool);
    let script = format!("graphdriver -s zfs --storage-opt zfs.fsname={vol} info");
    rig.home.fails(2, &script, &[&format!("zfs.fsname: {vol} is a volume; name a filesystem")]);
}

#[test]
fn what_is_done_to_datasets_behind_the_stores_back_is_named() {
    if common::skipped_outside_guest("what_is_done_to_datasets_behind_the_stores_back_is_named", missing()) {
        return;
    }
    let rig = Rig::new("200M");
    let script = format!(
        "G=$(zfs list -H -d 1 -o name {0}/layers | grep graphdriver-)
        zfs destroy $G/3; zfs create $G/77; zfs create $G/mine; zfs snapshot $G/1@mine
        gd check 2>/dev/null || echo code $?",
        rig.pool
    );
    let told = rig.gd(&format!(
        "gd load -qi demo.tar >/dev/null; gd create --name c demo >/dev/null; gd check --digests\n{script}"
    ));
    let (clean, told) = told.split_once('\n').unwrap();
    assert_eq!(
        clean,
        "looked at: layers 3, images 1, containers 1, snapshots 0, mounts 0; layers read and compared with their digests: 2"
    );
    for part in
        ["damage: layer 3 has no storage", "    needed by: container c\n", "/77: there is no layer 77", "code 9"]
    {
        assert!(told.contains(part), "{part}: {told}");
    }
    for stranger in ["/mine is nothing of graphdriver's", "/1@mine is nothing of graphdriver's"] {
        let line = told.lines().find(|line| line.contains(stranger));
        assert!(line.is_some_and(|line| line.starts_with("stranger: ")), "{stranger}: {told}");
    }
    assert_eq!(told.lines().filter(|line| line.starts_with("    do: ")).count(), 4, "{told}");
}
