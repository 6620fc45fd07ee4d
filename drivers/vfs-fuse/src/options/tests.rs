use super::*;
use proptest::prelude::*;

const LAYERS: &str = "lowerdir=/a:/b,upperdir=/u,workdir=/w";

fn parsed(options: &str) -> Parsed {
    parse(&[options], None).unwrap()
}

fn config(options: &str) -> Config {
    parsed(options).config
}

#[track_caller]
fn refused(options: &str, words: &[&str]) {
    let error = parse(&[options], None).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    for word in words {
        assert!(error.to_string().contains(word), "{options}: {error}");
    }
}

fn paths(names: &[&str]) -> Vec<PathBuf> {
    names.iter().map(PathBuf::from).collect()
}

#[test]
fn layers() {
    let c = config(LAYERS);
    assert_eq!((c.lower, c.upper, c.work), (paths(&["/a", "/b"]), Some("/u".into()), Some("/w".into())));
    // Nothing said: the defaults, and read-only without an upper layer.
    let p = parsed("lowerdir=/a");
    assert_eq!(p.config, Config { lower: paths(&["/a"]), ..Config::default() });
    assert_eq!(p.mount, MountOptions { read_only: true, ..MountOptions::default() });
    assert!(!p.debug);
    assert_eq!(config("lowerdir=/a,lowerdir=/b:/c,lowerdir+=/d:e").lower, paths(&["/b", "/c", "/d:e"]));
    assert_eq!(config("").lower, paths(&[]));
}

#[test]
fn options_of_several_groups_add_up() {
    let p = parse(&["lowerdir=/a,ro", "noacl,,uidmapping=0:10:1", "rw,uidmapping=1:100:5"], Some(OsStr::new("src")))
        .unwrap();
    assert_eq!(p.config.lower, paths(&["/a"]));
    assert!(p.config.no_acl);
    let ranges = [IdRange { disk: 0, shown: 10, count: 1 }, IdRange { disk: 1, shown: 100, count: 5 }];
    assert_eq!(p.config.uids.0, ranges);
    assert_eq!(p.mount.fsname, "src");
    assert!(!parse(&[LAYERS, "ro", "rw"], None).unwrap().mount.read_only);
    assert!(parse(&[LAYERS, "rw", "ro"], None).unwrap().mount.read_only);
}

#[test]
fn escapes() {
    let c = config(r"lowerdir=/a\:b:/c\,d:/e\\:/f\054\072g:/h\9,upperdir=/u:\,v,workdir=/\w");
    assert_eq!(c.lower, paths(&["/a:b", "/c,d", r"/e\", "/f,:g", "/h9"]));
    assert_eq!((c.upper, c.work), (Some("/u:,v".into()), Some("/w".into())));
    // A backslash at the end stands for itself, and \NNN is a byte, not a character.
    assert_eq!(config(r"lowerdir=/a\").lower, paths(&[r"/a\"]));
    assert_eq!(config(r"lowerdir=/\303\244\400").lower, paths(&["/ä400"]));
}

#[test]
fn names_that_are_no_text() {
    let raw = OsStr::from_bytes(b"lowerdir=/\xff\xfe");
    assert_eq!(parse(&[raw], None).unwrap().config.lower[0].as_os_str().as_bytes(), b"/\xff\xfe");
}

#[test]
fn id_maps() {
    let c = config("uidmapping=0:1000:1:1:110000:65536,gidmapping=5:6:7");
    let ranges = [IdRange { disk: 0, shown: 1000, count: 1 }, IdRange { disk: 1, shown: 110_000, count: 65536 }];
    assert_eq!(c.uids.0, ranges);
    assert_eq!(c.gids.0, [IdRange { disk: 5, shown: 6, count: 7 }]);
    assert_eq!(config(r"uidmapping=0:1000:1\,1:110000:65536").uids, c.uids);
    config("uidmapping=0:0:4294967295");
    for bad in
        ["", "1", "0:1", "0:1:2:3", "0:1:0", "a:b:c", "0:-1:1", "+0:1:1", "0:1:4294967295", "0:1:4294967296", "0::1"]
    {
        refused(&format!("uidmapping={bad}"), &["option uidmapping", "DISK:SHOWN:COUNT"]);
    }
    refused("gidmapping", &["option gidmapping", "needs a value"]);
}

#[test]
fn squashing() {
    let squash = |options| config(options).squash;
    assert_eq!(squash("squash_to_root"), Squash { uid: Some(0), gid: Some(0) });
    assert_eq!(squash("squash_to_uid=5,squash_to_root"), Squash { uid: Some(5), gid: Some(0) });
    assert_eq!(squash("squash_to_gid=7"), Squash { uid: None, gid: Some(7) });
    assert_eq!(squash("squash_to_root=0"), Squash::default());
    refused("squash_to_uid=root", &["option squash_to_uid", "an id"]);
    refused("squash_to_uid=", &["option squash_to_uid"]);
}

#[test]
fn what_the_union_is_told() {
    let c =
        config("xattr_permissions=2,static_nlink,noacl=1,noxattrs=0,timeout=2.5,writeback=0,volatile,passthrough=0");
    assert_eq!(c.xattr_permissions, XattrPermissions::Containers);
    assert!(c.static_nlink && c.no_acl && !c.no_xattrs && !c.writeback && c.volatile && !c.passthrough);
    assert_eq!(c.timeout, Duration::from_millis(2500));
    assert!(config("fsync=0").volatile && !config("fsync=1").volatile);
    assert_eq!(config("xattr_permissions=1").xattr_permissions, XattrPermissions::Privileged);
    refused("xattr_permissions=3", &["option xattr_permissions", "0, 1, 2"]);
    refused("writeback=yes", &["option writeback", "\"yes\"", "0 or 1"]);
    for bad in ["timeout", "timeout=", "timeout=-1", "timeout=inf", "timeout=NaN", "timeout=abc", "timeout=1e300"] {
        refused(bad, &["option timeout", "seconds"]);
    }
}

#[test]
fn threads() {
    assert_eq!(config("threads=3").threads, Some(3));
    assert_eq!(config("max_threads=4").threads, Some(4));
    assert_eq!(config("threaded=0").threads, Some(1));
    assert_eq!(config("threads=3,threaded=1").threads, None);
    for bad in ["threads", "threads=0", "threads=257", "threads=x"] {
        refused(bad, &["option threads", "1 to 256"]);
    }
}

#[test]
fn waking() {
    for (name, wish) in [("auto", WakeLatency::Auto), ("on", WakeLatency::On), ("off", WakeLatency::Off)] {
        assert_eq!(config(&format!("wake_latency={name}")).wake_latency, wish);
    }
    for bad in ["wake_latency", "wake_latency=1", "wake_latency="] {
        refused(bad, &["option wake_latency", "auto, on, off"]);
    }
}

#[test]
fn copying_up() {
    for (name, mode) in
        [("auto", CopyUp::Auto), ("reflink", CopyUp::Reflink), ("extent", CopyUp::Extent), ("full", CopyUp::Full)]
    {
        assert_eq!(config(&format!("copy_up={name}")).copy_up, mode);
    }
    refused("copy_up=Full", &["option copy_up", "auto, reflink, extent, full"]);
    let rate = |options| match config(options).completion {
        Completion::Background { rate } => rate,
        Completion::AtCommit => 0,
    };
    assert_eq!(rate("complete=5M,complete=commit"), 0);
    assert_eq!(rate("complete=4096"), 4096);
    assert_eq!((rate("complete=3K"), rate("complete=50M"), rate("complete=2G")), (3 << 10, 50 << 20, 2 << 30));
    for bad in
        ["complete", "complete=", "complete=0", "complete=M", "complete=1T", "complete=-1", "complete=20000000000G"]
    {
        refused(bad, &["option complete", "\"commit\" or bytes a second"]);
    }
}

#[test]
fn how_it_is_mounted() {
    let m = parsed("ro,nodev,nosuid,noexec,relatime,sync,dirsync,auto_unmount,fsname=x\\,y,subtype=z").mount;
    assert!(m.read_only && !m.dev && !m.suid && !m.exec && !m.noatime && m.sync && m.dirsync && m.auto_unmount);
    assert_eq!((m.fsname.as_str(), m.subtype.as_str()), ("x,y", "z"));
    let m = parsed("dev,suid,exec,noatime,allow_other").mount;
    assert!(m.dev && m.suid && m.exec && m.noatime && m.allow_other);
    let m = parsed("allow_root").mount;
    assert!(m.allow_root && !m.allow_other);
    refused("allow_other,allow_root", &["allow_other and allow_root"]);
    refused("ro=1", &["option ro", "without a value"]);
    assert!(parsed("debug").debug);
}

#[test]
fn what_changes_nothing_is_taken() {
    let plain = parsed(LAYERS);
    let fuse_overlayfs = "fast_ino=1,fast_ino_check=0,ino32_t,xino=auto,plugins=a.so:b.so,threaded=1,fsync=1";
    let overlay = "redirect_dir=on,metacopy=off,index=on,nfs_export=off,uuid=null,private";
    let libfuse = "clone_fd,max_idle_threads=10,max_write=131072,default_permissions,nonempty";
    let fstab =
        "defaults,_netdev,noauto,nofail,users,x-systemd.automount,X-mount.mkdir=0755,comment=a b,lazytime,async";
    for options in [fuse_overlayfs, overlay, libfuse, fstab] {
        assert_eq!(parse(&[LAYERS, options], None).unwrap(), plain, "{options}");
    }
    refused("xino=maybe", &["option xino", "on, off, auto"]);
    refused("fast_ino=2", &["option fast_ino"]);
    refused("max_write=much", &["option max_write"]);
    refused("_netdev=1", &["option _netdev"]);
}

#[test]
fn unknown_options_are_refused() {
    for bad in ["foo", "foo=1", "Lowerdir=/a", "no acl", "=", "=x", "user_id=0", "\u{e4}"] {
        refused(bad, &["unknown option", bad.split('=').next().unwrap(), "--help"]);
    }
    refused("lowerdir", &["option lowerdir", "needs a value"]);
    for bad in ["lowerdir=", "lowerdir=:", "lowerdir=/a:", "lowerdir=/a::/b"] {
        refused(bad, &["option lowerdir", "a colon between"]);
    }
    refused("upperdir=", &["option upperdir"]);
}

#[test]
fn selinux_labels_keep_their_commas() {
    let text = br#"noacl,context="system_u:object_r:container_file_t:s0:c1,c2",ro,fscontext=a\,b,rootcontext="x"#;
    let options: Vec<_> = split_options(text).into_iter().map(|o| std::str::from_utf8(o).unwrap()).collect();
    let label = r#"context="system_u:object_r:container_file_t:s0:c1,c2""#;
    assert_eq!(options, ["noacl", label, "ro", r"fscontext=a\,b", r#"rootcontext="x"#]);
    let p = parse(&[OsStr::from_bytes(text)], None).unwrap();
    assert!(p.mount.read_only && p.config.no_acl);
}

/// All that the tables of README.md name in their first column after the command line's.
fn documented() -> Vec<&'static str> {
    let (_, tables) = include_str!("../../README.md").split_once("## Layers").unwrap();
    let rows = tables.lines().filter_map(|line| line.strip_prefix("| `")?.split(" | ").next());
    rows.flat_map(|row| row.split('`').step_by(2)).filter(|option| !option.is_empty()).collect()
}

#[test]
fn what_is_documented_is_taken_and_the_other_way_round() {
    let documented = documented();
    assert!(documented.len() > 90, "{documented:?}");
    for option in &documented {
        let option = option.replace("DISK:SHOWN:COUNT[:…]", "0:1:2").replace("=SECONDS", "=1").replace("=N", "=1");
        parse(&[&option], None).unwrap_or_else(|e| panic!("{option}: {e}"));
    }
    let names: Vec<_> = documented.iter().filter_map(|option| option.split('=').next()).collect();
    for (ignored, _) in IGNORED {
        assert!(ignored.iter().all(|name| names.contains(name)), "{ignored:?}");
    }
}

/// As podman 4.3 calls its mount program.
#[test]
fn podmans_call() {
    let home = "/home/me/.local/share/containers/storage/overlay";
    let call = format!(
        "lowerdir={home}/l/5QNT:{home}/l/ABCD,upperdir={home}/1f/diff,workdir={home}/1f/work,volatile,\
         context=\"system_u:object_r:container_file_t:s0:c1,c2\",uidmapping=0:0:1:1:100000:65536,squash_to_gid=1000"
    );
    let p = parsed(&call);
    assert_eq!(p.config.lower.len(), 2);
    assert!(p.config.volatile);
    assert_eq!((p.config.uids.0.len(), p.config.squash.gid), (2, Some(1000)));
}

/// As the kernel's callers escape: every separator in a name, and the backslash itself.
fn escape(name: &[u8]) -> Vec<u8> {
    name.iter().flat_map(|&b| if b":,\\".contains(&b) { vec![b'\\', b] } else { vec![b] }).collect()
}

fn octal(name: &[u8]) -> Vec<u8> {
    name.iter().flat_map(|b| format!("\\{b:03o}").into_bytes()).collect()
}

proptest! {
    #[test]
    fn escaped_names_come_back(
        names in prop::collection::vec(prop::collection::vec(1u8.., 1..12), 1..6), in_octal: bool,
    ) {
        let escape = |name: &Vec<u8>| if in_octal { octal(name) } else { escape(name) };
        let escaped: Vec<_> = names.iter().map(escape).collect();
        let mut text = b"noacl,lowerdir=".to_vec();
        text.extend(escaped.join(&b':'));
        text.extend_from_slice(b",upperdir=");
        text.extend(&escaped[0]);
        text.extend_from_slice(b",ro");
        let p = parse(&[OsStr::from_bytes(&text)], None).unwrap();
        let lower: Vec<_> = p.config.lower.iter().map(|l| l.as_os_str().as_bytes().to_vec()).collect();
        prop_assert_eq!(lower, names.clone());
        let upper = p.config.upper.unwrap();
        prop_assert_eq!(upper.as_os_str().as_bytes(), &names[0][..]);
        prop_assert!(p.config.no_acl && p.mount.read_only);
    }

    #[test]
    fn nothing_makes_it_panic(bytes: Vec<u8>, text in r#"[a-z_0-9=,:"\\]{0,40}"#) {
        let _ = parse(&[OsStr::from_bytes(&bytes)], None);
        let _ = parse(&[text.as_str(), "context=\"", "lowerdir=\\"], None);
        let _ = parse(&[format!("lowerdir={text},uidmapping={text},complete={text},timeout={text}")], None);
    }
}
