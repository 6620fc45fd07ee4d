//! `graphdriver check`: whatever is done to a store behind its back is named, and nothing is changed.

mod common;

use common::{Home, no_program, no_root, skipped};
use rusqlite::Connection;
use serde_json::Value;

/// A data root of one driver with the demo image, a container `c` on it, and `new:1`, made of another container.
struct Rig {
    home: Home,
    driver: &'static str,
}

impl Rig {
    /// None if that cannot be here, which then is noted.
    fn new(test: &str, driver: &'static str) -> Option<Rig> {
        let missing = || match driver {
            "btrfs" => no_program(&["mkfs.btrfs", "btrfs"]),
            _ => None,
        };
        if skipped(test, no_root().or_else(missing)) {
            return None;
        }
        let rig = Rig { home: Home::new(), driver };
        if driver == "btrfs" {
            // The filesystem outlives no script, its image does.
            rig.home.ok_noisy("truncate -s 512M disk; mkfs.btrfs -q disk; mkdir root");
        }
        // On one processor it makes layers one after the other, so that 1 is the lowest.
        rig.ok(
            "cpu=$(taskset -cp $$ | sed 's/.*: //; s/[-,].*//')
             taskset -c $cpu graphdriver load -qi demo.tar > /dev/null; graphdriver create --name c demo > /dev/null
             graphdriver create --name d demo > /dev/null; mkdir m; graphdriver mount d m > /dev/null
             echo new > m/new; graphdriver umount d; graphdriver commit d new:1 > /dev/null; graphdriver rm d > /dev/null",
        );
        Some(rig)
    }

    /// `$layers` is where the driver has them.
    fn script(&self, script: &str) -> String {
        let (disk, below) = match self.driver {
            "btrfs" => ("mount -o loop disk root", "/layers"),
            _ => (":", ""),
        };
        let driver = self.driver;
        format!(
            "{disk}; export GRAPHDRIVER_STORAGE_DRIVER={driver}; store=$PWD/root/{driver}; layers=$store/data{below}\n\
             {script}"
        )
    }

    #[track_caller]
    fn ok(&self, script: &str) -> String {
        self.home.ok_noisy(&self.script(script))
    }

    /// What `check ARGUMENTS` finds, which its exit code says too.
    #[track_caller]
    fn findings(&self, arguments: &str) -> Vec<Value> {
        let out = self.home.run(&self.script(&format!("graphdriver --format json check {arguments}")));
        let said = String::from_utf8_lossy(&out.stderr);
        let found: Value = serde_json::from_slice(&out.stdout).unwrap_or_else(|e| panic!("{e}: {said}"));
        let found = found["Findings"].as_array().unwrap().clone();
        let code = if found.is_empty() { 0 } else { 9 };
        assert_eq!(out.status.code(), Some(code), "{said} {found:?}");
        found
    }

    /// The one thing that is found, of this kind, about this layer.
    #[track_caller]
    fn one(&self, arguments: &str, kind: &str, layer: Option<u64>, what: &str) -> Value {
        let found = self.findings(arguments);
        let [one] = found.as_slice() else { panic!("one was to be found: {found:#?}") };
        assert_eq!(one["Kind"], kind, "{one:#}");
        assert_eq!(one["Layer"].as_u64(), layer, "{one:#}");
        assert!(one["What"].as_str().unwrap().contains(what), "{what}: {one:#}");
        for told in ["Consequence", "Remedy"] {
            assert!(one[told].as_str().unwrap().len() > 10, "{one:#}");
        }
        one.clone()
    }

    fn database(&self, sql: &str) {
        let db = Connection::open(self.home.root().join(self.driver).join("store.db")).unwrap();
        db.execute_batch(sql).unwrap();
    }
}

/// How a driver's layers are changed behind its back.
struct Ways {
    driver: &'static str,
    /// Removes layer 1.
    remove: &'static str,
    /// Changes a file in layer 2 without its size.
    change: &'static str,
    /// Makes committed layer 1 writable.
    thaw: &'static str,
    /// Makes layer 99, which nobody knows, and something that is no layer.
    strange: &'static str,
}

const OVERLAY: Ways = Ways {
    driver: "overlay2",
    remove: "rm -r $layers/1",
    change: "printf HELLO > $layers/2/diff/etc/motd",
    thaw: "mkdir $layers/1/work",
    strange: "mkdir -p $layers/99/diff $layers/mine",
};

const VFS_FUSE: Ways = Ways { driver: "vfs-fuse", ..OVERLAY };

#[cfg(feature = "btrfs")]
const BTRFS: Ways = Ways {
    driver: "btrfs",
    remove: "btrfs -q subvolume delete $layers/1",
    change: "btrfs property set $layers/2 ro false; printf HELLO > $layers/2/etc/motd; btrfs property set $layers/2 ro true",
    thaw: "btrfs property set $layers/1 ro false",
    strange: "btrfs -q subvolume create $layers/99; mkdir $layers/mine",
};

fn whole(rig: &Rig, _: &Ways) {
    let said = rig.ok("graphdriver check --digests");
    assert_eq!(
        said,
        "looked at: layers 4, images 2, containers 1, snapshots 0, mounts 0; layers read and compared with their digests: 3\n"
    );
    // While something is mounted and written to as well.
    let said = rig.ok("graphdriver mount c m > /dev/null; echo 1 > m/1; graphdriver check; graphdriver umount c");
    assert!(said.ends_with("mounts 1\n"), "{said}");
    rig.ok("graphdriver rm c > /dev/null; graphdriver rmi new:1 > /dev/null; graphdriver check --digests");
}

fn lost(rig: &Rig, ways: &Ways) {
    rig.ok(ways.remove);
    let found = rig.one("", "damage", Some(1), "layer 1 has no storage");
    let needed: Vec<_> = found["NeededBy"].as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
    assert!(needed.contains(&"container c"), "{needed:?}");
    assert!(needed.iter().any(|name| name.contains("demo:")) && needed.iter().any(|name| name.contains("new:1")));
    let out = rig.home.run(&rig.script("graphdriver check"));
    let (told, said) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(told.starts_with("damage: layer 1 has no storage") && told.contains("\n    do: remove what"), "{told}");
    assert!(out.status.code() == Some(9) && said.contains("something wrong"), "{said}");
    // What cannot be read is not read.
    rig.one("--digests", "damage", Some(1), "layer 1 has no storage");
}

fn strange(rig: &Rig, ways: &Ways) {
    rig.ok(ways.strange);
    let found = rig.findings("");
    let mut told: Vec<_> = found.iter().map(|f| (f["Kind"].as_str().unwrap(), f["What"].as_str().unwrap())).collect();
    told.sort_unstable();
    let [("alien", alien), ("leftover", leftover)] = told.as_slice() else { panic!("{told:?}") };
    assert!(alien.contains("/mine is nothing of graphdriver's"), "{alien}");
    assert!(leftover.contains("/99: there is no layer 99"), "{leftover}");
    // It says what frees it.
    rig.ok("rm $store/boot; graphdriver info > /dev/null");
    rig.one("", "alien", None, "/mine");
}

fn changed(rig: &Rig, ways: &Ways) {
    rig.ok(ways.change);
    assert_eq!(rig.findings(""), [Value::Null; 0], "only reading it can tell");
    rig.one("--digests", "damage", Some(2), "layer 2 is not what it was");
}

fn thawed(rig: &Rig, ways: &Ways) {
    rig.ok(ways.thaw);
    rig.one("", "damage", Some(1), "can be written to");
}

fn run(test: &str, case: fn(&Rig, &Ways), ways: &Ways) {
    if let Some(rig) = Rig::new(test, ways.driver) {
        case(&rig, ways);
    }
}

macro_rules! cases {
    ($module:ident: $ways:ident, $($name:ident: $case:ident),*) => {
        mod $module {
            $(#[test]
            fn $name() {
                super::run(concat!(stringify!($module), "::", stringify!($name)), super::$case, &super::$ways);
            })*
        }
    };
    ($module:ident: $ways:ident) => { cases! { $module: $ways,
        nothing_is_wrong_with_what_commands_made: whole,
        a_layer_whose_storage_was_removed_is_named: lost,
        what_nobody_knows_is_named: strange,
        a_layer_that_was_changed_is_found_by_its_digest: changed,
        a_committed_layer_that_can_be_written_to_is_named: thawed
    } };
}

cases! { overlay2: OVERLAY }
cases! { vfs_fuse: VFS_FUSE }
#[cfg(feature = "btrfs")]
cases! { btrfs: BTRFS }

fn overlay2(test: &str) -> Option<Rig> {
    Rig::new(test, "overlay2")
}

#[test]
fn looking_changes_nothing() {
    let Some(rig) = overlay2("looking_changes_nothing") else { return };
    rig.ok("mkdir -p $layers/new-77/diff $layers/removed-5/diff $store/run $store/tmp/abc; touch $store/run/abc.lock");
    rig.database(
        "INSERT INTO layers(id, kind, created) VALUES (50, 'active', 0);
         INSERT INTO layer_intents(layer, op, session) VALUES (50, 'create', 'abc')",
    );
    // The write-ahead log and its index come and go with whoever has the database open.
    let list = "(cd root; find . ! -name 'store.db-*' ! -path ./overlay2 ! -path ./overlay2/data -printf '%p %s %T@ %i\n' | sort)";
    let before = rig.ok(list);
    let found = rig.findings("--digests");
    assert_eq!(rig.ok(list), before);
    let mut told: Vec<_> = found.iter().map(|found| found["What"].as_str().unwrap()).collect();
    told.sort_unstable();
    for (told, part) in told.iter().zip(["new-77", "removed-5", "run/abc.lock", "tmp/abc", "the making of layer 50"]) {
        assert!(told.contains(part), "{told:?}");
    }
    assert_eq!(told.len(), 5, "{told:?}");
    rig.ok("graphdriver info");
    assert_eq!(rig.findings("--digests"), [Value::Null; 0], "as each of them said");
}

#[test]
fn what_others_are_just_doing_is_not_found() {
    let Some(rig) = overlay2("what_others_are_just_doing_is_not_found") else { return };
    let said = rig.ok("graphdriver rm c > /dev/null; graphdriver rmi new:1 > /dev/null
         { for i in 1 2 3 4 5 6; do
               graphdriver create --name box demo; graphdriver rm box; graphdriver rmi -f demo:1 demo:latest
               graphdriver load -qi demo.tar
           done > /dev/null; touch done; } &
         while [[ ! -e done ]]; do graphdriver check --digests > found || cat found; done; wait $!");
    assert_eq!(said, "");
}

#[test]
fn records_mounts_and_added_files_are_looked_at() {
    let Some(rig) = overlay2("records_mounts_and_added_files_are_looked_at") else { return };
    rig.ok("mkdir -p $store/records/88");
    rig.one("", "leftover", None, "records/88: there is no layer 88");
    rig.ok("rmdir $store/records/88; mv $store/records/1 kept");
    rig.one("", "damage", Some(1), "the record of layer 1 is missing");
    rig.ok("mv kept $store/records/1");
    // Another command's mount went with its namespace.
    rig.ok("graphdriver mount c m > /dev/null");
    rig.one("", "leftover", None, "the mount of container c at");
    rig.ok("graphdriver mounts");
    assert_eq!(rig.findings(""), [Value::Null; 0]);
    rig.ok("touch $layers/1/diff/added");
    rig.one("--digests", "damage", Some(1), "files when it was committed");
}

#[test]
fn rows_that_contradict_each_other_are_named() {
    let Some(rig) = overlay2("rows_that_contradict_each_other_are_named") else { return };
    rig.database("UPDATE layers SET diff_id = 'sha256:' || hex(zeroblob(32)) WHERE id = 2");
    let found = rig.findings("");
    assert!(found.len() == 2 && found.iter().all(|f| f["What"].as_str().unwrap().contains("its configuration names")));
    rig.database("UPDATE layers SET kind = 'committed' WHERE id = 3; UPDATE layers SET kind = 'active' WHERE id = 1");
    let told: Vec<_> = rig.findings("").iter().map(|found| found["What"].as_str().unwrap().to_owned()).collect();
    for part in [
        "layer 2 lies on layer 1, which is active",
        "container c has layer 3, which is not active",
        "layer 3 is committed, and its storage",
        "layer 1 is active, and its storage",
    ] {
        assert!(told.iter().any(|told| told.contains(part)), "{part}: {told:#?}");
    }
}

#[test]
fn a_damaged_database_is_named_and_believed_in_nothing() {
    let Some(rig) = overlay2("a_damaged_database_is_named_and_believed_in_nothing") else { return };
    rig.database("PRAGMA foreign_keys = OFF; UPDATE layers SET parent = 999 WHERE id = 2");
    rig.one("", "damage", None, "a row in layers refers to none in layers");
}

#[test]
fn without_a_store_there_is_nothing_to_look_at() {
    let Some(rig) = overlay2("without_a_store_there_is_nothing_to_look_at") else { return };
    let script = rig.script("export GRAPHDRIVER_DATA_ROOT=$PWD/elsewhere; graphdriver check");
    rig.home.fails(3, &script, &["there is no store of storage driver overlay2"]);
    assert!(!rig.home.path().join("elsewhere").exists());
}
