//! Image archives against the tools that write and read them. A tool that is missing is a named skip, or with
//! `GRAPHDRIVER_REQUIRE_ALL=1` a failure.

mod skip;

use graphdriver::image::{
    Reference,
    archive::{Archive, ArchivedImage, Compression, Format, HashReader, SavedImage, pipelined, write_archive},
};
use graphdriver::progress::Cancel;
use graphdriver_core::{DiffId, Digest, ErrorKind};
use skip::{no_program, skipped};
use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
    process::Command,
};

fn run(dir: &Path, command: &str) -> String {
    let out = Command::new("sh").args(["-euc", command]).current_dir(dir).output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(out.status.success(), "{command}\n{text}{}", String::from_utf8_lossy(&out.stderr));
    text
}

/// An image of three layers in the OCI layout `src:t`, and what its configuration hashes to.
struct Source {
    dir: tempfile::TempDir,
    id: Digest,
    manifest: Digest,
}

impl Source {
    fn new() -> Source {
        let dir = tempfile::tempdir().unwrap();
        let noise: Vec<u8> = (0..400_000u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
        std::fs::write(dir.path().join("noise"), noise).unwrap();
        run(
            dir.path(),
            "umoci init --layout src; umoci new --image src:t
             mkdir d; echo hello > d/hello; ln -s hello d/link
             umoci insert --image src:t d /etc; umoci insert --image src:t noise /usr/noise
             umoci unpack --rootless --image src:t b; echo more > b/rootfs/more; rm b/rootfs/etc/hello
             umoci repack --image src:t b",
        );
        let digest = |command: &str| run(dir.path(), command).trim().parse().unwrap();
        let manifest = digest("jq -r .manifests[0].digest src/index.json");
        let id =
            digest("jq -r .config.digest src/blobs/sha256/$(jq -r .manifests[0].digest src/index.json | cut -d: -f2)");
        Source { dir, id, manifest }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    fn run(&self, command: &str) -> String {
        run(self.path(), command)
    }

    /// Reads an archive that must hold exactly this image, verifying all layers.
    fn check(&self, name: &str) -> ArchivedImage {
        let mut images =
            Archive::open(&self.path().join(name), self.path(), &Cancel::default()).unwrap().images().unwrap();
        assert_eq!(images.len(), 1, "{name}");
        let image = images.remove(0);
        assert_eq!(image.config.id(), self.id, "{name}");
        assert_eq!(image.layers.len(), 3);
        for layer in &image.layers {
            let mut reader = HashReader::new(pipelined(layer.open().unwrap(), 2).unwrap());
            io::copy(&mut reader, &mut io::sink()).unwrap();
            assert_eq!(reader.digest(), layer.diff_id.0, "{name}: {layer:?}");
        }
        image
    }

    /// Writes this image with our own writer.
    fn save(&self, format: Format, file: &str, names: &[&str]) {
        let image = self.check("src");
        let names: Vec<Reference> = names.iter().map(|n| n.parse().unwrap()).collect();
        let tars: BTreeMap<DiffId, Vec<u8>> = image
            .layers
            .iter()
            .map(|l| {
                let mut tar = Vec::new();
                l.open().unwrap().read_to_end(&mut tar).unwrap();
                (l.diff_id, tar)
            })
            .collect();
        let layers: Vec<_> = image.layers.iter().map(|l| (l.diff_id, tars[&l.diff_id].len() as u64)).collect();
        let saved = [SavedImage { config: &image.config, names: &names, layers: &layers }];
        let out = File::create(self.path().join(file)).unwrap();
        write_archive(out, format, &saved, &mut |id, out| Ok(out.write_all(&tars[&id])?)).unwrap();
    }
}

fn names(image: &ArchivedImage) -> Vec<String> {
    image.names.iter().map(ToString::to_string).collect()
}

fn all(image: &ArchivedImage, compression: Compression) -> bool {
    image.layers.iter().all(|l| l.compression == compression)
}

/// podman with a storage of its own.
fn podman(dir: &Path) -> String {
    let at = |sub: &str| dir.join(sub).display().to_string();
    format!("podman --root {} --runroot {} --storage-driver vfs", at("podman"), at("podman-run"))
}

#[test]
fn reads_what_skopeo_and_umoci_write() {
    if skipped("reads_what_skopeo_and_umoci_write", no_program(&["skopeo", "umoci", "jq"])) {
        return;
    }
    let s = Source::new();
    let layout = s.check("src");
    assert_eq!((layout.manifest_digest, names(&layout)), (Some(s.manifest), vec!["localhost/t:latest".to_owned()]));
    assert!(all(&layout, Compression::Gzip));

    s.run("skopeo copy oci:src:t docker-archive:docker.tar:foo/bar:v1");
    let docker = s.check("docker.tar");
    assert_eq!((names(&docker), docker.manifest_digest), (vec!["foo/bar:v1".to_owned()], None));
    assert!(all(&docker, Compression::None));

    s.run("skopeo copy oci:src:t oci-archive:oci.tar:foo/bar:v1");
    let oci = s.check("oci.tar");
    assert_eq!((names(&oci), oci.manifest_digest), (vec!["foo/bar:v1".to_owned()], Some(s.manifest)));

    s.run("skopeo copy --dest-compress-format zstd oci:src:t oci-archive:zstd.tar:quay.io/x/y:z");
    let zstd = s.check("zstd.tar");
    assert_eq!(names(&zstd), ["quay.io/x/y:z"]);
    assert!(all(&zstd, Compression::Zstd));
}

#[test]
fn reads_archives_compressed_by_gzip_and_zstd() {
    if skipped("reads_archives_compressed_by_gzip_and_zstd", no_program(&["skopeo", "umoci", "jq", "gzip", "zstd"])) {
        return;
    }
    let s = Source::new();
    s.run("skopeo copy oci:src:t docker-archive:a.tar:x:1; gzip -k a.tar; zstd -q a.tar; xz -k a.tar");
    s.check("a.tar.gz");
    s.check("a.tar.zst");
    let e = Archive::open(&s.path().join("a.tar.xz"), s.path(), &Cancel::default()).err().unwrap();
    assert!(e.kind() == ErrorKind::Unsupported && e.to_string().contains("xz -d"), "{e}");
    s.run("head -c 300000 a.tar.gz > cut.gz; head -c 300000 a.tar > cut.tar");
    for cut in ["cut.gz", "cut.tar"] {
        let e = Archive::open(&s.path().join(cut), s.path(), &Cancel::default()).err().unwrap();
        assert!(e.kind() == ErrorKind::Corrupt && e.to_string().contains("cut short"), "{e}");
    }
}

#[test]
fn reads_several_images_of_one_archive() {
    if skipped("reads_several_images_of_one_archive", no_program(&["podman", "umoci", "jq"])) {
        return;
    }
    let s = Source::new();
    let podman = podman(s.path());
    s.run(&format!(
        "umoci tag --image src:t u
         umoci config --image src:u --config.env A=B
         tar -C src -cf src.tar .
         id=$(printf 'FROM scratch\nCOPY noise /n\n' | {podman} build --isolation chroot -q -f - .)
         {podman} tag $id one:1; {podman} tag $id two:2
         printf 'FROM scratch\nCOPY d /d\nENV A=B\n' | {podman} build --isolation chroot -q -t three:3 -f - .
         {podman} save -m -o multi.tar one:1 two:2 three:3"
    ));
    let images = Archive::open(&s.path().join("multi.tar"), s.path(), &Cancel::default()).unwrap().images().unwrap();
    let mut all: Vec<String> = images.iter().flat_map(names).collect();
    all.sort();
    assert_eq!((images.len(), all.len()), (2, 3), "{all:?}");
    let two = Archive::open(&s.path().join("src.tar"), s.path(), &Cancel::default()).unwrap().images().unwrap();
    assert_eq!(two.iter().flat_map(names).collect::<Vec<_>>(), ["localhost/t:latest", "localhost/u:latest"]);
}

#[test]
fn skopeo_and_umoci_read_what_we_write() {
    if skipped("skopeo_and_umoci_read_what_we_write", no_program(&["skopeo", "umoci", "jq"])) {
        return;
    }
    let s = Source::new();
    s.save(Format::Docker, "docker.tar", &["foo/bar:v1", "quay.io/foo:2"]);
    s.save(Format::Oci, "oci.tar", &["foo/bar:v1"]);
    for (from, to) in [
        ("docker-archive:docker.tar:foo/bar:v1", "one"),
        ("docker-archive:docker.tar:quay.io/foo:2", "two"),
        ("oci-archive:oci.tar:docker.io/foo/bar:v1", "three"),
        ("oci-archive:oci.tar", "four"),
    ] {
        let raw = s.run(&format!("skopeo inspect --raw --config {from}"));
        assert_eq!(Digest::of(&raw), s.id, "{from}");
        // On the way from one kind to the other skopeo writes the configuration anew.
        let same = if from.starts_with("docker") {
            format!("docker-archive:{to}.tar")
        } else {
            format!("oci-archive:{to}.tar")
        };
        s.run(&format!("skopeo copy {from} {same}"));
        s.check(&format!("{to}.tar"));
        s.run(&format!("skopeo copy {from} oci:{to}:t; umoci unpack --rootless --image {to}:t {to}-rootfs"));
        assert_eq!(s.run(&format!("cat {to}-rootfs/rootfs/more")), "more\n");
    }
    // As an OCI layout both can be used without conversion.
    for tar in ["docker.tar", "oci.tar"] {
        let tag = if tar == "oci.tar" { "docker.io/foo/bar:v1" } else { "v1" };
        s.run(&format!("rm -rf l; mkdir l; tar -C l -xf {tar}; skopeo copy oci:l:{tag} oci:{tar}-again:t"));
        s.check(&format!("{tar}-again"));
        s.check("l");
    }
}

#[test]
fn podman_reads_what_we_write_and_we_what_it_saves() {
    if skipped("podman_reads_what_we_write_and_we_what_it_saves", no_program(&["podman", "umoci", "jq"])) {
        return;
    }
    let s = Source::new();
    let podman = podman(s.path());
    for (format, file, save) in [(Format::Docker, "d.tar", "docker-archive"), (Format::Oci, "o.tar", "oci-archive")] {
        s.save(format, file, &["foo/bar:v1"]);
        s.run(&format!("{podman} load -q -i {file}"));
        let id = s.run(&format!("{podman} image inspect -f '{{{{.Id}}}}' docker.io/foo/bar:v1"));
        assert_eq!(id.trim(), s.id.hex());
        s.run(&format!("{podman} save -q --format {save} -o back-{file} docker.io/foo/bar:v1"));
        assert_eq!(names(&s.check(&format!("back-{file}"))), ["foo/bar:v1"]);
        s.run(&format!("{podman} rmi -f {}", id.trim()));
    }
}

#[test]
fn the_old_docker_loader_finds_what_it_needs() {
    if skipped("the_old_docker_loader_finds_what_it_needs", no_program(&["umoci", "jq"])) {
        return;
    }
    let s = Source::new();
    s.save(Format::Docker, "d.tar", &["foo/bar:v1"]);
    // Docker 1.10 to 24 read manifest.json and open what it names.
    let named = s.run("tar -xOf d.tar manifest.json | jq -r '.[0] | .Config, .Layers[]'");
    let there = s.run("tar -tf d.tar");
    assert_eq!(named.lines().count(), 4);
    for path in named.lines() {
        assert!(there.lines().any(|l| l == path), "{path} is not in\n{there}");
    }
    let hash: PathBuf = named.lines().next().unwrap().into();
    let sum = s.run(&format!("tar -xOf d.tar {} | sha256sum", hash.display()));
    assert!(sum.starts_with(&s.id.hex()));
    assert_eq!(s.run("tar -xOf d.tar manifest.json | jq -c '.[0].RepoTags'").trim(), "[\"foo/bar:v1\"]");
}

/// A containerd of our own, gone with this.
struct Containerd(std::process::Child);

impl Containerd {
    fn start(dir: &Path) -> Containerd {
        let at = |sub: &str| dir.join(sub).display().to_string();
        let config = format!(
            "version = 2\nroot = {:?}\nstate = {:?}\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\", \"io.containerd.internal.v1.opt\"]\n[grpc]\naddress = {:?}\n",
            at("cd-root"),
            at("cd-state"),
            at("cd.sock")
        );
        std::fs::write(dir.join("cd.toml"), config).unwrap();
        let log = File::create(dir.join("cd.log")).unwrap();
        let child = Command::new("containerd").args(["-c", &at("cd.toml")]).stderr(log).spawn().unwrap();
        let daemon = Containerd(child);
        for _ in 0..100 {
            let version = Command::new("ctr").args(["-a", &at("cd.sock"), "version"]).output().unwrap();
            if version.status.success() {
                return daemon;
            }
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        panic!("containerd did not come up:\n{}", std::fs::read_to_string(dir.join("cd.log")).unwrap());
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn containerd_reads_what_we_write_and_we_what_it_exports() {
    if skipped(
        "containerd_reads_what_we_write_and_we_what_it_exports",
        no_program(&["containerd", "ctr", "umoci", "jq"]),
    ) {
        return;
    }
    let s = Source::new();
    let _daemon = Containerd::start(s.path());
    let ctr = "ctr -a $PWD/cd.sock images";
    for (format, file) in [(Format::Docker, "d.tar"), (Format::Oci, "o.tar")] {
        s.save(format, file, &["foo/bar:v1"]);
        let manifest = s.check(file).manifest_digest.unwrap();
        s.run(&format!("{ctr} import --snapshotter native {file}"));
        let listed = s.run(&format!("{ctr} ls | grep ^docker.io/foo/bar:v1"));
        assert!(listed.contains(&manifest.to_string()), "{listed}");
        s.run(&format!("{ctr} export back.tar docker.io/foo/bar:v1; {ctr} rm docker.io/foo/bar:v1"));
        let back = s.check("back.tar");
        assert_eq!((names(&back), back.manifest_digest), (vec!["foo/bar:v1".to_owned()], Some(manifest)));
    }
}
