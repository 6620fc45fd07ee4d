//! The promises, each with its story.

mod bounded;
mod calls;
mod changes;
mod deep;
mod directories;
mod inodes;
mod lifecycle;

use super::{Case, Subject, random, twin::Twin};
use crate::{LayerId, Result, model::Op};

/// All cases.
pub fn cases() -> impl Iterator<Item = &'static Case> {
    let by_file = [
        lifecycle::CASES,
        changes::CASES,
        directories::CASES,
        inodes::CASES,
        calls::CASES,
        deep::CASES,
        bounded::CASES,
        &[random::CASE],
    ];
    by_file.into_iter().flatten()
}

/// For what is asked of every driver.
fn everyone(_: &dyn Subject) -> Result<(), &'static str> {
    Ok(())
}

/// For what needs owners, devices and attributes that an unprivileged user namespace does not have.
fn privileged(_: &dyn Subject) -> Result<(), &'static str> {
    match super::all_ids_are_mapped() {
        true => Ok(()),
        false => Err("this user namespace has neither other owners nor devices nor trusted attributes"),
    }
}

/// Makes layers, each on the one before, and compares each with the reference: while it is active, committed, and after
/// the driver was opened again.
fn exact(subject: &mut dyn Subject, layers: &[&[Op]]) -> Result<()> {
    let mut twin = Twin::new(subject)?;
    let mut parent = None;
    let mut made: Vec<LayerId> = Vec::new();
    for ops in layers {
        let id = twin.create(parent)?;
        twin.run(id, ops)?;
        twin.check(id)?;
        twin.commit(id)?;
        parent = Some(id);
        made.push(id);
    }
    twin.subject.reopen()?;
    made.into_iter().try_for_each(|id| twin.check(id))?;
    twin.remove_all()
}
