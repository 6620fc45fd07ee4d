//! The file `version`: what the layers of a data directory rely on.

use super::trial::is_trial;
use crate::{Context, Error, ErrorKind, OverlayXattrs, Result};
use std::{collections::BTreeSet, ffi::OsString, io::ErrorKind as Io, path::Path};

/// What a driver writes into its version file, and can read in it.
#[derive(Debug, Clone, Copy)]
pub struct Format {
    /// The first line: `graphdriver overlay2 1`.
    pub line: &'static str,
    /// The features layers may use, in the order they are written.
    pub features: &'static [&'static str],
}

/// What the layers of a data directory rely on: without it they would read wrong. Kept in the file `version`:
///
/// ```text
/// graphdriver overlay2 1
/// xattrs trusted
/// uses redirect_dir metacopy
/// ```
///
/// The first line names the format and its version. `xattrs` is `trusted` or `user` ([`OverlayXattrs`]). `uses` lists
/// the features of the union filesystem that some layer may have been written with; a kernel or an option that takes one
/// away would show wrong trees, and is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The namespace of overlayfs's attributes.
    pub xattrs: OverlayXattrs,
    /// Those of [`Format::features`] that are used.
    pub uses: BTreeSet<&'static str>,
}

impl Record {
    /// None if `home` is empty or not there.
    pub fn load(home: &Path, format: &Format) -> Result<Option<Record>> {
        let path = home.join("version");
        match std::fs::read_to_string(&path) {
            Ok(text) => Record::parse(&text, format).map(Some).doing(|| format!("reading {}", path.display())),
            Err(e) if matches!(e.kind(), Io::NotFound | Io::NotADirectory) => match first_stranger(home)? {
                None => Ok(None),
                Some(name) => Err(Error::new(
                    ErrorKind::InvalidInput,
                    format!("{} holds {name:?} and no version file", home.display()),
                )
                .hint("give the driver a directory of its own")),
            },
            Err(e) => Err(Error::from(e).doing(format!("reading {}", path.display()))),
        }
    }

    /// Replaces the file, durably.
    pub fn save(&self, home: &Path, format: &Format) -> Result<()> {
        let new = home.join("version.new");
        let write = || {
            std::fs::write(&new, self.print(format))?;
            std::fs::File::open(&new)?.sync_all()?;
            std::fs::rename(&new, home.join("version"))?;
            std::fs::File::open(home)?.sync_all()
        };
        write().doing(|| format!("writing {}", new.display()))
    }

    fn parse(text: &str, known: &Format) -> Result<Record> {
        let mut lines = text.lines();
        let format = lines.next().unwrap_or_default();
        if format != known.line {
            let why = format!("its format is {format:?}, and this program knows {:?}", known.line);
            return Err(Error::new(ErrorKind::Unsupported, why).hint("use the program that wrote it"));
        }
        let mut record = Record { xattrs: OverlayXattrs::Trusted, uses: BTreeSet::new() };
        for line in lines {
            match line.split_once(' ').unwrap_or((line, "")) {
                ("xattrs", "trusted") => record.xattrs = OverlayXattrs::Trusted,
                ("xattrs", "user") => record.xattrs = OverlayXattrs::User,
                ("uses", features) => {
                    for feature in features.split_whitespace() {
                        let known = known.features.iter().find(|known| **known == feature).ok_or_else(|| {
                            let why = format!("its layers use {feature:?}, which is unknown");
                            Error::new(ErrorKind::Unsupported, why)
                        })?;
                        record.uses.insert(known);
                    }
                }
                _ => return Err(Error::new(ErrorKind::Corrupt, format!("a line {line:?}"))),
            }
        }
        Ok(record)
    }

    fn print(&self, format: &Format) -> String {
        let xattrs = match self.xattrs {
            OverlayXattrs::Trusted => "trusted",
            OverlayXattrs::User => "user",
        };
        let used = format.features.iter().filter(|feature| self.uses.contains(**feature));
        let uses: String = used.map(|feature| format!(" {feature}")).collect();
        format!("{}\nxattrs {xattrs}\nuses{uses}\n", format.line)
    }
}

/// Something in a directory that the driver did not put there before its version file.
fn first_stranger(home: &Path) -> Result<Option<OsString>> {
    let entries = match std::fs::read_dir(home) {
        Err(e) if e.kind() == Io::NotFound => return Ok(None),
        other => other.doing(|| format!("reading {}", home.display()))?,
    };
    for entry in entries {
        let name = entry?.file_name();
        let ours = name == "version.new" || name.to_str().is_some_and(is_trial);
        // mkfs makes it, and a data root may be a filesystem of its own.
        if !ours && name != "lost+found" {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FORMAT: Format = Format { line: "graphdriver overlay2 1", features: &["redirect_dir", "metacopy"] };

    #[test]
    fn the_version_file_is_read_as_it_was_written_by_version_1() {
        let text = "graphdriver overlay2 1\nxattrs trusted\nuses redirect_dir metacopy\n";
        let record = Record::parse(text, &FORMAT).unwrap();
        let both = BTreeSet::from(["redirect_dir", "metacopy"]);
        assert_eq!(record, Record { xattrs: OverlayXattrs::Trusted, uses: both });
        assert_eq!(record.print(&FORMAT), text);
        let text = "graphdriver overlay2 1\nxattrs user\nuses\n";
        let record = Record::parse(text, &FORMAT).unwrap();
        assert_eq!(record, Record { xattrs: OverlayXattrs::User, uses: BTreeSet::new() });
        assert_eq!(record.print(&FORMAT), text);
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for (text, kind) in [
            ("", ErrorKind::Unsupported),
            ("graphdriver overlay2 2\n", ErrorKind::Unsupported),
            ("graphdriver vfs-fuse 1\n", ErrorKind::Unsupported),
            ("graphdriver overlay2 1\nuses time_travel\n", ErrorKind::Unsupported),
            ("graphdriver overlay2 1\nxattrs system\n", ErrorKind::Corrupt),
        ] {
            assert_eq!(Record::parse(text, &FORMAT).unwrap_err().kind(), kind, "{text:?}");
        }
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Record::load(dir.path(), &FORMAT).unwrap(), None);
        assert_eq!(Record::load(&dir.path().join("missing"), &FORMAT).unwrap(), None);
        std::fs::write(dir.path().join("thesis.tex"), "").unwrap();
        assert_eq!(Record::load(dir.path(), &FORMAT).unwrap_err().kind(), ErrorKind::InvalidInput);
    }
}
