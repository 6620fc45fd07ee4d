//! What the kernel says of pools and thin devices (kernel `Documentation/admin-guide/device-mapper/thin-provisioning.rst`,
//! "Status").

use graphdriver_core::{Error, ErrorKind, Result};

/// The state a pool is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    Writable,
    OutOfData,
    ReadOnly,
    Failed,
}

/// The status line of a thin pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PoolStatus {
    pub transaction: u64,
    /// In blocks of 4 KiB.
    pub metadata: Used,
    /// In blocks of the pool.
    pub data: Used,
    pub mode: Mode,
    pub discard_passdown: bool,
    pub error_if_full: bool,
    pub needs_check: bool,
}

/// How much of something is used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Used {
    pub used: u64,
    pub total: u64,
}

impl Used {
    pub(crate) fn percent(self) -> u64 {
        (u128::from(self.used) * 100 / u128::from(self.total.max(1))) as u64
    }

    /// Whether less than `percent` of it is free.
    pub(crate) fn is_short_of(self, percent: u64) -> bool {
        let free = u128::from(self.total.saturating_sub(self.used));
        free * 100 < u128::from(self.total) * u128::from(percent)
    }

    fn parse(text: &str) -> Option<Used> {
        let (used, total) = text.split_once('/')?;
        Some(Used { used: used.parse().ok()?, total: total.parse().ok()? })
    }
}

impl PoolStatus {
    /// Fails if the kernel has given the pool up.
    pub(crate) fn refuse_failed(&self, pool: &str) -> Result<()> {
        if self.mode != Mode::Failed {
            return Ok(());
        }
        let why = format!("the kernel has given up pool {pool}: it cannot read or write the metadata");
        let hint = "dmesg says why; see that the devices below are sound, unmount the layers, take the pool down (dmsetup \
                    remove), and repair it with thin_repair";
        Err(Error::new(ErrorKind::Corrupt, why).hint(hint))
    }

    /// Fails if the pool can only be read.
    pub(crate) fn refuse_changes(&self, pool: &str) -> Result<()> {
        self.refuse_failed(pool)?;
        if !self.needs_check && matches!(self.mode, Mode::Writable | Mode::OutOfData) {
            return Ok(());
        }
        // The kernel keeps a few blocks back for itself.
        let full = self.metadata.used >= self.metadata.total.saturating_sub(2);
        let (kind, why) = match full {
            true => (ErrorKind::OutOfSpace, format!("the metadata of pool {pool} are full")),
            false => (ErrorKind::Corrupt, format!("the kernel takes no more changes to pool {pool}")),
        };
        let hint = "layers can still be read; unmount them, take the pool down (dmsetup remove), and repair it with \
                    thin_check --clear-needs-check-flag or thin_repair";
        Err(Error::new(kind, why).hint(hint))
    }

    /// Whether there is no room for data, so that what filesystems still have in memory may be lost.
    pub(crate) fn is_full(&self) -> bool {
        self.mode == Mode::OutOfData || self.data.total > 0 && self.data.used >= self.data.total
    }

    /// Reads the line without its first fields, start, length and `thin-pool`.
    pub(crate) fn parse(line: &str) -> Result<PoolStatus> {
        if matches!(line.trim(), "Fail" | "Error") {
            return Ok(PoolStatus {
                transaction: 0,
                metadata: Used::default(),
                data: Used::default(),
                mode: Mode::Failed,
                discard_passdown: false,
                error_if_full: false,
                needs_check: true,
            });
        }
        Self::fields(line).ok_or_else(|| {
            Error::new(
                ErrorKind::Corrupt,
                format!("the kernel describes the thin pool as {line:?}, which nobody knows"),
            )
        })
    }

    fn fields(line: &str) -> Option<PoolStatus> {
        let mut words = line.split_ascii_whitespace();
        let transaction = words.next()?.parse().ok()?;
        let metadata = Used::parse(words.next()?)?;
        let data = Used::parse(words.next()?)?;
        let _held_root = words.next()?;
        let flags: Vec<&str> = words.collect();
        let has = |flag| flags.contains(&flag);
        let mode = match () {
            () if has("out_of_data_space") => Mode::OutOfData,
            () if has("ro") => Mode::ReadOnly,
            () if has("rw") => Mode::Writable,
            () => return None,
        };
        Some(PoolStatus {
            transaction,
            metadata,
            data,
            mode,
            discard_passdown: has("discard_passdown"),
            error_if_full: has("error_if_no_space"),
            needs_check: has("needs_check"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lines_of_real_pools_are_read() {
        let line = "7 142/4096 1500/16384 - rw discard_passdown error_if_no_space - 1024 ";
        let status = PoolStatus::parse(line).unwrap();
        assert_eq!((status.transaction, status.metadata), (7, Used { used: 142, total: 4096 }));
        assert_eq!((status.data.percent(), status.mode), (9, Mode::Writable));
        assert!(status.discard_passdown && status.error_if_full && !status.needs_check);
        let full =
            PoolStatus::parse("7 1/2 4/4 12 out_of_data_space no_discard_passdown queue_if_no_space needs_check 8");
        let full = full.unwrap();
        assert_eq!(full.mode, Mode::OutOfData);
        assert!(full.needs_check && !full.discard_passdown && !full.error_if_full);
        assert_eq!(PoolStatus::parse("Fail").unwrap().mode, Mode::Failed);
        assert_eq!(PoolStatus::parse("7 1/2 4/4 - ro - - - 8").unwrap().mode, Mode::ReadOnly);
    }

    #[test]
    fn a_failed_pool_is_not_called_full() {
        let failed = PoolStatus::parse("Fail").unwrap();
        for e in [failed.refuse_failed("p").unwrap_err(), failed.refuse_changes("p").unwrap_err()] {
            assert!(e.kind() == ErrorKind::Corrupt && !e.to_string().contains("full"), "{e}");
        }
        assert!(!failed.is_full());
        let refused = |line: &str| PoolStatus::parse(line).unwrap().refuse_changes("p").unwrap_err();
        assert_eq!(refused("7 1/90 4/9 - ro - - - 8").kind(), ErrorKind::Corrupt);
        assert_eq!(refused("7 1/90 4/9 - rw - - needs_check 8").kind(), ErrorKind::Corrupt);
        assert_eq!(refused("7 88/90 4/9 - rw - - needs_check 8").kind(), ErrorKind::OutOfSpace);
    }

    #[test]
    fn free_space_is_compared_exactly() {
        let used = |used| Used { used, total: 1000 };
        assert!(!used(900).is_short_of(10));
        assert!(used(901).is_short_of(10));
        assert!(!used(1000).is_short_of(0));
    }

    proptest! {
        #[test]
        fn nothing_panics(line in ".*", words in prop::collection::vec("[0-9/a-z_-]{0,20}", 0..12)) {
            let _ = PoolStatus::parse(&line);
            let _ = PoolStatus::parse(&words.join(" "));
        }
    }
}
