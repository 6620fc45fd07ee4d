//! `graphdriver quota`, and what limits do and say on filesystems with and without project quotas.

mod common;

use common::{Home, no_program, no_root, skipped, skipped_outside_guest};
use std::process::Command;

/// Filesystems with project quotas: name, what makes one, what mounts it.
const WITH_QUOTAS: [(&str, &str, &str); 2] = [
    ("xfs", "mkfs.xfs -q disk", "loop,pquota"),
    ("ext4", "mkfs.ext4 -q -O project,quota -E quotatype=prjquota disk", "loop,prjquota"),
];

/// A script that ends with the data root on such a filesystem. The mount namespace takes all of it away in the end.
fn on(make: &str, options: &str, then: &str) -> String {
    format!("rm -f disk; truncate -s 1G disk; {make} >/dev/null; mkdir -p root; mount -o {options} disk root; {then}")
}

fn no_project_quotas() -> Option<String> {
    let home = Home::new();
    let mounts = |(_, make, options): &(&str, &str, &str)| home.run(&on(make, options, "true")).status.success();
    (!WITH_QUOTAS.iter().all(mounts))
        .then(|| "the kernel mounts neither or only one of xfs and ext4 with project quotas".into())
}

#[test]
fn without_quotas_limits_are_refused_with_what_is_missing_and_the_list_works() {
    const NAME: &str = "without_quotas_limits_are_refused_with_what_is_missing_and_the_list_works";
    if skipped(NAME, no_root().or_else(|| no_program(&["mkfs.ext4", "mkfs.xfs"]))) {
        return;
    }
    let home = Home::new();
    let kernel = std::path::Path::new("/proc/fs/xfs/xqmstat").exists();
    let xfs = if kernel { "without pquota" } else { "CONFIG_XFS_QUOTA" };
    for (make, words) in [
        (
            "mkfs.ext4 -q disk",
            &["project quotas on ext4", "tune2fs -O project,quota -Q prjquota /dev/loop", "mount -o prjquota"][..],
        ),
        ("mkfs.xfs -q disk", &["project quotas on xfs", xfs, "mount -o pquota"]),
    ] {
        let root = |then: &str| {
            on(
                make,
                "loop",
                &format!(
                    "graphdriver load -qi demo.tar >/dev/null; graphdriver create --name c demo >/dev/null; {then}"
                ),
            )
        };
        for command in [
            "graphdriver quota c --size 1G",
            "graphdriver quota c --inodes 1000",
            "graphdriver create --storage-opt size=1G demo",
            "graphdriver create --storage-opt inodes=1000 demo",
            "graphdriver --storage-opt overlay2.size=1G info",
            "graphdriver -s vfs-fuse --storage-opt vfs-fuse.size=1G info",
        ] {
            home.fails(6, &root(command), words);
        }
        // Nothing is left of what was refused, and lifting what is not there is no error.
        let listed =
            home.ok(&root("graphdriver quota c --size none --inodes none; graphdriver quota; ls root/overlay2/data"));
        let lines: Vec<_> = listed.lines().filter(|line| line.contains("none")).collect();
        assert!(
            lines.len() == 2 && lines.iter().all(|line| line.split_whitespace().filter(|w| *w == "none").count() == 2),
            "{listed}"
        );
        assert!(!listed.contains("projects\n"), "{listed}");
    }
}

#[test]
fn wrong_words_are_refused_with_what_is_right() {
    if skipped("wrong_words_are_refused_with_what_is_right", no_root()) {
        return;
    }
    let home = Home::with_container();
    home.fails(3, "graphdriver quota gone", &["gone", "graphdriver ps"]);
    home.fails(3, "graphdriver quota gone --size 1G", &["gone", "graphdriver ps"]);
    home.fails(2, "graphdriver quota --size 1G", &["CONTAINER"]);
    home.fails(2, "graphdriver quota c --size much", &["much", "10G", "none"]);
    home.fails(2, "graphdriver quota c --inodes 1k", &["1k", "100000", "none"]);
    home.fails(2, "graphdriver quota c --size", &["--size"]);
    home.fails(2, "graphdriver create --storage-opt inodes=many demo", &["many", "100000"]);
    home.fails(2, "graphdriver create --storage-opt size=0 demo", &["limit of 0"]);
    home.fails(2, "graphdriver --storage-opt overlay2.size=0 info", &["overlay2.size", "limit of 0"]);
    home.fails(
        2,
        "graphdriver --storage-opt overlay2.quota_projects=7 info",
        &["overlay2.quota_projects", "FIRST-LAST"],
    );
    home.fails(
        2,
        "graphdriver -s vfs-fuse --storage-opt vfs-fuse.quota_projects=9-5 info",
        &["vfs-fuse.quota_projects"],
    );
    let one = home.json("quota c");
    assert_eq!((&one[0]["Name"], &one[0]["SizeLimit"], &one[0]["InodeLimit"]), (&"c".into(), &().into(), &().into()));
    assert!(
        one[0]["Size"].is_u64() && one[0]["Inodes"].is_u64() && one[0]["ID"].as_str().unwrap().len() == 64,
        "{one}"
    );
}

/// Runs a script on each filesystem with quotas and each driver. `$D` is the data directory of the driver.
fn each(test: &str, script: &str, check: impl Fn(&str, &str)) {
    if skipped(test, no_root()) || skipped_outside_guest(test, no_project_quotas()) {
        return;
    }
    let home = Home::new();
    for (name, make, options) in WITH_QUOTAS {
        for driver in ["overlay2", "vfs-fuse"] {
            let setup = format!(
                "export GRAPHDRIVER_STORAGE_DRIVER={driver}; D=root/{driver}/data; mkdir -p m
                graphdriver load -qi demo.tar >/dev/null"
            );
            let said = home.ok(&on(
                make,
                options,
                &format!("{setup}; {script}; graphdriver ps -q | xargs -r graphdriver rm -f >/dev/null"),
            ));
            check(&format!("{driver} on {name}"), &said);
        }
    }
}

#[test]
fn a_container_is_held_to_its_limit_and_quota_gives_it_more() {
    const NAME: &str = "a_container_is_held_to_its_limit_and_quota_gives_it_more";
    let script = "
        graphdriver create --name c --storage-opt size=20M --storage-opt inodes=100 demo >/dev/null
        graphdriver mount c m >/dev/null
        ! dd if=/dev/zero of=m/big bs=1M count=40 2>err; grep -cE 'No space left|quota exceeded' err
        graphdriver quota c --size 60M >/dev/null
        dd if=/dev/zero of=m/big bs=1M count=40 2>/dev/null
        ! for n in $(seq 200); do : > m/f$n || break; done 2>/dev/null; ls m | grep -c ^f || true
        graphdriver quota c --inodes none --size none >/dev/null
        for n in $(seq 200); do : > m/f$n; done
        graphdriver quota c --inodes 1000 --size 100M >/dev/null
        graphdriver umount c
        graphdriver --format json inspect c | grep -E 'Limit' | tr -d ' ,\\n'; echo
        graphdriver --format json events --filter event=update --until 0s | tail -1 | grep -o '\"size\":\"[0-9]*\"'
        graphdriver quota | tail -1 | tr -s ' '";
    each(NAME, script, |on, said| {
        let lines: Vec<_> = said.lines().collect();
        assert_eq!(lines[0], "1", "{on}: {said}");
        let files: u32 = lines[1].parse().unwrap();
        assert!((50..100).contains(&files), "{on}: {files} files in 100 inodes");
        assert_eq!(lines[2], "\"SizeLimit\":104857600\"InodeLimit\":1000", "{on}");
        assert_eq!(lines[3], "\"size\":\"104857600\"", "{on}");
        let words: Vec<_> = lines[4].split(' ').collect();
        assert_eq!((words[1], words[3], words[5]), ("c", "105MB", "1000"), "{on}: {said}");
    });
}

#[test]
fn changes_of_size_and_inodes_at_once_both_happen() {
    const NAME: &str = "changes_of_size_and_inodes_at_once_both_happen";
    let script = "
        graphdriver create --name c demo >/dev/null
        for n in $(seq 6); do
            graphdriver quota c --size ${n}0M >/dev/null & graphdriver quota c --inodes ${n}00 >/dev/null & wait
            graphdriver --format json quota c | grep -E Limit | tr -dc '0-9,'
        done; echo";
    each(NAME, script, |on, said| {
        let both: String = (1..=6).map(|n| format!("{},{n}00", (n * 10) << 20)).collect();
        assert_eq!(said.trim(), both, "{on}");
    });
}

#[test]
fn a_container_filled_and_mounted_again_and_again_stays_bounded() {
    const NAME: &str = "a_container_filled_and_mounted_again_and_again_stays_bounded";
    let script = "
        graphdriver create --name c --storage-opt size=20M demo >/dev/null
        for n in $(seq 5); do
            graphdriver mount c m >/dev/null
            echo >m/small$n
            ! dd if=/dev/zero of=m/big$n bs=64k count=400 2>/dev/null || echo unbounded
            graphdriver umount c
        done
        graphdriver mount c m >/dev/null
        rm m/big1; echo >m/small
        graphdriver umount c
        du -sm $D/[0-9]*/diff | sort -n | tail -1 | cut -f1";
    each(NAME, script, |on, said| {
        assert!(said.trim().parse::<u32>().is_ok_and(|mib| mib <= 10), "{on}: {said}");
    });
}

#[test]
fn containers_that_go_or_are_damaged_do_not_keep_the_others_from_being_listed() {
    const NAME: &str = "containers_that_go_or_are_damaged_do_not_keep_the_others_from_being_listed";
    if skipped(NAME, no_root()) {
        return;
    }
    let home = Home::with_container();
    // The newest comes first, and counting its files takes until the others are gone.
    home.ok("mkdir m; for n in 1 2 3 4 large; do graphdriver create --name x$n demo; done >/dev/null
        graphdriver mount xlarge m >/dev/null; (cd m; seq 20000 | xargs touch); graphdriver umount xlarge
        for n in 1 2 3 4; do
            graphdriver quota >/dev/null & sleep 0.0$n; graphdriver rm x$n >/dev/null; wait $!
        done");
    home.ok("graphdriver create --name damaged demo; graphdriver create --name last demo
        rm -r root/overlay2/data/$(ls root/overlay2/data | grep -xE '[0-9]+' | sort -n | tail -2 | head -1)");
    for format in ["table", "json"] {
        let listed = home.fails(3, &format!("graphdriver --format {format} quota"), &["container damaged"]);
        assert!(listed.contains("last") && listed.contains('c') && !listed.contains("damaged"), "{listed}");
    }
    home.fails(3, "graphdriver quota damaged", &["container damaged"]);
}

#[test]
fn the_default_size_is_for_containers_and_what_is_removed_leaves_nothing() {
    const NAME: &str = "the_default_size_is_for_containers_and_what_is_removed_leaves_nothing";
    let script = "
        export GRAPHDRIVER_STORAGE_OPTS=$GRAPHDRIVER_STORAGE_DRIVER.size=30M,$GRAPHDRIVER_STORAGE_DRIVER.quota_projects=500-600
        graphdriver load -qi both.tar >/dev/null
        graphdriver create --name a demo >/dev/null
        graphdriver create --name b --storage-opt size=40M demo >/dev/null
        graphdriver --format json quota a b | grep -E SizeLimit | tr -d ' ,\\n'; echo
        grep -cE '^(5[0-9][0-9]|600) [0-9]+ [0-9]+ - ready$' $D/projects
        graphdriver rm a b >/dev/null
        wc -l < $D/projects
        unset GRAPHDRIVER_STORAGE_OPTS
        graphdriver create --name d demo >/dev/null
        wc -l < $D/projects";
    each(NAME, script, |on, said| {
        let lines: Vec<_> = said.lines().collect();
        assert_eq!(lines, ["\"SizeLimit\":31457280\"SizeLimit\":41943040", "2", "2", "2"], "{on}");
    });
}

#[test]
fn drivers_and_info_tell_of_limits() {
    const NAME: &str = "drivers_and_info_tell_of_limits";
    each(NAME, "graphdriver info | grep -E '^ Limits|^Quota'", |on, said| {
        assert_eq!(said, " Limits: project quotas\nQuota: yes\n", "{on}");
    });
    if skipped(NAME, no_root()) {
        return;
    }
    let status = Command::new("df").args(["-t", "tmpfs", "/dev/shm"]).status().unwrap();
    assert!(status.success(), "/dev/shm is a tmpfs");
    let home = Home::new();
    let told = home.ok("export GRAPHDRIVER_DATA_ROOT=$(mktemp -d -p /dev/shm); trap 'rm -r $GRAPHDRIVER_DATA_ROOT' EXIT; graphdriver info");
    assert!(told.contains(" Limits: no project quotas on tmpfs") && told.contains("Quota: no"), "{told}");
}
