//! Completion takes no capability and no set-id bit away; a user's write does.

use super::*;
use crate::config::Config;
use std::{ops::ControlFlow, os::unix::fs::PermissionsExt};

/// `cap_net_bind_service=ep`, as `setcap` writes it.
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
const SIZE: usize = 2 << 20;

struct Capable {
    directory: tempfile::TempDir,
    pair: Pair,
}

impl Capable {
    /// With one unit of its own. `None`: it takes root.
    fn new(test: &str) -> Option<Capable> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("{test}: skipped: setting capabilities needs root");
            return None;
        }
        let directory = directory(None);
        let pair = Pair::new(directory.path(), &pattern(1, SIZE), Unit(4096));
        pair.prepare().unwrap();
        pair.open().unwrap().write_at(b"x", 0).unwrap();
        let capable = Capable { directory, pair };
        xattr::set(capable.upper(), "security.capability", &CAPABILITY).unwrap();
        Some(capable)
    }

    fn upper(&self) -> PathBuf {
        self.directory.path().join("upper")
    }

    fn has(&self) -> bool {
        match xattr::get(self.upper(), "security.capability").unwrap() {
            Some(value) => value == CAPABILITY,
            None => false,
        }
    }

    fn keeps(&self) -> bool {
        xattr::get(self.upper(), format!("{PREFIX}vfs.privileges")).unwrap().is_some()
    }

    /// As a kill in the middle of a step of completion leaves it.
    fn killed(&self) -> ExtentFile {
        let file = self.pair.open().unwrap();
        file.pin().unwrap();
        file.copy_hole(1 << 20..(1 << 20) + 8192, &mut Vec::new()).unwrap();
        assert!(!self.has() && self.keeps(), "the kernel has taken it, and it is noted");
        file
    }
}

fn finish(file: &ExtentFile) {
    file.complete(&mut |_| ControlFlow::Continue(())).unwrap();
    assert!(file.is_complete());
}

#[test]
fn completion_keeps_capabilities() {
    let Some(capable) = Capable::new("completion_keeps_capabilities") else { return };
    let mut steps = 0;
    let file = capable.pair.open().unwrap();
    file.complete(&mut |_| {
        steps += 1;
        assert!(capable.has() && !capable.keeps(), "in step {steps}");
        if steps == 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })
    .unwrap();
    assert!(steps == 2 && !file.is_complete());
    drop(file);
    let file = capable.pair.open().unwrap();
    assert!(capable.has(), "opened again");
    finish(&file);
    assert!(capable.has() && !capable.keeps() && capable.pair.header().is_none());
}

#[test]
fn completion_of_a_layer_keeps_capabilities() {
    let Some(capable) = Capable::new("completion_of_a_layer_keeps_capabilities") else { return };
    let at = |name: &str| capable.directory.path().join(name);
    let config = Config { lower: vec![at("l")], upper: Some(at("u")), user_xattrs: true, ..Config::default() };
    for (directory, file) in [("l", "lower"), ("u", "upper")] {
        std::fs::create_dir(at(directory)).unwrap();
        std::fs::hard_link(at(file), at(directory).join(file)).unwrap();
    }
    assert_eq!(complete_layer(&config).unwrap().files, 1);
    assert!(capable.has() && !capable.keeps() && capable.pair.header().is_none());
}

#[test]
fn a_kill_in_completion_takes_no_capability() {
    let Some(capable) = Capable::new("a_kill_in_completion_takes_no_capability") else { return };
    drop(capable.killed());
    let file = capable.pair.open().unwrap();
    assert!(capable.has() && !capable.keeps(), "opened again");
    finish(&file);
    assert!(capable.has());

    let Some(capable) = Capable::new("") else { return };
    drop(capable.killed());
    let other = [1, 0, 0, 2, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    xattr::set(capable.upper(), "security.capability", &other).unwrap();
    capable.pair.open().unwrap();
    let now = xattr::get(capable.upper(), "security.capability").unwrap().unwrap();
    assert_eq!(now, other, "one that was set since stays");
}

#[test]
fn a_write_takes_capabilities_away() {
    type Change<'a> = (&'a str, &'a dyn Fn(&ExtentFile));
    let changes: [Change<'_>; 5] = [
        ("write", &|file| file.write_at(b"y", 100).unwrap()),
        ("write into a hole", &|file| file.write_at(b"y", 100_000).unwrap()),
        ("truncation", &|file| file.set_len(SIZE as u64 - 1).unwrap()),
        ("allocation", &|file| file.fallocate(0, 200_000, 10).unwrap()),
        ("punching", &|file| file.fallocate(3, 200_000, 10).unwrap()),
    ];
    for (name, change) in changes {
        let Some(capable) = Capable::new("a_write_takes_capabilities_away") else { return };
        let file = capable.pair.open().unwrap();
        change(&file);
        assert!(!capable.has(), "{name}");
        finish(&file);
        assert!(!capable.has(), "{name}, completed");
    }
    // While a step of completion is under way, which ends or is killed.
    for (i, killed) in [(0, false), (0, true), (3, false), (3, true)] {
        let Some(capable) = Capable::new("") else { return };
        let file = capable.killed();
        changes[i].1(&file);
        assert!(!capable.keeps(), "{}", changes[i].0);
        if killed {
            drop(file);
            capable.pair.open().unwrap();
        } else {
            file.unpin().unwrap();
        }
        assert!(!capable.has(), "killed: {killed}");
    }
}

/// The kernel lets root keep set-id bits in a write; others lose them.
#[test]
fn completion_keeps_set_id_bits() {
    const NAME: &str = "extent::tests::privileges::completion_keeps_set_id_bits";
    if std::env::var("EXTENT_TEST_INNER").as_deref() != Ok(NAME) {
        if !rustix::process::geteuid().is_root() {
            eprintln!("{NAME}: skipped: giving up CAP_FSETID needs root");
            return;
        }
        let drop = ["--bounding-set=-fsetid", "--inh-caps=-fsetid", "--"];
        let mut inner = std::process::Command::new("setpriv");
        inner.args(drop).arg(std::env::current_exe().unwrap()).args(["--exact", NAME, "--nocapture"]);
        return assert!(inner.env("EXTENT_TEST_INNER", NAME).status().unwrap().success(), "see above");
    }
    let capable = Capable::new(NAME).unwrap();
    let mode = || capable.upper().metadata().unwrap().mode() & 0o7777;
    let set = |mode| std::fs::set_permissions(capable.upper(), PermissionsExt::from_mode(mode)).unwrap();
    set(0o6755);
    drop(capable.killed());
    assert_eq!(mode(), 0o755, "the kernel has taken them");
    let file = capable.pair.open().unwrap();
    assert_eq!(mode(), 0o6755, "opened again");
    drop(file);
    let file = capable.pair.open().unwrap();
    file.pin().unwrap();
    file.copy_hole((3 << 19)..(3 << 19) + 4096, &mut Vec::new()).unwrap();
    drop(file);
    set(0o700);
    finish(&capable.pair.open().unwrap());
    assert_eq!(mode(), 0o700, "a mode that was set since stays");

    let capable = Capable::new(NAME).unwrap();
    let mode = || capable.upper().metadata().unwrap().mode() & 0o7777;
    std::fs::set_permissions(capable.upper(), PermissionsExt::from_mode(0o6755)).unwrap();
    finish(&capable.pair.open().unwrap());
    assert!(mode() == 0o6755 && capable.has());
}
