//! One VM of the vault: what is known in memory, and the locks around it.
//!
//! Locks, always taken in this order: `intake` (parts and commits), `work` (apply, expire, purge),
//! `doc` (`state.json`), then `shared`, `merged` and `chain` (memory only, never held over I/O).

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};

use super::firstcopy::FirstCopy;
use super::layout::{VmDir, VmFile};
use super::steps::Steps;
use super::undolog::{Merged, UndoLog};
use crate::base::durable::write_atomic;
use crate::base::{Clock, Digest, DiskId, EpochNumber, Error, ErrorKind, PointId, Result, Timestamp, VmId};
use crate::core::ports::points::PointInfo;
use crate::core::ports::vault::Head;
use crate::format::part::PartName;
use crate::format::vaultstate::{StoredManifest, VmState};

/// Merged indexes that are kept after the last reader is gone.
const MERGED_CACHED_MAX: usize = 8;
/// Ranges in all cached merged indexes together.
const MERGED_RANGES_MAX: usize = 1 << 20;

/// Locks even if a thread died while it held the lock: what the locks guard is replaced whole.
pub(super) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A committed epoch that waits to be applied.
#[derive(Clone, Debug)]
pub(super) struct Waiting {
    pub epoch: EpochNumber,
    pub bytes: u64,
}

/// A point that can be opened.
#[derive(Clone, Debug)]
pub(super) struct PointRecord {
    pub info: PointInfo,
    /// Its disks, for what must stay in `disks/`.
    pub disks: Arc<[DiskId]>,
}

impl PointRecord {
    pub fn new(stored: &StoredManifest, pinned: bool) -> Self {
        let m = &stored.manifest;
        let info = PointInfo {
            id: PointId::new(m.epoch, &stored.digest),
            time: m.cut_time,
            arrived: stored.arrived,
            kind: m.kind,
            consistency: m.consistency,
            pinned,
            changed_bytes: m.changed_bytes,
            size_bytes: m.disks.iter().map(|d| d.size).sum(),
        };
        Self { info, disks: m.disks.iter().map(|d| d.id).collect() }
    }

    pub fn epoch(&self) -> EpochNumber {
        self.info.id.epoch
    }
}

/// What is known in memory.
pub(super) struct Shared {
    pub file: VmFile,
    pub head: Option<Head>,
    pub queue: VecDeque<Waiting>,
    pub points: Vec<PointRecord>,
    /// Open readers per point.
    pub open: HashMap<EpochNumber, u32>,
    /// Why nothing moves, in words.
    pub last_error: Option<String>,
    /// After an error of a sync: nothing is acknowledged until the vault is opened again.
    pub latched: Option<String>,
    pub is_stopping: bool,
    /// Parts whose bytes were verified in this run.
    pub verified: HashSet<PartName>,
    pub current_as_of: Option<Timestamp>,
    /// Counts what may let a waiting apply go on.
    pub pokes: u64,
}

/// One VM of the vault.
pub(super) struct VmStore {
    pub id: VmId,
    pub dir: VmDir,
    pub clock: Arc<dyn Clock>,
    pub steps: Arc<Steps>,
    pub shared: Mutex<Shared>,
    pub changed: Condvar,
    pub doc: Mutex<VmState>,
    /// `Some`: a VM without points; its first epoch is applied as it arrives (A3).
    pub intake: Mutex<Option<FirstCopy>>,
    pub work: Mutex<()>,
    /// The folder is another's now: the vault was opened anew, or the VM purged.
    pub is_closed: AtomicBool,
    chain: RwLock<Arc<Vec<Arc<UndoLog>>>>,
    published: AtomicU64,
    merged: Mutex<Vec<(EpochNumber, Merged)>>,
}

impl VmStore {
    pub fn new(
        dir: VmDir,
        clock: Arc<dyn Clock>,
        steps: Arc<Steps>,
        shared: Shared,
        doc: VmState,
        intake: Option<FirstCopy>,
        chain: Vec<Arc<UndoLog>>,
    ) -> Self {
        let published = chain.last().map_or(0, |log| log.epoch.0);
        Self {
            id: shared.file.id,
            dir,
            clock,
            steps,
            shared: Mutex::new(shared),
            changed: Condvar::new(),
            doc: Mutex::new(doc),
            intake: Mutex::new(intake),
            work: Mutex::new(()),
            is_closed: AtomicBool::new(false),
            chain: RwLock::new(Arc::new(chain)),
            published: AtomicU64::new(published),
            merged: Mutex::default(),
        }
    }

    /// Refuses once this is not the store of its folder any more.
    pub fn check_open(&self) -> Result<()> {
        if !self.is_closed.load(Ordering::SeqCst) {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Io, format!("VM {} of the vault cannot be used", self.id))
            .why("the vault was opened anew meanwhile, or the VM was purged")
            .hint("open the point again: afterimage point mount, afterimage points NAME"))
    }

    /// Refuses once a sync has failed: what the kernel still has of the file is unknown.
    pub fn check_latch(&self) -> Result<()> {
        self.check_open()?;
        match &lock(&self.shared).latched {
            None => Ok(()),
            Some(why) => {
                Err(Error::new(ErrorKind::Io, format!("VM {} of the vault takes nothing more", self.id))
                    .why(format!("an earlier sync failed: {why}"))
                    .hint("check the disks of the vault, then restart the daemon"))
            }
        }
    }

    /// Passes a result of a sync through; an error latches. ENOSPC does not: nothing is lost.
    pub fn latch<T>(&self, result: Result<T>) -> Result<T> {
        if let Err(e) = &result
            && !matches!(e.kind(), ErrorKind::NoSpace | ErrorKind::Cancelled)
        {
            log::error!("VM {}: {e}; nothing is acknowledged until the vault is opened again", self.id);
            let mut shared = lock(&self.shared);
            shared.latched.get_or_insert_with(|| e.to_string());
            shared.last_error = Some(e.to_string());
        }
        result
    }

    /// Replaces a document, durably.
    pub fn write(&self, path: &Path, bytes: &[u8], what: &'static str) -> Result<()> {
        self.steps.step(what)?;
        self.latch(write_atomic(path, bytes))?;
        self.steps.step(what)
    }

    /// One commit of `state.json`: what `change` makes of it is published when this returns.
    pub fn commit_state(&self, change: impl FnOnce(&mut VmState)) -> Result<()> {
        let mut doc = lock(&self.doc);
        self.check_open()?;
        let mut next = doc.clone();
        change(&mut next);
        self.write(&self.dir.state_file(), &next.encode()?, "state.json")?;
        *doc = next;
        Ok(())
    }

    /// The published undo logs, ascending.
    pub fn chain(&self) -> Arc<Vec<Arc<UndoLog>>> {
        Arc::clone(&self.chain.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// The newest epoch whose undo log is published (A2). It is stored after the chain has the
    /// log and before the first block is overwritten.
    pub fn published(&self) -> EpochNumber {
        EpochNumber(self.published.load(Ordering::SeqCst))
    }

    /// Publishes the undo log of a newer epoch (A2).
    pub fn push_log(&self, log: Arc<UndoLog>) {
        let epoch = log.epoch.0;
        let mut chain = self.chain.write().unwrap_or_else(PoisonError::into_inner);
        let mut next = chain.as_ref().clone();
        if next.last().is_none_or(|newest| newest.epoch < log.epoch) {
            next.push(log);
        }
        *chain = Arc::new(next);
        self.published.store(epoch, Ordering::SeqCst);
    }

    /// Replaces the chain after points were dropped. Cached indexes may have been made for points
    /// that are no boundary any more, so they go.
    pub fn set_chain(&self, chain: Vec<Arc<UndoLog>>) {
        let mut cached = lock(&self.merged);
        *self.chain.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(chain);
        cached.clear();
    }

    /// The merged index of a point, from what is cached where that helps.
    pub fn merged(&self, point: EpochNumber) -> Result<Merged> {
        // Chain and index are taken together: what is cached was made for boundaries of this chain
        // or, where points went while it was made, is not used.
        let (chain, nearest) = {
            let cached = lock(&self.merged);
            let chain = self.chain();
            let is_boundary = |p: EpochNumber| p == point || chain.iter().any(|log| log.epoch == p);
            let newer = cached.iter().filter(|(p, _)| *p >= point && is_boundary(*p));
            let nearest = newer.min_by_key(|(p, _)| *p).cloned();
            (chain, nearest)
        };
        let mut merged = match nearest {
            Some((p, m)) => {
                let from = chain.partition_point(|log| log.epoch <= point);
                let to = chain.partition_point(|log| log.epoch <= p);
                m.extend_back(chain.get(from..to).unwrap_or_default())?
            }
            None => Merged::new(point),
        };
        merged.extend(&chain)?;
        let mut cached = lock(&self.merged);
        cached.retain(|(p, _)| *p != point);
        cached.push((point, merged.clone()));
        while cached.len() > MERGED_CACHED_MAX
            || cached.iter().map(|(_, m)| m.weight()).sum::<usize>() > MERGED_RANGES_MAX
        {
            cached.remove(0);
        }
        Ok(merged)
    }

    /// The disks of every point.
    pub fn needed_disks(&self) -> BTreeSet<DiskId> {
        lock(&self.shared).points.iter().flat_map(|p| p.disks.iter().copied()).collect()
    }

    /// The epoch and digest that the next manifest must name as its parent.
    pub fn head(&self) -> Option<Head> {
        lock(&self.shared).head
    }

    /// Wakes whoever waits for this VM.
    pub fn poke(&self) {
        lock(&self.shared).pokes += 1;
        self.changed.notify_all();
    }

    /// The stored manifest of a point.
    pub fn read_point(&self, epoch: EpochNumber) -> Result<StoredManifest> {
        read_manifest(&self.dir.point_manifest(epoch))
    }
}

/// Reads a stored manifest.
pub(super) fn read_manifest(path: &Path) -> Result<StoredManifest> {
    let bytes = crate::base::durable::read_limited(path, crate::base::limits::DOCUMENT_BYTES_MAX)?;
    let bytes =
        bytes.ok_or_else(|| Error::new(ErrorKind::NotFound, format!("no file {}", path.display())))?;
    StoredManifest::decode(&bytes)
}

/// Digest of a manifest as a head.
pub(super) const fn head_of(epoch: EpochNumber, digest: Digest, cut_time: Timestamp) -> Head {
    Head { epoch, digest, cut_time }
}
