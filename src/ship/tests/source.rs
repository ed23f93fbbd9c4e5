//! The tracker of the simulation: the source port over the world.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use super::world::{Canary, Frozen, Kept, Shared, World, lock};
use crate::base::{BLOCK_BYTES, DiskId, EpochNumber, Error, ErrorKind, ExtentSet, Result, Timestamp, VmId};
use crate::core::ports::source::{BlocksByDisk, Cut, CutDisk, CutKind, DiskFigures, Source};

/// The VM of the simulation.
pub(in crate::ship) const VM: VmId = VmId(7);

/// The source port.
pub(in crate::ship) struct SimSource {
    pub(in crate::ship) world: Shared,
    /// What the vault has, for the check at an acknowledgement.
    pub(in crate::ship) vault: std::sync::Arc<super::vault::SimVault>,
}

fn by_disk(blocks: &BTreeSet<(DiskId, u64)>) -> BlocksByDisk {
    let mut out = BlocksByDisk::new();
    for (disk, block) in blocks {
        out.entry(*disk).or_default().insert(*block..*block + 1);
    }
    out
}

fn cancelled() -> Error {
    Error::new(ErrorKind::Cancelled, "the epoch has given up its cut")
}

impl World {
    fn cut_disks(&self, sizes: &super::world::Image) -> Vec<CutDisk> {
        let disk = |(id, content): (&DiskId, &Vec<u64>)| CutDisk {
            id: *id,
            path: PathBuf::from(id.to_string()),
            size: content.len() as u64 * BLOCK_BYTES,
            whole: self.whole.contains_key(id),
            backing: None,
        };
        sizes.iter().map(disk).collect()
    }

    fn fill(&self, disk: DiskId, block: u64, out: &mut [u8]) {
        let value = self.disks.get(&disk).and_then(|d| d.get(block as usize)).copied().unwrap_or(0);
        fill(value, out);
    }

    /// T3 and T4, for one block.
    fn read_frozen(&mut self, at: (DiskId, u64), out: &mut [u8]) -> Result<()> {
        let (canary, is_marked) = (self.canary, self.marks.contains(&at));
        let live = self.disks.get(&at.0).and_then(|d| d.get(at.1 as usize)).copied().unwrap_or(0);
        let Some(frozen) = self.frozen.as_mut() else { return Err(cancelled()) };
        if frozen.gave_up && canary != Canary::GiveUpNotAsked {
            return Err(cancelled());
        }
        let Some(kept) = frozen.blocks.get_mut(&at) else {
            return Err(Error::new(ErrorKind::Internal, "this block is not frozen"));
        };
        match *kept {
            Kept::Preserved(value) => fill(value, out),
            Kept::Frozen => {
                *kept = Kept::Read;
                fill(live, out);
            }
            // T4: asked after it was read again.
            Kept::Read if is_marked && canary != Canary::LostPartFromLive => {
                frozen.gave_up = true;
                return Err(cancelled());
            }
            Kept::Read => fill(live, out),
        }
        Ok(())
    }
}

fn fill(value: u64, out: &mut [u8]) {
    out.fill(0);
    if let Some(head) = out.get_mut(..8) {
        head.copy_from_slice(&value.to_le_bytes());
    }
}

impl Source for SimSource {
    fn vm(&self) -> VmId {
        VM
    }

    fn tracking_id(&self) -> u64 {
        lock(&self.world).tracking
    }

    fn frozen(&self) -> Option<Cut> {
        let mut w = lock(&self.world);
        w.turn();
        w.frozen.as_ref().map(|f| f.cut.clone())
    }

    fn has_changes(&self) -> bool {
        let mut w = lock(&self.world);
        w.turn();
        w.gave_up_unfinished.is_some() || !w.marks.is_empty() || !w.pending.is_empty() || !w.whole.is_empty()
    }

    fn marked_bytes(&self) -> u64 {
        let mut w = lock(&self.world);
        w.turn();
        w.marks.len() as u64 * BLOCK_BYTES
    }

    fn pending(&self) -> BlocksByDisk {
        let mut w = lock(&self.world);
        w.turn();
        by_disk(&w.pending)
    }

    fn cut(&self, kind: CutKind, unmade: &BlocksByDisk, _: Duration) -> Result<Cut> {
        let mut w = lock(&self.world);
        w.turn();
        w.fault("the cut")?;
        if w.frozen.is_some() {
            w.violate("a cut while an epoch is frozen");
        }
        // T2: the writers of the epoch before the one that ends.
        let before = w.epoch - 1;
        w.drain(before);
        let epoch = w.epoch;
        w.epoch += 1;
        w.now_ms += 1;
        let now = w.now_ms as i64;
        let image = w.disks.clone();
        w.oracles.insert(now, image);
        w.last_cut = Some(now);
        let mut blocks = std::mem::take(&mut w.marks);
        if kind == CutKind::Final {
            for (disk, set) in unmade {
                set.iter().for_each(|run| blocks.extend(run.map(|b| (*disk, b))));
            }
        }
        w.ended = blocks.clone();
        let disks = w.cut_disks(&w.disks);
        let cut = Cut { epoch: EpochNumber(epoch), time: Timestamp(now), disks };
        if kind == CutKind::Final {
            let blocks = blocks.into_iter().map(|at| (at, Kept::Frozen)).collect();
            w.frozen = Some(Frozen { cut: cut.clone(), blocks, gave_up: false });
        } else {
            w.pending.append(&mut blocks);
        }
        w.turn();
        Ok(cut)
    }

    fn drain(&self, _: Duration) -> Result<Option<Cut>> {
        let mut w = lock(&self.world);
        w.turn();
        if w.rng.one_in(4) {
            return Ok(None);
        }
        let ended = w.epoch - 1;
        if w.canary != Canary::NoDrain {
            w.drain(ended);
        }
        // T10: writers of the epoch may have grown a disk since the cut.
        let oracle = w.last_cut.and_then(|t| w.oracles.get(&t)).cloned().unwrap_or_default();
        let sized = w.cut_disks(&oracle);
        let time = Timestamp(w.last_cut.unwrap_or(0));
        if let Some(frozen) = &mut w.frozen {
            for disk in &mut frozen.cut.disks {
                disk.size = sized.iter().find(|d| d.id == disk.id).map_or(disk.size, |d| d.size);
            }
            return Ok(Some(frozen.cut.clone()));
        }
        Ok(Some(Cut { epoch: EpochNumber(ended), time, disks: sized }))
    }

    fn frozen_blocks(&self) -> BlocksByDisk {
        let mut w = lock(&self.world);
        w.turn();
        match &w.frozen {
            Some(frozen) => by_disk(&frozen.blocks.keys().copied().collect()),
            None if w.canary == Canary::StaleParts => BlocksByDisk::new(),
            None => by_disk(&w.ended),
        }
    }

    fn read_frozen(&self, disk: DiskId, blocks: Range<u64>, buffer: &mut [u8]) -> Result<()> {
        let mut w = lock(&self.world);
        w.fault("reading")?;
        for (block, out) in blocks.zip(buffer.chunks_mut(BLOCK_BYTES as usize)) {
            w.turn();
            w.read_frozen((disk, block), out)?;
        }
        Ok(())
    }

    fn read_live(&self, disk: DiskId, blocks: Range<u64>, buffer: &mut [u8]) -> Result<()> {
        let mut w = lock(&self.world);
        w.fault("reading")?;
        for (block, out) in blocks.zip(buffer.chunks_mut(BLOCK_BYTES as usize)) {
            w.turn();
            w.fill(disk, block, out);
        }
        Ok(())
    }

    fn data_blocks(&self, disk: DiskId, blocks: Range<u64>) -> Result<ExtentSet> {
        let mut w = lock(&self.world);
        w.turn();
        Ok(blocks.filter(|b| w.data.contains(&(disk, *b))).map(|b| b..b + 1).collect())
    }

    fn frozen_holes(&self, disk: DiskId, blocks: Range<u64>) -> Result<ExtentSet> {
        let mut w = lock(&self.world);
        w.turn();
        let is_hole = |b: &u64| {
            let kept = w.frozen.as_ref().and_then(|f| f.blocks.get(&(disk, *b)));
            !w.data.contains(&(disk, *b)) && kept == Some(&Kept::Frozen)
        };
        Ok(blocks.filter(is_hole).map(|b| b..b + 1).collect())
    }

    fn has_given_up(&self) -> bool {
        let mut w = lock(&self.world);
        w.turn();
        let was_killed = w.gave_up_unfinished.is_some();
        w.canary != Canary::GiveUpNotAsked && (was_killed || w.frozen.as_ref().is_some_and(|f| f.gave_up))
    }

    fn give_up(&self) -> Result<()> {
        let mut w = lock(&self.world);
        w.turn();
        if let Some(blocks) = w.gave_up_unfinished.take() {
            w.pending.extend(blocks);
        }
        if let Some(frozen) = w.frozen.take() {
            w.pending.extend(frozen.blocks.into_keys());
        }
        Ok(())
    }

    fn acknowledge(&self, epoch: EpochNumber) -> Result<()> {
        let image = self.vault.image();
        let mut w = lock(&self.world);
        w.turn();
        w.fault("the acknowledgement")?;
        if w.frozen.as_ref().map(|f| f.cut.epoch) != Some(epoch) {
            w.violate(format!("epoch {epoch} is acknowledged and not frozen"));
        }
        w.frozen = None;
        w.unsynced.clear();
        // What joined after the cut stays pending.
        w.whole.retain(|_, since| *since > epoch.0);
        let kept: BTreeSet<DiskId> = w.whole.keys().copied().collect();
        w.pending.retain(|(disk, _)| kept.contains(disk));
        w.check_marks(&image, "after an acknowledgement");
        w.turn();
        Ok(())
    }

    fn ship_whole(&self, _: &str) -> Result<()> {
        let mut w = lock(&self.world);
        w.turn();
        if let Some(frozen) = w.frozen.take() {
            w.pending.extend(frozen.blocks.into_keys());
        }
        let epoch = w.epoch;
        w.whole = w.disks.keys().map(|d| (*d, epoch)).collect();
        w.pending = w.data.clone();
        Ok(())
    }

    fn figures(&self) -> Vec<(DiskId, DiskFigures)> {
        Vec::new()
    }
}
