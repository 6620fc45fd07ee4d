//! The bytes that went in come out, whoever wrote the tar and whatever is in it.

use super::*;
use rustix::fs::FileType;
use std::process::Command;

fn gnu_tar(dir: &Path, args: &[&str]) -> Vec<u8> {
    let out = Command::new("tar").arg("-C").arg(dir).args(["-cf", "-"]).args(args).arg(".").output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    out.stdout
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

/// `umoci insert` writes layers like this.
#[test]
fn a_tar_without_end_marker_and_last_padding_comes_back() {
    let whole = Tar::default().file("a", "first").file("b", "abc").0;
    let bench = there_and_back(&whole[..3 * 512 + 3], OVERLAY);
    assert_eq!(fs::read(bench.at("b")).unwrap(), b"abc");
}
