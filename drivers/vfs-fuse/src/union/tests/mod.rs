//! The union without FUSE in between, on the filesystem of /var/tmp.

mod content;
mod directories;
mod names;
mod nodes;
mod power;

use super::*;
use crate::config::CopyUp;
use std::{
    fs,
    os::unix::fs::{FileTypeExt, MetadataExt, symlink},
    path::{Path, PathBuf},
};

const ROOT: Caller = Caller { uid: 0, gid: 0, umask: 0o022 };

struct Layers {
    dir: tempfile::TempDir,
    lowers: usize,
    copy_up: CopyUp,
}

impl Layers {
    fn new(lowers: usize) -> Layers {
        let dir = tempfile::Builder::new().prefix("vfs-fuse-union-").tempdir_in("/var/tmp").unwrap();
        for name in (1..=lowers).map(|i| format!("l{i}")).chain(["u".into(), "w".into()]) {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        Layers { dir, lowers, copy_up: CopyUp::Extent }
    }

    fn path(&self, path: &str) -> PathBuf {
        self.dir.path().join(path)
    }

    fn write(&self, path: &str, content: &[u8]) {
        fs::create_dir_all(self.path(path).parent().unwrap()).unwrap();
        fs::write(self.path(path), content).unwrap();
    }

    fn config(&self) -> Config {
        Config {
            lower: (1..=self.lowers).map(|i| self.path(&format!("l{i}"))).collect(),
            upper: Some(self.path("u")),
            work: Some(self.path("w")),
            copy_up: self.copy_up,
            ..Config::default()
        }
    }

    fn open(&self) -> Arc<Union> {
        Union::open(self.config()).unwrap()
    }

    fn open_again(&self, union: Arc<Union>) -> Arc<Union> {
        drop(union);
        self.open()
    }
}

impl Union {
    fn at(&self, path: &str) -> Result<Entry> {
        let root = Entry { id: ROOT_ID, generation: 0, attr: self.getattr(ROOT_ID)? };
        path.split('/').filter(|p| !p.is_empty()).try_fold(root, |at, name| self.lookup(at.id, OsStr::new(name)))
    }

    fn parent(&self, path: &str) -> (u64, std::ffi::OsString) {
        let path = Path::new(path);
        let parent = path.parent().unwrap().to_str().unwrap();
        (self.at(parent).unwrap().id, path.file_name().unwrap().to_owned())
    }

    fn read(&self, path: &str) -> Result<Vec<u8>> {
        let data = self.data(self.at(path)?.id, false)?;
        let mut content = vec![0; data.size()? as usize];
        let length = data.read_at(&mut content, 0)?;
        content.truncate(length);
        Ok(content)
    }

    fn rename_path(&self, from: &str, to: &str, flags: u32) -> Result<()> {
        let ((a, name), (b, to)) = (self.parent(from), self.parent(to));
        self.rename(a, &name, b, &to, flags)
    }

    fn remove_path(&self, path: &str, directory: bool) -> Result<()> {
        let (parent, name) = self.parent(path);
        if directory { self.rmdir(parent, &name) } else { self.unlink(parent, &name) }
    }

    fn list(&self, path: &str) -> Vec<String> {
        let mut names = Vec::new();
        let id = self.at(path).unwrap().id;
        self.readdir(id, 0, &mut |e| {
            let ino = (e.name != "." && e.name != "..").then(|| self.lookup(id, e.name).unwrap().attr.ino);
            assert!(ino.is_none_or(|i| i == e.ino), "{:?}: d_ino {} is not {ino:?}", e.name, e.ino);
            names.push(e.name.to_str().unwrap().to_owned());
            true
        })
        .unwrap();
        names.retain(|n| n != "." && n != "..");
        names.sort();
        names
    }
}

#[test]
fn a_second_daemon_on_the_same_upper_or_work_directory_is_refused() {
    let layers = Layers::new(1);
    let union = layers.open();
    let upper = layers.path("u");
    let lock = rustix::fs::open(&upper, rustix::fs::OFlags::RDONLY, rustix::fs::Mode::empty()).unwrap();
    let again = rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive);
    assert_eq!(again.unwrap_err(), Errno::WOULDBLOCK);
    fs::create_dir(layers.path("u2")).unwrap();
    let same_work = Config { upper: Some(layers.path("u2")), ..layers.config() };
    let error = Union::open(same_work).map(drop).unwrap_err();
    assert!(error.kind() == ErrorKind::Busy && error.to_string().contains("/w "), "{error}");
    drop(union);
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive).unwrap();
}
