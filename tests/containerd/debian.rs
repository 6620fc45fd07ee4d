//! The same with the containerds of later Debians, on roots that `scripts/make-debian` makes. Only where
//! `GRAPHDRIVER_DEBIANS` names them, as in `GRAPHDRIVER_DEBIANS=trixie,sid`: sid changes from day to day.

use super::{limited, mapped, prints, real_image, story};
use crate::common::{Home, no_program, no_root, skipped, skipped_unless_asked};

/// Those that the machine's own kernel can.
pub(crate) const DRIVERS: &[&str] = &[
    "overlay2",
    "vfs-fuse",
    #[cfg(feature = "btrfs")]
    "btrfs",
];

/// Whose containerd, runc and everything else a script runs.
pub(crate) struct Debian(Option<String>);

/// A root at `$new`, of which nothing is written, with the directories of the test and of the programs.
pub(crate) const NEW_ROOT: &str = r#"
new_root() {
    programs=$(dirname "$(command -v graphdriver)")
    new=$PWD/debian/root
    mkdir debian
    mount -t tmpfs none debian
    mkdir debian/{upper,work,root}
    mount -t overlay -o "lowerdir=$1,upperdir=debian/upper,workdir=debian/work" none "$new"
    # Libraries of the programs under test that this Debian has not got.
    ldd "$programs/graphdriver" | awk '$3 ~ "^/" { print $3 }' | while read -r at; do
        [[ -e $new$at ]] || cp "$at" "$new$at"
    done
    for at in "$PWD" "$programs" "$(dirname "$(realpath "$ARCHIVE")")"; do mount --mkdir --bind "$at" "$new$at"; done
}
"#;

/// The rest of a script is on it, which has to be the root of the mount namespace: the service enters containerd's.
const ENTER: &str = r#"
enter() {
    new_root "$1"
    for at in /proc /sys /dev; do mount --rbind "$at" "$new$at"; done
    at=$PWD
    cd "$new"
    pivot_root . mnt
    cd "$at"
    umount -l /mnt
}
"#;

impl Debian {
    /// The machine's own.
    pub(crate) fn ours() -> Debian {
        Debian(None)
    }

    fn later(suite: &str) -> Debian {
        Debian(Some(prints("scripts/make-debian", &[suite])))
    }

    /// Its directory, which is not the machine's own.
    pub(crate) fn root(&self) -> &str {
        self.0.as_deref().unwrap_or("/")
    }

    /// What a script does first, for all that it runs to be of this Debian.
    pub(crate) fn enter(&self) -> String {
        self.0.as_ref().map(|root| format!("{NEW_ROOT}\n{ENTER}\nenter {root}\n")).unwrap_or_default()
    }
}

/// The Debian, unless it is not asked for.
pub(crate) fn asked_for(test: &str, suite: &str) -> Option<Debian> {
    let names = std::env::var("GRAPHDRIVER_DEBIANS").unwrap_or_default();
    let asked = names.split(',').any(|name| name == suite);
    let reason = (!asked).then(|| format!("GRAPHDRIVER_DEBIANS does not name {suite}"));
    if skipped_unless_asked(test, reason) || skipped(test, no_root().or_else(|| no_program(&["mmdebstrap", "jq"]))) {
        return None;
    }
    Some(Debian::later(suite))
}

/// Kubernetes' snapshotter, as containerd understands an imported file.
const CONFIGURED: &str = r#"
containerd --version | awk '{ print $3 }'
graphdriver snapshotter --print-containerd-config > graphdriver.toml
printf 'version = %s\nimports = ["%s/graphdriver.toml"]\n' "$VERSION" "$PWD" > config.toml
containerd --config config.toml config dump |
    awk '/^ *\[/ { table = $0 } / snapshotter = / && table ~ /cri.v1.images.\]|v1.cri.\.containerd\]/ { print $3 }' | tr "'" '"'
"#;

/// `major` is containerd's, and `config` the newest version of its configuration.
fn containerd_of(test: &str, suite: &str, major: &str, config: u32) {
    let Some(debian) = asked_for(test, suite) else { return };
    for version in [2, config] {
        let home = Home::new();
        let said = home.ok(&format!("ARCHIVE=demo.tar VERSION={version}\n{}\n{CONFIGURED}", debian.enter()));
        assert!(said.starts_with(major) && said.ends_with("\n\"graphdriver\"\n"), "{said}");
    }
    let image = real_image();
    for driver in DRIVERS {
        story(&debian, driver, &image, 6, "debian");
    }
    for driver in DRIVERS.iter().filter(|driver| **driver != "vfs-fuse") {
        mapped(&debian, driver);
    }
    limited(&debian);
}

#[test]
fn containerd_of_trixie() {
    containerd_of("containerd_of_trixie", "trixie", "1.7.", 2);
}

#[test]
fn containerd_of_sid() {
    containerd_of("containerd_of_sid", "sid", "2.", 3);
}
