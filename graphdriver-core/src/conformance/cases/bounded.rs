//! Bounded: what limits do, where the driver claims them.

use super::{Case, Subject};
use crate::{
    Access, ByteSize, ErrorKind, LayerId, LayerOptions, Limits, Result, conformance::twin::snapshot, model::Op,
};
use rustix::io::Errno;
use std::path::Path;

pub(super) const CASES: &[Case] = &[
    Case {
        name: "what_fits_the_size_is_written_and_more_is_refused",
        story: "moby graphtest: 25 MB fit a 50 MB quota and 50 MB more are EDQUOT or ENOSPC",
        needs: quota,
        run: fits,
    },
    Case {
        name: "a_full_layer_breaks_nothing_else",
        story: "Bounded: siblings go on writing, the full layer is readable, and removing makes room again",
        needs: quota,
        run: full,
    },
    Case {
        name: "a_limit_is_read_raised_and_lifted_on_an_existing_layer",
        story: "Docker has no way to give a container that ran full more room: it has to be made anew",
        needs: quota,
        run: raised,
    },
    Case {
        name: "a_limit_below_what_is_taken_lets_nothing_more_in_and_loses_nothing",
        story: "Honest, bounded: it takes effect, or is refused and leaves the old one; what was written stays in any case",
        needs: quota,
        run: lowered,
    },
    Case {
        name: "limits_are_there_after_opening_again",
        story: "Durable: a limit that only the process that set it knows of is none",
        needs: quota,
        run: reopened,
    },
    Case {
        name: "a_layer_without_a_limit_gets_one_while_it_holds_files",
        story: "project quotas count what has the project's number: files made before must get it too",
        needs: quota,
        run: limited_late,
    },
    Case {
        name: "a_limit_may_be_larger_than_what_is_free",
        story: "limits are promises to stop somebody, not to have the space",
        needs: quota,
        run: larger_than_free,
    },
    Case {
        name: "inodes_are_limited",
        story: "containers/storage limits inodes on xfs: a container that makes millions of empty files stops them all",
        needs: inode_quota,
        run: inodes,
    },
];

const MB: u64 = 1_000_000;

/// 50 MB, or more where a layer cannot be so small. The cases write so many tenths of it.
fn limit(subject: &dyn Subject) -> u64 {
    subject.least_size().next_multiple_of(50 * MB).max(50 * MB)
}

fn quota(subject: &dyn Subject) -> Result<(), &'static str> {
    if subject.driver().capabilities().quota { Ok(()) } else { Err("the driver enforces no sizes here") }
}

fn inode_quota(subject: &dyn Subject) -> Result<(), &'static str> {
    if subject.driver().capabilities().inode_quota { Ok(()) } else { Err("the driver limits no inodes here") }
}

/// Writes pieces of 1 MB until it is done or refused.
fn write(subject: &dyn Subject, id: LayerId, parents: &[LayerId], name: &str, size: u64) -> Result<Result<(), Errno>> {
    let piece: Vec<u8> = (0..MB).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let mut outcome = Ok(());
    subject.with_tree(id, parents, Access::ReadWrite, &mut |tree| {
        outcome = (0..size / MB).try_for_each(|n| tree.apply(&Op::write_at(name, n * MB, &piece)));
        Ok(())
    })?;
    Ok(outcome)
}

/// A layer that is limited, on an empty one.
fn limited(subject: &dyn Subject) -> Result<(LayerId, LayerId)> {
    with(subject, LayerOptions { size: Some(ByteSize(limit(subject))), inodes: None, durable: true })
}

fn with(subject: &dyn Subject, options: LayerOptions) -> Result<(LayerId, LayerId)> {
    let (base, id) = (LayerId(1), LayerId(2));
    let driver = subject.driver();
    driver.create(base, &[], &LayerOptions::default())?;
    driver.commit(base)?;
    driver.create(id, &[base], &options)?;
    Ok((base, id))
}

fn size(bytes: u64) -> Limits {
    Limits { size: Some(ByteSize(bytes)), inodes: None }
}

#[track_caller]
fn refused(what: &str, outcome: Result<(), Errno>) {
    assert!(matches!(outcome, Err(Errno::DQUOT | Errno::NOSPC)), "{what} gave {outcome:?}");
}

/// A driver may round up to what its storage counts in.
#[track_caller]
fn about(found: Limits, wanted: u64) {
    let found = found.size.map_or(u64::MAX, |size| size.0);
    assert!((wanted..wanted + 5 * MB).contains(&found), "{found} for a limit of {wanted}");
}

fn fits(subject: &mut dyn Subject) -> Result<()> {
    let (base, id) = limited(subject)?;
    let limit = limit(subject);
    assert_eq!(write(subject, id, &[base], "fits", limit / 2)?, Ok(()));
    refused("as much as the limit", write(subject, id, &[base], "too-much", limit)?);
    Ok(())
}

fn full(subject: &mut dyn Subject) -> Result<()> {
    let (base, id) = limited(subject)?;
    let sibling = LayerId(3);
    subject.driver().create(sibling, &[base], &LayerOptions::default())?;
    let limit = limit(subject);
    refused("half more than the limit", write(subject, id, &[base], "too-much", limit / 2 * 3)?);
    assert_eq!(write(subject, sibling, &[base], "free", 60 * MB)?, Ok(()));
    assert!(snapshot(subject, id, &[base])?.contains_key(Path::new("too-much")));
    subject.with_tree(id, &[base], Access::ReadWrite, &mut |tree| Ok(tree.apply(&Op::unlink("too-much"))?))?;
    assert_eq!(write(subject, id, &[base], "again", limit / 2)?, Ok(()));
    subject.driver().commit(id)
}

fn raised(subject: &mut dyn Subject) -> Result<()> {
    let (base, id) = limited(subject)?;
    let limit = limit(subject);
    about(subject.driver().limits(id)?, limit);
    refused("half more than the limit", write(subject, id, &[base], "a", limit / 2 * 3)?);
    subject.driver().set_limits(id, size(limit * 3))?;
    about(subject.driver().limits(id)?, limit * 3);
    assert_eq!(write(subject, id, &[base], "a", limit / 2 * 3)?, Ok(()));
    refused("two thirds more", write(subject, id, &[base], "b", limit * 2)?);
    match subject.driver().set_limits(id, Limits::default()) {
        Ok(()) => {
            assert_eq!(subject.driver().limits(id)?, Limits::default());
            assert_eq!(write(subject, id, &[base], "b", limit * 2)?, Ok(()));
        }
        // A layer on a device of its own ends where that ends.
        Err(e) => {
            assert_eq!(e.kind(), ErrorKind::Unsupported, "{e:?}");
            about(subject.driver().limits(id)?, limit * 3);
        }
    }
    Ok(())
}

fn lowered(subject: &mut dyn Subject) -> Result<()> {
    let (base, id) = limited(subject)?;
    let limit = limit(subject);
    assert_eq!(write(subject, id, &[base], "kept", limit / 10 * 6)?, Ok(()));
    let before = snapshot(subject, id, &[base])?;
    match subject.driver().set_limits(id, size(limit / 5)) {
        Ok(()) => {
            about(subject.driver().limits(id)?, limit / 5);
            refused("anything more", write(subject, id, &[base], "more", limit / 5)?);
            subject.with_tree(id, &[base], Access::ReadWrite, &mut |tree| match tree.apply(&Op::unlink("more")) {
                // Not even its name came in.
                Err(Errno::NOENT) => Ok(()),
                done => Ok(done?),
            })?;
        }
        Err(e) => {
            assert!(matches!(e.kind(), ErrorKind::Unsupported | ErrorKind::InvalidInput), "{e:?}");
            about(subject.driver().limits(id)?, limit);
        }
    }
    let mut after = snapshot(subject, id, &[base])?;
    // Writing and removing the other file has changed its time.
    after.remove(Path::new(""));
    assert!(after.iter().all(|(path, node)| before.get(path) == Some(node)) && after.len() + 1 == before.len());
    subject.driver().set_limits(id, size(limit * 2))?;
    assert_eq!(write(subject, id, &[base], "again", limit / 10 * 8)?, Ok(()));
    Ok(())
}

fn reopened(subject: &mut dyn Subject) -> Result<()> {
    let (base, id) = limited(subject)?;
    let limit = limit(subject);
    subject.reopen()?;
    about(subject.driver().limits(id)?, limit);
    refused("half more than the limit", write(subject, id, &[base], "a", limit / 2 * 3)?);
    subject.driver().set_limits(id, size(limit * 2))?;
    subject.reopen()?;
    about(subject.driver().limits(id)?, limit * 2);
    assert_eq!(write(subject, id, &[base], "a", limit / 2 * 3)?, Ok(()));
    refused("as much again", write(subject, id, &[base], "b", limit / 2 * 3)?);
    Ok(())
}

fn limited_late(subject: &mut dyn Subject) -> Result<()> {
    let (base, id) = with(subject, LayerOptions::default())?;
    let limit = limit(subject);
    let tree = [Op::mkdir("d"), Op::mkdir("d/e"), Op::write("d/e/f", "1"), Op::symlink("s", "d")];
    subject.with_tree(id, &[base], Access::ReadWrite, &mut |t| Ok(tree.iter().try_for_each(|op| t.apply(op))?))?;
    assert_eq!(write(subject, id, &[base], "d/e/large", limit / 10 * 6)?, Ok(()));
    subject.driver().set_limits(id, size(limit))?;
    refused("more in a directory that was there", write(subject, id, &[base], "d/e/more", limit / 10 * 6)?);
    let moves = [Op::unlink("d/e/more"), Op::rename("d/e", "g"), Op::rename("g/f", "d/f"), Op::link("g/large", "d/l")];
    subject.with_tree(id, &[base], Access::ReadWrite, &mut |t| Ok(moves.iter().try_for_each(|op| t.apply(op))?))?;
    // A filesystem of the layer's own, with its log, takes a part of the limit.
    assert_eq!(write(subject, id, &[base], "g/again", limit / 10)?, Ok(()));
    Ok(())
}

fn larger_than_free(subject: &mut dyn Subject) -> Result<()> {
    let options = LayerOptions { size: Some(ByteSize(64 << 30)), inodes: None, durable: true };
    let (base, id) = with(subject, options)?;
    assert_eq!(write(subject, id, &[base], "a", 20 * MB)?, Ok(()));
    subject.driver().commit(id)
}

fn inodes(subject: &mut dyn Subject) -> Result<()> {
    const MOST: u64 = 100;
    let (base, id) = with(subject, LayerOptions { size: None, inodes: Some(MOST), durable: true })?;
    assert_eq!(subject.driver().limits(id)?, Limits { size: None, inodes: Some(MOST) });
    let make = |subject: &dyn Subject, from: u64| -> Result<(u64, Result<(), Errno>)> {
        let (mut made, mut outcome) = (0, Ok(()));
        subject.with_tree(id, &[base], Access::ReadWrite, &mut |tree| {
            while outcome.is_ok() && made < 2 * MOST {
                outcome = tree.apply(&Op::write(format!("f{}", from + made), ""));
                made += u64::from(outcome.is_ok());
            }
            Ok(())
        })?;
        Ok((made, outcome))
    };
    let (made, outcome) = make(subject, 0)?;
    refused("twice as many files", outcome);
    assert!((MOST / 2..=MOST).contains(&made), "{made} files fit into {MOST} inodes");
    subject.with_tree(id, &[base], Access::ReadWrite, &mut |tree| {
        (0..20).try_for_each(|n| tree.apply(&Op::unlink(format!("f{n}"))))?;
        Ok(())
    })?;
    let (again, outcome) = make(subject, 1000)?;
    refused("twice as many files", outcome);
    assert!((10..=40).contains(&again), "{again} files fit after 20 were removed");
    subject.driver().set_limits(id, Limits { size: None, inodes: Some(10 * MOST) })?;
    assert_eq!(make(subject, 2000)?, (2 * MOST, Ok(())));
    Ok(())
}
