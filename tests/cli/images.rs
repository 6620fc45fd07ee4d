//! Images: load, import, save, and what is listed, inspected, named and removed of them.

use crate::{
    ID,
    common::{self, Home, skipped},
};
use serde_json::Value;

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
