//! The few synchronisation primitives that the rules stand on, as traits.
//!
//! Gate, maps and pins are generic over them: production uses the standard library's, the tests
//! of interleavings use those of `shuttle`, and both run the same code.
//! Everything is sequentially consistent, as in the model.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A shared 64-bit word.
pub(crate) trait Word: Send + Sync + Default {
    fn load(&self) -> u64;
    fn store(&self, value: u64);
    /// Returns the value before, like the next two.
    fn add(&self, value: u64) -> u64;
    fn sub(&self, value: u64) -> u64;
    fn or(&self, bits: u64) -> u64;
    /// `Err`: another value was there.
    fn exchange(&self, current: u64, new: u64) -> Result<u64, u64>;
}

/// Waiting for others.
pub(crate) trait Signal: Send + Sync + Default {
    /// Waits until `done`, at most `patience`; whether it is done.
    fn wait_until(&self, patience: Duration, done: impl FnMut() -> bool) -> bool;
    /// Makes those who wait ask again. Cheap when nobody waits.
    fn notify(&self);
    /// Lets others run, inside a wait that lasts microseconds.
    fn relax();
}

/// A family of primitives.
pub(crate) trait Primitives {
    type Word: Word;
    type Signal: Signal;
}

/// The standard library's.
#[derive(Debug, Default)]
pub(crate) struct Std;

impl Primitives for Std {
    type Word = AtomicU64;
    type Signal = StdSignal;
}

impl Word for AtomicU64 {
    fn load(&self) -> u64 {
        AtomicU64::load(self, SeqCst)
    }
    fn store(&self, value: u64) {
        AtomicU64::store(self, value, SeqCst);
    }
    fn add(&self, value: u64) -> u64 {
        self.fetch_add(value, SeqCst)
    }
    fn sub(&self, value: u64) -> u64 {
        self.fetch_sub(value, SeqCst)
    }
    fn or(&self, bits: u64) -> u64 {
        self.fetch_or(bits, SeqCst)
    }
    fn exchange(&self, current: u64, new: u64) -> Result<u64, u64> {
        self.compare_exchange(current, new, SeqCst, SeqCst)
    }
}

/// A condition variable that costs its notifiers one load while nobody waits.
#[derive(Debug, Default)]
pub(crate) struct StdSignal {
    waiting: AtomicU64,
    mutex: Mutex<()>,
    condition: Condvar,
}

impl Signal for StdSignal {
    fn wait_until(&self, patience: Duration, mut done: impl FnMut() -> bool) -> bool {
        if done() {
            return true;
        }
        let begun = Instant::now();
        // Announced before `done` is asked again: who makes it true afterwards notifies.
        self.waiting.add(1);
        let mut guard = self.mutex.lock().unwrap_or_else(PoisonError::into_inner);
        let answer = loop {
            if done() {
                break true;
            }
            let left = patience.saturating_sub(begun.elapsed());
            if left.is_zero() {
                break false;
            }
            guard = self.condition.wait_timeout(guard, left).unwrap_or_else(PoisonError::into_inner).0;
        };
        drop(guard);
        self.waiting.sub(1);
        answer
    }

    fn notify(&self) {
        if self.waiting.load(SeqCst) != 0 {
            drop(self.mutex.lock().unwrap_or_else(PoisonError::into_inner));
            self.condition.notify_all();
        }
    }

    fn relax() {
        std::thread::yield_now();
    }
}

/// Locks a mutex; a thread that panicked while it held it leaves no reason to stop guests.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
pub(crate) mod shuttled {
    //! The primitives of `shuttle`: every use is a place where another thread may run.

    use super::{Primitives, Signal, Word};
    use shuttle::sync::atomic::{AtomicU64, Ordering::SeqCst};
    use std::time::Duration;

    #[derive(Default)]
    pub(crate) struct Shuttle;

    impl Primitives for Shuttle {
        type Word = AtomicU64;
        type Signal = Yielding;
    }

    impl Word for AtomicU64 {
        fn load(&self) -> u64 {
            AtomicU64::load(self, SeqCst)
        }
        fn store(&self, value: u64) {
            AtomicU64::store(self, value, SeqCst);
        }
        fn add(&self, value: u64) -> u64 {
            self.fetch_add(value, SeqCst)
        }
        fn sub(&self, value: u64) -> u64 {
            self.fetch_sub(value, SeqCst)
        }
        fn or(&self, bits: u64) -> u64 {
            self.fetch_or(bits, SeqCst)
        }
        fn exchange(&self, current: u64, new: u64) -> Result<u64, u64> {
            self.compare_exchange(current, new, SeqCst, SeqCst)
        }
    }

    #[derive(Default)]
    pub(crate) struct Yielding;

    impl Signal for Yielding {
        fn wait_until(&self, _patience: Duration, mut done: impl FnMut() -> bool) -> bool {
            while !done() {
                shuttle::thread::yield_now();
            }
            true
        }
        fn notify(&self) {}
        fn relax() {
            shuttle::thread::yield_now();
        }
    }
}
