//! Tars that are unpacked on the host or copied into a container.

use super::*;

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
