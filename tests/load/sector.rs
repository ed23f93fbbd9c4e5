//! The content of one sector: which write wrote it, and where it belongs.
//!
//! ```text
//!  0   magic "AILD"         4
//!  4   disk                 4  little endian, like all numbers
//!  8   lane                 4
//! 12   number of the write  4  from 1, per lane
//! 16   sector               8
//! 24   filler             480  the number of the write, repeated
//! 504  checksum             8  blake3 of all before
//! ```

/// Bytes of a sector: what disks write whole, and what is checked.
pub const SECTOR: usize = 512;
const MAGIC: [u8; 4] = *b"AILD";
const SUM_AT: usize = SECTOR - 8;

/// Which write a sector is of, and where it was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tag {
    pub disk: u32,
    pub lane: u32,
    /// Number of the write in its lane, from 1.
    pub write: u32,
    /// Position on the disk in sectors.
    pub sector: u64,
}

impl Tag {
    pub fn encode(self, out: &mut [u8]) {
        out[0..4].copy_from_slice(&MAGIC);
        out[4..8].copy_from_slice(&self.disk.to_le_bytes());
        out[8..12].copy_from_slice(&self.lane.to_le_bytes());
        out[12..16].copy_from_slice(&self.write.to_le_bytes());
        out[16..24].copy_from_slice(&self.sector.to_le_bytes());
        let filler = [self.write.to_le_bytes(); (SUM_AT - 24) / 4];
        out[24..SUM_AT].copy_from_slice(filler.as_flattened());
        let sum = checksum(&out[..SUM_AT]);
        out[SUM_AT..SECTOR].copy_from_slice(&sum);
    }

    /// `None`: never written, all zeros.
    pub fn decode(bytes: &[u8]) -> Result<Option<Self>, String> {
        if bytes[0..4] != MAGIC {
            return if bytes == [0; SECTOR] { Ok(None) } else { Err("bytes that nobody wrote".into()) };
        }
        if bytes[SUM_AT..SECTOR] != checksum(&bytes[..SUM_AT]) {
            return Err("a checksum that is wrong".into());
        }
        let number = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        Ok(Some(Self {
            disk: number(4),
            lane: number(8),
            write: number(12),
            sector: u64::from_le_bytes(bytes[16..24].try_into().unwrap()),
        }))
    }
}

fn checksum(bytes: &[u8]) -> [u8; 8] {
    blake3::hash(bytes).as_bytes()[..8].try_into().unwrap()
}
