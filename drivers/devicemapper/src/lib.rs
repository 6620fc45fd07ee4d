//! The devicemapper storage driver.
