//! Who shows what where: remembered across processes, and reconciled with what the kernel has mounted.

use super::{
    Engine, Finding, events,
    find::{self, Object},
    now,
    sight::{self, Fate, Here, Numbers, View},
};
use graphdriver_core::{Access, Context, Error, ErrorKind, LayerId, Mount, Result, Root, mount, open_lock};
use rusqlite::{Connection, params};
use rustix::fs::{Mode, OFlags};
use serde::Serialize;
use std::{
    collections::HashMap,
    ffi::OsString,
    fs::File,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::ffi::{OsStrExt, OsStringExt},
    },
    path::{Path, PathBuf},
};

/// What `mount` did.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Mounted {
    /// Where it is shown.
    pub target: PathBuf,
    /// Whether it can be written to.
    pub writable: bool,
}

/// One line of `graphdriver mounts`.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct MountSummary {
    /// `image`, `container` or `snapshot`.
    #[serde(rename = "Type")]
    pub kind: String,
    /// Its id.
    #[serde(rename = "ID")]
    pub id: String,
    /// A name of it.
    pub name: String,
    /// Where it is shown.
    pub target: PathBuf,
    /// Whether it can be written to.
    pub writable: bool,
    /// When it was mounted, or when the snapshot was made that it shows. Nanoseconds since 1970; RFC 3339 in JSON.
    #[serde(serialize_with = "super::rfc3339")]
    pub created: i64,
    /// Whether it was made in another mount namespace, whose table may be out of sight.
    pub foreign: bool,
    /// Whether the program that served it is gone, so that nothing can be had from it until it is mounted again.
    pub dead: bool,
    /// The process that still uses it, if it is shown nowhere any more (`umount --lazy`).
    pub detached: Option<u32>,
}

/// A mount as the store remembers it.
#[derive(Debug, Clone)]
pub(super) struct MountRow {
    pub id: i64,
    pub kind: String,
    pub object: String,
    pub layer: Option<LayerId>,
    pub target: PathBuf,
    pub mount: u64,
    pub serial: u64,
    pub writable: bool,
    pub boot: String,
    pub namespace: u64,
    pub created: i64,
}

fn rows(db: &Connection, condition: &str, value: &str) -> Result<Vec<MountRow>> {
    let mut rows = db.prepare_cached(&format!(
        "SELECT id, kind, object, layer, target, mount, serial, writable, boot, namespace, created FROM mounts
         WHERE {condition} ORDER BY id"
    ))?;
    let all = rows.query_map([value], |row| {
        Ok(MountRow {
            id: row.get(0)?,
            kind: row.get(1)?,
            object: row.get(2)?,
            layer: row.get(3)?,
            target: OsString::from_vec(row.get(4)?).into(),
            mount: row.get::<_, i64>(5)? as u64,
            serial: row.get::<_, i64>(6)? as u64,
            writable: row.get(7)?,
            boot: row.get(8)?,
            namespace: row.get::<_, i64>(9)? as u64,
            created: row.get(10)?,
        })
    })?;
    Ok(all.collect::<rusqlite::Result<_>>()?)
}

fn all(db: &Connection) -> Result<Vec<MountRow>> {
    rows(db, "?1 = ''", "")
}

/// The mounts of one image or container.
pub(super) fn of_object(db: &Connection, object: &str) -> Result<Vec<MountRow>> {
    rows(db, "object = ?1", object)
}

impl Engine {
    /// Mounting, unmounting and comparing with the kernel's table take turns: between the store's row and the kernel's
    /// mount nobody may look. A killed process gives its turn back.
    fn mounts_turn(&self) -> Result<File> {
        let path = self.layers.dir().join("mounts.lock");
        let lock = open_lock(&path)?;
        lock.lock().doing(|| format!("locking {}", path.display()))?;
        Ok(lock)
    }

    /// The right to make a writable mount of the layer: two overlays on one upper directory are undefined behaviour.
    pub(super) fn writer_turn(&self, layer: LayerId, wait: bool) -> Result<File> {
        self.layer_turn("writers.lock", layer, wait)?.ok_or_else(|| {
            Error::new(ErrorKind::Busy, "files are just being copied into it").hint("try again afterwards")
        })
    }

    /// A lock on the layer, None if it is somebody else's and not to be waited for. One byte of the file stands for each layer
    /// (fcntl(2), "Open file description locks"); a killed process gives it back.
    pub(super) fn layer_turn(&self, name: &str, layer: LayerId, wait: bool) -> Result<Option<File>> {
        use nix::{fcntl::FcntlArg, libc};
        let path = self.layers.dir().join(name);
        let file = open_lock(&path)?;
        let byte = libc::flock {
            l_type: libc::F_WRLCK as i16,
            l_whence: libc::SEEK_SET as i16,
            l_start: layer.0 as i64,
            l_len: 1,
            l_pid: 0,
        };
        let how = if wait { FcntlArg::F_OFD_SETLKW(&byte) } else { FcntlArg::F_OFD_SETLK(&byte) };
        match nix::fcntl::fcntl(&file, how) {
            Ok(_) => Ok(Some(file)),
            Err(nix::Error::EAGAIN | nix::Error::EACCES) => Ok(None),
            Err(e) => Err(std::io::Error::from(e)).doing(|| format!("locking {}", path.display())),
        }
    }

    /// Forgets mounts that are no more: unmounted by others, or gone with a reboot or with their mount namespace.
    pub(super) fn reconcile_mounts(&self) -> Result<()> {
        if self.layers.store().read(all)?.is_empty() {
            return Ok(());
        }
        let _turn = self.mounts_turn()?;
        self.reconcile_in_turn().map(drop)
    }

    /// Gives the mounts that are detached, by their row, and a process that still uses each.
    fn reconcile_in_turn(&self) -> Result<HashMap<i64, u32>> {
        let (mut gone, mut detached) = (Vec::new(), HashMap::new());
        let rows = self.layers.store().read(all)?;
        if rows.is_empty() {
            return Ok(detached);
        }
        let view = View::take()?;
        for row in rows {
            match view.fate(&row)? {
                Fate::Shown | Fate::OutOfSight => {}
                Fate::Detached(pid) => drop(detached.insert(row.id, pid)),
                Fate::Gone => gone.push(row),
            }
        }
        self.forget(&gone)?;
        Ok(detached)
    }

    /// Takes mounts that are gone out of the store; a layer nobody shows any more is released.
    fn forget(&self, gone: &[MountRow]) -> Result<()> {
        if gone.is_empty() {
            return Ok(());
        }
        let idle = self.layers.store().write(|tx| {
            let mut idle = Vec::new();
            for row in gone {
                let target = row.target.display().to_string();
                if tx.execute("DELETE FROM mounts WHERE id = ?", [row.id])? == 1 {
                    events::record(tx, &row.kind, "unmount", &row.object, &[("target", &target)])?;
                }
                let left = "SELECT EXISTS (SELECT 1 FROM mounts WHERE layer IS ?)";
                let held: bool = tx.query_row(left, [row.layer], |r| r.get(0))?;
                idle.extend(row.layer.filter(|_| !held));
            }
            Ok(idle)
        })?;
        idle.into_iter().try_for_each(|layer| self.layers.driver().release(layer))
    }

    /// Shows an image (always read-only) or a container at the directory `target`. A container may be shown in several
    /// places; they are the same filesystem. Killed at any moment, it leaves either nothing or a mount the store knows.
    pub fn mount(&self, what: &str, target: &Path, read_only: bool) -> Result<Mounted> {
        let doing = || format!("mounting {what} at {}", target.display());
        self.mount_inner(what, target, read_only).doing(doing)
    }

    fn mount_inner(&self, what: &str, target: &Path, read_only: bool) -> Result<Mounted> {
        let _turn = self.mounts_turn()?;
        self.reconcile_in_turn()?;
        let object = self.layers.store().read(|db| find::object(db, what))?;
        let (kind, id, layer, writable, name) = match &object {
            Object::Image(row) => ("image", row.id.to_string(), row.top, false, what.to_string()),
            Object::Container(row) => ("container", row.id.clone(), Some(row.layer), !read_only, row.name.clone()),
        };
        let target = target.canonicalize().hint(|| "make the directory first: mkdir -p DIR")?;
        if target.to_str().is_none() {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "its name is not UTF-8, and nobody could unmount it by name",
            ));
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let place = rustix::fs::open(&target, flags, Mode::empty())?;
        self.refuse_inside_root(&target)?;

        let _writer = layer.filter(|_| writable).map(|layer| self.writer_turn(layer, false)).transpose()?;
        let shown = self.layers.store().read(|db| of_object(db, &id))?;
        let view = View::take()?;
        let detached = match shared(&view, writable, &shown)? {
            Some(dir) => again(&dir, writable)?,
            None => {
                let recipe = self.recipe(layer, writable)?;
                tracing::debug!(?recipe, target = %target.display(), "mounting");
                mount::detached(&recipe)?
            }
        };
        let Numbers { mount, serial } = sight::numbers(&detached)?;
        let row = MountRow {
            id: 0,
            kind: kind.into(),
            object: id,
            layer,
            target: target.clone(),
            mount,
            serial,
            writable,
            boot: view.here.boot,
            namespace: view.here.namespace,
            created: now(),
        };
        // The store knows first: a mount nobody shows is forgotten at the next look, an unknown one would stay for ever.
        let number = self.layers.store().write(|tx| insert(tx, &row, &name))?;
        if let Err(e) = mount::attach(detached.as_fd(), place.as_fd()) {
            self.forget(&[MountRow { id: number, ..row }])?;
            return Err(e);
        }
        Ok(Mounted { target, writable })
    }

    /// A data root mounted over would hide the store from the next command.
    fn refuse_inside_root(&self, target: &Path) -> Result<()> {
        let root = self.settings.data_root.canonicalize()?;
        match target.starts_with(&root) || root.starts_with(target) {
            true => {
                Err(Error::new(ErrorKind::InvalidInput, format!("that would hide the data root {}", root.display()))
                    .hint("choose a directory elsewhere"))
            }
            false => Ok(()),
        }
    }

    fn recipe(&self, layer: Option<LayerId>, writable: bool) -> Result<Vec<Mount>> {
        match layer {
            Some(layer) => self.layers.mount(layer, if writable { Access::ReadWrite } else { Access::ReadOnly }),
            None => Err(Error::new(ErrorKind::Unsupported, "an image without layers has nothing to show")
                .hint("create a container from it and mount that")),
        }
    }

    /// Takes down what was mounted at a directory, or every mount of an image or container. `lazy` detaches a mount that is
    /// still in use, to vanish with its last user.
    pub fn umount(&self, what: &str, lazy: bool) -> Result<Vec<PathBuf>> {
        self.umount_inner(what, lazy).doing(|| format!("unmounting {what}"))
    }

    fn umount_inner(&self, what: &str, lazy: bool) -> Result<Vec<PathBuf>> {
        let _turn = self.mounts_turn()?;
        let detached = self.reconcile_in_turn()?;
        let here = Here::find()?;
        let path = Path::new(what).canonicalize().ok();
        let mounts = self.layers.store().read(all)?;
        let mut chosen: Vec<_> =
            mounts.into_iter().filter(|row| here.has(row) && !detached.contains_key(&row.id)).collect();
        if chosen.iter().any(|row| Some(&row.target) == path.as_ref()) {
            chosen.retain(|row| Some(&row.target) == path.as_ref());
            // Mounted one over the other: the topmost goes.
            chosen.drain(..chosen.len() - 1);
        } else {
            let id = self.layers.store().read(|db| match find::object(db, what)? {
                Object::Image(row) => Ok(row.id.to_string()),
                Object::Container(row) => Ok(row.id),
            });
            let id = id.map_err(|e| match path {
                Some(path) if self.snapshot_mounts().is_ok_and(|all| all.iter().any(|mount| mount.target == path)) => {
                    Error::new(ErrorKind::Busy, format!("containerd mounted a snapshot at {}", path.display()))
                        .hint("let containerd stop what uses it")
                }
                Some(path) => {
                    Error::new(ErrorKind::NotFound, format!("graphdriver mounted nothing at {}", path.display()))
                        .hint("`graphdriver mounts` lists what it did")
                }
                None if what.starts_with(['/', '.']) => Error::new(
                    ErrorKind::NotFound,
                    "there is no such directory, and no container or image is called so",
                )
                .hint("`graphdriver mounts` lists where something is mounted"),
                None => e,
            })?;
            chosen.retain(|row| row.object == id);
            if chosen.is_empty() {
                return Err(Error::new(ErrorKind::NotFound, "it is not mounted here")
                    .hint("`graphdriver mounts` lists what is"));
            }
        }
        self.take_down(&chosen, lazy)
    }

    /// Unmounts, the last mounted first. What is only detached stays in the store as long as a process uses it.
    fn take_down(&self, mounts: &[MountRow], lazy: bool) -> Result<Vec<PathBuf>> {
        let mut done = Vec::new();
        for row in mounts.iter().rev() {
            let view = View::take()?;
            // The descriptor is closed at once: it would keep the mount busy.
            let (_, place) = view.reach(row)?;
            mount::unmount(&place, lazy).hint(|| {
                format!("`fuser -vm {}` shows who uses it; umount --lazy does not wait", row.target.display())
            })?;
            if view.fate(row)? == Fate::Gone {
                self.forget(std::slice::from_ref(row))?;
            }
            done.push(row.target.clone());
        }
        Ok(done)
    }

    /// Stops believing in mounts of the object that are shown nowhere: detached ones that are still in use, and those whose
    /// namespace is out of sight, so that nobody can tell whether they are gone; the user has said so.
    pub(super) fn forget_out_of_sight(&self, object: &str) -> Result<()> {
        let _turn = self.mounts_turn()?;
        let view = View::take()?;
        let mut unseen = Vec::new();
        for row in self.layers.store().read(|db| of_object(db, object))? {
            if view.fate(&row)? != Fate::Shown {
                unseen.push(row);
            }
        }
        self.forget(&unseen)
    }

    /// Everything that is mounted now, also what containerd did with a snapshot's recipe.
    pub fn mounts(&self) -> Result<Vec<MountSummary>> {
        let detached = {
            let _turn = self.mounts_turn()?;
            self.reconcile_in_turn()?
        };
        let view = View::take()?;
        let ours: Result<Vec<_>> = self.layers.store().read(|db| {
            all(db)?
                .into_iter()
                .map(|row| {
                    Ok(MountSummary {
                        name: name_of(db, &row)?,
                        foreign: !view.here.has(&row),
                        dead: view.reach(&row).is_ok_and(|(dir, _)| sight::is_dead(&dir)),
                        detached: detached.get(&row.id).copied(),
                        kind: row.kind,
                        id: row.object,
                        target: row.target,
                        writable: row.writable,
                        created: row.created,
                    })
                })
                .collect()
        });
        Ok(ours?.into_iter().chain(self.snapshot_mounts()?).collect())
    }
}

/// Recorded mounts that are not there, or show nothing.
pub(super) fn look(engine: &Engine) -> Result<Vec<Finding>> {
    // The lock is a file, and whoever has not mounted anything has none.
    if engine.layers.store().read(all)?.is_empty() {
        return Ok(Vec::new());
    }
    let _turn = engine.mounts_turn()?;
    let view = View::take()?;
    let mut found = Vec::new();
    for row in engine.layers.store().read(all)? {
        let name = engine.layers.store().read(|db| name_of(db, &row))?;
        let place = format!("the mount of {} {name} at {}", row.kind, row.target.display());
        match view.fate(&row)? {
            Fate::Gone => found.push(Finding {
                consequence: "until then it counts as in use".into(),
                ..Finding::leftover(format!("{place} is recorded, and is not there"), "graphdriver mounts forgets it")
            }),
            _ if view.reach(&row).is_ok_and(|(dir, _)| sight::is_dead(&dir)) => found.push(Finding::damage(
                format!("{place} is dead: the program that served it is gone"),
                "whatever uses it gets errors",
                &format!("graphdriver umount {}, and mount it again", row.target.display()),
            )),
            _ => {}
        }
    }
    Ok(found)
}

/// The root of the mount that a further one has to share: two overlays on one upper directory are undefined behaviour, and
/// so is what a read-only one shows while another one writes. None if it may be an overlay of its own.
fn shared(view: &View, writable: bool, shown: &[MountRow]) -> Result<Option<OwnedFd>> {
    if let Some(row) = shown.iter().find(|row| row.writable) {
        let (dir, _) = view.reach(row)?;
        if sight::is_dead(&dir) {
            return Err(sight::died(row));
        }
        if view.here.has(row) {
            return Ok(Some(dir));
        }
        let why = format!("it is mounted for writing at {} in another mount namespace", row.target.display());
        return Err(Error::new(ErrorKind::Busy, why).hint("unmount it there first"));
    }
    if writable {
        refuse_beside_readers(shown)?;
        return Ok(None);
    }
    let reached = shown.iter().filter(|row| view.here.has(row)).filter_map(|row| view.reach(row).ok());
    Ok(reached.map(|(dir, _)| dir).find(|dir| !sight::is_dead(dir)))
}

/// statfs(2).
const FUSE_SUPER_MAGIC: rustix::fs::FsWord = 0x6573_5546;

/// The tree of a layer for reading, where `shown` are its mounts: through the writable one if there is any, as data that
/// was written there may be nowhere else yet; else a mount of its own.
pub(super) fn live(engine: &Engine, layer: LayerId, shown: &[MountRow]) -> Result<Root> {
    let view = View::take()?;
    let Some(row) = shown.iter().find(|row| row.writable) else { return engine.view(layer) };
    match view.reach(row) {
        Ok((dir, _)) if sight::is_dead(&dir) => engine.view(layer),
        // Without what is mounted in it.
        Ok((dir, _)) if view.here.has(row) => again(&dir, false).map(Root::from_fd),
        Ok((_, path)) => {
            // A mount in another namespace cannot be cloned, but what the kernel holds back of it can be sent to its
            // program. An overlay holds nothing back, and would flush all of the filesystem below.
            let dir = rustix::fs::open(&path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
            if rustix::fs::fstatfs(&dir)?.f_type == FUSE_SUPER_MAGIC {
                rustix::fs::syncfs(&dir).doing(|| format!("flushing {}", row.target.display()))?;
            }
            engine.view(layer)
        }
        Err(_) => engine.view(layer),
    }
}

/// Another mount of the same superblock.
fn again(dir: &OwnedFd, writable: bool) -> Result<OwnedFd> {
    let source = format!("/proc/self/fd/{}", dir.as_raw_fd()).into();
    let options = if writable { vec![] } else { vec!["ro".into()] };
    mount::detached(&[Mount { fstype: "bind".into(), source, options }])
}

/// A read-only mount is an overlay of its own on the same files, and what it shows when they are written to is undefined
/// (kernel `overlayfs.rst`, "Changes to underlying filesystems").
pub(super) fn refuse_beside_readers(shown: &[MountRow]) -> Result<()> {
    match shown.iter().find(|row| !row.writable) {
        Some(row) => Err(Error::new(ErrorKind::Busy, format!("it is mounted read-only at {}", row.target.display()))
            .hint("unmount it there first")),
        None => Ok(()),
    }
}

fn insert(tx: &rusqlite::Transaction<'_>, row: &MountRow, name: &str) -> Result<i64> {
    // Between the look-up and this transaction somebody may have removed it.
    let there = "SELECT EXISTS (SELECT 1 FROM images WHERE id = ?1) OR EXISTS (SELECT 1 FROM containers WHERE id = ?1)";
    if !tx.query_row(there, [&row.object], |r| r.get::<_, bool>(0))? {
        return Err(Error::new(ErrorKind::NotFound, format!("{name} has just been removed by somebody else")));
    }
    tx.execute(
        "INSERT INTO mounts (kind, object, layer, target, mount, serial, writable, boot, namespace, created)
         VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        params![
            row.kind,
            row.object,
            row.layer,
            row.target.as_os_str().as_bytes(),
            row.mount as i64,
            row.serial as i64,
            row.writable,
            row.boot,
            row.namespace as i64,
            row.created
        ],
    )?;
    let number = tx.last_insert_rowid();
    let target = row.target.display().to_string();
    events::record(tx, &row.kind, "mount", &row.object, &[("name", name), ("target", &target)])?;
    Ok(number)
}

fn name_of(db: &Connection, row: &MountRow) -> Result<String> {
    let sql = match row.kind.as_str() {
        "image" => "SELECT name FROM tags WHERE image = ? ORDER BY name LIMIT 1",
        _ => "SELECT name FROM containers WHERE id = ?",
    };
    let mut names = db.prepare_cached(sql)?;
    let found = names.query_map([&row.object], |r| r.get(0))?.next();
    Ok(found.transpose()?.unwrap_or_else(|| row.object.chars().take(19).collect()))
}
