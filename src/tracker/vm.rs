//! One VM: its epoch number, its disks, its cuts (T1, T2, T10).
//!
//! Killed at any step of a cut: before the store of the epoch word there is no cut, after it the
//! epoch is frozen and everything else is made good at the next start. Disk full: HRLs are made
//! later, cuts go on.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::path::PathBuf;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex, RwLock};
use std::time::{Duration, Instant};

use super::book::{Book, Entry};
use super::disk::{Disk, DiskSpec};
use super::gate::{EpochWord, Previous};
use super::map::DiskMaps;
use super::preserve::Preserve;
use super::record::{CEILING_STEP, DiskFile, DiskStat, HotIdentity, VmRecord};
use super::shared::VmShared;
use super::shm::{
    DISK_CUT_SIZE, DISK_INODE, DISK_SINCE, Shm, ShmNames, VM_CUT_TIME, VM_RECORDS, clear_untracked,
};
use super::sync::lock;
use crate::base::{DiskId, EpochNumber, Error, ErrorKind, Result, Timestamp};
use crate::core::ports::source::{BlocksByDisk, Cut, CutDisk, CutKind};
use crate::format::hrl::HrlRecord;

/// What the start-up table decided for a disk.
#[derive(Clone, Debug, serde::Serialize)]
pub struct RecoveredDisk {
    /// Which disk.
    pub id: DiskId,
    /// Label of the row that matched.
    pub label: &'static str,
    /// Why, in words.
    pub reason: &'static str,
}

/// Epochs that gave up their cut (T5).
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct GiveUps {
    /// How many in a row, up to now.
    pub in_a_row: u32,
    /// Why the last one did.
    pub reason: Option<String>,
    /// Preserved bytes that it would have needed, as far as known.
    pub needed_bytes: u64,
}

/// Time spent in `begin` because of cut, mark, warm activation and preserve.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct LatencyFigures {
    /// Upper bound of each bucket in nanoseconds, and how many calls fell into it; empty ones left out.
    pub buckets: Vec<(u64, u64)>,
    /// The longest, in nanoseconds.
    pub max_ns: u64,
}

impl LatencyFigures {
    /// Number of calls.
    pub fn count(&self) -> u64 {
        self.buckets.iter().map(|(_, count)| count).sum()
    }

    /// A duration in nanoseconds that so many of a hundred calls stayed below, within 19 %.
    pub fn percentile(&self, percent: u64) -> u64 {
        let wanted = (u128::from(self.count()) * u128::from(percent)).div_ceil(100);
        let mut seen = 0;
        let mut bounds = self.buckets.iter().map(|(bound, count)| {
            seen += u128::from(*count);
            (*bound, seen)
        });
        bounds.find(|(_, seen)| *seen >= wanted).map_or(0, |(bound, _)| bound.min(self.max_ns))
    }
}

/// One VM.
pub struct VmTracker {
    pub(crate) shared: Arc<VmShared>,
    pub(crate) disks: RwLock<BTreeMap<DiskId, Arc<Disk>>>,
    pub(crate) book: Mutex<Book>,
    pub(crate) names: ShmNames,
    pub(crate) state_dir: PathBuf,
    pub(crate) recovered: Vec<RecoveredDisk>,
}

/// The lock of the disks.
macro_rules! disks {
    ($vm:expr) => {
        $vm.disks.read().unwrap_or_else(std::sync::PoisonError::into_inner)
    };
}
pub(crate) use disks;

impl VmTracker {
    /// A disk by its id.
    pub fn disk(&self, id: DiskId) -> Option<Arc<Disk>> {
        disks!(self).get(&id).cloned()
    }

    /// All disks.
    pub fn disks(&self) -> Vec<Arc<Disk>> {
        disks!(self).values().cloned().collect()
    }

    pub(crate) fn known_disk(&self, id: DiskId) -> Result<Arc<Disk>> {
        self.disk(id).ok_or_else(|| unknown_disk(id))
    }

    /// Number of the current epoch.
    pub fn epoch(&self) -> EpochNumber {
        EpochNumber(self.shared.word().epoch())
    }

    /// Takes a new disk into the running VM; it ships whole. No cut is made until the caller, once
    /// the disk is in the write path and writes to the file that began before have ended, says so
    /// ([`VmTracker::disk_attached`]).
    pub fn add_disk(&self, spec: DiskSpec) -> Result<Arc<Disk>> {
        let mut book = lock(&self.book);
        if book.entries.contains_key(&spec.id) {
            return Err(Error::new(ErrorKind::Exists, format!("disk {} is tracked already", spec.id)));
        }
        discard_hrls(&spec);
        let (mut shm, found) = Shm::disk(&self.names, spec.id.0)?;
        if found {
            shm.unlink();
            shm = Shm::disk(&self.names, spec.id.0)?.0;
        }
        let epoch = self.shared.word().epoch();
        shm.field(DISK_SINCE).store(epoch, SeqCst);
        let disk = Arc::new(Disk::new(spec, self.shared.clone(), DiskMaps::new(shm)?));
        note_file(&disk)?;
        let mut entry = Entry::new(disk.clone());
        entry.attached = false;
        entry.make_whole(epoch, "it is new");
        if let Err(e) = entry.sync_pending(epoch) {
            self.forget_entry(&entry);
            return Err(e);
        }
        book.entries.insert(disk.id, entry);
        self.insert_disk(disk.clone());
        self.note_record(&book);
        Ok(disk)
    }

    /// A disk that was added is in the write path.
    pub fn disk_attached(&self, id: DiskId) -> Result<()> {
        let mut book = lock(&self.book);
        let entry = book.entries.get_mut(&id);
        entry.ok_or_else(|| unknown_disk(id))?.attached = true;
        Ok(())
    }

    fn insert_disk(&self, disk: Arc<Disk>) {
        self.disks.write().unwrap_or_else(std::sync::PoisonError::into_inner).insert(disk.id, disk);
    }

    /// Something that is no block has changed: the next cut makes an epoch.
    fn note_record(&self, _book: &Book) {
        self.shared.shm.field(VM_RECORDS).store(self.shared.word().epoch(), SeqCst);
    }

    /// Lets a disk go: the next point is without it. Its HRLs are removed. A frozen epoch gives up
    /// its cut, which has content of the disk that nobody can read any more.
    pub fn remove_disk(&self, id: DiskId) -> Result<()> {
        let mut book = lock(&self.book);
        let word = self.shared.word();
        if word.previous() == Previous::Frozen && book.entries.contains_key(&id) {
            self.shared.announce_give_up(word.epoch() - 1, "a disk was removed", 0);
            book.complete_give_up(word.epoch() - 1);
        }
        let entry = book.entries.remove(&id).ok_or_else(|| unknown_disk(id))?;
        self.note_record(&book);
        self.disks.write().unwrap_or_else(std::sync::PoisonError::into_inner).remove(&id);
        self.forget_entry(&entry);
        Ok(())
    }

    fn forget_entry(&self, entry: &Entry) {
        entry.hrls.iter().chain(&entry.retired).for_each(|h| h.remove());
        entry.disk.maps.shm().unlink();
        let _ = clear_untracked(&entry.disk.lower);
        self.shared.hot.forget(entry.disk.id);
    }

    /// The disk has another path (relative to the mount), folder and file name now. Its HRLs move
    /// with it, durably; so the caller makes the new path durable after this.
    pub fn rename_disk(&self, id: DiskId, path: PathBuf, folder: File, file_name: OsString) -> Result<()> {
        let mut book = lock(&self.book);
        let epoch = self.shared.word().epoch();
        let entry = book.entries.get_mut(&id).ok_or_else(|| unknown_disk(id))?;
        let folder = Arc::new(folder);
        let moved = entry
            .hrls
            .iter_mut()
            .chain(&mut entry.retired)
            .try_for_each(|h| h.move_to(&folder, &file_name, id));
        let before = {
            let mut place = lock(&entry.disk.place);
            place.path.clone_from(&path);
            place.file_name = file_name;
            std::mem::replace(&mut place.folder, folder.clone())
        };
        let synced = || before.sync_all().and_then(|()| folder.sync_all());
        let moved = moved
            .and_then(|()| synced().map_err(|e| Error::io("a change-tracking log may be in two folders", e)));
        if let Err(e) = moved {
            log::warn!("disk {}: {e}", path.display());
            // Where this fails, shared memory says that the disk ships whole, and it is tried again.
            if let Err(e) = entry.lost_hrls(epoch) {
                log::warn!("disk {}: {e}", path.display());
            }
        }
        let record = HrlRecord::Renamed { path: path.to_string_lossy().into_owned() };
        if let Some(Err(e)) = entry.try_hrl(epoch).map(|h| h.append(&record)) {
            log::warn!("disk {}: {e}", path.display());
        }
        self.note_record(&book);
        Ok(())
    }

    /// The image header names another backing file now.
    pub fn set_backing(&self, id: DiskId, backing: Option<String>) {
        if let Some(disk) = self.disk(id) {
            lock(&disk.place).backing = backing;
        }
    }

    /// Unprotects: HRLs, shared memory and marks on the disk files are removed.
    pub fn forget(&self) -> Result<()> {
        let mut book = lock(&self.book);
        for entry in std::mem::take(&mut book.entries).into_values() {
            self.forget_entry(&entry);
        }
        self.disks.write().unwrap_or_else(std::sync::PoisonError::into_inner).clear();
        self.shared.shm.unlink();
        VmRecord::remove(&self.state_dir, self.shared.id);
        Ok(())
    }

    /// Writes the marks of the current and the frozen epoch into the HRL files.
    pub fn flush(&self) -> Result<()> {
        let mut book = lock(&self.book);
        let word = self.shared.word();
        book.entries.values_mut().try_for_each(|entry| {
            entry.append_map(word.epoch())?;
            if word.previous() == Previous::Frozen { entry.append_map(word.epoch() - 1) } else { Ok(()) }
        })
    }

    /// Last flush, synced, with a record of size, mtime, ctime and inode of each disk, so that
    /// the next start can trust the HRLs alone. The filter must not call the disks any more.
    pub fn stop_clean(&self) -> Result<()> {
        let mut book = lock(&self.book);
        let word = self.shared.word();
        let mut stopped = Vec::new();
        for entry in book.entries.values_mut() {
            let disk = entry.disk.clone();
            disk.sync()
                .map_err(|e| Error::io(format!("disk {} cannot be synced", disk.path().display()), e))?;
            entry.hrl(word.epoch())?.append(&HrlRecord::Stopped)?;
            entry.make_durable(word)?;
            let hot = disk.regions.hot_ranges();
            hot.iter().cloned().flatten().for_each(|r| disk.regions.clear_hot(r));
            self.shared.hot.cool(&disk.regions, hot, self.shared.hot.last_activation());
            if entry.unlogged.is_empty() && !disk.regions.untracked.load(SeqCst) {
                stopped.push(DiskStat::of(disk.id, &disk.lower)?);
            }
        }
        self.write_record(&mut book, word.epoch(), Some(stopped))
    }

    /// Writes the record with numbers reserved above `epoch`.
    pub(crate) fn write_record(
        &self,
        book: &mut Book,
        epoch: u64,
        stopped: Option<Vec<DiskStat>>,
    ) -> Result<()> {
        let (log, generation) = self.shared.hot.identity();
        let mut record = VmRecord {
            ceiling: epoch + CEILING_STEP,
            stopped,
            hot_log: Some(HotIdentity { log: format!("{log:032x}"), generation }),
            files: book.entries.values().map(|e| file_of(&e.disk)).collect::<Result<_>>()?,
            ..VmRecord::default()
        };
        record.write(&self.state_dir, self.shared.id)?;
        book.ceiling = record.ceiling;
        Ok(())
    }

    /// Epoch numbers go on above `epoch` (the vault's head, when it is not known here). Nothing
    /// may be frozen. A multiple of three is added, so that every map keeps its place.
    pub fn advance_beyond(&self, epoch: EpochNumber) -> Result<()> {
        let mut book = lock(&self.book);
        let word = self.shared.word();
        if word.epoch() > epoch.0 {
            return Ok(());
        }
        if word.previous() == Previous::Frozen {
            return Err(Error::new(ErrorKind::Busy, "epoch numbers cannot advance").why("an epoch is frozen"));
        }
        if word.previous() == Previous::GaveUp && book.given_up.is_none() {
            book.complete_give_up(word.epoch() - 1);
        }
        let new = word.epoch() + (epoch.0 + 1 - word.epoch()).next_multiple_of(3);
        self.write_record(&mut book, new, None)?;
        self.shared.gate.cut(self.shared.epoch_field(), || Some(EpochWord::new(new, word.previous())));
        book.entries.values_mut().for_each(|entry| {
            entry.try_hrl(new);
        });
        Ok(())
    }

    /// Histogram of the time spent in [`crate::core::ports::tracking::TrackedDisk::begin`].
    pub fn latency(&self) -> LatencyFigures {
        let (buckets, max_ns) = self.shared.latency.read();
        LatencyFigures { buckets, max_ns }
    }

    /// Epochs that gave up their cut.
    pub fn give_ups(&self) -> GiveUps {
        lock(&self.shared.give_ups).clone()
    }

    /// What the start-up table decided.
    pub fn recovered(&self) -> Vec<RecoveredDisk> {
        self.recovered.clone()
    }

    /// The disks as of the cut of `epoch`, as shared memory has it.
    pub(crate) fn cut_of(&self, book: &Book, epoch: u64) -> Cut {
        let map = EpochWord::map_of(epoch);
        let time = self.shared.shm.field(VM_CUT_TIME + map).load(SeqCst);
        let was_there = |e: &&Entry| e.disk.maps.shm().field(DISK_SINCE).load(SeqCst) <= epoch;
        let of = |entry: &Entry| {
            let place = lock(&entry.disk.place).clone();
            CutDisk {
                id: entry.disk.id,
                path: place.path,
                size: entry.disk.maps.shm().field(DISK_CUT_SIZE + map).load(SeqCst),
                whole: entry.whole_at(epoch).is_some(),
                backing: place.backing,
            }
        };
        Cut {
            epoch: EpochNumber(epoch),
            time: Timestamp(time as i64),
            disks: book.entries.values().filter(was_there).map(of).collect(),
        }
    }

    /// Ends the current epoch; see `Source::cut`.
    pub(crate) fn make_cut(&self, kind: CutKind, unmade: &BlocksByDisk, patience: Duration) -> Result<Cut> {
        let begun = Instant::now();
        let epoch = self.shared.word().epoch();
        // T2: the next map was that of epoch - 2. Its writers and those of epoch - 1, who preserve
        // for it, must have left.
        if !self.shared.gate.wait_writers(&[epoch + 1, epoch + 2], patience) {
            return Err(busy("writers of the epoch before have not left yet"));
        }
        let mut book = lock(&self.book);
        let word = self.shared.word();
        match word.previous() {
            Previous::Frozen => return Err(busy("an epoch is frozen and not acknowledged")),
            // A give-up that nobody has completed.
            Previous::GaveUp if book.given_up.is_none() => book.complete_give_up(epoch - 1),
            _ => {}
        }
        if book.entries.values().any(|e| !e.attached) {
            return Err(busy("a disk is on its way into the write path"));
        }
        // Of a whole disk the vault keeps only what has a part: the shipper must know that it is one.
        let is_unknown = |e: &Entry| e.whole_at(epoch).is_some() && !e.whole_shown;
        if kind == CutKind::Final && book.entries.values().any(is_unknown) {
            return Err(busy("a disk ships whole since a moment ago"));
        }
        if epoch + 2 >= book.ceiling {
            self.write_record(&mut book, epoch + 2, None)?;
        }
        self.prepare(&mut book, kind, unmade, epoch)?;
        self.store_cut(&book, kind, epoch, patience.saturating_sub(begun.elapsed()))?;
        book.given_up = None;
        let cut = self.cut_of(&book, epoch);
        for disk in &cut.disks {
            let Some(entry) = book.entries.get_mut(&disk.id) else { continue };
            entry.syncs_at_drain = u64::MAX;
            let record = HrlRecord::Cut { time: cut.time, size: disk.size };
            let done = entry.append_map(epoch).and_then(|()| entry.hrl(epoch)?.append(&record));
            if let Err(e) = done {
                log::warn!("disk {}: {e}", disk.path.display());
            }
        }
        if kind == CutKind::Live {
            book.complete_give_up(epoch);
        }
        book.cut = Some(cut.clone());
        Ok(cut)
    }

    /// Everything that the next epoch needs, before the instant of the cut.
    fn prepare(&self, book: &mut Book, kind: CutKind, unmade: &BlocksByDisk, epoch: u64) -> Result<()> {
        lock(&self.shared.preserves).clear();
        for (id, entry) in &mut book.entries {
            let disk = entry.disk.clone();
            if !disk.mark_lost(epoch) {
                return Err(no_room());
            }
            disk.maps.clear(EpochWord::map_of(epoch + 1));
            if kind == CutKind::Final {
                for blocks in unmade.get(id).into_iter().flat_map(|set| set.iter()) {
                    let ready = disk.maps.ensure(blocks.clone()).is_ok();
                    if !ready || !disk.maps.mark(EpochWord::map_of(epoch), blocks) {
                        return Err(no_room());
                    }
                }
                let size = disk.lower.metadata().map_or(0, |m| m.len());
                let store = entry.try_hrl(epoch).map(|h| h.file().clone());
                let memory = &self.shared.memory;
                let store = store.map(|file| Arc::new(Preserve::new(epoch, file, memory.clone(), size)));
                lock(&self.shared.preserves).extend(store.clone());
                *lock(&disk.preserve[EpochWord::map_of(epoch)]) = store;
            }
            entry.try_hrl(epoch + 1);
        }
        Ok(())
    }

    /// T1 and T10: the store, at an instant when nobody is inside step 2 and no truncation runs.
    fn store_cut(&self, book: &Book, kind: CutKind, epoch: u64, patience: Duration) -> Result<()> {
        let begun = Instant::now();
        let previous = if kind == CutKind::Final { Previous::Frozen } else { Previous::GaveUp };
        let map = EpochWord::map_of(epoch);
        let disks: Vec<_> = book.entries.values().map(|e| e.disk.clone()).collect();
        let mut lost = false;
        loop {
            let left = patience.saturating_sub(begun.elapsed());
            let none_truncates = || self.shared.truncations.load(SeqCst) == 0;
            if !self.shared.gate.wait_left(left, none_truncates) {
                return Err(busy("a truncation runs"));
            }
            let done = self.shared.gate.cut(self.shared.epoch_field(), || {
                lost = disks.iter().any(|d| d.has_lost_marks());
                if lost || !none_truncates() {
                    return None;
                }
                for disk in &disks {
                    let size = disk.lower.metadata().map_or(0, |m| m.len());
                    disk.maps.shm().field(DISK_CUT_SIZE + map).store(size, SeqCst);
                }
                let time = self.shared.clock.now().0 as u64;
                self.shared.shm.field(VM_CUT_TIME + map).store(time, SeqCst);
                Some(EpochWord::new(epoch + 1, previous))
            });
            if done {
                return Ok(());
            }
            if lost {
                return Err(no_room());
            }
        }
    }

    /// What the cooler does for a disk (T6): clears bits, waits for the writers that saw them,
    /// syncs the disk, makes the maps durable, logs *cold* with the activation's number.
    pub(crate) fn cool(&self, disk: &Arc<Disk>, idle: &[u64]) -> bool {
        let regions = &disk.regions;
        idle.iter().for_each(|r| regions.clear_hot(*r));
        let number = self.shared.hot.last_activation();
        let is_broken = disk.breaks(super::canary::Rule::T6);
        let durable = || {
            let mut book = lock(&self.book);
            let word = self.shared.word();
            book.entries.get_mut(&disk.id).is_some_and(|entry| match entry.make_durable(word) {
                Ok(()) => true,
                Err(e) => {
                    log::warn!("disk {}: {e}", disk.path().display());
                    false
                }
            })
        };
        let ranges = super::regions::ranges_of(idle.iter().copied());
        let may_cool =
            is_broken || (regions.pins.wait_all(Duration::from_secs(1)) && disk.sync().is_ok() && durable());
        if !may_cool {
            // The log still says that they are hot, so the bits may be set again.
            ranges.into_iter().for_each(|r| regions.set_hot(r));
            return false;
        }
        self.shared.hot.cool(regions, ranges, number)
    }
}

/// Which file a disk is.
fn file_of(disk: &Disk) -> Result<DiskFile> {
    Ok(DiskFile { id: disk.id, inode: DiskStat::of(disk.id, &disk.lower)?.inode() })
}

/// Shared memory says which file the disk is.
pub(crate) fn note_file(disk: &Disk) -> Result<()> {
    disk.maps.shm().field(DISK_INODE).store(file_of(disk)?.inode, SeqCst);
    Ok(())
}

fn unknown_disk(id: DiskId) -> Error {
    Error::new(ErrorKind::NotFound, format!("there is no disk {id}"))
}

fn no_room() -> Error {
    Error::new(ErrorKind::NoSpace, "there is no room in shared memory for marks")
        .hint("make room in /dev/shm")
}

fn busy(why: &str) -> Error {
    Error::new(ErrorKind::Busy, "the cut cannot be made yet").why(why)
}

/// Removes HRLs that an earlier protection left beside a disk.
pub(crate) fn discard_hrls(spec: &DiskSpec) {
    for found in super::hrl::find(&spec.folder, spec.id).into_iter().flatten() {
        super::hrl::discard(&spec.folder, &found);
    }
}
