//! While one file is copied up, everything else goes on.

use super::{
    common::eventually,
    gate::{self, Gate},
    storm::Watchdog,
    world::*,
};
use std::{
    cell::RefCell,
    fs::{self, File},
    path::Path,
    sync::atomic::{AtomicBool, Ordering::SeqCst},
    thread,
    time::Duration,
};

/// Every kind of operation on other files than `big`; in the same directory, too.
fn everything_else(world: &World) {
    for round in 0..3 {
        for dir in ["", "d"] {
            let at = |name: &str| world.at(dir).join(name);
            fs::read(at("read")).unwrap();
            names(world.at(dir));
            // Copy-ups of other files.
            fs::write(at(&format!("write{round}")), "changed").unwrap();
            chmod(at(&format!("chmod{round}")), 0o600);
            fs::rename(at(&format!("rename{round}")), at(&format!("renamed{round}"))).unwrap();
            fs::remove_file(at(&format!("unlink{round}"))).unwrap();
            fs::hard_link(at(&format!("link{round}")), at(&format!("linked{round}"))).unwrap();
            fs::write(at(&format!("new{round}")), "new").unwrap();
            xattr::set(at(&format!("new{round}")), "user.x", b"y").unwrap();
            fs::create_dir(at(&format!("dir{round}"))).unwrap();
            fs::rename(at(&format!("dir{round}")), at(&format!("dir-renamed{round}"))).unwrap();
            fs::remove_dir(at(&format!("dir-renamed{round}"))).unwrap();
            std::os::unix::fs::symlink("x", at(&format!("symlink{round}"))).unwrap();
            File::open(at(&format!("new{round}"))).unwrap().sync_all().unwrap();
            rustix::fs::statvfs(world.at(dir)).unwrap();
        }
    }
    // The file itself, but for the page that is being written, which the kernel may have locked.
    fs::metadata(world.at("big")).unwrap();
    let mut middle = [0; 100];
    rustix::io::pread(File::open(world.at("big")).unwrap(), &mut middle, 300_000).unwrap();
    assert_eq!(middle[..], gate::content(300_000, 100));
}

fn fill(l: &Path) {
    fs::create_dir(l.join("d")).unwrap();
    for dir in [l.to_owned(), l.join("d")] {
        fs::write(dir.join("read"), "x").unwrap();
        for name in ["write", "chmod", "rename", "unlink", "link"] {
            (0..3).for_each(|round| fs::write(dir.join(format!("{name}{round}")), vec![1; 20_000]).unwrap());
        }
    }
}

fn goes_on_while(options: &'static [&'static str], copy_up: fn(&Path)) {
    // A plain directory copies nothing up.
    if is_plain() {
        return;
    }
    let (gate, session) = (Gate::default(), RefCell::new(None));
    let gated = |l: &Path| *session.borrow_mut() = Some(gate.mount(l));
    let setup = Setup { options, ..Setup::default() };
    let Some(mut world) = World::new(setup, &[&fill, &gated]) else { return };
    let (returned, hangs) = (AtomicBool::new(false), std::sync::Arc::new(AtomicBool::new(false)));
    let watchdog = {
        let (gate, hangs) = (gate.clone(), hangs.clone());
        Watchdog::with(Duration::from_secs(20), move || {
            hangs.store(true, SeqCst);
            gate.open();
        })
    };
    thread::scope(|scope| {
        scope.spawn(|| {
            copy_up(&world.at("big"));
            returned.store(true, SeqCst);
        });
        eventually("the copy-up reads the lower file", Duration::from_secs(10), || gate.is_waited_for());
        // Whatever this does, it must not leave the copy-up waiting for ever.
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| everything_else(&world)));
        let early = returned.load(SeqCst);
        gate.open();
        if let Err(panic) = result {
            std::panic::resume_unwind(panic);
        }
        assert!(!hangs.load(SeqCst), "other operations waited for the copy-up");
        assert!(!early, "the copy-up ended before it had read its file");
    });
    drop(watchdog);
    assert!(returned.load(SeqCst));
    for _ in 0..2 {
        let mut model = gate::content(0, gate::SIZE as u32);
        model[5..8].copy_from_slice(b"new");
        assert!(fs::read(world.at("big")).unwrap() == model);
        assert_eq!(fs::read(world.at("d/write2")).unwrap(), b"changed");
        world.remount();
    }
    drop(world);
}

fn write(path: &Path) {
    rustix::io::pwrite(File::options().write(true).open(path).unwrap(), b"new", 5).unwrap();
}

#[test]
fn other_operations_go_on_while_a_file_is_copied_up_for_a_write() {
    goes_on_while(&["copy_up=full"], write);
}

#[test]
fn other_operations_go_on_while_a_file_is_copied_up_for_a_write_without_passthrough() {
    // With writeback a write returns before the copy-up has begun.
    goes_on_while(&["copy_up=full", "passthrough=0", "writeback=0"], write);
}

#[test]
fn other_operations_go_on_while_a_file_is_copied_up_for_a_truncation() {
    goes_on_while(&["copy_up=full"], |path| {
        super::sys::truncate(path, gate::SIZE as i64 - 1).unwrap();
        super::sys::truncate(path, gate::SIZE as i64).unwrap();
        write(path);
        let last = [gate::content(gate::SIZE - 1, 1)[0]];
        rustix::io::pwrite(File::options().write(true).open(path).unwrap(), &last, gate::SIZE - 1).unwrap();
    });
}

#[test]
fn other_operations_go_on_while_a_file_is_copied_up_for_a_chmod() {
    goes_on_while(&["copy_up=full"], |path| {
        chmod(path, 0o600);
        write(path);
    });
}
