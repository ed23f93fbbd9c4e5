//! A VM at run time: its record, and while it is protected its tracker and its shipper.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::policies::Policies;
use super::records::VmRecord;
use super::state::StateDir;
use super::targets::Target;
use crate::base::{Error, ErrorKind, Result, VmId, VmName};
use crate::format::manifest::DefinitionFile;
use crate::ship::ShipperHandle;
use crate::tracker::VmTracker;

/// What runs while a VM is protected.
#[derive(Clone)]
pub struct Running {
    /// Its tracker.
    pub tracker: Arc<VmTracker>,
    /// Its shipper; none between tracking and shipping, at start and stop.
    pub shipper: Option<Arc<ShipperHandle>>,
}

/// A VM that this host protects or has protected.
pub struct Vm {
    /// Its UUID.
    pub id: VmId,
    /// Where it goes.
    pub target: Arc<Target>,
    record: Mutex<VmRecord>,
    running: Mutex<Option<Running>>,
    /// Held while disks join or leave: one change of membership at a time. Nobody who holds it
    /// touches the mounted view, because operations there may wait for it.
    membership: Mutex<()>,
    domain: Mutex<Option<DefinitionFile>>,
    trouble: Mutex<Option<Error>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Vm {
    /// A VM that does not run yet.
    pub fn new(record: VmRecord, target: Arc<Target>) -> Self {
        Self {
            id: record.id,
            target,
            record: Mutex::new(record),
            running: Mutex::new(None),
            membership: Mutex::new(()),
            domain: Mutex::new(None),
            trouble: Mutex::new(None),
        }
    }

    /// Its record as it is now.
    pub fn record(&self) -> VmRecord {
        lock(&self.record).clone()
    }

    /// Its name as it is now.
    pub fn name(&self) -> VmName {
        lock(&self.record).name.clone()
    }

    /// Changes the record: durably first, then in memory.
    pub fn change<T>(&self, state: &StateDir, change: impl FnOnce(&mut VmRecord) -> T) -> Result<T> {
        let mut record = lock(&self.record);
        let mut next = record.clone();
        let result = change(&mut next);
        if next != *record {
            next.save(state)?;
            *record = next;
        }
        Ok(result)
    }

    /// Changes the record in memory when it cannot be made durable: the world has changed
    /// already (a file was renamed), and the next change writes both.
    pub fn follow(&self, state: &StateDir, change: impl Fn(&mut VmRecord)) {
        if let Err(e) = self.change(state, &change) {
            log::error!("{}: the record cannot be written: {e}", self.name());
            change(&mut lock(&self.record));
        }
    }

    /// What runs.
    pub fn running(&self) -> Option<Running> {
        lock(&self.running).clone()
    }

    /// What runs, or why nothing does.
    pub fn expect_running(&self) -> Result<Running> {
        self.running().ok_or_else(|| {
            let name = self.name();
            match self.trouble() {
                Some(e) => e,
                None => Error::new(ErrorKind::Refused, format!("VM {name} is not protected"))
                    .hint(format!("afterimage protect {name} --disk FILE")),
            }
        })
    }

    /// The shipper, or why there is none.
    pub fn expect_shipper(&self) -> Result<Arc<ShipperHandle>> {
        self.expect_running()?.shipper.ok_or_else(|| {
            Error::new(ErrorKind::Busy, format!("VM {} is being started or stopped", self.name()))
                .hint("afterimage status")
        })
    }

    /// Sets what runs.
    pub fn set_running(&self, running: Option<Running>) {
        *lock(&self.running) = running;
    }

    /// Takes what runs away.
    pub fn take_running(&self) -> Option<Running> {
        lock(&self.running).take()
    }

    /// One change of membership at a time.
    pub fn lock_membership(&self) -> MutexGuard<'_, ()> {
        lock(&self.membership)
    }

    /// What libvirt says of the VM, as last asked.
    pub fn domain(&self) -> Option<DefinitionFile> {
        lock(&self.domain).clone()
    }

    /// Sets it.
    pub fn set_domain(&self, domain: Option<DefinitionFile>) {
        *lock(&self.domain) = domain;
    }

    /// Why it does not run although it should.
    pub fn trouble(&self) -> Option<Error> {
        lock(&self.trouble).as_ref().map(|e| {
            let mut copy = Error::new(e.kind(), e.what());
            if let Some(why) = e.reason() {
                copy = copy.why(why);
            }
            match e.next_step() {
                Some(hint) => copy.hint(hint),
                None => copy,
            }
        })
    }

    /// Sets why.
    pub fn set_trouble(&self, error: Option<Error>) {
        *lock(&self.trouble) = error;
    }

    /// Time between cuts: its own, else its policy's.
    pub fn interval(&self, policies: &Policies) -> Duration {
        let record = self.record();
        let of_policy = || policies.get(&record.policy).map_or(30_000, |p| p.interval_ms);
        Duration::from_millis(record.interval_ms.unwrap_or_else(of_policy))
    }
}
