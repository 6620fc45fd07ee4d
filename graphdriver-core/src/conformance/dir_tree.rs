//! A mounted directory as a tree of the reference's kind.

use crate::{
    Context, FileKind, Result, Root,
    model::{ContentDigest, Node, Op, Snapshot, Tree, name_links},
    root::{inode_at, names_in, proc_path},
    tar::Segment,
};
use rustix::{
    fs::{self, AtFlags, FallocateFlags, FileType, Mode, OFlags, SeekFrom, Timespec, Timestamps},
    io::Errno,
};
use std::{
    collections::BTreeMap,
    ffi::{OsStr, OsString},
    fs::File,
    io::Read,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::FileExt,
    },
    path::{Path, PathBuf},
};

type Outcome<T = ()> = std::result::Result<T, Errno>;

/// The directory below a root. Every path resolves beneath it.
#[derive(Debug)]
pub struct DirTree(Root);

impl DirTree {
    /// The tree below `root`.
    pub fn new(root: Root) -> Self {
        DirTree(root)
    }

    /// The directory that `path` lies in and its last name; for the root itself that is `.` in it.
    fn at(&self, path: &Path) -> Outcome<(OwnedFd, OsString)> {
        let Some(name) = path.file_name() else {
            return Ok((self.0.open_dir(Path::new(""))?, OsString::from(".")));
        };
        let parent = path.parent().unwrap_or(Path::new(""));
        Ok((self.0.resolve(parent, OFlags::PATH | OFlags::DIRECTORY, Mode::empty())?, name.to_owned()))
    }

    /// The same for what the root cannot be the object of.
    fn name(&self, path: &Path) -> Outcome<(OwnedFd, OsString)> {
        if path.file_name().is_none() { Err(Errno::INVAL) } else { self.at(path) }
    }

    /// Opens the regular file at `path`; anything else gives the error that opening it for writing gives.
    fn open(&self, path: &Path, access: OFlags) -> Outcome<File> {
        let (dir, name) = self.at(path)?;
        match file_type(&dir, &name)? {
            FileType::RegularFile => {
                Ok(fs::openat(dir, name, access | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?.into())
            }
            FileType::Directory => Err(Errno::ISDIR),
            FileType::Symlink => Err(Errno::LOOP),
            _ => Err(Errno::INVAL),
        }
    }

    fn write(&self, path: &Path, offset: u64, data: &[u8], mode: u32) -> Outcome {
        let file = match self.open(path, OFlags::WRONLY) {
            Err(Errno::NOENT) => {
                let (dir, name) = self.name(path)?;
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
                let fd = fs::openat(dir, name, flags, Mode::RUSR | Mode::WUSR)?;
                fs::fchmod(&fd, Mode::from_raw_mode(mode))?;
                fd.into()
            }
            other => other?,
        };
        file.write_all_at(data, offset).map_err(errno)
    }

    fn mknod(&self, path: &Path, kind: &FileKind, mode: u32) -> Outcome {
        let (dir, name) = self.name(path)?;
        let (file_type, dev) = match *kind {
            FileKind::CharDevice { major, minor } => (FileType::CharacterDevice, fs::makedev(major, minor)),
            FileKind::BlockDevice { major, minor } => (FileType::BlockDevice, fs::makedev(major, minor)),
            FileKind::Fifo => (FileType::Fifo, 0),
            _ => return Err(Errno::INVAL),
        };
        fs::mknodat(&dir, &name, file_type, Mode::RUSR, dev)?;
        fs::chmodat(&dir, &name, Mode::from_raw_mode(mode), AtFlags::empty())
    }

    fn chmod(&self, path: &Path, mode: u32) -> Outcome {
        let (dir, name) = self.at(path)?;
        if file_type(&dir, &name)? == FileType::Symlink {
            return Err(Errno::OPNOTSUPP);
        }
        fs::chmodat(dir, name, Mode::from_raw_mode(mode), AtFlags::empty())
    }

    fn xattr(&self, path: &Path, name: &OsStr, value: Option<&[u8]>) -> Outcome {
        let (dir, file) = self.at(path)?;
        let path = proc_path(dir.as_fd(), &file);
        match value {
            Some(value) => xattr::set(path, name, value).map_err(errno),
            None => xattr::remove(path, name).map_err(errno),
        }
    }

    fn visit(
        &self,
        path: &Path,
        snapshot: &mut Snapshot,
        inodes: &mut BTreeMap<(u64, u64), Vec<PathBuf>>,
    ) -> Result<()> {
        let dir = self.0.open_dir(path)?;
        for name in names_in(dir.as_fd())? {
            let path = path.join(&name);
            let inode = inode_at(dir.as_fd(), &name)?;
            let is_file = matches!(inode.meta.kind, FileKind::File { .. });
            let is_dir = inode.meta.kind == FileKind::Directory;
            let content = is_file.then(|| digest(&self.0.open_file(&path)?)).transpose()?;
            snapshot.insert(path.clone(), Node { meta: inode.meta, content, names: vec![path.clone()] });
            if is_dir {
                self.visit(&path, snapshot, inodes).doing(|| format!("reading {}", path.display()))?;
            } else {
                inodes.entry((inode.dev, inode.ino)).or_default().push(path);
            }
        }
        Ok(())
    }
}

impl Tree for DirTree {
    fn apply(&mut self, op: &Op) -> Outcome {
        match op {
            Op::Mkdir { path, mode } => {
                let (dir, name) = self.name(path)?;
                fs::mkdirat(&dir, &name, Mode::RWXU)?;
                fs::chmodat(dir, name, Mode::from_raw_mode(*mode), AtFlags::empty())
            }
            Op::Write { path, offset, data, mode } => self.write(path, *offset, data, *mode),
            Op::Truncate { path, size } => fs::ftruncate(self.open(path, OFlags::WRONLY)?, *size),
            Op::Punch { path, offset, len } => {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                fs::fallocate(self.open(path, OFlags::WRONLY)?, flags, *offset, *len)
            }
            Op::Unlink { path } => self.name(path).and_then(|(dir, name)| fs::unlinkat(dir, name, AtFlags::empty())),
            Op::Rmdir { path } => self.name(path).and_then(|(dir, name)| fs::unlinkat(dir, name, AtFlags::REMOVEDIR)),
            Op::Rename { from, to } => {
                let (from, to) = (self.name(from)?, self.name(to)?);
                fs::renameat(from.0, from.1, to.0, to.1)
            }
            Op::Link { target, path } => {
                let (target, path) = (self.name(target)?, self.name(path)?);
                fs::linkat(target.0, target.1, path.0, path.1, AtFlags::empty())
            }
            Op::Symlink { path, target } => {
                self.name(path).and_then(|(dir, name)| fs::symlinkat(target.as_path(), dir, name))
            }
            Op::Mknod { path, kind, mode } => self.mknod(path, kind, *mode),
            Op::Chmod { path, mode } => self.chmod(path, *mode),
            Op::Chown { path, uid, gid } => {
                let (dir, name) = self.at(path)?;
                let (uid, gid) = (fs::Uid::from_raw(*uid), fs::Gid::from_raw(*gid));
                fs::chownat(dir, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
            }
            Op::Utimes { path, mtime } => {
                let (dir, name) = self.at(path)?;
                let time = Timespec { tv_sec: mtime.secs, tv_nsec: mtime.nanos.into() };
                let times = Timestamps { last_access: time, last_modification: time };
                fs::utimensat(dir, name, &times, AtFlags::SYMLINK_NOFOLLOW)
            }
            Op::SetXattr { path, name, value } => self.xattr(path, name, Some(value)),
            Op::RemoveXattr { path, name } => self.xattr(path, name, None),
        }
    }

    fn snapshot(&self) -> Result<Snapshot> {
        let meta = inode_at(self.0.as_fd(), OsStr::new(""))?.meta;
        let root = Node { meta, content: None, names: vec![PathBuf::new()] };
        let mut snapshot = Snapshot::from([(PathBuf::new(), root)]);
        let mut inodes = BTreeMap::new();
        self.visit(Path::new(""), &mut snapshot, &mut inodes)?;
        name_links(&mut snapshot, inodes);
        Ok(snapshot)
    }

    fn read(&self, path: &Path) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.0.open_file(path)?.read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    fn segments(&self, path: &Path) -> Result<Vec<Segment>> {
        let file = self.0.open_file(path)?;
        let mut segments = Vec::new();
        let mut at = 0;
        while let Some(segment) = next_data(&file, at)? {
            at = segment.offset + segment.len;
            segments.push(segment);
        }
        Ok(segments)
    }
}

fn file_type(dir: &OwnedFd, name: &OsStr) -> Outcome<FileType> {
    Ok(FileType::from_raw_mode(fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?.st_mode))
}

fn errno(e: std::io::Error) -> Errno {
    Errno::from_io_error(&e).unwrap_or(Errno::IO)
}

/// The first stored run of bytes at or after `from` (lseek(2), `SEEK_DATA`).
fn next_data(file: &File, from: u64) -> Result<Option<Segment>> {
    match fs::seek(file, SeekFrom::Data(from)) {
        Err(Errno::NXIO) => Ok(None),
        Err(e) => Err(e.into()),
        Ok(offset) => Ok(Some(Segment { offset, len: fs::seek(file, SeekFrom::Hole(offset))? - offset })),
    }
}

fn digest(file: &File) -> Result<crate::Digest> {
    const BLOCK: u64 = ContentDigest::BLOCK as u64;
    let mut digest = ContentDigest::default();
    let mut buffer = [0; ContentDigest::BLOCK];
    let mut number = 0;
    while let Some(run) = next_data(file, number * BLOCK)? {
        number = number.max(run.offset / BLOCK);
        while number * BLOCK < run.offset + run.len {
            let mut filled = 0;
            loop {
                match file.read_at(&mut buffer[filled..], number * BLOCK + filled as u64)? {
                    0 => break,
                    n => filled += n,
                }
            }
            digest.block(number, &buffer[..filled]);
            number += 1;
        }
    }
    Ok(digest.finish())
}
