//! Preserved blocks (T3, T5): the old content of frozen blocks, saved before it is overwritten.
//!
//! A writer reads the block, then sets *frozen -> preserved* and keeps what it read; a loser drops
//! it. The first copies are kept in memory (see `preserve_memory`). Beyond its limit a writer first
//! writes them to a place of its own in the frozen HRL. No lock is held over I/O: the index is
//! locked around the change of state and the entry only, so that whoever sees *preserved* finds
//! the copy.
//!
//! Guests come first: when a limit is passed, the file system is short of space, or the copy
//! fails, the epoch gives up its cut. Killed: the index is gone, and with it every copy, wherever
//! it was; the next process makes an epoch with preserved blocks give up its cut.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::statvfs::fstatvfs;

use super::map::{BlockState, DiskMaps};
use super::preserve_memory::{Pages, PreserveMemory};
use super::sync::lock;
use crate::base::BLOCK_BYTES;
use crate::base::limits::{IMAGE_FREE_BYTES_MIN, PRESERVE_OPERATION_BYTES_MAX, PRESERVED_PERCENT_MAX};
use crate::format::hrl::PRESERVED_OFFSET;

const SHARDS: usize = 16;
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

/// Where the copy of a block is: the number of its page in memory or, with [`Saved::FILE`], in the
/// HRL. One word, since there can be millions.
#[derive(Clone, Copy)]
struct Saved(u64);

impl Saved {
    const FILE: u64 = 1 << 63;

    fn slot(self) -> Option<u64> {
        (self.0 & Self::FILE != 0).then_some(self.0 & !Self::FILE)
    }
}

type Index = HashMap<u64, Saved>;

/// Preserved blocks of one disk and epoch.
pub(crate) struct Preserve {
    pub(crate) epoch: u64,
    file: Arc<File>,
    memory: Arc<PreserveMemory>,
    pages: Mutex<Pages>,
    /// Room taken in memory, in pages.
    held: AtomicU64,
    /// Copies made or about to be, in memory and in the file, those of losers included.
    copies: AtomicU64,
    copies_max: u64,
    /// Pages of the file given out.
    slots: AtomicU64,
    budget: AtomicI64,
    freed: AtomicBool,
    index: [Mutex<Index>; SHARDS],
}

impl Preserve {
    /// For a disk of `size` bytes. The share has a floor of one operation's limit, so that small
    /// disks can be replicated at all.
    pub(crate) fn new(epoch: u64, file: Arc<File>, memory: Arc<PreserveMemory>, size: u64) -> Self {
        let bytes_max = (size / 100 * PRESERVED_PERCENT_MAX).max(PRESERVE_OPERATION_BYTES_MAX);
        Self {
            epoch,
            file,
            memory,
            pages: Mutex::default(),
            held: AtomicU64::new(0),
            copies: AtomicU64::new(0),
            copies_max: bytes_max / BLOCK_BYTES,
            slots: AtomicU64::new(0),
            budget: AtomicI64::new(0),
            freed: AtomicBool::new(false),
            index: Default::default(),
        }
    }

    fn shard(&self, block: u64) -> &Mutex<Index> {
        &self.index[block as usize % SHARDS]
    }

    /// Bytes saved, those of losers included.
    pub(crate) fn bytes(&self) -> u64 {
        if self.freed.load(SeqCst) { 0 } else { self.copies.load(SeqCst) * BLOCK_BYTES }
    }

    /// Whether copies take room in the file.
    pub(crate) fn is_in_file(&self) -> bool {
        self.slots.load(SeqCst) > 0
    }

    /// Saves `content`, one block after another from block `first` on, for those that are still
    /// frozen in `map`.
    pub(crate) fn save(&self, maps: &DiskMaps, map: usize, first: u64, content: &[u8]) -> Result<(), Limit> {
        let blocks = content.len() as u64 / BLOCK_BYTES;
        // Counted first, so that writers together do not pass the share.
        let copies = self.copies.fetch_add(blocks, SeqCst) + blocks;
        let result = if copies > self.copies_max {
            Err(Limit::Share)
        } else {
            self.save_counted(maps, map, first, content)
        };
        if result.is_err() {
            self.copies.fetch_sub(blocks, SeqCst);
        }
        // Freed meanwhile: the copies may be gone, and the cut has been given up already.
        if self.freed.load(SeqCst) { Err(Limit::Closed) } else { result }
    }

    fn save_counted(&self, maps: &DiskMaps, map: usize, first: u64, content: &[u8]) -> Result<(), Limit> {
        let pages = || (first..).zip(content.chunks_exact(BLOCK_BYTES as usize));
        let kept = pages().take_while(|(block, page)| self.hold(maps, map, *block, page)).count();
        let rest = content.get(kept * BLOCK_BYTES as usize..).unwrap_or_default();
        if rest.is_empty() {
            return Ok(());
        }
        let slots = self.write(rest)?;
        for ((block, _), slot) in pages().skip(kept).zip(slots..) {
            let mut index = lock(self.shard(block));
            index.try_reserve(1).map_err(|_| Limit::Io)?;
            if maps.settle(map, block, BlockState::Preserved).is_ok() {
                index.insert(block, Saved(slot | Saved::FILE));
            }
        }
        Ok(())
    }

    /// Keeps a block in memory, unless another one was first. `false`: there is no room.
    fn hold(&self, maps: &DiskMaps, map: usize, block: u64, page: &[u8]) -> bool {
        let mut index = lock(self.shard(block));
        let mut pages = lock(&self.pages);
        if self.freed.load(SeqCst) || !self.memory.take(&self.held) {
            return false;
        }
        let has_room = pages.has_room() && index.try_reserve(1).is_ok();
        if has_room && maps.settle(map, block, BlockState::Preserved).is_ok() {
            index.insert(block, Saved(pages.push(page)));
        } else {
            self.memory.give_back(&self.held, 1);
        }
        has_room
    }

    /// Writes blocks into the file; the first of their pages.
    fn write(&self, content: &[u8]) -> Result<u64, Limit> {
        let blocks = content.len() as u64 / BLOCK_BYTES;
        self.reserve(blocks)?;
        // A place of its own: nobody else writes to these slots.
        let slot = self.slots.fetch_add(blocks, SeqCst);
        let written = self.file.write_all_at(content, PRESERVED_OFFSET + slot * BLOCK_BYTES);
        if self.freed.load(SeqCst) {
            // Perhaps after the others were freed. Nobody may believe that they are there.
            self.punch(slot, blocks);
            return Err(Limit::Closed);
        }
        written.map(|()| slot).map_err(|_| Limit::Io)
    }

    fn reserve(&self, blocks: u64) -> Result<(), Limit> {
        if self.freed.load(SeqCst) {
            return Err(Limit::Closed);
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

    /// Reads the copy of a preserved block into a buffer of one block. `false`: there is none, or
    /// it cannot be read.
    pub(crate) fn read(&self, block: u64, buffer: &mut [u8]) -> bool {
        let Some(saved) = lock(self.shard(block)).get(&block).copied() else {
            return false;
        };
        if let Some(slot) = saved.slot() {
            return self.file.read_exact_at(buffer, PRESERVED_OFFSET + slot * BLOCK_BYTES).is_ok();
        }
        lock(&self.pages).read(saved.0, buffer)
    }

    /// Nothing is saved any more.
    pub(crate) fn close(&self) {
        self.freed.store(true, SeqCst);
    }

    /// Gives memory back. Closed and given up before: else a copy that is read and believed could go.
    pub(crate) fn free_memory(&self) {
        self.index.iter().for_each(|shard| drop(std::mem::take(&mut *lock(shard))));
        let pages = std::mem::take(&mut *lock(&self.pages));
        self.memory.give_back(&self.held, pages.len());
    }

    /// Gives memory and space back, under the same conditions. Whether there is more space now.
    pub(crate) fn free(&self) -> bool {
        self.free_memory();
        let slots = self.slots.load(SeqCst);
        slots > 0 && self.punch(0, slots)
    }

    fn punch(&self, slot: u64, slots: u64) -> bool {
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let (start, length) = (PRESERVED_OFFSET + slot * BLOCK_BYTES, slots * BLOCK_BYTES);
        fallocate(&self.file, flags, start as i64, length as i64).is_ok()
    }
}

impl Drop for Preserve {
    fn drop(&mut self) {
        self.free_memory();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::BootId;
    use crate::tracker::shm::{Shm, ShmNames};

    const RUN: u64 = 16;
    const BLOCKS: u64 = 40 * RUN;

    fn content(block: u64) -> Vec<u8> {
        vec![(block % 251) as u8; BLOCK_BYTES as usize]
    }

    /// Every block saved in runs, with memory for `held` of them.
    fn saved(held: u64) -> (Preserve, DiskMaps, Arc<PreserveMemory>, Arc<File>) {
        let dir = tempfile::tempdir().unwrap();
        let names = ShmNames::new(dir.path(), BootId(1));
        let maps = DiskMaps::new(Shm::disk(&names, 5).unwrap().0).unwrap();
        names.remove_all();
        maps.ensure(0..BLOCKS).unwrap();
        assert!(maps.mark(1, 0..BLOCKS));
        let file = Arc::new(tempfile::tempfile_in(dir.path()).unwrap());
        let memory = Arc::new(PreserveMemory::new(2 * held * BLOCK_BYTES));
        let preserve = Preserve::new(1, file.clone(), memory.clone(), 1 << 20);
        for first in (0..BLOCKS).step_by(RUN as usize) {
            let run: Vec<u8> = (first..first + RUN).flat_map(content).collect();
            assert_eq!(preserve.save(&maps, 1, first, &run), Ok(()));
        }
        (preserve, maps, memory, file)
    }

    fn assert_readable(preserve: &Preserve) {
        let mut buffer = content(0);
        for block in 0..BLOCKS {
            assert!(preserve.read(block, &mut buffer));
            assert_eq!(buffer, content(block), "block {block}");
        }
    }

    /// Copies in memory up to the limit, the rest in the file, none mixed up; memory is given back.
    #[test]
    fn what_memory_does_not_hold_is_in_the_file() {
        for held in [0, 1, 20 * RUN + 5, 2 * BLOCKS] {
            let (preserve, maps, memory, file) = saved(held);
            assert_readable(&preserve);
            // A loser's copy is dropped.
            assert_eq!(preserve.save(&maps, 1, 7, &content(8)), Ok(()));
            assert_readable(&preserve);
            assert_eq!(preserve.bytes(), (BLOCKS + 1) * BLOCK_BYTES);
            let in_memory = preserve.held.load(SeqCst);
            assert_eq!(in_memory, held.min(BLOCKS));
            assert_eq!(preserve.is_in_file(), in_memory < BLOCKS);
            assert_eq!(file.metadata().unwrap().len() > PRESERVED_OFFSET, in_memory < BLOCKS);
            preserve.close();
            assert_eq!(preserve.save(&maps, 1, 9, &content(9)), Err(Limit::Closed));
            assert_eq!(preserve.free(), in_memory < BLOCKS);
            assert!(memory.is_unused());
            assert!(!preserve.read(0, &mut content(0)), "given up: whoever asks hears of it");
            let (preserve, _, memory, _) = saved(held);
            drop(preserve);
            assert!(memory.is_unused(), "acknowledged");
        }
    }

    /// The share counts wherever the copies are, and what was refused is not counted.
    #[test]
    fn the_share_ends_memory_and_file() {
        for held in [0, 1 << 20] {
            let (preserve, maps, ..) = saved(held);
            let left = PRESERVE_OPERATION_BYTES_MAX / BLOCK_BYTES - BLOCKS;
            let run = vec![0; (left * BLOCK_BYTES) as usize];
            assert_eq!(preserve.save(&maps, 1, 0, &[&run[..], &content(1)].concat()), Err(Limit::Share));
            assert_eq!(preserve.bytes(), BLOCKS * BLOCK_BYTES);
            assert_eq!(preserve.save(&maps, 1, 0, &run), Ok(()), "what just fits");
        }
    }
}
