//! Which regions of a disk are hot, and who has pinned them (T6, T7).
//!
//! Pins are counted per disk, not per region: cooling clears the bits of many regions and then
//! waits once for every writer that may have seen them set. There are two counters in turn; a
//! writer pins the one whose turn it is, *then* asks whether its regions are hot. Cooling turns
//! them twice and waits for each to become empty: whoever pinned before the bits were cleared,
//! with whichever counter, has then left, and new writers never keep it waiting.
//!
//! Bits and pins belong to the process; the log says which regions are hot when it has died.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use super::gate::SHARDS;
use super::map::{bitmap, bits_set, clear_bit, has_bit, set_bit};
use super::sync::{Primitives, Signal, Std, Word};
use crate::base::limits::DISK_BYTES_MAX;
use crate::base::{DiskId, REGION_BYTES};

/// Regions of the largest disk.
pub(crate) const REGIONS_MAX: u64 = DISK_BYTES_MAX / REGION_BYTES;

#[repr(align(128))]
#[derive(Default)]
struct Shard<W> {
    pins: [W; 2],
}

/// Writers that have pinned regions of a disk.
#[derive(Default)]
pub(crate) struct Pins<P: Primitives> {
    turn: P::Word,
    shards: [Shard<P::Word>; SHARDS],
    left: P::Signal,
}

impl<P: Primitives> Pins<P> {
    /// Step 1: pin, before asking what is hot. Returns which counter, for [`Pins::unpin`].
    #[inline]
    pub(crate) fn pin(&self, shard: usize) -> usize {
        let turn = (self.turn.load() & 1) as usize;
        self.shards[shard % SHARDS].pins[turn].add(1);
        turn
    }

    /// Step 5.
    #[inline]
    pub(crate) fn unpin(&self, shard: usize, turn: usize) {
        self.shards[shard % SHARDS].pins[turn & 1].sub(1);
        self.left.notify();
    }

    /// Waits until everybody who pinned before the call has left; `false`: not after `patience`
    /// (twice, at most). From one thread at a time.
    pub(crate) fn wait_all(&self, patience: Duration) -> bool {
        (0..2).all(|_| {
            let turn = (self.turn.load() & 1) as usize;
            self.turn.store(1 - turn as u64);
            self.left.wait_until(patience, || self.shards.iter().all(|s| s.pins[turn].load() == 0))
        })
    }
}

/// The regions of one disk.
pub(crate) struct Regions {
    pub(crate) disk: DiskId,
    pub(crate) pins: Pins<Std>,
    /// Durably hot in the log, or the disk carries the untracked mark.
    hot: Box<[AtomicU64]>,
    /// Written to since the cooler last looked.
    recent: Box<[AtomicU64]>,
    /// Written to since the last good sync began (T9).
    unsynced: Box<[AtomicU64]>,
    /// Written to before the sync that runs began.
    syncing: Box<[AtomicU64]>,
    /// One past the last region that ever was hot.
    end: AtomicU64,
    /// T8: activations go into the untracked mark on the disk file instead of the log.
    pub(crate) untracked: std::sync::atomic::AtomicBool,
    /// T7: regions made hot at once; grows with use, shrinks with time.
    ahead: AtomicU64,
    pub(crate) count: AtomicU64,
}

impl Regions {
    pub(crate) fn new(disk: DiskId) -> Self {
        Self {
            disk,
            pins: Pins::default(),
            hot: bitmap(REGIONS_MAX),
            recent: bitmap(REGIONS_MAX),
            unsynced: bitmap(REGIONS_MAX),
            syncing: bitmap(REGIONS_MAX),
            end: AtomicU64::new(0),
            untracked: false.into(),
            ahead: AtomicU64::new(1),
            count: AtomicU64::new(0),
        }
    }

    /// Whether all are hot. After [`Pins::pin`].
    #[inline]
    pub(crate) fn are_hot(&self, mut regions: Range<u64>) -> bool {
        regions.all(|r| has_bit(&self.hot, r))
    }

    pub(crate) fn is_hot(&self, region: u64) -> bool {
        has_bit(&self.hot, region)
    }

    /// The activation of these regions is durable.
    pub(crate) fn set_hot(&self, regions: Range<u64>) {
        self.end.fetch_max(regions.end.min(REGIONS_MAX), SeqCst);
        for region in regions {
            if set_bit(&self.hot, region) {
                self.count.fetch_add(1, SeqCst);
            }
        }
    }

    pub(crate) fn clear_hot(&self, region: u64) {
        if self.is_hot(region) {
            clear_bit(&self.hot, region);
            self.count.fetch_sub(1, SeqCst);
        }
    }

    /// The hot regions as ranges.
    pub(crate) fn hot_ranges(&self) -> Vec<Range<u64>> {
        ranges_of(bits_set(&self.hot, self.end.load(SeqCst)))
    }

    /// A writer of these regions begins, or ends.
    #[inline]
    pub(crate) fn touch(&self, regions: Range<u64>) {
        for region in regions {
            set_bit(&self.recent, region);
            set_bit(&self.unsynced, region);
        }
    }

    /// Written to by a process that has died, perhaps, and not synced (T9). They are hot.
    pub(crate) fn assume_unsynced(&self) {
        for region in bits_set(&self.hot, self.end.load(SeqCst)) {
            set_bit(&self.unsynced, region);
        }
    }

    /// Hot regions that were not touched since the last call.
    pub(crate) fn idle(&self) -> Vec<u64> {
        let idle =
            bits_set(&self.hot, self.end.load(SeqCst)).filter(|r| !has_bit(&self.recent, *r)).collect();
        self.recent_words().for_each(|w| w.store(0, SeqCst));
        idle
    }

    fn recent_words(&self) -> impl Iterator<Item = &AtomicU64> {
        let words = self.end.load(SeqCst).div_ceil(64) as usize;
        self.recent.iter().take(words).filter(|w| w.load(SeqCst) != 0)
    }

    /// A sync of the file begins: what was written so far is in its charge.
    pub(crate) fn sync_begins(&self) {
        let end = self.end.load(SeqCst);
        for region in bits_set(&self.unsynced, end).collect::<Vec<_>>() {
            set_bit(&self.syncing, region);
            clear_bit(&self.unsynced, region);
        }
    }

    /// It was good: what was in its charge is on the medium.
    pub(crate) fn sync_succeeded(&self) {
        let words = self.end.load(SeqCst).div_ceil(64) as usize;
        self.syncing.iter().take(words).filter(|w| w.load(SeqCst) != 0).for_each(|w| w.store(0, SeqCst));
    }

    /// T9: it failed: everything written since the last good one.
    pub(crate) fn sync_failed(&self) -> Vec<Range<u64>> {
        let end = self.end.load(SeqCst);
        let all: std::collections::BTreeSet<u64> =
            bits_set(&self.unsynced, end).chain(bits_set(&self.syncing, end)).collect();
        ranges_of(all.into_iter())
    }

    /// T7: what to make hot when `regions` are cold. Forward when the region before is hot
    /// (growth in sequence), else the aligned group around it; the more activations, the more
    /// ahead, at most 16 regions.
    pub(crate) fn with_ahead(&self, regions: Range<u64>, ahead_max: u64) -> Range<u64> {
        let ahead = self.ahead.load(SeqCst).clamp(1, ahead_max);
        self.ahead.store((ahead * 2).min(ahead_max), SeqCst);
        let sequential = regions.start > 0 && self.is_hot(regions.start - 1);
        let start = if sequential { regions.start } else { regions.start / ahead * ahead };
        let end = if sequential { regions.end + ahead } else { regions.end.next_multiple_of(ahead) };
        start..end.min(REGIONS_MAX)
    }

    /// Activations have become rarer.
    pub(crate) fn slow_down(&self) {
        let ahead = self.ahead.load(SeqCst);
        self.ahead.store((ahead / 2).max(1), SeqCst);
    }
}

/// Numbers in order as ranges.
pub(crate) fn ranges_of(numbers: impl Iterator<Item = u64>) -> Vec<Range<u64>> {
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for n in numbers {
        match ranges.last_mut() {
            Some(last) if last.end == n => last.end += 1,
            _ => ranges.push(n..n + 1),
        }
    }
    ranges
}
