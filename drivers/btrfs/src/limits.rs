//! The limits of layers, as they were asked for.
//!
//! The kernel holds them, in the layers' qgroups, and forgets them all when somebody turns the filesystem's quotas off. So
//! each is noted, and set again before the layer can be written to.

use graphdriver_core::{ByteSize, Context, Error, ErrorKind, Result};
use std::{fs::File, io, path::Path};

/// What was asked for, and what the kernel was told. That is less where it does not count all that the layer has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Note {
    pub size: ByteSize,
    pub told: ByteSize,
}

/// Writes `SIZE TOLD` in decimal and a line feed. Wholly or not at all, and durable.
pub(crate) fn write(path: &Path, note: Note) -> Result<()> {
    let new = path.with_extension("new");
    let write = || {
        std::fs::write(&new, format!("{} {}\n", note.size.0, note.told.0))?;
        File::open(&new)?.sync_all()?;
        std::fs::rename(&new, path)?;
        File::open(path.parent().expect("it is in a directory"))?.sync_all()
    };
    write().doing(|| format!("writing {}", path.display()))
}

/// What was noted; none for a layer without a limit.
pub(crate) fn read(path: &Path) -> Result<Option<Note>> {
    let text = match std::fs::read_to_string(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        read => read.doing(|| format!("reading {}", path.display()))?,
    };
    let number = |text: &str| text.parse().ok().map(ByteSize);
    let numbers = text.strip_suffix('\n').and_then(|line| line.split_once(' '));
    let note = numbers.and_then(|(size, told)| Some(Note { size: number(size)?, told: number(told)? }));
    note.map(Some).ok_or_else(|| {
        Error::new(ErrorKind::Corrupt, format!("{} says {text:?}", path.display()))
            .hint("remove the file, and limit the layer again")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_noted_is_read_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("7");
        assert_eq!(read(&path).unwrap(), None);
        let note = Note { size: ByteSize(10_000_000), told: ByteSize(9_000_000) };
        write(&path, note).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "10000000 9000000\n");
        assert_eq!(read(&path).unwrap(), Some(note));
        for other in ["", "1", "1 2", "1\n", "1 -2\n", "a b\n"] {
            std::fs::write(&path, other).unwrap();
            assert_eq!(read(&path).unwrap_err().kind(), ErrorKind::Corrupt);
        }
    }
}
