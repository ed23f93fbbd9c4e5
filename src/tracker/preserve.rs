//! Preserved blocks (T3, T5): the old content of frozen blocks, saved before it is overwritten.
//!
//! A writer copies the block to a place of its own, then sets *frozen -> preserved*; a loser drops
//! its copy. No lock is held over I/O: the index is locked only around the change of state and the
//! entry, so that whoever sees *preserved* finds the copy.
//!
//! The first copies stay in memory: a write into the HRL would stand behind whatever its file
//! system syncs at the time, and the guest's write with it. Beyond a limit for the whole process
//! they go into the frozen HRL.
//!
//! Guests come first: when a limit is passed, the file system is short of space, or the copy
//! fails, the epoch gives up its cut. Killed: the index is gone, wherever the copies are, and the
//! next process makes an epoch with preserved blocks give up its cut.

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
use crate::base::limits::{
    IMAGE_FREE_BYTES_MIN, PRESERVE_OPERATION_BYTES_MAX, PRESERVED_MEMORY_BYTES_MAX, PRESERVED_PERCENT_MAX,
};
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

/// Blocks in the memory of this process, of all disks.
static HELD: AtomicU64 = AtomicU64::new(0);

/// A block in memory. It counts against the limit of the process until it is dropped.
struct Held(Box<[u8]>);

impl Held {
    /// Makes room for `blocks`, each to be filled by [`Held::fill`]. `false`: there is none.
    fn reserve(blocks: u64) -> bool {
        let fits = HELD.fetch_add(blocks, SeqCst) + blocks <= PRESERVED_MEMORY_BYTES_MAX / BLOCK_BYTES;
        if !fits {
            HELD.fetch_sub(blocks, SeqCst);
        }
        fits
    }

    /// Fills room that was made.
    fn fill(content: &[u8]) -> Self {
        Self(content.into())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        HELD.fetch_sub(1, SeqCst);
    }
}

/// Where the copy of a block is.
enum Saved {
    Memory(Held),
    /// Number of its page in the HRL.
    File(u64),
}

/// Preserved blocks of one disk and epoch.
pub(crate) struct Preserve {
    pub(crate) epoch: u64,
    file: Arc<File>,
    /// Copies made, those of losers included.
    copies: AtomicU64,
    copies_max: u64,
    /// Pages of the file given out.
    slots: AtomicU64,
    budget: AtomicI64,
    freed: AtomicBool,
    index: [Mutex<HashMap<u64, Saved>>; INDEX_SHARDS],
}

impl Preserve {
    /// For a disk of `size` bytes. The share has a floor of one operation's limit, so that small
    /// disks can be replicated at all.
    pub(crate) fn new(epoch: u64, file: Arc<File>, size: u64) -> Self {
        let bytes_max = (size / 100 * PRESERVED_PERCENT_MAX).max(PRESERVE_OPERATION_BYTES_MAX);
        Self {
            epoch,
            file,
            copies: AtomicU64::new(0),
            copies_max: bytes_max / BLOCK_BYTES,
            slots: AtomicU64::new(0),
            budget: AtomicI64::new(0),
            freed: AtomicBool::new(false),
            index: Default::default(),
        }
    }

    fn shard(&self, block: u64) -> &Mutex<HashMap<u64, Saved>> {
        &self.index[block as usize % INDEX_SHARDS]
    }

    /// Bytes saved, those of losers included.
    pub(crate) fn bytes(&self) -> u64 {
        if self.freed.load(SeqCst) { 0 } else { self.copies.load(SeqCst) * BLOCK_BYTES }
    }

    /// Saves `content`, one block after another from block `first` on, for those that are still
    /// frozen in `map`.
    pub(crate) fn save(&self, maps: &DiskMaps, map: usize, first: u64, content: &[u8]) -> Result<(), Limit> {
        let blocks = content.len() as u64 / BLOCK_BYTES;
        if self.freed.load(SeqCst) {
            return Err(Limit::Closed);
        }
        if self.copies.load(SeqCst) + blocks > self.copies_max {
            return Err(Limit::Share);
        }
        let slot = if Held::reserve(blocks) { None } else { Some(self.write(blocks, content)?) };
        self.copies.fetch_add(blocks, SeqCst);
        for (i, content) in (0..).zip(content.chunks_exact(BLOCK_BYTES as usize)) {
            let block = first + i;
            let copy = slot.map_or_else(|| Saved::Memory(Held::fill(content)), |s| Saved::File(s + i));
            let mut index = lock(self.shard(block));
            if maps.settle(map, block, BlockState::Preserved).is_ok() {
                index.insert(block, copy);
            }
        }
        // Freed meanwhile: the copies may be gone, and the cut has been given up already.
        if self.freed.load(SeqCst) { Err(Limit::Closed) } else { Ok(()) }
    }

    /// Writes copies into the file; the first of their pages.
    fn write(&self, blocks: u64, content: &[u8]) -> Result<u64, Limit> {
        self.reserve(blocks)?;
        // A place of its own: nobody else writes to these pages.
        let slot = self.slots.fetch_add(blocks, SeqCst);
        self.file.write_all_at(content, PRESERVED_OFFSET + slot * BLOCK_BYTES).map_err(|_| Limit::Io)?;
        Ok(slot)
    }

    fn reserve(&self, blocks: u64) -> Result<(), Limit> {
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

    /// Reads the copy of a preserved block into a buffer of one block. `false`: there is none, or
    /// it cannot be read.
    pub(crate) fn read(&self, block: u64, buffer: &mut [u8]) -> bool {
        let slot = match lock(self.shard(block)).get(&block) {
            None => return false,
            Some(Saved::Memory(held)) => {
                buffer.copy_from_slice(&held.0);
                return true;
            }
            Some(Saved::File(slot)) => *slot,
        };
        self.file.read_exact_at(buffer, PRESERVED_OFFSET + slot * BLOCK_BYTES).is_ok()
    }

    /// Nothing is saved any more.
    pub(crate) fn close(&self) {
        self.freed.store(true, SeqCst);
    }

    /// Gives the space of the file back; what is in memory goes with its last user. Closed, and after
    /// that given up, before: else a copy that is read and believed could go. Whether there was any.
    pub(crate) fn punch(&self) -> bool {
        let length = self.slots.load(SeqCst) * BLOCK_BYTES;
        if length > 0 {
            let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            let _ = fallocate(&self.file, flags, PRESERVED_OFFSET as i64, length as i64);
        }
        length > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::BootId;
    use crate::tracker::shm::{Shm, ShmNames};

    /// Copies in memory up to the limit, the rest in the file, and none of them mixed up.
    #[test]
    fn what_memory_does_not_hold_is_in_the_file() {
        const RUN: u64 = 16;
        const BLOCKS: u64 = PRESERVED_MEMORY_BYTES_MAX / BLOCK_BYTES + 64 * RUN;
        let dir = tempfile::tempdir().unwrap();
        let names = ShmNames::new(dir.path(), BootId(1));
        let maps = DiskMaps::new(Shm::disk(&names, 5).unwrap().0).unwrap();
        maps.ensure(0..BLOCKS).unwrap();
        assert!(maps.mark(1, 0..BLOCKS));
        names.remove_all();
        let file = Arc::new(tempfile::tempfile_in(dir.path()).unwrap());
        let preserve = Preserve::new(1, file.clone(), 4 << 30);
        let content = |block: u64| vec![(block % 251) as u8; BLOCK_BYTES as usize];
        for first in (0..BLOCKS).step_by(RUN as usize) {
            let run: Vec<u8> = (first..first + RUN).flat_map(content).collect();
            assert_eq!(preserve.save(&maps, 1, first, &run), Ok(()));
        }
        // A loser's copy is dropped, and counted.
        assert_eq!(preserve.save(&maps, 1, 7, &content(8)), Ok(()));
        assert_eq!(preserve.bytes(), (BLOCKS + 1) * BLOCK_BYTES);
        assert!(HELD.load(SeqCst) <= PRESERVED_MEMORY_BYTES_MAX / BLOCK_BYTES);
        assert!(file.metadata().unwrap().len() >= PRESERVED_OFFSET + 64 * RUN * BLOCK_BYTES);
        let mut buffer = content(0);
        for block in 0..BLOCKS {
            assert!(preserve.read(block, &mut buffer));
            assert_eq!(buffer, content(block), "block {block}");
        }
        let held = HELD.load(SeqCst);
        drop(preserve);
        assert!(HELD.load(SeqCst) < held);
    }
}
