//! The engine's tables. They share the layer store's database, so that one transaction covers layers and images.
//!
//! * `images`: one row per image; `config` is the raw configuration, whose sha256 is the id. `top` is its topmost layer,
//!   none for an image without layers. `parent` is the image it was committed from.
//! * `tags`: names, each of one image.
//! * `containers`: writable layers with their names.
//! * `mounts`: who shows what where; reconciled with `/proc/PID/mountinfo`. `mount` is the mount's number in that
//!   table, `serial` one that is not used again, `boot` and `namespace` say where it can exist at all.
//! * `events`: the durable log.
//! * `snapshots`, since version 2: layers under the names that containerd gives them. `created` and `updated` are in
//!   nanoseconds since 1970, `labels` is a JSON object. Kind and parent are the layer's. A graphdriver that does not know
//!   this table would remove these layers as unused, and refuses the database. `id_maps`, since version 3: the users' and the
//!   groups' mapping, as containerd's labels have them, with a space between, if an id-mapped mount shows the layer; null
//!   if owners are as they are on disk.

use graphdriver_core::store::Schema;

pub(super) const SCHEMA: Schema = Schema { component: "engine", steps: &[V1, V2, V3] };

const V1: &str = "
CREATE TABLE images (
    id       TEXT PRIMARY KEY,
    config   BLOB NOT NULL,
    top      INTEGER REFERENCES layers(id),
    parent   TEXT,
    manifest TEXT,
    added    INTEGER NOT NULL
) STRICT;
CREATE INDEX images_top ON images(top);

CREATE TABLE tags (
    name  TEXT PRIMARY KEY,
    image TEXT NOT NULL REFERENCES images(id)
) STRICT;
CREATE INDEX tags_image ON tags(image);

CREATE TABLE containers (
    id      TEXT PRIMARY KEY,
    name    TEXT NOT NULL UNIQUE,
    image   TEXT NOT NULL REFERENCES images(id),
    layer   INTEGER NOT NULL REFERENCES layers(id),
    created INTEGER NOT NULL
) STRICT;
CREATE INDEX containers_image ON containers(image);
CREATE INDEX containers_layer ON containers(layer);

CREATE TABLE mounts (
    id        INTEGER PRIMARY KEY,
    kind      TEXT NOT NULL CHECK (kind IN ('image', 'container')),
    object    TEXT NOT NULL,
    layer     INTEGER,
    target    BLOB NOT NULL,
    mount     INTEGER NOT NULL,
    serial    INTEGER NOT NULL,
    writable  INTEGER NOT NULL,
    boot      TEXT NOT NULL,
    namespace INTEGER NOT NULL,
    created   INTEGER NOT NULL
) STRICT;

CREATE TABLE events (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    time       INTEGER NOT NULL,
    type       TEXT NOT NULL,
    action     TEXT NOT NULL,
    actor      TEXT NOT NULL,
    attributes TEXT NOT NULL
) STRICT;
";

const V2: &str = "
CREATE TABLE snapshots (
    name    TEXT PRIMARY KEY,
    layer   INTEGER NOT NULL UNIQUE REFERENCES layers(id),
    created INTEGER NOT NULL,
    updated INTEGER NOT NULL,
    labels  TEXT NOT NULL
) STRICT, WITHOUT ROWID;
";

const V3: &str = "ALTER TABLE snapshots ADD COLUMN id_maps TEXT;";
