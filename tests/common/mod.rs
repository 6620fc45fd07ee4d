//! What the tests of the command line share: a data root of their own, a tiny image, and a shell in which whatever a test
//! mounts is gone with the shell.

#![allow(dead_code, unused_imports)] // Each test binary uses its own part.

#[path = "../skip/mod.rs"]
mod skip;

pub use skip::{no_program, skipped, skipped_outside_guest, skipped_unless_asked};

use sha2::{Digest, Sha256};
use std::{
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};
use tar::{Builder, EntryType, Header};
use tempfile::TempDir;

/// The program under test.
pub const GRAPHDRIVER: &str = env!("CARGO_BIN_EXE_graphdriver");

/// Why tests that mount cannot run.
pub fn no_root() -> Option<String> {
    (!rustix::process::geteuid().is_root()).then(|| "needs root".into())
}

/// A directory with a data root and the tiny images, removed in the end.
pub struct Home {
    dir: TempDir,
}

impl Home {
    /// With `demo.tar`, `both.tar` and `rootfs.tar` in it.
    pub fn new() -> Home {
        let dir = TempDir::with_prefix("graphdriver-cli-").expect("a temporary directory");
        std::fs::write(dir.path().join("demo.tar"), archive(&[demo()])).unwrap();
        std::fs::write(dir.path().join("both.tar"), archive(&[demo(), other()])).unwrap();
        std::fs::write(dir.path().join("rootfs.tar"), base()).unwrap();
        Home { dir }
    }

    /// With the images of `demo.tar` loaded and a container `c`.
    pub fn with_container() -> Home {
        let home = Home::new();
        home.ok("graphdriver load -qi demo.tar; graphdriver create --name c demo");
        home
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    pub fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    /// A bash script in a mount namespace of its own: `graphdriver` is the program under test with this home's data root.
    pub fn shell(&self, script: &str) -> Command {
        let mut command = Command::new("unshare");
        let bin = Path::new(GRAPHDRIVER).parent().expect("it lies in a directory");
        let path = std::env::var("PATH").unwrap_or_default();
        command
            .args(["--mount", "--propagation", "private"])
            // Whatever ends the test ends the script too.
            .args(["setpriv", "--pdeathsig", "KILL", "bash", "-euo", "pipefail", "-c", script])
            .current_dir(self.path())
            .env_clear()
            .env("PATH", format!("{}:{path}", bin.display()))
            .env("HOME", self.path())
            .env("LC_ALL", "C.UTF-8")
            .env("TERM", "xterm")
            .env("GRAPHDRIVER_DATA_ROOT", self.root())
            .stdin(Stdio::null());
        command
    }

    pub fn run(&self, script: &str) -> Output {
        self.shell(script).output().expect("unshare runs")
    }

    /// What the script prints; it has to succeed without a word on standard error.
    #[track_caller]
    pub fn ok(&self, script: &str) -> String {
        let output = self.run(script);
        let (out, err) = texts(&output);
        assert!(output.status.success() && err.is_empty(), "{script}\n{out}\n{err}");
        out
    }

    /// What the script prints; it has to succeed, whatever it says on standard error.
    #[track_caller]
    pub fn ok_noisy(&self, script: &str) -> String {
        let output = self.run(script);
        let (out, err) = texts(&output);
        assert!(output.status.success(), "{script}\n{out}\n{err}");
        out
    }

    /// The script has to fail with this exit code and say all of this on standard error.
    #[track_caller]
    pub fn fails(&self, code: i32, script: &str, says: &[&str]) -> String {
        let output = self.run(script);
        let (out, err) = texts(&output);
        assert_eq!(output.status.code(), Some(code), "{script}\n{out}\n{err}");
        for part in says {
            assert!(err.contains(part), "{script}\nshould say {part:?}:\n{err}");
        }
        out
    }

    /// What `graphdriver --format json ARGUMENTS` prints.
    #[track_caller]
    pub fn json(&self, arguments: &str) -> serde_json::Value {
        let text = self.ok(&format!("graphdriver --format json {arguments}"));
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{arguments}: {e}\n{text}"))
    }
}

fn texts(output: &Output) -> (String, String) {
    (String::from_utf8_lossy(&output.stdout).into_owned(), String::from_utf8_lossy(&output.stderr).into_owned())
}

/// An image to be: its layers as tars, the step that made each, and its names.
pub struct Image {
    pub layers: Vec<Vec<u8>>,
    pub steps: Vec<&'static str>,
    pub names: Vec<&'static str>,
}

/// Two layers, of which the upper deletes a file of the lower, and a step without a layer.
pub fn demo() -> Image {
    let mut upper = Builder::new(Vec::new());
    file(&mut upper, "etc/motd", b"hello\n", 0o644);
    file(&mut upper, "var/log/.wh.deleted", b"", 0o600);
    let layers = vec![base(), upper.into_inner().unwrap()];
    Image { layers, steps: vec!["ADD base", "COPY motd"], names: vec!["demo:1", "demo:latest"] }
}

/// Shares its base with [`demo`].
pub fn other() -> Image {
    let mut upper = Builder::new(Vec::new());
    special(&mut upper, "opt", EntryType::Directory, "", 0o755);
    file(&mut upper, "opt/other", &[b'o'; 20000], 0o644);
    let layers = vec![base(), upper.into_inner().unwrap()];
    Image { layers, steps: vec!["ADD base", "ADD other"], names: vec!["other:1"] }
}

fn base() -> Vec<u8> {
    let mut tar = Builder::new(Vec::new());
    for dir in ["bin", "etc", "var"] {
        special(&mut tar, dir, EntryType::Directory, "", 0o755);
    }
    // The layers above have files in there, but no entry for the directory.
    special(&mut tar, "var/log", EntryType::Directory, "", 0o750);
    file(&mut tar, "bin/sh", b"#!sh\n", 0o4755);
    special(&mut tar, "bin/bash", EntryType::Link, "bin/sh", 0o755);
    file(&mut tar, "etc/passwd", b"root:x:0:0\n", 0o644);
    special(&mut tar, "etc/absolute", EntryType::Symlink, "/etc/passwd", 0o777);
    file(&mut tar, "var/log/deleted", b"d", 0o600);
    file(&mut tar, "var/log/kept", &[b'k'; 5000], 0o640);
    tar.into_inner().unwrap()
}

fn header(kind: EntryType, size: usize, mode: u32) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_size(size as u64);
    header.set_mode(mode);
    header.set_mtime(1_600_000_000);
    header
}

pub fn file(tar: &mut Builder<Vec<u8>>, name: &str, content: &[u8], mode: u32) {
    tar.append_data(&mut header(EntryType::Regular, content.len(), mode), name, content).unwrap();
}

pub fn special(tar: &mut Builder<Vec<u8>>, name: &str, kind: EntryType, target: &str, mode: u32) {
    let mut header = header(kind, 0, mode);
    match target {
        "" => tar.append_data(&mut header, name, &b""[..]).unwrap(),
        target => tar.append_link(&mut header, name, target).unwrap(),
    }
}

pub fn sha256(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

/// A docker-archive, its layers uncompressed, each stored once.
pub fn archive(images: &[Image]) -> Vec<u8> {
    let mut tar = Builder::new(Vec::new());
    let mut written = std::collections::HashSet::new();
    let mut manifest = Vec::new();
    for image in images {
        let mut history: Vec<_> = image.steps.iter().map(|step| serde_json::json!({ "created_by": step })).collect();
        history.push(serde_json::json!({ "created_by": "CMD sh", "empty_layer": true }));
        let diff_ids: Vec<_> = image.layers.iter().map(|layer| format!("sha256:{}", sha256(layer))).collect();
        let config = serde_json::json!({
            "architecture": "amd64", "os": "linux", "created": "2024-01-02T03:04:05Z",
            "config": { "Cmd": ["/bin/sh"], "Env": ["PATH=/bin"] },
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
            "history": history,
        })
        .to_string();
        let config_name = format!("{}.json", sha256(config.as_bytes()));
        file(&mut tar, &config_name, config.as_bytes(), 0o644);
        let mut names = Vec::new();
        for layer in &image.layers {
            let name = format!("{}/layer.tar", sha256(layer));
            if written.insert(name.clone()) {
                file(&mut tar, &name, layer, 0o644);
            }
            names.push(name);
        }
        manifest.push(serde_json::json!({ "Config": config_name, "RepoTags": image.names, "Layers": names }));
    }
    file(&mut tar, "manifest.json", serde_json::Value::from(manifest).to_string().as_bytes(), 0o644);
    tar.into_inner().unwrap()
}
