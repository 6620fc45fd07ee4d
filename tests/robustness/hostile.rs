//! Archives that are hostile, damaged or cut short.

use crate::{
    LIMIT, assert_same_space, disk,
    support::{
        Gd, Random, errors, free_space,
        images::{Layer, archive, archive_of, gzip, random_layer, sha256},
        isolated,
    },
};
use std::{fs, path::Path};
use tar::EntryType;

/// A place that no archive may touch, and what it looked like.
struct Canary<'a>(&'a Path);

impl<'a> Canary<'a> {
    fn new(dir: &'a Path) -> Self {
        fs::create_dir(dir.join("canary")).unwrap();
        fs::write(dir.join("canary/secret"), "secret").unwrap();
        Canary(dir)
    }

    fn assert_alive(&self, when: &str) {
        use std::os::unix::fs::MetadataExt;
        let names: Vec<_> = fs::read_dir(self.0.join("canary")).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["secret"], "{when}");
        let secret = self.0.join("canary/secret");
        assert_eq!(fs::read(&secret).unwrap(), b"secret", "{when}");
        assert_eq!(fs::metadata(&secret).unwrap().nlink(), 1, "{when}");
        assert!(!Path::new("/pwned").exists() && !self.0.join("pwned").exists(), "{when}");
    }
}

/// What loading a hostile layer may come to.
enum Fate {
    /// It is refused as corrupt, and the message has this of the entry's name.
    Refused(&'static str),
    /// It means something harmless: it loads, and saves as it was.
    Harmless,
}
use Fate::{Harmless, Refused};

fn hostile_layers(canary: &str) -> Vec<(&'static str, Fate, Layer)> {
    let long = vec![b'n'; 300];
    let file = EntryType::Regular;
    let (link, symlink) = (EntryType::Link, EntryType::Symlink);
    let up = format!("../../../../../../../..{canary}/pwned");
    let entry = |name: &[u8], kind, target: &[u8]| Layer::new().raw(name, kind, target, b"");
    let beyond = |name: &str, kind, target: &str| entry(name.as_bytes(), kind, target.as_bytes());
    vec![
        ("a name that climbs", Refused(".."), Layer::new().pax("path", up.as_bytes()).file("x", b"")),
        ("a name that climbs from below", Refused(".."), Layer::new().dir("a").file("a/../../pwned", b"")),
        ("an absolute name", Harmless, Layer::new().pax("path", format!("{canary}/pwned").as_bytes()).file("x", b"")),
        ("a symlink out, by itself", Harmless, beyond("a", symlink, canary)),
        ("a file through a symlink out", Harmless, beyond("a", symlink, canary).file("a/pwned", b"")),
        ("a file through a climbing symlink", Harmless, beyond("a", symlink, "../../..").file("a/pwned", b"")),
        ("a directory through a symlink out", Harmless, beyond("a", symlink, canary).dir("a/pwned")),
        ("a hard link out", Refused("\"h\""), beyond("h", link, &format!("..{canary}/secret"))),
        ("an absolute hard link", Refused("\"h\""), beyond("h", link, &format!("{canary}/secret"))),
        (
            "a hard link through a symlink out",
            Refused("\"h\""),
            beyond("a", symlink, canary).raw(b"h", link, b"a/secret", b""),
        ),
        ("a whiteout of ..", Refused(".wh..."), entry(b"d/.wh...", file, b"")),
        ("a whiteout of .", Refused(".wh.."), entry(b"d/.wh..", file, b"")),
        ("a whiteout of nothing", Refused(".wh."), entry(b"d/.wh.", file, b"")),
        ("a whiteout through a symlink out", Harmless, beyond("a", symlink, canary).file("a/.wh.secret", b"")),
        ("a component of 300 bytes", Refused("nnnnnnn"), Layer::new().pax("path", &long).file("x", b"")),
        (
            "a size beyond the archive",
            Refused("huge"),
            Layer::new().header(b"huge", file, b"", b"", |h| h.set_size(0o77_777_777_777)),
        ),
        (
            "a size of nearly 8 EiB",
            Refused("huge"),
            Layer::new().header(b"huge", file, b"", b"", |h| h.set_size(i64::MAX as u64)),
        ),
        (
            "a negative size",
            Refused("negative"),
            Layer::new().header(b"negative", file, b"", b"", |h| h.as_old_mut().size = [0xff; 12]),
        ),
        ("a file twice", Harmless, Layer::new().file("twice", b"one").file("twice", b"two")),
        ("a file in place of a directory", Harmless, Layer::new().dir("d").file("d/f", b"").file("d", b"")),
        ("a hard link to itself", Refused("self"), entry(b"self", link, b"self")),
        (
            "a PAX record that is none",
            Refused(""),
            Layer::new().raw(b"pax", EntryType::XHeader, b"", b"99 a=b\n").file("x", b""),
        ),
        (
            "a PAX record without end",
            Refused(""),
            Layer::new().raw(b"pax", EntryType::XHeader, b"", b"8 a=b").file("x", b""),
        ),
    ]
}

#[test]
fn hostile_layers_are_refused_with_their_name_or_do_no_harm() {
    isolated("hostile::hostile_layers_are_refused_with_their_name_or_do_no_harm", LIMIT, |dir| {
        let gd = Gd::new(dir, &dir.join("root"));
        let canary = Canary::new(dir);
        let base = random_layer(1, 3, 100);
        for (what, fate, layer) in hostile_layers(&gd.path("canary")) {
            let tar = layer.tar();
            let file = gd.file("hostile.tar", &archive("localhost/hostile:1", &[&base, &tar]));
            match fate {
                Refused(entry) => {
                    let out = gd.run(&["load", "-i", &file]);
                    let text = errors(&out);
                    // What is more than the disk can hold is not even begun.
                    let code = if text.contains("are free") { 8 } else { 9 };
                    assert_eq!(out.status.code(), Some(code), "{what}: {text}");
                    let named = text.contains(&format!("layer sha256:{}", sha256(&tar))) && text.contains(entry);
                    assert!(named, "{what}: {text}");
                }
                Harmless => {
                    gd.ok(&["load", "-i", &file]);
                    gd.assert_whole("localhost/hostile:1");
                    gd.ok(&["rmi", "localhost/hostile:1"]);
                }
            }
            gd.assert_empty(what);
            canary.assert_alive(what);
            // The same as a root filesystem.
            let out = gd.run(&["import", &gd.file("hostile-rootfs.tar", &tar), "localhost/hostile:2"]);
            assert!(matches!(out.status.code(), Some(0 | 8 | 9)), "{what}: {}", errors(&out));
            gd.if_there(&["rmi", "localhost/hostile:2"]);
            gd.assert_empty(what);
            canary.assert_alive(what);
        }
    });
}

#[test]
fn what_overlayfs_would_take_as_its_own_marks_stays_plain_data() {
    isolated("hostile::what_overlayfs_would_take_as_its_own_marks_stays_plain_data", LIMIT, |dir| {
        let gd = Gd::new(dir, &dir.join("root"));
        let base =
            Layer::new().dir("d").file("d/keep", b"keep").dir("secret").file("secret/s", b"s").file("w", b"w").tar();
        let target = gd.make_dir("mnt");
        let mark = |key: &str, value: &[u8]| Layer::new().pax(key, value).dir("d").tar();
        let device = Layer::new().raw(b"w", EntryType::Char, b"", b"");
        for (what, tar) in [
            ("an opaque directory", mark("SCHILY.xattr.trusted.overlay.opaque", b"y")),
            ("a redirect", mark("SCHILY.xattr.trusted.overlay.redirect", b"/secret")),
            ("a redirect for users", mark("SCHILY.xattr.user.overlay.redirect", b"/secret")),
            ("a device 0/0", device.tar()),
        ] {
            let file = gd.file("hostile.tar", &archive("localhost/hostile:1", &[&base, &tar]));
            let out = gd.run(&["load", "-i", &file]);
            match out.status.code() {
                // A device 0/0 cannot be told from a whiteout on disk where the kernel offers no escape for it.
                Some(6 | 9) => assert!(errors(&out).contains("entry"), "{what}: {}", errors(&out)),
                Some(0) => {
                    gd.assert_whole("localhost/hostile:1");
                    gd.ok(&["mount", "localhost/hostile:1", &target]);
                    assert_eq!(fs::read_to_string(dir.join("mnt/d/keep")).unwrap(), "keep", "{what}");
                    assert!(!dir.join("mnt/d/s").exists(), "{what}");
                    assert!(fs::symlink_metadata(dir.join("mnt/w")).is_ok(), "{what}");
                    gd.ok(&["umount", &target]);
                    gd.ok(&["rmi", "localhost/hostile:1"]);
                }
                other => panic!("{what}: {other:?} {}", errors(&out)),
            }
            gd.assert_empty(what);
        }
    });
}

#[test]
fn damaged_archives_are_refused_and_leave_nothing() {
    isolated("hostile::damaged_archives_are_refused_and_leave_nothing", LIMIT, |dir| {
        let gd = Gd::new(dir, &dir.join("root"));
        let layers = [random_layer(1, 20, 300), random_layer(2, 20, 3000)];
        let ids = [sha256(&layers[0]), sha256(&layers[1])];
        let refused = |what: &str, bytes: &[u8], needle: &str| {
            let text = gd.fails(&["load", "-i", &gd.file("bad.tar", bytes)], 9);
            assert!(text.contains(needle), "{what}: {text}");
            gd.assert_empty(what);
        };
        let layer = format!("layer sha256:{}", ids[1]);

        let mut other = layers[1].clone();
        let at = other.len() / 2;
        other[at] ^= 1;
        refused("a wrong byte", &archive_of("localhost/bad:1", &[&layers[0], &other], &ids), &layer);
        let zipped = gzip(&layers[1]);
        let mut broken = zipped.clone();
        broken[zipped.len() / 2] ^= 0x55;
        refused("a wrong byte in a gzip stream", &archive_of("localhost/bad:1", &[&layers[0], &broken], &ids), &layer);
        let cut = &zipped[..zipped.len() - 10];
        refused("a gzip stream cut short", &archive_of("localhost/bad:1", &[&layers[0], cut], &ids), &layer);
        let swapped = [ids[1].clone(), ids[0].clone()];
        refused(
            "layers in the wrong order",
            &archive_of("localhost/bad:1", &[&layers[0], &layers[1]], &swapped),
            "layer",
        );
        let mut checksum = layers[1].clone();
        checksum[512 + 150] ^= 1;
        let its_id = [ids[0].clone(), sha256(&checksum)];
        let bad = archive_of("localhost/bad:1", &[&layers[0], &checksum], &its_id);
        refused("a wrong checksum in a header", &bad, &format!("layer sha256:{}", its_id[1]));
    });
}

#[test]
fn archives_cut_anywhere_are_refused_and_leave_nothing() {
    isolated("hostile::archives_cut_anywhere_are_refused_and_leave_nothing", LIMIT, |dir| {
        let gd = Gd::new(dir, &dir.join("root"));
        let whole = archive("localhost/cut:1", &[&random_layer(1, 20, 300), &random_layer(2, 20, 3000)]);
        // The last entry is manifest.json, 512 bytes of it and then two blocks of zeros, which may be missing.
        let end = whole.len() as u64 - 1024 - 512;
        let mut random = Random::new(5);
        let zipped = gzip(&whole);
        for n in 0..30 {
            let cut = random.below(end) as usize;
            let file = gd.file("cut.tar", &whole[..cut]);
            let text = match n % 3 {
                0 => gd.fails(&["load", "-i", &file], 9),
                1 => {
                    let out = gd.shell("cat cut.tar | $GD load");
                    assert_eq!(out.status.code(), Some(9), "cut at {cut}: {}", errors(&out));
                    errors(&out)
                }
                _ => {
                    let cut = cut * zipped.len() / whole.len();
                    gd.fails(&["load", "-i", &gd.file("cut.tar.gz", &zipped[..cut])], 9)
                }
            };
            assert!(text.contains("loading"), "{text}");
            gd.assert_empty(&format!("an archive cut at {cut}"));
        }
        gd.ok(&["load", "-i", &gd.file("whole.tar", &whole)]);
    });
}

#[test]
fn a_gzip_bomb_fills_no_more_than_the_disk_and_leaves_nothing() {
    isolated("hostile::a_gzip_bomb_fills_no_more_than_the_disk_and_leaves_nothing", LIMIT, |dir| {
        let gd = disk(dir, "tmpfs", 64);
        let layer = Layer::new().file("zeros", &vec![0; 300 << 20]).tar();
        let file = gd.file("bomb.tar", &archive_of("localhost/bomb:1", &[&gzip(&layer)], &[sha256(&layer)]));
        assert!(fs::metadata(&file).unwrap().len() < 4 << 20);
        gd.ok(&["images"]);
        let before = free_space(&dir.join("disk"));
        let text = gd.fails(&["load", "-i", &file], 8);
        assert!(text.contains(&format!("layer sha256:{}", sha256(&layer))) && text.contains("zeros"), "{text}");
        gd.assert_empty("a bomb in a layer");
        assert_same_space(&gd, before, "a bomb in a layer");
        // The archive itself: it is unpacked into scratch space on the same disk.
        let outer = gd.file("bomb.tar.gz", &gzip(&archive("localhost/bomb:1", &[&layer])));
        let text = gd.fails(&["load", "-i", &outer], 8);
        assert!(text.contains("No space left"), "{text}");
        gd.assert_empty("a bomb around the archive");
        assert_same_space(&gd, before, "a bomb around the archive");
    });
}

#[test]
fn archives_that_point_outside_are_refused() {
    isolated("hostile::archives_that_point_outside_are_refused", LIMIT, |dir| {
        let gd = Gd::new(dir, &dir.join("root"));
        let canary = Canary::new(dir);
        let secret = gd.path("canary/secret");
        let climbing = format!("../../../../../..{secret}");
        for name in [&secret, &climbing] {
            let manifest = serde_json::json!([{ "Config": name, "RepoTags": ["localhost/x:1"], "Layers": [name] }]);
            let tar = Layer::new().file("manifest.json", manifest.to_string().as_bytes()).tar();
            let link = Layer::new()
                .raw(b"link", EntryType::Symlink, secret.as_bytes(), b"")
                .file("manifest.json", manifest.to_string().replace(name.as_str(), "link").as_bytes())
                .tar();
            for bytes in [tar, link] {
                let out = gd.run(&["load", "-i", &gd.file("x.tar", &bytes)]);
                assert_eq!(out.status.code(), Some(9), "{}", errors(&out));
                assert!(!errors(&out).contains("\"secret\""), "{}", errors(&out));
            }
        }
        // As an OCI layout directory, where names become paths.
        let layout = gd.make_dir("layout");
        fs::write(dir.join("layout/oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        for digest in ["sha256:../../../../canary/secret", "sha256:00"] {
            let index = serde_json::json!({ "schemaVersion": 2, "manifests": [
                { "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest, "size": 6 }] });
            fs::write(dir.join("layout/index.json"), index.to_string()).unwrap();
            gd.fails(&["load", "-i", &layout], 9);
        }
        let hex = sha256(b"secret");
        fs::create_dir_all(dir.join("layout/blobs/sha256")).unwrap();
        std::os::unix::fs::symlink(&secret, dir.join("layout/blobs/sha256").join(&hex)).unwrap();
        let index = serde_json::json!({ "schemaVersion": 2, "manifests": [
            { "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": format!("sha256:{hex}"), "size": 6 }] });
        fs::write(dir.join("layout/index.json"), index.to_string()).unwrap();
        let out = gd.run(&["load", "-i", &layout]);
        assert!(!out.status.success());
        gd.assert_empty("archives that point outside");
        canary.assert_alive("archives that point outside");
    });
}
