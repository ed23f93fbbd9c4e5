//! Frames: the container that parts and undo logs share.
//!
//! ```text
//! offset  bytes  field
//! 0       8      magic ("AFIPART1" or "AFIUNDO1")
//! 8       4      format version, little-endian like every number below
//! 12      4      reserved, 0
//! 16      ...    frames, in the order in which they were added:
//!                  0   16  disk id
//!                  16  8   offset of the content on the disk, a multiple of 4096
//!                  24  8   length of the content, a multiple of 4096
//!                  32  4   stored bytes that follow (0 for zero and hole)
//!                  36  1   encoding: 0 raw, 1 lz4, 2 zero, 3 hole, 4 damaged (undo logs only)
//!                  37  3   reserved, 0
//!                  40  ..  stored bytes
//! T       M      meta: a document of the kind's own (empty in a part)
//! T+M     16     index: number of disks u32, reserved u32, number of frames u64
//!         16*D   disk ids, ascending
//!         48*F   entries, ascending by disk and offset, never overlapping:
//!                  0   8   offset
//!                  8   8   length
//!                  16  8   place of the stored bytes in the file
//!                  24  4   stored bytes
//!                  28  2   number of the disk in the list above
//!                  30  1   encoding
//!                  31  1   reserved, 0
//!                  32  16  first half of the blake3 digest of the stored bytes
//! E-64    64     footer:
//!                  0   8   magic of the end ("AFIPARTE" or "AFIUNDOE")
//!                  8   4   format version
//!                  12  4   M
//!                  16  8   T
//!                  24  8   bytes of the index
//!                  32  32  blake3 digest of meta and index
//! ```
//!
//! The frames come first, because they can be written while they are made. The index comes last,
//! because only then it is known, and the footer has a fixed size, so that any block is found with
//! two small reads (footer, then meta and index) and a third one for its frame. The frame headers
//! repeat what the index says, so that a file without its end can still be explained.
//!
//! What if we are killed here? Files of frames get their name only once they are whole and synced;
//! a file without a footer was never published. What if the other side is older or newer? The
//! version is in the header and the footer, and is looked at before anything else.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::base::digest::is_zero;
use crate::base::limits::{DISK_BYTES_MAX, FRAME_BYTES_MAX};
use crate::base::{BLOCK_BYTES, DiskId, Error, ErrorKind, ExtentSet, Result};

/// Version of the format.
pub const FRAMES_FORMAT: u32 = 1;
/// Bytes before the first frame.
pub const HEADER_BYTES: usize = 16;
/// Bytes before the stored bytes of a frame.
pub const FRAME_HEADER_BYTES: usize = 40;
/// Bytes at the end of the file.
pub const FOOTER_BYTES: usize = 64;
const INDEX_HEADER_BYTES: usize = 16;
const ENTRY_BYTES: usize = 48;
const DISK_ID_BYTES: usize = 16;
/// Largest meta document that a reader accepts.
const META_BYTES_MAX: u64 = 1 << 20;
/// Largest index that a reader accepts: 16 Mi frames.
const INDEX_BYTES_MAX: u64 = (16 << 20) * ENTRY_BYTES as u64;
/// Largest number of disks in one file.
const DISKS_MAX: usize = u16::MAX as usize;

const _: () = assert!(8 + 4 + 4 == HEADER_BYTES);
const _: () = assert!(DISK_ID_BYTES + 8 + 8 + 4 + 1 + 3 == FRAME_HEADER_BYTES);
const _: () = assert!(8 + 8 + 8 + 4 + 2 + 1 + 1 + 16 == ENTRY_BYTES);
const _: () = assert!(8 + 4 + 4 + 8 + 8 + 32 == FOOTER_BYTES);

/// What a file of frames is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FramesKind {
    /// A piece of an epoch's payload.
    Part,
    /// What an epoch replaced.
    Undo,
}

impl FramesKind {
    const fn magic(self) -> &'static [u8; 8] {
        match self {
            Self::Part => b"AFIPART1",
            Self::Undo => b"AFIUNDO1",
        }
    }

    const fn end_magic(self) -> &'static [u8; 8] {
        match self {
            Self::Part => b"AFIPARTE",
            Self::Undo => b"AFIUNDOE",
        }
    }

    const fn noun(self) -> &'static str {
        match self {
            Self::Part => "the part",
            Self::Undo => "the undo log",
        }
    }

    fn damaged(self, why: impl Into<String>) -> Error {
        Error::new(ErrorKind::Damaged, format!("{} cannot be read", self.noun())).why(why)
    }

    /// The kind that a file with these first bytes has, if it is one of ours.
    pub fn of_header(header: &[u8]) -> Option<Self> {
        [Self::Part, Self::Undo].into_iter().find(|k| header.starts_with(k.magic()))
    }
}

/// How the content of a frame is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Encoding {
    /// As it is.
    Raw = 0,
    /// lz4 block format; the length of the content is that of the frame.
    Lz4 = 1,
    /// Zeros that were written.
    Zero = 2,
    /// A hole.
    Hole = 3,
    /// As it is, but it did not match its checksum when it was saved: never shown to anybody.
    Damaged = 4,
}

impl Encoding {
    fn decode(byte: u8) -> Option<Self> {
        [Self::Raw, Self::Lz4, Self::Zero, Self::Hole, Self::Damaged].into_iter().find(|e| *e as u8 == byte)
    }

    /// Whether the content is zeros by its encoding.
    pub const fn is_empty(self) -> bool {
        matches!(self, Self::Zero | Self::Hole)
    }
}

/// One run of content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Which disk.
    pub disk: DiskId,
    /// First byte on the disk, a multiple of 4096.
    pub offset: u64,
    /// Bytes on the disk, a multiple of 4096.
    pub length: u64,
    /// Place of the stored bytes in the file.
    pub place: u64,
    /// Number of stored bytes.
    pub stored: u32,
    /// How they are stored.
    pub encoding: Encoding,
    /// First half of the blake3 digest of the stored bytes; zeros if there are none.
    pub digest: [u8; 16],
}

impl Frame {
    /// One past its last byte on the disk.
    pub const fn end(&self) -> u64 {
        self.offset + self.length
    }

    /// Its bytes on the disk.
    pub const fn range(&self) -> Range<u64> {
        self.offset..self.end()
    }

    /// Fills `content` (of [`Frame::length`] bytes) from the stored bytes, which are verified.
    pub fn decode_content(&self, stored: &[u8], content: &mut [u8]) -> Result<()> {
        let damaged = |why: &str| {
            Error::new(
                ErrorKind::Damaged,
                format!("disk {} at byte {} cannot be read", self.disk, self.offset),
            )
            .why(why)
        };
        if content.len() as u64 != self.length {
            return Err(Error::new(ErrorKind::Internal, "a frame was read into a buffer of another length"));
        }
        if self.encoding.is_empty() {
            content.fill(0);
            return Ok(());
        }
        if stored.len() as u64 != u64::from(self.stored) || short_digest(stored) != self.digest {
            return Err(damaged("the stored bytes do not match their digest"));
        }
        match self.encoding {
            Encoding::Raw => content.copy_from_slice(stored),
            Encoding::Damaged => return Err(damaged("it was damaged already when an epoch replaced it")),
            _ => match lz4_flex::block::decompress_into(stored, content) {
                Ok(n) if n == content.len() => {}
                _ => return Err(damaged("the stored bytes cannot be decompressed")),
            },
        }
        Ok(())
    }
}

/// First half of the blake3 digest.
fn short_digest(bytes: &[u8]) -> [u8; 16] {
    let mut out = [0; 16];
    out.copy_from_slice(&blake3::hash(bytes).as_bytes()[..16]);
    out
}

/// Makes a file of frames. It holds no file: what is written is appended to `out`, which its owner
/// may drain between two calls.
pub struct FrameWriter {
    kind: FramesKind,
    place: u64,
    frames: Vec<Frame>,
    covered: BTreeMap<DiskId, ExtentSet>,
    pending: Option<Frame>,
    scratch: Vec<u8>,
    content_bytes: u64,
    described_bytes: u64,
}

impl FrameWriter {
    /// Begins a file: appends its header.
    pub fn begin(kind: FramesKind, out: &mut Vec<u8>) -> Self {
        out.extend_from_slice(kind.magic());
        out.extend_from_slice(&FRAMES_FORMAT.to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        Self {
            kind,
            place: HEADER_BYTES as u64,
            frames: Vec::new(),
            covered: BTreeMap::new(),
            pending: None,
            scratch: Vec::new(),
            content_bytes: 0,
            described_bytes: 0,
        }
    }

    /// Bytes of content (not zeros) added so far.
    pub const fn content_bytes(&self) -> u64 {
        self.content_bytes
    }

    /// Bytes of disk described so far: content, zeros and holes.
    pub const fn described_bytes(&self) -> u64 {
        self.described_bytes
    }

    /// Number of frames so far.
    pub fn frames(&self) -> usize {
        self.frames.len() + usize::from(self.pending.is_some())
    }

    /// Refuses a file whose end would be larger than a reader accepts.
    pub fn check_tail(&self, meta: &[u8]) -> Result<()> {
        let fits = index_fits(self.covered.len(), self.frames()) && meta.len() as u64 <= META_BYTES_MAX;
        if fits { Ok(()) } else { Err(too_many_frames(self.kind, self.frames())) }
    }

    /// What the file describes so far, in bytes per disk.
    pub const fn covered(&self) -> &BTreeMap<DiskId, ExtentSet> {
        &self.covered
    }

    /// Adds content at `offset`: blocks of zeros become zero frames, the rest lz4 or, where that
    /// saves nothing, raw frames of at most [`FRAME_BYTES_MAX`].
    pub fn add_data(&mut self, disk: DiskId, offset: u64, data: &[u8], out: &mut Vec<u8>) -> Result<()> {
        self.claim(disk, offset, data.len() as u64)?;
        let block = BLOCK_BYTES as usize;
        let mut at = 0usize;
        while at < data.len() {
            let zero = is_zero(&data[at..at + block]);
            let mut end = at + block;
            while end < data.len() && is_zero(&data[end..end + block]) == zero {
                end += block;
                if !zero && (end - at) as u64 >= FRAME_BYTES_MAX {
                    break;
                }
            }
            if zero {
                self.put_empty(disk, offset + at as u64, (end - at) as u64, Encoding::Zero, out);
            } else {
                self.put_content(disk, offset + at as u64, &data[at..end], out);
            }
            at = end;
        }
        Ok(())
    }

    /// Adds a run of zeros or a hole.
    pub fn add_empty(
        &mut self,
        disk: DiskId,
        offset: u64,
        length: u64,
        encoding: Encoding,
        out: &mut Vec<u8>,
    ) -> Result<()> {
        if !encoding.is_empty() {
            return Err(Error::new(ErrorKind::Internal, "only zeros and holes have no content"));
        }
        self.claim(disk, offset, length)?;
        if length > 0 {
            self.put_empty(disk, offset, length, encoding, out);
        }
        Ok(())
    }

    /// Adds content that is known to be damaged, at most [`FRAME_BYTES_MAX`] of it.
    pub fn add_damaged(&mut self, disk: DiskId, offset: u64, data: &[u8], out: &mut Vec<u8>) -> Result<()> {
        if data.len() as u64 > FRAME_BYTES_MAX {
            return Err(Error::new(ErrorKind::Internal, "a damaged run is longer than a frame"));
        }
        self.claim(disk, offset, data.len() as u64)?;
        self.put_stored(disk, offset, data.len() as u64, Encoding::Damaged, data, out);
        Ok(())
    }

    /// Adds a frame of another file as it is stored there; `stored` is verified first.
    pub fn add_stored(&mut self, frame: &Frame, stored: &[u8], out: &mut Vec<u8>) -> Result<()> {
        if frame.encoding.is_empty() {
            return self.add_empty(frame.disk, frame.offset, frame.length, frame.encoding, out);
        }
        if short_digest(stored) != frame.digest {
            return Err(self.kind.damaged(format!(
                "disk {} at byte {}: the stored bytes do not match their digest",
                frame.disk, frame.offset
            )));
        }
        self.claim(frame.disk, frame.offset, frame.length)?;
        self.put_stored(frame.disk, frame.offset, frame.length, frame.encoding, stored, out);
        Ok(())
    }

    /// Ends the file: appends meta, index and footer.
    pub fn finish(mut self, meta: &[u8], out: &mut Vec<u8>) {
        self.flush_pending(out);
        self.frames.sort_unstable_by_key(|f| (f.disk, f.offset));
        let disks: Vec<DiskId> = self.covered.keys().copied().collect();
        let begin = out.len();
        out.extend_from_slice(meta);
        let index = out.len();
        out.extend_from_slice(&(disks.len() as u32).to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&(self.frames.len() as u64).to_le_bytes());
        disks.iter().for_each(|d| out.extend_from_slice(&d.0.to_le_bytes()));
        let mut number = 0usize;
        for f in &self.frames {
            while disks.get(number).is_some_and(|d| *d < f.disk) {
                number += 1;
            }
            out.extend_from_slice(&f.offset.to_le_bytes());
            out.extend_from_slice(&f.length.to_le_bytes());
            out.extend_from_slice(&f.place.to_le_bytes());
            out.extend_from_slice(&f.stored.to_le_bytes());
            out.extend_from_slice(&(number as u16).to_le_bytes());
            out.extend_from_slice(&[f.encoding as u8, 0]);
            out.extend_from_slice(&f.digest);
        }
        let digest = blake3::hash(&out[begin..]);
        let index_bytes = (out.len() - index) as u64;
        out.extend_from_slice(self.kind.end_magic());
        out.extend_from_slice(&FRAMES_FORMAT.to_le_bytes());
        out.extend_from_slice(&(meta.len() as u32).to_le_bytes());
        out.extend_from_slice(&self.place.to_le_bytes());
        out.extend_from_slice(&index_bytes.to_le_bytes());
        out.extend_from_slice(digest.as_bytes());
    }

    fn claim(&mut self, disk: DiskId, offset: u64, length: u64) -> Result<()> {
        let aligned = offset.is_multiple_of(BLOCK_BYTES) && length.is_multiple_of(BLOCK_BYTES);
        let fits = offset.checked_add(length).is_some_and(|end| end <= DISK_BYTES_MAX);
        let few = self.covered.len() < DISKS_MAX || self.covered.contains_key(&disk);
        let what = || format!("{length} bytes at {offset} of disk {disk} cannot be stored");
        if !(aligned && fits && few) {
            return Err(Error::new(ErrorKind::Internal, what()).why("they are not whole blocks of a disk"));
        }
        let set = self.covered.entry(disk).or_default();
        if set.intersects(offset..offset + length) {
            return Err(Error::new(ErrorKind::Internal, what()).why("the file has some of them already"));
        }
        set.insert(offset..offset + length);
        self.described_bytes += length;
        Ok(())
    }

    fn put_content(&mut self, disk: DiskId, offset: u64, data: &[u8], out: &mut Vec<u8>) {
        let mut scratch = std::mem::take(&mut self.scratch);
        let room = lz4_flex::block::get_maximum_output_size(data.len());
        if scratch.len() < room {
            scratch.resize(room, 0);
        }
        // A sixteenth saved at least, else decompression costs more than it gives.
        let packed = lz4_flex::block::compress_into(data, &mut scratch).unwrap_or(usize::MAX);
        if packed <= data.len() - data.len() / 16 {
            self.put_stored(disk, offset, data.len() as u64, Encoding::Lz4, &scratch[..packed], out);
        } else {
            self.put_stored(disk, offset, data.len() as u64, Encoding::Raw, data, out);
        }
        self.scratch = scratch;
    }

    fn put_stored(
        &mut self,
        disk: DiskId,
        offset: u64,
        length: u64,
        encoding: Encoding,
        stored: &[u8],
        out: &mut Vec<u8>,
    ) {
        self.flush_pending(out);
        self.content_bytes += length;
        let digest = short_digest(stored);
        let frame = Frame { disk, offset, length, place: 0, stored: stored.len() as u32, encoding, digest };
        self.emit(frame, stored, out);
    }

    /// Zeros wait for their neighbours, so that a long run becomes one frame.
    fn put_empty(&mut self, disk: DiskId, offset: u64, length: u64, encoding: Encoding, out: &mut Vec<u8>) {
        if let Some(p) = &mut self.pending
            && p.disk == disk
            && p.encoding == encoding
            && p.end() == offset
        {
            p.length += length;
            return;
        }
        self.flush_pending(out);
        self.pending = Some(Frame { disk, offset, length, place: 0, stored: 0, encoding, digest: [0; 16] });
    }

    fn flush_pending(&mut self, out: &mut Vec<u8>) {
        if let Some(frame) = self.pending.take() {
            self.emit(frame, &[], out);
        }
    }

    fn emit(&mut self, mut frame: Frame, stored: &[u8], out: &mut Vec<u8>) {
        out.extend_from_slice(&frame.disk.0.to_le_bytes());
        out.extend_from_slice(&frame.offset.to_le_bytes());
        out.extend_from_slice(&frame.length.to_le_bytes());
        out.extend_from_slice(&frame.stored.to_le_bytes());
        out.extend_from_slice(&[frame.encoding as u8, 0, 0, 0]);
        out.extend_from_slice(stored);
        frame.place = self.place + FRAME_HEADER_BYTES as u64;
        self.place = frame.place + stored.len() as u64;
        self.frames.push(frame);
    }
}

/// Whether a reader accepts an index of so many disks and frames.
pub const fn index_fits(disks: usize, frames: usize) -> bool {
    let bytes = INDEX_HEADER_BYTES + disks.saturating_mul(DISK_ID_BYTES);
    bytes.saturating_add(frames.saturating_mul(ENTRY_BYTES)) as u64 <= INDEX_BYTES_MAX
}

/// The error for a file that no reader would accept.
pub fn too_many_frames(kind: FramesKind, frames: usize) -> Error {
    Error::new(ErrorKind::Refused, format!("{} cannot be written", kind.noun()))
        .why(format!("its index of {frames} frames would be larger than {INDEX_BYTES_MAX} bytes"))
}

/// The index of a file of frames: checked, sorted, never overlapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FrameIndex {
    frames: Vec<Frame>,
    meta: Vec<u8>,
}

impl FrameIndex {
    /// Where meta and index begin, from the last [`FOOTER_BYTES`] of a file of `total` bytes.
    pub fn tail_place(kind: FramesKind, footer: &[u8], total: u64) -> Result<u64> {
        Ok(Footer::decode(kind, footer, total)?.tail)
    }

    /// Length of the file that has this tail; to be confirmed by [`Self::decode`].
    pub fn total_of_tail(kind: FramesKind, tail: &[u8]) -> Result<u64> {
        let at = tail.len().checked_sub(FOOTER_BYTES).map(|footer| footer + 16);
        let place = at.and_then(|at| u64_at(tail, at));
        let total = place.and_then(|place| place.checked_add(tail.len() as u64));
        total.ok_or_else(|| kind.damaged("its end is missing or is not ours"))
    }

    /// Reads the tail of a file (meta, index and footer) of `total` bytes.
    pub fn decode(kind: FramesKind, tail: &[u8], total: u64) -> Result<Self> {
        let short = || kind.damaged("it is too short");
        let split = tail.len().checked_sub(FOOTER_BYTES).ok_or_else(short)?;
        let (body, footer) = tail.split_at_checked(split).ok_or_else(short)?;
        let footer = Footer::decode(kind, footer, total)?;
        if body.len() as u64 != footer.meta + footer.index {
            return Err(kind.damaged("its index is not where its end says"));
        }
        if blake3::hash(body) != footer.digest {
            return Err(kind.damaged("its index does not match its digest"));
        }
        let (meta, index) = body.split_at_checked(footer.meta as usize).ok_or_else(short)?;
        let frames = decode_index(index, footer.tail)
            .ok_or_else(|| kind.damaged("its index describes frames that cannot be"))?;
        Ok(Self { frames, meta: meta.to_vec() })
    }

    /// Every frame, by disk and offset.
    pub fn frames(&self) -> &[Frame] {
        &self.frames
    }

    /// The document of the kind's own.
    pub fn meta(&self) -> &[u8] {
        &self.meta
    }

    /// Frames that hold bytes of `range` of `disk`, in order.
    pub fn overlapping(&self, disk: DiskId, range: Range<u64>) -> impl Iterator<Item = &Frame> {
        let first = self.frames.partition_point(|f| (f.disk, f.end()) <= (disk, range.start));
        self.frames.iter().skip(first).take_while(move |f| f.disk == disk && f.offset < range.end)
    }
}

struct Footer {
    meta: u64,
    tail: u64,
    index: u64,
    digest: blake3::Hash,
}

impl Footer {
    fn decode(kind: FramesKind, bytes: &[u8], total: u64) -> Result<Self> {
        let parsed = Self::parse(kind, bytes);
        let (version, footer) = parsed.ok_or_else(|| kind.damaged("its end is missing or is not ours"))?;
        if version != FRAMES_FORMAT {
            return Err(Error::new(ErrorKind::Version, format!("{} cannot be read", kind.noun()))
                .why(format!("it has format {version}, this program knows {FRAMES_FORMAT}"))
                .hint("use the version of afterimage that wrote it, or a newer one"));
        }
        let sane = footer.meta <= META_BYTES_MAX
            && footer.index <= INDEX_BYTES_MAX
            && footer.tail >= HEADER_BYTES as u64
            && footer.tail.checked_add(footer.meta + footer.index + FOOTER_BYTES as u64) == Some(total);
        if !sane {
            return Err(kind.damaged("its end and its length do not agree: it was cut off or changed"));
        }
        Ok(footer)
    }

    fn parse(kind: FramesKind, bytes: &[u8]) -> Option<(u32, Self)> {
        if bytes.len() != FOOTER_BYTES || !bytes.starts_with(kind.end_magic()) {
            return None;
        }
        let digest = blake3::Hash::from_bytes(bytes.get(32..64)?.try_into().ok()?);
        let meta = u64::from(u32_at(bytes, 12)?);
        Some((u32_at(bytes, 8)?, Self { meta, tail: u64_at(bytes, 16)?, index: u64_at(bytes, 24)?, digest }))
    }
}

/// Decodes the index; `None` if anything in it cannot be. `tail`: where the frames end.
fn decode_index(index: &[u8], tail: u64) -> Option<Vec<Frame>> {
    let disk_count = usize::try_from(u32_at(index, 0)?).ok()?;
    let frame_count = usize::try_from(u64_at(index, 8)?).ok()?;
    if disk_count > DISKS_MAX {
        return None;
    }
    let entries_at = INDEX_HEADER_BYTES + disk_count * DISK_ID_BYTES;
    // The length bounds the counts before anything is allocated for them.
    if frame_count.checked_mul(ENTRY_BYTES)?.checked_add(entries_at)? != index.len() {
        return None;
    }
    let ids = index.get(INDEX_HEADER_BYTES..entries_at)?.chunks_exact(DISK_ID_BYTES);
    let disks: Vec<DiskId> =
        ids.map(|b| b.try_into().map(|b| DiskId(u128::from_le_bytes(b)))).collect::<Result<_, _>>().ok()?;
    if !disks.is_sorted_by(|a, b| a < b) {
        return None;
    }
    let mut frames: Vec<Frame> = Vec::with_capacity(frame_count);
    for entry in index.get(entries_at..)?.chunks_exact(ENTRY_BYTES) {
        let frame = decode_entry(entry, &disks, tail)?;
        if frames.last().is_some_and(|p| (p.disk, p.end()) > (frame.disk, frame.offset)) {
            return None;
        }
        frames.push(frame);
    }
    Some(frames)
}

fn decode_entry(entry: &[u8], disks: &[DiskId], tail: u64) -> Option<Frame> {
    let number = u16::from_le_bytes(entry.get(28..30)?.try_into().ok()?);
    let frame = Frame {
        disk: *disks.get(usize::from(number))?,
        offset: u64_at(entry, 0)?,
        length: u64_at(entry, 8)?,
        place: u64_at(entry, 16)?,
        stored: u32_at(entry, 24)?,
        encoding: Encoding::decode(*entry.get(30)?)?,
        digest: entry.get(32..48)?.try_into().ok()?,
    };
    let whole = frame.offset.is_multiple_of(BLOCK_BYTES) && frame.length.is_multiple_of(BLOCK_BYTES);
    let on_disk = frame.offset.checked_add(frame.length)? <= DISK_BYTES_MAX;
    let in_file = frame.place >= (HEADER_BYTES + FRAME_HEADER_BYTES) as u64
        && frame.place.checked_add(u64::from(frame.stored))? <= tail;
    let stored = u64::from(frame.stored);
    let fits = match frame.encoding {
        Encoding::Zero | Encoding::Hole => stored == 0,
        Encoding::Raw | Encoding::Damaged => stored == frame.length && frame.length <= FRAME_BYTES_MAX,
        Encoding::Lz4 => stored > 0 && stored < frame.length && frame.length <= FRAME_BYTES_MAX,
    };
    (whole && frame.length > 0 && on_disk && in_file && fits).then_some(frame)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}
