//! Storms: many threads and processes at once, each test with something that must hold in the end, and a watchdog.
//!
//! `VFS_FUSE_PROGRAM` chooses what is stormed, as in `posix.rs`: `plain` must pass all.

mod common;
#[allow(dead_code)] // The other test program uses the rest.
#[path = "posix/sys.rs"]
mod sys;
#[allow(dead_code)]
#[macro_use]
#[path = "posix/world.rs"]
mod world;
#[macro_use]
#[path = "stress/storm.rs"]
mod storm;

#[path = "stress/data.rs"]
mod data;
#[path = "stress/gate.rs"]
mod gate;
#[path = "stress/names.rs"]
mod names;
#[path = "stress/no_global_lock.rs"]
mod no_global_lock;
#[path = "stress/whole.rs"]
mod whole;
