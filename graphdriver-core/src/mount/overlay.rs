//! Mounting overlayfs from a recipe, whatever the kernel's age and the length of the paths.
//!
//! Three ways, the first that the kernel knows is taken:
//!
//! * layers by descriptor: since Linux 6.13, any number and length;
//! * layers by name, one call each (`lowerdir+`): since 6.7. A name too long for `fsconfig(2)` goes by `/proc`;
//! * one page of options for `mount(2)`: any kernel, as many layers as fit when named relative to their common directory.

use super::{
    clone_of,
    context::{FsContext, STRING_MAX},
    open_path, privately, split_attributes,
};
use crate::{Context, Error, ErrorKind, Mount, Result, sys};
use rustix::{
    io::Errno,
    mount::{self, MountAttrFlags, MountFlags},
};
use std::{
    ffi::{CString, OsString},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::ffi::{OsStrExt, OsStringExt},
    },
    path::{Path, PathBuf},
};

/// A path as overlayfs's options want it: colons, commas and backslashes behind a backslash.
/// Fails with `InvalidInput` for a path that is not UTF-8, because recipes are text.
pub fn escape(path: &Path) -> Result<String> {
    let text = path.to_str().ok_or_else(|| {
        Error::new(ErrorKind::InvalidInput, format!("{path:?} is not UTF-8")).hint("use another data root")
    })?;
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        if matches!(c, ':' | ',' | '\\') {
            escaped.push('\\');
        }
        escaped.push(c);
    }
    Ok(escaped)
}

/// The paths in an option's value: split at colons, where a backslash makes the next character an ordinary one.
pub fn unescape(value: &str) -> Vec<PathBuf> {
    let mut paths = vec![Vec::new()];
    let mut bytes = value.bytes();
    while let Some(byte) = bytes.next() {
        match byte {
            b'\\' => paths.last_mut().expect("never empty").extend(bytes.next()),
            b':' => paths.push(Vec::new()),
            byte => paths.last_mut().expect("never empty").push(byte),
        }
    }
    paths.into_iter().map(|p| OsString::from_vec(p).into()).collect()
}

/// Whether this kernel takes overlayfs's layers one by one, so that no page of options bounds their number and names.
/// Fails with `Unsupported` if it has no overlayfs.
pub fn has_lowerdir_plus() -> Result<bool> {
    Ok(FsContext::open("overlay")?.set_raw("lowerdir+", b"/").is_ok())
}

/// What a recipe for overlayfs says.
struct Overlay<'m> {
    lower: Vec<PathBuf>,
    /// `upperdir` and `workdir`.
    upper: Vec<(&'static str, PathBuf)>,
    options: Vec<&'m String>,
    attrs: MountAttrFlags,
}

/// An overlay whose layers all lie below one directory: that directory, and the overlay of the same layers below `place`.
pub(super) fn moved(step: &Mount, place: &Path) -> Result<(PathBuf, Mount)> {
    let overlay = Overlay::parse(step)?;
    let base = common_parent(overlay.lower.iter().chain(overlay.upper.iter().map(|(_, path)| path)));
    let there = |path: &PathBuf| escape(&place.join(path.strip_prefix(&base).expect("it is above all of them")));
    let option = |option: &String| match option.split_once('=') {
        Some(("lowerdir", _)) => {
            Ok(format!("lowerdir={}", overlay.lower.iter().map(there).collect::<Result<Vec<_>>>()?.join(":")))
        }
        Some((name, _)) if let Some((_, path)) = overlay.upper.iter().find(|(upper, _)| *upper == name) => {
            Ok(format!("{name}={}", there(path)?))
        }
        _ => Ok(option.clone()),
    };
    let options = step.options.iter().map(option).collect::<Result<_>>()?;
    Ok((base.clone(), Mount { options, ..step.clone() }))
}

/// How a kernel is told about directories.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Descriptors,
    Names,
    Page,
}

pub(super) fn mount(step: &Mount) -> Result<OwnedFd> {
    let overlay = Overlay::parse(step)?;
    for way in [Way::Descriptors, Way::Names, Way::Page] {
        if let Some(mount) = overlay.mount(way)? {
            return Ok(mount);
        }
    }
    unreachable!("every kernel takes a page of options")
}

impl<'m> Overlay<'m> {
    fn parse(step: &'m Mount) -> Result<Self> {
        let (attrs, rest) = split_attributes(&step.options);
        let mut overlay = Overlay { lower: Vec::new(), upper: Vec::new(), options: Vec::new(), attrs };
        for option in rest {
            match option.split_once('=') {
                Some(("lowerdir", paths)) => overlay.lower = absolute(unescape(paths))?,
                Some((key @ ("upperdir" | "workdir"), path)) => {
                    let key = if key == "upperdir" { "upperdir" } else { "workdir" };
                    let [path] = absolute(unescape(path))?
                        .try_into()
                        .map_err(|_| Error::new(ErrorKind::InvalidInput, format!("{key} names several directories")))?;
                    overlay.upper.push((key, path));
                }
                _ => overlay.options.push(option),
            }
        }
        if overlay.lower.is_empty() {
            return Err(Error::new(ErrorKind::InvalidInput, "no lowerdir among the options"));
        }
        Ok(overlay)
    }

    /// None if this kernel does not know that way.
    fn mount(&self, way: Way) -> Result<Option<OwnedFd>> {
        if way == Way::Page {
            return self.mount_by_page().map(Some);
        }
        let context = FsContext::open("overlay")?;
        // Descriptors given as `/proc` names are looked at when their option is set, so none has to be kept open.
        let lowers = self.lower.iter().map(|path| ("lowerdir+", path));
        for (nth, (key, path)) in lowers.chain(self.upper.iter().map(|(key, path)| (*key, path))).enumerate() {
            let dir = open_path(path)?;
            let set = match way {
                Way::Descriptors => context.set_fd(key, dir.as_fd()),
                _ => context.set_name(key, path, &dir),
            };
            match set {
                Ok(()) => {}
                // Before Linux 6.13 fsconfig(2) takes no O_PATH descriptors at all, and says that they are none.
                Err(Errno::INVAL | Errno::BADF) if nth == 0 => return Ok(None),
                Err(e) => context.fail(e, || format!("{key}={}", path.display()))?,
            }
        }
        for option in &self.options {
            context.option(option)?;
        }
        context.mount(self.attrs).map(Some)
    }

    /// `mount(2)` in a mount namespace that dies with its thread, so that nothing is left behind and nobody sees it. The
    /// thread's working directory is the layers' common parent, so that hundreds of short relative names fit into the
    /// page. The mount is put over that very directory (the names have been resolved by then) and cloned from there.
    fn mount_by_page(&self) -> Result<OwnedFd> {
        let base = common_parent(self.lower.iter().chain(self.upper.iter().map(|(_, path)| path)));
        let data = self.page(&base)?;
        let flags = if self.attrs.contains(MountAttrFlags::MOUNT_ATTR_RDONLY) {
            MountFlags::RDONLY
        } else {
            MountFlags::empty()
        };
        let made = privately(|| {
            rustix::process::chdir(&base).doing(|| format!("going to {}", base.display()))?;
            mount::mount("overlay", &base, "overlay", flags, data.as_c_str())
                .map_err(Error::from)
                .hint(|| "the kernel's log may say more: dmesg")?;
            clone_of(open_path(&base)?.as_fd())
        })?;
        if !self.attrs.is_empty() {
            sys::mount_setattr(made.as_fd(), false, self.attrs, None).doing(|| "setting attributes of the mount")?;
        }
        Ok(made)
    }

    /// The options as one string, directories relative to `base`.
    fn page(&self, base: &Path) -> Result<CString> {
        let relative = |path: &PathBuf| escape(path.strip_prefix(base).unwrap_or(path));
        let lower = self.lower.iter().map(relative).collect::<Result<Vec<_>>>()?.join(":");
        let mut options = vec![format!("lowerdir={lower}")];
        for (key, path) in &self.upper {
            options.push(format!("{key}={}", relative(path)?));
        }
        options.extend(self.options.iter().filter(|o| !matches!(o.as_str(), "ro" | "rw")).map(|o| o.to_string()));
        let page = options.join(",");
        if page.len() >= 4096 {
            let why = format!("{} layers do not fit into the page of options this kernel takes", self.lower.len());
            return Err(Error::new(ErrorKind::Unsupported, why).hint("Linux 6.7 or newer has no such limit"));
        }
        CString::new(page).map_err(|_| Error::new(ErrorKind::InvalidInput, "a zero byte in the options"))
    }
}

impl FsContext {
    /// Names a directory by its path, or where that is too long by the descriptor's name in `/proc`. The kernel takes
    /// `lowerdir+` as it is, but `upperdir` and `workdir` behind escapes.
    fn set_name(&self, key: &str, path: &Path, dir: &OwnedFd) -> rustix::io::Result<()> {
        let plain = path.as_os_str().as_bytes();
        let name =
            if key == "lowerdir+" { plain.to_vec() } else { escape(path).map_or(plain.to_vec(), String::into_bytes) };
        if name.len() < STRING_MAX {
            return self.set_raw(key, &name);
        }
        self.set_raw(key, format!("/proc/thread-self/fd/{}", dir.as_raw_fd()).as_bytes())
    }
}

fn absolute(paths: Vec<PathBuf>) -> Result<Vec<PathBuf>> {
    let absolute = |path: PathBuf| {
        std::path::absolute(&path).map_err(|_| Error::new(ErrorKind::InvalidInput, "an empty path among the layers"))
    };
    paths.into_iter().map(absolute).collect()
}

/// The deepest directory above all of `paths`, which are absolute.
fn common_parent<'p>(mut paths: impl Iterator<Item = &'p PathBuf>) -> PathBuf {
    let up = |path: &Path| path.parent().unwrap_or(Path::new("/")).to_path_buf();
    let first = paths.next().map_or_else(|| "/".into(), |path| up(path));
    paths.fold(first, |mut common, path| {
        while !up(path).starts_with(&common) {
            common.pop();
        }
        common
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Root;
    use proptest::prelude::*;
    use rustix::fs::{self, Mode, OFlags};
    use std::fs::{create_dir_all, read_to_string, write};

    const WAYS: [Way; 3] = [Way::Descriptors, Way::Names, Way::Page];

    fn recipe(lower: &[PathBuf], upper: Option<(&Path, &Path)>, more: &[&str]) -> Mount {
        let lower = lower.iter().map(|p| escape(p).unwrap()).collect::<Vec<_>>().join(":");
        let mut options = vec![format!("lowerdir={lower}")];
        if let Some((upper, work)) = upper {
            options.push(format!("upperdir={}", escape(upper).unwrap()));
            options.push(format!("workdir={}", escape(work).unwrap()));
        }
        options.extend(more.iter().map(|o| o.to_string()));
        Mount { fstype: "overlay".into(), source: "overlay".into(), options }
    }

    fn exists(mount: &OwnedFd, name: &str) -> bool {
        Root::from_fd(mount.try_clone().unwrap()).inode(Path::new(name)).unwrap().is_some()
    }

    fn create(mount: &OwnedFd, name: &str) -> rustix::io::Result<OwnedFd> {
        fs::openat(mount, name, OFlags::CREATE | OFlags::WRONLY, Mode::RUSR)
    }

    fn layers(base: &Path, n: usize) -> Vec<PathBuf> {
        let lower: Vec<_> = (0..n).map(|i| base.join(i.to_string()).join("diff")).collect();
        for (i, dir) in lower.iter().enumerate() {
            create_dir_all(dir).unwrap();
            write(dir.join(format!("from{i}")), "").unwrap();
        }
        lower
    }

    #[test]
    fn every_way_mounts_layers_below_an_awkward_and_long_path() {
        super::super::tests::privately(|| {
            let tmp = tempfile::tempdir().unwrap();
            let base = tmp.path().join("a:b, c\\d\\:e #\t").join("x".repeat(250)).join("y".repeat(250));
            let lower = layers(&base, 3);
            let before = super::super::table().unwrap();
            for way in WAYS {
                let (upper, work) = (base.join(format!("{way:?},u")), base.join(format!("{way:?}:w")));
                create_dir_all(&upper).unwrap();
                create_dir_all(&work).unwrap();
                let step = recipe(&lower, Some((&upper, &work)), &["index=off"]);
                let mount = Overlay::parse(&step).unwrap().mount(way).unwrap().expect("this kernel knows all ways");
                assert!((0..3).all(|i| exists(&mount, &format!("from{i}"))), "{way:?}");
                create(&mount, "new").unwrap();
                assert_eq!(read_to_string(upper.join("new")).unwrap(), "", "{way:?}");
            }
            assert_eq!(super::super::table().unwrap(), before, "nothing is left mounted");
        });
    }

    #[test]
    fn read_only_and_nosuid_hold_in_every_way() {
        let tmp = tempfile::tempdir().unwrap();
        let lower = layers(tmp.path(), 2);
        for way in WAYS {
            let step = recipe(&lower, None, &["ro", "nosuid"]);
            let mount = Overlay::parse(&step).unwrap().mount(way).unwrap().unwrap();
            assert_eq!(create(&mount, "new").unwrap_err(), Errno::ROFS, "{way:?}");
            let flags = fs::fstatvfs(&mount).unwrap().f_flag;
            assert!(flags.contains(fs::StatVfsMountFlags::RDONLY | fs::StatVfsMountFlags::NOSUID), "{way:?}");
        }
    }

    #[test]
    fn five_hundred_layers_mount_and_one_more_is_refused_in_words() {
        let tmp = tempfile::tempdir().unwrap();
        let mut lower = layers(tmp.path(), 501);
        let e = mount(&recipe(&lower, None, &[])).unwrap_err();
        assert!(e.to_string().contains("limit is 500"), "{e}");
        lower.pop();
        let step = recipe(&lower, None, &[]);
        for way in [Way::Descriptors, Way::Names] {
            let mount = Overlay::parse(&step).unwrap().mount(way).unwrap().unwrap();
            assert!(exists(&mount, "from0") && exists(&mount, "from499"), "{way:?}");
        }
        // `499/diff:` is 9 bytes: 128 fit into a page easily, 500 do not.
        let overlay = Overlay::parse(&step).unwrap();
        let e = overlay.mount(Way::Page).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Unsupported, "{e}");
        let step = recipe(&lower[..400], None, &[]);
        let mount = Overlay::parse(&step).unwrap().mount(Way::Page).unwrap().unwrap();
        assert!(exists(&mount, "from399"));
    }

    #[test]
    fn failures_name_the_layer_and_say_what_the_kernel_said() {
        let tmp = tempfile::tempdir().unwrap();
        let mut lower = layers(tmp.path(), 2);
        lower.push(tmp.path().join("missing"));
        let e = mount(&recipe(&lower, None, &[])).unwrap_err();
        assert!(e.kind() == ErrorKind::NotFound && e.to_string().contains("missing"), "{e}");
        lower.pop();
        let e = mount(&recipe(&lower, None, &["metacopy=perhaps"])).unwrap_err();
        assert!(e.to_string().contains("Bad value for 'metacopy'"), "{e}");
        for bad in ["lowerdir=", "lowerdir=/a::/b", "upperdir=/a:/b", "metacopy=on"] {
            let step = Mount { options: vec![bad.into()], ..recipe(&lower, None, &[]) };
            assert_eq!(mount(&step).unwrap_err().kind(), ErrorKind::InvalidInput, "{bad}");
        }
    }

    #[test]
    fn the_common_parent_is_above_all() {
        let parent = |paths: &[&str]| common_parent(paths.iter().map(PathBuf::from).collect::<Vec<_>>().iter());
        assert_eq!(parent(&["/d/o/1/diff", "/d/o/12/diff", "/d/o/empty"]), Path::new("/d/o"));
        assert_eq!(parent(&["/d/o/1"]), Path::new("/d/o"));
        assert_eq!(parent(&["/d/ab/1", "/d/a/1"]), Path::new("/d"));
        assert_eq!(parent(&["/d/1", "/e/1"]), Path::new("/"));
        assert_eq!(parent(&["/d/a", "/d/a/b"]), Path::new("/d"));
    }

    proptest! {
        #[test]
        fn unescape_undoes_escape(paths in prop::collection::vec(r"[a:,\\ é/=]{1,12}", 1..4)) {
            let joined = paths.iter().map(|p| escape(Path::new(p)).unwrap()).collect::<Vec<_>>().join(":");
            let back: Vec<_> = unescape(&joined);
            prop_assert_eq!(back, paths.iter().map(PathBuf::from).collect::<Vec<_>>());
        }
    }
}
