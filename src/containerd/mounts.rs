//! Recipes as containerd's mounts.

use graphdriver_containerd_api::types;
use graphdriver_core::{Context, Error, ErrorKind, Mount, Result, mount::fuse_program};
use std::path::PathBuf;

/// containerd and its shims carry these out with mount(2), and run a helper for `fuse.` and `fuse3.`.
pub(super) fn translate(recipe: Vec<Mount>) -> Result<Vec<types::Mount>> {
    recipe.into_iter().map(one).collect()
}

fn one(step: Mount) -> Result<types::Mount> {
    let text = |path: PathBuf| {
        path.into_os_string().into_string().map_err(|odd| {
            let why = format!("containerd cannot be told of {}", odd.display());
            Error::new(ErrorKind::Unsupported, why).hint("use a --root with a name in UTF-8")
        })
    };
    let r#type = match step.fstype.strip_prefix("fuse.") {
        Some(name) => helped(name, text)?,
        None => step.fstype,
    };
    Ok(types::Mount { r#type, source: text(step.source)?, target: String::new(), options: step.options })
}

/// `mount.fuse3` gives program and arguments to a shell, whose PATH can be any: a shim's, or none.
fn helped(name: &str, text: impl Fn(PathBuf) -> Result<String>) -> Result<String> {
    let program = text(fuse_program(name)?)?;
    if program.contains(|c: char| c.is_whitespace() || "\"'\\$`".contains(c)) {
        let why = format!("the path {program:?} is not safe in a shell");
        return Err(Error::new(ErrorKind::Unsupported, why).hint("install it where the path has plain characters"));
    }
    let helper = ["fuse3", "fuse"].into_iter().find(|helper| fuse_program(&format!("mount.{helper}")).is_ok());
    let helper = helper
        .ok_or_else(|| Error::new(ErrorKind::Unsupported, "containerd mounts FUSE by mount.fuse3, which is not here"))
        .hint(|| "apt-get install fuse3")?;
    Ok(format!("{helper}.{program}"))
}
