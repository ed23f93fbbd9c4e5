//! A protected disk, as the write path sees it.

use std::ffi::OsString;
use std::fs::File;
use std::path::PathBuf;

use nix::errno::Errno;

use crate::base::DiskId;
use crate::core::ports::tracking::{Change, SyncMark, Ticket, TrackedDisk};

/// What the tracker needs to know of a disk. It never reaches the lower file through the mount.
#[derive(Debug)]
pub struct DiskSpec {
    /// Stable id.
    pub id: DiskId,
    /// Path relative to the root of the mount; shown in points.
    pub path: PathBuf,
    /// The lower file, open for reading and writing, not `O_DIRECT`, not `O_APPEND`.
    pub lower: File,
    /// The lower folder of the file; HRLs are made and removed relative to it.
    pub folder: File,
    /// Name of the file in its folder.
    pub file_name: OsString,
    /// The name of its backing file as the image header has it.
    pub backing: Option<String>,
}

/// A protected disk.
pub struct Disk {
    id: DiskId,
}

impl TrackedDisk for Disk {
    fn id(&self) -> DiskId {
        self.id
    }

    fn begin(&self, _change: Change) -> Result<Ticket, Errno> {
        Err(Errno::EIO)
    }

    fn end(&self, _ticket: Ticket, _result: Result<u64, Errno>) {}

    fn make_room(&self) -> bool {
        false
    }

    fn sync_begins(&self) -> SyncMark {
        SyncMark(0)
    }

    fn sync_ended(&self, _mark: SyncMark, _result: Result<(), Errno>) {}
}
