//! The data directory: its format and what its layers rely on.

use graphdriver_core::{Context, Error, ErrorKind, OverlayXattrs, Result, mount};
use rustix::fs::{self, CWD, Mode, OFlags, StatxFlags};
use std::{
    fs::DirBuilder,
    io::ErrorKind as Io,
    os::{fd::OwnedFd, unix::fs::DirBuilderExt},
    path::{Path, PathBuf},
};

const FORMAT: &str = "graphdriver overlay2 1";

/// What the layers of a data directory rely on: without it they would read wrong. Kept in the file `version`:
///
/// ```text
/// graphdriver overlay2 1
/// xattrs trusted
/// uses redirect_dir metacopy
/// ```
///
/// The first line names the format and its version. `xattrs` is `trusted` or `user` ([`OverlayXattrs`]). `uses` lists
/// the features of overlayfs that some layer may have been written with; a kernel or an option that takes one away
/// would show wrong trees, and is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Record {
    pub xattrs: OverlayXattrs,
    pub redirect_dir: bool,
    pub metacopy: bool,
}

impl Record {
    /// None if `home` is empty or not there.
    pub(crate) fn load(home: &Path) -> Result<Option<Record>> {
        let path = home.join("version");
        match std::fs::read_to_string(&path) {
            Ok(text) => Record::parse(&text).map(Some).doing(|| format!("reading {}", path.display())),
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

    pub(crate) fn save(&self, home: &Path) -> Result<()> {
        let new = home.join("version.new");
        let write = || {
            std::fs::write(&new, self.print())?;
            std::fs::File::open(&new)?.sync_all()?;
            std::fs::rename(&new, home.join("version"))?;
            std::fs::File::open(home)?.sync_all()
        };
        write().doing(|| format!("writing {}", new.display()))
    }

    fn parse(text: &str) -> Result<Record> {
        let mut lines = text.lines();
        let format = lines.next().unwrap_or_default();
        if format != FORMAT {
            let why = format!("its format is {format:?}, and this program knows {FORMAT:?}");
            return Err(Error::new(ErrorKind::Unsupported, why).hint("use the program that wrote it"));
        }
        let mut record = Record { xattrs: OverlayXattrs::Trusted, redirect_dir: false, metacopy: false };
        for line in lines {
            match line.split_once(' ').unwrap_or((line, "")) {
                ("xattrs", "trusted") => record.xattrs = OverlayXattrs::Trusted,
                ("xattrs", "user") => record.xattrs = OverlayXattrs::User,
                ("uses", features) => {
                    for feature in features.split_whitespace() {
                        match feature {
                            "redirect_dir" => record.redirect_dir = true,
                            "metacopy" => record.metacopy = true,
                            _ => {
                                return Err(Error::new(
                                    ErrorKind::Unsupported,
                                    format!("its layers use {feature:?}, which is unknown"),
                                ));
                            }
                        }
                    }
                }
                _ => return Err(Error::new(ErrorKind::Corrupt, format!("a line {line:?}"))),
            }
        }
        Ok(record)
    }

    fn print(&self) -> String {
        let xattrs = match self.xattrs {
            OverlayXattrs::Trusted => "trusted",
            OverlayXattrs::User => "user",
        };
        let features = [(self.redirect_dir, " redirect_dir"), (self.metacopy, " metacopy")];
        let uses: String = features.iter().filter(|(on, _)| *on).map(|(_, name)| *name).collect();
        format!("{FORMAT}\nxattrs {xattrs}\nuses{uses}\n")
    }
}

/// Something in a directory that this driver did not put there before its version file.
fn first_stranger(home: &Path) -> Result<Option<std::ffi::OsString>> {
    let entries = match std::fs::read_dir(home) {
        Err(e) if e.kind() == Io::NotFound => return Ok(None),
        other => other.doing(|| format!("reading {}", home.display()))?,
    };
    for entry in entries {
        let name = entry?.file_name();
        let ours = name == "version.new" || name.to_str().is_some_and(|n| n.starts_with(PROBE));
        // mkfs makes it, and a data root may be a filesystem of its own.
        if !ours && name != "lost+found" {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

/// How the names of directories begin that [`crate::probe`] works in.
pub(crate) const PROBE: &str = ".graphdriver-probe-";

/// Makes a directory and those above it; none of them readable for others.
/// Whether there is any layer.
pub(crate) fn has_layers(home: &Path) -> bool {
    let names = std::fs::read_dir(home).into_iter().flatten().flatten().map(|entry| entry.file_name());
    names.filter_map(|name| name.into_string().ok()).any(|name| name.parse::<graphdriver_core::LayerId>().is_ok())
}

pub(crate) fn make_dirs(path: &Path) -> Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).doing(|| format!("making {}", path.display()))
}

/// `path`, or the nearest directory above that exists.
pub(crate) fn nearest_existing(path: &Path) -> Result<PathBuf> {
    let path = std::path::absolute(path)?;
    let found = path.ancestors().find(|dir| dir.is_dir()).unwrap_or(Path::new("/"));
    Ok(found.to_path_buf())
}

/// The filesystem `dir` lies on, as the table of mounts calls it.
pub(crate) fn backing(dir: &Path) -> Result<String> {
    let mnt_id = fs::statx(CWD, dir, fs::AtFlags::empty(), StatxFlags::MNT_ID)?.stx_mnt_id;
    let found = mount::table()?.into_iter().find(|m| m.id == mnt_id);
    Ok(found.map_or_else(|| "unknown filesystem".into(), |m| m.fstype.to_string_lossy().into_owned()))
}

pub(crate) fn open_dir(path: &Path) -> rustix::io::Result<OwnedFd> {
    fs::openat(CWD, path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_file_is_read_as_it_was_written_by_version_1() {
        let text = "graphdriver overlay2 1\nxattrs trusted\nuses redirect_dir metacopy\n";
        let record = Record::parse(text).unwrap();
        assert_eq!(record, Record { xattrs: OverlayXattrs::Trusted, redirect_dir: true, metacopy: true });
        assert_eq!(record.print(), text);
        let text = "graphdriver overlay2 1\nxattrs user\nuses\n";
        let record = Record::parse(text).unwrap();
        assert_eq!(record, Record { xattrs: OverlayXattrs::User, redirect_dir: false, metacopy: false });
        assert_eq!(record.print(), text);
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for (text, kind) in [
            ("", ErrorKind::Unsupported),
            ("graphdriver overlay2 2\n", ErrorKind::Unsupported),
            ("graphdriver overlay2 1\nuses time_travel\n", ErrorKind::Unsupported),
            ("graphdriver overlay2 1\nxattrs system\n", ErrorKind::Corrupt),
        ] {
            assert_eq!(Record::parse(text).unwrap_err().kind(), kind, "{text:?}");
        }
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Record::load(dir.path()).unwrap(), None);
        assert_eq!(Record::load(&dir.path().join("missing")).unwrap(), None);
        std::fs::write(dir.path().join("thesis.tex"), "").unwrap();
        assert_eq!(Record::load(dir.path()).unwrap_err().kind(), ErrorKind::InvalidInput);
    }
}
