//! Recovery points: what can be listed, opened, pinned and dropped.

use std::path::PathBuf;
use std::sync::Arc;

use crate::base::{DiskId, Extent, PointId, Result, Timestamp, VmId, VmName};
use crate::format::manifest::{Consistency, DefinitionFile, EpochKind};

/// A VM that a vault holds.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct StoredVm {
    /// Its UUID.
    pub id: VmId,
    /// Its newest name.
    pub name: VmName,
    /// Points that can be opened.
    pub points: u64,
    /// Bytes on disk.
    pub bytes: u64,
}

/// A recovery point that can be opened.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct PointInfo {
    /// Its name.
    pub id: PointId,
    /// When the cut was, by the primary's clock.
    pub time: Timestamp,
    /// When the vault had it durably, by the vault's clock.
    pub arrived: Timestamp,
    /// Kind of its epoch.
    pub kind: EpochKind,
    /// How consistent it is.
    pub consistency: Consistency,
    /// Retention never drops it.
    pub pinned: bool,
    /// Bytes that the epoch changed.
    pub changed_bytes: u64,
    /// Bytes of all disks together.
    pub size_bytes: u64,
}

/// One disk of an open point.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct PointDisk {
    /// Which disk.
    pub id: DiskId,
    /// Its path relative to the folder of the point. Never absolute, no `..`.
    pub path: PathBuf,
    /// Size in bytes.
    pub size: u64,
    /// The name of its backing file as the image header has it.
    pub backing: Option<String>,
}

/// An open point. It pins the point: it can be read until dropped, while newer epochs are applied.
pub trait PointReader: Send + Sync {
    /// What is open.
    fn info(&self) -> &PointInfo;

    /// Its disks, sorted by path.
    fn disks(&self) -> &[PointDisk];

    /// The definition of the VM as of the point.
    fn definition(&self) -> &[DefinitionFile];

    /// Fills `buffer` with the content of disk number `disk` at `offset` (A2). Returns the bytes
    /// read, fewer only at the end of the disk. Checksums are verified:
    /// [`crate::base::ErrorKind::Damaged`] instead of wrong bytes.
    fn read_at(&self, disk: usize, offset: u64, buffer: &mut [u8]) -> Result<usize>;

    /// The first run of data at or after `offset` (bytes); `None`: only zeros up to the end.
    fn next_data(&self, disk: usize, offset: u64) -> Result<Option<Extent>>;
}

/// The points of a vault.
pub trait PointStore: Send + Sync {
    /// Every VM that the vault holds.
    fn vms(&self) -> Result<Vec<StoredVm>>;

    /// Points of a VM that can be opened, oldest first.
    fn points(&self, vm: VmId) -> Result<Vec<PointInfo>>;

    /// Opens a point.
    fn open(&self, vm: VmId, point: PointId) -> Result<Arc<dyn PointReader>>;

    /// Pins or unpins a point.
    fn set_pinned(&self, vm: VmId, point: PointId, pinned: bool) -> Result<()>;

    /// Drops a point (not the newest, not a pinned one, not one that is open).
    fn delete(&self, vm: VmId, point: PointId) -> Result<()>;

    /// The keep rules from now on.
    fn set_retention(&self, vm: VmId, keep: crate::core::retention::Keep) -> Result<()>;

    /// Drops what the keep rules no longer keep. Returns the points that went.
    fn expire(&self, vm: VmId) -> Result<Vec<PointId>>;

    /// Waits until every committed epoch is applied. `false`: not after `patience`.
    fn wait_applied(&self, vm: VmId, patience: std::time::Duration) -> Result<bool>;

    /// Verifies every stored byte of a VM against its checksums; returns what is damaged, in words.
    fn verify(&self, vm: VmId) -> Result<Vec<String>>;

    /// Removes a VM and all its points.
    fn purge(&self, vm: VmId) -> Result<()>;
}
