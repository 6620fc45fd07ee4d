//! Headers that others wrote, or that do not fit.

use super::*;
use proptest::prelude::*;
use rustix::io::Errno;

fn header_1() -> Header {
    Header { ino: None, ..header() }
}

fn header() -> Header {
    Header {
        layer_from_bottom: 3,
        path: b"usr/lib/a file".to_vec(),
        lower: LowerIdentity { size: 10_000, mtime: (-5, 999_999_999), ino: 77 },
        limit: 9_000,
        upper: UpperIdentity { ino: 88, birth: (1_700_000_000, 123_456_789) },
        ino: Some(99),
    }
}

#[test]
fn headers_of_both_versions_are_read() {
    let one = "474458460100030028230000000000001027000000000000fbffffffffffffffffc99a3b15cd5b07\
               4d00000000000000580000000000000000f15365000000007573722f6c69622f612066696c65";
    let two = "474458460200030028230000000000001027000000000000fbffffffffffffffffc99a3b15cd5b07\
               4d00000000000000580000000000000000f153650000000063000000000000007573722f6c69622f612066696c65";
    for (sample, header) in [(one, header_1()), (two, header())] {
        let sample: Vec<u8> =
            (0..sample.len()).step_by(2).map(|i| u8::from_str_radix(&sample[i..i + 2], 16).unwrap()).collect();
        assert_eq!(Header::decode(&sample).unwrap(), header);
        assert_eq!(header.encode().unwrap(), sample);
        let found = |at: &'static str| Header::find(|name| Ok((name == at).then(|| sample.clone())));
        assert_eq!(found(header.xattr()), Ok(Some(sample.clone())));
        let elsewhere = if header.ino.is_some() { Err(Errno::IO) } else { Ok(None) };
        assert_eq!(found(if header.ino.is_some() { XATTR_1 } else { XATTR }), elsewhere);
    }
    // The kernel's own mark beside a header of version 1.
    let both = |name: &str| Ok(Some(if name == XATTR { vec![0xff, 4, 0, 0] } else { header_1().encode().unwrap() }));
    assert_eq!(Header::find(both), Ok(header_1().encode().ok()));
}

#[test]
fn hostile_headers_are_refused() {
    hostile(header_1, 64);
    hostile(header, 72);
}

fn hostile(header: fn() -> Header, fixed: usize) {
    let good = header().encode().unwrap();
    for length in 0..=fixed {
        assert_eq!(Header::decode(&good[..length]), Err(Errno::IO), "cut at {length}");
    }
    let change = |at: usize, to: &[u8]| {
        let mut bad = good.clone();
        bad[at..at + to.len()].copy_from_slice(to);
        Header::decode(&bad)
    };
    assert_eq!(change(0, b"X"), Err(Errno::IO), "magic");
    assert_eq!(change(4, &[3]), Err(Errno::OPNOTSUPP), "version");
    assert_eq!(change(5, &[1]), Err(Errno::IO), "reserved");
    assert_eq!(change(8, &10_001u64.to_le_bytes()), Err(Errno::IO), "limit above size");
    assert_eq!(change(16, &u64::MAX.to_le_bytes()), Err(Errno::IO), "size");
    assert_eq!(change(32, &1_000_000_000u32.to_le_bytes()), Err(Errno::IO), "nanoseconds");
    assert_eq!(change(36, &1_000_000_000u32.to_le_bytes()), Err(Errno::IO), "nanoseconds of the birth");
    let long = "x".repeat(256);
    for path in ["", "/etc/passwd", "a/../b", "..", ".", "a//b", "a/", "a\0b", &long] {
        let mut bad = good[..fixed].to_vec();
        bad.extend_from_slice(path.as_bytes());
        assert_eq!(Header::decode(&bad), Err(Errno::IO), "path {path:?}");
        assert_eq!(Header { path: path.into(), ..header() }.encode(), Err(Errno::INVAL), "path {path:?}");
    }
}

#[test]
fn a_path_that_does_not_fit_is_an_errno_that_says_so() {
    let directory = directory(None);
    for (parts, expected) in [(400, vec![Errno::TOOBIG]), (40, vec![Errno::NOSPC, Errno::TOOBIG])] {
        let upper = File::create(directory.path().join("upper")).unwrap();
        let own = UpperIdentity::of(upper.as_fd()).unwrap();
        let path = vec!["x".repeat(200); parts].join("/").into_bytes();
        let result = prepare(upper.as_fd(), PREFIX, &Header { path, upper: own, ..header() });
        match result {
            // xfs and btrfs have room for more.
            Ok(()) => assert!(parts == 40),
            Err(e) => assert!(expected.contains(&e), "{e}"),
        }
    }
}

#[test]
fn copies_and_changed_lower_files_are_refused() {
    let directory = directory(None);
    let pair = Pair::new(directory.path(), &pattern(1, 50_000), Unit(4096));
    pair.prepare().unwrap();
    pair.open().unwrap().write_at(b"x", 3).unwrap();
    let at = |name: &str| directory.path().join(name);
    must(&format!("cp -a {0} {0}.copy; mv {0} {0}.real; mv {0}.copy {0}", at("upper").display()));
    assert_eq!(pair.open().err(), Some(Errno::IO), "a copy");
    std::fs::rename(at("upper.real"), at("upper")).unwrap();
    pair.open().unwrap();
    must(&format!("touch {}", at("lower").display()));
    assert_eq!(pair.open().err(), Some(Errno::IO), "another mtime");
}

/// A copy that was given the inode number of the file it was made of.
#[test]
fn an_inode_number_that_is_used_again_is_refused() {
    let directory = directory(None);
    let pair = Pair::new(directory.path(), &pattern(1, 50_000), Unit(4096));
    pair.prepare().unwrap();
    let genuine = pair.header().unwrap();
    let file = File::open(directory.path().join("upper")).unwrap();
    let age = std::time::SystemTime::now().duration_since(file.metadata().unwrap().created().unwrap()).unwrap();
    assert!(age.as_secs() < 100 && genuine.upper == UpperIdentity::of(file.as_fd()).unwrap());
    let (seconds, nanoseconds) = genuine.upper.birth;
    for birth in [(seconds - 1, nanoseconds), (seconds, (nanoseconds + 1) % 1_000_000_000), (0, 0)] {
        let earlier = Header { upper: UpperIdentity { birth, ..genuine.upper }, ..genuine.clone() };
        xattr::set(directory.path().join("upper"), format!("{PREFIX}{XATTR}"), &earlier.encode().unwrap()).unwrap();
        assert_eq!(pair.open().err(), Some(Errno::IO), "born at {birth:?}");
    }
}

proptest! {
    #[test]
    fn what_is_decoded_is_what_was_encoded(bytes in proptest::collection::vec(any::<u8>(), 0..100), at in 0..73usize, to: u8) {
        let changed = |header: Header| {
            let mut value = header.encode().unwrap();
            value[at] = to;
            value
        };
        for value in [bytes, changed(header_1()), changed(header())] {
            if let Ok(header) = Header::decode(&value) {
                prop_assert_eq!(header.encode().unwrap(), value);
            }
        }
    }
}
