//! What is agreed on with the kernel at the mount.

use super::io::IoSettings;
use crate::{config::Config, union::Union};
use fuser::{InitFlags, Version};
use rustix::thread::{CapabilitySet, capabilities};

/// What to ask the kernel for.
#[derive(Debug, Clone, Copy)]
pub struct Wanted {
    /// Flags, all of which it offers.
    pub flags: InitFlags,
    /// What follows for file data.
    pub io: IoSettings,
    /// How many filesystems may lie upon each other for passthrough.
    pub stack_depth: u32,
}

/// What is wanted of what a kernel that speaks `version` offers.
pub fn wanted(union: &Union, offered: InitFlags, version: Version) -> Wanted {
    let config = union.config();
    let passthrough = config.passthrough && offered.contains(InitFlags::FUSE_PASSTHROUGH) && may_register_files();
    let wanted = choose(config, offered, passthrough);
    let io = IoSettings { flushes: flushes(version), ..wanted.io };
    Wanted { stack_depth: stack_depth(union.is_stacked()), io, ..wanted }
}

/// Before Linux 6.16, which brought 7.44, the kernel sent copies of its pages, and took the pages themselves for written
/// while the copies were still on their way.
fn flushes(version: Version) -> bool {
    (version.0, version.1) >= (7, 44)
}

fn choose(config: &Config, offered: InitFlags, passthrough: bool) -> Wanted {
    use InitFlags as F;
    let mut flags = F::FUSE_PARALLEL_DIROPS
        | F::FUSE_DO_READDIRPLUS
        | F::FUSE_READDIRPLUS_AUTO
        | F::FUSE_NO_OPENDIR_SUPPORT
        | F::FUSE_CACHE_SYMLINKS
        | F::FUSE_EXPLICIT_INVAL_DATA
        | F::FUSE_HANDLE_KILLPRIV_V2
        | F::FUSE_ASYNC_DIO
        // The union applies the umask, since default ACLs take its place.
        | F::FUSE_DONT_MASK;
    flags.set(F::FUSE_POSIX_ACL, !config.no_acl);
    if passthrough {
        // One request instead of two. Only where opens come to us: see filesystem.rs.
        flags |= F::FUSE_PASSTHROUGH | F::FUSE_ATOMIC_O_TRUNC;
    } else {
        flags |= F::FUSE_NO_OPEN_SUPPORT;
        flags.set(F::FUSE_WRITEBACK_CACHE, config.writeback);
    }
    flags &= offered;
    let io = IoSettings {
        passthrough,
        no_open: flags.contains(F::FUSE_NO_OPEN_SUPPORT),
        writeback: flags.contains(F::FUSE_WRITEBACK_CACHE),
        flushes: false,
    };
    Wanted { flags, io, stack_depth: 1 }
}

/// The kernel lets only CAP_SYS_ADMIN of the initial user namespace register backing files.
fn may_register_files() -> bool {
    let admin = capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::SYS_ADMIN));
    admin && std::fs::read_to_string("/proc/self/uid_map").is_ok_and(|map| is_identity(&map))
}

fn is_identity(map: &str) -> bool {
    map.split_whitespace().eq(["0", "0", "4294967295"])
}

/// With 1 the mount can be a layer of a kernel overlay, but files that lie on an overlay themselves are not passed
/// through; with 2 it is the other way round.
fn stack_depth(layers_are_stacked: bool) -> u32 {
    if layers_are_stacked { 2 } else { 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn opens_are_left_out_exactly_where_passthrough_is() {
        let all = InitFlags::all();
        let with = choose(&Config::default(), all, true);
        assert_eq!(with.io, IoSettings { passthrough: true, ..IoSettings::default() });
        assert!(with.flags.contains(InitFlags::FUSE_PASSTHROUGH) && with.flags.contains(InitFlags::FUSE_POSIX_ACL));
        let without = choose(&Config::default(), all, false);
        assert_eq!(without.io, IoSettings { no_open: true, writeback: true, ..IoSettings::default() });
        // Together with an open that is never sent, nobody would truncate.
        assert!(!without.flags.contains(InitFlags::FUSE_ATOMIC_O_TRUNC));
        let gathered_not = choose(&Config { writeback: false, no_acl: true, ..Config::default() }, all, false);
        assert!(!gathered_not.io.writeback && !gathered_not.flags.contains(InitFlags::FUSE_POSIX_ACL));
    }

    #[test]
    fn nothing_is_wanted_that_is_not_offered() {
        let offered = InitFlags::FUSE_ATOMIC_O_TRUNC | InitFlags::FUSE_DONT_MASK;
        assert_eq!(choose(&Config::default(), offered, false).flags, InitFlags::FUSE_DONT_MASK);
    }

    #[test]
    fn only_new_kernels_can_be_made_to_write_what_they_have() {
        assert!(!flushes(Version(7, 43)) && flushes(Version(7, 44)) && flushes(Version(8, 0)));
    }

    #[test]
    fn only_the_initial_namespace_maps_all_ids_to_themselves() {
        assert!(is_identity("         0          0 4294967295\n"));
        assert!(!is_identity("0 1000 1\n") && !is_identity("0 0 65536\n"));
    }
}
