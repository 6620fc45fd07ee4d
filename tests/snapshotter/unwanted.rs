//! Layer tars that nobody waits for any more, that fail, or that are too many at once.

use crate::{
    client::{Service, Tree, refused},
    diff::{Containerd, NAMESPACE, asked},
    limit, name,
    rigs::On,
    support::{isolated, skip, system},
};
use graphdriver_containerd_api::{
    diff::{self as api, diff_client::DiffClient},
    snapshots::StatSnapshotRequest,
    types,
};
use std::{
    fs::{self, File},
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    path::Path,
    time::{Duration, Instant},
};
use tokio::task::JoinHandle;
use tonic::{
    Code, Request, Status,
    transport::{Channel, Endpoint},
};

/// A snapshot, its parent, and what takes seconds to compress.
struct Case {
    s: Service,
    containerd: Containerd,
    metrics: String,
    client: DiffClient<Channel>,
    mounts: [Vec<types::Mount>; 2],
}

/// Bytes of the file that makes the tar of `work` take long.
const LARGE: usize = 160 << 20;

fn on_overlay2(test: &str, large: usize, case: impl FnOnce(Case)) {
    let test = name(module_path!(), test);
    if On::Overlay2.skipped(&test) || skip::skipped(&test, skip::no_program(&["containerd", "ctr"])) {
        return;
    }
    isolated(&test, limit(), |dir| {
        system("mount", &["-t", "tmpfs", "none", "/run"]);
        let containerd = Containerd::start(dir);
        let metrics = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let arguments = ["--metrics", &metrics, "--containerd", containerd.socket.to_str().unwrap()];
        let s = Service::start_with(dir, "overlay2", &arguments);
        s.layer("base", "", |dir| fs::write(dir.join("file"), "text").unwrap());
        let mounts = [s.view("left", "base").unwrap(), s.prepare("work", "base").unwrap()];
        write_noise(&Tree::of(&mounts[1]).path().join("noise"), large);
        let endpoint = Endpoint::try_from(format!("unix://{}", s.socket.display())).unwrap();
        let client = DiffClient::new(s.block_on(endpoint.connect()).unwrap());
        case(Case { s, containerd, metrics, client, mounts });
    });
}

/// What no compression makes smaller.
fn write_noise(path: &Path, bytes: usize) {
    let mut random = File::open("/dev/urandom").unwrap().take(bytes as u64);
    std::io::copy(&mut random, &mut File::create(path).unwrap()).unwrap();
}

type Call = JoinHandle<Result<(), Status>>;

impl Case {
    fn request(&self) -> Request<api::DiffRequest> {
        asked(&self.mounts[0], &self.mounts[1])
    }

    fn begin(&self, request: Request<api::DiffRequest>) -> Call {
        let mut client = self.client.clone();
        self.s.spawn(async move { client.diff(request).await.map(drop) })
    }

    fn lines(&self, arguments: &[&str]) -> Vec<String> {
        self.containerd.lines(NAMESPACE, arguments).into_iter().filter(|line| !line.starts_with("REF\t")).collect()
    }

    /// The figure that metrics have by that name and these labels.
    fn figure(&self, name: &str) -> Option<u64> {
        let mut stream = TcpStream::connect(&self.metrics).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer.lines().find_map(|line| line.strip_prefix(&format!("{name} "))?.parse().ok())
    }

    /// Neither an upload, nor a blob, a lease or a call that runs. A whole tar would leave the second and the third.
    #[track_caller]
    fn nothing_is_left(&self) {
        let left = || {
            let uploads = self.lines(&["content", "active"]);
            let blobs = self.lines(&["content", "ls", "-q"]);
            (uploads, blobs, self.lines(&["leases", "ls", "-q"]), self.figure("graphdriver_calls_running"))
        };
        let deadline = Instant::now() + Duration::from_secs(60);
        let mut now = left();
        while now != (vec![], vec![], vec![], Some(0)) {
            assert!(Instant::now() < deadline, "{now:?}");
            std::thread::sleep(Duration::from_millis(50));
            now = left();
        }
    }

    fn until_it_uploads(&self, call: &Call) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.lines(&["content", "active"]).is_empty() {
            assert!(!call.is_finished() && Instant::now() < deadline, "nothing is uploaded");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn cancelled(&self) -> Option<u64> {
        self.figure("graphdriver_calls_total{code=\"Cancelled\",method=\"Diff\"}")
    }
}

/// When the only lease there ends by itself.
#[track_caller]
fn lease_ends(case: &Case) -> jiff::SignedDuration {
    let listed = case.lines(&["leases", "ls"]);
    let ends: Vec<_> = listed.iter().filter_map(|line| line.split_once("containerd.io/gc.expire=")).collect();
    let [(_, end)] = ends.as_slice() else { panic!("{listed:?}") };
    let end: jiff::Timestamp = end.split([',', ' ', '\t']).next().unwrap().parse().unwrap();
    end.duration_since(jiff::Timestamp::now())
}

#[test]
fn what_nobody_waits_for_is_given_up() {
    on_overlay2("what_nobody_waits_for_is_given_up", LARGE, |case| {
        let call = case.begin(case.request());
        case.until_it_uploads(&call);
        assert_eq!(case.figure("graphdriver_calls_running"), Some(1));
        // However long it takes, garbage collection leaves it alone.
        assert!(lease_ends(&case) > jiff::SignedDuration::from_hours(20));
        call.abort();
        case.nothing_is_left();
        assert_eq!(case.cancelled(), Some(1));

        // A name of the caller's is no reason to keep it.
        let mut request = case.request();
        request.get_mut().r#ref = "named".into();
        request.set_timeout(Duration::from_secs(2));
        let ended = case.s.block_on(case.begin(request)).unwrap().unwrap_err();
        assert!(matches!(ended.code(), Code::Cancelled | Code::DeadlineExceeded), "{ended}");
        case.nothing_is_left();
        assert_eq!(case.cancelled(), Some(2));
    });
}

#[test]
fn a_layer_tar_that_fails_leaves_nothing() {
    on_overlay2("a_layer_tar_that_fails_leaves_nothing", 3 << 20, |case| {
        // It comes after what was uploaded by then.
        let tree = Tree::of(&case.mounts[1]);
        let file = tree.path().join("zzz/.wh.no-deletion");
        fs::create_dir(file.parent().unwrap()).unwrap();
        fs::write(&file, "text").unwrap();
        let said = refused(case.s.block_on(case.begin(case.request())).unwrap(), Code::InvalidArgument);
        assert!(said.contains(".wh.no-deletion"), "{said}");
        case.nothing_is_left();

        // What succeeds is kept for an hour from then on, by a lease of its own.
        fs::remove_file(&file).unwrap();
        case.s.block_on(case.begin(case.request())).unwrap().unwrap();
        let kept = lease_ends(&case);
        assert!(kept > jiff::SignedDuration::from_mins(58) && kept <= jiff::SignedDuration::from_mins(60), "{kept}");
        assert_eq!(case.lines(&["content", "ls", "-q"]).len(), 1);
    });
}

/// containerd that answers nobody is what makes layer tars wait longest.
#[test]
fn many_layer_tars_leave_threads_to_snapshots() {
    on_overlay2("many_layer_tars_leave_threads_to_snapshots", 0, |case| {
        case.containerd.signal(nix::sys::signal::Signal::SIGSTOP);
        let calls: Vec<_> = (0..100).map(|_| case.begin(case.request())).collect();
        let deadline = Instant::now() + Duration::from_secs(60);
        while case.figure("graphdriver_calls_running") < Some(100) {
            assert!(Instant::now() < deadline, "{:?}", case.figure("graphdriver_calls_running"));
            std::thread::sleep(Duration::from_millis(50));
        }
        let mut snapshots = case.s.another();
        let asked = StatSnapshotRequest { key: "work".into(), ..Default::default() };
        let answer = async { tokio::time::timeout(Duration::from_secs(20), snapshots.stat(asked)).await };
        case.s.block_on(answer).expect("a thread is free").unwrap();
        calls.iter().for_each(|call| call.abort());
        case.containerd.signal(nix::sys::signal::Signal::SIGCONT);
        case.nothing_is_left();
        assert_eq!(case.cancelled(), Some(100));
    });
}
