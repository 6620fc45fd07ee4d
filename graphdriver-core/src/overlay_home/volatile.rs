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
    let boot = std::fs::read(BOOT_ID).doing(|| format!("reading {BOOT_ID}"))?;
    let mark = layer.join("volatile");
    std::fs::write(&mark, boot).doing(|| format!("writing {}", mark.display()))?;
    // The mark has to be there after a crash, or the loss would go unnoticed.
    durable::flush(layer)
}

/// Flushes what a volatile mount wrote, and lets the layer be mounted again. Nothing if there was none.
pub(super) fn settle(layer: &Path) -> Result<()> {
    let mark = layer.join("volatile");
    let boot = match std::fs::read(&mark) {
        Err(e) if e.kind() == Io::NotFound => return Ok(()),
        read => read.doing(|| format!("reading {}", mark.display()))?,
    };
    if boot != std::fs::read(BOOT_ID).doing(|| format!("reading {BOOT_ID}"))? {
        let why = "it was mounted with volatile=on when the machine stopped, and may have lost anything";
        return Err(
            Error::new(ErrorKind::Corrupt, why).hint("save what you can from a read-only mount, then remove it")
        );
    }
    durable::flush(layer)?;
    // overlayfs refuses a layer with this directory: kernel `overlayfs.rst`, "Volatile mount".
    let refusal = layer.join("work/work/incompat/volatile");
    for done in [std::fs::remove_dir_all(refusal), std::fs::remove_file(mark)] {
        match done {
            Err(e) if e.kind() != Io::NotFound => return Err(e.into()),
            _ => {}
        }
    }
    Ok(())
}
