//! A writable clone of a point: the view of it, plus a sparse overlay per disk.
//!
//! The clone pins its point for as long as it is mounted. Its folder holds
//!
//! ```text
//!   lock          held while the clone is mounted: two mounts of one overlay cannot be
//!   clone.json    which point, which disks; written last, so that a half-made overlay is none
//!   <id>.data     blocks that the clone has written, each at its own offset
//!   <id>.map      which blocks those are, and the size of the disk (`format::overlay`)
//! ```
//!
//! What a guest's flush means is kept: after fsync returned, the data survives a kill and a power
//! cut, whole. Mounting the same overlay again goes on where it was; another point is refused.
//! Files are opened without the page cache, so O_DIRECT and loop devices work as on a plain file.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::clone_fs::CloneFs;
use super::mountpoint::{Kind, Mountpoint, Owner};
use super::overlay::OverlayDisk;
use super::overlay_sync::{create_disk, file_names};
use super::reading::{Opened, errno_of};
use crate::base::durable::{read_limited, sync_dir, sync_parent, write_atomic};
use crate::base::error::Context;
use crate::base::limits::DOCUMENT_BYTES_MAX;
use crate::base::shell::shell;
use crate::base::{Clock, DiskId, Error, ErrorKind, PointId, Result, SystemClock, Timestamp};
use crate::core::ports::points::{PointDisk, PointReader};

const CLONE_FORMAT: u32 = 1;
const CLONE_FILE: &str = "clone.json";
const LOCK_FILE: &str = "lock";
/// Errors of one clone that are logged; the rest only go to its user.
const LOGGED_ERRORS_MAX: u32 = 64;

/// `clone.json`.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct CloneDocument {
    format: u32,
    point: PointId,
    disks: Vec<CloneDisk>,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct CloneDisk {
    id: DiskId,
    path: PathBuf,
    size: u64,
}

impl CloneDocument {
    fn of(reader: &dyn PointReader) -> Self {
        let disk = |d: &PointDisk| CloneDisk { id: d.id, path: d.path.clone(), size: d.size };
        Self {
            format: CLONE_FORMAT,
            point: reader.info().id,
            disks: reader.disks().iter().map(disk).collect(),
        }
    }

    fn read(folder: &Path) -> Result<Option<Self>> {
        #[derive(Deserialize)]
        struct Version {
            format: u32,
        }
        let path = folder.join(CLONE_FILE);
        let Some(bytes) = read_limited(&path, DOCUMENT_BYTES_MAX)? else { return Ok(None) };
        let what = || format!("{} cannot be read", path.display());
        let damaged = |e: serde_json::Error| Error::new(ErrorKind::Damaged, what()).source(e);
        let version: Version = serde_json::from_slice(&bytes).map_err(damaged)?;
        if version.format != CLONE_FORMAT {
            return Err(Error::new(ErrorKind::Version, what())
                .why(format!("it has format {}, this program knows {CLONE_FORMAT}", version.format))
                .hint("use the version of afterimage that wrote it, or delete the clone"));
        }
        serde_json::from_slice(&bytes).map(Some).map_err(damaged)
    }
}

/// A mounted clone.
pub struct CloneMount {
    mount: Mountpoint,
    clone: Arc<Clone>,
    overlay: PathBuf,
}

impl CloneMount {
    /// Mounts a writable clone of an open point on `dir`, an empty folder. `overlay_dir` is made
    /// if it is missing; an overlay that is there goes on where it was.
    ///
    /// Errors: those of a mount (no such folder, not empty, a mount already);
    /// [`ErrorKind::Refused`] if the overlay belongs to another point or is no overlay;
    /// [`ErrorKind::Busy`] if it is mounted elsewhere.
    pub fn start(dir: &Path, reader: Arc<dyn PointReader>, overlay_dir: &Path) -> Result<Self> {
        let (dir, owner) = Mountpoint::verify(dir)?;
        let overlay =
            std::path::absolute(overlay_dir).context(|| format!("{} is no path", overlay_dir.display()))?;
        if overlay.starts_with(&dir) {
            return Err(refused(&overlay, "it lies below the folder that the clone is mounted on"));
        }
        let clone = Arc::new(Clone::open(&overlay, reader, owner)?);
        let kind = Kind { subtype: "afterimage-clone", read_only: false };
        let mount = Mountpoint::mount(dir, &kind, CloneFs::new(clone.clone()))?;
        log::info!("a clone of point {} is in {}", clone.opened.reader.info().id, mount.dir().display());
        Ok(Self { mount, clone, overlay })
    }

    /// Where it is mounted.
    pub fn dir(&self) -> &Path {
        self.mount.dir()
    }

    /// Where its overlay is.
    pub fn overlay_dir(&self) -> &Path {
        &self.overlay
    }

    /// The point that it is a clone of.
    pub fn point(&self) -> PointId {
        self.clone.opened.reader.info().id
    }

    /// Whether it is still mounted: not after `umount`, by us or from outside.
    pub fn is_mounted(&self) -> bool {
        self.mount.is_mounted()
    }

    /// Bytes that its overlay takes on disk.
    pub fn overlay_bytes(&self) -> u64 {
        let bytes = |d: &OverlayDisk| {
            let blocks = |file: &File| file.metadata().map_or(0, |m| m.blocks());
            blocks(&d.data).saturating_add(blocks(&d.map)).saturating_mul(512)
        };
        self.clone.disks.iter().map(bytes).sum()
    }

    /// Removes the mount, makes everything written durable and lets go of the overlay, which stays.
    /// [`ErrorKind::Busy`] while files in it are open. After an umount from outside this is still
    /// to be called (or the value dropped) before the overlay can be used again.
    pub fn unmount(&self) -> Result<()> {
        if let Err(e) = self.mount.unmount() {
            // It may be the end of the daemon: what was written so far is to be found again.
            self.clone.sync_all()?;
            return Err(e);
        }
        self.clone.close()
    }

    /// Deletes the overlay of a clone that is not mounted, and nothing else: a folder that is no
    /// overlay is refused, files that are not ours stay. Nothing to do if there is none.
    pub fn delete_overlay(overlay_dir: &Path) -> Result<()> {
        let what = || format!("the clone in {} cannot be deleted", overlay_dir.display());
        if !overlay_dir.exists() {
            return Ok(());
        }
        let Some(document) = CloneDocument::read(overlay_dir)? else {
            return Err(Error::new(ErrorKind::Refused, what())
                .why("there is no clone in this folder")
                .hint(format!("ls -la {}", shell(overlay_dir))));
        };
        let lock = lock(overlay_dir)?;
        for disk in &document.disks {
            for name in [format!("{}.data", disk.id), format!("{}.map", disk.id)] {
                remove(&overlay_dir.join(name)).context(what)?;
            }
        }
        // Last, so that a kill before leaves a clone that can be deleted again.
        remove(&overlay_dir.join(CLONE_FILE)).context(what)?;
        remove(&overlay_dir.join(LOCK_FILE)).context(what)?;
        drop(lock);
        fs::remove_dir(overlay_dir).context(what)
    }
}

impl Drop for CloneMount {
    fn drop(&mut self) {
        if let Err(e) = self.unmount() {
            log::warn!("{e}");
        }
    }
}

/// The clone without FUSE: its tree, its disks.
pub(super) struct Clone {
    pub(super) opened: Opened,
    pub(super) disks: Vec<OverlayDisk>,
    pub(super) owner: Owner,
    overlay: PathBuf,
    clock: SystemClock,
    errors: AtomicU32,
    /// Held until the clone is unmounted.
    lock: Mutex<Option<Flock<File>>>,
}

impl Clone {
    fn open(overlay: &Path, reader: Arc<dyn PointReader>, owner: Owner) -> Result<Self> {
        let clock = SystemClock::default();
        make_folder(overlay)?;
        let lock = lock(overlay)?;
        let wanted = CloneDocument::of(reader.as_ref());
        match CloneDocument::read(overlay)? {
            None => create(overlay, &wanted, reader.as_ref(), owner, clock.now())?,
            Some(found) if found == wanted => {}
            Some(found) if found.point == wanted.point => {
                return Err(refused(overlay, "its disks are not those of the point"));
            }
            Some(found) => {
                let why = format!("it belongs to point {}, not to {}", found.point, wanted.point);
                return Err(refused(overlay, &why));
            }
        }
        let disks = (0..reader.disks().len())
            .map(|number| OverlayDisk::open(overlay, reader.clone(), number))
            .collect::<Result<Vec<_>>>()?;
        Ok(Self {
            opened: Opened::new(reader),
            disks,
            owner,
            overlay: overlay.to_owned(),
            clock,
            errors: AtomicU32::new(0),
            lock: Mutex::new(Some(lock)),
        })
    }

    /// The wall clock.
    pub(super) fn now(&self) -> Timestamp {
        self.clock.now()
    }

    /// Folder of the overlay, for its free space.
    pub(super) fn overlay(&self) -> &Path {
        &self.overlay
    }

    /// Makes everything durable and lets go of the overlay. Nothing to do the second time.
    fn close(&self) -> Result<()> {
        let mut lock = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        if lock.is_none() {
            return Ok(());
        }
        let synced = self.sync_all();
        *lock = None;
        synced
    }

    fn sync_all(&self) -> Result<()> {
        self.disks.iter().try_for_each(|disk| disk.sync(true))
    }

    /// The errno of an error; what is more than a plain answer goes to the log, once, here.
    pub(super) fn told<T>(&self, result: Result<T>) -> Result<T, Errno> {
        result.map_err(|e| {
            let errno = errno_of(&e);
            let is_plain = matches!(errno, Errno::ENXIO | Errno::EINVAL | Errno::EFBIG);
            if !is_plain && self.errors.fetch_add(1, Ordering::Relaxed) < LOGGED_ERRORS_MAX {
                log::error!("clone of point {}: {e}", self.opened.reader.info().id);
            }
            errno
        })
    }
}

fn refused(overlay: &Path, why: &str) -> Error {
    Error::new(ErrorKind::Refused, format!("the clone cannot use {}", overlay.display()))
        .why(why)
        .hint("name another folder for the clone")
}

fn make_folder(overlay: &Path) -> Result<()> {
    match fs::create_dir(overlay) {
        Ok(()) => sync_parent(overlay),
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        Err(e) => Err(Error::io(format!("cannot make the folder {}", overlay.display()), e)),
    }
}

/// A new overlay. A kill before `clone.json` leaves files that the next start makes anew.
fn create(
    overlay: &Path,
    document: &CloneDocument,
    reader: &dyn PointReader,
    owner: Owner,
    time: Timestamp,
) -> Result<()> {
    let ours: Vec<String> = reader.disks().iter().flat_map(file_names).collect();
    let what = || format!("cannot read {}", overlay.display());
    for entry in overlay.read_dir().context(what)? {
        let name = entry.context(what)?.file_name();
        let name = name.to_string_lossy();
        if name != LOCK_FILE && name != format!(".{CLONE_FILE}.new") && !ours.iter().any(|o| *o == name) {
            return Err(refused(overlay, &format!("it holds {name}, which is no part of a clone")));
        }
    }
    for disk in reader.disks() {
        create_disk(overlay, disk, owner, time)?;
    }
    sync_dir(overlay)?;
    let text = serde_json::to_vec_pretty(document)
        .map_err(|e| Error::new(ErrorKind::Internal, "clone.json cannot be written").source(e))?;
    write_atomic(&overlay.join(CLONE_FILE), &text)
}

fn lock(overlay: &Path) -> Result<Flock<File>> {
    let path = overlay.join(LOCK_FILE);
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .context(|| format!("cannot open {}", path.display()))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, e)| match e {
        Errno::EWOULDBLOCK => {
            Error::new(ErrorKind::Busy, format!("the clone in {} is in use", overlay.display()))
                .why("it is mounted already")
                .hint("findmnt -t fuse.afterimage-clone")
        }
        e => Error::io(format!("cannot lock {}", path.display()), e.into()),
    })
}

fn remove(path: &Path) -> std::io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
