//! Writing archives for `save`.

use super::blob_name;
use crate::image::{ImageConfig, Reference};
use graphdriver_core::{Context, DiffId, Digest, Error, ErrorKind, Result};
use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};
use std::{
    collections::BTreeMap,
    io::{self, Write},
};
use tar::{EntryType, Header};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const BLOCK: u64 = 512;

/// What kind of archive to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// As Docker 25 and later write it: an OCI layout with `manifest.json` and `repositories`, which every Docker since
    /// 1.10, podman, skopeo and containerd read.
    Docker,
    /// The tar of an OCI layout.
    Oci,
}

/// An image to be written.
pub struct SavedImage<'a> {
    /// Its configuration.
    pub config: &'a ImageConfig,
    /// The names to save it under.
    pub names: &'a [Reference],
    /// Its layers with the sizes of their tars in bytes, bottom first.
    pub layers: &'a [(DiffId, u64)],
}

/// Writes an archive of `images` to `out`. `layer` must write exactly the tar of the layer it is given; it is called
/// once for each layer, however many images share it. The same images give the same bytes.
///
/// # Errors
/// `Corrupt` if a layer's bytes do not have the size and the DiffID they should: `out` is then of no use.
pub fn write_archive(
    out: impl Write,
    format: Format,
    images: &[SavedImage<'_>],
    layer: &mut dyn FnMut(DiffId, &mut dyn Write) -> Result<()>,
) -> Result<()> {
    let mut out = TarWriter(out);
    let mut blobs = BTreeMap::new();
    let mut top: Vec<(&str, Vec<u8>)> = vec![("index.json", index(images, format, &mut blobs)?)];
    if format == Format::Docker {
        top.push(("manifest.json", json_bytes(&docker_manifest(images))?));
    }
    top.push(("oci-layout", json_bytes(&json!({ "imageLayoutVersion": "1.0.0" }))?));
    if format == Format::Docker {
        top.push(("repositories", json_bytes(&repositories(images))?));
    }
    out.directory("blobs/")?;
    out.directory("blobs/sha256/")?;
    for (digest, blob) in blobs {
        match blob {
            Blob::Bytes(bytes) => out.file(&blob_name(digest), &bytes)?,
            Blob::Layer(size) => out.layer(DiffId(digest), size, layer)?,
        }
    }
    for (name, bytes) in top {
        out.file(name, &bytes)?;
    }
    // A tar ends with two zero blocks (POSIX pax, "ustar Interchange Format").
    out.0.write_all(&[0; 2 * BLOCK as usize])?;
    out.0.flush()?;
    Ok(())
}

enum Blob {
    Bytes(Vec<u8>),
    Layer(u64),
}

fn json_bytes(value: &Value) -> Result<Vec<u8>> {
    serde_json::to_vec(value).map_err(|e| Error::new(ErrorKind::InvalidInput, e.to_string()))
}

fn descriptor(kind: &str, digest: Digest, size: u64) -> Value {
    json!({ "mediaType": kind, "digest": digest, "size": size })
}

/// `index.json`: one entry for each name of each image, as Docker and containerd write it. Fills in the blobs.
fn index(images: &[SavedImage<'_>], format: Format, blobs: &mut BTreeMap<Digest, Blob>) -> Result<Vec<u8>> {
    let mut manifests = Vec::new();
    for image in images {
        let listed = image.layers.iter().map(|(id, _)| id);
        if !listed.eq(image.config.diff_ids()) {
            let why = "the layers to save are not those of the configuration";
            return Err(Error::new(ErrorKind::InvalidInput, why).doing(format!("saving image {}", image.config.id())));
        }
        blobs.insert(image.config.id(), Blob::Bytes(image.config.raw().to_vec()));
        blobs.extend(image.layers.iter().map(|(id, size)| (id.0, Blob::Layer(*size))));
        let manifest = json_bytes(&json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": descriptor(CONFIG, image.config.id(), image.config.raw().len() as u64),
            "layers": image.layers.iter().map(|(id, size)| descriptor(LAYER, id.0, *size)).collect::<Vec<_>>(),
        }))?;
        let entry = descriptor(MANIFEST, Digest::of(&manifest), manifest.len() as u64);
        blobs.insert(Digest::of(&manifest), Blob::Bytes(manifest));
        if image.names.is_empty() {
            manifests.push(entry.clone());
        }
        for name in image.names {
            let mut entry = entry.clone();
            entry["annotations"] = annotations(name, format);
            manifests.push(entry);
        }
    }
    json_bytes(&json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": manifests,
    }))
}

/// Docker puts only the tag into `ref.name`; podman and skopeo, which look for images in OCI archives by it, the whole
/// name.
fn annotations(name: &Reference, format: Format) -> Value {
    let canonical = name.canonical();
    let ref_name = match (format, name.tag()) {
        (Format::Docker, Some(tag)) => tag,
        _ => &canonical,
    };
    json!({ "io.containerd.image.name": canonical, "org.opencontainers.image.ref.name": ref_name })
}

fn docker_manifest(images: &[SavedImage<'_>]) -> Value {
    let item = |image: &SavedImage<'_>| {
        let layers: Vec<_> = image.layers.iter().map(|(id, _)| blob_name(id.0)).collect();
        let sources = image.layers.iter().map(|(id, size)| (id.to_string(), descriptor(LAYER, id.0, *size)));
        let tags: Vec<_> = tagged(image).map(|(name, tag)| format!("{}:{tag}", name.repository())).collect();
        json!({
            "Config": blob_name(image.config.id()),
            "RepoTags": tags,
            "Layers": layers,
            "LayerSources": sources.collect::<Map<_, _>>(),
        })
    };
    images.iter().map(item).collect()
}

/// What Docker before 1.10 read; current Docker still writes it, with the topmost layer's digest.
fn repositories(images: &[SavedImage<'_>]) -> Value {
    let mut all: BTreeMap<String, BTreeMap<&str, String>> = BTreeMap::new();
    for image in images {
        let Some((top, _)) = image.layers.last() else { continue };
        for (name, tag) in tagged(image) {
            all.entry(name.repository()).or_default().insert(tag, top.0.hex());
        }
    }
    json!(all)
}

fn tagged<'a>(image: &'a SavedImage<'_>) -> impl Iterator<Item = (&'a Reference, &'a str)> {
    image.names.iter().filter_map(|name| Some((name, name.tag()?)))
}

struct TarWriter<W>(W);

impl<W: Write> TarWriter<W> {
    fn header(&mut self, name: &str, kind: EntryType, size: u64) -> Result<()> {
        let mut header = Header::new_gnu();
        header.set_path(name)?;
        header.set_entry_type(kind);
        header.set_mode(if kind == EntryType::Directory { 0o755 } else { 0o644 });
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(size);
        header.set_cksum();
        self.0.write_all(header.as_bytes()).doing(|| "writing the archive")
    }

    fn directory(&mut self, name: &str) -> Result<()> {
        self.header(name, EntryType::Directory, 0)
    }

    fn file(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        self.header(name, EntryType::Regular, bytes.len() as u64)?;
        self.0.write_all(bytes).doing(|| "writing the archive")?;
        self.pad(bytes.len() as u64)
    }

    fn pad(&mut self, size: u64) -> Result<()> {
        let missing = size.next_multiple_of(BLOCK) - size;
        self.0.write_all(&[0; BLOCK as usize][..missing as usize]).doing(|| "writing the archive")
    }

    fn layer(
        &mut self,
        id: DiffId,
        size: u64,
        write: &mut dyn FnMut(DiffId, &mut dyn Write) -> Result<()>,
    ) -> Result<()> {
        let step = || format!("saving layer {id}");
        self.header(&blob_name(id.0), EntryType::Regular, size)?;
        let mut exact = Exact { out: &mut self.0, hasher: Sha256::new(), left: size };
        write(id, &mut exact).doing(step)?;
        if exact.left > 0 {
            let why = format!("its tar is {} bytes shorter than the {size} it should have", exact.left);
            return Err(Error::new(ErrorKind::Corrupt, why).doing(step()));
        }
        let found = Digest::from_bytes(exact.hasher.finalize().into());
        if found != id.0 {
            let why = format!("its tar has the digest {found}, and should have {id}");
            return Err(Error::new(ErrorKind::Corrupt, why).doing(step()));
        }
        self.pad(size)
    }
}

/// Takes so many bytes and hashes them.
struct Exact<'w, W> {
    out: &'w mut W,
    hasher: Sha256,
    left: u64,
}

impl<W: Write> Write for Exact<'_, W> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        if buf.len() as u64 > self.left {
            return Err(Error::new(ErrorKind::Corrupt, "its tar is longer than it should be").into());
        }
        let n = self.out.write(buf)?;
        self.hasher.update(&buf[..n]);
        self.left -= n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}
