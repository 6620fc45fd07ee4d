//! mount, umount, and who has what mounted where.

use crate::common::Home;
use serde_json::Value;

#[test]
fn mount_shows_images_and_containers_where_it_is_told_to() {
    needs_root!("mount_shows_images_and_containers_where_it_is_told_to");
    let home = Home::with_container();
    home.ok("mkdir m n; graphdriver mount demo m; test -f m/etc/motd; if touch m/x 2> /dev/null; then exit 1; fi
        graphdriver mount --read-only c n; if touch n/x 2> /dev/null; then exit 1; fi; graphdriver umount n
        graphdriver mount c n; touch n/x; graphdriver mounts; graphdriver umount m n; test -z \"$(ls m n | grep x)\"");
    // The same container twice is the same filesystem.
    home.ok("graphdriver mount c m; graphdriver mount c n; echo 1 > m/both; grep -qx 1 n/both; graphdriver umount c
        test -z \"$(grep $PWD/ /proc/self/mountinfo)\"");
    home.ok("graphdriver mount c m; graphdriver mount demo m; graphdriver umount m; touch m/x; graphdriver umount m");
    home.fails(5, "graphdriver mount -r c m > out; graphdriver mount c n", &["read-only at", "unmount"]);
    home.fails(5, "graphdriver mount -r c m > out; graphdriver cp demo.tar c:/", &["read-only at", "unmount"]);
    home.fails(3, "graphdriver mount c gone", &["gone", "mkdir"]);
    home.fails(2, "graphdriver mount c demo.tar", &["demo.tar", "Not a directory"]);
    home.fails(3, "graphdriver mount gone m", &["gone", "graphdriver images"]);
    home.fails(2, "mkdir -p root/x; graphdriver mount c root/x", &["data root"]);
    home.fails(2, "graphdriver mount c .", &["data root"]);
}

#[test]
fn umount_takes_directories_as_they_are_typed_and_names() {
    needs_root!("umount_takes_directories_as_they_are_typed_and_names");
    let home = Home::with_container();
    for way in [
        "cd /; graphdriver umount $home/m",
        "cd m/..; graphdriver umount m/",
        "mkdir -p x; cd x; graphdriver umount ../m",
        "ln -sfn m link; graphdriver umount link",
        "graphdriver umount c",
        "graphdriver unmount ./m/.",
    ] {
        home.ok(&format!("mkdir -p m; home=$PWD; graphdriver mount c m; {way}; test -z \"$(ls $home/m)\""));
    }
    home.fails(3, "graphdriver umount c", &["not mounted", "graphdriver mounts"]);
    home.fails(3, "graphdriver umount m", &["mounted nothing at"]);
    home.fails(3, "graphdriver umount gone", &["gone"]);
    home.fails(3, "graphdriver umount ./gone", &["no such directory", "graphdriver mounts"]);
    home.fails(5, "graphdriver mount c m; cd m; graphdriver umount c", &["busy", "--lazy"]);
    home.ok("graphdriver mount c m; (cd m; graphdriver umount --lazy c; test -f etc/motd); test -z \"$(ls m)\"");
    // Unmounted behind the program's back, or gone with its namespace: no phantom is left.
    home.ok("graphdriver mount c m; umount m");
    home.ok("graphdriver mount c m");
    assert_eq!(home.ok("graphdriver --format json mounts"), "[]\n");
    home.ok("graphdriver rm c");
}

#[test]
fn mounts_and_ps_tell_what_is_mounted_where() {
    needs_root!("mounts_and_ps_tell_what_is_mounted_where");
    let home = Home::with_container();
    let told = home
        .ok("mkdir m n; graphdriver mount c m > out; graphdriver mount demo n > out; graphdriver --format json mounts");
    let mounts: Value = serde_json::from_str(&told).unwrap();
    let of = |at: usize| {
        (mounts[at]["Type"].as_str().unwrap(), mounts[at]["Name"].as_str().unwrap(), &mounts[at]["Writable"])
    };
    assert_eq!((of(0), of(1)), (("container", "c", &true.into()), ("image", "demo:1", &false.into())));
    let table = home.ok("graphdriver mount c m > out; graphdriver mounts; graphdriver ps; graphdriver inspect c");
    assert!(table.contains("read-write") && table.matches("/m ").count() == 2 && table.contains("/m\""), "{table}");
}
