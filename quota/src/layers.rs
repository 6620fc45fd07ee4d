//! Project quotas for drivers whose layers are directories in one home: overlay2 and vfs-fuse.

use crate::project::{self, ProjectQuota, RANGE, check_limits, ledger::Ledger};
use graphdriver_core::{
    ByteSize, Context, Error, ErrorKind, LayerId, LayerOptions, Limits, Options, Result, Stored, StoredAs, Unmet, Usage,
};
use std::{ops::RangeInclusive, path::Path};

/// What users choose, by the options `DRIVER.size` and `DRIVER.quota_projects`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wishes {
    /// The most each container's writable layer may take.
    pub size: Option<ByteSize>,
    /// Where projects come from.
    pub projects: RangeInclusive<u32>,
}

impl Default for Wishes {
    fn default() -> Self {
        Wishes { size: None, projects: RANGE }
    }
}

impl Wishes {
    /// As the options of the driver of this name say.
    pub fn parse(options: &Options, driver: &str) -> Result<Wishes> {
        let mut wishes = Wishes::default();
        let name = format!("{driver}.size");
        if let Some(size) = options.get(&name) {
            let size = size.parse().doing(|| format!("option {name}"))?;
            check_limits(Limits { size: Some(size), inodes: None }).doing(|| format!("option {name}"))?;
            wishes.size = Some(size);
        }
        let name = format!("{driver}.quota_projects");
        if let Some(text) = options.get(&name) {
            wishes.projects = range(text).ok_or_else(|| {
                let why = format!("{name} is {text:?}; allowed is FIRST-LAST, two numbers from 1 to {}", u32::MAX - 1);
                Error::new(ErrorKind::InvalidInput, why).hint(format!("such as {}-{}", RANGE.start(), RANGE.end()))
            })?;
        }
        Ok(wishes)
    }
}

/// The last number there is means "no project" (`INVALID_PROJID` of the kernel).
fn range(text: &str) -> Option<RangeInclusive<u32>> {
    let (first, last) = text.split_once('-')?;
    let number = |text: &str| text.parse::<u32>().ok().filter(|n| (1..u32::MAX).contains(n));
    let (first, last) = (number(first)?, number(last)?);
    (first <= last).then_some(first..=last)
}

/// The limits of the layers in a home.
#[derive(Debug)]
pub struct LayerQuota {
    size: Option<ByteSize>,
    /// Or what keeps them from being enforced.
    projects: Result<ProjectQuota, Unmet>,
    /// There even if the filesystem was mounted without quotas since.
    ledger: Ledger,
}

impl LayerQuota {
    /// Finds out by trying, in `scratch`, an empty directory of the caller's own beneath `home` or beside it, whether limits
    /// are enforced there. Fails only if the default size asked for cannot be.
    pub fn open(home: &Path, scratch: &Path, wishes: &Wishes, driver: &str) -> Result<LayerQuota> {
        let option = format!("{driver}.quota_projects");
        let probed = probe(scratch, wishes).and_then(|()| ProjectQuota::open(home, wishes.projects.clone(), &option));
        let quota =
            LayerQuota { size: wishes.size, projects: probed.map_err(|e| unmet(&e)), ledger: Ledger::new(home) };
        if wishes.size.is_some() {
            quota.enforced().doing(|| format!("option {driver}.size"))?;
        }
        Ok(quota)
    }

    /// Whether limits are enforced.
    pub fn works(&self) -> bool {
        self.projects.is_ok()
    }

    /// For `graphdriver info`: what is used, or what is missing.
    pub fn status(&self) -> String {
        match &self.projects {
            Ok(_) => "project quotas".into(),
            Err(unmet) => unmet.missing.clone(),
        }
    }

    fn enforced(&self) -> Result<&ProjectQuota> {
        self.projects.as_ref().map_err(|unmet| {
            let why = format!("a layer's size cannot be limited here: {}", unmet.missing);
            Error::new(ErrorKind::Unsupported, why).hint(unmet.remedy.clone())
        })
    }

    /// What limits a new layer is to have: those asked for, else the default for what a container writes. Fails with
    /// `Unsupported` if these cannot be enforced, before anything is made.
    pub fn wanted(&self, options: &LayerOptions) -> Result<Limits> {
        let default = self.size.filter(|_| options.durable);
        let limits = Limits { size: options.size.or(default), inodes: options.inodes };
        check_limits(limits)?;
        if limits != Limits::default() {
            self.enforced()?;
        }
        Ok(limits)
    }

    /// Limits a new layer that lies at `dir` until it is whole, with nothing in it yet. Where projects work it is counted,
    /// too: see [`usage`](Self::usage).
    pub fn limit_new(&self, id: LayerId, dir: &Path, limits: Limits) -> Result<()> {
        if limits == Limits::default() {
            return self.projects.as_ref().map_or(Ok(()), |projects| projects.count_new(dir, id.0));
        }
        let projects = self.enforced()?;
        projects.set_at(&id.to_string(), dir, limits)?;
        projects.counts_all(dir)
    }

    /// What a layer takes with all that lies at `dir`, as the kernel has counted it; None for one that has to be walked. See
    /// [`ProjectQuota::counted`].
    pub fn usage(&self, dir: &Path) -> Result<Option<Usage>> {
        self.projects.as_ref().map_or(Ok(None), |projects| projects.counted(dir))
    }

    /// What the layer may take.
    pub fn limits(&self, id: LayerId) -> Result<Limits> {
        Ok(self.ledger.read()?.trees.get(&id.to_string()).map(|entry| entry.limits).unwrap_or_default())
    }

    /// Changes that, of a layer that lies at `dir`. Lifting limits that are not there works everywhere.
    pub fn set_limits(&self, id: LayerId, dir: &Path, limits: Limits) -> Result<()> {
        if limits == Limits::default() {
            match self.limits(id)? == limits {
                true => return Ok(()),
                false if !self.works() => return self.lift(id),
                false => {}
            }
        }
        let tagged = self.enforced()?.set_at(&id.to_string(), dir, limits)?;
        if tagged.left_out > 0 {
            tracing::info!("{} symlinks, devices and immutable files of layer {id} are not counted", tagged.left_out);
        }
        Ok(())
    }

    /// What the kernel may still know of limits it does not enforce goes when the layer is next
    /// [prepared](Self::prepare) where it does.
    fn lift(&self, id: LayerId) -> Result<()> {
        self.ledger.change(|book| {
            if let Some(entry) = book.trees.get_mut(&id.to_string()) {
                entry.limits = Limits::default();
            }
            Ok(())
        })
    }

    /// Before the layer is mounted for writing. See [`ProjectQuota::prepare`]. Fails with `Unsupported` if it has limits that
    /// nobody would enforce.
    pub fn prepare(&self, id: LayerId) -> Result<()> {
        match &self.projects {
            Ok(projects) => projects.prepare(&id.to_string()),
            Err(_) if self.limits(id)? == Limits::default() => Ok(()),
            Err(_) => self.enforced().map(drop),
        }
    }

    /// After the layer was removed. Where quotas do not work, it stays in the ledger until they do.
    pub fn removed(&self, id: LayerId) -> Result<()> {
        self.projects.as_ref().map_or(Ok(()), |projects| projects.forget(&id.to_string()))
    }

    /// Forgets layers that are neither known nor there.
    pub fn reclaim(&self, home: &Path, known: &dyn Fn(LayerId) -> bool) -> Result<()> {
        let Ok(projects) = &self.projects else { return Ok(()) };
        projects.reclaim(&|name| !is_there(home, name) && !name.parse().is_ok_and(known)).map(drop)
    }

    /// Adds what [`reclaim`](Self::reclaim) would forget of layers that are not known: those that are not there.
    pub fn inventory(&self, home: &Path, found: &mut Vec<Stored>) -> Result<()> {
        if self.works() {
            let names = self.ledger.read()?.trees.into_keys();
            found.extend(names.filter(|name| !is_there(home, name)).map(|name| Stored {
                place: format!("project of layer {name} in {}", home.join("projects").display()),
                what: StoredAs::Leftover { of: name.parse().ok() },
            }));
        }
        Ok(())
    }
}

fn is_there(home: &Path, layer: &str) -> bool {
    ["", "new-", "removed-"].iter().any(|prefix| home.join(format!("{prefix}{layer}")).exists())
}

/// Whether limits would be enforced where `scratch` is. See [`project::probe`].
pub fn probe(scratch: &Path, wishes: &Wishes) -> Result<()> {
    let dir = tempfile::Builder::new().prefix("quota-").tempdir_in(scratch);
    project::probe(dir.doing(|| "making a directory to try out quotas")?.path(), &wishes.projects)
}

fn unmet(e: &Error) -> Unmet {
    let told = e.to_string();
    let remedy = e.hint_text().unwrap_or("see the kernel's log").to_owned();
    let missing = told.strip_suffix(&format!(" ({remedy})")).unwrap_or(&told).to_owned();
    Unmet { missing, remedy }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(options: &[(&str, &str)]) -> Result<Wishes> {
        Wishes::parse(&Options(options.iter().map(|(n, v)| (n.to_string(), v.to_string())).collect()), "d")
    }

    #[test]
    fn sizes_and_ranges_are_understood_and_the_rest_is_refused_by_name() {
        assert_eq!(parse(&[]).unwrap(), Wishes { size: None, projects: 1_900_000_000..=1_999_999_999 });
        let given = parse(&[("d.size", "10G"), ("d.quota_projects", "5-4294967294")]).unwrap();
        assert_eq!(given, Wishes { size: Some(ByteSize(10 << 30)), projects: 5..=u32::MAX - 1 });
        for (name, value) in [
            ("d.size", "much"),
            ("d.size", "0"),
            ("d.quota_projects", "5"),
            ("d.quota_projects", "0-9"),
            ("d.quota_projects", "9-5"),
            ("d.quota_projects", "1-4294967295"),
            ("d.quota_projects", "1-2-3"),
            ("d.quota_projects", "a-b"),
        ] {
            let e = parse(&[(name, value)]).unwrap_err();
            assert!(e.kind() == ErrorKind::InvalidInput && e.to_string().contains(name), "{e}");
        }
    }

    /// Whatever filesystem the temporary directory is on has none on the machines that run this outside of the guest, or it
    /// has; either way the two answers agree.
    #[test]
    fn what_cannot_be_enforced_is_refused_with_what_is_missing() {
        let home = tempfile::tempdir_in("/dev/shm").unwrap();
        let quota = LayerQuota::open(home.path(), home.path(), &Wishes::default(), "d").unwrap();
        assert!(!quota.works(), "tmpfs has no project quotas");
        let sized = LayerOptions { size: Some(ByteSize(1 << 20)), ..LayerOptions::default() };
        let counted = LayerOptions { inodes: Some(9), ..LayerOptions::default() };
        for options in [&sized, &counted] {
            let e = quota.wanted(options).unwrap_err();
            assert_eq!(e.kind(), ErrorKind::Unsupported);
            assert!(["tmpfs", "pquota", "prjquota"].iter().all(|word| e.to_string().contains(word)), "{e}");
        }
        assert_eq!(quota.wanted(&LayerOptions::default()).unwrap(), Limits::default());
        quota.set_limits(LayerId(1), home.path(), Limits::default()).unwrap();
        let wishes = Wishes { size: Some(ByteSize(1 << 20)), ..Wishes::default() };
        let e = LayerQuota::open(home.path(), home.path(), &wishes, "d").unwrap_err();
        assert!(e.kind() == ErrorKind::Unsupported && e.to_string().contains("d.size"), "{e}");
    }
}
