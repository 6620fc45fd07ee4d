//! What the robustness tests share: a private mount namespace for each, the real binary, small images, and a look at
//! the store from outside.

pub mod images;
#[path = "../skip/mod.rs"]
pub mod skip;
pub mod store;

use std::{
    fs,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

const BINARY: &str = env!("CARGO_BIN_EXE_graphdriver");
const INSIDE: &str = "ROBUSTNESS_TEST_DIR";

/// Runs `body` in a mount and a pid namespace of its own, with a directory that is gone afterwards: the test calls itself
/// through unshare(1), so that processes, mounts and loop devices vanish with it, whatever happens. The pid namespace
/// also hides processes of the host that even root may not look at, and that might live in any mount namespace.
///
/// The directory is a tmpfs: every unmount of an overlay flushes the filesystem below it, and on the machine's disk that
/// would wait for whatever else runs there.
pub fn isolated(name: &str, limit: Duration, body: impl FnOnce(&Path)) {
    if let Some(dir) = std::env::var_os(INSIDE) {
        system("mount", &["-t", "tmpfs", "none", dir.to_str().unwrap()]);
        return body(Path::new(&dir));
    }
    if skip::skipped(name, can_mount().err()) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut unshare = Command::new("setpriv");
    unshare.args(["--pdeathsig", "KILL", "unshare"]);
    unshare.args(["--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc"]);
    unshare
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env(INSIDE, dir.path())
        .process_group(0);
    let log = dir.path().join("log");
    let out = fs::File::create(&log).unwrap();
    let mut group = Group(unshare.stdout(out.try_clone().unwrap()).stderr(out).spawn().unwrap());
    let deadline = Instant::now() + limit;
    let status = loop {
        match group.0.try_wait().unwrap() {
            Some(status) => break Some(status),
            None if Instant::now() > deadline => break None,
            None => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    let text = String::from_utf8_lossy(&fs::read(&log).unwrap()).into_owned();
    println!("{text}");
    match status {
        Some(status) => assert!(status.success() && text.contains("1 passed"), "{name} failed inside, see above"),
        None => panic!("{name} was not done after {limit:?}"),
    }
}

/// A child and all it started: no process outlives the test.
struct Group(Child);

impl Drop for Group {
    fn drop(&mut self) {
        let group = nix::unistd::Pid::from_raw(self.0.id() as i32);
        let _ = nix::sys::signal::killpg(group, nix::sys::signal::Signal::SIGKILL);
        let _ = self.0.wait();
    }
}

fn can_mount() -> Result<(), String> {
    if !nix::unistd::geteuid().is_root() {
        return Err("it mounts and must run as root".into());
    }
    let overlay = "d=$(mktemp -d) && mount -t tmpfs none $d && cd $d && mkdir l u w m && \
                   mount -t overlay -o lowerdir=l,upperdir=u,workdir=w none m; e=$?; cd /; umount -R $d; rmdir $d; exit $e";
    let tried = Command::new("unshare").args(["--mount", "--propagation", "private", "sh", "-c", overlay]).output();
    match tried {
        Ok(out) if out.status.success() => Ok(()),
        Ok(out) => Err(format!("overlay cannot be mounted: {}", String::from_utf8_lossy(&out.stderr).trim())),
        Err(e) => Err(format!("unshare cannot be run: {e}")),
    }
}

/// The command line on one data root.
#[derive(Clone)]
pub struct Gd {
    /// Scratch space of the test.
    pub dir: PathBuf,
    pub root: PathBuf,
}

impl Gd {
    pub fn new(dir: &Path, root: &Path) -> Gd {
        fs::write(dir.join("config.json"), "{}").unwrap();
        Gd { dir: dir.into(), root: root.into() }
    }

    fn environment(&self, mut command: Command) -> Command {
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap());
        command.env("GRAPHDRIVER_CONFIG", self.dir.join("config.json")).env("TMPDIR", &self.dir);
        command
    }

    fn arguments(&self, command: &mut Command, args: &[&str]) {
        command.arg("--root").arg(&self.root).args(["--storage-driver", "overlay2"]).args(args);
    }

    /// The bare process, to be signalled.
    pub fn spawn(&self, args: &[&str]) -> Child {
        let mut command = self.environment(Command::new(BINARY));
        self.arguments(&mut command, args);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// Runs a command; one that hangs is killed after two minutes and fails the test.
    pub fn run(&self, args: &[&str]) -> Output {
        let mut command = self.environment(Command::new("timeout"));
        command.args(["-s", "KILL", "120", BINARY]);
        self.arguments(&mut command, args);
        let out = command.stdin(Stdio::null()).output().unwrap();
        assert!(out.status.code().is_some_and(|code| code != 137 && code != 124), "{args:?} hangs: {}", errors(&out));
        out
    }

    /// Runs a shell script in which `$GD` is the command line.
    pub fn shell(&self, script: &str) -> Output {
        let mut command = self.environment(Command::new("timeout"));
        command.args(["-s", "KILL", "120", "sh", "-ec", script]);
        let gd = format!("{BINARY} --root {} --storage-driver overlay2", self.root.display());
        command.env("GD", gd).current_dir(&self.dir).stdin(Stdio::null()).output().unwrap()
    }

    /// Standard output of a command that must succeed.
    pub fn ok(&self, args: &[&str]) -> String {
        let out = self.run(args);
        assert!(out.status.success(), "{args:?} ends with {:?}: {}", out.status.code(), errors(&out));
        String::from_utf8(out.stdout).unwrap()
    }

    /// Standard error of a command that must fail with this exit code.
    pub fn fails(&self, args: &[&str], code: i32) -> String {
        let out = self.run(args);
        assert_eq!(out.status.code(), Some(code), "{args:?}: {}", errors(&out));
        errors(&out)
    }

    /// Must succeed, or find that what was named is not there.
    pub fn if_there(&self, args: &[&str]) {
        let out = self.run(args);
        let code = out.status.code();
        assert!(matches!(code, Some(0 | 3)), "{args:?} ends with {code:?}: {}", errors(&out));
    }

    /// A path in the scratch space, as an argument.
    pub fn path(&self, name: &str) -> String {
        self.dir.join(name).to_str().unwrap().into()
    }

    /// An empty directory in the scratch space.
    pub fn make_dir(&self, name: &str) -> String {
        fs::create_dir_all(self.dir.join(name)).unwrap();
        self.path(name)
    }

    /// A file in the scratch space.
    pub fn file(&self, name: &str, content: &[u8]) -> String {
        fs::write(self.dir.join(name), content).unwrap();
        self.path(name)
    }

    pub fn image_ids(&self) -> Vec<String> {
        self.ok(&["images", "-a", "-q", "--no-trunc"]).lines().map(str::to_owned).collect()
    }
}

pub fn errors(out: &Output) -> String {
    String::from_utf8_lossy(&out.stderr).into_owned()
}

/// Numbers that look random and are the same in every run (xorshift64*).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n
    }

    pub fn bytes(&mut self, n: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> =
            std::iter::repeat_with(|| self.next().to_le_bytes()).take(n / 8 + 1).flatten().collect();
        bytes.truncate(n);
        bytes
    }
}

/// Bytes free on the filesystem.
pub fn free_space(path: &Path) -> u64 {
    let stat = rustix::fs::statvfs(path).unwrap();
    stat.f_bavail * stat.f_frsize
}

/// A mount(8) or similar that must succeed.
pub fn system(program: &str, args: &[&str]) {
    let out = Command::new(program).args(args).output().unwrap();
    assert!(out.status.success(), "{program} {args:?}: {}", errors(&out));
}
