//! Which tree has which project, in a file.
//!
//! `BASE/projects` is text:
//!
//! ```text
//! graphdriver projects 1
//! next 1900000005
//! 1900000003 17 52428800 - ready
//! 1900000004 18 - 100000 tagging
//! ```
//!
//! The first line names the format. `next` is where the search for a free number goes on, so that one is not given again
//! soon. Each other line is a tree: its project, its name in BASE, the most bytes and the most inodes it may take (`-`: no
//! limit), and whether all files in it have the project (`ready`) or that is being done (`tagging`).
//!
//! A line is there before the project is given to anything, and goes when nothing has it any more and its limits are gone;
//! after a crash in between it tells what is to be done. The file is replaced whole (`projects.new`, flushed, renamed) by
//! whoever holds the lock (flock(2)) on `BASE/projects.lock`.

use graphdriver_core::{ByteSize, Context, Error, ErrorKind, Limits, Result, open_lock};
use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::ErrorKind as Io,
    ops::RangeInclusive,
    path::{Path, PathBuf},
};

const FORMAT: &str = "graphdriver projects 1";

/// One tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry {
    pub project: u32,
    pub limits: Limits,
    /// Whether all that is in the tree has the project.
    pub ready: bool,
}

/// What the file says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Book {
    /// Where the search for a free project goes on.
    pub next: u32,
    /// By the tree's name.
    pub trees: BTreeMap<String, Entry>,
}

impl Book {
    /// A project of the range that no tree has and `taken` does not say of, looked for from `next` on and then from the
    /// beginning. `option` is what users give another range with.
    pub(crate) fn free(
        &mut self,
        range: &RangeInclusive<u32>,
        option: &str,
        mut taken: impl FnMut(u32) -> Result<bool>,
    ) -> Result<u32> {
        let ours: std::collections::HashSet<u32> = self.trees.values().map(|entry| entry.project).collect();
        let from = if range.contains(&self.next) { self.next } else { *range.start() };
        for project in (from..=*range.end()).chain(*range.start()..from) {
            if !ours.contains(&project) && !taken(project)? {
                self.next = if project == *range.end() { *range.start() } else { project + 1 };
                return Ok(project);
            }
        }
        let why = format!("all projects from {} to {} are in use", range.start(), range.end());
        Err(Error::new(ErrorKind::OutOfSpace, why)
            .hint(format!("give a larger range of numbers with the option {option}")))
    }

    pub(crate) fn parse(text: &str) -> Result<Book> {
        let mut lines = text.lines();
        let format = lines.next().unwrap_or_default();
        if format != FORMAT {
            let why = format!("its format is {format:?}, and this program knows {FORMAT:?}");
            return Err(Error::new(ErrorKind::Unsupported, why).hint("use the program that wrote it"));
        }
        let damaged = |line: &str| Error::new(ErrorKind::Corrupt, format!("a line {line:?}"));
        let next = lines.next().unwrap_or_default();
        let next = next.strip_prefix("next ").and_then(|n| n.parse().ok()).ok_or_else(|| damaged(next))?;
        let mut book = Book { next, trees: BTreeMap::new() };
        for line in lines {
            let (tree, entry) = entry(line).ok_or_else(|| damaged(line))?;
            if book.trees.values().any(|other| other.project == entry.project) {
                return Err(damaged(line));
            }
            if book.trees.insert(tree, entry).is_some() {
                return Err(damaged(line));
            }
        }
        // Written whole, it ends with a line's end.
        if text.ends_with('\n') { Ok(book) } else { Err(damaged("that does not end")) }
    }

    pub(crate) fn print(&self) -> String {
        let or_none = |limit: Option<u64>| limit.map_or("-".into(), |limit| limit.to_string());
        let lines = self.trees.iter().map(|(tree, Entry { project, limits, ready })| {
            let (size, inodes) = (or_none(limits.size.map(|size| size.0)), or_none(limits.inodes));
            format!("{project} {tree} {size} {inodes} {}\n", if *ready { "ready" } else { "tagging" })
        });
        format!("{FORMAT}\nnext {}\n{}", self.next, lines.collect::<String>())
    }
}

fn entry(line: &str) -> Option<(String, Entry)> {
    let limit = |text: &str| match text {
        "-" => Some(None),
        number => number.parse::<u64>().ok().map(Some),
    };
    let words: Vec<_> = line.split(' ').collect();
    let [project, tree, size, inodes, state] = words.try_into().ok()?;
    let ready = match state {
        "ready" => true,
        "tagging" => false,
        _ => return None,
    };
    let limits = Limits { size: limit(size)?.map(ByteSize), inodes: limit(inodes)? };
    let project = project.parse().ok().filter(|project| *project != 0)?;
    is_name(tree).then(|| (tree.to_owned(), Entry { project, limits, ready }))
}

/// Whether it can be the name of a tree in a line.
pub(crate) fn is_name(tree: &str) -> bool {
    !tree.is_empty() && tree.bytes().all(|b| b.is_ascii_graphic() && b != b'/') && tree != "." && tree != ".."
}

/// The file, which need not be there.
#[derive(Debug, Clone)]
pub(crate) struct Ledger {
    base: PathBuf,
}

impl Ledger {
    pub(crate) fn new(base: &Path) -> Ledger {
        Ledger { base: base.into() }
    }

    /// As it is this moment: it is only ever replaced whole.
    pub(crate) fn read(&self) -> Result<Book> {
        let path = self.base.join("projects");
        match fs::read_to_string(&path) {
            Err(e) if e.kind() == Io::NotFound => Ok(Book::default()),
            read => read.map_err(Error::from).and_then(|text| Book::parse(&text)),
        }
        .doing(|| format!("reading {}", path.display()))
        .hint(|| "restore the file from a backup; its lines must name every project that `repquota -P` shows for it")
    }

    /// Changes it, alone among all processes. Nothing is written if it stays as it was, or on an error.
    pub(crate) fn change<T>(&self, change: impl FnOnce(&mut Book) -> Result<T>) -> Result<T> {
        let lock = self.base.join("projects.lock");
        let file = open_lock(&lock)?;
        file.lock().doing(|| format!("locking {}", lock.display()))?;
        let before = self.read()?;
        let mut after = before.clone();
        let made = change(&mut after)?;
        if after != before {
            self.write(&after).doing(|| format!("writing {}", self.base.join("projects").display()))?;
        }
        Ok(made)
    }

    fn write(&self, book: &Book) -> std::io::Result<()> {
        let new = self.base.join("projects.new");
        fs::write(&new, book.print())?;
        File::open(&new)?.sync_all()?;
        fs::rename(&new, self.base.join("projects"))?;
        File::open(&self.base)?.sync_all()
    }
}
