use super::*;
use crate::{
    DiffId, Digest, Error, ErrorKind, EscapeXattrs, FileKind, Inode, OverlayXattrs, Root, Timestamp,
    root::{inode_at, names_in},
};
use rustix::{
    fd::AsFd,
    fs::{CWD, FileType, Mode},
    mount::{self, FsMountFlags, FsOpenFlags, MountAttrFlags},
};
use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs,
    os::unix::fs::{MetadataExt, symlink},
    path::PathBuf,
    process::Command,
};
use tempfile::TempDir;

const OVERLAY: Whiteouts = Whiteouts::Overlay { xattrs: OverlayXattrs::Trusted, escape: EscapeXattrs::Own };

/// A directory with a root to unpack in, a sentinel beside it, and a place for the record.
struct Bench {
    dir: TempDir,
}

impl Bench {
    fn new() -> Bench {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("root")).unwrap();
        fs::write(dir.path().join("sentinel"), "untouched").unwrap();
        Bench { dir }
    }

    fn at(&self, path: &str) -> PathBuf {
        self.dir.path().join("root").join(path)
    }

    fn root(&self) -> Root {
        Root::open(&self.at("")).unwrap()
    }

    fn record(&self) -> PathBuf {
        self.dir.path().join("record")
    }

    fn unpack(&self, mut tar: &[u8], whiteouts: Whiteouts) -> Result<Unpacked> {
        let unpacked = unpack(&mut tar, &self.root(), whiteouts, Some(&self.record()));
        assert_eq!(fs::read(self.dir.path().join("sentinel")).unwrap(), b"untouched");
        let mut beside: Vec<_> = fs::read_dir(self.dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        beside.sort();
        assert_eq!(beside, ["record", "root", "sentinel"]);
        unpacked
    }

    fn repack(&self, tar: &[u8]) -> Result<Vec<u8>> {
        let mut out = Vec::new();
        repack(&self.record(), &self.root(), DiffId(Digest::of(tar)), &mut out).map(|()| out)
    }

    fn inode(&self, path: &str) -> Inode {
        self.root().inode(Path::new(path)).unwrap().unwrap_or_else(|| panic!("{path} is missing"))
    }
}

/// Unpacks and checks that the same bytes come back.
fn there_and_back(tar: &[u8], whiteouts: Whiteouts) -> Bench {
    let bench = Bench::new();
    let unpacked = bench.unpack(tar, whiteouts).unwrap();
    assert_eq!(unpacked.tar_bytes, tar.len() as u64);
    assert!(bench.repack(tar).unwrap() == tar, "the tar came back different");
    bench
}

fn refused(tar: &[u8]) -> Error {
    Bench::new().unpack(tar, OVERLAY).unwrap_err()
}

/// Writes tars that no tool would.
#[derive(Default)]
struct Tar(Vec<u8>);

impl Tar {
    fn header(kind: u8, name: &[u8], link: &[u8], size: u64) -> tar::Header {
        let mut header = tar::Header::new_gnu();
        header.as_old_mut().name[..name.len()].copy_from_slice(name);
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link);
        header.as_old_mut().linkflag = [kind];
        header.set_mode(0o640);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_000_000_000);
        header.set_size(size);
        header.set_cksum();
        header
    }

    fn raw(mut self, header: &tar::Header, data: &[u8]) -> Tar {
        self.0.extend_from_slice(header.as_bytes());
        self.0.extend_from_slice(data);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    fn entry(self, kind: u8, name: &str, link: &str, data: &[u8]) -> Tar {
        let size = data.len() as u64;
        self.raw(&Tar::header(kind, name.as_bytes(), link.as_bytes(), size), data)
    }

    fn file(self, name: &str, data: &str) -> Tar {
        self.entry(b'0', name, "", data.as_bytes())
    }

    fn dir(self, name: &str) -> Tar {
        self.entry(b'5', name, "", b"")
    }

    fn symlink(self, name: &str, target: &str) -> Tar {
        self.entry(b'2', name, target, b"")
    }

    fn link(self, name: &str, target: &str) -> Tar {
        self.entry(b'1', name, target, b"")
    }

    fn pax(self, records: &[(&str, &[u8])]) -> Tar {
        let mut data = Vec::new();
        for (key, value) in records {
            let body = [b" ", key.as_bytes(), b"=", value, b"\n"].concat();
            let len = (1..).find(|l: &usize| body.len() + l.to_string().len() == *l).unwrap();
            data.extend_from_slice(&[len.to_string().as_bytes(), &body].concat());
        }
        self.entry(b'x', "pax", "", &data)
    }

    fn end(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 1024, 0);
        self.0
    }
}

fn gnu_tar(dir: &Path, args: &[&str]) -> Vec<u8> {
    let out = Command::new("tar").arg("-C").arg(dir).args(["-cf", "-"]).args(args).arg(".").output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    out.stdout
}

/// Everything a walk sees, with hard links and content.
fn tree(root: &Root) -> BTreeMap<PathBuf, String> {
    fn walk(root: &Root, dir: &Path, links: &mut BTreeMap<u64, PathBuf>, all: &mut BTreeMap<PathBuf, String>) {
        let fd = root.open_dir(dir).unwrap();
        for name in names_in(fd.as_fd()).unwrap() {
            let path = dir.join(&name);
            let inode = inode_at(fd.as_fd(), &name).unwrap();
            let mut text = format!("{:?}", inode.meta);
            if inode.meta.kind == FileKind::Directory {
                walk(root, &path, links, all);
            } else {
                text += &format!(" = {:?}", links.entry(inode.ino).or_insert_with(|| path.clone()));
            }
            if let FileKind::File { .. } = inode.meta.kind {
                let content = std::io::read_to_string(root.open_file(&path).unwrap());
                text += &format!(" {}", Digest::of(content.unwrap_or_else(|_| "binary".into())));
            }
            all.insert(path, text);
        }
    }
    let mut all = BTreeMap::new();
    walk(root, Path::new(""), &mut BTreeMap::new(), &mut all);
    all
}

/// An overlay of `layers`, topmost first, that no mount table knows: it goes when the root is dropped.
fn overlay(layers: &[&Bench]) -> Root {
    let mut lowers: Vec<_> = layers.iter().map(|l| l.at("")).collect();
    // One lower layer alone is refused.
    lowers.push(layers[0].dir.path().join("empty"));
    fs::create_dir_all(&lowers[layers.len()]).unwrap();
    let fs = mount::fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).unwrap();
    for lower in &lowers {
        mount::fsconfig_set_string(fs.as_fd(), "lowerdir+", lower).unwrap();
    }
    mount::fsconfig_create(fs.as_fd()).unwrap();
    let fd = mount::fsmount(fs.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty()).unwrap();
    Root::from_fd(fd)
}

fn source_tree() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let at = |p: &str| dir.path().join(p);
    fs::create_dir_all(at("etc/deep")).unwrap();
    fs::write(at("etc/passwd"), "root:x:0:0\n").unwrap();
    fs::write(at("etc/empty"), "").unwrap();
    fs::write(at("etc/block"), vec![7; 512]).unwrap();
    fs::write(at("etc/big"), vec![9; 700_001]).unwrap();
    fs::hard_link(at("etc/passwd"), at("etc/passwd-")).unwrap();
    symlink("../etc/passwd", at("etc/link")).unwrap();
    symlink("/dangling", at("etc/abs")).unwrap();
    rustix::fs::mknodat(CWD, at("null"), FileType::CharacterDevice, Mode::from_raw_mode(0o600), 0x103).unwrap();
    rustix::fs::mknodat(CWD, at("loop"), FileType::BlockDevice, Mode::from_raw_mode(0o600), 0x700).unwrap();
    rustix::fs::mknodat(CWD, at("pipe"), FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    std::os::unix::fs::chown(at("etc/block"), Some(1000), Some(2000)).unwrap();
    std::os::unix::fs::lchown(at("etc/link"), Some(5), Some(6)).unwrap();
    fs::set_permissions(at("etc/block"), std::os::unix::fs::PermissionsExt::from_mode(0o6755)).unwrap();
    fs::set_permissions(at("etc/deep"), std::os::unix::fs::PermissionsExt::from_mode(0o1777)).unwrap();
    let touch = Command::new("touch").args(["-h", "-d", "2001-02-03 04:05:06"]).arg(at("etc/link")).status().unwrap();
    assert!(touch.success());
    let touch = Command::new("touch").args(["-d", "1969-02-03 04:05:06.000000007Z"]).arg(at("etc")).status().unwrap();
    assert!(touch.success());
    dir
}

#[test]
fn tars_of_gnu_tar_in_every_format_come_out_as_they_went_in() {
    for format in ["v7", "ustar", "oldgnu", "gnu", "pax"] {
        let source = source_tree();
        if !matches!(format, "v7" | "ustar") {
            let long = format!("{}/{}", "d".repeat(200), "f".repeat(200));
            fs::create_dir_all(source.path().join(&long).parent().unwrap()).unwrap();
            fs::write(source.path().join(&long), "long").unwrap();
            symlink("t".repeat(300), source.path().join("longlink")).unwrap();
            fs::write(source.path().join(<OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(b"non\xffutf8\n")), "n")
                .unwrap();
        }
        if format == "v7" {
            for special in ["null", "loop", "pipe"] {
                fs::remove_file(source.path().join(special)).unwrap();
            }
        }
        let whole_seconds = if format == "ustar" || format == "v7" { &["--mtime=@77"][..] } else { &[] };
        let tar = gnu_tar(source.path(), &[&[&*format!("--format={format}")][..], whole_seconds].concat());
        let bench = there_and_back(&tar, OVERLAY);
        let (expected, found) = (tree(&Root::open(source.path()).unwrap()), tree(&bench.root()));
        assert_eq!(expected.keys().collect::<Vec<_>>(), found.keys().collect::<Vec<_>>(), "{format}");
        if format == "pax" {
            assert_eq!(expected, found);
        }
        let block = bench.inode("etc/block").meta;
        assert_eq!((block.mode, block.uid, block.gid), (0o6755, 1000, 2000), "{format}");
        assert_eq!(bench.inode("etc/passwd").ino, bench.inode("etc/passwd-").ino);
        if whole_seconds.is_empty() {
            let nanos = if format == "pax" { 7 } else { 0 };
            assert_eq!(bench.inode("etc").meta.mtime, Timestamp { secs: -28_670_094, nanos }, "{format}");
        }
    }
}

#[test]
fn sparse_files_of_every_format_keep_their_holes() {
    let source = tempfile::tempdir().unwrap();
    let file = fs::File::create(source.path().join("sparse")).unwrap();
    use std::os::unix::fs::FileExt;
    // More runs than an old header and one extension block hold.
    for run in 0..40u64 {
        file.write_all_at(&[run as u8 + 1; 4096], run * 1_000_000 / 4096 * 4096 + 1_048_576).unwrap();
    }
    file.set_len(1 << 26).unwrap();
    fs::File::create(source.path().join("hole")).unwrap().set_len(5_000_000).unwrap();
    for format in [
        &["--format=gnu"][..],
        &["--format=oldgnu"],
        &["--format=pax", "--sparse-version=0.0"],
        &["--format=pax", "--sparse-version=0.1"],
        &["--format=pax", "--sparse-version=1.0"],
    ] {
        let tar = gnu_tar(source.path(), &[&["--sparse"], format].concat());
        assert!(tar.len() < 1 << 20, "{format:?} is not sparse");
        let bench = there_and_back(&tar, OVERLAY);
        assert!(fs::read(bench.at("sparse")).unwrap() == fs::read(source.path().join("sparse")).unwrap(), "{format:?}");
        assert!(fs::metadata(bench.at("sparse")).unwrap().blocks() * 512 < 1 << 20, "{format:?}");
        let hole = fs::metadata(bench.at("hole")).unwrap();
        assert_eq!((hole.len(), hole.blocks()), (5_000_000, 0), "{format:?}");
    }
}

#[test]
fn attributes_capabilities_and_acls_come_back() {
    let source = tempfile::tempdir().unwrap();
    let at = |p: &str| source.path().join(p);
    fs::create_dir(at("dir")).unwrap();
    fs::write(at("dir/file"), "x").unwrap();
    symlink("file", at("dir/link")).unwrap();
    xattr::set(at("dir/file"), "user.b=%in", b"\0\n=\xff").unwrap();
    xattr::set(at("dir/link"), "trusted.on.link", b"l").unwrap();
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    xattr::set(at("dir/file"), "security.capability", &capability).unwrap();
    for (path, acl) in [("dir", "d:u:5:rwx"), ("dir/file", "u:6:r")] {
        assert!(Command::new("setfacl").args(["-m", acl]).arg(at(path)).status().unwrap().success());
    }
    let tar = gnu_tar(source.path(), &["--format=pax", "--xattrs", "--xattrs-include=*"]);
    for whiteouts in [OVERLAY, Whiteouts::Merged] {
        let bench = there_and_back(&tar, whiteouts);
        assert_eq!(tree(&bench.root()), tree(&Root::open(source.path()).unwrap()));
        assert_eq!(bench.inode("dir/file").meta.xattrs.len(), 3);
    }
}

#[test]
fn tars_of_pythons_tarfile_come_out_as_they_went_in() {
    let script = "
import io, sys, tarfile
for format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w', format=format, pax_headers={'comment': 'global'} ) as t:
        for name, mtime, uid in (('a', -5.5, 7), ('b/' + 'n' * 150, 2**40, 2**31), ('c', 0.25, 0)):
            i = tarfile.TarInfo(name); i.mtime = mtime if format == tarfile.PAX_FORMAT else int(mtime); i.uid = uid; i.size = 3
            t.addfile(i, io.BytesIO(b'abc'))
    open(sys.argv[1] + '/' + str(format), 'wb').write(out.getvalue())
";
    let dir = tempfile::tempdir().unwrap();
    assert!(Command::new("python3").args(["-c", script]).arg(dir.path()).status().unwrap().success());
    let mut tars = 0;
    for file in fs::read_dir(dir.path()).unwrap() {
        let bench = there_and_back(&fs::read(file.unwrap().path()).unwrap(), OVERLAY);
        let (a, b) = (bench.inode("a").meta, bench.inode(&format!("b/{}", "n".repeat(150))).meta);
        assert!([(-6, 500_000_000), (-5, 0)].contains(&(a.mtime.secs, a.mtime.nanos)), "{:?}", a.mtime);
        assert_eq!((a.uid, b.uid), (7, 1 << 31));
        assert!(b.mtime.secs > 1 << 33);
        tars += 1;
    }
    assert_eq!(tars, 2);
}

#[test]
fn bytes_after_the_end_and_a_missing_end_are_kept() {
    let tar = Tar::default().file("a", "x");
    there_and_back(&tar.0, OVERLAY);
    there_and_back(&[&tar.0[..], &[0; 512]].concat(), OVERLAY);
    there_and_back(&[tar.end(), vec![0; 9000], b"garbage".to_vec()].concat(), OVERLAY);
    there_and_back(b"", OVERLAY);
}

#[test]
fn a_link_or_directory_with_a_size_has_no_data_and_unknown_headers_do() {
    let mut link = Tar::header(b'1', b"link", b"file", 3);
    link.set_cksum();
    let tar = Tar::default().file("file", "abc").raw(&link, b"");
    let tar = tar
        .entry(b'g', "global", "", b"16 path=replaced\n")
        .entry(b'V', "label", "", b"volume")
        .file("last", "z")
        .end();
    let bench = there_and_back(&tar, OVERLAY);
    assert_eq!(bench.inode("link").nlink, 2);
    assert_eq!(fs::read(bench.at("last")).unwrap(), b"z");
    assert!(!bench.at("replaced").exists());
}

#[test]
fn extreme_times_do_not_fail() {
    for mtime in ["9223372036854775807", "-9223372036854775807.5", "99999999999.999999999"] {
        let tar = Tar::default().pax(&[("mtime", mtime.as_bytes())]).file("f", "").end();
        let bench = there_and_back(&tar, OVERLAY);
        bench.inode("f");
    }
    let mut header = Tar::header(b'0', b"old", b"", 0);
    header.as_old_mut().mtime = [0xff; 12];
    header.set_cksum();
    let bench = there_and_back(&Tar::default().raw(&header, b"").end(), OVERLAY);
    assert_eq!(bench.inode("old").meta.mtime, Timestamp { secs: -1, nanos: 0 });
}

#[test]
fn hostile_tars_are_refused_by_their_entry() {
    let device = |kind: u8| {
        let mut header = Tar::header(kind, b"dev", b"", 0);
        header.set_device_major(0).unwrap();
        header.set_device_minor(0).unwrap();
        header.set_cksum();
        Tar::default().raw(&header, b"").end()
    };
    let sparse = |map: &[u8]| {
        let tar = Tar::default().pax(&[("GNU.sparse.size", b"100"), ("GNU.sparse.map", map)]);
        tar.file("sparse", "12345678").end()
    };
    let big = |header: u8| Tar::default().raw(&Tar::header(header, b"long", b"", 2 << 20), b"").end();
    let mut huge = Tar::header(b'0', b"huge", b"", 0);
    huge.as_old_mut().size = [0x80, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
    huge.set_cksum();
    let mut truncated = Tar::default().file("cut", &"x".repeat(2000)).0;
    truncated.truncate(1500);
    for (tar, entry, reason) in [
        (Tar::default().file("../up", "x").end(), "../up", "leads out of the layer"),
        (Tar::default().file("a/../../up", "x").end(), "a/../../up", "leads out of the layer"),
        (Tar::default().file("f", "x").link("l", "../sentinel").end(), "\"l\"", "leads out of the layer"),
        (Tar::default().link("l", "none").end(), "\"l\"", "not in this layer"),
        (Tar::default().file(".wh.gone", "").link("l", "gone").end(), "\"l\"", "not in this layer"),
        (Tar::default().dir("d").link("l", "d").end(), "\"l\"", "is a directory"),
        (Tar::default().file(".wh.", "").end(), ".wh.", "without a name"),
        (Tar::default().file("d/.wh..", "").end(), ".wh..", "without a name"),
        (Tar::default().file("f", "x").file("f/g", "x").end(), "f/g", "no directory"),
        (Tar::default().symlink("s", "s").file("s/x", "").end(), "s/x", "too many symlinks"),
        (Tar::default().symlink("s", "").end(), "\"s\"", "link target"),
        (device(b'3'), "dev", "0/0"),
        (sparse(b"0,4,2,4"), "sparse", "out of order"),
        (sparse(b"0,4,98,4"), "sparse", "beyond the file's end"),
        (sparse(b"0,4,9223372036854775807,4"), "sparse", "beyond the file's end"),
        (sparse(b"0,4"), "sparse", "4 bytes where 8"),
        (sparse(b"0,4,8"), "sparse", "without a length"),
        (sparse(b"0,x"), "sparse", "no number"),
        (big(b'x'), "long", "more than 1048576"),
        (big(b'L'), "long", "more than 4096"),
        (Tar::default().raw(&huge, b"").end(), "huge", "its size is"),
        (truncated, "cut", "truncated"),
        (Tar::default().pax(&[("SCHILY.xattr.user.x", &[1; 70_000])]).file("f", "").end(), "pax", "64 KiB"),
        (Tar::default().pax(&[("uid", b"4294967295")]).file("f", "").end(), "pax", "uid is 4294967295"),
        (Tar::default().pax(&[("path", b"a\0b")]).file("f", "").end(), "a\\0b", "NUL"),
        (Tar::default().pax(&[("path", b"x")]).end(), "", "after an extended header"),
        (vec![b'x'; 512], "", "wrong checksum"),
        (vec![0; 100], "", "truncated"),
        ([vec![0; 512], vec![1; 512]].concat(), "", "lone block"),
    ] {
        let e = refused(&tar);
        let text = e.to_string();
        assert_eq!(e.kind(), ErrorKind::Corrupt, "{text}");
        assert!(text.contains(entry) && text.contains(reason), "{text:?} names not {entry:?} and {reason:?}");
    }
    let e = refused(&Tar::default().entry(b'M', "multi", "", b"").end());
    assert_eq!(
        (e.kind(), e.to_string().as_str()),
        (ErrorKind::Unsupported, "entry \"multi\": its type 'M' is unknown")
    );
    assert_eq!(device(b'4').len(), 1536);
    there_and_back(&device(b'4'), OVERLAY);
}

#[test]
fn a_content_larger_than_the_free_space_fails_at_once() {
    let mut header = Tar::header(b'0', b"big", b"", 0);
    header.set_size(1 << 50);
    header.set_cksum();
    let e = refused(&Tar::default().raw(&header, b"").end());
    assert_eq!(e.kind(), ErrorKind::OutOfSpace, "{e}");
}

#[test]
fn nothing_is_written_through_symlinks_or_hard_links() {
    let tar = Tar::default()
        .symlink("out", "../sentinel")
        .file("out", "not through the link")
        .symlink("dir", "..")
        .file("dir/sentinel", "inside")
        .file("one", "first")
        .link("two", "one")
        .file("two", "second")
        .symlink("abs", "/")
        .file("abs/three", "3")
        .symlink("l", "one")
        .link("m", "l")
        .end();
    let bench = there_and_back(&tar, OVERLAY);
    assert_eq!(fs::read(bench.at("one")).unwrap(), b"first");
    assert_eq!(fs::read(bench.at("two")).unwrap(), b"second");
    assert_eq!(fs::read(bench.at("sentinel")).unwrap(), b"inside");
    assert_eq!(fs::read(bench.at("three")).unwrap(), b"3");
    assert_eq!(fs::read_link(bench.at("m")).unwrap(), Path::new("one"));
}

#[test]
fn whatever_is_overridden_in_the_same_tar_comes_back() {
    let tar = Tar::default()
        .file("f", "one")
        .file("f", "two")
        .link("g", "f")
        .file("f", "three")
        .dir("d")
        .file("d/x/y", "deep")
        .link("d/x/y", "d/x/y")
        .file("d", "now a file")
        .dir("d")
        .file("d/x/y", "deep again")
        .symlink("s", "d")
        .file("s/t", "through s")
        .dir("s")
        .file("s/t", "in s")
        .link("d", "d/t")
        .file(".wh.with-content", "content of a whiteout")
        .end();
    for whiteouts in [OVERLAY, Whiteouts::Merged] {
        let bench = there_and_back(&tar, whiteouts);
        assert_eq!(fs::read(bench.at("g")).unwrap(), b"two");
        assert_eq!(fs::read(bench.at("d")).unwrap(), b"through s");
        assert_eq!(fs::read(bench.at("s/t")).unwrap(), b"in s");
    }
}

#[test]
fn overridden_content_moves_across_filesystems_with_its_holes() {
    let tar = Tar::default().pax(&[("GNU.sparse.size", b"1099511627776"), ("GNU.sparse.map", b"1099511627772,4")]);
    let tar = tar.file("f", "tail").file("f", "two").end();
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let record = tempfile::tempdir().unwrap();
    assert_ne!(fs::metadata(dir.path()).unwrap().dev(), fs::metadata(record.path()).unwrap().dev());
    let (root, record) = (Root::open(dir.path()).unwrap(), record.path().join("record"));
    unpack(&mut &tar[..], &root, OVERLAY, Some(&record)).unwrap();
    let mut out = Vec::new();
    repack(&record, &root, DiffId(Digest::of(&tar)), &mut out).unwrap();
    assert!(out == tar);
}

#[test]
fn a_layer_changed_on_disk_does_not_come_back() {
    let tar = Tar::default().file("f", "content").end();
    type Damage<'a> = &'a dyn Fn(&Bench);
    let damages: [(&str, Damage); 7] = [
        ("changed", &|b| fs::write(b.at("f"), "CONTENT").unwrap()),
        ("shorter", &|b| fs::write(b.at("f"), "con").unwrap()),
        ("gone", &|b| fs::remove_file(b.at("f")).unwrap()),
        ("a directory", &|b| {
            fs::remove_file(b.at("f")).unwrap();
            fs::create_dir(b.at("f")).unwrap();
        }),
        ("a symlink out", &|b| {
            fs::remove_file(b.at("f")).unwrap();
            symlink("/etc/passwd", b.at("f")).unwrap();
        }),
        ("a truncated record", &|b| {
            let stream = b.record().join("stream");
            let len = fs::metadata(&stream).unwrap().len();
            fs::File::options().write(true).open(stream).unwrap().set_len(len - 9).unwrap();
        }),
        ("no record", &|b| fs::write(b.record().join("stream"), "").unwrap()),
    ];
    for (what, damage) in damages {
        let bench = there_and_back(&tar, OVERLAY);
        damage(&bench);
        let e = bench.repack(&tar).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Corrupt, "{what}: {e}");
    }
}

#[test]
fn a_record_of_version_1_can_be_read_and_a_later_one_says_so() {
    let bench = Bench::new();
    fs::write(bench.at("file"), "0123456789").unwrap();
    fs::create_dir_all(bench.record().join("moved")).unwrap();
    fs::write(bench.record().join("moved/0"), "old").unwrap();
    let content = |segments: &[(u64, u64)]| {
        let mut bytes = [&b"\x02\x04\0file"[..], &(segments.len() as u32).to_le_bytes()].concat();
        segments.iter().for_each(|(o, l)| bytes.extend_from_slice(&[o.to_le_bytes(), l.to_le_bytes()].concat()));
        bytes
    };
    let tar = b"head|old|12789tail";
    let mut stream = b"gdrecord\x01".to_vec();
    stream.extend_from_slice(b"\x01\x05\0\0\0head|");
    stream.extend_from_slice(&content(&[(0, 3)]));
    stream.extend_from_slice(b"\x01\x01\0\0\0|");
    stream.extend_from_slice(&content(&[(1, 2), (7, 3)]));
    stream.extend_from_slice(b"\x01\x04\0\0\0tail\0\x12\0\0\0\0\0\0\0");
    fs::write(bench.record().join("stream"), zstd::encode_all(&stream[..], 3).unwrap()).unwrap();
    fs::write(bench.record().join("moves"), b"gdmoved\0\x01\x01\0\0\0\0\0\0\0\x04\0file").unwrap();
    assert_eq!(bench.repack(tar).unwrap(), tar);
    stream[8] = 2;
    fs::write(bench.record().join("stream"), zstd::encode_all(&stream[..], 3).unwrap()).unwrap();
    assert_eq!(bench.repack(tar).unwrap_err().kind(), ErrorKind::Unsupported);
}

#[test]
fn overlayfs_takes_no_orders_from_a_layer_tar() {
    let tar = Tar::default()
        .pax(&[("SCHILY.xattr.trusted.overlay.opaque", b"y"), ("SCHILY.xattr.trusted.overlay.redirect", b"/secret")])
        .dir("d")
        .pax(&[("SCHILY.xattr.trusted.overlay.whiteout", b"y"), ("SCHILY.xattr.user.overlay.x", b"z")])
        .file("f", "")
        .end();
    let top = there_and_back(&tar, OVERLAY);
    let below = there_and_back(&Tar::default().file("d/seen", "x").file("secret/s", "x").end(), OVERLAY);
    let merged = overlay(&[&top, &below]);
    assert!(merged.inode(Path::new("d/seen")).unwrap().is_some());
    assert!(merged.inode(Path::new("d/s")).unwrap().is_none());
    let d = merged.inode(Path::new("d")).unwrap().unwrap().meta.xattrs;
    assert_eq!(d[OsStr::new("trusted.overlay.opaque")], b"y");
    assert_eq!(d[OsStr::new("trusted.overlay.redirect")], b"/secret");
    let f = merged.inode(Path::new("f")).unwrap().unwrap().meta.xattrs;
    assert_eq!(f[OsStr::new("trusted.overlay.whiteout")], b"y");
    assert_eq!(f[OsStr::new("user.overlay.x")], b"z");
    let refusing = Whiteouts::Overlay { xattrs: OverlayXattrs::Trusted, escape: EscapeXattrs::None };
    let e = Bench::new().unpack(&tar, refusing).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Unsupported, "{e}");
}

#[test]
fn whiteouts_hide_lower_layers_only_whatever_the_order() {
    let lower =
        Tar::default().file("d/low", "l").file("f", "l").file("e/low", "l").file("g/low", "l").file("h/low", "l").end();
    for upper in [
        Tar::default().dir("d").file("d/up", "u").file(".wh.d", ""),
        Tar::default().file(".wh.d", "").dir("d").file("d/up", "u"),
        Tar::default().file(".wh.d", "").file("d/up", "u"),
        Tar::default().file("d/up", "u").file("d/.wh..wh..opq", ""),
        Tar::default().file("d/.wh..wh..opq", "").file("d/up", "u"),
        Tar::default().file("d", "file").dir("d").file("d/up", "u"),
    ] {
        let upper = upper.file("f", "u").file(".wh.f", "").file(".wh.e", "").file("g", "u").file("h/.wh.low", "").end();
        let (below, top) = (there_and_back(&lower, OVERLAY), there_and_back(&upper, OVERLAY));
        let merged = Bench::new();
        unpack(&mut &lower[..], &merged.root(), Whiteouts::Merged, None).unwrap();
        merged.unpack(&upper, Whiteouts::Merged).unwrap();
        assert!(merged.repack(&upper).unwrap() == upper);
        for root in [overlay(&[&top, &below]), merged.root()] {
            let paths: Vec<_> = tree(&root).into_keys().collect();
            assert_eq!(paths, ["d", "d/up", "f", "g", "h"].map(PathBuf::from));
        }
    }
}

#[test]
fn a_deletion_of_what_was_never_there_leaves_no_ghost() {
    let top = there_and_back(
        &Tar::default().file("new/.wh.gone", "").file("o/.wh.x", "").file("o/.wh..wh..opq", "").end(),
        OVERLAY,
    );
    let below = there_and_back(&Tar::default().file("o/low", "").end(), OVERLAY);
    let root = overlay(&[&top, &below]);
    for dir in ["new", "o"] {
        assert!(names_in(root.open_dir(Path::new(dir)).unwrap().as_fd()).unwrap().is_empty(), "{dir}");
    }
}

#[test]
fn an_opaque_root_hides_everything_below_once_its_parents_are_left_out() {
    let lower = Tar::default().file("low", "l").end();
    let upper = Tar::default().file("up", "u").file(".wh..wh..opq", "").end();
    let merged = Bench::new();
    unpack(&mut &lower[..], &merged.root(), Whiteouts::Merged, None).unwrap();
    merged.unpack(&upper, Whiteouts::Merged).unwrap();
    assert_eq!(tree(&merged.root()).into_keys().collect::<Vec<_>>(), [Path::new("up")]);
    let (below, top) = (there_and_back(&lower, OVERLAY), there_and_back(&upper, OVERLAY));
    let opaque = &top.root().inode(Path::new("")).unwrap().unwrap().meta.xattrs[OsStr::new("trusted.overlay.opaque")];
    assert_eq!(opaque, b"y");
    assert!(
        overlay(&[&top, &below]).inode(Path::new("low")).unwrap().is_some(),
        "overlayfs heeds it now: say so in `Whiteouts`"
    );
    assert_eq!(tree(&overlay(&[&top])).into_keys().collect::<Vec<_>>(), [Path::new("up")]);
}

mod random {
    use super::*;
    use proptest::{prelude::*, sample::select};

    /// One entry of a random tar. Few names, so that entries meet.
    #[derive(Debug, Clone)]
    enum Op {
        File(String, String),
        Dir(String, u32),
        Symlink(String, String),
        Link(String, String),
        Fifo(String),
        Whiteout(String),
        Opaque(String),
        Sparse(String, u64),
        Time(String),
        Long(String),
    }

    fn path() -> impl Strategy<Value = String> {
        prop::collection::vec(select(&["a", "b", "c", "d"][..]), 1..4).prop_map(|parts| parts.join("/"))
    }

    fn op(symlinks: bool) -> impl Strategy<Value = Op> {
        let target = select(&["a", "b", "/", "..", "../..", "/c/d", "b/../a", "none"][..]).prop_map(str::to_owned);
        prop_oneof![
            8 => (path(), "[a-z]{0,600}").prop_map(|(p, c)| Op::File(p, c)),
            6 => (path(), 0..0o10000u32).prop_map(|(p, m)| Op::Dir(p, m)),
            if symlinks { 4 } else { 0 } => (path(), target).prop_map(|(p, t)| Op::Symlink(p, t)),
            4 => (path(), path()).prop_map(|(p, t)| Op::Link(p, t)),
            1 => path().prop_map(Op::Fifo),
            4 => path().prop_map(Op::Whiteout),
            2 => path().prop_map(Op::Opaque),
            1 => (path(), 0..9u64).prop_map(|(p, at)| Op::Sparse(p, at * 5000)),
            1 => "-?[0-9]{1,18}([.][0-9]{1,9})?".prop_map(Op::Time),
            1 => "[a-z]{101,250}".prop_map(Op::Long),
        ]
    }

    fn path_of(op: &Op) -> &str {
        match op {
            Op::File(path, _) | Op::Dir(path, _) | Op::Symlink(path, _) | Op::Link(path, _) | Op::Fifo(path) => path,
            Op::Whiteout(path) | Op::Opaque(path) | Op::Sparse(path, _) => path,
            Op::Time(_) | Op::Long(_) => "",
        }
    }

    /// With an entry for every directory before what is in it, as layers have them, and for what links name.
    fn build_with_parents(ops: &[Op]) -> Vec<u8> {
        let mut all = Vec::new();
        let mut push = |op: Op| {
            let path = path_of(&op).to_owned();
            let dirs = path.match_indices('/').map(|(at, _)| &path[..at]);
            all.extend(dirs.chain(matches!(op, Op::Opaque(_)).then_some(&*path)).map(|d| Op::Dir(d.to_owned(), 0o755)));
            all.push(op);
        };
        for op in ops {
            if let Op::Link(_, target) = op {
                push(Op::File(target.clone(), "linked".to_owned()));
            }
            push(op.clone());
        }
        build(&all)
    }

    fn build(ops: &[Op]) -> Vec<u8> {
        let mut tar = Tar::default();
        for op in ops {
            tar = match op {
                Op::File(path, content) => tar.file(path, content),
                Op::Dir(path, mode) => {
                    let mut header = Tar::header(b'5', path.as_bytes(), b"", 0);
                    header.set_mode(*mode);
                    header.set_cksum();
                    tar.raw(&header, b"")
                }
                Op::Symlink(path, target) => tar.symlink(path, target),
                Op::Link(path, target) => tar.link(path, target),
                Op::Fifo(path) => tar.entry(b'6', path, "", b""),
                Op::Whiteout(path) => {
                    let (dir, name) = path.rsplit_once('/').unwrap_or((".", path));
                    tar.file(&format!("{dir}/.wh.{name}"), "")
                }
                Op::Opaque(path) => tar.file(&format!("{path}/.wh..wh..opq"), ""),
                Op::Sparse(path, at) => {
                    let (size, map) = ((at + 5000).to_string(), format!("{at},4,{},0", at + 5000));
                    tar.pax(&[("GNU.sparse.size", size.as_bytes()), ("GNU.sparse.map", map.as_bytes())])
                        .file(path, "data")
                }
                Op::Time(time) => tar.pax(&[("mtime", time.as_bytes())]).file("time", "t"),
                Op::Long(name) => tar.entry(b'L', "././@LongLink", "", name.as_bytes()).file("short", "long"),
            };
        }
        tar.end()
    }

    /// The tree without times, which differ where a directory has no entry of its own.
    fn timeless(root: &Root) -> BTreeMap<PathBuf, String> {
        let mut all = tree(root);
        for text in all.values_mut() {
            let (before, after) = text.split_once("mtime").unwrap();
            *text = format!("{before}{}", after.split_once('}').unwrap().1);
        }
        all
    }

    proptest! {
        // Each syncs a record; a few thousand were run on tmpfs.
        #![proptest_config(ProptestConfig::with_cases(100))]


        #[test]
        fn any_tar_comes_back_or_is_corrupt(ops in prop::collection::vec(op(true), 1..25)) {
            let tar = build(&ops);
            for whiteouts in [OVERLAY, Whiteouts::Merged] {
                let bench = Bench::new();
                match bench.unpack(&tar, whiteouts) {
                    Ok(_) => prop_assert!(bench.repack(&tar).unwrap() == tar),
                    Err(e) => prop_assert_eq!(e.kind(), ErrorKind::Corrupt, "{}", e),
                }
            }
        }

        /// Cut or bent at any place a tar may be refused, and does nothing worse.
        #[test]
        fn a_damaged_tar_comes_back_or_is_refused(
            ops in prop::collection::vec(op(true), 1..8), at in any::<prop::sample::Index>(), byte in any::<u8>(), cut: bool,
        ) {
            let mut tar = build(&ops);
            let at = at.index(tar.len());
            tar[at] = byte;
            tar.truncate(if cut { at } else { tar.len() });
            let bench = Bench::new();
            if bench.unpack(&tar, OVERLAY).is_ok() {
                prop_assert!(bench.repack(&tar).unwrap() == tar);
            }
        }

        /// What overlayfs shows of two layers is what applying one on the other gives. Without symlinks, through which
        /// a layer reaches into the ones below in a merged tree only.
        #[test]
        fn overlaid_and_merged_layers_are_the_same_tree(
            lower in prop::collection::vec(op(false), 1..15), upper in prop::collection::vec(op(false), 1..15),
        ) {
            let (lower, upper) = (build_with_parents(&lower), build_with_parents(&upper));
            let (below, top, merged) = (Bench::new(), Bench::new(), Bench::new());
            prop_assume!(below.unpack(&lower, OVERLAY).is_ok() && top.unpack(&upper, OVERLAY).is_ok());
            unpack(&mut &lower[..], &merged.root(), Whiteouts::Merged, None).unwrap();
            merged.unpack(&upper, Whiteouts::Merged).unwrap();
            prop_assert_eq!(timeless(&overlay(&[&top, &below])), timeless(&merged.root()));
        }
    }
}

/// A file put into a directory of mode 0700 that only a lower layer describes opened that directory to everybody.
#[test]
fn directories_that_a_layer_only_implies_are_as_the_layers_below_have_them() {
    let lower = Bench::new();
    fs::create_dir_all(lower.at("secret/deep")).unwrap();
    fs::create_dir(lower.at("described")).unwrap();
    fs::write(lower.at("file"), "").unwrap();
    std::os::unix::fs::chown(lower.at("secret"), Some(1000), Some(1001)).unwrap();
    xattr::set(lower.at("secret/deep"), "user.kept", b"1").unwrap();
    for (path, mode) in [("secret/deep", 0o711), ("secret", 0o700), ("described", 0o700), ("", 0o750)] {
        rustix::fs::chmod(lower.at(path), Mode::from(mode)).unwrap();
        let old = rustix::fs::Timespec { tv_sec: 1_000_000, tv_nsec: 5 };
        let times = rustix::fs::Timestamps { last_access: old, last_modification: old };
        rustix::fs::utimensat(CWD, lower.at(path), &times, rustix::fs::AtFlags::empty()).unwrap();
    }
    let upper = Bench::new();
    let tar = Tar::default().file("secret/deep/new", "x").dir("described").file("described/new", "y");
    let tar = tar.file("file/new", "z").file("fresh/new", "f").end();
    let unpacked = upper.unpack(&tar, OVERLAY).unwrap();
    let implied = ["", "file", "fresh", "secret", "secret/deep"].map(PathBuf::from);
    assert_eq!(unpacked.implied, implied);
    inherit(&upper.root(), OVERLAY, &lower.root(), &unpacked.implied).unwrap();
    for path in ["", "secret", "secret/deep"] {
        assert_eq!(upper.inode(path).meta, lower.inode(path).meta, "{path:?}");
    }
    assert_eq!(upper.inode("described").meta.mode, 0o640);
    assert_eq!((upper.inode("file").meta.mode, upper.inode("fresh").meta.mode), (0o755, 0o755));
    assert!(upper.repack(&tar).unwrap() == tar);
}

/// `umoci insert` writes layers like this.
#[test]
fn a_tar_without_end_marker_and_last_padding_comes_back() {
    let whole = Tar::default().file("a", "first").file("b", "abc").0;
    let bench = there_and_back(&whole[..3 * 512 + 3], OVERLAY);
    assert_eq!(fs::read(bench.at("b")).unwrap(), b"abc");
}

/// A process in a live container can put a symlink where `cp` has just made a directory.
#[test]
fn modes_are_never_set_through_a_symlink() {
    let bench = Bench::new();
    fs::write(bench.at("target"), "").unwrap();
    let before = bench.inode("target").meta.mode;
    symlink("target", bench.at("link")).unwrap();
    let dir = bench.root();
    fs_sink::chmod(dir.as_fd(), OsStr::new("link"), 0o4777).unwrap_err();
    assert_eq!(bench.inode("target").meta.mode, before);
    fs_sink::chmod(dir.as_fd(), OsStr::new("target"), 0o4711).unwrap();
    assert_eq!(bench.inode("target").meta.mode, 0o4711);
}

#[test]
fn what_goes_to_the_host_leads_through_no_symlink_of_its_own() {
    let escape = Tar::default().dir("top").symlink("top/a", "..").file("top/a/file", "x").end();
    let through_link = Tar::default().dir("top").symlink("top/a", "..").link("top/b", "top/a/secret").end();
    for tar in [escape, through_link] {
        let bench = Bench::new();
        fs::write(bench.at("secret"), "").unwrap();
        let e = extract(&mut &tar[..], &bench.root(), false, &mut |_| {}).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Corrupt, "{e}");
        assert_eq!(names_in(bench.root().as_fd()).unwrap(), ["secret", "top"]);
        assert_eq!(fs::metadata(bench.at("secret")).unwrap().nlink(), 1);
    }
}

/// `cp` of a file over a directory of that name took the whole tree away.
#[test]
fn copying_never_replaces_a_directory_and_replaces_files_whole() {
    let bench = Bench::new();
    fs::create_dir_all(bench.at("dir/important")).unwrap();
    fs::write(bench.at("dir/important/f"), "kept").unwrap();
    fs::write(bench.at("file"), "old").unwrap();
    let copy = |tar: &[u8]| extract(&mut &tar[..], &bench.root(), true, &mut |_| {});
    for tar in [Tar::default().file("dir", "x").end(), Tar::default().symlink("dir", "x").end()] {
        assert_eq!(copy(&tar).unwrap_err().kind(), ErrorKind::InvalidInput);
    }
    assert_eq!(copy(&Tar::default().dir("file").end()).unwrap_err().kind(), ErrorKind::InvalidInput);
    let whole = Tar::default().file("file", "new and longer").end();
    assert_eq!(copy(&whole[..520]).unwrap_err().kind(), ErrorKind::Corrupt);
    assert_eq!(fs::read(bench.at("file")).unwrap(), b"old");
    copy(&whole).unwrap();
    assert_eq!(fs::read(bench.at("file")).unwrap(), b"new and longer");
    assert_eq!(fs::read(bench.at("dir/important/f")).unwrap(), b"kept");
    assert_eq!(names_in(bench.root().as_fd()).unwrap(), ["dir", "file"]);
}
