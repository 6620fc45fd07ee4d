//! What containerd's clients do with recipes, beside carrying them out.

use super::{Engine, page};
use graphdriver_core::{LayerId, LayerKind, Mount, OverlayXattrs};

/// BuildKit mounts overlays with `redirect_dir=off`, with which the kernel refuses `metacopy=on`, and reads the upper directory,
/// where files that were only chmodded would have no data.
pub(super) fn without_metacopy(recipe: &mut [Mount]) {
    for option in recipe.iter_mut().filter(|step| step.fstype == "overlay").flat_map(|step| &mut step.options) {
        if option == "metacopy=on" {
            *option = "metacopy=off".into();
        }
    }
}

/// What the names of snapshots begin with that containerd unpacks into, after what containerd's metadata store puts before every name: the
/// namespace and a number, `default/7/extract-123456789-AbCd sha256:…` (containerd, `snapshots.UnpackKeyPrefix`).
const PREFIX: &str = "extract-";

/// The recipe of an active snapshot, for whoever unpacks into it.
///
/// containerd does not carry out a mount of the type `overlay` to apply a layer: it writes to the upper directory, whiteouts
/// as overlayfs has them. That is what layers of a union filesystem in user space are, too, and spares each file the way
/// through FUSE. Whoever does mount it sees the same tree: all layers below are committed, so plain overlayfs layers.
pub(super) fn for_unpacking(
    engine: &Engine,
    key: &str,
    kind: LayerKind,
    layer: LayerId,
    recipe: Vec<Mount>,
) -> Vec<Mount> {
    let directly = || {
        let own = key.splitn(3, '/').nth(2).unwrap_or(key);
        if kind != LayerKind::Active || !own.starts_with(PREFIX) {
            return None;
        }
        let [step] = &recipe[..] else { return None };
        let dir = engine.layers.driver().diff_dir(layer)?;
        let overlay = (step.fstype.starts_with("fuse.") && dir.xattrs == OverlayXattrs::Trusted)
            .then(|| vec![as_overlay(step)])?;
        page::check(&overlay).ok().map(|()| overlay)
    };
    directly().unwrap_or(recipe)
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
