//! Points: list, pin, delete, and the jobs and mounts that open them.
//!
//! A VM is found by name or UUID among those of this host first, then in every vault: points
//! outlive protection, and the state folder.

use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::api::types::*;
use super::engine::{Engine, no_vm};
use super::jobs::Job;
use super::protect::stopping;
use super::targets::Target;
use crate::base::{Error, ErrorKind, PointId, Result, VmId, VmName};
use crate::core::ports::points::{PointInfo, PointStore};
use crate::format::manifest::Consistency;
use crate::view::{self, Backing, RestorePhase};

/// Where the points of a VM are.
pub struct Kept {
    /// The VM.
    pub id: VmId,
    /// Its name.
    pub name: VmName,
    /// The vault.
    pub target: Arc<Target>,
}

impl Engine {
    /// The points of the VM with this name or UUID.
    pub(super) fn kept(&self, name: &str) -> Result<Kept> {
        if let Ok(vm) = self.vm(name) {
            return Ok(Kept { id: vm.id, name: vm.name(), target: vm.target.clone() });
        }
        let id: Option<VmId> = name.parse().ok();
        for target in self.targets.all() {
            if !target.exists() {
                continue;
            }
            let stored = match target.vms() {
                Ok(stored) => stored,
                Err(e) => {
                    log::warn!("vault {} cannot be looked at: {e}", target.name);
                    continue;
                }
            };
            if let Some(vm) = stored.into_iter().find(|v| v.name.as_str() == name || Some(v.id) == id) {
                return Ok(Kept { id: vm.id, name: vm.name, target });
            }
        }
        Err(no_vm(name))
    }

    /// The point that is meant.
    pub(super) fn point(&self, kept: &Kept, spec: PointSpec) -> Result<PointInfo> {
        let points = kept.target.points(kept.id)?;
        choose(points, spec).ok_or_else(|| {
            let what = match spec {
                PointSpec::Latest => format!("VM {} has no point yet", kept.name),
                PointSpec::LatestApp => format!("VM {} has no app-consistent point", kept.name),
                PointSpec::Id(id) => format!("VM {} has no point {id}", kept.name),
                PointSpec::At(time) => format!("VM {} has no point of {time} or before", kept.name),
            };
            Error::new(ErrorKind::NotFound, what).hint(format!("afterimage points {}", kept.name))
        })
    }

    pub(super) fn points_command(&self, request: &PointsRequest) -> Result<PointsReply> {
        let kept = self.kept(&request.vm)?;
        let points = kept.target.points(kept.id)?;
        Ok(PointsReply {
            schema: POINTS_SCHEMA.to_owned(),
            vm: kept.name,
            points: points.iter().map(PointView::from).collect(),
        })
    }

    pub(super) fn point_pin_command(&self, request: &PointPinRequest) -> Result<PointView> {
        let kept = self.kept(&request.vm)?;
        let point = self.point(&kept, request.point)?;
        kept.target.set_pinned(kept.id, point.id, request.pinned)?;
        Ok(PointView { pinned: request.pinned, ..PointView::from(&point) })
    }

    pub(super) fn point_delete_command(&self, request: &PointDeleteRequest) -> Result<PointView> {
        let kept = self.kept(&request.vm)?;
        let point = self.point(&kept, request.point)?;
        self.views.release_idle();
        kept.target.delete(kept.id, point.id)?;
        let text = format!("point {} was deleted", point.id);
        self.events.add(Severity::Info, Some(kept.name.as_str()), "point-deleted", &text);
        Ok(PointView::from(&point))
    }

    /// Starts the job that copies a point into a folder. What is wrong with the request is told
    /// at once.
    pub(super) fn restore_command(&self, request: RestoreRequest) -> Result<JobStarted> {
        let kept = self.kept(&request.vm)?;
        let point = self.point(&kept, request.point)?;
        let engine = self.me.upgrade().ok_or_else(stopping)?;
        let job = self.jobs.begin("restore", Some(kept.name.as_str()), &["plan", "copy", "finish"])?;
        let id = job.id();
        engine.spawn(&format!("job:{id}"), move |engine| {
            let result = engine.restore(&job, &kept, point.id, &request);
            job.finish(&result);
        })?;
        Ok(JobStarted { job: id })
    }

    fn restore(&self, job: &Job, kept: &Kept, point: PointId, request: &RestoreRequest) -> Result<()> {
        let reader = PointStore::open(&*kept.target, kept.id, point)?;
        job.step("plan");
        let phase = Mutex::new(RestorePhase::Plan);
        let report = view::restore(&*reader, &request.to, request.force, &|progress| {
            let mut phase = phase.lock().unwrap_or_else(PoisonError::into_inner);
            if *phase != progress.phase {
                *phase = progress.phase;
                job.step(step_of(progress.phase));
            }
            job.progress(progress.done_bytes, progress.total_bytes);
            match job.is_cancelled() || self.is_stopping() {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        })?;
        let mut missing = Vec::new();
        for file in &report.files {
            job.log(format!("{}: {} bytes, {} of data", file.path.display(), file.bytes, file.data_bytes));
            match &file.backing {
                Some(Backing::Missing { name, why }) => {
                    missing.push(format!("{}: backing file {name:?}: {why}", file.path.display()));
                }
                Some(Backing::Rewritten { from, to }) => {
                    job.log(format!("{}: backing file {from:?} is now {to:?}", file.path.display()));
                }
                Some(Backing::Kept { .. }) | None => {}
            }
        }
        let text = format!("point {point} was restored to {}", request.to.display());
        if missing.is_empty() {
            self.events.add(Severity::Info, Some(kept.name.as_str()), "restored", &text);
            job.result(text);
            return Ok(());
        }
        missing.iter().for_each(|line| job.log(line.clone()));
        let missing = missing.join("; ");
        let text = format!("{text}, but not every image finds its backing file: {missing}");
        self.events.add(Severity::Warning, Some(kept.name.as_str()), "restored", &text);
        job.result(text);
        let what = format!("point {point} was restored to {}, but not all of it works", request.to.display());
        Err(Error::new(ErrorKind::Partial, what)
            .why(missing)
            .hint("put the backing file there, or name another: qemu-img rebase -u -b FILE IMAGE"))
    }

    /// Applies the keep rules, again and again. Nothing expires by itself faster than this.
    pub(super) fn retention_loop(self: &Arc<Self>) {
        while !self.pause_or_stop(RETENTION_EVERY) {
            for vm in self.vms() {
                if !vm.record().is_protected() {
                    continue;
                }
                match vm.target.expire(vm.id) {
                    Ok(gone) if gone.is_empty() => {}
                    Ok(gone) => log::info!("{}: {} points expired", vm.name(), gone.len()),
                    Err(e) => log::warn!("{}: points cannot expire: {e}", vm.name()),
                }
            }
        }
    }
}

const fn step_of(phase: RestorePhase) -> &'static str {
    match phase {
        RestorePhase::Plan => "plan",
        RestorePhase::Copy => "copy",
        RestorePhase::Finish => "finish",
    }
}

/// Keep rules are applied so often.
const RETENTION_EVERY: Duration = Duration::from_secs(15);

/// The point among `points` (oldest first) that is meant.
fn choose(points: Vec<PointInfo>, spec: PointSpec) -> Option<PointInfo> {
    points.into_iter().rev().find(|p| match spec {
        PointSpec::Latest => true,
        PointSpec::LatestApp => p.consistency == Consistency::App,
        PointSpec::Id(id) => p.id == id,
        PointSpec::At(time) => p.time <= time,
    })
}
