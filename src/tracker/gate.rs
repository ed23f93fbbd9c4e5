//! The gate between writers and the cut (T1, T2).
//!
//! The cut is one store of the VM's epoch word, for all disks at once, at an instant when nobody
//! is inside *enter and mark*. Writers: count in, look whether the gate is closed (then undo and
//! wait), read the word, count as a writer of its epoch, mark, count out. The cut: close, wait
//! until nobody is inside (microseconds, no I/O), store, open.
//!
//! The counters die with the process, as its writers do; the word is in shared memory. Killed
//! before the store: no cut. Killed after it: the next process finds the epoch frozen.

use std::time::Duration;

use super::canary::{Mutation, Rule, Step};
use super::sync::{Primitives, Signal, Word};

/// Counters are spread over so many cache lines.
pub(crate) const SHARDS: usize = 16;

/// State of the epoch before the current one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Previous {
    /// Acknowledged, or there is none.
    Forgotten,
    /// Frozen: its unread blocks are preserved before they are overwritten.
    Frozen,
    /// It has given up its cut.
    GaveUp,
}

/// The epoch word: the number of the current epoch, and what the one before it is.
///
/// One word, so that a cut, a give-up and an acknowledgement are one store each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct EpochWord(pub u64);

impl EpochWord {
    pub(crate) fn new(epoch: u64, previous: Previous) -> Self {
        let tag = match previous {
            Previous::Forgotten => 0,
            Previous::Frozen => 1,
            Previous::GaveUp => 2,
        };
        Self(epoch << 2 | tag)
    }

    pub(crate) fn epoch(self) -> u64 {
        self.0 >> 2
    }

    pub(crate) fn previous(self) -> Previous {
        match self.0 & 3 {
            0 => Previous::Forgotten,
            1 => Previous::Frozen,
            _ => Previous::GaveUp,
        }
    }

    /// The map of an epoch: three in turn (T2).
    pub(crate) fn map_of(epoch: u64) -> usize {
        (epoch % 3) as usize
    }
}

/// T5: whoever gives up says so before it writes. `false`: there was nothing frozen any more.
pub(crate) fn announce_give_up<W: Word>(word: &W, epoch: u64) -> bool {
    let frozen = EpochWord::new(epoch + 1, Previous::Frozen);
    let gave_up = EpochWord::new(epoch + 1, Previous::GaveUp);
    word.exchange(frozen.0, gave_up.0).is_ok()
}

#[repr(align(128))]
#[derive(Default)]
struct Shard<W> {
    inside: W,
    writers: [W; 3],
}

/// One per VM.
#[derive(Default)]
pub(crate) struct Gate<P: Primitives> {
    closed: P::Word,
    opened: P::Signal,
    left: P::Signal,
    shards: [Shard<P::Word>; SHARDS],
    mutation: Mutation,
}

impl<P: Primitives> Gate<P> {
    pub(crate) fn new(mutation: Mutation) -> Self
    where
        Self: Default,
    {
        Self { mutation, ..Self::default() }
    }

    fn shard(&self, shard: usize) -> &Shard<P::Word> {
        // The remainder is below the length of the array.
        &self.shards[shard % SHARDS]
    }

    /// Step 2: enter and mark, one section that never sleeps. `mark` gets the word read on entry.
    /// From now on until [`Gate::leave`] the caller is a writer of its epoch.
    #[inline]
    pub(crate) fn enter(&self, word: &P::Word, shard: usize, mark: impl FnOnce(EpochWord)) -> EpochWord {
        let counters = self.shard(shard);
        loop {
            counters.inside.add(1);
            if self.closed.load() == 0 {
                break;
            }
            counters.inside.sub(1);
            self.opened.wait_until(Duration::MAX, || self.closed.load() == 0);
        }
        let read = EpochWord(word.load());
        self.mutation.pause(Step::Entered);
        counters.writers[EpochWord::map_of(read.epoch())].add(1);
        mark(read);
        counters.inside.sub(1);
        read
    }

    /// Step 5: a writer of `epoch` leaves.
    #[inline]
    pub(crate) fn leave(&self, epoch: u64, shard: usize) {
        self.shard(shard).writers[EpochWord::map_of(epoch)].sub(1);
        self.left.notify();
    }

    /// T1: `at_the_instant` runs while nobody is inside, and its answer, if it gives one, becomes
    /// the epoch word. It must not do I/O that can wait.
    pub(crate) fn cut(&self, word: &P::Word, at_the_instant: impl FnOnce() -> Option<EpochWord>) -> bool {
        if self.mutation.breaks(Rule::T1) {
            let new = at_the_instant();
            new.iter().for_each(|w| word.store(w.0));
            self.wait_empty();
            return new.is_some();
        }
        self.closed.store(1);
        self.wait_empty();
        let new = at_the_instant();
        new.iter().for_each(|w| word.store(w.0));
        self.closed.store(0);
        self.opened.notify();
        new.is_some()
    }

    fn wait_empty(&self) {
        // Each shard once: who comes in after the store of `closed` undoes its count.
        for shard in &self.shards {
            while shard.inside.load() != 0 {
                P::Signal::relax();
            }
        }
    }

    /// Whether a writer of an epoch with this map is still there. Nobody can join an epoch that
    /// is over, so each counter needs to be seen empty only once.
    pub(crate) fn has_writers(&self, epoch: u64) -> bool {
        self.shards.iter().any(|s| s.writers[EpochWord::map_of(epoch)].load() != 0)
    }

    /// T2: waits until every writer of these epochs has left; `false`: not after `patience`.
    pub(crate) fn wait_writers(&self, epochs: &[u64], patience: Duration) -> bool {
        self.left.wait_until(patience, || !epochs.iter().any(|e| self.has_writers(*e)))
    }

    /// Waits for something else that ends when a writer leaves.
    pub(crate) fn wait_left(&self, patience: Duration, done: impl FnMut() -> bool) -> bool {
        self.left.wait_until(patience, done)
    }
}
