//! Images: archives, references and configurations. Pure formats: nothing here knows a driver or a store.

pub mod archive;
mod changes;
mod config;
mod reference;

pub use changes::Changes;
pub use config::{Commit, ImageConfig, MAX_CONFIG, created_now};
pub use reference::Reference;

/// The name Go, and so every image configuration, has for the processor this program was built for.
pub fn host_architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "x86" => "386",
        "powerpc64" if cfg!(target_endian = "little") => "ppc64le",
        "powerpc64" => "ppc64",
        "loongarch64" => "loong64",
        other => other,
    }
}
