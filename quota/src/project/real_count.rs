//! Counting without limits, on the same filesystems.

use super::*;
use graphdriver_core::{LayerId, LayerOptions, OverlayXattrs, overlay_home::Home};

const WIDE: RangeInclusive<u32> = 1_000_000..=1_999_999;

fn layer(disk: &Disk, name: &str) -> PathBuf {
    let tree = disk.tree(name);
    ["diff", "work"].iter().for_each(|part| fs::create_dir(tree.join(part)).unwrap());
    tree
}

/// xfs counts down in the background.
fn counts(quota: &ProjectQuota, tree: &Path, inodes: u64) -> bool {
    (0..100).any(|_| {
        std::thread::sleep(std::time::Duration::from_millis(50));
        quota.counted(tree).unwrap().is_some_and(|used| used.inodes == inodes)
    })
}

#[test]
fn a_tree_without_limits_is_counted_from_its_beginning_and_leaves_nothing() {
    each("a_tree_without_limits_is_counted_from_its_beginning_and_leaves_nothing", |disk| {
        let quota = disk.quota(WIDE);
        let (a, b) = (layer(disk, "a"), layer(disk, "b"));
        quota.count_new(&a, 1).unwrap();
        // The same turn: the number is taken.
        quota.count_new(&b, 1).unwrap();
        assert_ne!(quota.project_at(&a).unwrap(), quota.project_at(&b).unwrap());
        std::os::unix::fs::symlink("x", a.join("diff/symlink")).unwrap();
        fill(&a.join("diff/f"), 3 * MIB).unwrap();
        fs::hard_link(a.join("diff/f"), a.join("diff/g")).unwrap();
        fill(&a.join("work/tmp"), MIB).unwrap();
        fs::rename(a.join("work/tmp"), a.join("diff/renamed")).unwrap();
        fs::rename(a.join("diff/renamed"), a.join("work/back")).unwrap();
        assert!(counts(&quota, &a, 3 + 3), "{:?}", quota.counted(&a));
        assert!(quota.counted(&a).unwrap().unwrap().bytes >= 4 * MIB);
        assert_eq!(quota.counted(&b).unwrap().unwrap().inodes, 3);
        assert_eq!(quota.ledger.read().unwrap(), ledger::Book::default(), "it costs no flush");
        fs::remove_file(a.join("diff/f")).unwrap();
        fs::remove_file(a.join("diff/g")).unwrap();
        assert!(counts(&quota, &a, 3 + 2), "{:?}", quota.counted(&a));
        [a, b].iter().for_each(|tree| fs::remove_dir_all(tree).unwrap());
        agree(&quota, &disk.path());
    });
}

#[test]
fn a_counted_tree_that_is_limited_later_keeps_its_project_and_symlinks_are_in_it() {
    each("a_counted_tree_that_is_limited_later_keeps_its_project_and_symlinks_are_in_it", |disk| {
        let quota = disk.quota(WIDE);
        let (early, late) = (layer(disk, "early"), layer(disk, "late"));
        quota.count_new(&early, 7).unwrap();
        for tree in [&early, &late] {
            std::os::unix::fs::symlink("x", tree.join("diff/symlink")).unwrap();
        }
        let project = quota.project_at(&early).unwrap();
        assert_eq!(quota.set_at("early", &early, size(9 * MIB)).unwrap(), Tagged::default());
        assert_eq!(quota.project_at(&early).unwrap(), project);
        assert_eq!(quota.counted(&early).unwrap().unwrap().inodes, 4);
        assert!(without_privilege(|| is_full(fill(&early.join("diff/f"), 20 * MIB))));
        // What is left out of a project is not in its count.
        assert_eq!(quota.set_at("late", &late, size(9 * MIB)).unwrap().left_out, 1);
        assert_eq!(quota.counted(&late).unwrap(), None);
        // Nor is what a container took out of it.
        tag::tag_dir(tag::open_dir(&early.join("diff")).unwrap().as_fd(), 0).unwrap();
        assert_eq!(quota.counted(&early).unwrap(), None);
        quota.set_at("early", &early, size(9 * MIB)).unwrap();
        for (name, tree) in [("early", early), ("late", late)] {
            fs::remove_dir_all(tree).unwrap();
            quota.forget(name).unwrap();
        }
        agree(&quota, &disk.path());
    });
}

#[test]
fn where_new_projects_have_limits_or_the_range_is_narrow_trees_are_in_none() {
    each("where_new_projects_have_limits_or_the_range_is_narrow_trees_are_in_none", |disk| {
        let (narrow, quota) = (disk.quota(700..=799), disk.quota(WIDE));
        let (a, b) = (layer(disk, "a"), layer(disk, "b"));
        narrow.count_new(&a, 1).unwrap();
        assert_eq!((narrow.counted(&a).unwrap(), narrow.project_at(&a).unwrap()), (None, None));
        quota.count_new(&a, 1).unwrap();
        assert!(quota.counted(&a).unwrap().is_some());
        fs::remove_dir_all(&a).unwrap();
        agree(&quota, &disk.path());
        // Limits of project 0 are those of all new ones on xfs. ext4 has none such.
        quota.kernel.set(0, size(400 * MIB)).unwrap();
        quota.count_new(&b, 3).unwrap();
        if probe::fstype(&disk.path()) == "xfs" {
            assert_eq!((quota.counted(&b).unwrap(), quota.project_at(&b).unwrap()), (None, None));
            assert_eq!(tag::project_of(tag::open_dir(&b.join("diff")).unwrap().as_fd()).unwrap(), None);
        }
    });
}

/// As much as that many inodes need more than mkfs makes.
const MANY_INODES: Recipe = ("mkfs.ext4 -q -N 300000 -O project,quota -E quotatype=prjquota", "loop,prjquota");

/// The figure of a walk, and how long it took, at best of a few times.
fn timed(usage: impl Fn() -> Usage) -> (Usage, std::time::Duration) {
    let once = || {
        let began = std::time::Instant::now();
        (usage(), began.elapsed())
    };
    (0..5).map(|_| once()).min_by_key(|(_, took)| *took).unwrap()
}

/// `GRAPHDRIVER_USAGE_FILES`: with how many files it is measured.
#[test]
fn usage_is_asked_at_least_10_times_as_fast_as_walked_and_is_the_same() {
    if skipped(
        "usage_is_asked_at_least_10_times_as_fast_as_walked_and_is_the_same",
        no_root().or_else(|| no_program(&["mkfs.xfs", "mkfs.ext4"])),
    ) || skipped_outside_guest(
        "usage_is_asked_at_least_10_times_as_fast_as_walked_and_is_the_same",
        no_project_quotas(),
    ) {
        return;
    }
    let files = std::env::var("GRAPHDRIVER_USAGE_FILES").map_or(5000, |files| files.parse::<usize>().unwrap());
    for recipe in [XFS, MANY_INODES] {
        alone(move || {
            let disk = Disk::new(recipe);
            let quota = disk.quota(WIDE);
            let home = Home::open(&disk.path(), OverlayXattrs::Trusted).unwrap();
            let id = LayerId(1);
            home.create(id, &[], &LayerOptions::default(), |dir| quota.count_new(dir, id.0).map(|()| None)).unwrap();
            for n in 0..files {
                let dir = home.diff(id).join(format!("{}", n / 1000));
                if n % 1000 == 0 {
                    fs::create_dir(&dir).unwrap();
                }
                fs::write(dir.join(n.to_string()), if n % 10 == 0 { "a block" } else { "" }).unwrap();
            }
            rustix::fs::sync();
            let (walked, walk) = timed(|| home.usage(id, |_| Ok(None)).unwrap());
            let (asked, ask) = timed(|| home.usage(id, |dir| quota.counted(dir)).unwrap());
            let times = walk.as_secs_f64() / ask.as_secs_f64();
            println!("{}: {files} files, walked in {walk:?}, asked in {ask:?}: {times:.0} times as fast", recipe.0);
            assert_eq!(asked, walked);
            assert!(times >= 10.0);
        });
    }
}
