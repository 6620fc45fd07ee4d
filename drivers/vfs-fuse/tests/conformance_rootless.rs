//! The suite for a user without any privilege, as root of a user namespace.

use graphdriver_core::{
    Options,
    conformance::{self, BackingKind, Missing, Setup},
};
use std::{
    ffi::{OsStr, OsString},
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, ExitCode},
};

const NAME: &str = "vfs_fuse::rootless";

/// What the kernel does otherwise here.
const NOT_HERE: [(&str, &str); 1] =
    [("a_layer_that_came_as_a_tar_goes_out_as_the_same_bytes", "its tars name owners, and only one is mapped")];

/// Where the program is, for the suite inside the namespace.
const PROGRAM: &str = "VFS_FUSE_TEST_PROGRAM";

fn main() -> ExitCode {
    if let Some(program) = std::env::var_os(PROGRAM) {
        let program = program.into_string().expect("a path below the temporary directory");
        let setup = |name: &str, copy_up: &str| {
            let options = [("vfs-fuse.mount_program", program.as_str()), ("vfs-fuse.copy_up", copy_up)];
            let options = Options(options.map(|(name, value)| (name.into(), value.into())).into());
            let setup = Setup::driver_with(name, graphdriver_vfs_fuse::FACTORY, BackingKind::Tmpfs, options, None);
            NOT_HERE.into_iter().fold(setup, |setup, (case, why)| setup.without(case, why))
        };
        return conformance::main(vec![setup(NAME, "auto"), setup("vfs_fuse::rootless::extents", "extent")]);
    }
    let tmp = tempfile::tempdir().expect("a temporary directory");
    fs::set_permissions(tmp.path(), Permissions::from_mode(0o777)).expect("its owner may");
    let tried = unprivileged(tmp.path(), OsStr::new("true")).output();
    let missing = match &tried {
        Ok(out) if out.status.success() => None,
        Ok(out) => Some(String::from_utf8_lossy(&out.stderr).trim().to_owned()),
        Err(e) => Some(e.to_string()),
    };
    if let Some(what) = missing {
        let missing = Missing {
            what: format!("no user namespace can be made: {what}"),
            remedy: "util-linux; sysctl kernel.unprivileged_userns_clone=1, user.max_user_namespaces".into(),
            excluded: false,
        };
        return conformance::main(vec![Setup::new(NAME, move || Err(missing.clone()))]);
    }
    // The build directory may be closed to others.
    let [suite, program] = ["suite", "vfs-fuse"].map(|name| tmp.path().join(name));
    fs::copy(std::env::current_exe().expect("running from a file"), &suite).expect("a copy of this program");
    fs::copy(Path::new(env!("CARGO_BIN_EXE_vfs-fuse")), &program).expect("a copy of vfs-fuse");
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let status = unprivileged(tmp.path(), suite.as_os_str())
        .args(arguments)
        .envs([(PROGRAM, program.as_os_str()), ("TMPDIR", tmp.path().as_os_str())])
        .status()
        .expect("it ran a moment ago");
    if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Where udev has not been, only root may open /dev/fuse. A node of its own hides it in this mount namespace.
const OPEN_DEVICE: &str = "mkdir -p \"$0/dev\"; mount -t tmpfs -o mode=755 none \"$0/dev\"
    mknod -m 666 \"$0/dev/fuse\" c 10 229; mount --bind \"$0/dev/fuse\" /dev/fuse; exec \"$@\"";

/// The program as root of a user namespace that only the one user is mapped to.
fn unprivileged(tmp: &Path, program: &OsStr) -> Command {
    let unshare = ["unshare", "--map-root-user", "--mount"];
    let mut command = Command::new("unshare");
    if rustix::process::geteuid().is_root() {
        command.args(["--mount", "--propagation", "private", "sh", "-ec", OPEN_DEVICE]).arg(tmp);
        command.args(["setpriv", "--reuid=1000", "--regid=1000", "--clear-groups"]).args(unshare);
    } else {
        command.args(&unshare[1..]);
    }
    command.arg(program);
    command
}
