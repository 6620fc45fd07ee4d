//! Layers mounted with `volatile`, which promises nothing after a crash of the machine.
//!
//! While such a layer may be mounted, the file `volatile` beside its `diff` holds the kernel's boot identifier. As long
//! as that kernel runs, all that was written is in its cache at the least, and the layer can be settled: flushed, and the
//! marks taken away. Under another kernel nobody knows what is missing, so the layer is refused.

use super::durable;
use crate::{Context, Error, ErrorKind, Result};
use std::{io::ErrorKind as Io, path::Path};

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Marks a layer that is about to be mounted.
pub(super) fn mark(layer: &Path) -> Result<()> {
    let mark = layer.join("volatile");
    std::fs::write(&mark, this_boot()?).doing(|| format!("writing {}", mark.display()))?;
    // The mark has to be there after a crash, or the loss would go unnoticed.
    durable::flush(layer)
}

/// The boot in which the layer was last marked; none if it is not.
fn marked(layer: &Path) -> Result<Option<Vec<u8>>> {
    let mark = layer.join("volatile");
    match std::fs::read(&mark) {
        Err(e) if e.kind() == Io::NotFound => Ok(None),
        read => read.map(Some).doing(|| format!("reading {}", mark.display())),
    }
}

fn this_boot() -> Result<Vec<u8>> {
    std::fs::read(BOOT_ID).doing(|| format!("reading {BOOT_ID}"))
}

/// Whether a volatile mount was cut off by the end of the machine.
pub(super) fn is_lost(layer: &Path) -> Result<bool> {
    Ok(marked(layer)?.is_some_and(|boot| this_boot().is_ok_and(|now| now != boot)))
}

/// Flushes what a volatile mount wrote, and lets the layer be mounted again. Nothing if there was none.
pub(super) fn settle(layer: &Path) -> Result<()> {
    let Some(boot) = marked(layer)? else { return Ok(()) };
    if boot != this_boot()? {
        let why = "it was mounted with volatile=on when the machine stopped, and may have lost anything";
        return Err(
            Error::new(ErrorKind::Corrupt, why).hint("save what you can from a read-only mount, then remove it")
        );
    }
    durable::flush(layer)?;
    // overlayfs refuses a layer with this directory: kernel `overlayfs.rst`, "Volatile mount".
    let refusal = layer.join("work/work/incompat/volatile");
    for done in [std::fs::remove_dir_all(refusal), std::fs::remove_file(layer.join("volatile"))] {
        match done {
            Err(e) if e.kind() != Io::NotFound => return Err(e.into()),
            _ => {}
        }
    }
    Ok(())
}
