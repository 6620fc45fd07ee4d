//! What the kernel's overlay wrote and we show, and the other way round.

use crate::{
    FOLLOW, REDIRECT,
    common::{Layers, Mounted, skipped},
    complete,
    disk::{self, assert_same, bash, filled, paths, push, seen, sh, snapshot, timeless},
    kernel, ours, pattern,
};
use graphdriver_core::model::Snapshot;
use std::{
    fs,
    os::unix::fs::{MetadataExt, chown},
    path::{Path, PathBuf},
};

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
