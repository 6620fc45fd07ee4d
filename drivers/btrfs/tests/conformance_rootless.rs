//! The suite for a user without any privilege, as root of a user namespace, on a filesystem whose mount lets users delete
//! subvolumes (`user_subvol_rm_allowed`) and on one that does not.

use graphdriver_btrfs::FACTORY;
use graphdriver_core::{
    GraphDriver, Result,
    conformance::{self, Backing, BackingKind, Missing, Setup, Subject},
};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use std::{
    ffi::{OsStr, OsString},
    fs::{self, Permissions},
    os::unix::fs::{PermissionsExt, chown},
    path::PathBuf,
    process::{Command, ExitCode},
    sync::atomic::{AtomicU64, Ordering},
};

const NOT_HERE: [(&str, &str); 1] =
    [("a_layer_that_came_as_a_tar_goes_out_as_the_same_bytes", "its tars name owners, and only one is mapped")];

/// Where the filesystem is, and what the setup is called.
const INSIDE: &str = "BTRFS_TEST_INSIDE";
const NAME: &str = "BTRFS_TEST_NAME";

fn main() -> ExitCode {
    if let Some(dir) = std::env::var_os(INSIDE) {
        let name = std::env::var(NAME).expect("set together");
        let setup = Setup::new(name, move || Rootless::open(PathBuf::from(&dir)));
        return conformance::main(vec![
            NOT_HERE.into_iter().fold(setup, |setup, (case, why)| setup.without(case, why)),
        ]);
    }
    let runs = [("btrfs::rootless", None), ("btrfs::rootless_deleting", Some("remount,user_subvol_rm_allowed"))];
    let mut all_passed = true;
    for (name, remount) in runs {
        match outside(name, remount) {
            Ok(passed) => all_passed &= passed,
            Err(missing) => {
                let missing = Setup::new(name, move || Err(missing.clone()));
                all_passed &= conformance::main(vec![missing]) == ExitCode::SUCCESS;
            }
        }
    }
    if all_passed { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Makes the filesystem as root, and runs the suite on it as nobody.
fn outside(name: &str, remount: Option<&str>) -> Result<bool, Missing> {
    let missing = |what: String| Missing {
        what,
        remedy: "run the test as root; sysctl kernel.unprivileged_userns_clone=1, user.max_user_namespaces".into(),
        excluded: false,
    };
    let tried = unprivileged(OsStr::new("true")).output().map_err(|e| missing(e.to_string()))?;
    if !rustix::process::geteuid().is_root() || !tried.status.success() {
        return Err(missing(format!("no filesystem or no user namespace: {}", String::from_utf8_lossy(&tried.stderr))));
    }
    unshare(CloneFlags::CLONE_NEWNS)
        .and_then(|()| mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>))
        .map_err(|e| missing(e.to_string()))?;
    let disk = Backing::new(BackingKind::Btrfs, 2 << 30).map_err(Missing::failed)?;
    if let Some(options) = remount {
        let done = Command::new("mount").args(["-o", options]).arg(disk.path()).status().expect("mount is there");
        assert!(done.success(), "{options}");
    }
    let (home, bin) = (disk.directory().map_err(Missing::failed)?, disk.directory().map_err(Missing::failed)?);
    chown(&home, Some(1000), Some(1000)).expect("root may");
    // The build directory may be closed to others.
    let exe = bin.join("suite");
    fs::copy(std::env::current_exe().expect("running from a file"), &exe).expect("a copy of this program");
    fs::set_permissions(&exe, Permissions::from_mode(0o755)).expect("root may");
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let status = unprivileged(exe.as_os_str())
        .args(arguments)
        .envs([(INSIDE, home.as_os_str()), (NAME, name.as_ref())])
        .current_dir("/")
        .status()
        .expect("it ran a moment ago");
    Ok(status.success())
}

/// The program as root of a user namespace that only the one user is mapped to.
fn unprivileged(program: &OsStr) -> Command {
    let mut command = Command::new("setpriv");
    command
        .args(["--reuid=1000", "--regid=1000", "--clear-groups", "unshare", "--map-root-user", "--mount"])
        .arg(program);
    command
}

/// A driver in a directory of its own.
struct Rootless {
    driver: Option<Box<dyn GraphDriver>>,
    home: PathBuf,
}

impl Rootless {
    fn open(dir: PathBuf) -> Result<Box<dyn Subject>, Missing> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let home = dir.join(NEXT.fetch_add(1, Ordering::Relaxed).to_string());
        let capabilities = (FACTORY.probe)(&home, &Default::default()).map_err(|unmet| Missing {
            what: unmet.missing,
            remedy: unmet.remedy,
            excluded: false,
        })?;
        assert!(!capabilities.native_diff && !capabilities.quota, "it must not claim what needs root");
        let mut subject = Rootless { driver: None, home };
        subject.reopen().map_err(Missing::failed)?;
        Ok(Box::new(subject))
    }
}

impl Drop for Rootless {
    fn drop(&mut self) {
        if let Some(Err(e)) = self.driver.as_ref().map(|driver| driver.reclaim(&|_| false)) {
            eprintln!("removing what the case has made: {e}");
        }
    }
}

impl Subject for Rootless {
    fn driver(&self) -> &dyn GraphDriver {
        self.driver.as_deref().expect("reopen puts it there")
    }

    fn reopen(&mut self) -> Result<()> {
        self.driver = Some((FACTORY.open)(&self.home, &Default::default())?);
        Ok(())
    }
}
