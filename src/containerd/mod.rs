//! `graphdriver snapshotter`: containerd's proxy snapshotter and differ over a unix socket.
//!
//! The calls are [`Snapshots`]'s; here is what the wire, systemd and a scraper of metrics need.

mod config;
mod content;
mod diff;
mod metrics;
mod mounts;
mod service;
mod socket;
mod status;

pub use config::containerd_config;

use crate::Snapshots;
use graphdriver_containerd_api::{diff::diff_server::DiffServer, snapshots::snapshots_server::SnapshotsServer};
use graphdriver_core::{Context, Error, ErrorKind, Result};
use metrics::Metrics;
use service::Service;
use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;

/// How to serve.
#[derive(Debug, Clone)]
pub struct ServeOptions {
    /// The unix socket to listen on, unless systemd hands one over.
    pub socket: PathBuf,
    /// containerd's own socket, to which nothing connects before it asks for a layer tar.
    pub containerd: PathBuf,
    /// Where to answer Prometheus: an address of this host alone.
    pub metrics: Option<SocketAddr>,
}

/// How long calls may go on after SIGTERM.
const GRACE: Duration = Duration::from_secs(30);

/// How long they may then take to undo what they have begun.
const LAST: Duration = Duration::from_secs(2);

/// Serves until SIGTERM or SIGINT, and then until the calls that run are done.
pub fn serve(snapshots: Snapshots, options: &ServeOptions) -> Result<()> {
    if let Some(address) = options.metrics.filter(|address| !address.ip().is_loopback()) {
        return Err(Error::new(ErrorKind::InvalidInput, format!("{address} can be reached from elsewhere"))
            .hint("metrics are for this host: use 127.0.0.1:PORT or [::1]:PORT"));
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(64)
        .thread_name("snapshotter")
        .enable_all()
        .build()
        .doing(|| "starting threads")?;
    let snapshots = Arc::new(snapshots);
    let served = runtime.block_on(run(snapshots.clone(), options));
    // Work that does not end in time is cut off with the process, which the next one finds as after a crash.
    runtime.shutdown_timeout(Duration::from_secs(1));
    served
}

async fn run(snapshots: Arc<Snapshots>, options: &ServeOptions) -> Result<()> {
    // Whoever has got a connection may end us: not before that ends calls properly.
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let socket = socket::listen(&options.socket).await?;
    let metrics = Arc::new(Metrics::new()?);
    let (stop, stopping) = watch::channel(false);
    let told_to_stop = || {
        let mut stopping = stopping.clone();
        async move { drop(stopping.wait_for(|stop| *stop).await) }
    };
    if let Some(address) = options.metrics {
        let answering = metrics::answer(address, metrics.clone(), snapshots.clone(), told_to_stop()).await?;
        tokio::spawn(answering);
    }
    let service = Arc::new(Service::new(snapshots, metrics, options.containerd.clone()));
    let incoming = UnixListenerStream::new(socket.listener);
    let server = Server::builder()
        .add_service(SnapshotsServer::from_arc(service.clone()))
        .add_service(DiffServer::from_arc(service.clone()))
        .serve_with_incoming_shutdown(incoming, told_to_stop());
    let mut server = tokio::spawn(server);
    tracing::info!(socket = %options.socket.display(), "serving");
    notify(&[sd_notify::NotifyState::Ready]);
    let ended = tokio::select! {
        ended = &mut server => Some(ended),
        _ = term.recv() => None,
        _ = int.recv() => None,
    };
    notify(&[sd_notify::NotifyState::Stopping]);
    tracing::info!("stopping");
    let ended = match ended {
        Some(ended) => ended,
        None => {
            stop.send_replace(true);
            let mut waited = tokio::time::timeout(GRACE, &mut server).await;
            if waited.is_err() {
                tracing::warn!("calls were still running after {} seconds", GRACE.as_secs());
                service.end();
                waited = tokio::time::timeout(LAST, &mut server).await;
            }
            waited.unwrap_or(Ok(Ok(())))
        }
    };
    let failed = |e: String| Error::new(ErrorKind::Io, e).doing("serving containerd");
    ended.map_err(|e| failed(e.to_string()))?.map_err(|e| failed(e.to_string()))
}

/// Tells systemd, if it started us.
fn notify(state: &[sd_notify::NotifyState<'_>]) {
    if let Err(e) = sd_notify::notify(state) {
        tracing::warn!("telling systemd: {e}");
    }
}
