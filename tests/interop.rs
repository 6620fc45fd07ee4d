//! Archives and trees exchanged with the tools Debian has for them: skopeo, umoci, buildah, podman, containerd and tar.

mod common;

use common::{Home, no_program, no_root, skipped};

macro_rules! needs {
    ($test:literal, $($program:literal),*) => {
        if skipped($test, no_root().or_else(|| no_program(&["bash", "unshare", "jq", $($program),*]))) {
            return;
        }
    };
}

/// Shell functions every script here begins with.
const TOOLS: &str = r#"
skopeo() { command skopeo --insecure-policy "$@" > /dev/null; }
# Storage of their own; vfs, because these mounts and ours should have nothing in common.
store="--root $PWD/st --runroot $PWD/st-run --storage-driver vfs"
podman() { command podman $store "$@"; }
buildah() { command buildah $store "$@"; }
blob() { tar xOf "$1" "blobs/sha256/${2#sha256:}"; }
# Everything tar can tell of a tree, sorted; the root itself aside, which not every tool keeps the times of.
tree() { python3 "$PWD/tree.py" "$1"; }
same() { tree "$1" > left; tree "$2" > right; diff -u left right; }
# A private containerd, stopped in every case: by the trap, or when this shell is killed.
containerd_up() {
    mkdir -p cd
    cat > cd/config.toml <<TOML
version = 2
root = "$PWD/cd/root"
state = "$PWD/cd/state"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
address = "$PWD/cd/sock"
[plugins."io.containerd.internal.v1.opt"]
path = "$PWD/cd/opt"
TOML
    setpriv --pdeathsig TERM containerd --config cd/config.toml > cd/log 2>&1 &
    containerd=$!
    trap 'kill $containerd; wait $containerd || true' EXIT
    for _ in $(seq 200); do ctr version > /dev/null 2>&1 && return; sleep 0.05; done
    cat cd/log >&2; exit 1
}
ctr() { command ctr --address "$PWD/cd/sock" "$@"; }
"#;

/// Prints all there is to know about a tree: kinds, modes, owners, times, sizes, contents, links, devices, xattrs.
const TREE: &str = r#"
import hashlib, os, stat, sys
root = os.fsencode(sys.argv[1])
paths, links = [], {}
for at, dirs, files in os.walk(root):
    paths += [os.path.join(at, name) for name in dirs + files]
for path in sorted(paths):
    s = os.lstat(path)
    name = os.path.relpath(path, root)
    told = [oct(s.st_mode), s.st_uid, s.st_gid]
    if not stat.S_ISDIR(s.st_mode):
        # Not the number of links: of a file with names in several layers overlayfs counts hidden ones.
        told += [s.st_mtime_ns, links.setdefault(s.st_ino, name)]
    if stat.S_ISREG(s.st_mode):
        told += [s.st_size, hashlib.sha256(open(path, 'rb').read()).hexdigest()]
    elif stat.S_ISLNK(s.st_mode):
        told.append(os.readlink(path))
    elif stat.S_ISCHR(s.st_mode) or stat.S_ISBLK(s.st_mode):
        told.append(s.st_rdev)
    try:
        told += [(x, os.getxattr(path, x, follow_symlinks=False)) for x in sorted(os.listxattr(path, follow_symlinks=False))]
    except OSError:
        pass
    print(name, *told)
"#;

/// Two layers with what is hard to carry: hard links, owners, modes, file capabilities, user xattrs, devices, FIFOs, sparse
/// files, odd names and times, and deletions: of a file, of a tree, of a tree made anew, of one of several links.
const CHANGES: &str = r#"
lower() {
    mkdir -p $1/etc/sub $1/etc/dir $1/bin $1/gone/deep; echo m > $1/etc/dir/m; mkdir -p $1/anew/old; echo a > $1/etc/a; ln $1/etc/a $1/etc/sub/b; ln $1/etc/a $1/bin/c
    cp /bin/true $1/bin/capable; setcap cap_net_raw+ep $1/bin/capable; setfattr -n user.note -v hello $1/etc/a
    install -m 4755 /bin/true $1/bin/setuid; chown 12:34 $1/etc; chmod 1777 $1/etc/sub; mknod $1/null c 1 3; mkfifo $1/fifo
    echo x > $1/gone/deep/x; echo y > $1/anew/old/y; echo z > $1/anew/z; echo 'odd' > $1/$'new\nline'; ln -s /etc/a $1/abs
    truncate -s 9M $1/sparse; echo end >> $1/sparse; touch -d '1999-12-31 23:59:59.123456789 UTC' $1/etc/a
    touch $1/latin-$'\xe9' "$1/$(printf 'n%.0s' {1..200})"; chmod 600 $1/null
}
upper() {
    rm -r $1/gone $1/anew $1/bin/c; mkdir $1/anew; echo n > $1/anew/n; rm $1/fifo; echo file > $1/fifo; rm $1/null; mkdir $1/null
    echo more >> $1/bin/setuid; chmod 2755 $1/bin/setuid; ln $1/bin/setuid $1/bin/again; chown 5:6 $1/abs -h; echo s >> $1/sparse
    cp /bin/true $1/bin/upper; setcap cap_chown+ep $1/bin/upper; setfattr -n user.two -v 2 $1/etc/sub; mv $1/etc/dir $1/etc/moved
    touch -d '2001-02-03 04:05:06 UTC' $1/anew/n; truncate -s 4M $1/hole; mknod $1/blk b 7 1
}
"#;

fn home() -> Home {
    let home = Home::new();
    std::fs::write(home.path().join("tree.py"), TREE).unwrap();
    home
}

#[track_caller]
fn run(home: &Home, script: &str) -> String {
    home.ok_noisy(&format!("{TOOLS}\n{CHANGES}\n{script}"))
}

/// An image `made:1` in two layers by buildah, in podman's storage, whose tree is then at `$made`.
const MADE_BY_BUILDAH: &str = "
    c=$(buildah from scratch); m=$(buildah mount $c); lower $m; buildah commit -q $c base:1 > out
    c=$(buildah from --pull-never base:1); m=$(buildah mount $c); upper $m; buildah commit -q $c made:1 > out
    podman tag made:1 made:also > out; made=$(podman image mount made:1)";

#[test]
fn what_podman_and_skopeo_save_is_shown_as_podman_shows_it() {
    needs!(
        "what_podman_and_skopeo_save_is_shown_as_podman_shows_it",
        "podman",
        "buildah",
        "skopeo",
        "setcap",
        "python3"
    );
    let home = home();
    run(&home, &format!("{MADE_BY_BUILDAH}
        id=$(podman image inspect made:1 | jq -r '.[0].Id'); diffs=$(podman image inspect made:1 | jq -c '.[0].RootFS.Layers')
        podman save -q -o docker.tar made:1; podman save -q --format oci-archive -o oci.tar made:1
        podman save -q --format oci-dir -o oci made:1; podman save -q -m -o multi.tar base:1 made:1
        skopeo copy --dest-compress-format zstd oci-archive:oci.tar oci:zstd:made:1
        mkdir m
        for archive in docker.tar oci.tar oci zstd; do
            export GRAPHDRIVER_DATA_ROOT=$PWD/root-$archive
            graphdriver load -i $archive > out
            # The tree first: it is the point.
            image=$(graphdriver images -q); graphdriver mount $image m > out; same $made m; graphdriver umount m
            test \"$(graphdriver inspect $image | jq -c '.[0].RootFS.Layers')\" = \"$diffs\"
            case $archive in docker.tar | oci.tar) test $(graphdriver images -q --no-trunc) = sha256:$id ;; esac
        done
        export GRAPHDRIVER_DATA_ROOT=$PWD/root-multi; graphdriver load -i multi.tar | sort > out
        diff out - <<< $'Loaded image: localhost/base:1\\nLoaded image: localhost/made:1'"));
}

#[test]
fn what_umoci_makes_is_shown_as_umoci_unpacks_it() {
    needs!("what_umoci_makes_is_shown_as_umoci_unpacks_it", "umoci", "setcap", "python3");
    let home = home();
    run(&home, "umoci init --layout oci; umoci new --image oci:1; umoci unpack --image oci:1 b > out 2>&1; lower b/rootfs
        umoci repack --refresh-bundle --image oci:1 b > out 2>&1; upper b/rootfs
        umoci repack --image oci:1 b > out 2>&1; umoci unpack --image oci:1 whole > out 2>&1
        graphdriver load -i oci > out; mkdir m; graphdriver mount $(graphdriver images -q) m > out; same whole/rootfs m");
}

#[test]
fn what_containerd_exports_is_loaded() {
    needs!("what_containerd_exports_is_loaded", "containerd", "ctr", "podman", "buildah", "setcap", "python3");
    let home = home();
    run(&home, &format!("{MADE_BY_BUILDAH}; podman save -q -o docker.tar made:1; containerd_up
        ctr images import --snapshotter native docker.tar > out
        ctr images mount --snapshotter native localhost/made:1 $PWD/$(mkdir -p m n; echo n) > out
        ctr images export exported.tar localhost/made:1
        graphdriver load -i exported.tar > out; graphdriver mount localhost/made:1 m > out; same n m; same $made m; umount n"));
}

#[test]
fn what_is_saved_is_accepted_and_shown_alike_by_the_others() {
    needs!(
        "what_is_saved_is_accepted_and_shown_alike_by_the_others",
        "containerd",
        "ctr",
        "podman",
        "buildah",
        "skopeo",
        "umoci",
        "setcap",
        "python3"
    );
    let home = home();
    run(&home, &format!("{MADE_BY_BUILDAH}; podman save -q -o in.tar made:1; graphdriver load -i in.tar > out
        graphdriver create --name c localhost/made:1 > out; mkdir m; graphdriver mount c m > out; echo c > m/committed; rm m/etc/a
        graphdriver commit c localhost/new:1 > out; graphdriver umount m; graphdriver mount localhost/new:1 m > out
        diffs=$(graphdriver inspect localhost/new:1 | jq -c '.[0].RootFS.Layers'); id=$(graphdriver inspect localhost/new:1 | jq -r '.[0].Id')
        graphdriver save -o docker.tar localhost/new:1; graphdriver save --output-type oci -o oci.tar localhost/new:1
        for from in docker-archive:docker.tar oci-archive:oci.tar; do
            test \"$(command skopeo inspect --config $from | jq -c .rootfs.diff_ids)\" = \"$diffs\"
            skopeo copy $from oci:copy-${{from%%-*}}:1
            umoci unpack --image copy-${{from%%-*}}:1 unpacked-${{from%%-*}} > out 2>&1; same m unpacked-${{from%%-*}}/rootfs
            rm -rf st st-run; podman load -q -i ${{from#*:}} > out; podman image exists localhost/new:1
            same m $(podman image mount localhost/new:1)
            test sha256:$(podman image inspect localhost/new:1 | jq -r '.[0].Id') = $id
        done
        containerd_up; mkdir n
        for archive in docker oci; do
            ctr --namespace $archive images import --snapshotter native $archive.tar > out
            ref=$(ctr --namespace $archive images ls -q | sed -n 1p)
            ctr --namespace $archive images mount --snapshotter native $ref $PWD/n > out; same m n; umount n
        done"));
}

#[test]
fn layers_that_came_uncompressed_go_out_byte_for_byte() {
    needs!(
        "layers_that_came_uncompressed_go_out_byte_for_byte",
        "podman",
        "buildah",
        "umoci",
        "skopeo",
        "setcap",
        "python3"
    );
    let home = home();
    let counted = run(
        &home,
        &format!(
            "{MADE_BY_BUILDAH}; podman save -q -o in.tar made:1
        # A layer in a dialect no Go program writes.
        mkdir gnu; lower gnu; tar c --format=gnu --sparse --xattrs -C gnu . > gnu.tar
        umoci init --layout oci; umoci new --image oci:1; umoci raw add-layer --image oci:1 gnu.tar > out 2>&1
        skopeo copy oci:oci:1 docker-archive:in2.tar:gnu:1
        n=0
        for in in in.tar in2.tar; do
            graphdriver load -i $in > out; name=$(sed 's/.*: //' out)
            for kind in docker oci; do
                graphdriver save --output-type $kind -o $kind.tar $name
                for layer in $(tar xOf $in manifest.json | jq -r '.[0].Layers[]'); do
                    tar xOf $in $layer > came; blob $kind.tar $(sha256sum < came | cut -c-64) | cmp - came; n=$((n + 1))
                done
            done
        done; echo $n"
        ),
    );
    assert_eq!(counted, "6\n");
}

#[test]
fn export_and_import_agree_with_tar() {
    needs!("export_and_import_agree_with_tar", "tar", "setcap", "python3");
    let home = home();
    run(&home, "mkdir t; lower t; tar c --format=posix --sparse --xattrs --xattrs-include='*' -C t . | graphdriver import - made > out
        mkdir m x; graphdriver mount made m > out; same t m; graphdriver umount m
        graphdriver create --name c made > out; graphdriver mount c m > out; upper m
        graphdriver export c | tar x --xattrs --xattrs-include='*' --same-owner -p -C x; same m x
        test $(stat -c %b x/sparse) -lt 1000; test $(stat -c %b m/hole) -lt 100");
}

#[test]
fn a_committed_layer_means_the_same_to_umoci_and_podman() {
    needs!("a_committed_layer_means_the_same_to_umoci_and_podman", "umoci", "podman", "skopeo", "setcap", "python3");
    let home = home();
    run(&home, "mkdir t m n; lower t; tar c --format=posix --sparse --xattrs --xattrs-include='*' -C t . | graphdriver import - base > out
        graphdriver create --name c base > out; graphdriver mount c m > out; upper m; graphdriver commit c localhost/made:1 > out
        graphdriver mount localhost/made:1 n > out; same m n
        graphdriver save --output-type oci localhost/made:1 > oci.tar; mkdir oci; tar x -C oci < oci.tar
        skopeo copy oci-archive:oci.tar oci:umoci:1; umoci unpack --image umoci:1 whole > out 2>&1; same m whole/rootfs
        podman load -q -i oci.tar > out; same m $(podman image mount localhost/made:1)
        # A second container on top, changed again, and the layers of both apart.
        graphdriver create --name d localhost/made:1 > out; mkdir o; graphdriver mount d o > out
        rm -r o/anew; mkdir -p o/anew/n; rm -r o/etc; ln o/bin/again o/bin/third; graphdriver commit d localhost/two:1 > out
        graphdriver save localhost/two:1 > two.tar; podman load -q -i two.tar > out; same o $(podman image mount localhost/two:1)");
}

/// As an ordinary user would: in a user namespace of their own, whose overlays keep their marks in user xattrs.
#[test]
fn without_root_everything_works_in_a_user_namespace() {
    needs!("without_root_everything_works_in_a_user_namespace", "setpriv", "python3");
    let home = home();
    let script = r#"
set -eu
graphdriver load -qi demo.tar > out; graphdriver info | grep -q 'userxattr: true'
graphdriver create --name c demo > out; mkdir m n; graphdriver mount c m > out
echo new > m/new; rm m/etc/motd; rm -r m/var; mkdir m/var; echo v > m/var/v; chmod 700 m/etc
graphdriver diff c | sort > told
printf '%s\n' 'A /new' 'A /var/v' 'C /etc' 'C /var' 'D /etc/motd' 'D /var/log' | diff - told
graphdriver commit c two > out; graphdriver mount two n > out; diff -r --no-dereference m n; test ! -e n/etc/motd
graphdriver cp c:/new got; grep -qx new got; graphdriver save two > two.tar; graphdriver export c > all.tar
graphdriver --root other load -i two.tar > out; graphdriver umount two c; graphdriver rm c > out; graphdriver rmi two demo:1 demo > out
test "$(graphdriver --format json info | jq .Layers)" = 0; echo done
"#;
    std::fs::write(home.path().join("rootless.sh"), script).unwrap();
    // The user must be able to reach the program and the home.
    let told =
        home.ok("chmod 755 .; mkdir user; cp demo.tar rootless.sh user; cp $(command -v graphdriver) user/graphdriver
        chown -R 54321:54321 user; cd user; export HOME=$PWD PATH=$PWD:$PATH GRAPHDRIVER_DATA_ROOT=$PWD/root
        setpriv --reuid 54321 --regid 54321 --clear-groups unshare --user --map-root-user --mount sh rootless.sh");
    assert_eq!(told, "done\n");
    // What one session left mounted does not keep the next from removing it.
    home.ok("cd user; export HOME=$PWD PATH=$PWD:$PATH GRAPHDRIVER_DATA_ROOT=$PWD/root
        user() { setpriv --reuid 54321 --regid 54321 --clear-groups unshare --user --map-root-user --mount sh -euc \"$1\"; }
        user 'graphdriver load -qi demo.tar > out; graphdriver create --name c demo > out; graphdriver mount c m > out'
        user 'graphdriver rm -f c > out'");
}

/// The comparison above must see each of these differences, or it proves nothing.
#[test]
fn the_comparison_of_trees_sees_every_difference() {
    needs!("the_comparison_of_trees_sees_every_difference", "setcap", "python3");
    let home = home();
    for change in [
        "touch u/new",
        "rm u/etc/a",
        "chmod 700 u/bin",
        "chown 9 u/etc/a",
        "touch -h u/abs",
        "setcap -r u/bin/capable",
        "setfattr -x user.note u/etc/a",
        "rm u/bin/c; cp -p u/etc/a u/bin/c",
        "ln -sfn /x u/abs",
        "rm u/null; mknod u/null c 1 5; chmod 600 u/null",
        "printf b | dd of=u/sparse bs=1 seek=5 conv=notrunc status=none; touch -r t/sparse u/sparse",
        "touch -d @1 u/etc/a",
    ] {
        let output = home.run(&format!(
            "{TOOLS}\n{CHANGES}\nrm -rf t u; mkdir t; lower t; cp -a t u; same t u > out || exit 9; {change}; same t u"
        ));
        let told = String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.code(), Some(1), "{change}: {told}\n{}", String::from_utf8_lossy(&output.stderr));
    }
}
