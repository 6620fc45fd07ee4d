//! podman and buildah of Debian with vfs-fuse as their `mount_program`: an image is built, run, changed, committed and run
//! again, by root and by a user. What it holds is what it holds with podman's own plain driver.

#[allow(dead_code)] // Other tests use the rest of it.
mod support;

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};
use support::skip::{no_program, skipped};

/// Where cargo puts the program, if the crate it belongs to was built; `VFS_FUSE_PROGRAM` names another one to test.
fn program() -> PathBuf {
    let beside = Path::new(env!("CARGO_BIN_EXE_graphdriver")).with_file_name("vfs-fuse");
    std::env::var_os("VFS_FUSE_PROGRAM").map_or(beside, PathBuf::from)
}

/// Why it cannot run here.
fn unmet(programs: &[&str]) -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("needs root".into());
    }
    if !Path::new("/dev/fuse").exists() {
        return Some("there is no /dev/fuse: modprobe fuse".into());
    }
    let program = program();
    if !program.exists() {
        return Some(format!("there is no {}: cargo build -p graphdriver-vfs-fuse", program.display()));
    }
    no_program(&[&["podman", "buildah", "crun", "busybox", "setpriv", "unshare"], programs].concat())
}

/// `store NAME` sets up a storage of that name: `vfs`, podman's plain one, or `vfs-fuse`.
const TOOLS: &str = r#"
store() {
    mkdir -p $1; export CONTAINERS_STORAGE_CONF=$PWD/$1/storage.conf HOME=$PWD/$1
    { echo '[storage]'; echo "driver = \"$2\""; echo "graphroot = \"$PWD/$1/root\""; echo "runroot = \"$PWD/$1/run\""
      [ $2 = vfs ] || printf '[storage.options.overlay]\nmount_program = "%s"\n' $PWD/mount-program; } > $CONTAINERS_STORAGE_CONF
}
# No network, and no limits that need the rights of a whole machine.
run() { podman run --cgroups=disabled --ulimit host --network none --runtime crun "$@"; }
tree() { mkdir -p rootfs; find rootfs -mindepth 1; }
printf '#!/bin/sh\necho "$*" >> %s/calls\nexec %s "$@"\n' $PWD $P > mount-program; chmod 755 mount-program
if [ ! -d tree ]; then
    mkdir -p tree/bin tree/tmp tree/dir/sub tree/etc; cp $(command -v busybox) tree/bin/busybox
    for a in sh cat ls echo rm mv ln mkdir chmod chown find stat sleep seq sort touch; do ln -s busybox tree/bin/$a; done
    echo one > tree/dir/f; echo two > tree/dir/sub/f; ln tree/dir/f tree/dir/hard; seq 100000 > tree/big; chmod 1777 tree/tmp
fi
cat > Containerfile <<'END'
FROM localhost/base:1
RUN echo built > /built; rm /bin/touch; mkdir /made; mv /made /renamed; mv /dir /dir2; echo more >> /big
RUN rm -r /dir2/sub; mkdir /dir2/sub; echo new > /dir2/sub/new; chmod 700 /dir2/f; chown 3:4 /big; ln /built /built2
COPY Containerfile /renamed/
CMD ["/bin/cat", "/built"]
END
# What a tree holds, times aside; podman makes what it mounts on.
TREE='cd /; find . -xdev \( -path ./proc -o -path ./sys -o -path ./dev -o -path ./run -o -path ./etc \) -prune -o -print | sort | while read f; do
    stat -c "%n %F %a %u:%g" "$f"; if [ -L "$f" ]; then ls -l "$f" | while read a b c d e f g h i; do echo "$i"; done; elif [ -f "$f" ]; then stat -c "%s" "$f"; fi
done; cat /built /dir2/f /dir2/sub/* /renamed/*'
"#;

/// Builds, runs, changes, commits, and runs what was committed. Prints what the last container saw.
const STEPS: &str = r#"
c=$(buildah from scratch); buildah copy -q $c tree / > /dev/null; buildah config --cmd /bin/sh $c; buildah commit -q $c base:1 > /dev/null; buildah rm $c > /dev/null
buildah build -q --isolation chroot --network host -t two:1 . > /dev/null
[ "$(run --rm two:1)" = built ]
run -d --name k two:1 sleep 1000 > /dev/null
podman exec k sh -c 'echo w > /renamed/w; rm /built2; mv /renamed /again; mv /dir2/sub /sub2; echo end >> /big; echo in > /tmp/in'
[ $STORE = vfs ] || cat /proc/self/mountinfo $(podman inspect -f '/proc/{{.State.Pid}}/mountinfo' k) >> mounts
podman stop -t 0 k > /dev/null
podman start k > /dev/null; [ "$(podman exec k cat /again/w)" = w ]; podman kill k > /dev/null; podman wait k > /dev/null
podman diff k | grep -v -e ' /etc' -e ' /run' -e ' /proc' -e ' /sys' -e ' /dev' | sort > $STORE-diff
podman commit -q k three:1 > /dev/null
run --rm three:1 sh -c 'mv /again /renamed; mv /sub2 /dir2/sub; '"$TREE"
run --rm --read-only three:1 sh -c 'cat /again/w; ! echo > /x 2> /dev/null'
podman rm -f k > /dev/null
"#;

/// Removes everything; nothing is mounted and nobody serves any more.
const CLEAN: &str = r#"
root=$(podman info -f '{{.Store.GraphRoot}}'); [ -d $root/overlay ]
podman rm -af > /dev/null; podman rmi -af > /dev/null
for _ in $(seq 100); do
    left="$(grep fuse\\. /proc/self/mounts || true)$(grep -laz "lowerdir=$PWD" /proc/[0-9]*/cmdline 2> /dev/null || true)"
    [ "$left" ] || break; sleep 0.05
done
[ -z "$left" ] || { echo "left: $left" >&2; exit 1; }
left=$(ls $root/overlay | grep -vxE 'l|staging|\.has-mount-program|\.tmp-.*|tempdirs' || true)
[ -z "$left" ] || { echo "layers left: $left" >&2; exit 1; }
"#;

fn bash(dir: &Path, before: &[&str], environment: &[(&str, &Path)], script: &str) -> String {
    let words = [before, &["timeout", "-s", "KILL", "150", "bash", "-euo", "pipefail", "-c", script]].concat();
    let mut command = Command::new(words[0]);
    command.args(&words[1..]).current_dir(dir).env_clear().env("PATH", std::env::var_os("PATH").unwrap());
    command.envs(environment.iter().copied()).env("LC_ALL", "C.UTF-8").stdin(Stdio::null());
    let out = command.output().unwrap();
    let (told, said) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success(), "ended with {}: {said}\n{told}\n{script}", out.status);
    told.into_owned()
}

/// With both storages; the results must be the same.
fn both_storages_do_the_same(dir: &Path, before: &[&str]) {
    let (program, home) = (dir.join("program"), dir.to_owned());
    let environment: [(&str, &Path); 4] = [
        ("P", &program),
        ("XDG_RUNTIME_DIR", &home.join("run")),
        ("TMPDIR", &home.join("tmp")),
        ("USER", Path::new("vfsuser")),
    ];
    let run = |name: &str, driver: &str, script: &str| {
        bash(dir, before, &environment, &format!("STORE={name}; {TOOLS}\nstore {name} {driver}\n{script}"))
    };
    let by_us = run("vfs-fuse", "overlay", &format!("{STEPS}\n{CLEAN}"));
    let plainly = run("vfs", "vfs", STEPS);
    assert!(by_us.lines().count() > 40, "{by_us}");
    let own = |text: &str| text.lines().filter(|l| !l.contains("./tmp/.X")).map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(own(&by_us), own(&plainly));
    let read = |name: &str| std::fs::read_to_string(dir.join(name)).unwrap();
    // It did not go without us.
    let calls = read("calls");
    assert!(calls.lines().count() >= 6 && calls.contains("lowerdir="), "{calls}");
    assert!(read("mounts").contains("- fuse."), "the container's root is no FUSE mount:\n{}", read("mounts"));
    for line in ["A /again", "A /again/w", "A /sub2", "C /big", "D /built2", "D /renamed", "D /dir2/sub"] {
        assert!(read("vfs-fuse-diff").lines().any(|l| l == line), "{line} is not in\n{}", read("vfs-fuse-diff"));
    }
    // The plain driver lists what is below a new directory too, as we must.
    assert_eq!(read("vfs-fuse-diff"), read("vfs-diff"));
}

#[test]
fn podman_and_buildah_of_root_work_on_it() {
    const NAME: &str = "podman_and_buildah_of_root_work_on_it";
    if skipped(NAME, unmet(&[])) {
        return;
    }
    support::isolated(NAME, Duration::from_secs(300), |dir| {
        prepare(dir);
        both_storages_do_the_same(dir, &[]);
    });
}

#[test]
fn podman_and_buildah_of_a_user_work_on_it() {
    const NAME: &str = "podman_and_buildah_of_a_user_work_on_it";
    if skipped(NAME, unmet(&["newuidmap", "newgidmap"])) {
        return;
    }
    support::isolated(NAME, Duration::from_secs(300), |dir| {
        prepare(dir);
        // A user with subordinate ids who may use /dev/fuse, as every desktop's; seen in this test's namespace only.
        bash(
            dir,
            &[],
            &[],
            r#"for f in passwd group; do cp /etc/$f $f; done
            echo "vfsuser:x:1234:1234::$PWD:/bin/sh" >> passwd; echo vfsuser:x:1234: >> group; echo vfsuser:200000:65536 > subids
            mount --bind passwd /etc/passwd; mount --bind group /etc/group; mount --bind subids /etc/subuid; mount --bind subids /etc/subgid
            mknod -m 666 fuse c 10 229; mount --bind fuse /dev/fuse
            chown 1234:1234 . run tmp; chmod 700 run"#,
        );
        let user = ["setpriv", "--reuid=1234", "--regid=1234", "--clear-groups"];
        both_storages_do_the_same(dir, &user);
    });
}

/// crun knows pure cgroup v1 or v2; a machine with both is made to look as if it had v1 only, in this namespace.
fn prepare(dir: &Path) {
    let script = "umount /sys/fs/cgroup/unified 2> /dev/null || true; mkdir run tmp; mount --make-rshared /
        cp $P program; chmod 755 program"; // The build directory may be closed to others.
    bash(dir, &[], &[("P", &program())], script);
}
