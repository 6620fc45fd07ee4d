//! Streams that check what passes: digests, sizes, compression.

use flate2::bufread::MultiGzDecoder;
use graphdriver_core::{Digest, Error, ErrorKind, Result};
use sha2::{Digest as _, Sha256};
use std::{
    io::{self, BufReader, Read},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

const BUFFER: usize = 256 << 10;

/// 128 MiB: as much as the zstd program undoes without being asked to, and what `zstd --ultra -22` needs.
const WINDOW_LOG_MAX: u32 = 27;

/// How a stream is compressed, by its first bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    None,
    /// One or several gzip members (RFC 1952), estargz among them.
    Gzip,
    /// One or several zstd frames, skippable ones too (RFC 8878), zstd:chunked among them.
    Zstd,
}

impl Compression {
    /// Recognises a stream by its first bytes; `Err` has the name of a compression nobody here can undo.
    pub(super) fn sniff(head: &[u8]) -> Result<Compression, &'static str> {
        match head {
            [0x1f, 0x8b, ..] => Ok(Compression::Gzip),
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Ok(Compression::Zstd),
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Err("xz"),
            [b'B', b'Z', b'h', b'1'..=b'9', ..] => Err("bzip2"),
            [0x04, 0x22, 0x4d, 0x18, ..] => Err("lz4"),
            _ => Ok(Compression::None),
        }
    }
}

/// Undoes a compression, streaming.
pub(super) enum Decoder<R: Read> {
    Plain(BufReader<R>),
    Gzip(Box<MultiGzDecoder<BufReader<R>>>),
    Zstd(zstd::Decoder<'static, BufReader<R>>),
}

impl<R: Read> Decoder<R> {
    pub(super) fn new(reader: R, compression: Compression) -> io::Result<Self> {
        let reader = BufReader::with_capacity(BUFFER, reader);
        Ok(match compression {
            Compression::None => Decoder::Plain(reader),
            Compression::Gzip => Decoder::Gzip(Box::new(MultiGzDecoder::new(reader))),
            Compression::Zstd => {
                let mut decoder = zstd::Decoder::with_buffer(reader)?;
                decoder.window_log_max(WINDOW_LOG_MAX)?;
                Decoder::Zstd(decoder)
            }
        })
    }

    fn source(&mut self) -> &mut BufReader<R> {
        match self {
            Decoder::Plain(r) => r,
            Decoder::Gzip(d) => d.get_mut(),
            Decoder::Zstd(d) => d.get_mut(),
        }
    }
}

impl<R: Read> Read for Decoder<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Decoder::Plain(r) => r.read(buf),
            Decoder::Gzip(d) => d.read(buf),
            Decoder::Zstd(d) => d.read(buf).map_err(explain_window),
        }
    }
}

/// The zstd crate gives away an error's name only (ZSTD_error_frameParameter_windowTooLarge in zstd_errors.h).
fn explain_window(e: io::Error) -> io::Error {
    if e.to_string() != "Frame requires too much memory for decoding" {
        return e;
    }
    let why = "it is compressed by zstd with a window of more than 128 MiB, which undoing it would hold in memory";
    Error::new(ErrorKind::Unsupported, why).hint("compress it again without --long, or with at most --long=27").into()
}

/// True if the failure is the data's, as a decoder reports it, and not the operating system's or one of ours.
pub(super) fn is_bad_data(e: &io::Error) -> bool {
    e.raw_os_error().is_none() && !e.get_ref().is_some_and(|inner| inner.is::<Error>())
}

/// A reader that computes the sha256 of what passes through.
#[derive(Debug)]
pub struct HashReader<R> {
    inner: R,
    hasher: Sha256,
}

impl<R> HashReader<R> {
    /// Hashes what is read from `inner`.
    pub fn new(inner: R) -> Self {
        HashReader { inner, hasher: Sha256::new() }
    }

    /// The digest of what has been read so far.
    pub fn digest(&self) -> Digest {
        Digest::from_bytes(self.hasher.clone().finalize().into())
    }
}

impl<R: Read> Read for HashReader<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buf)?;
        self.hasher.update(&buf[..n]);
        Ok(n)
    }
}

/// A stored blob on its way to a decoder: its size and digest are checked when its end is reached.
struct Checked {
    inner: Box<dyn Read + Send>,
    hasher: Option<Sha256>,
    digest: Option<Digest>,
    size: u64,
    passed: Arc<AtomicU64>,
}

impl Checked {
    fn check_end(&mut self) -> Result<()> {
        let passed = self.passed.load(Ordering::Relaxed);
        if passed != self.size {
            let why = format!("it has {passed} bytes, and {} were announced", self.size);
            return Err(Error::new(ErrorKind::Corrupt, why));
        }
        if let (Some(hasher), Some(declared)) = (self.hasher.take(), self.digest) {
            let found = Digest::from_bytes(hasher.finalize().into());
            if found != declared {
                let why = format!("its content has the digest {found}, and {declared} is declared");
                return Err(Error::new(ErrorKind::Corrupt, why));
            }
        }
        Ok(())
    }
}

impl Read for Checked {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buf)?;
        if let Some(hasher) = &mut self.hasher {
            hasher.update(&buf[..n]);
        }
        self.passed.fetch_add(n as u64, Ordering::Relaxed);
        if n == 0 && !buf.is_empty() {
            self.check_end()?;
        }
        Ok(n)
    }
}

/// The uncompressed tar of a layer. What is stored is verified on the way: the end of the stream comes only if the size
/// and the digest that the archive declares were right and the compression was whole; otherwise the last read fails
/// with a `Corrupt` error that names the layer.
pub struct LayerStream {
    name: String,
    decoder: Decoder<Checked>,
    state: State,
}

#[derive(PartialEq)]
enum State {
    Open,
    Ended,
    Failed,
}

impl LayerStream {
    pub(super) fn new(
        name: String,
        inner: Box<dyn Read + Send>,
        size: u64,
        digest: Option<Digest>,
        compression: Compression,
    ) -> Result<Self> {
        let hasher = digest.map(|_| Sha256::new());
        let checked = Checked { inner, hasher, digest, size, passed: Arc::default() };
        Ok(LayerStream { name, decoder: Decoder::new(checked, compression)?, state: State::Open })
    }

    /// The number of stored (compressed) bytes consumed so far, for a progress bar; it goes on counting after the
    /// stream has moved to another thread.
    pub fn progress(&mut self) -> Arc<AtomicU64> {
        self.decoder.source().get_ref().passed.clone()
    }

    /// Reads what a decoder left, so that the check at the end takes place whenever the decoder stops.
    fn drain(&mut self) -> Result<()> {
        io::copy(self.decoder.source(), &mut io::sink())?;
        Ok(())
    }

    fn explain(&mut self, e: io::Error) -> Error {
        if !is_bad_data(&e) {
            return e.into();
        }
        // A wrong digest says more than what the decoder stumbled over.
        match self.drain() {
            Err(digest) if digest.reason().contains("declared") => digest,
            _ => Error::new(ErrorKind::Corrupt, format!("its compressed data is damaged or cut short: {e}")),
        }
    }
}

impl Read for LayerStream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self.state {
            State::Open => {}
            State::Ended => return Ok(0),
            State::Failed => return Err(Error::new(ErrorKind::Corrupt, "it failed before").into()),
        }
        let outcome = match self.decoder.read(buf) {
            Ok(0) if !buf.is_empty() => self.drain().map(|()| 0),
            Ok(n) => return Ok(n),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => return Err(e),
            Err(e) => Err(self.explain(e)),
        };
        self.state = if outcome.is_ok() { State::Ended } else { State::Failed };
        outcome.map_err(|e| e.doing(format!("reading layer {}", self.name)).into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::{Compression as Level, write::GzEncoder};
    use std::io::Write;

    fn gzip(data: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Level::default());
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    fn skippable() -> Vec<u8> {
        [&0x184d2a50u32.to_le_bytes()[..], &3u32.to_le_bytes()[..], b"toc"].concat()
    }

    fn read(stored: Vec<u8>, digest: Option<Digest>) -> Result<Vec<u8>> {
        let (size, compression) = (stored.len() as u64, Compression::sniff(&stored).unwrap());
        let mut out = Vec::new();
        LayerStream::new("L".into(), Box::new(io::Cursor::new(stored)), size, digest, compression)?
            .read_to_end(&mut out)?;
        Ok(out)
    }

    fn data() -> Vec<u8> {
        (0..600_000u32).flat_map(|n| (n / 7).to_le_bytes()).collect()
    }

    #[test]
    fn every_compression_and_its_multi_part_form_is_undone() {
        let whole = data();
        let (a, b) = whole.split_at(1_000_000);
        let z = |d: &[u8]| zstd::encode_all(d, 3).unwrap();
        for stored in [
            data(),
            gzip(&data()),
            [gzip(a), gzip(b)].concat(),
            z(&data()),
            [z(a), skippable(), z(b), skippable()].concat(),
            [skippable(), z(&data())].concat(),
        ] {
            let digest = Digest::of(&stored);
            assert!(read(stored, Some(digest)).unwrap() == data());
        }
    }

    #[test]
    fn a_wrong_digest_is_corrupt_and_names_both() {
        for stored in [data(), gzip(&data()), zstd::encode_all(&data()[..], 3).unwrap()] {
            let (found, declared) = (Digest::of(&stored), Digest::of("other"));
            let e = read(stored, Some(declared)).unwrap_err();
            let text = e.to_string();
            assert_eq!(e.kind(), ErrorKind::Corrupt);
            assert!(text.contains(&found.to_string()) && text.contains(&declared.to_string()), "{text}");
            assert!(text.starts_with("reading layer L: "), "{text}");
        }
    }

    #[test]
    fn a_flipped_bit_is_reported_as_a_wrong_digest_if_one_is_declared() {
        for whole in [gzip(&data()), zstd::encode_all(&data()[..], 3).unwrap()] {
            let declared = Digest::of(&whole);
            let mut stored = whole.clone();
            stored[whole.len() / 2] ^= 0x10;
            assert!(read(stored.clone(), Some(declared)).unwrap_err().reason().contains("declared"));
            match read(stored, None) {
                Err(e) => assert_eq!(e.kind(), ErrorKind::Corrupt),
                // zstd carries no checksum unless asked to: the DiffID tells then.
                Ok(got) => assert!(got != data()),
            }
        }
    }

    #[test]
    fn cut_or_prolonged_compressed_wholeis_corrupt() {
        for whole in [gzip(&data()), zstd::encode_all(&data()[..], 3).unwrap()] {
            for cut in [5, whole.len() / 2, whole.len() - 1] {
                let e = read(whole[..cut].to_vec(), None).unwrap_err();
                assert_eq!(e.kind(), ErrorKind::Corrupt, "{cut}: {e}");
            }
            let e = read([&whole[..], b"garbage"].concat(), None).unwrap_err();
            assert_eq!(e.kind(), ErrorKind::Corrupt, "{e}");
        }
    }

    #[test]
    fn a_zstd_window_of_more_than_128_mib_is_unsupported() {
        // RFC 8878, 3.1.1: magic, no flags, the window, then one last raw block of 3 bytes.
        let frame = |log: u8| [&[0x28, 0xb5, 0x2f, 0xfd, 0, (log - 10) << 3, 0x19, 0, 0][..], b"abc"].concat();
        assert_eq!(read(frame(27), None).unwrap(), b"abc");
        let stored = frame(28);
        let e = read(stored.clone(), Some(Digest::of(&stored))).unwrap_err();
        let text = e.to_string();
        assert_eq!(e.kind(), ErrorKind::Unsupported, "{text}");
        assert!(text.contains("layer L") && text.contains("128 MiB") && text.contains("--long=27"), "{text}");
    }

    #[test]
    fn a_failed_stream_never_ends_well() {
        let stored = gzip(&data());
        let size = stored.len() as u64;
        let mut stream = LayerStream::new(
            "L".into(),
            Box::new(io::Cursor::new(stored)),
            size,
            Some(Digest::of("x")),
            Compression::Gzip,
        )
        .unwrap();
        assert!(io::copy(&mut stream, &mut io::sink()).is_err());
        assert!(stream.read(&mut [0; 8]).is_err());
    }

    #[test]
    fn a_size_other_than_the_announced_one_is_corrupt() {
        let stored = data();
        let size = stored.len() as u64 + 1;
        let inner = Box::new(io::Cursor::new(stored));
        let mut stream = LayerStream::new("L".into(), inner, size, None, Compression::None).unwrap();
        let e = Error::from(io::copy(&mut stream, &mut io::sink()).unwrap_err());
        assert!(e.kind() == ErrorKind::Corrupt && e.reason().contains("announced"), "{e}");
    }

    #[test]
    fn hash_reader_hashes_what_passes() {
        let mut reader = HashReader::new(&b"hello"[..]);
        io::copy(&mut reader, &mut io::sink()).unwrap();
        assert_eq!(reader.digest(), Digest::of("hello"));
    }
}
