//! The content of a file with holes.

use super::op::ContentDigest;
use crate::{Digest, tar::Segment};
use std::{collections::BTreeMap, sync::Arc};

const BLOCK: u64 = ContentDigest::BLOCK as u64;
type Block = [u8; ContentDigest::BLOCK];

/// A file's content: the blocks that are stored; what lies between them are holes.
#[derive(Debug, Clone, Default)]
pub(super) struct Blocks {
    size: u64,
    stored: BTreeMap<u64, Arc<Block>>,
}

impl Blocks {
    pub fn size(&self) -> u64 {
        self.size
    }

    pub fn allocated(&self) -> u64 {
        self.stored.len() as u64 * BLOCK
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) {
        let mut at = offset;
        let mut rest = data;
        while !rest.is_empty() {
            let within = (at % BLOCK) as usize;
            let n = rest.len().min(ContentDigest::BLOCK - within);
            let block = self.stored.entry(at / BLOCK).or_insert_with(|| Arc::new([0; ContentDigest::BLOCK]));
            Arc::make_mut(block)[within..within + n].copy_from_slice(&rest[..n]);
            at += n as u64;
            rest = &rest[n..];
        }
        self.size = self.size.max(at);
    }

    pub fn truncate(&mut self, size: u64) {
        if size < self.size {
            self.clear(size, u64::MAX);
        }
        self.size = size;
    }

    /// The size stays.
    pub fn punch(&mut self, offset: u64, len: u64) {
        self.clear(offset, offset.saturating_add(len));
    }

    /// Whole blocks become holes, parts of blocks zeros.
    fn clear(&mut self, from: u64, to: u64) {
        self.stored.retain(|number, block| {
            let (start, end) = (number * BLOCK, (number + 1) * BLOCK);
            let (a, b) = (from.max(start), to.min(end));
            if a < b && b - a < BLOCK {
                Arc::make_mut(block)[(a - start) as usize..(b - start) as usize].fill(0);
            }
            a >= b || b - a < BLOCK
        });
    }

    pub fn digest(&self) -> Digest {
        let mut digest = ContentDigest::default();
        for (number, block) in &self.stored {
            digest.block(*number, block.as_slice());
        }
        digest.finish()
    }

    pub fn segments(&self) -> Vec<Segment> {
        let mut segments: Vec<Segment> = Vec::new();
        for number in self.stored.keys() {
            let offset = number * BLOCK;
            let len = BLOCK.min(self.size.saturating_sub(offset));
            match segments.last_mut() {
                Some(last) if last.offset + last.len == offset => last.len += len,
                _ => segments.push(Segment { offset, len }),
            }
        }
        segments.retain(|s| s.len > 0);
        segments
    }

    /// The stored bytes alone, as [`segments`](Self::segments) lists them.
    pub fn stored_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.allocated() as usize);
        for (number, block) in &self.stored {
            let len = BLOCK.min(self.size.saturating_sub(number * BLOCK));
            bytes.extend_from_slice(&block[..len as usize]);
        }
        bytes
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.size as usize];
        for (number, block) in &self.stored {
            let start = (number * BLOCK) as usize;
            let end = bytes.len().min(start + block.len());
            if start < end {
                bytes[start..end].copy_from_slice(&block[..end - start]);
            }
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_stay_holes_and_read_as_zeros() {
        let mut file = Blocks::default();
        file.write(10_000, b"end");
        file.write(0, b"start");
        assert_eq!((file.size(), file.allocated()), (10_003, 8192));
        assert_eq!(file.segments(), [Segment { offset: 0, len: 4096 }, Segment { offset: 8192, len: 1811 }]);
        assert_eq!(file.stored_bytes().len(), 4096 + 1811);
        let bytes = file.bytes();
        assert_eq!((&bytes[..5], &bytes[10_000..]), (&b"start"[..], &b"end"[..]));
        let before = file.digest();
        file.punch(4096, 4096);
        assert_eq!(file.digest(), before);
        file.punch(0, 4096);
        assert_eq!((file.size(), file.segments().len()), (10_003, 1));
        assert_ne!(file.digest(), before);
    }

    #[test]
    fn growing_after_truncation_shows_zeros_and_not_old_data() {
        let mut file = Blocks::default();
        file.write(0, &[7; 6000]);
        file.truncate(100);
        file.truncate(6000);
        assert_eq!(file.bytes(), [[7; 100].as_slice(), &[0; 5900]].concat());
    }
}
