//! Atomic, honest, durable, isolated: what the calls themselves promise.

use super::{Case, Subject, Twin, everyone, privileged};
use crate::{
    Access, ByteSize, ErrorKind, FileKind, LayerId, LayerOptions, Result, StoredAs, Usage, WriteStrategy,
    conformance::twin::{same_tree, snapshot},
    model::Op,
};
use std::{collections::BTreeMap, path::Path, thread, time::Duration};

pub(super) const CASES: &[Case] = &[
    Case {
        name: "an_empty_layer_is_an_empty_root_of_mode_0755",
        story: "moby graphtest, containerd testsuite: a root of mode 0700 locks every user but root out of the container",
        needs: everyone,
        run: empty_layer,
    },
    Case {
        name: "create_of_an_existing_layer_is_refused",
        story: "Atomic: a second create must not hand out, or wipe, what somebody else is filling",
        needs: everyone,
        run: create_twice,
    },
    Case {
        name: "an_unknown_parent_is_refused_and_nothing_is_left",
        story: "Honest, atomic: a layer without its parents shows half an image",
        needs: everyone,
        run: unknown_parent,
    },
    Case {
        name: "calls_on_an_unknown_layer_are_not_found",
        story: "Honest: commit, mount and usage of what is not there",
        needs: everyone,
        run: unknown_layer,
    },
    Case {
        name: "remove_can_be_repeated",
        story: "Atomic: an interrupted removal is finished by removing again",
        needs: everyone,
        run: remove_twice,
    },
    Case {
        name: "commit_can_be_repeated",
        story: "Atomic: an interrupted commit is finished by committing again",
        needs: everyone,
        run: commit_twice,
    },
    Case {
        name: "a_commit_can_be_undone",
        story: "Atomic: what the store could not record, or a crash cut off, did not happen",
        needs: everyone,
        run: thaw,
    },
    Case {
        name: "a_number_can_be_made_again_after_removal",
        story: "containerd testsuite, key reuse after remove: nothing of the old layer may shine through",
        needs: everyone,
        run: make_again,
    },
    Case {
        name: "reclaim_frees_the_unknown_and_keeps_the_known",
        story: "Atomic: what a crash left behind is freed, and nothing else",
        needs: everyone,
        run: reclaim,
    },
    Case {
        name: "what_a_crash_left_is_invisible_and_can_be_made_over",
        story: "Atomic: create of a number with leftovers succeeds, remove and reclaim free them",
        needs: |subject| subject.crash().map(drop).ok_or("the subject has no way to leave what a crash leaves"),
        run: leftovers,
    },
    Case {
        name: "a_size_that_cannot_be_enforced_is_refused",
        story: "Honest: Docker's overlay2 once took size on ext4 and ignored it; the refusal says what is missing",
        needs: |subject| match subject.driver().capabilities().quota {
            true => Err("the driver enforces sizes"),
            false => Ok(()),
        },
        run: size_refused,
    },
    Case {
        name: "a_committed_layer_cannot_be_mounted_for_writing",
        story: "Isolated: committed layers are immutable, their children rely on it",
        needs: everyone,
        run: committed_is_read_only,
    },
    Case {
        name: "a_read_only_mount_gives_erofs",
        story: "containerd testsuite: a view is read-only on a real mount, for active and committed layers",
        needs: everyone,
        run: read_only,
    },
    Case {
        name: "siblings_and_parent_never_see_a_layers_changes",
        story: "Isolated: every kind of change in one child, none visible in the other or in the parent",
        needs: privileged,
        run: isolated,
    },
    Case {
        name: "layers_are_there_after_opening_again",
        story: "Durable: a driver remembers nothing but what lies on its disk",
        needs: everyone,
        run: reopened,
    },
    Case {
        name: "release_and_mount_again_shows_the_same",
        story: "containerd testsuite, close twice: release is a hint and loses nothing, however often it is given",
        needs: everyone,
        run: release,
    },
    Case {
        name: "usage_counts_the_layers_own_and_not_its_parents",
        story: "moby graphtest, diff sizes agree: df must not count a base image once per container",
        needs: everyone,
        run: usage,
    },
    Case {
        name: "an_active_layers_usage_is_what_is_kept_of_it_at_commit",
        story: "Exact: who counts as it is written to, and who walks over it afterwards, come to the same figure",
        needs: |subject| match subject.driver().capabilities().write_strategy {
            WriteStrategy::CopyUp { .. } => Ok(()),
            _ => Err("its usage is not that of the files in a layer"),
        },
        run: usage_while_active,
    },
    Case {
        name: "threads_making_different_layers_do_not_disturb_each_other",
        story: "all methods may be called from several threads at once, for different layers",
        needs: everyone,
        run: threads,
    },
];

const PLAIN: &LayerOptions = &LayerOptions { size: None, inodes: None, durable: true };
const A: LayerId = LayerId(1);
const B: LayerId = LayerId(2);
const C: LayerId = LayerId(3);

fn write(subject: &dyn Subject, id: LayerId, parents: &[LayerId], ops: &[Op]) -> Result<()> {
    subject.with_tree(id, parents, Access::ReadWrite, &mut |tree| {
        ops.iter().try_for_each(|op| tree.apply(op))?;
        Ok(())
    })
}

fn kind<T: std::fmt::Debug>(result: Result<T>) -> ErrorKind {
    result.expect_err("this must be refused").kind()
}

fn names(subject: &dyn Subject, id: LayerId, parents: &[LayerId]) -> Result<Vec<String>> {
    Ok(snapshot(subject, id, parents)?.keys().map(|path| path.display().to_string()).collect())
}

fn empty_layer(subject: &mut dyn Subject) -> Result<()> {
    subject.driver().create(A, &[], PLAIN)?;
    let shown = snapshot(subject, A, &[])?;
    assert_eq!(shown.len(), 1, "an empty layer shows {:?}", shown.keys());
    let root = &shown[Path::new("")].meta;
    assert_eq!((root.kind.clone(), root.mode, root.uid, root.gid), (FileKind::Directory, 0o755, 0, 0));
    assert!(root.xattrs.is_empty(), "the root has {:?}", root.xattrs);
    subject.driver().create(B, &[], PLAIN)?;
    subject.driver().commit(B)?;
    subject.driver().create(C, &[B], PLAIN)?;
    assert_eq!(names(subject, C, &[B])?, [""]);
    Ok(())
}

fn create_twice(subject: &mut dyn Subject) -> Result<()> {
    subject.driver().create(A, &[], PLAIN)?;
    write(subject, A, &[], &[Op::write("kept", "1")])?;
    assert_eq!(kind(subject.driver().create(A, &[], PLAIN)), ErrorKind::AlreadyExists);
    subject.driver().commit(A)?;
    assert_eq!(kind(subject.driver().create(A, &[], PLAIN)), ErrorKind::AlreadyExists);
    assert_eq!(names(subject, A, &[])?, ["", "kept"]);
    Ok(())
}

fn unknown_parent(subject: &mut dyn Subject) -> Result<()> {
    subject.driver().create(A, &[], PLAIN)?;
    subject.driver().commit(A)?;
    for parents in [&[B][..], &[A, B], &[B, A]] {
        assert_eq!(kind(subject.driver().create(C, parents, PLAIN)), ErrorKind::NotFound, "on {parents:?}");
    }
    let freed = subject.driver().reclaim(&|id| id == A)?;
    assert_eq!(freed.layers, 0, "the failed create left {freed:?}");
    subject.driver().create(C, &[A], PLAIN)
}

fn unknown_layer(subject: &mut dyn Subject) -> Result<()> {
    let driver = subject.driver();
    assert_eq!(kind(driver.commit(A)), ErrorKind::NotFound);
    assert_eq!(kind(driver.mount(A, &[], Access::ReadOnly)), ErrorKind::NotFound);
    assert_eq!(kind(driver.mount(A, &[], Access::ReadWrite)), ErrorKind::NotFound);
    assert_eq!(kind(driver.usage(A)), ErrorKind::NotFound);
    driver.remove(A)
}

fn remove_twice(subject: &mut dyn Subject) -> Result<()> {
    subject.driver().create(A, &[], PLAIN)?;
    write(subject, A, &[], &[Op::mkdir("d"), Op::write("d/f", "1")])?;
    subject.driver().remove(A)?;
    subject.driver().remove(A)?;
    assert_eq!(kind(subject.driver().mount(A, &[], Access::ReadOnly)), ErrorKind::NotFound);
    Ok(())
}

fn commit_twice(subject: &mut dyn Subject) -> Result<()> {
    subject.driver().create(A, &[], PLAIN)?;
    write(subject, A, &[], &[Op::write("f", "1")])?;
    let before = snapshot(subject, A, &[])?;
    for time in ["once", "twice"] {
        subject.driver().commit(A)?;
        same_tree(&format!("the layer committed {time}"), &snapshot(subject, A, &[])?, &before);
    }
    Ok(())
}

fn thaw(subject: &mut dyn Subject) -> Result<()> {
    subject.driver().create(A, &[], PLAIN)?;
    write(subject, A, &[], &[Op::write("f", "1"), Op::mkdir("d")])?;
    for text in ["2", "3"] {
        subject.driver().commit(A)?;
        // Also of one that is active.
        for _ in 0..2 {
            subject.driver().thaw(A)?;
        }
        write(subject, A, &[], &[Op::write("f", text)])?;
    }
    let before = snapshot(subject, A, &[])?;
    subject.driver().commit(A)?;
    same_tree("the layer committed in the end", &snapshot(subject, A, &[])?, &before);
    assert_eq!(kind(subject.driver().thaw(B)), ErrorKind::NotFound);
    Ok(())
}

fn make_again(subject: &mut dyn Subject) -> Result<()> {
    subject.driver().create(A, &[], PLAIN)?;
    subject.driver().commit(A)?;
    for n in 0..3 {
        subject.driver().create(B, &[A], PLAIN)?;
        assert_eq!(names(subject, B, &[A])?, [""], "round {n}");
        write(subject, B, &[A], &[Op::write("f", "1"), Op::mkdir("d")])?;
        subject.driver().commit(B)?;
        subject.driver().remove(B)?;
    }
    Ok(())
}

/// The layers in the storage, each with whether it is committed, and how much else of the driver's there is.
fn stored(subject: &dyn Subject) -> Result<(BTreeMap<LayerId, bool>, usize)> {
    let (mut layers, mut rest) = (BTreeMap::new(), 0);
    for stored in subject.driver().inventory()? {
        match stored.what {
            StoredAs::Layer { id, committed } => assert_eq!(layers.insert(id, committed), None, "{}", stored.place),
            StoredAs::Leftover { .. } => rest += 1,
            StoredAs::Damaged { .. } => panic!("{stored:?}"),
            StoredAs::Alien => {}
        }
    }
    Ok((layers, rest))
}

fn reclaim(subject: &mut dyn Subject) -> Result<()> {
    subject.driver().create(A, &[], PLAIN)?;
    write(subject, A, &[], &[Op::write("f", "1")])?;
    subject.driver().commit(A)?;
    subject.driver().create(B, &[A], PLAIN)?;
    write(subject, B, &[A], &[Op::write("g", vec![1; 1 << 20])])?;
    subject.driver().create(C, &[A], PLAIN)?;
    write(subject, C, &[A], &[Op::write("h", "1")])?;
    assert_eq!(stored(subject)?, (BTreeMap::from([(A, true), (B, false), (C, false)]), 0));
    let freed = subject.driver().reclaim(&|id| id != B)?;
    assert_eq!(freed.layers, 1);
    assert_eq!(stored(subject)?, (BTreeMap::from([(A, true), (C, false)]), 0));
    assert_eq!(kind(subject.driver().mount(B, &[A], Access::ReadOnly)), ErrorKind::NotFound);
    assert_eq!(names(subject, C, &[A])?, ["", "f", "h"]);
    assert_eq!(subject.driver().reclaim(&|id| id != B)?.layers, 0, "the second time there is nothing left");
    subject.driver().create(B, &[A], PLAIN)?;
    assert_eq!(names(subject, B, &[A])?, ["", "f"]);
    Ok(())
}

fn leftovers(subject: &mut dyn Subject) -> Result<()> {
    let crash = |subject: &dyn Subject, id| subject.crash().expect("the case needs it")(id);
    subject.driver().create(A, &[], PLAIN)?;
    subject.driver().commit(A)?;
    crash(subject, B)?;
    subject.reopen()?;
    assert_eq!(kind(subject.driver().mount(B, &[A], Access::ReadOnly)), ErrorKind::NotFound);
    subject.driver().create(B, &[A], PLAIN)?;
    assert_eq!(names(subject, B, &[A])?, [""]);
    // What create made over may have left something that only reclaim finds.
    subject.driver().reclaim(&|_| true)?;
    let whole = (BTreeMap::from([(A, true), (B, false)]), 0);
    assert_eq!(stored(subject)?, whole);
    crash(subject, C)?;
    assert_ne!(stored(subject)?, whole, "the inventory has the leftovers");
    subject.driver().remove(C)?;
    assert_eq!(stored(subject)?, whole);
    assert_eq!(subject.driver().reclaim(&|id| id != C)?.layers, 0, "remove freed the leftovers");
    crash(subject, C)?;
    assert!(subject.driver().reclaim(&|id| id != C)?.layers > 0, "reclaim finds the leftovers");
    assert_eq!(subject.driver().reclaim(&|id| id != C)?.layers, 0, "and frees them");
    assert_eq!(names(subject, B, &[A])?, [""]);
    Ok(())
}

fn size_refused(subject: &mut dyn Subject) -> Result<()> {
    let sized = LayerOptions { size: Some(ByteSize(1 << 20)), inodes: None, durable: true };
    let refusal = subject.driver().create(A, &[], &sized).expect_err("a size nobody enforces was accepted");
    assert_eq!(refusal.kind(), ErrorKind::Unsupported);
    assert!(refusal.to_string().len() > 20, "a refusal has to say what is missing: {refusal}");
    assert_eq!(subject.driver().reclaim(&|_| false)?.layers, 0, "the refused create left something");
    subject.driver().create(A, &[], PLAIN)
}

fn committed_is_read_only(subject: &mut dyn Subject) -> Result<()> {
    subject.driver().create(A, &[], PLAIN)?;
    subject.driver().commit(A)?;
    assert_eq!(kind(subject.driver().mount(A, &[], Access::ReadWrite)), ErrorKind::InvalidInput);
    subject.driver().mount(A, &[], Access::ReadOnly).map(drop)
}

fn read_only(subject: &mut dyn Subject) -> Result<()> {
    subject.driver().create(A, &[], PLAIN)?;
    write(subject, A, &[], &[Op::write("f", "1"), Op::mkdir("d")])?;
    let attempts = [
        Op::write("f", "2"),
        Op::write("new", "2"),
        Op::mkdir("e"),
        Op::unlink("f"),
        Op::rename("f", "g"),
        Op::chmod("f", 0o600),
        Op::set_xattr("d", "user.x", "1"),
        Op::utimes("", 1, 0),
    ];
    let try_all = |subject: &dyn Subject, id, parents: &[LayerId]| {
        subject.with_tree(id, parents, Access::ReadOnly, &mut |tree| {
            for op in &attempts {
                assert_eq!(tree.apply(op), Err(rustix::io::Errno::ROFS), "{op:?}");
            }
            Ok(())
        })
    };
    try_all(subject, A, &[])?;
    subject.driver().commit(A)?;
    try_all(subject, A, &[])?;
    subject.driver().create(B, &[A], PLAIN)?;
    try_all(subject, B, &[A])?;
    assert_eq!(names(subject, B, &[A])?, ["", "d", "f"]);
    Ok(())
}

fn isolated(subject: &mut dyn Subject) -> Result<()> {
    let lower = [
        Op::mkdir("d"),
        Op::mkdir("d/sub"),
        Op::write("d/sub/x", "x"),
        Op::write("f", vec![7; 20_000]),
        Op::link("f", "f2"),
        Op::symlink("s", "f"),
        Op::write("gone", "1"),
        Op::set_xattr("f", "user.a", "1"),
    ];
    let every_kind = [
        Op::write_at("f", 5000, "changed"),
        Op::truncate("f", 9000),
        Op::punch("f", 0, 4096),
        Op::chmod("d", 0o700),
        Op::chown("d/sub/x", 7, 8),
        Op::utimes("d/sub", 1, 1),
        Op::set_xattr("f", "user.a", "2"),
        Op::set_xattr("d", "user.b", "2"),
        Op::unlink("gone"),
        Op::unlink("s"),
        Op::symlink("s", "elsewhere"),
        Op::rename("d/sub/x", "y"),
        Op::rmdir("d/sub"),
        Op::write("d/sub", "now a file"),
        Op::link("y", "z"),
        Op::mknod("p", FileKind::Fifo),
    ];
    let mut twin = Twin::new(subject)?;
    let base = twin.layer(None, &lower)?;
    let (one, other) = (twin.create(Some(base))?, twin.create(Some(base))?);
    twin.run(one, &every_kind)?;
    twin.check_tree(base)?;
    twin.check_tree(other)?;
    twin.run(other, &[Op::write("only-here", "1")])?;
    for id in [one, other, base] {
        twin.check(id)?;
    }
    twin.commit(one)?;
    let grandchild = twin.layer(Some(one), &[Op::unlink("y"), Op::write("f", "again")])?;
    twin.remove(other)?;
    for id in [grandchild, one, base] {
        twin.check(id)?;
    }
    Ok(())
}

fn reopened(subject: &mut dyn Subject) -> Result<()> {
    let mut twin = Twin::new(subject)?;
    let base = twin.layer(None, &[Op::mkdir("d"), Op::write("d/f", "1")])?;
    let active = twin.create(Some(base))?;
    twin.run(active, &[Op::write("d/f", "2"), Op::write("g", "3")])?;
    twin.subject.reopen()?;
    twin.check(base)?;
    twin.check(active)?;
    twin.run(active, &[Op::unlink("d/f"), Op::write("h", "4")])?;
    twin.commit(active)?;
    twin.subject.reopen()?;
    assert_eq!(kind(twin.subject.driver().mount(active, &[base], Access::ReadWrite)), ErrorKind::InvalidInput);
    twin.check(active)
}

fn release(subject: &mut dyn Subject) -> Result<()> {
    let mut twin = Twin::new(subject)?;
    let base = twin.layer(None, &[Op::write("f", "1")])?;
    let active = twin.create(Some(base))?;
    for n in 0..3 {
        twin.run(active, &[Op::write(format!("f{n}"), "1")])?;
        twin.subject.driver().release(active)?;
        twin.subject.driver().release(active)?;
        twin.subject.driver().release(base)?;
        twin.check_tree(active)?;
    }
    Ok(())
}

fn usage(subject: &mut dyn Subject) -> Result<()> {
    const MIB: u64 = 1 << 20;
    let used = |subject: &dyn Subject, id| subject.driver().usage(id).map(|usage| usage.bytes);
    let overhead = subject.overhead();
    subject.driver().create(A, &[], PLAIN)?;
    let empty = subject.driver().usage(A)?;
    // Random enough that no filesystem compresses it away.
    let data: Vec<u8> = (0..4 * MIB).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    write(subject, A, &[], &[Op::write("big", &data), Op::mkdir("d"), Op::symlink("s", "big")])?;
    subject.driver().commit(A)?;
    let full = subject.driver().usage(A)?;
    assert!(
        (4 * MIB..6 * MIB + overhead).contains(&(full.bytes - empty.bytes)),
        "4 MiB written take {} bytes",
        full.bytes
    );
    assert_eq!(full.inodes, empty.inodes + 3);
    subject.driver().create(B, &[A], PLAIN)?;
    assert!(used(subject, B)? < MIB + overhead, "an empty child takes {} bytes", used(subject, B)?);
    write(subject, B, &[A], &[Op::write("more", &data[..2 * MIB as usize])])?;
    subject.driver().commit(B)?;
    assert!(
        (2 * MIB..3 * MIB + overhead).contains(&used(subject, B)?),
        "2 MiB written take {} bytes",
        used(subject, B)?
    );
    assert_eq!(subject.driver().usage(A)?, full, "a child changed what its parent takes");
    Ok(())
}

fn usage_while_active(subject: &mut dyn Subject) -> Result<()> {
    let names = || (0..20).map(|n| format!("d/{n}"));
    let mut lower = vec![Op::mkdir("d"), Op::mkdir("anew")];
    lower.extend(names().map(|name| Op::write(name, "1")));
    subject.driver().create(A, &[], PLAIN)?;
    write(subject, A, &[], &lower)?;
    subject.driver().commit(A)?;
    subject.driver().create(B, &[A], PLAIN)?;
    let mut ops =
        vec![Op::mkdir("n"), Op::write("n/f", vec![7; 300_000]), Op::link("n/f", "n/g"), Op::symlink("s", "n/f")];
    ops.extend([Op::mknod("fifo", FileKind::Fifo), Op::write("gone", vec![7; 100_000]), Op::unlink("gone")]);
    ops.extend([Op::rmdir("anew"), Op::mkdir("anew"), Op::write("anew/f", "1"), Op::rename("anew/f", "moved")]);
    // Whiteouts, which may be one inode with many names.
    ops.extend(names().map(Op::unlink));
    ops.extend((0..200).map(|n| Op::write(format!("n/many-{n}"), "1")));
    write(subject, B, &[A], &ops)?;
    subject.driver().release(B)?;
    let active = settled(|| subject.driver().usage(B))?;
    assert!(active.inodes > 200, "{active:?}");
    subject.driver().commit(B)?;
    assert_eq!(subject.driver().usage(B)?, active, "while it was active, and once it is committed");
    Ok(())
}

/// What the filesystem tells when it has allocated and freed, in the background, what it was asked to.
fn settled(usage: impl Fn() -> Result<Usage>) -> Result<Usage> {
    rustix::fs::sync();
    let mut last = usage()?;
    for _ in 0..20 {
        thread::sleep(Duration::from_millis(300));
        let now = usage()?;
        if now == last {
            break;
        }
        last = now;
    }
    Ok(last)
}

fn threads(subject: &mut dyn Subject) -> Result<()> {
    subject.driver().create(A, &[], PLAIN)?;
    write(subject, A, &[], &[Op::write("f", "1")])?;
    subject.driver().commit(A)?;
    let driver = subject.driver();
    let work = |from: u64| -> Result<()> {
        for id in (from..from + 10).map(LayerId) {
            driver.create(id, &[A], PLAIN)?;
            driver.mount(id, &[A], Access::ReadWrite)?;
            driver.release(id)?;
            driver.commit(id)?;
            if id.0 % 2 == 0 {
                driver.remove(id)?;
            }
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (1..=4).map(|n| scope.spawn(move || work(n * 100))).collect();
        workers.into_iter().try_for_each(|worker| worker.join().expect("a thread of the case panicked"))
    })?;
    for id in (1..=4).flat_map(|n| n * 100..n * 100 + 10).map(LayerId) {
        match id.0 % 2 {
            0 => assert_eq!(kind(subject.driver().mount(id, &[A], Access::ReadOnly)), ErrorKind::NotFound),
            _ => assert_eq!(names(subject, id, &[A])?, ["", "f"]),
        }
    }
    Ok(())
}
