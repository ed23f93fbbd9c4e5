//! Health of a VM's replication: Normal, Warning or Critical, each reason in plain words with
//! what to do about it. Pure: facts in, reasons out.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::base::{Error, ErrorKind, Timestamp};

/// Delivery older than this is an alert where the policy names no other age.
pub const ALERT_AFTER_DEFAULT: Duration = Duration::from_secs(3600);

/// Give-ups in a row that make a Warning (T5).
pub const GIVE_UPS_ALERT: u32 = 3;

/// How well a VM is protected. The order is that of concern.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// Nothing to do.
    Normal,
    /// Something needs attention soon.
    Warning,
    /// The VM is not protected as it should be.
    Critical,
}

/// One reason why the health is not Normal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reason {
    /// How bad it is.
    pub level: Level,
    /// Stable name for scripts, as `paused` or `delivery-late`.
    pub code: String,
    /// What is the matter.
    pub what: String,
    /// What to do about it.
    pub remedy: String,
}

/// The health of a VM: the worst level of its reasons, worst reason first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    /// The worst level.
    pub level: Level,
    /// Why; empty when Normal.
    pub reasons: Vec<Reason>,
}

/// An error as text that outlives it: kind, what failed, why, what to type next.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The class of failure.
    pub kind: ErrorKind,
    /// What failed.
    pub what: String,
    /// Why.
    pub why: Option<String>,
    /// What to type next.
    pub hint: Option<String>,
}

impl Failure {
    /// The error again, for a caller.
    pub fn to_error(&self) -> Error {
        let mut error = Error::new(self.kind, self.what.clone());
        if let Some(why) = &self.why {
            error = error.why(why.clone());
        }
        match &self.hint {
            Some(hint) => error.hint(hint.clone()),
            None => error,
        }
    }

    /// What failed and why, in one line.
    pub fn sentence(&self) -> String {
        match &self.why {
            Some(why) => format!("{}: {why}", self.what),
            None => self.what.clone(),
        }
    }
}

impl From<&Error> for Failure {
    fn from(e: &Error) -> Self {
        Self {
            kind: e.kind(),
            what: e.what().to_owned(),
            why: e.reason(),
            hint: e.next_step().map(str::to_owned),
        }
    }
}

/// A failure that is being retried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Retrying {
    /// Since when nothing has worked.
    pub since: Timestamp,
    /// When the next attempt is due.
    pub next_attempt: Option<Timestamp>,
    /// The last error.
    pub failure: Failure,
}

/// What health is made of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HealthFacts {
    /// Name of the VM, for the commands in remedies.
    pub vm: String,
    /// An operator paused it.
    pub paused: bool,
    /// A recoverable failure that has lasted.
    pub retrying: Option<Retrying>,
    /// A failure that is not retried.
    pub stopped: Option<Failure>,
    /// Initial replication is not finished: bytes sent and bytes in all.
    pub initial: Option<(u64, u64)>,
    /// The vault is current as of this time; none before the first epoch is durable.
    pub current_as_of: Option<Timestamp>,
    /// Delivery older than this is an alert; none: [`ALERT_AFTER_DEFAULT`].
    pub alert_after: Option<Duration>,
    /// A disk that lies on the same device as the vault.
    pub shares_device: Option<String>,
    /// Give-ups in a row (T5), and the bytes of preserved data that would have been needed.
    pub give_ups: u32,
    /// See `give_ups`.
    pub preserved_needed: Option<u64>,
    /// Delivery waits for the vault to apply: its backlog in epochs and bytes.
    pub held_back: Option<(u64, u64)>,
    /// Disks that carry the untracked mark or ship whole, and why.
    pub whole: Vec<(String, String)>,
}

/// Judges the facts at `now`.
pub fn assess(now: Timestamp, facts: &HealthFacts) -> Health {
    let mut reasons = Vec::new();
    failures(facts, now, &mut reasons);
    delivery(facts, now, &mut reasons);
    standing(facts, &mut reasons);
    reasons.sort_by_key(|r| std::cmp::Reverse(r.level));
    Health { level: reasons.first().map_or(Level::Normal, |r| r.level), reasons }
}

fn reason(level: Level, code: &str, what: impl Into<String>, remedy: impl Into<String>) -> Reason {
    Reason { level, code: code.to_owned(), what: what.into(), remedy: remedy.into() }
}

/// What stops delivery.
fn failures(facts: &HealthFacts, now: Timestamp, out: &mut Vec<Reason>) {
    let vm = &facts.vm;
    if let Some(failure) = &facts.stopped {
        let hint = failure.hint.clone().map(|h| format!("{h}; then: ")).unwrap_or_default();
        out.push(reason(
            Level::Critical,
            "stopped",
            format!("replication has stopped: {}", failure.sentence()),
            format!("{hint}afterimage resume {vm}"),
        ));
    }
    if let Some(retrying) = &facts.retrying {
        let next = match retrying.next_attempt {
            Some(at) => format!("the next attempt is in {}", age(at.since(now))),
            None => "an attempt is being made".to_owned(),
        };
        let sentence = retrying.failure.sentence();
        out.push(reason(
            Level::Warning,
            "retrying",
            format!("delivery has failed for {}: {sentence}", age(now.since(retrying.since))),
            match &retrying.failure.hint {
                Some(hint) => format!("{hint}; {next}"),
                None => format!("{next}; to try at once: afterimage sync {vm}"),
            },
        ));
    }
    if facts.paused {
        out.push(reason(
            Level::Warning,
            "paused",
            "replication is paused; changes are tracked and not sent",
            format!("afterimage resume {vm}"),
        ));
    }
}

/// How old the newest durable cut is.
fn delivery(facts: &HealthFacts, now: Timestamp, out: &mut Vec<Reason>) {
    if let Some((done, total)) = facts.initial {
        let percent = done.saturating_mul(100).checked_div(total).unwrap_or(0).min(100);
        out.push(reason(
            Level::Warning,
            "initial-replication",
            format!("initial replication is not finished ({percent} % sent): there is no recovery point yet"),
            "wait until it is finished",
        ));
    }
    let alert_after = facts.alert_after.unwrap_or(ALERT_AFTER_DEFAULT);
    if let Some(as_of) = facts.current_as_of
        && now.since(as_of) > alert_after
    {
        out.push(reason(
            Level::Critical,
            "delivery-late",
            format!("the newest copy is {} old, more than {}", age(now.since(as_of)), age(alert_after)),
            format!("see what holds it up: afterimage status {}", facts.vm),
        ));
    }
    if let Some((epochs, bytes)) = facts.held_back {
        out.push(reason(
            Level::Warning,
            "vault-behind",
            format!("the vault has {epochs} epochs ({}) still to apply; delivery waits for it", size(bytes)),
            "give the vault a faster disk, or a longer interval: afterimage set NAME --interval 5m"
                .replace("NAME", &facts.vm),
        ));
    }
}

/// What is so by arrangement.
fn standing(facts: &HealthFacts, out: &mut Vec<Reason>) {
    if let Some(disk) = &facts.shares_device {
        out.push(reason(
            Level::Warning,
            "same-device",
            format!("no protection against loss of this machine: the vault is on the device of disk {disk}"),
            "use a vault on another machine, or at least on another disk",
        ));
    }
    if facts.give_ups >= GIVE_UPS_ALERT {
        let needed = match facts.preserved_needed {
            Some(bytes) => format!("; it would need a limit of {}", size(bytes)),
            None => String::new(),
        };
        out.push(reason(
            Level::Warning,
            "give-ups",
            format!(
                "{} cuts in a row were given up, because the guest overwrites more than may be preserved{needed}",
                facts.give_ups
            ),
            "make room on the file system of the disks, or raise the limit of preserved data",
        ));
    }
    for (disk, because) in &facts.whole {
        out.push(reason(
            Level::Warning,
            "ships-whole",
            format!("disk {disk} is sent whole: {because}"),
            "nothing; it ends with the next recovery point",
        ));
    }
}

/// A length of time for people.
fn age(d: Duration) -> String {
    match d.as_secs() {
        s @ 0..=119 => format!("{s} s"),
        s @ 120..=7199 => format!("{} min", s / 60),
        s @ 7200..=172_799 => format!("{} h", s / 3600),
        s => format!("{} days", s / 86_400),
    }
}

/// A number of bytes for people.
fn size(bytes: u64) -> String {
    bytesize::ByteSize::b(bytes).display().iec().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure() -> Failure {
        Failure {
            kind: ErrorKind::NoSpace,
            what: "the vault is full".into(),
            why: None,
            hint: Some("make room".into()),
        }
    }

    const NOW: Timestamp = Timestamp(10_000_000_000);

    fn facts() -> HealthFacts {
        HealthFacts { vm: "web1".into(), current_as_of: Some(NOW), ..HealthFacts::default() }
    }

    #[test]
    fn nothing_the_matter_is_normal() {
        assert_eq!(assess(NOW, &facts()), Health { level: Level::Normal, reasons: vec![] });
    }

    #[test]
    fn each_fact_has_its_level_code_and_remedy() {
        let old = Timestamp(NOW.0 - 3_601_000);
        type Change = fn(&mut HealthFacts, Timestamp);
        let cases: [(Change, Level, &str, &str); 9] = [
            (|f, _| f.paused = true, Level::Warning, "paused", "resume web1"),
            (
                |f, _| f.stopped = Some(failure()),
                Level::Critical,
                "stopped",
                "make room; then: afterimage resume",
            ),
            (
                |f, t| f.retrying = Some(Retrying { since: t, next_attempt: Some(NOW), failure: failure() }),
                Level::Warning,
                "retrying",
                "make room; the next attempt is in 0 s",
            ),
            (|f, t| f.current_as_of = Some(t), Level::Critical, "delivery-late", "status web1"),
            (|f, _| f.initial = Some((1, 4)), Level::Warning, "initial-replication", "wait"),
            (|f, _| f.shares_device = Some("a".into()), Level::Warning, "same-device", "another machine"),
            (|f, _| f.give_ups = 3, Level::Warning, "give-ups", "raise the limit"),
            (|f, _| f.held_back = Some((5, 1 << 30)), Level::Warning, "vault-behind", "set web1"),
            (|f, _| f.whole = vec![("a".into(), "b".into())], Level::Warning, "ships-whole", "next"),
        ];
        for (change, level, code, remedy) in cases {
            let mut facts = facts();
            change(&mut facts, old);
            let health = assess(NOW, &facts);
            assert_eq!((health.level, health.reasons.len()), (level, 1), "{code}");
            assert_eq!(health.reasons[0].code, code);
            assert!(health.reasons[0].remedy.contains(remedy), "{}", health.reasons[0].remedy);
        }
    }

    #[test]
    fn the_worst_reason_comes_first() {
        let facts = HealthFacts { paused: true, stopped: Some(failure()), ..facts() };
        let health = assess(NOW, &facts);
        assert_eq!(health.level, Level::Critical);
        assert_eq!(health.reasons[0].code, "stopped");
    }

    #[test]
    fn two_give_ups_and_an_alert_age_that_is_not_reached_are_fine() {
        let mut facts = HealthFacts { give_ups: 2, alert_after: Some(Duration::from_secs(60)), ..facts() };
        facts.current_as_of = Some(Timestamp(NOW.0 - 60_000));
        assert_eq!(assess(NOW, &facts).level, Level::Normal);
    }

    #[test]
    fn a_failure_survives_as_text() {
        let error = Error::new(ErrorKind::Io, "disk a cannot be read").why("EIO").hint("replace it");
        let again = Failure::from(&error).to_error();
        assert_eq!(again.to_string(), error.to_string());
        assert_eq!(again.next_step(), error.next_step());
    }
}
