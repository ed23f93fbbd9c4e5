//! Preserved blocks (T3, T5): the old content of frozen blocks, saved before it is overwritten.
//!
//! A writer copies the block to a place of its own in the frozen HRL, then sets *frozen ->
//! preserved*; a loser drops its copy. No lock is held over I/O: the index is locked only around
//! the change of state and the entry, so that whoever sees *preserved* finds the copy.
//!
//! Guests come first: when a limit is passed, the file system is short of space, or the copy
//! fails, the epoch gives up its cut. Killed: the index is gone, and the next process makes an
//! epoch with preserved blocks give up its cut.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::statvfs::fstatvfs;

use super::map::{BlockState, DiskMaps};
use super::sync::lock;
use crate::base::BLOCK_BYTES;
use crate::base::limits::{IMAGE_FREE_BYTES_MIN, PRESERVE_OPERATION_BYTES_MAX, PRESERVED_PERCENT_MAX};
use crate::format::hrl::PRESERVED_OFFSET;

const INDEX_SHARDS: usize = 16;
/// Bytes that may be written before the free space is asked for again.
const BUDGET_BYTES: u64 = 16 << 20;

/// Why a block cannot be preserved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Limit {
    /// Preserved data would pass its share of the disk.
    Share,
    /// The image file system would be left with too little free space.
    Space,
    /// The copy could not be written, or the old content not be read.
    Io,
    /// The epoch has no HRL, or its preserved data was freed.
    Closed,
}

impl Limit {
    /// In words.
    pub(crate) fn reason(self) -> &'static str {
        match self {
            Self::Share => "preserved data passed its share of the disk",
            Self::Space => "the image file system has too little free space for preserved data",
            Self::Io => "old content could not be saved",
            Self::Closed => "there is no change-tracking log to save old content in",
        }
    }
}

/// Preserved blocks of one disk and epoch.
pub(crate) struct Preserve {
    pub(crate) epoch: u64,
    file: Arc<File>,
    /// Slots given out.
    slots: AtomicU64,
    slots_max: u64,
    budget: AtomicI64,
    freed: AtomicBool,
    index: [Mutex<HashMap<u64, u64>>; INDEX_SHARDS],
}

impl Preserve {
    /// For a disk of `size` bytes. The share has a floor of one operation's limit, so that small
    /// disks can be replicated at all.
    pub(crate) fn new(epoch: u64, file: Arc<File>, size: u64) -> Self {
        let bytes_max = (size / 100 * PRESERVED_PERCENT_MAX).max(PRESERVE_OPERATION_BYTES_MAX);
        Self {
            epoch,
            file,
            slots: AtomicU64::new(0),
            slots_max: bytes_max / BLOCK_BYTES,
            budget: AtomicI64::new(0),
            freed: AtomicBool::new(false),
            index: Default::default(),
        }
    }

    fn shard(&self, block: u64) -> &Mutex<HashMap<u64, u64>> {
        &self.index[block as usize % INDEX_SHARDS]
    }

    /// Bytes saved, those of losers included.
    pub(crate) fn bytes(&self) -> u64 {
        if self.freed.load(SeqCst) { 0 } else { self.slots.load(SeqCst) * BLOCK_BYTES }
    }

    /// Saves `content`, one block after another from block `first` on, for those that are still
    /// frozen in `map`.
    pub(crate) fn save(&self, maps: &DiskMaps, map: usize, first: u64, content: &[u8]) -> Result<(), Limit> {
        let blocks = content.len() as u64 / BLOCK_BYTES;
        self.reserve(blocks)?;
        // A place of its own: nobody else writes to these slots.
        let slot = self.slots.fetch_add(blocks, SeqCst);
        self.file.write_all_at(content, PRESERVED_OFFSET + slot * BLOCK_BYTES).map_err(|_| Limit::Io)?;
        for i in 0..blocks {
            let mut index = lock(self.shard(first + i));
            if maps.settle(map, first + i, BlockState::Preserved).is_ok() {
                index.insert(first + i, slot + i);
            }
        }
        // Freed meanwhile: the copies may be gone, and the cut has been given up already.
        if self.freed.load(SeqCst) { Err(Limit::Closed) } else { Ok(()) }
    }

    fn reserve(&self, blocks: u64) -> Result<(), Limit> {
        if self.freed.load(SeqCst) {
            return Err(Limit::Closed);
        }
        if self.slots.load(SeqCst) + blocks > self.slots_max {
            return Err(Limit::Share);
        }
        let bytes = i64::try_from(blocks * BLOCK_BYTES).map_err(|_| Limit::Share)?;
        if self.budget.fetch_sub(bytes, SeqCst) >= bytes {
            return Ok(());
        }
        let space = fstatvfs(&*self.file).map_err(|_| Limit::Io)?;
        let unit = space.fragment_size();
        let free = space.blocks_available() * unit;
        let floor = IMAGE_FREE_BYTES_MIN.max(space.blocks() * unit / 20);
        let spare = free.saturating_sub(floor).min(BUDGET_BYTES);
        let left = i64::try_from(spare).unwrap_or(0) - bytes;
        self.budget.store(left, SeqCst);
        if left < 0 { Err(Limit::Space) } else { Ok(()) }
    }

    /// Reads the copy of a preserved block. `false`: there is none, or it cannot be read.
    pub(crate) fn read(&self, block: u64, buffer: &mut [u8]) -> bool {
        let slot = lock(self.shard(block)).get(&block).copied();
        slot.is_some_and(|s| self.file.read_exact_at(buffer, PRESERVED_OFFSET + s * BLOCK_BYTES).is_ok())
    }

    /// Nothing is saved any more.
    pub(crate) fn close(&self) {
        self.freed.store(true, SeqCst);
    }

    /// Gives the space back. Closed, and after that given up, before: else a copy that is read
    /// and believed could go. Whether there was any.
    pub(crate) fn punch(&self) -> bool {
        let length = self.slots.load(SeqCst) * BLOCK_BYTES;
        if length > 0 {
            let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            let _ = fallocate(&self.file, flags, PRESERVED_OFFSET as i64, length as i64);
        }
        length > 0
    }
}
