//! The real containerd with runc on the service: from an archive to containers and back to nothing.

mod common;

use common::{Home, no_program, no_root, skipped};
use std::{path::Path, process::Command};

/// What every script begins with. Everything is in the test's own directory and mount namespace; the trap ends it all.
const TOOLS: &str = r#"
# Names the cgroups too, which all containerds of a machine share.
export CONTAINERD_NAMESPACE=graphdriver-test-$$
sn() { ctr snapshots --snapshotter graphdriver "$@"; }
ctr() { command ctr --address "$PWD/cd/sock" "$@"; }
until_true() { for _ in $(seq 300); do "$@" > /dev/null 2>&1 && return; sleep 0.1; done; echo "never true: $*" >&2; exit 1; }
service() {
    setpriv --pdeathsig KILL graphdriver snapshotter --socket "$PWD/service" 2>> service.log &
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
$(graphdriver snapshotter --socket "$PWD/service" --print-containerd-config)
[grpc]
address = "$PWD/cd/sock"
[plugins."io.containerd.internal.v1.opt"]
path = "$PWD/cd/opt"
TOML
    service
    containerd
    trap 'status=$?; ctr task rm -f beats > /dev/null 2>&1 || :; kill $containerd $service; wait
          rmdir /sys/fs/cgroup/*/$CONTAINERD_NAMESPACE /sys/fs/cgroup/$CONTAINERD_NAMESPACE 2> /dev/null || :
          ((status == 0)) || tail -n 30 cd/log service.log; exit $status' EXIT
}
"#;

/// The disk of the data root, where the driver needs one of its own.
fn disk(driver: &str) -> &'static str {
    match driver {
        "btrfs" => {
            "truncate -s 4G disk; mkfs.btrfs -q disk >/dev/null 2>&1; mkdir root; mount -o loop disk root; rm disk"
        }
        _ => "",
    }
}

const STORY: &str = r#"
up
ctr images import --snapshotter graphdriver "$ARCHIVE" > imported
image=$(ctr images ls -q)
echo "layers $(sn ls | grep -c Committed)"

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
until_true beats
kill -KILL $service; wait $service || :
before=$(beats)
service
until_true sn info beats
sleep 0.5
(($(beats) > before)) && echo "goes on"
kill -KILL $containerd; wait $containerd || :
containerd
before=$(beats)
sleep 0.5
(($(beats) > before)) && echo "goes on"
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
echo "left $(graphdriver --format json df | jq -c '.[2] | [.TotalCount, .Size]') $(find root/*/data -mindepth 1 -maxdepth 2 -name '[0-9]*' | wc -l)"
"#;

fn archive() -> String {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/make-image");
    let made = Command::new(script).output().expect("scripts/make-image runs");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    format!("{}/docker.tar", String::from_utf8(made.stdout).unwrap().trim())
}

fn containerd_uses(test: &str, driver: &str) {
    let missing = || no_program(&["containerd", "ctr", "runc", "jq", "setpriv", "mount.fuse3", "mkfs.btrfs"]);
    if skipped(test, no_root().or_else(missing)) {
        return;
    }
    let home = Home::new();
    let said = home.ok_noisy(&format!(
        "export GRAPHDRIVER_STORAGE_DRIVER={driver} ARCHIVE={}\n{TOOLS}\n{}\n{STORY}",
        archive(),
        disk(driver)
    ));
    let lines: Vec<_> = said.lines().collect();
    assert_eq!(lines, ["layers 6", "debian", "from first", "700", "goes on", "goes on", "left [0,0] 0"], "{said}");
    if driver != "btrfs" {
        let mounts = std::fs::read_to_string(home.path().join("mounts")).unwrap();
        assert!(mounts.contains("snapshot") && mounts.contains("beats"), "{mounts}");
    }
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
