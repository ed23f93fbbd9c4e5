//! The map of an overlay: which blocks of a clone's disk are its own, and its size.
//!
//! One file per disk beside the data file (which has the blocks at their own offsets):
//!
//! ```text
//!   0     header slot 0: 104 bytes        magic 8 | version 4 | mode 4 | uid 4 | gid 4
//!   2048  header slot 1: 104 bytes        | sequence 8 | size 8 | base limit 8 | mtime ms 8
//!   4096  bitmap: bit b of byte b / 8     | disk id 16 | zeros 24 | checksum 8
//!         is block b of the disk          numbers little-endian
//! ```
//!
//! The header is written to its two slots in turn, the newer sequence wins, so a torn write costs
//! only the state that was being written. The checksum comes last, so that it covers all else.
//! *Base limit*: the clone shows its point only below this offset; a clone that was cut short and
//! grew again has zeros there, not what the point has.

use crate::base::digest::block_sum;
use crate::base::{DiskId, Error, ErrorKind, Result};

/// Bytes of one header.
pub const OVERLAY_HEADER_BYTES: usize = 104;
/// Where the two header slots are.
pub const OVERLAY_SLOTS: [u64; 2] = [0, 2048];
/// Where the bitmap begins.
pub const OVERLAY_BITMAP_OFFSET: u64 = 4096;
/// Version of the format.
pub const OVERLAY_VERSION: u32 = 1;

const MAGIC: [u8; 8] = *b"AIOVRLAY";
const CHECKSUM_OFFSET: usize = OVERLAY_HEADER_BYTES - 8;
const _: () = assert!(OVERLAY_SLOTS[1] >= OVERLAY_HEADER_BYTES as u64);
const _: () = assert!(OVERLAY_BITMAP_OFFSET >= OVERLAY_SLOTS[1] + OVERLAY_HEADER_BYTES as u64);

/// Whether these first bytes of a file are those of a map of an overlay, of any version.
pub fn is_overlay(bytes: &[u8]) -> bool {
    OVERLAY_SLOTS.iter().any(|at| bytes.get(*at as usize..).is_some_and(|slot| slot.starts_with(&MAGIC)))
}

/// State of one disk of a clone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct OverlayHeader {
    /// Counts up with every write of the header.
    pub sequence: u64,
    /// Which disk.
    pub disk: DiskId,
    /// Size in bytes.
    pub size: u64,
    /// Offset in bytes below which the point is seen; never more than `size`.
    pub base_limit: u64,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last change, in milliseconds since 1970.
    pub mtime_ms: i64,
}

impl OverlayHeader {
    /// The slot that this header goes to.
    pub fn slot(&self) -> u64 {
        match self.sequence.is_multiple_of(2) {
            true => OVERLAY_SLOTS[0],
            false => OVERLAY_SLOTS[1],
        }
    }

    /// The bytes of the slot.
    pub fn encode(&self) -> [u8; OVERLAY_HEADER_BYTES] {
        let mut body = Vec::with_capacity(OVERLAY_HEADER_BYTES);
        body.extend(MAGIC);
        for number in [OVERLAY_VERSION, self.mode, self.uid, self.gid] {
            body.extend(number.to_le_bytes());
        }
        for number in [self.sequence, self.size, self.base_limit] {
            body.extend(number.to_le_bytes());
        }
        body.extend(self.mtime_ms.to_le_bytes());
        body.extend(self.disk.0.to_le_bytes());
        body.resize(CHECKSUM_OFFSET, 0);
        body.extend(block_sum(&body).to_le_bytes());
        let mut bytes = [0; OVERLAY_HEADER_BYTES];
        bytes.iter_mut().zip(body).for_each(|(to, from)| *to = from);
        bytes
    }

    /// Reads one slot; the version is looked at before the rest.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let damaged = || Error::new(ErrorKind::Damaged, "the map of a clone cannot be read");
        if !bytes.starts_with(&MAGIC) {
            return Err(damaged().why("its header is missing"));
        }
        let version = u32::from_le_bytes(field(bytes, 8).ok_or_else(damaged)?);
        if version != OVERLAY_VERSION {
            return Err(Error::new(ErrorKind::Version, "the map of a clone cannot be read")
                .why(format!("it has version {version}, this program knows {OVERLAY_VERSION}"))
                .hint("use the version of afterimage that wrote it, or delete the clone"));
        }
        let body = bytes.get(..CHECKSUM_OFFSET).ok_or_else(damaged)?;
        let sum = field(bytes, CHECKSUM_OFFSET).map(u64::from_le_bytes);
        if sum != Some(block_sum(body)) {
            return Err(damaged().why("its header fails its checksum"));
        }
        let short = |at| field(bytes, at).map(u32::from_le_bytes).ok_or_else(damaged);
        let long = |at| field(bytes, at).map(u64::from_le_bytes).ok_or_else(damaged);
        let header = Self {
            mode: short(12)?,
            uid: short(16)?,
            gid: short(20)?,
            sequence: long(24)?,
            size: long(32)?,
            base_limit: long(40)?,
            mtime_ms: field(bytes, 48).map(i64::from_le_bytes).ok_or_else(damaged)?,
            disk: DiskId(u128::from_le_bytes(field(bytes, 56).ok_or_else(damaged)?)),
        };
        match header.base_limit <= header.size {
            true => Ok(header),
            false => Err(damaged().why("its header contradicts itself")),
        }
    }

    /// The newer of two slots. The error, if neither can be read, is that of the first.
    pub fn newest(slots: [&[u8]; 2]) -> Result<Self> {
        match slots.map(Self::decode) {
            [Ok(a), Ok(b)] => Ok(if b.sequence > a.sequence { b } else { a }),
            [Ok(one), Err(_)] | [Err(_), Ok(one)] => Ok(one),
            [Err(e), Err(_)] => Err(e),
        }
    }
}

fn field<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..offset.checked_add(N)?)?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header(sequence: u64, size: u64) -> OverlayHeader {
        OverlayHeader {
            sequence,
            disk: DiskId(7),
            size,
            base_limit: size / 2,
            mode: 0o600,
            uid: 1,
            gid: 2,
            mtime_ms: -5,
        }
    }

    #[test]
    fn the_newer_slot_wins_and_a_torn_one_loses() {
        let (old, new) = (header(4, 100), header(5, 200));
        assert_eq!(OverlayHeader::newest([&old.encode(), &new.encode()]).unwrap(), new);
        let mut torn = new.encode();
        torn[40] ^= 1;
        assert_eq!(OverlayHeader::newest([&old.encode(), &torn]).unwrap(), old);
        assert_eq!(OverlayHeader::newest([&[], &torn]).unwrap_err().kind(), ErrorKind::Damaged);
        let mut later = new.encode();
        later[8] = 9;
        assert_eq!(OverlayHeader::decode(&later).unwrap_err().kind(), ErrorKind::Version);
    }

    proptest! {
        #[test]
        fn round_trips_and_finds_any_flip(sequence: u64, size: u64, at in 0usize..104, bit in 0u8..8) {
            let bytes = header(sequence, size).encode();
            prop_assert_eq!(OverlayHeader::decode(&bytes).unwrap(), header(sequence, size));
            let mut flipped = bytes;
            flipped[at] ^= 1 << bit;
            prop_assert!(OverlayHeader::decode(&flipped).is_err());
        }
    }
}
