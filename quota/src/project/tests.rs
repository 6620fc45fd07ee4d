use super::{ledger::*, *};
use proptest::prelude::*;

fn entry(project: u32, size: Option<u64>, inodes: Option<u64>, ready: bool) -> Entry {
    Entry { project, limits: Limits { size: size.map(ByteSize), inodes }, ready }
}

/// Version 1, as it was first written.
const SAMPLE: &str =
    "graphdriver projects 1\nnext 1900000005\n1900000003 17 52428800 - ready\n1900000004 18 - 100000 tagging\n";

#[test]
fn the_ledger_is_read_as_it_was_written_by_version_1() {
    let book = Book::parse(SAMPLE).unwrap();
    assert_eq!(book.next, 1_900_000_005);
    assert_eq!(book.trees["17"], entry(1_900_000_003, Some(52_428_800), None, true));
    assert_eq!(book.trees["18"], entry(1_900_000_004, None, Some(100_000), false));
    assert_eq!((book.trees.len(), book.print().as_str()), (2, SAMPLE));
}

#[test]
fn what_is_not_understood_of_a_ledger_is_refused() {
    for (text, kind) in [
        ("", ErrorKind::Unsupported),
        ("graphdriver projects 2\nnext 1\n", ErrorKind::Unsupported),
        ("graphdriver projects 1\n", ErrorKind::Corrupt),
        ("graphdriver projects 1\nnext x\n", ErrorKind::Corrupt),
        ("graphdriver projects 1\nnext 1\n5 a - - read", ErrorKind::Corrupt),
        ("graphdriver projects 1\nnext 1\n5 a - - ready", ErrorKind::Corrupt),
        ("graphdriver projects 1\nnext 1\n5 a - ready\n", ErrorKind::Corrupt),
        ("graphdriver projects 1\nnext 1\n0 a - - ready\n", ErrorKind::Corrupt),
        ("graphdriver projects 1\nnext 1\n5 ../a - - ready\n", ErrorKind::Corrupt),
        ("graphdriver projects 1\nnext 1\n5 a - - ready\n5 b - - ready\n", ErrorKind::Corrupt),
        ("graphdriver projects 1\nnext 1\n5 a - - ready\n6 a - - ready\n", ErrorKind::Corrupt),
        ("graphdriver projects 1\nnext 1\n4294967296 a - - ready\n", ErrorKind::Corrupt),
    ] {
        assert_eq!(Book::parse(text).unwrap_err().kind(), kind, "{text:?}");
    }
}

#[test]
fn a_ledger_says_where_it_is_damaged_and_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("projects"), "graphdriver projects 1\nnext 1\nhello\n").unwrap();
    let e = Ledger::new(dir.path()).read().unwrap_err().to_string();
    assert!(e.contains("hello") && e.contains("/projects") && e.contains("backup"), "{e}");
    let e = Ledger::new(dir.path()).change(|_| Ok(())).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Corrupt, "what cannot be read is not written over");
}

#[test]
fn projects_are_given_in_turn_and_never_those_of_others() {
    let mut book = Book { next: 12, ..Book::default() };
    book.trees.insert("a".into(), entry(13, None, None, true));
    let taken = |project: u32| Ok([12, 15, 10].contains(&project));
    let mut given = Vec::new();
    for name in ["b", "c"] {
        let project = book.free(&(10..=15), "d.quota_projects", taken).unwrap();
        book.trees.insert(name.into(), entry(project, None, None, true));
        given.push(project);
    }
    assert_eq!((given, book.next), (vec![14, 11], 12));
    let e = book.free(&(10..=15), "d.quota_projects", taken).unwrap_err();
    assert!(e.kind() == ErrorKind::OutOfSpace && e.to_string().contains("the option d.quota_projects"), "{e}");
    // A range that was changed since: what is out of it stays whose it is.
    assert_eq!(book.free(&(14..=20), "d.quota_projects", |_| Ok(false)).unwrap(), 15);
    book.trees.remove("b");
    assert_eq!(
        book.free(&(14..=20), "d.quota_projects", |_| Ok(false)).unwrap(),
        16,
        "a freed number is not given again at once"
    );
}

#[test]
fn processes_take_turns_with_the_ledger() {
    let dir = tempfile::tempdir().unwrap();
    let ledger = Ledger::new(dir.path());
    std::thread::scope(|scope| {
        for n in 0..8 {
            let ledger = &ledger;
            scope.spawn(move || {
                for m in 0..10 {
                    let add = |book: &mut Book| {
                        let project = book.free(&(1..=1000), "d.quota_projects", |_| Ok(false))?;
                        book.trees.insert(format!("{n}-{m}"), entry(project, None, None, true));
                        Ok(())
                    };
                    ledger.change(add).unwrap();
                }
            });
        }
    });
    assert_eq!(ledger.read().unwrap().trees.len(), 80, "parse refuses a number that two have");
}

#[test]
fn numbers_that_the_administrator_has_named_are_found() {
    let found = |text| numbers(text).collect::<Vec<_>>();
    assert_eq!(found("web:42\n# old:43\n\nlogs : 44\n"), [42, 44]);
    assert_eq!(found("42:/srv/web\n1900000000:/srv/x\nnonsense\n"), [42, 1_900_000_000]);
}

#[test]
fn a_limit_of_nothing_is_refused() {
    for limits in
        [Limits { size: Some(ByteSize(0)), inodes: None }, Limits { size: Some(ByteSize(1)), inodes: Some(0) }]
    {
        let e = check_limits(limits).unwrap_err();
        assert!(e.kind() == ErrorKind::InvalidInput && e.to_string().contains("none"), "{e}");
    }
    check_limits(Limits::default()).unwrap();
}

#[test]
fn a_full_tree_gets_room_for_its_mount_up_to_a_bound() {
    let room = |limit, used| {
        let used = graphdriver_core::Usage { bytes: 0, inodes: used };
        with_room(Limits { size: None, inodes: limit }, used).inodes
    };
    assert_eq!((ROOM_INODES, ROOMS), (8, 16));
    for (limit, used, wanted) in [
        (None, 500, None),
        (Some(100), 50, Some(100)),
        (Some(100), 92, Some(100)),
        (Some(100), 95, Some(103)),
        (Some(100), 100, Some(108)),
        (Some(100), 108, Some(116)),
        (Some(100), 225, Some(228)),
        (Some(100), 228, Some(228)),
        // Lowered from 500.
        (Some(100), 500, Some(508)),
        (Some(u64::MAX), u64::MAX, Some(u64::MAX)),
    ] {
        assert_eq!(room(limit, used), wanted, "{used} of {limit:?}");
    }
}

proptest! {
    // Each change of the file waits for the disk.
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn a_ledger_comes_back_as_it_was_written(
        next in any::<u32>(),
        trees in proptest::collection::btree_map("[!-.0-~]{3,9}", (1..u32::MAX, any::<Option<u64>>(), any::<Option<u64>>(), any::<bool>()), 0..20),
    ) {
        let mut given = HashSet::new();
        let trees = trees.into_iter().filter(|(_, (project, ..))| given.insert(*project));
        let trees = trees.map(|(name, (project, size, inodes, ready))| (name, entry(project, size, inodes, ready)));
        let book = Book { next, trees: trees.collect() };
        prop_assert_eq!(Book::parse(&book.print()).unwrap(), book);
    }

    #[test]
    fn no_text_makes_the_ledgers_parser_panic_or_misread(text in "(graphdriver projects 1\nnext 5\n)?[ -~\n]{0,80}") {
        if let Ok(book) = Book::parse(&text) {
            prop_assert_eq!(Book::parse(&book.print()).unwrap(), book);
        }
    }

    /// Whatever is allocated, freed and interrupted: no project is two trees', none is one that somebody else has, and the
    /// ledger names all that may still be in use.
    #[test]
    fn no_sequence_of_gifts_and_crashes_gives_a_project_twice(
        steps in proptest::collection::vec((0..6u8, 0..4u8), 1..60),
        others in proptest::collection::hash_set(1..12u32, 0..5),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::new(dir.path());
        // What the kernel has: projects with a limit or files.
        let mut on_disk: HashSet<u32> = others.clone();
        for (tree, what) in steps {
            let name = tree.to_string();
            let there = ledger.read().unwrap().trees.get(&name).copied();
            match (what, there) {
                // A gift whose maker may be killed before anything has it.
                (0 | 1, None) => {
                    let enter = |book: &mut Book| {
                        let project = book.free(&(1..=12), "d.quota_projects", |project| Ok(on_disk.contains(&project)))?;
                        book.trees.insert(name.clone(), entry(project, None, None, what == 0));
                        Ok(project)
                    };
                    match ledger.change(enter) {
                        Ok(project) if what == 0 => prop_assert!(on_disk.insert(project), "{project} was somebody's"),
                        Ok(project) => prop_assert!(!on_disk.contains(&project)),
                        Err(e) => prop_assert_eq!(e.kind(), ErrorKind::OutOfSpace),
                    }
                }
                // The kernel's part of forgetting, which may be all that happens.
                (2 | 3, Some(gone)) => {
                    on_disk.remove(&gone.project);
                    if what == 2 {
                        ledger.change(|book| { book.trees.remove(&name); Ok(()) }).unwrap();
                    }
                }
                _ => {}
            }
            let named: HashSet<u32> = ledger.read().unwrap().trees.values().map(|e| e.project).collect();
            prop_assert!(others.is_disjoint(&named));
            prop_assert!(on_disk.iter().all(|project| others.contains(project) || named.contains(project)));
        }
    }
}
