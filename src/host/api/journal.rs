//! What is said about jobs and events; part of [`super::types`].

use serde::{Deserialize, Serialize};

use super::types::Failure;
use crate::base::Timestamp;

/// Asks for jobs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobsRequest {
    /// At most so many; 0: 100.
    #[serde(default)]
    pub limit: u32,
}

/// Jobs, newest first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobsReply {
    /// `afterimage.jobs/1`.
    pub schema: String,
    /// The jobs.
    pub jobs: Vec<JobView>,
}

/// How far a job or step is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum JobState {
    /// Not begun.
    Waiting,
    /// At work.
    Running,
    /// Ended well.
    Done,
    /// Ended with an error.
    Failed,
    /// Ended by the operator.
    Cancelled,
}

impl JobState {
    /// Whether nothing more will happen.
    pub const fn is_over(self) -> bool {
        matches!(self, Self::Done | Self::Failed | Self::Cancelled)
    }
}

/// One job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobView {
    /// Its number.
    pub id: u64,
    /// `protect`, `restore`, ...
    pub kind: String,
    /// The VM it is about.
    #[serde(default)]
    pub vm: Option<String>,
    /// How far it is.
    pub state: JobState,
    /// When it began.
    pub started: Timestamp,
    /// When it ended.
    #[serde(default)]
    pub ended: Option<Timestamp>,
    /// Its steps in order.
    pub steps: Vec<JobStep>,
    /// Bytes done in the running step.
    #[serde(default)]
    pub done_bytes: u64,
    /// Bytes of the running step, as far as known; 0: unknown.
    #[serde(default)]
    pub total_bytes: u64,
    /// Why it failed.
    #[serde(default)]
    pub error: Option<Failure>,
    /// What came out, one sentence.
    #[serde(default)]
    pub result: Option<String>,
}

/// One step of a job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobStep {
    /// Its name (`prerequisites`).
    pub name: String,
    /// How far it is.
    pub state: JobState,
    /// What it is at or what it found.
    #[serde(default)]
    pub note: String,
}

/// Asks for one job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobShowRequest {
    /// Its number.
    pub job: u64,
}

/// Asks for the log of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobLogRequest {
    /// Its number.
    pub job: u64,
}

/// The log of a job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobLogReply {
    /// `afterimage.job-log/1`.
    pub schema: String,
    /// The lines, oldest first.
    pub lines: Vec<JobLogLine>,
}

/// One line of the log of a job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobLogLine {
    /// When.
    pub time: Timestamp,
    /// What.
    pub text: String,
}

/// Asks a job to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobCancelRequest {
    /// Its number.
    pub job: u64,
}

/// Asks for events.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EventsRequest {
    /// Only those with a higher number. `None`: the newest `limit`.
    #[serde(default)]
    pub after: Option<u64>,
    /// Only those of this VM.
    #[serde(default)]
    pub vm: Option<String>,
    /// At most so many; 0: 200.
    #[serde(default)]
    pub limit: u32,
}

/// Events, oldest first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventsReply {
    /// `afterimage.events/1`.
    pub schema: String,
    /// The events.
    pub events: Vec<EventView>,
}

/// How much an event matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// For the record.
    Info,
    /// Look at it.
    Warning,
    /// Act.
    Critical,
}

/// One event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventView {
    /// Its number, growing.
    pub id: u64,
    /// When.
    pub time: Timestamp,
    /// How much it matters.
    pub severity: Severity,
    /// The VM it is about.
    #[serde(default)]
    pub vm: Option<String>,
    /// Stable name (`point-made`, `disk-joined`).
    pub kind: String,
    /// One sentence.
    pub text: String,
}
