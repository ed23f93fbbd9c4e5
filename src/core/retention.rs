//! Which points to keep (A4): pure, from the vault's own arrival clock.

use std::time::Duration;

use crate::base::{EpochNumber, Timestamp};
use crate::format::vaultstate::ClockState;

/// Keep rules of a policy. Default: all of the last 2 hours, 24 hourly, 7 daily.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Keep {
    /// Every point that arrived within so many seconds.
    pub all_seconds: u64,
    /// The newest point of each of so many hours.
    pub hourly: u32,
    /// The newest point of each of so many days.
    pub daily: u32,
}

impl Default for Keep {
    fn default() -> Self {
        Self { all_seconds: 2 * 3600, hourly: 24, daily: 7 }
    }
}

impl Keep {
    /// How long every point is kept.
    pub const fn all(&self) -> Duration {
        Duration::from_secs(self.all_seconds)
    }
}

/// A point as retention sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeptPoint {
    /// Its epoch.
    pub epoch: EpochNumber,
    /// When it arrived, by the vault's clock.
    pub arrived: Timestamp,
    /// Pinned by an operator.
    pub is_pinned: bool,
    /// Somebody has it open.
    pub is_open: bool,
}

/// The points that `keep` no longer keeps, oldest first. `points` are ascending by epoch.
///
/// Ages count from the arrival of the newest point, not from `now`: points of a VM that gets no new
/// ones never expire. The newest point of each of the last `hourly` hours, and of the last `daily`
/// days (UTC), that have points is kept. The newest, pinned and open points always are. While a
/// point lies in the future of `now`, the clock was set back and nothing expires.
pub fn expired(points: &[KeptPoint], keep: &Keep, now: Timestamp) -> Vec<EpochNumber> {
    let Some(newest) = points.last() else { return Vec::new() };
    if points.iter().any(|p| p.arrived > now) {
        return Vec::new();
    }
    let mut hours = Buckets::new(3_600_000, keep.hourly);
    let mut days = Buckets::new(86_400_000, keep.daily);
    let mut out = Vec::new();
    for point in points.iter().rev() {
        // Both are asked for every point: a bucket is taken by its newest point, kept or not.
        let is_hourly = hours.takes(point.arrived);
        let is_daily = days.takes(point.arrived);
        let is_recent = newest.arrived.since(point.arrived) <= keep.all();
        let is_safe = point.epoch == newest.epoch || point.is_pinned || point.is_open;
        if !(is_hourly || is_daily || is_recent || is_safe) {
            out.push(point.epoch);
        }
    }
    out.reverse();
    out
}

/// Hours or days that keep their newest point; asked from the newest point to the oldest.
struct Buckets {
    length_ms: i64,
    left: u32,
    last: Option<i64>,
}

impl Buckets {
    const fn new(length_ms: i64, left: u32) -> Self {
        Self { length_ms, left, last: None }
    }

    fn takes(&mut self, at: Timestamp) -> bool {
        let bucket = at.0.div_euclid(self.length_ms);
        if self.left == 0 || self.last == Some(bucket) {
            return false;
        }
        self.last = Some(bucket);
        self.left -= 1;
        true
    }
}

/// Finds jumps of the wall clock, by the monotonic one, and suspends deletion after them.
///
/// A jump back of more than two minutes, or forward of more than a day, is implausible. Deletion is
/// suspended for a day of monotonic time, in which an operator can see the warning and set the clock.
///
/// Only run time proves that time has passed: a point that arrives after a jump has the wrong time
/// too. So the time seen last and what is left of a suspension are saved ([`ClockState`]), and each
/// run goes on from there. What if that is not saved, by a kill or for want of room? What was saved
/// before is from before the jump, so the next run sees the jump again (for an hour at least, if one
/// was seen before).
#[derive(Clone, Copy, Debug)]
pub struct ClockGuard {
    /// The clocks at the last look.
    wall: Timestamp,
    monotonic: Duration,
    /// Run time that is left of a suspension.
    suspended: Duration,
    /// From when on (monotonic) the state is to be saved.
    save_at: Duration,
}

/// Largest plausible step back.
const STEP_BACK_MAX: Duration = Duration::from_secs(120);
/// Largest plausible step forward.
const STEP_FORWARD_MAX: Duration = Duration::from_secs(24 * 3600);
/// How long deletion is suspended.
const SUSPENDED: Duration = Duration::from_secs(24 * 3600);
/// How long at least if the next run finds another step forward.
const SUSPENDED_AGAIN_MIN: Duration = Duration::from_secs(3600);
/// The state is saved so often; more often while it counts run time, which a kill would lose.
const SAVE_EVERY: Duration = Duration::from_secs(3600);
const SAVE_SUSPENDED_EVERY: Duration = Duration::from_secs(60);

impl ClockGuard {
    /// A guard that goes on from what was saved. `None`: nothing is known, so nothing is believed.
    pub fn resume(saved: Option<&ClockState>, wall: Timestamp, monotonic: Duration) -> Self {
        let mut guard = Self { wall, monotonic, suspended: SUSPENDED, save_at: monotonic };
        let Some(saved) = saved else { return guard };
        let left = Duration::from_secs(saved.suspended_seconds).min(SUSPENDED);
        (guard.wall, guard.suspended) = (saved.seen, left);
        guard.observe(wall, monotonic);
        // Most likely the host was off. If that began the day anew, a host that is on for a few
        // hours a week would never drop a point.
        if !left.is_zero() && wall.since(saved.seen) > STEP_FORWARD_MAX {
            guard.suspended = left.max(SUSPENDED_AGAIN_MIN);
        }
        guard
    }

    /// Run time for which nothing may be deleted yet.
    pub const fn suspended(&self) -> Duration {
        self.suspended
    }

    /// Looks at both clocks. `false`: nothing may be deleted now.
    pub fn observe(&mut self, wall: Timestamp, monotonic: Duration) -> bool {
        let passed = monotonic.saturating_sub(self.monotonic);
        let expected = self.wall.plus(passed);
        if expected.since(wall) > STEP_BACK_MAX || wall.since(expected) > STEP_FORWARD_MAX {
            (self.suspended, self.save_at) = (SUSPENDED, monotonic);
        } else {
            self.suspended = self.suspended.saturating_sub(passed);
        }
        (self.wall, self.monotonic) = (wall, monotonic);
        self.suspended.is_zero()
    }

    /// What the next run must know, if it is time to save it: at the first look, at once after a
    /// jump, and now and then.
    pub fn to_save(&mut self) -> Option<ClockState> {
        if self.monotonic < self.save_at {
            return None;
        }
        let every = if self.suspended.is_zero() { SAVE_EVERY } else { SAVE_SUSPENDED_EVERY };
        self.save_at = self.monotonic + every;
        Some(ClockState::new(self.wall, self.suspended))
    }

    /// What was to be saved could not be: the next look tries again.
    pub fn save_again(&mut self) {
        self.save_at = self.monotonic;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HOUR: i64 = 3_600_000;

    fn point(epoch: u64, arrived: i64) -> KeptPoint {
        KeptPoint { epoch: EpochNumber(epoch), arrived: Timestamp(arrived), is_pinned: false, is_open: false }
    }

    #[test]
    fn the_default_keeps_two_hours_24_hourly_and_7_daily() {
        // One point a minute for ten days, the newest at 23:59.
        let points: Vec<_> = (0..10 * 24 * 60).map(|m| point(m + 1, m as i64 * 60_000)).collect();
        let now = points.last().unwrap().arrived;
        let gone = expired(&points, &Keep::default(), now);
        let kept = points.len() - gone.len();
        // 121 within two hours (21:59 is one), the 21 other hours of the day, 6 other days.
        assert_eq!(kept, 121 + 21 + 6);
    }

    #[test]
    fn a_vm_without_new_points_and_a_clock_set_back_lose_nothing() {
        let points = [point(1, 0), point(2, HOUR / 2)];
        let keep = Keep { all_seconds: 3600, hourly: 0, daily: 0 };
        assert!(expired(&points, &keep, Timestamp(1000 * HOUR)).is_empty());
        let keep = Keep { all_seconds: 1, hourly: 0, daily: 0 };
        assert_eq!(expired(&points, &keep, Timestamp(HOUR)), [EpochNumber(1)]);
        assert!(expired(&points, &keep, Timestamp(0)).is_empty());
    }

    const DAY: i64 = 24 * HOUR;

    fn seconds(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    /// What was saved at `wall` of a run that believed the clock.
    fn believed(wall: i64) -> ClockState {
        ClockState::new(Timestamp(wall), Duration::ZERO)
    }

    /// A run from `wall` on that looks every 15 seconds; whether something may be deleted at its
    /// end, and what is saved then.
    fn run(saved: &ClockState, wall: i64, length: u64) -> (bool, ClockState) {
        let mut guard = ClockGuard::resume(Some(saved), Timestamp(wall), seconds(5));
        let (mut is_plausible, mut saved) = (false, *saved);
        for passed in (0..=length).step_by(15) {
            is_plausible = guard.observe(Timestamp(wall).plus(seconds(passed)), seconds(5 + passed));
            saved = guard.to_save().unwrap_or(saved);
        }
        (is_plausible, saved)
    }

    #[test]
    fn a_jump_suspends_deletion_for_a_day() {
        let mut guard = ClockGuard::resume(Some(&believed(0)), Timestamp(0), Duration::ZERO);
        let day = Duration::from_secs(86_400);
        assert!(guard.observe(Timestamp(5000), Duration::from_secs(5)));
        assert!(!guard.observe(Timestamp(30 * DAY), Duration::from_secs(6)));
        assert!(!guard.observe(Timestamp(30 * DAY + 1000), Duration::from_secs(7)));
        assert!(guard.observe(Timestamp(31 * DAY), Duration::from_secs(6) + day));
        assert!(!guard.observe(Timestamp(30 * DAY), Duration::from_secs(7) + day));
    }

    #[test]
    fn a_jump_is_remembered_and_only_run_time_ends_it() {
        let mut guard = ClockGuard::resume(Some(&believed(0)), Timestamp(0), seconds(0));
        guard.observe(Timestamp(400 * DAY), seconds(1));
        let saved = guard.to_save().unwrap();
        assert_eq!(saved, ClockState::new(Timestamp(400 * DAY), SUSPENDED));
        // Off for 20 hours: plausible, and no run time.
        let (is_plausible, saved) = run(&saved, 400 * DAY + 20 * HOUR, 10 * 3600);
        assert!(!is_plausible);
        assert_eq!(saved.suspended_seconds, 14 * 3600);
        let (is_plausible, saved) = run(&saved, 401 * DAY + 8 * HOUR, 14 * 3600 - 15);
        assert!(!is_plausible);
        assert!(run(&saved, 402 * DAY, 120).0);
        // Somebody set it right while nothing ran: a step back begins the day anew.
        assert_eq!(run(&saved, 2 * DAY, 0).1.suspended_seconds, 24 * 3600);
    }

    #[test]
    fn a_jump_that_was_not_saved_is_seen_again_and_nothing_known_is_nothing_believed() {
        let mut guard = ClockGuard::resume(Some(&believed(0)), Timestamp(0), seconds(0));
        assert!(!guard.observe(Timestamp(400 * DAY), seconds(1)));
        assert!(!run(&believed(0), 400 * DAY + HOUR, 23 * 3600).0);
        assert!(run(&believed(0), 400 * DAY + HOUR, 24 * 3600).0);
        let mut guard = ClockGuard::resume(None, Timestamp(5), seconds(7));
        assert_eq!(guard.to_save(), Some(ClockState::new(Timestamp(5), SUSPENDED)));
        assert!(!guard.observe(Timestamp(5), seconds(7)));
        assert!(guard.observe(Timestamp(5 + DAY), seconds(7 + 86_400)));
    }

    #[test]
    fn a_host_that_was_off_drops_nothing_at_once_and_is_not_suspended_for_ever() {
        // Four hours each Saturday.
        let mut saved = believed(0);
        let mut weeks = 0;
        while weeks < 10 {
            weeks += 1;
            let (is_plausible, next) = run(&saved, weeks * 7 * DAY, 4 * 3600);
            saved = next;
            if is_plausible {
                break;
            }
        }
        assert_eq!(weeks, 6);
        // However little is left, another jump gives an hour, and no more than a day is believed.
        let left = ClockState::new(Timestamp(0), seconds(1));
        assert!(!run(&left, 400 * DAY, 3585).0 && run(&left, 400 * DAY, 3600).0);
        assert!(run(&ClockState::new(Timestamp(0), Duration::MAX), HOUR, 24 * 3600).0);
    }

    #[test]
    fn a_jump_is_saved_at_once_and_the_rest_now_and_then() {
        let mut guard = ClockGuard::resume(Some(&believed(0)), Timestamp(0), seconds(0));
        let mut look = |wall: i64, passed| {
            guard.observe(Timestamp(wall).plus(seconds(passed)), seconds(passed));
            guard.to_save().is_some()
        };
        assert!(look(0, 0));
        assert!(!look(0, 3599) && look(0, 3600) && !look(0, 3615));
        assert!(look(40 * DAY, 3630) && !look(40 * DAY, 3645));
        assert!(look(40 * DAY, 3690) && !look(40 * DAY, 3705));
    }

    fn points() -> impl Strategy<Value = Vec<KeptPoint>> {
        prop::collection::vec((0i64..HOUR * 6, any::<bool>(), any::<bool>()), 1..40).prop_map(|steps| {
            let mut at = 0;
            let made = steps.into_iter().enumerate().map(|(i, (step, is_pinned, is_open))| {
                at += step;
                KeptPoint {
                    is_pinned: is_pinned && i % 3 == 0,
                    is_open: is_open && i % 5 == 0,
                    ..point(i as u64 + 1, at)
                }
            });
            made.collect()
        })
    }

    fn keep() -> impl Strategy<Value = Keep> {
        (0u64..20_000, 0u32..6, 0u32..4).prop_map(|(all_seconds, hourly, daily)| Keep {
            all_seconds,
            hourly,
            daily,
        })
    }

    proptest! {
        /// Newest, pinned and open points stay; what went does not bring others back; a more
        /// generous rule drops no more.
        #[test]
        fn is_safe_stable_and_monotonic(points in points(), keep in keep(), more in keep()) {
            let now = points.last().unwrap().arrived.plus(Duration::from_secs(60));
            let gone = expired(&points, &keep, now);
            prop_assert!(gone.is_sorted());
            prop_assert!(!gone.contains(&points.last().unwrap().epoch));
            for p in points.iter().filter(|p| p.is_pinned || p.is_open) {
                prop_assert!(!gone.contains(&p.epoch));
            }
            let left: Vec<_> = points.iter().copied().filter(|p| !gone.contains(&p.epoch)).collect();
            prop_assert!(expired(&left, &keep, now).is_empty());
            prop_assert!(expired(&points, &keep, now.plus(Duration::from_secs(1 << 30))) == gone);
            let generous = Keep {
                all_seconds: keep.all_seconds + more.all_seconds,
                hourly: keep.hourly + more.hourly,
                daily: keep.daily + more.daily,
            };
            for e in expired(&points, &generous, now) { prop_assert!(gone.contains(&e)); }
        }
    }
}
