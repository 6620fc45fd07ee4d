//! Tables for people, JSON for programs.

use super::args::Format;
use comfy_table::{ContentArrangement, Table, TableStyle};
use graphdriver_core::{Context, Error, ErrorKind, Result};
use serde::Serialize;
use std::{
    fs::Permissions,
    io::{self, IsTerminal, Write},
    ops::Range,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

/// Standard output in the chosen format.
pub(crate) struct Output {
    format: Format,
}

impl Output {
    pub fn new(format: Format) -> Self {
        Output { format }
    }

    pub fn is_json(&self) -> bool {
        self.format == Format::Json
    }

    /// A list: as one JSON array, or as a table with these columns.
    pub fn list<T: Serialize>(&self, header: &[&str], items: &[T], row: impl Fn(&T) -> Vec<String>) -> Result<()> {
        if self.is_json() {
            return json(&items);
        }
        let mut table = table(header);
        table.add_rows(items.iter().map(row));
        line(table.trim_fmt())
    }

    /// A table for people with more columns than a terminal may have room for: then the later ones follow in tables below,
    /// each with the first `keys` columns, which tell the rows. What is too wide even so is wrapped.
    pub fn wide_table(&self, header: &[&str], rows: &[Vec<String>], keys: usize) -> Result<()> {
        let room = Table::new().width().map(usize::from);
        for columns in blocks(&widths(header, rows), keys, room) {
            let part = |all: &[String]| [&all[..keys], &all[columns.clone()]].concat();
            let mut table = table(&[&header[..keys], &header[columns.clone()]].concat());
            table.set_content_arrangement(ContentArrangement::Dynamic).add_rows(rows.iter().map(|row| part(row)));
            line(format_args!("{}\n", table.trim_fmt()))?;
        }
        Ok(())
    }

    /// One result: as JSON, or as these lines.
    pub fn result<T: Serialize>(&self, value: &T, lines: impl Fn(&T) -> Vec<String>) -> Result<()> {
        if self.is_json() {
            return json(value);
        }
        lines(value).into_iter().try_for_each(line)
    }
}

/// Between columns.
const GAP: u16 = 3;

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(TableStyle::new()).set_header(header);
    for column in table.column_iter_mut() {
        column.set_padding((0, GAP));
    }
    table
}

/// Of each column, with its gap.
fn widths(header: &[&str], rows: &[Vec<String>]) -> Vec<usize> {
    let of = |n: usize| rows.iter().map(|row| row[n].chars().count()).max().unwrap_or(0);
    let wide = |n: usize| header[n].chars().count().max(of(n)) + usize::from(GAP);
    (0..header.len()).map(wide).collect()
}

/// The columns after the first `keys` in runs that have room beside these, of at least one; all at once without a limit.
fn blocks(widths: &[usize], keys: usize, room: Option<usize>) -> Vec<Range<usize>> {
    let before: usize = widths[..keys].iter().sum();
    let (mut blocks, mut begin, mut used) = (Vec::new(), keys, before);
    for (n, width) in widths.iter().enumerate().skip(keys) {
        if n > begin && room.is_some_and(|room| used + width > room) {
            blocks.push(begin..n);
            (begin, used) = (n, before);
        }
        used += width;
    }
    blocks.push(begin..widths.len());
    blocks
}

/// One line on standard output.
pub(crate) fn line(text: impl std::fmt::Display) -> Result<()> {
    Ok(writeln!(std::io::stdout().lock(), "{text}")?)
}

/// One JSON document on standard output.
pub(crate) fn json(value: &impl Serialize) -> Result<()> {
    line(serde_json::to_string_pretty(value).expect("our own types serialise"))
}

/// Of half an archive nobody has anything, so that its reader went away is an error.
pub(crate) fn cut_short(e: Error) -> Error {
    match reader_went_away(&e) {
        true => Error::new(ErrorKind::Io, "the reader of standard output went away before the end"),
        false => e,
    }
}

/// Whether the error is only that nobody reads on, as with `graphdriver images | head -1`.
pub(crate) fn reader_went_away(e: &Error) -> bool {
    e.kind() == ErrorKind::Io && e.reason() == "Broken pipe"
}

/// Lets `write` fill `path`, which appears only when it is complete; without a path standard output, if no terminal.
pub(crate) fn to_file(path: Option<&Path>, write: impl FnOnce(&mut dyn Write) -> Result<()>) -> Result<()> {
    let Some(path) = path.filter(|path| *path != Path::new("-")) else {
        let mut out = std::io::stdout().lock();
        if out.is_terminal() {
            return Err(Error::new(ErrorKind::InvalidInput, "will not write an archive to a terminal")
                .hint("name a file with -o, or redirect"));
        }
        return write(&mut out).map_err(cut_short);
    };
    let doing = || format!("writing {}", path.display());
    if path.exists() && !path.is_file() {
        // A FIFO or a device such as /dev/null is written to, not replaced.
        let mut file = std::fs::OpenOptions::new().write(true).open(path).doing(doing)?;
        return write(&mut file).doing(doing);
    }
    let path = destination(path).doing(doing)?;
    let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // The umask applies to this. A file that is there keeps to itself what it kept.
    let mode = path.metadata().map_or(0o666, |meta| meta.mode() & 0o777);
    let mut builder = tempfile::Builder::new();
    builder.prefix(".graphdriver-").permissions(Permissions::from_mode(mode));
    let mut file = builder.tempfile_in(dir).doing(doing)?;
    write(file.as_file_mut()).doing(doing)?;
    // The name must not come to the disk before the content.
    file.as_file().sync_all().doing(doing)?;
    file.persist(&path).map(drop).map_err(|e| e.error).doing(doing)
}

/// Where symlinks at the end of `path` lead, whether there is a file or not.
fn destination(path: &Path) -> io::Result<PathBuf> {
    let mut path = path.to_owned();
    // As many as the kernel follows (path_resolution(7)).
    for _ in 0..40 {
        let Ok(target) = path.read_link() else { return Ok(path) };
        path = path.parent().unwrap_or(Path::new("")).join(target);
    }
    Err(rustix::io::Errno::LOOP.into())
}

/// At most `width` characters, with an ellipsis where some are left out.
pub(crate) fn shortened(text: &str, width: usize) -> String {
    match text.char_indices().nth(width) {
        None => text.into(),
        Some(_) => text.chars().take(width - 1).chain(['…']).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_without_room_go_below() {
        let widths = [10, 10, 20, 20, 20, 50, 5];
        let one = std::slice::from_ref(&(2..7));
        assert_eq!(blocks(&widths, 2, None), one);
        assert_eq!(blocks(&widths, 2, Some(1000)), one);
        assert_eq!(blocks(&widths, 2, Some(60)), [2..4, 4..5, 5..6, 6..7]);
        // Each has at least one.
        assert_eq!(blocks(&widths, 2, Some(1)), [2..3, 3..4, 4..5, 5..6, 6..7]);
    }
}
