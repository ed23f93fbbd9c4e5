//! Block maps: 2 bits a block, three maps in turn per disk (T2), in shared memory.
//!
//! Two levels: chunks of 64 MiB of disk, whose pages are allocated before the first mark, and a
//! summary of the chunks that have marks, which belongs to the process and is made again from the
//! chunks when one starts. A cost is paid per chunk written to, never per byte of the disk.

use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use nix::errno::Errno;

use super::shm::{CHUNKS_MAX, Shm, zeroed_words};
use super::sync::{Word, lock};
use crate::base::{CHUNK_BLOCKS, ExtentSet, Result};
use crate::format::hrl::CHUNK_WORDS;

/// Blocks in one 64-bit word of a map.
const WORD_BLOCKS: u64 = 32;
/// The lower bit of each pair.
const LOW: u64 = 0x5555_5555_5555_5555;

/// State of a block in a map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BlockState {
    /// Not changed in the epoch.
    Clean = 0,
    /// Changed; in a frozen epoch: not read yet.
    Marked = 1,
    /// The shipper has read it.
    Read = 2,
    /// A writer has saved its content.
    Preserved = 3,
}

impl BlockState {
    fn of(bits: u64) -> Self {
        match bits & 3 {
            0 => Self::Clean,
            1 => Self::Marked,
            2 => Self::Read,
            _ => Self::Preserved,
        }
    }
}

/// Bits of blocks `range` (within the word).
fn mask(range: Range<u64>) -> u64 {
    let upto = |n: u64| if n >= WORD_BLOCKS { u64::MAX } else { (1u64 << (2 * n)) - 1 };
    upto(range.end) & !upto(range.start)
}

/// Words that hold `blocks`, with the bits of each.
fn masks(blocks: Range<u64>) -> impl Iterator<Item = (usize, u64)> {
    let words = blocks.start / WORD_BLOCKS..blocks.end.div_ceil(WORD_BLOCKS);
    words.map(move |w| {
        let first = w * WORD_BLOCKS;
        (w as usize, mask(blocks.start.max(first) - first..(blocks.end - first).min(WORD_BLOCKS)))
    })
}

/// Marks blocks (numbers within the chunk). Only in the map of the current epoch, whose blocks
/// are clean or marked: so an OR is enough, and marking twice changes nothing.
#[inline]
pub(crate) fn mark<W: Word>(words: &[W], blocks: Range<u64>) {
    for (index, bits) in masks(blocks) {
        let Some(word) = words.get(index) else { return };
        let wanted = bits & LOW;
        if word.load() & wanted != wanted {
            word.or(wanted);
        }
    }
}

/// State of a block (number within the chunk).
#[inline]
pub(crate) fn state<W: Word>(words: &[W], block: u64) -> BlockState {
    let word = words.get((block / WORD_BLOCKS) as usize).map_or(0, Word::load);
    BlockState::of(word >> (2 * (block % WORD_BLOCKS)))
}

/// T3: *marked -> read* or *marked -> preserved*, whichever comes first. `Err`: the state that
/// the block has instead.
pub(crate) fn settle<W: Word>(
    words: &[W],
    block: u64,
    to: BlockState,
) -> std::result::Result<(), BlockState> {
    let Some(word) = words.get((block / WORD_BLOCKS) as usize) else { return Err(BlockState::Clean) };
    let shift = 2 * (block % WORD_BLOCKS);
    let mut seen = word.load();
    loop {
        match BlockState::of(seen >> shift) {
            BlockState::Marked => {}
            other => return Err(other),
        }
        let new = seen & !(3 << shift) | (to as u64) << shift;
        match word.exchange(seen, new) {
            Ok(_) => return Ok(()),
            Err(now) => seen = now,
        }
    }
}

/// Splits blocks of the disk into chunks: (chunk, blocks within it).
pub(crate) fn by_chunk(blocks: Range<u64>) -> impl Iterator<Item = (u64, Range<u64>)> {
    let chunks = blocks.start / CHUNK_BLOCKS..blocks.end.div_ceil(CHUNK_BLOCKS);
    chunks.map(move |c| {
        let first = c * CHUNK_BLOCKS;
        (c, blocks.start.max(first) - first..(blocks.end - first).min(CHUNK_BLOCKS))
    })
}

/// A bitmap of the process, zero at first; pages never touched cost nothing.
pub(crate) fn bitmap(bits: u64) -> Box<[AtomicU64]> {
    zeroed_words(bits.div_ceil(64) as usize)
}

/// Sets bit `bit`; returns whether it was clear.
#[inline]
pub(crate) fn set_bit(bits: &[AtomicU64], bit: u64) -> bool {
    let Some(word) = bits.get((bit / 64) as usize) else { return false };
    let wanted = 1 << (bit % 64);
    word.load(SeqCst) & wanted == 0 && word.fetch_or(wanted, SeqCst) & wanted == 0
}

/// Clears bit `bit`.
pub(crate) fn clear_bit(bits: &[AtomicU64], bit: u64) {
    if let Some(word) = bits.get((bit / 64) as usize) {
        word.fetch_and(!(1 << (bit % 64)), SeqCst);
    }
}

/// Whether bit `bit` is set.
#[inline]
pub(crate) fn has_bit(bits: &[AtomicU64], bit: u64) -> bool {
    bits.get((bit / 64) as usize).is_some_and(|w| w.load(SeqCst) >> (bit % 64) & 1 == 1)
}

/// The set bits below `end`, in order.
pub(crate) fn bits_set(bits: &[AtomicU64], end: u64) -> impl Iterator<Item = u64> + '_ {
    let words = bits.get(..(end.div_ceil(64) as usize).min(bits.len())).unwrap_or(&[]);
    words.iter().enumerate().flat_map(move |(index, word)| {
        let mut rest = word.load(SeqCst);
        std::iter::from_fn(move || {
            let bit = (rest != 0).then(|| rest.trailing_zeros())?;
            rest &= rest - 1;
            Some(index as u64 * 64 + u64::from(bit))
        })
    })
}

/// The three maps of a disk.
pub(crate) struct DiskMaps {
    shm: Shm,
    /// Chunks whose pages are there.
    ready: Box<[AtomicU64]>,
    /// Per map: chunks that have marks.
    summary: [Box<[AtomicU64]>; 3],
    /// One past the last chunk that was made ready.
    end: AtomicU64,
    making: Mutex<()>,
}

impl DiskMaps {
    /// Takes over an object, new or found.
    pub(crate) fn new(shm: Shm) -> Result<Self> {
        let maps = Self {
            shm,
            ready: bitmap(CHUNKS_MAX),
            summary: [bitmap(CHUNKS_MAX), bitmap(CHUNKS_MAX), bitmap(CHUNKS_MAX)],
            end: AtomicU64::new(0),
            making: Mutex::new(()),
        };
        for range in maps.shm.allocated() {
            maps.make_ready(range.clone()).map_err(|e| {
                crate::base::Error::io("no room in shared memory for the block maps", e.into())
            })?;
            for chunk in range {
                for map in 0..3 {
                    if maps.shm.chunk(map, chunk).iter().any(|w| w.load(SeqCst) != 0) {
                        set_bit(&maps.summary[map], chunk);
                    }
                }
            }
        }
        Ok(maps)
    }

    pub(crate) fn shm(&self) -> &Shm {
        &self.shm
    }

    /// Makes sure that blocks can be marked: before step 2, because it may have to allocate.
    #[inline]
    pub(crate) fn ensure(&self, blocks: Range<u64>) -> std::result::Result<(), Errno> {
        let chunks = blocks.start / CHUNK_BLOCKS..blocks.end.div_ceil(CHUNK_BLOCKS);
        if chunks.clone().all(|c| has_bit(&self.ready, c)) {
            return Ok(());
        }
        if chunks.end > CHUNKS_MAX {
            return Err(Errno::EFBIG);
        }
        self.make_ready(chunks)
    }

    fn make_ready(&self, chunks: Range<u64>) -> std::result::Result<(), Errno> {
        let _one_at_a_time = lock(&self.making);
        self.shm.allocate(chunks.clone())?;
        self.end.fetch_max(chunks.end, SeqCst);
        chunks.for_each(|c| {
            set_bit(&self.ready, c);
        });
        Ok(())
    }

    fn words(&self, map: usize, chunk: u64) -> Option<&[AtomicU64]> {
        has_bit(&self.ready, chunk).then(|| self.shm.chunk(map, chunk))
    }

    /// Marks blocks; `false`: one of their chunks is not ready, and only the others were marked.
    #[inline]
    pub(crate) fn mark(&self, map: usize, blocks: Range<u64>) -> bool {
        by_chunk(blocks).fold(true, |all, (chunk, within)| match self.words(map, chunk) {
            Some(words) => {
                set_bit(&self.summary[map], chunk);
                mark(words, within);
                all
            }
            None => false,
        })
    }

    /// State of a block.
    pub(crate) fn state(&self, map: usize, block: u64) -> BlockState {
        self.words(map, block / CHUNK_BLOCKS).map_or(BlockState::Clean, |w| state(w, block % CHUNK_BLOCKS))
    }

    /// T3, see [`settle`].
    pub(crate) fn settle(
        &self,
        map: usize,
        block: u64,
        to: BlockState,
    ) -> std::result::Result<(), BlockState> {
        let words = self.words(map, block / CHUNK_BLOCKS).ok_or(BlockState::Clean)?;
        settle(words, block % CHUNK_BLOCKS, to)
    }

    /// Whether nothing is marked in a map.
    pub(crate) fn is_empty(&self, map: usize) -> bool {
        self.marked_chunks(map).next().is_none()
    }

    /// Chunks with marks, in order.
    pub(crate) fn marked_chunks(&self, map: usize) -> impl Iterator<Item = u64> + '_ {
        bits_set(&self.summary[map], self.end.load(SeqCst))
    }

    /// Blocks of a map that are not clean, as bits of one chunk.
    pub(crate) fn chunk_bits(&self, map: usize, chunk: u64) -> [u64; CHUNK_WORDS] {
        let mut bits = [0u64; CHUNK_WORDS];
        for (index, word) in self.words(map, chunk).unwrap_or(&[]).iter().enumerate() {
            let pairs = word.load(SeqCst);
            let half = squeeze((pairs | pairs >> 1) & LOW);
            if let Some(target) = bits.get_mut(index / 2) {
                *target |= half << (32 * (index % 2));
            }
        }
        bits
    }

    /// Number of blocks of a map that are not clean.
    pub(crate) fn count(&self, map: usize) -> u64 {
        let of_word = |w: &AtomicU64| {
            let pairs = w.load(SeqCst);
            u64::from(((pairs | pairs >> 1) & LOW).count_ones())
        };
        self.marked_chunks(map)
            .map(|c| self.words(map, c).unwrap_or(&[]).iter().map(of_word).sum::<u64>())
            .sum()
    }

    /// Number of blocks of the range that are marked and neither read nor preserved; stops
    /// counting soon after `enough`.
    pub(crate) fn count_frozen(&self, map: usize, blocks: Range<u64>, enough: u64) -> u64 {
        let mut count = 0;
        for (chunk, within) in by_chunk(blocks) {
            if !has_bit(&self.summary[map], chunk) {
                continue;
            }
            for (index, bits) in masks(within) {
                let Some(word) = self.words(map, chunk).and_then(|w| w.get(index)) else { continue };
                let pairs = word.load(SeqCst) & bits;
                count += u64::from((pairs & !(pairs >> 1) & LOW).count_ones());
            }
            if count > enough {
                break;
            }
        }
        count
    }

    /// Whether the summary says that a chunk of these blocks may have marks.
    #[inline]
    pub(crate) fn may_have(&self, map: usize, blocks: Range<u64>) -> bool {
        (blocks.start / CHUNK_BLOCKS..blocks.end.div_ceil(CHUNK_BLOCKS))
            .any(|c| has_bit(&self.summary[map], c))
    }

    /// All blocks of a map that are not clean.
    pub(crate) fn blocks(&self, map: usize) -> ExtentSet {
        let mut set = ExtentSet::new();
        for chunk in self.marked_chunks(map) {
            let base = chunk * CHUNK_BLOCKS;
            let mut run: Option<Range<u64>> = None;
            for (index, word) in self.chunk_bits(map, chunk).into_iter().enumerate() {
                let mut rest = word;
                while rest != 0 {
                    let bit = u64::from(rest.trailing_zeros());
                    let ones = u64::from((rest >> bit).trailing_ones());
                    let start = base + index as u64 * 64 + bit;
                    match &mut run {
                        Some(r) if r.end == start => r.end += ones,
                        other => {
                            other.replace(start..start + ones).into_iter().for_each(|r| set.insert(r));
                        }
                    }
                    rest = if bit + ones >= 64 { 0 } else { rest >> (bit + ones) << (bit + ones) };
                }
            }
            run.into_iter().for_each(|r| set.insert(r));
        }
        set
    }

    /// Whether any block of the map has this state.
    pub(crate) fn has_state(&self, map: usize, wanted: BlockState) -> bool {
        self.marked_chunks(map)
            .any(|c| (0..CHUNK_BLOCKS).any(|b| self.words(map, c).is_some_and(|w| state(w, b) == wanted)))
    }

    /// Forgets every mark of a map. Nobody marks in it any more; a late writer that would
    /// preserve for it finds its blocks clean.
    pub(crate) fn clear(&self, map: usize) {
        for chunk in self.marked_chunks(map).collect::<Vec<_>>() {
            self.words(map, chunk).unwrap_or(&[]).iter().for_each(|w| w.store(0, SeqCst));
            clear_bit(&self.summary[map], chunk);
        }
    }
}

/// Moves the even bits of a word together: bit 2n to bit n.
fn squeeze(mut x: u64) -> u64 {
    x &= LOW;
    for (shift, keep) in [
        (1, 0x3333_3333_3333_3333),
        (2, 0x0f0f_0f0f_0f0f_0f0f),
        (4, 0x00ff_00ff_00ff_00ff),
        (8, 0x0000_ffff_0000_ffff),
        (16, 0x0000_0000_ffff_ffff),
    ] {
        x = (x | x >> shift) & keep;
    }
    x
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::BootId;
    use crate::tracker::shm::ShmNames;
    use proptest::prelude::*;

    struct Clean(ShmNames);
    impl Drop for Clean {
        fn drop(&mut self) {
            self.0.remove_all();
        }
    }

    fn ranges() -> impl Strategy<Value = Vec<(u64, u64)>> {
        prop::collection::vec((0u64..70_000, 1u64..900), 1..12)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        /// The maps against the slow obvious twin, and against themselves taken over by another
        /// process.
        #[test]
        fn equals_a_set(ranges in ranges(), far in 0u64..1000) {
            let dir = tempfile::tempdir().unwrap();
            let names = ShmNames::new(dir.path(), BootId(1));
            let _clean = Clean(names.clone());
            let maps = DiskMaps::new(Shm::disk(&names, 5).unwrap().0).unwrap();
            let mut twin = ExtentSet::new();
            for (start, length) in ranges {
                let range = start + far * 1_000_000..start + far * 1_000_000 + length;
                prop_assert!(maps.ensure(range.clone()).is_ok());
                prop_assert!(maps.mark(1, range.clone()));
                twin.insert(range);
            }
            let first = twin.iter().next().unwrap().start;
            prop_assert_eq!(maps.settle(1, first, BlockState::Read), Ok(()));
            prop_assert_eq!(maps.settle(1, first, BlockState::Preserved), Err(BlockState::Read));
            drop(maps);
            let (shm, found) = Shm::disk(&names, 5).unwrap();
            prop_assert!(found);
            let maps = DiskMaps::new(shm).unwrap();
            prop_assert_eq!(maps.blocks(1), twin.clone());
            prop_assert_eq!(maps.count(1), twin.total());
            prop_assert_eq!(maps.count_frozen(1, 0..u64::from(u32::MAX), u64::MAX), twin.total() - 1);
            prop_assert_eq!(maps.state(1, first), BlockState::Read);
            prop_assert!(maps.is_empty(0) && maps.is_empty(2));
            maps.clear(1);
            prop_assert!(maps.is_empty(1));
            prop_assert_eq!(maps.count(1), 0);
        }
    }

    #[test]
    fn squeezes_even_bits() {
        assert_eq!(squeeze(LOW), 0xffff_ffff);
        assert_eq!(squeeze(1 << 62), 1 << 31);
        assert_eq!(squeeze(0b0100_0001), 0b1001);
    }
}
