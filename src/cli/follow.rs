//! Follows a job: its steps, a bar on a terminal, and its end as ours.
//!
//! Ctrl-C leaves the job running and says how to see it.

use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use super::out::{Out, plain};
use super::text::bytes;
use crate::base::{Error, ErrorKind, Result};
use crate::host::api::Client;
use crate::host::api::types::{JobShowRequest, JobStarted, JobState, JobView};

/// Between two looks at a job.
const LOOK_AGAIN: Duration = Duration::from_millis(150);
/// Exit code after Ctrl-C, as shells have it.
const INTERRUPTED: u8 = 130;

/// Follows `started` to its end. A job that failed is an error of its kind.
pub fn follow(out: &Out, client: &Client, started: JobStarted) -> Result<ExitCode> {
    let mut interrupts = client.interrupts()?;
    let mut teller = Teller::new(out);
    loop {
        let job = client.call(&JobShowRequest { job: started.job })?;
        teller.tell(&job);
        if job.state.is_over() {
            teller.clear();
            return end(out, &job);
        }
        if interrupts.arrive_within(LOOK_AGAIN) {
            teller.clear();
            let id = job.id;
            eprintln!(
                "job {id} goes on; see it: afterimage job show {id}; end it: afterimage job cancel {id}"
            );
            return Ok(ExitCode::from(INTERRUPTED));
        }
    }
}

fn end(out: &Out, job: &JobView) -> Result<ExitCode> {
    match (job.state, &job.error) {
        (JobState::Done, _) => {
            out.answer("afterimage.job/1", job, || {
                plain(&job.result.clone().unwrap_or_else(|| format!("job {} is done", job.id)))
            })?;
            Ok(ExitCode::SUCCESS)
        }
        (_, Some(failure)) => Err(failure.clone().into()),
        (JobState::Cancelled, None) => {
            Err(Error::new(ErrorKind::Cancelled, format!("job {} was cancelled", job.id)))
        }
        (_, None) => Err(Error::new(ErrorKind::Internal, format!("job {} failed", job.id))
            .hint(format!("afterimage job log {}", job.id))),
    }
}

/// Tells the steps on standard error as they come.
struct Teller {
    bar: Option<ProgressBar>,
    quiet: bool,
    told: usize,
    last_note: String,
}

impl Teller {
    fn new(out: &Out) -> Self {
        let quiet = out.json;
        let bar = (!quiet && std::io::stderr().is_terminal()).then(|| {
            let bar = ProgressBar::no_length();
            bar.enable_steady_tick(Duration::from_millis(100));
            bar
        });
        Self { bar, quiet, told: 0, last_note: String::new() }
    }

    fn tell(&mut self, job: &JobView) {
        if self.quiet {
            return;
        }
        let begun = job.steps.iter().take_while(|s| s.state != JobState::Waiting).count();
        for step in job.steps.get(self.told..begun).unwrap_or_default() {
            self.say(&format!("{} ...", step.name));
        }
        self.told = self.told.max(begun);
        let running = job.steps.iter().find(|s| s.state == JobState::Running);
        let note = running.map(|s| s.note.clone()).unwrap_or_default();
        let Some(bar) = &self.bar else {
            if !note.is_empty() && note != self.last_note {
                self.say(&format!("  {note}"));
                self.last_note = note;
            }
            return;
        };
        let template = if job.total_bytes > 0 {
            bar.set_length(job.total_bytes);
            bar.set_position(job.done_bytes.min(job.total_bytes));
            "  {bar:30} {binary_bytes} of {binary_total_bytes}, {binary_bytes_per_sec}, {eta} left  {msg}"
        } else {
            "  {spinner} {msg}"
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_message(plain(&note));
    }

    fn say(&self, line: &str) {
        let line = plain(line);
        match &self.bar {
            Some(bar) => bar.println(line),
            None => eprintln!("{line}"),
        }
    }

    fn clear(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// `restored 3 of 10 GiB` for a table.
pub fn progress(job: &JobView) -> String {
    match (job.state, job.total_bytes) {
        (JobState::Running, total) if total > 0 => format!("{} of {}", bytes(job.done_bytes), bytes(total)),
        _ => String::new(),
    }
}
