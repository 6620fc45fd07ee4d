//! The command about limits.

use super::{all, args::QuotaArgs, for_all, output::Output};
use graphdriver::{Engine, LimitChange};
use graphdriver_core::{ByteSize, Context, Error, ErrorKind, Result};

pub(crate) fn quota(engine: &Engine, out: &Output, args: &QuotaArgs) -> Result<()> {
    let change = LimitChange {
        size: args.size.as_deref().map(size).transpose()?,
        inodes: args.inodes.as_deref().map(inodes).transpose()?,
    };
    if change != LimitChange::default() {
        for_all(&args.containers, |container| engine.change_limits(container, &change))?;
    }
    let mut listed = Vec::new();
    let told = all(engine.quotas(&args.containers)?.into_iter().map(|line| line.map(|line| listed.push(line))));
    let header = ["CONTAINER ID", "NAME", "SIZE", "SIZE LIMIT", "INODES", "INODE LIMIT"];
    out.list(&header, &listed, |line| {
        let none = || "none".to_owned();
        vec![
            line.id[..12].into(),
            line.name.clone(),
            ByteSize(line.size).to_string(),
            line.size_limit.map_or_else(none, |size| ByteSize(size).to_string()),
            line.inodes.to_string(),
            line.inode_limit.map_or_else(none, |inodes| inodes.to_string()),
        ]
    })?;
    told
}

/// A size, or `none`.
fn size(text: &str) -> Result<Option<ByteSize>> {
    match text {
        "none" => Ok(None),
        size => size_limit(size).map(Some).doing(|| "reading --size").hint(|| "or none, to lift the limit"),
    }
}

pub(crate) fn size_limit(text: &str) -> Result<ByteSize> {
    match text.parse()? {
        ByteSize(0) => Err(Error::new(ErrorKind::InvalidInput, "a limit of 0 bytes lets nothing be written at all")),
        size => Ok(size),
    }
}

/// A number of inodes, or `none`.
fn inodes(text: &str) -> Result<Option<u64>> {
    if text == "none" { Ok(None) } else { number_of_inodes(text).map(Some).doing(|| "reading --inodes") }
}

pub(crate) fn number_of_inodes(text: &str) -> Result<u64> {
    text.parse().map_err(|_| {
        Error::new(ErrorKind::InvalidInput, format!("{text:?} is no number of inodes"))
            .hint("write a number like 100000, or none to lift the limit")
    })
}
