//! Identifiers and units as types: they validate when parsed and when deserialised.

use crate::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use std::{fmt, str::FromStr};

/// The number the store gives a layer. Never given twice within one store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct LayerId(pub u64);

impl fmt::Display for LayerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for LayerId {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        let canonical = s.parse().ok().filter(|n: &u64| n.to_string() == s);
        canonical.map(LayerId).ok_or_else(|| Error::new(ErrorKind::InvalidInput, format!("{s:?} is no layer number")))
    }
}

/// A sha256 digest, written `sha256:` and 64 lower-case hexadecimal digits
/// (OCI image specification, "Descriptors: Digests").
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest([u8; 32]);

impl Digest {
    /// The digest of `bytes`.
    pub fn of(bytes: impl AsRef<[u8]>) -> Self {
        Digest(Sha256::digest(bytes.as_ref()).into())
    }

    /// A digest that was computed elsewhere.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Digest(bytes)
    }

    /// The 64 hexadecimal digits without the algorithm.
    pub fn hex(&self) -> String {
        hex::encode(self.0)
    }

    /// The first 12 hexadecimal digits, as Docker shows identifiers.
    pub fn short(&self) -> String {
        hex::encode(&self.0[..6])
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        let bad = |why| Error::new(ErrorKind::InvalidInput, format!("{s:?} is no digest: {why}"));
        let hex = s.strip_prefix("sha256:").ok_or_else(|| bad("only sha256: is known"))?;
        if hex.len() != 64 || !hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(bad("64 lower-case hexadecimal digits must follow sha256:"));
        }
        let mut bytes = [0; 32];
        hex::decode_to_slice(hex, &mut bytes).map_err(|_| bad("not hexadecimal"))?;
        Ok(Digest(bytes))
    }
}

impl TryFrom<String> for Digest {
    type Error = Error;
    fn try_from(s: String) -> Result<Self> {
        s.parse()
    }
}

impl From<Digest> for String {
    fn from(d: Digest) -> String {
        d.to_string()
    }
}

macro_rules! digest_newtype {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub Digest);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", stringify!($name), self.0)
            }
        }

        impl FromStr for $name {
            type Err = Error;
            fn from_str(s: &str) -> Result<Self> {
                s.parse().map($name)
            }
        }
    };
}

digest_newtype! {
    /// The sha256 of a layer's uncompressed tar.
    DiffId
}
digest_newtype! {
    /// The identity of a chain of layers (OCI image specification, "Layer ChainID").
    ChainId
}

impl ChainId {
    /// The chain with `top` on it: `top` itself at the bottom, else the digest of `"PARENT TOP"`.
    pub fn extend(parent: Option<ChainId>, top: DiffId) -> ChainId {
        match parent {
            None => ChainId(top.0),
            Some(parent) => ChainId(Digest::of(format!("{parent} {top}"))),
        }
    }

    /// The chain of `layers`, bottom first as in `rootfs.diff_ids`; none for no layer.
    pub fn of(layers: &[DiffId]) -> Option<ChainId> {
        layers.iter().fold(None, |parent, top| Some(ChainId::extend(parent, *top)))
    }
}

/// A number of bytes. Parses what Docker's options take: `512`, `64k`, `10G`, `1.5GiB`, units of 1024.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ByteSize(pub u64);

impl FromStr for ByteSize {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        let bad = || Error::new(ErrorKind::InvalidInput, format!("{s:?} is no size; write 512, 64k, 10G or 1.5GiB"));
        let end = s.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(s.len());
        let (number, unit) = s.split_at(end);
        let shift = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 0,
            "k" | "kb" | "kib" => 10,
            "m" | "mb" | "mib" => 20,
            "g" | "gb" | "gib" => 30,
            "t" | "tb" | "tib" => 40,
            "p" | "pb" | "pib" => 50,
            _ => return Err(bad()),
        };
        if let Ok(whole) = number.parse::<u64>() {
            return whole.checked_mul(1 << shift).map(ByteSize).ok_or_else(bad);
        }
        let value: f64 = number.parse().map_err(|_| bad())?;
        Ok(ByteSize((value * (1u64 << shift) as f64) as u64))
    }
}

/// Decimal units with three significant digits, as `docker images` prints sizes: `7.8MB`.
impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut value = self.0 as f64;
        let units = ["B", "kB", "MB", "GB", "TB", "PB", "EB"];
        let mut unit = 0;
        while value >= 999.5 && unit + 1 < units.len() {
            value /= 1000.0;
            unit += 1;
        }
        let digits = match (unit, value) {
            (0, _) => 0,
            (_, v) if v < 9.995 => 2,
            (_, v) if v < 99.95 => 1,
            _ => 0,
        };
        let text = format!("{value:.digits$}");
        let text = if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
        f.pad(&format!("{text}{}", units[unit]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_validate() {
        let d = Digest::of("");
        assert_eq!(d.to_string(), "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
        assert_eq!(d.to_string().parse::<Digest>().unwrap(), d);
        for bad in ["", "sha256:", "sha512:00", &d.to_string().to_uppercase(), &d.to_string()[..70]] {
            assert_eq!(bad.parse::<Digest>().unwrap_err().kind(), ErrorKind::InvalidInput, "{bad}");
            assert!(serde_json::from_value::<Digest>(serde_json::json!(bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn chain_ids_follow_the_specification() {
        let (a, b) = (DiffId(Digest::of("a")), DiffId(Digest::of("b")));
        assert_eq!(ChainId::of(&[]), None);
        assert_eq!(ChainId::of(&[a]), Some(ChainId(a.0)));
        assert_eq!(ChainId::of(&[a, b]), Some(ChainId(Digest::of(format!("{a} {b}")))));
    }

    #[test]
    fn sizes_parse_and_print() {
        for (text, bytes) in [("0", 0), ("512", 512), ("64k", 65536), ("10G", 10 << 30), ("1.5GiB", 3 << 29)] {
            assert_eq!(text.parse::<ByteSize>().unwrap(), ByteSize(bytes), "{text}");
        }
        for bad in ["", "G", "10X", "-1", "1e3", "99999999999G"] {
            assert!(bad.parse::<ByteSize>().is_err(), "{bad}");
        }
        for (bytes, text) in [(0, "0B"), (999, "999B"), (1000, "1kB"), (7_800_000, "7.8MB"), (123_456_789, "123MB")] {
            assert_eq!(ByteSize(bytes).to_string(), text);
        }
    }

    #[test]
    fn layer_numbers_are_canonical() {
        assert_eq!("7".parse::<LayerId>().unwrap(), LayerId(7));
        for bad in ["", "07", "+7", "-1", "7a", "../7"] {
            assert!(bad.parse::<LayerId>().is_err(), "{bad}");
        }
    }
}
