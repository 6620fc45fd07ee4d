//! What fits into a mount(2) of containerd's.

use graphdriver_core::{Error, ErrorKind, Mount, Result};
use std::path::Path;

/// The kernel takes one page of options, and containerd has no other way to name layers than these.
const PAGE: usize = 4096;

/// Fails if containerd could not carry out the recipe, which it would find out only when it has to mount it.
pub(super) fn check(recipe: &[Mount]) -> Result<()> {
    recipe.iter().filter(|step| step.fstype == "overlay").try_for_each(|step| check_overlay(&step.options))
}

/// containerd names lower directories as seen from the one above their common beginning, when they would not fit else.
fn check_overlay(options: &[String]) -> Result<()> {
    let length: usize = options.iter().map(|option| option.len() + 1).sum();
    let lower: Vec<_> = options.iter().filter_map(|o| o.strip_prefix("lowerdir=")).flat_map(|l| l.split(':')).collect();
    // DATA/ID/diff
    let data = lower.first().and_then(|dir| Path::new(dir).parent()?.parent()).map_or(0, |data| data.as_os_str().len());
    let shortened = length.saturating_sub(lower.len() * (data + 1));
    if length < PAGE || lower.len() > 1 && shortened < PAGE {
        return Ok(());
    }
    let why = format!("the names of its {} layers do not fit into the page that mount(2) has for them", lower.len());
    Err(Error::new(ErrorKind::Unsupported, why).hint("use an image with fewer layers, or a --root with a shorter name"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(data: &str, layers: usize) -> Vec<String> {
        let lower: Vec<_> = (1000..1000 + layers).map(|n| format!("{data}/{n}/diff")).collect();
        let dir = |name: &str| format!("{name}dir={data}/999/{name}");
        vec![format!("lowerdir={}", lower.join(":")), dir("upper"), dir("work"), "index=off".into()]
    }

    #[test]
    fn only_what_differs_between_layers_counts() {
        let data = "/var/lib/graphdriver/overlay2/data";
        for (layers, fits) in [(1, true), (128, true), (380, true), (400, false)] {
            assert_eq!(check_overlay(&options(data, layers)).is_ok(), fits, "{layers}");
        }
        let e = check_overlay(&options(&"/long".repeat(500), 2)).unwrap_err();
        assert!(e.to_string().contains("its 2 layers"), "{e}");
    }
}
