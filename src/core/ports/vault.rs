//! Where epochs go. One trait, one conformance suite for every implementation.
//!
//! Delivery is idempotent: parts are immutable and named by their place and digest, a commit of
//! the manifest that is already the head is acknowledged again.

use crate::base::{Digest, EpochNumber, Result, Timestamp, VmId, VmName};
use crate::format::manifest::Manifest;
use crate::format::part::{PartName, StoredPart};

/// The newest committed epoch of a VM in a vault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Head {
    /// Its number.
    pub epoch: EpochNumber,
    /// The digest of its manifest.
    pub digest: Digest,
    /// Its cut, by the primary's clock.
    pub cut_time: Timestamp,
}

/// Room in the vault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct VaultSpace {
    /// Bytes that can still be written.
    pub free_bytes: u64,
    /// Bytes in all.
    pub total_bytes: u64,
}

/// A vault. Calls may come from many threads; those for one VM come from its shipper.
pub trait Vault: Send + Sync {
    /// Makes the VM known, or renames it. Idempotent.
    fn register(&self, vm: VmId, name: &VmName) -> Result<()>;

    /// The newest committed epoch, applied or not.
    fn head(&self, vm: VmId) -> Result<Option<Head>>;

    /// Durable parts of the epoch that is not committed yet, in sequence.
    fn parts(&self, vm: VmId, epoch: EpochNumber) -> Result<Vec<StoredPart>>;

    /// The index of a stored part (see `format::part`): which blocks it holds.
    fn part_index(&self, vm: VmId, epoch: EpochNumber, part: &StoredPart) -> Result<Vec<u8>>;

    /// Stores a part; durable when it returns. The digest in the name is verified.
    /// Parts of an epoch that will be `full` for every disk of a VM without points may be applied
    /// as they arrive (A3); then parts of one epoch must come in sequence.
    fn put_part(&self, vm: VmId, epoch: EpochNumber, name: &PartName, bytes: &[u8]) -> Result<()>;

    /// Commits an epoch: every part present, of the right length and digest, the parent is the
    /// head, all durable. Then the head is this manifest, and applying begins in the background.
    ///
    /// [`crate::base::ErrorKind::ChainBroken`] if the parent is not the head.
    fn commit(&self, vm: VmId, manifest: &Manifest) -> Result<Head>;

    /// "Current as of": a cut without changes. Renews the RPO, makes no point.
    fn renew(&self, vm: VmId, current_as_of: Timestamp) -> Result<()>;

    /// Throws away the parts of an uncommitted epoch. Idempotent.
    fn abandon(&self, vm: VmId, epoch: EpochNumber) -> Result<()>;

    /// Number of committed epochs that are not applied yet, and their bytes.
    fn backlog(&self, vm: VmId) -> Result<(u64, u64)>;

    /// Room left.
    fn space(&self) -> Result<VaultSpace>;
}
