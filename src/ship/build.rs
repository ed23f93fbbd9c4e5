//! The epoch being built: its parts in the vault, and which blocks have one.
//!
//! A block is *made* when a durable part holds its content as of the newest cut, or as of later;
//! whatever changes it afterwards is marked in the current epoch and comes with the next cut. So a
//! cut takes out of the made blocks exactly those of the epoch that it ends. That holds for live
//! cuts, final cuts and those that are given up later: a part survives a give-up.

use std::collections::BTreeMap;

use crate::base::{BLOCK_BYTES, DiskId, EpochNumber, ExtentSet, Result};
use crate::core::ports::source::{BlocksByDisk, CutDisk};
use crate::format::frames::Encoding;
use crate::format::part::{PartIndex, StoredPart};
use crate::ship::read::Packed;
use crate::ship::record::BuildRecord;

/// A part that is durable in the vault, and what it holds.
#[derive(Clone, Debug)]
pub(super) struct MadePart {
    /// Its name and length.
    pub(super) stored: StoredPart,
    /// Bytes of data and zeros.
    pub(super) data_bytes: u64,
    /// Bytes of holes, by disk.
    pub(super) hole_bytes: BTreeMap<DiskId, u64>,
}

/// The epoch being built.
#[derive(Clone, Debug)]
pub(super) struct Build {
    /// What a successor has to know of it.
    pub(super) record: BuildRecord,
    /// Its parts, in sequence.
    pub(super) parts: Vec<MadePart>,
    /// Made blocks. While a cut is not drained: those made before it.
    made: BlocksByDisk,
    /// Blocks made after a cut that is not drained; only after a restart.
    fresh: BlocksByDisk,
}

impl Build {
    /// An epoch without parts.
    pub(super) fn new(record: BuildRecord) -> Self {
        Self { record, parts: Vec::new(), made: BlocksByDisk::new(), fresh: BlocksByDisk::new() }
    }

    /// Its number in the vault.
    pub(super) fn number(&self) -> EpochNumber {
        self.record.number
    }

    /// Sequence of the next part.
    pub(super) fn next_sequence(&self) -> u32 {
        self.parts.last().map_or(0, |p| p.stored.name.sequence.saturating_add(1))
    }

    /// A part became durable.
    pub(super) fn add(&mut self, part: MadePart, blocks: &BlocksByDisk) {
        unite(&mut self.made, blocks);
        self.parts.push(part);
    }

    /// Whether the vault has exactly the parts that we know of. One more, whose reply was lost,
    /// is known from `in_hand`.
    pub(super) fn equals(&mut self, stored: &[StoredPart], in_hand: &mut Vec<Packed>) -> bool {
        if let (Some(last), Some(first)) = (stored.last(), in_hand.first())
            && stored.len() == self.parts.len() + 1
            && last.name == first.name
        {
            let part = in_hand.remove(0);
            let made = MadePart { stored: *last, data_bytes: part.data_bytes, hole_bytes: part.hole_bytes };
            self.add(made, &part.blocks);
        }
        self.parts.iter().map(|p| &p.stored).eq(stored.iter())
    }

    /// Takes in a part that a predecessor left in the vault. `tag`: the attempt of parts made as
    /// of the cut that is still frozen. Every part is listed in the manifest again, because a
    /// vault may have applied it already (A3); only of those that can be trusted the blocks are
    /// made.
    pub(super) fn restore(&mut self, stored: StoredPart, index: &PartIndex, tag: Option<u32>) {
        let mut blocks = BlocksByDisk::new();
        let mut part = MadePart { stored, data_bytes: 0, hole_bytes: BTreeMap::new() };
        for frame in index.frames() {
            let range = frame.range();
            if frame.encoding == Encoding::Hole {
                *part.hole_bytes.entry(frame.disk).or_default() += frame.length;
            } else {
                part.data_bytes += frame.length;
            }
            let (first, end) = (range.start / BLOCK_BYTES, range.end.div_ceil(BLOCK_BYTES));
            blocks.entry(frame.disk).or_default().insert(first..end);
        }
        let sequence = stored.name.sequence;
        let cut_at = self.record.cut_at;
        // Before the cut that is frozen; or after one that is not: which blocks that one had is
        // not known, so that older parts cannot be trusted.
        let is_live_good = match tag {
            Some(_) => cut_at.is_none_or(|at| sequence < at),
            None => cut_at.is_none_or(|at| sequence >= at),
        };
        if tag == Some(stored.name.attempt) {
            unite(&mut self.fresh, &blocks);
        } else if sequence >= self.record.trusted_from && is_live_good {
            unite(&mut self.made, &blocks);
        }
        self.parts.push(part);
    }

    /// The tracker's marks have a gap: no block counts as made, because any may have changed
    /// without a mark. Only while no cut is frozen. The parts stay (A3).
    pub(super) fn distrust(&mut self, tracking: u64) {
        self.made.clear();
        self.fresh.clear();
        self.record.trusted_from = self.next_sequence();
        self.record.tracking = tracking;
    }

    /// A cut is drained: `blocks` of the epoch that it ended are stale in all older parts.
    pub(super) fn cut_drained(&mut self, blocks: &BlocksByDisk) {
        subtract(&mut self.made, blocks);
        let fresh = std::mem::take(&mut self.fresh);
        unite(&mut self.made, &fresh);
    }

    /// The blocks of `wanted` that have no part.
    pub(super) fn unmade(&self, wanted: &BlocksByDisk) -> BlocksByDisk {
        without(wanted, &self.made)
    }

    /// Bytes of disk that the parts describe; the holes of a whole disk are what it had not.
    pub(super) fn changed_bytes(&self, disks: &[CutDisk]) -> u64 {
        let is_whole = |id: &DiskId| disks.iter().any(|d| d.id == *id && d.whole);
        let holes = self.parts.iter().flat_map(|p| &p.hole_bytes).filter(|(id, _)| !is_whole(id));
        let data: u64 = self.parts.iter().map(|p| p.data_bytes).sum();
        data.saturating_add(holes.map(|(_, bytes)| *bytes).sum())
    }

    /// Bytes of all parts.
    pub(super) fn sent_bytes(&self) -> u64 {
        self.parts.iter().map(|p| p.stored.length).sum()
    }
}

/// Adds `more` to `set`.
pub(super) fn unite(set: &mut BlocksByDisk, more: &BlocksByDisk) {
    for (disk, blocks) in more {
        set.entry(*disk).or_default().union_with(blocks);
    }
}

/// Takes `less` out of `set`.
pub(super) fn subtract(set: &mut BlocksByDisk, less: &BlocksByDisk) {
    for (disk, blocks) in less {
        if let Some(mine) = set.get_mut(disk) {
            mine.subtract(blocks);
        }
    }
    set.retain(|_, blocks| !blocks.is_empty());
}

/// `set` without `less`.
pub(super) fn without(set: &BlocksByDisk, less: &BlocksByDisk) -> BlocksByDisk {
    let mut out = set.clone();
    subtract(&mut out, less);
    out.retain(|_, blocks| !blocks.is_empty());
    out
}

/// Bytes of disk in all blocks.
pub(super) fn bytes_of(blocks: &BlocksByDisk) -> u64 {
    blocks.values().map(ExtentSet::total).sum::<u64>().saturating_mul(BLOCK_BYTES)
}

/// Decodes what `Vault::part_index` returned.
pub(super) fn decode_index(bytes: &[u8], part: &StoredPart) -> Result<PartIndex> {
    PartIndex::decode(bytes, part.length)
}
