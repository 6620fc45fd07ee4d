//! The service is killed while containerd unpacks an image.

use super::{TOOLS, busybox, ground};
use crate::common::{Home, Image, archive, file, no_program, no_root, skipped};
use tar::Builder;

/// An import fails or not, as the moment has it; the next one finds what it left. How long one takes says the first.
const KILLED: &str = r#"
up
import() { ctr images import --snapshotter graphdriver "$ARCHIVE" > imported 2>&1; }
mounts() { grep -c "$PWD/\|graphdriver" /proc/self/mountinfo || :; }
# containerd asks the service for a new snapshot, and waits for up to three seconds before it tries to reach it again.
served() { sn rm probe || :; sn prepare probe "" && sn rm probe; }
empty() { [[ $(sn ls | wc -l) == 1 ]] && graphdriver info | grep -q '^Layers: 0$'; }
remove() { ctr images rm --sync $(ctr images ls -q) > removed; until_true empty; }
mounted=$(mounts)
before=$(date +%s%N)
import
took=$((($(date +%s%N) - before) / 1000000))
remove
failed=0
for round in {1..5}; do
    import &
    importing=$!
    moment=$((RANDOM % took))
    echo "round $round: killed after $moment of $took ms" >&2
    sleep "$((moment / 1000)).$(printf %03d $((moment % 1000)))"
    kill -KILL $service; wait $service || :
    service
    until_true served
    if wait $importing; then remove; else failed=$((failed + 1)); fi
    graphdriver check > checked || { cat checked; exit 1; }
done
echo "of 5 failed $failed: $(tail -n 1 imported)" >&2
import || { cat imported; exit 1; }
[[ $(sn ls | grep -c Committed) == 6 && $(sn ls | grep -c Active) == 0 ]]
image=$(ctr images ls -q)
graphdriver check --digests > checked || { cat checked; exit 1; }
ctr run --rm --snapshotter graphdriver "$image" first /bin/sh -c '. /etc/os-release; echo $(cat /opt/last) "$ID"'
remove
[[ $(mounts) == "$mounted" ]]
graphdriver check > checked || { cat checked; exit 1; }
echo "left $(find root/*/data -mindepth 1 -maxdepth 2 -name '[0-9]*' | wc -l)"
"#;

/// Of six layers, which take long enough for a kill to hit any.
fn image() -> Vec<u8> {
    let layer = |number: usize| {
        let mut layer = Builder::new(Vec::new());
        for file_number in 0..200 {
            file(&mut layer, &format!("opt/{number}-{file_number}"), &[b'f'; 5000], 0o644);
        }
        file(&mut layer, "opt/last", number.to_string().as_bytes(), 0o600);
        layer
    };
    let layers = std::iter::once(busybox()).chain((1..6).map(layer)).map(|layer| layer.into_inner().unwrap()).collect();
    archive(&[Image { layers, steps: vec!["ADD"; 6], names: vec!["busybox:1"] }])
}

fn killed_while_importing(test: &str, driver: &str) {
    let missing = || no_program(&["containerd", "ctr", "runc", "setpriv", "mount.fuse3", "mkfs.btrfs"]);
    if !skipped(test, no_root().or_else(missing)) {
        let home = Home::new();
        std::fs::write(home.path().join("image.tar"), image()).unwrap();
        let said = home.ok_noisy(&format!(
            "export GRAPHDRIVER_STORAGE_DRIVER={driver} ARCHIVE=image.tar\n{TOOLS}\n{}\n{KILLED}",
            ground(driver)
        ));
        assert_eq!(said, "5 debian\nleft 0\n");
    }
}

#[test]
fn killed_while_importing_on_overlay2() {
    killed_while_importing("killed_while_importing_on_overlay2", "overlay2");
}

#[test]
fn killed_while_importing_on_vfs_fuse() {
    killed_while_importing("killed_while_importing_on_vfs_fuse", "vfs-fuse");
}

#[cfg(feature = "btrfs")]
#[test]
fn killed_while_importing_on_btrfs() {
    killed_while_importing("killed_while_importing_on_btrfs", "btrfs");
}
