//! containerd's content store: adding a blob to it over containerd's own socket.

use graphdriver_containerd_api::{
    content::{self as api, content_client::ContentClient},
    leases::{AddResourceRequest, CreateRequest, DeleteRequest, Resource, leases_client::LeasesClient},
};
use jiff::{SignedDuration, Timestamp};
use prost_types::FieldMask;
use sha2::{Digest, Sha256};
use std::{
    collections::BTreeMap,
    io::{self, Write},
    path::Path,
    time::Duration,
};
use tokio::{runtime::Handle, sync::mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
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

/// How long a blob is kept on its way, should we be killed: longer than any takes, as leases cannot be made longer.
const ON_ITS_WAY: SignedDuration = SignedDuration::from_hours(24);

/// How long containerd may take for what an unwanted call cannot leave undone.
const PATIENCE: Duration = Duration::from_secs(10);

/// containerd, on behalf of one call. For threads that may wait.
pub(super) struct Content {
    runtime: Handle,
    channel: Channel,
    namespace: MetadataValue<Ascii>,
    lease: MetadataValue<Ascii>,
    /// Whether it is made for this call, and ends with it.
    own_lease: bool,
    /// Cancelled when nobody wants the blob any more.
    token: CancellationToken,
}

impl Content {
    /// In that namespace, and under that lease or a new one: containerd need not hand on the lease of who has called it, and
    /// its garbage collection takes what has none.
    pub(super) fn connect(
        runtime: Handle,
        address: &Path,
        namespace: &str,
        lease: Option<&MetadataValue<Ascii>>,
        token: CancellationToken,
    ) -> Result<Content, Status> {
        let odd = |_| Status::invalid_argument(format!("{namespace:?} is no namespace"));
        let namespace: MetadataValue<Ascii> = namespace.parse().map_err(odd)?;
        let endpoint = Endpoint::try_from(format!("unix://{}", address.display()));
        let channel = endpoint.and_then(|endpoint| runtime.block_on(endpoint.connect())).map_err(|e| {
            let why = source(&e);
            tracing::warn!("containerd does not answer at {}: {why} (set --containerd)", address.display());
            Status::unimplemented(format!("containerd does not answer at {}", address.display()))
        })?;
        let (own_lease, lease) = (lease.is_none(), lease.cloned().map_or_else(|| header(unique()), Ok)?);
        let content = Content { runtime, channel, namespace, lease, own_lease, token };
        if own_lease {
            content.create_lease(&content.lease, ON_ITS_WAY)?;
        }
        Ok(content)
    }

    fn create_lease(&self, lease: &MetadataValue<Ascii>, ends_after: SignedDuration) -> Result<(), Status> {
        let labels = BTreeMap::from([("containerd.io/gc.expire".into(), (Timestamp::now() + ends_after).to_string())]);
        let asked = self.request_of(CreateRequest { id: text(lease)?, labels });
        self.begin(self.leases().create(asked)).map(drop)
    }

    /// Waits for an answer as long as it is wanted.
    fn wait<T>(&self, answer: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
        self.runtime.block_on(self.token.run_until_cancelled(answer)).unwrap_or_else(|| Err(unwanted()))
    }

    /// Waits for what will have to be undone, and cannot be before containerd has done it.
    fn begin<T>(&self, answer: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
        let unwanted_for_long = async {
            self.token.cancelled().await;
            tokio::time::sleep(PATIENCE).await;
        };
        self.runtime.block_on(async {
            tokio::select! {
                answer = answer => answer,
                () = unwanted_for_long => Err(unwanted()),
            }
        })
    }

    /// Waits for what is done at the end, wanted or not.
    fn undo<T>(&self, what: &str, answer: impl Future<Output = Result<T, Status>>) {
        match self.runtime.block_on(async { tokio::time::timeout(PATIENCE, answer).await }) {
            Ok(Err(e)) if e.code() != Code::NotFound => tracing::warn!("taking back {what}: {e}"),
            Err(_) => tracing::warn!("taking back {what}: containerd does not answer"),
            Ok(_) => {}
        }
    }

    fn request_of<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert(NAMESPACE, self.namespace.clone());
        request
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = self.request_of(message);
        request.metadata_mut().insert(LEASE, self.lease.clone());
        request
    }

    fn client(&self) -> ContentClient<Channel> {
        ContentClient::new(self.channel.clone())
    }

    fn leases(&self) -> LeasesClient<Channel> {
        LeasesClient::new(self.channel.clone())
    }

    /// Begins a blob under that name, or a new one if it is empty. It is taken away when it is dropped.
    pub(super) fn upload(&self, reference: &str) -> Result<Upload<'_>, Status> {
        let reference = if reference.is_empty() { unique() } else { reference.to_owned() };
        let (send, receive) = mpsc::channel(1);
        let stat = api::WriteContentRequest {
            action: api::WriteAction::Stat.into(),
            r#ref: reference.clone(),
            ..Default::default()
        };
        let replies = self.begin(async {
            send.send(stat).await.map_err(|_| ended())?;
            let mut replies = self.client().write(self.request(ReceiverStream::new(receive))).await?.into_inner();
            replies.message().await?.ok_or_else(ended)?;
            Ok::<_, Status>(replies)
        })?;
        let (buffer, hash) = (Vec::with_capacity(CHUNK), Sha256::new());
        Ok(Upload { content: self, reference, committed: false, send, replies, buffer, size: 0, hash, failed: None })
    }

    /// Has it stay after this: under the caller's lease, or one that ends by itself.
    fn keep(&self, digest: &str) -> Result<(), Status> {
        let mut lease = self.lease.clone();
        if self.own_lease {
            lease = header(unique())?;
            self.create_lease(&lease, KEPT)?;
        }
        let resource = Some(Resource { id: digest.into(), r#type: "content".into() });
        let asked = self.request(AddResourceRequest { id: text(&lease)?, resource });
        self.wait(self.leases().add_resource(asked)).map(drop)
    }

    /// A blob that was there already may lack the label.
    fn label(&self, digest: &str, diff: &str) -> Result<(), Status> {
        let asked = self.request(api::InfoRequest { digest: digest.into() });
        let mut info = self.wait(self.client().info(asked))?.into_inner().info.unwrap_or_default();
        if info.labels.contains_key(UNCOMPRESSED) {
            return Ok(());
        }
        info.labels.insert(UNCOMPRESSED.into(), diff.into());
        let mask = FieldMask { paths: vec![format!("labels.{UNCOMPRESSED}")] };
        let asked = self.request(api::UpdateRequest { info: Some(info), update_mask: Some(mask) });
        self.wait(self.client().update(asked)).map(drop)
    }
}

impl Drop for Content {
    fn drop(&mut self) {
        if self.own_lease
            && let Ok(id) = text(&self.lease)
        {
            let asked = self.request_of(DeleteRequest { id });
            self.undo("a lease", self.leases().delete(asked));
        }
    }
}

/// A blob on its way.
pub(super) struct Upload<'c> {
    content: &'c Content,
    reference: String,
    committed: bool,
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
            Ok(()) => self.committed = true,
            Err(e) if e.code() == Code::AlreadyExists => {}
            Err(e) => return Err(e),
        }
        self.content.keep(&digest)?;
        if !self.committed {
            self.content.label(&digest, diff)?;
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
        content.wait(async {
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
        if !self.committed {
            let asked = self.content.request(api::AbortRequest { r#ref: self.reference.clone() });
            self.content.undo(&self.reference, self.content.client().abort(asked));
        }
    }
}

/// Nobody waits for the blob.
pub(super) fn unwanted() -> Status {
    Status::cancelled("nobody waits for the layer tar any more")
}

fn header(text: String) -> Result<MetadataValue<Ascii>, Status> {
    text.parse().map_err(|_| Status::internal(format!("{text:?} is no header")))
}

fn text(header: &MetadataValue<Ascii>) -> Result<String, Status> {
    header.to_str().map(str::to_owned).map_err(|e| Status::invalid_argument(e.to_string()))
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
