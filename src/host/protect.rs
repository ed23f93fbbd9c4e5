//! The job that enables protection: prerequisites, relationship, initial replication, finalize.
//!
//! Killed here:
//! - before the record of the VM is written: nothing was changed; the job ends as interrupted;
//! - after it: the next start opens the VM like any other (a disk that the tracker does not know
//!   ships whole), and the job goes on with the initial replication.
//!
//! Cancelled, or refused on the way: the disks are let go, the record and what the vault already
//! has are removed. Disk full: of the state folder, refused; of the vault, the job waits with the
//! shipper.

use std::sync::Arc;
use std::time::Duration;

use super::api::types::{JobStarted, ProtectRequest, Severity};
use super::engine::Engine;
use super::jobs::Job;
use super::membership::enter;
use super::policies::check_interval;
use super::prerequisites::Candidate;
use super::records::{DiskRecord, FolderRule, Phase, VmRecord};
use super::storage;
use super::targets::{EMBEDDED, Target};
use super::vm::{Running, Vm};
use crate::base::{Error, ErrorKind, Result, VmId};
use crate::core::ports::points::PointStore;
use crate::core::ports::vault::Vault;
use crate::ship::ShipState;

/// Names of the steps.
const PREREQUISITES: &str = "prerequisites";
const RELATIONSHIP: &str = "relationship";
const INITIAL: &str = "initial replication";
const FINALIZE: &str = "finalize";

/// The job looks at the shipper so often.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// The vault gets so long to apply the first point.
const APPLY_PATIENCE: Duration = Duration::from_secs(600);

/// What is to be protected, checked.
struct Plan {
    record: VmRecord,
    disks: Vec<Candidate>,
    target: Arc<Target>,
}

impl Engine {
    /// Starts the job that protects a VM.
    pub(super) fn protect_command(&self, request: ProtectRequest) -> Result<JobStarted> {
        let engine = self.me.upgrade().ok_or_else(stopping)?;
        let steps = [PREREQUISITES, RELATIONSHIP, INITIAL, FINALIZE];
        let job = self.jobs.begin("protect", Some(request.name.as_str()), &steps)?;
        let id = job.id();
        engine.spawn(&format!("job:{id}"), move |engine| {
            let result = engine.protect(&job, &request);
            engine.end_job(&job, result);
        })?;
        Ok(JobStarted { job: id })
    }

    /// Ends a job, or leaves it to the next daemon if this one stops.
    pub(super) fn end_job(&self, job: &Job, result: Result<()>) {
        match result {
            Err(e) if e.kind() == ErrorKind::Busy && self.is_stopping() => job.suspend(),
            result => job.finish(&result),
        }
    }

    fn protect(&self, job: &Job, request: &ProtectRequest) -> Result<()> {
        let vm = {
            let _planning = self.plan();
            job.step(PREREQUISITES);
            let plan = self.prerequisites(job, request)?;
            job.check_cancelled()?;
            job.step(RELATIONSHIP);
            self.relationship(job, plan)?
        };
        self.complete(job, &vm)
    }

    fn prerequisites(&self, job: &Job, request: &ProtectRequest) -> Result<Plan> {
        if let Some(ms) = request.interval_ms {
            check_interval(ms)?;
        }
        let policy = request.policy.clone().unwrap_or_else(|| self.default_policy());
        self.policies.get(&policy)?;
        let target = self.targets.get(request.target.as_deref().unwrap_or(EMBEDDED))?;
        let (disks, folder) = self.disks_of(job, request)?;
        for disk in &disks {
            job.log(format!(
                "disk {} ({}, {} bytes)",
                disk.view_path().display(),
                disk.info.format.name(),
                disk.info.file_size
            ));
        }
        for mount in self.mounts.all() {
            storage::verify_apart("the vault", &target.path, mount.dir())?;
        }
        target.prepare()?;
        let known = self.known_by_name(request, &disks, &target)?;
        let id = known.as_ref().map_or_else(VmId::random, |r| r.id);
        self.verify_disks(id, &disks, &target)?;
        let records = disks.iter().map(|d| {
            let new = d.record();
            let old = known.as_ref().and_then(|k| k.disk_at(&new.mount, &new.path));
            DiskRecord { id: old.map_or(new.id, |o| o.id), ..new }
        });
        let record = VmRecord {
            id,
            name: request.name.clone(),
            phase: Phase::Initial,
            disks: records.collect(),
            folder,
            policy,
            interval_ms: request.interval_ms,
            target: target.name.clone(),
            paused: false,
            job: Some(job.id()),
        };
        Ok(Plan { record, disks, target })
    }

    fn disks_of(&self, job: &Job, request: &ProtectRequest) -> Result<(Vec<Candidate>, Option<FolderRule>)> {
        let usage = |why: &str| {
            Err(Error::new(ErrorKind::Usage, format!("VM {} cannot be protected", request.name))
                .why(why)
                .hint(format!("afterimage protect {} --disk FILE", request.name)))
        };
        match (&request.dir, request.disks.is_empty()) {
            (None, true) => usage("no disk was named"),
            (Some(_), false) => usage("name disks or a folder, not both"),
            (None, false) => Ok((self.disks_of_paths(&request.disks)?, None)),
            (Some(dir), true) => {
                let (disks, rule, left_out) = self.disks_of_folder(dir, &request.exclude)?;
                for text in left_out {
                    self.events.add(Severity::Info, Some(request.name.as_str()), "disk-skipped", &text);
                    job.log(text);
                }
                Ok((disks, Some(rule)))
            }
        }
    }

    /// Whether the name is free. A VM whose protection has ended and whose points are kept goes
    /// on under its UUID if it has the same disks.
    fn known_by_name(
        &self,
        request: &ProtectRequest,
        disks: &[Candidate],
        target: &Target,
    ) -> Result<Option<VmRecord>> {
        let name = &request.name;
        let taken = |why: String, hint: String| {
            Err(Error::new(ErrorKind::Exists, format!("the name {name} is taken")).why(why).hint(hint))
        };
        let same_name = self.vms().into_iter().filter(|v| v.name() == *name);
        let mut kept = None;
        for vm in same_name {
            let record = vm.record();
            if record.is_protected() {
                return taken(
                    format!("VM {name} is protected already"),
                    format!("choose another name, or: afterimage status {name}"),
                );
            }
            let is_same = record.disks.len() == disks.len()
                && disks.iter().all(|d| record.disk_at(d.mount.dir(), &d.path).is_some());
            if !is_same || record.target != target.name {
                return taken(
                    "points of a VM of that name with other disks are kept".to_owned(),
                    format!("choose another name, or remove its points: afterimage unprotect --purge {name}"),
                );
            }
            kept = Some(record);
        }
        let stored = target.vms()?.into_iter().find(|v| v.name == *name);
        match (kept, stored) {
            (Some(record), _) => Ok(Some(record)),
            (None, None) => Ok(None),
            (None, Some(_)) => taken(
                format!("vault {} has points of another VM of that name", target.name),
                format!("choose another name, or remove its points: afterimage unprotect --purge {name}"),
            ),
        }
    }

    /// Record, tracker, filter, shipper: in this order, so that a kill in between leaves
    /// something that the next start completes.
    fn relationship(&self, job: &Job, plan: Plan) -> Result<Arc<Vm>> {
        let Plan { record, disks, target } = plan;
        target.register(record.id, &record.name)?;
        record.save(&self.state)?;
        let vm = Arc::new(Vm::new(record, target));
        self.insert_vm(&vm);
        let started = self.attach_new(&vm, &disks).and_then(|()| self.start_shipper(&vm));
        if let Err(e) = started {
            job.log("undoing what was begun");
            self.let_go(&vm);
            self.discard(&vm);
            return Err(e);
        }
        Ok(vm)
    }

    /// Opens the tracker with the disks and puts them into the write path. Returns when no write
    /// that is not tracked is under way.
    fn attach_new(&self, vm: &Vm, disks: &[Candidate]) -> Result<()> {
        let record = vm.record();
        let mut specs = Vec::new();
        let mut places = Vec::new();
        for disk in disks {
            let Some(known) = record.disk_at(disk.mount.dir(), &disk.path) else { continue };
            let entering = enter(known.id, disk)?;
            specs.push(entering.spec);
            places.push((known.id, entering.mount, entering.key));
        }
        let tracker = self.tracker.open_vm(vm.id, specs, true)?;
        vm.set_running(Some(Running { tracker: tracker.clone(), shipper: None }));
        for (id, mount, key) in places {
            if let Some(disk) = tracker.disk(id) {
                mount.attach(key, disk)?;
            }
        }
        self.refresh_definition(vm);
        Ok(())
    }

    /// Waits for the first point, from wherever the VM stands.
    pub(super) fn complete(&self, job: &Job, vm: &Arc<Vm>) -> Result<()> {
        job.step(INITIAL);
        match self.wait_for_first_epoch(job, vm) {
            Err(e) if e.kind() == ErrorKind::Cancelled && vm.record().phase == Phase::Initial => {
                job.log("undoing what was begun");
                let _planning = self.plan();
                self.let_go(vm);
                self.discard(vm);
                return Err(e);
            }
            result => result?,
        }
        job.step(FINALIZE);
        if !vm.target.wait_applied(vm.id, APPLY_PATIENCE)? {
            return Err(Error::new(ErrorKind::Busy, "the vault has not applied the first point yet")
                .hint(format!("afterimage status {}", vm.name())));
        }
        let first = vm.target.points(vm.id)?.last().map(|p| p.id);
        let policy = self.policies.get(&vm.record().policy)?;
        vm.target.set_retention(vm.id, policy.keep)?;
        vm.change(&self.state, |r| {
            r.phase = Phase::Protected;
            r.job = None;
        })?;
        let point = first.map(|p| p.to_string()).unwrap_or_default();
        job.result(format!("VM {} is protected; its first point is {point}", vm.name()));
        self.events.add(
            Severity::Info,
            Some(vm.name().as_str()),
            "protected",
            &format!("protection is on; the first point is {point}"),
        );
        Ok(())
    }

    fn wait_for_first_epoch(&self, job: &Job, vm: &Vm) -> Result<()> {
        let mut told = String::new();
        loop {
            job.check_cancelled()?;
            let status = vm.expect_shipper()?.status();
            if let Some(progress) = status.progress {
                job.progress(progress.done_bytes, progress.total_bytes);
            }
            if status.last_delivered.is_some() && !status.is_initial {
                return Ok(());
            }
            let failure = status.failure.as_ref();
            if status.state == ShipState::Stopped
                && let Some(failure) = failure
            {
                return Err(failure.to_error());
            }
            let note = failure.map(|f| format!("{}; it is tried again", f.sentence())).unwrap_or_default();
            if note != told {
                job.detail(note.clone());
                told = note;
            }
            if self.pause_or_stop(LOOK_EVERY) {
                return Err(stopping());
            }
        }
    }

    /// Jobs that the daemon before left: those of VMs whose first copy is not complete go on,
    /// the rest end.
    pub(super) fn resume_jobs(self: &Arc<Self>) {
        let left = self.jobs.unfinished().unwrap_or_else(|e| {
            log::warn!("jobs of the daemon before cannot be read: {e}");
            Vec::new()
        });
        let mut initial: Vec<_> =
            self.vms().into_iter().filter(|v| v.record().phase == Phase::Initial).collect();
        for record in left {
            let at = initial.iter().position(|v| v.record().job == Some(record.id));
            match at.map(|at| initial.swap_remove(at)) {
                Some(vm) => self.go_on(self.jobs.resume(record), vm),
                None => self.jobs.interrupt(record),
            }
        }
        for vm in initial {
            let steps = [PREREQUISITES, RELATIONSHIP, INITIAL, FINALIZE];
            match self.jobs.begin("protect", Some(vm.name().as_str()), &steps) {
                Ok(job) => {
                    vm.follow(&self.state, |r| r.job = Some(job.id()));
                    self.go_on(job, vm);
                }
                Err(e) => log::warn!("{}: {e}", vm.name()),
            }
        }
    }

    fn go_on(self: &Arc<Self>, job: Arc<Job>, vm: Arc<Vm>) {
        let spawned = self.spawn(&format!("job:{}", job.id()), move |engine| {
            let result = engine.complete(&job, &vm);
            engine.end_job(&job, result);
        });
        if let Err(e) = spawned {
            log::error!("a job cannot go on: {e}");
        }
    }

    /// Puts a VM into the table.
    pub(super) fn insert_vm(&self, vm: &Arc<Vm>) {
        let mut vms = self.vms.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        vms.insert(vm.id, vm.clone());
    }

    /// Removes a VM that has no point: record, and what the vault has of it.
    fn discard(&self, vm: &Vm) {
        let keeps_points = vm.target.points(vm.id).is_ok_and(|p| !p.is_empty());
        if keeps_points {
            vm.follow(&self.state, |r| {
                r.phase = Phase::Ended;
                r.job = None;
            });
            return;
        }
        if let Err(e) = vm.target.purge(vm.id) {
            log::warn!("{}: what was sent cannot be removed from the vault: {e}", vm.name());
        }
        self.forget_vm(vm);
    }

    /// Removes the record of a VM.
    pub(super) fn forget_vm(&self, vm: &Vm) {
        self.vms.write().unwrap_or_else(std::sync::PoisonError::into_inner).remove(&vm.id);
        if let Err(e) = VmRecord::remove(&self.state, vm.id) {
            log::warn!("{}: the record cannot be removed: {e}", vm.name());
        }
    }
}

/// The daemon stops before the work is done; it goes on at the next start.
pub(super) fn stopping() -> Error {
    Error::new(ErrorKind::Busy, "the daemon is stopping").hint("afterimage status")
}
