//! The program itself: what it says to wrong calls, and how it starts and ends.

#[path = "../../../tests/skip/mod.rs"]
mod skip;

use std::{
    fs::File,
    os::unix::fs::symlink,
    process::{Command, Output, Stdio},
};
use tempfile::TempDir;

/// Directories for layers, and a shell in namespaces of its own: mounts and processes vanish with it.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("opts-").tempdir_in("/var/tmp").unwrap();
        for name in ["lower/in", "upper", "work", "m"] {
            std::fs::create_dir_all(dir.path().join(name)).unwrap();
        }
        symlink(env!("CARGO_BIN_EXE_vfs-fuse"), dir.path().join("vfs-fuse")).unwrap();
        Place(dir)
    }

    fn shell(&self, script: &str) -> Output {
        let mut command = Command::new("unshare");
        if !rustix::process::geteuid().is_root() {
            command.args(["--user", "--map-root-user"]);
        }
        command.args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-uc"]);
        let path = format!("{}:{}", self.0.path().display(), std::env::var("PATH").unwrap_or_default());
        command.arg(format!("{HELPERS}\n{script}")).env("PATH", path).current_dir(self.0.path());
        command.stdin(Stdio::null()).output().expect("unshare runs")
    }

    /// Runs the program with these arguments; it must fail, say this and leave nothing mounted.
    #[track_caller]
    fn refused(&self, arguments: &str, says: &[&str]) {
        let out = self.shell(&format!("vfs-fuse {arguments}; echo rc=$?; mounted"));
        let (stdout, stderr) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
        assert_eq!(stdout, "rc=1\n", "{arguments}: {stderr}");
        assert!(stderr.starts_with("vfs-fuse: "), "{arguments}: {stderr}");
        for word in says {
            assert!(stderr.contains(word), "{arguments}: {stderr}");
        }
    }

    /// Runs the script, which ends at its first failure; returns what it printed.
    #[track_caller]
    fn passes(&self, script: &str) -> String {
        let out = self.shell(&format!("set -e\n{script}"));
        let (stdout, stderr) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
        assert!(out.status.success(), "{script}\n{stdout}{stderr}");
        stdout.into_owned()
    }
}

const HELPERS: &str = r#"
L=lowerdir=lower,upperdir=upper,workdir=work
mounted() { grep " $PWD/m " /proc/self/mountinfo; }
# `set -e` does not look at what `!` says.
not() { if "$@"; then echo "unexpected: $*" >&2; return 1; fi; }
daemon() { pgrep -x vfs-fuse; }
# Until the command fails, at most 10 s.
until_not() { for i in $(seq 100); do "$@" >/dev/null || return 0; sleep 0.1; done; echo "still: $*" >&2; return 1; }
"#;

macro_rules! need {
    ($test:literal $(, $program:literal)*) => {
        let fuse = File::options().read(true).write(true).open("/dev/fuse");
        if skip::skipped($test, fuse.err().map(|e| format!("needs /dev/fuse: {e}")).or_else(|| skip::no_program(&["unshare", "pgrep" $(, $program)*]))) {
            return;
        }
    };
}

#[test]
fn wrong_calls_are_refused() {
    need!("wrong_calls_are_refused");
    let place = Place::new();
    place.refused("", &["required arguments", "MOUNTPOINT", "Usage: vfs-fuse"]);
    place.refused("-x m", &["'-x'", "--help"]);
    place.refused("a b m", &["'m'"]);
    place.refused("-o", &["'-o <OPTIONS>'"]);
    place.refused("m", &["no lowerdir", "lowerdir=TOP:"]);
    place.refused("-o $L,foo=1 m", &["unknown option \"foo\"", "--help"]);
    place.refused("-o $L -o writeback=2 m", &["option writeback", "0 or 1"]);
    place.refused("-o $L,copy_up=some m", &["option copy_up", "auto, reflink, extent, full"]);
    place.refused("-o $L,uidmapping=0:1 m", &["option uidmapping", "DISK:SHOWN:COUNT"]);
    place.refused("-o $L,allow_other,allow_root m", &["allow_other and allow_root"]);
    place.refused("-o lowerdir=lower:none m", &["opening lower layer 2", "none", "No such file"]);
    place.refused("-o lowerdir=lower,upperdir=upper m", &["upperdir without workdir", "workdir=DIR"]);
    place.refused("-o lowerdir=lower,upperdir=upper,workdir=upper m", &["the same directory"]);
    place.refused("-o lowerdir=lower,upperdir=lower/in,workdir=work m", &["lies in lower layer"]);
    place.refused("-o $L none", &["looking at mountpoint none", "No such file"]);
    place.refused("-o $L vfs-fuse", &["looking at mountpoint vfs-fuse", "not a directory"]);
    place.refused("-o $L /dev/fd/77", &["taking /dev/fd/77", "Bad file descriptor"]);
    place.refused("-o $L /dev/fd/9 9</dev/null", &["taking /dev/fd/9", "not /dev/fuse"]);
    place.refused("--complete -o lowerdir=lower", &["--complete: no upperdir"]);
    place.refused("--complete -o $L m", &["--complete", "cannot be used with"]);
    place.refused("-f -o $L,timeout=soon m", &["option timeout", "seconds"]);
}

#[test]
fn layers_that_rename_cannot_connect_are_refused() {
    need!("layers_that_rename_cannot_connect_are_refused");
    let place = Place::new();
    let why = ["workdir", "different filesystems or mounts", "beside upperdir"];
    let out = place.shell("mount -t tmpfs t work && vfs-fuse -o $L m; echo rc=$?; mounted");
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(why.iter().all(|w| said.contains(w)) && out.stdout == b"rc=1\n", "{said}");
    // The same filesystem, but another mount: rename(2) says EXDEV.
    let out = place.shell("mount --bind work work && vfs-fuse -o $L m; echo rc=$?; mounted");
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(why.iter().all(|w| said.contains(w)) && out.stdout == b"rc=1\n", "{said}");
    // A lower layer by another path.
    let out = place.shell("mkdir bound && mount --bind upper bound && vfs-fuse -o lowerdir=bound,upperdir=upper,workdir=work m; echo rc=$?");
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(said.contains("lies in lower layer") && out.stdout == b"rc=1\n", "{said}");
}

#[test]
fn help_and_version() {
    let run = |argument| Command::new(env!("CARGO_BIN_EXE_vfs-fuse")).arg(argument).output().unwrap();
    for argument in ["-h", "--help"] {
        let out = run(argument);
        let text = String::from_utf8(out.stdout).unwrap();
        assert!(
            out.status.success() && text.contains("[SOURCE] MOUNTPOINT") && text.contains("lowerdir=TOP"),
            "{text}"
        );
    }
    for argument in ["-V", "--version"] {
        let out = run(argument);
        assert!(out.status.success());
        assert_eq!(String::from_utf8(out.stdout).unwrap(), concat!("vfs-fuse ", env!("CARGO_PKG_VERSION"), "\n"));
    }
}

#[test]
fn the_daemon_is_on_its_own_and_ends_at_umount() {
    need!("the_daemon_is_on_its_own_and_ends_at_umount");
    let said = Place::new().passes(
        "ulimit -Sn 64
        vfs-fuse -o $L,fsname=some m
        stat -c %F m
        mounted | grep -c -- ' - fuse.vfs-fuse some '
        pid=$(daemon)
        readlink /proc/$pid/cwd /proc/$pid/fd/0 /proc/$pid/fd/1 /proc/$pid/fd/2
        [ $(ps -o sid= -p $pid) = $pid ] && echo session
        [ $(prlimit -p $pid -n -o SOFT --noheadings) = $(ulimit -Hn) ] && echo files
        umount m
        until_not daemon",
    );
    let expected = "directory\n1\n/\n/dev/null\n/dev/null\n/dev/null\nsession\nfiles\n";
    assert_eq!(said, expected);
}

#[test]
fn signals_unmount_and_end() {
    need!("signals_unmount_and_end");
    let place = Place::new();
    for signal in ["TERM", "INT", "HUP"] {
        place.passes(&format!("vfs-fuse -o $L m; kill -{signal} $(daemon); until_not daemon; not mounted"));
        place.passes(&format!(
            "vfs-fuse -f -o $L m & until_not sh -c '! mountpoint -q m'; kill -{signal} $!; wait $!; not mounted"
        ));
    }
}

#[test]
fn a_mount_in_use_ends_too() {
    need!("a_mount_in_use_ends_too");
    // Nothing may be left that hangs or says ENOTCONN under the mountpoint's name.
    let script =
        "vfs-fuse -o $L m; (cd m && exec sleep 30) & sleep 0.5; kill $(daemon); until_not daemon; not mounted; ls m";
    assert_eq!(Place::new().passes(script), "");
}

#[test]
fn an_upper_layer_has_one_user() {
    need!("an_upper_layer_has_one_user");
    let place = Place::new();
    for second in ["-o lowerdir=lower,upperdir=upper,workdir=other n", "--complete -o $L"] {
        let out = place.shell(&format!("mkdir -p n other; vfs-fuse -o $L m; vfs-fuse {second}; echo rc=$?; umount m"));
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(said.contains("a vfs-fuse has "), "{said}");
        assert_eq!(out.stdout, b"rc=1\n");
    }
    // A daemon that is about to end is waited for.
    place.passes("mkdir -p n; for i in 1 2 3 4 5; do vfs-fuse -o $L m; umount m; done; until_not daemon");
    place.passes(
        "vfs-fuse -o $L m; (cd m && exec sleep 2) & sleep 0.5; umount -l m; vfs-fuse -o $L m; stat m; umount m",
    );
}

#[test]
fn a_killed_daemon_is_named_at_the_next_mount() {
    need!("a_killed_daemon_is_named_at_the_next_mount");
    let place = Place::new();
    let out = place.shell("vfs-fuse -o $L m; kill -KILL $(daemon); until_not daemon; vfs-fuse -o $L m; echo rc=$?");
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(said.contains("looking at mountpoint m") && said.contains("umount first"), "{said}");
    assert_eq!(out.stdout, b"rc=1\n");
    place.passes(
        "vfs-fuse -o $L m; kill -KILL $(daemon); until_not daemon; umount m; vfs-fuse -o $L m; stat m; umount m",
    );
}

#[test]
fn debug_stays_in_the_foreground() {
    need!("debug_stays_in_the_foreground", "mountpoint");
    for options in ["-d -o $L", "-o $L,debug"] {
        let script = format!(
            "vfs-fuse {options} m 2>log & until_not sh -c '! mountpoint -q m'; kill -TERM $!; wait $!; grep -c DEBUG log"
        );
        let lines: u32 = Place::new().passes(&script).trim().parse().unwrap();
        assert!(lines > 0);
    }
}

#[test]
fn mount_and_fstab_call_it() {
    need!("mount_and_fstab_call_it", "mount.fuse3");
    let place = Place::new();
    // mount(8) and mount.fuse3 look for programs in places of their own.
    let mount = "mount -t tmpfs t /usr/local/bin; ln -s $(readlink vfs-fuse) /usr/local/bin; mount -t fuse.vfs-fuse source m -o";
    let fstab = "noatime,_netdev,x-systemd.automount,noauto,users,exec,suid,dev";
    let said = place.passes(&format!("{mount} $L,{fstab}; mounted; umount m; until_not daemon"));
    assert!(said.contains(" - fuse.vfs-fuse source "), "{said}");
    assert!(said.contains("noatime") && !said.contains("nosuid") && !said.contains("nodev"), "{said}");
    // mount.fuse3 mounts itself and gives /dev/fd/N.
    let said = place.passes(&format!(
        "{mount} lowerdir=lower,drop_privileges,allow_other; stat -c %F m; umount m; until_not daemon"
    ));
    assert_eq!(said, "directory\n");
    let out = place.shell(&format!("{mount} $L,foo; echo rc=$?; mounted"));
    assert!(String::from_utf8_lossy(&out.stderr).contains("unknown option \"foo\""));
    assert_eq!(out.stdout, b"rc=1\n");
}

#[test]
fn read_only_without_an_upper_layer() {
    need!("read_only_without_an_upper_layer");
    let said = Place::new().passes("vfs-fuse -o lowerdir=lower m; mounted; not mkdir m/new 2>&1; umount m");
    assert!(said.contains(" ro,"), "{said}");
}

#[test]
fn owners_are_mapped_and_squashed() {
    need!("owners_are_mapped_and_squashed", "setpriv");
    if skip::skipped("owners_are_mapped_and_squashed", not_root()) {
        return;
    }
    let place = Place::new();
    let said = place.passes(
        "touch lower/a lower/b; chown 5:5 lower/b
        vfs-fuse -o $L,uidmapping=0:1000:1,gidmapping=0:2000:1 m
        stat -c %u:%g m/a m/b
        not chown 7 m/a 2>&1
        setpriv --reuid 1000 --regid 2000 --clear-groups touch m/in/../a
        stat -c %u:%g upper/a
        umount m",
    );
    let expected = "1000:2000\n65534:65534\nchown: changing ownership of 'm/a': Invalid argument\n0:0\n";
    assert_eq!(said, expected);
    let said = place.passes(
        "vfs-fuse -o $L,squash_to_uid=9,squash_to_root m
        chown 7:8 m/b; chmod 600 m/b; stat -c %u:%g:%a m/b upper/b
        umount m",
    );
    assert_eq!(said, "9:0:600\n7:8:600\n");
}

#[test]
fn owners_are_kept_in_xattrs() {
    need!("owners_are_kept_in_xattrs", "getfattr");
    if skip::skipped("owners_are_kept_in_xattrs", not_root()) {
        return;
    }
    for (mode, name, device) in
        [("1", "security.fuseoverlayfs.override_stat", "0:0:660"), ("2", "user.containers.override_stat", "0:0:755")]
    {
        let place = Place::new();
        let said = place.passes(&format!(
            "touch lower/a; ln -s a lower/link
            vfs-fuse -o $L,xattr_permissions={mode} m
            chown 7:8 m/a; chmod 4640 m/a; mknod -m 660 m/null c 1 3; chown -h 3:4 m/link
            stat -c %u:%g:%a m/a; stat -c %u:%g:%a:%t:%T m/null; stat -c %u:%g m/link
            stat -c %u:%g:%a upper/a upper/null
            getfattr --only-values -n {name} upper/a; echo
            not getfattr -n {name} m/a 2>/dev/null; not setfattr -n {name} -v 0:0:4777:file m/a 2>/dev/null
            umount m
            vfs-fuse -o lowerdir=upper:lower m; stat -c %u:%g:%a:%t:%T m/a m/null; umount m",
        ));
        let shown = "7:8:4640\n0:0:660:1:3\n3:4\n";
        let expected = format!("{shown}0:0:755\n{device}\n7:8:4640:file\n7:8:4640:0:0\n0:0:660:1:3\n");
        assert_eq!(said, expected, "xattr_permissions={mode}");
    }
}

/// Files can be given to anybody only where all ids are there.
fn not_root() -> Option<String> {
    (!rustix::process::geteuid().is_root()).then(|| "needs root".into())
}
