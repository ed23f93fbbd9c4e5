//! The change-tracking log (HRL): which blocks of one disk changed in one epoch.
//!
//! ```text
//! page 0: header                          4096.. : records, each at a multiple of 64
//!   0   8  magic "AFIMHRL\n"                0   4  magic "rec\n"
//!   8   4  version                          4   2  kind
//!  12   4  bytes of a block                 6   2  zero
//!  16  16  VM                               8   4  bytes of the payload, at most 65536
//!  32  16  disk                            12   4  sequence, counted from 0
//!  48   8  epoch                           16   8  check of bytes 0..16, the offset, the payload
//!  56   8  check of bytes 0..56            24   n  payload, then zeros up to a multiple of 64
//!  64  16  nonce
//!  80   8  created, ms since 1970         64 GiB.. : preserved blocks
//!  88  16  boot id                          one page each, in no order; the index of them,
//! 104   2  bytes of the path                and the first of them, are in memory only
//! 106   n  path of the disk in its mount
//! 4088  8  check of bytes 0..4088
//! ```
//!
//! Numbers are little-endian. A check is the first 8 bytes of a blake3 hash; that of a record is
//! keyed with the nonce, so that guest data which looks like a record is never taken for one.
//! The first 64 bytes carry a check of their own: they suffice to recognise the file.
//!
//! Records are additive: a block once marked stays marked. Map records hold one chunk (64 MiB of
//! disk) as a list, as runs or as a bitmap, whichever is smallest. A *sync* record ends a batch
//! that is then synced: what is unreadable before the last one is damage, what is unreadable
//! after it is a torn tail, which a power cut may leave.
//!
//! Killed while appending: a torn tail; shared memory has the marks. Disk full: the append fails
//! and the marks stay in memory. Written by a newer version: the header says so and nothing else
//! is read.

use std::io::Read;

use serde::Serialize;

use crate::base::{
    BLOCK_BYTES, BootId, CHUNK_BLOCKS, DiskId, EpochNumber, Error, ErrorKind, Extent, ExtentSet, Result,
    Timestamp, VmId,
};

/// First bytes of the file.
pub const HRL_MAGIC: [u8; 8] = *b"AFIMHRL\n";
/// Version of the format.
pub const HRL_VERSION: u32 = 1;
/// Bytes of the header page.
pub const HRL_HEADER_BYTES: usize = 4096;
/// Bytes that [`is_hrl_header`] needs.
pub const HRL_PREFIX_BYTES: usize = 64;
/// Offset of the first preserved block.
pub const PRESERVED_OFFSET: u64 = 64 << 30;
/// Longest path that the header keeps; a longer one is cut.
const PATH_BYTES_MAX: usize = 3900;
const PATH_AT: usize = 106;
const RECORD_MAGIC: [u8; 4] = *b"rec\n";
const RECORD_HEAD: usize = 24;
const RECORD_ALIGN: usize = 64;
const PAYLOAD_BYTES_MAX: usize = 65536;
/// Unreadable bytes after which a reader stops to look for another record.
const GAP_BYTES_MAX: u64 = 4 << 20;
/// 64-bit words of the bitmap of one chunk.
pub const CHUNK_WORDS: usize = (CHUNK_BLOCKS / 64) as usize;

const _: () = assert!(PATH_AT + PATH_BYTES_MAX <= HRL_HEADER_BYTES - 8);
const _: () = assert!(CHUNK_BLOCKS <= 65536, "blocks of a chunk are u16");
const _: () = assert!(PRESERVED_OFFSET.is_multiple_of(BLOCK_BYTES));

/// The header.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HrlHeader {
    /// Whose disk.
    pub vm: VmId,
    /// Which disk.
    pub disk: DiskId,
    /// Which epoch.
    pub epoch: EpochNumber,
    /// When the file was made.
    pub created: Timestamp,
    /// The boot in which it was made.
    pub boot: BootId,
    /// Path of the disk relative to its mount, when the file was made.
    pub path: String,
    /// Seed of the checks.
    #[serde(skip)]
    pub nonce: u128,
}

/// A record that is no map.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "record", rename_all = "kebab-case")]
pub enum HrlRecord {
    /// Blocks in a row (numbers, not bytes): hot regions after a power cut.
    Range {
        /// First block.
        start: u64,
        /// Number of blocks.
        length: u64,
    },
    /// The epoch was cut.
    Cut {
        /// When.
        time: Timestamp,
        /// Size of the disk at the cut, in bytes.
        size: u64,
    },
    /// Every allocated block counts as changed.
    Whole {
        /// Why.
        reason: String,
    },
    /// The disk has another path.
    Renamed {
        /// The new path relative to the mount.
        path: String,
    },
    /// The epoch gave up its cut.
    GaveUp,
    /// Everything before was synced with this record.
    Sync,
    /// The daemon stopped cleanly.
    Stopped,
}

/// A spot that cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct DamagedSpot {
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// It was synced before: this is damage. Otherwise it is a torn tail.
    pub synced: bool,
}

/// What a file holds.
#[derive(Clone, Debug, Serialize)]
pub struct HrlReport {
    /// The header.
    pub header: HrlHeader,
    /// Marked blocks (numbers).
    #[serde(serialize_with = "as_extents")]
    pub blocks: ExtentSet,
    /// Number of map records.
    pub map_records: u64,
    /// The other records, in order; sync records are left out.
    pub records: Vec<HrlRecord>,
    /// Spots that cannot be read.
    pub damaged: Vec<DamagedSpot>,
    /// Bytes from the beginning of the file to the end of the last good record.
    pub log_bytes: u64,
    /// Sequence of the next record.
    #[serde(skip)]
    pub next_sequence: u32,
}

impl HrlReport {
    /// Why the disk ships whole, if a record says so.
    pub fn whole(&self) -> Option<&str> {
        self.records.iter().rev().find_map(|r| match r {
            HrlRecord::Whole { reason } => Some(reason.as_str()),
            _ => None,
        })
    }

    /// Whether everything that was synced can be read.
    pub fn is_complete(&self) -> bool {
        !self.damaged.iter().any(|d| d.synced)
    }
}

fn as_extents<S: serde::Serializer>(set: &ExtentSet, s: S) -> std::result::Result<S::Ok, S::Error> {
    s.collect_seq(set.iter().map(|r| Extent { offset: r.start, length: r.end - r.start }))
}

fn check(bytes: &[u8]) -> [u8; 8] {
    first8(&blake3::hash(bytes))
}

fn first8(hash: &blake3::Hash) -> [u8; 8] {
    let b = hash.as_bytes();
    [b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]
}

fn record_check(nonce: u128, offset: u64, head: &[u8], payload: &[u8]) -> [u8; 8] {
    let mut key = [0u8; 32];
    key[..16].copy_from_slice(&nonce.to_le_bytes());
    let mut hasher = blake3::Hasher::new_keyed(&key);
    hasher.update(head).update(&offset.to_le_bytes()).update(payload);
    first8(&hasher.finalize())
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    array(bytes, at).map(u64::from_le_bytes)
}

/// Whether these first bytes of a file (64 suffice) are those of an HRL, of any version.
pub fn is_hrl_header(bytes: &[u8]) -> bool {
    bytes.starts_with(&HRL_MAGIC)
        && bytes.get(..56).is_some_and(|prefix| array::<8>(bytes, 56) == Some(check(prefix)))
}

impl HrlHeader {
    /// The header page.
    pub fn encode(&self) -> Vec<u8> {
        let mut page = Vec::with_capacity(HRL_HEADER_BYTES);
        page.extend_from_slice(&HRL_MAGIC);
        page.extend_from_slice(&HRL_VERSION.to_le_bytes());
        page.extend_from_slice(&(BLOCK_BYTES as u32).to_le_bytes());
        page.extend_from_slice(&self.vm.0.to_le_bytes());
        page.extend_from_slice(&self.disk.0.to_le_bytes());
        page.extend_from_slice(&self.epoch.0.to_le_bytes());
        let prefix = check(&page);
        page.extend_from_slice(&prefix);
        page.extend_from_slice(&self.nonce.to_le_bytes());
        page.extend_from_slice(&self.created.0.to_le_bytes());
        page.extend_from_slice(&self.boot.0.to_le_bytes());
        let path = cut_at_char(&self.path, PATH_BYTES_MAX);
        page.extend_from_slice(&(path.len() as u16).to_le_bytes());
        page.extend_from_slice(path.as_bytes());
        page.resize(HRL_HEADER_BYTES - 8, 0);
        let whole = check(&page);
        page.extend_from_slice(&whole);
        page
    }

    /// Reads the header page.
    pub fn decode(page: &[u8]) -> Result<Self> {
        let damaged =
            |why: &str| Error::new(ErrorKind::Damaged, "the change-tracking log cannot be read").why(why);
        if !is_hrl_header(page) {
            return Err(damaged("it does not begin as one"));
        }
        let version = array(page, 8).map_or(0, u32::from_le_bytes);
        if version != HRL_VERSION {
            return Err(Error::new(ErrorKind::Version, "the change-tracking log cannot be read")
                .why(format!("it has version {version}, this program knows {HRL_VERSION}"))
                .hint("use the version of afterimage that wrote it, or a newer one"));
        }
        Self::decode_fields(page).ok_or_else(|| damaged("its header is damaged"))
    }

    fn decode_fields(page: &[u8]) -> Option<Self> {
        let body = page.get(..HRL_HEADER_BYTES - 8)?;
        if array::<8>(page, HRL_HEADER_BYTES - 8)? != check(body) {
            return None;
        }
        let length = usize::from(u16::from_le_bytes(array(page, 104)?));
        let path = body.get(PATH_AT..PATH_AT.checked_add(length)?)?;
        Some(Self {
            vm: VmId(u128::from_le_bytes(array(page, 16)?)),
            disk: DiskId(u128::from_le_bytes(array(page, 32)?)),
            epoch: EpochNumber(u64_at(page, 48)?),
            nonce: u128::from_le_bytes(array(page, 64)?),
            created: Timestamp(i64::from_le_bytes(array(page, 80)?)),
            boot: BootId(u128::from_le_bytes(array(page, 88)?)),
            path: String::from_utf8_lossy(path).into_owned(),
        })
    }
}

fn cut_at_char(text: &str, bytes_max: usize) -> &str {
    let mut end = text.len().min(bytes_max);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.get(..end).unwrap_or("")
}

/// Appends records to the bytes of one file, from one writer.
#[derive(Clone, Debug)]
pub struct HrlEncoder {
    nonce: u128,
    offset: u64,
    sequence: u32,
}

impl HrlEncoder {
    /// Of a new file.
    pub fn new(header: &HrlHeader) -> Self {
        Self { nonce: header.nonce, offset: HRL_HEADER_BYTES as u64, sequence: 0 }
    }

    /// Goes on after what a report found.
    pub fn resume(report: &HrlReport) -> Self {
        let end = report.damaged.iter().map(|d| d.offset + d.length).max().unwrap_or(0);
        let offset = report.log_bytes.max(end).next_multiple_of(RECORD_ALIGN as u64);
        Self { nonce: report.header.nonce, offset, sequence: report.next_sequence }
    }

    /// Where the next record goes.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Appends a record to `out`, which will be written at the offset that was before.
    pub fn record(&mut self, record: &HrlRecord, out: &mut Vec<u8>) {
        let mut payload = Vec::new();
        let kind = match record {
            HrlRecord::Range { start, length } => {
                payload.extend_from_slice(&start.to_le_bytes());
                payload.extend_from_slice(&length.to_le_bytes());
                KIND_RANGE
            }
            HrlRecord::Cut { time, size } => {
                payload.extend_from_slice(&time.0.to_le_bytes());
                payload.extend_from_slice(&size.to_le_bytes());
                KIND_CUT
            }
            HrlRecord::Whole { reason } => {
                payload.extend_from_slice(cut_at_char(reason, PATH_BYTES_MAX).as_bytes());
                KIND_WHOLE
            }
            HrlRecord::Renamed { path } => {
                payload.extend_from_slice(cut_at_char(path, PATH_BYTES_MAX).as_bytes());
                KIND_RENAMED
            }
            HrlRecord::GaveUp => KIND_GAVE_UP,
            HrlRecord::Sync => KIND_SYNC,
            HrlRecord::Stopped => KIND_STOPPED,
        };
        self.append(kind, &payload, out);
    }

    /// Appends the marked blocks of a chunk; nothing if there are none.
    pub fn chunk(&mut self, chunk: u32, bits: &[u64; CHUNK_WORDS], out: &mut Vec<u8>) {
        let count: usize = bits.iter().map(|w| w.count_ones() as usize).sum();
        if count == 0 {
            return;
        }
        let runs = runs_of(bits);
        let mut payload = chunk.to_le_bytes().to_vec();
        let (list_bytes, runs_bytes, bitmap_bytes) = (count * 2, runs.len() * 4, CHUNK_WORDS * 8);
        if runs_bytes <= list_bytes.min(bitmap_bytes) {
            payload.extend_from_slice(&ENCODING_RUNS.to_le_bytes());
            for (start, length) in runs {
                payload.extend_from_slice(&start.to_le_bytes());
                payload.extend_from_slice(&(length - 1).to_le_bytes());
            }
        } else if list_bytes <= bitmap_bytes {
            payload.extend_from_slice(&ENCODING_LIST.to_le_bytes());
            for (start, length) in runs {
                (0..length).for_each(|i| payload.extend_from_slice(&(start + i).to_le_bytes()));
            }
        } else {
            payload.extend_from_slice(&ENCODING_BITMAP.to_le_bytes());
            bits.iter().for_each(|w| payload.extend_from_slice(&w.to_le_bytes()));
        }
        self.append(KIND_MAP, &payload, out);
    }

    fn append(&mut self, kind: u16, payload: &[u8], out: &mut Vec<u8>) {
        let mut head = Vec::with_capacity(16);
        head.extend_from_slice(&RECORD_MAGIC);
        head.extend_from_slice(&kind.to_le_bytes());
        head.extend_from_slice(&[0, 0]);
        head.extend_from_slice(&(payload.len() as u32).to_le_bytes());
        head.extend_from_slice(&self.sequence.to_le_bytes());
        let sum = record_check(self.nonce, self.offset, &head, payload);
        let before = out.len();
        out.extend_from_slice(&head);
        out.extend_from_slice(&sum);
        out.extend_from_slice(payload);
        let bytes = (out.len() - before).next_multiple_of(RECORD_ALIGN);
        out.resize(before + bytes, 0);
        self.offset += bytes as u64;
        self.sequence = self.sequence.wrapping_add(1);
    }
}

/// Runs of set bits as (start, length). A full chunk is one run of 16384, which fits.
fn runs_of(bits: &[u64; CHUNK_WORDS]) -> Vec<(u16, u16)> {
    let mut runs: Vec<(u16, u16)> = Vec::new();
    for (index, word) in bits.iter().enumerate() {
        let mut rest = *word;
        let mut at = 0u32;
        while rest != 0 {
            let skip = rest.trailing_zeros();
            rest >>= skip;
            let ones = rest.trailing_ones();
            let start = (index * 64) as u16 + (at + skip) as u16;
            match runs.last_mut() {
                Some((s, l)) if *s + *l == start => *l += ones as u16,
                _ => runs.push((start, ones as u16)),
            }
            at += skip + ones;
            rest = if ones == 64 { 0 } else { rest >> ones };
        }
    }
    runs
}

const KIND_MAP: u16 = 1;
const KIND_RANGE: u16 = 2;
const KIND_CUT: u16 = 3;
const KIND_WHOLE: u16 = 4;
const KIND_RENAMED: u16 = 5;
const KIND_GAVE_UP: u16 = 6;
const KIND_SYNC: u16 = 7;
const KIND_STOPPED: u16 = 8;
const ENCODING_LIST: u16 = 0;
const ENCODING_RUNS: u16 = 1;
const ENCODING_BITMAP: u16 = 2;

/// Reads a file: its header must be good, everything after it may be damaged or torn.
///
/// Stops 4 MiB after the last good record, so that the preserved blocks of a sparse file are
/// never read.
pub fn read(source: &mut dyn Read) -> Result<HrlReport> {
    let mut window = Window { source, bytes: Vec::new(), at: 0, offset: 0 };
    window.fill(HRL_HEADER_BYTES)?;
    let header = HrlHeader::decode(window.rest())?;
    window.skip(HRL_HEADER_BYTES);
    let mut report = HrlReport {
        header,
        blocks: ExtentSet::new(),
        map_records: 0,
        records: Vec::new(),
        damaged: Vec::new(),
        log_bytes: HRL_HEADER_BYTES as u64,
        next_sequence: 0,
    };
    let mut bad: Option<(u64, bool)> = None;
    loop {
        window.fill(RECORD_ALIGN)?;
        if window.rest().is_empty() || bad.is_some_and(|(from, _)| window.offset - from > GAP_BYTES_MAX) {
            break;
        }
        match take_record(&mut window, &mut report)? {
            true => {
                bad = None;
                report.log_bytes = window.offset;
            }
            false => {
                let step = window.rest().len().min(RECORD_ALIGN);
                let zero = window.rest().iter().take(step).all(|b| *b == 0);
                let (from, only_zeros) = bad.unwrap_or((window.offset, true));
                bad = Some((from, only_zeros && zero));
                window.skip(step);
            }
        }
    }
    if let Some((from, false)) = bad {
        report.damaged.push(DamagedSpot { offset: from, length: window.offset - from, synced: false });
    }
    Ok(report)
}

/// Decodes the record at the window, if it is one, and steps over it.
fn take_record(window: &mut Window<'_>, report: &mut HrlReport) -> Result<bool> {
    let Some(length) = record_length(window.rest()) else { return Ok(false) };
    let total = (RECORD_HEAD + length).next_multiple_of(RECORD_ALIGN);
    window.fill(total)?;
    let bytes = window.rest();
    let (Some(head), Some(payload)) = (bytes.get(..16), bytes.get(RECORD_HEAD..RECORD_HEAD + length)) else {
        return Ok(false);
    };
    let sum = record_check(report.header.nonce, window.offset, head, payload);
    if array::<8>(bytes, 16) != Some(sum) {
        return Ok(false);
    }
    let kind = array(bytes, 4).map_or(0, u16::from_le_bytes);
    let sequence = array(bytes, 12).map_or(0, u32::from_le_bytes);
    if apply(kind, payload, report).is_none() {
        return Ok(false);
    }
    report.next_sequence = sequence.wrapping_add(1);
    // The spot that this record ends, if any, begins where the last good record ended.
    let offset = window.offset;
    window.skip(total.min(window.rest().len()));
    if report.log_bytes < offset {
        let spot = DamagedSpot { offset: report.log_bytes, length: offset - report.log_bytes, synced: false };
        report.damaged.push(spot);
        report.log_bytes = offset;
    }
    if kind == KIND_SYNC {
        report.damaged.iter_mut().for_each(|d| d.synced = true);
    }
    Ok(true)
}

fn record_length(bytes: &[u8]) -> Option<usize> {
    if !bytes.starts_with(&RECORD_MAGIC) {
        return None;
    }
    let length = u32::from_le_bytes(array(bytes, 8)?) as usize;
    (length <= PAYLOAD_BYTES_MAX).then_some(length)
}

fn apply(kind: u16, payload: &[u8], report: &mut HrlReport) -> Option<()> {
    let text = || String::from_utf8_lossy(payload).into_owned();
    let record = match kind {
        KIND_MAP => {
            apply_map(payload, &mut report.blocks)?;
            report.map_records += 1;
            return Some(());
        }
        KIND_SYNC => return Some(()),
        KIND_RANGE => {
            let (start, length) = (u64_at(payload, 0)?, u64_at(payload, 8)?);
            report.blocks.insert(start..start.saturating_add(length));
            HrlRecord::Range { start, length }
        }
        KIND_CUT => HrlRecord::Cut {
            time: Timestamp(i64::from_le_bytes(array(payload, 0)?)),
            size: u64_at(payload, 8)?,
        },
        KIND_WHOLE => HrlRecord::Whole { reason: text() },
        KIND_RENAMED => HrlRecord::Renamed { path: text() },
        KIND_GAVE_UP => HrlRecord::GaveUp,
        KIND_STOPPED => HrlRecord::Stopped,
        _ => return None,
    };
    report.records.push(record);
    Some(())
}

fn apply_map(payload: &[u8], blocks: &mut ExtentSet) -> Option<()> {
    let base = u64::from(u32::from_le_bytes(array(payload, 0)?)) * CHUNK_BLOCKS;
    let encoding = u16::from_le_bytes(array(payload, 4)?);
    let data = payload.get(6..)?;
    let pair = |c: &[u8]| u64::from(u16::from_le_bytes([c[0], c[1]]));
    match encoding {
        ENCODING_LIST => data.chunks_exact(2).for_each(|c| {
            let block = base + pair(c);
            blocks.insert(block..block + 1);
        }),
        ENCODING_RUNS => data.chunks_exact(4).for_each(|c| {
            let start = base + pair(c);
            blocks.insert(start..start + pair(&c[2..]) + 1);
        }),
        ENCODING_BITMAP if data.len() == CHUNK_WORDS * 8 => {
            for (byte, value) in data.iter().enumerate() {
                (0..8).filter(|bit| value >> bit & 1 == 1).for_each(|bit| {
                    let block = base + byte as u64 * 8 + bit;
                    blocks.insert(block..block + 1);
                });
            }
        }
        _ => return None,
    }
    Some(())
}

/// Bytes of the source around the place of the reader.
struct Window<'a> {
    source: &'a mut dyn Read,
    bytes: Vec<u8>,
    at: usize,
    offset: u64,
}

impl Window<'_> {
    /// Tries to have `n` bytes ahead; fewer at the end of the file.
    fn fill(&mut self, n: usize) -> Result<()> {
        if self.rest().len() >= n {
            return Ok(());
        }
        self.bytes.drain(..self.at);
        self.at = 0;
        let want = n.max(1 << 16) - self.bytes.len();
        self.source
            .take(want as u64)
            .read_to_end(&mut self.bytes)
            .map_err(|e| Error::io("the change-tracking log cannot be read", e))?;
        Ok(())
    }

    fn rest(&self) -> &[u8] {
        self.bytes.get(self.at..).unwrap_or(&[])
    }

    fn skip(&mut self, n: usize) {
        self.at += n;
        self.offset += n as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header() -> HrlHeader {
        HrlHeader {
            vm: VmId(7),
            disk: DiskId(8),
            epoch: EpochNumber(9),
            created: Timestamp(1_700_000_000_000),
            boot: BootId(3),
            path: "sub/a.qcow2".into(),
            nonce: 0x1234_5678,
        }
    }

    fn bits_of(blocks: &ExtentSet) -> [u64; CHUNK_WORDS] {
        let mut bits = [0u64; CHUNK_WORDS];
        blocks.iter().flatten().for_each(|b| bits[b as usize / 64] |= 1 << (b % 64));
        bits
    }

    fn file(sets: &[(u32, ExtentSet)]) -> Vec<u8> {
        let h = header();
        let mut bytes = h.encode();
        let mut encoder = HrlEncoder::new(&h);
        for (chunk, set) in sets {
            encoder.chunk(*chunk, &bits_of(set), &mut bytes);
            encoder.record(&HrlRecord::Sync, &mut bytes);
        }
        assert_eq!(encoder.offset(), bytes.len() as u64);
        bytes
    }

    fn sets() -> impl Strategy<Value = Vec<(u32, ExtentSet)>> {
        let one = prop_oneof![
            prop::collection::vec((0u64..CHUNK_BLOCKS - 40, 1u64..40), 0..40),
            prop::collection::vec((0u64..CHUNK_BLOCKS - 1, 1u64..2), 0..3000),
            Just(vec![(0, CHUNK_BLOCKS)]),
        ];
        let set = one.prop_map(|v| v.into_iter().map(|(s, l)| s..s + l).collect::<ExtentSet>());
        prop::collection::vec((0u32..4, set), 1..4)
    }

    fn union(sets: &[(u32, ExtentSet)]) -> ExtentSet {
        let shift = |(c, s): &(u32, ExtentSet)| {
            let base = u64::from(*c) * CHUNK_BLOCKS;
            s.iter().map(move |r| r.start + base..r.end + base).collect::<Vec<_>>()
        };
        sets.iter().flat_map(shift).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn what_is_written_is_read(sets in sets()) {
            let bytes = file(&sets);
            let report = read(&mut &bytes[..]).unwrap();
            prop_assert_eq!(&report.blocks, &union(&sets));
            prop_assert!(report.damaged.is_empty());
            prop_assert_eq!(report.log_bytes, bytes.len() as u64);
            prop_assert_eq!(&report.header, &header());
        }

        /// One flipped bit never panics, is found, and adds no block; all before it is kept.
        #[test]
        fn damage_is_found(sets in sets(), at in any::<prop::sample::Index>(), bit in 0u8..8) {
            let mut bytes = file(&sets);
            let i = HRL_HEADER_BYTES + at.index(bytes.len() - HRL_HEADER_BYTES);
            bytes[i] ^= 1 << bit;
            let report = read(&mut &bytes[..]).unwrap();
            let whole = union(&sets);
            prop_assert!(report.blocks.iter().flatten().all(|b| whole.contains(b)));
            // A flip in the padding changes nothing; any other is reported.
            if report.damaged.is_empty() {
                prop_assert_eq!(report.blocks, whole);
            }
        }

        #[test]
        fn torn_tails_are_no_damage(sets in sets(), cut in any::<prop::sample::Index>()) {
            let bytes = file(&sets);
            let end = HRL_HEADER_BYTES + cut.index(bytes.len() - HRL_HEADER_BYTES);
            let report = read(&mut &bytes[..end]).unwrap();
            prop_assert!(report.is_complete());
            let mut resumed = bytes[..end].to_vec();
            let mut encoder = HrlEncoder::resume(&report);
            resumed.resize(encoder.offset() as usize, 0);
            encoder.record(&HrlRecord::Range { start: 1 << 30, length: 5 }, &mut resumed);
            let again = read(&mut &resumed[..]).unwrap();
            // A record that was cut within zeros at its end may be whole again: it was written once.
            let all = union(&sets);
            let range: ExtentSet = std::iter::once((1 << 30)..(1 << 30) + 5).collect();
            prop_assert!(report.blocks.iter().chain(range.iter()).all(|r| again.blocks.gaps(r).is_empty()));
            prop_assert!(again.blocks.iter().all(|r| r.start == 1 << 30 || all.gaps(r).is_empty()));
        }

        #[test]
        fn arbitrary_bytes_never_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..9000)) {
            let _ = read(&mut &bytes[..]);
            let h = header().encode();
            if bytes.len() > h.len() {
                bytes[..h.len()].copy_from_slice(&h);
                prop_assert!(read(&mut &bytes[..]).unwrap().blocks.is_empty());
            }
        }
    }

    #[test]
    fn damage_before_a_sync_is_damage() {
        let one: ExtentSet = std::iter::once(3..9).collect();
        let mut bytes = file(&[(0, one.clone()), (1, one)]);
        bytes[HRL_HEADER_BYTES + 26] ^= 1;
        let report = read(&mut &bytes[..]).unwrap();
        assert!(!report.is_complete(), "{:?}", report.damaged);
        assert_eq!(report.damaged.len(), 1);
        assert_eq!(report.damaged[0].offset, HRL_HEADER_BYTES as u64);
    }

    #[test]
    fn the_first_64_bytes_suffice() {
        let page = header().encode();
        assert!(is_hrl_header(&page[..64]));
        assert!(!is_hrl_header(&page[..63]));
        let mut other = page.clone();
        other[20] ^= 1;
        assert!(!is_hrl_header(&other));
        assert!(!is_hrl_header(b"AFIMHRL\n"));
        let mut newer = header();
        newer.path = "x".repeat(9000);
        assert_eq!(HrlHeader::decode(&newer.encode()).unwrap().path.len(), PATH_BYTES_MAX);
    }
}
