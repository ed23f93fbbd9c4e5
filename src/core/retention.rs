//! Which points to keep (A4): pure, from the vault's own arrival clock.

use std::time::Duration;

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
