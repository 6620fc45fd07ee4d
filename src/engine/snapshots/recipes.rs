//! What containerd's clients do with recipes, beside carrying them out.

use super::{Engine, page};
use graphdriver_core::{Context, DiffDir, EscapeXattrs, LayerId, LayerKind, Mount, OverlayXattrs, Result};
use std::{ffi::OsString, fs, os::unix::ffi::OsStrExt, path::Path};

/// BuildKit mounts overlays with `redirect_dir=off`, with which the kernel refuses `metacopy=on`, and reads the upper directory,
/// where files that were only chmodded would have no data.
pub(super) fn without_metacopy(recipe: &mut [Mount]) {
    for option in recipe.iter_mut().filter(|step| step.fstype == "overlay").flat_map(|step| &mut step.options) {
        if option == "metacopy=on" {
            *option = "metacopy=off".into();
        }
    }
}

/// What the names of snapshots begin with that containerd unpacks into, after what its metadata store puts before every
/// name: the namespace and a number, `default/7/extract-123456789-AbCd sha256:…` (containerd, `snapshots.UnpackKeyPrefix`).
const PREFIX: &str = "extract-";

/// The recipe of an active snapshot, for whoever unpacks into it.
///
/// containerd does not carry out a mount of the type `overlay` to apply a layer: it writes to the upper directory, whiteouts
/// as overlayfs has them. That is what layers of a union filesystem in user space are, too, and spares each file the way
/// through FUSE. Whoever does mount it sees the same tree: all layers below are committed, so plain overlayfs layers.
/// [`escape_marks`] has to follow before the commit.
pub(super) fn for_unpacking(
    engine: &Engine,
    key: &str,
    kind: LayerKind,
    layer: LayerId,
    recipe: Vec<Mount>,
) -> Vec<Mount> {
    let directly = || {
        let [step] = &recipe[..] else { return None };
        unpacked(engine, key, layer).filter(|_| kind == LayerKind::Active && step.fstype.starts_with("fuse."))?;
        let overlay = vec![as_overlay(step)];
        page::check(&overlay).ok().map(|()| overlay)
    };
    directly().unwrap_or(recipe)
}

/// Where a layer is unpacked past the program that shows it.
fn unpacked(engine: &Engine, key: &str, layer: LayerId) -> Option<DiffDir> {
    let own = key.splitn(3, '/').nth(2).unwrap_or(key);
    let dir = engine.layers.driver().diff_dir(layer).filter(|_| own.starts_with(PREFIX))?;
    (dir.xattrs == OverlayXattrs::Trusted && dir.escape == EscapeXattrs::Both).then_some(dir)
}

/// What others may write into a layer, and a union filesystem that reads both spellings would take for its own.
const FOREIGN: [&[u8]; 2] = [b"user.overlay.", b"user.fuseoverlayfs."];

/// Takes from an unpacked layer what its tar could make of files: containerd writes all attributes but `trusted.` ones as
/// they are. Those in overlayfs's other namespace get another `overlay.`, and so come out of a mount as they were; those of
/// fuse-overlayfs go, which no mount takes either. Can be repeated.
pub(super) fn escape_marks(engine: &Engine, key: &str, layer: LayerId) -> Result<()> {
    let Some(dir) = unpacked(engine, key, layer) else { return Ok(()) };
    let mut pending = vec![dir.path];
    while let Some(at) = pending.pop() {
        let escaping = || format!("escaping attributes in {}", at.display());
        escape(&at).doing(escaping)?;
        for entry in fs::read_dir(&at).doing(escaping)? {
            let entry = entry.doing(escaping)?;
            let kind = entry.file_type().doing(escaping)?;
            if kind.is_dir() {
                pending.push(entry.path());
            } else if kind.is_file() {
                // Nothing else has `user.` attributes (xattr(7)).
                escape(&entry.path()).doing(escaping)?;
            }
        }
    }
    Ok(())
}

fn escape(path: &Path) -> Result<()> {
    let [overlay, fuse_overlayfs] = FOREIGN;
    for name in xattr::list(path)? {
        let own = name.as_bytes();
        if let Some(rest) = own.strip_prefix(overlay).filter(|rest| !rest.starts_with(b"overlay.")) {
            let mut escaped = OsString::from("user.overlay.overlay.");
            escaped.push(std::ffi::OsStr::from_bytes(rest));
            if let Some(value) = xattr::get(path, &name)? {
                xattr::set(path, escaped, &value)?;
            }
            xattr::remove(path, &name)?;
        } else if own.starts_with(fuse_overlayfs) {
            tracing::warn!("{}: the attribute {} is left out", path.display(), name.display());
            xattr::remove(path, &name)?;
        }
    }
    Ok(())
}

/// Without the options that only the program in user space has. With those of overlayfs that keep its additions to the
/// format out of the layer.
fn as_overlay(step: &Mount) -> Mount {
    let own = ["lowerdir=", "upperdir=", "workdir="];
    let kept = step.options.iter().filter(|option| own.iter().any(|own| option.starts_with(own))).cloned();
    let plain = ["index=off", "metacopy=off"].map(String::from);
    Mount { fstype: "overlay".into(), source: step.source.clone(), options: kept.chain(plain).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlayfs_is_told_of_the_directories_alone() {
        let options = ["lowerdir=/1:/2", "upperdir=/3", "workdir=/w", "volatile", "threads=4", "copy_up=extent"];
        let (fstype, source) = ("fuse./usr/bin/vfs-fuse".into(), "graphdriver:/d:3".into());
        let step = as_overlay(&Mount { fstype, source, options: options.map(String::from).into() });
        assert_eq!(step.fstype, "overlay");
        assert_eq!(step.options, ["lowerdir=/1:/2", "upperdir=/3", "workdir=/w", "index=off", "metacopy=off"]);
    }
}
