use super::*;
use crate::{image::host_architecture, progress::Cancel};
use serde_json::{Value, json};
use std::{
    fs::File,
    io::{self, Cursor, Write},
    path::PathBuf,
};

/// A tar made by hand, so that it can be wrong.
#[derive(Default)]
struct Tar(Vec<u8>);

impl Tar {
    fn entry(mut self, kind: tar::EntryType, name: &str, link: &str, data: &[u8]) -> Self {
        let mut header = tar::Header::new_gnu();
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_entry_type(kind);
        header.set_size(data.len() as u64);
        header.set_cksum();
        self.0.extend_from_slice(header.as_bytes());
        self.0.extend_from_slice(data);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    fn file(self, name: &str, data: impl AsRef<[u8]>) -> Self {
        self.entry(tar::EntryType::Regular, name, "", data.as_ref())
    }

    fn json(self, name: &str, value: Value) -> Self {
        self.file(name, value.to_string())
    }

    fn link(self, name: &str, target: &str) -> Self {
        self.entry(tar::EntryType::Symlink, name, target, b"")
    }

    fn blob(self, data: impl AsRef<[u8]>) -> Self {
        let name = blob_name(Digest::of(data.as_ref()));
        self.file(&name, data)
    }

    fn end(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 1024, 0);
        self.0
    }
}

fn layer(text: &str) -> Vec<u8> {
    Tar::default().file(text, text.repeat(1000)).end()
}

fn config(layers: &[&[u8]], arch: &str) -> Vec<u8> {
    let diff_ids: Vec<Digest> = layers.iter().map(Digest::of).collect();
    json!({"os": "linux", "architecture": arch, "rootfs": {"type": "layers", "diff_ids": diff_ids}})
        .to_string()
        .into_bytes()
}

fn descriptor(kind: &str, blob: &[u8]) -> Value {
    json!({"mediaType": kind, "digest": Digest::of(blob), "size": blob.len()})
}

const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

fn manifest(config: &[u8], layers: &[&[u8]]) -> Vec<u8> {
    let layers: Vec<Value> = layers.iter().map(|l| descriptor(LAYER, l)).collect();
    json!({"schemaVersion": 2, "config": descriptor(CONFIG, config), "layers": layers}).to_string().into_bytes()
}

fn index(manifests: Vec<Value>) -> Value {
    json!({"schemaVersion": 2, "manifests": manifests})
}

fn platform(mut descriptor: Value, os: &str, arch: &str) -> Value {
    descriptor["platform"] = json!({"os": os, "architecture": arch});
    descriptor
}

fn named(mut descriptor: Value, key: &str, name: &str) -> Value {
    descriptor["annotations"] = json!({ key: name });
    descriptor
}

const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// An OCI archive of one image with one layer, made by `change` from its parts.
fn oci(change: impl FnOnce(&mut Value, &mut Vec<Vec<u8>>)) -> Vec<u8> {
    let layer = layer("a");
    let config = config(&[&layer], "amd64");
    let manifest = manifest(&config, &[&layer]);
    let mut index = index(vec![named(descriptor(MANIFEST, &manifest), REF_NAME, "app:1")]);
    let mut blobs = vec![manifest, config, layer];
    change(&mut index, &mut blobs);
    let tar = Tar::default().json("oci-layout", json!({"imageLayoutVersion": "1.0.0"})).json("index.json", index);
    blobs.iter().fold(tar, Tar::blob).end()
}

/// An archive in the layout of Docker 1.10 to 24: two images, the second with its lower layer as a link to the first's.
fn old_docker() -> Vec<u8> {
    let (a, b) = (layer("a"), layer("b"));
    let (one, two) = (config(&[&a], "amd64"), config(&[&a, &b], "amd64"));
    let name = |c: &[u8]| format!("{}.json", Digest::of(c).hex());
    Tar::default()
        .entry(tar::EntryType::Directory, "1111/", "", b"")
        .file("1111/VERSION", "1.0")
        .json("1111/json", json!({"id": "1111"}))
        .file("1111/layer.tar", &a)
        .link("2222/layer.tar", "../1111/layer.tar")
        .file("3333/layer.tar", &b)
        .file(&name(&one), &one)
        .file(&name(&two), &two)
        .json(
            "manifest.json",
            json!([
                {"Config": name(&one), "RepoTags": ["one:1", "one:latest"], "Layers": ["1111/layer.tar"]},
                {"Config": name(&two), "RepoTags": null, "Layers": ["2222/layer.tar", "3333/layer.tar"]},
            ]),
        )
        .json("repositories", json!({"one": {"1": "1111"}}))
        .end()
}

fn tmp() -> PathBuf {
    std::env::temp_dir()
}

fn open(bytes: impl AsRef<[u8]>) -> Result<Archive> {
    let mut file = tempfile::tempfile()?;
    file.write_all(bytes.as_ref())?;
    io::Seek::rewind(&mut file)?;
    Archive::from_file(Interruptible::new(file, &Cancel::default()), &tmp())
}

fn images(bytes: impl AsRef<[u8]>) -> Result<Vec<ArchivedImage>> {
    open(bytes)?.images()
}

fn refused(bytes: impl AsRef<[u8]>, kind: ErrorKind, words: &[&str]) {
    let e = images(bytes).expect_err(words[0]);
    let text = e.to_string();
    assert_eq!(e.kind(), kind, "{text}");
    for word in words {
        assert!(text.contains(word), "{word:?} is missing in: {text}");
    }
}

fn content(layer: &ArchivedLayer) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    layer.open()?.read_to_end(&mut out)?;
    Ok(out)
}

fn names(image: &ArchivedImage) -> Vec<String> {
    image.names.iter().map(ToString::to_string).collect()
}

fn check_old_docker(images: &[ArchivedImage]) {
    assert_eq!(images.len(), 2);
    assert_eq!(names(&images[0]), ["one:1", "one:latest"]);
    assert!(images[1].names.is_empty());
    assert_eq!(content(&images[0].layers[0]).unwrap(), layer("a"));
    assert_eq!(content(&images[1].layers[0]).unwrap(), layer("a"));
    assert_eq!(content(&images[1].layers[1]).unwrap(), layer("b"));
    for layer in images.iter().flat_map(|i| &i.layers) {
        assert_eq!(Digest::of(content(layer).unwrap()), layer.diff_id.0);
    }
}

#[test]
fn the_old_docker_layout_is_read_with_its_links() {
    check_old_docker(&images(old_docker()).unwrap());
}

#[test]
fn an_archive_compressed_as_a_whole_is_read() {
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&old_docker()).unwrap();
    check_old_docker(&images(gzip.finish().unwrap()).unwrap());
    check_old_docker(&images(zstd::encode_all(&old_docker()[..], 1).unwrap()).unwrap());
}

#[test]
fn a_pipe_is_read_compressed_or_not() {
    for bytes in [old_docker(), zstd::encode_all(&old_docker()[..], 1).unwrap()] {
        let (read, mut write) = io::pipe().unwrap();
        let writer = std::thread::spawn(move || write.write_all(&bytes));
        let file = File::from(std::os::fd::OwnedFd::from(read));
        check_old_docker(
            &Archive::from_file(Interruptible::new(file, &Cancel::default()), &tmp()).unwrap().images().unwrap(),
        );
        writer.join().unwrap().unwrap();
    }
}

#[test]
fn standard_input_that_stands_in_the_middle_of_a_file_is_read_from_there() {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&[b"junk".as_slice(), &old_docker()].concat()).unwrap();
    io::Seek::seek(&mut file, io::SeekFrom::Start(4)).unwrap();
    check_old_docker(
        &Archive::from_file(Interruptible::new(file, &Cancel::default()), &tmp()).unwrap().images().unwrap(),
    );
}

#[test]
fn an_oci_archive_is_read_and_verified() {
    let found = images(oci(|_, _| {})).unwrap();
    assert_eq!((found.len(), names(&found[0])), (1, vec!["app:1".to_owned()]));
    let layer_ = &found[0].layers[0];
    assert_eq!((layer_.digest, content(layer_).unwrap()), (Some(layer_.diff_id.0), layer("a")));
    assert!(found[0].manifest_digest.is_some());
}

#[test]
fn names_come_from_either_annotation_and_a_tag_alone_goes_under_localhost() {
    for (key, text, want) in [
        ("io.containerd.image.name", "docker.io/library/app:2", Some("app:2")),
        (REF_NAME, "v1", Some("localhost/v1:latest")),
        (REF_NAME, "quay.io/a/b:c", Some("quay.io/a/b:c")),
        (REF_NAME, "No Name/at:all", None),
        ("other", "x", None),
    ] {
        let found = images(oci(|index, _| index["manifests"][0]["annotations"] = json!({ key: text }))).unwrap();
        assert_eq!(names(&found[0]), Vec::from_iter(want), "{text}");
    }
}

#[test]
fn an_archive_that_is_both_gives_each_image_once_with_all_names() {
    let layer = layer("a");
    let config_ = config(&[&layer], "amd64");
    let manifest = manifest(&config_, &[&layer]);
    let both = |n: &str| named(descriptor(MANIFEST, &manifest), "io.containerd.image.name", n);
    let tar = Tar::default()
        .json("index.json", index(vec![both("docker.io/library/a:1"), both("docker.io/library/a:2")]))
        .json(
            "manifest.json",
            json!([{
                "Config": blob_name(Digest::of(&config_)), "RepoTags": ["a:2", "a:3"],
                "Layers": [blob_name(Digest::of(&layer))]
            }]),
        )
        .blob(&manifest)
        .blob(&config_)
        .blob(&layer);
    let found = images(tar.end()).unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!(names(&found[0]), ["a:1", "a:2", "a:3"]);
    assert!(found[0].manifest_digest.is_some());
}

/// A multi-platform archive: `present` manifests are really there, all of `listed` are named.
fn multi(listed: &[&str], present: &[&str], nested: bool) -> Vec<u8> {
    let layer = layer("a");
    let mut tar = Tar::default().blob(&layer).blob(b"attestation");
    let mut list = Vec::new();
    for arch in listed {
        let config = config(&[&layer], arch);
        let manifest = manifest(&config, &[&layer]);
        list.push(platform(descriptor(MANIFEST, &manifest), "linux", arch));
        if present.contains(arch) {
            tar = tar.blob(&config).blob(&manifest);
        }
    }
    list.push(platform(descriptor(MANIFEST, b"attestation"), "unknown", "unknown"));
    let inner = index(list);
    if !nested {
        return tar.json("index.json", inner).end();
    }
    let text = inner.to_string();
    let outer = index(vec![named(descriptor(INDEX, text.as_bytes()), REF_NAME, "m:1")]);
    tar.blob(&text).json("index.json", outer).end()
}

#[test]
fn of_several_platforms_this_hosts_is_taken_else_the_only_one_else_an_error_lists_them() {
    let host = host_architecture();
    for nested in [true, false] {
        let all = ["s390x", host, "mips"];
        for present in [&all[..], &[host], &[host, "mips"]] {
            let found = images(multi(&all, present, nested)).unwrap();
            assert_eq!((found.len(), found[0].config.architecture()), (1, host));
            assert_eq!(names(&found[0]), if nested { vec!["m:1"] } else { vec![] });
        }
        assert_eq!(images(multi(&all, &["mips"], nested)).unwrap()[0].config.architecture(), "mips");
        let words = ["linux/s390x", "linux/mips", "no image for linux/"];
        refused(multi(&["s390x", "mips"], &["s390x", "mips"], nested), ErrorKind::Unsupported, &words);
    }
}

#[test]
fn what_is_no_image_is_skipped_and_an_archive_without_any_is_refused() {
    let chart = json!({"schemaVersion": 2, "config": descriptor("application/vnd.cncf.helm.config.v1+json", b"{}"), "layers": []});
    let chart = chart.to_string();
    let add = |index: &mut Value, blobs: &mut Vec<Vec<u8>>| {
        index["manifests"].as_array_mut().unwrap().push(descriptor(MANIFEST, chart.as_bytes()));
        index["manifests"].as_array_mut().unwrap().push(descriptor("text/plain", b"hello"));
        blobs.push(chart.clone().into_bytes());
    };
    assert_eq!(images(oci(add)).unwrap().len(), 1);
    let only = oci(|index, blobs| {
        add(index, blobs);
        index["manifests"].as_array_mut().unwrap().remove(0);
    });
    refused(only, ErrorKind::InvalidInput, &["no image"]);
}

#[test]
fn a_layout_directory_is_read_and_nothing_leads_out_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let layout = dir.path().join("layout");
    tar::Archive::new(Cursor::new(oci(|_, _| {}))).unpack(&layout).unwrap();
    let found = Archive::open(&layout, &tmp(), &Cancel::default()).unwrap().images().unwrap();
    assert_eq!(content(&found[0].layers[0]).unwrap(), layer("a"));

    let blob = layout.join(&found[0].layers[0].name);
    std::fs::rename(&blob, dir.path().join("outside")).unwrap();
    std::os::unix::fs::symlink("../../../outside", &blob).unwrap();
    let e = Archive::open(&layout, &tmp(), &Cancel::default()).unwrap().images().unwrap_err();
    assert_eq!(e.kind(), ErrorKind::InvalidInput, "{e}");
    std::fs::rename(layout.join("blobs"), dir.path().join("blobs")).unwrap();
    std::os::unix::fs::symlink(dir.path().join("blobs"), layout.join("blobs")).unwrap();
    let e = Archive::open(&layout, &tmp(), &Cancel::default()).unwrap().images().unwrap_err();
    assert!(e.kind() == ErrorKind::Corrupt && e.to_string().contains("not in the archive"), "{e}");
}

#[test]
fn a_blob_that_is_not_what_its_digest_says_is_corrupt() {
    let whole = oci(|_, _| {});
    // In the manifest, the configuration and the layer, in this order in the archive.
    for (n, place) in ["schemaVersion", "rootfs", "aaaaaaaa"].iter().enumerate() {
        let mut bytes = whole.clone();
        let from = bytes.windows(19).position(|w| w == b"imageLayoutVersion\"").unwrap() + 1500;
        let at = from + bytes[from..].windows(place.len()).position(|w| w == place.as_bytes()).unwrap();
        bytes[at + place.len() - 1] ^= 1;
        let outcome = images(&bytes).and_then(|found| content(&found[0].layers[0]));
        let e = outcome.expect_err(place);
        assert_eq!(e.kind(), ErrorKind::Corrupt, "{n} {e}");
        assert!(e.to_string().matches("sha256:").count() >= 2 && e.to_string().contains("declared"), "{n} {e}");
    }
}

#[test]
fn a_docker_configuration_that_is_not_what_its_name_says_is_corrupt() {
    let mut bytes = old_docker();
    let at = bytes.windows(5).position(|w| w == b"linux").unwrap();
    bytes[at] ^= 1;
    refused(bytes, ErrorKind::Corrupt, &["verifying", ".json", "declared"]);
}

#[test]
fn a_damaged_header_is_named_by_its_place() {
    let mut bytes = old_docker();
    assert_eq!(&bytes[512..524], b"1111/VERSION");
    bytes[512 + 100] ^= 1;
    refused(bytes, ErrorKind::Corrupt, &["damaged at byte 512"]);
}

#[test]
fn a_declared_size_that_is_wrong_is_corrupt() {
    let wrong = oci(|index, _| index["manifests"][0]["size"] = json!(7));
    refused(wrong, ErrorKind::Corrupt, &["and 7 are declared"]);
    let wrong = oci(|index, blobs| {
        let mut manifest: Value = serde_json::from_slice(&blobs[0]).unwrap();
        manifest["layers"][0]["size"] = json!(7);
        blobs[0] = manifest.to_string().into_bytes();
        index["manifests"] = json!([descriptor(MANIFEST, &blobs[0])]);
    });
    refused(wrong, ErrorKind::Corrupt, &["and 7 are declared", "layer blobs/sha256/"]);
}

fn with_layer(stored: Vec<u8>, kind: &str) -> Vec<u8> {
    let config = config(&[b"x"], "amd64");
    let mut manifest: Value = serde_json::from_slice(&manifest(&config, &[&stored])).unwrap();
    manifest["layers"][0]["mediaType"] = json!(kind);
    let manifest = manifest.to_string();
    let list = index(vec![descriptor(MANIFEST, manifest.as_bytes())]);
    let tar = Tar::default().json("index.json", list).blob(&manifest).blob(&config);
    if stored == b"missing" { tar.end() } else { tar.blob(stored).end() }
}

#[test]
fn layers_that_cannot_be_loaded_are_refused_with_the_reason() {
    let foreign = "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip";
    refused(
        with_layer(b"missing".to_vec(), foreign),
        ErrorKind::Corrupt,
        &["not in the archive", "foreign layers", foreign],
    );
    refused(with_layer(b"missing".to_vec(), LAYER), ErrorKind::Corrupt, &["not in the archive"]);
    refused(with_layer(b"\xfd7zXZ\0...".to_vec(), LAYER), ErrorKind::Unsupported, &["xz", "gzip or zstd"]);
    let encrypted = "application/vnd.oci.image.layer.v1.tar+encrypted";
    refused(with_layer(vec![7; 4000], encrypted), ErrorKind::Unsupported, &["neither a tar", encrypted]);
}

#[test]
fn a_number_of_layers_that_is_not_the_configurations_is_corrupt() {
    let (a, c) = (layer("a"), config(&[], "amd64"));
    let items = json!([{"Config": "c.json", "RepoTags": [], "Layers": ["a.tar"]}]);
    let tar = Tar::default().file("a.tar", a).file("c.json", c).json("manifest.json", items);
    refused(tar.end(), ErrorKind::Corrupt, &["lists 1 layers", "configuration 0"]);
}

#[test]
fn an_archive_cut_short_anywhere_says_so_and_never_looks_whole() {
    let whole = oci(|_, _| {});
    for cut in (512..whole.len() - 1024).step_by(100) {
        let outcome = images(&whole[..cut]).map(|found| content(&found[0].layers[0]));
        let e = outcome.expect_err("cut").to_string();
        assert!(e.contains("cut short"), "{cut}: {e}");
    }
}

#[test]
fn what_is_no_image_archive_is_named() {
    let rootfs = Tar::default().file("etc/passwd", "x").file("usr/bin/x", "x").file("./bin/sh", "x").end();
    refused(rootfs, ErrorKind::InvalidInput, &["graphdriver import", "bin, etc, usr"]);
    let ancient = Tar::default().json("repositories", json!({})).file("1/layer.tar", "x").end();
    refused(ancient, ErrorKind::InvalidInput, &["before 1.10"]);
    refused(b"hello world".repeat(100), ErrorKind::InvalidInput, &["no tar", "docker save"]);
    refused(b"\xfd7zXZ\0 and so on".repeat(50), ErrorKind::Unsupported, &["xz"]);
    refused(Tar::default().end(), ErrorKind::InvalidInput, &["at its top: it is empty"]);
    refused(b"", ErrorKind::InvalidInput, &["neither"]);
    let object = Tar::default().json("manifest.json", json!({"schemaVersion": 2})).end();
    refused(object, ErrorKind::Corrupt, &["parsing manifest.json", "docker save"]);
}

#[test]
fn hostile_names_and_links_lead_nowhere() {
    let items = |config: &str, layer: &str| json!([{"Config": config, "RepoTags": null, "Layers": [layer]}]);
    let one_layer = config(&[&layer("a")], "amd64");
    let tar = |layer: &str| Tar::default().file("c", &one_layer).json("manifest.json", items("c", layer));
    refused(tar("../../etc/passwd").end(), ErrorKind::Corrupt, &["leads out"]);
    refused(tar("/etc/passwd").end(), ErrorKind::Corrupt, &["not in the archive"]);
    refused(tar("l").link("l", "/etc/passwd").end(), ErrorKind::Corrupt, &["not in the archive"]);
    refused(tar("l").link("l", "../../etc/passwd").end(), ErrorKind::Corrupt, &["leads out"]);
    refused(tar("l").link("l", "m").link("m", "l").end(), ErrorKind::Corrupt, &["16 links"]);
    refused(tar("d").entry(tar::EntryType::Directory, "d/", "", b"").end(), ErrorKind::Corrupt, &["is a directory"]);
    refused(tar("d").entry(tar::EntryType::GNUSparse, "d", "", b"").end(), ErrorKind::Corrupt, &["sparse"]);
    refused(tar("a").file("../a", layer("a")).end(), ErrorKind::Corrupt, &["leads out"]);
    let hard = tar("h").file("a", layer("a")).entry(tar::EntryType::Link, "h", "a", b"");
    assert_eq!(content(&images(hard.end()).unwrap()[0].layers[0]).unwrap(), layer("a"));
    let bad_tag = Tar::default()
        .file("c", config(&[], "amd64"))
        .json("manifest.json", json!([{"Config": "c", "RepoTags": ["../x:1"], "Layers": []}]));
    refused(bad_tag.end(), ErrorKind::Corrupt, &["RepoTags", "no image name"]);
}

#[test]
fn of_two_entries_with_one_name_the_last_counts() {
    let tar = Tar::default().file("manifest.json", "rubbish").file("c", config(&[], "amd64"));
    let tar = tar.json("./manifest.json", json!([{"Config": "c", "RepoTags": ["x"], "Layers": null}]));
    assert_eq!(names(&images(tar.end()).unwrap()[0]), ["x:latest"]);
}

#[test]
fn what_is_too_large_is_refused_before_it_is_read() {
    let huge = vec![b' '; MAX_JSON as usize + 1];
    refused(Tar::default().file("manifest.json", &huge).end(), ErrorKind::Corrupt, &["more than the 8388608"]);
    refused(Tar::default().file("index.json", &huge).end(), ErrorKind::Corrupt, &["more than the 8388608"]);
    let items = json!([{"Config": "c", "RepoTags": null, "Layers": []}]);
    let tar = Tar::default().json("manifest.json", items).file("c", &huge[..crate::image::MAX_CONFIG + 1]);
    refused(tar.end(), ErrorKind::Corrupt, &["more than the 4194304"]);
    let long = Tar::default().entry(tar::EntryType::GNULongName, "././@LongLink", "", &vec![b'a'; 5000]).file("x", "x");
    refused(long.end(), ErrorKind::Corrupt, &["5000 bytes, more than the 4097"]);
    let mut many = Tar::default();
    for _ in 0..3 {
        many = many.file("x", "");
    }
    let block = many.0[..512].to_vec();
    let mut bytes = Vec::new();
    for n in 0..100_001u32 {
        let mut header = tar::Header::from_byte_slice(&block).clone();
        header.set_path(format!("n{n}")).unwrap();
        header.set_cksum();
        bytes.extend_from_slice(header.as_bytes());
    }
    refused(bytes, ErrorKind::Corrupt, &["100000 entries", "import"]);
}

#[test]
fn indexes_that_are_nested_too_deep_are_refused() {
    let mut tar = Tar::default();
    let mut inner = index(vec![]).to_string();
    for _ in 0..6 {
        tar = tar.blob(&inner);
        inner = index(vec![descriptor(INDEX, inner.as_bytes())]).to_string();
    }
    refused(tar.file("index.json", inner).end(), ErrorKind::Corrupt, &["nested more than 4"]);
}

#[test]
fn long_names_and_sizes_in_pax_headers_are_understood() {
    let path = format!("{}/layer.tar", "d".repeat(150));
    let size = layer("a").len();
    let record = |k: &str, v: &str| {
        let body = format!(" {k}={v}\n");
        let len = (1..).find(|n: &usize| n.to_string().len() + body.len() == *n).unwrap();
        format!("{len}{body}")
    };
    let pax = record("path", &path) + &record("size", &size.to_string());
    let mut tar = Tar::default().entry(tar::EntryType::XHeader, "pax", "", pax.as_bytes());
    let start = tar.0.len();
    tar = tar.file("short", layer("a"));
    let mut header = tar::Header::from_byte_slice(&tar.0[start..start + 512]).clone();
    header.set_size(0);
    header.set_cksum();
    tar.0[start..start + 512].copy_from_slice(header.as_bytes());
    let gnu = format!("{}/config", "e".repeat(150));
    let tar = tar
        .entry(tar::EntryType::GNULongName, "././@LongLink", "", format!("{gnu}\0").as_bytes())
        .file("short", config(&[&layer("a")], "amd64"))
        .json("manifest.json", json!([{"Config": gnu, "RepoTags": null, "Layers": [path]}]));
    assert_eq!(content(&images(tar.end()).unwrap()[0].layers[0]).unwrap(), layer("a"));
}

#[test]
fn layers_are_read_in_parallel_and_ahead() {
    let found = images(old_docker()).unwrap();
    let threads: Vec<_> = found
        .into_iter()
        .flat_map(|i| i.layers)
        .map(|layer| {
            std::thread::spawn(move || {
                let mut reader = HashReader::new(pipelined(layer.open().unwrap(), 4).unwrap());
                io::copy(&mut reader, &mut io::sink()).unwrap();
                assert_eq!(reader.digest(), layer.diff_id.0);
            })
        })
        .collect();
    assert_eq!(threads.len(), 3);
    threads.into_iter().for_each(|t| t.join().unwrap());
}

#[test]
fn errors_of_a_layer_keep_their_meaning_through_the_pipeline() {
    let mut bytes = oci(|_, _| {});
    let at = bytes.windows(8).rposition(|w| w == b"aaaaaaaa").unwrap();
    bytes[at] ^= 1;
    let layer = images(bytes).unwrap()[0].layers[0].clone();
    let e = Error::from(io::copy(&mut pipelined(layer.open().unwrap(), 2).unwrap(), &mut io::sink()).unwrap_err());
    assert_eq!(e.kind(), ErrorKind::Corrupt, "{e}");
}

fn saved(format: Format) -> (Vec<u8>, usize) {
    let (a, b) = (layer("a"), layer("b"));
    let one = ImageConfig::parse(config(&[&a], "amd64")).unwrap();
    let two = ImageConfig::parse(config(&[&a, &b], "amd64")).unwrap();
    let id = |l: &[u8]| (DiffId(Digest::of(l)), l.len() as u64);
    let names: Vec<Reference> = vec!["one:1".parse().unwrap(), "quay.io/one:2".parse().unwrap()];
    let images = [
        SavedImage { config: &one, names: &names, layers: &[id(&a)] },
        SavedImage { config: &two, names: &[], layers: &[id(&a), id(&b)] },
    ];
    let (mut out, mut calls) = (Vec::new(), 0);
    write_archive(&mut out, format, &images, &mut |wanted, out| {
        calls += 1;
        Ok(out.write_all(if wanted == id(&a).0 { &a } else { &b })?)
    })
    .unwrap();
    (out, calls)
}

#[test]
fn what_is_saved_is_read_back_the_same_and_each_layer_is_written_once() {
    for format in [Format::Docker, Format::Oci] {
        let (bytes, calls) = saved(format);
        assert_eq!((calls, saved(format).0 == bytes, bytes.len() % 512), (2, true, 0));
        let found = images(&bytes).unwrap();
        assert_eq!(names(&found[0]), ["one:1", "quay.io/one:2"]);
        assert_eq!((found.len(), found[1].names.len()), (2, 0));
        assert_eq!(found[1].config.raw(), config(&[&layer("a"), &layer("b")], "amd64"));
        assert_eq!(content(&found[1].layers[1]).unwrap(), layer("b"));
    }
}

#[test]
fn a_layer_that_is_not_itself_when_saved_is_corrupt() {
    let a = layer("a");
    let config = ImageConfig::parse(config(&[&a], "amd64")).unwrap();
    let layers = [(DiffId(Digest::of(&a)), a.len() as u64)];
    let images = [SavedImage { config: &config, names: &[], layers: &layers }];
    let mut flipped = a.clone();
    flipped[700] ^= 1;
    for (bytes, why) in
        [(&a[1..], "1 bytes shorter"), (&[&a[..], b"x"].concat()[..], "longer"), (&flipped, "should have")]
    {
        let e = write_archive(io::sink(), Format::Oci, &images, &mut |_, out| Ok(out.write_all(bytes)?)).unwrap_err();
        assert!(e.kind() == ErrorKind::Corrupt && e.to_string().contains(why), "{e}");
    }
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]
    #[test]
    fn no_damage_panics_or_passes_for_whole(at in 0usize..8000, value: u8) {
        let whole = oci(|_, _| {});
        let mut bytes = whole.clone();
        let at = at % (bytes.len() - 1024);
        bytes[at] = value;
        if let Ok(found) = images(&bytes) {
            for image in found {
                if let Ok(got) = content(&image.layers[0]) {
                    proptest::prop_assert!(got == layer("a"));
                }
            }
        }
    }
}
