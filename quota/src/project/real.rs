//! On real filesystems, in loop devices and mount namespaces of the tests' own. Only the guest's kernel has project quotas.

use super::{kernel::Activity, ledger::Entry, *};
use crate::sys::{self, Place};
use graphdriver_core::{ByteSize, Usage};
use nix::sched::{CloneFlags, unshare};
use rustix::{
    fs::{CWD, FileType, Mode},
    thread::{CapabilitySet, capabilities, set_capabilities},
};
use skip::{no_program, skipped, skipped_outside_guest};
use std::{
    ffi::CString,
    fs::{self, File},
    io::Write,
    process::Command,
};

#[path = "../../../tests/skip/mod.rs"]
mod skip;

#[path = "real_count.rs"]
mod counting;

const MIB: u64 = 1 << 20;

/// What makes a filesystem, and what mounts it with quotas.
type Recipe = (&'static str, &'static str);
const XFS: Recipe = ("mkfs.xfs -q", "loop,pquota");
const EXT4: Recipe = ("mkfs.ext4 -q -O project,quota -E quotatype=prjquota", "loop,prjquota");

/// A mounted filesystem. It is gone with the thread, whose mount namespace it is in.
struct Disk(tempfile::TempDir);

impl Disk {
    fn new((make, options): Recipe) -> Disk {
        unshare(CloneFlags::CLONE_NEWNS).expect("root makes mount namespaces");
        let dir = tempfile::tempdir().unwrap();
        let script = format!(
            "set -e; mount --make-rprivate /; truncate -s 512M disk; {make} disk >/dev/null; mkdir at; mount -o {options} disk at; rm disk"
        );
        let done = Command::new("sh").args(["-c", &script]).current_dir(dir.path()).output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        Disk(dir)
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("at")
    }

    fn quota(&self, range: RangeInclusive<u32>) -> ProjectQuota {
        ProjectQuota::open(&self.path(), range, "d.quota_projects").unwrap()
    }

    fn tree(&self, name: &str) -> PathBuf {
        let tree = self.path().join(name);
        fs::create_dir(&tree).unwrap();
        tree
    }

    /// A directory of its own to try things out in.
    fn probe(&self) -> Result<()> {
        let scratch = tempfile::tempdir_in(self.path()).unwrap();
        probe(scratch.path(), &(700..=799))
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let done = Command::new("umount").args(["-l"]).arg(self.path()).status().unwrap();
        assert!(done.success() || std::thread::panicking());
    }
}

/// Runs it in a thread of its own for each filesystem with quotas, if the kernel has them.
fn each(test: &str, run: fn(&Disk)) {
    if skipped(test, no_root().or_else(|| no_program(&["mkfs.xfs", "mkfs.ext4"])))
        || skipped_outside_guest(test, no_project_quotas())
    {
        return;
    }
    for recipe in [XFS, EXT4] {
        alone(move || run(&Disk::new(recipe)));
    }
}

fn alone<T: Send + 'static>(run: impl FnOnce() -> T + Send + 'static) -> T {
    std::thread::spawn(run).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn no_root() -> Option<String> {
    (!rustix::process::geteuid().is_root()).then(|| "needs root".into())
}

fn no_project_quotas() -> Option<String> {
    let has = [XFS, EXT4].map(|recipe| std::thread::spawn(move || drop(Disk::new(recipe))).join().is_ok());
    (has != [true, true]).then(|| "the kernel has no project quotas on xfs or on ext4".into())
}

fn size(bytes: u64) -> Limits {
    Limits { size: Some(ByteSize(bytes)), inodes: None }
}

fn fill(path: &Path, bytes: u64) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    (0..bytes / MIB).try_for_each(|_| file.write_all(&[7; MIB as usize]))?;
    file.sync_all()
}

/// As containers are by default, which ext4 minds.
fn without_privilege<T: Send>(run: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let mut own = capabilities(None).unwrap();
            own.effective.remove(CapabilitySet::SYS_RESOURCE);
            set_capabilities(None, own).unwrap();
            run()
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn is_full<T: std::fmt::Debug>(outcome: std::io::Result<T>) -> bool {
    matches!(outcome.unwrap_err().raw_os_error(), Some(libc::EDQUOT | libc::ENOSPC))
}

#[test]
fn trees_are_counted_limited_listed_and_let_go() {
    each("trees_are_counted_limited_listed_and_let_go", |disk| {
        let quota = disk.quota(700..=799);
        let (a, b, free) = (disk.tree("a"), disk.tree("b"), disk.tree("free"));
        quota.set(&a, size(20 * MIB)).unwrap();
        quota.set(&b, Limits { size: None, inodes: Some(10) }).unwrap();
        without_privilege(|| {
            fill(&a.join("fits"), 10 * MIB).unwrap();
            assert!(is_full(fill(&a.join("more"), 20 * MIB)));
            fill(&b.join("large"), 30 * MIB).unwrap();
            assert!(is_full((0..20).try_for_each(|n| File::create(b.join(n.to_string())).map(drop))));
            fill(&free.join("x"), 30 * MIB).unwrap();
        });
        let listed = quota.list().unwrap();
        assert_eq!(listed.iter().map(|(tree, _)| tree).collect::<Vec<_>>(), [&a, &b]);
        let (first, second) = (quota.read(&a).unwrap(), quota.read(&b).unwrap());
        assert_eq!((listed[0].1, listed[1].1), (first, second));
        assert!(first.limits == size(20 * MIB) && first.used.bytes <= 20 * MIB && first.used.inodes == 3, "{first:?}");
        assert!(second.used.bytes >= 30 * MIB && second.used.inodes == 10, "{second:?}");
        assert_eq!(quota.read(&free).unwrap_err().kind(), ErrorKind::NotFound);
        // One that stays, and one that is gone before.
        quota.remove(&a).unwrap();
        fs::remove_dir_all(&b).unwrap();
        quota.remove(&b).unwrap();
        quota.remove(&b).unwrap();
        fill(&a.join("free again"), 40 * MIB).unwrap();
        assert_eq!((quota.list().unwrap(), quota.on_filesystem().unwrap()), (vec![], vec![]));
    });
}

#[test]
fn files_that_are_there_already_are_counted_and_symlinks_never_followed() {
    each("files_that_are_there_already_are_counted_and_symlinks_never_followed", |disk| {
        let quota = disk.quota(700..=799);
        let (tree, outside) = (disk.tree("t"), disk.tree("outside"));
        fill(&outside.join("f"), 3 * MIB).unwrap();
        fill(&tree.join("f"), 5 * MIB).unwrap();
        fs::hard_link(tree.join("f"), tree.join("g")).unwrap();
        std::os::unix::fs::symlink(&outside, tree.join("link")).unwrap();
        std::os::unix::fs::symlink(outside.join("f"), tree.join("other")).unwrap();
        for (name, kind) in [("fifo", FileType::Fifo), ("null", FileType::CharacterDevice)] {
            rustix::fs::mknodat(CWD, tree.join(name), kind, Mode::RUSR, rustix::fs::makedev(1, 3)).unwrap();
        }
        let mut deep = tree.clone();
        for _ in 0..200 {
            deep.push("d");
            fs::create_dir(&deep).unwrap();
        }
        fill(&deep.join("bottom"), MIB).unwrap();
        let tagged = quota.set_at("t", &tree, size(50 * MIB)).unwrap();
        assert_eq!(tagged, Tagged { changed: 200 + 2, left_out: 4 });
        let used = quota.read(&tree).unwrap().used;
        assert!(used.inodes == 203 && (6 * MIB..8 * MIB).contains(&used.bytes), "{used:?}");
        assert_eq!(quota.project_at(&outside).unwrap(), None);
        assert_eq!(sys::get_fsxattr(File::open(outside.join("f")).unwrap().as_fd()).unwrap().projid, 0);
        assert_eq!(quota.set_at("t", &tree, size(60 * MIB)).unwrap(), Tagged::default(), "once is enough");
        // What is made at the bottom is counted.
        fill(&deep.join("more"), MIB).unwrap();
        assert_eq!(quota.read(&tree).unwrap().used.inodes, 204);
    });
}

#[test]
fn writers_do_not_escape_while_a_tree_gets_its_project() {
    each("writers_do_not_escape_while_a_tree_gets_its_project", |disk| {
        let quota = disk.quota(700..=799);
        let tree = disk.tree("t");
        for n in 0..20 {
            fs::create_dir_all(tree.join(format!("{n}/sub"))).unwrap();
        }
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut n = 0u32;
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    let dir = tree.join(format!("{}/sub", n % 20));
                    fs::write(dir.join(format!("f{}", n % 10)), "x").unwrap();
                    // What it writes is bounded, as a slow machine gives it the time to fill the tree.
                    let to = tree.join(format!("{}/sub{}", (n + 7) % 20, n % 500));
                    let _ = fs::remove_dir_all(&to);
                    // Between projects that is refused, which a program has to live with meanwhile.
                    let _ = fs::rename(&dir, &to);
                    fs::create_dir_all(&dir).unwrap();
                    n += 1;
                }
            });
            std::thread::sleep(std::time::Duration::from_millis(100));
            quota.set(&tree, size(400 * MIB)).unwrap();
            done.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        assert_eq!(tag::tag(&tree, quota.ledger.read().unwrap().trees["t"].project).unwrap(), Tagged::default());
    });
}

#[test]
fn what_a_crash_left_is_finished_or_undone() {
    each("what_a_crash_left_is_finished_or_undone", |disk| {
        let quota = disk.quota(700..=799);
        // What is noted first, of which nothing is done yet.
        let enter = |name: &str| {
            let note = |book: &mut Book| {
                let project = book.free(&(700..=799), "d.quota_projects", |_| Ok(false))?;
                let entry = Entry { project, limits: size(20 * MIB), ready: false };
                book.trees.insert(name.into(), entry);
                Ok(entry)
            };
            quota.ledger.change(note).unwrap()
        };
        // Noted, and the tree never came to be.
        enter("never");
        // Noted and limited, but not in its place.
        let lost = enter("lost");
        quota.kernel.set(lost.project, size(20 * MIB)).unwrap();
        // Half of the files have the project.
        let half = disk.tree("half");
        fs::create_dir_all(half.join("d/e")).unwrap();
        fill(&half.join("d/e/f"), 5 * MIB).unwrap();
        let entry = enter("half");
        tag::tag_dir(tag::open_dir(&half).unwrap().as_fd(), entry.project).unwrap();
        // The tree and the limit are gone, the note is not.
        let removed = disk.tree("removed");
        quota.set(&removed, size(20 * MIB)).unwrap();
        fs::remove_dir(&removed).unwrap();
        quota.kernel.set(quota.ledger.read().unwrap().trees["removed"].project, Limits::default()).unwrap();
        // A new process.
        let quota = disk.quota(700..=799);
        assert_eq!(quota.reclaim(&|name| !disk.path().join(name).exists()).unwrap(), 3);
        let book = quota.ledger.read().unwrap();
        assert_eq!(book.trees.into_iter().collect::<Vec<_>>(), [("half".into(), Entry { ready: true, ..entry })]);
        assert_eq!(quota.read(&half).unwrap().used.inodes, 4);
        quota.prepare("half").unwrap();
        assert!(without_privilege(|| is_full(fill(&half.join("d/more"), 30 * MIB))));
        assert_eq!(quota.on_filesystem().unwrap().len(), 1, "nothing else is left in the kernel");
    });
}

#[test]
fn a_project_with_a_file_or_a_limit_is_never_given() {
    each("a_project_with_a_file_or_a_limit_is_never_given", |disk| {
        let quota = disk.quota(700..=703);
        quota.kernel.set(701, size(MIB)).unwrap();
        let others = disk.tree("others");
        tag::tag(&others, 702).unwrap();
        let mut given = Vec::new();
        for name in ["a", "b"] {
            let tree = disk.tree(name);
            quota.set(&tree, size(MIB)).unwrap();
            given.push(quota.project_at(&tree).unwrap().unwrap());
        }
        given.sort();
        assert_eq!(given, [700, 703]);
        let c = disk.tree("c");
        let e = quota.set(&c, size(MIB)).unwrap_err();
        assert!(e.kind() == ErrorKind::OutOfSpace && e.to_string().contains("700 to 703"), "{e}");
        assert_eq!(quota.project_at(&c).unwrap(), None);
        // A file that is open keeps its project after its tree is gone.
        let open = File::create(disk.path().join("a/open")).unwrap();
        fs::remove_dir_all(disk.path().join("a")).unwrap();
        quota.forget("a").unwrap();
        assert_eq!(quota.set(&c, size(MIB)).unwrap_err().kind(), ErrorKind::OutOfSpace);
        drop(open);
        // xfs frees it in the background.
        let freed = (0..100).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(100));
            quota.set(&c, size(MIB)).is_ok()
        });
        assert!(freed);
    });
}

#[test]
fn a_full_tree_gets_room_to_be_mounted_and_gives_it_back() {
    each("a_full_tree_gets_room_to_be_mounted_and_gives_it_back", |disk| {
        let quota = disk.quota(700..=799);
        let tree = disk.tree("t");
        let limits = Limits { size: Some(ByteSize(20 * MIB)), inodes: Some(20) };
        quota.set(&tree, limits).unwrap();
        without_privilege(|| {
            assert!(is_full(fill(&tree.join("f"), 30 * MIB)));
            assert!(is_full((0..29).try_for_each(|n| File::create(tree.join(n.to_string())).map(drop))));
            assert!(fs::create_dir(tree.join("d")).is_err());
        });
        quota.prepare("t").unwrap();
        without_privilege(|| fs::create_dir(tree.join("d"))).unwrap();
        assert_eq!(quota.read(&tree).unwrap().limits, limits, "what was asked for is remembered");
        let project = quota.project_at(&tree).unwrap().unwrap();
        assert_ne!(quota.kernel.get(project).unwrap().limits, limits);
        fs::remove_dir_all(&tree).unwrap();
        fs::create_dir(&tree).unwrap();
        quota.prepare("t").unwrap();
        assert_eq!(quota.kernel.get(project).unwrap().limits, limits);
        assert_eq!(quota.project_at(&tree).unwrap(), Some(project), "a tree that lost its project has it again");
    });
}

#[test]
fn the_device_is_as_good_as_a_descriptor() {
    each("the_device_is_as_good_as_a_descriptor", |disk| {
        let quota = disk.quota(700..=799);
        quota.set(&disk.tree("t"), size(20 * MIB)).unwrap();
        let project = quota.ledger.read().unwrap().trees["t"].project;
        let device = rustix::fs::stat(disk.path()).unwrap().st_dev;
        let name = format!("/dev/block/{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
        let name = CString::new(name).unwrap();
        let by_device = sys::get_quota(Place::Device(&name), project).unwrap();
        assert_eq!((by_device.space_limit, by_device.inodes), (20 << 10, 1));
        assert_eq!(sys::next_quota(Place::Device(&name), 1).unwrap().id, project);
        let flags = sys::quota_stat(Place::Device(&name)).unwrap().flags;
        assert_eq!(flags, sys::quota_stat(Place::File(File::open(disk.path()).unwrap().as_fd())).unwrap().flags);
    });
}

#[test]
fn privileged_writers_exceed_limits_of_ext4_only() {
    each("privileged_writers_exceed_limits_of_ext4_only", |disk| {
        let quota = disk.quota(700..=799);
        let tree = disk.tree("t");
        quota.set(&tree, size(10 * MIB)).unwrap();
        let outcome = fill(&tree.join("f"), 20 * MIB);
        match probe::fstype(&disk.path()).as_str() {
            "ext4" => outcome.unwrap(),
            _ => assert!(is_full(outcome)),
        }
    });
}

#[test]
fn what_is_missing_is_named_with_what_brings_it() {
    const NAME: &str = "what_is_missing_is_named_with_what_brings_it";
    each(NAME, |disk| {
        disk.probe().unwrap();
        assert_eq!(Kernel::of(&disk.path()).unwrap().activity().unwrap(), Activity::Enforces);
        assert_eq!(disk.quota(700..=799).on_filesystem().unwrap(), [], "the probe leaves nothing");
        let outer = disk.tree("outer");
        tag::tag(&outer, 9).unwrap();
        let e = probe(
            &{
                fs::create_dir(outer.join("in")).unwrap();
                outer.join("in")
            },
            &(700..=799),
        )
        .unwrap_err()
        .to_string();
        assert!(e.contains("project 9") && e.contains("nest"), "{e}");
    });
    if skipped(NAME, no_root()) || skipped_outside_guest(NAME, no_project_quotas()) {
        return;
    }
    for (make, options, words) in [
        ("mkfs.ext4 -q", "loop", &["tune2fs -O project,quota -Q prjquota /dev/loop", "mount -o prjquota"][..]),
        ("mkfs.ext4 -q -O project", "loop", &["tune2fs -O project,quota"]),
        (EXT4.0, "loop", &["counted and not enforced", "mount -o prjquota /dev/loop"]),
        ("mkfs.xfs -q", "loop", &["without pquota", "mount -o pquota /dev/loop", "a remount is not enough"]),
        ("mkfs.xfs -q", "loop,pqnoenforce", &["pqnoenforce", "mount -o pquota"]),
        ("mkfs.btrfs -q", "loop", &["only xfs and ext4"]),
    ] {
        let e = alone(move || Disk::new((make, options)).probe()).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Unsupported, "{e}");
        assert!(words.iter().all(|word| e.to_string().contains(word)), "{make} {options}: {e}");
    }
}

/// What the advice says helps.
#[test]
fn the_advice_for_ext4_brings_quotas() {
    if skipped_outside_guest("the_advice_for_ext4_brings_quotas", no_root().or_else(no_project_quotas)) {
        return;
    }
    let make = "f() { mkfs.ext4 -q $1; tune2fs -O project,quota -Q prjquota $1; }; f";
    alone(move || Disk::new((make, "loop,prjquota")).probe()).unwrap();
}

#[test]
fn an_unknown_project_takes_and_may_take_nothing_said() {
    each("an_unknown_project_takes_and_may_take_nothing_said", |disk| {
        let found = disk.quota(700..=799).kernel.get(750).unwrap();
        assert_eq!(found, State { used: Usage::default(), limits: Limits::default() });
    });
}

#[test]
fn a_full_tree_can_be_mounted_again_and_again_and_stays_bounded() {
    each("a_full_tree_can_be_mounted_again_and_again_and_stays_bounded", |disk| {
        let quota = disk.quota(700..=799);
        let limits = |mib: u64, inodes| Limits { size: Some(ByteSize(mib * MIB)), inodes: Some(inodes) };
        let fill_up = |tree: &Path, n: u32| {
            without_privilege(|| {
                assert!(is_full((0..99).try_for_each(|m| File::create(tree.join(format!("{n}-{m}"))).map(drop))));
                assert!(is_full(fill(&tree.join("f"), 60 * MIB)));
            });
        };
        // Full as it is, and limited to far less than it takes.
        let cases = [("full", limits(2, 30), limits(2, 30), 18), ("lowered", limits(20, 30), limits(2, 12), 37)];
        for (name, first, then, most) in cases {
            let tree = disk.tree(name);
            File::create(tree.join("f")).unwrap();
            quota.set(&tree, first).unwrap();
            fill_up(&tree, 0);
            quota.set(&tree, then).unwrap();
            for n in 1..=16 {
                quota.prepare(name).unwrap();
                let room = without_privilege(|| fs::write(tree.join(format!("room{n}")), [1; 100_000]));
                assert!(room.is_ok() || n > 12, "{name}, mount {n}: {room:?}");
                fill_up(&tree, n);
            }
            let used = quota.read(&tree).unwrap().used;
            assert!(used.bytes <= most * MIB && used.inodes <= 158, "{name}: {used:?}");
            fs::remove_dir_all(&tree).unwrap();
            fs::create_dir(&tree).unwrap();
            quota.prepare(name).unwrap();
            let project = quota.project_at(&tree).unwrap().unwrap();
            assert_eq!(quota.kernel.get(project).unwrap().limits, then, "{name}: the room is taken back");
        }
    });
}

#[test]
fn of_changes_at_once_the_kernel_has_the_one_that_is_noted() {
    each("of_changes_at_once_the_kernel_has_the_one_that_is_noted", |disk| {
        let tree = disk.tree("t");
        (0..300).for_each(|n| fs::write(tree.join(n.to_string()), "").unwrap());
        let quota = disk.quota(700..=799);
        quota.set(&tree, size(MIB)).unwrap();
        let project = quota.project_at(&tree).unwrap().unwrap();
        for round in 0..30 {
            // So that the files are looked at again, which takes each change another time.
            let not_ready = |book: &mut Book| {
                book.trees.get_mut("t").unwrap().ready = false;
                Ok(())
            };
            quota.ledger.change(not_ready).unwrap();
            std::thread::scope(|scope| {
                for mib in 1..=4 {
                    let tree = &tree;
                    scope.spawn(move || disk.quota(700..=799).set(tree, size((round + mib) * MIB)).unwrap());
                }
            });
            let (noted, enforced) = (quota.read(&tree).unwrap().limits, quota.kernel.get(project).unwrap().limits);
            assert_eq!(noted, enforced, "round {round}");
        }
    });
}

#[test]
fn a_change_that_was_interrupted_is_finished() {
    each("a_change_that_was_interrupted_is_finished", |disk| {
        let quota = disk.quota(700..=799);
        let tree = disk.tree("t");
        quota.set(&tree, size(20 * MIB)).unwrap();
        let project = quota.project_at(&tree).unwrap().unwrap();
        let inodes = Limits { size: None, inodes: Some(100) };
        for noted in [size(60 * MIB), size(20 * MIB), inodes, Limits::default(), size(7 * MIB)] {
            let enter = |book: &mut Book| {
                book.trees.get_mut("t").unwrap().limits = noted;
                Ok(())
            };
            quota.ledger.change(enter).unwrap();
            // Killed here.
            quota.reclaim(&|_| false).unwrap();
            assert_eq!(quota.kernel.get(project).unwrap().limits, noted);
        }
        // The room that a full one has been given is no interrupted change.
        without_privilege(|| assert!(is_full(fill(&tree.join("f"), 40 * MIB))));
        quota.prepare("t").unwrap();
        let with_room = quota.kernel.get(project).unwrap().limits;
        quota.reclaim(&|_| false).unwrap();
        assert_eq!(quota.kernel.get(project).unwrap().limits, with_room);
    });
}

#[test]
fn a_change_that_failed_leaves_the_limits_as_they_were() {
    each("a_change_that_failed_leaves_the_limits_as_they_were", |disk| {
        let quota = disk.quota(700..=799);
        let [never, limited, gone] = ["never", "limited", "gone"].map(|name| disk.tree(name));
        quota.set(&limited, size(20 * MIB)).unwrap();
        let project = quota.project_at(&limited).unwrap().unwrap();
        // The trees cannot be walked: a symlink is where a directory belongs, or nothing is there.
        for tree in [&never, &limited] {
            tag::tag(tree, 0).unwrap();
            std::os::unix::fs::symlink("/", tree.join("diff")).unwrap();
        }
        fs::remove_dir(&gone).unwrap();
        for (tree, was) in [(&never, Limits::default()), (&limited, size(20 * MIB)), (&gone, Limits::default())] {
            quota.set(tree, size(30 * MIB)).unwrap_err();
            let noted = quota.read(tree).map(|state| state.limits).unwrap_or_default();
            assert_eq!(noted, was, "{}", tree.display());
        }
        assert_eq!(quota.kernel.get(project).unwrap().limits, size(20 * MIB));
        assert!(
            quota
                .on_filesystem()
                .unwrap()
                .iter()
                .all(|(other, state)| { *other == project || state.limits == Limits::default() })
        );
    });
}

#[test]
fn two_homes_on_one_filesystem_never_share_a_project() {
    each("two_homes_on_one_filesystem_never_share_a_project", |disk| {
        let homes = ["a", "b", "c", "d"].map(|name| disk.tree(name));
        let open = |home: &PathBuf| ProjectQuota::open(home, 700..=723, "d.quota_projects").unwrap();
        std::thread::scope(|scope| {
            for home in &homes {
                scope.spawn(move || {
                    for n in 0..5 {
                        let tree = home.join(n.to_string());
                        fs::create_dir(&tree).unwrap();
                        open(home).set(&tree, size(20 * MIB)).unwrap();
                    }
                });
            }
        });
        let books = homes.iter().map(|home| open(home).ledger.read().unwrap());
        let mut given: Vec<u32> = books.flat_map(|book| book.trees.into_values().map(|entry| entry.project)).collect();
        given.sort();
        given.dedup();
        assert_eq!(given.len(), 20, "{given:?}");
    });
}

/// The process in a user namespace, if this is it.
#[test]
fn the_process_in_a_user_namespace() {
    let Ok(scratch) = std::env::var("GRAPHDRIVER_QUOTA_PROBE") else { return };
    let e = probe(Path::new(&scratch), &(700..=799)).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Unsupported, "{e}");
    assert!(e.to_string().contains("run as root outside of user namespaces"), "{e}");
}

#[test]
fn in_a_user_namespace_the_advice_is_to_leave_it() {
    each("in_a_user_namespace_the_advice_is_to_leave_it", |disk| {
        let scratch = disk.tree("scratch");
        let done = Command::new("unshare")
            .args(["-U", "-r"])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "project::real::the_process_in_a_user_namespace", "--nocapture"])
            .env("GRAPHDRIVER_QUOTA_PROBE", scratch)
            .output()
            .unwrap();
        let said = format!("{}{}", String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
        assert!(done.status.success() && said.contains("1 passed"), "{said}");
    });
}

#[test]
fn a_project_that_others_took_after_a_crash_is_left_to_them() {
    each("a_project_that_others_took_after_a_crash_is_left_to_them", |disk| {
        let quota = disk.quota(700..=799);
        let tree = disk.tree("t");
        let note = |book: &mut Book| {
            book.trees.insert("t".into(), Entry { project: 750, limits: size(20 * MIB), ready: false });
            Ok(())
        };
        quota.ledger.change(note).unwrap();
        // Killed here, before anything was put into the project.
        quota.kernel.set(750, size(5 * MIB)).unwrap();
        quota.reclaim(&|_| false).unwrap();
        let own = quota.project_at(&tree).unwrap().unwrap();
        assert_ne!(own, 750);
        let limits = [750, own].map(|project| quota.kernel.get(project).unwrap().limits);
        assert_eq!((limits, quota.read(&tree).unwrap().limits), ([size(5 * MIB), size(20 * MIB)], size(20 * MIB)));
    });
}

#[test]
fn things_are_tried_out_with_a_project_that_is_nobodys() {
    each("things_are_tried_out_with_a_project_that_is_nobodys", |disk| {
        let kernel = Kernel::of(&disk.path()).unwrap();
        kernel.set(799, size(MIB)).unwrap();
        tag::tag(&disk.tree("others"), 798).unwrap();
        assert_eq!(probe::spare(&kernel, &(700..=799)), 797);
        assert_eq!(probe::spare(&kernel, &(798..=799)), 799, "none is left");
    });
}

/// The process that is killed, if this is it: it limits trees, changes that, and removes them, until the end comes.
#[test]
fn the_process_that_is_killed() {
    let Ok(told) = std::env::var("GRAPHDRIVER_QUOTA_KILLED") else { return };
    let (seed, base) = told.split_once(' ').unwrap();
    let (mut random, base) = (seed.parse::<u64>().unwrap(), Path::new(base));
    let quota = ProjectQuota::open(base, 700..=799, "d.quota_projects").unwrap();
    let mut below = |n: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) % n
    };
    loop {
        let name = format!("t{}", below(4));
        let tree = base.join(&name);
        match (below(4), tree.exists()) {
            (_, false) => {
                fs::create_dir_all(tree.join("diff/d")).unwrap();
                (0..30).for_each(|n| fs::write(tree.join(format!("diff/d/{n}")), "x").unwrap());
            }
            (0, true) => {
                fs::remove_dir_all(&tree).unwrap();
                quota.forget(&name).unwrap();
            }
            (1, true) => quota.prepare(&name).unwrap(),
            (_, true) => quota.set(&tree, size((10 + below(50)) * MIB)).unwrap(),
        }
    }
}

/// Whether the ledger, the kernel's limits and the tags of files say the same of all trees, and nothing else has a project.
fn agree(quota: &ProjectQuota, base: &Path) {
    let trees = quota.ledger.read().unwrap().trees;
    for (name, entry) in &trees {
        let tree = base.join(name);
        assert!(entry.ready, "{name} {entry:?}");
        assert_eq!(tag::tag(&tree, entry.project).unwrap(), Tagged::default(), "{name} {entry:?}");
        assert_eq!(quota.kernel.get(entry.project).unwrap().limits, entry.limits, "{name} {entry:?}");
    }
    for dir in fs::read_dir(base).unwrap().flatten().filter(|entry| entry.file_type().unwrap().is_dir()) {
        let noted = trees.get(dir.file_name().to_str().unwrap()).map(|entry| entry.project);
        assert_eq!(quota.project_at(&dir.path()).unwrap(), noted, "{dir:?}");
    }
    let noted: HashSet<u32> = trees.values().map(|entry| entry.project).collect();
    let others = || quota.on_filesystem().unwrap().into_iter().filter(|(project, _)| !noted.contains(project));
    // xfs frees what was removed in the background.
    let freed = (0..100).any(|_| {
        std::thread::sleep(std::time::Duration::from_millis(100));
        others().next().is_none()
    });
    assert!(freed, "nobody's: {:?}", others().collect::<Vec<_>>());
}

#[test]
fn a_killed_process_leaves_ledger_kernel_and_tags_that_can_be_made_to_agree() {
    each("a_killed_process_leaves_ledger_kernel_and_tags_that_can_be_made_to_agree", |disk| {
        let (base, mut interrupted) = (disk.path(), 0);
        for round in 0..20u64 {
            let mut child = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "project::real::the_process_that_is_killed", "--nocapture"])
                .env("GRAPHDRIVER_QUOTA_KILLED", format!("{round} {}", base.display()))
                .stdout(std::process::Stdio::null())
                .spawn()
                .unwrap();
            std::thread::sleep(std::time::Duration::from_millis(400 + round * 137 % 500));
            assert_eq!(child.try_wait().unwrap(), None, "it failed by itself");
            child.kill().unwrap();
            child.wait().unwrap();
            let quota = disk.quota(700..=799);
            let before = quota.ledger.read().unwrap();
            quota.reclaim(&|name| !base.join(name).exists()).unwrap();
            interrupted += u32::from(quota.ledger.read().unwrap() != before);
            agree(&quota, &base);
        }
        let given = disk.quota(700..=799).ledger.read().unwrap().next;
        println!("{interrupted} of 20 kills left something to do, and the next project is {given}");
        assert_ne!(given, 0, "something was limited");
    });
}
