//! The real containerd with runc on the service: from an archive to containers and back to nothing.

#[path = "../common/mod.rs"]
mod common;
mod debian;
mod docker;
mod killed;
mod systemd;

use common::{Home, Image, archive, file, no_program, no_root, skipped, skipped_outside_guest, special};
use debian::Debian;
use std::{path::Path, process::Command};
use tar::{Builder, EntryType};

/// What every script begins with. Everything is in the test's own directory and mount namespace; the trap ends it all.
const TOOLS: &str = r#"
# Names the cgroups too, which all containerds of a machine share.
export CONTAINERD_NAMESPACE=graphdriver-test-$$
sn() { ctr snapshots --snapshotter graphdriver "$@"; }
ctr() { command ctr --address "$PWD/cd/sock" "$@"; }
until_true() { for _ in $(seq 300); do "$@" > /dev/null 2>&1 && return; sleep 0.1; done; echo "never true: $*" >&2; exit 1; }
service() {
    setpriv --pdeathsig KILL graphdriver ${debug-} snapshotter --socket "$PWD/service" --containerd "$PWD/cd/sock" \
        2>> service.log &
    service=$!
}
containerd() {
    setpriv --pdeathsig TERM containerd --config cd/config.toml >> cd/log 2>&1 &
    containerd=$!
    until_true ctr version
}
up() {
    # Where runc and the shims keep what they have, whatever containerd is told.
    mount -t tmpfs none /run
    mkdir -p cd
    cat > cd/config.toml <<TOML
root = "$PWD/cd/root"
state = "$PWD/cd/state"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
$(graphdriver snapshotter --socket "$PWD/service" --print-containerd-config | sed "${differ-}")
[grpc]
address = "$PWD/cd/sock"
[plugins."io.containerd.internal.v1.opt"]
path = "$PWD/cd/opt"
TOML
    service
    containerd
    trap 'status=$?; ctr task rm -f beats > /dev/null 2>&1 || :; ${dockerd+docker rm -f beats} > /dev/null 2>&1 || :; kill ${dockerd-} $containerd $service; wait
          rmdir /sys/fs/cgroup/*/$CONTAINERD_NAMESPACE /sys/fs/cgroup/$CONTAINERD_NAMESPACE 2> /dev/null || :
          ((status == 0)) || tail -n 30 */log service.log; exit $status' EXIT
}
"#;

/// What the driver needs: a disk for the data root, or a pool. `$POOL` is the test's own name.
fn ground(driver: &str) -> &'static str {
    match driver {
        "btrfs" => {
            "truncate -s 4G disk; mkfs.btrfs -q disk >/dev/null 2>&1; mkdir root; mount -o loop disk root; rm disk"
        }
        "devicemapper" => "export GRAPHDRIVER_STORAGE_OPTS=dm.basesize=400M,dm.loopdatasize=4G,dm.loopmetadatasize=16M",
        "zfs" => {
            "truncate -s 2G pool.img; zpool create -f -o cachefile=none -O mountpoint=none $POOL $PWD/pool.img
             export GRAPHDRIVER_STORAGE_OPTS=zfs.fsname=$POOL"
        }
        _ => "",
    }
}

/// What outlives a test's mount namespace if the test fails.
struct Outside {
    pool: String,
    state: std::path::PathBuf,
}

impl Drop for Outside {
    fn drop(&mut self) {
        let run = |program: &str, arguments: &[&str]| {
            let out = Command::new(program).args(arguments).output();
            out.map(|out| String::from_utf8_lossy(&out.stdout).into_owned()).unwrap_or_default()
        };
        if run("zpool", &["list", "-H", "-o", "name"]).lines().any(|name| name == self.pool) {
            run("zpool", &["destroy", "-f", &self.pool]);
        }
        let state = std::fs::read(&self.state).ok().and_then(|text| serde_json::from_slice(&text).ok());
        let Some(state): Option<serde_json::Value> = state else { return };
        let prefix = format!("graphdriver-{}-", state["id"].as_str().unwrap());
        let text = run("dmsetup", &["ls"]);
        let mut ours: Vec<_> = text.split_whitespace().filter(|name| name.starts_with(&prefix)).collect();
        ours.sort_by_key(|name| name.ends_with("-pool"));
        for name in ours {
            run("dmsetup", &["remove", "--retry", name]);
        }
    }
}

const STORY: &str = r#"
up
ctr images import --snapshotter graphdriver "$ARCHIVE" > imported
image=$(ctr images ls -q)
echo "layers $(sn ls | grep -c Committed)"
graphdriver check --digests > /dev/null

run() { ctr run --snapshotter graphdriver "$@"; }
run "$image" first /bin/sh -c 'echo from first > /written; rm -r /usr/share/doc; chmod 700 /opt; . /etc/os-release; echo "$ID"
    echo "cat /written; ls -d /usr/share/doc || :; stat -c %a /opt; echo from second > /written" > /again'
sn commit result first

# A container that begins with what the first one left: its own snapshot is exchanged before it starts.
ctr containers create --snapshotter graphdriver "$image" second /bin/sh /again
sn rm second
sn prepare second result
ctr task start second

# The service may go, in any way, and the container goes on.
run -d "$image" beats /bin/sh -c 'while :; do echo beat >> /beats; sleep 0.1; done'
beats() { ctr task exec --exec-id "e$RANDOM$RANDOM" beats /bin/sh -c 'grep -c beat /beats'; }
more() { (($(beats) > before)); }
until_true beats
kill -KILL $service; wait $service || :
before=$(beats)
service
until_true sn info beats
until_true more && echo "goes on"
kill -KILL $containerd; wait $containerd || :
containerd
before=$(beats)
until_true more && echo "goes on"
graphdriver mounts > mounts
ctr task kill -s KILL beats
until_true ctr task rm beats

# With what they wrote.
ctr containers rm first second beats
sn rm result
ctr images rm --sync "$image" > removed
empty() { [[ -z $(sn ls | tail -n +2) ]]; }
until_true empty
nothing() { graphdriver info | grep -q '^Layers: 0$'; }
until_true nothing
graphdriver check > /dev/null
echo "left $(graphdriver --format json df | jq -c '.[2] | [.TotalCount, .Size]') $(find root/*/data -mindepth 1 -maxdepth 2 -name '[0-9]*' | wc -l)"
"#;

/// A real image of Debian's packages.
fn real_image() -> String {
    format!("{}/docker.tar", prints("scripts/make-image", &[]))
}

/// What one of the project's own programs prints.
fn prints(script: &str, arguments: &[&str]) -> String {
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join(script);
    let made = Command::new(program).args(arguments).output().unwrap_or_else(|e| panic!("running {script}: {e}"));
    assert!(made.status.success(), "{script}: {}", String::from_utf8_lossy(&made.stderr));
    String::from_utf8(made.stdout).unwrap().trim().to_owned()
}

/// A layer made of busybox.
fn busybox() -> Builder<Vec<u8>> {
    let mut base = Builder::new(Vec::new());
    for dir in ["bin", "etc", "opt", "tmp", "usr", "usr/share", "usr/share/doc"] {
        special(&mut base, dir, EntryType::Directory, "", 0o755);
    }
    file(&mut base, "bin/busybox", &std::fs::read("/bin/busybox").unwrap(), 0o755);
    for name in ["sh", "cat", "chmod", "grep", "ls", "rm", "sleep", "stat"] {
        special(&mut base, &format!("bin/{name}"), EntryType::Symlink, "busybox", 0o777);
    }
    file(&mut base, "etc/os-release", b"ID=debian\n", 0o644);
    file(&mut base, "usr/share/doc/gone", b"gone", 0o644);
    base
}

/// An image of it for the guest's slow processor: three layers with links and deletions.
fn small() -> Vec<u8> {
    let mut middle = Builder::new(Vec::new());
    special(&mut middle, "usr/share/doc/busybox", EntryType::Link, "bin/busybox", 0o755);
    file(&mut middle, "usr/share/doc/kept", &[b'k'; 100_000], 0o640);
    let mut top = Builder::new(Vec::new());
    file(&mut top, "usr/share/doc/.wh.gone", b"", 0o600);
    file(&mut top, "etc/os-release", b"ID=busybox\n", 0o644);
    let layers = [busybox(), middle, top].map(|layer| layer.into_inner().unwrap()).into();
    archive(&[Image { layers, steps: vec!["ADD base", "ADD doc", "RUN rm"], names: vec!["busybox:1"] }])
}

fn containerd_uses(test: &str, driver: &str) {
    let missing = || no_program(&["containerd", "ctr", "runc", "jq", "setpriv", "mount.fuse3", "mkfs.btrfs"]);
    if !skipped(test, no_root().or_else(missing)) {
        story(&Debian::ours(), driver, &real_image(), 6, "debian");
    }
}

/// With a driver that only the guest's kernel has.
#[cfg(any(feature = "devicemapper", feature = "zfs"))]
fn containerd_uses_in_guest(test: &str, driver: &str, device: &str) {
    let lacking = || (!Path::new(device).exists()).then(|| format!("there is no {device}"));
    let missing = || no_program(&["containerd", "ctr", "runc", "jq", "setpriv", "busybox"]);
    if !skipped_outside_guest(test, no_root().or_else(lacking).or_else(missing)) {
        let image = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(image.path(), small()).unwrap();
        story(&Debian::ours(), driver, image.path().to_str().unwrap(), 3, "busybox");
    }
}

/// A container in a user namespace, on a snapshot whose ids are mapped by a mount.
const MAPPED: &str = r#"
up
ctr images import --snapshotter graphdriver "$ARCHIVE" > imported
image=$(ctr images ls -q)
mapped=(--uidmap 0:100000:65536 --gidmap 0:200000:65536 --remap-labels)
ctr run --snapshotter graphdriver "${mapped[@]}" "$image" mapped /bin/sh -c '
    echo $(tr -s " " < /proc/self/uid_map) $(stat -c %u:%g /etc); echo new > /new; chown 5:6 /new; chmod 700 /opt; rm /etc/os-release'
ours() { grep -c "/root/[^/]*/idmapped/" /proc/self/mountinfo || :; }
echo "mounts $(ours)"
mkdir shown
eval "$(sn mounts "$PWD/shown" mapped)"
echo "outside $(stat -c %u:%g shown/new) $(stat -c %u:%g:%a shown/opt) $(ls shown/etc | grep -c os-release)"
graphdriver mounts | grep -c mapped
umount shown
sn commit done mapped
sn prepare plain done > /dev/null
eval "$(sn mounts "$PWD/shown" plain)"
echo "committed $(stat -c %u:%g shown/new) $(stat -c %u:%g:%a shown/opt) mounts $(ours)"
umount shown
sn rm plain
graphdriver check > /dev/null
"#;

fn containerd_maps_ids(test: &str, driver: &str) {
    let missing = || no_program(&["containerd", "ctr", "runc", "busybox", "setpriv", "mkfs.btrfs"]);
    if !skipped(test, no_root().or_else(missing)) {
        mapped(&Debian::ours(), driver);
    }
}

/// With `image.tar`, of one layer.
fn home_with_image() -> Home {
    let home = Home::new();
    let layers = vec![busybox().into_inner().unwrap()];
    let image = Image { layers, steps: vec!["ADD base"], names: vec!["busybox:1"] };
    std::fs::write(home.path().join("image.tar"), archive(&[image])).unwrap();
    home
}

fn mapped(debian: &Debian, driver: &str) {
    let said = home_with_image().ok_noisy(&format!(
        "export GRAPHDRIVER_STORAGE_DRIVER={driver} ARCHIVE=image.tar\n{TOOLS}\n{}\n{}\n{MAPPED}",
        debian.enter(),
        ground(driver)
    ));
    let told = "0 100000 65536 0:0\nmounts 1\noutside 100005:200006 100000:200000:700 0\n1\n\
                committed 5:6 0:0:700 mounts 0\n";
    assert_eq!(said, told);
}

#[test]
fn containerd_maps_ids_on_overlay2() {
    containerd_maps_ids("containerd_maps_ids_on_overlay2", "overlay2");
}

#[cfg(feature = "btrfs")]
#[test]
fn containerd_maps_ids_on_btrfs() {
    containerd_maps_ids("containerd_maps_ids_on_btrfs", "btrfs");
}

/// Limits by the labels that containerd hands on to snapshotters, on a filesystem that has none.
const LIMITED: &str = r#"
up
ctr images import --snapshotter graphdriver "$ARCHIVE" > imported
image=$(ctr images ls -q)
for label in graphdriver.size=banana graphdriver.size=10M graphdriver.inodes=-1 graphdriver.inodes=1000; do
    name=${label//[.=]/-}
    if ctr run --snapshotter graphdriver --snapshotter-label "containerd.io/snapshot/$label" "$image" "$name" \
        /bin/sh -c 'echo ran' 2> "said-$name"; then
        echo "nothing refuses $label"
    fi
    grep -Eo 'label containerd.io[^ ]* is "[^"]*"|quota' "said-$name" | head -n 1
done
[[ $(sn ls | grep -c Active) == 0 ]]
ctr run --snapshotter graphdriver "$image" free /bin/sh -c 'echo ran'
"#;

#[test]
fn containerd_hands_on_limits() {
    let missing = || no_program(&["containerd", "ctr", "runc", "busybox", "setpriv"]);
    if skipped("containerd_hands_on_limits", no_root().or_else(missing)) {
        return;
    }
    limited(&Debian::ours());
}

fn limited(debian: &Debian) {
    let said = home_with_image().ok_noisy(&format!(
        "export GRAPHDRIVER_STORAGE_DRIVER=overlay2 ARCHIVE=image.tar\n{TOOLS}\n{}\n\
         mkdir root; mount -t tmpfs none root\n{LIMITED}",
        debian.enter()
    ));
    let told = "label containerd.io/snapshot/graphdriver.size is \"banana\"\nquota\n\
                label containerd.io/snapshot/graphdriver.inodes is \"-1\"\nquota\nran\n";
    assert_eq!(said, told);
}

#[test]
fn the_configuration_in_dist_is_what_is_printed() {
    let home = Home::new();
    let printed = home.ok("graphdriver --root /var/lib/graphdriver snapshotter --print-containerd-config");
    let dist = Path::new(env!("CARGO_MANIFEST_DIR")).join("dist/containerd-config.toml");
    assert_eq!(printed, std::fs::read_to_string(dist).unwrap());
}

fn story(debian: &Debian, driver: &str, archive: &str, layers: usize, os: &str) {
    let home = Home::new();
    let pool = format!("gdctr{}", std::process::id());
    let outside = Outside { pool: pool.clone(), state: home.root().join("devicemapper/data/pool.json") };
    let said = home.ok_noisy(&format!(
        "export GRAPHDRIVER_STORAGE_DRIVER={driver} ARCHIVE={archive} POOL={pool}\n{TOOLS}\n{}\n{}\n{STORY}",
        debian.enter(),
        ground(driver)
    ));
    drop(outside);
    let lines: Vec<_> = said.lines().collect();
    let told = format!("layers {layers}");
    assert_eq!(lines, [&told, os, "from first", "700", "goes on", "goes on", "left [0,0] 0"], "{said}");
    let mounts = std::fs::read_to_string(home.path().join("mounts")).unwrap();
    assert!(mounts.contains("snapshot") && mounts.contains("beats"), "{mounts}");
}

#[test]
fn containerd_uses_overlay2() {
    containerd_uses("containerd_uses_overlay2", "overlay2");
}

#[test]
fn containerd_uses_vfs_fuse() {
    containerd_uses("containerd_uses_vfs_fuse", "vfs-fuse");
}

#[cfg(feature = "btrfs")]
#[test]
fn containerd_uses_btrfs() {
    containerd_uses("containerd_uses_btrfs", "btrfs");
}

#[cfg(feature = "devicemapper")]
#[test]
fn containerd_uses_devicemapper() {
    containerd_uses_in_guest("containerd_uses_devicemapper", "devicemapper", "/dev/mapper/control");
}

#[cfg(feature = "zfs")]
#[test]
fn containerd_uses_zfs() {
    containerd_uses_in_guest("containerd_uses_zfs", "zfs", "/dev/zfs");
}
