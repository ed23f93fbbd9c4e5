//! What the shipper asks of the tracker: one VM, its cuts, and the content of frozen epochs.
//!
//! The life of an epoch, seen from here (names as in the design, section 4):
//!
//! ```text
//!   current --cut(Final)--> frozen --drain, read_frozen, vault commit--> acknowledge --> forgotten
//!      |                      |
//!      |                      +--give_up (T4, T5)--+
//!      +--cut(Live)---------------------------------+--> pending --read_live--> parts
//!                                                          ^ joins the next Final cut
//! ```
//!
//! *Pending* blocks are those of epochs that gave up their cut, and every allocated block of a
//! disk that ships whole. They are read live in passes. Which of them have a part is the
//! shipper's knowledge; it hands those without one to the next cut, which takes them into its
//! map. Everything pending stays durable in HRLs until the epoch that takes it is acknowledged.

use std::path::PathBuf;
use std::time::Duration;

use crate::base::{DiskId, EpochNumber, ExtentSet, Result, Timestamp, VmId};

/// How an epoch ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CutKind {
    /// It becomes frozen: overwritten blocks are preserved, and it can be committed.
    Final,
    /// It gives up its cut at once: its blocks become pending, nothing is preserved.
    Live,
}

/// A disk as of a cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CutDisk {
    /// Which disk.
    pub id: DiskId,
    /// Its path relative to the root of its mount; the name it has in a point.
    pub path: PathBuf,
    /// Size in bytes as of the cut. May still grow until [`Source::drain`] has returned true.
    pub size: u64,
    /// It ships whole: what has no part is a hole, whatever the vault held before.
    pub whole: bool,
    /// The name of its backing file as the image header has it, if it has one.
    pub backing: Option<String>,
}

/// A cut of all disks of a VM at once (T1).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cut {
    /// The epoch that ended.
    pub epoch: EpochNumber,
    /// Wall-clock time of the cut.
    pub time: Timestamp,
    /// Every disk of the VM at that instant.
    pub disks: Vec<CutDisk>,
}

/// Blocks (numbers, not bytes) per disk.
pub type BlocksByDisk = std::collections::BTreeMap<DiskId, ExtentSet>;

/// Figures of one disk, for `status`. All in bytes unless named otherwise.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct DiskFigures {
    /// Size of the disk file.
    pub size: u64,
    /// Marked in the current epoch.
    pub current: u64,
    /// Marked in the frozen epoch.
    pub frozen: u64,
    /// Pending from epochs that gave up their cut, or because the disk ships whole.
    pub pending: u64,
    /// Old content saved for the frozen epoch.
    pub preserved: u64,
    /// Number of HRL files, and their bytes on disk.
    pub hrl_files: u64,
    /// Bytes of the HRL files.
    pub hrl_bytes: u64,
    /// Number of hot regions.
    pub hot_regions: u64,
    /// The disk carries the untracked mark (T8) or ships whole for another reason; why.
    pub whole_because: Option<String>,
}

/// One VM, as the shipper sees it. Only the shipper of that VM calls it, from one thread,
/// except [`Source::figures`] and [`Source::has_given_up`].
pub trait Source: Send + Sync {
    /// Which VM.
    fn vm(&self) -> VmId;

    /// A random number that stays while the marks of this VM are known without a gap: over cuts and
    /// over restarts that go on with the maps in shared memory. A new one means that blocks may
    /// have changed without a mark, so that a part made before, under another number, may be
    /// stale and must be made again. Never 0.
    fn tracking_id(&self) -> u64;

    /// The epoch that is frozen and not acknowledged; after a restart, the one found.
    fn frozen(&self) -> Option<Cut>;

    /// Whether any block is marked, pending, or a record (size, name, new, removed disk) waits:
    /// whether a cut would make an epoch. A cut without changes makes none.
    fn has_changes(&self) -> bool;

    /// Bytes marked in the current epoch.
    fn marked_bytes(&self) -> u64;

    /// All pending blocks (see the module documentation). They grow only by cuts, give-ups and
    /// [`Source::ship_whole`]: whatever else makes a block unequal to the vault (a write, an error
    /// of a sync, T9) marks it in the current epoch, so that a block read live stays right.
    fn pending(&self) -> BlocksByDisk;

    /// Ends the current epoch (T1) for all disks at once and begins the next. `unmade`: pending
    /// blocks that have no part; with [`CutKind::Final`] they become part of the frozen epoch,
    /// read at the cut like any other. Waits for writers of the epoch before the one that ends
    /// (T2), at most `patience`; then [`crate::base::ErrorKind::Busy`].
    fn cut(&self, kind: CutKind, unmade: &BlocksByDisk, patience: Duration) -> Result<Cut>;

    /// Waits until every writer of the frozen (or just given-up) epoch has left (T2). `None`:
    /// not yet after `patience`. `Some`: the cut with its final sizes.
    fn drain(&self, patience: Duration) -> Result<Option<Cut>>;

    /// Blocks of the epoch that the last cut ended: still frozen, given up since, or cut
    /// [`CutKind::Live`] (whatever was read of them before that cut is stale). Only after
    /// [`Source::drain`]; after a restart, only if the epoch is still frozen.
    fn frozen_blocks(&self) -> BlocksByDisk;

    /// Reads blocks of the frozen epoch as of the cut (T3, and T4 for those read before).
    /// `buffer` has one block's bytes for each block of the range; bytes beyond the end of the
    /// disk are zeros. An error: the lower file's (nothing unreadable ships as zeros, T9), or
    /// [`crate::base::ErrorKind::Cancelled`] once the epoch has given up its cut.
    fn read_frozen(&self, disk: DiskId, blocks: std::ops::Range<u64>, buffer: &mut [u8]) -> Result<()>;

    /// Reads blocks as they are now, for a pass. Same buffer rules.
    fn read_live(&self, disk: DiskId, blocks: std::ops::Range<u64>, buffer: &mut [u8]) -> Result<()>;

    /// The parts of `blocks` that the lower file says are data; the rest are holes.
    fn data_blocks(&self, disk: DiskId, blocks: std::ops::Range<u64>) -> Result<ExtentSet>;

    /// The parts of `blocks` (of the frozen epoch) that were holes at the cut: those that the
    /// lower file says are holes and that are, asked *after* that, neither preserved nor read
    /// before. The default knows none: everything is read, and zeros are found by looking.
    fn frozen_holes(&self, disk: DiskId, blocks: std::ops::Range<u64>) -> Result<ExtentSet> {
        let _ = (disk, blocks);
        Ok(ExtentSet::new())
    }

    /// Whether the frozen epoch has given up its cut (T5: ask after the last read and before
    /// the commit).
    fn has_given_up(&self) -> bool;

    /// The frozen epoch gives up its cut, or a writer's give-up is completed: its blocks become
    /// pending, preserved data is freed.
    fn give_up(&self) -> Result<()>;

    /// The vault has the frozen epoch durably: it, and everything pending before its cut, is
    /// forgotten after a sync of the disk files (T6), and its HRLs are removed.
    fn acknowledge(&self, epoch: EpochNumber) -> Result<()>;

    /// Every disk becomes *whole*: the chain is broken, or the vault knows nothing of this VM.
    /// Idempotent; a frozen epoch is given up first.
    fn ship_whole(&self, reason: &str) -> Result<()>;

    /// Figures of every disk.
    fn figures(&self) -> Vec<(DiskId, DiskFigures)>;
}
