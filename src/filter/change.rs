//! The bracket around every change of a file's data: *begin, lower call, end* of its
//! [`TrackedDisk`], if it has one.
//!
//! A disk is attached and detached while guests write. [`Gate`] makes that exact:
//!
//! * A change takes the read lock of the gate for an instant. It counts itself in before it lets
//!   go of the lock: as *tracked* if a disk is published, through which it goes, else as
//!   *untracked*.
//! * [`Gate::publish`] stores the disk under the write lock and then waits until no untracked
//!   change is left; [`Gate::retract`] takes it away and waits until no tracked one is left.
//!
//! The lock orders them: a change that saw the state before had its lock before the writer, so its
//! count is seen by the wait; one that came after the writer sees the new state and counts
//! elsewhere. Those waited for only leave, so the wait ends. Nobody holds the lock during I/O.
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
    tracked: AtomicU64,
    /// The farthest end of a tracked write that has been announced, in bytes.
    high: AtomicU64,
}

/// Who waits for changes to end.
#[derive(Default)]
pub(super) struct Drain {
    waiters: AtomicUsize,
    mutex: Mutex<()>,
    left: Condvar,
}

/// How a change goes through.
pub(super) enum Way<'a> {
    /// Through this disk.
    Tracked(Arc<dyn TrackedDisk>, Counted<'a>),
    /// Nobody follows the file.
    Untracked(Counted<'a>),
}

/// A change is counted until this is dropped.
pub(super) struct Counted<'a> {
    count: &'a AtomicU64,
    drain: &'a Drain,
}

impl<'a> Counted<'a> {
    fn new(count: &'a AtomicU64, drain: &'a Drain) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Self { count, drain }
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        let before = self.count.fetch_sub(1, Ordering::SeqCst);
        if before == 1 && self.drain.waiters.load(Ordering::SeqCst) > 0 {
            let _guard = lock(&self.drain.mutex);
            self.drain.left.notify_all();
        }
    }
}

impl Drain {
    /// Returns when nothing is counted.
    fn wait(&self, count: &AtomicU64) {
        self.waiters.fetch_add(1, Ordering::SeqCst);
        let mut guard = lock(&self.mutex);
        while count.load(Ordering::SeqCst) > 0 {
            // The time limit only guards against a wake-up that was lost to a panic.
            let waited = self.left.wait_timeout(guard, Duration::from_millis(200));
            guard = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        self.waiters.fetch_sub(1, Ordering::SeqCst);
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
            Some(disk) => Way::Tracked(disk.clone(), Counted::new(&self.tracked, drain)),
            None => Way::Untracked(Counted::new(&self.untracked, drain)),
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
        drain.wait(&self.untracked);
        true
    }

    /// Nobody follows the file any more; returns when every change that goes through the disk has
    /// ended there.
    pub(super) fn retract(&self, drain: &Drain) -> Option<Arc<dyn TrackedDisk>> {
        let disk = self.disk.write().unwrap_or_else(PoisonError::into_inner).take();
        if disk.is_some() {
            drain.wait(&self.tracked);
        }
        disk
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;
    use crate::base::DiskId;
    use crate::core::ports::tracking::{SyncMark, Ticket};

    struct Nothing;

    impl TrackedDisk for Nothing {
        fn id(&self) -> DiskId {
            DiskId(1)
        }
        fn begin(&self, change: Change) -> Result<Ticket, Errno> {
            Ok(Ticket { epoch: 1, change, shard: 0 })
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

    /// Lets a change that is under way end only once `waiter` waits.
    fn outlives(gate: &Gate, drain: &Drain, waiter: impl FnOnce() + Send) {
        let ended = AtomicBool::new(false);
        let change = gate.enter(drain);
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| {
                waiter();
                assert!(ended.load(Ordering::SeqCst), "it did not wait");
            });
            while drain.waiters.load(Ordering::SeqCst) == 0 && !waits.is_finished() {
                std::thread::yield_now();
            }
            // What begins now is not waited for.
            let later = gate.enter(drain);
            ended.store(true, Ordering::SeqCst);
            drop(change);
            waits.join().unwrap();
            drop(later);
        });
    }

    #[test]
    fn attach_and_detach_wait_for_the_changes_that_began_before() {
        let (gate, drain) = (Gate::default(), Drain::default());
        outlives(&gate, &drain, || assert!(gate.publish(Arc::new(Nothing), &drain)));
        assert!(matches!(gate.enter(&drain), Way::Tracked(..)));
        outlives(&gate, &drain, || assert!(gate.retract(&drain).is_some()));
        assert!(matches!(gate.enter(&drain), Way::Untracked(_)));
        assert!(gate.retract(&drain).is_none());
    }
}
