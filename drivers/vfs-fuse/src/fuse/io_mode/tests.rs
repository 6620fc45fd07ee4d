use super::*;
use proptest::prelude::*;
use std::cell::{Cell, RefCell};

/// Told from others by its address; so it has a size.
#[derive(Debug)]
struct TestFile(#[expect(dead_code)] u8);

#[derive(Debug)]
struct TestData {
    upper: Cell<bool>,
    file: RefCell<Option<Arc<TestFile>>>,
}

#[derive(Debug, Clone)]
enum Op {
    Open {
        write: bool,
        large: bool,
        refused: bool,
    },
    /// The kernel closes its oldest open file and sends RELEASE.
    Close,
    /// The oldest RELEASE reaches us.
    Release,
    CopyUp {
        composed: bool,
    },
    /// What was composed becomes plain.
    Complete,
    /// The kernel drops the inode, if it is closed.
    Evict,
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let flag = any::<bool>;
    let op = prop_oneof![
        6 => (flag(), flag(), prop::bool::weighted(0.1))
            .prop_map(|(write, large, refused)| Op::Open { write, large, refused }),
        4 => Just(Op::Close),
        4 => Just(Op::Release),
        1 => flag().prop_map(|composed| Op::CopyUp { composed }),
        1 => Just(Op::Complete),
        1 => Just(Op::Evict),
    ];
    prop::collection::vec(op, 0..60)
}

/// fs/fuse/iomode.c in a few lines, and a page cache.
#[derive(Default)]
struct Kernel {
    /// Open files, oldest first: registration of the backing file, or `None` through the page cache.
    files: Vec<Option<u32>>,
    /// RELEASEs on their way.
    sent: usize,
    /// The version of the content that it has in its page cache.
    pages: Option<u32>,
}

impl Kernel {
    /// Otherwise it answers with EIO.
    fn fits(&self, backing: Option<u32>) -> bool {
        self.files.iter().all(|&open| open == backing)
    }
}

struct World {
    kernel: Kernel,
    modes: IoModes<TestData, TestFile, u32>,
    data: Arc<TestData>,
    version: u32,
    /// Registered files, by number from 1.
    registered: RefCell<Vec<*const TestFile>>,
    /// So that no address is used twice.
    files: Vec<Arc<TestFile>>,
    renewed: bool,
}

const ID: u64 = 7;

impl World {
    #[expect(clippy::arc_with_non_send_sync)] // The modes ask for an Arc; here is one thread.
    fn new() -> World {
        World {
            kernel: Kernel::default(),
            modes: IoModes::default(),
            data: Arc::new(TestData { upper: false.into(), file: Some(Arc::new(TestFile(0))).into() }),
            version: 0,
            registered: RefCell::default(),
            files: Vec::new(),
            renewed: false,
        }
    }

    fn apply(&mut self, op: &Op) {
        match *op {
            Op::Open { write, large, refused } => {
                if write && !self.data.upper.get() {
                    self.copy_up(false);
                }
                self.open(write, large, refused);
            }
            Op::Close if !self.kernel.files.is_empty() => {
                self.kernel.files.remove(0);
                self.kernel.sent += 1;
            }
            Op::Release if self.kernel.sent > 0 => {
                self.kernel.sent -= 1;
                self.modes.release(ID);
            }
            Op::CopyUp { composed } if !self.data.upper.get() => self.copy_up(composed),
            Op::Complete if self.data.file.borrow().is_none() => self.copy_up(false),
            Op::Evict if self.kernel.files.is_empty() && self.kernel.sent == 0 => {
                self.kernel.pages = None;
                self.renewed = false;
                self.modes.forget(ID);
            }
            _ => {}
        }
    }

    fn copy_up(&mut self, composed: bool) {
        self.data.upper.set(true);
        self.files.extend(self.data.file.take());
        self.data.file.replace((!composed).then(|| Arc::new(TestFile(0))));
    }

    fn open(&mut self, write: bool, large: bool, refused: bool) {
        let look = |data: &TestData| {
            let file = data.file.borrow().clone();
            Sight { passthrough: file.is_some() && (write || large || data.upper.get()), file }
        };
        let register = |file: &TestFile| {
            let mut registered = self.registered.borrow_mut();
            registered.push(file);
            if refused { Err(io::ErrorKind::OutOfMemory.into()) } else { Ok(registered.len() as u32) }
        };
        let answer = self.modes.open(ID, &self.data, &look, &register);
        assert!(!self.renewed || matches!(answer, Answer::Stale), "names lead elsewhere: {answer:?}");
        match answer {
            Answer::Cached { keep } => self.opened_cached(keep, write),
            Answer::Passthrough(backing) => {
                assert!(self.kernel.fits(Some(*backing)), "EIO: {:?} and {backing}", self.kernel.files);
                self.kernel.files.push(Some(*backing));
                let file = self.registered.borrow()[*backing as usize - 1];
                assert!(self.is_current(file), "passed through to a file that no longer has the data");
                self.version += u32::from(write);
            }
            Answer::Renew => {
                let backing = self.kernel.files.first().copied().flatten();
                let file = backing.map(|b| self.registered.borrow()[b as usize - 1]);
                // If all is closed, but the RELEASE not yet here, there is no telling.
                assert!(file.is_none_or(|file| !self.is_current(file)), "the file in use has the data");
                self.modes.supersede(ID);
                self.renewed = true;
            }
            Answer::Stale => assert!(self.renewed),
        }
    }

    fn is_current(&self, file: *const TestFile) -> bool {
        self.data.file.borrow().as_ref().is_some_and(|now| std::ptr::eq(Arc::as_ptr(now), file))
    }

    fn opened_cached(&mut self, keep: bool, write: bool) {
        assert!(self.kernel.fits(None), "EIO: {:?} and cached", self.kernel.files);
        if !keep {
            self.kernel.pages = None;
        }
        let pages = *self.kernel.pages.get_or_insert(self.version);
        assert_eq!(pages, self.version, "the page cache shows what the file was before");
        // Writes go through the page cache, and to the copy.
        self.version += u32::from(write);
        self.kernel.pages = Some(self.version);
        self.kernel.files.push(None);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]
    #[test]
    fn the_kernel_never_refuses_and_never_shows_what_was(ops in ops()) {
        let mut world = World::new();
        for op in &ops {
            world.apply(op);
        }
        while !world.kernel.files.is_empty() || world.kernel.sent > 0 {
            world.apply(&Op::Close);
            world.apply(&Op::Release);
        }
        world.apply(&Op::Evict);
        prop_assert!(world.modes.shards.iter().all(|shard| shard.lock().is_empty()), "something is kept for ever");
    }
}

#[test]
fn where_nothing_can_be_passed_through_the_page_cache_is_kept() {
    let modes = IoModes::<(), (), ()>::default();
    let look = |_: &()| Sight { file: Some(Arc::new(())), passthrough: true };
    for (error, kept) in [(libc::ELOOP, true), (libc::EPERM, true), (libc::ENFILE, false)] {
        let answer = modes.open(ID, &Arc::default(), &look, &|_| Err(io::Error::from_raw_os_error(error)));
        assert!(matches!(answer, Answer::Cached { keep } if keep == kept), "{error}: {answer:?}");
        modes.release(ID);
    }
}

#[test]
fn the_time_told_counts_only_where_writes_pass_by() {
    let modes = IoModes::<(), i32, ()>::default();
    let open = |passthrough| {
        let look = move |_: &()| Sight { file: Some(Arc::new(1)), passthrough };
        modes.open(ID, &Arc::default(), &look, &|_| Ok(()))
    };
    assert!(!modes.tell(ID, (1, 2)), "closed");
    for (passthrough, remembered) in [(false, None), (true, Some((Arc::new(1), (3, 4))))] {
        open(passthrough);
        modes.tell(ID, (3, 4));
        assert_eq!(modes.take_told(ID), remembered);
        assert_eq!(modes.take_told(ID), None, "taken");
        modes.release(ID);
    }
}
