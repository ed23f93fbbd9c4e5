//! `status`: everything about daemon, mounts and VMs in one report, and the rules of health.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::api::types::*;
use super::engine::Engine;
use super::folder::files_below;
use super::mounts::Mounted;
use super::records::{Phase, VmRecord};
use super::storage;
use super::vm::Vm;
use crate::base::shell::shell;
use crate::base::{ErrorKind, Result};
use crate::core::health::{self, HealthFacts, Level, Retrying};
use crate::core::ports::points::PointStore;
use crate::core::ports::source::{DiskFigures, Source};
use crate::core::ports::vault::Vault;
use crate::machine::image::{self, ImageFormat};
use crate::ship::{ShipState, ShipStatus};
use crate::tracker::LatencyFigures;

/// What is dear to find out is told again for so long.
const CACHE_AGE_MAX: Duration = Duration::from_secs(10);
/// Files looked at for the list of unprotected disks, per mount.
const LOOKED_AT_MAX: usize = 2_000;
/// A file without a known mark or name is a disk image from this size on.
const RAW_BYTES_MIN: u64 = 64 << 20;
/// Health is Warning when the RPO is older than so many intervals, and at least [`ALERT_MIN`].
const ALERT_INTERVALS: u32 = 3;
const ALERT_MIN: Duration = Duration::from_secs(10);

/// A value that is found out again when it is old.
struct Cached<T>(Mutex<Option<(Duration, T)>>);

impl<T> Default for Cached<T> {
    fn default() -> Self {
        Self(Mutex::new(None))
    }
}

impl<T: Clone> Cached<T> {
    fn get(&self, now: Duration, find: impl FnOnce() -> T) -> T {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((at, value)) = &*held
            && now.saturating_sub(*at) < CACHE_AGE_MAX
        {
            return value.clone();
        }
        let value = find();
        *held = Some((now, value.clone()));
        value
    }

    fn forget(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// What is dear to find out.
#[derive(Default)]
pub struct Caches {
    images: Cached<Vec<UnprotectedDisk>>,
    beneath: Cached<Vec<(PathBuf, Vec<OpenFile>)>>,
}

impl Caches {
    /// Mounts or VMs have changed.
    pub fn forget(&self) {
        self.images.forget();
        self.beneath.forget();
    }
}

impl Engine {
    pub(super) fn status_command(&self, request: &StatusRequest) -> Result<StatusReport> {
        let mut vms: Vec<Arc<Vm>> = self.vms().into_iter().filter(|v| v.record().is_protected()).collect();
        if let Some(name) = &request.vm {
            let vm = self.protected_vm(name)?;
            vms.retain(|v| v.id == vm.id);
        }
        let mut reports: Vec<VmStatus> = vms.iter().map(|vm| self.vm_status(vm)).collect();
        reports.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(StatusReport {
            schema: STATUS_SCHEMA.to_owned(),
            time: self.now(),
            daemon: self.daemon_status(),
            targets: self.target_statuses(&vms),
            mounts: self.mount_statuses(),
            vms: reports,
            unprotected: self.unprotected(),
            warnings: self.unreadable.clone(),
        })
    }

    fn target_statuses(&self, vms: &[Arc<Vm>]) -> Vec<TargetStatus> {
        let in_use = |t: &Arc<super::targets::Target>| vms.iter().any(|v| Arc::ptr_eq(&v.target, t));
        let targets = self.targets.all().into_iter().filter(|t| in_use(t) || t.exists());
        let status = |t: Arc<super::targets::Target>| {
            let space = t.space();
            TargetStatus {
                name: t.name.clone(),
                location: t.path.display().to_string(),
                free_bytes: space.as_ref().ok().map(|s| s.free_bytes),
                total_bytes: space.as_ref().ok().map(|s| s.total_bytes),
                error: space.as_ref().err().map(Failure::from),
            }
        };
        targets.map(status).collect()
    }

    /// Status of every mount, by directory.
    pub(super) fn mount_statuses(&self) -> Vec<MountStatus> {
        let beneath = self.caches.beneath.get(self.clock.monotonic(), || {
            self.mounts.all().iter().map(|m| (m.dir().to_owned(), m.open_beneath())).collect()
        });
        let records: Vec<VmRecord> = self.vms().iter().map(|v| v.record()).collect();
        let mut all = self.mounts.statuses();
        for mount in &mut all {
            let disks = records.iter().filter(|r| r.is_protected()).flat_map(|r| &r.disks);
            mount.protected_disks = disks.filter(|d| d.mount == mount.dir).count() as u64;
            let here = beneath.iter().filter(|(dir, _)| *dir == mount.dir);
            mount.open_beneath = here.flat_map(|(_, open)| open.clone()).collect();
        }
        all
    }

    fn vm_status(&self, vm: &Vm) -> VmStatus {
        let record = vm.record();
        let running = vm.running();
        let shipping = running.as_ref().and_then(|r| r.shipper.as_ref()).map(|s| s.status());
        let figures = running.as_ref().map(|r| r.tracker.figures()).unwrap_or_default();
        let disks = record.disks.iter().map(|d| DiskStatus {
            id: d.id,
            path: d.view_path(),
            format: d.format.name().to_owned(),
            figures: figures.iter().find(|(id, _)| *id == d.id).map(|(_, f)| f.clone()).unwrap_or_default(),
        });
        let disks: Vec<DiskStatus> = disks.collect();
        let points = vm.target.points(vm.id).unwrap_or_default();
        let facts = self.health_facts(vm, &record, shipping.as_ref(), &disks);
        let health = health::assess(self.now(), &facts);
        let (mut level, mut reasons) = (level_of(health.level), words(&health));
        if let Some(e) = vm.trouble() {
            level = Health::Critical;
            let remedy = e.next_step().map(|h| format!("; {h}")).unwrap_or_default();
            reasons.insert(0, format!("{e}{remedy}"));
        }
        if let Some(why) = vm.target.last_error(vm.id) {
            level = level.max(Health::Warning);
            let (see, typed) = (vm.target.path.display(), shell(&vm.target.path));
            reasons.push(format!("the vault does not take everything: {why}; look at {see}: df -h {typed}"));
        }
        let delay = running.as_ref().map(|r| delay_of(&r.tracker.latency()));
        let current_as_of = shipping.as_ref().and_then(|s| s.current_as_of);
        let failure = shipping.as_ref().and_then(|s| s.failure.clone());
        VmStatus {
            state: state_of(&record, shipping.as_ref(), &disks, vm.trouble().is_some()),
            health: level,
            reasons,
            target: record.target,
            policy: record.policy,
            interval_ms: u64::try_from(vm.interval(&self.policies).as_millis()).unwrap_or(u64::MAX),
            folder: record.folder.map(|f| f.mount.join(f.path)),
            disks,
            current_as_of,
            rpo_ms: current_as_of.map(|t| u64::try_from(self.now().since(t).as_millis()).unwrap_or(0)),
            epoch: shipping.as_ref().and_then(|s| s.last_delivered).map(|d| d.epoch.next()),
            points: points.len() as u64,
            newest_point: points.last().map(|p| p.id),
            tracking_delay: delay,
            next_cycle: shipping.as_ref().and_then(|s| s.next_attempt.or(s.next_cycle)),
            shipping: shipping.as_ref().and_then(transfer),
            backlog_epochs: vm.target.backlog(vm.id).map_or(0, |(epochs, _)| epochs),
            failed_attempts: shipping.as_ref().map_or(0, |s| u32::try_from(s.counts.failures).unwrap_or(0)),
            last_error_at: shipping.as_ref().and_then(|s| s.failing_since),
            last_error: failure.map(|f| Failure { kind: f.kind, what: f.what, why: f.why, hint: f.hint }),
            name: record.name,
            id: record.id,
        }
    }

    fn health_facts(
        &self,
        vm: &Vm,
        record: &VmRecord,
        status: Option<&ShipStatus>,
        disks: &[DiskStatus],
    ) -> HealthFacts {
        let mut facts = HealthFacts {
            vm: record.name.to_string(),
            paused: record.paused,
            shares_device: self.shared_device(vm, record),
            ..HealthFacts::default()
        };
        let whole = disks.iter().filter_map(|d| Some((&d.path, d.figures.whole_because.as_ref()?)));
        if record.phase == Phase::Protected {
            facts.whole = whole.map(|(p, why)| (p.display().to_string(), why.clone())).collect();
        }
        let Some(status) = status else { return facts };
        let interval = vm.interval(&self.policies);
        let of_policy = self.policies.get(&record.policy).map_or(0, |p| p.rpo_alert_ms);
        facts.alert_after = Some(match of_policy {
            0 => interval.saturating_mul(ALERT_INTERVALS).max(ALERT_MIN),
            ms => Duration::from_millis(ms),
        });
        if status.is_initial {
            let progress = status.progress.unwrap_or_default();
            facts.initial = Some((progress.done_bytes, progress.total_bytes));
        }
        facts.current_as_of = status.current_as_of;
        facts.give_ups = status.give_ups_in_a_row;
        facts.preserved_needed = status.preserved_needed;
        facts.held_back = status.held_back;
        match (&status.failure, status.state, status.failing_since) {
            (Some(failure), ShipState::Stopped, _) => facts.stopped = Some(failure.clone()),
            (Some(failure), _, Some(since)) => {
                let next_attempt = status.next_attempt;
                facts.retrying = Some(Retrying { since, next_attempt, failure: failure.clone() });
            }
            _ => {}
        }
        facts
    }

    /// A disk on the device that the vault is on.
    fn shared_device(&self, vm: &Vm, record: &VmRecord) -> Option<String> {
        let vault = storage::device_of_path(&vm.target.path).ok()?;
        let shares = |d: &&super::records::DiskRecord| {
            self.mounts.get(&d.mount).is_some_and(|m| m.lower_stat_device() == vault)
        };
        record.disks.iter().find(shares).map(|d| d.view_path().display().to_string())
    }

    /// Disk images below the mounts that no VM has.
    fn unprotected(&self) -> Vec<UnprotectedDisk> {
        let images = self
            .caches
            .images
            .get(self.clock.monotonic(), || self.mounts.all().iter().flat_map(images_below).collect());
        let owned: Vec<PathBuf> = self
            .vms()
            .iter()
            .map(|v| v.record())
            .filter(VmRecord::is_protected)
            .flat_map(|r| r.disks.iter().map(|d| d.view_path()).collect::<Vec<_>>())
            .collect();
        images.into_iter().filter(|i| !owned.contains(&i.path)).collect()
    }
}

fn images_below(mount: &Arc<Mounted>) -> Vec<UnprotectedDisk> {
    let files = files_below(mount.dir(), std::path::Path::new("")).unwrap_or_default();
    files
        .into_iter()
        .take(LOOKED_AT_MAX)
        .filter_map(|path| {
            let lower = mount.look(&path).ok()?;
            let info = image::probe(&lower.file).ok()?;
            let extension = path.extension().map(|e| e.to_string_lossy().to_lowercase());
            let is_named_so = matches!(extension.as_deref(), Some("img" | "raw"));
            let is_disk = match info.format {
                ImageFormat::Iso => false,
                ImageFormat::Raw => is_named_so || info.file_size >= RAW_BYTES_MIN,
                _ => true,
            };
            is_disk.then(|| UnprotectedDisk {
                path: mount.dir().join(&path),
                size: info.file_size,
                format: info.format.name().to_owned(),
            })
        })
        .collect()
}

fn level_of(level: Level) -> Health {
    match level {
        Level::Normal => Health::Normal,
        Level::Warning => Health::Warning,
        Level::Critical => Health::Critical,
    }
}

fn words(health: &health::Health) -> Vec<String> {
    health.reasons.iter().map(|r| format!("{}; {}", r.what, r.remedy)).collect()
}

/// The state in the words of the design, section 8.
fn state_of(
    record: &VmRecord,
    status: Option<&ShipStatus>,
    disks: &[DiskStatus],
    in_trouble: bool,
) -> VmState {
    let is_broken = |s: &ShipStatus| s.failure.as_ref().is_some_and(|f| f.kind == ErrorKind::ChainBroken);
    let is_whole = |f: &DiskFigures| f.whole_because.is_some();
    match status {
        _ if in_trouble => VmState::Error,
        None => VmState::ReadyForInitialReplication,
        Some(s) if s.state == ShipState::Stopped => VmState::Error,
        Some(s) if s.paused || record.paused => VmState::Suspended,
        Some(s) if record.phase == Phase::Initial && s.state == ShipState::Starting => {
            VmState::ReadyForInitialReplication
        }
        Some(_) if record.phase == Phase::Initial => VmState::InitialReplicationInProgress,
        Some(s) if is_broken(s) || disks.iter().any(|d| is_whole(&d.figures)) => {
            VmState::ResynchronizationRequired
        }
        Some(_) => VmState::Replicating,
    }
}

fn delay_of(latency: &LatencyFigures) -> TrackingDelay {
    TrackingDelay {
        writes: latency.count(),
        median_ns: latency.percentile(50),
        p99_ns: latency.percentile(99),
        max_ns: latency.max_ns,
    }
}

fn transfer(status: &ShipStatus) -> Option<Transfer> {
    let progress = status.progress?;
    let what = match status.state {
        ShipState::LivePass => "live pass",
        ShipState::Shipping => "epoch",
        ShipState::Committing => "commit",
        _ => "transfer",
    };
    Some(Transfer {
        what: what.to_owned(),
        done_bytes: progress.done_bytes,
        total_bytes: progress.total_bytes,
    })
}
