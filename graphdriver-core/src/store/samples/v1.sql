PRAGMA foreign_keys=OFF;
BEGIN TRANSACTION;
CREATE TABLE schema_versions(component TEXT PRIMARY KEY, version INTEGER NOT NULL) STRICT, WITHOUT ROWID;
INSERT INTO schema_versions VALUES('layers',1);
CREATE TABLE layers(
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    kind TEXT NOT NULL CHECK (kind IN ('active', 'view', 'committed')),
    parent INTEGER REFERENCES layers(id),
    diff_id TEXT,
    chain_id TEXT,
    tar_size INTEGER,
    usage_bytes INTEGER,
    usage_inodes INTEGER,
    size_limit INTEGER,
    created INTEGER NOT NULL
) STRICT;
INSERT INTO layers VALUES(1,'committed',NULL,'sha256:cae662172fd450bb0cd710a769079c05bfc5d8e35efa6576edc7d0377afdd4a2','sha256:cae662172fd450bb0cd710a769079c05bfc5d8e35efa6576edc7d0377afdd4a2',4,7,2,NULL,1790000000123456789);
INSERT INTO layers VALUES(2,'active',1,NULL,NULL,NULL,NULL,NULL,1073741824,1790000001000000000);
INSERT INTO layers VALUES(4,'committed',NULL,'sha256:2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881',NULL,1,7,2,NULL,1790000002000000000);
INSERT INTO layers VALUES(6,'view',1,NULL,NULL,NULL,NULL,NULL,NULL,1790000003000000000);
CREATE TABLE layer_labels(
    layer INTEGER NOT NULL REFERENCES layers(id) ON DELETE CASCADE,
    name TEXT NOT NULL,
    value TEXT NOT NULL,
    PRIMARY KEY (layer, name)
) STRICT, WITHOUT ROWID;
INSERT INTO layer_labels VALUES(1,'name','base');
INSERT INTO layer_labels VALUES(2,'name','child');
CREATE TABLE layer_intents(
    layer INTEGER PRIMARY KEY REFERENCES layers(id) ON DELETE CASCADE,
    op TEXT NOT NULL CHECK (op IN ('create', 'remove', 'commit')),
    session TEXT NOT NULL
) STRICT;
INSERT INTO layer_intents VALUES(2,'commit','3f1c9a62d05b7e84a1d6c3f2908b7e51');
INSERT INTO layer_intents VALUES(4,'create','3f1c9a62d05b7e84a1d6c3f2908b7e51');
INSERT INTO layer_intents VALUES(6,'remove','3f1c9a62d05b7e84a1d6c3f2908b7e51');
DELETE FROM sqlite_sequence;
INSERT INTO sqlite_sequence VALUES('layers',6);
CREATE INDEX layers_parent ON layers(parent);
CREATE INDEX layers_chain_id ON layers(chain_id);
CREATE VIEW visible_layers AS SELECT * FROM layers
    WHERE id NOT IN (SELECT layer FROM layer_intents WHERE op <> 'commit');
COMMIT;
