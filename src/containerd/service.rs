//! containerd's requests as calls of [`Snapshots`].

use super::{metrics::Metrics, mounts::translate, status};
use crate::{Labels, Snapshot, Snapshots};
use graphdriver_containerd_api::{
    snapshots::{self as api, snapshots_server},
    types,
};
use graphdriver_core::{Mount, Result, store::LayerKind};
use prost_types::Timestamp;
use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::{
    sync::{Notify, Semaphore},
    task::JoinError,
};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{Code, Request, Response, Status, transport::server::UdsConnectInfo};
use tracing::{Instrument, Span};

pub(super) type Reply<T> = Result<Response<T>, Status>;

/// Bytes of infos in one message of a listing, unless one alone has more: gRPC takes 4 MiB.
const PAGE: usize = 1 << 20;

/// Bytes of what is told of a failure: it goes into a header, which clients take up to 16 KiB, three for one of ours.
const LONGEST: usize = 4096;

/// The service. Calls run on threads of their own, as they wait for disks; a call whose client goes away is finished, but for
/// layer tars.
pub(super) struct Service {
    pub(super) snapshots: Arc<Snapshots>,
    metrics: Arc<Metrics>,
    requests: AtomicU64,
    /// Something was removed.
    removed: Arc<Notify>,
    /// containerd's socket.
    pub(super) containerd: PathBuf,
    /// One for each layer tar that is written at the same time.
    pub(super) tars: Arc<Semaphore>,
    /// No call may go on that can be repeated.
    ending: CancellationToken,
}

/// Fewer than there are threads for calls, which would wait for all of them; and each keeps a processor busy.
const TARS: usize = 4;

impl Service {
    pub(super) fn new(snapshots: Arc<Snapshots>, metrics: Arc<Metrics>, containerd: PathBuf) -> Service {
        let removed = Arc::new(Notify::new());
        tokio::spawn(free_removed(snapshots.clone(), removed.clone()));
        let tars = Arc::new(Semaphore::new(TARS));
        let (requests, ending) = (AtomicU64::new(1), CancellationToken::new());
        Service { snapshots, metrics, requests, removed, containerd, tars, ending }
    }

    /// Ends the calls that can be repeated.
    pub(super) fn end(&self) {
        self.ending.cancel();
    }

    /// For a call that is not finished once its client has gone away or its deadline has passed, in which case the future of
    /// the call is dropped, and the second of these with it.
    pub(super) fn wanted(&self) -> (CancellationToken, DropGuard) {
        let token = self.ending.child_token();
        (token.clone(), token.drop_guard())
    }

    async fn call<T: Send + 'static>(
        &self,
        call: Call<'_>,
        work: impl FnOnce(&Snapshots) -> Result<T> + Send + 'static,
    ) -> Reply<T> {
        let snapshots = self.snapshots.clone();
        self.run(call, blocking(move || work(&snapshots).map_err(|e| status::status(&e)))).await
    }

    /// For work that has its own answer to what fails.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        call: Call<'_>,
        work: impl Future<Output = Result<T, Status>> + Send + 'static,
    ) -> Reply<T> {
        let request = self.requests.fetch_add(1, Ordering::Relaxed);
        let Call { method, namespace, key } = call;
        let span = tracing::info_span!("call", request, method, namespace, key);
        let metrics = self.metrics.clone();
        let running = metrics.begun();
        // In a task, which goes on and is counted if the client goes away.
        let task = async move {
            let _running = running;
            let begun = Instant::now();
            let reply = work.await.map_err(shortened);
            let (code, took) = (reply.as_ref().err().map_or(Code::Ok, Status::code), begun.elapsed());
            metrics.ended(method, code, took);
            note(reply.as_ref().err(), took);
            reply
        };
        tokio::spawn(task.instrument(span)).await.unwrap_or_else(not_ended).map(Response::new)
    }
}

/// Work that waits for disks, on a thread for that.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Status> + Send + 'static,
) -> Result<T, Status> {
    let span = Span::current();
    tokio::task::spawn_blocking(move || span.in_scope(work)).await.unwrap_or_else(not_ended)
}

fn not_ended<T>(e: JoinError) -> Result<T, Status> {
    Err(Status::internal(format!("the call did not end: {e}")))
}

/// Whoever gives us long names reads of what is wrong with them, and not of a broken stream.
fn shortened(e: Status) -> Status {
    let text = e.message();
    if text.len() <= LONGEST {
        return e;
    }
    let end = (0..=LONGEST).rev().find(|at| text.is_char_boundary(*at)).unwrap_or_default();
    Status::new(e.code(), format!("{}...", &text[..end]))
}

fn note(failure: Option<&Status>, took: Duration) {
    let ms = took.as_millis() as u64;
    let Some(e) = failure else { return tracing::debug!(ms, "done") };
    match e.code() {
        // containerd asks for what may not be there, makes what may be, knows who else can do it, and needs some no more.
        code @ (Code::NotFound | Code::AlreadyExists | Code::Unimplemented | Code::Cancelled) => {
            tracing::info!(ms, code = ?code, "{}", e.message())
        }
        code => tracing::warn!(ms, code = ?code, "{}", e.message()),
    }
}

/// What a log tells of a call.
pub(super) struct Call<'a> {
    method: &'static str,
    namespace: &'a str,
    key: &'a str,
}

impl<'a> Call<'a> {
    pub(super) fn new<T>(method: &'static str, request: &'a Request<T>, key: &'a str) -> Call<'a> {
        let told = request.metadata().get("containerd-namespace").and_then(|value| value.to_str().ok());
        Call { method, namespace: told.or_else(|| namespace_in(key)).unwrap_or_default(), key }
    }
}

/// containerd 1.6 tells the namespace in keys alone: NAMESPACE/NUMBER/KEY.
pub(super) fn namespace_in(key: &str) -> Option<&str> {
    let (namespace, rest) = key.split_once('/')?;
    let (number, _) = rest.split_once('/')?;
    number.parse::<u64>().is_ok().then_some(namespace)
}

/// Frees storage in the background, so that removing does not wait; `Cleanup` does.
async fn free_removed(snapshots: Arc<Snapshots>, removed: Arc<Notify>) {
    loop {
        removed.notified().await;
        let snapshots = snapshots.clone();
        let freed = tokio::task::spawn_blocking(move || snapshots.free_removed()).await;
        match freed {
            Ok(Ok(_)) => {}
            Ok(Err(e)) => tracing::warn!("freeing what was removed: {e}"),
            Err(e) => tracing::error!("freeing what was removed did not end: {e}"),
        }
    }
}

/// A snapshot that containerd cannot be told how to mount is none.
fn translate_new(snapshots: &Snapshots, key: &str, recipe: Vec<Mount>) -> Result<Vec<types::Mount>> {
    translate(recipe).inspect_err(|_| {
        if let Err(e) = snapshots.remove(key) {
            tracing::warn!("{e}");
        }
    })
}

/// Who has called, which is who mounts: containerd, whose shims share its mount namespace. None if it is hidden from us.
pub(super) fn process<T>(request: &Request<T>) -> Option<u32> {
    let caller = request.extensions().get::<UdsConnectInfo>()?.peer_cred?.pid()?;
    u32::try_from(caller).ok().filter(|pid| *pid > 0)
}

fn optional(name: &str) -> Option<&str> {
    Some(name).filter(|name| !name.is_empty())
}

fn timestamp(nanos: i64) -> Option<Timestamp> {
    let (seconds, nanos) = (nanos.div_euclid(1_000_000_000), nanos.rem_euclid(1_000_000_000) as i32);
    Some(Timestamp { seconds, nanos })
}

fn info(snapshot: Snapshot) -> api::Info {
    let kind = match snapshot.kind {
        LayerKind::View => api::Kind::View,
        LayerKind::Active => api::Kind::Active,
        LayerKind::Committed => api::Kind::Committed,
    };
    api::Info {
        name: snapshot.name,
        parent: snapshot.parent.unwrap_or_default(),
        kind: kind.into(),
        created_at: timestamp(snapshot.created),
        updated_at: timestamp(snapshot.updated),
        labels: snapshot.labels,
    }
}

/// The messages of a listing.
fn pages(all: impl Iterator<Item = api::Info>) -> Vec<Vec<api::Info>> {
    let mut pages: Vec<Vec<api::Info>> = Vec::new();
    let mut room = 0;
    for info in all {
        let labels: usize = info.labels.iter().map(|(name, value)| name.len() + value.len() + 16).sum();
        let size = info.name.len() + info.parent.len() + labels + 64;
        if size > room {
            room = PAGE;
            pages.push(Vec::new());
        }
        room = room.saturating_sub(size);
        pages.last_mut().expect("just begun").push(info);
    }
    pages
}

#[tonic::async_trait]
impl snapshots_server::Snapshots for Service {
    async fn prepare(&self, request: Request<api::PrepareSnapshotRequest>) -> Reply<api::PrepareSnapshotResponse> {
        let (asked, mounter) = (request.get_ref().clone(), process(&request));
        self.call(Call::new("Prepare", &request, &request.get_ref().key), move |snapshots| {
            let recipe = snapshots.prepare(&asked.key, optional(&asked.parent), &asked.labels, mounter)?;
            Ok(api::PrepareSnapshotResponse { mounts: translate_new(snapshots, &asked.key, recipe)? })
        })
        .await
    }

    async fn view(&self, request: Request<api::ViewSnapshotRequest>) -> Reply<api::ViewSnapshotResponse> {
        let (asked, mounter) = (request.get_ref().clone(), process(&request));
        self.call(Call::new("View", &request, &request.get_ref().key), move |snapshots| {
            let recipe = snapshots.view(&asked.key, optional(&asked.parent), &asked.labels, mounter)?;
            Ok(api::ViewSnapshotResponse { mounts: translate_new(snapshots, &asked.key, recipe)? })
        })
        .await
    }

    async fn mounts(&self, request: Request<api::MountsRequest>) -> Reply<api::MountsResponse> {
        let (key, mounter) = (request.get_ref().key.clone(), process(&request));
        self.call(Call::new("Mounts", &request, &request.get_ref().key), move |snapshots| {
            Ok(api::MountsResponse { mounts: translate(snapshots.mounts(&key, mounter)?)? })
        })
        .await
    }

    async fn commit(&self, request: Request<api::CommitSnapshotRequest>) -> Reply<()> {
        let asked = request.get_ref().clone();
        self.call(Call::new("Commit", &request, &request.get_ref().key), move |snapshots| {
            snapshots.commit(&asked.name, &asked.key, optional(&asked.parent), &asked.labels)
        })
        .await
    }

    async fn remove(&self, request: Request<api::RemoveSnapshotRequest>) -> Reply<()> {
        let key = request.get_ref().key.clone();
        let call = Call::new("Remove", &request, &request.get_ref().key);
        let reply = self.call(call, move |snapshots| snapshots.remove(&key)).await?;
        self.removed.notify_one();
        Ok(reply)
    }

    async fn stat(&self, request: Request<api::StatSnapshotRequest>) -> Reply<api::StatSnapshotResponse> {
        let key = request.get_ref().key.clone();
        self.call(Call::new("Stat", &request, &request.get_ref().key), move |snapshots| {
            Ok(api::StatSnapshotResponse { info: Some(info(snapshots.stat(&key)?)) })
        })
        .await
    }

    async fn update(&self, request: Request<api::UpdateSnapshotRequest>) -> Reply<api::UpdateSnapshotResponse> {
        let asked = request.get_ref().info.clone().unwrap_or_default();
        let paths = request.get_ref().update_mask.clone().unwrap_or_default().paths;
        let (name, labels): (String, Labels) = (asked.name, asked.labels);
        let key = name.clone();
        self.call(Call::new("Update", &request, &key), move |snapshots| {
            Ok(api::UpdateSnapshotResponse { info: Some(info(snapshots.update(&name, &labels, &paths)?)) })
        })
        .await
    }

    type ListStream = tokio_stream::Iter<std::vec::IntoIter<Result<api::ListSnapshotsResponse, Status>>>;

    async fn list(&self, request: Request<api::ListSnapshotsRequest>) -> Reply<Self::ListStream> {
        let filters = request.get_ref().filters.clone();
        self.call(Call::new("List", &request, ""), move |snapshots| {
            // All at once, so that the client may call for each while it reads, and still sees one point in time.
            let pages = pages(snapshots.list(&filters)?.into_iter().map(info));
            Ok(tokio_stream::iter(
                pages.into_iter().map(|info| Ok(api::ListSnapshotsResponse { info })).collect::<Vec<_>>(),
            ))
        })
        .await
    }

    async fn usage(&self, request: Request<api::UsageRequest>) -> Reply<api::UsageResponse> {
        let key = request.get_ref().key.clone();
        self.call(Call::new("Usage", &request, &request.get_ref().key), move |snapshots| {
            let usage = snapshots.usage(&key)?;
            Ok(api::UsageResponse { size: usage.bytes as i64, inodes: usage.inodes as i64 })
        })
        .await
    }

    async fn cleanup(&self, request: Request<api::CleanupRequest>) -> Reply<()> {
        self.call(Call::new("Cleanup", &request, ""), |snapshots| {
            // No error: containerd would fail its garbage collection on what is only mounted somewhere.
            match snapshots.cleanup()? {
                0 => {}
                left => tracing::warn!("{left} removed layers are still in use"),
            }
            Ok(())
        })
        .await
    }
}
