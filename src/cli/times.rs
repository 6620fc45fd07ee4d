//! Points in time as people write and read them.

use graphdriver_core::{Error, ErrorKind, Result};
use jiff::{SignedDuration, Timestamp};
use std::time::Duration;

fn now() -> i64 {
    nanos(Timestamp::now())
}

fn nanos(time: Timestamp) -> i64 {
    i64::try_from(time.as_nanosecond()).unwrap_or(i64::MAX)
}

/// `2026-01-31T12:00:00Z`, seconds since 1970, or a span back from now such as `10m`; nanoseconds since 1970.
pub(crate) fn parse(text: &str) -> Result<i64> {
    if let Ok(seconds) = text.parse::<f64>() {
        return Ok((seconds * 1e9) as i64);
    }
    if let Ok(time) = text.parse::<Timestamp>() {
        return Ok(nanos(time));
    }
    if let Ok(span) = text.parse::<SignedDuration>() {
        return Ok(now().saturating_sub(i64::try_from(span.as_nanos()).unwrap_or(i64::MAX)));
    }
    Err(Error::new(ErrorKind::InvalidInput, format!("{text:?} is no time"))
        .hint("write 2026-01-31T12:00:00Z, seconds since 1970, or a span back from now such as 10m"))
}

/// `2026-01-31T12:00:00.500000000Z`: always as long, so that lines stand under each other.
pub(crate) fn stamp(nanos: i64) -> String {
    Timestamp::from_nanosecond(nanos.into()).map_or_else(|_| nanos.to_string(), |t| format!("{t:.9}"))
}

/// `3 weeks ago`.
pub(crate) fn ago(nanos: i64) -> String {
    let past = u64::try_from(now().saturating_sub(nanos)).unwrap_or(0);
    timeago::Formatter::new().convert(Duration::from_nanos(past))
}

/// `3 weeks ago` for RFC 3339, `N/A` for nothing.
pub(crate) fn ago_text(text: Option<&str>) -> String {
    let time = text.and_then(|text| text.parse::<Timestamp>().ok());
    time.map_or_else(|| "N/A".into(), |time| ago(self::nanos(time)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_come_in_three_ways() {
        assert_eq!(parse("1.5").unwrap(), 1_500_000_000);
        assert_eq!(parse("1970-01-01T00:00:02Z").unwrap(), 2_000_000_000);
        let then = parse("10m").unwrap();
        let ten = now() - then;
        assert!((600_000_000_000..601_000_000_000).contains(&ten), "{ten}");
        assert_eq!(parse("yesterday").unwrap_err().kind(), ErrorKind::InvalidInput);
        assert_eq!(stamp(2_000_000_000), "1970-01-01T00:00:02.000000000Z");
    }
}
