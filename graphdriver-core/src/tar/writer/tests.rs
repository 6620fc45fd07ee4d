use super::*;

fn file(size: u64) -> Metadata {
    let mtime = Timestamp { secs: 1, nanos: 0 };
    Metadata { kind: FileKind::File { size }, mode: 0o644, uid: 1, gid: 2, mtime, xattrs: BTreeMap::new() }
}

fn content(size: u64, segments: &[(u64, u64)], data: &'static [u8]) -> Content<'static> {
    let segments = segments.iter().map(|(offset, len)| Segment { offset: *offset, len: *len }).collect();
    Content { size, segments, data: Box::new(data) }
}

fn written(content: Content<'_>) -> Vec<u8> {
    let mut writer = TarWriter::new(Vec::new());
    writer.append(Path::new("f"), &file(0), Some(content)).unwrap();
    writer.finish().unwrap()
}

fn read_back(tar: &[u8]) -> Vec<u8> {
    let mut archive = tar::Archive::new(tar);
    let mut entries = archive.entries().unwrap();
    let mut data = Vec::new();
    entries.next().unwrap().unwrap().read_to_end(&mut data).unwrap();
    assert!(entries.next().is_none());
    data
}

#[test]
fn a_plain_file_takes_one_header() {
    assert_eq!(written(content(3, &[(0, 3)], b"abc")).len(), BLOCK + BLOCK + 2 * BLOCK);
}

#[test]
fn a_file_that_became_shorter_is_padded_and_a_longer_one_cut() {
    assert_eq!(read_back(&written(content(600, &[(0, 600)], b"abc"))), [b"abc", &[0; 597][..]].concat());
    assert_eq!(read_back(&written(content(2, &[(0, 2)], b"abc"))), b"ab");
}

#[test]
fn small_holes_are_zeros_and_large_ones_are_not_stored() {
    assert_eq!(read_back(&written(content(9, &[(2, 1), (5, 1)], b"ab"))), b"\0\0a\0\0b\0\0\0");
    let size = WORTHWHILE_HOLES + 2;
    let sparse = written(content(size, &[(1, 1), (size - 1, 1)], b"ab"));
    assert_eq!(sparse.len(), 7 * BLOCK);
    let map = format!("2\n1\n1\n{}\n1\n\0", size - 1);
    assert_eq!(&sparse[3 * BLOCK..][..map.len()], map.as_bytes());
    assert_eq!(&sparse[4 * BLOCK..][..3], b"ab\0");
}

#[test]
fn times_are_decimal_numbers() {
    for (secs, nanos, text) in [
        (-2, 500_000_000, "-1.5"),
        (-1, 999_999_999, "-0.000000001"),
        (-1, 0, "-1"),
        (0, 10_000_000, "0.01"),
        (i64::MAX, 1, "9223372036854775807.000000001"),
        (100, 0, "100"),
    ] {
        assert_eq!(decimal(Timestamp { secs, nanos }), text);
    }
}

#[test]
fn a_records_length_counts_itself() {
    for (value, length) in [(1, "7 "), (3, "9 "), (4, "11 "), (92, "99 "), (93, "101 ")] {
        let mut pax = Pax::default();
        pax.record(b"kk", &vec![b'v'; value]);
        let text = String::from_utf8(pax.0).unwrap();
        assert!(text.starts_with(length), "{text}");
        assert_eq!(text.len().to_string(), length.trim());
    }
}

#[test]
fn names_are_split_where_ustar_can_hold_them() {
    let (p, n) = ("p".repeat(155), "n".repeat(100));
    let whole = format!("{p}/{n}");
    assert_eq!(split_name(whole.as_bytes()), Some((p.as_bytes(), n.as_bytes())));
    assert_eq!(split_name(format!("{p}p/{n}").as_bytes()), None);
    assert_eq!(split_name(format!("{p}/{n}n").as_bytes()), None);
    assert_eq!(split_name("ü".as_bytes()), None);
    assert_eq!(split_name(n.as_bytes()), Some((&b""[..], n.as_bytes())));
    assert_eq!(split_name(format!("{n}/").as_bytes()), None);
}

#[test]
fn only_keys_that_would_be_misread_are_encoded() {
    for (name, key) in [("user.a%b", "user.a%b"), ("user.a=b", "user.a%3Db"), ("user.%3D%25", "user.%253D%2525")] {
        assert_eq!(xattr_key(OsStr::new(name)), format!("SCHILY.xattr.{key}").into_bytes());
    }
}

#[test]
fn deletions_are_empty_files_beside_what_they_delete() {
    let mut writer = TarWriter::new(Vec::new());
    writer.whiteout(Path::new("etc/hosts")).unwrap();
    writer.opaque(Path::new("usr")).unwrap();
    assert_eq!(writer.whiteout(Path::new("")).unwrap_err().kind(), ErrorKind::InvalidInput);
    let tar = writer.finish().unwrap();
    let mut archive = tar::Archive::new(&tar[..]);
    let names: Vec<_> = archive.entries().unwrap().map(|e| e.unwrap().path().unwrap().into_owned()).collect();
    assert_eq!(names, [Path::new("etc/.wh.hosts"), Path::new("usr/.wh..wh..opq")]);
}

#[test]
fn a_device_beyond_the_fields_is_refused() {
    let meta = Metadata { kind: FileKind::CharDevice { major: 1 << 21, minor: 0 }, ..file(0) };
    let e = TarWriter::new(Vec::new()).append(Path::new("d"), &meta, None).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Unsupported);
}

#[test]
fn an_error_of_the_destination_comes_out() {
    struct Full;
    impl Write for Full {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::Error::from_raw_os_error(libc::ENOSPC))
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut writer = TarWriter::new(Full);
    let large = content(1 << 20, &[(0, 1 << 20)], b"");
    let e = writer.append(Path::new("f"), &file(0), Some(large)).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::OutOfSpace);
}
