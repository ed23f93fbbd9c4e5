//! Targets: names under which this host knows vaults. In this version a vault is a directory:
//! the embedded one in the state folder, those of the configuration, or any absolute path.
//!
//! A vault that cannot be reached when the daemon starts is opened when it can be: until then
//! each call fails with a recoverable error, so that the shipper's schedule of attempts holds.
//! It is never *made* where one was before: an empty folder in place of a vault is a file system
//! that is not mounted, not a new vault.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::config::Config;
use super::state::StateDir;
use crate::base::shell::shell;
use crate::base::{Clock, EpochNumber, Error, ErrorKind, PointId, Result, Timestamp, VmId, VmName};
use crate::core::ports::points::{PointInfo, PointReader, PointStore, StoredVm};
use crate::core::ports::vault::{Head, Vault, VaultSpace};
use crate::core::retention::Keep;
use crate::format::manifest::Manifest;
use crate::format::part::{PartName, StoredPart};
use crate::vault::DirectoryVault;

/// Name of the vault in the state folder.
pub const EMBEDDED: &str = "embedded";

/// A folder that has this file is a vault.
const VAULT_FILE: &str = "vault.json";

/// A vault that failed is opened anew at most so often.
const REOPEN_EVERY: Duration = Duration::from_secs(5);

/// A vault by its name, opened when first needed.
pub struct Target {
    /// Its name.
    pub name: String,
    /// Its folder.
    pub path: PathBuf,
    clock: Arc<dyn Clock>,
    open: Mutex<Slot>,
}

/// The open vault, and when it was opened (monotonic time).
#[derive(Default)]
struct Slot {
    vault: Option<Arc<DirectoryVault>>,
    opened: Duration,
}

impl Target {
    /// The vault, opened.
    fn vault(&self) -> Result<Arc<DirectoryVault>> {
        self.vault_or_new(false)
    }

    fn vault_or_new(&self, make: bool) -> Result<Arc<DirectoryVault>> {
        let mut slot = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let may_be_made = make && slot.vault.is_none();
        if !may_be_made && !self.exists() {
            // What it holds in memory may be ahead of what comes back.
            slot.vault = None;
            return Err(Error::new(ErrorKind::Unreachable, format!("vault {} cannot be used", self.name))
                .why(format!("there is no vault in {}", self.path.display()))
                .hint(format!("is its file system mounted? findmnt -T {}", shell(&self.path))));
        }
        if let Some(vault) = &slot.vault {
            return Ok(vault.clone());
        }
        let vault = DirectoryVault::open(&self.path, self.clock.clone())?;
        *slot = Slot { vault: Some(vault.clone()), opened: self.clock.monotonic() };
        Ok(vault)
    }

    /// Opens the vault, or makes it if its folder is empty or missing.
    pub fn prepare(&self) -> Result<()> {
        self.vault_or_new(true).map(drop)
    }

    /// Whether there is a vault, as far as can be seen now.
    pub fn exists(&self) -> bool {
        self.path.join(VAULT_FILE).is_file()
    }

    /// Why epochs of the VM are not applied, in words.
    pub fn last_error(&self, vm: VmId) -> Option<String> {
        self.vault().ok()?.last_error(vm)
    }

    /// For the shipper: after an error of the file system the vault is opened anew by a later
    /// call, because what a failed sync left is known only then (it latches until it is opened).
    fn call<T>(&self, call: impl FnOnce(&DirectoryVault) -> Result<T>) -> Result<T> {
        let vault = self.vault()?;
        let result = call(&vault);
        if let Err(e) = &result
            && matches!(e.kind(), ErrorKind::Io | ErrorKind::NotFound)
        {
            let mut slot = self.open.lock().unwrap_or_else(PoisonError::into_inner);
            let is_same = slot.vault.as_ref().is_some_and(|v| Arc::ptr_eq(v, &vault));
            let is_due = self.clock.monotonic().saturating_sub(slot.opened) > REOPEN_EVERY;
            // Who has a point open would lose it: the next call after it is closed does it.
            if is_same && is_due && !vault.has_open_points() {
                log::warn!("vault {} is opened anew: {e}", self.name);
                slot.vault = None;
            }
        }
        result
    }
}

impl Vault for Target {
    fn register(&self, vm: VmId, name: &VmName) -> Result<()> {
        self.call(|v| v.register(vm, name))
    }
    fn head(&self, vm: VmId) -> Result<Option<Head>> {
        self.call(|v| v.head(vm))
    }
    fn parts(&self, vm: VmId, epoch: EpochNumber) -> Result<Vec<StoredPart>> {
        self.call(|v| v.parts(vm, epoch))
    }
    fn part_index(&self, vm: VmId, epoch: EpochNumber, part: &StoredPart) -> Result<Vec<u8>> {
        self.call(|v| v.part_index(vm, epoch, part))
    }
    fn put_part(&self, vm: VmId, epoch: EpochNumber, name: &PartName, bytes: &[u8]) -> Result<()> {
        self.call(|v| v.put_part(vm, epoch, name, bytes))
    }
    fn commit(&self, vm: VmId, manifest: &Manifest) -> Result<Head> {
        self.call(|v| v.commit(vm, manifest))
    }
    fn renew(&self, vm: VmId, current_as_of: Timestamp) -> Result<()> {
        self.call(|v| v.renew(vm, current_as_of))
    }
    fn abandon(&self, vm: VmId, epoch: EpochNumber) -> Result<()> {
        self.call(|v| v.abandon(vm, epoch))
    }
    fn backlog(&self, vm: VmId) -> Result<(u64, u64)> {
        self.vault()?.backlog(vm)
    }
    fn space(&self) -> Result<VaultSpace> {
        self.vault()?.space()
    }
}

impl PointStore for Target {
    fn vms(&self) -> Result<Vec<StoredVm>> {
        self.vault()?.vms()
    }
    fn points(&self, vm: VmId) -> Result<Vec<PointInfo>> {
        self.vault()?.points(vm)
    }
    fn open(&self, vm: VmId, point: PointId) -> Result<Arc<dyn PointReader>> {
        PointStore::open(&*self.vault()?, vm, point)
    }
    fn set_pinned(&self, vm: VmId, point: PointId, pinned: bool) -> Result<()> {
        self.vault()?.set_pinned(vm, point, pinned)
    }
    fn delete(&self, vm: VmId, point: PointId) -> Result<()> {
        self.vault()?.delete(vm, point)
    }
    fn set_retention(&self, vm: VmId, keep: Keep) -> Result<()> {
        self.vault()?.set_retention(vm, keep)
    }
    fn expire(&self, vm: VmId) -> Result<Vec<PointId>> {
        self.vault()?.expire(vm)
    }
    fn wait_applied(&self, vm: VmId, patience: Duration) -> Result<bool> {
        self.vault()?.wait_applied(vm, patience)
    }
    fn verify(&self, vm: VmId) -> Result<Vec<String>> {
        self.vault()?.verify(vm)
    }
    fn purge(&self, vm: VmId) -> Result<()> {
        self.vault()?.purge(vm)
    }
}

/// Every target of this host.
pub struct Targets {
    clock: Arc<dyn Clock>,
    named: BTreeMap<String, PathBuf>,
    known: Mutex<BTreeMap<String, Arc<Target>>>,
}

impl Targets {
    /// The embedded vault and those of the configuration.
    pub fn new(state: &StateDir, config: &Config, clock: Arc<dyn Clock>) -> Self {
        let mut named = config.targets.clone();
        named.insert(EMBEDDED.to_owned(), config.vault.clone().unwrap_or_else(|| state.vault()));
        Self { clock, named, known: Mutex::new(BTreeMap::new()) }
    }

    /// The target of that name, or at that absolute path.
    pub fn get(&self, name: &str) -> Result<Arc<Target>> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(target) = known.get(name) {
            return Ok(target.clone());
        }
        let path = match self.named.get(name) {
            Some(path) => path.clone(),
            None if Path::new(name).is_absolute() => PathBuf::from(name),
            None => {
                let names: Vec<&str> = self.named.keys().map(String::as_str).collect();
                return Err(Error::new(ErrorKind::NotFound, format!("there is no target {name:?}"))
                    .why(format!("known targets: {}", names.join(", ")))
                    .hint("name a directory, as in: --to /mnt/backup/vault"));
            }
        };
        // Two names of one folder must be one vault.
        let target = known.values().find(|t| t.path == path).cloned().unwrap_or_else(|| {
            Arc::new(Target {
                name: name.to_owned(),
                path,
                clock: self.clock.clone(),
                open: Mutex::default(),
            })
        });
        known.insert(name.to_owned(), target.clone());
        Ok(target)
    }

    /// Targets that have a vault: the named ones, and those that were asked for.
    pub fn all(&self) -> Vec<Arc<Target>> {
        let names: Vec<String> = self.named.keys().cloned().collect();
        for name in names {
            let _ = self.get(&name);
        }
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all: Vec<Arc<Target>> = Vec::new();
        for target in known.values() {
            if !all.iter().any(|t| Arc::ptr_eq(t, target)) {
                all.push(target.clone());
            }
        }
        all
    }
}
