//! Bounded: what a size limit does, where the driver claims one.

use super::{Case, Subject};
use crate::{Access, ByteSize, LayerId, LayerOptions, Result, conformance::twin::snapshot, model::Op};
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
];

const MB: u64 = 1_000_000;

/// 50 MB, or more where a layer cannot be so small.
fn limit(subject: &dyn Subject) -> u64 {
    subject.least_size().next_multiple_of(50 * MB).max(50 * MB)
}

fn quota(subject: &dyn Subject) -> Result<(), &'static str> {
    if subject.driver().capabilities().quota { Ok(()) } else { Err("the driver enforces no sizes here") }
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

fn limited(subject: &dyn Subject) -> Result<(LayerId, LayerId)> {
    let (base, id) = (LayerId(1), LayerId(2));
    let driver = subject.driver();
    driver.create(base, &[], &LayerOptions::default())?;
    driver.commit(base)?;
    driver.create(id, &[base], &LayerOptions { size: Some(ByteSize(limit(subject))), inodes: None, durable: true })?;
    Ok((base, id))
}

fn fits(subject: &mut dyn Subject) -> Result<()> {
    let (base, id) = limited(subject)?;
    let limit = limit(subject);
    assert_eq!(write(subject, id, &[base], "fits", limit / 2)?, Ok(()));
    let refused = write(subject, id, &[base], "too-much", limit)?;
    assert!(matches!(refused, Err(Errno::DQUOT | Errno::NOSPC)), "{limit} bytes more gave {refused:?}");
    Ok(())
}

fn full(subject: &mut dyn Subject) -> Result<()> {
    let (base, id) = limited(subject)?;
    let sibling = LayerId(3);
    subject.driver().create(sibling, &[base], &LayerOptions::default())?;
    let limit = limit(subject);
    let refused = write(subject, id, &[base], "too-much", limit / 2 * 3)?;
    assert!(matches!(refused, Err(Errno::DQUOT | Errno::NOSPC)), "{limit} bytes and half as many gave {refused:?}");
    assert_eq!(write(subject, sibling, &[base], "free", 60 * MB)?, Ok(()));
    assert!(snapshot(subject, id, &[base])?.contains_key(Path::new("too-much")));
    subject.with_tree(id, &[base], Access::ReadWrite, &mut |tree| Ok(tree.apply(&Op::unlink("too-much"))?))?;
    assert_eq!(write(subject, id, &[base], "again", limit / 2)?, Ok(()));
    subject.driver().commit(id)
}
