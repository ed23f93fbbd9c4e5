//! `protect`, `unprotect`, `set`, `pause`, `resume`, `sync` and `policy`.

use std::process::ExitCode;
use std::time::Duration;

use super::args::{PolicyCommand, PolicySetArgs, ProtectArgs, SetArgs};
use super::follow::follow;
use super::mounts::{absolute, done};
use super::out::Out;
use super::reach::Reach;
use super::text::{duration, local};
use crate::base::{Error, ErrorKind, Result};
use crate::host::api::types::*;

/// Milliseconds of an option.
fn ms(d: Duration) -> u64 {
    u64::try_from(d.as_millis()).unwrap_or(u64::MAX)
}

/// `protect`.
pub fn protect(out: &Out, reach: &Reach, args: ProtectArgs) -> Result<ExitCode> {
    let request = ProtectRequest {
        name: args.name,
        disks: args.disk.iter().map(|d| absolute(d)).collect::<Result<_>>()?,
        dir: args.dir.as_deref().map(absolute).transpose()?,
        exclude: args.exclude,
        interval_ms: args.interval.map(ms),
        policy: args.policy,
        target: args.to,
    };
    let client = reach.needed()?;
    let started = client.call(&request)?;
    if args.no_wait {
        out.answer("afterimage.job-started/1", &started, || {
            format!("job {0} began; see it: afterimage job show {0}", started.job)
        })?;
        return Ok(ExitCode::SUCCESS);
    }
    follow(out, &client, started)
}

/// `unprotect`.
pub fn unprotect(out: &Out, reach: &Reach, vm: String, purge: bool) -> Result<()> {
    let client = reach.needed()?;
    if purge {
        // Asked first, so that nobody types a name for a VM that does not exist.
        let points = client.call(&PointsRequest { vm: vm.clone() });
        if let Err(e) = &points
            && e.kind() == ErrorKind::NotFound
        {
            return points.map(drop);
        }
        let n = points.map_or(0, |p| p.points.len());
        out.confirm(&format!("This removes {n} recovery points of {vm} for ever."), &vm)?;
    }
    let reply = client.call(&UnprotectRequest { vm: vm.clone(), purge })?;
    done(out, &reply, || {
        if purge {
            format!("{vm} is no longer protected, and its points are gone")
        } else {
            format!("{vm} is no longer protected; its points stay: afterimage points {vm}")
        }
    })
}

/// `set`.
pub fn set(out: &Out, reach: &Reach, args: SetArgs) -> Result<()> {
    let request = SetRequest {
        vm: args.name.clone(),
        name: args.rename,
        interval_ms: args.interval.map(ms),
        policy: args.policy,
        exclude: (!args.exclude.is_empty()).then_some(args.exclude),
    };
    let reply = reach.needed()?.call(&request)?;
    done(out, &reply, || format!("{} is changed", args.name))
}

/// `pause`.
pub fn pause(out: &Out, reach: &Reach, vm: String) -> Result<()> {
    let reply = reach.needed()?.call(&PauseRequest { vm: vm.clone() })?;
    done(out, &reply, || format!("{vm} ships no more; go on: afterimage resume {vm}"))
}

/// `resume`.
pub fn resume(out: &Out, reach: &Reach, vm: String) -> Result<()> {
    let reply = reach.needed()?.call(&ResumeRequest { vm: vm.clone() })?;
    done(out, &reply, || format!("{vm} ships again"))
}

/// `sync`.
pub fn sync(out: &Out, reach: &Reach, vm: String, wait: bool, timeout: Option<Duration>) -> Result<()> {
    let request = SyncRequest { vm: vm.clone(), wait, timeout_ms: timeout.map(ms) };
    let reply = reach.needed()?.call(&request)?;
    out.answer("afterimage.sync/1", &reply, || match &reply.point {
        Some(p) => format!("{vm} is durable in point {} of {}", p.id, local(p.time)),
        None => format!("{vm} is asked for a cut; wait for it: afterimage sync {vm} --wait"),
    })
}

/// `policy`.
pub fn policy(out: &Out, reach: &Reach, command: PolicyCommand) -> Result<()> {
    match command {
        PolicyCommand::List => {
            let reply = reach.running()?.call(&PolicyListRequest {})?;
            out.answer("afterimage.policies/1", &reply, || policies(out, &reply.policies))
        }
        PolicyCommand::Show { name } => {
            let reply = reach.running()?.call(&PolicyListRequest {})?;
            let found = reply.policies.into_iter().find(|p| p.name == name);
            let policy = found.ok_or_else(|| {
                Error::new(ErrorKind::NotFound, format!("there is no policy {name:?}"))
                    .why("no preset has that name and nobody made one")
                    .hint("afterimage policy list")
            })?;
            out.answer("afterimage.policy/1", &policy, || policies(out, std::slice::from_ref(&policy)))
        }
        PolicyCommand::Set(args) => {
            let policy = reach.needed()?.call(&policy_request(args))?;
            out.answer("afterimage.policy/1", &policy, || policies(out, std::slice::from_ref(&policy)))
        }
    }
}

fn policy_request(args: PolicySetArgs) -> PolicySetRequest {
    PolicySetRequest {
        name: args.name,
        interval_ms: args.interval.map(ms),
        keep_all_seconds: args.keep_all.map(|d| d.as_secs()),
        keep_hourly: args.keep_hourly,
        keep_daily: args.keep_daily,
        rpo_alert_ms: args.alert.map(ms),
    }
}

fn policies(out: &Out, policies: &[Policy]) -> String {
    let rows: Vec<Vec<String>> = policies
        .iter()
        .map(|p| {
            let alert = match p.rpo_alert_ms {
                0 => "3 intervals".to_owned(),
                ms => duration(Duration::from_millis(ms)),
            };
            vec![
                p.name.clone(),
                duration(Duration::from_millis(p.interval_ms)),
                format!("{}, {} hourly, {} daily", duration(p.keep.all()), p.keep.hourly, p.keep.daily),
                alert,
                p.vms.to_string(),
                if p.preset { "preset".to_owned() } else { String::new() },
            ]
        })
        .collect();
    out.table(&["POLICY", "EVERY", "KEEP", "ALERT AFTER", "VMS", ""], &rows)
}
