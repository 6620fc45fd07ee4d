//! Carrying out mount recipes, and the table of what is mounted.

mod context;
mod fuse;
mod idmap;
mod overlay;
mod table;

pub use fuse::{fuse_program, has_fuse};
pub use idmap::{IdMapped, IdRange, can_id_map, user_namespace};
pub use overlay::{escape, has_lowerdir_plus, unescape};
pub use table::{MountInfo, table, table_of};

use crate::{Context, Error, ErrorKind, Mount, Result, sys};
use context::FsContext;
use rustix::{
    fs::{self, CWD, Mode, OFlags},
    io::Errno,
    mount::{self, MountAttrFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags},
};
use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
    thread,
    time::{Duration, Instant},
};

/// Carries out a recipe without showing it anywhere: the descriptor is the root of a detached mount, which is gone when
/// the last descriptor into it is closed. [`attach`] shows it.
///
/// A type `fuse.NAME` starts the program NAME ([`fuse_program`]), which serves the filesystem until its last mount is gone.
///
/// Further steps may only be remounts, type `bind` with the option `remount`, which change attributes of the mount itself
/// (`ro`, `nosuid`). Other recipes of several steps are refused as `Unsupported`: all would go to one target, where the last
/// hides the others.
pub fn detached(recipe: &[Mount]) -> Result<OwnedFd> {
    let (step, remounts) = match recipe {
        [step, rest @ ..] if rest.iter().all(is_remount) => (step, rest),
        _ => {
            let why = format!("a recipe of {} mounts, where exactly one can be carried out", recipe.len());
            return Err(Error::new(ErrorKind::Unsupported, why));
        }
    };
    let made = match step.fstype.as_str() {
        "bind" => bind(step),
        "overlay" => overlay::mount(step),
        fstype => match fstype.strip_prefix("fuse.") {
            Some(name) => fuse::mount(name, step),
            None => generic(step),
        },
    };
    made.and_then(|mount| remounts.iter().try_for_each(|step| remount(&mount, step)).map(|()| mount))
        .map_err(|e| with_privilege_hint(e).doing(format!("mounting {} {}", step.fstype, step.source.display())))
}

fn is_remount(step: &Mount) -> bool {
    step.fstype == "bind" && step.options.iter().any(|option| option == "remount")
}

fn remount(mount: &OwnedFd, step: &Mount) -> Result<()> {
    let (attrs, rest) = split_attributes(&step.options);
    if let Some(unknown) = rest.iter().find(|o| !matches!(o.as_str(), "bind" | "remount" | "ro")) {
        return Err(Error::new(ErrorKind::InvalidInput, format!("a remount has no option {unknown:?}")));
    }
    sys::mount_setattr(mount.as_fd(), false, attrs, None).doing(|| "setting attributes of a mount")
}

/// Shows a detached mount at a directory. Afterwards it is an ordinary mount, undone by [`unmount`].
pub fn attach(mount: BorrowedFd<'_>, target: BorrowedFd<'_>) -> Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    mount::move_mount(mount, "", target, "", flags)
        .map_err(|e| with_privilege_hint(e.into()).doing("attaching a mount to its directory"))
}

/// A detached second mount of the same superblock, with `dir` as its root. Mounts below `dir` are not in it. `dir` must
/// be mounted in this mount namespace; a detached mount can be cloned since Linux 6.15.
pub fn clone_of(dir: BorrowedFd<'_>) -> Result<OwnedFd> {
    clone_tree(dir, false)
}

/// Makes a detached mount one of its own: what is mounted below it shows nowhere else and the other way round, and of its
/// attributes that restrict what can be done through it (`ro`, `nosuid`, `nodev`, `noexec`) it has these.
pub fn separate(mount: BorrowedFd<'_>, attributes: MountAttrFlags) -> Result<()> {
    sys::mount_separate(mount, attributes)
        .map_err(|e| with_privilege_hint(e.into()).doing("setting attributes of a mount"))
}

fn clone_tree(dir: BorrowedFd<'_>, recursive: bool) -> Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    flags.set(OpenTreeFlags::AT_RECURSIVE, recursive);
    mount::open_tree(dir, "", flags).map_err(|e| with_privilege_hint(e.into()).doing("cloning a mount"))
}

/// Does `work` on a thread of its own in a mount namespace of its own, from which nothing spreads: what it attaches is seen
/// nowhere, and gone when it is done.
fn privately<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let alone = || {
        sys::unshare_mounts().doing(|| "making a mount namespace")?;
        mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
            .doing(|| "making a mount namespace private")?;
        work()
    };
    thread::scope(|scope| scope.spawn(alone).join()).unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Unmounts what is mounted at `target`; a symlink there is not followed. `lazy` takes it out of the tree at once and
/// leaves the rest to its last user; without it a mount in use is `Busy`.
pub fn unmount(target: &Path, lazy: bool) -> Result<()> {
    let mut flags = UnmountFlags::NOFOLLOW;
    flags.set(UnmountFlags::DETACH, lazy);
    mount::unmount(target, flags)
        .map_err(|e| match e {
            Errno::INVAL => Error::new(ErrorKind::NotFound, "nothing is mounted there"),
            e => with_privilege_hint(e.into()),
        })
        .doing(|| format!("unmounting {}", target.display()))
}

fn bind(step: &Mount) -> Result<OwnedFd> {
    let (attrs, rest) = split_attributes(&step.options);
    if let Some(unknown) = rest.iter().find(|o| !matches!(o.as_str(), "bind" | "rbind" | "ro" | "rw")) {
        return Err(Error::new(ErrorKind::InvalidInput, format!("a bind mount has no option {unknown:?}")));
    }
    let recursive = rest.iter().any(|o| *o == "rbind");
    let mount = clone_tree(open_path(&step.source)?.as_fd(), recursive)?;
    if !attrs.is_empty() {
        sys::mount_setattr(mount.as_fd(), recursive, attrs, None).doing(|| "setting attributes of a bind mount")?;
    }
    Ok(mount)
}

/// How long a filesystem is waited for that something else holds for a moment. Every `zfs create`, `clone` and `userspace`
/// owns the datasets it looks at while it does (OpenZFS `dmu_objset_own`, of which one may be at a time), so a container's
/// mount can meet another's creation.
const PATIENCE: Duration = Duration::from_secs(2);

fn generic(step: &Mount) -> Result<OwnedFd> {
    let until = Instant::now() + PATIENCE;
    loop {
        match configured(step) {
            Err(e) if e.kind() == ErrorKind::Busy && Instant::now() < until => thread::sleep(Duration::from_millis(10)),
            done => return done,
        }
    }
}

/// A context whose creation failed cannot be used again, so each try has its own.
fn configured(step: &Mount) -> Result<OwnedFd> {
    let (attrs, rest) = split_attributes(&step.options);
    let context = FsContext::open(&step.fstype)?;
    context.set("source", step.source.as_os_str().as_encoded_bytes())?;
    for option in rest {
        context.option(option)?;
    }
    context.mount(attrs)
}

/// What belongs to the mount and not to the superblock (`mount_setattr(2)`), and the options that are left. `ro` is both.
fn split_attributes(options: &[String]) -> (MountAttrFlags, Vec<&String>) {
    let mut attrs = MountAttrFlags::empty();
    let mut rest = Vec::new();
    for option in options {
        match option.as_str() {
            "nosuid" => attrs |= MountAttrFlags::MOUNT_ATTR_NOSUID,
            "nodev" => attrs |= MountAttrFlags::MOUNT_ATTR_NODEV,
            "noexec" => attrs |= MountAttrFlags::MOUNT_ATTR_NOEXEC,
            "noatime" => attrs |= MountAttrFlags::MOUNT_ATTR_NOATIME,
            "strictatime" => attrs |= MountAttrFlags::MOUNT_ATTR_STRICTATIME,
            "nodiratime" => attrs |= MountAttrFlags::MOUNT_ATTR_NODIRATIME,
            "nosymfollow" => attrs |= MountAttrFlags::MOUNT_ATTR_NOSYMFOLLOW,
            "suid" | "dev" | "exec" | "atime" | "diratime" | "relatime" | "defaults" => {}
            "ro" => {
                attrs |= MountAttrFlags::MOUNT_ATTR_RDONLY;
                rest.push(option);
            }
            _ => rest.push(option),
        }
    }
    (attrs, rest)
}

/// What of a recipe's options a bind mount of what it shows needs.
fn bind_options<'o>(options: impl Iterator<Item = &'o String>) -> Vec<String> {
    let (attrs, access): (Vec<_>, Vec<_>) = options
        .filter(|option| !split_attributes(std::slice::from_ref(*option)).0.is_empty())
        .partition(|option| *option != "ro");
    let access = if access.is_empty() { "rw" } else { "ro" };
    let mut all = vec!["bind".to_owned(), access.to_owned()];
    all.extend(attrs.into_iter().cloned());
    all
}

/// The place `path` names, symlinks followed, without opening what is there.
fn open_path(path: &Path) -> Result<OwnedFd> {
    fs::openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).doing(|| format!("opening {}", path.display()))
}

fn with_privilege_hint(e: Error) -> Error {
    match e.kind() {
        ErrorKind::PermissionDenied => {
            e.hint("mounting needs root, or a user namespace: unshare --map-root-user --mount")
        }
        _ => e,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Root;
    use std::io::Read;

    pub(super) fn privately<T: Send>(test: impl FnOnce() -> T + Send) -> T {
        super::privately(|| Ok(test())).unwrap()
    }

    fn recipe(fstype: &str, source: &Path, options: &[&str]) -> [Mount; 1] {
        let options = options.iter().map(|o| o.to_string()).collect();
        [Mount { fstype: fstype.into(), source: source.into(), options }]
    }

    fn read(mount: OwnedFd, path: &str) -> Result<String> {
        let mut text = String::new();
        Root::from_fd(mount).open_file(Path::new(path))?.read_to_string(&mut text)?;
        Ok(text)
    }

    #[test]
    fn a_detached_mount_is_seen_nowhere_until_attached_and_gone_after_unmount() {
        privately(|| {
            let dir = tempfile::tempdir().unwrap();
            let at = |path: &Path| table().unwrap().into_iter().filter(|m| m.mount_point == path).collect::<Vec<_>>();
            let mount =
                detached(&recipe("tmpfs", Path::new("none"), &["size=1m", "mode=0700", "nosuid", "noexec"])).unwrap();
            let dev = fs::fstat(&mount).unwrap().st_dev;
            assert!(table().unwrap().iter().all(|m| fs::makedev(m.dev.0, m.dev.1) != dev));

            attach(mount.as_fd(), open_path(dir.path()).unwrap().as_fd()).unwrap();
            let [shown] = at(dir.path()).try_into().unwrap();
            assert_eq!((shown.fstype.to_str(), shown.source.to_str()), (Some("tmpfs"), Some("none")));
            assert_eq!(shown.options, "rw,nosuid,noexec,relatime");
            assert!(shown.super_options.to_str().unwrap().contains("size=1024k"));

            assert_eq!(unmount(dir.path(), false).unwrap_err().kind(), ErrorKind::Busy, "the descriptor holds it");
            drop(mount);
            unmount(dir.path(), false).unwrap();
            assert!(at(dir.path()).is_empty());
            assert_eq!(unmount(dir.path(), false).unwrap_err().kind(), ErrorKind::NotFound);
        });
    }

    #[test]
    fn a_bind_mount_can_be_read_only_while_its_source_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let (ro, rw) = (recipe("bind", dir.path(), &["bind", "ro"]), recipe("bind", dir.path(), &["rbind"]));
        let create = |mount: &OwnedFd| fs::openat(mount, "f", OFlags::CREATE | OFlags::WRONLY, Mode::RUSR);
        assert_eq!(create(&detached(&ro).unwrap()).unwrap_err(), Errno::ROFS);
        create(&detached(&rw).unwrap()).unwrap();
        assert!(dir.path().join("f").exists());
        let e = detached(&recipe("bind", dir.path(), &["size=3"])).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::InvalidInput, "{e}");
    }

    #[test]
    fn a_remount_makes_a_mount_read_only_and_not_its_filesystem() {
        let steps = |last: &[&str]| {
            let [first] = recipe("tmpfs", Path::new("none"), &[]);
            let [second] = recipe("bind", Path::new(""), last);
            [first, second]
        };
        let create = |mount: &OwnedFd| fs::openat(mount, "f", OFlags::CREATE | OFlags::WRONLY, Mode::RUSR);
        let mount = detached(&steps(&["remount", "bind", "ro"])).unwrap();
        assert_eq!(create(&mount).unwrap_err(), Errno::ROFS);
        create(&detached(&steps(&["remount", "bind"])).unwrap()).unwrap();
        let e = detached(&steps(&["remount", "bind", "size=3"])).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::InvalidInput, "{e}");
        assert_eq!(detached(&steps(&["bind"])).unwrap_err().kind(), ErrorKind::Unsupported);
    }

    #[test]
    fn a_clone_shows_the_same_directory_without_what_is_mounted_below() {
        privately(|| {
            let dir = tempfile::tempdir().unwrap();
            std::fs::create_dir(dir.path().join("sub")).unwrap();
            std::fs::write(dir.path().join("sub/f"), "below").unwrap();
            let over = detached(&recipe("tmpfs", Path::new("none"), &[])).unwrap();
            attach(over.as_fd(), open_path(&dir.path().join("sub")).unwrap().as_fd()).unwrap();
            let clone = clone_of(open_path(dir.path()).unwrap().as_fd()).unwrap();
            assert_eq!(read(clone, "sub/f").unwrap(), "below");
            unmount(&dir.path().join("sub"), true).unwrap();
        });
    }

    #[test]
    fn failures_say_what_the_kernel_said() {
        let e = detached(&recipe("nosuchfs", Path::new("none"), &[])).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Unsupported);
        assert!(e.to_string().contains("modprobe nosuchfs"), "{e}");
        let e = detached(&recipe("tmpfs", Path::new("none"), &["size=huge"])).unwrap_err();
        assert!(e.to_string().contains("Bad value for 'size'"), "{e}");
        let e = detached(&recipe("tmpfs", Path::new("none"), &[&format!("mpol={}", "x".repeat(300))])).unwrap_err();
        assert!(e.to_string().contains("255 bytes"), "{e}");
        assert_eq!(detached(&[]).unwrap_err().kind(), ErrorKind::Unsupported);
    }
}
