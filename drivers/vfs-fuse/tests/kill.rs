//! The daemon is killed at random moments while clients change files whose content is known. Mounted again, all is as if
//! the last change of each client had been made or not: names wholly, data for each unit of 4 KiB.

mod common;
mod disk;

use common::{Layers, cannot_mount, program, skipped};
use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions, Permissions},
    io,
    os::unix::fs::{FileExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

const UNIT: usize = 4096;

/// Numbers that look random (xorshift64*). A failure tells its seed.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 11) % n
    }

    fn bytes(&mut self, n: usize) -> Vec<u8> {
        let mut value = self.below(1 << 40);
        std::iter::repeat_with(|| {
            value = value.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (value >> 40) as u8 | 1
        })
        .take(n)
        .collect()
    }
}

/// What a file may hold: the sizes it may have, and for each unit the bytes it may be, padded with zeros. The last of each
/// is what it has if everything was done.
#[derive(Clone, Debug)]
struct Content {
    sizes: Vec<usize>,
    units: Vec<Vec<Vec<u8>>>,
    modes: Vec<u32>,
}

impl Content {
    fn new(bytes: &[u8], mode: u32) -> Content {
        let padded = |unit: &[u8]| [unit, &vec![0; UNIT - unit.len()]].concat();
        let units = bytes.chunks(UNIT).map(|unit| vec![padded(unit)]).collect();
        Content { sizes: vec![bytes.len()], units, modes: vec![mode] }
    }

    fn size(&self) -> usize {
        *self.sizes.last().unwrap()
    }

    fn write(&mut self, at: usize, bytes: &[u8]) {
        self.grow(at + bytes.len());
        for n in at / UNIT..(at + bytes.len()).div_ceil(UNIT) {
            let mut unit = self.units[n].last().unwrap().clone();
            let (from, to) = (at.max(n * UNIT), (at + bytes.len()).min((n + 1) * UNIT));
            unit[from - n * UNIT..to - n * UNIT].copy_from_slice(&bytes[from - at..to - at]);
            self.units[n].push(unit);
        }
        // SIGKILL ends a pwrite of the daemon's between two pages.
        let end = at + bytes.len();
        let cuts = (self.size() / UNIT + 1..).map(|n| n * UNIT).take_while(|cut| *cut > at && *cut < end);
        self.sizes.extend(cuts.collect::<Vec<_>>());
        self.sizes.push(self.size().max(end));
    }

    fn grow(&mut self, size: usize) {
        while self.units.len() * UNIT < size {
            self.units.push(vec![vec![0; UNIT]]);
        }
    }

    fn truncate(&mut self, size: usize) {
        self.grow(size);
        for (n, unit) in self.units.iter_mut().enumerate() {
            let keep = size.saturating_sub(n * UNIT).min(UNIT);
            let mut cut = unit.last().unwrap().clone();
            cut[keep..].fill(0);
            unit.push(cut);
        }
        self.sizes.push(size);
    }

    /// Only the last of each is possible any more.
    fn settle(&mut self) {
        self.sizes.drain(..self.sizes.len() - 1);
        self.modes.drain(..self.modes.len() - 1);
        self.units.iter_mut().for_each(|unit| drop(unit.drain(..unit.len() - 1)));
    }

    fn check(&self, found: &[u8], mode: u32) -> Result<(), String> {
        if !self.sizes.contains(&found.len()) {
            return Err(format!("has {} bytes and not one of {:?}", found.len(), self.sizes));
        }
        if !self.modes.contains(&mode) {
            return Err(format!("has mode {mode} and not one of {:?} (decimal)", self.modes));
        }
        for (n, unit) in found.chunks(UNIT).enumerate() {
            if !self.units[n].iter().any(|candidate| candidate[..unit.len()] == *unit) {
                let what = if unit.iter().all(|b| *b == 0) { "zeros" } else { "a mix" };
                return Err(format!("unit {n} is {what}, of {} possible values none", self.units[n].len()));
            }
        }
        Ok(())
    }
}

/// One client's directory: names, and what the files they are of may hold.
#[derive(Clone, Debug)]
struct Model {
    names: BTreeMap<PathBuf, usize>,
    dirs: Vec<PathBuf>,
    files: Vec<Content>,
}

/// One change, made to the real tree and to the model alike.
#[derive(Clone, Debug)]
enum Change {
    Write(PathBuf, usize, Vec<u8>),
    Truncate(PathBuf, usize),
    Chmod(PathBuf, u32),
    Rename(PathBuf, PathBuf),
    RenameDir(PathBuf, PathBuf),
    Unlink(PathBuf),
    Link(PathBuf, PathBuf),
    Create(PathBuf),
    Sync(PathBuf),
}

impl Change {
    /// A change that can be made to what the model says there is. `sizes`: those that change the size too.
    fn random(random: &mut Random, model: &Model, sizes: bool) -> Change {
        let all: Vec<_> = model.names.keys().collect();
        let name = all[random.below(all.len() as u64) as usize].clone();
        let size = model.files[model.names[&name]].size();
        let dir = &model.dirs[random.below(model.dirs.len() as u64) as usize];
        let fresh = dir.join(format!("n{}", random.below(30)));
        let at = random.below(size.max(1) as u64) as usize;
        match random.below(20) {
            0 if sizes => Change::Truncate(name, random.below(size as u64 * 5 / 4 + 5000) as usize),
            1 if sizes => Change::Write(name, size, random.bytes(3000)),
            0..=8 if size > 0 => {
                let most = if random.below(8) == 0 { 100_000 } else { 9000 };
                let length = (random.below(most) as usize + 1).min(size - at);
                Change::Write(name, at, random.bytes(length))
            }
            9 => Change::Chmod(name, 0o600 + random.below(0o200) as u32),
            10 | 11 if !all.contains(&&fresh) => Change::Create(fresh),
            12 if all.len() > 6 => Change::Unlink(name),
            13 if !all.contains(&&fresh) => Change::Link(name, fresh),
            14..=16 => Change::Rename(name, fresh),
            17 if model.dirs.len() > 1 => {
                let from = model.dirs[1 + random.below(model.dirs.len() as u64 - 1) as usize].clone();
                let to = PathBuf::from(format!("dir{}", random.below(1000)));
                if model.dirs.contains(&to) { Change::Sync(name) } else { Change::RenameDir(from, to) }
            }
            _ => Change::Sync(name),
        }
    }

    fn make(&self, root: &Path) -> io::Result<()> {
        let open = |path: &Path| OpenOptions::new().write(true).open(root.join(path));
        match self {
            Change::Write(path, at, bytes) => open(path)?.write_all_at(bytes, *at as u64),
            Change::Truncate(path, size) => open(path)?.set_len(*size as u64),
            Change::Chmod(path, mode) => fs::set_permissions(root.join(path), Permissions::from_mode(*mode)),
            Change::Rename(from, to) | Change::RenameDir(from, to) => fs::rename(root.join(from), root.join(to)),
            Change::Unlink(path) => fs::remove_file(root.join(path)),
            Change::Link(path, new) => fs::hard_link(root.join(path), root.join(new)),
            Change::Create(path) => File::create_new(root.join(path)).map(drop),
            Change::Sync(path) => open(path)?.sync_all(),
        }
    }

    fn apply(&self, model: &mut Model) {
        let Model { names, files, dirs } = model;
        match self {
            Change::Write(path, at, bytes) => files[names[path]].write(*at, bytes),
            Change::Truncate(path, size) => files[names[path]].truncate(*size),
            Change::Chmod(path, mode) => files[names[path]].modes.push(*mode),
            // Two names of one file: nothing happens.
            Change::Rename(from, to) if names.get(to) == Some(&names[from]) => {}
            Change::Rename(from, to) => {
                let file = names.remove(from).unwrap();
                names.insert(to.clone(), file);
            }
            Change::RenameDir(from, to) => {
                let moved = |path: &Path| path.strip_prefix(from).map_or(path.to_owned(), |rest| to.join(rest));
                *names = names.iter().map(|(path, file)| (moved(path), *file)).collect();
                dirs.iter_mut().filter(|dir| *dir == from).for_each(|dir| *dir = to.clone());
            }
            Change::Unlink(path) => drop(names.remove(path)),
            Change::Link(path, new) => drop(names.insert(new.clone(), names[path])),
            Change::Create(path) => {
                names.insert(path.clone(), files.len());
                files.push(Content::new(b"", 0o644));
            }
            Change::Sync(_) => {}
        }
    }

    fn changes_names(&self) -> bool {
        use Change::*;
        matches!(self, Rename(..) | RenameDir(..) | Unlink(..) | Link(..) | Create(..))
    }
}

impl Model {
    /// Files in the bottom layer: large and small ones, several names of one, a directory that the middle layer has too.
    fn make(lowers: &[PathBuf], client: &str, random: &mut Random) -> Model {
        let mut model = Model { names: BTreeMap::new(), dirs: vec![PathBuf::new(), "sub".into()], files: Vec::new() };
        lowers.iter().for_each(|lower| fs::create_dir_all(lower.join(client).join("sub")).unwrap());
        let bottom = lowers.last().unwrap().join(client);
        for (name, size) in
            [("large", 1 << 20), ("sub/large", 700_001), ("small", 100), ("sub/medium", 50_000), ("linked", 300_000)]
        {
            let bytes = random.bytes(size);
            // In the upper half of the names in the middle layer, above another one.
            fs::write(bottom.join(name), &bytes).unwrap();
            if name == "sub/medium" {
                fs::write(bottom.join(name), "hidden").unwrap();
                fs::write(lowers[0].join(client).join(name), &bytes).unwrap();
            }
            let layer = if name == "sub/medium" { lowers[0].join(client) } else { bottom.clone() };
            fs::set_permissions(layer.join(name), Permissions::from_mode(0o644)).unwrap();
            model.names.insert(name.into(), model.files.len());
            model.files.push(Content::new(&bytes, 0o644));
        }
        for link in ["linked2", "sub/linked3"] {
            fs::hard_link(bottom.join("linked"), bottom.join(link)).unwrap();
            model.names.insert(link.into(), model.names[Path::new("linked")]);
        }
        model
    }

    /// Changes until the daemon is gone, `most` of them at most. Returns the last one, which may have been made or not.
    fn run(&mut self, root: &Path, random: &mut Random, mode: Mode, killed: &AtomicBool, most: usize) -> Change {
        for _ in 1..most {
            let change = Change::random(random, self, mode.is_strict);
            let before = self.clone();
            change.apply(self);
            if let Err(e) = change.make(root) {
                // Before this change was made nothing was wrong.
                assert!(killed.load(Ordering::SeqCst), "{change:?} fails without a kill: {e}");
                if change.changes_names() {
                    *self = before;
                }
                return change;
            }
            if mode.is_strict {
                self.files.iter_mut().for_each(Content::settle);
            } else if let Change::Sync(path) = &change {
                let file = self.names[path];
                self.files[file].settle();
            }
        }
        Change::Sync(PathBuf::new())
    }

    /// What is there against what may be; `last` may have been made or not. Afterwards the model says what is there.
    fn check(&mut self, root: &Path, last: &Change) -> Result<(), String> {
        let mut found = BTreeMap::new();
        let mut dirs = vec![PathBuf::new()];
        for path in disk::paths(root) {
            let meta = fs::symlink_metadata(&path).map_err(|e| format!("{}: {e}", path.display()))?;
            let name = path.strip_prefix(root).unwrap().to_owned();
            if meta.is_file() {
                found.insert(name, meta);
            } else {
                dirs.push(name);
            }
        }
        if last.changes_names() && !found.keys().eq(self.names.keys()) {
            last.apply(self);
        }
        if !found.keys().eq(self.names.keys()) {
            return Err(format!(
                "names are {:?} and not {:?}, the last change was {last:?}",
                found.keys(),
                self.names.keys()
            ));
        }
        self.dirs = dirs;
        let mut inodes: BTreeMap<usize, u64> = BTreeMap::new();
        for (path, meta) in &found {
            let file = self.names[path];
            if *inodes.entry(file).or_insert(meta.ino()) != meta.ino() {
                return Err(format!("{path:?} is no longer one file with its other names"));
            }
            let bytes = fs::read(root.join(path)).map_err(|e| format!("{path:?}: {e}"))?;
            self.files[file].check(&bytes, meta.mode() & 0o7777).map_err(|e| format!("{path:?} {e}"))?;
        }
        let numbers: std::collections::BTreeSet<_> = inodes.values().collect();
        if numbers.len() != inodes.len() {
            return Err(format!("different files have one inode number: {inodes:?}"));
        }
        for (path, meta) in &found {
            let bytes = fs::read(root.join(path)).unwrap();
            self.files[self.names[path]] = Content::new(&bytes, meta.mode() & 0o7777);
        }
        Ok(())
    }
}

/// How the daemon runs.
#[derive(Clone, Copy)]
struct Mode {
    options: &'static [&'static str],
    /// What a write call has returned from is with the daemon, and not in the kernel's cache for a while.
    is_strict: bool,
}

const CLIENTS: usize = 3;

fn killed_again_and_again(mode: Mode, rounds: usize) {
    let seed = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64 | 1;
    let mut random = Random(seed);
    let (mut done, started) = (0, Instant::now());
    while done < rounds {
        let layers = Layers::new(2);
        let names: Vec<_> = (0..CLIENTS).map(|n| format!("client{n}")).collect();
        let mut models: Vec<_> = names.iter().map(|name| Model::make(&layers.lowers, name, &mut random)).collect();
        // A few on the same layers, so that what one kill has left meets the next.
        for _ in 0..5.min(rounds - done) {
            round(&layers, mode, &names, &mut models, &mut random)
                .unwrap_or_else(|e| panic!("{:?}, round {done}, seed {seed}: {e}", mode.options));
            done += 1;
        }
    }
    eprintln!("{:?}: {rounds} rounds in {:?}", mode.options, started.elapsed());
}

fn round(
    layers: &Layers,
    mode: Mode,
    names: &[String],
    models: &mut [Model],
    random: &mut Random,
) -> Result<(), String> {
    let mut mounted = layers.mount(mode.options);
    let killed = AtomicBool::new(false);
    let seeds: Vec<u64> = names.iter().map(|_| random.below(1 << 50) | 1).collect();
    // Most kills come early, when files are copied up for the first time.
    let longest = [3_000, 15_000, 60_000, 200_000][random.below(4) as usize];
    let delay = Duration::from_micros(random.below(longest));
    let root = mounted.path().to_owned();
    let last: Vec<Change> = thread::scope(|scope| {
        let clients: Vec<_> = (names.iter().zip(models.iter_mut()).zip(seeds))
            .map(|((name, model), seed)| {
                let (root, killed) = (root.join(name), &killed);
                scope.spawn(move || model.run(&root, &mut Random(seed), mode, killed, usize::MAX))
            })
            .collect();
        thread::sleep(delay);
        killed.store(true, Ordering::SeqCst);
        mounted.kill();
        clients.into_iter().map(|client| client.join().unwrap()).collect()
    });
    drop(mounted);
    let mounted = layers.mount(mode.options);
    for ((name, model), last) in names.iter().zip(models).zip(&last) {
        model
            .check(&mounted.path().join(name), last)
            .map_err(|e| format!("{name}: {e}\n(last change: {})", brief(last)))?;
    }
    let leftover: Vec<_> = disk::paths(&layers.work)
        .into_iter()
        .filter(|p| fs::symlink_metadata(p).is_ok_and(|m| m.is_file() && m.len() > 0))
        .collect();
    if !leftover.is_empty() {
        return Err(format!("left in the work directory: {leftover:?}"));
    }
    mounted.unmount();
    Ok(())
}

/// Without the bytes written.
fn brief(change: &Change) -> String {
    format!("{change:?}").chars().take(200).collect()
}

/// The model is what the kernel's overlay does where nothing is killed, so what differs from it is a fault.
#[test]
fn the_model_is_right_and_sees_what_is_wrong() {
    if skipped("the_model_is_right_and_sees_what_is_wrong", cannot_mount()) {
        return;
    }
    let mut random = Random(0x9E37_79B9_7F4A_7C15);
    let layers = Layers::new(2);
    let mut model = Model::make(&layers.lowers, "client", &mut random);
    let mount = || layers.mount_kernel(&["index=on", "redirect_dir=on", "metacopy=off"]);
    let mode = Mode { options: &[], is_strict: true };
    let mounted = mount();
    let last = model.run(&mounted.path().join("client"), &mut random, mode, &AtomicBool::new(false), 400);
    mounted.unmount();
    let mounted = mount();
    let root = mounted.path().join("client");
    model.check(&root, &last).unwrap();

    let large = model.names.iter().find(|(_, file)| model.files[**file].size() > 3 * UNIT).unwrap().0.clone();
    let good = fs::read(root.join(&large)).unwrap();
    type Damage = fn(&mut Vec<u8>);
    let damage: [Damage; 4] = [
        |bytes| bytes[UNIT..2 * UNIT].fill(0),
        |bytes| bytes[UNIT + 7] ^= 1,
        |bytes| bytes.truncate(bytes.len() - 1),
        |bytes| bytes.push(0),
    ];
    for (n, damage) in damage.iter().enumerate() {
        let mut bytes = good.clone();
        damage(&mut bytes);
        fs::write(root.join(&large), bytes).unwrap();
        model.clone().check(&root, &last).expect_err(&format!("damage {n} is not seen"));
    }
    fs::write(root.join(&large), &good).unwrap();
    model.clone().check(&root, &last).unwrap();
    fs::rename(root.join(&large), root.join("other")).unwrap();
    model.clone().check(&root, &last).expect_err("another name is not seen");
    model
        .clone()
        .check(&root, &Change::Rename(large.clone(), "other".into()))
        .expect("the last rename may have been made");
    fs::copy(root.join("other"), root.join(&large)).unwrap();
    model.clone().check(&root, &last).expect_err("both names of a rename are not seen");
}

macro_rules! killed {
    ($name:ident, $rounds:literal, $strict:literal, $($option:literal),*) => {
        #[test]
        fn $name() {
            if skipped(stringify!($name), cannot_mount()) {
                return;
            }
            killed_again_and_again(Mode { options: &[$($option),*], is_strict: $strict }, $rounds);
        }
    };
}

killed!(a_killed_daemon_leaves_all_or_nothing_with_copy_up_full, 15, true, "copy_up=full");
killed!(a_killed_daemon_leaves_all_or_nothing_with_copy_up_extent, 25, true, "copy_up=extent");
killed!(a_killed_daemon_leaves_all_or_nothing_with_copy_up_auto, 15, true, "copy_up=auto");
killed!(a_killed_daemon_leaves_all_or_nothing_while_it_completes, 10, true, "copy_up=extent", "complete=20M");
killed!(
    a_killed_daemon_leaves_all_or_nothing_without_passthrough,
    10,
    true,
    "copy_up=extent",
    "passthrough=0",
    "writeback=0"
);
killed!(what_was_synced_before_the_kill_is_there, 15, false, "copy_up=extent", "passthrough=0");

/// Completion is interrupted, again and again: what the mount shows is right at any time, and in the end all is plain.
#[test]
fn a_killed_completion_can_be_repeated() {
    if skipped("a_killed_completion_can_be_repeated", cannot_mount()) {
        return;
    }
    const SIZE: usize = 24 << 20;
    let mut random = Random(0x1234_5678_9abc_def1);
    let layers = Layers::new(1);
    let mut expected = BTreeMap::new();
    for n in 0..4 {
        let name = format!("f{n}");
        let bytes = random.bytes(SIZE);
        fs::write(layers.lowers[0].join(&name), &bytes).unwrap();
        expected.insert(name, bytes);
    }
    let mounted = layers.mount(&["copy_up=extent"]);
    for (name, bytes) in &mut expected {
        let file = OpenOptions::new().write(true).open(mounted.path().join(name)).unwrap();
        for _ in 0..20 {
            let (at, new) = (random.below(SIZE as u64 - 9000) as usize, random.bytes(5000));
            file.write_all_at(&new, at as u64).unwrap();
            bytes[at..at + new.len()].copy_from_slice(&new);
        }
    }
    mounted.unmount();
    let allocated =
        || -> u64 { expected.keys().map(|n| fs::metadata(layers.upper.join(n)).unwrap().blocks() * 512).sum() };
    assert!(allocated() < 4 * SIZE as u64 / 4, "not incomplete: {} bytes", allocated());
    let check = |mounted: common::Mounted, when: &str| {
        for (name, bytes) in &expected {
            assert!(fs::read(mounted.path().join(name)).unwrap() == *bytes, "{name} is wrong {when}");
        }
        mounted.unmount();
    };
    let complete = || {
        let mut command = Command::new(program());
        command.args(["--complete", "-o", &layers.options(&[])]).stdin(Stdio::null()).stdout(Stdio::null());
        command
    };
    let mut interrupted = 0;
    for n in 0..20 {
        let mut child = complete().spawn().unwrap();
        thread::sleep(Duration::from_millis(random.below(40)));
        interrupted += usize::from(child.try_wait().unwrap().is_none());
        let _ = child.kill();
        child.wait().unwrap();
        if n % 4 == 0 {
            check(layers.mount(&[]), &format!("after kill {n}"));
        }
    }
    assert!(interrupted > 0, "it was always done before it was killed");
    assert!(complete().status().unwrap().success());
    check(layers.mount(&[]), "in the end");
    check(layers.mount_kernel(&["metacopy=off", "redirect_dir=follow"]), "for the kernel");
}
