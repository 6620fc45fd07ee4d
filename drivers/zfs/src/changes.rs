//! What `zfs diff -FHt` prints (zfs-diff(8)), and what follows from it for the walk.
//!
//! ZFS compares objects, not names: a line says that an object is new, gone, modified or has another path, and a path is
//! found by the parent directory that the object remembers. A directory remembers its only one. A file with several
//! names remembers the directory where it got the last, even after it has lost it: then ZFS finds no path, and says
//! nothing of the file at all. So what is concluded is:
//!
//! * Names come and go only in directories that are reported. There, every name is compared.
//! * A directory that is new at its path, or was elsewhere, is compared as a whole.
//! * A modified or renamed file has the path that is reported. If it has more names, they can be anywhere: all is compared.
//! * So it is when the number of an object's names changed, and when what is said to be gone is still there: then ZFS finds
//!   no path for it any more.
//! * A file whose path cannot be found can be lost only if there was one in the parent already. Such a layer is found by
//!   counting ([`Changes::balance`]): it has more objects than its parent and the lines account for.

use graphdriver_core::{Error, ErrorKind, Result};
use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::{OsStr, OsString},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

/// What the lines say, by paths relative to the root.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Changes {
    /// A conclusion from paths is not possible.
    pub everything: bool,
    /// The number of names of some object changed.
    pub relinked: bool,
    /// New objects less those that are gone.
    pub balance: i64,
    /// Names to compare, by their directory.
    pub names: BTreeMap<PathBuf, BTreeSet<OsString>>,
    /// Directories in which names came or went, or which have other attributes.
    pub modified: BTreeSet<PathBuf>,
    /// Directories that were not at this path.
    pub moved: BTreeSet<PathBuf>,
    /// What is no directory and has other content, attributes or another name.
    pub files: Vec<PathBuf>,
    /// What is said to be gone.
    pub gone: Vec<PathBuf>,
}

impl Changes {
    /// Reads the output of `zfs diff -FHt` for a dataset that is mounted at `mount_point`.
    pub(crate) fn parse(output: &[u8], mount_point: &Path) -> Result<Changes> {
        let mut changes = Changes::default();
        for line in output.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
            changes.line(line, mount_point).ok_or_else(|| {
                let shown = String::from_utf8_lossy(line);
                Error::new(ErrorKind::Corrupt, format!("zfs diff printed something unknown: {shown:?}"))
            })?;
        }
        Ok(changes)
    }

    /// `TIME CHANGE TYPE PATH`, and then the new path or `(+1)`, with tabs between.
    fn line(&mut self, line: &[u8], mount_point: &Path) -> Option<()> {
        let fields: Vec<&[u8]> = line.split(|byte| *byte == b'\t').collect();
        let (change, kind, path, last) = match fields[..] {
            [_, [change], kind, path] => (*change, kind, path, None),
            [_, [change], kind, path, last] => (*change, kind, path, Some(last)),
            _ => return None,
        };
        if kind.len() != 1 {
            return None;
        }
        let path = unescape(path)?;
        let Place::At(path) = place(&path, mount_point)? else {
            // A file without a name, open by somebody. Those that counted names counted it.
            return Some(());
        };
        let is_dir = kind == b"/";
        match (change, last) {
            (b'M', None) => self.modify(path, is_dir),
            (b'+', None) => {
                self.balance += 1;
                self.arrive(path, is_dir);
            }
            (b'-', None) => {
                self.balance -= 1;
                self.note(&path);
                self.gone.push(path);
            }
            (b'M', Some(count)) if is_count(count) => {
                self.relinked = true;
                self.everything = true;
            }
            (b'R', Some(new)) => {
                self.note(&path);
                match place(&unescape(new)?, mount_point)? {
                    Place::At(new) => {
                        self.arrive(new.clone(), is_dir);
                        self.files.extend((!is_dir).then_some(new));
                    }
                    Place::Nowhere => self.everything = true,
                }
            }
            _ => return None,
        }
        Some(())
    }

    fn modify(&mut self, path: PathBuf, is_dir: bool) {
        self.note(&path);
        if is_dir {
            self.modified.insert(path);
        } else {
            self.files.push(path);
        }
    }

    fn arrive(&mut self, path: PathBuf, is_dir: bool) {
        self.note(&path);
        if is_dir {
            self.moved.insert(path);
        }
    }

    /// Has the walk look at a path, and go into the directories above it.
    fn note(&mut self, path: &Path) {
        // Attributes that were too large for the file itself lie in a directory of files (zfsprops(7), `xattr`).
        if path.components().any(|part| part.as_os_str() == "<xattrdir>") {
            self.everything = true;
        }
        let mut path = path;
        while let (Some(dir), Some(name)) = (path.parent(), path.file_name()) {
            if !self.names.entry(dir.into()).or_default().insert(name.into()) {
                return;
            }
            path = dir;
        }
    }
}

enum Place {
    At(PathBuf),
    Nowhere,
}

/// Where a printed path is below the mount point: `/mnt/a/b`, or `/mnt(on_delete_queue)`.
fn place(path: &[u8], mount_point: &Path) -> Option<Place> {
    let rest = path.strip_prefix(mount_point.as_os_str().as_bytes())?;
    match rest {
        [b'/', rest @ ..] => Some(Place::At(Path::new(OsStr::from_bytes(rest)).into())),
        [] => Some(Place::At(PathBuf::new())),
        b"(on_delete_queue)" => Some(Place::Nowhere),
        _ => None,
    }
}

fn is_count(field: &[u8]) -> bool {
    let inner = field.strip_prefix(b"(").and_then(|field| field.strip_suffix(b")"));
    inner.is_some_and(|count| str::from_utf8(count).is_ok_and(|count| count.parse::<i64>().is_ok()))
}

/// Undoes `\0040`: a backslash and the byte in four octal digits (OpenZFS `libzfs_diff.c`, `stream_bytes`).
fn unescape(field: &[u8]) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, after)) = rest.split_first() {
        if byte != b'\\' {
            bytes.push(byte);
            rest = after;
            continue;
        }
        let (digits, after) = after.split_at_checked(4)?;
        if !digits.iter().all(|digit| (b'0'..=b'7').contains(digit)) {
            return None;
        }
        bytes.push(u8::from_str_radix(str::from_utf8(digits).ok()?, 8).ok()?);
        rest = after;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::ffi::OsStringExt;

    fn parse(lines: &str) -> Changes {
        Changes::parse(lines.as_bytes(), Path::new("/mnt/to")).unwrap()
    }

    fn names(changes: &Changes, dir: &str) -> Vec<String> {
        let found = changes.names.get(Path::new(dir)).into_iter().flatten();
        found.map(|name| name.to_string_lossy().into_owned()).collect()
    }

    #[test]
    fn names_are_compared_where_something_came_or_went_and_on_the_way_there() {
        let found = parse(
            "17.5\tM\t/\t/mnt/to/\n17.5\tM\t/\t/mnt/to/a/b\n17.5\t+\tF\t/mnt/to/a/b/new\n17.5\t-\t@\t/mnt/to/a/b/old\n\
             17.5\tR\t/\t/mnt/to/c\t/mnt/to/d\n17.5\tM\tF\t/mnt/to/e/f\n",
        );
        assert_eq!(names(&found, ""), ["a", "c", "d", "e"]);
        assert_eq!((names(&found, "a"), names(&found, "a/b")), (vec!["b".into()], vec!["new".into(), "old".into()]));
        assert_eq!(found.modified, [PathBuf::new(), "a/b".into()].into());
        assert_eq!(found.moved, [PathBuf::from("d")].into());
        assert_eq!(found.files, [PathBuf::from("e/f")]);
        assert!(!found.everything && found.balance == 0);
    }

    #[test]
    fn links_and_outsourced_attributes_make_everything_doubtful() {
        let found = parse("17.5\tM\tF\t/mnt/to/b/m2\t(-1)\n");
        assert!(found.everything && found.relinked);
        assert!(parse("17.5\t+\tF\t/mnt/to/f/<xattrdir>/user.x\n").everything);
        let open = parse("17.5\t-\tF\t/mnt/to(on_delete_queue)\n");
        assert_eq!(open, Changes::default());
    }

    #[test]
    fn what_is_not_understood_is_an_error() {
        for bad in [
            "x",
            "17.5\tQ\tF\t/mnt/to/a",
            "17.5\tM\tF\t/mnt/other/a",
            "17.5\tM\tF\t/mnt/to/a\\9999",
            "17.5\tM\tF\t/mnt/to/a\\777",
            "17.5\tM\tF\t/mnt/to/a\t(x)",
            "17.5\tM\tF\t/mnt/too/a",
            "17.5\tR\tF\t/mnt/to/a",
        ] {
            let e = Changes::parse(bad.as_bytes(), Path::new("/mnt/to")).unwrap_err();
            assert_eq!(e.kind(), ErrorKind::Corrupt, "{bad}");
        }
    }

    /// As libzfs writes it.
    fn escape(bytes: &[u8]) -> String {
        let one = |byte: &u8| match byte {
            b'!'..=b'~' if *byte != b'\\' => (*byte as char).to_string(),
            byte => format!("\\{byte:04o}"),
        };
        bytes.iter().map(one).collect()
    }

    proptest! {
        #[test]
        fn any_name_comes_out_as_it_was(name in prop::collection::vec(any::<u8>().prop_filter("no name", |b| !b"/\0".contains(b)), 1..40)) {
            prop_assume!(name != b"." && name != b"..");
            let line = format!("17.5\t+\tF\t/mnt/to/d/{}\n", escape(&name));
            let found = parse(&line);
            let expected: BTreeSet<OsString> = [OsString::from_vec(name)].into();
            prop_assert_eq!(found.names.get(Path::new("d")), Some(&expected));
            prop_assert_eq!(found.balance, 1);
        }

        #[test]
        fn no_output_makes_the_parser_panic(output in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Changes::parse(&output, Path::new("/mnt/to"));
        }

        #[test]
        fn nothing_that_is_almost_a_line_makes_it_panic(output in "[0-9.]{1,3}\t[MR+-]\t[F/@]\t/mnt/to[/a(\\\\0-9]{0,12}(\t[(+0-9)/mnto\\\\]{0,9})?") {
            let _ = Changes::parse(output.as_bytes(), Path::new("/mnt/to"));
        }
    }
}
