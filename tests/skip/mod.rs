//! What a test does that cannot run here: libtest knows no tests that find out only while they run that they are to be
//! ignored, and takes them for passed.

use std::{
    fs::OpenOptions,
    io::{self, Write},
    process::{Command, Stdio},
};

/// True if the test must not run here. Then says so, with the reason, on standard error and in the file that
/// `GRAPHDRIVER_SKIP_LOG` names, from which `scripts/test` counts. With `GRAPHDRIVER_REQUIRE_ALL=1` that is a failure.
#[track_caller]
pub fn skipped(test: &str, unmet: Option<String>) -> bool {
    let Some(reason) = unmet else { return false };
    assert_ne!(std::env::var("GRAPHDRIVER_REQUIRE_ALL").as_deref(), Ok("1"), "required to run, but {test}: {reason}");
    note(test, &reason);
    true
}

fn note(test: &str, reason: &str) {
    // libtest captures what the print macros write, and shows it only of tests that fail.
    io::stderr().write_all(format!("skipped: {test}: {reason}\n").as_bytes()).expect("standard error takes a line");
    if let Some(log) = std::env::var_os("GRAPHDRIVER_SKIP_LOG") {
        let file = OpenOptions::new().append(true).create(true).open(&log);
        let written = file.and_then(|mut file| file.write_all(format!("{test}: {reason}\n").as_bytes()));
        written.unwrap_or_else(|e| panic!("noting a skipped test in {}: {e}", log.display()));
    }
}

/// The same for what only the guest's kernel has (`GRAPHDRIVER_GUEST=1` there): elsewhere it is never a failure, since
/// `scripts/guest-test` runs the test.
#[allow(dead_code)] // Most test binaries that share this need no guest.
#[track_caller]
pub fn skipped_outside_guest(test: &str, unmet: Option<String>) -> bool {
    let Some(reason) = unmet else { return false };
    assert_ne!(std::env::var("GRAPHDRIVER_GUEST").as_deref(), Ok("1"), "the guest has to run it, but {test}: {reason}");
    note(test, &format!("{reason} (scripts/guest-test runs it)"));
    true
}

/// The same for what runs only where it is asked for: never a failure.
#[allow(dead_code)] // Most test binaries that share this have nothing of the kind.
pub fn skipped_unless_asked(test: &str, unmet: Option<String>) -> bool {
    unmet.inspect(|reason| note(test, reason)).is_some()
}

/// Which of these programs is missing.
#[allow(dead_code)] // Not all test binaries that share this run programs.
pub fn no_program(programs: &[&str]) -> Option<String> {
    let missing = |program: &&&str| {
        let found = Command::new("sh").args(["-c", &format!("command -v {program}")]).stdout(Stdio::null()).status();
        !found.expect("sh runs").success()
    };
    programs.iter().find(missing).map(|program| format!("needs the program {program}"))
}
