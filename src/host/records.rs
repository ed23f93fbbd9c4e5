//! The remembered configuration of VMs: `vms/UUID.json`, one document each.
//!
//! Replaced whole: killed here, the old document or the new one is found, and the tables of
//! start-up and membership repair what was half done (a disk that the record has and the tracker
//! has not ships whole). Disk full: the change is refused before anything else changed. Another
//! version: the VM is not started, and status says so.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::state::StateDir;
use crate::base::durable::{read_limited, sync_dir, write_atomic};
use crate::base::error::Context;
use crate::base::limits::DOCUMENT_BYTES_MAX;
use crate::base::{DiskId, Error, ErrorKind, Result, VmId, VmName};
use crate::machine::image::ImageFormat;

/// Version of the document.
const RECORD_FORMAT: u32 = 1;

/// A disk of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskRecord {
    /// Its stable id.
    pub id: DiskId,
    /// The directory of its mount.
    pub mount: PathBuf,
    /// Its path relative to the root of the mount.
    pub path: PathBuf,
    /// Format as it was probed.
    pub format: ImageFormat,
}

impl DiskRecord {
    /// Its path in the mounted view.
    pub fn view_path(&self) -> PathBuf {
        self.mount.join(&self.path)
    }
}

/// A folder whose disks are followed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FolderRule {
    /// The directory of the mount.
    pub mount: PathBuf,
    /// The folder relative to the root of the mount; empty: the root itself.
    pub path: PathBuf,
    /// Patterns of names that are left out.
    pub exclude: Vec<String>,
}

/// How far protection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// The first copy is not complete: there is no point yet.
    Initial,
    /// The first point was listed.
    Protected,
    /// Protection is being ended: logs and marks beside the disks are to be removed.
    Ending,
    /// Protection was ended; points are kept. The disks are remembered, so that protecting the
    /// same files under the same name goes on with the same points.
    Ended,
}

/// The configuration of one VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmRecord {
    /// Its UUID.
    pub id: VmId,
    /// Its name.
    pub name: VmName,
    /// How far protection is.
    pub phase: Phase,
    /// Its disks.
    pub disks: Vec<DiskRecord>,
    /// The folder that is followed, if it was protected by folder.
    pub folder: Option<FolderRule>,
    /// Name of its policy.
    pub policy: String,
    /// Time between cuts, if not the policy's.
    pub interval_ms: Option<u64>,
    /// Name of its target.
    pub target: String,
    /// The operator said pause.
    pub paused: bool,
    /// The job that enables protection, while it is at work.
    pub job: Option<u64>,
}

#[derive(Serialize, Deserialize)]
struct Document {
    format: u32,
    vm: VmRecord,
}

impl VmRecord {
    /// Whether its disks are tracked and shipped.
    pub fn is_protected(&self) -> bool {
        matches!(self.phase, Phase::Initial | Phase::Protected)
    }

    /// The disk with this path in the mounted view.
    pub fn disk_at(&self, mount: &Path, path: &Path) -> Option<&DiskRecord> {
        self.disks.iter().find(|d| d.mount == mount && d.path == path)
    }

    /// Writes the record, durably.
    pub fn save(&self, state: &StateDir) -> Result<()> {
        let document = Document { format: RECORD_FORMAT, vm: self.clone() };
        let bytes = serde_json::to_vec_pretty(&document)
            .map_err(|e| Error::new(ErrorKind::Internal, "a VM cannot be recorded").source(e))?;
        write_atomic(&state.vm(self.id), &bytes)
    }

    /// Removes the record, durably. Idempotent.
    pub fn remove(state: &StateDir, vm: VmId) -> Result<()> {
        let path = state.vm(vm);
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io(format!("cannot remove {}", path.display()), e))
            }
            _ => sync_dir(&state.vms()),
        }
    }

    fn read(path: &Path) -> Result<Self> {
        let bytes = read_limited(path, DOCUMENT_BYTES_MAX)?.unwrap_or_default();
        let damaged = |e: serde_json::Error| {
            Error::new(ErrorKind::Damaged, format!("cannot read {}", path.display())).source(e)
        };
        #[derive(Deserialize)]
        struct Version {
            format: u32,
        }
        let version: Version = serde_json::from_slice(&bytes).map_err(damaged)?;
        if version.format != RECORD_FORMAT {
            return Err(Error::new(ErrorKind::Version, format!("cannot use {}", path.display()))
                .why(format!("it has format {}, this program knows {RECORD_FORMAT}", version.format))
                .hint("use the version of afterimage that wrote it, or a newer one"));
        }
        Ok(serde_json::from_slice::<Document>(&bytes).map_err(damaged)?.vm)
    }

    /// Every record of a state folder, and the errors of those that cannot be read.
    pub fn load_all(state: &StateDir) -> Result<(Vec<Self>, Vec<Error>)> {
        let folder = state.vms();
        let entries = std::fs::read_dir(&folder).context(|| format!("cannot list {}", folder.display()))?;
        let (mut records, mut errors) = (Vec::new(), Vec::new());
        for entry in entries.flatten() {
            let path = entry.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name.starts_with('.') || !name.ends_with(".json") {
                continue;
            }
            match Self::read(&path) {
                Ok(record) => records.push(record),
                Err(e) => errors.push(e),
            }
        }
        records.sort_by(|a, b| a.name.cmp(&b.name));
        Ok((records, errors))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A protected VM with the disks `paths` under the mount `/m`.
    pub fn record(name: &str, paths: &[&str]) -> VmRecord {
        let disk = |p: &&str| DiskRecord {
            id: DiskId::random(),
            mount: PathBuf::from("/m"),
            path: PathBuf::from(p),
            format: ImageFormat::Raw,
        };
        VmRecord {
            id: VmId::random(),
            name: name.parse().unwrap(),
            phase: Phase::Protected,
            disks: paths.iter().map(disk).collect(),
            folder: None,
            policy: "30s".to_owned(),
            interval_ms: None,
            target: "embedded".to_owned(),
            paused: false,
            job: None,
        }
    }

    #[test]
    fn records_are_kept_and_damaged_ones_are_told() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::at(dir.path()).unwrap();
        state.create().unwrap();
        let vm = record("web1", &["a.raw", "b/c.raw"]);
        vm.save(&state).unwrap();
        std::fs::write(state.vms().join("x.json"), b"{").unwrap();
        std::fs::write(state.vms().join("y.json"), b"{\"format\":9}").unwrap();
        let (records, errors) = VmRecord::load_all(&state).unwrap();
        assert_eq!(records, std::slice::from_ref(&vm));
        assert_eq!(errors.len(), 2);
        VmRecord::remove(&state, vm.id).unwrap();
        VmRecord::remove(&state, vm.id).unwrap();
        assert!(VmRecord::load_all(&state).unwrap().0.is_empty());
    }
}
