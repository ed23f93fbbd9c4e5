//! blake3 digests: of parts, manifests and blocks.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::error::{Error, ErrorKind, Result};

/// A blake3 digest of 32 bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest([u8; 32]);

impl Digest {
    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    /// The digest with these bytes.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The first 8 hexadecimal digits, for people and file names.
    pub fn short(&self) -> String {
        self.to_string()[..8].to_owned()
    }
}

/// Checksum of one block as the vault keeps it: the first 8 bytes of its blake3 digest, and 0
/// for a block of zeros, so that a hole needs no entry.
pub fn block_sum(block: &[u8]) -> u64 {
    if is_zero(block) {
        return 0;
    }
    let d = blake3::hash(block);
    let b = d.as_bytes();
    u64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]).max(1)
}

/// Whether all bytes are zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    // Whole 16-byte lanes first (the compiler makes vector code of it), then the rest.
    let lanes = bytes.chunks_exact(16);
    lanes.remainder().iter().all(|b| *b == 0)
        && bytes.chunks(4096).all(|page| {
            page.chunks_exact(16)
                .fold(0u128, |acc, lane| acc | u128::from_ne_bytes(lane.try_into().unwrap_or([1; 16])))
                == 0
        })
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({})", self.short())
    }
}

impl FromStr for Digest {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        blake3::Hash::from_hex(s)
            .map(|h| Self(*h.as_bytes()))
            .map_err(|_| Error::new(ErrorKind::Damaged, format!("{s:?} is no digest")))
    }
}

impl Serialize for Digest {
    fn serialize<S: serde::Serializer>(&self, s: S) -> std::result::Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> std::result::Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_is_found_at_every_length() {
        for n in [0usize, 1, 15, 16, 17, 4096, 5000] {
            let mut v = vec![0u8; n];
            assert!(is_zero(&v));
            for i in [0, n / 2, n.saturating_sub(1)] {
                if i < n {
                    v[i] = 1;
                    assert!(!is_zero(&v), "{n} {i}");
                    v[i] = 0;
                }
            }
        }
        assert_eq!(block_sum(&[0; 4096]), 0);
        assert_ne!(block_sum(&[1; 4096]), 0);
    }
}
