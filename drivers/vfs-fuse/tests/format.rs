//! Layers on disk are overlayfs's own: what the kernel's overlay wrote is shown as the kernel shows it, and the other way
//! round; so is what fuse-overlayfs wrote. What is hostile or damaged is refused and reaches nothing outside.

mod common;
mod disk;

use common::{Layers, Mounted, cannot_mount, no_program, program, skipped};
use disk::{assert_same, bash, filled, paths, push, seen, sh, snapshot, timeless};
use graphdriver_core::model::Snapshot;
use rustix::io::Errno;
use std::{
    fs,
    io::ErrorKind,
    os::unix::fs::{FileExt, MetadataExt, chown, symlink},
    path::{Path, PathBuf},
    process::Command,
};

macro_rules! needs {
    ($test:literal) => {
        if skipped($test, cannot_mount().or_else(|| no_program(&["bash", "setfattr", "setfacl", "tar"]))) {
            return;
        }
    };
}

/// Changes made by `writer` twice, one layer on the other; what `reader` shows of each, as the upper and among the lowers,
/// must be what `writer` showed.
fn written_by_one_and_read_by_the_other(
    script: &str,
    writer: impl Fn(&Layers) -> Mounted,
    finish: impl Fn(&Layers),
    reader: impl Fn(&Layers) -> Mounted,
) -> Layers {
    let mut layers = filled();
    for (round, script) in [script, "change_again"].iter().enumerate() {
        let mounted = writer(&layers);
        sh(mounted.path(), script);
        let live = snapshot(mounted.path());
        mounted.unmount();
        finish(&layers);
        let expected = seen(writer(&layers));
        assert_same(&format!("round {round}: the writer mounted again"), &live, &expected);
        assert_same(&format!("round {round}: as the upper layer"), &expected, &seen(reader(&layers)));
        layers = push(layers);
        assert_same(&format!("round {round}: as a lower layer"), &rootless(expected), &rootless(seen(reader(&layers))));
    }
    layers
}

/// The root is the upper layer's own directory, and that is another one now.
fn rootless(mut tree: Snapshot) -> Snapshot {
    tree.remove(Path::new(""));
    tree
}

fn kernel(options: &'static [&'static str]) -> impl Fn(&Layers) -> Mounted {
    move |layers| layers.mount_kernel(options)
}

fn ours(layers: &Layers) -> Mounted {
    layers.mount(&[])
}

const FOLLOW: &[&str] = &["redirect_dir=follow", "metacopy=off", "index=off"];

#[test]
fn the_kernels_layers_are_shown_as_the_kernel_shows_them() {
    needs!("the_kernels_layers_are_shown_as_the_kernel_shows_them");
    let options = &["redirect_dir=off", "metacopy=off", "index=off"];
    written_by_one_and_read_by_the_other("change; mv swap1 s; mv s swap1", kernel(options), |_| (), ours);
}

#[test]
fn the_kernels_redirects_are_followed() {
    needs!("the_kernels_redirects_are_followed");
    let options = &["redirect_dir=on", "metacopy=off", "index=off"];
    let layers = written_by_one_and_read_by_the_other("change; renames", kernel(options), |_| (), ours);
    let redirects = layers.lowers.iter().flat_map(|l| paths(l)).filter_map(|p| disk::xattr_of(&p, REDIRECT));
    let redirects: Vec<_> = redirects.collect();
    assert!(redirects.iter().any(|r| r.starts_with(b"/")) && redirects.iter().any(|r| !r.starts_with(b"/")));
}

const REDIRECT: &str = "trusted.overlay.redirect";

#[test]
fn the_kernels_metacopy_files_have_their_data() {
    needs!("the_kernels_metacopy_files_have_their_data");
    let options = &["redirect_dir=on", "metacopy=on", "index=off"];
    let layers = written_by_one_and_read_by_the_other("change; renames", kernel(options), |_| (), ours);
    let metacopies =
        layers.lowers.iter().flat_map(|l| paths(l)).filter(|p| disk::xattr_of(p, "trusted.overlay.metacopy").is_some());
    assert!(metacopies.count() >= 2, "the kernel made none, so nothing was tested");
}

#[test]
fn the_kernels_metacopy_files_have_their_data_under_other_names() {
    needs!("the_kernels_metacopy_files_have_their_data_under_other_names");
    let layers = Layers::new(1);
    let (content, names) = (pattern(10_000), ["moved", "away", "linked"]);
    for name in ["d", "e"] {
        fs::create_dir(layers.lowers[0].join(name)).unwrap();
    }
    names.iter().for_each(|name| fs::write(layers.lowers[0].join("d").join(name), &content).unwrap());
    let by_kernel = layers.mount_kernel(&["redirect_dir=on", "metacopy=on", "index=off"]);
    for name in names {
        chown(by_kernel.path().join("d").join(name), Some(7), None).unwrap();
        assert!(disk::xattr_of(&layers.upper.join("d").join(name), "trusted.overlay.metacopy").is_some());
    }
    by_kernel.unmount();
    let mounted = layers.mount(&[]);
    let path = |name: &str| mounted.path().join(name);
    fs::rename(path("d/moved"), path("d/there")).unwrap();
    fs::rename(path("d/away"), path("e/away")).unwrap();
    fs::hard_link(path("d/linked"), path("e/linked")).unwrap();
    let check = |root: &Path| {
        for name in ["e/linked", "d/linked", "d/there", "e/away"] {
            assert!(fs::read(root.join(name)).unwrap() == content, "{name}");
            assert_eq!(fs::metadata(root.join(name)).unwrap().uid(), 7, "{name}");
        }
    };
    check(mounted.path());
    mounted.unmount();
    let mounted = layers.mount(&[]);
    check(mounted.path());
    mounted.unmount();
    check(layers.mount_kernel(&["metacopy=off", "redirect_dir=follow", "index=off"]).path());
}

#[test]
fn the_kernels_layers_of_unprivileged_mounts_are_read() {
    needs!("the_kernels_layers_of_unprivileged_mounts_are_read");
    let mut layers = filled();
    // `trusted.` spellings are no markers to such a mount.
    sh(&layers.lowers[0], "setfattr -x trusted.overlay.opaque op; setfattr -n user.overlay.opaque -v y op");
    let mounted = layers.mount_kernel(&["userxattr"]);
    sh(mounted.path(), "change");
    let expected = snapshot(mounted.path());
    mounted.unmount();
    assert_same("as the upper layer", &expected, &seen(layers.mount(&[])));
    layers = push(layers);
    assert_same("as a lower layer", &rootless(expected), &rootless(seen(layers.mount(&[]))));
}

#[test]
fn the_kernel_shows_our_layers_as_we_do() {
    needs!("the_kernel_shows_our_layers_as_we_do");
    written_by_one_and_read_by_the_other("change", ours, complete, kernel(FOLLOW));
    written_by_one_and_read_by_the_other("change", |layers| layers.mount(&["copy_up=full"]), |_| (), kernel(FOLLOW));
}

#[test]
fn the_kernel_follows_our_redirects() {
    needs!("the_kernel_follows_our_redirects");
    written_by_one_and_read_by_the_other("change; renames", ours, complete, kernel(FOLLOW));
}

/// Both might show the same wrong thing; the kernel alone, with hard links kept as we keep them, does not.
#[test]
fn the_same_changes_make_the_same_tree_as_the_kernel_makes() {
    needs!("the_same_changes_make_the_same_tree_as_the_kernel_makes");
    for copy_up in ["full", "extent", "auto"] {
        let option = format!("copy_up={copy_up}");
        let make = |mount: &dyn Fn(&Layers) -> Mounted| {
            let mut layers = filled();
            let mut trees = Vec::new();
            for script in ["change; renames", "change_again"] {
                let mounted = mount(&layers);
                sh(mounted.path(), script);
                trees.push(timeless(snapshot(mounted.path())));
                mounted.unmount();
                layers = push(layers);
            }
            trees
        };
        let by_us = make(&|layers| layers.mount(&[&option]));
        let by_the_kernel = make(&kernel(&["redirect_dir=on", "index=on", "metacopy=off"]));
        let trees = by_the_kernel.into_iter().zip(by_us);
        for (round, (mut kernel, mut us)) in trees.enumerate() {
            if round == 1 {
                // In the second layer the kernel knows nothing of the index of the first, and takes the names apart.
                for name in ["a2/3", "links/1", "links/2"] {
                    assert!(kernel.remove(Path::new(name)).is_some());
                    let names = us.remove(Path::new(name)).expect("we know").names;
                    assert_eq!(names, ["a2/3", "links/1", "links/2"].map(PathBuf::from), "{option}");
                }
            }
            assert_same(&format!("{option}, round {round}"), &kernel, &us);
        }
    }
}

#[test]
fn the_kernels_and_our_layers_mix() {
    needs!("the_kernels_and_our_layers_mix");
    let mut layers = filled();
    type Mount = fn(&Layers) -> Mounted;
    let by_kernel: Mount = |layers| layers.mount_kernel(&["redirect_dir=on", "metacopy=off", "index=off"]);
    let by_us: Mount = ours;
    let steps: [(Mount, &str); 4] = [
        (by_kernel, "mv moved m1; mv m1/x chain/x; mkdir moved; echo 1 > moved/1"),
        (by_us, "mv m1 m2; mv chain/x m2/x2; mv moved m3; rm -r many"),
        (by_kernel, "mv m2/x2/y yy; mv m2 m3/m4; mkdir many; echo 2 > many/2; rm a/b/f"),
        (by_us, "mv m3 m5; rm -r m5/m4/z; mv yy m5/m4/z; mv many a/many; echo 3 > a/b/f"),
    ];
    for (n, (mount, script)) in steps.into_iter().enumerate() {
        let mounted = mount(&layers);
        sh(mounted.path(), script);
        let live = snapshot(mounted.path());
        mounted.unmount();
        assert_same(&format!("step {n}, by us"), &live, &seen(ours(&layers)));
        assert_same(&format!("step {n}, by the kernel"), &live, &seen(by_kernel(&layers)));
        layers = push(layers);
    }
}

/// Whiteouts as a plain file with an xattr in a directory that says so (Linux 6.7, composefs): overlayfs's documentation,
/// "xattr whiteouts". The kernel reads them in lower layers.
#[test]
fn whiteouts_that_are_xattrs_are_read_as_the_kernel_reads_them() {
    needs!("whiteouts_that_are_xattrs_are_read_as_the_kernel_reads_them");
    for (prefix, options) in [("trusted", &[][..]), ("user", &["userxattr"][..])] {
        let layers = Layers::new(2);
        sh(
            &layers.lowers[1],
            "mkdir -p d/sub plain; echo 1 > d/gone; echo 1 > d/kept; echo 1 > d/sub/f; echo 1 > plain/f",
        );
        sh(
            &layers.lowers[0],
            &format!(
                "setfattr -n {prefix}.overlay.opaque -v x .
                 mkdir d plain; setfattr -n {prefix}.overlay.opaque -v x d
                 : > d/gone; setfattr -n {prefix}.overlay.whiteout -v y d/gone; : > d/sub; setfattr -n {prefix}.overlay.whiteout -v y d/sub
                 echo 2 > d/new; echo 2 > plain/f"
            ),
        );
        let expected = seen(layers.mount_kernel(options));
        assert!(
            !expected.contains_key(Path::new("d/gone")) && expected.contains_key(Path::new("d/kept")),
            "{expected:?}"
        );
        assert_same(prefix, &expected, &seen(ours(&layers)));
    }
}

/// An overlay mounted on a directory of an overlay keeps its markers as `trusted.overlay.overlay.…` there (Linux 6.8).
#[test]
fn markers_of_nested_overlays_are_kept_as_the_kernel_keeps_them() {
    needs!("markers_of_nested_overlays_are_kept_as_the_kernel_keeps_them");
    let layers = Layers::new(1);
    let set = "mkdir d; setfattr -n trusted.overlay.opaque -v y d; getfattr -n trusted.overlay.opaque --only-values d";
    let mounted = layers.mount_kernel(&[]);
    if bash(mounted.path(), set).stdout != b"y" {
        mounted.unmount();
        skipped(
            "markers_of_nested_overlays_are_kept_as_the_kernel_keeps_them",
            Some("this kernel has no nested markers: Linux 6.8".into()),
        );
        return;
    }
    let expected = snapshot(mounted.path());
    mounted.unmount();
    assert_same("written by the kernel", &expected, &seen(ours(&layers)));
    let layers = Layers::new(1);
    let mounted = ours(&layers);
    assert_eq!(sh(mounted.path(), set), "y");
    let live = snapshot(mounted.path());
    mounted.unmount();
    assert_same("written by us", &live, &seen(layers.mount_kernel(&[])));
}

/// The names below a mount, sorted, directories with a slash.
fn listing(mounted: &Mounted) -> String {
    sh(mounted.path(), r"find . -mindepth 1 \( -type d -printf '%P/\n' -o -printf '%P\n' \) | sort | tr '\n' ' '")
}

#[test]
fn every_spelling_of_an_opaque_directory_hides_what_is_below() {
    needs!("every_spelling_of_an_opaque_directory_hides_what_is_below");
    let spellings = [
        "setfattr -n trusted.overlay.opaque -v y d",
        "setfattr -n user.overlay.opaque -v y d",
        "setfattr -n user.fuseoverlayfs.opaque -v y d",
        ": > d/.wh..wh..opq",
    ];
    for spelling in spellings {
        let mut layers = Layers::new(3);
        sh(&layers.lowers[2], "mkdir -p d/sub; echo 1 > d/old; echo 1 > d/sub/f; echo 1 > x");
        sh(&layers.lowers[1], &format!("mkdir -p d/sub; echo 2 > d/two; {spelling}"));
        sh(&layers.lowers[0], "mkdir d; echo 3 > d/three");
        assert_eq!(listing(&layers.mount_read_only(&[])), "d/ d/sub/ d/three d/two x ", "in a lower: {spelling}");
        sh(&layers.upper, &format!("mkdir d; echo 4 > d/four; {spelling}"));
        let mounted = ours(&layers);
        assert_eq!(listing(&mounted), "d/ d/four x ", "in the upper: {spelling}");
        // What hid the old is no entry: the directory can be emptied and removed, and made again.
        sh(mounted.path(), "rm d/four; rmdir d; mkdir d; echo 5 > d/five");
        mounted.unmount();
        layers = push(layers);
        assert_eq!(listing(&layers.mount_read_only(&[])), "d/ d/five x ", "made again: {spelling}");
    }
}

#[test]
fn every_spelling_of_a_whiteout_hides_what_is_below() {
    needs!("every_spelling_of_a_whiteout_hides_what_is_below");
    for (whiteout, of) in [("mknod", ""), (": >", ".wh.")] {
        let make = |name: &str| if of.is_empty() { format!("mknod {name} c 0 0") } else { format!(": > {name}") };
        let mut layers = Layers::new(3);
        sh(&layers.lowers[2], "mkdir -p d/sub e; echo 1 > d/f; echo 1 > d/sub/f; echo 1 > e/f; echo 1 > kept");
        sh(&layers.lowers[1], &format!("mkdir d; {}; {}", make(&format!("d/{of}f")), make(&format!("{of}e"))));
        sh(&layers.lowers[0], "mkdir -p d e; echo 3 > e/new");
        assert_eq!(listing(&layers.mount_read_only(&[])), "d/ d/sub/ d/sub/f e/ e/new kept ", "{whiteout} in a lower");
        sh(&layers.upper, &format!("mkdir -p d; {}; {}", make(&format!("d/{of}sub")), make(&format!("{of}kept"))));
        let mounted = ours(&layers);
        assert_eq!(listing(&mounted), "d/ e/ e/new ", "{whiteout} in the upper");
        sh(mounted.path(), "mkdir kept d/sub; echo 4 > d/f; rm e/new; rmdir e");
        mounted.unmount();
        layers = push(layers);
        assert_eq!(listing(&layers.mount_read_only(&[])), "d/ d/f d/sub/ kept/ ", "{whiteout} covered again");
    }
}

/// The OCI image specification, layer.md: "Files that are present in the same layer as a whiteout file can only be hidden by
/// whiteout files in subsequent layers."
#[test]
fn a_whiteout_beside_what_it_names_hides_only_the_layers_below() {
    needs!("a_whiteout_beside_what_it_names_hides_only_the_layers_below");
    let layers = Layers::new(2);
    sh(&layers.lowers[1], "mkdir d; echo 1 > d/old; echo 1 > f");
    sh(&layers.lowers[0], "mkdir d; echo 2 > d/new; : > .wh.d; echo 2 > f; : > .wh.f");
    let mounted = layers.mount_read_only(&[]);
    assert_eq!(listing(&mounted), "d/ d/new f ");
    assert_eq!(fs::read_to_string(mounted.path().join("f")).unwrap(), "2\n");
}

/// Prints what is in a tree, whoever owns it, times aside.
const TELL: &str = r"find . -mindepth 1 ! -type d -printf '%P %y %m %s %l\n' | sort
    find . -mindepth 1 -type d -printf '%P %y %m\n' | sort; find . -type f -print0 | sort -z | xargs -0 sha256sum";

/// The layers that fuse-overlayfs has written, as root and as a user, are ours to go on with.
#[test]
fn the_layers_of_fuse_overlayfs_are_shown_as_it_shows_them() {
    needs!("the_layers_of_fuse_overlayfs_are_shown_as_it_shows_them");
    if skipped("the_layers_of_fuse_overlayfs_are_shown_as_it_shows_them", no_program(&["fuse-overlayfs"])) {
        return;
    }
    let as_user = ["unshare", "--user", "--map-root-user", "--mount", "--propagation", "private"];
    for (who, prefix) in [("root", &[][..]), ("rootless", &as_user[..])] {
        let mut layers = filled();
        if who == "rootless" {
            // fuse-overlayfs cannot copy up what belongs to ids that the user has not.
            layers.lowers.iter().for_each(|lower| drop(sh(lower, "chown -hR 0:0 .")));
        }
        let script = "rm a/f; rm -r gone op many/one; mkdir op many/one; echo new > op/new; echo new > many/one/new
            echo changed >> a/b/f; chmod 600 stay/big; ln a/b/f a/b/hard; ln -s t made-link; mkfifo made-fifo; rm links/q
            echo changed >> links/1; rm dangling; mkdir dangling; mv renamed-not a 2>/dev/null || mv null.x a 2>/dev/null || true";
        // It keeps hard links in memory: what it has written is what it shows when it is mounted again.
        let run = format!(
            "fuse-overlayfs -o {options} {merged}; trap 'cd /; umount {merged}' EXIT; cd {merged}; {script}; cd /
             umount {merged}; fuse-overlayfs -o {options} {merged}; cd {merged}; {TELL}",
            options = layers.options(&[]),
            merged = layers.merged.display()
        );
        let words = [prefix, &["bash", "-euc", &run]].concat();
        let out = Command::new(words[0]).args(&words[1..]).output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success(), "{who}: {said}");
        let expected = String::from_utf8_lossy(&out.stdout).into_owned();
        assert!(expected.lines().count() > 50, "{expected}");
        let shown = |mounted: &Mounted| sh(mounted.path(), TELL);
        let mounted = ours(&layers);
        assert_eq!(shown(&mounted), expected, "{who}, as the upper layer");
        mounted.unmount();
        layers = push(layers);
        let mounted = ours(&layers);
        assert_eq!(shown(&mounted), expected, "{who}, as a lower layer");
        // And can be changed.
        sh(mounted.path(), "rm -r op many a; mkdir op; echo last > op/last");
        mounted.unmount();
        layers = push(layers);
        assert_eq!(
            sh(layers.mount_read_only(&[]).path(), "ls -d op/* a many 2>/dev/null || true"),
            "op/last\n",
            "{who}"
        );
    }
}

/// Runs `vfs-fuse --complete` on the layers.
fn complete(layers: &Layers) {
    let out = Command::new(program()).args(["--complete", "-o", &layers.options(&[])]).output().unwrap();
    assert!(out.status.success(), "--complete ended with {}: {}", out.status, String::from_utf8_lossy(&out.stderr));
}

const MIB: usize = 1 << 20;

/// The lower file's bytes: no block is like another, none is zero.
fn pattern(size: usize) -> Vec<u8> {
    (0..size).map(|n| (n / 4096 % 250 + 1) as u8 ^ (n % 7) as u8 | 0x80).collect()
}

/// A lower file of 1 MiB of which 4 KiB in the middle were changed by `copy_up=extent`, and what it should hold.
fn incomplete() -> (Layers, Vec<u8>) {
    let layers = Layers::new(2);
    let mut expected = pattern(MIB);
    fs::create_dir(layers.lowers[1].join("dir")).unwrap();
    fs::write(layers.lowers[1].join("dir/big"), &expected).unwrap();
    fs::write(layers.lowers[1].join("dir/meta"), &expected).unwrap();
    let mounted = layers.mount(&["copy_up=extent"]);
    let file = fs::OpenOptions::new().write(true).open(mounted.path().join("dir/big")).unwrap();
    file.write_all_at(&[b'w'; 4096], 40960).unwrap();
    drop(file);
    expected[40960..45056].fill(b'w');
    assert!(fs::read(mounted.path().join("dir/big")).unwrap() == expected);
    mounted.unmount();
    let upper = fs::metadata(layers.upper.join("dir/big")).unwrap();
    assert_eq!(upper.len(), MIB as u64);
    assert!(upper.blocks() * 512 <= 65536, "it was copied whole, so nothing is tested: {} blocks", upper.blocks());
    (layers, expected)
}

#[test]
fn the_kernel_refuses_what_is_incomplete_and_shows_it_once_completed() {
    needs!("the_kernel_refuses_what_is_incomplete_and_shows_it_once_completed");
    let (layers, expected) = incomplete();
    let kernels: [&[&str]; 5] = [
        &["userxattr"],
        &["metacopy=off", "redirect_dir=off"],
        &["metacopy=off", "redirect_dir=follow"],
        &["metacopy=on", "redirect_dir=on"],
        &["metacopy=on", "redirect_dir=follow"],
    ];
    let refused = |layers: &Layers, options: &[&str], how: &str| {
        // Not to be mounted at all is a refusal too: metacopy=on needs redirect_dir=on.
        let Ok(mounted) = layers.try_mount_kernel(&layers.options(options)) else { return false };
        let e = fs::read(mounted.path().join("dir/big")).expect_err("the kernel shows an incomplete file");
        let refused =
            [Errno::PERM, Errno::IO, Errno::ACCESS].iter().any(|errno| e.raw_os_error() == Some(errno.raw_os_error()));
        assert!(refused, "{how} {options:?}: {e}");
        mounted.unmount();
        true
    };
    // With the layer's own work directory the whole mount is refused; with another one each file.
    for options in kernels {
        assert_eq!(layers.try_mount_kernel(&layers.options(options)).err(), Some(nix::Error::EINVAL), "{options:?}");
    }
    fs::rename(layers.work.join("work/incompat"), layers.dir().join("incompat")).unwrap();
    let asked = kernels.iter().filter(|options| refused(&layers, options, "as the upper")).count();
    assert!(asked >= 4, "only {asked} kinds of mounts could be tried");
    fs::rename(layers.dir().join("incompat"), layers.work.join("work/incompat")).unwrap();
    let mut below = incomplete().0;
    below = push(below);
    assert!(kernels.iter().filter(|options| refused(&below, options, "as a lower")).count() >= 4);

    assert!(fs::read(ours(&layers).path().join("dir/big")).unwrap() == expected, "mounted again");
    complete(&layers);
    for mount in [&kernel(FOLLOW) as &dyn Fn(&Layers) -> Mounted, &ours] {
        let mounted = mount(&layers);
        assert!(fs::read(mounted.path().join("dir/big")).unwrap() == expected);
        mounted.unmount();
    }
    let left = xattr::list(layers.upper.join("dir/big")).unwrap();
    let left: Vec<_> = left
        .filter(|name| ["extent", "metacopy", "redirect"].iter().any(|n| name.to_str().unwrap().contains(n)))
        .collect();
    assert!(left.is_empty(), "it is plain, but has {left:?}");
    // To complete what is complete is nothing.
    complete(&layers);
}

/// What copies the upper layer may have made data of the holes, or drop xattrs.
#[test]
fn an_incomplete_file_that_was_copied_is_refused() {
    needs!("an_incomplete_file_that_was_copied_is_refused");
    let copies = [
        "cp -a --sparse=never upper copy",
        "cp -a --sparse=auto upper copy",
        "mkdir copy; tar -C upper --xattrs --xattrs-include='*' -cf - . | tar -C copy --xattrs --xattrs-include='*' -xpf -",
        "mkdir copy; tar -C upper -S --xattrs --xattrs-include='*' -cf - . | tar -C copy --xattrs --xattrs-include='*' -xpf -",
        // In place: the same path, another inode.
        "cp -a --sparse=never upper copy; rm -r upper; cp -a copy upper; rm -r copy; mv upper copy",
    ];
    for copy in copies {
        let (mut layers, _) = incomplete();
        sh(layers.dir(), copy);
        layers.upper = layers.dir().join("copy");
        let refused = |mounted: Mounted| {
            let read = fs::read(mounted.path().join("dir/big"));
            let e = read.map(|_| ()).expect_err(&format!("a copy of an incomplete file is shown: {copy}"));
            assert_eq!(e.raw_os_error(), Some(Errno::IO.raw_os_error()), "{copy}: {e}");
            // Nothing else is the worse for it, and it can be removed.
            assert!(fs::read(mounted.path().join("dir/meta")).unwrap() == pattern(MIB));
            fs::remove_file(mounted.path().join("dir/big")).unwrap();
            mounted.unmount();
        };
        refused(ours(&layers));
    }
}

/// The lower file that holds the rest is not what it was.
#[test]
fn an_incomplete_file_whose_lower_one_has_changed_is_refused() {
    needs!("an_incomplete_file_whose_lower_one_has_changed_is_refused");
    for change in [
        "echo >> dir/big",
        "touch dir/big",
        "rm dir/big",
        "rm dir/big; mkdir dir/big",
        "rm dir/big; ln -s meta dir/big",
    ] {
        let (layers, _) = incomplete();
        sh(&layers.lowers[1], change);
        let mounted = ours(&layers);
        let read = fs::read(mounted.path().join("dir/big"));
        let e = read.map(|_| ()).expect_err("composed with a file that is another one now");
        assert_eq!(e.raw_os_error(), Some(Errno::IO.raw_os_error()), "{change}: {e}");
        mounted.unmount();
        let out = Command::new(program()).args(["--complete", "-o", &layers.options(&[])]).output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(!out.status.success() && said.contains("big"), "{change}: --complete says {said:?}");
    }
}

#[test]
fn odd_names_of_whiteouts_do_no_harm() {
    needs!("odd_names_of_whiteouts_do_no_harm");
    let layers = Layers::new(2);
    let long = "n".repeat(255);
    sh(&layers.lowers[1], &format!("echo 1 > f; echo 1 > {long}; echo 1 > {}; mkdir d; echo 1 > d/f", "m".repeat(251)));
    sh(
        &layers.lowers[0],
        &format!(
            "for n in .wh. .wh.. .wh... .wh..wh. .wh..wh.foo .wh..wh..opq.x .wh..wh.plnk .wh.$'\\n' .whf .wh .wh.{}; do : > $n; done
             mkdir .wh.d; echo x > .wh.d/x; ln -s f .wh.symlink",
            "m".repeat(251)
        ),
    );
    let mounted = ours(&layers);
    let seen: Vec<_> =
        fs::read_dir(mounted.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    for name in &seen {
        fs::symlink_metadata(mounted.path().join(name)).unwrap_or_else(|e| panic!("{name:?} is listed, but: {e}"));
    }
    for name in ["f", &long, ".whf", ".wh"] {
        assert!(seen.iter().any(|n| n == name), "{name:?} is not in {seen:?}");
    }
    assert!(!seen.contains(&"m".repeat(251)), "its whiteout is 255 bytes long");
    // 251 bytes and `.wh.` just fit into a name, 252 do not.
    sh(
        mounted.path(),
        &format!("rm {long}; echo 2 > {}; rm {}; mkdir {long}; rmdir {long}", "o".repeat(252), "o".repeat(252)),
    );
    // Either it is a name like others, now and later, or it is none.
    let made = fs::write(mounted.path().join(".wh.f"), "2");
    let expected = match &made {
        Ok(()) => "1\n2".to_owned(),
        Err(e) if matches!(e.raw_os_error(), Some(1 | 22)) => "1\n".into(),
        Err(e) => panic!("EINVAL or EPERM were clear: {e}"),
    };
    mounted.unmount();
    let mounted = ours(&layers);
    assert_eq!(sh(mounted.path(), "cat f; if [ -e .wh.f ]; then cat .wh.f; fi"), expected, "{made:?}");
    assert!(!mounted.path().join(&long).exists(), "a name of 255 bytes is back after it was deleted");
    mounted.unmount();
}

/// Without the right to make devices a whiteout is a file, whose name has to fit too.
#[test]
fn names_of_255_bytes_can_be_deleted_where_devices_cannot_be_made() {
    needs!("names_of_255_bytes_can_be_deleted_where_devices_cannot_be_made");
    let layers = Layers::new(1);
    let names: Vec<String> = [251, 252, 255].into_iter().map(|n| format!("{n}{}", "x".repeat(n - 3))).collect();
    for name in &names {
        fs::write(layers.lowers[0].join(name), "1").unwrap();
    }
    let run = format!(
        "{} -f -o {} {merged} & pid=$!; while ! mountpoint -q {merged}; do kill -0 $pid; sleep 0.01; done; rm {merged}/*; umount {merged}; wait $pid",
        program().display(),
        layers.options(&[]),
        merged = layers.merged.display()
    );
    let drop = ["setpriv", "--bounding-set=-mknod", "--inh-caps=-mknod", "timeout", "-s", "KILL", "30", "bash", "-euc"];
    let out = Command::new(drop[0]).args(&drop[1..]).arg(run).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    assert!(!paths(&layers.upper).is_empty());
    assert_eq!(listing(&ours(&layers)), "");
}

/// Whatever the xattrs say, nothing but the layers is read.
#[test]
fn redirects_lead_nowhere_outside_the_layers() {
    needs!("redirects_lead_nowhere_outside_the_layers");
    const SENTINEL: &str = "outside the layers";
    let layers = Layers::new(2);
    let outside = layers.dir().join("outside");
    fs::create_dir_all(outside.join("sub")).unwrap();
    fs::write(outside.join("sub/sentinel"), SENTINEL).unwrap();
    fs::write(outside.join("sentinel"), SENTINEL).unwrap();
    sh(&layers.lowers[1], "mkdir -p real/sub; echo 1 > real/f; echo 1 > real/sub/f");
    symlink(&outside, layers.lowers[1].join("link")).unwrap();
    symlink("../outside", layers.lowers[1].join("up")).unwrap();
    let absolute = outside.to_str().unwrap().to_owned();
    let long = format!("/{}", "long/".repeat(800));
    let values: Vec<&[u8]> = vec![
        b"..",
        b"../outside",
        b"/..",
        b"/../outside",
        b"/../../../../../../../../etc",
        b"/real/../../outside",
        b"real/../..",
        b"/",
        b"//",
        b"/.",
        b".",
        b"",
        b"/real/",
        b"/real//sub",
        b"/real/./sub",
        b"/link",
        b"/link/sub",
        b"/up",
        b"/up/sub",
        b"link",
        b"/real/f",
        b"/nowhere",
        b"nowhere",
        b"/real\0/sub",
        b"\0",
        b"/\xff\xfe",
        b"/a/b/c/d/e/f/g",
        b"real/sub",
        absolute.as_bytes(),
        long.as_bytes(),
        b"/loop-b",
        b"/loop-a",
        b"/self",
        b"self",
        b"../real",
        b"\n",
        b"/real\n",
    ];
    let names: Vec<String> = (0..values.len())
        .map(|n| match values[n] {
            b"/loop-b" => "loop-a".into(),
            b"/loop-a" => "loop-b".into(),
            b"/self" => "self".into(),
            _ => format!("r{n:02}"),
        })
        .collect();
    for layer in [&layers.lowers[0], &layers.upper] {
        for (name, value) in names.iter().zip(&values) {
            let dir = layer.join(name);
            fs::create_dir(&dir).unwrap();
            fs::write(dir.join("own"), "own").unwrap();
            xattr::set(&dir, REDIRECT, value).unwrap();
            // A metacopy file that says its data is there.
            let file = layer.join(format!("file-{name}"));
            fs::File::create(&file).unwrap().set_len(18).unwrap();
            xattr::set(&file, "trusted.overlay.metacopy", b"").unwrap();
            xattr::set(&file, REDIRECT, [value, &b"/sentinel"[..]].concat().as_slice()).unwrap();
        }
    }
    let mounted = ours(&layers);
    let mut clear = Vec::new();
    for name in &names {
        walk_hostile(&mounted.path().join(name), SENTINEL, 12, &mut clear);
        walk_hostile(&mounted.path().join(format!("file-{name}")), SENTINEL, 12, &mut clear);
        // Changes go no other way than reads.
        let _ = fs::write(mounted.path().join(name).join("made"), "made");
        let _ = fs::remove_file(mounted.path().join(name).join("sentinel"));
        let _ = fs::remove_file(mounted.path().join(name).join("sub/sentinel"));
    }
    let known = [
        Errno::IO,
        Errno::STALE,
        Errno::NOENT,
        Errno::LOOP,
        Errno::INVAL,
        Errno::PERM,
        Errno::NOTDIR,
        Errno::NAMETOOLONG,
    ];
    for (path, errno) in &clear {
        assert!(known.iter().any(|e| e.raw_os_error() == *errno), "{} gives errno {errno}", path.display());
    }
    assert_eq!(fs::read_to_string(mounted.path().join("real/f")).unwrap(), "1\n", "it still serves");
    mounted.unmount();
    assert_eq!(
        sh(&outside, "find . | sort | tr '\\n' ' '; cat sentinel sub/sentinel"),
        format!(". ./sentinel ./sub ./sub/sentinel {SENTINEL}{SENTINEL}")
    );
}

/// Reads all it can below a path; the sentinel's content must not be there. Notes the errnos.
fn walk_hostile(path: &Path, sentinel: &str, depth: usize, errors: &mut Vec<(PathBuf, i32)>) {
    assert!(depth > 0, "{} goes round in circles", path.display());
    let read = || -> std::io::Result<Vec<PathBuf>> {
        let meta = fs::symlink_metadata(path)?;
        if meta.is_file() {
            assert_ne!(fs::read(path)?, sentinel.as_bytes(), "{} is outside", path.display());
        }
        if meta.is_dir() { fs::read_dir(path)?.map(|entry| Ok(entry?.path())).collect() } else { Ok(Vec::new()) }
    };
    match read() {
        Err(e) => errors.push((path.to_owned(), e.raw_os_error().unwrap())),
        Ok(entries) => entries.iter().for_each(|entry| walk_hostile(entry, sentinel, depth - 1, errors)),
    }
}

/// The xattrs we keep for ourselves, damaged: an error or the right bytes, never those of another file, and no crash.
#[test]
fn damaged_headers_are_refused() {
    needs!("damaged_headers_are_refused");
    let (layers, expected) = incomplete();
    let secret = layers.dir().join("secret");
    fs::write(&secret, vec![b's'; MIB]).unwrap();
    let file = layers.upper.join("dir/big");
    let names: Vec<_> = xattr::list(&file).unwrap().filter(|n| n.to_str().unwrap().contains("overlay.vfs.")).collect();
    let header =
        names.iter().find(|n| n.to_str().unwrap().ends_with("vfs.extent")).expect("FORMAT.md names it").clone();
    let genuine = xattr::get(&file, &header).unwrap().unwrap();
    let mut damaged: Vec<Vec<u8>> = (0..genuine.len()).map(|n| genuine[..n].to_vec()).collect();
    damaged.push([&genuine[..], b"more"].concat());
    damaged.push(vec![0xff; genuine.len()]);
    damaged.push(vec![0; genuine.len()]);
    damaged.push(b"garbage".to_vec());
    for n in 0..genuine.len() {
        damaged.push(genuine.iter().enumerate().map(|(at, byte)| if at == n { byte ^ 0x81 } else { *byte }).collect());
    }
    let path = b"dir/big";
    let at = genuine.windows(path.len()).position(|w| w == path).expect("it holds the lower file's path");
    for instead in
        [&b"../../s"[..], b"/secret", b"dir/../", b"dir//ig", b"dir/\0ig", b"/ir/big", b"../dir/", b"dir/met"]
    {
        let mut changed = genuine.clone();
        changed[at..at + path.len()].copy_from_slice(instead);
        damaged.push(changed);
    }
    let original = fs::read(&file).unwrap();
    for (n, value) in damaged.iter().enumerate() {
        xattr::set(&file, &header, value).unwrap();
        let mounted = ours(&layers);
        match fs::read(mounted.path().join("dir/big")) {
            Ok(content) => assert!(content == expected, "damage {n} ({value:02x?}) shows something else"),
            Err(e) => assert!(matches!(e.raw_os_error(), Some(5 | 1 | 95 | 116)), "damage {n}: {e}"),
        }
        assert!(fs::read(mounted.path().join("dir/meta")).unwrap() == pattern(MIB), "damage {n}: it still serves");
        mounted.unmount();
        assert!(fs::read(&file).unwrap() == original, "damage {n}: reading has changed the file");
    }
    xattr::set(&file, &header, &genuine).unwrap();
    assert!(fs::read(ours(&layers).path().join("dir/big")).unwrap() == expected, "the genuine one is taken");
}

/// Inode numbers that were remembered may be garbage too.
#[test]
fn damaged_inode_numbers_do_no_harm() {
    needs!("damaged_inode_numbers_do_no_harm");
    let layers = filled();
    let mounted = ours(&layers);
    sh(mounted.path(), "echo more >> a/f; echo more >> a/b/f; chmod 700 stay; echo x > new");
    mounted.unmount();
    let values: [&[u8]; 8] = [
        b"",
        b"1",
        &[0; 8],
        &[0xff; 8],
        &[1, 0, 0, 0, 0, 0, 0, 0],
        &[0; 9],
        &[0xff; 100],
        &[0, 0, 0, 0, 0, 0, 0, 0x80],
    ];
    for value in values {
        for path in ["a", "a/f", "a/b/f", "stay", "new", ""] {
            xattr::set(layers.upper.join(path), "trusted.overlay.vfs.ino", value).unwrap();
        }
        let mounted = ours(&layers);
        let look =
            bash(mounted.path(), "cat a/f; find . > /dev/null; stat -c %i a a/f a/b/f stay new > /dev/null; cat new");
        let (content, said) = (String::from_utf8_lossy(&look.stdout), String::from_utf8_lossy(&look.stderr));
        assert_eq!(content, "bottom a/f\nmore\nx\n", "all have the number {value:02x?}: {said}");
        sh(mounted.path(), "echo y > new; mv new new2; mv new2 new; echo x > new");
        let unlike = snapshot(mounted.path());
        // Two files that say they are one are still two.
        assert_ne!(unlike[Path::new("a/f")].content, unlike[Path::new("a/b/f")].content);
        mounted.unmount();
    }
    assert_eq!(fs::read(layers.upper.join("no")).unwrap_err().kind(), ErrorKind::NotFound);
}
