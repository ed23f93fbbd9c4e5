//! The undo log: what an epoch replaced, so that an older point can be shown.
//!
//! Its bytes are a file of frames (byte map in [`crate::format::frames`]): the old content of every
//! block that the epoch wrote, zeroed, punched or cut off, zeros and holes included. Its meta
//! document is JSON ([`UndoMeta`]): from which epoch to which point it leads back, and the sizes
//! that the disk files had.
//!
//! To show a point: a block is taken from the undo log of the *oldest* epoch after the point that
//! has it, else from the disk file. Two undo logs in a row are merged by the same rule: the older
//! one wins ([`plan_merge`]).

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::frames::{Encoding, Frame, FrameIndex, FrameWriter, FramesKind};
use crate::base::{DiskId, EpochNumber, Error, ErrorKind, ExtentMap, Result};

/// What an undo log leads back from and to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UndoMeta {
    /// The epoch that replaced the content.
    pub epoch: EpochNumber,
    /// The point that is shown with it.
    pub base: EpochNumber,
    /// The disk files before it, as far as the epoch touched them.
    pub disks: Vec<UndoDisk>,
}

/// A disk file before an epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UndoDisk {
    /// Which disk.
    pub id: DiskId,
    /// Bytes of its file; none: the epoch made the file.
    pub size: Option<u64>,
}

/// Makes an undo log. Its owner takes the bytes in pieces with [`UndoWriter::take`].
pub struct UndoWriter {
    writer: FrameWriter,
    bytes: Vec<u8>,
}

impl Default for UndoWriter {
    fn default() -> Self {
        Self::new()
    }
}

impl UndoWriter {
    /// An empty log.
    pub fn new() -> Self {
        let mut bytes = Vec::new();
        Self { writer: FrameWriter::begin(FramesKind::Undo, &mut bytes), bytes }
    }

    /// Saves old content (whole blocks).
    pub fn save_data(&mut self, disk: DiskId, offset: u64, data: &[u8]) -> Result<()> {
        self.writer.add_data(disk, offset, data, &mut self.bytes)
    }

    /// Saves that there was a hole.
    pub fn save_hole(&mut self, disk: DiskId, offset: u64, length: u64) -> Result<()> {
        self.writer.add_empty(disk, offset, length, Encoding::Hole, &mut self.bytes)
    }

    /// Saves content that does not match its checksum, so that nobody is shown it as good.
    pub fn save_damaged(&mut self, disk: DiskId, offset: u64, data: &[u8]) -> Result<()> {
        self.writer.add_damaged(disk, offset, data, &mut self.bytes)
    }

    /// Saves a frame of another log as it is; its digest is verified.
    pub fn save_frame(&mut self, frame: &Frame, stored: &[u8]) -> Result<()> {
        self.writer.add_stored(frame, stored, &mut self.bytes)
    }

    /// Bytes that wait to be taken.
    pub fn waiting(&self) -> usize {
        self.bytes.len()
    }

    /// Takes the bytes made since the last call.
    pub fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.bytes)
    }

    /// Ends the log; returns its last bytes. [`ErrorKind::Refused`]: it has more frames than a
    /// reader accepts.
    pub fn finish(self, meta: &UndoMeta) -> Result<Vec<u8>> {
        let meta = serde_json::to_vec(meta)
            .map_err(|e| Error::new(ErrorKind::Internal, "the undo log cannot be written").source(e))?;
        self.writer.check_tail(&meta)?;
        let mut bytes = self.bytes;
        self.writer.finish(&meta, &mut bytes);
        Ok(bytes)
    }
}

/// The checked index of an undo log.
#[derive(Clone, Debug)]
pub struct UndoIndex {
    index: FrameIndex,
    meta: UndoMeta,
}

impl UndoIndex {
    /// Where the tail begins in a log of `length` bytes, from its footer.
    pub fn place(footer: &[u8], length: u64) -> Result<u64> {
        FrameIndex::tail_place(FramesKind::Undo, footer, length)
    }

    /// Reads the bytes from [`Self::place`] to the end of a log of `length` bytes.
    pub fn decode(tail: &[u8], length: u64) -> Result<Self> {
        let index = FrameIndex::decode(FramesKind::Undo, tail, length)?;
        let meta = serde_json::from_slice(index.meta())
            .map_err(|e| Error::new(ErrorKind::Damaged, "the undo log cannot be read").source(e))?;
        Ok(Self { index, meta })
    }

    /// From where it leads back, and to where.
    pub const fn meta(&self) -> &UndoMeta {
        &self.meta
    }

    /// Every frame, by disk and offset; they never overlap.
    pub fn frames(&self) -> &[Frame] {
        self.index.frames()
    }
}

/// A frame that a merged log keeps, whole or in pieces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeptFrame {
    /// Number of the log it comes from, counted from the oldest, 0.
    pub log: usize,
    /// The frame there.
    pub frame: Frame,
    /// What of it is kept, in bytes of the disk; the whole frame if it is one range of its length.
    pub kept: Vec<Range<u64>>,
}

/// Merges logs that follow each other, oldest first: the older one wins. Returns what the merged
/// log holds, log by log and in the order of each, and its meta document.
pub fn plan_merge(logs: &[&UndoIndex]) -> Result<(Vec<KeptFrame>, UndoMeta)> {
    let (Some(oldest), Some(newest)) = (logs.first(), logs.last()) else {
        return Err(Error::new(ErrorKind::Internal, "no undo logs to merge"));
    };
    let follow = logs.windows(2).all(|w| matches!(w, [a, b] if a.meta.epoch == b.meta.base));
    if !follow {
        return Err(Error::new(ErrorKind::Damaged, "the undo logs cannot be merged")
            .why("they do not follow each other"));
    }
    let mut meta = UndoMeta { epoch: newest.meta.epoch, base: oldest.meta.base, disks: Vec::new() };
    let mut owned: std::collections::BTreeMap<DiskId, ExtentMap<()>> = std::collections::BTreeMap::new();
    let mut out = Vec::new();
    for (log, index) in logs.iter().enumerate() {
        for disk in &index.meta.disks {
            if !meta.disks.iter().any(|d| d.id == disk.id) {
                meta.disks.push(*disk);
            }
        }
        for frame in index.frames() {
            let map = owned.entry(frame.disk).or_default();
            let kept = map.gaps(frame.range());
            kept.iter().for_each(|r| map.insert(r.clone(), ()));
            if !kept.is_empty() {
                out.push(KeptFrame { log, frame: *frame, kept });
            }
        }
    }
    Ok((out, meta))
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: DiskId = DiskId(1);

    fn log(epoch: u64, blocks: &[(u64, u8)]) -> (Vec<u8>, UndoIndex) {
        let mut w = UndoWriter::new();
        for (block, byte) in blocks {
            w.save_data(A, block * 4096, &[*byte; 4096]).unwrap();
        }
        let disks = vec![UndoDisk { id: A, size: Some(epoch * 4096) }];
        let meta = UndoMeta { epoch: EpochNumber(epoch), base: EpochNumber(epoch - 1), disks };
        let bytes = w.finish(&meta).unwrap();
        let length = bytes.len() as u64;
        let place = UndoIndex::place(&bytes[bytes.len() - 64..], length).unwrap();
        let index = UndoIndex::decode(&bytes[place as usize..], length).unwrap();
        assert_eq!(index.meta(), &meta);
        (bytes, index)
    }

    #[test]
    fn a_log_that_no_reader_accepts_is_not_written() {
        use crate::format::frames::index_fits;
        assert!(index_fits(1, (16 << 20) - 1));
        assert!(!index_fits(1, 16 << 20));
        let disks = vec![UndoDisk { id: A, size: None }; 40_000];
        let meta = UndoMeta { epoch: EpochNumber(2), base: EpochNumber(1), disks };
        assert_eq!(UndoWriter::new().finish(&meta).unwrap_err().kind(), ErrorKind::Refused);
    }

    #[test]
    fn the_older_log_wins() {
        let (_, two) = log(2, &[(1, 21), (2, 22)]);
        let (_, three) = log(3, &[(2, 32), (3, 33)]);
        let (kept, meta) = plan_merge(&[&two, &three]).unwrap();
        assert_eq!((meta.base, meta.epoch), (EpochNumber(1), EpochNumber(3)));
        assert_eq!(meta.disks, [UndoDisk { id: A, size: Some(2 * 4096) }]);
        let places: Vec<_> = kept.iter().map(|k| (k.log, k.frame.offset / 4096)).collect();
        assert_eq!(places, [(0, 1), (0, 2), (1, 3)]);
        assert!(plan_merge(&[&three, &two]).is_err());
        assert!(plan_merge(&[]).is_err());
    }
}
