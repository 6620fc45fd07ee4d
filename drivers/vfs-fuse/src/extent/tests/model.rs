//! An extent file does what a vector of bytes does.

use super::*;
use proptest::prelude::*;
use rustix::fs::FallocateFlags;
use std::ops::ControlFlow;

#[derive(Debug, Clone)]
enum Op {
    Write(u64, usize),
    Read(u64, usize),
    SetLen(u64),
    Allocate(u64, u64, bool),
    Zero(u64, u64, bool),
    Punch(u64, u64),
    Collapse(u64),
    Seek(u64),
    Complete(u32),
    Sync,
    Reopen,
}

const SIZES: [usize; 7] = [1, 4095, 4096, 5000, 70_000, 300_001, 4 << 20];

fn op() -> impl Strategy<Value = Op> {
    let at = prop_oneof![0..400_000u64, (0..80u64).prop_map(|n| n * 4096), 4_190_000..4_200_000u64];
    let length = prop_oneof![1..20_000u64, (1..5u64).prop_map(|n| n * 4096), 1..300_000u64];
    prop_oneof![
        8 => (at.clone(), length.clone()).prop_map(|(a, n)| Op::Write(a, n as usize)),
        4 => (at.clone(), length.clone()).prop_map(|(a, n)| Op::Read(a, n as usize)),
        3 => at.clone().prop_map(Op::SetLen),
        1 => (at.clone(), length.clone(), any::<bool>()).prop_map(|(a, n, k)| Op::Allocate(a, n, k)),
        2 => (at.clone(), length.clone(), any::<bool>()).prop_map(|(a, n, k)| Op::Zero(a, n, k)),
        3 => (at.clone(), length.clone()).prop_map(|(a, n)| Op::Punch(a, n)),
        1 => (0..20u64).prop_map(Op::Collapse),
        2 => at.prop_map(Op::Seek),
        1 => (1..4u32).prop_map(Op::Complete),
        1 => Just(Op::Sync),
        3 => Just(Op::Reopen),
    ]
}

struct Run {
    pair: Pair,
    file: ExtentFile,
    model: Vec<u8>,
    seed: u64,
}

impl Run {
    fn step(&mut self, op: &Op) {
        let file = &self.file;
        let keep = FallocateFlags::KEEP_SIZE.bits();
        let fallocate = |mode: u32, at, n| file.fallocate(mode, at, n);
        match *op {
            Op::Write(at, n) => {
                self.seed += 1;
                let bytes = pattern(self.seed, n);
                file.write_at(&bytes, at).unwrap();
                self.grow(at + n as u64);
                self.model[at as usize..at as usize + n].copy_from_slice(&bytes);
            }
            Op::Read(at, n) => self.check(at as usize, n),
            Op::SetLen(size) => {
                file.set_len(size).unwrap();
                self.model.resize(size as usize, 0);
            }
            Op::Allocate(at, n, kept) => {
                fallocate(if kept { keep } else { 0 }, at, n).unwrap();
                if !kept {
                    self.grow(at + n);
                }
            }
            Op::Zero(at, n, kept) => {
                fallocate(FallocateFlags::ZERO_RANGE.bits() | if kept { keep } else { 0 }, at, n).unwrap();
                if !kept {
                    self.grow(at + n);
                }
                self.zero(at, n);
            }
            Op::Punch(at, n) => {
                fallocate(FallocateFlags::PUNCH_HOLE.bits() | keep, at, n).unwrap();
                self.zero(at, n);
            }
            Op::Collapse(unit) => {
                // Not supported everywhere; what counts is that the content is right then too.
                if (unit + 1) * 4096 < self.model.len() as u64
                    && fallocate(FallocateFlags::COLLAPSE_RANGE.bits(), unit * 4096, 4096).is_ok()
                {
                    self.model.drain(unit as usize * 4096..(unit as usize + 1) * 4096);
                }
            }
            Op::Seek(at) => self.seek(at),
            Op::Complete(steps) => {
                let mut left = steps;
                let before = file.stat().unwrap();
                file.complete(&mut |_| {
                    left -= 1;
                    if left == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
                })
                .unwrap();
                let after = file.stat().unwrap();
                assert_eq!((before.st_mtime, before.st_mtime_nsec), (after.st_mtime, after.st_mtime_nsec));
            }
            Op::Sync => file.sync(true).unwrap(),
            Op::Reopen => {
                if self.pair.header().is_some() {
                    self.file = self.pair.open().unwrap();
                } else {
                    assert!(file.is_complete());
                }
            }
        }
    }

    fn grow(&mut self, size: u64) {
        self.model.resize(self.model.len().max(size as usize), 0);
    }

    fn zero(&mut self, at: u64, n: u64) {
        let end = self.model.len().min((at + n) as usize);
        if (at as usize) < end {
            self.model[at as usize..end].fill(0);
        }
    }

    fn check(&self, at: usize, n: usize) {
        let mut buffer = vec![0xaa; n];
        let got = self.file.read_at(&mut buffer, at as u64).unwrap();
        let end = self.model.len().min(at + n);
        let wanted = if at < end { &self.model[at..end] } else { &[] };
        assert_eq!(got, wanted.len());
        // As a whole first: debug builds are slow at single bytes.
        if buffer[..got] != *wanted {
            let wrong = (0..got).find(|i| buffer[*i] != wanted[*i]).unwrap();
            panic!("wrong from byte {} on", at + wrong);
        }
    }

    /// All between data found is zeros, and offsets behind the end are refused.
    fn seek(&self, from: u64) {
        let size = self.model.len() as u64;
        let (data, hole) = (self.file.seek(from, libc::SEEK_DATA), self.file.seek(from, libc::SEEK_HOLE));
        if from >= size {
            assert!(data.is_err() && hole.is_err());
            return;
        }
        let data = data.unwrap_or(size);
        assert!(data <= size && self.model[from as usize..data as usize].iter().all(|b| *b == 0));
        let hole = hole.unwrap();
        assert!(hole >= from && hole <= size && (hole == from) != (data == from));
    }

    fn check_all(&self) {
        assert_eq!(self.file.size().unwrap(), self.model.len() as u64);
        self.check(0, self.model.len() + 10);
    }
}

fn run(lower: usize, holes: bool, ops: &[Op]) {
    let directory = directory(None);
    let mut content = pattern(1, lower);
    if holes {
        content.chunks_mut(3 * 4096).for_each(|chunk| chunk.iter_mut().take(2 * 4096).for_each(|b| *b = 0));
    }
    let pair = Pair::new(directory.path(), &content, Unit(4096));
    if holes {
        for at in (0..lower as u64).step_by(3 * 4096) {
            let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(pair.raw("lower", OFlags::RDWR), mode, at, 2 * 4096).unwrap();
        }
    }
    pair.prepare().unwrap();
    let mut run = Run { file: pair.open().unwrap(), pair, model: content, seed: 1 };
    for op in ops {
        run.step(op);
        run.check_all();
    }
    run.file.complete(&mut |_| ControlFlow::Continue(())).unwrap();
    assert!(run.file.is_complete() && run.pair.header().is_none());
    run.check_all();
    assert_eq!(std::fs::read(run.pair.directory.join("upper")).unwrap(), run.model);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases(150) as u32))]
    #[test]
    fn does_what_a_vector_does(
        size in 0..SIZES.len(),
        holes in any::<bool>(),
        ops in proptest::collection::vec(op(), 1..30),
    ) {
        run(SIZES[size], holes, &ops);
    }
}
