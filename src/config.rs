//! Settings: flags beat the environment, the environment beats the file.

use graphdriver_core::{Context, Error, ErrorKind, Options, Result};
use serde::Deserialize;
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// Where the settings file is looked for unless another one is named.
pub const DEFAULT_FILE: &str = "/etc/graphdriver/config.json";

/// What flags and environment say; clap has merged these two already.
#[derive(Debug, Default, Clone)]
pub struct Given {
    /// `--config`: must exist then.
    pub file: Option<PathBuf>,
    /// `--root`.
    pub data_root: Option<PathBuf>,
    /// `--storage-driver`.
    pub storage_driver: Option<String>,
    /// `--storage-opt`, each `NAME=VALUE`.
    pub storage_opts: Vec<String>,
    /// `--debug`.
    pub debug: Option<bool>,
}

/// What is in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Where all data lies.
    pub data_root: PathBuf,
    /// The driver asked for, if any.
    pub storage_driver: Option<String>,
    /// The driver's options.
    pub storage_opts: Options,
    /// Whether to log what is done.
    pub debug: bool,
}

/// The settings file, its keys spelt as in Docker's `daemon.json`.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
struct File {
    data_root: Option<PathBuf>,
    storage_driver: Option<String>,
    storage_opts: Vec<String>,
    debug: bool,
}

impl Settings {
    /// Merges what was given with the file.
    pub fn resolve(given: Given) -> Result<Settings> {
        let file = read(given.file.as_deref())?;
        let opts = if given.storage_opts.is_empty() { file.storage_opts } else { given.storage_opts };
        let data_root = given.data_root.or(file.data_root).map_or_else(default_root, Ok)?;
        Ok(Settings {
            data_root: std::path::absolute(&data_root).doing(|| format!("resolving {}", data_root.display()))?,
            storage_driver: given.storage_driver.or(file.storage_driver),
            storage_opts: parse_options(&opts)?,
            debug: given.debug.unwrap_or(file.debug),
        })
    }
}

/// Splits several `NAME=VALUE`. The same name with two values is refused.
pub fn parse_options(texts: &[String]) -> Result<Options> {
    distinct(texts.iter().map(|text| parse_option(text)).collect::<Result<_>>()?)
}

fn distinct(options: Vec<(String, String)>) -> Result<Options> {
    for (n, (name, value)) in options.iter().enumerate() {
        if let Some((_, other)) =
            options[..n].iter().find(|(before, before_value)| before == name && before_value != value)
        {
            let why = format!("the storage option {name} is given twice, as {other:?} and as {value:?}");
            return Err(Error::new(ErrorKind::InvalidInput, why).hint("give it once"));
        }
    }
    Ok(Options(options))
}

fn read(named: Option<&Path>) -> Result<File> {
    let path = named.unwrap_or(Path::new(DEFAULT_FILE));
    let doing = || format!("reading settings from {}", path.display());
    let text = match std::fs::read_to_string(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound && named.is_none() => return Ok(File::default()),
        other => other.doing(doing)?,
    };
    let parsed = serde_json::from_str::<Map<String, Value>>(&text).and_then(|map| serde_json::from_value(map.into()));
    parsed.map_err(|e| Error::new(ErrorKind::InvalidInput, e.to_string())).doing(doing)
}

/// `NAME=VALUE`, as `--storage-opt` takes it.
pub fn parse_option(text: &str) -> Result<(String, String)> {
    match text.split_once('=') {
        Some((name, value)) if !name.trim().is_empty() => Ok((name.trim().into(), value.trim().into())),
        _ => Err(Error::new(ErrorKind::InvalidInput, format!("{text:?} is no storage option"))
            .hint("write NAME=VALUE, for example overlay2.redirect_dir=off")),
    }
}

/// `/var/lib/graphdriver` for root; without the host's privileges a directory of the user's own.
fn default_root() -> Result<PathBuf> {
    if rustix::process::geteuid().is_root() && !in_user_namespace() {
        return Ok("/var/lib/graphdriver".into());
    }
    let base = std::env::var_os("XDG_DATA_HOME").map(PathBuf::from);
    base.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".local/share")))
        .map(|base| base.join("graphdriver"))
        .ok_or_else(|| Error::new(ErrorKind::InvalidInput, "no data root: HOME is not set").hint("pass --root DIR"))
}

/// Whether user ids here are not the host's own: the initial namespace maps all of them (user_namespaces(7)).
pub fn in_user_namespace() -> bool {
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    map.split_whitespace().collect::<Vec<_>>() != ["0", "0", "4294967295"]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_file(text: &str, given: Given) -> Result<Settings> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&file, text).unwrap();
        Settings::resolve(Given { file: Some(file.path().into()), ..given })
    }

    #[test]
    fn flags_beat_the_file() {
        let text = r#"{"data-root": "/a", "storage-driver": "btrfs", "storage-opts": ["x=1"], "debug": true}"#;
        let file = with_file(text, Given::default()).unwrap();
        assert_eq!((file.data_root, file.storage_driver.as_deref()), (PathBuf::from("/a"), Some("btrfs")));
        assert_eq!((file.storage_opts.get("x"), file.debug), (Some("1"), true));
        let given = Given { data_root: Some("/b".into()), storage_opts: vec!["y=2".into()], ..Given::default() };
        let both = with_file(text, given).unwrap();
        assert_eq!(
            (both.data_root, both.storage_opts.get("x"), both.storage_opts.get("y")),
            ("/b".into(), None, Some("2"))
        );
        let quiet = Given { debug: Some(false), ..Given::default() };
        assert!(!with_file(text, quiet).unwrap().debug);
    }

    #[test]
    fn unknown_keys_are_errors_that_list_the_known_ones() {
        assert_eq!(with_file(r#"["/dir"]"#, Given::default()).unwrap_err().kind(), ErrorKind::InvalidInput);
        let e = with_file(r#"{"storage-drivers": "x"}"#, Given::default()).unwrap_err().to_string();
        assert!(e.contains("storage-drivers") && e.contains("`storage-driver`") && e.contains("`data-root`"), "{e}");
    }

    #[test]
    fn a_named_file_must_exist_and_options_need_a_value() {
        let gone = Given { file: Some("/nonexistent.json".into()), ..Given::default() };
        assert_eq!(Settings::resolve(gone).unwrap_err().kind(), ErrorKind::NotFound);
        let odd = Given { storage_opts: vec!["size".into()], ..Given::default() };
        assert_eq!(with_file("{}", odd).unwrap_err().kind(), ErrorKind::InvalidInput);
    }
}
