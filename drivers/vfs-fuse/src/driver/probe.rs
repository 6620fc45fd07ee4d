//! What vfs-fuse can do here: is there FUSE, the program, and a filesystem that holds the layers.

use super::{FSTYPE, SOURCE, options::Wishes};
use crate::{claim, config::CopyUp, extent};
use graphdriver_core::{
    Context, CopyUnit, Error, ErrorKind, OverlayXattrs, Result, mount,
    overlay_home::{Trial, adopt_unmet, backing, nearest_existing, recipe},
};
use rustix::fs::{self, CWD, FileType, Mode, OFlags};
use std::path::{Path, PathBuf};

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Support {
    /// The filesystem's type.
    pub backing: String,
    /// The namespace of xattrs that may be written here.
    pub xattrs: OverlayXattrs,
    /// Deletions can be kept as the kernel's overlay does.
    pub whiteouts: bool,
    /// What a copy-up moves at the least.
    pub unit: CopyUnit,
    /// The program that serves the mounts.
    pub program: PathBuf,
}

/// Looks at the machine, and at the filesystem that `home` is on or would be on. With `try_it`, mounts a trial too.
pub(super) fn support(home: &Path, wishes: &Wishes, try_it: bool) -> Result<Support> {
    mount::has_fuse()?;
    let name = wishes.program.as_deref().unwrap_or(SOURCE);
    let program = mount::fuse_program(name).map_err(|e| match wishes.program {
        Some(_) => e.hint("correct vfs-fuse.mount_program"),
        None => Error::new(e.kind(), e.reason()).hint(
            "cargo build --release -p graphdriver-vfs-fuse, and put vfs-fuse beside graphdriver; or name it with vfs-fuse.mount_program",
        ),
    })?;
    let dir = nearest_existing(home)?;
    let trial = Trial::new(&dir).map_err(|e| adopt_unmet(&e, &dir))?;
    if try_it {
        run(&trial, wishes)?;
    }
    Ok(Support {
        backing: backing(&dir),
        xattrs: trial.xattrs(),
        whiteouts: fs::mknodat(CWD, trial.path().join("whiteout"), FileType::CharacterDevice, Mode::empty(), 0).is_ok(),
        unit: unit(&trial, wishes.copy_up)?,
        program,
    })
}

/// How the program's own choice will fall on this filesystem.
fn unit(trial: &Trial, copy_up: CopyUp) -> Result<CopyUnit> {
    let reflinks = || trial.reflinks();
    let extents = || -> Result<CopyUnit> {
        let dir = fs::openat(CWD, trial.path(), OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        let unit = extent::probe(std::os::fd::AsFd::as_fd(&dir)).doing(|| "looking for holes in files")?;
        Ok(unit.map_or(CopyUnit::File, |unit| CopyUnit::Extent { bytes: unit.0.into() }))
    };
    match copy_up {
        CopyUp::Auto | CopyUp::Reflink if reflinks() => Ok(CopyUnit::Reflink),
        CopyUp::Auto | CopyUp::Extent => extents(),
        CopyUp::Reflink | CopyUp::Full => Ok(CopyUnit::File),
    }
}

/// Shows a lower and an upper directory, and changes something.
fn run(trial: &Trial, wishes: &Wishes) -> Result<()> {
    let [lower, upper, work] = ["lower", "upper", "work"].map(|name| trial.path().join(name));
    for dir in [&lower, &upper, &work] {
        std::fs::create_dir(dir)?;
    }
    let options = wishes.everywhere.iter().chain(&wishes.writable).cloned();
    let recipe = recipe(&fstype(wishes), SOURCE, &[lower], Some((&upper, &work)), options)?;
    let root = mount::detached(&[recipe])?;
    fs::mkdirat(&root, "made", Mode::from(0o755)).doing(|| "making a directory in a trial mount")?;
    if !upper.join("made").is_dir() {
        return Err(Error::new(ErrorKind::Unsupported, "what is written to a trial mount does not get to its layer"));
    }
    drop(root);
    // The daemon is to be gone before its directories are.
    claim::claim(&upper, claim::PATIENCE).map(drop)
}

/// A path after the dot is run as it is, by mount.fuse3 too.
pub(super) fn fstype(wishes: &Wishes) -> String {
    wishes.program.as_ref().map_or_else(|| FSTYPE.into(), |program| format!("fuse.{program}"))
}
