//! `points`, `point` and `restore`.

use std::path::Path;
use std::process::ExitCode;

use super::args::PointCommand;
use super::follow::follow;
use super::mounts::{absolute, done};
use super::out::Out;
use super::reach::Reach;
use super::text::{ago, bytes, local};
use super::when::{now, point_spec};
use crate::base::shell::shell;
use crate::base::{Clock, Result, SystemClock};
use crate::format::manifest::{Consistency, EpochKind};
use crate::host::api::types::*;

fn spec(text: &str) -> Result<PointSpec> {
    point_spec(text, &now())
}

/// `points`.
pub fn list(out: &Out, reach: &Reach, vm: String) -> Result<()> {
    let reply = reach.running()?.call(&PointsRequest { vm })?;
    out.answer(POINTS_SCHEMA, &reply, || {
        if reply.points.is_empty() {
            return format!("{} has no point yet (afterimage status {0})", reply.vm);
        }
        let now = SystemClock::default().now();
        let rows: Vec<Vec<String>> = reply
            .points
            .iter()
            .map(|p| {
                let kind = match p.kind {
                    EpochKind::Full => "full",
                    EpochKind::Delta => "delta",
                    EpochKind::Resync => "resync",
                };
                let consistency = match p.consistency {
                    Consistency::Crash => "crash",
                    Consistency::App => "app",
                };
                let pinned = if p.pinned { "pinned".to_owned() } else { String::new() };
                let age = ago(now, p.time);
                let (changed, size) = (bytes(p.changed_bytes), bytes(p.size_bytes));
                vec![
                    p.id.to_string(),
                    local(p.time),
                    age,
                    kind.into(),
                    consistency.into(),
                    changed,
                    size,
                    pinned,
                ]
            })
            .collect();
        out.table(&["POINT", "TIME", "AGE", "KIND", "CONSISTENT", "CHANGED", "SIZE", ""], &rows)
    })
}

/// `point`.
pub fn point(out: &Out, reach: &Reach, command: PointCommand) -> Result<()> {
    match command {
        PointCommand::Pin { name, point } => pin(out, reach, name, &point, true),
        PointCommand::Unpin { name, point } => pin(out, reach, name, &point, false),
        PointCommand::Delete { name, point } => {
            let request = PointDeleteRequest { vm: name, point: spec(&point)? };
            let reply = reach.needed()?.call(&request)?;
            out.answer("afterimage.point/1", &reply, || format!("point {} is gone", reply.id))
        }
        PointCommand::Mount { dir } => {
            let dir = absolute(&dir)?;
            let reply = reach.needed()?.call(&PointMountRequest { dir: dir.clone() })?;
            done(out, &reply, || {
                format!(
                    "points are at {0}/NAME/POINT; end it: afterimage point umount {1}",
                    dir.display(),
                    shell(&dir)
                )
            })
        }
        PointCommand::Umount { dir } => {
            let dir = absolute(&dir)?;
            let reply = reach.needed()?.call(&PointUmountRequest { dir: dir.clone() })?;
            done(out, &reply, || format!("{} is no longer mounted", dir.display()))
        }
        PointCommand::Clone { name, point, dir } => {
            let request = PointCloneRequest { vm: name, point: spec(&point.point)?, dir: absolute(&dir)? };
            let reply = reach.needed()?.call(&request)?;
            out.answer("afterimage.clone/1", &reply, || {
                format!(
                    "a writable clone of point {} is at {1}; drop it: afterimage point umount {2}",
                    reply.point.id,
                    reply.dir.display(),
                    shell(&reply.dir)
                )
            })
        }
    }
}

fn pin(out: &Out, reach: &Reach, vm: String, point: &str, pinned: bool) -> Result<()> {
    let request = PointPinRequest { vm, point: spec(point)?, pinned };
    let reply = reach.needed()?.call(&request)?;
    out.answer("afterimage.point/1", &reply, || {
        let state =
            if reply.pinned { "stays whatever the policy says" } else { "is kept as the policy says" };
        format!("point {} {state}", reply.id)
    })
}

/// `restore`.
pub fn restore(
    out: &Out,
    reach: &Reach,
    vm: String,
    point: &str,
    to: &Path,
    force: bool,
) -> Result<ExitCode> {
    let request = RestoreRequest { vm, point: spec(point)?, to: absolute(to)?, force };
    let client = reach.needed()?;
    let started = client.call(&request)?;
    follow(out, &client, started)
}
