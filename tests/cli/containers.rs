//! Containers: create, ps, rename, rm, diff, commit, export.

use crate::common::Home;
use serde_json::Value;

#[test]
fn containers_are_created_listed_renamed_and_removed() {
    needs_root!("containers_are_created_listed_renamed_and_removed");
    let home = Home::new();
    home.ok("graphdriver load -qi demo.tar");
    let id = home.ok("graphdriver create --name web demo");
    assert_eq!(id.trim().len(), 64);
    assert_eq!(home.ok("graphdriver ps -q").trim(), &id[..12]);
    assert_eq!(home.ok("graphdriver ps -q --no-trunc"), id);
    home.fails(4, "graphdriver create --name web demo", &["web", "already"]);
    home.fails(2, "graphdriver create --name 'a b' demo", &["letters"]);
    home.fails(3, "graphdriver create gone", &["gone", "graphdriver images"]);
    home.fails(6, "graphdriver create --storage-opt size=1G demo", &["size", "quota"]);
    home.fails(2, "graphdriver create --storage-opt size=much demo", &["much"]);
    home.fails(2, "graphdriver create --storage-opt colour=red demo", &["colour", "size"]);
    let unnamed = home.ok("graphdriver create demo");
    let listed = home.json("ps --size");
    assert_eq!((&listed[0]["Name"], &listed[1]["Name"]), (&unnamed[..12].into(), &"web".into()));
    assert!(listed[0]["Size"]["bytes"].is_u64(), "{listed}");
    home.ok("graphdriver rename web shop");
    home.fails(3, "graphdriver rename web x", &["web", "graphdriver ps"]);
    home.fails(4, &format!("graphdriver rename shop {}", &unnamed[..12]), &["already"]);
    home.fails(2, "graphdriver rename shop -- -x", &["-x"]);
    assert!(home.ok("graphdriver ps").contains("shop"));
    assert_eq!(home.fails(3, "graphdriver rm gone shop", &["gone"]), "shop\n");
    home.ok(&format!("graphdriver rm {}", &unnamed[..6]));
    assert_eq!(home.ok("graphdriver --format json ps"), "[]\n");
}

#[test]
fn a_mounted_container_is_removed_only_with_force() {
    needs_root!("a_mounted_container_is_removed_only_with_force");
    let home = Home::with_container();
    home.ok("mkdir m; graphdriver mount c m
        if graphdriver rm c 2> said; then exit 1; else test $? = 5; fi; grep -q 'rm -f' said
        graphdriver rm -f c; test -z \"$(ls m)\"; test -z \"$(graphdriver ps -q)\"");
}

#[test]
fn diff_prints_what_docker_prints() {
    needs_root!("diff_prints_what_docker_prints");
    let home = Home::with_container();
    assert_eq!(home.ok("graphdriver diff c"), "");
    let change = "mkdir m; graphdriver mount c m > out; cd m
        echo new > new; mkdir dir; ln new dir/link; rm etc/motd; echo more >> var/log/kept; chmod 600 etc/passwd
        mkfifo fifo; rm -r bin; touch 'with space'";
    let expected = "C /etc\nD /etc/motd\nC /etc/passwd\n";
    let told = home.ok(&format!("{change}; cd ..; graphdriver diff c; umount m; echo; graphdriver diff c"));
    let (mounted, unmounted) = told.split_once("\n\n").unwrap();
    assert_eq!(mounted.trim(), unmounted.trim(), "the same while it is mounted");
    assert!(told.contains(expected), "{told}");
    let all = "A /dir\nA /dir/link\nA /fifo\nA /new\nA /with space\nC /etc\nC /etc/passwd\nC /var\nC /var/log\n\
               C /var/log/kept\nD /bin\nD /etc/motd\n";
    let mut lines: Vec<_> = mounted.lines().collect();
    lines.sort_unstable();
    assert_eq!(lines.join("\n") + "\n", all);
    let json = home.json("diff c");
    assert_eq!((json.as_array().unwrap().len(), &json[0]["Kind"]), (12, &"D".into()), "{json}");
    home.fails(3, "graphdriver diff gone", &["gone"]);
    home.fails(3, "graphdriver diff demo", &["no container"]);
}

#[test]
fn commit_takes_a_mounted_container_as_it_is() {
    needs_root!("commit_takes_a_mounted_container_as_it_is");
    let home = Home::with_container();
    home.ok("mkdir m; graphdriver mount c m; echo 1 > m/one; rm m/etc/motd
        graphdriver commit -a me -m why -c 'CMD ls' -c 'ENV X=1' c new:1
        echo 2 > m/two; graphdriver commit c new:2; graphdriver mount new:1 m
        test -e m/one; test ! -e m/two; test ! -e m/etc/motd; graphdriver umount m; test -e m/two");
    let image = &home.json("inspect new:1")[0];
    assert_eq!((&image["Author"], &image["Comment"]), (&"me".into(), &"why".into()));
    assert_eq!(image["Config"]["Cmd"], Value::from(vec!["/bin/sh", "-c", "ls"]));
    assert_eq!(image["Config"]["Env"], Value::from(vec!["PATH=/bin", "X=1"]));
    assert_eq!(image["Parent"], home.json("inspect demo")[0]["Id"]);
    assert_eq!(image["RootFS"]["Layers"].as_array().unwrap().len(), 3);
    let id = home.ok("graphdriver commit c");
    assert!(
        home.json("images --no-trunc").as_array().unwrap().iter().any(|i| i["ID"] == id.trim() && i["Tag"].is_null())
    );
    home.fails(2, "graphdriver commit -c 'FROM x' c", &["FROM", "known are"]);
    home.fails(2, "graphdriver commit c Upper", &["lower case"]);
    home.fails(3, "graphdriver commit gone", &["gone"]);
}

#[test]
fn export_writes_the_whole_tree() {
    needs_root!("export_writes_the_whole_tree");
    let home = Home::with_container();
    home.ok("graphdriver export -o a.tar c; graphdriver export c > b.tar; cmp a.tar b.tar; mkdir t; tar xf a.tar -C t
        mkdir m; graphdriver mount c m; diff -r --no-dereference t m; test t/bin/sh -ef t/bin/bash");
    assert!(!home.ok("tar tf a.tar").contains("deleted"));
    home.fails(3, "graphdriver export gone", &["gone"]);
    home.fails(3, "graphdriver export demo", &["no container"]);
    home.fails(2, "script -qec 'graphdriver export c' /dev/null >&2; exit 2", &[]);
}
