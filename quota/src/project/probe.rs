//! Whether a filesystem enforces project quotas, and what it lacks.

use super::{
    kernel::{Activity, Kernel},
    named_elsewhere, tag,
};
use crate::State;
use graphdriver_core::{Context, Error, ErrorKind, Result, mount};
use rustix::{
    fs::{self, AtFlags, CWD, StatxFlags},
    io::Errno,
};
use std::{ops::RangeInclusive, os::fd::AsFd, path::Path};

/// What is to be said of the filesystem that the directory is on.
struct Filesystem {
    fstype: String,
    /// Where it is mounted, and from what.
    target: String,
    source: String,
}

impl Filesystem {
    fn of(dir: &Path) -> Result<Filesystem> {
        let found = fs::statx(CWD, dir, AtFlags::empty(), StatxFlags::MNT_ID)?.stx_mnt_id;
        let mount = mount::table()?.into_iter().find(|mount| mount.id == found);
        let mount = mount.ok_or_else(|| Error::new(ErrorKind::Io, "its mount is not in /proc/self/mountinfo"))?;
        Ok(Filesystem {
            fstype: mount.fstype.to_string_lossy().into(),
            target: mount.mount_point.display().to_string(),
            source: mount.source.to_string_lossy().into(),
        })
    }

    fn refuse<T>(&self, missing: &str, remedy: String) -> Result<T> {
        let why = format!("no project quotas on {} ({} at {}): {missing}", self.fstype, self.source, self.target);
        Err(Error::new(ErrorKind::Unsupported, why).hint(remedy))
    }

    fn mount_option(&self, option: &str) -> String {
        let Filesystem { source, target, .. } = self;
        match target.as_str() {
            "/" => format!("boot with rootflags={option}"),
            _ => format!(
                "umount {target} && mount -o {option} {source} {target}, and {option} in /etc/fstab; a remount is not enough"
            ),
        }
    }

    fn ext4_feature<T>(&self) -> Result<T> {
        let missing = "it was made without the features project and quota";
        let tune = format!(
            "on a kernel with CONFIG_QFMT_V2, and with the filesystem unmounted: tune2fs -O project,quota -Q prjquota {}, then {}",
            self.source,
            self.mount_option("prjquota")
        );
        self.refuse(missing, tune)
    }
}

#[cfg(test)]
pub(super) fn fstype(dir: &Path) -> String {
    Filesystem::of(dir).expect("it is mounted").fstype
}

/// How many numbers are looked at to find one for the trial, which takes no harm from a project that somebody has.
const TRIED: usize = 1000;

/// The kernel gives projects, and tells of their quotas, to none but the administrator.
const PRIVILEGE: &str = "run as root outside of user namespaces, with CAP_SYS_ADMIN";

/// Tries it out with `scratch`, an empty directory of the caller's own on that filesystem, which is put into a project of
/// the range and out of it again. Fails with `Unsupported`, and says what exactly is missing and what brings it.
pub fn probe(scratch: &Path, range: &RangeInclusive<u32>) -> Result<()> {
    let place = Filesystem::of(scratch)?;
    match place.fstype.as_str() {
        "xfs" | "ext4" => {}
        _ => {
            let remedy = "put the data root on xfs mounted with pquota, or on ext4 with the features project and quota mounted with prjquota";
            return place.refuse("only xfs and ext4 have them", remedy.into());
        }
    }
    let kernel = Kernel::of(scratch)?;
    let activity = kernel.activity()?;
    refuse_kernel(&place, activity)?;
    let dir = tag::open_dir(scratch)?;
    if let Some(outer) = tag::project_of(dir.as_fd())? {
        let why = format!("its directories belong to project {outer} already, and projects do not nest");
        return place.refuse(&why, "use a data root outside that project (lsattr -pd shows it)".into());
    }
    let project = spare(&kernel, range);
    match tag::tag_dir(dir.as_fd(), project) {
        // fileattr_set_prepare of the kernel, before it looks at the filesystem.
        Err(Errno::INVAL) if activity != Activity::Off => {
            return place.refuse("the kernel lets no projects be given in a user namespace", PRIVILEGE.into());
        }
        Err(Errno::OPNOTSUPP | Errno::NOTTY | Errno::INVAL) if place.fstype == "ext4" => return place.ext4_feature(),
        tagged => tagged.doing(|| "giving a directory a project").hint(|| PRIVILEGE)?,
    };
    tag::tag_dir(dir.as_fd(), 0).doing(|| "taking a directory out of a project")?;
    match (activity, place.fstype.as_str()) {
        (Activity::Enforces, _) => {}
        (Activity::Off, "ext4") => return place.ext4_feature(),
        (Activity::Counts, "ext4") => {
            return place.refuse("they are counted and not enforced", place.mount_option("prjquota"));
        }
        (Activity::Counts, _) => return place.refuse("it is mounted with pqnoenforce", place.mount_option("pquota")),
        _ => return place.refuse("it is mounted without pquota", place.mount_option("pquota")),
    }
    kernel.get(project).map(drop).hint(|| PRIVILEGE)
}

/// A project to try things out with for a moment: the last that is nobody's, far from where new ones are looked for. The last
/// of all where none is left, or where the kernel does not tell.
pub(super) fn spare(kernel: &Kernel, range: &RangeInclusive<u32>) -> u32 {
    let named = named_elsewhere();
    let is_free =
        |project: &u32| !named.contains(project) && matches!(kernel.get(*project), Ok(s) if s == State::default());
    range.clone().rev().take(TRIED).find(is_free).unwrap_or(*range.end())
}

/// Kernels that could not do it however the filesystem was mounted.
fn refuse_kernel(place: &Filesystem, activity: Activity) -> Result<()> {
    if activity == Activity::NoSystemCall {
        let remedy = "use a kernel with CONFIG_QUOTA, CONFIG_QUOTACTL and CONFIG_XFS_QUOTA (xfs) or CONFIG_QFMT_V2 (ext4), then mount with pquota (xfs) or prjquota (ext4)";
        return place.refuse("the kernel has no quotas", remedy.into());
    }
    let has = |path: &str| Path::new(path).exists();
    match place.fstype.as_str() {
        // Made by xfs_qm.c and dquot.c of the kernel.
        "xfs" if !has("/proc/fs/xfs/xqmstat") => place.refuse(
            "the kernel has no quotas of xfs",
            format!("use a kernel with CONFIG_XFS_QUOTA, then {}", place.mount_option("pquota")),
        ),
        "ext4" if !has("/proc/sys/fs/quota") => place.refuse(
            "the kernel has no quotas of ext4",
            format!("use a kernel with CONFIG_QUOTA and CONFIG_QFMT_V2, then {}", place.mount_option("prjquota")),
        ),
        _ => Ok(()),
    }
}
