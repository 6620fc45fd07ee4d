//! What fuse-overlayfs wrote.

use crate::{
    common::{Mounted, no_program, skipped},
    disk::{filled, push, sh},
    ours,
};
use std::process::Command;

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
