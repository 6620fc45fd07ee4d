//! System calls that the reference does not know: what programs do to files beyond reading, writing and naming them.

use super::{Case, Subject};
use crate::{
    Access, LayerId, LayerOptions, Result, Root,
    conformance::subject::mounted,
    model::{Op, Tree},
};
use rustix::{
    fs::{self, AtFlags, CWD, FallocateFlags, Mode, OFlags, RenameFlags},
    io::Errno,
};
use std::{
    fs::File,
    os::{
        fd::{AsFd, AsRawFd},
        unix::fs::FileExt,
    },
    path::Path,
    sync::Barrier,
};

pub(super) const CASES: &[Case] = &[
    Case {
        name: "threads_that_write_to_one_lower_file_copy_it_up_once",
        story: "fuse-overlayfs stress list, parallel copy-up of one file: a second copy would wipe what was written into the first",
        needs: mounts,
        run: copy_up_at_once,
    },
    Case {
        name: "rename_replaces_nothing_and_exchanges_where_it_is_told_to",
        story: "fuse-overlayfs tests, RENAME_NOREPLACE and RENAME_EXCHANGE: a lower file is there, a deleted one is not",
        needs: mounts,
        run: rename_flags,
    },
    Case {
        name: "files_get_their_name_late_and_their_space_early",
        story: "fuse-overlayfs tests, O_TMPFILE and fallocate: package managers and databases write like this",
        needs: mounts,
        run: nameless_and_allocated,
    },
];

const BASE: LayerId = LayerId(1);
const CHILD: LayerId = LayerId(2);

fn mounts(subject: &dyn Subject) -> Result<(), &'static str> {
    if subject.shows_directories() { Ok(()) } else { Err("the subject has no directories for system calls") }
}

/// A layer of these files, and an active one on it.
fn child_of(subject: &dyn Subject, files: &[(&str, &[u8])]) -> Result<()> {
    let driver = subject.driver();
    driver.create(BASE, &[], &LayerOptions::default())?;
    subject.with_tree(BASE, &[], Access::ReadWrite, &mut |tree| {
        Ok(files.iter().try_for_each(|(name, content)| tree.apply(&Op::write(name, content)))?)
    })?;
    driver.commit(BASE)?;
    driver.create(CHILD, &[BASE], &LayerOptions::default())
}

fn child(subject: &dyn Subject) -> Result<Root> {
    mounted(subject.driver(), CHILD, &[BASE], Access::ReadWrite)
}

/// What a layer shows when it is mounted afresh.
fn expect(subject: &dyn Subject, id: LayerId, parents: &[LayerId], files: &[(&str, &[u8])]) -> Result<()> {
    subject.with_tree(id, parents, Access::ReadOnly, &mut |tree: &mut dyn Tree| {
        let shown: Vec<_> = tree.snapshot()?.into_keys().filter(|path| path != Path::new("")).collect();
        assert_eq!(shown, files.iter().map(|file| Path::new(file.0)).collect::<Vec<_>>());
        for (name, content) in files {
            assert!(tree.read(Path::new(name))? == *content, "layer {id}: {name} has another content");
        }
        Ok(())
    })
}

fn open(root: &Root, name: &str) -> Result<File> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    Ok(fs::openat(root.as_fd(), name, flags, Mode::empty())?.into())
}

fn copy_up_at_once(subject: &mut dyn Subject) -> Result<()> {
    const THREADS: u64 = 8;
    const PIECE: u64 = 100_000;
    let old = vec![b'.'; (THREADS * PIECE) as usize];
    let names: Vec<String> = (10..30).map(|n| format!("file{n}")).collect();
    let files: Vec<(&str, &[u8])> = names.iter().map(|name| (name.as_str(), &*old)).collect();
    child_of(subject, &files)?;
    let (root, start) = (child(subject)?, Barrier::new(THREADS as usize));
    let write = |thread: u64| -> Result<()> {
        let mut outcome = Ok(());
        for name in &names {
            // Whoever failed still has to let the others go.
            start.wait();
            let written = open(&root, name).and_then(|file| Ok(file.write_all_at(&[thread as u8; 7], thread * PIECE)?));
            outcome = outcome.and(written);
        }
        outcome
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS).map(|n| scope.spawn(move || write(n))).collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("a thread of the case panicked"))
    })?;
    drop(root);
    let mut new = old.clone();
    for thread in 0..THREADS {
        new[(thread * PIECE) as usize..][..7].fill(thread as u8);
    }
    let changed: Vec<(&str, &[u8])> = names.iter().map(|name| (name.as_str(), &*new)).collect();
    expect(subject, CHILD, &[BASE], &changed)?;
    expect(subject, BASE, &[], &files)
}

fn rename_flags(subject: &mut dyn Subject) -> Result<()> {
    let files: [(&str, &[u8]); 4] = [("a", b"A"), ("b", b"B"), ("gone", b"G"), ("kept", b"K")];
    child_of(subject, &files)?;
    let root = child(subject)?;
    let rename = |from: &str, to: &str, flags| fs::renameat_with(root.as_fd(), from, root.as_fd(), to, flags);
    assert_eq!(rename("a", "kept", RenameFlags::NOREPLACE), Err(Errno::EXIST));
    assert_eq!(rename("a", "nowhere", RenameFlags::EXCHANGE), Err(Errno::NOENT));
    fs::unlinkat(root.as_fd(), "gone", AtFlags::empty())?;
    rename("a", "gone", RenameFlags::NOREPLACE)?;
    rename("gone", "b", RenameFlags::EXCHANGE)?;
    drop(root);
    expect(subject, CHILD, &[BASE], &[("b", b"A"), ("gone", b"B"), ("kept", b"K")])?;
    expect(subject, BASE, &[], &files)?;
    let list = |native| subject.changes(CHILD, &[BASE], native);
    assert_eq!(list(true)?, list(false)?);
    Ok(())
}

fn nameless_and_allocated(subject: &mut dyn Subject) -> Result<()> {
    let files: [(&str, &[u8]); 2] = [("grows", b"old"), ("holds", b"old")];
    child_of(subject, &files)?;
    let root = child(subject)?;
    fs::fallocate(open(&root, "grows")?, FallocateFlags::empty(), 1, 4)?;
    fs::fallocate(open(&root, "holds")?, FallocateFlags::KEEP_SIZE, 0, 100_000)?;
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let late = match fs::openat(root.as_fd(), ".", flags, Mode::RUSR | Mode::WUSR) {
        // open(2): what a filesystem without them says, as overlayfs before Linux 6.1 is.
        Err(Errno::OPNOTSUPP) => None,
        other => Some(File::from(other?)),
    };
    let mut after: Vec<(&str, &[u8])> = vec![("grows", b"old\0\0"), ("holds", b"old")];
    if let Some(file) = late {
        file.write_all_at(b"late", 0)?;
        let itself = format!("/proc/self/fd/{}", file.as_raw_fd());
        fs::linkat(CWD, itself, root.as_fd(), "late", AtFlags::SYMLINK_FOLLOW)?;
        after.push(("late", b"late"));
    }
    drop(root);
    expect(subject, CHILD, &[BASE], &after)?;
    expect(subject, BASE, &[], &files)
}
