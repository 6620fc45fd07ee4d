//! The files of a run, and those of earlier ones.

use super::{
    report,
    results::{FORMAT, Results},
};
use graphdriver_core::{Context, Error, ErrorKind, Result};
use std::{
    fs::{self, Permissions},
    io::Write,
    os::unix::fs::PermissionsExt,
    path::Path,
};

/// A file of a run: its name, and its contents.
type Part = (&'static str, fn(&Results) -> Result<String>);

/// What is written into the directory of a run.
const PARTS: &[Part] = &[(RESULTS, json), (REPORT, report::html), ("picture.svg", report::picture)];

/// The file that [`read`] reads.
pub const RESULTS: &str = "results.json";

/// The file for people.
pub const REPORT: &str = "report.html";

fn json(results: &Results) -> Result<String> {
    let mut text = serde_json::to_string_pretty(results).expect("our own types serialise");
    text.push('\n');
    Ok(text)
}

/// Fails if nothing can be written into the directory, or if it holds files of these names that no run has written: they
/// would be overwritten. A directory that is not there is not there afterwards either.
pub fn check(dir: &Path) -> Result<()> {
    let new: Vec<&Path> = dir
        .ancestors()
        .filter(|dir| !dir.as_os_str().is_empty())
        .take_while(|dir| dir.symlink_metadata().is_err())
        .collect();
    let written = fs::create_dir_all(dir).and_then(|()| tempfile::tempfile_in(dir)).map(drop);
    // What others have put into it meanwhile stays.
    new.into_iter().for_each(|dir| drop(fs::remove_dir(dir)));
    written
        .doing(|| format!("trying whether results can be written into {}", dir.display()))
        .hint(|| "name another directory with -o")?;
    let Some((taken, _)) = PARTS.iter().find(|(name, _)| dir.join(name).symlink_metadata().is_ok()) else {
        return Ok(());
    };
    read(&dir.join(RESULTS)).map(drop).map_err(|e| {
        let why = format!(
            "{} is there already, and no earlier results of graphdriver bench are: {e}",
            dir.join(taken).display()
        );
        Error::new(ErrorKind::AlreadyExists, why).hint("name another directory with -o")
    })
}

/// Writes all files of a run into the directory, which is made if it is not there. Those of an earlier run are replaced,
/// each as a whole.
pub fn write(dir: &Path, results: &Results) -> Result<()> {
    fs::create_dir_all(dir).doing(|| format!("making {}", dir.display()))?;
    for (name, contents) in PARTS {
        let path = dir.join(name);
        let doing = || format!("writing {}", path.display());
        // The umask applies to it.
        let mut builder = tempfile::Builder::new();
        let mut file =
            builder.prefix(".graphdriver-").permissions(Permissions::from_mode(0o666)).tempfile_in(dir).doing(doing)?;
        file.write_all(contents(results)?.as_bytes()).doing(doing)?;
        file.as_file().sync_all().doing(doing)?;
        file.persist(&path).map_err(|e| e.error).doing(doing)?;
    }
    Ok(())
}

/// Reads the `results.json` of a run. Fails if it is none, or of another format.
pub fn read(path: &Path) -> Result<Results> {
    let doing = || format!("reading {}", path.display());
    let text = fs::read(path).doing(doing)?;
    parse(&text).doing(doing)
}

fn parse(text: &[u8]) -> Result<Results> {
    let not_ours = |e: serde_json::Error| {
        let why = format!("these are no results of graphdriver bench: {e}");
        Error::new(ErrorKind::InvalidInput, why).hint("name the results.json of an earlier run")
    };
    let value: serde_json::Value = serde_json::from_slice(text).map_err(not_ours)?;
    if let Some(format) = value.get("format").and_then(serde_json::Value::as_u64).filter(|f| *f != u64::from(FORMAT)) {
        let why = format!("results of format {format}, and this graphdriver knows {FORMAT}");
        let hint =
            "use the graphdriver that wrote them, or measure again: figures of different formats mean different things";
        return Err(Error::new(ErrorKind::Unsupported, why).hint(hint));
    }
    serde_json::from_value(value).map_err(not_ours)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::results::Host;

    fn empty() -> Results {
        Results {
            format: FORMAT,
            version: "1".into(),
            began: "2026-01-01T00:00:00Z".into(),
            host: Host { kernel: "6".into(), cpus: 1, memory: 1, scratch: None },
            size: 1,
            repetitions: 1,
            subjects: Vec::new(),
            measurements: Vec::new(),
            skipped: Vec::new(),
        }
    }

    #[test]
    fn results_are_replaced_and_other_files_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let there = dir.path().join("new/dir");
        check(&there).unwrap();
        assert!(!dir.path().join("new").exists());
        fs::write(dir.path().join("file"), "").unwrap();
        let e = check(&dir.path().join("file/dir")).unwrap_err();
        assert!(e.to_string().contains("file/dir") && e.to_string().contains("-o"), "{e}");
        write(&there, &empty()).unwrap();
        assert_eq!(read(&there.join(RESULTS)).unwrap(), empty());
        check(&there).unwrap();
        write(&there, &Results { size: 2, ..empty() }).unwrap();
        assert_eq!(read(&there.join(RESULTS)).unwrap().size, 2);
        let names: Vec<_> = fs::read_dir(&there).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names.len(), PARTS.len(), "{names:?}");

        fs::write(dir.path().join(RESULTS), "{\"my\": \"own\"}").unwrap();
        let e = check(dir.path()).unwrap_err();
        assert!(e.kind() == ErrorKind::AlreadyExists && e.to_string().contains("-o"), "{e}");
    }

    #[test]
    fn what_is_not_ours_is_told_from_what_is_newer() {
        for text in ["", "[]", "{}", "null", r#"{"format": 2}"#, r#"{"format": "x", "version": 3}"#] {
            let e = parse(text.as_bytes()).unwrap_err();
            assert!(e.kind() == ErrorKind::InvalidInput && e.to_string().contains("no results of graphdriver"), "{e}");
        }
        for other in [1, FORMAT + 1] {
            let e = parse(format!(r#"{{"format": {other}, "shape": "new"}}"#).as_bytes()).unwrap_err();
            let says = format!("format {other}");
            assert!(e.kind() == ErrorKind::Unsupported && e.to_string().contains(&says), "{e}");
        }
    }
}
