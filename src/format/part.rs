//! The part: an immutable piece of an epoch's payload.
//!
//! Its bytes are a file of frames (byte map in [`crate::format::frames`]) with an empty meta
//! document. Content is whole 4 KiB blocks; what lies beyond the end of a disk is zeros and is cut
//! off by whoever applies it. Frames of one part never overlap. Its name carries its place in the
//! epoch (later parts win), the attempt that made it, and the digest of all its bytes.
//!
//! ```
//! use afterimage::base::DiskId;
//! use afterimage::format::part::{PartBuilder, PartReader};
//!
//! let disk = DiskId(7);
//! let mut builder = PartBuilder::new();
//! builder.add_data(disk, 8192, &[1; 4096])?;
//! builder.add_hole(disk, 1 << 20, 1 << 30)?;
//! let (name, bytes) = builder.finish(0, 0x3fa9c1d2);
//! assert_eq!(name, name.to_string().parse()?);
//! let part = PartReader::new(&bytes)?;
//! let mut content = [0; 4096];
//! part.read(&part.index().frames()[0], &mut content)?;
//! assert_eq!(content, [1; 4096]);
//! # Ok::<(), afterimage::base::Error>(())
//! ```

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use super::frames::{Encoding, FOOTER_BYTES, Frame, FrameIndex, FrameWriter, FramesKind, HEADER_BYTES};
use crate::base::limits::{PART_BYTES, PART_BYTES_MAX};
use crate::base::{Digest, DiskId, Error, ErrorKind, ExtentSet, Result};

/// Frames after which a part is full, whatever it weighs: a part of scattered zeros stays small.
const FRAMES_PER_PART: usize = 64 << 10;

// The fullest part that can arise (one more run than PART_BYTES) is one that a reader accepts.
const _: () = assert!(PART_BYTES * 2 + (FRAMES_PER_PART as u64 * 2) * 88 <= PART_BYTES_MAX);

/// Name of a part: `SEQUENCE-ATTEMPT-DIGEST`, as in `000012-3fa9c1d2-<64 hex digits>`.
/// Later parts of an epoch win over earlier ones, by sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub struct PartName {
    /// Place of the part within its epoch, counted from 0.
    pub sequence: u32,
    /// Random number of the attempt that made it.
    pub attempt: u32,
    /// Digest of all its bytes.
    pub digest: Digest,
}

impl fmt::Display for PartName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:06}-{:08x}-{}", self.sequence, self.attempt, self.digest)
    }
}

impl FromStr for PartName {
    type Err = Error;

    /// Accepts exactly what [`PartName`] prints: no other spelling, so no second name for a part.
    fn from_str(s: &str) -> Result<Self> {
        let parsed = (|| {
            let mut fields = s.split('-');
            let name = Self {
                sequence: fields.next()?.parse().ok()?,
                attempt: u32::from_str_radix(fields.next()?, 16).ok()?,
                digest: fields.next()?.parse().ok()?,
            };
            (fields.next().is_none() && name.to_string() == s).then_some(name)
        })();
        parsed.ok_or_else(|| Error::new(ErrorKind::Usage, format!("{s:?} is no name of a part")))
    }
}

/// A part that is durable in the vault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct StoredPart {
    /// Its name.
    pub name: PartName,
    /// Its length in bytes.
    pub length: u64,
}

/// Makes a part in memory.
pub struct PartBuilder {
    writer: FrameWriter,
    bytes: Vec<u8>,
}

impl Default for PartBuilder {
    fn default() -> Self {
        Self::new()
    }
}

impl PartBuilder {
    /// An empty part.
    pub fn new() -> Self {
        let mut bytes = Vec::new();
        Self { writer: FrameWriter::begin(FramesKind::Part, &mut bytes), bytes }
    }

    /// Adds content: `offset` and the length are multiples of 4096 (the last block of a disk is
    /// padded with zeros). Blocks of zeros become zero frames, the rest lz4 or raw ones.
    ///
    /// [`ErrorKind::Internal`] if it is unaligned, or the part has some of these blocks already.
    pub fn add_data(&mut self, disk: DiskId, offset: u64, data: &[u8]) -> Result<()> {
        if !(data.len() as u64).is_multiple_of(crate::base::BLOCK_BYTES) {
            return Err(Error::new(ErrorKind::Internal, "content of a part is not whole blocks"));
        }
        self.writer.add_data(disk, offset, data, &mut self.bytes)
    }

    /// Adds a run of zeros of any length.
    pub fn add_zeros(&mut self, disk: DiskId, offset: u64, length: u64) -> Result<()> {
        self.writer.add_empty(disk, offset, length, Encoding::Zero, &mut self.bytes)
    }

    /// Adds a hole of any length.
    pub fn add_hole(&mut self, disk: DiskId, offset: u64, length: u64) -> Result<()> {
        self.writer.add_empty(disk, offset, length, Encoding::Hole, &mut self.bytes)
    }

    /// Whether nothing was added.
    pub fn is_empty(&self) -> bool {
        self.writer.frames() == 0
    }

    /// Whether it has reached its target size; add at most 4 MiB at a time and look again.
    pub fn is_full(&self) -> bool {
        self.writer.content_bytes() >= PART_BYTES || self.writer.frames() >= FRAMES_PER_PART
    }

    /// Bytes of content (not zeros) added so far.
    pub const fn content_bytes(&self) -> u64 {
        self.writer.content_bytes()
    }

    /// Bytes of disk described so far: content, zeros and holes.
    pub const fn described_bytes(&self) -> u64 {
        self.writer.described_bytes()
    }

    /// What the part describes so far, in bytes per disk.
    pub const fn covered(&self) -> &BTreeMap<DiskId, ExtentSet> {
        self.writer.covered()
    }

    /// Ends the part and names it.
    pub fn finish(self, sequence: u32, attempt: u32) -> (PartName, Vec<u8>) {
        let mut bytes = self.bytes;
        self.writer.finish(&[], &mut bytes);
        (PartName { sequence, attempt, digest: Digest::of(&bytes) }, bytes)
    }
}

/// The index of a part: which blocks it holds, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartIndex(FrameIndex);

impl PartIndex {
    /// Bytes of the end of a part that say where its index is.
    pub const FOOTER_BYTES: usize = FOOTER_BYTES;

    /// Where the index begins in a part of `length` bytes, from its last [`Self::FOOTER_BYTES`].
    pub fn place(footer: &[u8], length: u64) -> Result<u64> {
        FrameIndex::tail_place(FramesKind::Part, footer, length)
    }

    /// Reads the bytes from [`Self::place`] to the end of a part of `length` bytes: what
    /// `Vault::part_index` returns.
    pub fn decode(tail: &[u8], length: u64) -> Result<Self> {
        FrameIndex::decode(FramesKind::Part, tail, length).map(Self)
    }

    /// Reads a tail that was kept without its part; returns the length of the part as well.
    pub fn decode_kept(tail: &[u8]) -> Result<(Self, u64)> {
        let length = FrameIndex::total_of_tail(FramesKind::Part, tail)?;
        Ok((Self::decode(tail, length)?, length))
    }

    /// Every frame, by disk and offset; they never overlap.
    pub fn frames(&self) -> &[Frame] {
        self.0.frames()
    }

    /// Frames that hold bytes of `range` of `disk`, in order.
    pub fn overlapping(&self, disk: DiskId, range: Range<u64>) -> impl Iterator<Item = &Frame> {
        self.0.overlapping(disk, range)
    }

    /// What the part describes, in bytes per disk.
    pub fn covered(&self) -> BTreeMap<DiskId, ExtentSet> {
        let mut out: BTreeMap<DiskId, ExtentSet> = BTreeMap::new();
        self.frames().iter().for_each(|f| out.entry(f.disk).or_default().insert(f.range()));
        out
    }
}

/// A part in memory whose header, footer and index are checked. Frames are checked when read.
pub struct PartReader<'a> {
    bytes: &'a [u8],
    tail: &'a [u8],
    index: PartIndex,
}

impl<'a> PartReader<'a> {
    /// Looks at a whole part.
    pub fn new(bytes: &'a [u8]) -> Result<Self> {
        let damaged = |why: &str| Error::new(ErrorKind::Damaged, "the part cannot be read").why(why);
        let length = bytes.len() as u64;
        if length > PART_BYTES_MAX {
            return Err(damaged("it is longer than a part can be"));
        }
        if FramesKind::of_header(bytes) != Some(FramesKind::Part) || bytes.len() < HEADER_BYTES + FOOTER_BYTES
        {
            return Err(damaged("it does not begin like one"));
        }
        let footer = bytes.get(bytes.len() - FOOTER_BYTES..).unwrap_or_default();
        let place = usize::try_from(PartIndex::place(footer, length)?).unwrap_or(usize::MAX);
        let tail = bytes.get(place..).ok_or_else(|| damaged("its index lies outside of it"))?;
        Ok(Self { bytes, tail, index: PartIndex::decode(tail, length)? })
    }

    /// Its index.
    pub const fn index(&self) -> &PartIndex {
        &self.index
    }

    /// The bytes of index and footer, as [`PartIndex::decode`] reads them.
    pub const fn tail(&self) -> &'a [u8] {
        self.tail
    }

    /// Fills `content` (of the frame's length) with the verified content of one of its frames.
    pub fn read(&self, frame: &Frame, content: &mut [u8]) -> Result<()> {
        let start = usize::try_from(frame.place).unwrap_or(usize::MAX);
        let stored = self.bytes.get(start..start.saturating_add(frame.stored as usize)).unwrap_or_default();
        frame.decode_content(stored, content)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const A: DiskId = DiskId(1);
    const B: DiskId = DiskId(u128::MAX);

    fn noise(length: usize, seed: u64) -> Vec<u8> {
        let mut out = vec![0; length];
        blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut out);
        out
    }

    fn sample() -> (PartName, Vec<u8>) {
        let mut b = PartBuilder::new();
        b.add_data(B, 0, &noise(600 << 10, 1)).unwrap();
        b.add_data(A, 1 << 20, &[7; 64 << 10]).unwrap();
        b.add_data(A, 0, &[vec![0; 8192], noise(4096, 2), vec![0; 4096]].concat()).unwrap();
        b.add_zeros(A, 16384, 4096).unwrap();
        b.add_hole(A, 2 << 20, 1 << 40).unwrap();
        b.finish(3, 9)
    }

    #[test]
    fn content_comes_back_and_runs_are_joined() {
        let (name, bytes) = sample();
        assert_eq!(name.digest, Digest::of(&bytes));
        let part = PartReader::new(&bytes).unwrap();
        let shapes: Vec<_> =
            part.index().frames().iter().map(|f| (f.disk, f.offset, f.length, f.encoding)).collect();
        assert_eq!(
            shapes,
            [
                (A, 0, 8192, Encoding::Zero),
                (A, 8192, 4096, Encoding::Raw),
                (A, 12288, 8192, Encoding::Zero),
                (A, 1 << 20, 64 << 10, Encoding::Lz4),
                (A, 2 << 20, 1 << 40, Encoding::Hole),
                (B, 0, 256 << 10, Encoding::Raw),
                (B, 256 << 10, 256 << 10, Encoding::Raw),
                (B, 512 << 10, 88 << 10, Encoding::Raw),
            ]
        );
        let expected = noise(600 << 10, 1);
        for f in part.index().overlapping(B, 300 << 10..520 << 10) {
            let mut content = vec![0; f.length as usize];
            part.read(f, &mut content).unwrap();
            assert_eq!(content, expected[f.offset as usize..f.end() as usize]);
        }
        assert_eq!(part.index().overlapping(B, 300 << 10..520 << 10).count(), 2);
        assert_eq!(part.index().covered()[&A].total(), 20480 + (64 << 10) + (1 << 40));
    }

    #[test]
    fn overlapping_and_unaligned_content_is_refused() {
        let mut b = PartBuilder::new();
        b.add_data(A, 4096, &[1; 8192]).unwrap();
        assert!(b.add_data(A, 8192, &[1; 4096]).is_err());
        assert!(b.add_hole(A, 0, 8192).is_err());
        assert!(b.add_data(A, 1, &[1; 4096]).is_err());
        assert!(b.add_data(A, 1 << 20, &[1; 100]).is_err());
        assert!(b.add_hole(A, 1 << 20, u64::MAX - 4095).is_err());
        assert!(!b.is_full());
    }

    #[test]
    fn every_flipped_byte_of_the_end_and_every_cut_is_noticed() {
        let (_, bytes) = sample();
        let tail = bytes.len() - PartReader::new(&bytes).unwrap().tail().len();
        for at in (tail..bytes.len()).chain(0..8) {
            let mut bad = bytes.clone();
            bad[at] ^= 0x10;
            assert!(PartReader::new(&bad).is_err(), "byte {at}");
        }
        for cut in [0, 1, 15, 16, 79, bytes.len() / 2, bytes.len() - 1] {
            assert!(PartReader::new(&bytes[..cut]).is_err(), "cut at {cut}");
        }
        let mut bad = bytes.clone();
        bad[100] ^= 1;
        let part = PartReader::new(&bad).unwrap();
        let first = part.index().frames().iter().find(|f| f.place < 101).unwrap();
        let mut content = vec![0; first.length as usize];
        assert_eq!(part.read(first, &mut content).unwrap_err().kind(), ErrorKind::Damaged);
    }

    #[test]
    fn another_version_is_named() {
        let (_, mut bytes) = sample();
        let at = bytes.len() - FOOTER_BYTES + 8;
        bytes[at] = 9;
        let error = PartReader::new(&bytes).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Version);
        assert!(error.next_step().is_some());
    }

    #[test]
    fn names_have_one_spelling() {
        let name = PartName { sequence: 12, attempt: 0x3fa9_c1d2, digest: Digest::of(b"x") };
        let text = name.to_string();
        assert!(text.starts_with("000012-3fa9c1d2-"));
        assert_eq!(text.parse::<PartName>().unwrap(), name);
        for bad in [
            text.to_uppercase(),
            text.replacen("000012", "12", 1),
            text.replacen("000012", "+00012", 1),
            format!("../{text}"),
            format!("{text}-"),
            text.replacen("3fa9c1d2", "03fa9c1d2", 1),
            String::new(),
        ] {
            assert!(bad.parse::<PartName>().is_err(), "{bad}");
        }
    }

    proptest! {
        /// No bytes make the decoder panic or allocate without bound.
        #[test]
        fn any_bytes_are_survived(
            bytes in prop::collection::vec(any::<u8>(), 0..400),
            total in any::<u64>(),
        ) {
            let _ = PartReader::new(&bytes);
            let _ = PartIndex::decode(&bytes, total);
        }

        /// A part equals the image it was made from.
        #[test]
        fn equals_the_image(runs in prop::collection::vec((0u64..64, 1u64..40, 0u8..4), 1..12)) {
            let mut image = vec![0u8; 128 * 4096];
            let mut b = PartBuilder::new();
            let mut taken = ExtentSet::new();
            for (i, (block, count, kind)) in runs.into_iter().enumerate() {
                let range = block * 4096..(block + count) * 4096;
                if taken.intersects(range.clone()) { continue; }
                taken.insert(range.clone());
                let length = (range.end - range.start) as usize;
                let data = match kind {
                    0 => vec![0; length],
                    1 => vec![9; length],
                    _ => noise(length, i as u64),
                };
                image[range.start as usize..range.end as usize].copy_from_slice(&data);
                if kind == 0 { b.add_hole(A, range.start, length as u64).unwrap() }
                else { b.add_data(A, range.start, &data).unwrap() }
            }
            let (_, bytes) = b.finish(0, 0);
            let part = PartReader::new(&bytes).unwrap();
            prop_assert_eq!(&part.index().covered()[&A], &taken);
            for f in part.index().frames() {
                let mut content = vec![1; f.length as usize];
                part.read(f, &mut content).unwrap();
                prop_assert_eq!(&content[..], &image[f.offset as usize..f.end() as usize]);
            }
        }
    }
}
