//! The command line over btrfs: the driver that unpacks layers on top of their parents, one snapshot after the other.

mod common;

use common::{Home, archive, demo, file, no_program, no_root, other, sha256, skipped};
use serde_json::Value;
use std::{collections::BTreeSet, fs::File, io::Read};
use tar::Builder;

/// What every script begins with: a btrfs of its own, mounted at the data root until the script ends. Its subvolumes
/// and qgroups are listed from its top, as `left` does in the end.
const DISK: &str = "
    test -e disk || { truncate -s 900M disk; mkfs.btrfs -q disk >/dev/null 2>&1; }
    mkdir -p root m n; mount -o loop disk root
    export GRAPHDRIVER_STORAGE_DRIVER=btrfs
    settled() { btrfs filesystem sync root; btrfs subvolume sync root >/dev/null; btrfs filesystem sync root; }
    left() {
        settled; graphdriver images -q; btrfs subvolume list root
        find root/btrfs/data -mindepth 2
        btrfs qgroup show --raw root | awk '$1 ~ /^0\\// && $1 != \"0/5\"'
    }
    free() { settled; stat -fc %f root; }
";

struct Rig(Home);

impl Rig {
    fn new() -> Rig {
        Rig(Home::new())
    }

    fn script(script: &str) -> String {
        format!("{DISK}\n{script}")
    }

    #[track_caller]
    fn gd(&self, script: &str) -> String {
        self.0.ok(&Rig::script(script))
    }

    /// The digests of the files in an archive that a script has saved.
    fn digests(&self, archive: &str) -> BTreeSet<String> {
        let mut archive = tar::Archive::new(File::open(self.0.path().join(archive)).unwrap());
        let digest = |entry: std::io::Result<tar::Entry<'_, File>>| {
            let mut content = Vec::new();
            entry.unwrap().read_to_end(&mut content).unwrap();
            sha256(&content)
        };
        archive.entries().unwrap().map(digest).collect()
    }
}

macro_rules! needs {
    ($test:literal) => {
        if skipped($test, no_root().or_else(|| no_program(&["mkfs.btrfs", "btrfs", "losetup"]))) {
            return;
        }
    };
}

#[test]
fn the_whole_command_line_works_and_the_space_is_back() {
    needs!("the_whole_command_line_works_and_the_space_is_back");
    let rig = Rig::new();
    let told = rig.gd("opt='--storage-opt btrfs.quota=simple'
        graphdriver $opt info | grep -E '^Storage Driver: btrfs|Quotas: simple quotas'
        before=$(free)
        graphdriver load -qi both.tar >/dev/null
        graphdriver create --name c --storage-opt size=30M demo >/dev/null
        graphdriver mount c m >/dev/null; cat m/etc/motd; ls m/var/log
        echo new > m/etc/new; rm m/etc/passwd; mv m/etc m/config; ln m/config/new m/hard
        btrfs subvolume create m/nested >/dev/null; echo inside > m/nested/f
        head -c 40M /dev/urandom > m/big 2>err || echo refused; grep -c 'Disk quota exceeded' err; rm m/big
        graphdriver diff c; graphdriver umount m
        graphdriver commit c new:1 >/dev/null; graphdriver mount new:1 n >/dev/null
        cat n/config/new n/nested/f; stat -c '%h %i' n/hard n/config/new | sort -u | wc -l; graphdriver umount n
        graphdriver save -o saved.tar demo:1 other:1; graphdriver save -o new.tar new:1
        graphdriver inspect --type image new:1 >first.json
        graphdriver rm c >/dev/null; graphdriver rmi new:1 demo:1 demo:latest other:1 >/dev/null
        left; after=$(free); test $((before - after)) -lt 512 || echo $((before - after)) blocks are missing
        graphdriver load -qi new.tar >/dev/null; graphdriver inspect --type image new:1 >second.json
        graphdriver mount new:1 n >/dev/null; cat n/config/new; graphdriver umount n");
    let expected = "Storage Driver: btrfs\n Quotas: simple quotas\nhello\nkept\nrefused\n1\n\
        A /config\nA /config/absolute\nA /config/motd\nA /config/new\nD /etc\nA /hard\nA /nested\nA /nested/f\n\
        new\ninside\n1\nnew\n";
    assert_eq!(told, expected);
    let saved = rig.digests("saved.tar");
    for layer in demo().layers.iter().chain(&other().layers) {
        assert!(saved.contains(&sha256(layer)), "a layer came out with other bytes: {saved:?}");
    }
    let read = |name: &str| -> Value {
        let image: Value = serde_json::from_reader(File::open(rig.0.path().join(name)).unwrap()).unwrap();
        image[0]["RootFS"].clone()
    };
    let (first, second) = (read("first.json"), read("second.json"));
    assert_eq!(first["Layers"].as_array().unwrap().len(), 3, "{first}");
    assert_eq!(first, second, "saved and loaded again, the image has the same DiffIDs");
}

/// Sixteen layers, each with something in a directory that the one below has made.
fn deep() -> Vec<u8> {
    let mut image = demo();
    for n in 0..14 {
        let mut tar = Builder::new(Vec::new());
        file(&mut tar, &format!("var/log/layer{n}"), &vec![n; 300_000], 0o644);
        file(&mut tar, &format!("d{n}/f"), &[n], 0o600);
        image.layers.push(tar.into_inner().unwrap());
        image.steps.push("ADD more");
    }
    image.names = vec!["deep:1"];
    archive(&[image])
}

#[test]
fn a_load_is_killed_at_any_moment_and_the_next_command_leaves_nothing_of_it() {
    needs!("a_load_is_killed_at_any_moment_and_the_next_command_leaves_nothing_of_it");
    let rig = Rig::new();
    std::fs::write(rig.0.path().join("deep.tar"), deep()).unwrap();
    let told = rig.gd("graphdriver --storage-opt btrfs.quota=simple load -qi demo.tar >/dev/null
        whole=0
        for ms in 005 015 025 035 050 065 080 100 120 150 180 220 260 300 350 400; do
            graphdriver load -qi deep.tar >/dev/null 2>&1 & load=$!
            sleep 0.$ms; kill -9 $load 2>/dev/null || true; wait $load 2>/dev/null || true
            if graphdriver images | grep -q '^deep '; then
                whole=$((whole + 1)); graphdriver mount deep:1 m >/dev/null; cmp -n 1 m/d13/f <(printf '\\15')
                graphdriver umount m; graphdriver rmi deep:1 >/dev/null
            fi
            graphdriver images -q >/dev/null
            settled; test \"$(ls root/btrfs/data/layers | wc -l)\" = 2 || ls root/btrfs/data/layers
            test \"$(btrfs subvolume list root | wc -l)\" = 2 || btrfs subvolume list root
        done 2>errors; grep ^error: errors || true
        test $whole -lt 16 || echo no load was interrupted
        graphdriver load -qi deep.tar >/dev/null; graphdriver save -o saved.tar deep:1
        graphdriver rmi deep:1 demo:1 demo:latest >/dev/null; left");
    assert_eq!(told, "");
    let image = deep();
    let mut layers = 0;
    let saved = rig.digests("saved.tar");
    for entry in tar::Archive::new(&image[..]).entries().unwrap() {
        let mut entry = entry.unwrap();
        if entry.path().unwrap().ends_with("layer.tar") {
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            assert!(saved.contains(&sha256(&content)));
            layers += 1;
        }
    }
    assert_eq!(layers, 16);
}

#[test]
fn the_same_image_is_loaded_by_several_at_once() {
    needs!("the_same_image_is_loaded_by_several_at_once");
    let rig = Rig::new();
    std::fs::write(rig.0.path().join("deep.tar"), deep()).unwrap();
    let told = rig.gd(
        "graphdriver info >/dev/null
        for n in 1 2 3 4 5 6; do
            { graphdriver load -qi deep.tar >/dev/null && graphdriver load -qi both.tar >/dev/null; } & all=\"${all:-} $!\"
        done
        for load in $all; do wait $load; done
        ls root/btrfs/data/layers | wc -l
        graphdriver create --name c deep:1 >/dev/null; graphdriver mount c m >/dev/null; ls m/var/log | wc -l
        graphdriver umount c; graphdriver rm c >/dev/null; graphdriver rmi deep:1 demo:1 demo:latest other:1 >/dev/null
        settled; btrfs subvolume list root; ls root/btrfs/data/layers",
    );
    assert_eq!(told, "17\n15\n");
}

#[test]
fn what_cannot_be_done_is_said_with_what_is_missing() {
    needs!("what_cannot_be_done_is_said_with_what_is_missing");
    let rig = Rig::new();
    let refused = [
        (2, "--storage-opt btrfs.quota=on info", &["btrfs.quota", "auto, simple, qgroup and off"][..]),
        (2, "--storage-opt btrfs.min_space=lots info", &["btrfs.min_space", "10G"]),
        (6, "--root elsewhere info", &["subvolumes need btrfs", "mkfs.btrfs"]),
        (6, "create --storage-opt size=20M demo", &["quotas are off", "option btrfs.quota=simple"]),
        (
            2,
            "create --storage-opt btrfs.quota=simple --storage-opt btrfs.min_space=1G --storage-opt size=20M demo",
            &["min_space"],
        ),
    ];
    for (code, command, says) in refused {
        let script = format!("graphdriver load -qi demo.tar >/dev/null; mkdir -p elsewhere; graphdriver {command}");
        rig.0.fails(code, &Rig::script(&script), says);
    }
    let drivers = rig.gd(
        "mkdir -p elsewhere; graphdriver --format json drivers; graphdriver --root elsewhere --format json drivers",
    );
    let drivers: Vec<Value> = serde_json::Deserializer::from_str(&drivers).into_iter().map(Result::unwrap).collect();
    let btrfs = |list: &Value| list.as_array().unwrap().iter().find(|d| d["Name"] == "btrfs").unwrap().clone();
    let (there, elsewhere) = (btrfs(&drivers[0]), btrfs(&drivers[1]));
    assert_eq!(there["Usable"], true, "{there}");
    assert_eq!(there["Capabilities"]["write_strategy"]["strategy"], "redirect-on-write", "{there}");
    assert_eq!(elsewhere["Usable"], false, "{elsewhere}");
    assert!(elsewhere["Unmet"]["remedy"].as_str().unwrap().contains("mkfs.btrfs"), "{elsewhere}");
}

/// The disk is copied right after a command has said it was done: all that had been written down by then.
#[test]
fn what_was_done_survives_a_power_cut() {
    needs!("what_was_done_survives_a_power_cut");
    let rig = Rig::new();
    std::fs::write(rig.0.path().join("deep.tar"), deep()).unwrap();
    let told = rig.gd(
        "cut() { cp --sparse=always disk $1.cut; }
        after() {
            mount -o loop $1.cut root; rm root/btrfs/boot; graphdriver images -q >/dev/null
            layers=$(ls root/btrfs/data/layers | wc -l); test $layers = $2 || echo $1: $layers layers
        }
        whole() { graphdriver save -o $2.tar $1; graphdriver save -o again.tar $1; cmp $2.tar again.tar; }
        graphdriver --storage-opt btrfs.quota=simple load -qi deep.tar >/dev/null; cut loaded
        graphdriver create --name c --storage-opt size=30M deep:1 >/dev/null; cut created
        graphdriver mount c m >/dev/null; echo new > m/new; btrfs subvolume create m/nested >/dev/null; echo in > m/nested/f
        graphdriver umount m; graphdriver commit c new:1 >/dev/null; cut committed
        graphdriver rm c >/dev/null; graphdriver rmi new:1 >/dev/null; cut removed; graphdriver rmi deep:1 >/dev/null
        umount root
        after loaded 16; whole deep:1 loaded; umount root
        after created 17; graphdriver diff c; graphdriver mount c m >/dev/null; head -c 40M /dev/zero > m/big 2>err || cat err
        graphdriver umount m; umount root
        after committed 18; graphdriver mount new:1 n >/dev/null; cat n/new n/nested/f; graphdriver umount n
        whole new:1 new; umount root
        after removed 16; whole deep:1 removed; cmp loaded.tar removed.tar
        graphdriver rmi deep:1 >/dev/null; left",
    );
    assert_eq!(told, "head: error writing 'standard output': Disk quota exceeded\nnew\nin\n");
}
