//! The manifest: the small document that names an epoch's parts and commits it.
//!
//! JSON, one object. Its digest is the blake3 of exactly the bytes that were committed; it chains
//! to the parent's. The extent index is not in it but at the end of each part (`format::part`),
//! so that the manifest of an epoch of a million scattered blocks stays small.

use serde::{Deserialize, Serialize};
use std::path::PathBuf;

use crate::base::{Digest, DiskId, EpochNumber, Error, ErrorKind, Result, Timestamp, VmId, VmName};
use crate::format::part::StoredPart;

/// Version of the format.
pub const MANIFEST_FORMAT: u32 = 1;

/// Kind of an epoch (design, section 2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EpochKind {
    /// Every disk whole.
    Full,
    /// What changed since the parent; single disks may be whole.
    Delta,
    /// Blocks that a comparison found different.
    Resync,
}

/// How consistent the guest is in a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Consistency {
    /// As after a power cut.
    Crash,
    /// File systems frozen by the guest agent.
    App,
}

/// A file that describes the VM: `machine.toml`, libvirt XML.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct DefinitionFile {
    /// File name, without a folder.
    pub name: String,
    /// Its content.
    pub content: String,
}

/// A disk as of the cut.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ManifestDisk {
    /// Which disk.
    pub id: DiskId,
    /// Path relative to the folder of a point.
    pub path: PathBuf,
    /// Size in bytes.
    pub size: u64,
    /// It ships whole: what has no part is a hole.
    pub whole: bool,
    /// The name of the backing file in the image header.
    pub backing: Option<String>,
}

/// The manifest of one epoch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`MANIFEST_FORMAT`].
    pub format: u32,
    /// Which VM.
    pub vm: VmId,
    /// Its name at the cut.
    pub name: VmName,
    /// Fencing identity; 1 until roles change.
    pub generation: u64,
    /// Number of the epoch.
    pub epoch: EpochNumber,
    /// Kind of the epoch.
    pub kind: EpochKind,
    /// Digest of the parent's manifest; none for the first epoch in a vault.
    pub parent: Option<Digest>,
    /// When the cut was, by the primary's clock.
    pub cut_time: Timestamp,
    /// How consistent the guest is.
    pub consistency: Consistency,
    /// Every disk of the VM as of the cut; one that is missing here is gone in this point.
    pub disks: Vec<ManifestDisk>,
    /// The parts, in sequence: later ones win.
    pub parts: Vec<StoredPart>,
    /// Bytes of data, zeros and holes that the parts describe.
    pub changed_bytes: u64,
    /// Definition of the VM.
    pub definition: Vec<DefinitionFile>,
    /// Key that encrypts the parts; 0: none.
    pub key_id: u64,
}

impl Manifest {
    /// The bytes that are stored and hashed.
    pub fn encode(&self) -> Result<Vec<u8>> {
        serde_json::to_vec_pretty(self)
            .map_err(|e| Error::new(ErrorKind::Internal, "the manifest cannot be written").source(e))
    }

    /// Digest of [`Manifest::encode`].
    pub fn digest(&self) -> Result<Digest> {
        Ok(Digest::of(&self.encode()?))
    }

    /// Reads a manifest; the version is looked at before anything else.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        #[derive(Deserialize)]
        struct Version {
            format: u32,
        }
        let damaged =
            |e: serde_json::Error| Error::new(ErrorKind::Damaged, "the manifest cannot be read").source(e);
        let version: Version = serde_json::from_slice(bytes).map_err(damaged)?;
        if version.format != MANIFEST_FORMAT {
            return Err(Error::new(ErrorKind::Version, "the manifest cannot be read")
                .why(format!("it has format {}, this program knows {MANIFEST_FORMAT}", version.format))
                .hint("use the version of afterimage that wrote it, or a newer one"));
        }
        serde_json::from_slice(bytes).map_err(damaged)
    }
}
