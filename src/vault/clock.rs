//! Whether the clock can be trusted for deletion (A4), from run to run: [`ClockGuard`], and
//! `clock.json`, where it goes on.
//!
//! What if we are killed here? The document is replaced whole, and the older one makes the next run
//! see the jump again. What if it is missing, damaged or of another version? Then no time is
//! believed: nothing is dropped for a day. What if the disk is full here? Nothing waits for the
//! document: what may be dropped is dropped, and is what makes room.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::steps::Steps;
use super::store::lock;
use crate::base::durable::{read_limited, write_atomic};
use crate::base::{Clock, Error, ErrorKind, Result, Timestamp};
use crate::core::retention::ClockGuard;
use crate::format::vaultstate::ClockState;

const CLOCK_BYTES_MAX: u64 = 4096;

/// The clock of a vault, under watch.
pub(super) struct WatchedClock {
    path: PathBuf,
    clock: Arc<dyn Clock>,
    steps: Arc<Steps>,
    /// Held while the document is written: its temporary file has one writer.
    guard: Mutex<ClockGuard>,
}

/// The document of a new vault, which has no point that a wrong clock could drop.
pub(super) fn create(vault: &Path, clock: &dyn Clock) -> Result<()> {
    write_atomic(&path_in(vault), &ClockState::new(clock.now(), Duration::ZERO).encode()?)
}

fn path_in(vault: &Path) -> PathBuf {
    vault.join("clock.json")
}

fn read(path: &Path) -> Result<ClockState> {
    let bytes = read_limited(path, CLOCK_BYTES_MAX)?;
    let missing = || Error::new(ErrorKind::NotFound, format!("no file {}", path.display()));
    ClockState::decode(&bytes.ok_or_else(missing)?)
}

impl WatchedClock {
    /// Goes on where the last run ended.
    pub fn open(vault: &Path, clock: Arc<dyn Clock>, steps: Arc<Steps>) -> Self {
        let path = path_in(vault);
        let saved = read(&path);
        if let Err(e) = &saved {
            log::warn!("vault {}: what time it was is not known: {e}", vault.display());
        }
        let guard = ClockGuard::resume(saved.ok().as_ref(), clock.now(), clock.monotonic());
        let suspended = guard.suspended();
        let watched = Self { path, clock, steps, guard: Mutex::new(guard) };
        watched.tell(Duration::ZERO, suspended);
        watched
    }

    /// Looks at the clock: the time, if it is believed. `None`: nothing may be dropped now.
    pub fn believed(&self) -> Option<Timestamp> {
        let mut guard = lock(&self.guard);
        let now = self.clock.now();
        let before = guard.suspended();
        let is_plausible = guard.observe(now, self.clock.monotonic());
        self.tell(before, guard.suspended());
        if let Some(state) = guard.to_save()
            && let Err(e) = self.save(&state)
        {
            log::warn!("the clock of the vault is not remembered: {e}");
            guard.save_again();
        }
        is_plausible.then_some(now)
    }

    /// Once for each change: somebody looks several times a minute.
    fn tell(&self, before: Duration, now: Duration) {
        if now > before {
            let hours = now.as_secs().div_ceil(3600);
            log::warn!(
                "{}: the clock is not believed; no point is dropped for {hours} h",
                self.path.display()
            );
        } else if now.is_zero() && !before.is_zero() {
            log::info!("{}: the clock is believed again; points are dropped", self.path.display());
        }
    }

    fn save(&self, state: &ClockState) -> Result<()> {
        self.steps.step("clock.json")?;
        write_atomic(&self.path, &state.encode()?)?;
        self.steps.step("clock.json")
    }
}
