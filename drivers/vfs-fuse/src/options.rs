//! `-o …`: what fuse-overlayfs takes, what mount(8) and libfuse's programs take, and what is ours. README.md says what
//! each option does.

use crate::config::{Completion, Config, CopyUp, IdMap, IdRange, Squash, WakeLatency, XattrPermissions};
use graphdriver_core::{Error, ErrorKind, Result};
use rustix::thread::{CapabilitySet, capabilities};
use std::{
    ffi::{OsStr, OsString},
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::PathBuf,
    str::FromStr,
    time::Duration,
};

/// All that `-o` says.
#[derive(Debug, Clone, PartialEq)]
pub struct Parsed {
    /// What is mounted. Paths are as they were given: see [`Config::resolved`].
    pub config: Config,
    /// How it is mounted.
    pub mount: MountOptions,
    /// `-o debug`.
    pub debug: bool,
}

/// What the kernel is told at the mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountOptions {
    /// Nothing can be changed: `ro`, or no upperdir.
    pub read_only: bool,
    /// Every user may use the mount.
    pub allow_other: bool,
    /// Root may use it, besides its owner. Not together with `allow_other`.
    pub allow_root: bool,
    /// Device files work.
    pub dev: bool,
    /// Set-user-id and set-group-id work.
    pub suid: bool,
    /// Programs can be run.
    pub exec: bool,
    /// Reading does not change access times.
    pub noatime: bool,
    /// Writes are durable when they return.
    pub sync: bool,
    /// Changes of directories are durable when they return.
    pub dirsync: bool,
    /// fusermount3 unmounts when the daemon dies.
    pub auto_unmount: bool,
    /// If a daemon has the upper layer already, its filesystem is shown once more: [`crate::join`].
    pub join: bool,
    /// What is mounted, in `/proc/mounts`.
    pub fsname: String,
    /// What follows `fuse.` there.
    pub subtype: String,
    /// SELinux labels (`context="…"`), to be handed to the kernel as they are; empty where there is no SELinux.
    pub labels: Vec<String>,
}

impl Default for MountOptions {
    /// As the kernel's overlay where the caller may mount, else what fusermount3 allows.
    fn default() -> Self {
        let privileged = is_privileged();
        MountOptions {
            read_only: false,
            allow_other: privileged,
            allow_root: false,
            dev: privileged,
            suid: privileged,
            exec: true,
            noatime: true,
            sync: false,
            dirsync: false,
            auto_unmount: false,
            join: false,
            fsname: "vfs-fuse".into(),
            subtype: "vfs-fuse".into(),
            labels: Vec::new(),
        }
    }
}

/// Whether mount(2) is ours to call, in whatever user namespace this is.
fn is_privileged() -> bool {
    capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::SYS_ADMIN))
}

/// What an option that changes nothing here may be given.
enum Accepts {
    Nothing,
    Flag,
    Number,
    Text,
    OneOf(&'static [&'static str]),
}

const ON_OFF: Accepts = Accepts::OneOf(&["on", "off"]);

/// Options of others that change nothing here.
const IGNORED: &[(&[&str], Accepts)] = &[
    // fuse-overlayfs: inode numbers are constant and unique anyway, and there are no plugins.
    (&["fast_ino", "fast_ino_check", "ino32_t"], Accepts::Flag),
    (&["plugins"], Accepts::Text),
    // The kernel's overlay: what it can write, we read and write always.
    (&["index", "metacopy", "nfs_export"], ON_OFF),
    (&["redirect_dir"], Accepts::OneOf(&["on", "off", "follow", "nofollow"])),
    (&["uuid"], Accepts::OneOf(&["on", "off", "auto", "null"])),
    (&["xino"], Accepts::OneOf(&["on", "off", "auto"])),
    // libfuse.
    (&["clone_fd", "default_permissions", "nonempty"], Accepts::Nothing),
    (&["max_idle_threads", "max_read", "max_write"], Accepts::Number),
    // mount(8), fstab(5) and podman's volumes.
    (&["async", "defaults", "loud", "silent", "nomand"], Accepts::Nothing),
    (&["diratime", "nodiratime", "lazytime", "nolazytime", "nostrictatime"], Accepts::Nothing),
    (&["auto", "noauto", "nofail", "_netdev", "user", "nouser", "users", "owner", "group"], Accepts::Nothing),
    (&["private", "rprivate", "slave", "rslave"], Accepts::Nothing),
    (&["comment"], Accepts::Text),
];

/// Reads the options of all `-o` in their order: where two contradict, the later holds; id ranges add up. `source` is
/// what the command line says is mounted.
pub fn parse<S: AsRef<OsStr>>(groups: &[S], source: Option<&OsStr>) -> Result<Parsed> {
    let mut reader = Reader { config: Config::default(), mount: MountOptions::default(), ..Reader::default() };
    if let Some(source) = source {
        reader.mount.fsname = source.to_string_lossy().into_owned();
    }
    for option in groups.iter().flat_map(|g| split_options(g.as_ref().as_bytes())).filter(|o| !o.is_empty()) {
        let (name, value) = match option.iter().position(|&b| b == b'=') {
            Some(at) => (&option[..at], Some(&option[at + 1..])),
            None => (option, None),
        };
        reader.set(Setting { name: &String::from_utf8_lossy(name), value })?;
    }
    reader.finish()
}

#[derive(Default)]
struct Reader {
    config: Config,
    mount: MountOptions,
    debug: bool,
    squash_to_root: bool,
    allow_other_asked: bool,
}

impl Reader {
    fn set(&mut self, s: Setting<'_>) -> Result<()> {
        if self.set_layers(&s)? || self.set_view(&s)? || self.set_work(&s)? || self.set_mount(&s)? || s.is_ignored()? {
            return Ok(());
        }
        Err(Error::new(ErrorKind::InvalidInput, format!("unknown option \"{}\"", s.name))
            .hint("vfs-fuse --help lists all"))
    }

    fn set_layers(&mut self, s: &Setting<'_>) -> Result<bool> {
        match s.name {
            "lowerdir" => self.config.lower = s.paths()?,
            "lowerdir+" => self.config.lower.push(s.path()?),
            "upperdir" => self.config.upper = Some(s.path()?),
            "workdir" => self.config.work = Some(s.path()?),
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn set_view(&mut self, s: &Setting<'_>) -> Result<bool> {
        let config = &mut self.config;
        match s.name {
            "uidmapping" => s.add_ranges(&mut config.uids)?,
            "gidmapping" => s.add_ranges(&mut config.gids)?,
            "squash_to_root" => self.squash_to_root = s.flag()?,
            "squash_to_uid" => config.squash.uid = Some(s.number("an id")?),
            "squash_to_gid" => config.squash.gid = Some(s.number("an id")?),
            "xattr_permissions" => {
                config.xattr_permissions = s.choice(&[
                    ("0", XattrPermissions::Off),
                    ("1", XattrPermissions::Privileged),
                    ("2", XattrPermissions::Containers),
                ])?;
            }
            "static_nlink" => config.static_nlink = s.flag()?,
            "userxattr" => config.user_xattrs = s.flag()?,
            "noacl" => config.no_acl = s.flag()?,
            "noxattrs" => config.no_xattrs = s.flag()?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn set_work(&mut self, s: &Setting<'_>) -> Result<bool> {
        let config = &mut self.config;
        match s.name {
            "timeout" => config.timeout = s.seconds()?,
            "writeback" => config.writeback = s.flag()?,
            "volatile" => config.volatile = s.flag()?,
            "fsync" => config.volatile = !s.flag()?,
            "threaded" => config.threads = (!s.flag()?).then_some(1),
            "threads" | "max_threads" => config.threads = Some(s.threads()?),
            "passthrough" => config.passthrough = s.flag()?,
            "wake_latency" => {
                let choices = [("auto", WakeLatency::Auto), ("on", WakeLatency::On), ("off", WakeLatency::Off)];
                config.wake_latency = s.choice(&choices)?;
            }
            "copy_up" => {
                config.copy_up = s.choice(&[
                    ("auto", CopyUp::Auto),
                    ("reflink", CopyUp::Reflink),
                    ("extent", CopyUp::Extent),
                    ("full", CopyUp::Full),
                ])?;
            }
            "complete" => config.completion = s.completion()?,
            "debug" => self.debug = s.flag()?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn set_mount(&mut self, s: &Setting<'_>) -> Result<bool> {
        let mount = &mut self.mount;
        match s.name {
            "fsname" => mount.fsname = s.text()?,
            "subtype" => mount.subtype = s.text()?,
            "context" | "fscontext" | "defcontext" | "rootcontext" => {
                // Without SELinux mount(2) refuses these, and callers pass them all the same.
                if std::path::Path::new("/sys/fs/selinux/enforce").exists() {
                    mount.labels.push(format!("{}={}", s.name, s.text()?));
                }
            }
            "sync" => mount.sync = s.flag()?,
            "allow_other" => (self.allow_other_asked, mount.allow_other) = (s.bare()?, true),
            "allow_root" => (mount.allow_root, mount.allow_other) = (s.bare()?, false),
            "auto_unmount" => mount.auto_unmount = s.bare()?,
            "join" => mount.join = s.bare()?,
            "ro" => mount.read_only = s.bare()?,
            "rw" => mount.read_only = !s.bare()?,
            "dev" => mount.dev = s.bare()?,
            "nodev" => mount.dev = !s.bare()?,
            "suid" => mount.suid = s.bare()?,
            "nosuid" => mount.suid = !s.bare()?,
            "exec" => mount.exec = s.bare()?,
            "noexec" => mount.exec = !s.bare()?,
            "noatime" => mount.noatime = s.bare()?,
            "atime" | "relatime" | "norelatime" | "strictatime" => mount.noatime = !s.bare()?,
            "dirsync" => mount.dirsync = s.bare()?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn finish(self) -> Result<Parsed> {
        let Reader { mut config, mut mount, debug, squash_to_root, allow_other_asked } = self;
        if mount.allow_root && allow_other_asked {
            return Err(Error::new(ErrorKind::InvalidInput, "allow_other and allow_root exclude each other"));
        }
        if squash_to_root {
            let Squash { uid, gid } = config.squash;
            config.squash = Squash { uid: uid.or(Some(0)), gid: gid.or(Some(0)) };
        }
        mount.read_only |= config.upper.is_none();
        Ok(Parsed { config, mount, debug })
    }
}

/// One option. The value still has its escapes.
struct Setting<'a> {
    name: &'a str,
    value: Option<&'a [u8]>,
}

impl Setting<'_> {
    fn wrong(&self, allowed: &str) -> Error {
        let given = match self.value {
            Some(value) => format!("\"{}\" is no value for it", String::from_utf8_lossy(value)),
            None => "it needs a value".into(),
        };
        Error::new(ErrorKind::InvalidInput, format!("option {}: {given}", self.name)).hint(format!("give {allowed}"))
    }

    /// The value without escapes; not empty.
    fn bytes(&self, allowed: &str) -> Result<Vec<u8>> {
        self.value.filter(|v| !v.is_empty()).map(unescape).ok_or_else(|| self.wrong(allowed))
    }

    fn text(&self) -> Result<String> {
        String::from_utf8(self.bytes("a text")?).map_err(|_| self.wrong("a text in UTF-8"))
    }

    fn path(&self) -> Result<PathBuf> {
        Ok(OsString::from_vec(self.bytes("a directory")?).into())
    }

    fn paths(&self) -> Result<Vec<PathBuf>> {
        let wrong = || self.wrong("directories with a colon between each two; a colon in a name is written \\:");
        let value = self.value.ok_or_else(wrong)?;
        let paths: Vec<_> = split(value, b':').map(unescape).collect();
        // The kernel's overlay has "::" before layers that hold data only.
        if paths.iter().any(Vec::is_empty) {
            return Err(wrong());
        }
        Ok(paths.into_iter().map(|p| OsString::from_vec(p).into()).collect())
    }

    /// `true`, if there is no value.
    fn bare(&self) -> Result<bool> {
        if self.value.is_none() { Ok(true) } else { Err(self.wrong("it without a value")) }
    }

    fn is_ignored(&self) -> Result<bool> {
        if self.name.starts_with("x-") || self.name.starts_with("X-") {
            return Ok(true);
        }
        let Some((_, accepts)) = IGNORED.iter().find(|(names, _)| names.contains(&self.name)) else {
            return Ok(false);
        };
        match accepts {
            Accepts::Nothing => self.bare(),
            Accepts::Flag => self.flag().map(|_| true),
            Accepts::Number => self.number::<u64>("a number").map(|_| true),
            Accepts::Text => Ok(true),
            Accepts::OneOf(words) => {
                let choices: Vec<_> = words.iter().map(|word| (*word, true)).collect();
                self.choice(&choices)
            }
        }
    }

    fn flag(&self) -> Result<bool> {
        match self.value {
            None | Some(b"1") => Ok(true),
            Some(b"0") => Ok(false),
            Some(_) => Err(self.wrong("0 or 1")),
        }
    }

    fn choice<T: Copy>(&self, choices: &[(&str, T)]) -> Result<T> {
        let found = choices.iter().find(|(name, _)| self.value == Some(name.as_bytes()));
        found.map(|&(_, meaning)| meaning).ok_or_else(|| {
            let names: Vec<_> = choices.iter().map(|(name, _)| *name).collect();
            self.wrong(&names.join(", "))
        })
    }

    fn number<T: FromStr>(&self, allowed: &str) -> Result<T> {
        parse_number(self.value.unwrap_or_default()).ok_or_else(|| self.wrong(allowed))
    }

    fn threads(&self) -> Result<usize> {
        let number = self.number("a number from 1 to 256")?;
        if (1..=256).contains(&number) { Ok(number) } else { Err(self.wrong("a number from 1 to 256")) }
    }

    fn seconds(&self) -> Result<Duration> {
        let text = std::str::from_utf8(self.value.unwrap_or_default()).unwrap_or_default();
        let seconds = text.parse().ok().and_then(|s| Duration::try_from_secs_f64(s).ok());
        seconds.ok_or_else(|| self.wrong("seconds, with a fraction if need be"))
    }

    fn completion(&self) -> Result<Completion> {
        let value = self.value.unwrap_or_default();
        if value == b"commit" {
            return Ok(Completion::AtCommit);
        }
        let (digits, unit) = match value {
            [digits @ .., b'K'] => (digits, 1 << 10),
            [digits @ .., b'M'] => (digits, 1 << 20),
            [digits @ .., b'G'] => (digits, 1 << 30),
            digits => (digits, 1u64),
        };
        let rate = parse_number(digits).and_then(|n: u64| n.checked_mul(unit)).filter(|&rate| rate > 0);
        let wrong = || self.wrong("\"commit\" or bytes a second, like 50M");
        Ok(Completion::Background { rate: rate.ok_or_else(wrong)? })
    }

    /// `DISK:SHOWN:COUNT`, any number of them. Between two a comma is allowed too: fuse-overlayfs's manual has it.
    fn add_ranges(&self, map: &mut IdMap) -> Result<()> {
        let wrong = || self.wrong("DISK:SHOWN:COUNT, any number of them with a colon between each two");
        let value = self.bytes("DISK:SHOWN:COUNT")?;
        let numbers: Option<Vec<u32>> = value.split(|b| matches!(b, b':' | b',')).map(parse_number).collect();
        let numbers = numbers.filter(|n| n.len() % 3 == 0).ok_or_else(wrong)?;
        for range in numbers.chunks_exact(3) {
            let (disk, shown, count) = (range[0], range[1], range[2]);
            // 2^32 - 1 is no id: chown(2) has it for "leave as it is".
            if count == 0 || disk.checked_add(count).is_none() || shown.checked_add(count).is_none() {
                return Err(wrong());
            }
            map.0.push(IdRange { shown, disk, count });
        }
        Ok(())
    }
}

/// Digits only: Rust's own parsers allow a sign.
fn parse_number<T: FromStr>(digits: &[u8]) -> Option<T> {
    let digits = digits.iter().all(u8::is_ascii_digit).then_some(digits)?;
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// The options of one `-o`. A comma belongs to a value if it is escaped, or in quotes as in SELinux labels
/// (`context="…:c1,c2"`).
fn split_options(text: &[u8]) -> Vec<&[u8]> {
    let (mut options, mut rest) = (Vec::new(), text);
    loop {
        let label = quoted_length(rest);
        let end = label + split(&rest[label..], b',').next().map_or(0, <[u8]>::len);
        options.push(&rest[..end]);
        match rest.get(end + 1..) {
            Some(more) => rest = more,
            None => return options,
        }
    }
}

/// How long a label is that `text` begins with, up to and with its closing quote; 0 if it begins with none.
fn quoted_length(text: &[u8]) -> usize {
    let names: [&[u8]; 4] = [b"context=\"", b"fscontext=\"", b"defcontext=\"", b"rootcontext=\""];
    let Some(start) = names.iter().find(|name| text.starts_with(name)).map(|name| name.len()) else { return 0 };
    text[start..].iter().position(|&b| b == b'"').map_or(0, |at| start + at + 1)
}

/// The parts between separators that are not escaped, with their escapes.
fn split(text: &[u8], separator: u8) -> impl Iterator<Item = &[u8]> {
    let mut escaped = false;
    text.split(move |&byte| {
        let here = escaped;
        escaped = byte == b'\\' && !here;
        byte == separator && !here
    })
}

/// `\x` is `x`, and `\NNN` the byte with this octal number, as libfuse reads options and the kernel writes mount tables.
pub(crate) fn unescape(text: &[u8]) -> Vec<u8> {
    let (mut out, mut rest) = (Vec::with_capacity(text.len()), text);
    while let [first, after @ ..] = rest {
        let (byte, length) = match (first, after) {
            (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..]) => {
                (((a - b'0') << 6) | ((b - b'0') << 3) | (c - b'0'), 4)
            }
            (b'\\', [escaped, ..]) => (*escaped, 2),
            _ => (*first, 1),
        };
        out.push(byte);
        rest = &rest[length..];
    }
    out
}

#[cfg(test)]
mod tests;
