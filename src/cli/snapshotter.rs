//! The service for containerd.

use super::{
    args::{LogFormat, SnapshotterArgs},
    output,
};
use graphdriver::{
    Snapshots,
    config::Settings,
    containerd::{self, ServeOptions},
};
use graphdriver_core::Result;
use std::io::IsTerminal;

/// Signals are the service's own business: what runs is finished.
pub(crate) fn snapshotter(settings: Settings, args: SnapshotterArgs) -> Result<()> {
    let socket = std::path::absolute(&args.socket)?;
    if args.print_containerd_config {
        return output::line(containerd::containerd_config(&socket, &settings.data_root).trim_end());
    }
    log(settings.debug, args.log_format);
    let snapshots = Snapshots::open(settings)?;
    let containerd = std::path::absolute(&args.containerd)?;
    containerd::serve(snapshots, &ServeOptions { socket, containerd, metrics: args.metrics })
}

fn log(debug: bool, format: LogFormat) {
    let level = if debug { tracing::Level::DEBUG } else { tracing::Level::INFO };
    // Of what is ours: the libraries below tell of every frame they send.
    let ours = tracing_subscriber::filter::Targets::new()
        .with_target("graphdriver", level)
        .with_target("graphdriver_core", level)
        .with_target("graphdriver_quota", level)
        .with_default(tracing::Level::WARN);
    use tracing_subscriber::{Layer, layer::SubscriberExt, util::SubscriberInitExt};
    let stderr = std::io::stderr;
    let lines = tracing_subscriber::fmt::layer().with_writer(stderr).with_ansi(stderr().is_terminal());
    let lines = match format {
        LogFormat::Text => lines.log_internal_errors(false).boxed(),
        LogFormat::Json => lines.log_internal_errors(false).json().flatten_event(true).boxed(),
    };
    tracing_subscriber::registry().with(lines.with_filter(ours)).init();
}
