//! [`Tracker`]: the host's hot-region log, the VMs that are open, and two threads.
//!
//! `tracker-heartbeat` says each second in shared memory that somebody tracks: a disk that was
//! modified later than that was changed beneath. `tracker-cooler` does the lazy work: regions
//! that nobody wrote to for a while cool (T6), activation slows down (T7), disks with the
//! untracked mark get their log back (T8).

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};

use super::disk::DiskSpec;
use super::hot::HotLog;
use super::preserve_memory::PreserveMemory;
use super::shm::{ShmNames, VM_HEARTBEAT};
use super::start::{Surroundings, open_vm};
use super::sync::lock;
use super::vm::VmTracker;
use crate::base::error::Context;
use crate::base::limits::COOL_AFTER_SECONDS;
use crate::base::{BootId, Clock, Result, Timestamp, VmId};

/// How often the heartbeat beats, and the cooler looks.
const BEAT: Duration = Duration::from_secs(1);

type Vms = Arc<Mutex<Vec<Weak<VmTracker>>>>;

/// The tracker of a host: hot-region log, cooler, and the VMs that are open.
pub struct Tracker {
    state_dir: PathBuf,
    boot: BootId,
    boot_began: Timestamp,
    clock: Arc<dyn Clock>,
    names: ShmNames,
    hot: Arc<HotLog>,
    memory: Arc<PreserveMemory>,
    vms: Vms,
    stop: Mutex<Option<Sender<()>>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// When this boot began, if `boot` is this boot; else now: then it is one that a test made up.
fn boot_began(boot: BootId, now: Timestamp) -> Timestamp {
    let own = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let seconds = stat.lines().find_map(|l| l.strip_prefix("btime ")?.trim().parse::<i64>().ok());
    let is_own = own.trim().parse::<BootId>().is_ok_and(|id| id == boot);
    seconds.filter(|_| is_own).map_or(now, |s| Timestamp(s.saturating_mul(1000)))
}

impl Tracker {
    /// Opens the tracker whose files are in `state_dir` (which must exist). `boot_id` tells shared
    /// memory of this boot. At most `preserved_bytes` of preserved blocks are kept in memory, of all
    /// disks together; more goes into their HRLs.
    pub fn open(
        state_dir: &Path,
        boot_id: BootId,
        clock: Arc<dyn Clock>,
        preserved_bytes: u64,
    ) -> Result<Self> {
        let names = ShmNames::new(state_dir, boot_id);
        names.remove_foreign();
        let hot = Arc::new(HotLog::open(state_dir, boot_id)?);
        let vms = Vms::default();
        let (stop, stopped) = bounded::<()>(0);
        let spawn = |name: &str, body: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new()
                .name(name.to_owned())
                .spawn(body)
                .context(|| format!("cannot start the thread {name}"))
        };
        let (beating, at) = (vms.clone(), clock.clone());
        let heard = stopped.clone();
        let heartbeat = spawn("tracker-heartbeat", Box::new(move || beat(&beating, &*at, &heard)))?;
        let cooling = vms.clone();
        let cooler = spawn("tracker-cooler", Box::new(move || cool(&cooling, &stopped)))?;
        Ok(Self {
            state_dir: state_dir.to_owned(),
            boot: boot_id,
            boot_began: boot_began(boot_id, clock.now()),
            clock,
            names,
            hot,
            memory: Arc::new(PreserveMemory::new(preserved_bytes)),
            vms,
            stop: Mutex::new(Some(stop)),
            threads: Mutex::new(vec![heartbeat, cooler]),
        })
    }

    /// Opens a VM with its disks. `fresh`: it was not protected before, every disk ships whole.
    /// Otherwise the start-up table (`core::recovery`) decides for each disk.
    pub fn open_vm(&self, vm: VmId, disks: Vec<DiskSpec>, fresh: bool) -> Result<Arc<VmTracker>> {
        let around = Surroundings {
            state_dir: &self.state_dir,
            boot: self.boot,
            boot_began: self.boot_began,
            clock: self.clock.clone(),
            hot: self.hot.clone(),
            names: &self.names,
            memory: &self.memory,
        };
        let vm = open_vm(&around, vm, disks, fresh)?;
        let mut vms = lock(&self.vms);
        vms.retain(|v| v.strong_count() > 0);
        vms.push(Arc::downgrade(&vm));
        Ok(vm)
    }

    /// Stops the threads of the tracker. VMs are stopped by [`VmTracker::stop_clean`] before.
    pub fn stop(&self) {
        drop(lock(&self.stop).take());
        for thread in lock(&self.threads).drain(..) {
            let _ = thread.join();
        }
        self.hot.stop();
    }

    /// Removes all shared memory of this state folder: for tests, whose boots are made up.
    pub fn remove_shared_memory(&self) {
        self.names.remove_all();
    }
}

impl Drop for Tracker {
    fn drop(&mut self) {
        self.stop();
    }
}

fn open_vms(vms: &Vms) -> Vec<Arc<VmTracker>> {
    lock(vms).iter().filter_map(Weak::upgrade).collect()
}

fn is_over(stopped: &Receiver<()>) -> bool {
    !matches!(stopped.recv_timeout(BEAT), Err(RecvTimeoutError::Timeout))
}

fn beat(vms: &Vms, clock: &dyn Clock, stopped: &Receiver<()>) {
    while !is_over(stopped) {
        for vm in open_vms(vms) {
            vm.shared.shm.field(VM_HEARTBEAT).store(clock.now().0 as u64, SeqCst);
        }
    }
}

fn cool(vms: &Vms, stopped: &Receiver<()>) {
    let mut beats = 0u64;
    while !is_over(stopped) {
        beats += 1;
        for disk in open_vms(vms).iter().flat_map(|vm| vm.disks()) {
            disk.regions.slow_down();
            disk.recover_tracking();
        }
        if beats.is_multiple_of(COOL_AFTER_SECONDS) {
            for vm in open_vms(vms) {
                vm.cool_idle();
            }
        }
    }
}

impl VmTracker {
    /// Cools every region that nobody wrote to since the last call (T6). Returns how many.
    pub fn cool_idle(&self) -> usize {
        let mut cooled = 0;
        for disk in self.disks() {
            let idle = disk.regions.idle();
            if !idle.is_empty() && self.cool(&disk, &idle) {
                cooled += idle.len();
            }
        }
        cooled
    }
}
