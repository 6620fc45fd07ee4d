//! The units of `dist/` under systemd as the first process of a PID namespace, on roots that `scripts/make-debian` makes.

use super::{
    debian::{DRIVERS, NEW_ROOT, asked_for},
    home_with_image,
};

/// Starts systemd, which starts what the README enables, and `story.service`, whose end is the machine's. What would change
/// the machine's own kernel is masked, and /proc/sys read-only.
const BOOT: &str = r#"
units=$new/etc/systemd/system
install -m 755 "$programs"/{graphdriver,vfs-fuse} "$new/usr/local/bin"
install -m 644 "$DIST"/graphdriver-snapshotter.{service,socket} "$units"
install -m 644 -D "$DIST/containerd-config.toml" "$new/etc/containerd/conf.d/graphdriver.toml"
printf 'version = 2\nimports = ["/etc/containerd/conf.d/*.toml"]\n' > "$new/etc/containerd/config.toml"
cat > "$units/story.service" <<UNIT
[Unit]
After=containerd.service
SuccessAction=exit-force
FailureAction=exit-force
[Service]
Type=oneshot
WorkingDirectory=$PWD
Environment=HOME=/root GRAPHDRIVER_STORAGE_DRIVER=$DRIVER
ExecStart=/bin/bash -euo pipefail story.sh
StandardOutput=file:$PWD/said
StandardError=file:$PWD/noise
[Install]
WantedBy=multi-user.target
UNIT
# systemd leaves /sys writable in containers, whatever ProtectKernelTunables says.
mkdir "$units/graphdriver-snapshotter.service.d"
cat > "$units/graphdriver-snapshotter.service.d/test.conf" <<UNIT
[Service]
Environment=GRAPHDRIVER_STORAGE_DRIVER=$DRIVER
ProtectKernelTunables=no
ReadOnlyPaths=/sys /proc/sys
UNIT
for unit in systemd-{sysctl,modules-load,udevd,udev-trigger,binfmt,random-seed,logind,firstboot}.service \
    docker.{service,socket} console-getty.service tmp.mount; do
    ln -sf /dev/null "$units/$unit"
done
for at in graphdriver containerd; do
    mkdir -p "lib/$at" "$new/var/lib/$at"
    mount --bind "lib/$at" "$new/var/lib/$at"
done
if [[ $DRIVER == btrfs ]]; then
    truncate -s 2G disk
    mkfs.btrfs -q disk
    mount -o loop disk "$new/var/lib/graphdriver"
    btrfs quota enable "$new/var/lib/graphdriver"
fi
: > "$new/etc/machine-id"

mount -t proc proc "$new/proc"
chroot "$new" systemctl enable graphdriver-snapshotter.{socket,service} containerd.service story.service
mount --bind "$new/proc/sys" "$new/proc/sys"
mount -o remount,bind,ro "$new/proc/sys"
# A user namespace may mount proc where there is one that nothing hides a part of.
mkdir "$new/whole-proc"
mount -t proc proc "$new/whole-proc"
mount -t sysfs sysfs "$new/sys"
mount -t cgroup2 none "$new/sys/fs/cgroup"
mount -t tmpfs -o mode=755 none "$new/dev"
cp -a /dev/{null,zero,full,random,urandom,tty,fuse} "$new/dev"
mkdir "$new"/dev/{pts,shm}
mount -t devpts -o newinstance,ptmxmode=666 none "$new/dev/pts"
ln -s pts/ptmx "$new/dev/ptmx"
mount -t tmpfs none "$new/run"
at=$PWD
cd "$new"
pivot_root . mnt
umount -l /mnt
exec env -i container=test /sbin/init --unit=multi-user.target --log-target=null --show-status=no < /dev/null
"#;

/// In namespaces of its own, and a cgroup, which is all that could outlive them.
const START: &str = r#"
cgroup=$(findmnt -n -o TARGET -t cgroup2 | head -n 1)/graphdriver-test-$$
mkdir "$cgroup"
trap 'status=$?; find "$cgroup" -depth -type d -exec rmdir {} +; ((status == 0)) || tail -n 30 boot.log said noise; exit $status' EXIT
(
    echo $BASHPID > "$cgroup/cgroup.procs"
    exec setpriv --pdeathsig KILL timeout -s KILL 120 unshare --mount --pid --fork --kill-child --cgroup --uts --ipc --net \
        bash -euo pipefail boot.sh > boot.log 2>&1
)
cat said
[[ $(tail -n 1 said) == done ]]
"#;

const STORY: &str = r#"
unit=graphdriver-snapshotter
property() { systemctl show --value -p "$1" $unit.service; }
sn() { ctr snapshots --snapshotter graphdriver "$@"; }
until_true() { for _ in $(seq 100); do "$@" > /dev/null 2>&1 && return; sleep 0.1; done; echo "never true: $*"; exit 1; }
# There may be no controllers in this hierarchy of cgroups.
run() { ctr run --cpu-shares 0 --snapshotter graphdriver "$@"; }
echo "booted $(property ActiveState) $(property NRestarts)"
systemd-analyze verify --man=no $unit.service $unit.socket
image=docker.io/library/busybox:1

# By its socket.
systemctl stop containerd $unit.service
systemctl start containerd
ctr images import --snapshotter graphdriver image.tar >&2
sn ls | grep -c Committed
echo "called $(property ActiveState)"
run --rm $image one /bin/sh -c '. /etc/os-release; echo "$ID"'
run --uidmap 0:100000:65536 --gidmap 0:200000:65536 --remap-labels $image two /bin/sh -c 'stat -c %u:%g /etc'
# By a mount that the service attached in containerd's mount namespace, which is this one.
echo "mapped $(grep -c "/idmapped/" /proc/self/mountinfo)"
ctr containers rm two
run --rm --snapshotter-label containerd.io/snapshot/graphdriver.size=5M $image three /bin/sh -c '
    for i in 1 2 3 4 5 6; do cat /bin/busybox; done > /big' 2>&1 | grep -Eo 'quota exceeded|cannot be limited' | sort -u || :

run -d $image beats /bin/sh -c 'while :; do echo beat >> /beats; sleep 0.1; done'
beats() { ctr task exec --exec-id "e$RANDOM$RANDOM" beats /bin/sh -c 'grep -c beat /beats'; }
until_true beats
goes_on() { local before=$(beats); "$@"; sleep 0.5; (($(beats) > before)) && echo "goes on"; }
goes_on systemctl restart $unit
again() { [[ $(property NRestarts) == 1 ]] && systemctl is-active $unit; }
killed() { systemctl kill -s KILL $unit; until_true again; }
goes_on killed
restarted() { systemctl restart containerd; until_true ctr version; }
goes_on restarted
graphdriver mounts | grep -c beats
ctr task kill -s KILL beats
until_true ctr task rm beats
ctr containers rm beats
ctr images rm --sync $image >&2
nothing() { graphdriver info | grep -q '^Layers: 0$'; }
until_true nothing
graphdriver check >&2
systemctl stop containerd $unit.service
echo "stopped $(property Result)"
echo done
"#;

fn units_of(test: &str, suite: &str) {
    let Some(debian) = asked_for(test, suite) else { return };
    for driver in DRIVERS {
        let home = home_with_image();
        let put = |name: &str, script: &str| std::fs::write(home.path().join(name), script).unwrap();
        put("story.sh", STORY);
        put("boot.sh", &format!("{NEW_ROOT}\nnew_root {}\n{BOOT}", debian.root()));
        let dist = concat!(env!("CARGO_MANIFEST_DIR"), "/dist");
        let said = home.ok_noisy(&format!("export DRIVER={driver} ARCHIVE=image.tar DIST={dist}\n{START}"));
        let limited = if *driver == "btrfs" { "quota exceeded" } else { "cannot be limited" };
        let mapped = u32::from(*driver != "vfs-fuse");
        let told = format!(
            "booted active 0\n1\ncalled active\ndebian\n0:0\nmapped {mapped}\n{limited}\n\
             goes on\ngoes on\ngoes on\n1\nstopped success\ndone\n"
        );
        assert_eq!(said, told, "{driver}");
    }
}

#[test]
fn units_of_trixie() {
    units_of("units_of_trixie", "trixie");
}

#[test]
fn units_of_sid() {
    units_of("units_of_sid", "sid");
}
