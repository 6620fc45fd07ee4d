//! Settings, and what the program says of the host and of a data root that it cannot use.

use crate::common::Home;
use serde_json::Value;

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
