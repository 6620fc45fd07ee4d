//! Whose a file is: what the disk says, what an xattr says in its place, and what the mount shows.
//!
//! Three views of one file: the inode on disk; the *stored* owner, which is the inode's unless an xattr replaces it
//! (`xattr_permissions`); and the *shown* owner, which is the stored one through the id maps and squashed.
//!
//! The xattr's value is `UID:GID:MODE[:TYPE]`, ids decimal, the mode octal, the type one of `file`, `dir`, `symlink`,
//! `pipe`, `socket`, `block-MAJOR-MINOR` and `char-MAJOR-MINOR`, as containers/storage and fuse-overlayfs read it.
//! Whether a layer has such xattrs is written on its root directory: it has one, or the layer has none.

use crate::config::{Config, IdMap, Squash, XattrPermissions};
use graphdriver_core::{Context, Error, ErrorKind};
use rustix::{
    fs::{FileType, XattrFlags, fstat, getxattr, major, makedev, minor, setxattr},
    io::{Errno, Result},
};
use std::{
    ffi::OsStr,
    fmt::Write as _,
    os::fd::{AsFd, AsRawFd},
};

/// Type, permissions, owner and device number of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    /// As `st_mode`: type and permissions.
    pub mode: u32,
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Device number, as makedev(3) packs it; 0 if it is no device.
    pub rdev: u64,
}

/// The xattr that has a layer's owners.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// `xattr_permissions=1`.
    Privileged,
    /// `xattr_permissions=2`, also what containers/storage writes.
    Containers,
    /// `xattr_permissions=2` of fuse-overlayfs up to 1.x.
    Legacy,
}

impl Place {
    /// In the order in which a layer's root is asked.
    const ALL: [Place; 3] = [Place::Privileged, Place::Containers, Place::Legacy];

    const fn name(self) -> &'static str {
        match self {
            Place::Privileged => "security.fuseoverlayfs.override_stat",
            Place::Containers => "user.containers.override_stat",
            Place::Legacy => "user.fuseoverlayfs.override_stat",
        }
    }

    const fn option(self) -> XattrPermissions {
        match self {
            Place::Privileged => XattrPermissions::Privileged,
            Place::Containers | Place::Legacy => XattrPermissions::Containers,
        }
    }
}

/// Whether an xattr is one that owners are kept in. The mount neither shows nor sets these, else who may write a file
/// could make it anybody's.
pub fn is_reserved(name: &OsStr) -> bool {
    Place::ALL.iter().any(|p| name == p.name())
}

/// How the owners of one layer's files are read, shown and stored.
#[derive(Debug, Clone)]
pub struct Overrides {
    uids: IdMap,
    gids: IdMap,
    squash: Squash,
    overflow: (u32, u32),
    place: Option<Place>,
}

impl Overrides {
    /// As the settings say, whatever is on the layer's root.
    pub fn new(config: &Config) -> Self {
        let place = match config.xattr_permissions {
            XattrPermissions::Off => None,
            XattrPermissions::Privileged => Some(Place::Privileged),
            XattrPermissions::Containers => Some(Place::Containers),
        };
        let overflow = (overflow_id("/proc/sys/kernel/overflowuid"), overflow_id("/proc/sys/kernel/overflowgid"));
        Overrides { uids: config.uids.clone(), gids: config.gids.clone(), squash: config.squash, overflow, place }
    }

    /// For a lower layer: owners are where its root says.
    pub fn of_lower(config: &Config, root: impl AsFd) -> Result<Self> {
        Ok(Overrides { place: marker(root)?, ..Overrides::new(config) })
    }

    /// For the upper layer: as its root says, else as the settings say, which is then written on the root so that the
    /// layer can be read later, without the settings.
    pub fn of_upper(config: &Config, root: impl AsFd) -> graphdriver_core::Result<Self> {
        let wanted = Overrides::new(config);
        let found = marker(&root).doing(|| "reading the upper directory's xattrs")?;
        match (found, wanted.place) {
            (Some(found), Some(_)) if found.option() != config.xattr_permissions => {
                return Err(Error::new(
                    ErrorKind::InvalidInput,
                    format!("xattr_permissions: the upper layer already keeps its owners in {}", found.name()),
                )
                .hint(format!("mount it with xattr_permissions={}", found.option() as u8)));
            }
            (None, Some(_)) => wanted.mark(&root)?,
            _ => {}
        }
        Ok(Overrides { place: found.or(wanted.place), ..wanted })
    }

    /// The xattr to read and to write, if owners are not in the inode.
    pub fn name(&self) -> Option<&'static str> {
        self.place.map(Place::name)
    }

    /// Whether a file of this type on disk has the xattr. `user.` xattrs are for files and directories only, and
    /// fuse-overlayfs reads none of others either: their inodes say whose they are.
    pub fn can_hold(&self, mode: u32) -> bool {
        let kind = FileType::from_raw_mode(mode);
        self.place.is_some() && matches!(kind, FileType::RegularFile | FileType::Directory)
    }

    /// The mode that a new file gets on disk. With an xattr for the true one the daemon must be able to read and write
    /// it whoever it is, so it is 0755; and what only root may make is made as an empty file, if the daemon need not be.
    pub fn disk_mode(&self, mode: u32) -> u32 {
        match (self.place, FileType::from_raw_mode(mode)) {
            (None, _) | (_, FileType::Symlink) => mode,
            (_, kind @ (FileType::RegularFile | FileType::Directory)) => kind.as_raw_mode() | 0o755,
            (Some(Place::Privileged), _) => mode,
            _ => FileType::RegularFile.as_raw_mode() | 0o755,
        }
    }

    /// What a file is before ids are mapped: `disk` as stat has it, or what its xattr says. An xattr that cannot be
    /// read as one is EIO: the inode's owner would be a guess, and 0755 is more than its owner may have wanted.
    pub fn stored(&self, disk: Owner, xattr: Option<&[u8]>) -> Result<Owner> {
        match xattr.filter(|_| self.can_hold(disk.mode)) {
            Some(value) => parse(disk, value).ok_or(Errno::IO),
            None => Ok(disk),
        }
    }

    /// What the mount shows of what is stored.
    pub fn shown(&self, stored: Owner) -> Owner {
        let uid = self.squash.uid.or_else(|| to_shown(&self.uids, stored.uid)).unwrap_or(self.overflow.0);
        let gid = self.squash.gid.or_else(|| to_shown(&self.gids, stored.gid)).unwrap_or(self.overflow.1);
        Owner { uid, gid, ..stored }
    }

    /// [`stored`](Self::stored) and [`shown`](Self::shown) in one.
    pub fn show(&self, disk: Owner, xattr: Option<&[u8]>) -> Result<Owner> {
        Ok(self.shown(self.stored(disk, xattr)?))
    }

    /// The xattr's value for a stored owner (ids of the disk, not shown ones); `None` where the inode has it all.
    pub fn store(&self, stored: Owner) -> Option<Vec<u8>> {
        self.place.map(|_| format_owner(stored).into_bytes())
    }

    /// The user to store for one that a caller means. One that is not mapped is EINVAL, as for chown in a user
    /// namespace; making a file as one is EOVERFLOW there.
    pub fn to_disk_uid(&self, uid: u32) -> Result<u32> {
        to_disk(&self.uids, uid)
    }

    /// The same for groups.
    pub fn to_disk_gid(&self, gid: u32) -> Result<u32> {
        to_disk(&self.gids, gid)
    }

    fn mark(&self, root: impl AsFd) -> graphdriver_core::Result<()> {
        let Some(name) = self.name() else { return Ok(()) };
        let stat = fstat(&root).doing(|| "reading the upper directory's owner")?;
        let owner = Owner { mode: stat.st_mode, uid: stat.st_uid, gid: stat.st_gid, rdev: 0 };
        setxattr(proc_path(&root), name, format_owner(owner).as_bytes(), XattrFlags::CREATE)
            .doing(|| format!("xattr_permissions: setting {name} on the upper directory"))
            .map_err(|e| match name.starts_with("security.") {
                true => e.hint("xattr_permissions=1 needs CAP_SYS_ADMIN; xattr_permissions=2 does not"),
                false => e.hint("the upper directory's filesystem must have user xattrs"),
            })
    }
}

/// The xattr a layer's root has. A filesystem without xattrs has none.
fn marker(root: impl AsFd) -> Result<Option<Place>> {
    let path = proc_path(root);
    for place in Place::ALL {
        match getxattr(&path, place.name(), &mut [0u8; 0][..]) {
            Ok(_) => return Ok(Some(place)),
            Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::PERM) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(None)
}

/// By this name also descriptors opened with O_PATH can be asked for xattrs.
fn proc_path(fd: impl AsFd) -> String {
    format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd())
}

fn overflow_id(path: &str) -> u32 {
    std::fs::read_to_string(path).ok().and_then(|id| id.trim().parse().ok()).unwrap_or(65534)
}

fn to_shown(map: &IdMap, id: u32) -> Option<u32> {
    if map.0.is_empty() {
        return Some(id);
    }
    map.0.iter().find_map(|r| id.checked_sub(r.disk).filter(|&n| n < r.count).map(|n| r.shown + n))
}

fn to_disk(map: &IdMap, id: u32) -> Result<u32> {
    if map.0.is_empty() {
        return Ok(id);
    }
    let found = map.0.iter().find_map(|r| id.checked_sub(r.shown).filter(|&n| n < r.count).map(|n| r.disk + n));
    found.ok_or(Errno::INVAL)
}

fn format_owner(owner: Owner) -> String {
    let mut value = format!("{}:{}:{:04o}:", owner.uid, owner.gid, owner.mode & 0o7777);
    let (major, minor) = (major(owner.rdev), minor(owner.rdev));
    let kind = match FileType::from_raw_mode(owner.mode) {
        FileType::Directory => "dir",
        FileType::Symlink => "symlink",
        FileType::Fifo => "pipe",
        FileType::Socket => "socket",
        FileType::BlockDevice => return write_device(value, "block", major, minor),
        FileType::CharacterDevice => return write_device(value, "char", major, minor),
        _ => "file",
    };
    value.push_str(kind);
    value
}

fn write_device(mut value: String, kind: &str, major: u32, minor: u32) -> String {
    write!(value, "{kind}-{major}-{minor}").expect("a String takes everything");
    value
}

/// `disk` with what the value says. The type counts only for a regular file: that is what stands for a file that could
/// not be made. fuse-overlayfs writes the mode with the type's bits, and no type.
fn parse(disk: Owner, value: &[u8]) -> Option<Owner> {
    let mut parts = std::str::from_utf8(value).ok()?.trim_end_matches('\0').split(':');
    let uid = parts.next()?.parse().ok()?;
    let gid = parts.next()?.parse().ok()?;
    let permissions = u32::from_str_radix(parts.next()?, 8).ok()? & 0o7777;
    let (mut kind, mut rdev) = (FileType::from_raw_mode(disk.mode), disk.rdev);
    if let (FileType::RegularFile, Some(named)) = (kind, parts.next()) {
        (kind, rdev) = parse_kind(named)?;
    }
    Some(Owner { mode: kind.as_raw_mode() | permissions, uid, gid, rdev })
}

fn parse_kind(named: &str) -> Option<(FileType, u64)> {
    let mut parts = named.split('-');
    Some(match parts.next()? {
        "file" => (FileType::RegularFile, 0),
        "pipe" => (FileType::Fifo, 0),
        "socket" => (FileType::Socket, 0),
        kind @ ("block" | "char") => {
            let (major, minor) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
            let kind = if kind == "char" { FileType::CharacterDevice } else { FileType::BlockDevice };
            (kind, makedev(major, minor))
        }
        // A regular file does not stand for a directory or a symlink: those can be made everywhere.
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::IdRange;
    use proptest::prelude::*;
    use std::{
        fs::{File, Permissions},
        os::unix::fs::PermissionsExt,
    };

    const FILE: u32 = 0o100000;

    fn range(disk: u32, shown: u32, count: u32) -> IdRange {
        IdRange { shown, disk, count }
    }

    fn mapped() -> Overrides {
        let uids = IdMap(vec![range(0, 1000, 1), range(1, 110_000, 100)]);
        let gids = IdMap(vec![range(0, 2000, 1)]);
        Overrides::new(&Config { uids, gids, ..Config::default() })
    }

    fn with(xattr_permissions: XattrPermissions) -> Overrides {
        Overrides::new(&Config { xattr_permissions, ..Config::default() })
    }

    fn owner(mode: u32, uid: u32, gid: u32) -> Owner {
        Owner { mode, uid, gid, rdev: 0 }
    }

    #[test]
    fn ids_are_mapped_both_ways() {
        let o = mapped();
        assert_eq!(o.shown(owner(FILE, 0, 0)), owner(FILE, 1000, 2000));
        assert_eq!(o.shown(owner(FILE, 100, 0)), owner(FILE, 110_099, 2000));
        assert_eq!(o.shown(owner(FILE, 101, 1)), owner(FILE, 65534, 65534));
        assert_eq!(o.to_disk_uid(110_000), Ok(1));
        assert_eq!(o.to_disk_uid(110_099), Ok(100));
        assert_eq!(o.to_disk_uid(110_100), Err(Errno::INVAL));
        assert_eq!(o.to_disk_uid(0), Err(Errno::INVAL));
        assert_eq!(o.to_disk_gid(2000), Ok(0));
        assert_eq!(o.to_disk_gid(65534), Err(Errno::INVAL));
    }

    #[test]
    fn without_maps_ids_are_as_they_are() {
        let o = with(XattrPermissions::Off);
        assert_eq!(o.shown(owner(FILE, 7, u32::MAX)), owner(FILE, 7, u32::MAX));
        assert_eq!((o.to_disk_uid(7), o.to_disk_gid(u32::MAX)), (Ok(7), Ok(u32::MAX)));
    }

    #[test]
    fn squashing_shows_one_owner_and_stores_the_true_one() {
        let squash = Squash { uid: Some(5), gid: None };
        let o = Overrides { squash, ..mapped() };
        assert_eq!(o.shown(owner(FILE, 9999, 0)), owner(FILE, 5, 2000));
        assert_eq!(o.to_disk_uid(1000), Ok(0));
    }

    #[test]
    fn values_of_others_are_read() {
        let o = with(XattrPermissions::Containers);
        let disk = owner(FILE | 0o755, 1, 2);
        let read = |value: &str| o.stored(disk, Some(value.as_bytes()));
        // containers/storage, fuse-overlayfs (with the type's bits), fuse-overlayfs 2.
        assert_eq!(read("7:8:0644:file"), Ok(owner(FILE | 0o644, 7, 8)));
        assert_eq!(read("7:8:104711"), Ok(owner(FILE | 0o4711, 7, 8)));
        assert_eq!(read("7:8:640"), Ok(owner(FILE | 0o640, 7, 8)));
        assert_eq!(read("0:0:0600:char-10-229"), Ok(Owner { rdev: makedev(10, 229), ..owner(0o20600, 0, 0) }));
        assert_eq!(read("0:0:0600:block-259-70000-x"), Ok(Owner { rdev: makedev(259, 70000), ..owner(0o60600, 0, 0) }));
        assert_eq!(read("0:0:1600:pipe"), Ok(owner(0o11600, 0, 0)));
        assert_eq!(read("0:0:0600:socket"), Ok(owner(0o140600, 0, 0)));
        for bad in ["", "1", "1:2", "1:2:8", "-1:2:644", "1:2:644:dir", "1:2:644:char-1", "4294967296:0:644", "a:b:c"] {
            assert_eq!(read(bad), Err(Errno::IO), "{bad}");
        }
        assert_eq!(o.stored(disk, None), Ok(disk));
        assert_eq!(o.stored(disk, Some(b"\xff:1:644")), Err(Errno::IO));
    }

    #[test]
    fn a_type_that_cannot_have_the_xattr_is_as_the_disk_has_it() {
        let link = owner(0o120777, 1, 2);
        assert_eq!(with(XattrPermissions::Containers).stored(link, Some(b"7:8:0644:file")), Ok(link));
        assert_eq!(with(XattrPermissions::Off).stored(link, Some(b"7:8:0644:file")), Ok(link));
        let pipe = owner(0o10644, 1, 2);
        assert_eq!(with(XattrPermissions::Privileged).stored(pipe, Some(b"7:8:0777:pipe")), Ok(pipe));
    }

    #[test]
    fn values_are_written_as_containers_storage_does() {
        let o = with(XattrPermissions::Containers);
        let text = |owner| String::from_utf8(o.store(owner).unwrap()).unwrap();
        assert_eq!(text(owner(FILE | 0o644, 7, 8)), "7:8:0644:file");
        assert_eq!(text(owner(0o41777, 0, 0)), "0:0:1777:dir");
        assert_eq!(text(Owner { rdev: makedev(1, 3), ..owner(0o20666, 0, 5) }), "0:5:0666:char-1-3");
        assert_eq!(with(XattrPermissions::Off).store(owner(FILE, 0, 0)), None);
    }

    #[test]
    fn what_cannot_be_made_is_a_file_on_disk() {
        let o = with(XattrPermissions::Containers);
        assert_eq!(o.disk_mode(0o20600), 0o100755);
        assert_eq!(o.disk_mode(0o140600), 0o100755);
        assert_eq!(o.disk_mode(0o41700), 0o40755);
        assert_eq!(o.disk_mode(0o120777), 0o120777);
        assert_eq!(with(XattrPermissions::Privileged).disk_mode(0o20600), 0o20600);
        assert_eq!(with(XattrPermissions::Privileged).disk_mode(0o100600), 0o100755);
        assert_eq!(with(XattrPermissions::Off).disk_mode(0o20600), 0o20600);
    }

    #[test]
    fn a_layers_root_says_where_its_owners_are() {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let root = File::open(dir.path()).unwrap();
        root.set_permissions(Permissions::from_mode(0o700)).unwrap();
        let off = Config::default();
        let on = Config { xattr_permissions: XattrPermissions::Containers, ..Config::default() };
        assert_eq!(Overrides::of_lower(&on, &root).unwrap().name(), None);
        assert_eq!(Overrides::of_upper(&on, &root).unwrap().name(), Some("user.containers.override_stat"));
        let value = xattr::get(dir.path(), "user.containers.override_stat").unwrap().unwrap();
        assert!(value.ends_with(b":0700:dir"), "{value:?}");
        for config in [&on, &off] {
            assert_eq!(Overrides::of_lower(config, &root).unwrap().name(), Some("user.containers.override_stat"));
            assert_eq!(Overrides::of_upper(config, &root).unwrap().name(), Some("user.containers.override_stat"));
        }
        let other = Config { xattr_permissions: XattrPermissions::Privileged, ..Config::default() };
        let error = Overrides::of_upper(&other, &root).unwrap_err();
        assert!(error.to_string().contains("mount it with xattr_permissions=2"), "{error}");
        xattr::remove(dir.path(), "user.containers.override_stat").unwrap();
        xattr::set(dir.path(), "user.fuseoverlayfs.override_stat", b"0:0:40755").unwrap();
        assert_eq!(Overrides::of_upper(&on, &root).unwrap().name(), Some("user.fuseoverlayfs.override_stat"));
    }

    #[test]
    fn the_xattrs_are_reserved() {
        assert!(is_reserved(OsStr::new("user.containers.override_stat")));
        assert!(is_reserved(OsStr::new("security.fuseoverlayfs.override_stat")));
        assert!(!is_reserved(OsStr::new("user.containers.override_statx")));
    }

    proptest! {
        #[test]
        fn stored_owners_come_back(
            kind in prop::sample::select(vec![0o100000u32, 0o40000, 0o20000, 0o60000, 0o10000, 0o140000]),
            permissions in 0u32..0o10000, uid: u32, gid: u32, major in 0u32..4096, minor in 0u32..(1 << 20),
        ) {
            let o = with(XattrPermissions::Containers);
            let rdev = if matches!(kind, 0o20000 | 0o60000) { makedev(major, minor) } else { 0 };
            let owner = Owner { mode: kind | permissions, uid, gid, rdev };
            let disk = Owner { mode: o.disk_mode(owner.mode), uid: 1, gid: 1, rdev: 0 };
            prop_assert_eq!(o.stored(disk, o.store(owner).as_deref()), Ok(owner));
        }

        #[test]
        fn a_mapped_id_comes_back(
            disk in 0u32..1 << 30, shown in 0u32..1 << 30, count in 1u32..1 << 30, id: u32,
        ) {
            let map = IdMap(vec![range(disk, shown, count)]);
            match to_disk(&map, id) {
                Ok(on_disk) => prop_assert_eq!(to_shown(&map, on_disk), Some(id)),
                Err(_) => prop_assert!(id < shown || id >= shown + count),
            }
        }

        #[test]
        fn no_value_makes_it_panic(value: Vec<u8>, text in "[0-9:a-z-]{0,24}") {
            let disk = Owner { mode: 0o100644, uid: 0, gid: 0, rdev: 0 };
            let _ = parse(disk, &value);
            let _ = parse(disk, text.as_bytes());
        }
    }
}
