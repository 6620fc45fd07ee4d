//! Calls of containerd's snapshots service, timed: what `benches/snapshotter.py` runs. `ctr` takes longer to start than
//! most of them take.
//!
//! Each action prints one JSON object; times are in seconds and do not contain connecting.

use clap::{Parser, Subcommand};
use graphdriver_containerd_api::{
    snapshots::{self as api, snapshots_client::SnapshotsClient},
    types,
};
use graphdriver_core::{Mount, mount};
use rustix::fs::{self, Mode, OFlags};
use serde_json::{Value, json};
use std::{collections::BTreeMap, error::Error, os::fd::AsFd, path::PathBuf, time::Instant};
use tokio::task::JoinSet;
use tonic::{
    Request,
    transport::{Channel, Endpoint},
};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

#[derive(Parser)]
struct Arguments {
    /// The socket of containerd, or of `graphdriver snapshotter`.
    #[arg(long)]
    address: PathBuf,
    /// Which of containerd's snapshotters.
    #[arg(long, default_value = "")]
    snapshotter: String,
    #[arg(long, default_value = "bench")]
    namespace: String,
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Prepare, Mounts and Remove, `count` times on `parent`, by several clients at once.
    Cycle {
        #[arg(long)]
        count: usize,
        #[arg(long, default_value_t = 1)]
        clients: usize,
        #[arg(long, default_value = "")]
        parent: String,
    },
    /// Makes a chain of committed snapshots `NAME-1` to `NAME-LAYERS`, and the active one `NAME` on top.
    Stack {
        name: String,
        #[arg(long)]
        layers: usize,
    },
    /// Makes `count` active snapshots `NAME-…`.
    Fill {
        name: String,
        #[arg(long)]
        count: usize,
        #[arg(long, default_value_t = 16)]
        clients: usize,
    },
    /// Mounts a snapshot at a directory, as its Mounts say.
    Mount { key: String, target: PathBuf },
    /// Asks `count` times what a snapshot takes.
    Usage {
        key: String,
        #[arg(long, default_value_t = 1)]
        count: usize,
    },
    /// Asks `count` times for one snapshot.
    Stat {
        key: String,
        #[arg(long, default_value_t = 1)]
        count: usize,
    },
    /// Lists all snapshots.
    List,
    /// Has the snapshotter free what was removed.
    Cleanup,
    /// Removes all snapshots.
    Clear,
}

/// One client; all share a connection, as those of containerd do.
#[derive(Clone)]
struct Client {
    inner: SnapshotsClient<Channel>,
    snapshotter: String,
    namespace: String,
}

impl Client {
    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        let namespace = self.namespace.parse().expect("a namespace is ASCII");
        request.metadata_mut().insert("containerd-namespace", namespace);
        request
    }

    /// containerd's garbage collection would take what has no such label.
    fn labels() -> BTreeMap<String, String> {
        [("containerd.io/gc.root".to_owned(), "bench".to_owned())].into()
    }

    async fn prepare(&mut self, key: &str, parent: &str) -> Result<()> {
        let (snapshotter, key, parent) = (self.snapshotter.clone(), key.into(), parent.into());
        let asked = api::PrepareSnapshotRequest { snapshotter, key, parent, labels: Self::labels() };
        self.inner.prepare(self.request(asked)).await?;
        Ok(())
    }

    async fn mounts(&mut self, key: &str) -> Result<Vec<types::Mount>> {
        let asked = api::MountsRequest { snapshotter: self.snapshotter.clone(), key: key.into() };
        Ok(self.inner.mounts(self.request(asked)).await?.into_inner().mounts)
    }

    async fn commit(&mut self, name: &str, key: &str) -> Result<()> {
        let (snapshotter, name, key, parent) = (self.snapshotter.clone(), name.into(), key.into(), String::new());
        let asked = api::CommitSnapshotRequest { snapshotter, name, key, labels: Self::labels(), parent };
        self.inner.commit(self.request(asked)).await?;
        Ok(())
    }

    async fn remove(&mut self, key: &str) -> Result<()> {
        let asked = api::RemoveSnapshotRequest { snapshotter: self.snapshotter.clone(), key: key.into() };
        self.inner.remove(self.request(asked)).await?;
        Ok(())
    }

    async fn usage(&mut self, key: &str) -> Result<api::UsageResponse> {
        let asked = api::UsageRequest { snapshotter: self.snapshotter.clone(), key: key.into() };
        Ok(self.inner.usage(self.request(asked)).await?.into_inner())
    }

    async fn stat(&mut self, key: &str) -> Result<()> {
        let asked = api::StatSnapshotRequest { snapshotter: self.snapshotter.clone(), key: key.into() };
        self.inner.stat(self.request(asked)).await?;
        Ok(())
    }

    async fn cleanup(&mut self) -> Result<()> {
        let asked = api::CleanupRequest { snapshotter: self.snapshotter.clone() };
        self.inner.cleanup(self.request(asked)).await?;
        Ok(())
    }

    async fn list(&mut self) -> Result<Vec<api::Info>> {
        let asked = api::ListSnapshotsRequest { snapshotter: self.snapshotter.clone(), filters: Vec::new() };
        let mut stream = self.inner.list(self.request(asked)).await?.into_inner();
        let mut all = Vec::new();
        while let Some(page) = stream.message().await? {
            all.extend(page.info);
        }
        Ok(all)
    }
}

/// The seconds that `call` takes are put into `times`.
async fn timed<T>(times: &mut Vec<f64>, call: impl Future<Output = Result<T>>) -> Result<T> {
    let begun = Instant::now();
    let done = call.await?;
    times.push(begun.elapsed().as_secs_f64());
    Ok(done)
}

async fn cycle(client: Client, count: usize, clients: usize, parent: String) -> Result<Value> {
    let begun = Instant::now();
    let mut running = JoinSet::new();
    for number in 0..clients {
        let (mut client, parent) = (client.clone(), parent.clone());
        running.spawn(async move {
            let [mut prepare, mut mounts, mut remove] = [const { Vec::new() }; 3];
            for round in 0..count.div_ceil(clients) {
                let key = format!("cycle-{number}-{round}");
                timed(&mut prepare, client.prepare(&key, &parent)).await?;
                timed(&mut mounts, client.mounts(&key)).await?;
                timed(&mut remove, client.remove(&key)).await?;
            }
            Ok::<_, Box<dyn Error + Send + Sync>>([prepare, mounts, remove])
        });
    }
    let mut all = [const { Vec::new() }; 3];
    while let Some(times) = running.join_next().await {
        for (all, mut times) in all.iter_mut().zip(times??) {
            all.append(&mut times);
        }
    }
    let [prepare, mounts, remove] = all;
    let (count, seconds) = (prepare.len(), begun.elapsed().as_secs_f64());
    Ok(json!({ "count": count, "seconds": seconds, "prepare": prepare, "mounts": mounts, "remove": remove }))
}

async fn stack(mut client: Client, name: &str, layers: usize) -> Result<Value> {
    let [mut prepare, mut commit] = [const { Vec::new() }; 2];
    let begun = Instant::now();
    let mut parent = String::new();
    for layer in 1..=layers {
        let (key, next) = (format!("{name}-active-{layer}"), format!("{name}-{layer}"));
        timed(&mut prepare, client.prepare(&key, &parent)).await?;
        timed(&mut commit, client.commit(&next, &key)).await?;
        parent = next;
    }
    let seconds = begun.elapsed().as_secs_f64();
    client.prepare(name, &parent).await?;
    Ok(json!({ "seconds": seconds, "prepare": prepare, "commit": commit }))
}

async fn fill(client: Client, name: String, count: usize, clients: usize) -> Result<Value> {
    let begun = Instant::now();
    let mut running = JoinSet::new();
    for number in 0..clients {
        let (mut client, name) = (client.clone(), name.clone());
        running.spawn(async move {
            for snapshot in (number..count).step_by(clients) {
                client.prepare(&format!("{name}-{snapshot}"), "").await?;
            }
            Ok::<_, Box<dyn Error + Send + Sync>>(())
        });
    }
    while let Some(done) = running.join_next().await {
        done??;
    }
    Ok(json!({ "seconds": begun.elapsed().as_secs_f64() }))
}

/// By the same code for whoever has described it, so that recipes are compared and nothing else.
fn carry_out(mounts: Vec<types::Mount>, target: &PathBuf) -> Result<()> {
    let step = |mount: types::Mount| {
        let fstype = mount.r#type.strip_prefix("fuse3.").map(|program| format!("fuse.{program}"));
        Mount { fstype: fstype.unwrap_or(mount.r#type), source: mount.source.into(), options: mount.options }
    };
    let recipe: Vec<_> = mounts.into_iter().map(step).collect();
    let mount = mount::detached(&recipe)?;
    let target = fs::open(target, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    Ok(mount::attach(mount.as_fd(), target.as_fd())?)
}

async fn mounted(mut client: Client, key: &str, target: &PathBuf) -> Result<Value> {
    let mut mounts = Vec::new();
    let recipe = timed(&mut mounts, client.mounts(key)).await?;
    let upper = recipe.iter().flat_map(|step| &step.options).find_map(|o| o.strip_prefix("upperdir="));
    let upper = upper.map(str::to_owned);
    let begun = Instant::now();
    carry_out(recipe, target)?;
    Ok(json!({ "mounts": mounts[0], "mount": begun.elapsed().as_secs_f64(), "upper": upper }))
}

/// Children before their parents, as far as one listing goes.
async fn clear(mut client: Client) -> Result<Value> {
    let begun = Instant::now();
    let mut left = client.list().await?;
    let count = left.len();
    while !left.is_empty() {
        let parents: std::collections::HashSet<_> = left.iter().map(|info| info.parent.clone()).collect();
        let (above, below): (Vec<_>, Vec<_>) = left.into_iter().partition(|info| !parents.contains(&info.name));
        let mut running = JoinSet::new();
        for info in above {
            let mut client = client.clone();
            running.spawn(async move { client.remove(&info.name).await });
            if running.len() >= 16 {
                running.join_next().await.transpose()?.transpose()?;
            }
        }
        while let Some(done) = running.join_next().await {
            done??;
        }
        left = below;
    }
    Ok(json!({ "count": count, "seconds": begun.elapsed().as_secs_f64() }))
}

async fn act(mut client: Client, action: Action) -> Result<Value> {
    let mut seconds = Vec::new();
    match action {
        Action::Cycle { count, clients, parent } => cycle(client, count, clients, parent).await,
        Action::Stack { name, layers } => stack(client, &name, layers).await,
        Action::Fill { name, count, clients } => fill(client, name, count, clients).await,
        Action::Mount { key, target } => mounted(client, &key, &target).await,
        Action::Clear => clear(client).await,
        Action::Usage { key, count } => {
            let mut usage = api::UsageResponse::default();
            for _ in 0..count {
                usage = timed(&mut seconds, client.usage(&key)).await?;
            }
            Ok(json!({ "seconds": seconds, "bytes": usage.size, "inodes": usage.inodes }))
        }
        Action::Stat { key, count } => {
            for _ in 0..count {
                timed(&mut seconds, client.stat(&key)).await?;
            }
            Ok(json!({ "seconds": seconds }))
        }
        Action::List => {
            let count = timed(&mut seconds, client.list()).await?.len();
            Ok(json!({ "seconds": seconds, "count": count }))
        }
        Action::Cleanup => {
            timed(&mut seconds, client.cleanup()).await?;
            Ok(json!({ "seconds": seconds }))
        }
    }
}

#[tokio::main(worker_threads = 2)]
async fn main() -> Result<()> {
    let Arguments { address, snapshotter, namespace, action } = Arguments::parse();
    let channel = Endpoint::try_from(format!("unix://{}", address.display()))?.connect().await?;
    let mut client = Client { inner: SnapshotsClient::new(channel), snapshotter, namespace };
    // The connection is made, and containerd has connected to a proxy, before anything is timed.
    let _ = client.stat("none").await;
    println!("{}", act(client, action).await?);
    Ok(())
}
