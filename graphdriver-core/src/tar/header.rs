//! Decoding the fields of tar headers and PAX records, with the bounds hostile archives are held to.

use crate::{Error, ErrorKind, Result, Timestamp};
use std::{
    collections::BTreeMap,
    ffi::OsString,
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
};

/// The longest path a system call takes, without its NUL (`PATH_MAX`, linux/limits.h).
pub(super) const MAX_PATH: usize = 4095;
const MAX_NAME: usize = 255;
/// `XATTR_NAME_MAX` and `XATTR_SIZE_MAX`, linux/limits.h.
const MAX_XATTR_NAME: usize = 255;
const MAX_XATTR_VALUE: usize = 64 << 10;
/// A file's segments are held in memory; no real file comes near.
pub(super) const MAX_SEGMENTS: usize = 1 << 20;

pub(super) fn corrupt(reason: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, reason)
}

/// A numeric field: octal text, or base-256 two's complement if the first bit is set (GNU tar manual, "Basic Tar
/// Format"). The `tar` crate wraps negative ones.
pub(super) fn number(field: &[u8], what: &str) -> Result<i128> {
    if field[0] & 0x80 != 0 {
        // The bit after the marker is the sign.
        let first = i128::from(field[0] & 0x7f) - if field[0] & 0x40 != 0 { 0x80 } else { 0 };
        return Ok(field[1..].iter().fold(first, |n, byte| (n << 8) | i128::from(*byte)));
    }
    let text = field.iter().map(|b| if *b == 0 { b' ' } else { *b }).collect::<Vec<_>>();
    let text = text.trim_ascii();
    if text.is_empty() {
        return Ok(0);
    }
    let octal = |text| std::str::from_utf8(text).ok().and_then(|t| i128::from_str_radix(t, 8).ok());
    let first_word = text.split(|b| *b == b' ').next().unwrap_or_default();
    let value = octal(first_word).filter(|_| !matches!(first_word.first(), Some(b'+' | b'-')));
    value.ok_or_else(|| corrupt(format!("its {what} is no number")))
}

/// A size or an offset; no file is larger than `i64::MAX`.
pub(super) fn size(value: i128, what: &str) -> Result<u64> {
    i64::try_from(value)
        .ok()
        .and_then(|n| u64::try_from(n).ok())
        .ok_or_else(|| corrupt(format!("its {what} is {value}")))
}

/// An owner. `u32::MAX` means "leave it" to chown(2) and is nobody's.
pub(super) fn id(value: i128, what: &str) -> Result<u32> {
    let id = u32::try_from(value).ok().filter(|id| *id != u32::MAX);
    id.ok_or_else(|| corrupt(format!("its {what} is {value}")))
}

/// Whether the block's checksum is right; some old tars summed signed characters.
pub(super) fn checksum_matches(block: &[u8; 512]) -> bool {
    let (mut unsigned, mut signed) = (0i128, 0i128);
    for (at, byte) in block.iter().enumerate() {
        let byte = if (148..156).contains(&at) { b' ' } else { *byte };
        unsigned += i128::from(byte);
        signed += i128::from(byte as i8);
    }
    number(&block[148..156], "checksum").is_ok_and(|sum| sum == unsigned || sum == signed)
}

/// A text field: up to its NUL, or all of it.
pub(super) fn text(field: &[u8]) -> &[u8] {
    &field[..field.iter().position(|b| *b == 0).unwrap_or(field.len())]
}

/// The name in a header of any format: ustar's prefix counts, GNU's header keeps times there.
pub(super) fn header_name(block: &[u8; 512]) -> Vec<u8> {
    let name = text(&block[..100]);
    if &block[257..263] != b"ustar\0" {
        return name.to_vec();
    }
    // star's own format has times in the last 24 bytes of the prefix, and says so at the end.
    let prefix_end = if &block[508..512] == b"tar\0" { 476 } else { 500 };
    let prefix = text(&block[345..prefix_end]);
    if prefix.is_empty() { name.to_vec() } else { [prefix, b"/", name].concat() }
}

/// What a PAX header says about the next entry (POSIX.1-2008 "pax", "pax Extended Header").
#[derive(Debug, Default)]
pub(super) struct Pax {
    pub path: Option<Vec<u8>>,
    pub link: Option<Vec<u8>>,
    pub size: Option<u64>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub mtime: Option<Timestamp>,
    pub xattrs: BTreeMap<OsString, Vec<u8>>,
    pub sparse: PaxSparse,
}

/// `GNU.sparse.*` (GNU tar manual, "Storing Sparse Files").
#[derive(Debug, Default)]
pub(super) struct PaxSparse {
    pub major: Option<u64>,
    pub minor: Option<u64>,
    pub name: Option<Vec<u8>>,
    pub real_size: Option<u64>,
    /// Offsets and lengths in turn, as 0.0 has them in records of their own and 0.1 in one.
    pub map: Option<Vec<u64>>,
}

impl Pax {
    /// Adds the records in `data`. The `tar` crate's own parser splits at newlines, which names and xattrs may contain.
    pub fn parse(&mut self, mut data: &[u8]) -> Result<()> {
        let bad = || corrupt("malformed PAX record");
        // Padding NULs at the end come from writers that count their block.
        while !data.is_empty() && data[0] != 0 {
            let space = data.iter().position(|b| *b == b' ').ok_or_else(bad)?;
            let len = decimal(&data[..space]).ok_or_else(bad)? as usize;
            if len <= space + 1 || len > data.len() || data[len - 1] != b'\n' {
                return Err(bad());
            }
            let record = &data[space + 1..len - 1];
            let equals = record.iter().position(|b| *b == b'=').ok_or_else(bad)?;
            self.set(&record[..equals], &record[equals + 1..])?;
            data = &data[len..];
        }
        Ok(())
    }

    fn set(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        let text = || (!value.is_empty()).then(|| value.to_vec());
        match key {
            b"path" => self.path = text(),
            b"linkpath" => self.link = text(),
            b"size" => self.size = count(key, value)?,
            b"uid" => self.uid = count(key, value)?.map(|n| id(n.into(), "uid")).transpose()?,
            b"gid" => self.gid = count(key, value)?.map(|n| id(n.into(), "gid")).transpose()?,
            b"mtime" if value.is_empty() => self.mtime = None,
            b"mtime" => self.mtime = Some(time(value).ok_or_else(|| corrupt("its PAX mtime is no time"))?),
            b"GNU.sparse.major" => self.sparse.major = count(key, value)?,
            b"GNU.sparse.minor" => self.sparse.minor = count(key, value)?,
            b"GNU.sparse.name" => self.sparse.name = text(),
            b"GNU.sparse.size" | b"GNU.sparse.realsize" => self.sparse.real_size = count(key, value)?,
            b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => self.sparse_number(key, value)?,
            b"GNU.sparse.map" => {
                self.sparse.map = Some(Vec::new());
                for number in value.split(|b| *b == b',').filter(|n| !n.is_empty()) {
                    self.sparse_number(key, number)?;
                }
            }
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    self.set_xattr(name, value)?;
                }
            }
        }
        Ok(())
    }

    fn sparse_number(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        let map = self.sparse.map.get_or_insert_default();
        // In 0.0 an offset opens a pair and a length closes it.
        let expects_length = map.len() % 2 == 1;
        if key != b"GNU.sparse.map" && expects_length != (key == b"GNU.sparse.numbytes") {
            return Err(corrupt("its sparse map has an offset without a length"));
        }
        map.push(count(key, value)?.ok_or_else(|| corrupt("its sparse map has an empty number"))?);
        if map.len() > 2 * MAX_SEGMENTS {
            return Err(corrupt(format!("its sparse map has more than {MAX_SEGMENTS} segments")));
        }
        Ok(())
    }

    fn set_xattr(&mut self, name: &[u8], value: &[u8]) -> Result<()> {
        let name = unescape_keyword(name);
        if name.is_empty() || name.len() > MAX_XATTR_NAME || name.contains(&0) {
            return Err(corrupt(format!("attribute name {:?} is no attribute name", String::from_utf8_lossy(&name))));
        }
        if value.len() > MAX_XATTR_VALUE {
            return Err(corrupt(format!("attribute {} is longer than 64 KiB", String::from_utf8_lossy(&name))));
        }
        self.xattrs.insert(OsString::from_vec(name), value.to_vec());
        Ok(())
    }
}

/// GNU tar writes `%` and `=`, which ends a PAX keyword, as `%25` and `%3D` (its `xattr_encode_keyword`).
fn unescape_keyword(name: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(name.len());
    let mut rest = name;
    while let Some((first, tail)) = rest.split_first() {
        let (byte, tail) = match rest.get(..3) {
            Some(b"%3D") => (b'=', &rest[3..]),
            Some(b"%25") => (b'%', &rest[3..]),
            _ => (*first, tail),
        };
        out.push(byte);
        rest = tail;
    }
    out
}

pub(super) fn decimal(text: &[u8]) -> Option<u64> {
    let digits = !text.is_empty() && text.iter().all(u8::is_ascii_digit);
    let n: u64 = digits.then(|| std::str::from_utf8(text).ok()?.parse().ok()).flatten()?;
    (n <= i64::MAX as u64).then_some(n)
}

/// An empty value takes an earlier one back.
fn count(key: &[u8], value: &[u8]) -> Result<Option<u64>> {
    if value.is_empty() {
        return Ok(None);
    }
    let bad = || corrupt(format!("its PAX {} is no number", String::from_utf8_lossy(key)));
    decimal(value).map(Some).ok_or_else(bad)
}

/// `[-]seconds[.fraction]`; what is finer than a nanosecond is cut off.
fn time(value: &[u8]) -> Option<Timestamp> {
    let (negative, value) = match value.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, value),
    };
    let mut parts = value.splitn(2, |b| *b == b'.');
    let secs = i64::try_from(decimal(parts.next()?)?).ok()?;
    let fraction = parts.next().unwrap_or_default();
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let digit = |at: usize| fraction.get(at).map_or(0, |b| u32::from(b - b'0'));
    let nanos = (0..9).fold(0, |n, at| n * 10 + digit(at));
    Some(match (negative, nanos) {
        (false, _) => Timestamp { secs, nanos },
        (true, 0) => Timestamp { secs: -secs, nanos: 0 },
        (true, _) => Timestamp { secs: -secs - 1, nanos: 1_000_000_000 - nanos },
    })
}

/// A name from an archive as a path beneath the root: `./` and leading slashes are dropped, `..` is refused.
pub(super) fn normal_path(name: &[u8]) -> Result<PathBuf> {
    let mut path = Vec::with_capacity(name.len());
    for component in name.split(|b| *b == b'/') {
        match component {
            b"" | b"." => continue,
            b".." => return Err(corrupt("it leads out of the layer")),
            // A deletion of the longest name is longer itself.
            _ if component.strip_prefix(b".wh.").unwrap_or(component).len() > MAX_NAME => {
                return Err(corrupt("a name in it is longer than 255 bytes"));
            }
            _ if component.contains(&0) => return Err(corrupt("its name contains a NUL")),
            _ => {}
        }
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(component);
    }
    if path.len() > MAX_PATH {
        return Err(corrupt(format!("its name is longer than {MAX_PATH} bytes")));
    }
    Ok(OsString::from_vec(path).into())
}

/// The target of a symlink: kept as it is, within what a symlink can hold.
pub(super) fn symlink_target(target: Vec<u8>) -> Result<PathBuf> {
    if target.is_empty() || target.len() > MAX_PATH || target.contains(&0) {
        return Err(corrupt(format!("its link target is empty, longer than {MAX_PATH} bytes or contains a NUL")));
    }
    Ok(OsString::from_vec(target).into())
}

/// How messages name an entry: quoted, and short however long a hostile name is.
pub(super) fn entry_label(name: &[u8]) -> String {
    let shown = &name[..name.len().min(200)];
    let dots = if shown.len() < name.len() { "…" } else { "" };
    format!("entry {:?}{dots}", Path::new(&OsString::from_vec(shown.to_vec())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_octal_or_base_256_of_either_sign() {
        for (field, value) in [
            (&b"0000644\0"[..], 0o644),
            (b"  644 \0\0", 0o644),
            (b"\0\0\0\0\0\0\0\0", 0),
            (b"77777777", 0o77777777),
            (b"\x80\0\0\0\0\0\x01\0", 256),
            (b"\xff\xff\xff\xff\xff\xff\xff\xff", -1),
            (b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xfe", -2),
            (b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff", i64::MAX.into()),
        ] {
            assert_eq!(number(field, "x").unwrap(), value, "{field:?}");
        }
        for bad in [&b"9       "[..], b"-1      ", b"+1      ", b"12x     "] {
            assert_eq!(number(bad, "x").unwrap_err().kind(), ErrorKind::Corrupt, "{bad:?}");
        }
        assert!(size(-1, "size").is_err() && size(1 << 63, "size").is_err());
        assert!(id(u32::MAX.into(), "uid").is_err() && id(-1, "uid").is_err());
    }

    #[test]
    fn pax_records_hold_newlines_nanoseconds_and_binary_attributes() {
        let mut pax = Pax::default();
        let mut data = Vec::new();
        for (key, value) in [
            (&b"path"[..], &b"a\nb"[..]),
            (b"mtime", b"-1.25"),
            (b"SCHILY.xattr.user.a%3Db%25", b"\0=\n\xff"),
            (b"uid", b"70000"),
            (b"uid", b""),
            (b"comment", b"x"),
        ] {
            let body = [b" ", key, b"=", value, b"\n"].concat();
            let len = (1..).find(|l: &usize| body.len() + l.to_string().len() == *l).unwrap();
            data.extend_from_slice(len.to_string().as_bytes());
            data.extend_from_slice(&body);
        }
        pax.parse(&data).unwrap();
        assert_eq!(pax.path.as_deref(), Some(&b"a\nb"[..]));
        assert_eq!(pax.mtime, Some(Timestamp { secs: -2, nanos: 750_000_000 }));
        assert_eq!(pax.xattrs[&OsString::from("user.a=b%")], b"\0=\n\xff");
        assert_eq!(pax.uid, None);
        for bad in [&b"x"[..], b"8 path=a\n", b"4 a\n", b"99 path=a\n", b"6 a=b\n\x31", b"8 uid=x\n"] {
            assert_eq!(Pax::default().parse(bad).unwrap_err().kind(), ErrorKind::Corrupt, "{bad:?}");
        }
    }

    #[test]
    fn names_lose_their_root_and_never_climb() {
        for (name, path) in [(&b"./"[..], ""), (b"/etc//passwd", "etc/passwd"), (b"./a/./b/", "a/b"), (b"..a", "..a")] {
            assert_eq!(normal_path(name).unwrap(), Path::new(path));
        }
        let deep = b"a/".repeat(2100);
        for bad in [&b".."[..], b"a/../b", b"/..", &[b'a'; 256], b"a\0b", &deep] {
            assert_eq!(normal_path(bad).unwrap_err().kind(), ErrorKind::Corrupt);
        }
    }
}
