//! Commands about mounts.

use super::{
    args::{MountArgs, UmountArgs},
    for_all,
    output::Output,
    times,
};
use graphdriver::Engine;
use graphdriver_core::Result;

pub(crate) fn mount(engine: &Engine, out: &Output, args: &MountArgs) -> Result<()> {
    let mounted = engine.mount(&args.what, &args.dir, args.read_only)?;
    out.result(&mounted, |mounted| vec![mounted.target.display().to_string()])
}

pub(crate) fn umount(engine: &Engine, args: &UmountArgs) -> Result<()> {
    for_all(&args.what, |what| engine.umount(what, args.lazy).map(drop))
}

pub(crate) fn list(engine: &Engine, out: &Output) -> Result<()> {
    out.list(&["TARGET", "TYPE", "NAME", "ACCESS", "MOUNTED"], &engine.mounts()?, |mount| {
        let namespace = if mount.foreign { " (another namespace)" } else { "" };
        let detached = mount.detached.map_or(String::new(), |pid| format!(" (detached, used by process {pid})"));
        let dead = if mount.dead { " (dead: its program is gone; umount it)" } else { "" };
        vec![
            format!("{}{namespace}{detached}{dead}", mount.target.display()),
            mount.kind.clone(),
            mount.name.clone(),
            if mount.writable { "read-write" } else { "read-only" }.into(),
            // Nobody tells when a snapshot was mounted.
            if mount.kind == "snapshot" { "-".into() } else { times::ago(mount.created) },
        ]
    })
}
