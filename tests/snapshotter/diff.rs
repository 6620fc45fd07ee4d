//! The differ, with the content store of the real containerd, beside its own differ.

use crate::{
    client::{Service, Tree, refused},
    limit, name,
    rigs::{On, Rig},
    support::{isolated, skip, system},
};
use graphdriver_containerd_api::{
    diff::{self as api, diff_client::DiffClient},
    types,
};
use graphdriver_core::mount;
use nix::sys::signal::Signal;
use sha2::{Digest, Sha256};
use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Read,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command},
    time::{Duration, Instant},
};
use tonic::{Code, Request, Status, transport::Endpoint};

const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
pub const NAMESPACE: &str = "graphdriver-diff";

pub struct Containerd {
    child: Child,
    pub socket: PathBuf,
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Containerd {
    pub fn start(dir: &Path) -> Containerd {
        let (socket, at) = (dir.join("containerd.sock"), dir.display());
        let config = format!(
            "version = 2\nroot = \"{at}/cd\"\nstate = \"{at}/cd-state\"\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n\
             [grpc]\naddress = \"{at}/containerd.sock\"\n[plugins.\"io.containerd.internal.v1.opt\"]\npath = \"{at}/cd-opt\"\n"
        );
        fs::write(dir.join("containerd.toml"), config).unwrap();
        let log = File::create(dir.join("containerd.log")).unwrap();
        let mut command = Command::new("containerd");
        command.arg("--config").arg(dir.join("containerd.toml")).stdout(log.try_clone().unwrap()).stderr(log);
        let containerd = Containerd { child: command.spawn().unwrap(), socket };
        let deadline = Instant::now() + Duration::from_secs(60);
        while !containerd.command(NAMESPACE, &["version"]).output().unwrap().status.success() {
            assert!(Instant::now() < deadline, "{}", fs::read_to_string(dir.join("containerd.log")).unwrap());
            std::thread::sleep(Duration::from_millis(50));
        }
        containerd
    }

    pub fn signal(&self, signal: Signal) {
        crate::client::signal(&self.child, signal);
    }

    fn command(&self, namespace: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new("ctr");
        command.arg("--address").arg(&self.socket).args(["--namespace", namespace]).args(arguments);
        command
    }

    #[track_caller]
    fn ctr(&self, namespace: &str, arguments: &[&str]) -> Vec<u8> {
        let out = self.command(namespace, arguments).output().unwrap();
        assert!(out.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&out.stderr));
        out.stdout
    }

    pub fn lines(&self, namespace: &str, arguments: &[&str]) -> Vec<String> {
        String::from_utf8(self.ctr(namespace, arguments)).unwrap().lines().map(str::to_owned).collect()
    }
}

pub fn asked(left: &[types::Mount], right: &[types::Mount]) -> Request<api::DiffRequest> {
    let labels = [("kept".to_owned(), "yes".to_owned())].into();
    let (left, right, media_type) = (left.to_vec(), right.to_vec(), GZIP.into());
    let mut request = Request::new(api::DiffRequest { left, right, media_type, labels, ..Default::default() });
    request.metadata_mut().insert("containerd-namespace", NAMESPACE.parse().unwrap());
    request
}

fn diff(s: &Service, socket: &Path, request: Request<api::DiffRequest>) -> Result<types::Descriptor, Status> {
    s.block_on(async {
        let endpoint = Endpoint::try_from(format!("unix://{}", socket.display())).unwrap();
        let mut client = DiffClient::new(endpoint.connect().await.unwrap());
        client.diff(request).await.map(|reply| reply.into_inner().diff.unwrap())
    })
}

/// All that a tar says of a name, but for the root, of which containerd's own says nothing.
type Entries = BTreeMap<String, (u8, u32, u64, u64, u64, String, Vec<u8>)>;

/// What is in the blob, which is looked at from all sides.
#[track_caller]
fn entries(containerd: &Containerd, blob: &types::Descriptor) -> Entries {
    let bytes = containerd.ctr(NAMESPACE, &["content", "get", &blob.digest]);
    let digest = |bytes: &[u8]| format!("sha256:{}", hex::encode(Sha256::digest(bytes)));
    assert_eq!((digest(&bytes), bytes.len() as i64), (blob.digest.clone(), blob.size));
    let mut tar = Vec::new();
    match blob.media_type.rsplit_once('+').map(|(_, how)| how) {
        Some("gzip") => drop(flate2::read::MultiGzDecoder::new(&bytes[..]).read_to_end(&mut tar).unwrap()),
        Some("zstd") => zstd::stream::copy_decode(&bytes[..], &mut tar).unwrap(),
        _ => tar = bytes,
    }
    let listed = containerd.lines(NAMESPACE, &["content", "ls"]);
    let line = listed.iter().find(|line| line.starts_with(&blob.digest)).unwrap();
    assert!(line.contains(&format!("containerd.io/uncompressed={}", digest(&tar))), "{line}");
    assert!(line.contains("kept=yes"), "{line}");
    let mut entries = Entries::new();
    for entry in tar::Archive::new(&tar[..]).entries().unwrap() {
        let mut entry = entry.unwrap();
        let text = |path: &Path| path.to_string_lossy().trim_matches('/').to_owned();
        let name = text(&entry.path().unwrap());
        let link = entry.link_name().unwrap().map(|link| link.to_string_lossy().into_owned()).unwrap_or_default();
        let mut content = Vec::new();
        entry.read_to_end(&mut content).unwrap();
        let header = entry.header();
        let whiteout = name.rsplit('/').next().unwrap().starts_with(".wh.");
        let what = match whiteout {
            // Nobody reads them.
            true => (0, 0, 0, 0, 0, String::new(), Vec::new()),
            false => (
                header.entry_type().as_byte(),
                header.mode().unwrap() & 0o7777,
                header.uid().unwrap(),
                header.gid().unwrap(),
                header.mtime().unwrap(),
                link,
                content,
            ),
        };
        if !matches!(name.as_str(), "" | ".") {
            entries.insert(name, what);
        }
    }
    entries
}

fn base(dir: &Path) {
    for name in ["etc", "opt", "opt/deep", "gone", "again", "quiet"] {
        fs::create_dir(dir.join(name)).unwrap();
    }
    for name in ["etc/changed", "etc/same", "opt/deep/file", "gone/file", "again/old", "etc/removed", "etc/mode"] {
        fs::write(dir.join(name), name).unwrap();
    }
    for n in 0..100 {
        fs::write(dir.join(format!("quiet/{n}")), "quiet").unwrap();
    }
}

fn change(dir: &Path) {
    fs::write(dir.join("etc/changed"), "changed content").unwrap();
    fs::write(dir.join("etc/new"), vec![7; 3_000_000]).unwrap();
    fs::hard_link(dir.join("etc/new"), dir.join("opt/link")).unwrap();
    std::os::unix::fs::symlink("../etc/same", dir.join("opt/deep/symlink")).unwrap();
    fs::set_permissions(dir.join("etc/mode"), fs::Permissions::from_mode(0o4750)).unwrap();
    std::os::unix::fs::chown(dir.join("etc/mode"), Some(5), Some(6)).unwrap();
    fs::remove_file(dir.join("etc/removed")).unwrap();
    fs::remove_dir_all(dir.join("gone")).unwrap();
    fs::remove_dir_all(dir.join("again")).unwrap();
    fs::create_dir(dir.join("again")).unwrap();
    fs::write(dir.join("again/new"), "new").unwrap();
}

/// Has the mounts at `DIR/shown` meanwhile.
fn attached(s: &Service, mounts: &[types::Mount], work: impl FnOnce(&Path)) {
    let place = s.root.with_file_name("shown");
    fs::create_dir_all(&place).unwrap();
    match mounts[0].r#type.strip_prefix("fuse3.") {
        // As containerd does: only such a mount can be joined.
        Some(program) => {
            let (target, options) = (place.to_str().unwrap(), mounts[0].options.join(","));
            system("mount.fuse3", &[&mounts[0].source, target, "-o", &options, "-t", program]);
        }
        None => {
            let tree = Tree::of(mounts);
            mount::attach(tree.mount(), std::os::fd::AsFd::as_fd(&File::open(&place).unwrap())).unwrap();
        }
    }
    work(&place);
    mount::unmount(&place, false).unwrap();
}

fn mounted() -> String {
    fs::read_to_string("/proc/self/mountinfo").unwrap()
}

fn layer_tars_are_in_containerds_store(s: &Service, containerd: &Containerd) {
    s.layer("base", "", base);
    let (empty, left) = (s.view("empty", "").unwrap(), s.view("left", "base").unwrap());
    let right = s.prepare("work", "base").unwrap();
    let ours = |left: &[_], right: &[_]| diff(s, &s.socket, asked(left, right));
    // Whoever mounts it holds back what is written.
    let committed_only = s.driver == "vfs-fuse";
    attached(s, &right, |dir| {
        change(dir);
        if committed_only {
            let again = s.mounts("work").unwrap();
            refused(ours(&left, &right), Code::Unimplemented);
            refused(ours(&left, &again), Code::Unimplemented);
            // containerd walks, through the mount that is there.
            let live = entries(containerd, &diff(s, &containerd.socket, asked(&left, &again)).unwrap());
            assert_eq!(live["etc/changed"].6, b"changed content");
            return;
        }
        let live = entries(containerd, &ours(&left, &right).unwrap());
        assert_eq!(live["etc/changed"].6, b"changed content");
        assert_eq!(live["etc/new"].6.len(), 3_000_000);
    });

    let before = mounted();
    let right = match committed_only {
        true => {
            refused(ours(&left, &right), Code::Unimplemented);
            s.commit("done", "work").unwrap();
            s.view("right", "done").unwrap()
        }
        false => right,
    };
    let blob = ours(&left, &right).unwrap();
    assert_eq!(blob.media_type, GZIP);
    let told = entries(containerd, &blob);
    for name in ["etc/.wh.removed", ".wh.gone", "etc/changed", "again/new", "opt/deep/symlink", "opt/link"] {
        assert!(told.contains_key(name), "{name}: {:?}", told.keys());
    }
    let walked = diff(s, &containerd.socket, asked(&left, &right)).unwrap();
    let walked = entries(containerd, &walked);
    // A directory made again is opaque to one, and to the other a directory of which all is deleted.
    let but_again = |entries: &Entries| -> Entries {
        entries
            .iter()
            .filter(|(name, _)| !name.starts_with("again/.wh."))
            .map(|(n, e)| (n.clone(), e.clone()))
            .collect()
    };
    assert_eq!(but_again(&told), but_again(&walked));

    // The same once more, as zstd, plain, and after the commit.
    let mut request = asked(&left, &right);
    request.get_mut().media_type = "application/vnd.oci.image.layer.v1.tar+zstd".into();
    assert_eq!(entries(containerd, &diff(s, &s.socket, request).unwrap()), told);
    let mut request = asked(&left, &right);
    request.get_mut().media_type = "application/vnd.oci.image.layer.v1.tar".into();
    request.get_mut().r#ref = "named".into();
    assert_eq!(entries(containerd, &diff(s, &s.socket, request).unwrap()), told);
    if !committed_only {
        s.commit("done", "work").unwrap();
    }
    let done = s.view("once more", "done").unwrap();
    assert_eq!(ours(&left, &done).unwrap(), blob);
    let first = entries(containerd, &ours(&empty, &left).unwrap());
    assert!(first.contains_key("etc/removed") && first.contains_key("quiet/99"), "{:?}", first.keys());

    // containerd 1.7 names the namespace in keys alone.
    let more = s.prepare(&format!("{NAMESPACE}/9/more"), "base").unwrap();
    fs::write(Tree::of(&more).path().join("more"), "more").unwrap();
    s.commit(&format!("{NAMESPACE}/10/more"), &format!("{NAMESPACE}/9/more")).unwrap();
    let more = s.view(&format!("{NAMESPACE}/11/more"), &format!("{NAMESPACE}/10/more")).unwrap();
    let mut request = asked(&left, &more);
    request.metadata_mut().remove("containerd-namespace");
    let more = entries(containerd, &diff(s, &s.socket, request).unwrap());
    assert_eq!(more.keys().collect::<Vec<_>>(), ["more"]);

    assert_eq!(mounted(), before);
    what_is_not_ours(s, [&empty, &left, &done]);
    assert_eq!(containerd.lines("elsewhere", &["content", "ls", "-q"]), [""; 0]);
    assert_eq!(containerd.lines(NAMESPACE, &["content", "active"]).len(), 1, "uploads are left");
    leases(s, containerd, &left, &done);
}

/// containerd asks the next differ for these.
fn what_is_not_ours(s: &Service, [empty, left, right]: [&[types::Mount]; 3]) {
    let unimplemented = |request| refused(diff(s, &s.socket, request), Code::Unimplemented);
    let foreign = types::Mount { r#type: "bind".into(), source: "/etc".into(), ..Default::default() };
    unimplemented(asked(left, &[foreign]));
    unimplemented(asked(&[], right));
    // Not a parent and its child.
    for (left, right) in [(empty, right), (right, left), (left, left), (left, empty)] {
        unimplemented(asked(left, right));
    }
    let mut request = asked(left, right);
    request.get_mut().right[0].source = "/nothing/1".into();
    unimplemented(request);
    let mut request = asked(left, right);
    request.get_mut().media_type = "application/vnd.docker.image.rootfs.diff.tar.gzip".into();
    unimplemented(request);
    let mut request = asked(left, right);
    request.get_mut().source_date_epoch = Some(prost_types::Timestamp { seconds: 1, nanos: 0 });
    unimplemented(request);
    let mut request = asked(left, right);
    request.metadata_mut().remove("containerd-namespace");
    refused(diff(s, &s.socket, request), Code::FailedPrecondition);
    let applied = s.block_on(async {
        let endpoint = Endpoint::try_from(format!("unix://{}", s.socket.display())).unwrap();
        DiffClient::new(endpoint.connect().await.unwrap()).apply(api::ApplyRequest::default()).await
    });
    refused(applied, Code::Unimplemented);
}

/// Garbage collection leaves a new blob alone: by the caller's lease, or by one that ends by itself.
fn leases(s: &Service, containerd: &Containerd, left: &[types::Mount], right: &[types::Mount]) {
    let held = || containerd.lines(NAMESPACE, &["leases", "ls", "-q"]);
    let before = held();
    assert!(!before.is_empty() && before.iter().all(|lease| lease.starts_with("graphdriver-diff-")), "{before:?}");
    containerd.ctr(NAMESPACE, &["leases", "create", "--id", "callers"]);
    let mut request = asked(left, right);
    request.metadata_mut().insert("containerd-lease", "callers".parse().unwrap());
    diff(s, &s.socket, request).unwrap();
    assert_eq!(held().len(), before.len() + 1);
    let listed = containerd.lines(NAMESPACE, &["leases", "ls"]);
    let all_end = listed.iter().skip(1).all(|lease| lease.contains("containerd.io/gc.expire="));
    assert!(all_end, "{listed:?}");
}

fn differ_on(test: &str, on: On) {
    let test = name(module_path!(), test);
    if on.skipped(&test) || skip::skipped(&test, skip::no_program(&["containerd", "ctr", "mount.fuse3"])) {
        return;
    }
    isolated(&test, limit(), |dir| {
        let _rig = Rig::new(dir, on);
        system("mount", &["-t", "tmpfs", "none", "/run"]);
        let containerd = Containerd::start(dir);
        let socket = containerd.socket.to_str().unwrap();
        let s = Service::start_with(dir, on.driver(), &["--containerd", socket]);
        layer_tars_are_in_containerds_store(&s, &containerd);
    });
}

#[test]
fn overlay2_tells_containerd_what_changed() {
    differ_on("overlay2_tells_containerd_what_changed", On::Overlay2);
}

#[test]
fn vfs_fuse_tells_containerd_what_changed() {
    differ_on("vfs_fuse_tells_containerd_what_changed", On::VfsFuse);
}

#[cfg(feature = "btrfs")]
#[test]
fn btrfs_tells_containerd_what_changed() {
    differ_on("btrfs_tells_containerd_what_changed", On::Btrfs);
}
