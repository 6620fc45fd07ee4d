//! Whether a filesystem enforces project quotas, and what it lacks.

use super::{
    kernel::{Activity, Kernel},
    tag,
};
use graphdriver_core::{Context, Error, ErrorKind, Result, mount};
use rustix::{
    fs::{self, AtFlags, CWD, StatxFlags},
    io::Errno,
};
use std::{os::fd::AsFd, path::Path};

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

/// Tries it out with `scratch`, an empty directory of the caller's own on that filesystem, which is put into `project` and
/// out of it again. Fails with `Unsupported`, and says what exactly is missing and what brings it.
pub fn probe(scratch: &Path, project: u32) -> Result<()> {
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
    match tag::tag_dir(dir.as_fd(), project) {
        Err(Errno::OPNOTSUPP | Errno::NOTTY | Errno::INVAL) if place.fstype == "ext4" => return place.ext4_feature(),
        tagged => tagged.doing(|| "giving a directory a project").hint(|| "run as root outside of user namespaces")?,
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
    // The kernel tells quotas of projects to none but the administrator.
    let privilege = || "run as root outside of user namespaces, with CAP_SYS_ADMIN";
    kernel.get(project).map(drop).hint(privilege)
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
