//! The record that gives a layer tar back byte for byte: what of it is no file content, and where the content lies.
//!
//! # Format
//!
//! A directory with mode 0700. Numbers are little-endian; a *path* is a `u16` length and as many bytes, relative to
//! the layer's root, free of symlinks.
//!
//! * `stream`: one zstd frame with checksum. In it `"gdrecord"`, a version byte (1), then records, each led by one byte:
//!   * 1, `u32` length, bytes: bytes of the tar as they are.
//!   * 2, path, `u32` count, then per segment `u64` offset and `u64` length: the bytes of the tar are these of that file.
//!   * 0, `u64` size of the tar: the end.
//! * `moves`, only if content was overridden by a later entry of the same tar: `"gdmoved\0"`, a version byte (1), then per
//!   move `u64` position and a path. The nth (from 0) says that the records of type 2 before that position (counted
//!   from 0) that name that path, and are not taken by an earlier move, mean the file `moved/n`.
//! * `moved/`: the files moved.

use super::Segment;
use super::header::corrupt;
use crate::{Context, DiffId, Digest, Error, ErrorKind, Result, Root};
use rustix::{
    fs::{self, AtFlags, Mode, OFlags, SeekFrom},
    io::Errno,
};
use sha2::{Digest as _, Sha256};
use std::{
    collections::HashMap,
    ffi::{OsStr, OsString},
    fs::File,
    io::{self, BufReader, BufWriter, Read, Write},
    os::{
        fd::{BorrowedFd, OwnedFd},
        unix::{
            ffi::{OsStrExt, OsStringExt},
            fs::{DirBuilderExt, FileExt},
        },
    },
    path::{Path, PathBuf},
};

const STREAM_MAGIC: &[u8] = b"gdrecord\x01";
const MOVES_MAGIC: &[u8] = b"gdmoved\0\x01";
const BYTES: u8 = 1;
const CONTENT: u8 = 2;
const END: u8 = 0;

/// Writes a record while a tar is unpacked.
pub(super) struct Recorder {
    path: PathBuf,
    dir: OwnedFd,
    stream: zstd::Encoder<'static, BufWriter<File>>,
    moves: Option<Moves>,
    contents: u64,
}

struct Moves {
    list: BufWriter<File>,
    dir: OwnedFd,
    count: u64,
}

impl Recorder {
    /// Makes the directory `path`, whose parent must exist.
    pub fn create(path: &Path) -> Result<Recorder> {
        let make = || -> Result<Recorder> {
            std::fs::DirBuilder::new().mode(0o700).create(path)?;
            let dir = fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
            let mut stream = zstd::Encoder::new(BufWriter::new(new_file(&dir, "stream")?), 1)?;
            stream.include_checksum(true)?;
            stream.write_all(STREAM_MAGIC)?;
            Ok(Recorder { path: path.to_owned(), dir, stream, moves: None, contents: 0 })
        };
        make().doing(|| format!("making the layer's record {}", path.display()))
    }

    /// The next bytes of the tar are these.
    pub fn bytes(&mut self, bytes: &[u8]) -> Result<()> {
        for chunk in bytes.chunks(1 << 20) {
            self.put(&[&[BYTES], &(chunk.len() as u32).to_le_bytes(), chunk])?;
        }
        Ok(())
    }

    /// The next bytes of the tar are the segments of the file that is at `path` now.
    pub fn content(&mut self, path: &Path, segments: &[Segment]) -> Result<()> {
        if segments.is_empty() {
            return Ok(());
        }
        self.contents += 1;
        self.put(&[&[CONTENT], &path_field(path)?, &(segments.len() as u32).to_le_bytes()])?;
        for segment in segments {
            self.put(&[&segment.offset.to_le_bytes(), &segment.len.to_le_bytes()])?;
        }
        Ok(())
    }

    fn put(&mut self, parts: &[&[u8]]) -> Result<()> {
        let mut put = || parts.iter().try_for_each(|part| self.stream.write_all(part));
        put().doing(|| format!("writing the layer's record {}", self.path.display()))
    }

    /// Takes the regular file `name` in `dir`, which is `path`, out of the layer and keeps what was recorded of it.
    pub fn move_aside(&mut self, dir: BorrowedFd<'_>, name: &OsStr, path: &Path) -> Result<()> {
        let mut put = || -> Result<()> {
            let moves = match &mut self.moves {
                Some(moves) => moves,
                none => none.insert(Moves::create(&self.dir)?),
            };
            moves.take(dir, name)?;
            moves.list.write_all(&self.contents.to_le_bytes())?;
            moves.list.write_all(&path_field(path)?)?;
            Ok(())
        };
        put().doing(|| format!("moving {} to the layer's record {}", path.display(), self.path.display()))
    }

    /// Ends the record of a tar of `size` bytes. After it returns the record survives a power cut.
    pub fn finish(mut self, size: u64) -> Result<()> {
        self.put(&[&[END], &size.to_le_bytes()])?;
        let finish = || -> Result<()> {
            self.stream.finish()?.into_inner().map_err(|e| e.into_error())?.sync_all()?;
            if let Some(moves) = self.moves {
                moves.list.into_inner().map_err(|e| e.into_error())?.sync_all()?;
                fs::fsync(&moves.dir)?;
            }
            fs::fsync(&self.dir)?;
            fs::fsync(fs::openat(
                &self.dir,
                "..",
                OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
                Mode::empty(),
            )?)?;
            Ok(())
        };
        finish().doing(|| format!("finishing the layer's record {}", self.path.display()))
    }
}

impl Moves {
    fn create(record: &OwnedFd) -> Result<Moves> {
        let mut list = BufWriter::new(new_file(record, "moves")?);
        list.write_all(MOVES_MAGIC)?;
        fs::mkdirat(record, "moved", Mode::RWXU)?;
        let dir = fs::openat(record, "moved", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Moves { list, dir, count: 0 })
    }

    fn take(&mut self, dir: BorrowedFd<'_>, name: &OsStr) -> Result<()> {
        let to = self.count.to_string();
        self.count += 1;
        match fs::renameat(dir, name, &self.dir, &to) {
            // Another filesystem, subvolume or quota project.
            Err(Errno::XDEV) => {
                copy_sparse(&open_beneath(dir, name)?, &new_file(&self.dir, &to)?)?;
                fs::unlinkat(dir, name, AtFlags::empty())?;
            }
            done => done?,
        }
        fs::fsync(open_beneath(self.dir_fd(), OsStr::new(&to))?)?;
        Ok(())
    }

    fn dir_fd(&self) -> BorrowedFd<'_> {
        std::os::fd::AsFd::as_fd(&self.dir)
    }
}

fn new_file(dir: &OwnedFd, name: &str) -> Result<File> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    Ok(fs::openat(dir, name, flags, Mode::RUSR | Mode::WUSR)?.into())
}

fn open_beneath(dir: BorrowedFd<'_>, name: &OsStr) -> Result<File> {
    Ok(fs::openat(dir, name, OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?.into())
}

/// Copies a file without filling its holes: they may be larger than the disk.
fn copy_sparse(from: &File, to: &File) -> Result<()> {
    let size = from.metadata()?.len();
    to.set_len(size)?;
    let (mut at, mut buffer) = (0, vec![0; 128 << 10]);
    while at < size {
        at = match fs::seek(from, SeekFrom::Data(at)) {
            Err(Errno::NXIO) => break,
            found => found?,
        };
        let end = fs::seek(from, SeekFrom::Hole(at))?;
        while at < end {
            let len = (end - at).min(buffer.len() as u64) as usize;
            from.read_exact_at(&mut buffer[..len], at)?;
            to.write_all_at(&buffer[..len], at)?;
            at += len as u64;
        }
    }
    to.sync_all()?;
    Ok(())
}

fn path_field(path: &Path) -> Result<Vec<u8>> {
    let bytes = path.as_os_str().as_bytes();
    let len = u16::try_from(bytes.len()).map_err(|_| corrupt("its path is longer than 65535 bytes"))?;
    Ok([&len.to_le_bytes(), bytes].concat())
}

/// Writes to `out` the tar that was unpacked beneath `root` while `record` was made.
///
/// Its digest is computed on the way and compared with `diff_id` at the end. [`ErrorKind::Corrupt`] means that the layer
/// or its record has been changed on disk; what was written to `out` must then be thrown away.
pub fn repack(record: &Path, root: &Root, diff_id: DiffId, out: &mut dyn Write) -> Result<()> {
    let mut out = Hashing { out: BufWriter::with_capacity(256 << 10, out), hash: Sha256::new(), written: 0 };
    Replay::open(record)
        .and_then(|mut replay| replay.run(root, &mut out))
        .and_then(|()| out.out.flush().doing(|| "writing the archive"))
        .and_then(|()| match Digest::from_bytes(out.hash.finalize().into()) {
            found if found == diff_id.0 => Ok(()),
            found => {
                Err(corrupt(format!("the layer has been changed on disk: its tar is {found} instead of {diff_id}")))
            }
        })
        .doing(|| format!("restoring a layer's tar from {}", record.display()))
}

struct Hashing<'a> {
    out: BufWriter<&'a mut dyn Write>,
    hash: Sha256,
    written: u64,
}

impl Hashing<'_> {
    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.hash.update(bytes);
        self.written += bytes.len() as u64;
        self.out.write_all(bytes).doing(|| "writing the archive")
    }
}

/// A record being read.
struct Replay {
    record: Root,
    stream: BufReader<zstd::Decoder<'static, BufReader<File>>>,
    moves: HashMap<PathBuf, Vec<(u64, u64)>>,
    contents: u64,
    buffer: Vec<u8>,
}

impl Replay {
    fn open(path: &Path) -> Result<Replay> {
        let record = Root::open(path)?;
        let stream = zstd::Decoder::new(record.open_file(Path::new("stream"))?)?;
        let moves = read_moves(&record)?;
        let mut stream = BufReader::with_capacity(128 << 10, stream);
        expect_magic(&mut stream, STREAM_MAGIC)?;
        Ok(Replay { record, stream, moves, contents: 0, buffer: vec![0; 128 << 10] })
    }

    fn run(&mut self, root: &Root, out: &mut Hashing<'_>) -> Result<()> {
        loop {
            match self.array::<1>()?[0] {
                BYTES => {
                    let mut rest = u32::from_le_bytes(self.array()?) as usize;
                    while rest > 0 {
                        let len = rest.min(self.buffer.len());
                        self.stream.read_exact(&mut self.buffer[..len]).map_err(damaged)?;
                        out.put(&self.buffer[..len])?;
                        rest -= len;
                    }
                }
                CONTENT => {
                    let path = read_path(&mut self.stream)?;
                    self.content(root, &path, out).map_err(changed).doing(|| format!("reading {}", path.display()))?;
                }
                END if u64::from_le_bytes(self.array()?) == out.written => return Ok(()),
                _ => return Err(corrupt("the layer's record is damaged")),
            }
        }
    }

    fn content(&mut self, root: &Root, path: &Path, out: &mut Hashing<'_>) -> Result<()> {
        let moved = self.moves.get(path).and_then(|all| all.iter().find(|(before, _)| self.contents < *before));
        let file = match moved {
            Some((_, n)) => self.record.open_file(&Path::new("moved").join(n.to_string()))?,
            None => root.open_file(path)?,
        };
        self.contents += 1;
        for _ in 0..u32::from_le_bytes(self.array()?) {
            let (mut at, mut rest) = (u64::from_le_bytes(self.array()?), u64::from_le_bytes(self.array()?));
            while rest > 0 {
                let len = rest.min(self.buffer.len() as u64) as usize;
                file.read_exact_at(&mut self.buffer[..len], at)?;
                out.put(&self.buffer[..len])?;
                (at, rest) = (at + len as u64, rest - len as u64);
            }
        }
        Ok(())
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        array(&mut self.stream)
    }
}

/// A file that is missing, short or something else now has been changed since it was recorded.
fn changed(e: Error) -> Error {
    match e.kind() {
        ErrorKind::NotFound | ErrorKind::InvalidInput | ErrorKind::Corrupt => {
            corrupt(format!("the layer has been changed on disk: {}", e.reason()))
        }
        _ => e,
    }
}

fn damaged(e: io::Error) -> Error {
    let e = Error::from(e);
    let reason = format!("the layer's record is damaged: {}", e.reason());
    Error::new(ErrorKind::Corrupt, reason)
}

fn array<const N: usize>(from: &mut dyn Read) -> Result<[u8; N]> {
    let mut bytes = [0; N];
    from.read_exact(&mut bytes).map_err(damaged)?;
    Ok(bytes)
}

fn read_path(from: &mut dyn Read) -> Result<PathBuf> {
    let mut path = vec![0; u16::from_le_bytes(array(from)?).into()];
    from.read_exact(&mut path).map_err(damaged)?;
    Ok(OsString::from_vec(path).into())
}

fn expect_magic(from: &mut dyn Read, magic: &[u8]) -> Result<()> {
    let found: [u8; 9] = array(from)?;
    if found[..8] != magic[..8] {
        return Err(corrupt("the layer's record is damaged: it does not begin as one"));
    }
    if found != magic {
        let reason = format!("the layer's record has version {}; this program knows version {}", found[8], magic[8]);
        return Err(Error::new(ErrorKind::Unsupported, reason)
            .hint("use the version of graphdriver that wrote it, or a later one"));
    }
    Ok(())
}

/// Per path its moves: before which position, and which file of `moved/`.
fn read_moves(record: &Root) -> Result<HashMap<PathBuf, Vec<(u64, u64)>>> {
    let mut moves: HashMap<PathBuf, Vec<_>> = HashMap::new();
    let mut list = match record.open_file(Path::new("moves")) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(moves),
        found => BufReader::new(found?),
    };
    expect_magic(&mut list, MOVES_MAGIC)?;
    for n in 0.. {
        if io::BufRead::fill_buf(&mut list)?.is_empty() {
            break;
        }
        let before = u64::from_le_bytes(array(&mut list)?);
        moves.entry(read_path(&mut list)?).or_default().push((before, n));
    }
    Ok(moves)
}
