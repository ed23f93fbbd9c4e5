//! The database `afterimage.db`: jobs and events, in SQLite, so that people can open it.
//!
//! Nothing that replication needs is in it. A damaged database is put aside and a new one begun:
//! history is lost, protection is not. Killed here: SQLite's journal; a transaction is whole or
//! absent. Disk full: the caller logs, the daemon goes on without that row.

use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rusqlite::Connection;

use crate::base::{Error, ErrorKind, Result};

/// Version of the tables.
const SCHEMA_VERSION: i64 = 1;

const SCHEMA: &str = "
CREATE TABLE jobs (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    kind TEXT NOT NULL,
    vm TEXT,
    state TEXT NOT NULL,
    started_ms INTEGER NOT NULL,
    ended_ms INTEGER,
    document TEXT NOT NULL
);
CREATE TABLE job_log (
    job INTEGER NOT NULL REFERENCES jobs(id) ON DELETE CASCADE,
    time_ms INTEGER NOT NULL,
    line TEXT NOT NULL
);
CREATE INDEX job_log_by_job ON job_log(job);
CREATE TABLE events (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    time_ms INTEGER NOT NULL,
    level TEXT NOT NULL,
    vm TEXT,
    kind TEXT NOT NULL,
    text TEXT NOT NULL
);
";

/// The open database; one connection, used by one thread at a time.
pub struct Database {
    connection: Mutex<Connection>,
}

impl Database {
    /// Opens or makes the database at `path`. The text says what was put aside, if anything.
    pub fn open(path: &Path) -> Result<(Self, Option<String>)> {
        match Self::open_once(path) {
            Ok(db) => Ok((db, None)),
            Err(e) if e.kind() == ErrorKind::Damaged => {
                let aside = path.with_extension("db.damaged");
                std::fs::rename(path, &aside)
                    .map_err(|e| Error::io(format!("cannot put {} aside", path.display()), e))?;
                for journal in ["-wal", "-shm"] {
                    let mut name = path.as_os_str().to_owned();
                    name.push(journal);
                    let _ = std::fs::remove_file(name);
                }
                let told = format!("{e}; it is now {} and a new one was begun", aside.display());
                Ok((Self::open_once(path)?, Some(told)))
            }
            Err(e) => Err(e),
        }
    }

    fn open_once(path: &Path) -> Result<Self> {
        let failed = |e: rusqlite::Error| failed(path, e);
        let connection = Connection::open(path).map_err(failed)?;
        connection
            .execute_batch(
                "PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL; PRAGMA foreign_keys = ON;",
            )
            .map_err(failed)?;
        let version: i64 = connection.query_row("PRAGMA user_version", [], |r| r.get(0)).map_err(failed)?;
        match version {
            SCHEMA_VERSION => {}
            0 => connection
                .execute_batch(&format!("BEGIN; {SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"))
                .map_err(failed)?,
            other => {
                return Err(Error::new(ErrorKind::Version, format!("cannot use {}", path.display()))
                    .why(format!("it has version {other}, this program knows {SCHEMA_VERSION}"))
                    .hint("use the version of afterimage that wrote it, or a newer one"));
            }
        }
        Ok(Self { connection: Mutex::new(connection) })
    }

    /// The connection, for one statement or transaction.
    pub(super) fn lock(&self) -> MutexGuard<'_, Connection> {
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An error of SQLite in our words.
fn failed(path: &Path, e: rusqlite::Error) -> Error {
    let kind = match e.sqlite_error_code() {
        Some(rusqlite::ErrorCode::NotADatabase | rusqlite::ErrorCode::DatabaseCorrupt) => ErrorKind::Damaged,
        Some(rusqlite::ErrorCode::DiskFull) => ErrorKind::NoSpace,
        _ => ErrorKind::Io,
    };
    Error::new(kind, format!("cannot use {}", path.display())).source(e)
}

/// An error of a statement in our words.
pub(super) fn statement(e: rusqlite::Error) -> Error {
    failed(Path::new("afterimage.db"), e)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_database_is_put_aside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        assert!(Database::open(&path).unwrap().1.is_none());
        std::fs::write(&path, vec![7u8; 8192]).unwrap();
        let (_, told) = Database::open(&path).unwrap();
        assert!(told.unwrap().contains("damaged"));
        assert!(Database::open(&path).unwrap().1.is_none());
    }
}
