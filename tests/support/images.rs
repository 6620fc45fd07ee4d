//! Small images, good and bad, made in memory.

use sha2::{Digest, Sha256};
use std::io::Write;
use tar::{EntryType, Header};

/// A layer tar.
pub struct Layer(tar::Builder<Vec<u8>>);

impl Layer {
    pub fn new() -> Layer {
        Layer(tar::Builder::new(Vec::new()))
    }

    pub fn file(self, name: &str, content: &[u8]) -> Layer {
        self.raw(name.as_bytes(), EntryType::Regular, b"", content)
    }

    pub fn dir(self, name: &str) -> Layer {
        self.raw(name.as_bytes(), EntryType::Directory, b"", b"")
    }

    /// Any entry, with names that the tar crate itself would refuse.
    pub fn raw(self, name: &[u8], kind: EntryType, link: &[u8], content: &[u8]) -> Layer {
        self.header(name, kind, link, content, |_| {})
    }

    /// The same with a header that `change` has spoilt; the checksum is right again afterwards.
    pub fn header(
        mut self,
        name: &[u8],
        kind: EntryType,
        link: &[u8],
        content: &[u8],
        change: impl FnOnce(&mut Header),
    ) -> Layer {
        let mut header = Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(if kind == EntryType::Directory { 0o755 } else { 0o644 });
        header.set_size(content.len() as u64);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_700_000_000);
        header.as_old_mut().name[..name.len()].copy_from_slice(name);
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link);
        change(&mut header);
        header.set_cksum();
        self.0.append(&header, content).unwrap();
        self
    }

    /// A PAX record for the entry that follows.
    pub fn pax(self, key: &str, value: &[u8]) -> Layer {
        let rest = key.len() + value.len() + 3;
        let length = (1..20).map(|digits| rest + digits).find(|n| n.to_string().len() + rest == *n).unwrap();
        let record = [format!("{length} {key}=").as_bytes(), value, b"\n"].concat();
        self.raw(b"pax", EntryType::XHeader, b"", &record)
    }

    pub fn tar(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

/// A layer of `files` files with random content.
pub fn random_layer(seed: u64, files: usize, size: usize) -> Vec<u8> {
    let mut random = super::Random::new(seed);
    let mut layer = Layer::new().dir("etc").dir(&format!("d{seed}")).file("etc/common", b"common");
    for n in 0..files {
        layer = layer.file(&format!("d{seed}/f{n}"), &random.bytes(size));
    }
    layer.tar()
}

pub fn sha256(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

/// A docker archive of one image whose layers may be stored otherwise than their uncompressed tars.
pub fn archive_of(name: &str, stored: &[&[u8]], diff_ids: &[String]) -> Vec<u8> {
    let diff_ids: Vec<_> = diff_ids.iter().map(|hex| format!("sha256:{hex}")).collect();
    let config = serde_json::json!({
        "architecture": architecture(), "os": "linux", "config": {}, "created": "2024-01-01T00:00:00Z",
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
        "history": diff_ids.iter().map(|id| serde_json::json!({ "created_by": id })).collect::<Vec<_>>(),
    })
    .to_string();
    let config_name = format!("{}.json", sha256(config.as_bytes()));
    let names: Vec<_> = (0..stored.len()).map(|n| format!("{n}/layer.tar")).collect();
    let manifest = serde_json::json!([{ "Config": config_name, "RepoTags": [name], "Layers": names }]).to_string();
    let mut archive = Layer::new();
    for (name, bytes) in names.iter().zip(stored) {
        archive = archive.file(name, bytes);
    }
    archive.file(&config_name, config.as_bytes()).file("manifest.json", manifest.as_bytes()).tar()
}

fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// A docker archive of one image with these layers.
pub fn archive(name: &str, layers: &[&[u8]]) -> Vec<u8> {
    let diff_ids: Vec<_> = layers.iter().map(|tar| sha256(tar)).collect();
    archive_of(name, layers, &diff_ids)
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gz.write_all(bytes).unwrap();
    gz.finish().unwrap()
}
