//! Mounts that others move, cover, detach or take down, and that go with their namespace or at a reboot.

use crate::{
    LIMIT, remove_everything, small_image,
    support::{Gd, errors, isolated, system},
};
use std::{fs, path::Path};

fn with_container(dir: &Path) -> Gd {
    let gd = Gd::new(dir, &dir.join("root"));
    gd.ok(&["load", "-i", &small_image(&gd)]);
    gd.ok(&["create", "--name", "c", "localhost/small:1"]);
    gd
}

fn assert_no_mounts(gd: &Gd) {
    assert_eq!(gd.ok(&["mounts", "--format", "json"]).trim(), "[]");
    gd.assert_mounts_agree("no mounts");
}

#[test]
fn a_reboot_leaves_no_phantom_mount() {
    isolated("mounts::a_reboot_leaves_no_phantom_mount", LIMIT, |dir| {
        let gd = with_container(dir);
        let target = gd.make_dir("mnt");
        gd.ok(&["mount", "c", &target]);
        assert!(gd.fails(&["rm", "c"], 5).contains(&target));
        // A reboot takes the kernel's mounts and gives a new boot id.
        system("umount", &[&target]);
        gd.database().execute("UPDATE mounts SET boot = 'an earlier boot', mount = 1", []).unwrap();
        assert_no_mounts(&gd);
        gd.ok(&["rm", "c"]);
        remove_everything(&gd);
    });
}

#[test]
fn a_mount_namespace_that_ended_leaves_no_phantom_mount() {
    isolated("mounts::a_mount_namespace_that_ended_leaves_no_phantom_mount", LIMIT, |dir| {
        let gd = with_container(dir);
        let target = gd.make_dir("mnt");
        let script = format!(
            "unshare --mount --propagation private sh -ec \
             '$GD mount c {target}; echo hello > {target}/etc/new; $GD mounts > seen; if $GD rm c; then exit 1; fi'
             cat seen"
        );
        let out = gd.shell(&script);
        assert!(out.status.success(), "{}", errors(&out));
        assert!(String::from_utf8_lossy(&out.stdout).contains(&target), "it was mounted there");
        assert_no_mounts(&gd);
        assert_eq!(gd.ok(&["diff", "c"]), "C /etc\nA /etc/new\n");
        gd.ok(&["rm", "c"]);
        remove_everything(&gd);
    });
}

#[test]
fn a_mount_in_a_living_namespace_still_counts() {
    isolated("mounts::a_mount_in_a_living_namespace_still_counts", LIMIT, |dir| {
        let gd = with_container(dir);
        let target = gd.make_dir("mnt");
        let script = format!(
            "mkfifo up down; unshare --mount --propagation private sh -ec '$GD mount c {target} >&2; echo > up; cat down >&2' &
             cat up >&2; e=0; $GD rm c || e=$?; $GD mounts --format json; echo > down; wait; exit $e"
        );
        let out = gd.shell(&script);
        assert_eq!(out.status.code(), Some(5), "{}", errors(&out));
        let listed: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
        assert_eq!((&listed[0]["Target"], &listed[0]["Foreign"]), (&target.into(), &true.into()));
        assert_no_mounts(&gd);
        gd.ok(&["rm", "c"]);
    });
}

#[test]
fn what_umount_8_took_down_is_forgotten() {
    isolated("mounts::what_umount_8_took_down_is_forgotten", LIMIT, |dir| {
        let gd = with_container(dir);
        let target = gd.make_dir("mnt");
        gd.ok(&["mount", "c", &target]);
        system("umount", &[&target]);
        assert_no_mounts(&gd);
        gd.ok(&["mount", "c", &target]);
        system("umount", &[&target]);
        // Something else is there now: not ours to take down.
        system("mount", &["-t", "tmpfs", "none", &target]);
        gd.fails(&["umount", &target], 3);
        gd.ok(&["rm", "c"]);
        remove_everything(&gd);
    });
}

#[test]
fn a_container_mounted_twice_is_held_until_both_are_gone() {
    isolated("mounts::a_container_mounted_twice_is_held_until_both_are_gone", LIMIT, |dir| {
        let gd = with_container(dir);
        let (one, two) = (gd.make_dir("one"), gd.make_dir("two"));
        gd.ok(&["mount", "c", &one]);
        gd.ok(&["mount", "c", &two]);
        fs::write(dir.join("one/new"), "seen").unwrap();
        assert_eq!(fs::read_to_string(dir.join("two/new")).unwrap(), "seen");
        gd.assert_mounts_agree("mounted twice");
        gd.fails(&["rm", "c"], 5);
        gd.ok(&["umount", &one]);
        assert_eq!(fs::read_to_string(dir.join("two/new")).unwrap(), "seen");
        assert!(gd.fails(&["rm", "c"], 5).contains(&two));
        gd.assert_mounts_agree("mounted once");
        gd.ok(&["umount", "c"]);
        gd.ok(&["rm", "c"]);
        remove_everything(&gd);
    });
}

#[test]
fn a_mount_that_only_chrooted_processes_live_beside_still_counts() {
    isolated("mounts::a_mount_that_only_chrooted_processes_live_beside_still_counts", LIMIT, |dir| {
        let gd = with_container(dir);
        let (target, elsewhere) = (gd.make_dir("mnt"), gd.make_dir("elsewhere"));
        gd.file("new", b"new");
        for root in [&target, &elsewhere] {
            // The same path below the root of the process is another directory.
            let script = format!(
                "mkfifo up; unshare --mount --propagation private sh -ec '$GD mount c {target} >&2
                   mkdir -p {root}{target}/etc; exec perl -e \"chroot q({root}) or die; chdir q(/); close STDOUT; sleep 100\"' > up &
                 cat up; rm up; e=0; $GD rm c || e=$?; $GD cp new c:/etc/new >&2; $GD mounts --format json
                 kill $!; wait; exit $e"
            );
            let out = gd.shell(&script);
            assert_eq!(out.status.code(), Some(5), "{root}: {}", errors(&out));
            let listed: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
            assert_eq!((&listed[0]["Target"], &listed[0]["Foreign"]), (&target.as_str().into(), &true.into()));
            assert_no_mounts(&gd);
            let diff = gd.ok(&["diff", "c"]);
            assert!(diff.contains("A /etc/new\n") && diff.matches("/new\n").count() == 1, "{diff}");
            gd.ok(&["rm", "c"]);
            gd.ok(&["create", "--name", "c", "localhost/small:1"]);
        }
    });
}

#[test]
fn what_is_mounted_over_our_mount_is_not_taken_for_it() {
    isolated("mounts::what_is_mounted_over_our_mount_is_not_taken_for_it", LIMIT, |dir| {
        let gd = with_container(dir);
        let (one, two) = (gd.make_dir("one"), gd.make_dir("two"));
        gd.file("new", b"new");
        gd.ok(&["mount", "c", &one]);
        system("mount", &["-t", "tmpfs", "none", &one]);
        fs::write(dir.join("one/theirs"), "theirs").unwrap();
        let file = gd.path("new");
        for attempt in
            [&["mount", "c", &two][..], &["umount", &one], &["umount", "c"], &["rm", "-f", "c"], &["cp", &file, "c:/"]]
        {
            let said = gd.fails(attempt, 5);
            assert!(said.contains("mounted over") && said.contains(&one), "{attempt:?}: {said}");
        }
        assert_eq!(fs::read_to_string(dir.join("one/theirs")).unwrap(), "theirs");
        assert!(!dir.join("one/new").exists());
        system("umount", &[&one]);
        gd.ok(&["mount", "c", &two]);
        gd.ok(&["umount", "c"]);
        assert_no_mounts(&gd);
        remove_everything(&gd);
    });
}

#[test]
fn a_mount_moved_by_mount_8_is_still_ours() {
    isolated("mounts::a_mount_moved_by_mount_8_is_still_ours", LIMIT, |dir| {
        let gd = with_container(dir);
        let (one, two, three) = (gd.make_dir("one"), gd.make_dir("two"), gd.make_dir("three"));
        gd.ok(&["mount", "c", &one]);
        system("mount", &["--move", &one, &two]);
        gd.fails(&["rm", "c"], 5);
        gd.ok(&["mount", "c", &three]);
        fs::write(dir.join("two/new"), "seen").unwrap();
        assert_eq!(fs::read_to_string(dir.join("three/new")).unwrap(), "seen");
        gd.ok(&["umount", "c"]);
        assert_no_mounts(&gd);
        // Its number may be given to somebody else's mount.
        gd.ok(&["mount", "c", &one]);
        system("umount", &[&one]);
        system("mount", &["-t", "tmpfs", "none", &two]);
        gd.ok(&["rm", "c"]);
        remove_everything(&gd);
    });
}

#[test]
fn a_detached_mount_holds_its_container_until_its_last_user_is_gone() {
    isolated("mounts::a_detached_mount_holds_its_container_until_its_last_user_is_gone", LIMIT, |dir| {
        let gd = with_container(dir);
        let (one, two) = (gd.make_dir("one"), gd.make_dir("two"));
        for stay in ["chdir q(one)", "open F, q(one/etc/common)"] {
            gd.ok(&["mount", "c", &one]);
            let mut user = std::process::Command::new("perl");
            user.args(["-e", &format!("{stay} or die; close STDOUT; sleep 100")]).current_dir(dir);
            let mut user = user.stdout(std::process::Stdio::piped()).spawn().unwrap();
            std::io::Read::read_to_end(&mut user.stdout.take().unwrap(), &mut Vec::new()).unwrap();
            gd.fails(&["umount", "c"], 5);
            gd.ok(&["umount", "--lazy", "c"]);
            let mounts: serde_json::Value = serde_json::from_str(&gd.ok(&["mounts", "--format", "json"])).unwrap();
            assert_eq!(mounts[0]["Detached"], user.id(), "{mounts}");
            for attempt in [&["mount", "c", &two][..], &["mount", "--read-only", "c", &two]] {
                let said = gd.fails(attempt, 5);
                assert!(said.contains("detached") && said.contains(&user.id().to_string()), "{attempt:?}: {said}");
            }
            gd.fails(&["rm", "c"], 5);
            user.kill().unwrap();
            user.wait().unwrap();
            gd.ok(&["mount", "c", &two]);
            gd.ok(&["umount", "--lazy", "c"]);
            assert_no_mounts(&gd);
        }
        remove_everything(&gd);
    });
}

#[test]
fn a_reader_beside_a_writer_in_another_namespace_is_refused() {
    isolated("mounts::a_reader_beside_a_writer_in_another_namespace_is_refused", LIMIT, |dir| {
        let gd = with_container(dir);
        let target = gd.make_dir("mnt");
        let script = format!(
            "mkfifo up; unshare --mount --propagation private sh -ec '$GD mount c {target} >&2; exec perl -e \"close STDOUT; sleep 100\"' > up &
             cat up; for how in --read-only ''; do e=0; $GD mount $how c {target} || e=$?; test $e = 5 || exit 1; done
             kill $!; wait; $GD mount --read-only c {target}; $GD umount c"
        );
        let out = gd.shell(&script);
        assert!(out.status.success(), "{}", errors(&out));
        assert_eq!(errors(&out).matches("for writing").count(), 2, "{}", errors(&out));
        assert!(!errors(&out).contains("--read-only"), "{}", errors(&out));
        assert_no_mounts(&gd);
    });
}
