//! Where everything lies.
//!
//! ```text
//! VAULT/vault.json                       format version
//! VAULT/clock.json                       how far the clock is believed (format::vaultstate, A4)
//! VAULT/lock                             flock, held for life
//! VAULT/vms/UUID/vm.json                 name, keep rules
//!                state.json              what is published (format::vaultstate)
//!                disks/ID.img            newest applied content, sparse, byte-identical to the source
//!                disks/ID.sums           8 bytes a 4 KiB block: base::digest::block_sum
//!                inbox/EPOCH/PART        parts of an epoch that is received
//!                inbox/EPOCH/manifest    it is committed
//!                inbox/first/PART.index  A3: the part is applied already, this is the proof
//!                inbox/first/PART.begun  A3: the part is being applied over others
//!                points/EPOCH.manifest   stored manifest of a point
//!                points/EPOCH-BASE.undo  what EPOCH replaced since point BASE
//! ```
//!
//! The name of an undo log follows from two neighbouring points in `state.json`, so that one commit
//! of that document publishes merged logs. What `state.json` does not name is left over from a kill
//! and is removed when the vault is opened.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::base::durable::sync_parent;
use crate::base::error::Context;
use crate::base::{DiskId, EpochNumber, Result, VmId, VmName};
use crate::core::retention::Keep;
use crate::format::part::PartName;
use crate::format::vaultstate::{check_format, from_json, seal, unseal};

/// `vm.json`: what seldom changes. Sealed: a flipped bit in a keep rule would drop points.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmFile {
    /// [`crate::format::vaultstate::VAULT_FORMAT`].
    pub format: u32,
    /// Which VM.
    pub id: VmId,
    /// Its newest name.
    pub name: VmName,
    /// Its keep rules.
    pub keep: Keep,
}

impl VmFile {
    /// The bytes of `vm.json`.
    pub fn encode(&self) -> Result<Vec<u8>> {
        seal(self)
    }

    /// Reads `vm.json`, also one of the first version, which was not sealed.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let what = "vm.json";
        let sealed = unseal(what, bytes);
        let first = |e| from_json::<Self>(what, bytes).map_err(|_| e);
        let file = sealed.or_else(first)?;
        check_format(what, file.format)?;
        Ok(file)
    }
}

/// The folder of one VM.
#[derive(Clone, Debug)]
pub(super) struct VmDir {
    root: PathBuf,
}

impl VmDir {
    pub fn new(vault: &Path, vm: VmId) -> Self {
        Self { root: vault.join("vms").join(vm.to_string()) }
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn vm_file(&self) -> PathBuf {
        self.root.join("vm.json")
    }

    pub fn state_file(&self) -> PathBuf {
        self.root.join("state.json")
    }

    pub fn disks(&self) -> PathBuf {
        self.root.join("disks")
    }

    pub fn disk(&self, id: DiskId) -> PathBuf {
        self.disks().join(format!("{id}.img"))
    }

    pub fn sums(&self, id: DiskId) -> PathBuf {
        self.disks().join(format!("{id}.sums"))
    }

    pub fn inbox(&self) -> PathBuf {
        self.root.join("inbox")
    }

    pub fn epoch(&self, epoch: EpochNumber) -> PathBuf {
        self.inbox().join(epoch.to_string())
    }

    pub fn part(&self, epoch: EpochNumber, part: &PartName) -> PathBuf {
        self.epoch(epoch).join(part.to_string())
    }

    pub fn inbox_manifest(&self, epoch: EpochNumber) -> PathBuf {
        self.epoch(epoch).join("manifest")
    }

    pub fn first(&self) -> PathBuf {
        self.inbox().join("first")
    }

    pub fn points(&self) -> PathBuf {
        self.root.join("points")
    }

    pub fn point_manifest(&self, epoch: EpochNumber) -> PathBuf {
        self.points().join(format!("{epoch}.manifest"))
    }

    pub fn undo(&self, epoch: EpochNumber, base: EpochNumber) -> PathBuf {
        self.points().join(format!("{epoch}-{base}.undo"))
    }
}

/// Makes a folder and its name durable. One that exists is fine.
pub(super) fn make_dir(path: &Path) -> Result<()> {
    match fs::create_dir(path) {
        Ok(()) => sync_parent(path),
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        Err(e) => Err(e).context(|| format!("cannot make folder {}", path.display())),
    }
}

/// Removes a file that may be gone already.
pub(super) fn remove_file(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(e).context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Removes a folder, with all that is in it, that may be gone already.
pub(super) fn remove_dir(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(e).context(|| format!("cannot remove folder {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Removes every disk file but those of `keep`.
pub(super) fn remove_disks_except(dir: &VmDir, keep: &BTreeSet<DiskId>) -> Result<()> {
    for name in names(&dir.disks())? {
        let id = name.split_once('.').and_then(|(id, _)| id.parse::<DiskId>().ok());
        if id.is_none_or(|id| !keep.contains(&id)) {
            remove_file(&dir.disks().join(&name))?;
        }
    }
    Ok(())
}

/// Names in a folder, sorted; names that are no text are left out. No folder: no names.
pub(super) fn names(dir: &Path) -> Result<Vec<String>> {
    let what = || format!("cannot list {}", dir.display());
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e).context(what),
    };
    let mut out = Vec::new();
    for entry in entries {
        out.extend(entry.context(what)?.file_name().into_string().ok());
    }
    out.sort();
    Ok(out)
}

/// Bytes on disk of a folder and all below.
pub(super) fn bytes_below(dir: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let Ok(entries) = fs::read_dir(dir) else { return 0 };
    let sizes = entries.flatten().map(|e| match e.metadata() {
        Ok(m) if m.is_dir() => bytes_below(&e.path()),
        Ok(m) => m.blocks() * 512,
        Err(_) => 0,
    });
    sizes.sum()
}
