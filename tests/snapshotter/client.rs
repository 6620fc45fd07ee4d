//! The service as a process, and containerd's part: calls over its socket, and carrying out the mounts it describes.

use graphdriver_containerd_api::{
    snapshots::{self as api, snapshots_client::SnapshotsClient},
    types,
};
use graphdriver_core::{Mount, mount};
use std::{
    collections::BTreeMap,
    fs::{self, File},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};
use tokio::{runtime::Runtime, task::JoinHandle};
use tonic::{Code, Status, transport::Channel};

pub const BINARY: &str = env!("CARGO_BIN_EXE_graphdriver");

pub type Labels = BTreeMap<String, String>;

pub fn labels(pairs: &[(&str, &str)]) -> Labels {
    pairs.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect()
}

/// A running service.
pub struct Service {
    pub child: Child,
    pub socket: PathBuf,
    pub root: PathBuf,
    pub driver: String,
    runtime: Runtime,
    client: SnapshotsClient<Channel>,
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `graphdriver` with this data root and driver.
pub fn graphdriver(root: &Path, driver: &str) -> Command {
    let mut command = Command::new(BINARY);
    command.arg("--root").arg(root).args(["--storage-driver", driver]);
    let config = root.with_extension("json");
    if !config.exists() {
        fs::write(&config, "{}").unwrap();
    }
    command.env("GRAPHDRIVER_CONFIG", config).stdin(Stdio::null());
    command
}

impl Service {
    /// On `DIR/root`, listening on `DIR/socket`.
    pub fn start(dir: &Path, driver: &str) -> Service {
        Service::start_with(dir, driver, &[])
    }

    pub fn start_with(dir: &Path, driver: &str, arguments: &[&str]) -> Service {
        let (root, socket, log) = (dir.join("root"), dir.join("socket"), dir.join("log"));
        let mut command = graphdriver(&root, driver);
        let log = File::options().create(true).append(true).open(log).unwrap();
        command.args(["snapshotter", "--socket"]).arg(&socket).args(arguments).stderr(log);
        let child = command.spawn().unwrap();
        Service::connect(child, socket, root, driver)
    }

    /// A client of a service that is just starting.
    pub fn connect(mut child: Child, socket: PathBuf, root: PathBuf, driver: &str) -> Service {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let endpoint = tonic::transport::Endpoint::try_from(format!("unix://{}", socket.display())).unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        let client = loop {
            match runtime.block_on(endpoint.connect()) {
                Ok(channel) => break SnapshotsClient::new(channel),
                Err(e) => assert!(Instant::now() < deadline, "{e:?}"),
            }
            if let Some(ended) = child.try_wait().unwrap() {
                panic!("the service ended: {ended}, see its log above: {}", log_of(&socket));
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        Service { child, socket, root, driver: driver.into(), runtime, client }
    }

    /// For calls by several threads.
    pub fn another(&self) -> SnapshotsClient<Channel> {
        self.client.clone()
    }

    pub fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.block_on(future)
    }

    /// Has it run beside the test.
    pub fn spawn<T: Send + 'static>(&self, future: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
        self.runtime.spawn(future)
    }

    /// By SIGTERM.
    pub fn stop(mut self) -> ExitStatus {
        signal(&self.child, nix::sys::signal::Signal::SIGTERM);
        self.child.wait().unwrap()
    }

    /// What `graphdriver ARGUMENTS` prints.
    #[track_caller]
    pub fn command(&self, arguments: &[&str]) -> String {
        let out = graphdriver(&self.root, &self.driver).args(arguments).output().unwrap();
        assert!(out.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap()
    }

    pub fn prepare(&self, key: &str, parent: &str) -> Result<Vec<types::Mount>, Status> {
        self.prepare_with(key, parent, Labels::new())
    }

    pub fn prepare_with(&self, key: &str, parent: &str, labels: Labels) -> Result<Vec<types::Mount>, Status> {
        let snapshotter = String::new();
        let asked = api::PrepareSnapshotRequest { snapshotter, key: key.into(), parent: parent.into(), labels };
        self.block_on(self.another().prepare(asked)).map(|reply| reply.into_inner().mounts)
    }

    pub fn view(&self, key: &str, parent: &str) -> Result<Vec<types::Mount>, Status> {
        let (snapshotter, labels) = (String::new(), Labels::new());
        let asked = api::ViewSnapshotRequest { snapshotter, key: key.into(), parent: parent.into(), labels };
        self.block_on(self.another().view(asked)).map(|reply| reply.into_inner().mounts)
    }

    pub fn mounts(&self, key: &str) -> Result<Vec<types::Mount>, Status> {
        let asked = api::MountsRequest { snapshotter: String::new(), key: key.into() };
        self.block_on(self.another().mounts(asked)).map(|reply| reply.into_inner().mounts)
    }

    pub fn commit(&self, name: &str, key: &str) -> Result<(), Status> {
        self.commit_with(name, key, Labels::new())
    }

    pub fn commit_with(&self, name: &str, key: &str, labels: Labels) -> Result<(), Status> {
        let (snapshotter, parent) = (String::new(), String::new());
        let asked = api::CommitSnapshotRequest { snapshotter, name: name.into(), key: key.into(), labels, parent };
        self.block_on(self.another().commit(asked)).map(drop)
    }

    pub fn commit_on(&self, parent: &str, name: &str, key: &str) -> Result<(), Status> {
        let (snapshotter, labels, parent) = (String::new(), Labels::new(), parent.into());
        let asked = api::CommitSnapshotRequest { snapshotter, name: name.into(), key: key.into(), labels, parent };
        self.block_on(self.another().commit(asked)).map(drop)
    }

    pub fn remove(&self, key: &str) -> Result<(), Status> {
        let asked = api::RemoveSnapshotRequest { snapshotter: String::new(), key: key.into() };
        self.block_on(self.another().remove(asked)).map(drop)
    }

    pub fn stat(&self, key: &str) -> Result<api::Info, Status> {
        let asked = api::StatSnapshotRequest { snapshotter: String::new(), key: key.into() };
        self.block_on(self.another().stat(asked)).map(|reply| reply.into_inner().info.unwrap())
    }

    pub fn update(&self, info: api::Info, paths: &[&str]) -> Result<api::Info, Status> {
        let paths: Vec<_> = paths.iter().map(|path| path.to_string()).collect();
        let update_mask = Some(prost_types::FieldMask { paths }).filter(|mask| !mask.paths.is_empty());
        let asked = api::UpdateSnapshotRequest { snapshotter: String::new(), info: Some(info), update_mask };
        self.block_on(self.another().update(asked)).map(|reply| reply.into_inner().info.unwrap())
    }

    pub fn list(&self, filters: &[&str]) -> Result<Vec<api::Info>, Status> {
        let filters = filters.iter().map(|filter| filter.to_string()).collect();
        let asked = api::ListSnapshotsRequest { snapshotter: String::new(), filters };
        self.block_on(async {
            let mut stream = self.another().list(asked).await?.into_inner();
            let mut all = Vec::new();
            while let Some(page) = stream.message().await? {
                all.extend(page.info);
            }
            Ok(all)
        })
    }

    pub fn names(&self, filters: &[&str]) -> Vec<String> {
        self.list(filters).unwrap().into_iter().map(|info| info.name).collect()
    }

    pub fn usage(&self, key: &str) -> Result<api::UsageResponse, Status> {
        let asked = api::UsageRequest { snapshotter: String::new(), key: key.into() };
        self.block_on(self.another().usage(asked)).map(|reply| reply.into_inner())
    }

    pub fn cleanup(&self) -> Result<(), Status> {
        self.block_on(self.another().cleanup(api::CleanupRequest { snapshotter: String::new() })).map(drop)
    }

    /// Makes a committed snapshot with what `fill` does on its parent.
    #[track_caller]
    pub fn layer(&self, name: &str, parent: &str, fill: impl FnOnce(&Path)) {
        let key = format!("{name}-active");
        let mounts = self.prepare(&key, parent).unwrap();
        fill(Tree::of(&mounts).path());
        self.commit(name, &key).unwrap();
    }

    /// The numbers of the layers whose storage is there.
    pub fn stored(&self) -> Vec<u64> {
        crate::rigs::stored(&self.root, &self.driver)
    }
}

pub fn log_of(socket: &Path) -> String {
    fs::read_to_string(socket.with_file_name("log")).unwrap_or_default()
}

pub fn signal(child: &Child, signal: nix::sys::signal::Signal) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(child.id() as i32), signal).unwrap();
}

#[track_caller]
pub fn refused<T: std::fmt::Debug>(reply: Result<T, Status>, code: Code) -> String {
    let status = reply.expect_err("it is refused");
    assert_eq!(status.code(), code, "{}", status.message());
    status.message().into()
}

/// What the mounts show, attached nowhere: gone when dropped.
pub struct Tree {
    mount: OwnedFd,
    path: PathBuf,
}

impl Tree {
    pub fn of(mounts: &[types::Mount]) -> Tree {
        let recipe: Vec<_> = mounts.iter().map(recipe).collect();
        let mount = mount::detached(&recipe).unwrap_or_else(|e| panic!("{mounts:?}: {e}"));
        Tree { path: format!("/proc/self/fd/{}", mount.as_raw_fd()).into(), mount }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// To attach it.
    pub fn mount(&self) -> BorrowedFd<'_> {
        self.mount.as_fd()
    }
}

/// A path below a descriptor of this process, for another one.
pub fn seen_by_others(path: &Path) -> PathBuf {
    let rest = path.strip_prefix("/proc/self").unwrap();
    Path::new("/proc").join(std::process::id().to_string()).join(rest)
}

/// containerd runs the helper `mount.fuse3` for `fuse3.`.
fn recipe(mount: &types::Mount) -> Mount {
    let fstype = match mount.r#type.strip_prefix("fuse3.") {
        Some(program) => format!("fuse.{program}"),
        None => mount.r#type.clone(),
    };
    Mount { fstype, source: mount.source.clone().into(), options: mount.options.clone() }
}
