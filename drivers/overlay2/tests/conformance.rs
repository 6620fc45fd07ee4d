//! The suite on every filesystem that overlayfs is used with.

use graphdriver_core::{
    Context, LayerId, Options, Result,
    conformance::{self, BackingKind, Setup},
};
use graphdriver_overlay2::FACTORY;
use std::{fs, path::Path, process::ExitCode};

fn main() -> ExitCode {
    let mut setups: Vec<_> = BackingKind::ALL.map(|backing| setup("", backing, &[])).into();
    setups.push(setup("without_redirects::", BackingKind::Ext4, &[("overlay2.redirect_dir", "off")]));
    setups.push(setup("volatile::", BackingKind::Ext4, &[("overlay2.volatile", "on")]));
    // Nothing but limits depends on whether the filesystem has quotas, but files that belong to projects do.
    let with_quotas = [BackingKind::Ext4Prjquota, BackingKind::XfsPquota];
    setups.extend(with_quotas.map(|backing| setup("", backing, &[])));
    conformance::main(setups)
}

fn setup(prefix: &str, backing: BackingKind, options: &[(&str, &str)]) -> Setup {
    let options = Options(options.iter().map(|(n, v)| (n.to_string(), v.to_string())).collect());
    Setup::driver_with(format!("overlay2::{prefix}{backing}"), FACTORY, backing, options, Some(crash))
}

/// A layer half made, and one half removed.
fn crash(home: &Path, id: LayerId) -> Result<()> {
    for name in [format!("new-{id}"), format!("removed-{id}")] {
        let dir = home.join(name).join("diff/half");
        fs::create_dir_all(&dir).and_then(|()| fs::write(dir.join("file"), "x")).doing(|| "leaving a half layer")?;
    }
    Ok(())
}
