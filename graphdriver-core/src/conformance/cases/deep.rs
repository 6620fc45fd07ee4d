//! Deep: long chains of layers.

use super::{Case, Subject, Twin, everyone};
use crate::{
    Access, ErrorKind, LayerId, LayerOptions, Result,
    model::{Op, Tree},
};
use std::path::Path;

pub(super) const CASES: &[Case] = &[
    Case {
        name: "128_layers_equal_a_flat_copy_at_every_layer",
        story: "containerd testsuite, moby graphtest: Docker images have up to 127 layers, and long lowerdir options once were cut at a page",
        needs: |subject| match subject.driver().capabilities().max_depth >= 128 {
            true => Ok(()),
            false => Err("the driver's chains are shorter"),
        },
        run: flat_copy,
    },
    Case {
        name: "the_deepest_chain_mounts_and_one_more_is_refused",
        story: "Deep, honest: what max_depth promises mounts, top and bottom files read; more is Unsupported at create and not at mount",
        needs: everyone,
        run: deepest,
    },
];

fn flat_copy(subject: &mut dyn Subject) -> Result<()> {
    let mut twin = Twin::new(subject)?;
    let mut parent = None;
    for n in 0..128 {
        let own = format!("layer{n}");
        let mut ops =
            vec![Op::write("all", own.as_bytes()), Op::write(&own, [n as u8; 100]), Op::mkdir(format!("d{n}"))];
        if n >= 3 {
            ops.push(Op::unlink(format!("layer{}", n - 3)));
            ops.push(Op::rename(format!("layer{}", n - 1), format!("d{}/moved", n - 2)));
            ops.push(Op::write(format!("layer{}", n - 1), "put back"));
        }
        if n % 16 == 15 {
            ops.extend([Op::chmod(format!("d{}", n - 4), 0o711), Op::chmod("all", 0o600)]);
        }
        let id = twin.layer(parent, &ops)?;
        twin.check_tree(id)?;
        parent = Some(id);
    }
    twin.check(parent.expect("there are 128"))
}

/// Nothing promises more, and overlayfs takes 500.
const ENOUGH: usize = 500;

fn deepest(subject: &mut dyn Subject) -> Result<()> {
    let driver = subject.driver();
    let depth = driver.capabilities().max_depth.min(ENOUGH);
    let mut parents: Vec<LayerId> = Vec::new();
    let make = |id: LayerId, parents: &[LayerId], file: String| -> Result<()> {
        driver.create(id, parents, &LayerOptions::default())?;
        // Mounting every one would take time that grows with the square of the depth.
        if parents.is_empty() || parents.len() + 1 >= depth {
            let run = &mut |tree: &mut dyn Tree| Ok(tree.apply(&Op::write(&file, &file))?);
            subject.with_tree(id, parents, Access::ReadWrite, run)?;
        }
        driver.commit(id)
    };
    for n in 0..depth {
        make(LayerId(n as u64 + 1), &parents, if n == 0 { "bottom".into() } else { "middle".into() })?;
        parents.insert(0, LayerId(n as u64 + 1));
    }
    let top = LayerId(depth as u64 + 1);
    make(top, &parents, "top".into())?;
    subject.with_tree(top, &parents, Access::ReadOnly, &mut |tree| {
        for file in ["bottom", "top"] {
            assert_eq!(tree.read(Path::new(file))?, file.as_bytes());
        }
        Ok(())
    })?;
    if driver.capabilities().max_depth <= ENOUGH {
        parents.insert(0, top);
        let refused = driver.create(LayerId(top.0 + 1), &parents, &LayerOptions::default());
        assert_eq!(refused.expect_err("a chain that is too long").kind(), ErrorKind::Unsupported);
    }
    Ok(())
}
