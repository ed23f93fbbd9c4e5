//! The vault in a folder: [`Vault`] for the shipper, [`PointStore`] for everybody who reads.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry::Vacant;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};

use super::clock::{self, WatchedClock};
use super::layout::{VmDir, bytes_below, make_dir, names, remove_dir};
use super::steps::Steps;
use super::store::{Shared, VmStore, lock};
use super::{apply, diskfile, expire, inbox, opening, reader, verify};
use crate::base::durable::{read_limited, sync_dir, write_atomic};
use crate::base::error::Context;
use crate::base::{Clock, EpochNumber, Error, ErrorKind, PointId, Result, Timestamp, VmId, VmName};
use crate::core::ports::points::{PointInfo, PointReader, PointStore, StoredVm};
use crate::core::ports::vault::{Head, Vault, VaultSpace};
use crate::core::retention::{Keep, KeptPoint, expired};
use crate::format::manifest::Manifest;
use crate::format::part::{PartName, StoredPart};
use crate::format::vaultstate::{VAULT_FORMAT, VaultFile, check_format, from_json, to_json};

/// A vault in a folder.
pub struct DirectoryVault {
    root: PathBuf,
    clock: Arc<dyn Clock>,
    steps: Arc<Steps>,
    vms: Mutex<BTreeMap<VmId, Entry>>,
    /// VMs that could not be opened, and why: the others are served.
    broken: Mutex<BTreeMap<VmId, Error>>,
    /// Held while a VM is purged: it is registered anew only when its folder is gone. Before `vms`.
    purging: Mutex<()>,
    watched: WatchedClock,
    // Held for life: the lock goes with the descriptor.
    lock: Flock<File>,
}

struct Entry {
    store: Arc<VmStore>,
    applier: Option<JoinHandle<()>>,
}

impl DirectoryVault {
    /// Opens the vault at `path`, or makes it, and goes on with what was begun.
    ///
    /// [`ErrorKind::Version`]: another format. [`ErrorKind::Busy`]: another process has it open.
    /// [`ErrorKind::Refused`]: the folder holds something else.
    pub fn open(path: &Path, clock: Arc<dyn Clock>) -> Result<Arc<Self>> {
        Self::open_with(path, clock, Arc::default())
    }

    /// [`Self::open`] for tests that stop the vault at one of its steps.
    #[doc(hidden)]
    pub fn open_with(path: &Path, clock: Arc<dyn Clock>, steps: Arc<Steps>) -> Result<Arc<Self>> {
        let lock = claim(path, &*clock)?;
        let watched = WatchedClock::open(path, Arc::clone(&clock), Arc::clone(&steps));
        let vms = path.join("vms");
        let mut entries = BTreeMap::new();
        let mut broken = BTreeMap::new();
        for name in names(&vms)? {
            if name.starts_with(".new-") || name.starts_with(".purged-") {
                remove_dir(&vms.join(&name))?;
            } else if let Ok(id) = name.parse::<VmId>() {
                let store = match opening::open(path, id, Arc::clone(&clock), Arc::clone(&steps)) {
                    Ok(store) => store,
                    Err(e) if e.kind() == ErrorKind::Cancelled => return Err(e),
                    Err(e) => {
                        log::error!("vault {}: VM {id} cannot be used: {e}", path.display());
                        broken.insert(id, e);
                        continue;
                    }
                };
                entries.insert(id, Entry::start(Arc::new(store))?);
            }
        }
        let root = path.to_owned();
        let (vms, broken) = (Mutex::new(entries), Mutex::new(broken));
        Ok(Arc::new(Self { root, clock, steps, vms, broken, purging: Mutex::new(()), watched, lock }))
    }

    /// Its folder.
    pub fn path(&self) -> &Path {
        &self.root
    }

    /// Why epochs of the VM are not applied, or nothing is acknowledged; in words.
    pub fn last_error(&self, vm: VmId) -> Option<String> {
        let store = self.store(vm).ok()?;
        let shared = lock(&store.shared);
        shared.latched.clone().or_else(|| shared.last_error.clone())
    }

    /// The newest instant at which the vault is known to have held all of the VM.
    pub fn current_as_of(&self, vm: VmId) -> Option<Timestamp> {
        lock(&self.store(vm).ok()?.shared).current_as_of
    }

    /// The keep rules of a VM.
    pub fn retention(&self, vm: VmId) -> Result<Keep> {
        Ok(lock(&self.store(vm)?.shared).file.keep)
    }

    fn store(&self, vm: VmId) -> Result<Arc<VmStore>> {
        let vms = lock(&self.vms);
        let found = vms.get(&vm).map(|entry| Arc::clone(&entry.store));
        drop(vms);
        self.check_whole(vm)?;
        found.ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format!("the vault has no VM {vm}"))
                .why("it was never protected with this vault, or was purged")
        })
    }

    /// Whether a point of any VM is open.
    pub fn has_open_points(&self) -> bool {
        lock(&self.vms).values().any(|entry| !lock(&entry.store.shared).open.is_empty())
    }

    /// Takes a VM out of the list and stops it, unless a point of it is open. `None`: there is
    /// nothing to stop, because it could not be opened.
    fn take_for_purge(&self, vm: VmId) -> Result<Option<Entry>> {
        let mut entry = {
            let mut vms = lock(&self.vms);
            let Some(entry) = vms.get(&vm) else {
                drop(vms);
                let is_broken = lock(&self.broken).contains_key(&vm);
                return if is_broken { Ok(None) } else { self.store(vm).map(|_| None) };
            };
            let mut shared = lock(&entry.store.shared);
            if !shared.open.is_empty() {
                return Err(Error::new(ErrorKind::Busy, format!("VM {vm} cannot be removed from the vault"))
                    .why("a point of it is open")
                    .hint("close what uses it: afterimage point umount, or delete its clones"));
            }
            // From here on no point is opened.
            shared.is_stopping = true;
            drop(shared);
            vms.remove(&vm)
        };
        entry.iter_mut().for_each(Entry::stop);
        Ok(entry)
    }

    /// A VM that could not be purged is as it was.
    fn put_back(&self, vm: VmId, entry: Entry) -> Result<()> {
        entry.store.is_closed.store(false, Ordering::SeqCst);
        lock(&entry.store.shared).is_stopping = false;
        lock(&self.vms).insert(vm, Entry::start(Arc::clone(&entry.store))?);
        Ok(())
    }

    /// The folder of a VM goes out of sight, whole.
    fn hide_folder(&self, vm: VmId, purged: &Path, store: Option<&VmStore>) -> Result<()> {
        // Whatever is under way is waited for; it is refused after that.
        let _locks = store.map(|s| (lock(&s.intake), lock(&s.work), lock(&s.doc)));
        remove_dir(purged)?;
        self.steps.step("purge a VM")?;
        let root = VmDir::new(&self.root, vm);
        std::fs::rename(root.root(), purged).context(|| format!("cannot remove VM {vm} from the vault"))
    }

    /// Refuses a VM that could not be opened.
    fn check_whole(&self, vm: VmId) -> Result<()> {
        let broken = lock(&self.broken);
        let Some(e) = broken.get(&vm) else { return Ok(()) };
        let hint = e.next_step().unwrap_or("check the disks of the vault, then restart the daemon");
        Err(Error::new(e.kind(), e.what()).why(e.reason().unwrap_or_default()).hint(hint))
    }

    /// Changes `vm.json`.
    fn change_file(&self, vm: VmId, change: impl FnOnce(&mut super::layout::VmFile)) -> Result<()> {
        let store = self.store(vm)?;
        let _doc = lock(&store.doc);
        store.check_open()?;
        let mut file = lock(&store.shared).file.clone();
        change(&mut file);
        if file != lock(&store.shared).file {
            store.write(&store.dir.vm_file(), &file.encode()?, "vm.json")?;
            lock(&store.shared).file = file;
        }
        Ok(())
    }
}

/// Takes the folder for this process; makes it if there is none.
fn claim(path: &Path, clock: &dyn Clock) -> Result<Flock<File>> {
    let what = || format!("cannot open vault {}", path.display());
    let is_new = !path.exists();
    std::fs::create_dir_all(path).context(what)?;
    if is_new {
        crate::base::durable::sync_parent(path)?;
    }
    let found = names(path)?;
    let version = read_limited(&path.join("vault.json"), 4096)?;
    let ours = |n: &String| matches!(n.as_str(), "lock" | "vms" | ".vault.json.new" | "lost+found");
    if version.is_none() && !found.iter().all(ours) {
        return Err(Error::new(ErrorKind::Refused, what())
            .why("the folder holds other files and no vault.json")
            .hint("name an empty folder, or one that does not exist yet"));
    }
    if let Some(bytes) = &version {
        let file: VaultFile = from_json("vault.json", bytes)?;
        check_format(&format!("vault {}", path.display()), file.format)?;
    }
    let file = File::options().read(true).write(true).create(true).truncate(false).open(path.join("lock"));
    let lock =
        Flock::lock(file.context(what)?, FlockArg::LockExclusiveNonblock).map_err(|(_, e)| match e {
            nix::errno::Errno::EWOULDBLOCK => Error::new(ErrorKind::Busy, what())
                .why("another process has it open")
                .hint("stop the daemon that uses it, or use that daemon: afterimage --state DIR status"),
            e => Error::io(what(), e.into()),
        })?;
    make_dir(&path.join("vms"))?;
    if version.is_none() {
        write_atomic(&path.join("vault.json"), &to_json(&VaultFile { format: VAULT_FORMAT })?)?;
        clock::create(path, clock)?;
    }
    Ok(lock)
}

impl Entry {
    fn start(store: Arc<VmStore>) -> Result<Self> {
        let name = format!("apply:{}", lock(&store.shared).file.name);
        let mine = Arc::clone(&store);
        let applier = std::thread::Builder::new()
            .name(name)
            .spawn(move || apply::run(&mine))
            .context(|| "cannot start the thread that applies epochs")?;
        Ok(Self { store, applier: Some(applier) })
    }

    /// Lets the applier finish the epoch that it works on. Whoever still has the store is refused
    /// from then on; the lock on the vault goes later.
    fn stop(&mut self) {
        lock(&self.store.shared).is_stopping = true;
        self.store.poke();
        if let Some(applier) = self.applier.take()
            && applier.join().is_err()
        {
            log::error!("the thread that applies epochs of VM {} ended by a fault", self.store.id);
        }
        self.store.is_closed.store(true, Ordering::SeqCst);
    }
}

impl Drop for DirectoryVault {
    fn drop(&mut self) {
        lock(&self.vms).values_mut().for_each(Entry::stop);
    }
}

impl Vault for DirectoryVault {
    fn register(&self, vm: VmId, name: &VmName) -> Result<()> {
        self.check_whole(vm)?;
        let is_known = lock(&self.vms).contains_key(&vm);
        if !is_known {
            let _purging = lock(&self.purging);
            let mut vms = lock(&self.vms);
            if let Vacant(place) = vms.entry(vm) {
                self.steps.step("register a VM")?;
                opening::create(&self.root, vm, name)?;
                let store = opening::open(&self.root, vm, Arc::clone(&self.clock), Arc::clone(&self.steps))?;
                place.insert(Entry::start(Arc::new(store))?);
                return Ok(());
            }
        }
        self.change_file(vm, |file| file.name = name.clone())
    }

    fn head(&self, vm: VmId) -> Result<Option<Head>> {
        Ok(self.store(vm)?.head())
    }

    fn parts(&self, vm: VmId, epoch: EpochNumber) -> Result<Vec<StoredPart>> {
        inbox::parts(&*self.store(vm)?, epoch)
    }

    fn part_index(&self, vm: VmId, epoch: EpochNumber, part: &StoredPart) -> Result<Vec<u8>> {
        inbox::part_index(&*self.store(vm)?, epoch, part)
    }

    fn put_part(&self, vm: VmId, epoch: EpochNumber, name: &PartName, bytes: &[u8]) -> Result<()> {
        inbox::put_part(&*self.store(vm)?, epoch, name, bytes)
    }

    fn commit(&self, vm: VmId, manifest: &Manifest) -> Result<Head> {
        let _ = self.watched.believed();
        inbox::commit(&*self.store(vm)?, manifest)
    }

    fn renew(&self, vm: VmId, current_as_of: Timestamp) -> Result<()> {
        let store = self.store(vm)?;
        store.check_latch()?;
        let mut shared = lock(&store.shared);
        shared.current_as_of = shared.current_as_of.max(Some(current_as_of));
        Ok(())
    }

    fn abandon(&self, vm: VmId, epoch: EpochNumber) -> Result<()> {
        inbox::abandon(&*self.store(vm)?, epoch)
    }

    fn backlog(&self, vm: VmId) -> Result<(u64, u64)> {
        let store = self.store(vm)?;
        let shared = lock(&store.shared);
        Ok((shared.queue.len() as u64, shared.queue.iter().map(|w| w.bytes).sum()))
    }

    fn space(&self) -> Result<VaultSpace> {
        let (free_bytes, total_bytes) = diskfile::room(&self.lock)?;
        Ok(VaultSpace { free_bytes, total_bytes })
    }
}

impl PointStore for DirectoryVault {
    fn vms(&self) -> Result<Vec<StoredVm>> {
        let stores: Vec<Arc<VmStore>> = lock(&self.vms).values().map(|e| Arc::clone(&e.store)).collect();
        let described = stores.iter().map(|store| {
            let (name, points) = {
                let shared = lock(&store.shared);
                (shared.file.name.clone(), shared.points.len() as u64)
            };
            StoredVm { id: store.id, name, points, bytes: bytes_below(store.dir.root()) }
        });
        Ok(described.collect())
    }

    fn points(&self, vm: VmId) -> Result<Vec<PointInfo>> {
        Ok(lock(&self.store(vm)?.shared).points.iter().map(|p| p.info.clone()).collect())
    }

    fn open(&self, vm: VmId, point: PointId) -> Result<Arc<dyn PointReader>> {
        Ok(Arc::new(reader::open(&self.store(vm)?, point)?))
    }

    fn set_pinned(&self, vm: VmId, point: PointId, pinned: bool) -> Result<()> {
        let store = self.store(vm)?;
        // Retention must not drop it between the look and the commit.
        let _work = lock(&store.work);
        if !lock(&store.shared).points.iter().any(|p| p.info.id == point) {
            return Err(reader::not_found(point));
        }
        store.commit_state(|s| {
            s.pinned.retain(|p| *p != point.epoch);
            if pinned {
                s.pinned.push(point.epoch);
                s.pinned.sort();
            }
        })?;
        let mut shared = lock(&store.shared);
        shared.points.iter_mut().filter(|p| p.info.id == point).for_each(|p| p.info.pinned = pinned);
        Ok(())
    }

    fn delete(&self, vm: VmId, point: PointId) -> Result<()> {
        let store = self.store(vm)?;
        {
            let shared = lock(&store.shared);
            let refuse = |kind, why: &str, hint: &str| {
                Err(Error::new(kind, format!("point {point} cannot be deleted")).why(why).hint(hint))
            };
            let Some(found) = shared.points.iter().find(|p| p.info.id == point) else {
                return Err(reader::not_found(point));
            };
            if shared.points.last().is_some_and(|p| p.info.id == point) {
                return refuse(
                    ErrorKind::Refused,
                    "it is the newest point",
                    "to remove the VM and all its points: afterimage unprotect NAME --purge",
                );
            }
            if found.info.pinned {
                return refuse(ErrorKind::Refused, "it is pinned", "afterimage point unpin NAME POINT");
            }
            if shared.open.contains_key(&point.epoch) {
                return refuse(
                    ErrorKind::Busy,
                    "it is open",
                    "close what uses it: afterimage point umount, or delete its clones",
                );
            }
        }
        let gone = expire::drop_points(&store, &[point.epoch])?;
        if gone.contains(&point) {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Busy, format!("point {point} cannot be deleted"))
            .why("it was opened or pinned meanwhile"))
    }

    fn set_retention(&self, vm: VmId, keep: Keep) -> Result<()> {
        self.change_file(vm, |file| file.keep = keep)
    }

    fn expire(&self, vm: VmId) -> Result<Vec<PointId>> {
        let store = self.store(vm)?;
        let (points, keep): (Vec<KeptPoint>, Keep) = {
            let shared = lock(&store.shared);
            let kept = shared.points.iter().map(|p| KeptPoint {
                epoch: p.epoch(),
                arrived: p.info.arrived,
                is_pinned: p.info.pinned,
                is_open: shared.open.contains_key(&p.epoch()),
            });
            (kept.collect(), shared.file.keep)
        };
        // After the list was made: no point in it arrived after a jump that this does not see.
        let Some(now) = self.watched.believed() else {
            return Ok(Vec::new());
        };
        let gone = expired(&points, &keep, now);
        if gone.is_empty() { Ok(Vec::new()) } else { expire::drop_points(&store, &gone) }
    }

    fn wait_applied(&self, vm: VmId, patience: Duration) -> Result<bool> {
        let store = self.store(vm)?;
        let shared = lock(&store.shared);
        let is_waiting = |s: &mut Shared| !s.queue.is_empty() && !store.steps.is_stopped();
        let waited = store.changed.wait_timeout_while(shared, patience, is_waiting);
        let (shared, _) = waited.unwrap_or_else(PoisonError::into_inner);
        Ok(shared.queue.is_empty())
    }

    fn verify(&self, vm: VmId) -> Result<Vec<String>> {
        verify::verify(&*self.store(vm)?)
    }

    fn purge(&self, vm: VmId) -> Result<()> {
        let _purging = lock(&self.purging);
        let purged = self.root.join("vms").join(format!(".purged-{vm}"));
        let entry = self.take_for_purge(vm)?;
        if let Err(e) = self.hide_folder(vm, &purged, entry.as_ref().map(|entry| &*entry.store)) {
            entry.map_or(Ok(()), |entry| self.put_back(vm, entry))?;
            return Err(e);
        }
        lock(&self.broken).remove(&vm);
        sync_dir(&self.root.join("vms"))?;
        remove_dir(&purged)
    }
}
