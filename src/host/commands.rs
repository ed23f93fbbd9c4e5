//! The calls of the API, answered by the engine. What is more than a line is with its noun.

use std::time::Duration;

use super::api::commands::Commands;
use super::api::types::*;
use super::engine::{Engine, no_vm};
use super::policies::{check_interval, policy};
use super::records::Phase;
use super::vm::Vm;
use crate::base::shell::shell;
use crate::base::{Error, ErrorKind, Result, VmId};
use crate::core::ports::points::PointStore;
use crate::core::ports::vault::Vault;
use crate::ship;

/// `sync --wait` waits so long when nothing else is said.
const SYNC_PATIENCE: Duration = Duration::from_secs(600);
/// A cancelled job gets so long to end before its VM is let go.
const CANCEL_PATIENCE: Duration = Duration::from_secs(30);

fn done(message: impl Into<String>) -> Result<Done> {
    Ok(Done { message: message.into(), warnings: Vec::new() })
}

impl Commands for Engine {
    fn hello(&self, _: HelloRequest) -> Result<DaemonStatus> {
        Ok(self.daemon_status())
    }

    fn status(&self, request: StatusRequest) -> Result<StatusReport> {
        self.status_command(&request)
    }

    fn mount(&self, request: MountRequest) -> Result<MountReply> {
        self.mount_command(&request)
    }

    fn umount(&self, request: UmountRequest) -> Result<Done> {
        self.umount_command(&request)
    }

    fn mounts(&self, _: MountsRequest) -> Result<MountsReply> {
        Ok(MountsReply { schema: "afterimage.mounts/1".to_owned(), mounts: self.mount_statuses() })
    }

    fn protect(&self, request: ProtectRequest) -> Result<JobStarted> {
        self.protect_command(request)
    }

    fn unprotect(&self, request: UnprotectRequest) -> Result<Done> {
        self.unprotect_command(&request)
    }

    fn set(&self, request: SetRequest) -> Result<Done> {
        self.set_command(&request)
    }

    fn policy_list(&self, _: PolicyListRequest) -> Result<PoliciesReply> {
        let in_use: Vec<String> = self.vms().iter().map(|v| v.record().policy).collect();
        let mut policies = self.policies.list();
        for policy in &mut policies {
            policy.vms = in_use.iter().filter(|name| **name == policy.name).count() as u64;
        }
        policies.sort_by_key(|p| !p.preset);
        Ok(PoliciesReply { schema: "afterimage.policies/1".to_owned(), policies })
    }

    fn policy_set(&self, request: PolicySetRequest) -> Result<Policy> {
        self.policy_command(request)
    }

    fn pause(&self, request: PauseRequest) -> Result<Done> {
        let vm = self.protected_vm(&request.vm)?;
        vm.change(&self.state, |r| r.paused = true)?;
        vm.expect_shipper()?.pause()?;
        self.events.add(Severity::Warning, Some(vm.name().as_str()), "paused", "replication is paused");
        done(format!("replication of {} is paused; changes are tracked", vm.name()))
    }

    fn resume(&self, request: ResumeRequest) -> Result<Done> {
        let vm = self.protected_vm(&request.vm)?;
        vm.change(&self.state, |r| r.paused = false)?;
        if vm.running().is_none() {
            self.open_vm(&vm)?;
        }
        self.start_shipper(&vm)?;
        vm.set_trouble(None);
        vm.expect_shipper()?.resume()?;
        self.events.add(Severity::Info, Some(vm.name().as_str()), "resumed", "replication goes on");
        done(format!("replication of {} goes on", vm.name()))
    }

    fn sync(&self, request: SyncRequest) -> Result<SyncReply> {
        self.sync_command(&request)
    }

    fn points(&self, request: PointsRequest) -> Result<PointsReply> {
        self.points_command(&request)
    }

    fn point_pin(&self, request: PointPinRequest) -> Result<PointView> {
        self.point_pin_command(&request)
    }

    fn point_delete(&self, request: PointDeleteRequest) -> Result<PointView> {
        self.point_delete_command(&request)
    }

    fn point_mount(&self, request: PointMountRequest) -> Result<Done> {
        self.point_mount_command(&request)
    }

    fn point_umount(&self, request: PointUmountRequest) -> Result<Done> {
        self.point_umount_command(&request)
    }

    fn point_clone(&self, request: PointCloneRequest) -> Result<PointCloneReply> {
        self.point_clone_command(&request)
    }

    fn restore(&self, request: RestoreRequest) -> Result<JobStarted> {
        self.restore_command(request)
    }

    fn jobs(&self, request: JobsRequest) -> Result<JobsReply> {
        let limit = if request.limit == 0 { 100 } else { request.limit as usize };
        Ok(JobsReply { schema: "afterimage.jobs/1".to_owned(), jobs: self.jobs.list(limit)? })
    }

    fn job_show(&self, request: JobShowRequest) -> Result<JobView> {
        self.jobs.get(request.job)
    }

    fn job_log(&self, request: JobLogRequest) -> Result<JobLogReply> {
        let lines = self.jobs.lines(request.job)?;
        Ok(JobLogReply { schema: "afterimage.job-log/1".to_owned(), lines })
    }

    fn job_cancel(&self, request: JobCancelRequest) -> Result<JobView> {
        self.jobs.cancel(request.job)?;
        self.jobs.get(request.job)
    }

    fn events(&self, request: EventsRequest) -> Result<EventsReply> {
        let limit = if request.limit == 0 { 200 } else { request.limit as usize };
        let events = self.events.list(request.vm.as_deref(), request.after.unwrap_or(0), limit)?;
        Ok(EventsReply { schema: "afterimage.events/1".to_owned(), events })
    }

    fn flush(&self, request: FlushRequest) -> Result<Done> {
        let vms = match &request.vm {
            Some(name) => vec![self.protected_vm(name)?],
            None => self.vms(),
        };
        for running in vms.iter().filter_map(|vm| vm.running()) {
            running.tracker.flush()?;
        }
        done("marks are written to the change-tracking logs")
    }

    fn stop(&self, _: StopRequest) -> Result<Done> {
        self.request_stop();
        done("the daemon is stopping")
    }
}

impl Engine {
    fn sync_command(&self, request: &SyncRequest) -> Result<SyncReply> {
        let vm = self.protected_vm(&request.vm)?;
        let shipper = vm.expect_shipper()?;
        if !request.wait {
            shipper.kick()?;
            return Ok(SyncReply { point: None, current_as_of: None });
        }
        let patience = request.timeout_ms.map_or(SYNC_PATIENCE, Duration::from_millis);
        let deadline = self.clock.monotonic() + patience;
        let current_as_of = match shipper.sync(patience)? {
            ship::SyncReply::Durable(delivered) => delivered.cut_time,
            ship::SyncReply::NoChanges { current_as_of } => current_as_of,
        };
        let left = deadline.saturating_sub(self.clock.monotonic());
        if !vm.target.wait_applied(vm.id, left)? {
            return Err(Error::new(ErrorKind::Busy, "the cut is durable and not applied in the vault yet")
                .why(format!("it took longer than {} ms; it goes on", patience.as_millis()))
                .hint(format!("afterimage status {}", vm.name())));
        }
        let newest = vm.target.points(vm.id)?;
        Ok(SyncReply { point: newest.last().map(PointView::from), current_as_of: Some(current_as_of) })
    }

    fn policy_command(&self, request: PolicySetRequest) -> Result<Policy> {
        let known = self.policies.get(&request.name).ok();
        let mut wanted = known.unwrap_or_else(|| policy(&request.name, Duration::from_secs(30)));
        wanted.interval_ms = request.interval_ms.unwrap_or(wanted.interval_ms);
        wanted.keep.all_seconds = request.keep_all_seconds.unwrap_or(wanted.keep.all_seconds);
        wanted.keep.hourly = request.keep_hourly.unwrap_or(wanted.keep.hourly);
        wanted.keep.daily = request.keep_daily.unwrap_or(wanted.keep.daily);
        wanted.rpo_alert_ms = request.rpo_alert_ms.unwrap_or(wanted.rpo_alert_ms);
        self.policies.set(wanted.clone())?;
        for vm in self.vms().iter().filter(|v| v.record().policy == wanted.name) {
            self.apply_policy(vm);
            wanted.vms += 1;
        }
        Ok(wanted)
    }

    /// Interval and keep rules of a VM, as they are now.
    fn apply_policy(&self, vm: &Vm) {
        let interval = vm.interval(&self.policies);
        let told = self
            .policies
            .get(&vm.record().policy)
            .and_then(|policy| vm.target.set_retention(vm.id, policy.keep))
            .and_then(|()| match vm.running().and_then(|r| r.shipper) {
                Some(shipper) => shipper.set_interval(interval),
                None => Ok(()),
            });
        if let Err(e) = told {
            log::warn!("{}: the policy takes effect at the next start: {e}", vm.name());
        }
    }

    fn set_command(&self, request: &SetRequest) -> Result<Done> {
        let vm = self.protected_vm(&request.vm)?;
        let _planning = self.plan();
        if let Some(ms) = request.interval_ms.filter(|ms| *ms != 0) {
            check_interval(ms)?;
        }
        if let Some(name) = &request.policy {
            self.policies.get(name)?;
        }
        if let Some(name) = request.name.as_ref().filter(|n| **n != vm.name()) {
            let in_vault = vm.target.vms()?.iter().any(|v| v.name == *name && v.id != vm.id);
            if in_vault || self.vms().iter().any(|v| v.name() == *name && v.id != vm.id) {
                return Err(Error::new(ErrorKind::Exists, format!("the name {name} is taken"))
                    .hint("choose another name: afterimage status"));
            }
        }
        if let Some(exclude) = &request.exclude {
            let rule = vm.record().folder.ok_or_else(|| {
                Error::new(ErrorKind::Usage, format!("{} follows no folder", vm.name()))
                    .why("patterns are for VMs that were protected with --dir")
            })?;
            super::folder::FolderFilter::new(&super::records::FolderRule {
                exclude: exclude.clone(),
                ..rule
            })?;
        }
        vm.change(&self.state, |r| {
            r.name = request.name.clone().unwrap_or_else(|| r.name.clone());
            r.policy = request.policy.clone().unwrap_or_else(|| r.policy.clone());
            if let Some(ms) = request.interval_ms {
                r.interval_ms = Some(ms).filter(|ms| *ms != 0);
            }
            if let (Some(folder), Some(exclude)) = (&mut r.folder, &request.exclude) {
                folder.exclude = exclude.clone();
            }
        })?;
        self.apply_policy(&vm);
        if let Some(name) = &request.name {
            vm.target.register(vm.id, name)?;
            if let Some(shipper) = vm.running().and_then(|r| r.shipper) {
                shipper.set_name(name.clone())?;
            }
        }
        self.note_followed_folders();
        done(format!("{} is set", vm.name()))
    }

    fn unprotect_command(&self, request: &UnprotectRequest) -> Result<Done> {
        let Ok(vm) = self.vm(&request.vm) else {
            return match request.purge {
                true => self.purge_stored(&request.vm),
                false => Err(no_vm(&request.vm)),
            };
        };
        let name = vm.name();
        if !vm.record().is_protected() && !request.purge {
            return Err(Error::new(ErrorKind::NotFound, format!("VM {name} is not protected any more"))
                .why("its points are kept")
                .hint(format!("to remove them: afterimage unprotect {name} --purge")));
        }
        self.jobs.cancel_all_of(name.as_str(), CANCEL_PATIENCE);
        let _planning = self.plan();
        if vm.record().is_protected() {
            vm.change(&self.state, |r| {
                r.phase = Phase::Ending;
                r.job = None;
            })?;
            self.let_go(&vm);
            vm.change(&self.state, |r| r.phase = Phase::Ended)?;
            self.caches.forget();
            self.events.add(Severity::Info, Some(name.as_str()), "unprotected", "protection has ended");
        }
        if request.purge {
            return self.purge(&vm);
        }
        let points = vm.target.points(vm.id).map_or(0, |p| p.len());
        if points == 0 && vm.target.purge(vm.id).is_ok() {
            self.forget_vm(&vm);
        }
        let kept = match points {
            1 => "1 point is kept".to_owned(),
            n => format!("{n} points are kept"),
        };
        done(format!("{name} is not protected any more; {kept}"))
    }

    fn purge(&self, vm: &Vm) -> Result<Done> {
        let name = vm.name();
        self.verify_not_cloned(vm.id)?;
        self.views.release_idle();
        vm.target.purge(vm.id)?;
        self.forget_vm(vm);
        self.events.add(Severity::Warning, Some(name.as_str()), "purged", "all points were removed");
        done(format!("{name} and all its points are removed"))
    }

    fn verify_not_cloned(&self, vm: VmId) -> Result<()> {
        match self.views.clones_of(vm).first() {
            None => Ok(()),
            Some(dir) => Err(Error::new(ErrorKind::Refused, "its points cannot be removed")
                .why(format!("a clone of one is in {}", dir.display()))
                .hint(format!("afterimage point umount {}", shell(dir)))),
        }
    }

    /// Removes the points of a VM that only a vault knows.
    fn purge_stored(&self, name: &str) -> Result<Done> {
        let kept = self.kept(name)?;
        self.verify_not_cloned(kept.id)?;
        self.views.release_idle();
        kept.target.purge(kept.id)?;
        self.events.add(Severity::Warning, Some(kept.name.as_str()), "purged", "all points were removed");
        done(format!("all points of {} are removed", kept.name))
    }
}
