//! `graphdriver bench`: what copy-on-write and redirect-on-write cost on this host.

pub mod report;
pub mod results;
