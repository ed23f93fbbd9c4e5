//! Dropping points (A4): the oldest ones with their undo logs; one in the middle by merging its log
//! into the next newer one.
//!
//! What if we are killed here? The merged log is durable under its own name before `state.json`,
//! which alone says between which points logs lead, is replaced. Before that commit the merged log
//! is a leftover, after it the old ones are; leftovers are removed when the vault is opened. What if
//! the disk is full here? The oldest points are dropped first, which needs no room; a merge that
//! finds none leaves everything as it was.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::apply::LogFile;
use super::layout::{remove_disks_except, remove_file};
use super::store::{PointRecord, VmStore, lock, read_manifest};
use super::undolog::UndoLog;
use crate::base::{DiskId, EpochNumber, Error, ErrorKind, PointId, Result};
use crate::format::frames::{Encoding, FramesKind, index_fits, too_many_frames};
use crate::format::undo::{KeptFrame, UndoIndex, plan_merge};

/// Bytes of a merged log that are written at once.
const MERGE_BYTES: usize = 1 << 20;

/// Drops points; the newest, pinned and open ones are left out. Returns those that went.
pub(super) fn drop_points(store: &VmStore, wanted: &[EpochNumber]) -> Result<Vec<PointId>> {
    let _work = lock(&store.work);
    store.check_latch()?;
    let taken = hide(store, wanted);
    let gone: BTreeSet<EpochNumber> = taken.iter().map(PointRecord::epoch).collect();
    let mut done = BTreeSet::new();
    let result = drop_groups(store, &gone, &mut done);
    let ids = taken.iter().filter(|p| done.contains(&p.epoch())).map(|p| p.info.id).collect();
    let left: Vec<PointRecord> = taken.into_iter().filter(|p| !done.contains(&p.epoch())).collect();
    if !left.is_empty() {
        let mut shared = lock(&store.shared);
        shared.points.extend(left);
        shared.points.sort_by_key(PointRecord::epoch);
    }
    remove_unneeded_disks(store)?;
    store.poke();
    result.map(|()| ids)
}

/// Takes the points out of the list, so that nobody opens them any more.
fn hide(store: &VmStore, wanted: &[EpochNumber]) -> Vec<PointRecord> {
    let wanted: BTreeSet<EpochNumber> = wanted.iter().copied().collect();
    let mut shared = lock(&store.shared);
    let newest = shared.points.last().map(PointRecord::epoch);
    let open: BTreeSet<EpochNumber> = shared.open.keys().copied().collect();
    let (gone, left) = std::mem::take(&mut shared.points).into_iter().partition(|p| {
        let epoch = p.epoch();
        wanted.contains(&epoch) && Some(epoch) != newest && !p.info.pinned && !open.contains(&epoch)
    });
    shared.points = left;
    gone
}

/// Drops the oldest ones by one commit, then each run in the middle by one commit.
fn drop_groups(
    store: &VmStore,
    gone: &BTreeSet<EpochNumber>,
    done: &mut BTreeSet<EpochNumber>,
) -> Result<()> {
    let all: Vec<EpochNumber> = lock(&store.doc).points().collect();
    let mut run = Vec::new();
    let mut survivor: Option<EpochNumber> = None;
    for epoch in all {
        if gone.contains(&epoch) {
            run.push(epoch);
            continue;
        }
        if !run.is_empty() {
            match survivor {
                None => replace_logs(store, &run, epoch, None)?,
                Some(base) => {
                    match merge(store, base, epoch) {
                        Ok(log) => replace_logs(store, &run, epoch, Some(log))?,
                        // Too large to be one log: these points stay, others can go.
                        Err(e) if e.kind() == ErrorKind::Refused => {
                            log::warn!("VM {}: points before {epoch} are kept: {e}", store.id);
                            run.clear();
                        }
                        Err(e) => return Err(e),
                    }
                }
            }
            done.extend(run.drain(..));
        }
        survivor = Some(epoch);
    }
    Ok(())
}

/// The commit: `run` are no points any more, `merged` leads back from `upto` instead of the logs
/// that end in between.
fn replace_logs(
    store: &VmStore,
    run: &[EpochNumber],
    upto: EpochNumber,
    merged: Option<Arc<UndoLog>>,
) -> Result<()> {
    store.commit_state(|s| {
        let left: Vec<EpochNumber> = s.points().filter(|p| !run.contains(p)).collect();
        s.set_points(left);
        s.pinned.retain(|p| !run.contains(p));
    })?;
    let above = merged.as_ref().map(|m| m.base);
    let (old, mut chain): (Vec<_>, Vec<_>) = store
        .chain()
        .iter()
        .cloned()
        .partition(|log| log.epoch <= upto && above.is_none_or(|base| log.epoch > base));
    chain.extend(merged);
    chain.sort_by_key(|log| log.epoch);
    store.set_chain(chain);
    old.iter().for_each(|log| log.supersede());
    for epoch in run {
        store.steps.step("remove the manifest of a dropped point")?;
        remove_file(&store.dir.point_manifest(*epoch))?;
    }
    Ok(())
}

/// Writes the log that leads from `epoch` back to `base`, out of those between.
fn merge(store: &VmStore, base: EpochNumber, epoch: EpochNumber) -> Result<Arc<UndoLog>> {
    let chain = store.chain();
    let logs: Vec<&Arc<UndoLog>> = chain.iter().filter(|l| l.epoch > base && l.epoch <= epoch).collect();
    let indexes = logs.iter().map(|l| l.index()).collect::<Result<Vec<_>>>()?;
    let refs: Vec<&UndoIndex> = indexes.iter().map(AsRef::as_ref).collect();
    let (kept, meta) = plan_merge(&refs)?;
    if (meta.epoch, meta.base) != (epoch, base) {
        return Err(Error::new(ErrorKind::Internal, "the undo logs between two points do not meet them"));
    }
    let frames = kept.iter().map(|k| k.kept.len()).sum();
    if !index_fits(meta.disks.len(), frames) {
        return Err(too_many_frames(FramesKind::Undo, frames));
    }
    let merged = UndoLog::new(store.dir.undo(epoch, base), epoch, base);
    let mut out = LogFile::create(store, &merged)?;
    for k in &kept {
        if let Some(log) = logs.get(k.log) {
            copy_frame(log, k, &mut out)?;
        }
        out.drain(MERGE_BYTES)?;
    }
    out.finish(store, &meta)?;
    Ok(merged)
}

/// Copies a frame as it is stored, or the pieces of it that no older log has.
fn copy_frame(log: &UndoLog, kept: &KeptFrame, out: &mut LogFile) -> Result<()> {
    let frame = &kept.frame;
    let is_whole = kept.kept.first() == Some(&frame.range());
    let is_damaged = frame.encoding == Encoding::Damaged;
    if is_whole {
        let saved = log.read_stored(frame).and_then(|stored| out.writer.save_frame(frame, &stored));
        return match saved {
            Err(e) if e.kind() == ErrorKind::Damaged && !frame.encoding.is_empty() => {
                log::error!("{e}");
                out.writer.save_damaged(frame.disk, frame.offset, &vec![0; frame.length as usize])
            }
            saved => saved,
        };
    }
    if frame.encoding.is_empty() {
        for r in &kept.kept {
            out.writer.save_hole(frame.disk, r.start, r.end - r.start)?;
        }
        return Ok(());
    }
    // Damaged content stays damaged, and a frame that rotted becomes it.
    let content = match log.read_frame(frame) {
        _ if is_damaged => Err(()),
        Err(e) if e.kind() != ErrorKind::Damaged => return Err(e),
        content => content.map_err(|e| log::error!("{e}")),
    };
    for r in &kept.kept {
        let (from, to) = ((r.start - frame.offset) as usize, (r.end - frame.offset) as usize);
        match &content {
            Ok(c) => out.writer.save_data(frame.disk, r.start, c.get(from..to).unwrap_or_default())?,
            Err(()) => out.writer.save_damaged(frame.disk, r.start, &vec![0; to - from])?,
        }
    }
    Ok(())
}

/// Removes the files of disks that no point and no waiting epoch has.
fn remove_unneeded_disks(store: &VmStore) -> Result<()> {
    let mut needed: BTreeSet<DiskId> = store.needed_disks();
    let (listed, front) = {
        let shared = lock(&store.shared);
        (shared.points.len(), shared.queue.front().map(|w| w.epoch))
    };
    if lock(&store.doc).points().count() != listed {
        return Ok(());
    }
    if let Some(epoch) = front {
        let waiting = read_manifest(&store.dir.inbox_manifest(epoch))?;
        needed.extend(waiting.manifest.disks.iter().map(|d| d.id));
    }
    store.steps.step("remove the files of disks that are gone")?;
    remove_disks_except(&store.dir, &needed)
}
