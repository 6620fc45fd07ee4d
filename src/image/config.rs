//! Image configurations (OCI image specification, "Image Configuration"; Docker's is the same with more fields).

use crate::image::{Changes, host_architecture};
use graphdriver_core::{Context, DiffId, Digest, Error, ErrorKind, Result};
use jiff::Timestamp;
use oci_spec::image::History;
use serde::Deserialize;
use serde_json::{Map, Value, json};

/// The largest configuration accepted, in bytes.
pub const MAX_CONFIG: usize = 4 << 20;

/// An image's configuration: the bytes as they came, whose sha256 is the image's ID, and what they say.
#[derive(Debug, Clone)]
pub struct ImageConfig {
    raw: Vec<u8>,
    id: Digest,
    parsed: Parsed,
}

#[derive(Debug, Clone, Deserialize)]
struct Parsed {
    created: Option<String>,
    author: Option<String>,
    architecture: Option<String>,
    os: Option<String>,
    variant: Option<String>,
    rootfs: RootFs,
    history: Option<Vec<History>>,
    config: Option<Map<String, Value>>,
}

#[derive(Debug, Clone, Deserialize)]
struct RootFs {
    #[serde(rename = "type")]
    kind: String,
    /// Docker leaves it out, and others write null, when there is no layer.
    diff_ids: Option<Vec<DiffId>>,
}

/// What a new layer or a new image adds to a configuration.
#[derive(Debug, Clone, Default)]
pub struct Commit {
    /// When; see [`created_now`].
    pub created: Timestamp,
    /// Who: becomes the image's author if not empty.
    pub author: String,
    /// Why.
    pub comment: String,
    /// The command that made the layer.
    pub created_by: String,
    /// Changes to the `config` section.
    pub changes: Changes,
}

impl ImageConfig {
    /// Parses and validates a configuration; the bytes are kept as they are.
    ///
    /// # Errors
    /// `Corrupt` if it is too large, no JSON, or its `rootfs` is not a list of layers.
    pub fn parse(raw: Vec<u8>) -> Result<ImageConfig> {
        let corrupt = |why: String| Error::new(ErrorKind::Corrupt, why).doing("reading the image configuration");
        if raw.len() > MAX_CONFIG {
            return Err(corrupt(format!("it has {} bytes, more than the {MAX_CONFIG} allowed", raw.len())));
        }
        let parsed: Parsed = serde_json::from_slice(&raw).map_err(|e| corrupt(e.to_string()))?;
        if parsed.rootfs.kind != "layers" {
            return Err(corrupt(format!("rootfs.type is {:?}, and only \"layers\" is known", parsed.rootfs.kind)));
        }
        let config = ImageConfig { id: Digest::of(&raw), raw, parsed };
        let steps = config.history().iter().filter(|h| !is_empty_layer(h)).count();
        if steps != config.diff_ids().len() && !config.history().is_empty() {
            // Squashing tools and old builders leave such histories behind; every other tool loads them.
            tracing::debug!(image = %config.id, steps, layers = config.diff_ids().len(), "history does not match layers");
        }
        Ok(config)
    }

    /// A configuration for an image of one layer (none for an empty image), as `import` makes it.
    pub fn import(layer: Option<DiffId>, commit: &Commit) -> Result<ImageConfig> {
        let base = json!({
            "architecture": host_architecture(),
            "os": "linux",
            "config": {},
            "rootfs": { "type": "layers", "diff_ids": [] },
            "history": [],
        });
        let Value::Object(base) = base else { unreachable!("an object literal") };
        build(base, layer, commit)
    }

    /// A configuration for an image that has one more layer than this one, or only a changed `config` section if
    /// `layer` is none. Everything this one says and this program does not know is kept.
    pub fn commit(&self, layer: Option<DiffId>, commit: &Commit) -> Result<ImageConfig> {
        let mut base: Map<String, Value> =
            serde_json::from_slice(&self.raw).map_err(|e| Error::new(ErrorKind::Corrupt, e.to_string()))?;
        // Docker's legacy notes on the container and image this one came from would be untrue of the new image.
        for stale in ["container", "container_config", "id", "parent", "parent_id", "Size"] {
            base.shift_remove(stale);
        }
        build(base, layer, commit)
    }

    /// The configuration as it was read or made.
    pub fn raw(&self) -> &[u8] {
        &self.raw
    }

    /// The image's ID: the sha256 of [`raw`](Self::raw).
    pub fn id(&self) -> Digest {
        self.id
    }

    /// The layers, bottom first.
    pub fn diff_ids(&self) -> &[DiffId] {
        self.parsed.rootfs.diff_ids.as_deref().unwrap_or_default()
    }

    /// When the image was made, if that is said and is a time.
    pub fn created(&self) -> Option<Timestamp> {
        self.parsed.created.as_deref()?.parse().ok()
    }

    /// Who made it; empty if not said.
    pub fn author(&self) -> &str {
        self.parsed.author.as_deref().unwrap_or_default()
    }

    /// The processor it is for, as Go names it; empty if not said.
    pub fn architecture(&self) -> &str {
        self.parsed.architecture.as_deref().unwrap_or_default()
    }

    /// The variant of the processor, such as `v7`.
    pub fn variant(&self) -> Option<&str> {
        self.parsed.variant.as_deref().filter(|v| !v.is_empty())
    }

    /// The operating system it is for; empty if not said.
    pub fn os(&self) -> &str {
        self.parsed.os.as_deref().unwrap_or_default()
    }

    /// How it was made, first step first.
    pub fn history(&self) -> &[History] {
        self.parsed.history.as_deref().unwrap_or_default()
    }

    /// The history with the layer each step made, counted from the bottom; none for a step that made no layer, and for
    /// steps beyond the layers there are.
    pub fn steps(&self) -> impl Iterator<Item = (&History, Option<DiffId>)> {
        let mut layers = self.diff_ids().iter();
        self.history().iter().map(move |h| (h, if is_empty_layer(h) { None } else { layers.next().copied() }))
    }

    /// What containers of the image run with: `Env`, `Cmd`, `WorkingDir`, …
    pub fn config(&self) -> Option<&Map<String, Value>> {
        self.parsed.config.as_ref()
    }
}

fn is_empty_layer(step: &History) -> bool {
    step.empty_layer().unwrap_or(false)
}

fn build(mut base: Map<String, Value>, layer: Option<DiffId>, commit: &Commit) -> Result<ImageConfig> {
    let created = commit.created.to_string();
    let mut step = Map::from_iter([("created".to_owned(), json!(created))]);
    for (key, text) in [("author", &commit.author), ("created_by", &commit.created_by), ("comment", &commit.comment)] {
        if !text.is_empty() {
            step.insert(key.to_owned(), json!(text));
        }
    }
    match layer {
        Some(layer) => list(&mut base["rootfs"], "diff_ids")?.push(json!(layer)),
        None => drop(step.insert("empty_layer".to_owned(), json!(true))),
    }
    if !base.get("history").is_some_and(Value::is_array) {
        base.insert("history".to_owned(), json!([]));
    }
    base["history"].as_array_mut().expect("made just above").push(Value::Object(step));
    base.insert("created".to_owned(), json!(created));
    if !commit.author.is_empty() {
        base.insert("author".to_owned(), json!(commit.author));
    }
    if !base.get("config").is_some_and(Value::is_object) {
        base.insert("config".to_owned(), json!({}));
    }
    commit.changes.apply(base["config"].as_object_mut().expect("made just above"))?;
    let raw = serde_json::to_vec(&base).map_err(|e| Error::new(ErrorKind::InvalidInput, e.to_string()))?;
    ImageConfig::parse(raw)
}

fn list<'v>(object: &'v mut Value, key: &str) -> Result<&'v mut Vec<Value>> {
    let object = object.as_object_mut().ok_or_else(|| Error::new(ErrorKind::Corrupt, "rootfs is no object"))?;
    let slot = object.entry(key).or_insert(Value::Null);
    if slot.is_null() {
        *slot = json!([]);
    }
    slot.as_array_mut().ok_or_else(|| Error::new(ErrorKind::Corrupt, format!("{key} is no list")))
}

/// The time a new image is made at: now, or what `SOURCE_DATE_EPOCH` says, so that builds can be repeated bit for bit
/// (reproducible-builds.org, "SOURCE_DATE_EPOCH").
///
/// # Errors
/// `InvalidInput` if the variable is set to anything but a number of seconds.
pub fn created_now() -> Result<Timestamp> {
    created_at(std::env::var_os("SOURCE_DATE_EPOCH").as_deref())
}

fn created_at(epoch: Option<&std::ffi::OsStr>) -> Result<Timestamp> {
    let Some(text) = epoch else { return Ok(Timestamp::now()) };
    let seconds = text.to_str().and_then(|s| s.parse::<i64>().ok());
    let time = seconds.and_then(|s| Timestamp::from_second(s).ok());
    time.ok_or_else(|| Error::new(ErrorKind::InvalidInput, format!("{text:?} is no number of seconds since 1970")))
        .doing(|| "reading SOURCE_DATE_EPOCH")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsStr;

    fn diff_id(text: &str) -> DiffId {
        DiffId(Digest::of(text))
    }

    fn commit(changes: &[&str]) -> Commit {
        Commit {
            created: Timestamp::from_second(1_700_000_000).unwrap(),
            author: "me".into(),
            comment: "why".into(),
            created_by: "sh -c x".into(),
            changes: Changes::parse(changes).unwrap(),
        }
    }

    #[test]
    fn the_id_is_the_digest_of_the_bytes_as_they_came() {
        let raw = br#"{ "os":"linux", "rootfs": {"type":"layers","diff_ids":null}, "x": 1 }"#.to_vec();
        let config = ImageConfig::parse(raw.clone()).unwrap();
        assert_eq!((config.id(), config.raw()), (Digest::of(&raw), raw.as_slice()));
        assert_eq!((config.os(), config.architecture(), config.diff_ids().len()), ("linux", "", 0));
        assert_eq!((config.created(), config.config()), (None, None));
    }

    #[test]
    fn null_where_docker_writes_null_is_fine() {
        let raw = br#"{"created":"0001-01-01T00:00:00Z","rootfs":{"type":"layers"},"history":null,"config":null}"#;
        let config = ImageConfig::parse(raw.to_vec()).unwrap();
        assert_eq!(config.created().unwrap().to_string(), "0001-01-01T00:00:00Z");
    }

    #[test]
    fn bad_configurations_are_corrupt() {
        let huge = format!("{{\"x\":\"{}\"}}", "a".repeat(MAX_CONFIG));
        for (raw, why) in [
            ("", "EOF"),
            ("[]", "invalid"),
            ("{}", "rootfs"),
            (r#"{"rootfs":{"type":"tree","diff_ids":[]}}"#, "\"tree\""),
            (r#"{"rootfs":{"type":"layers","diff_ids":["sha256:12"]}}"#, "no digest"),
            (r#"{"rootfs":{"type":"layers","diff_ids":["../../x"]}}"#, "no digest"),
            (&"[".repeat(100_000), "invalid type"),
            (&huge, "more than"),
        ] {
            let e = ImageConfig::parse(raw.as_bytes().to_vec()).unwrap_err();
            assert_eq!(e.kind(), ErrorKind::Corrupt);
            assert!(e.reason().contains(why), "{why}: {e}");
        }
    }

    #[test]
    fn import_then_commit_adds_layers_history_and_changes() {
        let base = ImageConfig::import(Some(diff_id("a")), &commit(&["CMD [\"sh\"]"])).unwrap();
        assert_eq!((base.os(), base.architecture()), ("linux", host_architecture()));
        assert_eq!(base.config().unwrap()["Cmd"], json!(["sh"]));
        let child = base.commit(Some(diff_id("b")), &commit(&["ENV A=1"])).unwrap();
        assert_eq!(child.diff_ids(), [diff_id("a"), diff_id("b")]);
        assert_eq!(child.history().len(), 2);
        assert_eq!(child.history()[1].comment().as_deref(), Some("why"));
        assert_eq!(child.created().unwrap().to_string(), "2023-11-14T22:13:20Z");
        assert_eq!((child.author(), &child.config().unwrap()["Env"]), ("me", &json!(["A=1"])));
        let same_files = child.commit(None, &commit(&[])).unwrap();
        assert_eq!(same_files.diff_ids(), child.diff_ids());
        let steps: Vec<_> = same_files.steps().map(|(_, layer)| layer).collect();
        assert_eq!(steps, [Some(diff_id("a")), Some(diff_id("b")), None]);
    }

    #[test]
    fn commit_keeps_unknown_fields_in_order_and_drops_stale_notes() {
        let raw =
            br#"{"zz":{"b":1,"a":2},"container":"c","os":"linux","rootfs":{"type":"layers"},"config":{"Weird":1}}"#;
        let child = ImageConfig::parse(raw.to_vec()).unwrap().commit(Some(diff_id("a")), &commit(&[])).unwrap();
        let text = std::str::from_utf8(child.raw()).unwrap();
        assert!(text.starts_with(r#"{"zz":{"b":1,"a":2},"os":"linux""#), "{text}");
        assert_eq!(child.config().unwrap()["Weird"], json!(1));
    }

    #[test]
    fn source_date_epoch_sets_the_time() {
        assert_eq!(created_at(Some(OsStr::new("0"))).unwrap().to_string(), "1970-01-01T00:00:00Z");
        assert!(created_at(None).unwrap() > Timestamp::from_second(1_700_000_000).unwrap());
        for bad in ["", "yesterday", "1e9", "99999999999999"] {
            assert_eq!(created_at(Some(OsStr::new(bad))).unwrap_err().kind(), ErrorKind::InvalidInput, "{bad}");
        }
    }
}
