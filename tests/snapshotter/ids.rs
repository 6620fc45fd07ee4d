//! Snapshots whose ids are mapped: by mounts where there can be any, else by changing owners.

use crate::{
    client::{BINARY, Labels, Service, Tree, labels, log_of, refused, seen_by_others, signal},
    name, on,
    rigs::On,
    support::system,
};
use graphdriver_containerd_api::snapshots::{Kind, ViewSnapshotRequest, snapshots_client::SnapshotsClient};
use nix::sys::signal::Signal;
use std::{
    collections::BTreeSet,
    fs::{self, File},
    os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink},
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Duration,
};
use tonic::Code;

const USERS: &str = "containerd.io/snapshot/uidmapping";
const GROUPS: &str = "containerd.io/snapshot/gidmapping";

fn here(test: &str) -> String {
    name(module_path!(), test)
}

fn maps() -> Labels {
    labels(&[(USERS, "0:1000:100"), (GROUPS, "0:2000:100")])
}

const BIG: u64 = 8 << 20;

/// A committed snapshot with owners, links, and what gives privileges.
fn base(s: &Service) {
    s.layer("base", "", |dir| {
        for name in ["plain", "setuid", "first"] {
            fs::write(dir.join(name), name).unwrap();
        }
        fs::write(dir.join("big"), vec![b'b'; BIG as usize]).unwrap();
        fs::create_dir(dir.join("all")).unwrap();
        fs::set_permissions(dir.join("all"), fs::Permissions::from_mode(0o777)).unwrap();
        fs::hard_link(dir.join("first"), dir.join("second")).unwrap();
        chown(dir.join("plain"), Some(5), Some(6)).unwrap();
        fs::set_permissions(dir.join("setuid"), fs::Permissions::from_mode(0o4755)).unwrap();
        symlink("nowhere", dir.join("link")).unwrap();
        system("setcap", &["cap_net_raw+ep", seen_by_others(&dir.join("first")).to_str().unwrap()]);
    });
}

fn owner(tree: &Tree, name: &str) -> (u32, u32) {
    let found = fs::symlink_metadata(tree.path().join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
    (found.uid(), found.gid())
}

/// Runs a program as a user of the container, without privileges, in the root of its tree.
fn run_as(uid: u32, gid: u32, tree: &Tree, program: &[&str]) {
    let mut command = Command::new("setpriv");
    command.arg(format!("--reuid={uid}")).arg(format!("--regid={gid}")).arg("--clear-groups").args(program);
    let out = command.current_dir(tree.path()).output().unwrap();
    assert!(out.status.success(), "{program:?}: {}", String::from_utf8_lossy(&out.stderr));
}

/// What is mounted where the service keeps its id-mapped mounts, as the process sees it.
fn mounted(s: &Service, process: &str) -> Vec<PathBuf> {
    let table = fs::read_to_string(format!("/proc/{process}/mountinfo")).unwrap();
    let places = table.lines().map(|line| PathBuf::from(line.split(' ').nth(4).unwrap()));
    places.filter(|place| place.starts_with(s.root.join(&s.driver).join("idmapped"))).collect()
}

fn shows_the_base(tree: &Tree) {
    assert_eq!([".", "setuid", "first", "second", "link"].map(|name| owner(tree, name)), [(1000, 2000); 5]);
    assert_eq!(owner(tree, "plain"), (1005, 2006));
    assert_eq!(fs::metadata(tree.path().join("setuid")).unwrap().mode() & 0o7777, 0o4755);
    let out = Command::new("getcap").arg("-n").arg(seen_by_others(&tree.path().join("first"))).output().unwrap();
    let said = String::from_utf8(out.stdout).unwrap();
    assert!(said.contains("cap_net_raw=ep") && said.contains("[rootid=1000]"), "{said}");
}

fn view(s: &Service, key: &str, labels: Labels) -> Result<Tree, tonic::Status> {
    let asked = ViewSnapshotRequest { snapshotter: String::new(), key: key.into(), parent: "base".into(), labels };
    let mut client: SnapshotsClient<_> = s.another();
    s.block_on(client.view(asked)).map(|reply| Tree::of(&reply.into_inner().mounts))
}

/// From the first look to nothing.
fn mapped_by_mounts(s: Service) {
    base(&s);
    let mounts = s.prepare_with("mapped", "base", maps()).unwrap();
    let [place] = &mounted(&s, "self")[..] else { panic!("one mount, and not {:?}", mounted(&s, "self")) };
    let tree = Tree::of(&mounts);
    shows_the_base(&tree);
    // Nothing of it was copied, and our own mount is nobody's use of the layer.
    let used = s.usage("mapped").unwrap();
    assert!((used.size as u64) < BIG / 4, "{used:?}");
    if s.driver == "overlay2" {
        assert_eq!(fs::read_dir(s.root.join("overlay2/data/2/diff")).unwrap().count(), 0);
    }
    assert!(!s.command(&["mounts"]).contains("mapped"), "{}", s.command(&["mounts"]));
    // The container's users write, change and remove; the host's root does.
    run_as(1003, 2004, &tree, &["touch", "all/new"]);
    run_as(1000, 2000, &tree, &["chmod", "700", "setuid"]);
    run_as(1000, 2000, &tree, &["rm", "second"]);
    fs::create_dir(tree.path().join("hosts")).unwrap();
    chown(tree.path().join("hosts"), Some(1007), Some(2007)).unwrap();
    assert_eq!(
        (owner(&tree, "all/new"), owner(&tree, "setuid"), owner(&tree, "hosts")),
        ((1003, 2004), (1000, 2000), (1007, 2007))
    );
    drop(tree);

    // Neither a restart nor a lost mount changes what is told.
    let (dir, driver) = (s.root.parent().unwrap().to_owned(), s.driver.clone());
    assert!(s.stop().success());
    let s = Service::start(&dir, &driver);
    assert_eq!(s.mounts("mapped").unwrap(), mounts);
    assert_eq!(mounted(&s, "self"), std::slice::from_ref(place));
    signal(&s.child, Signal::SIGKILL);
    drop(s);
    system("umount", &[place.to_str().unwrap()]);
    let s = Service::start(&dir, &driver);
    assert_eq!(s.mounts("mapped").unwrap(), mounts);
    assert_eq!(owner(&Tree::of(&mounts), "all/new"), (1003, 2004));

    // A view of what is committed has it too.
    let tree = view(&s, "view", maps()).unwrap();
    shows_the_base(&tree);
    assert!(File::create(tree.path().join("all/other")).is_err());
    drop(tree);
    assert_eq!(mounted(&s, "self").len(), 2);
    s.remove("view").unwrap();
    assert_eq!(mounted(&s, "self"), std::slice::from_ref(place));

    // What is committed has no trace of whose it was.
    s.commit("done", "mapped").unwrap();
    assert!(mounted(&s, "self").is_empty() && !place.exists());
    let plain = Tree::of(&s.view("plain", "done").unwrap());
    let found = ["all/new", "plain", "setuid", "hosts"].map(|name| owner(&plain, name));
    assert_eq!(found, [(3, 4), (5, 6), (0, 0), (7, 7)]);
    assert!(!plain.path().join("second").exists());
    drop(plain);
    let others = labels(&[(USERS, "0:5000:100"), (GROUPS, "0:6000:100")]);
    let tree = Tree::of(&s.prepare_with("again", "done", others).unwrap());
    assert_eq!((owner(&tree, "all/new"), owner(&tree, ".")), ((5003, 6004), (5000, 6000)));
    drop(tree);
    for key in ["again", "plain", "done", "base"] {
        s.remove(key).unwrap();
    }
    s.cleanup().unwrap();
    assert!(mounted(&s, "self").is_empty() && s.stored().is_empty());
    s.command(&["check"]);
}

macro_rules! by_mounts {
    ($($test:ident: $on:ident),*) => { $(#[test]
    fn $test() {
        on(&here(stringify!($test)), On::$on, mapped_by_mounts);
    })* };
}

by_mounts! { overlay2_on_tmpfs: Overlay2, overlay2_on_ext4: Overlay2Ext4 }
#[cfg(feature = "btrfs")]
by_mounts! { btrfs: Btrfs }
#[cfg(feature = "devicemapper")]
by_mounts! { devicemapper: Devicemapper }
#[cfg(feature = "zfs")]
by_mounts! { zfs: Zfs }

/// As where no mount can map ids.
fn mapped_by_owners(s: &Service) {
    base(s);
    let mounts = s.prepare_with("mapped", "base", maps()).unwrap();
    assert!(mounted(s, "self").is_empty() && !s.root.join(&s.driver).join("idmapped").exists());
    let tree = Tree::of(&mounts);
    shows_the_base(&tree);
    drop(tree);
    assert!(log_of(&s.socket).contains("changing the owners"), "{}", log_of(&s.socket));
    // The parent is as it was.
    assert_eq!(owner(&view(s, "view", Labels::new()).unwrap(), "plain"), (5, 6));
    refused(view(s, "mapped-view", maps()).map(drop), Code::FailedPrecondition);
    let small = labels(&[(USERS, "0:1000:2"), (GROUPS, "0:1000:2")]);
    refused(s.prepare_with("small", "base", small), Code::InvalidArgument);
    let half = labels(&[(USERS, "0:1:2")]);
    refused(s.prepare_with("half", "base", half), Code::InvalidArgument);
    s.cleanup().unwrap();
    assert_eq!(s.stored().len(), 2);
}

/// As containerd 1.7 has it, which has changed the owners before it asks.
fn what_is_the_containers_already_is_left_alone(s: &Service) {
    base(s);
    let tree = Tree::of(&s.prepare("remap", "base").unwrap());
    run_as(0, 0, &tree, &["chown", "-Rh", "1000:2000", "."]);
    drop(tree);
    s.commit("remapped", "remap").unwrap();
    let tree = Tree::of(&s.prepare_with("key", "remapped", maps()).unwrap());
    assert_eq!([".", "plain", "all", "link"].map(|name| owner(&tree, name)), [(1000, 2000); 4]);
    assert!(mounted(s, "self").is_empty());
}

#[test]
fn what_is_the_containers_already_on_overlay2() {
    let test = here("what_is_the_containers_already_on_overlay2");
    on(&test, On::Overlay2, |s| what_is_the_containers_already_is_left_alone(&s));
}

#[test]
fn what_is_the_containers_already_on_vfs_fuse() {
    let test = here("what_is_the_containers_already_on_vfs_fuse");
    on(&test, On::VfsFuse, |s| what_is_the_containers_already_is_left_alone(&s));
}

#[test]
fn vfs_fuse_changes_owners() {
    on(&here("vfs_fuse_changes_owners"), On::VfsFuse, |s| mapped_by_owners(&s));
}

/// The service in a mount namespace of its own, as a sandbox gives it one.
fn sandboxed(s: Service, privileges: &[&str]) -> Service {
    let dir = s.root.parent().unwrap().to_owned();
    let driver = s.driver.clone();
    assert!(s.stop().success());
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "slave", "setpriv"]).args(privileges).arg(BINARY);
    command.arg("--root").arg(dir.join("root")).args(["--storage-driver", &driver, "snapshotter", "--socket"]);
    command.arg(dir.join("socket")).env("GRAPHDRIVER_CONFIG", dir.join("root.json")).stdin(Stdio::null());
    let log = File::options().create(true).append(true).open(dir.join("log")).unwrap();
    Service::connect(command.stderr(log).spawn().unwrap(), dir.join("socket"), dir.join("root"), &driver)
}

/// With what our unit for systemd leaves it, as setpriv(1) wants it.
fn capabilities_of_the_unit() -> String {
    let unit = include_str!("../../dist/graphdriver-snapshotter.service");
    let all = unit.lines().find_map(|line| line.strip_prefix("CapabilityBoundingSet=")).unwrap();
    let each = all.split(' ').map(|name| format!(",+{}", name.strip_prefix("CAP_").unwrap().to_lowercase()));
    format!("-all{}", each.collect::<String>())
}

#[test]
fn in_a_sandbox_it_mounts_where_containerd_is() {
    on(&here("in_a_sandbox_it_mounts_where_containerd_is"), On::Overlay2, |s| {
        let left = capabilities_of_the_unit();
        mapped_by_mounts(sandboxed(s, &["--no-new-privs", "--inh-caps", "-all", "--bounding-set", &left]));
    });
}

#[test]
fn in_a_sandbox_without_a_way_out_it_changes_owners() {
    on(&here("in_a_sandbox_without_a_way_out_it_changes_owners"), On::Overlay2, |s| {
        mapped_by_owners(&sandboxed(s, &["--bounding-set", "-sys_chroot", "--inh-caps", "-sys_chroot"]));
    });
}

/// A process in a mount namespace of its own.
pub struct Elsewhere(Child);

impl Elsewhere {
    fn start(propagation: &str) -> Elsewhere {
        Elsewhere::after(propagation, "true")
    }

    /// Once this command of a shell has succeeded there.
    pub fn after(propagation: &str, command: &str) -> Elsewhere {
        let script = format!("{command} && exec sleep 1000");
        let child =
            Command::new("unshare").args(["--mount", "--propagation", propagation, "sh", "-c", &script]).spawn();
        let started = Elsewhere(child.unwrap());
        let comm = format!("/proc/{}/comm", started.0.id());
        while fs::read_to_string(&comm).unwrap() != "sleep\n" {
            std::thread::sleep(Duration::from_millis(5));
        }
        started
    }

    fn process(&self) -> String {
        self.0.id().to_string()
    }
}

impl Drop for Elsewhere {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn no_namespace_keeps_what_is_removed() {
    on(&here("no_namespace_keeps_what_is_removed"), On::Overlay2, |s| {
        base(&s);
        // As systemd has it.
        system("mount", &["--make-rshared", "/"]);
        let before = Elsewhere::start("slave");
        s.prepare_with("mapped", "base", maps()).unwrap();
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(table.lines().any(|line| line.contains("/idmapped/") && !line.contains(" shared:")), "{table}");
        let copies = [Elsewhere::start("slave"), Elsewhere::start("private")];
        assert_eq!(mounted(&s, "self").len(), 1);
        assert_eq!(copies.each_ref().map(|copy| mounted(&s, &copy.process()).len()), [1, 1]);
        s.remove("mapped").unwrap();
        assert!(mounted(&s, "self").is_empty());
        for elsewhere in copies.iter().chain([&before]) {
            assert_eq!(mounted(&s, &elsewhere.process()), [] as [PathBuf; 0]);
        }
    });
}

#[test]
fn mounts_that_a_crash_left_are_undone() {
    on(&here("mounts_that_a_crash_left_are_undone"), On::Overlay2, |s| {
        base(&s);
        let mounts = s.prepare_with("kept", "base", maps()).unwrap();
        let kept = mounted(&s, "self");
        let leave = |s: &Service, layer: &str| {
            let place = s.root.join("overlay2/idmapped").join(layer);
            fs::create_dir(&place).unwrap();
            // Twice at the same place.
            for _ in 0..2 {
                system("mount", &["--bind", s.root.to_str().unwrap(), place.to_str().unwrap()]);
            }
        };
        leave(&s, "77");
        s.cleanup().unwrap();
        assert_eq!(mounted(&s, "self"), kept);
        leave(&s, "78");
        let dir = s.root.parent().unwrap().to_owned();
        signal(&s.child, Signal::SIGKILL);
        drop(s);
        let s = Service::start(&dir, "overlay2");
        assert_eq!(mounted(&s, "self"), kept);
        shows_the_base(&Tree::of(&mounts));
    });
}

#[test]
fn mapped_by_many_at_once() {
    on(&here("mapped_by_many_at_once"), On::Overlay2, |s| {
        base(&s);
        std::thread::scope(|scope| {
            for worker in 0..4 {
                let s = &s;
                scope.spawn(move || {
                    for round in 0..10 {
                        let key = format!("key-{worker}-{round}");
                        let mounts = s.prepare_with(&key, "base", maps()).unwrap();
                        assert_eq!(s.mounts(&key).unwrap(), mounts);
                        assert_eq!(owner(&Tree::of(&mounts), "plain"), (1005, 2006));
                        s.remove(&key).unwrap();
                        refused(s.mounts(&key), Code::NotFound);
                    }
                });
            }
        });
        assert!(mounted(&s, "self").is_empty());
        s.cleanup().unwrap();
        assert_eq!(s.stored().len(), 1);
    });
}

/// Prepares, and commits or removes, until the service is killed.
fn until_it_is_killed(s: &Service, round: u64) {
    for n in 0.. {
        let key = format!("key-{round}-{n}");
        if s.prepare_with(&key, "base", maps()).is_err() {
            return;
        }
        let done = match n % 3 {
            0 => s.remove(&key),
            1 => s.commit(&format!("name-{round}-{n}"), &key),
            _ => Ok(()),
        };
        if done.is_err() {
            return;
        }
    }
}

fn killed_at_any_moment(mut s: Service) {
    let (dir, driver) = (s.root.parent().unwrap().to_owned(), s.driver.clone());
    base(&s);
    for round in 0..10u64 {
        let pid = nix::unistd::Pid::from_raw(s.child.id() as i32);
        let killer = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(30 + round * 23));
            nix::sys::signal::kill(pid, Signal::SIGKILL).unwrap();
        });
        until_it_is_killed(&s, round);
        killer.join().unwrap();
        drop(s);
        s = Service::start(&dir, &driver);
        // Only what is there and maps ids has a mount.
        let (committed, active): (Vec<_>, Vec<_>) =
            s.list(&[]).unwrap().into_iter().partition(|info| info.kind == Kind::Committed as i32);
        let wanted = active.iter().map(|info| layer_of(&s, &info.name)).collect::<BTreeSet<_>>();
        let there = mounted(&s, "self").into_iter().map(|place| place.file_name().unwrap().to_owned());
        let odd: Vec<_> = there.filter(|layer| !wanted.contains(layer.to_str().unwrap())).collect();
        assert!(odd.is_empty(), "{odd:?} of {wanted:?}");
        for (infos, shown) in [(&committed, (5, 6)), (&active, (1005, 2006))] {
            for info in infos {
                let mounts = match info.kind == Kind::Committed as i32 {
                    true => s.view("look", &info.name).unwrap(),
                    false => s.mounts(&info.name).unwrap(),
                };
                assert_eq!(owner(&Tree::of(&mounts), "plain"), shown, "{}", info.name);
                let _ = s.remove("look");
            }
        }
        for info in active.iter().chain(committed.iter().filter(|info| info.name != "base")) {
            s.remove(&info.name).unwrap();
        }
        s.cleanup().unwrap();
        assert!(mounted(&s, "self").is_empty() && s.stored().len() == 1, "{:?}", s.stored());
    }
}

fn layer_of(s: &Service, name: &str) -> String {
    let told = s.command(&["inspect", "--type", "snapshot", name]);
    let told: serde_json::Value = serde_json::from_str(&told).unwrap();
    told[0]["Layer"].to_string()
}

#[test]
fn killed_at_any_moment_on_overlay2() {
    on(&here("killed_at_any_moment_on_overlay2"), On::Overlay2, killed_at_any_moment);
}

#[cfg(feature = "btrfs")]
#[test]
fn killed_at_any_moment_on_btrfs() {
    on(&here("killed_at_any_moment_on_btrfs"), On::Btrfs, killed_at_any_moment);
}
