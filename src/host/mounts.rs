//! The mounts of a daemon: remembered in `mounts.json`, restored when it starts.
//!
//! The file is replaced whole: killed here, the old list or the new one is found. A mount is
//! remembered after it serves and forgotten before it goes, so that a kill in between restores
//! what the operator last saw done, or less. At start-up every mount is prepared first, then all
//! VMs are opened and their disks attached, and only then does any mount answer: no write of a
//! guest can be faster than its tracking.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use super::api::types::{
    Done, Failure, MountReply, MountRequest, MountStatus, OpenFile, Severity, UmountRequest,
};
use super::engine::Engine;
use super::lower::{self, Looked};
use super::membership::Watcher;
use super::state::StateDir;
use super::storage;
use super::vm::Vm;
use crate::base::durable::{read_limited, write_atomic};
use crate::base::limits::DOCUMENT_BYTES_MAX;
use crate::base::shell::shell;
use crate::base::{DiskId, Error, ErrorKind, FileKey, Result};
use crate::core::ports::tracking::TrackedDisk;
use crate::filter::{Filter, Holder, LowerFile, Mount, MountSpec, Prepared, absolute};

/// Version of the file.
const FILE_FORMAT: u32 = 1;

/// A remembered mount.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MountRecord {
    /// The lower directory.
    pub source: PathBuf,
    /// Where it is seen.
    pub dir: PathBuf,
    /// The operator says that no other host writes there.
    pub single_host: bool,
    /// Further mount options.
    pub options: Vec<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    format: u32,
    mounts: Vec<MountRecord>,
}

/// A mount whose lower directory is open; it may serve or not yet.
pub struct Mounted {
    record: MountRecord,
    filter: Arc<Filter>,
    root: std::fs::File,
    device: u64,
    mount: Mutex<Option<Mount>>,
    disks: Mutex<HashMap<FileKey, DiskId>>,
    /// Paths at which a file appeared or got a header; looked at before the next cut.
    noted: Mutex<BTreeSet<PathBuf>>,
    /// What was said once about a path.
    told: Mutex<BTreeSet<PathBuf>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Noted paths, at most: a guest cannot make the daemon's memory grow.
const NOTED_MAX: usize = 10_000;

impl Mounted {
    fn new(record: MountRecord, prepared: &Prepared) -> Result<Self> {
        use std::os::unix::fs::MetadataExt;
        let what = || format!("cannot use {}", record.source.display());
        let root = prepared.root().try_clone().map_err(|e| Error::io(what(), e))?;
        let device = root.metadata().map_err(|e| Error::io(what(), e))?.dev();
        Ok(Self {
            filter: prepared.filter().clone(),
            record,
            root,
            device,
            mount: Mutex::new(None),
            disks: Mutex::new(HashMap::new()),
            noted: Mutex::new(BTreeSet::new()),
            told: Mutex::new(BTreeSet::new()),
        })
    }

    /// Where it is seen; absolute, without links.
    pub fn dir(&self) -> &Path {
        &self.record.dir
    }

    /// `st_dev` of the lower files.
    pub fn lower_stat_device(&self) -> u64 {
        self.device
    }

    /// Looks at a lower file without keeping anything.
    pub fn look(&self, path: &Path) -> Result<Looked> {
        lower::look(&self.root, path, &self.dir().join(path))
    }

    /// Opens a lower file that is to be a disk; the filter keeps it until it is detached.
    pub fn resolve(&self, path: &Path) -> Result<LowerFile> {
        self.filter.resolve(path)
    }

    /// Puts a disk into the write path; returns when no earlier write to it is under way.
    pub fn attach<D: TrackedDisk + 'static>(&self, key: FileKey, disk: Arc<D>) -> Result<()> {
        let id = disk.id();
        self.filter.attach(key, disk)?;
        lock(&self.disks).insert(key, id);
        Ok(())
    }

    /// Takes a disk out of the write path. Nothing to do if it is not there.
    pub fn detach(&self, id: DiskId) {
        let keys: Vec<FileKey> =
            lock(&self.disks).iter().filter(|(_, d)| **d == id).map(|(k, _)| *k).collect();
        for key in keys {
            self.filter.detach(key);
            lock(&self.disks).remove(&key);
        }
    }

    /// The disk that a lower file is.
    pub fn attached(&self, key: FileKey) -> Option<DiskId> {
        lock(&self.disks).get(&key).copied()
    }

    /// A file appeared at `path`, or got a header.
    pub fn note(&self, path: PathBuf) {
        let mut noted = lock(&self.noted);
        if noted.len() < NOTED_MAX {
            noted.insert(path);
        }
    }

    /// What was noted.
    pub fn noted(&self) -> Vec<PathBuf> {
        lock(&self.noted).iter().cloned().collect()
    }

    /// It was looked at.
    pub fn forget_note(&self, path: &Path) {
        lock(&self.noted).remove(path);
    }

    /// Whether nothing was said about this path yet.
    pub fn tell_once(&self, path: &Path) -> bool {
        let mut told = lock(&self.told);
        told.len() < NOTED_MAX && told.insert(path.to_owned())
    }

    /// Who has this lower file open beneath the mount.
    pub fn holders(&self, key: FileKey) -> Vec<Holder> {
        lock(&self.mount).as_ref().map(|m| m.holders(key)).unwrap_or_default()
    }

    /// Files that are open beneath the mount, around the filter.
    pub fn open_beneath(&self) -> Vec<OpenFile> {
        let found = lock(&self.mount).as_ref().map(Mount::open_beneath).unwrap_or_default();
        let open = |(path, holder): (PathBuf, Holder)| OpenFile {
            pid: holder.pid.unwrap_or(0),
            command: holder.name,
            path: self.dir().join(path),
        };
        found.into_iter().map(open).collect()
    }

    /// Whether requests are answered.
    pub fn is_serving(&self) -> bool {
        lock(&self.mount).as_ref().is_some_and(|m| !m.has_ended())
    }
}

/// Every mount of the daemon, and those that it remembers and cannot restore.
pub struct Mounts {
    path: PathBuf,
    remembered: Mutex<Vec<MountRecord>>,
    mounted: Mutex<BTreeMap<PathBuf, Arc<Mounted>>>,
    failed: Mutex<BTreeMap<PathBuf, Failure>>,
    /// One mount or unmount at a time.
    changing: Mutex<()>,
}

impl Mounts {
    /// Reads what is remembered.
    pub fn load(state: &StateDir) -> Result<Self> {
        let path = state.mounts();
        let mut remembered = Vec::new();
        if let Some(bytes) = read_limited(&path, DOCUMENT_BYTES_MAX)? {
            let file: File = serde_json::from_slice(&bytes).map_err(|e| {
                Error::new(ErrorKind::Damaged, format!("cannot read {}", path.display()))
                    .source(e)
                    .hint(format!("remove it, start the daemon and mount again: rm {}", shell(&path)))
            })?;
            if file.format != FILE_FORMAT {
                return Err(Error::new(ErrorKind::Version, format!("cannot use {}", path.display()))
                    .why(format!("it has format {}, this program knows {FILE_FORMAT}", file.format))
                    .hint("use the version of afterimage that wrote it, or a newer one"));
            }
            remembered = file.mounts;
        }
        Ok(Self {
            path,
            remembered: Mutex::new(remembered),
            mounted: Mutex::new(BTreeMap::new()),
            failed: Mutex::new(BTreeMap::new()),
            changing: Mutex::new(()),
        })
    }

    fn remember(&self, change: impl FnOnce(&mut Vec<MountRecord>)) -> Result<()> {
        let mut remembered = lock(&self.remembered);
        let mut next = remembered.clone();
        change(&mut next);
        if next == *remembered {
            return Ok(());
        }
        let bytes = serde_json::to_vec_pretty(&File { format: FILE_FORMAT, mounts: next.clone() })
            .map_err(|e| Error::new(ErrorKind::Internal, "mounts cannot be written").source(e))?;
        write_atomic(&self.path, &bytes)?;
        *remembered = next;
        Ok(())
    }

    /// The mount at this directory.
    pub fn get(&self, dir: &Path) -> Option<Arc<Mounted>> {
        lock(&self.mounted).get(dir).cloned()
    }

    /// The deepest mount that `path` lies under.
    pub fn over(&self, path: &Path) -> Option<Arc<Mounted>> {
        let mounted = lock(&self.mounted);
        path.ancestors().find_map(|dir| mounted.get(dir)).cloned()
    }

    /// Every mount, by directory.
    pub fn all(&self) -> Vec<Arc<Mounted>> {
        lock(&self.mounted).values().cloned().collect()
    }

    /// Status of every mount, remembered ones that failed among them.
    pub fn statuses(&self) -> Vec<MountStatus> {
        let mounted = self.all();
        let failed = lock(&self.failed).clone();
        let lost = lock(&self.remembered).clone().into_iter().filter(|r| failed.contains_key(&r.dir));
        let blank = |record: &MountRecord| MountStatus {
            dir: record.dir.clone(),
            source: record.source.clone(),
            serving: false,
            error: None,
            file_system: String::new(),
            free_bytes: 0,
            protected_disks: 0,
            open_beneath: Vec::new(),
        };
        let mut all: Vec<MountStatus> = mounted
            .iter()
            .map(|m| MountStatus {
                serving: m.is_serving(),
                file_system: storage::type_of(&m.root),
                free_bytes: storage::space(&m.root).map_or(0, |(free, _)| free),
                ..blank(&m.record)
            })
            .collect();
        all.extend(lost.map(|r| MountStatus { error: failed.get(&r.dir).cloned(), ..blank(&r) }));
        all.sort_by(|a, b| a.dir.cmp(&b.dir));
        all
    }
}

impl Engine {
    /// Prepares a mount: nothing is mounted yet.
    fn prepare(&self, record: MountRecord) -> Result<(Arc<Mounted>, Prepared)> {
        storage::verify_apart("the state folder", self.state.root(), &record.dir)?;
        for vm in self.vms().iter().filter(|v| v.record().is_protected()) {
            storage::verify_apart("the vault", &vm.target.path, &record.dir)?;
        }
        let spec = MountSpec {
            source: record.source.clone(),
            dir: record.dir.clone(),
            single_host: record.single_host,
            options: record.options.clone(),
        };
        let watcher = Watcher { engine: self.me.clone(), mount: record.dir.clone() };
        let prepared = Mount::prepare(spec, Arc::new(watcher))?;
        Ok((Arc::new(Mounted::new(record, &prepared)?), prepared))
    }

    /// Restores every remembered mount, with the disks of the VMs attached before any serves.
    pub(super) fn restore_mounts(&self) {
        let _changing = lock(&self.mounts.changing);
        let mut prepared = Vec::new();
        let remembered = lock(&self.mounts.remembered).clone();
        for record in remembered {
            let dir = record.dir.clone();
            match self.prepare(record) {
                Ok((mounted, ready)) => {
                    lock(&self.mounts.mounted).insert(dir, mounted.clone());
                    prepared.push((mounted, ready));
                }
                Err(e) => self.mount_failed(&dir, &e),
            }
        }
        for vm in self.vms() {
            self.open_vm_logged(&vm);
        }
        for (mounted, ready) in prepared {
            if let Err(e) = serve(&mounted, ready) {
                lock(&self.mounts.mounted).remove(mounted.dir());
                self.mount_failed(mounted.dir(), &e);
            }
        }
    }

    fn mount_failed(&self, dir: &Path, e: &Error) {
        lock(&self.mounts.failed).insert(dir.to_owned(), Failure::from(e));
        let text = format!("{} cannot be mounted: {e}", dir.display());
        self.events.add(Severity::Critical, None, "mount-failed", &text);
    }

    pub(super) fn mount_command(&self, request: &MountRequest) -> Result<MountReply> {
        let _changing = lock(&self.mounts.changing);
        // A dead mount there is replaced when the new one serves: until then nothing is bare.
        let record = MountRecord {
            source: absolute(&request.source)?,
            dir: absolute(&request.dir)?,
            single_host: request.single_host,
            options: request.options.clone(),
        };
        let dir = record.dir.clone();
        // A mount that somebody removed by umount(8) is no mount any more.
        if let Some(known) = self.mounts.get(&dir) {
            if known.is_serving() {
                return Err(Error::new(ErrorKind::Exists, format!("{} is mounted already", dir.display()))
                    .hint("afterimage status"));
            }
            self.take_down(&known);
        }
        let (mounted, ready) = self.prepare(record.clone())?;
        lock(&self.mounts.mounted).insert(dir.clone(), mounted.clone());
        for vm in self.vms_of(&dir) {
            if vm.running().is_none() {
                self.open_vm_logged(&vm);
            }
        }
        if let Err(e) = serve(&mounted, ready) {
            self.take_down(&mounted);
            return Err(e);
        }
        lock(&self.mounts.failed).remove(&dir);
        for vm in self.vms_of(&dir) {
            self.start_shipper_logged(&vm);
        }
        self.caches.forget();
        let mut warnings = Vec::new();
        if let Err(e) = self.mounts.remember(|all| {
            all.retain(|r| r.dir != dir);
            all.push(record);
        }) {
            warnings.push(format!("the mount will not be restored after a restart: {e}"));
        }
        self.note_followed_folders();
        let status = self.mount_statuses().into_iter().find(|m| m.dir == dir);
        let mount = status.ok_or_else(|| Error::new(ErrorKind::Io, "the mount is gone already"))?;
        Ok(MountReply { mount, warnings })
    }

    pub(super) fn umount_command(&self, request: &UmountRequest) -> Result<Done> {
        let _changing = lock(&self.mounts.changing);
        let dir = std::fs::canonicalize(&request.dir).unwrap_or_else(|_| request.dir.clone());
        let Some(mounted) = self.mounts.get(&dir) else {
            if lock(&self.mounts.failed).remove(&dir).is_some() {
                self.mounts.remember(|all| all.retain(|r| r.dir != dir))?;
                return Ok(Done { message: format!("{} is forgotten", dir.display()), warnings: Vec::new() });
            }
            return Err(Error::new(ErrorKind::NotFound, format!("{} is no mount of ours", dir.display()))
                .hint("afterimage status"));
        };
        if let Some(mount) = &*lock(&mounted.mount) {
            mount.unmount(false)?;
        }
        self.take_down(&mounted);
        self.caches.forget();
        self.mounts.remember(|all| all.retain(|r| r.dir != dir))?;
        let vms = self.vms_of(&dir);
        let warning = |vm: &Arc<Vm>| {
            format!("VM {} is not replicated until {} is mounted again", vm.name(), dir.display())
        };
        Ok(Done {
            message: format!("{} is unmounted", dir.display()),
            warnings: vms.iter().map(warning).collect(),
        })
    }

    /// Protected VMs with a disk or a folder below the mount.
    fn vms_of(&self, dir: &Path) -> Vec<Arc<Vm>> {
        let mut vms = self.vms();
        vms.retain(|vm| {
            let record = vm.record();
            let has_disk = record.disks.iter().any(|d| d.mount == dir);
            record.is_protected() && (has_disk || record.folder.is_some_and(|f| f.mount == dir))
        });
        vms
    }

    /// A mount that does not serve any more: its VMs stop, cleanly.
    fn take_down(&self, mounted: &Mounted) {
        let dir = mounted.dir();
        let gone = Error::new(ErrorKind::DiskMissing, format!("{} is not mounted", dir.display()))
            .hint(format!("afterimage mount {}", shell(dir)));
        for vm in self.vms_of(dir) {
            self.suspend_vm(&vm, &gone);
        }
        lock(&self.mounts.mounted).remove(dir);
    }

    /// At the end of the daemon: idle mounts go and their VMs stop cleanly; those in use go with
    /// the process, and the recovery table sees to them.
    pub(super) fn stop_mounts(&self) {
        let _changing = lock(&self.mounts.changing);
        let mut busy = Vec::new();
        for mounted in self.mounts.all() {
            let unmounted = match &*lock(&mounted.mount) {
                Some(mount) => mount.unmount(false),
                None => Ok(()),
            };
            if let Err(e) = unmounted {
                log::warn!("{e}: it goes with the daemon, open files end with ENOTCONN");
                busy.push(mounted.dir().to_owned());
            }
        }
        let stopping = Error::new(ErrorKind::Busy, "the daemon is stopping");
        for vm in self.vms() {
            let is_busy = vm.record().disks.iter().any(|d| busy.contains(&d.mount));
            if !is_busy {
                self.suspend_vm(&vm, &stopping);
            } else if let Some(running) = vm.running()
                && let Err(e) = running.tracker.flush()
            {
                log::warn!("{}: marks cannot be written out: {e}", vm.name());
            }
        }
    }

    /// Mounts that somebody removed by umount(8): their VMs stop and say so.
    pub(super) fn look_after_mounts(&self) {
        let Ok(_changing) = self.mounts.changing.try_lock() else { return };
        for mounted in self.mounts.all() {
            if !mounted.is_serving() {
                let dir = mounted.dir().to_owned();
                self.take_down(&mounted);
                let e = Error::new(ErrorKind::DiskMissing, format!("{} was unmounted", dir.display()))
                    .hint(format!("afterimage mount {}", shell(&dir)));
                self.mount_failed(&dir, &e);
            }
        }
    }
}

fn serve(mounted: &Mounted, ready: Prepared) -> Result<()> {
    let mount = ready.serve()?;
    *lock(&mounted.mount) = Some(mount);
    Ok(())
}
