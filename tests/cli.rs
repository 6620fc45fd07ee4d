//! The command line as its users meet it: the real program, a tiny image, every command with right and wrong input.

mod common;

use common::{Home, no_root, skipped};
use serde_json::Value;
use std::{
    io::{BufRead, BufReader},
    os::unix::process::CommandExt,
    process::Stdio,
    time::{Duration, Instant},
};

macro_rules! needs_root {
    ($test:literal) => {
        if skipped($test, no_root()) {
            return;
        }
    };
}

const ID: usize = "sha256:".len() + 64;

#[test]
fn settings_come_from_flags_then_variables_then_the_file() {
    needs_root!("settings_come_from_flags_then_variables_then_the_file");
    let home = Home::new();
    home.ok("mkdir conf
        echo \"{\\\"data-root\\\": \\\"$PWD/from-file\\\", \\\"storage-opts\\\": [\\\"overlay2.redirect_dir=off\\\"]}\" > conf/c.json");
    let root = |prefix: &str, flags: &str| {
        let script = format!(
            "unset GRAPHDRIVER_DATA_ROOT; {prefix} graphdriver --config conf/c.json {flags} --format json info"
        );
        let info: Value = serde_json::from_str(&home.ok(&script)).unwrap();
        info["DataRoot"].as_str().unwrap().rsplit('/').next().unwrap().to_owned()
    };
    assert_eq!(root("", ""), "from-file");
    assert_eq!(root("GRAPHDRIVER_DATA_ROOT=from-variable", ""), "from-variable");
    assert_eq!(root("GRAPHDRIVER_DATA_ROOT=from-variable", "--root from-flag"), "from-flag");
    assert_eq!(root("GRAPHDRIVER_DATA_ROOT=from-variable", "--data-root from-alias"), "from-alias");

    let options = |prefix: &str, flags: &str| {
        let script =
            format!("{prefix} graphdriver --root $(mktemp -d -p .) --config conf/c.json {flags} --format json info");
        let info: Value = serde_json::from_str(&home.ok(&script)).unwrap();
        info["StorageOptions"].to_string()
    };
    assert_eq!(options("", ""), r#"[["overlay2.redirect_dir","off"]]"#);
    let variable = "GRAPHDRIVER_STORAGE_OPTS=overlay2.metacopy=off,overlay2.redirect_dir=off";
    assert_eq!(options(variable, ""), r#"[["overlay2.metacopy","off"],["overlay2.redirect_dir","off"]]"#);
    assert_eq!(options(variable, "--storage-opt overlay2.volatile=off"), r#"[["overlay2.volatile","off"]]"#);

    home.ok("echo '{\"debug\": true}' > debug.json");
    let logs = |prefix: &str, flags: &str| {
        home.ok(&format!(
            "{prefix} graphdriver --config debug.json {flags} info 2>&1 >/dev/null | grep -c DEBUG || true"
        )) != "0\n"
    };
    assert!(logs("", ""));
    assert!(!logs("GRAPHDRIVER_DEBUG=false", ""), "the variable beats the file");
    assert!(logs("GRAPHDRIVER_DEBUG=0", "-D"), "the flag beats the variable");
    assert!(!logs("GRAPHDRIVER_DEBUG=1", "--debug=false"));

    home.ok("echo '{\"storage-driver\": \"zfs\"}' > zfs.json; graphdriver --config zfs.json -s overlay2 info");
    home.fails(6, "graphdriver --config zfs.json info", &["storage driver zfs"]);
    home.fails(6, "GRAPHDRIVER_STORAGE_DRIVER=btrfs graphdriver --config zfs.json info", &["storage driver btrfs"]);
}

#[test]
fn unknown_settings_are_errors_that_list_the_known_ones() {
    needs_root!("unknown_settings_are_errors_that_list_the_known_ones");
    let home = Home::new();
    home.ok("echo '{\"data-rot\": 1}' > key.json; echo '{' > broken.json; echo '{\"debug\": \"x\"}' > type.json");
    let keys = ["data-rot", "data-root", "storage-driver", "storage-opts", "debug", "key.json"];
    home.fails(2, "graphdriver --config key.json info", &keys);
    home.fails(2, "graphdriver --config broken.json info", &["broken.json", "line 2"]);
    home.fails(2, "graphdriver --config type.json info", &["boolean"]);
    home.fails(3, "graphdriver --config gone.json info", &["gone.json"]);
    let drivers = ["aufs", "overlay2, btrfs, zfs, devicemapper, vfs-fuse"];
    home.fails(2, "graphdriver -s aufs info", &drivers);
    let options = ["overlay2.colour", "overlay2.size", "overlay2.redirect_dir", "overlay2.metacopy"];
    home.fails(2, "graphdriver --storage-opt overlay2.colour=red info", &options);
    home.fails(2, "GRAPHDRIVER_STORAGE_OPTS=overlay2.colour=red graphdriver info", &options);
    home.fails(2, "graphdriver --storage-opt overlay2.metacopy=maybe info", &["maybe", "on and off"]);
    home.fails(2, "graphdriver --storage-opt size info", &["NAME=VALUE"]);
    home.fails(2, "graphdriver --storage-opt overlay2.colour=red info --storage-opt overlay2.metacopy=on", &options);
    home.fails(2, "graphdriver --storage-opt overlay2.colour=red drivers", &["overlay2.colour", "overlay2.metacopy"]);
    let twice = "graphdriver --storage-opt overlay2.metacopy=on info --storage-opt overlay2.metacopy=off";
    home.fails(2, twice, &["overlay2.metacopy", "twice", "\"on\"", "\"off\""]);
    home.fails(2, "graphdriver create --storage-opt size=1G --storage-opt size=2G x", &["size", "twice"]);
    home.fails(2, "graphdriver create --storage-opt size=0 x", &["size=0", "limit of 0"]);
    home.fails(6, "graphdriver --storage-opt overlay2.size=1G info", &["overlay2.size", "quota"]);
    home.fails(2, "graphdriver --format xml images", &["table, json"]);
    home.fails(2, "graphdriver imags", &["images"]);
}

#[test]
fn drivers_and_info_tell_what_works_here() {
    needs_root!("drivers_and_info_tell_what_works_here");
    let home = Home::with_container();
    let drivers = home.json("drivers");
    let names: Vec<_> = drivers.as_array().unwrap().iter().map(|d| d["Name"].as_str().unwrap()).collect();
    assert_eq!(names, ["overlay2", "btrfs", "zfs", "devicemapper", "vfs-fuse"]);
    for driver in drivers.as_array().unwrap() {
        let told = if driver["Usable"] == true { &driver["Capabilities"] } else { &driver["Unmet"]["remedy"] };
        assert!(!told.is_null(), "{driver}");
    }
    assert_eq!(drivers[0]["Capabilities"]["write_strategy"]["strategy"], "copy-up");
    let info = home.json("info");
    for (key, count) in [("Images", 1), ("Containers", 1), ("Layers", 3), ("Mounts", 0)] {
        assert_eq!(info[key], count, "{key}");
    }
    let text = home.ok("graphdriver info");
    assert!(text.starts_with("Storage Driver: overlay2\n"), "{text}");
    for line in ["Data Root: ", " Filesystem: ", "Kernel Version: ", "Storage Options: none", "Native Diff: "] {
        assert!(text.lines().any(|l| l.starts_with(line)), "{line}: {text}");
    }
}

#[test]
fn load_takes_files_pipes_and_several_images() {
    needs_root!("load_takes_files_pipes_and_several_images");
    let home = Home::new();
    assert_eq!(home.ok("graphdriver load -i demo.tar"), "Loaded image: demo:1\nLoaded image: demo:latest\n");
    let ids = home.ok("cat both.tar | graphdriver load -q");
    assert_eq!(ids.lines().map(str::len).collect::<Vec<_>>(), [ID, ID]);
    assert_eq!(home.ok("graphdriver load -q -i - < both.tar"), ids);
    assert_eq!(home.ok("gzip -c both.tar | graphdriver load -q"), ids);
    assert_eq!(home.ok("zstd -qc both.tar > z; graphdriver load -q -i z"), ids);
    assert_eq!(home.ok("mkdir d; tar xf both.tar -C d; tar cf d.tar -C d .; graphdriver load -q -i d.tar"), ids);
    let loaded = home.json("load -i both.tar");
    assert_eq!((loaded.as_array().unwrap().len(), &loaded[0]["NewLayers"]), (2, &Value::from(0)));
    assert_eq!(home.json("images").as_array().unwrap().len(), 3);
}

#[test]
fn what_cannot_be_loaded_says_why_and_leaves_nothing() {
    needs_root!("what_cannot_be_loaded_says_why_and_leaves_nothing");
    let home = Home::new();
    home.fails(3, "graphdriver load -i gone.tar", &["gone.tar", "No such file"]);
    home.fails(2, "graphdriver load -i rootfs.tar", &["graphdriver import"]);
    home.fails(2, "head -c 3000 /dev/urandom > junk; graphdriver load -i junk", &["junk", "docker save"]);
    home.fails(2, "mkdir d; graphdriver load -i d", &["index.json"]);
    home.fails(2, "graphdriver load < /dev/null", &["standard input"]);
    home.fails(9, "head -c 12000 demo.tar | graphdriver load", &["standard input"]);
    // One byte inside a layer's file changes its digest, and nothing else.
    let at = "at=$(grep -abo kkkkkkkkkk demo.tar | sed -n 1p | cut -d: -f1)";
    let script =
        format!("{at}; printf X | dd of=demo.tar bs=1 seek=$at conv=notrunc status=none; graphdriver load -i demo.tar");
    home.fails(9, &script, &["loading layer sha256:", "digest"]);
    assert_eq!(home.json("images"), Value::Array(vec![]));
    assert_eq!(home.json("info")["Layers"], 0);
    assert_eq!(home.ok("ls root/overlay2/data | grep -c '^[0-9]' || true"), "0\n");
}

#[test]
fn images_lists_names_ids_digests_and_sizes() {
    needs_root!("images_lists_names_ids_digests_and_sizes");
    let home = Home::new();
    home.ok("graphdriver load -qi both.tar");
    let table = home.ok("graphdriver images");
    let header: Vec<_> = table.lines().next().unwrap().split("   ").map(str::trim).filter(|s| !s.is_empty()).collect();
    assert_eq!(header, ["REPOSITORY", "TAG", "IMAGE ID", "CREATED", "SIZE"]);
    assert_eq!(table.lines().count(), 4);
    let short = home.ok("graphdriver images -q");
    let long = home.ok("graphdriver images -q --no-trunc");
    assert_eq!(short.lines().map(str::len).collect::<Vec<_>>(), [12, 12], "an image once, whatever names it has");
    for (short, long) in short.lines().zip(long.lines()) {
        assert!(long.strip_prefix("sha256:").unwrap().starts_with(short));
    }
    assert!(home.ok("graphdriver images --digests").contains("<none>"));
    home.ok(
        "graphdriver save --output-type oci -o oci.tar demo; graphdriver rmi demo:1 demo; graphdriver load -qi oci.tar",
    );
    let with = home.json("images --digests");
    let digest = with[0]["Digest"].as_str().unwrap();
    assert_eq!(digest.len(), ID);
    assert!(home.ok("graphdriver images --digests").contains(digest));

    // Unnamed images: those another one was committed from only with -a.
    home.ok("graphdriver create --name c demo; graphdriver commit c mid; graphdriver create --name d mid
        graphdriver commit d top; graphdriver rmi -f mid");
    let unnamed = |all: &str| home.ok(&format!("graphdriver images {all}")).matches("<none>").count();
    assert_eq!((unnamed(""), unnamed("-a")), (0, 2));
}

#[test]
fn inspect_shows_images_and_containers_as_docker_does() {
    needs_root!("inspect_shows_images_and_containers_as_docker_does");
    let home = Home::with_container();
    let image = &home.json("inspect demo:1")[0];
    let layers: Vec<_> = common::demo().layers.iter().map(|l| format!("sha256:{}", common::sha256(l))).collect();
    assert_eq!(image["RootFS"]["Layers"], Value::from(layers));
    assert_eq!(image["RepoTags"], Value::from(vec!["demo:1", "demo:latest"]));
    assert_eq!((&image["Config"]["Cmd"][0], &image["Architecture"]), (&"/bin/sh".into(), &"amd64".into()));
    assert_eq!(image["GraphDriver"]["Name"], "overlay2");
    let container = &home.json("inspect c")[0];
    assert_eq!((&container["Name"], &container["Image"]), (&"c".into(), &image["Id"]));
    home.ok("graphdriver inspect --type image demo; graphdriver inspect --type container c");
    // A container's name goes before an image's.
    home.ok("graphdriver tag demo c");
    assert_eq!(home.json("inspect c")[0]["Name"], "c");
    assert_eq!(home.json("inspect --type image c")[0]["Id"], image["Id"]);
    assert_eq!(home.fails(3, "graphdriver inspect --type container demo", &["no container \"demo\""]), "[]\n");
    let found = home.fails(3, "graphdriver inspect demo gone c", &["\"gone\""]);
    assert_eq!(serde_json::from_str::<Value>(&found).unwrap().as_array().unwrap().len(), 2, "the others are shown");
    // Ids and the beginnings of ids are names too.
    let id = container["Id"].as_str().unwrap();
    assert_eq!(home.json(&format!("inspect {}", &id[..8]))[0]["Id"], id);
    let id = image["Id"].as_str().unwrap();
    assert_eq!(home.json(&format!("inspect {id} {}", &id[7..15])).as_array().unwrap().len(), 2);
}

#[test]
fn history_has_a_size_for_every_step() {
    needs_root!("history_has_a_size_for_every_step");
    let home = Home::with_container();
    home.ok("graphdriver cp both.tar c:/; graphdriver commit -m 'why not' c more");
    let steps = home.json("history more");
    let steps: Vec<_> = steps.as_array().unwrap().iter().map(|s| s["CreatedBy"].as_str().unwrap()).collect();
    assert_eq!(steps, ["graphdriver commit", "CMD sh", "COPY motd", "ADD base"]);
    let table = home.ok("graphdriver history more");
    let lines: Vec<_> = table.lines().collect();
    assert!(lines[1].ends_with("why not") && lines[2].contains(" 0B"), "{table}");
    let sizes = home.json("history more");
    let sum: u64 = sizes.as_array().unwrap().iter().map(|s| s["Size"].as_u64().unwrap()).sum();
    assert_eq!(home.json("inspect more")[0]["Size"], sum);
    home.fails(3, "graphdriver history gone", &["gone"]);
}

#[test]
fn names_are_given_taken_and_refused() {
    needs_root!("names_are_given_taken_and_refused");
    let home = Home::new();
    home.ok("graphdriver load -qi both.tar; graphdriver tag demo localhost:5000/team/app:v1; graphdriver tag other:1 demo:1");
    let id = |name: &str| home.json(&format!("inspect {name}"))[0]["Id"].clone();
    assert_eq!(id("localhost:5000/team/app:v1"), id("demo"));
    assert_eq!(id("demo:1"), id("other:1"), "a name moves to the image it is given to");
    home.fails(2, "graphdriver tag demo Upper", &["lower case"]);
    home.fails(2, "graphdriver tag demo a:b:c", &["a:b:c"]);
    home.fails(3, "graphdriver tag gone x", &["gone", "graphdriver images"]);
    let out = home.fails(3, "graphdriver rmi demo:1 gone", &["gone"]);
    assert_eq!(out, "Untagged: demo:1\n", "one failure does not keep the others from being done");
    let id = home.ok("graphdriver images -q | tail -1");
    home.fails(5, &format!("graphdriver rmi {id}"), &["several names", "-f"]);
    let out = home.ok(&format!("graphdriver rmi -f {id}"));
    assert_eq!((out.matches("Untagged").count(), out.matches("Deleted").count()), (2, 1), "{out}");
    let removed = home.json("rmi other:1");
    assert_eq!((removed.as_array().unwrap().len(), &removed[0]["Untagged"]), (2, &"other:1".into()));
    assert_eq!(home.json("info")["Layers"], 0);
}

#[test]
fn images_in_use_lose_at_most_their_names() {
    needs_root!("images_in_use_lose_at_most_their_names");
    let home = Home::with_container();
    home.fails(5, "graphdriver rmi demo:1 demo", &["container c", "-f"]);
    assert_eq!(home.ok("graphdriver rmi -f demo"), "Untagged: demo:latest\n");
    assert_eq!(home.ok("graphdriver image prune -a"), "Total reclaimed space: 0B\n");
    assert_eq!(home.ok("graphdriver cp c:/etc/motd - | tar xO"), "hello\n");
    home.ok("graphdriver rm c");
    let pruned = home.ok("graphdriver image prune");
    assert!(pruned.starts_with("Deleted: sha256:") && !pruned.contains(" 0B"), "{pruned}");
    home.ok("graphdriver load -qi both.tar; graphdriver create --name c demo");
    assert_eq!(home.ok("graphdriver image prune"), "Total reclaimed space: 0B\n", "named images stay");
    assert!(home.ok("graphdriver image prune -a").starts_with("Untagged: other:1\n"));
    assert_eq!(home.json("images").as_array().unwrap().len(), 2);
    // A mount keeps an image as well.
    home.ok("graphdriver rm c; mkdir m; graphdriver mount demo m; graphdriver rmi demo:1
        if graphdriver rmi demo 2> said; then exit 1; fi; grep -q 'mount at' said");
}

#[test]
fn import_makes_an_image_of_any_root_filesystem_tar() {
    needs_root!("import_makes_an_image_of_any_root_filesystem_tar");
    let home = Home::new();
    home.ok(
        "gzip -k rootfs.tar; zstd -qk rootfs.tar; graphdriver import rootfs.tar a; graphdriver import rootfs.tar.gz b
        graphdriver import - c:2 < rootfs.tar.zst; cat rootfs.tar | graphdriver import -",
    );
    let ids: Vec<_> =
        ["a", "b", "c:2"].iter().map(|n| home.json(&format!("inspect {n}"))[0]["RootFS"].clone()).collect();
    assert_eq!(ids[0], ids[1]);
    assert_eq!(ids[0], ids[2]);
    assert_eq!(home.json("info")["Layers"], 1, "the same layer is kept once");
    assert!(home.ok("graphdriver images").contains("<none>"));
    let changes = r#"-c 'CMD ["a", "b"]' -c 'ENTRYPOINT echo hi' -c 'ENV A=1 B="two words"' -c 'EXPOSE 80 53/udp' \
        -c 'LABEL k=v' -c 'USER 1:2' -c 'VOLUME /v' -c 'WORKDIR /srv' -c 'ONBUILD RUN x' -c 'STOPSIGNAL SIGINT'"#;
    home.ok(&format!("graphdriver import {changes} -m 'a note' rootfs.tar d"));
    let image = &home.json("inspect d")[0];
    let config = &image["Config"];
    // As in a Dockerfile an entry point does away with arguments set before it, but not with those of the same build.
    assert_eq!(config["Cmd"], Value::from(vec!["a", "b"]));
    assert_eq!(config["Entrypoint"], Value::from(vec!["/bin/sh", "-c", "echo hi"]));
    assert_eq!(config["Env"], Value::from(vec!["A=1", "B=two words"]));
    assert!(config["ExposedPorts"]["80/tcp"].is_object() && config["ExposedPorts"]["53/udp"].is_object());
    assert_eq!(
        (&config["Labels"]["k"], &config["User"], &config["WorkingDir"]),
        (&"v".into(), &"1:2".into(), &"/srv".into())
    );
    assert!(config["Volumes"]["/v"].is_object());
    assert_eq!((&config["OnBuild"][0], &config["StopSignal"]), (&"RUN x".into(), &"SIGINT".into()));
    assert_eq!(image["Comment"], "a note");
    home.fails(2, "graphdriver import -c 'RUN make' rootfs.tar", &["RUN", "CMD, ENTRYPOINT, ENV"]);
    home.fails(2, "graphdriver import rootfs.tar Upper", &["lower case"]);
    home.fails(3, "graphdriver import gone.tar", &["gone.tar"]);
    home.fails(9, "head -c 2000 rootfs.tar | graphdriver import -", &["importing"]);
    assert_eq!(home.json("images").as_array().unwrap().len(), 5);
}

#[test]
fn save_writes_what_load_reads_with_the_same_layers() {
    needs_root!("save_writes_what_load_reads_with_the_same_layers");
    let home = Home::new();
    let ids = home.ok("graphdriver load -qi both.tar");
    for kind in ["docker", "oci"] {
        let script = format!(
            "graphdriver save --output-type {kind} -o {kind}.tar demo:1 other:1
            graphdriver save --output-type {kind} demo:1 other:1 | cmp - {kind}.tar
            graphdriver --root {kind} load -qi {kind}.tar; tar xOf {kind}.tar --wildcards 'blobs/*' | sha256sum"
        );
        assert!(home.ok(&script).starts_with(&ids), "{kind}");
        let names =
            home.ok(&format!("graphdriver --root {kind} images | tail -n +2 | awk '{{print $1 \":\" $2}}' | sort"));
        assert_eq!(names, "demo:1\nother:1\n", "only the names asked for");
        // An image asked for by its id comes with all its names.
        home.ok(&format!(
            "graphdriver save --output-type {kind} $(graphdriver images -q | tail -1) > all.tar
            graphdriver load -i all.tar | grep -q demo:latest"
        ));
    }
    for layer in common::demo().layers {
        let name = format!("blobs/sha256/{}", common::sha256(&layer));
        home.ok(&format!("tar xOf docker.tar {name} > layer"));
        assert_eq!(std::fs::read(home.path().join("layer")).unwrap(), layer, "the very bytes");
    }
    home.fails(3, "graphdriver save -o x.tar demo gone", &["gone"]);
    home.fails(3, "graphdriver save -o no/dir/x.tar demo", &["no/dir/x.tar"]);
    assert_eq!(home.ok("ls -A | grep -c -e x.tar -e '^[.]graphdriver' || true"), "0\n", "no half-written file");
    home.fails(2, "script -qec 'graphdriver save demo' /dev/null 2>&1 | tee said >&2; exit 2", &["terminal"]);
}

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

#[test]
fn mount_shows_images_and_containers_where_it_is_told_to() {
    needs_root!("mount_shows_images_and_containers_where_it_is_told_to");
    let home = Home::with_container();
    home.ok("mkdir m n; graphdriver mount demo m; test -f m/etc/motd; if touch m/x 2> /dev/null; then exit 1; fi
        graphdriver mount --read-only c n; if touch n/x 2> /dev/null; then exit 1; fi; graphdriver umount n
        graphdriver mount c n; touch n/x; graphdriver mounts; graphdriver umount m n; test -z \"$(ls m n | grep x)\"");
    // The same container twice is the same filesystem.
    home.ok("graphdriver mount c m; graphdriver mount c n; echo 1 > m/both; grep -qx 1 n/both; graphdriver umount c
        test -z \"$(grep $PWD/ /proc/self/mountinfo)\"");
    home.ok("graphdriver mount c m; graphdriver mount demo m; graphdriver umount m; touch m/x; graphdriver umount m");
    home.fails(5, "graphdriver mount -r c m > out; graphdriver mount c n", &["read-only at", "unmount"]);
    home.fails(5, "graphdriver mount -r c m > out; graphdriver cp demo.tar c:/", &["read-only at", "unmount"]);
    home.fails(3, "graphdriver mount c gone", &["gone", "mkdir"]);
    home.fails(2, "graphdriver mount c demo.tar", &["demo.tar", "Not a directory"]);
    home.fails(3, "graphdriver mount gone m", &["gone", "graphdriver images"]);
    home.fails(2, "mkdir -p root/x; graphdriver mount c root/x", &["data root"]);
    home.fails(2, "graphdriver mount c .", &["data root"]);
}

#[test]
fn umount_takes_directories_as_they_are_typed_and_names() {
    needs_root!("umount_takes_directories_as_they_are_typed_and_names");
    let home = Home::with_container();
    for way in [
        "cd /; graphdriver umount $home/m",
        "cd m/..; graphdriver umount m/",
        "mkdir -p x; cd x; graphdriver umount ../m",
        "ln -sfn m link; graphdriver umount link",
        "graphdriver umount c",
        "graphdriver unmount ./m/.",
    ] {
        home.ok(&format!("mkdir -p m; home=$PWD; graphdriver mount c m; {way}; test -z \"$(ls $home/m)\""));
    }
    home.fails(3, "graphdriver umount c", &["not mounted", "graphdriver mounts"]);
    home.fails(3, "graphdriver umount m", &["mounted nothing at"]);
    home.fails(3, "graphdriver umount gone", &["gone"]);
    home.fails(3, "graphdriver umount ./gone", &["no such directory", "graphdriver mounts"]);
    home.fails(5, "graphdriver mount c m; cd m; graphdriver umount c", &["busy", "--lazy"]);
    home.ok("graphdriver mount c m; (cd m; graphdriver umount --lazy c; test -f etc/motd); test -z \"$(ls m)\"");
    // Unmounted behind the program's back, or gone with its namespace: no phantom is left.
    home.ok("graphdriver mount c m; umount m");
    home.ok("graphdriver mount c m");
    assert_eq!(home.ok("graphdriver --format json mounts"), "[]\n");
    home.ok("graphdriver rm c");
}

#[test]
fn mounts_and_ps_tell_what_is_mounted_where() {
    needs_root!("mounts_and_ps_tell_what_is_mounted_where");
    let home = Home::with_container();
    let told = home
        .ok("mkdir m n; graphdriver mount c m > out; graphdriver mount demo n > out; graphdriver --format json mounts");
    let mounts: Value = serde_json::from_str(&told).unwrap();
    let of = |at: usize| {
        (mounts[at]["Type"].as_str().unwrap(), mounts[at]["Name"].as_str().unwrap(), &mounts[at]["Writable"])
    };
    assert_eq!((of(0), of(1)), (("container", "c", &true.into()), ("image", "demo:1", &false.into())));
    let table = home.ok("graphdriver mount c m > out; graphdriver mounts; graphdriver ps; graphdriver inspect c");
    assert!(table.contains("read-write") && table.matches("/m ").count() == 2 && table.contains("/m\""), "{table}");
}

#[test]
fn the_sums_of_df_add_up() {
    needs_root!("the_sums_of_df_add_up");
    let home = Home::with_container();
    home.ok("graphdriver load -qi both.tar; graphdriver cp both.tar c:/; graphdriver create --name d other:1");
    let (totals, all) = (home.json("df"), home.json("df -v"));
    let sum =
        |list: &str, key: &str| all[list].as_array().unwrap().iter().map(|i| i[key].as_u64().unwrap()).sum::<u64>();
    for image in all["Images"].as_array().unwrap() {
        let number = |key: &str| image[key].as_u64().unwrap();
        assert_eq!(number("Size"), number("Shared") + number("Unique"));
    }
    // Both images share just their base, so it is in each one's shared size and once in the total.
    let shared = all["Images"][0]["Shared"].as_u64().unwrap();
    assert!(shared > 0);
    assert_eq!(totals[0]["Size"], sum("Images", "Unique") + shared);
    assert_eq!(totals[1]["Size"], sum("Containers", "Size"));
    assert!(sum("Containers", "Size") > std::fs::metadata(home.path().join("both.tar")).unwrap().len());
    assert_eq!((&totals[0]["Reclaimable"], &totals[1]["Reclaimable"]), (&0.into(), &totals[1]["Size"]));
    home.ok("graphdriver rm d");
    let unique = home.json("df -v")["Images"].as_array().unwrap().iter().find(|i| i["Names"][0] == "other:1").unwrap()
        ["Unique"]
        .clone();
    assert_eq!(home.json("df")[0]["Reclaimable"], unique, "what nothing but an unused image needs");
    let before = home.json("df")[0]["Size"].as_u64().unwrap();
    home.ok("graphdriver image prune -a");
    assert_eq!(before - home.json("df")[0]["Size"].as_u64().unwrap(), unique.as_u64().unwrap());
    let table = home.ok("graphdriver df; graphdriver df -v");
    for word in ["RECLAIMABLE", "SHARED SIZE", "UNIQUE SIZE", "Images", "Containers", "demo:1, demo:latest"] {
        assert!(table.contains(word), "{word}: {table}");
    }
}

#[test]
fn events_are_remembered_and_filtered() {
    needs_root!("events_are_remembered_and_filtered");
    let home = Home::with_container();
    home.ok("mkdir m; graphdriver mount c m; graphdriver umount m; graphdriver rename c d; graphdriver commit d new
        graphdriver rm d; graphdriver rmi new");
    let actions = |arguments: &str| {
        let text = home.ok(&format!("graphdriver --format json events {arguments}"));
        let event = |line: &str| serde_json::from_str::<Value>(line).unwrap()["Action"].as_str().unwrap().to_owned();
        text.lines().map(event).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(actions(""), "load tag tag create mount unmount rename commit tag destroy untag delete");
    assert_eq!(actions("--filter type=container"), "create mount unmount rename destroy");
    assert_eq!(actions("--filter type=image --filter event=tag --filter event=load"), "load tag tag tag");
    assert_eq!(actions("--filter image=new"), "commit tag untag");
    assert_eq!(actions("--until 2001-01-01T00:00:00Z"), "");
    assert_eq!(actions("--since 1h --filter container=d"), "rename destroy");
    let lines = home.ok("graphdriver events --since 1h");
    assert!(
        lines.lines().all(|l| l.split(' ').next().unwrap().len() == "2026-01-31T12:00:00.000000000Z".len()),
        "{lines}"
    );
    home.fails(2, "graphdriver events --filter colour=red", &["colour", "type="]);
    home.fails(2, "graphdriver events --since yesterday", &["yesterday", "10m"]);
    home.fails(2, "graphdriver events --since 1m --until 1h", &["later"]);
}

#[test]
fn events_follow_sees_another_process_within_a_second() {
    needs_root!("events_follow_sees_another_process_within_a_second");
    let home = Home::new();
    home.ok("graphdriver load -qi demo.tar");
    let mut follower = home.shell("exec graphdriver events --follow --filter event=tag --filter image=demo:2");
    let mut follower = follower.stdout(Stdio::piped()).process_group(0).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(500));
    home.ok("graphdriver tag demo demo:2");
    let tagged = Instant::now();
    let mut line = String::new();
    BufReader::new(follower.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let late = tagged.elapsed();
    let pid = rustix::process::Pid::from_child(&follower);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    assert!(follower.wait().unwrap().success(), "an interrupt is how following ends");
    assert!(line.contains("image tag") && late < Duration::from_secs(1), "{late:?}: {line}");
}

#[test]
fn completions_and_manual_pages_come_out_of_the_program() {
    let home = Home::new();
    let run = |arguments: &str| {
        let output = std::process::Command::new(common::GRAPHDRIVER).args(arguments.split(' ')).output().unwrap();
        assert!(output.status.success(), "{arguments}");
        String::from_utf8(output.stdout).unwrap()
    };
    for (shell, mark) in
        [("bash", "complete -F _graphdriver"), ("zsh", "#compdef graphdriver"), ("fish", "complete -c graphdriver")]
    {
        let script = run(&format!("completions {shell}"));
        assert!(script.contains(mark) && script.contains("storage-driver"), "{shell}");
    }
    assert!(run("man").contains(".TH graphdriver 1"));
    let dir = home.path().join("man");
    run(&format!("man -o {}", dir.display()));
    for page in ["graphdriver.1", "graphdriver-load.1", "graphdriver-image-prune.1", "graphdriver-events.1"] {
        assert!(std::fs::read_to_string(dir.join(page)).unwrap().contains(".SH"), "{page}");
    }
    assert!(run("--version").starts_with("graphdriver "));
}

/// Every command tells of itself, and the overview is what the README quotes.
#[test]
fn every_command_has_a_help_text() {
    let help = |arguments: &[&str]| {
        let output = std::process::Command::new(common::GRAPHDRIVER).args(arguments).output().unwrap();
        (output.status.code(), String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap())
    };
    let (code, overview) = help(&["--help"]);
    assert_eq!(code, Some(0));
    let commands: Vec<_> = overview
        .lines()
        .skip_while(|l| *l != "Commands:")
        .skip(1)
        .take_while(|l| !l.is_empty())
        .filter(|l| l.starts_with("  ") && !l.starts_with("   "))
        .map(|l| l.split_whitespace().next().unwrap())
        .collect();
    for command in
        "drivers info load save import export images inspect history tag rmi image create ps rename rm diff cp \
                    commit mount umount mounts df events completions man"
            .split_whitespace()
    {
        assert!(commands.contains(&command), "{command}: {commands:?}");
        let (code, text) = help(&[command, "--help"]);
        assert_eq!(code, Some(0));
        assert!(text.contains(&format!("Usage: graphdriver {command}")), "{text}");
        assert!(text.lines().next().unwrap().len() > 10, "{command} says what it is for: {text}");
    }
    let (code, text) = help(&[]);
    assert_eq!((code, text.contains("Commands:")), (Some(2), true), "{text}");
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    needs_root!("a_reader_that_goes_away_is_no_error");
    let home = Home::with_container();
    for command in
        ["images", "--format json inspect demo", "events", "--help", "diff c", "completions bash", "man", "df -v"]
    {
        // `:` reads nothing at all.
        home.ok(&format!("set +o pipefail; graphdriver {command} | head -c 1 > /dev/null; graphdriver {command} | :"));
    }
}

/// `set -o pipefail; graphdriver save … | …` took half an archive for a whole one.
#[test]
fn an_archive_cut_short_by_its_reader_is_an_error() {
    needs_root!("an_archive_cut_short_by_its_reader_is_an_error");
    let home = Home::with_container();
    for command in ["export c", "save demo", "cp c:/ -"] {
        home.fails(1, &format!("set -o pipefail; graphdriver {command} | (exec <&-; sleep 0.5)"), &["went away"]);
    }
}

#[test]
fn progress_is_for_terminals_only() {
    needs_root!("progress_is_for_terminals_only");
    let home = Home::new();
    // A source that takes its time: a bar need not show for what is over at once.
    let slow = "(head -c 1000 rootfs.tar; sleep 0.5; tail -c +1001 rootfs.tar) | graphdriver import -";
    let terminal = home.ok(&format!("script -qec '{slow}' /dev/null"));
    assert!(terminal.contains("B/s") && terminal.contains("sha256:"), "{terminal:?}");
    let redirected = home.ok(&format!("script -qec '{slow} 2> err' /dev/null; cat err"));
    assert!(!redirected.contains("B/s"), "only standard error counts: {redirected:?}");
    home.ok(slow);
}

#[test]
fn every_list_is_valid_json() {
    needs_root!("every_list_is_valid_json");
    let home = Home::with_container();
    for list in
        ["drivers", "images", "images -a --digests", "history demo", "ps", "ps --size", "diff c", "mounts", "df"]
    {
        assert!(home.json(list).is_array(), "{list}");
    }
    for document in ["info", "df -v", "load -i demo.tar", "commit c new", "create demo", "rmi new", "import rootfs.tar"]
    {
        home.json(document);
    }
    assert!(home.ok("GRAPHDRIVER_FORMAT=json graphdriver ps").starts_with('['));
}

#[test]
fn a_root_that_cannot_be_used_is_told_with_what_to_do() {
    needs_root!("a_root_that_cannot_be_used_is_told_with_what_to_do");
    let home = Home::new();
    home.fails(6, "graphdriver --root demo.tar/x info", &["demo.tar"]);
    home.fails(
        6,
        "chmod 755 .; mkdir -m 755 r; setpriv --reuid 65534 --clear-groups graphdriver --root r info 2> said ||
        { c=$?; cat said >&2; exit $c; }",
        &["r"],
    );
    home.ok("mkdir -p two/overlay2 two/btrfs; touch two/overlay2/store.db two/btrfs/store.db");
    home.fails(2, "graphdriver --root two info", &["overlay2, btrfs", "--storage-driver"]);
}

#[test]
fn where_the_size_is_known_progress_is_a_bar() {
    needs_root!("where_the_size_is_known_progress_is_a_bar");
    let home = Home::new();
    // Long enough for a bar to move.
    home.ok("truncate -s 300M big; tar cf big.tar big");
    for command in ["import big.tar big:1", "save -o saved.tar big:1", "load -i saved.tar"] {
        let terminal = home.ok(&format!("script -qec 'graphdriver {command}' /dev/null"));
        assert!(terminal.contains("/300.0") && terminal.contains('█'), "{command}: {terminal:?}");
        if command.starts_with("save") {
            home.ok("graphdriver rmi big:1");
        }
    }
}

#[test]
fn an_interrupt_ends_a_read_from_a_pipe_that_sends_nothing() {
    needs_root!("an_interrupt_ends_a_read_from_a_pipe_that_sends_nothing");
    let home = Home::with_container();
    home.ok("mkfifo pipe; graphdriver info > before");
    for command in ["load < pipe", "load -i pipe", "import - < pipe", "import pipe", "cp - c:/etc < pipe"] {
        for (signal, writer) in [("INT", "head -c 1000 demo.tar >&3"), ("TERM", ":")] {
            // The writer is this shell itself, which holds the pipe open and sends no more.
            let script = format!(
                "exec 3<> pipe; {writer}; graphdriver {command} 2> said & pid=$!; sleep 0.5
                kill -{signal} $pid; date +%s%N > killed; wait $pid && code=0 || code=$?
                late=$((($(date +%s%N) - $(cat killed)) / 1000000)); echo $code $((late < 1000)); cat said"
            );
            let told = home.ok(&script);
            assert!(told.starts_with("130 1\n") && told.contains("interrupted"), "{command} {signal}: {told}");
        }
    }
    home.ok("graphdriver info > after; diff <(grep -v Free: before) <(grep -v Free: after)");
    // Without anybody at the other end not even opening it ends.
    let alone = "graphdriver load -i pipe & pid=$!; sleep 0.5; kill $pid; wait $pid";
    home.fails(130, alone, &["interrupted"]);
}

#[test]
fn an_output_file_is_made_as_other_programs_make_it() {
    needs_root!("an_output_file_is_made_as_other_programs_make_it");
    let home = Home::with_container();
    let made = |before: &str, path: &str| {
        home.ok(&format!(
            "{before}; graphdriver save -o {path} demo; graphdriver export -o {path}.2 c
            graphdriver load -qi {path} > /dev/null; stat -c %a {path} {path}.2; ls -A | grep ^.graphdriver || true"
        ))
    };
    assert_eq!(made("umask 027", "masked"), "640\n640\n", "the umask counts");
    assert_eq!(made("umask 022; touch kept; chmod 600 kept", "kept"), "600\n644\n", "and what the file kept to itself");
    let through = "mkdir d; ln -s d/x.tar link; ln -s ../link d/again; graphdriver save -o d/again demo
        readlink link d/again; test -f d/x.tar; : > d/x.tar; graphdriver save -o link demo; test -s d/x.tar; test -L link";
    assert_eq!(home.ok(through), "d/x.tar\n../link\n", "symlinks stay, whether they lead to a file or not yet");
    home.fails(2, "ln -s loop loop; graphdriver save -o loop demo", &["writing loop", "symbolic links"]);
    let synced = "strace -f -e trace=fsync,fdatasync,rename,renameat,renameat2 -o calls graphdriver save -o s.tar demo
        grep -B1 -E 'rename.*s.tar' calls | head -1 | grep -c fsync";
    if !skipped("the fsync of an output file", common::no_program(&["strace"])) {
        assert_eq!(home.ok(synced), "1\n", "content before name");
    }
}

#[test]
fn a_zstd_window_that_would_take_much_memory_is_told() {
    needs_root!("a_zstd_window_that_would_take_much_memory_is_told");
    if skipped("a_zstd_window_that_would_take_much_memory_is_told", common::no_program(&["zstd"])) {
        return;
    }
    let home = Home::new();
    home.ok("cat demo.tar | zstd -q --long=27 | graphdriver load -q; cat demo.tar | zstd -q --ultra -22 | graphdriver load -q");
    for command in ["load -q", "import -"] {
        let script = format!("cat rootfs.tar | zstd -q --long=30 | graphdriver {command}");
        home.fails(6, &script, &["128 MiB", "--long=27"]);
    }
}

/// Removes an image as soon as a load tells of its first layer.
struct Removes(std::sync::Mutex<Option<graphdriver::Engine>>);

impl graphdriver::progress::Progress for Removes {
    fn advance(&self, _: &str, _: u64, _: Option<u64>) {
        if let Some(engine) = self.0.lock().unwrap().take() {
            engine.remove_image("low", false).unwrap();
        }
    }
    fn finish(&self, _: &str) {}
}

#[test]
fn a_load_unpacks_itself_what_another_process_removes_under_it() {
    needs_root!("a_load_unpacks_itself_what_another_process_removes_under_it");
    let home = Home::new();
    let low = common::Image { layers: vec![common::demo().layers[0].clone()], steps: vec!["ADD"], names: vec!["low"] };
    std::fs::write(home.path().join("low.tar"), common::archive(&[low])).unwrap();
    home.ok("graphdriver load -qi low.tar");
    let open = || {
        let given = graphdriver::config::Given { data_root: Some(home.root()), ..Default::default() };
        graphdriver::Engine::open(graphdriver::config::Settings::resolve(given).unwrap()).unwrap()
    };
    let mut engine = open();
    engine.report_to(Box::new(Removes(Some(open()).into())));
    let archive = graphdriver::image::archive::Archive::open(
        &home.path().join("demo.tar"),
        home.path(),
        &graphdriver::progress::Cancel::default(),
    )
    .unwrap();
    let loaded = engine.load(&archive).unwrap();
    assert_eq!(loaded[0].new_layers, 2, "the lower one was there at first");
    drop(engine);
    // The upper layer implies the directory without an entry for it: its mode is the lower layer's.
    let seen =
        home.ok("mkdir m; graphdriver mount demo m > /dev/null; stat -c %a m/var/log; cat m/var/log/kept | wc -c");
    assert_eq!(seen, "750\n5000\n");
}
