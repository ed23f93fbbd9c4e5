//! `status`: daemon, mounts and VMs at a glance; one VM with its disks.
//!
//! The last line names the disks under mounts that nobody protects, so that nobody believes in a
//! copy that does not exist.

use std::time::Duration;

use super::mounts;
use super::out::{Out, plain};
use super::reach::Reach;
use super::text::{ago, brief, bytes, count, duration, local};
use crate::base::{Result, Timestamp};
use crate::host::api::types::*;

/// Unprotected disks that are named; the rest are counted.
const UNPROTECTED_NAMED_MAX: usize = 8;
/// Between two looks of `--watch`.
const WATCH_EVERY: Duration = Duration::from_secs(1);

/// `status`.
pub fn status(out: &Out, reach: &Reach, vm: Option<String>, watch: bool) -> Result<()> {
    let client = reach.running()?;
    let request = StatusRequest { vm };
    loop {
        let report = client.call(&request)?;
        if !watch {
            return out.answer(STATUS_SCHEMA, &report, || words(out, &report, request.vm.is_some()));
        }
        let text = words(out, &report, request.vm.is_some());
        // Home, the text with each line cleared to its end, then everything below cleared.
        let text = text.replace('\n', "\x1b[K\n");
        out.write(&if out.terminal { format!("\x1b[H{text}\x1b[J") } else { text + "\n" })?;
        std::thread::sleep(WATCH_EVERY);
    }
}

fn words(out: &Out, report: &StatusReport, one: bool) -> String {
    let mut text = String::new();
    if one {
        for vm in &report.vms {
            text += &vm_details(out, vm, report.time);
        }
        return text;
    }
    let d = &report.daemon;
    text += &format!(
        "afterimage {}, pid {}, up {}, state {}\n\n",
        d.version,
        d.pid,
        duration(Duration::from_secs(d.uptime_seconds)),
        d.state_dir.display()
    );
    text += &mounts::table(out, &report.mounts);
    text.push('\n');
    text += &vms(out, report);
    for target in &report.targets {
        text += &target_words(target);
    }
    for warning in &report.warnings {
        text += &format!("warning: {}\n", plain(warning));
    }
    text += &unprotected(&report.unprotected);
    text
}

fn vms(out: &Out, report: &StatusReport) -> String {
    if report.vms.is_empty() {
        return "nothing is protected (afterimage protect NAME --disk FILE)\n".to_owned();
    }
    let rows: Vec<Vec<String>> = report
        .vms
        .iter()
        .map(|vm| {
            let changed = vm.disks.iter().map(|d| d.figures.current).sum();
            vec![
                vm.name.to_string(),
                format!("{:?}", vm.state),
                health(vm.health).to_owned(),
                current(vm, report.time),
                vm.points.to_string(),
                bytes(changed),
                next(vm, report.time),
                vm.target.clone(),
            ]
        })
        .collect();
    let header = ["VM", "STATE", "HEALTH", "VAULT IS AS OF", "POINTS", "CHANGED", "NEXT CUT", "TARGET"];
    let mut text = out.table(&header, &rows);
    for vm in &report.vms {
        for reason in &vm.reasons {
            text += &format!("{}: {}: {}\n", vm.name, health(vm.health), plain(reason));
        }
    }
    text
}

const fn health(h: Health) -> &'static str {
    match h {
        Health::Normal => "Normal",
        Health::Warning => "Warning",
        Health::Critical => "CRITICAL",
    }
}

fn current(vm: &VmStatus, now: Timestamp) -> String {
    vm.current_as_of.map_or_else(|| "never".to_owned(), |t| ago(now, t))
}

fn next(vm: &VmStatus, now: Timestamp) -> String {
    match (&vm.shipping, vm.next_cycle) {
        (Some(t), _) if t.total_bytes > 0 => {
            format!("{}: {} of {}", t.what, bytes(t.done_bytes), bytes(t.total_bytes))
        }
        (Some(t), _) => t.what.clone(),
        (None, Some(t)) => ago(now, t.max(now)),
        (None, None) => String::new(),
    }
}

fn vm_details(out: &Out, vm: &VmStatus, now: Timestamp) -> String {
    let mut text = format!(
        "{} ({})\n  {:?}, {}\n  to {}, policy {}, every {}\n",
        vm.name,
        vm.id,
        vm.state,
        health(vm.health),
        vm.target,
        vm.policy,
        duration(Duration::from_millis(vm.interval_ms)),
    );
    if let Some(folder) = &vm.folder {
        text += &format!("  follows the folder {}\n", folder.display());
    }
    for reason in &vm.reasons {
        text += &format!("  - {reason}\n");
    }
    text += &format!("  the vault is as of: {}\n", current(vm, now));
    let newest = vm.newest_point.map(|p| format!(", the newest is {p}")).unwrap_or_default();
    text += &format!("  {}{newest}\n", count(vm.points, "point"));
    if let Some(epoch) = vm.epoch {
        text += &format!("  current epoch {epoch}; next cut: {}\n", next(vm, now));
    }
    if vm.backlog_epochs > 0 {
        text += &format!("  {} in the vault to be applied\n", count(vm.backlog_epochs, "epoch"));
    }
    if let Some(e) = &vm.last_error {
        let at = vm.last_error_at.map(local).unwrap_or_default();
        let attempts = count(u64::from(vm.failed_attempts), "attempt");
        text += &format!("  last error ({at}, {attempts}): {}\n", e.what);
        text += &e.why.as_ref().map(|w| format!("    why: {w}\n")).unwrap_or_default();
        text += &e.hint.as_ref().map(|h| format!("    next: {h}\n")).unwrap_or_default();
    }
    if let Some(delay) = vm.tracking_delay.filter(|d| d.writes > 0) {
        let [p99, max] = [delay.p99_ns, delay.max_ns].map(|ns| brief(Duration::from_nanos(ns)));
        let writes = count(delay.writes, "write");
        text +=
            &format!("  tracking held up 99 % of {writes} for less than {p99}, none for longer than {max}\n");
    }
    let text = plain(&text);
    let rows: Vec<Vec<String>> = vm.disks.iter().map(disk_row).collect();
    let header =
        ["DISK", "FORMAT", "SIZE", "CHANGED", "FROZEN", "PENDING", "PRESERVED", "HRLS", "HRL BYTES", "HOT"];
    let mut table = out.table(&header, &rows);
    for disk in &vm.disks {
        if let Some(why) = &disk.figures.whole_because {
            table += &format!("{} ships whole: {}\n", disk.path.display(), plain(why));
        }
    }
    format!("{text}\n{table}")
}

fn disk_row(disk: &DiskStatus) -> Vec<String> {
    let f = &disk.figures;
    vec![
        disk.path.display().to_string(),
        disk.format.clone(),
        bytes(f.size),
        bytes(f.current),
        bytes(f.frozen),
        bytes(f.pending),
        bytes(f.preserved),
        f.hrl_files.to_string(),
        bytes(f.hrl_bytes),
        count(f.hot_regions, "region"),
    ]
}

fn target_words(target: &TargetStatus) -> String {
    let mut text = format!("target {} ({})", target.name, target.location);
    match (&target.error, target.free_bytes, target.total_bytes) {
        (Some(e), ..) => {
            text +=
                &format!(" cannot be used: {}: {}", e.what, e.why.as_deref().unwrap_or("no reason given"));
        }
        (None, Some(free), Some(total)) => text += &format!(": {} free of {}", bytes(free), bytes(total)),
        _ => {}
    }
    plain(&text) + "\n"
}

fn unprotected(disks: &[UnprotectedDisk]) -> String {
    if disks.is_empty() {
        return "no disk under a mount is unprotected\n".to_owned();
    }
    let named = disks.iter().take(UNPROTECTED_NAMED_MAX).map(|d| plain(&d.path.display().to_string()));
    let mut text = format!("not protected: {}", named.collect::<Vec<_>>().join(", "));
    if disks.len() > UNPROTECTED_NAMED_MAX {
        text += &format!(" and {} more", disks.len() - UNPROTECTED_NAMED_MAX);
    }
    text + " (afterimage protect NAME --disk FILE)\n"
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::{DiskId, VmId};
    use crate::core::ports::source::DiskFigures;

    fn report() -> StatusReport {
        let now = Timestamp(1_700_000_000_000);
        let figures =
            DiskFigures { size: 1 << 30, current: 4096, preserved: 8192, hrl_files: 2, ..Default::default() };
        let disk = DiskStatus { id: DiskId(1), path: "/vm/a.raw".into(), format: "raw".into(), figures };
        let vm = serde_json::json!({
            "name": "web1", "id": VmId(2), "state": "Replicating", "health": "Warning",
            "reasons": ["no protection against loss of this machine"],
            "target": "embedded", "policy": "30s", "interval_ms": 1000, "disks": [disk],
            "current_as_of": Timestamp(now.0 - 22_000), "points": 3, "epoch": 4,
            "next_cycle": Timestamp(now.0 + 3_000),
            "tracking_delay": { "writes": 1234, "median_ns": 300, "p99_ns": 2_400, "max_ns": 1_900_000 },
        });
        StatusReport {
            schema: STATUS_SCHEMA.into(),
            time: now,
            daemon: DaemonStatus {
                pid: 7,
                version: "0.1.0".into(),
                uptime_seconds: 60,
                state_dir: "/s".into(),
            },
            targets: vec![],
            mounts: vec![],
            vms: vec![serde_json::from_value(vm).unwrap()],
            unprotected: vec![UnprotectedDisk { path: "/vm/b.raw".into(), size: 1, format: "raw".into() }],
            warnings: vec![],
        }
    }

    #[test]
    fn the_last_line_names_what_nobody_protects() {
        let out = Out { json: false, yes: false, terminal: false };
        let text = words(&out, &report(), false);
        let expected = "\
afterimage 0.1.0, pid 7, up 60 s, state /s

nothing is mounted (afterimage mount DIR)

VM    STATE        HEALTH   VAULT IS AS OF  POINTS  CHANGED  NEXT CUT  TARGET
web1  Replicating  Warning  22 s ago        3       4.0 KiB  in 3 s    embedded
web1: Warning: no protection against loss of this machine
not protected: /vm/b.raw (afterimage protect NAME --disk FILE)
";
        assert_eq!(text, expected);
    }

    #[test]
    fn one_vm_shows_its_disks() {
        let out = Out { json: false, yes: false, terminal: false };
        let text = words(&out, &report(), true);
        assert!(text.contains("every 1 s"), "{text}");
        let delay = "tracking held up 99 % of 1234 writes for less than 2.4 us, none for longer than 1.9 ms";
        assert!(text.contains(delay), "{text}");
        let row = text.lines().find(|l| l.starts_with("/vm/a.raw")).unwrap();
        let cells: Vec<&str> = row.split("  ").map(str::trim).filter(|c| !c.is_empty()).collect();
        assert_eq!(cells[2..], ["1.0 GiB", "4.0 KiB", "0 B", "0 B", "8.0 KiB", "2", "0 B", "0 regions"]);
    }

    #[test]
    fn json_has_daemon_pid_and_flat_disk_figures() {
        let v = serde_json::to_value(report()).unwrap();
        assert_eq!(v["daemon"]["pid"], 7);
        assert_eq!(v["schema"], "afterimage.status/1");
        assert_eq!(v["vms"][0]["disks"][0]["preserved"], 8192);
    }
}
