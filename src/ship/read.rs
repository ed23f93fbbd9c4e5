//! From sets of blocks to parts in memory: what to read, and what is only a hole.
//!
//! The work is proportional to the blocks of the set, never to the size of the disk: runs are
//! taken one after the other, long ones in windows in which the lower file is asked for its data.
//! What cannot be read is never sent as zeros (T9): the part fails, and names disk and offset.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::base::{BLOCK_BYTES, DiskId, Error, ErrorKind, ExtentSet, Result};
use crate::core::ports::source::{BlocksByDisk, Source};
use crate::format::part::{PartBuilder, PartName};

/// Blocks of one read: 1 MiB.
const READ_BLOCKS: u64 = (1 << 20) / BLOCK_BYTES;
/// Runs shorter than this are read without asking for holes: zeros are found by looking.
const ASK_HOLES_BLOCKS: u64 = 16;
/// A window in which the lower file is asked for data: 4 GiB.
const WINDOW_BLOCKS: u64 = (4 << 30) / BLOCK_BYTES;
/// Pieces of one part.
const PIECES_MAX: usize = 16 << 10;

/// How blocks are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// As they are now.
    Live,
    /// As of the cut.
    Frozen,
}

/// What could not be read, and where, if a block is to blame.
pub(super) struct ReadFault {
    /// Names the disk and the offset.
    pub(super) error: Error,
    /// The block.
    pub(super) place: Option<(DiskId, u64)>,
}

/// A run of blocks of one part.
struct Piece {
    disk: DiskId,
    blocks: Range<u64>,
    is_hole: bool,
}

/// A part that is read and not packed yet.
pub(super) struct RawPart {
    pieces: Vec<Piece>,
    /// Content of the pieces that are no holes, one after the other.
    data: Vec<u8>,
}

/// A part in memory, ready to be put.
pub(super) struct Packed {
    /// Its name; the sequence is given when it is put.
    pub(super) name: PartName,
    /// Its bytes.
    pub(super) bytes: Vec<u8>,
    /// What it holds.
    pub(super) blocks: BlocksByDisk,
    /// Bytes of data and zeros.
    pub(super) data_bytes: u64,
    /// Bytes of holes, by disk.
    pub(super) hole_bytes: BTreeMap<DiskId, u64>,
}

/// Reads a set of blocks, part by part.
pub(super) struct Reader {
    source: Arc<dyn Source>,
    mode: Mode,
    /// For error messages.
    names: BTreeMap<DiskId, PathBuf>,
    /// What is left, by disk; the first run begins at `position` of the first one.
    work: VecDeque<(DiskId, ExtentSet)>,
    position: u64,
    /// Target size of a part, in bytes of content.
    part_bytes: u64,
    /// Pieces of the current window.
    pieces: VecDeque<Piece>,
}

impl Reader {
    /// A reader of `blocks`.
    pub(super) fn new(
        source: Arc<dyn Source>,
        mode: Mode,
        names: BTreeMap<DiskId, PathBuf>,
        blocks: BlocksByDisk,
        part_bytes: u64,
    ) -> Self {
        let work = blocks.into_iter().collect();
        Self { source, mode, names, work, position: 0, part_bytes, pieces: VecDeque::new() }
    }

    /// The next part; none at the end, or when `cancel` is set.
    pub(super) fn next(&mut self, cancel: &AtomicBool) -> Result<Option<RawPart>, ReadFault> {
        let mut part = RawPart { pieces: Vec::new(), data: Vec::new() };
        while (part.data.len() as u64) < self.part_bytes && part.pieces.len() < PIECES_MAX {
            if cancel.load(Ordering::Relaxed) {
                return Ok(None);
            }
            let Some(piece) = self.next_piece()? else { break };
            if !piece.is_hole {
                self.read(&piece, &mut part.data)?;
            }
            part.pieces.push(piece);
        }
        Ok((!part.pieces.is_empty()).then_some(part))
    }

    /// The next piece: a hole of any length, or data of at most one read.
    fn next_piece(&mut self) -> Result<Option<Piece>, ReadFault> {
        while self.pieces.is_empty() {
            let Some((disk, window)) = self.next_window() else { return Ok(None) };
            let data = self.data_in(disk, &window)?;
            for hole in data.gaps(window) {
                self.pieces.push_back(Piece { disk, blocks: hole, is_hole: true });
            }
            for blocks in data.iter() {
                self.pieces.push_back(Piece { disk, blocks, is_hole: false });
            }
        }
        let Some(mut piece) = self.pieces.pop_front() else { return Ok(None) };
        let split = piece.blocks.start + READ_BLOCKS.min(self.part_bytes / BLOCK_BYTES).max(1);
        if !piece.is_hole && piece.blocks.end > split {
            let rest = split..piece.blocks.end;
            piece.blocks.end = split;
            self.pieces.push_front(Piece { disk: piece.disk, blocks: rest, is_hole: false });
        }
        Ok(Some(piece))
    }

    fn next_window(&mut self) -> Option<(DiskId, Range<u64>)> {
        loop {
            let (disk, set) = self.work.front()?;
            let disk = *disk;
            let run = set.overlaps(self.position..u64::MAX).next();
            let Some(run) = run else {
                self.work.pop_front();
                self.position = 0;
                continue;
            };
            let end = run.end.min(run.start.saturating_add(WINDOW_BLOCKS));
            self.position = end;
            return Some((disk, run.start..end));
        }
    }

    /// The blocks of a window that have to be read.
    fn data_in(&self, disk: DiskId, window: &Range<u64>) -> Result<ExtentSet, ReadFault> {
        let all = || ExtentSet::from_iter([window.clone()]);
        if window.end - window.start < ASK_HOLES_BLOCKS {
            return Ok(all());
        }
        let fault = |error| ReadFault { error: self.without_disk(error), place: None };
        match self.mode {
            Mode::Live => {
                let data = self.source.data_blocks(disk, window.clone()).map_err(fault)?;
                Ok(data.overlaps(window.clone()).collect())
            }
            Mode::Frozen => {
                let mut data = all();
                data.subtract(&self.source.frozen_holes(disk, window.clone()).map_err(fault)?);
                Ok(data)
            }
        }
    }

    fn read(&self, piece: &Piece, data: &mut Vec<u8>) -> Result<(), ReadFault> {
        let start = data.len();
        data.resize(start + ((piece.blocks.end - piece.blocks.start) * BLOCK_BYTES) as usize, 0);
        let buffer = data.get_mut(start..).unwrap_or_default();
        match self.read_blocks(piece.disk, piece.blocks.clone(), buffer) {
            Ok(()) => Ok(()),
            Err(e) => Err(self.locate(piece, e)),
        }
    }

    fn read_blocks(&self, disk: DiskId, blocks: Range<u64>, buffer: &mut [u8]) -> Result<()> {
        match self.mode {
            Mode::Live => self.source.read_live(disk, blocks, buffer),
            Mode::Frozen => self.source.read_frozen(disk, blocks, buffer),
        }
    }

    /// A disk that has left the VM is no failure: the frozen epoch that had it gives up its cut,
    /// and a live pass is tried again without it.
    fn without_disk(&self, error: Error) -> Error {
        match (error.kind(), self.mode) {
            (ErrorKind::NotFound, Mode::Frozen) => error.with_kind(ErrorKind::Cancelled),
            (ErrorKind::NotFound, Mode::Live) => error.with_kind(ErrorKind::Busy),
            _ => error,
        }
    }

    /// Finds the first block that cannot be read.
    fn locate(&self, piece: &Piece, mut error: Error) -> ReadFault {
        let has_no_place = |e: &Error| matches!(e.kind(), ErrorKind::Cancelled | ErrorKind::NotFound);
        if has_no_place(&error) {
            return ReadFault { error: self.without_disk(error), place: None };
        }
        let mut at = piece.blocks.start;
        let mut block = vec![0; BLOCK_BYTES as usize];
        for b in piece.blocks.clone() {
            if let Err(e) = self.read_blocks(piece.disk, b..b + 1, &mut block) {
                (at, error) = (b, e);
                break;
            }
        }
        if has_no_place(&error) {
            return ReadFault { error: self.without_disk(error), place: None };
        }
        let name = match self.names.get(&piece.disk) {
            Some(path) => path.display().to_string(),
            None => piece.disk.to_string(),
        };
        let hint = error.next_step().map_or_else(
            || "look at the device of the disk (dmesg); delivery goes on once it can be read".to_owned(),
            str::to_owned,
        );
        let kind = error.kind();
        let why = error.to_string();
        let what = format!("disk {name} cannot be read at offset {}", at.saturating_mul(BLOCK_BYTES));
        ReadFault { error: Error::new(kind, what).why(why).hint(hint), place: Some((piece.disk, at)) }
    }
}

/// Compresses and hashes a part. `attempt`: see [`PartName`].
pub(super) fn pack(raw: &RawPart, attempt: u32) -> Result<Packed> {
    let mut builder = PartBuilder::new();
    let mut blocks = BlocksByDisk::new();
    let mut hole_bytes = BTreeMap::new();
    let (mut at, mut data_bytes) = (0usize, 0u64);
    for piece in &raw.pieces {
        let offset = piece.blocks.start * BLOCK_BYTES;
        let length = (piece.blocks.end - piece.blocks.start) * BLOCK_BYTES;
        if piece.is_hole {
            builder.add_hole(piece.disk, offset, length)?;
            *hole_bytes.entry(piece.disk).or_default() += length;
        } else {
            let end = at + length as usize;
            builder.add_data(piece.disk, offset, raw.data.get(at..end).unwrap_or_default())?;
            at = end;
            data_bytes += length;
        }
        blocks.entry(piece.disk).or_default().insert(piece.blocks.clone());
    }
    let (name, bytes) = builder.finish(0, attempt);
    Ok(Packed { name, bytes, blocks, data_bytes, hole_bytes })
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)]
mod tests {
    use super::*;
    use crate::base::{EpochNumber, VmId};
    use crate::core::ports::source::{Cut, CutKind, DiskFigures};
    use crate::format::frames::Encoding;
    use crate::format::part::PartReader;
    use std::sync::atomic::AtomicU64;
    use std::time::Duration;

    const DISK: DiskId = DiskId(1);

    /// A disk whose data lies in a few runs, and which counts what is asked of it.
    struct Sparse {
        data: ExtentSet,
        bad: Option<u64>,
        is_removed: bool,
        asked: AtomicU64,
    }

    impl Source for Sparse {
        fn vm(&self) -> VmId {
            VmId(1)
        }
        fn tracking_id(&self) -> u64 {
            1
        }
        fn frozen(&self) -> Option<Cut> {
            None
        }
        fn has_changes(&self) -> bool {
            true
        }
        fn marked_bytes(&self) -> u64 {
            0
        }
        fn pending(&self) -> BlocksByDisk {
            BlocksByDisk::new()
        }
        fn cut(&self, _: CutKind, _: &BlocksByDisk, _: Duration) -> Result<Cut> {
            Err(Error::new(ErrorKind::Internal, "no cuts here"))
        }
        fn drain(&self, _: Duration) -> Result<Option<Cut>> {
            Ok(None)
        }
        fn frozen_blocks(&self) -> BlocksByDisk {
            BlocksByDisk::new()
        }
        fn read_frozen(&self, disk: DiskId, blocks: Range<u64>, buffer: &mut [u8]) -> Result<()> {
            self.read_live(disk, blocks, buffer)
        }
        fn read_live(&self, _: DiskId, blocks: Range<u64>, buffer: &mut [u8]) -> Result<()> {
            self.asked.fetch_add(1, Ordering::Relaxed);
            if self.is_removed {
                return Err(Error::new(ErrorKind::NotFound, "there is no such disk"));
            }
            if self.bad.is_some_and(|b| blocks.contains(&b)) {
                return Err(Error::io("EIO", std::io::Error::from_raw_os_error(libc::EIO)));
            }
            for (block, out) in blocks.zip(buffer.chunks_mut(BLOCK_BYTES as usize)) {
                out.fill(u8::from(self.data.contains(block)) * 7);
            }
            Ok(())
        }
        fn data_blocks(&self, _: DiskId, blocks: Range<u64>) -> Result<ExtentSet> {
            self.asked.fetch_add(1, Ordering::Relaxed);
            Ok(self.data.overlaps(blocks).collect())
        }
        fn has_given_up(&self) -> bool {
            false
        }
        fn give_up(&self) -> Result<()> {
            Ok(())
        }
        fn acknowledge(&self, _: EpochNumber) -> Result<()> {
            Ok(())
        }
        fn ship_whole(&self, _: &str) -> Result<()> {
            Ok(())
        }
        fn figures(&self) -> Vec<(DiskId, DiskFigures)> {
            Vec::new()
        }
    }

    fn sparse(data: &[Range<u64>], bad: Option<u64>) -> Arc<Sparse> {
        let data = data.iter().cloned().collect();
        Arc::new(Sparse { data, bad, is_removed: false, asked: AtomicU64::new(0) })
    }

    fn parts(source: &Arc<Sparse>, mode: Mode, blocks: ExtentSet) -> Vec<Packed> {
        let blocks = BlocksByDisk::from([(DISK, blocks)]);
        let mut reader = Reader::new(source.clone(), mode, BTreeMap::new(), blocks, 1 << 20);
        let go = AtomicBool::new(false);
        std::iter::from_fn(|| reader.next(&go).ok().flatten()).map(|raw| pack(&raw, 1).unwrap()).collect()
    }

    #[test]
    fn a_whole_disk_of_8_tib_costs_its_data_and_every_block_is_described_once() {
        let blocks = (8u64 << 40) / BLOCK_BYTES;
        let source = sparse(&[5..6, 1000..3000, 1 << 30..(1 << 30) + 700, blocks - 1..blocks], None);
        let made = parts(&source, Mode::Live, ExtentSet::from_iter([0..blocks]));
        let mut covered = ExtentSet::new();
        for part in &made {
            for run in part.blocks[&DISK].iter() {
                assert!(!covered.intersects(run.clone()), "twice");
                covered.insert(run);
            }
        }
        assert_eq!(covered, ExtentSet::from_iter([0..blocks]));
        let data: u64 = made.iter().map(|p| p.data_bytes).sum();
        assert_eq!(data, source.data.total() * BLOCK_BYTES);
        assert!(made.iter().all(|p| p.data_bytes <= 2 << 20));
        // 2048 windows of 4 GiB, and the reads.
        let asked = source.asked.load(Ordering::Relaxed);
        assert!(asked < 2048 + 40, "{asked} calls");
    }

    #[test]
    fn scattered_blocks_of_a_huge_disk_cost_what_they_are() {
        let blocks: ExtentSet = (0..3000u64).map(|i| i * 700_000..i * 700_000 + 1).collect();
        let source = sparse(&[0..u64::MAX], None);
        let made = parts(&source, Mode::Frozen, blocks.clone());
        let covered: ExtentSet = made.iter().flat_map(|p| p.blocks[&DISK].iter()).collect();
        assert_eq!(covered, blocks);
        assert_eq!(source.asked.load(Ordering::Relaxed), 3000);
    }

    #[test]
    fn small_holes_become_zeros_and_large_ones_holes() {
        let source = sparse(&[0..4, 100..101], None);
        let made = parts(&source, Mode::Live, ExtentSet::from_iter([2..6, 90..1000]));
        let part = PartReader::new(&made[0].bytes).unwrap();
        let frames: Vec<_> = part
            .index()
            .frames()
            .iter()
            .map(|f| (f.offset / BLOCK_BYTES, f.length / BLOCK_BYTES, f.encoding.is_empty(), f.encoding))
            .map(|(at, n, empty, encoding)| (at, n, empty.then_some(encoding)))
            .collect();
        let (zero, hole) = (Some(Encoding::Zero), Some(Encoding::Hole));
        let expected = [(2, 2, None), (4, 2, zero), (90, 10, hole), (100, 1, None), (101, 899, hole)];
        assert_eq!(frames, expected);
        assert_eq!(made[0].hole_bytes[&DISK], 909 * BLOCK_BYTES);
    }

    #[test]
    fn an_unreadable_block_is_named_and_nothing_is_sent_in_its_place() {
        let source = sparse(&[0..1000], Some(321));
        let blocks = BlocksByDisk::from([(DISK, ExtentSet::from_iter([300..400]))]);
        let names = BTreeMap::from([(DISK, PathBuf::from("a.img"))]);
        let mut reader = Reader::new(source, Mode::Frozen, names, blocks, 1 << 20);
        let Err(fault) = reader.next(&AtomicBool::new(false)) else { panic!("it was read") };
        assert_eq!(fault.place, Some((DISK, 321)));
        let what = fault.error.what();
        assert_eq!(what, format!("disk a.img cannot be read at offset {}", 321 * BLOCK_BYTES));
        assert!(fault.error.is_recoverable() && fault.error.next_step().is_some());
    }

    #[test]
    fn a_disk_that_was_removed_meanwhile_is_no_final_error() {
        for (mode, kind) in [(Mode::Frozen, ErrorKind::Cancelled), (Mode::Live, ErrorKind::Busy)] {
            let source =
                Arc::new(Sparse { data: ExtentSet::new(), bad: None, is_removed: true, asked: 0.into() });
            let blocks = BlocksByDisk::from([(DISK, ExtentSet::from_iter([3..5]))]);
            let mut reader = Reader::new(source, mode, BTreeMap::new(), blocks, 1 << 20);
            let Err(fault) = reader.next(&AtomicBool::new(false)) else { panic!("it was read") };
            assert_eq!((fault.error.kind(), fault.place), (kind, None));
        }
    }
}
