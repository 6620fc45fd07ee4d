//! Copying into and out of containers.

use crate::common::Home;

/// `docker cp`, "Extended description": each form it tells of.
#[test]
fn cp_into_a_container_follows_docker_cp() {
    needs_root!("cp_into_a_container_follows_docker_cp");
    let home = Home::with_container();
    home.ok("mkdir -p h/dir/sub; echo f > h/file; echo g > h/dir/g; ln -s file h/link; ln -s dir h/dlink
        ln -s $PWD/h/file h/abslink; chown 12:34 h/file");
    let look =
        "look() { graphdriver export c | tar t | grep -v -e ^bin -e ^var -e ^etc/.; graphdriver export c > t.tar; }";
    let cp = |arguments: &str, there: &str| {
        home.ok(&format!(
            "{look}; graphdriver rm c; graphdriver create --name c demo; graphdriver cp {arguments}; look > list
            for f in {there}; do grep -qxF $f list || {{ echo no $f; cat list; exit 1; }}; done"
        ));
    };
    cp("h/file c:/new", "new");
    cp("h/file c:/", "file");
    cp("h/file c:", "file");
    cp("h/file c:new", "new");
    cp("h/dir c:/new", "new/ new/g new/sub/");
    cp("h/dir c:/", "dir/ dir/g dir/sub/");
    cp("h/dir/ c:/new/", "new/ new/g");
    cp("h/dir/. c:/", "g sub/");
    cp("h/dir/. c:/new", "new/ new/g");
    cp("h/dir/.. c:/new", "new/ new/file new/dir/g");
    cp("h/dlink c:/new", "new");
    cp("h/dlink/ c:/", "dlink/ dlink/g");
    cp("-L h/link c:/", "link");
    let content = |path: &str| home.ok(&format!("tar xOf t.tar {path}"));
    assert_eq!(content("link"), "f\n");
    cp("-L h/abslink c:/new", "new");
    assert_eq!(content("new"), "f\n");
    cp("h/link c:/new", "new");
    assert!(home.ok("tar tvf t.tar new").contains("new -> file"));
    // A symlink at the destination is written through, and an absolute one stays in the container.
    let host = std::fs::read("/etc/passwd").unwrap();
    cp("h/file c:/etc/absolute", "etc/");
    assert_eq!((content("etc/passwd").as_str(), std::fs::read("/etc/passwd").unwrap()), ("f\n", host));
    assert!(home.ok("tar tvf t.tar etc/absolute").contains("-> /etc/passwd"));

    let owner = |options: &str| {
        cp(&format!("{options} h/file c:/"), "file");
        home.ok("tar tvf t.tar --numeric-owner file | awk '{print $2}'")
    };
    assert_eq!((owner("").as_str(), owner("-a").as_str()), ("0/0\n", "12/34\n"));

    home.fails(3, "graphdriver cp h/file c:/no/file", &["\"/no\"", "make it first"]);
    home.fails(3, "graphdriver cp h/file c:/no/", &["no directory \"/no/\""]);
    home.fails(3, "graphdriver cp h/gone c:/", &["h/gone"]);
    home.fails(3, "graphdriver cp h/file gone:/", &["container \"gone\""]);
    home.fails(2, "graphdriver cp h/dir c:/etc/passwd", &["/etc/passwd", "no directory"]);
    home.fails(2, "graphdriver cp h/file c:/etc/passwd/", &["/etc/passwd/", "no directory"]);
    home.fails(2, "graphdriver cp h/file/ c:/x", &["ot a directory"]);
    home.fails(2, "graphdriver cp h/file h/other", &["CONTAINER:PATH"]);
    home.fails(6, "graphdriver cp c:/a c:/b", &["host first"]);
    home.ok("echo x > ./a:b; graphdriver cp ./a:b c:/");
}

#[test]
fn cp_out_of_a_container_follows_docker_cp() {
    needs_root!("cp_out_of_a_container_follows_docker_cp");
    let home = Home::with_container();
    home.ok("echo x > f; chown 12:34 f; graphdriver cp -a f c:/owned; mkdir o d; umask 022
        graphdriver cp c:/etc/motd o/new; graphdriver cp c:/etc/motd o; cmp o/new o/motd; grep -qx hello o/motd
        graphdriver cp c:/etc o; test -f o/etc/passwd; graphdriver cp c:/etc o/other; test -f o/other/passwd
        graphdriver cp c:/etc/. d; test -f d/passwd; graphdriver cp c:/var/log/ o/; test -f o/log/kept
        graphdriver cp c:/ o/all; test -f o/all/etc/passwd; test o/all/bin/sh -ef o/all/bin/bash
        test $(stat -c %a o/all/bin/sh) = 4755; test $(stat -c %a o/all/var/log) = 750; test \"$(stat -c %Y o/all/etc/passwd)\" = 1600000000
        graphdriver cp c:/etc/absolute o/; test $(readlink o/absolute) = /etc/passwd
        graphdriver cp -L c:/etc/absolute o/followed; grep -qx root:x:0:0 o/followed
        graphdriver cp c:/../../etc/./log/../motd o/dots; grep -qx hello o/dots
        graphdriver cp c:/owned o/mine; test $(stat -c %u:%g o/mine) = 0:0
        graphdriver cp -a c:/owned o/kept; test $(stat -c %u:%g o/kept) = 12:34
        ln -s target o/dangling; graphdriver cp c:/owned o/dangling; test -L o/dangling; grep -qx x o/target");
    home.fails(3, "graphdriver cp c:/gone o", &["\"/gone\""]);
    home.fails(3, "graphdriver cp c:/owned o/no/file", &["o/no", "make it first"]);
    home.fails(3, "graphdriver cp c:/owned o/no/", &["o/no"]);
    home.fails(2, "graphdriver cp c:/etc o/new", &["o/new", "no directory"]);
    home.fails(2, "graphdriver cp c:/etc/passwd/. o", &["/etc/passwd/.", "no directory"]);
    home.fails(2, "graphdriver cp c:/owned/ o", &["irectory"]);
}

#[test]
fn cp_speaks_tar_both_ways() {
    needs_root!("cp_speaks_tar_both_ways");
    let home = Home::with_container();
    let list = home.ok("graphdriver cp c:/var/log - | tar t");
    assert_eq!(list, "log/\nlog/kept\n");
    assert_eq!(home.ok("graphdriver cp c:/etc/motd - | tar xO"), "hello\n");
    assert!(home.ok("graphdriver cp c:/etc/absolute - | tar tv").contains("-> /etc/passwd"));
    assert_eq!(home.ok("graphdriver cp -L c:/etc/absolute - | tar xO absolute"), "root:x:0:0\n");
    home.ok(
        "mkdir -p h/sub; echo 1 > h/one; ln h/one h/sub/two; chown 5:6 h/one; tar c -C h . | graphdriver cp - c:/etc
        gzip -c rootfs.tar | gunzip | graphdriver cp - c:/var; tar c -C h one | graphdriver cp -a - c:/bin",
    );
    let all = home.ok("graphdriver export c | tar tv --numeric-owner");
    let owner = |path: &str| {
        let line =
            all.lines().find(|l| l.split_whitespace().nth(5) == Some(path)).unwrap_or_else(|| panic!("{path}: {all}"));
        line.split_whitespace().nth(1).unwrap().to_owned()
    };
    assert_eq!((owner("etc/one").as_str(), owner("bin/one").as_str()), ("0/0", "5/6"));
    assert!(all.contains("etc/sub/two link to etc/one") && all.contains("var/var/log/kept"), "{all}");
    home.fails(3, "graphdriver cp - c:/gone < rootfs.tar", &["\"/gone\""]);
    home.fails(2, "graphdriver cp - c:/etc/passwd < rootfs.tar", &["/etc/passwd", "no directory"]);
    home.fails(9, "echo junk | graphdriver cp - c:/", &["copying - to c:/"]);
    home.fails(2, "graphdriver cp - - < /dev/null", &["CONTAINER:PATH"]);
}

#[test]
fn cp_and_the_mount_see_each_other() {
    needs_root!("cp_and_the_mount_see_each_other");
    let home = Home::with_container();
    home.ok("mkdir m; graphdriver mount c m; echo 1 > m/one; graphdriver cp c:/one got; cmp got m/one
        graphdriver cp rootfs.tar c:/etc/; cmp rootfs.tar m/etc/rootfs.tar; graphdriver umount m
        graphdriver cp c:/etc/rootfs.tar - | tar xO | cmp - rootfs.tar");
    // Even through a mount in a namespace of its own.
    home.ok("mkfifo ready; unshare -m --propagation private sh -c \
          'graphdriver mount c m; echo 2 > m/two; echo > ready; read x < ready' > out & read x < ready
        graphdriver cp c:/two got; grep -qx 2 got; graphdriver mounts | grep -q 'another namespace'; echo > ready; wait
        test -z \"$(graphdriver mounts | tail -n +2)\"");
}

#[test]
fn copies_into_one_container_take_turns_and_hold_up_nobody_else() {
    needs_root!("copies_into_one_container_take_turns_and_hold_up_nobody_else");
    let home = Home::with_container();
    home.ok("graphdriver create --name d demo > out
        for i in 1 2 3 4 5 6; do graphdriver cp demo.tar c:/f$i & done; wait
        test $(graphdriver export c | tar t | grep -c ^f) = 6");
    // A copy that waits for its input.
    home.ok("mkfifo pipe; mkdir m n; graphdriver cp - c:/ < pipe & exec 3> pipe; sleep 0.5
        if graphdriver mount c m 2> said; then exit 1; else test $? = 5; fi; grep -q 'being copied' said
        graphdriver mount d n; graphdriver cp demo.tar d:/; graphdriver mount --read-only c m
        tar c demo.tar >&3; exec 3>&-; wait; graphdriver umount m; graphdriver mount c m; cmp demo.tar m/demo.tar");
    // From one container straight into the other.
    home.ok("graphdriver cp c:/f1 - | graphdriver cp - d:/; graphdriver cp d:/f1 - | tar xO | cmp - demo.tar");
}
