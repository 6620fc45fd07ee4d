//! A whole layer: completed by us, refused by the kernel before.

use super::*;
use crate::config::Config;
use graphdriver_core::ErrorKind;

/// `l0` (bottom) and `l1` with files, `u` with extent files of them, `w`.
fn layers(root: &Path, prefix: &str) -> Config {
    let at = |name: &str| root.join(name);
    for name in ["l0/d", "l1", "u/d/e", "w", "m"] {
        std::fs::create_dir_all(at(name)).unwrap();
    }
    for (layer, lower, upper) in [(0, "d/a", "d/a"), (1, "b", "d/e/moved"), (0, "c", "c")] {
        let lower_path = at(&format!("l{layer}")).join(lower);
        std::fs::write(&lower_path, pattern(layer + 5, 100_000)).unwrap();
        let lower_stat = std::fs::metadata(&lower_path).unwrap();
        let file = File::options().read(true).write(true).create_new(true).open(at("u").join(upper)).unwrap();
        let identity = LowerIdentity {
            size: lower_stat.size(),
            mtime: (lower_stat.mtime(), lower_stat.mtime_nsec() as u32),
            ino: lower_stat.ino(),
        };
        let header = Header {
            layer_from_bottom: layer as u16,
            path: lower.into(),
            lower: identity,
            limit: 100_000,
            upper: UpperIdentity::of(file.as_fd()).unwrap(),
            ino: Some(1000 + layer),
        };
        prepare(file.as_fd(), prefix, &header).unwrap();
        let lower = File::open(lower_path).unwrap();
        let file = ExtentFile::open(file.into(), lower.into(), header, prefix, Unit(4096), true).unwrap();
        file.write_at(b"changed", 50_000).unwrap();
    }
    // The same file twice, and what a walk must not follow or wait for.
    std::fs::hard_link(at("u/c"), at("u/d/link")).unwrap();
    std::os::unix::fs::symlink(at("l0"), at("u/outside")).unwrap();
    must(&format!("mkfifo {}", at("u/fifo").display()));
    std::fs::write(at("u/plain"), "plain").unwrap();
    let (upper, work) = (Some(at("u")), Some(at("w")));
    Config { lower: vec![at("l1"), at("l0")], upper, work, user_xattrs: prefix == "user.overlay.", ..Config::default() }
}

#[test]
fn completes_all_extent_files_and_nothing_else() {
    let directory = directory(None);
    let config = layers(directory.path(), PREFIX);
    let upper = config.upper.clone().unwrap();
    let times = |name: &str| {
        let stat = std::fs::metadata(upper.join(name)).unwrap();
        (stat.mtime(), stat.mtime_nsec())
    };
    let before = ["d/a", "d/e/moved", "plain"].map(times);
    let done = complete_layer(&config).unwrap();
    assert_eq!(done.files, 3);
    assert_eq!(done.bytes, 3 * (100_000 - 4096));
    assert_eq!(before, ["d/a", "d/e/moved", "plain"].map(times));
    for (name, seed, ino) in [("d/a", 5, 1000u64), ("d/e/moved", 6, 1001), ("c", 5, 1000), ("d/link", 5, 1000)] {
        let mut expected = pattern(seed, 100_000);
        expected[50_000..50_007].copy_from_slice(b"changed");
        assert!(std::fs::read(upper.join(name)).unwrap() == expected, "{name}");
        let left: Vec<_> = xattr::list(upper.join(name)).unwrap().collect();
        let left: Vec<_> = left.iter().filter(|n| n.to_string_lossy().contains("overlay")).collect();
        assert_eq!(left, [&format!("{PREFIX}vfs.ino")[..]], "{name}");
        assert_eq!(xattr::get(upper.join(name), left[0]).unwrap().unwrap(), ino.to_le_bytes(), "{name}");
    }
    assert_eq!(complete_layer(&config).unwrap(), Completed::default());
}

/// Users may write `user.` xattrs, and would be shown any lower file.
#[test]
fn users_marks_count_for_nothing_in_the_layer_of_a_privileged_mount() {
    let directory = directory(None);
    let mut config = layers(directory.path(), PREFIX);
    config.user_xattrs = false;
    if !config.sees_trusted() {
        eprintln!("skipped: users_marks_count_for_nothing_in_the_layer_of_a_privileged_mount: needs root");
        return;
    }
    assert_eq!(complete_layer(&config).unwrap(), Completed::default());
    assert!(xattr::get(directory.path().join("u/d/a"), format!("{PREFIX}{XATTR}")).unwrap().is_some());
    std::fs::create_dir_all(directory.path().join("w/work/incompat/vfs-fuse-extents")).unwrap();
    let error = complete_layer(&config).unwrap_err();
    assert!(error.to_string().contains("userxattr"), "{error}");
}

#[test]
fn a_copy_with_the_same_inode_number_is_an_error_that_names_the_file() {
    let directory = directory(None);
    let config = layers(directory.path(), PREFIX);
    let upper = directory.path().join("u/d/a");
    let name = format!("{PREFIX}{XATTR}");
    let mut header = Header::decode(&xattr::get(&upper, &name).unwrap().unwrap()).unwrap();
    header.upper.birth.0 -= 1;
    xattr::set(&upper, &name, &header.encode().unwrap()).unwrap();
    let error = complete_layer(&config).unwrap_err();
    assert!(error.to_string().contains("u/d/a"), "{error}");
    assert!(xattr::get(&upper, &name).unwrap().is_some());
}

#[test]
fn wrong_lower_layers_are_an_error_that_names_the_file() {
    let directory = directory(None);
    let mut config = layers(directory.path(), PREFIX);
    config.lower.remove(0);
    let error = complete_layer(&config).unwrap_err();
    assert!(error.to_string().contains("lowerdir="), "{error}");
    config.upper = None;
    assert_eq!(complete_layer(&config).unwrap_err().kind(), ErrorKind::InvalidInput);
}

#[test]
fn the_kernel_refuses_extent_files_until_they_are_complete() {
    in_private_namespace("extent::tests::layer::the_kernel_refuses_extent_files_until_they_are_complete", || {
        for (prefix, options) in [
            ("trusted.overlay.", "metacopy=off"),
            ("trusted.overlay.", "metacopy=on,redirect_dir=on"),
            ("trusted.overlay.", "metacopy=off,redirect_dir=off"),
            ("user.overlay.", "userxattr"),
            ("trusted.overlay.", "userxattr"),
        ] {
            let directory = directory(None);
            let config = layers(directory.path(), prefix);
            let at = directory.path().display().to_string();
            let refused = |layers: &str| {
                must(&format!("cd {at}; mount -t overlay o -o {layers},{options} m"));
                for name in ["d/a", "c", "d/e/moved"] {
                    let read = std::fs::read(directory.path().join("m").join(name));
                    let shown = read.as_ref().map(|all| all.len());
                    assert!(shown.is_err(), "{prefix} {options} {layers}: the kernel shows {name}");
                    eprintln!("{prefix} {options} {layers}: {:?}", read.err());
                }
                assert_eq!(std::fs::read(directory.path().join("m/plain")).unwrap(), b"plain");
                must(&format!("umount {at}/m"));
            };
            refused("lowerdir=l1:l0,upperdir=u,workdir=w");
            refused("lowerdir=u:l1:l0");
            complete_layer(&config).unwrap();
            must(&format!("cd {at}; mount -t overlay o -o lowerdir=l1:l0,upperdir=u,workdir=w,{options} m"));
            let mut expected = pattern(5, 100_000);
            expected[50_000..50_007].copy_from_slice(b"changed");
            assert!(std::fs::read(directory.path().join("m/d/a")).unwrap() == expected);
            must(&format!("umount {at}/m"));
        }
    });
}
