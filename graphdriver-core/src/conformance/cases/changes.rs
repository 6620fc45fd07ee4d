//! Exact: adding, changing and deleting, and layer tars byte for byte.

use super::{Case, Subject, Twin, everyone, exact};
use crate::{
    Access, Change, ChangeKind, CopyUnit, DiffId, Digest, LayerId, LayerOptions, Metadata, Result, Timestamp,
    WriteStrategy,
    conformance::twin::{same_tree, snapshot},
    model::Op,
    tar::{Content, Segment, TarWriter},
};
use std::{collections::BTreeMap, path::Path};

pub(super) const CASES: &[Case] = &[
    Case {
        name: "a_child_equals_its_base",
        story: "moby graphtest: the root too, with its mode, attributes and time",
        needs: everyone,
        run: |s| {
            let base =
                [Op::mkdir("d"), Op::write("d/f", "1"), Op::chmod("", 0o1777), Op::set_xattr("", "user.root", "1")];
            exact(s, &[&base, &[], &[]])
        },
    },
    Case {
        name: "adds_changes_and_deletes_are_reproduced",
        story: "moby graphtest, diff and apply: and the change list is exact",
        needs: everyone,
        run: |s| {
            let base = [
                Op::mkdir("etc"),
                Op::write("etc/keep", "1"),
                Op::write("etc/change", "1"),
                Op::write("etc/delete", "1"),
                Op::mkdir("gone"),
                Op::mkdir("gone/deep"),
                Op::write("gone/deep/f", "1"),
            ];
            let change = [
                Op::write("etc/change", "22"),
                Op::unlink("etc/delete"),
                Op::unlink("gone/deep/f"),
                Op::rmdir("gone/deep"),
                Op::rmdir("gone"),
                Op::mkdir("new"),
                Op::write("new/f", "3"),
                Op::write("etc/new", "3"),
            ];
            exact(s, &[&base, &change])
        },
    },
    Case {
        name: "the_change_list_is_exactly_this",
        story: "moby graphtest: letters and order as Docker prints them, spelled out and not computed",
        needs: everyone,
        run: change_list,
    },
    Case {
        name: "same_second_and_same_size_edits_are_seen",
        story: "containerd issues.go: an edit with the same size and the same mtime is a change",
        needs: everyone,
        run: |s| {
            let base = [Op::write("f", "aaaa"), Op::utimes("f", 1_700_000_000, 5), Op::utimes("", 1_700_000_000, 5)];
            let edit = [Op::write("f", "bbbb"), Op::utimes("f", 1_700_000_000, 5), Op::utimes("", 1_700_000_000, 5)];
            exact(s, &[&base, &edit])
        },
    },
    Case {
        name: "what_was_changed_back_is_no_change",
        story: "a copied-up file that equals the parent's must not be exported as a change",
        needs: everyone,
        run: changed_back,
    },
    Case {
        name: "an_active_mounted_layer_is_diffed_live",
        story: "commit of a running container: nothing is frozen, and the diff is that of this moment",
        needs: everyone,
        run: live,
    },
    Case {
        name: "deletions_stay_hidden_in_children",
        story: "containerd testsuite: a file deleted in the middle must not come back further up",
        needs: everyone,
        run: |s| {
            let base = [Op::mkdir("d"), Op::write("d/a", "1"), Op::write("d/b", "1"), Op::write("c", "1")];
            let delete = [Op::unlink("d/a"), Op::unlink("c")];
            let touch = [Op::write("d/new", "1")];
            let back = [Op::write("d/a", "2")];
            exact(s, &[&base, &delete, &touch, &back, &[Op::unlink("d/a")], &[Op::chmod("d", 0o700)]])
        },
    },
    Case {
        name: "a_file_is_appended_cut_and_overwritten_in_the_middle",
        story: "copy-up has to take the whole file and not only what is written",
        needs: everyone,
        run: |s| {
            let data: Vec<u8> = (0..300_000u32).map(|n| (n / 7) as u8).collect();
            let base = ["append", "cut", "middle", "grow", "empty"].map(|f| Op::write(f, &data));
            let change = [
                Op::write_at("append", 300_000, "end"),
                Op::truncate("cut", 123),
                Op::write_at("middle", 150_000, "middle"),
                Op::truncate("grow", 400_000),
                Op::truncate("empty", 0),
            ];
            exact(s, &[&base, &change])
        },
    },
    Case {
        name: "sparse_files_stay_sparse",
        story: "a database image of 64 GB with 1 MB of data must not fill the disk",
        needs: everyone,
        run: sparse,
    },
    Case {
        name: "a_layer_that_came_as_a_tar_goes_out_as_the_same_bytes",
        story: "Exact: after load and save every DiffID agrees, whatever program wrote the tar",
        needs: |subject| match subject.keeps_records() {
            true => Ok(()),
            false => Err("the subject keeps no records of tars"),
        },
        run: same_bytes,
    },
    Case {
        name: "attributes_in_overlayfs_own_namespace_are_a_users_data",
        story: "an image that holds another engine's overlay directories: trusted.overlay.opaque in it must neither get lost nor take effect",
        needs: everyone,
        run: overlay_attributes,
    },
];

fn change_list(subject: &mut dyn Subject) -> Result<()> {
    let mut twin = Twin::new(subject)?;
    let base = [
        Op::mkdir("a"),
        Op::write("a/x", "1"),
        Op::write("a.b", "1"),
        Op::mkdir("gone"),
        Op::write("gone/f", "1"),
        Op::mkdir("same"),
        Op::write("same/f", "1"),
        Op::write("was-file", "1"),
        Op::mkdir("was-dir"),
        Op::write("was-dir/f", "1"),
    ];
    let base = twin.layer(None, &base)?;
    let change = [
        Op::write("a/x", "2"),
        Op::chmod("a.b", 0o600),
        Op::unlink("gone/f"),
        Op::rmdir("gone"),
        Op::unlink("was-file"),
        Op::mkdir("was-file"),
        Op::write("was-file/n", "1"),
        Op::unlink("was-dir/f"),
        Op::rmdir("was-dir"),
        Op::write("was-dir", "1"),
        Op::mkdir("z"),
        Op::write("z/n", "1"),
    ];
    let child = twin.create(Some(base))?;
    twin.run(child, &change)?;
    use ChangeKind::{Added, Deleted, Modified};
    let expected = [
        (Modified, ""),
        (Modified, "a"),
        (Modified, "a/x"),
        (Modified, "a.b"),
        (Deleted, "gone"),
        (Modified, "was-dir"),
        (Modified, "was-file"),
        (Added, "was-file/n"),
        (Added, "z"),
        (Added, "z/n"),
    ]
    .map(|(kind, path)| Change { path: path.into(), kind });
    assert_eq!(twin.subject.changes(child, &[base], false)?, expected);
    assert_eq!(twin.subject.changes(child, &[base], true)?, expected, "by the native diff");
    Ok(())
}

fn changed_back(subject: &mut dyn Subject) -> Result<()> {
    let mut twin = Twin::new(subject)?;
    let base =
        twin.layer(None, &[Op::write("f", "1"), Op::mkdir("d"), Op::utimes("f", 77, 7), Op::utimes("", 78, 8)])?;
    let child = twin.create(Some(base))?;
    let there_and_back = [
        Op::chmod("f", 0o600),
        Op::chmod("f", 0o644),
        Op::chmod("d", 0o700),
        Op::chmod("d", 0o755),
        Op::write("new", "1"),
        Op::unlink("new"),
        Op::utimes("", 78, 8),
    ];
    twin.run(child, &there_and_back)?;
    assert_eq!(twin.subject.changes(child, &[base], false)?, []);
    assert_eq!(twin.subject.changes(child, &[base], true)?, [], "by the native diff");
    twin.check(child)
}

fn live(subject: &mut dyn Subject) -> Result<()> {
    let (base, child) = (LayerId(1), LayerId(2));
    let plain = &LayerOptions::default();
    subject.driver().create(base, &[], plain)?;
    subject.driver().commit(base)?;
    subject.driver().create(child, &[base], plain)?;
    let listed = |subject: &dyn Subject| -> Result<Vec<String>> {
        let changes = subject.changes(child, &[base], false)?;
        let native = subject.changes(child, &[base], true)?;
        assert_eq!(changes, native);
        Ok(changes.iter().map(|c| c.path.display().to_string()).filter(|path| !path.is_empty()).collect())
    };
    let subject = &*subject;
    subject.with_tree(child, &[base], Access::ReadWrite, &mut |tree| {
        tree.apply(&Op::write("a", "1"))?;
        assert_eq!(listed(subject)?, ["a"]);
        tree.apply(&Op::write("b", "1"))?;
        tree.apply(&Op::unlink("a"))?;
        assert_eq!(listed(subject)?, ["b"]);
        tree.apply(&Op::write("still-writable", "1"))?;
        Ok(())
    })?;
    assert_eq!(listed(subject)?, ["b", "still-writable"]);
    Ok(())
}

fn sparse(subject: &mut dyn Subject) -> Result<()> {
    const GIB: u64 = 1 << 30;
    const MIB: u64 = 1 << 20;
    let base = [
        Op::write("holes", "start"),
        Op::write_at("holes", GIB, vec![1; 100_000]),
        Op::truncate("holes", 4 * GIB),
        Op::write("only-hole", ""),
        Op::truncate("only-hole", 8 * GIB),
        Op::write("punched", vec![2; 4 * MIB as usize]),
    ];
    let change = [
        Op::write_at("holes", 2 * GIB, "middle"),
        Op::punch("punched", MIB, 2 * MIB),
        Op::write("new", ""),
        Op::truncate("new", GIB),
    ];
    // Overlayfs copies up in pieces of 1 MiB, each with data somewhere in it.
    let stored = |subject: &dyn Subject, id: LayerId, parents: &[LayerId], path: &str| -> Result<u64> {
        let mut stored = 0;
        subject.with_tree(id, parents, Access::ReadOnly, &mut |tree| {
            stored = tree.segments(Path::new(path))?.iter().map(|segment| segment.len).sum();
            Ok(())
        })?;
        Ok(stored)
    };
    let mut twin = Twin::new(subject)?;
    let base = twin.layer(None, &base)?;
    let child = twin.layer(Some(base), &change)?;
    twin.check(child)?;
    let (top, bottom) = (twin.subject.diff_tar(child, &[base], false)?, twin.subject.diff_tar(base, &[], false)?);
    assert!(top.len() + bottom.len() < 16 * MIB as usize, "tars of {} and {} bytes", top.len(), bottom.len());
    let (copy, copy_child) = (LayerId(1000), LayerId(1001));
    for (id, parents, tar) in [(copy, &[][..], bottom), (copy_child, &[copy], top)] {
        twin.subject.driver().create(id, parents, &LayerOptions::default())?;
        twin.subject.fill(id, parents, &mut &*tar, None)?;
        twin.subject.driver().commit(id)?;
    }
    let strategy = &twin.subject.driver().capabilities().write_strategy;
    let extents = matches!(strategy, WriteStrategy::CopyUp { unit: CopyUnit::Extent { .. } });
    for (id, parent) in [(child, base), (copy_child, copy)] {
        for (path, most) in [("holes", 4 * MIB), ("only-hole", 0), ("punched", 2 * MIB), ("new", 0)] {
            let stored = stored(twin.subject, id, &[parent], path)?;
            // What is punched out of a file copied up by extents is stored as zeros, which tars then have too: a hole there
            // stands for the lower file's data.
            let most = if extents && path == "punched" { 4 * MIB } else { most };
            assert!(stored <= most, "{path} in layer {id} has {stored} bytes stored, not at most {most}");
        }
    }
    Ok(())
}

/// A tar no program of ours would write: entries out of order, twice, padded, and with a trailer of its own.
fn odd_tar() -> Result<Vec<u8>> {
    let meta = |kind, mode| Metadata {
        kind,
        mode,
        uid: 1000,
        gid: 100_000_000,
        mtime: Timestamp { secs: -5, nanos: 999_999_999 },
        xattrs: BTreeMap::new(),
    };
    let mut writer = TarWriter::new(Vec::new());
    let mut file = |path: String, data: &[u8]| {
        let size = data.len() as u64;
        let segments = if size == 0 { Vec::new() } else { vec![Segment { offset: 0, len: size }] };
        let content = Content { size, segments, data: Box::new(std::io::Cursor::new(data.to_vec())) };
        writer.append(Path::new(&path), &meta(crate::FileKind::File { size }, 0o640), Some(content))
    };
    file("z/first".into(), b"before its directory")?;
    file("twice".into(), b"old")?;
    file("twice".into(), b"new")?;
    file(format!("{}/{}", "long".repeat(50), "name".repeat(60)), &[9; 5000])?;
    file("empty".into(), b"")?;
    writer.append(Path::new("z"), &meta(crate::FileKind::Directory, 0o750), None)?;
    let mut tar = writer.finish()?;
    tar.extend([0; 10_240]);
    Ok(tar)
}

fn same_bytes(subject: &mut dyn Subject) -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let (base, child) = (LayerId(1), LayerId(2));
    let odd = odd_tar()?;
    let mut whiteouts = TarWriter::new(Vec::new());
    whiteouts.whiteout(Path::new("twice"))?;
    whiteouts.opaque(Path::new("z"))?;
    let whiteouts = whiteouts.finish()?;
    for (id, parents, tar) in [(base, &[][..], &odd), (child, &[base], &whiteouts)] {
        let record = scratch.path().join(id.to_string());
        subject.driver().create(id, parents, &LayerOptions::default())?;
        subject.fill(id, parents, &mut &tar[..], Some(&record))?;
        subject.driver().commit(id)?;
    }
    subject.reopen()?;
    for (id, parents, tar) in [(base, &[][..], &odd), (child, &[base], &whiteouts)] {
        let mut out = Vec::new();
        let record = scratch.path().join(id.to_string());
        subject.repack(id, parents, &record, DiffId(Digest::of(tar)), &mut out)?;
        assert!(out == *tar, "layer {id} came back as {} other bytes instead of {}", out.len(), tar.len());
    }
    let shown = snapshot(subject, child, &[base])?;
    assert!(!shown.contains_key(Path::new("twice")) && !shown.contains_key(Path::new("z/first")), "{:?}", shown.keys());
    Ok(())
}

fn overlay_attributes(subject: &mut dyn Subject) -> Result<()> {
    let (base, child, copy) = (LayerId(1), LayerId(2), LayerId(3));
    let plain = &LayerOptions::default();
    subject.driver().create(base, &[], plain)?;
    subject.with_tree(base, &[], Access::ReadWrite, &mut |tree| {
        tree.apply(&Op::mkdir("d"))?;
        Ok(tree.apply(&Op::write("d/below", "1"))?)
    })?;
    subject.driver().commit(base)?;
    subject.driver().create(child, &[base], plain)?;
    let mut accepted = true;
    subject.with_tree(child, &[base], Access::ReadWrite, &mut |tree| {
        // Kernels before 6.8 refuse it, which is honest.
        accepted = ["trusted.overlay.opaque", "user.overlay.opaque"]
            .into_iter()
            .all(|name| tree.apply(&Op::set_xattr("d", name, "y")).is_ok());
        Ok(tree.apply(&Op::write("d/own", "1"))?)
    })?;
    subject.driver().commit(child)?;
    let shown = snapshot(subject, child, &[base])?;
    assert!(shown.contains_key(Path::new("d/below")), "a user's attribute made a directory opaque");
    if accepted {
        assert_eq!(shown[Path::new("d")].meta.xattrs.len(), 2, "{:?}", shown[Path::new("d")].meta.xattrs);
        let tar = subject.diff_tar(child, &[base], false)?;
        subject.driver().create(copy, &[base], plain)?;
        subject.fill(copy, &[base], &mut &*tar, None)?;
        subject.driver().commit(copy)?;
        same_tree("the layer applied again", &snapshot(subject, copy, &[base])?, &shown);
    }
    Ok(())
}
