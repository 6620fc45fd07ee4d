//! The command line over zfs, on a pool in a file.

mod common;

use common::{Home, archive, demo, other, sha256};
use std::{collections::BTreeSet, fs::File, io::Read, path::Path, process::Command};

/// A pool of the test's own, destroyed when this is dropped, before the directory its file lies in.
struct Rig {
    pool: String,
    home: Home,
}

impl Rig {
    fn new() -> Rig {
        let home = Home::new();
        let rig = Rig { pool: format!("gdcli{}", std::process::id()), home };
        rig.home.ok(&format!(
            "truncate -s 900M pool.img
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
    let rig = Rig::new();
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
