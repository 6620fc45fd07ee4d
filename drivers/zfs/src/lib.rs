//! The zfs storage driver.
