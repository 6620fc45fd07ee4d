//! Whiteouts and opaque directories in every spelling, under every name.

use crate::{
    common::{Layers, Mounted, program},
    disk::{assert_same, paths, push, seen, sh},
    ours,
};
use std::{fs, path::Path, process::Command};

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
