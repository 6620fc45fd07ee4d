//! Layers of every number, name, filesystem and state that users have.

mod common;
mod disk;

use common::{Layers, cannot_mount, no_program, skipped};
use disk::{assert_same, push, seen, sh, snapshot, timeless};
use graphdriver_core::conformance::{Backing, BackingKind};
use std::{
    collections::HashSet,
    ffi::OsStr,
    fs,
    io::ErrorKind,
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::{MetadataExt, PermissionsExt},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

macro_rules! needs {
    ($test:literal $(, $program:literal)*) => {
        if skipped($test, cannot_mount().or_else(|| no_program(&["bash", "setfattr", $($program),*]))) {
            return;
        }
    };
}

/// So many lowers, each with a file of its own and its number in files that all have.
fn stack(lowers: usize) -> Layers {
    let layers = Layers::new(lowers);
    for (n, layer) in layers.lowers.iter().enumerate() {
        let height = lowers - n;
        fs::create_dir(layer.join("d")).unwrap();
        fs::write(layer.join(format!("d/{height}")), height.to_string()).unwrap();
        fs::write(layer.join("d/top"), height.to_string()).unwrap();
        fs::write(layer.join(format!("own-{height}")), height.to_string()).unwrap();
    }
    layers
}

#[test]
fn up_to_500_lowers_are_mounted() {
    needs!("up_to_500_lowers_are_mounted");
    for lowers in [1, 2, 128, 499, 500] {
        let mut layers = stack(lowers);
        let mounted = layers.mount(&[]);
        let names = |dir: &str| fs::read_dir(mounted.path().join(dir)).unwrap().count();
        assert_eq!((names("d"), names("")), (lowers + 1, lowers + 1), "{lowers} lowers");
        for height in [1, lowers / 2 + 1, lowers] {
            let read = |name: String| fs::read_to_string(mounted.path().join(name)).unwrap();
            assert_eq!(
                (read(format!("d/{height}")), read(format!("own-{height}"))),
                (height.to_string(), height.to_string())
            );
        }
        assert_eq!(fs::read_to_string(mounted.path().join("d/top")).unwrap(), lowers.to_string());
        // The bottom's file is changed and the top's deleted.
        sh(mounted.path(), &format!("echo changed > d/1; rm own-{lowers}; mv d e; mkdir d; echo new > d/new"));
        let expected = snapshot(mounted.path());
        mounted.unmount();
        assert_same("mounted again", &expected, &seen(layers.mount(&[])));
        if lowers < 500 {
            layers = push(layers);
            assert_eq!(fs::read_to_string(layers.mount_read_only(&[]).path().join("e/1")).unwrap(), "changed\n");
        }
    }
}

#[test]
fn more_than_500_lowers_are_refused() {
    needs!("more_than_500_lowers_are_refused");
    let said = refusal(&stack(501), None);
    assert!(said.contains("501") && said.contains("500"), "{said}");
}

/// What the program says when it refuses these layers, or exactly these options.
#[track_caller]
fn refusal(layers: &Layers, options: Option<&str>) -> String {
    let options = options.map_or_else(|| layers.options(&[]), str::to_owned);
    match layers.try_mount(&options) {
        Ok(mounted) => panic!("{options} was mounted: {}", mounted.said()),
        Err(said) => {
            assert!(!said.contains("panicked") && said.contains("exit status"), "no clear refusal: {said}");
            said
        }
    }
}

/// As overlayfs reads them: a backslash before what separates.
fn escaped(path: &Path) -> std::ffi::OsString {
    let bytes = path.as_os_str().as_bytes().iter();
    std::ffi::OsString::from_vec(
        bytes.flat_map(|b| if b":,\\".contains(b) { vec![b'\\', *b] } else { vec![*b] }).collect(),
    )
}

#[test]
fn separators_in_the_paths_of_layers_are_escaped() {
    needs!("separators_in_the_paths_of_layers_are_escaped");
    let odd: [&[u8]; 9] = [
        b"co:lon",
        b"com,ma",
        b"back\\slash",
        b"spa ce",
        b"new\nline",
        b"\xff\xfe",
        b"equals=sign",
        b"tail\\",
        b":,\\ all\n",
    ];
    for name in odd {
        let layers = Layers::new(1);
        let at = |kind: &[u8]| layers.dir().join(OsStr::from_bytes(&[name, kind].concat()));
        let made: Vec<PathBuf> = [&b"-l1"[..], b"-l2", b"-u", b"-w", b"-m"].iter().map(|kind| at(kind)).collect();
        made.iter().for_each(|path| fs::create_dir(path).unwrap());
        fs::write(made[0].join("one"), "1").unwrap();
        fs::write(made[1].join("two"), "2").unwrap();
        let [l1, l2, upper, work] = [0, 1, 2, 3].map(|n| escaped(&made[n]));
        let words = [
            &b"lowerdir="[..],
            l1.as_bytes(),
            b":",
            l2.as_bytes(),
            b",upperdir=",
            upper.as_bytes(),
            b",workdir=",
            work.as_bytes(),
        ];
        let options = std::ffi::OsString::from_vec(words.concat());
        let mut daemon = Command::new("setpriv")
            .args(["--pdeathsig", "KILL"])
            .arg(common::program())
            .args([OsStr::new("-f"), OsStr::new("-o"), &options])
            .arg(&made[4])
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        common::eventually(&format!("{name:?} is mounted"), Duration::from_secs(10), || {
            assert!(daemon.try_wait().unwrap().is_none(), "{options:?} was refused");
            made[4].join("one").exists()
        });
        assert_eq!(fs::read_to_string(made[4].join("two")).unwrap(), "2");
        fs::write(made[4].join("three"), "3").unwrap();
        assert_eq!(fs::read_to_string(made[2].join("three")).unwrap(), "3");
        assert!(Command::new("umount").arg(&made[4]).status().unwrap().success());
        assert!(daemon.wait().unwrap().success());
    }
}

/// Makes a read-only filesystem of this kind with what is in `source` and mounts it at `target`.
fn mount_image(kind: &str, source: &Path, image: &Path, target: &Path) {
    fs::create_dir_all(target).unwrap();
    let (source, image, target) = (source.display(), image.display(), target.display());
    let make = match kind {
        "squashfs" => format!("mksquashfs {source} {image} -quiet -no-progress -no-xattrs > /dev/null"),
        "erofs" => format!("mkfs.erofs -x-1 {image} {source} > /dev/null"),
        "ext4" => format!("mkfs.ext4 -q -F -d {source} {image} 8M"),
        other => panic!("{other}"),
    };
    sh(Path::new("/"), &format!("{make}; mount -t {kind} -o loop,ro {image} {target}"));
}

#[test]
fn lowers_lie_on_different_filesystems_that_may_be_read_only() {
    needs!(
        "lowers_lie_on_different_filesystems_that_may_be_read_only",
        "mksquashfs",
        "mkfs.erofs",
        "mkfs.ext4",
        "mkfs.btrfs"
    );
    let mut layers = Layers::new(0);
    let kinds = ["squashfs", "erofs", "ext4", "tmpfs", "btrfs"];
    let btrfs = Backing::new(BackingKind::Btrfs, 256 << 20).unwrap();
    for (n, kind) in kinds.into_iter().enumerate() {
        let source = layers.dir().join(format!("source-{kind}"));
        fs::create_dir(&source).unwrap();
        sh(
            &source,
            &format!("mkdir -p d/sub {kind}; echo {kind} > d/{kind}; echo {kind} > d/common; echo {kind} > d/sub/{n}; echo {kind} > {kind}/f
                      ln {kind}/f {kind}/hard; ln -s f {kind}/symlink; seq 100000 > {kind}/big; chown 3:4 {kind}/f; chmod 6755 {kind}/big"),
        );
        let target = match kind {
            "btrfs" => btrfs.path().join("lower"),
            _ => layers.dir().join(kind),
        };
        match kind {
            "tmpfs" => drop(sh(layers.dir(), "mkdir tmpfs; mount -t tmpfs none tmpfs; cp -a source-tmpfs/. tmpfs")),
            "btrfs" => drop(sh(layers.dir(), &format!("cp -a source-btrfs {}", target.display()))),
            kind => mount_image(kind, &source, &layers.dir().join(format!("{kind}.img")), &target),
        }
        layers.lowers.push(target);
    }
    let change = "echo more >> squashfs/f; rm erofs/f; chown -R 7:8 ext4; mv btrfs moved; echo x > tmpfs/big; rm -r d/sub; mkdir d/sub";
    // A rename of a merged directory whose lowers lie on different filesystems.
    let more = "mv d d2; ln moved/big moved/big3; setfattr -n user.x -v y squashfs/big";
    let run = |layers: &Layers, mount: &dyn Fn() -> common::Mounted| {
        sh(layers.dir(), "rm -r upper work; mkdir upper work; touch -d @0 upper");
        let mounted = mount();
        let before = snapshot(mounted.path());
        let numbers = inodes_and_devices(mounted.path());
        sh(mounted.path(), &format!("{change}; {more}"));
        let after = timeless(snapshot(mounted.path()));
        mounted.unmount();
        let again = timeless(seen(mount()));
        assert_same("mounted again", &after, &again);
        (before, after, numbers)
    };
    let kernel = run(&layers, &|| layers.mount_kernel(&["redirect_dir=on", "metacopy=off", "index=off", "xino=on"]));
    let ours = run(&layers, &|| layers.mount(&[]));
    assert_same("before", &kernel.0, &ours.0);
    // The kernel has no room for the filesystem's number in the inode numbers of some.
    assert_eq!(ours.2, (kernel.2.0, 1), "as many different files, and all on one device");
    // The kernel with index=off breaks links of lower files, which we keep.
    let unlinked = |mut tree: graphdriver_core::model::Snapshot| {
        tree.retain(|path, _| {
            !["squashfs/f", "squashfs/hard", "ext4/f", "ext4/hard"].contains(&path.to_str().unwrap())
        });
        tree
    };
    assert_same("changed", &unlinked(kernel.1), &unlinked(ours.1.clone()));
    let names = |path: &str| ours.1[Path::new(path)].names.len();
    assert_eq!((names("squashfs/f"), names("ext4/f"), names("moved/big")), (2, 2, 2));
    sh(layers.dir(), "umount squashfs erofs ext4 tmpfs");
}

/// How many inodes a tree shows, and on how many devices.
fn inodes_and_devices(root: &Path) -> (usize, usize) {
    let all: Vec<_> = disk::paths(root).iter().map(|path| fs::symlink_metadata(path).unwrap()).collect();
    let inodes: HashSet<_> = all.iter().map(|meta| (meta.dev(), meta.ino())).collect();
    let devices: HashSet<_> = all.iter().map(|meta| meta.dev()).collect();
    (inodes.len(), devices.len())
}

#[test]
fn the_upper_lies_on_every_filesystem() {
    needs!("the_upper_lies_on_every_filesystem", "mkfs.ext4", "mkfs.xfs", "mkfs.btrfs", "setfacl");
    let script =
        "change; renames; fallocate -l 100000 fallocated; cp big2 copy 2>/dev/null || cp 'stay\\in,odd/big2' copy";
    let reference = disk::filled();
    let mounted = reference.mount_kernel(&["redirect_dir=on", "metacopy=off", "index=on"]);
    sh(mounted.path(), script);
    let expected = timeless(snapshot(mounted.path()));
    mounted.unmount();
    for kind in BackingKind::ALL {
        let backing = Backing::new(kind, 400 << 20).unwrap();
        for copy_up in ["auto", "reflink", "extent", "full"] {
            let option = format!("copy_up={copy_up}");
            // On the same filesystem as the lowers, and on another.
            let mut same = Layers::on(backing.path(), 2);
            sh(&same.lowers[1], "bottom");
            sh(&same.lowers[0], "middle");
            check_upper(&same, &option, script, &expected, &format!("{option}, all on {kind}"));
            let elsewhere = disk::filled();
            same = Layers::on(backing.path(), 0);
            same.lowers = elsewhere.lowers.clone();
            check_upper(&same, &option, script, &expected, &format!("{option}, upper on {kind}"));
        }
    }
}

fn check_upper(layers: &Layers, option: &str, script: &str, expected: &graphdriver_core::model::Snapshot, what: &str) {
    let mounted = layers.mount(&[option]);
    sh(mounted.path(), script);
    let live = snapshot(mounted.path());
    mounted.unmount();
    assert_same(&format!("{what}, mounted again"), &live, &seen(layers.mount(&[option])));
    assert_same(what, expected, &timeless(live));
}

/// What the daemon asks of the filesystems below does not grow with the layers: files that only the bottom has are read
/// as cheaply below 128 layers as below 2, once their directory is known.
#[test]
fn a_deep_stack_costs_no_more_per_access() {
    needs!("a_deep_stack_costs_no_more_per_access", "strace");
    const FILES: usize = 200;
    let calls = |lowers: usize| {
        let layers = Layers::new(lowers);
        let bottom = layers.lowers.last().unwrap().join("d");
        fs::create_dir(&bottom).unwrap();
        for n in 0..FILES {
            fs::write(bottom.join(format!("f{n}")), "x").unwrap();
        }
        let mounted = layers.mount(&[]);
        // The directory is known.
        fs::read_dir(mounted.path().join("d")).unwrap().count();
        let log = layers.dir().join("calls");
        let mut strace = Command::new("strace")
            .args([
                "-f",
                "-q",
                "-e",
                "trace=openat,openat2,newfstatat,statx,getxattr,lgetxattr,fgetxattr,readlinkat,getdents64,open,fstat",
            ])
            .args(["-p", &mounted.pid().to_string(), "-o"])
            .arg(&log)
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        common::eventually("strace is attached", Duration::from_secs(10), || {
            let status = fs::read_to_string(format!("/proc/{}/status", mounted.pid())).unwrap();
            status.lines().any(|line| line.starts_with("TracerPid:") && !line.ends_with("\t0"))
        });
        for n in 0..FILES {
            assert_eq!(fs::read(mounted.path().join(format!("d/f{n}"))).unwrap(), b"x");
        }
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(strace.id() as i32), nix::sys::signal::Signal::SIGINT)
            .unwrap();
        strace.wait().unwrap();
        mounted.unmount();
        fs::read_to_string(&log).unwrap().lines().count()
    };
    let (few, many) = (calls(2), calls(128));
    assert!(few >= FILES, "{few} calls were seen for {FILES} files: strace saw nothing");
    assert!(many <= few + few / 4 + 300, "{FILES} files cost {few} calls below 2 layers and {many} below 128");
}

#[test]
fn layers_that_make_no_sense_are_refused() {
    needs!("layers_that_make_no_sense_are_refused");
    let layers = Layers::new(1);
    let (lower, upper, work) = (layers.lowers[0].display(), layers.upper.display(), layers.work.display());
    let file = layers.dir().join("file");
    fs::write(&file, "").unwrap();
    let other = Backing::new(BackingKind::Tmpfs, 1 << 20).unwrap();
    let cases = [
        (format!("upperdir={upper},workdir={work}"), "lowerdir"),
        (format!("lowerdir=,upperdir={upper},workdir={work}"), "lowerdir"),
        (String::from("lowerdir="), "lowerdir"),
        (format!("lowerdir={lower}-not,upperdir={upper},workdir={work}"), "-not"),
        (format!("lowerdir={lower}:{lower}-not"), "-not"),
        (format!("lowerdir={}", file.display()), "file"),
        (format!("lowerdir={lower},upperdir={upper}"), "workdir"),
        (format!("lowerdir={lower},upperdir={upper}-not,workdir={work}"), "-not"),
        (format!("lowerdir={lower},upperdir={},workdir={work}", file.display()), "file"),
        (format!("lowerdir={lower},upperdir={upper},workdir={upper}"), "workdir"),
        (format!("lowerdir={lower},upperdir={upper},workdir={upper}/w"), "workdir"),
        (format!("lowerdir={lower},upperdir={lower},workdir={work}"), "upperdir"),
        (format!("lowerdir={lower},upperdir={upper},workdir={}", other.path().display()), "workdir"),
    ];
    for (options, says) in cases {
        let said = refusal(&layers, Some(&options));
        assert!(said.contains(says), "{options}: should say {says:?}: {said}");
    }
    layers.mount(&[]).unmount();
}

#[test]
fn a_mount_without_an_upper_is_read_only() {
    needs!("a_mount_without_an_upper_is_read_only");
    let layers = stack(3);
    let before = snapshot(&layers.lowers[1]);
    let mounted = layers.mount_read_only(&[]);
    let at = |name: &str| mounted.path().join(name);
    let failures = [
        fs::write(at("new"), "").err(),
        fs::write(at("d/1"), "").err(),
        fs::remove_file(at("d/1")).err(),
        fs::create_dir(at("dir")).err(),
        fs::rename(at("d"), at("e")).err(),
        fs::set_permissions(at("d/1"), fs::Permissions::from_mode(0o600)).err(),
        xattr::set(at("d/1"), "user.x", b"y").err(),
    ];
    for (n, failure) in failures.into_iter().enumerate() {
        assert_eq!(failure.map(|e| e.kind()), Some(ErrorKind::ReadOnlyFilesystem), "change {n}");
    }
    assert_eq!(fs::read_to_string(at("d/1")).unwrap(), "1");
    mounted.unmount();
    assert_same("nothing was written", &before, &snapshot(&layers.lowers[1]));
    assert_eq!(fs::read_dir(&layers.work).unwrap().count() + fs::read_dir(&layers.upper).unwrap().count(), 0);
}

/// Users delete layers in use. What is gone is an error, and nothing else is.
#[test]
fn a_lower_that_vanishes_is_an_error_not_a_crash() {
    needs!("a_lower_that_vanishes_is_an_error_not_a_crash");
    let layers = stack(3);
    let mounted = layers.mount(&[]);
    assert_eq!(fs::read_to_string(mounted.path().join("d/2")).unwrap(), "2");
    fs::remove_dir_all(&layers.lowers[1]).unwrap();
    for name in ["own-2", "d/2", "d", ""] {
        let path = mounted.path().join(name);
        let _ = fs::read(&path);
        let _ = fs::read_dir(&path).map(Iterator::count);
        let _ = fs::write(path.join("new"), "");
    }
    let _ = fs::write(mounted.path().join("own-2"), "2");
    // A directory that has lost one of its layers may be lost with it; what others have elsewhere is not.
    for height in [1, 3] {
        let own = mounted.path().join(format!("own-{height}"));
        assert_eq!(fs::read_to_string(&own).unwrap(), height.to_string());
        fs::write(&own, "changed").unwrap();
        assert_eq!(fs::read_to_string(&own).unwrap(), "changed");
    }
    mounted.unmount();
}

/// One upper has one writer. Whoever comes second is refused, also by another path, and may come when the first is gone.
#[test]
fn an_upper_is_mounted_once_at_a_time() {
    needs!("an_upper_is_mounted_once_at_a_time");
    let layers = stack(2);
    let mut second = Layers::new(0);
    second.lowers = layers.lowers.clone();
    (second.upper, second.work) = (layers.upper.clone(), layers.work.clone());
    let mounted = layers.mount(&[]);
    fs::write(mounted.path().join("d/1"), "first").unwrap();
    let said = refusal(&second, None);
    assert!(said.contains("use") || said.contains("busy") || said.contains("mounted"), "{said}");
    let link = layers.dir().join("link");
    std::os::unix::fs::symlink(layers.dir(), &link).unwrap();
    (second.upper, second.work) = (link.join("upper"), link.join("work"));
    refusal(&second, None);
    // To read the upper as a lower layer meanwhile is fine.
    assert_eq!(fs::read_to_string(mounted.path().join("d/1")).unwrap(), "first");
    mounted.unmount();
    let mut mounted = second.mount(&[]);
    assert_eq!(fs::read_to_string(mounted.path().join("d/1")).unwrap(), "first");
    // A daemon that was killed holds nothing back.
    mounted.kill();
    drop(mounted);
    layers.mount(&[]).unmount();
}

/// What a crash has left in the work directory, whoever left it, is gone with the next mount, and is no obstacle.
#[test]
fn a_dirty_work_directory_is_cleaned() {
    needs!("a_dirty_work_directory_is_cleaned");
    let layers = stack(2);
    let sentinel = layers.dir().join("sentinel");
    fs::create_dir(&sentinel).unwrap();
    fs::write(sentinel.join("f"), "outside").unwrap();
    // Our own directory of it, and the kernel's, which is the kernel's to clean.
    sh(
        &layers.work,
        "mkdir -p vfs-fuse/0 index work/1 vfs-fuse/deep/er 'odd name'; echo x > vfs-fuse/deep/er/f; echo x > file; echo x > vfs-fuse/2
         mknod work/#1 c 0 0; mknod vfs-fuse/#1 c 0 0; ln -s ../../sentinel vfs-fuse/link; ln -s ../sentinel link; ln -s /nowhere vfs-fuse/dangling
         chmod 000 vfs-fuse/deep; mkfifo vfs-fuse/fifo; echo x > vfs-fuse/$(printf 'n%.0s' {1..255})",
    );
    let mounted = layers.mount(&[]);
    sh(mounted.path(), "echo changed > d/1; rm own-2; mv d e; mkdir d");
    let left: Vec<_> = disk::paths(&layers.work.join("vfs-fuse"));
    assert!(left.len() <= 1 && !left.iter().any(|path| path.is_dir() || path.is_symlink()), "{left:?}");
    let expected = snapshot(mounted.path());
    mounted.unmount();
    assert_eq!(fs::read_to_string(sentinel.join("f")).unwrap(), "outside");
    assert_same("mounted again", &expected, &seen(layers.mount(&[])));
    // The kernel can go on with the same work directory, and we after it.
    let mounted = layers.mount_kernel(&["redirect_dir=on", "index=off"]);
    fs::write(mounted.path().join("e/2"), "by the kernel").unwrap();
    let expected = snapshot(mounted.path());
    mounted.unmount();
    assert_same("after the kernel", &expected, &seen(layers.mount(&[])));
}
