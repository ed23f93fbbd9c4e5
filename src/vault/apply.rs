//! Applying an epoch (A1), and the thread that does it.
//!
//! ```text
//!  received --verify, reserve--> undo log durable --state.json: applying--> published in memory
//!                                                                                  |
//!  applied  <--state.json: applied, point-- synced <--holes-- sizes <--blocks------+
//! ```
//!
//! What if we are killed here? Before *applying* nothing was changed and all is done again. After
//! it the undo log is complete and is never taken again: it would save new content as old. The
//! blocks are written once more; that is the same bytes. What if the disk is full here? Room is
//! reserved before the undo log is taken; if there is none the epoch waits in the inbox, and
//! `last_error` says so. An error of a sync latches ([`VmStore::latch`]).

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::time::Duration;

use super::diskfile::{DiskFile, Stored};
use super::layout::{make_dir, remove_dir, remove_file};
use super::plan::{DiskPlan, EpochPlan, Owner};
use super::steps::{self, Steps};
use super::store::{PointRecord, VmStore, head_of, lock, read_manifest};
use super::undolog::UndoLog;
use crate::base::durable::sync_dir;
use crate::base::error::Context;
use crate::base::limits::{FRAME_BYTES_MAX, PART_BYTES_MAX};
use crate::base::{BLOCK_BYTES, Digest, EpochNumber, Error, ErrorKind, ExtentSet, Result};
use crate::format::part::PartReader;
use crate::format::undo::{UndoDisk, UndoMeta, UndoWriter};
use crate::format::vaultstate::{AppliedEpoch, StoredManifest};

/// Old content is read and saved in pieces of so many bytes.
const SAVE_BYTES: u64 = 1 << 20;
/// Left free beside what an epoch needs: for the metadata of the file system.
const SPARE_BYTES: u64 = 1 << 20;
/// An apply that failed is tried again after this, doubled up to [`RETRY_MS_MAX`].
const RETRY_MS: u64 = 100;
const RETRY_MS_MAX: u64 = 10_000;

/// Body of the thread `apply:VM`: applies what waits, in order, until the store stops.
pub(super) fn run(store: &VmStore) {
    let mut delay_ms = RETRY_MS;
    loop {
        let mut shared = lock(&store.shared);
        while !shared.is_stopping && (shared.queue.is_empty() || shared.latched.is_some()) {
            shared = store.changed.wait(shared).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
        if shared.is_stopping || store.steps.is_stopped() {
            store.changed.notify_all();
            return;
        }
        let Some(next) = shared.queue.front().map(|w| w.epoch) else { continue };
        let pokes = shared.pokes;
        drop(shared);
        let Err(error) = apply_next(store, next) else {
            delay_ms = RETRY_MS;
            continue;
        };
        let mut shared = lock(&store.shared);
        let text = error.to_string();
        if shared.last_error.as_deref() != Some(&text) && !store.steps.is_stopped() {
            log::warn!("VM {}: epoch {next} waits in the inbox: {error}", store.id);
        }
        shared.last_error = Some(text);
        store.changed.notify_all();
        let wait = Duration::from_millis(delay_ms);
        delay_ms = (delay_ms * 2).min(RETRY_MS_MAX);
        let is_idle =
            |s: &mut super::store::Shared| !s.is_stopping && s.pokes == pokes && !store.steps.is_stopped();
        drop(store.changed.wait_timeout_while(shared, wait, is_idle));
    }
}

/// Applies the oldest epoch that waits (A1).
fn apply_next(store: &VmStore, epoch: EpochNumber) -> Result<()> {
    let _work = lock(&store.work);
    let stored = read_manifest(&store.dir.inbox_manifest(epoch))?;
    let (applied, applying) = {
        let doc = lock(&store.doc);
        (doc.applied, doc.applying)
    };
    let base = applied.ok_or_else(|| Error::new(ErrorKind::Internal, "an epoch waits without a point"))?;
    if stored.manifest.parent != Some(base.digest) {
        return Err(Error::new(ErrorKind::ChainBroken, format!("epoch {epoch} cannot be applied"))
            .why(format!("its parent is not epoch {}, which the disks hold", base.epoch)));
    }
    let plan = EpochPlan::make(store, &stored)?;
    let log = UndoLog::new(store.dir.undo(epoch, base.epoch), epoch, base.epoch);
    if applying != Some(epoch) {
        verify_parts(store, &stored)?;
        reserve(&plan)?;
        if !steps::is_off("A1") {
            take_undo(store, &plan, &log)?;
        }
        store.commit_state(|s| s.applying = Some(epoch))?;
    }
    // A2: whoever reads from here on finds the old content in the log.
    store.push_log(Arc::clone(&log));
    write_epoch(store, &plan)?;
    if steps::is_off("A1") {
        take_undo(store, &plan, &log)?;
    }
    publish(store, &stored)
}

/// All parts are what the manifest says; those received in this run were verified then.
fn verify_parts(store: &VmStore, stored: &StoredManifest) -> Result<()> {
    for part in &stored.manifest.parts {
        if lock(&store.shared).verified.contains(&part.name) {
            continue;
        }
        let path = store.dir.part(stored.manifest.epoch, &part.name);
        let bytes = crate::base::durable::read_limited(&path, PART_BYTES_MAX)?.unwrap_or_default();
        if bytes.len() as u64 != part.length || Digest::of(&bytes) != part.name.digest {
            return Err(Error::new(ErrorKind::Damaged, format!("part {} is damaged", path.display()))
                .why("its bytes do not match its name")
                .hint("check the disks of the vault"));
        }
        lock(&store.shared).verified.insert(part.name);
    }
    Ok(())
}

/// Room for every write and for what undoes every write, cut and punch.
fn reserve(plan: &EpochPlan) -> Result<()> {
    let mut undo = 0;
    for d in &plan.disks {
        undo += d.replaced().total().min(d.disk.allocated()?);
    }
    for d in &plan.disks {
        let data: ExtentSet = d.owners.iter().filter(|(_, o)| plan.is_data(*o)).map(|(r, _)| r).collect();
        for range in data.iter() {
            d.disk.reserve(range)?;
        }
    }
    // A fortieth more: headers and index of the log.
    let needed = undo + undo / 40 + SPARE_BYTES;
    let Some(first) = plan.disks.first() else { return Ok(()) };
    let (free, _) = first.disk.room()?;
    if free < needed {
        return Err(Error::new(
            ErrorKind::NoSpace,
            "the vault has no room for the undo log of the next epoch",
        )
        .why(format!("{needed} bytes are needed and {free} are free"))
        .hint("make room on the file system of the vault, or keep fewer points: afterimage policy set"));
    }
    Ok(())
}

/// Saves what the epoch will replace; when this returns the log is durable under its name.
fn take_undo(store: &VmStore, plan: &EpochPlan, log: &UndoLog) -> Result<()> {
    let mut meta = UndoMeta { epoch: log.epoch, base: log.base, disks: Vec::new() };
    let mut out = LogFile::create(store, log)?;
    for d in &plan.disks {
        meta.disks.push(UndoDisk { id: d.disk.id, size: d.old_size });
        let mut seen = Stored::default();
        for range in d.replaced().iter() {
            save_range(&d.disk, &mut seen, range, &mut out)?;
        }
    }
    out.finish(store, &meta)
}

fn save_range(
    disk: &DiskFile,
    seen: &mut Stored,
    range: std::ops::Range<u64>,
    out: &mut LogFile,
) -> Result<()> {
    let mut at = range.start;
    let mut buffer = Vec::new();
    while at < range.end {
        let data = disk.next_stored(seen, at, range.end)?;
        let (start, end) = data.map_or((range.end, range.end), |d| (d.offset, d.end()));
        let (start, end) = (start.min(range.end), end.min(range.end));
        if at < start {
            out.writer.save_hole(disk.id, at, start - at)?;
        }
        at = start;
        while at < end {
            let length = (end - at).min(SAVE_BYTES);
            buffer.resize(length as usize, 0);
            disk.read(at, &mut buffer)?;
            save_verified(disk, at, &buffer, &mut out.writer)?;
            out.drain(SAVE_BYTES as usize)?;
            at += length;
        }
    }
    Ok(())
}

/// Saves content; blocks that do not match their checksum are marked, so that the points which
/// show them say so instead of showing something wrong.
fn save_verified(disk: &DiskFile, at: u64, content: &[u8], writer: &mut UndoWriter) -> Result<()> {
    let block = BLOCK_BYTES as usize;
    let sums = disk.read_sums(at, content.len() / block)?;
    if DiskFile::first_damaged(at, content, &sums).is_none() {
        return writer.save_data(disk.id, at, content);
    }
    for (n, (bytes, sum)) in content.chunks(block).zip(&sums).enumerate() {
        let offset = at + n as u64 * BLOCK_BYTES;
        if DiskFile::first_damaged(offset, bytes, &[*sum]).is_none() {
            writer.save_data(disk.id, offset, bytes)?;
        } else {
            log::error!("{}", disk.damaged(offset));
            writer.save_damaged(disk.id, offset, bytes)?;
        }
    }
    Ok(())
}

/// An undo log that is being written: under another name until it is whole.
pub(super) struct LogFile {
    pub writer: UndoWriter,
    file: File,
    temporary: std::path::PathBuf,
    path: std::path::PathBuf,
    steps: Arc<Steps>,
    is_finished: bool,
}

/// A log that did not become whole goes at once: its bytes are missed where there is no room.
impl Drop for LogFile {
    fn drop(&mut self) {
        if !self.is_finished
            && !self.steps.is_stopped()
            && let Err(e) = remove_file(&self.temporary)
        {
            log::warn!("vault: {e}");
        }
    }
}

impl LogFile {
    pub fn create(store: &VmStore, log: &UndoLog) -> Result<Self> {
        store.steps.step("create the undo log")?;
        let path = log.path().to_owned();
        let temporary = path.with_extension("new");
        let mut options = OpenOptions::new();
        let file = options.write(true).create(true).truncate(true).mode(0o600).open(&temporary);
        let file = file.context(|| format!("cannot create {}", temporary.display()))?;
        let steps = Arc::clone(&store.steps);
        Ok(Self { writer: UndoWriter::new(), file, temporary, path, steps, is_finished: false })
    }

    /// Writes out what waits, if that is `bytes` at least.
    pub fn drain(&mut self, bytes: usize) -> Result<()> {
        if self.writer.waiting() < bytes {
            return Ok(());
        }
        let written = self.file.write_all(&self.writer.take());
        written.context(|| format!("cannot write {}", self.temporary.display()))
    }

    /// Ends the log; it is durable under its name when this returns.
    pub fn finish(mut self, store: &VmStore, meta: &UndoMeta) -> Result<()> {
        let what = || format!("cannot write {}", self.temporary.display());
        let writer = std::mem::take(&mut self.writer);
        let written = self.file.write_all(&writer.finish(meta)?).and_then(|()| self.file.sync_all());
        written.context(what)?;
        store.steps.step("rename the undo log")?;
        fs::rename(&self.temporary, &self.path).context(what)?;
        self.is_finished = true;
        store.latch(sync_dir(&store.dir.points()))?;
        store.steps.step("undo log durable")
    }
}

/// Blocks, then sizes, then holes; then all is synced.
fn write_epoch(store: &VmStore, plan: &EpochPlan) -> Result<()> {
    let disks: BTreeMap<_, &DiskPlan> = plan.disks.iter().map(|d| (d.disk.id, d)).collect();
    let mut content = vec![0; FRAME_BYTES_MAX as usize];
    for (number, part) in plan.parts.iter().enumerate() {
        let bytes = crate::base::durable::read_limited(&part.path, PART_BYTES_MAX)?.unwrap_or_default();
        let reader = PartReader::new(&bytes)?;
        store.steps.step("write the blocks of a part")?;
        for (n, frame) in part.index.frames().iter().enumerate() {
            let Some(d) = disks.get(&frame.disk).filter(|_| !frame.encoding.is_empty()) else { continue };
            let me = Owner::Frame { part: number as u32, frame: n as u32 };
            let mut mine = d.owners.overlaps(frame.range()).filter(|(_, o)| *o == me).peekable();
            if mine.peek().is_none() {
                continue;
            }
            let content = content.get_mut(..frame.length as usize).unwrap_or_default();
            reader.read(frame, content)?;
            for (range, _) in mine {
                let from = (range.start - frame.offset) as usize;
                let to = (range.end - frame.offset) as usize;
                d.disk.write(range.start, content.get(from..to).unwrap_or_default(), d.size)?;
            }
        }
    }
    for d in &plan.disks {
        store.steps.step("set the size of a disk")?;
        d.disk.set_size(d.size)?;
    }
    for d in &plan.disks {
        let holes: ExtentSet = d.owners.iter().filter(|(_, o)| !plan.is_data(*o)).map(|(r, _)| r).collect();
        for range in holes.iter() {
            store.steps.step("punch a hole")?;
            d.disk.punch(range)?;
        }
    }
    for d in &plan.disks {
        store.steps.step("sync a disk")?;
        store.latch(d.disk.sync())?;
    }
    Ok(())
}

/// The epoch becomes a point by one commit of `state.json`.
fn publish(store: &VmStore, stored: &StoredManifest) -> Result<()> {
    let epoch = stored.manifest.epoch;
    add_point(store, stored)?;
    {
        let mut shared = lock(&store.shared);
        shared.queue.pop_front();
        shared.last_error = None;
        for part in &stored.manifest.parts {
            shared.verified.remove(&part.name);
        }
    }
    store.changed.notify_all();
    // The point is published: what cannot be tidied up now is when the vault is opened.
    let tidied = store.steps.step("remove the inbox of an applied epoch");
    if let Err(e) = tidied.and_then(|()| remove_dir(&store.dir.epoch(epoch))) {
        log::warn!("VM {}: {e}", store.id);
    }
    Ok(())
}

/// Makes the epoch, whose content the disks hold durably, the newest point.
pub(super) fn add_point(store: &VmStore, stored: &StoredManifest) -> Result<()> {
    let m = &stored.manifest;
    make_dir(&store.dir.points())?;
    store.write(&store.dir.point_manifest(m.epoch), &stored.encode()?, "stored manifest")?;
    let applied = AppliedEpoch { epoch: m.epoch, digest: stored.digest, cut_time: m.cut_time };
    store.commit_state(|s| {
        s.applying = None;
        s.applied = Some(applied);
        s.push_point(m.epoch);
    })?;
    let mut shared = lock(&store.shared);
    shared.points.push(PointRecord::new(stored, false));
    if shared.head.is_none() {
        shared.head = Some(head_of(m.epoch, stored.digest, m.cut_time));
    }
    Ok(())
}
