//! Running the suite as a test target with `harness = false`.

use super::{Case, Missing, Setup, cases};
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use std::{
    cell::Cell,
    panic::{self, AssertUnwindSafe},
    process::ExitCode,
    sync::{Arc, Once},
};

/// The whole `main` of a driver's conformance test: every case on every setup, each as a trial `SETUP::CASE`.
///
/// A case that cannot run here is reported as ignored, with the reason; with `GRAPHDRIVER_REQUIRE_ALL=1` it fails, unless
/// it is the driver's own capabilities that rule it out, or the setup [leaves it out](Setup::without). `GRAPHDRIVER_PROPTEST_CASES` is the number of random sequences.
/// All mounts are made in a mount namespace of the process's own, so nothing is left even if it is killed.
pub fn main(setups: Vec<Setup>) -> ExitCode {
    let arguments = Arguments::from_args();
    // Before any thread is started: a namespace belongs to a thread.
    let private = private_mounts();
    let setups: Vec<Arc<Setup>> = setups.into_iter().map(Arc::new).collect();
    let mut trials = Vec::new();
    for setup in &setups {
        trials.extend(cases().filter(|case| setup.takes(case.name)).map(|case| trial(setup, case, private.clone())));
    }
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn trial(setup: &Arc<Setup>, case: &'static Case, private: Result<(), Missing>) -> Trial {
    let setup = setup.clone();
    Trial::ignorable_test(format!("{}::{}", setup.name, case.name), move || {
        match private.and_then(|()| run(&setup, case)) {
            Ok(outcome) => outcome.map(|()| Completion::Completed),
            Err(missing) if missing.excluded || !require_all() => Ok(Completion::ignored_with(missing)),
            Err(missing) => Err(format!("required to run, but {missing}").into()),
        }
    })
}

fn require_all() -> bool {
    std::env::var_os("GRAPHDRIVER_REQUIRE_ALL").is_some_and(|value| value == "1")
}

/// The outcome of the case, or why it was not run.
pub(super) fn run(setup: &Setup, case: &Case) -> Result<Result<(), Failed>, Missing> {
    if let Some(left_out) = setup.left_out(case.name) {
        return Err(left_out);
    }
    let mut subject = setup.open()?;
    let lacking = |what: &str| Missing { what: what.into(), remedy: String::new(), excluded: true };
    (case.needs)(&*subject).map_err(lacking)?;
    let told = |e: crate::Error| Failed::from(format!("{e:?}\nwhy this case exists: {}", case.story));
    Ok((case.run)(&mut *subject).map_err(told))
}

fn private_mounts() -> Result<(), Missing> {
    let private = unshare(CloneFlags::CLONE_NEWNS)
        .and_then(|()| mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>));
    private.map_err(|e| Missing {
        what: format!("a mount namespace cannot be made: {e}"),
        remedy: "run the test as root".into(),
        excluded: false,
    })
}

thread_local! {
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// Turns a panic into its message, without printing it: shrinking makes thousands.
pub(super) fn quietly<T>(run: impl FnOnce() -> T) -> Result<T, String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let loud = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !QUIET.get() {
                loud(info);
            }
        }));
    });
    let before = QUIET.replace(true);
    let outcome = panic::catch_unwind(AssertUnwindSafe(run));
    QUIET.set(before);
    outcome.map_err(|panic| match (panic.downcast_ref::<String>(), panic.downcast_ref::<&str>()) {
        (Some(message), _) => message.clone(),
        (_, Some(message)) => message.to_string(),
        _ => "a panic without a message".into(),
    })
}
