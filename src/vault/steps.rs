//! A hook for tests: stop the vault at its n-th step, as a kill would.
//!
//! Between two steps lies one thing that can be half done: a write, a sync, a rename, a removal.
//! Once a vault is stopped, every later step fails too, so nothing is written any more; the test
//! drops it and opens the folder again. Outside of tests no step ever stops.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::base::{Error, ErrorKind, Result};

/// Counts steps and stops at one of them.
pub struct Steps {
    done: AtomicU64,
    stop_at: AtomicU64,
    between_looks: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

impl Default for Steps {
    fn default() -> Self {
        Self { done: AtomicU64::new(0), stop_at: AtomicU64::new(u64::MAX), between_looks: OnceLock::new() }
    }
}

impl Steps {
    /// Stops at step number `n` from now, counted from 1.
    pub fn stop_after(&self, n: u64) {
        self.stop_at.store(self.done().saturating_add(n), Ordering::SeqCst);
    }

    /// Runs `hook` in every read of a point after its first look at the undo index (A2).
    pub fn set_between_looks(&self, hook: impl Fn() + Send + Sync + 'static) {
        let _ = self.between_looks.set(Box::new(hook));
    }

    /// A reader is between its two looks.
    pub(super) fn between_looks(&self) {
        if let Some(hook) = self.between_looks.get() {
            hook();
        }
    }

    /// Number of steps done.
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::SeqCst)
    }

    /// Whether the vault was stopped.
    pub fn is_stopped(&self) -> bool {
        self.done() >= self.stop_at.load(Ordering::SeqCst)
    }

    /// Does a step. [`ErrorKind::Cancelled`]: stopped; nothing more may be written.
    pub(super) fn step(&self, what: &'static str) -> Result<()> {
        if !self.is_stopped() {
            self.done.fetch_add(1, Ordering::SeqCst);
        }
        if self.is_stopped() {
            return Err(Error::new(ErrorKind::Cancelled, format!("stopped before: {what}")));
        }
        Ok(())
    }
}

/// Whether the rule is switched off: only in a build with the feature `canary`, by
/// `AFTERIMAGE_CANARY`. A test build with a rule switched off must fail its tests.
#[cfg(feature = "canary")]
pub(super) fn is_off(rule: &str) -> bool {
    std::env::var("AFTERIMAGE_CANARY").is_ok_and(|v| v == rule)
}

/// Every rule holds in a build without the feature `canary`.
#[cfg(not(feature = "canary"))]
pub(super) const fn is_off(_rule: &str) -> bool {
    false
}
