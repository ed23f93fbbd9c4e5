//! The bracket around every change of a file's data: *begin, lower call, end* of its
//! [`TrackedDisk`], if it has one.
//!
//! A disk is attached and detached while guests write. [`Gate`] makes that exact:
//!
//! * A change takes the read lock of the gate for an instant. If a disk is published it goes
//!   through that disk, else it counts itself in as *untracked* before it lets go of the lock.
//! * [`Gate::publish`] stores the disk under the write lock and then waits until no untracked
//!   change is left.
//!
//! The lock orders the two: a change that saw no disk had its lock before the writer, so its count
//! is seen by the wait; one that came after the writer sees the disk. Untracked changes only
//! leave, so the wait ends. Nobody holds the lock during I/O.
//!
//! Killed here: an announced change has its blocks marked, and that is all that marks mean.
//! Disk full: ENOSPC of the lower file frees preserved data (T5) and the change is tried once more.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, RwLock};
use std::time::Duration;

use nix::errno::Errno;

use super::node::lock;
use crate::base::limits::DISK_BYTES_MAX;
use crate::core::ports::tracking::{Change, TrackedDisk};

/// Where the changes of one file go through.
#[derive(Default)]
pub(super) struct Gate {
    disk: RwLock<Option<Arc<dyn TrackedDisk>>>,
    untracked: AtomicU64,
    /// The farthest end of a tracked write that has been announced, in bytes.
    high: AtomicU64,
}

/// Who waits for untracked changes to end.
#[derive(Default)]
pub(super) struct Drain {
    waiters: AtomicUsize,
    mutex: Mutex<()>,
    left: Condvar,
}

/// How a change goes through.
pub(super) enum Way<'a> {
    /// Through this disk.
    Tracked(Arc<dyn TrackedDisk>),
    /// Nobody follows the file; counted until dropped.
    Untracked(Untracked<'a>),
}

pub(super) struct Untracked<'a> {
    gate: &'a Gate,
    drain: &'a Drain,
}

impl Drop for Untracked<'_> {
    fn drop(&mut self) {
        let before = self.gate.untracked.fetch_sub(1, Ordering::SeqCst);
        if before == 1 && self.drain.waiters.load(Ordering::SeqCst) > 0 {
            let _guard = lock(&self.drain.mutex);
            self.drain.left.notify_all();
        }
    }
}

impl Gate {
    /// The disk that follows the file.
    pub(super) fn disk(&self) -> Option<Arc<dyn TrackedDisk>> {
        self.disk.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A change begins.
    pub(super) fn enter<'a>(&'a self, drain: &'a Drain) -> Way<'a> {
        let disk = self.disk.read().unwrap_or_else(PoisonError::into_inner);
        match &*disk {
            Some(disk) => Way::Tracked(disk.clone()),
            None => {
                self.untracked.fetch_add(1, Ordering::SeqCst);
                Way::Untracked(Untracked { gate: self, drain })
            }
        }
    }

    /// From now on `disk` follows the file; returns when every change that saw none has ended.
    /// `false`: the file has a disk already.
    pub(super) fn publish(&self, disk: Arc<dyn TrackedDisk>, drain: &Drain) -> bool {
        {
            let mut cell = self.disk.write().unwrap_or_else(PoisonError::into_inner);
            if cell.is_some() {
                return false;
            }
            *cell = Some(disk);
        }
        drain.waiters.fetch_add(1, Ordering::SeqCst);
        let mut guard = lock(&drain.mutex);
        while self.untracked.load(Ordering::SeqCst) > 0 {
            // The time limit only guards against a wake-up that was lost to a panic.
            let waited = drain.left.wait_timeout(guard, Duration::from_millis(200));
            guard = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        drain.waiters.fetch_sub(1, Ordering::SeqCst);
        true
    }

    /// Nobody follows the file any more. Changes in flight still end at the disk that saw them.
    pub(super) fn retract(&self) -> Option<Arc<dyn TrackedDisk>> {
        self.disk.write().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// The farthest end of an announced write, in bytes.
    pub(super) fn high(&self) -> u64 {
        self.high.load(Ordering::SeqCst)
    }

    fn raise_high(&self, end: u64) {
        if self.high.load(Ordering::SeqCst) < end {
            self.high.fetch_max(end, Ordering::SeqCst);
        }
    }
}

/// How many threads wait in [`TrackedDisk::begin`] right now: if nearly all event loops do,
/// further writes are handed to other threads.
#[derive(Default)]
pub(super) struct Pressure(AtomicUsize);

impl Pressure {
    pub(super) fn waiting(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }

    pub(super) fn begin(
        &self,
        disk: &dyn TrackedDisk,
        change: Change,
    ) -> Result<crate::core::ports::tracking::Ticket, Errno> {
        self.0.fetch_add(1, Ordering::Relaxed);
        let ticket = disk.begin(change);
        self.0.fetch_sub(1, Ordering::Relaxed);
        ticket
    }
}

/// Makes one change of a tracked file: begin, `lower`, end; once more if room could be made (T5).
/// `lower` returns the number of bytes written.
pub(super) fn make(
    gate: &Gate,
    disk: &dyn TrackedDisk,
    pressure: &Pressure,
    change: Change,
    mut lower: impl FnMut() -> Result<u64, Errno>,
) -> Result<u64, Errno> {
    if let Change::Write { offset, length } | Change::Zero { offset, length } = change {
        let end = offset.checked_add(length).ok_or(Errno::EFBIG)?;
        if end > DISK_BYTES_MAX {
            return Err(Errno::EFBIG);
        }
        // Before `begin`: see `resize`.
        gate.raise_high(end);
    }
    let mut once = || {
        let ticket = pressure.begin(disk, change)?;
        let result = lower();
        disk.end(ticket, result);
        result
    };
    match once() {
        Err(Errno::ENOSPC) if disk.make_room() => once(),
        result => result,
    }
}

/// Changes the size of a tracked file (T10). `size` is the lower file's, now.
///
/// The blocks from the smaller to the larger size must be marked in one epoch, so the larger one
/// must be known before the truncation is announced, while other writes make the file grow.
/// Therefore every write raises `high` before it announces itself, and we ask again after our
/// announcement, which the next cut waits for: a write that is not in `high` by then is announced
/// in the same epoch as we are, or a later one, and its blocks are marked there.
pub(super) fn resize(
    gate: &Gate,
    disk: &dyn TrackedDisk,
    pressure: &Pressure,
    to: u64,
    size: impl Fn() -> Result<u64, Errno>,
    lower: impl Fn() -> Result<(), Errno>,
) -> Result<(), Errno> {
    if to > DISK_BYTES_MAX {
        return Err(Errno::EFBIG);
    }
    let once = || {
        loop {
            let (at, high) = (size()?, gate.high());
            let from = if to >= at.max(high) { at } else { at.max(high) };
            let ticket = pressure.begin(disk, Change::Truncate { from, to })?;
            if size()?.max(gate.high()) > from.max(to) {
                disk.end(ticket, Err(Errno::EAGAIN));
                continue;
            }
            let result = lower();
            disk.end(ticket, result.map(|()| 0));
            return result;
        }
    };
    match once() {
        Err(Errno::ENOSPC) if disk.make_room() => once(),
        result => result,
    }
}
