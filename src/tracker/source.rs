//! What the shipper asks of a VM: the content of frozen epochs (T2 to T6).

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek64};

use super::book::Entry;
use super::canary::Rule;
use super::disk::Disk;
use super::gate::{EpochWord, Previous};
use super::map::BlockState;
use super::shm::{DISK_CUT_SIZE, VM_RECORDS, VM_TRACKING};
use super::sync::{Word, lock};
use super::vm::{VmTracker, disks};
use crate::base::error::Context;
use crate::base::{BLOCK_BYTES, DiskId, EpochNumber, Error, ErrorKind, ExtentSet, Result, VmId};
use crate::core::ports::source::{BlocksByDisk, Cut, CutKind, DiskFigures, Source};

/// The parts of `blocks` that the file says are data.
pub(crate) fn data_blocks(file: &File, blocks: Range<u64>) -> Result<ExtentSet> {
    let mut set = ExtentSet::new();
    let (start, end) = (blocks.start * BLOCK_BYTES, blocks.end.saturating_mul(BLOCK_BYTES));
    let mut at = start;
    while at < end {
        let data = match lseek64(file, at as i64, Whence::SeekData) {
            Ok(offset) => offset as u64,
            Err(Errno::ENXIO) => break,
            Err(e) => return Err(Error::io("holes of a disk cannot be found", e.into())),
        };
        if data >= end {
            break;
        }
        let hole = lseek64(file, data as i64, Whence::SeekHole)
            .context(|| "holes of a disk cannot be found")? as u64;
        let hole = hole.min(end);
        set.insert(data / BLOCK_BYTES..hole.div_ceil(BLOCK_BYTES).min(blocks.end));
        at = hole;
    }
    Ok(set)
}

fn cancelled() -> Error {
    Error::new(ErrorKind::Cancelled, "the frozen epoch has given up its cut")
}

fn check_buffer(blocks: &Range<u64>, buffer: &[u8]) -> Result<()> {
    let wanted = blocks.end.saturating_sub(blocks.start).saturating_mul(BLOCK_BYTES);
    if buffer.len() as u64 == wanted {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Internal, "a buffer does not fit its blocks"))
}

impl VmTracker {
    /// Reads with the lower error, named.
    fn read_blocks(&self, disk: &Disk, first: u64, buffer: &mut [u8]) -> Result<()> {
        disk.read_lower(first, buffer)
            .map_err(|e| Error::io(format!("disk {} cannot be read", disk.path().display()), e))
    }

    /// T3 and T4 for each block that was just read, in the frozen epoch before `current`.
    fn settle(&self, disk: &Disk, current: u64, blocks: Range<u64>, buffer: &mut [u8]) -> Result<()> {
        let frozen = current - 1;
        let map = EpochWord::map_of(frozen);
        let store = lock(&disk.preserve[map]).clone().filter(|p| p.epoch == frozen);
        for (block, slice) in blocks.zip(buffer.chunks_exact_mut(BLOCK_BYTES as usize)) {
            match disk.maps.settle(map, block, BlockState::Read) {
                Ok(()) => {}
                Err(BlockState::Preserved) if disk.breaks(Rule::T3) => {}
                Err(BlockState::Preserved) => {
                    // The writer was first: its copy is the content as of the cut.
                    if !store.as_ref().is_some_and(|s| s.read(block, slice)) {
                        self.shared.announce_give_up(frozen, "saved content cannot be read", 0);
                        return Err(cancelled());
                    }
                }
                Err(BlockState::Read) if disk.breaks(Rule::T4) => {}
                Err(BlockState::Read) => {
                    // T4: it was read before and its part is lost. Asked after the block has been
                    // read again: not marked since means not written since.
                    if disk.maps.state(EpochWord::map_of(current), block) != BlockState::Clean {
                        let reason = "content that was read and lost cannot be read again";
                        self.shared.announce_give_up(frozen, reason, 0);
                        return Err(cancelled());
                    }
                }
                Err(_) => {
                    return Err(Error::new(
                        ErrorKind::Internal,
                        format!("block {block} is not in the epoch"),
                    ));
                }
            }
        }
        Ok(())
    }

    fn figures_of(&self, entry: &Entry, word: EpochWord) -> DiskFigures {
        let disk = &entry.disk;
        let map = EpochWord::map_of(word.epoch());
        let frozen_map = EpochWord::map_of(word.epoch() + 2);
        let is_frozen = word.previous() != Previous::Forgotten;
        let frozen = if is_frozen { disk.maps.count(frozen_map) * BLOCK_BYTES } else { 0 };
        let store = lock(&disk.preserve[frozen_map]).clone();
        let untracked = disk.regions.untracked.load(SeqCst);
        let mark = "an activation failed: compared whole if the power is lost";
        DiskFigures {
            size: disk.lower.metadata().map_or(0, |m| m.len()),
            current: disk.maps.count(map) * BLOCK_BYTES,
            frozen,
            pending: if entry.pending.is_empty() { 0 } else { entry.pending_blocks().total() * BLOCK_BYTES },
            preserved: store.map_or(0, |s| s.bytes()),
            hrl_files: (entry.hrls.len() + entry.retired.len()) as u64,
            hrl_bytes: entry.hrls.iter().chain(&entry.retired).map(|h| h.bytes_on_disk()).sum(),
            hot_regions: disk.regions.count.load(SeqCst),
            whole_because: entry
                .whole_at(u64::MAX)
                .map(str::to_owned)
                .or_else(|| untracked.then(|| mark.to_owned())),
        }
    }

    /// T6: an acknowledged epoch is forgotten only after a sync of the disk files that began
    /// after its last write; a guest's flush counts.
    fn sync_for(&self, epoch: u64) {
        let marks: Vec<(Arc<Disk>, u64)> =
            lock(&self.book).entries.values().map(|e| (e.disk.clone(), e.syncs_at_drain)).collect();
        for (disk, mark) in marks {
            if mark == u64::MAX || !disk.is_synced_since(mark) {
                // An error marks what was written since the last good sync in the current epoch
                // (T9), which keeps it from being forgotten.
                if let Err(e) = disk.sync() {
                    log::error!(
                        "disk {}: sync before epoch {epoch} is forgotten: {e}",
                        disk.path().display()
                    );
                }
            }
        }
    }
}

impl Source for VmTracker {
    fn vm(&self) -> VmId {
        self.shared.id
    }

    fn tracking_id(&self) -> u64 {
        self.shared.shm.field(VM_TRACKING).load(SeqCst)
    }

    fn frozen(&self) -> Option<Cut> {
        let book = lock(&self.book);
        let word = self.shared.word();
        if word.previous() != Previous::Frozen {
            return None;
        }
        let epoch = word.epoch() - 1;
        book.cut.clone().filter(|c| c.epoch.0 == epoch).or_else(|| Some(self.cut_of(&book, epoch)))
    }

    fn has_changes(&self) -> bool {
        let map = EpochWord::map_of(self.shared.word().epoch());
        let is_dirty = |d: &Arc<Disk>| !d.maps.is_empty(map) || d.has_lost_marks();
        self.shared.shm.field(VM_RECORDS).load(SeqCst) != 0
            || disks!(self).values().any(is_dirty)
            || lock(&self.book).entries.values().any(|e| !e.pending.is_empty())
    }

    fn marked_bytes(&self) -> u64 {
        let map = EpochWord::map_of(self.shared.word().epoch());
        disks!(self).values().map(|d| d.maps.count(map) * BLOCK_BYTES).sum()
    }

    fn pending(&self) -> BlocksByDisk {
        let mut book = lock(&self.book);
        for entry in book.entries.values_mut() {
            entry.whole_shown = entry.whole_at(u64::MAX).is_some();
        }
        let of = |(id, entry): (&DiskId, &Entry)| (*id, entry.pending_blocks());
        book.entries.iter().map(of).filter(|(_, set)| !set.is_empty()).collect()
    }

    fn cut(&self, kind: CutKind, unmade: &BlocksByDisk, patience: Duration) -> Result<Cut> {
        self.make_cut(kind, unmade, patience)
    }

    fn drain(&self, patience: Duration) -> Result<Option<Cut>> {
        let epoch = self.shared.word().epoch();
        if epoch < 2 {
            return Err(Error::new(ErrorKind::Internal, "there was no cut yet"));
        }
        // T2: map and writers of epoch - 1.
        if !self.shared.mutation.breaks(Rule::T2) && !self.shared.gate.wait_writers(&[epoch - 1], patience) {
            return Ok(None);
        }
        let mut book = lock(&self.book);
        let mut cut = match book.cut.take() {
            Some(cut) if cut.epoch.0 == epoch - 1 => cut,
            _ => self.cut_of(&book, epoch - 1),
        };
        let map = EpochWord::map_of(epoch - 1);
        for disk in &mut cut.disks {
            if let Some(entry) = book.entries.get_mut(&disk.id) {
                // Late writers of the epoch have raised it (T10).
                disk.size = entry.disk.maps.shm().field(DISK_CUT_SIZE + map).load(SeqCst);
                if entry.syncs_at_drain == u64::MAX {
                    entry.syncs_at_drain = entry.disk.syncs_begun();
                }
            }
        }
        book.cut = Some(cut.clone());
        Ok(Some(cut))
    }

    fn frozen_blocks(&self) -> BlocksByDisk {
        let book = lock(&self.book);
        let word = self.shared.word();
        if let Some(given_up) = &book.given_up {
            return given_up.clone();
        }
        if word.previous() == Previous::Forgotten {
            return BTreeMap::new();
        }
        let map = EpochWord::map_of(word.epoch() + 2);
        let of = |(id, entry): (&DiskId, &Entry)| (*id, entry.disk.maps.blocks(map));
        book.entries.iter().map(of).filter(|(_, set)| !set.is_empty()).collect()
    }

    fn read_frozen(&self, disk: DiskId, blocks: Range<u64>, buffer: &mut [u8]) -> Result<()> {
        check_buffer(&blocks, buffer)?;
        let disk = self.known_disk(disk)?;
        let word = self.shared.word();
        if word.previous() != Previous::Frozen {
            return Err(cancelled());
        }
        // T3: read first, then settle who was first.
        self.read_blocks(&disk, blocks.start, buffer)?;
        self.settle(&disk, word.epoch(), blocks.clone(), buffer)?;
        // Beyond the end of the disk as of the cut there are zeros.
        let map = EpochWord::map_of(word.epoch() - 1);
        let size = disk.maps.shm().field(DISK_CUT_SIZE + map).load(SeqCst);
        let inside = size.saturating_sub(blocks.start * BLOCK_BYTES).min(buffer.len() as u64) as usize;
        if let Some(beyond) = buffer.get_mut(inside..) {
            beyond.fill(0);
        }
        // T5: a give-up that came meanwhile.
        if self.shared.word() == word { Ok(()) } else { Err(cancelled()) }
    }

    fn read_live(&self, disk: DiskId, blocks: Range<u64>, buffer: &mut [u8]) -> Result<()> {
        check_buffer(&blocks, buffer)?;
        let disk = self.known_disk(disk)?;
        self.read_blocks(&disk, blocks.start, buffer)
    }

    fn data_blocks(&self, disk: DiskId, blocks: Range<u64>) -> Result<ExtentSet> {
        data_blocks(&self.known_disk(disk)?.lower, blocks)
    }

    fn frozen_holes(&self, disk: DiskId, blocks: Range<u64>) -> Result<ExtentSet> {
        let disk = self.known_disk(disk)?;
        let word = self.shared.word();
        if word.previous() != Previous::Frozen {
            return Err(cancelled());
        }
        let map = EpochWord::map_of(word.epoch() - 1);
        let data = data_blocks(&disk.lower, blocks.clone())?;
        // Asked after the file was: still frozen means that nobody has written since the cut.
        let mut holes = ExtentSet::new();
        for hole in data.gaps(blocks) {
            hole.filter(|b| disk.maps.state(map, *b) == BlockState::Marked)
                .for_each(|b| holes.insert(b..b + 1));
        }
        if self.shared.word() == word { Ok(holes) } else { Err(cancelled()) }
    }

    fn has_given_up(&self) -> bool {
        self.shared.word().previous() == Previous::GaveUp
    }

    fn give_up(&self) -> Result<()> {
        let mut book = lock(&self.book);
        let word = self.shared.word();
        if word.previous() == Previous::Forgotten || word.epoch() < 2 {
            return Ok(());
        }
        self.shared.announce_give_up(word.epoch() - 1, "the shipper gave it up", 0);
        if book.given_up.is_none() {
            book.complete_give_up(word.epoch() - 1);
        }
        Ok(())
    }

    fn acknowledge(&self, epoch: EpochNumber) -> Result<()> {
        let word = self.shared.word();
        if epoch.0 >= word.epoch() {
            return Err(Error::new(ErrorKind::Internal, format!("epoch {epoch} is not cut yet")));
        }
        self.sync_for(epoch.0);
        let mut book = lock(&self.book);
        book.entries.values_mut().for_each(|entry| entry.forget_upto(epoch.0));
        let records = self.shared.shm.field(VM_RECORDS);
        if records.load(SeqCst) <= epoch.0 {
            records.store(0, SeqCst);
        }
        if epoch.0 + 1 == word.epoch() {
            // One store makes the epoch forgotten; killed before its map is clear, the next start
            // clears it.
            Word::store(self.shared.epoch_field(), EpochWord::new(word.epoch(), Previous::Forgotten).0);
            let map = EpochWord::map_of(epoch.0);
            for entry in book.entries.values() {
                entry.disk.maps.clear(map);
                *lock(&entry.disk.preserve[map]) = None;
            }
            lock(&self.shared.preserves).clear();
            book.given_up = None;
            lock(&self.shared.give_ups).in_a_row = 0;
        }
        Ok(())
    }

    fn ship_whole(&self, reason: &str) -> Result<()> {
        self.give_up()?;
        let mut book = lock(&self.book);
        let epoch = self.shared.word().epoch();
        for entry in book.entries.values_mut() {
            if entry.whole_at(u64::MAX).is_none() {
                entry.make_whole(epoch, reason);
            }
        }
        // The shipper forgets next what else would say so.
        book.entries.values_mut().try_for_each(|entry| entry.sync_pending(epoch))
    }

    fn figures(&self) -> Vec<(DiskId, DiskFigures)> {
        let book = lock(&self.book);
        let word = self.shared.word();
        book.entries.iter().map(|(id, entry)| (*id, self.figures_of(entry, word))).collect()
    }
}
