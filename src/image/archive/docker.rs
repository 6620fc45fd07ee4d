//! `manifest.json`, as `docker save` writes it since 1.10 (Docker image specification v1.2, "Combined Image JSON +
//! Filesystem Changeset Format").

use super::{
    ArchivedImage, ArchivedLayer, Files, MAX_JSON, add, check_layers, digest_in_name, files::NOT_HERE, parse, verify,
};
use crate::image::{ImageConfig, MAX_CONFIG};
use graphdriver_core::{Context, Digest, ErrorKind, Result};
use serde::Deserialize;
use std::sync::Arc;

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Item {
    config: String,
    repo_tags: Option<Vec<String>>,
    /// Null for an image without layers.
    layers: Option<Vec<String>>,
}

pub(super) fn images(files: &Arc<Files>, images: &mut Vec<ArchivedImage>) -> Result<()> {
    let manifest = files.read("manifest.json", MAX_JSON)?;
    let items: Vec<Item> = parse(&manifest, "manifest.json").hint(|| super::ACCEPTED)?;
    for item in items {
        add(images, image(files, &item).doing(|| format!("reading the image with configuration {}", item.config))?);
    }
    Ok(())
}

fn image(files: &Arc<Files>, item: &Item) -> Result<ArchivedImage> {
    let raw = files.read(&item.config, MAX_CONFIG as u64)?;
    if let Some(promised) = promised(&item.config) {
        verify(&raw, promised, &item.config)?;
    }
    let config = ImageConfig::parse(raw)?;
    let paths = item.layers.as_deref().unwrap_or_default();
    check_layers(&config, paths.len())?;
    let layers = paths.iter().zip(config.diff_ids()).map(|(path, diff_id)| {
        ArchivedLayer::new(files, path, *diff_id, None).map_err(|e| match e.reason() {
            NOT_HERE => e.hint("a layer that is to be fetched from elsewhere (a foreign layer) cannot be loaded"),
            _ => e,
        })
    });
    let layers = layers.collect::<Result<_>>()?;
    let names = item.repo_tags.iter().flatten().map(|tag| {
        let name = tag.parse().map_err(|e: graphdriver_core::Error| e.with_kind(ErrorKind::Corrupt));
        name.doing(|| "reading RepoTags")
    });
    Ok(ArchivedImage { layers, names: names.collect::<Result<_>>()?, manifest_digest: None, config })
}

/// Docker names configurations after their digest: `HEX.json`, or as a blob.
fn promised(config: &str) -> Option<Digest> {
    let of_file = |hex: &str| format!("sha256:{hex}").parse().ok();
    digest_in_name(config).or_else(|| of_file(config.strip_suffix(".json")?))
}
