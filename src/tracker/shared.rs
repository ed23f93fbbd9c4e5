//! What all disks of a VM share in the write path: the epoch word, the gate, the log.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use super::canary::Mutation;
use super::gate::{EpochWord, Gate, Previous, announce_give_up};
use super::hot::HotLog;
use super::latency::Histogram;
use super::preserve::Preserve;
use super::preserve_memory::PreserveMemory;
use super::shm::{Shm, VM_EPOCH, VM_TRACKING};
use super::sync::{Std, lock};
use super::vm::GiveUps;
use crate::base::{BootId, Clock, VmId};

/// Of one VM.
pub(crate) struct VmShared {
    pub(crate) id: VmId,
    pub(crate) boot: BootId,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) gate: Gate<Std>,
    pub(crate) shm: Shm,
    pub(crate) hot: Arc<HotLog>,
    /// T10: truncations that run.
    pub(crate) truncations: AtomicU64,
    pub(crate) latency: Histogram,
    pub(crate) mutation: Mutation,
    pub(crate) give_ups: Mutex<GiveUps>,
    /// Where blocks of the frozen epoch are saved, of every disk.
    pub(crate) preserves: Mutex<Vec<Arc<Preserve>>>,
    /// The last epoch whose preserved blocks made room for guests.
    pub(crate) emptied: Mutex<Option<u64>>,
    /// Of the process.
    pub(crate) memory: Arc<PreserveMemory>,
}

impl VmShared {
    /// The word, for the gate.
    #[inline]
    pub(crate) fn epoch_field(&self) -> &AtomicU64 {
        self.shm.field(VM_EPOCH)
    }

    /// The epoch word.
    #[inline]
    pub(crate) fn word(&self) -> EpochWord {
        EpochWord(self.epoch_field().load(SeqCst))
    }

    /// Whether this epoch is frozen and has not given up its cut.
    pub(crate) fn is_frozen(&self, epoch: u64) -> bool {
        self.word() == EpochWord::new(epoch + 1, Previous::Frozen)
    }

    /// T5: the frozen epoch gives up its cut; said before the writer writes.
    pub(crate) fn announce_give_up(&self, epoch: u64, reason: &str, needed_bytes: u64) {
        if announce_give_up(self.epoch_field(), epoch) {
            let mut give_ups = lock(&self.give_ups);
            give_ups.in_a_row = give_ups.in_a_row.saturating_add(1);
            give_ups.reason = Some(reason.to_owned());
            give_ups.needed_bytes = needed_bytes;
            drop(give_ups);
            // Its copies are of no use to anybody, and other disks may want their room.
            for p in lock(&self.preserves).iter().filter(|p| p.epoch == epoch) {
                p.close();
                p.free_memory();
            }
        }
    }

    /// Blocks may have changed without a mark: what was made of them before counts for nothing.
    pub(crate) fn renew_tracking_id(&self) {
        self.shm.field(VM_TRACKING).store(rand::random::<u64>().max(1), SeqCst);
    }

    /// T5: makes room for guests: if old content takes space in a file, the frozen epoch gives up
    /// its cut. Whether there is more space: also if another writer has just made it.
    ///
    /// Copies in memory take no space: the cut would be given up for nothing.
    pub(crate) fn make_room(&self) -> bool {
        let mut emptied = lock(&self.emptied);
        let frozen = self.word().epoch() - 1;
        let takes_space = lock(&self.preserves).iter().any(|p| p.epoch == frozen && p.is_in_file());
        if !takes_space {
            return *emptied == Some(frozen);
        }
        self.announce_give_up(frozen, "the image file system is full", 0);
        if self.free_preserved() {
            *emptied = Some(frozen);
        }
        *emptied == Some(frozen)
    }

    /// Frees what was preserved for the frozen epoch, which gives up its cut. Whether there is more
    /// space now.
    ///
    /// The stores may be those of an epoch whose cut comes just now. Closed first: if the cut comes
    /// after the announcement, no writer saves anything; if before, readers hear of the give-up
    /// before a copy goes.
    pub(crate) fn free_preserved(&self) -> bool {
        let preserves = std::mem::take(&mut *lock(&self.preserves));
        preserves.iter().for_each(|p| p.close());
        for p in &preserves {
            self.announce_give_up(p.epoch, "space for saved content was needed", 0);
        }
        preserves.iter().filter(|p| p.free()).count() > 0
    }
}
