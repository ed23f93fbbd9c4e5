//! Which points to keep (A4): pure, from the vault's own arrival clock.

use std::time::Duration;

use crate::base::{EpochNumber, Timestamp};

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
#[derive(Clone, Copy, Debug)]
pub struct ClockGuard {
    wall: Timestamp,
    monotonic: Duration,
    suspended_until: Option<Duration>,
}

/// Largest plausible step back.
const STEP_BACK_SECONDS_MAX: u64 = 120;
/// Largest plausible step forward.
const STEP_FORWARD_SECONDS_MAX: u64 = 24 * 3600;
/// How long deletion is suspended.
const SUSPENDED_SECONDS: u64 = 24 * 3600;

impl ClockGuard {
    /// A guard that believes `wall` at `monotonic`.
    pub const fn new(wall: Timestamp, monotonic: Duration) -> Self {
        Self { wall, monotonic, suspended_until: None }
    }

    /// Looks at both clocks. `false`: nothing may be deleted now.
    pub fn observe(&mut self, wall: Timestamp, monotonic: Duration) -> bool {
        let expected = self.wall.plus(monotonic.saturating_sub(self.monotonic));
        let is_back = expected.since(wall) > Duration::from_secs(STEP_BACK_SECONDS_MAX);
        let is_forward = wall.since(expected) > Duration::from_secs(STEP_FORWARD_SECONDS_MAX);
        if is_back || is_forward {
            self.suspended_until = Some(monotonic + Duration::from_secs(SUSPENDED_SECONDS));
        }
        (self.wall, self.monotonic) = (wall, monotonic);
        if self.suspended_until.is_some_and(|until| monotonic >= until) {
            self.suspended_until = None;
        }
        self.suspended_until.is_none()
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

    #[test]
    fn a_jump_suspends_deletion_for_a_day() {
        let mut guard = ClockGuard::new(Timestamp(0), Duration::ZERO);
        let day = Duration::from_secs(86_400);
        assert!(guard.observe(Timestamp(5000), Duration::from_secs(5)));
        assert!(!guard.observe(Timestamp(30 * 24 * HOUR), Duration::from_secs(6)));
        assert!(!guard.observe(Timestamp(30 * 24 * HOUR + 1000), Duration::from_secs(7)));
        assert!(guard.observe(Timestamp(31 * 24 * HOUR), Duration::from_secs(6) + day));
        assert!(!guard.observe(Timestamp(30 * 24 * HOUR), Duration::from_secs(7) + day));
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
