//! A protected disk, as the write path sees it: the five steps of a write.
//!
//! Step 4, the write itself, is the filter's. A warm write into blocks that are not frozen takes
//! no lock, allocates nothing and makes no system call here.
//!
//! Killed at any step: the write was not acknowledged; marks that were set stay set, which costs
//! a block shipped once more. Disk full: what cannot be preserved makes the epoch give up its cut.

use std::cell::Cell;
use std::ffi::OsString;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::canary::{Rule, Step};
use super::gate::{EpochWord, Previous};
use super::map::{BlockState, DiskMaps};
use super::preserve::{Limit, Preserve};
use super::regions::Regions;
use super::shared::VmShared;
use super::shm::{DISK_CUT_SIZE, DISK_LOST, clear_untracked, set_untracked};
use super::sync::lock;
use crate::base::limits::{ACTIVATE_AHEAD_REGIONS_MAX, ACTIVATION_SECONDS_MAX, PRESERVE_OPERATION_BYTES_MAX};
use crate::base::units::{blocks_touched, regions_touched};
use crate::base::{BLOCK_BYTES, Block, DiskId, ExtentSet, REGION_BYTES};
use crate::core::ports::tracking::{Change, SyncMark, Ticket, TrackedDisk};

/// Blocks that one section of step 2 marks, at most: about 0.1 ms.
const SECTION_BLOCKS: u64 = 1 << 16;
/// Blocks that are preserved with one read.
const PRESERVE_RUN_BLOCKS: u64 = 64;

/// What the tracker needs to know of a disk. It never reaches the lower file through the mount.
#[derive(Debug)]
pub struct DiskSpec {
    /// Stable id.
    pub id: DiskId,
    /// Path relative to the root of the mount; shown in points.
    pub path: PathBuf,
    /// The lower file, open for reading and writing, not `O_DIRECT`, not `O_APPEND`.
    pub lower: File,
    /// The lower folder of the file; HRLs are made and removed relative to it.
    pub folder: File,
    /// Name of the file in its folder.
    pub file_name: OsString,
    /// The name of its backing file as the image header has it.
    pub backing: Option<String>,
    /// It may have been written to while nobody tracked it, whatever its times say: it ships whole.
    pub changed_beneath: bool,
}

/// Where a disk is now.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub(crate) path: PathBuf,
    pub(crate) folder: Arc<File>,
    pub(crate) file_name: OsString,
    pub(crate) backing: Option<String>,
}

/// A protected disk.
pub struct Disk {
    pub(crate) id: DiskId,
    pub(crate) vm: Arc<VmShared>,
    pub(crate) maps: DiskMaps,
    pub(crate) regions: Arc<Regions>,
    pub(crate) lower: File,
    pub(crate) place: Mutex<Place>,
    /// Where blocks of a frozen epoch are saved, by its map.
    pub(crate) preserve: [Mutex<Option<Arc<Preserve>>>; 3],
    /// Blocks of the current epoch that could not be marked: no room in shared memory, which says
    /// (`DISK_LOST`) whether there are any. The next cut marks them before it is made.
    lost: Mutex<ExtentSet>,
    /// One at a time puts the untracked mark on or takes it off.
    marking: Mutex<()>,
    /// Syncs that began.
    syncs: AtomicU64,
    /// The sync in whose charge `Regions::syncing` is; 0: none.
    sync_owner: AtomicU64,
    /// The newest sync that ended well.
    synced: AtomicU64,
}

thread_local! {
    static SHARD: Cell<usize> = const { Cell::new(usize::MAX) };
}

/// Which counters this thread uses.
#[inline]
fn shard_of_thread() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    SHARD.with(|s| {
        if s.get() == usize::MAX {
            s.set(NEXT.fetch_add(1, SeqCst) % super::gate::SHARDS);
        }
        s.get()
    })
}

/// Blocks that a change marks, as two ranges.
///
/// T10: a truncation that shrinks marks from the new to the old size, both boundary blocks
/// included. One that grows marks the two boundary blocks only: between them is a hole here, and
/// zeros in any vault that sets the size, so that growing a disk by 8 TiB costs two marks.
fn blocks_of(change: Change) -> [Range<u64>; 2] {
    match change {
        Change::Write { offset, length } | Change::Zero { offset, length } => {
            [blocks_touched(offset, length), 0..0]
        }
        Change::Truncate { from, to } if to < from => {
            [Block::at(to).0..from.div_ceil(BLOCK_BYTES).max(Block::at(to).0 + 1), 0..0]
        }
        Change::Truncate { from, to } => {
            [Block::at(from).0..Block::at(from).0 + 1, Block::at(to).0..Block::at(to).0 + 1]
        }
    }
}

fn regions_of(blocks: &Range<u64>) -> Range<u64> {
    regions_touched(blocks.start * BLOCK_BYTES, blocks.end.saturating_sub(blocks.start) * BLOCK_BYTES)
}

impl Disk {
    pub(crate) fn new(spec: DiskSpec, vm: Arc<VmShared>, maps: DiskMaps) -> Self {
        let place = Place {
            path: spec.path,
            folder: Arc::new(spec.folder),
            file_name: spec.file_name,
            backing: spec.backing,
        };
        Self {
            id: spec.id,
            vm,
            maps,
            regions: Arc::new(Regions::new(spec.id)),
            lower: spec.lower,
            place: Mutex::new(place),
            preserve: Default::default(),
            lost: Mutex::default(),
            marking: Mutex::new(()),
            syncs: AtomicU64::new(0),
            sync_owner: AtomicU64::new(0),
            synced: AtomicU64::new(0),
        }
    }

    /// Path relative to the mount, as shown in points.
    pub fn path(&self) -> PathBuf {
        lock(&self.place).path.clone()
    }

    /// Step 1 for cold regions. T8: when the log fails or takes too long, the untracked mark on
    /// the disk file stands in for it; if that fails too, the guest gets the error.
    fn activate(&self, regions: &Range<u64>) -> Result<(), Errno> {
        if self.regions.untracked.load(SeqCst) {
            self.regions.set_hot(regions.clone());
            return Ok(());
        }
        let wide = self.regions.with_ahead(regions.clone(), ACTIVATE_AHEAD_REGIONS_MAX);
        let patience = Duration::from_secs(ACTIVATION_SECONDS_MAX);
        if self.vm.hot.activate(&self.regions, wide, patience) {
            return Ok(());
        }
        self.mark_untracked()?;
        self.regions.set_hot(regions.clone());
        Ok(())
    }

    /// T8: after a loss of power the disk is compared whole.
    fn mark_untracked(&self) -> Result<(), Errno> {
        let _one = lock(&self.marking);
        if self.regions.untracked.load(SeqCst) {
            return Ok(());
        }
        let done = set_untracked(&self.lower).and_then(|()| self.lower.sync_all());
        done.map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO)))?;
        self.regions.untracked.store(true, SeqCst);
        log::warn!(
            "disk {}: an activation failed; if the power is lost now, it is compared whole",
            self.path().display()
        );
        Ok(())
    }

    /// T8, the way back: writers use the log again, those that did not have left, everything that
    /// they made hot is in a new log; then the mark goes.
    pub(crate) fn recover_tracking(&self) {
        if self.has_lost_marks() || !self.regions.untracked.swap(false, SeqCst) {
            return;
        }
        let is_back = self.regions.pins.wait_all(Duration::from_secs(1))
            && !self.has_lost_marks()
            && self.vm.hot.rewrite(Some(self.regions.clone()));
        let _one = lock(&self.marking);
        if !is_back {
            self.regions.untracked.store(true, SeqCst);
        } else if !self.regions.untracked.load(SeqCst) {
            let done = clear_untracked(&self.lower).and_then(|()| self.lower.sync_all());
            match done {
                Ok(()) => log::info!("disk {}: activations work again", self.path().display()),
                Err(e) => log::warn!("disk {}: the untracked mark stays: {e}", self.path().display()),
            }
        }
    }

    /// Steps 1 to 3 for blocks that are pinned already.
    fn enter(&self, change: Change, ranges: &[Range<u64>; 2], shard: usize) -> Result<EpochWord, Errno> {
        for blocks in ranges.iter().filter(|b| !b.is_empty()) {
            self.regions.touch(regions_of(blocks));
            if self.maps.ensure(blocks.clone()).is_err() {
                // T8: no room for the marks. The write goes on; the next cut waits for room.
                self.mark_untracked()?;
            }
        }
        self.mark_ahead(ranges, shard);
        let truncates = matches!(change, Change::Truncate { .. });
        let word = self.vm.gate.enter(self.vm.epoch_field(), shard, |word| {
            if truncates {
                self.vm.truncations.fetch_add(1, SeqCst);
            }
            self.mark(word, ranges);
        });
        self.vm.mutation.pause(Step::Marked);
        if word.previous() == Previous::Frozen {
            ranges.iter().for_each(|blocks| self.preserve(word.epoch() - 1, blocks));
        }
        self.vm.mutation.pause(Step::Preserved);
        Ok(word)
    }

    /// Inside the gate.
    #[inline]
    fn mark(&self, word: EpochWord, ranges: &[Range<u64>; 2]) {
        let map = EpochWord::map_of(word.epoch());
        for blocks in ranges {
            if !self.maps.mark(map, blocks.clone()) {
                let mut lost = lock(&self.lost);
                self.maps.shm().field(DISK_LOST).store(1, SeqCst);
                lost.insert(blocks.clone());
            }
        }
    }

    /// Whether a write of the current epoch could not be marked (T8). Then nothing that stands in
    /// for its mark may go: neither the untracked mark nor a hot region.
    pub(crate) fn has_lost_marks(&self) -> bool {
        self.maps.shm().field(DISK_LOST).load(SeqCst) != 0
    }

    /// Marks in the current epoch what could not be marked when it was written. `false`: there
    /// is no room still. The caller makes the cuts, so the epoch stays.
    pub(crate) fn mark_lost(&self, epoch: u64) -> bool {
        if !self.has_lost_marks() {
            return true;
        }
        let mut lost = lock(&self.lost);
        let map = EpochWord::map_of(epoch);
        let marked = |b: Range<u64>| self.maps.ensure(b.clone()).is_ok() && self.maps.mark(map, b);
        if !lost.iter().all(marked) {
            return false;
        }
        *lost = ExtentSet::new();
        self.maps.shm().field(DISK_LOST).store(0, SeqCst);
        true
    }

    /// A large change marks most of its blocks before, in short sections, so that a cut (and with
    /// it the other writers) never waits for long. If a cut comes in between, the last section
    /// marks everything again in the new epoch after all; marks in the old one are only too many.
    fn mark_ahead(&self, ranges: &[Range<u64>; 2], shard: usize) {
        for _ in 0..3 {
            let before = self.vm.word().epoch();
            let mut is_whole = true;
            for blocks in ranges.iter().filter(|b| b.end.saturating_sub(b.start) > SECTION_BLOCKS) {
                for start in blocks.clone().step_by(SECTION_BLOCKS as usize) {
                    let part = [start..blocks.end.min(start + SECTION_BLOCKS), 0..0];
                    let word = self.vm.gate.enter(self.vm.epoch_field(), shard, |w| self.mark(w, &part));
                    self.vm.gate.leave(word.epoch(), shard);
                    is_whole &= word.epoch() == before;
                }
            }
            if is_whole {
                return;
            }
        }
    }

    /// Step 3 (T3): each block that is frozen in `epoch` and unread is copied, then set to
    /// *preserved*, before anything is written.
    fn preserve(&self, epoch: u64, blocks: &Range<u64>) {
        let map = EpochWord::map_of(epoch);
        if blocks.is_empty() || !self.maps.may_have(map, blocks.clone()) {
            return;
        }
        let enough = PRESERVE_OPERATION_BYTES_MAX / BLOCK_BYTES;
        let count = self.maps.count_frozen(map, blocks.clone(), enough);
        if count == 0 || !self.vm.is_frozen(epoch) {
            return;
        }
        if count > enough {
            let reason = "one operation would preserve more than 16 MiB";
            return self.vm.announce_give_up(epoch, reason, count * BLOCK_BYTES);
        }
        let store = lock(&self.preserve[map]).clone().filter(|p| p.epoch == epoch);
        let result = match &store {
            Some(store) => self.preserve_runs(store, map, blocks),
            None => Err(Limit::Closed),
        };
        if let Err(limit) = result {
            let needed = store.map_or(0, |s| s.bytes()) + count * BLOCK_BYTES;
            self.vm.announce_give_up(epoch, limit.reason(), needed);
        }
    }

    fn preserve_runs(&self, store: &Preserve, map: usize, blocks: &Range<u64>) -> Result<(), Limit> {
        let mut one = [0u8; BLOCK_BYTES as usize];
        let mut many = Vec::new();
        let mut at = blocks.start;
        while at < blocks.end {
            let is_frozen = |b: u64| self.maps.state(map, b) == BlockState::Marked;
            if !is_frozen(at) {
                at += 1;
                continue;
            }
            let limit = blocks.end.min(at + PRESERVE_RUN_BLOCKS);
            let end = (at + 1..limit).find(|b| !is_frozen(*b)).unwrap_or(limit);
            let buffer = if end - at == 1 {
                &mut one[..]
            } else {
                many.resize(((end - at) * BLOCK_BYTES) as usize, 0);
                &mut many[..]
            };
            self.read_lower(at, buffer).map_err(|_| Limit::Io)?;
            store.save(&self.maps, map, at, buffer)?;
            at = end;
        }
        Ok(())
    }

    /// Reads blocks of the lower file; zeros beyond its end.
    pub(crate) fn read_lower(&self, first: u64, buffer: &mut [u8]) -> std::io::Result<()> {
        let mut done = 0;
        while let Some(rest) = buffer.get_mut(done..).filter(|r| !r.is_empty()) {
            match self.lower.read_at(rest, first * BLOCK_BYTES + done as u64) {
                Ok(0) => {
                    rest.fill(0);
                    break;
                }
                Ok(n) => done += n,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// A writer of an epoch that is over has made the file grow: the size at the cut follows
    /// (T10). In shared memory, because the writer is acknowledged next.
    fn grow_late(&self, ticket: &Ticket, result: Result<u64, Errno>) {
        let end = match (ticket.change, result) {
            (Change::Write { offset, .. }, Ok(n)) if n > 0 => offset.saturating_add(n),
            (Change::Zero { offset, length }, Ok(_)) => {
                let size = self.lower.metadata().map_or(0, |m| m.len());
                size.min(offset.saturating_add(length))
            }
            _ => return,
        };
        let map = EpochWord::map_of(ticket.epoch);
        self.maps.shm().field(DISK_CUT_SIZE + map).fetch_max(end, SeqCst);
    }

    /// Number of syncs that have begun, to compare with [`Disk::is_synced_since`].
    pub(crate) fn syncs_begun(&self) -> u64 {
        self.syncs.load(SeqCst)
    }

    /// Whether a sync that began after `mark` has ended well (T6: a guest's flush counts).
    pub(crate) fn is_synced_since(&self, mark: u64) -> bool {
        self.synced.load(SeqCst) > mark
    }

    /// A sync of our own.
    pub(crate) fn sync(&self) -> std::io::Result<()> {
        let mark = self.sync_begins();
        let result = self.lower.sync_data();
        let errno = |e: &std::io::Error| Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO));
        self.sync_ended(mark, result.as_ref().copied().map_err(errno));
        result
    }

    /// T9: everything written since the last good sync may differ from what was read: it is
    /// marked in the current epoch.
    fn mark_unsynced(&self) {
        let shard = shard_of_thread();
        let per_region = REGION_BYTES / BLOCK_BYTES;
        for regions in self.regions.sync_failed() {
            for region in regions {
                let part = [region * per_region..(region + 1) * per_region, 0..0];
                // What cannot be marked for want of room is kept as such.
                let _ = self.maps.ensure(part[0].clone());
                let word = self.vm.gate.enter(self.vm.epoch_field(), shard, |w| self.mark(w, &part));
                self.vm.gate.leave(word.epoch(), shard);
            }
        }
    }

    /// Whether this rule is broken on purpose.
    pub(crate) fn breaks(&self, rule: Rule) -> bool {
        self.vm.mutation.breaks(rule)
    }
}

impl TrackedDisk for Disk {
    fn id(&self) -> DiskId {
        self.id
    }

    fn begin(&self, change: Change) -> Result<Ticket, Errno> {
        let begun = Instant::now();
        let shard = shard_of_thread();
        let ranges = blocks_of(change);
        // T6: pin first, then ask whether the regions are hot.
        let turn = self.regions.pins.pin(shard);
        let mut cold = Duration::ZERO;
        let mut result = Ok(());
        for blocks in ranges.iter().filter(|b| !b.is_empty()) {
            let regions = regions_of(blocks);
            if !self.regions.are_hot(regions.clone()) {
                let asked = Instant::now();
                result = result.and_then(|()| self.activate(&regions));
                cold += asked.elapsed();
            }
        }
        match result.and_then(|()| self.enter(change, &ranges, shard)) {
            Ok(word) => {
                let spent = begun.elapsed().saturating_sub(cold);
                self.vm.latency.add(shard, spent.as_nanos() as u64);
                Ok(Ticket { epoch: word.epoch(), change, shard: (shard | turn << 16) as u32 })
            }
            Err(errno) => {
                self.regions.pins.unpin(shard, turn);
                Err(errno)
            }
        }
    }

    fn end(&self, ticket: Ticket, result: Result<u64, Errno>) {
        let (shard, turn) = ((ticket.shard & 0xffff) as usize, (ticket.shard >> 16) as usize);
        if self.vm.word().epoch() != ticket.epoch {
            self.grow_late(&ticket, result);
        }
        for blocks in blocks_of(ticket.change).iter().filter(|b| !b.is_empty()) {
            self.regions.touch(regions_of(blocks));
        }
        if matches!(ticket.change, Change::Truncate { .. }) {
            self.vm.truncations.fetch_sub(1, SeqCst);
        }
        self.vm.gate.leave(ticket.epoch, shard);
        self.regions.pins.unpin(shard, turn);
    }

    fn make_room(&self) -> bool {
        self.vm.make_room()
    }

    fn sync_begins(&self) -> SyncMark {
        let number = self.syncs.fetch_add(1, SeqCst) + 1;
        if self.sync_owner.compare_exchange(0, number, SeqCst, SeqCst).is_ok() {
            self.regions.sync_begins();
        }
        SyncMark(number)
    }

    fn sync_ended(&self, mark: SyncMark, result: Result<(), Errno>) {
        let is_owner = self.sync_owner.load(SeqCst) == mark.0;
        match result {
            Ok(()) => {
                self.synced.fetch_max(mark.0, SeqCst);
                if is_owner {
                    self.regions.sync_succeeded();
                }
            }
            Err(errno) => {
                log::error!(
                    "disk {}: sync failed ({errno}): what was written since the last one is compared",
                    self.path().display()
                );
                self.mark_unsynced();
            }
        }
        if is_owner {
            self.sync_owner.store(0, SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn truncations_mark_both_boundary_blocks() {
        let down = |from, to| blocks_of(Change::Truncate { from, to });
        assert_eq!(down(8192, 4096), [1..2, 0..0]);
        assert_eq!(down(8193, 4096), [1..3, 0..0]);
        assert_eq!(down(8192, 8191), [1..2, 0..0]);
        assert_eq!(down(100, 0), [0..1, 0..0]);
        assert_eq!(down(0, 1 << 40), [0..1, 1 << 28..(1 << 28) + 1]);
    }

    /// T8: blocks that cannot be marked count as changed at the next cut, and, should the process
    /// die before it, the disk ships whole. What stands in for the marks stays meanwhile.
    #[test]
    fn marks_that_are_missing_are_made_good_by_the_cut() {
        use crate::base::{BootId, SystemClock, VmId};
        use crate::core::ports::source::{CutKind, Source};
        use crate::tracker::Tracker;

        struct Clean(Tracker);
        impl Drop for Clean {
            fn drop(&mut self) {
                self.0.remove_shared_memory();
            }
        }
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let open =
            || Clean(Tracker::open(dir.path(), BootId(1), Arc::new(SystemClock::default()), 0).unwrap());
        let spec = || DiskSpec {
            id: DiskId(1),
            path: "disk.img".into(),
            lower: File::options().read(true).write(true).open(dir.path().join("disk.img")).unwrap(),
            folder: File::open(dir.path()).unwrap(),
            file_name: "disk.img".into(),
            backing: None,
            changed_beneath: false,
        };
        File::create(dir.path().join("disk.img")).unwrap().set_len(1 << 30).unwrap();
        let (patience, chunk) = (Duration::from_secs(20), crate::base::CHUNK_BLOCKS);
        let tracker = open();
        let vm = tracker.0.open_vm(VmId(5), vec![spec()], true).unwrap();
        let disk = vm.disk(DiskId(1)).unwrap();
        let lose = |disk: &Disk| {
            // The chunk in the middle has no memory; those around it have.
            disk.maps.ensure(chunk..2 * chunk).unwrap();
            disk.maps.ensure(3 * chunk..4 * chunk).unwrap();
            disk.mark(disk.vm.word(), &[2 * chunk - 1..3 * chunk + 1, 0..0]);
        };
        lose(&disk);
        assert!(disk.has_lost_marks() && vm.has_changes());
        assert!(vm.stop_clean().is_err());
        let cut = vm.cut(CutKind::Final, &vm.pending(), patience).unwrap();
        vm.drain(patience).unwrap().unwrap();
        assert!(!disk.has_lost_marks());
        assert_eq!(vm.frozen_blocks()[&DiskId(1)].total(), chunk + 2);
        vm.acknowledge(cut.epoch).unwrap();
        disk.maps.shm().field(DISK_LOST).store(1, SeqCst);
        drop((disk, vm));
        tracker.0.stop();
        let next = open();
        let vm = next.0.open_vm(VmId(5), vec![spec()], false).unwrap();
        assert_eq!(vm.recovered()[0].label, "lost-with-process");
        assert!(!vm.disk(DiskId(1)).unwrap().has_lost_marks());
    }
}
