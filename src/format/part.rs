//! The part: an immutable piece of an epoch's payload.

use crate::base::Digest;

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

/// A part that is durable in the vault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct StoredPart {
    /// Its name.
    pub name: PartName,
    /// Its length in bytes.
    pub length: u64,
}
