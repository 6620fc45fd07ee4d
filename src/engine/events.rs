//! The durable log of what happened.

use super::{Engine, now};
use graphdriver_core::{Error, ErrorKind, Result};
use rusqlite::{Connection, Transaction, params};
use serde::Serialize;
use serde_json::{Map, Value};
use std::time::Duration;

/// One thing that happened, logged in the transaction that made it so.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Event {
    /// Its place in the log; grows without reuse.
    #[serde(skip)]
    pub number: i64,
    /// Nanoseconds since 1970.
    #[serde(rename = "timeNano")]
    pub time: i64,
    /// `image` or `container`.
    #[serde(rename = "Type")]
    pub kind: String,
    /// `load`, `tag`, `mount`, …
    #[serde(rename = "Action")]
    pub action: String,
    /// Id of the image or container.
    #[serde(rename = "Actor")]
    pub actor: String,
    /// Names and what else belongs to it.
    #[serde(rename = "Attributes")]
    pub attributes: Map<String, Value>,
}

/// Which events to tell. Values of one key are alternatives, keys all have to agree, as with Docker.
#[derive(Debug, Clone, Default)]
pub struct EventFilter {
    /// Not before this time, in nanoseconds since 1970.
    pub since: Option<i64>,
    /// Not after this time.
    pub until: Option<i64>,
    /// `type=image`, `event=load` (or `action=load`), `image=NAME`, `container=NAME`.
    pub filters: Vec<(String, String)>,
}

impl EventFilter {
    /// Reads `KEY=VALUE`; an unknown key is an error that lists the known ones.
    pub fn add(&mut self, text: &str) -> Result<()> {
        match text.split_once('=') {
            Some((key @ ("type" | "event" | "action" | "image" | "container"), value)) => {
                let key = if key == "action" { "event" } else { key };
                self.filters.push((key.into(), value.into()));
                Ok(())
            }
            _ => Err(Error::new(ErrorKind::InvalidInput, format!("{text:?} is no event filter"))
                .hint("write type=, event=, image= or container= and a value")),
        }
    }

    fn accepts(&self, event: &Event) -> bool {
        ["type", "event", "image", "container"].iter().all(|key| {
            let mut wanted = self.filters.iter().filter(|(k, _)| k == key).peekable();
            wanted.peek().is_none() || wanted.any(|(_, value)| matches(event, key, value))
        })
    }
}

fn matches(event: &Event, key: &str, value: &str) -> bool {
    match key {
        "type" => event.kind == value,
        "event" => event.action == value,
        _ => {
            let id = event.actor.strip_prefix("sha256:").unwrap_or(&event.actor);
            let value_id = value.strip_prefix("sha256:").unwrap_or(value);
            let by_id = value_id.len() >= 4 && id.starts_with(value_id);
            let named = |attr: &str| {
                let name = event.attributes.get(attr).and_then(Value::as_str);
                name.is_some_and(|name| name == value || name.strip_suffix(":latest") == Some(value))
            };
            (event.kind == key && (by_id || named("name"))) || (key == "image" && named("image"))
        }
    }
}

/// Adds to the log, in the transaction of what happened.
pub(super) fn record(
    tx: &Transaction<'_>,
    kind: &str,
    action: &str,
    actor: &str,
    attributes: &[(&str, &str)],
) -> Result<()> {
    let attributes: Map<_, _> = attributes.iter().map(|(k, v)| (k.to_string(), Value::from(*v))).collect();
    tx.execute(
        "INSERT INTO events (time, type, action, actor, attributes) VALUES (?, ?, ?, ?, ?)",
        params![now(), kind, action, actor, Value::Object(attributes).to_string()],
    )?;
    Ok(())
}

/// Events read in one transaction, so that a long log is never in memory as a whole.
const PAGE: usize = 1000;

/// Part of the log.
struct Page {
    /// The number of the last event in it.
    last: i64,
    /// Those that pass the filter.
    events: Vec<Event>,
    /// It is as long as a page may be: there can be more.
    full: bool,
}

fn after(db: &Connection, number: i64, filter: &EventFilter) -> Result<Page> {
    let mut rows = db.prepare_cached(
        "SELECT id, time, type, action, actor, attributes FROM events
         WHERE id > ?1 AND time >= ?2 AND time <= ?3 ORDER BY id LIMIT ?4",
    )?;
    let (since, until) = (filter.since.unwrap_or(i64::MIN), filter.until.unwrap_or(i64::MAX));
    let all = rows.query_map(params![number, since, until, PAGE as i64], |row| {
        let attributes: String = row.get(5)?;
        Ok(Event {
            number: row.get(0)?,
            time: row.get(1)?,
            kind: row.get(2)?,
            action: row.get(3)?,
            actor: row.get(4)?,
            attributes: serde_json::from_str(&attributes).unwrap_or_default(),
        })
    })?;
    let mut page = Page { last: number, events: Vec::new(), full: false };
    for (n, event) in all.enumerate() {
        let event = event?;
        page.last = event.number;
        page.full = n + 1 == PAGE;
        if filter.accepts(&event) {
            page.events.push(event);
        }
    }
    Ok(page)
}

/// How often a follower looks whether another process has written: SQLite tells nobody.
const POLL: Duration = Duration::from_millis(100);

impl Engine {
    /// Tells the logged events that pass the filter, oldest first. With `follow` goes on with what happens, in any
    /// process, until `until`, an error from `tell`, or a cancellation.
    pub fn events(&self, filter: &EventFilter, follow: bool, tell: &mut dyn FnMut(&Event) -> Result<()>) -> Result<()> {
        let mut last = 0;
        let mut known = None;
        loop {
            // Taken before the log is read, so that what comes in between makes another look necessary.
            let state = Some(self.state()?);
            if known != state {
                let page = self.layers.store().read(|db| after(db, last, filter))?;
                last = page.last;
                page.events.iter().try_for_each(&mut *tell)?;
                if !page.full {
                    known = state;
                } else if !follow {
                    self.cancel.check()?;
                    continue;
                }
            }
            if !follow || filter.until.is_some_and(|until| now() > until) || self.cancel.check().is_err() {
                return Ok(());
            }
            if known == state {
                std::thread::sleep(POLL);
            }
        }
    }

    /// Changes with every commit: of other processes, and of this engine.
    fn state(&self) -> Result<(i64, u64)> {
        let store = self.layers.store();
        Ok((store.data_version()?, store.read(|db| Ok(db.total_changes()))?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(kind: &str, action: &str, name: &str) -> Event {
        let attributes = [("name".to_string(), Value::from(name))].into_iter().collect();
        Event {
            number: 1,
            time: 5,
            kind: kind.into(),
            action: action.into(),
            actor: "sha256:abcd12".into(),
            attributes,
        }
    }

    fn filter(texts: &[&str]) -> EventFilter {
        let mut filter = EventFilter::default();
        texts.iter().for_each(|t| filter.add(t).unwrap());
        filter
    }

    #[test]
    fn a_long_log_is_read_in_pages() {
        let mut db = Connection::open_in_memory().unwrap();
        db.execute_batch(super::super::schema::SCHEMA.steps[0]).unwrap();
        let tx = db.transaction().unwrap();
        for n in 0..PAGE + 1 {
            record(&tx, "image", if n % 2 == 0 { "load" } else { "tag" }, "sha256:ab", &[]).unwrap();
        }
        let first = after(&tx, 0, &filter(&["event=load"])).unwrap();
        assert_eq!((first.events.len(), first.last, first.full), (PAGE / 2, PAGE as i64, true));
        let second = after(&tx, first.last, &filter(&["event=load"])).unwrap();
        assert_eq!((second.events.len(), second.full), (1, false));
        assert!(!after(&tx, second.last, &filter(&[])).unwrap().full);
    }

    #[test]
    fn values_of_a_key_are_alternatives_and_keys_all_count() {
        let load = event("image", "load", "alpine:latest");
        for yes in [&[][..], &["type=image"], &["type=container", "type=image"], &["image=alpine"], &["image=abcd"]] {
            assert!(filter(yes).accepts(&load), "{yes:?}");
        }
        for no in [&["type=container"][..], &["type=image", "event=tag"], &["image=busybox"], &["container=alpine"]] {
            assert!(!filter(no).accepts(&load), "{no:?}");
        }
        assert!(EventFilter::default().add("colour=red").unwrap_err().to_string().contains("type="));
    }
}
