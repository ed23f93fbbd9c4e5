//! When the next cycle is due: a fixed grid of the interval, so that a cycle that takes long does
//! not move those after it. Pure.
//!
//! The first cycle is due at once; the grid behind it is shifted by a random part of the
//! interval, so that the VMs of a host do not cut at the same instant. A cycle that begins a
//! whole interval late or more has missed those in between; they are counted, not made up for.

use std::time::Duration;

/// Shortest interval.
pub const INTERVAL_MIN: Duration = Duration::from_secs(1);
/// Longest interval: a day.
pub const INTERVAL_MAX: Duration = Duration::from_secs(86_400);

/// The schedule of one VM. Times are of the monotonic clock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule {
    interval: Duration,
    due_at: Duration,
    /// Random, for the place of the grid.
    phase: u64,
    is_first: bool,
    missed: u64,
}

impl Schedule {
    /// The first cycle is due at `now`. `random`: any number, for the place of the grid.
    pub fn new(interval: Duration, now: Duration, random: u64) -> Self {
        Self { interval: clamp(interval), due_at: now, phase: random, is_first: true, missed: 0 }
    }

    /// The interval.
    pub fn interval(&self) -> Duration {
        self.interval
    }

    /// When the next cycle is due.
    pub fn due_at(&self) -> Duration {
        self.due_at
    }

    /// Whether a cycle is due.
    pub fn is_due(&self, now: Duration) -> bool {
        self.due_at <= now
    }

    /// Cycles missed so far.
    pub fn missed(&self) -> u64 {
        self.missed
    }

    /// A due cycle begins at `now`: those missed are counted, the next one is due on the grid.
    /// Does nothing if none is due (a cycle out of turn, as for `sync`, does not move the grid).
    pub fn began(&mut self, now: Duration) {
        if !self.is_due(now) {
            return;
        }
        let interval = nanos(self.interval);
        let missed = nanos(now - self.due_at) / interval;
        self.missed = self.missed.saturating_add(missed);
        let shift = if std::mem::take(&mut self.is_first) { self.phase % interval } else { 0 };
        let next = nanos(self.due_at).saturating_add(missed.saturating_mul(interval));
        self.due_at = Duration::from_nanos(next.saturating_add(interval).saturating_add(shift));
    }

    /// Replication goes on after a pause or a long failure: a cycle is due at once, and what was
    /// due meanwhile does not count as missed.
    pub fn resumed(&mut self, now: Duration) {
        self.due_at = now;
    }

    /// Another interval: the next cycle is due that long after `now`, or sooner if it was.
    pub fn set_interval(&mut self, interval: Duration, now: Duration) {
        self.interval = clamp(interval);
        self.due_at = self.due_at.min(now + self.interval);
    }
}

fn clamp(interval: Duration) -> Duration {
    interval.clamp(INTERVAL_MIN, INTERVAL_MAX)
}

fn nanos(d: Duration) -> u64 {
    u64::try_from(d.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn the_first_cycle_is_due_at_once_and_long_ones_do_not_move_the_grid() {
        let mut schedule = Schedule::new(s(10), s(100), 3_000_000_000);
        assert!(schedule.is_due(s(100)));
        schedule.began(s(100));
        assert_eq!(schedule.due_at(), s(113));
        schedule.began(s(105)); // out of turn
        assert_eq!((schedule.due_at(), schedule.missed()), (s(113), 0));
        schedule.began(s(115));
        assert_eq!((schedule.due_at(), schedule.missed()), (s(123), 0));
        schedule.began(s(145));
        assert_eq!((schedule.due_at(), schedule.missed()), (s(153), 2));
    }

    #[test]
    fn a_pause_counts_nothing_as_missed() {
        let mut schedule = Schedule::new(s(10), s(0), 0);
        schedule.began(s(0));
        schedule.resumed(s(1000));
        schedule.began(s(1000));
        assert_eq!((schedule.due_at(), schedule.missed()), (s(1010), 0));
    }

    #[test]
    fn a_shorter_interval_counts_from_now_and_has_a_floor() {
        let mut schedule = Schedule::new(s(900), s(0), 0);
        schedule.began(s(0));
        schedule.set_interval(Duration::from_millis(1), s(10));
        assert_eq!((schedule.interval(), schedule.due_at()), (INTERVAL_MIN, s(11)));
    }

    proptest! {
        /// The next cycle is later than now and at most two intervals away (one and the shift).
        #[test]
        fn the_next_cycle_is_near(
            interval in 1u64..2000,
            phase: u64,
            steps in prop::collection::vec(0u64..10_000_000, 1..40),
        ) {
            let mut schedule = Schedule::new(s(interval), s(5), phase);
            let mut now = s(5);
            for step in steps {
                now += Duration::from_millis(step);
                schedule.began(now);
                prop_assert!(schedule.due_at() > now);
                prop_assert!(schedule.due_at() <= now + 2 * s(interval));
            }
        }
    }
}
