//! Figures for Prometheus.

use crate::Snapshots;
use axum::{Router, http::StatusCode, response::IntoResponse, routing::get};
use graphdriver_core::{Context, Error, ErrorKind, Result};
use prometheus::{
    Encoder, HistogramOpts, HistogramVec, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder,
};
use std::{
    future::Future,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{net::TcpListener, sync::Mutex};
use tonic::Code;

/// All there is to tell.
pub(super) struct Metrics {
    registry: Registry,
    calls: IntCounterVec,
    seconds: HistogramVec,
    running: IntGauge,
    layers: IntGaugeVec,
    bytes: IntGaugeVec,
    mounts: IntGauge,
    reclaimable: IntGauge,
    free: IntGauge,
    /// When the gauges of the store were last taken.
    looked: Arc<Mutex<Option<Instant>>>,
}

/// A call that runs.
pub(super) struct Running(IntGauge);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// Scrapers may come as often as they like, and looking costs.
const FRESH: Duration = Duration::from_secs(5);

impl Metrics {
    pub(super) fn new() -> Result<Metrics> {
        Self::build().map_err(failed)
    }

    fn build() -> prometheus::Result<Metrics> {
        let registry = Registry::new_custom(Some("graphdriver".into()), None)?;
        let calls = IntCounterVec::new(Opts::new("calls_total", "Calls of containerd's"), &["method", "code"])?;
        let buckets = prometheus::exponential_buckets(0.0005, 4.0, 9)?;
        let opts = HistogramOpts::new("call_seconds", "How long calls took").buckets(buckets);
        let seconds = HistogramVec::new(opts, &["method"])?;
        let running = IntGauge::new("calls_running", "Calls that are running")?;
        let by_kind = &["driver", "kind"];
        let layers = IntGaugeVec::new(Opts::new("layers", "Layers of snapshots, images and containers"), by_kind)?;
        let bytes = IntGaugeVec::new(Opts::new("layer_bytes", "What committed layers take on disk"), by_kind)?;
        let mounts = IntGauge::new("mounts", "Mounts that are seen")?;
        let reclaimable = IntGauge::new("reclaimable_bytes", "What only unused images take")?;
        let free = IntGauge::new("data_root_free_bytes", "What is free in the data root")?;
        registry.register(Box::new(calls.clone()))?;
        registry.register(Box::new(seconds.clone()))?;
        registry.register(Box::new(layers.clone()))?;
        registry.register(Box::new(bytes.clone()))?;
        for gauge in [&running, &mounts, &reclaimable, &free] {
            registry.register(Box::new(gauge.clone()))?;
        }
        let looked = Arc::default();
        Ok(Metrics { registry, calls, seconds, running, layers, bytes, mounts, reclaimable, free, looked })
    }

    /// A call runs until this is dropped.
    pub(super) fn begun(&self) -> Running {
        self.running.inc();
        Running(self.running.clone())
    }

    pub(super) fn ended(&self, method: &str, code: Code, took: Duration) {
        self.calls.with_label_values(&[method, &format!("{code:?}")]).inc();
        self.seconds.with_label_values(&[method]).observe(took.as_secs_f64());
    }

    /// Takes the gauges of the store.
    fn look(&self, snapshots: &Snapshots) -> Result<()> {
        let engine = snapshots.engine();
        let figures = engine.figures()?;
        self.layers.reset();
        self.bytes.reset();
        for (kind, count, bytes) in &figures.layers {
            let labels = &[figures.driver, kind.as_str()];
            self.layers.with_label_values(labels).set(*count as i64);
            // The others are not measured, which would take a walk through all their files.
            if kind == "committed" {
                self.bytes.with_label_values(labels).set(*bytes as i64);
            }
        }
        self.mounts.set(figures.mounts as i64);
        self.reclaimable.set(figures.reclaimable as i64);
        self.free.set(figures.free as i64);
        Ok(())
    }

    async fn text(self: Arc<Self>, snapshots: Arc<Snapshots>) -> Result<String> {
        let mut looked = self.looked.clone().lock_owned().await;
        if looked.is_none_or(|then| then.elapsed() > FRESH) {
            let metrics = self.clone();
            // One looks at a time, also if scrapers give up meanwhile: they must not take all threads.
            let task = tokio::task::spawn_blocking(move || {
                metrics.look(&snapshots)?;
                *looked = Some(Instant::now());
                Ok::<_, Error>(())
            });
            task.await.map_err(failed)??;
        }
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text).map_err(failed)?;
        String::from_utf8(text).map_err(failed)
    }
}

fn failed(e: impl ToString) -> Error {
    Error::new(ErrorKind::Io, e.to_string()).doing("gathering metrics")
}

/// Listens, and gives what answers `/metrics` until `stop`.
pub(super) async fn answer(
    address: SocketAddr,
    metrics: Arc<Metrics>,
    snapshots: Arc<Snapshots>,
    stop: impl Future<Output = ()> + Send + 'static,
) -> Result<impl Future<Output = ()> + Send> {
    let listener = TcpListener::bind(address).await.doing(|| format!("listening on {address} for metrics"))?;
    let scrape = move || async move {
        match metrics.text(snapshots).await {
            Ok(text) => ([("content-type", "text/plain; version=0.0.4")], text).into_response(),
            Err(e) => (StatusCode::INTERNAL_SERVER_ERROR, e.to_string()).into_response(),
        }
    };
    let router = Router::new().route("/metrics", get(scrape));
    tracing::info!(address = %listener.local_addr()?, "metrics");
    Ok(async move {
        if let Err(e) = axum::serve(listener, router).with_graceful_shutdown(stop).await {
            tracing::warn!("answering Prometheus: {e}");
        }
    })
}
