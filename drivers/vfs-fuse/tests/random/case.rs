//! One sequence of operations on a union and on a plain directory, from the layers to the last comparison.

use super::{
    aim::{Names, aim},
    common::{Layers, Mounted, program},
    known::{self, Loose},
    op::{Op, SLOTS, Step},
    side::{self, Side, Value},
    stack::{self, Stack},
    tree::{self, Alike, Tree},
};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use rustix::{
    fs::{AtFlags, Gid, Mode, OFlags, Timespec, Timestamps, Uid},
    io::{Errno, Result as Io},
    time::{ClockId, clock_gettime},
};
use std::{
    collections::HashMap,
    fmt,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::Command,
    sync::mpsc,
    thread,
    time::Duration,
};

type Outcome<T = ()> = std::result::Result<T, String>;

/// Who shows the layers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Subject {
    /// The program under test.
    Program,
    /// The kernel's overlay: a check of the model, and a second opinion.
    Kernel,
}

impl Subject {
    pub fn mount(self, layers: &Layers, options: &[&str]) -> Mounted {
        match self {
            Subject::Program => layers.mount(options),
            Subject::Kernel => layers.mount_kernel(&["redirect_dir=on", "index=on", "metacopy=off"]),
        }
    }
}

/// What is done.
#[derive(Clone, Debug)]
pub struct Case {
    pub stack: Stack,
    /// After each the upper layer becomes the topmost lower one.
    pub stages: Vec<Vec<Step>>,
}

/// The layers that are not always the same; what was done on them the failure tells.
pub fn describe(stack: &Stack) -> String {
    let above = stack.len() - 1;
    let mut text = format!("{above} layers above the one of stack::bottom(), topmost first:\n");
    for layer in &stack[..above] {
        text += "- layer\n";
        layer.iter().for_each(|piece| text += &format!("    {}\n", legible(piece)));
    }
    text
}

fn legible(what: impl fmt::Debug) -> String {
    format!("{what:?}").replace(&"n".repeat(255), "<n, 255 times>").replace(&"x".repeat(3000), "<x, 3000 times>")
}

/// Runs it on layers below `base`.
pub fn run(case: &Case, subject: Subject, base: &Path, options: &[&str]) -> Outcome {
    let mut layers = Layers::on(base, case.stack.len());
    layers.lowers.iter().zip(&case.stack).for_each(|(layer, pieces)| stack::build(layer, pieces));
    without_stray_whiteouts(&layers);
    for (nth, steps) in case.stages.iter().enumerate() {
        let staged = stage(&layers, nth, steps, subject, options);
        staged.map_err(|what| format!("in stage {nth}: {what}"))?;
        next_stage(&mut layers, nth);
    }
    Ok(())
}

/// The upper layer is committed: a new one is put upon it.
fn next_stage(layers: &mut Layers, nth: usize) {
    let make = |name: &str| {
        let path = layers.dir().join(format!("{name}{nth}"));
        std::fs::create_dir(&path).unwrap();
        path
    };
    let (upper, work) = (make("upper"), make("work"));
    layers.work = work;
    let committed = std::mem::replace(&mut layers.upper, upper);
    layers.lowers.insert(0, committed);
}

/// What the comparison starts with.
pub struct Start {
    /// The plain directory.
    pub plain: PathBuf,
    pub loose: Loose,
    /// No time that was there before is later.
    pub since: (i64, i64),
}

/// Makes the plain directory and the upper layer's root.
pub fn prepare(layers: &Layers, nth: usize) -> Outcome<Start> {
    let (plain, loose) = flatten(layers, nth)?;
    dress(&plain, &layers.upper);
    Ok(Start { plain, loose, since: now() })
}

fn stage(layers: &Layers, nth: usize, steps: &[Step], subject: Subject, options: &[&str]) -> Outcome {
    let start = prepare(layers, nth)?;
    let mounted = subject.mount(layers, options);
    let watchdog = Watchdog::new(&mounted, subject);
    let log;
    let shown = {
        let mut twins = Twins::new(&start.plain, mounted.path(), subject, start.loose, start.since)?;
        let done = steps.iter().enumerate().try_for_each(|(nth, step)| twins.aimed_step(nth, step));
        let compared = done.and_then(|()| twins.compare().map_err(|what| format!("after all steps:\n{what}")));
        log = twins.log();
        compared.map_err(|what| format!("{log}{what}"))?
    };
    mounted.unmount();
    drop(watchdog);
    check_again(layers, nth, subject, options, &shown).map_err(|what| format!("{log}{what}"))
}

/// Mounted again, and by the kernel, it must look the same.
pub fn check_again(layers: &Layers, nth: usize, subject: Subject, options: &[&str], shown: &Tree) -> Outcome {
    let mounted = subject.mount(layers, options);
    let watchdog = Watchdog::new(&mounted, subject);
    let again = read(mounted.path(), subject).map_err(|what| format!("mounted again: {what}"))?;
    let counted = options.contains(&"copy_up=extent");
    compare_views(shown, &again, Alike::Same { counted }, "mounted again")?;
    mounted.unmount();
    drop(watchdog);
    if subject == Subject::Kernel || shown.keys().any(|path| known::is_shared_by_threads(path)) {
        // Linked lower files are whole only together with the kernel's index.
        return Ok(());
    }
    complete(layers)?;
    let kernel = "as the kernel's overlay shows it";
    let seen = tree::read_without_listed_inodes(mount_by_kernel(layers, nth)?.path())
        .map_err(|what| format!("{kernel}: {what}"))?;
    compare_views(shown, &seen, Alike::Views, kernel)
}

/// Reads what is mounted.
pub fn read(root: &Path, subject: Subject) -> Outcome<Tree> {
    match known::lists_other_inodes(subject) {
        true => tree::read_without_listed_inodes(root),
        false => tree::read(root),
    }
}

fn compare_views(shown: &Tree, seen: &Tree, alike: Alike, how: &str) -> Outcome {
    tree::compare(shown, seen, alike, &Loose::new()).map_err(|what| format!("{how}:\n{what}"))
}

/// With a work directory of its own, so that it starts from what the layers say.
fn mount_by_kernel(layers: &Layers, nth: usize) -> Outcome<Mounted> {
    let work = layers.dir().join(format!("kernel-work{nth}"));
    std::fs::create_dir(&work).unwrap();
    let (lower, upper) = (layers.read_only_options(&[]), layers.upper.display());
    let options = format!("{lower},upperdir={upper},workdir={},redirect_dir=on,index=off,metacopy=off", work.display());
    layers.try_mount_kernel(&options).map_err(|e| format!("the kernel's overlay does not mount the layers: {e}"))
}

/// Makes the upper layer plain.
fn complete(layers: &Layers) -> Outcome {
    if !super::common::is_own_program() {
        return Ok(());
    }
    let done = Command::new(program()).args(["--complete", "-o", &layers.options(&[])]).output().unwrap();
    match done.status.success() {
        true => Ok(()),
        false => Err(format!("--complete: {}: {}", done.status, String::from_utf8_lossy(&done.stderr))),
    }
}

/// The lower layers as the kernel's overlay shows them, while `look` looks.
fn view<T>(layers: &Layers, look: impl FnOnce(&Path) -> T) -> T {
    let view = layers.dir().join("view");
    std::fs::create_dir_all(&view).unwrap();
    let options = layers.read_only_options(&["redirect_dir=follow", "metacopy=off"]);
    mount(Some("overlay"), &view, Some("overlay"), MsFlags::MS_RDONLY, Some(options.as_str())).unwrap();
    let seen = look(&view);
    umount2(&view, MntFlags::MNT_DETACH).unwrap();
    seen
}

/// Removes whiteouts in directories that are merged with none below. Overlayfs never makes them, and lists them as names
/// that cannot be looked up.
pub fn without_stray_whiteouts(layers: &Layers) {
    fn strays(dir: &Path, found: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            match path.symlink_metadata() {
                Ok(metadata) if metadata.is_dir() => strays(&path, found),
                Ok(_) => {}
                Err(_) => found.push(path),
            }
        }
    }
    // One below another shows only when the other is gone.
    while let found = view(layers, |view| {
        let mut found = Vec::new();
        strays(view, &mut found);
        found.iter().map(|path| path.strip_prefix(view).unwrap().to_owned()).collect::<Vec<_>>()
    }) && !found.is_empty()
    {
        for path in found {
            let is_whiteout = |path: &PathBuf| {
                rustix::fs::lstat(path).is_ok_and(|stat| stat.st_mode & 0o170000 == 0o020000 && stat.st_rdev == 0)
            };
            let top = layers.lowers.iter().map(|layer| layer.join(&path)).find(is_whiteout).unwrap();
            std::fs::remove_file(&top).unwrap();
            stack::age(top.parent().unwrap(), &mut 0);
        }
    }
}

/// Copies what the kernel's overlay shows of the lower layers to a plain directory. Also returns the files whose link
/// counts differ even there.
fn flatten(layers: &Layers, nth: usize) -> Outcome<(PathBuf, Loose)> {
    let plain = layers.dir().join(format!("plain{nth}"));
    std::fs::create_dir(&plain).unwrap();
    let shown = view(layers, |view| {
        let copied = Command::new("cp").arg("-a").arg(view.join(".")).arg(&plain).output().unwrap();
        assert!(copied.status.success(), "cp -a: {}", String::from_utf8_lossy(&copied.stderr));
        tree::read(view)
    });
    let (shown, copy) = (shown?, tree::read(&plain)?);
    let differs = |path: &&PathBuf| shown.get(*path).is_none_or(|entry| entry.stat.nlink != copy[*path].stat.nlink);
    let loose: Loose = copy.keys().filter(differs).map(|path| copy[path].stat.ino).collect();
    tree::compare(&copy, &shown, Alike::Views, &loose).map_err(|what| format!("cp -a has not copied all:\n{what}"))?;
    Ok((plain, loose))
}

/// Gives the upper's root what the union's root has: an engine does so too, since the upper's counts.
fn dress(plain: &Path, upper: &Path) {
    for name in tree::xattr_names(plain).unwrap() {
        xattr::set(upper, &name, &xattr::get(plain, &name).unwrap().unwrap()).unwrap();
    }
    let stat = rustix::fs::stat(plain).unwrap();
    let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    rustix::fs::chownat(rustix::fs::CWD, upper, Some(uid), Some(gid), AtFlags::empty()).unwrap();
    rustix::fs::chmod(upper, Mode::from_raw_mode(stat.st_mode)).unwrap();
    let time = |tv_sec, tv_nsec| Timespec { tv_sec, tv_nsec };
    let last_modification = time(stat.st_mtime, stat.st_mtime_nsec as i64);
    let times = Timestamps { last_access: time(stat.st_atime, stat.st_atime_nsec as i64), last_modification };
    rustix::fs::utimensat(rustix::fs::CWD, upper, &times, AtFlags::empty()).unwrap();
}

/// The time that files made from now on have at the least.
pub fn now() -> (i64, i64) {
    let time = clock_gettime(ClockId::RealtimeCoarse);
    (time.tv_sec, time.tv_nsec)
}

/// Kills a daemon that hangs, so that the test fails instead of hanging with it.
pub struct Watchdog(Option<(mpsc::Sender<()>, thread::JoinHandle<()>)>);

impl Watchdog {
    const LIMIT: Duration = Duration::from_secs(90);

    pub fn new(mounted: &Mounted, subject: Subject) -> Watchdog {
        if subject == Subject::Kernel {
            return Watchdog(None);
        }
        let pid = nix::unistd::Pid::from_raw(mounted.pid());
        let (done, wait) = mpsc::channel();
        let watcher = thread::spawn(move || {
            if wait.recv_timeout(Self::LIMIT) == Err(mpsc::RecvTimeoutError::Timeout) {
                eprintln!("the daemon is killed: it was not done after {:?}", Self::LIMIT);
                let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
            }
        });
        Watchdog(Some((done, watcher)))
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        if let Some((done, watcher)) = self.0.take() {
            // It may have given up waiting.
            let _ = done.send(());
            watcher.join().unwrap();
        }
    }
}

/// The two trees, and which of their files are the same.
pub struct Twins {
    model: Side,
    union: Side,
    subject: Subject,
    loose: Loose,
    since: (i64, i64),
    /// What a file contained when it was opened read-only: a union may go on showing that after a copy-up.
    opened: [Option<Vec<u8>>; SLOTS],
    inodes: Inodes,
    done: Vec<Step>,
}

impl Twins {
    pub fn new(plain: &Path, union: &Path, subject: Subject, loose: Loose, since: (i64, i64)) -> Outcome<Twins> {
        let (model, union) = (Side::new(plain), Side::new(union));
        let inodes = Inodes::default();
        let mut twins =
            Twins { model, union, subject, loose, since, opened: Default::default(), inodes, done: Vec::new() };
        twins.compare().map_err(|what| format!("before the first step:\n{what}"))?;
        Ok(twins)
    }

    pub fn subject(&self) -> Subject {
        self.subject
    }

    /// Does the step where it is most likely to succeed.
    pub fn aimed_step(&mut self, nth: usize, step: &Step) -> Outcome {
        let step = aim(step, nth, &Names::of(&self.model.path), self.model.open_slots());
        self.done.push(step.clone());
        self.step(&step)
    }

    /// What was done, to be told when the last of it failed.
    pub fn log(&self) -> String {
        let lines = self.done.iter().enumerate().map(|(nth, step)| format!("  {nth}: {}\n", legible(step)));
        format!("after these steps:\n{}", lines.collect::<String>())
    }

    pub fn step(&mut self, step: &Step) -> Outcome {
        if known::leaves_out(self.subject, step) || self.is_about_old_data(&step.op) {
            return Ok(());
        }
        let before = self.content_to_seek_in(&step.op);
        let old = self.old_data(&step.op);
        let wanted = self.model.step(step);
        let found = self.union.step(step);
        self.remember(&step.op, &wanted);
        let same = match (&step.op, &wanted, &found) {
            (Op::Seek { data, offset, .. }, _, _) => sought(*data, *offset, &before, &found),
            // What is returned are faults. tmpfs has some of its own, so they are not compared.
            (Op::ReaddirWhile { .. }, Ok(_), Ok(Value::Names(found))) if found.is_empty() => Ok(()),
            (_, Ok(Value::Stat(wanted)), Ok(Value::Stat(found))) => {
                let loose = self.loose.contains(&wanted.ino) || known::counts_removed_name(self.subject, wanted);
                tree::stat_difference(wanted, found, self.since, loose).map_or(Ok(()), Err)
            }
            (Op::Pread { .. }, Ok(_), Ok(Value::Bytes(found))) if old.as_ref() == Some(found) => Ok(()),
            (_, Ok(Value::Bytes(wanted)), Ok(Value::Bytes(found))) => {
                tree::content_difference(wanted, found).map_or(Ok(()), Err)
            }
            (Op::ReaddirWhile { .. }, Ok(_), Ok(_)) => Err(format!("gave {}", brief(&found))),
            _ if wanted == found => Ok(()),
            _ if known::allows(self.subject, &step.op, &wanted, &found) => Ok(()),
            _ => Err(format!("gave {}, not {}", brief(&found), brief(&wanted))),
        };
        same?;
        step.op.paths().into_iter().try_for_each(|path| self.look(path))
    }

    /// A name must be the same on both sides.
    fn look(&mut self, path: &Path) -> Outcome {
        let (wanted, found) = (self.model.stat(path), self.union.stat(path));
        match (wanted, found) {
            (Ok(wanted), Ok(found)) => {
                let loose = self.loose.contains(&wanted.ino);
                let difference = tree::stat_difference(&wanted, &found, self.since, loose);
                difference.map_or(Ok(()), |what| Err(format!("afterwards {}: {what}", path.display())))?;
                self.inodes.same(&self.model.path.join(path), wanted.ino, found.ino)
            }
            (Err(wanted), Err(found)) if wanted == found => Ok(()),
            (wanted, found) => Err(format!("afterwards {} is {found:?}, not {wanted:?}", path.display())),
        }
    }

    /// Compares all and returns what the union shows.
    pub fn compare(&mut self) -> Outcome<Tree> {
        let (wanted, found) = (tree::read(&self.model.path)?, tree::read(&self.union.path)?);
        tree::compare(&wanted, &found, Alike::Twins { since: self.since }, &self.loose)?;
        for (path, entry) in &wanted {
            self.inodes.same(&self.model.path.join(path), entry.stat.ino, found[path].stat.ino)?;
        }
        Ok(found)
    }

    fn remember(&mut self, op: &Op, opened: &Io<Value>) {
        match op {
            Op::Open { slot, flags, .. } => {
                let reads_only = opened.is_ok() && !flags.intersects(OFlags::WRONLY | OFlags::RDWR);
                self.opened[*slot] = reads_only.then(|| self.model.content(*slot)).flatten();
            }
            Op::Close { slot } => self.opened[*slot] = None,
            _ => {}
        }
    }

    /// Whether the descriptor may show what the file contained when it was opened, and that is no longer so.
    fn is_old(&self, slot: usize) -> bool {
        self.opened[slot].as_ref().is_some_and(|then| self.model.content(slot).as_ref() != Some(then))
    }

    fn is_about_old_data(&self, op: &Op) -> bool {
        match op {
            Op::CopyRange { from, .. } => self.is_old(*from),
            Op::Seek { slot, .. } => self.is_old(*slot),
            _ => false,
        }
    }

    fn old_data(&self, op: &Op) -> Option<Vec<u8>> {
        let Op::Pread { slot, offset, len } = op else { return None };
        let then = self.opened[*slot].as_ref()?;
        let start = then.len().min(*offset as usize);
        Some(then[start..then.len().min(start + len)].to_vec())
    }

    fn content_to_seek_in(&self, op: &Op) -> Option<Vec<u8>> {
        let Op::Seek { slot, .. } = op else { return None };
        self.model.content(*slot)
    }
}

/// Where holes are is the filesystem's affair, but what is one must be zeros.
fn sought(data: bool, offset: u64, content: &Option<Vec<u8>>, found: &Io<Value>) -> Outcome {
    // What it means for anything but a regular file is not said anywhere.
    let Some(content) = content else { return Ok(()) };
    let (size, zeros) = (content.len() as u64, |to: u64| content[offset as usize..to as usize].iter().all(|b| *b == 0));
    let right = match found {
        Ok(Value::Number(at)) if data => *at >= offset && *at < size && zeros(*at),
        Ok(Value::Number(at)) => *at >= offset && *at <= size,
        Err(Errno::NXIO) => offset >= size || (data && zeros(size)),
        _ => false,
    };
    if right { Ok(()) } else { Err(format!("gave {}, of {size} bytes", brief(found))) }
}

fn brief(value: &Io<Value>) -> String {
    let text = format!("{value:?}");
    // Bytes are what is long, and they are shown in ASCII.
    if text.len() <= 300 { text } else { format!("{:.300}… ({} bytes)", text, text.len()) }
}

/// Which inode of the plain tree is which of the union.
#[derive(Default)]
struct Inodes {
    /// Held open, so that the number is not used again.
    known: HashMap<u64, (OwnedFd, u64)>,
    back: HashMap<u64, u64>,
}

impl Inodes {
    fn same(&mut self, plain: &Path, wanted: u64, found: u64) -> Outcome {
        if let Some((_, before)) = self.known.get(&wanted) {
            return match *before == found {
                true => Ok(()),
                false => Err(format!("the inode number of {} was {before} and is {found}", plain.display())),
            };
        }
        if let Some(other) = self.back.get(&found)
            && rustix::fs::fstat(&self.known[other].0).unwrap().st_nlink > 0
        {
            return Err(format!("{} has the inode number of another file that exists: {found}", plain.display()));
        }
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let held = rustix::fs::open(plain, flags, Mode::empty()).unwrap();
        self.known.insert(wanted, (held, found));
        self.back.insert(found, wanted);
        Ok(())
    }
}

impl Side {
    fn stat(&self, path: &Path) -> Io<tree::Stat> {
        tree::stat(rustix::fs::CWD, &self.path.join(path))
    }

    /// Of a regular file.
    fn content(&self, slot: usize) -> Option<Vec<u8>> {
        let fd = self.slot(slot).ok()?;
        let regular = rustix::fs::fstat(fd).unwrap().st_mode & 0o170000 == 0o100000;
        regular.then(|| side::content(fd).unwrap())
    }
}

impl Op {
    /// The names it is about.
    fn paths(&self) -> Vec<&Path> {
        match self {
            Op::Link { from, to, .. } | Op::Rename { from, to, .. } => vec![from, to],
            Op::Mkdir { path, .. } | Op::Rmdir { path } | Op::Unlink { path } | Op::RemoveTree { path } => vec![path],
            Op::Symlink { path, .. } | Op::Mknod { path, .. } | Op::Write { path, .. } => vec![path],
            Op::Truncate { path, .. } | Op::Chmod { path, .. } | Op::Chown { path, .. } => vec![path],
            Op::Utimens { path, .. } | Op::SetXattr { path, .. } | Op::SetAcl { path, .. } => vec![path],
            Op::SetCapability { path } | Op::RemoveXattr { path, .. } | Op::Open { path, .. } => vec![path],
            _ => Vec::new(),
        }
    }
}
