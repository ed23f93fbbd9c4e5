//! When to try again after a failure (design, section 5): pure.
//!
//! ```text
//!            failed                    failed, half a minute later
//!  Healthy ----------> Reconnecting ------------------------------> Failing --+ failed:
//!     ^                (1, 2, 4, 8 s)                               ^     |   | 1, 2, 4, 8, 10 min,
//!     +------ succeeded ---+----------------------------------------|-----+   | then every 30, each
//!                                                                   +---------+ from the failure before
//! ```
//!
//! While Failing, a cheap probe runs every 5 to 10 s; an answer ends the wait at once, and so
//! does `sync`. A probe that answers although the attempt after it failed again is not believed
//! a second time before it has failed once in between, so that a vault which answers and
//! refuses is not hammered. Whether an error is tried again at all is
//! [`crate::base::ErrorKind::is_recoverable`].

use std::time::Duration;

/// Within this time of the first error, reconnecting is no failure.
pub const RECONNECT: Duration = Duration::from_secs(30);
/// Longest wait between attempts while reconnecting.
const RECONNECT_STEP_MAX: Duration = Duration::from_secs(8);
/// Waits after the first, second, ... failure, in minutes; the last one repeats.
const WAIT_MINUTES: [u64; 6] = [1, 2, 4, 8, 10, 30];
/// Shortest time between probes.
const PROBE_MIN: Duration = Duration::from_secs(5);
/// What the jitter adds to it, at most.
const PROBE_JITTER_MS: u64 = 5000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Healthy,
    Reconnecting { since: Duration, tries: u32, attempt_at: Duration },
    Failing { since: Duration, failures: u32, attempt_at: Duration, probe_at: Duration },
}

/// What is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due {
    /// Nothing yet.
    Nothing,
    /// An attempt.
    Attempt,
    /// A probe.
    Probe,
}

/// The retry schedule of one VM. Times are of the monotonic clock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Retry {
    state: State,
    /// A probe's answer began the last attempt, and nothing has failed to answer since.
    distrusts_probes: bool,
    by_probe: bool,
}

impl Default for Retry {
    fn default() -> Self {
        Self { state: State::Healthy, distrusts_probes: false, by_probe: false }
    }
}

impl Retry {
    /// A recoverable error at `now`. `random`: any number, for the jitter. Returns whether it is
    /// the first one that counts as a failure.
    pub fn failed(&mut self, now: Duration, random: u64) -> bool {
        self.distrusts_probes = std::mem::take(&mut self.by_probe);
        match self.state {
            State::Healthy => {
                let attempt_at = now + Duration::from_secs(1);
                self.state = State::Reconnecting { since: now, tries: 1, attempt_at };
                false
            }
            State::Reconnecting { since, tries, .. } if now < since + RECONNECT => {
                let step = Duration::from_secs(1 << tries.min(10)).min(RECONNECT_STEP_MAX);
                let attempt_at = (now + step).min(since + RECONNECT);
                self.state = State::Reconnecting { since, tries: tries + 1, attempt_at };
                false
            }
            State::Reconnecting { since, .. } => {
                self.fail(now, since, 1, random);
                true
            }
            State::Failing { since, failures, .. } => {
                self.fail(now, since, failures.saturating_add(1), random);
                false
            }
        }
    }

    fn fail(&mut self, now: Duration, since: Duration, failures: u32, random: u64) {
        let index = usize::try_from(failures - 1).unwrap_or(usize::MAX).min(WAIT_MINUTES.len() - 1);
        let minutes = WAIT_MINUTES.get(index).copied().unwrap_or(30);
        let attempt_at = now + Duration::from_secs(60 * minutes);
        self.state = State::Failing { since, failures, attempt_at, probe_at: now + probe_wait(random) };
    }

    /// Something worked. Returns whether a failure ended.
    pub fn succeeded(&mut self) -> bool {
        let was_failing = self.is_failing();
        *self = Self::default();
        was_failing
    }

    /// Whether it has failed for longer than a reconnect may take.
    pub fn is_failing(&self) -> bool {
        matches!(self.state, State::Failing { .. })
    }

    /// Since when nothing has worked.
    pub fn since(&self) -> Option<Duration> {
        match self.state {
            State::Healthy => None,
            State::Reconnecting { since, .. } | State::Failing { since, .. } => Some(since),
        }
    }

    /// When the next attempt is due.
    pub fn attempt_at(&self) -> Option<Duration> {
        match self.state {
            State::Healthy => None,
            State::Reconnecting { attempt_at, .. } | State::Failing { attempt_at, .. } => Some(attempt_at),
        }
    }

    /// When [`Retry::due`] will say something else than [`Due::Nothing`].
    pub fn wake_at(&self) -> Option<Duration> {
        match self.state {
            State::Failing { attempt_at, probe_at, .. } => Some(attempt_at.min(probe_at)),
            _ => self.attempt_at(),
        }
    }

    /// What is due at `now`.
    pub fn due(&self, now: Duration) -> Due {
        match self.state {
            State::Reconnecting { attempt_at, .. } | State::Failing { attempt_at, .. }
                if attempt_at <= now =>
            {
                Due::Attempt
            }
            State::Failing { probe_at, .. } if probe_at <= now => Due::Probe,
            _ => Due::Nothing,
        }
    }

    /// A probe ended. Returns whether the wait is over.
    pub fn probed(&mut self, now: Duration, has_answered: bool, random: u64) -> bool {
        if let State::Failing { probe_at, .. } = &mut self.state {
            *probe_at = now + probe_wait(random);
        }
        if !has_answered {
            self.distrusts_probes = false;
            return false;
        }
        self.by_probe = !self.distrusts_probes;
        self.by_probe
    }
}

fn probe_wait(random: u64) -> Duration {
    PROBE_MIN + Duration::from_millis(random % (PROBE_JITTER_MS + 1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn reconnects_within_half_a_minute_are_no_failure() {
        let mut retry = Retry::default();
        let mut now = s(100);
        let mut attempts = Vec::new();
        while !retry.failed(now, 0) {
            assert!(!retry.is_failing());
            now = retry.attempt_at().unwrap();
            attempts.push((now - s(100)).as_secs());
        }
        assert_eq!(attempts, [1, 3, 7, 15, 23, 30]);
        assert!(retry.is_failing());
        assert_eq!(retry.since(), Some(s(100)));
    }

    #[test]
    fn attempts_follow_the_schedule_each_from_the_failure_before() {
        let mut retry = Retry::default();
        retry.failed(s(0), 0);
        let mut now = s(31);
        let mut waits = Vec::new();
        for _ in 0..8 {
            retry.failed(now, 0);
            waits.push((retry.attempt_at().unwrap() - now).as_secs() / 60);
            // Each attempt itself takes 7 s; the wait counts from its failure.
            now = retry.attempt_at().unwrap() + s(7);
        }
        assert_eq!(waits, [1, 2, 4, 8, 10, 30, 30, 30]);
        assert!(retry.succeeded());
        assert_eq!(retry, Retry::default());
        assert!(!retry.succeeded());
    }

    #[test]
    fn a_probe_that_answers_ends_the_wait_but_is_not_believed_twice_in_a_row() {
        let mut retry = Retry::default();
        retry.failed(s(0), 0);
        retry.failed(s(31), 0);
        assert_eq!(retry.due(s(35)), Due::Nothing);
        assert_eq!(retry.due(s(36)), Due::Probe);
        assert!(!retry.probed(s(36), false, 5000));
        assert_eq!(retry.wake_at(), Some(s(46)));
        assert!(retry.probed(s(46), true, 0));
        retry.failed(s(47), 0);
        assert!(!retry.probed(s(52), true, 0), "answers, and yet the attempt failed");
        assert!(!retry.probed(s(57), false, 0));
        assert!(retry.probed(s(62), true, 0), "went away and came back");
    }

    proptest! {
        /// Whatever happens: an attempt is always due within half an hour, probes keep 5 to 10 s.
        #[test]
        fn never_waits_for_ever(events in prop::collection::vec((0u64..4000, 0u8..4, any::<u64>()), 1..60)) {
            let mut retry = Retry::default();
            let mut now = s(0);
            for (later, what, random) in events {
                now += s(later);
                match what {
                    0 | 1 => { retry.failed(now, random); }
                    2 => { retry.succeeded(); }
                    _ => { retry.probed(now, random % 2 == 0, random); }
                }
                if let State::Failing { probe_at, attempt_at, .. } = retry.state {
                    prop_assert!(attempt_at <= now + s(1800) || attempt_at <= now);
                    if what != 2 {
                        prop_assert!(probe_at >= now + s(5) && probe_at <= now + s(10));
                    }
                }
                prop_assert_eq!(retry.since().is_some(), retry.wake_at().is_some());
                if let Some(at) = retry.wake_at() {
                    prop_assert!(retry.due(at) != Due::Nothing);
                }
            }
        }
    }
}
