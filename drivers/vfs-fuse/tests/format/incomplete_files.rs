//! Files of which only what was changed is in the upper layer.

use crate::{
    FOLLOW, MIB,
    common::{Layers, Mounted, program},
    complete,
    disk::{push, sh},
    incomplete, kernel, ours, pattern, to_version_1,
};
use rustix::io::Errno;
use std::{
    fs,
    os::unix::fs::{FileExt, MetadataExt},
    process::Command,
};

#[test]
fn the_kernel_refuses_what_is_incomplete_and_shows_it_once_completed() {
    needs!("the_kernel_refuses_what_is_incomplete_and_shows_it_once_completed");
    let (layers, expected) = incomplete();
    let kernels: [&[&str]; 5] = [
        &["userxattr"],
        &["metacopy=off", "redirect_dir=off"],
        &["metacopy=off", "redirect_dir=follow"],
        &["metacopy=on", "redirect_dir=on"],
        &["metacopy=on", "redirect_dir=follow"],
    ];
    let refused = |layers: &Layers, options: &[&str], how: &str| {
        // Not to be mounted at all is a refusal too: metacopy=on needs redirect_dir=on.
        let Ok(mounted) = layers.try_mount_kernel(&layers.options(options)) else { return false };
        let e = fs::read(mounted.path().join("dir/big")).expect_err("the kernel shows an incomplete file");
        let refused =
            [Errno::PERM, Errno::IO, Errno::ACCESS].iter().any(|errno| e.raw_os_error() == Some(errno.raw_os_error()));
        assert!(refused, "{how} {options:?}: {e}");
        mounted.unmount();
        true
    };
    // With the layer's own work directory the whole mount is refused; with another one each file.
    for options in kernels {
        assert_eq!(layers.try_mount_kernel(&layers.options(options)).err(), Some(nix::Error::EINVAL), "{options:?}");
    }
    fs::rename(layers.work.join("work/incompat"), layers.dir().join("incompat")).unwrap();
    let asked = kernels.iter().filter(|options| refused(&layers, options, "as the upper")).count();
    assert!(asked >= 4, "only {asked} kinds of mounts could be tried");
    fs::rename(layers.dir().join("incompat"), layers.work.join("work/incompat")).unwrap();
    let mut below = incomplete().0;
    below = push(below);
    assert!(kernels.iter().filter(|options| refused(&below, options, "as a lower")).count() >= 4);

    assert!(fs::read(ours(&layers).path().join("dir/big")).unwrap() == expected, "mounted again");
    complete(&layers);
    for mount in [&kernel(FOLLOW) as &dyn Fn(&Layers) -> Mounted, &ours] {
        let mounted = mount(&layers);
        assert!(fs::read(mounted.path().join("dir/big")).unwrap() == expected);
        mounted.unmount();
    }
    let left: Vec<_> = xattr::list(layers.upper.join("dir/big")).unwrap().collect();
    assert_eq!(left, ["trusted.overlay.vfs.ino"], "it is plain");
    // To complete what is complete is nothing.
    complete(&layers);
}

/// A mount that trusts `user.` xattrs alone does not know what the file is made of.
#[test]
fn an_incomplete_file_is_refused_where_its_header_does_not_count() {
    needs!("an_incomplete_file_is_refused_where_its_header_does_not_count");
    for version in [1, 2] {
        let (mut layers, _) = incomplete();
        if version == 1 {
            to_version_1(&layers.upper.join("dir/big"));
        }
        for how in ["as the upper", "as a lower"] {
            let mounted = layers.mount(&["userxattr"]);
            let refused = |result: std::io::Result<()>| {
                let e = result.expect_err("shown without what was changed");
                assert_eq!(e.raw_os_error(), Some(Errno::IO.raw_os_error()), "{how}, version {version}: {e}");
            };
            refused(fs::read(mounted.path().join("dir/big")).map(drop));
            refused(fs::OpenOptions::new().append(true).open(mounted.path().join("dir/big")).map(drop));
            assert!(fs::read(mounted.path().join("dir/meta")).unwrap() == pattern(MIB));
            mounted.unmount();
            layers = push(layers);
        }
    }
}

/// They are read, written, given names and completed as they were, and the kernel refuses them.
#[test]
fn incomplete_files_of_version_1_are_what_they_were() {
    needs!("incomplete_files_of_version_1_are_what_they_were");
    let (layers, mut expected) = incomplete();
    let number = |mounted: &Mounted, name: &str| fs::metadata(mounted.path().join(name)).unwrap().ino();
    let before = number(&ours(&layers), "dir/big");
    to_version_1(&layers.upper.join("dir/big"));
    fs::rename(layers.work.join("work/incompat"), layers.dir().join("incompat")).unwrap();
    for options in [&["userxattr"][..], &["metacopy=off"], &["metacopy=on", "redirect_dir=on"]] {
        let mounted = layers.mount_kernel(options);
        fs::read(mounted.path().join("dir/big")).expect_err("the kernel shows an incomplete file");
        mounted.unmount();
    }
    let mounted = ours(&layers);
    let path = |name: &str| mounted.path().join(name);
    assert_eq!(number(&mounted, "dir/big"), before);
    assert!(fs::read(path("dir/big")).unwrap() == expected);
    let file = fs::OpenOptions::new().write(true).open(path("dir/big")).unwrap();
    file.write_all_at(b"once more", 500_000).unwrap();
    // Which changes the header.
    file.set_len(900_000).unwrap();
    file.set_len(1_000_000).unwrap();
    drop(file);
    expected[500_000..500_009].copy_from_slice(b"once more");
    expected[900_000..].fill(0);
    expected.truncate(1_000_000);
    fs::rename(path("dir/big"), path("moved")).unwrap();
    fs::hard_link(path("moved"), path("linked")).unwrap();
    mounted.unmount();
    assert!(xattr::get(layers.upper.join("moved"), "trusted.overlay.vfs.extent").unwrap().is_some());
    complete(&layers);
    for mount in [&kernel(FOLLOW) as &dyn Fn(&Layers) -> Mounted, &ours] {
        let mounted = mount(&layers);
        assert!(fs::read(mounted.path().join("linked")).unwrap() == expected);
        mounted.unmount();
    }
    assert_eq!(number(&ours(&layers), "moved"), before);
    let left: Vec<_> = xattr::list(layers.upper.join("moved")).unwrap().collect();
    assert_eq!(left, ["trusted.overlay.vfs.ino"]);
}

/// What copies the upper layer may have made data of the holes, or drop xattrs.
#[test]
fn an_incomplete_file_that_was_copied_is_refused() {
    needs!("an_incomplete_file_that_was_copied_is_refused");
    let copies = [
        "cp -a --sparse=never upper copy",
        "cp -a --sparse=auto upper copy",
        "mkdir copy; tar -C upper --xattrs --xattrs-include='*' -cf - . | tar -C copy --xattrs --xattrs-include='*' -xpf -",
        "mkdir copy; tar -C upper -S --xattrs --xattrs-include='*' -cf - . | tar -C copy --xattrs --xattrs-include='*' -xpf -",
        // In place: the same path, another inode.
        "cp -a --sparse=never upper copy; rm -r upper; cp -a copy upper; rm -r copy; mv upper copy",
    ];
    for copy in copies {
        let (mut layers, _) = incomplete();
        sh(layers.dir(), copy);
        layers.upper = layers.dir().join("copy");
        let refused = |mounted: Mounted| {
            let read = fs::read(mounted.path().join("dir/big"));
            let e = read.map(|_| ()).expect_err(&format!("a copy of an incomplete file is shown: {copy}"));
            assert_eq!(e.raw_os_error(), Some(Errno::IO.raw_os_error()), "{copy}: {e}");
            // Nothing else is the worse for it, and it can be removed.
            assert!(fs::read(mounted.path().join("dir/meta")).unwrap() == pattern(MIB));
            fs::remove_file(mounted.path().join("dir/big")).unwrap();
            mounted.unmount();
        };
        refused(ours(&layers));
    }
}

/// The lower file that holds the rest is not what it was.
#[test]
fn an_incomplete_file_whose_lower_one_has_changed_is_refused() {
    needs!("an_incomplete_file_whose_lower_one_has_changed_is_refused");
    for change in [
        "echo >> dir/big",
        "touch dir/big",
        "rm dir/big",
        "rm dir/big; mkdir dir/big",
        "rm dir/big; ln -s meta dir/big",
    ] {
        let (layers, _) = incomplete();
        sh(&layers.lowers[1], change);
        let mounted = ours(&layers);
        let read = fs::read(mounted.path().join("dir/big"));
        let e = read.map(|_| ()).expect_err("composed with a file that is another one now");
        assert_eq!(e.raw_os_error(), Some(Errno::IO.raw_os_error()), "{change}: {e}");
        mounted.unmount();
        let out = Command::new(program()).args(["--complete", "-o", &layers.options(&[])]).output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(!out.status.success() && said.contains("big"), "{change}: --complete says {said:?}");
    }
}
