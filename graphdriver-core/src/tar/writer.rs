//! Writing layer tars.

use super::{Content, Segment};
use crate::{Context, Error, ErrorKind, FileKind, Metadata, Result, Timestamp};
use std::{
    collections::BTreeMap,
    ffi::OsStr,
    io::{self, Read, Write},
    os::unix::ffi::OsStrExt,
    path::Path,
};
use tar::{EntryType, Header};

const BLOCK: usize = 512;
/// Large, so that small files share a write; file data is read straight into it.
const BUFFER: usize = 256 * 1024;
/// Holes that together save less than this are written as zeros, which every tool understands.
pub(super) const WORTHWHILE_HOLES: u64 = 64 * 1024;

/// The prefix of a deletion in a layer tar (OCI image specification, "Whiteouts").
pub(super) const WHITEOUT: &str = ".wh.";
const OPAQUE: &str = ".wh..wh..opq";

/// Writes a tar: ustar where everything fits, with a pax extended header where it does not (nanoseconds, long and
/// non-ASCII names, large numbers, xattrs as `SCHILY.xattr.*`, sparse files as GNU's pax format 1.0). The same calls give
/// the same bytes. After an error the archive is unfinished and of no use.
///
/// Paths are relative and normal, as for a [`Sink`](super::Sink).
pub struct TarWriter<W> {
    out: W,
    buffer: Box<[u8]>,
    filled: usize,
}

impl<W: Write> TarWriter<W> {
    /// Writes to `out`, in large pieces.
    pub fn new(out: W) -> Self {
        TarWriter { out, buffer: vec![0; BUFFER].into(), filled: 0 }
    }

    /// Adds an inode. `content` is for regular files, and its size counts rather than that in `meta`: if `data` ends
    /// early the rest is written as zeros, as GNU tar does, and if there is more it is cut. Sockets are skipped.
    pub fn append(&mut self, path: &Path, meta: &Metadata, content: Option<Content<'_>>) -> Result<()> {
        self.node(path, meta, content).doing(|| format!("writing entry {:?}", path))
    }

    fn node(&mut self, path: &Path, meta: &Metadata, content: Option<Content<'_>>) -> Result<()> {
        let link = match &meta.kind {
            FileKind::Symlink { target } => Some(target.as_path()),
            _ => None,
        };
        let mut entry = Entry::new(path, link, meta);
        let kind = match &meta.kind {
            FileKind::File { .. } => {
                let content = content.ok_or_else(|| Error::new(ErrorKind::InvalidInput, "a file without content"))?;
                return self.file(entry, path, content);
            }
            FileKind::Socket => return Ok(()),
            FileKind::Directory => EntryType::Directory,
            FileKind::Fifo => EntryType::Fifo,
            FileKind::Symlink { .. } => EntryType::Symlink,
            FileKind::CharDevice { major, minor } => entry.device(EntryType::Char, *major, *minor)?,
            FileKind::BlockDevice { major, minor } => entry.device(EntryType::Block, *major, *minor)?,
        };
        entry.size(0);
        let name = if kind.is_dir() { &directory_name(path)[..] } else { path.as_os_str().as_bytes() };
        entry.name(name);
        self.entry(entry, kind)
    }

    /// Adds `path` as another name of `target`, which was added before. `meta` is that of the inode: tools apply it, and
    /// their chown takes file capabilities away, so that the xattrs have to be there again.
    pub fn hard_link(&mut self, path: &Path, target: &Path, meta: &Metadata) -> Result<()> {
        let mut entry = Entry::new(path, Some(target), meta);
        entry.name(path.as_os_str().as_bytes());
        entry.size(0);
        self.entry(entry, EntryType::Link).doing(|| format!("writing entry {:?}", path))
    }

    /// Adds the deletion of `path`.
    pub fn whiteout(&mut self, path: &Path) -> Result<()> {
        let Some(name) = path.file_name() else {
            return Err(Error::new(ErrorKind::InvalidInput, "the root directory cannot be deleted"));
        };
        let mut marker = WHITEOUT.as_bytes().to_vec();
        marker.extend_from_slice(name.as_bytes());
        self.marker(&path.with_file_name(OsStr::from_bytes(&marker)))
    }

    /// Adds the mark that the layers below have nothing in the directory `dir`.
    pub fn opaque(&mut self, dir: &Path) -> Result<()> {
        self.marker(&dir.join(OPAQUE))
    }

    fn marker(&mut self, path: &Path) -> Result<()> {
        let meta = Metadata {
            kind: FileKind::File { size: 0 },
            mode: 0,
            uid: 0,
            gid: 0,
            mtime: Timestamp::default(),
            xattrs: BTreeMap::new(),
        };
        let mut entry = Entry::new(path, None, &meta);
        entry.name(path.as_os_str().as_bytes());
        entry.size(0);
        self.entry(entry, EntryType::Regular).doing(|| format!("writing entry {:?}", path))
    }

    /// Ends the archive and gives `out` back, with everything written to it.
    pub fn finish(mut self) -> Result<W> {
        self.put(&[0; 2 * BLOCK]).doing(|| "ending the tar")?;
        self.flush().doing(|| "ending the tar")?;
        Ok(self.out)
    }

    fn file(&mut self, mut entry: Entry, path: &Path, mut content: Content<'_>) -> Result<()> {
        let stored: u64 = content.segments.iter().map(|s| s.len).sum();
        if content.size.saturating_sub(stored) < WORTHWHILE_HOLES {
            entry.name(path.as_os_str().as_bytes());
            entry.size(content.size);
            self.entry(entry, EntryType::Regular)?;
            let mut at = 0;
            for segment in &content.segments {
                self.zeros(segment.offset - at)?;
                self.copy(&mut content.data, segment.len)?;
                at = segment.offset + segment.len;
            }
            self.zeros(content.size - at)?;
            return self.pad(content.size);
        }
        let map = sparse_map(&content.segments, content.size);
        let size = map.len() as u64 + stored;
        entry.sparse(path, content.size);
        entry.size(size);
        self.entry(entry, EntryType::Regular)?;
        self.put(&map)?;
        self.copy(&mut content.data, stored)?;
        self.pad(size)
    }

    /// Writes the headers.
    fn entry(&mut self, mut entry: Entry, kind: EntryType) -> Result<()> {
        if !entry.pax.0.is_empty() {
            let records = &entry.pax.0;
            let mut header = Header::new_ustar();
            put_text(&mut header.as_old_mut().name, b"PaxHeaders.0");
            header.set_entry_type(EntryType::XHeader);
            header.set_mode(0o644);
            header.set_uid(0);
            header.set_gid(0);
            header.set_mtime(0);
            header.set_size(records.len() as u64);
            header.set_cksum();
            self.put(header.as_bytes())?;
            self.put(records)?;
            self.pad(records.len() as u64)?;
        }
        entry.header.set_entry_type(kind);
        entry.header.set_cksum();
        self.put(entry.header.as_bytes())
    }

    fn copy(&mut self, data: &mut dyn Read, mut len: u64) -> Result<()> {
        while len > 0 {
            if self.filled == self.buffer.len() {
                self.flush()?;
            }
            let room = &mut self.buffer[self.filled..];
            let want = room.len().min(usize::try_from(len).unwrap_or(usize::MAX));
            match data.read(&mut room[..want]) {
                Ok(0) => return self.zeros(len),
                Ok(got) => {
                    self.filled += got;
                    len -= got as u64;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(Error::from(e).doing("reading the file")),
            }
        }
        Ok(())
    }

    fn zeros(&mut self, len: u64) -> Result<()> {
        let mut left = len;
        while left > 0 {
            let piece = left.min(BLOCK as u64);
            self.put(&[0; BLOCK][..piece as usize])?;
            left -= piece;
        }
        Ok(())
    }

    /// Fills the last block of `len` bytes.
    fn pad(&mut self, len: u64) -> Result<()> {
        self.zeros(len.next_multiple_of(BLOCK as u64) - len)
    }

    fn put(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            if self.filled == self.buffer.len() {
                self.flush()?;
            }
            let piece = bytes.len().min(self.buffer.len() - self.filled);
            self.buffer[self.filled..][..piece].copy_from_slice(&bytes[..piece]);
            self.filled += piece;
            bytes = &bytes[piece..];
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        self.out.write_all(&self.buffer[..self.filled]).doing(|| "writing the tar")?;
        self.filled = 0;
        Ok(())
    }
}

/// The headers of an entry while they are put together.
struct Entry {
    header: Header,
    pax: Pax,
}

impl Entry {
    fn new(path: &Path, link: Option<&Path>, meta: &Metadata) -> Entry {
        let mut entry = Entry { header: Header::new_ustar(), pax: Pax::default() };
        if path.to_str().is_none() || link.is_some_and(|link| link.to_str().is_none()) {
            // pax(1): without it, values are UTF-8.
            entry.pax.record(b"hdrcharset", b"BINARY");
        }
        if let Some(link) = link {
            entry.link(link.as_os_str().as_bytes());
        }
        entry.header.set_mode(meta.mode);
        // Readers that know no pax must not take a set-user-id file for root's.
        let owner = |pax: &mut Pax, key: &str, id: u32| pax.number(key, id.into(), 7).unwrap_or(0o7777777);
        entry.header.set_uid(owner(&mut entry.pax, "uid", meta.uid));
        entry.header.set_gid(owner(&mut entry.pax, "gid", meta.gid));
        entry.mtime(meta.mtime);
        for (name, value) in &meta.xattrs {
            entry.pax.record(&xattr_key(name), value);
        }
        entry
    }

    fn name(&mut self, name: &[u8]) {
        let ustar = self.header.as_ustar_mut().expect("made as ustar");
        match split_name(name) {
            Some((prefix, name)) => {
                put_text(&mut ustar.prefix, prefix);
                put_text(&mut ustar.name, name);
            }
            None => {
                put_text(&mut ustar.name, name);
                self.pax.record(b"path", name);
            }
        }
    }

    fn link(&mut self, target: &[u8]) {
        let field = &mut self.header.as_old_mut().linkname;
        put_text(field, target);
        if target.len() > field.len() || !target.is_ascii() {
            self.pax.record(b"linkpath", target);
        }
    }

    fn device(&mut self, kind: EntryType, major: u32, minor: u32) -> Result<EntryType> {
        if major.max(minor) > 0o7777777 {
            return Err(Error::new(ErrorKind::Unsupported, format!("device {major}:{minor} does not fit into a tar")));
        }
        self.header.set_device_major(major)?;
        self.header.set_device_minor(minor)?;
        Ok(kind)
    }

    fn size(&mut self, size: u64) {
        let size = self.pax.number("size", size, 11).unwrap_or(0);
        self.header.set_size(size);
    }

    fn mtime(&mut self, time: Timestamp) {
        let secs = u64::try_from(time.secs).ok().filter(|secs| *secs < 1 << 33);
        self.header.set_mtime(secs.unwrap_or(0));
        if secs.is_none() || time.nanos > 0 {
            self.pax.record(b"mtime", decimal(time).as_bytes());
        }
    }

    /// GNU tar's manual, "Storing Sparse Files", "PAX Format, Version 1.0".
    fn sparse(&mut self, path: &Path, size: u64) {
        let mut shown = b"GNUSparseFile.0/".to_vec();
        shown.extend_from_slice(path.file_name().unwrap_or_default().as_bytes());
        put_text(&mut self.header.as_old_mut().name, &shown);
        self.pax.record(b"GNU.sparse.major", b"1");
        self.pax.record(b"GNU.sparse.minor", b"0");
        self.pax.record(b"GNU.sparse.name", path.as_os_str().as_bytes());
        self.pax.record(b"GNU.sparse.realsize", size.to_string().as_bytes());
    }
}

/// The records of an extended header.
#[derive(Default)]
struct Pax(Vec<u8>);

impl Pax {
    /// Adds `LENGTH KEY=VALUE\n`, where LENGTH counts its own digits too.
    fn record(&mut self, key: &[u8], value: &[u8]) {
        let rest = key.len() + value.len() + 3;
        let mut len = rest + 1;
        while len != rest + len.to_string().len() {
            len = rest + len.to_string().len();
        }
        self.0.extend_from_slice(format!("{len} ").as_bytes());
        for part in [key, b"=", value, b"\n"] {
            self.0.extend_from_slice(part);
        }
    }

    /// The number if it fits into a field of `digits` octal digits; otherwise a record says it.
    fn number(&mut self, key: &str, number: u64, digits: u32) -> Option<u64> {
        if number < 1 << (3 * digits) {
            return Some(number);
        }
        self.record(key.as_bytes(), number.to_string().as_bytes());
        None
    }
}

/// Cuts what does not fit: a record says it whole then.
fn put_text(field: &mut [u8], text: &[u8]) {
    let len = text.len().min(field.len());
    field[..len].copy_from_slice(&text[..len]);
}

/// Prefix and name if ustar's fields of 155 and 100 bytes can hold it.
fn split_name(path: &[u8]) -> Option<(&[u8], &[u8])> {
    if !path.is_ascii() {
        return None;
    }
    if path.len() <= 100 {
        return Some((b"", path));
    }
    let slash = path[..path.len().min(156)].iter().rposition(|b| *b == b'/')?;
    let (prefix, name) = (&path[..slash], &path[slash + 1..]);
    (!name.is_empty() && name.len() <= 100).then_some((prefix, name))
}

fn directory_name(path: &Path) -> Vec<u8> {
    let path = path.as_os_str().as_bytes();
    [if path.is_empty() { b"." } else { path }, b"/"].concat()
}

/// Seconds with a decimal fraction: -1.5 for a second and a half before 1970.
fn decimal(time: Timestamp) -> String {
    let total = i128::from(time.secs) * 1_000_000_000 + i128::from(time.nanos);
    let (sign, total) = (if total < 0 { "-" } else { "" }, total.unsigned_abs());
    let text = format!("{sign}{}.{:09}", total / 1_000_000_000, total % 1_000_000_000);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// A key ends at the first `=`. GNU tar writes `%3D` for it and `%25` for `%`; others decode nothing, so only what
/// would be misread is written that way.
fn xattr_key(name: &OsStr) -> Vec<u8> {
    let mut key = b"SCHILY.xattr.".to_vec();
    let name = name.as_bytes();
    for (i, byte) in name.iter().enumerate() {
        match byte {
            b'=' => key.extend_from_slice(b"%3D"),
            b'%' if name[i..].starts_with(b"%3D") || name[i..].starts_with(b"%25") => key.extend_from_slice(b"%25"),
            _ => key.push(*byte),
        }
    }
    key
}

/// The number of segments, then offset and length of each, one number a line, in whole blocks. As GNU tar writes it, a
/// hole at the end is an empty segment.
fn sparse_map(segments: &[Segment], size: u64) -> Vec<u8> {
    let end = segments.last().map_or(0, |s| s.offset + s.len);
    let last = (end < size).then_some(Segment { offset: size, len: 0 });
    let mut map = format!("{}\n", segments.len() + usize::from(last.is_some())).into_bytes();
    for segment in segments.iter().chain(&last) {
        map.extend_from_slice(format!("{}\n{}\n", segment.offset, segment.len).as_bytes());
    }
    map.resize(map.len().next_multiple_of(BLOCK), 0);
    map
}

#[cfg(test)]
mod tests;
