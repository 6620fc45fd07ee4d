//! Tables for people, JSON for programs.

use super::args::Format;
use comfy_table::{Table, TableStyle};
use graphdriver_core::{Context, Error, ErrorKind, Result};
use serde::Serialize;
use std::{
    fs::Permissions,
    io::{self, IsTerminal, Write},
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
        let mut table = Table::new();
        table.load_style(TableStyle::new()).set_header(header);
        for column in table.column_iter_mut() {
            column.set_padding((0, 3));
        }
        table.add_rows(items.iter().map(row));
        line(table.trim_fmt())
    }

    /// One result: as JSON, or as these lines.
    pub fn result<T: Serialize>(&self, value: &T, lines: impl Fn(&T) -> Vec<String>) -> Result<()> {
        if self.is_json() {
            return json(value);
        }
        lines(value).into_iter().try_for_each(line)
    }
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
