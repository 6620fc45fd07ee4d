//! A layer on the layers below it: what it deletes there, and what it takes from there.

use super::*;

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
