//! Reading layer tars, entry by entry.
//!
//! The framing is our own, because every byte that is no file content has to be seen in order to give the same tar
//! back, and because sizes, times and sparse maps are needed that the `tar` crate does not give.

use super::{
    Content, Segment,
    header::{self, Pax, corrupt, id, number, size},
    sparse,
};
use crate::{Context, Error, ErrorKind, FileKind, Metadata, Result, Timestamp};
use std::{
    io::{self, BufRead, BufReader, Read},
    path::PathBuf,
};

const BLOCK: usize = 512;
const MAX_PAX: u64 = 1 << 20;

/// Told every byte of the tar that is no file content, in order.
pub type Tap<'r> = dyn FnMut(&[u8]) -> Result<()> + 'r;

/// One entry of a tar.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Where it goes: relative, normal, empty for the root itself. Names of whiteouts are as they stand.
    pub path: PathBuf,
    /// What it is.
    pub kind: EntryKind,
    /// What is stored of a regular file.
    pub segments: Vec<Segment>,
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EntryKind {
    /// A file, directory, symlink, device or FIFO.
    Node(Metadata),
    /// Another name for the path given, relative and normal too.
    HardLink(PathBuf),
}

/// Reads ustar, pax, GNU and v7 tars, with long names, sparse files of all formats, base-256 numbers, PAX times and
/// `SCHILY.xattr.*`.
///
/// As Docker and containerd (Go's `archive/tar`) do: global PAX headers change nothing, volume labels are skipped, and
/// links, directories and devices have no data whatever their size field says. `LIBARCHIVE.xattr.*` is ignored because
/// bsdtar writes the same attributes as `SCHILY.xattr.*` too, and `SCHILY.acl.*` because layers carry ACLs as xattrs.
/// Other types are [`ErrorKind::Unsupported`], everything malformed or out of bounds is [`ErrorKind::Corrupt`].
pub struct TarReader<'r> {
    input: BufReader<&'r mut dyn Read>,
    tap: Option<&'r mut Tap<'r>>,
    /// Bytes of the current entry's content that nobody has read yet.
    content: u64,
    /// Bytes after it up to the next header.
    padding: u64,
    consumed: u64,
    ended: bool,
}

/// What the headers before an entry's own say about it.
#[derive(Default)]
struct Extended {
    pax: Option<Pax>,
    name: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
}

impl Extended {
    fn is_empty(&self) -> bool {
        self.pax.is_none() && self.name.is_none() && self.link.is_none()
    }
}

impl<'r> TarReader<'r> {
    /// Reads `input`, which need not be buffered.
    pub fn new(input: &'r mut dyn Read) -> Self {
        TarReader {
            input: BufReader::with_capacity(256 << 10, input),
            tap: None,
            content: 0,
            padding: 0,
            consumed: 0,
            ended: false,
        }
    }

    /// As [`new`](Self::new), and tells `tap` what is no file content, that is what is not read through
    /// [`content`](Self::content).
    pub fn with_tap(input: &'r mut dyn Read, tap: &'r mut Tap<'r>) -> Self {
        TarReader { tap: Some(tap), ..TarReader::new(input) }
    }

    /// Bytes of the tar read so far; after the last entry, its size.
    pub fn consumed(&self) -> u64 {
        self.consumed
    }

    /// The next entry; what was not read of the one before is skipped. After the last one everything to the end of the
    /// input has been read.
    pub fn next_entry(&mut self) -> Result<Option<Entry>> {
        if self.ended {
            return Ok(None);
        }
        let mut extended = Extended::default();
        loop {
            self.skip_rest()?;
            let Some(block) = self.header_block()? else {
                if !extended.is_empty() {
                    return Err(corrupt("the archive ends after an extended header"));
                }
                self.ended = true;
                return self.drain().map(|()| None);
            };
            let at = self.consumed - BLOCK as u64;
            if !header::checksum_matches(&block) {
                return Err(corrupt(format!("no tar header at byte {at}: wrong checksum")));
            }
            let name = extended.name.clone().unwrap_or_else(|| header::header_name(&block));
            let label = || header::entry_label(&name);
            match block[156] {
                b'x' | b'X' => {
                    let data = self.extension(&block, MAX_PAX).doing(label)?;
                    extended.pax.get_or_insert_default().parse(&data).doing(label)?;
                }
                b'L' => extended.name = Some(self.long_name(&block).doing(label)?),
                b'K' => extended.link = Some(self.long_name(&block).doing(label)?),
                // Skipped with its data by the next round.
                b'g' | b'V' => self.expect_data(field_size(&block).doing(label)?),
                _ => return self.entry(&block, extended).map(Some),
            }
        }
    }

    /// The content of the entry last returned, its segments one after the other.
    pub fn content(&mut self) -> impl Read + '_ {
        ContentReader(self)
    }

    /// The content of `entry`, which must be the one last returned; none if it is no regular file.
    pub fn content_of(&mut self, entry: &Entry) -> Option<Content<'_>> {
        match &entry.kind {
            EntryKind::Node(Metadata { kind: FileKind::File { size }, .. }) => {
                let data = Box::new(ContentReader(self));
                Some(Content { size: *size, segments: entry.segments.clone(), data })
            }
            _ => None,
        }
    }

    fn entry(&mut self, block: &[u8; BLOCK], mut extended: Extended) -> Result<Entry> {
        let mut pax = extended.pax.take().unwrap_or_default();
        let sparse_name = pax.sparse.name.take();
        let name = sparse_name.or(pax.path.take()).or(extended.name).unwrap_or_else(|| header::header_name(block));
        let link = pax.link.take().or(extended.link).unwrap_or_else(|| header::text(&block[157..257]).to_vec());
        self.typed_entry(block, pax, &name, link).doing(|| header::entry_label(&name))
    }

    fn typed_entry(&mut self, block: &[u8; BLOCK], mut pax: Pax, name: &[u8], link: Vec<u8>) -> Result<Entry> {
        let path = header::normal_path(name)?;
        let mut segments = Vec::new();
        let kind = match block[156] {
            // v7 has no type for directories (GNU tar manual, "Basic Tar Format").
            0 if name.ends_with(b"/") => {
                self.expect_data(pax.size.map_or_else(|| field_size(block), Ok)?);
                FileKind::Directory
            }
            0 | b'0' | b'7' | b'S' => {
                let size;
                (size, segments) = self.file(block, &pax)?;
                FileKind::File { size }
            }
            b'1' => {
                let target =
                    header::normal_path(&link).doing(|| format!("its link target {}", header::entry_label(&link)))?;
                if target.as_os_str().is_empty() {
                    return Err(corrupt("it is a hard link to the root"));
                }
                return Ok(Entry { path, kind: EntryKind::HardLink(target), segments });
            }
            b'2' => FileKind::Symlink { target: header::symlink_target(link)? },
            b'3' | b'4' => device(block)?,
            b'5' => FileKind::Directory,
            // GNU tar's incremental dumps list the directory's names as its data.
            b'D' => {
                self.expect_data(pax.size.map_or_else(|| field_size(block), Ok)?);
                FileKind::Directory
            }
            b'6' => FileKind::Fifo,
            other => {
                let reason = format!("its type {:?} is unknown", other as char);
                return Err(Error::new(ErrorKind::Unsupported, reason));
            }
        };
        let meta = metadata(block, &mut pax, kind)?;
        Ok(Entry { path, kind: EntryKind::Node(meta), segments })
    }

    /// The size and segments of a regular file; afterwards its content comes next.
    fn file(&mut self, block: &[u8; BLOCK], pax: &Pax) -> Result<(u64, Vec<Segment>)> {
        let stored = pax.size.map_or_else(|| field_size(block), Ok)?;
        let sparse = &pax.sparse;
        if block[156] == b'S' {
            let (real_size, map) = self.old_gnu_map(block)?;
            self.expect_data(stored);
            return Ok((real_size, sparse::checked(map, real_size, stored)?));
        }
        self.expect_data(stored);
        if (sparse.major, sparse.minor) == (Some(1), Some(0)) {
            let real_size = sparse.real_size.ok_or_else(|| corrupt("it is sparse and has no size"))?;
            let map = sparse::pax_1_0(|| self.map_block())?;
            return Ok((real_size, sparse::checked(map, real_size, self.content)?));
        }
        if let (Some(map), Some(real_size)) = (&sparse.map, sparse.real_size) {
            return Ok((real_size, sparse::checked(sparse::pairs(map)?, real_size, stored)?));
        }
        if sparse.major.is_some() || sparse.map.is_some() {
            return Err(Error::new(ErrorKind::Unsupported, "it is sparse in an unknown format"));
        }
        Ok((stored, sparse::checked([Segment { offset: 0, len: stored }], stored, stored)?))
    }

    fn old_gnu_map(&mut self, block: &[u8; BLOCK]) -> Result<(u64, Vec<Segment>)> {
        let bad = || corrupt("it is sparse and its header is not GNU's");
        let gnu = tar::Header::from_byte_slice(block).as_gnu().ok_or_else(bad)?;
        let real_size = size(number(&gnu.realsize, "size")?, "size")?;
        let mut map = Vec::new();
        sparse::old_gnu(&gnu.sparse, &mut map)?;
        let mut more = gnu.isextended[0] != 0;
        while more {
            let mut extension = tar::GnuExtSparseHeader::new();
            self.framing(extension.as_mut_bytes())?;
            sparse::old_gnu(extension.sparse(), &mut map)?;
            more = extension.is_extended();
        }
        Ok((real_size, map))
    }

    /// A block of a sparse map that lies in the entry's data.
    fn map_block(&mut self) -> Result<[u8; BLOCK]> {
        let mut block = [0; BLOCK];
        self.content =
            self.content.checked_sub(BLOCK as u64).ok_or_else(|| corrupt("its sparse map is longer than its data"))?;
        self.framing(&mut block)?;
        Ok(block)
    }

    fn expect_data(&mut self, len: u64) {
        self.content = len;
        self.padding = len.wrapping_neg() % BLOCK as u64;
    }

    fn long_name(&mut self, block: &[u8; BLOCK]) -> Result<Vec<u8>> {
        let data = self.extension(block, header::MAX_PATH as u64 + 1)?;
        Ok(header::text(&data).to_vec())
    }

    /// The data of a header that describes the next entry.
    fn extension(&mut self, block: &[u8; BLOCK], max: u64) -> Result<Vec<u8>> {
        let len = field_size(block)?;
        if len > max {
            return Err(corrupt(format!("its extended header has {len} bytes, more than {max}")));
        }
        self.expect_data(len);
        self.content = 0;
        let mut data = vec![0; len as usize];
        self.framing(&mut data)?;
        Ok(data)
    }

    /// The next header; none at the end, which is a block of zeros or the end of the input.
    fn header_block(&mut self) -> Result<Option<[u8; BLOCK]>> {
        let mut block = [0; BLOCK];
        if self.at_eof()? {
            return Ok(None);
        }
        self.framing(&mut block)?;
        if block != [0; BLOCK] {
            return Ok(Some(block));
        }
        if !self.at_eof()? {
            self.framing(&mut block)?;
            if block != [0; BLOCK] {
                return Err(corrupt(format!("a lone block of zeros before byte {}", self.consumed - BLOCK as u64)));
            }
        }
        Ok(None)
    }

    fn at_eof(&mut self) -> Result<bool> {
        loop {
            match self.input.fill_buf() {
                Ok(bytes) => return Ok(bytes.is_empty()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(Error::from(e).doing("reading the archive")),
            }
        }
    }

    /// Fills `bytes` with what is no file content.
    fn framing(&mut self, bytes: &mut [u8]) -> Result<()> {
        self.input.read_exact(bytes).map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => self.truncated(),
            _ => Error::from(e).doing("reading the archive"),
        })?;
        self.consumed += bytes.len() as u64;
        match &mut self.tap {
            Some(tap) => tap(bytes),
            None => Ok(()),
        }
    }

    fn truncated(&self) -> Error {
        corrupt("the archive is truncated").hint("get the archive again")
    }

    fn skip_rest(&mut self) -> Result<()> {
        let (content, padding) = (std::mem::take(&mut self.content), std::mem::take(&mut self.padding));
        self.skip(content)?;
        // `umoci insert` writes neither the padding of the last entry nor an end marker.
        if padding > 0 && self.at_eof()? { Ok(()) } else { self.skip(padding) }
    }

    fn skip(&mut self, mut rest: u64) -> Result<()> {
        let mut buffer = [0; 8192];
        while rest > 0 {
            let len = rest.min(buffer.len() as u64) as usize;
            self.framing(&mut buffer[..len])?;
            rest -= len as u64;
        }
        Ok(())
    }

    /// Whatever follows the end marker is padding to the writer's record size, or nothing a reader should mind.
    fn drain(&mut self) -> Result<()> {
        while !self.at_eof()? {
            let bytes = self.input.buffer();
            let len = bytes.len();
            if let Some(tap) = &mut self.tap {
                tap(bytes)?;
            }
            self.consumed += len as u64;
            self.input.consume(len);
        }
        Ok(())
    }
}

struct ContentReader<'a, 'r>(&'a mut TarReader<'r>);

impl Read for ContentReader<'_, '_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let tar = &mut *self.0;
        let want = tar.content.min(buffer.len() as u64) as usize;
        if want == 0 {
            return Ok(0);
        }
        let got = tar.input.read(&mut buffer[..want])?;
        if got == 0 {
            return Err(tar.truncated().into());
        }
        tar.content -= got as u64;
        tar.consumed += got as u64;
        Ok(got)
    }
}

fn field_size(block: &[u8; BLOCK]) -> Result<u64> {
    size(number(&block[124..136], "size")?, "size")
}

fn device(block: &[u8; BLOCK]) -> Result<FileKind> {
    // linux/kdev_t.h: 12 bits of major, 20 of minor.
    let part = |field, bits: u32, what| {
        let n = number(field, what)?;
        u32::try_from(n).ok().filter(|n| *n < 1 << bits).ok_or_else(|| corrupt(format!("its {what} is {n}")))
    };
    let major = part(&block[329..337], 12, "device major")?;
    let minor = part(&block[337..345], 20, "device minor")?;
    if block[156] == b'4' {
        return Ok(FileKind::BlockDevice { major, minor });
    }
    // On the disks of overlayfs it is a deletion, and means no device anywhere.
    if (major, minor) == (0, 0) {
        return Err(corrupt("it is the character device 0/0, which is no device"));
    }
    Ok(FileKind::CharDevice { major, minor })
}

fn metadata(block: &[u8; BLOCK], pax: &mut Pax, kind: FileKind) -> Result<Metadata> {
    let mode = number(&block[100..108], "mode")?;
    let time = |secs: i128| {
        let secs = i64::try_from(secs).map_err(|_| corrupt(format!("its mtime is {secs}")))?;
        Ok::<_, Error>(Timestamp { secs, nanos: 0 })
    };
    Ok(Metadata {
        kind,
        mode: (mode & 0o7777) as u32,
        uid: pax.uid.map_or_else(|| id(number(&block[108..116], "uid")?, "uid"), Ok)?,
        gid: pax.gid.map_or_else(|| id(number(&block[116..124], "gid")?, "gid"), Ok)?,
        mtime: pax.mtime.map_or_else(|| time(number(&block[136..148], "mtime")?), Ok)?,
        xattrs: std::mem::take(&mut pax.xattrs),
    })
}
