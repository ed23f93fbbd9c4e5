//! One VM: its epoch number, its disks, its cuts.

use std::ffi::OsString;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::disk::{Disk, DiskSpec};
use crate::base::{DiskId, EpochNumber, Error, ErrorKind, ExtentSet, Result, VmId};
use crate::core::ports::source::{BlocksByDisk, Cut, CutKind, DiskFigures, Source};

/// What the start-up table decided for a disk.
#[derive(Clone, Debug, serde::Serialize)]
pub struct RecoveredDisk {
    /// Which disk.
    pub id: DiskId,
    /// Label of the row that matched.
    pub label: &'static str,
    /// Why, in words.
    pub reason: &'static str,
}

/// Epochs that gave up their cut (T5).
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct GiveUps {
    /// How many in a row, up to now.
    pub in_a_row: u32,
    /// Why the last one did.
    pub reason: Option<String>,
    /// Preserved bytes that it would have needed, as far as known.
    pub needed_bytes: u64,
}

/// Time spent in `begin` because of cut, mark, warm activation and preserve.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct LatencyFigures {
    /// Upper bound of each bucket in nanoseconds, and how many calls fell into it; empty ones left out.
    pub buckets: Vec<(u64, u64)>,
    /// The longest, in nanoseconds.
    pub max_ns: u64,
}

/// One VM.
pub struct VmTracker {
    id: VmId,
}

fn not_ready<T>() -> Result<T> {
    Err(Error::new(ErrorKind::Internal, "the tracker is not ready"))
}

impl VmTracker {
    /// A disk by its id.
    pub fn disk(&self, _id: DiskId) -> Option<Arc<Disk>> {
        None
    }

    /// All disks.
    pub fn disks(&self) -> Vec<Arc<Disk>> {
        Vec::new()
    }

    /// Takes a new disk into the running VM; it ships whole. The caller lets writes to the file
    /// that began before end before it makes a cut.
    pub fn add_disk(&self, _spec: DiskSpec) -> Result<Arc<Disk>> {
        not_ready()
    }

    /// Lets a disk go: the next point is without it. Its HRLs are removed.
    pub fn remove_disk(&self, _id: DiskId) -> Result<()> {
        not_ready()
    }

    /// The disk has another path (relative to the mount), folder and file name now.
    pub fn rename_disk(&self, _id: DiskId, _path: PathBuf, _folder: File, _name: OsString) -> Result<()> {
        not_ready()
    }

    /// The image header names another backing file now.
    pub fn set_backing(&self, _id: DiskId, _backing: Option<String>) {}

    /// Unprotects: HRLs, shared memory and marks on the disk files are removed.
    pub fn forget(&self) -> Result<()> {
        not_ready()
    }

    /// Writes the marks of the current epoch into the HRL files.
    pub fn flush(&self) -> Result<()> {
        not_ready()
    }

    /// Last flush, synced, with a record of size, mtime, ctime and inode of each disk, so that
    /// the next start can trust the HRLs alone. The filter must not call the disks any more.
    pub fn stop_clean(&self) -> Result<()> {
        not_ready()
    }

    /// Histogram of the time spent in [`crate::core::ports::tracking::TrackedDisk::begin`].
    pub fn latency(&self) -> LatencyFigures {
        LatencyFigures::default()
    }

    /// Epochs that gave up their cut.
    pub fn give_ups(&self) -> GiveUps {
        GiveUps::default()
    }

    /// What the start-up table decided.
    pub fn recovered(&self) -> Vec<RecoveredDisk> {
        Vec::new()
    }
}

impl Source for VmTracker {
    fn vm(&self) -> VmId {
        self.id
    }
    fn frozen(&self) -> Option<Cut> {
        None
    }
    fn has_changes(&self) -> bool {
        false
    }
    fn marked_bytes(&self) -> u64 {
        0
    }
    fn pending(&self) -> BlocksByDisk {
        BlocksByDisk::new()
    }
    fn cut(&self, _kind: CutKind, _unmade: &BlocksByDisk, _patience: Duration) -> Result<Cut> {
        not_ready()
    }
    fn drain(&self, _patience: Duration) -> Result<Option<Cut>> {
        not_ready()
    }
    fn frozen_blocks(&self) -> BlocksByDisk {
        BlocksByDisk::new()
    }
    fn read_frozen(&self, _disk: DiskId, _blocks: std::ops::Range<u64>, _buffer: &mut [u8]) -> Result<()> {
        not_ready()
    }
    fn read_live(&self, _disk: DiskId, _blocks: std::ops::Range<u64>, _buffer: &mut [u8]) -> Result<()> {
        not_ready()
    }
    fn data_blocks(&self, _disk: DiskId, _blocks: std::ops::Range<u64>) -> Result<ExtentSet> {
        not_ready()
    }
    fn has_given_up(&self) -> bool {
        false
    }
    fn give_up(&self) -> Result<()> {
        not_ready()
    }
    fn acknowledge(&self, _epoch: EpochNumber) -> Result<()> {
        not_ready()
    }
    fn ship_whole(&self, _reason: &str) -> Result<()> {
        not_ready()
    }
    fn figures(&self) -> Vec<(DiskId, DiskFigures)> {
        Vec::new()
    }
}
