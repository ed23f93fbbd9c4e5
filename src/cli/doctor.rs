//! `doctor`: what is wrong with this machine, and the line to type for each finding.

use std::path::PathBuf;
use std::process::ExitCode;

use serde::Serialize;

use super::mounts::absolute;
use super::out::{Out, plain};
use super::reach::Reach;
use crate::base::{Result, SystemClock};
use crate::host::api::types::StatusRequest;
use crate::host::doctor::{Finding, Level, Patient, examine};

#[derive(Serialize)]
struct Report<'a> {
    ok: bool,
    findings: &'a [Finding],
}

/// `doctor`: exit code 0 if there is no problem, else 1.
pub fn doctor(out: &Out, reach: &Reach, dirs: &[PathBuf]) -> Result<ExitCode> {
    let client = reach.if_running();
    let status = client.as_ref().and_then(|c| c.call(&StatusRequest::default()).ok());
    let mut images = dirs.iter().map(|d| absolute(d)).collect::<Result<Vec<_>>>()?;
    let mut vaults = vec![reach.state().vault()];
    if let Some(status) = &status {
        images.extend(status.mounts.iter().map(|m| m.dir.clone()));
        vaults.extend(status.targets.iter().map(|t| PathBuf::from(&t.location)).filter(|p| p.is_absolute()));
    }
    images.sort();
    images.dedup();
    vaults.sort();
    vaults.dedup();
    let daemon = match (&status, client) {
        (Some(s), _) => Some(s.daemon.version.clone()),
        (None, Some(c)) => c.hello().ok().map(|d| d.version),
        (None, None) => None,
    };
    let findings =
        examine(&Patient { state: reach.state(), vaults, images, daemon }, &SystemClock::default());
    let ok = findings.iter().all(|f| f.level != Level::Problem);
    out.answer("afterimage.doctor/1", &Report { ok, findings: &findings }, || words(&findings))?;
    Ok(ExitCode::from(u8::from(!ok)))
}

fn words(findings: &[Finding]) -> String {
    let mut text = String::new();
    for f in findings {
        let level = match f.level {
            Level::Ok => "ok",
            Level::Note => "note",
            Level::Problem => "PROBLEM",
        };
        text += &format!("{level:<8} {}: {}\n", f.check, plain(&f.text));
        if let (Some(fix), true) = (&f.fix, f.level != Level::Ok) {
            text += &format!("         next: {}\n", plain(fix));
        }
    }
    let problems = findings.iter().filter(|f| f.level == Level::Problem).count();
    text + &match problems {
        0 => "no problem found\n".to_owned(),
        n => format!("{} found\n", super::text::count(n as u64, "problem")),
    }
}
