//! Reading every layer.

use super::{Finding, LOAD_AGAIN};
use crate::engine::Engine;
use graphdriver_core::{ErrorKind, LayerId, LayerKind, Result};
use std::{collections::HashSet, io};

impl Engine {
    /// Reads each layer whose digest is known, as `save` would, but for those that `known` are damaged. How many were
    /// read, and what was found.
    ///
    /// The digest covers the content of files; what is not read from files, names and attributes, is in the layer's
    /// record. So the number of files is compared too, with the one when the layer was committed.
    pub(super) fn compare_digests(&self, known: &HashSet<LayerId>) -> Result<(usize, Vec<Finding>)> {
        let (mut read, mut found) = (0, Vec::new());
        for layer in self.layers.list()? {
            let id = layer.id;
            if layer.kind != LayerKind::Committed || known.contains(&id) {
                continue;
            }
            let (Some(diff), Some(size)) = (layer.diff_id, layer.tar_size) else { continue };
            self.cancel.check()?;
            read += 1;
            let mut wrong = match self.repack(id, diff, size, &mut io::sink()) {
                Err(e) if e.kind() == ErrorKind::Interrupted => return Err(e),
                Err(e) => Some(format!("layer {id} is not what it was: {e}")),
                Ok(()) => None,
            };
            if wrong.is_none() {
                wrong = self.miscounted(id, layer.usage.map(|usage| usage.inodes))?;
            }
            // Removed meanwhile, it is missed by nobody.
            if let Some(what) = wrong.filter(|_| self.layers.get(id).is_ok()) {
                let follows = "what lies on it shows the change, and its images cannot be saved";
                found.push(Finding::damage(what, follows, LOAD_AGAIN).of(id));
            }
        }
        Ok((read, found))
    }

    fn miscounted(&self, id: LayerId, then: Option<u64>) -> Result<Option<String>> {
        let now = match self.layers.driver().usage(id) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            usage => usage?.inodes,
        };
        let then = then.filter(|then| *then != now);
        Ok(then
            .map(|then| format!("layer {id} is not what it was: it had {then} files when it was committed, now {now}")))
    }
}
