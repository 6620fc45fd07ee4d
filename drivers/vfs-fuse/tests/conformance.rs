//! The suite on every filesystem that layers are kept on, and with every way to copy up.

use graphdriver_core::{
    Context, LayerId, Options, Result,
    conformance::{self, BackingKind, Setup},
};
use graphdriver_vfs_fuse::FACTORY;
use std::{fs, path::Path, process::ExitCode};

/// All that can tell one way to copy up, or to reach a file's data, from another.
const DATA: &[&str] = &[
    "siblings_and_parent_never_see_a_layers_changes",
    "release_and_mount_again_shows_the_same",
    "usage_counts_the_layers_own_and_not_its_parents",
    "adds_changes_and_deletes_are_reproduced",
    "same_second_and_same_size_edits_are_seen",
    "what_was_changed_back_is_no_change",
    "an_active_mounted_layer_is_diffed_live",
    "a_file_is_appended_cut_and_overwritten_in_the_middle",
    "sparse_files_stay_sparse",
    "a_file_is_renamed_within_and_across_directories",
    "setuid_setgid_sticky_and_owners_hold",
    "a_change_of_owner_or_mode_alone_is_a_change",
    "hard_links_of_lower_files_are_linked_changed_and_removed",
    "the_last_of_several_names_is_a_file_like_others",
    "files_with_hard_links_are_moved",
    "hard_links_survive_a_change_through_one_of_them",
    "times_hold_to_the_nanosecond_before_1970_and_after_2038",
    "extended_attributes_hold",
    "file_capabilities_hold",
    "a_write_takes_file_capabilities",
    "threads_that_write_to_one_lower_file_copy_it_up_once",
    "files_get_their_name_late_and_their_space_early",
    "random_operations_equal_the_model",
];

fn main() -> ExitCode {
    let [ext4, xfs, btrfs, tmpfs] = BackingKind::ALL;
    let extent = ("vfs-fuse.copy_up", "extent");
    // Left alone, ext4 has extents for what is large, xfs and btrfs reflinks, tmpfs whole files. Extents are the map that
    // the filesystem itself keeps, so they have everything on one filesystem and all that reads the map on the others.
    let mut setups = vec![setup("", ext4, &[]), setup("", xfs, &[]), setup("", tmpfs, &[])];
    setups.push(setup("extents::", btrfs, &[extent]));
    let variants = [
        setup("", btrfs, &[]),
        setup("extents::", ext4, &[extent]),
        setup("extents::", xfs, &[extent]),
        setup("background::", ext4, &[extent, ("vfs-fuse.complete", "1G")]),
        setup("whole_files::", ext4, &[("vfs-fuse.copy_up", "full")]),
        setup("page_cache::", ext4, &[("vfs-fuse.passthrough", "off"), ("vfs-fuse.volatile", "on")]),
    ];
    setups.extend(variants.map(|variant| variant.only(DATA)));
    let with_quotas = [BackingKind::Ext4Prjquota, BackingKind::XfsPquota];
    setups.extend(with_quotas.map(|backing| setup("", backing, &[])));
    conformance::main(setups)
}

fn setup(prefix: &str, backing: BackingKind, options: &[(&str, &str)]) -> Setup {
    let program = ("vfs-fuse.mount_program", env!("CARGO_BIN_EXE_vfs-fuse"));
    let options = options.iter().chain([&program]).map(|(name, value)| (name.to_string(), value.to_string()));
    let name = format!("vfs_fuse::{prefix}{backing}");
    Setup::driver_with(name, FACTORY, backing, Options(options.collect()), Some(crash))
}

/// A layer half made, and one half removed.
fn crash(home: &Path, id: LayerId) -> Result<()> {
    for name in [format!("new-{id}"), format!("removed-{id}")] {
        let dir = home.join(name).join("diff/half");
        fs::create_dir_all(&dir).and_then(|()| fs::write(dir.join("file"), "x")).doing(|| "leaving a half layer")?;
    }
    Ok(())
}
