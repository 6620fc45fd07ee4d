//! The btrfs storage driver.
