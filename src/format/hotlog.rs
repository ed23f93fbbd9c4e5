//! The hot-region log: which 4 MiB regions of which disks may have changed since the last durable
//! map (T6, T7). One per host, in the state folder, two files in turn.
//!
//! ```text
//! page 0: header                          4096.. : records of 64 bytes
//!   0   8  magic "AFIMHOT\n"                0   4  magic "hot\n"
//!   8   4  version                          4   4  kind: 1 hot, 2 cold, 3 forget, 4 snapshot
//!  12   4  zero                             8  16  disk
//!  16  16  id of the log                   24   8  first region
//!  32   8  generation                      32   8  number of regions
//!  40  16  nonce                           40   8  number of the activation
//!  56  16  boot id                         48   8  sequence, counted from 0
//!  72   8  number of the last activation   56   8  check of the 56 bytes, keyed with the nonce
//!  80   8  check of bytes 0..80
//! ```
//!
//! Numbers are little-endian. The file is preallocated and written with zeros, so that a record
//! becomes durable by fdatasync alone, without metadata. It begins with a snapshot that ends with
//! a *snapshot* record; a file without one was never the log. The file with the highest
//! generation is the log: a new one is whole and synced before anything is appended to it.
//!
//! Every record that is appended is written twice, and so is the *snapshot* record: one that rots
//! has its like before or behind it, so that rot is never taken for a torn end. The first of the
//! two has an even number: both are in one sector, which no power cut tears.
//!
//! *Cold* ends only activations up to its number, so that a newer one voids it (T6).
//!
//! Killed or out of power while appending: the last batch may be torn; its writers were not told
//! that they may go on. A record that cannot be read before others that can is damage: then
//! nothing is known and every disk is compared whole.

use std::collections::BTreeMap;
use std::ops::Range;

use serde::Serialize;

use crate::base::{BootId, DiskId, Error, ErrorKind, Extent, Result};

/// First bytes of the file.
pub const HOT_MAGIC: [u8; 8] = *b"AFIMHOT\n";
/// Version of the format.
pub const HOT_VERSION: u32 = 1;
/// Bytes of the header page.
pub const HOT_HEADER_BYTES: usize = 4096;
/// Bytes of a record.
pub const HOT_RECORD_BYTES: usize = 64;
/// Largest file that a reader accepts.
pub const HOT_BYTES_MAX: u64 = 1 << 30;
const RECORD_MAGIC: [u8; 4] = *b"hot\n";

const _: () = assert!(4 + 4 + 16 + 5 * 8 == HOT_RECORD_BYTES);

/// The header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct HotHeader {
    /// Id of the log; tells a foreign one.
    #[serde(serialize_with = "as_hex")]
    pub log: u128,
    /// Counts the files; the highest is the log.
    pub generation: u64,
    /// Seed of the checks.
    #[serde(skip)]
    pub nonce: u128,
    /// The boot in which the file was made.
    pub boot: BootId,
    /// Number of the last activation before the file was made.
    pub last_activation: u64,
}

/// What a record says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HotKind {
    /// The regions are hot.
    Hot,
    /// Activations of the regions up to the number are over.
    Cold,
    /// The disk is not protected any more.
    Forget,
    /// The snapshot at the beginning of the file is whole.
    Snapshot,
}

/// A record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HotRecord {
    /// What it says.
    pub kind: HotKind,
    /// Of which disk.
    pub disk: DiskId,
    /// First region.
    pub start: u64,
    /// Number of regions.
    pub length: u64,
    /// Number of the activation.
    pub activation: u64,
}

impl HotHeader {
    /// The header page.
    pub fn encode(&self) -> Vec<u8> {
        let mut page = Vec::with_capacity(HOT_HEADER_BYTES);
        page.extend_from_slice(&HOT_MAGIC);
        page.extend_from_slice(&HOT_VERSION.to_le_bytes());
        page.extend_from_slice(&[0; 4]);
        page.extend_from_slice(&self.log.to_le_bytes());
        page.extend_from_slice(&self.generation.to_le_bytes());
        page.extend_from_slice(&self.nonce.to_le_bytes());
        page.extend_from_slice(&self.boot.0.to_le_bytes());
        page.extend_from_slice(&self.last_activation.to_le_bytes());
        let sum = check(0, &page);
        page.extend_from_slice(&sum);
        page.resize(HOT_HEADER_BYTES, 0);
        page
    }

    /// Reads the header page.
    pub fn decode(page: &[u8]) -> Result<Self> {
        let failed = |kind, why: String| Err(Error::new(kind, "the hot-region log cannot be read").why(why));
        if !page.starts_with(&HOT_MAGIC) {
            return failed(ErrorKind::Damaged, "it does not begin as one".into());
        }
        let version = array(page, 8).map_or(0, u32::from_le_bytes);
        // The check of the header is in its place in every version.
        if version != HOT_VERSION && Self::decode_fields(page).is_some() {
            let why = format!("it has version {version}, this program knows {HOT_VERSION}");
            return failed(ErrorKind::Version, why);
        }
        match Self::decode_fields(page) {
            Some(header) => Ok(header),
            None => failed(ErrorKind::Damaged, "its header is damaged".into()),
        }
    }

    fn decode_fields(page: &[u8]) -> Option<Self> {
        if array::<8>(page, 80)? != check(0, page.get(..80)?) {
            return None;
        }
        Some(Self {
            log: u128::from_le_bytes(array(page, 16)?),
            generation: u64::from_le_bytes(array(page, 32)?),
            nonce: u128::from_le_bytes(array(page, 40)?),
            boot: BootId(u128::from_le_bytes(array(page, 56)?)),
            last_activation: u64::from_le_bytes(array(page, 72)?),
        })
    }
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn check(nonce: u128, bytes: &[u8]) -> [u8; 8] {
    let mut key = [0u8; 32];
    key[..16].copy_from_slice(&nonce.to_le_bytes());
    let hash = blake3::keyed_hash(&key, bytes);
    let b = hash.as_bytes();
    [b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]
}

impl HotRecord {
    /// Its 64 bytes.
    pub fn encode(&self, nonce: u128, sequence: u64) -> [u8; HOT_RECORD_BYTES] {
        let kind: u32 = match self.kind {
            HotKind::Hot => 1,
            HotKind::Cold => 2,
            HotKind::Forget => 3,
            HotKind::Snapshot => 4,
        };
        let mut out = [0u8; HOT_RECORD_BYTES];
        out[..4].copy_from_slice(&RECORD_MAGIC);
        out[4..8].copy_from_slice(&kind.to_le_bytes());
        out[8..24].copy_from_slice(&self.disk.0.to_le_bytes());
        out[24..32].copy_from_slice(&self.start.to_le_bytes());
        out[32..40].copy_from_slice(&self.length.to_le_bytes());
        out[40..48].copy_from_slice(&self.activation.to_le_bytes());
        out[48..56].copy_from_slice(&sequence.to_le_bytes());
        let sum = check(nonce, &out[..56]);
        out[56..].copy_from_slice(&sum);
        out
    }

    /// Reads 64 bytes: the record and its sequence.
    fn decode(bytes: &[u8], nonce: u128) -> Option<(Self, u64)> {
        if !bytes.starts_with(&RECORD_MAGIC) || array::<8>(bytes, 56)? != check(nonce, bytes.get(..56)?) {
            return None;
        }
        let kind = match u32::from_le_bytes(array(bytes, 4)?) {
            1 => HotKind::Hot,
            2 => HotKind::Cold,
            3 => HotKind::Forget,
            4 => HotKind::Snapshot,
            _ => return None,
        };
        let number = |at| array(bytes, at).map(u64::from_le_bytes);
        let disk = DiskId(u128::from_le_bytes(array(bytes, 8)?));
        let record = Self { kind, disk, start: number(24)?, length: number(32)?, activation: number(40)? };
        Some((record, number(48)?))
    }
}

/// Regions and the number of the activation that made each hot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HotSet {
    /// Start to (end, activation); disjoint.
    ranges: BTreeMap<u64, (u64, u64)>,
}

impl HotSet {
    /// The regions became hot by this activation.
    pub fn heat(&mut self, regions: Range<u64>, activation: u64) {
        if regions.start < regions.end {
            self.carve(&regions);
            self.ranges.insert(regions.start, (regions.end, activation));
        }
    }

    /// Activations of the regions up to this number are over.
    pub fn cool(&mut self, regions: Range<u64>, upto: u64) {
        for (start, end, activation) in self.carve(&regions) {
            if activation > upto {
                self.ranges.insert(start, (end, activation));
            }
        }
    }

    /// Takes everything inside the range out and returns it.
    fn carve(&mut self, regions: &Range<u64>) -> Vec<(u64, u64, u64)> {
        let mut taken = Vec::new();
        let before = self.ranges.range(..regions.start).next_back().map(|(&s, &v)| (s, v));
        if let Some((start, (end, activation))) = before
            && end > regions.start
        {
            self.ranges.insert(start, (regions.start, activation));
            self.ranges.insert(regions.start, (end, activation));
        }
        while let Some((&start, &(end, activation))) = self.ranges.range(regions.clone()).next() {
            self.ranges.remove(&start);
            if end > regions.end {
                self.ranges.insert(regions.end, (end, activation));
            }
            taken.push((start, end.min(regions.end), activation));
        }
        taken
    }

    /// The hot regions in order.
    pub fn iter(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.ranges.iter().map(|(&s, &(e, _))| s..e)
    }
}

/// What a file holds.
#[derive(Clone, Debug, Serialize)]
pub struct HotReport {
    /// The header.
    pub header: HotHeader,
    /// Hot regions (numbers) of each disk.
    #[serde(serialize_with = "as_extents")]
    pub hot: BTreeMap<DiskId, HotSet>,
    /// Number of records.
    pub records: u64,
    /// Number of the last activation.
    pub last_activation: u64,
    /// The snapshot at its beginning is whole: it is, or was, the log.
    pub is_whole: bool,
    /// Offset of a record that cannot be read although later ones can.
    pub damaged_at: Option<u64>,
}

fn as_hex<S: serde::Serializer>(id: &u128, s: S) -> std::result::Result<S::Ok, S::Error> {
    s.collect_str(&format_args!("{id:032x}"))
}

fn as_extents<S: serde::Serializer>(
    hot: &BTreeMap<DiskId, HotSet>,
    s: S,
) -> std::result::Result<S::Ok, S::Error> {
    let extents = |set: &HotSet| {
        set.iter().map(|r| Extent { offset: r.start, length: r.end - r.start }).collect::<Vec<_>>()
    };
    s.collect_map(hot.iter().map(|(disk, set)| (disk, extents(set))))
}

/// Reads a file.
pub fn read(bytes: &[u8]) -> Result<HotReport> {
    let header = HotHeader::decode(bytes)?;
    let mut report = HotReport {
        header,
        hot: BTreeMap::new(),
        records: 0,
        last_activation: header.last_activation,
        is_whole: false,
        damaged_at: None,
    };
    let mut unreadable = None;
    let log = bytes.get(HOT_HEADER_BYTES..).unwrap_or(&[]);
    for (index, chunk) in log.chunks_exact(HOT_RECORD_BYTES).enumerate() {
        let offset = (HOT_HEADER_BYTES + index * HOT_RECORD_BYTES) as u64;
        match HotRecord::decode(chunk, header.nonce) {
            Some((record, sequence)) if sequence == index as u64 => {
                if unreadable.is_some() {
                    report.damaged_at = unreadable;
                    break;
                }
                apply(&record, &mut report);
            }
            _ => unreadable = unreadable.or(Some(offset)),
        }
    }
    Ok(report)
}

fn apply(record: &HotRecord, report: &mut HotReport) {
    report.records += 1;
    report.last_activation = report.last_activation.max(record.activation);
    let regions = record.start..record.start.saturating_add(record.length);
    match record.kind {
        HotKind::Hot => report.hot.entry(record.disk).or_default().heat(regions, record.activation),
        HotKind::Cold => report.hot.entry(record.disk).or_default().cool(regions, record.activation),
        HotKind::Forget => {
            report.hot.remove(&record.disk);
        }
        HotKind::Snapshot => report.is_whole = true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header() -> HotHeader {
        HotHeader { log: 5, generation: 2, nonce: 99, boot: BootId(3), last_activation: 0 }
    }

    #[test]
    fn a_flipped_version_is_damage_and_a_newer_one_is_not() {
        let mut page = header().encode();
        page[8] ^= 2;
        assert_eq!(HotHeader::decode(&page).unwrap_err().kind(), ErrorKind::Damaged);
        let sum = check(0, &page[..80]);
        page[80..88].copy_from_slice(&sum);
        assert_eq!(HotHeader::decode(&page).unwrap_err().kind(), ErrorKind::Version);
    }

    fn file(records: &[HotRecord]) -> Vec<u8> {
        let mut bytes = header().encode();
        for (i, r) in records.iter().enumerate() {
            bytes.extend_from_slice(&r.encode(99, i as u64));
        }
        bytes.resize(bytes.len() + 640, 0);
        bytes
    }

    fn ops() -> impl Strategy<Value = Vec<(bool, u64, u64, u64)>> {
        prop::collection::vec((any::<bool>(), 0u64..50, 1u64..20, 0u64..30), 0..50)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100))]

        /// Against an array of activation numbers.
        #[test]
        fn equals_an_array(ops in ops()) {
            let mut twin = [0u64; 80];
            let mut records = vec![];
            for (i, (hot, start, length, number)) in ops.into_iter().enumerate() {
                let activation = if hot { i as u64 + 1 } else { number };
                let kind = if hot { HotKind::Hot } else { HotKind::Cold };
                records.push(HotRecord { kind, disk: DiskId(1), start, length, activation });
                for n in &mut twin[start as usize..(start + length) as usize] {
                    if hot { *n = activation } else if *n <= activation { *n = 0 }
                }
            }
            let report = read(&file(&records)).unwrap();
            let set = report.hot.get(&DiskId(1));
            let hot: Vec<u64> = set.into_iter().flat_map(HotSet::iter).flatten().collect();
            let expected: Vec<u64> = (0..80).filter(|i| twin[*i as usize] != 0).collect();
            prop_assert_eq!(hot, expected);
            prop_assert_eq!(report.records as usize, records.len());
        }

        #[test]
        fn arbitrary_bytes_never_panic(tail in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = read(&tail);
            let mut bytes = header().encode();
            bytes.extend_from_slice(&tail);
            prop_assert!(read(&bytes).unwrap().hot.is_empty());
        }
    }

    #[test]
    fn a_bad_record_before_good_ones_is_damage_and_a_torn_tail_is_not() {
        let record =
            |start| HotRecord { kind: HotKind::Hot, disk: DiskId(1), start, length: 1, activation: 1 };
        let good = file(&[record(1), record(2), record(3)]);
        assert_eq!(read(&good).unwrap().damaged_at, None);
        let mut middle = good.clone();
        middle[HOT_HEADER_BYTES + 64 + 30] ^= 1;
        assert_eq!(read(&middle).unwrap().damaged_at, Some(HOT_HEADER_BYTES as u64 + 64));
        let mut tail = good;
        tail[HOT_HEADER_BYTES + 128 + 30] ^= 1;
        let report = read(&tail).unwrap();
        assert_eq!((report.damaged_at, report.records), (None, 2));
        assert!(!report.is_whole);
    }
}
