//! Exact: directories that are moved, replaced, hidden and merged.

use super::{Case, Subject, Twin, everyone, exact, privileged};
use crate::{Result, model::Op};

pub(super) const CASES: &[Case] = &[
    Case {
        name: "a_directory_removed_and_made_again_stays_opaque",
        story: "containerd issues.go: what was in the old directory must not shine through the new one, nor in children",
        needs: everyone,
        run: |s| {
            let base = [Op::mkdir("d"), Op::write("d/old", "1"), Op::mkdir("d/sub"), Op::write("d/sub/old", "1")];
            let again = [
                Op::unlink("d/sub/old"),
                Op::rmdir("d/sub"),
                Op::unlink("d/old"),
                Op::rmdir("d"),
                Op::mkdir("d"),
                Op::write("d/new", "1"),
            ];
            let above = [Op::mkdir("d/sub"), Op::write("d/sub/newer", "1")];
            exact(s, &[&base, &again, &above, &[Op::write("d/old", "back")]])
        },
    },
    Case {
        name: "directory_permissions_survive_commit_and_making_again",
        story: "containerd issues.go, docker/docker#19082: mode and owner of a directory made again in the same place",
        needs: privileged,
        run: |s| {
            let base = [Op::mkdir("d"), Op::chmod("d", 0o777), Op::chown("d", 4, 5), Op::write("d/f", "1")];
            let again =
                [Op::unlink("d/f"), Op::rmdir("d"), Op::mkdir("d"), Op::chmod("d", 0o1700), Op::chown("d", 6, 7)];
            exact(s, &[&base, &again, &[Op::write("d/g", "1")], &[Op::chmod("d", 0o2755)]])
        },
    },
    Case {
        name: "files_and_directories_replace_each_other",
        story: "a whiteout, a file and an opaque directory compete for one name",
        needs: everyone,
        run: |s| {
            let base = [
                Op::write("f-to-d", "1"),
                Op::mkdir("d-to-f"),
                Op::write("d-to-f/x", "1"),
                Op::mkdir("d-to-s"),
                Op::write("d-to-s/x", "1"),
                Op::symlink("s-to-d", "d-to-f"),
                Op::mkdir("target"),
                Op::write("target/x", "1"),
            ];
            let replace = [
                Op::unlink("f-to-d"),
                Op::mkdir("f-to-d"),
                Op::write("f-to-d/in", "1"),
                Op::unlink("d-to-f/x"),
                Op::rmdir("d-to-f"),
                Op::write("d-to-f", "1"),
                Op::unlink("d-to-s/x"),
                Op::rmdir("d-to-s"),
                Op::symlink("d-to-s", "target"),
                Op::unlink("s-to-d"),
                Op::mkdir("s-to-d"),
                Op::write("s-to-d/in", "1"),
            ];
            let back = [
                Op::unlink("f-to-d/in"),
                Op::rmdir("f-to-d"),
                Op::write("f-to-d", "1"),
                Op::unlink("d-to-f"),
                Op::mkdir("d-to-f"),
                Op::unlink("d-to-s"),
                Op::mkdir("d-to-s"),
                Op::write("d-to-s/y", "1"),
            ];
            exact(s, &[&base, &replace, &back, &[Op::write("d-to-f/z", "1")]])
        },
    },
    Case {
        name: "a_file_is_renamed_within_and_across_directories",
        story: "containerd testsuite, rename: over nothing, over a lower file, over an own file, there and back",
        needs: everyone,
        run: |s| {
            let base = [
                Op::mkdir("a"),
                Op::mkdir("b"),
                Op::write("a/1", "1"),
                Op::write("a/2", "22"),
                Op::write("b/3", "333"),
                Op::write("b/4", "4444"),
            ];
            let moves = [
                Op::rename("a/1", "a/one"),
                Op::rename("a/2", "b/3"),
                Op::write("own", "own"),
                Op::rename("own", "b/4"),
                Op::rename("a/one", "b/one"),
                Op::rename("b/one", "a/1"),
            ];
            exact(s, &[&base, &moves, &[Op::rename("b/3", "a/2"), Op::rename("a", "a2")]])
        },
    },
    Case {
        name: "a_lower_directory_is_renamed",
        story: "every peer gives up its native diff when redirect_dir is on; here list, tar and tree stay right, or the kernel says EXDEV and nothing has happened",
        needs: everyone,
        run: rename_lower_directory,
    },
    Case {
        name: "renamed_directories_are_renamed_again_in_children",
        story: "redirects on redirects: what is below a moved directory is found through all of them",
        needs: everyone,
        run: |s| {
            let base = [
                Op::mkdir("a"),
                Op::mkdir("a/b"),
                Op::mkdir("a/b/c"),
                Op::write("a/b/c/f", "1"),
                Op::write("a/g", "1"),
                Op::mkdir("t"),
            ];
            let first = [Op::rename("a/b", "t/b"), Op::write("t/b/c/new", "1")];
            let second = [Op::rename("t", "u"), Op::chmod("u/b/c/f", 0o600), Op::mkdir("t"), Op::write("t/fresh", "1")];
            let third = [Op::rename("u/b/c", "c"), Op::unlink("c/new"), Op::rename("a", "u/a"), Op::mkdir("a")];
            let fourth = [Op::rename("c", "a/c"), Op::write("a/c/f", "changed"), Op::rename("u/a", "a/a")];
            exact(s, &[&base, &first, &second, &third, &fourth, &[Op::chmod("a/c", 0o700)]])
        },
    },
    Case {
        name: "two_directories_change_places",
        story: "a redirect that leads to where another directory now is",
        needs: everyone,
        run: |s| {
            let base = [
                Op::mkdir("a"),
                Op::write("a/in-a", "1"),
                Op::mkdir("b"),
                Op::write("b/in-b", "1"),
                Op::write("b/both", "1"),
                Op::write("a/both", "2"),
            ];
            let swap = [Op::rename("a", "tmp"), Op::rename("b", "a"), Op::rename("tmp", "b")];
            exact(s, &[&base, &swap, &swap, &[Op::unlink("a/both"), Op::chmod("b/both", 0o600)]])
        },
    },
    Case {
        name: "a_rename_onto_a_full_directory_is_refused_and_changes_nothing",
        story: "a failed rename must not leave a copy-up or a time that only the layer has",
        needs: everyone,
        run: |s| {
            let mut twin = Twin::new(s)?;
            let base = twin.layer(None, &[Op::mkdir("full"), Op::write("full/f", "1"), Op::mkdir("d")])?;
            let id = twin.create(Some(base))?;
            twin.try_run(id, &[Op::rename("d", "full")])?;
            twin.check(id)?;
            twin.remove_all()
        },
    },
    Case {
        name: "a_moved_directory_leaves_its_place_to_a_new_one",
        story: "the place a redirect came from is made again: the old content is at the new place only",
        needs: everyone,
        run: |s| {
            let base = [
                Op::mkdir("d"),
                Op::write("d/x", "1"),
                Op::write("d/y", "1"),
                Op::mkdir("d/e"),
                Op::write("d/e/z", "1"),
            ];
            let moved = [Op::rename("d", "moved"), Op::mkdir("d"), Op::write("d/x", "other"), Op::unlink("moved/y")];
            exact(s, &[&base, &moved, &[Op::rename("moved/e", "d/e")], &[Op::unlink("d/e/z"), Op::rmdir("d/e")]])
        },
    },
    Case {
        name: "nested_deletions_additions_and_replacements_combine",
        story: "whiteouts and opaque directories within each other, over three layers",
        needs: everyone,
        run: |s| {
            let base = [
                Op::mkdir("a"),
                Op::mkdir("a/b"),
                Op::mkdir("a/b/c"),
                Op::write("a/b/c/f", "1"),
                Op::write("a/b/g", "1"),
                Op::write("a/h", "1"),
            ];
            let first = [
                Op::unlink("a/b/c/f"),
                Op::rmdir("a/b/c"),
                Op::write("a/b/c", "file now"),
                Op::unlink("a/h"),
                Op::mkdir("a/h"),
                Op::write("a/h/i", "1"),
            ];
            let second = [
                Op::unlink("a/b/c"),
                Op::mkdir("a/b/c"),
                Op::write("a/b/c/f2", "1"),
                Op::unlink("a/h/i"),
                Op::unlink("a/b/g"),
            ];
            let third =
                [Op::unlink("a/b/c/f2"), Op::rmdir("a/b/c"), Op::rmdir("a/b"), Op::rmdir("a/h"), Op::rmdir("a")];
            exact(s, &[&base, &first, &second, &third, &[Op::mkdir("a"), Op::write("a/h", "1")]])
        },
    },
    Case {
        name: "a_directory_of_two_thousand_files_is_changed_here_and_there",
        story: "listings longer than one getdents buffer, with whiteouts in every part",
        needs: everyone,
        run: |s| {
            let name = |n: u32| format!("d/file-with-a-rather-long-name-{n:05}");
            let base: Vec<Op> =
                std::iter::once(Op::mkdir("d")).chain((0..2000).map(|n| Op::write(name(n), n.to_le_bytes()))).collect();
            let change: Vec<Op> = (0..2000)
                .step_by(97)
                .flat_map(|n| {
                    [Op::unlink(name(n)), Op::write(name(n + 1), "changed"), Op::write(format!("{}x", name(n)), "new")]
                })
                .collect();
            exact(s, &[&base, &change])
        },
    },
    Case {
        name: "odd_names_are_names_like_others",
        story: "bytes that are no UTF-8, colons and backslashes that mean something to overlayfs's options, newlines, long names, deep paths",
        needs: everyone,
        run: odd_names,
    },
];

fn rename_lower_directory(subject: &mut dyn Subject) -> Result<()> {
    let base = [
        Op::mkdir("d"),
        Op::write("d/f", "1"),
        Op::mkdir("d/sub"),
        Op::write("d/sub/g", "1"),
        Op::mkdir("other"),
        Op::mkdir("empty"),
    ];
    let rename = [
        Op::rename("d", "moved"),
        Op::write("moved/new", "1"),
        Op::rename("moved/sub", "other/sub"),
        Op::write("other/sub/g", "changed"),
        Op::rename("other", "empty"),
    ];
    exact(subject, &[&base, &rename, &[Op::rename("moved", "d")]])
}

fn odd_names(subject: &mut dyn Subject) -> Result<()> {
    use std::{ffi::OsString, os::unix::ffi::OsStringExt, path::PathBuf};
    let bytes = |bytes: &[u8]| PathBuf::from(OsString::from_vec(bytes.to_vec()));
    let names = [
        bytes(b"\xff\xfe\x80"),
        bytes(b"a:b,c\\d"),
        bytes(b" new\nline\t"),
        bytes(&[b'n'; 255]),
        bytes(b"\xc3\xa4"),
        bytes(b"a\xcc\x88"),
        bytes(b"%2e"),
    ];
    let mut deep = PathBuf::new();
    let mut base = Vec::new();
    for n in 0..12 {
        deep.push(format!("{n:0120}"));
        base.push(Op::mkdir(&deep));
    }
    base.push(Op::write(deep.join("bottom"), "1"));
    base.push(Op::symlink("long-target", "x/".repeat(400)));
    for name in &names {
        base.extend([Op::mkdir(name), Op::write(name.join(name), "1"), Op::symlink(name.join("s"), name.join(name))]);
    }
    let mut change = vec![Op::write(deep.join("bottom"), "2"), Op::link(deep.join("bottom"), deep.join("link"))];
    for name in &names {
        change.extend([Op::unlink(name.join(name)), Op::write(name.join("new"), "1"), Op::chmod(name, 0o700)]);
    }
    exact(subject, &[&base, &change, &[Op::rename(&names[0], names[0].with_extension("moved"))]])
}
