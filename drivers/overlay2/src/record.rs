//! What the layers of a data directory are written with.

use crate::{options::Wishes, probe::Support};
use graphdriver_core::{
    Error, ErrorKind, OverlayXattrs, Result,
    overlay_home::{self, Format},
};
use std::{collections::BTreeSet, path::Path};

const FORMAT: Format = Format { line: "graphdriver overlay2 1", features: &["redirect_dir", "metacopy"] };

/// What the version file says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Record {
    pub xattrs: OverlayXattrs,
    pub redirect_dir: bool,
    pub metacopy: bool,
}

impl Record {
    /// None if `home` is empty or not there.
    pub(crate) fn load(home: &Path) -> Result<Option<Record>> {
        let record = overlay_home::Record::load(home, &FORMAT)?;
        Ok(record.map(|record| Record {
            xattrs: record.xattrs,
            redirect_dir: record.uses.contains("redirect_dir"),
            metacopy: record.uses.contains("metacopy"),
        }))
    }

    pub(crate) fn save(&self, home: &Path) -> Result<()> {
        let features = [(self.redirect_dir, "redirect_dir"), (self.metacopy, "metacopy")];
        let uses = features.into_iter().filter(|(on, _)| *on).map(|(_, name)| name).collect::<BTreeSet<_>>();
        overlay_home::Record { xattrs: self.xattrs, uses }.save(home, &FORMAT)
    }
}

/// What layers will be written with: the wishes where they can be met, and in any case what layers there rely on.
pub(crate) fn choose(wishes: &Wishes, support: &Support, record: Option<Record>) -> Result<Record> {
    let refuse = |why: &str, hint: &str| Err(Error::new(ErrorKind::Unsupported, why).hint(hint));
    for (wish, able, name) in [
        (wishes.redirect_dir, support.redirect_dir, "overlay2.redirect_dir"),
        (wishes.metacopy, support.metacopy, "overlay2.metacopy"),
        (Some(wishes.volatile), support.volatile, "overlay2.volatile"),
    ] {
        if wish == Some(true) && !able {
            return refuse(
                &format!("{name}=on does not work on this kernel with {}", support.backing),
                "leave the option out",
            );
        }
    }
    let redirect_dir = wishes.redirect_dir.unwrap_or(support.redirect_dir);
    let metacopy = wishes.metacopy.unwrap_or(support.metacopy) && redirect_dir;
    let Some(record) = record else {
        return Ok(Record { xattrs: support.xattrs, redirect_dir, metacopy });
    };
    if record.xattrs != support.xattrs {
        return refuse(
            &format!(
                "its layers keep overlayfs's attributes in {:?}, and here {:?} has to be used",
                record.xattrs.prefix(),
                support.xattrs.prefix()
            ),
            "root and user namespaces need data roots of their own",
        );
    }
    for (used, now, able, name) in [
        (record.redirect_dir, redirect_dir, support.redirect_dir, "redirect_dir"),
        (record.metacopy, metacopy, support.metacopy, "metacopy"),
    ] {
        if used && !able {
            return refuse(
                &format!("its layers use {name}, which does not work here"),
                "use the kernel they were made with",
            );
        }
        if used && !now {
            return refuse(
                &format!("its layers use {name}, which can no longer be turned off"),
                "leave the option out, or use a new data root",
            );
        }
    }
    Ok(Record { xattrs: support.xattrs, redirect_dir, metacopy })
}
