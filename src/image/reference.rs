//! Image names as users type them.

use graphdriver_core::{Digest, Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

const DEFAULT_DOMAIN: &str = "docker.io";
const OFFICIAL: &str = "library/";
/// The longest name without tag and digest that registries take (distribution `reference.NameTotalLengthMax`).
const MAX_NAME: usize = 255;

/// The name of an image: `alpine`, `alpine:3.20`, `localhost:5000/team/app:v1`, `app@sha256:…`.
///
/// Parsing follows the grammar of the distribution project's `reference` package with Docker's defaults: no domain
/// means `docker.io`, one path component there means `library/`, and neither tag nor digest means the tag `latest`.
/// Printing gives the familiar form, without those default parts but with the tag:
///
/// ```
/// use graphdriver::image::Reference;
/// let name: Reference = "docker.io/library/alpine".parse().unwrap();
/// assert_eq!(name.to_string(), "alpine:latest");
/// assert_eq!(name.canonical(), "docker.io/library/alpine:latest");
/// ```
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Reference {
    domain: String,
    path: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

impl Reference {
    /// The familiar name without tag and digest: `alpine`, `localhost:5000/team/app`.
    pub fn repository(&self) -> String {
        match (self.domain.as_str(), self.path.strip_prefix(OFFICIAL)) {
            (DEFAULT_DOMAIN, Some(official)) if !official.contains('/') => official.to_owned(),
            (DEFAULT_DOMAIN, _) => self.path.clone(),
            (domain, _) => format!("{domain}/{}", self.path),
        }
    }

    /// The tag; none for a name that has only a digest.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The manifest digest the name is pinned to.
    pub fn digest(&self) -> Option<Digest> {
        self.digest
    }

    /// The whole name with every default part, as containerd stores it: `docker.io/library/alpine:latest`.
    pub fn canonical(&self) -> String {
        format!("{}/{}{}", self.domain, self.path, self.suffix())
    }

    fn suffix(&self) -> String {
        let tag = self.tag.as_ref().map(|t| format!(":{t}")).unwrap_or_default();
        let digest = self.digest.map(|d| format!("@{d}")).unwrap_or_default();
        tag + &digest
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.repository(), self.suffix())
    }
}

impl FromStr for Reference {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        parse(s).map_err(|why| {
            Error::new(ErrorKind::InvalidInput, format!("{s:?} is no image name: {why}"))
                .hint("write NAME, NAME:TAG or NAME@sha256:DIGEST, such as alpine:3.20 or localhost:5000/team/app:v1")
        })
    }
}

impl TryFrom<String> for Reference {
    type Error = Error;
    fn try_from(s: String) -> Result<Self> {
        s.parse()
    }
}

impl From<Reference> for String {
    fn from(r: Reference) -> String {
        r.to_string()
    }
}

fn parse(s: &str) -> Result<Reference, String> {
    if s.is_empty() {
        return Err("it is empty".into());
    }
    let (rest, digest) = match s.split_once('@') {
        Some((rest, digest)) => (rest, Some(digest.parse::<Digest>().map_err(|e| e.reason().to_owned())?)),
        None => (s, None),
    };
    // A colon after the last slash starts the tag; one before it belongs to the registry's port.
    let name_end = rest.rfind('/').map_or(0, |slash| slash + 1);
    let (name, tag) = match rest[name_end..].find(':') {
        Some(colon) => (&rest[..name_end + colon], Some(&rest[name_end + colon + 1..])),
        None => (rest, None),
    };
    if let Some(tag) = tag {
        check_tag(tag)?;
    }
    let (domain, path) = split_domain(name);
    check_domain(domain)?;
    for component in path.split('/') {
        check_component(component, name)?;
    }
    if domain == DEFAULT_DOMAIN && name == path && is_image_id(path) {
        return Err("64 hexadecimal digits are an image's ID and cannot be its name".into());
    }
    let path = match (domain, path.contains('/')) {
        (DEFAULT_DOMAIN, false) => format!("{OFFICIAL}{path}"),
        _ => path.to_owned(),
    };
    if domain.len() + 1 + path.len() > MAX_NAME {
        return Err(format!("the name is longer than {MAX_NAME} characters"));
    }
    let tag = match (tag, digest) {
        (Some(tag), _) => Some(tag.to_owned()),
        (None, Some(_)) => None,
        (None, None) => Some("latest".to_owned()),
    };
    Ok(Reference { domain: domain.to_owned(), path, tag, digest })
}

/// What is before the first slash is a registry if it looks like a host: a dot, a port, `localhost` or an upper-case
/// letter, which paths cannot have.
fn split_domain(name: &str) -> (&str, &str) {
    match name.split_once('/') {
        Some(("index.docker.io", path)) => (DEFAULT_DOMAIN, path),
        Some((host, path))
            if host == "localhost" || host.contains(['.', ':']) || host.bytes().any(|b| b.is_ascii_uppercase()) =>
        {
            (host, path)
        }
        _ => (DEFAULT_DOMAIN, name),
    }
}

fn check_domain(domain: &str) -> Result<(), String> {
    let bad = || Err(format!("{domain:?} is no registry host"));
    let (host, port) = match domain.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((v6, port)) if v6.parse::<std::net::Ipv6Addr>().is_ok() => (None, port),
        Some(_) => return bad(),
        None => {
            let at = domain.find(':').unwrap_or(domain.len());
            (Some(&domain[..at]), &domain[at..])
        }
    };
    let label = |l: &str| {
        !l.is_empty()
            && !l.starts_with('-')
            && !l.ends_with('-')
            && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    let digits = |p: &str| !p.is_empty() && p.bytes().all(|b| b.is_ascii_digit());
    let port_ok = port.is_empty() || port.strip_prefix(':').is_some_and(digits);
    if host.is_none_or(|h| h.split('.').all(label)) && port_ok { Ok(()) } else { bad() }
}

/// `[a-z0-9]+` joined by one `.`, one or two `_`, or any number of `-`.
fn check_component(component: &str, name: &str) -> Result<(), String> {
    if name.bytes().any(|b| b.is_ascii_uppercase()) && component.bytes().any(|b| b.is_ascii_uppercase()) {
        return Err("it must be lower case".into());
    }
    if component.is_empty() {
        return Err("a part between slashes is empty".into());
    }
    let alphanumeric = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    if let Some(bad) = component.chars().find(|c| !alphanumeric(*c) && !matches!(c, '.' | '_' | '-')) {
        return Err(format!("{bad:?} is not allowed in it"));
    }
    let separators: Vec<&str> = component.split(alphanumeric).collect();
    let (first, last) = (separators[0], separators[separators.len() - 1]);
    if !first.is_empty() || !last.is_empty() {
        return Err(format!("{component:?} must begin and end with a letter or digit"));
    }
    let fine = |s: &&str| matches!(*s, "" | "." | "_" | "__") || s.bytes().all(|b| b == b'-');
    match separators.iter().find(|s| !fine(s)) {
        Some(bad) => Err(format!("{bad:?} is no separator; use one of . _ __ -")),
        None => Ok(()),
    }
}

fn check_tag(tag: &str) -> Result<(), String> {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let fine = tag.len() <= 128
        && tag.bytes().next().is_some_and(word)
        && tag.bytes().all(|b| word(b) || matches!(b, b'.' | b'-'));
    if fine {
        return Ok(());
    }
    Err(format!("the tag {tag:?} must be 1 to 128 letters, digits, _ . or -, and not begin with . or -"))
}

fn is_image_id(s: &str) -> bool {
    s.len() == 64 && s.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn names_get_docker_defaults_and_print_familiar() {
        for (typed, familiar, canonical) in [
            ("alpine", "alpine:latest", "docker.io/library/alpine:latest"),
            ("alpine:3.20", "alpine:3.20", "docker.io/library/alpine:3.20"),
            ("docker.io/library/alpine:latest", "alpine:latest", "docker.io/library/alpine:latest"),
            ("index.docker.io/alpine", "alpine:latest", "docker.io/library/alpine:latest"),
            ("docker.io/alpine", "alpine:latest", "docker.io/library/alpine:latest"),
            ("library/alpine", "alpine:latest", "docker.io/library/alpine:latest"),
            ("a/b", "a/b:latest", "docker.io/a/b:latest"),
            ("library/a/b", "library/a/b:latest", "docker.io/library/a/b:latest"),
            ("localhost:5000/a/b:tag", "localhost:5000/a/b:tag", "localhost:5000/a/b:tag"),
            ("localhost/x", "localhost/x:latest", "localhost/x:latest"),
            ("Host/x", "Host/x:latest", "Host/x:latest"),
            ("[::1]:5000/x:1", "[::1]:5000/x:1", "[::1]:5000/x:1"),
            ("gcr.io/a_b/c--d__e.f:V1.0-x", "gcr.io/a_b/c--d__e.f:V1.0-x", "gcr.io/a_b/c--d__e.f:V1.0-x"),
            ("localhost:5000", "localhost:5000", "docker.io/library/localhost:5000"),
        ] {
            let name: Reference = typed.parse().unwrap_or_else(|e| panic!("{typed}: {e}"));
            assert_eq!((name.to_string().as_str(), name.canonical().as_str()), (familiar, canonical), "{typed}");
        }
    }

    #[test]
    fn a_digest_replaces_the_default_tag() {
        let pinned: Reference = format!("app@sha256:{HEX}").parse().unwrap();
        assert_eq!((pinned.tag(), pinned.digest().unwrap().hex().as_str()), (None, HEX));
        assert_eq!(pinned.to_string(), format!("app@sha256:{HEX}"));
        let both: Reference = format!("app:1@sha256:{HEX}").parse().unwrap();
        assert_eq!((both.tag(), both.to_string()), (Some("1"), format!("app:1@sha256:{HEX}")));
    }

    #[test]
    fn bad_names_are_refused_with_the_reason() {
        let long = "a".repeat(256);
        let long_tag = format!("a:{}", "t".repeat(129));
        for (typed, why) in [
            ("", "empty"),
            ("Alpine", "lower case"),
            ("a//b", "empty"),
            ("/a", "empty"),
            ("a/", "empty"),
            ("a:", "tag"),
            ("a:-x", "tag"),
            ("a:b:c", "tag"),
            ("a b", "not allowed"),
            ("-a", "begin and end"),
            ("a-", "begin and end"),
            ("a..b", "separator"),
            ("a___b", "separator"),
            ("a._b", "separator"),
            ("../etc", "host"),
            ("..", "begin and end"),
            ("ho_st.x/a", "host"),
            ("host:/a", "host"),
            ("host:8x/a", "host"),
            ("[::g]/a", "host"),
            ("a@sha256:12", "digest"),
            ("a@md5:12", "digest"),
            (HEX, "image's ID"),
            (&long, "longer"),
            (&long_tag, "tag"),
        ] {
            let e = typed.parse::<Reference>().expect_err(typed);
            assert_eq!(e.kind(), ErrorKind::InvalidInput, "{typed}");
            assert!(e.reason().contains(why), "{typed}: {e}");
            assert!(serde_json::from_value::<Reference>(serde_json::json!(typed)).is_err(), "{typed}");
        }
    }

    proptest! {
        #[test]
        fn printing_and_parsing_agree(s in "([a-z]{1,5}(\\.[a-z]{1,3})?(:[0-9]{1,4})?/)?[a-z0-9]{1,4}((_|__|-+)[a-z0-9]{1,3}){0,2}(/[a-z]{1,3}\\.[a-z])?(:[A-Za-z0-9_][A-Za-z0-9._-]{0,5})?") {
            let name: Reference = s.parse().unwrap();
            prop_assert_eq!(&name.to_string().parse::<Reference>().unwrap(), &name);
            prop_assert_eq!(&name.canonical().parse::<Reference>().unwrap(), &name);
        }

        #[test]
        fn no_input_panics(s in "\\PC{0,40}") {
            let _ = s.parse::<Reference>();
        }
    }
}
