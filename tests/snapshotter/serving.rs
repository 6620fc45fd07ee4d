//! Serving: many calls at once, being killed, the socket, limits, metrics, and what the command line sees.

use crate::{
    client::{BINARY, Service, Tree, graphdriver, labels, log_of, refused, signal},
    ids::Elsewhere,
    limit, name, on,
    rigs::On,
    support::{isolated, system},
};
use graphdriver_containerd_api::{snapshots as api, types};
use nix::sys::signal::Signal;
use std::{
    collections::BTreeSet,
    fs,
    io::{Read, Write},
    net::TcpStream,
    os::unix::{
        fs::{MetadataExt, PermissionsExt},
        net::{UnixDatagram, UnixListener},
    },
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};
use tonic::Code;

fn here(test: &str) -> String {
    name(module_path!(), test)
}

pub fn two_hundred_at_once(s: &Service) {
    s.layer("base", "", |dir| fs::write(dir.join("file"), "text").unwrap());
    s.block_on(async {
        let calls = (0..200).map(|n| {
            let mut client = s.another();
            tokio::spawn(async move {
                let (key, name) = (format!("key-{n}"), format!("name-{n}"));
                let parent = "base".to_string();
                let prepare = api::PrepareSnapshotRequest { key: key.clone(), parent, ..Default::default() };
                assert_eq!(client.prepare(prepare).await.unwrap().into_inner().mounts.len(), 1);
                let commit = api::CommitSnapshotRequest { key, name: name.clone(), ..Default::default() };
                client.commit(commit).await.unwrap();
                let remove = api::RemoveSnapshotRequest { key: name, ..Default::default() };
                client.remove(remove).await.unwrap();
            })
        });
        for call in calls.collect::<Vec<_>>() {
            call.await.unwrap();
        }
    });
    s.cleanup().unwrap();
    assert_eq!((s.names(&[]), s.stored().len()), (vec!["base".to_string()], 1));
}

#[test]
fn of_two_commits_to_one_name_one_stays_writable() {
    on(&here("of_two_commits_to_one_name_one_stays_writable"), On::Overlay2, |s| {
        for round in 0..10 {
            for key in ["a", "b"] {
                s.prepare(&format!("{key}{round}"), "").unwrap();
            }
            let commit = |key: &str| {
                let (mut client, key, name) = (s.another(), format!("{key}{round}"), format!("name{round}"));
                async move { client.commit(api::CommitSnapshotRequest { key, name, ..Default::default() }).await }
            };
            let (a, b) = s.block_on(async { tokio::join!(commit("a"), commit("b")) });
            let (lost, loser) = if a.is_ok() { (b, "b") } else { (a, "a") };
            refused(lost, Code::AlreadyExists);
            let tree = Tree::of(&s.mounts(&format!("{loser}{round}")).unwrap());
            fs::write(tree.path().join("file"), "still writable").unwrap();
        }
    });
}

pub fn killed_at_any_moment_it_loses_nothing_that_was_told(mut s: Service) {
    let (dir, driver) = (s.root.parent().unwrap().to_owned(), s.driver.clone());
    s.layer("base", "", |dir| fs::write(dir.join("file"), "text").unwrap());
    let mut known: BTreeSet<String> = ["base".into()].into();
    // In the guest a call takes ten times as long.
    let (rounds, step) = if matches!(driver.as_str(), "devicemapper" | "zfs") { (6, 230) } else { (12, 17) };
    for round in 0..rounds {
        let killer = {
            let pid = nix::unistd::Pid::from_raw(s.child.id() as i32);
            std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(40 + round * step));
                nix::sys::signal::kill(pid, Signal::SIGKILL).unwrap();
            })
        };
        let unsure = until_refused(&s, round, &mut known);
        killer.join().unwrap();
        s.child.wait().unwrap();
        assert!(s.socket.exists(), "nobody took it away");
        s = Service::start(&dir, &driver);
        let there: BTreeSet<_> = s.names(&[]).into_iter().collect();
        assert!(there.is_superset(&known), "lost {:?}", known.difference(&there));
        assert!(there.difference(&known).all(|name| unsure.contains(name)), "{there:?} {known:?} {unsure:?}");
        // A commit that nobody was told of is done or not: its layer has the one name or the other.
        if let [key, name] = unsure.as_slice() {
            assert_ne!(there.contains(key), there.contains(name), "{there:?} {unsure:?}");
        }
        for name in there.iter().filter(|name| *name == "base" || name.contains(&format!("-{round}-"))) {
            let mounts = if name.starts_with("key") { s.mounts(name) } else { s.view("look", name) };
            assert_eq!(fs::read_to_string(Tree::of(&mounts.unwrap()).path().join("file")).unwrap(), "text");
            let _ = s.remove("look");
        }
        s.cleanup().unwrap();
        assert_eq!(s.stored().len(), there.len());
        known = there;
    }
}

/// Makes, commits and removes until nobody answers. What is told to be there is `known`; returns what may be there or not: of a
/// commit the key and the name.
fn until_refused(s: &Service, round: u64, known: &mut BTreeSet<String>) -> Vec<String> {
    for n in 0.. {
        let (key, name) = (format!("key-{round}-{n}"), format!("name-{round}-{n}"));
        if s.prepare(&key, "base").is_err() {
            return vec![key];
        }
        if s.commit(&name, &key).is_err() {
            return vec![key, name];
        }
        if n % 2 == 0 {
            if s.remove(&name).is_err() {
                return vec![name];
            }
        } else {
            known.insert(name);
        }
    }
    unreachable!("it is killed");
}

#[test]
fn stopped_it_finishes_what_it_has_begun() {
    on(&here("stopped_it_finishes_what_it_has_begun"), On::Overlay2, |mut s| {
        let dir = s.root.parent().unwrap().to_owned();
        let mut done = BTreeSet::new();
        for round in 0..3u64 {
            let pid = nix::unistd::Pid::from_raw(s.child.id() as i32);
            let told = s.block_on(async {
                let calls = (0..100).map(|n| {
                    let mut client = s.another();
                    let key = format!("key-{round}-{n}");
                    let asked = api::PrepareSnapshotRequest { key: key.clone(), ..Default::default() };
                    tokio::spawn(async move { (key, client.prepare(asked).await) })
                });
                let calls: Vec<_> = calls.collect();
                tokio::time::sleep(Duration::from_millis(10 + 15 * round)).await;
                nix::sys::signal::kill(pid, Signal::SIGTERM).unwrap();
                let mut told = Vec::new();
                for call in calls {
                    told.push(call.await.unwrap());
                }
                told
            });
            assert!(s.child.wait().unwrap().success());
            done.extend(told.into_iter().filter(|(_, reply)| reply.is_ok()).map(|(key, _)| key));
            s = Service::start(&dir, "overlay2");
            // Nothing is there that nobody was told of: no call was cut off.
            assert_eq!(s.names(&[]).into_iter().collect::<BTreeSet<_>>(), done);
            assert_eq!(s.stored().len(), done.len());
        }
        assert!(!done.is_empty());
    });
}

#[test]
fn the_socket_is_roots_alone_and_one_service_has_it() {
    on(&here("the_socket_is_roots_alone_and_one_service_has_it"), On::Overlay2, |s| {
        let dir = s.root.parent().unwrap();
        assert_eq!(fs::metadata(&s.socket).unwrap().mode() & 0o777, 0o600);
        let second = |root: &str, socket: &str| {
            let mut command = graphdriver(&dir.join(root), "overlay2");
            let out = command.args(["snapshotter", "--socket"]).arg(dir.join(socket)).output().unwrap();
            (out.status.code(), String::from_utf8(out.stderr).unwrap())
        };
        let (code, said) = second("root", "elsewhere");
        assert!(code == Some(5) && said.contains("another snapshotter serves"), "{said}");
        let (code, said) = second("other", "socket");
        assert!(code == Some(5) && said.contains("another process listens there"), "{said}");
        assert!(s.names(&[]).is_empty(), "the first one goes on");
    });
}

#[test]
fn another_driver_than_the_snapshots_own_is_refused() {
    on(&here("another_driver_than_the_snapshots_own_is_refused"), On::VfsFuse, |s| {
        let root = s.root.clone();
        let dir = root.parent().unwrap();
        s.prepare("work", "").unwrap();
        // While it is served and after it.
        let refused = || {
            let (code, said) = refusal_of(&root, "overlay2", &dir.join("elsewhere"));
            assert!(code == Some(2) && said.contains("--storage-driver vfs-fuse"), "{code:?} {said}");
            assert!(said.contains("another --root") && !root.join("overlay2").exists(), "{said}");
        };
        refused();
        assert!(s.stop().success());
        refused();
        // The command line may, and what it makes is in nobody's way.
        assert!(graphdriver(&root, "overlay2").arg("ps").status().unwrap().success());
        let s = Service::start(dir, "vfs-fuse");
        assert_eq!(s.names(&[]), ["work"]);
        s.remove("work").unwrap();
        assert!(s.stop().success());
        let s = Service::start(dir, "overlay2");
        assert!(s.names(&[]).is_empty());
        assert!(s.stop().success());
        // What cannot be told of a store is not taken for no.
        fs::write(root.join("vfs-fuse/store.db"), "no database at all, but long enough to be taken for one").unwrap();
        let (code, said) = refusal_of(&root, "overlay2", &dir.join("elsewhere"));
        assert!(
            code.is_some_and(|code| code != 0 && code != 124) && said.contains("vfs-fuse/store.db"),
            "{code:?} {said}"
        );
    });
}

/// What `graphdriver snapshotter --socket SOCKET` ends with, on a data root of its own.
fn refusal(dir: &Path, socket: &Path) -> (Option<i32>, String) {
    refusal_of(&dir.join("other"), "overlay2", socket)
}

fn refusal_of(root: &Path, driver: &str, socket: &Path) -> (Option<i32>, String) {
    let config = root.with_extension("json");
    fs::write(&config, "{}").unwrap();
    let mut command = Command::new("timeout");
    command.env("GRAPHDRIVER_CONFIG", config).args(["20", BINARY, "--storage-driver", driver, "--root"]).arg(root);
    let out = command.args(["snapshotter", "--socket"]).arg(socket).stdin(Stdio::null()).output().unwrap();
    (out.status.code(), String::from_utf8(out.stderr).unwrap())
}

#[test]
fn what_is_at_the_sockets_path_is_not_destroyed() {
    on(&here("what_is_at_the_sockets_path_is_not_destroyed"), On::Overlay2, |s| {
        let dir = s.root.parent().unwrap();
        let text = dir.join("precious");
        let link = dir.join("link");
        fs::write(&text, "text").unwrap();
        std::os::unix::fs::symlink(&text, &link).unwrap();
        for path in [&text, &link] {
            let (code, said) = refusal(dir, path);
            assert!(
                code == Some(4) && said.contains("no socket") && said.contains("precious") | said.contains("link"),
                "{said}"
            );
        }
        fs::rename(&text, dir.join("served.new")).unwrap();
        let (code, said) = refusal(dir, &dir.join("served"));
        assert!(code == Some(4) && said.contains("served.new"), "{said}");
        assert_eq!(fs::read_to_string(dir.join("served.new")).unwrap(), "text");

        // Of somebody who knows nothing of our locks.
        let foreign = dir.join("foreign");
        let listener = UnixListener::bind(&foreign).unwrap();
        let inode = fs::symlink_metadata(&foreign).unwrap().ino();
        let (code, said) = refusal(dir, &foreign);
        assert!(code == Some(5) && said.contains("another process listens there"), "{said}");
        assert_eq!(fs::symlink_metadata(&foreign).unwrap().ino(), inode);
        assert!(!dir.join("foreign.lock").exists(), "nothing is left beside it");
        drop(listener);

        // What has taken the place of our own socket stays.
        let socket = s.socket.clone();
        fs::rename(&socket, dir.join("moved")).unwrap();
        fs::write(&socket, "text").unwrap();
        assert!(s.stop().success());
        assert_eq!(fs::read_to_string(&socket).unwrap(), "text");
    });
}

/// As systemd does it: the socket as descriptor 3, and a socket for what it is told.
#[test]
fn systemd_hands_over_the_socket_and_is_told() {
    let test = here("systemd_hands_over_the_socket_and_is_told");
    isolated(&test, limit(), |dir| {
        let told = UnixDatagram::bind(dir.join("notify")).unwrap();
        told.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let hear = || {
            let mut buffer = [0; 256];
            let length = told.recv(&mut buffer).unwrap_or_else(|e| panic!("{e}: {}", log_of(&dir.join("socket"))));
            String::from_utf8_lossy(&buffer[..length]).into_owned()
        };
        let launcher = "
import os, socket, sys
s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen()
os.dup2(s.fileno(), 3) if s.fileno() != 3 else s.set_inheritable(True)
os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid()))
os.execv(sys.argv[2], sys.argv[2:])";
        fs::write(dir.join("config.json"), "{}").unwrap();
        let child = Command::new("python3")
            .args(["-c", launcher])
            .arg(dir.join("socket"))
            .args([BINARY, "--storage-driver", "overlay2", "--root"])
            .arg(dir.join("root"))
            .args(["snapshotter", "--socket", "/nonexistent/socket", "--log-format", "json"])
            .env("NOTIFY_SOCKET", dir.join("notify"))
            .env("GRAPHDRIVER_CONFIG", dir.join("config.json"))
            .stderr(fs::File::create(dir.join("log")).unwrap())
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let mut s = Service::connect(child, dir.join("socket"), dir.join("root"), "overlay2");
        assert_eq!(hear().trim(), "READY=1");
        refused(s.stat("missing"), Code::NotFound);
        refused(s.stat("a space/12/missing"), Code::NotFound);
        fs::rename(&s.socket, dir.join("moved")).unwrap();
        let (code, said) = refusal(dir, &s.socket);
        assert!(code == Some(5) && said.contains("another process listens there"), "{said}");
        fs::rename(dir.join("moved"), &s.socket).unwrap();
        signal(&s.child, Signal::SIGTERM);
        assert_eq!(hear().trim(), "STOPPING=1");
        assert!(s.child.wait().unwrap().success());
        assert!(dir.join("socket").exists(), "it is systemd's");
        let log = log_of(&dir.join("socket"));
        let lines: Vec<serde_json::Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let call = lines.iter().find(|line| line["span"]["method"] == "Stat").unwrap_or_else(|| panic!("{log}"));
        assert_eq!((&call["span"]["key"], &call["code"]), (&"missing".into(), &"NotFound".into()));
        assert!(call["span"]["request"].is_u64(), "{call}");
        // As containerd names them: 1.6 tells the namespace nowhere else.
        let named = |key| lines.iter().find(|line| line["span"]["key"] == key).map(|line| &line["span"]["namespace"]);
        assert_eq!(
            (named("missing"), named("a space/12/missing")),
            (Some(&"".into()), Some(&"a space".into())),
            "{log}"
        );
    });
}

#[test]
fn a_size_is_a_real_limit_or_refused() {
    on(&here("a_size_is_a_real_limit_or_refused"), On::Overlay2, |s| {
        // A tmpfs has no project quotas.
        for label in ["containerd.io/snapshot/max-size", "graphdriver.io/size", "graphdriver.io/inodes"] {
            refused(s.prepare_with("key", "", labels(&[(label, "1048576")])), Code::FailedPrecondition);
            refused(s.prepare_with("key", "", labels(&[(label, "-1")])), Code::InvalidArgument);
        }
        s.prepare("key", "").unwrap();
        let mut info = s.stat("key").unwrap();
        info.labels = labels(&[("graphdriver.io/size", "1M")]);
        refused(s.update(info, &[]), Code::FailedPrecondition);
        assert!(s.stat("key").unwrap().labels.is_empty());
        // A label of what takes nothing more is only a label.
        s.commit_with("done", "key", labels(&[("graphdriver.io/size", "much")])).unwrap();
        let mut info = s.stat("done").unwrap();
        info.labels.insert("a".into(), "b".into());
        s.update(info, &[]).unwrap();
        s.cleanup().unwrap();
        assert_eq!(s.stored().len(), 1);
    });
}

#[test]
fn prometheus_is_answered_on_this_host_alone() {
    on(&here("prometheus_is_answered_on_this_host_alone"), On::Overlay2, |s| {
        let dir = s.root.parent().unwrap().to_owned();
        s.layer("base", "", |_| ());
        s.prepare("work", "base").unwrap();
        assert!(s.stop().success());
        let refused_address = {
            let mut command = graphdriver(&dir.join("root"), "overlay2");
            command
                .args(["snapshotter", "--metrics", "0.0.0.0:0", "--socket"])
                .arg(dir.join("socket"))
                .output()
                .unwrap()
        };
        assert_eq!(refused_address.status.code(), Some(2));
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let address = format!("127.0.0.1:{port}");
        let s = Service::start_with(&dir, "overlay2", &["--metrics", &address]);
        refused(s.stat("missing"), Code::NotFound);
        let mut stream = TcpStream::connect(&address).unwrap();
        stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        for line in [
            "graphdriver_calls_total{code=\"NotFound\",method=\"Stat\"} 1",
            "graphdriver_layers{driver=\"overlay2\",kind=\"committed\"} 1",
            "graphdriver_call_seconds_count{method=\"Stat\"} 1",
            "graphdriver_mounts 0",
            "graphdriver_reclaimable_bytes 0",
        ] {
            assert!(answer.contains(line), "{line} is not in {answer}");
        }
        let bytes: Vec<_> = answer.lines().filter(|line| line.starts_with("graphdriver_layer_bytes")).collect();
        assert!(matches!(bytes.as_slice(), [one] if one.contains("kind=\"committed\"")), "{bytes:?}");
    });
}

#[test]
fn addresses_of_the_wrong_form_are_refused_with_the_right_one() {
    let refused = |arguments: [&str; 2], wanted: &str| {
        let out = Command::new(BINARY).arg("snapshotter").args(arguments).output().unwrap();
        let said = String::from_utf8(out.stderr).unwrap();
        assert!(out.status.code() == Some(2) && said.contains(wanted), "{arguments:?}: {said}");
    };
    for url in ["unix:///nonexistent/socket", "unix:/nonexistent/socket"] {
        refused(["--socket", url], "write /nonexistent/socket");
    }
    for address in ["localhost:9324", "9324"] {
        refused(["--metrics", address], "127.0.0.1:9324");
    }
}

#[test]
fn damage_to_a_snapshot_is_named() {
    on(&here("damage_to_a_snapshot_is_named"), On::Overlay2, |s| {
        s.layer("base", "", |dir| fs::write(dir.join("file"), "text").unwrap());
        s.prepare("work", "base").unwrap();
        fs::remove_dir_all(s.root.join("overlay2/data/1")).unwrap();
        let out = graphdriver(&s.root, "overlay2").arg("check").output().unwrap();
        let told = String::from_utf8(out.stdout).unwrap();
        assert_eq!(out.status.code(), Some(9), "{told}");
        assert!(told.contains("layer 1 has no storage") && told.contains("snapshot base, snapshot work"), "{told}");
        // It was there when it was asked for before, which holds for a second.
        std::thread::sleep(Duration::from_millis(1100));
        for reply in [s.mounts("work"), s.prepare("more", "base"), s.view("look", "base")] {
            let said = refused(reply, Code::DataLoss);
            assert!(said.contains("layer 1 is not there"), "{said}");
        }
        assert_eq!(s.names(&[]), ["base", "work"]);
    });
}

#[test]
fn a_container_in_its_own_namespace_is_one_mount() {
    on(&here("a_container_in_its_own_namespace_is_one_mount"), On::Overlay2, |s| {
        let mounts = s.prepare("work", "").unwrap();
        let [target, root] = ["target", "elsewhere"].map(|name| s.root.with_file_name(name));
        let (target, root) = (target.to_str().unwrap(), root.to_str().unwrap());
        [target, root].iter().for_each(|dir| fs::create_dir(dir).unwrap());
        let options = mounts[0].options.join(",");
        system("mount", &["-t", &mounts[0].r#type, &mounts[0].source, target, "-o", &options]);
        let targets = || -> Vec<String> {
            let listed: serde_json::Value = serde_json::from_str(&s.command(&["--format", "json", "mounts"])).unwrap();
            listed.as_array().unwrap().iter().map(|one| one["Target"].as_str().unwrap().into()).collect()
        };
        let _container = Elsewhere::after("private", &format!("mount --move {target} {root}"));
        assert_eq!(targets(), [target]);
        // Seen there alone it is told, too.
        system("umount", &[target]);
        assert_eq!(targets(), [root]);
    });
}

#[test]
fn whoever_has_vfs_fuse_mounted_is_not_waited_for() {
    on(&here("whoever_has_vfs_fuse_mounted_is_not_waited_for"), On::VfsFuse, |s| {
        let mounts = s.prepare("work", "").unwrap();
        let target = s.root.with_file_name("target");
        fs::create_dir(&target).unwrap();
        let target = target.to_str().unwrap();
        let (program, options) = (mounts[0].r#type.strip_prefix("fuse3.").unwrap(), mounts[0].options.join(","));
        system("mount.fuse3", &[&mounts[0].source, target, "-o", &options, "-t", program]);
        system("mount", &["--make-shared", target]);
        // The same filesystem once more, and no second daemon.
        let again = s.mounts("work").unwrap();
        assert!(again[0].options.iter().any(|option| option == "join"), "{again:?}");
        let second = s.root.with_file_name("second");
        fs::create_dir(&second).unwrap();
        let joined = again[0].options.join(",");
        system("mount.fuse3", &[&again[0].source, second.to_str().unwrap(), "-o", &joined, "-t", program]);
        fs::write(second.join("file"), "text").unwrap();
        assert_eq!(fs::read_to_string(Path::new(target).join("file")).unwrap(), "text");
        let devices = [Path::new(target), &second].map(|dir| fs::metadata(dir).unwrap().dev());
        assert_eq!(devices[0], devices[1]);
        // What is mounted below one does not show below the other.
        fs::create_dir(second.join("sub")).unwrap();
        system("mount", &["-t", "tmpfs", "none", second.join("sub").to_str().unwrap()]);
        fs::write(second.join("sub/hidden"), "").unwrap();
        assert!(!Path::new(target).join("sub/hidden").exists());
        system("umount", &[second.join("sub").to_str().unwrap()]);
        system("umount", &[second.to_str().unwrap()]);
        let joined = format!("{joined},ro");
        system("mount.fuse3", &[&again[0].source, second.to_str().unwrap(), "-o", &joined, "-t", program]);
        assert_eq!(fs::write(second.join("file"), "").unwrap_err().kind(), std::io::ErrorKind::ReadOnlyFilesystem);
        system("umount", &[second.to_str().unwrap()]);
        // One that may be just ending is given 5 seconds.
        let begun = Instant::now();
        refused(s.commit("done", "work"), Code::FailedPrecondition);
        assert!(begun.elapsed() < Duration::from_millis(4900), "{:?}", begun.elapsed());
        system("umount", &[target]);
        // A daemon that is just ending is.
        let mounts = s.mounts("work").unwrap();
        system("mount.fuse3", &[&mounts[0].source, target, "-o", &options, "-t", program]);
        s.remove("work").unwrap();
        let begun = Instant::now();
        s.cleanup().unwrap();
        assert!(begun.elapsed() < Duration::from_millis(4900), "{:?}", begun.elapsed());
        system("umount", &[target]);
        s.cleanup().unwrap();
        assert_eq!(s.stored().len(), 0);
    });
}

#[test]
fn layers_are_unpacked_past_fuse() {
    on(&here("layers_are_unpacked_past_fuse"), On::VfsFuse, |s| {
        s.layer("base", "", |dir| {
            for name in ["dir", "kept"] {
                fs::create_dir(dir.join(name)).unwrap();
                fs::write(dir.join(name).join("below"), "below").unwrap();
            }
            fs::write(dir.join("gone"), "gone").unwrap();
        });
        let option = |mounts: &[types::Mount], name: &str| {
            let found = mounts[0].options.iter().find_map(|option| option.strip_prefix(name).map(str::to_owned));
            found.unwrap_or_else(|| panic!("{name} is not in {mounts:?}"))
        };
        for (n, key) in ["default/7/extract-42-aBc sha256:0", "extract-42-aBc sha256:0"].into_iter().enumerate() {
            // containerd does not carry that out: it writes to the upper directory, and looks at lower ones for parents.
            let mounts = s.prepare(key, "base").unwrap();
            assert_eq!(mounts, s.mounts(key).unwrap());
            assert_eq!((mounts.len(), &mounts[0].r#type[..]), (1, "overlay"));
            assert_eq!(fs::read_to_string(format!("{}/gone", option(&mounts, "lowerdir="))).unwrap(), "gone");
            let upper = option(&mounts, "upperdir=");
            system("mknod", &[&format!("{upper}/gone"), "c", "0", "0"]);
            fs::create_dir(format!("{upper}/dir")).unwrap();
            system("setfattr", &["-n", "trusted.overlay.opaque", "-v", "y", &format!("{upper}/dir")]);
            fs::write(format!("{upper}/dir/new"), "new").unwrap();
            // What a tar says in the other namespace, and in fuse-overlayfs's, is nothing of ours.
            fs::create_dir(format!("{upper}/kept")).unwrap();
            for name in ["user.overlay.opaque", "user.fuseoverlayfs.opaque"] {
                system("setfattr", &["-n", name, "-v", "y", &format!("{upper}/kept")]);
            }
            fs::write(format!("{upper}/marked"), "marked").unwrap();
            for name in ["user.overlay.metacopy", "user.overlay.redirect", "user.overlay.whiteout", "user.other"] {
                system("setfattr", &["-n", name, "-v", "y", &format!("{upper}/marked")]);
            }
            // What somebody sees who does.
            assert_eq!(fs::read_dir(Tree::of(&mounts).path().join("dir")).unwrap().count(), 1);
            let name = format!("next-{n}");
            s.commit(&name, key).unwrap();
            let view = s.view(&format!("view-{n}"), &name).unwrap();
            assert!(view[0].r#type.starts_with("fuse3."), "{view:?}");
            let tree = Tree::of(&view);
            assert!(!tree.path().join("gone").exists() && !tree.path().join("dir/below").exists());
            assert_eq!(fs::read_to_string(tree.path().join("dir/new")).unwrap(), "new");
            assert_eq!(fs::read_to_string(tree.path().join("kept/below")).unwrap(), "below");
            assert_eq!(fs::read_to_string(tree.path().join("marked")).unwrap(), "marked");
            let mut names: Vec<_> = xattr::list(tree.path().join("marked")).unwrap().collect();
            names.sort();
            assert_eq!(
                names,
                ["user.other", "user.overlay.metacopy", "user.overlay.redirect", "user.overlay.whiteout"]
            );
        }
        for key in ["default/8/box", "default/9/not-extract-1", "extract"] {
            let mounts = s.prepare(key, "base").unwrap();
            assert!(mounts[0].r#type.starts_with("fuse3."), "{key}: {mounts:?}");
        }
        let view = s.view("extract-view", "base").unwrap();
        assert!(view[0].r#type.starts_with("fuse3."), "{view:?}");
    });
}

#[test]
fn upper_directories_of_overlays_have_whole_files() {
    on(&here("upper_directories_of_overlays_have_whole_files"), On::Overlay2, |s| {
        s.layer("base", "", |dir| fs::write(dir.join("file"), "text").unwrap());
        let mounts = s.prepare("work", "base").unwrap();
        let file = Tree::of(&mounts);
        fs::set_permissions(file.path().join("file"), fs::Permissions::from_mode(0o600)).unwrap();
        drop(file);
        let upper = mounts[0].options.iter().find_map(|option| option.strip_prefix("upperdir=")).unwrap();
        assert_eq!(fs::read_to_string(Path::new(upper).join("file")).unwrap(), "text", "as BuildKit reads it");
        // And mounts it.
        let mut off = mounts.clone();
        off[0].options.retain(|option| !option.starts_with("redirect_dir="));
        off[0].options.push("redirect_dir=off".into());
        assert_eq!(fs::read_to_string(Tree::of(&off).path().join("file")).unwrap(), "text");
    });
}

/// Clients take headers of 16 KiB and messages of 4 MiB.
#[test]
fn what_is_long_is_refused_or_listed_in_messages_that_clients_take() {
    on(&here("what_is_long_is_refused_or_listed_in_messages_that_clients_take"), On::Overlay2, |s| {
        for filter in ["=".repeat(100_000), format!("name=={}\u{1}", "é".repeat(100_000))] {
            let said = refused(s.list(&[&filter]), Code::InvalidArgument);
            assert!(said.len() < 5000, "{}", said.len());
        }
        refused(s.prepare(&"\0".repeat(5000), ""), Code::InvalidArgument);
        refused(s.stat(&"\u{1}".repeat(100_000)), Code::NotFound);
        let many = |count: usize| (0..count).map(|n| (format!("label-{n}"), "x".repeat(4000))).collect();
        for n in 0..8 {
            s.prepare_with(&format!("key-{n}"), "", many(150)).unwrap();
        }
        assert_eq!(s.list(&[]).unwrap().len(), 8);
        refused(s.prepare_with("more", "", many(300)), Code::InvalidArgument);
    });
}
