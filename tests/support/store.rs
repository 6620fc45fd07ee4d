//! The store seen from outside: its database, its directories, and the kernel's table of mounts.

use super::{Gd, images::sha256};
use rusqlite::Connection;
use std::{
    collections::{BTreeSet, HashMap},
    fs,
    io::Read,
    path::Path,
};

fn column<T: rusqlite::types::FromSql>(db: &Connection, sql: &str) -> Vec<T> {
    let mut query = db.prepare(sql).unwrap();
    query.query_map([], |row| row.get(0)).unwrap().map(Result::unwrap).collect()
}

fn names(dir: &Path) -> BTreeSet<String> {
    match fs::read_dir(dir) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => BTreeSet::new(),
        entries => entries.unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect(),
    }
}

impl Gd {
    pub fn store(&self) -> std::path::PathBuf {
        self.root.join("overlay2")
    }

    pub fn database(&self) -> Connection {
        let db = Connection::open(self.store().join("store.db")).unwrap();
        db.busy_timeout(std::time::Duration::from_secs(60)).unwrap();
        db
    }

    /// Nothing is on disk that the store does not know, nothing is known that is not there, nothing is half done, and
    /// nothing is kept that no image and no container needs. Holds while no command runs.
    pub fn assert_tidy(&self, when: &str) {
        let db = self.database();
        let intents = column::<String>(&db, "SELECT op || ' ' || layer FROM layer_intents");
        assert!(intents.is_empty(), "{when}: intents are left: {intents:?}");
        let ids = |sql| column::<i64>(&db, sql).iter().map(i64::to_string).collect::<BTreeSet<_>>();
        let layers = ids("SELECT id FROM layers");
        let needed = ids("WITH RECURSIVE needed(id) AS (
                SELECT top FROM images WHERE top IS NOT NULL UNION SELECT layer FROM containers
                UNION SELECT parent FROM layers JOIN needed USING (id) WHERE parent IS NOT NULL
            ) SELECT id FROM needed");
        assert_eq!(layers, needed, "{when}: layers that are there, and layers that are needed");
        let store = self.store();
        assert_eq!(self.data_dirs(), layers, "{when}: directories in data, and layers");
        let committed = ids("SELECT id FROM layers WHERE kind = 'committed'");
        assert_eq!(names(&store.join("records")), committed, "{when}: records, and committed layers");
        for dir in ["run", "tmp"] {
            assert_eq!(names(&store.join(dir)), BTreeSet::new(), "{when}: left in {dir}");
        }
    }

    /// The directories of layers, without what the driver always has.
    fn data_dirs(&self) -> BTreeSet<String> {
        let mut found = names(&self.store().join("data"));
        found.retain(|name| !["empty", "version", "lost+found"].contains(&name.as_str()));
        found
    }

    /// No image, no container, no mount, no layer.
    pub fn assert_empty(&self, when: &str) {
        self.assert_tidy(when);
        let db = self.database();
        for table in ["images", "tags", "containers", "mounts", "layers"] {
            let rows = column::<i64>(&db, &format!("SELECT count(*) FROM {table}"));
            assert_eq!(rows, [0], "{when}: rows in {table}");
        }
    }

    /// The table of mounts says what the kernel says.
    pub fn assert_mounts_agree(&self, when: &str) {
        let remembered: BTreeSet<(i64, String)> = {
            let db = self.database();
            let mut query = db.prepare("SELECT mount, CAST(target AS TEXT) FROM mounts").unwrap();
            query.query_map([], |r| Ok((r.get(0)?, r.get(1)?))).unwrap().map(Result::unwrap).collect()
        };
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let mounted = table.lines().filter_map(|line| {
            let fields: Vec<_> = line.split(' ').collect();
            let ours = line.contains(" - overlay ") && Path::new(fields[4]).starts_with(&self.dir);
            ours.then(|| (fields[0].parse().unwrap(), fields[4].to_owned()))
        });
        assert_eq!(remembered, mounted.collect(), "{when}: mounts in the store, and in /proc/self/mountinfo");
    }

    /// The image saves, and every layer has the digest that its configuration says.
    pub fn assert_whole(&self, image: &str) {
        let file = tempfile::NamedTempFile::new_in(&self.dir).unwrap();
        self.ok(&["save", "-o", file.path().to_str().unwrap(), image]);
        let mut files = HashMap::new();
        for entry in tar::Archive::new(fs::File::open(file.path()).unwrap()).entries().unwrap() {
            let mut entry = entry.unwrap();
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).unwrap();
            files.insert(entry.path().unwrap().to_str().unwrap().to_owned(), bytes);
        }
        let json = |name: &str| serde_json::from_slice::<serde_json::Value>(&files[name]).unwrap();
        let manifest = json("manifest.json");
        let manifest = &manifest[0];
        let config = json(manifest["Config"].as_str().unwrap());
        let wanted: Vec<_> = strings(&config["rootfs"]["diff_ids"]);
        let found: Vec<_> =
            strings(&manifest["Layers"]).iter().map(|name| format!("sha256:{}", sha256(&files[name]))).collect();
        assert!(!wanted.is_empty());
        assert_eq!(found, wanted, "the layers of {image}");
    }
}

fn strings(list: &serde_json::Value) -> Vec<String> {
    list.as_array().unwrap().iter().map(|s| s.as_str().unwrap().to_owned()).collect()
}
