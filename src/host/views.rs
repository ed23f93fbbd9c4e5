//! Mounts of points: the view of all points, and writable clones; remembered in `views.json`
//! and mounted again when the daemon starts.
//!
//! A clone is written into the list before it is mounted and taken off after its overlay is
//! gone, so that a kill in between never leaves an overlay that nobody knows. The file is
//! replaced whole. Disk full: nothing new is mounted.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use super::api::types::*;
use super::engine::Engine;
use super::state::StateDir;
use super::targets::{Target, Targets};
use crate::base::durable::{read_limited, write_atomic};
use crate::base::limits::DOCUMENT_BYTES_MAX;
use crate::base::shell::shell;
use crate::base::{Error, ErrorKind, PointId, Result, VmId};
use crate::core::ports::points::{PointInfo, PointReader, PointStore, StoredVm};
use crate::core::retention::Keep;
use crate::view::{CloneMount, PointsMount};

/// Version of the file.
const FILE_FORMAT: u32 = 1;

/// A remembered clone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct CloneRecord {
    dir: PathBuf,
    vm: VmId,
    target: String,
    point: PointId,
    /// Name of the folder of its overlay.
    overlay: String,
    /// The point was pinned before, and stays so.
    was_pinned: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    format: u32,
    views: Vec<PathBuf>,
    clones: Vec<CloneRecord>,
}

/// Views and clones of a daemon.
pub struct Views {
    path: PathBuf,
    file: Mutex<File>,
    views: Mutex<BTreeMap<PathBuf, PointsMount>>,
    clones: Mutex<BTreeMap<PathBuf, CloneMount>>,
    /// One mount or unmount at a time.
    changing: Mutex<()>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Views {
    /// Reads what is remembered.
    pub fn load(state: &StateDir) -> Result<Self> {
        let path = state.root().join("views.json");
        let mut file = File { format: FILE_FORMAT, views: Vec::new(), clones: Vec::new() };
        if let Some(bytes) = read_limited(&path, DOCUMENT_BYTES_MAX)? {
            file = serde_json::from_slice(&bytes).map_err(|e| {
                Error::new(ErrorKind::Damaged, format!("cannot read {}", path.display())).source(e)
            })?;
            if file.format != FILE_FORMAT {
                return Err(Error::new(ErrorKind::Version, format!("cannot use {}", path.display()))
                    .why(format!("it has format {}, this program knows {FILE_FORMAT}", file.format))
                    .hint("use the version of afterimage that wrote it, or a newer one"));
            }
        }
        Ok(Self {
            path,
            file: Mutex::new(file),
            views: Mutex::new(BTreeMap::new()),
            clones: Mutex::new(BTreeMap::new()),
            changing: Mutex::new(()),
        })
    }

    fn remember(&self, change: impl FnOnce(&mut File)) -> Result<()> {
        let mut file = lock(&self.file);
        let mut next = file.clone();
        change(&mut next);
        if next == *file {
            return Ok(());
        }
        let bytes = serde_json::to_vec_pretty(&next)
            .map_err(|e| Error::new(ErrorKind::Internal, "views cannot be written").source(e))?;
        write_atomic(&self.path, &bytes)?;
        *file = next;
        Ok(())
    }

    /// Lets go of points that nobody looks at, so that they can be deleted.
    pub fn release_idle(&self) {
        lock(&self.views).values().for_each(PointsMount::release_idle);
    }

    /// At the end of the daemon: idle views and clones go, those in use go with the process.
    pub fn unmount_all(&self) {
        let _changing = lock(&self.changing);
        for view in lock(&self.views).values() {
            if let Err(e) = view.unmount() {
                log::warn!("{e}: it goes with the daemon");
            }
        }
        for clone in lock(&self.clones).values() {
            if let Err(e) = clone.unmount() {
                log::warn!("{e}: it goes with the daemon");
            }
        }
    }

    /// Directories of the clones of a VM.
    pub fn clones_of(&self, vm: VmId) -> Vec<PathBuf> {
        lock(&self.file).clones.iter().filter(|c| c.vm == vm).map(|c| c.dir.clone()).collect()
    }
}

/// The points of every vault of a host, as one store: what a view shows.
struct AllPoints {
    engine: std::sync::Weak<Engine>,
}

impl AllPoints {
    fn targets(&self) -> Vec<Arc<Target>> {
        let targets = self.engine.upgrade().map(|e| Targets::all(&e.targets)).unwrap_or_default();
        targets.into_iter().filter(|t| t.exists()).collect()
    }

    fn of(&self, vm: VmId) -> Result<Arc<Target>> {
        let holds = |t: &Arc<Target>| t.vms().is_ok_and(|vms| vms.iter().any(|v| v.id == vm));
        // That of a VM of this host first: an older vault may have points of it, too.
        let vms = self.engine.upgrade().map(|e| e.vms()).unwrap_or_default();
        let own = vms.iter().find(|v| v.id == vm).map(|v| v.target.name.clone());
        let mut targets = self.targets();
        targets.sort_by_key(|t| Some(&t.name) != own.as_ref());
        targets
            .into_iter()
            .find(holds)
            .ok_or_else(|| Error::new(ErrorKind::NotFound, format!("no vault has a VM {vm}")))
    }
}

impl PointStore for AllPoints {
    fn vms(&self) -> Result<Vec<StoredVm>> {
        let mut all: Vec<StoredVm> = Vec::new();
        for target in self.targets() {
            match target.vms() {
                Ok(vms) => all.extend(vms.into_iter().filter(|v| v.points > 0)),
                Err(e) => log::warn!("vault {} is not shown: {e}", target.name),
            }
        }
        Ok(all)
    }
    fn points(&self, vm: VmId) -> Result<Vec<PointInfo>> {
        self.of(vm)?.points(vm)
    }
    fn open(&self, vm: VmId, point: PointId) -> Result<Arc<dyn PointReader>> {
        PointStore::open(&*self.of(vm)?, vm, point)
    }
    fn set_pinned(&self, vm: VmId, point: PointId, pinned: bool) -> Result<()> {
        self.of(vm)?.set_pinned(vm, point, pinned)
    }
    fn delete(&self, vm: VmId, point: PointId) -> Result<()> {
        self.of(vm)?.delete(vm, point)
    }
    fn set_retention(&self, vm: VmId, keep: Keep) -> Result<()> {
        self.of(vm)?.set_retention(vm, keep)
    }
    fn expire(&self, vm: VmId) -> Result<Vec<PointId>> {
        self.of(vm)?.expire(vm)
    }
    fn wait_applied(&self, vm: VmId, patience: std::time::Duration) -> Result<bool> {
        self.of(vm)?.wait_applied(vm, patience)
    }
    fn verify(&self, vm: VmId) -> Result<Vec<String>> {
        self.of(vm)?.verify(vm)
    }
    fn purge(&self, vm: VmId) -> Result<()> {
        self.of(vm)?.purge(vm)
    }
}

impl Engine {
    fn start_view(&self, dir: &Path) -> Result<()> {
        let view = PointsMount::start(dir, Arc::new(AllPoints { engine: self.me.clone() }))?;
        lock(&self.views.views).insert(view.dir().to_owned(), view);
        Ok(())
    }

    fn start_clone(&self, record: &CloneRecord) -> Result<()> {
        let target = self.targets.get(&record.target)?;
        let reader = PointStore::open(&*target, record.vm, record.point)?;
        let overlay = self.state.clones().join(&record.overlay);
        let clone = CloneMount::start(&record.dir, reader, &overlay)?;
        lock(&self.views.clones).insert(clone.dir().to_owned(), clone);
        Ok(())
    }

    /// Mounts what is remembered.
    pub(super) fn restore_views(&self) {
        let file = lock(&self.views.file).clone();
        let views = file.views.iter().map(|dir| (dir, self.start_view(dir)));
        let views: Vec<_> = views.collect();
        let clones: Vec<_> = file.clones.iter().map(|c| (&c.dir, self.start_clone(c))).collect();
        for (dir, result) in views.into_iter().chain(clones) {
            if let Err(e) = result {
                let text = format!("points cannot be shown in {}: {e}", dir.display());
                self.events.add(Severity::Warning, None, "view-not-restored", &text);
            }
        }
    }

    pub(super) fn point_mount_command(&self, request: &PointMountRequest) -> Result<Done> {
        let _changing = lock(&self.views.changing);
        self.forget_ended_views();
        self.start_view(&request.dir)?;
        let dir = std::fs::canonicalize(&request.dir).unwrap_or_else(|_| request.dir.clone());
        let mut warnings = Vec::new();
        let remembered = self.views.remember(|f| {
            f.views.retain(|d| *d != dir);
            f.views.push(dir.clone());
        });
        if let Err(e) = remembered {
            warnings.push(format!("the view will not be restored after a restart: {e}"));
        }
        Ok(Done { message: format!("points are shown in {}", dir.display()), warnings })
    }

    /// Views and clones that somebody removed by umount(8).
    fn forget_ended_views(&self) {
        lock(&self.views.views).retain(|_, v| v.is_mounted());
        lock(&self.views.clones).retain(|_, c| c.is_mounted());
    }

    pub(super) fn point_clone_command(&self, request: &PointCloneRequest) -> Result<PointCloneReply> {
        let kept = self.kept(&request.vm)?;
        let point = self.point(&kept, request.point)?;
        let _changing = lock(&self.views.changing);
        self.forget_ended_views();
        let dir = std::fs::canonicalize(&request.dir).map_err(|e| {
            Error::io(format!("cannot mount on {}", request.dir.display()), e)
                .hint(format!("mkdir -p {}", shell(&request.dir)))
        })?;
        if lock(&self.views.file).clones.iter().any(|c| c.dir == dir) {
            return Err(Error::new(ErrorKind::Exists, format!("{} has a clone already", dir.display()))
                .hint(format!("afterimage point umount {}", shell(&dir))));
        }
        let record = CloneRecord {
            dir: dir.clone(),
            vm: kept.id,
            target: kept.target.name.clone(),
            point: point.id,
            overlay: crate::base::DiskId::random().to_string(),
            was_pinned: self.is_cloned(kept.id, point.id).unwrap_or(point.pinned),
        };
        self.views.remember(|f| f.clones.push(record.clone()))?;
        if let Err(e) = self.start_clone(&record) {
            self.drop_clone(&record)?;
            return Err(e);
        }
        kept.target.set_pinned(kept.id, point.id, true)?;
        let text = format!("point {} is cloned in {}", point.id, dir.display());
        self.events.add(Severity::Info, Some(kept.name.as_str()), "clone-made", &text);
        Ok(PointCloneReply { point: PointView { pinned: true, ..PointView::from(&point) }, dir })
    }

    /// Whether an older clone shows the point: then, whether the point was pinned before that.
    fn is_cloned(&self, vm: VmId, point: PointId) -> Option<bool> {
        let file = lock(&self.views.file);
        file.clones.iter().find(|c| c.vm == vm && c.point == point).map(|c| c.was_pinned)
    }

    /// Removes the overlay of a clone, and then its record.
    fn drop_clone(&self, record: &CloneRecord) -> Result<()> {
        CloneMount::delete_overlay(&self.state.clones().join(&record.overlay))?;
        self.views.remember(|f| f.clones.retain(|c| c.dir != record.dir))
    }

    pub(super) fn point_umount_command(&self, request: &PointUmountRequest) -> Result<Done> {
        let _changing = lock(&self.views.changing);
        let dir = std::fs::canonicalize(&request.dir).unwrap_or_else(|_| request.dir.clone());
        let file = lock(&self.views.file).clone();
        if let Some(record) = file.clones.iter().find(|c| c.dir == dir) {
            if let Some(clone) = lock(&self.views.clones).get(&dir) {
                clone.unmount()?;
            }
            lock(&self.views.clones).remove(&dir);
            self.drop_clone(record)?;
            self.unpin_after_clone(record);
            return Ok(Done {
                message: format!("the clone in {} and what was written to it are removed", dir.display()),
                warnings: Vec::new(),
            });
        }
        if !file.views.contains(&dir) {
            return Err(Error::new(ErrorKind::NotFound, format!("{} is no view of ours", dir.display()))
                .hint("afterimage point mount DIR"));
        }
        if let Some(view) = lock(&self.views.views).get(&dir) {
            view.unmount()?;
        }
        lock(&self.views.views).remove(&dir);
        self.views.remember(|f| f.views.retain(|d| *d != dir))?;
        Ok(Done { message: format!("{} is unmounted", dir.display()), warnings: Vec::new() })
    }

    /// A clone pins its point; the last clone of a point lets it expire again.
    fn unpin_after_clone(&self, record: &CloneRecord) {
        let file = lock(&self.views.file).clone();
        let is_shown = file.clones.iter().any(|c| c.vm == record.vm && c.point == record.point);
        if is_shown || record.was_pinned {
            return;
        }
        let unpinned = self
            .targets
            .get(&record.target)
            .and_then(|target| target.set_pinned(record.vm, record.point, false));
        if let Err(e) = unpinned {
            log::warn!("point {} stays pinned: {e}", record.point);
        }
    }
}
