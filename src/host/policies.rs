//! Policies: named settings (interval, keep rules, alerts) that many VMs share.
//!
//! Three are built in (`30s`, the default, `5min`, `15min`); others are made by
//! `policy set NAME`; a VM may have an interval of its own beside its policy. They are kept in
//! `policies.json`, replaced whole: killed here, the old file or the new one is found. Disk full:
//! the change is refused and nothing changed.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::api::types::Policy;
use crate::base::durable::{read_limited, write_atomic};
use crate::base::limits::DOCUMENT_BYTES_MAX;
use crate::base::{Error, ErrorKind, Result};
use crate::core::retention::Keep;

/// Name of the policy of a VM that names none.
pub const POLICY_DEFAULT: &str = "30s";
/// Shortest interval between cuts.
pub const INTERVAL_MIN: Duration = Duration::from_secs(1);
/// Longest interval between cuts.
pub const INTERVAL_MAX: Duration = Duration::from_secs(24 * 3600);

/// The policy with this name and interval, and defaults for the rest.
pub fn policy(name: impl Into<String>, interval: Duration) -> Policy {
    Policy {
        name: name.into(),
        interval_ms: u64::try_from(interval.as_millis()).unwrap_or(u64::MAX),
        keep: Keep::default(),
        rpo_alert_ms: 0,
        preset: false,
        vms: 0,
    }
}

fn check(policy: &Policy) -> Result<()> {
    let bad = |why: &str| {
        Err(Error::new(ErrorKind::Usage, format!("policy {:?} cannot be used", policy.name))
            .why(why)
            .hint("afterimage policy list"))
    };
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if policy.name.is_empty() || policy.name.len() > 64 || !policy.name.chars().all(plain) {
        return bad("a name has 1 to 64 letters, digits, '-', '_' and '.'");
    }
    check_interval(policy.interval_ms)
}

/// Whether cuts can come so often.
pub fn check_interval(interval_ms: u64) -> Result<()> {
    let interval = Duration::from_millis(interval_ms);
    if interval < INTERVAL_MIN || interval > INTERVAL_MAX {
        return Err(Error::new(ErrorKind::Usage, format!("an interval of {interval_ms} ms cannot be used"))
            .why("the interval is from 1 s to 24 h")
            .hint("write it as in: --interval 30s"));
    }
    Ok(())
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    format: u32,
    policies: Vec<Policy>,
}

const FILE_FORMAT: u32 = 1;

/// All policies of a daemon.
pub struct Policies {
    path: PathBuf,
    by_name: Mutex<BTreeMap<String, Policy>>,
}

impl Policies {
    /// The presets and what the file at `path` has.
    pub fn load(path: PathBuf) -> Result<Self> {
        let mut by_name = BTreeMap::new();
        for (name, seconds) in [("30s", 30), ("5min", 300), ("15min", 900)] {
            by_name.insert(
                name.to_owned(),
                Policy { preset: true, ..policy(name, Duration::from_secs(seconds)) },
            );
        }
        if let Some(bytes) = read_limited(&path, DOCUMENT_BYTES_MAX)? {
            let damaged = |e: serde_json::Error| {
                Error::new(ErrorKind::Damaged, format!("cannot read {}", path.display())).source(e)
            };
            let file: File = serde_json::from_slice(&bytes).map_err(damaged)?;
            if file.format != FILE_FORMAT {
                return Err(Error::new(ErrorKind::Version, format!("cannot use {}", path.display()))
                    .why(format!("it has format {}, this program knows {FILE_FORMAT}", file.format))
                    .hint("use the version of afterimage that wrote it, or a newer one"));
            }
            for policy in file.policies {
                by_name.entry(policy.name.clone()).or_insert(policy);
            }
        }
        Ok(Self { path, by_name: Mutex::new(by_name) })
    }

    /// Every policy, by interval.
    pub fn list(&self) -> Vec<Policy> {
        let mut all: Vec<Policy> = self.lock().values().cloned().collect();
        all.sort_by(|a, b| (a.interval_ms, &a.name).cmp(&(b.interval_ms, &b.name)));
        all
    }

    /// The policy of that name.
    pub fn get(&self, name: &str) -> Result<Policy> {
        self.lock().get(name).cloned().ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format!("there is no policy {name:?}"))
                .hint("afterimage policy list")
        })
    }

    /// Makes or replaces a policy.
    pub fn set(&self, policy: Policy) -> Result<()> {
        check(&policy)?;
        let mut by_name = self.lock();
        if by_name.get(&policy.name).is_some_and(|p| p.preset) {
            return Err(Error::new(
                ErrorKind::Refused,
                format!("policy {:?} cannot be changed", policy.name),
            )
            .why("it comes with the program")
            .hint("make one of your own: afterimage policy set NAME --interval 10s"));
        }
        let mut next = by_name.clone();
        next.insert(policy.name.clone(), policy);
        let file =
            File { format: FILE_FORMAT, policies: next.values().filter(|p| !p.preset).cloned().collect() };
        let bytes = serde_json::to_vec_pretty(&file)
            .map_err(|e| Error::new(ErrorKind::Internal, "policies cannot be written").source(e))?;
        write_atomic(&self.path, &bytes)?;
        *by_name = next;
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Policy>> {
        self.by_name.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_are_kept_over_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("policies.json");
        let policies = Policies::load(path.clone()).unwrap();
        assert_eq!(policies.list().len(), 3);
        let mut odd = policy("nightly", Duration::from_secs(3600));
        odd.keep.daily = 30;
        policies.set(odd.clone()).unwrap();
        let again = Policies::load(path).unwrap();
        assert_eq!(again.get("nightly").unwrap(), odd);
        assert_eq!(again.get("none").unwrap_err().kind(), ErrorKind::NotFound);
        assert!(again.set(policy("a/b", Duration::from_secs(3))).is_err());
        assert!(again.set(policy("ab", Duration::from_millis(3))).is_err());
    }
}
