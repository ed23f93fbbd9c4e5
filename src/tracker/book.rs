//! The book of a VM: which HRLs each disk has, what is pending, and what the last cut was.
//!
//! One mutex; shipper, cooler and host take it, writers never do. Pending blocks are in memory
//! and, so that they survive, in the HRLs of the epochs that gave up their cut; what could not be
//! written there yet is `unlogged`, and shared memory says that the disk ships whole should the
//! process die before it can be.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use super::disk::Disk;
use super::gate::{EpochWord, Previous};
use super::hrl::{HrlFile, HrlPlace};
use super::shm::DISK_WHOLE;
use super::sync::lock;
use crate::base::{BLOCK_BYTES, DiskId, Error, ErrorKind, ExtentSet, Result};
use crate::core::ports::source::{BlocksByDisk, Cut};
use crate::format::hrl::HrlRecord;

/// What an epoch that gave up its cut left.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pending {
    pub(crate) blocks: ExtentSet,
    /// Every allocated block counts as changed; why.
    pub(crate) whole: Option<String>,
}

/// One disk in the book.
pub(crate) struct Entry {
    pub(crate) disk: Arc<Disk>,
    /// In no order; at most one that is appended to for each epoch.
    pub(crate) hrls: Vec<HrlFile>,
    /// HRLs with a torn tail, found at the start: kept until acknowledged, never appended to.
    pub(crate) retired: Vec<HrlFile>,
    /// By epoch.
    pub(crate) pending: BTreeMap<u64, Pending>,
    /// Epochs whose pending blocks no HRL has yet.
    pub(crate) unlogged: BTreeSet<u64>,
    /// Number of syncs that had begun when the last cut was drained (T6).
    pub(crate) syncs_at_drain: u64,
    /// It is in the write path; no cut is made while a disk is not.
    pub(crate) attached: bool,
    /// `pending` has told that it ships whole.
    pub(crate) whole_shown: bool,
}

impl Entry {
    pub(crate) fn new(disk: Arc<Disk>) -> Self {
        Self {
            disk,
            hrls: Vec::new(),
            retired: Vec::new(),
            pending: BTreeMap::new(),
            unlogged: BTreeSet::new(),
            syncs_at_drain: u64::MAX,
            attached: true,
            whole_shown: false,
        }
    }

    /// The HRL of an epoch, made if there is none.
    pub(crate) fn hrl(&mut self, epoch: u64) -> Result<&mut HrlFile> {
        if let Some(index) = self.hrls.iter().position(|h| h.epoch == epoch) {
            return Ok(&mut self.hrls[index]);
        }
        let place = lock(&self.disk.place).clone();
        let vm = &self.disk.vm;
        let file = HrlFile::create(
            &HrlPlace {
                folder: &place.folder,
                disk_name: &place.file_name,
                path: &place.path.to_string_lossy(),
                vm: vm.id,
                disk: self.disk.id,
                boot: vm.boot,
            },
            epoch,
            vm.clock.now(),
        )?;
        self.hrls.push(file);
        let last = self.hrls.len() - 1;
        Ok(&mut self.hrls[last])
    }

    /// The HRL of an epoch, if it can be had; the log says so if not.
    pub(crate) fn try_hrl(&mut self, epoch: u64) -> Option<&mut HrlFile> {
        let path = self.disk.path();
        self.hrl(epoch).map_err(|e| log::warn!("disk {}: {e}", path.display())).ok()
    }

    /// Writes the marks of an epoch into its HRL, unsynced.
    pub(crate) fn append_map(&mut self, epoch: u64) -> Result<()> {
        let disk = self.disk.clone();
        self.hrl(epoch)?.append_map(&disk.maps, EpochWord::map_of(epoch))
    }

    /// From `epoch` on every allocated block counts as changed. Never fails: what the HRL cannot
    /// take now, it gets later.
    pub(crate) fn make_whole(&mut self, epoch: u64, reason: &str) {
        let pending = self.pending.entry(epoch).or_default();
        if pending.whole.is_some() {
            return;
        }
        log::info!("disk {} ships whole: {reason}", self.disk.path().display());
        pending.whole = Some(reason.to_owned());
        self.whole_shown = false;
        let record = HrlRecord::Whole { reason: reason.to_owned() };
        let done = self.try_hrl(epoch).map(|h| h.append(&record));
        if !matches!(done, Some(Ok(()))) {
            self.mark_unlogged(epoch);
        }
    }

    /// The blocks of a given-up epoch become pending. The set that gains them is written first:
    /// the HRL, then memory; the map is cleared by the caller.
    pub(crate) fn take_map(&mut self, epoch: u64) -> ExtentSet {
        let blocks = self.disk.maps.blocks(EpochWord::map_of(epoch));
        let done = self.append_map(epoch).and_then(|()| self.hrl(epoch)?.append(&HrlRecord::GaveUp));
        self.pending.entry(epoch).or_default().blocks.union_with(&blocks);
        if let Err(e) = done {
            log::warn!("disk {}: {e}", self.disk.path().display());
            self.mark_unlogged(epoch);
        }
        blocks
    }

    /// What is pending is durable when this returns: others rely on it.
    pub(crate) fn sync_pending(&mut self, epoch: u64) -> Result<()> {
        self.log_pending()?;
        self.hrl(epoch)?;
        self.sync_hrls()
    }

    fn sync_hrls(&mut self) -> Result<()> {
        self.hrls.iter_mut().try_for_each(HrlFile::sync)?;
        self.retired.iter_mut().try_for_each(HrlFile::sync_as_is)
    }

    /// HRLs that could not follow their disk to another folder are not found there: the disk
    /// ships whole, by a new HRL in its new folder.
    pub(crate) fn lost_hrls(&mut self, epoch: u64) -> Result<()> {
        let folder = lock(&self.disk.place).folder.clone();
        let (here, there) = std::mem::take(&mut self.hrls).into_iter().partition(|h| h.is_in(&folder));
        self.hrls = here;
        self.retired.extend::<Vec<_>>(there);
        self.make_whole(epoch, "its change-tracking log could not be moved with it");
        // Even if an HRL that stayed behind says so.
        self.mark_unlogged(epoch);
        self.sync_pending(epoch)
    }

    fn mark_unlogged(&mut self, epoch: u64) {
        self.unlogged.insert(epoch);
        self.disk.maps.shm().field(DISK_WHOLE).fetch_max(epoch, SeqCst);
    }

    /// Writes what no HRL has yet.
    fn log_pending(&mut self) -> Result<()> {
        for epoch in self.unlogged.clone() {
            let mut records = Vec::new();
            if let Some(pending) = self.pending.get(&epoch) {
                records.extend(
                    pending
                        .blocks
                        .iter()
                        .map(|r| HrlRecord::Range { start: r.start, length: r.end - r.start }),
                );
                records.extend(pending.whole.iter().map(|w| HrlRecord::Whole { reason: w.clone() }));
            }
            self.hrl(epoch)?.append_all(&records)?;
            self.unlogged.remove(&epoch);
        }
        self.disk.maps.shm().field(DISK_WHOLE).store(0, SeqCst);
        Ok(())
    }

    /// T6: makes everything durable that covers the disk: the map of the current epoch first,
    /// then that of the frozen one and those of given-up epochs, so that a cut in between loses
    /// neither.
    pub(crate) fn make_durable(&mut self, word: EpochWord) -> Result<()> {
        if self.disk.has_lost_marks() {
            return Err(Error::new(ErrorKind::NoSpace, "marks are missing")
                .why("there was no room for them in shared memory")
                .hint("make room in /dev/shm"));
        }
        let epoch = word.epoch();
        self.append_map(epoch)?;
        self.hrl(epoch)?.sync()?;
        if word.previous() != Previous::Forgotten && epoch > 1 {
            let map = EpochWord::map_of(epoch - 1);
            if !self.disk.maps.is_empty(map) {
                self.append_map(epoch - 1)?;
            }
        }
        self.log_pending()?;
        self.sync_hrls()
    }

    /// Everything up to an acknowledged epoch is forgotten: HRLs and pending blocks. That one of
    /// them said "whole" is forgotten durably: with a name that comes back after a power cut, the
    /// disk would ship whole once more.
    pub(crate) fn forget_upto(&mut self, epoch: u64) {
        let was_whole = self.whole_at(epoch).is_some();
        for files in [&mut self.hrls, &mut self.retired] {
            for gone in files.extract_if(.., |h| h.epoch <= epoch) {
                gone.remove();
                if was_whole {
                    gone.sync_removal();
                }
            }
        }
        self.pending.retain(|e, _| *e > epoch);
        self.unlogged.retain(|e| *e > epoch);
        self.whole_shown &= self.whole_at(u64::MAX).is_some();
        if self.unlogged.is_empty() {
            self.disk.maps.shm().field(DISK_WHOLE).store(0, SeqCst);
        }
    }

    /// Why the disk ships whole, as of a cut of `epoch`.
    pub(crate) fn whole_at(&self, epoch: u64) -> Option<&str> {
        self.pending.range(..=epoch).rev().find_map(|(_, p)| p.whole.as_deref())
    }

    /// Blocks that are pending, allocated ones if the disk ships whole.
    pub(crate) fn pending_blocks(&self) -> ExtentSet {
        let mut blocks = ExtentSet::new();
        self.pending.values().for_each(|p| blocks.union_with(&p.blocks));
        let size = self.disk.lower.metadata().map_or(0, |m| m.len()).div_ceil(BLOCK_BYTES);
        if self.pending.values().any(|p| p.whole.is_some()) {
            match super::source::data_blocks(&self.disk.lower, 0..size) {
                Ok(data) => blocks.union_with(&data),
                // It cannot be asked: everything.
                Err(_) => blocks.insert(0..size),
            }
        }
        blocks.remove(size..u64::MAX);
        blocks
    }
}

/// The book.
#[derive(Default)]
pub(crate) struct Book {
    pub(crate) entries: BTreeMap<DiskId, Entry>,
    /// The last cut, until the next.
    pub(crate) cut: Option<Cut>,
    /// Blocks of the epoch that the last cut ended, once it has given up.
    pub(crate) given_up: Option<BlocksByDisk>,
    /// No epoch from here on was begun (see `record`).
    pub(crate) ceiling: u64,
}

impl Book {
    /// Completes a give-up (T4, T5): the blocks of the epoch become pending, then its maps are
    /// cleared and its preserved data is freed. Again after a kill in between.
    pub(crate) fn complete_give_up(&mut self, epoch: u64) {
        let mut ended = BlocksByDisk::new();
        for (id, entry) in &mut self.entries {
            let blocks = entry.take_map(epoch);
            if !blocks.is_empty() {
                ended.insert(*id, blocks);
            }
        }
        for entry in self.entries.values() {
            let map = EpochWord::map_of(epoch);
            entry.disk.maps.clear(map);
            entry.disk.vm.free_preserved();
            *lock(&entry.disk.preserve[map]) = None;
        }
        self.given_up = Some(ended);
    }
}
