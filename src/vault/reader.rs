//! An open point (A2).
//!
//! A read looks up the merged undo index, reads what no log has from the disk files, and looks again
//! before it answers: an epoch that overwrote the block meanwhile published its undo log before its
//! first write, so the second look finds it. Only what is still not covered then is taken from the
//! disk file, and verified against its checksum; neither changed while it was read.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};

use super::diskfile::{DiskFile, Stored, block_end, block_start};
use super::steps;
use super::store::{VmStore, lock};
use super::undolog::{Merged, Place};
use crate::base::{BLOCK_BYTES, Error, ErrorKind, Extent, PointId, Result};
use crate::core::ports::points::{PointDisk, PointInfo, PointReader};
use crate::format::manifest::DefinitionFile;

/// Largest piece that is read and verified at once.
const PIECE_BYTES: u64 = 256 << 10;
/// Frames of undo logs that a reader keeps decoded.
const FRAMES_CACHED_MAX: usize = 16;

/// Keeps a point from being dropped.
struct Pin {
    store: Arc<VmStore>,
    point: PointId,
}

impl Pin {
    /// Pins a point; [`ErrorKind::NotFound`] if it cannot be opened.
    fn new(store: &Arc<VmStore>, point: PointId) -> Result<(Self, PointInfo)> {
        let mut shared = lock(&store.shared);
        let found = shared.points.iter().find(|p| p.info.id == point && !shared.is_stopping);
        let info = found.map(|p| p.info.clone());
        let info = info.ok_or_else(|| not_found(point))?;
        *shared.open.entry(point.epoch).or_default() += 1;
        Ok((Self { store: Arc::clone(store), point }, info))
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        let mut shared = lock(&self.store.shared);
        if let Some(count) = shared.open.get_mut(&self.point.epoch) {
            *count -= 1;
            if *count == 0 {
                shared.open.remove(&self.point.epoch);
            }
        }
    }
}

pub(super) fn not_found(point: PointId) -> Error {
    Error::new(ErrorKind::NotFound, format!("there is no point {point}"))
        .why("it was dropped, or never was")
        .hint("afterimage points NAME shows those that can be opened")
}

/// An open point of a directory vault.
pub(super) struct Reader {
    pin: Pin,
    info: PointInfo,
    disks: Vec<PointDisk>,
    files: Vec<DiskFile>,
    definition: Vec<DefinitionFile>,
    merged: RwLock<Merged>,
    frames: Mutex<VecDeque<(Place, Arc<Vec<u8>>)>>,
}

/// Opens a point: reads its manifest and the indexes of the undo logs after it.
pub(super) fn open(store: &Arc<VmStore>, point: PointId) -> Result<Reader> {
    let (pin, info) = Pin::new(store, point)?;
    let stored = store.read_point(point.epoch)?;
    let mut described = stored.manifest.disks;
    described.sort_by(|a, b| a.path.cmp(&b.path));
    let mut disks = Vec::with_capacity(described.len());
    let mut files = Vec::with_capacity(described.len());
    for d in described {
        files.push(DiskFile::open_existing(&store.dir, d.id)?);
        disks.push(PointDisk { id: d.id, path: d.path, size: d.size, backing: d.backing });
    }
    let merged = RwLock::new(store.merged(point.epoch)?);
    let definition = stored.manifest.definition;
    Ok(Reader { pin, info, disks, files, definition, merged, frames: Mutex::default() })
}

impl Reader {
    fn store(&self) -> &VmStore {
        &self.pin.store
    }

    fn disk(&self, number: usize) -> Result<(&PointDisk, &DiskFile)> {
        let found = self.disks.get(number).zip(self.files.get(number));
        found.ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format!("point {} has no disk number {number}", self.info.id))
        })
    }

    /// A look at the undo index as it is published now.
    fn look(&self) -> Result<RwLockReadGuard<'_, Merged>> {
        loop {
            let merged = self.merged.read().unwrap_or_else(PoisonError::into_inner);
            if merged.upto >= self.store().published() {
                return Ok(merged);
            }
            drop(merged);
            let mut merged = self.merged.write().unwrap_or_else(PoisonError::into_inner);
            merged.extend(&self.store().chain())?;
        }
    }

    /// Whether an undo log was published since the look that saw `upto` (A2).
    fn is_outdated(&self, upto: crate::base::EpochNumber) -> bool {
        !steps::is_off("A2") && self.store().published() > upto
    }

    /// Content of whole blocks, at most [`PIECE_BYTES`] of them.
    fn read_blocks(&self, number: usize, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let (disk, file) = self.disk(number)?;
        let range = offset..offset + buffer.len() as u64;
        loop {
            let merged = self.look()?;
            let upto = merged.upto;
            self.store().steps.between_looks();
            let mut gaps: Vec<(Range<u64>, Vec<u64>)> = Vec::new();
            let uncovered =
                merged.disk(disk.id).map_or_else(|| vec![range.clone()], |m| m.gaps(range.clone()));
            for gap in uncovered {
                file.read(gap.start, slice(buffer, &range, &gap))?;
                let count = (gap.end - gap.start) / BLOCK_BYTES;
                let sums = file.read_sums(gap.start, usize::try_from(count).unwrap_or(0))?;
                gaps.push((gap, sums));
            }
            if self.is_outdated(upto) {
                continue;
            }
            for (gap, sums) in gaps {
                if let Some(at) = DiskFile::first_damaged(gap.start, slice(buffer, &range, &gap), &sums) {
                    return Err(file.damaged(at));
                }
            }
            let Some(covered) = merged.disk(disk.id) else { return Ok(()) };
            for (piece, place) in covered.overlaps(range.clone()) {
                self.read_undo(&merged, place, &piece, slice(buffer, &range, &piece))?;
            }
            return Ok(());
        }
    }

    fn read_undo(&self, merged: &Merged, place: Place, piece: &Range<u64>, buffer: &mut [u8]) -> Result<()> {
        let (log, frame) = merged.frame(place)?;
        if frame.encoding.is_empty() {
            buffer.fill(0);
            return Ok(());
        }
        let cached = {
            let frames = self.frames.lock().unwrap_or_else(PoisonError::into_inner);
            frames.iter().find(|(p, _)| *p == place).map(|(_, content)| Arc::clone(content))
        };
        let content = match cached {
            Some(content) => content,
            None => {
                let content = Arc::new(log.read_frame(frame)?);
                let mut frames = self.frames.lock().unwrap_or_else(PoisonError::into_inner);
                frames.push_front((place, Arc::clone(&content)));
                frames.truncate(FRAMES_CACHED_MAX);
                content
            }
        };
        let from = usize::try_from(piece.start - frame.offset).unwrap_or(usize::MAX);
        let source = content.get(from..from.saturating_add(buffer.len()));
        let source = source
            .ok_or_else(|| Error::new(ErrorKind::Internal, "a frame is shorter than its index says"))?;
        buffer.copy_from_slice(source);
        Ok(())
    }

    /// One step of the search for data from `at`: data found, or where to go on.
    fn look_for_data(&self, number: usize, at: u64, end: u64) -> Result<Step> {
        let (disk, file) = self.disk(number)?;
        loop {
            let merged = self.look()?;
            let next = merged.disk(disk.id).and_then(|m| m.at_or_after(at)).filter(|(r, _)| r.start < end);
            if let Some((range, place)) = &next
                && range.start <= at
            {
                let (_, frame) = merged.frame(*place)?;
                let stop = range.end.min(end);
                return Ok(if frame.encoding.is_empty() { Step::GoOn(stop) } else { Step::Data(at..stop) });
            }
            let stop = next.map_or(end, |(r, _)| r.start);
            let data = file.next_stored(&mut Stored::default(), at, stop)?;
            if self.is_outdated(merged.upto) {
                continue;
            }
            return Ok(match data {
                Some(data) if data.offset < stop => Step::Data(data.offset.max(at)..data.end().min(stop)),
                _ => Step::GoOn(stop),
            });
        }
    }
}

enum Step {
    Data(Range<u64>),
    GoOn(u64),
}

/// The bytes of `piece` in a buffer that holds `range`.
fn slice<'a>(buffer: &'a mut [u8], range: &Range<u64>, piece: &Range<u64>) -> &'a mut [u8] {
    let from = usize::try_from(piece.start - range.start).unwrap_or(usize::MAX);
    let to = usize::try_from(piece.end - range.start).unwrap_or(usize::MAX);
    buffer.get_mut(from..to).unwrap_or_default()
}

impl PointReader for Reader {
    fn info(&self) -> &PointInfo {
        &self.info
    }

    fn disks(&self) -> &[PointDisk] {
        &self.disks
    }

    fn definition(&self) -> &[DefinitionFile] {
        &self.definition
    }

    fn read_at(&self, disk: usize, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        let size = self.disk(disk)?.0.size;
        let room = usize::try_from(size.saturating_sub(offset)).unwrap_or(usize::MAX);
        let length = buffer.len().min(room);
        let buffer = buffer.get_mut(..length).unwrap_or_default();
        let mut done = 0;
        let mut scratch = Vec::new();
        while done < length {
            let at = offset + done as u64;
            let start = block_start(at);
            let end = block_end(offset + length as u64).min(start + PIECE_BYTES);
            let count = ((end - at) as usize).min(length - done);
            let target = buffer.get_mut(done..done + count).unwrap_or_default();
            if start == at && count as u64 == end - start {
                self.read_blocks(disk, start, target)?;
            } else {
                scratch.resize((end - start) as usize, 0);
                self.read_blocks(disk, start, &mut scratch)?;
                let from = (at - start) as usize;
                target.copy_from_slice(scratch.get(from..from + count).unwrap_or_default());
            }
            done += count;
        }
        // Whoever has the folder now knows nothing of our pins, nor we of its undo logs.
        self.store().check_open()?;
        Ok(length)
    }

    fn next_data(&self, disk: usize, offset: u64) -> Result<Option<Extent>> {
        let size = self.disk(disk)?.0.size;
        let end = block_end(size);
        let mut at = block_start(offset);
        let mut found: Option<Range<u64>> = None;
        while at < end {
            match self.look_for_data(disk, at, end)? {
                Step::GoOn(next) if found.is_none() => at = next,
                Step::GoOn(_) => break,
                Step::Data(run) => match &mut found {
                    None => {
                        at = run.end;
                        found = Some(run);
                    }
                    Some(so_far) if so_far.end == run.start => {
                        at = run.end;
                        so_far.end = run.end;
                    }
                    Some(_) => break,
                },
            }
        }
        self.store().check_open()?;
        Ok(found.and_then(|run| {
            let start = run.start.max(offset);
            let end = run.end.min(size);
            (start < end).then(|| Extent { offset: start, length: end - start })
        }))
    }
}
