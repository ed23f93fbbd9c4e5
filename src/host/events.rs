//! Events: what happened, for people and scripts; numbered, with a bounded history.
//!
//! An event is also a line of the log. A database that cannot take it (disk full) costs the
//! history that row, never the work that the event is about.

use std::sync::Arc;

use super::api::types::{EventView, Severity};
use super::db::{Database, statement};
use crate::base::{Clock, Result, Timestamp};

/// Events that are kept; older ones go.
pub const EVENTS_MAX: i64 = 20_000;

/// Word of a severity in the database.
const fn word(severity: Severity) -> &'static str {
    match severity {
        Severity::Info => "info",
        Severity::Warning => "warning",
        Severity::Critical => "critical",
    }
}

fn parse(word: &str) -> Severity {
    match word {
        "critical" => Severity::Critical,
        "warning" => Severity::Warning,
        _ => Severity::Info,
    }
}

/// Where events go.
pub struct Events {
    db: Arc<Database>,
    clock: Arc<dyn Clock>,
}

impl Events {
    /// Events in `db`, at the times of `clock`.
    pub fn new(db: Arc<Database>, clock: Arc<dyn Clock>) -> Self {
        Self { db, clock }
    }

    /// Records what happened.
    pub fn add(&self, severity: Severity, vm: Option<&str>, kind: &str, text: &str) {
        let about = vm.map(|v| format!("{v}: ")).unwrap_or_default();
        match severity {
            Severity::Info => log::info!("{about}{text}"),
            Severity::Warning => log::warn!("{about}{text}"),
            Severity::Critical => log::error!("{about}{text}"),
        }
        if let Err(e) = self.insert(severity, vm, kind, text) {
            log::warn!("the event cannot be kept: {e}");
        }
    }

    fn insert(&self, severity: Severity, vm: Option<&str>, kind: &str, text: &str) -> Result<()> {
        let db = self.db.lock();
        db.execute(
            "INSERT INTO events(time_ms, level, vm, kind, text) VALUES (?1,?2,?3,?4,?5)",
            (self.clock.now().0, word(severity), vm, kind, text),
        )
        .map_err(statement)?;
        let newest = db.last_insert_rowid();
        if newest % 100 == 0 {
            db.execute("DELETE FROM events WHERE id <= ?1", [newest - EVENTS_MAX]).map_err(statement)?;
        }
        Ok(())
    }

    /// The newest `limit` events with an id above `after`, oldest first; of one VM if it is named.
    pub fn list(&self, vm: Option<&str>, after: u64, limit: usize) -> Result<Vec<EventView>> {
        let db = self.db.lock();
        let mut query = db
            .prepare(
                "SELECT id, time_ms, level, vm, kind, text FROM events \
                 WHERE id > ?1 AND (?2 IS NULL OR vm = ?2) ORDER BY id DESC LIMIT ?3",
            )
            .map_err(statement)?;
        let limit = i64::try_from(limit).unwrap_or(EVENTS_MAX);
        let rows = query
            .query_map((i64::try_from(after).unwrap_or(i64::MAX), vm, limit), |r| {
                Ok(EventView {
                    id: u64::try_from(r.get::<_, i64>(0)?).unwrap_or(0),
                    time: Timestamp(r.get(1)?),
                    severity: parse(&r.get::<_, String>(2)?),
                    vm: r.get(3)?,
                    kind: r.get(4)?,
                    text: r.get(5)?,
                })
            })
            .map_err(statement)?;
        let mut events = rows.collect::<rusqlite::Result<Vec<_>>>().map_err(statement)?;
        events.reverse();
        Ok(events)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::SystemClock;

    #[test]
    fn events_are_numbered_and_filtered() {
        let dir = tempfile::tempdir().unwrap();
        let (db, _) = Database::open(&dir.path().join("a.db")).unwrap();
        let events = Events::new(Arc::new(db), Arc::new(SystemClock::default()));
        events.add(Severity::Info, Some("web1"), "protected", "protection is on");
        events.add(Severity::Critical, None, "vault-gone", "the vault is gone");
        let all = events.list(None, 0, 10).unwrap();
        assert_eq!(all.len(), 2);
        assert_eq!(all[1].severity, Severity::Critical);
        assert_eq!(events.list(Some("web1"), 0, 10).unwrap(), all[..1]);
        assert_eq!(events.list(None, all[0].id, 10).unwrap(), all[1..]);
        assert_eq!(events.list(None, 0, 1).unwrap(), all[1..]);
    }
}
