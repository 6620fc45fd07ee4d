//! ZFS datasets, limited by their property `refquota` (zfsprops(7)) through the `zfs` command (zfs(8)).
//!
//! A tree is a dataset by its name, `tank/containers/7`. `refquota` limits what the dataset refers to, including what a
//! clone shares with its origin. ZFS counts when it writes a transaction group, so that a writer may get a few seconds'
//! worth of data further than the limit before it gets EDQUOT.

use crate::{Quota, State};
use graphdriver_core::{ByteSize, Context, Error, ErrorKind, Limits, Result, Usage};
use std::{
    collections::HashSet,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::{Mutex, PoisonError},
    thread::sleep,
    time::{Duration, Instant},
};

/// The datasets of this host.
#[derive(Debug, Clone, Copy, Default)]
pub struct RefQuota;

impl Quota for RefQuota {
    /// `Unsupported` too for a limit below what the dataset refers to already, which ZFS does not take.
    fn set(&self, tree: &Path, limits: Limits) -> Result<()> {
        if limits.inodes.is_some() {
            return Err(no_inode_limit());
        }
        let name = dataset(tree)?;
        let doing = || format!("limiting dataset {name}");
        let Some(ByteSize(wanted)) = limits.size else {
            return set_property(name, "refquota", "none").doing(doing);
        };
        if wanted == 0 {
            let why = "a limit of 0 bytes is none for ZFS";
            return Err(Error::new(ErrorKind::InvalidInput, why).hint("the smallest is 1").doing(doing()));
        }
        match set_property(name, "refquota", &wanted.to_string()) {
            Err(e) if e.reason().contains("less than current used") => {
                let taken = numbers(name, &["referenced"])?[0];
                let why = format!("ZFS takes no limit of {wanted} bytes for what refers to {taken} already");
                let hint = "remove something from it first, or allow more";
                Err(Error::new(ErrorKind::Unsupported, why).hint(hint).doing(doing()))
            }
            other => other.doing(doing),
        }
    }

    fn read(&self, tree: &Path) -> Result<State> {
        let name = dataset(tree)?;
        let read = || {
            let [bytes, limit] = numbers(name, &["referenced", "refquota"])?[..] else {
                unreachable!("two were asked for")
            };
            let inodes = objects(name)?.unwrap_or_default();
            Ok(state(bytes, inodes, limit))
        };
        read().map_err(|e: Error| e.doing(format!("reading the limit of dataset {name}")))
    }

    fn remove(&self, tree: &Path) -> Result<()> {
        match self.set(tree, Limits::default()) {
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    fn list(&self) -> Result<Vec<(PathBuf, State)>> {
        let out = zfs(&["list", "-Hp", "-t", "filesystem", "-o", "name,referenced,refquota"])?;
        let mut all = Vec::new();
        for [name, bytes, limit] in rows(&out)? {
            let (bytes, limit) = (number(&bytes)?, number(&limit)?);
            if limit > 0 {
                all.push((PathBuf::from(&name), state(bytes, objects(&name)?.unwrap_or_default(), limit)));
            }
        }
        Ok(all)
    }
}

fn state(bytes: u64, inodes: u64, limit: u64) -> State {
    let size = (limit > 0).then_some(ByteSize(limit));
    State { used: Usage { bytes, inodes }, limits: Limits { size, inodes: None } }
}

/// Why there is no limit on inodes.
pub fn no_inode_limit() -> Error {
    let why = "ZFS limits the number of files per user, group and project, and not of a dataset";
    Error::new(ErrorKind::Unsupported, why).hint("limit the size")
}

/// Sets a property of a dataset.
pub fn set_property(dataset: &str, property: &str, value: &str) -> Result<()> {
    zfs(&["set", &format!("{property}={value}"), dataset]).map(drop)
}

/// Properties of a dataset or snapshot that are numbers, in the order asked for; what it has not is 0.
pub fn numbers(dataset: &str, properties: &[&str]) -> Result<Vec<u64>> {
    let out = zfs(&["list", "-Hp", "-o", &properties.join(","), dataset])?;
    let line = out.lines().next().unwrap_or_default();
    let found: Vec<u64> = line.split('\t').map(number).collect::<Result<_>>()?;
    if found.len() == properties.len() { Ok(found) } else { Err(odd_output(line)) }
}

/// The number of files, directories and all else in a dataset or snapshot, from its counts by owner; None where the pool
/// does not count them (zpool-features(7), `userobj_accounting`). As of the last transaction group. Waits up to 5 seconds for
/// others who look at a dataset that is not mounted: ZFS lets one at a time.
pub fn objects(dataset: &str) -> Result<Option<u64>> {
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let until = Instant::now() + Duration::from_secs(5);
    let out = loop {
        match zfs(&["userspace", "-Hpn", "-o", "objused", dataset]) {
            Err(e) if e.kind() == ErrorKind::Busy && Instant::now() < until => sleep(Duration::from_millis(20)),
            done => break done?,
        }
    };
    Ok(out.lines().map(|line| line.trim().parse::<u64>().ok()).sum())
}

/// Runs the `zfs` command, without a shell and in the C locale, and returns what it printed. What it says on failure
/// becomes an error with its meaning.
pub fn zfs(arguments: &[&str]) -> Result<String> {
    run("zfs", arguments)
}

/// The same for `zpool`.
pub fn zpool(arguments: &[&str]) -> Result<String> {
    run("zpool", arguments)
}

/// Which of these datasets and snapshots are there.
pub fn existing<'n>(names: &[&'n str]) -> Result<HashSet<&'n str>> {
    let found: HashSet<String> = list(&[], names)?.into_iter().map(|row| row.name).collect();
    Ok(names.iter().copied().filter(|name| found.contains(*name)).collect())
}

/// A dataset or snapshot that is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Its full name.
    pub name: String,
    /// Its properties, in the order asked for, as `-p` prints them.
    pub values: Vec<String>,
}

/// Properties of those of these datasets and snapshots that are there, with one run of the command.
pub fn list(properties: &[&str], names: &[&str]) -> Result<Vec<Row>> {
    let columns = [&["name"], properties].concat().join(",");
    let arguments = [&["list", "-Hp", "-t", "all", "-o", columns.as_str()], names].concat();
    let out = output("zfs", &arguments)?;
    let said = String::from_utf8_lossy(&out.stderr);
    if !out.status.success()
        && (said.is_empty() || said.lines().any(|line| failure(line).kind() != ErrorKind::NotFound))
    {
        return Err(failure(&said).doing(format!("zfs {}", arguments.join(" "))));
    }
    let found = String::from_utf8_lossy(&out.stdout);
    let row = |line: &str| {
        let mut fields = line.split('\t').map(str::to_owned);
        let row = Row { name: fields.next().unwrap_or_default(), values: fields.collect() };
        if row.values.len() == properties.len() { Ok(row) } else { Err(odd_output(line)) }
    };
    found.lines().map(row).collect()
}

fn run(program: &str, arguments: &[&str]) -> Result<String> {
    let doing = || format!("{program} {}", arguments.join(" "));
    let out = output(program, arguments).map_err(|e| e.doing(doing()))?;
    if !out.status.success() {
        return Err(failure(&String::from_utf8_lossy(&out.stderr)).doing(doing()));
    }
    String::from_utf8(out.stdout).map_err(|_| odd_output("it is not UTF-8").doing(doing()))
}

fn output(program: &str, arguments: &[&str]) -> Result<Output> {
    // Not everybody has the directories of system programs in PATH.
    for dir in ["", "/usr/sbin/", "/sbin/", "/usr/local/sbin/"] {
        let mut command = Command::new(format!("{dir}{program}"));
        match command.args(arguments).env("LC_ALL", "C").stdin(Stdio::null()).output() {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
            out => return Ok(out?),
        }
    }
    Err(Error::new(ErrorKind::Unsupported, format!("the program {program} is not installed"))
        .hint("apt-get install zfsutils-linux (Debian: from contrib)"))
}

/// What the messages of libzfs mean (OpenZFS `lib/libzfs/libzfs_util.c`, `libzfs_error_description`).
fn failure(said: &str) -> Error {
    const MEANINGS: &[(&str, ErrorKind)] = &[
        ("does not exist", ErrorKind::NotFound),
        ("no such pool", ErrorKind::NotFound),
        ("already exists", ErrorKind::AlreadyExists),
        ("is busy", ErrorKind::Busy),
        ("has children", ErrorKind::Busy),
        ("has dependent clones", ErrorKind::Busy),
        ("out of space", ErrorKind::OutOfSpace),
        ("no space left", ErrorKind::OutOfSpace),
        ("quota exceeded", ErrorKind::QuotaExceeded),
        ("ermission denied", ErrorKind::PermissionDenied),
        ("read-only", ErrorKind::Unsupported),
        ("/dev/zfs", ErrorKind::Unsupported),
        ("modules", ErrorKind::Unsupported),
        ("invalid", ErrorKind::InvalidInput),
    ];
    let said = said.trim();
    let meaning = MEANINGS.iter().find(|(words, _)| said.contains(words));
    Error::new(meaning.map_or(ErrorKind::Io, |(_, kind)| *kind), said.replace('\n', "; "))
}

/// The lines of what `zfs list -H` and `zfs get -H` print: fields with a tab between each two.
pub fn rows<const N: usize>(out: &str) -> Result<Vec<[String; N]>> {
    let row = |line: &str| -> Result<[String; N]> {
        let fields: Vec<String> = line.split('\t').map(str::to_owned).collect();
        fields.try_into().map_err(|_| odd_output(line))
    };
    out.lines().map(row).collect()
}

/// A number as `-p` prints it; `-` and `none` are 0.
pub fn number(field: &str) -> Result<u64> {
    match field {
        "-" | "none" => Ok(0),
        field => field.parse().map_err(|_| odd_output(field)),
    }
}

fn odd_output(what: &str) -> Error {
    Error::new(ErrorKind::Corrupt, format!("the zfs command printed something unknown: {what:?}"))
}

/// The name of a dataset that a tree is.
fn dataset(tree: &Path) -> Result<&str> {
    let name = tree.to_str().unwrap_or_default();
    check_name(name).map(|()| name)
}

/// Whether this can be the name of a dataset or pool, and nothing else (OpenZFS `module/zcommon/zfs_namecheck.c`,
/// which also takes spaces): no option, no snapshot, no property. Fails with `InvalidInput`.
pub fn check_name(name: &str) -> Result<()> {
    let part = |part: &str| {
        let plain = |c: char| c.is_ascii_alphanumeric() || "_-.:".contains(c);
        !part.is_empty() && part != "." && part != ".." && part.chars().all(plain)
    };
    let pool = |name: &str| name.starts_with(|c: char| c.is_ascii_alphabetic());
    if name.len() < 256 && pool(name) && name.split('/').all(part) {
        return Ok(());
    }
    Err(Error::new(ErrorKind::InvalidInput, format!("{name:?} cannot be the name of a ZFS dataset"))
        .hint("write POOL/DATASET: letters, digits and _-.: in each part, a letter first, less than 256 in all"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_are_those_of_datasets() {
        for good in ["tank", "tank/a", "rpool/ROOT/debian-12", "a/b_c.d:e/7", &format!("t{}", "/a".repeat(127))] {
            check_name(good).unwrap();
        }
        let long = format!("t{}", "/a".repeat(128));
        for bad in ["", "/", "tank/", "/tank", "tank//a", "-r", "7up", "tank@s", "tank/a b", "tank/..", "tank/ä", &long]
        {
            assert_eq!(check_name(bad).unwrap_err().kind(), ErrorKind::InvalidInput, "{bad}");
        }
    }

    #[test]
    fn rows_and_numbers_are_read() {
        let out = "tank\t24576\t0\ntank/a\t1\tnone\n";
        assert_eq!(rows::<3>(out).unwrap()[1], ["tank/a", "1", "none"]);
        assert_eq!(rows::<2>(out).unwrap_err().kind(), ErrorKind::Corrupt);
        assert_eq!(number("-").unwrap() + number("none").unwrap() + number("42").unwrap(), 42);
        assert!(number("1.5G").is_err());
    }

    #[test]
    fn messages_become_meanings() {
        let kind = |said| failure(said).kind();
        assert_eq!(kind("cannot open 'tank/x': dataset does not exist\n"), ErrorKind::NotFound);
        assert_eq!(kind("cannot create 'tank/x': dataset already exists"), ErrorKind::AlreadyExists);
        assert_eq!(kind("cannot destroy snapshot tank/x@s: dataset is busy"), ErrorKind::Busy);
        assert_eq!(kind("cannot destroy 't@s': snapshot has dependent clones\nuse '-R'"), ErrorKind::Busy);
        assert_eq!(kind("cannot create snapshot 't@s': out of space"), ErrorKind::OutOfSpace);
        assert_eq!(kind("something new"), ErrorKind::Io);
    }

    #[test]
    fn inodes_are_refused_with_the_reason() {
        let limits = Limits { size: None, inodes: Some(7) };
        let e = RefQuota.set(Path::new("tank/a"), limits).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Unsupported);
        assert!(e.to_string().contains("per user"), "{e}");
        let zero = Limits { size: Some(ByteSize(0)), inodes: None };
        assert_eq!(RefQuota.set(Path::new("tank/a"), zero).unwrap_err().kind(), ErrorKind::InvalidInput);
        assert_eq!(RefQuota.read(Path::new("tank/a@s")).unwrap_err().kind(), ErrorKind::InvalidInput);
    }

    proptest! {
        #[test]
        fn no_output_makes_the_parsers_panic(out in "[ -~\t\n]{0,80}") {
            let _ = rows::<3>(&out);
            let _ = number(&out);
            let _ = check_name(&out);
        }
    }
}
