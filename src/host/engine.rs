//! The engine: everything that runs inside a daemon, put together.
//!
//! Start-up, in this order: lock, database, tracker, mounts (lower side), VMs opened with the
//! recovery table and their disks attached, mounts served, shippers, API. A write to a protected
//! disk is tracked from the first request that a mount answers.
//!
//! Killed at any point of it: the next start does the same from the beginning; each step finds
//! what the one before left (see the modules). Disk full: start-up needs no space but for the
//! lock file and the database; a mount serves, untracked writes are impossible, and shipping
//! waits for room.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use super::api::types::{DaemonStatus, Severity};
use super::config::Config;
use super::db::Database;
use super::events::Events;
use super::jobs::Jobs;
use super::mounts::Mounts;
use super::policies::{POLICY_DEFAULT, Policies};
use super::records::VmRecord;
use super::state::{StateDir, StateLock, boot_id};
use super::status::Caches;
use super::targets::Targets;
use super::views::Views;
use super::vm::Vm;
use crate::base::{Clock, Error, ErrorKind, Result, SystemClock, Timestamp, VmId};
use crate::tracker::Tracker;

/// A predecessor gets so long to be gone entirely (S1).
const LOCK_PATIENCE: Duration = Duration::from_secs(60);

/// Everything of one daemon. Threads hold it by `Arc`, callbacks of the edges by `Weak`.
pub struct Engine {
    pub(super) state: StateDir,
    pub(super) config: Config,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) jobs: Jobs,
    pub(super) events: Events,
    pub(super) policies: Policies,
    pub(super) targets: Targets,
    pub(super) tracker: Tracker,
    pub(super) mounts: Mounts,
    pub(super) views: Views,
    pub(super) caches: Caches,
    pub(super) vms: RwLock<BTreeMap<VmId, Arc<Vm>>>,
    /// Held while the set of VMs and the owners of disks are decided.
    pub(super) planning: Mutex<()>,
    /// Records that cannot be read, in words; status repeats them.
    pub(super) unreadable: Vec<String>,
    pub(super) me: std::sync::Weak<Engine>,
    started: Timestamp,
    stop: Stop,
    threads: Mutex<Vec<std::thread::JoinHandle<()>>>,
    _lock: StateLock,
}

/// Says "stop" to every thread of the engine.
#[derive(Default)]
struct Stop {
    said: Mutex<bool>,
    changed: Condvar,
}

impl Engine {
    /// Starts the engine of the daemon with this state folder. It serves when it returns.
    pub fn start(state: StateDir, config: Config) -> Result<Arc<Self>> {
        state.create()?;
        let lock = state.lock(LOCK_PATIENCE)?;
        let clock: Arc<dyn Clock> = Arc::new(SystemClock::default());
        let boot = boot_id()?;
        let (db, put_aside) = Database::open(&state.database())?;
        let db = Arc::new(db);
        let policies = Policies::load(state.policies())?;
        if let Some(name) = &config.policy {
            policies.get(name).map_err(|e| e.with_kind(ErrorKind::Configuration))?;
        }
        let tracker = Tracker::open(state.root(), boot, clock.clone(), config.preserved_memory_bytes())?;
        let mounts = Mounts::load(&state)?;
        let views = Views::load(&state)?;
        let (records, errors) = VmRecord::load_all(&state)?;
        let engine = Arc::new_cyclic(|me| Self {
            jobs: Jobs::new(db.clone(), clock.clone()),
            events: Events::new(db, clock.clone()),
            targets: Targets::new(&state, &config, clock.clone()),
            started: clock.now(),
            unreadable: errors.iter().map(|e| format!("{e}; its disks are not tracked")).collect(),
            policies,
            tracker,
            mounts,
            views,
            caches: Caches::default(),
            vms: RwLock::new(BTreeMap::new()),
            planning: Mutex::new(()),
            me: me.clone(),
            stop: Stop::default(),
            threads: Mutex::new(Vec::new()),
            state,
            config,
            clock,
            _lock: lock,
        });
        if let Some(text) = put_aside {
            engine.events.add(Severity::Warning, None, "database-damaged", &text);
        }
        for text in &engine.unreadable {
            engine.events.add(Severity::Critical, None, "vm-unreadable", text);
        }
        engine.bring_up(records)?;
        Ok(engine)
    }

    fn bring_up(self: &Arc<Self>, records: Vec<VmRecord>) -> Result<()> {
        for record in records {
            let target = self.targets.get(&record.target)?;
            let vm = Arc::new(Vm::new(record, target));
            self.vms.write().unwrap_or_else(PoisonError::into_inner).insert(vm.id, vm);
        }
        self.restore_mounts();
        for vm in self.vms() {
            self.start_shipper_logged(&vm);
        }
        self.restore_views();
        self.resume_jobs();
        self.spawn("retention", Self::retention_loop)?;
        self.spawn("housekeeping", Self::housekeeping_loop)?;
        Ok(())
    }

    /// Starts a thread that ends when the engine stops.
    pub(super) fn spawn(
        self: &Arc<Self>,
        name: &str,
        work: impl FnOnce(&Arc<Self>) + Send + 'static,
    ) -> Result<()> {
        let engine = self.clone();
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || work(&engine))
            .map_err(|e| Error::io(format!("the thread {name} cannot be started"), e))?;
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        threads.retain(|t| !t.is_finished());
        threads.push(thread);
        Ok(())
    }

    /// Waits `time`, or until the engine stops. Whether it stops.
    pub(super) fn pause_or_stop(&self, time: Duration) -> bool {
        let said = self.stop.said.lock().unwrap_or_else(PoisonError::into_inner);
        let (said, _) = self
            .stop
            .changed
            .wait_timeout_while(said, time, |said| !*said)
            .unwrap_or_else(PoisonError::into_inner);
        *said
    }

    /// Whether the engine stops.
    pub fn is_stopping(&self) -> bool {
        *self.stop.said.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks for the end of the daemon; returns at once.
    pub fn request_stop(&self) {
        *self.stop.said.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.stop.changed.notify_all();
    }

    /// Ends cleanly: shippers stop, idle mounts are unmounted and their disks closed with a
    /// record that the next start trusts. A mount in use goes with the process: the recovery
    /// table compares what must be compared. Everything is remembered.
    pub fn stop(&self) {
        self.request_stop();
        let threads = std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        for thread in threads {
            if thread.join().is_err() {
                log::error!("a thread of the engine ended by a panic");
            }
        }
        for vm in self.vms() {
            if let Some(running) = vm.running() {
                if let Some(shipper) = &running.shipper {
                    shipper.stop();
                }
                vm.set_running(Some(super::vm::Running { shipper: None, ..running }));
            }
        }
        self.views.unmount_all();
        self.stop_mounts();
        self.tracker.stop();
        log::info!("stopped");
    }

    /// Every VM, protected or ended, by id.
    pub(super) fn vms(&self) -> Vec<Arc<Vm>> {
        self.vms.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// One decision about VMs and owners of disks at a time.
    pub(super) fn plan(&self) -> MutexGuard<'_, ()> {
        self.planning.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The VM with this name or UUID. A name of a protected VM goes before one that has ended.
    pub(super) fn vm(&self, name: &str) -> Result<Arc<Vm>> {
        let vms = self.vms();
        let id: Option<VmId> = name.parse().ok();
        let mut found = vms.iter().filter(|v| Some(v.id) == id || v.name().as_str() == name);
        let by_age = |v: &&Arc<Vm>| v.record().is_protected();
        let first = found.clone().find(by_age).or_else(|| found.next());
        first.cloned().ok_or_else(|| no_vm(name))
    }

    /// The protected VM with this name or UUID.
    pub(super) fn protected_vm(&self, name: &str) -> Result<Arc<Vm>> {
        let vm = self.vm(name)?;
        if vm.record().is_protected() {
            return Ok(vm);
        }
        Err(Error::new(ErrorKind::NotFound, format!("VM {name} is not protected any more"))
            .why("its points are kept")
            .hint(format!("afterimage points {name}")))
    }

    /// Name of the policy of a VM that names none.
    pub(super) fn default_policy(&self) -> String {
        self.config.policy.clone().unwrap_or_else(|| POLICY_DEFAULT.to_owned())
    }

    /// Who answers.
    pub(super) fn daemon_status(&self) -> DaemonStatus {
        DaemonStatus {
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime_seconds: self.clock.now().since(self.started).as_secs(),
            state_dir: self.state.root().to_owned(),
        }
    }
}

/// No VM has that name.
pub(super) fn no_vm(name: &str) -> Error {
    Error::new(ErrorKind::NotFound, format!("there is no VM {name:?}")).hint("afterimage status")
}
