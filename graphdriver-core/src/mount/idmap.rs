//! Mounts that show files with other owners than they have on disk (`mount_setattr(2)`, "ID-mapped mounts").

use super::{attach, bind_options, clone_of, detached, open_path, overlay, privately};
use crate::{Context, Error, ErrorKind, Mount, Result, sys};
use rustix::mount::MountAttrFlags;
use std::{
    fmt::Write,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

/// Successive ids on disk, and those that are shown in their place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdRange {
    /// The first on disk.
    pub disk: u32,
    /// The first that is shown.
    pub shown: u32,
    /// How many.
    pub count: u32,
}

/// A new user namespace with these maps, for [`IdMapped::mount`].
///
/// Fails with `Unsupported` where no namespaces can be made, and as the kernel does for maps that it does not take, such as
/// ranges that overlap.
pub fn user_namespace(users: &[IdRange], groups: &[IdRange]) -> Result<OwnedFd> {
    let text = |ranges: &[IdRange]| {
        ranges.iter().fold(String::new(), |mut text, IdRange { disk, shown, count }| {
            writeln!(text, "{disk} {shown} {count}").expect("strings take all");
            text
        })
    };
    sys::user_namespace(&text(users), &text(groups)).doing(|| "making a user namespace that maps ids").map_err(|e| {
        // ENOSPC: the sysctl user.max_user_namespaces.
        if e.kind() == ErrorKind::OutOfSpace { e.with_kind(ErrorKind::Unsupported) } else { e }
    })
}

/// Whether a mount of the filesystem that the directory lies on can be id-mapped by this process, found out by doing it.
pub fn can_id_map(dir: &Path) -> bool {
    let maps = [IdRange { disk: 0, shown: 100_000, count: 1 }];
    let mapped = || id_map(clone_of(open_path(dir)?.as_fd())?.as_fd(), user_namespace(&maps, &maps)?.as_fd());
    mapped().inspect_err(|e: &Error| tracing::debug!("no id-mapped mounts of {}: {e}", dir.display())).is_ok()
}

/// Gives a detached mount the id mapping of a user namespace.
fn id_map(mount: BorrowedFd<'_>, userns: BorrowedFd<'_>) -> Result<()> {
    sys::mount_setattr(mount, false, MountAttrFlags::MOUNT_ATTR_IDMAP, Some(userns))
        .doing(|| "giving a mount an id mapping")
}

/// How what a recipe shows is shown with other ids: by an id-mapped mount, and a recipe that wants it at its place.
///
/// overlayfs itself cannot be id-mapped, but its layers can, the writable one too. So the mount is of the directory that
/// has all layers below it, and the recipe is the same overlay of layers that are found there. Every other recipe is carried
/// out by the mount, and the new recipe is a bind mount of that. Either way files are stored with the ids that they would
/// have without.
///
/// What comes in through the mount by ids that have none on disk is refused with EOVERFLOW, and files with ids on disk that
/// are not mapped belong to nobody. overlayfs makes directories and whiteouts as whoever has mounted it, whose ids have to
/// be mapped, therefore.
#[derive(Debug)]
pub struct IdMapped {
    of: Of,
    recipe: Vec<Mount>,
}

#[derive(Debug)]
enum Of {
    Layers(PathBuf),
    Whole(Vec<Mount>),
}

impl IdMapped {
    /// For `recipe`, shown by a mount at the absolute path `place`. Mounts nothing.
    pub fn plan(recipe: &[Mount], place: &Path) -> Result<IdMapped> {
        if let [step] = recipe
            && step.fstype == "overlay"
        {
            let (base, step) = overlay::moved(step, place)?;
            return Ok(IdMapped { of: Of::Layers(base), recipe: vec![step] });
        }
        let options = bind_options(recipe.iter().flat_map(|step| &step.options));
        let bind = Mount { fstype: "bind".into(), source: place.into(), options };
        Ok(IdMapped { of: Of::Whole(recipe.to_vec()), recipe: vec![bind] })
    }

    /// What to carry out once [`mount`](Self::mount) is attached at the place.
    pub fn recipe(&self) -> &[Mount] {
        &self.recipe
    }

    /// Makes the mount, detached, with the mapping of a [`user_namespace`].
    ///
    /// Fails with `InvalidInput`, `Unsupported` or `PermissionDenied` where the filesystem, the kernel or the caller cannot.
    pub fn mount(&self, userns: BorrowedFd<'_>) -> Result<OwnedFd> {
        let mount = match &self.of {
            Of::Layers(base) => clone_of(open_path(base)?.as_fd())?,
            Of::Whole(recipe) => detached(recipe)?,
        };
        id_map(mount.as_fd(), userns)?;
        Ok(mount)
    }

    /// Carries out the recipe with the mount at its place for this once, in a mount namespace that nobody sees: detached
    /// mounts can be layers of an overlay only since Linux 6.15.
    pub fn carried_out(&self, userns: BorrowedFd<'_>, place: &Path) -> Result<OwnedFd> {
        privately(|| {
            attach(self.mount(userns)?.as_fd(), open_path(place)?.as_fd())?;
            detached(&self.recipe)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{self, AtFlags, Gid, Mode, OFlags, Uid};
    use std::{
        fs::{create_dir_all, metadata, symlink_metadata, write},
        os::unix::fs::{MetadataExt, chown},
    };

    const MAPS: [IdRange; 2] = [IdRange { disk: 0, shown: 1000, count: 10 }, IdRange { disk: 77, shown: 0, count: 1 }];

    fn owner(tree: &OwnedFd, name: &str) -> (u32, u32) {
        let found = fs::statat(tree, name, AtFlags::SYMLINK_NOFOLLOW).unwrap();
        (found.st_uid, found.st_gid)
    }

    /// As user 1003 would, were the caller he.
    fn give(tree: &OwnedFd, name: &str) {
        fs::openat(tree, name, OFlags::CREATE | OFlags::WRONLY, Mode::RUSR).unwrap();
        let (uid, gid) = (Uid::from_raw(1003), Gid::from_raw(1004));
        fs::chownat(tree, name, Some(uid), Some(gid), AtFlags::empty()).unwrap();
    }

    #[test]
    fn an_overlay_of_id_mapped_layers_shows_mapped_owners_and_stores_the_plain_ones() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = |name: &str| tmp.path().join(name);
        ["layers/1", "layers/2", "layers/upper", "layers/work", "place"]
            .iter()
            .for_each(|d| create_dir_all(dir(d)).unwrap());
        write(dir("layers/1/low"), "low").unwrap();
        chown(dir("layers/1/low"), Some(5), Some(6)).unwrap();
        let at = |name: &str| dir("layers").join(name).display().to_string();
        let options = [
            format!("lowerdir={}:{}", at("2"), at("1")),
            format!("upperdir={}", at("upper")),
            format!("workdir={}", at("work")),
            "index=off".into(),
        ];
        let step = Mount { fstype: "overlay".into(), source: "mark".into(), options: options.into() };
        let plan = IdMapped::plan(&[step], &dir("place")).unwrap();
        let [moved] = plan.recipe() else { panic!("{plan:?}") };
        let shown = |name: &str| dir("place").join(name).display().to_string();
        assert_eq!(moved.options[0], format!("lowerdir={}:{}", shown("2"), shown("1")));
        assert_eq!(
            moved.options[1..],
            [format!("upperdir={}", shown("upper")), format!("workdir={}", shown("work")), "index=off".into()]
        );
        assert_eq!(moved.source, Path::new("mark"));

        let userns = user_namespace(&MAPS, &MAPS).unwrap();
        let tree = plan.carried_out(userns.as_fd(), &dir("place")).unwrap();
        assert_eq!((owner(&tree, "."), owner(&tree, "low")), ((1000, 1000), (1005, 1006)));
        fs::chmodat(&tree, "low", Mode::RWXU, AtFlags::empty()).unwrap();
        give(&tree, "new");
        fs::mkdirat(&tree, "by-us", Mode::RWXU).unwrap();
        fs::unlinkat(&tree, "low", AtFlags::empty()).unwrap();
        assert_eq!((owner(&tree, "new"), owner(&tree, "by-us")), ((1003, 1004), (0, 0)));
        let stored = |name: &str| symlink_metadata(dir("layers/upper").join(name)).map(|m| (m.uid(), m.gid())).unwrap();
        assert_eq!((stored("new"), stored("by-us")), ((3, 4), (77, 77)));
        assert_eq!(metadata(dir("layers/1/low")).unwrap().uid(), 5);
    }

    #[test]
    fn anything_else_is_a_bind_mount_of_what_it_shows() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = |name: &str| tmp.path().join(name);
        ["tree", "place"].iter().for_each(|d| create_dir_all(dir(d)).unwrap());
        let recipe = |options: &[&str]| {
            let options = options.iter().map(|o| o.to_string()).collect();
            [Mount { fstype: "bind".into(), source: dir("tree"), options }]
        };
        let plan = IdMapped::plan(&recipe(&["bind", "rw", "nosuid"]), &dir("place")).unwrap();
        let bind = Mount {
            fstype: "bind".into(),
            source: dir("place"),
            options: vec!["bind".into(), "rw".into(), "nosuid".into()],
        };
        assert_eq!(plan.recipe(), [bind]);
        let userns = user_namespace(&MAPS, &MAPS).unwrap();
        let tree = plan.carried_out(userns.as_fd(), &dir("place")).unwrap();
        give(&tree, "new");
        assert_eq!(metadata(dir("tree/new")).unwrap().uid(), 3);
        let plan = IdMapped::plan(&recipe(&["bind", "ro"]), &dir("place")).unwrap();
        let tree = plan.carried_out(userns.as_fd(), &dir("place")).unwrap();
        assert_eq!(owner(&tree, "new"), (1003, 1004));
        assert!(fs::openat(&tree, "other", OFlags::CREATE | OFlags::WRONLY, Mode::RUSR).is_err());
    }

    #[test]
    fn maps_the_kernel_does_not_take_are_an_error_and_no_filesystem_is_taken_at_its_word() {
        let twice = [MAPS[0], MAPS[0]];
        assert_eq!(user_namespace(&twice, &MAPS).unwrap_err().kind(), ErrorKind::InvalidInput);
        assert!(can_id_map(tempfile::tempdir().unwrap().path()) && !can_id_map(Path::new("/proc")));
    }
}
