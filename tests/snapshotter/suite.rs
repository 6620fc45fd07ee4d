//! What containerd's own suite holds a snapshotter to, case by case, through the socket.

use crate::client::{Service, Tree, graphdriver, labels, refused, seen_by_others};
use graphdriver_containerd_api::snapshots::Kind;
use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, chown},
    path::Path,
    process::Command,
};
use tonic::Code;

/// Files by their paths; a directory has none.
fn files(root: &Path) -> BTreeMap<String, Vec<u8>> {
    fn below(dir: &Path, at: &str, all: &mut BTreeMap<String, Vec<u8>>) {
        for entry in fs::read_dir(dir).unwrap() {
            let entry = entry.unwrap();
            let name = format!("{at}/{}", entry.file_name().to_str().unwrap());
            match entry.file_type().unwrap().is_dir() {
                true => {
                    all.insert(name.clone(), Vec::new());
                    below(&entry.path(), &name, all);
                }
                false => drop(all.insert(name, fs::read(entry.path()).unwrap())),
            }
        }
    }
    let mut all = BTreeMap::new();
    below(root, "", &mut all);
    all
}

fn write(root: &Path, name: &str, text: &str) {
    fs::write(root.join(name), text).unwrap();
}

fn read(root: &Path, name: &str) -> String {
    fs::read_to_string(root.join(name)).unwrap()
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777
}

pub fn from_prepare_to_removal(s: &Service) {
    let mounts = s.prepare("work", "").unwrap();
    assert_eq!(mounts, s.mounts("work").unwrap());
    {
        let tree = Tree::of(&mounts);
        write(tree.path(), "foo", "foo\n");
        fs::create_dir_all(tree.path().join("a/b/c")).unwrap();
    }
    s.commit("base", "work").unwrap();
    refused(s.stat("work"), Code::NotFound);
    let base = s.stat("base").unwrap();
    assert_eq!((base.parent.as_str(), base.kind()), ("", Kind::Committed));
    {
        let tree = Tree::of(&s.prepare("next", "base").unwrap());
        assert_eq!(read(tree.path(), "foo"), "foo\n");
        write(tree.path(), "bar", "bar\n");
        fs::remove_dir(tree.path().join("a/b/c")).unwrap();
    }
    s.commit("top", "next").unwrap();
    let tree = Tree::of(&s.view("look", "top").unwrap());
    assert_eq!(files(tree.path()).into_keys().collect::<Vec<_>>(), ["/a", "/a/b", "/bar", "/foo"]);
    drop(tree);
    assert!(s.usage("base").unwrap().inodes > 0);
    assert_eq!((s.usage("look").unwrap().size, s.usage("look").unwrap().inodes), (0, 0));
    for used in ["base", "top"] {
        assert!(refused(s.remove(used), Code::FailedPrecondition).contains("remove"));
    }
    for key in ["look", "top", "base"] {
        s.remove(key).unwrap();
        refused(s.remove(key), Code::NotFound);
    }
    s.cleanup().unwrap();
    assert!(s.names(&[]).is_empty() && s.stored().is_empty(), "{:?}", s.stored());
}

pub fn stat_tells_kinds_and_parents(s: &Service) {
    s.prepare("active", "").unwrap();
    let active = s.stat("active").unwrap();
    assert_eq!((active.name.as_str(), active.kind(), active.parent.as_str()), ("active", Kind::Active, ""));
    assert!(active.created_at.is_some() && active.created_at == active.updated_at);
    s.commit("committed", "active").unwrap();
    let committed = s.stat("committed").unwrap();
    assert_eq!((committed.kind(), committed.created_at == committed.updated_at), (Kind::Committed, true));
    s.view("view", "committed").unwrap();
    let view = s.stat("view").unwrap();
    assert_eq!((view.kind(), view.parent.as_str()), (Kind::View, "committed"));
    refused(s.stat("missing"), Code::NotFound);
    refused(s.mounts("missing"), Code::NotFound);
    refused(s.usage("missing"), Code::NotFound);
}

pub fn parents_are_passed_on(s: &Service) {
    s.layer("one", "", |dir| write(dir, "1", "1"));
    s.layer("two", "one", |dir| write(dir, "2", "2"));
    s.prepare("three", "two").unwrap();
    let parents: Vec<_> = ["one", "two", "three"].iter().map(|key| s.stat(key).unwrap().parent).collect();
    assert_eq!(parents, ["", "one", "two"]);
    assert_eq!(files(Tree::of(&s.mounts("three").unwrap()).path()).len(), 2);
}

pub fn taken_keys_and_wrong_parents_are_refused(s: &Service) {
    s.layer("base", "", |_| ());
    s.prepare("active", "base").unwrap();
    s.view("view", "base").unwrap();
    for taken in ["base", "active", "view"] {
        refused(s.prepare(taken, "base"), Code::AlreadyExists);
        refused(s.view(taken, "base"), Code::AlreadyExists);
        refused(s.commit(taken, "active"), Code::AlreadyExists);
    }
    for parent in ["active", "view"] {
        refused(s.prepare("new", parent), Code::InvalidArgument);
        refused(s.view("new", parent), Code::InvalidArgument);
    }
    refused(s.prepare("new", "missing"), Code::NotFound);
    refused(s.view("new", "missing"), Code::NotFound);
    refused(s.commit("new", "missing"), Code::NotFound);
    refused(s.commit("new", "view"), Code::FailedPrecondition);
    refused(s.commit("new", "base"), Code::FailedPrecondition);
    refused(s.prepare("", "base"), Code::InvalidArgument);
    // What was refused changed nothing.
    let tree = Tree::of(&s.mounts("active").unwrap());
    write(tree.path(), "still", "writable");
    assert_eq!(s.names(&[]), ["active", "base", "view"]);
}

/// containerd's "rebase": layers of an image are prepared without parents, filled at once, and each committed on its own.
pub fn a_parent_given_at_commit_is_taken_or_refused(s: &Service) {
    s.layer("base", "", |dir| ["gone", "stays"].iter().for_each(|name| write(dir, name, "base")));
    s.layer("other", "", |_| ());
    s.prepare("on-base", "base").unwrap();
    refused(s.commit_on("other", "new", "on-base"), Code::InvalidArgument);
    s.commit_on("base", "own", "on-base").unwrap();
    assert_eq!(s.stat("own").unwrap().parent, "base");

    let mounts = s.prepare("alone", "").unwrap();
    refused(s.commit_on("missing", "new", "alone"), Code::NotFound);
    refused(s.commit_on("alone", "new", "alone"), Code::FailedPrecondition);
    let upper = mounts[0].options.iter().find_map(|option| option.strip_prefix("upperdir="));
    if mounts[0].r#type != "overlay" {
        refused(s.commit_on("base", "new", "alone"), Code::FailedPrecondition);
        s.commit("new", "alone").unwrap();
        assert_eq!(s.stat("new").unwrap().parent, "");
        return;
    }
    // As containerd unpacks a tar, which knows overlays.
    let upper = Path::new(upper.unwrap());
    write(upper, "added", "alone");
    let device = (rustix::fs::FileType::CharacterDevice, rustix::fs::Mode::empty(), 0);
    rustix::fs::mknodat(rustix::fs::CWD, upper.join("gone"), device.0, device.1, device.2).unwrap();
    s.commit_on("base", "new", "alone").unwrap();
    assert_eq!(s.stat("new").unwrap().parent, "base");
    refused(s.remove("base"), Code::FailedPrecondition);
    s.prepare("run", "new").unwrap();
    let tree = Tree::of(&s.mounts("run").unwrap());
    let names: Vec<_> = files(tree.path()).into_keys().collect();
    assert_eq!(names, ["/added", "/stays"]);
}

pub fn labels_change_and_parents_do_not(s: &Service) {
    s.layer("one", "", |_| ());
    s.layer("other", "", |_| ());
    s.prepare_with("two-active", "one", labels(&[("a", "1"), ("empty", "")])).unwrap();
    assert_eq!(s.stat("two-active").unwrap().labels, labels(&[("a", "1")]));
    s.commit_with("two", "two-active", labels(&[("b", "2")])).unwrap();
    let mut info = s.stat("two").unwrap();
    assert_eq!(info.labels, labels(&[("b", "2")]));

    info.labels = labels(&[("c", "3"), ("d.e/f", "4")]);
    let updated = s.update(info.clone(), &[]).unwrap();
    assert_eq!((&updated.labels, updated.updated_at != info.updated_at), (&info.labels, true));
    assert_eq!(updated.created_at, info.created_at);

    info.labels = labels(&[("d.e/f", "5"), ("ignored", "x")]);
    let updated = s.update(info.clone(), &["labels.d.e/f", "labels.c"]).unwrap();
    assert_eq!(updated.labels, labels(&[("d.e/f", "5")]));
    info.labels = labels(&[("g", "6")]);
    assert_eq!(s.update(info.clone(), &["labels"]).unwrap().labels, info.labels);

    info.parent = "other".into();
    for path in ["parent", "kind", "name", "created_at", "labelsx"] {
        refused(s.update(info.clone(), &["labels.g", path]), Code::InvalidArgument);
    }
    assert_eq!(s.update(info.clone(), &[]).unwrap().parent, "one");
    info.name = "missing".into();
    refused(s.update(info, &[]), Code::NotFound);
    refused(s.prepare_with("long", "one", labels(&[("a", &"x".repeat(4096))])), Code::InvalidArgument);
}

pub fn removed_keys_can_be_used_again(s: &Service) {
    s.layer("base", "", |_| ());
    for text in ["first", "second"] {
        let tree = Tree::of(&s.prepare("key", "base").unwrap());
        assert!(files(tree.path()).is_empty());
        write(tree.path(), "file", text);
        drop(tree);
        s.remove("key").unwrap();
    }
    s.cleanup().unwrap();
    assert_eq!(s.stored().len(), 1);
}

pub fn listings_take_filters_and_calls_meanwhile(s: &Service) {
    s.layer("base", "", |_| ());
    // Several messages of a listing, but for drivers that are tried in the guest, whose processor is slow.
    let views = if matches!(s.driver.as_str(), "devicemapper" | "zfs") { 12 } else { 250 };
    for n in 0..views {
        s.view(&format!("view-{n:03}"), "base").unwrap();
    }
    s.prepare_with("work", "base", labels(&[("who", "me")])).unwrap();
    assert_eq!(s.list(&[]).unwrap().len(), views + 2);
    assert_eq!(s.names(&["kind==active"]), ["work"]);
    assert_eq!(s.names(&["labels.who==me"]), ["work"]);
    assert_eq!(s.names(&["kind==committed", "labels.who"]), ["base", "work"]);
    assert_eq!(s.names(&["parent==base,name~=/view-00[12]/"]), ["view-001", "view-002"]);
    refused(s.list(&["kind="]), Code::InvalidArgument);
    let asked = graphdriver_containerd_api::snapshots::ListSnapshotsRequest::default();
    let mut stream = s.block_on(s.another().list(asked)).unwrap().into_inner();
    let mut seen = 0;
    while let Some(page) = s.block_on(stream.message()).unwrap() {
        for info in page.info {
            assert_eq!(s.stat(&info.name).unwrap().name, info.name);
            if info.kind() == Kind::View {
                s.remove(&info.name).unwrap();
            }
            seen += 1;
        }
    }
    assert_eq!((seen, s.names(&[]).len()), (views + 2, 2));
}

pub fn edits_within_a_second_are_kept(s: &Service) {
    s.layer("one", "", |dir| write(dir, "file", "first"));
    s.layer("two", "one", |dir| write(dir, "file", "other"));
    s.layer("three", "two", |dir| write(dir, "file", "third"));
    for (name, text) in [("one", "first"), ("two", "other"), ("three", "third")] {
        assert_eq!(read(Tree::of(&s.view(&format!("{name}-view"), name).unwrap()).path(), "file"), text);
    }
}

pub fn a_directory_made_again_hides_the_old_one(s: &Service) {
    s.layer("one", "", |dir| {
        fs::create_dir_all(dir.join("dir/sub")).unwrap();
        write(dir, "dir/old", "old");
    });
    s.layer("two", "one", |dir| {
        fs::remove_dir_all(dir.join("dir")).unwrap();
        fs::create_dir(dir.join("dir")).unwrap();
        write(dir, "dir/new", "new");
    });
    s.layer("three", "two", |dir| write(dir, "dir/more", "more"));
    let tree = Tree::of(&s.view("look", "three").unwrap());
    assert_eq!(files(tree.path()).into_keys().collect::<Vec<_>>(), ["/dir", "/dir/more", "/dir/new"]);
}

pub fn an_owner_alone_can_change(s: &Service) {
    s.layer("one", "", |dir| {
        fs::create_dir(dir.join("opt")).unwrap();
        write(dir, "opt/file", "text");
    });
    s.layer("two", "one", |dir| {
        chown(dir.join("opt"), Some(1), Some(2)).unwrap();
        chown(dir.join("opt/file"), Some(3), Some(4)).unwrap();
    });
    let tree = Tree::of(&s.view("look", "two").unwrap());
    let owner = |name: &str| fs::metadata(tree.path().join(name)).map(|stat| (stat.uid(), stat.gid())).unwrap();
    assert_eq!((owner("opt"), owner("opt/file")), ((1, 2), (3, 4)));
    assert_eq!(read(tree.path(), "opt/file"), "text");
}

pub fn modes_of_directories_survive(s: &Service) {
    let set = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    s.layer("one", "", |dir| {
        for (name, mode) in [("a", 0o700), ("b", 0o1777), ("c", 0o755)] {
            fs::create_dir(dir.join(name)).unwrap();
            set(&dir.join(name), mode);
        }
    });
    s.layer("two", "one", |dir| {
        set(&dir.join("a"), 0o750);
        fs::remove_dir(dir.join("c")).unwrap();
        fs::create_dir(dir.join("c")).unwrap();
        set(&dir.join("c"), 0o2711);
    });
    let tree = Tree::of(&s.prepare("look", "two").unwrap());
    assert_eq!(["a", "b", "c"].map(|name| mode(&tree.path().join(name))), [0o750, 0o1777, 0o2711]);
}

pub fn no_removal_below_children(s: &Service) {
    s.layer("one", "", |dir| write(dir, "file", "1"));
    s.layer("two", "one", |dir| write(dir, "file", "2"));
    s.prepare("three", "two").unwrap();
    for below in ["one", "two"] {
        refused(s.remove(below), Code::FailedPrecondition);
    }
    s.cleanup().unwrap();
    assert_eq!(read(Tree::of(&s.mounts("three").unwrap()).path(), "file"), "2");
    for key in ["three", "two", "one"] {
        s.remove(key).unwrap();
    }
}

pub fn what_was_deleted_stays_deleted(s: &Service) {
    s.layer("one", "", |dir| {
        write(dir, "file", "1");
        fs::create_dir_all(dir.join("tree/sub")).unwrap();
    });
    s.layer("two", "one", |dir| {
        fs::remove_file(dir.join("file")).unwrap();
        fs::remove_dir_all(dir.join("tree")).unwrap();
    });
    s.layer("three", "two", |dir| write(dir, "other", "3"));
    let tree = Tree::of(&s.prepare("look", "three").unwrap());
    assert_eq!(files(tree.path()).into_keys().collect::<Vec<_>>(), ["/other"]);
}

pub fn files_of_lower_layers_move_and_have_links(s: &Service) {
    s.layer("one", "", |dir| {
        fs::create_dir(dir.join("dir1")).unwrap();
        write(dir, "dir1/f1", "foo");
        fs::create_dir(dir.join("dir2")).unwrap();
    });
    s.layer("two", "one", |dir| {
        fs::hard_link(dir.join("dir1/f1"), dir.join("dir2/link")).unwrap();
        fs::rename(dir.join("dir1/f1"), dir.join("dir2/f2")).unwrap();
    });
    let tree = Tree::of(&s.view("look", "two").unwrap());
    assert_eq!(files(tree.path()).into_keys().collect::<Vec<_>>(), ["/dir1", "/dir2", "/dir2/f2", "/dir2/link"]);
    assert_eq!((read(tree.path(), "dir2/f2"), read(tree.path(), "dir2/link")), ("foo".into(), "foo".into()));
}

pub fn views_are_read_only(s: &Service) {
    s.layer("base", "", |dir| write(dir, "file", "text"));
    for (key, parent) in [("view", "base"), ("empty", "")] {
        let tree = Tree::of(&s.view(key, parent).unwrap());
        let failed = fs::write(tree.path().join("new"), "x").unwrap_err();
        assert_eq!(failed.kind(), std::io::ErrorKind::ReadOnlyFilesystem, "{key}");
        refused(s.commit("new", key), Code::FailedPrecondition);
    }
    // What is committed is shown by views alone.
    refused(s.mounts("base"), Code::FailedPrecondition);
}

pub fn the_root_has_mode_0755(s: &Service) {
    let tree = Tree::of(&s.prepare("base-active", "").unwrap());
    assert_eq!(mode(&tree.path().join(".")), 0o755);
    drop(tree);
    s.commit("base", "base-active").unwrap();
    assert_eq!(mode(&Tree::of(&s.prepare("work", "base").unwrap()).path().join(".")), 0o755);
    assert_eq!(mode(&Tree::of(&s.view("view", "base").unwrap()).path().join(".")), 0o755);
}

pub fn directories_and_files_are_renamed(s: &Service) {
    s.layer("one", "", |dir| {
        fs::create_dir(dir.join("made")).unwrap();
        write(dir, "made/file", "1");
        write(dir, "plain", "2");
    });
    s.layer("two", "one", |dir| {
        fs::rename(dir.join("plain"), dir.join("renamed")).unwrap();
        // Where directories of lower layers cannot be renamed, mv(1) copies.
        match fs::rename(dir.join("made"), dir.join("moved")) {
            Err(e) if e.kind() == std::io::ErrorKind::CrossesDevices => {
                fs::create_dir(dir.join("moved")).unwrap();
                fs::rename(dir.join("made/file"), dir.join("moved/file")).unwrap();
                fs::remove_dir(dir.join("made")).unwrap();
            }
            renamed => renamed.unwrap(),
        }
    });
    let tree = Tree::of(&s.view("look", "two").unwrap());
    let all = files(tree.path());
    assert_eq!(all.keys().collect::<Vec<_>>(), ["/moved", "/moved/file", "/renamed"]);
    assert_eq!(all["/moved/file"], b"1");
}

pub fn each_of_128_layers_equals_a_flat_copy(s: &Service) {
    let mut flat = BTreeMap::new();
    let mut parent = String::new();
    for n in 0..128 {
        let name = format!("layer-{n}");
        let mounts = s.prepare(&format!("{name}-active"), &parent).unwrap();
        let tree = Tree::of(&mounts);
        assert_eq!(files(tree.path()), flat, "below layer {n}");
        for (file, text) in [(format!("own-{n}"), n.to_string()), (format!("shared-{}", n % 7), format!("by {n}"))] {
            write(tree.path(), &file, &text);
            flat.insert(format!("/{file}"), text.into_bytes());
        }
        if n % 5 == 4 {
            let gone = format!("own-{}", n - 2);
            fs::remove_file(tree.path().join(&gone)).unwrap();
            flat.remove(&format!("/{gone}"));
        }
        drop(tree);
        s.commit(&name, &format!("{name}-active")).unwrap();
        parent = name;
    }
    assert_eq!(files(Tree::of(&s.view("look", &parent).unwrap()).path()), flat);
}

/// containerd's own interface is closed twice; here the service is stopped, and its successor too.
pub fn stopped_twice_it_has_everything(s: Service) {
    let (dir, driver) = (s.root.parent().unwrap().to_owned(), s.driver.clone());
    s.layer("base", "", |dir| write(dir, "file", "text"));
    s.prepare("work", "base").unwrap();
    assert!(s.stop().success());
    assert!(!dir.join("socket").exists());
    assert!(Service::start(&dir, &driver).stop().success());
    let s = Service::start(&dir, &driver);
    assert_eq!(s.names(&[]), ["base", "work"]);
    assert_eq!(read(Tree::of(&s.mounts("work").unwrap()).path(), "file"), "text");
}

/// Everything that removes, and the opening that removes what nobody refers to.
pub fn the_command_line_sees_it_and_removes_nothing(s: &Service) {
    s.layer("base", "", |dir| fs::write(dir.join("file"), vec![1; 100_000]).unwrap());
    let mounts = s.prepare("work", "base").unwrap();
    s.command(&["image", "prune", "-a"]);
    for command in [&["rm", "-f", "work"][..], &["rmi", "-f", "base"]] {
        let out = graphdriver(&s.root, &s.driver).args(command).output().unwrap();
        assert_eq!(out.status.code(), Some(3), "{command:?}");
        let said = String::from_utf8(out.stderr).unwrap();
        assert!(said.contains("containerd's: use ctr"), "{command:?}: {said}");
    }
    let df = s.command(&["df", "-v"]);
    assert!(df.contains("SNAPSHOT") && df.contains("base") && df.contains("work"), "{df}");
    let total: serde_json::Value = serde_json::from_str(&s.command(&["--format", "json", "df"])).unwrap();
    let snapshots = &total[2];
    assert_eq!((&snapshots["Type"], &snapshots["TotalCount"]), (&"Snapshots".into(), &2.into()));
    assert!(snapshots["Size"].as_u64() > Some(100_000) && snapshots["Reclaimable"] == 0, "{total}");
    assert!(s.command(&["info"]).contains("Snapshots: 2"));
    let inspected = s.command(&["inspect", "--type", "snapshot", "work"]);
    assert!(inspected.contains("\"Parent\": \"base\""), "{inspected}");
    assert!(s.command(&["check", "--digests"]).contains("snapshots 2, mounts 0"));
    mounted_as_containerd_does(s, &mounts);
    assert_eq!(s.names(&[]), ["base", "work"]);
    assert_eq!(s.stored().len(), 2);
}

fn mounted_as_containerd_does(s: &Service, mounts: &[graphdriver_containerd_api::types::Mount]) {
    let target = s.root.with_file_name("target");
    fs::create_dir(&target).unwrap();
    let target = target.to_str().unwrap();
    let (fstype, source, options) = (&mounts[0].r#type, &mounts[0].source, mounts[0].options.join(","));
    match fstype.strip_prefix("fuse3.") {
        Some(program) => crate::system("mount.fuse3", &[source, target, "-o", &options, "-t", program]),
        None => crate::system("mount", &["-t", fstype, source, target, "-o", &options]),
    }
    let mounted = || -> Vec<bool> {
        let df: serde_json::Value = serde_json::from_str(&s.command(&["--format", "json", "df", "-v"])).unwrap();
        let all = df["Snapshots"].as_array().unwrap();
        all.iter().filter(|one| one["Name"] == "work").map(|one| one["Mounted"].as_bool().unwrap()).collect()
    };
    let listed: serde_json::Value = serde_json::from_str(&s.command(&["--format", "json", "mounts"])).unwrap();
    let [one] = listed.as_array().unwrap().as_slice() else { panic!("{listed}") };
    let told = (&one["Type"], &one["Name"], &one["Target"], &one["Writable"]);
    assert_eq!(told, (&"snapshot".into(), &"work".into(), &target.into(), &true.into()), "{listed}");
    assert_eq!(mounted(), [true]);
    assert!(s.command(&["mounts"]).lines().any(|line| line.contains(target) && line.trim_end().ends_with(" -")));
    assert!(s.command(&["check"]).contains("snapshots 2, mounts 1"));
    let out = graphdriver(&s.root, &s.driver).args(["umount", target]).output().unwrap();
    let said = String::from_utf8(out.stderr).unwrap();
    assert!(out.status.code() == Some(5) && said.contains("containerd mounted"), "{said}");
    crate::system("umount", &[target]);
    assert!(!Path::new(target).join("file").exists());
    assert_eq!(mounted(), [false]);
}

pub fn a_size_limits_what_is_written(s: &Service) {
    const MIB: u64 = 1 << 20;
    // A device is never smaller than the one it is a snapshot of.
    let (limit, within, beyond, larger) = match s.driver.as_str() {
        "devicemapper" => (96 * MIB, 8 * MIB, 112 * MIB, 256 * MIB),
        _ => (8 * MIB, MIB, 16 * MIB, 64 * MIB),
    };
    // Root may pass by the project quotas of ext4 (CAP_SYS_RESOURCE).
    let fill = |key: &str, bytes: u64| {
        let tree = Tree::of(&s.mounts(key).unwrap());
        let file = seen_by_others(&tree.path().join("file"));
        let script = format!("exec dd if=/dev/urandom bs=65536 count={} conv=fsync status=none of=$0", bytes / 65536);
        let mut command = Command::new("setpriv");
        command.args(["--bounding-set", "-sys_resource", "--inh-caps", "-sys_resource", "sh", "-c", &script]);
        let out = command.arg(file).output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        if out.status.success() { Ok(()) } else { Err(said) }
    };
    let labelled = labels(&[("containerd.io/snapshot/max-size", &limit.to_string())]);
    s.prepare_with("key", "", labelled).unwrap();
    fill("key", within).unwrap();
    let said = fill("key", beyond).unwrap_err();
    assert!(said.contains("Disk quota exceeded") || said.contains("No space left"), "{said}");
    let mut info = s.stat("key").unwrap();
    info.labels = labels(&[("graphdriver.io/size", &format!("{}M", larger / MIB))]);
    s.update(info, &[]).unwrap();
    fill("key", beyond).unwrap();
    s.commit("done", "key").unwrap();
    s.remove("done").unwrap();
    s.cleanup().unwrap();
    assert_eq!(s.stored(), [0; 0]);
}
