//! Files that are there to be locked.

use crate::{Context, Result};
use std::{fs::File, path::Path};

/// Opens a file to be locked, made if it is not there. It is not truncated: on a full ZFS pool that fails.
pub fn open_lock(path: &Path) -> Result<File> {
    let file = File::options().read(true).write(true).create(true).truncate(false).open(path);
    file.doing(|| format!("opening {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_file_is_made_and_never_truncated() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        open_lock(&path).unwrap();
        std::fs::write(&path, "kept").unwrap();
        open_lock(&path).unwrap().lock().unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "kept");
        let e = open_lock(&dir.path().join("missing/lock")).unwrap_err();
        assert!(e.to_string().contains("missing/lock"), "{e}");
    }
}
