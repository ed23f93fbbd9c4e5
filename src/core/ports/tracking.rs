//! What the filter tells the tracker about a change to a protected disk.
//!
//! The five steps of a write (design, section 4): [`TrackedDisk::begin`] is steps 1 to 3 (activate,
//! enter and mark, preserve), the filter does step 4 (the lower write), [`TrackedDisk::end`] is
//! step 5 (leave, unpin). The filter replies to the kernel only after `end`.

use nix::errno::Errno;

use crate::base::DiskId;

/// A change that is about to be made to a disk file. Offsets and lengths in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Data is written: write, copy_file_range into the disk, fallocate that grows.
    Write {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        length: u64,
    },
    /// A range becomes zeros: punch hole, zero range (which may grow the file).
    Zero {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        length: u64,
    },
    /// The size changes (T10).
    Truncate {
        /// Size before.
        from: u64,
        /// Size after.
        to: u64,
    },
}

/// Proof that steps 1 to 3 are done; to be handed back, exactly once, by [`TrackedDisk::end`].
///
/// Plain data, so that the hot path allocates nothing.
#[derive(Debug)]
#[must_use = "a writer that never leaves holds up every later cut"]
pub struct Ticket {
    /// The epoch whose number was read on entry (T1).
    pub epoch: u64,
    /// The change that was announced.
    pub change: Change,
    /// Which of the tracker's sharded counters was used; of no meaning elsewhere.
    pub shard: u32,
}

/// Opaque: what had been written when a sync of the disk file began (T6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SyncMark(pub u64);

/// A protected disk, as the write path sees it. All calls may come from many threads at once.
pub trait TrackedDisk: Send + Sync {
    /// Which disk it is.
    fn id(&self) -> DiskId;

    /// Steps 1 to 3. Blocks only for the activation of a cold region (bounded, T8) and for
    /// copying frozen blocks; never for the shipper or the vault.
    ///
    /// An error is that of the lower file system and is the guest's answer: nothing was marked
    /// that matters and nothing may be written.
    fn begin(&self, change: Change) -> Result<Ticket, Errno>;

    /// Step 5. `result`: the lower call's, with the number of bytes it wrote (0 for changes
    /// that write none). After an error the blocks stay marked.
    fn end(&self, ticket: Ticket, result: Result<u64, Errno>);

    /// The lower file system said ENOSPC: frees preserved data by giving up the cut (T5).
    /// `true`: something was freed, try the write once more.
    fn make_room(&self) -> bool;

    /// A sync of the disk file by a guest begins.
    fn sync_begins(&self) -> SyncMark;

    /// It ended. Its error turns what was written since the last good sync into "compare" (T9).
    fn sync_ended(&self, mark: SyncMark, result: Result<(), Errno>);
}
