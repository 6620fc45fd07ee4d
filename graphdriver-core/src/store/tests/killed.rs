//! Processes of their own that work in one store, and are killed at every point or at random, or fill its disk.

use super::*;
use std::{
    io::Write,
    process::{Child, Command},
    sync::atomic::{AtomicUsize, Ordering},
};

/// What a process of its own does for the tests below, as the variables say.
#[test]
#[ignore = "not a test: the other side of those that kill processes"]
fn child() {
    let dir = PathBuf::from(std::env::var_os("STORE_DIR").expect("started by another test"));
    let log = fs::OpenOptions::new().append(true).create(true).open(dir.join("log")).unwrap();
    let say = move |word: &str| (&log).write_all(format!("{word}\n").as_bytes()).unwrap();
    match std::env::var("STORE_DIE_AT").unwrap().as_str() {
        "never" => rounds(&dir.join("store"), say),
        "full disk" => {
            fill_the_disk(&dir);
            say("filled");
        }
        number => scenario(&dir.join("store"), say, number.parse().unwrap()),
    }
}

/// `die_at` is the number of a point of [`scenario`], or says what to do instead.
fn spawn(dir: &Path, die_at: impl ToString) -> Child {
    spawn_by(Command::new(std::env::current_exe().unwrap()), dir, die_at)
}

fn spawn_by(mut command: Command, dir: &Path, die_at: impl ToString) -> Child {
    command.args(["--exact", "store::tests::killed::child", "--ignored", "--nocapture"]);
    command.env("STORE_DIR", dir).env("STORE_DIE_AT", die_at.to_string());
    command.stdout(std::process::Stdio::null()).spawn().unwrap()
}

fn log_of(dir: &Path) -> Vec<String> {
    fs::read_to_string(dir.join("log")).unwrap_or_default().lines().map(str::to_owned).collect()
}

fn by_name(layers: &Layers, name: &str) -> LayerId {
    layers.list().unwrap().into_iter().find(|layer| layer.labels == labelled(name)).unwrap().id
}

/// Does one of everything, saying each point it comes to, and dies at one of them.
fn scenario(dir: &Path, say: impl Fn(&str) + Send + Sync + 'static, die_at: usize) {
    let passed = AtomicUsize::new(0);
    let point: Arc<dyn Fn(&str) + Send + Sync> = Arc::new(move |name| {
        say(name);
        if passed.fetch_add(1, Ordering::SeqCst) == die_at {
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL).unwrap();
        }
    });
    let in_driver = point.clone();
    let hook = move |step: &str| {
        in_driver(&format!("driver: {step}"));
        Ok(())
    };
    let layers = hooked(dir, Arc::new(hook));
    let (base, work, victim) = (by_name(&layers, "base"), by_name(&layers, "work"), by_name(&layers, "victim"));

    fs::write(layers.tmp_dir().unwrap().join("blob"), "x").unwrap();
    let new = layers.create(LayerKind::Active, Some(base), &LayerOptions::default()).unwrap();
    fs::create_dir_all(new.record_dir()).unwrap();
    point("filled");
    new.commit(&info("new")).unwrap();
    point("frozen");
    let kept = layers.store().write(|tx| {
        new.keep(tx, None)?;
        set_labels(tx, new.id(), &labelled("new"))?;
        point("keeping");
        Ok(())
    });
    kept.unwrap();
    point("kept");
    drop(new);

    let committed = layers.commit(work, &info("work"), |_| {
        point("committing");
        Ok(())
    });
    committed.unwrap();
    point("work committed");

    let removed = layers.store().write(|tx| {
        layers.remove_in(tx, victim)?;
        point("removing");
        Ok(())
    });
    removed.unwrap();
    point("victim removed");
    layers.sweep().unwrap();
    point("swept");
    drop(layers.create(LayerKind::View, Some(base), &LayerOptions::default()).unwrap());
    point("dropped");
}

#[test]
fn killed_at_any_point_it_leaves_nothing_behind_and_loses_nothing() {
    let mut die_at = 0;
    loop {
        let dir = tempfile::tempdir().unwrap();
        let store = dir.path().join("store");
        let layers = open(&store);
        let base = make(&layers, "base", None, true);
        make(&layers, "work", Some(base), false);
        make(&layers, "victim", Some(base), false);
        drop(layers);

        let finished = spawn(dir.path(), die_at).wait().unwrap().success();
        let log = log_of(dir.path());
        let came_to = |point: &str| log.iter().any(|line| line == point);
        assert_eq!(log.len(), die_at + usize::from(!finished), "{log:?}");

        let layers = open(&store);
        let mut expected = vec!["base", "work"];
        expected.extend((!came_to("victim removed")).then_some("victim"));
        expected.extend(came_to("kept").then_some("new"));
        assert_eq!(names(&layers), expected, "{log:?}");
        let kind = if came_to("work committed") { LayerKind::Committed } else { LayerKind::Active };
        assert_eq!(layers.get(by_name(&layers, "work")).unwrap().kind, kind, "{log:?}");
        assert_clean(&layers);
        assert_eq!(layers.recover().unwrap(), Recovered::default());
        if kind == LayerKind::Active {
            layers.mount(by_name(&layers, "work"), Access::ReadWrite).unwrap();
            layers.commit(by_name(&layers, "work"), &info("work"), |_| Ok(())).unwrap();
        }
        drop(layers);
        assert!(names_in(&store.join("run")).is_empty() && names_in(&store.join("tmp")).is_empty(), "{log:?}");
        if finished {
            break;
        }
        die_at += 1;
    }
    assert!(die_at > 20, "only {die_at} points");
}

/// Makes and removes layers on one that all processes share.
fn rounds(dir: &Path, say: impl Fn(&str)) {
    for round in 0..6 {
        let layers = open(dir);
        let base = by_name(&layers, "base");
        let name = format!("{}-{round}", std::process::id());
        let id = make(&layers, &name, Some(base), true);
        say(&format!("+{name}"));
        drop(layers.create(LayerKind::Active, Some(id), &LayerOptions::default()).unwrap());
        assert_eq!(kind_of(layers.store().write(|tx| layers.remove_in(tx, base))), K::Busy);
        if round % 2 == 0 {
            say(&format!("-{name}"));
            remove(&layers, id).unwrap();
        }
    }
}

#[test]
fn eight_processes_at_once_lose_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("store");
    make(&open(&store), "base", None, true);
    let children: Vec<Child> = (0..8).map(|_| spawn(dir.path(), "never")).collect();
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    let layers = open(&store);
    let (log, listed) = (log_of(dir.path()), names(&layers));
    let kept: BTreeSet<String> = kept_by(&log);
    assert_eq!(kept.len(), 8 * 3);
    assert_eq!(BTreeSet::from_iter(listed), kept.into_iter().chain(["base".to_owned()]).collect());
    assert_clean(&layers);
}

/// In a mount namespace of its own.
fn fill_the_disk(dir: &Path) {
    use rustix::mount::{MountFlags, mount};
    mount("tmpfs", dir, "tmpfs", MountFlags::empty(), c"size=1m").unwrap();
    let layers = open(dir);
    let base = make(&layers, "base", None, true);
    let new = layers.create(LayerKind::Active, Some(base), &LayerOptions::default()).unwrap();
    let mut file = File::create(dir.join("data").join(new.id().to_string()).join("big")).unwrap();
    while file.write_all(&[1; 4096]).is_ok() {}
    drop(file);
    // The write-ahead log is rewound at times; now it has to grow.
    let many: BTreeMap<String, String> = (0..999).map(|i| (i.to_string(), "x".repeat(99))).collect();
    let full = layers.store().write(|tx| new.keep(tx, None).and_then(|()| set_labels(tx, new.id(), &many)));
    assert_eq!(kind_of(full), K::OutOfSpace);
    drop(new);
    assert_eq!(names(&layers), ["base"]);
    assert_clean(&layers);
    make(&layers, "next", Some(base), true);
}

#[test]
fn a_layer_that_fills_the_disk_gives_the_space_back() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = Command::new("unshare");
    command.arg("--mount").arg(std::env::current_exe().unwrap());
    assert!(spawn_by(command, dir.path(), "full disk").wait().unwrap().success());
    assert_eq!(log_of(dir.path()), ["filled"], "libtest also succeeds if it has no test of the child's name");
}

/// What the processes said they made, and did not begin to remove.
fn kept_by(log: &[String]) -> BTreeSet<String> {
    let said = |sign| log.iter().filter_map(move |line| line.strip_prefix(sign).map(str::to_owned));
    let removed: BTreeSet<String> = said('-').collect();
    said('+').filter(|name| !removed.contains(name)).collect()
}

#[test]
fn killed_at_random_moments_among_others_they_lose_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("store");
    make(&open(&store), "base", None, true);
    let mut survivors = Vec::new();
    for delay in [3, 11, 23, 41, 60, 85, 110, 140] {
        let mut victims: Vec<Child> = (0..2).map(|_| spawn(dir.path(), "never")).collect();
        survivors.extend((delay % 2 == 0).then(|| spawn(dir.path(), "never")));
        for victim in &mut victims {
            thread::sleep(Duration::from_millis(delay));
            victim.kill().unwrap();
        }
        for victim in &mut victims {
            victim.wait().unwrap();
        }
    }
    for survivor in &mut survivors {
        assert!(survivor.wait().unwrap().success());
    }
    let layers = open(&store);
    let listed = BTreeSet::from_iter(names(&layers));
    let kept = kept_by(&log_of(dir.path()));
    assert!(kept.len() >= survivors.len() * 3, "{kept:?}");
    assert!(kept.is_subset(&listed), "{:?} are lost", kept.difference(&listed));
    assert_clean(&layers);
}
