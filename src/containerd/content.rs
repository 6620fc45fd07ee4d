//! containerd's content store: adding a blob to it over containerd's own socket.

use graphdriver_containerd_api::{
    content::{self as api, content_client::ContentClient},
    leases::{AddResourceRequest, CreateRequest, Resource, leases_client::LeasesClient},
};
use jiff::{SignedDuration, Timestamp};
use prost_types::FieldMask;
use sha2::{Digest, Sha256};
use std::{
    collections::BTreeMap,
    io::{self, Write},
    path::Path,
};
use tokio::{runtime::Handle, sync::mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Code, Request, Status, Streaming,
    metadata::{Ascii, MetadataValue},
    transport::{Channel, Endpoint},
};

pub(super) const NAMESPACE: &str = "containerd-namespace";
pub(super) const LEASE: &str = "containerd-lease";
/// The digest of the tar within a compressed blob.
const UNCOMPRESSED: &str = "containerd.io/uncompressed";

/// Bytes in one message; containerd takes 16 MiB.
const CHUNK: usize = 1 << 20;

/// How long a blob stays that nobody refers to, if who asks for it holds no lease.
const KEPT: SignedDuration = SignedDuration::from_hours(1);

/// containerd, on behalf of one call. For threads that may wait.
pub(super) struct Content {
    runtime: Handle,
    channel: Channel,
    namespace: MetadataValue<Ascii>,
    lease: MetadataValue<Ascii>,
}

impl Content {
    /// In that namespace, and under that lease or a new one that ends by itself: containerd need not hand on the lease of who
    /// has called it, and its garbage collection takes what has none.
    pub(super) fn connect(
        runtime: Handle,
        address: &Path,
        namespace: &str,
        lease: Option<&MetadataValue<Ascii>>,
    ) -> Result<Content, Status> {
        let odd = |_| Status::invalid_argument(format!("{namespace:?} is no namespace"));
        let namespace: MetadataValue<Ascii> = namespace.parse().map_err(odd)?;
        let channel = Endpoint::try_from(format!("unix://{}", address.display())).and_then(|endpoint| {
            let connect = endpoint.connect();
            runtime.block_on(connect)
        });
        let channel = channel.map_err(|e| {
            let why = source(&e);
            tracing::warn!("containerd does not answer at {}: {why} (set --containerd)", address.display());
            Status::unimplemented(format!("containerd does not answer at {}", address.display()))
        })?;
        let mut content = Content { runtime, channel, namespace: namespace.clone(), lease: namespace.clone() };
        content.lease = match lease {
            Some(lease) => lease.clone(),
            None => content.new_lease()?,
        };
        Ok(content)
    }

    fn new_lease(&self) -> Result<MetadataValue<Ascii>, Status> {
        let until = Timestamp::now() + KEPT;
        let labels = BTreeMap::from([("containerd.io/gc.expire".to_owned(), until.to_string())]);
        let mut asked = Request::new(CreateRequest { id: unique(), labels });
        asked.metadata_mut().insert(NAMESPACE, self.namespace.clone());
        let mut client = LeasesClient::new(self.channel.clone());
        let made = self.runtime.block_on(client.create(asked))?.into_inner().lease.unwrap_or_default();
        made.id.parse().map_err(|_| Status::internal(format!("containerd's lease {:?} is no header", made.id)))
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert(NAMESPACE, self.namespace.clone());
        request.metadata_mut().insert(LEASE, self.lease.clone());
        request
    }

    fn client(&self) -> ContentClient<Channel> {
        ContentClient::new(self.channel.clone())
    }

    /// Begins a blob under that name, or a new one if it is empty. It is taken away if it is dropped under a new one.
    pub(super) fn upload(&self, reference: &str) -> Result<Upload<'_>, Status> {
        let own = reference.is_empty();
        let reference = if own { unique() } else { reference.to_owned() };
        let (send, receive) = mpsc::channel(1);
        let stat = api::WriteContentRequest {
            action: api::WriteAction::Stat.into(),
            r#ref: reference.clone(),
            ..Default::default()
        };
        let replies = self.runtime.block_on(async {
            send.send(stat).await.map_err(|_| ended())?;
            let mut replies = self.client().write(self.request(ReceiverStream::new(receive))).await?.into_inner();
            replies.message().await?.ok_or_else(ended)?;
            Ok::<_, Status>(replies)
        })?;
        let (buffer, hash) = (Vec::with_capacity(CHUNK), Sha256::new());
        Ok(Upload { content: self, reference, own, send, replies, buffer, size: 0, hash, failed: None })
    }

    /// A blob that was there already is not under the lease yet, and may lack the label.
    fn take_up(&self, digest: &str, diff: &str) -> Result<(), Status> {
        let id = self.lease.to_str().map_err(|e| Status::invalid_argument(e.to_string()))?.to_owned();
        let resource = Some(Resource { id: digest.into(), r#type: "content".into() });
        let asked = self.request(AddResourceRequest { id, resource });
        self.runtime.block_on(LeasesClient::new(self.channel.clone()).add_resource(asked))?;
        self.label(digest, diff)
    }

    fn label(&self, digest: &str, diff: &str) -> Result<(), Status> {
        let asked = self.request(api::InfoRequest { digest: digest.into() });
        let mut info = self.runtime.block_on(self.client().info(asked))?.into_inner().info.unwrap_or_default();
        if info.labels.contains_key(UNCOMPRESSED) {
            return Ok(());
        }
        info.labels.insert(UNCOMPRESSED.into(), diff.into());
        let mask = FieldMask { paths: vec![format!("labels.{UNCOMPRESSED}")] };
        let asked = self.request(api::UpdateRequest { info: Some(info), update_mask: Some(mask) });
        self.runtime.block_on(self.client().update(asked)).map(drop)
    }
}

/// A blob on its way.
pub(super) struct Upload<'c> {
    content: &'c Content,
    reference: String,
    own: bool,
    send: mpsc::Sender<api::WriteContentRequest>,
    replies: Streaming<api::WriteContentResponse>,
    buffer: Vec<u8>,
    /// What containerd has of it.
    size: i64,
    hash: Sha256,
    failed: Option<Status>,
}

impl Upload<'_> {
    /// Why writing failed, if that was containerd's fault.
    pub(super) fn failure(&mut self) -> Option<Status> {
        self.failed.take()
    }

    /// Makes the blob visible with these labels and that of its tar's digest; returns its digest and size in bytes.
    pub(super) fn commit(mut self, mut labels: BTreeMap<String, String>, diff: &str) -> Result<(String, i64), Status> {
        self.send_buffer()?;
        let digest = format!("sha256:{}", hex::encode(self.hash.clone().finalize()));
        labels.insert(UNCOMPRESSED.into(), diff.into());
        let commit = api::WriteContentRequest {
            action: api::WriteAction::Commit.into(),
            r#ref: self.reference.clone(),
            total: self.size,
            expected: digest.clone(),
            offset: self.size,
            labels,
            ..Default::default()
        };
        match self.exchange(commit) {
            Ok(()) => self.own = false,
            Err(e) if e.code() == Code::AlreadyExists => self.content.take_up(&digest, diff)?,
            Err(e) => return Err(e),
        }
        Ok((digest, self.size))
    }

    fn send_buffer(&mut self) -> Result<(), Status> {
        let data = std::mem::replace(&mut self.buffer, Vec::with_capacity(CHUNK));
        if data.is_empty() {
            return Ok(());
        }
        self.hash.update(&data);
        let (offset, size) = (self.size, self.size + data.len() as i64);
        let (action, r#ref) = (api::WriteAction::Write.into(), self.reference.clone());
        self.exchange(api::WriteContentRequest { action, r#ref, offset, data, ..Default::default() })?;
        self.size = size;
        Ok(())
    }

    fn exchange(&mut self, message: api::WriteContentRequest) -> Result<(), Status> {
        let Upload { send, replies, content, .. } = self;
        content.runtime.block_on(async {
            // If nobody takes it, the reply says why.
            let _ = send.send(message).await;
            replies.message().await?.map(drop).ok_or_else(ended)
        })
    }
}

impl Write for Upload<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if self.buffer.len() >= CHUNK {
            self.send_buffer().map_err(|e| {
                let told = io::Error::other(e.message().to_owned());
                self.failed = Some(e);
                told
            })?;
        }
        let taken = data.len().min(CHUNK - self.buffer.len());
        self.buffer.extend_from_slice(&data[..taken]);
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Upload<'_> {
    fn drop(&mut self) {
        if self.own {
            let asked = self.content.request(api::AbortRequest { r#ref: self.reference.clone() });
            match self.content.runtime.block_on(self.content.client().abort(asked)) {
                Err(e) if e.code() != Code::NotFound => tracing::warn!("taking back {}: {e}", self.reference),
                _ => {}
            }
        }
    }
}

fn unique() -> String {
    format!("graphdriver-diff-{:032x}", fastrand::u128(..))
}

fn ended() -> Status {
    Status::unavailable("containerd has ended the call that writes the blob")
}

/// The innermost reason.
fn source(e: &dyn std::error::Error) -> String {
    e.source().map_or_else(|| e.to_string(), source)
}
