//! The tracker: in the write path of every protected disk (design, section 4, rules T1 to T10).
//!
//! | file | what it is |
//! | --- | --- |
//! | `vm` | [`VmTracker`]: one VM, its epoch number and its disks |
//! | `disk` | [`Disk`]: what the filter calls before and after each change |

mod disk;
mod vm;

pub use disk::{Disk, DiskSpec};
pub use vm::{GiveUps, LatencyFigures, RecoveredDisk, VmTracker};

use std::path::Path;
use std::sync::Arc;

use crate::base::{BootId, Clock, Error, ErrorKind, Result, VmId};

/// The tracker of a host: hot-region log, cooler, and the VMs that are open.
pub struct Tracker {}

impl Tracker {
    /// Opens the tracker whose files are in `state_dir`. `boot_id` tells shared memory of this boot.
    pub fn open(_state_dir: &Path, _boot_id: BootId, _clock: Arc<dyn Clock>) -> Result<Self> {
        Ok(Self {})
    }

    /// Opens a VM with its disks. `fresh`: it was not protected before, every disk ships whole.
    /// Otherwise the start-up table (`core::recovery`) decides for each disk.
    pub fn open_vm(&self, _vm: VmId, _disks: Vec<DiskSpec>, _fresh: bool) -> Result<Arc<VmTracker>> {
        Err(Error::new(ErrorKind::Internal, "the tracker is not ready"))
    }

    /// Stops the threads of the tracker. VMs are stopped by [`VmTracker::stop_clean`] before.
    pub fn stop(&self) {}
}
