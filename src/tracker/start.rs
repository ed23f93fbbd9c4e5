//! Opening a VM: facts are gathered, the start-up table (`core::recovery`) decides for each disk,
//! and book, maps and epoch word are set up accordingly.
//!
//! Killed in here, or failed: the next start finds the same facts again. What it would find them
//! by goes only after something as durable says the same: first the HRL that has what is pending,
//! then the old HRLs, the record of a clean stop and the untracked mark, at last the sign of life
//! and the word without which the VM's memory counts for nothing (`VM_READY`). Where memory counts
//! already, it says that a disk ships whole before the first of these steps.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, RwLock};

use super::book::{Book, Entry};
use super::canary::Mutation;
use super::disk::{Disk, DiskSpec};
use super::gate::{EpochWord, Gate, Previous};
use super::hot::{HotFound, HotLog};
use super::hrl::{HrlFound, discard, find};
use super::latency::Histogram;
use super::map::{BlockState, DiskMaps};
use super::preserve::Preserve;
use super::preserve_memory::PreserveMemory;
use super::record::{DiskStat, VmRecord};
use super::shared::VmShared;
use super::shm::{
    DISK_CUT_SIZE, DISK_INODE, DISK_LOST, DISK_SINCE, DISK_WHOLE, Shm, ShmNames, VM_EPOCH, VM_HEARTBEAT,
    VM_READY, VM_RECORDS, VM_TRACKING, clear_untracked, has_untracked,
};
use super::vm::{GiveUps, RecoveredDisk, VmTracker, discard_hrls, note_file};
use crate::base::{BLOCK_BYTES, BootId, Clock, Error, ErrorKind, REGION_BYTES, Result, Timestamp, VmId};
use crate::core::recovery::{
    HotLogState, LastStop, SharedMemory, StartDecision, StartFacts, VaultHead, decide,
};
use crate::format::hrl::HrlRecord;

/// A disk modified so much later than the last sign of life was changed beneath.
const HEARTBEAT_GRACE_MS: i64 = 3000;

/// What a VM is opened with.
pub(crate) struct Surroundings<'a> {
    pub(crate) state_dir: &'a Path,
    pub(crate) boot: BootId,
    pub(crate) boot_began: Timestamp,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) hot: Arc<HotLog>,
    pub(crate) names: &'a ShmNames,
    pub(crate) memory: &'a Arc<PreserveMemory>,
}

/// A disk with what was found about it.
struct Found {
    spec: DiskSpec,
    shm: Shm,
    is_new_shm: bool,
    hrls: Vec<HrlFound>,
    label: &'static str,
    reason: &'static str,
    decision: StartDecision,
}

/// Opens an object; one with an unknown layout is replaced.
fn open_shm(open: impl Fn() -> Result<(Shm, bool)>, path: &dyn Fn()) -> Result<(Shm, SharedMemory)> {
    match open() {
        Ok((shm, true)) => Ok((shm, SharedMemory::Present)),
        Ok((shm, false)) => Ok((shm, SharedMemory::Absent)),
        Err(e) if e.kind() == ErrorKind::Version => {
            log::warn!("{e}");
            path();
            Ok((open()?.0, SharedMemory::UnknownLayout))
        }
        Err(e) => Err(e),
    }
}

/// The state of the hot-region log, held against the record.
fn hot_log_state(hot: &HotLog, record: Option<&VmRecord>) -> HotLogState {
    let HotFound::Good { log, generation } = hot.state() else { return HotLogState::Missing };
    // Without the record nothing says which log was in use.
    let Some(record) = record else { return HotLogState::Missing };
    match record.hot_log.as_ref() {
        Some(known) if known.log != format!("{log:032x}") => HotLogState::Foreign,
        Some(known) if known.generation > generation => HotLogState::Older,
        _ => HotLogState::Good,
    }
}

/// Opens a VM; see `Tracker::open_vm`.
pub(crate) fn open_vm(
    around: &Surroundings<'_>,
    id: VmId,
    specs: Vec<DiskSpec>,
    fresh: bool,
) -> Result<Arc<VmTracker>> {
    let record = VmRecord::read(around.state_dir, id)?;
    if fresh {
        around.names.remove('v', id.0);
    }
    let (shm, vm_memory) = open_shm(|| Shm::vm(around.names, id.0), &|| around.names.remove('v', id.0))?;
    let is_ready = shm.field(VM_READY).load(SeqCst) != 0;
    let vm_memory =
        if vm_memory == SharedMemory::Present && !is_ready { SharedMemory::Absent } else { vm_memory };
    let heartbeat = shm.field(VM_HEARTBEAT).load(SeqCst) as i64;
    let mut disks = Vec::new();
    for spec in specs {
        disks.push(examine(around, spec, fresh, vm_memory, heartbeat, record.as_ref())?);
    }
    let goes_on = vm_memory == SharedMemory::Present;
    let ceiling = record.as_ref().map_or(0, |r| r.ceiling);
    let newest = disks.iter().flat_map(|d| &d.hrls).filter_map(|h| h.report.as_ref());
    let newest = newest.map(|r| r.header.epoch.0).max().unwrap_or(0);
    if !goes_on {
        // The unfinished epoch and its number are abandoned: one for what was found, then the
        // current one.
        let epoch = if fresh && ceiling == 0 { 1 } else { ceiling.max(newest + 1) + 1 };
        shm.field(VM_RECORDS).store(epoch, SeqCst);
        shm.field(VM_EPOCH).store(EpochWord::new(epoch, Previous::Forgotten).0, SeqCst);
    }
    let shared = Arc::new(VmShared {
        id,
        boot: around.boot,
        clock: around.clock.clone(),
        gate: Gate::new(Mutation::from_environment()),
        shm,
        hot: around.hot.clone(),
        truncations: AtomicU64::new(0),
        latency: Histogram::default(),
        mutation: Mutation::from_environment(),
        give_ups: Mutex::new(GiveUps::default()),
        preserves: Mutex::new(Vec::new()),
        emptied: Mutex::default(),
        memory: around.memory.clone(),
    });
    let recovered =
        disks.iter().map(|d| RecoveredDisk { id: d.spec.id, label: d.label, reason: d.reason }).collect();
    let mut vm = VmTracker {
        shared,
        disks: RwLock::default(),
        book: Mutex::new(Book::default()),
        names: around.names.clone(),
        state_dir: around.state_dir.to_owned(),
        recovered,
    };
    set_up(&mut vm, disks)?;
    Ok(Arc::new(vm))
}

/// Gathers the facts of a disk and asks the table.
fn examine(
    around: &Surroundings<'_>,
    spec: DiskSpec,
    fresh: bool,
    vm_memory: SharedMemory,
    heartbeat: i64,
    record: Option<&VmRecord>,
) -> Result<Found> {
    if fresh {
        discard_hrls(&spec);
        around.names.remove('d', spec.id.0);
    }
    let id = spec.id.0;
    let (shm, memory) = open_shm(|| Shm::disk(around.names, id), &|| around.names.remove('d', id))?;
    let is_new_shm = memory != SharedMemory::Present;
    let shared_memory = match (vm_memory, memory) {
        (SharedMemory::Present, SharedMemory::Absent) => SharedMemory::UnknownLayout,
        (SharedMemory::Present, other) => other,
        (other, _) => other,
    };
    let stat = DiskStat::of(spec.id, &spec.lower)?;
    let stopped = record.and_then(|r| r.stopped.as_ref());
    let last_stop = match stopped.map(|s| s.contains(&stat)) {
        None => LastStop::Unclean,
        Some(true) if !spec.changed_beneath => LastStop::CleanAndSame,
        // A disk that the stop could not vouch for has no entry.
        Some(false) if stopped.is_some_and(|s| s.iter().all(|d| d.id != spec.id)) => LastStop::Unclean,
        Some(_) => LastStop::CleanButDiffers,
    };
    // Another file in its place, or one that was written to where nobody looked.
    let inode = shm.field(DISK_INODE).load(SeqCst);
    let file = record.and_then(|r| r.files.iter().find(|f| f.id == spec.id));
    let is_another = spec.changed_beneath
        || (inode != 0 && inode != stat.inode())
        || file.is_some_and(|f| f.inode != stat.inode());
    let lost = [DISK_WHOLE, DISK_LOST].iter().any(|f| shm.field(*f).load(SeqCst) != 0);
    let hrls = find(&spec.folder, spec.id);
    let facts = StartFacts {
        is_fresh: fresh,
        shared_memory,
        lost_with_process: lost,
        changed_beneath: is_another || stat.modified_ms() > heartbeat + HEARTBEAT_GRACE_MS,
        changed_since_boot: is_another || stat.modified_ms() > around.boot_began.0,
        last_stop,
        is_untracked: has_untracked(&spec.lower),
        hot_log: hot_log_state(&around.hot, record),
        hrls_readable: hrls.as_ref().is_ok_and(|all| all.iter().all(|h| h.report.is_some())),
        head: VaultHead::NotAsked,
    };
    let (label, reason, decision) = decide(&facts);
    log::info!("disk {}: {label}: {reason}", spec.path.display());
    Ok(Found { spec, shm, is_new_shm, hrls: hrls.unwrap_or_default(), label, reason, decision })
}

/// Sets book, maps and epoch word up.
fn set_up(vm: &mut VmTracker, disks: Vec<Found>) -> Result<()> {
    let goes_on = disks.iter().all(|d| d.decision == StartDecision::GoOn);
    let give_up = |vm: &VmTracker| {
        let word = vm.shared.word();
        if word.previous() == Previous::Frozen {
            let reason = "saved content was known to the dead process only";
            vm.shared.announce_give_up(word.epoch() - 1, reason, 0);
        }
    };
    // Before anything of a frozen epoch is cleared.
    if !goes_on {
        give_up(vm);
    }
    let word = vm.shared.word();
    if !goes_on || vm.shared.shm.field(VM_TRACKING).load(SeqCst) == 0 {
        vm.shared.renew_tracking_id();
    }
    let mut book = Book::default();
    let mut must_give_up = false;
    let mut anew = Vec::new();
    for found in disks {
        if found.decision != StartDecision::GoOn {
            anew.push(found.spec.id);
        }
        let entry = open_disk(vm, found, word, &mut must_give_up)?;
        vm.disks
            .get_mut()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .insert(entry.disk.id, entry.disk.clone());
        book.entries.insert(entry.disk.id, entry);
    }
    if must_give_up {
        give_up(vm);
    }
    if vm.shared.word().previous() == Previous::GaveUp {
        book.complete_give_up(word.epoch() - 1);
    }
    // The clean stop is over, durably, and numbers are reserved, before the first write.
    vm.write_record(&mut book, word.epoch(), None)?;
    for entry in book.entries.values() {
        if anew.contains(&entry.disk.id) {
            // The mark has been taken account of, durably, by what is pending now.
            clear_untracked(&entry.disk.lower).map_err(|e| Error::io("the untracked mark stays", e))?;
            entry.disk.maps.shm().field(DISK_LOST).store(0, SeqCst);
        }
        note_file(&entry.disk)?;
    }
    vm.shared.shm.field(VM_HEARTBEAT).store(vm.shared.clock.now().0 as u64, SeqCst);
    vm.shared.shm.field(VM_READY).store(1, SeqCst);
    vm.book = Mutex::new(book);
    Ok(())
}

/// Opens one disk as decided.
fn open_disk(vm: &VmTracker, found: Found, word: EpochWord, must_give_up: &mut bool) -> Result<Entry> {
    let Found { spec, shm, is_new_shm, hrls, reason, decision, .. } = found;
    if decision == StartDecision::Whole {
        shm.field(DISK_WHOLE).fetch_max(word.epoch(), SeqCst);
    }
    let is_untracked = decision == StartDecision::GoOn && has_untracked(&spec.lower);
    if is_new_shm || decision != StartDecision::GoOn {
        shm.field(DISK_SINCE).store(word.epoch(), SeqCst);
    }
    let disk = Arc::new(Disk::new(spec, vm.shared.clone(), DiskMaps::new(shm)?));
    let mut entry = Entry::new(disk.clone());
    let hot = vm.shared.hot.found(disk.id);
    hot.iter().for_each(|r| disk.regions.set_hot(r.clone()));
    disk.regions.untracked.store(is_untracked, SeqCst);
    // Maps that no epoch needs any more: a kill may have come before they were cleared.
    let epoch = word.epoch();
    let is_frozen = word.previous() != Previous::Forgotten;
    disk.maps.clear(EpochWord::map_of(epoch + 1));
    if !is_frozen || decision != StartDecision::GoOn {
        disk.maps.clear(EpochWord::map_of(epoch + 2));
    }
    match decision {
        StartDecision::Whole => {
            disk.maps.clear(EpochWord::map_of(epoch));
            entry.make_whole(epoch, reason);
            entry.sync_pending(epoch)?;
            let folder = super::sync::lock(&disk.place).folder.clone();
            hrls.iter().for_each(|h| discard(&folder, h));
        }
        StartDecision::GoOn => {
            adopt(&mut entry, hrls, word);
            if word.previous() == Previous::Frozen {
                *must_give_up |= !resume_frozen(&mut entry, epoch - 1);
            }
            entry.try_hrl(epoch);
            if is_untracked {
                heat_marked(&entry);
            }
            disk.regions.assume_unsynced();
        }
        StartDecision::Durable | StartDecision::DurableAndHot => {
            adopt(&mut entry, hrls, EpochWord::new(epoch, Previous::Forgotten));
            // Of an opening that failed, or was killed.
            disk.maps.clear(EpochWord::map_of(epoch));
            disk.maps.shm().field(DISK_LOST).store(0, SeqCst);
            if decision == StartDecision::DurableAndHot && !hot.is_empty() {
                let pending = entry.pending.entry(epoch - 1).or_default();
                let per_region = REGION_BYTES / BLOCK_BYTES;
                let ranges = hot.iter().map(|r| r.start * per_region..r.end * per_region);
                ranges.for_each(|r| pending.blocks.insert(r));
                entry.unlogged.insert(epoch - 1);
            }
            // What was hot stays hot until this is durable and the regions cool.
            entry.try_hrl(epoch);
            entry.make_durable(EpochWord::new(epoch, Previous::Forgotten))?;
        }
    }
    Ok(entry)
}

/// T8: what was written since the untracked mark was put on has no activation in the log. Its
/// regions become hot before the cooler can see the disk: the mark goes only once the log has
/// everything that is hot.
fn heat_marked(entry: &Entry) {
    let per_region = REGION_BYTES / BLOCK_BYTES;
    let maps = (0..3).map(|map| entry.disk.maps.blocks(map));
    for set in maps.chain(entry.pending.values().map(|p| p.blocks.clone())) {
        for blocks in set.iter() {
            entry.disk.regions.set_hot(blocks.start / per_region..blocks.end.div_ceil(per_region));
        }
    }
}

/// Takes over the HRLs that were found. Those of epochs that are over are pending; that of the
/// current one only for what is no map, because its map is in shared memory.
fn adopt(entry: &mut Entry, hrls: Vec<HrlFound>, word: EpochWord) {
    let folder = super::sync::lock(&entry.disk.place).folder.clone();
    for (file, report) in hrls.into_iter().filter_map(|h| h.adopt(&folder)) {
        let epoch = report.header.epoch.0;
        let is_frozen = word.previous() == Previous::Frozen && epoch + 1 == word.epoch();
        let is_over = epoch < word.epoch() && !is_frozen;
        let ranges: bool = report.records.iter().any(|r| matches!(r, HrlRecord::Range { .. }));
        if (is_over || ranges) && !report.blocks.is_empty() {
            entry.pending.entry(epoch).or_default().blocks.union_with(&report.blocks);
        }
        if let Some(reason) = report.whole() {
            entry.pending.entry(epoch).or_default().whole = Some(reason.to_owned());
        }
        // A file with a torn tail is kept, and not appended to.
        if report.damaged.is_empty() && !entry.hrls.iter().any(|h| h.epoch == epoch) {
            entry.hrls.push(file);
        } else {
            entry.retired.push(file);
        }
    }
}

/// Goes on with a frozen epoch (T4). `false`: old content was saved, and where is known to the
/// dead process only.
fn resume_frozen(entry: &mut Entry, epoch: u64) -> bool {
    let disk = entry.disk.clone();
    let map = EpochWord::map_of(epoch);
    if disk.maps.has_state(map, BlockState::Preserved) {
        return false;
    }
    let size = disk.maps.shm().field(DISK_CUT_SIZE + map).load(SeqCst);
    let file = entry.try_hrl(epoch).map(|h| h.file().clone());
    let memory = &disk.vm.memory;
    let store = file.map(|file| Arc::new(Preserve::new(epoch, file, memory.clone(), size)));
    super::sync::lock(&disk.vm.preserves).extend(store.clone());
    *super::sync::lock(&disk.preserve[map]) = store;
    true
}
