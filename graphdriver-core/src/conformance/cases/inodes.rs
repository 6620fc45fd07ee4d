//! Exact: everything about inodes but their content.

use super::{Case, Subject, everyone, exact, privileged};
use crate::{FileKind, Result, model::Op};

pub(super) const CASES: &[Case] = &[
    Case {
        name: "setuid_setgid_sticky_and_owners_hold",
        story: "moby graphtest: modes with sticky and setuid, and owners, through commit, tar and children",
        needs: privileged,
        run: |s| {
            let base = [
                Op::write("su", "1"),
                Op::chown("su", 1, 2),
                Op::chmod("su", 0o4755),
                Op::mkdir("tmp"),
                Op::chmod("tmp", 0o1777),
                Op::mkdir("group"),
                Op::chown("group", 3, 4),
                Op::chmod("group", 0o2775),
                Op::write("group/inherits", "1"),
                Op::write("none", "1"),
                Op::chmod("none", 0),
                Op::chown("none", 4_000_000_000, 4_000_000_001),
            ];
            let change = [Op::write("su", "22"), Op::chmod("none", 0o7777), Op::write("group/also", "1")];
            exact(s, &[&base, &change, &[Op::chown("su", 9, 9), Op::chown("none", 9, 9)]])
        },
    },
    Case {
        name: "a_change_of_owner_or_mode_alone_is_a_change",
        story: "containerd issues.go, chown alone: of files, directories, symlinks; with metacopy their data stays below",
        needs: privileged,
        run: |s| {
            let base = [
                Op::write("f", vec![5; 50_000]),
                Op::write("g", "1"),
                Op::mkdir("d"),
                Op::write("d/in", "1"),
                Op::symlink("s", "f"),
                Op::mknod("p", FileKind::Fifo),
            ];
            let owner = [Op::chown("f", 1, 1), Op::chown("d", 1, 1), Op::chown("s", 1, 1), Op::chown("p", 1, 1)];
            let mode = [Op::chmod("f", 0o600), Op::chmod("d", 0o700), Op::chmod("g", 0o755)];
            let write = [Op::write_at("f", 10, "data at last"), Op::rename("g", "d/g"), Op::chmod("d/in", 0o600)];
            exact(s, &[&base, &owner, &mode, &write, &[Op::rename("f", "f2"), Op::link("d/g", "h")]])
        },
    },
    Case {
        name: "hard_links_within_a_layer_hold",
        story: "one inode, three names in two directories, also of a symlink and a device",
        needs: privileged,
        run: |s| {
            let base = [
                Op::mkdir("d"),
                Op::write("a", "1"),
                Op::link("a", "d/b"),
                Op::link("d/b", "c"),
                Op::symlink("s", "a"),
                Op::link("s", "d/s2"),
                Op::mknod("dev", FileKind::CharDevice { major: 1, minor: 3 }),
                Op::link("dev", "d/dev2"),
            ];
            exact(s, &[&base, &[Op::mkdir("unrelated")]])
        },
    },
    Case {
        name: "hard_links_of_lower_files_are_linked_changed_and_removed",
        story: "a new name for a lower file, a change through one of several, and the last one gone: what a copy-up does to links",
        needs: everyone,
        run: |s| {
            let base = [
                Op::write("a", "1"),
                Op::link("a", "b"),
                Op::link("a", "c"),
                Op::write("single", "1"),
                Op::write("x", "1"),
                Op::link("x", "y"),
            ];
            let change = [
                Op::link("single", "double"),
                Op::unlink("b"),
                Op::write("a", "changed"),
                Op::chmod("x", 0o600),
                Op::link("y", "z"),
            ];
            exact(s, &[&base, &change, &[Op::unlink("x"), Op::unlink("single"), Op::write("double", "22")]])
        },
    },
    Case {
        name: "the_last_of_several_names_is_a_file_like_others",
        story: "overlayfs goes on counting the names that a layer in between took away: a file may be listed needlessly, and no more",
        needs: everyone,
        run: |s| {
            let base = [
                Op::write("a", "1"),
                Op::link("a", "b"),
                Op::mkdir("d"),
                Op::write("d/c", "2"),
                Op::link("d/c", "gone"),
            ];
            let part = [Op::truncate("b", 100), Op::unlink("gone"), Op::rename("d", "e")];
            let copied_up = [Op::chmod("a", 0o600), Op::chmod("a", 0o644), Op::chmod("e/c", 0o644)];
            exact(s, &[&base, &part, &copied_up, &[Op::link("a", "again")], &[Op::unlink("a")]])
        },
    },
    Case {
        name: "files_with_hard_links_are_moved",
        story: "containerd testsuite, moved files with hard links: links follow the move",
        needs: everyone,
        run: |s| {
            let base = [Op::mkdir("d"), Op::write("d/a", "1"), Op::link("d/a", "d/b"), Op::write("o", "2")];
            let moves = [Op::mkdir("e"), Op::rename("d/a", "e/a"), Op::rename("d/b", "e/b"), Op::link("e/a", "c")];
            exact(s, &[&base, &moves, &[Op::rename("e/a", "o")], &[Op::rename("c", "e/b")]])
        },
    },
    Case {
        name: "a_renamed_directory_keeps_hard_links_to_outside",
        story: "a move changes neither the files in a directory nor their other names, but the layer tar has to link these too",
        needs: everyone,
        run: |s| {
            let base = [
                Op::mkdir("d"),
                Op::write("d/f", "1"),
                Op::symlink("d/s", "f"),
                Op::mkdir("k"),
                Op::mkdir("k/deep"),
                Op::link("d/f", "k/deep/f"),
                Op::link("d/f", "a"),
                Op::link("d/s", "k/s"),
                Op::write("k/other", "2"),
                Op::chmod("k/deep", 0o700),
                Op::chmod("k", 0o711),
                Op::utimes("k/deep", 77, 7),
            ];
            let again = [Op::rename("e", "k/e"), Op::mkdir("d"), Op::write("d/f", "2"), Op::unlink("a")];
            exact(s, &[&base, &[Op::rename("d", "e")], &again, &[Op::rename("k", "d/k")]])
        },
    },
    Case {
        name: "hard_links_survive_a_change_through_one_of_them",
        story: "POSIX; overlayfs splits them unless its index is on, which this reports as not promised",
        needs: everyone_keeping_links,
        run: |s| {
            let base = [Op::write("a", "1"), Op::link("a", "b"), Op::link("a", "c")];
            exact(s, &[&base, &[Op::write("b", "changed")], &[Op::chmod("c", 0o600), Op::unlink("a")]])
        },
    },
    Case {
        name: "devices_and_fifos_are_added_replaced_and_removed",
        story: "a device must not be taken for a whiteout, which is one too",
        needs: privileged,
        run: |s| {
            let null = FileKind::CharDevice { major: 1, minor: 3 };
            let block = FileKind::BlockDevice { major: 7, minor: 300 };
            let base = [
                Op::mknod("null", null.clone()),
                Op::mknod("loop", block.clone()),
                Op::mknod("pipe", FileKind::Fifo),
                Op::write("file", "1"),
                Op::mknod("big", FileKind::CharDevice { major: 500, minor: 70_000 }),
            ];
            let change = [
                Op::unlink("null"),
                Op::mknod("null", block),
                Op::unlink("loop"),
                Op::mknod("loop", null.clone()),
                Op::unlink("pipe"),
                Op::unlink("file"),
                Op::mknod("file", FileKind::Fifo),
                Op::mknod("zero-major", FileKind::CharDevice { major: 0, minor: 1 }),
                Op::chmod("big", 0o666),
            ];
            exact(s, &[&base, &change, &[Op::unlink("null"), Op::write("null", "a file now"), Op::mknod("pipe", null)]])
        },
    },
    Case {
        name: "symlinks_keep_their_target_owner_and_time",
        story: "dangling, absolute, to a directory, changed to another target; times of the link itself",
        needs: privileged,
        run: |s| {
            let base = [
                Op::mkdir("d"),
                Op::symlink("abs", "/d"),
                Op::symlink("dangling", "../../nowhere"),
                Op::symlink("d/up", ".."),
                Op::utimes("abs", 1_000, 42),
                Op::symlink("change", "a"),
            ];
            let change = [
                Op::write("abs/through", "1"),
                Op::write("d/up/d/up/up", "1"),
                Op::utimes("dangling", -1, 7),
                Op::chown("d/up", 3, 3),
                Op::unlink("change"),
                Op::symlink("change", "b"),
            ];
            exact(s, &[&base, &change])
        },
    },
    Case {
        name: "times_hold_to_the_nanosecond_before_1970_and_after_2038",
        story: "tar libraries wrap negative times and drop fractions; 32-bit times end in 2038",
        needs: everyone,
        run: |s| {
            let base = [
                Op::write("ns", "1"),
                Op::utimes("ns", 1_700_000_000, 123_456_789),
                Op::write("one-ns", "1"),
                Op::utimes("one-ns", 1_700_000_000, 1),
                Op::write("before", "1"),
                Op::utimes("before", -1, 999_999_999),
                Op::write("1901", "1"),
                Op::utimes("1901", -2_147_483_648, 0),
                Op::mkdir("2400"),
                Op::utimes("2400", 13_569_465_600, 5),
                Op::write("zero", "1"),
                Op::utimes("zero", 0, 0),
            ];
            let change =
                [Op::chmod("before", 0o600), Op::utimes("ns", 1_700_000_000, 123_456_790), Op::chmod("2400", 0o700)];
            exact(s, &[&base, &change])
        },
    },
    Case {
        name: "extended_attributes_hold",
        story: "user and trusted ones, empty, binary and large, on files, directories and the root; set, changed and removed",
        needs: privileged,
        run: |s| {
            let base = [
                Op::write("f", "1"),
                Op::mkdir("d"),
                Op::symlink("s", "f"),
                Op::set_xattr("f", "user.text", "1"),
                Op::set_xattr("f", "user.empty", ""),
                Op::set_xattr("f", "user.binary", [0, 255, b'=', b'\n', 0]),
                Op::set_xattr("f", "user.with=sign", "1"),
                Op::set_xattr("d", "user.large", vec![b'x'; 2000]),
                Op::set_xattr("d", "trusted.t", "1"),
                Op::set_xattr("s", "trusted.on-link", "1"),
                Op::set_xattr("", "user.root", "1"),
            ];
            let change = [
                Op::remove_xattr("f", "user.text"),
                Op::set_xattr("f", "user.empty", "no longer"),
                Op::remove_xattr("d", "trusted.t"),
                Op::remove_xattr("s", "trusted.on-link"),
                Op::set_xattr("", "user.root", "2"),
                Op::set_xattr("d", "user.new", "1"),
            ];
            exact(s, &[&base, &change, &[Op::write("f", "22"), Op::remove_xattr("d", "user.large")]])
        },
    },
    Case {
        name: "file_capabilities_hold",
        story: "ping without security.capability does not ping",
        needs: privileged,
        run: |s| {
            let base = [Op::write("ping", "1"), net_raw("ping"), Op::write("b", "1"), net_raw("b")];
            let change = [Op::chmod("ping", 0o755), Op::rename("b", "c")];
            exact(s, &[&base, &change, &[Op::remove_xattr("ping", "security.capability")]])
        },
    },
    Case {
        name: "a_write_takes_file_capabilities",
        story: "whoever may write to a program may not give it what its owner was trusted with",
        needs: |s| match s.keeps_capabilities() {
            Some(why) => Err(why),
            None => privileged(s),
        },
        run: |s| exact(s, &[&[Op::write("a", "1"), net_raw("a")], &[Op::write("a", "22")]]),
    },
    Case {
        name: "posix_acls_hold",
        story: "access and default ACLs are extended attributes in the kernel's encoding; the mode is the ACL's own",
        needs: privileged,
        run: |s| {
            let (access, default) = ("system.posix_acl_access", "system.posix_acl_default");
            let base = [
                Op::write("f", "1"),
                Op::chmod("f", 0o640),
                Op::set_xattr("f", access, acl()),
                Op::mkdir("d"),
                Op::chmod("d", 0o640),
                Op::set_xattr("d", access, acl()),
                Op::set_xattr("d", default, acl()),
                Op::mkdir("plain"),
            ];
            let change = [Op::write("f", "22"), Op::remove_xattr("d", default), Op::chown("d", 1, 1)];
            exact(s, &[&base, &change])
        },
    },
    Case {
        name: "the_roots_own_metadata_is_the_layers",
        story: "mode, owner, attributes and time of the root are part of a layer as of any directory",
        needs: privileged,
        run: |s| {
            let base = [Op::write("f", "1"), Op::chmod("", 0o711)];
            let change = [Op::chown("", 8, 9), Op::chmod("", 0o1770), Op::set_xattr("", "user.a", "1")];
            exact(s, &[&base, &change, &[], &[Op::utimes("", 5, 5)]])
        },
    },
];

fn everyone_keeping_links(subject: &dyn Subject) -> Result<(), &'static str> {
    use crate::{LayerId, conformance::subject::hard_links, model::HardLinks};
    // A number that no case comes near.
    match hard_links(subject, LayerId(1 << 40)) {
        Ok(HardLinks::Split) => Err("this driver's copy-up splits the hard links of lower files"),
        _ => Ok(()),
    }
}

/// struct vfs_cap_data, revision 2, cap_net_raw+ep (include/uapi/linux/capability.h).
fn net_raw(path: &str) -> Op {
    let capability = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    Op::set_xattr(path, "security.capability", capability)
}

/// `u::rw-,u:1000:r--,g::r--,m::r--,o::---`, which goes with mode 0640, as include/uapi/linux/posix_acl_xattr.h lays it out.
fn acl() -> Vec<u8> {
    const NO_ID: u32 = u32::MAX;
    let entries = [(0x01u16, 6u16, NO_ID), (0x02, 4, 1000), (0x04, 4, NO_ID), (0x10, 4, NO_ID), (0x20, 0, NO_ID)];
    let mut bytes = 2u32.to_le_bytes().to_vec();
    for (tag, perm, id) in entries {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(perm.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}
