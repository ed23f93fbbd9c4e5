//! Jobs: long actions with steps, progress, a log, cancel and a history.
//!
//! A running job lives in memory and is written to the database whenever a step begins or ends;
//! progress in bytes is memory only. Killed here: the database says "running"; at start-up
//! [`Jobs::unfinished`] hands those to the engine, which goes on with them or ends them as
//! interrupted. Database full: the job goes on, its history lacks the row.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::api::types::{Failure, JobLogLine, JobState, JobStep, JobView};
use super::db::{Database, statement};
use crate::base::{Clock, Error, ErrorKind, Result, Timestamp};

/// Ended jobs that are kept.
const HISTORY_MAX: i64 = 1_000;
/// Lines of log kept of one job.
const LOG_LINES_MAX: usize = 10_000;

/// Word of a state in the database.
const fn word(state: JobState) -> &'static str {
    match state {
        JobState::Waiting => "waiting",
        JobState::Running => "running",
        JobState::Done => "done",
        JobState::Failed => "failed",
        JobState::Cancelled => "cancelled",
    }
}

struct Live {
    record: JobView,
    lines: usize,
}

/// A running job, in the hands of the thread that does it.
pub struct Job {
    jobs: Arc<Shared>,
    id: u64,
    live: Mutex<Live>,
    cancelled: AtomicBool,
}

struct Shared {
    db: Arc<Database>,
    clock: Arc<dyn Clock>,
    running: Mutex<BTreeMap<u64, Arc<Job>>>,
    ended: Condvar,
}

/// All jobs of a daemon.
#[derive(Clone)]
pub struct Jobs(Arc<Shared>);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Job {
    /// Its number.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// The step before is done; this one begins.
    pub fn step(&self, name: &str) {
        let mut live = lock(&self.live);
        for step in &mut live.record.steps {
            if step.name == name {
                step.state = JobState::Running;
            } else if step.state == JobState::Running {
                step.state = JobState::Done;
            }
        }
        live.record.done_bytes = 0;
        live.record.total_bytes = 0;
        self.write(&mut live, format!("step: {name}"));
    }

    /// Says more about the step at work.
    pub fn detail(&self, text: impl Into<String>) {
        let text = text.into();
        let mut live = lock(&self.live);
        if let Some(step) = live.record.steps.iter_mut().find(|s| s.state == JobState::Running) {
            step.note = text;
        }
    }

    /// Adds a line to the log.
    pub fn log(&self, line: impl Into<String>) {
        let mut live = lock(&self.live);
        self.write(&mut live, line.into());
    }

    /// Bytes done, of all.
    pub fn progress(&self, done_bytes: u64, total_bytes: u64) {
        let mut live = lock(&self.live);
        live.record.done_bytes = done_bytes;
        live.record.total_bytes = total_bytes;
    }

    /// Says what came out.
    pub fn result(&self, text: impl Into<String>) {
        lock(&self.live).record.result = Some(text.into());
    }

    /// Whether somebody said cancel.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::SeqCst)
    }

    /// An error of kind Cancelled if somebody said cancel.
    pub fn check_cancelled(&self) -> Result<()> {
        if self.is_cancelled() {
            return Err(Error::new(ErrorKind::Cancelled, format!("job {} was cancelled", self.id)));
        }
        Ok(())
    }

    /// It ended. Waiters are told after the record is written.
    pub fn finish(&self, result: &Result<()>) {
        let mut live = lock(&self.live);
        let state = match result {
            Ok(()) => JobState::Done,
            Err(e) if e.kind() == ErrorKind::Cancelled => JobState::Cancelled,
            Err(_) => JobState::Failed,
        };
        self.end(&mut live, state, result.as_ref().err());
    }

    /// The daemon ends before the job does: its record stays "running" in the database, so that
    /// the next daemon takes it up.
    pub fn suspend(&self) {
        lock(&self.jobs.running).remove(&self.id);
        self.jobs.ended.notify_all();
    }

    fn end(&self, live: &mut Live, state: JobState, error: Option<&Error>) {
        for step in live.record.steps.iter_mut().filter(|s| s.state == JobState::Running) {
            step.state = state;
        }
        live.record.state = state;
        live.record.ended = Some(self.jobs.clock.now());
        live.record.error = error.map(Failure::from);
        let line = match error {
            Some(e) => format!("{}: {e}", word(state)),
            None => word(state).to_owned(),
        };
        self.write(live, line);
        lock(&self.jobs.running).remove(&self.id);
        self.jobs.ended.notify_all();
    }

    /// Adds a line, here and in the database, with the record as it is.
    fn write(&self, live: &mut Live, line: String) {
        log::info!("job {} ({}): {line}", self.id, live.record.kind);
        let line = JobLogLine { time: self.jobs.clock.now(), text: line };
        if live.lines < LOG_LINES_MAX {
            if let Err(e) = self.jobs.add_line(self.id, &line) {
                log::warn!("the log of job {} cannot be kept: {e}", self.id);
            }
            live.lines += 1;
        }
        if let Err(e) = self.jobs.store(&live.record) {
            log::warn!("job {} cannot be recorded: {e}", self.id);
        }
    }

    fn record(&self) -> JobView {
        lock(&self.live).record.clone()
    }
}

impl Shared {
    fn store(&self, record: &JobView) -> Result<()> {
        self.db
            .lock()
            .execute(
                "UPDATE jobs SET state = ?2, ended_ms = ?3, document = ?4 WHERE id = ?1",
                (row(record.id), word(record.state), record.ended.map(|t| t.0), encode(record)?),
            )
            .map_err(statement)?;
        Ok(())
    }

    fn add_line(&self, id: u64, line: &JobLogLine) -> Result<()> {
        self.db
            .lock()
            .execute(
                "INSERT INTO job_log(job, time_ms, line) VALUES (?1, ?2, ?3)",
                (row(id), line.time.0, &line.text),
            )
            .map_err(statement)?;
        Ok(())
    }
}

fn row(id: u64) -> i64 {
    i64::try_from(id).unwrap_or(i64::MAX)
}

fn encode(record: &JobView) -> Result<String> {
    serde_json::to_string(record)
        .map_err(|e| Error::new(ErrorKind::Internal, "a job cannot be written").source(e))
}

impl Jobs {
    /// Jobs in `db`, at the times of `clock`.
    pub fn new(db: Arc<Database>, clock: Arc<dyn Clock>) -> Self {
        Self(Arc::new(Shared { db, clock, running: Mutex::new(BTreeMap::new()), ended: Condvar::new() }))
    }

    /// A new running job with these steps.
    pub fn begin(&self, kind: &str, vm: Option<&str>, steps: &[&str]) -> Result<Arc<Job>> {
        let step =
            |name: &&str| JobStep { name: (*name).to_owned(), state: JobState::Waiting, note: String::new() };
        let mut record = JobView {
            id: 0,
            kind: kind.to_owned(),
            vm: vm.map(str::to_owned),
            state: JobState::Running,
            started: self.0.clock.now(),
            ended: None,
            steps: steps.iter().map(step).collect(),
            done_bytes: 0,
            total_bytes: 0,
            error: None,
            result: None,
        };
        {
            let db = self.0.db.lock();
            db.execute(
                "INSERT INTO jobs(kind, vm, state, started_ms, document) VALUES (?1,?2,?3,?4,?5)",
                (kind, vm, word(record.state), record.started.0, encode(&record)?),
            )
            .map_err(statement)?;
            let id = db.last_insert_rowid();
            record.id = u64::try_from(id).unwrap_or(0);
            db.execute("DELETE FROM jobs WHERE id <= ?1 AND state <> 'running'", [id - HISTORY_MAX])
                .map_err(statement)?;
        }
        Ok(self.adopt(record))
    }

    /// Takes up a job that the daemon before left unfinished.
    pub fn resume(&self, record: JobView) -> Arc<Job> {
        let job = self.adopt(record);
        job.log("taken up again after a restart of the daemon");
        job
    }

    fn adopt(&self, record: JobView) -> Arc<Job> {
        let job = Arc::new(Job {
            jobs: self.0.clone(),
            id: record.id,
            live: Mutex::new(Live { record, lines: 0 }),
            cancelled: AtomicBool::new(false),
        });
        lock(&self.0.running).insert(job.id, job.clone());
        job
    }

    /// Ends a job that the daemon before left unfinished and that is not taken up.
    pub fn interrupt(&self, record: JobView) {
        let error = Error::new(ErrorKind::Cancelled, "the job was interrupted")
            .why("the daemon ended while it was at work");
        self.adopt(record).finish(&Err(error.with_kind(ErrorKind::Internal)));
    }

    /// Jobs that the database calls running and nobody does.
    pub fn unfinished(&self) -> Result<Vec<JobView>> {
        let running: Vec<u64> = lock(&self.0.running).keys().copied().collect();
        let mut all = self.query("SELECT id, document FROM jobs WHERE state = 'running' ORDER BY id", 0)?;
        all.retain(|r| !running.contains(&r.id));
        Ok(all)
    }

    fn query(&self, sql: &str, limit: i64) -> Result<Vec<JobView>> {
        let db = self.0.db.lock();
        let mut query = db.prepare(sql).map_err(statement)?;
        let read = |r: &rusqlite::Row<'_>| Ok((r.get::<_, i64>(0)?, r.get::<_, String>(1)?));
        let rows = match query.parameter_count() {
            0 => query.query_map([], read),
            _ => query.query_map([limit], read),
        };
        let rows = rows.map_err(statement)?.collect::<rusqlite::Result<Vec<_>>>().map_err(statement)?;
        // A row that cannot be read was written by another version: it is left out.
        let decode = |(id, text): (i64, String)| {
            let record: JobView = serde_json::from_str(&text).ok()?;
            Some(JobView { id: u64::try_from(id).ok()?, ..record })
        };
        Ok(rows.into_iter().filter_map(decode).collect())
    }

    /// The newest `limit` jobs, newest first.
    pub fn list(&self, limit: usize) -> Result<Vec<JobView>> {
        let limit = i64::try_from(limit).unwrap_or(HISTORY_MAX);
        let mut all = self.query("SELECT id, document FROM jobs ORDER BY id DESC LIMIT ?1", limit)?;
        let running = lock(&self.0.running).clone();
        for record in &mut all {
            if let Some(job) = running.get(&record.id) {
                *record = job.record();
            }
        }
        Ok(all)
    }

    /// One job.
    pub fn get(&self, id: u64) -> Result<JobView> {
        if let Some(job) = self.running(id) {
            return Ok(job.record());
        }
        self.query("SELECT id, document FROM jobs WHERE id = ?1", row(id))?.pop().ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format!("there is no job {id}")).hint("afterimage jobs")
        })
    }

    /// The log of a job.
    pub fn lines(&self, id: u64) -> Result<Vec<JobLogLine>> {
        self.get(id)?;
        let db = self.0.db.lock();
        let mut query = db
            .prepare("SELECT time_ms, line FROM job_log WHERE job = ?1 ORDER BY rowid")
            .map_err(statement)?;
        let rows = query
            .query_map([row(id)], |r| Ok(JobLogLine { time: Timestamp(r.get(0)?), text: r.get(1)? }))
            .map_err(statement)?;
        rows.collect::<rusqlite::Result<Vec<_>>>().map_err(statement)
    }

    /// Asks a job to end. It does so at its next step.
    pub fn cancel(&self, id: u64) -> Result<()> {
        let Some(job) = self.running(id) else {
            let record = self.get(id)?;
            return Err(Error::new(ErrorKind::Refused, format!("job {id} cannot be cancelled"))
                .why(format!("it is {} already", word(record.state)))
                .hint(format!("afterimage job show {id}")));
        };
        job.cancelled.store(true, Ordering::SeqCst);
        job.log("cancel was asked for");
        Ok(())
    }

    /// Asks every running job about this VM to end, and waits until they have.
    pub fn cancel_all_of(&self, vm: &str, patience: Duration) -> bool {
        let of_vm = |s: &Shared| -> Vec<Arc<Job>> {
            let running = lock(&s.running).clone();
            running.into_values().filter(|j| j.record().vm.as_deref() == Some(vm)).collect()
        };
        let jobs = of_vm(&self.0);
        jobs.iter().for_each(|j| j.cancelled.store(true, Ordering::SeqCst));
        let deadline = self.0.clock.monotonic() + patience;
        jobs.iter().all(|j| self.wait(j.id, deadline.saturating_sub(self.0.clock.monotonic())).is_ok())
    }

    /// Waits for the end of a job; Busy if it takes longer than `patience`.
    pub fn wait(&self, id: u64, patience: Duration) -> Result<JobView> {
        let deadline = self.0.clock.monotonic() + patience;
        let mut running = lock(&self.0.running);
        while running.contains_key(&id) {
            let left = deadline.saturating_sub(self.0.clock.monotonic());
            if left.is_zero() {
                return Err(Error::new(ErrorKind::Busy, format!("job {id} is still at work"))
                    .hint(format!("afterimage job show {id}")));
            }
            running = self.0.ended.wait_timeout(running, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(running);
        self.get(id)
    }

    fn running(&self, id: u64) -> Option<Arc<Job>> {
        lock(&self.0.running).get(&id).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::SystemClock;

    fn jobs(dir: &std::path::Path) -> Jobs {
        let (db, _) = Database::open(&dir.join("a.db")).unwrap();
        Jobs::new(Arc::new(db), Arc::new(SystemClock::default()))
    }

    #[test]
    fn a_job_goes_through_its_steps_and_leaves_a_history() {
        let dir = tempfile::tempdir().unwrap();
        let jobs = jobs(dir.path());
        let job = jobs.begin("protect", Some("web1"), &["look", "do"]).unwrap();
        job.step("look");
        job.step("do");
        job.progress(5, 10);
        let seen = jobs.get(job.id()).unwrap();
        assert_eq!(seen.steps[0].state, JobState::Done);
        assert_eq!(seen.done_bytes, 5);
        assert_eq!(jobs.wait(job.id(), Duration::ZERO).unwrap_err().kind(), ErrorKind::Busy);
        jobs.cancel(job.id()).unwrap();
        job.finish(&job.check_cancelled());
        assert_eq!(jobs.wait(job.id(), Duration::ZERO).unwrap().state, JobState::Cancelled);
        assert_eq!(jobs.cancel(job.id()).unwrap_err().kind(), ErrorKind::Refused);
        assert!(jobs.lines(job.id()).unwrap().len() >= 4);
        assert_eq!(jobs.get(99).unwrap_err().kind(), ErrorKind::NotFound);
    }

    #[test]
    fn what_a_killed_daemon_left_is_taken_up_or_ended() {
        let dir = tempfile::tempdir().unwrap();
        let first = jobs(dir.path());
        first.begin("protect", Some("a"), &["x"]).unwrap();
        first.begin("restore", Some("b"), &["x"]).unwrap();
        let second = jobs(dir.path());
        let mut left = second.unfinished().unwrap();
        assert_eq!(left.len(), 2);
        second.interrupt(left.pop().unwrap());
        let job = second.resume(left.pop().unwrap());
        job.finish(&Ok(()));
        let states: Vec<JobState> = second.list(9).unwrap().iter().map(|r| r.state).collect();
        assert_eq!(states, [JobState::Failed, JobState::Done]);
    }
}
