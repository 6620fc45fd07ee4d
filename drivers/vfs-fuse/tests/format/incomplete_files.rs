//! Files of which only what was changed is in the upper layer.

use crate::{
    FOLLOW, MIB,
    common::{Layers, Mounted, program},
    complete,
    disk::{push, sh},
    incomplete, kernel, ours, pattern,
};
use rustix::io::Errno;
use std::{fs, process::Command};

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
    let left = xattr::list(layers.upper.join("dir/big")).unwrap();
    let left: Vec<_> = left
        .filter(|name| ["extent", "metacopy", "redirect"].iter().any(|n| name.to_str().unwrap().contains(n)))
        .collect();
    assert!(left.is_empty(), "it is plain, but has {left:?}");
    // To complete what is complete is nothing.
    complete(&layers);
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
