//! The files of an archive by name, whatever holds them: a tar, found once and read in place, or a directory.

use super::stream::{Compression, Decoder, is_bad_data};
use crate::progress::Interruptible;
use graphdriver_core::{Context, Error, ErrorKind, Result, Root};
use std::{
    collections::{BTreeSet, HashMap},
    fs::File,
    io::{self, Read, Seek},
    os::unix::fs::FileExt,
    path::Path,
    sync::Arc,
};
use tar::{EntryType, Header};

/// Limits that keep the index of a hostile tar small. Real archives have a few entries per layer.
const MAX_ENTRIES: usize = 100_000;
const MAX_NAME: u64 = 4096;
const MAX_NAMES: usize = 16 << 20;
const MAX_PAX: u64 = 1 << 20;
const MAX_LINKS: usize = 16;
const BLOCK: u64 = 512;

pub(super) const NOT_HERE: &str = "it is not in the archive";

pub(super) enum Files {
    Tar(TarIndex),
    Dir(Root),
}

pub(super) struct TarIndex {
    file: Arc<File>,
    entries: HashMap<String, Entry>,
    /// The two zero blocks that end a tar were there.
    ended: bool,
}

#[derive(Clone)]
enum Entry {
    File { offset: u64, len: u64 },
    Link(String),
    Other(&'static str),
}

/// A file of the archive, read in place with a position of its own.
pub(super) struct Blob {
    file: Arc<File>,
    at: u64,
    end: u64,
}

impl Blob {
    pub(super) fn len(&self) -> u64 {
        self.end - self.at
    }
}

impl Read for Blob {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let want = buf.len().min(usize::try_from(self.end - self.at).unwrap_or(usize::MAX));
        let n = self.file.read_at(&mut buf[..want], self.at)?;
        if n == 0 && want > 0 {
            return Err(Error::new(ErrorKind::Corrupt, "the archive became shorter while it was read").into());
        }
        self.at += n as u64;
        Ok(n)
    }
}

impl Files {
    /// The files of the tar in `file`. What is compressed, or cannot be read in any order, is first written to a file
    /// without a name in `tmp_dir`.
    pub(super) fn open_tar(stream: Interruptible, tmp_dir: &Path) -> Result<Files> {
        let mut file = stream.file();
        let meta = file.metadata()?;
        let start = if meta.is_file() { file.stream_position()? } else { 0 };
        let mut head = [0; 16];
        let in_place = meta.is_file() && start == 0 && {
            let n = file.read_at(&mut head, 0)?;
            sniff(&head[..n])? == Compression::None
        };
        let file = if in_place { stream.into_file() } else { spool(stream, tmp_dir)? };
        Ok(Files::Tar(TarIndex::read(file)?))
    }

    /// The file `name`, or none if there is no such entry.
    pub(super) fn open(&self, name: &str) -> Result<Option<Blob>> {
        let opened = normalize(name).and_then(|name| match self {
            Files::Tar(tar) => tar.open(name),
            Files::Dir(root) => match root.open_file(Path::new(&name)) {
                Ok(file) => {
                    let end = file.metadata()?.len();
                    Ok(Some(Blob { file: Arc::new(file), at: 0, end }))
                }
                Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
                Err(e) => Err(e),
            },
        });
        opened.doing(|| format!("opening {name:?} of the archive"))
    }

    /// The file `name`, which something in the archive refers to.
    pub(super) fn need(&self, name: &str) -> Result<Blob> {
        let blob = self.open(name)?;
        blob.ok_or_else(|| {
            let why = match self.lacks_end() {
                true => "it is not in the archive, which has no end marker: it was probably cut short",
                false => NOT_HERE,
            };
            Error::new(ErrorKind::Corrupt, why).doing(format!("opening {name:?} of the archive"))
        })
    }

    /// The whole content of a small file.
    pub(super) fn read(&self, name: &str, limit: u64) -> Result<Vec<u8>> {
        let mut blob = self.need(name)?;
        if blob.len() > limit {
            let why = format!("it has {} bytes, more than the {limit} allowed", blob.len());
            return Err(Error::new(ErrorKind::Corrupt, why).doing(format!("reading {name:?} of the archive")));
        }
        let mut bytes = Vec::with_capacity(blob.len() as usize);
        blob.read_to_end(&mut bytes).doing(|| format!("reading {name:?} of the archive"))?;
        Ok(bytes)
    }

    /// True if it is a tar with entries and without the zero blocks at the end. Some writers leave them out.
    pub(super) fn lacks_end(&self) -> bool {
        matches!(self, Files::Tar(tar) if !tar.ended && !tar.entries.is_empty())
    }

    /// The names at the top.
    pub(super) fn top(&self) -> Result<BTreeSet<String>> {
        Ok(match self {
            Files::Tar(tar) => tar.entries.keys().map(|n| n.split('/').next().unwrap_or_default().to_owned()).collect(),
            Files::Dir(root) => {
                let dir = root.open_dir(Path::new(""))?;
                let names = graphdriver_core::root::names_in(std::os::fd::AsFd::as_fd(&dir))?;
                names.iter().map(|n| n.to_string_lossy().into_owned()).collect()
            }
        })
    }
}

/// A path of the archive without `.`, doubled slashes and the leading one. `..` is taken by its letters, as there are
/// no symlinked directories here, and must not lead out.
fn normalize(name: &str) -> Result<String> {
    let mut parts = Vec::new();
    for part in name.split('/') {
        match part {
            "" | "." => {}
            ".." if parts.pop().is_none() => {
                return Err(Error::new(ErrorKind::Corrupt, format!("the name {name:?} leads out of the archive")));
            }
            ".." => {}
            part => parts.push(part),
        }
    }
    Ok(parts.join("/"))
}

pub(super) fn sniff(head: &[u8]) -> Result<Compression> {
    Compression::sniff(head).map_err(|name| {
        Error::new(ErrorKind::Unsupported, format!("the archive is compressed with {name}"))
            .hint(format!("archives may be plain, gzip or zstd: decompress it first, for example with {name} -d"))
    })
}

fn spool(mut from: Interruptible, tmp_dir: &Path) -> Result<File> {
    let step = || format!("copying the archive to a temporary file in {}", tmp_dir.display());
    let mut head = Vec::new();
    from.by_ref().take(16).read_to_end(&mut head).doing(step)?;
    let compression = sniff(&head)?;
    let mut decoder = Decoder::new(io::Cursor::new(head).chain(from), compression)?;
    let mut file = tempfile::tempfile_in(tmp_dir).doing(step)?;
    match io::copy(&mut decoder, &mut file) {
        Ok(_) => Ok(file),
        Err(e) if is_bad_data(&e) => {
            let why = format!("the compressed archive is damaged or cut short: {e}");
            Err(Error::new(ErrorKind::Corrupt, why).doing(step()))
        }
        Err(e) => Err(e).doing(step),
    }
}

fn corrupt(why: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, why)
}

impl TarIndex {
    fn read(file: File) -> Result<TarIndex> {
        let len = file.metadata()?.len();
        let mut scan = Scan { file: &file, len, at: 0, pax: Pax::default() };
        let (mut entries, mut names, mut ended) = (HashMap::new(), 0, false);
        while let Some(found) = scan.next().doing(|| "reading the archive's tar")? {
            let Found::Entry(name, entry) = found else {
                ended = true;
                break;
            };
            names += name.len();
            if entries.len() >= MAX_ENTRIES || names > MAX_NAMES {
                let why = format!("the tar has more than {MAX_ENTRIES} entries or {MAX_NAMES} bytes of names");
                return Err(
                    corrupt(why).hint("no image archive has; `graphdriver import` takes the tar of a root filesystem")
                );
            }
            entries.insert(name, entry);
        }
        Ok(TarIndex { file: Arc::new(file), entries, ended })
    }

    fn open(&self, mut name: String) -> Result<Option<Blob>> {
        for _ in 0..MAX_LINKS {
            match self.entries.get(&name) {
                None => return Ok(None),
                Some(Entry::File { offset, len }) => {
                    return Ok(Some(Blob { file: self.file.clone(), at: *offset, end: offset + len }));
                }
                Some(Entry::Link(target)) => name = normalize(target)?,
                Some(Entry::Other(kind)) => return Err(corrupt(format!("it is a {kind} and no regular file"))),
            }
        }
        Err(corrupt(format!("more than {MAX_LINKS} links lead from it")))
    }
}

enum Found {
    Entry(String, Entry),
    End,
}

/// What extended headers say about the next entry.
#[derive(Default)]
struct Pax {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
}

struct Scan<'f> {
    file: &'f File,
    len: u64,
    at: u64,
    pax: Pax,
}

impl Scan<'_> {
    /// The next entry; none at the end of the file.
    fn next(&mut self) -> Result<Option<Found>> {
        while self.at < self.len {
            let mut block = [0; BLOCK as usize];
            if self.len - self.at < BLOCK {
                return Err(if self.at == 0 { self.no_header() } else { self.cut("in the middle of a header") });
            }
            self.file.read_exact_at(&mut block, self.at)?;
            if block == [0; BLOCK as usize] {
                return Ok(Some(Found::End));
            }
            if !is_header(&block) {
                return Err(self.no_header());
            }
            if let Some((name, entry)) = self.entry(Header::from_byte_slice(&block))? {
                return Ok(Some(Found::Entry(name, entry)));
            }
        }
        Ok(None)
    }

    fn entry(&mut self, header: &Header) -> Result<Option<(String, Entry)>> {
        let kind = header.entry_type();
        let about_next = kind.is_gnu_longname()
            || kind.is_gnu_longlink()
            || kind.is_pax_local_extensions()
            || kind.is_pax_global_extensions();
        let said = if about_next { None } else { self.pax.size.take() };
        let size = match (kind, said) {
            // A size in these is no length of data (POSIX pax, "ustar Interchange Format", size).
            (EntryType::Link | EntryType::Symlink | EntryType::Directory, _) => 0,
            (EntryType::Char | EntryType::Block | EntryType::Fifo, _) => 0,
            (_, Some(size)) => size,
            (_, None) => {
                header.entry_size().map_err(|_| corrupt(format!("bad size in the header at byte {}", self.at)))?
            }
        };
        let offset = self.at + BLOCK;
        let end = offset.checked_add(size).filter(|end| *end <= self.len);
        let name = || String::from_utf8_lossy(&header.path_bytes()).into_owned();
        let end = end.ok_or_else(|| self.cut(&format!("in the entry {:?}", name())))?;
        // The padding of the last entry may be missing where a writer left out the end marker too.
        self.at = end.next_multiple_of(BLOCK);
        if about_next {
            self.extension(kind, offset, size)?;
            return Ok(None);
        }
        let pax = std::mem::take(&mut self.pax);
        let name = pax.path.unwrap_or_else(|| header.path_bytes().into_owned());
        let link = pax.link.or_else(|| header.link_name_bytes().map(|l| l.into_owned()));
        // JSON, which is where names are asked for, cannot express others.
        let Ok(name) = String::from_utf8(name) else { return Ok(None) };
        if name.len() as u64 > MAX_NAME {
            return Err(corrupt(format!("a name has more than {MAX_NAME} bytes")));
        }
        let name = normalize(&name)?;
        Ok(Some((name.clone(), make_entry(kind, &name, link, offset, size)?)))
    }

    fn extension(&mut self, kind: EntryType, offset: u64, size: u64) -> Result<()> {
        let limit = if kind.is_gnu_longname() || kind.is_gnu_longlink() { MAX_NAME + 1 } else { MAX_PAX };
        if size > limit {
            return Err(corrupt(format!("an extended header has {size} bytes, more than the {limit} allowed")));
        }
        let mut data = vec![0; size as usize];
        self.file.read_exact_at(&mut data, offset)?;
        let text = |data: &[u8]| data.split(|b| *b == 0).next().unwrap_or_default().to_vec();
        match kind {
            EntryType::GNULongName => self.pax.path = Some(text(&data)),
            EntryType::GNULongLink => self.pax.link = Some(text(&data)),
            EntryType::XHeader => {
                for record in tar::PaxExtensions::new(&data) {
                    let record = record.map_err(|_| corrupt("a pax header is malformed"))?;
                    match record.key_bytes() {
                        b"path" => self.pax.path = Some(record.value_bytes().to_vec()),
                        b"linkpath" => self.pax.link = Some(record.value_bytes().to_vec()),
                        b"size" => {
                            let size = record.value().ok().and_then(|v| v.parse().ok());
                            self.pax.size = Some(size.ok_or_else(|| corrupt("a pax header has a bad size"))?);
                        }
                        _ => {}
                    }
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn cut(&self, place: &str) -> Error {
        corrupt(format!("the archive is cut short: its {} bytes end {place}", self.len))
            .hint("copy or download the archive again")
    }

    fn no_header(&self) -> Error {
        if self.at == 0 {
            return Error::new(ErrorKind::InvalidInput, "it is no tar, plain or compressed").hint(super::ACCEPTED);
        }
        corrupt(format!("the tar is damaged at byte {}", self.at)).hint("copy or download the archive again")
    }
}

/// True if `block` is a tar header: its checksum is right.
pub(super) fn is_header(block: &[u8; BLOCK as usize]) -> bool {
    let sum: u32 =
        block.iter().enumerate().map(|(n, b)| if (148..156).contains(&n) { 32 } else { u32::from(*b) }).sum();
    Header::from_byte_slice(block).cksum().is_ok_and(|stored| stored == sum)
}

fn make_entry(kind: EntryType, name: &str, link: Option<Vec<u8>>, offset: u64, len: u64) -> Result<Entry> {
    let link = || {
        let text = link.and_then(|l| String::from_utf8(l).ok()).filter(|l| l.len() as u64 <= MAX_NAME);
        text.ok_or_else(|| corrupt(format!("the link {name:?} has no usable target")))
    };
    Ok(match kind {
        EntryType::Regular | EntryType::Continuous => Entry::File { offset, len },
        EntryType::Symlink => {
            let dir = name.rsplit_once('/').map_or("", |(dir, _)| dir);
            let target = link()?;
            Entry::Link(if target.starts_with('/') { target } else { format!("{dir}/{target}") })
        }
        EntryType::Link => Entry::Link(link()?),
        EntryType::Directory => Entry::Other("directory"),
        EntryType::GNUSparse => Entry::Other("sparse file (was the archive packed again with tar -S?)"),
        _ => Entry::Other("special file"),
    })
}
