//! The stream of `BTRFS_IOC_SEND`, as far as it tells where something changes (kernel `fs/btrfs/send.h`, version 1).
//!
//! ```text
//! "btrfs-stream\0"  version u32
//! command: length u32 (of what follows the checksum), kind u16, checksum u32, attributes
//! attribute: kind u16, length u16, data
//! ```
//!
//! All numbers are little-endian. The checksums are not looked at: the stream comes from the kernel through a pipe.

use graphdriver_core::{Context, Error, ErrorKind, Result};
use std::{ffi::OsString, io::Read, os::unix::ffi::OsStringExt, path::PathBuf};

const MAGIC: &[u8; 13] = b"btrfs-stream\0";
const VERSION: u32 = 1;

/// A command has a few attributes, of which the largest is an xattr's value.
const MAX_COMMAND: u32 = 1 << 20;

/// Attributes (`enum btrfs_send_attribute`).
const PATH: u16 = 15;
const PATH_TO: u16 = 16;

/// What a command means for the path it names. Paths are from the root of the subvolume, as they are at that moment of
/// receiving: an inode that is in the way is first renamed to `oINODE-GENERATION-NUMBER` in the root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Event {
    /// The inode, or that the name leads to it, changes; or the name goes.
    Touched(PathBuf),
    /// Another inode than before gets the name.
    Made(PathBuf),
    /// The inode goes from one name to another.
    Moved(PathBuf, PathBuf),
}

/// Reads a stream to its end. Fails with `Corrupt` if it is none, or is cut off.
pub(crate) fn read(mut stream: impl Read, visit: &mut dyn FnMut(Event)) -> Result<()> {
    let mut magic = [0; 13];
    stream.read_exact(&mut magic).doing(|| "reading the send stream")?;
    let version = u32::from_le_bytes(take(&mut stream)?);
    if (&magic, version) != (MAGIC, VERSION) {
        return Err(corrupt(format!("it begins with {magic:?} and version {version}")));
    }
    let mut body = Vec::new();
    loop {
        let length = u32::from_le_bytes(take(&mut stream)?);
        let kind = u16::from_le_bytes(take(&mut stream)?);
        let _checksum: [u8; 4] = take(&mut stream)?;
        if length > MAX_COMMAND {
            return Err(corrupt(format!("a command of {length} bytes")));
        }
        body.resize(length as usize, 0);
        stream.read_exact(&mut body).doing(|| "reading the send stream")?;
        if !command(kind, &body, visit)? {
            return Ok(());
        }
    }
}

/// Commands (`enum btrfs_send_cmd`). False after the last one.
fn command(kind: u16, body: &[u8], visit: &mut dyn FnMut(Event)) -> Result<bool> {
    let path = |which| attribute(body, which)?.ok_or_else(|| corrupt(format!("command {kind} without a path")));
    match kind {
        // SUBVOL, SNAPSHOT: the name of the whole.
        1 | 2 => {}
        // MKFILE, MKDIR, MKNOD, MKFIFO, MKSOCK, SYMLINK, LINK.
        3..=8 | 10 => visit(Event::Made(path(PATH)?)),
        9 => visit(Event::Moved(path(PATH)?, path(PATH_TO)?)),
        // UNLINK, RMDIR, SET_XATTR, REMOVE_XATTR, WRITE, CLONE, TRUNCATE, CHMOD, CHOWN, UTIMES, UPDATE_EXTENT.
        11..=20 | 22 => visit(Event::Touched(path(PATH)?)),
        21 => return Ok(false),
        _ => return Err(corrupt(format!("command {kind} is not known"))),
    }
    Ok(true)
}

fn attribute(mut body: &[u8], which: u16) -> Result<Option<PathBuf>> {
    while !body.is_empty() {
        let kind = u16::from_le_bytes(take(&mut body)?);
        let length = u16::from_le_bytes(take(&mut body)?) as usize;
        let (data, rest) = body.split_at_checked(length).ok_or_else(|| corrupt("an attribute is cut off"))?;
        if kind == which {
            return Ok(Some(OsString::from_vec(data.to_vec()).into()));
        }
        body = rest;
    }
    Ok(None)
}

fn take<const N: usize>(from: &mut impl Read) -> Result<[u8; N]> {
    let mut bytes = [0; N];
    from.read_exact(&mut bytes).doing(|| "reading the send stream")?;
    Ok(bytes)
}

fn corrupt(why: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, why).doing("reading the send stream")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    type Attributes = Vec<(u16, Vec<u8>)>;

    fn write(commands: &[(u16, Attributes)]) -> Vec<u8> {
        let mut out = [&MAGIC[..], &VERSION.to_le_bytes()].concat();
        for (kind, attributes) in commands {
            let body: Vec<u8> = attributes
                .iter()
                .flat_map(|(kind, data)| [&kind.to_le_bytes()[..], &(data.len() as u16).to_le_bytes(), data].concat())
                .collect();
            out.extend((body.len() as u32).to_le_bytes());
            out.extend(kind.to_le_bytes());
            out.extend([0; 4]);
            out.extend(body);
        }
        out
    }

    fn events(stream: &[u8]) -> Result<Vec<Event>> {
        let mut all = Vec::new();
        read(stream, &mut |event| all.push(event)).map(|()| all)
    }

    #[test]
    fn every_command_says_what_becomes_of_its_path() {
        let named = |path: &str| (PATH, path.as_bytes().to_vec());
        let stream = write(&[
            (2, vec![named("snapshot"), (1, vec![0; 16])]),
            (4, vec![named("o257-7-0"), (3, 257u64.to_le_bytes().to_vec())]),
            (9, vec![named("o257-7-0"), (PATH_TO, b"d".to_vec())]),
            (10, vec![named("d/l"), (17, b"f".to_vec())]),
            (20, vec![named(""), (9, vec![0; 12])]),
            (22, vec![named("f\u{c3}("), (18, vec![0; 8])]),
            (21, vec![]),
        ]);
        let expected = [
            Event::Made("o257-7-0".into()),
            Event::Moved("o257-7-0".into(), "d".into()),
            Event::Made("d/l".into()),
            Event::Touched("".into()),
            Event::Touched("f\u{c3}(".into()),
        ];
        assert_eq!(events(&stream).unwrap(), expected);
    }

    #[test]
    fn what_is_no_stream_is_refused() {
        let whole = write(&[(20, vec![(PATH, b"f".to_vec())]), (21, vec![])]);
        assert_eq!(events(&whole).unwrap().len(), 1);
        for cut in 0..whole.len() {
            assert_eq!(events(&whole[..cut]).unwrap_err().kind(), ErrorKind::Corrupt, "cut at {cut}");
        }
        for wrong in [
            write(&[(99, vec![]), (21, vec![])]),
            write(&[(20, vec![(9, vec![0; 12])]), (21, vec![])]),
            [&MAGIC[..], &2u32.to_le_bytes()].concat(),
            [&write(&[])[..], &u32::MAX.to_le_bytes(), &[0; 6]].concat(),
        ] {
            assert_eq!(events(&wrong).unwrap_err().kind(), ErrorKind::Corrupt);
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = events(&bytes);
            let _ = events(&[&write(&[])[..], &bytes].concat());
        }

        #[test]
        fn what_was_written_is_read(paths in prop::collection::vec(prop::collection::vec(1u8..=255, 0..40), 0..20)) {
            let mut commands: Vec<_> = paths.iter().map(|path| (20, vec![(9, vec![0; 12]), (PATH, path.clone())])).collect();
            commands.push((21, vec![]));
            let expected: Vec<_> =
                paths.into_iter().map(|path| Event::Touched(OsString::from_vec(path).into())).collect();
            prop_assert_eq!(events(&write(&commands)).unwrap(), expected);
        }
    }
}
