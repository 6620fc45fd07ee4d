//! Tars that are damaged, or reach for what is outside of the layer.

use super::*;

fn refused(tar: &[u8]) -> Error {
    Bench::new().unpack(tar, OVERLAY).unwrap_err()
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
