use super::*;
use crate::{FileKind, Metadata, Timestamp};
use proptest::{collection::vec as list_of, prelude::*, sample::select};
use rustix::{
    fs::{Timespec, Timestamps},
    mount::{MountFlags, MountPropagationFlags, mount, mount_change},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    os::unix::{
        fs::{PermissionsExt, symlink},
        net::UnixListener,
    },
    process::Command,
};

/// Everything there is to know about one path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Item {
    pub meta: Metadata,
    pub content: Vec<u8>,
    /// All its names.
    pub names: BTreeSet<PathBuf>,
    /// Names, and what tells whether it was touched.
    pub nlink: u32,
    pub state: (u64, Timestamp),
}

pub(crate) type Tree = BTreeMap<PathBuf, Item>;

/// Reads a whole tree by means of std, the root under an empty path.
pub(crate) fn snapshot(at: &Path) -> Tree {
    let (mut tree, mut groups) = (Tree::new(), BTreeMap::<_, BTreeSet<PathBuf>>::new());
    let mut todo = vec![PathBuf::new()];
    let mut keys = BTreeMap::new();
    while let Some(path) = todo.pop() {
        let inode = Root::open(at).unwrap().inode(&path).unwrap().unwrap();
        let full = if path.as_os_str().is_empty() { at.to_owned() } else { at.join(&path) };
        let mut content = Vec::new();
        match inode.meta.kind {
            FileKind::File { .. } => content = std::fs::read(&full).unwrap(),
            FileKind::Directory => {
                todo.extend(std::fs::read_dir(&full).unwrap().map(|e| path.join(e.unwrap().file_name())));
            }
            _ => {}
        }
        groups.entry((inode.dev, inode.ino)).or_default().insert(path.clone());
        keys.insert(path.clone(), (inode.dev, inode.ino));
        let state = (inode.ino, inode.ctime);
        tree.insert(path, Item { meta: inode.meta, content, names: BTreeSet::new(), nlink: inode.nlink, state });
    }
    for (path, item) in &mut tree {
        item.names = groups[&keys[path]].clone();
    }
    tree
}

/// What should come out, the slow way.
fn expected(lower: &Tree, upper: &Tree) -> Vec<Change> {
    let is_dir = |tree: &Tree, path: &Path| tree.get(path).is_some_and(|i| i.meta.kind == FileKind::Directory);
    let mut found = BTreeMap::new();
    for (path, u) in upper {
        match lower.get(path) {
            None => drop(found.insert(path.clone(), ChangeKind::Added)),
            Some(l) => {
                let linked = u.meta.kind != FileKind::Directory && u.nlink.max(l.nlink) > 1;
                if (&l.meta, &l.content) != (&u.meta, &u.content) || (linked && l.state != u.state) {
                    found.insert(path.clone(), ChangeKind::Modified);
                }
            }
        }
    }
    for path in lower.keys().filter(|path| !upper.contains_key(*path)) {
        if is_dir(upper, path.parent().unwrap()) {
            found.insert(path.clone(), ChangeKind::Deleted);
        }
    }
    let parents: Vec<PathBuf> = found.keys().flat_map(|path| path.ancestors().skip(1)).map(Path::to_owned).collect();
    for path in parents {
        if !path.as_os_str().is_empty() && is_dir(lower, &path) && is_dir(upper, &path) {
            found.entry(path).or_insert(ChangeKind::Modified);
        }
    }
    // Components compare one by one, so that a directory comes right before what is in it.
    found.into_iter().map(|(path, kind)| Change { path, kind }).collect()
}

fn walked(lower: Option<&Path>, upper: &Path, narrow: Option<&mut dyn Narrow>) -> Vec<Change> {
    let (lower, upper) = (lower.map(|path| Root::open(path).unwrap()), Root::open(upper).unwrap());
    let mut found = Vec::new();
    changes(lower.as_ref(), &upper, narrow, &mut |change| {
        found.push(change);
        Ok(())
    })
    .unwrap();
    found
}

/// As `docker diff` prints it.
fn letters(changes: &[Change]) -> Vec<String> {
    changes.iter().map(|c| format!("{} {}", c.kind.letter(), c.path.display())).collect()
}

pub(crate) fn set_mtime(path: &Path, secs: i64, nanos: u32) {
    let time = Timespec { tv_sec: secs, tv_nsec: nanos.into() };
    let times = Timestamps { last_access: time, last_modification: time };
    fs::utimensat(fs::CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

pub(crate) fn copy(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg("-a").arg(from.join(".")).arg(to).status().unwrap();
    assert!(copied.success());
}

/// Something done to a tree; it may fail, as when a name is missing.
#[derive(Debug, Clone)]
pub(crate) enum Op {
    Write(String, u8, usize),
    /// Other content of equal size, with the mtime put back.
    Sneak(String),
    Mkdir(String),
    Symlink(String, String),
    Node(String, FileType),
    Socket(String),
    Remove(String),
    Rename(String, String),
    Link(String, String),
    Chmod(String, u32),
    Chown(String, u32),
    Xattr(String, String, Vec<u8>),
    Touch(String, i64, u32),
}

impl Op {
    pub(crate) fn run(&self, at: &Path) -> std::io::Result<()> {
        let full = |path: &String| at.join(path);
        match self {
            // A FIFO would block.
            Op::Write(path, byte, size) if full(path).symlink_metadata().map_or(true, |st| st.is_file()) => {
                std::fs::write(full(path), vec![*byte; *size])
            }
            Op::Sneak(path) if full(path).symlink_metadata()?.is_file() => {
                let st = fs::lstat(full(path))?;
                let content = std::fs::read(full(path))?.iter().map(|byte| byte ^ 1).collect::<Vec<u8>>();
                std::fs::write(full(path), content)?;
                set_mtime(&full(path), st.st_mtime, st.st_mtime_nsec as u32);
                Ok(())
            }
            Op::Mkdir(path) => std::fs::create_dir(full(path)),
            Op::Symlink(path, target) => symlink(target, full(path)),
            Op::Node(path, kind) => {
                Ok(fs::mknodat(fs::CWD, full(path), *kind, Mode::RUSR, fs::makedev(1, 3)).map(drop)?)
            }
            Op::Socket(path) => UnixListener::bind(full(path)).map(drop),
            Op::Remove(path) if full(path).symlink_metadata()?.is_dir() => std::fs::remove_dir_all(full(path)),
            Op::Remove(path) => std::fs::remove_file(full(path)),
            Op::Rename(from, to) => std::fs::rename(full(from), full(to)),
            Op::Link(from, to) => std::fs::hard_link(full(from), full(to)),
            Op::Chmod(path, mode) if !full(path).is_symlink() => {
                std::fs::set_permissions(full(path), PermissionsExt::from_mode(*mode))
            }
            Op::Chown(path, id) => std::os::unix::fs::lchown(full(path), Some(*id), Some(id / 2)),
            Op::Xattr(path, name, value) if !full(path).is_symlink() => xattr::set(full(path), name, value),
            Op::Touch(path, secs, nanos) if full(path).symlink_metadata().is_ok() => {
                set_mtime(&full(path), *secs, *nanos);
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

pub(crate) fn run_all(at: &Path, ops: &[Op]) {
    for op in ops {
        // Names that are missing or taken are part of the game.
        let _ = op.run(at);
    }
}

/// Operations on few names, so that they meet. The names sort differently as paths and as strings.
pub(crate) fn ops(count: usize) -> impl Strategy<Value = Vec<Op>> {
    let path = || {
        let name = || select(vec!["a", "a-b", "b", "\u{fc}"]);
        list_of(name(), 1..4).prop_map(|names| names.join("/"))
    };
    let node = select(vec![FileType::Fifo, FileType::CharacterDevice, FileType::BlockDevice]);
    let op = prop_oneof![
        4 => (path(), any::<u8>(), select(vec![0, 1, 600, 200_000])).prop_map(|(p, b, n)| Op::Write(p, b, n)),
        3 => path().prop_map(Op::Sneak),
        6 => path().prop_map(Op::Mkdir),
        1 => (path(), path()).prop_map(|(p, t)| Op::Symlink(p, t)),
        1 => (path(), node).prop_map(|(p, k)| Op::Node(p, k)),
        1 => path().prop_map(Op::Socket),
        2 => path().prop_map(Op::Remove),
        2 => (path(), path()).prop_map(|(p, q)| Op::Rename(p, q)),
        3 => (path(), path()).prop_map(|(p, q)| Op::Link(p, q)),
        1 => (path(), select(vec![0o755, 0o4711, 0o1777, 0])).prop_map(|(p, m)| Op::Chmod(p, m)),
        1 => (path(), select(vec![0, 7, 3_000_000_000])).prop_map(|(p, i)| Op::Chown(p, i)),
        1 => (path(), list_of(any::<u8>(), 0..9)).prop_map(|(p, v)| Op::Xattr(p, "user.x=%3D".into(), v)),
        1 => (path(), -3_i64..3, 0_u32..1_000_000_000).prop_map(|(p, s, n)| Op::Touch(p, s, n)),
    ];
    list_of(op, 0..count)
}

/// Runs `test` with a `lower` that `fill` filled and the root of an overlay on it, on a thread with mounts of its own,
/// which vanish with it.
pub(crate) fn on_overlay(fill: &(dyn Fn(&Path) + Sync), test: impl FnOnce(&Path, &Path) + Send) {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path();
    let in_namespace = || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
        for name in ["lower", "upper", "work", "merged"] {
            std::fs::create_dir(base.join(name)).unwrap();
        }
        fill(&base.join("lower"));
        // The attributes of the merged root are those of upper, and a driver copies them from the parent.
        let st = fs::stat(base.join("lower")).unwrap();
        set_mtime(&base.join("upper"), st.st_mtime, st.st_mtime_nsec as u32);
        std::fs::set_permissions(base.join("upper"), PermissionsExt::from_mode(st.st_mode)).unwrap();
        let options = format!("lowerdir={0}/lower,upperdir={0}/upper,workdir={0}/work", base.display());
        let options = std::ffi::CString::new(options).unwrap();
        mount("overlay", base.join("merged"), "overlay", MountFlags::empty(), &*options).unwrap();
        test(&base.join("lower"), &base.join("merged"));
    };
    std::thread::scope(|scope| scope.spawn(in_namespace).join()).unwrap_or_else(|e| std::panic::resume_unwind(e));
}

/// Candidates as overlayfs's upper directory tells them.
struct UpperDir(PathBuf);

impl Narrow for UpperDir {
    fn candidates(&mut self, dir: &Path) -> Result<Candidates> {
        let dir = self.0.join(dir);
        if matches!(xattr::get(&dir, "trusted.overlay.opaque"), Ok(Some(_))) {
            return Ok(Candidates::All);
        }
        let entries = std::fs::read_dir(dir);
        Ok(Candidates::Names(entries.map_or(Vec::new(), |all| all.map(|e| e.unwrap().file_name()).collect())))
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]

    #[test]
    fn a_changed_copy_differs_as_a_naive_comparison_says(before in ops(40), after in ops(15)) {
        let (lower, upper) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        run_all(lower.path(), &before);
        copy(lower.path(), upper.path());
        run_all(upper.path(), &after);
        let (l, u) = (snapshot(lower.path()), snapshot(upper.path()));
        prop_assert_eq!(walked(Some(lower.path()), upper.path(), None), expected(&l, &u));
        let mut nothing = u.clone();
        nothing.retain(|path, _| path.as_os_str().is_empty());
        prop_assert_eq!(walked(None, upper.path(), None), expected(&nothing, &u));
    }

    #[test]
    fn an_overlay_differs_from_its_lower_as_a_naive_comparison_says(before in ops(40), after in ops(15)) {
        on_overlay(&|lower| run_all(lower, &before), |lower, merged| {
            run_all(merged, &after);
            let wanted = expected(&snapshot(lower), &snapshot(merged));
            assert_eq!(walked(Some(lower), merged, None), wanted);
            if !after.iter().any(|op| matches!(op, Op::Rename(..))) {
                // A plain directory listing knows nothing of redirected directories.
                let mut narrow = UpperDir(lower.with_file_name("upper"));
                assert_eq!(walked(Some(lower), merged, Some(&mut narrow)), wanted);
            }
        });
    }
}

/// What `change` does to an overlay whose lower has `etc/{hosts,conf}` and `usr/{a,b}`, `b` being a link to `a`.
fn overlay_diff(change: impl FnOnce(&Path) + Send) -> Vec<String> {
    let fill = |lower: &Path| {
        for dir in ["etc", "usr"] {
            std::fs::create_dir(lower.join(dir)).unwrap();
        }
        for file in ["etc/hosts", "etc/conf", "usr/a"] {
            std::fs::write(lower.join(file), file).unwrap();
        }
        std::fs::hard_link(lower.join("usr/a"), lower.join("usr/b")).unwrap();
    };
    let mut found = Vec::new();
    on_overlay(&fill, |lower, merged| {
        assert_eq!(letters(&walked(Some(lower), merged, None)), Vec::<String>::new());
        change(merged);
        found = walked(Some(lower), merged, None);
        assert_eq!(found, expected(&snapshot(lower), &snapshot(merged)));
        let mut narrow = UpperDir(lower.with_file_name("upper"));
        assert_eq!(walked(Some(lower), merged, Some(&mut narrow)), found);
    });
    letters(&found)
}

#[test]
fn overlay_shows_a_chmod_as_modified() {
    let change = |at: &Path| std::fs::set_permissions(at.join("etc/hosts"), PermissionsExt::from_mode(0o600)).unwrap();
    assert_eq!(overlay_diff(change), ["C etc", "C etc/hosts"]);
}

#[test]
fn overlay_shows_an_edit_of_equal_size_and_mtime_as_modified() {
    assert_eq!(overlay_diff(|at| Op::Sneak("etc/hosts".into()).run(at).unwrap()), ["C etc", "C etc/hosts"]);
}

#[test]
fn overlay_shows_a_copy_up_without_a_change_as_nothing() {
    let open = |at: &Path| drop(File::options().append(true).open(at.join("etc/hosts")).unwrap());
    assert_eq!(overlay_diff(open), Vec::<String>::new());
}

#[test]
fn overlay_shows_a_rename_as_added_and_deleted() {
    let change = |at: &Path| std::fs::rename(at.join("etc/hosts"), at.join("etc/new")).unwrap();
    assert_eq!(overlay_diff(change), ["C etc", "D etc/hosts", "A etc/new"]);
}

#[test]
fn overlay_shows_all_names_of_a_newly_linked_file() {
    let change = |at: &Path| std::fs::hard_link(at.join("etc/hosts"), at.join("usr/hosts")).unwrap();
    assert_eq!(overlay_diff(change), ["C etc", "C etc/hosts", "C usr", "A usr/hosts"]);
}

#[test]
fn overlay_shows_a_directory_made_anew_by_what_is_in_it() {
    let change = |at: &Path| {
        std::fs::remove_dir_all(at.join("etc")).unwrap();
        std::fs::create_dir(at.join("etc")).unwrap();
        std::fs::write(at.join("etc/hosts"), "another").unwrap();
        std::fs::create_dir(at.join("etc/d")).unwrap();
        std::fs::write(at.join("etc/d/f"), "").unwrap();
    };
    assert_eq!(overlay_diff(change), ["C ", "C etc", "D etc/conf", "A etc/d", "A etc/d/f", "C etc/hosts"]);
}

#[test]
fn overlay_shows_nodes_and_sockets() {
    let change = |at: &Path| {
        Op::Node("etc/null".into(), FileType::CharacterDevice).run(at).unwrap();
        Op::Socket("etc/s".into()).run(at).unwrap();
    };
    assert_eq!(overlay_diff(change), ["C etc", "A etc/null", "A etc/s"]);
}

#[test]
fn a_file_for_a_directory_is_one_change_and_a_directory_for_a_file_lists_its_content() {
    let change = |at: &Path| {
        std::fs::remove_dir_all(at.join("etc")).unwrap();
        std::fs::write(at.join("etc"), "").unwrap();
        std::fs::remove_file(at.join("usr/a")).unwrap();
        std::fs::create_dir(at.join("usr/a")).unwrap();
        std::fs::write(at.join("usr/a/x"), "").unwrap();
    };
    // The other name of usr/a belongs to lower, which index=off leaves alone.
    assert_eq!(overlay_diff(change), ["C ", "C etc", "C usr", "C usr/a", "A usr/a/x"]);
}

#[test]
fn only_candidates_are_compared_and_all_means_everything_below() {
    struct Some3(Vec<PathBuf>);
    impl Narrow for Some3 {
        fn candidates(&mut self, dir: &Path) -> Result<Candidates> {
            self.0.push(dir.to_owned());
            let names = |names: &[&str]| Ok(Candidates::Names(names.iter().map(OsString::from).collect()));
            match dir.to_str().unwrap() {
                "" => names(&["some", "missing", "all", "all"]),
                "some" => names(&["x"]),
                _ => Ok(Candidates::All),
            }
        }
    }
    let (lower, upper) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for dir in ["all", "all/deep", "some", "none"] {
        std::fs::create_dir(lower.path().join(dir)).unwrap();
    }
    copy(lower.path(), upper.path());
    for file in ["all/deep/x", "all/y", "some/x", "some/y", "none/x"] {
        std::fs::write(upper.path().join(file), "").unwrap();
    }
    let mut narrow = Some3(Vec::new());
    let found = letters(&walked(Some(lower.path()), upper.path(), Some(&mut narrow)));
    assert_eq!(found, ["C all", "C all/deep", "A all/deep/x", "A all/y", "C some", "A some/x"]);
    assert_eq!(narrow.0, [Path::new(""), Path::new("all"), Path::new("some")]);
}

/// Makes `levels` directories one in the other, longer than PATH_MAX as a path, and a file in the last.
pub(crate) fn make_deep(at: &Path, levels: usize) {
    let mut dir: OwnedFd = File::open(at).unwrap().into();
    for _ in 0..levels {
        fs::mkdirat(&dir, "deeper", Mode::RWXU).unwrap();
        dir = open_dir(&dir, OsStr::new("deeper")).unwrap().unwrap();
    }
    fs::openat(&dir, "last", OFlags::CREATE | OFlags::WRONLY, Mode::RUSR).unwrap();
}

#[test]
fn a_tree_deeper_than_path_max_takes_few_descriptors() {
    let (lower, upper) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    make_deep(lower.path(), 1500);
    make_deep(upper.path(), 1500);
    std::fs::write(upper.path().join("deeper/deeper/x"), "").unwrap();
    let mut most = 0;
    let mut count = 0;
    let (l, u) = (Root::open(lower.path()).unwrap(), Root::open(upper.path()).unwrap());
    changes(Some(&l), &u, None, &mut |change| {
        count += 1;
        if count % 100 == 0 {
            let mine = std::fs::read_dir("/proc/self/fd").unwrap().filter(|fd| {
                let target = std::fs::read_link(fd.as_ref().unwrap().path()).unwrap_or_default();
                target.starts_with(lower.path()) || target.starts_with(upper.path())
            });
            most = most.max(mine.count());
        }
        assert!(change.path.as_os_str().len() < 1500 * 7 + 5);
        Ok(())
    })
    .unwrap();
    // Every directory has another mtime, and so has the file.
    assert_eq!(count, 1500 + 2 + 1);
    assert!(most > 0 && most <= 2 * OPEN_LEVELS + 4, "{most}");
}

#[test]
fn what_vanishes_meanwhile_is_absent() {
    let (lower, upper) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for dir in ["a", "b", "b/c"] {
        std::fs::create_dir(lower.path().join(dir)).unwrap();
        std::fs::write(lower.path().join(dir).join("file"), "").unwrap();
    }
    copy(lower.path(), upper.path());
    std::fs::write(upper.path().join("a/new"), "").unwrap();
    let (l, u) = (Root::open(lower.path()).unwrap(), Root::open(upper.path()).unwrap());
    let mut found = Vec::new();
    changes(Some(&l), &u, None, &mut |change| {
        // The root is listed by now, and a is open.
        let _ = std::fs::remove_dir_all(upper.path().join("b"));
        let _ = std::fs::remove_dir_all(upper.path().join("a"));
        found.push(change);
        Ok(())
    })
    .unwrap();
    let found = letters(&found);
    assert!(found.contains(&"D b".to_owned()), "{found:?}");
    assert!(found.contains(&"D a/file".to_owned()) || found.contains(&"D a".to_owned()), "{found:?}");
}

/// Layers are unpacked at the same time, and reproducible builds give all files one mtime.
#[test]
fn files_made_in_the_same_tick_of_the_clock_are_told_apart() {
    let (lower, upper) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let make = |name: &str, content: &str, at: &Path| {
        std::fs::write(at.join(name), content).unwrap();
        set_mtime(&at.join(name), 0, 0);
        fs::stat(at.join(name)).map(|st| (st.st_ctime, st.st_ctime_nsec)).unwrap()
    };
    // The kernel's coarse clock ticks every few milliseconds; one of many pairs falls between two ticks.
    let met = (0..10_000).any(|i| {
        let name = format!("file-{i}");
        make(&name, "one", lower.path()) == make(&name, "two", upper.path())
    });
    let made = std::fs::read_dir(lower.path()).unwrap().count();
    let found = walked(Some(lower.path()), upper.path(), None);
    assert_eq!(found.iter().filter(|change| !change.path.as_os_str().is_empty()).count(), made);
    assert!(met, "no two files had one ctime");
}

#[test]
fn huge_sparse_files_are_compared_by_their_data() {
    let (lower, upper) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for dir in [&lower, &upper] {
        for (name, at) in [("same", 3 << 40), ("other", if dir.path() == lower.path() { 1 << 40 } else { 2 << 40 })] {
            let file = File::create(dir.path().join(name)).unwrap();
            file.set_len(4 << 40).unwrap();
            file.write_all_at(b"data", at).unwrap();
            set_mtime(&dir.path().join(name), 1, 1);
        }
        set_mtime(dir.path(), 1, 1);
    }
    assert_eq!(letters(&walked(Some(lower.path()), upper.path(), None)), ["C other"]);
}

/// Two trees without a difference: there is nothing to visit, and nothing to write into a tar.
#[test]
fn a_cancelled_walk_ends() {
    struct Cancelling(Cancel);
    impl Narrow for Cancelling {
        fn candidates(&mut self, _: &Path) -> Result<Candidates> {
            self.0.set();
            Ok(Candidates::All)
        }
    }
    let (lower, upper) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let write = |text| {
        for tree in [&lower, &upper] {
            std::fs::write(tree.path().join("file"), text).unwrap();
        }
    };
    write("");
    let cancel = Cancel::default();
    let (l, u) = (Root::open(lower.path()).unwrap(), Root::open(upper.path()).unwrap().cancelled_by(&cancel));
    let ended = changes(Some(&l), &u, Some(&mut Cancelling(cancel.clone())), &mut |_| Ok(()));
    assert_eq!(ended.unwrap_err().kind(), ErrorKind::Interrupted);
    // So does the comparison of large files.
    write("text");
    let dirs = (open_root(&l).unwrap(), open_root(&u).unwrap());
    let same = |cancel: &Cancel| same_content(cancel, &dirs.0, &dirs.1, OsStr::new("file"), 4);
    assert!(same(&Cancel::default()).unwrap());
    assert_eq!(same(&cancel).unwrap_err().kind(), ErrorKind::Interrupted);
}
