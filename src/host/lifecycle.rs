//! A VM from its record to running and back: tracker, write path, shipper.

use std::sync::{Arc, Weak};

use super::api::types::Severity;
use super::engine::Engine;
use super::membership::{enter, is_gone};
use super::records::{DiskRecord, Phase};
use super::vm::{Running, Vm};
use crate::base::shell::shell;
use crate::base::{Error, ErrorKind, Result, Timestamp, VmId};
use crate::core::health::{Failure, GIVE_UPS_ALERT};
use crate::core::ports::points::PointStore;
use crate::core::ports::vault::Vault;
use crate::format::manifest::DefinitionFile;
use crate::machine::definition::{DefinedDisk, Definition, Virsh};
use crate::machine::image::ImageFormat;
use crate::ship::{Delivered, ShipHooks, ShipObserver, Shipper, ShipperConfig};

/// Fencing identity until roles change.
const GENERATION: u64 = 1;

/// What the shipper of a VM asks of the host and tells it.
struct Hooks {
    engine: Weak<Engine>,
    vm: Weak<Vm>,
}

impl ShipHooks for Hooks {
    fn before_cut(&self) -> Result<()> {
        match (self.engine.upgrade(), self.vm.upgrade()) {
            (Some(engine), Some(vm)) => engine.before_cut(&vm),
            _ => Ok(()),
        }
    }

    fn definition(&self) -> Vec<DefinitionFile> {
        let Some(vm) = self.vm.upgrade() else { return Vec::new() };
        let record = vm.record();
        let disks = record.disks.iter().map(|d| DefinedDisk { path: d.path.clone(), format: d.format });
        let own = Definition { name: record.name.clone(), command: None, disks: disks.collect() };
        let own = own.file().map_err(|e| log::warn!("{}: {e}", record.name)).ok();
        own.into_iter().chain(vm.domain()).collect()
    }
}

impl Hooks {
    fn tell(&self, severity: Severity, kind: &str, text: &str) {
        if let (Some(engine), Some(vm)) = (self.engine.upgrade(), self.vm.upgrade()) {
            engine.events.add(severity, Some(vm.name().as_str()), kind, text);
        }
    }
}

impl ShipObserver for Hooks {
    fn epoch_committed(&self, _vm: VmId, delivered: &Delivered) {
        log::debug!("point {} is durable", delivered.point);
    }

    fn failed(&self, _vm: VmId, failure: &Failure, is_final: bool) {
        let severity = if is_final { Severity::Critical } else { Severity::Warning };
        let next = failure.hint.as_ref().map(|h| format!(" ({h})")).unwrap_or_default();
        let what = if is_final { "replication has stopped" } else { "delivery failed and is tried again" };
        self.tell(severity, "delivery-failed", &format!("{what}: {}{next}", failure.sentence()));
    }

    fn recovered(&self, _vm: VmId) {
        self.tell(Severity::Info, "delivery-recovered", "delivery works again");
    }

    fn gave_up(&self, _vm: VmId, in_a_row: u32, preserved_bytes: u64) {
        if in_a_row == GIVE_UPS_ALERT {
            let text = format!(
                "{in_a_row} cuts in a row were given up; preserved data would need more than \
                 {preserved_bytes} bytes"
            );
            self.tell(Severity::Warning, "cuts-given-up", &text);
        }
    }

    fn ships_whole(&self, _vm: VmId, because: &str) {
        // The first copy is no trouble.
        let is_first = self.vm.upgrade().is_some_and(|vm| vm.record().phase == Phase::Initial);
        let severity = if is_first { Severity::Info } else { Severity::Warning };
        self.tell(severity, "ships-whole", &format!("every disk is sent whole: {because}"));
    }
}

impl Engine {
    /// Opens a VM after a start or a mount, if it is not open: the recovery table decides what its
    /// maps are worth. Its disks are in the write path when this returns. A disk whose mount
    /// serves already may have been written to while nobody tracked it.
    pub(super) fn open_vm(&self, vm: &Arc<Vm>) -> Result<()> {
        let _one = vm.lock_membership();
        if vm.running().is_some() {
            return Ok(());
        }
        let record = vm.record();
        let mut specs = Vec::new();
        let mut places = Vec::new();
        for disk in &record.disks {
            let mount = self.mounts.get(&disk.mount).ok_or_else(|| not_mounted(vm, disk))?;
            let is_raw = disk.format == ImageFormat::Raw;
            match self.candidate(mount, &disk.path, is_raw) {
                Ok(candidate) => {
                    let mut entering = enter(disk.id, &candidate)?;
                    entering.spec.changed_beneath = entering.mount.is_serving();
                    specs.push(entering.spec);
                    places.push((disk.id, entering.mount, entering.key));
                }
                Err(e) if is_gone(&e) => self.went_while_away(vm, disk),
                Err(e) => return Err(e),
            }
        }
        let tracker = self.tracker.open_vm(vm.id, specs, false)?;
        for found in tracker.recovered() {
            log::info!("{}: disk {}: {} ({})", vm.name(), found.id, found.label, found.reason);
        }
        for (id, mount, key) in places {
            if let Some(disk) = tracker.disk(id)
                && let Err(e) = mount.attach(key, disk)
            {
                self.detach_all(vm);
                return Err(e);
            }
        }
        vm.set_running(Some(Running { tracker, shipper: None }));
        vm.set_trouble(None);
        Ok(())
    }

    fn went_while_away(&self, vm: &Vm, disk: &DiskRecord) {
        vm.follow(&self.state, |r| r.disks.retain(|d| d.id != disk.id));
        let text = format!(
            "disk {} is gone: it was removed or renamed while the daemon did not run; older points have it",
            disk.view_path().display()
        );
        self.events.add(Severity::Warning, Some(vm.name().as_str()), "disk-left", &text);
    }

    /// Opens a VM, or remembers why it cannot be.
    pub(super) fn open_vm_logged(&self, vm: &Arc<Vm>) {
        match vm.record().phase {
            Phase::Initial | Phase::Protected => {}
            Phase::Ending => return self.end_logged(vm),
            Phase::Ended => return,
        }
        if let Err(e) = self.open_vm(vm) {
            let text = format!("the VM cannot be started, its writes are not tracked: {e}");
            self.events.add(Severity::Critical, Some(vm.name().as_str()), "vm-not-started", &text);
            self.detach_all(vm);
            vm.set_trouble(Some(e));
        }
    }

    /// Starts the shipper of a VM that is tracked.
    pub(super) fn start_shipper(&self, vm: &Arc<Vm>) -> Result<()> {
        let Some(running) = vm.running() else { return Ok(()) };
        if running.shipper.is_some() {
            return Ok(());
        }
        self.apply_settings(vm);
        let record = vm.record();
        let config = ShipperConfig {
            vm: vm.id,
            name: record.name.clone(),
            interval: vm.interval(&self.policies),
            paused: record.paused,
            record_path: self.state.vms().join(format!("{}.ship", vm.id)),
            generation: GENERATION,
        };
        let hooks = Arc::new(Hooks { engine: self.me.clone(), vm: Arc::downgrade(vm) });
        let shipper = Shipper::start(
            config,
            running.tracker.clone(),
            vm.target.clone(),
            self.clock.clone(),
            hooks.clone(),
            hooks,
        )?;
        vm.set_running(Some(Running { shipper: Some(Arc::new(shipper)), ..running }));
        Ok(())
    }

    /// Tells the vault name and keep rules; what cannot be told now is told at the next start.
    fn apply_settings(&self, vm: &Vm) {
        let record = vm.record();
        let told = vm
            .target
            .register(vm.id, &record.name)
            .and_then(|()| self.policies.get(&record.policy))
            .and_then(|policy| vm.target.set_retention(vm.id, policy.keep));
        if let Err(e) = told {
            log::warn!("{}: the vault cannot be told its settings: {e}", record.name);
        }
    }

    /// Starts the shipper, or remembers why it cannot be.
    pub(super) fn start_shipper_logged(&self, vm: &Arc<Vm>) {
        if let Err(e) = self.start_shipper(vm) {
            let text = format!("nothing is sent: {e}");
            self.events.add(Severity::Critical, Some(vm.name().as_str()), "vm-not-started", &text);
            vm.set_trouble(Some(e));
        }
    }

    /// Takes every disk of the VM out of the write path. Returns when no tracked write is left.
    pub(super) fn detach_all(&self, vm: &Vm) {
        for disk in vm.record().disks {
            if let Some(mount) = self.mounts.get(&disk.mount) {
                mount.detach(disk.id);
            }
        }
    }

    /// Ends protection of what runs: nothing is shipped, tracked or left beside the disks.
    pub(super) fn let_go(&self, vm: &Vm) {
        let Some(running) = vm.take_running() else { return };
        if let Some(shipper) = running.shipper {
            shipper.stop();
        }
        let _one = vm.lock_membership();
        self.detach_all(vm);
        if let Err(e) = running.tracker.forget() {
            let text = format!("change-tracking logs cannot be removed: {e}");
            self.events.add(Severity::Warning, Some(vm.name().as_str()), "logs-left", &text);
        }
        let _ = std::fs::remove_file(self.state.vms().join(format!("{}.ship", vm.id)));
    }

    /// Stops what runs so that it can go on later: a record is left that the next start trusts
    /// if no file changes meanwhile.
    pub(super) fn suspend_vm(&self, vm: &Vm, why: &Error) {
        let Some(running) = vm.take_running() else { return };
        if let Some(shipper) = running.shipper {
            shipper.stop();
        }
        let _one = vm.lock_membership();
        self.detach_all(vm);
        if let Err(e) = running.tracker.stop_clean() {
            log::warn!("{}: cannot be stopped cleanly, its disks will be compared: {e}", vm.name());
        }
        let text = why.to_string();
        vm.set_trouble(Some(Error::new(why.kind(), text).hint(why.next_step().unwrap_or_default())));
    }

    /// Completes an unprotect that was killed half way.
    fn end_logged(&self, vm: &Arc<Vm>) {
        match self.open_vm(vm) {
            Ok(()) => self.let_go(vm),
            Err(e) => log::warn!("{}: logs beside its disks cannot be removed: {e}", vm.name()),
        }
        vm.follow(&self.state, |r| r.phase = Phase::Ended);
    }

    /// Asks again what defines the VM: libvirt's XML if a domain uses its disks, and what we know.
    /// Takes seconds if libvirt does not answer.
    pub(super) fn refresh_definition(&self, vm: &Vm) {
        let paths: Vec<_> = vm.record().disks.iter().map(DiskRecord::view_path).collect();
        vm.set_domain(Virsh::default().domain_of(&paths).map(|d| d.file()));
    }

    /// The wall clock.
    pub(super) fn now(&self) -> Timestamp {
        self.clock.now()
    }
}

/// The mount of a disk is not there.
fn not_mounted(vm: &Vm, disk: &DiskRecord) -> Error {
    Error::new(ErrorKind::DiskMissing, format!("VM {} cannot run", vm.name()))
        .why(format!("{} is not mounted", disk.mount.display()))
        .hint(format!("afterimage mount {}", shell(&disk.mount)))
}
