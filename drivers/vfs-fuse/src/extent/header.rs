//! What makes a sparse file of the upper layer an extent file. FORMAT.md describes it for others.

use rustix::{
    fs::{AtFlags, Statx, StatxFlags},
    io::{Errno, Result},
};
use std::os::fd::BorrowedFd;

/// Name of the header's xattr below the overlay prefix. It is the kernel's own mark of a file without data, so that one
/// xattr is the header and a guard.
pub const XATTR: &str = "metacopy";
/// The same for a header of version 1.
pub const XATTR_1: &str = "vfs.extent";

const MAGIC: [u8; 4] = *b"GDXF";
/// How long a header of each version is before the path.
const FIXED_1: usize = 64;
const FIXED_2: usize = 72;
/// What the kernel allows the value of any xattr (XATTR_SIZE_MAX).
const LARGEST: usize = 65536;

/// What must be the same about the lower file as when the extent file was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LowerIdentity {
    /// Bytes.
    pub size: u64,
    /// Seconds and nanoseconds.
    pub mtime: (i64, u32),
    /// Inode number.
    pub ino: u64,
}

/// What no copy of an extent file has in common with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UpperIdentity {
    /// Inode number.
    pub ino: u64,
    /// Seconds and nanoseconds of its creation, as inode numbers are used again; 0 where the filesystem does not tell.
    pub birth: (i64, u32),
}

impl UpperIdentity {
    /// That of an open file.
    pub fn of(file: BorrowedFd<'_>) -> Result<UpperIdentity> {
        let wanted = StatxFlags::INO | StatxFlags::BTIME;
        rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, wanted).map(|stat| UpperIdentity::in_stat(&stat))
    }

    /// That of a file which was asked for its number and birth.
    pub fn in_stat(stat: &Statx) -> UpperIdentity {
        let has_birth = stat.stx_mask & StatxFlags::BTIME.bits() != 0;
        let birth = if has_birth { (stat.stx_btime.tv_sec, stat.stx_btime.tv_nsec) } else { (0, 0) };
        UpperIdentity { ino: stat.stx_ino, birth }
    }
}

/// Decoded header of an extent file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// The layer that has the lower file, counted from the bottom one, which is 0.
    pub layer_from_bottom: u16,
    /// Where the lower file is, relative to that layer's root.
    pub path: Vec<u8>,
    /// Which file it must be.
    pub lower: LowerIdentity,
    /// Holes below this offset show the lower file, holes above it zeros.
    pub limit: u64,
    /// The extent file's own identity: a copy of it has another.
    pub upper: UpperIdentity,
    /// The inode number that the file is shown with. `None`: the header is of version 1, beside which it has an xattr.
    pub ino: Option<u64>,
}

impl Header {
    /// The name of its xattr below the overlay prefix.
    pub fn xattr(&self) -> &'static str {
        if self.ino.is_some() { XATTR } else { XATTR_1 }
    }

    /// The bytes of the header of a file that is asked by `get` for xattrs below the overlay prefix, if it has one.
    pub fn find(get: impl Fn(&str) -> Result<Option<Vec<u8>>>) -> Result<Option<Vec<u8>>> {
        let version = |value: &[u8]| value.strip_prefix(&MAGIC).and_then(|rest| rest.first().copied());
        match get(XATTR)? {
            Some(value) if version(&value).is_some_and(|v| v != 1) => return Ok(Some(value)),
            _ => {}
        }
        match get(XATTR_1)? {
            Some(value) if version(&value) == Some(2) => Err(Errno::IO),
            other => Ok(other),
        }
    }

    /// The number that a file is shown with, of the value of its [`XATTR`]; `None`: that has none, or is no header at all.
    pub fn shown_number(value: &[u8]) -> Option<u64> {
        Header::decode(value).ok()?.ino
    }

    /// The xattr's value. Fails with `E2BIG` if no xattr could hold it, `EINVAL` if it could not be decoded again.
    pub fn encode(&self) -> Result<Vec<u8>> {
        self.check().map_err(|_| Errno::INVAL)?;
        let (version, fixed) = if self.ino.is_some() { (2, FIXED_2) } else { (1, FIXED_1) };
        if fixed + self.path.len() > LARGEST {
            return Err(Errno::TOOBIG);
        }
        let mut v = Vec::with_capacity(fixed + self.path.len());
        v.extend_from_slice(&MAGIC);
        v.extend_from_slice(&[version, 0]);
        v.extend_from_slice(&self.layer_from_bottom.to_le_bytes());
        v.extend_from_slice(&self.limit.to_le_bytes());
        v.extend_from_slice(&self.lower.size.to_le_bytes());
        v.extend_from_slice(&self.lower.mtime.0.to_le_bytes());
        v.extend_from_slice(&self.lower.mtime.1.to_le_bytes());
        v.extend_from_slice(&self.upper.birth.1.to_le_bytes());
        v.extend_from_slice(&self.lower.ino.to_le_bytes());
        v.extend_from_slice(&self.upper.ino.to_le_bytes());
        v.extend_from_slice(&self.upper.birth.0.to_le_bytes());
        v.extend(self.ino.iter().flat_map(|ino| ino.to_le_bytes()));
        v.extend_from_slice(&self.path);
        Ok(v)
    }

    /// Fails with `EOPNOTSUPP` on a version it does not know and with `EIO` on anything that `encode` does not make.
    pub fn decode(value: &[u8]) -> Result<Header> {
        if value.len() < 6 || value[..4] != MAGIC {
            return Err(Errno::IO);
        }
        let fixed = match value[4] {
            1 => FIXED_1,
            2 => FIXED_2,
            _ => return Err(Errno::OPNOTSUPP),
        };
        if value.len() > LARGEST || value.len() <= fixed || value[5] != 0 {
            return Err(Errno::IO);
        }
        let u64_at = |at: usize| u64::from_le_bytes(field(value, at));
        let time_at = |seconds, nanoseconds| {
            (i64::from_le_bytes(field(value, seconds)), u32::from_le_bytes(field(value, nanoseconds)))
        };
        let header = Header {
            layer_from_bottom: u16::from_le_bytes(field(value, 6)),
            limit: u64_at(8),
            lower: LowerIdentity { size: u64_at(16), mtime: time_at(24, 32), ino: u64_at(40) },
            upper: UpperIdentity { ino: u64_at(48), birth: time_at(56, 36) },
            ino: (fixed == FIXED_2).then(|| u64_at(FIXED_1)),
            path: value[fixed..].to_vec(),
        };
        header.check()?;
        Ok(header)
    }

    fn check(&self) -> Result<()> {
        let plain = |part: &[u8]| !part.is_empty() && part.len() <= 255 && part != b"." && part != b"..";
        let path_is_fine = !self.path.contains(&0) && self.path.split(|&b| b == b'/').all(plain);
        let sizes_are_fine = self.limit <= self.lower.size && self.lower.size <= i64::MAX as u64;
        let times_are_fine = [self.lower.mtime, self.upper.birth].iter().all(|time| time.1 < 1_000_000_000);
        if path_is_fine && sizes_are_fine && times_are_fine { Ok(()) } else { Err(Errno::IO) }
    }
}

fn field<const N: usize>(value: &[u8], at: usize) -> [u8; N] {
    value[at..at + N].try_into().expect("the caller has checked the length")
}
