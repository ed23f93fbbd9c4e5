//! Memory for preserved blocks: one limit for the process, pages that are only appended.
//!
//! A copy in the HRL stands behind whatever its file system syncs at the time, and the guest's
//! write with it; a copy in memory stands behind nothing. So the first copies are kept here.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use crate::base::BLOCK_BYTES;

/// Bytes asked of the allocator at once: what is that large goes back to the kernel when it is
/// freed (`filter::sys::return_large_buffers`), and takes memory only as it is filled.
const SLAB_BYTES: usize = 256 << 10;

/// The limit, and how much of it is taken, in blocks.
pub(crate) struct PreserveMemory {
    blocks_max: u64,
    taken: AtomicU64,
}

impl PreserveMemory {
    /// For `bytes` of all disks together; with 0 every copy goes into an HRL.
    pub(crate) fn new(bytes: u64) -> Self {
        Self { blocks_max: bytes / BLOCK_BYTES, taken: AtomicU64::new(0) }
    }

    /// Takes room for one block for the store that has `held` of them. `false`: there is none.
    ///
    /// A store has at most as much as it leaves to others: one whose vault is away for hours
    /// takes half of the memory, and `n` busy ones settle at one part in `n + 1` each.
    pub(crate) fn take(&self, held: &AtomicU64) -> bool {
        let own = held.fetch_add(1, SeqCst) + 1;
        let all = self.taken.fetch_add(1, SeqCst) + 1;
        let fits = own + all <= self.blocks_max;
        if !fits {
            self.give_back(held, 1);
        }
        fits
    }

    /// Whether nothing is taken.
    #[cfg(test)]
    pub(crate) fn is_unused(&self) -> bool {
        self.taken.load(SeqCst) == 0
    }

    /// Gives back room for `blocks`.
    pub(crate) fn give_back(&self, held: &AtomicU64, blocks: u64) {
        self.taken.fetch_sub(blocks, SeqCst);
        held.fetch_sub(blocks, SeqCst);
    }
}

/// Pages in memory, numbered in the order they came.
#[derive(Default)]
pub(crate) struct Pages {
    slabs: Vec<Vec<u8>>,
}

impl Pages {
    /// Whether one more fits, by an allocation if need be. `false`: the allocator has none.
    pub(crate) fn has_room(&mut self) -> bool {
        if self.slabs.last().is_some_and(|s| s.len() < SLAB_BYTES) {
            return true;
        }
        let mut slab = Vec::new();
        let fits = slab.try_reserve_exact(SLAB_BYTES).is_ok() && self.slabs.try_reserve(1).is_ok();
        if fits {
            self.slabs.push(slab);
        }
        fits
    }

    /// Appends the content of a block, for which there is room. Its number.
    pub(crate) fn push(&mut self, content: &[u8]) -> u64 {
        let number = self.len();
        if let Some(slab) = self.slabs.last_mut() {
            slab.extend_from_slice(content);
        }
        number
    }

    /// Number of pages.
    pub(crate) fn len(&self) -> u64 {
        let full = self.slabs.len().saturating_sub(1) * SLAB_BYTES;
        (full + self.slabs.last().map_or(0, Vec::len)) as u64 / BLOCK_BYTES
    }

    /// Reads the content of a block, by its number, into a buffer of one block. `false`: there is
    /// none.
    pub(crate) fn read(&self, number: u64, buffer: &mut [u8]) -> bool {
        let per_slab = SLAB_BYTES as u64 / BLOCK_BYTES;
        let start = (number % per_slab * BLOCK_BYTES) as usize;
        let slab = self.slabs.get((number / per_slab) as usize);
        let page = slab.and_then(|s| s.get(start..start + buffer.len()));
        if let Some(page) = page {
            buffer.copy_from_slice(page);
        }
        page.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_leaves_as_much_as_it_has() {
        let memory = PreserveMemory::new(100 * BLOCK_BYTES);
        let stores = [AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0)];
        let fill = |held: &AtomicU64| while memory.take(held) {};
        fill(&stores[0]);
        assert_eq!(stores[0].load(SeqCst), 50);
        fill(&stores[1]);
        assert_eq!(stores[1].load(SeqCst), 25);
        memory.give_back(&stores[0], 50);
        fill(&stores[2]);
        assert_eq!(stores[2].load(SeqCst), 37);
        assert!(!PreserveMemory::new(0).take(&stores[0]));
        assert_eq!(stores[0].load(SeqCst), 0);
    }

    #[test]
    fn pages_keep_their_numbers() {
        let mut pages = Pages::default();
        let content = |n: u64| vec![(n % 251) as u8; BLOCK_BYTES as usize];
        let count = 2 * SLAB_BYTES as u64 / BLOCK_BYTES + 3;
        for n in 0..count {
            assert!(pages.has_room());
            assert_eq!(pages.push(&content(n)), n);
        }
        let mut buffer = content(0);
        assert!((0..count).all(|n| pages.read(n, &mut buffer) && buffer == content(n)));
        assert!(!pages.read(count, &mut buffer));
    }
}
