//! `index.json` (OCI image specification, "Image Layout", "Image Index" and "Image Manifest").

use super::{ArchivedImage, ArchivedLayer, Files, MAX_JSON, add, blob_name, check_layers, parse, verify};
use crate::image::{ImageConfig, MAX_CONFIG, Reference, host_architecture};
use graphdriver_core::{Context, Digest, Error, ErrorKind, Result};
use oci_spec::image::{Descriptor, ImageIndex, ImageManifest, MediaType};
use std::sync::Arc;

/// Indexes within indexes that are followed; tools write one or two levels.
const MAX_DEPTH: usize = 4;
/// Manifests read of one archive: without a limit a small one could name the same large one again and again.
const MAX_MANIFESTS: usize = 10_000;

const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";

pub(super) fn images(files: &Arc<Files>, images: &mut Vec<ArchivedImage>) -> Result<()> {
    check_version(files)?;
    let index: ImageIndex = parse(&files.read("index.json", MAX_JSON)?, "index.json")?;
    let mut reader = Reader { files, manifests: 0 };
    for group in groups(index.manifests()) {
        let names = group.iter().filter_map(|d| name(d)).collect();
        let found = match group[..] {
            [only] => reader.read(only, 0)?,
            _ => reader.choose(&group, 0)?,
        };
        if let Some(found) = found {
            add(images, ArchivedImage { names, ..found });
        }
    }
    Ok(())
}

fn check_version(files: &Files) -> Result<()> {
    if files.open("oci-layout")?.is_none() {
        return Ok(());
    }
    let layout: serde_json::Value = parse(&files.read("oci-layout", MAX_JSON)?, "oci-layout")?;
    match layout.get("imageLayoutVersion").and_then(|v| v.as_str()) {
        Some("1.0.0") => Ok(()),
        other => {
            let why = format!("the OCI layout has version {}, and only 1.0.0 is known", other.unwrap_or("none"));
            Err(Error::new(ErrorKind::Unsupported, why))
        }
    }
}

/// What belongs together at the top of an index: builders write one image's platforms there side by side, all under the
/// same name or under none. Everything else is an image of its own.
fn groups(manifests: &[Descriptor]) -> Vec<Vec<&Descriptor>> {
    let mut groups: Vec<Vec<&Descriptor>> = Vec::new();
    for descriptor in manifests.iter().filter(|d| !is_attestation(d)) {
        let sibling = |group: &&mut Vec<&Descriptor>| {
            let same_name = name(group[0]) == name(descriptor);
            let others = |d: &&Descriptor| d.platform().is_some() && d.platform() != descriptor.platform();
            descriptor.platform().is_some() && same_name && group.iter().all(others)
        };
        match groups.iter_mut().find(sibling) {
            Some(group) => group.push(descriptor),
            None => groups.push(vec![descriptor]),
        }
    }
    groups
}

/// BuildKit's provenance and software lists travel as manifests beside the images they speak of.
fn is_attestation(descriptor: &Descriptor) -> bool {
    let unknown =
        |p: &oci_spec::image::Platform| p.os().to_string() == "unknown" && p.architecture().to_string() == "unknown";
    descriptor.platform().as_ref().is_some_and(unknown) || annotation(descriptor, "vnd.docker.reference.type").is_some()
}

fn annotation<'d>(descriptor: &'d Descriptor, key: &str) -> Option<&'d str> {
    descriptor.annotations().as_ref()?.get(key).map(String::as_str)
}

fn name(descriptor: &Descriptor) -> Option<Reference> {
    let full = annotation(descriptor, "io.containerd.image.name");
    let text = match (full, annotation(descriptor, "org.opencontainers.image.ref.name")) {
        (Some(full), _) => full.to_owned(),
        (None, Some(name)) if name.contains(['/', ':', '@']) => name.to_owned(),
        (None, Some(tag)) => format!("localhost/{tag}"),
        (None, None) => return None,
    };
    // The specification lets the annotation be more than names of images.
    let parsed = text.parse();
    parsed.inspect_err(|e| tracing::warn!("loading an image without its name: {e}")).ok()
}

struct Reader<'f> {
    files: &'f Arc<Files>,
    manifests: usize,
}

impl Reader<'_> {
    /// The image a descriptor stands for; none if it is no image at all.
    fn read(&mut self, descriptor: &Descriptor, depth: usize) -> Result<Option<ArchivedImage>> {
        let step = || format!("reading {}", descriptor.digest());
        match descriptor.media_type() {
            MediaType::ImageIndex => self.nested(descriptor, depth).doing(step),
            MediaType::Other(t) if t == DOCKER_INDEX => self.nested(descriptor, depth).doing(step),
            MediaType::ImageManifest => self.image(descriptor).doing(step),
            MediaType::Other(t) if t == DOCKER_MANIFEST => self.image(descriptor).doing(step),
            other => {
                tracing::debug!("skipping {}: {other} is no image", descriptor.digest());
                Ok(None)
            }
        }
    }

    fn nested(&mut self, descriptor: &Descriptor, depth: usize) -> Result<Option<ArchivedImage>> {
        if depth >= MAX_DEPTH {
            return Err(Error::new(ErrorKind::Corrupt, format!("indexes are nested more than {MAX_DEPTH} deep")));
        }
        let (bytes, _) = self.blob(descriptor, MAX_JSON)?;
        let index: ImageIndex = parse(&bytes, "the index")?;
        let images: Vec<&Descriptor> = index.manifests().iter().filter(|d| !is_attestation(d)).collect();
        self.choose(&images, depth + 1)
    }

    /// Of several platforms this host's, else the only one that is there: archives may name more than they hold.
    fn choose(&mut self, descriptors: &[&Descriptor], depth: usize) -> Result<Option<ArchivedImage>> {
        let mut present = Vec::new();
        for descriptor in descriptors {
            if self.files.open(&blob_name(digest(descriptor)?))?.is_some() {
                present.push(*descriptor);
            }
        }
        if let [only] = present[..] {
            return self.read(only, depth);
        }
        let mut ranked = Vec::new();
        for descriptor in present {
            if let Some((os, arch, variant)) = self.platform(descriptor)?
                && os == "linux"
                && arch == host_architecture()
            {
                ranked.push((rank(&variant), descriptor));
            }
        }
        match ranked.iter().min_by_key(|(rank, _)| *rank) {
            Some((_, best)) => self.read(best, depth),
            None => Err(no_platform(descriptors)),
        }
    }

    fn platform(&mut self, descriptor: &Descriptor) -> Result<Option<(String, String, String)>> {
        if let Some(p) = descriptor.platform() {
            let variant = p.variant().clone().unwrap_or_default();
            return Ok(Some((p.os().to_string(), p.architecture().to_string(), variant)));
        }
        if !matches!(descriptor.media_type(), MediaType::ImageManifest) {
            return Ok(None);
        }
        let image = self.image(descriptor)?;
        Ok(image.map(|i| {
            let c = &i.config;
            (c.os().to_owned(), c.architecture().to_owned(), c.variant().unwrap_or_default().to_owned())
        }))
    }

    fn image(&mut self, descriptor: &Descriptor) -> Result<Option<ArchivedImage>> {
        let (bytes, manifest_digest) = self.blob(descriptor, MAX_JSON)?;
        let manifest: ImageManifest = parse(&bytes, "the manifest")?;
        match manifest.config().media_type() {
            MediaType::ImageConfig => {}
            MediaType::Other(t) if t == DOCKER_CONFIG => {}
            other => {
                tracing::debug!("skipping {manifest_digest}: an artifact of type {other} is no image");
                return Ok(None);
            }
        }
        let (raw, _) = self.blob(manifest.config(), MAX_CONFIG as u64).doing(|| "reading the configuration")?;
        let config = ImageConfig::parse(raw)?;
        check_layers(&config, manifest.layers().len())?;
        let layers = manifest.layers().iter().zip(config.diff_ids()).map(|(layer, diff_id)| {
            let digest = digest(layer)?;
            let found = ArchivedLayer::new(self.files, &blob_name(digest), *diff_id, Some((digest, layer.size())));
            found.map_err(|e| explain(e, layer))
        });
        let layers = layers.collect::<Result<_>>()?;
        Ok(Some(ArchivedImage { layers, names: Vec::new(), manifest_digest: Some(manifest_digest), config }))
    }

    /// A small blob, its size and digest verified.
    fn blob(&mut self, descriptor: &Descriptor, limit: u64) -> Result<(Vec<u8>, Digest)> {
        self.manifests += 1;
        if self.manifests > MAX_MANIFESTS {
            return Err(Error::new(ErrorKind::Corrupt, format!("it names more than {MAX_MANIFESTS} manifests")));
        }
        let digest = digest(descriptor)?;
        let name = blob_name(digest);
        let bytes = self.files.read(&name, limit)?;
        if bytes.len() as u64 != descriptor.size() {
            let why = format!("{name} has {} bytes, and {} are declared", bytes.len(), descriptor.size());
            return Err(Error::new(ErrorKind::Corrupt, why));
        }
        verify(&bytes, digest, &name)?;
        Ok((bytes, digest))
    }
}

fn digest(descriptor: &Descriptor) -> Result<Digest> {
    descriptor.digest().to_string().parse().map_err(|e: Error| e.with_kind(ErrorKind::Unsupported))
}

/// Which variant of the host's processor is taken if there are several: one for every such processor first.
fn rank(variant: &str) -> usize {
    let order: &[&str] = match host_architecture() {
        "arm" => &["v7", "", "v6", "v5"],
        "arm64" => &["", "v8"],
        _ => &["", "v1"],
    };
    order.iter().position(|v| *v == variant).unwrap_or(order.len())
}

fn no_platform(descriptors: &[&Descriptor]) -> Error {
    let list: Vec<String> = descriptors
        .iter()
        .filter_map(|d| d.platform().as_ref())
        .map(|p| {
            let variant = p.variant().as_ref().map(|v| format!("/{v}")).unwrap_or_default();
            format!("{}/{}{variant}", p.os(), p.architecture())
        })
        .collect();
    let why = format!(
        "the archive holds no image for linux/{}; it names {}",
        host_architecture(),
        if list.is_empty() { "no platform".to_owned() } else { list.join(", ") }
    );
    Error::new(ErrorKind::Unsupported, why).hint("save the image for this platform")
}

fn explain(e: Error, layer: &Descriptor) -> Error {
    let kind = layer.media_type().to_string();
    let foreign = kind.contains("nondistributable") || kind.contains("foreign");
    let e = match layer.urls() {
        Some(urls) if foreign || !urls.is_empty() => e.hint(format!(
            "the layer is to be fetched from {}: pull the image with its foreign layers",
            urls.join(", ")
        )),
        _ if foreign => {
            e.hint("the layer may not be distributed and was left out: pull the image with its foreign layers")
        }
        _ => e,
    };
    e.doing(format!("reading a layer of type {kind}"))
}
