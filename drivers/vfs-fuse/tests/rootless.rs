//! Without privileges: as a user with fusermount3, as root of user namespaces with one id and with many, nested; with ids
//! mapped, squashed and kept in xattrs; and through mount(8).

mod common;
mod disk;

use common::{Layers, cannot_mount, no_program, program, skipped};
use std::{
    fs::{self, Permissions},
    os::unix::fs::{MetadataExt, PermissionsExt, chown},
    path::Path,
    process::{Command, Output, Stdio},
};

const USER: u32 = 1234;
/// The first of 65536 that the user may map.
const FIRST: u32 = 200_000;

macro_rules! needs {
    ($test:literal $(, $program:literal)*) => {
        if skipped($test, cannot_mount().or_else(|| no_program(&["bash", "unshare", "setfattr", $($program),*]))) {
            return;
        }
    };
}

/// Who mounts.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Who {
    /// Root of the machine.
    Root,
    /// A user, whom fusermount3 helps.
    User,
    /// That user as root of a user namespace which knows no other id.
    OneId,
    /// With subordinate ids, as podman has it.
    ManyIds,
    /// Root of a user namespace in that of a container.
    Nested,
}

impl Who {
    fn words(self) -> Vec<&'static str> {
        let user = ["setpriv", "--reuid=1234", "--regid=1234", "--clear-groups"];
        let one = ["unshare", "--user", "--map-root-user", "--mount"];
        let many = ["unshare", "--user", "--map-root-user", "--map-auto", "--mount"];
        let container = ["--pid", "--fork", "--kill-child", "--mount-proc"];
        match self {
            Who::Root => vec![],
            Who::User => user.to_vec(),
            Who::OneId => [&user[..], &one].concat(),
            Who::ManyIds => [&user[..], &many].concat(),
            Who::Nested => [&user[..], &many, &container, &one].concat(),
        }
    }
}

/// `up OPTIONS` mounts the layers at `$M`, `down` unmounts, `tell` prints what there is to see.
const FUNCTIONS: &str = r#"
umask 022
up() {
    "$P" -f -o "$O${1:+,$1}" "$M" & pid=$!
    for _ in $(seq 1000); do ! grep -q " $M fuse" /proc/self/mounts || return 0; kill -0 $pid; sleep 0.01; done
    exit 1
}
down() { cd /; $UMOUNT "$M"; wait $pid; }
trap 'cd /; $UMOUNT -l "$M" 2> /dev/null || fusermount3 -uz "$M" 2> /dev/null || true' EXIT
tell() {
    cd "$M"; find . -mindepth 1 -printf '%P %y %m %U:%G %l\n' | sort
    find . -type f -readable -print0 | sort -z | xargs -0r sha256sum; cd /
}
"#;

struct Rig {
    layers: Layers,
}

impl Rig {
    /// Layers of the user's, whose lower ones `fill` has filled; and a machine on which the user has subordinate ids and may
    /// open /dev/fuse.
    fn new(fill: &str) -> Rig {
        let layers = Layers::new(2);
        let dir = layers.dir();
        // The build directory may be closed to others. What another thread forks meanwhile would have a copy of ours open
        // for writing, with which nothing runs (ETXTBSY).
        let copied = std::process::Command::new("cp").arg(program()).arg(dir.join("vfs-fuse")).status().unwrap();
        assert!(copied.success());
        fs::set_permissions(dir.join("vfs-fuse"), Permissions::from_mode(0o755)).unwrap();
        disk::sh(
            dir,
            &format!(
                "mkdir etc; for f in passwd group; do cp /etc/$f etc/$f; done
                 echo 'vfsuser:x:{USER}:{USER}::{}:/bin/sh' >> etc/passwd; echo 'vfsuser:x:{USER}:' >> etc/group
                 echo vfsuser:{FIRST}:65536 > etc/subuid; cp etc/subuid etc/subgid
                 for f in passwd group subuid subgid; do [ -e /etc/$f ] || continue; mount --bind etc/$f /etc/$f; done
                 mkdir dev; mount -t tmpfs -o mode=755 none dev; mknod -m 666 dev/fuse c 10 229; mount --bind dev/fuse /dev/fuse",
                dir.display()
            ),
        );
        disk::sh(&layers.lowers[1], fill);
        for dir in [&layers.lowers[0], &layers.lowers[1], &layers.upper, &layers.work, &layers.merged] {
            disk::sh(
                dir,
                &format!(
                    "chown -h {USER}:{USER} . ; find . -user 0 -exec chown -h {USER} {{}} +; find . -group 0 -exec chgrp -h {USER} {{}} +"
                ),
            );
        }
        Rig { layers }
    }

    fn run(&self, who: Who, script: &str) -> Output {
        let script = format!("{FUNCTIONS}\n{script}");
        let words = [vec!["timeout", "-s", "KILL", "60"], who.words(), vec!["bash", "-euo", "pipefail", "-c", &script]]
            .concat();
        Command::new(words[0])
            .args(&words[1..])
            .current_dir("/")
            .env("P", self.layers.dir().join("vfs-fuse"))
            .env("O", self.layers.options(&[]))
            .env("M", &self.layers.merged)
            .env("UMOUNT", if who == Who::User { "fusermount3 -u" } else { "umount" })
            .env("LC_ALL", "C.UTF-8")
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    #[track_caller]
    fn ok(&self, who: Who, script: &str) -> String {
        let out = self.run(who, script);
        let (told, said) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
        assert!(out.status.success(), "{who:?}: {script}\nended with {}: {said}\n{told}", out.status);
        told.into_owned()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        for path in ["/etc/passwd", "/etc/group", "/etc/subuid", "/etc/subgid", "/dev/fuse"] {
            let _ = Command::new("umount").arg(path).stderr(Stdio::null()).status();
        }
        let _ = Command::new("umount").arg(self.layers.dir().join("dev")).status();
    }
}

const FILL: &str =
    "mkdir -p a/b gone/deep op many; for f in a/f a/b/f gone/deep/f op/f many/f many/g; do echo lower $f > $f; done
    seq 200000 > big; ln a/f a/hard; ln -s a/f link; chmod 700 a/b; chmod 4755 many/g; mkfifo fifo; echo d > dangling
    setfattr -n user.note -v n a/f; mkdir moved moved/in; echo m > moved/in/f";

/// Changes of all kinds that a user may make to what is his.
const CHANGE: &str = "cd $M; echo more >> a/f; rm -r gone op; mkdir op; echo new > op/new; rm many/f dangling; mkdir dangling
    chmod 640 a/b/f; echo x | dd of=big bs=1 seek=100000 conv=notrunc status=none; ln a/b/f a/linked; ln -s t new-link; mkfifo new-fifo
    setfattr -n user.note -v changed a/b; touch -d '2001-01-01 00:00:00.5' a/b; mv link link2; echo new > new; chmod 4711 new
    mkdir -m 2775 setgid; rm fifo; : > $(printf 'n%.0s' {1..255}); rm $(printf 'n%.0s' {1..255})";

fn mounts_writes_and_is_read(who: Who) {
    let rig = Rig::new(FILL);
    let script = format!("up; {CHANGE}; tell > $M/../seen; down; up; tell | diff $M/../seen -; down; cat $M/../seen");
    fs::set_permissions(rig.layers.dir(), Permissions::from_mode(0o777)).unwrap();
    let seen = rig.ok(who, &script);
    for line in ["a/b/f f 640", "a/linked f 640", "op/new f 644", "new f 4711", "new-link l 777", "setgid d 2775"] {
        assert!(seen.lines().any(|l| l.starts_with(line)), "{line} is not in\n{seen}");
    }
    for gone in ["gone", "op/f", "many/f", "fifo", "link ", "nnn"] {
        assert!(!seen.lines().any(|l| l.starts_with(gone)), "{gone} is in\n{seen}");
    }
    assert!(fs::read_to_string(rig.layers.lowers[1].join("a/f")).unwrap() == "lower a/f\n");
    // The machine's root sees the same through us; and the kernel's overlay, told to read such layers, does too.
    let ids = |text: &str| text.replace(" 0:0 ", " U ").replace(&format!(" {USER}:{USER} "), " U ");
    rig.ok(who, "\"$P\" --complete -o \"$O\"");
    assert_eq!(ids(&rig.ok(Who::Root, "up; tell; down")), ids(&seen), "root, by us");
    if !disk::paths(&rig.layers.upper).iter().any(|p| p.file_name().unwrap().to_str().unwrap().starts_with(".wh.")) {
        let mounted = rig.layers.mount_kernel(&["userxattr"]);
        assert_eq!(ids(&rig.ok(Who::Root, "trap - EXIT; tell")), ids(&seen), "root, by the kernel");
        mounted.unmount();
    }
}

#[test]
fn a_user_mounts_with_fusermount3() {
    needs!("a_user_mounts_with_fusermount3", "fusermount3");
    mounts_writes_and_is_read(Who::User);
}

#[test]
fn root_of_a_user_namespace_mounts() {
    needs!("root_of_a_user_namespace_mounts");
    mounts_writes_and_is_read(Who::OneId);
}

#[test]
fn root_of_a_user_namespace_with_many_ids_mounts() {
    needs!("root_of_a_user_namespace_with_many_ids_mounts", "newuidmap");
    mounts_writes_and_is_read(Who::ManyIds);
}

#[test]
fn root_of_a_namespace_in_a_namespace_mounts() {
    needs!("root_of_a_namespace_in_a_namespace_mounts", "newuidmap");
    mounts_writes_and_is_read(Who::Nested);
}

/// Directories of lower layers are renamed, and stay so for everybody who mounts with us.
#[test]
fn directories_are_renamed_without_privileges() {
    needs!("directories_are_renamed_without_privileges", "fusermount3");
    for who in [Who::User, Who::OneId] {
        let rig = Rig::new(FILL);
        fs::set_permissions(rig.layers.dir(), Permissions::from_mode(0o777)).unwrap();
        let script =
            "up; cd $M; mv moved m2; mv m2/in in2; echo new > in2/new; mv a z; mkdir a; tell > $M/../seen; down
            up; tell | diff $M/../seen -; down; cat $M/../seen";
        let seen = rig.ok(who, script);
        assert!(seen.contains("in2/f f 644") && seen.contains("z/b/f f 644") && !seen.contains("\nmoved"), "{seen}");
        let by_root = rig.ok(Who::Root, "up userxattr; tell; down");
        assert_eq!(by_root.lines().count(), seen.lines().count(), "{who:?}:\n{by_root}\n{seen}");
    }
}

/// A file of somebody else's stays closed, and others do not get into a user's mount at all.
#[test]
fn permissions_hold_without_privileges() {
    needs!("permissions_hold_without_privileges", "fusermount3");
    let rig = Rig::new(
        "echo secret > secret; chmod 600 secret; chown 99:99 secret; echo mine > mine; mkdir closed; echo x > closed/x; chmod 0 closed",
    );
    let said = rig.ok(
        Who::User,
        "up; cd $M; ! cat secret 2> /dev/null; ! chown 99 mine 2> /dev/null; ! rm closed/x 2> /dev/null; ! chmod 644 secret 2> /dev/null
         ! mknod dev c 1 3 2> /dev/null; cat mine; down",
    );
    assert_eq!(said, "mine\n");
    let mut mounted = rig.layers.mount(&[]);
    let others = |path: &Path| {
        Command::new("setpriv")
            .args(["--reuid=4321", "--regid=4321", "--clear-groups", "cat"])
            .arg(path)
            .output()
            .unwrap()
            .status
            .success()
    };
    assert!(others(&rig.layers.merged.join("mine")), "root's mount is everybody's");
    assert!(!others(&rig.layers.merged.join("secret")));
    mounted.kill();
}

/// All names of a lower file are copied up together, and no directory that nobody here may read is in the way of that.
#[test]
fn closed_directories_keep_no_hard_links_from_being_changed() {
    needs!("closed_directories_keep_no_hard_links_from_being_changed", "fusermount3");
    for who in [Who::User, Who::OneId] {
        let rig = Rig::new(
            "echo x > one; ln one two; ln one gone; mkdir priv; chown 99:99 priv; chmod 700 priv; echo y > priv/f",
        );
        let change = "up; cd $M; chmod 600 one; rm gone; echo more >> two; cat one; down";
        assert_eq!(rig.ok(who, change), "x\nmore\n");
        assert_eq!(rig.ok(who, "up; cd $M; cat one; stat -c %a.%h two; down"), "x\nmore\n600.2\n", "{who:?}");
    }
}

#[test]
fn many_ids_are_the_ids_of_the_namespace() {
    needs!("many_ids_are_the_ids_of_the_namespace", "newuidmap");
    let rig = Rig::new(&format!(
        "echo 1 > root; echo 2 > ten; chown {0}:{0} ten; echo 3 > stranger; chown 77:77 stranger; chmod 666 stranger",
        FIRST + 9
    ));
    let said = rig.ok(
        Who::ManyIds,
        "up; cd $M; stat -c '%n %u:%g' root ten stranger; chown 5:6 root; echo > made; chown -h 7:8 made; chown 0:0 ten; echo more >> stranger
         stat -c '%n %u:%g' root ten made; down; up; cd $M; stat -c '%n %u:%g' root ten made; down",
    );
    let changed = "root 5:6\nten 0:0\nmade 7:8\n";
    assert_eq!(said, format!("root 0:0\nten 10:10\nstranger 65534:65534\n{changed}{changed}"));
    let owner = |name: &str| fs::metadata(rig.layers.upper.join(name)).map(|m| (m.uid(), m.gid())).unwrap();
    assert_eq!(
        (owner("root"), owner("made"), owner("ten")),
        ((FIRST + 4, FIRST + 5), (FIRST + 6, FIRST + 7), (USER, USER))
    );
}

/// Owners and modes are in xattrs (the kernel lets nobody make devices in a user namespace): on disk all is the user's, as on a filesystem that allows nothing else.
#[test]
fn xattr_permissions_keep_what_the_user_may_not_set() {
    needs!("xattr_permissions_keep_what_the_user_may_not_set", "newuidmap");
    let rig = Rig::new("echo 1 > lower; mkdir dir; echo 2 > dir/f");
    fs::set_permissions(rig.layers.dir(), Permissions::from_mode(0o777)).unwrap();
    let seen = rig.ok(
        Who::ManyIds,
        "up xattr_permissions=2; cd $M; chown 12:34 lower; chmod 4711 lower; chown -R 5:6 dir; echo new > new; chown 7:8 new; chmod 0 new
         mkdir private; chmod 0 private; ln lower hard; mv dir dir2; ln -s x symlink; mkfifo fifo; chown 3:3 fifo
         tell > $M/../seen; down; up xattr_permissions=2; tell | diff $M/../seen -
         echo more >> $M/lower; stat -c '%n %a %u:%g' $M/lower | sed s,.*/,,; cat $M/new; rm -r $M/dir2; rmdir $M/private; down; cat $M/../seen",
    );
    for line in [
        "lower f 4711 12:34 ",
        "hard f 4711 12:34 ",
        "new f 0 7:8 ",
        "private d 0 0:0 ",
        "dir2 d 755 5:6 ",
        "dir2/f f 644 5:6 ",
        "fifo p 644 3:3 ",
    ] {
        assert!(seen.lines().any(|l| l == line || l == line.trim_end()), "{line:?} is not in\n{seen}");
    }
    let marks = disk::sh(&rig.layers.upper, "getfattr -n user.containers.override_stat --only-values lower");
    assert!(marks.starts_with("12:34:"), "{marks}");
    assert_eq!(fs::metadata(rig.layers.upper.join("lower")).unwrap().uid(), USER);
    // Through the mount the xattr is neither seen nor set.
    let said = rig.ok(
        Who::ManyIds,
        "up xattr_permissions=2; cd $M; getfattr -d -m - lower; ! setfattr -n user.containers.override_stat -v 0:0:0777 lower 2> /dev/null; stat -c %u lower; down",
    );
    assert_eq!(said, "12\n");
}

#[test]
fn ids_are_mapped_and_squashed_by_options() {
    needs!("ids_are_mapped_and_squashed_by_options");
    // (options, owner shown of the lower file of 100005:200006, owner on disk of what 5:6 is made to own)
    let cases = [
        ("uidmapping=100000:0:1000,gidmapping=200000:0:1000", "5:6", "100005:200006"),
        ("uidmapping=0:0:10:100000:1000:1000,gidmapping=0:0:10:200000:1000:1000", "1005:1006", "5:6"),
        ("squash_to_root", "0:0", ""),
        ("squash_to_uid=42", "42:200006", ""),
        ("squash_to_gid=43", "100005:43", ""),
        ("squash_to_uid=42,squash_to_gid=43", "42:43", ""),
    ];
    for (options, shown, on_disk) in cases {
        let layers = Layers::new(1);
        for path in [layers.lowers[0].join("f"), layers.lowers[0].join("g")] {
            fs::write(&path, "x").unwrap();
            chown(&path, Some(100_005), Some(200_006)).unwrap();
        }
        for dir in [&layers.lowers[0], &layers.upper] {
            chown(dir, Some(if options.starts_with("uidmapping=100000") { 100_000 } else { 0 }), None).unwrap();
        }
        let mounted = layers.mount(&[options]);
        let owner = |path: &Path| fs::symlink_metadata(path).map(|m| format!("{}:{}", m.uid(), m.gid())).unwrap();
        assert_eq!(owner(&mounted.path().join("f")), shown, "{options}");
        // A change of other things leaves the owner on disk.
        fs::set_permissions(mounted.path().join("g"), Permissions::from_mode(0o600)).unwrap();
        assert_eq!(owner(&layers.upper.join("g")), "100005:200006", "{options}");
        if !on_disk.is_empty() {
            fs::write(mounted.path().join("new"), "x").unwrap();
            chown(mounted.path().join("new"), Some(5), Some(6)).unwrap();
            assert_eq!(
                (owner(&mounted.path().join("new")), owner(&layers.upper.join("new"))),
                ("5:6".into(), on_disk.into()),
                "{options}"
            );
        }
        mounted.unmount();
    }
}

#[test]
fn mount_8_mounts_and_umount_8_ends_the_daemon() {
    needs!("mount_8_mounts_and_umount_8_ends_the_daemon", "mount.fuse3");
    let rig = Rig::new("echo 1 > f");
    let dir = rig.layers.dir().display();
    let said = rig.ok(
        Who::Root,
        // mount.fuse3 looks for programs in the usual places only.
        &format!(
            "mkdir {dir}/bin; cp $P {dir}/bin; mount --bind {dir}/bin /usr/local/bin; trap 'umount /usr/local/bin' EXIT
             mount -t fuse.vfs-fuse none $M -o \"$O\"; grep \" $M fuse\" /proc/self/mounts | cut -d ' ' -f 3; cat $M/f; echo 2 > $M/g; cat {dir}/upper/g
             pid=$(pgrep -f \"vfs-fuse none $M \"); umount $M; for _ in $(seq 500); do [ -e /proc/$pid ] || exit 0; sleep 0.01; done; exit 1"
        ),
    );
    assert_eq!(said, "fuse.vfs-fuse\n1\n2\n");
    // In the background by itself, mounted when the command returns; read-only by -o ro.
    let said = rig.ok(
        Who::Root,
        "\"$P\" -o \"$O,ro\" \"$M\" < /dev/null > /dev/null; cat $M/g; ! echo > $M/h 2> /dev/null; umount $M; \"$P\" \"$M\" -o \"$O\" > /dev/null; echo 3 > $M/h; umount $M",
    );
    assert_eq!(said, "2\n");
    assert_eq!(fs::read_to_string(rig.layers.upper.join("h")).unwrap(), "3\n");
}
