//! The suite for a user without any privilege, as root of a user namespace.

use graphdriver_core::conformance::{self, BackingKind, Missing, Setup};
use std::{
    ffi::{OsStr, OsString},
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt,
    process::{Command, ExitCode},
};

const NAME: &str = "overlay2::rootless";

/// What the kernel does otherwise here. Without privilege over the backing filesystem overlayfs cannot keep the origin of
/// a copied-up file (`user.overlay.origin` stays empty), so the names of a lower file that is linked and changed show
/// different inode numbers as long as it is mounted, although their content is one.
const NOT_HERE: [(&str, &str); 5] = [
    ("odd_names_are_names_like_others", TWO_NUMBERS),
    ("hard_links_of_lower_files_are_linked_changed_and_removed", TWO_NUMBERS),
    ("the_last_of_several_names_is_a_file_like_others", TWO_NUMBERS),
    ("random_operations_equal_the_model", "links lower files too, and set-user-ID bits go with a write"),
    ("a_layer_that_came_as_a_tar_goes_out_as_the_same_bytes", "its tars name owners, and only one is mapped"),
];

const TWO_NUMBERS: &str = "links a lower file, whose inode numbers differ until it is mounted again";

const INSIDE: &str = "OVERLAY2_TEST_INSIDE";

fn main() -> ExitCode {
    if std::env::var_os(INSIDE).is_some() {
        let factory = graphdriver_overlay2::FACTORY;
        let setup = Setup::driver_with(NAME, factory, BackingKind::Tmpfs, Default::default(), None);
        return conformance::main(vec![
            NOT_HERE.into_iter().fold(setup, |setup, (case, why)| setup.without(case, why)),
        ]);
    }
    let tried = unprivileged(OsStr::new("true")).output();
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
    let tmp = tempfile::tempdir().expect("a temporary directory");
    fs::set_permissions(tmp.path(), Permissions::from_mode(0o777)).expect("its owner may");
    // The build directory may be closed to others.
    let exe = tmp.path().join("suite");
    fs::copy(std::env::current_exe().expect("running from a file"), &exe).expect("a copy of this program");
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let status = unprivileged(exe.as_os_str())
        .args(arguments)
        .envs([(INSIDE, "1".as_ref()), ("TMPDIR", tmp.path().as_os_str())])
        .status()
        .expect("it ran a moment ago");
    if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The program as root of a user namespace that only the one user is mapped to.
fn unprivileged(program: &OsStr) -> Command {
    let unshare = ["unshare", "--map-root-user", "--mount"];
    let as_nobody = ["setpriv", "--reuid=1000", "--regid=1000", "--clear-groups"];
    let words = if rustix::process::geteuid().is_root() { [&as_nobody[..], &unshare].concat() } else { unshare.into() };
    let mut command = Command::new(words[0]);
    command.args(&words[1..]).arg(program);
    command
}
