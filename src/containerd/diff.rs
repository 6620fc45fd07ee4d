//! containerd's `Diff` service: layer tars of our own snapshots, by what the driver knows of them.
//!
//! What is not ours to do is UNIMPLEMENTED, for which containerd asks its next differ.

use super::{
    content::{Content, LEASE, NAMESPACE, Upload, unwanted},
    mounts::translate,
    service::{Call, Reply, Service, blocking, namespace_in, process},
    status,
};
use crate::{Difference, Snapshots};
use flate2::write::GzEncoder;
use graphdriver_containerd_api::{
    diff::{self as api, diff_server},
    types,
};
use graphdriver_core::{Cancel, ErrorKind, LayerId, Mount, Result};
use sha2::{Digest, Sha256};
use std::{
    collections::{BTreeMap, HashSet},
    io::{self, Write},
    path::PathBuf,
    sync::Arc,
};
use tokio::{runtime::Handle, sync::Semaphore};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Status, metadata::MetadataMap};

#[tonic::async_trait]
impl diff_server::Diff for Service {
    async fn apply(&self, request: Request<api::ApplyRequest>) -> Reply<api::ApplyResponse> {
        let refused = async { Err(Status::unimplemented("tars are unpacked by containerd")) };
        self.run(Call::new("Apply", &request, ""), refused).await
    }

    async fn diff(&self, request: Request<api::DiffRequest>) -> Reply<api::DiffResponse> {
        let (token, _until_dropped) = self.wanted();
        let asked = Asked {
            snapshots: self.snapshots.clone(),
            request: request.get_ref().clone(),
            headers: request.metadata().clone(),
            mounter: process(&request),
            containerd: self.containerd.clone(),
            turns: self.tars.clone(),
            token,
        };
        self.run(Call::new("Diff", &request, &request.get_ref().r#ref), asked.answer()).await
    }
}

struct Asked {
    snapshots: Arc<Snapshots>,
    request: api::DiffRequest,
    headers: MetadataMap,
    mounter: Option<u32>,
    containerd: PathBuf,
    turns: Arc<Semaphore>,
    /// Cancelled when nobody wants the answer any more.
    token: CancellationToken,
}

impl Asked {
    async fn answer(self) -> Result<api::DiffResponse, Status> {
        let Asked { snapshots, request, headers, mounter, containerd, turns, token } = self;
        let (media_type, compression) = compression(&request.media_type)?;
        if request.source_date_epoch.is_some() {
            return Err(Status::unimplemented("times are written as they are"));
        }
        let (left, right, store) = (request.left, request.right, snapshots.clone());
        let difference = blocking(move || find(&store, mounter, left, right)).await?;
        // containerd 1.7 tells the namespace in the names of snapshots alone.
        let namespace =
            headers.get(NAMESPACE).and_then(|value| value.to_str().ok()).or(namespace_in(difference.name()));
        let namespace = namespace.ok_or_else(|| Status::failed_precondition("namespace is required"))?.to_owned();
        let turn = token.run_until_cancelled(turns.acquire_owned()).await.ok_or_else(unwanted)?;
        let (cancel, runtime) = (cancelled_with(&token), Handle::current());
        let (digest, size) = blocking(move || {
            let _turn = turn;
            let content = Content::connect(runtime, &containerd, &namespace, headers.get(LEASE), token)?;
            let upload = content.upload(&request.r#ref)?;
            let tar = Tar { snapshots: &snapshots, difference, compression };
            tar.write(upload, &cancel, request.labels.into_iter().collect())
        })
        .await?;
        let diff = types::Descriptor { media_type, digest, size, ..Default::default() };
        Ok(api::DiffResponse { diff: Some(diff) })
    }
}

/// The same for threads that wait for disks.
fn cancelled_with(token: &CancellationToken) -> Cancel {
    let (cancel, token) = (Cancel::default(), token.clone());
    let set = cancel.clone();
    tokio::spawn(async move {
        token.cancelled().await;
        set.set();
    });
    cancel
}

struct Tar<'s> {
    snapshots: &'s Snapshots,
    difference: Difference,
    compression: Compression,
}

impl Tar<'_> {
    /// Returns the blob's digest and size in bytes.
    fn write(
        self,
        mut upload: Upload<'_>,
        cancel: &Cancel,
        labels: BTreeMap<String, String>,
    ) -> Result<(String, i64), Status> {
        let Tar { snapshots, difference, compression } = self;
        let mut hash = Sha256::new();
        let written = compression.write(&mut upload, |out| {
            snapshots.write_difference(&difference, cancel, Hashing { hash: &mut hash, out })
        });
        written.map_err(|e| match e.kind() {
            _ if let Some(failure) = upload.failure() => failure,
            // Who mounts it may be able to.
            ErrorKind::Unsupported | ErrorKind::Busy => Status::unimplemented(e.to_string()),
            _ => status::status(&e),
        })?;
        let diff_id = format!("sha256:{}", hex::encode(hash.finalize()));
        let (digest, size) = upload.commit(labels, &diff_id)?;
        tracing::debug!(snapshot = difference.name(), digest, size, "layer tar");
        Ok((digest, size))
    }
}

fn find(
    snapshots: &Snapshots,
    mounter: Option<u32>,
    left: Vec<types::Mount>,
    right: Vec<types::Mount>,
) -> Result<Difference, Status> {
    let numbers = numbers(left.iter().chain(&right));
    let (left, right) = (plain(left), plain(right));
    let is = |wanted: &[types::Mount], recipe: Vec<Mount>| translate(recipe).is_ok_and(|own| plain(own) == wanted);
    let found = snapshots.difference(&numbers, mounter, &|recipe| is(&left, recipe), &|recipe| is(&right, recipe));
    found
        .map_err(|e| status::status(&e))?
        .ok_or_else(|| Status::unimplemented("these are not the mounts of a snapshot and its parent here"))
}

/// In which only the order of options may differ.
fn plain(mut mounts: Vec<types::Mount>) -> Vec<types::Mount> {
    mounts.iter_mut().for_each(|mount| mount.options.sort());
    mounts
}

/// More numbers than any recipe has: a page of options cannot name as many layers.
const MOST_NUMBERS: usize = 1000;

/// The numbers in the descriptions, sources first, as those of overlays are of the very layer.
fn numbers<'m>(mounts: impl Iterator<Item = &'m types::Mount> + Clone) -> Vec<LayerId> {
    let sources = mounts.clone().map(|mount| &mount.source);
    let texts = sources.chain(mounts.flat_map(|mount| &mount.options));
    let words = texts.flat_map(|text| text.split(|c: char| !c.is_ascii_digit()));
    let mut seen = HashSet::new();
    words.filter_map(|word| word.parse().ok()).filter(|number| seen.insert(*number)).take(MOST_NUMBERS).collect()
}

enum Compression {
    None,
    Gzip,
    Zstd,
}

/// The media type of what will be written, and how.
fn compression(media_type: &str) -> Result<(String, Compression), Status> {
    const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
    let compression = match media_type.strip_prefix(LAYER) {
        None if media_type.is_empty() => return Ok((format!("{LAYER}+gzip"), Compression::Gzip)),
        Some("") => Compression::None,
        Some("+gzip") => Compression::Gzip,
        Some("+zstd") => Compression::Zstd,
        _ => return Err(Status::unimplemented(format!("unsupported diff media type {media_type:?}"))),
    };
    Ok((media_type.to_owned(), compression))
}

impl Compression {
    fn write(self, out: &mut dyn Write, fill: impl FnOnce(&mut dyn Write) -> Result<()>) -> Result<()> {
        match self {
            Compression::None => fill(out),
            Compression::Gzip => {
                let mut encoder = GzEncoder::new(out, flate2::Compression::default());
                fill(&mut encoder)?;
                Ok(encoder.finish().map(drop)?)
            }
            Compression::Zstd => {
                let mut encoder = zstd::Encoder::new(out, zstd::DEFAULT_COMPRESSION_LEVEL)?;
                fill(&mut encoder)?;
                Ok(encoder.finish().map(drop)?)
            }
        }
    }
}

struct Hashing<'h> {
    hash: &'h mut Sha256,
    out: &'h mut dyn Write,
}

impl Write for Hashing<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let written = self.out.write(data)?;
        self.hash.update(&data[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_numbers_are_looked_for_than_a_recipe_has() {
        let mount = |source: &str, options: &[String]| types::Mount {
            source: source.into(),
            options: options.to_vec(),
            ..Default::default()
        };
        let few = [mount("a:7", &["lowerdir=/1/diff:/2/diff".into()]), mount("b:8", &["upperdir=/7".into()])];
        assert_eq!(numbers(few.iter()), [7, 8, 1, 2].map(LayerId));
        let many: Vec<_> = (0..100_000).map(|n| n.to_string()).collect();
        assert_eq!(numbers([mount("overlay", &many)].iter()).len(), MOST_NUMBERS);
    }
}
