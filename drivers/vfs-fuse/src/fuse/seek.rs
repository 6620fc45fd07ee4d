//! `SEEK_DATA` and `SEEK_HOLE`: what is a hole to us may be data that the kernel has yet to send, from writes that it
//! gathers or through a mapping.

use rustix::io::{Errno, Result};

/// As lseek(2), where `ours` is the same of what we have, and `flush` has the kernel send what it has from one offset to
/// another. Only holes are flushed: what is data already stays data, and in the kernel's page cache.
pub fn seek(
    offset: u64,
    whence: i32,
    ours: impl Fn(u64, i32) -> Result<u64>,
    flush: impl Fn(u64, u64) -> Result<()>,
) -> Result<u64> {
    // What lies behind the end is a hole as well: the kernel may know a larger size.
    let or = |end, found| if found == Err(Errno::NXIO) { Ok(end) } else { found };
    let mut from = offset;
    loop {
        let hole = if whence == libc::SEEK_HOLE { or(from, ours(from, libc::SEEK_HOLE))? } else { from };
        let data = or(u64::MAX, ours(hole, libc::SEEK_DATA))?;
        if hole < data {
            flush(hole, data)?;
        }
        match ours(offset, whence)? {
            // All that was a hole is data now. What follows the data after it has not been flushed.
            next if whence == libc::SEEK_HOLE && next >= data => from = next,
            found => return Ok(found),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use libc::{SEEK_DATA, SEEK_HOLE};
    use std::cell::{Cell, RefCell};

    /// Blocks of a file, one character each: `#` data, `.` a hole, `d` what only the kernel has yet. `known` of them are
    /// in the size that we know.
    struct File {
        blocks: RefCell<Vec<u8>>,
        known: Cell<usize>,
        flushes: Cell<usize>,
    }

    impl File {
        fn new(blocks: &str, known: usize) -> File {
            File { blocks: RefCell::new(blocks.into()), known: Cell::new(known), flushes: Cell::new(0) }
        }

        fn ours(&self, offset: u64, whence: i32) -> Result<u64> {
            let (blocks, known) = (self.blocks.borrow(), self.known.get());
            let wanted = |at: &usize| (blocks[*at] == b'#') == (whence == SEEK_DATA);
            let end = (whence == SEEK_HOLE && (offset as usize) < known).then_some(known);
            (offset as usize..known).find(wanted).or(end).map(|at| at as u64).ok_or(Errno::NXIO)
        }

        fn flush(&self, from: u64, to: u64) -> Result<()> {
            assert!(from < to);
            self.flushes.update(|n| n + 1);
            let mut blocks = self.blocks.borrow_mut();
            for at in from as usize..blocks.len().min(to as usize) {
                if blocks[at] == b'd' {
                    blocks[at] = b'#';
                    self.known.update(|known| known.max(at + 1));
                }
            }
            Ok(())
        }

        fn seek(&self, offset: u64, whence: i32) -> Result<u64> {
            seek(offset, whence, |o, w| self.ours(o, w), |from, to| self.flush(from, to))
        }
    }

    #[test]
    fn what_only_the_kernel_has_is_data() {
        // Every file of six blocks, wherever the kernel's larger size may begin.
        for number in 0..3usize.pow(6) {
            let blocks: String = (0..6).map(|i| ['#', '.', 'd'][number / 3usize.pow(i) % 3]).collect();
            let last = blocks.rfind('#').map_or(0, |at| at + 1);
            // The kernel's size ends with what it has; truncation it tells us of at once.
            let sizes = if blocks.ends_with('d') { last..7 } else { 6..7 };
            for (known, offset) in sizes.flat_map(|known| (0..7).map(move |offset| (known, offset))) {
                let truth = File::new(&blocks.replace('d', "#"), 6);
                for whence in [SEEK_DATA, SEEK_HOLE] {
                    let found = File::new(&blocks, known).seek(offset, whence);
                    assert_eq!(found, truth.ours(offset, whence), "{blocks} of {known}, {whence} from {offset}");
                }
            }
        }
    }

    #[test]
    fn data_is_not_flushed() {
        let file = File::new("###.##", 6);
        assert_eq!((file.seek(1, SEEK_DATA), file.flushes.get()), (Ok(1), 0));
        assert_eq!((file.seek(1, SEEK_HOLE), file.flushes.get()), (Ok(3), 1));
    }

    #[test]
    fn without_a_flush_nothing_is_a_hole() {
        let file = File::new("##..", 4);
        for whence in [SEEK_DATA, SEEK_HOLE] {
            let found = seek(2, whence, |o, w| file.ours(o, w), |_, _| Err(Errno::NOSYS));
            assert_eq!(found, Err(Errno::NOSYS));
        }
    }
}
