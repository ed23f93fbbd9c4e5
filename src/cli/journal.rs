//! `jobs`, `job` and `events`.

use std::time::Duration;

use super::args::JobCommand;
use super::follow::progress;
use super::out::{Out, json, plain};
use super::reach::Reach;
use super::text::{ago, duration, local};
use crate::base::{Clock, Result, SystemClock, Timestamp};
use crate::host::api::types::*;

/// Between two looks for events.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

const fn word(state: JobState) -> &'static str {
    match state {
        JobState::Waiting => "waiting",
        JobState::Running => "running",
        JobState::Done => "done",
        JobState::Failed => "failed",
        JobState::Cancelled => "cancelled",
    }
}

fn took(job: &JobView, now: Timestamp) -> String {
    duration(job.ended.unwrap_or(now).since(job.started))
}

/// `jobs`.
pub fn jobs(out: &Out, reach: &Reach, limit: u32) -> Result<()> {
    let reply = reach.running()?.call(&JobsRequest { limit })?;
    let now = SystemClock::default().now();
    out.answer("afterimage.jobs/1", &reply, || {
        if reply.jobs.is_empty() {
            return "there are no jobs".to_owned();
        }
        let rows: Vec<Vec<String>> = reply
            .jobs
            .iter()
            .map(|j| {
                let step = j.steps.iter().find(|s| s.state == JobState::Running);
                vec![
                    j.id.to_string(),
                    j.kind.clone(),
                    j.vm.clone().unwrap_or_default(),
                    word(j.state).to_owned(),
                    step.map(|s| s.name.clone()).unwrap_or_default(),
                    progress(j),
                    ago(now, j.started),
                    took(j, now),
                ]
            })
            .collect();
        out.table(&["JOB", "KIND", "VM", "STATE", "STEP", "PROGRESS", "STARTED", "TOOK"], &rows)
    })
}

/// `job`.
pub fn job(out: &Out, reach: &Reach, command: JobCommand) -> Result<()> {
    match command {
        JobCommand::Show { job } => {
            let reply = reach.running()?.call(&JobShowRequest { job })?;
            out.answer("afterimage.job/1", &reply, || show(&reply))
        }
        JobCommand::Log { job } => {
            let reply = reach.running()?.call(&JobLogRequest { job })?;
            out.answer("afterimage.job-log/1", &reply, || {
                let lines = reply.lines.iter().map(|l| format!("{}  {}", local(l.time), plain(&l.text)));
                lines.collect::<Vec<_>>().join("\n")
            })
        }
        JobCommand::Cancel { job } => {
            let reply = reach.needed()?.call(&JobCancelRequest { job })?;
            out.answer("afterimage.job/1", &reply, || match reply.state.is_over() {
                true => format!("job {job} is over: {}", word(reply.state)),
                false => format!("job {job} is asked to end; see it: afterimage job show {job}"),
            })
        }
    }
}

fn show(job: &JobView) -> String {
    let now = SystemClock::default().now();
    let mut text = format!("job {}: {}", job.id, job.kind);
    if let Some(vm) = &job.vm {
        text += &format!(" {vm}");
    }
    text += &format!(", {}, began {}, took {}\n", word(job.state), local(job.started), took(job, now));
    for step in &job.steps {
        text += &format!("  {:<10} {}", word(step.state), step.name);
        if !step.note.is_empty() {
            text += &format!(": {}", step.note);
        }
        text.push('\n');
    }
    let done = progress(job);
    if !done.is_empty() {
        text += &format!("  {done}\n");
    }
    if let Some(result) = &job.result {
        text += &format!("  {result}\n");
    }
    if let Some(e) = &job.error {
        text += &format!("  error: {}\n", e.what);
        text += &e.why.as_ref().map(|w| format!("  why: {w}\n")).unwrap_or_default();
        text += &e.hint.as_ref().map(|h| format!("  next: {h}\n")).unwrap_or_default();
    }
    plain(&text)
}

/// `events`.
pub fn events(out: &Out, reach: &Reach, vm: Option<String>, follow: bool, limit: u32) -> Result<()> {
    let client = reach.running()?;
    let mut request = EventsRequest { after: None, vm, limit };
    let reply = client.call(&request)?;
    if !follow {
        return out.answer("afterimage.events/1", &reply, || match reply.events.is_empty() {
            true => "nothing has happened yet".to_owned(),
            false => reply.events.iter().map(event).collect::<Vec<_>>().join("\n"),
        });
    }
    let mut events = reply.events;
    loop {
        for e in &events {
            // One object a line, so that a reader of the stream needs no parser of streams.
            match out.json {
                true => out.line(&json("afterimage.event/1", e)?.replace('\n', ""))?,
                false => out.line(&event(e))?,
            }
        }
        let newest = events.iter().map(|e| e.id).max();
        request.after = Some(newest.or(request.after).unwrap_or(0));
        request.limit = 0;
        std::thread::sleep(LOOK_AGAIN);
        events = client.call(&request)?.events;
    }
}

fn event(e: &EventView) -> String {
    let severity = match e.severity {
        Severity::Info => "info",
        Severity::Warning => "warning",
        Severity::Critical => "CRITICAL",
    };
    let vm = e.vm.as_ref().map(|v| format!("{v}: ")).unwrap_or_default();
    plain(&format!("{}  {severity:<8}  {vm}{}", local(e.time), e.text))
}
