use super::*;
use crate::Candidates;
use crate::walk::tests::{Op, Tree, copy, make_deep, on_overlay, ops, run_all, set_mtime, snapshot};
use proptest::prelude::*;
use std::{
    ffi::OsString,
    os::unix::{
        ffi::OsStringExt,
        fs::{FileExt, MetadataExt, PermissionsExt, symlink},
        net::UnixListener,
    },
    process::{Command, Stdio},
};

fn diff(lower: Option<&Path>, upper: &Path) -> Vec<u8> {
    let (lower, upper) = (lower.map(|path| Root::open(path).unwrap()), Root::open(upper).unwrap());
    diff_tar(lower.as_ref(), &upper, None, Vec::new()).unwrap()
}

/// Runs a program with `input` and gives what it prints; nothing may be said on standard error.
fn pipe(program: &mut Command, input: &[u8]) -> String {
    let mut child = program.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let output = std::thread::scope(|scope| {
        scope.spawn(move || stdin.write_all(input).unwrap());
        child.wait_with_output().unwrap()
    });
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && errors.is_empty(), "{program:?}: {errors}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn gnu_extract(tar: &[u8], at: &Path) {
    let options = ["-xp", "--numeric-owner", "--xattrs", "--xattrs-include=*", "--warning=no-timestamp"];
    // hdrcharset is POSIX's, but unknown to GNU tar, which takes names as they are.
    let quiet = ["--warning=no-unknown-keyword", "--exclude=.wh.*"];
    pipe(Command::new("tar").args(options).args(quiet).arg("-C").arg(at), tar);
}

/// Applies a layer tar by GNU tar, deletions and changes of type first.
fn apply(tar: &[u8], at: &Path) {
    for entry in tar::Archive::new(tar).entries().unwrap() {
        let entry = entry.unwrap();
        let path = at.join(entry.path().unwrap());
        let name = path.file_name().unwrap_or_default().as_bytes();
        let gone = match name.strip_prefix(WHITEOUT.as_bytes()) {
            Some(name) => path.with_file_name(OsStr::from_bytes(name)),
            None => path,
        };
        if gone.symlink_metadata().is_ok_and(|st| !(st.is_dir() && entry.header().entry_type().is_dir())) {
            Op::Remove(gone.strip_prefix(at).unwrap().to_str().unwrap().into()).run(at).unwrap();
        }
    }
    gnu_extract(tar, at);
}

/// What a tar can give back of a tree.
fn portable(at: &Path) -> Tree {
    let mut tree = snapshot(at);
    tree.retain(|_, item| item.meta.kind != FileKind::Socket);
    for item in tree.values_mut() {
        item.state = Default::default();
        if item.meta.kind == FileKind::Directory {
            // Overlayfs says 1 for merged directories.
            item.nlink = 0;
        }
    }
    tree
}

/// Says what differs, and not all the rest.
fn assert_same(a: &Path, b: &Path) {
    let (mut a, mut b) = (portable(a), portable(b));
    let equal: Vec<PathBuf> = a.keys().filter(|path| a.get(*path) == b.get(*path)).cloned().collect();
    for path in equal {
        a.remove(&path);
        b.remove(&path);
    }
    for item in a.values_mut().chain(b.values_mut()) {
        item.content.truncate(100);
    }
    assert_eq!(a, b);
}

fn odd_tree(at: &Path) {
    let bytes = |name: &[u8]| at.join(OsStr::from_bytes(name));
    let long = format!("{}/{}", "d".repeat(200), "f".repeat(250));
    std::fs::create_dir(at.join("d".repeat(200))).unwrap();
    let names = [&b"plain"[..], b"sp ace\nnewline", "ünï".as_bytes(), b"\xff\xfe", long.as_bytes()];
    for (i, name) in names.iter().enumerate() {
        std::fs::write(bytes(name), name).unwrap();
        set_mtime(&bytes(name), [-2, 0, 1, 1 << 33, 2_000_000_000][i], [500_000_000, 0, 1, 0, 999_999_999][i]);
    }
    std::fs::write(at.join("setuid"), "x").unwrap();
    std::os::unix::fs::chown(at.join("setuid"), Some(3_000_000_000), Some(2_097_152)).unwrap();
    std::fs::set_permissions(at.join("setuid"), PermissionsExt::from_mode(0o6755)).unwrap();
    xattr::set(at.join("setuid"), "user.%3D=\n", b"\0\n\xff").unwrap();
    // VFS_CAP_REVISION_2, effective, cap_net_raw: linux/capability.h.
    let capability = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    xattr::set(at.join("plain"), "security.capability", &capability).unwrap();
    xattr::set(at.join("plain"), "trusted.t", b"").unwrap();
    std::fs::hard_link(at.join("plain"), bytes(b"\xfelink")).unwrap();
    symlink(OsStr::from_bytes(&[b'\xe4'; 300]), at.join("symlink")).unwrap();
    std::fs::hard_link(at.join("symlink"), at.join("symlink2")).unwrap();
    for (name, kind) in
        [("pipe", FileType::Fifo), ("char", FileType::CharacterDevice), ("block", FileType::BlockDevice)]
    {
        fs::mknodat(fs::CWD, at.join(name), kind, Mode::RUSR, fs::makedev(259, 1_048_575)).unwrap();
    }
    UnixListener::bind(at.join("socket")).unwrap();
    std::fs::hard_link(at.join("socket"), at.join("socket2")).unwrap();
    let sparse = File::create(at.join("sparse")).unwrap();
    sparse.set_len(10 << 20).unwrap();
    sparse.write_all_at(b"middle", 5 << 20).unwrap();
    sparse.write_all_at(&[7; 8192], 7 << 20).unwrap();
    File::create(bytes(b"hole\xff")).unwrap().set_len(1 << 20).unwrap();
    std::fs::create_dir(at.join("dir")).unwrap();
    std::fs::set_permissions(at.join("dir"), PermissionsExt::from_mode(0o1777)).unwrap();
    set_mtime(&at.join("dir"), 5, 5);
    std::fs::set_permissions(at, PermissionsExt::from_mode(0o710)).unwrap();
    set_mtime(at, 7, 7);
}

#[test]
fn gnu_tar_extracts_the_same_tree_however_odd() {
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    odd_tree(from.path());
    let tar = diff(None, from.path());
    gnu_extract(&tar, to.path());
    assert_same(to.path(), from.path());
    for name in ["sparse", "setuid"] {
        let blocks = |at: &Path| at.join(name).metadata().unwrap().blocks();
        assert_eq!(blocks(from.path()), blocks(to.path()), "{name}");
    }
    assert!(tar.len() < 100_000, "holes are not written: {}", tar.len());
    assert_eq!(tar, diff(None, from.path()), "the same tree gives the same bytes");
    let plain = tree_tar(&Root::open(from.path()).unwrap(), Vec::new()).unwrap();
    assert_eq!(tar, plain);
}

#[test]
fn python_reads_the_same_names_links_and_content() {
    let from = tempfile::tempdir().unwrap();
    odd_tree(from.path());
    let script = "
import sys, io, tarfile, os, hashlib
root = sys.argv[1]
tar = tarfile.open(fileobj=io.BytesIO(sys.stdin.buffer.read()), encoding='utf-8', errors='surrogateescape')
for m in tar:
    st = os.lstat(os.path.join(root, m.name))
    assert (m.mode, m.uid, m.gid) == (st.st_mode & 0o7777, st.st_uid, st.st_gid), m
    assert abs(m.mtime - st.st_mtime) < 1e-3, (m.name, m.mtime, st.st_mtime)
    if m.isfile():
        assert tar.extractfile(m).read() == open(os.path.join(root, m.name), 'rb').read(), m
    if m.issym():
        assert m.linkname == os.readlink(os.path.join(root, m.name)), m
print(len(tar.getnames()))
";
    let printed = pipe(Command::new("python3").arg("-c").arg(script).arg(from.path()), &diff(None, from.path()));
    let items = portable(from.path()).len();
    assert_eq!(printed.trim(), items.to_string());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn a_layer_tar_applied_to_the_lower_tree_gives_the_upper(before in ops(40), after in ops(15)) {
        let dirs = [(); 3].map(|()| tempfile::tempdir().unwrap());
        let [lower, upper, applied] = dirs.each_ref().map(|dir| dir.path());
        run_all(lower, &before);
        copy(lower, upper);
        copy(lower, applied);
        run_all(upper, &after);
        // What lower has of sockets no tar takes away or brings; extraction would stumble over them.
        for at in [lower, upper, applied] {
            remove_sockets(at);
        }
        apply(&diff(Some(lower), upper), applied);
        prop_assert_eq!(portable(applied), portable(upper));
    }
}

fn remove_sockets(at: &Path) {
    for (path, item) in snapshot(at) {
        if item.meta.kind == FileKind::Socket {
            let parent = at.join(&path).parent().unwrap().to_owned();
            let st = fs::stat(&parent).unwrap();
            std::fs::remove_file(at.join(path)).unwrap();
            set_mtime(&parent, st.st_mtime, st.st_mtime_nsec as u32);
        }
    }
}

/// The paths of a tar with their types and link targets.
fn listing(tar: &[u8]) -> Vec<String> {
    let entry = |entry: io::Result<tar::Entry<'_, &[u8]>>| {
        let entry = entry.unwrap();
        let link = entry.link_name().unwrap().map(|to| format!(" -> {}", to.display())).unwrap_or_default();
        format!("{}{link}", entry.path().unwrap().display())
    };
    tar::Archive::new(tar).entries().unwrap().map(entry).collect()
}

#[test]
fn a_new_link_to_an_old_file_brings_the_file_along() {
    let fill = |lower: &Path| std::fs::write(lower.join("old"), "content").unwrap();
    on_overlay(&fill, |lower, merged| {
        std::fs::hard_link(merged.join("old"), merged.join("a-link")).unwrap();
        let tar = diff(Some(lower), merged);
        assert_eq!(listing(&tar), ["./", "a-link", "old -> a-link"]);
        let applied = tempfile::tempdir().unwrap();
        copy(lower, applied.path());
        apply(&tar, applied.path());
        assert_eq!(portable(applied.path()), portable(merged));
    });
}

/// Candidates of a driver that knows which names in the root directory were touched.
struct Touched(&'static [&'static str]);

impl Narrow for Touched {
    fn candidates(&mut self, dir: &Path) -> Result<Candidates> {
        assert_eq!(dir, Path::new(""), "only the root is in both and was touched");
        Ok(Candidates::Names(self.0.iter().map(OsString::from).collect()))
    }
}

/// A tree with `d/f`, `d/g`, and more names of these.
fn linked_tree(at: &Path) {
    for dir in ["d", "keep", "keep/deep", "other"] {
        std::fs::create_dir(at.join(dir)).unwrap();
    }
    for (file, link) in [("d/f", "a"), ("d/f", "keep/deep/f"), ("d/f", "keep/deep/f2"), ("d/g", "d/h"), ("d/g", "z")] {
        if !at.join(file).exists() {
            std::fs::write(at.join(file), file).unwrap();
        }
        std::fs::hard_link(at.join(file), at.join(link)).unwrap();
    }
}

#[test]
fn a_renamed_directory_brings_the_other_names_of_its_files_along() {
    let dirs = [(); 3].map(|()| tempfile::tempdir().unwrap());
    let [lower, upper, applied] = dirs.each_ref().map(|dir| dir.path());
    linked_tree(lower);
    copy(lower, upper);
    copy(lower, applied);
    std::fs::rename(upper.join("d"), upper.join("e")).unwrap();
    let (from, to) = (Root::open(lower).unwrap(), Root::open(upper).unwrap());
    let tar = diff_tar(Some(&from), &to, Some(&mut Touched(&["d", "e"])), Vec::new()).unwrap();
    let links = ["a -> e/f", "keep/", "keep/deep/", "keep/deep/f -> e/f", "keep/deep/f2 -> e/f", "z -> e/g"];
    let walked = ["./", ".wh.d", "e/", "e/f", "e/g", "e/h -> e/g"];
    assert_eq!(listing(&tar), [&walked[..], &links].concat());
    apply(&tar, applied);
    assert_eq!(portable(applied), portable(upper));
}

#[test]
fn names_that_are_nowhere_in_the_tree_are_not_missed() {
    let dir = tempfile::tempdir().unwrap();
    let [lower, upper] = ["lower", "upper"].map(|name| dir.path().join(name));
    for at in [&lower, &upper] {
        std::fs::create_dir(at).unwrap();
        linked_tree(at);
    }
    std::fs::hard_link(upper.join("a"), dir.path().join("outside")).unwrap();
    std::fs::hard_link(upper.join("a"), upper.join("new")).unwrap();
    let (lower, upper) = (Root::open(&lower).unwrap(), Root::open(&upper).unwrap());
    let tar = diff_tar(Some(&lower), &upper, Some(&mut Touched(&["a", "new"])), Vec::new()).unwrap();
    let links = ["d/", "d/f -> a", "keep/", "keep/deep/", "keep/deep/f -> a", "keep/deep/f2 -> a"];
    assert_eq!(listing(&tar), [&["./", "a", "new -> a"][..], &links].concat());
}

#[test]
fn names_that_come_and_go_meanwhile_are_no_failure() {
    /// Changes names once something of the tar is written.
    struct Meddler<'a>(&'a Path, Vec<u8>);
    impl Write for Meddler<'_> {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if self.1.is_empty() {
                std::fs::remove_file(self.0.join("a"))?;
                std::fs::rename(self.0.join("keep/deep/f"), self.0.join("other/f"))?;
                std::fs::hard_link(self.0.join("e/f"), self.0.join("e/late"))?;
                std::fs::hard_link(self.0.join("e/f"), self.0.join("keep/late"))?;
            }
            self.1.write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let dirs = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let [lower, upper] = dirs.each_ref().map(|dir| dir.path());
    linked_tree(lower);
    copy(lower, upper);
    std::fs::rename(upper.join("d"), upper.join("e")).unwrap();
    // More than the writer keeps to itself, after the files with links.
    std::fs::write(upper.join("e/large"), vec![1; 1 << 20]).unwrap();
    let (from, to) = (Root::open(lower).unwrap(), Root::open(upper).unwrap());
    let out = Meddler(upper, Vec::new());
    let tar = diff_tar(Some(&from), &to, Some(&mut Touched(&["d", "e"])), out).unwrap().1;
    let walked = ["./", ".wh.d", "e/", "e/f", "e/g", "e/h -> e/g", "e/large"];
    let kept = ["e/late -> e/f", "keep/", "keep/deep/", "keep/deep/f2 -> e/f", "keep/late -> e/f"];
    assert_eq!(listing(&tar), [&walked[..], &kept, &["other/", "other/f -> e/f", "z -> e/g"]].concat());
}

#[test]
fn deletions_are_whiteouts_and_unchanged_files_are_not_there() {
    let fill = |lower: &Path| {
        std::fs::create_dir(lower.join("etc")).unwrap();
        std::fs::write(lower.join("etc/gone"), "").unwrap();
        std::fs::write(lower.join("etc/stays"), "").unwrap();
    };
    on_overlay(&fill, |lower, merged| {
        std::fs::remove_file(merged.join("etc/gone")).unwrap();
        assert_eq!(listing(&diff(Some(lower), merged)), ["./", "etc/", "etc/.wh.gone"]);
    });
}

#[test]
fn a_name_that_would_be_a_whiteout_is_refused_in_layers_only() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join(".wh.x"), "").unwrap();
    let root = Root::open(dir.path()).unwrap();
    let e = diff_tar(None, &root, None, Vec::new()).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::InvalidInput);
    assert!(e.to_string().contains(".wh.x"), "{e}");
    assert_eq!(listing(&tree_tar(&root, Vec::new()).unwrap()), ["./", ".wh.x"]);
}

#[test]
fn a_tree_deeper_than_path_max_is_exported_whole() {
    let dir = tempfile::tempdir().unwrap();
    make_deep(dir.path(), 1000);
    let entries = listing(&diff(None, dir.path()));
    assert_eq!(entries.len(), 1 + 1000 + 1);
    assert!(entries.last().unwrap().ends_with("/deeper/last"));
}

#[test]
fn what_vanished_since_the_walk_is_left_out() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("file"), "").unwrap();
    let root = Root::open(dir.path()).unwrap();
    let mut source = RootSource::new(&root);
    let mut exporter = Exporter::new(&mut source, Vec::new());
    for path in ["gone", "file/under", "file"] {
        exporter.change(&Change { path: path.into(), kind: ChangeKind::Added }).unwrap();
    }
    assert_eq!(listing(&exporter.finish().unwrap()), ["file"]);
}

#[test]
fn very_many_holes_become_one_segment_at_the_end() {
    let file = tempfile::tempfile().unwrap();
    let count = MAX_SEGMENTS as u64 + 10;
    file.set_len(count * 8192).unwrap();
    for i in 0..count {
        file.write_all_at(b"x", i * 8192).unwrap();
    }
    let found = segments(&file, count * 8192).unwrap();
    assert_eq!(found.len(), MAX_SEGMENTS);
    let last = found.last().unwrap();
    assert_eq!(last.offset + last.len, count * 8192);
}

#[test]
fn a_failing_file_is_no_vanished_one() {
    struct Broken;
    impl Source for Broken {
        fn metadata(&mut self, _: &Path) -> Result<(Metadata, Option<Links>)> {
            Err(Error::new(ErrorKind::PermissionDenied, "no"))
        }
        fn content(&mut self, _: &Path) -> Result<Content<'_>> {
            unreachable!("metadata fails")
        }
    }
    let path: PathBuf = OsString::from_vec(b"x\xff".to_vec()).into();
    let e = Exporter::new(&mut Broken, Vec::new()).change(&Change { path, kind: ChangeKind::Added }).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::PermissionDenied);
}
