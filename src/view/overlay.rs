//! The overlay of one disk of a clone: what the clone has written, over what its point has.
//!
//! Unit is the 4 KiB block. A block is either the point's (its bit is clear) or the overlay's
//! (set): a write to part of a block first takes the rest of it from the point. Bits are set
//! after the data of their block is in the data file, so a bit never shows what is not there.
//!
//! Invariants, for a block whose bit is set: its bytes beyond the size of the disk are zeros. For
//! one whose bit is clear: the data file may hold anything there, and nobody looks. The point is
//! seen only below `base_limit`, which falls with every truncation and never rises.
//!
//! One change at a time per disk (the kernel serializes them as well); reads go beside.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Whence, lseek64};

use super::reading::{fill, next_hole};
use crate::base::error::Context;
use crate::base::limits::DISK_BYTES_MAX;
use crate::base::units::blocks_touched;
use crate::base::{BLOCK_BYTES, Error, Result, Timestamp};
use crate::core::ports::points::PointReader;
use crate::format::overlay::OverlayHeader;

/// Words of 64 bits in one page of the bitmap.
const PAGE_WORDS: usize = 512;
/// Blocks that one page of the bitmap covers.
const PAGE_BLOCKS: u64 = PAGE_WORDS as u64 * 64;
/// Zeros written at once where a hole cannot be punched, in bytes.
const ZEROS_BYTES: usize = 1 << 16;

/// A bitmap of blocks in pages, made when first needed.
#[derive(Default)]
pub(super) struct Bits {
    pages: BTreeMap<u64, Box<[u64; PAGE_WORDS]>>,
}

impl Bits {
    fn word(&self, block: u64) -> u64 {
        let index = usize::try_from(block % PAGE_BLOCKS / 64).unwrap_or(0);
        self.pages.get(&(block / PAGE_BLOCKS)).and_then(|page| page.get(index)).copied().unwrap_or(0)
    }

    /// Whether `block` is in the set.
    pub(super) fn get(&self, block: u64) -> bool {
        self.word(block) >> (block % 64) & 1 == 1
    }

    /// Adds blocks. Returns the pages that have changed.
    fn set(&mut self, blocks: Range<u64>) -> BTreeSet<u64> {
        let mut changed = BTreeSet::new();
        for block in blocks {
            if self.get(block) {
                continue;
            }
            let page = self.pages.entry(block / PAGE_BLOCKS).or_insert_with(|| Box::new([0; PAGE_WORDS]));
            let index = usize::try_from(block % PAGE_BLOCKS / 64).unwrap_or(0);
            if let Some(word) = page.get_mut(index) {
                *word |= 1 << (block % 64);
                changed.insert(block / PAGE_BLOCKS);
            }
        }
        changed
    }

    /// Takes out every block from `first` on. Returns the pages that have changed.
    pub(super) fn clear_from(&mut self, first: u64) -> BTreeSet<u64> {
        let mut changed = BTreeSet::new();
        for (&number, page) in self.pages.range_mut(first / PAGE_BLOCKS..) {
            for (index, word) in page.iter_mut().enumerate() {
                let start = number * PAGE_BLOCKS + index as u64 * 64;
                let kept = match first.saturating_sub(start) {
                    0 => 0,
                    n if n >= 64 => u64::MAX,
                    n => (1u64 << n) - 1,
                };
                if *word & !kept != 0 {
                    *word &= kept;
                    changed.insert(number);
                }
            }
        }
        changed
    }

    /// The end of the run of equal bits that begins at `block`, at most `limit`.
    fn run_end(&self, block: u64, limit: u64) -> u64 {
        let wanted = self.get(block);
        let mut at = block;
        while at < limit {
            if !wanted && !self.pages.contains_key(&(at / PAGE_BLOCKS)) {
                // No page: nothing is set up to the next one there is.
                let next = self.pages.range(at / PAGE_BLOCKS..).next().map(|(page, _)| page * PAGE_BLOCKS);
                at = next.unwrap_or(limit);
                continue;
            }
            let word = self.word(at) >> (at % 64);
            let same = match wanted {
                true => (!word).trailing_zeros(),
                false => word.trailing_zeros(),
            };
            let left = 64 - at % 64;
            at += u64::from(same).min(left);
            if u64::from(same) < left {
                break;
            }
        }
        at.min(limit)
    }

    /// Page `number` as the map file has it.
    pub(super) fn page(&self, number: u64) -> Vec<u8> {
        match self.pages.get(&number) {
            Some(page) => page.iter().flat_map(|word| word.to_le_bytes()).collect(),
            None => vec![0; PAGE_WORDS * 8],
        }
    }

    /// Takes over a page as the map file has it.
    pub(super) fn set_page(&mut self, number: u64, bytes: &[u8]) {
        let mut page = Box::new([0u64; PAGE_WORDS]);
        for (word, chunk) in page.iter_mut().zip(bytes.chunks(8)) {
            *word = chunk.try_into().map_or(0, u64::from_le_bytes);
        }
        if page.iter().any(|word| *word != 0) {
            self.pages.insert(number, page);
        }
    }
}

/// What changes while a clone is in use.
pub(super) struct State {
    /// Size, base limit, owner.
    pub header: OverlayHeader,
    /// Blocks of the overlay.
    pub bits: Bits,
    /// Pages of the bitmap that the map file does not have yet.
    pub dirty: BTreeSet<u64>,
    /// Whether the header in the map file is old.
    pub is_header_dirty: bool,
}

/// One disk of a clone.
pub(super) struct OverlayDisk {
    pub(super) reader: Arc<dyn PointReader>,
    /// Number of the disk in its point.
    pub(super) number: usize,
    pub(super) data: File,
    pub(super) map: File,
    pub(super) state: RwLock<State>,
    /// Held over a change.
    pub(super) changing: Mutex<()>,
    /// Held over a sync, inside `changing` where both are.
    pub(super) syncing: Mutex<()>,
    /// A sync has failed: what the kernel dropped is unknown, so nothing is acknowledged any more.
    pub(super) has_failed: AtomicBool,
}

fn errno(what: &str, errno: Errno) -> Error {
    Error::io(what, errno.into())
}

impl OverlayDisk {
    pub(super) fn read_state(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn write_state(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The header as it is now.
    pub(super) fn header(&self) -> OverlayHeader {
        self.read_state().header
    }

    /// Up to `length` bytes at `offset`, fewer only at the end of the disk.
    pub(super) fn read(&self, offset: u64, length: usize) -> Result<Vec<u8>> {
        let (end, base_limit, runs) = {
            let state = self.read_state();
            let end = offset.saturating_add(length as u64).min(state.header.size);
            let mut runs = Vec::new();
            let mut at = offset;
            while at < end {
                let block = at / BLOCK_BYTES;
                let run_end = state.bits.run_end(block, end.div_ceil(BLOCK_BYTES)) * BLOCK_BYTES;
                runs.push((state.bits.get(block), at..run_end.min(end)));
                at = run_end;
            }
            (end, state.header.base_limit, runs)
        };
        let mut buffer = vec![0; usize::try_from(end.saturating_sub(offset)).unwrap_or(0)];
        for (is_ours, run) in runs {
            let place = index(run.start, offset)..index(run.end, offset);
            let part = buffer.get_mut(place).unwrap_or_default();
            match is_ours {
                true => self.read_ours(run.start, part)?,
                false => self.read_base(run.start, base_limit, part)?,
            }
        }
        Ok(buffer)
    }

    /// Fills from the data file; beyond its end are zeros.
    fn read_ours(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let mut filled = 0;
        while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match self.data.read_at(rest, offset + filled as u64) {
                Ok(0) => {
                    rest.fill(0);
                    break;
                }
                Ok(n) => filled += n,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(Error::io("the overlay cannot be read", e)),
            }
        }
        Ok(())
    }

    /// Fills from the point as far as it is seen; the rest stays as it is, zeros.
    fn read_base(&self, offset: u64, base_limit: u64, buffer: &mut [u8]) -> Result<()> {
        let seen = index(base_limit, offset).min(buffer.len());
        let part = buffer.get_mut(..seen).unwrap_or_default();
        fill(self.reader.as_ref(), self.number, offset, part).map(|_| ())
    }

    /// Writes. ENOSPC leaves what was there, except that blocks that were the overlay's already
    /// may hold a part of the new bytes, as on any disk.
    pub(super) fn write(&self, offset: u64, bytes: &[u8], now: Timestamp) -> Result<()> {
        let changing = self.change()?;
        self.write_locked(&changing, offset, bytes, now)
    }

    fn change(&self) -> Result<MutexGuard<'_, ()>> {
        let changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        self.verify_good()?;
        Ok(changing)
    }

    fn write_locked(&self, _: &MutexGuard<'_, ()>, offset: u64, bytes: &[u8], now: Timestamp) -> Result<()> {
        let end = end_of(offset, bytes.len() as u64)?;
        let blocks = blocks_touched(offset, bytes.len() as u64);
        let (head, tail, base_limit) = {
            let state = self.read_state();
            let first = blocks.start * BLOCK_BYTES;
            let last = blocks.end * BLOCK_BYTES;
            let head = if state.bits.get(blocks.start) { offset } else { first };
            let last_block = blocks.end.saturating_sub(1);
            let tail = if state.bits.get(last_block) { end } else { last };
            (head, tail, state.header.base_limit)
        };
        let what = || "the overlay cannot be written";
        if head == offset && tail == end {
            self.data.write_all_at(bytes, offset).context(what)?;
        } else {
            // The rest of a block that was the point's comes from the point (copy on write).
            let mut whole = vec![0; index(tail, head)];
            self.read_base(head, base_limit, whole.get_mut(..index(offset, head)).unwrap_or_default())?;
            self.read_base(end, base_limit, whole.get_mut(index(end, head)..).unwrap_or_default())?;
            let middle = whole.get_mut(index(offset, head)..index(end, head)).unwrap_or_default();
            middle.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
            self.data.write_all_at(&whole, head).context(what)?;
        }
        let mut state = self.write_state();
        let changed = state.bits.set(blocks);
        state.dirty.extend(changed);
        state.header.mtime_ms = now.0;
        if end > state.header.size {
            state.header.size = end;
            state.is_header_dirty = true;
        }
        Ok(())
    }

    /// Makes a range zeros: PUNCH_HOLE (`keep_size`) and ZERO_RANGE. Without `keep_size` the disk
    /// grows to hold the range.
    pub(super) fn zero(&self, offset: u64, length: u64, keep_size: bool, now: Timestamp) -> Result<()> {
        let changing = self.change()?;
        let mut end = end_of(offset, length)?;
        let size = self.header().size;
        if keep_size {
            end = end.min(size);
        } else if end > size {
            self.grow(end);
        }
        if offset >= end {
            return Ok(());
        }
        let size = self.header().size;
        let first = offset.div_ceil(BLOCK_BYTES);
        // The block that the disk ends in counts as whole.
        let last = if end >= size { end.div_ceil(BLOCK_BYTES) } else { end / BLOCK_BYTES };
        if first >= last {
            return self.write_zeros(&changing, offset..end, now);
        }
        self.write_zeros(&changing, offset..first * BLOCK_BYTES, now)?;
        self.write_zeros(&changing, (last * BLOCK_BYTES).min(end)..end, now)?;
        self.zero_blocks(first..last)?;
        self.write_state().header.mtime_ms = now.0;
        Ok(())
    }

    fn write_zeros(&self, changing: &MutexGuard<'_, ()>, range: Range<u64>, now: Timestamp) -> Result<()> {
        match range.is_empty() {
            true => Ok(()),
            false => self.write_locked(changing, range.start, &vec![0; index(range.end, range.start)], now),
        }
    }

    /// Whole blocks become zeros. Bits are set only where the point would show data, so that
    /// discarding an empty disk costs nothing.
    fn zero_blocks(&self, blocks: Range<u64>) -> Result<()> {
        let base_limit = self.header().base_limit;
        let mut at = blocks.start;
        while at < blocks.end {
            let (is_ours, end) = {
                let state = self.read_state();
                (state.bits.get(at), state.bits.run_end(at, blocks.end))
            };
            if is_ours {
                self.punch(at * BLOCK_BYTES..end * BLOCK_BYTES)?;
            } else {
                self.hide_base(at..end, base_limit)?;
            }
            at = end;
        }
        Ok(())
    }

    /// Blocks of the point become zeros of the overlay.
    fn hide_base(&self, blocks: Range<u64>, base_limit: u64) -> Result<()> {
        let end = (blocks.end * BLOCK_BYTES).min(base_limit);
        let mut at = blocks.start * BLOCK_BYTES;
        while at < end {
            let Some(run) = self.reader.next_data(self.number, at)? else { break };
            let start = run.offset.max(at);
            if start >= end || run.end() <= at {
                break;
            }
            let touched = blocks_touched(start, run.end().min(end) - start);
            // First the zeros, then the bits: what lies in the data file there may be anything.
            self.punch(touched.start * BLOCK_BYTES..touched.end * BLOCK_BYTES)?;
            at = touched.end * BLOCK_BYTES;
            let mut state = self.write_state();
            let changed = state.bits.set(touched);
            state.dirty.extend(changed);
        }
        Ok(())
    }

    /// Zeros in the data file, as a hole where its file system can.
    fn punch(&self, range: Range<u64>) -> Result<()> {
        let what = || "the overlay cannot be written";
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let (offset, length) = (signed(range.start)?, signed(range.end - range.start)?);
        match fallocate(self.data.as_fd(), mode, offset, length) {
            Err(Errno::EOPNOTSUPP) => {
                let zeros = vec![0; ZEROS_BYTES];
                let mut at = range.start;
                while at < range.end {
                    let part = zeros.get(..index(range.end, at).min(ZEROS_BYTES)).unwrap_or_default();
                    self.data.write_all_at(part, at).context(what)?;
                    at += part.len() as u64;
                }
                Ok(())
            }
            other => other.context(what),
        }
    }

    /// fallocate without a mode: grows the disk. Room is not set aside, the overlay is sparse.
    pub(super) fn allocate(&self, offset: u64, length: u64, keep_size: bool) -> Result<()> {
        let _changing = self.change()?;
        let end = end_of(offset, length)?;
        if !keep_size && end > self.header().size {
            self.grow(end);
        }
        Ok(())
    }

    /// What is new is zeros: the point is not seen beyond the base limit, and no bit is set
    /// beyond the old size.
    pub(super) fn grow(&self, size: u64) {
        let mut state = self.write_state();
        state.header.size = size;
        state.is_header_dirty = true;
    }

    /// SEEK_DATA and SEEK_HOLE; ENXIO where there is none.
    pub(super) fn seek(&self, offset: u64, whence: i32) -> Result<u64> {
        let OverlayHeader { size, base_limit, .. } = self.header();
        let none = || errno("no data beyond", Errno::ENXIO);
        if offset >= size {
            return Err(none());
        }
        let mut at = offset;
        while at < size {
            let (is_ours, end) = {
                let state = self.read_state();
                let block = at / BLOCK_BYTES;
                let end = state.bits.run_end(block, size.div_ceil(BLOCK_BYTES));
                (state.bits.get(block), (end * BLOCK_BYTES).min(size))
            };
            let found = match (is_ours, whence) {
                (true, libc::SEEK_DATA) => self.seek_ours(at, Whence::SeekData)?,
                (true, libc::SEEK_HOLE) => Some(self.seek_ours(at, Whence::SeekHole)?.unwrap_or(at)),
                (false, libc::SEEK_DATA) => {
                    let run = self.reader.next_data(self.number, at)?;
                    run.map(|r| r.offset.max(at)).filter(|start| *start < base_limit)
                }
                (false, libc::SEEK_HOLE) => {
                    let seen = end.min(base_limit);
                    Some(if at < seen { next_hole(self.reader.as_ref(), self.number, at, seen)? } else { at })
                }
                _ => return Err(errno("no such seek", Errno::EINVAL)),
            };
            match found {
                Some(found) if found < end => return Ok(found),
                _ => at = end,
            }
        }
        if whence == libc::SEEK_HOLE { Ok(size) } else { Err(none()) }
    }

    fn seek_ours(&self, at: u64, whence: Whence) -> Result<Option<u64>> {
        match lseek64(self.data.as_fd(), signed(at)?, whence) {
            Ok(found) => Ok(Some(u64::try_from(found).unwrap_or(at))),
            Err(Errno::ENXIO) => Ok(None),
            Err(e) => Err(e).context(|| "the overlay cannot be read"),
        }
    }
}

/// `at - start` as an index into a buffer; 0 if it lies before.
fn index(at: u64, start: u64) -> usize {
    usize::try_from(at.saturating_sub(start)).unwrap_or(usize::MAX)
}

fn signed(offset: u64) -> Result<i64> {
    i64::try_from(offset).map_err(|_| errno("the offset is too large", Errno::EFBIG))
}

/// The end of a change; EFBIG beyond the largest disk.
fn end_of(offset: u64, length: u64) -> Result<u64> {
    let end = offset.checked_add(length).filter(|end| *end <= DISK_BYTES_MAX);
    end.ok_or_else(|| errno("the disk would be too large", Errno::EFBIG))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// The bitmap against a vector of booleans, over page boundaries.
        #[test]
        fn bits_equal_a_vector_of_booleans(
            ops in prop::collection::vec((0u8..4, 0u64..200, 0u64..80), 1..40),
        ) {
            let base = PAGE_BLOCKS - 100;
            let mut bits = Bits::default();
            let mut twin = vec![false; 300];
            for (op, start, length) in ops {
                if op == 0 {
                    bits.clear_from(base + start);
                    twin[start as usize..].fill(false);
                } else {
                    bits.set(base + start..base + start + length);
                    twin[start as usize..(start + length) as usize].fill(true);
                }
                for i in 0..300usize {
                    prop_assert_eq!(bits.get(base + i as u64), twin[i]);
                    let run = twin[i..].iter().take_while(|b| **b == twin[i]).count();
                    prop_assert_eq!(bits.run_end(base + i as u64, base + 300), base + (i + run) as u64);
                }
                let mut copy = Bits::default();
                for page in 0..3 { copy.set_page(page, &bits.page(page)) }
                for i in 0..300 { prop_assert_eq!(bits.get(base + i), copy.get(base + i)) }
            }
        }
    }
}
